"""Layouts are pairs as the loops of the power spectrum want them: sorted by environment and species, with distances, directions, weights
and places in the radial table, made in one compiled pass."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from gpmlp.descriptors.loops import FLAGS, Pairs


class Cut(NamedTuple):
    """The weights of neighbours (weights.py) as plain numbers; `function` is the place of its name in weights.FUNCTIONS."""

    function: int
    cutoff: float
    width: float
    cutoff_exponent: float
    scale: float
    exponent: float


@njit(**FLAGS)
def _weight(cut, r):
    """w(r) and dw/dr, as NeighborWeights has them."""
    if cut.function == 0:
        x = min(1.0, max(0.0, (r - cut.cutoff + cut.width) / cut.width))
        w, d = 1 - x * x * x * (10 - 15 * x + 6 * x * x), -30 * (x * (1 - x)) ** 2 / cut.width
    elif cut.function == 1:
        x = min(1.0, max(0.0, r / cut.cutoff))
        base, m = (1 - x) ** 2 * (1 + 2 * x), cut.cutoff_exponent
        w, d = base**m, -6 * m * base ** (m - 1) * x * (1 - x) / cut.cutoff
    else:
        w, d = 1.0 if r < cut.cutoff else 0.0, 0.0
    if cut.exponent == 0.0:
        return w, d
    power = (r / cut.scale) ** cut.exponent
    scaling = 1 / (1 + power)
    slope = -cut.exponent * power / max(r, 1e-12) * scaling * scaling
    return w * scaling, d * scaling + w * slope


@njit(cache=True, **FLAGS)
def lay_out(vectors, centers, species, known, n_environments, cut, per_step, n_intervals, numbers):
    """Pairs from vectors, sorted by environment. `known` (largest Z + 1,) is the place of each species, -1 for those not known.

    Returns:
        the pairs, and whether all species were known.
    """
    n, n_species = len(centers), known.max() + 1
    starts, order = np.zeros(n_environments * n_species + 1, np.int64), np.empty(n, np.int64)
    for p in range(n):
        slot = known[species[p]] if species[p] < len(known) else -1
        if slot < 0:
            return _laid_out(order, starts, numbers), False
        starts[centers[p] * n_species + slot + 1] += 1
    widest = starts.max()
    for k in range(len(starts) - 1):
        starts[k + 1] += starts[k]
    filled, pairs = starts[:-1].copy(), _laid_out(order, starts, numbers, widest)
    for p in range(n):
        group = centers[p] * n_species + known[species[p]]
        order[filled[group]] = p
        filled[group] += 1
        x, y, z = vectors[p]
        r = np.sqrt(x * x + y * y + z * z)
        inverse = numbers[1] / r
        pairs.units[p, 0], pairs.units[p, 1], pairs.units[p, 2] = x * inverse, y * inverse, z * inverse
        w, d = _weight(cut, r)
        scaled = r * per_step
        interval = min(n_intervals - 1, max(0, np.int64(scaled)))
        pairs.inverse[p], pairs.weight[p], pairs.d_weight[p] = inverse, w, d
        pairs.interval[p], pairs.offset[p] = interval, scaled - interval
    return pairs, True


@njit(**FLAGS)
def _laid_out(order, starts, numbers, widest=0):
    n, like = len(order), numbers.dtype
    floats = np.empty((4, n), like)
    units, interval = np.empty((n, 3), like), np.empty(n, np.int64)
    return Pairs(order, starts, units, floats[0], floats[1], floats[2], interval, floats[3], widest)
