"""Environments are what each atom sees, as numbers: unit features of its neighbourhood and their derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from gpmlp.core import neighbors
from gpmlp.core.neighbors import Neighbors
from gpmlp.core.structures import Structures

JACOBIAN_BYTES = 192 << 20  # of the environments of a chunk; more is made again for each use


@dataclass(frozen=True, eq=False)
class Surroundings:
    """The neighbourhoods of a set of centres, cut loose from the structures they came from: all a descriptor needs.

    Attributes:
        species: (environments,) Z of the centre.
        centers: (pairs,) environment index of each pair, sorted.
        neighbor_species: (pairs,) Z of the neighbour.
        vectors: (pairs, 3) from centre to neighbour, A.
    """

    species: Tensor
    centers: Tensor
    neighbor_species: Tensor
    vectors: Tensor

    def __len__(self) -> int:
        return self.species.shape[0]

    @staticmethod
    def from_structures(
        structures: Structures, neighbors: Neighbors, start: int = 0, end: int | None = None
    ) -> Surroundings:
        """The surroundings of every atom, in the order of atoms; or of the atoms start to end, whose pairs these are."""
        centers = neighbors.centers - start if start else neighbors.centers
        vectors = neighbors.vectors(structures)
        return Surroundings(structures.species[start:end], centers, structures.species[neighbors.neighbors], vectors)

    def pairs_of(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Return, for the pairs of the given environments, their position in `indices` and their pair index."""
        indices = torch.as_tensor(indices, device=self.species.device, dtype=torch.long)
        counts = torch.bincount(self.centers, minlength=len(self))
        starts = counts.cumsum(0) - counts
        wanted = counts[indices]
        local = torch.repeat_interleave(torch.arange(len(indices), device=indices.device), wanted)
        first = wanted.cumsum(0) - wanted
        return local, torch.arange(len(local), device=indices.device) + (starts[indices] - first)[local]

    def select(self, indices: Sequence[int] | Tensor) -> Surroundings:
        """Return the surroundings of the given environments, in that order."""
        indices = torch.as_tensor(indices, device=self.species.device, dtype=torch.long)
        local, pairs = self.pairs_of(indices)
        return Surroundings(self.species[indices], local, self.neighbor_species[pairs], self.vectors[pairs])

    @staticmethod
    def concatenate(parts: Sequence[Surroundings]) -> Surroundings:
        """Return all environments of the parts."""
        shifts = torch.tensor([0] + [len(p) for p in parts]).cumsum(0).tolist()
        return Surroundings(
            torch.cat([p.species for p in parts]),
            torch.cat([p.centers + s for p, s in zip(parts, shifts, strict=False)]),
            torch.cat([p.neighbor_species for p in parts]),
            torch.cat([p.vectors for p in parts]),
        )


@dataclass(frozen=True, eq=False)
class Environments:
    """Features of surroundings, and how they change when a neighbour moves.

    Attributes:
        surroundings: what the features were made of.
        features: (environments, features), unit norm.
    """

    surroundings: Surroundings
    features: Tensor
    _pull_back: Callable[[Tensor], Tensor]
    _jacobian: Callable[[], Tensor]

    def __len__(self) -> int:
        return self.features.shape[0]

    @property
    def species(self) -> Tensor:
        """(environments,) Z of the centre."""
        return self.surroundings.species

    def pull_back(self, cotangents: Tensor) -> Tensor:
        """Turn dE/d(features) into pair gradients g_ij = dE/dr_ij.

        Args:
            cotangents: (environments, features), or (k, environments, features) for k of them at once.

        Returns:
            (pairs, 3) or (k, pairs, 3).
        """
        return self._pull_back(cotangents)

    def jacobian(self) -> Tensor:
        """(pairs, 3, features) d(features of the centre)/dr_ij. Large: ask for it a chunk of environments at a time."""
        return self._jacobian()


@dataclass(frozen=True, eq=False)
class Kept:
    """Environments with a Jacobian that was made once for all; called with centres (indices), it cuts some out.

    Attributes:
        environments: of all centres.
        jacobian: (pairs, 3, features).
    """

    environments: Environments
    jacobian: Tensor

    def __call__(self, centers: Tensor) -> Environments:
        surroundings = self.environments.surroundings
        pairs = surroundings.pairs_of(centers)[1]
        return Environments(
            surroundings.select(centers), self.environments.features[centers], _cut_out, lambda: self._rows(pairs)
        )

    def _rows(self, pairs: Tensor) -> Tensor:
        """Of some pairs; not copied where they follow each other, as those of consecutive centres do."""
        if len(pairs) and int(pairs[-1] - pairs[0]) == len(pairs) - 1 and bool((pairs[1:] > pairs[:-1]).all()):
            return self.jacobian[int(pairs[0]) : int(pairs[-1]) + 1]
        return self.jacobian[pairs]

    @cached_property
    def of_centers(self) -> Tensor:
        """(environments, 3, features) derivatives with respect to the centres' own positions: a shift of all changes nothing."""
        out = self.jacobian.new_zeros(len(self.environments), *self.jacobian.shape[1:])
        return out.index_add_(0, self.environments.surroundings.centers, self.jacobian, alpha=-1)


def _cut_out(cotangents: Tensor) -> Tensor:
    raise RuntimeError("these environments were cut out for their Jacobians; pull back through all of them")


class Descriptor(Protocol):
    """Turns surroundings into environments. Implementations are values: equal parameters give equal features."""

    cutoff: float
    n_features: int

    def __call__(self, surroundings: Surroundings) -> Environments: ...


@dataclass(frozen=True)
class SinglePrecisionDescriptor:
    """A descriptor that works in single precision, between pair vectors and features in double.

    Features are then those of neighbours moved by 1e-7 of their distance. Kernels and what is summed over centres stay double: weights
    of thousands of eV cancel there, which single precision would not survive.
    """

    descriptor: Descriptor

    @property
    def cutoff(self) -> float:
        """A."""
        return self.descriptor.cutoff

    @property
    def n_features(self) -> int:
        """Of the descriptor."""
        return self.descriptor.n_features

    def __call__(self, surroundings: Surroundings) -> Environments:
        """Features in double, of unit norm to its rounding, and derivatives in double."""
        made = self.descriptor(replace(surroundings, vectors=surroundings.vectors.float()))
        features = torch.nn.functional.normalize(made.features.double(), dim=1)
        return Environments(
            surroundings, features, lambda c: made.pull_back(c.float()).double(), lambda: made.jacobian().double()
        )


@dataclass(frozen=True, eq=False)
class StructureEnvironments:
    """What one descriptor sees of some structures: made once, used by mean, variances and novelty."""

    neighbors: Neighbors
    surroundings: Surroundings
    environments: Environments

    @staticmethod
    def from_structures(
        descriptor: Descriptor, structures: Structures, pairs: Neighbors | None = None
    ) -> StructureEnvironments:
        """Find the neighbours, unless `pairs` within the cutoff or more are known, and make the environments."""
        known = pairs is not None
        pairs = (
            pairs.within(structures, descriptor.cutoff)
            if known
            else neighbors.find_neighbors(structures, descriptor.cutoff)
        )
        surroundings = Surroundings.from_structures(structures, pairs)
        return StructureEnvironments(pairs, surroundings, descriptor(surroundings))

    @cached_property
    def look(self) -> Kept | None:
        """Environments of some centres with Jacobians made once for all, where these are not too large to keep."""
        features = self.environments.features
        if 3 * len(self.neighbors) * features.shape[1] * features.element_size() > JACOBIAN_BYTES:
            return None
        return Kept(self.environments, self.environments.jacobian())

    def look_at(self, n_atoms: int) -> Kept | None:
        """The same for derivatives of so many atoms, unless the few environments that see them are made with less work."""
        n = len(self.surroundings)
        if "look" not in vars(self) and 2 * n_atoms * (n + len(self.neighbors)) < n * n:
            return None
        return self.look
