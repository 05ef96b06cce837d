"""Judges whether a run stops: all criteria over the same recent frames of its history, in the ensemble of the recipe, or a limit.

A trapped trajectory shows a plateau, a converged mean and full coverage. So nothing is met while temperature or pressure of any walker
are still changing, frames count only from then on, and the ensemble must be that of the recipe. docs/stopping.md has more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from gpmlp.core.quantities import json_value
from gpmlp.core.units import BOLTZMANN
from gpmlp.learning.recipe import ObservableRecipe, PlateauRecipe, StopRecipe
from gpmlp.learning.stopping.criteria import (
    NoveltySeries,
    StopCriterion,
    all_met,
    coverage_criterion,
    label_rate_criterion,
    mean_criterion,
    plateau_criterion,
)
from gpmlp.learning.stopping.history import History, Record
from gpmlp.uncertainty.timeseries import ENOUGH, series_mean

__all__ = ("History", "Record", "StopRecipe", "StopVerdict", "judge")  # with what a judgement is made from
# of the standard error of the mean: (tolerance, relative, unit); energy is in units of k_B T of the window
TOLERANCES = {
    "energy": (0.1, False, "eV/atom"),
    "pressure": (0.2, False, "GPa"),
    "temperature": (0.02, True, "K"),
    "rdf": (0.05, False, ""),
    "msd": (0.1, True, "Å²"),
    "diffusion": (0.2, True, "Å²/fs"),
}
CUSTOM = (0.05, True, "")
ROOM = 300.0  # K, where there is no temperature
NOTHING = {True: "no thermostat: constant energy", False: "too few frames yet"}
PRESSURE = 0.2  # GPa that the mean pressure may lie off its target


@dataclass(frozen=True)
class StopVerdict:
    """Whether to stop, and why.

    Attributes:
        stop: whether the run should end now; converged: whether that is because every criterion that is on is met.
        sentence: all of it in words.
        limit: the limit that was reached ('labels', 'time'), or ''.
    """

    stop: bool
    converged: bool
    criteria: tuple[StopCriterion, ...]
    sentence: str
    limit: str = ""

    def to_json(self) -> dict:
        """The verdict for JSON; numbers that are not finite become null."""
        criteria = [asdict(c) | {"numbers": {k: float(v) for k, v in c.numbers.items()}} for c in self.criteria]
        names = ("stop", "converged", "limit", "sentence")
        return json_value({name: getattr(self, name) for name in names} | {"criteria": criteria})


@dataclass(frozen=True, eq=False)
class JudgedWindow:
    """The recent frames over which everything is judged.

    Attributes:
        rows: by walker, their places in the history, in time order.
        steps: of all walkers together; label_steps: those from the start of the window to each request for a label, granted or not.
        ramping: walkers whose temperature or pressure are still to change.
    """

    history: History
    rows: tuple[np.ndarray, ...]
    steps: float
    label_steps: tuple[float, ...]
    ramping: tuple[int, ...]

    def series(self, name: str) -> list[np.ndarray]:
        """A column of the history, by walker."""
        column = self.history.column(name)
        return [column[rows] for rows in self.rows]

    @property
    def frames(self) -> int:
        return sum(len(rows) for rows in self.rows)


def judged_window(history: History, recipe: StopRecipe = StopRecipe()) -> JudgedWindow:
    """The frames after the last label (or after one of the `labels_in_window` before) and the last change of the model.

    Where the recipe leaves the number of labels open it is the longest such window over which the plateau is met, for labels that are
    rare and change little need not end what is judged; but only once there were as many steps without a label as are wanted between
    two, else after the last label. It begins no earlier than the ramps of all walkers ended, and `window_steps` ago. While a ramp is
    going on, its end is left out of account: the window then shows what would be judged without it.
    """
    last, wanted = _after(history, recipe, recipe.labels_in_window or 0), recipe.plateau
    if recipe.labels_in_window is not None or wanted is False or last.ramping:
        return last
    if last.steps < 1000 / wanted.labels_per_1000_steps:
        return last
    rare, before = [], last.steps
    for labels in range(1, int(history.column("labelled").sum()) + 1):
        longer = _after(history, recipe, labels)
        if longer.steps <= before:  # a ramp, or another change of the model, is where it begins
            break
        before = longer.steps
        if label_rate_criterion(longer.label_steps, longer.steps, wanted).met:
            rare.append(longer)
    return next((w for w in reversed(rare) if plateau_of_window(w, wanted).met), last)


def _after(history: History, recipe: StopRecipe, labels: int) -> JudgedWindow:
    """The window with so many labels in it."""
    walkers, walker = history.walkers, history.column("walker")
    labelled, updated, done = (history.column(name).astype(bool) for name in ("labelled", "updated", "ramp_finished"))
    triggered = _triggered(history.column("asked").astype(bool), labelled)
    step = history.column("step")
    by_walker = [(walker == w).nonzero()[0] for w in walkers]
    ramping = tuple(int(w) for w, rows in zip(walkers, by_walker, strict=True) if not done[rows[-1]])
    # the row of the k-th last label belongs to what was before: the model changed after it
    asked = labelled.nonzero()[0]
    start = int(asked[-1 - labels]) + 1 if len(asked) > labels else 0
    changes = updated.nonzero()[0]
    start = max(start, int(changes[-1]) + 1 if len(changes) else 0)
    rows = []
    for every in by_walker:
        first = start
        if not ramping:
            unfinished = every[~done[every]]
            first = max(first, int(unfinished[-1]) + 1 if len(unfinished) else 0)
        recent = every[every >= first]
        if recipe.window_steps is not None and len(recent):
            recent = recent[step[recent] > step[recent[-1]] - recipe.window_steps]
            # a walker that was set back has passed those steps twice: only the last time counts
            back = (np.diff(step[recent]) <= 0).nonzero()[0]
            recent = recent[back[-1] + 1 :] if len(back) else recent
        rows.append(recent)
    steps, label_steps = _steps(rows, by_walker, step, triggered)
    return JudgedWindow(history, tuple(rows), steps, label_steps, ramping)


def _triggered(asked: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """(frames,) whether a label was wanted there: where one was asked for, and where one came that no frame had asked for."""
    out, waiting = asked.copy(), 0
    for row in (asked | labelled).nonzero()[0]:
        waiting += int(asked[row])
        out[row] |= labelled[row] and not waiting
        waiting -= int(labelled[row] and waiting > 0)
    return out


def _steps(
    rows: Sequence[np.ndarray], by_walker: Sequence[np.ndarray], step: np.ndarray, triggered: np.ndarray
) -> tuple[float, tuple[float, ...]]:
    """(steps of all walkers in the window, steps of all walkers until each time that a label was wanted in it)."""
    places, advances = [], []
    for recent, every in zip(rows, by_walker, strict=True):
        if not len(recent):
            continue
        before = every[every < recent[0]]
        # the frame before the window is where its first step starts, unless the walker was set back
        first = step[before[-1]] if len(before) and step[before[-1]] < step[recent[0]] else step[recent[0]]
        places.append(recent)
        advances.append(np.maximum(np.diff(step[recent], prepend=first), 0))
    if not places:
        return 0.0, ()
    place, advance = np.concatenate(places), np.concatenate(advances)
    order = np.argsort(place)
    total = np.cumsum(advance[order]).astype(float)
    return float(total[-1]), tuple(total[triggered[place[order]]].tolist())


def judge(
    history: History,
    recipe: StopRecipe = StopRecipe(),
    *,
    quantile: float = 0.99,
    labels: int | None = None,
    elapsed_h: float = 0.0,
) -> StopVerdict:
    """Say whether to stop.

    Args:
        quantile: of environments left out, that novelty 1 stands for (`recipe.novelty.quantile` of the model).
        labels: how many there are in all, with those of the start; None: those of the history.
        elapsed_h: time that the run has taken.
    """
    if not len(history):
        return StopVerdict(False, False, (), "not converged yet: there is no frame yet")
    recent = judged_window(history, recipe)
    criteria = [ensemble_criterion(recent, recipe)]
    if recipe.plateau is not False:
        criteria.append(plateau_of_window(recent, recipe.plateau))
    criteria += [observable_criterion(recent, o) for o in recipe.observables]
    if recipe.coverage is not False:
        criteria.append(coverage_criterion(novelty_series(recent), quantile, recipe.coverage))
    early = _early(history, recipe)
    met = all_met([c.met for c in criteria]) is True and len(criteria) > 1 and not early
    asked = int(history.column("labelled").sum()) if labels is None else labels
    reached, what = reached_limit(asked, elapsed_h, recipe)
    if met:
        sentence = "stopped: " + "; ".join(c.sentence for c in criteria)
    elif reached:
        sentence = f"stopped at a limit, not converged: {what}; " + _missing(criteria, early)
    else:
        sentence = "not converged yet: " + _missing(criteria, early)
    return StopVerdict(met or bool(reached), met, tuple(criteria), sentence, "" if met else reached)


def _early(history: History, recipe: StopRecipe) -> str:
    """Why the run is too young to be judged, or ''."""
    step, walker = history.column("step"), history.column("walker")
    done = sum(int(step[walker == w].max()) for w in history.walkers)
    return f"{done} of at least {recipe.at_least_steps} steps made" if done < recipe.at_least_steps else ""


def reached_limit(labels: int, elapsed_h: float, recipe: StopRecipe) -> tuple[str, str]:
    """(name of the limit that was reached, or '', and a phrase)."""
    if recipe.labels_at_most is not None and labels >= recipe.labels_at_most:
        return "labels", f"{labels} labels"
    if recipe.time_at_most_h is not None and elapsed_h >= recipe.time_at_most_h:
        return "time", f"{elapsed_h:.3g} h"
    return "", ""


def _missing(criteria: Sequence[StopCriterion], early: str) -> str:
    """What is not met, or else what cannot be judged."""
    if len(criteria) == 1:
        return "all criteria are switched off, so that only limits end the run"
    failed = [c for c in criteria if c.met is False] or [c for c in criteria if c.met is None]
    return "; ".join([*([early] if early else []), *(c.sentence for c in failed)])


def ensemble_criterion(recent: JudgedWindow, recipe: StopRecipe = StopRecipe()) -> StopCriterion:
    """Whether all ramps have ended and the means of temperature and pressure are those of thermostat and barostat.

    The temperature may be off by `temperature` of it, or by the 95 % interval of its mean.
    """
    numbers = {"ramping": float(len(recent.ramping)), "frames": float(recent.frames)}
    if recent.ramping:
        which = ", ".join(str(w) for w in recent.ramping)
        sentence = f"temperature or pressure of walker {which} are still being changed, so that new places may open"
        return StopCriterion("ensemble", False, sentence, numbers)
    sentences, verdicts = [], []
    for kind, unit in (("temperature", "K"), ("pressure", "GPa")):
        values, targets = recent.series(f"{kind}_{unit}"), recent.series(f"target_{kind}_{unit}")
        finite = [~np.isnan(v) & ~np.isnan(t) for v, t in zip(values, targets, strict=True)]
        if not any(k.any() for k in finite):
            continue
        target = float(np.concatenate([t[k] for t, k in zip(targets, finite, strict=True)]).mean())
        differences = [(v - t)[k] for v, t, k in zip(values, targets, finite, strict=True)]
        mean = series_mean(differences)
        off = abs(float(mean.value[0]))
        allowed = recipe.temperature * target if kind == "temperature" else PRESSURE
        numbers |= {kind: target + float(mean.value[0]), f"{kind}_target": target, f"{kind}_sem": mean.sem}
        numbers |= {f"{kind}_interval": mean.half_width} if mean.enough else {}
        reach = max(allowed, mean.half_width) if mean.enough else allowed
        interval = f" ± {mean.half_width:.2g} {unit} (95 %, target {target:.4g})"
        if not mean.enough:
            interval = (
                f" {unit} (target {target:.4g}, {mean.n_effective:.0f} correlation times, {ENOUGH} give an interval)"
            )
        # outside what is allowed, but with too few samples to say so: wait
        verdicts.append(True if off <= reach else False if mean.enough else None)
        sentences.append(f"mean {kind} {numbers[kind]:.4g}{interval}")
    met = all_met(verdicts) if recent.frames else None
    return StopCriterion("ensemble", met, ", ".join(sentences) or NOTHING[recent.frames > 0], numbers)


def plateau_of_window(recent: JudgedWindow, recipe: PlateauRecipe = PlateauRecipe()) -> StopCriterion:
    """`stop_criteria.plateau` of a window; uncertainties over the middle threshold of the trigger, where there is one.

    Not over that of each frame: a threshold that follows the forces of the dynamics would pass its own ups and downs on.
    """
    limits = np.concatenate(recent.series("threshold")) if recent.frames else np.zeros(0)
    limits = limits[~np.isnan(limits)]
    unit = float(np.median(limits)) if len(limits) else math.nan
    largest, median = (
        [s / (1.0 if math.isnan(unit) else unit) for s in recent.series(name)] for name in ("sigma_max", "sigma_median")
    )
    times = [_increasing(s) for s in recent.series("step")]
    return plateau_criterion(
        largest, median, times, recent.label_steps, recent.steps, recipe, limited=not math.isnan(unit)
    )


def _increasing(step: np.ndarray) -> np.ndarray:
    """Steps (frames,) counted on where a walker was set back."""
    return np.cumsum(np.maximum(np.diff(step, prepend=step[:1]), 1)).astype(float)


def observable_criterion(recent: JudgedWindow, recipe: ObservableRecipe = ObservableRecipe()) -> StopCriterion:
    """`stop_criteria.converged` of a window, with the tolerance of the recipe or the default of that observable."""
    tolerance, relative, unit = TOLERANCES.get(recipe.name, CUSTOM)
    if recipe.tolerance is not None:
        tolerance, relative = recipe.tolerance, bool(recipe.relative)
    elif recipe.name == "energy":
        tolerance *= BOLTZMANN * _temperature(recent)
    title = f"observable {recipe.name}"
    if recipe.name not in recent.history.observables:
        return StopCriterion(title, None, f"{recipe.name} has not been recorded yet")
    return mean_criterion(recipe.name, recent.series(f"observable/{recipe.name}"), tolerance, relative, unit)


def _temperature(recent: JudgedWindow) -> float:
    """Mean target temperature, or mean temperature where there is none, K."""
    for name in ("target_temperature_K", "temperature_K"):
        values = np.concatenate(recent.series(name)) if recent.frames else np.zeros(0)
        values = values[~np.isnan(values)]
        if len(values) and values.mean() > 0:
            return float(values.mean())
    return ROOM


def novelty_series(recent: JudgedWindow) -> NoveltySeries:
    """Novelty in a window."""
    each = []
    for rows, counts in zip(recent.rows, _counts(recent), strict=True):
        outside = [recent.history.outside_atoms(int(r)) for r in rows]
        joined = np.concatenate(outside) if outside else np.zeros(0, dtype=int)
        each.append(np.bincount(joined, minlength=counts) / max(1, len(rows)))
    species = recent.history.species
    return NoveltySeries(
        recent.series("novelty_max"),
        {z: recent.series(f"atoms/{z}") for z in species},
        {z: recent.series(f"outside/{z}") for z in species},
        each,
    )


def _counts(recent: JudgedWindow) -> list[int]:
    """By walker, the number of its atoms."""
    totals = [sum(recent.series(f"atoms/{z}")[w] for z in recent.history.species) for w in range(len(recent.rows))]
    return [int(np.max(t)) if np.size(t) else 0 for t in totals]
