"""Neighbour lists: pairs of atoms within a cutoff and their vectors; sums of pair gradients to forces and virials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import vesin
from torch import Tensor

from gpmlp.core import cell_list, parallel
from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Prediction
from gpmlp.core.structures import Structures, repeat_with_rank
from gpmlp.native import library

CLOSEST = 0.3  # A; nearer pairs are taken for an error in the data
FLAT = 0.03  # A between opposite faces of a cell: flatter ones have too many images to count
PAIRS = 1 << 13  # that another thread is worth waking for, to compare them with a cutoff
MOLECULES = 256  # whose pairs are searched in one call
GRID = 5e4  # bins that vesin certainly keeps; of more than 1e5 it makes fewer, which may leave none along a short axis
THICK = 4  # bins along the shortest axis that survive that
MOST_COMPLETE = 5000  # atoms of a structure all pairs of which are listed
COMPLETE_BYTES = 160  # that such a pair takes with its vector, in its environment and in a gradient
THREAD_ATOMS = 1024  # for which another thread of a search is worth starting


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
    _last_species: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)
    _closest: float = field(default=0.0, init=False, repr=False)  # no pair of the structures of _last is closer, A

    def __len__(self) -> int:
        return self.centers.shape[0]

    def to(self, device: torch.device | str) -> Neighbors:
        """The same on another device."""
        if self.centers.device == torch.device(device):
            return self
        return Neighbors(self.centers.to(device), self.neighbors.to(device), self.shifts.to(device), self.cutoff)

    @staticmethod
    def empty(structures: Structures) -> Neighbors:
        """The list of no pairs."""
        like = structures.structure_of_atom
        return Neighbors(like[:0], like[:0], like.new_zeros(0, 3), 0.0)

    @staticmethod
    def concatenate(parts: Sequence[Neighbors]) -> Neighbors:
        """Lists of the same cutoff, one after another; indices stay as they are, and so do remembered vectors."""
        if len(parts) == 1:
            return parts[0]
        columns = {name: torch.cat([getattr(p, name) for p in parts]) for name in ("centers", "neighbors", "shifts")}
        out, last = Neighbors(**columns, cutoff=parts[0].cutoff), [p._last for p in parts if p._last is not None]
        if len(last) < len(parts) or any(of is not last[0][0] for of, _ in last):
            return out
        return out._remember(last[0][0], torch.cat([vectors for _, vectors in last]), min(p._closest for p in parts))

    @staticmethod
    def complete(structures: Structures) -> Neighbors:
        """What the geometry of whole structures is a function of, without a cutoff: from each atom to every other one of its structure,
        and to its own images along the periodic lattice vectors.

        In the order of centres and neighbours, the images of a centre (along the lattice vectors in turn) in its own place.

        Raises:
            UserError: a structure of so many atoms that these pairs would take gigabytes.
        """
        n, axes = structures.counts, structures.periodic.sum(1)
        if len(n) and int(n.max()) > MOST_COMPLETE:
            largest, most = int(n.argmax()), int(n.max())
            raise UserError(
                f"{structures.names[largest]}: has {most} atoms. Features of a network are functions of the vectors between all atoms of "
                f"a structure, which take {COMPLETE_BYTES * most**2 / 1e9:.3g} GB here; at most {MOST_COMPLETE} atoms are taken. Take "
                "smaller structures, or a model with local descriptors only."
            )
        center, place = repeat_with_rank((n + axes - 1).repeat_interleave(n))
        owner = structures.structure_of_atom[center]
        first = structures.offsets[owner]
        images, own = axes[owner], center - first
        image = (place >= own) & (place < own + images)
        neighbors = torch.where(image, own, place - torch.where(place < own, 0, images - 1)) + first
        # the k-th periodic axis of each structure
        axis_of = (~structures.periodic).to(torch.int8).argsort(dim=1, stable=True)
        axis = axis_of[owner, torch.where(image, place - own, 0)]
        shifts = torch.nn.functional.one_hot(axis, 3) * image[:, None]
        return Neighbors(center, neighbors, shifts, math.inf)

    @staticmethod
    def batch(parts: Sequence[Neighbors], counts: Sequence[int]) -> Neighbors:
        """Lists of structures with so many atoms, as the list of a batch of them."""
        firsts = np.cumsum([0, *counts])[:-1].tolist()
        return Neighbors.concatenate([p._moved(n) for p, n in zip(parts, firsts, strict=True)])

    def of_structures(self, start: int, end: int) -> Neighbors:
        """The pairs of the atoms start to end, which are whole structures of a batch; atoms counted from `start`."""
        part = self.of_centers(start, end)
        return part._moved(-start) if start else part

    def _moved(self, by: int) -> Neighbors:
        return Neighbors(self.centers + by, self.neighbors + by, self.shifts, self.cutoff)

    def of_centers(self, start: int, end: int) -> Neighbors:
        """The pairs of the centres start to end; nothing is copied."""
        if not len(self) or (start <= self._sorted_centers[0] and self._sorted_centers[-1] < end):
            return self
        low, high = self._sorted_centers.searchsorted((start, end)).tolist()
        part = self._select(slice(low, high))
        return part if self._last is None else part._remember(self._last[0], self._last[1][low:high], self._closest)

    def _select(self, pairs: Tensor | slice, cutoff: float | None = None) -> Neighbors:
        cutoff = self.cutoff if cutoff is None else cutoff
        return Neighbors(self.centers[pairs], self.neighbors[pairs], self.shifts[pairs], cutoff)

    @cached_property
    def _sorted_centers(self) -> np.ndarray:
        return self.centers.cpu().numpy()

    def _remember(self, structures: Structures, vectors: Tensor, closest: float = 0.0) -> Neighbors:
        """The same, remembering its vectors and how close pairs are: descriptors and baselines alike ask for them."""
        object.__setattr__(self, "_last", (structures, vectors))
        object.__setattr__(self, "_closest", float(closest))
        return self

    def sorted(self) -> Neighbors:
        """The same in the order of centres, neighbours and shifts."""
        return self._select(lexicographic_order(self.centers, self.neighbors, self.shifts))

    def vectors(self, structures: Structures) -> Tensor:
        """(pairs, 3) r_ij = r_j + shift . cell - r_i, A; differentiable in positions and cells."""
        if self._last is not None and self._last[0] is structures:
            return self._last[1]
        if fits_compiled_loops(structures.positions, structures.cells):
            out, closest = structures.positions.new_empty(len(self), 3), torch.empty(1, dtype=torch.float64)
            threads = min(parallel.available_threads(), 1 + len(self) // PAIRS)
            library.call("pair_vectors", len(self), *self._columns(structures), out, closest, threads)
            if not _differentiable(structures):
                self._remember(structures, out, closest.item())
        else:
            cells = structures.cells[structures.structure_of_atom[self.centers]]
            shift = torch.einsum("pa,pab->pb", self.shifts.to(cells.dtype), cells)
            out = structures.positions[self.neighbors] + shift - structures.positions[self.centers]
            if not _differentiable(structures):
                self._remember(structures, out)
        return out

    def species(self, structures: Structures) -> Tensor:
        """(pairs,) atomic numbers of the neighbours."""
        if self._last_species is None or self._last_species[0] is not structures.species:
            object.__setattr__(self, "_last_species", (structures.species, structures.species[self.neighbors]))
        assert self._last_species is not None
        return self._last_species[1]

    def closest(self, structures: Structures) -> float:
        """The shortest distance of all (inf where there are none), A."""
        vectors = self.vectors(structures).detach()
        known = self._last is not None and self._last[0] is structures and self._closest > 0
        return self._closest if known else _shortest(vectors)[1] if len(self) else math.inf

    def _columns(self, structures: Structures) -> tuple[Tensor, ...]:
        """Positions, cells, structure of each atom, and the pairs, for compiled loops."""
        atoms = structures.positions, structures.cells, structures.structure_of_atom
        return _contiguous(*atoms, self.centers, self.neighbors, self.shifts)

    def within(self, structures: Structures, cutoff: float) -> Neighbors:
        """The pairs closer than a smaller cutoff, in the same order; without a cutoff (inf) all that `complete` has, whatever is here."""
        if cutoff == self.cutoff:
            return self
        if cutoff == math.inf:
            return Neighbors.complete(structures)
        if self.cutoff == math.inf:
            raise ValueError(f"a list without a cutoff does not hold the images within {cutoff} A")
        if cutoff > self.cutoff:
            raise ValueError(f"a list of pairs within {self.cutoff} A does not hold those within {cutoff} A")
        if self._last is not None and self._last[0] is structures and cutoff <= self._closest:
            return self._select(slice(0), cutoff)
        if not len(self):
            return self._select(slice(0), cutoff)
        if not fits_compiled_loops(structures.positions, structures.cells):
            return self._select((self.vectors(structures).norm(dim=1) < cutoff).nonzero()[:, 0], cutoff)
        given, closest = self._columns(structures), torch.empty(1, dtype=torch.float64)
        i, j, shifts = (torch.empty_like(column) for column in given[3:])
        vectors = given[0].new_empty(len(i), 3)
        threads = min(parallel.available_threads(), 1 + len(i) // PAIRS)
        n = library.call("pairs_within", len(i), *given, float(cutoff), i, j, shifts, vectors, closest, threads)
        out = Neighbors(i[:n], j[:n], shifts[:n], cutoff)
        return out if _differentiable(structures) else out._remember(structures, vectors[:n], closest.item())


def find_neighbors(structures: Structures, cutoff: float) -> Neighbors:
    """Find all pairs within the cutoff; cells smaller than the cutoff, triclinic and left-handed cells included. Without a cutoff (inf)
    the list is that of Neighbors.complete.

    On the CPU by vesin, or by `cell_list` where vesin's grid would have no bin along an axis (wide flat cells and clouds), in the order of
    centres, neighbours and shifts; on any other device, where positions then stay, by `cell_list`, in the order of centres.

    Raises:
        UserError: two atoms closer than 0.3 A, naming the structure and the atoms; a cell with hardly any volume.
    """
    if cutoff == math.inf:
        find_neighbors(structures, CLOSEST)  # which says what is wrong
        return Neighbors.complete(structures)
    positions, boxes = structures.positions.detach().double(), structures.cells.detach().double()
    boxes = cell_list.complete_cells(boxes, structures.periodic)
    collapsed = collapsed_cells(boxes, structures.periodic)
    if collapsed.any():
        s = int(collapsed.nonzero()[0, 0])
        lengths = ", ".join(f"{length:.3g}" for length in structures.cells[s].detach().norm(dim=1).tolist())
        raise UserError(
            f"{structures.names[s]}: an atom and its own image are closer than {CLOSEST} A, or the cell is almost flat: its vectors are "
            f"{lengths} A long; check the cell and its unit (A), or remove this structure."
        )
    if positions.device.type == "cpu":
        i, j, shifts = _on_cpu(structures, positions, boxes, cutoff)
    else:
        i, j, shifts, _ = cell_list.find_pairs(
            positions, boxes, structures.periodic, structures.structure_of_atom, cutoff
        )
    out = Neighbors(i, j, shifts, float(cutoff))
    if not len(out):
        return out
    vectors = out.vectors(structures).detach()
    where, closest = _shortest(vectors)
    if closest < CLOSEST:
        raise _too_close(structures, int(i[where]), int(j[where]), closest)
    return out if _differentiable(structures) else out._remember(structures, vectors, closest)


def collapsed_cells(boxes: Tensor, periodic: Tensor) -> Tensor:
    """(structures,) whether a complete cell (cell_list.complete_cells) is so small that some lattice vector is shorter than CLOSEST, as
    the densest lattices show (Hermite's constants √(4/3) and 2^(1/3)), or so flat that its images could not be counted."""
    densest = boxes.new_tensor([0.0, CLOSEST, 0.75**0.5 * CLOSEST**2, 0.5**0.5 * CLOSEST**3])
    volumes = torch.linalg.det(boxes).abs()
    heights = volumes[:, None] / torch.linalg.cross(boxes.roll(-1, 1), boxes.roll(-2, 1)).norm(dim=2).clamp_min(1e-300)
    return (volumes < densest[periodic.sum(1)]) | (periodic & ~(heights > FLAT)).any(1)


def _on_cpu(structures: Structures, positions: Tensor, boxes: Tensor, cutoff: float) -> tuple[Tensor, Tensor, Tensor]:
    """i, j and shifts as of cell_list.find_pairs, in this order: one periodic structure after another, molecules by the hundred."""
    none = structures.structure_of_atom.new_zeros(0, 3)
    parts: list[tuple[Tensor, ...]] = [(none[:, 0], none[:, 0], none)]
    offsets = structures.offsets.tolist()
    free = np.logical_not(structures.periodic.numpy().any(axis=1))
    bins = _grids(structures, positions, boxes, cutoff)
    apart = _apart(positions, structures.structure_of_atom, cutoff) if free.sum() > 1 else positions
    for first, last in _together(free.tolist(), bins):
        atoms = slice(offsets[first], offsets[last])
        here = (apart if last - first > 1 else positions)[atoms]
        search = _by_vesin if last - first > 1 or _fits_grid(bins[first]) else _by_cell_list
        parts.append(search(here, boxes[first], structures.periodic[first], cutoff, atoms.start))
    i, j, shifts = parts[1] if len(parts) == 2 else (torch.cat(column) for column in zip(*parts, strict=True))
    return i, j, shifts


def _by_vesin(here: Tensor, box: Tensor, periodic: Tensor, cutoff: float, start: int) -> tuple[Tensor, ...]:
    """Sorted pairs of one structure, whose atoms count from `start`."""
    threads = min(parallel.available_threads(), 1 + len(here) // THREAD_ATOMS)
    search = vesin.NeighborList(cutoff=float(cutoff), full_list=True, n_threads=threads)
    pairs, shifts = search.compute(here.numpy(), box.numpy(), periodic.numpy(), quantities="PS", copy=False)
    found, images = torch.from_numpy(pairs.view(np.int64)), torch.from_numpy(shifts)
    if library.compiled() is None:
        return _sorted_pairs(found[:, 0], found[:, 1], images.long(), start)
    out = found.new_empty(len(found)), found.new_empty(len(found)), found.new_empty(len(found), 3)
    library.call("sort_pairs", len(found), found, images, len(here), start, *out)
    return out


def _by_cell_list(here: Tensor, box: Tensor, periodic: Tensor, cutoff: float, start: int) -> tuple[Tensor, ...]:
    """The same, where vesin cannot."""
    owner = torch.zeros(len(here), dtype=torch.long)
    return _sorted_pairs(*cell_list.find_pairs(here, box[None], periodic[None], owner, cutoff)[:3], start)


def _sorted_pairs(centers: Tensor, neighbors: Tensor, shifts: Tensor, start: int) -> tuple[Tensor, ...]:
    order = lexicographic_order(centers, neighbors, shifts)
    return centers[order] + start, neighbors[order] + start, shifts[order]


def _grids(structures: Structures, positions: Tensor, boxes: Tensor, cutoff: float) -> list[list[float]]:
    """cell_list.count_bins of each structure; where a bound of them is small, and there are no molecules to join, that."""
    periodic, far = structures.periodic.numpy(), float(positions.abs().max()) if len(positions) else 0.0
    lengths = np.linalg.norm(boxes.numpy(), axis=2)
    bound = np.where(periodic, lengths, 4 * far) / cutoff + 1  # 4 > 2 sqrt(3)
    # no height is below 1e-3 of its vector (errors.check_cells)
    near = far < 1e-3 * cell_list.FARTHEST * float(lengths.min(initial=1.0))
    if near and bound.prod(axis=1).max(initial=0.0) <= GRID and (~periodic.any(axis=1)).sum() <= 1:
        return bound.tolist()
    owner = structures.structure_of_atom
    return cell_list.count_bins(positions, boxes, structures.periodic, owner, cutoff).tolist()


def _fits_grid(bins: Sequence[float]) -> bool:
    """Whether vesin's grid certainly has a bin along each axis: it divides by their number, and a zero ends the process."""
    total = math.prod(bins)
    return total <= GRID or min(bins) * (GRID / total) ** (1 / 3) >= THICK


def _together(free: Sequence[bool], bins: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """(first, last + 1) of structures that are searched in one call: runs of those that are not periodic, MOLECULES at most, whose grid,
    the bins of one beside those of the other along x, is one that vesin keeps."""
    out: list[tuple[int, int]] = []
    grid = [0.0, 0.0, 0.0]
    for s, alone in enumerate(free):
        x, y, z = bins[s]
        joined = [grid[0] + x + 3, max(grid[1], y), max(grid[2], z)]  # 2 cutoffs between them, and rounding
        if alone and s and free[s - 1] and s - out[-1][0] < MOLECULES and math.prod(joined) <= GRID:
            out[-1], grid = (out[-1][0], s + 1), joined
        else:
            out.append((s, s + 1))
            grid = [x, y, z]
    return out


def _apart(positions: Tensor, structure: Tensor, cutoff: float) -> Tensor:
    """Positions with each structure moved along x beyond the cutoff of the one before."""
    n = int(structure[-1]) + 1 if len(structure) else 0
    x, big = positions[:, 0], torch.full((n,), math.inf, dtype=positions.dtype)
    low, high = big.scatter_reduce(0, structure, x, "amin"), (-big).scatter_reduce(0, structure, x, "amax")
    places = torch.where(high >= low, high - low + 2 * cutoff, 0.0).cumsum(0)
    moved = positions.clone()
    moved[:, 0] += (places - high)[structure]
    return moved


def _shortest(vectors: Tensor) -> tuple[int, float]:
    """Place and length of the shortest vector."""
    if fits_compiled_loops(vectors):
        length = torch.empty(1, dtype=torch.float64)
        return library.call("shortest_vector", len(vectors), *_contiguous(vectors), length), length.item()
    squares = vectors.square().sum(1)
    where = int(squares.argmin())
    return where, float(squares[where].sqrt())


def _too_close(structures: Structures, i: int, j: int, distance: float) -> UserError:
    s = int(structures.structure_of_atom[i])
    first = int(structures.offsets[s])
    return UserError(
        f"{structures.names[s]}: atoms {i - first} and {j - first} are {distance:.3f} A apart (closer than {CLOSEST} A); "
        "check the positions, the cell and the unit (A) of this structure, or remove it."
    )


def _differentiable(structures: Structures) -> bool:
    """Whether vectors may be asked for with their gradient, and so not be remembered without it."""
    return structures.positions.requires_grad or structures.cells.requires_grad


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As compiled loops read them; not to be written to, as some are copies."""
    return tuple(part.contiguous() for part in tensors)


def lexicographic_order(centers: Tensor, neighbors: Tensor, shifts: Tensor) -> Tensor:
    """Indices that put pairs in the order of centres, neighbours and shifts."""
    if not len(centers):
        return centers
    low = shifts.amin(0)
    spans = (shifts.amax(0) - low + 1).to(centers.dtype)
    x, y, z = (shifts - low).to(centers.dtype).unbind(1)
    order = ((x * spans[1] + y) * spans[2] + z).argsort(stable=True)
    atoms = torch.maximum(centers.max(), neighbors.max()) + 1
    return order[(centers * atoms + neighbors)[order].argsort(stable=True)]


def fits_compiled_loops(*tensors: Tensor) -> bool:
    """Whether there are compiled loops and they can take these: in the memory of the CPU, in single or double precision, nothing
    recorded by autograd."""
    return library.compiled() is not None and all(
        t.device.type == "cpu"
        and t.dtype in (torch.float32, torch.float64)
        and not (t.requires_grad and torch.is_grad_enabled())
        for t in tensors
    )


def scatter_forces(neighbors: Neighbors, n_atoms: int, pair_gradients: Tensor) -> Tensor:
    """Scatter g_ij = dE/dr_ij to forces, F_i = sum_j (g_ij - g_ji).

    Args:
        pair_gradients: (pairs, 3, ...) eV/A; trailing axes are carried along.

    Returns:
        (atoms, 3, ...) eV/A.
    """
    out = pair_gradients.new_zeros(n_atoms, *pair_gradients.shape[1:])
    out = out.index_add(0, neighbors.centers, pair_gradients)
    return out.index_add(0, neighbors.neighbors, pair_gradients, alpha=-1)


def scatter_virials(structures: Structures, neighbors: Neighbors, vectors: Tensor, pair_gradients: Tensor) -> Tensor:
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


def assemble_prediction(
    structures: Structures, neighbors: Neighbors, vectors: Tensor, atom_energies: Tensor, pair_gradients: Tensor
) -> Prediction:
    """A Prediction from local energies (atoms,) and pair gradients g_ij = dE/dr_ij (pairs, 3): the one derivative rule of all terms."""
    on_atoms = pair_gradients.new_zeros(structures.n_atoms, 3)
    strained = pair_gradients.new_zeros(len(structures), 3, 3)
    add_pair_gradients(structures, neighbors, vectors, pair_gradients, on_atoms, strained)
    return prediction_from_sums(structures, atom_energies, on_atoms, strained)


def add_pair_gradients(
    structures: Structures, neighbors: Neighbors, vectors: Tensor, gradients: Tensor, on_atoms: Tensor, strained: Tensor
) -> None:
    """Add F_i = sum_j (g_ij - g_ji) to on_atoms (atoms, 3) and sum_ij r_ij (x) g_ij to strained (structures, 3, 3), from these pairs."""
    if not len(vectors):
        return
    if fits_compiled_loops(vectors, gradients):
        given = structures.structure_of_atom, neighbors.centers, neighbors.neighbors, vectors, gradients
        library.call("add_pair_gradients", len(vectors), *_contiguous(*given), on_atoms, strained)
    else:
        on_atoms += scatter_forces(neighbors, structures.n_atoms, gradients)
        strained += scatter_virials(structures, neighbors, vectors, gradients)


def scatter_atom_virials(n_atoms: int, neighbors: Neighbors, vectors: Tensor, gradients: Tensor) -> Tensor:
    """(atoms, 3, 3) eV: of r_ij (x) g_ij of each pair (scatter_virials) half goes to either atom, symmetrised."""
    out, ends = vectors.new_zeros(n_atoms, 3, 3), (neighbors.centers, neighbors.neighbors)
    if fits_compiled_loops(vectors, gradients):
        given = *_contiguous(*ends, vectors, gradients), vectors.new_zeros(n_atoms, 3), out
        for i, j, *rest in (given, (given[1], given[0], *given[2:])):
            library.call("add_pair_gradients", len(vectors), torch.arange(n_atoms), i, j, *rest)
    else:
        outer = vectors[:, :, None] * gradients[:, None]
        for atoms in ends:
            out.index_add_(0, atoms, outer)
    return 0.25 * (out + out.mT)


def prediction_from_sums(
    structures: Structures, atom_energies: Tensor, on_atoms: Tensor, strained: Tensor
) -> Prediction:
    """A Prediction from local energies (atoms,), eV, forces, eV/A, and Σ_ij r_ij (x) g_ij (structures, 3, 3), eV."""
    energies = atom_energies.new_zeros(len(structures)).index_add(0, structures.structure_of_atom, atom_energies)
    return Prediction(
        energies, atom_energies, on_atoms, 0.5 * (strained + strained.mT) / structures.volumes[:, None, None]
    )
