"""Triangular factors in model files: packed, in single precision where that costs next to nothing, checked against what they are of."""

from __future__ import annotations

import torch
from torch import Tensor

from gpmlp.core.errors import UserError
from gpmlp.core.stored_tensors import StoredTensors
from gpmlp.gp import inducing
from gpmlp.gp.covariances import Block
from gpmlp.gp.functionals import FunctionalBlock
from gpmlp.gp.inducing import InducingBlock
from gpmlp.gp.kernels import ZonalKernel

STORED = 1e-4  # by which numbers of a file may disagree with one another, relative; centres may be in single precision
DOUBLE_COLUMNS = 1500  # up to which the posterior factor is kept in double precision; its size grows with the square
SINGLE_ERROR = 0.01  # of standard deviations that single precision may cost beyond
POWER_STEPS, POWER_VECTORS = 12, 4  # of the iteration that estimates this error
ROWS_CHECKED = 16  # of the prior covariance of a block, against its factor in a file


def rounded_factor(factor: Tensor) -> Tensor:
    """R rounded to single precision, if it has more than DOUBLE_COLUMNS columns and standard deviations keep to SINGLE_ERROR of themselves.

    With R' = (I + E) R, R'⁻ᵀ a = (I + E)⁻ᵀ R⁻ᵀ a, so that they change by no more than the largest singular value of E, which a block power
    iteration on E Eᵀ estimates.
    """
    if len(factor) <= DOUBLE_COLUMNS:
        return factor
    rounded = factor.float().to(factor)
    lost = rounded - factor
    vectors = torch.randn(len(factor), POWER_VECTORS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(POWER_STEPS):
        vectors = torch.linalg.qr(vectors.to(factor)).Q
        vectors = lost @ torch.linalg.solve_triangular(
            factor, torch.linalg.solve_triangular(factor.T, lost.T @ vectors, upper=False), upper=True
        )
    error = float(torch.linalg.matrix_norm(vectors, 2)) ** 0.5
    return rounded if error < SINGLE_ERROR else factor


def pack_triangle(lower: Tensor) -> Tensor:
    """The entries of a lower triangular matrix, row by row."""
    rows, columns = torch.tril_indices(*lower.shape, device=lower.device)
    return lower[rows, columns]


def stored_triangle(stored: StoredTensors, name: str, size: int, single: bool = False) -> Tensor:
    """A triangular factor of a model file, as pack_triangle made it; `single`: it may be in single precision."""
    rounded = single and name in stored and stored[name].dtype == torch.float32
    precision = torch.float32 if rounded else torch.float64
    entries = stored.take(name, (size * (size + 1) // 2,), precision).double()
    out = entries.new_zeros(size, size)
    rows, columns = torch.tril_indices(size, size, device=entries.device)
    out[rows, columns] = entries
    if bool((out.diagonal() == 0).any()):
        raise UserError(f"the tensor `{name}` is a singular triangle.")
    return out


def check_factor(lower: Tensor, kernel: ZonalKernel, block: Block) -> None:
    """Raise UserError unless L Lᵀ = K_uu, as far as its diagonal and some of its rows show; of functionals those of the first structure
    with any."""
    if not len(lower):
        return
    if isinstance(block, FunctionalBlock):
        leading = next(start for start in block.starts if start)
        first = block.select(torch.arange(leading, device=lower.device)).K_uu(kernel).to(lower)
        there = lower[: len(first), : len(first)]
        size = first.diagonal().clamp_min(0).sqrt()
        if bool(
            ((there @ there.T - first).abs() > STORED * (size[:, None] * size)).any() or (lower.diagonal() < 0).any()
        ):
            raise UserError("the factor of the prior covariance of inducing functionals is that of others.")
        return
    centre, direction = block.column_addresses
    chosen = torch.linspace(0, len(lower) - 1, min(len(lower), ROWS_CHECKED), device=lower.device).round().long()
    few = InducingBlock.from_addresses(
        block.species,
        block.features[centre[chosen]],
        block.tangents[centre[chosen]],
        torch.arange(len(chosen)),
        direction[chosen],
    )
    rows = inducing.K_uu(kernel, few, block).to(lower)
    of_value, of_slope, _ = kernel.profile(lower.new_ones(1))
    sizes = torch.where(direction < 0, of_value, of_slope).to(lower)
    scale = (sizes[chosen, None] * sizes).sqrt()
    unequal = ((lower[chosen] @ lower.T - rows).abs() > STORED * scale).any()
    if bool(unequal or (lower.diagonal() < 0).any() or (lower.square().sum(1) / sizes - 1).abs().max() > STORED):
        raise UserError("the factor of the prior covariance of inducing variables is that of others.")
