"""When a run stops: its history, the window that is judged, and all criteria together where a plateau alone would be wrong."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import scipy.stats
import torch

from gpmlp.core.errors import UserError
from gpmlp.learning.recipe import DynamicsRecipe, ObservableRecipe, PlateauRecipe, StopRecipe
from gpmlp.learning.stopping.history import History, Record
from gpmlp.learning.stopping.judge import ensemble_criterion, judge, judged_window, observable_criterion
from gpmlp.learning.walker_state import typical_force


def correlated(n: int, phi: float, seed: int, width: int = 1) -> np.ndarray:
    """(n,) or (n, width) AR(1) of variance 1, stationary."""
    noise = np.random.default_rng(seed).standard_normal((n + 2000, width))
    x = scipy.signal.lfilter([math.sqrt(1 - phi**2)], [1, -phi], noise, axis=0)[2000:]
    return x[:, 0] if width == 1 else x


# --- coverage


# --- history


def record(k: int, walker: int = 0, **others: object) -> Record:
    values = {
        "temperature_K": 300.0 + k % 7 - 3,
        "target_temperature_K": 300.0,
        "sigma_max": 0.05,
        "sigma_median": 0.02,
        "threshold": 0.1,
        "novelty_max": 0.8,
        "atoms": {13: 32},
        "observables": {"energy": -3.0 + 0.01 * math.sin(k)},
    }
    return Record(walker, 10 * k, 10.0 * k, **(values | others))


def test_typical_forces_are_those_of_the_hottest_dynamics():
    """From the latest half of the frames, scaled with the temperature; from labels while there are too few frames."""
    dynamics, history = DynamicsRecipe(temperature_K=[300, 1200]), History()
    labels = SimpleNamespace(forces=torch.tensor([[3.0, 3.0, math.nan]]))
    assert typical_force(history, dynamics, labels) == pytest.approx(3.0)
    for k in range(200):
        history = history.append(record(k, force_rms=9.0 if k < 100 else 0.5))
    assert typical_force(history, dynamics, labels) == pytest.approx(1.0)  # 0.5 at 300 K
    for k in range(200, 400):
        history = history.append(record(k, force_rms=0.5, target_temperature_K=math.nan))  # nve
    assert typical_force(history, dynamics, labels) == pytest.approx(0.5)


def test_history_grows_and_is_restored():
    history, seen = History(), []
    for k in range(200):
        extra = {"outside": {29: 2}, "outside_atoms": (k % 5, 7)} if k % 3 == 0 else {}
        observables = {"energy": float(k), "rdf": np.arange(4.0) + k} if k > 50 else {"energy": float(k)}
        seen.append(record(k, k % 2, observables=observables, labelled=k % 10 == 0, **extra))
        longer = history.append(seen[-1])
        assert len(longer) == len(history) + 1
        history = longer
    assert history.column("observable/energy")[:, 0].tolist() == list(range(200))
    assert np.isnan(history.column("observable/rdf")[50]).all()
    assert history.column("observable/rdf")[60].tolist() == [60, 61, 62, 63]
    assert history.column("outside/29").sum() == 2 * 67
    assert history.outside_atoms(3).tolist() == [3, 7]
    assert history.outside_atoms(4).tolist() == []
    assert history.species == (13,)
    assert history.walkers == (0, 1)
    assert set(history.observables) == {"energy", "rdf"}
    header, arrays = history.state()
    json.dumps(header)
    assert all(a.dtype.kind in "fib" for a in arrays.values())  # no pickle in an npz
    again = History.from_state(json.loads(json.dumps(header)), arrays)
    by_log = History()
    for r in seen:
        by_log = by_log.append(Record.from_json(json.loads(json.dumps(r.to_json(), allow_nan=False))))
    for other in (again.append(record(200)), by_log.append(record(200))):
        ours = history.append(record(200))
        for name in arrays.keys() - {"outside_atoms"}:
            assert np.array_equal(ours.column(name), other.column(name), equal_nan=True), name
        assert [ours.outside_atoms(k).tolist() for k in range(201)] == [
            other.outside_atoms(k).tolist() for k in range(201)
        ]


def test_history_does_not_change():
    short = History()
    for k in range(70):
        short = short.append(record(k))
    one, other = short.append(record(100, labelled=True)), short.append(record(101))
    assert len(short) == 70
    assert (one.column("step")[-1], other.column("step")[-1]) == (1000, 1010)
    assert (one.column("labelled")[-1], other.column("labelled")[-1]) == (True, False)
    with pytest.raises(ValueError, match="read-only"):
        one.column("step")[0] = 3
    empty = History()
    assert (len(empty), empty.walkers, len(History.from_state(*empty.state()))) == (0, (), 0)


def test_history_refuses():
    history = History().append(record(0))
    with pytest.raises(UserError, match="always the same"):
        history.append(record(1, observables={"energy": np.zeros(3)}))
    with pytest.raises(UserError, match="Perhaps you meant 'energy'"):
        history.column("observable/enery")
    with pytest.raises(UserError, match="Perhaps you meant 'sigma_max'"):
        history.column("sigma_mx")
    with pytest.raises(UserError, match="one row for each"):
        Record.from_arrays(0, 0, 0.0, np.array([13, 13]), novelty=np.zeros(3))


def test_record_of_arrays():
    species = np.array([13, 13, 29, 29])
    sigma = np.array([[0.3, 0.4, 0], [0, 0, 0.1], [0, 0, 0.2], [0, 0, 0.3]])
    found = Record.from_arrays(1, 20, 40.0, species, sigma, np.array([0.5, 1.2, 0.9, math.nan]), threshold=0.2)
    assert (found.sigma_max, found.sigma_median) == (pytest.approx(0.5), pytest.approx(0.25))
    assert found.novelty_max == math.inf
    assert (found.atoms, found.outside, found.outside_atoms) == ({13: 2, 29: 2}, {13: 1, 29: 1}, (1, 3))
    assert Record.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))).novelty_max == math.inf
    assert math.isnan(Record.from_arrays(0, 0, 0.0, species).sigma_max)


# --- the window and all together


def test_window():
    history = History()
    for k in range(100):
        for w in range(2):
            others = {"labelled": w == 0 and k in (20, 40), "ramp_finished": k >= 50 - 20 * w}
            history = history.append(record(k, w, **others))
            if k == 45 and w == 1:
                ramping = judged_window(history)
    assert ramping.ramping == (0,)
    assert [r.tolist()[0] for r in ramping.rows] == [82, 81]  # after the label of walker 0 at k = 40, ramp or not
    found = judged_window(history)
    assert found.ramping == ()
    assert [len(r) for r in found.rows] == [50, 60]
    assert found.steps == 10 * (50 + 60)
    two = judged_window(history, StopRecipe(labels_in_window=1, window_steps=700))
    assert [len(r) for r in two.rows] == [50, 70]
    assert len(judged_window(history.append(record(100, updated=True))).rows[0]) == 0
    plain = History()
    for k in range(100):
        plain = plain.append(record(k, labelled=k in (20, 40)))
    assert judged_window(plain, StopRecipe(labels_in_window=1)).label_steps == (200.0,)
    assert judged_window(plain, StopRecipe(labels_in_window=9)).label_steps == (200.0, 400.0)


def test_window_of_a_walker_that_was_set_back():
    history = History()
    for k in (*range(10), *range(5, 15)):
        history = history.append(record(k))
    assert judged_window(history).steps == 90 + 90
    assert judged_window(history, StopRecipe(window_steps=100)).steps == 90


def filled(n: int = 3000, seed: int = 30, **others: object) -> History:
    """A run that has nothing more to learn."""
    noise = correlated(n, 0.7, seed, width=5)
    history = History()
    for k in range(n):
        values = {
            "temperature_K": 300 + 10 * noise[k, 0],
            "sigma_max": 0.05 * math.exp(0.2 * noise[k, 1]),
            "sigma_median": 0.02 * math.exp(0.1 * noise[k, 2]),
            "novelty_max": 0.8 + 0.05 * noise[k, 3],
            "observables": {"energy": -3.0 + 0.003 * noise[k, 4]},
        }
        values |= {name: f(k) if callable(f) else f for name, f in others.items()}
        history = history.append(record(k, **values))
    return history


@pytest.fixture(scope="module")
def learned() -> History:
    return filled(800)


def test_stops_when_all_is_well(learned):
    verdict = judge(learned)
    assert (verdict.stop, verdict.converged, verdict.limit) == (True, True, ""), verdict.sentence
    assert [c.name for c in verdict.criteria] == ["ensemble", "plateau", "observable energy", "coverage"]
    assert verdict.sentence.startswith("stopped: ")
    json.dumps(verdict.to_json(), allow_nan=False)


def test_each_criterion_stands_in_the_way():
    cases = {
        "ensemble": {"temperature_K": lambda k: 200.0 + k % 7},
        "plateau": {"sigma_max": lambda k: 0.1 * math.exp(-k / 400)},
        "observable energy": {"observables": lambda k: {"energy": -3 + 1e-3 * k}},
        "coverage": {"novelty_max": lambda k: 2.0, "outside": lambda k: {13: 1}, "outside_atoms": lambda k: (4,)},
    }
    for name, change in cases.items():
        verdict = judge(filled(800, **change))
        assert not verdict.stop, name
        assert [c.name for c in verdict.criteria if c.met is not True] == [name], verdict.sentence
        assert verdict.sentence.startswith("not converged yet: ")
    off = StopRecipe(observable=False, coverage=False)
    assert judge(filled(800, **cases["coverage"]), off).stop
    assert judge(filled(800, **cases["observable energy"]), off).stop


def test_a_threshold_that_follows_the_forces_is_no_trend():
    """`auto` comes and goes with the rms force of the dynamics by a tenth or two; what is not known does not."""
    assert judge(filled(800, threshold=lambda k: 0.2 - 0.05 * k / 800)).converged


def test_what_is_not_known_well_enough_is_no_plateau():
    verdict = judge(filled(800, threshold=0.005))
    assert not verdict.stop and "times its limit" in verdict.sentence
    assert judge(filled(800, threshold=math.nan)).converged  # there is no limit


def test_labels_that_were_refused_or_kept_back_count():
    """Asked for and never learned: the walker does not know more, whatever its plateau looks like."""
    verdict = judge(filled(800, asked=lambda k: k % 40 == 0))
    assert not verdict.stop and "20 labels asked for" in verdict.sentence
    # a frame that asked and the label that came for it count once, though another walker's frame may lie between
    for asked, labelled in ((100, 100), (100, 103)):
        found = judged_window(filled(800, asked=lambda k, a=asked: k == a, labelled=lambda k, b=labelled: k == b))
        assert found.label_steps == (1000.0,)
    assert judged_window(filled(800, labelled=lambda k: k == 100)).label_steps == (1000.0,)


def test_a_recent_label_begins_anew(learned):
    assert not judge(learned.append(record(800, labelled=True))).stop
    assert not judge(learned.append(record(800, updated=True))).stop


def test_rare_labels_lie_within_the_window(learned):
    """The longest window over which labels are rare and uncertainty is steady; after the last label where that is over none."""

    def asked(*frames: int, **others: object) -> History:
        return filled(800, labelled=lambda k: k in frames, **others)

    assert judged_window(asked(200, 600)).label_steps == (2000.0, 6000.0)
    assert judge(asked(200, 600)).converged
    assert judged_window(asked(200, 600), StopRecipe(labels_in_window=0)).label_steps == ()
    # more often than that they are not left behind: of six in 8000 steps the rate may be 1.48, of fourteen 2.74
    often = asked(*range(20, 720, 50))
    assert (
        len(judged_window(asked(*range(20, 720, 120))).label_steps) == 6 and len(judged_window(often).label_steps) < 14
    )
    # a label was asked for less than 500 steps ago: where the walker came to then may be a new place
    assert judged_window(asked(200, 760)).label_steps == () and not judge(asked(200, 760)).stop
    assert judge(asked(200, 740)).converged
    # the first label made another model of it
    better = asked(200, 600, sigma_median=lambda k: 0.02 * (2.0 if k <= 200 else 1.0) * (1 + 0.01 * (k % 7)))
    assert judged_window(better).label_steps == (4000.0,)
    # each criterion looks at all of that window
    assert judge(asked(200, 600, observables=lambda k: {"energy": -3 + 1e-3 * k})).converged is False


def test_limits(learned):
    recipe = StopRecipe(labels_at_most=5, time_at_most_h=2)
    fresh = History().append(record(0))
    assert not judge(fresh, recipe, labels=4, elapsed_h=1.9).stop
    by_labels = judge(fresh, recipe, labels=5)
    assert (by_labels.stop, by_labels.converged, by_labels.limit) == (True, False, "labels")
    assert "not converged: 5 labels" in by_labels.sentence
    assert judge(fresh, recipe, labels=0, elapsed_h=2.1).limit == "time"
    assert judge(learned, recipe, labels=9).converged  # what is converged as well is called so
    assert not judge(learned, StopRecipe(at_least_steps=10**6)).stop
    nothing = StopRecipe(plateau=False, observable=False, coverage=False)
    assert not judge(learned, nothing).stop
    assert "switched off" in judge(learned, nothing).sentence
    assert not judge(History()).stop


def test_ensemble():
    def steps(temperature: float, **others: object) -> History:
        history = History()
        for k, x in enumerate(correlated(300, 0.5, 40)):
            history = history.append(record(k, temperature_K=temperature + 20 * x, **others))
        return history

    assert ensemble_criterion(judged_window(steps(300))).met is True
    # seven degrees off, with an interval that holds the target: told with the interval, which says why that is met
    near = ensemble_criterion(judged_window(steps(307)))
    said = re.fullmatch(r"mean temperature (\S+) ± (\S+) K \(95 %, target 300\)", near.sentence)
    assert near.met is True and said and "; " not in near.sentence  # which parts criteria on the page
    assert float(said[1]) == pytest.approx(near.numbers["temperature"], abs=0.06)
    assert float(said[2]) == pytest.approx(near.numbers["temperature_interval"], rel=0.06)
    assert ensemble_criterion(judged_window(steps(330, atoms={13: 1000}))).met is False
    assert (
        ensemble_criterion(judged_window(steps(267, atoms={6: 3, 1: 6}))).met is False
    )  # few atoms are no reason to be off
    assert ensemble_criterion(judged_window(steps(900, target_temperature_K=math.nan))).met is True
    pressure = {"pressure_GPa": 3.0, "target_pressure_GPa": 0.0}
    assert ensemble_criterion(judged_window(steps(300, **pressure))).met is False
    assert ensemble_criterion(judged_window(steps(300, ramp_finished=False))).met is False


def test_default_tolerances(learned):
    found = observable_criterion(judged_window(learned))
    assert found.numbers["tolerance"] == pytest.approx(0.1 * 8.617333262e-5 * 300)
    wanted = observable_criterion(judged_window(learned), ObservableRecipe(tolerance=0.5, relative=True))
    assert wanted.numbers["tolerance"] == pytest.approx(1.5, rel=0.01)
    missing = observable_criterion(judged_window(learned), ObservableRecipe(name="pressure"))
    assert missing.met is None
    assert "not been recorded" in missing.sentence


def test_recipe():
    assert StopRecipe.model_validate({"observable": [{"name": "energy"}, {"name": "rdf"}]}).observables[1].name == "rdf"
    for bad in ({"observable": [{}, {}]}, {"windw": 3}, {"coverage": True}, {"plateau": {"drift": 0}}):
        with pytest.raises(ValueError, match="twice|Extra|False|greater"):
            StopRecipe.model_validate(bad)
    assert StopRecipe.model_validate(StopRecipe().model_dump()) == StopRecipe()


# --- a trajectory trapped in one basin


class Learner:
    """A Gaussian process of a force f(x) in one dimension: the posterior variance decides when to ask."""

    length, signal, noise = 0.25, 3.0, 0.05

    def __init__(self) -> None:
        self.x, self.y = np.zeros(0), np.zeros(0)

    def learn(self, x: float, force: float) -> None:
        self.x, self.y = np.append(self.x, x), np.append(self.y, force)
        gram = self._kernel(self.x, self.x) + self.noise**2 * np.eye(len(self.x))
        self.factor = scipy.linalg.cho_factor(gram, lower=True)
        self.weights = scipy.linalg.cho_solve(self.factor, self.y)

    def _kernel(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return self.signal**2 * np.exp(-0.5 * ((a[:, None] - b) / self.length) ** 2)

    def __call__(self, x: float) -> tuple[float, float]:
        k = self._kernel(self.x, np.array([x]))[:, 0]
        variance = self.signal**2 - k @ scipy.linalg.cho_solve(self.factor, k)
        return float(k @ self.weights), math.sqrt(max(variance, 0.0))

    def novelty(self, x: float) -> float:
        return float(np.abs(self.x - x).min()) / (2 * self.length)


def true_force(x: float) -> float:
    """−dV/dx of V = 4 (x² − 1)²: wells at ±1, a barrier of 4."""
    return -16 * x * (x * x - 1)


def learn_on_the_fly(recipe: StopRecipe, held: int, ramp: int, cold: float, hot: float, most: int, seed: int) -> dict:
    """Langevin dynamics (BAOAB) on the learner's force: `held` steps at temperature cold, then a ramp to hot of `ramp` steps."""
    rng, learner, history = np.random.default_rng(seed), Learner(), History()
    x, v, dt, friction, threshold = -1.0, 0.0, 0.05, 1.0, 0.4
    learner.learn(x, true_force(x))
    force, _ = learner(x)
    kept, alone = math.exp(-friction * dt), []
    for step in range(1, most):
        target = cold + (hot - cold) * min(1.0, max(0.0, (step - held) / ramp))
        v += 0.5 * dt * force
        x += 0.5 * dt * v
        v = kept * v + math.sqrt((1 - kept**2) * target) * rng.standard_normal()
        x += 0.5 * dt * v
        force, sigma = learner(x)
        v += 0.5 * dt * force
        ask = sigma > threshold
        if step % 5 == 0 or ask:
            novelty = learner.novelty(x)
            history = history.append(
                Record(
                    *(0, step, dt * step, v * v, target),
                    ramp_finished=step >= held + ramp,
                    sigma_max=sigma,
                    sigma_median=sigma,
                    threshold=threshold,
                    novelty_max=novelty,
                    atoms={1: 1},
                    outside={1: int(novelty > 1)},
                    outside_atoms=(0,) if novelty > 1 else (),
                    labelled=ask,
                    observables={"energy": 4 * (x * x - 1) ** 2, "temperature": v * v},
                )
            )
        if ask:
            learner.learn(x, true_force(x))
            force, _ = learner(x)
        if step % 500 == 0:
            verdict = judge(history, recipe)
            others = [c.met for c in verdict.criteria if c.name != "ensemble"]
            if all(m is True for m in others) and not verdict.stop:
                alone.append((step, float(learner.x.max())))
            if verdict.stop:
                return {"step": step, "learner": learner, "alone": alone, "verdict": verdict, "labels": len(learner.x)}
    return {"step": most, "learner": learner, "alone": alone, "verdict": verdict, "labels": len(learner.x)}


@pytest.mark.parametrize("seed", [0, 1])
def test_two_basins_and_a_ramp(seed):
    """Cold, the walker sits in the left well: plateau, mean and coverage are all met, and the right well was never seen. A rule that
    looks only at them would stop; ours goes on through the ramp, learns the right well, and then stops."""
    recipe = StopRecipe(
        plateau=PlateauRecipe(drift=0.5),
        observable=ObservableRecipe(tolerance=0.2, relative=True),
        temperature=0.1,
    )
    run = learn_on_the_fly(recipe, held=9000, ramp=3000, cold=0.25, hot=3.0, most=60_000, seed=seed)
    trapped = [step for step, right in run["alone"] if step <= 9000 and right < 0]
    assert trapped, "without looking at the ramp it would have stopped in the first well"
    assert run["verdict"].converged, run["verdict"].sentence
    assert run["step"] > 12_000 + 1500  # fifteen hundred steps without a label after the ramp at least
    learner = run["learner"]
    assert learner.x.max() > 1.2  # the second well is known,
    for x in np.linspace(-1.4, 1.4, 29):
        force, sigma = learner(float(x))
        assert sigma < 0.6, x  # all of it,
        assert abs(force - true_force(float(x))) < 1.5, x  # and right: forces are up to 16
