"""Layouts are pairs as the loops of the power spectrum want them: sorted by environment and species, with directions, weights and places
in the radial table, made in one compiled pass."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from gpmlp.descriptors.lanes import FLAGS, LANES
from gpmlp.descriptors.loops import Pairs


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
        w, d = _power(base, m), -6 * m * _power(base, m - 1) * x * (1 - x) / cut.cutoff
    else:
        w, d = 1.0 if r < cut.cutoff else 0.0, 0.0
    if cut.exponent == 0.0:
        return w, d
    power = _power(r / cut.scale, cut.exponent)
    scaling = 1 / (1 + power)
    slope = -cut.exponent * power / max(r, 1e-12) * scaling * scaling
    return w * scaling, d * scaling + w * slope


@njit(cache=True, **FLAGS)
def lay_out(vectors, centers, species, of_centers, known, cut, per_step, n_intervals):
    """Pairs from vectors, of neighbours and centres of these species. `known` (largest Z + 1,) is the place of each species, -1 for those
    not known.

    Returns:
        the pairs, and whether all species were known.
    """
    n, n_environments, n_species, like = len(centers), len(of_centers), known.max() + 1, vectors.dtype
    starts, order, slots = (
        np.zeros(n_environments * n_species + 1, np.int64),
        np.empty(n, np.int64),
        np.empty(n_environments, np.int64),
    )
    # lanes of the last pairs reach beyond them
    x, y, z, inverses = (
        np.ones(n + LANES, like),
        np.ones(n + LANES, like),
        np.ones(n + LANES, like),
        np.ones(n + LANES, like),
    )
    weight, d_weight, offset, interval = np.empty(n, like), np.empty(n, like), np.empty(n, like), np.empty(n, np.int64)
    widest, all_known = np.int64(0), True
    for e in range(n_environments):
        slots[e] = _place(known, of_centers[e])
        all_known &= slots[e] >= 0
    for p in range(n):
        slot = _place(known, species[p])
        all_known &= slot >= 0
        starts[centers[p] * n_species + max(slot, 0) + 1] += 1
    for e in range(n_environments):
        here = np.int64(0)
        for k in range(e * n_species, (e + 1) * n_species):
            here += starts[k + 1]
            starts[k + 1] += starts[k]
        widest = max(widest, here)
    filled = starts[:-1].copy()
    for p in range(n):
        group = centers[p] * n_species + max(_place(known, species[p]), 0)
        at = filled[group]
        filled[group] += 1
        r = np.sqrt(vectors[p, 0] * vectors[p, 0] + vectors[p, 1] * vectors[p, 1] + vectors[p, 2] * vectors[p, 2])
        inverse = 1 / r
        order[at], inverses[at] = p, inverse
        x[at], y[at], z[at] = vectors[p, 0] * inverse, vectors[p, 1] * inverse, vectors[p, 2] * inverse
        weight[at], d_weight[at] = _weight(cut, r)
        scaled = r * per_step
        interval[at] = min(n_intervals - 1, max(0, np.int64(scaled)))
        offset[at] = scaled - interval[at]
    return Pairs(order, starts, x, y, z, inverses, weight, d_weight, interval, offset, slots, widest), all_known


@njit(**FLAGS)
def _place(known, species):
    return known[species] if species < len(known) else -1


@njit(**FLAGS)
def _power(x, exponent):
    """x^exponent, by multiplications where that is a small whole number."""
    if exponent != np.floor(exponent) or not 0 <= exponent <= 12:
        return x**exponent
    out = 1.0
    for _ in range(np.int64(exponent)):
        out *= x
    return out
