"""Cell lists: pairs within a cutoff by sorting atoms into bins, in PyTorch alone, on any device and without leaving it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gpmlp.core.structures import repeat_with_rank

ROWS = 1 << 20  # (atom, bin) rows whose candidates are in memory together
FARTHEST = 1 << 30  # cells from the origin, of which other searches count in 32 bits
MOST_BINS = 1 << 16  # along an axis: a few atoms far apart need no finer grid, and keys stay in 64 bits


def complete_cells(cells: Tensor, periodic: Tensor) -> Tensor:
    """(structures, 3, 3) cells whose axes that are not periodic are unit vectors, normal to each other and to the periodic ones."""
    if periodic.all():
        return cells
    along = torch.where(periodic[:, :, None], cells, 0.0)
    directions = torch.linalg.svd(along).Vh  # the last ones are those that no periodic axis has a part in
    free = ~periodic
    number = free.long().cumsum(1) - 1 + periodic.sum(1, keepdim=True)
    normal = directions.gather(1, number.clamp_min(0)[:, :, None].expand(-1, -1, 3))
    return torch.where(free[:, :, None], normal, cells)


@dataclass(frozen=True, eq=False)
class CellList:
    """Atoms of a batch of structures in bins at least as wide as the cutoff, or in one bin where the cell is narrower than that.

    Attributes:
        positions: (atoms, 3) within the box along periodic axes, A; wraps: (atoms, 3) lattice vectors taken off for that.
        boxes: (structures, 3, 3) A; periodic: (structures, 3).
        structure: (atoms,) index of the structure.
        sides: (structures, 3) number of bins along each axis; reach: (structures, 3) bins to search on either side.
        places: (atoms, 3) bin of each atom.
        first: (structures,) number of the first bin of each structure.
        keys: (atoms,) number of the bin, sorted; atoms: (atoms,) in that order.
    """

    positions: Tensor
    wraps: Tensor
    boxes: Tensor
    periodic: Tensor
    structure: Tensor
    sides: Tensor
    reach: Tensor
    places: Tensor
    first: Tensor
    keys: Tensor
    atoms: Tensor

    @staticmethod
    def from_positions(
        positions: Tensor, boxes: Tensor, periodic: Tensor, structure: Tensor, cutoff: float
    ) -> CellList:
        """Sort the atoms."""
        fractions, low, high, heights = _fractions(positions, boxes, structure)
        wraps = torch.where(periodic[structure], fractions.floor(), 0.0)
        fractions = fractions - wraps
        low, high = torch.where(periodic, 0.0, low), torch.where(periodic, 1.0, high)
        extent = (high - low) * heights
        sides = (extent / cutoff).floor().clamp(1, MOST_BINS).long()
        # a hair more than the cutoff: a pair must not be lost to the rounding of a fraction
        reach = (cutoff * (1 + 1e-12) * sides / extent.clamp_min(1e-9 * cutoff)).ceil().long()
        reach = torch.where(periodic, reach, torch.minimum(reach, sides - 1))
        scaled = (fractions - low[structure]) / (high - low).clamp_min(1e-300)[structure] * sides[structure]
        places = torch.minimum(scaled.floor().long().clamp_min(0), sides[structure] - 1)
        counts = sides.prod(1)
        first = counts.cumsum(0) - counts
        keys, atoms = _number(places, sides[structure], first[structure]).sort()
        moved = positions - torch.einsum("na,nab->nb", wraps, boxes[structure])
        return CellList(moved, wraps, boxes, periodic, structure, sides, reach, places, first, keys, atoms)

    def pairs(self, start: int, end: int, cutoff: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pairs of the atoms start to end as centres, in their order: i, j, shifts (pairs, 3), distances."""
        width = 2 * self.reach[self.structure[start:end]] + 1
        counts = width.prod(1)
        atom, rank = repeat_with_rank(counts)
        atom, around = atom + start, width[atom]
        steps = torch.stack(
            [rank // (around[:, 1] * around[:, 2]), rank // around[:, 2] % around[:, 1], rank % around[:, 2]], 1
        )
        structure = self.structure[atom]
        sides, periodic = self.sides[structure], self.periodic[structure]
        place = self.places[atom] + steps - self.reach[structure]
        images = torch.where(periodic, place.div(sides, rounding_mode="floor"), 0)
        place = place - images * sides
        inside = ((place >= 0) & (place < sides)).all(1)
        key = _number(place, sides, self.first[structure])
        begin, stop = torch.searchsorted(self.keys, key), torch.searchsorted(self.keys, key, right=True)
        row, rank = repeat_with_rank(torch.where(inside, stop - begin, 0))
        i, j = atom[row], self.atoms[begin[row] + rank]
        offsets = torch.einsum("na,nab->nb", images.to(self.boxes.dtype), self.boxes[structure]) - self.positions[atom]
        distance = (self.positions[j] + offsets[row]).norm(dim=1)
        itself = (i == j) & (images == 0).all(1)[row]
        close = ((distance < cutoff) & ~itself).nonzero()[:, 0]
        i, j, distance = i[close], j[close], distance[close]
        return i, j, images[row[close]] + (self.wraps[i] - self.wraps[j]).long(), distance

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Consecutive atoms with about ROWS bins to search."""
        ends = (2 * self.reach + 1).prod(1)[self.structure].cumsum(0)
        start, n = 0, len(ends)
        marks = torch.arange(1, int(ends[-1]) // ROWS + 1 if n else 1, device=ends.device) * ROWS
        for end in [*torch.searchsorted(ends, marks, right=True).tolist(), n]:
            if end > start:
                yield start, end
                start = end


def _fractions(positions: Tensor, boxes: Tensor, structure: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(atoms, 3) coordinates in the boxes, least and largest of each structure (0 and 1 without atoms), heights of the boxes, A."""
    inverse = torch.linalg.inv(boxes)
    fractions = torch.einsum("na,nab->nb", positions, inverse[structure])
    index = structure[:, None].expand(-1, 3)
    low, high = (
        torch.full_like(boxes[:, 0], edge).scatter_reduce(0, index, fractions, how, include_self=False)
        for edge, how in ((0.0, "amin"), (1.0, "amax"))
    )
    return fractions, low, high, 1 / inverse.norm(dim=1)  # between opposite faces


def count_bins(positions: Tensor, boxes: Tensor, periodic: Tensor, structure: Tensor, cutoff: float) -> Tensor:
    """(structures, 3) number of bins as wide as the cutoff that cover the cell or, where an axis is not periodic, the atoms, as floats.

    Infinite where an atom is so many cells away that their number is none of 32 bits.
    """
    _, low, high, heights = _fractions(positions, boxes, structure)
    bins = (torch.where(periodic, 1.0, high - low) * heights / cutoff).ceil().clamp_min(1)
    return torch.where(periodic & (torch.maximum(-low, high) > FARTHEST), math.inf, bins)


def find_pairs(
    positions: Tensor, boxes: Tensor, periodic: Tensor, structure: Tensor, cutoff: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All pairs of a batch within the cutoff, in both directions, sorted by centre.

    Args:
        positions: (atoms, 3) A, float64; boxes: (structures, 3, 3), of `boxes`; periodic: (structures, 3).
        structure: (atoms,) index of the structure of each atom.
        cutoff: A.

    Returns:
        centres i and neighbours j (pairs,), lattice shifts of j (pairs, 3), distances (pairs,).

    The cell lists of Quentrec, Brot, J. Comput. Phys. 13, 430 (1973), with as many images of a bin as a narrow cell needs.
    """
    if not len(positions):
        none = structure.new_zeros(0)
        return none, none, none.new_zeros(0, 3), positions.new_zeros(0)
    bins = CellList.from_positions(positions, boxes, periodic, structure, cutoff)
    parts = [bins.pairs(start, end, cutoff) for start, end in bins.blocks()]
    i, j, shifts, distances = (torch.cat(column) for column in zip(*parts, strict=True))
    return i, j, shifts, distances


def _number(place: Tensor, sides: Tensor, first: Tensor) -> Tensor:
    return first + (place[:, 0] * sides[:, 1] + place[:, 1]) * sides[:, 2] + place[:, 2]
