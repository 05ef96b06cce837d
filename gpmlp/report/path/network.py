"""The page about an exploration of reactions: the network with its levels, minima, reactions, and what was tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gpmlp.learning.paths.network import GPReactionNetwork
from gpmlp.learning.paths.run import NetworkOutcome
from gpmlp.report.figures import Picture, PointLabels, draw_picture
from gpmlp.report.page import Page, Section
from gpmlp.report.path.page import SETTINGS, draw_structure
from gpmlp.report.style import ACCENT, GRID, INK, PALE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NARROWEST, EACH = 6.4, 1.1  # inches of the figure, and of each minimum
POINTS = 40  # of an arc
HALF = 0.28  # of the bar of a minimum


def network_page(outcome: NetworkOutcome, recipe: Mapping[str, Any]) -> Page:
    """Of `gpmlp learn` with `reactions`. Raises UserError: matplotlib is not installed."""
    network, numbers = outcome.network, outcome.numbers
    start = network.minima[0].atoms
    kinds = {
        "minima": [(m, draw_structure(m.atoms, _moved(start, m.atoms), f"minimum {m.number}")) for m in network.minima],
        "reactions": [(r, draw_structure(r.saddle, r.mode, f"saddle {r.number}", r.mode)) for r in network.reactions],
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
        Section("searches", "What was tried?", "", f"{len(network.searches)} searches; it ended as {network.ended}."),
        SETTINGS,
    ]
    return Page(
        template="network.html",
        kind="Reaction network",
        title=f"Reactions of {start.get_chemical_formula()}",
        about=[("Atoms", str(len(start))), ("Periodic", "yes" if start.pbc.any() else "no")],
        tiles=tiles,
        sections=sections,
        record={},
        scatters={},
        pictures={"network": network_picture(network)},
        labels=PointLabels((), (), np.zeros(0, int), np.zeros(0, int)),
        whole="",
        values={**kinds, "searches": network.searches, "recipe": recipe},
        file="network.html",
        numbers_in="network.json",
    )


def _moved(start: Any, atoms: Any) -> np.ndarray:
    """(atoms, 3), or the distance from the middle where the order of atoms is another."""
    moved = atoms.positions - start.positions
    return np.asarray(moved if np.abs(moved).max() > 0 else atoms.positions - atoms.positions.mean(axis=0))


def _led(network: GPReactionNetwork) -> str:
    products = {r.second for r in network.reactions if r.first == 1} | {
        r.first for r in network.reactions if r.second == 1
    }
    direct = len(products - {1})
    return (
        f"From the start to {len(network.minima) - 1} other minima, {direct} of them in one step. Bars: minima; arcs: reactions, as high "
        "as their saddles; loops lead to the same minimum with atoms exchanged."
    )


def _rest(network: GPReactionNetwork) -> str:
    doubted = sum(bool(m.doubt) for m in network.minima)
    more = f" {doubted} of them still had a mode that goes down, by the model." if doubted else ""
    return f"Energies above the start's, at rest by the oracle, with σ.{more}"


def _barriers(network: GPReactionNetwork) -> str:
    if not network.reactions:
        return "No reaction was found."
    sound = [r for r in network.reactions if not r.doubt]
    if not sound:
        return f"{len(network.reactions)} places with a mode that goes down were found, but no barrier that is sure; the table says why."
    lowest, doubted = min(sound, key=lambda r: r.forward), len(network.reactions) - len(sound)
    sure = sum(len(r.imaginary) == 1 for r in network.reactions)
    return (
        f"The lowest is {lowest.forward:.3f} ± {lowest.sigma:.2g} eV, of reaction {lowest.number}. {sure} of "
        f"{len(network.reactions)} saddles have one imaginary frequency by the model. σ: noise of the labels, and what the forces that are "
        f"left may hide.{f' {doubted} are no reactions over a barrier; the table says why.' if doubted else ''}"
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
