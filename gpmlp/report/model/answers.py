"""Answers are the sentences that open the sections: each question of a scientist answered in words, with numbers."""

from __future__ import annotations

from collections import Counter

import numpy as np

from gpmlp.report.model.data import NO_TYPE, UNITS, ReportData
from gpmlp.report.model.numbers import KEYS, given, mean
from gpmlp.report.model.worst import CAUSE_WORDS
from gpmlp.report.style import duration, number, percent

SINGULAR = {"energies": "energy", "forces": "force", "stresses": "stress"}


def how_wrong(data: ReportData, labelled: dict, numbers: dict) -> str:
    """Mean errors, and where they are worst."""
    if not labelled:
        return "Unknown: the data hold no labels to compare with, so only the error bars below can be judged."
    overall, parts = numbers["errors"]["overall"], []
    for kind in ("forces", "energies", "stresses"):
        if kind in labelled:
            name, unit = KEYS[kind]
            value = f"{number(overall[f'{name}_mae_{unit}'])}\u00a0{UNITS[kind]} in {kind}"
            if kind == "forces":
                spread = float(np.std(labelled[kind].reference))
                share = f", {percent(overall[f'{name}_rmse_{unit}'] / spread)} of their spread" if spread > 0 else ""
                value += f" (RMSE {number(overall[f'{name}_rmse_{unit}'])}{share})"
            parts.append(value)
    count = overall["n_structures"]
    sentence = f"On {count:,} {'structure' if count == 1 else 'structures'}, it is off on average by {listed(parts)}"
    tables = numbers["errors"]["by_config_type"]
    kind = "forces" if "forces" in labelled else next(iter(labelled))
    name, unit = KEYS[kind]
    values = {
        t: row[f"{name}_mae_{unit}"]
        for t, row in tables.items()
        if row[f"{name}_mae_{unit}"] == row[f"{name}_mae_{unit}"]
    }
    if len(values) > 1:
        worst, best = max(values, key=values.get), min(values, key=values.get)
        sentence += (
            f"; {kind} are worst in {worst} ({number(values[worst])}\u00a0{UNITS[kind]}) "
            f"and best in {best} ({number(values[best])})"
        )
    return f"{_known(data, count)}{sentence}."


def _known(data: ReportData, count: int) -> str:
    """What the model has learned of these structures already, as a sentence; empty if nothing is known."""
    if data.trained_on:
        return "These are the data the model was trained on, so this says nothing of new structures. "
    if data.held_out:
        return (
            f"Of these structures {data.held_out:,} of {count:,} are among those that the error bars were calibrated on and the model "
            "then learned from, so this says less of new structures than it seems to. "
        )
    return ""


def does_it_know(data: ReportData, numbers: dict) -> str:
    """Whether error bars match errors: coverage by Gaussian and by conformal intervals, area, rank correlation."""
    judged = [kind for kind in ("forces", "energies", "stresses") if kind in numbers["reliability"]]
    if not judged:
        return "Unknown: there are no labels with predicted error bars to compare."
    kind = judged[0]
    curve, cover = numbers["reliability"][kind], numbers["coverage"]["gaussian"]
    scores = data.scores.get(kind) or {}
    area = given(scores, "miscalibration_area", curve["area"])
    verdict = "Yes" if area < 0.03 else "Roughly" if area < 0.08 else "No"
    way = "overconfident" if curve["bias"] < 0 else "too cautious"
    tail = "" if area < 0.03 else f", so error bars are {way}"
    (what, order), *_ = numbers["rank_correlation"][kind].items()
    rank = f" (rank correlation {number(order, 2)} over {what.removeprefix('spearman_of_')})"
    rank = (
        f"; larger error bars {'go' if order > 0.2 else 'hardly go'} with larger errors{rank}" if order == order else ""
    )
    others = [f"{percent(cover[k]['coverage_90'])} for {k}" for k in judged[1:]]
    beside = f"; {listed(others)}" if others else ""
    conformal = numbers["coverage"]["conformal"].get(kind, {}).get("coverage_90")
    held = f"; the conformal 90\u202f% interval holds {percent(conformal)}" if conformal is not None else ""
    return (
        f"{verdict}: {percent(cover[kind]['coverage_68'])} of {SINGULAR[kind]} errors lie within one standard deviation "
        f"(68\u202f% expected) and {percent(cover[kind]['coverage_90'])} within 1.64 of them (90\u202f% expected{beside})"
        f"{tail}{held}{rank}."
    )


def where_blind(data: ReportData, numbers: dict) -> str:
    """How much is outside the trust region and what that costs."""
    region = numbers["trust_region"]
    if region is None:
        if data.force_std is None:
            return "Unknown: neither novelty nor force error bars were computed."
        return "Novelty was not computed, so the environments below are ranked by their error bars alone."
    n, outside = region["n_atoms"], region["n_outside"]
    if not outside:
        return f"Nowhere in these data: all {n:,} atoms lie inside the trust region."
    sentence = f"At {outside:,} of {n:,} atoms ({percent(outside / n)}), which lie outside the trust region"
    if region["n_unseen"]:
        sentence += f", {region['n_unseen']:,} of them of a kind never seen in training"
    inside, beyond = region["rmse_inside_meV_per_A"], region["rmse_outside_meV_per_A"]
    if inside > 0 and beyond == beyond:
        times = number(beyond / inside, 2)
        sentence += (
            f"; the force RMSE there is {number(beyond)}\u00a0meV/Å, {times} times that inside ({number(inside)})"
        )
    types = [(t, s) for t, s in region["share_outside_by_config_type"].items() if s > 0.02 and t != NO_TYPE]
    if types:
        sentence += "; most affected: " + listed([f"{t} ({percent(s)} of its atoms)" for t, s in types[:3]])
    return sentence + "."


def why(data: ReportData, numbers: dict) -> str:
    """Which cause dominates, and what more data could remove."""
    overall = (numbers["variance_by_cause_meV2_per_A2"] or {}).get("overall", {})
    overall = {cause: value for cause, value in overall.items() if value == value}
    total = sum(overall.values())
    if not total > 0:
        return "Unknown: the variances were not split into causes."
    order = sorted(overall, key=lambda cause: -overall[cause])
    first = (
        f"{percent(overall[order[0]] / total)} of the force variance comes from {CAUSE_WORDS.get(order[0], order[0])}"
    )
    rest = [f"{percent(overall[c] / total)} from {CAUSE_WORDS.get(c, c)}" for c in order[1:]]
    advice = {
        "data": "more labels would help most",
        "inducing": "more inducing points would help most",
        "misspecification": "a more flexible model would help most, more labels of the same kind little",
        "noise": "the labels themselves limit the model",
    }.get(order[0])
    return first + (f", {listed(rest)}" if rest else "") + (f": {advice}." if advice else ".")


def label_next(candidates: list[dict]) -> str:
    """What to label first."""
    if not candidates:
        return "Nothing can be suggested: there are neither error bars nor novelties."
    first = candidates[0]
    standing = [c for c in candidates if c["largest_novelty"] > 1 or c["score"] > 2]
    if not standing:
        return f"Nothing stands out: every structure is about as certain as the others; the least certain is {first['structure']}."
    types = Counter(c["config_type"] for c in standing if c["config_type"])
    named = [f"{t} ({n})" for t, n in types.most_common(3)]
    rest = sum(types.values()) - sum(n for _, n in types.most_common(3))
    groups = f", of the kinds {listed(named + ([f'others ({rest})'] if rest else []))}" if types else ""
    words = f"{len(standing)} structures stand out" if len(standing) > 1 else "One structure stands out"
    largest = first["largest_force_std_meV_per_A"]
    size = f", whose force error bar reaches {number(largest)}\u00a0meV/Å" if largest > 0 else ""
    return f"{words}{groups}; begin with {first['structure']}{size}."


def how_made(data: ReportData) -> str:
    """Size, time and memory of the fit."""
    model = data.model
    if not model:
        return "Unknown: the model came without a record of how it was made."
    parts = []
    rows = model.get("rows")
    if rows:
        parts.append(f"from {sum(rows.values()) if isinstance(rows, dict) else rows:,} observations")
    if model.get("rank"):
        parts.append(f"with {model['rank']:,} of {model.get('columns') or model['rank']:,} inducing variables")
    stages = model.get("stages") or ()
    if stages:
        seconds, memory = sum(s[1] for s in stages), max(s[2] for s in stages)
        parts.append(f"in {duration(seconds)} and {number(memory / 1024, 2)} GB of memory")
    warned = len(model.get("warnings") or ())
    end = {0: "; without warnings", 1: "; with one warning"}.get(warned, f"; with {warned} warnings")
    return (
        f"{data.model_name} was fitted {' '.join(parts)}{end}."
        if parts
        else f"{data.model_name}: see the recipe below{end}."
    )


def key_numbers(data: ReportData, labelled: dict, numbers: dict) -> list[tuple[str, str]]:
    """(number, what it is) for the head of the page."""
    found = []
    for kind in ("forces", "energies"):
        if kind in labelled:
            name, unit = KEYS[kind]
            found.append(
                (
                    f"{number(numbers['errors']['overall'][f'{name}_mae_{unit}'])} {UNITS[kind]}",
                    f"mean {SINGULAR[kind]} error",
                )
            )
    judged = next((k for k in ("forces", "energies", "stresses") if k in numbers["reliability"]), None)
    if judged:
        found.append(
            (
                percent(numbers["coverage"]["gaussian"][judged]["coverage_90"]),
                f"of {SINGULAR[judged]} errors within 1.64 σ (90 % expected)",
            )
        )
    if data.force_std is not None and np.isfinite(data.force_std).any():
        found.append(
            (f"{number(1e3 * mean(data.force_std[np.isfinite(data.force_std)]))} meV/Å", "mean force error bar")
        )
    region = numbers["trust_region"]
    if region:
        found.append((percent(region["n_outside"] / max(region["n_atoms"], 1)), "of atoms outside the trust region"))
    return found


def listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""
