"""Consistency of stresses with energies: whether stresses of strained copies of a structure are the derivatives of their energies.

Between two copies A and B of one structure in different cells (same fractional coordinates), dE/dC : dC = V sigma : (C^-1 dC)
with C the cell, so the trapezoid rule gives the work w that must equal E_B - E_A:

    w = 1/2 [V_A sigma_A : C_A^-1 (C_B - C_A) + V_B sigma_B : C_B^-1 (C_B - C_A)] + O(strain^3)

A fit of dE = a w + b dV over all such pairs tells a wrong sign (a = -1), a wrong unit (a = 1/160.2 for GPa) or a constant
offset of the pressure (a = 1, b = the stress that is missing) from stresses that are right (a = 1, b = 0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gpmlp.core.findings import Finding
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.core.units import GPA
from gpmlp.io.label_checks.units import ENERGY_UNITS, STRESS_UNITS

LARGEST_STRAIN = 0.08
SMALLEST_STRAIN = 1e-4
SAME_COORDINATE = 1e-3
SIGNATURES = 6
WINDOW = 64  # pairs tried per structure, nearest first: bounds the cost
FEWEST_PAIRS = 3
# Error model of one pair, eV/atom: basis-set noise of the energies, and the trapezoid rule (E''' strain^3 / 12, a stiff solid)
ENERGY_NOISE = 2e-4
TRAPEZOID = 30.0
# A hypothesis is rejected when the residual exceeds the error model by this factor, and another must be this much better
REJECTED = 2.0
BETTER = 0.5
SMALLEST_OFFSET = 0.3 * GPA
KIND = "stresses-against-energies"


@dataclass(frozen=True)
class StrainedPairs:
    """Strained copies, per atom: energy differences, works and volume changes, and the error expected of each difference.

    Attributes:
        first, second: (pairs,) structure indices.
        energy: (pairs,) E_B - E_A, eV/atom.
        work: (pairs,) w, eV/atom.
        volume: (pairs,) V_B - V_A, A^3/atom.
        error: (pairs,) eV/atom.
        mean_volume: mean cell volume, A^3.
    """

    first: Tensor
    second: Tensor
    energy: Tensor
    work: Tensor
    volume: Tensor
    error: Tensor
    mean_volume: float

    def __len__(self) -> int:
        return self.first.shape[0]


def check_stresses(structures: Structures, targets: Targets) -> list[Finding]:
    """Compare energy differences of strained copies with the work of their stresses.

    Returns:
        One finding with numbers if sign, unit or pressure contradict the energies; none if they agree, or cannot be compared.
    """
    pairs = strained_pairs(structures, targets)
    if len(pairs) < FEWEST_PAIRS:
        return []
    one = torch.ones((), dtype=pairs.work.dtype)
    agreed = _residual(pairs, one, 0 * one)
    if agreed < REJECTED:
        return []
    offset = _fit(pairs, slope=False)[1]
    slope, both_offset = _fit(pairs, slope=True)
    shifted, fitted = _residual(pairs, one, offset), _residual(pairs, slope, both_offset)
    plain_slope = _slope(pairs)
    disagreement = 1e3 * float((pairs.energy - pairs.work).square().mean().sqrt())
    evidence = f"{len(pairs)} pairs of strained copies, which disagree by {disagreement:.3g} meV/atom rms"
    frames = structures.names[int(pairs.first[0])], structures.names[int(pairs.second[0])]
    numbers = {"pairs": float(len(pairs)), "disagreement_meV_per_atom": disagreement}
    # a wrong sign or unit is tried first, alone: it explains everything with one number that is not near 1
    wrong = min(_residual(pairs, plain_slope, 0 * one), fitted)
    if not 0.5 < slope < 2 and not 0.5 < plain_slope < 2 and wrong < BETTER * agreed:
        return [scale_finding(float(plain_slope), pairs.mean_volume, evidence, frames, numbers)]
    if shifted < BETTER * agreed and abs(offset) > SMALLEST_OFFSET:
        text = (
            f"the stresses contradict the energies by a constant pressure: adding {float(offset) / GPA:+.3g} GPa to each "
            f"diagonal component makes them agree ({evidence}, {1e3 * _rms(pairs, one, offset):.3g} with the offset)."
        )
        advice = "Give stress a wide noise (noise.stress), or leave it out (use_stresses: false)."
        return [Finding(KIND, "warning", text, frames, numbers | {"pressure_GPa": float(offset) / GPA}, advice)]
    if fitted < BETTER * agreed:
        text = (
            f"the stresses contradict the energies: dE = {float(slope):.3g} x V sigma : strain, where 1 is right, and a constant "
            f"{float(both_offset) / GPA:+.3g} GPa is missing ({evidence})."
        )
        numbers |= {"slope": float(slope), "pressure_GPa": float(both_offset) / GPA}
        return [Finding(KIND, "warning", text, frames, numbers, "Check the unit, eV/A^3, and the order of components.")]
    return []


def scale_finding(
    slope: float, volume: float, evidence: str, frames: tuple[str, ...], numbers: dict[str, float], within: float = 0.12
) -> Finding:
    """The finding that names the sign and the unit behind a slope of dE against V sigma : strain.

    Args:
        within: |log| of the ratio of the slope to that of a unit.
    """
    ratio = 1 / abs(slope)
    candidates = {f"the numbers are in {unit} (required: eV/A^3 = 160.2 GPa)": x for unit, x in STRESS_UNITS.items()}
    candidates["the numbers are virials in eV, not divided by the volume"] = volume
    off = {text: abs(math.log(ratio / x)) for text, x in candidates.items()}
    units = [text for text, x in sorted(off.items(), key=lambda entry: entry[1]) if x < within]
    reasons = ["the sign is the opposite one (gpmlp and ASE: positive = tension)"] if slope < 0 else []
    if units:
        reasons.append(" or ".join(units))
    elif not 0.5 < ratio < 2:
        known = [unit for unit, x in ENERGY_UNITS.items() if x < 1 and abs(math.log(ratio * x)) < 0.1]
        or_energies = "".join(f", or the energies are in {unit}" for unit in known)
        reasons.append(f"the numbers are {ratio:.4g} times what they would be in eV/A^3{or_energies}")
    text = (
        f"the stresses contradict the energies: dE = {slope:.3g} x V sigma : strain, where 1 is right; probably "
        f"{' and '.join(reasons)} ({evidence})."
    )
    ending = "Correct the file, or leave stresses out (use_stresses: false)."
    return Finding(KIND, "error", text, frames, numbers | {"slope": slope}, ending)


def strained_pairs(structures: Structures, targets: Targets) -> StrainedPairs:
    """Find pairs of structures with equal species and fractional coordinates in cells that differ by a small strain.

    Structures of one composition are sorted by a smooth signature of their fractional coordinates, and each is compared with
    the next few: the cost grows as the number of structures, not as its square.
    """
    labelled = ~targets.energies.isnan() & ~targets.stresses.isnan().flatten(1).any(1) & structures.periodic.all(1)
    groups: dict[tuple[int, ...], list[int]] = {}
    offsets = structures.offsets.tolist()
    for s in labelled.nonzero().flatten().tolist():
        groups.setdefault(tuple(structures.species[offsets[s] : offsets[s + 1]].tolist()), []).append(s)
    pairs = [torch.zeros(0, 2, dtype=torch.long)]
    pairs += [_copies(structures, torch.tensor(members)) for members in groups.values() if len(members) > 1]
    first, second = torch.cat(pairs).unbind(1)
    return _compare(structures, targets, first, second)


def _copies(structures: Structures, members: Tensor) -> Tensor:
    """(pairs, 2) structures whose fractional coordinates relative to their first atom agree modulo 1."""
    starts, n = structures.offsets[members], int(structures.counts[members[0]])
    positions = structures.positions[starts[:, None] + torch.arange(n)].double()
    fractional = torch.linalg.solve(structures.cells[members].double().mT, positions.mT).mT
    fractional = fractional - fractional[:, :1]
    # periodic and smooth: between copies each number changes by less than 2 pi sqrt(2) SAME_COORDINATE < 9 SAME_COORDINATE
    weights = torch.cos(torch.arange(3 * n * SIGNATURES, dtype=torch.float64) * 2.399963).view(3 * n, SIGNATURES)
    waves = torch.sin(2 * torch.pi * fractional) + torch.cos(2 * torch.pi * fractional)
    signature = waves.flatten(1) @ weights / (3 * n)
    order = signature[:, 0].argsort()
    pairs = []
    for step in range(1, min(WINDOW, len(members) - 1) + 1):
        left, right = order[:-step], order[step:]
        near = ((signature[right] - signature[left]).abs() < 9 * SAME_COORDINATE).all(1)
        left, right = left[near], right[near]
        difference = fractional[left] - fractional[right]
        same = (difference - difference.round()).abs().flatten(1).max(1).values < SAME_COORDINATE
        pairs.append(torch.stack([members[left[same]], members[right[same]]], 1))
    return torch.cat(pairs)


def _compare(structures: Structures, targets: Targets, first: Tensor, second: Tensor) -> StrainedPairs:
    """Energy differences and works of the pairs whose strain is neither negligible nor large."""
    cells, stresses, energies = structures.cells.double(), targets.stresses.double(), targets.energies.double()
    change = cells[second] - cells[first]
    volumes, atoms = torch.linalg.det(cells).abs(), structures.counts.double()
    works, strains = [], []
    for end in (first, second):
        strain = torch.linalg.solve(cells[end], change)  # C^-1 dC
        strains.append(strain)
        works.append(0.5 * volumes[end] * (stresses[end] * strain).sum((1, 2)))
    size = torch.stack([s.flatten(1).norm(dim=1) for s in strains]).max(0).values
    keep = (size > SMALLEST_STRAIN) & (size < LARGEST_STRAIN)
    n = atoms[first]
    energy, work = (energies[second] - energies[first]) / n, (works[0] + works[1]) / n
    volume = (volumes[second] - volumes[first]) / n
    error = (ENERGY_NOISE**2 + (TRAPEZOID * size**3) ** 2).sqrt()
    mean_volume = float(volumes[first[keep]].mean()) if keep.any() else float("nan")
    about = energy[keep], work[keep], volume[keep], error[keep]
    return StrainedPairs(first[keep], second[keep], *about, mean_volume)


def _fit(pairs: StrainedPairs, slope: bool) -> tuple[Tensor, Tensor]:
    """Weighted least squares of dE = a w + b dV, with a = 1 unless slope; returns a, b."""
    weight = 1 / pairs.error
    if not slope:
        v, y = pairs.volume * weight, (pairs.energy - pairs.work) * weight
        return torch.ones((), dtype=v.dtype), (v @ y) / (v @ v).clamp_min(1e-300)
    # columns of like size: a wrong unit makes the work thousands of times larger than the volume change
    columns = torch.stack([pairs.work * weight, pairs.volume * weight], 1)
    scale = columns.norm(dim=0).clamp_min(1e-300)
    solution = (
        torch.linalg.lstsq(columns / scale, (pairs.energy * weight)[:, None], driver="gelsd").solution[:, 0] / scale
    )
    return solution[0], solution[1]


def _slope(pairs: StrainedPairs) -> Tensor:
    """Weighted least squares of dE = a w."""
    x, y = pairs.work / pairs.error, pairs.energy / pairs.error
    return (x @ y) / (x @ x).clamp_min(1e-300)


def _residual(pairs: StrainedPairs, slope: Tensor, offset: Tensor) -> float:
    """Root mean square of dE - a w - b dV in units of the expected error."""
    return float(((pairs.energy - slope * pairs.work - offset * pairs.volume) / pairs.error).square().mean().sqrt())


def _rms(pairs: StrainedPairs, slope: Tensor, offset: Tensor) -> float:
    """Root mean square of dE - a w - b dV, eV/atom."""
    return float((pairs.energy - slope * pairs.work - offset * pairs.volume).square().mean().sqrt())
