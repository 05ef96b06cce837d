"""Jacobians of the power spectrum, by compiled loops over the pairs of an environment, with four angular momenta side by side.

See loops.py for what pairs and the basis hold, and lanes.py for what is done by fours.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from gpmlp.descriptors._cpu_kernels import _value_and_slope
from gpmlp.descriptors._simd import FLAGS, LANES, fill, load, load_all, round_up, store, transpose_lanes


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
    factors, unit = (
        np.zeros(len(basis.prefactors) // degrees * deep, like),
        np.zeros(len(basis.prefactors) // degrees * deep, like),
    )
    row, made = np.zeros(3 * width, like), np.zeros(3 * LANES, like)
    for e in range(lo, hi):
        _by_product(basis.prefactors, degrees, deep, basis.one / norms[e], factors)
        _by_product(features[e], degrees, deep, basis.one, unit)
        for s in range(species):
            first, last = pairs.starts[e * species + s], pairs.starts[e * species + s + 1]
            for p in range(first, last):
                if (p - first) % LANES == 0:
                    _harmonics(pairs, basis, p, y)
                _radial(pairs, basis, p, s * n * deep, deep, value, slope)
                _contract(density, e * degrees**2 * c_row, c_row, degrees, deep, y, (p - first) % LANES, inner)
                _products(basis, s, deep, c_row, width, pairs, p, value, slope, inner, factors, unit, row, made)
                _onto_sphere(row, width, made, features[e], out[pairs.order[p] - base])
            value[s * n * deep : (s + 1) * n * deep], slope[s * n * deep : (s + 1) * n * deep] = basis.zero, basis.zero


@njit(**FLAGS)
def _by_product(given, degrees, deep, scale, out):
    """Numbers of each feature, by product of channels with l filled up to whole lanes, times a scale."""
    for product in range(len(given) // degrees):
        for l in range(degrees):
            out[product * deep + l] = given[product * degrees + l] * scale


@njit(**FLAGS)
def _harmonics(pairs, basis, first, out):
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
        q, q_before, d, d_before = load_all(basis.angular, 2 * (m * degrees + m)), zero, zero, zero
        for l in range(m, degrees):
            if l > m:
                k = 2 * (l * degrees + m)
                a, b = load_all(basis.angular, k), load_all(basis.angular, k + 1)
                az = a * z
                d, d_before = az * d + (a * q + b * d_before), d
                q, q_before = az * q + b * q_before, q
            # d(x + iy)^m = m (x + iy)^(m-1) (dx + i dy)
            slope = order * q
            if m:
                _put(
                    out, degrees, l * l + l - m, inverse, x, y, z, q * im, slope * im_before, slope * re_before, d * im
                )
            _put(
                out,
                degrees,
                l * l + l + m,
                inverse,
                x,
                y,
                z,
                q * re,
                slope * re_before,
                zero - slope * im_before,
                d * re,
            )


@njit(forceinline=True, **FLAGS)
def _put(out, degrees, at, inverse, x, y, z, value, on_x, on_y, on_z):
    """A harmonic, and the part of its gradient across the pair."""
    along, each = on_x * x + on_y * y + on_z * z, degrees * degrees * LANES
    store(out, at * LANES, value)
    store(out, at * LANES + each, inverse * (on_x - along * x))
    store(out, at * LANES + 2 * each, inverse * (on_y - along * y))
    store(out, at * LANES + 3 * each, inverse * (on_z - along * z))


@njit(**FLAGS)
def _radial(pairs, basis, pair, at, deep, value, slope):
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
            _store_turned(value, at + n * deep + l, deep, v0, v1, v2, v3)
            _store_turned(slope, at + n * deep + l, deep, s0, s1, s2, s3)


@njit(forceinline=True, **FLAGS)
def _store_turned(out, at, step, a, b, c, d):
    """The columns of four lanes, each `step` behind the one before."""
    a, b, c, d = transpose_lanes(a, b, c, d)
    store(out, at, a)
    store(out, at + step, b)
    store(out, at + 2 * step, c)
    store(out, at + 3 * step, d)


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
                _store_turned(out, (k * c_row + channel) * deep + l, deep, v0, v1, v2, v3)


@njit(forceinline=True, **FLAGS)
def _of_degree(density, at, c_row, l, y, lane):
    total = fill(density.dtype.type(0))
    for lm in range(l * l, (l + 1) * (l + 1)):
        total = total + load_all(y, lm * LANES + lane) * load(density, at + lm * c_row)
    return total


@njit(**FLAGS)
def _products(basis, species, deep, c_row, width, pairs, pair, value, slope, inner, factors, unit, row, along):
    """row[xyz, feature] = dp/dr / |p| of one neighbour, and the lanes of along[xyz] its parts of x . dp/dr / |p|.

    Lanes behind the last l of a product reach into the next: the first ones, l = 0 and following, are made last.
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
