"""Loops are the compiled kernels of the power spectrum: one environment at a time, four numbers side by side (lanes.py).

Expansion, spectrum and their slopes are products of small matrices, for each angular momentum and species. Radial integrals and
harmonics of a pair are cheaper to make again than to fetch, so nothing of a pair is kept; what an environment needs stays in cache.
Only cpu.py imports this: numba takes half a second to import. Machine code is cached on disk.
Equations are those of power_spectrum.py, whose PyTorch path is the reference.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from gpmlp.descriptors._simd import (
    FLAGS,
    LANES,
    fill,
    load,
    load_all,
    multiply_matrices,
    round_up,
    store,
    transpose_lanes,
)

POWERS = 6  # coefficients of a quintic


def recurrence_table(l_max: int) -> np.ndarray:
    """(l_max + 1, l_max + 1, 2) numbers that harmonics are made of, by l and m (0 <= m <= l).

    Y_lm = Q_lm(z) Re (x + iy)^m and Y_l-m = Q_lm(z) Im (x + iy)^m, times √2 for m > 0, on the unit sphere, with polynomials
    Q_lm = a_lm z Q_l-1,m + b_lm Q_l-2,m (Bigi et al., J. Chem. Phys. 159, 064802 (2023)).
    Entries: a, b of l > m; for l = m: Q_mm with the √2, 0.
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


class SortedPairs(NamedTuple):
    """Pairs of surroundings sorted by environment, then by species of the neighbour; all of one floating type.

    Attributes:
        order: (pairs,) which pair each is.
        starts: (environments * species + 1,) where each environment and species begins.
        x, y, z: (pairs and LANES more,) directions; inverse: 1/r.
        weight, d_weight: (pairs,) w(r) and its slope.
        interval, offset: (pairs,) interval of the radial table and place in it, in [0, 1].
        slots: (environments,) place of the species of the centre.
        widest: largest number of pairs of one environment.
    """

    order: np.ndarray
    starts: np.ndarray
    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    inverse: np.ndarray
    weight: np.ndarray
    d_weight: np.ndarray
    interval: np.ndarray
    offset: np.ndarray
    slots: np.ndarray
    widest: int


class BasisTables(NamedTuple):
    """Radial functions and products of channels.

    Attributes:
        table: quintic polynomials by interval, power (highest first), l and n, in one row; n filled up with zeros to whole lanes.
        per_step: intervals per A.
        zero, one: in the floating type of the pairs.
        prefactors: (features,) of the products, as in power_spectrum.py.
        center: (n_max,) density of the central atom at l = 0.
        angular: numbers of the harmonics by l and m in one row, see `angular`.
        n_max, l_max, n_species: sizes.
    """

    table: np.ndarray
    per_step: float
    zero: float
    one: float
    prefactors: np.ndarray
    center: np.ndarray
    angular: np.ndarray
    n_max: int
    l_max: int
    n_species: int


def row_length(n_max: int, n_species: int) -> int:
    """Length of the rows of densities: channels, and room for the lanes of the last species."""
    return round_up.py_func((n_species - 1) * n_max + round_up.py_func(n_max))


@njit(**FLAGS)
def _values(pairs, basis, first, count, out):
    """out[pair, l, n] = w I_nl of `count` pairs from `first` on."""
    table, size = basis.table, (basis.l_max + 1) * round_up(basis.n_max)
    for p in range(count):
        at, t, w = (
            pairs.interval[first + p] * POWERS * size,
            load_all(pairs.offset, first + p),
            load_all(pairs.weight, first + p),
        )
        for k in range(0, size, LANES):
            c = at + k
            v = load(table, c) * t + load(table, c + size)
            for power in range(2, POWERS):
                v = v * t + load(table, c + power * size)
            store(out, p * size + k, v * w)


@njit(**FLAGS)
def _harmonics(pairs, basis, first, count, width, out):
    """out[lm, pair] = Y_lm of `count` pairs from `first` on."""
    degrees = basis.l_max + 1
    for p in range(0, count, LANES):
        x, y, z = load(pairs.x, first + p), load(pairs.y, first + p), load(pairs.z, first + p)
        re, im = fill(basis.one), fill(basis.zero)
        for m in range(degrees):
            if m:
                re, im = x * re - y * im, x * im + y * re
            q, before = load_all(basis.angular, 2 * (m * degrees + m)), fill(basis.zero)
            for l in range(m, degrees):
                if l > m:
                    k = 2 * (l * degrees + m)
                    q, before = (load_all(basis.angular, k) * z) * q + load_all(basis.angular, k + 1) * before, q
                if m:
                    store(out, (l * l + l - m) * width + p, q * im)
                store(out, (l * l + l + m) * width + p, q * re)


@njit(cache=True, **FLAGS)
def expand_features(lo, hi, pairs, basis, tiny, c_row, density, features, norms):
    """Of environments lo to hi: `density` (environments, lm, c_row) in one row, features and norms."""
    degrees, n, species, like = basis.l_max + 1, basis.n_max, basis.n_species, basis.table.dtype
    size, width, channels = degrees * round_up(n), round_up(pairs.widest), n * species
    radial, y = np.empty(pairs.widest * size, like), np.empty(degrees**2 * width, like)
    c, gram = np.zeros(degrees**2 * c_row, like), np.empty(degrees * channels * round_up(channels), like)
    for e in range(lo, hi):
        first = pairs.starts[e * species]
        count = pairs.starts[(e + 1) * species] - first
        _values(pairs, basis, first, count, radial)
        _harmonics(pairs, basis, first, count, width, y)
        # the last lanes of a species reach into the next, with zeros: before that is made
        for s in range(species):
            begin, end = pairs.starts[e * species + s] - first, pairs.starts[e * species + s + 1] - first
            for l in range(degrees):
                multiply_matrices(2 * l + 1, round_up(n), end - begin, y, l * l * width + begin, width, 1,
                        radial, begin * size + l * round_up(n), size, c, l * l * c_row + s * n, c_row)  # fmt: skip
        for k in range(n):
            c[pairs.slots[e] * n + k] += basis.center[k]
        for k in range(len(c)):
            density[e * len(c) + k] = c[k]
        norms[e] = max(tiny, _spectrum(basis, c, c_row, gram, features[e]))
        inverse = basis.one / norms[e]
        for k in range(features.shape[1]):
            features[e, k] *= inverse


@njit(**FLAGS)
def _spectrum(basis, c, c_row, gram, spectrum):
    """p_ab,l of one environment; returns its norm. `gram` (l, a, b) holds Σ_m c_lma c_lmb, for b from the lanes of a on."""
    channels, degrees = basis.n_max * basis.n_species, basis.l_max + 1
    g_row = round_up(channels)
    for l in range(degrees):
        for a in range(0, channels, 4):
            multiply_matrices(min(4, channels - a), g_row - a, 2 * l + 1, c, l * l * c_row + a, 1, c_row,
                    c, l * l * c_row + a, c_row, gram, (l * channels + a) * g_row + a, g_row)  # fmt: skip
    k, square = 0, basis.zero
    for a in range(channels):
        for b in range(a, channels):
            for l in range(degrees):
                spectrum[k] = gram[(l * channels + a) * g_row + b] * basis.prefactors[k]
                k += 1
    for k in range(len(spectrum)):
        square += spectrum[k] * spectrum[k]
    return np.sqrt(square)


@njit(cache=True, **FLAGS)
def pull_back(lo, hi, pairs, basis, c_row, density, features, norms, cotangents, out):
    """Pair gradients (pairs, 3) of environments lo to hi from cotangents of their features."""
    degrees, n, species, like = basis.l_max + 1, basis.n_max, basis.n_species, basis.table.dtype
    channels, full = n * species, round_up(n)
    g_row = round_up(channels)
    on_gram, on_density = np.zeros(degrees * channels * g_row, like), np.empty(degrees**2 * g_row, like)
    radial, mixed = np.empty(degrees * full * 2 * LANES, like), np.empty(degrees**2 * 2 * LANES, like)
    made = np.empty(3 * LANES, like)
    for e in range(lo, hi):
        _to_density(basis, density, e, c_row, features[e], norms[e], cotangents[e], on_gram, on_density)
        for s in range(species):
            begin, end = pairs.starts[e * species + s], pairs.starts[e * species + s + 1]
            for p in range(begin, end, LANES):
                _slopes(pairs, basis, p, end - 1, radial)
                for l in range(degrees):
                    multiply_matrices(2 * l + 1, 2 * LANES, n, on_density, l * l * g_row + s * n, g_row, 1,
                            radial, l * full * 2 * LANES, 2 * LANES, mixed, l * l * 2 * LANES, 2 * LANES)  # fmt: skip
                _to_pairs(pairs, basis, p, mixed, made)
                for i in range(min(LANES, end - p)):
                    for k in range(3):
                        out[pairs.order[p + i], k] = made[k * LANES + i]


@njit(**FLAGS)
def _to_density(basis, density, e, c_row, x, norm, cotangent, on_gram, out):
    """dE/dc (lm, channels) of environment e from dE/dx, by way of dE/dp = (dE/dx - x (x . dE/dx)) / |p|."""
    channels, degrees, along = basis.n_max * basis.n_species, basis.l_max + 1, basis.zero
    g_row = round_up(channels)
    for k in range(len(x)):
        along += x[k] * cotangent[k]
    inverse, k = basis.one / norm, 0
    for a in range(channels):
        for b in range(a, channels):
            for l in range(degrees):
                g = (cotangent[k] - x[k] * along) * inverse * basis.prefactors[k]
                here = l * channels * g_row
                on_gram[here + a * g_row + b] = g if a != b else g + g
                on_gram[here + b * g_row + a] = g if a != b else g + g
                k += 1
    for l in range(degrees):
        multiply_matrices(2 * l + 1, g_row, channels, density, (e * degrees**2 + l * l) * c_row, c_row, 1,
                on_gram, l * channels * g_row, g_row, out, l * l * g_row, g_row)  # fmt: skip


@njit(**FLAGS)
def _slopes(pairs, basis, first, last, out):
    """out[l, n, 2 pair lanes] = w I_nl and d(w I_nl)/dr of the pairs `first` and following, up to `last`."""
    size = (basis.l_max + 1) * round_up(basis.n_max)
    i, j, k, h = first, min(first + 1, last), min(first + 2, last), min(first + 3, last)
    for at in range(0, size, LANES):
        v0, s0 = _value_and_slope(pairs, basis, i, size, at)
        v1, s1 = _value_and_slope(pairs, basis, j, size, at)
        v2, s2 = _value_and_slope(pairs, basis, k, size, at)
        v3, s3 = _value_and_slope(pairs, basis, h, size, at)
        v0, v1, v2, v3 = transpose_lanes(v0, v1, v2, v3)
        s0, s1, s2, s3 = transpose_lanes(s0, s1, s2, s3)
        here = at * 2 * LANES
        store(out, here, v0)
        store(out, here + LANES, s0)
        store(out, here + 2 * LANES, v1)
        store(out, here + 3 * LANES, s1)
        store(out, here + 4 * LANES, v2)
        store(out, here + 5 * LANES, s2)
        store(out, here + 6 * LANES, v3)
        store(out, here + 7 * LANES, s3)


@njit(forceinline=True, **FLAGS)
def _value_and_slope(pairs, basis, pair, size, at):
    """w I_nl and its slope of one pair, for LANES of n from `at` on."""
    table, c, t = basis.table, pairs.interval[pair] * POWERS * size + at, load_all(pairs.offset, pair)
    slope = load(table, c)
    value = slope * t + load(table, c + size)
    for power in range(2, POWERS):
        slope = slope * t + value
        value = value * t + load(table, c + power * size)
    w = load_all(pairs.weight, pair)
    return value * w, slope * (w * fill(basis.per_step)) + value * load_all(pairs.d_weight, pair)


@njit(**FLAGS)
def _to_pairs(pairs, basis, first, mixed, out):
    """out[xyz, pair lanes] = dE/dr of the pairs `first` and following.

    `mixed` (lm, 2 pair lanes) is Σ_n dE/dc_lmn of I_nl and of I'_nl; Y is a polynomial in x, y, z, whose gradient goes beyond the sphere.
    """
    degrees, zero = basis.l_max + 1, fill(basis.zero)
    x, y, z, inverse = load(pairs.x, first), load(pairs.y, first), load(pairs.z, first), load(pairs.inverse, first)
    on_x, on_y, on_z, on_r = zero, zero, zero, zero
    re, im, re_before, im_before, order = fill(basis.one), zero, zero, zero, zero
    for m in range(degrees):
        if m:
            re, im, re_before, im_before = x * re - y * im, x * im + y * re, re, im
            order = order + fill(basis.one)
        q, q_before, d, d_before = load_all(basis.angular, 2 * (m * degrees + m)), zero, zero, zero
        re_q, re_d, re_r, im_q, im_d, im_r = zero, zero, zero, zero, zero, zero
        for l in range(m, degrees):
            if l > m:
                k = 2 * (l * degrees + m)
                a, b = load_all(basis.angular, k), load_all(basis.angular, k + 1)
                az = a * z
                d, d_before = az * d + (a * q + b * d_before), d
                q, q_before = az * q + b * q_before, q
            plus, minus = (
                (l * l + l + m) * 2 * LANES,
                (l * l + l - m) * 2 * LANES,
            )  # the same for m = 0, where im is zero
            of_re, of_im = load(mixed, plus), load(mixed, minus)
            re_q, re_d, re_r = re_q + q * of_re, re_d + d * of_re, re_r + q * load(mixed, plus + LANES)
            im_q, im_d, im_r = im_q + q * of_im, im_d + d * of_im, im_r + q * load(mixed, minus + LANES)
        on_r = on_r + re * re_r + im * im_r
        on_z = on_z + re * re_d + im * im_d
        # d(x + iy)^m = m (x + iy)^(m-1) (dx + i dy)
        on_x = on_x + order * (re_before * re_q + im_before * im_q)
        on_y = on_y + order * (re_before * im_q - im_before * re_q)
    radial = on_r - inverse * (on_x * x + on_y * y + on_z * z)  # only what is across the pair turns it
    store(out, 0, inverse * on_x + radial * x)
    store(out, LANES, inverse * on_y + radial * y)
    store(out, 2 * LANES, inverse * on_z + radial * z)


class CutoffParameters(NamedTuple):
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
    return SortedPairs(order, starts, x, y, z, inverses, weight, d_weight, interval, offset, slots, widest), all_known


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
