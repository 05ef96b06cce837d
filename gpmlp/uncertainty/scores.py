"""Scores say how well standard deviations match errors: coverage, calibration, sharpness, likelihood, ranking."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gpmlp.core import errors as checks

FLOOR = 1e-6  # smallest standard deviation that is told from 0, relative to the rms of std or of errors, whichever is larger
BINS = (5, 20)  # of ENCE: about sqrt(n), within these
GRID = 1001  # levels over which the miscalibration area is integrated
SMALLEST = 1e-150  # in place of the floor where all errors and all std are 0


@dataclass(frozen=True)
class Scores:
    """How well standard deviations match n errors; NaN where n is too small to say.

    Attributes:
        n: number of known errors.
        coverage_50, coverage_68, coverage_90, coverage_95: share of errors inside the central interval of that level.
        miscalibration_area: ∫ |observed(p) − p| dp over levels p of central Gaussian intervals, 0 (calibrated) to 1/2
            (Kuleshov, Fenner, Ermon, ICML 2018; Tran et al., Mach. Learn.: Sci. Technol. 1, 025006 (2020)).
        ence: expected normalised calibration error, mean over equal-count bins of std of |rms std − rms error| / rms std
            (Levi et al., Sensors 22, 5540 (2022)).
        nll: mean Gaussian −log density, nats, with errors in their own unit.
        crps: mean continuous ranked probability score of Gaussians, unit of the errors; smaller is better.
        sharpness: rms std, unit of the errors.
        spearman: rank correlation of std and |error|.
    """

    n: int
    coverage_50: float
    coverage_68: float
    coverage_90: float
    coverage_95: float
    miscalibration_area: float
    ence: float
    nll: float
    crps: float
    sharpness: float
    spearman: float


def score_errors(
    errors: Tensor, std: Tensor, multipliers: Mapping[float, float | Tensor] | None = None, group: Tensor | None = None
) -> Scores:
    """Compare standard deviations with errors.

    A std below FLOOR times the rms of std or of the errors (the larger) counts as that, so that error 0 with std 0 is a number.

    Args:
        errors: (n,) predicted − known, any unit; NaN = not known, dropped.
        std: (n,) predicted standard deviation in the same unit.
        multipliers: by level (0.5, 0.68, 0.9, 0.95): the half-width of the interval as a factor of std, or as a tensor (n,) in
            the unit of the errors (conformal intervals); the Gaussian quantile where a level is not given.
        group: (n,) integers: rows of one thing, such as the three force components of an atom. Only `spearman` sees it: it compares
            the rms std and rms error of the groups, since the size of one component of a vector is mostly chance.

    Raises:
        checks.UserError: shapes that do not belong together; a std that is negative or not finite where the error is known.
    """
    keep, e, s = known_errors(errors, std)
    n = len(e)
    if not n:
        return Scores(0, *[math.nan] * (len(fields(Scores)) - 1))
    s = s.clamp_min(smallest_std(s, e))
    z = e / s
    coverage = []
    for level in (0.5, 0.68, 0.9, 0.95):
        m = (multipliers or {}).get(level, gaussian_multiplier(level))
        half = m.to(e)[keep] if isinstance(m, Tensor) and m.dim() else m * s
        coverage.append((e.abs() <= half).double().mean().item())
    size, spread = e.abs(), s
    if group is not None:
        checks.shape("group", group, (len(errors),))
        size, spread = (_rms_by(group[keep], v) for v in (e, s))
    return Scores(
        n,
        *coverage,
        miscalibration_area=_miscalibration_area(z),
        ence=_ence(e, s),
        # −log N(e; 0, s²)
        nll=(s.log() + z.square() / 2).mean().item() + math.log(2 * math.pi) / 2,
        crps=_crps(z, s).mean().item(),
        sharpness=_rms(s),
        spearman=spearman_correlation(spread, size),
    )


def gaussian_multiplier(level: float) -> float:
    """Half-width of the central interval of that probability, in standard deviations of a Gaussian."""
    return torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)).item()


def known_errors(errors: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (mask of the known errors, those errors, their std) in float64.

    Raises:
        checks.UserError: as `scores`.
    """
    checks.shape("errors", errors, ("n",))
    checks.shape("std", std, (len(errors),))
    keep = ~torch.isnan(errors)
    e, s = errors[keep].double(), std[keep].double()
    if torch.isinf(e).any():
        raise checks.UserError("`errors` holds an infinite value; remove the structure or correct the label.")
    bad = ~(torch.isfinite(s) & (s >= 0))
    if bad.any():
        raise checks.UserError(
            f"`std` must be finite and zero or positive where the error is known; got {s[bad][0].item()} "
            f"({int(bad.sum())} of {len(s)}). A NaN here is often the root of a negative variance."
        )
    return keep, e, s


def smallest_std(std: Tensor, errors: Tensor) -> float:
    """Smallest std that is told from 0: FLOOR times the rms of std or of errors, whichever is larger."""
    return max(FLOOR * _rms(std), FLOOR * _rms(errors), SMALLEST)


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item() if len(values) else 0.0


def _rms_by(group: Tensor, values: Tensor) -> Tensor:
    """(groups,) root mean square of the values of each group."""
    _, inverse, count = torch.unique(group, return_inverse=True, return_counts=True)
    total = values.new_zeros(len(count)).index_add(0, inverse, values.square())
    return (total / count).sqrt()


def _miscalibration_area(z: Tensor) -> float:
    # |z| lies inside the central interval of level p exactly when erf(|z|/√2) <= p
    level = torch.special.erf(z.abs() / math.sqrt(2)).sort().values
    expected = torch.linspace(0, 1, GRID, dtype=z.dtype, device=z.device)
    observed = torch.searchsorted(level, expected, right=True).double() / len(z)
    return torch.trapezoid((observed - expected).abs(), expected).item()


def _ence(errors: Tensor, std: Tensor) -> float:
    n = len(errors)
    bins = min(n, max(BINS[0], min(BINS[1], round(math.sqrt(n)))))
    terms = []
    for members in std.argsort(stable=True).tensor_split(bins):
        spread = _rms(std[members])
        terms.append(abs(spread - _rms(errors[members])) / spread)
    return sum(terms) / bins


def _crps(z: Tensor, std: Tensor) -> Tensor:
    # σ [ z (2 Φ(z) − 1) + 2 φ(z) − 1/√π ], Gneiting & Raftery, JASA 102, 359 (2007), eq. 21 with the sign turned
    density = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    return std * (z * torch.special.erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi))


def spearman_correlation(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two (n,) tensors, ties by average rank; NaN if n < 3 or one of them is constant or holds a NaN."""
    checks.shape("a", a, ("n",))
    checks.shape("b", b, (len(a),))
    if len(a) < 3:
        return math.nan
    x, y = (r - r.mean() for r in (_ranks(a), _ranks(b)))
    norm = (x.square().sum() * y.square().sum()).sqrt().item()
    return (x @ y).item() / norm if norm > 0 else math.nan


def area_under_roc(score: Tensor, positive: Tensor) -> float:
    """Chance that a positive scores above a negative, ties counting half (area under the ROC curve).

    Args:
        score: (n,) any numbers, infinite ones too; a NaN gives NaN.
        positive: (n,) bool.

    Returns:
        0 to 1, NaN where all or none are positive (Hanley, McNeil, Radiology 143, 29 (1982)).
    """
    checks.shape("score", score, ("n",))
    checks.shape("positive", positive, (len(score),))
    positive = positive.bool().cpu()
    yes, no = int(positive.sum()), int((~positive).sum())
    if not yes or not no:
        return math.nan
    # Mann-Whitney: U = Σ ranks of the positives − n₊(n₊ + 1)/2
    return (_ranks(score)[positive].sum().item() - yes * (yes + 1) / 2) / (yes * no)


def _ranks(values: Tensor) -> Tensor:
    from scipy.stats import rankdata  # slow to import

    return torch.from_numpy(rankdata(values.detach().cpu().double().numpy()))


def sparsification_curve(errors: Tensor, std: Tensor, fractions: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean |error| left when the most uncertain fraction is removed, and the same removing the largest errors (the oracle).

    Rows of equal std share their mean |error|, so that their order does not matter. One row at least is left (Ilg et al., ECCV 2018).

    Args:
        errors: (n,) NaN = not known, dropped.
        std: (n,)
        fractions: removed, each 0 to 1.

    Returns:
        two tensors (fractions,) in the unit of the errors; NaN where no error is known.
    """
    _, e, s = known_errors(errors, std)
    for fraction in fractions:
        if not 0 <= fraction <= 1:
            raise checks.UserError(f"`fractions` must lie between 0 and 1; got {fraction}.")
    if not len(e):
        nothing = e.new_full((len(fractions),), math.nan)
        return nothing, nothing.clone()
    size = e.abs()
    _, inverse, count = torch.unique(s, return_inverse=True, return_counts=True)
    shared = (size.new_zeros(len(count)).index_add(0, inverse, size) / count)[inverse]
    left = torch.tensor([max(1, len(e) - round(f * len(e))) for f in fractions], device=e.device, dtype=torch.long)
    means = [v.cumsum(0)[left - 1] / left for v in (shared[s.argsort()], size.sort().values)]
    return means[0], means[1]
