"""A figure of a reaction path: energies along it with their error band, and the images that were labelled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.interpolate import CubicHermiteSpline

from gpmlp.io.files import atomic_write
from gpmlp.learning.paths.band import BandLabel
from gpmlp.learning.paths.band import Path as ReactionPath

POINTS = 200  # of a curve


def draw_path(path: ReactionPath, labels: Sequence[BandLabel], file: Path) -> None:
    """Write a PNG of the path: the mean, which goes through images with the slopes that their forces say, and 2 σ on either side.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    along = np.linspace(0.0, path.distances[-1], POINTS)
    mean = CubicHermiteSpline(path.distances, path.energies, path.slopes)(along)
    sigma = np.interp(along, path.distances, path.sigmas)
    axes.fill_between(along, mean - 2 * sigma, mean + 2 * sigma, alpha=0.25, linewidth=0, label="± 2 σ")
    axes.plot(along, mean, label="posterior mean")
    axes.errorbar(path.distances, path.energies, 2 * path.sigmas, fmt="o", color="C0", markersize=4)
    counts = np.bincount([label.image for label in labels], minlength=len(path.energies))
    for i in counts.nonzero()[0]:
        axes.annotate(f"{counts[i]}×", (path.distances[i], path.energies[i]), (0, 7), textcoords="offset points")
    axes.margins(y=0.12)
    axes.set_xlabel("distance along the path / Å")
    axes.set_ylabel("energy / eV")
    axes.set_title(f"barrier {path.barrier:.3f} ± {path.sigma:.2g} eV; n×: labelled there", fontsize="medium")
    axes.legend(frameon=False)
    with atomic_write(file) as handle:
        figure.savefig(handle, format="png", dpi=150)
