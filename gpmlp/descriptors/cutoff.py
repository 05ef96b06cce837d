"""Weights of neighbours by distance: a C2 cutoff function times a radial scaling, and the derivative."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpmlp.core import errors

FUNCTIONS = ("smoothstep", "poly", "none")


@dataclass(frozen=True)
class NeighborWeights:
    """w(r) = f_c(r) / (1 + (r / scale)^exponent).

    f_c is 'smoothstep', 1 - 10 x^3 + 15 x^4 - 6 x^5 with x = (r - cutoff + width) / width clamped to [0, 1] (C2); or
    'poly', ((1 - x)^2 (1 + 2 x))^cutoff_exponent with x = r / cutoff (dscribe's `poly` weighting; C2 for exponents of 2 or more);
    or 'none', a step, not smooth: only for comparison with dscribe.
    The radial scaling is that of Willatt, Musil, Ceriotti, PCCP 20, 29661 (2018), eq. 20; exponent 0 switches it off.
    """

    cutoff: float
    function: str = "smoothstep"
    width: float = 1.0
    cutoff_exponent: float = 2.0
    scale: float = 2.0
    exponent: float = 0.0

    def __post_init__(self) -> None:
        errors.check_choice("cutoff_function", self.function, FUNCTIONS)
        errors.check_positive("cutoff", self.cutoff)
        errors.check_positive("cutoff_width", self.width)
        errors.check_positive("radial_scaling.scale", self.scale)

    def __call__(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """Return w(r) and dw/dr."""
        cut, d_cut = self._cutoff(r)
        if self.exponent == 0:
            return cut, d_cut
        power = (r / self.scale) ** self.exponent
        scaling = 1 / (1 + power)
        # d/dr 1/(1+u) = -u'/(1+u)^2 with u' = m u / r
        d_scaling = -self.exponent * power / r.clamp_min(1e-12) * scaling**2
        return cut * scaling, d_cut * scaling + cut * d_scaling

    def _cutoff(self, r: Tensor) -> tuple[Tensor, Tensor]:
        if self.function == "none":
            inside = (r < self.cutoff).to(r.dtype)
            return inside, torch.zeros_like(r)
        if self.function == "poly":
            x = (r / self.cutoff).clamp(0, 1)
            base = (1 - x) ** 2 * (1 + 2 * x)
            m = self.cutoff_exponent
            return base**m, m * base ** (m - 1) * (-6 * x * (1 - x)) / self.cutoff
        x = ((r - self.cutoff + self.width) / self.width).clamp(0, 1)
        return 1 - x**3 * (10 - 15 * x + 6 * x**2), -30 * x**2 * (1 - x) ** 2 / self.width
