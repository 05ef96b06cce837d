"""A calculator of point charges that repel each other at short distance (Born and Mayer), for tests of what charges do."""

from __future__ import annotations

import numpy as np
from ase.calculators.calculator import Calculator, all_changes
from ase.units import _e, _eps0

COULOMB = 1e10 * _e / (4 * np.pi * _eps0)  # eV A, 14.4


class BornMayer(Calculator):
    """E = Σ_{i<j} k q_i q_j / r + A exp(-r/ρ), of isolated structures, by plain sums.

    charges: e, by symbol; strength: A, eV; length: ρ, A.
    """

    implemented_properties = ["energy", "forces"]

    def __init__(self, charges: dict, strength: float = 1000.0, length: float = 0.32, **kwargs) -> None:
        super().__init__(**kwargs)
        self.charges, self.strength, self.length = charges, strength, length

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        if self.atoms.pbc.any():
            raise ValueError("plain sums of charges have no limit in a periodic cell")
        q = np.array([self.charges[symbol] for symbol in self.atoms.symbols])
        apart = self.atoms.positions[:, None] - self.atoms.positions[None]
        r = np.linalg.norm(apart, axis=2) + 1e9 * np.eye(len(q))
        coulomb, core = COULOMB * q[:, None] * q / r, self.strength * np.exp(-r / self.length)
        slope = -coulomb / r - core / self.length
        self.results = {"energy": 0.5 * float((coulomb + core).sum()), "forces": -(slope / r)[..., None] * apart}
        self.results["forces"] = self.results["forces"].sum(1)


def force_constants(positions: np.ndarray, charges: np.ndarray, centre: int) -> np.ndarray:
    """(atoms, 3, 3) ∂F_centre/∂r_j of charges alone, eV/A^2; zero for the central atom itself."""
    apart = positions - positions[centre]
    r = np.linalg.norm(apart, axis=1)
    r[centre] = 1.0
    e = apart / r[:, None]
    out = -COULOMB * (charges * charges[centre] / r**3)[:, None, None] * (np.eye(3) - 3 * e[:, :, None] * e[:, None])
    out[centre] = 0.0
    return out
