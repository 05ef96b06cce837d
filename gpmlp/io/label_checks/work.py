"""Energies against forces: whether energy differences of near frames are the work that the forces do between them.

A robust fit of dE = a w_F + b w_S (near_frames) over all near pairs of a file gives a = b = 1 where labels are right, a = -1 where
gradients stand for forces, and a = b = 1/27.2 where energies are in Hartree. Cauchy weights (Holland & Welsch, Commun. Stat. A 6, 813
(1977)) keep single wrong frames from deciding; these are then named by their own pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpmlp.core.findings import Finding
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures, rank_in_group
from gpmlp.io.label_checks.near_frames import NearPairs
from gpmlp.io.label_checks.stresses import scale_finding
from gpmlp.io.label_checks.units import ENERGY_UNITS, FORCE_UNITS

FEWEST_PAIRS = 5
# Expected error of one pair: of energies, eV/atom; of the second-order part of the work; of a strain (E''' / 12, a stiff solid), eV/atom
ENERGY_NOISE, THIRD_ORDER, STRAIN_ORDER = 1e-4, 0.1, 30.0
NEAR, NEAR_STRAIN = 0.3, 0.08  # A: beyond it the third order grows against the second
INFORMATIVE = 3.0  # works, in units of the expected error, that say something
BETTER = 0.6  # a slope that is believed leaves at most this of what the slope 1 leaves
STRANGE, BEST = 10.0, 3  # times the scatter of all pairs: a frame whose 3 best pairs all deviate so far is wrong
SMALLEST_DEVIATION = 0.02  # eV/atom
CAUCHY, ITERATIONS = 2.0, 30
PARTS, SURE = (
    16,
    6.0,
)  # of the frames, left out in turn; standard errors from 1: a slope of the opposite sign is believed
TWO_ZEROS = "energies-of-two-zeros"
STEADY, BEYOND = 5.0, 2.5  # times the standard error of its median, and the expected error of a pair: an offset
ZERO_ADVICE = (
    "Compute all frames with one code and one setting, or shift these energies; until then these frames can have an energy noise of "
    "their own (noise.config_types)."
)
ADVICE = "Correct the file (energies in eV, forces in eV/A, F = -dE/dr), or leave one kind out (use_energies or use_forces: false)."


@dataclass(frozen=True)
class _Judgement:
    """How slopes are judged.

    Attributes:
        right: slopes that a small or anharmonic sample of right labels may show.
        explained: of the scatter of dE may be left by a slope that is believed.
        recognised: |log| of the ratio of a slope to that of a unit.
    """

    right: tuple[float, float]
    explained: float
    recognised: float


ON_NEAR = _Judgement((0.67, 1.5), 0.7, 0.2)
# the third order falsifies slopes of pairs that are farther apart, and those of stresses, to a half or twice what is right
ON_FAR = _Judgement((0.3, 3.0), 0.4, 0.6)
RECOGNISED_STRESS = 1.0  # of far pairs: a slope 2.3 times too small is seen


@dataclass(frozen=True)
class WorkFit:
    """A robust fit of energy differences by works.

    Attributes:
        force_slope, stress_slope: a, b; NaN where works of the kind say nothing.
        scatter, at_one, at_zero: median deviation (x 1.48) of dE in units of the expected error: from the fit, from a = b = 1, from 0.
        pairs: number of informative pairs.
        judged: how these slopes are judged.
    """

    force_slope: float
    stress_slope: float
    scatter: float
    at_one: float
    at_zero: float
    pairs: int
    judged: _Judgement

    @property
    def right(self) -> bool:
        """Whether no slope is far from 1 and energies follow the works."""
        (low, high), (lowest, highest) = self.judged.right, ON_FAR.right
        force, stress = self.force_slope, self.stress_slope
        right = math.isnan(force) or low < force < high
        return self.follows and right and (math.isnan(stress) or lowest < stress < highest)

    @property
    def follows(self) -> bool:
        """Whether slopes of 1 explain something."""
        return self.judged is ON_FAR or self.at_one < max(INFORMATIVE, self.judged.explained * self.at_zero)

    @property
    def explains(self) -> bool:
        """Whether the slopes explain the energy differences, and far better than slopes of 1 do."""
        return self.scatter < min(BETTER * self.at_one, self.judged.explained * self.at_zero)


def expected_error(pairs: NearPairs) -> Tensor:
    """(pairs,) eV, of w_F + w_S as the energy difference, where labels are right."""
    far = (pairs.displacement / NEAR).clamp_min(1)
    parts = (
        ENERGY_NOISE * pairs.atoms,
        THIRD_ORDER * far * pairs.curvature,
        STRAIN_ORDER * pairs.strain**3 * pairs.atoms,
    )
    return torch.stack(parts).square().sum(0).sqrt()


def fit_work(pairs: NearPairs) -> WorkFit | None:
    """The fit to near pairs, if these tell the slope of forces, else to all; None where fewer than FEWEST_PAIRS pairs say anything."""
    near = _fit(_nearest(pairs), ON_NEAR)
    if near is not None and not math.isnan(near.force_slope):
        return near
    far = _fit(pairs, ON_FAR)
    return near if far is None or math.isnan(far.force_slope) else far


def _nearest(pairs: NearPairs) -> NearPairs:
    return pairs.select((pairs.displacement < NEAR) & (pairs.strain < NEAR_STRAIN))


def _fit(pairs: NearPairs, judged: _Judgement) -> WorkFit | None:
    sigma = expected_error(pairs)
    works = torch.stack([pairs.force_work, pairs.stress_work], 1) / sigma[:, None]
    useful = (works.abs() > INFORMATIVE).any(1)
    if int(useful.sum()) < FEWEST_PAIRS:
        return None
    works, energy = works[useful], (pairs.energy / sigma)[useful]
    there = (works.abs() > 1e-3).sum(0) >= FEWEST_PAIRS
    columns = works[:, there]
    slopes = _robust_slopes(columns, energy)
    deviations = energy - columns @ slopes, energy - works.sum(1), energy
    scatter, at_one, at_zero = (float(1.4826 * x.abs().median()) for x in deviations)
    both = torch.full((2,), math.nan, dtype=torch.float64)
    both[there] = slopes
    both[(works.abs() > INFORMATIVE).sum(0) < FEWEST_PAIRS] = math.nan
    return WorkFit(float(both[0]), float(both[1]), scatter, at_one, at_zero, len(energy), judged)


def _robust_slopes(columns: Tensor, energy: Tensor) -> Tensor:
    """Slopes by iterated reweighting, from the median of ratios on, which half of the pairs may not upset."""
    main = columns.abs().argmax(1)
    start = (energy / columns.gather(1, main[:, None])[:, 0]).nan_to_num(0.0, 0.0, 0.0)
    slopes = torch.stack(
        [start[main == k].median() if (main == k).any() else torch.ones(()).double() for k in range(columns.shape[1])]
    )
    for _ in range(ITERATIONS):
        deviation = energy - columns @ slopes
        scale = (1.4826 * deviation.abs().median()).clamp_min(1e-9)
        weight = 1 / (1 + (deviation / (CAUCHY * scale)).square()).sqrt()
        left = columns * weight[:, None]
        size = left.norm(dim=0).clamp_min(1e-300)
        slopes = torch.linalg.lstsq(left / size, (energy * weight)[:, None], driver="gelsd").solution[:, 0] / size
    return slopes


def source_of(name: str) -> str:
    """The file in the name of a frame."""
    return name.rpartition(" frame ")[0]


def check_work(structures: Structures, targets: Targets, pairs: NearPairs) -> list[Finding]:
    """Findings about the energies of each file against its forces and stresses; a note where no frames are near enough to tell."""
    sources = [source_of(name) for name in structures.names]
    numbers = {source: k for k, source in enumerate(dict.fromkeys(sources))}
    of_frame = torch.tensor([numbers[source] for source in sources], dtype=torch.long)
    pairs = pairs.select(of_frame[pairs.first] == of_frame[pairs.second])
    types = {name: k for k, name in enumerate(dict.fromkeys(targets.config_types))}
    of_type = torch.tensor([types[name] for name in targets.config_types], dtype=torch.long)
    labelled = bool((~targets.energies.isnan()).any() and (~targets.forces.isnan()).any())
    out, judged = [], False
    for source, k in numbers.items():
        part = pairs.select(of_frame[pairs.first] == k)
        zeros = _two_zeros(structures, targets.config_types, of_frame == k, part)
        out += zeros
        if zeros:  # these would upset the slope
            part = part.select(of_type[part.first] == of_type[part.second])
        fit = fit_work(part)
        if fit is None or (fit.right and math.isnan(fit.stress_slope)):
            out += _opposite_stresses(structures, part)
        if fit is None:
            continue
        judged = judged or not math.isnan(fit.force_slope)
        if fit.right:
            out += _strange_frames(structures, part, fit)
        else:
            out += _contradiction(structures, part, fit, f" of {source}" if len(numbers) > 1 else "")
    if labelled and not judged and len(structures) > 1:
        telling = int((pairs.force_work.abs() > INFORMATIVE * expected_error(pairs)).sum())
        text = (
            f"energies could not be compared with forces: no two frames are so near and moved so far along forces that they tell "
            f"({telling} pairs do, {FEWEST_PAIRS} are needed)."
        )
        out.append(Finding("energies-against-forces-no-verdict", "note", text))
    return out


def _opposite_stresses(structures: Structures, pairs: NearPairs) -> list[Finding]:
    """Stresses of the opposite sign, by all pairs together where no single one says anything about stresses."""
    works = torch.stack([pairs.force_work, pairs.stress_work], 1) / expected_error(pairs)[:, None]
    energy = pairs.energy / expected_error(pairs)
    if int((pairs.stress_work != 0).sum()) < PARTS * FEWEST_PAIRS:
        return []

    def slope(kept: Tensor) -> float:
        return float(_robust_slopes(works[kept], energy[kept])[1])

    every = slope(torch.ones_like(pairs.first, dtype=torch.bool))
    parts = torch.tensor([slope((pairs.first % PARTS != k) & (pairs.second % PARTS != k)) for k in range(PARTS)])
    error = float(((PARTS - 1) * parts.var(correction=0)).sqrt())  # of the jackknife by frames
    if not (every < -2 * error and 1 - every > SURE * error):
        return []
    volume, evidence = float(structures.volumes[pairs.first].nanmean()), f"{len(pairs)} pairs of near frames"
    numbers = {"pairs": float(len(pairs)), "slope_error": error}
    return [scale_finding(every, volume, evidence, example_frames(structures, pairs), numbers)]


def _contradiction(structures: Structures, pairs: NearPairs, fit: WorkFit, where: str) -> list[Finding]:
    """What slopes that are not 1 say about units and signs."""
    if not fit.explains:
        return _unrelated(structures, pairs, fit, where)
    a, b = fit.force_slope, fit.stress_slope
    slopes = {"slope_forces": a, "slope_stresses": b}
    numbers = {"pairs": float(fit.pairs)} | {name: s for name, s in slopes.items() if not math.isnan(s)}
    low, high = fit.judged.right
    if math.isnan(a) or low < a < high:
        volume = float(structures.volumes[pairs.first].nanmean())
        evidence = f"{fit.pairs} pairs of near frames"
        within = ON_FAR.recognised if fit.judged is ON_NEAR else RECOGNISED_STRESS
        return [scale_finding(b, volume, evidence, example_frames(structures, pairs), numbers, within)]
    atoms = pairs.atoms.unique()
    together = not math.isnan(b) and 0 < a / b and abs(math.log(a / b)) < ON_FAR.recognised
    alone = not math.isnan(b) and ON_FAR.right[0] < b < ON_FAR.right[1]
    count = float(atoms[0]) if len(atoms) == 1 else math.nan
    reasons = explain_slope(a, count, not alone, not together, fit.judged.recognised)
    text = f"the energies{where} contradict the forces: energy differences of near frames are {a:.3g} x -F.dr, where 1 is right"
    if together:
        text += f", and {b:.3g} x the work of the stresses, so that forces and stresses agree with each other"
    elif alone:
        text += ", but agree with the work of the stresses"
    text += (
        f" ({fit.pairs} pairs); {'probably ' + ' or '.join(reasons) if reasons else 'no common unit explains that'}."
    )
    return [Finding("energies-against-forces", "error", text, example_frames(structures, pairs), numbers, ADVICE)]


def explain_slope(
    slope: float,
    atoms: float = math.nan,
    energies: bool = True,
    forces: bool = True,
    within: float = ON_NEAR.recognised,
    causes: int = 2,
) -> list[str]:
    """Units and signs that give this slope, the simplest first.

    Args:
        atoms: number of atoms of a frame, if all have as many.
        energies, forces: whether these may be what is wrong.
        within: |log| of the ratio to the slope of a unit. causes: at most; units of one system count as one.
    """
    sign = ["the forces have the wrong sign (they are gradients)"] if slope < 0 else []
    size = abs(slope)
    if sign and abs(math.log(size)) < max(within, 0.4):
        return sign
    found: list[tuple[int, float, str]] = []
    for (e, per_eV), (f, per_force) in itertools.product(ENERGY_UNITS.items(), FORCE_UNITS.items()):
        if (e != "eV" and not energies) or (f != "eV/A" and not forces):
            continue
        off = abs(math.log(size * per_force / per_eV))
        words = [f"the energies are in {e}"] * (e != "eV") + [f"the forces are in {f}"] * (f != "eV/A")
        alike = f.startswith(e)  # of one system of units: one cause
        found.append((1 if alike else len(words), off, " and ".join(words)))
    if atoms == atoms:
        found.append((1, abs(math.log(size * atoms)), "the energies are per atom"))
    found = sorted(entry for entry in found if entry[1] < within and 0 < entry[0] <= causes)
    if not found:
        return sign
    simplest = [entry for entry in found if entry[0] == found[0][0]]
    best = min(off for _, off, _ in simplest)
    words = [text for _, off, text in simplest if off < best + within / 4]
    return [" and ".join([*sign, word]) for word in words[:3]]


def _unrelated(structures: Structures, pairs: NearPairs, fit: WorkFit, where: str) -> list[Finding]:
    """Energies that have nothing to do with the forces of near frames."""
    if fit.follows:
        return []
    text = (
        f"the energies{where} contradict the forces: energy differences of near frames have no relation to -F.dr "
        f"({fit.pairs} pairs; typical deviation {fit.at_one:.2g} times what is expected)."
    )
    advice = "Check that energies and forces belong to the same frames in the same order, and the units of both."
    numbers = {"pairs": float(fit.pairs), "deviation_in_expected_errors": fit.at_one}
    return [Finding("energies-against-forces", "error", text, example_frames(structures, pairs), numbers, advice)]


def _strange_frames(structures: Structures, pairs: NearPairs, fit: WorkFit) -> list[Finding]:
    """Frames whose energy contradicts the forces in all their pairs, while other frames agree."""
    pairs = _nearest(pairs)
    deviation, error = pairs.energy - pairs.force_work - pairs.stress_work, expected_error(pairs)
    strange = deviation.abs() > (STRANGE * max(fit.scatter, 1.0) * error).maximum(SMALLEST_DEVIATION * pairs.atoms)
    if not strange.any():
        return []
    # of each frame the BEST pairs with the smallest expected errors
    ends, deviations = torch.cat([pairs.first, pairs.second]), torch.cat([-deviation, deviation])
    order = ends[(by_error := error.repeat(2).argsort(stable=True))].argsort(stable=True)
    order = by_error[order]
    rank, counts = rank_in_group(ends[order], len(structures))
    best = order[rank < BEST]
    bad = torch.bincount(ends[best][strange.repeat(2)[best]], minlength=len(structures))
    named = ((bad == counts.clamp_max(BEST)) & (counts > 1)).nonzero().flatten().tolist()
    out = []
    for s in named:
        off = float(deviations[best][ends[best] == s].median())
        count = int(counts.clamp_max(BEST)[s])
        text = f"the energy contradicts the forces: it is {off:+.3g} eV off what the forces of {count} near frames lead to."
        advice = "Compute this frame again, or remove it."
        out.append(
            Finding("energy-against-near-frames", "error", text, (structures.names[s],), {"deviation_eV": off}, advice)
        )
    return out


def _two_zeros(structures: Structures, config_types: Sequence[str], here: Tensor, pairs: NearPairs) -> list[Finding]:
    """Config_types whose energies are off those of most frames by the same amount per atom, in pairs of near frames of both.

    Args:
        here: (structures,) bool, frames of the file that the pairs are of.
    """
    names = list(dict.fromkeys(config_types))
    of_frame = torch.tensor([names.index(name) for name in config_types], dtype=torch.long)
    counts = torch.bincount(of_frame[here], minlength=len(names)).tolist()
    ends = torch.stack([of_frame[pairs.first], of_frame[pairs.second]])
    deviation = (pairs.energy - pairs.force_work - pairs.stress_work) / pairs.atoms
    out = []
    for zeros in _tied(_steps(ends, deviation, pairs)):
        reference, *others = sorted(_alike(zeros), key=lambda heap: (-sum(counts[k] for k in heap), heap))
        zero = torch.tensor([zeros.get(k, math.nan) for k in range(len(names))], dtype=torch.float64)
        for heap in others:
            inside, known = (torch.isin(ends, torch.tensor(groups)) for groups in (heap, reference))
            between = (inside[0] & known[1]) | (inside[1] & known[0])
            between = between if between.any() else inside[0] ^ inside[1]
            off = float(zero[heap].mean() - zero[reference].mean())
            rest = deviation[between] - (zero[ends[1]] - zero[ends[0]])[between]
            mine, most = (
                ", ".join(names[k] or "frames without a config_type" for k in part) for part in (heap, reference)
            )
            text = (
                f"the energies of {mine} are {off:+.3g} eV/atom off what forces lead to from near frames of {most}, and scatter by "
                f"{float(1.4826 * rest.abs().nanmedian()):.2g} ({int(between.sum())} pairs): probably they have two zeros (code, "
                "functional, pseudopotential, settings)."
            )
            frames, numbers = example_frames(structures, pairs.select(between)), {"offset_eV_per_atom": off}
            out.append(Finding(TWO_ZEROS, "error", text, frames, numbers, ZERO_ADVICE))
    return out


def _steps(ends: Tensor, deviation: Tensor, pairs: NearPairs) -> dict[tuple[int, int], float]:
    """Zero of the second − that of the first of two groups, eV/atom, where near frames tell it; 0 where it is none beyond its error."""
    error, found = expected_error(pairs) / pairs.atoms, {}
    for i, j in itertools.combinations(ends.unique().tolist(), 2):
        between = (ends.min(0).values == i) & (ends.max(0).values == j)
        if int(between.sum()) < FEWEST_PAIRS:
            continue
        turned = torch.where(ends[0] == i, deviation, -deviation)[between]
        off = turned.median()
        scatter = 1.4826 * (turned - off).abs().median()
        frames = torch.stack([pairs.first, pairs.second], 1)[between].flatten()
        groups = ends.T[between].flatten()
        independent = min(len(frames[groups == k].unique()) for k in (i, j))  # frames of the one or the other
        if independent < FEWEST_PAIRS:
            continue
        least = SMALLEST_DEVIATION, float(STEADY * scatter / independent**0.5), float(BEYOND * error[between].median())
        found[i, j] = float(off) if off.abs() >= max(least) else 0.0
    return found


def _tied(steps: Mapping[tuple[int, int], float]) -> Iterator[dict[int, float]]:
    """Zeros of the groups that steps tie to each other, along the largest steps; of each such set by itself."""
    left = dict(sorted(steps.items(), key=lambda step: -abs(step[1])))
    while left:
        zeros = {next(iter(left))[0]: 0.0}
        while near := next((ends for ends in left if zeros.keys() & set(ends)), None):
            (i, j), step = near, left.pop(near)
            if i in zeros:
                zeros.setdefault(j, zeros[i] + step)
            else:
                zeros[i] = zeros[j] - step
        yield zeros


def _alike(zeros: Mapping[int, float]) -> list[list[int]]:
    """Groups of one zero."""
    heaps: list[list[int]] = []
    last = -math.inf
    for k in sorted(zeros, key=lambda k: zeros[k]):
        if zeros[k] - last < SMALLEST_DEVIATION:
            heaps[-1].append(k)
        else:
            heaps.append([k])
        last = zeros[k]
    return [sorted(heap) for heap in heaps]


def example_frames(structures: Structures, pairs: NearPairs) -> tuple[str, ...]:
    """Names of the two frames of the pair that says most."""
    best = int(((pairs.force_work.abs() + pairs.stress_work.abs()) / expected_error(pairs)).argmax())
    return structures.names[int(pairs.first[best])], structures.names[int(pairs.second[best])]
