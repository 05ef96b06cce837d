"""Scores of predicted standard deviations against errors: coverage, calibration, sharpness, likelihood, ranking.

Rows are errors of one kind, in any unit. Everything takes tensors or NumPy arrays and computes in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpmlp.core.errors import UserError, check_shape

Array = Tensor | np.ndarray

FLOOR = 1e-6  # smallest standard deviation that is told from 0, relative to the rms of std or of errors, whichever is larger
BINS = (5, 20)  # of ENCE: about sqrt(n), within these
GRID = 1001  # levels over which the miscalibration area is integrated
FRAME = 5  # different values in a frame from which its ranks count
ALIKE = 1e-6  # relative difference of values that are the same but for rounding
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
        rms_z: root mean square of error/std; 1 where std has the size of the errors.
        spearman: rank correlation of std and |error|.
        spearman_within_frame: median over frames of the rank correlation within each; see `within_frames`.
        n_symmetric: errors that were left out, as they vanish by symmetry.
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
    rms_z: float
    spearman: float
    spearman_within_frame: float = math.nan
    n_symmetric: int = 0


def score_errors(
    errors: Tensor,
    std: Tensor,
    multipliers: Mapping[float, float | Tensor] | None = None,
    group: Tensor | None = None,
    frame: Tensor | None = None,
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
        frame: (n,) integers: errors of one structure, for `spearman_within_frame`; needs `group`.

    Raises:
        UserError: shapes that do not belong together; a std that is negative or not finite where the error is known.
    """
    keep, e, s = known_errors(errors, std)
    n = len(e)
    if not n:
        unknown: dict[str, Any] = {f.name: math.nan for f in fields(Scores) if f.name not in ("n", "n_symmetric")}
        return Scores(0, **unknown)
    s = s.clamp_min(smallest_std(s, e))
    z = e / s
    coverage: dict[str, Any] = {}
    for percent in (50, 68, 90, 95):
        m = (multipliers or {}).get(percent / 100, gaussian_multiplier(percent / 100))
        half = m.to(e)[keep] if isinstance(m, Tensor) and m.dim() else m * s
        coverage[f"coverage_{percent}"] = (e.abs() <= half).double().mean().item()
    size, predicted, within = e.abs(), s, math.nan
    if group is not None:
        check_shape("group", group, (len(errors),))
        size, predicted = (_rms_by(group[keep], v) for v in (e, s))
        if frame is not None:
            check_shape("frame", frame, (len(errors),))
            of_group = torch.zeros(len(size)).to(frame)
            of_group[torch.unique(group[keep], return_inverse=True)[1]] = frame[keep]
            within = within_frames(predicted, size, of_group)
    return Scores(
        n,
        **coverage,
        miscalibration_area=reliability_curve(z, torch.linspace(0, 1, GRID, dtype=torch.float64)).area,
        ence=_ence(e, s),
        # −log N(e; 0, s²)
        nll=(s.log() + z.square() / 2).mean().item() + math.log(2 * math.pi) / 2,
        crps=_crps(z, s).mean().item(),
        sharpness=_rms(s),
        rms_z=_rms(z),
        spearman=spearman_correlation(predicted, size),
        spearman_within_frame=within,
    )


def gaussian_multiplier(level: float) -> float:
    """Half-width of the central interval of that probability, in standard deviations of a Gaussian."""
    return torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)).item()


def known_errors(errors: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (mask of the errors that are not NaN, those errors, their std) in float64.

    Raises:
        UserError: as `score_errors`.
    """
    check_shape("errors", errors, ("n",))
    check_shape("std", std, (len(errors),))
    keep = ~torch.isnan(errors)
    e, s = errors[keep].double(), std[keep].double()
    if torch.isinf(e).any():
        raise UserError("`errors` holds an infinite value; remove the structure or correct the label.")
    bad = ~(torch.isfinite(s) & (s >= 0))
    if bad.any():
        raise UserError(
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


def gaussian_coverage(z: Array, levels: Sequence[float] | Array) -> Tensor:
    """Share (levels,) of errors inside the central Gaussian intervals of these probabilities; NaN of no errors.

    Args:
        z: (n,) error / std.
    """
    size = torch.as_tensor(z).double().abs().sort().values
    reach = torch.special.ndtri((1 + torch.as_tensor(levels, dtype=torch.float64)) / 2).to(size)
    return torch.searchsorted(size, reach, right=True).double() / len(size)


@dataclass(frozen=True)
class ReliabilityCurve:
    """Observed against expected coverage of central Gaussian intervals.

    Attributes:
        expected, observed: (levels,) probability of the interval, share of the errors inside.
        area: ∫ |observed − expected| over the levels; bias: mean of observed − expected, positive where std is too large.
    """

    expected: Tensor
    observed: Tensor
    area: float
    bias: float


def reliability_curve(z: Array, levels: Sequence[float] | Array) -> ReliabilityCurve:
    """Coverage at each of some increasing levels, of errors / std (n,)."""
    expected = torch.as_tensor(levels, dtype=torch.float64)
    observed = gaussian_coverage(z, expected).cpu()
    difference = observed - expected
    area = torch.trapezoid(difference.abs(), expected).item()
    return ReliabilityCurve(expected, observed, area, difference.mean().item())


def binned_calibration(errors: Array, std: Array, bins: int) -> list[tuple[float, float, int]]:
    """(rms std, rms error, number of errors) of bins of equally many errors, from small to large std."""
    e, s = torch.as_tensor(errors).double(), torch.as_tensor(std).double()
    parts = s.argsort(stable=True).tensor_split(max(1, min(bins, len(s))))
    return [(_rms(s[part]), _rms(e[part]), len(part)) for part in parts if len(part)]


def _ence(errors: Tensor, std: Tensor) -> float:
    bins = max(BINS[0], min(BINS[1], round(math.sqrt(len(errors)))))
    terms = [abs(predicted - rms) / predicted for predicted, rms, _ in binned_calibration(errors, std, bins)]
    return sum(terms) / len(terms)


def _crps(z: Tensor, std: Tensor) -> Tensor:
    # σ [ z (2 Φ(z) − 1) + 2 φ(z) − 1/√π ], Gneiting & Raftery, JASA 102, 359 (2007), eq. 21 with the opposite sign
    density = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    return std * (z * torch.special.erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi))


def spearman_correlation(a: Array, b: Array) -> float:
    """Rank correlation of two (n,) arrays, ties by average rank; NaN if n < 3 or one of them is constant or holds a NaN."""
    first, second = torch.as_tensor(a), torch.as_tensor(b)
    check_shape("a", first, ("n",))
    check_shape("b", second, (len(first),))
    if len(first) < 3:
        return math.nan
    x, y = (r - r.mean() for r in (_ranks(first), _ranks(second)))
    norm = (x.square().sum() * y.square().sum()).sqrt().item()
    return (x @ y).item() / norm if norm > 0 else math.nan


def within_frames(std: Tensor, size: Tensor, frame: Tensor) -> float:
    """Median over frames of the rank correlation of std and size of the errors of its atoms (n,); NaN if no frame can tell.

    Frames with fewer than FRAME different values of either are left out: in a perfect crystal a few values are shared by all atoms.
    """
    found = []
    for k in frame.unique():
        mine = frame == k
        a, b = (v[mine] for v in (std, size))
        if min(len((v / v.max().clamp_min(SMALLEST)).mul(1 / ALIKE).round().unique()) for v in (a, b)) >= FRAME:
            found.append(spearman_correlation(a, b))
    return float(np.median(found)) if found else math.nan


def area_under_roc(score: Array, positive: Array) -> float:
    """Chance that a positive scores above a negative, ties counting half (area under the ROC curve).

    Args:
        score: (n,) any numbers, infinite ones too; a NaN gives NaN.
        positive: (n,) bool.

    Returns:
        0 to 1, NaN where all or none are positive (Hanley, McNeil, Radiology 143, 29 (1982)).
    """
    values, chosen = torch.as_tensor(score), torch.as_tensor(positive).bool().cpu()
    check_shape("score", values, ("n",))
    check_shape("positive", chosen, (len(values),))
    yes, no = int(chosen.sum()), int((~chosen).sum())
    if not yes or not no:
        return math.nan
    # Mann-Whitney: U = Σ ranks of the positives − n₊(n₊ + 1)/2
    return (_ranks(values)[chosen].sum().item() - yes * (yes + 1) / 2) / (yes * no)


def _ranks(values: Tensor) -> Tensor:
    from scipy.stats import rankdata  # slow to import

    return torch.from_numpy(rankdata(values.detach().cpu().double().numpy()))


@dataclass(frozen=True)
class SparsificationCurve:
    """Rms error of what remains when the most uncertain errors are removed (Ilg et al., ECCV 2018).

    Attributes:
        removed: (fractions,) shares removed.
        rmse: (fractions,) where those of the largest std are removed; oracle: where the largest errors are. Unit of the errors.
        share_of_oracle: 1 = std orders as the errors do, 0 = as chance: 1 − ∫ (rmse − oracle) / ∫ (rmse of all − oracle); NaN where
            all errors are equal.
    """

    removed: Tensor
    rmse: Tensor
    oracle: Tensor
    share_of_oracle: float


def sparsification_curve(errors: Array, std: Array, fractions: Sequence[float] | Array) -> SparsificationCurve:
    """Remove increasing fractions of the errors, each 0 to 1; one error at least remains.

    Errors of equal std share their mean square, so that their order does not matter.

    Args:
        errors: (n,) NaN = not known, dropped.
        std: (n,)
    """
    _, e, s = known_errors(torch.as_tensor(errors), torch.as_tensor(std))
    removed = torch.as_tensor(fractions, dtype=torch.float64)
    if not ((removed >= 0) & (removed <= 1)).all():
        raise UserError(f"`fractions` must lie between 0 and 1; got {removed.tolist()}.")
    if not len(e):
        nothing = torch.full_like(removed, math.nan)
        return SparsificationCurve(removed, nothing, nothing, math.nan)
    square = e.square()
    _, inverse, count = torch.unique(s, return_inverse=True, return_counts=True)
    shared = (square.new_zeros(len(count)).index_add(0, inverse, square) / count)[inverse]
    left = ((1 - removed) * len(e)).round().long().clamp_min(1).to(e.device)
    rmse, oracle = ((v.cumsum(0)[left - 1] / left).sqrt().cpu() for v in (shared[s.argsort()], square.sort().values))
    gap, room = (torch.trapezoid(v - oracle, removed).item() for v in (rmse, square.mean().sqrt().cpu()))
    return SparsificationCurve(removed, rmse, oracle, 1 - gap / room if room > 0 else math.nan)
