"""Real spherical harmonics Y_lm of pair directions and their Cartesian gradients: by sphericart, or by a recurrence in batches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import sphericart.torch
import torch
from torch import Tensor


@lru_cache(maxsize=32)
def _calculator(l_max: int) -> sphericart.torch.SphericalHarmonics:
    return sphericart.torch.SphericalHarmonics(l_max)


def degree_slices(l_max: int) -> list[slice]:
    """Of (l, m), by l."""
    return [slice(l * l, (l + 1) ** 2) for l in range(l_max + 1)]


def harmonics_with_gradients(l_max: int, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return Y_lm (pairs, (l_max+1)^2) and dY_lm/dr (pairs, 3, (l_max+1)^2); m runs from -l to l within each l."""
    if not len(vectors):
        size = (l_max + 1) ** 2
        return vectors.new_zeros(0, size), vectors.new_zeros(0, 3, size)
    return _calculator(l_max).compute_with_gradients(vectors)


def recurrence_coefficients(l_max: int) -> np.ndarray:
    """(l_max + 1, l_max + 1, 2) coefficients by l and m (0 <= m <= l) of the recurrence that every backend uses; m from 0.

    Y_lm = Q_lm(z) Re (x + iy)^m and Y_l-m = Q_lm(z) Im (x + iy)^m on the unit sphere, with polynomials
    Q_lm = a_lm z Q_l-1,m + b_lm Q_l-2,m (Bigi et al., J. Chem. Phys. 159, 064802 (2023)); the √2 of m > 0 is in Q_mm.
    Entries: a, b of l > m; for l = m: Q_mm, 0; zero for l < m.
    """
    out = np.zeros((l_max + 1, l_max + 1, 2))
    start = (4 * np.pi) ** -0.5
    for m in range(l_max + 1):
        if m:
            start *= ((2 * m + 1) / (2 * m)) ** 0.5
        out[m, m, 0] = 2**0.5 * start if m else start
        for l in range(m + 1, l_max + 1):
            a = ((4 * l * l - 1) / (l * l - m * m)) ** 0.5
            out[l, m] = a, -a * (((l - 1) ** 2 - m * m) / (4 * (l - 1) ** 2 - 1)) ** 0.5
    return out


def harmonic_orders(l_max: int) -> list[tuple[int, int]]:
    """(l, m) of each harmonic, m from -l to l within each l."""
    return [(l, m) for l in range(l_max + 1) for m in range(-l, l + 1)]


@dataclass(frozen=True, eq=False)
class BatchedHarmonics:
    """The recurrence for many directions at once in PyTorch, without autograd.

    Attributes:
        a, b: (l_max + 1, l_max + 1, 1) of `recurrence_coefficients`.
        slope: (l_max + 1, l_max + 1, 1) dQ_lm/dz over Q_l,m+1: √((l - m)(l + m + 1)), without the √2 for m = 0.
        polynomial: ((l_max + 1)²,) row of Q, l (l_max + 1) + m; power: row of [Re (x + iy)^0 ... ^l_max, Im (x + iy)^0 ...].
        m: (l_max + 1, 1).
    """

    a: Tensor
    b: Tensor
    slope: Tensor
    polynomial: Tensor
    power: Tensor
    m: Tensor

    @staticmethod
    def from_degree(l_max: int, like: Tensor) -> BatchedHarmonics:
        """On the device of a tensor, of its type."""
        lm, side = harmonic_orders(l_max), l_max + 1
        a, b = (
            torch.from_numpy(part)[..., None].to(like) for part in np.moveaxis(recurrence_coefficients(l_max), 2, 0)
        )
        l, m = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        slope = ((l - m) * (l + m + 1)).clamp_min(0).double().sqrt()
        slope[:, 0] *= 0.5**0.5
        polynomial = torch.tensor([l * side + abs(m) for l, m in lm], device=like.device)
        power = torch.tensor([abs(m) + side * (m < 0) for _, m in lm], device=like.device)
        return BatchedHarmonics(
            a, b, slope[..., None].to(like), polynomial, power, torch.arange(side).to(like)[:, None]
        )

    def __call__(self, units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Polynomials Q and their slopes (l_max + 1, l_max + 1, n), zero above m = l, and powers (2 (l_max + 1), n), of unit
        vectors (3, n)."""
        x, y, z = units
        side = len(self.a)
        q = units.new_zeros(side, side, len(z))
        real, imaginary = [torch.ones_like(x)], [torch.zeros_like(x)]
        for l in range(side):
            q[l, l] = self.a[l, l]
            if l:
                torch.mul(self.a[l, :l] * z, q[l - 1, :l], out=q[l, :l])
                real.append(x * real[-1] - y * imaginary[-1])
                imaginary.append(x * imaginary[-1] + y * real[-2])
            if l > 1:
                q[l, : l - 1].addcmul_(self.b[l, : l - 1], q[l - 2, : l - 1])
        slopes = torch.zeros_like(q)
        torch.mul(self.slope[:, :-1], q[:, 1:], out=slopes[:, :-1])
        return q, slopes, torch.stack(real + imaginary)

    def values(self, q: Tensor, powers: Tensor) -> Tensor:
        """Y_lm ((l_max + 1)², n)."""
        return q.flatten(0, 1)[self.polynomial] * powers[self.power]

    def gradients(self, q: Tensor, slopes: Tensor, powers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """∂Y/∂x, ∂Y/∂y, ∂Y/∂z of the polynomials in x, y and z, each ((l_max + 1)², n): to be cleared of what points along the vector."""
        real, imaginary = (
            torch.cat([torch.zeros_like(part[:1]), part[:-1]]) * self.m for part in powers.unflatten(0, (2, -1))
        )
        on_x, on_y = torch.cat([real, imaginary]), torch.cat([-imaginary, real])
        factor = q.flatten(0, 1)[self.polynomial]
        return factor * on_x[self.power], factor * on_y[self.power], self.values(slopes, powers)
