"""Figures are the still pictures of the report as SVG and PNG; the interactive plots print as these."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpmlp.core.errors import UserError, chemical_symbol
from gpmlp.report.model.data import NO_TYPE, UNITS, ReportData
from gpmlp.report.model.numbers import grouped
from gpmlp.report.scatter import SPARSE, Axis, Scatter, png
from gpmlp.report.style import (
    ACCENT,
    CAUSE_NAMES,
    ERROR,
    GRID,
    INK,
    KIND_COLOURS,
    PALE,
    STYLE,
    cause_colour,
    mix,
    number,
    ramp,
    species_colours,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FONTS = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
MOST_GROUPS = 24
WIDTH, HEIGHT = 4.9, 3.6  # inches
SMALL = 3.75  # three beside one another
LEAST = 1e-2  # of the median of all errors, where the axis of their distributions begins


@dataclass(frozen=True)
class Picture:
    """One figure as files, and what it shows in words."""

    svg: bytes
    png: bytes
    alt: str
    width: float  # px at which text has its size


def draw(paint: Callable[..., None], alt: str, *args: Any, height: float = HEIGHT, width: float = WIDTH) -> Picture:
    """The picture that paint(axes, *args) makes, without touching the state of matplotlib.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "The report draws figures with matplotlib, which is missing: pip install matplotlib."
        ) from error
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # names in scripts that the PNG has no font for; browsers find one for the SVG
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
        canvas = FigureCanvasAgg(figure)
        paint(figure.add_subplot(), *args)
        canvas.draw()
        figure.set_layout_engine("none")  # the places of things stay, and are not sought again
        pixels = np.array(canvas.buffer_rgba())
        return Picture(_svg(figure), png(pixels), alt, 96 * width)


def _svg(figure: Figure) -> bytes:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    return file.getvalue().replace(b"'DejaVu Sans'", FONTS.encode())


def _grid(axes: Axes, axis: str = "both") -> None:
    axes.grid(axis=axis, color=GRID, lw=0.7)


def _decades(low: float, high: float) -> list[float]:
    """Round numbers to write on a logarithmic axis."""
    span = np.log10(high / low)
    steps = (1,) if span > 2.2 else (1, 3) if span > 1 else (1, 2, 3, 5, 7)
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.log10(high) + 1)
    every = powers[:: 1 + int(span // 8)]
    return [float(d) for d in (every[:, None] * steps).ravel() if low * 0.999 <= d <= high * 1.001]


def _tick(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _scale(axes: Axes, x: Axis, y: Axis) -> None:
    """Label axes that run from 0 to 1 with what they stand for."""
    from matplotlib.ticker import MaxNLocator

    for axis, own, set_limits in ((x, axes.xaxis, axes.set_xlim), (y, axes.yaxis, axes.set_ylim)):
        if axis.log:
            values = _decades(axis.low, axis.high)
        else:
            values = [v for v in MaxNLocator(6).tick_values(axis.low, axis.high) if axis.low <= v <= axis.high]
        own.set_ticks(axis.place(np.array(values)), [_tick(round(v, 10)) for v in values])
        set_limits(0, 1)
        own.set_label_text(axis.label)


def scatter(axes: Axes, plot: Scatter) -> None:
    """A Scatter as density (or points, when there are few) with its lines and legend."""
    from matplotlib.colors import ListedColormap, Normalize

    _grid(axes)
    coloured = plot.value is not None
    colours = ListedColormap(ramp(ERROR, 64))
    if len(plot.px) > SPARSE:
        axes.imshow(plot.pixels(), extent=(0, 1, 0, 1), aspect="auto", interpolation="nearest", zorder=1.5)
    else:
        colour = {"c": plot.value, "cmap": colours, "vmin": 0, "vmax": 1} if coloured else {"color": plot.colour}
        axes.scatter(plot.px, plot.py, s=9, alpha=0.7, lw=0, rasterized=len(plot.px) > 500, **colour)
    for line in plot.lines:
        style = "none" if line.bare else "--" if line.dashed else "-"
        marker = {"marker": "o", "ms": 3.5} if line.dots else {}
        x, y = plot.x.place(np.array(line.x)), plot.y.place(np.array(line.y))
        axes.plot(x, y, ls=style, color=line.colour, lw=1.1, label=line.label, **marker)
    _scale(axes, plot.x, plot.y)
    if axes.figure.get_figwidth() > 1.5 * WIDTH:
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2, ncols=len(plot.lines) or 1)
    elif len(plot.lines) > 1:
        axes.legend(loc="upper left")
    if coloured:
        from matplotlib.cm import ScalarMappable

        bar = axes.figure.colorbar(ScalarMappable(Normalize(0, 1), colours), ax=axes, pad=0.02, aspect=30)
        axis = Axis("", *plot.value_range, True)
        ticks = _decades(*plot.value_range)
        bar.set_ticks(axis.place(np.array(ticks)), labels=[_tick(d) for d in ticks])
        bar.set_label(plot.value_label)
        bar.outline.set_visible(False)


def boxes(axes: Axes, groups: dict[str, np.ndarray], kind: str, colours: Sequence[str] | None) -> None:
    """|errors| of groups on a logarithmic axis: 5 to 95 % thin, quartiles thick, median white, largest as a dot, names above.

    The axis begins at LEAST of the median of all, so that a group of tiny errors does not stretch it; a triangle marks what goes on
    below, and where that is the median too, its number is written.
    """
    names = list(groups)[:MOST_GROUPS]
    _grid(axes, "x")
    everything = np.concatenate([groups[name] for name in names])
    # zero by symmetry is no number to draw
    floor = max(1e-9, 1e-5 * float(everything.max()), LEAST * float(np.median(everything)))
    low = max(floor, min(float(np.quantile(groups[name], 0.05)) for name in names)) / 1.5
    high = max(float(everything.max()) * 1.6, 10 * low)
    for k, name in enumerate(names):
        values, at = groups[name], k + 0.16
        found = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))
        p05, p25, p50, p75, p95 = np.maximum(found, low)
        colour = colours[k] if colours else KIND_COLOURS[kind]
        axes.plot([p05, p95], [at, at], color=mix(colour, "#ffffff", 0.35), lw=1.4, solid_capstyle="butt")
        axes.barh(at, p75 - p25, left=p25, height=0.4, color=mix(colour, "#ffffff", 0.15))
        text = f"{_short(name, 34)} ({len(values):,})"
        if found[2] >= low:
            axes.plot([p50, p50], [at - 0.2, at + 0.2], color="white", lw=1.6)
        else:
            text += f", median {number(float(found[2]))}"
        if found[0] < low:
            axes.plot(low, at, "<", ms=4.5, color=colour, clip_on=False)
        if values.max() >= low:
            axes.plot(values.max(), at, "o", ms=3.2, color=colour, clip_on=False)
        axes.text(0.0, k - 0.12, text, va="bottom", fontsize=8, transform=axes.get_yaxis_transform())
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(_decades(low, high), [_tick(d) for d in _decades(low, high)])
    axes.set_xticks([], minor=True)
    axes.set_yticks([])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    noun = {"energies": "energy", "forces": "force component", "stresses": "stress component"}[kind]
    axes.set_xlabel(f"|{noun} error|, {UNITS[kind]}")


def _short(name: str, most: int = 22) -> str:
    name = name.replace("$", r"\$")
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"


def reliability(axes: Axes, curves: dict[str, dict]) -> None:
    """Observed against expected coverage."""
    _grid(axes)
    axes.plot([0, 1], [0, 1], color=PALE, lw=1, ls="--", label="calibrated")
    for kind, curve in curves.items():
        axes.plot(
            curve["expected"], curve["observed"], color=KIND_COLOURS[kind], lw=1.8, label=f"{kind} ({curve['n']:,})"
        )
    axes.text(0.97, 0.05, "below: overconfident", ha="right", color=PALE, fontsize=8)
    axes.text(0.03, 0.60, "above: too cautious", color=PALE, fontsize=8)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="expected coverage", ylabel="observed coverage")
    axes.legend(loc="upper left")


def sparsification(axes: Axes, curve: dict, kind: str) -> None:
    """RMSE of what is left against the share removed, with the oracle."""
    _grid(axes)
    removed = 100 * np.array(curve["removed"])
    axes.fill_between(removed, curve["oracle"], curve["rmse"], color=mix(KIND_COLOURS[kind], "#ffffff", 0.85), lw=0)
    axes.plot(removed, curve["rmse"], color=KIND_COLOURS[kind], lw=1.8, label="largest σ removed first")
    axes.plot(removed, curve["oracle"], color=PALE, lw=1.2, ls="--", label="largest error removed first (oracle)")
    axes.axhline(curve["rmse"][0], color=GRID, lw=1.2)
    axes.set(
        xlim=(0, 95),
        ylim=(0, 1.3 * max(curve["rmse"]) or 1.0),
        xlabel="removed, %",
        ylabel=f"RMSE of the rest, {UNITS[kind]}",
    )
    axes.legend(loc="upper right")


def budget(axes: Axes, groups: dict[str, dict[str, float]], causes: Sequence[str]) -> None:
    """Shares of the mean force variance stacked by cause, with the total standard deviation at the end of each bar."""
    names = list(groups)[:MOST_GROUPS]
    left = np.zeros(len(names))
    totals = np.array([sum(groups[name].values()) for name in names])
    for cause in causes:
        share = 100 * np.array([groups[name][cause] for name in names]) / np.where(totals > 0, totals, np.nan)
        share = np.nan_to_num(share)
        axes.barh(range(len(names)), share, left=left, height=0.62, color=cause_colour(cause), ec="white", lw=0.8)
        for k, value in enumerate(share):
            if value >= 9:
                ink = "white" if cause in ("data", "misspecification") else INK
                axes.text(left[k] + value / 2, k, f"{value:.0f} %", ha="center", va="center", color=ink, fontsize=8)
        left += share
    for k, total in enumerate(totals):
        axes.text(102, k, f"{np.sqrt(total):.0f}" if total == total else "–", va="center", color=INK)
    axes.text(102, -0.62, "σ, meV/Å", va="bottom", color=PALE, fontsize=8)
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the mean force variance, %")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def evidence(axes: Axes, trace: Sequence[Sequence[float]]) -> None:
    """Negative log evidence, best so far and each evaluation."""
    _grid(axes)
    steps, values = np.array(trace, dtype=float).T
    axes.plot(steps, values, "o", ms=3, color=mix(ACCENT, "#ffffff", 0.5), label="evaluation")
    axes.step(steps, np.fmin.accumulate(values), where="post", color=ACCENT, lw=1.6, label="best so far")
    known = values[np.isfinite(values)]
    if len(known) > 4:
        low, high = known.min(), np.quantile(known, 0.9)
        axes.set_ylim(low - 0.08 * (high - low or 1), high + 0.15 * (high - low or 1))
    axes.set(xlabel="evaluation", ylabel="negative log evidence, nats")
    axes.legend(loc="upper right")


def dimer(axes: Axes, curve: dict) -> None:
    """Interaction energy of two atoms with one and two standard deviations; distances without data shaded.

    The curve decides the range. Where one standard deviation to both sides fills the panel no band is drawn, and a note says so.
    """
    _grid(axes)
    r, energy = (np.asarray(curve[key], dtype=float) for key in ("r", "energy"))
    std = np.asarray(curve["std"], dtype=float) if curve.get("std") is not None else np.full_like(r, np.nan)
    shortest = curve.get("shortest")
    known = shortest is not None and np.isfinite(shortest)
    inside = np.isfinite(energy) & ((r >= shortest) if known else True)
    low, high = _dimer_range(energy[inside], std[inside]) if inside.any() else (-1.0, 1.0)
    hidden = 2 * std > high - low
    for k, shade in ((2, 0.86), (1, 0.7)):
        band = np.clip(energy - k * std, low, high), np.clip(energy + k * std, low, high)
        axes.fill_between(r, *band, where=~hidden, color=mix(ACCENT, "#ffffff", shade), lw=0)
    axes.plot(r, energy, color=ACCENT, lw=1.8)
    if hidden.any():
        words = f"no band where ±σ fills the panel (σ up to {number(float(std[hidden].max()))} eV)"
        axes.text(0.98, 0.03, words, color=PALE, fontsize=7.5, ha="right", transform=axes.transAxes)
    axes.set_ylim(low, high)
    axes.set_xlim(r.min(), r.max())
    if known and shortest > r.min():
        axes.axvspan(r.min(), min(shortest, r.max()), color="#eef1f4", lw=0, zorder=0)
        axes.axvline(shortest, color=PALE, lw=0.9, ls="--")
        axes.text(
            shortest, 0.97, " data from here", color=PALE, fontsize=8, va="top", transform=axes.get_xaxis_transform()
        )
    axes.set(xlabel="distance, Å", ylabel="interaction energy, eV")
    axes.set_title(_short(str(curve.get("pair", ""))))


def _dimer_range(energy: np.ndarray, std: np.ndarray) -> tuple[float, float]:
    """The energies of a curve, with room for its typical standard deviation as far as that leaves the curve legible."""
    span = max(float(np.ptp(energy)), 0.2)
    known = std[np.isfinite(std)]
    room = float(np.clip(np.median(known) if len(known) else 0.0, 0.5 * span, span))
    return float(energy.min()) - room, float(energy.max()) + room


def _rows(count: int) -> float:
    """Height of a figure with so many bars, inches."""
    return 1.0 + 0.29 * max(min(count, MOST_GROUPS), 2)


def all_of(data: ReportData, labelled: dict, numbers: dict, scatters: Sequence[Scatter]) -> dict[str, Picture]:
    """Name -> picture, for everything the data allow."""
    made = {}
    for plot in scatters:
        alt = f"{plot.title}: {plot.y.label} against {plot.x.label}, {len(plot.px):,} points"
        made[plot.name] = draw(scatter, alt, plot, width=WIDTH + 2 if plot.value is not None else WIDTH, height=4.1)
    for kind, view in labelled.items():
        for by in ("config_type", "species"):
            groups = grouped(data, view, by)
            shades = {chemical_symbol(z): colour for z, colour in species_colours(data.elements).items()}
            colours = [shades[name] for name in groups] if by == "species" else None
            if groups and (by == "species" or set(data.types) != {NO_TYPE} or kind != "forces"):
                alt = f"Distribution of {kind} errors by {by}: " + ", ".join(list(groups)[:6])
                height = 0.65 + 0.42 * max(min(len(groups), MOST_GROUPS), 2)
                made[f"errors_{kind}_{by}"] = draw(boxes, alt, groups, kind, colours, height=height, width=SMALL)
    if numbers["reliability"]:
        made["reliability"] = draw(reliability, "Observed against expected coverage", numbers["reliability"])
    for kind, curve in list(numbers["sparsification"].items())[:1]:
        alt = f"RMSE of {kind} after the most uncertain are removed, beside the oracle"
        made[f"sparsification_{kind}"] = draw(sparsification, alt, curve, kind)
    shares = numbers["variance_by_cause_meV2_per_A2"]
    for by in ("by_species", "by_config_type") if shares else ():
        alt = (
            f"Force variance by cause ({', '.join(CAUSE_NAMES.get(c, c) for c in data.causes)}), {by.replace('_', ' ')}"
        )
        made[f"budget_{by}"] = draw(budget, alt, shares[by], data.causes, height=_rows(len(shares[by])) + 0.15)
    trace = [step for step in data.model.get("evidence_trace") or () if len(step) == 2]
    if trace:
        made["evidence"] = draw(
            evidence, f"Negative log evidence over {len(trace)} evaluations", trace, height=2.9, width=SMALL
        )
    for k, curve in enumerate(data.dimers):
        if len(curve.get("r", ())) > 1:
            made[f"dimer_{k + 1}"] = draw(
                dimer,
                f"Interaction energy of the pair {curve.get('pair', '')} against distance",
                curve,
                height=2.9,
                width=SMALL,
            )
    return made
