"""Real spherical harmonics Y_lm of the pair directions and their Cartesian gradients (sphericart)."""

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


def harmonics_with_gradients(l_max: int, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return Y_lm (pairs, (l_max+1)^2) and dY_lm/dr (pairs, 3, (l_max+1)^2); m runs from -l to l within each l."""
    if not len(vectors):
        size = (l_max + 1) ** 2
        return vectors.new_zeros(0, size), vectors.new_zeros(0, 3, size)
    return _calculator(l_max).compute_with_gradients(vectors)


def legendre_recurrence(l_max: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """a, b and d of l > m, and Q_mm on the diagonal of the last: each (l_max + 1, l_max + 1), by l and m, zero elsewhere."""
    a, b, d, start = (np.zeros((l_max + 1, l_max + 1)) for _ in range(4))
    lowest = (4 * np.pi) ** -0.5
    for m in range(l_max + 1):
        if m:
            lowest *= ((2 * m + 1) / (2 * m)) ** 0.5
        start[m, m] = lowest
        for l in range(m + 1, l_max + 1):
            a[l, m] = ((4 * l * l - 1) / (l * l - m * m)) ** 0.5
            if l > m + 1:
                b[l, m] = -a[l, m] * (((l - 1) ** 2 - m * m) / (4 * (l - 1) ** 2 - 1)) ** 0.5
            d[l, m] = ((l - m) * (l + m + 1)) ** 0.5
    return a, b, d, start


def harmonic_orders(l_max: int) -> list[tuple[int, int]]:
    """(l, m) of each harmonic, m from -l to l within each l."""
    return [(l, m) for l in range(l_max + 1) for m in range(-l, l + 1)]


@dataclass(frozen=True, eq=False)
class BatchedHarmonics:
    """Numbers of the recurrence, and which factors each harmonic is a product of.

    Attributes:
        a, b, slope: (l_max + 1, l_max + 1, 1) of `recurrence`, slope with its 0 for m = l.
        start: Q_mm by m.
        polynomial: ((l_max + 1)²,) row of Q, l (l_max + 1) + m; power: row of [C_0 ... C_l, S_0 ... S_l].
        roots: (2 (l_max + 1), 1) √2, or 1 for m = 0, of each row of powers; m: (l_max + 1, 1).
    """

    a: Tensor
    b: Tensor
    slope: Tensor
    start: tuple[float, ...]
    polynomial: Tensor
    power: Tensor
    roots: Tensor
    m: Tensor

    @staticmethod
    def from_degree(l_max: int, like: Tensor) -> BatchedHarmonics:
        """On the device of a tensor, of its type."""
        a, b, d, start = legendre_recurrence(l_max)
        lm, side = harmonic_orders(l_max), l_max + 1
        m = torch.arange(side).to(like)[:, None]
        root = (1 + (m > 0)).to(like).sqrt()
        index = (
            torch.tensor([l * side + abs(m) for l, m in lm], device=like.device),
            torch.tensor([abs(m) + side * (m < 0) for _, m in lm], device=like.device),
        )
        numbers = (torch.from_numpy(part)[:, :, None].to(like) for part in (a, b, d))
        return BatchedHarmonics(*numbers, tuple(start.diagonal().tolist()), *index, torch.cat([root, root]), m)

    def __call__(self, units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Polynomials Q and their slopes (l_max + 1, l_max + 1, n), zero above m = l, and powers C, S (2 (l_max + 1), n), of unit
        vectors (3, n)."""
        x, y, z = units
        side = len(self.start)
        q = units.new_zeros(side, side, len(z))
        cosines, sines = [torch.ones_like(x)], [torch.zeros_like(x)]
        for l in range(side):
            q[l, l].fill_(self.start[l])
            if l:
                torch.mul(self.a[l, :l] * z, q[l - 1, :l], out=q[l, :l])
                cosines.append(x * cosines[-1] - y * sines[-1])
                sines.append(x * sines[-1] + y * cosines[-2])
            if l > 1:
                q[l, : l - 1].addcmul_(self.b[l, : l - 1], q[l - 2, : l - 1])
        slopes = torch.zeros_like(q)
        torch.mul(self.slope[:, :-1], q[:, 1:], out=slopes[:, :-1])
        return q, slopes, torch.stack(cosines + sines) * self.roots

    def values(self, q: Tensor, powers: Tensor) -> Tensor:
        """Y_lm ((l_max + 1)², n)."""
        return q.flatten(0, 1)[self.polynomial] * powers[self.power]

    def slopes(self, q: Tensor, slopes: Tensor, powers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """∂Y/∂x, ∂Y/∂y, ∂Y/∂z of the polynomials in x, y and z, each ((l_max + 1)², n): to be cleared of what points along the vector."""
        cosines, sines = (powers / self.roots).unflatten(0, (2, -1))
        below = [torch.cat([torch.zeros_like(part[:1]), part[:-1]]) * self.m for part in (cosines, sines)]
        on_x, on_y = torch.cat(below) * self.roots, torch.cat([-below[1], below[0]]) * self.roots
        factor = q.flatten(0, 1)[self.polynomial]
        return factor * on_x[self.power], factor * on_y[self.power], self.values(slopes, powers)
