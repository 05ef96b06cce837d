"""Atomic environments as unit feature vectors, with their derivatives with respect to neighbours' positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from gpmlp.core.neighbors import Neighbors, find_neighbors
from gpmlp.core.structures import Structures, repeat_with_rank
from gpmlp.core.units import VOIGT

JACOBIAN_BYTES = 192 << 20  # of the environments of a chunk; a larger one is computed again for each use


@dataclass(frozen=True, eq=False)
class Surroundings:
    """The neighbourhoods of a set of centres, without the structures they came from: the input of a descriptor.

    Attributes:
        species: (environments,) Z of the centre.
        centers: (pairs,) environment index of each pair, sorted.
        neighbor_species: (pairs,) Z of the neighbour.
        vectors: (pairs, 3) from centre to neighbour, A.
        atoms: (environments,) and neighbor_atoms (pairs,): which atoms they are, where there is no cutoff: environments of one structure
            then hold the same atoms, in the order of Neighbors.complete. None otherwise.
    """

    species: Tensor
    centers: Tensor
    neighbor_species: Tensor
    vectors: Tensor
    atoms: Tensor | None = None
    neighbor_atoms: Tensor | None = None

    def __len__(self) -> int:
        return self.species.shape[0]

    @property
    def surrounded(self) -> Tensor:
        """(environments,) bool: those with a neighbour."""
        return torch.bincount(self.centers, minlength=len(self)) > 0

    @staticmethod
    def from_structures(
        structures: Structures, neighbors: Neighbors, start: int = 0, end: int | None = None
    ) -> Surroundings:
        """The surroundings of every atom, in the order of atoms; or of the atoms start to end, whose pairs these are."""
        centers = neighbors.centers - start if start else neighbors.centers
        about = structures.species[start:end], centers, neighbors.species(structures), neighbors.vectors(structures)
        if neighbors.cutoff < math.inf:
            return Surroundings(*about)
        atoms = torch.arange(start, start + len(about[0]), device=centers.device)
        return Surroundings(*about, atoms, neighbors.neighbors)

    def pairs_of(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Return, for the pairs of the given environments, their position in `indices` and their pair index."""
        indices = torch.as_tensor(indices, device=self.species.device, dtype=torch.long)
        counts = torch.bincount(self.centers, minlength=len(self))
        local, rank = repeat_with_rank(counts[indices])
        return local, (counts.cumsum(0) - counts)[indices][local] + rank

    def select(self, indices: Sequence[int] | Tensor) -> Surroundings:
        """Return the surroundings of the given environments, in that order."""
        indices = torch.as_tensor(indices, device=self.species.device, dtype=torch.long)
        local, pairs = self.pairs_of(indices)
        about = self.species[indices], local, self.neighbor_species[pairs], self.vectors[pairs]
        if self.atoms is None or self.neighbor_atoms is None:
            return Surroundings(*about)
        return Surroundings(*about, self.atoms[indices], self.neighbor_atoms[pairs])

    @staticmethod
    def concatenate(parts: Sequence[Surroundings]) -> Surroundings:
        """Return all environments of the parts."""
        shifts = torch.tensor([0] + [len(p) for p in parts]).cumsum(0).tolist()
        about = (
            torch.cat([p.species for p in parts]),
            torch.cat([p.centers + s for p, s in zip(parts, shifts, strict=False)]),
            torch.cat([p.neighbor_species for p in parts]),
            torch.cat([p.vectors for p in parts]),
        )
        known = [(p.atoms, p.neighbor_atoms) for p in parts if p.atoms is not None and p.neighbor_atoms is not None]
        if len(known) < len(parts) or not parts:
            return Surroundings(*about)
        # atoms of different parts are different atoms
        ends = (1 + max(int(x.max()) if len(x) else -1 for x in both) for both in known)
        firsts = [0, *accumulate(ends)]
        atoms, others = (torch.cat([x + f for x, f in zip(c, firsts, strict=False)]) for c in zip(*known, strict=True))
        return Surroundings(*about, atoms, others)


@dataclass(frozen=True, eq=False)
class Environments:
    """Features of surroundings and their derivatives.

    Attributes:
        surroundings: of which the features are.
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
        """Pair gradients g_ij = dE/dr_ij from dE/d(features).

        Args:
            cotangents: (environments, features), or (k, environments, features) for k of them at once.

        Returns:
            (pairs, 3) or (k, pairs, 3).
        """
        return self._pull_back(cotangents)

    def jacobian(self) -> Tensor:
        """(pairs, 3, features) d(features of the centre)/dr_ij. Large: ask for it a chunk of environments at a time."""
        return self._jacobian()


class Descriptor(Protocol):
    """Environments of surroundings. Implementations are values: equal parameters give equal features."""

    @property
    def cutoff(self) -> float:
        """A; inf where features depend on all atoms of a structure, whose surroundings are those of Neighbors.complete."""
        ...

    @property
    def n_features(self) -> int: ...

    @property
    def constants(self) -> dict[str, Tensor]:
        """What it learned from training environments, as a model file keeps it, by name."""
        ...

    def __call__(self, surroundings: Surroundings) -> Environments: ...


@dataclass(frozen=True)
class SinglePrecisionDescriptor:
    """A descriptor that works in single precision, between pair vectors and features in double.

    Features are then those of neighbours moved by 1e-7 of their distance. Kernels and what is summed over centres stay double: weights
    of thousands of eV cancel there, which single precision would not survive. Where they are summed beforehand, to a quadratic form,
    the compiled core takes it in single precision, too.
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

    @property
    def constants(self) -> dict[str, Tensor]:
        """Of the descriptor."""
        return self.descriptor.constants

    def __call__(self, surroundings: Surroundings) -> Environments:
        """Features in double, of unit norm to its rounding, and derivatives in double."""
        single = self.descriptor(replace(surroundings, vectors=surroundings.vectors.float()))
        features = torch.nn.functional.normalize(single.features.double(), dim=1)
        return Environments(
            surroundings, features, lambda c: single.pull_back(c.float()).double(), lambda: single.jacobian().double()
        )


@dataclass(frozen=True, eq=False)
class StructureEnvironments:
    """The environments of all atoms of some structures by one descriptor: what mean, variances and novelty share.

    Features of all, and their Jacobian if that is small enough to keep, are computed when they are first needed.
    """

    descriptor: Descriptor
    neighbors: Neighbors
    surroundings: Surroundings

    @staticmethod
    def from_structures(
        descriptor: Descriptor, structures: Structures, pairs: Neighbors | None = None
    ) -> StructureEnvironments:
        """Find the neighbours, unless all `pairs` within the cutoff or more are given."""
        if pairs is None:
            pairs = find_neighbors(structures, descriptor.cutoff)
        else:
            pairs = pairs.within(structures, descriptor.cutoff)
        return StructureEnvironments(descriptor, pairs, Surroundings.from_structures(structures, pairs))

    @cached_property
    def environments(self) -> Environments:
        """Of all atoms."""
        return self.descriptor(self.surroundings)

    @cached_property
    def jacobian(self) -> Tensor | None:
        """(pairs, 3, features) of all environments; None where it is larger than JACOBIAN_BYTES."""
        features = self.environments.features
        if 3 * len(self.neighbors) * features.shape[1] * features.element_size() > JACOBIAN_BYTES:
            return None
        return self.environments.jacobian()

    @cached_property
    def center_jacobian(self) -> Tensor:
        """(environments, 3, features) derivatives with respect to the centres' own positions: a shift of all changes nothing."""
        assert self.jacobian is not None
        out = self.jacobian.new_zeros(len(self.surroundings), *self.jacobian.shape[1:])
        return out.index_add_(0, self.surroundings.centers, self.jacobian, alpha=-1)

    def keep_jacobian(self, n_atoms: int | None = None) -> bool:
        """Make the Jacobian that `select` cuts from, and whether there is one; not for derivatives of so few atoms that making the
        environments which they are part of is less work."""
        n = len(self.surroundings)
        if n_atoms is not None and "jacobian" not in vars(self) and 2 * n_atoms * (n + len(self.neighbors)) < n * n:
            return False
        return self.jacobian is not None

    def select(self, centers: Tensor) -> Environments:
        """Environments of some centres (indices), for their features and Jacobians: cut out of the kept Jacobian, or computed."""
        if vars(self).get("jacobian") is None:
            return self.descriptor(self.surroundings.select(centers))
        pairs = self.surroundings.pairs_of(centers)[1]
        features = self.environments.features[centers]
        return Environments(self.surroundings.select(centers), features, _cut_out, lambda: self._rows(pairs))

    def _rows(self, pairs: Tensor) -> Tensor:
        """Of the Jacobian; not copied where the pairs follow each other, as those of consecutive centres do."""
        assert self.jacobian is not None
        if len(pairs) and int(pairs[-1] - pairs[0]) == len(pairs) - 1 and bool((pairs[1:] > pairs[:-1]).all()):
            return self.jacobian[int(pairs[0]) : int(pairs[-1]) + 1]
        return self.jacobian[pairs]


def _cut_out(cotangents: Tensor) -> Tensor:
    raise RuntimeError("these environments were cut out for their Jacobians; pull back through all of them")


def strain_derivatives(jacobian: Tensor, owners: Tensor, vectors: Tensor, n: int) -> Tensor:
    """(n environments, 6, features) derivatives with respect to the strains of VOIGT: the symmetric part of Σ_j r_ij ⊗ dx/dr_ij."""
    sums = jacobian.new_zeros(n, 3, *jacobian.shape[1:])
    for a in range(3):
        sums[:, a].index_add_(0, owners, jacobian * vectors[:, a, None, None])
    return torch.stack([0.5 * (sums[:, a, b] + sums[:, b, a]) for a, b in VOIGT], dim=1)
