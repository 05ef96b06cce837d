"""End points of a path: the same atoms in the same order, in two different places, laid on each other as nearly as may be."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.build import minimize_rotation_and_translation
from ase.geometry import find_mic

from gpmlp.core.errors import UserError
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.io.label_checks.coincident import check_coincident
from gpmlp.learning.paths.constraints import check_constraints

SAME = 0.05  # A; end points in which no atom is farther from its place in the other are one structure
SAME_CELL = 1e-6  # A


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


def lay_on(start: Atoms, end: Atoms) -> Atoms:
    """The end with each atom in the image that is nearest to its place in the start; isolated and free atoms as a whole turned and moved
    as near as may be.

    Raises:
        UserError: both are then the same structure.
    """
    laid = end.copy()
    if start.pbc.any():
        laid.positions = start.positions + find_mic(end.positions - start.positions, start.cell, start.pbc)[0]
    elif not start.constraints:
        minimize_rotation_and_translation(start, laid)
    laid.set_constraint(start.constraints)
    farthest = float(np.linalg.norm(laid.positions - start.positions, axis=1).max())
    if farthest < SAME:
        raise UserError(
            f"Start and end are the same structure: no atom is farther than {farthest:.3f} A from its place in the other. Where they were "
            "relaxed, both fell into one minimum: give end points that differ more."
        )
    return laid
