"""The symmetry of a crystal: its rotations, its standard setting, and what they leave of tensors; by spglib."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
from ase import Atoms

from gpmlp.core.errors import UserError
from gpmlp.core.units import VOIGT

SYMPREC = 1e-3  # A, within which a relaxed structure has a symmetry
TRICLINIC = 2  # the last space group that says nothing about directions


@dataclass(frozen=True, eq=False)
class CrystalSymmetry:
    """Of a crystal as it lies.

    Attributes:
        space_group: number in the International Tables; symbol: its short name.
        rotations: (g, 3, 3) of the point group, Cartesian.
        to_standard: (3, 3) rotation that turns the crystal into its standard orientation (the identity for triclinic ones).
        basis: (3, 3); basis @ cell are the lattice vectors of the standard cell (rows).
    """

    space_group: int
    symbol: str
    rotations: np.ndarray
    to_standard: np.ndarray
    basis: np.ndarray

    @property
    def standard_rotations(self) -> np.ndarray:
        """(g, 3, 3) of the crystal in its standard orientation."""
        return self.to_standard @ self.rotations @ self.to_standard.T


def find_symmetry(atoms: Atoms) -> CrystalSymmetry:
    """Space group, rotations and standard setting.

    Raises:
        UserError: spglib is not installed.
    """
    spglib = load_spglib()
    cell = atoms.cell.array
    found = spglib.get_symmetry_dataset((cell, atoms.get_scaled_positions(), atoms.numbers), symprec=SYMPREC)
    if found is None:  # atoms nearer to each other than SYMPREC, which have no symmetry that could be meant
        return CrystalSymmetry(1, "P1", np.eye(3)[None], np.eye(3), np.eye(3))
    columns = cell.T
    u, _, v = np.linalg.svd(
        columns @ found.rotations @ np.linalg.inv(columns)
    )  # to the nearest rotations: cells are not exact
    rotations = np.unique(np.round(u @ v, 9), axis=0)
    turned = np.eye(3) if found.number <= TRICLINIC else np.array(found.std_rotation_matrix)
    return CrystalSymmetry(
        int(found.number), str(found.international), rotations, turned, np.linalg.inv(found.transformation_matrix).T
    )


def load_spglib():  # noqa: ANN201 - a module
    """The package spglib.

    Raises:
        UserError: it is not installed.
    """
    try:
        import spglib
    except ImportError as error:
        raise UserError(f"Symmetry needs the package spglib ({error}); pip install 'gpmlp[properties]'.") from error
    return spglib


def turned(atoms: Atoms, rotation: np.ndarray) -> Atoms:
    """The same structure in another orientation."""
    moved = atoms.copy()
    moved.set_cell(atoms.cell.array @ rotation.T)
    moved.positions = atoms.positions @ rotation.T
    return moved


def invariant_strains(rotations: np.ndarray) -> np.ndarray:
    """(m, 6) orthonormal strains (Voigt, shears twice the tensor's) that all rotations leave as they are."""
    units = np.array([_strain_tensor(unit) for unit in np.eye(6)])
    averaged = np.einsum("gia,kab,gjb->kij", rotations, units, rotations) / len(rotations)
    rows = np.array([[t[i, j] * (1 if i == j else 2) for i, j in VOIGT] for t in averaged])
    return _row_space(rows)


def invariant_stiffnesses(rotations: np.ndarray) -> np.ndarray:
    """(m, 6, 6) orthonormal basis of the elastic tensors, symmetric in Voigt's order, that all rotations leave as they are.

    C'_ij = M_ia C_ab M_jb with M the rotation of stresses in Voigt's order (Nye, Physical Properties of Crystals, 1985, ch. VIII).
    """
    turns = np.array([_stress_rotation(rotation) for rotation in rotations])
    rows = []
    for i, j in combinations_with_replacement(range(6), 2):
        unit = np.zeros((6, 6))
        unit[i, j] = unit[j, i] = 1.0
        rows.append((np.einsum("gia,ab,gjb->ij", turns, unit, turns) / len(turns)).ravel())
    return _row_space(np.array(rows)).reshape(-1, 6, 6)


def independent_columns(basis: np.ndarray) -> list[int]:
    """Fewest of the six columns, from the first on, from which all of an invariant elastic tensor follows."""
    chosen: list[int] = []
    rank = 0
    for column in range(6):
        more = np.linalg.matrix_rank(basis[:, :, [*chosen, column]].reshape(len(basis), -1), 1e-6)
        if more > rank:
            chosen, rank = [*chosen, column], more
    for column in list(chosen):  # one that later ones make superfluous
        rest = [c for c in chosen if c != column]
        if rest and np.linalg.matrix_rank(basis[:, :, rest].reshape(len(basis), -1), 1e-6) == len(basis):
            chosen = rest
    return chosen


def independent_components(basis: np.ndarray) -> list[tuple[int, int]]:
    """The components from which all others follow, in the order 11, 12, ... 66."""
    chosen: list[tuple[int, int]] = []
    for i, j in combinations_with_replacement(range(6), 2):
        picked = [*chosen, (i, j)]
        if np.linalg.matrix_rank(basis[:, *np.array(picked).T], 1e-6) == len(picked):
            chosen = picked
    return chosen


def _strain_tensor(strain: np.ndarray) -> np.ndarray:
    tensor = np.zeros((3, 3))
    for (i, j), value in zip(VOIGT, strain, strict=True):
        tensor[i, j] = tensor[j, i] = value if i == j else value / 2
    return tensor


def _stress_rotation(rotation: np.ndarray) -> np.ndarray:
    """(6, 6) that turns stresses in Voigt's order."""
    out = np.zeros((6, 6))
    for column, (a, b) in enumerate(VOIGT):
        unit = np.zeros((3, 3))
        unit[a, b] = unit[b, a] = 1.0
        tensor = rotation @ unit @ rotation.T
        out[:, column] = [tensor[i, j] for i, j in VOIGT]
    return out


def _row_space(rows: np.ndarray) -> np.ndarray:
    """Orthonormal basis of the space of the rows."""
    _, values, vectors = np.linalg.svd(rows)
    return vectors[: int((values > 1e-6).sum())]
