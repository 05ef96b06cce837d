"""Local scales: factors on predicted standard deviations that depend on the prediction itself and on the group of its structure.

Errors e of predictions with standard deviation σ are normal with the standard deviation σ exp(g), g linear in a few numbers; the
likelihood and a normal prior about 0 decide on the coefficients. Components of one structure depend on each other, so that all those of a
structure together count as a few.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpmlp.uncertainty.minimise import minimise

SLOPE = 0.3  # prior standard deviation of a slope: the posterior has the right shape until errors show otherwise
BETWEEN = (0.05, 0.1, 0.2, 0.3, 0.45, 0.7, 1.0)  # standard deviations of log factors between groups that are compared
USUAL = 0.3, 0.5  # median of that a priori, and the spread of its logarithm
COMPONENTS = 5.0  # independent ones that the errors of a structure count as, at most
RANGE = 0.02  # share of the structures left out at either end beyond which the factor no longer changes
LEAST_FORCE = (
    0.1  # of the rms force: smaller ones count as that, for a force passes through zero where nothing else is small
)
LEAST_PART = 1e-4  # of the variance, in place of a part that is less: such a part may be rounding


@dataclass(frozen=True)
class LocalScale:
    """exp(Σ_k slope_k (x_k - middle_k)), with each x_k kept within [low_k, high_k].

    x is (log σ, log of the size of the predicted force, log of the ratio of √(variance due to the inducing set) to √(that due to the
    data)), in the units of the kind and eV/A. Errors that a model class makes grow with the forces; the prior between inducing
    points is wrong by another factor than what the data leave open. What is beyond the structures that this was learned from is
    as at their margin.

    Attributes:
        slopes, middle, low, high: one number for each x.
        force: rms of predicted forces, eV/A.
    """

    slopes: tuple[float, ...]
    middle: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    force: float

    def factor(self, parts: Tensor, squared_force: Tensor) -> Tensor:
        """(n,) factor on the standard deviation, from weighted parts of the variance (n, 3) and mean squares of force components (n,)."""
        x = predictors(parts, squared_force, self.force)
        low, high, middle, slopes = (
            torch.tensor(v, dtype=torch.float64).to(x) for v in (self.low, self.high, self.middle, self.slopes)
        )
        return ((torch.maximum(torch.minimum(x, high), low) - middle) @ slopes).exp()

    @staticmethod
    def from_dict(plain: Mapping) -> LocalScale:
        """Restore what dataclasses.asdict gave."""
        slopes, middle, low, high = (tuple(plain[name]) for name in ("slopes", "middle", "low", "high"))
        return LocalScale(slopes, middle, low, high, plain["force"])

    @staticmethod
    def fit(squares: Tensor, parts: Tensor, squared_force: Tensor, structure: Tensor) -> tuple[LocalScale, float]:
        """The most likely one, and the factor on σ common to all.

        Args:
            squares: (n,) (error/σ)².
            parts, squared_force: as in `factor`, of the same errors.
            structure: (n,) number of the structure of each.
        """
        force = max(squared_force.mean().sqrt().item(), 1e-12)
        x = predictors(parts, squared_force, force)
        if not _parts_are_seen(parts):
            x[:, 2] = x[:, 2].median()
        low, middle, high = x.quantile(torch.tensor([RANGE, 0.5, 1 - RANGE], dtype=torch.float64).to(x), dim=0)
        columns = torch.maximum(torch.minimum(x, high), low) - middle
        columns = torch.cat([torch.ones_like(columns[:, :1]), columns], dim=1)
        precision = np.array([0.0, *[SLOPE**-2] * x.shape[1]])
        found, *_ = log_factors(squares, columns, precision, structure_weights(structure))
        low, middle, high = (tuple(v.tolist()) for v in (low, middle, high))
        return LocalScale(tuple(found[1:].tolist()), middle, low, high, force), math.exp(found[0])


def _parts_are_seen(parts: Tensor) -> bool:
    """Whether the first part is seen at all in half of the variances (n, 3), beside the second.

    Where most environments are inducing points themselves it is not: what is not known of a structure that is left out is all in the
    second part, and of a new one in both.
    """
    return bool((parts[:, 0] > LEAST_PART * parts[:, 1]).double().mean() > 0.5)


def predictors(parts: Tensor, squared_force: Tensor, force: float) -> Tensor:
    """x (n, 3) of LocalScale."""
    total = parts.sum(1)
    least = LEAST_PART * total
    sizes = (total, squared_force + (LEAST_FORCE * force) ** 2, (parts[:, 0] + least) / (parts[:, 1] + least))
    return 0.5 * torch.stack(sizes, dim=1).clamp_min(1e-300).log()


def structure_weights(structure: Tensor) -> Tensor:
    """(n,) weight of each error, with which those of a structure count as COMPONENTS at most."""
    _, inverse, count = torch.unique(structure, return_inverse=True, return_counts=True)
    return (COMPONENTS / count).clamp(max=1.0)[inverse].double()


def log_factors(
    squares: Tensor, columns: Tensor, precision: np.ndarray, weights: Tensor
) -> tuple[np.ndarray, np.ndarray, float]:
    """The coefficients b that maximise Σ_i ω_i [−g_i − ½ z_i² exp(−2 g_i)] − ½ Σ_k λ_k b_k², g = X b.

    Args:
        squares: (n,) z²; columns: (n, k) X; precision: (k,) λ; weights: (n,) ω.

    Returns:
        b (k,), the standard deviation of each (Laplace), and the log evidence but for a constant (0 where λ is).
    """
    z2, x, w = (v.double().cpu().numpy() for v in (squares, columns, weights))

    def objective(b: np.ndarray) -> tuple[float, np.ndarray]:
        g = np.clip(x @ b, -30, 30)
        q = z2 * np.exp(-2 * g)
        return float(w @ (g + q / 2) + 0.5 * precision @ b**2), x.T @ (w * (1 - q)) + precision * b

    def curvature(b: np.ndarray) -> np.ndarray:
        q = z2 * np.exp(-2 * np.clip(x @ b, -30, 30))
        return x.T @ ((2 * w * q)[:, None] * x) + np.diag(precision)

    best, value = minimise(objective, curvature, np.zeros(x.shape[1]))
    hessian = curvature(best)
    inverse = np.linalg.pinv(hessian, hermitian=True)
    evidence = -value - 0.5 * np.linalg.slogdet(hessian)[1] + 0.5 * np.log(precision[precision > 0]).sum()
    return best, np.sqrt(inverse.diagonal().clip(0)), float(evidence)


@dataclass(frozen=True)
class GroupFactors:
    """Factors on standard deviations by group, shrunk to 1.

    Attributes:
        factors: by group. That of a small group is near 1, and a little larger for what is not known of it: the root of the mean of
            its square over the posterior.
        between: standard deviation of their logarithms between groups.
    """

    factors: dict[str, float]
    between: float

    @staticmethod
    def fit(squares: Tensor, labels: Sequence[str], structure: Tensor) -> GroupFactors:
        """From squares (n,) of error/σ, the group of each error ('' = of none), and the structure of each.

        log u ~ N(0, τ²), with the τ of BETWEEN that makes errors most likely together with its own prior.
        """
        names, which = np.unique(np.asarray(labels), return_inverse=True)
        member = torch.from_numpy(which).to(squares.device)
        columns = torch.nn.functional.one_hot(member, len(names)).double()
        named = [k for k, name in enumerate(names) if name]
        if len(named) < 2:
            return GroupFactors({}, 0.0)
        weights = structure_weights(structure)
        best: tuple | None = None
        for tau in BETWEEN:
            precision = np.full(len(named), tau**-2)
            found, spread, evidence = log_factors(squares, columns[:, named], precision, weights)
            evidence -= 0.5 * ((math.log(tau) - math.log(USUAL[0])) / USUAL[1]) ** 2
            if best is None or evidence > best[0]:
                best = evidence, found, spread, tau
        assert best is not None
        _, found, spread, tau = best
        return GroupFactors(
            {str(names[k]): math.exp(b + s**2) for k, b, s in zip(named, found, spread, strict=True)}, tau
        )
