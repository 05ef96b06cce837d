"""Constraints that relaxations, paths and samples of a posterior can hold: those of single atoms, by which forces are only projected."""

from __future__ import annotations

import numpy as np
import scipy.linalg
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian, FixedLine, FixedPlane

from gpmlp.core.errors import UserError

SUPPORTED = (FixAtoms, FixCartesian, FixedLine, FixedPlane)
DEGENERATE = 1e-8  # rotation about the axis of a linear molecule; share of a rigid motion that constraints forbid


def check_constraints(atoms: Atoms, what: str) -> None:
    """Raises UserError: as check_supported, or none of the atoms can move."""
    check_supported(atoms, what)
    fixed = {int(i) for c in atoms.constraints if isinstance(c, FixAtoms) for i in c.index}
    if len(fixed) == len(atoms):
        raise UserError(f"{what}: all {len(atoms)} atoms are fixed, so that nothing can move; fix fewer.")


def check_supported(atoms: Atoms, what: str) -> None:
    """Raises UserError: a constraint other than SUPPORTED.

    Args:
        what: how messages call the atoms.
    """
    for constraint in atoms.constraints:
        if not isinstance(constraint, SUPPORTED):
            names = ", ".join(c.__name__ for c in SUPPORTED)
            raise UserError(
                f"{what}: the constraint {type(constraint).__name__} cannot be held here, only {names}; remove it."
            )


def allowed_of_atoms(atoms: Atoms) -> np.ndarray:
    """(atoms, 3, 3), for each atom the projection on displacements that constraints allow."""
    allowed = np.zeros((3, len(atoms), 3))
    for axis, motion in enumerate(allowed):
        motion[:, axis] = 1.0
        for constraint in atoms.constraints:
            constraint.adjust_forces(atoms, motion)
    return 0.5 * (allowed.transpose(1, 0, 2) + allowed.transpose(1, 2, 0))


def allowed_motions(atoms: Atoms) -> np.ndarray:
    """(3 atoms, 3 atoms), the projection on displacements that constraints allow."""
    return np.asarray(scipy.linalg.block_diag(*allowed_of_atoms(atoms)))


def allowed_directions(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Atoms (k,) and unit vectors (k, 3) of the displacements of single atoms, at right angles, that span all that constraints allow."""
    shares, axes = np.linalg.eigh(allowed_of_atoms(atoms))
    index, axis = np.nonzero(shares > 0.5)
    return index, axes[index, :, axis]


def allowed_forces(atoms: Atoms, forces: np.ndarray) -> np.ndarray:
    """(atoms, 3), the part of forces that constraints do not take up."""
    return np.einsum("aij,aj->ai", allowed_of_atoms(atoms), forces)


def rigid_motions(atoms: Atoms) -> np.ndarray:
    """(3 atoms, k), orthonormal displacements of all atoms as one that constraints allow: translations and, if isolated, rotations."""
    allowed, whole = allowed_motions(atoms), [np.tile(axis, len(atoms)) for axis in np.eye(3)]
    if not atoms.pbc.any():
        centred = atoms.positions - atoms.positions.mean(axis=0)
        whole += [np.cross(axis, centred).ravel() for axis in np.eye(3)]
    left, sizes, _ = np.linalg.svd(np.array(whole).T, full_matrices=False)
    rigid = left[:, sizes > DEGENERATE * sizes[0]]
    held, combinations = np.linalg.eigh(rigid.T @ rigid - rigid.T @ allowed @ rigid)
    return rigid @ combinations[:, held < DEGENERATE]


def free_motions(atoms: Atoms) -> np.ndarray:
    """(3 atoms, k) orthonormal displacements that constraints allow and that move the atoms against each other or what is held."""
    rigid = rigid_motions(atoms)
    shares, motions = np.linalg.eigh(allowed_motions(atoms) - rigid @ rigid.T)
    return motions[:, shares > 0.5]
