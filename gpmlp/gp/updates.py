"""A triangular factor that changes with its data: rows and columns come and go in a fraction of the time of a new start."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from gpmlp.gp.posterior import RANK_TOLERANCE, RowFactor

PANEL = 32  # columns that LAPACK's QR of a triangle and rows takes together
Passes = Callable[
    [], Iterable[tuple[Tensor, Tensor]]
]  # each call streams (rows as the factor has them, new columns of these rows)


class DowndateError(ArithmeticError):
    """Rows cannot be removed: to working precision the rest would not be positive definite. Start again from the data."""


@dataclass(frozen=True, eq=False)
class Factor:
    """The posterior as [R | c]: RᵀR = I + AᵀA and Rᵀc = Aᵀy, where rows [A | y] are divided by their noise.

    Attributes:
        upper: (M, M + 1) R, upper triangular, and c.
        probe: (M,) a fixed random vector z.
        image: (M,) what RᵀR z is without R: I z plus the sum of Aᵀ(A z) over rows that came, less those that went.
        settled: backward error that had built up before the columns last changed.
        changes: number of updates since the factor was made from all rows.
    """

    upper: Tensor
    probe: Tensor
    image: Tensor
    settled: float = 0.0
    changes: int = 0

    @staticmethod
    def of(rows: Iterable[Tensor], columns: int) -> Factor:
        """From all rows (n, columns + 1), by QR as they stream by."""
        folded, probe = RowFactor(columns, 2 * columns), _probe(columns)
        image = probe.clone()
        eye = torch.eye(columns, dtype=torch.float64)
        folded.add(eye, torch.zeros(columns, dtype=torch.float64))
        for some in rows:
            folded.add(some[:, :-1], some[:, -1])
            image += some[:, :-1].T @ (some[:, :-1] @ probe)
        upper = folded.factor()
        if upper.shape[0] <= columns:  # no rows: what was added is still there as it was
            return Factor(upper[:columns], probe, image)
        upper = torch.linalg.qr(upper, mode="r").R[:columns]
        return Factor(upper, probe, image)

    @property
    def columns(self) -> int:
        return len(self.probe)

    @property
    def mean(self) -> Tensor:
        """(columns,) β = R⁻¹ c."""
        return torch.linalg.solve_triangular(self.upper[:, :-1], self.upper[:, -1:], upper=True)[:, 0]

    @property
    def condition(self) -> float:
        """Of R, a lower bound: ratio of its largest to its smallest diagonal entry."""
        diagonal = self.upper.diagonal().abs()
        return float(diagonal.max() / diagonal.min()) if len(diagonal) else 1.0

    @property
    def drift(self) -> float:
        """Backward error built up by updates: how far RᵀR z is from what it should be, relative."""
        r = self.upper[:, :-1]
        return self.settled + float((r.T @ (r @ self.probe) - self.image).norm() / self.image.norm().clamp_min(1e-300))

    def appended(self, rows: Tensor) -> Factor:
        """With rows (k, columns + 1) more: a QR that leaves the triangle's zeros alone, O(k columns²) (Foster et al. 2009, section 5)."""
        if not len(rows):
            return self
        size = self.columns + 1
        square = np.zeros((size, size), order="F")
        square[:-1] = self.upper.numpy()
        new, _, _, info = lapack.dtpqrt(0, min(PANEL, size), square, np.asfortranarray(rows.numpy()), 1, 0)
        if info:
            raise ArithmeticError(f"QR of new rows failed (dtpqrt: {info})")
        upper = torch.from_numpy(np.triu(new)[:-1].copy())
        a = rows[:, :-1]
        return replace(self, upper=upper, image=self.image + a.T @ (a @ self.probe), changes=self.changes + 1)

    def removed(self, rows: Tensor) -> Factor:
        """Without rows (k, columns + 1) that it holds: hyperbolic Householder transformations, O(k columns²).

        In the mixed form of Bojanczyk, Brent, Van Dooren, de Hoog (SIAM J. Sci. Stat. Comput. 8, 210 (1987)): for each column, with
        a the rows' entries and ρ² = r² - a.a, the factor's row becomes R' = (r R - aᵀA) / ρ, and A' = A - a (R + R') / (r + ρ).

        Raises:
            DowndateError: ρ² is not positive.
        """
        if not len(rows):
            return self
        upper, a = self.upper.numpy().copy(), rows.numpy().copy()
        for j in range(self.columns):
            r, column = upper[j, j], a[:, j].copy()
            left = r * r - column @ column
            if not left > 1e-14 * r * r:
                raise DowndateError(f"column {j} of {self.columns}: {left:.1e} of {r * r:.1e} would be left")
            rho = np.copysign(np.sqrt(left), r)
            old = upper[j, j:].copy()
            upper[j, j:] = (r * old - column @ a[:, j:]) / rho
            a[:, j:] -= np.outer(column / (r + rho), old + upper[j, j:])
        rest = rows[:, :-1]
        image = self.image - rest.T @ (rest @ self.probe)
        return replace(self, upper=torch.from_numpy(upper), image=image, changes=self.changes + 1)

    def extended(self, passes: Passes) -> Factor:
        """With columns (prior: the identity) more, behind the others: bordered in two passes over the rows.

        R r = Bᵀb by corrected semi-normal equations (Björck, Linear Algebra Appl. 88/89, 31 (1987)): with x = R⁻¹ R⁻ᵀ Bᵀ b, what
        is left of the new columns, e = b - B x, is factorised by QR itself and not through a difference of squares, and its
        remaining overlap with B corrects r.
        """
        r = self.upper[:, :-1]
        overlap = sum(old[:, :-1].T @ new for old, new in passes())
        if isinstance(overlap, int):
            raise ValueError("a factor is extended with rows; there are none")
        border = torch.linalg.solve_triangular(r.T, overlap, upper=False)
        x = torch.linalg.solve_triangular(r, border, upper=True)
        m = x.shape[1]
        rest = RowFactor(m, max(2 * m, 512))
        none = torch.zeros(len(x) + m, dtype=x.dtype)
        rest.add(torch.cat([-x, torch.eye(m, dtype=x.dtype)]), none)
        missed = -x
        for old, new in passes():
            left = new - old[:, :-1] @ x
            missed = missed + old[:, :-1].T @ left
            rest.add(left, old[:, -1])
        correction = torch.linalg.solve_triangular(r.T, missed, upper=False)
        corner = torch.linalg.qr(rest.factor(), mode="r").R[:m]
        behind = (
            corner[:, -1]
            - torch.linalg.solve_triangular(corner[:, :-1].T, (correction.T @ self.upper[:, -1])[:, None], upper=False)[
                :, 0
            ]
        )
        upper = torch.zeros(len(r) + m, len(r) + m + 1, dtype=x.dtype)
        upper[: len(r), : len(r)], upper[: len(r), len(r) : -1] = r, border + correction
        upper[: len(r), -1] = self.upper[:, -1]
        upper[len(r) :, len(r) : -1], upper[len(r) :, -1] = corner[:, :-1], behind
        return self._restarted(upper)

    def turned(self, turn: Callable[[Tensor], Tensor]) -> Factor:
        """In another basis, of all or some of its columns: RᵀR becomes Qᵀ RᵀR Q.

        Args:
            turn: rows [. | y] (n, columns + 1) -> [. Q | y], Q with orthonormal columns.
        """
        turned = turn(self.upper)
        return self._restarted(torch.linalg.qr(turned, mode="r").R[: turned.shape[1] - 1])

    def _restarted(self, upper: Tensor) -> Factor:
        """With other columns: the probe begins anew, and what had built up is remembered."""
        probe, r = _probe(len(upper)), upper[:, :-1]
        return Factor(upper, probe, r.T @ (r @ probe), self.drift, self.changes + 1)


def _probe(columns: int) -> Tensor:
    return torch.randn(columns, generator=torch.Generator().manual_seed(columns), dtype=torch.float64)


def bordered(lower: Tensor, cross: Tensor, corner: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor of [[K, C], [Cᵀ, N]] from that of K, without new columns that depend on others.

    Args:
        lower: (M, M) of K.
        cross, corner: (M, m) C and (m, m) N.

    Returns:
        (M + k, M + k) the factor, and which k of the new columns it has (sorted).
    """
    v = torch.linalg.solve_triangular(lower, cross, upper=False)
    # in units of the prior, of which RANK_TOLERANCE has to be left
    scale = corner.diagonal().clamp_min(1e-300).sqrt()
    rest = corner / (scale[:, None] * scale) - (v / scale).T @ (v / scale)
    _, pivots, rank, _ = lapack.dpstrf(rest.numpy(), tol=RANK_TOLERANCE, lower=1)
    kept = torch.as_tensor(pivots[:rank] - 1, dtype=torch.long).sort().values
    kept = kept[rest.diagonal()[kept] > RANK_TOLERANCE]
    size = len(lower) + len(kept)
    out = torch.zeros(size, size, dtype=lower.dtype)
    out[: len(lower), : len(lower)], out[len(lower) :, : len(lower)] = lower, v[:, kept].T
    out[len(lower) :, len(lower) :] = torch.linalg.cholesky(rest[kept][:, kept]) * scale[kept, None]
    return out, kept


def shrunk(lower: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor of some rows and columns of L Lᵀ, and the orthonormal Q with L[kept] = L' Qᵀ: whitened columns [.] become [.] Q."""
    q, r = torch.linalg.qr(lower[kept].T)
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(lower)
    return (r * sign[:, None]).T.contiguous(), q * sign
