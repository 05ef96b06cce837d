"""Posterior mean of local energies: sums over inducing centres, cheaper forms of them, and terms of a descriptor with its kernel."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import linear

from gpmlp.core.environments import Descriptor, Environments, StructureEnvironments
from gpmlp.core.errors import UserError
from gpmlp.core.neighbors import Neighbors
from gpmlp.core.stored_tensors import StoredTensors
from gpmlp.core.structures import Structures
from gpmlp.gp.kernels import Profile, ZonalKernel

UNIT_TOLERANCE = 1e-4  # of the square of a length that is 1, in single precision
ROWS, PRODUCTS = 64, 1 << 16  # environments, at least, and products with all centres that stay in cache
SLOPE_BYTES = 8 << 20  # of samples: slopes with respect to kernel arguments in memory together, what stays in cache
TANGENT_BYTES = 16 << 20  # the same where each sample has τ of its own, to be read for every chunk


@dataclass(frozen=True, eq=False)
class MeanBlock:
    """The posterior mean of local energies of one central species, ε(x) = Σ_j [α_j f(x·x_j) + f'(x·x_j) x·τ_j].

    Attributes:
        features: (M, features) centres x_j.
        weights: (M,) α_j, eV; (k, M) of k samples at once, whose axis then follows that of the environments in all results.
        tangents: (M, features) τ_j, eV; empty (0, features) where no centre carries gradients; with a leading k of samples.
    """

    features: Tensor
    weights: Tensor
    tangents: Tensor

    @staticmethod
    def from_stored(stored: StoredTensors, n_features: int, dtype: torch.dtype) -> MeanBlock:
        """That of a model file, with tensors called as the attributes; UserError if these do not fit each other and the descriptor."""
        features = stored.take("features", ("centres", n_features), dtype)
        weights = stored.take("weights", (len(features),), dtype)
        rows = len(features) if len(stored["tangents"]) else 0
        squares = features.square().sum(1)
        # an atom alone and without central weight has features of zero
        if bool(((squares - 1).abs().minimum(squares) > UNIT_TOLERANCE).any()):
            raise UserError("the features of a centre have not length 1.")
        return MeanBlock(features, weights, stored.take("tangents", (rows, n_features), dtype))

    def after(self, features: Tensor) -> MeanBlock:
        """The same mean, in their precision, with centres before its own that have no weight."""
        n, like = len(features), self.tangents.to(features)
        weights = torch.cat([features.new_zeros(n), self.weights.to(features)])
        tangents = torch.cat([like.new_zeros(n if len(like) else 0, like.shape[1]), like])
        return MeanBlock(torch.cat([features, self.features.to(features)]), weights, tangents)

    def __call__(self, kernel: ZonalKernel, x: Tensor, profile: Profile | None = None) -> tuple[Tensor, Tensor]:
        """Return ε (environments,) and dε/dx (environments, features), in chunks.

        Bit for bit the same whether `profile`, the kernel of x with the centres, is given or not.
        """
        if len(x) <= self._rows:
            return self.from_profile(x, profile or kernel.profile(x @ self.features.T))
        profiles = zip(*(p.split(self._rows) for p in profile), strict=True) if profile else itertools.repeat(None)
        chunks = [self(kernel, chunk, p) for chunk, p in zip(x.split(self._rows), profiles, strict=False)]
        return torch.cat([energy for energy, _ in chunks]), torch.cat([slope for _, slope in chunks])

    def from_profile(self, x: Tensor, profile: Profile) -> tuple[Tensor, Tensor]:
        """ε = Σ_j [α_j f + f' x·τ_j] and dε/dx = Σ_j [(α_j f' + f'' x·τ_j) x_j + f' τ_j], from f, f', f'' of x with the centres."""
        value, first, second = profile
        energy = linear(value, self.weights)
        if self.weights.dim() == 2:
            first, second = first[:, None], second[:, None]
        on_dots = first * self.weights
        if not self.tangents.shape[-2]:
            return energy, self._on_features(on_dots)
        along = (x @ self.tangents.flatten(0, -2).T).unflatten(1, self.weights.shape)
        energy = energy + (first * along).sum(-1)
        on_tangents = (profile[1] @ self.tangents).movedim(0, -2)
        # in place of samples, which are many; rounds differently, and neither may change
        on_dots = on_dots.addcmul_(second, along) if self.weights.dim() == 2 else on_dots + second * along
        return energy, self._on_features(on_dots) + on_tangents

    def _on_features(self, on_dots: Tensor) -> Tensor:
        return (on_dots.flatten(0, -2) @ self.features).unflatten(0, on_dots.shape[:-1])

    @property
    def _rows(self) -> int:
        """Environments that are done at a time."""
        if self.weights.dim() == 2:
            bytes_together = TANGENT_BYTES if self.tangents.shape[-2] else SLOPE_BYTES
            return max(1, bytes_together // (self.weights.numel() * self.weights.element_size()))
        return max(ROWS, PRODUCTS // max(1, len(self.features)) // ROWS * ROWS)

    def profile(self, kernel: ZonalKernel, x: Tensor) -> Profile:
        """Kernel of environments with all centres, in the chunks of the mean."""
        if len(x) <= self._rows:
            return kernel.profile(x @ self.features.T)
        shape = len(x), len(self.features)
        out = x.new_empty(shape), x.new_empty(shape), x.new_empty(shape)
        for chunk, *places in zip(x.split(self._rows), *(part.split(self._rows) for part in out), strict=True):
            for place, part in zip(places, kernel.profile(chunk @ self.features.T), strict=True):
                place.copy_(part)
        return out

    @property
    def products(self) -> int:
        """Multiplications for ε and dε/dx of an environment."""
        return (4 if self.tangents.shape[-2] else 2) * self.features.numel()

    def quadratic_form(self, kernel: ZonalKernel) -> QuadraticForm | None:
        """The same mean as a quadratic form, where the kernel allows it."""
        if kernel.quadratic is None:
            return None
        a, b = kernel.quadratic
        linear_part = self.weights @ self.features
        matrix = (self.features.T * self.weights[..., None, :]) @ self.features
        if self.tangents.shape[-2]:
            linear_part = linear_part + self.tangents.sum(-2)
            across = self.features.T @ self.tangents
            matrix = matrix + across + across.mT
        return QuadraticForm(a * linear_part, 2 * b * matrix)

    def cheaper_form(self, kernel: ZonalKernel) -> QuadraticForm | None:
        """The quadratic form where there is one and it is cheaper to evaluate than the sum over centres."""
        return self.quadratic_form(kernel) if self.features.shape[1] ** 2 < self.products else None


@dataclass(frozen=True, eq=False)
class QuadraticForm:
    """ε(x) = v.x + x.H x / 2: what a kernel f(s) = a s + b s² makes of all centres, whatever their number.

    With f' = a + 2 b s: v = a Σ_j (α_j x_j + τ_j), H = 2 b Σ_j (α_j x_j x_jᵀ + x_j τ_jᵀ + τ_j x_jᵀ).

    Attributes:
        linear: (features,) v, eV; with a leading k of samples, whose axis then follows that of the environments in all results.
        hessian: (features, features) H, symmetric, eV; with a leading k of samples.
    """

    linear: Tensor
    hessian: Tensor

    @property
    def products(self) -> int:
        """Multiplications for ε and dε/dx of an environment."""
        return self.hessian.numel()

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ε (environments,) and dε/dx (environments, features)."""
        if self.hessian.dim() == 3:
            slope = (x @ self.hessian.movedim(1, 0).flatten(1)).unflatten(1, self.linear.shape) + self.linear
            return 0.5 * torch.linalg.vecdot(x[:, None], slope + self.linear), slope
        slope = torch.addmm(self.linear, x, self.hessian)
        return 0.5 * (torch.linalg.vecdot(x, slope) + x @ self.linear), slope


@dataclass(frozen=True, eq=False)
class LowRankForm:
    """ε(x) = v.x + Σ_i s_i (u_i.x)² / 2: a quadratic form with k directions of its matrix, those that forces feel (fitting/low_rank.py).

    Attributes:
        linear: (features,) v, eV.
        values: (k,) s, k > 0, eV, of either sign.
        vectors: (features, k) u_i, of length 1, not orthogonal to each other.
    """

    linear: Tensor
    values: Tensor
    vectors: Tensor

    @staticmethod
    def from_stored(stored: StoredTensors, n_features: int, dtype: torch.dtype) -> LowRankForm:
        """That of a model file, with tensors called as the attributes; UserError if these do not fit each other and the descriptor."""
        values = stored.take("values", ("rank",), dtype)
        if not len(values):
            raise UserError("a low-rank mean has no directions.")
        vectors = stored.take("vectors", (n_features, len(values)), dtype)
        if bool(((vectors.square().sum(0) - 1).abs() > UNIT_TOLERANCE).any()):
            raise UserError("a direction of a low-rank mean has not length 1.")
        return LowRankForm(stored.take("linear", (n_features,), dtype), values, vectors)

    @property
    def products(self) -> int:
        """Multiplications for ε and dε/dx of an environment."""
        return 2 * self.vectors.numel()

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ε (environments,) and dε/dx (environments, features)."""
        along = x @ self.vectors
        scaled = along * self.values
        slope = torch.addmm(self.linear, scaled, self.vectors.T)
        return x @ self.linear + 0.5 * torch.linalg.vecdot(along, scaled), slope

    @property
    def rank(self) -> int:
        return self.vectors.shape[1]

    def stored(self) -> dict[str, Tensor]:
        """What from_stored takes."""
        return dict(vars(self))


@dataclass(frozen=True, eq=False)
class ProjectedCentres:
    """ε(x) = c + v.x + ε'(Wᵀx): a sum over centres in the k directions that forces feel (fitting/low_rank.py), for any kernel.

    ε' has the weights of the exact mean, and the centres y_j = Aᵀx_j and τ'_j = Aᵀτ_j. As AᵀW = 1, W Aᵀ is a projector, so that
    x.x_j becomes what this leaves of it; c and v make up for the rest, on average.

    Attributes:
        constant: (1,) c, eV; linear: (features,) v, eV.
        vectors: (features, k) W, whose columns are orthonormal; duals: (features, k) A.
        centres: ε'; kernel: of it.
    """

    constant: Tensor
    linear: Tensor
    vectors: Tensor
    duals: Tensor
    centres: MeanBlock
    kernel: ZonalKernel

    @staticmethod
    def from_exact(
        exact: MeanBlock, kernel: ZonalKernel, vectors: Tensor, duals: Tensor, constant: Tensor, linear: Tensor
    ) -> ProjectedCentres:
        """Of the exact mean."""
        centres = MeanBlock(exact.features @ duals, exact.weights, exact.tangents @ duals)
        return ProjectedCentres(constant, linear, vectors, duals, centres, kernel)

    @staticmethod
    def from_stored(stored: StoredTensors, exact: MeanBlock, kernel: ZonalKernel) -> ProjectedCentres:
        """That of a model file, with tensors called as the first four attributes; UserError if they do not fit the exact mean."""
        dtype, n_features = exact.features.dtype, exact.features.shape[1]
        vectors = stored.take("vectors", (n_features, "rank"), dtype)
        duals = stored.take("duals", vectors.shape, dtype)
        unit = torch.eye(vectors.shape[1], dtype=dtype, device=vectors.device)
        if not len(unit) or any(bool(((a.T @ vectors - unit).abs() > UNIT_TOLERANCE).any()) for a in (vectors, duals)):
            raise UserError("the directions of a mean of low rank are none, or do not make a projector.")
        others = stored.take("constant", (1,), dtype), stored.take("linear", (n_features,), dtype)
        return ProjectedCentres.from_exact(exact, kernel, vectors, duals, *others)

    @property
    def rank(self) -> int:
        return self.vectors.shape[1]

    @property
    def products(self) -> int:
        """Multiplications for ε and dε/dx of an environment."""
        return self.centres.products + 2 * self.vectors.numel()

    def stored(self) -> dict[str, Tensor]:
        """What from_stored takes beside the exact mean."""
        return {name: getattr(self, name) for name in ("constant", "linear", "vectors", "duals")}

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ε (environments,) and dε/dx (environments, features)."""
        energy, slope = self.centres(self.kernel, x @ self.vectors)
        return energy + x @ self.linear + self.constant, torch.addmm(self.linear, slope, self.vectors.T)


CheaperMean = QuadraticForm | LowRankForm | ProjectedCentres


def stored_low_rank(stored: StoredTensors, exact: MeanBlock, kernel: ZonalKernel) -> LowRankForm | ProjectedCentres:
    """The mean of low rank of a model file, of the form that its kernel has."""
    if kernel.quadratic is None:
        return ProjectedCentres.from_stored(stored, exact, kernel)
    return LowRankForm.from_stored(stored, exact.features.shape[1], exact.features.dtype)


@dataclass(frozen=True, eq=False)
class EnergyTerm:
    """One descriptor with its kernel and, for each central species, the mean of the local energies.

    Attributes:
        blocks: the exact mean by species.
        low_rank: the same by fewer directions, of species that have it; exact: whether predictions leave it aside.
    """

    descriptor: Descriptor
    kernel: ZonalKernel
    blocks: dict[int, MeanBlock]
    low_rank: dict[int, LowRankForm | ProjectedCentres] = field(default_factory=dict)
    exact: bool = True

    def environments(self, structures: Structures, pairs: Neighbors | None = None) -> StructureEnvironments:
        """Environments of structures as the descriptor has them; `pairs` as there."""
        return StructureEnvironments.from_structures(self.descriptor, structures, pairs)

    @cached_property
    def cheaper_means(self) -> dict[int, CheaperMean]:
        """What stands for sums over centres, by species: of low rank where that is wanted, quadratic forms where they are cheaper."""
        chosen: dict[int, CheaperMean] = {} if self.exact else dict(self.low_rank)
        for z, block in self.blocks.items():
            form = None if z in chosen or block.weights.dim() > 1 else block.cheaper_form(self.kernel)
            if form is not None:
                chosen[z] = form
        return chosen

    def kernel_profiles(self, environments: Environments) -> dict[int, Profile]:
        """Kernel of the environments of each species with all its centres: what mean and variances of local energies share.

        Not of species whose mean is of another form, which has no use for it.
        """
        out = {}
        for z, block in self.blocks.items():
            mine = environments.species == z
            if z not in self.cheaper_means and mine.any():
                out[z] = block.profile(self.kernel, environments.features[mine])
        return out

    def local_energies(
        self, environments: Environments, profiles: dict[int, Profile] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Posterior mean of local energies (environments,), eV, and its slopes with respect to the features (environments, features);
        with an axis of samples after that of environments where the blocks hold samples."""
        x, species = environments.features, environments.species
        distinct = species.bincount().nonzero()[:, 0].tolist()
        if len(distinct) == 1:
            return self._local_energies(distinct[0], x, profiles)
        local = x.new_zeros(len(x), *self._samples)
        slopes = x.new_empty(*local.shape, x.shape[1])
        for z in distinct:
            mine = (species == z).nonzero()[:, 0]
            local[mine], slopes[mine] = self._local_energies(z, x[mine], profiles)
        return local, slopes

    @property
    def _samples(self) -> tuple[int, ...]:
        return tuple(next(iter(self.blocks.values())).weights.shape[:-1]) if self.blocks else ()

    def _local_energies(self, z: int, x: Tensor, profiles: dict[int, Profile] | None) -> tuple[Tensor, Tensor]:
        if z in self.cheaper_means:
            return self.cheaper_means[z](x)
        if z not in self.blocks:
            none = x.new_zeros(len(x), *self._samples)
            return none, none[..., None].expand(*none.shape, x.shape[1])
        return self.blocks[z](self.kernel, x, (profiles or {}).get(z))
