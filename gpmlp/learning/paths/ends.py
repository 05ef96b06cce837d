"""End points of a path: the same atoms in the same order, in two different places, laid on each other as nearly as may be."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.build import minimize_rotation_and_translation
from ase.geometry import find_mic

from gpmlp.core.errors import UserError
from gpmlp.core.structures import Structures
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.io.charges import SAME as SAME_CHARGE
from gpmlp.io.label_checks.coincident import check_coincident
from gpmlp.properties.constraints import check_constraints

SAME = 0.05  # A; end points in which no atom is farther from its place in the other are one structure
SAME_CELL = 1e-6  # A
SAME_MOMENT = 1e-6  # Bohr magnetons
HELD = 1e-3  # A; to which the places of atoms that are held agree: files round them


def check_ends(start: Atoms, end: Atoms) -> None:
    """Raise UserError, with what is wrong and what to do, unless a path can lead from one to the other."""
    for what, atoms in (("The start", start), ("The end", end)):
        if not len(atoms):
            raise UserError(f"{what} has no atoms.")
        for finding in check_coincident(structures_from_ase([atoms], [what])):
            raise UserError(str(finding))
        check_constraints(atoms, what)
    formulas = [atoms.get_chemical_formula() for atoms in (start, end)]
    if formulas[0] != formulas[1]:
        raise UserError(
            f"The start is {formulas[0]} and the end {formulas[1]}: a path leads between two places of the same atoms."
        )
    if (start.numbers != end.numbers).any():
        i = int((start.numbers != end.numbers).argmax())
        raise UserError(
            f"The start and the end have the same atoms in another order: atom {i} is {start.symbols[i]} in the start and "
            f"{end.symbols[i]} in the end. Atom i of the start moves to atom i of the end: put those of the end in that order."
        )
    if (start.pbc != end.pbc).any():
        raise UserError(f"The start is periodic along {start.pbc.tolist()}, the end along {end.pbc.tolist()}.")
    if np.abs(start.cell.array - end.cell.array)[start.pbc].max(initial=0.0) > SAME_CELL:
        raise UserError("The cells of start and end differ: a path is found in one cell.")
    if [c.todict() for c in start.constraints] != [c.todict() for c in end.constraints]:
        raise UserError("Start and end have other constraints: give both the same ones.")
    _check_electrons(structures_from_ase([start, end], ["the start", "the end"]))


def _check_electrons(ends: Structures) -> None:
    """One path is on one energy surface: of one total charge, with the same initial magnetic moments."""
    first, last = ends.charges.tolist()
    if abs(first - last) > SAME_CHARGE:
        raise UserError(
            f"The start has the total charge {first:g} e and the end {last:g} e: a path has one; correct it."
        )
    if ends.magnetic_moments is None:
        return
    of_start, of_end = ends.magnetic_moments.reshape(2, ends.n_atoms // 2, -1).numpy()
    other = np.abs(of_start - of_end).max(axis=1) > SAME_MOMENT
    if other.any():
        i = int(other.argmax())
        texts = [
            "(" + ", ".join(f"{x:g}" for x in m[i]) + ")" if len(m[i]) > 1 else f"{m[i][0]:g}"
            for m in (of_start, of_end)
        ]
        raise UserError(
            f"Initial magnetic moments differ: that of atom {i} is {texts[0]} in the start and {texts[1]} in the end. Give both the "
            "same ones; images begin with those of the start."
        )


def lay_on(start: Atoms, end: Atoms) -> Atoms:
    """The end with each atom in the image that is nearest to its place in the start; isolated and free atoms as a whole turned and moved
    as near as may be.

    Raises:
        UserError: an atom that is held (or its components that are) lies elsewhere in the end; both are then the same structure.
    """
    laid = end.copy()
    if start.pbc.any():
        laid.positions = start.positions + find_mic(end.positions - start.positions, start.cell, start.pbc)[0]
    elif not start.constraints:
        minimize_rotation_and_translation(start, laid)
    laid.set_constraint(start.constraints)
    allowed = start.copy()
    allowed.set_positions(laid.positions)  # as far as the constraints let atoms move
    away = np.linalg.norm(laid.positions - allowed.positions, axis=1)
    if away.max() > HELD:
        i = int(away.argmax())
        raise UserError(
            f"Atom {i} is held but is {away[i]:.3f} A elsewhere in the end, counting what is held only: give it the place that it has in "
            "the start, or let it move."
        )
    farthest = float(np.linalg.norm(laid.positions - start.positions, axis=1).max())
    if farthest < SAME:
        raise UserError(
            f"Start and end are the same structure: no atom is farther than {farthest:.3f} A from its place in the other. Where they were "
            "relaxed, both fell into one minimum: give end points that differ more."
        )
    return laid
