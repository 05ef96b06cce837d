"""Terms are the learned parts of the energy: a descriptor with its kernel and the posterior mean of local energies."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gpmlp.core.environments import Descriptor, Environments, StructureEnvironments
from gpmlp.core.neighbors import Neighbors
from gpmlp.core.structures import Structures
from gpmlp.gp.kernels import Profile, ZonalKernel

ROWS, PRODUCTS = 64, 1 << 16  # environments, at least, and products with all centres that stay in cache


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
        """Return ε (environments,) and dε/dx (environments, features), to the last bit the same whether `profile`, of x with the centres,
        is known or not."""
        if len(x) > self._rows:
            known = zip(*(p.split(self._rows) for p in profile), strict=True) if profile else itertools.repeat(None)
            parts = [self(kernel, some, p) for some, p in zip(x.split(self._rows), known, strict=False)]
            return torch.cat([energy for energy, _ in parts]), torch.cat([slope for _, slope in parts])
        value, first, second = profile or self.profile(kernel, x)
        energy = value @ self.weights
        on_dots = first * self.weights
        if not len(self.tangents):
            return energy, on_dots @ self.features
        along = x @ self.tangents.T
        energy = energy + (first * along).sum(1)
        return energy, (on_dots + second * along) @ self.features + first @ self.tangents

    @property
    def _rows(self) -> int:
        """Environments that are done at a time."""
        return max(ROWS, PRODUCTS // max(1, len(self.features)) // ROWS * ROWS)

    def profile(self, kernel: ZonalKernel, x: Tensor) -> Profile:
        """Of environments with all centres."""
        if len(x) <= self._rows:
            return kernel.profile(x @ self.features.T)
        out = tuple(x.new_empty(len(x), len(self.features)) for _ in range(3))
        for some, *places in zip(x.split(self._rows), *(part.split(self._rows) for part in out), strict=True):
            for place, part in zip(places, kernel.profile(some @ self.features.T), strict=True):
                place.copy_(part)
        return out

    def quadratic_form(self, kernel: ZonalKernel) -> QuadraticForm | None:
        """The same mean as a quadratic form, if the kernel allows it and the form is cheaper to evaluate."""
        m, d = self.features.shape
        if kernel.quadratic is None or d >= (4 if len(self.tangents) else 2) * m:
            return None
        a, b = kernel.quadratic
        linear, matrix = self.weights @ self.features, (self.features.T * self.weights) @ self.features
        if len(self.tangents):
            linear = linear + self.tangents.sum(0)
            across = self.features.T @ self.tangents
            matrix = matrix + across + across.T
        return QuadraticForm(a * linear, 2 * b * matrix)


@dataclass(frozen=True, eq=False)
class QuadraticForm:
    """ε(x) = v.x + x.H x / 2: what a kernel f(s) = a s + b s² makes of all centres, whatever their number.

    With f' = a + 2 b s: v = a Σ_j (α_j x_j + τ_j), H = 2 b Σ_j (α_j x_j x_jᵀ + x_j τ_jᵀ + τ_j x_jᵀ).

    Attributes:
        linear: (features,) v, eV.
        hessian: (features, features) H, symmetric, eV.
    """

    linear: Tensor
    hessian: Tensor

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ε (environments,) and dε/dx (environments, features)."""
        slope = torch.addmm(self.linear, x, self.hessian)
        return 0.5 * (torch.linalg.vecdot(x, slope) + x @ self.linear), slope


@dataclass(frozen=True, eq=False)
class EnergyTerm:
    """One descriptor with its kernel and, for each central species, the mean of the local energies."""

    descriptor: Descriptor
    kernel: ZonalKernel
    blocks: dict[int, MeanBlock]

    def view(self, structures: Structures, pairs: Neighbors | None = None) -> StructureEnvironments:
        """What the descriptor sees; `pairs` as in StructureEnvironments.from_structures."""
        return StructureEnvironments.from_structures(self.descriptor, structures, pairs)

    @cached_property
    def quadratic_forms(self) -> dict[int, QuadraticForm]:
        """Means that are cheaper as a quadratic form, by species."""
        forms = {z: block.quadratic_form(self.kernel) for z, block in self.blocks.items()}
        return {z: form for z, form in forms.items() if form is not None}

    def kernel_profiles(self, environments: Environments) -> dict[int, Profile]:
        """Kernel of the environments of each species with all its centres: what mean and variances of local energies share.

        Not of species whose mean is a quadratic form, which has no use for it.
        """
        out = {}
        for z, block in self.blocks.items():
            mine = environments.species == z
            if z not in self.quadratic_forms and mine.any():
                out[z] = block.profile(self.kernel, environments.features[mine])
        return out

    def local_energies(
        self, environments: Environments, profiles: dict[int, Profile] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Posterior mean of local energies (environments,), eV, and its slopes with respect to the features (environments, features)."""
        x, species = environments.features, environments.species
        distinct = species.bincount().nonzero()[:, 0].tolist()
        if len(distinct) == 1:
            return self._local(distinct[0], x, profiles)
        local, slopes = x.new_zeros(len(x)), torch.empty_like(x)
        for z in distinct:
            mine = (species == z).nonzero()[:, 0]
            local[mine], slopes[mine] = self._local(z, x[mine], profiles)
        return local, slopes

    def _local(self, z: int, x: Tensor, profiles: dict[int, Profile] | None) -> tuple[Tensor, Tensor]:
        if z in self.quadratic_forms:
            return self.quadratic_forms[z](x)
        if z not in self.blocks:
            return x.new_zeros(len(x)), torch.zeros_like(x)
        return self.blocks[z](self.kernel, x, (profiles or {}).get(z))
