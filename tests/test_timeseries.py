"""Correlation times, standard errors of means, trends and bounds of rates: known answers and how often intervals hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.signal
import scipy.stats

from gpmlp.core.errors import UserError
from gpmlp.uncertainty.timeseries import (
    blocking_error,
    correlation_time,
    equilibration_end,
    laplace_test,
    most_by_chance,
    poisson_upper,
    ranks,
    series_mean,
    series_trend,
    wilson_bounds,
)

SERIES = 500  # a coverage of 95 % then scatters by 1 %, one of 97 % by 0.8 %


def ar1(phi: float, n: int, m: int, rng: np.random.Generator) -> np.ndarray:
    """(m, n) stationary x_t = phi x_{t−1} + e_t with variance 1 of e, whose correlation time is (1 + phi)/(1 − phi)."""
    noise = rng.standard_normal((m, n + 1))
    start = noise[:, :1] / math.sqrt(1 - phi**2)
    return scipy.signal.lfilter([1], [1, -phi], noise[:, 1:], axis=1, zi=phi * start)[0]


def time_of(phi: float) -> float:
    return (1 + phi) / (1 - phi)


@pytest.mark.parametrize("times", [20, 40, 100])
@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9, 0.98])
def test_interval_of_the_mean_covers(phi, times):
    n = round(times * time_of(phi))
    found = [series_mean(x) for x in ar1(phi, n, SERIES, np.random.default_rng(times))]
    covers = np.array([abs(m.value[0]) <= m.half_width for m in found])
    assert 0.90 <= covers.mean() <= 0.98, covers.mean()
    if times == 20:  # those that are judged at all have the shorter estimated times; their intervals hold, too
        judged = np.array([m.enough for m in found])
        assert 0.4 < judged.mean() < 0.7
        assert covers[judged].mean() >= 0.88
    if times == 100:
        assert all(m.enough for m in found)


def test_coverage_over_all_is_90_to_97_percent():
    """The same, all lengths together, where chance is small: what the issue asks for."""
    for phi in (0.0, 0.5, 0.9, 0.98):
        covers = []
        for times in (20, 30, 60):
            x = ar1(phi, round(times * time_of(phi)), 400, np.random.default_rng([7, times]))
            covers += [abs(m.value[0]) <= m.half_width for m in map(series_mean, x)]
        assert 0.90 <= np.mean(covers) <= 0.97, (phi, np.mean(covers))


@pytest.mark.parametrize("phi", [-0.5, 0.0, 0.5, 0.9])
def test_correlation_time_of_ar1(phi):
    x = ar1(phi, 200_000, 1, np.random.default_rng(1))[0]
    g = correlation_time([x[:, None] - x.mean()])[0]
    # 2 (2M + 1)/n relative variance; below 1/2 it is cut off
    assert g == pytest.approx(max(0.5, time_of(phi)), rel=0.05)
    assert series_mean(x).correlation_time == g
    assert series_mean(x).n_effective <= len(x)


def test_blocking_agrees():
    for phi in (0.0, 0.9):
        x = ar1(phi, 50_000, 1, np.random.default_rng(2))[0]
        exact = math.sqrt(1 / (1 - phi) ** 2 / len(x))
        assert blocking_error(x) == pytest.approx(exact, rel=0.15)
        assert series_mean(x).sem == pytest.approx(exact, rel=0.1)


def test_walkers_together():
    x = ar1(0.9, 4000, 4, np.random.default_rng(3))
    together = series_mean(list(x))
    assert together.n == 16_000
    assert together.sem == pytest.approx(series_mean(x[0]).sem / 2, rel=0.3)
    # walkers in different places: the mean is not known, however long each has been there
    apart = series_mean([y + 10 * w for w, y in enumerate(x)])
    assert not apart.enough
    # unequal lengths, and the order does not matter
    parts = [x[0], x[1, :900]]
    assert series_mean(parts).sem == pytest.approx(series_mean(parts[::-1]).sem)


def test_vectors():
    rng = np.random.default_rng(4)
    x = np.stack([ar1(phi, 20_000, 1, rng)[0] for phi in (0.0, 0.5, 0.9)], axis=1)
    found = series_mean(x)
    each = [series_mean(c).sem for c in x.T]
    assert found.sem >= 0.95 * math.sqrt(
        np.mean(np.square(each))
    )  # the slowest component decides where it is the largest
    assert 1 < found.dimension < 3
    rotation = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    assert series_mean(x @ rotation).sem == pytest.approx(found.sem, rel=1e-9)


def test_units_do_not_matter():
    x = ar1(0.8, 2000, 1, np.random.default_rng(5))[0]
    a, b = series_mean(x), series_mean(1e-6 * x + 3)
    assert b.sem == pytest.approx(1e-6 * a.sem)
    assert b.correlation_time == pytest.approx(a.correlation_time, rel=1e-6)
    t, u = series_trend(x), series_trend(5 * x - 2, 0.1 * np.arange(2000))
    assert (u.slope, u.p) == pytest.approx((50 * t.slope, t.p))


def test_still_series():
    assert series_mean(np.full(50, 0.3)).sem == 0
    assert series_mean(np.full(50, 0.3)).enough
    flat = series_trend(np.full(50, 0.3))
    assert (flat.slope, flat.low, flat.high, flat.p) == (0, 0, 0, 1)
    assert series_mean(np.array([2.0])).n == 1


def test_equilibration():
    rng = np.random.default_rng(6)
    x = ar1(0.8, 4000, 1, rng)[0]
    assert equilibration_end(x) == 0
    drifting = x + 30 * np.exp(-np.arange(4000) / 200)
    start = equilibration_end(drifting)
    assert 500 <= start <= 1600
    assert abs(series_mean(drifting[start:]).value[0]) < abs(drifting.mean())
    assert equilibration_end(x[:10]) == 0


@pytest.mark.parametrize("phi", [0.0, 0.9])
@pytest.mark.parametrize("times", [25, 50])
def test_no_trend_is_seen_where_there_is_none(phi, times):
    found = [series_trend(x) for x in ar1(phi, round(times * time_of(phi)), 200, np.random.default_rng(8))]
    wrong = np.mean([t.p < 0.05 for t in found])
    assert 0.01 <= wrong <= 0.10, wrong  # 5 % of 200 scatters by 1.5 %
    assert np.mean([t.low <= 0 <= t.high for t in found]) >= 0.90


def test_trend_is_seen_where_there_is_one():
    x = ar1(0.5, 400, 100, np.random.default_rng(9))
    time = np.arange(400.0)
    found = [series_trend(y - 0.01 * time) for y in x]
    assert np.mean([t.p < 0.05 for t in found]) > 0.95
    assert np.mean([t.low <= -0.01 <= t.high for t in found]) >= 0.90
    assert np.median([t.slope for t in found]) == pytest.approx(-0.01, rel=0.05)


def test_trend_against_scipy():
    """Independent samples: slope as scipy's, p near that of Kendall's tau."""
    rng = np.random.default_rng(10)
    x = rng.standard_normal(300) + 0.002 * np.arange(300)
    found = series_trend(x)
    assert found.slope == pytest.approx(scipy.stats.theilslopes(x)[0])
    tau = scipy.stats.kendalltau(np.arange(300), x)
    assert math.log(found.p) == pytest.approx(math.log(tau.pvalue), rel=0.5)
    assert np.array_equal(ranks(np.array([3.0, 1.0, 3.0, 2.0])), scipy.stats.rankdata([3, 1, 3, 2]))


def test_outliers_do_not_make_a_trend():
    rng = np.random.default_rng(11)
    x = rng.normal(1, 0.1, 400)
    clean = series_trend(x)
    x[-6:] = 50.0
    spoilt = series_trend(x)
    assert abs(spoilt.slope - clean.slope) < 0.3 * (clean.high - clean.low)
    assert abs(np.polyfit(np.arange(400), x, 1)[0]) > 10 * abs(spoilt.slope)


def test_trend_of_walkers_and_of_long_series():
    x = ar1(0.9, 20_000, 2, np.random.default_rng(12))
    falling = [y - 1e-3 * np.arange(20_000) for y in x]
    found = series_trend(falling)
    assert found.p < 1e-6
    assert found.slope == pytest.approx(-1e-3, rel=0.1)
    assert found.n == 40_000
    # walkers at different levels have no trend
    assert series_trend([x[0, :500], 30 + x[1, :500]]).p > 0.01


def test_bounds_of_shares():
    assert wilson_bounds(0.0, 0) == (0.0, 1.0)
    low, high = wilson_bounds(0.3, 50)
    interval = scipy.stats.binomtest(15, 50).proportion_ci(0.90, method="wilson")
    assert (low, high) == pytest.approx((interval.low, interval.high))
    assert wilson_bounds(1.0, 25)[0] == pytest.approx(25 / (25 + 1.6448536**2))
    with pytest.raises(UserError, match="between 0 and 1"):
        wilson_bounds(1.1, 5)


def test_bounds_of_rates():
    assert poisson_upper(0) == pytest.approx(-math.log(0.05))
    assert scipy.stats.poisson.cdf(4, poisson_upper(4)) == pytest.approx(0.05)
    rng = np.random.default_rng(13)
    early = np.mean([laplace_test(rng.uniform(0, 1, 8), 1.0) < 0.05 for _ in range(2000)])
    assert 0.03 < early < 0.07
    assert laplace_test([1, 2, 3, 5, 8], 100.0) < 0.01
    assert laplace_test([], 100.0) == 1
    assert most_by_chance(108, 0.01) == scipy.stats.binom.ppf(0.99, 108, 0.01)
    assert most_by_chance(5, 0.0) == 0


def test_bad_input():
    with pytest.raises(UserError, match="no samples"):
        series_mean([])
    with pytest.raises(UserError, match="NaN or infinite"):
        series_mean(np.array([1.0, math.nan]))
    with pytest.raises(UserError, match="as many components"):
        series_mean([np.zeros((3, 2)), np.zeros((3, 1))])
    with pytest.raises(UserError, match="must hold arrays"):
        series_mean(np.zeros((3, 2, 2)))
    with pytest.raises(UserError, match="must increase"):
        series_trend(np.zeros(10), np.zeros(10))
    with pytest.raises(UserError, match="as many as"):
        series_trend(np.zeros(10), np.arange(9.0))
    assert math.isnan(series_trend(np.zeros(3)).p)
