"""Constraints that relaxations and paths on a posterior can hold: those of single atoms, by which forces are only projected."""

from __future__ import annotations

from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian, FixedLine, FixedPlane

from gpmlp.core.errors import UserError

SUPPORTED = (FixAtoms, FixCartesian, FixedLine, FixedPlane)


def check_constraints(atoms: Atoms, what: str) -> None:
    """Raises UserError: a constraint other than SUPPORTED, or none of the atoms can move.

    Args:
        what: how messages call the atoms.
    """
    for constraint in atoms.constraints:
        if not isinstance(constraint, SUPPORTED):
            names = ", ".join(c.__name__ for c in SUPPORTED)
            raise UserError(
                f"{what}: the constraint {type(constraint).__name__} cannot be held here, only {names}; remove it."
            )
    fixed = {int(i) for c in atoms.constraints if isinstance(c, FixAtoms) for i in c.index}
    if len(fixed) == len(atoms):
        raise UserError(f"{what}: all {len(atoms)} atoms are fixed, so that nothing can move; fix fewer.")
