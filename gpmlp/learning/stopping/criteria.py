"""Stopping criteria, each a pure function of series: plateau of the uncertainty, convergence of a mean, coverage of the trust region.

Each takes lists with one array for each walker and returns a Criterion: met, not met, or None where the data are too few to judge.
docs/stopping.md says what they mean and how to choose tolerances.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.special

from gpmlp.core.errors import UserError, chemical_symbol
from gpmlp.learning.recipe import CoverageRecipe, PlateauRecipe
from gpmlp.uncertainty.timeseries import (
    ENOUGH,
    FEWEST,
    correlation_time,
    equilibration_end,
    laplace_test,
    most_by_chance,
    poisson_upper,
    series_mean,
    series_trend,
    wilson_bounds,
)

HALVES = 0.01  # chance with which halves of a stationary series are said to differ
NEGLIGIBLE = 1 / 3  # of the tolerated drift: a trend surely smaller than that does not count, however significant
SMALLEST = 1e-3  # of the median: smaller uncertainties count as this
FARTHEST = 10.0  # novelties above count as this in correlation times; a species without data is infinitely far


@dataclass(frozen=True)
class StopCriterion:
    """The result of one criterion.

    Attributes:
        name: 'plateau', 'observable energy', 'coverage', 'ensemble', ...
        met: None = cannot be judged yet.
        sentence: in words; numbers: by name.
    """

    name: str
    met: bool | None
    sentence: str
    numbers: dict[str, float] = field(default_factory=dict)


def all_met(verdicts: Sequence[bool | None]) -> bool | None:
    """False if one is, else None if one is, else True."""
    if any(v is False for v in verdicts):
        return False
    return None if any(v is None for v in verdicts) else True


def plateau_criterion(
    sigma_max: Sequence[np.ndarray],
    sigma_median: Sequence[np.ndarray],
    times: Sequence[np.ndarray],
    label_times: Sequence[float],
    steps: float,
    recipe: PlateauRecipe = PlateauRecipe(),
    limited: bool = False,
) -> StopCriterion:
    """Whether uncertainty has stopped changing, lies below its threshold, and labels have become rare.

    Args:
        sigma_max, sigma_median: by walker (frames,), largest and median force std of a frame over the threshold of the trigger (or in
            eV/A, if there is none).
        times: by walker (frames,), steps.
        label_times: steps since the start of the window, all walkers together, at which labels were asked for.
        steps: of the window, all walkers together.
        limited: whether uncertainties are over a threshold; the largest of a frame must then be below it in half of them.
    """
    parts = [
        *([_below(sigma_max)] if limited else []),
        steady_criterion("largest", sigma_max, times, recipe),
        steady_criterion("median", sigma_median, times, recipe),
        label_rate_criterion(label_times, steps, recipe),
    ]
    numbers = {f"{p.name}_{k}": v for p in parts for k, v in p.numbers.items()}
    met = all_met([p.met for p in parts])
    return StopCriterion("plateau", met, _each_reason_once([p.sentence for p in parts if p.met is met]), numbers)


def _each_reason_once(sentences: Sequence[str]) -> str:
    """Sentences 'what: reason' in one; a reason that several share stands once, after all that it holds for."""
    whats: dict[str, list[str]] = {}
    for sentence in sentences:
        what, _, reason = sentence.rpartition(": ")
        whats.setdefault(reason, []).append(what)
    return "; ".join(f"{', '.join(what)}: {reason}" if any(what) else reason for reason, what in whats.items())


def _below(sigma_max: Sequence[np.ndarray]) -> StopCriterion:
    """Whether the largest uncertainty of a frame is below its threshold in half of the frames, so that not all requests are in vain."""
    sigma = np.concatenate([s[~np.isnan(s)] for s in sigma_max])
    level = float(np.median(sigma)) if len(sigma) else math.nan
    if len(sigma) < FEWEST:
        return StopCriterion("limit", None, "force uncertainty: too few frames yet", {"level": level})
    return StopCriterion(
        "limit", level <= 1, f"largest force uncertainty {level:.2g} times its limit", {"level": level}
    )


def steady_criterion(
    name: str,
    sigma: Sequence[np.ndarray],
    times: Sequence[np.ndarray],
    recipe: PlateauRecipe = PlateauRecipe(),
) -> StopCriterion:
    """Whether a positive series neither falls nor rises: no trend by Mann and Kendall, and a Theil–Sen slope that is surely small.

    The slope is that of log σ, times the steps of the longest walker: drift = exp(slope × length) − 1.
    """
    what = f"{name} force uncertainty"
    finite = [~np.isnan(s) for s in sigma]
    series = [s[k] for s, k in zip(sigma, finite, strict=True)]
    if sum(len(s) for s in series) < FEWEST:
        return StopCriterion(name, None, f"{what}: too few frames yet", {"frames": sum(len(s) for s in series)})
    level = float(np.median(np.concatenate(series)))
    series = [np.log(np.maximum(s, SMALLEST * level + 1e-300)) for s in series]
    trend = series_trend(series, [t[k] for t, k in zip(times, finite, strict=True)])
    low, middle, high = (float(np.expm1(min(x * trend.duration, 50.0))) for x in (trend.low, trend.slope, trend.high))
    numbers = {"level": level, "drift": middle, "drift_low": low, "drift_high": high}
    numbers |= {"p": trend.p, "correlation_times": trend.n_effective}
    reach = max(abs(low), abs(high))
    if not trend.enough or math.isnan(reach):
        sentence = f"{what} has {trend.n_effective:.0f} correlation times so far: {ENOUGH} are needed to see a trend"
        return StopCriterion(name, None, sentence, numbers)
    said = f"{what} changes by {middle:+.0%} over the window (95 % interval {low:+.0%} to {high:+.0%}, trend p = {trend.p:.2g})"
    if trend.p < recipe.significance and reach > NEGLIGIBLE * recipe.drift:
        return StopCriterion(name, False, f"{said}: it is still {'falling' if middle < 0 else 'rising'}", numbers)
    if reach > recipe.drift:
        return StopCriterion(name, None, f"{said}: a drift of {recipe.drift:.0%} cannot be excluded yet", numbers)
    return StopCriterion(name, True, f"{said}: it is steady", numbers)


def label_rate_criterion(
    label_times: Sequence[float], steps: float, recipe: PlateauRecipe = PlateauRecipe()
) -> StopCriterion:
    """Whether labels are rare: the 95 % upper bound of their Poisson rate, and Laplace's test that the rate no longer falls."""
    bound = recipe.labels_per_1000_steps
    most = 1000 * poisson_upper(len(label_times)) / steps if steps > 0 else math.inf
    rate = 1000 * len(label_times) / steps if steps > 0 else math.nan
    p = laplace_test(label_times, steps)
    numbers = {"per_1000_steps": rate, "per_1000_steps_at_most": most, "steps": float(steps), "p": p}
    said = f"{len(label_times)} labels asked for in the last {steps:.0f} steps, at most {most:.2g} per 1000 (wanted {bound:g})"
    if most <= bound:
        if p < recipe.significance:
            return StopCriterion("labels", False, f"{said}, but they are still getting rarer", numbers)
        return StopCriterion("labels", True, said, numbers)
    # so many labels at the wanted rate: if that is unlikely the rate is too high, else it is uncertain
    surely = len(label_times) > 0 and steps > 0
    surely = surely and scipy.special.pdtr(len(label_times) - 1, bound * steps / 1000) > 0.95
    return StopCriterion("labels", False if surely else None, said, numbers)


def mean_criterion(
    name: str, series: Sequence[np.ndarray], tolerance: float, relative: bool, unit: str = ""
) -> StopCriterion:
    """Whether the standard error of the mean of an observable is within a tolerance.

    Equilibration is left out of each walker (Chodera 2016). The standard error is the larger of that from the correlation time and that
    from blocks. Second halves of the walkers must not differ from first ones: |Δ|² / (components γ(0) g (1/n₁ + 1/n₂)) follows F.

    Args:
        series: by walker (frames,) or (frames, components); rows with a NaN are left out.
        tolerance: of the standard error (rms over components), in `unit` or relative to the rms of the mean.

    Raises:
        UserError: infinite values.
    """
    title, rows = f"observable {name}", [s.reshape(len(s), math.prod(s.shape[1:])) for s in series]
    rows = [s[~np.isnan(s).any(1)] for s in rows]
    if sum(len(s) for s in rows) < FEWEST:
        return StopCriterion(title, None, f"{name}: too few frames yet", {"frames": sum(len(s) for s in rows)})
    rows = [s[equilibration_end(_leading(s)) :] for s in rows if len(s)]
    mean = series_mean(rows)
    level = math.sqrt(float((mean.value**2).mean()))
    allowed = tolerance * level if relative else tolerance
    sem = max(mean.sem, mean.sem_blocking)
    difference, p = _halves(rows, mean.sem, mean.dimension, mean.freedom)
    numbers = {
        "mean": float(mean.value[0]) if mean.value.size == 1 else level,
        "sem": sem,
        "tolerance": allowed,
        "correlation_frames": mean.correlation_time,
        "correlation_times": mean.n_effective,
        "halves_difference": difference,
        "halves_p": p,
        "frames": float(mean.n),
    }
    what = f"{'rms ' if mean.value.size > 1 else ''}{name} {numbers['mean']:.4g}"
    said = f"{what} ± {sem:.2g}{' ' + unit if unit else ''} (wanted ± {allowed:.2g})"
    if not mean.enough:
        times = f"{mean.n_effective:.0f} correlation times so far, {ENOUGH} are needed to trust a standard error"
        return StopCriterion(title, None, f"{name}: {times}", numbers)
    if p < HALVES and difference > allowed:
        said += f", but the second half differs from the first by {difference:.2g}"
        return StopCriterion(title, False, said, numbers)
    return StopCriterion(title, sem <= allowed, said, numbers)


def _leading(series: np.ndarray) -> np.ndarray:
    """(frames,) the component along which a vector varies most."""
    centred = series - series.mean(0)
    return centred[:, 0] if centred.shape[1] == 1 else centred @ np.linalg.eigh(centred.T @ centred)[1][:, -1]


def _halves(series: Sequence[np.ndarray], sem: float, dimension: float, freedom: float) -> tuple[float, float]:
    """(rms difference of the means of second and first halves, chance of one so large)."""
    first = np.concatenate([s[: len(s) // 2] for s in series])
    second = np.concatenate([s[len(s) // 2 :] for s in series])
    if not len(first) or sem <= 0:
        return 0.0, 1.0
    difference = math.sqrt(float(((second.mean(0) - first.mean(0)) ** 2).mean()))
    n = len(first) + len(second)
    expected = sem * math.sqrt(n / len(first) + n / len(second))  # sem² n = γ(0) g
    return difference, float(scipy.special.fdtrc(dimension, freedom, (difference / expected) ** 2))


@dataclass(frozen=True, eq=False)
class NoveltySeries:
    """Novelty in a window; lists by walker.

    Attributes:
        largest: (frames,) novelty of the atom farthest out.
        atoms: by atomic number, lists of (frames,) counts.
        outside: the same, of atoms with a novelty above 1.
        each_atom: (atoms,) share of the frames in which each atom was outside.
    """

    largest: Sequence[np.ndarray]
    atoms: Mapping[int, Sequence[np.ndarray]]
    outside: Mapping[int, Sequence[np.ndarray]]
    each_atom: Sequence[np.ndarray]


def coverage_criterion(
    series: NoveltySeries, quantile: float = 0.99, recipe: CoverageRecipe = CoverageRecipe()
) -> StopCriterion:
    """Whether the dynamics stays inside the trust region: frames, atoms of each species, and each single atom.

    Of environments like the held-out ones a share 1 − q lies outside by construction. A frame is inside if no more of its atoms are
    outside, species by species, than that explains (with chance 99 %), and none has a novelty above `far`. Bounds are Wilson's with
    effective numbers: frames are n/g, atoms as many as the scatter of their counts between frames leaves.

    Args:
        quantile: q of the recipe's novelty.

    Raises:
        UserError: a quantile outside 0 to 1.
    """
    if not 0 < quantile < 1:
        raise UserError(f"`quantile` must lie between 0 and 1, as 0.99; got {quantile}.")
    novelty = [v for v in series.largest if len(v)]
    n = sum(len(v) for v in novelty)
    if n < FEWEST or np.isnan(np.concatenate(novelty)).any():
        why = "too few frames yet" if n < FEWEST else "the novelty of some frames was not computed"
        return StopCriterion("coverage", None, f"trust region: {why}", {"frames": n})
    inside = frames_inside(series.largest, series.atoms, series.outside, quantile, recipe.far)
    g = _slowest([np.minimum(v, FARTHEST) for v in novelty], [i.astype(float) for i in inside if len(i)])
    frames = n / g
    share = float(np.concatenate(inside).mean())
    low, high = wilson_bounds(share, frames)
    numbers = {"frames": share, "frames_at_least": low, "correlation_times": frames}
    numbers["novelty_max"] = float(max(v.max() for v in novelty))
    said = f"{share:.2%} of frames inside, {low:.2%} to {high:.2%} (90 % interval, wanted: {recipe.frames:.2%} or more for sure)"
    parts = (
        StopCriterion("frames", _bounded(low, high, recipe.frames), said),
        _atoms_inside(series, frames, quantile, recipe),
        _lasting_atoms(series, frames, recipe),
    )
    numbers |= {k: v for part in parts for k, v in part.numbers.items()}
    met = all_met([part.met for part in parts])
    if met is not False and frames < ENOUGH:
        needed = f"trust region: {frames:.0f} correlation times of the novelty so far, {ENOUGH} are needed"
        return StopCriterion("coverage", None, needed, numbers)
    return StopCriterion("coverage", met, "; ".join(part.sentence for part in parts if part.met is met), numbers)


def _bounded(low: float, high: float, wanted: float) -> bool | None:
    """Whether a share is surely at least what is wanted; None where that is open."""
    return True if low >= wanted else False if high < wanted else None


def _slowest(*groups: Sequence[np.ndarray]) -> float:
    """Longest correlation time of several kinds of series, in frames, at least 1."""
    times = [1.0]
    for group in groups:
        middle = float(np.concatenate(group).mean())
        times.append(correlation_time([v[:, None] - middle for v in group], 1)[0])
    return max(times)


def frames_inside(
    largest: Sequence[np.ndarray],
    atoms: Mapping[int, Sequence[np.ndarray]],
    outside: Mapping[int, Sequence[np.ndarray]],
    quantile: float,
    far: float,
) -> list[np.ndarray]:
    """By walker (frames,): whether a frame is inside; see `coverage` and Novelties."""
    inside = [v <= far for v in largest]
    for z, counts in atoms.items():
        sizes = np.unique(np.concatenate(list(counts)))
        most = {int(k): most_by_chance(int(k), 1 - quantile) for k in sizes}
        for w, (total, out) in enumerate(zip(counts, outside[z], strict=True)):
            inside[w] &= out <= np.array([most[int(k)] for k in total], dtype=int)
    return inside


def wanted_atoms(recipe: CoverageRecipe, quantile: float) -> float:
    """Share of the atoms that must lie inside the trust region, of which a share `quantile` of the training data does."""
    return 1 - min(0.5, 3 * (1 - quantile)) if recipe.atoms is None else recipe.atoms


def _atoms_inside(series: NoveltySeries, frames: float, quantile: float, recipe: CoverageRecipe) -> StopCriterion:
    """The share of atoms inside: of all together at least `atoms`, and of no species surely less, nor perhaps less than `frames`."""
    wanted = wanted_atoms(recipe, quantile)
    numbers: dict[str, float] = {}
    parts = []
    surely = min(wanted, recipe.frames)  # of a species, not surely fewer than of all
    everything = {
        "atoms": (_sum(series.atoms.values()), _sum(series.outside.values())),
        **{
            chemical_symbol(z): (np.concatenate(list(c)), np.concatenate(list(series.outside[z])))
            for z, c in series.atoms.items()
        },
    }
    for name, (total, out) in everything.items():
        if not total.sum() or (name != "atoms" and len(series.atoms) == 1):
            continue
        share = 1 - float(out.sum() / total.sum())
        low, high = wilson_bounds(share, _effective(total, out, frames))
        numbers |= {f"{name}_inside": share, f"{name}_inside_at_least": low}
        met = False if high < wanted else True if low >= (wanted if name == "atoms" else surely) else None
        rule = (
            f"{wanted:.2%} or more for sure"
            if name == "atoms"
            else f"{surely:.2%} or more for sure, {wanted:.2%} possible"
        )
        parts.append((met, f"{share:.2%} of {name} inside, {low:.2%} to {high:.2%}", rule))
    met = all_met([m for m, _, _ in parts])
    rules: dict[str, list[str]] = {}
    for m, said, rule in parts:
        if m is met:
            rules.setdefault(rule, []).append(said)
    sentence = "; ".join(f"{', '.join(said)} (90 % intervals, wanted: {rule})" for rule, said in rules.items())
    return StopCriterion("atoms", met, sentence, numbers)


def _sum(of_species: Iterable[Sequence[np.ndarray]]) -> np.ndarray:
    return sum((np.concatenate(list(c)) for c in of_species), start=np.zeros(1, dtype=int))


def _effective(total: np.ndarray, out: np.ndarray, frames: float) -> float:
    """Effective number of atoms: as many independent ones would scatter between frames as these do; frames count g⁻¹."""
    p = out.sum() / total.sum()
    chance = total.sum() * p * (1 - p)  # variance of the count, were atoms independent
    excess = max(1.0, float(((out - p * total) ** 2).sum()) / chance) if chance > 0 else 1.0
    return max(frames, float(total.sum()) / excess * frames / len(total))


def _lasting_atoms(series: NoveltySeries, frames: float, recipe: CoverageRecipe) -> StopCriterion:
    """Whether one and the same atom is outside again and again, which shares of many atoms would not show."""
    lasting, worst = 0, 0.0
    total = sum(len(v) for v in series.largest)
    for shares, novelty in zip(series.each_atom, series.largest, strict=True):
        if not len(shares):
            continue
        effective = frames * len(novelty) / total
        worst = max(worst, float(shares.max()))
        often = shares[shares > recipe.persistent].tolist()
        if effective < ENOUGH:
            often = [share for share in often if wilson_bounds(share, effective)[0] > recipe.persistent]
        lasting += len(often)
    numbers = {"lasting_atoms": float(lasting), "lasting_share": worst}
    if lasting:
        said = (
            f"{lasting} atoms are outside in more than {recipe.persistent:.0%} of the frames (the worst in {worst:.0%})"
        )
        return StopCriterion("lasting", False, said, numbers)
    return StopCriterion(
        "lasting", True, f"no atom is outside for long (the worst in {worst:.0%} of the frames)", numbers
    )
