"""Rates are shares and frequencies known from counts, with bounds that hold when counts are few or zero."""

from __future__ import annotations

import math
from collections.abc import Sequence

import scipy.special

from gpmlp.checks import UserError

CONFIDENCE = 0.95  # of one-sided bounds


def wilson(share: float, n: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
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
    """Upper bound of the expected number of events: the mean at which so few happen with chance 1 − confidence (3.0 for none)."""
    return float(scipy.special.gammaincinv(events + 1, confidence))


def laplace(times: Sequence[float], duration: float) -> float:
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
