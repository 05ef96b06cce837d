"""The page about properties of a potential: what they are, how sure they are, how they run, and what they were computed from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from gpmlp.properties.compute import PropertyResults
from gpmlp.properties.values import PropertyCurve, PropertyValue, has_spread
from gpmlp.report.page import Page, Section
from gpmlp.report.properties.figures import curve_picture, cut_off, is_band_structure
from gpmlp.report.properties.words import named_in_words, pretty_unit, to_its_error
from gpmlp.report.style import format_number, format_percent, join_words

FILE, NUMBERS = "properties.html", "properties.json and curves.json"
FAR = 1.0  # novelty from which on a structure is unlike the training data
PART_NAMES = {
    "sampled": "what the data leave open",
    "statistical": "noise of averages",
}
LONGEST_LIST = 400  # structures in the table


STATIC = "Samples were evaluated at the structures of the mean, with one Newton step of ions at rest; --full relaxes each anew."
RELAXED = "Each sample relaxed structures of its own."
MADE = "made on the mean of the posterior; they are in structures.xyz"


def write_page(
    results: PropertyResults,
    folder: Path,
    model: str = "",
    numbers: str = NUMBERS,
    route: str | None = None,
    origin: str = MADE,
    truth: Mapping[str, float] = {},
) -> Path:
    """Write properties.html and figures/ into folder (created if missing); return the path of the page.

    Args:
        model: what the head calls the potential. numbers: files that hold them.
        route: a sentence on how samples came to their values; None: as compute_properties does.
        origin: where the structures come from and are, in words that follow on their number.
        truth: values of the oracle, by name.

    Raises:
        UserError: matplotlib is not installed.
    """
    route = route or (RELAXED if results.full else STATIC)
    return properties_page(results, model, numbers, route, origin, truth).write(folder)


def properties_page(
    results: PropertyResults, model: str, numbers: str, route: str, origin: str, truth: Mapping[str, float]
) -> Page:
    """The page, its figures drawn."""
    pictures = {slug(curve.name): curve_picture(curve) for curve in results.curves if np.isfinite(curve.value).any()}
    formulas = _formulas(results)
    return Page(
        template="properties.html",
        kind="Properties",
        title=f"Properties of {join_words(formulas)}",
        about=[("Model", model)] * bool(model) + [("Samples of the posterior", str(results.samples))],
        tiles=_tiles(results),
        sections=_sections(results, bool(pictures), f"{oracle_answer(results.values, truth)}{route}", origin),
        pictures=pictures,
        values={
            "groups": _groups(results.values, truth),
            "any_truth": bool(truth),
            "captions": {slug(curve.name): _caption(curve) for curve in results.curves},
            "wide": [slug(curve.name) for curve in results.curves if is_band_structure(curve)],
            "failures": results.failures,
            "parts": [name for name in PART_NAMES if any(name in value.parts for value in results.values)],
            "part_names": PART_NAMES,
            "structure_rows": _structure_rows(results),
            "samples": results.samples,
        },
        file=FILE,
        numbers_in=numbers,
    )


def _sections(results: PropertyResults, curves: bool, route: str, origin: str) -> list[Section]:
    made = [Section("values", "What are the values, and how sure?", "", _values_answer(results))]
    if curves:
        made.append(Section("curves", "How do they run?", "", _curves_answer(results)))
    made.append(Section("trust", "Can the error bars be trusted?", "", _trust_answer(results, route)))
    made.append(Section("structures", "What were they computed from?", "", _structures_answer(results, origin)))
    return made


def _tiles(results: PropertyResults) -> list[tuple[str, str]]:
    tiles = [(str(len(results.values)), "properties")]
    shares = _shares(results.values)
    if shares:
        tiles.append((format_percent(float(np.median(list(shares.values())))), "σ of a typical one, of its value"))
    novelty = _novelty(results.values)
    if novelty is not None:
        tiles.append((format_number(novelty, 2), "largest novelty (1 = edge of the training data)"))
    lost = sum(value.failed > 0 for value in results.values)
    if lost:
        tiles.append((str(lost), "properties that some samples do not have"))
    return tiles


def _values_answer(results: PropertyResults) -> str:
    """The headline: how many, how sure, which is worst."""
    n = len(results.values)
    lead = f"{n} {'property' if n == 1 else 'properties'} of the mean of the posterior"
    shares = _shares(results.values)
    if not results.samples:
        return f"{lead}, without error bars: the model has no variances, or no samples were asked for."
    lead += f", with error bars from {results.samples} samples of it"
    if not shares:
        return f"{lead}."
    worst = max(shares, key=lambda name: shares[name])
    typical = format_percent(float(np.median(list(shares.values()))))
    sentence = f"{lead}: the standard deviation is typically {typical} of the value"
    if len(shares) > 1:
        sentence += f", and largest for “{named_in_words(worst)}” ({format_percent(shares[worst])})"
    return f"{sentence}."


def _curves_answer(results: PropertyResults) -> str:
    if not results.samples:
        return "Lines are those of the mean; there are no error bars."
    return "Lines are those of the mean, the shaded parts their intervals of 90\u202f%, place by place."


def _trust_answer(results: PropertyResults, route: str) -> str:
    """Novelty, failures and the route, in a few sentences."""
    sentences = []
    novelty = _novelty(results.values)
    far = [value for value in results.values if value.novelty is not None and value.novelty > FAR]
    if novelty is None:
        sentences.append(
            "The model has no novelty, so that it cannot tell which structures are unlike its training data."
        )
    elif far:
        names = join_words(list(dict.fromkeys(_calculation(value) for value in far)))
        sentences.append(
            f"{len(far)} of {len(results.values)} come from structures unlike the training data "
            f"(novelty up to {format_number(novelty, 2)}): {names}. Their error bars are extrapolated."
        )
    else:
        sentences.append(f"All structures are like the training data (novelty at most {format_number(novelty, 2)}).")
    without = [value for value in results.values if not has_spread(value.samples - value.failed, value.samples)]
    lost = [value for value in results.values if value.failed and value not in without]
    if lost:
        most = max(value.failed for value in lost)
        sentences.append(
            f"{len(lost)} of {len(results.values)} do not exist on some samples (up to {most} of {results.samples}); "
            "their error bars are from the median deviation of the others."
        )
    if without and results.samples:
        sentences.append(
            f"{len(without)} of {len(results.values)} exist on hardly any sample (fewer than 5, or than half), and have no error bar."
        )
    if results.samples and not lost and not without:
        sentences.append("Every sample has every property.")
    if results.samples:
        sentences.append(route)
    return " ".join(sentences)


def oracle_answer(values: Iterable[PropertyValue], truth: Mapping[str, float]) -> str:
    """How many of the oracle's values lie in the intervals, and rms of error/σ; '' where there are none to compare."""
    known = [value for value in values if value.sigma > 0 and np.isfinite(truth.get(value.name, float("nan")))]
    if not known:
        return ""
    z = [(value.value - truth[value.name]) / value.sigma for value in known]
    inside = sum(value.low_90 <= truth[value.name] <= value.high_90 for value in known)
    return (
        f"Of {len(known)} values the oracle's own lies inside the 90\u202f% interval for {inside}; errors are "
        f"{format_number(float(np.sqrt(np.mean(np.square(z)))), 2)} σ (rms; 1 is calibrated). "
    )


def _structures_answer(results: PropertyResults, origin: str) -> str:
    n, atoms = len(results.structures), sum(map(len, results.structures))
    counted = f"One structure with {atoms:,} atoms" if n == 1 else f"{n:,} structures with {atoms:,} atoms in all"
    return f"{counted}, {origin}."


def _groups(values: Sequence[PropertyValue], truth: Mapping[str, float]) -> list[dict[str, Any]]:
    """Rows of the table by calculation (and structure, where there are several)."""

    def key(value: PropertyValue) -> tuple[str, str]:
        return value.name.rpartition(".")[0], value.calculation

    groups = []
    for (structure, calculation), each in groupby(values, key):
        title = named_in_words(calculation or "properties") + (f" of {structure}" if structure else "")
        rows = [_row(value, truth.get(value.name, float("nan"))) for value in each]
        groups.append({"title": title, "rows": rows, "any_failed": any(row["failed"] for row in rows)})
    return groups


def _row(value: PropertyValue, truth: float) -> dict[str, Any]:
    known = value.sigma == value.sigma
    bounds = [to_its_error(bound, value.sigma) for bound in (value.low_90, value.high_90)]
    return {
        "name": named_in_words(value.name.rpartition(".")[2]),
        "value": to_its_error(value.value, value.sigma),
        "sigma": to_its_error(value.sigma, value.sigma) if known else "–",
        "interval": " … ".join(bounds) if known else "–",
        "truth": to_its_error(truth, value.sigma),
        "missed": not value.low_90 <= truth <= value.high_90 if known and truth == truth else False,
        "unit": pretty_unit(value.unit),
        "novelty": value.novelty,
        "far": value.novelty is not None and value.novelty > FAR,
        "failed": f"{value.failed} of {value.samples}" if value.failed else "",
        "parts": value.parts,
        "sigma_of": value.sigma,
        "about": _sentence(value.about),
    }


def _caption(curve: PropertyCurve) -> str:
    """One sentence."""
    about = curve.about or named_in_words(curve.name)
    if curve.failed:
        about += f"; {curve.failed} of {curve.samples} samples have none"
    if not is_band_structure(curve) and cut_off(curve) is not None:
        about += "; higher values are cut off"
    return _sentence(about)


def _structure_rows(results: PropertyResults) -> list[tuple[str, str, int, str]]:
    """Name, formula, number of atoms, volume for each; equal ones once."""
    rows = [
        (
            str(atoms.info.get("name", "")),
            atoms.get_chemical_formula(),
            len(atoms),
            format_number(atoms.get_volume(), 4) if atoms.cell.rank == 3 else "–",
        )
        for atoms in results.structures
    ]
    return list(dict.fromkeys(rows))[:LONGEST_LIST]


def _formulas(results: PropertyResults) -> list[str]:
    """Reduced formulas, the most frequent first."""
    return [
        name
        for name, _ in Counter(atoms.get_chemical_formula(empirical=True) for atoms in results.structures).most_common(
            4
        )
    ]


def _shares(values: Iterable[PropertyValue]) -> dict[str, float]:
    """σ over |value|, of what is no small difference of larger things."""
    return {
        value.name: value.sigma / abs(value.value)
        for value in values
        if value.sigma == value.sigma and abs(value.value) > 2 * value.sigma
    }


def _novelty(values: Iterable[PropertyValue]) -> float | None:
    found = [value.novelty for value in values if value.novelty is not None]
    return max(found) if found else None


def _calculation(value: PropertyValue) -> str:
    return value.calculation.replace("_", " ") or named_in_words(value.name)


def _sentence(text: str) -> str:
    """With a capital, unless it begins with a symbol, and a full stop."""
    symbol = len(text.partition(" ")[0]) == 1
    return (text if symbol else text[:1].upper() + text[1:]) + ("" if text.endswith(".") or not text else ".")


def slug(name: str) -> str:
    """A name of a file."""
    return "".join(c if c.isalnum() or c in "_-" else "_" for c in name)
