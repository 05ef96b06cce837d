"""Statistics of time series: correlation time, standard error of a mean, equilibration, trend; bounds of probabilities and rates.

Samples are equally spaced in time. Several series of the same thing (walkers) have a common mean, and a common autocovariance about
it, so that walkers in different places make the correlation time long. Samples may be vectors (the bins of a histogram): the time is
then that of the sum of the autocovariances of the components, which the mean of the squared standard errors needs, or that of the
leading principal component, where it is longer. Times are counted in samples.

| on paper | here |
|---|---|
| g = 1 + 2 Σ_k ρ(k) = 2 τ_int, n_eff = n / g | `SeriesMean.correlation_time`, `SeriesMean.n_effective` |
| window M: the least with M ≥ c τ_int(M) | `WINDOW`; Madras, Sokal, J. Stat. Phys. 50, 109 (1988), app. C |
| g (1 − (2M + 1)/n)⁻¹, bias of subtracting the mean | Wolff, Comput. Phys. Commun. 156, 143 (2004), eq. 49 |
| relative variance of g: 2 (2M + 1)/n, so that mean/sem has n/(2M + 1) degrees of freedom | Madras, Sokal, eq. C.19; `SeriesMean.freedom` |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.fft
import scipy.special

from gpmlp.core.errors import UserError

CONFIDENCE = 0.95  # of one-sided bounds

LONGEST = 600  # samples of a series whose pairs are all compared; longer ones are averaged over blocks first
FEWEST = 8  # samples below which a test says nothing

ENOUGH = 20  # correlation times below which nothing is judged
WINDOW = 4.0  # c: a window of so many τ_int misses e⁻⁴ of an exponential; 5 and more make g of short series too noisy
LEAST = 0.5  # least g: anticorrelated samples are counted double at most
MOST_BIAS = 0.8  # of g that the correction may make up for
LEVEL = 0.95  # of intervals
STARTS = 21  # candidates for the end of equilibration, up to a third of the series
GAIN = 1.25  # factor of effective samples that leaving out must bring; choosing among noisy times makes them look short


@dataclass(frozen=True, eq=False)
class SeriesMean:
    """Mean of correlated samples.

    Attributes:
        value: (components,) mean over all samples of all series; n: how many these are.
        spread: standard deviation of a sample; sem: standard error of the mean, from the correlation time; sem_blocking: the same from
            block averages; each the rms over components.
        correlation_time: g, in samples; freedom: degrees of freedom of `sem`.
        dimension: effective number of independent components, (Σλ)²/Σλ² of the covariance; 1 for a scalar.
    """

    value: np.ndarray
    spread: float
    sem: float
    sem_blocking: float
    correlation_time: float
    n: int
    freedom: float
    dimension: float

    @property
    def n_effective(self) -> float:
        """Number of independent samples with the same standard error of the mean, n at most."""
        return self.n / max(1.0, self.correlation_time)

    @property
    def enough(self) -> bool:
        """Whether there are so many correlation times that the standard error can be trusted."""
        return self.n_effective >= ENOUGH

    @property
    def half_width(self) -> float:
        """Half-width of the 95 % interval of a scalar mean: Student's t for the degrees of freedom of `sem`."""
        return float(scipy.special.stdtrit(self.freedom, (1 + LEVEL) / 2)) * self.sem


def check_series(series: np.ndarray | Sequence[np.ndarray]) -> list[np.ndarray]:
    """Series as a list of (samples, components) float64, empty ones left out.

    Args:
        series: one array (samples,) or (samples, components), or a list of such.

    Raises:
        UserError: nothing at all, values that are not finite, series with different numbers of components.
    """
    parts = [series] if isinstance(series, np.ndarray) else list(series)
    parts = [np.asarray(p, dtype=np.float64) for p in parts]
    for p in parts:
        if p.ndim not in (1, 2):
            raise UserError(f"`series` must hold arrays (samples,) or (samples, components); got shape {p.shape}.")
    parts = [p.reshape(len(p), -1) for p in parts if len(p)]
    if not parts:
        raise UserError("`series` holds no samples; nothing can be said of it.")
    if len({p.shape[1] for p in parts}) > 1:
        raise UserError(f"`series` must have as many components each; got {sorted({p.shape[1] for p in parts})}.")
    if not all(np.isfinite(p).all() for p in parts):
        raise UserError("`series` holds a NaN or infinite value; leave out such samples.")
    return parts


def series_mean(series: np.ndarray | Sequence[np.ndarray]) -> SeriesMean:
    """Mean of one or several series of the same thing, with its standard error.

    sem² = γ(0) g / n, γ(0) the variance of a sample with the bias γ(0) g/n of the mean taken off.

    Raises:
        UserError: as `samples`.
    """
    parts = check_series(series)
    n = sum(len(p) for p in parts)
    value = sum(p.sum(0) for p in parts) / n
    centred = [p - value for p in parts]
    covariance = sum(c.T @ c for c in centred) / n
    total = float(np.trace(covariance))
    if n < 2 or _still(total, value):
        # nothing moves
        return SeriesMean(value, 0.0, 0.0, 0.0, 1.0, n, math.inf, 1.0)
    g, window = correlation_time(centred, 1)
    if value.size > 1:
        g, window = max((g, window), correlation_time([c @ _leading(covariance) for c in centred], 1))
    k = value.size
    freedom = max(1.0, n / (2 * window + 1))
    g_used = min(g, n / 2)
    variance = total / k * (1 + g_used / n)
    dimension = total**2 / float((covariance**2).sum())
    sem = math.sqrt(variance * g / n)
    return SeriesMean(value, math.sqrt(variance), sem, blocking_error(parts), g, n, freedom, dimension)


def _still(variance: float, value: np.ndarray) -> bool:
    """Whether a variance is but rounding of the values."""
    return variance <= (1e-13 * float(np.abs(value).max(initial=0.0))) ** 2 * value.size


def _leading(covariance: np.ndarray) -> np.ndarray:
    """(components, 1): direction in which the samples vary most."""
    return np.linalg.eigh(covariance)[1][:, -1:]


def autocovariance(centred: Sequence[np.ndarray]) -> np.ndarray:
    """γ(k) summed over components, k = 0 ... longest series − 1, averaged over the pairs of samples of all series (Fourier transform).

    Args:
        centred: (samples, components) each, with the mean already taken off.
    """
    longest = max(len(p) for p in centred)
    total, pairs = np.zeros(longest), np.zeros(longest)
    for p in centred:
        n = len(p)
        size = scipy.fft.next_fast_len(2 * n, real=True)
        transform = np.fft.rfft(p, size, axis=0)
        power = (transform.real**2 + transform.imag**2).sum(1)
        total[:n] += np.fft.irfft(power, size)[:n]
        pairs[:n] += n - np.arange(n)
    return total / pairs


def correlation_time(centred: Sequence[np.ndarray], parameters: int = 1) -> tuple[float, int]:
    """(g, M): correlation time 1 + 2 Σ_{k≤M} ρ(k) in samples, and the window that Sokal's rule chose.

    Args:
        centred: (samples, components) each, with a mean (or mean and trend) already taken off.
        parameters: how many were fitted to take it off, 1 for the mean; each lowers γ(k) by about γ(0) g/n.
    """
    covariance = autocovariance(centred)
    n = sum(len(p) for p in centred)
    if covariance[0] <= 0:
        return 1.0, 0
    sums = 2 * np.cumsum(covariance / covariance[0]) - 1
    wide = np.arange(len(sums)) >= WINDOW * np.maximum(sums, 0) / 2
    wide[0] = False
    window = int(wide.argmax()) if wide.any() else len(sums) - 1
    unbiased = 1 - min(MOST_BIAS, parameters * (2 * window + 1) / n)
    return max(LEAST, float(sums[window]) / unbiased), window


def blocking_error(series: np.ndarray | Sequence[np.ndarray]) -> float:
    """Rms over components of the standard error of the mean, from averages of ever longer blocks.

    Flyvbjerg, Petersen, J. Chem. Phys. 91, 461 (1989); the block length is the least B with B³ > 2 n (s_B/s_1)⁴, s_B the standard error
    at B: Lee, Alder et al., Phys. Rev. E 83, 066706 (2011), eq. 11. Rests shorter than a block are left out.
    """
    parts = check_series(series)
    n = sum(len(p) for p in parts)
    value = sum(p.sum(0) for p in parts) / n
    length, first, error = 1, None, 0.0
    while True:
        blocks = [p[: len(p) // length * length].reshape(-1, length, p.shape[1]).mean(1) for p in parts]
        joined = np.concatenate(blocks)
        if len(joined) < 4 and first is not None:
            return error
        deviation = ((joined - value) ** 2).mean()
        squared = deviation / max(1, len(joined) - 1)
        if first is None:
            first = squared
        error = math.sqrt(squared)
        if squared <= 0 or len(joined) < 4 or length**3 > 2 * n * (squared / first) ** 2:
            return error
        length *= 2


def equilibration_end(series: np.ndarray) -> int:
    """Number of leading samples to leave out: those that, left out, leave the most effective samples; a third at most.

    Chodera, J. Chem. Theory Comput. 12, 1799 (2016). Only where that brings GAIN times as many.

    Args:
        series: (samples,) or (samples, components) of one walker.
    """
    (part,) = check_series(series)
    n = len(part)
    if n < 2 * ENOUGH:
        return 0
    best, start = 0.0, 0
    for first in np.unique(np.linspace(0, n // 3, STARTS).astype(int)):
        rest = part[first:] - part[first:].mean(0)
        left = len(rest) / max(1.0, correlation_time([rest], 1)[0])
        if left > best * (GAIN if first and not start else 1.0):
            best, start = left, int(first)
    return start


@dataclass(frozen=True)
class SeriesTrend:
    """Mann–Kendall test and Theil–Sen slope of a series.

    Attributes:
        slope: Theil–Sen, unit of the values per unit of the times; low, high: its 95 % interval (NaN = unknown).
        p: two-sided chance of an S so far from 0 in a stationary series with these correlations (NaN = unknown).
        level: median of the values; n: number of samples, all series together; n_effective: n over the correlation time.
        duration: the longest extent of a series, unit of the times.
    """

    slope: float
    low: float
    high: float
    p: float
    level: float
    n: int
    n_effective: float
    duration: float

    @property
    def enough(self) -> bool:
        """Whether there are so many correlation times that the test can be trusted."""
        return self.n_effective >= ENOUGH


def series_trend(
    values: np.ndarray | Sequence[np.ndarray], times: np.ndarray | Sequence[np.ndarray] | None = None
) -> SeriesTrend:
    """Mann–Kendall test of one or several series for a common trend, and Theil–Sen slope.

    Args:
        values: (samples,) of one, or a list of such; equally spaced, at least nearly: the correlation time counts samples.
        times: of the same shape, increasing; 0, 1, 2, ... where not given.

    Raises:
        UserError: no samples, values that are not finite, times of another shape or that do not increase.
    """
    x = [p[:, 0] for p in check_series(values)]
    t = [np.arange(len(p), dtype=float) for p in x] if times is None else [p[:, 0] for p in check_series(times)]
    if [len(p) for p in t] != [len(p) for p in x]:
        raise UserError(f"`times` must be as many as `values`: {[len(p) for p in x]}; got {[len(p) for p in t]}.")
    if any((np.diff(p) <= 0).any() for p in t):
        raise UserError("`times` must increase; sort each series by time and leave out what was sampled twice.")
    n, level = sum(len(p) for p in x), float(np.median(np.concatenate(x)))
    duration = max(float(p[-1] - p[0]) for p in t)
    pairs = [(_coarse(p), _coarse(q)) for p, q in zip(t, x, strict=True)]
    pairs = [(p, q) for p, q in pairs if len(p) > 1]
    if sum(len(p) for p, _ in pairs) < FEWEST:
        return SeriesTrend(0.0, math.nan, math.nan, math.nan, level, n, 0.0, duration)
    slopes, s, variance = _all_pairs(pairs)
    slope = float(np.median(slopes))
    g, window = _correlation(pairs, slope)
    coarse = sum(len(p) for p, _ in pairs)
    n_effective = coarse / max(1.0, g)
    if variance <= 0:  # all values are equal
        return SeriesTrend(0.0, 0.0, 0.0, 1.0, level, n, n_effective, duration)
    freedom = max(1.0, coarse / (2 * window + 1))
    error = math.sqrt(variance * g)
    # one less for continuity: S moves in steps of two
    p = float(2 * scipy.special.stdtr(freedom, -max(0.0, abs(s) - 1) / error))
    reach = float(scipy.special.stdtrit(freedom, (1 + LEVEL) / 2)) * error
    low, high = _between(slopes, reach)
    return SeriesTrend(slope, low, high, min(1.0, p), level, n, n_effective, duration)


def _coarse(values: np.ndarray) -> np.ndarray:
    """Averages over blocks of equal length, LONGEST at most; what is left over goes from the front."""
    length = math.ceil(len(values) / LONGEST)
    rest = len(values) % length
    return values[rest:].reshape(-1, length).mean(1)


def _all_pairs(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, float, float]:
    """Slopes of all pairs, S = Σ_{i<j} sign(x_j - x_i), and var S of independent samples, n(n - 1)(2n + 5)/18 less ties."""
    slopes, s, variance = [], 0.0, 0.0
    for t, x in pairs:
        i, j = np.triu_indices(len(x), 1)
        rise = x[j] - x[i]
        slopes.append(rise / (t[j] - t[i]))
        s += float(np.sign(rise).sum())
        n, ties = len(x), np.unique(x, return_counts=True)[1].astype(float)
        variance += (n * (n - 1) * (2 * n + 5) - (ties * (ties - 1) * (2 * ties + 5)).sum()) / 18
    return np.concatenate(slopes), s, variance


def _correlation(pairs: Sequence[tuple[np.ndarray, np.ndarray]], slope: float) -> tuple[float, int]:
    """(g, window) of the ranks of what is left when the slope is taken off."""
    residual = [x - slope * t for t, x in pairs]
    joined = ranks(np.concatenate([r - np.median(r) for r in residual]))
    cuts = np.cumsum([len(r) for r in residual])[:-1]
    return correlation_time([r[:, None] - r.mean() for r in np.split(joined, cuts)], 1 + len(pairs))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks (n,) from 1, ties by average rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _between(slopes: np.ndarray, reach: float) -> tuple[float, float]:
    """Slopes at the ranks (N ∓ reach)/2; NaN where these lie outside."""
    ordered = np.sort(slopes)
    below, above = math.floor((len(ordered) - reach) / 2) - 1, math.ceil((len(ordered) + reach) / 2)
    if below < 0 or above >= len(ordered):
        return math.nan, math.nan
    return float(ordered[below]), float(ordered[above])


def wilson_bounds(share: float, n: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """(lower, upper) bounds of a probability, each exceeded with chance 1 − confidence.

    (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n): Wilson, J. Am. Stat. Assoc. 22, 209 (1927).

    Args:
        share: observed, 0 to 1.
        n: number of independent trials; for correlated ones the effective number, not necessarily whole; 0 gives (0, 1).
    """
    if not (0 <= share <= 1 and n >= 0):
        raise UserError(f"`share` must lie between 0 and 1 and `n` must not be negative; got {share} and {n}.")
    if n == 0:
        return 0.0, 1.0
    share, n = float(share), float(n)
    z = float(scipy.special.ndtri(confidence))
    middle, below = share + z * z / (2 * n), 1 + z * z / n
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - reach) / below), min(1.0, (middle + reach) / below)


def poisson_upper(events: int, confidence: float = CONFIDENCE) -> float:
    """Upper bound of the expected number of events: the mean at which P(so few) = 1 − confidence (3.0 for none)."""
    return float(scipy.special.gammaincinv(events + 1, confidence))


def laplace_test(times: Sequence[float], duration: float) -> float:
    """Laplace's test of a falling rate: chance of events so early in [0, duration] at a constant rate; 1 where there are none.

    (mean t − T/2) / (T / √(12 n)) is nearly normal: Cox, Lewis, The Statistical Analysis of Series of Events (1966), sec. 3.3.
    """
    if not len(times) or duration <= 0:
        return 1.0
    z = (sum(times) / len(times) - duration / 2) / (duration / math.sqrt(12 * len(times)))
    return float(scipy.special.ndtr(z))


def most_by_chance(n: int, probability: float, confidence: float = 0.99) -> int:
    """The least k with P(at most k of n) ≥ confidence, for n independent chances of that probability."""
    k = 0
    while k < n and scipy.special.bdtr(k, n, probability) < confidence:
        k += 1
    return k
