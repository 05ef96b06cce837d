"""Plots are the interactive pictures of a run: every frame that was looked at against time, and errors against what was foreseen."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from gpmlp.report import scatter
from gpmlp.report.learning.data import RunData
from gpmlp.report.learning.numbers import errors_foretold, kept
from gpmlp.report.palette import INK, PALE, RING, SPECIES, mix
from gpmlp.report.scatter import Axis, Line, Scatter

BINS = 160  # of the running medians
FEWEST = 8  # frames of a median
FEWEST_BINS = 4  # fewer make no curve
DOTS = mix("#2a6f97", "#ffffff", 0.45)


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


def all_of(data: RunData) -> tuple[Places, dict[str, Scatter]]:
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
