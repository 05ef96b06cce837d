"""Neighbour lists as tables of fixed width: no shape depends on positions, and nothing is summed by index."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gpmlp.core.neighbors import Neighbors, lexicographic_order
from gpmlp.core.structures import Structures, rank_in_group

WIDTH = 32  # rows that are summed at a time
MULTIPLE = 8  # of which widths are: a new search then seldom changes a shape


@dataclass(frozen=True, eq=False)
class PaddedNeighbors:
    """Neighbours of each atom, grouped by species; places without a neighbour are not `real`.

    Attributes:
        rows: (atoms,) the atom that each row is of.
        structure: (atoms,) index of the structure of each row.
        neighbors: (atoms, slots, width) atom index; shifts: (atoms, slots, width, 3) lattice shifts of it, int32.
        real: (atoms, slots, width) whether there is a neighbour.
        reverse: (atoms, slots, width) place in the flat table of the pair from neighbour to centre; of itself where there is none.
        beyond: A, no less than the cutoff: coordinates of vectors that lead nowhere.
    """

    rows: Tensor
    structure: Tensor
    neighbors: Tensor
    shifts: Tensor
    real: Tensor
    reverse: Tensor
    beyond: float

    @property
    def width(self) -> int:
        """Places for neighbours of one species."""
        return self.neighbors.shape[2]

    @staticmethod
    def from_neighbors(
        pairs: Neighbors, structures: Structures, rows: Tensor, slots: Tensor, n_slots: int, width: int = 0
    ) -> PaddedNeighbors:
        """The table of a full list.

        Args:
            rows: (atoms,) every atom, in the order in which rows are wanted.
            slots: (atoms,) which of n_slots species each atom is of.
            width: at least.
        """
        n, device = len(rows), rows.device
        row_of = torch.empty_like(rows).index_copy_(0, rows, torch.arange(n, device=device))
        groups = row_of[pairs.centers] * n_slots + slots[pairs.neighbors]
        place, width = padded_places(groups, n * n_slots, width, MULTIPLE)
        size = n * n_slots * width
        neighbors = rows[:, None].expand(-1, n_slots * width).flatten().index_copy(0, place, pairs.neighbors)
        shifts = torch.zeros(size, 3, dtype=torch.int32, device=device).index_copy_(0, place, pairs.shifts.int())
        real = torch.zeros(size, dtype=torch.bool, device=device).index_fill_(0, place, True)
        # sorted by neighbour and by centre, the k-th pairs are each other's reverse
        forth = lexicographic_order(pairs.centers, pairs.neighbors, pairs.shifts)
        back = lexicographic_order(pairs.neighbors, pairs.centers, -pairs.shifts)
        reverse = torch.arange(size, device=device).index_copy_(0, place[forth], place[back])
        shape = (n, n_slots, width)
        neighbors, shifts, real, reverse = (part.unflatten(0, shape) for part in (neighbors, shifts, real, reverse))
        structure = structures.structure_of_atom[rows]
        return PaddedNeighbors(rows, structure, neighbors, shifts, real, reverse, pairs.cutoff)

    def copy_from(self, other: PaddedNeighbors) -> bool:
        """Copy the pairs of another table of the same atoms into the memory of this one (recorded graphs use it), if they fit."""
        if other.neighbors.shape != self.neighbors.shape:
            return False
        for name in (f.name for f in fields(self) if f.name != "beyond"):
            getattr(self, name).copy_(getattr(other, name))
        return True

    def vectors(self, positions: Tensor, cells: Tensor, start: int, end: int) -> Tensor:
        """(rows, slots, width, 3) r_ij of the rows start to end, A."""
        here = slice(start, end)
        shifts = self.shifts[here].to(cells.dtype)
        if len(cells) == 1:
            moved = shifts @ cells[0]
        else:
            moved = (shifts.flatten(1, 2) @ cells[self.structure[here]]).unflatten(1, shifts.shape[1:3])
        out = moved.add_(positions[self.neighbors[here]]).sub_(positions[self.rows[here]][:, None, None])
        return out.masked_fill_(~self.real[here][..., None], self.beyond)

    def forces(self, pair_gradients: Tensor, start: int, end: int) -> Tensor:
        """(rows, 3) F_i = Σ_j (g_ij − g_ji), eV/A: terms are gathered, not scattered, so that sums have one order.

        Args:
            pair_gradients: (atoms, slots, width, 3) g_ij = dE/dr_ij of the whole table, zero where there is no neighbour.
        """
        here = slice(start, end)
        return (pair_gradients[here] - pair_gradients.flatten(0, 2)[self.reverse[here]]).sum((1, 2))


@dataclass(frozen=True, eq=False)
class SegmentSums:
    """Sums over the rows of each segment, in one order on any device: rows are gathered WIDTH at a time, not added by index.

    Attributes:
        levels: (sums, WIDTH) rows that each sum is of, one past the last where there are no more; then the same for these sums, until
            there is one for each segment.
    """

    levels: tuple[Tensor, ...]

    @staticmethod
    def from_segments(segment: Tensor, n_segments: int) -> SegmentSums:
        """For rows of these segments, in any order."""
        levels: list[Tensor] = []
        while not levels or len(levels[-1]) > n_segments:
            rank, counts = rank_in_group(segment, n_segments)
            blocks = ((counts + WIDTH - 1) // WIDTH).clamp_min(1)  # an empty segment is a sum of nothing
            place = (blocks.cumsum(0) - blocks)[segment] * WIDTH + rank
            index = torch.full((int(blocks.sum()) * WIDTH,), len(segment), device=segment.device)
            rows = torch.arange(len(segment), device=segment.device)
            levels.append(index.index_copy_(0, place, rows).unflatten(0, (-1, WIDTH)))
            segment = torch.repeat_interleave(torch.arange(n_segments, device=segment.device), blocks)
        return SegmentSums(tuple(levels))

    def __call__(self, rows: Tensor) -> Tensor:
        """(segments, ...) from (rows, ...)."""
        for index in self.levels:
            rows = torch.cat([rows, torch.zeros_like(rows[:1])])[index].sum(1)
        return rows


def padded_places(groups: Tensor, n_groups: int, width: int = 1, multiple: int = 1) -> tuple[Tensor, int]:
    """Places of members in a table of (groups, width), in their order, and the width: that of the largest group, or more."""
    rank, counts = rank_in_group(groups, n_groups)
    widest = int(counts.max()) if n_groups else 0
    width = multiple * -(-max(widest, width, 1) // multiple)
    return groups * width + rank, width
