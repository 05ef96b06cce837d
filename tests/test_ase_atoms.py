"""Reading and writing structures with labels, and every complaint about them."""

from __future__ import annotations

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from gpmlp.core.errors import DataWarning, UserError
from gpmlp.core.quantities import Prediction, Targets
from gpmlp.io import ase_atoms, extxyz

STRESS = np.array([[0.01, 0.001, 0.002], [0.001, 0.02, 0.003], [0.002, 0.003, 0.03]])
VOIGT = [0.01, 0.02, 0.03, 0.003, 0.002, 0.001]


def silicon(**results) -> Atoms:
    frame = bulk("Si", cubic=True)
    frame.calc = SinglePointCalculator(frame, **results) if results else None
    return frame


def one(frame: Atoms):
    return ase_atoms.from_ase([frame], ["data.xyz frame 7"])


# --- round trips


def test_read_gives_the_numbers_that_were_written(tmp_path, small_atoms):
    ase_atoms.write_frames(tmp_path / "a.xyz", small_atoms)
    structures, targets = ase_atoms.read(tmp_path / "a.xyz")
    expected, labels = ase_atoms.from_ase(small_atoms)
    # extended XYZ as ASE writes it keeps 8 decimals of positions and forces
    torch.testing.assert_close(structures.positions, expected.positions, atol=1e-8, rtol=0)
    torch.testing.assert_close(targets.forces, labels.forces, atol=1e-8, rtol=0)
    torch.testing.assert_close(targets.energies, labels.energies, atol=0, rtol=1e-15)
    torch.testing.assert_close(targets.stresses, labels.stresses, atol=0, rtol=1e-12)
    assert structures.names[3] == "a.xyz frame 3"
    assert targets.config_types == labels.config_types
    assert set(targets.config_types) == {"small", "big"}


def test_to_ase_inverts_from_ase(small_atoms, small_set):
    structures, targets = small_set
    for back, frame in zip(ase_atoms.to_ase(structures, targets), small_atoms, strict=True):
        np.testing.assert_array_equal(back.positions, frame.positions)
        np.testing.assert_array_equal(back.cell.array, frame.cell.array)
        np.testing.assert_array_equal(back.pbc, frame.pbc)
        assert back.get_potential_energy() == frame.get_potential_energy()
        np.testing.assert_array_equal(back.get_forces(), frame.get_forces())
        np.testing.assert_array_equal(back.get_stress(), frame.get_stress())
        assert back.info["config_type"] == frame.info["config_type"]


def test_prediction_becomes_calculator_results():
    structures, _ = ase_atoms.from_ase([silicon(), molecule("H2O")])
    n = structures.n_atoms
    stresses = torch.stack([torch.as_tensor(STRESS), torch.full((3, 3), float("nan"), dtype=torch.float64)])
    prediction = Prediction(torch.tensor([1.0, 2.0]), torch.ones(n), torch.ones(n, 3), stresses)
    crystal, water = ase_atoms.to_ase(structures, prediction)
    np.testing.assert_allclose(crystal.get_stress(), VOIGT)
    assert crystal.get_potential_energy(force_consistent=True) == 1.0
    assert water.calc.results["energies"].shape == (3,)
    assert "stress" not in water.calc.results


def test_frames_are_counted_in_the_file_whatever_is_kept(tmp_path, small_atoms):
    ase_atoms.write_frames(tmp_path / "a.xyz", small_atoms)
    assert ase_atoms.read(tmp_path / "a.xyz", "10:14:3")[0].names == ("a.xyz frame 10", "a.xyz frame 13")
    assert ase_atoms.read(tmp_path / "a.xyz", -1)[0].names == ("a.xyz frame 15",)
    with pytest.raises(UserError, match="cannot take the frames '99' of 16"):
        ase_atoms.read(tmp_path / "a.xyz", 99)
    with pytest.raises(UserError, match="keeps none of its 16 frames"):
        ase_atoms.read(tmp_path / "a.xyz", "16:")


# --- labels


def test_what_is_absent_is_nan():
    _, targets = one(silicon())
    assert targets.energies.isnan().all() and targets.forces.isnan().all() and targets.stresses.isnan().all()
    assert targets.config_types == ("",)


def test_stress_keeps_order_and_sign():
    _, targets = one(silicon(stress=np.array(VOIGT)))
    np.testing.assert_allclose(targets.stresses[0].numpy(), STRESS)


@pytest.mark.parametrize("prefix", ["REF_", "ref_", "dft_", "DFT_", ""])
def test_plain_keys(prefix):
    frame = silicon()
    forces = np.arange(24.0).reshape(8, 3)
    frame.info |= {f"{prefix}energy": -3.0, f"{prefix}virial": -STRESS * frame.get_volume()}
    frame.arrays[f"{prefix}force" if prefix == "ref_" else f"{prefix}forces"] = forces
    _, targets = one(frame)
    assert targets.energies.item() == -3.0
    np.testing.assert_array_equal(targets.forces.numpy(), forces)
    np.testing.assert_allclose(targets.stresses[0].numpy(), STRESS)


def test_virial_from_a_file_has_quips_sign(tmp_path):
    frame = silicon()
    frame.info["virial"] = -STRESS * frame.get_volume()
    ase.io.write(tmp_path / "v.xyz", frame)
    np.testing.assert_allclose(ase_atoms.read(tmp_path / "v.xyz")[1].stresses[0].numpy(), STRESS)


def test_free_energy_is_preferred_and_a_difference_is_told():
    with pytest.warns(DataWarning, match=r"frame 7: `free_energy` and `energy` differ by 0.0125 eV/atom"):
        _, targets = one(silicon(energy=-1.0, free_energy=-1.1))
    assert targets.energies.item() == -1.1


def test_equal_remarks_of_many_frames_are_one_warning():
    frames = [silicon(energy=-1.0, free_energy=-1.1) for _ in range(5)]
    with pytest.warns(DataWarning, match=r"frame 0, frame 1, frame 2 and 2 more") as caught:
        ase_atoms.from_ase(frames)
    assert len(caught) == 1


def test_stale_results_are_ignored():
    frame = silicon(energy=-1.0)
    frame.rattle(0.1)
    with pytest.warns(DataWarning, match="belong to other positions"):
        assert one(frame)[1].energies.isnan().all()


def test_a_virial_that_contradicts_the_stress_is_told():
    frame = silicon(stress=np.array(VOIGT))
    frame.info["virial"] = STRESS * frame.get_volume()
    with pytest.warns(DataWarning, match=r"differ by 0.06 eV/A\^3; `stress` is used"):
        np.testing.assert_allclose(one(frame)[1].stresses[0].numpy(), STRESS)


def test_noise_of_frames_and_atoms():
    frame, other = silicon(), silicon()
    frame.info |= {"energy_noise": 0.001, "force_noise": 0.1, "stress_noise": 0.01}
    other.arrays["force_noise"] = np.linspace(0.1, 0.8, 8)
    _, targets = ase_atoms.from_ase([frame, other])
    assert targets.energies_noise[0] == 0.001 and targets.energies_noise[1].isnan()
    assert targets.stresses_noise[0] == 0.01
    assert (targets.forces_noise[:8] == 0.1).all()
    np.testing.assert_allclose(targets.forces_noise[8:, 2].numpy(), other.arrays["force_noise"])


@pytest.mark.parametrize("value", [0.0, -0.1, float("inf")])
@pytest.mark.parametrize("key", ["energy_noise", "force_noise", "stress_noise"])
def test_noise_must_be_positive(key, value):
    frame = silicon()
    frame.info[key] = value
    with pytest.raises(UserError, match=rf"data.xyz frame 7: `{key}` must be positive.*got {value}"):
        one(frame)


def test_an_atom_without_a_force_is_not_known():
    forces = np.zeros((8, 3))
    forces[2] = np.nan
    _, targets = one(silicon(forces=forces))
    assert targets.forces.isnan().all(1).nonzero().flatten().tolist() == [2]


# --- complaints


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bad_force_names_frame_and_atom(value):
    forces = np.zeros((8, 3))
    forces[5, 1] = value
    with pytest.raises(UserError, match=r"data.xyz frame 7: the force on atom 5 is .*NaN or infinite"):
        one(silicon(forces=forces))


def test_infinite_energy():
    with pytest.raises(UserError, match="frame 7: the energy is infinite"):
        one(silicon(energy=float("inf")))


def test_wrong_shapes():
    with pytest.raises(UserError, match=r"frame 7: `forces` has the wrong shape: required \(8, 3\), got \(8, 2\)"):
        one(silicon(forces=np.zeros((8, 2))))
    with pytest.raises(UserError, match=r"frame 7: `stress` has the wrong shape.*got \(5,\)"):
        one(silicon(stress=np.zeros(5)))
    frame = silicon()
    frame.info["REF_energy"] = "high"
    with pytest.raises(UserError, match=r"frame 7: `energy` must hold numbers, one number; got 'high'"):
        one(frame)


def test_stress_must_be_symmetric_and_whole():
    frame = silicon()
    frame.info["ref_stress"] = STRESS + np.triu(np.ones((3, 3)), 1)
    with pytest.raises(UserError, match="frame 7: `stress` must be symmetric"):
        one(frame)
    with pytest.raises(UserError, match="frame 7: `stress` is partly NaN"):
        one(silicon(stress=np.array([np.nan, 0, 0, 0, 0, 0])))


def test_stress_without_periodicity():
    frame = silicon(stress=np.array(VOIGT))
    frame.calc.atoms.pbc = frame.pbc = False
    with pytest.raises(UserError, match="frame 7: has a stress but no periodic cell .pbc F F F"):
        one(frame)


def test_cells_without_volume():
    with pytest.raises(UserError, match="frame 7: periodic along a lattice vector of zero length"):
        one(Atoms("Si", cell=[3, 3, 0], pbc=True))
    with pytest.raises(UserError, match="frame 7: the cell is flat"):
        one(Atoms("Si", cell=[[3, 0, 0], [0, 3, 0], [3, 3, 0]], pbc=True))
    # an axis that is not periodic needs no lattice vector
    one(Atoms("Si", cell=[3, 3, 0], pbc=[True, True, False]))


def test_empty_things():
    with pytest.raises(UserError, match="There are no structures"):
        ase_atoms.from_ase([])
    with pytest.raises(UserError, match="frame 7: holds no atoms"):
        one(Atoms())
    with pytest.raises(UserError, match="frame 7: atom 1 is 'X', which is no element"):
        one(Atoms("SiX", positions=[[0, 0, 0], [3, 0, 0]]))


def test_position_that_is_no_number():
    with pytest.raises(UserError, match="frame 7: a position is NaN or infinite"):
        one(Atoms("Si", positions=[[0, 0, np.nan]]))


def test_missing_empty_and_unreadable_files(tmp_path):
    with pytest.raises(UserError, match=r"none.xyz: there is no such file"):
        ase_atoms.read(tmp_path / "none.xyz")
    with pytest.raises(UserError, match="is a folder"):
        ase_atoms.read(tmp_path)
    (tmp_path / "empty.xyz").touch()
    (tmp_path / "m.gpmlp").write_bytes(b"tensors")
    with pytest.raises(UserError, match="m.gpmlp: is a model file"):
        ase_atoms.read(tmp_path / "m.gpmlp")
    with pytest.raises(UserError, match="empty.xyz: is empty"):
        ase_atoms.read(tmp_path / "empty.xyz")
    (tmp_path / "blank.xyz").write_text("\n\n")
    with pytest.raises(UserError, match="blank.xyz: holds no structures"):
        ase_atoms.read(tmp_path / "blank.xyz")
    (tmp_path / "noise.xyz").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="noise.xyz: cannot be read: line 1: a number of atoms must stand there"):
        ase_atoms.read(tmp_path / "noise.xyz")
    (tmp_path / "data.unknown").write_text("hello\n")
    with pytest.raises(UserError, match="data.unknown: it cannot be read"):
        ase_atoms.read(tmp_path / "data.unknown")


def test_cut_off_and_broken_frames_are_named(tmp_path, small_atoms):
    path = tmp_path / "a.xyz"
    ase_atoms.write_frames(path, small_atoms[:3])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="a.xyz: cannot be read: frame 2 is cut off: 3 of 4 atoms are there"):
        ase_atoms.read(path)
    path.write_text("".join([*lines[:6], "\n", *lines[6:]]))
    with pytest.raises(UserError, match="line 7 is blank but more follows; frames after frame 0 would be lost"):
        ase_atoms.read(path)
    # frame 1 has 8 atoms after 6 lines of frame 0
    words = lines[9].split()
    path.write_text("".join([*lines[:9], " ".join(words[:3]) + "\n", *lines[10:]]))
    with pytest.raises(UserError, match="frame 1 of it cannot be read"):
        ase_atoms.read(path)


def test_bad_force_in_a_file_names_the_file(tmp_path, small_atoms):
    path = tmp_path / "bad.xyz"
    ase_atoms.write_frames(path, small_atoms[:3])
    lines = path.read_text().splitlines()
    lines[7 + 3] = " ".join([*lines[10].split()[:-1], "nan"])
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="bad.xyz frame 1: the force on atom 2 is"):
        ase_atoms.read(path)


def test_scan_counts_frames_and_ends(tmp_path):
    path = tmp_path / "a.xyz"
    path.write_text("1\n\nH 0 0 0\n2\ncomment\nH 0 0 0\nH 0 0 1\n1\n")
    layout = extxyz.scan_frames(path)
    assert len(layout.starts) == 2
    assert path.read_bytes()[: layout.end].endswith(b"H 0 0 1\n")
    assert "frame 2 is cut off" in layout.problem


def test_beside_keeps_the_references(tmp_path, small_set, potential):
    structures, targets = small_set
    prediction = potential(structures)
    ase_atoms.write_frames(tmp_path / "both.xyz", ase_atoms.with_predictions(structures, targets, prediction))
    _, again = ase_atoms.read(tmp_path / "both.xyz")
    torch.testing.assert_close(again.energies, targets.energies)
    frame = ase.io.read(tmp_path / "both.xyz", 2)
    assert frame.info["gpmlp_energy"] == pytest.approx(float(prediction.energies[2]), abs=1e-12)
    assert frame.info["gpmlp_stress"].shape == (6,)
    assert isinstance(targets, Targets)
