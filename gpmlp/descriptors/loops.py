"""Loops are the compiled kernels of the power spectrum: one environment at a time, its pairs side by side.

Neighbours of an environment are worked on together, those of each species in turn: every inner loop runs over pairs, in memory that
stays in cache. Radial integrals and harmonics of a pair are cheaper to make again than to fetch, so nothing of a pair is kept.
Loops are short and write to one place each: more of them, and the compiler would not prove that they may be done by vectors.
Only fused.py, layout.py and jacobians.py import this: numba takes half a second to import. Machine code is cached on disk.
Equations are those of power_spectrum.py, whose PyTorch path is the reference.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

# sums may be reordered and products fused; NaN and infinity mean what they mean
FLAGS = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}


WIDTH = 16  # loops over pairs go by whole multiples of this


def angular(l_max: int) -> np.ndarray:
    """(l_max + 1, l_max + 1, 4) numbers that harmonics are made of, by l and m (0 <= m <= l).

    Y_lm = Q_lm(z) Re (x + iy)^m and Y_l-m = Q_lm(z) Im (x + iy)^m, times √2 for m > 0, on the unit sphere, with polynomials
    Q_lm = a_lm z Q_l-1,m + b_lm Q_l-2,m, whose slopes are Q'_lm = d_lm Q_l,m+1 (Bigi et al., J. Chem. Phys. 159, 064802 (2023)).
    Entries: a, b, -, d of l > m; for l = m: √2 or 1, m, Q_mm, 0.
    """
    out = np.zeros((l_max + 1, l_max + 1, 4))
    start = (4 * np.pi) ** -0.5
    for m in range(l_max + 1):
        if m:
            start *= ((2 * m + 1) / (2 * m)) ** 0.5
        out[m, m] = (2**0.5 if m else 1.0, m, start, 0.0)
        for l in range(m + 1, l_max + 1):
            a = ((4 * l * l - 1) / (l * l - m * m)) ** 0.5
            b = -a * (((l - 1) ** 2 - m * m) / (4 * (l - 1) ** 2 - 1)) ** 0.5
            out[l, m] = a, b, 0.0, ((l - m) * (l + m + 1)) ** 0.5
    return out


class Pairs(NamedTuple):
    """Pairs of surroundings, all of one floating type.

    Attributes:
        order: (pairs,) pair indices sorted by environment, then by species of the neighbour.
        starts: (environments * species + 1,) where each environment and species begins in `order`.
        units: (pairs, 3) directions.
        inverse: (pairs,) 1/r.
        weight, d_weight: (pairs,) w(r) and its slope.
        interval, offset: (pairs,) interval of the radial table and place in it, in [0, 1].
        widest: largest number of pairs of one environment and species.
    """

    order: np.ndarray
    starts: np.ndarray
    units: np.ndarray
    inverse: np.ndarray
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
        angular: (l_max + 1, l_max + 1, 4) numbers of the harmonics, by l and m, see `angular`.
        n_max, l_max, n_species: sizes.
    """

    table: np.ndarray
    per_step: float
    numbers: np.ndarray
    prefactors: np.ndarray
    center: np.ndarray
    angular: np.ndarray
    n_max: int
    l_max: int
    n_species: int


@njit(**FLAGS)
def padded(count):
    """Pairs worked on together: as many as fill whole vectors, unrolled, so that no loop ends one by one."""
    return (count + WIDTH - 1) // WIDTH * WIDTH


@njit(**FLAGS)
def values(pairs, basis, first, count, at, radial):
    """radial[nl, at + pair] = w I_nl of `count` pairs from `first` on."""
    for p in range(count):
        j = pairs.order[first + p]
        t, w = pairs.offset[j], pairs.weight[j]
        c = basis.table[pairs.interval[j]]
        for k in range(c.shape[1]):
            value = ((((c[0, k] * t + c[1, k]) * t + c[2, k]) * t + c[3, k]) * t + c[4, k]) * t + c[5, k]
            radial[k, at + p] = w * value


@njit(**FLAGS)
def _radial(pairs, basis, first, count, made, value, slope):
    """value[nl, pair] = w I_nl and slope[nl, pair] = d(w I_nl)/dr; `made` (2, pairs, nl) holds them before they are turned."""
    two, three, four, five = basis.numbers[2], basis.numbers[3], basis.numbers[4], basis.numbers[5]
    for p in range(count):
        j = pairs.order[first + p]
        t, w, step, d_weight = pairs.offset[j], pairs.weight[j], pairs.weight[j] * basis.per_step, pairs.d_weight[j]
        c = basis.table[pairs.interval[j]]
        v, s = made[0, p], made[1, p]
        for k in range(c.shape[1]):
            v[k] = ((((c[0, k] * t + c[1, k]) * t + c[2, k]) * t + c[3, k]) * t + c[4, k]) * t + c[5, k]
        for k in range(c.shape[1]):
            s[k] = (((five * c[0, k] * t + four * c[1, k]) * t + three * c[2, k]) * t + two * c[3, k]) * t + c[4, k]
        for k in range(c.shape[1]):
            s[k] = s[k] * step + v[k] * d_weight
        for k in range(c.shape[1]):
            v[k] *= w
    for k in range(made.shape[2]):
        for p in range(count):
            value[k, p] = made[0, p, k]
        for p in range(count):
            slope[k, p] = made[1, p, k]


@njit(**FLAGS)
def _directions(pairs, angular, l_max, first, count, whole, xyz, circle, q):
    """Of `count` pairs: xyz (3, pairs); circle[0 or 1, m] = Re or Im (x + iy)^m; q[l (l + 1) / 2 + m] = Q_lm."""
    for p in range(count):
        row = pairs.units[pairs.order[first + p]]
        for k in range(3):
            xyz[k, p] = row[k]
    x, y, z = xyz[0], xyz[1], xyz[2]
    for m in range(1, l_max + 1):
        re, im, re_before, im_before = circle[0, m], circle[1, m], circle[0, m - 1], circle[1, m - 1]
        for p in range(whole):
            re[p] = x[p] * re_before[p] - y[p] * im_before[p]
        for p in range(whole):
            im[p] = x[p] * im_before[p] + y[p] * re_before[p]
    for m in range(l_max):
        above, a = q[(m + 1) * (m + 2) // 2 + m], angular[m + 1, m, 0] * angular[m, m, 2]
        for p in range(whole):
            above[p] = a * z[p]
        for l in range(m + 2, l_max + 1):
            a, b = angular[l, m, 0], angular[l, m, 1]
            out, one, two = q[l * (l + 1) // 2 + m], q[l * (l - 1) // 2 + m], q[(l - 1) * (l - 2) // 2 + m]
            for p in range(whole):
                out[p] = a * z[p] * one[p] + b * two[p]


@njit(**FLAGS)
def _begun(angular, l_max, width):
    """Room for what `_directions` makes, with the numbers in it that are the same for all pairs."""
    degrees = l_max + 1
    xyz, circle = np.zeros((3, width), angular.dtype), np.zeros((2, degrees, width), angular.dtype)
    q = np.zeros((degrees * (degrees + 1) // 2 + 1, width), angular.dtype)
    circle[0, 0] = angular[0, 0, 0]
    for m in range(degrees):
        q[m * (m + 1) // 2 + m] = angular[m, m, 2]
    return xyz, circle, q


@njit(**FLAGS)
def _times(a, b, count, out):
    for p in range(count):
        out[p] = a[p] * b[p]


@njit(**FLAGS)
def _add(factor, a, b, count, out):
    for p in range(count):
        out[p] += factor * a[p] * b[p]


@njit(cache=True, **FLAGS)
def expand(lo, hi, pairs, basis, tiny, density, features, norms):
    """Environments lo to hi: add their neighbours to `density` (environments, lm, channels), then make features and norms."""
    degrees, like, l_max, none = basis.l_max + 1, basis.numbers, basis.l_max, np.int64(0)
    width, n_whole = padded(pairs.widest), (basis.n_max + 3) // 4 * 4
    radial = np.zeros((n_whole * degrees, width), like.dtype)
    xyz, circle, q = _begun(basis.angular, l_max, width)
    y, gram = np.zeros(width, like.dtype), np.empty((degrees, density.shape[2], density.shape[2]), like.dtype)
    for e in range(lo, hi):
        for s in range(basis.n_species):
            first = pairs.starts[e * basis.n_species + s]
            count = pairs.starts[e * basis.n_species + s + 1] - first
            if count == 0:
                continue
            whole = padded(count)
            values(pairs, basis, first, count, none, radial)
            radial[:, count:whole] = like[0]
            _directions(pairs, basis.angular, l_max, first, count, whole, xyz, circle, q)
            for l in range(degrees):
                for m in range(-l, l + 1):
                    _times(q[l * (l + 1) // 2 + abs(m)], circle[0 if m >= 0 else 1, abs(m)], whole, y)
                    c = density[e, l * l + l + m, s * basis.n_max : (s + 1) * basis.n_max]
                    _project(radial, y, l, degrees, whole, basis.angular[abs(m), abs(m), 0], c)
        norms[e] = max(tiny, _spectrum(basis, density[e], gram, features[e]))
        inverse = like[1] / norms[e]
        for k in range(features.shape[1]):
            features[e, k] *= inverse


@njit(**FLAGS)
def _project(radial, y, l, degrees, count, factor, c):
    """c[n] += factor Σ_p radial[nl, p] y[p], four n at a time."""
    for n in range(0, len(c), 4):
        r, s = radial[n * degrees + l], radial[(n + 1) * degrees + l]
        t, u = radial[(n + 2) * degrees + l], radial[(n + 3) * degrees + l]
        a = b = d = e = y[0] - y[0]
        for p in range(count):
            a += r[p] * y[p]
            b += s[p] * y[p]
            d += t[p] * y[p]
            e += u[p] * y[p]
        c[n] += factor * a
        if n + 1 < len(c):
            c[n + 1] += factor * b
        if n + 2 < len(c):
            c[n + 2] += factor * d
        if n + 3 < len(c):
            c[n + 3] += factor * e


@njit(**FLAGS)
def _spectrum(basis, c, gram, spectrum):
    """p_ab,l of one environment; returns its norm. `gram` (l, a, b) holds Σ_m c_lma c_lmb."""
    channels, degrees = c.shape[1], basis.l_max + 1
    for l in range(degrees):
        for lm in range(l * l, (l + 1) ** 2):
            row = c[lm]
            for a in range(channels):
                out, factor = gram[l, a], row[a]
                if lm == l * l:
                    for b in range(channels):
                        out[b] = factor * row[b]
                else:
                    for b in range(channels):
                        out[b] += factor * row[b]
    k, square = 0, basis.numbers[0]
    for a in range(channels):
        for b in range(a, channels):
            for l in range(degrees):
                spectrum[k] = gram[l, a, b] * basis.prefactors[k]
                square += spectrum[k] * spectrum[k]
                k += 1
    return np.sqrt(square)


@njit(cache=True, **FLAGS)
def pull_back(lo, hi, pairs, basis, density, features, norms, cotangents, out):
    """Pair gradients (pairs, 3) of environments lo to hi from cotangents of their features."""
    degrees, like, width = basis.l_max + 1, basis.numbers, padded(pairs.widest)
    n_whole, n_nl = (basis.n_max + 7) // 8 * 8, basis.n_max * degrees
    value, made = np.zeros((n_whole * degrees, width), like.dtype), np.zeros((2, width, n_nl), like.dtype)
    slope = np.zeros_like(value)
    xyz, circle, q = _begun(basis.angular, basis.l_max, width)
    on_gram = np.empty((degrees, density.shape[2], density.shape[2]), like.dtype)
    on_density, g = np.empty(density.shape[1:], like.dtype), np.zeros((degrees**2, n_whole), like.dtype)
    sums = np.zeros((8, width), like.dtype)
    for e in range(lo, hi):
        _to_density(basis, density[e], features[e], norms[e], cotangents[e], on_gram, on_density)
        for s in range(basis.n_species):
            first = pairs.starts[e * basis.n_species + s]
            count = pairs.starts[e * basis.n_species + s + 1] - first
            if count == 0:
                continue
            whole = padded(
                count
            )  # what stands behind the last pair is never read out, so it may be of another environment
            _radial(pairs, basis, first, count, made, value, slope)
            _directions(pairs, basis.angular, basis.l_max, first, count, whole, xyz, circle, q)
            for l in range(degrees):
                for m in range(-l, l + 1):
                    factor, here = basis.angular[abs(m), abs(m), 0], on_density[l * l + l + m]
                    for n in range(basis.n_max):
                        g[l * l + l + m, n] = factor * here[s * basis.n_max + n]
            _to_pairs(basis, g, whole, value, slope, circle, q, sums)
            for p in range(count):
                j = pairs.order[first + p]
                inverse, u = pairs.inverse[j], pairs.units[j]
                along = sums[0, p] * u[0] + sums[1, p] * u[1] + sums[2, p] * u[2]
                for x in range(3):  # only what is across the pair turns it
                    out[j, x] = inverse * (sums[x, p] - along * u[x]) + sums[3, p] * u[x]


@njit(**FLAGS)
def _to_density(basis, c, x, norm, cotangent, on_gram, out):
    """dE/dc of one environment from dE/dx, by way of dE/dp = (dE/dx - x (x . dE/dx)) / |p|."""
    channels, degrees, along = c.shape[1], basis.l_max + 1, basis.numbers[0]
    for k in range(len(x)):
        along += x[k] * cotangent[k]
    inverse, k = basis.numbers[1] / norm, 0
    for a in range(channels):
        for b in range(a, channels):
            for l in range(degrees):
                g = (cotangent[k] - x[k] * along) * inverse * basis.prefactors[k]
                on_gram[l, a, b] = g if a != b else g + g
                on_gram[l, b, a] = on_gram[l, a, b]
                k += 1
    for l in range(degrees):
        for lm in range(l * l, (l + 1) ** 2):
            here = out[lm]
            here[:] = basis.numbers[0]
            for a in range(channels):
                row, factor = on_gram[l, a], c[lm, a]
                for b in range(channels):
                    here[b] += factor * row[b]


@njit(**FLAGS)
def _mixed(g, l, degrees, count, rows, out):
    """out[p] = Σ_n g[n] rows[nl, p], eight n at a time."""
    for n in range(0, len(g), 8):
        g0, g1, g2, g3, g4, g5, g6, g7 = g[n], g[n + 1], g[n + 2], g[n + 3], g[n + 4], g[n + 5], g[n + 6], g[n + 7]
        k = n * degrees + l
        a, b, c, d = rows[k], rows[k + degrees], rows[k + 2 * degrees], rows[k + 3 * degrees]
        k += 4 * degrees
        e, f, h, i = rows[k], rows[k + degrees], rows[k + 2 * degrees], rows[k + 3 * degrees]
        if n == 0:
            for p in range(count):
                out[p] = g0 * a[p] + g1 * b[p] + g2 * c[p] + g3 * d[p] + g4 * e[p] + g5 * f[p] + g6 * h[p] + g7 * i[p]
        else:
            for p in range(count):
                out[p] += g0 * a[p] + g1 * b[p] + g2 * c[p] + g3 * d[p] + g4 * e[p] + g5 * f[p] + g6 * h[p] + g7 * i[p]


@njit(**FLAGS)
def _to_pairs(basis, g, count, value, slope, circle, q, sums):
    """sums[:3] = Σ g R ∇Y with ∇ of the polynomials in x, y, z that Y is, and sums[3] = Σ g R' Y; g is dE/dc (lm, n)."""
    degrees, one = basis.l_max + 1, basis.numbers[1]
    sums[:4, :count] = basis.numbers[0]
    mixed, on_q, on_slope, radial = sums[4], sums[5], sums[6], sums[7]
    for m in range(degrees):
        order = basis.angular[m, m, 1]
        for sign in range(2 if m else 1):  # Re, Im
            sums[5:8, :count] = basis.numbers[0]
            for l in range(m, degrees):
                here, polynomial = g[l * l + l + (m if sign == 0 else -m)], q[l * (l + 1) // 2 + m]
                _mixed(here, l, degrees, count, value, mixed)
                _add(one, polynomial, mixed, count, on_q)
                if l > m:
                    _add(basis.angular[l, m, 3], q[l * (l + 1) // 2 + m + 1], mixed, count, on_slope)
                _mixed(here, l, degrees, count, slope, mixed)
                _add(one, polynomial, mixed, count, radial)
            _add(one, circle[sign, m], on_slope, count, sums[2])
            _add(one, circle[sign, m], radial, count, sums[3])
            if m:  # d(x + iy)^m = m (x + iy)^(m-1) (dx + i dy)
                _add(order, circle[sign, m - 1], on_q, count, sums[0])
                _add(order if sign else -order, circle[1 - sign, m - 1], on_q, count, sums[1])
