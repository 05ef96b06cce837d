"""Triton kernels of the dense power spectrum: a program for each environment, its neighbours one after another, everything in registers.

Radial polynomials and harmonics of a neighbour are computed again where they are needed. A tile of the density has a row for each radial
function and a column for each harmonic; the columns run the recurrence of spherical_harmonics.py side by side, each as far as it goes,
and those of one l share a column of the radial tile, which is loaded once. The width of the table of neighbours is a number that kernels
are not compiled for. Only _triton.py imports this, when it launches kernels: Triton takes half a second to import and need not be there.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def harmonics(x, y, z, a, b, start, steps, m, sine, lm, L: tl.constexpr, LM: tl.constexpr):
    """Y and its derivatives with respect to x, y and z as polynomials of these, by (l, m)."""
    q, below = start, tl.zeros_like(start)
    slope, slope_below = tl.zeros_like(start), tl.zeros_like(start)
    cosine, cosine_below = tl.zeros_like(start) + 1.0, tl.zeros_like(start)
    sines, sines_below = tl.zeros_like(start), tl.zeros_like(start)
    for k in tl.static_range(1, L):
        on, before = tl.load(a + k * LM + lm), tl.load(b + k * LM + lm)
        climbs, turns = k <= steps, k <= m
        next_q, next_slope = on * z * q + before * below, on * (q + z * slope) + before * slope_below
        below, slope_below = tl.where(climbs, q, below), tl.where(climbs, slope, slope_below)
        q, slope = tl.where(climbs, next_q, q), tl.where(climbs, next_slope, slope)
        next_cosine, next_sine = x * cosine - y * sines, x * sines + y * cosine
        cosine_below, sines_below = tl.where(turns, cosine, cosine_below), tl.where(turns, sines, sines_below)
        cosine, sines = tl.where(turns, next_cosine, cosine), tl.where(turns, next_sine, sines)
    power = tl.where(sine, sines, cosine)
    on_x = q * m * tl.where(sine, sines_below, cosine_below)
    on_y = q * m * tl.where(sine, cosine_below, -sines_below)
    return q * power, on_x, on_y, slope * power


@triton.jit
def vector_and_length(vectors, pair):
    """x, y, z and r of a pair."""
    x, y, z = tl.load(vectors + 3 * pair), tl.load(vectors + 3 * pair + 1), tl.load(vectors + 3 * pair + 2)
    return x, y, z, tl.sqrt(x * x + y * y + z * z)


@triton.jit
def splines(table, n, l, scaled, intervals, N: tl.constexpr, L: tl.constexpr):
    """Radial functions (n, l) at r = scaled intervals, and their slopes per interval, by Horner's rule for both together."""
    column, inside = l[None, :] * N + n[:, None], (n < N)[:, None] & (l < L)[None, :]
    interval = tl.minimum(scaled.to(tl.int32), intervals - 1)
    t = scaled - interval.to(scaled.dtype)
    place = table + interval * (6 * N * L) + column
    radial = tl.load(place, mask=inside, other=0.0)
    slope = tl.zeros_like(radial)
    for p in tl.static_range(1, 6):
        slope = slope * t + radial
        radial = radial * t + tl.load(place + p * N * L, mask=inside, other=0.0)
    return radial, slope


@triton.jit(do_not_specialize=["width", "intervals"])
def expand(
    vectors, weights, center_slots, table, numbers, center, of_l, of_steps, of_m, of_sine, starts, a, b, density, width, intervals,
    S: tl.constexpr, N: tl.constexpr, L: tl.constexpr, NP: tl.constexpr, LP: tl.constexpr, LM: tl.constexpr,
):  # fmt: skip
    """Density (environments, species × N, L²) of vectors (environments, S, width, 3) with their weights."""
    environment = tl.program_id(0).to(tl.int64)
    n, degrees, lm = tl.arange(0, NP), tl.arange(0, LP), tl.arange(0, LM)
    inside = (n < N)[:, None] & (lm < L * L)[None, :]
    l = tl.broadcast_to(tl.load(of_l + lm)[None, :], (NP, LM))
    steps, m, sine = tl.load(of_steps + lm), tl.load(of_m + lm), tl.load(of_sine + lm) != 0
    start, per_length = tl.load(starts + lm), tl.load(numbers)
    mine = tl.load(center_slots + environment)
    for s in range(S):
        c = tl.zeros([NP, LM], dtype=vectors.dtype.element_ty)
        for k in range(width):
            pair = (environment * S + s) * width + k
            weight = tl.load(weights + pair)
            if weight != 0:
                x, y, z, r = vector_and_length(vectors, pair)
                radial, _ = splines(table, n, degrees, r * per_length, intervals, N, L)
                value, _, _, _ = harmonics(x / r, y / r, z / r, a, b, start, steps, m, sine, lm, L, LM)
                c += tl.gather(weight * radial, l, 1) * value[None, :]
        alone = tl.load(center + n, mask=n < N, other=0.0)
        c += tl.where((lm == 0)[None, :] & (mine == s), alone[:, None], 0.0)
        tl.store(density + (environment * S + s) * (N * L * L) + n[:, None] * (L * L) + lm[None, :], c, mask=inside)


@triton.jit
def multiply(
    density, factors, spectrum, C: tl.constexpr, L: tl.constexpr, CP: tl.constexpr, MP: tl.constexpr
):  # fmt: skip
    """Spectrum (environments, C (C + 1) / 2 × L) of a density, for one environment and l."""
    environment, l = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel, m = tl.arange(0, CP), tl.arange(0, MP)
    here = density + environment * (C * L * L) + l * l + m
    there = m < 2 * l + 1
    every = tl.load(here[None, :] + channel[:, None] * (L * L), mask=(channel < C)[:, None] & there[None, :], other=0.0)
    for one in range(C):
        row = tl.load(here + one * (L * L), mask=there, other=0.0)
        product = tl.sum(every * row[None, :], axis=1)
        place = (one * C - one * (one - 1) // 2 + channel - one) * L + l
        unique = (channel >= one) & (channel < C)
        factor = tl.load(factors + place, mask=unique, other=0.0)
        tl.store(spectrum + environment * (C * (C + 1) // 2 * L) + place, product * factor, mask=unique)


@triton.jit(do_not_specialize=["width", "intervals"])
def pull_back(
    vectors, weights, slopes, table, numbers, of_l, of_steps, of_m, of_sine, starts, a, b, density, factors, on_spectrum,
    gradients, width, intervals,
    S: tl.constexpr, N: tl.constexpr, L: tl.constexpr, NP: tl.constexpr, LP: tl.constexpr, LM: tl.constexpr,
):  # fmt: skip
    """Gradients (environments, S, width, 3) from those on the spectrum; the density's are computed species by species and not stored."""
    environment = tl.program_id(0).to(tl.int64)
    n, degrees, lm = tl.arange(0, NP), tl.arange(0, LP), tl.arange(0, LM)
    inside = (n < N)[:, None] & (lm < L * L)[None, :]
    l = tl.broadcast_to(tl.load(of_l + lm)[None, :], (NP, LM))
    steps, m, sine = tl.load(of_steps + lm), tl.load(of_m + lm), tl.load(of_sine + lm) != 0
    start, per_length = tl.load(starts + lm), tl.load(numbers)
    C: tl.constexpr = S * N
    for s in range(S):
        on_density = tl.zeros([NP, LM], dtype=vectors.dtype.element_ty)
        channel = s * N + n
        for other in range(C):
            low, high = tl.minimum(channel, other), tl.maximum(channel, other)
            place = (low * C - low * (low - 1) // 2 + high - low)[:, None] * L + l
            on = tl.load(on_spectrum + environment * (C * (C + 1) // 2 * L) + place, mask=inside, other=0.0)
            on = on * tl.load(factors + place, mask=inside, other=0.0)
            row = tl.load(density + environment * (C * L * L) + other * (L * L) + lm, mask=lm < L * L, other=0.0)
            on_density += tl.where((channel == other)[:, None], on + on, on) * row[None, :]
        for k in range(width):
            pair = (environment * S + s) * width + k
            weight, d_weight = tl.load(weights + pair), tl.load(slopes + pair)
            x, y, z, r = vector_and_length(vectors, pair)
            g_x, g_y, g_z = x * 0, y * 0, z * 0
            if (weight != 0) | (d_weight != 0):
                x, y, z = x / r, y / r, z / r
                radial, slope = splines(table, n, degrees, r * per_length, intervals, N, L)
                slope = weight * per_length * slope + d_weight * radial
                on_y = tl.sum(on_density * tl.gather(weight * radial, l, 1), axis=0)
                on_slope = tl.sum(on_density * tl.gather(slope, l, 1), axis=0)
                value, y_x, y_y, y_z = harmonics(x, y, z, a, b, start, steps, m, sine, lm, L, LM)
                along = tl.sum(on_slope * value, axis=0)
                t_x, t_y, t_z = tl.sum(on_y * y_x, axis=0), tl.sum(on_y * y_y, axis=0), tl.sum(on_y * y_z, axis=0)
                inward = x * t_x + y * t_y + z * t_z
                g_x, g_y = x * along + (t_x - x * inward) / r, y * along + (t_y - y * inward) / r
                g_z = z * along + (t_z - z * inward) / r
            tl.store(gradients + 3 * pair + 0, g_x)
            tl.store(gradients + 3 * pair + 1, g_y)
            tl.store(gradients + 3 * pair + 2, g_z)
