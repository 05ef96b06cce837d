"""Inducing variables: values and directional derivatives of the local energy at chosen environments; K_uu = L Lᵀ, and whitening by L."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from scipy.linalg import lapack
from torch import Tensor

from gpmlp.core.errors import UserError
from gpmlp.core.stored_tensors import StoredTensors
from gpmlp.gp.kernels import ZonalKernel

RANK_TOLERANCE = 1e-9  # of the prior variance: a column with less of it left given the others is dropped as dependent
DIRECTIONS_TOLERANCE = 1e-4  # of products of directions in a file, which may be in single precision
JITTERS = (0.0, *(1e-12 * 10.0**k for k in range(7)))  # tried in turn, in units of the prior variance


@dataclass(frozen=True, eq=False)
class InducingBlock:
    """Inducing variables of one central species: at each centre a value and R directional derivatives.

    Attributes:
        species: Z.
        features: (M, features) x_j, unit norm.
        tangents: (M, R, features) t_jr, orthonormal among themselves and orthogonal to x_j; zero rows where there are fewer.
        columns: (columns,) indices into the M values followed by M * R derivatives, those not linearly dependent on others.
    """

    species: int
    features: Tensor
    tangents: Tensor
    columns: Tensor

    @staticmethod
    def from_addresses(
        species: int, features: Tensor, tangents: Tensor, centre: Tensor, direction: Tensor
    ) -> InducingBlock:
        """With columns given by their centre and direction (-1 for the value)."""
        m, r = tangents.shape[:2]
        return InducingBlock(
            species, features, tangents, torch.where(direction < 0, centre, m + centre * r + direction)
        )

    @staticmethod
    def from_stored(species: int, features: Tensor, stored: StoredTensors) -> InducingBlock:
        """That of a model file; UserError if its columns are none of its centres and tangents, or these are no directions."""
        m, d = features.shape
        tangents = stored.take("tangents", (m, "directions", d), features.dtype)
        gram = tangents @ tangents.mT
        there = torch.diag_embed((gram.diagonal(dim1=1, dim2=2) > 0.5).to(gram))
        across = (tangents @ features[:, :, None]).abs()
        if bool(((gram - there).abs() > DIRECTIONS_TOLERANCE).any() or (across > DIRECTIONS_TOLERANCE).any()):
            raise UserError("the tangents of a centre are not orthonormal, or not orthogonal to its features.")
        columns = stored.take("kept", ("columns",), torch.int64)
        if len(columns.unique()) < len(columns) or bool(
            ((columns < 0) | (columns >= m * (1 + tangents.shape[1]))).any()
        ):
            raise UserError("a column of the posterior factor belongs to no inducing variable, or one belongs to two.")
        return InducingBlock(species, features, tangents, columns)

    def to(self, like: Tensor) -> InducingBlock:
        """In the precision and on the device of a tensor."""
        return replace(self, features=self.features.to(like), tangents=self.tangents.to(like))

    def stored(self) -> dict[str, Tensor]:
        """What a model file holds of it, besides the centres."""
        return {"tangents": self.tangents, "kept": self.columns}

    @property
    def n_columns(self) -> int:
        return self.columns.shape[0]

    def leading(self, n: int) -> InducingBlock:
        """With so many of its leading columns, and the centres that they need."""
        columns, (centre, direction) = self.columns[:n], self.column_addresses
        m = 1 + int(centre[:n].max())
        return InducingBlock.from_addresses(
            self.species, self.features[:m], self.tangents[:m], centre[: len(columns)], direction[: len(columns)]
        )

    @property
    def central_species(self) -> tuple[int, ...]:
        return (self.species,)

    @property
    def relative(self) -> dict[int, float]:
        """By species, standard deviation of local energies in units of the block's signal."""
        return {self.species: 1.0}

    def centres(self, z: int) -> Tensor:
        """(M, features) of the species, which is the block's."""
        return self.features

    def collapse(self, weights: Tensor, z: int) -> tuple[Tensor, Tensor]:
        """Fold all directions of a centre into one vector: ε(x) = Σ_j [α_j f(x·x_j) + f'(x·x_j) x·τ_j].

        Args:
            weights: (..., columns).

        Returns:
            α (..., M) and τ_j = Σ_r α_jr t_jr (..., M, features), or (..., 0, features) where no centre has directions.
        """
        alpha, on_tangents = self.expand_columns(weights)
        tau = torch.einsum("...mr,mrf->...mf", on_tangents, self.tangents)
        return alpha, tau if self.tangents.shape[1] else tau[..., :0, :]

    def leading_columns(self, share: float) -> Tensor:
        """Positions of the columns of that share of the centres, the most important ones."""
        centre, _ = self.column_addresses
        return (centre < max(1, int(share * len(self.features)))).nonzero()[:, 0]

    def select(self, chosen: Tensor) -> InducingBlock:
        """The block with the chosen columns only, and without the last centres and tangents that none of them needs."""
        centre, direction = (part[chosen] for part in self.column_addresses)
        m, r = int(centre.max()) + 1, int(direction.max()) + 1
        features, tangents = self.features[:m], self.tangents[:m, :r].contiguous()
        return InducingBlock.from_addresses(self.species, features, tangents, centre, direction)

    @cached_property
    def column_addresses(self) -> tuple[Tensor, Tensor]:
        """(columns,) centre and direction (-1 for the value) of each column."""
        m, r = self.tangents.shape[:2]
        gradient = self.columns - m
        is_value = gradient < 0
        centre = torch.where(is_value, self.columns, gradient // max(r, 1))
        return centre, torch.where(is_value, -1, gradient % max(r, 1))

    @cached_property
    def vectors(self) -> Tensor:
        """(M + M R, features) the centres, then the tangents."""
        return torch.cat([self.features, self.tangents.flatten(0, 1)])

    @cached_property
    def by_direction(self) -> tuple[Tensor, Tensor]:
        """The centres, then the tangents by direction and centre, in the same shape as `vectors`; which of these the columns are."""
        centre, direction = self.column_addresses
        vectors = torch.cat([self.features, self.tangents.transpose(0, 1).flatten(0, 1)])
        return vectors, centre + len(self.features) * (direction + 1)

    @cached_property
    def has_all_columns(self) -> bool:
        """Whether no column was dropped and they are in order."""
        return self.n_columns == len(self.vectors) and bool((self.columns[1:] > self.columns[:-1]).all())

    def take_columns(self, full: Tensor) -> Tensor:
        """(..., columns) of a tensor (..., M + M R)."""
        return full if self.has_all_columns else full[..., self.columns]

    def expand_columns(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (..., columns) as those of the values (..., M) and of the derivatives (..., M, R), zero where there is no column."""
        m, r = self.tangents.shape[:2]
        full = weights.new_zeros(*weights.shape[:-1], m + m * r)
        full[..., self.columns] = weights
        return full[..., :m], full[..., m:].unflatten(-1, (m, r))


def join_blocks(block: InducingBlock, new: InducingBlock) -> InducingBlock:
    """One block with the columns of both in turn."""
    (centre, direction), (more, new_direction) = block.column_addresses, new.column_addresses
    return InducingBlock.from_addresses(
        block.species,
        torch.cat([block.features, new.features]),
        torch.cat([block.tangents, new.tangents]),
        torch.cat([centre, more + len(block.features)]),
        torch.cat([direction, new_direction]),
    )


def select_centers(block: InducingBlock, stays: Tensor) -> tuple[InducingBlock, Tensor]:
    """The block with only those centres (mask), and which of its columns that leaves."""
    centre, direction = block.column_addresses
    columns = stays[centre].nonzero()[:, 0]
    place = (stays.long().cumsum(0) - 1)[centre[columns]]
    features, tangents = block.features[stays], block.tangents[stays]
    return InducingBlock.from_addresses(block.species, features, tangents, place, direction[columns]), columns


def K_uu(kernel: ZonalKernel, a: InducingBlock, b: InducingBlock) -> Tensor:
    """(columns of a, columns of b) covariance of inducing variables of one species, unit signal variance.

    value-value f(s); value-gradient f'(s) (x_j . t_ks); gradient-gradient f''(s) (x_j . t_ks)(t_jr . x_k) + f'(s)(t_jr . t_ks).
    """
    (m, r), (n, q) = a.tangents.shape[:2], b.tangents.shape[:2]
    dots = a.vectors @ b.vectors.T
    value, first, second = kernel.profile(dots[:m, :n])
    x_t = dots[:m, n:].reshape(m, n, q)
    t_x = dots[m:, :n].reshape(m, r, n)
    t_t = dots[m:, n:].reshape(m, r, n, q)
    out = torch.empty_like(dots)
    out[:m, :n] = value
    out[:m, n:] = (first[:, :, None] * x_t).reshape(m, n * q)
    out[m:, :n] = (first[:, None, :] * t_x).reshape(m * r, n)
    mixed = t_t * first[:, None, :, None]
    mixed += second[:, None, :, None] * t_x[:, :, :, None] * x_t[:, None, :, :]
    out[m:, n:] = mixed.reshape(m * r, n * q)
    return out[a.columns][:, b.columns]


def pivoted_cholesky(matrix: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Order (rank,) and values (rank,) of the pivots of a positive semi-definite matrix: of what is left given those before, always the
    largest variance, as long as it is above `tolerance` (LAPACK's dpstrf; Higham, Numer. Math. 63, 465 (1990))."""
    if not len(matrix):
        return torch.zeros(0, dtype=torch.long, device=matrix.device), matrix.new_zeros(0)
    lower, order, rank, _ = lapack.dpstrf(matrix.cpu().double().numpy(), tol=tolerance, lower=1)
    values = torch.from_numpy(lower.diagonal()[:rank].copy()).square()
    return torch.as_tensor(order[:rank] - 1, dtype=torch.long, device=matrix.device), values.to(matrix)


def rank_tolerance(features: Tensor) -> float:
    """Share of the prior variance below which a column counts as dependent: what rounding of the features makes up is no rank."""
    return max(RANK_TOLERANCE, 10 * torch.finfo(features.dtype).eps)


def independent_columns(kernel: ZonalKernel, block: InducingBlock) -> tuple[Tensor, Tensor, float]:
    """Drop linearly dependent inducing variables and factorise the covariance of the rest, K_uu = L Lᵀ, in double precision.

    Returns:
        indices of the columns kept (sorted), L of those, and the jitter that had to be added (0 as a rule).
    """
    tolerance = rank_tolerance(block.features)
    block = replace(block, features=block.features.double(), tangents=block.tangents.double())
    return independent_factor(K_uu(kernel, block, block), tolerance)


def independent_factor(everything: Tensor, tolerance: float) -> tuple[Tensor, Tensor, float]:
    """`independent_columns` of a covariance (columns, columns) with diagonal entries of about 1."""
    independent = pivoted_rank(everything, tolerance)
    k_uu = everything[independent][:, independent]
    for jitter in JITTERS:
        shifted = k_uu if not jitter else k_uu + jitter * torch.eye(len(k_uu), dtype=k_uu.dtype, device=k_uu.device)
        # L Lᵀ = K_uu
        lower, failed = torch.linalg.cholesky_ex(shifted)
        if not int(failed):
            return independent, lower, jitter
    raise ArithmeticError(
        f"the covariance of {len(independent)} inducing variables is not positive definite even with jitter {JITTERS[-1]}"
    )


def pivoted_rank(matrix: Tensor, tolerance: float) -> Tensor:
    """Sorted indices of the columns that a pivoted Cholesky keeps: variance given the others above tolerance x prior variance."""
    scale = matrix.diagonal().clamp_min(0).sqrt()
    alive = (scale > 0).nonzero()[:, 0]
    unit = matrix[alive][:, alive] / (scale[alive, None] * scale[None, alive])
    return alive[pivoted_cholesky(unit, tolerance)[0].sort().values]


def extend_cholesky(
    lower: Tensor, cross: Tensor, corner: Tensor, tolerance: float = RANK_TOLERANCE
) -> tuple[Tensor, Tensor]:
    """Cholesky factor of [[K, C], [Cᵀ, N]] from that of K, without new columns that depend on others.

    Args:
        lower: (M, M) of K.
        cross, corner: (M, m) C and (m, m) N.
        tolerance: share of the prior variance; a column with less of it left given the others is dependent.

    Returns:
        (M + k, M + k) the factor, and which k of the new columns it has (sorted).
    """
    v = torch.linalg.solve_triangular(lower, cross, upper=False)
    # in units of the prior, of which the tolerance has to be left
    scale = corner.diagonal().clamp_min(1e-300).sqrt()
    rest = corner / (scale[:, None] * scale) - (v / scale).T @ (v / scale)
    independent = pivoted_cholesky(rest, tolerance)[0].sort().values
    independent = independent[rest.diagonal()[independent] > tolerance]
    size = len(lower) + len(independent)
    out = torch.zeros(size, size, dtype=lower.dtype)
    out[: len(lower), : len(lower)], out[len(lower) :, : len(lower)] = lower, v[:, independent].T
    out[len(lower) :, len(lower) :] = (
        torch.linalg.cholesky(rest[independent][:, independent]) * scale[independent, None]
    )
    return out, independent


def restrict_cholesky(lower: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor of these rows and columns of L Lᵀ, and Q, orthonormal, with L[columns] = L' Qᵀ: whitened columns [.] become [.] Q."""
    q, r = torch.linalg.qr(lower[columns].T)
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(lower)
    return (r * sign[:, None]).T.contiguous(), q * sign


def whiten_rows(rows: Tensor, lowers: Sequence[Tensor]) -> Tensor:
    """[K_ou L⁻ᵀ | y] for the block-diagonal L, in place of [K_ou | y], with or without y; likewise of a triangular factor [R | y]."""
    for part, lower in zip(_blocks(rows, lowers), lowers, strict=False):
        part.copy_(torch.linalg.solve_triangular(lower, part.T, upper=False).T)
    return rows


def unwhiten_columns(rows: Tensor, lowers: Sequence[Tensor], chosen: Sequence[Tensor]) -> Tensor:
    """Columns `chosen` of each block of [K_ou | y] again, from [K_ou L⁻ᵀ | y]."""
    *parts, y = _blocks(rows, lowers)
    picked = [part @ lower[columns].T for part, lower, columns in zip(parts, lowers, chosen, strict=True)]
    return torch.cat([*picked, y], dim=1)


def unwhiten_weights(coefficients: Tensor, lowers: Sequence[Tensor]) -> Tensor:
    """w = L⁻ᵀ v for the block-diagonal L."""
    parts = coefficients[:, None].split([len(lower) for lower in lowers])
    solved = (torch.linalg.solve_triangular(low.T, v, upper=True) for low, v in zip(lowers, parts, strict=True))
    return torch.cat([coefficients[:0], *(weights[:, 0] for weights in solved)])


def _blocks(rows: Tensor, lowers: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Views of the columns of each block, and of what follows them."""
    widths = [len(lower) for lower in lowers]
    return rows.split([*widths, rows.shape[1] - sum(widths)], dim=1)
