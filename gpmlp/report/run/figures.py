"""Figures are the still pictures of a run, and the only ones of what is a curve rather than a cloud."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from gpmlp.report import scatter
from gpmlp.report.model import figures
from gpmlp.report.model.figures import Picture, draw
from gpmlp.report.run.data import Observed, RunData
from gpmlp.report.run.numbers import errors_foretold, kept
from gpmlp.report.scatter import Axis, Line, Scatter
from gpmlp.report.style import ACCENT, GRID, INK, PALE, RING, SPECIES, mix

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 160  # of the running medians
FEWEST = 8  # frames of a median
FEWEST_BINS = 4  # fewer make no curve
DOTS = mix("#2a6f97", "#ffffff", 0.45)

STRIP = 9.6, 2.7  # inches, of a series over the whole width
HALF = 4.9, 3.2
CAUSE_SHADES = {
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


def shade(cause: str) -> str:
    """Colour of a reason."""
    return CAUSE_SHADES.get(cause, "#6b7682")


def _legend(axes: Axes, columns: int = 2) -> None:
    """Above the axes, where it hides nothing."""
    place = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2, "handlelength": 1.6}
    axes.legend(ncols=columns, **place)


def rate(axes: Axes, found: dict, wanted: float) -> None:
    """Labels per 1000 steps in stretches of the run, with upper bounds and the rate that was wanted."""
    axes.grid(axis="y", color=GRID, lw=0.7)
    left, right = (np.array(found[k]) for k in ("from_step", "to_step"))
    middle, width = (left + right) / 2, (right - left) * 0.86
    axes.bar(middle, found["per_1000_steps"], width, color=ACCENT, label="labels")
    axes.plot(middle, found["at_most"], "_", color=PALE, ms=11, mew=1.4, label="at most (95 %)")
    if np.isfinite(wanted):
        axes.axhline(wanted, color=RING, lw=1.1, ls="--", label=f"wanted at the end: {wanted:g}")
    axes.set(xlabel="steps of all walkers", ylabel="labels per 1000 steps", xlim=(0, right[-1]))
    axes.set_ylim(0, 1.08 * max([*found["at_most"], wanted if np.isfinite(wanted) else 0]))
    _legend(axes, 3)


def observable(axes: Axes, seen: Observed) -> None:
    """Mean of an observable with its standard error as the window grew, and the tolerance."""
    axes.grid(color=GRID, lw=0.7)
    known = np.isfinite(seen.sem)
    x, y, sem = seen.steps[known], seen.mean[known], seen.sem[known]
    axes.fill_between(x, y - sem, y + sem, color=mix(ACCENT, "#ffffff", 0.78), lw=0, label="± standard error")
    axes.plot(x, y, color=ACCENT, lw=1.8, label="mean")
    last = y[-1] if len(y) else 0.0
    for sign in (-1, 1):
        label = f"wanted: ± {seen.tolerance:.2g}" if sign > 0 else None
        axes.axhline(last + sign * seen.tolerance, color=RING, lw=1.0, ls="--", label=label)
    early = x[~seen.enough[known]]
    if len(early):
        axes.axvspan(x[0], early[-1], color="#eef1f4", lw=0, zorder=0, label="too short to judge")
    if len(y):
        settled = slice(len(y) // 8, None)
        reach = max(2.2 * seen.tolerance, 1.15 * float(np.abs(y - last)[settled].max() + sem[settled].max()))
        axes.set_ylim(last - reach, last + reach)
        axes.set_xlim(0, x[-1])
    axes.set(xlabel="steps of the window, all walkers", ylabel=f"{seen.name}{', ' + seen.unit if seen.unit else ''}")
    _legend(axes)


def trust(axes: Axes, shares: dict, window: float, frames: float, atoms: float) -> None:
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


def staircase(axes: Axes, data: RunData) -> None:
    """Labels that each walker asked for against its time; reasons by colour."""
    axes.grid(color=GRID, lw=0.7)
    walkers = data.frames.walkers
    end = float(data.frames.time_ps.max()) if len(data.frames) else 1.0
    for w in walkers:
        mine = sorted((label for label in data.asked if label.walker == w), key=lambda label: label.time_ps)
        times = [label.time_ps for label in mine]
        counts = list(range(1, len(mine) + 1))
        colour = colour_of(w) if len(walkers) > 1 else INK
        last = float(data.frames.time_ps[data.frames.walker == w].max())
        axes.step([0.0, *times, last], [0, *counts, len(mine)], where="post", color=colour, lw=1.4,
                  label=f"walker {w}" if len(walkers) > 1 else None)  # fmt: skip
        for label, count in zip(mine, counts, strict=True):
            axes.plot(label.time_ps, count, "o", ms=4.5, color=shade(label.cause), zorder=3)
    for cause in dict.fromkeys(label.cause for label in data.asked):
        axes.plot([], [], "o", ms=4.5, color=shade(cause), label=cause)
    axes.set(xlabel="time of the trajectory, ps", ylabel="labels asked for", xlim=(0, end), ylim=(0, None))
    if data.asked:
        _legend(axes, 3)


def causes(axes: Axes, counts: dict[str, int]) -> None:
    """How many labels came for which reason."""
    names = list(counts)
    for k, name in enumerate(names):
        axes.barh(k, counts[name], height=0.62, color=shade(name))
        axes.text(counts[name], k, f" {counts[name]}", va="center", color=INK)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xlim(0, 1.12 * max(counts.values()))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("labels")


def bounds(axes: Axes, data: RunData) -> None:
    """Largest force error of each label beside the bound that was predicted."""
    axes.grid(color=GRID, lw=0.7)
    told = [label for label in data.foretold if np.isfinite(label.foretold.bound)]
    told = [label for label in told if np.isfinite(label.foretold.largest_error)]
    number = np.array([label.number for label in told])
    bound = np.array([label.foretold.bound for label in told])
    error = np.array([label.foretold.largest_error for label in told])
    over = error > bound
    axes.vlines(number, np.minimum(bound, error), np.maximum(bound, error), color=GRID, lw=1.2)
    exceeded = f"(passed with {100 * data.probability:.0f} %)"
    axes.plot(number, bound, "_", color=INK, ms=9, mew=1.8, label=f"bound {exceeded}")
    axes.plot(number[~over], error[~over], "o", ms=4.5, color=ACCENT, label="largest error")
    if over.any():
        axes.plot(number[over], error[over], "o", ms=4.5, color=RING, label="beyond the bound")
    limit = np.array([label.limit for label in told])
    if np.isfinite(limit).any():
        axes.plot(number, limit, color=PALE, lw=1.0, ls="--", label="limit")
    axes.set(xlabel="label", ylabel="force error of the worst atom, eV/Å")
    axes.set_ylim(0, 1.06 * float(np.nanmax([bound.max(), error.max(), *limit])))
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(axes)


def _strip(plot: Scatter) -> bool:
    return plot.x.label.startswith("time")


def all_of(data: RunData, found: dict, plots: dict[str, Scatter]) -> dict[str, Picture]:
    """Name -> picture, for everything the data allow."""
    made = {}
    for plot in plots.values():
        alt = f"{plot.title or plot.name}: {plot.y.label} against {plot.x.label}, {len(plot.px):,} points"
        wide = STRIP if _strip(plot) else (6.9 if plot.value is not None else 4.9, 4.1)
        made[plot.name] = draw(figures.scatter, alt, plot, width=wide[0], height=wide[1])
    size = {"width": HALF[0], "height": HALF[1]}
    frames = data.frames
    if len(frames) and data.total_steps:
        alt = "Labels per 1000 steps against steps"
        made["label_rate"] = draw(rate, alt, found["label_rate"], data.wanted_rate, **size)
        began = float(frames.made[frames.window].min()) if frames.window.any() else float("nan")
        alt = "Shares of frames and atoms inside the trust region against steps"
        made["trust_region"] = draw(
            trust, alt, found["trust_region"], began, data.wanted_frames, data.wanted_atoms, **size
        )
        made["labels_over_time"] = draw(staircase, "Labels of each walker against time", data, **size)
    for k, seen in enumerate(data.observed):
        if np.isfinite(seen.sem).any():
            made[f"observable_{k + 1}"] = draw(observable, f"Mean of {seen.name} as the window grew", seen, **size)
    if found["label_causes"]:
        height = 0.9 + 0.3 * max(len(found["label_causes"]), 2)
        made["label_causes"] = draw(
            causes, "Labels by reason", found["label_causes"], width=HALF[0], height=min(height, HALF[1])
        )
    honesty = found["honesty"]
    if honesty:
        alt = "Observed against expected coverage of foreseen force errors"
        made["reliability"] = draw(figures.reliability, alt, {"forces": honesty["reliability"]}, **size)
        if honesty["bounds"]:
            made["bounds"] = draw(bounds, "Largest force error of each label beside its bound", data, **size)
    return made


@dataclass(frozen=True, eq=False)
class Places:
    """What the points of all plots belong to: the frames that are drawn, then the labels, then the frames in which it is blind."""

    names: tuple[str, ...]
    config_type: tuple[str, ...]
    species: np.ndarray
    atom: np.ndarray


def colour_of(walker: int) -> str:
    """Of a trajectory."""
    return SPECIES[walker % len(SPECIES)]


def places(data: RunData) -> tuple[Places, int, int, int, int]:
    """Places, and where in them labels and blind frames begin: (structures, structures, atoms of labels, atoms)."""
    some, frames = kept(data), data.frames
    names = [f"step {frames.step[k]:,}" for k in some]
    types = [f"walker {frames.walker[k]}" for k in some]
    told = data.foretold
    names += [label.name for label in told]
    types += [f"walker {label.walker}" for label in told]
    species = [np.asarray(label.species) for label in told]
    atom = [np.arange(len(s)) for s in species]
    at, rows = len(some), sum(map(len, species))
    begin = len(names)
    if data.blind is not None:
        names += data.blind.names
        types += data.blind.config_type
        species, atom = [*species, data.blind.species], [*atom, data.blind.atom]
    empty = np.zeros(0, int)
    joined = (np.concatenate([empty, *part]) for part in (species, atom))
    return Places(tuple(names), tuple(types), *joined), at, begin, 0, rows


def all_plots(data: RunData) -> tuple[Places, dict[str, Scatter]]:
    """Everything that can be drawn."""
    where, labels_at, blind_at, _, blind_row = places(data)
    plots: list[Scatter | None] = []
    if len(data.frames):
        plots += [window(data), sigma(data), temperature(data), novelty(data)]
    plots.append(foreseen(data, labels_at))
    if data.blind is not None:
        plot = scatter.novelty_map(data.blind)
        if plot is not None:
            plots.append(replace(plot, structure=plot.structure + blind_at, row=plot.row + blind_row))
    return where, {plot.name: plot for plot in plots if plot is not None}


def _series(data: RunData, name: str, title: str, y: Axis, values: np.ndarray, some: np.ndarray) -> Scatter:
    """A quantity of frames (places in `kept`) against time, with what else is known of them."""
    frames, drawn = data.frames, kept(data)
    chosen = drawn[some]
    time = frames.time_ps[chosen]
    begin, end = (float(time.min()), float(time.max())) if len(time) else (0.0, 1.0)
    room = 0.01 * (end - begin) or 0.01
    x = Axis("time of the trajectory, ps", max(0.0, begin - room) if begin <= room else begin - room, end + room)
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
        name, title, x, y, x.place(time), y.place(values), some, np.full(len(some), -1), np.nan_to_num(values), columns,
        colour=DOTS,
    )  # fmt: skip


def _with_lines(plot: Scatter, data: RunData, values: np.ndarray, drawn: np.ndarray, *more: Line) -> Scatter:
    """With a running median for each walker, labels as dots, and other lines."""
    frames, lines = data.frames, []
    for w in data.frames.walkers:
        mine = frames.walker[drawn] == w
        x, y = medians(frames.time_ps[drawn][mine], values[mine])
        name = f"median, walker {w}" if len(frames.walkers) > 1 else "running median"
        if len(x) >= FEWEST_BINS:
            lines.append(Line(x, y, colour_of(w) if len(frames.walkers) > 1 else INK, name))
    asked = frames.labelled[drawn] & np.isfinite(values)
    if asked.any():
        x, y = frames.time_ps[drawn][asked].tolist(), values[asked].tolist()
        lines.append(Line(x, y, RING, "asked for a label", dots=True, bare=True))
    return replace(plot, lines=(*lines, *more))


def medians(x: np.ndarray, y: np.ndarray) -> tuple[list[float], list[float]]:
    """Medians of y in bins of x."""
    known = np.isfinite(y)
    order = np.argsort(x[known], kind="stable")
    x, y = x[known][order], y[known][order]
    bins = max(1, min(BINS, len(x) // FEWEST))
    parts = [(a, b) for a, b in zip(np.array_split(x, bins), np.array_split(y, bins), strict=True) if len(a)]
    return [float(a.mean()) for a, _ in parts], [float(np.median(b)) for _, b in parts]


def _range(values: np.ndarray, *others: float, log: bool = False) -> tuple[float, float]:
    """Ends of an axis that shows all of it."""
    known = np.concatenate([values[np.isfinite(values)], [o for o in others if np.isfinite(o)]])
    if log:
        known = known[known > 0]
    if not len(known):
        return 0.1, 1.0
    low, high = float(known.min()), float(known.max())
    if log:
        return low / 1.25, max(high, 1.01 * low) * 1.25
    pad = 0.06 * (high - low) or 0.1 * max(abs(high), 1e-3)
    return (0.0 if 0 <= low < pad + 0.3 * (high - low) else low - pad), high + pad


def window(data: RunData) -> Scatter | None:
    """Largest σ over the limit in the frames over which stopping was judged."""
    frames, drawn = data.frames, kept(data)
    some = frames.window[drawn].nonzero()[0]
    chosen = drawn[some]
    with np.errstate(invalid="ignore", divide="ignore"):
        values = frames.sigma[chosen] / frames.limit[chosen]
    if not np.isfinite(values).any():
        return None
    y = Axis("largest force σ / limit", 0.0, _range(values, 1.0)[1])
    plot = _series(data, "window_sigma", "", y, values, some)
    return _with_lines(plot, data, values, chosen, _level(plot, 1.0, "limit"))


def _level(plot: Scatter, value: float, label: str) -> Line:
    return Line([plot.x.low, plot.x.high], [value, value], PALE, label, dashed=True)


def sigma(data: RunData) -> Scatter | None:
    """Largest σ of each frame, and the limit, in eV/A."""
    frames, drawn = data.frames, kept(data)
    values = frames.sigma[drawn]
    if not np.isfinite(values).any():
        return None
    y = Axis("largest force σ, eV/Å", *_range(values, *frames.limit[drawn].tolist(), log=True), True)
    plot = _series(data, "sigma", "Largest force σ of a frame", y, values, np.arange(len(drawn)))
    known = np.isfinite(frames.limit[drawn])
    more = []
    if known.any():
        x, limit = medians(frames.time_ps[drawn][known], frames.limit[drawn][known])
        more = [Line(x, limit, PALE, "limit of the trigger", dashed=True)]
    return _with_lines(plot, data, values, drawn, *more)


def temperature(data: RunData) -> Scatter | None:
    """Kinetic temperature, and that of the thermostat."""
    frames, drawn = data.frames, kept(data)
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


def novelty(data: RunData) -> Scatter | None:
    """Largest novelty of each frame."""
    drawn = kept(data)
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


def foreseen(data: RunData, labels_at: int) -> Scatter | None:
    """|error| of every force component of the labels against its σ, both before they were learned."""
    view = errors_foretold(data)
    if len(view) < 2 or not np.isfinite(view.scaled).any() or not np.abs(view.error).max() > 0:
        return None
    plot = scatter.error_against_std(view)
    columns = tuple(c for c in plot.columns if c[0] not in ("reference", "predicted"))
    return replace(plot, name="foreseen", title="", structure=plot.structure + labels_at, columns=columns)
