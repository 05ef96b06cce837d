"""Jacobians of the power spectrum, by compiled loops over all pairs of one or several environments at a time.

Harmonics come from sphericart, for the pairs of a block of environments. See loops.py for what pairs and the basis hold.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from gpmlp.descriptors.lanes import FLAGS, whole
from gpmlp.descriptors.loops import POWERS

TOGETHER = 112  # pairs whose Jacobian is made together, from several environments: more would leave the cache
WIDTH = 16  # loops over pairs go by whole multiples of this
TILE = 8  # features that are turned from pairs side by side to rows of a pair at a time: a cache line of doubles


@njit(**FLAGS)
def padded(count):
    """Pairs worked on together: as many as fill whole vectors, unrolled, so that no loop ends one by one."""
    return (count + WIDTH - 1) // WIDTH * WIDTH


@njit(**FLAGS)
def _radial(pairs, basis, first, count, at, value, slope):
    """value[nl, at + pair] = w I_nl and slope[nl, at + pair] = d(w I_nl)/dr."""
    degrees, n_whole = basis.l_max + 1, whole(basis.n_max)
    size = degrees * n_whole
    for p in range(count):
        t, w, d_weight = pairs.offset[first + p], pairs.weight[first + p], pairs.d_weight[first + p]
        start = pairs.interval[first + p] * POWERS * size
        for l in range(degrees):
            for n in range(basis.n_max):
                c = basis.table[start + l * n_whole + n : start + POWERS * size : size]
                d, v = c[0], c[0] * t + c[1]
                for power in range(2, POWERS):
                    d, v = d * t + v, v * t + c[power]
                value[n * degrees + l, at + p] = w * v
                slope[n * degrees + l, at + p] = w * basis.per_step * d + d_weight * v


@njit(**FLAGS)
def _gather(rows, order, base, first, count, at, out):
    """out[k, at + pair] = rows[pair - base, k]: side by side what belongs to one environment and species."""
    for p in range(count):
        row = rows[order[first + p] - base]
        for k in range(len(row)):
            out[k, at + p] = row[k]


@njit(cache=True, **FLAGS)
def jacobian(lo, hi, base, pairs, basis, harmonics, gradients, density, features, norms, out):
    """out[pair - base, xyz, feature] = d(features)/dr of the pairs of environments lo to hi.

    `harmonics` (pairs, lm) and `gradients` (pairs, 3 lm), dY/dr, are those of pairs `base` and following.
    With A_bl = Σ_m Y_lm c_blm and B_bl = Σ_m dY_lm c_blm the derivative of the product (a, b) is
    [R'_a A_b + R'_b A_a] r^ + R_a B_b + R_b B_a, where R_a is zero unless a is of the neighbour's species.
    """
    degrees, like, width = basis.l_max + 1, basis.table.dtype, max(padded(pairs.widest), TOGETHER)
    rows_of_channels, n_nl = basis.n_species * basis.n_max * degrees, basis.n_max * degrees
    # channels of other species, and pairs that are not there, stay zero
    value, slope = np.zeros((rows_of_channels, width), like), np.zeros((rows_of_channels, width), like)
    y, units = np.zeros((4 * degrees**2, width), like), np.zeros((3, width), like)
    inner, tile = np.zeros((4, rows_of_channels, width), like), np.empty((TILE, 3, width), like)
    rows, none = np.empty(width, np.int64), np.int64(0)  # a literal 0 would have what it is given to compiled once more
    for s in range(basis.n_species):
        start, end = s * n_nl, (s + 1) * n_nl
        e, at = lo, none
        while e < hi:
            first = pairs.starts[e * basis.n_species + s]
            count = pairs.starts[e * basis.n_species + s + 1] - first
            if at + count <= width:
                _radial(pairs, basis, first, count, at, value[start:end], slope[start:end])
                for p in range(count):
                    i = first + p
                    units[0, at + p], units[1, at + p], units[2, at + p] = pairs.x[i], pairs.y[i], pairs.z[i]
                _gather(harmonics, pairs.order, base, first, count, at, y[: degrees**2])
                _gather(gradients, pairs.order, base, first, count, at, y[degrees**2 :])
                for x in range(4):
                    _contract(
                        density[e],
                        basis.n_max * basis.n_species,
                        degrees,
                        count,
                        at,
                        y[x * degrees**2 : (x + 1) * degrees**2],
                        inner[x],
                    )
                for p in range(count):
                    rows[at + p] = pairs.order[first + p] - base
                e, at = e + 1, at + count
            if e == hi or at + count > width:
                _products(basis, s, at, value, slope, inner, units, rows, tile, out)
                at = none
        value[start:end], slope[start:end] = basis.zero, basis.zero
    for e in range(lo, hi):
        for j in range(pairs.starts[e * basis.n_species] - base, pairs.starts[(e + 1) * basis.n_species] - base):
            for x in range(3):
                _normalise(features[e], norms[e], basis, out[j, x])


@njit(**FLAGS)
def _contract(c, channels, degrees, count, at, harmonics, out):
    """out[channel l, at + pair] = Σ_m harmonics[lm, at + pair] c[lm, channel]."""
    for a in range(channels):
        for l in range(degrees):
            total, middle = out[a * degrees + l, at : at + count], l * l + l
            factor, h = c[middle, a], harmonics[middle, at : at + count]
            for p in range(count):
                total[p] = factor * h[p]
            for m in range(1, l + 1):
                plus, minus = c[middle + m, a], c[middle - m, a]
                h, k = harmonics[middle + m, at : at + count], harmonics[middle - m, at : at + count]
                for p in range(count):
                    total[p] += plus * h[p] + minus * k[p]


@njit(**FLAGS)
def _products(basis, species, n, value, slope, inner, units, rows, tile, out):
    """Derivatives of the products of channels with respect to n neighbours of one species, before normalisation.

    Made for all pairs at a time, but stored by pair: `tile` (TILE, 3, pairs) holds a few features until there are enough to turn.
    """
    degrees, channels, count = basis.l_max + 1, basis.n_max * basis.n_species, padded(n)
    along, k, held = np.empty(count, units.dtype), np.int64(0), np.int64(0)
    for a in range(channels):
        for b in range(a, channels):
            touched = a // basis.n_max == species or b // basis.n_max == species
            for l in range(degrees):
                f, i, j = basis.prefactors[k], a * degrees + l, b * degrees + l
                if touched:
                    da, db, ya, yb = slope[i], slope[j], inner[0, i], inner[0, j]
                    for p in range(count):
                        along[p] = f * (da[p] * yb[p] + db[p] * ya[p])
                    for x in range(3):
                        ra, rb, ga, gb = value[i], value[j], inner[1 + x, i], inner[1 + x, j]
                        here, u = tile[held, x], units[x]
                        for p in range(count):
                            here[p] = f * (ra[p] * gb[p] + rb[p] * ga[p]) + along[p] * u[p]
                else:
                    tile[held, :, :count] = basis.zero
                k, held = k + 1, held + 1
                if held == TILE:
                    _turn(tile, held, n, rows, k - held, out)
                    held = np.int64(0)
    _turn(tile, held, n, rows, k - held, out)


@njit(**FLAGS)
def _turn(tile, held, n, rows, start, out):
    """out[row of the pair, xyz, start + k] = tile[k, xyz, pair]."""
    for p in range(n):
        for x in range(3):
            row = out[rows[p], x, start : start + held]
            if held == TILE:  # a number of turns that the compiler knows
                for k in range(TILE):
                    row[k] = tile[k, x, p]
            else:
                for k in range(held):
                    row[k] = tile[k, x, p]


@njit(**FLAGS)
def _normalise(x, norm, basis, row):
    """x = p/|p|:  dx = (dp - x (x . dp)) / |p|."""
    along, inverse = basis.zero, basis.one / norm
    for k in range(len(x)):
        along += x[k] * row[k]
    for k in range(len(x)):
        row[k] = (row[k] - x[k] * along) * inverse
