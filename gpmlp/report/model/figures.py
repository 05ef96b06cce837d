"""Figures of the uncertainty report: parity and calibration plots, distributions of errors, variance budgets, curves of a fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpmlp.core.errors import chemical_symbol, visible_text
from gpmlp.report.figures import (
    WIDTH,
    Axis,
    Line,
    Picture,
    Scatter,
    draw_picture,
    log_ticks,
    paint_reliability,
    paint_scatter,
    tick_label,
)
from gpmlp.report.model.data import COMPONENTS, NO_TYPE, UNITS, LabelledComponents, ReportData
from gpmlp.report.model.numbers import group_errors, std_bins, with_std
from gpmlp.report.model.worst import error_std_ratio
from gpmlp.report.style import (
    ACCENT,
    CAUSE_COLOURS,
    CAUSE_NAMES,
    GRID,
    INK,
    KIND_COLOURS,
    OTHER,
    PALE,
    format_number,
    lighten,
    species_colours,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_GROUPS = 24
SMALL = 3.75  # inches; three beside one another
LEAST = 1e-2  # of the median of all errors, where the axis of their distributions begins
PARITY_UNITS = {"energies": ("eV/atom", 1e-3), "forces": ("eV/Å", 1e-3), "stresses": ("GPa", 1.0)}
NOUNS = {"energies": "energy", "forces": "force component", "stresses": "stress component"}


def parity_plot(view: LabelledComponents) -> Scatter:
    """Predicted against reference."""
    unit, scale = PARITY_UNITS[view.kind]
    x, y = scale * view.reference, scale * view.predicted
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    pad = 0.04 * (high - low) or 0.5 * max(abs(high), 1.0)
    low, high = float(low - pad), float(high + pad)
    noun = NOUNS[view.kind]
    axes = (Axis(f"reference {noun}, {unit}", low, high), Axis(f"predicted, {unit}", low, high))
    return Scatter(
        f"parity_{view.kind}",
        view.kind.capitalize(),
        *axes,
        axes[0].place(x),
        axes[1].place(y),
        view.structure,
        _atoms(view),
        np.abs(view.error),
        _columns(view),
        view.component,
        COMPONENTS[view.kind],
        KIND_COLOURS[view.kind],
        lines=(Line([low, high], [low, high], PALE, "predicted = reference"),),
    )


def error_std_plot(view: LabelledComponents) -> Scatter:
    """|error| against predicted std on logarithmic axes, with RMSE against std in bins."""
    drawn = view.scored
    bins = std_bins(view)
    drawn &= np.abs(view.error) >= min(bins["floor"], np.abs(view.error[drawn]).max())
    std, error = view.std[drawn], np.abs(view.error[drawn])
    x_low, x_high = np.quantile(std, 0.0005) / 1.3, std.max() * 1.3
    y_low = min(bins["floor"], x_low)
    y_high = max(float(error.max()) * 1.3, y_low * 10)
    unit = UNITS[view.kind]
    x, y = (
        Axis(f"predicted σ, {unit}", float(x_low), float(x_high), True),
        Axis(f"|error|, {unit}", float(y_low), y_high, True),
    )
    low, high = max(x.low, y.low), min(x.high, y.high)
    lines = (
        Line([low, high], [low, high], PALE, "RMSE = σ: perfect", dashed=True),
        Line(bins["std"], bins["rmse"], INK, "RMSE in bins of σ", dots=True),
    )
    return Scatter(
        f"error_std_{view.kind}",
        view.kind.capitalize(),
        x,
        y,
        x.place(std),
        y.place(error),
        view.structure[drawn],
        _atoms(view)[drawn],
        np.abs(view.scaled[drawn]),
        tuple((label, unit, values[drawn]) for label, unit, values in _columns(view)),
        view.component[drawn],
        COMPONENTS[view.kind],
        KIND_COLOURS[view.kind],
        lines=lines,
    )


def novelty_plot(data: ReportData) -> Scatter | None:
    """Force std against novelty of every atom, coloured by its force error."""
    std = 1e3 * data.atom_std
    if data.novelty is None:
        return None
    rows = np.flatnonzero((std > 0) & np.isfinite(std) & (data.novelty >= 0))
    if not len(rows):
        return None
    std, novelty, error = std[rows], data.novelty[rows], 1e3 * data.atom_error[rows]
    finite = novelty[np.isfinite(novelty) & (novelty > 0)]
    low, high = (np.quantile(finite, 0.001), finite.max()) if len(finite) else (0.3, 3.0)
    high = max(high, 1.5) * (1.6 if np.isinf(novelty).any() else 1.15)
    label = "novelty (> 1: outside the trust region" + ("; right edge: ∞)" if np.isinf(novelty).any() else ")")
    x = Axis(label, float(min(low / 1.2, 0.6)), float(high), True)
    y = Axis("force σ, meV/Å", float(np.quantile(std, 0.0005) / 1.2), float(std.max() * 1.25), True)
    ends, value = (0.0, 1.0), None
    coloured = np.isfinite(error) & (error > 0)
    if coloured.any():
        bottom, top = np.quantile(error[coloured], (0.02, 0.998))
        ends = (float(bottom), float(max(top, 1.01 * bottom)))
        value = np.where(coloured, Axis("", *ends, True).place(error), np.nan)
    columns = [
        ("novelty", "", novelty),
        ("σ", "meV/Å", std),
        ("error", "meV/Å", error),
        ("error / σ", "", error_std_ratio(data)[rows]),
    ]
    if data.local_energy_std is not None:
        columns.append(("local energy σ", "meV", 1e3 * data.local_energy_std[rows]))
    return Scatter(
        "novelty_std",
        "Every atom",
        x,
        y,
        x.place(novelty),
        y.place(std),
        np.asarray(data.structure)[rows],
        rows,
        np.nan_to_num(error) + std,
        tuple(columns),
        value=value,
        value_label="force error, meV/Å",
        value_range=ends,
        lines=(Line([1.0, 1.0], [y.low, y.high], PALE, "edge of the trust region", dashed=True),),
    )


def _atoms(view: LabelledComponents) -> np.ndarray:
    return view.row if view.kind == "forces" else np.full(len(view), -1)


def _columns(view: LabelledComponents) -> tuple[tuple[str, str, np.ndarray], ...]:
    unit = UNITS[view.kind]
    coarse, scale = PARITY_UNITS[view.kind]
    columns = [("reference", coarse, scale * view.reference), ("predicted", coarse, scale * view.predicted)]
    columns.append(("error", unit, view.error))
    if np.isfinite(view.std).any():
        columns += [("σ", unit, view.std), ("error / σ", "", view.scaled)]
    return tuple(columns)


def paint_boxes(axes: Axes, groups: dict[str, np.ndarray], kind: str, colours: Sequence[str] | None) -> None:
    """|errors| of groups on a logarithmic axis: 5 to 95 % thin, quartiles thick, median white, largest as a dot, names above.

    The axis begins at LEAST of the median of all, so that a group of tiny errors does not stretch it; a triangle marks what goes on
    below, and where that is the median too, its number is written.
    """
    names = list(groups)[:MOST_GROUPS]
    axes.grid(axis="x", color=GRID, lw=0.7)
    all_errors = np.concatenate([groups[name] for name in names])
    # zero by symmetry is no number to draw
    floor = max(1e-9, 1e-5 * float(all_errors.max()), LEAST * float(np.median(all_errors)))
    low = max(floor, min(float(np.quantile(groups[name], 0.05)) for name in names)) / 1.5
    high = max(float(all_errors.max()) * 1.6, 10 * low)
    for k, name in enumerate(names):
        values, at = groups[name], k + 0.16
        quantiles = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))
        p05, p25, p50, p75, p95 = np.maximum(quantiles, low)
        colour = colours[k] if colours else KIND_COLOURS[kind]
        axes.plot([p05, p95], [at, at], color=lighten(colour, 0.35), lw=1.4, solid_capstyle="butt")
        axes.barh(at, p75 - p25, left=p25, height=0.4, color=lighten(colour, 0.15))
        text = f"{_short(name, 34)} ({len(values):,})"
        if quantiles[2] >= low:
            axes.plot([p50, p50], [at - 0.2, at + 0.2], color="white", lw=1.6)
        else:
            text += f", median {format_number(float(quantiles[2]))}"
        if quantiles[0] < low:
            axes.plot(low, at, "<", ms=4.5, color=colour, clip_on=False)
        if values.max() >= low:
            axes.plot(values.max(), at, "o", ms=3.2, color=colour, clip_on=False)
        axes.text(0.0, k - 0.12, text, va="bottom", fontsize=8, transform=axes.get_yaxis_transform())
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(log_ticks(low, high), [tick_label(d) for d in log_ticks(low, high)])
    axes.set_xticks([], minor=True)
    axes.set_yticks([])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"|{NOUNS[kind]} error|, {UNITS[kind]}")


def _short(name: str, most: int = 22) -> str:
    name = visible_text(name).replace("$", r"\$")
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"


def paint_sparsification(axes: Axes, curve: dict, kind: str) -> None:
    """RMSE of what is left against the share removed, with the oracle."""
    axes.grid(color=GRID, lw=0.7)
    removed = 100 * np.array(curve["removed"])
    axes.fill_between(removed, curve["oracle"], curve["rmse"], color=lighten(KIND_COLOURS[kind], 0.85), lw=0)
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


def paint_budget(axes: Axes, groups: dict[str, dict[str, float]], causes: Sequence[str]) -> None:
    """Shares of the mean force variance stacked by cause, with the total standard deviation at the end of each bar."""
    names = list(groups)[:MOST_GROUPS]
    left = np.zeros(len(names))
    totals = np.array([sum(groups[name].values()) for name in names])
    for cause in causes:
        share = 100 * np.array([groups[name][cause] for name in names]) / np.where(totals > 0, totals, np.nan)
        share = np.nan_to_num(share)
        axes.barh(
            range(len(names)), share, left=left, height=0.62, color=CAUSE_COLOURS.get(cause, OTHER), ec="white", lw=0.8
        )
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


def paint_evidence(axes: Axes, trace: Sequence[Sequence[float]]) -> None:
    """Negative log evidence, best so far and each evaluation."""
    axes.grid(color=GRID, lw=0.7)
    steps, values = np.array(trace, dtype=float).T
    axes.plot(steps, values, "o", ms=3, color=lighten(ACCENT, 0.5), label="evaluation")
    axes.step(steps, np.fmin.accumulate(values), where="post", color=ACCENT, lw=1.6, label="best so far")
    finite = values[np.isfinite(values)]
    if len(finite) > 4:
        low, high = finite.min(), np.quantile(finite, 0.9)
        axes.set_ylim(low - 0.08 * (high - low or 1), high + 0.15 * (high - low or 1))
    axes.set(xlabel="evaluation", ylabel="negative log evidence, nats")
    axes.legend(loc="upper right")


def paint_charges(axes: Axes, groups: dict[str, np.ndarray], colours: Sequence[str]) -> None:
    """Charges of elements: all of them thin, quartiles thick, median white, names above."""
    axes.grid(axis="x", color=GRID, lw=0.7)
    axes.axvline(0.0, color=PALE, lw=0.9, ls="--")
    for k, (name, values) in enumerate(groups.items()):
        low, p25, p50, p75, high = np.quantile(values, (0.0, 0.25, 0.5, 0.75, 1.0))
        at = k + 0.16
        axes.plot([low, high], [at, at], color=lighten(colours[k], 0.35), lw=1.4, solid_capstyle="butt")
        axes.barh(at, p75 - p25, left=p25, height=0.4, color=lighten(colours[k], 0.15))
        axes.plot([p50, p50], [at - 0.2, at + 0.2], color=INK, lw=1.4)
        axes.text(
            0.0, k - 0.12, f"{name} ({len(values):,})", va="bottom", fontsize=8, transform=axes.get_yaxis_transform()
        )
    axes.set_yticks([])
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.06)
    axes.set_xlabel("charge, e")


def paint_dimer(axes: Axes, curve: dict) -> None:
    """Interaction energy of two atoms with one and two standard deviations; distances without data shaded.

    The curve decides the range. Where one standard deviation to both sides fills the panel no band is drawn, and a note says so.
    """
    axes.grid(color=GRID, lw=0.7)
    r, energy = (np.asarray(curve[key], dtype=float) for key in ("r", "energy"))
    std = np.asarray(curve["std"], dtype=float) if curve.get("std") is not None else np.full_like(r, np.nan)
    shortest = -np.inf if curve.get("shortest") is None else float(curve["shortest"])
    inside = np.isfinite(energy) & ~(r < shortest)
    low, high = _dimer_range(energy[inside], std[inside]) if inside.any() else (-1.0, 1.0)
    hidden = 2 * std > high - low
    for k, shade in ((2, 0.86), (1, 0.7)):
        band = np.clip(energy - k * std, low, high), np.clip(energy + k * std, low, high)
        axes.fill_between(r, *band, where=~hidden, color=lighten(ACCENT, shade), lw=0)
    axes.plot(r, energy, color=ACCENT, lw=1.8, label="all")
    if curve.get("electrostatic") is not None:
        axes.plot(r, np.asarray(curve["electrostatic"], dtype=float), color=INK, lw=1.1, ls=":", label="of charges")
        axes.legend(fontsize=7.5, frameon=False)
    if hidden.any():
        words = f"no band where ±σ fills the panel (σ up to {format_number(float(std[hidden].max()))} eV)"
        axes.text(0.98, 0.03, words, color=PALE, fontsize=7.5, ha="right", transform=axes.transAxes)
    axes.set_ylim(low, high)
    axes.set_xlim(r.min(), r.max())
    if shortest > r.min():
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
    finite = std[np.isfinite(std)]
    room = float(np.clip(np.median(finite) if len(finite) else 0.0, 0.5 * span, span))
    return float(energy.min()) - room, float(energy.max()) + room


def scatter_plots(data: ReportData, labelled: dict[str, LabelledComponents]) -> list[Scatter]:
    """Every interactive plot that the data allow."""
    plots = [parity_plot(view) for view in labelled.values()]
    plots += [error_std_plot(view) for view in with_std(labelled).values()]
    return plots + [plot for plot in [novelty_plot(data)] if plot]


def draw_figures(
    data: ReportData, labelled: dict[str, LabelledComponents], numbers: dict[str, Any], plots: Sequence[Scatter]
) -> dict[str, Picture]:
    """Name -> picture, for everything the data allow."""
    figures = {}
    for plot in plots:
        alt = f"{plot.title}: {plot.y.label} against {plot.x.label}, {len(plot.px):,} points"
        width = WIDTH + 2 if plot.value is not None else WIDTH
        figures[plot.name] = draw_picture(paint_scatter, alt, plot, width=width, height=4.1)
    shades = {chemical_symbol(z): colour for z, colour in species_colours(data.elements).items()}
    for kind, view in labelled.items():
        for by in ("config_type", "species"):
            groups = group_errors(data, view, by)
            colours = [shades[name] for name in groups] if by == "species" else None
            if groups and (by == "species" or set(data.types) != {NO_TYPE} or kind != "forces"):
                alt = f"Distribution of {kind} errors by {by}: " + ", ".join(list(groups)[:6])
                size = {"height": 0.65 + 0.42 * max(min(len(groups), MOST_GROUPS), 2), "width": SMALL}
                figures[f"errors_{kind}_{by}"] = draw_picture(paint_boxes, alt, groups, kind, colours, **size)
    if curves := numbers["reliability"]:
        figures["reliability"] = draw_picture(paint_reliability, "Observed against expected coverage", curves)
    for kind, curve in list(numbers["sparsification"].items())[:1]:
        alt = f"RMSE of {kind} after the most uncertain are removed, beside the oracle"
        figures[f"sparsification_{kind}"] = draw_picture(paint_sparsification, alt, curve, kind)
    shares = numbers["variance_by_cause_meV2_per_A2"]
    for by in ("by_species", "by_config_type") if shares else ():
        causes = ", ".join(CAUSE_NAMES.get(c, c) for c in data.causes)
        alt = f"Force variance by cause ({causes}), {by.replace('_', ' ')}"
        height = 1.15 + 0.29 * max(min(len(shares[by]), MOST_GROUPS), 2)
        figures[f"budget_{by}"] = draw_picture(paint_budget, alt, shares[by], data.causes, height=height)
    if numbers["charges"] and data.charges is not None:
        groups = {chemical_symbol(z): data.charges[data.species == z] for z in data.elements}
        alt = "Charges of " + ", ".join(groups)
        size = {"height": 0.65 + 0.42 * max(len(groups), 2), "width": SMALL}
        figures["charges"] = draw_picture(paint_charges, alt, groups, [shades[name] for name in groups], **size)
    small = {"height": 2.9, "width": SMALL}
    if trace := [step for step in data.model.get("evidence_trace") or () if len(step) == 2]:
        alt = f"Negative log evidence over {len(trace)} evaluations"
        figures["evidence"] = draw_picture(paint_evidence, alt, trace, **small)
    for k, curve in enumerate(data.dimers):
        if len(curve.get("r", ())) > 1:
            alt = f"Interaction energy of the pair {curve.get('pair', '')} against distance"
            figures[f"dimer_{k + 1}"] = draw_picture(paint_dimer, alt, curve, **small)
    return figures
