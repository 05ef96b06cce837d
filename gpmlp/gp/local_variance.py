"""Posterior variances of local energies of one central species, by a few matrix products instead of triangular solves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpmlp.core.errors import UserError

LEADING = 128  # columns of a block that are; twice, four times as many where rounding asks for that; all where that is half of them
TOLERANCE = 1e-4  # what rounding may do to standard deviations, of themselves, at all inducing variables but
EXEMPT = 0.01  # of them, or
MEASURED = 256  # of them, or up to twice as many, where there are more
NEGLIGIBLE = 1e-11  # of the prior variance: what double precision leaves of differences from it
TINY = 1e-15  # of the largest eigenvalue: below, there is nothing but rounding


def inducing_variance(prior: Tensor | float, explained: Tensor, share: float) -> Tensor:
    """w [k_gg - k_gu K_uu⁻¹ k_ug], what the inducing set cannot represent: never negative, as an exact difference is not.

    Args:
        prior: k_gg; explained: k_gu K_uu⁻¹ k_ug; share: w, 1 for DTC (Quiñonero-Candela, Rasmussen 2005, eq. 20).
    """
    return share * (prior - explained).clamp_min(0)


@dataclass(frozen=True, eq=False)
class LocalVariance:
    """Squares |a|² and |R⁻ᵀa|² of a = D L⁻¹ k_ux (VarianceModel.whiten), for local energies of one species and its inducing variables.

    The leading columns (1) of each block are taken off in double precision. What they leave of the others (2) is small, and so is what
    rounding does to it: the rest is in single precision, in a basis in which both squares are read off the same numbers. With
    P = (RᵀR)⁻¹ among these columns, P₂₂ = V p Vᵀ:

        a₁ = D₁ L₁₁⁻¹ k₁,  r = k₂ − L₂₁ D₁⁻¹ a₁,  y = Vᵀ D₂ L₂₂⁻¹ r,  |a|² = |a₁|² + |y|²,
        |R⁻ᵀa|² = aᵀP a = |S a₁|² + |C a₁ + √p y|²  with  C = p^-½ Vᵀ P₂₁,  SᵀS = P₁₁ − CᵀC.

    Nothing is left out: the squares are those of all columns, to rounding. How much that is, is measured at the inducing variables,
    where standard deviations are least; decision 009 has what it is elsewhere.

    Attributes:
        leading: for each block, how many of its columns are.
        whiten_leading: (leading, leading) D₁ L₁₁⁻¹; posterior_leading: (leading, leading) S; project: (others, leading) L₂₁ D₁⁻¹.
        whiten_rest: (others, others) Vᵀ D₂ L₂₂⁻¹; posterior_cross: (others, leading) C; posterior_rest: (others,) √p. These three in
            single precision.
    """

    leading: tuple[int, ...]
    whiten_leading: Tensor
    posterior_leading: Tensor
    project: Tensor
    whiten_rest: Tensor
    posterior_cross: Tensor
    posterior_rest: Tensor

    @staticmethod
    def from_posterior(lowers: Sequence[Tensor], signal: Tensor, posterior: Tensor, amplitude: float) -> LocalVariance:
        """Of the blocks of one species, one for each descriptor that has any; with as many leading columns as TOLERANCE asks for.

        Args:
            lowers: L of each; signal: (columns,) δ of each column, eV.
            posterior: (columns, columns) P, (RᵀR)⁻¹ among them.
            amplitude: w of the VarianceModel.
        """
        size = LEADING
        while True:
            leading = tuple(len(lower) if len(lower) <= 2 * size else size for lower in lowers)
            split = LocalVariance._split(lowers, signal, posterior, leading)
            if not len(split.whiten_rest) or split._rounding(lowers, signal, posterior, amplitude) <= TOLERANCE:
                return split
            size *= 2

    @staticmethod
    def _split(lowers: Sequence[Tensor], signal: Tensor, posterior: Tensor, leading: tuple[int, ...]) -> LocalVariance:
        n, order = sum(leading), leading_first([len(lower) for lower in lowers], leading)
        lower, d = torch.block_diag(*lowers)[order][:, order], signal[order]
        posterior = posterior[order][:, order]
        unit = torch.eye(n, dtype=signal.dtype, device=signal.device)
        whiten_leading = d[:n, None] * torch.linalg.solve_triangular(lower[:n, :n], unit, upper=False)
        p, v = torch.linalg.eigh(posterior[n:, n:])
        p = p.clamp_min(TINY * float(p.max())) if len(p) else p
        cross = (v.T @ posterior[n:, :n]) / p.sqrt()[:, None]
        rest = torch.linalg.solve_triangular(lower[n:, n:], v.T * d[n:], upper=False, left=False)
        left, w = torch.linalg.eigh(posterior[:n, :n] - cross.T @ cross)
        posterior_leading = left.clamp_min(0).sqrt()[:, None] * w.T
        single = rest.float(), cross.float(), p.sqrt().float()
        return LocalVariance(leading, whiten_leading, posterior_leading, lower[n:, :n] / d[:n], *single)

    def __call__(self, pieces: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What the inducing set explains of the prior variance, and what the data leave of that, (environments,) eV².

        Args:
            pieces: for each block, (environments, columns) covariances of local energies with it, unit signal variance.
        """
        first = [piece[:, :n] for piece, n in zip(pieces, self.leading, strict=True)]
        a = _together(first).to(self.whiten_leading) @ self.whiten_leading.T
        explained, left = a.square().sum(1), (a @ self.posterior_leading.T).square().sum(1)
        if not len(self.whiten_rest):
            return explained, left
        others = _together([piece[:, n:] for piece, n in zip(pieces, self.leading, strict=True)]).to(a)
        y = torch.addmm(others, a, self.project.T, alpha=-1).float() @ self.whiten_rest.T
        z = torch.addcmul(a.float() @ self.posterior_cross.T, y, self.posterior_rest)
        return explained + _squares(y), left + _squares(z)

    def _rounding(self, lowers: Sequence[Tensor], signal: Tensor, posterior: Tensor, amplitude: float) -> float:
        """By how much of themselves standard deviations are off at the inducing variables, all but EXEMPT of (some of) them.

        There k is a row of K = L Lᵀ, so that a is one of L D, and nothing is left unexplained.
        """
        whole = torch.block_diag(*lowers)
        rows = whole[:: max(1, len(whole) // MEASURED)]
        a = rows * signal
        pieces = zip(rows.split([len(lower) for lower in lowers], dim=1), lowers, strict=True)
        explained, left = self([piece @ lower.T for piece, lower in pieces])
        prior, exact = a.square().sum(1), ((a @ posterior) * a).sum(1)
        off = max(1.0, amplitude) * (explained - prior).abs() + (left - exact).abs()
        return float((0.5 * off / (exact + NEGLIGIBLE * prior)).quantile(1 - EXEMPT))


@dataclass(frozen=True, eq=False)
class ReducedVariance:
    """v = |T k|² of the covariances k with some leading columns: nearly the variance of local energies of one species, what the inducing
    set cannot represent included (fitting/reduced_variance.py).

    Attributes:
        leading: for each block, how many of its columns.
        triangle: (columns, columns) T, lower triangular, eV.
    """

    leading: tuple[int, ...]
    triangle: Tensor

    def columns(self, blocks: Sequence[Tensor]) -> Tensor:
        """Those among the columns of all blocks, each with a row in its entry of `blocks`, side by side."""
        widths = torch.tensor([0, *(len(block) for block in blocks)]).cumsum(0).tolist()
        return torch.cat([torch.arange(s, s + n) for s, n in zip(widths, self.leading, strict=False)])

    def __call__(self, pieces: Sequence[Tensor]) -> Tensor:
        """v, (environments,) eV², from covariances as LocalVariance takes them."""
        rows = _together([piece[:, :n] for piece, n in zip(pieces, self.leading, strict=True)])
        return (rows.to(self.triangle) @ self.triangle.T).square().sum(1)


def check_leading(leading: Sequence[int], widths: Sequence[int]) -> None:
    """Raise UserError unless these are leading columns, some of each block of so many."""
    if len(leading) != len(widths) or any(not 0 < n <= w for n, w in zip(leading, widths, strict=True)):
        raise UserError("variances of fewer columns are of other inducing variables.")


def leading_first(widths: Sequence[int], leading: Sequence[int]) -> Tensor:
    """Columns of blocks side by side, the leading ones of all blocks before all others."""
    first = torch.cat([torch.arange(w) < n for w, n in zip(widths, leading, strict=True)])
    return torch.cat([first.nonzero()[:, 0], (~first).nonzero()[:, 0]])


def _together(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=1)


def _squares(rows: Tensor) -> Tensor:
    """Sums of squares of each row, added up in double precision."""
    return (rows * rows).sum(1, dtype=torch.float64)
