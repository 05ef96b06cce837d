"""Compiled kernels of the power spectrum and its derivatives: one environment at a time, four numbers side by side (_simd).

Expansion, spectrum and their slopes are products of small matrices, for each angular momentum and species. Radial integrals and
harmonics of a pair are cheaper to compute again than to fetch, so nothing of a pair is stored; what an environment needs stays in cache.
Only cpu.py imports this, when it has work: numba takes half a second to import. Machine code is cached on disk. Equations are those
of soap.py, whose PyTorch path is the reference. Results are reproducible to the last bit for a given text of these functions: LLVM may
reorder sums, so that even a shared subexpression changes last digits.
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
        prefactors: (features,) of the products, as in soap.py.
        center: (n_max,) density of the central atom at l = 0.
        recurrence: spherical_harmonics.recurrence_coefficients in one row.
        n_max, l_max, n_species: sizes.
    """

    table: np.ndarray
    per_step: float
    zero: float
    one: float
    prefactors: np.ndarray
    center: np.ndarray
    recurrence: np.ndarray
    n_max: int
    l_max: int
    n_species: int


def row_length(n_max: int, n_species: int) -> int:
    """Length of the rows of densities: channels, and room for the lanes of the last species."""
    return round_up.py_func((n_species - 1) * n_max + round_up.py_func(n_max))


@njit(forceinline=True, **FLAGS)
def _splines(table, at, size, t):
    """LANES quintics of one interval, and their slopes, by Horner's rule; `size` numbers lie between two powers."""
    slope = load(table, at)
    value = slope * t + load(table, at + size)
    for power in range(2, POWERS):
        slope = slope * t + value
        value = value * t + load(table, at + power * size)
    return value, slope


@njit(**FLAGS)
def _radial_values(pairs, basis, first, count, out):
    """out[pair, l, n] = w I_nl of `count` pairs from `first` on."""
    size = (basis.l_max + 1) * round_up(basis.n_max)
    for p in range(count):
        at, t = pairs.interval[first + p] * POWERS * size, load_all(pairs.offset, first + p)
        w = load_all(pairs.weight, first + p)
        for k in range(0, size, LANES):
            value, _ = _splines(basis.table, at + k, size, t)
            store(out, p * size + k, value * w)


@njit(forceinline=True, **FLAGS)
def _value_and_slope(pairs, basis, pair, size, at):
    """w I_nl and its slope of one pair, for LANES of n from `at` on."""
    value, slope = _splines(basis.table, pairs.interval[pair] * POWERS * size + at, size, load_all(pairs.offset, pair))
    w = load_all(pairs.weight, pair)
    return value * w, slope * (w * fill(basis.per_step)) + value * load_all(pairs.d_weight, pair)


@njit(forceinline=True, **FLAGS)
def _next_degree(basis, l, m, z, q, q_before, d, d_before):
    """Q_lm and dQ_lm/dz from those of the two degrees below, each with that of the degree below."""
    k = 2 * (l * (basis.l_max + 1) + m)
    a, b = load_all(basis.recurrence, k), load_all(basis.recurrence, k + 1)
    az = a * z
    return az * q + b * q_before, q, az * d + (a * q + b * d_before), d


@njit(**FLAGS)
def _harmonics(pairs, basis, first, count, width, out):
    """out[lm, pair] = Y_lm of `count` pairs from `first` on."""
    degrees, zero = basis.l_max + 1, fill(basis.zero)
    for p in range(0, count, LANES):
        x, y, z = load(pairs.x, first + p), load(pairs.y, first + p), load(pairs.z, first + p)
        re, im = fill(basis.one), zero
        for m in range(degrees):
            if m:
                re, im = x * re - y * im, x * im + y * re
            q, before = load_all(basis.recurrence, 2 * (m * degrees + m)), zero
            for l in range(m, degrees):
                if l > m:
                    k = 2 * (l * degrees + m)
                    q, before = (load_all(basis.recurrence, k) * z) * q + load_all(basis.recurrence, k + 1) * before, q
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
        _radial_values(pairs, basis, first, count, radial)
        _harmonics(pairs, basis, first, count, width, y)
        # the last lanes of a species reach into the next, with zeros, and so come before it
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
    sums = np.empty(3 * LANES, like)
    for e in range(lo, hi):
        _to_density(basis, density, e, c_row, features[e], norms[e], cotangents[e], on_gram, on_density)
        for s in range(species):
            begin, end = pairs.starts[e * species + s], pairs.starts[e * species + s + 1]
            for p in range(begin, end, LANES):
                _radial_slopes(pairs, basis, p, end - 1, radial)
                for l in range(degrees):
                    multiply_matrices(2 * l + 1, 2 * LANES, n, on_density, l * l * g_row + s * n, g_row, 1,
                            radial, l * full * 2 * LANES, 2 * LANES, mixed, l * l * 2 * LANES, 2 * LANES)  # fmt: skip
                _to_pairs(pairs, basis, p, mixed, sums)
                for i in range(min(LANES, end - p)):
                    for k in range(3):
                        out[pairs.order[p + i], k] = sums[k * LANES + i]


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
def _radial_slopes(pairs, basis, first, last, out):
    """out[l, n, 2 pair lanes] = w I_nl and d(w I_nl)/dr of the pairs `first` and following, up to `last`."""
    size = (basis.l_max + 1) * round_up(basis.n_max)
    second, third, fourth = min(first + 1, last), min(first + 2, last), min(first + 3, last)
    for at in range(0, size, LANES):
        v0, s0 = _value_and_slope(pairs, basis, first, size, at)
        v1, s1 = _value_and_slope(pairs, basis, second, size, at)
        v2, s2 = _value_and_slope(pairs, basis, third, size, at)
        v3, s3 = _value_and_slope(pairs, basis, fourth, size, at)
        _store_columns(out, at * 2 * LANES, 2 * LANES, v0, v1, v2, v3)
        _store_columns(out, at * 2 * LANES + LANES, 2 * LANES, s0, s1, s2, s3)


@njit(forceinline=True, **FLAGS)
def _store_columns(out, at, step, a, b, c, d):
    """The columns of four lanes, each `step` behind the one before."""
    a, b, c, d = transpose_lanes(a, b, c, d)
    store(out, at, a)
    store(out, at + step, b)
    store(out, at + 2 * step, c)
    store(out, at + 3 * step, d)


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
        q, q_before, d, d_before = load_all(basis.recurrence, 2 * (m * degrees + m)), zero, zero, zero
        re_q, re_d, re_r, im_q, im_d, im_r = zero, zero, zero, zero, zero, zero
        for l in range(m, degrees):
            if l > m:
                q, q_before, d, d_before = _next_degree(basis, l, m, z, q, q_before, d, d_before)
            # the same for m = 0, where im is zero
            plus, minus = (l * l + l + m) * 2 * LANES, (l * l + l - m) * 2 * LANES
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


@njit(cache=True, **FLAGS)
def feature_jacobian(lo, hi, base, pairs, basis, c_row, density, features, norms, out):
    """out[pair - base, xyz, feature] = d(features)/dr of the pairs of environments lo to hi.

    With A_bl = Σ_m Y_lm c_blm and B_bl = Σ_m dY_lm c_blm the derivative of the product (a, b) is
    [R'_a A_b + R'_b A_a] r^ + R_a B_b + R_b B_a, where R_a is zero unless a is of the neighbour's species.
    """
    degrees, n, species, like = basis.l_max + 1, basis.n_max, basis.n_species, basis.table.dtype
    deep, channels, width = round_up(degrees), n * species, features.shape[1] + LANES
    # by channel and l, filled up to whole lanes; channels of other species stay zero
    value, slope = np.zeros((channels + LANES) * deep, like), np.zeros((channels + LANES) * deep, like)
    inner, y = np.zeros(4 * c_row * deep, like), np.zeros(4 * degrees**2 * LANES, like)
    products = len(basis.prefactors) // degrees
    factors, unit = np.zeros(products * deep, like), np.zeros(products * deep, like)
    row, sums = np.zeros(3 * width, like), np.zeros(3 * LANES, like)
    for e in range(lo, hi):
        _by_product(basis.prefactors, degrees, deep, basis.one / norms[e], factors)
        _by_product(features[e], degrees, deep, basis.one, unit)
        for s in range(species):
            first, last = pairs.starts[e * species + s], pairs.starts[e * species + s + 1]
            for p in range(first, last):
                if (p - first) % LANES == 0:
                    _harmonics_with_gradients(pairs, basis, p, y)
                _radial_columns(pairs, basis, p, s * n * deep, deep, value, slope)
                _contract(density, e * degrees**2 * c_row, c_row, degrees, deep, y, (p - first) % LANES, inner)
                _products(basis, s, deep, c_row, width, pairs, p, value, slope, inner, factors, unit, row, sums)
                _onto_sphere(row, width, sums, features[e], out[pairs.order[p] - base])
            value[s * n * deep : (s + 1) * n * deep], slope[s * n * deep : (s + 1) * n * deep] = basis.zero, basis.zero


@njit(**FLAGS)
def _by_product(given, degrees, deep, scale, out):
    """Numbers of each feature, by product of channels with l filled up to whole lanes, times a scale."""
    for product in range(len(given) // degrees):
        for l in range(degrees):
            out[product * deep + l] = given[product * degrees + l] * scale


@njit(**FLAGS)
def _harmonics_with_gradients(pairs, basis, first, out):
    """out[0, lm, pair lanes] = Y_lm and out[1 + xyz, lm, pair lanes] = dY_lm/dr of the pairs `first` and following.

    Y is a polynomial in x, y, z, whose gradient goes beyond the sphere: only what is across the pair turns it.
    """
    degrees, zero = basis.l_max + 1, fill(basis.zero)
    x, y, z, inverse = load(pairs.x, first), load(pairs.y, first), load(pairs.z, first), load(pairs.inverse, first)
    re, im, re_before, im_before, order = fill(basis.one), zero, zero, zero, zero
    for m in range(degrees):
        if m:
            re, im, re_before, im_before = x * re - y * im, x * im + y * re, re, im
            order = order + fill(basis.one)
        q, q_before, d, d_before = load_all(basis.recurrence, 2 * (m * degrees + m)), zero, zero, zero
        for l in range(m, degrees):
            if l > m:
                q, q_before, d, d_before = _next_degree(basis, l, m, z, q, q_before, d, d_before)
            # d(x + iy)^m = m (x + iy)^(m-1) (dx + i dy)
            slope = order * q
            at = l * l + l
            if m:
                _put(out, degrees, at - m, inverse, x, y, z, q * im, slope * im_before, slope * re_before, d * im)
            _put(out, degrees, at + m, inverse, x, y, z, q * re, slope * re_before, zero - slope * im_before, d * re)


@njit(forceinline=True, **FLAGS)
def _put(out, degrees, at, inverse, x, y, z, value, on_x, on_y, on_z):
    """A harmonic, and the part of its gradient across the pair."""
    along, each = on_x * x + on_y * y + on_z * z, degrees * degrees * LANES
    store(out, at * LANES, value)
    store(out, at * LANES + each, inverse * (on_x - along * x))
    store(out, at * LANES + 2 * each, inverse * (on_y - along * y))
    store(out, at * LANES + 3 * each, inverse * (on_z - along * z))


@njit(**FLAGS)
def _radial_columns(pairs, basis, pair, at, deep, value, slope):
    """value[at + n l] = w I_nl and slope[at + n l] = d(w I_nl)/dr of one pair."""
    row, last = round_up(basis.n_max), basis.l_max
    size = (last + 1) * row
    for l in range(0, last + 1, LANES):
        second, third, fourth = min(l + 1, last), min(l + 2, last), min(l + 3, last)
        for n in range(0, row, LANES):
            v0, s0 = _value_and_slope(pairs, basis, pair, size, l * row + n)
            v1, s1 = _value_and_slope(pairs, basis, pair, size, second * row + n)
            v2, s2 = _value_and_slope(pairs, basis, pair, size, third * row + n)
            v3, s3 = _value_and_slope(pairs, basis, pair, size, fourth * row + n)
            _store_columns(value, at + n * deep + l, deep, v0, v1, v2, v3)
            _store_columns(slope, at + n * deep + l, deep, s0, s1, s2, s3)


@njit(**FLAGS)
def _contract(density, start, c_row, degrees, deep, y, lane, out):
    """out[k, channel, l] = Σ_m y[k, lm, lane] c[lm, channel], for Y and the three parts of its gradient."""
    last, each = degrees - 1, degrees**2 * LANES
    for k in range(4):
        for l in range(0, degrees, LANES):
            second, third, fourth = min(l + 1, last), min(l + 2, last), min(l + 3, last)
            for channel in range(0, c_row, LANES):
                at = start + channel
                v0 = _of_degree(density, at, c_row, l, y, k * each + lane)
                v1 = _of_degree(density, at, c_row, second, y, k * each + lane)
                v2 = _of_degree(density, at, c_row, third, y, k * each + lane)
                v3 = _of_degree(density, at, c_row, fourth, y, k * each + lane)
                _store_columns(out, (k * c_row + channel) * deep + l, deep, v0, v1, v2, v3)


@njit(forceinline=True, **FLAGS)
def _of_degree(density, at, c_row, l, y, lane):
    total = fill(density.dtype.type(0))
    for lm in range(l * l, (l + 1) * (l + 1)):
        total = total + load_all(y, lm * LANES + lane) * load(density, at + lm * c_row)
    return total


@njit(**FLAGS)
def _products(basis, species, deep, c_row, width, pairs, pair, value, slope, inner, factors, unit, row, along):
    """row[xyz, feature] = dp/dr / |p| of one neighbour, and the lanes of along[xyz] its parts of x . dp/dr / |p|.

    Lanes behind the last l of a product reach into the next: the first ones, l = 0 and following, are computed last.
    """
    n, channels, degrees, each = basis.n_max, basis.n_max * basis.n_species, basis.l_max + 1, c_row * deep
    x, y, z, zero = load_all(pairs.x, pair), load_all(pairs.y, pair), load_all(pairs.z, pair), fill(basis.zero)
    on_x, on_y, on_z = zero, zero, zero
    for back in range(LANES, deep + 1, LANES):
        l, k = deep - back, 0
        for a in range(channels):
            at = a * deep + l
            ra, da, ya = load(value, at), load(slope, at), load(inner, at)
            xa, ua, za = load(inner, at + each), load(inner, at + 2 * each), load(inner, at + 3 * each)
            for b in range(a, channels):
                to, at = k * degrees + l, b * deep + l
                if a // n == species or b // n == species:
                    rb, f, u = load(value, at), load(factors, k * deep + l), load(unit, k * deep + l)
                    across = da * load(inner, at) + load(slope, at) * ya
                    gx = f * (ra * load(inner, at + each) + rb * xa + across * x)
                    gy = f * (ra * load(inner, at + 2 * each) + rb * ua + across * y)
                    gz = f * (ra * load(inner, at + 3 * each) + rb * za + across * z)
                    on_x, on_y, on_z = on_x + u * gx, on_y + u * gy, on_z + u * gz
                else:
                    gx = gy = gz = zero
                store(row, to, gx)
                store(row, to + width, gy)
                store(row, to + 2 * width, gz)
                k += 1
    store(along, 0, on_x)
    store(along, LANES, on_y)
    store(along, 2 * LANES, on_z)


@njit(**FLAGS)
def _onto_sphere(row, width, along, x, out):
    """x = p/|p|:  dx = (dp - x (x . dp)) / |p|."""
    count = len(x)
    for k in range(3):
        share = along[k * LANES] + along[k * LANES + 1] + along[k * LANES + 2] + along[k * LANES + 3]
        here, there = row[k * width : k * width + count], out[k]
        for i in range(count):
            there[i] = here[i] - x[i] * share


class CutoffParameters(NamedTuple):
    """The weights of neighbours as plain numbers; `function` is the place of its name in radial.CUTOFF_FUNCTIONS."""

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
def lay_out(vectors, centers, species, of_centers, slot_table, cut, per_step, n_intervals):
    """Pairs from vectors, of neighbours and centres of these species, by their index in `slot_table` (largest Z + 1,) or -1.

    Returns:
        the pairs, and whether every species has an index.
    """
    n, n_environments, n_species, like = len(centers), len(of_centers), slot_table.max() + 1, vectors.dtype
    starts, slots = np.zeros(n_environments * n_species + 1, np.int64), np.empty(n_environments, np.int64)
    order, interval = np.empty(n, np.int64), np.empty(n, np.int64)
    directions = np.ones((4, n + LANES), like)  # lanes of the last pairs reach beyond them
    x, y, z, inverses = directions[0], directions[1], directions[2], directions[3]
    weight, d_weight, offset = np.empty(n, like), np.empty(n, like), np.empty(n, like)
    widest, all_known = np.int64(0), True
    for e in range(n_environments):
        slots[e] = _place(slot_table, of_centers[e])
        all_known &= slots[e] >= 0
    for p in range(n):
        slot = _place(slot_table, species[p])
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
        group = centers[p] * n_species + max(_place(slot_table, species[p]), 0)
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
def _place(slot_table, species):
    return slot_table[species] if species < len(slot_table) else -1


@njit(**FLAGS)
def _power(x, exponent):
    """x^exponent, by multiplications where that is a small whole number."""
    if exponent != np.floor(exponent) or not 0 <= exponent <= 12:
        return x**exponent
    out = 1.0
    for _ in range(np.int64(exponent)):
        out *= x
    return out
