"""The figure of a test of locality: spread of forces against the radius beyond which atoms are redrawn, or noise against the cutoff."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpmlp.learning.force_decay import RESOLVED
from gpmlp.learning.locality import Locality
from gpmlp.report.figures import Picture, draw_picture
from gpmlp.report.style import ACCENT, GRID, INK, PALE, RING, SPECIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def locality_picture(found: Locality) -> Picture:
    """Draw what was found. Raises UserError: matplotlib is not installed."""
    if found.floors:
        alt = "Spread of the force on central atoms against the radius beyond which all atoms are redrawn"
        return draw_picture(_paint_floors, alt, found)
    return draw_picture(_paint_fits, "Noise and error of forces of small fits against their cutoff", found)


def _paint_floors(axes: Axes, found: Locality) -> None:
    axes.grid(color=GRID, lw=0.7)
    radii = np.array([one.radius for one in found.floors])
    spread, error = (1e3 * np.array([getattr(one, name) for one in found.floors]) for name in ("spread", "error"))
    shown = spread > 1e3 * RESOLVED
    symbols = [s for s in found.floors[0].species if len(found.floors[0].species) > 1]
    for symbol, colour in zip(symbols, SPECIES[1:], strict=False):
        values = 1e3 * np.array([one.species.get(symbol, np.nan) for one in found.floors])
        axes.plot(radii[shown], values[shown], "o--", color=colour, ms=3.5, lw=0.9, label=symbol)
    label = "beyond R" if found.law.kind == "none" else f"beyond R: {found.law.kind}"
    axes.errorbar(radii[shown], spread[shown], error[shown], fmt="o-", color=ACCENT, lw=1.6, ms=5, label=label)
    if np.isfinite(found.force_error):
        axes.axhline(1e3 * found.force_error, color=RING, lw=1.2, ls="--", label="force error of the model")
    _mark_cutoff(axes, found)
    if shown.any():
        axes.set_yscale("log")
    axes.set(xlabel="radius R, Å", ylabel="spread of forces, meV/Å")
    axes.legend()


def _paint_fits(axes: Axes, found: Locality) -> None:
    axes.grid(color=GRID, lw=0.7)
    cutoffs = [one.cutoff for one in found.fits]
    axes.plot(
        cutoffs, [1e3 * one.noise for one in found.fits], "o-", color=ACCENT, lw=1.6, label="noise that was learned"
    )
    axes.plot(cutoffs, [1e3 * one.rmse for one in found.fits], "s--", color=INK, lw=1.1, ms=4, label="rmse, held out")
    _mark_cutoff(axes, found)
    axes.set(xlabel="cutoff, Å", ylabel="forces, meV/Å", ylim=(0, None))
    axes.legend()


def _mark_cutoff(axes: Axes, found: Locality) -> None:
    if np.isfinite(found.cutoff):
        axes.axvline(found.cutoff, color=PALE, lw=1.0, ls=":", label=f"cutoff {found.cutoff:.3g} Å")
