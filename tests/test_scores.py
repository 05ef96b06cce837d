"""Scores of standard deviations against errors."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from gpmlp.core.errors import UserError
from gpmlp.uncertainty import scores as s


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _data(n: int = 20_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors drawn from Gaussians whose std spans a factor of e^±1."""
    std = 0.1 * _normal(n, seed=1).clamp(-1, 1).exp()
    return std * _normal(n), std


def test_errors_drawn_from_the_predicted_gaussians_are_calibrated():
    e, std = _data()
    found = s.score_errors(e, std)
    # binomial error of a share of 20 000 is at most 0.0035; four of it
    for level in (50, 68, 90, 95):
        assert abs(getattr(found, f"coverage_{level}") - level / 100) < 0.014
    # a Kolmogorov-Smirnov distance of 20 000 is about 0.006, and the area is less
    assert found.miscalibration_area < 0.006
    # bins of 1000: relative error of an rms is 1/sqrt(2000) = 0.022, its mean absolute value 0.018
    assert found.ence < 0.04
    assert math.isclose(found.sharpness, math.sqrt(float((std**2).mean())), rel_tol=1e-12)
    assert found.n == 20_000


@pytest.mark.parametrize(("factor", "ence"), [(0.5, 1.0), (2.0, 0.5)])
def test_std_wrong_by_a_factor(factor, ence):
    """Against closed forms: error/std is a Gaussian of std 1/factor."""
    e, std = _data()
    found = s.score_errors(e, factor * std)
    for level in (0.5, 0.68, 0.9, 0.95):
        expected = 2 * scipy.stats.norm.cdf(factor * scipy.stats.norm.ppf((1 + level) / 2)) - 1
        assert abs(getattr(found, f"coverage_{100 * level:.0f}") - expected) < 0.014
    area = scipy.integrate.quad(
        lambda p: abs(2 * scipy.stats.norm.cdf(factor * scipy.stats.norm.ppf((1 + p) / 2)) - 1 - p), 0, 1
    )[0]
    assert abs(found.miscalibration_area - area) < 0.006
    assert abs(found.ence - ence) < 0.04
    right = s.score_errors(e, std)
    assert found.nll > right.nll + 0.1
    assert found.crps > right.crps


def test_nll_and_crps_are_the_integrals_they_stand_for():
    e, std = torch.tensor([0.3, -0.2, 0.0], dtype=torch.float64), torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    found = s.score_errors(e, std)
    assert math.isclose(found.nll, -scipy.stats.norm.logpdf(e, scale=std).mean(), rel_tol=1e-12)
    # CRPS = ∫ (F(t) − [t >= e])² dt
    expected = []
    for x, sigma in zip(e.tolist(), std.tolist(), strict=True):
        below = scipy.integrate.quad(lambda t, w=sigma: scipy.stats.norm.cdf(t, scale=w) ** 2, -30, x)[0]
        above = scipy.integrate.quad(lambda t, w=sigma: scipy.stats.norm.sf(t, scale=w) ** 2, x, 30)[0]
        expected.append(below + above)
    assert math.isclose(found.crps, sum(expected) / 3, rel_tol=1e-7)


def test_coverage_with_multipliers():
    e = torch.tensor([1.0, 2.0, math.nan, 3.0, 4.0], dtype=torch.float64)
    std = torch.ones(5, dtype=torch.float64)
    half = torch.tensor([1.5, 1.5, 0.0, 3.5, 3.5], dtype=torch.float64)
    found = s.score_errors(e, std, {0.5: 2.5, 0.9: half})
    assert (found.coverage_50, found.coverage_90) == (0.5, 0.5)
    assert found.coverage_68 == 0.0  # Gaussian: 0.994 std
    assert s.score_errors(e, std, {0.9: half + 1}).coverage_90 == 1.0


def test_unknown_errors_are_dropped_with_their_std():
    e, std = _data(100)
    hole = torch.tensor([3, 50])
    e_holes, std_holes = e.clone(), std.clone()
    e_holes[hole], std_holes[hole] = math.nan, math.nan
    keep = torch.ones(100, dtype=torch.bool)
    keep[hole] = False
    assert s.score_errors(e_holes, std_holes) == s.score_errors(e[keep], std[keep])


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_known(n):
    found = s.score_errors(torch.full((n,), math.nan), torch.ones(n))
    assert found.n == 0
    assert all(math.isnan(v) for k, v in asdict(found).items() if k not in ("n", "n_symmetric"))


@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_std_of_zero(n):
    """Numbers, not NaN; where the error is 0 too, the interval holds it."""
    zero = torch.zeros(n, dtype=torch.float64)
    for e, std, covered in ((zero, zero, 1.0), (zero + 1, zero, 0.0), (zero, zero + 1, 1.0)):
        found = s.score_errors(e, std)
        assert found.coverage_95 == covered
        assert math.isnan(found.spearman)  # constant
        assert all(math.isfinite(v) for k, v in asdict(found).items() if not k.startswith("spearman"))
    mixed = s.score_errors(torch.cat([zero, _normal(20)]), torch.cat([zero, torch.ones(20, dtype=torch.float64)]))
    assert all(math.isfinite(v) for k, v in asdict(mixed).items() if k != "spearman_within_frame")  # without frames


@pytest.mark.parametrize("bad", [math.nan, -0.1, math.inf])
def test_bad_std_is_an_error(bad):
    with pytest.raises(UserError, match=r"`std` must be finite.*1 of 2"):
        s.score_errors(torch.tensor([0.1, 0.2]), torch.tensor([bad, 0.1]))


def test_bad_shapes_are_errors():
    with pytest.raises(UserError, match="`std` must have shape"):
        s.score_errors(torch.zeros(3), torch.zeros(2))
    with pytest.raises(UserError, match="`errors` must have shape"):
        s.score_errors(torch.zeros(3, 3), torch.zeros(3, 3))
    with pytest.raises(UserError, match="infinite"):
        s.score_errors(torch.tensor([math.inf]), torch.ones(1))


def test_ranks_within_frames_see_what_frames_hide():
    """Frames of different temperature: std ranks them well, and the atoms of each not at all."""
    frames, atoms = 30, 20
    level = torch.linspace(-2, 2, frames, dtype=torch.float64).exp().repeat_interleave(3 * atoms)
    atom, frame = torch.arange(frames * atoms).repeat_interleave(3), torch.arange(frames).repeat_interleave(3 * atoms)
    own = _normal(frames * atoms, seed=5).exp().repeat_interleave(3)
    e = level * own * _normal(3 * frames * atoms, seed=6)
    blind, seeing = (
        s.score_errors(e, std, group=atom, frame=frame) for std in (level * own[torch.randperm(len(own))], level * own)
    )
    assert blind.spearman > 0.5 and abs(blind.spearman_within_frame) < 0.15
    assert seeing.spearman_within_frame > 0.6
    # a frame of a few values shared by all its atoms, as in a perfect crystal, has no ranks
    assert math.isnan(s.score_errors(e, torch.ones_like(e), group=atom, frame=frame).spearman_within_frame)
    lone = s.score_errors(e[:60], own[:60], group=atom[:60], frame=frame[:60])
    assert lone.spearman_within_frame == pytest.approx(lone.spearman)


def test_ranking_by_groups_sees_what_components_hide():
    atoms = 400
    std = _normal(atoms, seed=3).exp()
    e = std[:, None] * _normal(atoms, 3)
    group = torch.arange(atoms).repeat_interleave(3)
    flat, spread = e.flatten(), std.repeat_interleave(3)
    by_row, by_atom = s.score_errors(flat, spread), s.score_errors(flat, spread, group=group)
    expected = scipy.stats.spearmanr(std, e.square().mean(1)).statistic
    assert math.isclose(by_atom.spearman, expected, rel_tol=1e-12)
    assert by_atom.spearman > by_row.spearman + 0.1
    assert by_atom.coverage_90 == by_row.coverage_90


def test_spearman_is_that_of_scipy_with_ties():
    a, b = (_normal(50) * 2).round(), (_normal(50, seed=1) + _normal(50)).round()
    assert len(a.unique()) < 20
    assert math.isclose(s.spearman_correlation(a, b), scipy.stats.spearmanr(a, b).statistic, rel_tol=1e-12)
    assert s.spearman_correlation(a, -a) == pytest.approx(-1)
    assert math.isnan(s.spearman_correlation(a, torch.ones(50)))
    assert math.isnan(s.spearman_correlation(a[:2], b[:2]))


def test_auroc_counts_pairs():
    score = torch.tensor([0.1, 0.4, 0.4, 0.8, math.inf, 0.2])
    positive = torch.tensor([False, False, True, True, True, True])
    pairs = [(p > q) + 0.5 * (p == q) for p in score[positive] for q in score[~positive]]
    assert s.area_under_roc(score, positive) == pytest.approx(float(sum(pairs)) / 8)
    assert s.area_under_roc(-score, positive) == pytest.approx(1 - float(sum(pairs)) / 8)
    assert math.isnan(s.area_under_roc(score, torch.ones(6)))
    assert math.isnan(s.area_under_roc(torch.zeros(0), torch.zeros(0)))


def test_sparsification():
    e = torch.tensor([4.0, -1.0, 2.0, -3.0], dtype=torch.float64)
    std = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64)
    curve = s.sparsification_curve(e, std, [0, 0.25, 0.5, 1])
    assert curve.rmse.square().tolist() == pytest.approx([7.5, 14 / 3, 5.0, 1.0])
    assert curve.oracle.square().tolist() == pytest.approx([7.5, 14 / 3, 2.5, 1.0])
    gap, room = (5**0.5 - 2.5**0.5) * 0.375, [7.5**0.5 - x**0.5 for x in (7.5, 14 / 3, 2.5, 1.0)]
    area = 0.125 * (room[0] + room[1]) + 0.125 * (room[1] + room[2]) + 0.25 * (room[2] + room[3])
    assert curve.share_of_oracle == pytest.approx(1 - gap / area)
    # equal std says nothing: the rms error stays, in whatever order the rows come
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        assert s.sparsification_curve(e[order], torch.ones(4), [0.5]).rmse.square().tolist() == pytest.approx([7.5])
    assert s.sparsification_curve(torch.zeros(0), torch.zeros(0), [0.1]).rmse.isnan().all()
    with pytest.raises(UserError, match="`fractions`"):
        s.sparsification_curve(e, std, [1.5])


def test_curves_take_numpy_arrays_and_are_those_of_the_scores():
    rng = np.random.default_rng(3)
    std = rng.uniform(0.5, 2, 400)
    error = std * rng.normal(size=400)
    whole = s.score_errors(torch.from_numpy(error), torch.from_numpy(std))
    coverage = s.gaussian_coverage(error / std, [0.5, 0.68, 0.9, 0.95])
    assert coverage.tolist() == [whole.coverage_50, whole.coverage_68, whole.coverage_90, whole.coverage_95]
    curve = s.reliability_curve(error / std, np.linspace(0, 1, 1001))
    assert curve.area == pytest.approx(whole.miscalibration_area, abs=1e-15)
    assert curve.bias == pytest.approx((curve.observed - curve.expected).mean().item(), abs=1e-15)
    wide = s.reliability_curve(
        error / (2 * std), np.linspace(0, 1, 1001)
    )  # std too large: intervals hold too many errors
    assert wide.bias > 0.1 and wide.area == pytest.approx(wide.bias, abs=1e-2)
    bins = s.binned_calibration(error, std, 20)
    assert [n for *_, n in bins] == [20] * 20 and np.all(np.diff([rms for rms, *_ in bins]) > 0)
    assert whole.ence == pytest.approx(np.mean([abs(p - r) / p for p, r, _ in bins]), abs=1e-14)
    order = np.argsort(std)[:20]
    assert bins[0][1] == pytest.approx(np.sqrt(np.mean(error[order] ** 2)), abs=1e-14)
    assert s.spearman_correlation(std, np.abs(error)) == whole.spearman
    assert s.area_under_roc(std, std > 1) == 1


def test_no_errors_no_coverage():
    assert s.gaussian_coverage(np.zeros(0), [0.5]).isnan().all()
