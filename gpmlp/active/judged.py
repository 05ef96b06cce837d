"""Judged is what a run saw and how it was judged: frames as arrays, the window, the last verdict, means as they came to rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpmlp.active import stopping
from gpmlp.active.history import History, Record
from gpmlp.active.recipe import LearnRecipe
from gpmlp.active.stop_criteria import frames_inside
from gpmlp.active.stop_recipe import CoverageRecipe, ObservableRecipe
from gpmlp.report.learning import Frames, Observed
from gpmlp.uncertainty import correlation

POINTS = 48  # of the curve of a running mean
FEWEST = 8  # frames of its first point


@dataclass(frozen=True, eq=False)
class Judged:
    """What a run saw, and the last verdict over it.

    Attributes:
        ended: a key of report.learning.data.FINISHED; stopped: why, in words; sentence: of the verdict.
        criteria: dicts of name, met, sentence, numbers.
    """

    frames: Frames
    ended: str
    stopped: str
    sentence: str
    criteria: tuple[dict[str, Any], ...]
    observed: tuple[Observed, ...]


def of(events: list[dict], recipe: LearnRecipe, labels: int, hours: float) -> Judged:
    """From the events of log.jsonl."""
    history, asked = History(), []
    for event in events:
        if event["event"] == "look":  # where it says so, this frame asked; the history is told when the label has come
            asked.append(bool(event.get("asked")))
            history = history.append(Record.from_plain(event))
        elif event["event"] == "learned" and "key" in event:
            history = history.with_label(updated=bool(event.get("refreshed")))
    quantile = recipe.model.novelty.quantile
    verdicts = [e for e in events if e["event"] == "judged"]
    if verdicts:
        verdict = verdicts[-1]
    else:
        verdict = stopping.judge(history, recipe.stop, quantile=quantile, labels=labels, elapsed_h=hours).plain()
    stopped = next((e["reason"] for e in reversed(events) if e["event"] == "stopped"), "")
    recent = stopping.window(history, recipe.stop) if len(history) else None
    observed = tuple(filter(None, (_observed(recent, o) for o in recipe.stop.observables))) if recent else ()
    return Judged(
        _frames(history, np.array(asked, dtype=bool), recent, recipe),
        _ended(stopped, verdict),
        stopped,
        verdict["sentence"],
        tuple(verdict["criteria"]),
        observed,
    )


def _ended(stopped: str, verdict: dict) -> str:
    if not stopped:
        return ""
    if verdict["converged"]:
        return "converged"
    return verdict["limit"] or ("steps" if stopped.startswith("all ") else "unstable")


def wanted_atoms(coverage: CoverageRecipe, quantile: float) -> float:
    """Share of the atoms that must be inside, as the criterion has it."""
    return 1 - min(0.5, 3 * (1 - quantile)) if coverage.atoms is None else coverage.atoms


def _frames(history: History, asked: np.ndarray, recent: stopping.Window | None, recipe: LearnRecipe) -> Frames:
    n = len(history)
    atoms, outside = (
        sum((history.column(f"{kind}/{z}") for z in history.species), start=np.zeros(n))
        for kind in ("atoms", "outside")
    )
    step, walker = history.column("step").astype(int), history.column("walker").astype(int)
    made, last = np.zeros(n, dtype=int), dict.fromkeys(history.walkers, 0)
    total = 0
    for i in range(n):
        total += max(0, step[i] - last[walker[i]])
        last[walker[i]] = step[i]
        made[i] = total
    window = np.zeros(n, dtype=bool)
    for rows in recent.rows if recent else ():
        window[rows] = True
    far = recipe.stop.coverage.far if recipe.stop.coverage else CoverageRecipe().far
    inside = np.zeros(n, dtype=bool)
    if n:
        counts, out = ({z: [history.column(f"{kind}/{z}")] for z in history.species} for kind in ("atoms", "outside"))
        inside = frames_inside([history.column("novelty_max")], counts, out, recipe.model.novelty.quantile, far)[0]
    columns = {
        "temperature_K": "temperature_K",
        "target_K": "target_temperature_K",
        "sigma": "sigma_max",
        "sigma_median": "sigma_median",
        "limit": "threshold",
        "novelty": "novelty_max",
    }
    return Frames(
        walker=walker,
        step=step,
        time_ps=history.column("time_fs").astype(float) / 1000,
        outside=outside / np.maximum(atoms, 1),
        inside=inside,
        labelled=asked,
        window=window,
        made=made,
        **{name: np.array(history.column(column), dtype=float) for name, column in columns.items()},
    )


def _observed(recent: stopping.Window, wanted: ObservableRecipe) -> Observed | None:
    """Mean and standard error of what was seen until then, for times within the window; None without frames."""
    if wanted.name not in recent.history.observables or not recent.frames:
        return None
    criterion = stopping.observable(recent, wanted)
    series, places = recent.series(f"observable/{wanted.name}"), recent.rows
    order = np.sort(np.concatenate(places))
    length = recent.steps / len(order) if len(order) else 0.0
    ends = np.unique(np.linspace(min(FEWEST, len(order)), len(order), POINTS).astype(int))
    steps, mean, sem, enough = [], [], [], []
    for end in ends[ends > 0]:
        until = order[end - 1]
        parts = [values[rows <= until] for values, rows in zip(series, places, strict=True)]
        parts = [p[~np.isnan(p).any(1)] for p in parts]
        parts = [p for p in parts if len(p)]
        if sum(map(len, parts)) < FEWEST:
            continue
        found = correlation.mean(parts)
        steps.append(end * length)
        mean.append(math.sqrt(float((found.value**2).mean())) if found.value.size > 1 else float(found.value[0]))
        sem.append(max(found.sem, found.sem_blocking))
        enough.append(found.enough)
    if not steps:
        return None
    unit = stopping.TOLERANCES.get(wanted.name, stopping.CUSTOM)[2]
    tolerance = criterion.numbers.get("tolerance", float("nan"))
    columns = [np.array(c, dtype=float) for c in (steps, mean, sem)]
    return Observed(wanted.name, unit, *columns, tolerance, np.array(enough, dtype=bool))
