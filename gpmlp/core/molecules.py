"""Molecules: groups of atoms that covalent radii say are bonded, unless they are so large that they are a solid."""

from __future__ import annotations

import numpy as np
from ase.data import covalent_radii
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

BONDED = 1.2  # times the sum of covalent radii
MOLECULE = 40  # atoms; bonded units of no more are molecules


def bonded_units(
    species: np.ndarray, i: np.ndarray, j: np.ndarray, r: np.ndarray, shifts: np.ndarray | None = None
) -> np.ndarray:
    """(atoms,) the number of the molecule of each atom; atoms of what is larger than a molecule stand alone.

    Args:
        species: (atoms,) atomic numbers.
        i, j: (pairs,) atoms of pairs, both directions; r: (pairs,) their distances, A.
        shifts: (pairs, 3) lattice vectors between them; where given, what is bonded to its own images is no molecule either.
    """
    n, radii = len(species), covalent_radii[species]
    bonded = r < BONDED * (radii[i] + radii[j])
    count, unit = _components(n, i[bonded], j[bonded])
    solid = np.bincount(unit) > MOLECULE
    if shifts is not None:
        solid |= _infinite(n, i[bonded], j[bonded], shifts[bonded], unit)
    return np.unique(np.where(solid[unit], count + np.arange(n), unit), return_inverse=True)[1]


def _components(n: int, i: np.ndarray, j: np.ndarray) -> tuple[int, np.ndarray]:
    return connected_components(coo_matrix((np.ones(len(i)), (i, j)), shape=(n, n)), directed=False)


def _infinite(n: int, i: np.ndarray, j: np.ndarray, shifts: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """(units,) whether a unit is bonded to its own images: in a cell twice as long along each vector it is not there eight times."""
    corners = np.stack(np.meshgrid(*[(0, 1)] * 3, indexing="ij"), -1).reshape(-1, 1, 3)
    ends = ((corners + shifts) % 2) @ (4, 2, 1)
    count, doubled = _components(8 * n, (8 * i + np.arange(8)[:, None]).ravel(), (8 * j + ends).ravel())
    of = np.empty(count, dtype=int)
    of[doubled] = np.repeat(unit, 8)
    return np.bincount(of) < 8
