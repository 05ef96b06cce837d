"""The palette is the few colours of the report, told apart by colour-blind eyes too, and the style of its figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

INK, PALE, ACCENT, GRID = "#22303c", "#66737f", "#2a6f97", "#e3e8ec"
RING = "#d9480f"
CAUSE_COLOURS = {"noise": "#a9b4be", "data": "#2a6f97", "misspecification": "#a23b62", "inducing": "#dd9a2e"}
CAUSE_NAMES = {
    "noise": "noise of the labels",
    "data": "missing data",
    "misspecification": "misspecification",
    "inducing": "inducing set",
}
KIND_COLOURS = {"energies": "#1f7a6d", "forces": "#2a6f97", "stresses": "#bf6a30"}
SPECIES = ("#5b8fb0", "#dd9a2e", "#a23b62", "#3f8f7f", "#8c7bb5", "#7d8a4a", "#b5651d", "#6b7682")
ERROR = ("#f3e3bd", "#e0a03c", "#b8463f", "#571845")
STYLE = {
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


def rgb(colour: str) -> tuple[int, int, int]:
    """'#rrggbb' as three bytes."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def mix(colour: str, other: str, share: float) -> str:
    """A colour with a share (0 to 1) of another."""
    share = min(max(share, 0.0), 1.0)
    return "#" + "".join(
        f"{round((1 - share) * a + share * b):02x}" for a, b in zip(rgb(colour), rgb(other), strict=True)
    )


def ramp(colours: Sequence[str], steps: int) -> tuple[str, ...]:
    """Steps colours that run evenly through those given."""
    found = []
    for k in range(steps):
        place = k / max(steps - 1, 1) * (len(colours) - 1)
        first = min(int(place), len(colours) - 2)
        found.append(mix(colours[first], colours[first + 1], place - first))
    return tuple(found)


def density(colour: str) -> tuple[str, str, str]:
    """Ends and middle of a ramp from few to many points of a colour."""
    return mix(colour, "#ffffff", 0.78), colour, mix(colour, "#081420", 0.75)


def species_colours(elements: Sequence[int]) -> dict[int, str]:
    """Atomic number -> colour, by the order of the elements in the data."""
    return {int(z): SPECIES[k % len(SPECIES)] for k, z in enumerate(elements)}


def cause_colour(cause: str) -> str:
    """Colour of a cause of uncertainty."""
    return CAUSE_COLOURS.get(cause, "#6b7682")


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits without exponent where that is readable; – for NaN."""
    if value is None or isinstance(value, str) or value != value:
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if isinstance(value, int) or (abs(value) >= 100 and abs(value) < 1e7) or value == 0:
        return f"{value:,.0f}".replace("-", "−")
    if abs(value) < 1e-4 or abs(value) >= 1e7:
        return (
            f"{value:.1e}".replace("e-0", "e−")
            .replace("e-", "e−")
            .replace("e+0", "e")
            .replace("e+", "e")
            .replace("-", "−")
        )
    places = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:.{places}f}".replace("-", "−")


def percent(value: float | None) -> str:
    """A share as per cent; – for NaN."""
    if value is None or value != value:
        return "–"
    if 0 < value < 0.1:
        return f"{100 * value:.1f}\u202f%"
    return f"{100 * value:.1f}\u202f%" if 0.985 < value < 1 else f"{100 * value:.0f}\u202f%"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{number(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
