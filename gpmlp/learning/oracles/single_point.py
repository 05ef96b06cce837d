"""A calculation asks a calculator for one label and looks whether it can be believed; plain numbers in and out, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError

from gpmlp.core.units import VOIGT_INDEX
from gpmlp.learning.oracles.codes import OracleError, build_calculator

STEP = 0.02  # A, the largest displacement of an atom when energies are compared with forces
SLOPE = 0.05  # by which energies and forces may disagree: a share of the change of energy,
ROUGHNESS = 5e-5  # and eV/atom, what a self-consistent code leaves unconverged
RESTING = 0.05  # eV/A; below there is no slope to compare
ASYMMETRY = 1e-2  # of the largest component of a stress; codes print more digits than that
NOT_CONVERGED = "convergence NOT achieved"


class LabelError(ValueError):
    """A label that came back but cannot be believed."""


def compute_label(job: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The label that a job asks for: energy (eV), forces (eV/A), stress ((3, 3) eV/A^3 or None), as plain numbers.

    Args:
        job: what `gpmlp.learning.oracles.oracle.make_job` makes.
        directory: where the calculator may leave files.

    Raises:
        OracleError: the oracle cannot label anything like this.
        LabelError: what came back cannot be believed.
        Exception: whatever the calculator raises.
    """
    atoms = _atoms(job)
    answer = _answer(job, atoms, directory / "label")
    if job["check"]:
        _compare_energy_with_forces(job, atoms, answer, directory / "displaced")
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in answer.items()}


def _atoms(job: Mapping[str, Any]) -> Atoms:
    given = job["structure"]
    atoms = Atoms(given["species"], positions=given["positions"], cell=given["cell"], pbc=given["periodic"])
    moments = job["magnetic_moments"]
    if moments:
        atoms.set_initial_magnetic_moments([moments.get(symbol, 0.0) for symbol in atoms.get_chemical_symbols()])
    return atoms


def _answer(job: Mapping[str, Any], atoms: Atoms, directory: Path) -> dict[str, Any]:
    directory.mkdir(parents=True, exist_ok=True)
    calculator = build_calculator(job["calculator"], job["kwargs"], directory)
    if callable(getattr(type(calculator), "label", None)):
        answer = _of_oracle(calculator, job)
    else:
        answer = _of_calculator(calculator, job, atoms)
        _converged(calculator, directory)
    _check(job, answer, len(atoms))
    return answer


def _of_calculator(calculator: Any, job: Mapping[str, Any], atoms: Atoms) -> dict[str, Any]:
    work = atoms.copy()
    if job["calculator"] == "quantum-espresso":
        _suit_espresso(calculator, work)
    work.calc = calculator
    forces = np.array(work.get_forces(apply_constraint=False), dtype=float)
    energy = float(work.get_potential_energy())
    free = energy
    if job["free_energy"] is not False:
        try:
            free = float(work.get_potential_energy(force_consistent=True))
        except (PropertyNotImplementedError, KeyError) as error:
            if job["free_energy"]:
                raise OracleError(
                    f"{job['calculator']} gives no free energy, which free_energy: true asks for; leave it out to take the energy"
                ) from error
    stress = None
    properties = getattr(calculator, "implemented_properties", ())
    if job["stress"] is not False and all(job["structure"]["periodic"]) and (job["stress"] or "stress" in properties):
        try:
            stress = np.array(work.get_stress(voigt=True, apply_constraint=False), dtype=float)
        except (PropertyNotImplementedError, NotImplementedError) as error:
            if job["stress"]:
                raise OracleError(f"{job['calculator']} gives no stress, which stress: true asks for") from error
    return {"energy": free, "extrapolated": energy, "forces": forces, "stress": stress}


def _of_oracle(oracle: Any, job: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of a class of the user's that has `label(structures) -> Targets` in place of a calculator."""
    from gpmlp.learning.oracles.job import structure_of

    targets = oracle.label(structure_of(job["structure"]))
    stress = targets.stresses[0].numpy()
    energy = float(targets.energies[0])
    return {
        "energy": energy,
        "extrapolated": energy,
        "forces": targets.forces.numpy(),
        "stress": None if np.isnan(stress).all() else stress,
    }


def _suit_espresso(calculator: Any, atoms: Atoms) -> None:
    """pw.x knows nothing but periodic cells, and stops in its middle where a pseudopotential is missing."""
    if abs(atoms.cell.volume) < 1e-6:
        raise OracleError("pw.x needs a cell in all three directions; put the molecule into a box")
    missing = set(atoms.get_chemical_symbols()) - set(calculator.parameters["pseudopotentials"])
    if missing:
        raise OracleError(f"kwargs.pseudopotentials names no file for {', '.join(sorted(missing))}")
    atoms.pbc = True


def failure_text(folder: Path) -> str:
    """What a program wrote about its end in a folder, '' if nothing is known of it."""
    found = ""
    with suppress(OSError):
        for output in sorted(folder.glob("*/espresso.pwo")):
            if NOT_CONVERGED in output.read_text(errors="replace"):
                found += " self-consistency was not reached"
        for crash in sorted(folder.glob("*/CRASH")):
            found += " ".join(line for line in crash.read_text(errors="replace").split("\n") if "%%" not in line)
    return found


def _converged(calculator: Any, directory: Path) -> None:
    """Some codes answer although they did not converge."""
    output = directory / "espresso.pwo"
    text = output.read_text(errors="replace") if output.is_file() else ""
    if getattr(calculator, "converged", None) is False or NOT_CONVERGED in text:
        raise LabelError("self-consistency was not reached")


def _check(job: Mapping[str, Any], answer: dict[str, Any], n: int) -> None:
    """Shapes, NaN, and forces that no code means; makes stress (3, 3) and exactly symmetric."""
    energy, forces = answer["energy"], answer["forces"]
    if not np.isfinite(energy):
        raise LabelError(f"the energy is {energy}")
    if forces.shape != (n, 3):
        raise LabelError(f"forces have the shape {forces.shape} for {n} atoms")
    if not np.isfinite(forces).all():
        raise LabelError(f"the force on atom {int((~np.isfinite(forces)).any(axis=1).argmax())} is NaN or infinite")
    if answer["stress"] is not None:
        answer["stress"] = _symmetric(np.asarray(answer["stress"], dtype=float))
    if not job["check_forces"]:
        return
    sizes = np.linalg.norm(forces, axis=1)
    if sizes.max() > job["largest_force"]:
        raise LabelError(
            f"the force on atom {int(sizes.argmax())} is {sizes.max():.3g} eV/A, more than largest_force {job['largest_force']:g}"
        )
    net = float(np.linalg.norm(forces.sum(axis=0))) / n
    if net > job["largest_net_force"]:
        raise LabelError(
            f"forces sum up to {net:.3g} eV/A per atom instead of 0, more than largest_net_force {job['largest_net_force']:g}"
        )


def _symmetric(stress: np.ndarray) -> np.ndarray:
    if stress.shape not in ((6,), (3, 3)):
        raise LabelError(f"the stress has the shape {stress.shape}")
    if not np.isfinite(stress).all():
        raise LabelError("the stress is NaN or infinite")
    if stress.shape == (6,):
        return stress[np.array(VOIGT_INDEX)]
    if np.abs(stress - stress.T).max() > ASYMMETRY * np.abs(stress).max():
        raise LabelError("the stress is not symmetric")
    return 0.5 * (stress + stress.T)


def _compare_energy_with_forces(job: Mapping[str, Any], atoms: Atoms, answer: dict[str, Any], directory: Path) -> None:
    """One more call a step along the forces: E(x + s) - E(x) = -s.(F(x) + F(x + s)) / 2 up to the third order of s."""
    forces = answer["forces"]
    largest = np.linalg.norm(forces, axis=1).max()
    if largest < RESTING:
        return
    step = forces * (STEP / largest)
    moved = atoms.copy()
    moved.positions += step
    shifted = {**job["structure"], "positions": moved.positions.tolist()}
    other = _answer({**job, "structure": shifted}, moved, directory)
    change = other["energy"] - answer["energy"]
    expected = -float((step * (forces + other["forces"])).sum()) / 2
    if abs(change - expected) > SLOPE * abs(expected) + ROUGHNESS * len(atoms):
        raise LabelError(
            f"energy and forces contradict each other: a step of at most {STEP} A along the forces changes the energy by "
            f"{change:.6g} eV, the forces say {expected:.6g} eV"
        )
