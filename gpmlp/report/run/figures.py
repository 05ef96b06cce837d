"""Figures of a learning run: quantities of its frames against time, labels, observables, errors against predicted uncertainty."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gpmlp.core.errors import visible_text
from gpmlp.report.figures import (
    Axis,
    Line,
    Picture,
    PointLabels,
    Scatter,
    draw_picture,
    paint_reliability,
    paint_scatter,
)
from gpmlp.report.model.figures import error_std_plot, novelty_plot
from gpmlp.report.run.data import ObservableCurve, RunData
from gpmlp.report.run.numbers import drawn_frames, prequential_errors
from gpmlp.report.style import ACCENT, GRID, INK, OTHER, PALE, REASON_COLOURS, RING, SPECIES, lighten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 160  # of the running medians
FEWEST = 8  # frames of a median
FEWEST_BINS = 4  # fewer make no curve
DOTS = lighten(ACCENT, 0.45)

TIME = "time of the trajectory, ps"
STRIP = 9.6, 2.7  # inches, of a series over the whole width
HALF = 4.9, 3.2


def _legend(axes: Axes, columns: int = 2) -> None:
    """Above the axes, where it hides nothing."""
    axes.legend(ncols=columns, loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2, handlelength=1.6)


def paint_rate(axes: Axes, rates: dict[str, list[float]], wanted: float) -> None:
    """Labels per 1000 steps in stretches of the run, with upper bounds and the rate that was wanted."""
    axes.grid(axis="y", color=GRID, lw=0.7)
    left, right = (np.array(rates[k]) for k in ("from_step", "to_step"))
    middle, width = (left + right) / 2, (right - left) * 0.86
    axes.bar(middle, rates["per_1000_steps"], width, color=ACCENT, label="labels")
    axes.plot(middle, rates["at_most"], "_", color=PALE, ms=11, mew=1.4, label="at most (95 %)")
    if np.isfinite(wanted):
        axes.axhline(wanted, color=RING, lw=1.1, ls="--", label=f"wanted at the end: {wanted:g}")
    axes.set(xlabel="steps of all walkers", ylabel="labels per 1000 steps", xlim=(0, right[-1]))
    axes.set_ylim(0, 1.08 * max([*rates["at_most"], wanted if np.isfinite(wanted) else 0]))
    _legend(axes, 3)


def paint_observable(axes: Axes, curve: ObservableCurve) -> None:
    """Mean of an observable with its standard error over the window, and the tolerance."""
    axes.grid(color=GRID, lw=0.7)
    finite = np.isfinite(curve.sem)
    x, y, sem = curve.steps[finite], curve.mean[finite], curve.sem[finite]
    axes.fill_between(x, y - sem, y + sem, color=lighten(ACCENT, 0.78), lw=0, label="± standard error")
    axes.plot(x, y, color=ACCENT, lw=1.8, label="mean")
    last = y[-1] if len(y) else 0.0
    for sign in (-1, 1):
        label = f"wanted: ± {curve.tolerance:.2g}" if sign > 0 else None
        axes.axhline(last + sign * curve.tolerance, color=RING, lw=1.0, ls="--", label=label)
    early = x[~curve.enough[finite]]
    if len(early):
        axes.axvspan(x[0], early[-1], color="#eef1f4", lw=0, zorder=0, label="too short to judge")
    if len(y):
        settled = slice(len(y) // 8, None)
        reach = max(2.2 * curve.tolerance, 1.15 * float(np.abs(y - last)[settled].max() + sem[settled].max()))
        axes.set_ylim(last - reach, last + reach)
        axes.set_xlim(0, x[-1])
    axes.set(xlabel="steps of the window, all walkers", ylabel=f"{curve.name}{', ' + curve.unit if curve.unit else ''}")
    _legend(axes)


def paint_trust(axes: Axes, shares: dict, window: float, frames: float, atoms: float) -> None:
    """Running shares inside the trust region."""
    axes.grid(color=GRID, lw=0.7)
    x = np.array(shares["step"])
    for name, colour, wanted in (("frames_inside", ACCENT, frames), ("atoms_inside", "#dd9a2e", atoms)):
        axes.plot(x, 100 * np.array(shares[name]), color=colour, lw=1.6, label=name.replace("_", " "))
        if np.isfinite(wanted):
            axes.axhline(100 * wanted, color=colour, lw=1.0, ls="--")
    if np.isfinite(window):
        axes.axvspan(window, x[-1], color="#eef1f4", lw=0, zorder=0, label="window")
    axes.set(xlabel="steps of all walkers", ylabel="running share, %", ylim=(0, 102), xlim=(0, max(x[-1], 1)))
    _legend(axes, 3)


def paint_labels(axes: Axes, data: RunData) -> None:
    """Labels that each walker asked for against its time; reasons by colour."""
    axes.grid(color=GRID, lw=0.7)
    walkers = data.frames.walkers
    end = float(data.frames.time_ps.max()) if len(data.frames) else 1.0
    for w in walkers:
        mine = sorted((label for label in data.asked if label.walker == w), key=lambda label: label.time_ps)
        times = [label.time_ps for label in mine]
        counts = list(range(1, len(mine) + 1))
        colour = walker_colour(w) if len(walkers) > 1 else INK
        last = float(data.frames.time_ps[data.frames.walker == w].max())
        axes.step([0.0, *times, last], [0, *counts, len(mine)], where="post", color=colour, lw=1.4,
                  label=f"walker {w}" if len(walkers) > 1 else None)  # fmt: skip
        for label, count in zip(mine, counts, strict=True):
            axes.plot(label.time_ps, count, "o", ms=4.5, color=REASON_COLOURS.get(label.cause, OTHER), zorder=3)
    for cause in dict.fromkeys(label.cause for label in data.asked):
        axes.plot([], [], "o", ms=4.5, color=REASON_COLOURS.get(cause, OTHER), label=cause)
    axes.set(xlabel=TIME, ylabel="labels asked for", xlim=(0, end), ylim=(0, None))
    axes.locator_params(axis="y", integer=True)
    if data.asked:
        _legend(axes, 3)


def paint_causes(axes: Axes, counts: dict[str, int]) -> None:
    """How many labels came for which reason."""
    names = list(counts)
    for k, name in enumerate(names):
        axes.barh(k, counts[name], height=0.62, color=REASON_COLOURS.get(name, OTHER))
        axes.text(counts[name], k, f" {counts[name]}", va="center", color=INK)
    axes.set_yticks(range(len(names)), [visible_text(name).replace("$", r"\$") for name in names])
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xlim(0, 1.12 * max(counts.values()))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("labels")
    axes.locator_params(axis="x", integer=True)


def paint_bounds(axes: Axes, data: RunData) -> None:
    """Largest force error of each label beside the bound that was predicted."""
    axes.grid(color=GRID, lw=0.7)
    finite = [(l, e) for l, e in data.predicted if np.isfinite(e.bound) and np.isfinite(e.largest_error)]
    number = np.array([label.number for label, _ in finite])
    bound = np.array([errors.bound for _, errors in finite])
    error = np.array([errors.largest_error for _, errors in finite])
    over = error > bound
    axes.vlines(number, np.minimum(bound, error), np.maximum(bound, error), color=GRID, lw=1.2)
    label = f"bound (exceeded with {100 * data.probability:.0f} %)"
    axes.plot(number, bound, "_", color=INK, ms=9, mew=1.8, label=label)
    axes.plot(number[~over], error[~over], "o", ms=4.5, color=ACCENT, label="largest error")
    if over.any():
        axes.plot(number[over], error[over], "o", ms=4.5, color=RING, label="beyond the bound")
    limit = np.array([label.limit for label, _ in finite])
    if np.isfinite(limit).any():
        axes.plot(number, limit, color=PALE, lw=1.0, ls="--", label="limit")
    axes.set(xlabel="label", ylabel="force error of the worst atom, eV/Å")
    axes.set_ylim(0, 1.06 * float(np.nanmax([bound.max(), error.max(), *limit])))
    axes.locator_params(axis="x", integer=True)
    _legend(axes)


def draw_figures(data: RunData, numbers: dict[str, Any], plots: dict[str, Scatter]) -> dict[str, Picture]:
    """Name -> picture, for everything the data allow."""
    figures = {}
    for plot in plots.values():
        alt = f"{plot.title or plot.name}: {plot.y.label} against {plot.x.label}, {len(plot.px):,} points"
        width, height = STRIP if plot.x.label == TIME else (6.9 if plot.value is not None else 4.9, 4.1)
        figures[plot.name] = draw_picture(paint_scatter, alt, plot, width=width, height=height)
    size = {"width": HALF[0], "height": HALF[1]}
    frames = data.frames
    if len(frames) and data.total_steps:
        alt = "Labels per 1000 steps against steps"
        figures["label_rate"] = draw_picture(paint_rate, alt, numbers["label_rate"], data.wanted_rate, **size)
        began = float(frames.total_step[frames.window].min()) if frames.window.any() else float("nan")
        alt = "Shares of frames and atoms inside the trust region against steps"
        wanted = data.wanted_frames, data.wanted_atoms
        figures["trust_region"] = draw_picture(paint_trust, alt, numbers["trust_region"], began, *wanted, **size)
        alt = "Labels of each walker against time"
        figures["labels_over_time"] = draw_picture(paint_labels, alt, data, **size)
    for k, curve in enumerate(data.observables):
        if np.isfinite(curve.sem).any():
            alt = f"Running mean of {curve.name} over the window"
            figures[f"observable_{k + 1}"] = draw_picture(paint_observable, alt, curve, **size)
    if causes := numbers["label_causes"]:
        height = min(0.9 + 0.3 * max(len(causes), 2), HALF[1])
        figures["label_causes"] = draw_picture(paint_causes, "Labels by reason", causes, width=HALF[0], height=height)
    if scores := numbers["honesty"]:
        alt = "Observed against expected coverage of force errors, predicted before each label was learned"
        figures["reliability"] = draw_picture(paint_reliability, alt, {"forces": scores["reliability"]}, **size)
        if scores["bounds"]:
            alt = "Largest force error of each label beside its bound"
            figures["bounds"] = draw_picture(paint_bounds, alt, data, **size)
    return figures


def scatter_plots(data: RunData) -> tuple[PointLabels, dict[str, Scatter]]:
    """Every interactive plot that the data allow, and what their points belong to: drawn frames, labels, trajectory."""
    drawn, frames, predicted = drawn_frames(data), data.frames, data.predicted
    names = [f"step {frames.step[k]:,}" for k in drawn] + [label.name for label, _ in predicted]
    types = [f"walker {frames.walker[k]}" for k in drawn] + [f"walker {label.walker}" for label, _ in predicted]
    species = [np.zeros(0, int), *(np.asarray(label.species) for label, _ in predicted)]
    atom = [np.arange(len(s)) for s in species]
    plots: list[Scatter | None] = []
    if len(frames):
        plots += [_window(data), _sigma(data), _temperature(data), _novelty(data)]
    plots.append(_prequential(data, len(drawn)))
    if data.trajectory is not None:
        if (plot := novelty_plot(data.trajectory)) is not None:
            plots.append(replace(plot, structure=plot.structure + len(names), row=plot.row + sum(map(len, species))))
        names += data.trajectory.names
        types += data.trajectory.config_type
        species, atom = [*species, data.trajectory.species], [*atom, data.trajectory.atom]
    labels = PointLabels(names, types, np.concatenate(species), np.concatenate(atom))
    return labels, {plot.name: plot for plot in plots if plot is not None}


def walker_colour(walker: int) -> str:
    """Colour of a trajectory."""
    return SPECIES[walker % len(SPECIES)]


def _series(data: RunData, name: str, title: str, y: Axis, values: np.ndarray, index: np.ndarray) -> Scatter:
    """A quantity of frames (places among those drawn) against time, with the other quantities for the pointer."""
    frames, drawn = data.frames, drawn_frames(data)
    chosen = drawn[index]
    time = frames.time_ps[chosen]
    begin, end = (float(time.min()), float(time.max())) if len(time) else (0.0, 1.0)
    room = 0.01 * (end - begin) or 0.01
    x = Axis(TIME, max(0.0, begin - room) if begin <= room else begin - room, end + room)
    with np.errstate(invalid="ignore", divide="ignore"):
        columns = (
            ("time", "ps", time),
            ("temperature", "K", frames.temperature_K[chosen]),
            ("largest force σ", "eV/Å", frames.sigma[chosen]),
            ("limit", "eV/Å", frames.limit[chosen]),
            ("novelty", "", frames.novelty[chosen]),
            ("outside the trust region", "%", 100 * frames.outside[chosen]),
        )
    return Scatter(
        name, title, x, y, x.place(time), y.place(values), index, np.full(len(index), -1), np.nan_to_num(values), columns,
        colour=DOTS,
    )  # fmt: skip


def _with_lines(plot: Scatter, data: RunData, values: np.ndarray, drawn: np.ndarray, *more: Line) -> Scatter:
    """The plot with a running median for each walker, labels as dots, and other lines."""
    frames, lines = data.frames, []
    for w in data.frames.walkers:
        mine = frames.walker[drawn] == w
        x, y = _medians(frames.time_ps[drawn][mine], values[mine])
        name = f"median, walker {w}" if len(frames.walkers) > 1 else "running median"
        if len(x) >= FEWEST_BINS:
            lines.append(Line(x, y, walker_colour(w) if len(frames.walkers) > 1 else INK, name))
    asked = frames.labelled[drawn] & np.isfinite(values)
    if asked.any():
        x, y = frames.time_ps[drawn][asked].tolist(), values[asked].tolist()
        lines.append(Line(x, y, RING, "asked for a label", dots=True, bare=True))
    return replace(plot, lines=(*lines, *more))


def _medians(x: np.ndarray, y: np.ndarray) -> tuple[list[float], list[float]]:
    """Medians of y in bins of x."""
    finite = np.isfinite(y)
    order = np.argsort(x[finite], kind="stable")
    x, y = x[finite][order], y[finite][order]
    bins = max(1, min(BINS, len(x) // FEWEST))
    parts = [(a, b) for a, b in zip(np.array_split(x, bins), np.array_split(y, bins), strict=True) if len(a)]
    return [float(a.mean()) for a, _ in parts], [float(np.median(b)) for _, b in parts]


def _range(values: np.ndarray, *others: float, log: bool = False) -> tuple[float, float]:
    """Ends of an axis that shows all of it."""
    finite = np.concatenate([values[np.isfinite(values)], [o for o in others if np.isfinite(o)]])
    if log:
        finite = finite[finite > 0]
    if not len(finite):
        return 0.1, 1.0
    low, high = float(finite.min()), float(finite.max())
    if log:
        return low / 1.25, max(high, 1.01 * low) * 1.25
    pad = 0.06 * (high - low) or 0.1 * max(abs(high), 1e-3)
    return (0.0 if 0 <= low < pad + 0.3 * (high - low) else low - pad), high + pad


def _window(data: RunData) -> Scatter | None:
    """Largest σ over the limit in the frames over which stopping was judged."""
    frames, drawn = data.frames, drawn_frames(data)
    index = frames.window[drawn].nonzero()[0]
    chosen = drawn[index]
    with np.errstate(invalid="ignore", divide="ignore"):
        values = frames.sigma[chosen] / frames.limit[chosen]
    if not np.isfinite(values).any():
        return None
    y = Axis("largest force σ / limit", 0.0, _range(values, 1.0)[1])
    plot = _series(data, "window_sigma", "", y, values, index)
    return _with_lines(plot, data, values, chosen, _level(plot, 1.0, "limit"))


def _level(plot: Scatter, value: float, label: str) -> Line:
    return Line([plot.x.low, plot.x.high], [value, value], PALE, label, dashed=True)


def _sigma(data: RunData) -> Scatter | None:
    """Largest σ of each frame, and the limit, in eV/A."""
    frames, drawn = data.frames, drawn_frames(data)
    values = frames.sigma[drawn]
    if not np.isfinite(values).any():
        return None
    y = Axis("largest force σ, eV/Å", *_range(values, *frames.limit[drawn].tolist(), log=True), True)
    plot = _series(data, "sigma", "Largest force σ of a frame", y, values, np.arange(len(drawn)))
    finite = np.isfinite(frames.limit[drawn])
    more = []
    if finite.any():
        x, limit = _medians(frames.time_ps[drawn][finite], frames.limit[drawn][finite])
        more = [Line(x, limit, PALE, "limit of the trigger", dashed=True)]
    return _with_lines(plot, data, values, drawn, *more)


def _temperature(data: RunData) -> Scatter | None:
    """Kinetic temperature, and that of the thermostat."""
    frames, drawn = data.frames, drawn_frames(data)
    values, target = frames.temperature_K[drawn], frames.target_K[drawn]
    if not np.isfinite(values).any():
        return None
    y = Axis("temperature, K", *_range(values, *target.tolist()))
    plot = _series(data, "temperature", "Temperature", y, values, np.arange(len(drawn)))
    more = []
    if np.isfinite(target).any():
        order = np.argsort(frames.time_ps[drawn], kind="stable")[:: max(1, len(drawn) // BINS)]
        order = order[np.isfinite(target[order])]
        more = [Line(frames.time_ps[drawn][order].tolist(), target[order].tolist(), PALE, "thermostat", dashed=True)]
    return _with_lines(plot, data, values, drawn, *more)


def _novelty(data: RunData) -> Scatter | None:
    """Largest novelty of each frame."""
    drawn = drawn_frames(data)
    values = data.frames.novelty[drawn]
    if not np.isfinite(values).any():
        return None
    y = Axis("largest novelty", *_range(values, 1.0, data.novelty_limit, log=True), True)
    plot = _series(data, "novelty", "Largest novelty of a frame", y, values, np.arange(len(drawn)))
    more = [_level(plot, 1.0, "edge of the trust region")]
    if np.isfinite(data.novelty_limit) and data.novelty_limit != 1.0:
        line = _level(plot, data.novelty_limit, "limit of the trigger")
        more.append(replace(line, colour="#a23b62"))
    return _with_lines(plot, data, values, drawn, *more)


def _prequential(data: RunData, first: int) -> Scatter | None:
    """|error| of every force component of the labels against its σ, predicted before they were learned."""
    view = prequential_errors(data)
    if len(view) < 2 or not view.scored.any() or not np.abs(view.error).max() > 0:
        return None
    plot = error_std_plot(view)
    columns = tuple(c for c in plot.columns if c[0] not in ("reference", "predicted"))
    return replace(plot, name="prequential_errors", title="", structure=plot.structure + first, columns=columns)
