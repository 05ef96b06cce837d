"""The posterior of the inducing variables (DTC): one small QR of the whitened triangular factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpmlp.gp.inducing import unwhiten_weights

FIXED = "given"  # rows that come with a noise of their own, already divided by it


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


def solve_posterior(
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
    weights = unwhiten_weights(signal * beta, lowers)
    diagonal = factor.diagonal().abs()
    return SparsePosterior(weights, factor, rms, float(diagonal.max() / diagonal.min()))
