"""Skin remembers the neighbours of atoms that move little from call to call, and knows when they have to be searched again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpmlp.core import cell_list, errors, neighbors, parallel
from gpmlp.core.neighbors import Neighbors
from gpmlp.core.structures import Structures

HAIR = 1e-6  # A that is always searched beyond the cutoff: which pairs lie within it is decided in one place
CALLS = 3  # that a skin should last for at the pace of the last calls: else a search without it is cheaper


@dataclass(frozen=True, eq=False)
class ReferencePositions:
    """Where atoms and cells were when neighbours were searched, and how far they may go until pairs can be missing.

    A pair vector is r' = r F + (u_j − u_i), with F = h⁻¹ h' the strain of the cell and u what an atom moved beyond it. A pair that was
    farther than cutoff + skin is now farther than (cutoff + skin)(1 − ‖F − 1‖) − 2 max |u|, so that none is missing as long as
    2 |u| + (cutoff + skin) ‖F − 1‖ stays below the skin.
    """

    positions: Tensor
    boxes: Tensor
    inverse: Tensor
    reach: float

    @staticmethod
    def from_structures(structures: Structures, reach: float) -> ReferencePositions:
        """Of structures whose pairs within `reach` (A) were searched."""
        boxes = cell_list.complete_cells(structures.cells, structures.periodic)
        return ReferencePositions(structures.positions.clone(), boxes.clone(), torch.linalg.inv(boxes), reach)

    def displacement(self, structures: Structures, positions: Tensor, now: Tensor) -> Tensor:
        """(atoms,) 2 |u| + reach ‖F − 1‖ of atoms at other positions in cells `now`, A; nothing is asked of the host."""
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
        """Take over another one of the same atoms, in the memory of this one; or only that of some structures and their atoms."""
        for name, some in {"positions": atoms, "boxes": which, "inverse": which}.items():
            mine, theirs = getattr(self, name), getattr(other, name)
            mine.copy_(theirs) if some is None else mine.index_copy_(0, some, theirs)


class VerletList:
    """All pairs within a cutoff of a batch whose atoms move little from call to call (Verlet, Phys. Rev. 159, 98 (1967)).

    Pairs of a structure are searched for a `skin` beyond the cutoff, and again when its atoms and its cell have gone farther than that
    allows (Reference). Where a skin would not last for CALLS calls at the pace of the last ones, or that is not known yet, as in the
    first call, it is left out. What is returned does not depend on when was searched: pairs come in the order of atoms and shifts.
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
            UserError: as neighbors.find.
        """
        with parallel.one_core():
            if self._reference is None or not self._known(structures):
                self._begin(structures)
            else:
                self._calls += 1
                gone = self._gone(structures)
                due = ~(gone < self._room)  # nor where it is no number
                if due.any():
                    self._search(structures, due, gone * CALLS < self.skin * self._calls)
            found, closest = self._pairs.closer_than(structures, self.cutoff)
            if closest < neighbors.CLOSEST:
                neighbors.find_neighbors(structures, self.cutoff)  # which says what is wrong
            return found

    def _known(self, now: Structures) -> bool:
        """Whether these are the atoms of the last call, in the same precision."""
        both = (now.positions, self._reference.positions), (now.cells, self._cells)
        if any(a.dtype != b.dtype or a.device != b.device for a, b in both):
            return False
        here = now.species, now.structure_of_atom, now.periodic
        return all(a is b or a.shape == b.shape and torch.equal(a, b) for a, b in zip(self._atoms, here, strict=True))

    def _begin(self, structures: Structures) -> None:
        """Other atoms: nothing is known of how they move."""
        self._reference = None
        every = torch.ones_like(structures.periodic[:, 0])
        self._pairs = Neighbors.empty(structures)
        self._room, self._calls = (structures.cells.new_zeros(len(structures)) for _ in range(2))
        self._search(structures, every, ~every)
        reference = ReferencePositions.from_structures(structures, self.cutoff + self.skin)
        self._atoms = structures.species, structures.structure_of_atom, structures.periodic
        self._cells, self._reference = structures.cells.clone(), reference

    def _gone(self, now: Structures) -> Tensor:
        """(structures,) how far each has gone since it was searched, A."""
        then = self._reference
        if now.positions.device.type == "cpu" and torch.equal(now.cells, self._cells):
            far = 2 * (now.positions - then.positions).square().sum(1).sqrt()
        else:
            far = then.displacement(now, now.positions, now.cells)
        if len(now) == 1 and len(far):
            return far.amax(0, keepdim=True)
        return far.new_zeros(len(now)).scatter_reduce_(0, now.structure_of_atom, far, "amax")

    def _search(self, structures: Structures, due: Tensor, lasting: Tensor) -> None:
        """Search the structures that are due, with a skin where it is lasting."""
        parts, of_pair = [], structures.structure_of_atom[self._pairs.centers]
        reference, self._reference = self._reference, None  # should a search fail
        if not due.all():
            kept = (~due[of_pair]).nonzero()[:, 0]
            parts.append(tuple(getattr(self._pairs, name)[kept] for name in ("centers", "neighbors", "shifts")))
        for which, room in ((due & lasting, self.skin), (due & ~lasting, 0.0)):
            if not which.any():
                continue
            numbers = which.nonzero()[:, 0]
            atoms = which[structures.structure_of_atom].nonzero()[:, 0]
            some = structures.select(numbers)  # which looks at positions and cells
            found = neighbors.find_neighbors(some, self.cutoff + max(room, HAIR))
            found = found if some.positions.device.type == "cpu" else found.sorted()
            parts.append((atoms[found.centers], atoms[found.neighbors], found.shifts))
            self._room[numbers], self._calls[numbers] = room, 0
            self.searched += len(numbers)
            if reference is not None:
                reference.copy_from(ReferencePositions.from_structures(some, reference.reach), numbers, atoms)
                self._cells[numbers] = some.cells
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        if len(parts) > 1:
            order = columns[0].argsort(stable=True)
            columns = [column[order] for column in columns]
        self._pairs, self._reference = Neighbors(*columns, self.cutoff + HAIR), reference
