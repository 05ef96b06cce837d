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
from gpmlp.properties.surface import displaced, hessian_of_all

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
    """(3 free, 3 free) second derivatives of the mean, eV/A^2, of motions that constraints allow.

    Args:
        free: indices of the atoms that are moved.
    """
    held = atoms.copy()
    held.set_constraint([*atoms.constraints, FixAtoms(np.setdiff1d(np.arange(len(atoms)), free))])
    moved = displaced(held)
    pieces = [moved[first : first + AT_ONCE] for first in range(0, len(moved), AT_ONCE)]
    rows = (3 * np.array(free)[:, None] + np.arange(3)).ravel()
    forces = np.concatenate([surface.forces(piece)[1] for piece in pieces])
    return hessian_of_all(held, forces)[np.ix_(rows, rows)]


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
