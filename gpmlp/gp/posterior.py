"""The posterior of the inducing variables: rows folded into triangular factors as they stream by, then one small QR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpmlp.gp.covariances import InducingBlock, covariance
from gpmlp.gp.kernels import ZonalKernel

FIXED = "given"  # rows that come with a noise of their own, already divided by it
RANK_TOLERANCE = 1e-9  # of the prior variance: a column with less of its own is dropped as dependent


class RowFactor:
    """The triangular factor R, RᵀR = AᵀA, of rows A = [K_ou | y] seen so far (tall-skinny QR, Golub & Van Loan 5.2).

    Holds at most (columns + 1)^2 numbers and a buffer of rows, however many rows come.
    """

    def __init__(self, columns: int, buffer_rows: int) -> None:
        self.columns = columns
        self.count = 0
        self._buffer_rows = max(buffer_rows, 1)
        self._parts: list[Tensor] = []
        self._pending = 0

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Fold in rows (n, columns) with their values (n,)."""
        if not len(values):
            return
        self._parts.append(torch.cat([rows, values[:, None]], dim=1))
        self.count += len(values)
        self._pending += len(values)
        if self._pending >= self._buffer_rows:
            self._compress()

    def _compress(self) -> None:
        stacked = torch.cat(self._parts) if len(self._parts) > 1 else self._parts[0]
        self._parts.clear()
        if stacked.shape[0] > self.columns + 1:
            stacked = torch.linalg.qr(stacked, mode="r").R
        self._parts.append(stacked)
        self._pending = 0

    def factor(self) -> Tensor:
        """(at most columns + 1, columns + 1) triangular factor, or the rows themselves where they are fewer."""
        if not self._parts:
            return torch.zeros(0, self.columns + 1, dtype=torch.float64)
        self._compress()
        return self._parts[0]


def independent_columns(kernel: ZonalKernel, block: InducingBlock) -> tuple[Tensor, Tensor, float]:
    """Drop linearly dependent inducing variables and factorise the covariance of the rest, K_uu = L Lᵀ.

    Returns:
        indices of the columns kept (sorted), L of those, and the jitter that had to be added (0 as a rule).
    """
    # in double precision whatever the features have; what their rounding makes up is no rank
    tolerance = max(RANK_TOLERANCE, 10 * torch.finfo(block.features.dtype).eps)
    block = replace(block, features=block.features.double(), tangents=block.tangents.double())
    everything = covariance(kernel, block, block)
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


def whiten(factor: Tensor, lowers: Sequence[Tensor]) -> Tensor:
    """[R L⁻ᵀ | y] for the block-diagonal L, in place of [R | y]; rows without y likewise."""
    start = 0
    for lower in lowers:
        here = slice(start, start + lower.shape[0])
        factor[:, here] = torch.linalg.solve_triangular(lower, factor[:, here].T, upper=False).T
        start = here.stop
    return factor


def unwhiten(factor: Tensor, lowers: Sequence[Tensor], chosen: Sequence[Tensor]) -> Tensor:
    """Columns `chosen` of each block of [R | y] again, from [R L⁻ᵀ | y]."""
    start, pieces = 0, []
    for lower, columns in zip(lowers, chosen, strict=True):
        here = slice(start, start + lower.shape[0])
        pieces.append(factor[:, here] @ lower[columns].T)
        start = here.stop
    return torch.cat([*pieces, factor[:, start:]], dim=1)


@dataclass(frozen=True, eq=False)
class SparsePosterior:
    """The distribution of the inducing variables given the data.

    Attributes:
        weights: (columns,) w with mean of a local energy k_xu w (signal variances included).
        factor: (columns, columns) upper triangular R in the whitened basis: RᵀR = I + D L⁻¹ K_uo Σ⁻¹ K_ou L⁻ᵀ D.
        rms: residual root mean square of the training observations by kind, in units of the label (per atom for energies).
        condition: of R (ratio of its largest to smallest diagonal entry, a lower bound).
    """

    weights: Tensor
    factor: Tensor
    rms: dict[str, float]
    condition: float


def solve(
    whitened: dict[str, Tensor],
    counts: dict[str, int],
    noise: dict[str, float],
    signal: Tensor,
    lowers: Sequence[Tensor],
) -> SparsePosterior:
    """QR of the stacked small factors, [A_k D / σ_k; I] β = [b_k / σ_k; 0], never the normal equations.

    Foster et al., JMLR 10, 857 (2009); the data enter only through the factors, so noise and signal may change freely.

    Args:
        whitened: by kind, [R L⁻ᵀ | y] (whiten).
        signal: (columns,) signal standard deviation of each column, eV: the diagonal of D.
    """
    columns = signal.shape[0]
    eye = torch.zeros(columns, columns + 1, dtype=signal.dtype, device=signal.device)
    eye.fill_diagonal_(1.0)
    scaled = []
    for kind, rows in whitened.items():
        part = rows / noise[kind]
        part[:, :columns] *= signal
        scaled.append(part)
    upper = torch.linalg.qr(torch.cat([*scaled, eye]), mode="r").R
    factor, right = upper[:columns, :columns], upper[:columns, columns]
    beta = torch.linalg.solve_triangular(factor, right[:, None], upper=True)[:, 0]
    rms = {}
    for kind, rows in whitened.items():
        residual = rows[:, columns] - rows[:, :columns] @ (signal * beta)
        rms[kind] = float((residual.square().sum() / max(counts[kind], 1)).sqrt())
    weights = unwhitened(signal * beta, lowers)
    diagonal = factor.diagonal().abs()
    return SparsePosterior(weights, factor, rms, float(diagonal.max() / diagonal.min()))


def unwhitened(coefficients: Tensor, lowers: Sequence[Tensor]) -> Tensor:
    """w = L⁻ᵀ v for the block-diagonal L."""
    weights, start = torch.empty_like(coefficients), 0
    for lower in lowers:
        here = slice(start, start + lower.shape[0])
        weights[here] = torch.linalg.solve_triangular(lower.T, coefficients[here, None], upper=True)[:, 0]
        start = here.stop
    return weights


def collapse(block: InducingBlock, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Fold all directions of a centre into one vector: ε(x) = Σ_j [α_j f(x·x_j) + f'(x·x_j) x·τ_j].

    Returns:
        α (M,) and τ_j = Σ_r α_jr t_jr (M, features).
    """
    m, r = block.tangents.shape[:2]
    full = weights.new_zeros(m + m * r)
    full[block.kept] = weights
    return full[:m], torch.einsum("mr,mrf->mf", full[m:].reshape(m, r), block.tangents)
