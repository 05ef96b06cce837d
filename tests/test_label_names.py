"""Which label is taken from a file: names of every code, one source, given keys, and what is said of the rest."""

from __future__ import annotations

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator

from gpmlp.cli import main
from gpmlp.core.errors import UserError
from gpmlp.core.findings import FindingWarning
from gpmlp.io.ase_atoms import from_ase, read, read_labelled
from gpmlp.io.label_names import label_name, parse_keys

STRESS = np.array([[0.01, 0.001, 0.002], [0.001, 0.02, 0.003], [0.002, 0.003, 0.03]])
VOIGT = STRESS[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]


def frames(n: int = 4, **sources: str) -> list[Atoms]:
    """Frames with labels under the given names; 'energy', 'forces' and 'stress' are numbers that tell sources apart."""
    out = []
    for i in range(n):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.1, seed=i)
        for k, (name, kind) in enumerate(sources.items()):
            if kind == "energy":
                atoms.info[name] = -float(i + 10 * k)
            elif kind == "forces":
                atoms.set_array(name, np.full((4, 3), 1.0 + i + 10 * k))
            else:
                atoms.info[name] = -STRESS * atoms.get_volume() if "vir" in name.lower() else STRESS
        out.append(atoms)
    return out


def kinds(data) -> dict[str, list]:
    found: dict[str, list] = {}
    for finding in data.findings:
        found.setdefault(finding.kind, []).append(finding)
    return found


@pytest.fixture
def written(tmp_path):
    def write(atoms):
        ase.io.write(tmp_path / "a.xyz", atoms, format="extxyz")
        return tmp_path / "a.xyz"

    return write


# --- names


@pytest.mark.parametrize(
    ("key", "kind", "source"),
    [
        ("energy", "energy", ""),
        ("Energy", "energy", ""),
        ("REF_energy", "energy", "ref"),
        ("dft-Forces", "forces", "dft"),
        ("dftforce", "forces", "dft"),
        ("free_energy", "free_energy", ""),
        ("REF_free_energy", "free_energy", "ref"),
        ("energy_pbe", "energy", "pbe"),
        ("my.code_virials", "virial", "my_code"),
        ("stresses", "stress", ""),
        ("QM_virial", "virial", "qm"),
        ("energy_eV", "energy", ""),
        ("forces_eV_A", "forces", ""),
    ],
)
def test_names_of_labels(key, kind, source):
    name = label_name(key)
    assert name is not None and (name.kind, name.source) == (kind, source)


@pytest.mark.parametrize(
    "key",
    "energyA inter_energy interaction_energy kinetic_energy energy_noise force_sigma energy_per_atom forces_weight enforced "
    "energy_Ha forces_kcal_mol stress_GPa dft_energy_Ry "
    "adsorption_energy max_force virial_sigma environment dispersion_forces e_pbe config_energy_weight".split(),
)
def test_names_of_other_things(key):
    assert label_name(key) is None


@pytest.mark.parametrize(
    ("stem", "energy", "forces"),
    [
        ("", "energy", "forces"),
        ("", "energy", "force"),
        ("REF_", "REF_energy", "REF_forces"),
        ("QM_", "QM_energy", "QM_forces"),
    ],
)
@pytest.mark.parametrize("name", ["virial", "virials", "Virial", "stress", "stresses"])
@pytest.mark.parametrize("shape", ["3x3", "9", "6"])
def test_stresses_and_virials_of_every_code(written, stem, energy, forces, name, shape):
    atoms = frames(**{energy: "energy", forces: "forces", f"{stem}{name}": "stress"})
    for frame in atoms:
        tensor = frame.info[f"{stem}{name}"]
        frame.info[f"{stem}{name}"] = {
            "3x3": tensor,
            "9": tensor.reshape(9),
            "6": tensor[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]],
        }[shape]
    if f"{stem}{name}" in ("virial", "stress") and shape != "3x3":
        # ASE writes these as three rows only
        text = f'{name}="{" ".join(map(str, frame.info.pop(name)))}"'
        atoms = [frame]
        path = written(atoms)
        lines = path.read_text().split("\n")
        path.write_text("\n".join([lines[0], f"{lines[1]} {text}", *lines[2:]]))
    else:
        path = written(atoms)
    _, targets = read(path)
    assert not targets.energies.isnan().any() and not targets.forces.isnan().any()
    np.testing.assert_allclose(targets.stresses.numpy(), np.broadcast_to(STRESS, targets.stresses.shape), rtol=1e-6)


# --- one source


def test_forces_of_another_model_are_left_out(written):
    atoms = frames(REF_energy="energy", REF_forces="forces")
    for frame in atoms:
        frame.calc = SinglePointCalculator(frame, forces=np.full((4, 3), 99.0))
    with pytest.warns(FindingWarning, match=r"forces `forces` \(4\) are not read beside `REF_forces` \(4\)") as caught:
        _, targets = read(written(atoms))
    assert targets.forces[:4, 0].tolist() == [11.0] * 4
    assert caught[0].message.finding.numbers == {"frames": 4.0}
    # in memory as in the file
    with pytest.warns(FindingWarning, match="are not read beside"):
        assert from_ase(atoms)[1].forces[0, 0] == 11.0


def test_energies_and_forces_of_two_sources_ask(written):
    path = written(frames(REF_energy="energy", forces="forces"))
    with pytest.raises(UserError, match=r"two sources. Say that .* by --keys energy=REF_energy,forces=forces"):
        read(path)
    _, targets = read(path, keys={"energy": "REF_energy", "forces": "forces"})
    assert targets.energies.tolist() == [0, -1, -2, -3] and not targets.forces.isnan().any()
    _, targets = read(path, keys={"energy": "REF_energy", "forces": "none"})
    assert targets.forces.isnan().all()


def test_ref_free_energy_beside_energy(written):
    path = written(frames(REF_free_energy="energy", REF_forces="forces", energy="energy"))
    with pytest.warns(FindingWarning, match=r"energies `energy` \(4\) are not read beside `REF_free_energy` \(4\)"):
        _, targets = read(path)
    assert targets.energies.tolist() == [0, -1, -2, -3]
    # where the plain names are complete, they are what is read
    path = written(frames(REF_free_energy="energy", energy="energy", forces="forces"))
    with pytest.warns(FindingWarning, match=r"energies `REF_free_energy` \(4\) are not read beside `energy` \(4\)"):
        _, targets = read(path)
    assert targets.energies.tolist() == [-10, -11, -12, -13]


def test_two_functionals_ask_and_equal_numbers_do_not(written):
    names = {"pbe_energy": "energy", "pbe_forces": "forces", "r2scan_energy": "energy", "r2scan_forces": "forces"}
    path = written(frames(**names))
    with pytest.raises(
        UserError, match=r"two sources, .*which differ.*--keys energy=r2scan_energy,forces=r2scan_forces"
    ):
        read(path)
    _, targets = read(path, keys={"energy": "r2scan_energy"})  # forces of the same source with it
    assert targets.energies[1] == -21 and targets.forces[0, 0] == 31
    atoms = frames(**names)
    for frame in atoms:
        frame.info["r2scan_energy"], frame.arrays["r2scan_forces"] = (
            frame.info["pbe_energy"],
            frame.arrays["pbe_forces"],
        )
    assert not any(f.severity != "note" for f in read_labelled(written(atoms)).findings)


def test_a_model_is_never_the_reference(written):
    path = written(frames(energy="energy", forces="forces", MACE_energy="energy", MACE_forces="forces"))
    data = read_labelled(path)
    assert data.targets.energies[1] == -1
    assert [f.severity for f in kinds(data)["labels-not-taken"]] == ["note", "note"]
    data = read_labelled(written(frames(MACE_energy="energy", MACE_forces="forces")))
    assert data.targets.energies.isnan().all()
    assert [f.severity for f in kinds(data)["labels-not-taken"]] == ["warning", "warning"]


def test_names_in_half_of_the_frames_are_said(written):
    atoms = frames(REF_energy="energy", REF_forces="forces") + frames(3, energy="energy", forces="forces")
    data = read_labelled(written(atoms))
    assert data.targets.energies.isnan().tolist() == [False] * 4 + [True] * 3
    energies, forces = kinds(data)["labels-not-taken"]
    assert "energies `energy` (3) are not read beside `REF_energy` (4); 3 of 7 frames have no other energy" in str(
        energies
    )
    assert energies.severity == "warning" and energies.frames == ("a.xyz frame 4", "a.xyz frame 5", "a.xyz frame 6")
    data = read_labelled(written(atoms), keys={"energy": ("REF_energy", "energy"), "forces": ("REF_forces", "forces")})
    assert not data.targets.energies.isnan().any() and not data.targets.forces.isnan().any()


@pytest.mark.parametrize(
    ("energy", "forces"),
    [
        ("total_energy", "forces"),
        ("potential_energy", "force"),
        ("REF_total_energy", "REF_forces"),
        ("energy_total", "forces"),
    ],
)
def test_total_energy_is_of_the_source_of_the_forces(written, energy, forces):
    data = read_labelled(written(frames(**{energy: "energy", forces: "forces"})))
    assert not data.targets.energies.isnan().any() and not data.targets.forces.isnan().any()
    assert "labels-not-taken" not in kinds(data)


def test_total_energy_beside_a_plainer_name_is_not_taken(written):
    atoms = frames(energy="energy", forces="forces")
    for one in atoms:
        one.info |= {"total_energy": one.info["energy"] + 0.1, "potential_energy": one.info["energy"]}
    data = read_labelled(written(atoms))
    np.testing.assert_array_equal(data.targets.energies, [one.info["energy"] for one in atoms])
    for one in atoms:
        del one.info["energy"]
    data = read_labelled(written(atoms))  # with the kinetic energy in it
    np.testing.assert_array_equal(data.targets.energies, [one.info["potential_energy"] for one in atoms])


def test_unknown_source_counts_with_energies_and_forces_only(written):
    assert not read(written(frames(foo_energy="energy", foo_forces="forces")))[1].energies.isnan().any()
    with pytest.warns(FindingWarning, match=r"energies `foo_energy` \(4\) are not read .*--keys energy=foo_energy"):
        _, targets = read(written(frames(foo_energy="energy", forces="forces")))
    assert targets.energies.isnan().all() and not targets.forces.isnan().any()


def test_free_energy_in_some_frames_only(written):
    atoms = frames(energy="energy", forces="forces")
    atoms[0].info["free_energy"] = -7.0  # that of the others is not known: energies of one zero
    _, targets = read(written(atoms))
    assert targets.energies.tolist() == [0, -1, -2, -3]


def test_units_are_not_guessed(written):
    path = written(frames(energy_Ha="energy", forces_Ha_bohr="forces", stress_GPa="stress"))
    data = read_labelled(path)
    assert data.targets.energies.isnan().all() and data.targets.stresses.isnan().all()
    assert [str(f).split("hold ")[1].split(".")[0] for f in kinds(data)["labels-of-unknown-name"]] == [
        "energy_Ha", "forces_Ha_bohr", "stress_GPa"
    ]  # fmt: skip


def test_unknown_names_in_half_of_the_frames(written):
    data = read_labelled(written(frames(energy="energy", forces="forces") + frames(3, E_pbe="energy", forces="forces")))
    (finding,) = kinds(data)["labels-of-unknown-name"]
    assert "no energies were recognised of 3 of its 7 frames; their info hold E_pbe" in finding.message


def test_free_energies_in_half_of_the_frames(written):
    data = read_labelled(
        written(frames(energy="energy", forces="forces") + frames(3, free_energy="energy", forces="forces"))
    )
    (finding,) = kinds(data)["two-kinds-of-energy"]
    assert finding.numbers == {"free_energy_frames": 3, "energy_frames": 4} and not data.targets.energies.isnan().any()


def test_stress_of_another_source_is_named(written):
    path = written(frames(REF_energy="energy", REF_forces="forces", vasp_virial="stress"))
    with pytest.warns(FindingWarning, match=r"stresses `vasp_virial` \(4\) are not read .*--keys stress=vasp_virial"):
        assert read(path)[1].stresses.isnan().all()
    np.testing.assert_allclose(read(path, keys={"stress": "vasp_virial"})[1].stresses[0].numpy(), STRESS)


def test_what_was_taken_is_a_note(written):
    (note,) = read_labelled(written(frames(energy="energy", forces="forces"))).findings
    assert (note.kind, note.severity) == ("labels-taken", "note")
    assert "energies from `energy` in 4, forces from `forces` in 4, stresses from none of 4 frames" in note.message
    assert note.numbers == {"energies_frames": 4, "forces_frames": 4, "stresses_frames": 0}


def test_labels_that_are_nan_are_no_labels(written):
    atoms = frames(REF_energy="energy", REF_forces="forces")
    for frame in atoms[:2]:
        frame.info["REF_energy"] = np.nan
    atoms[0].arrays["REF_forces"][:] = np.nan
    note = kinds(read_labelled(written(atoms)))["labels-taken"][0]
    assert "`REF_energy` in 2 (NaN in 2 more), forces from `REF_forces` in 3 (NaN in 1 more)" in note.message
    assert note.numbers == {"energies_frames": 2, "forces_frames": 3, "stresses_frames": 0}
    atoms[0].info["energy"] = -7.0
    finding = kinds(read_labelled(written(atoms)))["labels-not-taken"][0]
    assert "1 of 4 frames have no other energy label" in finding.message and finding.frames == ("a.xyz frame 0",)
    assert "--keys energy=REF_energy+energy (first or, in frames without it, second)" in finding.advice
    keys = {"energy": ("REF_energy", "energy"), "forces": "REF_forces"}
    energies = read_labelled(written(atoms), keys=keys).targets.energies
    assert energies.isnan().tolist() == [False, True, False, False] and energies[0] == -7


def test_a_number_counts_before_nan(written):
    """Of several keys of one source."""
    atoms = frames(energy="energy", free_energy="energy", forces="forces", force="forces")
    atoms[0].info["free_energy"] = np.nan
    atoms[0].arrays["forces"][:] = np.nan
    targets = read_labelled(written(atoms)).targets
    assert not targets.energies.isnan().any() and not targets.forces.isnan().any()


@pytest.mark.parametrize(
    ("key", "text", "severity"),
    [
        ("energy_unit", "Hartree", "error"),
        ("units", "kcal/mol", "error"),
        ("unit", "energy:Ha,length:bohr", "error"),
        ("force_units", "eV/bohr", "error"),
        ("energy_unit", "furlong", "warning"),
        ("energy_unit", "eV", None),
        ("units", "eV, Angstrom", None),
        ("units", "energy:eV,forces:eV/A,stress:eV/A^3", None),
        ("force_unit", "eV/Å", None),
        ("stress-unit", "eV/Ang**3", None),
        ("units", "metal", None),
        ("community", "Hartree", None),
    ],
)
def test_stated_units(written, key, text, severity):
    atoms = frames(energy="energy", forces="forces")
    for frame in atoms[1:]:
        frame.info[key] = text
    found = kinds(read_labelled(written(atoms))).get("labels-in-another-unit", [])
    assert [f.severity for f in found] == ([severity] if severity else [])
    if severity:
        assert f"`{key}` says '{text}'" in found[0].message and len(found[0].frames) == 3


# --- given keys


def test_keys_are_parsed_and_checked(written):
    assert parse_keys("energy=E, forces=F+G,stress=none") == {
        "energy": ("E",),
        "forces": ("F", "G"),
        "stress": ("none",),
    }
    assert parse_keys("") == {}
    for text in ("energy", "energy=", "charge=q"):
        with pytest.raises(UserError, match="--keys must be as energy=REF_energy"):
            parse_keys(text)
    with pytest.raises(
        UserError, match=r"no frame has `REF_enrgy`, which --keys gives.*Perhaps you meant 'REF_energy'"
    ):
        read(written(frames(REF_energy="energy")), keys={"energy": "REF_enrgy"})


def test_keys_on_the_command_line(model_file, written, capsys):
    path = written(frames(E_pbe="energy", F_pbe="forces"))
    assert (
        main.main(["evaluate", str(model_file), str(path), "--keys", "energy=E_pbe,forces=F_pbe", "--no-variance"]) == 0
    )
    assert "no energies" not in capsys.readouterr().err
    assert main.main(["evaluate", str(model_file), str(path), "--keys", "energy:E_pbe"]) == 2
    assert "--keys must be as" in capsys.readouterr().err


def test_a_name_without_a_value_is_no_energy(tmp_path):
    (tmp_path / "a.xyz").write_text("1\nenergy\nH 0 0 0\n")
    with pytest.raises(UserError, match="frame 0: `energy` must hold numbers"):
        read(tmp_path / "a.xyz")


# --- noises, weights, masks


def test_sigmas_of_gap_fit(written):
    atoms = frames(3, energy="energy", forces="forces", virial="stress")
    atoms[0].info |= {"energy_sigma": 0.04, "force_sigma": 0.2, "virial_sigma": 0.5}
    atoms[1].set_array("force_atom_sigma", np.arange(1.0, 5.0))
    atoms[2].set_array("force_component_sigma", np.arange(1.0, 13.0).reshape(4, 3))
    structures, targets = read(written(atoms))
    assert targets.energies_noise[0].item() == pytest.approx(0.01)  # of the total energy of four atoms
    assert targets.stresses_noise[0].item() == pytest.approx(0.5 / structures.volumes[0].item())
    assert (targets.forces_noise[:4] == 0.2).all()
    assert targets.forces_noise[4:8, 1].tolist() == [1, 2, 3, 4]
    assert targets.forces_noise[8:].flatten().tolist() == list(range(1, 13))
    assert targets.energies_noise[1:].isnan().all()


def test_weights_are_named_with_their_counts(written):
    atoms = frames(energy="energy", forces="forces")
    for i, frame in enumerate(atoms):
        frame.info |= {"config_weight": 2.0, "energy_weight": float(i > 0)}
    findings = kinds(read_labelled(written(atoms)))["weights-not-read"]
    assert [f.severity for f in findings] == ["note", "warning"]
    assert "`config_weight` of 4 frames is not read" in findings[0].message
    assert findings[1].frames == ("a.xyz frame 0",) and findings[1].numbers["zeros"] == 1


def test_noises_that_are_read_are_named(written):
    atoms = frames(energy="energy", forces="forces")
    for frame in atoms[:2]:
        frame.info["energy_sigma"] = 0.1
    (note,) = kinds(read_labelled(written(atoms)))["weights-read"]
    assert note.severity == "note" and "`energy_sigma` of 2 frames is read" in note.message


def test_masked_forces(written):
    atoms = frames(1, energy="energy", forces="forces")
    atoms[0].set_array("force_mask", np.array([True, False, False, True]))
    assert read(written(atoms))[1].forces.isnan().any(1).tolist() == [True, False, False, True]
