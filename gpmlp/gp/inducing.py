"""Inducing variables: values and directional derivatives of the local energy at chosen environments, and their covariance K_uu."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from scipy.linalg import lapack
from torch import Tensor

from gpmlp.gp.kernels import ZonalKernel

if TYPE_CHECKING:
    pass

RANK_TOLERANCE = 1e-9  # of the prior variance: a column with less of its own is dropped as dependent


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

    @property
    def n_columns(self) -> int:
        return self.columns.shape[0]

    @cached_property
    def vectors(self) -> Tensor:
        """(M + M R, features) the centres, then the tangents."""
        return torch.cat([self.features, self.tangents.flatten(0, 1)])

    @cached_property
    def by_direction(self) -> tuple[Tensor, Tensor]:
        """The centres, then the tangents by direction and centre, in the same shape as `vectors`; which of these (columns,) are kept."""
        m, r = self.tangents.shape[:2]
        centre, direction = self.column_addresses
        return torch.cat([self.features, self.tangents.transpose(0, 1).flatten(0, 1)]), centre + m * (direction + 1)

    @cached_property
    def has_all_columns(self) -> bool:
        """Whether no column was dropped and they are in order."""
        every = len(self.features) + self.tangents.shape[0] * self.tangents.shape[1]
        return self.n_columns == every and bool((self.columns[1:] > self.columns[:-1]).all())

    @cached_property
    def column_addresses(self) -> tuple[Tensor, Tensor]:
        """(columns,) centre and direction (-1 for the value) of each column."""
        m, r = self.tangents.shape[:2]
        gradient = self.columns - m
        is_value = gradient < 0
        centre = torch.where(is_value, self.columns, gradient // max(r, 1))
        return centre, torch.where(is_value, -1, gradient % max(r, 1))

    def take_columns(self, full: Tensor) -> Tensor:
        return full if self.has_all_columns else full[..., self.columns]


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


def independent_columns(kernel: ZonalKernel, block: InducingBlock) -> tuple[Tensor, Tensor, float]:
    """Drop linearly dependent inducing variables and factorise the covariance of the rest, K_uu = L Lᵀ.

    Returns:
        indices of the columns kept (sorted), L of those, and the jitter that had to be added (0 as a rule).
    """
    # in double precision whatever the features have; what their rounding makes up is no rank
    tolerance = max(RANK_TOLERANCE, 10 * torch.finfo(block.features.dtype).eps)
    block = replace(block, features=block.features.double(), tangents=block.tangents.double())
    everything = K_uu(kernel, block, block)
    kept = pivoted_rank(everything, tolerance)
    k_uu = everything[kept][:, kept]
    jitter = 0.0
    for attempt in range(8):
        shifted = k_uu if not jitter else k_uu + jitter * torch.eye(len(k_uu), dtype=k_uu.dtype, device=k_uu.device)
        lower, failed = torch.linalg.cholesky_ex(shifted)
        if not int(failed):
            return kept, lower, jitter
        jitter = 1e-12 * 10**attempt
    raise ArithmeticError(
        f"the covariance of {len(kept)} inducing variables is not positive definite even with jitter {jitter}"
    )


def pivoted_rank(matrix: Tensor, tolerance: float) -> Tensor:
    """Sorted indices of the columns that a pivoted Cholesky keeps: own variance above tolerance x prior variance."""
    from scipy.linalg import lapack

    scale = matrix.diagonal().clamp_min(0).sqrt()
    alive = (scale > 0).nonzero()[:, 0]
    unit = (matrix[alive][:, alive] / (scale[alive, None] * scale[None, alive])).cpu().double().numpy()
    _, pivots, rank, _ = lapack.dpstrf(unit, tol=tolerance, lower=1)
    return alive[torch.as_tensor(pivots[:rank] - 1, device=matrix.device, dtype=torch.long).sort().values]


def whiten_rows(factor: Tensor, lowers: Sequence[Tensor]) -> Tensor:
    """[R L⁻ᵀ | y] for the block-diagonal L, in place of [R | y]; rows without y likewise."""
    start = 0
    for lower in lowers:
        here = slice(start, start + lower.shape[0])
        factor[:, here] = torch.linalg.solve_triangular(lower, factor[:, here].T, upper=False).T
        start = here.stop
    return factor


def unwhiten_columns(factor: Tensor, lowers: Sequence[Tensor], chosen: Sequence[Tensor]) -> Tensor:
    """Columns `chosen` of each block of [R | y] again, from [R L⁻ᵀ | y]."""
    start, pieces = 0, []
    for lower, columns in zip(lowers, chosen, strict=True):
        here = slice(start, start + lower.shape[0])
        pieces.append(factor[:, here] @ lower[columns].T)
        start = here.stop
    return torch.cat([*pieces, factor[:, start:]], dim=1)


def unwhiten_weights(coefficients: Tensor, lowers: Sequence[Tensor]) -> Tensor:
    """w = L⁻ᵀ v for the block-diagonal L."""
    weights, start = torch.empty_like(coefficients), 0
    for lower in lowers:
        here = slice(start, start + lower.shape[0])
        weights[here] = torch.linalg.solve_triangular(lower.T, coefficients[here, None], upper=True)[:, 0]
        start = here.stop
    return weights


def extend_cholesky(
    lower: Tensor, cross: Tensor, corner: Tensor, tolerance: float = RANK_TOLERANCE
) -> tuple[Tensor, Tensor]:
    """Cholesky factor of [[K, C], [Cᵀ, N]] from that of K, without new columns that depend on others.

    Args:
        lower: (M, M) of K.
        cross, corner: (M, m) C and (m, m) N.
        tolerance: of the prior variance, with less of which of its own left a column depends on others.

    Returns:
        (M + k, M + k) the factor, and which k of the new columns it has (sorted).
    """
    v = torch.linalg.solve_triangular(lower, cross, upper=False)
    # in units of the prior, of which the tolerance has to be left
    scale = corner.diagonal().clamp_min(1e-300).sqrt()
    rest = corner / (scale[:, None] * scale) - (v / scale).T @ (v / scale)
    _, pivots, rank, _ = lapack.dpstrf(rest.numpy(), tol=tolerance, lower=1)
    kept = torch.as_tensor(pivots[:rank] - 1, dtype=torch.long).sort().values
    kept = kept[rest.diagonal()[kept] > tolerance]
    size = len(lower) + len(kept)
    out = torch.zeros(size, size, dtype=lower.dtype)
    out[: len(lower), : len(lower)], out[len(lower) :, : len(lower)] = lower, v[:, kept].T
    out[len(lower) :, len(lower) :] = torch.linalg.cholesky(rest[kept][:, kept]) * scale[kept, None]
    return out, kept


def restrict_cholesky(lower: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor of some rows and columns of L Lᵀ, and the orthonormal Q with L[kept] = L' Qᵀ: whitened columns [.] become [.] Q."""
    q, r = torch.linalg.qr(lower[kept].T)
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(lower)
    return (r * sign[:, None]).T.contiguous(), q * sign


def join_blocks(block: InducingBlock, new: InducingBlock) -> InducingBlock:
    """One block with the columns of both in turn."""
    m, r = block.tangents.shape[:2]
    more = len(new.features)

    def moved(kept: Tensor, own: int, before: int) -> Tensor:
        gradient = kept - own
        return torch.where(gradient < 0, kept + before, m + more + before * r + gradient)

    kept = torch.cat([moved(block.columns, m, 0), moved(new.columns, more, m)])
    return InducingBlock(
        block.species,
        torch.cat([block.features, new.features]),
        torch.cat([block.tangents, new.tangents]),
        kept,
    )


def select_centers(block: InducingBlock, stays: Tensor) -> tuple[InducingBlock, Tensor]:
    """The block with only those centres (mask), and which of its columns that leaves."""
    r = block.tangents.shape[1]
    centre, direction = block.column_addresses
    columns = stays[centre].nonzero()[:, 0]
    place = (stays.long().cumsum(0) - 1)[centre[columns]]
    gradient = int(stays.sum()) + place * r + direction[columns]
    kept = torch.where(direction[columns] < 0, place, gradient)
    return InducingBlock(block.species, block.features[stays], block.tangents[stays], kept), columns


def select_columns(block: InducingBlock, chosen: Tensor) -> InducingBlock:
    """The block with the chosen columns only, and without the centres and tangents that none of them needs."""
    centre, direction = (part[chosen] for part in block.column_addresses)
    m, r = int(centre.max()) + 1, int(direction.max()) + 1
    kept = torch.where(direction < 0, centre, m + centre * r + direction)
    return InducingBlock(block.species, block.features[:m], block.tangents[:m, :r].contiguous(), kept)
