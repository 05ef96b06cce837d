"""A single point: energy, forces and stress of one structure by an ASE calculator, and whether they can be what was asked for; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError

from gpmlp.core.calculators import READY, CalculatorError
from gpmlp.core.units import VOIGT_INDEX

ASYMMETRY = 1e-2  # of the largest component of a stress; codes print more digits than that
NOT_CONVERGED = "convergence NOT achieved"


class LabelError(ValueError):
    """A label that came back but cannot be trusted."""


def build_atoms(
    structure: Mapping[str, Any], moments: Mapping[str, float] | None = None, calculator: str = ""
) -> Atoms:
    """Atoms from plain numbers: positions, cell, periodic, species, and magnetic_moments, initial_charges and charge if there are any.

    The charge is in info, and the sum of the initial charges: even ones, where none are given, for a calculator that has to see it there.

    Args:
        moments: by chemical symbol, where the structure has none by site, which say more.
        calculator: what it is called; a ready-made one has a keyword for the charge.
    """
    atoms = Atoms(
        structure["species"], positions=structure["positions"], cell=structure["cell"], pbc=structure["periodic"]
    )
    total = structure.get("charge", 0.0)
    if total:
        atoms.info["charge"] = int(total) if total == int(total) else total
    if "initial_charges" in structure:
        atoms.set_initial_charges(structure["initial_charges"])
    elif total and calculator not in READY:
        atoms.set_initial_charges([total / len(atoms)] * len(atoms))
    if "magnetic_moments" in structure:
        atoms.set_initial_magnetic_moments(structure["magnetic_moments"])
    elif moments:
        atoms.set_initial_magnetic_moments([moments.get(symbol, 0.0) for symbol in atoms.get_chemical_symbols()])
    return atoms


def ask_calculator(
    calculator: Any,
    name: str,
    atoms: Atoms,
    directory: Path,
    free_energy: bool | None = None,
    stress: bool | None = None,
) -> dict[str, Any]:
    """What a calculator says of atoms: energy (free, unless `free_energy` is false), extrapolated, forces and stress (None = none).

    Args:
        name: what the calculator is called.
        directory: where it leaves files.
        free_energy, stress: whether they have to be there; None = if the calculator has them, false = not to be asked for.

    Raises:
        CalculatorError: what has to be there is not.
        LabelError: the calculator moved the atoms or did not converge.
        Exception: whatever the calculator raises.
    """
    work = atoms.copy()
    if name == "quantum-espresso":
        _suit_espresso(calculator, work)
    asked = work.copy()
    work.calc = calculator
    forces = work.get_forces(apply_constraint=False)
    energy = free = work.get_potential_energy()
    if free_energy is not False:
        try:
            free = work.get_potential_energy(force_consistent=True)
        except (PropertyNotImplementedError, KeyError) as error:
            if free_energy:
                text = "gives no free energy, which free_energy: true asks for; leave it out to take the energy"
                raise CalculatorError(f"{name} {text}") from error
    tensor = None
    if stress or (stress is None and "stress" in getattr(calculator, "implemented_properties", ())):
        try:
            tensor = work.get_stress(voigt=True, apply_constraint=False)
        except (PropertyNotImplementedError, NotImplementedError) as error:
            if stress:
                raise CalculatorError(f"{name} gives no stress, which stress: true asks for") from error
    for what in ("numbers", "positions", "cell", "pbc"):
        if not np.array_equal(np.asarray(getattr(work, what)), np.asarray(getattr(asked, what))):
            raise LabelError(f"the calculator changed the {what} of the structure: what it says is of another one")
    _check_converged(calculator, directory)
    return {"energy": free, "extrapolated": energy, "forces": forces, "stress": tensor}


def check_answer(answer: dict[str, Any], n: int) -> None:
    """Raise LabelError unless these are real numbers of the right shapes for n atoms; makes stress (3, 3) and exactly symmetric."""
    for name in ("energy", "extrapolated"):
        answer[name] = _real("energy", answer[name])
        if answer[name].size != 1:
            raise LabelError(f"the energy is an array of the shape {answer[name].shape}")
        answer[name] = float(answer[name].reshape(()))
    energy, forces = answer["energy"], _real("forces", answer["forces"])
    if not np.isfinite(energy):
        raise LabelError(f"the energy is {energy}")
    if forces.shape != (n, 3):
        raise LabelError(f"forces have the shape {forces.shape} for {n} atoms")
    if not np.isfinite(forces).all():
        raise LabelError(f"the force on atom {int((~np.isfinite(forces)).any(axis=1).argmax())} is NaN or infinite")
    answer["forces"] = forces
    if answer["stress"] is not None:
        answer["stress"] = _symmetric(_real("stress", answer["stress"]))


def _real(name: str, value: Any) -> np.ndarray:
    """A copy in double precision; texts, complex numbers and objects are no labels, whatever float() makes of them."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        got = type(value).__name__ if array.dtype.kind == "O" else array.dtype.name
        raise LabelError(f"{name} must be real numbers; got {got}")
    return np.array(array, dtype=float)


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


def _suit_espresso(calculator: Any, atoms: Atoms) -> None:
    """pw.x computes nothing but periodic cells, and stops in its middle where a pseudopotential is missing."""
    if abs(atoms.cell.volume) < 1e-6:
        raise CalculatorError("pw.x needs a cell in all three directions; put the molecule into a box")
    missing = set(atoms.get_chemical_symbols()) - set(calculator.parameters["pseudopotentials"])
    if missing:
        raise CalculatorError(f"kwargs.pseudopotentials names no file for {', '.join(sorted(missing))}")
    atoms.pbc = True


def _check_converged(calculator: Any, directory: Path) -> None:
    """Some codes answer although they did not converge."""
    output = directory / "espresso.pwo"
    text = output.read_text(errors="replace") if output.is_file() else ""
    if getattr(calculator, "converged", None) is False or NOT_CONVERGED in text:
        raise LabelError("self-consistency was not reached")
