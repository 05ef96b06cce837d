"""Figures are the still pictures of a run, and the only ones of what is a curve rather than a cloud."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpmlp.report import figures
from gpmlp.report.figures import Picture, draw
from gpmlp.report.learning.data import Observed, RunData
from gpmlp.report.learning.plots import colour_of
from gpmlp.report.palette import ACCENT, GRID, INK, PALE, RING, mix
from gpmlp.report.scatter import Scatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
