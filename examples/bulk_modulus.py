"""What is the error bar of a quantity that is not an energy or a force, such as a bulk modulus?

Draws 32 potentials from the posterior of a fit to silicon, computes the equation of state with each, and takes the scatter of the
results. One evaluation of the descriptors serves all of them.
"""

from pathlib import Path

import numpy as np
from ase import units
from ase.build import bulk

import gpmlp
from gpmlp.io.ase_atoms import structures_from_ase

DATA = Path(__file__).resolve().parents[1] / "data/silicon"

potential, _ = gpmlp.fit(*gpmlp.read(DATA / "train.xyz", "::2"), gpmlp.Recipe(inducing={"n": 100, "gradients": 3}))

volumes = np.linspace(0.94, 1.06, 9) * 5.47**3 / 4  # A^3, of the primitive cell
crystals = structures_from_ase([bulk("Si", a=(4 * volume) ** (1 / 3)) for volume in volumes])


def bulk_modulus(energies: np.ndarray) -> float:
    """V d2E/dV2 at the minimum of a cubic polynomial, GPa."""
    curve = np.polynomial.Polynomial.fit(volumes, energies, 3)
    volume = min(curve.deriv().roots().real, key=lambda v: abs(v - volumes.mean()))
    return volume * curve.deriv(2)(volume) / units.GPa


samples = [bulk_modulus(energies) for energies in potential.sample(32, seed=0)(crystals).energies.numpy()]
print(f"bulk modulus: {bulk_modulus(potential(crystals).energies.numpy()):.1f} +- {np.std(samples):.1f} GPa")
