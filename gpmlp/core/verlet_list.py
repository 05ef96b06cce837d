"""Verlet lists: the neighbours of atoms that move little from call to call, searched again only when a pair may be missing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpmlp.core import cell_list, errors, neighbors, parallel
from gpmlp.core.neighbors import Neighbors
from gpmlp.core.structures import Structures
from gpmlp.native import library

HAIR = 1e-6  # A, at least, beyond the cutoff in a search: `within` alone decides which pairs lie within the cutoff
CALLS = 3  # for which a skin should last at the pace of the last calls: else a search without it is cheaper


@dataclass(frozen=True, eq=False)
class ReferencePositions:
    """Positions and cells of the last search of neighbours within `reach` = cutoff + skin.

    A pair vector is r' = r F + (u_j − u_i), with F = h⁻¹ h' the strain of the cell and u what an atom moved beyond it. A pair that was
    farther than `reach` is now farther than reach (1 − ‖F − 1‖) − 2 max |u|: none is missing while 2 |u| + reach ‖F − 1‖ < skin.
    """

    positions: Tensor
    boxes: Tensor
    inverse: Tensor
    reach: float

    @staticmethod
    def from_structures(structures: Structures, reach: float) -> ReferencePositions:
        """Of structures whose pairs within `reach` (A) were searched."""
        boxes = cell_list.complete_cells(structures.cells, structures.periodic)
        positions = structures.positions.clone(memory_format=torch.contiguous_format)
        return ReferencePositions(positions, boxes.clone(), torch.linalg.inv(boxes), reach)

    def displacement(self, structures: Structures, positions: Tensor, now: Tensor) -> Tensor:
        """(atoms,) 2 |u| + reach ‖F − 1‖ of atoms at other positions in cells `now`, A; no host synchronisation."""
        boxes = torch.where(structures.periodic[:, :, None], now, self.boxes)
        strain = self.inverse @ boxes
        if len(strain) == 1:
            carried = self.positions @ strain[0]
        else:
            carried = (self.positions[:, :, None] * strain[structures.structure_of_atom]).sum(1)
        eye = torch.eye(3, dtype=strain.dtype, device=strain.device)
        sheared = (strain - eye).square().sum((1, 2)).sqrt()
        return 2 * (positions - carried).square().sum(1).sqrt() + self.reach * sheared[structures.structure_of_atom]

    def copy_from(self, other: ReferencePositions, which: Tensor | None = None, atoms: Tensor | None = None) -> None:
        """Copy another one of the same atoms into the memory of this one; or only that of some structures and their atoms."""
        for name, rows in {"positions": atoms, "boxes": which, "inverse": which}.items():
            target, source = getattr(self, name), getattr(other, name)
            target.copy_(source) if rows is None else target.index_copy_(0, rows, source)


class VerletList:
    """All pairs within a cutoff of a batch whose atoms move little from call to call (Verlet, Phys. Rev. 159, 98 (1967)).

    Pairs of a structure are searched for a `skin` beyond the cutoff, and again when its atoms and its cell have gone farther than that
    allows (ReferencePositions). A skin that would not last for CALLS calls at the pace of the last ones is left out, as in the first
    call. What is returned does not depend on when was searched: pairs come in the order of atoms and shifts.
    """

    def __init__(self, cutoff: float, skin: float = 0.6) -> None:
        """Cutoff and skin in A; without a skin each call searches.

        Raises:
            UserError: a skin that is negative or no number.
        """
        errors.check_positive("skin", skin, allow_zero=True)
        self.cutoff, self.skin = cutoff, skin
        self.searched = 0  # structures so far
        self._atoms: tuple[Tensor, ...] = ()
        self._reference: ReferencePositions | None = None

    def __call__(self, structures: Structures) -> Neighbors:
        """All pairs of these structures within the cutoff.

        Raises:
            UserError: as neighbors.find_neighbors.
        """
        return self.candidates(structures).within(structures, self.cutoff)

    def candidates(self, structures: Structures) -> Neighbors:
        """All pairs within the cutoff and some beyond, which stay the same object until the next search: who skips what is too far
        anyway, as Potential does, is spared their selection.

        Raises:
            UserError: as neighbors.find_neighbors.
        """
        with parallel.one_core():
            reference = self._reference
            if reference is None or not self._same_atoms(structures, reference):
                self._begin(structures)
            else:
                self._calls += 1
                moved = self._displacements(structures, reference)
                lasts = moved < self._room  # not where it is no number
                if not lasts.all():
                    self._search(structures, ~lasts, moved * CALLS < self.skin * self._calls, reference)
            if self._pairs.closest(structures) < neighbors.CLOSEST:
                neighbors.find_neighbors(structures, self.cutoff)  # which says what is wrong
            return self._pairs

    def moves(self, structures: Structures) -> tuple[Tensor, Tensor, Tensor] | None:
        """Positions in which was searched (atoms, 3), how far twice the way of an atom of each structure may be (structures,), A, and how
        many calls there were since (structures,): for who finds out himself whether to search, and counts, while cells stay as they are.
        None where those of `structures`, of the last call, are not those of the search: their strain has used up a part of that way."""
        assert self._reference is not None
        if not torch.equal(structures.cells, self._cells):
            return None
        return self._reference.positions, self._room, self._calls

    def _same_atoms(self, now: Structures, reference: ReferencePositions) -> bool:
        """Whether these are the atoms of the last call, in the same precision."""
        both = (now.positions, reference.positions), (now.cells, self._cells)
        if any(a.dtype != b.dtype or a.device != b.device for a, b in both):
            return False
        here = now.species, now.structure_of_atom, now.periodic
        return all(a is b or a.shape == b.shape and torch.equal(a, b) for a, b in zip(self._atoms, here, strict=True))

    def _begin(self, structures: Structures) -> None:
        """Search all, without a skin: the pace of these atoms is unknown."""
        every = torch.ones_like(structures.periodic[:, 0])
        self._pairs = Neighbors.empty(structures)
        self._room, self._calls = (structures.cells.new_zeros(len(structures)) for _ in range(2))
        self._search(structures, every, ~every, None)
        self._atoms = structures.species, structures.structure_of_atom, structures.periodic
        self._cells = structures.cells.clone()
        self._reference = ReferencePositions.from_structures(structures, self.cutoff + self.skin)

    def _displacements(self, now: Structures, reference: ReferencePositions) -> Tensor:
        """(structures,) the largest of each since it was searched, A."""
        positions = now.positions.contiguous()
        if neighbors.fits_compiled_loops(positions) and torch.equal(now.cells, self._cells):
            owner, moved = now.structure_of_atom.contiguous(), torch.empty_like(self._room)
            library.call("displacements", len(positions), owner, positions, reference.positions, len(moved), moved)
            return 2 * moved
        by_atom = reference.displacement(now, positions, now.cells)
        return by_atom.new_zeros(len(now)).scatter_reduce_(0, now.structure_of_atom, by_atom, "amax")

    def _search(
        self, structures: Structures, due: Tensor, lasting: Tensor, reference: ReferencePositions | None
    ) -> None:
        """Search the structures that are due, with a skin where it is lasting."""
        self._reference = None  # should a search fail
        parts = []
        if not due.all():
            stay = (~due[structures.structure_of_atom[self._pairs.centers]]).nonzero()[:, 0]
            parts.append((self._pairs.centers[stay], self._pairs.neighbors[stay], self._pairs.shifts[stay]))
        for which, room in ((due & lasting, self.skin), (due & ~lasting, 0.0)):
            if not which.any():
                continue
            numbers = which.nonzero()[:, 0]
            atoms = which[structures.structure_of_atom].nonzero()[:, 0]
            part = structures.select(numbers)  # which checks positions and cells
            pairs = neighbors.find_neighbors(part, self.cutoff + max(room, HAIR))
            pairs = pairs if part.positions.device.type == "cpu" else pairs.sorted()
            parts.append((atoms[pairs.centers], atoms[pairs.neighbors], pairs.shifts))
            self._room[numbers], self._calls[numbers] = room, 0
            self.searched += len(numbers)
            if reference is not None:
                reference.copy_from(ReferencePositions.from_structures(part, reference.reach), numbers, atoms)
                self._cells[numbers] = part.cells
        centers, others, shifts = (torch.cat(column) for column in zip(*parts, strict=True))
        if len(parts) > 1:
            order = centers.argsort(stable=True)
            centers, others, shifts = centers[order], others[order], shifts[order]
        self._pairs, self._reference = Neighbors(centers, others, shifts, self.cutoff + HAIR), reference
