"""Worst are the environments the report flags, with the reason in words, and the structures it would label next."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from gpmlp.core.errors import chemical_symbol
from gpmlp.report.model.data import NO_TYPE, ReportData
from gpmlp.report.model.numbers import median
from gpmlp.report.style import percent

SHOWN = 20
PER_STRUCTURE = 3
OVERCONFIDENT = 3.0  # standard deviations
CAUSE_WORDS = {
    "noise": "the noise of the labels",
    "data": "missing data",
    "misspecification": "misspecification",
    "inducing": "the inducing set",
}


def ratio(data: ReportData) -> np.ndarray:
    """(atoms,) root mean square of error / std over the three force components."""
    std = data.force_std if data.force_std is not None else np.full_like(data.force_predicted, np.nan)
    scaled = (data.force_predicted - data.force_reference) / np.where(std > 0, std, np.nan)
    return np.sqrt(np.mean(scaled**2, axis=1))


def environments(data: ReportData) -> dict[str, list[dict]]:
    """The SHOWN worst atoms by error / std and by std, at most PER_STRUCTURE of each structure."""
    scaled, std = ratio(data), data.atom_std
    lists = {"by_error_over_std": scaled, "by_std": std}
    if not np.isfinite(std).any():
        lists = {"by_error": data.atom_error} if data.novelty is None else {"by_novelty": data.novelty}
    shares = data.shares
    return {
        name: [describe(data, int(row), scaled, std, shares) for row in _top(data, values)]
        for name, values in lists.items()
        if (~np.isnan(values)).any()
    }


def _top(data: ReportData, values: np.ndarray) -> list[int]:
    found, used = [], Counter()
    for row in np.argsort(-np.nan_to_num(values, nan=-np.inf, posinf=1e300), kind="stable"):
        owner = int(data.structure[row])
        if len(found) == SHOWN or np.isnan(values[row]):
            break
        if used[owner] < PER_STRUCTURE:
            used[owner] += 1
            found.append(int(row))
    return found


def describe(data: ReportData, row: int, scaled: np.ndarray, std: np.ndarray, shares: dict[str, np.ndarray]) -> dict:
    """One row of the table."""
    owner = int(data.structure[row])
    return {
        "row": row,
        "structure": data.names[owner],
        "config_type": data.config_type[owner],
        "atom": int(data.atom[row]),
        "element": chemical_symbol(int(data.species[row])),
        "force_error_meV_per_A": float(1e3 * data.atom_error[row]),
        "force_std_meV_per_A": float(1e3 * std[row]),
        "error_over_std": float(scaled[row]),
        "novelty": float("nan") if data.novelty is None else float(data.novelty[row]),
        "local_energy_std_meV": float("nan")
        if data.local_energy_std is None
        else float(1e3 * data.local_energy_std[row]),
        "why": reasons(data, row, float(scaled[row]), shares),
    }


def reasons(data: ReportData, row: int, scaled: float, shares: dict[str, np.ndarray]) -> str:
    """Why an environment is flagged, in words."""
    words = []
    novelty = float("nan") if data.novelty is None else float(data.novelty[row])
    if np.isinf(novelty):
        words.append("of a kind never seen in training")
    elif novelty > 1:
        words.append(f"outside the trust region (novelty {novelty:.1f})")
    if scaled > OVERCONFIDENT:
        words.append(f"overconfident: error {scaled:.1f} σ")
    if shares:
        cause = max(shares, key=lambda name: np.nan_to_num(shares[name][row], nan=-1))
        share = shares[cause][row]
        if share > 0:
            lead = "dominated by" if share > 0.5 else "largest cause:"
            words.append(f"{lead} {CAUSE_WORDS.get(cause, cause)} ({percent(share)} of the variance)")
    if scaled <= OVERCONFIDENT:
        words.insert(0, f"a large error bar, and an error of {scaled:.1f} σ")
    elif data.force_std is not None and np.isnan(scaled):
        words.insert(0, "a large error bar")
    elif not words:
        words.append(f"novelty {novelty:.2f}" if novelty >= 0 else "among the largest errors; nothing foretold it")
    return "; ".join(words)


def label_next(data: ReportData, wanted: int = 15) -> list[dict]:
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
    typical = median(largest[largest > 0]) if largest.any() else 1.0
    score = (largest / typical if largest.any() else np.ones(n)) * np.clip(np.nan_to_num(novelty, nan=1.0), 1, 5)
    groups = [
        t if t and t != NO_TYPE else re.sub(r"\d+", "#", name)
        for t, name in zip(data.config_type, data.names, strict=True)
    ]
    cap = max(4, -(-wanted // max(len(set(groups)), 1)))
    chosen: list[int] = []
    used, names = Counter(), Counter()
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


def _candidate(data: ReportData, index: int, typical: float, score: float, novelty: float) -> dict:
    """One suggested structure with a one-line explanation."""
    rows = np.flatnonzero(np.asarray(data.structure) == index)
    std = np.nan_to_num(data.atom_std[rows])
    worst = rows[int(std.argmax())] if len(rows) else None
    words = []
    if worst is not None and std.max() > 0:
        element = chemical_symbol(int(data.species[worst]))
        words.append(f"σ at {element} {data.atom[worst]} is {std.max() / typical:.1f} times that of a median structure")
    outside = float("nan")
    if data.novelty is not None and len(rows):
        outside = float(np.mean(data.novelty[rows] > 1))
        if np.isinf(novelty):
            words.append("holds atoms of a kind never seen")
        if outside:
            words.append(f"{percent(outside)} of its atoms outside the trust region")
    removable = float("nan")
    if data.causes and len(rows):
        total = sum(np.nansum(data.force_variance[cause][rows]) for cause in data.causes)
        known = [np.nansum(data.force_variance[c][rows]) for c in ("data", "inducing") if c in data.causes]
        removable = float(sum(known) / total) if total > 0 else float("nan")
        if removable == removable:
            words.append(f"up to {percent(removable)} of the variance removable by labels and inducing points")
    return {
        "structure": data.names[index],
        "config_type": data.config_type[index],
        "n_atoms": int(data.n_atoms[index]),
        "largest_force_std_meV_per_A": float(1e3 * std.max()) if len(rows) else float("nan"),
        "largest_novelty": float(novelty),
        "share_outside": outside,
        "removable_share": removable,
        "score": float(score),
        "why": "; ".join(words),
    }
