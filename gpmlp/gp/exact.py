"""The exact posterior of functionals of the data given their labels: Cholesky factorisation of C = δ² K + Σ, in place.

With α = C⁻¹ y the mean is k_gu δ² α, minus the log evidence is ½ yᵀα + ½ log|C| + n/2 log 2π, and labels g that are left out have the
errors [C⁻¹]_gg⁻¹ α_g (Rasmussen & Williams 2006, eqs. 2.25, 2.30 and 5.10 to 5.12). K is below the diagonal of a square and the factor
above it, so that memory is 8 n² bytes. Labels that come later are rows below: L is bordered by V, V Lᵀ = C_ou, and by the factor of
C_oo - V Vᵀ, and nothing that was there before is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from gpmlp.core.errors import UserError
from gpmlp.core.quantities import KINDS
from gpmlp.gp import evidence
from gpmlp.gp.evidence import EvidenceResult
from gpmlp.gp.likelihood import Hyperparameters
from gpmlp.gp.posterior import FIXED

COPIED = 512  # rows of the square that are copied together
PROBES = 32  # of the traces that steer the hyperparameters,
FEW = 1000  # which are exact up to so many labels


@dataclass(frozen=True, eq=False)
class ExactProcess:
    """Labels of n functionals and their prior covariance.

    Attributes:
        square: (n, n) K below the diagonal, unit signal variance; above it whatever factor was made last.
        diagonal: (n,) of K.
        values: (n,) y; rows: by kind, which of them have its noise; scale: (n,) noise of each over that of its kind.
        given: (n,) noise of its own of each, NaN for those of a kind.
        borders: of labels that came later, (k, those before and themselves) rows of K each; the square is that of the first ones alone.
    """

    square: Tensor
    diagonal: Tensor
    values: Tensor
    rows: dict[str, Tensor]
    scale: Tensor
    given: Tensor
    borders: tuple[Tensor, ...] = ()

    @staticmethod
    def of_covariance(
        covariance: Tensor, values: Tensor, rows: dict[str, Tensor], scale: Tensor, given: Tensor
    ) -> ExactProcess:
        """Takes the covariance (n, n), of which the lower half counts, over as its own."""
        return ExactProcess(covariance, covariance.diagonal().clone(), values, rows, scale, given)

    def bordered(self, covariance: Tensor, later: ExactProcess) -> ExactProcess:
        """With labels that come later.

        Args:
            covariance: (k, n + k) of these with all up to themselves; later: the same labels, whose square does not count.
        """
        n = len(self.values)
        rows = {
            kind: torch.cat([*(p.rows[kind] + start for p, start in ((self, 0), (later, n)) if kind in p.rows)])
            for kind in KINDS
            if kind in self.rows or kind in later.rows
        }
        joined = {
            name: torch.cat([getattr(self, name), getattr(later, name)])
            for name in ("diagonal", "values", "scale", "given")
        }
        return replace(self, **joined, rows=rows, borders=(*self.borders, covariance))  # type: ignore[arg-type]

    def select(self, chosen: Tensor) -> ExactProcess:
        """Of some of the labels (sorted), with a square of their own."""
        place = torch.full((len(self.values),), -1).index_copy(0, chosen, torch.arange(len(chosen)))
        start = len(self.square)
        square = self.square.new_empty(len(chosen), len(chosen))
        mine = chosen[chosen < start]
        square[: len(mine), : len(mine)] = self.square[mine][:, mine]
        for border in self.borders:
            own = chosen[(chosen >= start) & (chosen < start + len(border))]
            before = chosen[chosen < start + len(border)]
            square[place[own], : len(before)] = border[own - start][:, before]
            start += len(border)
        square.diagonal().copy_(self.diagonal[chosen])
        there = {kind: place[rows][place[rows] >= 0] for kind, rows in self.rows.items()}
        rows = {kind: which for kind, which in there.items() if len(which)}
        diagonal, values, scale, given = (part[chosen] for part in (self.diagonal, self.values, self.scale, self.given))
        return ExactProcess(square, diagonal, values, rows, scale, given)

    def noise_variances(self, noise: dict[str, float]) -> Tensor:
        """(n,) diagonal of Σ for noises by kind."""
        variance = self.given.nan_to_num(0.0).square()
        for kind, rows in self.rows.items():
            variance[rows] = (noise[kind] * self.scale[rows]).square()
        return variance

    def condition(self, noise: dict[str, float], signal: float) -> ExactPosterior:
        """The posterior for noises by kind and δ, without borders (`select` all first); those made before lose their factor to it.

        Raises:
            UserError: C is not positive definite to rounding.
        """
        variance = self.noise_variances(noise)
        square, n = self.square, len(self.values)
        for first in range(0, n, COPIED):
            last = min(first + COPIED, n)
            square[first:last, last:] = square[last:, first:last].T * signal**2
            here = square[first:last, first:last]
            below = here.tril(-1)
            here.copy_(below + below.T * signal**2)
        square.diagonal().copy_(self.diagonal * signal**2 + variance)
        # rows of C order are columns of LAPACK's, whose lower half is the upper one here
        factor, failed = lapack.dpotrf(square.numpy().T, lower=1, clean=0, overwrite_a=1)
        if failed:
            raise _indefinite(n, noise)
        return ExactPosterior(self, signal, variance, dict(noise), factor)


class ExactPosterior:
    """ExactProcess given its labels.

    Attributes:
        alpha: (n,) α = C⁻¹ y.
        variance: (n,) of the noise of each label, the diagonal of Σ; noise: by kind.
        signal: δ.
    """

    def __init__(
        self,
        process: ExactProcess,
        signal: float,
        variance: Tensor,
        noise: dict[str, float],
        factor: np.ndarray,
        borders: tuple[Tensor, ...] = (),
    ) -> None:
        self.process, self.signal, self.variance, self.noise = process, signal, variance, noise
        self._factor, self._borders = factor, borders
        self.alpha = self.solve(process.values[:, None])[:, 0]

    def bordered(self, process: ExactProcess) -> ExactPosterior:
        """With the labels of the last border of a process, in O(k n²).

        Raises:
            UserError: C is not positive definite to rounding.
        """
        covariance, variance = process.borders[-1], process.noise_variances(self.noise)
        n, k = len(self.alpha), len(covariance)
        v = self.half_solve(self.signal**2 * covariance[:, :n].T).T
        corner = self.signal**2 * covariance[:, n:]
        corner = corner.tril() + corner.tril(-1).T + torch.diag(variance[n:]) - v @ v.T
        lower, failed = torch.linalg.cholesky_ex(corner)
        if int(failed):
            raise _indefinite(n + k, self.noise)
        borders = (*self._borders, torch.cat([v, lower], 1))
        return ExactPosterior(process, self.signal, variance, self.noise, self._factor, borders)

    @property
    def weights(self) -> Tensor:
        """(n,) w of the mean k_gu w."""
        return self.signal**2 * self.alpha

    @property
    def residuals(self) -> Tensor:
        """(n,) labels less their mean, Σ α."""
        return self.variance * self.alpha

    @property
    def rms(self) -> dict[str, float]:
        """Root mean square of the residuals by kind, per atom for energies; of those with a noise of their own in units of that."""
        each, given = self.residuals / self.process.scale, self.process.given
        found = {kind: float(each[rows].square().mean().sqrt()) for kind, rows in self.process.rows.items()}
        own = (self.residuals / given)[~given.isnan()]
        return found | ({FIXED: float(own.square().mean().sqrt())} if len(own) else {})

    @property
    def condition(self) -> float:
        """Of the factor: ratio of its largest to smallest diagonal entry, a lower bound."""
        return float(self._diagonal.max() / self._diagonal.min())

    @property
    def _diagonal(self) -> Tensor:
        """(n,) of the factor."""
        return torch.cat([self.process.square.diagonal(), *(row[:, -len(row) :].diagonal() for row in self._borders)])

    @property
    def negative_log_evidence(self) -> float:
        """-log N(y; 0, C), nats."""
        y = self.process.values
        return 0.5 * float(y @ self.alpha) + float(self._diagonal.log().sum()) + 0.5 * len(y) * math.log(2 * math.pi)

    def half_solve(self, right: Tensor) -> Tensor:
        """L⁻¹ B of columns B (n, k), C = L Lᵀ."""
        out, start = torch.empty_like(right), len(self._factor)
        out[:start] = torch.from_numpy(lapack.dtrtrs(self._factor, right[:start].numpy(), lower=1)[0])
        for row in self._borders:
            end = start + len(row)
            rest = right[start:end] - row[:, :start] @ out[:start]
            out[start:end] = torch.linalg.solve_triangular(row[:, start:], rest, upper=False)
            start = end
        return out

    def solve(self, right: Tensor) -> Tensor:
        """C⁻¹ B of columns B (n, k)."""
        out = self.half_solve(right)
        for row in reversed(self._borders):
            end = row.shape[1]
            start = end - len(row)
            out[start:end] = torch.linalg.solve_triangular(row[:, start:].T, out[start:end], upper=True)
            out[:start] -= row[:, :start].T @ out[start:end]
        first = len(self._factor)
        out[:first] = torch.from_numpy(lapack.dtrtrs(self._factor, out[:first].numpy(), lower=1, trans=1)[0])
        return out

    def left_out(self, group: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Errors (g,) of labels of a group without all of it, label - mean, and their covariance (g, g), noise included."""
        unit = self.alpha.new_zeros(len(self.alpha), len(group))
        unit[list(group), range(len(group))] = 1.0
        half = self.half_solve(unit)
        covariance = torch.linalg.inv(half.T @ half)
        return covariance @ self.alpha[list(group)], covariance


def learn(
    process: ExactProcess,
    parameters: Hyperparameters,
    max_iterations: int = 10,
    tolerance: float = 0.02,
    progress: Callable[[int, float], None] | None = None,
    seed: int = 0,
) -> EvidenceResult:
    """MacKay's fixed point of the evidence, in place, one factorisation for each iteration, as evidence.iterate_fixed_point.

    With r = Σ α and γ = n - tr(Σ C⁻¹):  σ_k² <- Σ (r/s)² / tr_k(Σ C⁻¹)  and  δ² <- δ² αᵀ(y - r) / γ, with priors. Traces of more than FEW
    labels are estimates from the same probes throughout.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(process.values)
    probes = torch.randint(0, 2, (n, PROBES), generator=generator).double() * 2 - 1
    if n <= FEW:
        probes = math.sqrt(n) * torch.eye(n, dtype=torch.float64)
    trace: list[tuple[int, float]] = []
    for iteration in range(1, max_iterations + 1):
        posterior = process.condition(parameters.noise(), float(parameters.signal()[0]))
        prior = sum(parameters.log_prior(name)[0] for name in parameters.learned)
        trace.append((iteration, posterior.negative_log_evidence - prior))
        if progress:
            progress(*trace[-1])
        undetermined = posterior.variance * (probes * posterior.solve(probes)).mean(1)
        change = 0.0
        for kind in [kind for kind in process.rows if kind in parameters.learned]:
            rows = process.rows[kind]
            power = (posterior.residuals / process.scale)[rows].square().sum()
            left = undetermined[rows].sum().clamp(1e-3 * len(rows), len(rows))
            change = max(change, evidence.move(parameters, kind, left[None], power[None]))
        power = posterior.signal**2 * (posterior.alpha @ (process.values - posterior.residuals))
        gamma = (n - undetermined.sum()).clamp_min(1e-3 * n)
        change = max(change, evidence.move(parameters, "signal", gamma[None], power[None]))
        if change < tolerance:
            break
    return EvidenceResult(trace[-1][1], evidence.at_bound(parameters), tuple(trace))


def _indefinite(n: int, noise: dict[str, float]) -> UserError:
    said = ", ".join(f"{kind} {std:.3g}" for kind, std in noise.items())
    return UserError(
        f"The covariance of {n} labels with these noises ({said}) is not positive definite to rounding: give larger ones "
        "(`noise`), or have error bars from all functionals (--set variance.columns=all), which needs no such covariance."
    )
