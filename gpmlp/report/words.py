"""Words are numbers written for people: few digits, real minus signs, no exponents where they can be helped."""

from __future__ import annotations

import math


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
