"""Terms are the learned parts of the energy: a descriptor with its kernel and the posterior mean of local energies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gpmlp import neighbors
from gpmlp.environments import Descriptor, Environments, Kept, Surroundings
from gpmlp.gp.kernels import ZonalKernel
from gpmlp.neighbors import Neighbors
from gpmlp.quantities import Prediction
from gpmlp.structures import Structures

JACOBIAN_BYTES = 192 << 20  # of the environments of a chunk; more is made again for each use
Profile = tuple[Tensor, Tensor, Tensor]  # f, f', f'' of the dot products of environments with centres
CHUNK_ATOMS = 256  # atoms whose pair quantities are in memory together


@dataclass(frozen=True, eq=False)
class View:
    """What one descriptor sees of some structures: made once, used by mean, variances and novelty."""

    neighbors: Neighbors
    surroundings: Surroundings
    environments: Environments

    @staticmethod
    def of(descriptor: Descriptor, structures: Structures) -> View:
        """Find the neighbours and make the environments."""
        pairs = neighbors.find(structures, descriptor.cutoff)
        surroundings = Surroundings.of(structures, pairs)
        return View(pairs, surroundings, descriptor(surroundings))

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


@dataclass(frozen=True, eq=False)
class MeanBlock:
    """The posterior mean of local energies of one central species, ε(x) = Σ_j [α_j f(x·x_j) + f'(x·x_j) x·τ_j].

    Attributes:
        features: (M, features) centres x_j.
        weights: (M,) α_j, eV.
        tangents: (M, features) τ_j, eV; empty (0, features) where no centre carries gradients.
    """

    features: Tensor
    weights: Tensor
    tangents: Tensor

    def __call__(self, kernel: ZonalKernel, x: Tensor, profile: Profile | None = None) -> tuple[Tensor, Tensor]:
        """Return ε (environments,) and dε/dx (environments, features); `profile` is that of x with the centres, if it is known."""
        value, first, second = profile or kernel.profile(x @ self.features.T)
        energy = value @ self.weights
        on_dots = first * self.weights
        if not len(self.tangents):
            return energy, on_dots @ self.features
        along = x @ self.tangents.T
        energy = energy + (first * along).sum(1)
        return energy, (on_dots + second * along) @ self.features + first @ self.tangents


@dataclass(frozen=True, eq=False)
class Term:
    """One descriptor with its kernel and, for each central species, the mean of the local energies."""

    descriptor: Descriptor
    kernel: ZonalKernel
    blocks: dict[int, MeanBlock]

    def view(self, structures: Structures) -> View:
        """What the descriptor sees."""
        return View.of(self.descriptor, structures)

    def profiles(self, structures: Structures, view: View) -> dict[int, Profile]:
        """Kernel of the environments of each species with all its centres: what mean and variances of local energies share."""
        out = {}
        for z, block in self.blocks.items():
            mine = structures.species == z
            if mine.any():
                out[z] = self.kernel.profile(view.environments.features[mine] @ block.features.T)
        return out

    def mean(self, structures: Structures, view: View, profiles: dict[int, Profile] | None = None) -> Prediction:
        """Posterior mean of energies, forces and stresses."""
        environments = view.environments
        local = structures.positions.new_zeros(structures.n_atoms)
        cotangents = torch.zeros_like(environments.features)
        for z, profile in (self.profiles(structures, view) if profiles is None else profiles).items():
            mine = (structures.species == z).nonzero()[:, 0]
            local[mine], cotangents[mine] = self.blocks[z](self.kernel, environments.features[mine], profile)
        gradients = environments.pull_back(cotangents)
        return neighbors.prediction(structures, view.neighbors, view.surroundings.vectors, local, gradients)

    def __call__(self, structures: Structures) -> Prediction:
        return self.mean(structures, self.view(structures))


def chunks(structures: Structures, atoms: int) -> Iterator[Structures]:
    """Consecutive structures, as many as have about that many atoms together (at least one)."""
    if len(structures) == 1 or 0 < structures.n_atoms <= atoms:
        yield structures
        return
    start, filled = 0, 0
    counts = structures.counts.tolist()
    for i, count in enumerate(counts):
        if filled and filled + count > atoms:
            yield structures.select(range(start, i))
            start, filled = i, 0
        filled += count
    if start < len(counts):
        yield structures.select(range(start, len(counts)))
