"""The decay of force constants with distance, from how the spread of forces falls with the radius beyond which atoms are redrawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

from gpmlp.learning.redraws import LocalityFloor, Sphere

RESOLVED = 1e-6  # eV/A; smaller spreads are rounding
TAIL = 3  # of the radii, the longest, that tell how force constants decay
# exponents up to which that is called so; they are 3 between charges, and 8 where energies fall as r^-6
COULOMB, DISPERSION = 5.5, 10.5
BONDED = 4.5  # A, to which radii have to reach for any: nearer are bonds and what they hold together
DISTANT = 6.0  # A, the same for r^-6: nearer, what falls exponentially is as steep


@dataclass(frozen=True)
class DecayLaw:
    """How force constants fall off with distance.

    Attributes:
        kind: 'Coulomb', 'r^-6', 'exponential', or 'none' where nothing is left that could fall off, or radii are too few or short to tell.
        exponent: n of r^-n; length: λ of exp(-r/λ), A: the best of each kind, NaN where there is nothing to fit.
    """

    kind: str
    exponent: float = math.nan
    length: float = math.nan

    def ratio(self, start: float, end: float) -> float:
        """Spread beyond radius `end` over that beyond `start` (A) in bulk, where Σ r^-2n over all atoms beyond R falls as R^(3 - 2n)."""
        if self.kind == "none":
            return 1.0
        if self.kind == "exponential":
            return math.exp((start - end) / self.length)
        return (end / start) ** (1.5 - self.exponent)

    def reach(self, start: float, factor: float) -> float:
        """Radius (A) beyond which the spread is that factor, below 1, times that beyond `start`; infinite where nothing tells."""
        if self.kind == "none":
            return math.inf
        if self.kind == "exponential":
            return start - self.length * math.log(factor)
        return start * factor ** (1 / (1.5 - self.exponent)) if self.exponent > 1.5 else math.inf


def fit_decay(floors: Sequence[LocalityFloor], spheres: Sequence[Sphere]) -> DecayLaw:
    """The decay of force constants Φ that the spreads beyond the longest radii agree with.

    spread² ∝ Σ Φ(r)² over the atoms that are redrawn, at their distances r: Φ = r^-n and Φ = exp(-r/λ) are fitted to the logarithms.
    Radii beyond which the same atoms lie are one point.
    """
    # atoms that a longer radius redraws are among those of a shorter one, so that equal numbers are the same atoms
    redrawn = {sum(int((s.distances > f.radius).sum()) for s in spheres): f for f in floors}
    resolved = [f for f in redrawn.values() if f.spread > RESOLVED][-TAIL:]
    if len(resolved) < 2:
        return DecayLaw("none")
    logs = np.log([f.spread for f in resolved])
    far = [sphere.distances[sphere.distances > resolved[0].radius] for sphere in spheres]

    def misfit(log_phi: list[np.ndarray]) -> float:
        shift = max(float(values.max()) for values in log_phi)
        sums = [
            sum(np.exp(2 * (v - shift))[r > f.radius].sum() for v, r in zip(log_phi, far, strict=True))
            for f in resolved
        ]
        return float((logs - 0.5 * np.log(np.maximum(sums, 1e-300))).var())

    def best(log_phi: Callable[[float, np.ndarray], np.ndarray], bounds: tuple[float, float]) -> float:
        return float(minimize_scalar(lambda v: misfit([log_phi(v, r) for r in far]), bounds=bounds, method="bounded").x)

    exponent = best(lambda n, r: -n * np.log(r), (0.5, 60.0))
    length = 1 / best(lambda rate, r: -rate * r, (0.02, 15.0))
    if exponent <= COULOMB:
        return DecayLaw("Coulomb" if resolved[-1].radius >= BONDED else "none", exponent, length)
    dispersion = exponent <= DISPERSION and resolved[-1].radius >= DISTANT
    return DecayLaw("r^-6" if dispersion else "exponential", exponent, length)
