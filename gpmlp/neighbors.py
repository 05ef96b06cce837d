"""Neighbors says who sees whom: pairs within a cutoff, their vectors, and the scatters pair gradient -> forces and virial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
import vesin
from torch import Tensor

from gpmlp import cells
from gpmlp.checks import UserError
from gpmlp.quantities import Prediction
from gpmlp.structures import Structures

CLOSEST = 0.3  # A; nearer pairs are taken for an error in the data


@dataclass(frozen=True, eq=False)
class Neighbors:
    """A full neighbour list (every pair in both directions), sorted by centre.

    Attributes:
        centers: (pairs,) atom index i.
        neighbors: (pairs,) atom index j.
        shifts: (pairs, 3) integer lattice shifts of atom j.
        cutoff: A.
    """

    centers: Tensor
    neighbors: Tensor
    shifts: Tensor
    cutoff: float
    _last: tuple[Structures, Tensor] | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return self.centers.shape[0]

    def to(self, device: torch.device | str) -> Neighbors:
        """The same on another device."""
        return Neighbors(self.centers.to(device), self.neighbors.to(device), self.shifts.to(device), self.cutoff)

    @staticmethod
    def concatenate(parts: Sequence[Neighbors]) -> Neighbors:
        """Lists of the same cutoff, one after another; indices stay as they are."""
        joined = (torch.cat([getattr(p, name) for p in parts]) for name in ("centers", "neighbors", "shifts"))
        return Neighbors(*joined, parts[0].cutoff)

    @staticmethod
    def side_by_side(parts: Sequence[Neighbors], counts: Sequence[int]) -> Neighbors:
        """Lists of structures with so many atoms, as the list of a batch of them."""
        firsts = np.cumsum([0, *counts])[:-1].tolist()
        moved = [
            Neighbors(p.centers + n, p.neighbors + n, p.shifts, p.cutoff) for p, n in zip(parts, firsts, strict=True)
        ]
        return Neighbors.concatenate(moved)

    def between(self, start: int, end: int) -> Neighbors:
        """The pairs of the centres start to end, atoms counted from `start`: of structures that lie side by side in a batch."""
        edges = torch.searchsorted(self.centers, torch.tensor([start, end], device=self.centers.device)).tolist()
        here = slice(*edges)
        return Neighbors(self.centers[here] - start, self.neighbors[here] - start, self.shifts[here], self.cutoff)

    def sorted(self) -> Neighbors:
        """The same in the order of centres, neighbours and shifts."""
        order = arranged(self.centers, self.neighbors, self.shifts)
        return Neighbors(self.centers[order], self.neighbors[order], self.shifts[order], self.cutoff)

    def vectors(self, structures: Structures) -> Tensor:
        """(pairs, 3) r_ij = r_j + shift . cell - r_i, A; differentiable in positions and cells."""
        if self._last is not None and self._last[0] is structures:
            return self._last[1]
        if compilable(structures.positions, structures.cells):
            from gpmlp import pair_loops

            out = structures.positions.new_empty(len(self), 3)
            known = structures.positions, structures.cells, structures.structure_of_atom
            of_pairs = self.centers, self.neighbors, self.shifts
            pair_loops.vectors(*(part.detach().contiguous().numpy() for part in (*known, *of_pairs, out)))
        else:
            cells = structures.cells[structures.structure_of_atom[self.centers]]
            shift = torch.einsum("pa,pab->pb", self.shifts.to(cells.dtype), cells)
            out = structures.positions[self.neighbors] + shift - structures.positions[self.centers]
        # asked for by descriptors and baselines alike; never without its gradient
        if not (structures.positions.requires_grad or structures.cells.requires_grad):
            object.__setattr__(self, "_last", (structures, out))
        return out

    def within(self, structures: Structures, cutoff: float) -> Neighbors:
        """Return the pairs closer than a smaller cutoff, in the same order."""
        if cutoff == self.cutoff:
            return self
        if cutoff > self.cutoff:
            raise ValueError(f"a list of pairs within {self.cutoff} A does not hold those within {cutoff} A")
        keep = (self.vectors(structures).norm(dim=1) < cutoff).nonzero()[:, 0]
        return Neighbors(self.centers[keep], self.neighbors[keep], self.shifts[keep], cutoff)


def find(structures: Structures, cutoff: float) -> Neighbors:
    """Find all pairs within the cutoff; cells smaller than the cutoff, triclinic and left-handed cells included.

    By vesin on the CPU, by `cells` on any other device, where positions then stay.

    Raises:
        UserError: two atoms closer than 0.3 A, naming the structure and the atoms.
    """
    positions, box = structures.positions.detach().double(), structures.cells.detach().double()
    box = cells.boxes(box, structures.periodic)
    if positions.device.type == "cpu":
        i, j, shifts, distances = _by_vesin(structures, positions, box, cutoff)
    else:
        i, j, shifts, distances = cells.search(
            positions, box, structures.periodic, structures.structure_of_atom, cutoff
        )
    if len(distances) and distances.min() < CLOSEST:
        closest = int(distances.argmin())
        s = int(structures.structure_of_atom[i[closest]])
        first = int(structures.offsets[s])
        raise UserError(
            f"{structures.names[s]}: atoms {int(i[closest]) - first} and {int(j[closest]) - first} are "
            f"{distances[closest]:.3f} A apart (closer than {CLOSEST} A); "
            "check the positions, the cell and the unit (A) of this structure, or remove it."
        )
    return Neighbors(i, j, shifts, float(cutoff))


def _by_vesin(structures: Structures, positions: Tensor, boxes: Tensor, cutoff: float) -> tuple[Tensor, ...]:
    """i, j, shifts and distances as of cells.search, one structure after another."""
    offsets, periodic = structures.offsets.tolist(), structures.periodic.numpy()
    search = vesin.NeighborList(cutoff=float(cutoff), full_list=True, sorted=True, n_threads=torch.get_num_threads())
    found: list[tuple[np.ndarray, ...]] = [
        (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 3), np.int64), np.zeros(0))
    ]
    for s, (start, end) in enumerate(pairwise(offsets)):
        i, j, shift, distance = search.compute(
            positions[start:end].numpy(), boxes[s].numpy(), periodic[s], quantities="ijSd"
        )
        found.append((i.astype(np.int64) + start, j.astype(np.int64) + start, shift.astype(np.int64), distance))
    return tuple(torch.from_numpy(np.concatenate(part)) for part in zip(*found, strict=True))


class Skin:
    """Neighbours of atoms that move little from call to call: pairs are searched for a `skin` beyond the cutoff, and again only when
    an atom has moved by half of it, or the cell, the periodicity or the atoms are others (Verlet, Phys. Rev. 159, 98 (1967)).

    What is returned does not depend on when was searched: pairs come in the order of atoms and shifts.
    """

    def __init__(self, cutoff: float, skin: float = 0.6) -> None:
        """Cutoff and skin in A."""
        self.cutoff, self.skin = cutoff, skin
        self._of: Structures | None = None
        self._pairs: Neighbors | None = None

    def __call__(self, structures: Structures) -> Neighbors:
        """All pairs of one structure within the cutoff.

        Raises:
            UserError: as `find`.
        """
        if self._of is None or self._moved(structures):
            self._of, self._pairs = structures, find(structures, self.cutoff + self.skin).sorted()
        found = self._pairs
        r = found.vectors(structures).norm(dim=1)
        if len(r) and r.min() < CLOSEST:
            find(structures, self.cutoff)  # which says what is wrong
        keep = (r < self.cutoff).nonzero()[:, 0]
        return Neighbors(found.centers[keep], found.neighbors[keep], found.shifts[keep], self.cutoff)

    def _moved(self, now: Structures) -> bool:
        then = self._of
        if now.n_atoms != then.n_atoms or len(now) != 1 or not torch.equal(now.species, then.species):
            return True
        if not (torch.equal(now.cells, then.cells) and torch.equal(now.periodic, then.periodic)):
            return True
        moved = (now.positions - then.positions).square().sum(1).max()
        return not bool(moved < (0.5 * self.skin) ** 2)  # nor where it is no number


def arranged(centers: Tensor, neighbors: Tensor, shifts: Tensor) -> Tensor:
    """Indices that put pairs in the order of centres, neighbours and shifts."""
    if not len(centers):
        return centers
    low = shifts.amin(0)
    spans = (shifts.amax(0) - low + 1).to(centers.dtype)
    x, y, z = (shifts - low).to(centers.dtype).unbind(1)
    order = ((x * spans[1] + y) * spans[2] + z).argsort(stable=True)
    atoms = torch.maximum(centers.max(), neighbors.max()) + 1
    return order[(centers * atoms + neighbors)[order].argsort(stable=True)]


def compilable(*tensors: Tensor) -> bool:
    """Whether compiled loops can take these: in the memory of the CPU, in single or double precision, nothing recorded by autograd."""
    return all(
        t.device.type == "cpu"
        and t.dtype in (torch.float32, torch.float64)
        and not (t.requires_grad and torch.is_grad_enabled())
        for t in tensors
    )


def forces(neighbors: Neighbors, n_atoms: int, pair_gradients: Tensor) -> Tensor:
    """Scatter g_ij = dE/dr_ij to forces, F_i = sum_j (g_ij - g_ji).

    Args:
        pair_gradients: (pairs, 3, ...) eV/A; trailing axes are carried along.

    Returns:
        (atoms, 3, ...) eV/A.
    """
    out = pair_gradients.new_zeros(n_atoms, *pair_gradients.shape[1:])
    return out.index_add(0, neighbors.centers, pair_gradients).index_add(
        0, neighbors.neighbors, pair_gradients, alpha=-1
    )


def virials(structures: Structures, neighbors: Neighbors, vectors: Tensor, pair_gradients: Tensor) -> Tensor:
    """Scatter g_ij to dE/d(strain) = V sigma = sum_ij r_ij (x) g_ij, symmetrised.

    Args:
        vectors: (pairs, 3) r_ij, A.
        pair_gradients: (pairs, 3, ...) eV/A; trailing axes are carried along.

    Returns:
        (structures, 3, 3, ...) eV.
    """
    if len(structures) == 1:
        out = torch.einsum("pa,pb...->ab...", vectors, pair_gradients)[None]
    else:
        outer = torch.einsum("pa,pb...->pab...", vectors, pair_gradients)
        out = outer.new_zeros(len(structures), *outer.shape[1:])
        out = out.index_add(0, structures.structure_of_atom[neighbors.centers], outer)
    return 0.5 * (out + out.transpose(1, 2))


def prediction(
    structures: Structures, neighbors: Neighbors, vectors: Tensor, atom_energies: Tensor, pair_gradients: Tensor
) -> Prediction:
    """Assemble a Prediction from local energies (atoms,) and pair gradients (pairs, 3): the house's one derivative rule."""
    energies = atom_energies.new_zeros(len(structures)).index_add(0, structures.structure_of_atom, atom_energies)
    if compilable(vectors, pair_gradients):
        from gpmlp import pair_loops

        on_atoms = pair_gradients.new_zeros(structures.n_atoms, 3)
        strained = pair_gradients.new_zeros(len(structures), 3, 3)
        given = structures.structure_of_atom, neighbors.centers, neighbors.neighbors, vectors, pair_gradients
        pair_loops.collect(*(part.detach().contiguous().numpy() for part in (*given, on_atoms, strained)))
        strained = 0.5 * (strained + strained.mT)
    else:
        on_atoms = forces(neighbors, structures.n_atoms, pair_gradients)
        strained = virials(structures, neighbors, vectors, pair_gradients)
    return Prediction(energies, atom_energies, on_atoms, strained / structures.volumes[:, None, None])
