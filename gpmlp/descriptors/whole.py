"""Whole structures out of surroundings without a cutoff, and how derivatives with respect to their atoms become those of pair vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpmlp.core.environments import Surroundings
from gpmlp.core.neighbors import find_neighbors
from gpmlp.core.structures import Structures, repeat_with_rank

GRID = 2.0**-40  # A, to which positions are rounded: so they are the same from whichever atom they come


@dataclass(frozen=True, eq=False)
class WholeStructures:
    """The structures that environments are part of, each once.

    A structure is a function of the pair vectors of any one of its atoms (Neighbors.complete): to every other atom, and to the atom's own
    images along the k periodic lattice vectors. So its n + k `points`, atoms and lattice vectors, are what features of whole structures are
    derivatives of.

    Attributes:
        surroundings: where they come from.
        structures: the first atom of each at the origin; its k lattice vectors are the first rows of its cell.
        atoms: (environments,) the atom that is the centre.
        owners: (environments,) its structure.
        first: (environments,) the first pair; axes: (environments,) k.
        reference: (structures,) an environment of each.
        points: (pairs,) the point that each pair leads to, among the points of all structures in turn.
    """

    surroundings: Surroundings
    structures: Structures
    atoms: Tensor
    owners: Tensor
    first: Tensor
    axes: Tensor
    reference: Tensor
    points: Tensor

    @staticmethod
    def from_surroundings(s: Surroundings) -> WholeStructures:
        """Those of environments whose pairs are as in Neighbors.complete."""
        if s.atoms is None or s.neighbor_atoms is None:
            raise ValueError("these surroundings have a cutoff: they do not hold whole structures")
        n_env, like = len(s), s.atoms
        counts = torch.bincount(s.centers, minlength=n_env)
        first = counts.cumsum(0) - counts
        image = s.neighbor_atoms == s.atoms[s.centers]
        axes = torch.bincount(s.centers[image], minlength=n_env)
        label = s.atoms.scatter_reduce(0, s.centers, s.neighbor_atoms, "amin")
        labels, owners = label.unique(return_inverse=True)
        reference = like.new_full((len(labels),), n_env).scatter_reduce(0, owners, torch.arange(n_env).to(like), "amin")
        sizes = (counts - axes + 1)[reference]
        offsets = sizes.cumsum(0) - sizes
        vectors = s.vectors.detach().double()
        position, cells = vectors.new_zeros(int(sizes.sum()), 3), vectors.new_zeros(len(labels), 3, 3)
        species = like.new_zeros(len(position))
        own = s.atoms - label
        species[(offsets[owners] + own)[reference]] = s.species[reference]
        of_structure, rank = repeat_with_rank(counts[reference])
        pairs = first[reference][of_structure] + rank
        atom, there = pairs[~image[pairs]], of_structure[~image[pairs]]
        place = offsets[there] + s.neighbor_atoms[atom] - labels[there]
        position[place], species[place] = vectors[atom], s.neighbor_species[atom]
        lattice, there, axis = (x[image[pairs]] for x in (pairs, of_structure, rank - own[reference][of_structure]))
        cells[there, axis] = vectors[lattice]
        owner = repeat_with_rank(sizes)[0]
        position = ((position - position[offsets][owner]) / GRID).round() * GRID + 0.0
        cells = (cells / GRID).round() * GRID + 0.0  # no negative zeros
        periodic = torch.arange(3, device=like.device) < axes[reference][:, None]
        structures = Structures(position, cells, periodic, species, owner)
        at = s.centers
        along = torch.arange(len(at), device=like.device) - first[at] - own[at]
        points = torch.where(image, sizes[owners[at]] + along, s.neighbor_atoms - label[at])
        points += point_offsets(structures)[owners[at]]
        return WholeStructures(s, structures, offsets[owners] + own, owners, first, axes, reference, points)

    def on_pairs(self, on_atoms: Tensor, on_cells: Tensor) -> Tensor:
        """(pairs, 3) derivatives with respect to pair vectors, those of one environment of each structure, others being zero, from
        derivatives with respect to atoms (atoms, 3) and cells (structures, 3, 3)."""
        structures = self.structures
        starts, k = point_offsets(structures), structures.periodic.sum(1)
        on_points = on_atoms.new_zeros(int((structures.counts + k).sum()), 3)
        owner = structures.structure_of_atom
        on_points[starts[owner] + torch.arange(len(owner)).to(owner) - structures.offsets[owner]] = on_atoms
        s, axis = structures.periodic.nonzero().unbind(1)
        on_points[starts[s] + structures.counts[s] + axis] = on_cells[s, axis]
        mine = self.reference[self.owners[self.surroundings.centers]] == self.surroundings.centers
        return torch.where(mine[:, None], on_points[self.points], 0.0)

    def places(self, environments: Tensor, atoms: Tensor) -> Tensor:
        """The pairs from the centres of environments to atoms of their structures, other than the centres."""
        own, j = ((x - self.structures.offsets[self.owners[environments]]) for x in (self.atoms[environments], atoms))
        return self.first[environments] + j + torch.where(j > own, self.axes[environments] - 1, 0)

    def image_places(self, environments: Tensor, axis: int) -> Tensor:
        """The pairs from the centres of environments to their images along a lattice vector, 0 to k - 1."""
        own = self.atoms[environments] - self.structures.offsets[self.owners[environments]]
        return self.first[environments] + own + axis

    def nearby(self, cutoff: float) -> LocalPairs:
        """The surroundings of the same centres within a cutoff, images included."""
        near = find_neighbors(self.structures, cutoff)
        counts = torch.bincount(near.centers, minlength=self.structures.n_atoms)
        centers, rank = repeat_with_rank(counts[self.atoms])
        pairs = (counts.cumsum(0) - counts)[self.atoms][centers] + rank
        about = near.neighbors[pairs], near.shifts[pairs]
        vectors = near.vectors(self.structures)[pairs].to(self.surroundings.vectors)
        local = Surroundings(self.surroundings.species, centers, self.structures.species[about[0]], vectors)
        return LocalPairs(self, local, *about)


@dataclass(frozen=True, eq=False)
class LocalPairs:
    """Pairs within a cutoff, whose vectors are sums of those without one: r = r_ij + Σ_a n_a r_a, with j the atom in its place in the
    structure and a lattice vector r_a from the centre to its own image.

    Attributes:
        surroundings: of the same centres.
        neighbors: (pairs,) j; shifts: (pairs, 3) n.
    """

    whole: WholeStructures
    surroundings: Surroundings
    neighbors: Tensor
    shifts: Tensor

    def spread(self, values: Tensor) -> Tensor:
        """Derivatives with respect to the vectors without a cutoff, (pairs, ...), from those of the vectors within it."""
        centers, whole = self.surroundings.centers, self.whole
        out = values.new_zeros(len(whole.surroundings.centers), *values.shape[1:])
        other = self.neighbors != whole.atoms[centers]
        out.index_add_(0, whole.places(centers[other], self.neighbors[other]), values[other])
        for axis in range(int(whole.axes.max()) if len(whole.axes) else 0):
            along = (whole.axes[centers] > axis) & (self.shifts[:, axis] != 0)
            n = self.shifts[along, axis].to(values)
            place = whole.image_places(centers[along], axis)
            out.index_add_(0, place, values[along] * n.reshape(-1, *[1] * (values.dim() - 1)))
        return out


def point_offsets(structures: Structures) -> Tensor:
    """(structures,) the first point of each."""
    points = structures.counts + structures.periodic.sum(1)
    return points.cumsum(0) - points
