"""Figures of properties: a curve with its 90 % interval, bands between points of high symmetry."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpmlp.properties.values import PropertyCurve
from gpmlp.report.figures import Picture, draw_picture
from gpmlp.report.properties.words import named_in_words, pretty_unit
from gpmlp.report.style import ACCENT, GRID, PALE, SPECIES, lighten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REACH = 1.645  # standard deviations of a 90 % interval
STEEPEST = 8.0  # times the range of three quarters of a curve; what lies above is cut off
WIDE = 6.2  # inches, of bands with many points


def curve_picture(curve: PropertyCurve) -> Picture:
    """A curve; bands are as wide as their path is long. Raises UserError: matplotlib is not installed."""
    alt = f"{named_in_words(curve.name)} against {curve.x_label} with its 90 % interval"
    if is_band_structure(curve):
        return draw_picture(_paint_bands, alt, curve, width=WIDE)
    return draw_picture(_paint_curve, alt, curve)


def is_band_structure(curve: PropertyCurve) -> bool:
    """Whether it has branches between marked places."""
    return curve.value.ndim == 2 and len(curve.ticks) > 1


def cut_off(curve: PropertyCurve) -> float | None:
    """The value above which a curve is not drawn, where a few points of it are far above the rest; None if all is drawn."""
    values = curve.value[np.isfinite(curve.value)]
    if not len(values):
        return None
    low, typical, high = values.min(), np.percentile(values, 75), values.max()
    limit = low + STEEPEST * (typical - low)
    return float(limit) if high > limit > low else None


def _paint_curve(axes: Axes, curve: PropertyCurve) -> None:
    axes.grid(color=GRID, lw=0.7)
    values, sigmas = (v.reshape(len(curve.x), -1).T for v in (curve.value, curve.sigma))
    for value, sigma, colour in zip(values, sigmas, (ACCENT, *SPECIES[1:] * len(values)), strict=False):
        _paint_interval(axes, curve.x, value, sigma, colour)
    for place, label in curve.ticks:
        axes.axvline(place, color=PALE, lw=1.0, ls=":")
        axes.annotate(label, (place, 1), (3, -9), xycoords=("data", "axes fraction"), textcoords="offset points",
                      color=PALE, fontsize=8)  # fmt: skip
    limit = cut_off(curve)
    if limit is not None:
        low = float(np.nanmin(curve.value))
        axes.set_ylim(low - 0.05 * (limit - low), limit)
    elif curve.unit.startswith("1/") and np.nanmin(curve.value) >= 0:  # a density, whose interval may reach below
        axes.set_ylim(0, None)
    axes.set(
        xlabel=_with_unit(curve.x_label, curve.x_unit),
        ylabel=_with_unit("", curve.unit),
        xlim=(curve.x[0], curve.x[-1]),
    )
    axes.set_title(named_in_words(curve.name))


def _paint_bands(axes: Axes, curve: PropertyCurve) -> None:
    """All branches in one colour; the path is broken where it jumps."""
    jumps = [place for place, label in curve.ticks if "|" in label]
    breaks = [k for k in np.flatnonzero(np.diff(curve.x) == 0) + 1 if np.isclose(curve.x[k], jumps).any()]
    for line in np.split(np.arange(len(curve.x)), breaks):
        for value, sigma in zip(curve.value[line].T, curve.sigma[line].T, strict=True):
            _paint_interval(axes, curve.x[line], value, sigma, ACCENT)
    for place, _ in curve.ticks:
        axes.axvline(place, color=PALE, lw=0.7)
    axes.axhline(0, color=PALE, lw=0.7)
    axes.set_xticks([place for place, _ in curve.ticks], [label for _, label in curve.ticks])
    axes.tick_params(axis="x", length=0)
    low = float(np.nanmin(curve.value))
    axes.set(ylabel=_with_unit("", curve.unit), xlim=(curve.x[0], curve.x[-1]), ylim=(0 if low > -0.05 else None, None))
    axes.set_title(named_in_words(curve.name))


def _paint_interval(axes: Axes, x: np.ndarray, value: np.ndarray, sigma: np.ndarray, colour: str) -> None:
    reach = REACH * sigma
    axes.fill_between(x, value - reach, value + reach, color=lighten(colour, 0.72), lw=0)
    axes.plot(x, value, color=colour, lw=1.5)


def _with_unit(label: str, unit: str) -> str:
    return ", ".join(part for part in (label, pretty_unit(unit)) if part)
