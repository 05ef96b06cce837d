"""Bad input from end to end: the command ends with status 2 and one line that says what is wrong and where."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import replace

import ase.build
import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from conftest import copper, labelled

from gpmlp.cli import main
from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Targets
from gpmlp.fitting.fit import fit
from gpmlp.io import ase_atoms
from gpmlp.io.recipe_files import load_recipe
from gpmlp.potential.potential import Potential
from gpmlp.recipe import Recipe

QUICK = ["--set", "descriptor.cutoff=4", "--set", "descriptor.n_max=4", "--set", "descriptor.l_max=2"]
SMALL = [*QUICK, "--set", "inducing.n=10", "--set", "inducing.gradients=0"]


@pytest.fixture
def frames():
    return [copper(seed) for seed in range(6)]


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Fit a file (frames, or its text) and expect one line on standard error that matches."""
    monkeypatch.chdir(tmp_path)

    def check(content, message: str, *options: str) -> None:
        if isinstance(content, (str, bytes)):
            (tmp_path / "train.xyz").write_bytes(content if isinstance(content, bytes) else content.encode())
        else:
            ase_atoms.write_frames(tmp_path / "train.xyz", content)
        status = main.main(["fit", "train.xyz", "-o", "m.gpmlp", *SMALL, *options])
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert status == 2
        assert len(error) == 1 and re.search(message, error[0]), error
        assert not (tmp_path / "m.gpmlp").exists()

    return check


def with_forces(frame: Atoms, atom: int, value: float) -> Atoms:
    forces = frame.calc.results["forces"].copy()
    forces[atom, 0] = value
    frame.calc = SinglePointCalculator(frame, **(frame.calc.results | {"forces": forces}))
    return frame


def bare(frame: Atoms, **results) -> Atoms:
    frame.calc = SinglePointCalculator(frame, **results) if results else None
    return frame


def test_empty_file(refused):
    refused("", "train.xyz: is empty")


def test_unreadable_file(refused):
    refused(bytes(range(200)), "train.xyz: cannot be read: line 1")
    refused("2\ncomment\nCu 0 0 0\n", "train.xyz: cannot be read: frame 0 is cut off: 1 of 2 atoms")
    refused("1\ncomment\nCu 0 zero 0\n", "train.xyz: frame 0 of it cannot be read: could not convert")
    refused("1\ncomment\nQq 0 0 0\n", "train.xyz: frame 0 of it cannot be read")


def test_missing_file(refused, tmp_path):
    assert main.main(["fit", str(tmp_path / "none.xyz"), "-o", "m.gpmlp"]) == 2


def test_empty_frame(refused, frames):
    refused('0\nProperties=species:S:1:pos:R:3 pbc="F F F"\n', "train.xyz frame 0: holds no atoms")


def test_frames_without_energy_are_fine_while_others_have_labels(frames, small_recipe):
    bare(frames[1])
    bare(frames[2], forces=frames[2].calc.results["forces"])
    structures, targets = ase_atoms.from_ase(frames)
    _, report = fit(structures, targets, small_recipe)
    assert report.rows == {"energies": 4, "forces": 5 * 12, "stresses": 4 * 6}


def test_no_labels_at_all(refused, frames):
    refused([bare(frame) for frame in frames], "No structure has an energy, forces or a stress to learn from")


def test_labels_of_other_names(capsys, model_file, frames, tmp_path):
    for frame in frames:
        energy, forces = frame.get_potential_energy(), frame.get_forces()
        bare(frame)
        frame.info |= {"E_pbe": energy, "label": "a"}
        frame.arrays["f_pbe"] = forces
    ase_atoms.write_frames(tmp_path / "other.xyz", frames)
    assert main.main(["evaluate", str(model_file), str(tmp_path / "other.xyz")]) == 0
    energies, forces = (line for line in capsys.readouterr().err.splitlines() if "recognised" in line)
    assert energies.startswith("warning: ") and forces.startswith("warning: ")
    assert "no energies were recognised in any of its 6 frames; their info hold E_pbe. Energies are called" in energies
    assert "their arrays hold f_pbe. Forces are called forces or force, bare or with the name of their source" in forces
    assert "Name them by --keys forces=f_pbe" in forces
    # energies alone are nothing to warn of, unless something looks like forces
    for k, expected in enumerate((1, 0)):
        for frame in frames:
            frame.info["REF_energy"] = 1.0
            if k:
                del frame.arrays["f_pbe"]
        ase_atoms.write_frames(tmp_path / "other.xyz", frames)
        assert main.main(["evaluate", str(model_file), str(tmp_path / "other.xyz")]) == 0
        assert capsys.readouterr().err.count("no forces were recognised") == expected


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_force_that_is_no_number(refused, frames, value):
    with_forces(frames[4], 2, value)
    refused(frames, "train.xyz frame 4: the force on atom 2 is .*NaN or infinite")


def test_infinite_energy(refused, frames):
    bare(frames[3], energy=float("inf"))
    refused(frames, "train.xyz frame 3: the energy is infinite")


def test_wrong_shape(refused):
    text = (
        '1\nLattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3:forces:R:2 energy=1 pbc="T T T"\nCu 0 0 0 0 0\n'
    )
    refused(text, r"train.xyz frame 0: `forces` has the wrong shape: required \(1, 3\), got \(1, 2\)")


def test_devices_that_are_not_there(refused, frames, small_set, potential, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    have = r"torch has cpu(, mps)? on this machine"
    refused(frames, f"device 'cuda:1' cannot be used: {have}; choose one of these", "--set", "device=cuda:1")
    refused(frames, f"device: 'gpu' is no device of gpmlp; {have}", "--set", "device=gpu")
    with pytest.raises(UserError, match=f"device 'cuda' cannot be used: {have}"):
        fit(*small_set, Recipe(device="cuda"))
    # a model that was fitted on a GPU is used without one
    header, tensors = potential.state()
    header["recipe"]["device"] = "cuda"
    assert Potential.from_state(header, tensors).recipe.device == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"device 'cuda:1' cannot be used: torch has cpu, cuda(, mps)? \(1 of them\)"):
        load_recipe(overrides=["device=cuda:1"])


def test_labels_of_other_structures(small_set, small_recipe):
    structures, targets = small_set
    with pytest.raises(
        UserError, match="The targets are of 16 structures with 96 atoms, the structures are 2 with 12 atoms"
    ):
        fit(structures.select([0, 1]), targets, small_recipe)


def test_species_without_training_data(potential, model_file, capsys, tmp_path):
    silver = labelled(ase.build.bulk("Ag"))
    with pytest.raises(UserError, match="not trained on Ag .*it knows Cu"):
        potential(ase_atoms.from_ase([silver])[0])
    ase_atoms.write_frames(tmp_path / "ag.xyz", [copper(0), silver])
    assert main.main(["evaluate", str(model_file), str(tmp_path / "ag.xyz")]) == 2
    assert "ag.xyz frame 1: the potential was not trained on Ag" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("distance", [0.0, 0.25])
def test_atoms_on_top_of_each_other(refused, frames, distance):
    bad = Atoms("Cu2", positions=[[1, 1, 1], [1, 1, 1 + distance]], cell=[8, 8, 8], pbc=True)
    refused(
        [*frames, bare(bad, energy=1.0)],
        rf"train.xyz frame 6: atoms 0 and 1 are {distance:.3f} A apart .*closer than 0.3 A",
    )


def test_an_atom_on_top_of_its_image(refused, frames):
    bad = Atoms("Cu", cell=[8, 8, 0.2], pbc=True)
    refused([*frames, bare(bad, energy=1.0)], "train.xyz frame 6: atoms 0 and 0 are 0.200 A apart")


def test_cells_without_volume(refused, frames):
    flat = Atoms("Cu", cell=[[4, 0, 0], [0, 4, 0], [4, 4, 0]], pbc=True)
    refused([*frames, bare(flat, energy=1.0)], "train.xyz frame 6: the cell is flat")
    zero = Atoms("Cu", cell=[4, 4, 0], pbc=True)
    refused([*frames, bare(zero, energy=1.0)], "train.xyz frame 6: periodic along a lattice vector of zero length")


def test_stress_without_periodicity(refused, frames):
    stress = frames[0].calc.results["stress"]
    frames[0].pbc = False
    refused(
        [bare(frames[0], energy=1.0, stress=stress)], "train.xyz frame 0: has a stress but no periodic cell .pbc F F F"
    )


@pytest.mark.parametrize("factor", [-1.0, 160.2176634])
def test_stress_that_contradicts_the_energies(small_recipe, factor):
    frames = []
    for amount in (-0.04, -0.02, 0.0, 0.02, 0.04):
        frame = ase.build.bulk("Cu", cubic=True)
        frame.set_cell(frame.cell.array * (1 + amount), scale_atoms=True)
        frames.append(labelled(frame))
    structures, targets = ase_atoms.from_ase(frames + [copper(1)])
    _, good = fit(structures, targets, small_recipe)
    _, bad = fit(structures, replace(targets, stresses=targets.stresses * factor), small_recipe)
    assert not any("contradict" in text for text in good.warnings)
    assert any(re.search("the stresses contradict the energies: dE = ", text) for text in bad.warnings)


@pytest.mark.parametrize("value", ["0", "-0.1"])
def test_noise_that_is_not_positive(refused, frames, value):
    refused(frames, rf"`noise.force` must be greater than 0; got {value}", "--set", f"noise.force={value}")
    frames[2].info["energy_noise"] = float(value)
    refused(frames, "train.xyz frame 2: `energy_noise` must be positive and finite")


def test_noise_of_targets_is_checked(small_set):
    structures, _ = small_set
    unknown = Targets.unlabelled(structures)
    with pytest.raises(UserError, match="`energies_noise` must be positive and finite"):
        replace(unknown, energies_noise=torch.zeros(len(structures), dtype=torch.float64))


def test_noise_of_a_config_type_that_is_not_there(refused, frames):
    message = "no training structure has this config_type. Perhaps you meant 'small'"
    refused(frames, message, "--set", "noise.config_types.smal.force=1")


def test_more_inducing_points_than_environments(refused, frames):
    message = "inducing.n asks for 25 inducing points, but the training data hold only 24 environments"
    refused(frames, message, "--set", "inducing.n=25")


def test_recipe_with_a_typo(refused, frames, tmp_path):
    (tmp_path / "r.yaml").write_text("descriptor: {cutof: 5}\n")
    message = r"r.yaml and --set: unknown key 'descriptor.cutof'. Perhaps you meant 'descriptor.cutoff'"
    refused(frames, message, "--recipe", "r.yaml")


def test_disk_full_while_the_model_is_written(tmp_path, frames, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ase_atoms.write_frames("train.xyz", frames)
    (tmp_path / "m.gpmlp").write_text("old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert main.main(["fit", "train.xyz", "-o", "m.gpmlp", *SMALL]) == 2
    assert (
        "m.gpmlp: could not be written: No space left on device; the old file is untouched" in capsys.readouterr().err
    )
    assert (tmp_path / "m.gpmlp").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gpmlp", "train.xyz"]


def test_frames_whose_energy_is_missing_are_read(tmp_path, frames):
    bare(frames[0])
    ase.io.write(tmp_path / "a.xyz", frames)
    _, targets = ase_atoms.read(tmp_path / "a.xyz")
    assert targets.energies.isnan().tolist() == [True] + [False] * 5
