"""Checks of labels: every wrong kind, made from a healthy set, gives its finding with the right numbers; the healthy set gives none."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import ase.build
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

import gpmlp
from gpmlp.cli.main import main
from gpmlp.core.errors import UserError
from gpmlp.core.findings import Finding
from gpmlp.core.neighbors import find_neighbors
from gpmlp.core.structures import Structures
from gpmlp.core.units import BOHR, GPA, HARTREE
from gpmlp.io import ase_atoms
from gpmlp.io.label_checks import repeats, totals, work
from gpmlp.io.label_checks.coincident import check_coincident
from gpmlp.io.label_checks.near_frames import find_near_pairs
from gpmlp.io.label_checks.units import KCAL
from gpmlp.potential.baselines import IsolatedAtoms


def labelled(frame: Atoms, **more) -> Atoms:
    """A copy with the results of EMT."""
    frame = frame.copy()
    frame.calc = EMT()
    results = {"energy": frame.get_potential_energy(), "forces": frame.get_forces()}
    if frame.pbc.all():
        results["stress"] = frame.get_stress()
    out = frame.copy()
    out.calc = SinglePointCalculator(out, **(results | more))
    return out


def trajectory(start: Atoms, n: int, step: float, strain: float = 0.0, seed: int = 0) -> list[Atoms]:
    """Frames that random steps lead to, one from another, pulled back to the start."""
    rng, frames, frame = np.random.default_rng(seed), [], start.copy()
    for _ in range(n):
        away = frame.positions @ np.linalg.inv(frame.cell.array) @ start.cell.array if strain else frame.positions
        frame.positions += step * rng.normal(size=frame.positions.shape) - 0.1 * (away - start.positions)
        if strain:
            change = strain * rng.normal(size=(3, 3))
            back = 0.9 * frame.cell.array + 0.1 * start.cell.array
            frame.set_cell(back @ (np.eye(3) + 0.5 * (change + change.T)), scale_atoms=True)
        frames.append(labelled(frame))
    return frames


@pytest.fixture(scope="module")
def copper():
    """40 cells of copper, moving and breathing a little, and the isolated atom."""
    frames = trajectory(ase.build.bulk("Cu", cubic=True), 40, 0.03, 0.012)
    alone = labelled(Atoms("Cu"))
    alone.info["config_type"] = "isolated_atom"
    return ase_atoms.from_ase([alone, *frames])


@pytest.fixture(scope="module")
def molecules():
    """40 methanol molecules, one from another, turned at random, as files of molecular dynamics hold them."""
    frames, rng = trajectory(ase.build.molecule("CH3OH"), 40, 0.02), np.random.default_rng(3)
    for frame in frames:
        forces = frame.calc.results["forces"]
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        turn *= np.sign(np.linalg.det(turn))
        frame.positions = frame.positions @ turn
        frame.calc = SinglePointCalculator(frame, energy=frame.calc.results["energy"], forces=forces @ turn)
    return ase_atoms.from_ase(frames)


def kinds(findings) -> list[str]:
    return [finding.kind for finding in findings]


def only(findings, kind: str) -> Finding:
    """The finding of that kind, which is the only error or warning."""
    grave = [f for f in findings if f.severity != "note"]
    assert kinds(grave) == [kind], grave
    return grave[0]


def test_healthy_labels_are_not_doubted(copper, molecules):
    assert gpmlp.check(*copper) == ()
    assert kinds(gpmlp.check(*molecules)) == ["energies-of-elements-undetermined"]
    for data in (copper, molecules):
        fit = work.fit_work(find_near_pairs(*data))
        assert fit.force_slope == pytest.approx(1, abs=0.05)


def test_works_are_energy_differences_to_third_order(copper):
    """Half the displacement, an eighth of the error; cells and positions change together."""

    def error(amount: float) -> float:
        rng, base = np.random.default_rng(1), ase.build.bulk("Cu", cubic=True)
        base.rattle(0.1, rng=rng)
        moved = base.copy()
        moved.set_cell(
            base.cell.array @ (np.eye(3) + 0.1 * amount * np.array([[1, 0.3, 0], [0.3, 0, 0], [0, 0, -0.5]])), True
        )
        moved.positions += amount * rng.normal(size=(4, 3))
        pairs = find_near_pairs(*ase_atoms.from_ase([labelled(base), labelled(moved)]))
        return abs(float(pairs.energy - pairs.force_work - pairs.stress_work))

    assert error(0.04) / error(0.02) == pytest.approx(8, rel=0.25)


@pytest.mark.parametrize(
    ("energy", "force", "slope", "words"),
    [
        (1 / HARTREE, 1.0, 1 / HARTREE, "the energies are in Hartree"),
        (1 / KCAL, 1.0, 1 / KCAL, "the energies are in kcal/mol"),
        (1.0, -1.0, -1.0, "gradients"),
        (1.0, BOHR / HARTREE, HARTREE / BOHR, "the forces are in Hartree/Bohr"),
        (1 / HARTREE, 1 / KCAL, KCAL / HARTREE, "the energies are in Hartree and the forces are in kcal/mol/A"),
        (2 / HARTREE, -1.0, -2 / HARTREE, "gradients.* and the energies are in Rydberg"),
        (1 / 6, 1.0, 1 / 6, "the energies are per atom"),
    ],
)
def test_units_and_signs_of_molecules(molecules, energy, force, slope, words):
    structures, targets = molecules
    wrong = replace(targets, energies=targets.energies * energy, forces=targets.forces * force)
    finding = next(f for f in gpmlp.check(structures, wrong) if f.kind == "energies-against-forces")
    assert finding.severity == "error" and len(finding.frames) == 2
    assert finding.numbers["slope_forces"] == pytest.approx(slope, rel=0.05)
    assert re.search(words, finding.message), finding.message


def test_energies_in_hartree_with_stresses(copper):
    """Forces and stresses agree with each other: it is said once, of the energies."""
    structures, targets = copper
    finding = next(
        f
        for f in gpmlp.check(structures, replace(targets, energies=targets.energies / HARTREE))
        if f.severity == "error"
    )
    assert finding.kind == "energies-against-forces" and "agree with each other" in finding.message
    assert "the energies are in Hartree" in finding.message


@pytest.mark.parametrize(
    ("factor", "words"),
    [(1 / GPA, "in GPa"), (-1.0, "sign is the opposite"), (-10 / GPA, "in kbar"), ("volume", "virials in eV")],
)
def test_stresses_of_cells_that_are_no_copies(copper, factor, words):
    structures, targets = copper
    scale = structures.volumes.nan_to_num(1.0)[:, None, None] if factor == "volume" else factor
    finding = only(
        gpmlp.check(structures, replace(targets, stresses=targets.stresses * scale)), "stresses-against-energies"
    )
    assert finding.severity == "error" and words in finding.message, finding.message


def test_energies_of_other_frames(molecules):
    structures, targets = molecules
    order = torch.randperm(len(structures), generator=torch.Generator().manual_seed(0))
    finding = next(
        f for f in gpmlp.check(structures, replace(targets, energies=targets.energies[order])) if f.severity == "error"
    )
    assert finding.kind == "energies-against-forces" and "no relation" in finding.message


def test_each_file_is_judged_by_itself(molecules):
    structures, targets = molecules
    both = Structures.concatenate(
        [replace(structures, names=tuple(f"{name}.xyz frame {i}" for i in range(40))) for name in ("right", "wrong")]
    )
    wrong = replace(targets, energies=targets.energies / HARTREE, forces=targets.forces.clone())
    findings = gpmlp.check(both, type(targets).concatenate([targets, wrong]))
    (finding,) = (f for f in findings if f.kind == "energies-against-forces")
    assert "energies of wrong.xyz contradict" in finding.message and finding.frames[0].startswith("wrong.xyz")


def test_one_energy_that_forces_contradict(molecules):
    structures, targets = molecules
    energies = targets.energies.clone()
    energies[11] += 0.9
    finding = only(
        [f for f in gpmlp.check(structures, replace(targets, energies=energies)) if "undetermined" not in f.kind],
        "energy-against-near-frames",
    )
    assert finding.frames == (structures.names[11],)
    assert finding.numbers["deviation_eV"] == pytest.approx(0.9, abs=0.1)


def test_far_frames_have_no_verdict():
    rng, frames = np.random.default_rng(0), []
    for _ in range(12):
        frame = ase.build.bulk("Cu", cubic=True).repeat((2, 2, 1))
        frame.rattle(0.4, rng=rng)
        frames.append(labelled(frame))
    (note,) = gpmlp.check(*ase_atoms.from_ase(frames))
    assert note.kind == "energies-against-forces-no-verdict" and note.severity == "note"


def moved_and_permuted(frame: Atoms, seed: int) -> Atoms:
    """The same structure: translated, wrapped or rotated, with its atoms in another order."""
    rng, out = np.random.default_rng(seed), frame.copy()
    out = out[rng.permutation(len(out))]
    if out.pbc.any():
        out.positions += rng.normal(size=3)
        out.wrap()
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        out.set_cell(out.cell.array @ turn, scale_atoms=True)
    else:
        out.rotate(70, (1, 2, 3))
        out.positions += 3.0
    return out


@pytest.mark.parametrize("change", ["charge", "moved"])
@pytest.mark.parametrize("kind", ["crystal", "perfect crystal", "slab", "molecule"])
def test_same_structure_two_energies(kind, change):
    base = {
        "crystal": ase.build.bulk("Cu", cubic=True),
        "perfect crystal": ase.build.bulk("Cu", cubic=True).repeat(2),
        "slab": ase.build.fcc100("Cu", (2, 2, 2), vacuum=5.0),
        "molecule": ase.build.molecule("CH3OH"),
    }[kind]
    frames = [base.copy() for _ in range(4)]
    if kind != "perfect crystal":
        for i, frame in enumerate(frames):
            frame.rattle(0.15, seed=i)
    else:
        for i, frame in enumerate(frames):
            frame.set_cell(frame.cell.array * (1 + 0.01 * i), scale_atoms=True)
    frames.append(frames[1].copy() if change == "charge" else moved_and_permuted(frames[1], 5))
    frames = [labelled(frame) for frame in frames]
    known = frames[1].calc.results["energy"]
    assert frames[4].calc.results["energy"] == pytest.approx(known, abs=1e-6)
    healthy = gpmlp.check(*ase_atoms.from_ase(frames))
    assert "same-structure-two-energies" not in kinds(healthy)
    frames[4].calc.results["energy"] += 2.0
    finding = gpmlp.check(*ase_atoms.from_ase(frames))[0]
    assert finding.kind == "same-structure-two-energies" and finding.severity == "error"
    assert finding.frames == ("frame 1", "frame 4")
    assert finding.numbers["difference_eV"] == pytest.approx(2.0)
    assert f"{known:.6g} and {known + 2:.6g} eV" in finding.message and "nothing can fit both" in finding.message


def exchanged(frame: Atoms) -> Atoms:
    """With the elements of its first two atoms exchanged: every distance stays."""
    frame.numbers[:2] = frame.numbers[1::-1]
    return frame


def isomer(frame: Atoms) -> Atoms:
    """With the same distances from its first atom, and others between the rest."""
    axis, point = frame.positions[1] - frame.positions[0], frame.positions[0]
    moved = Atoms(frame.numbers[-1:], frame.positions[-1:])
    moved.rotate(40, axis, center=point)
    frame.positions[-1] = moved.positions[0]
    return frame


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda frame: moved_and_permuted(frame, 5), True),
        (lambda frame: moved_and_permuted(frame, 6), True),
        (lambda frame: Atoms(frame.numbers[::-1], frame.positions[::-1] * [1, 1, -1]), True),
        (lambda frame: exchanged(frame), False),
        (lambda frame: exchanged(moved_and_permuted(frame, 5)[np.argsort(-frame.numbers)]), False),
        (lambda frame: isomer(frame), False),
        (lambda frame: Atoms(frame.numbers, frame.positions + np.eye(6, 3) * 0.05), False),
    ],
)
def test_molecules_are_compared_atom_by_atom(change, same):
    """Those of equal signature and unequal energy; here by hand."""
    frame = ase.build.molecule("CH3OH")
    frame.rattle(0.1, seed=2)
    pair = ase_atoms.structures_from_ase([frame, change(frame.copy())])
    assert repeats.same_atoms_elsewhere(pair) == same


def test_each_atom_of_a_crystal_has_a_partner():
    first = ase.build.bulk("Cu", cubic=True)
    first.rattle(0.15, seed=1)
    second = first.copy()
    second.positions[2] = second.positions[3]  # every atom of it is where one of the first is
    pair = ase_atoms.structures_from_ase([first, second])
    assert repeats.same_atoms_elsewhere(pair.select([0, 0])) and not repeats.same_atoms_elsewhere(pair)


def test_what_signatures_do_not_see_is_compared():
    """A far atom hardly changes them."""
    frames = []
    for distance in (16.0, 16.3):
        frame = ase.build.molecule("CH3OH") + Atoms("Al", [[distance, 0, 0]])
        frames.append(labelled(frame, energy=distance))
    structures, targets = ase_atoms.from_ase(frames)
    assert len(repeats.equal_pairs(structures, torch.tensor([0, 1]))) == 1
    assert "same-structure-two-energies" not in kinds(repeats.check_repeats(structures, targets))


def test_mirror_images_have_one_energy_and_near_structures_may_differ():
    first, second = (labelled(ase.build.molecule("CH3CHO")) for _ in range(2))
    second.positions[:, 0] *= -1
    third = first.copy()
    third.positions[0, 0] += 0.05
    frames = [first, labelled(second), labelled(third)]
    assert "same-structure-two-energies" not in kinds(gpmlp.check(*ase_atoms.from_ase(frames)))


def test_same_structure_two_forces(copper):
    structures, targets = copper
    both = Structures.concatenate([structures, structures.select([5])])
    twice = type(targets).concatenate([targets, targets.select(structures, [5])])
    assert gpmlp.check(both, twice) == ()
    forces = twice.forces.clone()
    forces[-4:] *= 2
    finding = only(gpmlp.check(both, replace(twice, forces=forces)), "same-structure-two-forces")
    assert set(finding.frames) == {structures.names[5]}


def test_labels_of_an_earlier_frame(copper):
    structures, targets = copper
    forces, energies, stresses = targets.forces.clone(), targets.energies.clone(), targets.stresses.clone()
    here, there = slice(*structures.offsets[7:9]), slice(*structures.offsets[8:10])
    forces[there], energies[8], stresses[8] = forces[here], energies[7], stresses[7]
    findings = gpmlp.check(structures, replace(targets, forces=forces, energies=energies, stresses=stresses))
    finding = next(f for f in findings if f.kind == "stale-labels")
    assert finding.frames == (structures.names[7], structures.names[8])


def test_isolated_atoms(copper):
    structures, targets = copper
    energies = targets.energies.clone()
    energies[0] = 500.0
    wrong = replace(targets, energies=energies)
    finding = only(gpmlp.check(structures, wrong), "isolated-atoms-of-another-reference")
    binding = float((targets.energies[1:] / 4).median()) - 500
    assert finding.numbers["binding_eV_per_atom"] == pytest.approx(binding, abs=0.1) and finding.frames == (
        structures.names[0],
    )
    both = Structures.concatenate([structures, structures.select([0])])
    findings = gpmlp.check(both, type(targets).concatenate([targets, wrong.select(structures, [0])]))
    finding = next(f for f in findings if f.kind == "isolated-atoms-differ")
    assert finding.severity == "error" and finding.numbers["highest_eV"] == 500


def with_lone_atom(tmp_path, box: float, config_type: str):
    """20 cells of copper of cohesive energies, and a single atom 3.5 eV above: read from a file."""
    alone = Atoms("Cu", cell=[box] * 3, pbc=box > 0)
    alone.calc = SinglePointCalculator(alone, energy=40.0, forces=np.zeros((1, 3)))
    if config_type:
        alone.info["config_type"] = config_type
    frames = trajectory(ase.build.bulk("Cu", cubic=True), 20, 0.03)
    ase_atoms.write_frames(tmp_path / "a.xyz", [*frames, alone])
    return ase_atoms.read_labelled(tmp_path / "a.xyz")


@pytest.mark.parametrize(("box", "config_type"), [(0.0, ""), (12.0, ""), (12.0, "single atoms"), (9.0, "IsolatedAtom")])
def test_single_atoms_without_neighbours_are_isolated(tmp_path, box, config_type):
    data = with_lone_atom(tmp_path, box, config_type)
    assert IsolatedAtoms.from_frames(data.structures, data.targets) == {29: 40.0}
    notes = [f for f in data.findings if f.kind == "lone-atoms"]
    assert len(notes) == (config_type != "IsolatedAtom") and all(f.frames == ("a.xyz frame 20",) for f in notes)
    findings = gpmlp.check(data.structures, data.targets)
    assert kinds(f for f in findings if f.severity != "note") == ["isolated-atoms-of-another-reference"]


@pytest.mark.parametrize(("box", "config_type"), [(2.5, ""), (12.0, "charged")])
def test_single_atoms_that_are_not_isolated(tmp_path, box, config_type):
    data = with_lone_atom(tmp_path, box, config_type)
    assert IsolatedAtoms.from_frames(data.structures, data.targets) == {}
    finding = only(gpmlp.check(data.structures, data.targets), "energy-outlier")
    assert "a single atom that is not marked as isolated" in finding.message and "failed" not in str(finding)
    assert "config_type=isolated_atom" in finding.advice


@pytest.mark.parametrize(
    "atoms", [ase.build.bulk("Cu", cubic=True), ase.build.bulk("Cu", cubic=True) * 3, ase.build.molecule("CH3OH")]
)
@pytest.mark.parametrize("where", ["beside", "across the boundary"])
def test_atoms_on_top_of_one_another(atoms, where):
    frames = [atoms.copy() for _ in range(3)]
    for frame in frames[1:]:
        frame.positions[-1] = frame.positions[0] + [0.1, 0.05, 0.0]
    if where == "across the boundary" and atoms.pbc.any():
        frames[1].positions[-1] += frames[1].cell[0] - 2 * frames[1].cell[2]
    frames[1].positions[-1] += [0.1, 0, 0]  # less near than in the last frame
    structures, targets = ase_atoms.from_ase(frames)
    finding = next(f for f in gpmlp.check(structures, targets) if f.kind == "coincident-atoms")
    assert finding.severity == "error" and finding.frames == ("frame 2", "frame 1")
    assert finding.numbers["distance_A"] == pytest.approx(np.hypot(0.1, 0.05))
    assert f"atoms 0 and {len(atoms) - 1} are 0.112 A apart" in finding.message
    assert not check_coincident(structures.select([0]))
    with pytest.raises(UserError, match=r"closer than 0.3 A"):
        find_neighbors(structures.select([1]), 3.0)


@pytest.mark.parametrize(
    ("symbol", "hartree"), [("C", -37.845), ("O", -75.067), ("Si", -289.36), ("Fe", -1263.5), ("Kr", -2753.4)]
)
def test_energies_of_all_electrons(symbol, hartree):
    """Exact non-relativistic energies: Chakravorty et al., Phys. Rev. A 47, 3649 (1993); Fe, Kr: Koga & Thakkar 1996 + correlation."""
    z = torch.tensor(ase.data.atomic_numbers[symbol])
    assert float(totals.all_electron_energy(z)) == pytest.approx(HARTREE * hartree, rel=8e-3)


def test_units_of_all_electron_energies(molecules):
    """Energies whose forces are in the same wrong unit agree with these: only the size of the total tells."""
    structures, targets = molecules
    total = HARTREE * (-115.7)  # methanol
    shifted = replace(targets, energies=targets.energies + total)
    assert kinds(gpmlp.check(structures, shifted)) == ["energies-of-elements-undetermined"]
    for unit, factor in (("Hartree", 1 / HARTREE), ("kcal/mol", 1 / KCAL), ("Rydberg", 2 / HARTREE)):
        wrong = replace(shifted, energies=shifted.energies * factor, forces=shifted.forces * factor)
        finding = next(f for f in gpmlp.check(structures, wrong) if f.kind == "energies-in-another-unit")
        assert f"probably in {unit}" in finding.message


def test_energies_beyond_those_of_all_electrons(copper):
    structures, targets = copper
    wrong = replace(targets, energies=targets.energies - 1e5 * structures.counts)
    finding = next(f for f in gpmlp.check(structures, wrong) if f.kind == "energies-in-another-unit")
    assert finding.severity == "error" and finding.numbers["ratio_to_all_electrons"] > 2


def test_energies_per_atom():
    frames = [labelled(ase.build.bulk("Cu", cubic=True).repeat((n, 1, 1))) for n in (1, 2, 3) for _ in range(4)]
    for i, frame in enumerate(frames):
        frame.rattle(0.02, seed=i)
    structures, targets = ase_atoms.from_ase([labelled(frame) for frame in frames])
    targets = replace(targets, energies=targets.energies - 100.0 * structures.counts)
    assert "energies-per-atom" not in kinds(gpmlp.check(structures, targets))
    finding = next(
        f
        for f in gpmlp.check(structures, replace(targets, energies=targets.energies / structures.counts))
        if f.kind == "energies-per-atom"
    )
    assert finding.severity == "error"


def test_undetermined_elements(molecules):
    structures, targets = molecules
    finding = only(gpmlp.check(structures, targets), "energies-of-elements-undetermined")
    assert "CH4O" in finding.message and finding.numbers["independent_compositions"] == 1
    assert (
        gpmlp.check(structures, replace(targets, energies=torch.full_like(targets.energies, math.nan)))[0].kind
        == "no-energies"
    )


@pytest.mark.parametrize("energy", [0.0, -70.0])
def test_failed_energies(copper, energy):
    structures, targets = copper
    energies = targets.energies - 20.0 * structures.counts
    energies[18] = 4 * energy
    finding = only(gpmlp.check(structures, replace(targets, energies=energies)), "energy-outlier")
    assert finding.severity == "error" and finding.frames == (structures.names[18],)
    expected = energy - float(((targets.energies / structures.counts)[1:]).median() - 20)
    assert finding.numbers["deviation_eV_per_atom"] == pytest.approx(expected, abs=0.1)


def test_wild_forces(copper):
    structures, targets = copper
    forces = targets.forces.clone()
    atom = int(structures.offsets[9]) + 2
    forces[atom] = 900.0
    finding = next(f for f in gpmlp.check(structures, replace(targets, forces=forces)) if f.kind == "force-outlier")
    assert finding.frames == (structures.names[9],) and "atom 2 (Cu)" in finding.message
    assert finding.numbers["force_eV_per_A"] == pytest.approx(900 * 3**0.5)


def test_command(copper, tmp_path, capsys):
    structures, targets = copper
    energies = targets.energies - 20.0 * structures.counts
    energies[18] = 0.0
    file = tmp_path / "train.xyz"
    ase_atoms.write_frames(file, ase_atoms.to_ase(structures, replace(targets, energies=energies)))
    other = tmp_path / "other.xyz"
    other.write_bytes(file.read_bytes())
    assert main(["check", str(file)]) == 0
    text = capsys.readouterr().out
    assert "energy-outlier" in text and "train.xyz frame 18" in text and "1 error" in text
    assert main(["check", str(file), str(other), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["n_structures"] == 82 and content["n_atoms"] == 322 and content["counts"]["error"] >= 1
    assert {"kind", "severity", "frames", "message", "numbers", "advice"} == set(content["findings"][0])
    assert main(["check", str(tmp_path / "nothing.xyz")]) == 2


def test_units_of_one_system_count_as_one_cause():
    reasons = work.explain_slope(1 / BOHR)
    assert "the forces are in eV/Bohr" in reasons
    assert "the energies are in Hartree and the forces are in Hartree/Bohr" in reasons
    # two units of different systems, which would explain it a little better, are two causes
    assert work.explain_slope(0.0965) == ["the energies are in kJ/mol and the forces are in kJ/mol/nm"]
    assert work.explain_slope(43.58) == ["the forces are in Hartree/Bohr"]
    assert work.explain_slope(17.0) == [] and "gradients" in work.explain_slope(-1.0)[0]


def test_forces_in_a_smaller_unit_with_energies_in_it(copper):
    """Energies in kcal/mol agree with forces in kcal/mol/A; forces are too large everywhere then."""
    structures, targets = copper
    scaled = replace(
        targets, energies=targets.energies / KCAL, forces=targets.forces / KCAL, stresses=targets.stresses * torch.nan
    )
    (finding,) = [f for f in gpmlp.check(structures, scaled) if f.kind == "forces-in-another-unit"]
    assert finding.severity == "warning" and "if they are in kcal/mol/A" in finding.message
    assert not [f for f in gpmlp.check(structures, targets) if f.kind == "forces-in-another-unit"]
