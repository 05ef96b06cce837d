"""QR factors of covariance rows: streamed (tall-skinny QR), and updated or downdated as rows and columns come and go."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

PANEL = 32  # columns that LAPACK's QR of a triangle and rows takes together
SLICE = 256  # rows, and columns, that a downdate takes together
LEAST_LEFT = 1e-6  # of the square of a diagonal entry: with less left, a downdate has lost more than six digits of it
Passes = Callable[
    [], Iterable[tuple[Tensor, Tensor]]
]  # each call streams (rows as the factor has them, new columns of these rows)


class DowndateError(ArithmeticError):
    """Rows cannot be removed: what would be left of a diagonal entry is lost in rounding. Factorise the remaining rows anew."""


@dataclass(frozen=True, eq=False)
class PosteriorFactor:
    """The posterior as [R | c]: RᵀR = I + AᵀA and Rᵀc = Aᵀy, where rows [A | y] are divided by their noise.

    Attributes:
        upper: (M, M + 1) R, upper triangular, and c.
        changes: number of updates since the factor was made from all rows.
        drift: error of the factor when it was last measured; initial_drift: when it was made.
    """

    upper: Tensor
    changes: int = 0
    drift: float = 0.0
    initial_drift: float = 0.0

    @staticmethod
    def from_rows(rows: Iterable[Tensor], columns: int) -> PosteriorFactor:
        """From all rows (n, columns + 1), by QR as they stream by."""
        folded = RowFactor(columns, 2 * columns)
        folded.add(torch.eye(columns, dtype=torch.float64), torch.zeros(columns, dtype=torch.float64))
        for part in rows:
            folded.add(part[:, :-1], part[:, -1])
        upper = folded.factor()
        if upper.shape[0] > columns:  # fewer: no rows, and what was added is still there as it was
            upper = torch.linalg.qr(upper, mode="r").R
        return PosteriorFactor(upper[:columns])

    @property
    def columns(self) -> int:
        return len(self.upper)

    @property
    def mean(self) -> Tensor:
        """(columns,) β = R⁻¹ c."""
        return torch.linalg.solve_triangular(self.upper[:, :-1], self.upper[:, -1:], upper=True)[:, 0]

    @property
    def condition(self) -> float:
        """Of R, a lower bound: ratio of its largest to its smallest diagonal entry."""
        diagonal = self.upper.diagonal().abs()
        return float(diagonal.max() / diagonal.min()) if len(diagonal) else 1.0

    def measure_drift(self, rows: Iterable[Tensor]) -> PosteriorFactor:
        """With its drift: how far it is from the factor of all its rows, in one pass over them, O(n columns).

        In the metric of the posterior, where an error is one of predictions: the larger of max |R⁻ᵀ(I + AᵀA)R⁻¹ w - w|, w random signs,
        relative error of variances, and |R⁻ᵀAᵀy - c| / |c|, of the mean.
        """
        if not self.columns:
            return self
        r, c = self.upper[:, :-1], self.upper[:, -1]
        generator = torch.Generator().manual_seed(self.columns)
        signs = 2.0 * torch.randint(0, 2, (self.columns,), generator=generator).to(r) - 1.0
        z = torch.linalg.solve_triangular(r, signs[:, None], upper=True)[:, 0]
        image, right = z.clone(), torch.zeros_like(z)
        for part in rows:
            a, y = part[:, :-1], part[:, -1]
            image += a.T @ (a @ z)
            right += a.T @ y
        back = torch.linalg.solve_triangular(r.T, torch.stack([image, right], dim=1), upper=False)
        of_mean = (back[:, 1] - c).norm() / c.norm().clamp_min(1.0)
        drift = max(float((back[:, 0] - signs).abs().max()), float(of_mean))
        return replace(self, drift=drift, initial_drift=self.initial_drift if self.changes else drift)

    def append_rows(self, rows: Tensor) -> PosteriorFactor:
        """Rank-k update by rows (k, columns + 1), R'ᵀR' = RᵀR + AᵀA: QR of [R; A] that leaves the zeros of R alone, O(k columns²).

        Foster et al., JMLR 10, 857 (2009), section 5.
        """
        if not len(rows):
            return self
        size = self.columns + 1
        square = np.zeros((size, size), order="F")  # as LAPACK has it, and `upper` from here on
        square[:-1] = self.upper.numpy()
        new, _, _, info = lapack.dtpqrt(0, min(PANEL, size), square, np.asfortranarray(rows.numpy()), 1, 0)
        if info:
            raise ArithmeticError(f"QR of new rows failed (dtpqrt: {info})")
        return replace(self, upper=torch.from_numpy(new[:-1]), changes=self.changes + 1)

    def remove_rows(self, rows: Tensor) -> PosteriorFactor:
        """Rank-k downdate by rows (k, columns + 1) that it holds: hyperbolic, by blocks, O(k columns²).

        For a block of columns, R = [R₁ R₂] and rows [A₁ A₂], with P = R₁⁻ᵀA₁ᵀ, GᵀG = I - PPᵀ and CᵀC = I - PᵀP, what is left is

            R₁' = G R₁,   R₂' = G⁻ᵀ(R₂ - P A₂),   A₂' = C(A₂ - PᵀG⁻¹R₂'),

        the mixed form of Bojanczyk, Brent, Van Dooren, de Hoog (SIAM J. Sci. Stat. Comput. 8, 210 (1987)): R₂' is used in A₂', so that R
        comes from R' and A' by an orthogonal matrix.

        Raises:
            DowndateError: too little would be left of a column.
        """
        if not len(rows):
            return self
        upper = self.upper.clone()
        for part in rows.split(SLICE):
            a = part.clone()
            for start in range(0, self.columns, SLICE):
                stop = min(start + SLICE, self.columns)
                _downdate(upper[start:stop, start:], a[:, start:], stop - start)
        left = (upper.diagonal() / self.upper.diagonal()).square()
        if self.columns and not left.min() > LEAST_LEFT:
            raise DowndateError(f"of column {int(left.argmin())} of {self.columns} {left.min():.0e} would be left")
        return replace(self, upper=upper, changes=self.changes + 1)

    def append_columns(self, passes: Passes) -> PosteriorFactor:
        """With columns (prior: the identity) more, behind the others: bordered in two passes over the rows.

        R r = Bᵀb by corrected semi-normal equations (Björck, Linear Algebra Appl. 88/89, 31 (1987)): with x = R⁻¹ R⁻ᵀ Bᵀ b, what
        is left of the new columns, e = b - B x, is factorised by QR itself and not through a difference of squares, and its
        remaining overlap with B corrects r.
        """
        r, c = self.upper[:, :-1], self.upper[:, -1:]
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
        overlapping = torch.linalg.solve_triangular(corner[:, :-1].T, correction.T @ c, upper=False)
        top = torch.cat([r, border + correction, c], dim=1)
        bottom = torch.cat([torch.zeros(m, len(r), dtype=x.dtype), corner[:, :-1], corner[:, -1:] - overlapping], dim=1)
        return replace(self, upper=torch.cat([top, bottom]), changes=self.changes + 1)

    def rotate_columns(self, rotate: Callable[[Tensor], Tensor], first: int = 0) -> PosteriorFactor:
        """In another basis, of all or some of its columns: RᵀR becomes Qᵀ RᵀR Q, by a QR of the triangle from `first` on.

        Args:
            rotate: rows [. | y] (n, columns + 1) -> [. Q | y], Q with orthonormal columns.
            first: columns before it stay as they are.
        """
        upper = rotate(self.upper)
        size = upper.shape[1] - 1
        out = upper[:size].clone()
        out[first:] = 0.0
        out[first:, first:] = torch.linalg.qr(upper[first:, first:], mode="r").R[: size - first]
        return replace(self, upper=out, changes=self.changes + 1)


def _downdate(upper: Tensor, rows: Tensor, width: int) -> None:
    """R₁' = G R₁, R₂' = G⁻ᵀ(R₂ - P A₂), A₂' = C(A₂ - PᵀG⁻¹R₂'): one block of columns of PosteriorFactor.remove_rows, in place."""
    r1, r2, a1, a2 = upper[:, :width], upper[:, width:], rows[:, :width], rows[:, width:]
    p = torch.linalg.solve_triangular(r1.T, a1.T, upper=False)
    g, failed = torch.linalg.cholesky_ex(torch.eye(width, dtype=p.dtype) - p @ p.T, upper=True)
    c, failed_too = torch.linalg.cholesky_ex(torch.eye(len(a1), dtype=p.dtype) - p.T @ p, upper=True)
    if int(failed) or int(failed_too):
        raise DowndateError("the rest would not be positive definite")
    r1.copy_(g @ r1)
    r2.copy_(torch.linalg.solve_triangular(g.T, r2 - p @ a2, upper=False))
    a2.copy_(c @ (a2 - p.T @ torch.linalg.solve_triangular(g, r2, upper=True)))


def _merge_triangles(upper: Tensor, other: Tensor) -> Tensor:
    """Triangular factor of [R; R'], both square, by blocks of columns that leave zeros alone: a fifth of a QR's operations. In place."""
    for start in range(0, len(upper), SLICE):
        stop = min(start + SLICE, len(upper))
        rows = torch.cat([upper[start:stop, start:], other[:stop, start:]])
        panel, tau = torch.geqrf(rows[:, : stop - start])
        upper[start:stop, start:stop] = panel[: stop - start].triu()
        if stop < len(upper):
            rest = torch.ormqr(panel, tau, rows[:, stop - start :], transpose=True)
            upper[start:stop, stop:], other[:stop, stop:] = rest[: stop - start], rest[stop - start :]
    return upper


class RowFactor:
    """The triangular factor R, RᵀR = AᵀA, of rows A = [K_ou | y] added so far (tall-skinny QR, Golub & Van Loan 5.2).

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
            self.compress()

    def merge(self, later: RowFactor) -> RowFactor:
        """The factor of the rows of both, later ones behind; neither is changed."""
        both = RowFactor(self.columns, self._buffer_rows)
        first, second = self.factor(), later.factor()
        both.count = self.count + later.count
        both._parts = [part for part in (first, second) if len(part)]
        if min(self.count, later.count) > self.columns + 1:  # both are triangles
            both._parts = [_merge_triangles(first.clone(), second.clone())]
        elif both._parts:
            both.compress()
        return both

    def compress(self) -> None:
        """Fold in the rows that wait in the buffer, if there are any: at most columns + 1 rows are held then."""
        if not self._parts:
            return
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
        self.compress()
        return self._parts[0]
