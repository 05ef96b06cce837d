"""Colours and number formats of the report: a palette for colour-blind readers, matplotlib's settings, values as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

INK, PALE, ACCENT, GRID = "#22303c", "#66737f", "#2a6f97", "#e3e8ec"
RING = "#d9480f"
CAUSE_COLOURS = {"noise": "#a9b4be", "data": "#2a6f97", "misspecification": "#a23b62", "inducing": "#dd9a2e"}
CAUSE_NAMES = {
    "noise": "noise of the labels",
    "data": "missing data",
    "misspecification": "misspecification",
    "inducing": "inducing set",
}
CAUSE_PHRASES = {  # inside a sentence
    "noise": "the noise of the labels",
    "data": "missing data",
    "misspecification": "misspecification",
    "inducing": "the inducing set",
}
REASON_COLOURS = {  # why a label was asked for
    "first": "#a9b4be",
    "given": "#c9d1d8",
    "explored": "#7d8a4a",
    "force": "#2a6f97",
    "novelty": "#dd9a2e",
    "force and novelty": "#3f8f7f",
    "local energy": "#8c7bb5",
    "guard": "#d9480f",
    "force, halted": "#a23b62",
}
OTHER = "#6b7682"
KIND_COLOURS = {"energies": "#1f7a6d", "forces": "#2a6f97", "stresses": "#bf6a30"}
SPECIES = ("#5b8fb0", "#dd9a2e", "#a23b62", "#3f8f7f", "#8c7bb5", "#7d8a4a", "#b5651d", OTHER)
ERROR = ("#f3e3bd", "#e0a03c", "#b8463f", "#571845")
STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": PALE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "xtick.color": PALE,
    "ytick.color": PALE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "gpmlp",
    "mathtext.default": "regular",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def mix_colours(colour: str, other: str, share: float) -> str:
    """A colour '#rrggbb' with a share (0 to 1) of another."""
    share = min(max(share, 0.0), 1.0)
    pairs = zip(bytes.fromhex(colour[1:]), bytes.fromhex(other[1:]), strict=True)
    return "#" + "".join(f"{round((1 - share) * a + share * b):02x}" for a, b in pairs)


def lighten(colour: str, share: float) -> str:
    """A colour with a share (0 to 1) of white."""
    return mix_colours(colour, "#ffffff", share)


def colour_ramp(colours: Sequence[str], steps: int) -> tuple[str, ...]:
    """That many colours which run evenly through those given."""
    ramp = []
    for k in range(steps):
        place = k / max(steps - 1, 1) * (len(colours) - 1)
        first = min(int(place), len(colours) - 2)
        ramp.append(mix_colours(colours[first], colours[first + 1], place - first))
    return tuple(ramp)


def density_colours(colour: str) -> tuple[str, str, str]:
    """Ends and middle of a ramp from few to many points of a colour."""
    return lighten(colour, 0.78), colour, mix_colours(colour, "#081420", 0.75)


def species_colours(elements: Sequence[int]) -> dict[int, str]:
    """Atomic number -> colour, by the order of the elements in the data."""
    return {int(z): SPECIES[k % len(SPECIES)] for k, z in enumerate(elements)}


def format_number(value: float | None, digits: int = 3) -> str:
    """Three significant digits without exponent where that is readable; – for NaN."""
    if value is None or isinstance(value, str) or value != value:
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if isinstance(value, int) or (abs(value) >= 100 and abs(value) < 1e7) or value == 0:
        text = f"{value:,.0f}"
    elif abs(value) < 1e-4 or abs(value) >= 1e7:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        text = f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"
    return text.replace("-", "−")


def format_percent(value: float | None) -> str:
    """A share as per cent, with one decimal near 0 and 1; – for NaN."""
    if value is None or value != value:
        return "–"
    decimals = 1 if 0 < value < 0.1 or 0.985 < value < 1 else 0
    return f"{100 * value:.{decimals}f}\u202f%"


def format_duration(seconds: float | None) -> str:
    """Seconds, minutes or hours; – where there is none."""
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{format_number(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def format_value(value: Any) -> str:
    """A plain value of a recipe or a report as text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}".replace("-", "−") if isinstance(value, float) else str(value)


def join_words(words: Sequence[str]) -> str:
    """'a, b and c'."""
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else "".join(words)
