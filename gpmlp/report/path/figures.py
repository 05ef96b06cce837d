"""Figures of reactions: energies along a path or of a saddle and its sides with their error bars, and how labels were foreseen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.interpolate import CubicHermiteSpline

from gpmlp.learning.paths.band import BandLabel
from gpmlp.learning.paths.band import Path as ReactionPath
from gpmlp.learning.paths.run import RelaxStep
from gpmlp.learning.paths.saddle import Saddle, SaddleLabel
from gpmlp.report.figures import Picture, draw_picture
from gpmlp.report.style import ACCENT, GRID, INK, PALE, RING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 200  # of a curve
WIDE = 6.4  # inches
FLOOR = 0.1  # meV, so that the lowest energy has a place on a logarithmic axis


def path_picture(path: ReactionPath, labels: Sequence[BandLabel]) -> Picture:
    """Energies along a path, whose mean goes through images with the slopes that their forces say, and 2 σ on either side.

    Raises:
        UserError: matplotlib is not installed.
    """
    alt = f"Energy along the path, with a barrier of {path.barrier:.3f} eV"
    return draw_picture(_paint_path, alt, path, labels, width=WIDE)


def _paint_path(axes: Axes, path: ReactionPath, labels: Sequence[BandLabel]) -> None:
    axes.grid(color=GRID, lw=0.7)
    along = np.linspace(0.0, path.distances[-1], POINTS)
    mean = CubicHermiteSpline(path.distances, path.energies, path.slopes)(along)
    sigma = np.interp(along, path.distances, path.sigmas)
    band = mean - 2 * sigma, mean + 2 * sigma
    axes.fill_between(along, *band, color=ACCENT, alpha=0.25, linewidth=0, label="± 2 σ")
    axes.plot(along, mean, color=ACCENT, label="posterior mean")
    axes.errorbar(path.distances, path.energies, 2 * path.sigmas, fmt="o", color=ACCENT, markersize=4)
    counts = np.bincount([label.image for label in labels], minlength=len(path.energies))
    labelled = counts.nonzero()[0]
    axes.plot(
        path.distances[labelled], path.energies[labelled], "o", mec=RING, mfc="none", ms=9, label="labelled there"
    )
    for i in labelled:
        axes.annotate(f"{counts[i]}×", (path.distances[i], path.energies[i]), (0, 9), textcoords="offset points")
    axes.margins(y=0.14)
    axes.set(xlabel="distance along the path / Å", ylabel="energy / eV")
    axes.set_title(f"barrier {path.barrier:.3f} ± {path.sigma:.2g} eV")
    axes.legend()


def saddle_picture(saddle: Saddle) -> Picture:
    """Levels of the start, the saddle and the minima on its sides. Raises UserError: matplotlib is not installed."""
    alt = f"Levels of a saddle {saddle.barrier:.3f} eV above the start, and of the minima on its sides"
    return draw_picture(_paint_saddle, alt, saddle, width=WIDE)


def _paint_saddle(axes: Axes, saddle: Saddle) -> None:
    start = saddle.start.get_potential_energy()
    levels = [
        ("saddle", saddle.barrier),
        *((f"side {i + 1}", side.get_potential_energy() - start) for i, side in enumerate(saddle.sides)),
    ]
    places = {"side 1": 0.0, "saddle": 1.0, "side 2": 2.0}
    axes.grid(color=GRID, lw=0.7, axis="y")
    for name, energy in levels:
        x = places[name]
        axes.plot([x - 0.3, x + 0.3], [energy, energy], color=ACCENT if name == "saddle" else INK, lw=3)
        if name != "saddle":
            inner = (x + 0.3, 0.7) if x < 1 else (x - 0.3, 1.3)
            axes.plot(inner, [energy, saddle.barrier], color=PALE, lw=1, ls="--")
        axes.annotate(f"{name}\n{energy:.3f} eV", (x, energy), (0, 6), textcoords="offset points", ha="center")
    axes.errorbar([1.0], [saddle.barrier], [2 * saddle.sigma], color=ACCENT, capsize=4)
    axes.axhline(0.0, color=PALE, lw=1)
    axes.text(-0.55, 0.0, "start", color=PALE, va="bottom")
    axes.margins(y=0.2)
    axes.set(xlim=(-0.6, 2.6), xticks=[], ylabel="energy / eV")
    axes.set_title(f"{saddle.barrier:.3f} ± {saddle.sigma:.2g} eV above the start; bar: ± 2 σ")


def foreseen_picture(
    labels: Sequence[BandLabel] | Sequence[SaddleLabel], errors: np.ndarray, sigmas: np.ndarray
) -> Picture:
    """Errors of energies that were foreseen, and their standard deviations.

    Args:
        errors, sigmas: of each label, eV.

    Raises:
        UserError: matplotlib is not installed.
    """
    numbers = np.array([label.number for label in labels])
    return draw_picture(
        _paint_foreseen, "Errors of the energies of labels as they were foreseen, with 2 σ", numbers, errors, sigmas
    )


def _paint_foreseen(axes: Axes, numbers: np.ndarray, errors: np.ndarray, sigmas: np.ndarray) -> None:
    axes.grid(color=GRID, lw=0.7)
    axes.axhline(0.0, color=PALE, lw=1)
    axes.errorbar(
        numbers,
        np.zeros(len(numbers)),
        2000 * sigmas,
        fmt="none",
        ecolor=ACCENT,
        elinewidth=6,
        alpha=0.3,
        label="± 2 σ",
    )
    axes.plot(numbers, 1000 * errors, "o", color=INK, ms=5, label="foreseen less found")
    reach = max(1.0, 1000 * np.abs(errors).max(), 2000 * sigmas.max())
    axes.set_yscale("symlog", linthresh=1.0)
    axes.set(ylim=(-1.5 * reach, 1.5 * reach), xlabel="label", ylabel="energy / meV")
    _whole_numbers(axes)
    axes.legend()


def relaxation_picture(steps: Sequence[RelaxStep]) -> Picture:
    """Energies of the labels of a relaxation above the lowest. Raises UserError: matplotlib is not installed."""
    return draw_picture(
        _paint_relaxation, "Energies and largest forces of the labels of a relaxation", steps, width=WIDE
    )


def _paint_relaxation(axes: Axes, steps: Sequence[RelaxStep]) -> None:
    numbers, forces = [step.labels for step in steps], [step.force for step in steps]
    energies = np.array([step.energy for step in steps])
    axes.grid(color=GRID, lw=0.7)
    axes.plot(
        numbers,
        1000 * (energies - energies.min()) + FLOOR,
        "o-",
        color=ACCENT,
        label=f"energy above the lowest + {FLOOR:g} / meV",
    )
    axes.plot(numbers, forces, "s--", color=RING, label="largest force / eV/Å")
    axes.set_yscale("log")
    axes.set(xlabel="label")
    _whole_numbers(axes)
    axes.legend()


def _whole_numbers(axes: Axes) -> None:
    """Ticks along x at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
