"""Loops are the compiled kernels of the power spectrum: one environment at a time, its pairs side by side.

Neighbours of an environment are worked on together, those of each species in turn: every inner loop runs over pairs, in memory that
stays in cache. Radial integrals of a pair are cheaper to make again than to fetch, so nothing of a pair is kept; harmonics come from
sphericart for a block of environments at a time.
Only fused.py imports this, because numba takes half a second to import; the machine code is cached on disk after the first use.
Equations are those of power_spectrum.py, whose PyTorch path is the reference.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

# sums may be reordered and products fused; NaN and infinity mean what they mean
FLAGS = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}


WIDTH = 16  # loops over pairs go by whole multiples of this
TOGETHER = 112  # pairs whose Jacobian is made together, from several environments: more would leave the cache
TILE = 8  # features that are turned from pairs side by side to rows of a pair at a time: a cache line of doubles


class Pairs(NamedTuple):
    """Pairs of surroundings, all of one floating type.

    Attributes:
        order: (pairs,) pair indices sorted by environment, then by species of the neighbour.
        starts: (environments * species + 1,) where each environment and species begins in `order`.
        units: (pairs, 3) directions.
        weight, d_weight: (pairs,) w(r) and its slope.
        interval, offset: (pairs,) interval of the radial table and place in it, in [0, 1].
        widest: largest number of pairs of one environment and species.
    """

    order: np.ndarray
    starts: np.ndarray
    units: np.ndarray
    weight: np.ndarray
    d_weight: np.ndarray
    interval: np.ndarray
    offset: np.ndarray
    widest: int


class Basis(NamedTuple):
    """Radial functions and products of channels.

    Attributes:
        table: (intervals, 6, n_max (l_max + 1)) quintic polynomials, highest power first; per_step: intervals per A.
        numbers: 0 to 5 in the floating type of the pairs.
        prefactors: (features,) of the products, as in power_spectrum.py.
        center: (n_max,) density of the central atom at l = 0.
        n_max, l_max, n_species: sizes.
    """

    table: np.ndarray
    per_step: float
    numbers: np.ndarray
    prefactors: np.ndarray
    center: np.ndarray
    n_max: int
    l_max: int
    n_species: int


@njit(**FLAGS)
def _padded(count):
    """Pairs worked on together: as many as fill whole vectors, unrolled, so that no loop ends one by one."""
    return (count + WIDTH - 1) // WIDTH * WIDTH


@njit(**FLAGS)
def _values(pairs, basis, first, count, at, radial):
    """radial[nl, at + pair] = w I_nl of `count` pairs from `first` on."""
    for p in range(count):
        j = pairs.order[first + p]
        t, w = pairs.offset[j], pairs.weight[j]
        c = basis.table[pairs.interval[j]]
        for k in range(c.shape[1]):
            value = ((((c[0, k] * t + c[1, k]) * t + c[2, k]) * t + c[3, k]) * t + c[4, k]) * t + c[5, k]
            radial[k, at + p] = w * value


@njit(**FLAGS)
def _slopes(pairs, basis, first, count, at, radial):
    """radial[nl, at + pair] = d(w I_nl)/dr."""
    two, three, four, five = basis.numbers[2], basis.numbers[3], basis.numbers[4], basis.numbers[5]
    for p in range(count):
        j = pairs.order[first + p]
        t, w, d_weight = pairs.offset[j], pairs.weight[j] * basis.per_step, pairs.d_weight[j]
        c = basis.table[pairs.interval[j]]
        for k in range(c.shape[1]):
            value = ((((c[0, k] * t + c[1, k]) * t + c[2, k]) * t + c[3, k]) * t + c[4, k]) * t + c[5, k]
            slope = (((five * c[0, k] * t + four * c[1, k]) * t + three * c[2, k]) * t + two * c[3, k]) * t + c[4, k]
            radial[k, at + p] = w * slope + d_weight * value


@njit(**FLAGS)
def _gather(rows, order, base, first, count, at, out):
    """out[k, at + pair] = rows[pair - base, k]: side by side what belongs to one environment and species."""
    for p in range(count):
        row = rows[order[first + p] - base]
        for k in range(len(row)):
            out[k, at + p] = row[k]


@njit(cache=True, **FLAGS)
def expand(lo, hi, base, pairs, basis, tiny, harmonics, density, features, norms):
    """Environments lo to hi: add their neighbours to `density` (environments, channels, lm), then make features and norms.

    `harmonics` (pairs, lm) are those of pairs `base` and following, here and below.
    """
    degrees, like = basis.l_max + 1, basis.numbers
    at, width = np.int64(0), _padded(pairs.widest)
    radial, y = np.zeros((basis.n_max * degrees, width), like.dtype), np.zeros((degrees**2, width), like.dtype)
    for e in range(lo, hi):
        for s in range(basis.n_species):
            first = pairs.starts[e * basis.n_species + s]
            count = pairs.starts[e * basis.n_species + s + 1] - first
            if count == 0:
                continue
            _values(pairs, basis, first, count, at, radial)
            _gather(harmonics, pairs.order, base, first, count, at, y)
            whole = _padded(count)
            radial[:, count:whole] = like[0]
            for n in range(basis.n_max):
                c = density[e, s * basis.n_max + n]
                for l in range(degrees):
                    for lm in range(l * l, (l + 1) ** 2):
                        r, h, total = radial[n * degrees + l], y[lm], like[0]
                        for p in range(whole):
                            total += r[p] * h[p]
                        c[lm] += total
        norms[e] = max(tiny, _spectrum(basis, density[e], features[e]))
        inverse = like[1] / norms[e]
        for k in range(features.shape[1]):
            features[e, k] *= inverse


@njit(**FLAGS)
def _spectrum(basis, c, spectrum):
    """p_ab,l of one environment; returns its norm."""
    k, square = 0, basis.numbers[0]
    for a in range(c.shape[0]):
        for b in range(a, c.shape[0]):
            for l in range(basis.l_max + 1):
                total = basis.numbers[0]
                for lm in range(l * l, (l + 1) ** 2):
                    total += c[a, lm] * c[b, lm]
                spectrum[k] = total * basis.prefactors[k]
                square += spectrum[k] * spectrum[k]
                k += 1
    return np.sqrt(square)


@njit(cache=True, **FLAGS)
def pull_back(lo, hi, base, pairs, basis, harmonics, gradients, density, features, norms, cotangents, out):
    """Pair gradients (pairs, 3) of environments lo to hi from cotangents of their features; `gradients` (pairs, 3 lm) are dY/dr."""
    degrees, like, width = basis.l_max + 1, basis.numbers, _padded(pairs.widest)
    # what stands behind the last pair is never read out, so it may be of another environment
    value = np.zeros((basis.n_max * degrees, width), like.dtype)
    slope = np.zeros_like(value)
    y, dy = np.zeros((degrees**2, width), like.dtype), np.zeros((3 * degrees**2, width), like.dtype)
    at = np.int64(0)
    on_density, sums = np.empty(density.shape[1:], like.dtype), np.empty((6, width), like.dtype)
    for e in range(lo, hi):
        _to_density(basis, density[e], features[e], norms[e], cotangents[e], on_density)
        for s in range(basis.n_species):
            first = pairs.starts[e * basis.n_species + s]
            count = pairs.starts[e * basis.n_species + s + 1] - first
            if count == 0:
                continue
            _values(pairs, basis, first, count, at, value)
            _slopes(pairs, basis, first, count, at, slope)
            _gather(harmonics, pairs.order, base, first, count, at, y)
            _gather(gradients, pairs.order, base, first, count, at, dy)
            g = on_density[s * basis.n_max : (s + 1) * basis.n_max]
            _to_pairs(basis, g, _padded(count), value, slope, y, dy, sums)
            for p in range(count):
                j = pairs.order[first + p]
                for x in range(3):
                    out[j, x] = sums[x, p] + sums[3, p] * pairs.units[j, x]


@njit(**FLAGS)
def _to_density(basis, c, x, norm, cotangent, out):
    """dE/dc of one environment from dE/dx, by way of dE/dp = (dE/dx - x (x . dE/dx)) / |p|."""
    along = basis.numbers[0]
    for k in range(len(x)):
        along += x[k] * cotangent[k]
    inverse = basis.numbers[1] / norm
    out[:] = basis.numbers[0]
    k = 0
    for a in range(c.shape[0]):
        for b in range(a, c.shape[0]):
            for l in range(basis.l_max + 1):
                g = (cotangent[k] - x[k] * along) * inverse * basis.prefactors[k]
                k += 1
                for lm in range(l * l, (l + 1) ** 2):
                    out[a, lm] += g * c[b, lm]
                for lm in range(l * l, (l + 1) ** 2):
                    out[b, lm] += g * c[a, lm]


@njit(**FLAGS)
def _to_pairs(basis, g, count, value, slope, y, dy, sums):
    """sums[:3] = R dY/dr and sums[3] = R' Y, contracted with dE/dc of the neighbours' species (n_max, lm)."""
    degrees = basis.l_max + 1
    sums[:4, :count] = basis.numbers[0]
    with_value, with_slope = sums[4], sums[5]
    for l in range(degrees):
        for lm in range(l * l, (l + 1) ** 2):
            with_value[:count] = basis.numbers[0]
            with_slope[:count] = basis.numbers[0]
            for n in range(basis.n_max):
                factor, r, dr = g[n, lm], value[n * degrees + l], slope[n * degrees + l]
                for p in range(count):
                    with_value[p] += factor * r[p]
                for p in range(count):
                    with_slope[p] += factor * dr[p]
            along, h = sums[3], y[lm]
            for p in range(count):
                along[p] += with_slope[p] * h[p]
            for x in range(3):
                across, dh = sums[x], dy[x * degrees**2 + lm]
                for p in range(count):
                    across[p] += with_value[p] * dh[p]


@njit(cache=True, **FLAGS)
def jacobian(lo, hi, base, pairs, basis, harmonics, gradients, density, features, norms, out):
    """out[pair - base, xyz, feature] = d(features)/dr of the pairs of environments lo to hi.

    With A_bl = Σ_m Y_lm c_blm and B_bl = Σ_m dY_lm c_blm the derivative of the product (a, b) is
    [R'_a A_b + R'_b A_a] r^ + R_a B_b + R_b B_a, where R_a is zero unless a is of the neighbour's species.
    """
    degrees, like, width = basis.l_max + 1, basis.numbers, max(_padded(pairs.widest), TOGETHER)
    rows_of_channels, n_nl = density.shape[1] * degrees, basis.n_max * degrees
    # channels of other species, and pairs that are not there, stay zero
    value, slope = np.zeros((rows_of_channels, width), like.dtype), np.zeros((rows_of_channels, width), like.dtype)
    y, units = np.zeros((4 * degrees**2, width), like.dtype), np.zeros((3, width), like.dtype)
    inner, tile = np.zeros((4, rows_of_channels, width), like.dtype), np.empty((TILE, 3, width), like.dtype)
    rows, none = np.empty(width, np.int64), np.int64(0)  # a literal 0 would have what it is given to compiled once more
    for s in range(basis.n_species):
        start, end = s * n_nl, (s + 1) * n_nl
        e, at = lo, none
        while e < hi:
            first = pairs.starts[e * basis.n_species + s]
            count = pairs.starts[e * basis.n_species + s + 1] - first
            if at + count <= width:
                _values(pairs, basis, first, count, at, value[start:end])
                _slopes(pairs, basis, first, count, at, slope[start:end])
                _gather(pairs.units, pairs.order, none, first, count, at, units)
                _gather(harmonics, pairs.order, base, first, count, at, y[: degrees**2])
                _gather(gradients, pairs.order, base, first, count, at, y[degrees**2 :])
                for x in range(4):
                    _contract(density[e], degrees, count, at, y[x * degrees**2 : (x + 1) * degrees**2], inner[x])
                for p in range(count):
                    rows[at + p] = pairs.order[first + p] - base
                e, at = e + 1, at + count
            if e == hi or at + count > width:
                _products(basis, s, at, value, slope, inner, units, rows, tile, out)
                at = none
        value[start:end], slope[start:end] = like[0], like[0]
    for e in range(lo, hi):
        for j in range(pairs.starts[e * basis.n_species] - base, pairs.starts[(e + 1) * basis.n_species] - base):
            for x in range(3):
                _normalise(features[e], norms[e], like, out[j, x])


@njit(**FLAGS)
def _contract(c, degrees, count, at, harmonics, out):
    """out[channel l, at + pair] = Σ_m harmonics[lm, at + pair] c[channel, lm]."""
    for a in range(c.shape[0]):
        for l in range(degrees):
            total, middle = out[a * degrees + l, at : at + count], l * l + l
            factor, h = c[a, middle], harmonics[middle, at : at + count]
            for p in range(count):
                total[p] = factor * h[p]
            for m in range(1, l + 1):
                plus, minus = c[a, middle + m], c[a, middle - m]
                h, k = harmonics[middle + m, at : at + count], harmonics[middle - m, at : at + count]
                for p in range(count):
                    total[p] += plus * h[p] + minus * k[p]


@njit(**FLAGS)
def _products(basis, species, n, value, slope, inner, units, rows, tile, out):
    """Derivatives of the products of channels with respect to n neighbours of one species, before normalisation.

    Made for all pairs at a time, but stored by pair: `tile` (TILE, 3, pairs) holds a few features until there are enough to turn.
    """
    degrees, channels, count = basis.l_max + 1, basis.n_max * basis.n_species, _padded(n)
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
                    tile[held, :, :count] = basis.numbers[0]
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
def _normalise(x, norm, numbers, row):
    """x = p/|p|:  dx = (dp - x (x . dp)) / |p|."""
    along, inverse = numbers[0], numbers[1] / norm
    for k in range(len(x)):
        along += x[k] * row[k]
    for k in range(len(x)):
        row[k] = (row[k] - x[k] * along) * inverse
