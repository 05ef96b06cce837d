"""Real spherical harmonics Y_lm of the pair directions and their Cartesian gradients (sphericart)."""

from __future__ import annotations

from functools import lru_cache

import sphericart.torch
from torch import Tensor


@lru_cache(maxsize=32)
def _calculator(l_max: int) -> sphericart.torch.SphericalHarmonics:
    return sphericart.torch.SphericalHarmonics(l_max)


def harmonics(l_max: int, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return Y_lm (pairs, (l_max+1)^2) and dY_lm/dr (pairs, 3, (l_max+1)^2); m runs from -l to l within each l."""
    if not len(vectors):
        size = (l_max + 1) ** 2
        return vectors.new_zeros(0, size), vectors.new_zeros(0, 3, size)
    return _calculator(l_max).compute_with_gradients(vectors)
