"""Made is the last section of the report: recipe, data files, noise, time and memory, evidence, dimers, warnings, citations."""

from __future__ import annotations

from typing import Any

from gpmlp.report.data import ReportData
from gpmlp.report.figures import Picture
from gpmlp.report.markup import figure, missing, nested, table, text
from gpmlp.report.words import duration, number

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


def html(data: ReportData, pictures: dict[str, Picture]) -> str:
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
