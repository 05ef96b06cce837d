"""Environments with the worst errors or error bars, their drawings, and the structures most worth labelling next."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
from markupsafe import Markup

from gpmlp.core.errors import chemical_symbol
from gpmlp.report.drawing import TURN, draw_atoms
from gpmlp.report.model.data import NO_TYPE, ReportData
from gpmlp.report.model.numbers import finite_median
from gpmlp.report.style import CAUSE_PHRASES, format_percent, species_colours

LISTED = 20
PER_STRUCTURE = 3
OVERCONFIDENT = 3.0  # standard deviations
SIGNS = {  # warning signs of an environment, and what they mean
    "new species": "of a species without training data",
    "novel": "outside the trust region: unlike all training data",
    "overconfident": f"the error is beyond {OVERCONFIDENT:g} σ",
}
MOST = 56  # atoms drawn, the nearest
MOST_IMAGES = 7  # cells on each side


def error_std_ratio(data: ReportData) -> np.ndarray:
    """(atoms,) root mean square of error / std over the three force components."""
    std = data.force_std if data.force_std is not None else np.full_like(data.force_predicted, np.nan)
    scaled = (data.force_predicted - data.force_reference) / np.where(std > 0, std, np.nan)
    return np.sqrt(np.mean(scaled**2, axis=1))


def worst_environments(data: ReportData) -> dict[str, list[dict[str, Any]]]:
    """The LISTED worst atoms by error / std and by std, at most PER_STRUCTURE of each structure."""
    scaled, std = error_std_ratio(data), data.atom_std
    rankings = {"by_error_over_std": scaled, "by_std": std}
    if not np.isfinite(std).any():
        rankings = {"by_error": data.atom_error} if data.novelty is None else {"by_novelty": data.novelty}
    shares = data.shares
    return {
        name: [_describe(data, int(row), scaled, std, shares) for row in _top(data, values)]
        for name, values in rankings.items()
        if (~np.isnan(values)).any()
    }


def _top(data: ReportData, values: np.ndarray) -> list[int]:
    top: list[int] = []
    used: Counter[int] = Counter()
    for row in np.argsort(-np.nan_to_num(values, nan=-np.inf, posinf=1e300), kind="stable"):
        owner = int(data.structure[row])
        if len(top) == LISTED or np.isnan(values[row]):
            break
        if used[owner] < PER_STRUCTURE:
            used[owner] += 1
            top.append(int(row))
    return top


def _describe(
    data: ReportData, row: int, scaled: np.ndarray, std: np.ndarray, shares: dict[str, np.ndarray]
) -> dict[str, Any]:
    """One row of the table."""
    owner, nan = int(data.structure[row]), float("nan")
    novelty = nan if data.novelty is None else float(data.novelty[row])
    cause = max(shares, key=lambda name: np.nan_to_num(shares[name][row], nan=-1), default="")
    share = float(shares[cause][row]) if cause else nan
    return {
        "row": row,
        "structure": data.names[owner],
        "config_type": data.config_type[owner],
        "atom": int(data.atom[row]),
        "element": chemical_symbol(int(data.species[row])),
        "force_error_meV_per_A": float(1e3 * data.atom_error[row]),
        "force_std_meV_per_A": float(1e3 * std[row]),
        "error_over_std": float(scaled[row]),
        "novelty": novelty,
        "local_energy_std_meV": nan if data.local_energy_std is None else float(1e3 * data.local_energy_std[row]),
        "cause": cause,
        "cause_share": share,
        "signs": [sign for sign, holds in zip(SIGNS, _signs(novelty, float(scaled[row])), strict=True) if holds],
        "why": _reasons(data, float(scaled[row]), novelty, cause, share),
    }


def _signs(novelty: float, scaled: float) -> tuple[bool, ...]:
    """Whether each of SIGNS holds for an environment."""
    return bool(np.isinf(novelty)), 1 < novelty < np.inf, scaled > OVERCONFIDENT


def _reasons(data: ReportData, scaled: float, novelty: float, cause: str, share: float) -> str:
    """Why an environment is flagged, in words."""
    words = []
    if np.isinf(novelty):
        words.append("of a species without training data")
    elif novelty > 1:
        words.append(f"outside the trust region (novelty {novelty:.1f})")
    if scaled > OVERCONFIDENT:
        words.append(f"overconfident: error {scaled:.1f} σ")
    if share > 0:
        lead = "dominated by" if share > 0.5 else "largest cause:"
        words.append(f"{lead} {CAUSE_PHRASES.get(cause, cause)} ({format_percent(share)} of the variance)")
    if scaled <= OVERCONFIDENT:
        words.insert(0, f"a large error bar, and an error of {scaled:.1f} σ")
    elif data.force_std is not None and np.isnan(scaled):
        words.insert(0, "a large error bar")
    elif not words:
        words.append(f"novelty {novelty:.2f}" if novelty >= 0 else "among the largest errors, without a warning sign")
    return "; ".join(words)


def label_next(data: ReportData, wanted: int = 15) -> list[dict[str, Any]]:
    """Structures worth labelling: large force std times novelty (where above 1), each repeat of a group counting 30 % less."""
    std, n = data.atom_std, len(data.names)
    owner = np.asarray(data.structure)
    largest, novelty = np.zeros(n), np.full(n, np.nan)
    np.maximum.at(largest, owner, np.nan_to_num(std))
    if data.novelty is not None:
        novelty = np.zeros(n)
        np.maximum.at(novelty, owner, np.nan_to_num(data.novelty, posinf=np.inf))
    if not largest.any() and not np.nan_to_num(novelty).any():
        return []
    typical = finite_median(largest[largest > 0]) if largest.any() else 1.0
    score = (largest / typical if largest.any() else np.ones(n)) * np.clip(np.nan_to_num(novelty, nan=1.0), 1, 5)
    groups = [
        t if t and t != NO_TYPE else re.sub(r"\d+", "#", name)
        for t, name in zip(data.config_type, data.names, strict=True)
    ]
    cap = max(4, -(-wanted // max(len(set(groups)), 1)))
    chosen: list[int] = []
    used: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for _ in range(min(wanted, n)):
        left = score * np.array([0.7 ** used[g] for g in groups])
        blocked = [names[data.names[i]] >= 2 or used[groups[i]] >= cap for i in range(n)]
        left[np.array(blocked) | np.isin(np.arange(n), chosen)] = -1
        best = int(left.argmax())
        if left[best] <= 0:
            break
        chosen.append(best)
        used[groups[best]] += 1
        names[data.names[best]] += 1
    return [_candidate(data, i, typical, score[i], novelty[i]) for i in chosen]


def _candidate(data: ReportData, index: int, typical: float, score: float, novelty: float) -> dict[str, Any]:
    """One suggested structure with a one-line explanation."""
    rows = np.flatnonzero(np.asarray(data.structure) == index)
    std = np.nan_to_num(data.atom_std[rows])
    words, atom, times = [], "", float("nan")
    if len(rows) and std.max() > 0:
        worst = rows[int(std.argmax())]
        atom, times = f"{chemical_symbol(int(data.species[worst]))} {data.atom[worst]}", float(std.max() / typical)
        words.append(f"σ at {atom} is {times:.1f} times that of a median structure")
    outside = float("nan")
    if data.novelty is not None and len(rows):
        outside = float(np.mean(data.novelty[rows] > 1))
        if np.isinf(novelty):
            words.append("holds species without training data")
        if outside:
            words.append(f"{format_percent(outside)} of its atoms outside the trust region")
    removable = float("nan")
    if data.causes and len(rows):
        sums = {cause: np.nansum(data.force_variance[cause][rows]) for cause in data.causes}
        total = sum(sums.values())
        removable = float((sums.get("data", 0.0) + sums.get("inducing", 0.0)) / total) if total > 0 else float("nan")
        if removable == removable:
            words.append(f"up to {format_percent(removable)} of the variance removable by labels and inducing points")
    return {
        "structure": data.names[index],
        "config_type": data.config_type[index],
        "n_atoms": int(data.n_atoms[index]),
        "largest_force_std_meV_per_A": float(1e3 * std.max()) if len(rows) else float("nan"),
        "largest_novelty": float(novelty),
        "worst_atom": atom,
        "times_median": times,
        "share_outside": outside,
        "removable_share": removable,
        "score": float(score),
        "why": "; ".join(words),
    }


# ---------------------------------------------------------------- drawings


def neighbour_vectors(data: ReportData, row: int) -> tuple[np.ndarray, np.ndarray]:
    """(k, 3) vectors from an atom to those within the cutoff, itself first, and their species; periodic images included."""
    owner = int(data.structure[row])
    rows = np.flatnonzero(np.asarray(data.structure) == owner)
    positions, cutoff = np.asarray(data.positions), float(data.cutoff or 0.0)
    vectors = positions[rows] - positions[row]
    shifts = np.zeros((1, 3))
    if data.cells is not None:
        cell = np.asarray(data.cells[owner], dtype=float)
        lengths = np.linalg.norm(cell, axis=1)
        along = (
            lengths > 1e-6 if data.periodic is None else np.asarray(data.periodic[owner], dtype=bool) & (lengths > 1e-6)
        )
        shifts = _images(cell, along, vectors, cutoff)
    images = (vectors[None] + shifts[:, None]).reshape(-1, 3)
    species = np.tile(data.species[rows], len(shifts))
    distance = np.linalg.norm(images, axis=1)
    order = np.argsort(distance, kind="stable")[:MOST]
    order = order[distance[order] <= cutoff]
    return images[order], species[order]


def _images(cell: np.ndarray, along: np.ndarray, vectors: np.ndarray, cutoff: float) -> np.ndarray:
    """(k, 3) lattice translations that can bring an atom within the cutoff."""
    cell = cell.copy()
    for axis in np.flatnonzero(~along):  # any vector that is not in the span of the periodic ones
        _, _, basis = np.linalg.svd(cell[np.arange(3) != axis])
        cell[axis] = basis[-1]
    heights = 1 / np.linalg.norm(np.linalg.pinv(cell), axis=0)
    reach = np.linalg.norm(vectors, axis=1).max() + cutoff
    counts = np.where(along, np.minimum(np.ceil(reach / np.maximum(heights, 1e-6)), MOST_IMAGES), 0).astype(int)
    grids = np.meshgrid(*(np.arange(-n, n + 1) for n in counts), indexing="ij")
    return np.stack(grids, axis=-1).reshape(-1, 3) @ np.where(along[:, None], cell, 0.0)


def draw_environment(data: ReportData, row: int) -> Markup:
    """Inline SVG; '' without positions or a cutoff."""
    if data.positions is None or not data.cutoff or not np.isfinite(data.positions[row]).all():
        return Markup("")
    vectors, species = neighbour_vectors(data, row)
    if not len(vectors):
        return Markup("")
    name, cutoff = chemical_symbol(int(data.species[row])), data.cutoff
    label = f"{name} atom with {len(vectors) - 1} neighbours within {cutoff:.1f} Å"
    return draw_atoms(vectors, species, vectors @ TURN.T, cutoff, species_colours(data.elements), label, ringed=0)
