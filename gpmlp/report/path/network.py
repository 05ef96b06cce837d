"""The page about an exploration of reactions: the network with its levels, minima, reactions, and what was tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from gpmlp.learning.paths.network import GPReactionNetwork, Minimum, Reaction
from gpmlp.learning.paths.run import NetworkOutcome
from gpmlp.report.figures import Picture, draw_picture
from gpmlp.report.page import Page, Section
from gpmlp.report.path.page import SETTINGS, draw_structure, reaction_page
from gpmlp.report.style import ACCENT, GRID, INK, PALE, format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NARROWEST, EACH = 5.6, 0.9  # inches of the figure, and of each minimum
POINTS = 40  # of an arc
HALF = 0.28  # of the bar of a minimum


def network_page(outcome: NetworkOutcome, recipe: Mapping[str, Any]) -> Page:
    """Of `gpmlp learn` with `reactions`. Raises UserError: matplotlib is not installed."""
    network, numbers = outcome.network, outcome.numbers
    start = network.minima[0].atoms
    values = {
        "minima": [_drawn_minimum(start, m) for m in network.minima],
        "saddles": [_drawn_saddle(r) for r in network.reactions],
        "reactions": network.reactions,
        "searches": network.searches,
        "recipe": recipe,
    }
    tiles = [
        (str(sum(not m.doubt for m in network.minima)), "minima"),
        (str(sum(not r.doubt for r in network.reactions)), "reactions"),
        (str(numbers["oracle_calls"]), "oracle calls"),
        (str(len(network.searches)), "searches"),
    ]
    sections = [
        Section("network", "Where does it lead?", "", _led(network)),
        Section("minima", "Which minima are there?", "", _rest(network)),
        Section("reactions", "How high are the barriers?", "", _barriers(network)),
        Section(
            "searches", "What was tried?", "", f"{len(network.searches)} searches; it ended because {network.ended}."
        ),
        SETTINGS,
    ]
    pictures = {"network": network_picture(network)}
    return reaction_page("Reaction network", "network", start, tiles, sections, pictures, values)


def _drawn_minimum(start: Any, m: Minimum) -> tuple[str, str, Markup, str]:
    drawing = draw_structure(m.atoms, _moved(start, m.atoms), f"minimum {m.number}", ring=False)
    return str(m.number), f"{m.energy:.3f} ± {format_number(m.sigma, 2)} eV, {m.fragments}", drawing, _in_print(m.doubt)


def _drawn_saddle(r: Reaction) -> tuple[str, str, Markup, str]:
    drawing = draw_structure(r.saddle, r.mode, f"saddle {r.number}", r.mode)
    return f"saddle {r.number}", f"{r.energy:.3f} eV", drawing, r.doubt


def _moved(start: Any, atoms: Any) -> np.ndarray:
    """(atoms, 3), or the distance from the middle where the order of atoms is another."""
    moved = atoms.positions - start.positions
    return np.asarray(moved if np.abs(moved).max() > 0 else atoms.positions - atoms.positions.mean(axis=0))


def _led(network: GPReactionNetwork) -> str:
    others = {m.number for m in network.minima[1:] if not m.doubt}
    direct = others & {n for r in network.reactions if not r.doubt and r.first == 1 for n in (r.first, r.second)}
    minima = "1 other minimum" if len(others) == 1 else f"{len(others)} other minima"
    return (
        f"From the start to {minima}, {len(direct)} of them in one step. Bars: minima; arcs: reactions, as high as their saddles; loops "
        "lead to the same minimum with atoms exchanged."
    )


def _in_print(doubt: str) -> str:
    """A doubt with the signs of a page."""
    return doubt.replace("eV/A^2", "eV/Å²").replace("curvature -", "curvature −")


def _rest(network: GPReactionNetwork) -> str:
    doubted = sum(bool(m.doubt) for m in network.minima)
    more = (
        f" {doubted} of them still {'has' if doubted == 1 else 'have'} a mode that goes down, by the model."
        if doubted
        else ""
    )
    return f"Energies above the start's, at rest by the oracle, with σ.{more}"


def _barriers(network: GPReactionNetwork) -> str:
    if not network.reactions:
        return "No reaction was found."
    sound = [r for r in network.reactions if not r.doubt]
    if not sound:
        return f"{len(network.reactions)} places with a mode that goes down were found, but no barrier that is sure; the table says why."
    lowest, doubted = min(sound, key=lambda r: r.forward), len(network.reactions) - len(sound)
    no_barrier = (
        f" {doubted} {'is no reaction' if doubted == 1 else 'are no reactions'} over a barrier; the table says why."
    )
    sure = sum(len(r.imaginary) == 1 for r in network.reactions)
    return (
        f"The lowest is {lowest.forward:.3f} ± {lowest.sigma:.2g} eV, of reaction {lowest.number}. {sure} of "
        f"{len(network.reactions)} saddles have one imaginary frequency by the model. σ: noise of the labels, and what the forces that are "
        f"left may hide.{no_barrier if doubted else ''}"
    )


def network_picture(network: GPReactionNetwork) -> Picture:
    """Levels of the minima, joined by arcs as high as the saddles. Raises UserError: matplotlib is not installed."""
    alt = f"Network of {len(network.minima)} minima and {len(network.reactions)} reactions"
    width = max(NARROWEST, EACH * len(network.minima))
    return draw_picture(_paint_network, alt, network, width=width)


def _paint_network(axes: Axes, network: GPReactionNetwork) -> None:
    axes.grid(color=GRID, lw=0.7, axis="y")
    place = {m.number: float(i) for i, m in enumerate(network.minima)}
    for m in network.minima:
        x = place[m.number]
        axes.plot([x - HALF, x + HALF], [m.energy, m.energy], color=INK, lw=3)
        axes.annotate(f"{m.number}", (x, m.energy), (0, -13), textcoords="offset points", ha="center")
    loops: dict[int, int] = {}
    for r in network.reactions:
        left, right = place[r.first], place[r.second]
        if r.first == r.second:  # beside the last loop there
            loops[r.first] = loops.get(r.first, 0) + 1
            half = 0.07 * loops[r.first]
            left, right = left - half, right + half
        along = np.linspace(-1.0, 1.0, POINTS)
        ends = [network.minima[n - 1].energy for n in (r.first, r.second)]
        energies = np.where(along < 0, ends[0], ends[1]) + (r.energy - np.where(along < 0, ends[0], ends[1])) * (
            1 - along**2
        )
        axes.plot(left + (right - left) * (along + 1) / 2, energies, color=ACCENT, lw=1.2)
        axes.annotate(
            f"{r.number}", ((left + right) / 2, r.energy), (0, 3), textcoords="offset points", ha="center", color=ACCENT
        )
    axes.axhline(0.0, color=PALE, lw=1)
    axes.margins(y=0.15)
    axes.set(xlim=(-0.6, len(place) - 0.4), xticks=[], xlabel="minimum", ylabel="energy above the start / eV")
