"""Drawings of atoms as inline SVG: nearer ones darker, bonds between those that touch, one of them ringed, ways in which they move."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup

from gpmlp.report.style import INK, RING, lighten

SIZE = 104  # px
SHORTEST, HEAD = 4.0, 4.0  # px of arrows and of their heads
BOND = 1.2  # times the sum of covalent radii
# viewed from a little above and to the side, so that rows of a crystal do not hide one another
TURN = np.array([[0.82, 0.0, -0.57], [-0.21, 0.93, -0.30], [0.53, 0.37, 0.76]])
# pm, by atomic number: Cordero et al., Dalton Trans. 2832 (2008)
RADII = tuple(
    int(r)
    for r in (
        "20 31 28 128 96 84 76 71 66 57 58 166 141 121 111 107 105 102 106 203 176 170 160 153 139 139 132 126 124 132 122 122 "
        "120 119 120 120 116 220 195 190 175 164 154 147 146 142 139 145 144 142 139 139 138 139 140 244 215 207 204 203 201 "
        "199 198 198 196 194 192 192 189 190 187 187 175 170 162 151 144 141 136 136 132 145 146 148 140 150 150 260 221 215 "
        "206 200 196 190 187 180 169"
    ).split()
)


def covalent_radius(z: int) -> float:
    """Covalent radius, A."""
    return RADII[z] / 100 if 0 < z < len(RADII) else 1.5


def draw_atoms(
    vectors: np.ndarray,
    species: np.ndarray,
    view: np.ndarray,
    reach: float,
    colours: dict[int, str],
    label: str,
    ringed: int | None = None,
    motion: np.ndarray | None = None,
) -> Markup:
    """Atoms around a point, as seen from above the plane of `view`.

    Args:
        vectors, view: (k, 3) A from that point, and the same turned to the reader: right, up, near.
        species: (k,) atomic numbers; colours: of each.
        reach: A from the point to the rim of the drawing.
        label: what it shows, for those who do not see it.
        ringed: index of the atom that is meant.
        motion: (k, 3) A in the frame of `view`, drawn as lines from the atoms.
    """
    scale = 0.45 * SIZE / reach
    places = np.round(SIZE / 2 + scale * view[:, :2] * [1, -1], 1)
    depth = 0.5 - 0.5 * view[:, 2] / reach  # 0 = near, 1 = far
    meant = None if ringed is None else places[ringed]
    parts = [
        (view[k, 2], _atom(places[k], species[k], depth[k], scale, colours[int(species[k])], meant, k == ringed))
        for k in range(len(view))
    ]
    parts += _bonds(vectors, species, places, view, depth)
    drawn = "".join(text for _, text in sorted(parts, key=lambda part: part[0]))
    if motion is not None:
        drawn += "".join(_arrow(*pair) for pair in zip(places, scale * motion[:, :2] * [1, -1], strict=True))
    if meant is not None:
        drawn += f'<circle cx="{meant[0]}" cy="{meant[1]}" r="9" fill="none" stroke="{RING}" stroke-width="2.2"/>'
    ring = f'<circle cx="{SIZE / 2:.0f}" cy="{SIZE / 2:.0f}" r="{scale * reach:.1f}" class="cut"/>'
    # numbers, colours and symbols of elements: nothing here comes from a file as text
    return Markup(f'<svg class="hood" viewBox="0 0 {SIZE} {SIZE}" role="img" aria-label="{label}">{ring}{drawn}</svg>')


def _arrow(place: np.ndarray, motion: np.ndarray) -> str:
    """A line along a motion, px, with a head; '' where it is too short to be seen."""
    length = np.hypot(*motion)
    if length < SHORTEST:
        return ""
    tip, along = place + motion, motion / length
    across = np.array([-along[1], along[0]])
    corners = [tip + HEAD * along, tip + 0.6 * HEAD * across, tip - 0.6 * HEAD * across]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    line = f'x1="{place[0]}" y1="{place[1]}" x2="{tip[0]:.1f}" y2="{tip[1]:.1f}"'
    return f'<line {line} stroke="{RING}" stroke-width="1.8"/><polygon points="{points}" fill="{RING}"/>'


def _atom(
    place: np.ndarray, z: int, depth: float, scale: float, colour: str, meant: np.ndarray | None, centre: bool
) -> str:
    """Args: meant: the place of the ringed atom; centre: whether it is this one."""
    size = max(2.0, 0.55 * covalent_radius(int(z)) * scale * (1.15 - 0.3 * depth))
    fill = lighten(colour, 0.0 if centre else 0.72 * depth)
    edge = lighten(INK, 0.0 if centre else 0.25 + 0.6 * depth)
    # what hides the atom that is meant is transparent
    hides = meant is not None and depth < 0.5 and not centre and np.hypot(*(place - meant)) < size + 7
    veil = ' opacity=".5"' if hides else ""
    return f'<circle cx="{place[0]}" cy="{place[1]}" r="{size:.1f}" fill="{fill}" stroke="{edge}" stroke-width=".7"{veil}/>'


def _bonds(
    vectors: np.ndarray, species: np.ndarray, places: np.ndarray, view: np.ndarray, depth: np.ndarray
) -> list[tuple[float, str]]:
    """(depth, line) of the pairs that are near enough to be bonded."""
    radii = np.array([covalent_radius(int(z)) for z in species])
    distance = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
    first, second = np.nonzero(np.triu(distance < BOND * (radii[:, None] + radii[None]), 1))
    lines = []
    for a, b in zip(first[:160], second[:160], strict=True):
        shade = lighten(INK, 0.35 + 0.55 * float(depth[a] + depth[b]) / 2)
        line = f'x1="{places[a, 0]}" y1="{places[a, 1]}" x2="{places[b, 0]}" y2="{places[b, 1]}"'
        lines.append((float(min(view[a, 2], view[b, 2])) - 1e-6, f'<line {line} stroke="{shade}"/>'))
    return lines
