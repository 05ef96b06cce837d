"""Compiled loops from products of Jacobians with inducing vectors to covariance rows of forces and stresses.

Only covariances.py imports this, when there is something to do: numba takes half a second to import. Machine code is cached on disk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

# a product and the sum it goes into may be rounded once: that is all that is left to the compiler
# What is called here is inlined: else numba links one of two translations of it, one in the process that compiled it and the other
# in those that find it in the cache, and which products are rounded differs.
FLAGS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
COLUMNS = 128  # done together: what they add up to for an environment stays in the innermost cache


@njit(cache=True, **FLAGS)
def add_rows(
    products, first, bend, starts, targets, center_slots, vectors, owner, weight, forces, stresses, lo, hi, begin, end
):
    """Derivatives of k(x, u), g = d/dr f(s) = f' J x and d/dr f'(s) x.t = f' J t + f'' (x.t) J x, of the pairs of environments lo to hi:
    forces[neighbour] -= g, forces[centre] += g, stresses[structure] += (r g + g r) / 2V.

    Args:
        products: (3 pairs, columns) J x of the centres begin to end, then J t by direction and centre; pairs of these environments.
        first: (environments, M) f'; bend: (environments, R, M) f'' x.t.
        starts: (environments + 1,) first pair of each environment.
        targets: (pairs,), center_slots: (environments,) rows of `forces` for neighbour and centre; those behind its end go nowhere.
        vectors: (pairs, 3); owner: (environments,) structures; weight: (environments,) 1/V.
        forces: (atoms, 3, M (1 + R)); stresses: (structures, 6, the same), or empty if not wanted.
        begin, end: of the centres whose columns are done here; others are left to other threads.
    """
    m, directions, n = first.shape[1], bend.shape[1], end - begin
    g, centre = np.empty((3, COLUMNS), forces.dtype), np.empty((3, COLUMNS), forces.dtype)
    virial = np.empty((6, COLUMNS), forces.dtype)
    for e in range(lo, hi):
        if starts[e + 1] == starts[e]:
            continue
        for d in range(directions + 1):
            for k in range(0, n, COLUMNS):
                count = min(COLUMNS, n - k)
                to = d * m + begin + k
                slope = first[e, begin + k : begin + k + count]
                bent = bend[e, max(d - 1, 0) : d, begin + k : begin + k + count]
                centre[:] = 0
                virial[:] = 0
                for p in range(starts[e], starts[e + 1]):
                    _slopes(products, 3 * (p - starts[lo]), k, d * n + k, slope, bent, g)
                    _sum(g, count, centre, forces, targets[p], to)
                    if len(stresses):
                        _strain(g, count, vectors[p], virial)
                if center_slots[e] < len(forces):
                    for x in range(3):
                        there, row = forces[center_slots[e], x, to : to + count], centre[x]
                        for i in range(count):
                            there[i] += row[i]
                if len(stresses):
                    for v in range(6):
                        there, row = stresses[owner[e], v, to : to + count], virial[v]
                        for i in range(count):
                            there[i] += weight[e] * row[i]


@njit(forceinline=True, **FLAGS)
def _slopes(products, row, values, here, slope, bent, g):
    """g[xyz] of the columns of `products` from `here` on, those of the values being at `values`."""
    count = len(slope)
    for x in range(3):
        out, on_centre = g[x], products[row + x, here : here + count]
        if len(bent):
            second, on_value = bent[0], products[row + x, values : values + count]
            for i in range(count):
                out[i] = slope[i] * on_centre[i] + second[i] * on_value[i]
        else:
            for i in range(count):
                out[i] = slope[i] * on_centre[i]


@njit(forceinline=True, **FLAGS)
def _sum(g, count, centre, forces, target, to):
    """Forces on neighbour and centre."""
    for x in range(3):
        row, total = g[x], centre[x]
        for i in range(count):
            total[i] += row[i]
        if target < len(forces):
            there = forces[target, x, to : to + count]
            for i in range(count):
                there[i] -= row[i]


@njit(forceinline=True, **FLAGS)
def _strain(g, count, r, virial):
    """Symmetric part of r ⊗ g, in Voigt's order."""
    x, y, z, gx, gy, gz = r[0], r[1], r[2], g[0], g[1], g[2]
    hx, hy, hz = r.dtype.type(0.5) * x, r.dtype.type(0.5) * y, r.dtype.type(0.5) * z
    xx, yy, zz, yz, xz, xy = virial[0], virial[1], virial[2], virial[3], virial[4], virial[5]
    for i in range(count):
        xx[i] += x * gx[i]
        yy[i] += y * gy[i]
        zz[i] += z * gz[i]
        yz[i] += hy * gz[i] + hz * gy[i]
        xz[i] += hx * gz[i] + hz * gx[i]
        xy[i] += hx * gy[i] + hy * gx[i]
