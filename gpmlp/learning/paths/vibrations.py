"""Vibrations of a stationary point on the posterior mean: a saddle of first order has one imaginary frequency."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms
from ase.vibrations.data import VibrationsData

from gpmlp.learning.paths.surface import Surface

STEP = 0.01  # A, of central differences of forces
SOFT = 10.0  # cm^-1; a mode below that is a translation, or as good as flat
SOFT_FREE = 50.0  # of isolated atoms without constraints, which can turn
AT_ONCE = 60  # displaced structures


@dataclass(frozen=True, eq=False)
class SaddleModes:
    """Harmonic frequencies, rising, (modes,) cm^-1; imaginary ones are negative. soft: what counts as none, cm^-1."""

    frequencies: np.ndarray
    soft: float

    @property
    def imaginary(self) -> list[float]:
        """Imaginary frequencies beyond `soft`, as positive numbers, cm^-1."""
        return [-float(f) for f in self.frequencies if f < -self.soft]


def saddle_modes(surface: Surface, atoms: Atoms) -> SaddleModes:
    """Frequencies of the free atoms from central differences of the mean's forces."""
    fixed = {int(i) for c in atoms.constraints if isinstance(c, FixAtoms) for i in c.index}
    free = [i for i in range(len(atoms)) if i not in fixed]
    displaced = []
    for i in free:
        for axis in range(3):
            for sign in (-1, 1):
                moved = atoms.copy()
                moved.positions[i, axis] += sign * STEP
                displaced.append(moved)
    pieces = [displaced[first : first + AT_ONCE] for first in range(0, len(displaced), AT_ONCE)]
    forces = np.concatenate([surface.forces(piece)[1] for piece in pieces])[:, free].reshape(-1, 2, 3 * len(free))
    hessian = (forces[:, 0] - forces[:, 1]) / (2 * STEP)
    data = VibrationsData.from_2d(atoms, 0.5 * (hessian + hessian.T), indices=free)
    frequencies = data.get_frequencies()
    turns = not atoms.pbc.any() and not atoms.constraints
    return SaddleModes(np.sort(frequencies.real - frequencies.imag), SOFT_FREE if turns else SOFT)
