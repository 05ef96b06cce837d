"""The page about a learning run: answers to a scientist's questions, and the page that holds them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.io import archive, provenance
from gpmlp.io.files import check_folder
from gpmlp.learning.labels import LabelEntry
from gpmlp.learning.recipe import LearnRecipe
from gpmlp.potential.evaluation import evaluate
from gpmlp.potential.potential import Potential
from gpmlp.report.model.data import LEVELS, collect_data
from gpmlp.report.model.numbers import calibration_verdict, root_mean_square, trust_region
from gpmlp.report.model.page import NOISE_UNITS, extrapolation_values, write_model_page
from gpmlp.report.model.worst import worst_environments
from gpmlp.report.page import PAGE, Page, Section
from gpmlp.report.run.collect import collect_run, read_events, read_labels, reason_notes
from gpmlp.report.run.data import FINISHED, RunData
from gpmlp.report.run.figures import draw_figures, scatter_plots
from gpmlp.report.run.numbers import all_numbers
from gpmlp.report.style import OTHER, REASON_COLOURS, format_duration, format_number, format_percent, join_words

Numbers = dict[str, Any]
FEWEST_LABELS = 5  # from which error bars are judged
ENDS = {
    "converged": "all criteria are met",
    "labels": "as many labels as allowed",
    "time": "time is up",
    "steps": "all steps are made",
    "unstable": "given up: unstable",
    "": "interrupted, or still going on",
}
ACTIVITIES = {"dynamics": "dynamics on the model", "oracle": "waiting for the oracle", "learning": "learning labels"}
CAUSES = {  # what a label was asked for
    "first": "a model to begin the dynamics with",
    "given": "a model to begin the dynamics with, from a file",
    "force": "a force error that might exceed the limit",
    "novelty": "an environment outside the trust region",
    "force and novelty": "both force error and novelty",
    "local energy": "an uncertain local energy",
    "explored": "exploring on purpose",
    "guard": "a guard of physics that fired",
    "force, halted": "a force error so large that it went back",
}
MODEL = (
    ("rank", "inducing variables"),
    ("condition", "condition number"),
    ("drift", "error of the factor after updates"),
    ("updates", "updates since it was computed from all rows"),
)


def report_run(folder: Path, recipe: LearnRecipe) -> Path:
    """Write FOLDER/report: the page about a run, finished or not, and in model/ the uncertainty report on its labels; of a run
    without dynamics of its own (LAMMPS moves the atoms, or labels are chosen for a target), the latter alone.

    Raises:
        UserError: there is no run in the folder, or it has not learned anything yet.
    """
    folder = Path(folder)
    check_folder(folder / "report")
    entries, refused = read_labels(folder)
    events = read_events(folder / "log.jsonl")
    if not any(e["event"] == "learned" for e in events):
        raise UserError(f"{folder}: the run there has not learned anything yet; go on with it (gpmlp learn --resume).")
    potential = archive.load(folder / "model.gpmlp")
    if recipe.lammps is not None or recipe.target is not None:
        return _report_labels(folder / "report" / "model", entries, potential)
    data = collect_run(folder, recipe, events, entries, refused, potential)
    if potential.variances is not None:
        _report_labels(folder / "report" / "model", entries, potential)
        data = replace(data, labels_page=f"model/{PAGE}")
    return write_run_page(data, folder / "report")


def _report_labels(folder: Path, entries: dict[str, LabelEntry], potential: Potential) -> Path:
    """Write the uncertainty report of a model on the labels it has learned from; return its page."""
    structures = Structures.concatenate([e.structure for e in entries.values()])
    structures = replace(structures, names=tuple(f"label {i + 1}" for i in range(len(structures))))
    targets = Targets.concatenate([e.targets for e in entries.values()])
    with torch.no_grad():
        evaluation = evaluate(potential, structures, targets)
    about = "model.gpmlp", "labels.xyz", provenance.version_of("gpmlp"), provenance.DataOverlap(True, 0)
    return write_model_page(collect_data(potential, structures, targets, evaluation, *about), folder)


def write_run_page(data: RunData, folder: Path) -> Path:
    """Write index.html, report.json and figures/ into folder (created if missing); return the path of index.html."""
    return run_page(data).write(folder)


def run_page(data: RunData) -> Page:
    """The page about a run: its numbers computed, its figures drawn."""
    with np.errstate(all="ignore"):
        numbers = all_numbers(data)
        labels, plots = scatter_plots(data)
        pictures = draw_figures(data, numbers, plots)
        values: dict[str, Any] = {}
        if data.trajectory is not None:
            worst = worst_environments(data.trajectory)
            std = root_mean_square(1e3 * data.trajectory.atom_std)
            numbers["blind"] = {
                "force_std_rms_meV_per_A": std,
                "trust_region": trust_region(data.trajectory),
                "worst_environments": worst,
            }
            values = extrapolation_values(data.trajectory) | {"worst_environments": worst}
    return Page(
        template="run.html",
        kind="Learning run",
        title=data.title,
        about=(("Run", data.folder), ("Oracle", data.oracle[0]), (FINISHED[data.ended], "")),
        tiles=key_numbers(data, numbers),
        sections=_sections(data, numbers),
        record={
            "folder": data.folder,
            **numbers,
            "recipe": data.recipe,
            "files": [dict(zip(("role", "name", "sha256"), row, strict=True)) for row in data.files],
            "versions": data.versions,
            "model": data.model,
            "oracle": dict(zip(("calculator", "settings"), data.oracle, strict=True)),
        },
        scatters=plots,
        pictures=pictures,
        labels=labels,
        whole="frame",
        values={
            **values,
            **_cost_values(data, numbers["costs"]),
            "data": data,
            "drawn": len(numbers["frames"]["step"]),
            "scores": numbers["honesty"],
            "label_groups": _label_groups(numbers["labels"]),
            "cause_words": [(cause, _cause(cause, n)) for cause, n in numbers["label_causes"].items()],
            "model_rows": _model_rows(data.model),
            "versions": " · ".join(f"{name} {version}" for name, version in data.versions.items()),
            "levels": LEVELS,
            "reason_colours": REASON_COLOURS,
            "other_colour": OTHER,
        },
    )


def _sections(data: RunData, numbers: Numbers) -> list[Section]:
    titles = (
        ("stopping", "Why did it stop, and is it converged?", ""),
        ("learning", "How did it learn?", ""),
        ("calibration", "Were errors as large as predicted?", "Was the uncertainty honest?"),
        ("cost", "What did it cost?", ""),
        ("labels", "Which structures were labelled?", ""),
        ("extrapolation", "Where does the model extrapolate?", "Where is the model blind?"),
        ("recipe", "Recipe, model and files", "How was it made?"),
    )
    answers = (
        stop_answer(data),
        learning_answer(data, numbers),
        prequential_answer(data, numbers["honesty"]),
        cost_answer(numbers["costs"]),
        labels_answer(data, numbers["labels"]),
        trajectory_answer(data, numbers.get("blind")),
        recipe_answer(data),
    )
    return [Section(id, title, key or title, answer) for (id, title, key), answer in zip(titles, answers, strict=True)]


def _cost_values(data: RunData, costs: Numbers) -> dict[str, Any]:
    """Tables of oracle calls and of wall time."""
    rows = [
        ("first labels", format_number(costs["first_labels"])),
        ("labels given in a file", format_number(costs["given_labels"])),
        ("labels asked for by the dynamics", format_number(costs["labels_asked_by_dynamics"])),
        ("structures set aside", format_number(costs["refused"])),
        ("attempts that failed", format_number(costs["failed_attempts"])),
        ("further calls, to compare energies with forces", format_number(costs["oracle_checks"])),
        ("steps per label asked for", format_number(costs["steps_per_label"])),
        ("median time of a label", format_duration(costs["oracle_seconds_median"])),
    ]
    total = 3600 * costs["hours"]
    times = []
    if data.seconds and total > 0:
        times = [(ACTIVITIES.get(name, name), seconds) for name, seconds in data.seconds.items()]
        rest = max(total - sum(data.seconds.values()), 0.0)
        times.append(("evaluating frames again, judging, writing, start", rest))
    rows = [row for row in rows if row[0] != "labels given in a file" or costs["given_labels"]]
    return {"cost_rows": rows, "time_rows": times, "total_seconds": total}


def _label_groups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table of labels; those with nothing but a reason, of one kind and one after another, are one row."""
    groups: list[list[dict[str, Any]]] = []
    for row in rows:
        bare = row["walker"] is None and row["largest_error_eV_per_A"] != row["largest_error_eV_per_A"]
        last = groups[-1][-1] if groups else None
        if bare and last is not None and last["walker"] is None and last["cause"] == row["cause"]:
            groups[-1].append(row)
        else:
            groups.append([row])
    keys = (
        *("walker", "step", "temperature_K", "predicted_bound_eV_per_A"),
        *("largest_error_eV_per_A", "limit_eV_per_A", "novelty", "atom"),
    )
    table = []
    for first, *others in groups:
        last = others[-1] if others else first
        notes = dict.fromkeys(
            note for row in (first, *others) for note in reason_notes(row["reason"], row["surrogate"] or "")
        )
        table.append(
            {
                "rank": f"{first['number']}–{last['number']}" if others else first["number"],
                "cause": first["cause"],
                "cells": [None if others else first[key] for key in keys],
                "beyond": not others and first["largest_error_eV_per_A"] > first["limit_eV_per_A"],
                "note": "; ".join(notes),
            }
        )
    return table


def _model_rows(model: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [(name, format_number(model[key])) for key, name in MODEL if model.get(key) is not None]
    rows += [(f"rows of {kind}", format_number(n)) for kind, n in (model.get("rows") or {}).items()]
    noise = (model.get("noise") or {}).items()
    return rows + [(f"noise of {kind}", f"{format_number(v)} {NOISE_UNITS.get(kind, '')}") for kind, v in noise]


def stop_answer(data: RunData) -> str:
    """The verdict in one sentence or two."""
    if data.ended == "converged":
        return "Yes, it is converged: all criteria are met over the same recent frames."
    lead = {
        "labels": "It stopped because it had as many labels as it was allowed, and is not converged.",
        "time": "It stopped because its time was up, and is not converged.",
        "steps": "It stopped because all steps are made, and is not converged.",
        "unstable": "It was given up because a walker could not be kept stable; it is not converged.",
        "": "It has not stopped: it was interrupted or is still going on, and can be resumed (--resume).",
    }[data.ended]
    failed = [c["name"] for c in data.criteria if c["met"] is False]
    open_ = [c["name"] for c in data.criteria if c["met"] is None]
    parts = []
    if failed:
        parts.append(f"not met: {join_words(failed)}")
    if open_:
        parts.append(f"cannot be judged yet: {join_words(open_)}")
    return f"{lead} {_capitalised('; '.join(parts))}." if parts else lead


def _capitalised(words: str) -> str:
    return words[:1].upper() + words[1:]


def learning_answer(data: RunData, numbers: Numbers) -> str:
    """Labels by reason, and when the last one came."""
    asked = data.asked
    first = len(data.labels) - len(asked)
    if not asked:
        return f"From the {first} first labels alone: the dynamics asked for none in {data.total_steps:,} steps."
    counts = {k: v for k, v in numbers["label_causes"].items() if k not in ("first", "given")}
    why = join_words([f"{n} for {CAUSES.get(cause, cause)}" for cause, n in counts.items()])
    since = data.total_steps - max(label.total_step for label in asked)
    limits = [label.limit for label in data.labels if np.isfinite(label.limit)]
    moved = ""
    if limits and format_number(limits[0]) != format_number(limits[-1]):
        ends = " to ".join(format_number(limit) for limit in (limits[0], limits[-1]))
        moved = f" The limit of the force error went from {ends}\u00a0eV/Å as labels came."
    last = f"{since:,} steps before the end" if since > 0 else "at the very end"
    cut = sum(bool(label.surrogate) for label in data.labels)
    surrogates = (
        f" {cut} of these labels are of surrogates, cut out of frames that were too large for the oracle."
        if cut
        else ""
    )
    return (
        f"{first} labels before the dynamics, then {len(asked)} that it asked for in {data.total_steps:,} steps: {why}. The last "
        f"came {last}.{moved}{surrogates}"
    )


def _cause(cause: str, n: int) -> str:
    return f"{n} label{'s' * (n > 1)}, for {CAUSES.get(cause, cause)}"


def prequential_answer(data: RunData, scores: Numbers) -> str:
    """Whether errors were as large as predicted before the labels were learned."""
    if not scores:
        return "Unknown: no label was predicted before it was learned, or the log does not hold the predictions."
    shares = scores["coverage"]["all"]
    verdict, off = calibration_verdict(shares)
    if scores["labels"] < FEWEST_LABELS:
        verdict = "Hard to say from so few labels"
    way = f": error bars were {off}" if off else ""
    bound = ""
    if n := scores["bounds"]:
        expected = n * data.probability
        bound = (
            f" The worst force error of a label went beyond its bound {scores['bounds_exceeded']} of {n} times; to be expected "
            f"{f'were about {expected:.0f}' if expected >= 1.5 else 'was one or less'}."
        )
    return (
        f"{verdict}: of the force errors of {scores['labels']} labels, predicted before they were learned, "
        f"{format_percent(shares['coverage_68'])} lie within one standard deviation (68\u202f% expected) and "
        f"{format_percent(shares['coverage_90'])} within the 90\u202f% interval{way}.{bound}"
    )


def cost_answer(costs: Numbers) -> str:
    """Calls, and how rare they were."""
    calls = f"{costs['oracle_calls']:,} oracle calls"
    if costs["steps"]:
        calls += f" for {costs['steps']:,} steps of dynamics"
    if costs["steps_per_label"]:
        calls += (
            f": after the first labels one in {costs['steps_per_label']:,.0f} steps, so that "
            f"{format_percent(costs['share_of_steps_without_oracle'])} of the steps took none"
        )
    parts = []
    if costs["hours"] > 0:
        parts.append(f"{format_duration(3600 * costs['hours'])} in all")
    if costs["seconds_by_activity"].get("oracle") is not None:
        parts.append(f"{format_duration(costs['seconds_by_activity']['oracle'])} of them waiting for the oracle")
    if costs["seconds_per_step"]:
        parts.append(f"{format_number(1000 * costs['seconds_per_step'])} ms for a step")
    one = costs["refused"] == 1
    refused = f"{'One structure was' if one else str(costs['refused']) + ' structures were'} set aside without a label."
    refused = f" {refused}" if costs["refused"] else ""
    return f"{calls}.{' ' + _capitalised(', '.join(parts)) + '.' if parts else ''}{refused}"


def labels_answer(data: RunData, labels: list[dict[str, Any]]) -> str:
    """What stands out in the table."""
    rows = [r for r in labels if r["largest_error_eV_per_A"] == r["largest_error_eV_per_A"]]
    if not rows:
        return f"All {len(data.labels)} labels are below."
    worst = max(rows, key=lambda r: r["largest_error_eV_per_A"])
    over = [r for r in rows if r["largest_error_eV_per_A"] > r["limit_eV_per_A"]]
    needed = "No error was beyond the limit: the trigger was on the safe side"
    if over:
        needed = f"{len(over)} of {len(rows)} had an error beyond the limit, so that these labels were needed"
    return (
        f"The largest error was that of label {worst['number']}: {format_number(worst['largest_error_eV_per_A'])}\u00a0eV/Å, with a "
        f"predicted bound of {format_number(worst['predicted_bound_eV_per_A'])}. {needed}."
    )


def trajectory_answer(data: RunData, numbers: Numbers | None) -> str:
    """The trust region over the trajectory, under the model as it is now."""
    if data.trajectory is None or numbers is None:
        return "Unknown: there are no frames of a trajectory yet to evaluate with the final model."
    region = numbers["trust_region"]
    lead = f"Under the final model, in {len(data.trajectory.names)} frames of the trajectory: "
    if region is None:
        return lead + "novelty was not computed, so atoms are ranked by their error bars alone."
    share = region["n_outside"] / max(region["n_atoms"], 1)
    typical, largest = numbers["force_std_rms_meV_per_A"], float(1e3 * np.nanmax(data.trajectory.atom_std))
    return (
        f"{lead}{region['n_outside']:,} of {region['n_atoms']:,} atoms ({format_percent(share)}) lie outside the trust region, where "
        f"about 1\u202f% is to be expected; the standard deviation of a force component is {format_number(typical)}\u00a0meV/Å, that "
        f"of the worst atom {format_number(largest)}."
    )


def recipe_answer(data: RunData) -> str:
    """From what, when."""
    oracle, digest = data.oracle
    when = f", from {data.began} to {data.ended_at}" if data.began else ""
    columns = data.model.get("rank")
    size = f" The model has {columns:,} inducing variables." if columns else ""
    return f"With the oracle {oracle} (settings {digest}) and the choices below{when}.{size}"


def key_numbers(data: RunData, numbers: Numbers) -> list[tuple[str, str]]:
    """(number, what it is) for the head of the page."""
    costs, scores = numbers["costs"], numbers["honesty"]
    tiles = [("Converged" if data.ended == "converged" else "Not converged", ENDS[data.ended])]
    if (blind := numbers.get("blind")) is not None:
        std = format_number(blind["force_std_rms_meV_per_A"], 2)
        tiles.append((f"± {std} meV/Å", "force error foreseen along the trajectory (one σ of a component)"))
    tiles.append((f"{len(data.labels)}", f"labels, {costs['labels_asked_by_dynamics']} asked for by the dynamics"))
    if costs["steps"]:
        tiles.append((f"{costs['steps']:,}", "steps of dynamics"))
        tiles.append((format_percent(costs["share_of_steps_without_oracle"]), "of the steps without the oracle"))
    if scores:
        share = format_percent(scores["coverage"]["all"]["coverage_90"])
        few = "" if scores["labels"] >= FEWEST_LABELS else f" ({scores['labels']} labels: too few to judge)"
        tiles.append((share, f"of force errors of new labels in their 90 % interval{few}"))
    return tiles
