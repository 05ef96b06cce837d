"""Vibrations of a stationary point on the posterior mean: a saddle of first order has one imaginary frequency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms
from ase.vibrations.data import VibrationsData

from gpmlp.learning.paths.surface import Surface
from gpmlp.properties.constraints import allowed_motions, rigid_motions

STEP = 0.01  # A, of central differences of forces
SOFT = 10.0  # cm^-1; a mode below that is as good as flat
AT_ONCE = 60  # displaced structures


@dataclass(frozen=True, eq=False)
class SaddleModes:
    """Harmonic frequencies, rising, (modes,) cm^-1; imaginary ones are negative."""

    frequencies: np.ndarray

    @property
    def imaginary(self) -> list[float]:
        """Imaginary frequencies beyond SOFT, as positive numbers, cm^-1."""
        return [-float(f) for f in self.frequencies if f < -SOFT]


def hessian(surface: Surface, atoms: Atoms, free: Sequence[int]) -> np.ndarray:
    """(3 free, 3 free) eV/A^2, symmetric, from central differences of the mean's forces.

    Args:
        free: indices of the atoms that are moved.
    """
    displaced = []
    for i in free:
        for axis in range(3):
            for sign in (-1, 1):
                moved = atoms.copy()
                moved.positions[i, axis] += sign * STEP
                displaced.append(moved)
    pieces = [displaced[first : first + AT_ONCE] for first in range(0, len(displaced), AT_ONCE)]
    forces = np.concatenate([surface.forces(piece)[1] for piece in pieces])[:, free].reshape(-1, 2, 3 * len(free))
    matrix = (forces[:, 0] - forces[:, 1]) / (2 * STEP)
    return 0.5 * (matrix + matrix.T)


def saddle_modes(surface: Surface, atoms: Atoms) -> SaddleModes:
    """Frequencies within what constraints allow, without translations and rotations of the whole."""
    fixed = {int(i) for c in atoms.constraints if isinstance(c, FixAtoms) for i in c.index}
    free = [i for i in range(len(atoms)) if i not in fixed]
    rows = (3 * np.array(free)[:, None] + np.arange(3)).ravel()
    roots = np.sqrt(np.repeat(atoms.get_masses(), 3))
    rigid = np.linalg.qr(roots[:, None] * rigid_motions(atoms))[0]
    inner = ((allowed_motions(atoms) - rigid @ rigid.T) / roots[:, None] * roots)[np.ix_(rows, rows)]
    matrix = inner.T @ hessian(surface, atoms, free) @ inner
    frequencies = VibrationsData.from_2d(atoms, matrix, indices=free).get_frequencies()
    return SaddleModes(np.sort(frequencies.real - frequencies.imag))
