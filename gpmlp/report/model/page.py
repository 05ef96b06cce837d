"""The uncertainty report: answers to a scientist's questions about a model, and the page that holds them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from gpmlp.core.findings import Finding
from gpmlp.report.figures import PointLabels
from gpmlp.report.model.data import LEVELS, NO_TYPE, ORDERED, SCALES, SINGULAR, UNITS, LabelledComponents, ReportData
from gpmlp.report.model.figures import draw_figures, scatter_plots
from gpmlp.report.model.numbers import KEYS, all_numbers, calibration_verdict, labelled_views, mean_value, trust_region
from gpmlp.report.model.worst import PER_STRUCTURE, SIGNS, draw_environment, label_next, worst_environments
from gpmlp.report.page import Page, Section
from gpmlp.report.style import (
    CAUSE_COLOURS,
    CAUSE_NAMES,
    CAUSE_PHRASES,
    OTHER,
    format_duration,
    format_number,
    format_percent,
    join_words,
)

Labelled = dict[str, LabelledComponents]
Numbers = dict[str, Any]
MAIN_KINDS = ("forces", "energies", "stresses")  # in the order of their weight in answers
NOISE_UNITS = {"energies": "eV/atom", "forces": "eV/Å", "stresses": "eV/Å³"}
SIZES = (
    ("columns", "inducing variables asked for"),
    ("rank", "of these independent"),
    ("condition", "condition number"),
    ("jitter", "largest jitter"),
    ("negative_log_evidence", "negative log evidence, nats"),
)
SUBSET = (
    ("columns", "columns for variances"),
    ("std_ratio_median", "std of forces from these / from all, median"),
    ("covariance_error_scaled", "relative error of force covariances, scaled"),
    ("std_spearman", "rank correlation of these std"),
)
SCORES = {  # of error bars: name, and what it means
    "n": ("components", "numbers compared: three for the force on an atom, one for an energy, six for a stress"),
    "miscalibration_area": ("miscalibration area", "between observed and expected coverage, 0 to 0.5; 0 = calibrated"),
    "nll": ("NLL", "negative log likelihood of an error, nats, errors in eV, eV/Å or eV/Å³; the lower the better"),
    "crps": ("CRPS", "continuous ranked probability score: as a mean error, for a distribution; the lower the better"),
    "sharpness": ("sharpness", "root mean square of σ"),
    "ence": (
        "ENCE",
        "expected normalised calibration error: |rms error − rms σ| / rms σ, mean over groups of like σ; 0 = calibrated",
    ),
    "rms_z": ("rms of error/σ", "1 = calibrated, above 1: error bars too small"),
    "spearman_within_frame": (
        "rank correlation within frames",
        "of σ and |error| of the atoms of one structure: 1 = same order",
    ),
    "n_symmetric": ("fixed by symmetry", "components that are zero for any potential, left out of the other scores"),
}


def write_model_page(data: ReportData, folder: Path) -> Path:
    """Write index.html, report.json and figures/ into folder (created if missing); return the path of index.html."""
    return model_page(data).write(folder)


def model_page(data: ReportData) -> Page:
    """The page about a model: its numbers computed, its figures drawn."""
    with np.errstate(all="ignore"):
        labelled = labelled_views(data)
        numbers = all_numbers(data, labelled)
        numbers |= {"worst_environments": worst_environments(data), "label_next": label_next(data)}
        plots = scatter_plots(data, labelled)
        pictures = draw_figures(data, labelled, numbers, plots)
    return Page(
        template="model.html",
        kind="Uncertainty report",
        title=data.title,
        about=(
            ("Model", data.model_name),
            ("Data", data.data_name),
            (f"{len(data.names):,} structures, {len(data.structure):,} atoms", ""),
        ),
        tiles=key_numbers(data, labelled, numbers),
        sections=_sections(data, labelled, numbers),
        record={
            "model_name": data.model_name,
            "data_name": data.data_name,
            **numbers,
            "model": data.model,
            "label_findings": [finding.as_dict() for finding in data.findings],
            "dimers": data.dimers,
            "citations": data.citations,
        },
        scatters={plot.name: plot for plot in plots},
        pictures=pictures,
        labels=PointLabels(data.names, data.config_type, data.species, data.atom),
        whole="whole structure",
        values={
            **numbers,
            **extrapolation_values(data),
            **_score_values(data),
            "group_rows": _group_rows(data),
            **_budget_values(numbers),
            **_fit_values(data.model),
            "findings": label_findings(data),
            "labelled": labelled,
            "dimer_figures": [name for name in pictures if name.startswith("dimer_")],
            "has_types": set(data.types) != {NO_TYPE},
            "keys": KEYS,
            "units": UNITS,
            "levels": LEVELS,
            "cause_colours": CAUSE_COLOURS,
            "other_colour": OTHER,
        },
    )


def _sections(data: ReportData, labelled: Labelled, numbers: Numbers) -> list[Section]:
    titles = (
        ("errors", "How large are the errors?", "How wrong is it?"),
        ("calibration", "Are the error bars calibrated?", "Does it know?"),
        ("extrapolation", "Where does the model extrapolate?", "Where is it blind?"),
        ("causes", "What causes the uncertainty?", "Why?"),
        ("labelling", "Which structures to label next?", "What to label next?"),
        ("labels", "Are the labels consistent?", "Are the data right?"),
        ("charges", "Where are the charges?", "Where are the charges?"),
        ("fit", "How was the model fitted?", "How was the model made?"),
    )
    answers = (
        error_answer(data, labelled, numbers),
        calibration_answer(data, numbers),
        extrapolation_answer(data, numbers),
        cause_answer(numbers),
        labelling_answer(numbers["label_next"]),
        label_answer(data),
        charge_answer(numbers["charges"]),
        fit_answer(data),
    )
    return [Section(*title, answer) for title, answer in zip(titles, answers, strict=True) if answer]


def extrapolation_values(data: ReportData) -> dict[str, Any]:
    """What the template needs for the map of novelty and the worst environments."""
    has_errors = bool(np.isfinite(data.atom_error).any())
    return {
        "data": data,
        "per_structure": PER_STRUCTURE,
        "signs": SIGNS,
        "cause_names": CAUSE_NAMES,
        "has_errors": has_errors,
        "novelty_by_species": (trust_region(data) or {}).get("by_species", {}),
        "draw_environment": draw_environment,
    }


def _score_values(data: ReportData) -> dict[str, Any]:
    """The table of scores: names of its columns, and rows of (value, unit)."""
    scores = {kind: row for kind, row in data.scores.items() if row}
    keys = [key for key in SCORES if any(key in row for row in scores.values())]
    hidden = {*SCORES, *ORDERED.values(), *(f"coverage_{level}" for level in LEVELS)}
    keys += sorted({key for row in scores.values() for key in row} - hidden)
    rows = []
    for kind, row in scores.items():
        order = ORDERED.get(kind, "")
        cells = [(row.get(order), order.removeprefix("spearman_").replace("_", " ") if order in row else "")]
        for key in keys:
            value, unit = row.get(key), ""
            if value is not None and key in ("n", "n_symmetric"):
                value = int(value)
            if value is not None and key in ("crps", "sharpness"):
                value, unit = value * SCALES.get(kind, 1.0), UNITS.get(kind, "")
            cells.append((value, unit))
        rows.append({"kind": kind, "cells": cells})
    words = [SCORES.get(key, (key.replace("_", " "), "")) for key in keys]
    return {"score_names": [name for name, _ in words], "score_rows": rows, "score_words": words}


def _group_rows(data: ReportData) -> list[tuple[str, str, list[float | None]]]:
    """Error bars by config_type: name, kind, and number, share in the 90 % interval, rms of error/σ, NLL, rank correlation in a frame."""
    keys = ("n", "coverage_90", "rms_z", "nll", "spearman_within_frame")
    return [
        (name, kind, [row.get(key) for key in keys])
        for name, scores in data.group_scores.items()
        for kind, row in scores.items()
    ]


def _budget_values(numbers: Numbers) -> dict[str, Any]:
    """The table of standard deviations by cause over all data, and their shares of the variance."""
    columns = {
        "forces": (numbers["variance_by_cause_meV2_per_A2"] or {}).get("overall", {}),
        "energies": numbers["energy_variance_by_cause_meV2_per_atom2"],
    }
    columns = {kind: values for kind, values in columns.items() if sum(values.values()) > 0}
    causes = dict.fromkeys(cause for values in columns.values() for cause in values)
    rows = []
    for cause in causes:
        variances = [(values.get(cause, float("nan")), sum(values.values())) for values in columns.values()]
        rows.append((cause, [(value**0.5, value / total) for value, total in variances]))
    return {"budget_kinds": list(columns), "budget_rows": rows}


def _fit_values(model: dict[str, Any]) -> dict[str, Any]:
    """Tables of the section about the fit."""
    sizes = [(f"rows of {kind}", format_number(n)) for kind, n in (model.get("rows") or {}).items()]
    subset = model.get("variance_subset") or {}
    for record, names in ((model, SIZES), (subset, SUBSET)):
        sizes += [(name, format_number(record[key])) for key, name in names if record.get(key) is not None]
    low_rank = model.get("low_rank") or {}
    if low_rank:
        sizes += [
            (f"rank of the mean of {kind}", f"{n} of {low_rank['features'][kind]}")
            for kind, n in low_rank["rank"].items()
        ]
        share = low_rank["change_of_forces_eV_per_A"] / low_rank["noise_of_forces_eV_per_A"]
        sizes.append(("forces change by that, share of their noise", format_percent(share)))
    for key in ("environments", "centres"):
        sizes += [(f"{key} of {kind}", format_number(n)) for kind, n in (model.get(key) or {}).items()]
    shown = model.get("label_noise") or {}
    noise = [
        (f"{name} of {kind}", f"{format_number(record[kind])} {NOISE_UNITS.get(kind, '')}")
        for kind in model.get("noise") or {}
        for record, name in ((model["noise"], "noise, with what the model misses,"), (shown, "label noise alone"))
        if isinstance(record.get(kind), (int, float))
    ]
    noise += [(f"signal {name}", f"{format_number(value)} eV") for name, value in (model.get("signal") or {}).items()]
    origin = model.get("provenance") or {}
    versions = [f"fitted {origin['created']}"] if origin.get("created") else []
    versions += [f"{name} {version}" for name, version in (origin.get("versions") or {}).items()]
    return {
        "fit_sizes": sizes,
        "noise_rows": noise,
        "calibration_rows": _calibration_rows(model.get("calibration") or {}),
        "calibration_source": _calibration_source(model.get("calibration") or {}),
        "sample_words": ", ".join(f"{k} {v}" for k, v in (origin.get("sample") or {}).items()),
        "file_rows": [
            (role, entry.get("name", "–"), entry.get("sha256") or "–")
            for role, entry in (origin.get("files") or {}).items()
        ],
        "versions": " · ".join(versions),
    }


def _calibration_rows(calibration: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Of each kind that was calibrated: number of errors, factor on σ, weights of the parts of the variance, half-width of the 90 %
    interval, range of the factors of config_types."""
    rows = []
    for kind, learned in (calibration.get("kinds") or {}).items():
        if not learned.get("n"):
            continue
        level = list(calibration["levels"]).index(0.9)
        factors = [group["std"] for group in (learned.get("groups") or {}).values()]
        weights = [format_number(weight) for weight in learned.get("weights") or (1.0, 1.0, 1.0)]
        among = f"{format_number(min(factors), 2)} – {format_number(max(factors), 2)}" if factors else "–"
        width = f"{format_number(learned['multipliers']['all'][level])} σ"
        rows.append((kind, [f"{learned['n']:,}", format_number(learned["scale"]), *weights, width, among]))
    return rows


def _calibration_source(calibration: dict[str, Any]) -> str:
    """From which structures a calibration was learned."""
    source = calibration.get("source") or {}
    if "held_out_structures" not in source:
        return ""
    novelty = calibration.get("typical_novelty")
    beyond = f"; error bars grow with novelty beyond {format_number(novelty)}" if novelty else ""
    return f"{source['held_out_structures']:,} structures, {source['held_out_atoms']:,} atoms, {source['how']}{beyond}."


def error_answer(data: ReportData, labelled: Labelled, numbers: Numbers) -> str:
    """Mean errors, and where they are worst."""
    if not labelled:
        return "Unknown: the data hold no labels to compare with, so only the error bars below can be judged."
    overall, parts = numbers["errors"]["overall"], []
    for kind in (kind for kind in MAIN_KINDS if kind in labelled):
        name, unit = KEYS[kind]
        part = f"{format_number(overall[f'{name}_mae_{unit}'])}\u00a0{UNITS[kind]} in {kind}"
        if kind == "forces":
            rmse, width = overall[f"{name}_rmse_{unit}"], float(np.std(labelled[kind].reference))
            share = f", {format_percent(rmse / width)} of their standard deviation" if width > 0 else ""
            part += f" (RMSE {format_number(rmse)}{share})"
        parts.append(part)
    count = overall["n_structures"]
    sentence = (
        f"On {count:,} {'structure' if count == 1 else 'structures'}, it is off on average by {join_words(parts)}"
    )
    kind = "forces" if "forces" in labelled else next(iter(labelled))
    key = "{}_mae_{}".format(*KEYS[kind])
    tables = numbers["errors"]["by_config_type"]
    means = {name: row[key] for name, row in tables.items() if row[key] == row[key]}
    if len(means) > 1:
        worst, best = (choose(means, key=lambda name: means[name]) for choose in (max, min))
        sentence += (
            f"; {kind} are worst in {worst} ({format_number(means[worst])}\u00a0{UNITS[kind]}) "
            f"and best in {best} ({format_number(means[best])})"
        )
    return f"{_overlap(data, count)}{sentence}."


def _overlap(data: ReportData, count: int) -> str:
    """A warning where these structures served for training or calibration; '' if not."""
    if data.trained_on:
        return "These are the data the model was trained on, so errors of new structures may be larger. "
    if data.held_out:
        return (
            f"Of these structures {data.held_out:,} of {count:,} are among those that the error bars were calibrated on and the model "
            "then trained on, so errors of new structures may be larger. "
        )
    return ""


def calibration_answer(data: ReportData, numbers: Numbers) -> str:
    """Whether error bars match errors: coverage by Gaussian and by conformal intervals, area, rank correlation."""
    judged = [kind for kind in MAIN_KINDS if kind in numbers["reliability"]]
    if not judged:
        return "Unknown: there are no labels with predicted error bars to compare."
    if data.trained_on:
        return (
            "Not to be judged here: the model was trained on these data, so their errors say nothing of those of new structures. "
            "The page of a learning run judges by labels that were predicted before they were learned."
        )
    kind = judged[0]
    cover = numbers["coverage"]["gaussian"]
    verdict, way = calibration_verdict(cover[kind])
    tail = f", so error bars are {way}" if way else ""
    (what, order), *_ = numbers["rank_correlation"][kind].items()
    rank = ""
    if order == order:
        rank = f"; larger error bars {'go' if order > 0.2 else 'hardly go'} with larger errors"
        rank += f" (rank correlation {format_number(order, 2)} over {what.removeprefix('spearman_of_')})"
    others = [f"{format_percent(cover[k]['coverage_90'])} for {k}" for k in judged[1:]]
    more = f"; {join_words(others)}" if others else ""
    conformal = numbers["coverage"]["conformal"].get(kind, {}).get("coverage_90")
    held = f"; conformal 90\u202f% intervals, which `gpmlp evaluate` counts, hold {format_percent(conformal)}"
    held = held if conformal is not None else ""
    return (
        f"{verdict}: {format_percent(cover[kind]['coverage_68'])} of {SINGULAR[kind]} errors lie within one standard deviation "
        f"(68\u202f% expected) and {format_percent(cover[kind]['coverage_90'])} within 1.64 of them (90\u202f% expected{more})"
        f"{tail}{held}{rank}."
    )


def extrapolation_answer(data: ReportData, numbers: Numbers) -> str:
    """How much is outside the trust region and what that costs."""
    region = numbers["trust_region"]
    if region is None:
        if data.force_std is None:
            return "Unknown: neither novelty nor force error bars were computed."
        return "Novelty was not computed, so the environments below are ranked by their error bars alone."
    n, outside = region["n_atoms"], region["n_outside"]
    if not outside:
        return f"Nowhere in these data: all {n:,} atoms lie inside the trust region."
    sentence = f"At {outside:,} of {n:,} atoms ({format_percent(outside / n)}), which lie outside the trust region"
    if region["n_unseen"]:
        sentence += f", {region['n_unseen']:,} of them of species without training data"
    inside, beyond = region["rmse_inside_meV_per_A"], region["rmse_outside_meV_per_A"]
    if inside > 0 and beyond == beyond:
        times = format_number(beyond / inside, 2)
        sentence += f"; the force RMSE there is {format_number(beyond)}\u00a0meV/Å, {times} times that inside ({format_number(inside)})"
    types = [(t, s) for t, s in region["share_outside_by_config_type"].items() if s > 0.02 and t != NO_TYPE]
    if types:
        sentence += "; most affected: " + join_words([f"{t} ({format_percent(s)} of its atoms)" for t, s in types[:3]])
    return sentence + "."


def cause_answer(numbers: Numbers) -> str:
    """Which cause dominates, and what more data could remove."""
    overall = (numbers["variance_by_cause_meV2_per_A2"] or {}).get("overall", {})
    overall = {cause: value for cause, value in overall.items() if value == value}
    total = sum(overall.values())
    if not total > 0:
        return "Unknown: the variances were not split into causes."
    order = sorted(overall, key=lambda cause: -overall[cause])
    first = f"{format_percent(overall[order[0]] / total)} of the force variance comes from {CAUSE_PHRASES.get(order[0], order[0])}"
    rest = [f"{format_percent(overall[c] / total)} from {CAUSE_PHRASES.get(c, c)}" for c in order[1:]]
    advice = {
        "data": "more labels would help most",
        "inducing": "more inducing points would help most",
        "misspecification": "a more flexible model would help most, more labels of the same kind little",
        "noise": "the labels themselves limit the model",
    }.get(order[0])
    return first + (f", {join_words(rest)}" if rest else "") + (f": {advice}." if advice else ".")


def labelling_answer(candidates: list[dict[str, Any]]) -> str:
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
    groups = f", of the kinds {join_words(named + ([f'others ({rest})'] if rest else []))}" if types else ""
    words = f"{len(standing)} structures stand out" if len(standing) > 1 else "One structure stands out"
    largest = first["largest_force_std_meV_per_A"]
    size = f", whose force error bar reaches {format_number(largest)}\u00a0meV/Å" if largest > 0 else ""
    return f"{words}{groups}; begin with {first['structure']}{size}."


def label_findings(data: ReportData) -> dict[str, list[Finding]]:
    """Findings about the data and about the training data of the model, by what the page calls them."""
    of_fit = [Finding.from_dict(values) for values in data.model.get("findings") or ()]
    tables = {f"Findings in {data.data_name}": list(data.findings), "Findings in the training data": of_fit}
    return {title: findings for title, findings in tables.items() if findings}


def label_answer(data: ReportData) -> str:
    """How many findings there are about the labels, and the first of the gravest."""
    findings = [finding for finding in data.findings if finding.severity != "note"]
    if not findings:
        return f"The checks of labels find nothing wrong in {data.data_name}."
    errors = sum(finding.severity == "error" for finding in findings)
    count = f"{len(findings)} finding{'s' * (len(findings) > 1)} in {data.data_name}, {errors} of them grave"
    return f"{count}. {findings[0]}"


def charge_answer(charges: Numbers | None) -> str:
    """Mean charges of the elements, and how much of the scatter of energies is of charges; '' of a model without."""
    if charges is None:
        return ""
    means = [f"{row['mean_e']:+.2f}\u00a0e on {name}".replace("-", "−") for name, row in charges["by_species"].items()]
    of_charges, rest = (row["std_meV_per_atom"] for row in charges["energies"].values())
    return (
        f"On average {join_words(means)}. From structure to structure the energy of these charges varies by "
        f"{format_number(of_charges)}\u00a0meV/atom (standard deviation), that of the rest by {format_number(rest)}."
    )


def fit_answer(data: ReportData) -> str:
    """Size, time and memory of the fit."""
    model = data.model
    if not model:
        return "Unknown: the model came without a record of its fit."
    parts = []
    if rows := model.get("rows"):
        parts.append(f"from {sum(rows.values()) if isinstance(rows, dict) else rows:,} observations")
    if rank := model.get("rank"):
        parts.append(f"with {rank:,} of {model.get('columns') or rank:,} inducing variables")
    if stages := model.get("stages"):
        seconds, memory = sum(s[1] for s in stages), max(s[2] for s in stages)
        parts.append(f"in {format_duration(seconds)} and {format_number(memory / 1024, 2)} GB of memory")
    warned = len(model.get("warnings") or ())
    end = {0: "; without warnings", 1: "; with one warning"}.get(warned, f"; with {warned} warnings")
    return f"{data.model_name} {'was fitted ' + ' '.join(parts) if parts else 'is described below'}{end}."


def key_numbers(data: ReportData, labelled: Labelled, numbers: Numbers) -> list[tuple[str, str]]:
    """(number, what it is) for the head of the page."""
    tiles = []
    for kind in ("forces", "energies"):
        if kind in labelled:
            mae = numbers["errors"]["overall"]["{}_mae_{}".format(*KEYS[kind])]
            of = " of data it was trained on" if data.trained_on else ""
            tiles.append((f"{format_number(mae)} {UNITS[kind]}", f"mean {SINGULAR[kind]} error{of}"))
    judged = next((k for k in MAIN_KINDS if k in numbers["reliability"]), None)
    if judged and not data.trained_on:
        share = numbers["coverage"]["gaussian"][judged]["coverage_90"]
        tiles.append((format_percent(share), f"of {SINGULAR[judged]} errors within 1.64 σ (90 % expected)"))
    if data.force_std is not None and np.isfinite(data.force_std).any():
        std = 1e3 * mean_value(data.force_std[np.isfinite(data.force_std)])
        tiles.append((f"{format_number(std)} meV/Å", "mean force error bar"))
    if region := numbers["trust_region"]:
        share = region["n_outside"] / max(region["n_atoms"], 1)
        tiles.append((format_percent(share), "of atoms outside the trust region"))
    return tiles
