"""Whether two structures are one, whatever the order of equal atoms, their position and their orientation; mirror images are one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from scipy.optimize import linear_sum_assignment

SAME_DISTANCES = 0.15  # A, between distances around atoms of structures that are one
SAME_ENERGY = 0.01  # eV


def difference(first: Atoms, second: Atoms) -> float:
    """The largest difference of distances around two atoms of which one is taken for the other, A.

    Around each atom are its distances to the atoms of each element, in rising order, in which each changes by no more than two atoms
    move; atoms of one element are paired so that differences are least. Infinite for other elements, cells or periodicity.
    """
    same_cell = (first.pbc == second.pbc).all() and np.allclose(
        first.cell.array[first.pbc], second.cell.array[first.pbc]
    )
    if not same_cell or sorted(first.numbers) != sorted(second.numbers):
        return np.inf
    around, largest = (_distances(first), _distances(second)), 0.0
    for z in np.unique(first.numbers):
        mine, theirs = (d[atoms.numbers == z] for d, atoms in zip(around, (first, second), strict=True))
        apart = np.abs(mine[:, None] - theirs[None]).max(axis=2)
        pairs = linear_sum_assignment(apart**2)
        largest = max(largest, float(apart[pairs].max()))
    return largest


def find_same(atoms: Atoms, others: Sequence[Atoms], energy: float | None = None) -> int | None:
    """Which of others, with energies, is the same structure: the most alike of those within SAME_DISTANCES and, where an energy is given,
    SAME_ENERGY; None if none is."""
    near = [
        (difference(atoms, other), i)
        for i, other in enumerate(others)
        if energy is None or abs(other.get_potential_energy() - energy) < SAME_ENERGY
    ]
    away, i = min(near, default=(np.inf, -1))
    return i if away < SAME_DISTANCES else None


def _distances(atoms: Atoms) -> np.ndarray:
    """(atoms, atoms) of each to those of each element in turn, rising."""
    distances = atoms.get_all_distances(mic=bool(atoms.pbc.any()))
    return np.hstack([np.sort(distances[:, atoms.numbers == z], axis=1) for z in np.unique(atoms.numbers)])
