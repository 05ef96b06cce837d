"""Each stop criterion on series whose answer is known: plateau, observables, coverage."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import scipy.stats

from gpmlp.core.errors import UserError
from gpmlp.learning.recipe import CoverageRecipe, PlateauRecipe
from gpmlp.learning.stopping.criteria import (
    NoveltySeries,
    all_met,
    coverage_criterion,
    label_rate_criterion,
    mean_criterion,
    plateau_criterion,
    steady_criterion,
)


def correlated(n: int, phi: float, seed: int, width: int = 1) -> np.ndarray:
    """(n,) or (n, width) AR(1) of variance 1, stationary."""
    noise = np.random.default_rng(seed).standard_normal((n + 2000, width))
    x = scipy.signal.lfilter([math.sqrt(1 - phi**2)], [1, -phi], noise, axis=0)[2000:]
    return x[:, 0] if width == 1 else x


# --- plateau


def test_steady():
    times = np.arange(600.0) * 10
    noise = np.exp(0.2 * correlated(600, 0.8, 1))
    flat = steady_criterion("largest", [noise], [times])
    assert flat.met is True, flat
    assert "steady" in flat.sentence
    falling = steady_criterion("largest", [noise * np.exp(-times / 6000)], [times])
    assert falling.met is False
    assert "falling" in falling.sentence
    rising = steady_criterion("largest", [noise * np.exp(times / 6000)], [times])
    assert rising.met is False
    assert "rising" in rising.sentence
    # units of σ and of time do not matter
    same = steady_criterion("largest", [1e-3 * noise], [7 * times])
    assert (same.met, same.numbers["drift"]) == (True, pytest.approx(flat.numbers["drift"]))


def test_steady_with_outliers():
    times, sigma = np.arange(600.0), np.exp(0.1 * correlated(600, 0.7, 2))
    sigma[[5, 40, 77]] = 30
    assert steady_criterion("largest", [sigma], [times]).met is True


def test_steady_refuses_to_judge():
    # 400 frames, but a correlation time of 199
    slow = steady_criterion("largest", [np.exp(0.1 * correlated(400, 0.99, 3))], [np.arange(400.0)])
    assert slow.met is None
    assert "correlation times" in slow.sentence
    assert steady_criterion("largest", [np.ones(3)], [np.arange(3.0)]).met is None
    assert steady_criterion("largest", [np.full(50, math.nan)], [np.arange(50.0)]).met is None
    # so noisy that a large drift cannot be excluded
    noisy = steady_criterion("largest", [np.exp(1.0 * correlated(60, 0.3, 4))], [np.arange(60.0)])
    assert noisy.met is None
    assert "cannot be excluded" in noisy.sentence


def test_a_significant_but_tiny_trend_does_not_count():
    times = np.arange(20_000.0)
    sigma = 1 + 0.02 * correlated(20_000, 0.3, 5) - 0.01 * times / 20_000
    found = steady_criterion("median", [sigma], [times])
    assert found.numbers["p"] < 1e-3
    assert found.met is True


def test_rate_of_labels():
    recipe = PlateauRecipe(labels_per_1000_steps=1.0)
    assert label_rate_criterion([], 2900, recipe).met is None  # −ln 0.05 = 3.00
    assert label_rate_criterion([], 3000, recipe).met is True
    assert label_rate_criterion([100, 2000, 3500], 4000, recipe).met is None
    assert label_rate_criterion(np.linspace(10, 990, 30), 1000, recipe).met is False
    early = label_rate_criterion([10, 50, 60, 200, 300, 500], 20_000, recipe)
    assert early.met is False
    assert "still getting rarer" in early.sentence
    assert label_rate_criterion([], 0, recipe).met is None


@pytest.mark.parametrize("labels", [1, 2, 7])
def test_bounds_of_the_rate_with_labels(labels):
    """Poisson's, by the chi-squared distribution: rare if its 95 % upper bound is, not rare if its 95 % lower bound is not."""
    recipe = PlateauRecipe(labels_per_1000_steps=2.0)
    highest, lowest = scipy.stats.chi2.ppf(0.95, 2 * labels + 2) / 2, scipy.stats.chi2.ppf(0.05, 2 * labels) / 2
    for factor, met in ((1.01, True), (0.99, None)):
        steps = 1000 * highest / 2.0 * factor
        found = label_rate_criterion(np.linspace(0, steps, labels + 2)[1:-1], steps, recipe)
        assert found.met is met
        assert found.numbers["per_1000_steps_at_most"] == pytest.approx(1000 * highest / steps)
    for factor, met in ((1.01, None), (0.99, False)):
        steps = 1000 * lowest / 2.0 * factor
        assert label_rate_criterion(np.linspace(0, steps, labels + 2)[1:-1], steps, recipe).met is met


def test_plateau_needs_all_three():
    times = [np.arange(800.0) * 10]
    sigma = [0.5 * np.exp(0.1 * correlated(800, 0.5, 6))]
    assert plateau_criterion(sigma, sigma, times, [], 8000).met is True
    assert plateau_criterion(sigma, sigma, times, [], 800).met is None
    fall = [sigma[0] * np.linspace(2, 1, 800)]
    assert plateau_criterion(fall, sigma, times, [], 8000).met is False
    assert plateau_criterion(sigma, fall, times, [], 8000).met is False
    both = plateau_criterion(fall, fall, times, [], 8000)
    assert both.sentence.count("it is still falling") == 1 and both.sentence.count("force uncertainty changes") == 2
    assert all_met([True, None]) is None
    assert all_met([None, False]) is False
    assert all_met([]) is True


# --- observables


def test_converged():
    x = correlated(4000, 0.9, 7)
    exact = math.sqrt(19 / 4000)
    good = mean_criterion("energy", [x], 1.4 * exact, False)
    assert good.met is True, good
    assert good.numbers["sem"] == pytest.approx(exact, rel=0.3)
    assert mean_criterion("energy", [x], 0.5 * exact, False).met is False
    assert mean_criterion("energy", [x + 100], 0.01, True).met is True
    assert mean_criterion("energy", [x + 100], 1e-4, True).met is False
    # rows that are not known are left out
    holes = np.concatenate([np.full(100, math.nan), x])
    assert mean_criterion("energy", [holes], 1.4 * exact, False).numbers == good.numbers


def test_converged_refuses_below_20_correlation_times():
    short = mean_criterion("energy", [correlated(1900, 0.99, 8)], 10.0, False)  # g = 199: 9.5 times
    assert short.met is None
    assert "correlation times so far, 20 are needed" in short.sentence
    assert mean_criterion("energy", [np.ones(2)], 1.0, False).met is None


def test_a_jump_in_the_middle_is_seen():
    x = correlated(2000, 0.5, 9)
    x[1000:] += 1.5
    assert mean_criterion("energy", [x], 10.0, False).met is not True
    ramp = correlated(4000, 0.3, 10) + np.linspace(0, 3, 4000)
    assert mean_criterion("energy", [ramp], 10.0, False).met is not True


@pytest.mark.parametrize("jump", [0.2, 0.5])
def test_halves_that_differ_are_told(jump):
    """Though everything else is well: the standard error is small enough, and there are enough correlation times."""
    x = correlated(4000, 0.3, 40)
    assert mean_criterion("energy", [x], 0.1, False).met is True
    x[2000:] += jump
    found = mean_criterion("energy", [x], 0.1, False)
    assert found.met is False and "the second half differs from the first by" in found.sentence
    assert found.numbers["sem"] < 0.1 and found.numbers["correlation_times"] > 20
    assert found.numbers["halves_difference"] == pytest.approx(jump, abs=0.06) and found.numbers["halves_p"] < 0.001
    assert mean_criterion("energy", [x], 1.1 * jump, False).met is True  # where so much is tolerated


def test_equilibration_is_left_out():
    x = 0.3 * correlated(3000, 0.7, 11) + 20 * np.exp(-np.arange(3000) / 100)
    found = mean_criterion("energy", [x], 0.1, False)
    assert found.met is True
    assert abs(found.numbers["mean"]) < 0.05
    assert found.numbers["frames"] < 2800


def test_walkers_in_different_basins():
    basins = [correlated(2000, 0.5, 12 + w) + 5 * (w % 2) for w in range(4)]
    assert mean_criterion("energy", basins, 10.0, False).met is None  # hopping between them takes longer than the run
    together = [correlated(2000, 0.5, 12 + w) for w in range(4)]
    assert mean_criterion("energy", together, 0.05, False).met is True


def test_vector_observables():
    x = 1 + 0.2 * correlated(2000, 0.8, 16, width=40)
    found = mean_criterion("rdf", [x], 0.05, False)
    assert found.met is True, found
    exact = 0.2 * math.sqrt(9 / 2000)
    assert found.numbers["sem"] == pytest.approx(exact, rel=0.4)
    x[:, :3] += 0.4 * correlated(2000, 0.999, 17)[:, None]  # few bins that move slowly are not averaged away
    assert mean_criterion("rdf", [x], 0.05, False).met is None


def test_false_alarms_of_halves_are_rare():
    wrong = [mean_criterion("energy", [correlated(1500, 0.9, 100 + k)], 1.0, False).met is False for k in range(100)]
    assert np.mean(wrong) <= 0.05


def novelties(novelty: np.ndarray, species: np.ndarray | None = None) -> NoveltySeries:
    """Of (frames, atoms) of one walker."""
    species = np.full(novelty.shape[1], 13) if species is None else species
    outside = novelty > 1
    return NoveltySeries(
        [novelty.max(1)],
        {int(z): [np.full(len(novelty), int((species == z).sum()))] for z in np.unique(species)},
        {int(z): [outside[:, species == z].sum(1)] for z in np.unique(species)},
        [outside.mean(0)],
    )


def usual(frames: int, atoms: int, seed: int) -> np.ndarray:
    """Novelty of environments like the held-out ones: 1 % lie above 1 by construction, and nearly none above 1.5."""
    rng = np.random.default_rng(seed)
    return np.sqrt(rng.chisquare(40, (frames, atoms)) / 63.69)


@pytest.mark.parametrize("atoms", [9, 108, 1000])
def test_usual_frames_are_inside(atoms):
    """Of 1000 atoms ten are outside in each frame, because that is what the threshold means."""
    novelty = usual(300, atoms, 20)
    assert 0.008 < (novelty > 1).mean() < 0.012
    found = coverage_criterion(novelties(novelty))
    assert found.met is True, found
    assert found.numbers["frames"] > 0.97


@pytest.mark.parametrize("far", [1.05, 1.3, 5.0, math.inf])
def test_one_percent_of_alien_atoms_is_not_averaged_away(far):
    """Ten of 1000 atoms are always outside; 1 % more is within what the share of all atoms allows."""
    novelty = usual(300, 1000, 21)
    novelty[:, 100:110] = far
    found = coverage_criterion(novelties(novelty))
    assert found.numbers["atoms_inside"] > 0.97
    assert found.met is False
    assert found.numbers["lasting_atoms"] == 10
    assert "10 atoms are outside" in found.sentence
    # and where all others are well inside, so that the share is just that of the quantile
    calm = np.full((300, 1000), 0.5)
    calm[:, 100:110] = far
    assert coverage_criterion(novelties(calm)).met is False


def test_alien_atoms_that_change():
    """Each frame other ones: nobody lasts, but they are too far, or too many for chance."""
    rng = np.random.default_rng(22)
    for level, number in ((2.0, 10), (1.1, 30)):
        novelty = usual(300, 1000, 23)
        for row in novelty:
            row[rng.choice(1000, number, replace=False)] = level
        found = coverage_criterion(novelties(novelty))
        assert found.met is False, found
        assert found.numbers["lasting_atoms"] == 0


def test_a_rare_species_is_judged_by_itself():
    species = np.full(1000, 13)
    species[:5] = 29
    novelty = usual(300, 1000, 24)
    novelty[:, :5] = np.where(np.random.default_rng(25).random((300, 5)) < 0.15, 1.2, 0.5)
    found = coverage_criterion(novelties(novelty, species))
    assert found.met is False
    assert "Cu" in found.sentence
    assert found.numbers["Cu_inside"] == pytest.approx(0.85, abs=0.03)
    assert found.numbers["Al_inside"] > 0.98


def test_the_sentence_shows_why_it_is_met():
    """Of a species 97 % need not be reached, only be possible: the interval, and both numbers that it is judged by."""
    species = np.where(np.arange(1000) < 20, 29, 13)
    novelty = usual(300, 1000, 24)
    novelty[:, :20] = np.where(np.random.default_rng(25).random((300, 20)) < 0.031, 1.2, 0.5)
    found = coverage_criterion(novelties(novelty, species))
    share, low = found.numbers["Cu_inside"], found.numbers["Cu_inside_at_least"]
    assert found.met is True and 0.965 < share < 0.97 and low < 0.97
    match = re.search(r"([\d.]+)% of Cu inside, ([\d.]+)% to ([\d.]+)%", found.sentence)
    assert match and float(match[1]) == pytest.approx(100 * share, abs=6e-3)
    assert float(match[2]) == pytest.approx(100 * low, abs=6e-3) and float(match[3]) > 97
    assert "wanted: 90.00% or more for sure, 97.00% possible)" in found.sentence
    # the page shows parts between semicolons on lines of their own
    assert all(part.count("(") == part.count(")") for part in found.sentence.split("; "))
    assert "of atoms inside" in found.sentence and "wanted: 97.00% or more for sure)" in found.sentence


def test_coverage_refuses_to_judge():
    assert coverage_criterion(novelties(usual(5, 100, 26))).met is None
    # a novelty that hardly changes in 300 frames
    slow = 0.6 + 0.05 * correlated(300, 0.995, 27)[:, None] * np.ones(100)
    assert coverage_criterion(novelties(slow)).met is None
    unknown = usual(300, 100, 28)
    unknown[3] = math.nan
    found = coverage_criterion(replace(novelties(unknown), largest=[unknown.max(1)]))
    assert found.met is None
    assert "not computed" in found.sentence
    with pytest.raises(UserError, match="between 0 and 1"):
        coverage_criterion(novelties(unknown), 1.0)


def test_coverage_of_part_of_the_frames():
    novelty = usual(400, 50, 29)
    novelty[200:280] = 1.8  # a fifth of the time elsewhere
    assert coverage_criterion(novelties(novelty)).met is False
    assert (
        coverage_criterion(
            novelties(novelty), recipe=CoverageRecipe(frames=0.5, atoms=0.5, far=2.0, persistent=0.5)
        ).met
        is not True
    )
