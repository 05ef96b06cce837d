"""Collection of a run's files (recipe, JSON lines, labels, model, trajectory) into the data of the page about it."""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gpmlp.core.errors import DataWarning, UserError, hill_formula
from gpmlp.core.quantities import Targets
from gpmlp.io import archive, provenance
from gpmlp.io.ase_atoms import iterate_frames, structures_from_ase
from gpmlp.io.recipe_files import validate_as
from gpmlp.learning.checkpoint import NAME, TEXT_LOG, TIMES
from gpmlp.learning.labels import LabelEntry, LabelFile
from gpmlp.learning.recipe import CoverageRecipe, LearnRecipe, ObservableRecipe
from gpmlp.learning.stopping import judge
from gpmlp.learning.stopping.criteria import frames_inside, wanted_atoms
from gpmlp.learning.stopping.history import History, Record
from gpmlp.potential.evaluation import evaluate
from gpmlp.potential.potential import Potential
from gpmlp.report.model.data import ReportData, collect_data
from gpmlp.report.run.data import LabelRecord, ObservableCurve, PrequentialError, RunData, RunFrames
from gpmlp.uncertainty import timeseries

POINTS = 48  # of the curve of a running mean
FEWEST = 8  # frames of its first point
TRAJECTORY_FRAMES, TRAJECTORY_ATOMS = 60, 6000  # that the final model is evaluated on, at most
FILES = {
    "labels.xyz": "labels",
    "model.gpmlp": "model",
    "recipe.json": "recipe",
    "log.jsonl": "log",
    "trajectory.xyz": "trajectory",
}
# a line of run.log
TEXT_TIMES = re.compile(r"^(\S+ \S+)  (?:labelled: key (\w+), seconds ([-+.\de]+), attempts (\d+))?", re.MULTILINE)
HALTED = "halted: "
BEFORE = ("first", "given", "explored")  # the dynamics
PHRASES = {  # of the sentences of triggers, by cause
    "force": "force error of atom",
    "local energy": "local energy of atom",
    "novelty": "radius of the trust region",
}


def run_recipe(folder: Path) -> LearnRecipe:
    """The recipe of the run in a folder.

    Raises:
        UserError: there is none.
    """
    path = Path(folder) / "recipe.json"
    try:
        return validate_as(LearnRecipe, json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, json.JSONDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{folder}: holds no learning run: {path.name} cannot be read ({why}).") from error


def read_events(path: Path) -> list[dict[str, Any]]:
    """Lines of a log of JSON lines; one that a kill left unfinished is left out.

    Raises:
        UserError: there is no such log, or a line of it is broken.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path.parent}: holds no learning run: {path.name}: {error.strerror or error}.") from error
    events = []
    for number, line in enumerate(lines, 1):
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is broken: {error}; repair it by hand.") from error
    return events


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """What the last checkpoint of a run says of it; empty if there is none yet."""
    return archive.read_header(folder / NAME, potential=False)["header"] if (folder / NAME).exists() else {}


def read_labels(folder: Path) -> tuple[dict[str, LabelEntry], tuple[dict[str, Any], ...]]:
    """Labels by key, and what was set aside, from copies: opening a label file repairs it, which is for the run to do.

    Raises:
        UserError: there is no label yet, or labels or log are not those that the last checkpoint of the run knows.
    """
    with tempfile.TemporaryDirectory(prefix="gpmlp-report-") as copies:
        for name in ("labels.xyz", "refused.jsonl"):
            if (folder / name).exists():
                shutil.copyfile(folder / name, Path(copies) / name)
        try:
            file = LabelFile(Path(copies) / "labels.xyz")
            known = read_checkpoint(folder)
            file.check_frames(*(known.get("labelled") or (0, "")))
        except UserError as error:
            raise UserError(str(error).replace(copies, str(folder))) from error
        if file.repaired:  # while a run goes on
            what = "ends with an unfinished frame, which is left out; a run that is resumed labels it again."
            warnings.warn(f"{folder / 'labels.xyz'}: {what}", DataWarning, stacklevel=2)
    for name, size in known.get("written", {}).items():
        if not (folder / name).exists() or (folder / name).stat().st_size < size:
            raise UserError(f"{folder / name}: is shorter than the run left it; put the file back, or begin anew.")
    if not len(file):
        raise UserError(f"{folder}: the run there has no labels yet; there is nothing to report.")
    refused = tuple({"key": r.key, "reason": r.reason, "attempts": r.attempts} for r in file.refusals)
    return {entry.key: entry for entry in file}, refused


def collect_run(
    folder: Path,
    recipe: LearnRecipe,
    events: list[dict[str, Any]],
    entries: dict[str, LabelEntry],
    refused: tuple[dict[str, Any], ...],
    potential: Potential,
) -> RunData:
    """Everything the page shows.

    Args:
        events: of log.jsonl. entries: labels by key. refused: key, reason and attempts. potential: as the run left it.
    """
    progress: dict[str, Any] = {"first": [], "learned": [], "hours": 0.0, "seconds": {}} | read_checkpoint(folder)
    judged = judge_frames(events, recipe, len(entries), progress["hours"])
    frames, plateau, coverage = judged.frames, recipe.stop.plateau, recipe.stop.coverage
    times = read_times(folder, events)
    nan, first = float("nan"), next(iter(entries.values()))
    return RunData(
        title=f"{hill_formula(Counter(first.structure.species.tolist()))}, {_conditions(recipe)}",
        folder=folder.resolve().name,
        ended=judged.ended,
        stopped=judged.stopped,
        sentence=judged.sentence,
        criteria=judged.criteria,
        frames=frames,
        labels=_labels(events, entries, progress, times),
        observables=judged.observables,
        steps=tuple(int(frames.step[frames.walker == w].max(initial=0)) for w in range(recipe.dynamics.walkers)),
        wanted=recipe.dynamics.steps,
        probability=recipe.trigger.probability,
        novelty_limit=recipe.novelty_limit or nan,
        wanted_rate=plateau.labels_per_1000_steps if plateau else nan,
        wanted_frames=coverage.frames if coverage else nan,
        wanted_atoms=wanted_atoms(coverage, _quantile(recipe)) if coverage else nan,
        refused=refused,
        seconds=progress["seconds"],
        hours=progress["hours"],
        began=times[0]["time"][:16] if times else "",
        ended_at=times[-1]["time"][:16] if times else "",
        trajectory=_trajectory(folder / "trajectory.xyz", potential),
        recipe=recipe.model_dump(mode="json"),
        given=recipe.model_dump(mode="json", exclude_unset=True, exclude_defaults=True),
        files=tuple((r, n, provenance.file_hash(folder / n)) for n, r in FILES.items() if (folder / n).exists()),
        versions=provenance.installed_versions(),
        model=dict(potential.report),
        oracle=(recipe.oracle.calculator, recipe.oracle.settings_hash),
    )


def _conditions(recipe: LearnRecipe) -> str:
    dynamics = recipe.dynamics
    given = ((dynamics.temperature_K, "K"), (dynamics.pressure_GPa, "GPa"))
    parts = [
        f"{value[0]:g} to {value[1]:g} {unit}" if isinstance(value, tuple) else f"{value:g} {unit}"
        for value, unit in given[: 2 if dynamics.ensemble == "npt" else 1]
    ]
    return f"{'NVT' if dynamics.ensemble == 'langevin' else dynamics.ensemble.upper()} at {', '.join(parts)}"


def read_times(folder: Path, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events with their time of day, and of labels seconds and attempts of the oracle.

    They are lines of times.jsonl, of which a kill may have cut any short. A run begun before there was such a file has them in run.log.
    """
    times = []
    if (folder / TIMES).exists():
        for line in (folder / TIMES).read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(json.JSONDecodeError):
                times.append(json.loads(line))
    begun = next((e for e in events if e["event"] == "learned"), {})
    if "first" not in begun and (folder / TEXT_LOG).exists():
        text = (folder / TEXT_LOG).read_text(encoding="utf-8", errors="replace")
        old = [
            {"event": "labelled", "time": m[1], "key": m[2], "seconds": float(m[3]), "attempts": int(m[4])}
            if m[2]
            else {"event": "", "time": m[1]}
            for m in TEXT_TIMES.finditer(text)
        ]
        times = old + times
    return times


# ---------------------------------------------------------------- labels


def _initial_labels(
    events: list[dict[str, Any]], entries: dict[str, LabelEntry], progress: dict[str, Any]
) -> list[LabelRecord]:
    """Labels that no walker asked for."""
    unasked = [k for k, e in entries.items() if e.notes.get("walker", -1) == -1]
    first = progress["first"] or unasked
    causes = {first["key"]: first["cause"] for e in events for first in e.get("first") or ()}
    labels: list[LabelRecord] = []
    for key in dict.fromkeys((*first, *progress["learned"])):
        if key in entries and (key in progress["first"] or key in unasked):
            reason = entries[key].reason
            labels.append(LabelRecord(len(labels) + 1, key, causes.get(key) or label_cause(reason), reason))
    return labels


def _labels(
    events: list[dict[str, Any]],
    entries: dict[str, LabelEntry],
    progress: dict[str, Any],
    times: list[dict[str, Any]],
) -> tuple[LabelRecord, ...]:
    """All labels in the order in which they were learned."""
    labels = _initial_labels(events, entries, progress)
    asks: dict[int, dict[str, Any]] = {}
    temperatures: dict[tuple[int, int], float] = {}
    step: dict[int, int] = {}
    total, limit = 0, float("nan")
    for event in events:
        if event["event"] == "look":
            w = event["walker"]
            total += max(0, event["step"] - step.get(w, 0))
            step[w] = event["step"]
            temperatures[w, event["step"]] = Record.from_json(event).temperature_K
        elif event["event"] == "ask":
            asks[event["walker"]] = event
            if event.get("temperature_K") is not None:
                temperatures[event["walker"], event["step"]] = float(event["temperature_K"])
        elif event["event"] == "learned":
            before, limit = limit, float(event["force_limit"] or "nan")
            if "key" not in event:
                labels = [replace(label, columns=event["columns"]) for label in labels]
                continue
            w, at, entry = event["walker"], event["step"], entries.get(event["key"])
            ask = asks.get(w, {})
            by_force = "force" in (ask.get("cause") or label_cause(ask.get("reason", "")))
            severity = ask.get("severity", float("nan")) if by_force else float("nan")
            asked_limit = ask.get("force_limit") or before  # it may have changed since the label before
            labels.append(
                LabelRecord(
                    number=len(labels) + 1,
                    key=event["key"],
                    cause=event.get("cause") or label_cause(event["reason"]),
                    reason=event["reason"],
                    walker=w,
                    step=at,
                    time_ps=float(entry.notes.get("time_fs", "nan")) / 1000 if entry else float("nan"),
                    temperature_K=temperatures.get((w, at), float("nan")),
                    atom=next(iter(ask.get("atoms") or ()), -1),
                    total_step=total,
                    bound=severity * asked_limit,
                    limit=asked_limit,
                    species=entry.structure.species.numpy() if entry else np.zeros(0, int),
                    columns=event["columns"],
                    prequential=_prequential(event.get("foreseen")),
                    surrogate=_surrogate(entry),
                )
            )
    oracle = {t["key"]: t for t in times if t["event"] == "labelled"}
    nothing = {"seconds": float("nan"), "attempts": 1}
    work = [oracle.get(label.key, nothing) for label in labels]
    return tuple(
        replace(label, seconds=w["seconds"], attempts=w["attempts"], checks=max(0, w.get("calls", 0) - w["attempts"]))
        for label, w in zip(labels, work, strict=True)
    )


def _surrogate(entry: LabelEntry | None) -> str:
    """What was labelled in place of a frame that was too large; '' where it was the frame."""
    if entry is None or "surrogate" not in entry.notes:
        return ""
    notes, n = entry.notes, entry.structure.n_atoms
    what = "all of it learned" if notes["surrogate"] == "small cell" else f"forces on {notes['intact']} of them learned"
    return f"{notes['surrogate']} of {n} atoms around atom {notes['carved_around']} of {notes['carved_from']}, {what}"


def label_cause(reason: str) -> str:
    """Why a label was asked for, in a word, from the sentence that the triggers gave: of runs whose log has no `cause`."""
    for word in BEFORE:
        if reason.startswith(word):
            return word
    causes = " and ".join(word for word, phrase in PHRASES.items() if phrase in reason)
    if not causes:
        return "guard"
    return causes + (", halted" if reason.startswith(HALTED) else "")


def reason_notes(reason: str, surrogate: str) -> list[str]:
    """What is to be said of a label beyond its cause, atom, bound, limit and novelty."""
    parts = [part for part in reason.removeprefix(HALTED).split("; ") if not part.startswith(BEFORE[:2])]
    return [p for p in (*parts, surrogate) if p and not any(phrase in p for phrase in PHRASES.values())]


def _prequential(logged: dict[str, Any] | None) -> PrequentialError | None:
    """From what the log holds; None if it holds nothing."""
    if not logged:
        return None

    def number(value: float | None) -> float:
        return float("nan") if value is None else float(value)

    error, sigma = (
        np.array([number(v) for v in logged.get(name) or []]).reshape(-1, 3) for name in ("force_error", "force_sigma")
    )
    if len(error) != len(sigma):
        error, sigma = np.zeros((0, 3)), np.zeros((0, 3))
    worst = logged.get("worst_atom")
    names = ("energy_error", "energy_sigma", "novelty")
    return PrequentialError(
        number(logged.get("bound")),
        number(logged.get("largest_error")),
        -1 if worst is None else worst,
        error,
        sigma,
        *(number(logged.get(name)) for name in names),
    )


def _trajectory(path: Path, potential: Potential) -> ReportData | None:
    """Predictions of the model as it is now on frames of the trajectory, without labels; None where there are none."""
    frames = list(iterate_frames(path, TRAJECTORY_FRAMES, TRAJECTORY_ATOMS))
    if not frames or potential.variances is None:
        return None
    structures = structures_from_ase(frames, [f"step {a.info.get('step', i)}" for i, a in enumerate(frames)])
    types = tuple(f"walker {a.info['walker']}" if "walker" in a.info else "" for a in frames)
    targets = replace(Targets.unlabelled(structures), config_types=types)
    evaluation = evaluate(potential, structures, targets)
    version = provenance.version_of("gpmlp")
    return collect_data(potential, structures, targets, evaluation, "the final model", path.name, version)


# ---------------------------------------------------------------- frames, as stopping judges them


@dataclass(frozen=True, eq=False)
class JudgedFrames:
    """Frames of a run, and the last verdict over them.

    Attributes:
        ended: a key of FINISHED; stopped: why, in words; sentence: of the verdict.
        criteria: dicts of name, met, sentence, numbers.
    """

    frames: RunFrames
    ended: str
    stopped: str
    sentence: str
    criteria: tuple[dict[str, Any], ...]
    observables: tuple[ObservableCurve, ...]


def judge_frames(events: list[dict[str, Any]], recipe: LearnRecipe, labels: int, hours: float) -> JudgedFrames:
    """Frames and verdict from the events of log.jsonl; judged here where the run has not come to it.

    Args:
        labels: number of labels; hours: of the whole run.
    """
    history, asked = History(), []
    for event in events:
        if event["event"] == "look":  # `asked`: this frame asked for a label, which the history notes once it has come
            asked.append(bool(event.get("asked")))
            history = history.append(Record.from_json(event))
        elif event["event"] == "learned" and "key" in event:
            history = history.with_label(updated=bool(event.get("refreshed")))
    quantile = _quantile(recipe)
    verdicts = [e for e in events if e["event"] == "judged"]
    if verdicts:
        verdict = verdicts[-1]
    else:
        verdict = judge.judge(history, recipe.stop, quantile=quantile, labels=labels, elapsed_h=hours).to_json()
    end = next((e for e in reversed(events) if e["event"] == "stopped"), {"reason": ""})
    recent = judge.judged_window(history, recipe.stop) if len(history) else None
    curves = [_observable_curve(recent, o) for o in recipe.stop.observables] if recent else []
    return JudgedFrames(
        _run_frames(history, np.array(asked, dtype=bool), recent, recipe),
        end.get("ended") or _ending(end["reason"], verdict),
        end["reason"],
        verdict["sentence"],
        tuple(verdict["criteria"]),
        tuple(curve for curve in curves if curve is not None),
    )


def _ending(stopped: str, verdict: dict[str, Any]) -> str:
    """A key of FINISHED, of a run whose log does not say it."""
    if not stopped:
        return ""
    if verdict["converged"]:
        return "converged"
    return verdict["limit"] or ("steps" if stopped.startswith("all ") else "unstable")


def _quantile(recipe: LearnRecipe) -> float:
    """Share of the training environments inside the trust region; models that learn have one."""
    return recipe.model.novelty.quantile if recipe.model.novelty else float("nan")


def _run_frames(
    history: History, asked: np.ndarray, recent: judge.JudgedWindow | None, recipe: LearnRecipe
) -> RunFrames:
    n = len(history)
    atoms, outside = (
        sum((history.column(f"{kind}/{z}") for z in history.species), start=np.zeros(n))
        for kind in ("atoms", "outside")
    )
    step, walker = history.column("step").astype(int), history.column("walker").astype(int)
    forward = np.zeros(n, dtype=int)  # steps since the frame before of the walker; none where it was set back
    for w in history.walkers:
        mine = walker == w
        forward[mine] = np.diff(step[mine], prepend=0).clip(min=0)
    window = np.zeros(n, dtype=bool)
    for rows in recent.rows if recent else ():
        window[rows] = True
    far = recipe.stop.coverage.far if recipe.stop.coverage else CoverageRecipe().far
    inside = np.zeros(n, dtype=bool)
    if n:
        counts, out = ({z: [history.column(f"{kind}/{z}")] for z in history.species} for kind in ("atoms", "outside"))
        inside = frames_inside([history.column("novelty_max")], counts, out, _quantile(recipe), far)[0]
    columns = {
        "temperature_K": "temperature_K",
        "target_K": "target_temperature_K",
        "sigma": "sigma_max",
        "sigma_median": "sigma_median",
        "limit": "threshold",
        "novelty": "novelty_max",
    }
    return RunFrames(
        walker=walker,
        step=step,
        time_ps=history.column("time_fs").astype(float) / 1000,
        outside=outside / np.maximum(atoms, 1),
        inside=inside,
        labelled=asked,
        window=window,
        total_step=np.cumsum(forward),
        **{name: np.array(history.column(column), dtype=float) for name, column in columns.items()},
    )


def _observable_curve(recent: judge.JudgedWindow, wanted: ObservableRecipe) -> ObservableCurve | None:
    """Running mean and its standard error, for times within the window; None without frames."""
    if wanted.name not in recent.history.observables or not recent.frames:
        return None
    criterion = judge.observable_criterion(recent, wanted)
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
        running = timeseries.series_mean(parts)
        steps.append(end * length)
        mean.append(math.sqrt(float((running.value**2).mean())) if running.value.size > 1 else float(running.value[0]))
        sem.append(max(running.sem, running.sem_blocking))
        enough.append(running.enough)
    if not steps:
        return None
    unit = judge.TOLERANCES.get(wanted.name, judge.CUSTOM)[2]
    tolerance = criterion.numbers.get("tolerance", float("nan"))
    return ObservableCurve(
        wanted.name, unit, np.array(steps), np.array(mean), np.array(sem), tolerance, np.array(enough, dtype=bool)
    )
