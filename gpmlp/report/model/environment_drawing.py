"""A neighbourhood is a small drawing (inline SVG) of the atoms within the cutoff of one atom."""

from __future__ import annotations

from html import escape

import numpy as np

from gpmlp.core.errors import chemical_symbol
from gpmlp.report.model.data import ReportData
from gpmlp.report.style import INK, RING, mix, species_colours

SIZE = 104  # px
MOST = 56  # atoms drawn, the nearest
MOST_IMAGES = 7  # cells on each side
BOND = 1.2  # times the sum of covalent radii
# seen from a little above and to the side, so that rows of a crystal do not hide one another
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


def radius(z: int) -> float:
    """Covalent radius, A."""
    return RADII[z] / 100 if 0 < z < len(RADII) else 1.5


def neighbours(data: ReportData, row: int) -> tuple[np.ndarray, np.ndarray]:
    """(k, 3) vectors from an atom to those within the cutoff, itself first, and their species; periodic images included."""
    owner = int(data.structure[row])
    rows = np.flatnonzero(np.asarray(data.structure) == owner)
    vectors = data.positions[rows] - data.positions[row]
    shifts = np.zeros((1, 3))
    cutoff = data.cutoff
    if data.cells is not None:
        cell = np.asarray(data.cells[owner], dtype=float)
        lengths = np.linalg.norm(cell, axis=1)
        along = (
            lengths > 1e-6 if data.periodic is None else np.asarray(data.periodic[owner], dtype=bool) & (lengths > 1e-6)
        )
        shifts = _images(cell, along, vectors, cutoff)
    images = (vectors[None] + shifts[:, None]).reshape(-1, 3)
    species = np.tile(data.species[rows], len(shifts))
    distance = np.linalg.norm(images, axis=1)
    order = np.argsort(distance, kind="stable")[:MOST]
    order = order[distance[order] <= cutoff]
    return images[order], species[order]


def _images(cell: np.ndarray, along: np.ndarray, vectors: np.ndarray, cutoff: float) -> np.ndarray:
    """(k, 3) lattice translations that can bring an atom within the cutoff."""
    cell = cell.copy()
    for axis in np.flatnonzero(~along):  # any vector that is not in the span of the periodic ones
        _, _, basis = np.linalg.svd(cell[np.arange(3) != axis])
        cell[axis] = basis[-1]
    heights = 1 / np.linalg.norm(np.linalg.pinv(cell), axis=0)
    reach = np.linalg.norm(vectors, axis=1).max() + cutoff
    counts = np.where(along, np.minimum(np.ceil(reach / np.maximum(heights, 1e-6)), MOST_IMAGES), 0).astype(int)
    grids = np.meshgrid(*(np.arange(-n, n + 1) for n in counts), indexing="ij")
    return np.stack(grids, axis=-1).reshape(-1, 3) @ np.where(along[:, None], cell, 0.0)


def picture(data: ReportData, row: int) -> str:
    """Inline SVG; '' where positions or the cutoff are not known."""
    if data.positions is None or not data.cutoff or not np.isfinite(data.positions[row]).all():
        return ""
    vectors, species = neighbours(data, row)
    if not len(vectors):
        return ""
    colours = species_colours(data.elements)
    seen = vectors @ TURN.T
    scale = 0.45 * SIZE / data.cutoff
    places = np.round(SIZE / 2 + scale * seen[:, :2] * [1, -1], 1)
    depth = 0.5 - 0.5 * seen[:, 2] / data.cutoff  # 0 = near, 1 = far
    parts = [(seen[k, 2], _atom(places[k], species[k], depth[k], scale, colours, k == 0)) for k in range(len(seen))]
    parts += _bonds(vectors, species, places, seen, depth)
    drawn = "".join(text for _, text in sorted(parts, key=lambda part: part[0]))
    drawn += f'<circle cx="{places[0, 0]}" cy="{places[0, 1]}" r="9" fill="none" stroke="{RING}" stroke-width="2.2"/>'
    name = chemical_symbol(int(data.species[row]))
    label = escape(f"{name} atom with {len(vectors) - 1} neighbours within {data.cutoff:.1f} Å", quote=True)
    ring = f'<circle cx="{SIZE / 2:.0f}" cy="{SIZE / 2:.0f}" r="{scale * data.cutoff:.1f}" class="cut"/>'
    return f'<svg class="hood" viewBox="0 0 {SIZE} {SIZE}" role="img" aria-label="{label}">{ring}{drawn}</svg>'


def _atom(place: np.ndarray, z: int, depth: float, scale: float, colours: dict[int, str], centre: bool) -> str:
    size = max(2.0, 0.55 * radius(int(z)) * scale * (1.15 - 0.3 * depth))
    fill = mix(colours[int(z)], "#ffffff", 0.0 if centre else 0.72 * depth)
    edge = mix(INK, "#ffffff", 0.0 if centre else 0.25 + 0.6 * depth)
    # what hides the centre is seen through
    veil = ' opacity=".5"' if depth < 0.5 and not centre and np.hypot(*(place - SIZE / 2)) < size + 7 else ""
    return f'<circle cx="{place[0]}" cy="{place[1]}" r="{size:.1f}" fill="{fill}" stroke="{edge}" stroke-width=".7"{veil}/>'


def _bonds(
    vectors: np.ndarray, species: np.ndarray, places: np.ndarray, seen: np.ndarray, depth: np.ndarray
) -> list[tuple[float, str]]:
    """(depth, line) of the pairs that are near enough to be bonded."""
    radii = np.array([radius(int(z)) for z in species])
    distance = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
    first, second = np.nonzero(np.triu(distance < BOND * (radii[:, None] + radii[None]), 1))
    found = []
    for a, b in zip(first[:160], second[:160], strict=True):
        shade = mix(INK, "#ffffff", 0.35 + 0.55 * float(depth[a] + depth[b]) / 2)
        line = f'x1="{places[a, 0]}" y1="{places[a, 1]}" x2="{places[b, 0]}" y2="{places[b, 1]}"'
        found.append((float(min(seen[a, 2], seen[b, 2])) - 1e-6, f'<line {line} stroke="{shade}"/>'))
    return found
