"""Sections are the six questions of the report and what stands under each, in the order in which a scientist asks them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpmlp.report.html import cause_keys, figure, live, missing, nested, table, text
from gpmlp.report.model import answers
from gpmlp.report.model.data import NO_TYPE, SCALES, UNITS, Labelled, ReportData
from gpmlp.report.model.environment_drawing import picture
from gpmlp.report.model.figures import Picture
from gpmlp.report.model.numbers import KEYS, ORDERED
from gpmlp.report.model.worst import PER_STRUCTURE
from gpmlp.report.scatter import Scatter
from gpmlp.report.style import CAUSE_NAMES, duration, number, percent

NOISE_UNITS = {"energies": "eV/atom", "forces": "eV/Å", "stresses": "eV/Å³"}
FACTS = (
    ("columns", "inducing variables asked for"),
    ("rank", "kept"),
    ("condition", "condition number"),
    ("jitter", "largest jitter"),
    ("negative_log_evidence", "negative log evidence, nats"),
)
SUBSET = (
    ("columns", "columns kept for variances"),
    ("std_ratio_median", "std of forces from these / from all, median"),
    ("covariance_error_scaled", "relative error of force covariances, scaled"),
    ("std_spearman", "rank correlation of these std"),
)

SCORES = (
    ("n", "components"),
    ("miscalibration_area", "miscalibration area"),
    ("nll", "negative log likelihood"),
    ("crps", "CRPS"),
    ("sharpness", "sharpness"),
)
RANKINGS = {
    "by_error_over_std": "by |error| / σ",
    "by_std": "by σ",
    "by_error": "by error",
    "by_novelty": "by novelty",
}
CHOOSER = '<label class="chooser" hidden>Highlight config_type <select class="type-chooser"></select></label>'


@dataclass(frozen=True, eq=False)
class Content:
    """All that the sections draw on."""

    data: ReportData
    labelled: dict[str, Labelled]
    numbers: dict
    scatters: dict[str, Scatter]
    pictures: dict[str, Picture]

    def plot(self, name: str, title: str, caption: str, size: str = "") -> str:
        """An interactive plot, or '' if it was not made."""
        return live(self.pictures, self.scatters[name], title, caption, size) if name in self.scatters else ""


def _grid(parts: list[str]) -> str:
    parts = [part for part in parts if part]
    return f'<div class="grid n{min(len(parts), 3)}">{"".join(parts)}</div>' if parts else ""


def how_wrong(content: Content) -> str:
    """Parity, distributions and tables of errors."""
    numbers = content.numbers
    if not content.labelled:
        return missing("There are no parity plots or error tables because no structure has a label.")
    names = {"energies": "Energies", "forces": "Forces", "stresses": "Stresses"}
    notes = {"energies": "Energies are less a least-squares fit of the composition."}
    plots = [
        content.plot(f"parity_{kind}", name, notes.get(kind, ""))
        for kind, name in names.items()
        if kind in content.labelled
    ]
    html = [CHOOSER, _grid(plots)]
    absent = [kind for kind in names if kind not in content.labelled]
    if absent:
        html.append(missing(f"No {' and no '.join(absent)} are shown because the data hold no such labels."))
    by = numbers["errors"]["by_config_type"]
    kinds = [kind for kind in ("forces", "energies") if kind in content.labelled] or list(content.labelled)
    first = kinds[0]
    note = (
        "Bar: quartiles; line: 5–95 %; white: median; dot: largest. Numbers in brackets count components. The axis begins at a "
        "hundredth of the median of all errors or above; a triangle marks what goes on below."
    )
    boxes = [
        figure(content.pictures, f"errors_{kind}_config_type", f"{names[kind]} by config_type.", "")
        for kind in kinds
        if by
    ]
    if len(content.data.elements) > 1 or not by:  # of one element it would show the same again
        species = figure(content.pictures, f"errors_{first}_species", f"{names[first]} by element.", "")
        boxes.insert(1 if by else 0, species)
    if not by and first != "forces":
        boxes.append(figure(content.pictures, f"errors_{first}_config_type", names[first]))
    html += ["<h3>How errors are spread</h3>", f'<p class="note">{note}</p>', _grid(boxes)]
    html.append(_error_table(numbers["errors"], content.labelled))
    if not by:
        html.append(missing("Errors are not split by config_type because the structures carry none."))
    return "".join(html)


def _error_table(errors: dict, labelled: dict) -> str:
    kinds = [kind for kind in ("energies", "forces", "stresses") if kind in labelled]
    head = ["", "structures", "atoms"]
    keys = []
    for kind in kinds:
        name, unit = KEYS[kind]
        keys += [f"{name}_mae_{unit}", f"{name}_rmse_{unit}", f"{name}_max_{unit}"]
        head += [f"{name} MAE<small>{UNITS[kind]}</small>", "RMSE", "largest"]
    rows = []
    for label, row in [("all", errors["overall"]), *errors["by_config_type"].items()]:
        shown = f"<b>{text(label)}</b>" if row is errors["overall"] else text(label)
        rows.append([shown, number(row["n_structures"]), number(row["n_atoms"]), *(number(row[key]) for key in keys)])
    return table(head, rows, "Errors")


def does_it_know(content: Content) -> str:
    """Calibration: coverage, error against std, sparsification, scores."""
    data, numbers, pictures = content.data, content.numbers, content.pictures
    judged = list(numbers["reliability"])
    if not judged:
        reason = "no structure has a label" if not content.labelled else "no error bars were computed"
        return missing(f"There is nothing to calibrate because {reason}.")
    main = judged[0]
    left = figure(pictures, "reliability", "Share of errors inside intervals of each expected coverage.")
    area = numbers["sparsification"][main]["share_of_oracle"]
    words = f"Removing the {main} with the largest σ first gains {percent(area)} of what knowing the errors would."
    right = figure(pictures, f"sparsification_{main}", words if area == area else "Error left after removal.")
    html = [_grid([left, right]), _coverage(numbers["coverage"])]
    html.append("<h3>Do larger error bars mean larger errors?</h3>")
    note = "Points on the dashed line: errors as large as predicted. Above it: overconfident; below it: too cautious."
    html += [f'<p class="note">{note}</p>']
    html.append(
        _grid([content.plot(f"error_std_{kind}", kind.capitalize(), "") for kind in ("forces", "energies", "stresses")])
    )
    html += [_scores(data), _rivals(data)]
    without = [kind for kind in content.labelled if kind not in judged]
    if without:
        html.append(
            missing(f"There is no calibration of {' and '.join(without)} because they came without error bars.")
        )
    return "".join(html)


def _coverage(tables: dict) -> str:
    levels = (50, 68, 90, 95)
    names = {"gaussian": "Gaussian interval (multiples of σ)", "conformal": "conformal interval"}
    rows = [
        [f"{text(kind)}, {name}", *(percent(row.get(f"coverage_{level}")) for level in levels)]
        for way, name in names.items()
        for kind, row in tables[way].items()
    ]
    return table(
        ["observed", *(f"{level} % expected" for level in levels)], rows, "Share of errors inside the interval"
    )


def _scores(data: ReportData) -> str:
    scores = {kind: row for kind, row in data.scores.items() if row}
    if not scores:
        return missing("No scores are listed because none were computed.")
    known = [(key, name) for key, name in SCORES if any(key in row for row in scores.values())]
    hidden = {key for key, _ in SCORES} | set(ORDERED.values()) | {f"coverage_{level}" for level in (50, 68, 90, 95)}
    more = sorted({key for row in scores.values() for key in row} - hidden)
    known += [(key, key.replace("_", " ")) for key in more]
    rows = [
        [text(kind), _rank(kind, row), *(_score(kind, key, row.get(key)) for key, _ in known)]
        for kind, row in scores.items()
    ]
    return table(["", "rank correlation", *(text(name) for _, name in known)], rows, "Scores of the error bars")


def _rank(kind: str, row: dict[str, float]) -> str:
    key = ORDERED.get(kind, "")
    return (
        f"{number(row[key])} <small>{key.removeprefix('spearman_').replace('_', ' ')}</small>"
        if key in row
        else number(None)
    )


def _score(kind: str, key: str, value: float | None) -> str:
    if value is None or key not in ("crps", "sharpness"):
        return number(value)
    return f"{number(value * SCALES.get(kind, 1.0))} <small>{UNITS.get(kind, '')}</small>"


def _rivals(data: ReportData) -> str:
    if not data.rivals:
        return missing("Error bars are not compared with other warning signs because that comparison was not made.")
    keys = list(dict.fromkeys(key for row in data.rivals.values() for key in row))
    rows = [[text(name), *(number(row.get(key)) for key in keys)] for name, row in data.rivals.items()]
    head = ["warning sign", *(text(key.replace("_", " ")) for key in keys)]
    return table(head, rows, "How well each warning sign finds the atoms with large force errors")


def where_blind(content: Content) -> str:
    """Novelty map and the worst environments."""
    data, worst = content.data, content.numbers["worst_environments"]
    caption = "Right of the dashed line the model has seen nothing like it"
    caption += "; dark points there are errors it could have foreseen." if np.isfinite(data.atom_error).any() else "."
    plot = content.plot("novelty_std", "", caption, "single")
    html = [
        plot
        or missing("The map of novelty against σ is missing because novelty or force error bars were not computed.")
    ]
    if not worst:
        return "".join(html) + missing("No environments are ranked because there are no force error bars.")
    html.append("<h3>The worst environments</h3>")
    drawn = data.positions is not None and bool(data.cutoff)
    words = f"At most {PER_STRUCTURE} of each structure. σ (and the error) are root mean squares over the three force components."
    words += f" Pictures show the atoms within {number(data.cutoff)} Å; the ringed one is meant." if drawn else ""
    html.append(f'<p class="note">{text(words)}</p>')
    tabs = []
    for k, (name, rows) in enumerate(worst.items()):
        checked = " checked" if k == 0 else ""
        tabs.append(
            f'<input type="radio" name="ranking" id="rank{k}"{checked}><label for="rank{k}">Ranked {text(RANKINGS[name])}</label>'
            f'<div class="tab"><h4>Ranked {text(RANKINGS[name])}</h4>{_environments(data, rows, drawn)}</div>'
        )
    html.append(f'<div class="tabs">{"".join(tabs)}</div>')
    if not drawn:
        html.append(missing("Neighbourhoods are not drawn because positions or the cutoff were not given."))
    return "".join(html)


def _environments(data: ReportData, rows: list[dict], drawn: bool) -> str:
    columns = {
        "force_error_meV_per_A": "error<small>meV/Å</small>",
        "force_std_meV_per_A": "σ<small>meV/Å</small>",
        "error_over_std": "error / σ",
        "novelty": "novelty",
    }
    columns = {key: name for key, name in columns.items() if any(row[key] == row[key] for row in rows)}
    head = [*(["neighbours"] if drawn else []), "atom", *columns.values(), "why it is flagged"]
    body = []
    for row in rows:
        type_ = f'<span class="type">{text(row["config_type"])}</span>' if row["config_type"] else ""
        cells = [picture(data, row["row"])] if drawn else []
        cells += [
            f'<b>{text(row["element"])} {row["atom"]}</b><br><span class="name">{text(row["structure"])}</span>{type_}'
        ]
        body.append([*cells, *(number(row[key]) for key in columns), text(row["why"])])
    return table(head, body, words=(*range(1 + drawn), len(head) - 1), flow=True)


def why(content: Content) -> str:
    """Variances by cause."""
    data = content.data
    if not data.causes:
        return missing("There is no budget because the variances were not split into causes.")
    parts = [
        figure(content.pictures, "budget_by_species", "By element."),
        figure(content.pictures, "budget_by_config_type", "By config_type.") if set(data.types) != {NO_TYPE} else "",
    ]
    words = {
        "noise": "Noise of the labels: convergence of the reference calculations; no model can remove it.",
        "data": "Missing data: what the labels have not fixed yet; labels of such structures remove it.",
        "misspecification": "Misspecification: what this model class cannot express, whatever the data; larger cutoff or richer "
        "descriptors remove it.",
        "inducing": "Inducing set: what the chosen inducing points cannot represent; more of them remove it.",
    }
    explained = "".join(f"<li>{text(words[c])}</li>" for c in data.causes if c in words)
    html = cause_keys(data.causes) + _grid(parts) + _budget_table(content.numbers)
    return html + f'<ul class="causes">{explained}</ul>'


def _budget_table(numbers: dict) -> str:
    """Standard deviations by cause over all data, and their shares of the variance."""
    columns = {
        "forces": numbers["variance_by_cause_meV2_per_A2"]["overall"],
        "energies": numbers["energy_variance_by_cause_meV2_per_atom2"],
    }
    columns = {kind: values for kind, values in columns.items() if sum(values.values()) > 0}
    if not columns:
        return ""
    causes = list(dict.fromkeys(c for values in columns.values() for c in values))
    head, rows = [""], [[text(CAUSE_NAMES.get(cause, cause))] for cause in causes]
    for kind, values in columns.items():
        total = sum(values.values())
        head += [f"{kind}: σ<small>{UNITS[kind]}</small>", "share of variance"]
        for cause, row in zip(causes, rows, strict=True):
            value = values.get(cause, float("nan"))
            row += [number(value**0.5), percent(value / total)]
    return table(head, rows, "All data")


def label_next(content: Content) -> str:
    """Structures to label."""
    rows = content.numbers["label_next"]
    if not rows:
        return missing("No structures are suggested because there are neither force error bars nor novelties.")
    note = (
        "Ordered by the largest force σ times the largest novelty (where above 1); every further structure of a kind already "
        "listed counts 30 % less, so that the list stays diverse."
    )
    body = []
    for k, row in enumerate(rows):
        type_ = f'<span class="type">{text(row["config_type"])}</span>' if row["config_type"] else ""
        cells = [
            f'<span class="rank">{k + 1}</span>',
            f'<span class="name">{text(row["structure"])}</span>{type_}',
            number(row["n_atoms"]),
        ]
        cells += [number(row["largest_force_std_meV_per_A"]), number(row["largest_novelty"]), text(row["why"])]
        body.append(cells)
    head = ["", "structure", "atoms", "largest σ<small>meV/Å</small>", "largest novelty", "why"]
    return f'<p class="note">{note}</p>' + table(head, body, words=(0, 1, 5), flow=True)


def how_made(content: Content) -> str:
    """Recipe, provenance, fit."""
    if not content.data.model and not content.data.dimers and not content.data.citations:
        return missing("Nothing is known of the fit because the model came without a record.")
    return made_html(content.data, content.pictures)


def all_of(content: Content) -> list[tuple[str, str, str, str]]:
    """(id, question, answer, HTML) of each section."""
    data, numbers = content.data, content.numbers
    candidates = numbers["label_next"]
    return [
        ("wrong", "How wrong is it?", answers.how_wrong(data, content.labelled, numbers), how_wrong(content)),
        ("know", "Does it know?", answers.does_it_know(data, numbers), does_it_know(content)),
        ("blind", "Where is it blind?", answers.where_blind(data, numbers), where_blind(content)),
        ("why", "Why?", answers.why(data, numbers), why(content)),
        ("next", "What to label next?", answers.label_next(candidates), label_next(content)),
        ("made", "How was the model made?", answers.how_made(data), how_made(content)),
    ]


def made_html(data: ReportData, pictures: dict[str, Picture]) -> str:
    """All parts, or a sentence for each that is missing."""
    model = data.model
    return "".join(
        [
            _warnings(model.get("warnings")),
            '<div class="halves">',
            _facts(model),
            _noise(model),
            _stages(model.get("stages")),
            _calibration(model.get("calibration")),
            "</div>",
            _files(model.get("provenance") or {}),
            _curves(data, pictures),
            _recipe(model),
            _citations(data.citations),
        ]
    )


def _warnings(warnings: Any) -> str:
    if not warnings:
        return ""
    return (
        '<div class="warnings"><h3>Warnings of the fit</h3><ul>'
        + "".join(f"<li>{text(w)}</li>" for w in warnings)
        + "</ul></div>"
    )


def _facts(model: dict) -> str:
    rows = [[text(f"rows of {kind}"), number(n)] for kind, n in (model.get("rows") or {}).items()]
    rows += [[name, number(model[key])] for key, name in FACTS if model.get(key) is not None]
    subset = model.get("variance_subset") or {}
    rows += [[name, number(subset[key])] for key, name in SUBSET if subset.get(key) is not None]
    for key, name in (("environments", "environments of"), ("centres", "centres of")):
        rows += [[text(f"{name} {of}"), number(n)] for of, n in (model.get(key) or {}).items()]
    return table(["", ""], rows, "Size") if rows else missing("The size of the fit was not recorded.")


def _noise(model: dict) -> str:
    rows = [
        [text(f"noise of {kind}"), f"{number(value)} {NOISE_UNITS.get(kind, '')}"]
        for kind, value in (model.get("noise") or {}).items()
        if not isinstance(value, dict)
    ]
    rows += [[text(f"signal {name}"), f"{number(value)} eV"] for name, value in (model.get("signal") or {}).items()]
    return (
        table(["", ""], rows, "Noise and signal, standard deviations") if rows else missing("Noise was not recorded.")
    )


def _stages(stages: Any) -> str:
    if not stages:
        return missing("Times of the stages were not recorded.")
    total = sum(s[1] for s in stages) or 1.0
    rows = []
    for name, seconds, memory in stages:
        bar = f'<span class="bar"><i style="width:{100 * seconds / total:.0f}%"></i></span>'
        rows.append([text(name), bar, duration(seconds), number(memory)])
    return table(["stage", "", "time", "peak memory<small>MB</small>"], rows, "Time and memory", words=(0, 1))


def _calibration(calibration: Any) -> str:
    if not calibration:
        return missing("There is no record of a calibration of the error bars.")
    return f'<div class="wide nested"><h4>Calibration of the error bars</h4>{nested(calibration)}</div>'


def _files(provenance: dict) -> str:
    files = provenance.get("files") or {}
    if not files:
        out = missing("Data files are not listed because the model carries no provenance.")
    else:
        rows = [
            [text(role), text(entry.get("name", "–")), f"<code>{text(entry.get('sha256') or '–')}</code>"]
            for role, entry in files.items()
        ]
        out = table(["", "file", "SHA-256"], rows, "Data", words=(0, 1, 2))
    versions = provenance.get("versions") or {}
    words = [f"{name} {version}" for name, version in versions.items()]
    if sample := provenance.get("sample"):
        out = missing(f"This is not the mean but a sample: {', '.join(f'{k} {v}' for k, v in sample.items())}.") + out
    if provenance.get("created"):
        words.insert(0, f"made {provenance['created']}")
    return out + (f'<p class="note">{text(" · ".join(words))}</p>' if words else "")


def _curves(data: ReportData, pictures: dict[str, Picture]) -> str:
    parts = [figure(pictures, "evidence", "Evidence while hyperparameters were learned; lower is better.")]
    parts += [figure(pictures, name, "") for name in pictures if name.startswith("dimer_")]
    shown = [part for part in parts if part]
    out = (
        f'<h3>Evidence and pairs of atoms</h3><div class="grid n{min(len(shown), 3)}">{"".join(shown)}</div>'
        if shown
        else ""
    )
    if len(shown) > bool(parts[0]):
        note = "Pairs: energies less those of free atoms; bands: one and two standard deviations; no training data at shaded distances."
        out += f'<p class="note">{note}</p>'
    if not parts[0]:
        out += missing("There is no evidence trace because hyperparameters were not learned or the trace was not kept.")
    if not any(name.startswith("dimer_") for name in pictures):
        out += missing("Dimer curves are missing because they were not computed.")
    return out


def _recipe(model: dict) -> str:
    recipe = model.get("recipe")
    if not recipe:
        return missing("The recipe is missing because it was not handed to the report.")
    return f'<details class="nested" open><summary>Recipe</summary>{nested(recipe)}</details>'


def _citations(citations: tuple[str, ...]) -> str:
    if not citations:
        return missing("No citations are listed because none were given.")
    return f"<details open><summary>What to cite</summary><pre>{text(chr(10).join(c.strip() + chr(10) for c in citations))}</pre></details>"
