"""Atoms on top of one another, which no calculation describes and no fit accepts."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from gpmlp.core import cell_list
from gpmlp.core.findings import Finding
from gpmlp.core.neighbors import CLOSEST, collapsed_cells
from gpmlp.core.structures import Structures

FEW = 100  # atoms of a structure all of whose pairs are compared; of more, neighbours are searched
PAIRS = 1 << 20  # that are in memory together


def check_coincident(structures: Structures) -> list[Finding]:
    """An error for all structures with atoms closer than CLOSEST."""
    found: dict[int, tuple[float, int, int]] = {}
    boxes = cell_list.complete_cells(structures.cells.double(), structures.periodic)
    collapsed = collapsed_cells(boxes, structures.periodic) | (_shortest_vectors(boxes, structures.periodic) < CLOSEST)
    whole = (~collapsed).nonzero().flatten()
    for count in structures.counts[whole].unique().tolist():
        members = whole[structures.counts[whole] == count]
        rows = 1 if count > FEW else max(1, PAIRS // count**2)
        for part in members.split(rows):
            here = _searched(structures, part) if count > FEW else _compared(structures, part)
            for s, i, j, distance in zip(*(column.tolist() for column in here), strict=True):
                found[s] = min(found.get(s, (distance, i, j)), (distance, i, j))
    out = []
    if collapsed.any():
        names = tuple(structures.names[s] for s in collapsed.nonzero().flatten().tolist())
        text = (
            f"an atom and its own image are closer than {CLOSEST} A, or the cell is almost flat, which a fit refuses."
        )
        out.append(
            Finding(
                "coincident-atoms",
                "error",
                text,
                names,
                {"frames": float(len(names))},
                "Correct the cell or its unit (A).",
            )
        )
    if not found:
        return out
    worst = min(found, key=lambda s: found[s])
    distance, i, j = found[worst]
    text = (
        f"atoms {min(i, j)} and {max(i, j)} are {distance:.3f} A apart (closer than {CLOSEST} A), which a fit refuses"
    )
    text += f"; so are atoms of {len(found) - 1} more frames." if len(found) > 1 else "."
    names = tuple(structures.names[s] for s in (worst, *(s for s in found if s != worst)))
    numbers = {"distance_A": distance, "frames": float(len(found))}
    return [
        *out,
        Finding("coincident-atoms", "error", text, names, numbers, "Correct the positions or remove the frame."),
    ]


def _shortest_vectors(boxes: Tensor, periodic: Tensor) -> Tensor:
    """(structures,) length of the shortest lattice vector to a neighbouring cell, A; infinite where nothing is periodic."""
    steps = torch.tensor([h for h in itertools.product((-1, 0, 1), repeat=3) if h > (0, 0, 0)], dtype=boxes.dtype)
    lengths = torch.einsum("ha,sab->shb", steps, boxes).norm(dim=2)
    along = ((steps != 0)[None] & ~periodic[:, None]).any(2)
    return lengths.masked_fill(along, torch.inf).amin(1)


def _compared(structures: Structures, members: Tensor) -> tuple[Tensor, ...]:
    """Structure, two atoms of it and their distance, of close pairs, in structures with as many atoms each.

    Differences are taken to the nearest lattice vector in each fractional coordinate, which is right for atoms that are that close. Most
    pairs are too far apart along one axis alone, that of the highest cell.
    """
    count = int(structures.counts[members[0]])
    first, second = torch.triu_indices(count, count, 1)
    rows = structures.offsets[members][:, None] + torch.arange(count)
    periodic = structures.periodic[members]
    cells = cell_list.complete_cells(structures.cells[members].double(), periodic)
    inverse = torch.linalg.inv(cells)
    fractions = structures.positions[rows].double() @ inverse
    heights, axis = (1 / inverse.norm(dim=1)).max(1)
    along = fractions.gather(2, axis[:, None, None].expand(-1, count, 1))[:, :, 0]
    step = along[:, first] - along[:, second]
    step = step - torch.where(periodic.gather(1, axis[:, None]), step.round(), 0.0)
    s, pair = (step.abs() * heights[:, None] < CLOSEST).nonzero(as_tuple=True)
    steps = fractions[s, first[pair]] - fractions[s, second[pair]]
    steps = steps - torch.where(periodic[s], steps.round(), 0.0)
    distances = torch.einsum("na,nab->nb", steps, cells[s]).norm(dim=1)
    close = distances < CLOSEST
    s, pair = s[close], pair[close]
    return members[s], first[pair], second[pair], distances[close]


def _searched(structures: Structures, members: Tensor) -> tuple[Tensor, ...]:
    """The same of one structure, by a cell list."""
    one = structures.select(members)
    boxes = cell_list.complete_cells(one.cells.double(), one.periodic)
    i, j, _, distances = cell_list.find_pairs(
        one.positions.double(), boxes, one.periodic, one.structure_of_atom, CLOSEST
    )
    return members.expand(len(i)), i, j, distances
