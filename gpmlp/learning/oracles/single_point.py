"""A single point: energy, forces and stress of one structure by a calculator, and what is believed of its answer; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import covalent_radii

from gpmlp.core.calculators import build_calculator, electronic_kwargs
from gpmlp.core.single_point import NOT_CONVERGED, LabelError, ask_calculator, build_atoms, check_answer

FORCES, STRESS = "forces", "stress"  # what a label's energy can be compared with
STEP = 0.02  # A, the largest displacement along the forces when energies are compared with them
SHAKE = 0.25  # of STEP: every atom moves at random as well, also one that the oracle holds
RESTING = (
    0.05  # eV/A; where all forces are smaller, atoms are moved by STEP at random: there is no slope, but a curvature
)
SLOPE = 0.05  # by which energies and forces may disagree: a share of the work that forces can do on the way,
ROUGHNESS = 5e-5  # and eV/atom, what a self-consistent code leaves unconverged
STRAIN = 0.02 * np.array(
    [[1.0, 0.5, 0.3], [0.5, -0.6, 0.2], [0.3, 0.2, -0.4]]
)  # without change of volume: no Pulay stress
STRAIN_SLOPE, STRAIN_ROUGHNESS = (
    0.75,
    5e-4,
)  # as SLOPE and ROUGHNESS, but only a wrong sign or unit counts: with the cell plane waves change
UNCHANGED = 1e-3  # eV/A
BONDED = 1.3  # times the sum of covalent radii: atoms so near exert forces
# what is said where energies and forces (stresses) differ by a factor, to 10 %
UNITS = {
    -1.0: "of the opposite sign",
    51.422: "in Hartree/Bohr",
    25.711: "in Rydberg/Bohr",
    1 / 27.2114: "right, and the energy in Hartree",
    1 / 13.6057: "right, and the energy in Rydberg",
    23.0605: "right, and the energy in kcal/mol",
}
STRESS_UNITS = {
    -1.0: "of the opposite sign",
    1 / 160.2177: "in GPa",
    -1 / 160.2177: "a pressure in GPa",
    1 / 1602.177: "in kbar",
}
ALIKE = 0.1


class ContradictionError(LabelError):
    """A label whose energy is not that of its forces or stress: a fault of the oracle, not of the structure.

    Attributes:
        calls: how often the calculator was asked.
    """

    calls = 0


def compute_label(job: Mapping[str, Any], directory: Path, earlier: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The label that a job asks for: energy (eV), forces (eV/A), stress ((3, 3) eV/A^3 or None), as plain numbers; `calls` of the
    calculator, and what was `checked` against the energy.

    Args:
        directory: where the calculator may leave files.
        earlier: the label, where it is there already and only has to be checked.

    Raises:
        CalculatorError: the oracle cannot label anything like this.
        LabelError: what came back cannot be trusted.
        Exception: whatever the calculator raises.
    """
    atoms = build_atoms(job["structure"], job["magnetic_moments"], job["calculator"])
    if earlier is None:
        answer, calls, checked = _answer(job, atoms, directory / "label"), 1, []
    else:
        answer = {name: earlier[name] for name in ("energy", "extrapolated", "stress")}
        answer |= {"forces": np.array(earlier["forces"])}
        calls, checked = earlier.get("calls", 1), list(earlier.get("checked", ()))
    for what in job["check"]:
        if what in checked:
            continue
        try:
            calls += COMPARISONS[what](job, atoms, answer, directory / what)
        except ContradictionError as error:
            error.calls = calls + 1
            raise
        checked.append(what)
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in answer.items()}
    return plain | {"calls": calls, "checked": checked}


# ------------------------------------------------------------ the answer


def _answer(job: Mapping[str, Any], atoms: Atoms, directory: Path) -> dict[str, Any]:
    directory.mkdir(parents=True, exist_ok=True)
    kwargs = electronic_kwargs(job["calculator"], job["kwargs"], job["structure"])
    calculator = build_calculator(job["calculator"], kwargs, directory)
    if callable(getattr(type(calculator), "label", None)):
        answer = _by_oracle(calculator, job)
    else:
        stress = job["stress"] if all(job["structure"]["periodic"]) else False
        answer = ask_calculator(calculator, job["calculator"], atoms, directory, job["free_energy"], stress)
    _check(job, answer, len(atoms))
    return answer


def _by_oracle(oracle: Any, job: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of a class of the user's that has `label(structures) -> Targets` in place of a calculator."""
    from gpmlp.learning.labels import structure_of

    targets = oracle.label(structure_of(job["structure"]))
    stress, energy = targets.stresses[0].numpy(), targets.energies[0].numpy()
    stress = None if np.isnan(stress).all() else stress
    return {"energy": energy, "extrapolated": energy, "forces": targets.forces.numpy(), "stress": stress}


def _check(job: Mapping[str, Any], answer: dict[str, Any], n: int) -> None:
    """As check_answer, and no forces that no code means."""
    check_answer(answer, n)
    forces = answer["forces"]
    if not job["check_forces"]:
        return
    sizes, most = np.linalg.norm(forces, axis=1), job["largest_force"]
    if sizes.max() > most:
        atom = int(sizes.argmax())
        raise LabelError(f"the force on atom {atom} is {sizes.max():.3g} eV/A, more than largest_force {most:g}")
    net, most = float(np.linalg.norm(forces.sum(axis=0))) / n, job["largest_net_force"]
    if net > most:
        raise LabelError(f"forces sum up to {net:.3g} eV/A per atom instead of 0, more than largest_net_force {most:g}")


def failure_text(folder: Path) -> str:
    """What a program wrote in a folder about its end, '' if nothing."""
    text = ""
    with suppress(OSError):
        for output in sorted(folder.glob("*/espresso.pwo")):
            if NOT_CONVERGED in output.read_text(errors="replace"):
                text += " self-consistency was not reached"
        for crash in sorted(folder.glob("*/CRASH")):
            text += " ".join(line for line in crash.read_text(errors="replace").split("\n") if "%%" not in line)
    return text


# ------------------------------------------------------------ what is believed of it by asking again


def _compare_forces(job: Mapping[str, Any], atoms: Atoms, answer: dict[str, Any], directory: Path) -> int:
    """One more call a step s away, along the forces and at random: E(x + s) - E(x) = -s.(F(x) + F(x + s)) / 2 + O(s^3)."""
    forces, n = answer["forces"], len(atoms)
    largest = np.linalg.norm(forces, axis=1).max()
    random = np.random.default_rng(0).standard_normal((n, 3))  # the same at each attempt
    random *= STEP / np.linalg.norm(random, axis=1, keepdims=True)
    step = random if largest < RESTING else forces * (STEP / largest) + SHAKE * random
    moved = atoms.copy()
    moved.positions += step
    other = _moved_answer(job, moved, directory)
    change, expected = other["energy"] - answer["energy"], -float((step * (forces + other["forces"])).sum()) / 2
    scale = (
        sum(float((np.linalg.norm(step, axis=1) * np.linalg.norm(f, axis=1)).sum()) for f in (forces, other["forces"]))
        / 2
    )
    if abs(change - expected) > SLOPE * scale + ROUGHNESS * n:
        ratios = {**UNITS, 1 / n: "right, and the energy per atom"}
        raise ContradictionError(
            f"energy and forces contradict each other: a step of at most {STEP} A along the forces changes the energy by "
            f"{change:.6g} eV, the forces say {expected:.6g} eV{_likely('forces', change, expected, ratios)}"
        )
    _check_changed(moved, forces, other["forces"])
    return 1


def _check_changed(atoms: Atoms, before: np.ndarray, after: np.ndarray) -> None:
    """Forces of atoms that were moved are others, and not zero, where there are neighbours."""
    radii, distances = covalent_radii[atoms.numbers], atoms.get_all_distances(mic=True)
    near = (distances < BONDED * (radii[:, None] + radii)).sum(axis=1) > 1  # than itself
    if near.any() and np.linalg.norm(after - before, axis=1)[near].max() < UNCHANGED:
        raise ContradictionError(
            f"energy and forces contradict each other: atoms were moved by up to {STEP} A, and no force changed by {UNCHANGED:g} "
            "eV/A; does the oracle relax the structure, or answer for another one?"
        )
    held = near & (before == 0).all(axis=1) & (after == 0).all(axis=1)
    if held.any():
        named = ", ".join(map(str, held.nonzero()[0][:5].tolist()))
        raise ContradictionError(
            f"the forces on {held.sum()} atoms ({named}{', ...' if held.sum() > 5 else ''}) are exactly zero, here and after these "
            "atoms were moved: does the oracle hold them? Labels need the forces on all atoms"
        )
    axes = (before[near] == 0).all(axis=0) & (after[near] == 0).all(axis=0)
    if axes.any() and near.sum() > 2:
        raise ContradictionError(
            f"the forces along {' and '.join(np.array(list('xyz'))[axes])} are exactly zero on all atoms, here and after these were moved: "
            "does the oracle hold a direction? Labels need all components"
        )


def _compare_stress(job: Mapping[str, Any], atoms: Atoms, answer: dict[str, Any], directory: Path) -> int:
    """One more call in a cell strained by e: E(e) - E(0) = (V(0) s(0) : e + V(e) s(e) : (1 + e)^-1 e) / 2 + O(e^3)."""
    if answer["stress"] is None:
        return 0
    strained, deformation = atoms.copy(), np.eye(3) + STRAIN
    strained.set_cell(atoms.cell.array @ deformation, scale_atoms=True)
    other = _moved_answer(job, strained, directory)
    if other["stress"] is None:
        raise LabelError("the calculator gives a stress for some structures and none for others")
    work = [
        atoms.get_volume() * (np.array(answer["stress"]) * STRAIN).sum(),
        strained.get_volume() * (other["stress"] * (np.linalg.inv(deformation) @ STRAIN)).sum(),
    ]
    change, expected = other["energy"] - answer["energy"], float(sum(work)) / 2
    if abs(change - expected) > STRAIN_SLOPE * max(abs(change), abs(expected)) + STRAIN_ROUGHNESS * len(atoms):
        virial = dict.fromkeys((1 / atoms.get_volume(), -1 / atoms.get_volume()), "the virial (stress times volume)")
        raise ContradictionError(
            f"energy and stress contradict each other: a strain of {np.abs(STRAIN).max():g} changes the energy by {change:.6g} eV, the "
            f"stress says {expected:.6g} eV{_likely('the stress', change, expected, {**STRESS_UNITS, **virial})}"
        )
    return 1


COMPARISONS = {FORCES: _compare_forces, STRESS: _compare_stress}


def _moved_answer(job: Mapping[str, Any], atoms: Atoms, directory: Path) -> dict[str, Any]:
    structure = {**job["structure"], "positions": atoms.positions.tolist(), "cell": atoms.cell.tolist()}
    return _answer({**job, "structure": structure}, atoms, directory)


def _likely(what: str, change: float, expected: float, ratios: Mapping[float, str]) -> str:
    """What the ratio of both looks like, where it looks like anything."""
    ratio = change / expected if expected else float("nan")
    near = [text for value, text in ratios.items() if abs(ratio / value - 1) < ALIKE]
    return f" (ratio {ratio:.3g}: as if {what} were {near[0]})" if near else f" (ratio {ratio:.3g})"
