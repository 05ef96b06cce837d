"""Decisions of the trigger, from predictions made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import chi2, norm

from gpmlp.core import neighbors
from gpmlp.core.quantities import Prediction, Variance
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.learning.recipe import DynamicsRecipe, GuardsRecipe, LearnRecipe, TriggerRecipe
from gpmlp.learning.stopping.history import History, Record
from gpmlp.learning.triggers import (
    COMMON,
    StepContext,
    TriggerLimits,
    asking_probability,
    broken_guard,
    covariance_moments,
    exceedance_probability,
    force_error_bound,
    frame_exceedance,
    too_close,
    trigger_decision,
    trigger_limits,
)
from gpmlp.learning.walker import Walker
from gpmlp.learning.walker_state import WalkerState, label_probability
from gpmlp.uncertainty.calibration import Calibration, KindCalibration

LIMITS = TriggerLimits(force=0.1, probability=0.1, local_energy=0.05, novelty=1.5, halt=4.0, guards=GuardsRecipe())
CALM = StepContext(energy=-1.0, target_K=300.0, temperature_K=300.0)


def structure(n=3, distance=2.8, species="Al"):
    return structures_from_ase([Atoms(f"{species}{n}", [[distance * i, 0, 0] for i in range(n)])])


def variance(total):
    none = torch.zeros_like(total)
    return Variance(none, total, none, none)


def prediction(n=3, force=0.01, local=0.001, novelty=0.5, energy=-1.0):
    """Isotropic force errors of a standard deviation, local ones, and novelties; a number or one for each atom."""
    force, local, novelty = (torch.as_tensor(v, dtype=torch.float64).expand(n) for v in (force, local, novelty))
    return Prediction(
        torch.tensor([energy], dtype=torch.float64),
        torch.full((n,), energy / n, dtype=torch.float64),
        torch.zeros(n, 3, dtype=torch.float64),
        torch.full((1, 3, 3), float("nan"), dtype=torch.float64),
        atom_energies_variance=variance(local**2),
        forces_covariance=variance((force**2)[:, None, None] * torch.eye(3, dtype=torch.float64)),
        novelty=novelty,
    )


def decide(limits=LIMITS, before=CALM, **values):
    return trigger_decision(prediction(**values), structure(), limits, before)


def largest_error(n, probability, atoms=None):
    """Of n atoms (of so many in all) with isotropic errors of unit size and a common factor, exceeded with that probability."""
    common = COMMON / (atoms or n) ** (1 / 3)

    def excess(t):
        def density(u):
            return norm.pdf(u) * chi2.cdf((t / math.exp(common * u)) ** 2, 3) ** n

        return 1 - quad(density, -8, 8)[0] - probability

    return brentq(excess, 0.01, 50)


# ---------------------------------------------------------------- probabilities


def test_exceedance_of_isotropic_errors_is_exact():
    sigma = np.array([0.02, 0.05, 0.1, 0.2])
    found = exceedance_probability(
        *covariance_moments(torch.tensor(sigma**2)[:, None, None] * torch.eye(3).double()), 0.15
    )
    assert found == pytest.approx(chi2.sf((0.15 / sigma) ** 2, 3), rel=1e-12)


@pytest.mark.parametrize("tolerance", [0.1, 0.2, 0.3])
def test_exceedance_beside_monte_carlo(tolerance):
    rng = np.random.default_rng(0)
    root = rng.standard_normal((6, 3, 3)) * 0.1 * np.array([1.0, 1.0, 0.1])
    covariance = root @ root.transpose(0, 2, 1)
    drawn = np.einsum("aij,saj->sai", root, rng.standard_normal((200_000, 6, 3)))
    truth = (np.linalg.norm(drawn, axis=2) > tolerance).mean(0)
    # Satterthwaite matches two moments of |error|^2: probabilities are right to some hundredths, not exact
    assert exceedance_probability(*covariance_moments(torch.tensor(covariance)), tolerance) == pytest.approx(
        truth, abs=0.03
    )


def test_exceedance_of_an_error_along_a_line():
    line = torch.zeros(1, 3, 3, dtype=torch.float64)
    line[0, 0, 0] = 0.01
    assert exceedance_probability(*covariance_moments(line), 0.15) == pytest.approx(chi2.sf(2.25, 1), rel=1e-12)


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("n", [1, 7, 300])
def test_bound_is_the_inverse_of_risk(n, probability):
    rng = np.random.default_rng(n)
    root = torch.tensor(rng.standard_normal((n, 3, 3))) * 0.1
    covariance = root @ root.mT
    assert frame_exceedance(covariance, force_error_bound(covariance, probability)) == pytest.approx(
        probability, rel=1e-2
    )  # xtol of brentq


def test_bound_grows_with_the_number_of_atoms_and_scales_with_errors():
    eye = torch.eye(3, dtype=torch.float64)
    few, many = force_error_bound(eye.expand(2, 3, 3), 0.1), force_error_bound(eye.expand(200, 3, 3), 0.1)
    assert few == pytest.approx(largest_error(2, 0.1), rel=0.01) and many == pytest.approx(
        largest_error(200, 0.1), rel=0.01
    )
    assert force_error_bound(1e-8 * eye.expand(2, 3, 3), 0.1) == pytest.approx(1e-4 * few, rel=1e-3)


def test_bound_where_nothing_or_everything_is_known():
    """An atom alone in its cell feels no force, whatever the model."""
    nothing = torch.zeros(2, 3, 3, dtype=torch.float64)
    assert force_error_bound(nothing, 0.1) == 0.0
    assert force_error_bound(nothing + float("nan"), 0.1) == math.inf
    one = nothing.clone()
    one[0] = 0.01 * torch.eye(3)
    assert force_error_bound(one, 0.1) == pytest.approx(0.1 * largest_error(1, 0.1, atoms=2), rel=0.01)


# ---------------------------------------------------------------- triggers


def test_all_is_well():
    found = decide()
    assert found.action == "continue" and 0 < found.severity < 1 and found.reason == ""


def test_force_asks_then_halts():
    reach = force_error_bound(torch.eye(3).double().expand(3, 3, 3), 0.1)
    asks = decide(force=0.2 / reach)
    assert asks.action == "label" and asks.severity == pytest.approx(2.0, rel=1e-3)
    assert "may reach 0.2 eV/A (limit 0.1)" in asks.reason
    halts = decide(force=0.41 / reach)
    assert halts.action == "halt" and halts.severity == pytest.approx(4.1, rel=1e-3)


def test_atoms_are_named_worst_first():
    assert decide(force=[0.1, 0.3, 0.2]).atoms == (1, 2, 0)
    assert decide(local=[0.06, 0.01, 0.07]).atoms == (2, 0, 1)
    assert decide(novelty=[1.0, 3.0, 2.0]).atoms == (1, 2, 0)


def test_local_energy_asks():
    found = decide(local=0.1)
    assert found.action == "label" and found.severity == pytest.approx(2.0)
    assert "local energy of atom" in found.reason


def test_novelty_asks():
    found = decide(novelty=[0.5, 0.5, 3.0])
    assert found.action == "label" and found.severity == pytest.approx(2.0)
    assert "Al atom 2 lies at 3 times" in found.reason
    assert decide(novelty=[0.5, 0.5, math.inf]).action == "label"


@pytest.mark.parametrize("values", [{"novelty": math.nan}, {"local": math.nan}, {"force": math.nan}])
def test_what_is_unknown_is_not_fine(values):
    found = decide(**values)
    assert found.action != "continue" and found.severity == math.inf


def test_what_is_switched_off_is_not_looked_at():
    blind = replace(LIMITS, force=None, local_energy=None, novelty=None)
    found = decide(blind, force=9.0, local=9.0, novelty=9.0)
    assert found.action == "continue" and found.severity == 0


def test_what_was_not_predicted_is_not_looked_at():
    bare = replace(prediction(force=9.0), forces_covariance=None, atom_energies_variance=None, novelty=None)
    assert trigger_decision(bare, structure(), LIMITS, CALM).action == "continue"


def test_the_order_of_importance():
    """A broken guard, then a halt, then what asks, and of these the worst; reasons of one kind are all told."""
    hot = replace(CALM, temperature_K=1e5)
    assert "temperature" in decide(before=hot, force=9.0, novelty=9.0).reason
    halts = decide(force=1.0, novelty=100.0)
    assert halts.action == "halt" and "novelty" not in halts.reason and "times the radius" not in halts.reason
    both = decide(force=0.05, novelty=3.1)
    assert both.action == "label" and "may reach" in both.reason and "times the radius" in both.reason
    assert both.severity == pytest.approx(3.1 / 1.5)
    assert decide(force=0.01, novelty=1.4).reason == ""


def test_hysteresis():
    looser = LIMITS.times(2.0)
    assert (looser.force, looser.local_energy, looser.novelty) == (0.2, 0.1, 3.0)
    assert looser.force * looser.halt == pytest.approx(LIMITS.force * LIMITS.halt)  # what halts stays
    assert LIMITS.times(10.0).halt == 1.0  # unless right after a label it was worse
    assert looser.guards == LIMITS.guards and looser.probability == LIMITS.probability
    assert replace(LIMITS, novelty=None).times(2.0).novelty is None
    assert decide(LIMITS, novelty=2.5).action == "label" and decide(looser, novelty=2.5).action == "continue"


def test_what_is_missed_is_beyond_the_limit_of_the_recipe():
    """A limit that is raised after a label lets a frame pass, and does not make its error less likely."""
    raised = LIMITS.times(1.5).times(2.0)
    plain, passes = decide(force=0.04), decide(raised, force=0.04)
    assert passes.severity == pytest.approx(plain.severity / 3)
    assert 0 < plain.exceedance < 1 and passes.exceedance == pytest.approx(plain.exceedance, rel=1e-12)


def test_limits_are_raised_around_a_labelled_frame_alone():
    """Steps on the way to a frame that was labelled ahead are judged as all others are."""
    trigger = TriggerRecipe(every=60, cooldown=20, hysteresis=1.25)
    place = Walker.from_atoms(0, bulk("Al", cubic=True), DynamicsRecipe(temperature_K=300), 0)
    for step, expected in ((0, 1.0), (240, 1.0), (241, 2.5), (300, 2.5), (319, 2.5), (320, 1.0)):
        here = replace(place, step=step)
        state = WalkerState(here, here, label_step=300, label_severity=2.0)
        assert state.limit_factor(trigger) == expected, step
    assert state.limit_factor(trigger.model_copy(update={"cooldown": 21})) == 2.5


# ---------------------------------------------------------------- guards


def test_distance_guard():
    radius = 1.21  # of aluminium (Cordero 2008)
    share = GuardsRecipe().distance
    least = share * 2 * radius
    assert too_close(structure(distance=least + 0.01), share) is None
    i, j, r, limit = too_close(structure(distance=least - 0.01), share)
    assert {i, j} <= {0, 1, 2} and r == pytest.approx(least - 0.01) and limit == pytest.approx(least)
    found = trigger_decision(prediction(), structure(distance=least - 0.01), LIMITS, CALM)
    assert found.action == "halt" and "Al-Al distance 1.44 A of atoms" in found.reason


def test_distance_guard_sees_periodic_images():
    atoms = Atoms("Al2", [[0.1, 0, 0], [7.0, 0, 0]], cell=[8, 8, 8])
    assert too_close(structures_from_ase([atoms]), 0.6) is None
    atoms.pbc = True
    i, j, r, _ = too_close(structures_from_ase([atoms]), 0.6)
    assert {i, j} == {0, 1} and r == pytest.approx(1.1)
    alone = Atoms("Al", cell=[8, 8, 1.2], pbc=True)
    assert too_close(structures_from_ase([alone]), 0.6)[:3] == (0, 0, pytest.approx(1.2))


def test_distance_guard_takes_the_pairs_of_the_model():
    """The same pair is found in a list of a longer cutoff; one of a shorter cutoff cannot answer and is not asked."""
    atoms = Atoms("OH3", [[0, 0, 0], [0.5, 0, 0], [0, 1.0, 0], [0, 3.0, 0]], cell=[6, 6, 6], pbc=True)
    here = structures_from_ase([atoms])
    for cutoff in (4.0, 0.45):
        assert too_close(here, 0.6, neighbors.find_neighbors(here, cutoff)) == too_close(here, 0.6)
    before = replace(CALM, pairs=neighbors.find_neighbors(here, 4.0))
    assert broken_guard(prediction(4), here, GuardsRecipe(), before) == broken_guard(
        prediction(4), here, GuardsRecipe(), CALM
    )
    assert "distance 0.50" in broken_guard(prediction(4), here, GuardsRecipe(), before).reason


def test_distance_guard_knows_the_elements():
    pair = structures_from_ase([Atoms("OH", [[0, 0, 0], [0.9, 0, 0]])])
    assert too_close(pair, 0.6) is None
    assert too_close(structures_from_ase([Atoms("O2", [[0, 0, 0], [0.75, 0, 0]])]), 0.6) is not None


def test_temperature_guard():
    def at(temperature, n=100, freedom=None, target=300.0):
        before = StepContext(None, target, temperature, freedom)
        return broken_guard(prediction(n), structure(n), GuardsRecipe(), before)

    assert at(700.0) is None
    assert "temperature 900 K at a target of 300 K" in at(900.0).reason
    assert at(float("inf")).severity == math.inf and at(float("nan")) is not None
    assert at(120.0, target=0.0) is None  # no target below 50 K


@pytest.mark.parametrize("freedom", [3, 6, 30, 300])
def test_temperature_guard_allows_for_fluctuation(freedom):
    """Few atoms are often twice as hot as the thermostat, be they few because the others are fixed."""
    n = 100
    hottest = 300 * chi2.isf(1e-6, freedom) / freedom  # once in a million steps
    wide = StepContext(None, 300.0, hottest, freedom)
    assert broken_guard(prediction(n), structure(n), GuardsRecipe(), wide) is None


def test_energy_guard():
    def after(energy, target=300.0):
        return broken_guard(prediction(energy=energy), structure(), GuardsRecipe(), StepContext(-1.0, target, target))

    allowed = 0.3 + 3 * 8.617333e-5 * 300
    assert after(-1.0 + 2.9 * allowed) is None and after(-1.0 - 2.9 * allowed) is None
    assert "energy changed by" in after(-1.0 + 3.1 * allowed).reason
    assert after(-1.0 - 3.1 * allowed).action == "halt"
    assert after(-1.0 + 3.1 * allowed, target=3000.0) is None  # hot atoms gain more in a step


@pytest.mark.parametrize("name", ["energies", "forces"])
def test_nan_halts(name):
    bad = replace(prediction(), **{name: getattr(prediction(), name) * float("nan")})
    found = trigger_decision(bad, structure(), LIMITS, None)
    assert found.action == "halt" and "not finite" in found.reason and found.severity == math.inf


# ---------------------------------------------------------------- limits


def identity(scale=1.0):
    kind = replace(KindCalibration.identity(), scale=scale)
    return Calibration({**Calibration.identity().kinds, "forces": kind}, {})


def test_automatic_limit_is_a_share_of_the_forces():
    limits = trigger_limits(TriggerRecipe(), 1.0, 32, {"forces": 0.001}, identity())
    assert limits.force == pytest.approx(0.15 * 3**0.5)
    assert (limits.novelty, limits.local_energy, limits.halt) == (3.0, None, 4.0)


def test_automatic_limit_is_no_less_than_the_noise_allows():
    eye = torch.eye(3, dtype=torch.float64)
    quiet = trigger_limits(TriggerRecipe(), 0.1, 32, {"forces": 0.1}, identity()).force
    assert quiet == pytest.approx(
        1.2 * force_error_bound(0.01 * eye.expand(32, 3, 3), TriggerRecipe().probability, common=0.0), rel=1e-3
    )
    assert trigger_limits(TriggerRecipe(), 0.1, 32, {"forces": 0.1}, identity(2.0)).force == pytest.approx(
        2 * quiet, rel=1e-3
    )
    assert trigger_limits(TriggerRecipe(), 0.1, 400, {"forces": 0.1}, identity()).force > quiet  # the largest of more


def test_a_limit_by_the_noise_knows_no_forces():
    noise = trigger_limits(TriggerRecipe(force="noise"), 50.0, 32, {"forces": 0.1}, identity()).force
    assert noise == trigger_limits(TriggerRecipe(), 1e-3, 32, {"forces": 0.1}, identity()).force
    threefold = trigger_limits(TriggerRecipe(force="noise", noise=3.6), 1.0, 32, {"forces": 0.1}, identity()).force
    assert threefold == pytest.approx(3 * noise, rel=1e-12)


def test_automatic_limit_without_noise_or_forces():
    assert trigger_limits(TriggerRecipe(), 0.0, 1, {}, Calibration({}, {})).force == 1e-4


def test_given_limits_are_taken():
    given = TriggerRecipe(force=0.3, local_energy=0.02, novelty=None, halt=2.0)
    limits = trigger_limits(given, 1.0, 32, {"forces": 9.0}, identity())
    assert (limits.force, limits.local_energy, limits.novelty, limits.halt) == (0.3, 0.02, None, 2.0)
    assert trigger_limits(TriggerRecipe(force=None), 1.0, 32, {}, identity()).force is None


def test_novelty_that_neither_asks_nor_counts_as_covered_is_refused():
    """Between trigger.novelty and coverage's `far` a run would neither label nor stop."""
    recipe = {"start": "a.xyz", "oracle": {"calculator": "emt"}, "dynamics": {"temperature_K": 300}}
    default = LearnRecipe.model_validate(recipe)
    assert default.trigger.novelty <= default.stop.coverage.far
    with pytest.raises(ValueError, match=r"trigger\.novelty 4 is above stop\.coverage\.far 3"):
        LearnRecipe.model_validate(recipe | {"trigger": {"novelty": 4.0}})
    strict = LearnRecipe.model_validate(recipe | {"stop": {"coverage": {"far": 1.5}}})
    assert default.novelty_limit == 3.0 and strict.novelty_limit == 1.5  # what is left out follows
    assert LearnRecipe.model_validate(strict.model_dump(mode="json")) == strict  # as the folder of a run has it
    LearnRecipe.model_validate(recipe | {"trigger": {"novelty": 2.0}, "stop": {"coverage": {"far": 2.0}}})
    LearnRecipe.model_validate(recipe | {"trigger": {"novelty": 2.0}, "stop": {"coverage": False}})
    LearnRecipe.model_validate(recipe | {"trigger": {"novelty": None}})


# ---------------------------------------------------------------- how likely an error has to be


def asking(largest, missed, allowed=20.0, trigger=None):
    return asking_probability(np.asarray(largest), np.asarray(missed), allowed, trigger or TriggerRecipe(likely=0.7))


def test_a_label_is_asked_for_where_an_error_is_likely():
    """Strides of which all but a few are sure: they may pass up to `likely`."""
    assert asking([0.001] * 49 + [0.4], [0.0] * 49 + [12.0]) == 0.7
    assert asking([], []) == 0.7 and asking([math.nan] * 10, [math.nan] * 10) == 0.7  # nothing is known of frames yet
    assert asking([0.001] * 49 + [0.75, 0.8], [0.01] * 49 + [30, 30]) == 0.7  # these are asked for anyway
    assert asking([0.4, 0.1], [12.0, 9.0], allowed=21.0) == 0.7 and asking([0.4, 0.1], [12.0, 9.0], allowed=20.9) == 0.4


def test_errors_that_pass_are_rationed():
    """Where too many would pass, strides with the highest probabilities are labelled until the others are few enough."""
    largest = np.array([0.001] * 42 + [0.05] * 3 + [0.08] * 3 + [0.4] * 4 + [0.6])
    missed = 20 * largest
    found = asking(largest[::-1], missed[::-1], allowed=23.0)
    assert found == 0.4  # a label is asked for at more than that: of what is like the last of these
    assert missed[largest < found].sum() <= 23.0 < missed[largest <= found].sum()
    assert asking([0.1] * 50, [1.0] * 50) == 0.1
    assert asking([0.01] * 50, [1.0] * 50) == 0.02  # never less than `probability`
    assert asking([0.1] * 50, [0.1] * 50, trigger=TriggerRecipe(probability=0.02, likely=0.02)) == 0.02


def passed(history, step, largest, missed, walker=0, **flags):
    return history.append(Record(walker, step, 0.0, exceedance=largest, missed=missed, threshold=1.0, **flags))


def test_what_may_pass_is_a_share_of_the_steps():
    """Of all walkers; a walker that goes back does not count twice, nor do strides that are walked again."""
    history = History()
    for k in range(1, 31):
        for walker in (0, 1):
            history = passed(history, 60 * k, 0.4 if k <= 20 else 0.001, 0.01 if k <= 20 else 0.0, walker)
    trigger = TriggerRecipe(likely=0.7)
    assert label_probability(history, trigger) == 0.7  # what is unsure is more than 1000 steps ago
    again = passed(history, 1860, 0.6, 0.9, asked=True)
    assert label_probability(again, trigger) == 0.7  # a stride that was given up for a label
    again = passed(passed(again, 1260, 0.4, 1.0), 1320, 0.4, 1.0)
    assert label_probability(again, trigger) == 0.7  # 1200 steps of before are made again
    again = passed(again, 1860, 0.4, 0.4)
    assert label_probability(again, trigger) == 0.7  # 24 steps, and 24 before, where 73 may be
    # 30 more, those of the worse stride: they have to go
    assert label_probability(passed(again, 1890, 0.5, 1.0), trigger) == 0.5


def test_what_was_missed_too_often_is_made_up_for():
    """Labels are asked for at `probability` until all steps together have missed no more than that share."""
    history, trigger = passed(History(), 60, 0.001, 0.0), TriggerRecipe(likely=0.7)
    history = passed(history, 120, 0.6, 0.59)  # 35 of 120 steps, where 2 may be
    for k in range(
        2, 40
    ):  # that have been made; the unsure one is among the latest 1000 steps of up to 17, and 35 is .02 of 1770
        assert label_probability(history, trigger) == (0.6 if k <= 17 else 0.02 if k < 30 else 0.7), k
        history = passed(history, 60 * (k + 1), 0.001, 0.0)


def test_a_stride_whose_label_was_withheld_counts_as_passed():
    history, trigger = History(), TriggerRecipe(likely=0.7)
    for k in range(1, 31):
        history = passed(history, 60 * k, 0.001, 0.0)
    assert label_probability(passed(history, 1860, 0.6, 0.9, asked=True), trigger) == 0.7  # it was made again
    assert label_probability(passed(history, 1860, 0.6, 0.9, asked=True, withheld=True), trigger) == 0.6  # 54 steps


def test_what_an_old_run_missed_is_unknown():
    """Strides of a checkpoint without `missed` neither count as missed nor let the next ones miss more."""
    old, trigger = History(), TriggerRecipe(likely=0.7)
    for k in range(1, 101):
        old = passed(old, 60 * k, 0.4, math.nan)
    header, arrays = old.state()
    old = History.from_state(
        header, {name: values for name, values in arrays.items() if name not in ("missed", "withheld")}
    )
    assert np.isnan(old.column("missed")).all() and not old.column("withheld").any()
    assert label_probability(old, trigger) == 0.7
    new = passed(old, 6060, 0.6, 0.9)
    assert np.isnan(new.column("missed")[:-1]).all() and new.column("missed")[-1] == 0.9
    assert label_probability(new, trigger) == 0.6  # 54 of the 60 steps that are known, and not of 6060
    assert label_probability(passed(old, 6060, 0.4, 0.01), trigger) == 0.7


def test_what_was_not_missed_before_may_be_missed_now():
    sure, trigger = History(), TriggerRecipe(likely=0.7)
    for k in range(1, 101):
        sure = passed(sure, 60 * k, 0.001, 0.0)
    for unsure, expected in ((10, 0.7), (14, 0.6)):  # of 6600 and 6840 steps 132 and 137 may be missed
        history = sure
        for k in range(101, 101 + unsure):
            history = passed(history, 60 * k, 0.6, 0.18)
        assert label_probability(history, trigger) == expected, unsure


def test_probability_of_a_frame():
    covariance = 0.01 * torch.eye(3, dtype=torch.float64).expand(7, 3, 3)
    bound = force_error_bound(covariance, 0.3)
    assert frame_exceedance(covariance, bound) == pytest.approx(0.3, rel=1e-2)
    each = chi2.sf(0.25**2 / 0.01, 3)
    assert frame_exceedance(covariance, 0.25, common=0.0) == pytest.approx(1 - (1 - each) ** 7, rel=1e-12)
    rng = np.random.default_rng(0)
    errors = (
        0.1
        * np.exp(COMMON / 7 ** (1 / 3) * rng.standard_normal((100_000, 1)))
        * chi2.rvs(3, size=(100_000, 7), random_state=1) ** 0.5
    )
    for tolerance in (0.2, 0.3, 0.5):
        found = frame_exceedance(covariance, tolerance)
        assert found == pytest.approx((errors.max(1) > tolerance).mean(), abs=0.01)
    assert frame_exceedance(covariance * math.inf, 0.25) == 1.0
