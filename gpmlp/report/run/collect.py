"""After a run comes the page about it: what the files of the run say becomes the arrays that the page shows."""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpmlp.core.errors import UserError, chemical_symbol
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.io import archive, provenance
from gpmlp.io.ase_atoms import iterate_frames, structures_from_ase
from gpmlp.io.files import atomic_write, check_folder
from gpmlp.io.recipe_files import validate_recipe
from gpmlp.learning import checkpoint
from gpmlp.learning.labels import LabelEntry, LabelFile
from gpmlp.learning.recipe import LearnRecipe
from gpmlp.learning.stopping import judge, timeseries
from gpmlp.learning.stopping.criteria import frames_inside
from gpmlp.learning.stopping.history import History, Record
from gpmlp.learning.stopping.recipe import CoverageRecipe, ObservableRecipe
from gpmlp.potential import evaluation
from gpmlp.potential.potential import Potential
from gpmlp.report.model import collect as reporting
from gpmlp.report.model.build import build as build_model_page
from gpmlp.report.model.data import ReportData
from gpmlp.report.run.data import Foretold, Frames, Labelling, Observed, RunData
from gpmlp.report.run.page import build

POINTS = 48  # of the curve of a running mean
FEWEST = 8  # frames of its first point

LOOKED_AT = 60  # frames of the trajectory, in which blind places are sought
MOST_ATOMS = 6000  # of these
FILES = ("labels.xyz", "model.gpmlp", "recipe.json", "log.jsonl", "trajectory.xyz")
TOLD = re.compile(r"labelled: key (\w+), seconds ([-+.\de]+), attempts (\d+)")
HALTED = "halted: "


def report(folder: Path, recipe: LearnRecipe) -> Path:
    """Write FOLDER/report: index.html, report.json and figures of a run, finished or not, and model/ about its labels.

    Raises:
        UserError: there is no run in the folder, or it has not learned anything yet.
    """
    folder = Path(folder)
    out = folder / "report"
    check_folder(out)
    entries, refused = _tape(folder)
    events = list(_events(folder / "log.jsonl"))
    if not any(e["event"] == "learned" for e in events):
        raise UserError(f"{folder}: the run there has not learned anything yet; go on with it (gpmlp learn --resume).")
    potential = archive.load(folder / "model.gpmlp")
    data = collect(folder, recipe, events, entries, refused, potential)
    if _report_of_labels(folder, entries, potential):
        data = replace(data, beside="model/report.html")
    return build(data, out, atomic_write)


def recipe_of(folder: Path) -> LearnRecipe:
    """The recipe of the run in a folder.

    Raises:
        UserError: there is none.
    """
    path = Path(folder) / "recipe.json"
    try:
        return validate_recipe(json.loads(path.read_text(encoding="utf-8")), str(path), LearnRecipe)
    except (OSError, json.JSONDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{folder}: holds no learning run: {path.name} cannot be read ({why}).") from error


def collect(
    folder: Path,
    recipe: LearnRecipe,
    events: list[dict],
    entries: dict[str, LabelEntry],
    refused: tuple[dict[str, Any], ...],
    potential: Potential,
) -> RunData:
    """Everything the page shows.

    Args:
        events: of log.jsonl. entries: of the tape by key. refused: key, reason and attempts.
    """
    progress = _progress(folder / checkpoint.NAME)
    seen = judged_frames(events, recipe, len(entries), progress["hours"])
    labels = _labels(events, entries, progress, *_diary(folder / "run.log"))
    walkers = range(recipe.dynamics.walkers)
    frames = seen.frames
    steps = tuple(int(frames.step[frames.walker == w].max(initial=0)) for w in walkers)
    began, ended_at = _times(folder / "run.log")
    coverage = recipe.stop.coverage
    quantile = recipe.model.novelty.quantile
    return RunData(
        title=f"{_formula(entries)}, {_conditions(recipe)}",
        folder=folder.resolve().name,
        ended=seen.ended,
        stopped=seen.stopped,
        sentence=seen.sentence,
        criteria=seen.criteria,
        frames=frames,
        labels=labels,
        observed=seen.observed,
        steps=steps,
        wanted=recipe.dynamics.steps,
        probability=recipe.trigger.probability,
        novelty_limit=recipe.trigger.novelty or float("nan"),
        wanted_rate=recipe.stop.plateau.labels_per_1000_steps if recipe.stop.plateau else float("nan"),
        wanted_frames=coverage.frames if coverage else float("nan"),
        wanted_atoms=wanted_atoms(coverage, quantile) if coverage else float("nan"),
        refused=refused,
        seconds=progress["seconds"],
        hours=progress["hours"],
        began=began,
        ended_at=ended_at,
        blind=_blind(folder / "trajectory.xyz", potential),
        recipe=recipe.model_dump(mode="json"),
        given=recipe.model_dump(mode="json", exclude_unset=True, exclude_defaults=True),
        files=tuple((_role(n), n, provenance.file_hash(folder / n)) for n in FILES if (folder / n).exists()),
        versions=provenance.installed_versions(),
        model=dict(potential.report),
        oracle=(recipe.oracle.calculator, recipe.oracle.settings_hash),
    )


def _role(name: str) -> str:
    return {
        "labels.xyz": "labels",
        "model.gpmlp": "model",
        "recipe.json": "recipe",
        "log.jsonl": "log",
        "trajectory.xyz": "trajectory",
    }[name]


def _formula(entries: dict[str, LabelEntry]) -> str:
    species, counts = np.unique(next(iter(entries.values())).structure.species.numpy(), return_counts=True)
    return "".join(f"{chemical_symbol(int(z))}{n if n > 1 else ''}" for z, n in zip(species, counts, strict=True))


def _conditions(recipe: LearnRecipe) -> str:
    dynamics = recipe.dynamics
    given = ((dynamics.temperature_K, "K"), (dynamics.pressure_GPa, "GPa"))
    told = [
        f"{value[0]:g} to {value[1]:g} {unit}" if isinstance(value, tuple) else f"{value:g} {unit}"
        for value, unit in given[: 2 if dynamics.ensemble == "npt" else 1]
    ]
    return f"{'NVT' if dynamics.ensemble == 'langevin' else dynamics.ensemble.upper()} at {', '.join(told)}"


# ---------------------------------------------------------------- files of the run


def _events(path: Path) -> Iterator[dict]:
    """Lines of the log; one that a kill left unfinished is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path.parent}: holds no learning run: {path.name}: {error.strerror or error}.") from error
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is broken: {error}; repair it by hand.") from error


def _tape(folder: Path) -> tuple[dict[str, LabelEntry], tuple[dict[str, Any], ...]]:
    """Labels by key, and what was set aside, from copies: opening a tape repairs it, which is for the run to do."""
    with tempfile.TemporaryDirectory(prefix="gpmlp-report-") as copies:
        for name in ("labels.xyz", "refused.jsonl"):
            if (folder / name).exists():
                shutil.copyfile(folder / name, Path(copies) / name)
        tape = LabelFile(Path(copies) / "labels.xyz")
    if not len(tape):
        raise UserError(f"{folder}: the run there has no labels yet; there is nothing to report.")
    refused = tuple({"key": r.key, "reason": r.reason, "attempts": r.attempts} for r in tape.refusals)
    return {entry.key: entry for entry in tape}, refused


def _progress(path: Path) -> dict[str, Any]:
    """What the last checkpoint says of labels and time; it holds more, which only the run itself has to understand."""
    blank = {"first": [], "learned": [], "hours": 0.0, "seconds": {}}
    return blank | archive.read_header(path)["header"] if path.exists() else blank


def _diary(path: Path) -> tuple[dict[str, float], dict[str, int]]:
    """What the log for people says of the oracle: (seconds by key, attempts by key)."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    found = [(m[1], float(m[2]), int(m[3])) for m in TOLD.finditer(text)]
    return {k: s for k, s, _ in found}, {k: a for k, _, a in found}


def _times(path: Path) -> tuple[str, str]:
    """First and last moment of which the log for people tells."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return (lines[0][:16], lines[-1][:16]) if lines else ("", "")


# ---------------------------------------------------------------- labels


def _labels(
    events: list[dict],
    entries: dict[str, LabelEntry],
    progress: dict[str, Any],
    seconds: dict[str, float],
    attempts: dict[str, int],
) -> tuple[Labelling, ...]:
    """All labels in the order in which they were learned."""
    begun = [k for k in (*(progress["first"] or _first(entries)), *progress["learned"]) if k in entries]
    begun = [k for k in dict.fromkeys(begun) if k in progress["first"] or entries[k].notes.get("walker", -1) == -1]
    found = [Labelling(i, k, cause(entries[k].reason), entries[k].reason) for i, k in enumerate(begun, 1)]
    asks: dict[int, dict] = {}
    temperatures: dict[tuple[int, int], float] = {}
    step: dict[int, int] = {}
    made, limit = 0, float("nan")
    for event in events:
        if event["event"] == "look":
            w = event["walker"]
            made += max(0, event["step"] - step.get(w, 0))
            step[w] = event["step"]
            temperatures[w, event["step"]] = Record.from_json(event).temperature_K
        elif event["event"] == "ask":
            asks[event["walker"]] = event
        elif event["event"] == "learned":
            before, limit = limit, float(event["force_limit"] or "nan")
            if "key" not in event:
                found = [replace(label, columns=event["columns"]) for label in found]
                continue
            entry = entries.get(event["key"])
            ask = asks.get(event["walker"], {})
            severity = ask.get("severity", float("nan")) if "force error" in ask.get("reason", "") else float("nan")
            w, at = event["walker"], event["step"]
            asked = ask.get("force_limit") or before  # it may have changed since the label before
            found.append(
                Labelling(
                    number=len(found) + 1,
                    key=event["key"],
                    cause=cause(event["reason"]),
                    reason=event["reason"],
                    walker=w,
                    step=at,
                    time_ps=_time_ps(entry),
                    temperature_K=temperatures.get((w, at), float("nan")),
                    made=made,
                    bound=severity * asked,
                    limit=asked,
                    species=entry.structure.species.numpy() if entry else np.zeros(0, int),
                    columns=event["columns"],
                    foretold=_foretold(event.get("foreseen")),
                    surrogate=_surrogate(entry),
                )
            )
    return tuple(replace(f, seconds=seconds.get(f.key, float("nan")), attempts=attempts.get(f.key, 1)) for f in found)


def _surrogate(entry: LabelEntry | None) -> str:
    """What was labelled in place of a frame that was too large; '' where it was the frame."""
    if entry is None or "surrogate" not in entry.notes:
        return ""
    notes, n = entry.notes, entry.structure.n_atoms
    what = "all of it learned" if notes["surrogate"] == "small cell" else f"forces on {notes['intact']} of them learned"
    return f"{notes['surrogate']} of {n} atoms around atom {notes['carved_around']} of {notes['carved_from']}, {what}"


def _first(entries: dict[str, LabelEntry]) -> list[str]:
    """Where there is no checkpoint yet."""
    return [k for k, e in entries.items() if e.notes.get("walker", -1) == -1]


def _time_ps(entry: LabelEntry | None) -> float:
    return float(entry.notes.get("time_fs", float("nan"))) / 1000 if entry else float("nan")


def cause(reason: str) -> str:
    """In a word, why a label was asked for, from the reason that `criteria` gave."""
    for word in ("first", "given", "explored"):
        if reason.startswith(word):
            return word
    halted, reason = reason.startswith(HALTED), reason.removeprefix(HALTED)
    found = [
        word
        for word, part in (
            ("force", "force error of atom"),
            ("local energy", "local energy of atom"),
            ("novelty", "radius of the trust region"),
        )
        if part in reason
    ]
    if not found:
        return "guard"
    return " and ".join(found) + (", halted" if halted else "")


def _foretold(told: dict | None) -> Foretold | None:
    """From what the log holds; None if it holds nothing."""
    if not told:
        return None

    def numbers(name: str) -> np.ndarray:
        values = told.get(name) or []
        return np.array([np.nan if v is None else v for v in values], dtype=float).reshape(-1, 3)

    def number(name: str) -> float:
        value = told.get(name)
        return float("nan") if value is None else float(value)

    error, sigma = numbers("force_error"), numbers("force_sigma")
    if len(error) != len(sigma):
        error, sigma = np.zeros((0, 3)), np.zeros((0, 3))
    names = ("energy_error", "energy_sigma", "novelty")
    worst = told.get("worst_atom")
    return Foretold(
        number("bound"), number("largest_error"), -1 if worst is None else worst, error, sigma, *map(number, names)
    )


# ---------------------------------------------------------------- the model as it is now


def _blind(path: Path, potential: Potential) -> ReportData | None:
    """What the model says of frames of the trajectory, without labels; None where there are none."""
    frames = list(iterate_frames(path))
    if not frames or potential.variances is None:
        return None
    names = [f"step {a.info.get('step', i)}" for i, a in enumerate(frames)]
    structures = structures_from_ase(frames, names)
    types = tuple(f"walker {a.info['walker']}" if "walker" in a.info else "" for a in frames)
    targets = replace(Targets.unlabelled(structures), config_types=types)
    found = evaluation.evaluate(potential, structures, targets)
    return reporting.collect(
        potential, structures, targets, found, "the final model", path.name, provenance.version_of("gpmlp")
    )


def _report_of_labels(folder: Path, entries: dict[str, LabelEntry], potential: Potential) -> bool:
    """Write the uncertainty report of the model on its own labels; whether that could be done."""
    if potential.variances is None:
        return False
    structures = Structures.concatenate([e.structure for e in entries.values()])
    names = tuple(f"label {i + 1}" for i in range(len(structures)))
    structures = replace(structures, names=names)
    targets = Targets.concatenate([e.targets for e in entries.values()])
    with torch.no_grad():
        found = evaluation.evaluate(potential, structures, targets)
    about = "model.gpmlp", "labels.xyz", provenance.version_of("gpmlp"), provenance.DataOverlap(True, 0)
    data = reporting.collect(potential, structures, targets, found, *about)
    build_model_page(data, folder / "report" / "model", atomic_write)
    return True


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


def judged_frames(events: list[dict], recipe: LearnRecipe, labels: int, hours: float) -> Judged:
    """From the events of log.jsonl."""
    history, asked = History(), []
    for event in events:
        if event["event"] == "look":  # where it says so, this frame asked; the history is told when the label has come
            asked.append(bool(event.get("asked")))
            history = history.append(Record.from_json(event))
        elif event["event"] == "learned" and "key" in event:
            history = history.with_label(updated=bool(event.get("refreshed")))
    quantile = recipe.model.novelty.quantile
    verdicts = [e for e in events if e["event"] == "judged"]
    if verdicts:
        verdict = verdicts[-1]
    else:
        verdict = judge.judge(history, recipe.stop, quantile=quantile, labels=labels, elapsed_h=hours).to_json()
    stopped = next((e["reason"] for e in reversed(events) if e["event"] == "stopped"), "")
    recent = judge.judged_window(history, recipe.stop) if len(history) else None
    observed = tuple(filter(None, (_observed(recent, o) for o in recipe.stop.observables))) if recent else ()
    return Judged(
        _judged_frames(history, np.array(asked, dtype=bool), recent, recipe),
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


def _judged_frames(
    history: History, asked: np.ndarray, recent: judge.JudgedWindow | None, recipe: LearnRecipe
) -> Frames:
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


def _observed(recent: judge.JudgedWindow, wanted: ObservableRecipe) -> Observed | None:
    """Mean and standard error of what was seen until then, for times within the window; None without frames."""
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
        found = timeseries.series_mean(parts)
        steps.append(end * length)
        mean.append(math.sqrt(float((found.value**2).mean())) if found.value.size > 1 else float(found.value[0]))
        sem.append(max(found.sem, found.sem_blocking))
        enough.append(found.enough)
    if not steps:
        return None
    unit = judge.TOLERANCES.get(wanted.name, judge.CUSTOM)[2]
    tolerance = criterion.numbers.get("tolerance", float("nan"))
    columns = [np.array(c, dtype=float) for c in (steps, mean, sem)]
    return Observed(wanted.name, unit, *columns, tolerance, np.array(enough, dtype=bool))
