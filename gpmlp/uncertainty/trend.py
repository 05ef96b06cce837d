"""Trend is whether a correlated series rises or falls, and how steeply: Mann–Kendall test and Theil–Sen slope, robust to outliers.

Several series of the same thing (walkers) are taken together: pairs of samples are compared within each, and S and its variance add
(Hirsch, Slack, Water Resour. Res. 20, 727 (1984)).

| on paper | here |
|---|---|
| S = Σ_{i<j} sign(x_j − x_i) | `_kendall`; Mann, Econometrica 13, 245 (1945) |
| var S = n(n − 1)(2n + 5)/18, less ties | the same |
| × n/n* ≈ 1 + 2 Σ_k ρ_s(k), n ≫ correlation time | `_correlation`; Hamed, Rao, J. Hydrol. 204, 182 (1998), eq. 8–9 |
| slope = median (x_j − x_i)/(t_j − t_i); interval from S ± z √var S | `trend`; Sen, J. Am. Stat. Assoc. 63, 1379 (1968) |

ρ_s is the autocorrelation of the ranks of what is left when the slope is taken off. It is summed not over "significant" lags but up to
Sokal's window, and corrected for the mean and slope taken off (`correlation.correlation_time`): without, the test finds trends in
stationary series of 20 correlation times twice as often as it says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.special

from gpmlp.checks import UserError
from gpmlp.uncertainty.correlation import ENOUGH, LEVEL, correlation_time, samples

LONGEST = 600  # samples of a series whose pairs are all compared; longer ones are averaged over blocks first
FEWEST = 8  # samples below which a test says nothing


@dataclass(frozen=True)
class Trend:
    """What a series does over its length.

    Attributes:
        slope: Theil–Sen, unit of the values per unit of the times.
        low, high: its 95 % interval; NaN where it cannot be known.
        p: two-sided chance of an S so far from 0 in a stationary series with these correlations; NaN where it cannot be known.
        level: median of the values.
        n: number of samples, all series together.
        n_effective: n over the correlation time.
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


def trend(values: np.ndarray | Sequence[np.ndarray], times: np.ndarray | Sequence[np.ndarray] | None = None) -> Trend:
    """Test one or several series for a trend that they share.

    Args:
        values: (samples,) of one, or a list of such; equally spaced, at least nearly: the correlation time counts samples.
        times: of the same shape, increasing; 0, 1, 2, ... where not given.

    Raises:
        UserError: no samples, values that are not finite, times that are not of the same shape or do not increase.
    """
    x = [p[:, 0] for p in samples(values)]
    t = [np.arange(len(p), dtype=float) for p in x] if times is None else [p[:, 0] for p in samples(times)]
    if [len(p) for p in t] != [len(p) for p in x]:
        raise UserError(f"`times` must be as many as `values`: {[len(p) for p in x]}; got {[len(p) for p in t]}.")
    if any((np.diff(p) <= 0).any() for p in t):
        raise UserError("`times` must increase; sort each series by time and leave out what was sampled twice.")
    n, level = sum(len(p) for p in x), float(np.median(np.concatenate(x)))
    duration = max(float(p[-1] - p[0]) for p in t)
    pairs = [(_coarse(p), _coarse(q)) for p, q in zip(t, x, strict=True)]
    pairs = [(p, q) for p, q in pairs if len(p) > 1]
    if sum(len(p) for p, _ in pairs) < FEWEST:
        return Trend(0.0, math.nan, math.nan, math.nan, level, n, 0.0, duration)
    slopes, s, variance = _all_pairs(pairs)
    slope = float(np.median(slopes))
    g, window = _correlation(pairs, slope)
    coarse = sum(len(p) for p, _ in pairs)
    n_effective = coarse / max(1.0, g)
    if variance <= 0:  # all values are equal
        return Trend(0.0, 0.0, 0.0, 1.0, level, n, n_effective, duration)
    freedom = max(1.0, coarse / (2 * window + 1))
    error = math.sqrt(variance * g)
    # one less for continuity: S moves in steps of two
    p = float(2 * scipy.special.stdtr(freedom, -max(0.0, abs(s) - 1) / error))
    reach = float(scipy.special.stdtrit(freedom, (1 + LEVEL) / 2)) * error
    low, high = _between(slopes, reach)
    return Trend(slope, low, high, min(1.0, p), level, n, n_effective, duration)


def _coarse(values: np.ndarray) -> np.ndarray:
    """Averages over blocks of equal length, LONGEST at most; what is left over goes from the front."""
    length = math.ceil(len(values) / LONGEST)
    rest = len(values) % length
    return values[rest:].reshape(-1, length).mean(1)


def _all_pairs(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, float, float]:
    """(slopes of all pairs within series, S, var S of independent samples)."""
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
