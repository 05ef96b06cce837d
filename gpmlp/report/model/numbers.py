"""Numbers are the tables and curves of the report, computed from its data as plain dictionaries with units in their names."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import NormalDist

import numpy as np

from gpmlp.core.errors import chemical_symbol
from gpmlp.report.model.data import NO_TYPE, Labelled, ReportData

LEVELS = (50, 68, 90, 95)
KEYS = {
    "energies": ("energy", "meV_per_atom"),
    "forces": ("force", "meV_per_A"),
    "stresses": ("stress", "GPa"),
}
# what the rank correlation of std and |error| is taken over: the size of one component of a vector is mostly chance
ORDERED = {"energies": "spearman_of_structures", "forces": "spearman_of_atoms", "stresses": "spearman_of_components"}
SMALLEST = 1e-5  # of the largest error, that an axis of errors begins at
CURVE = np.linspace(0.02, 0.98, 49)


def rms(values: np.ndarray) -> float:
    """Root mean square; NaN of nothing."""
    return float(np.sqrt(np.mean(np.square(values)))) if len(values) else float("nan")


def mean(values: np.ndarray) -> float:
    """Mean; NaN of nothing."""
    return float(np.mean(values)) if len(values) else float("nan")


def median(values: np.ndarray) -> float:
    """Median of the finite values; NaN of nothing."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else float("nan")


def area(y: np.ndarray, x: np.ndarray) -> float:
    """Area under a curve by trapezia."""
    return float(np.sum((y[1:] + y[:-1]) / 2 * np.diff(x)))


def given(scores: dict, key: str, otherwise: float) -> float:
    """A score as it was handed in, or otherwise where it is missing or NaN."""
    value = scores.get(key)
    return float(otherwise if value is None or value != value else value)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of ranks (ties by order, which is enough for floats)."""
    if len(a) < 3:
        return float("nan")
    ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def views(data: ReportData) -> dict[str, Labelled]:
    """kind -> its labelled components, for the kinds that have any."""
    found = {kind: data.labelled(kind) for kind in ("forces", "energies", "stresses")}
    return {kind: view for kind, view in found.items() if len(view)}


def with_std(labelled: dict[str, Labelled]) -> dict[str, Labelled]:
    """Those of views that have standard deviations."""
    return {kind: view for kind, view in labelled.items() if np.isfinite(view.scaled).any()}


def error_table(data: ReportData, labelled: dict[str, Labelled], structures: np.ndarray) -> dict[str, float]:
    """MAE, RMSE and largest error of each kind over some structures (bool mask); of stresses over all nine components."""
    row = {"n_structures": int(structures.sum()), "n_atoms": int(data.n_atoms[structures].sum())}
    for kind, (name, unit) in KEYS.items():
        error = np.zeros(0)
        if kind in labelled:
            view = labelled[kind]
            # both σ_yz and σ_zy, as `gpmlp evaluate` has them
            twice = np.where(view.component < 3, 1, 2) if kind == "stresses" else 1
            error = np.repeat(view.error, twice * structures[view.structure])
        row[f"{name}_mae_{unit}"] = mean(np.abs(error))
        row[f"{name}_rmse_{unit}"] = rms(error)
        row[f"{name}_max_{unit}"] = float(np.abs(error).max()) if len(error) else float("nan")
    return row


def errors(data: ReportData, labelled: dict[str, Labelled]) -> dict:
    """Tables of errors overall and by config_type, worst forces (or else energies) first."""
    overall = error_table(data, labelled, np.ones(len(data.names), dtype=bool))
    types = sorted(set(data.types))
    if types == [NO_TYPE]:
        return {"overall": overall, "by_config_type": {}}
    tables = {name: error_table(data, labelled, data.types == name) for name in types}
    key = "force_rmse_meV_per_A" if "forces" in labelled else "energy_rmse_meV_per_atom"
    order = sorted(tables, key=lambda name: -np.nan_to_num(tables[name][key], nan=-1.0))
    return {"overall": overall, "by_config_type": {name: tables[name] for name in order}}


def grouped(data: ReportData, view: Labelled, by: str) -> dict[str, np.ndarray]:
    """config_type or element -> |errors|, largest root mean square first."""
    if by == "species":
        if view.kind != "forces":
            return {}
        labels = np.array([chemical_symbol(int(z)) for z in data.species], dtype=object)[view.row]
    else:
        labels = data.types[view.structure]
    found = {str(name): np.abs(view.error[labels == name]) for name in set(labels)}
    return dict(sorted(found.items(), key=lambda item: -rms(item[1])))


def spread(values: np.ndarray) -> dict[str, float]:
    """Quantiles of |errors| that a box shows."""
    names = ("p05", "p25", "p50", "p75", "p95", "max")
    return dict(zip(names, map(float, np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95, 1.0))), strict=True)) | {
        "n": len(values)
    }


def coverage(view: Labelled, levels: Iterable[float]) -> np.ndarray:
    """Share of the errors inside the central normal intervals of the given probabilities."""
    scaled = np.sort(np.abs(view.scaled[np.isfinite(view.scaled)]))
    reach = [NormalDist().inv_cdf((1 + p) / 2) for p in levels]
    return np.searchsorted(scaled, reach, side="right") / max(len(scaled), 1)


def reliability(view: Labelled) -> dict:
    """Observed against expected coverage, and the area between the two."""
    observed = coverage(view, CURVE)
    return {
        "n": int(np.isfinite(view.scaled).sum()),
        "expected": CURVE.tolist(),
        "observed": observed.tolist(),
        "area": area(np.abs(observed - CURVE), CURVE),
        "bias": float(np.mean(observed - CURVE)),
    }


def coverage_table(data: ReportData, labelled: dict[str, Labelled]) -> dict[str, dict[str, dict[str, float]]]:
    """Observed coverage at LEVELS, by intervals and kind: 'gaussian' from std, counted here; 'conformal' as the scores say."""
    judged = with_std(labelled)
    shares = {kind: coverage(view, [p / 100 for p in LEVELS]) for kind, view in judged.items()}
    gaussian = {
        kind: {f"coverage_{p}": float(share) for p, share in zip(LEVELS, found, strict=True)}
        for kind, found in shares.items()
    }
    given = {kind: data.scores.get(kind) or {} for kind in judged}
    conformal = {
        kind: {f"coverage_{p}": scores[f"coverage_{p}"] for p in LEVELS if scores.get(f"coverage_{p}") is not None}
        for kind, scores in given.items()
    }
    return {"gaussian": gaussian, "conformal": {kind: row for kind, row in conformal.items() if row}}


def binned(view: Labelled, bins: int = 20) -> dict:
    """Root mean square of std and of error in bins of equally many components, sorted by std."""
    known = np.isfinite(view.scaled)
    std, error = view.std[known], view.error[known]
    order = np.argsort(std, kind="stable")
    parts = [part for part in np.array_split(order, min(bins, max(len(order) // 10, 1))) if len(part)]
    return {
        "std": [rms(std[part]) for part in parts],
        "rmse": [rms(error[part]) for part in parts],
        "n": [len(part) for part in parts],
        "spearman_of_components": spearman(std, np.abs(error)),
        # below lie errors that symmetry makes zero, of whole configurations perhaps: an axis for them would leave no room for others
        "floor": max(float(np.quantile(np.abs(error), 0.02)), SMALLEST * float(np.abs(error).max()), 1e-9),
    }


def rank_correlation(data: ReportData, labelled: dict[str, Labelled]) -> dict[str, dict[str, float]]:
    """Spearman's coefficient of std and |error| of each kind under the name that says of what: as given in scores, or counted."""
    found = {}
    for kind, view in with_std(labelled).items():
        std, error = (data.atom_std, data.atom_error) if kind == "forces" else (view.std, np.abs(view.error))
        known = np.isfinite(std) & np.isfinite(error)
        counted = spearman(std[known], error[known])
        found[kind] = {ORDERED[kind]: given(data.scores.get(kind) or {}, ORDERED[kind], counted)}
    return found


def sparsification(view: Labelled, points: int = 40) -> dict:
    """RMSE of what remains after the components with the largest std, or (oracle) the largest errors, are removed."""
    known = np.isfinite(view.scaled)
    std, square = view.std[known], view.error[known] ** 2
    n = len(std)
    removed = np.linspace(0, 0.95, points)
    kept = np.maximum(np.round((1 - removed) * n).astype(int), 1)

    def remaining(order: np.ndarray) -> np.ndarray:
        return np.sqrt(np.cumsum(square[order])[kept - 1] / kept)

    curve, oracle = remaining(np.argsort(std, kind="stable")), remaining(np.argsort(square, kind="stable"))
    all_of_them = np.sqrt(square.mean())
    gap, room = area(curve - oracle, removed), area(all_of_them - oracle, removed)
    return {
        "removed": removed.tolist(),
        "rmse": curve.tolist(),
        "oracle": oracle.tolist(),
        "share_of_oracle": float(1 - gap / room) if room > 0 else float("nan"),
    }


def trust(data: ReportData) -> dict | None:
    """Atoms inside and outside the trust region with their force errors; None without novelty."""
    if data.novelty is None or np.isnan(data.novelty).all():
        return None
    known = ~np.isnan(data.novelty)
    outside = known & (data.novelty > 1)
    error = 1e3 * data.atom_error
    labelled = np.isfinite(error)
    types = data.types[np.asarray(data.structure)]
    share = {str(t): float(outside[(types == t) & known].mean()) for t in set(types[known])}
    return {
        "n_atoms": int(known.sum()),
        "n_outside": int(outside.sum()),
        "n_unseen": int(np.isinf(data.novelty).sum()),
        "rmse_inside_meV_per_A": rms(error[labelled & known & ~outside]),
        "rmse_outside_meV_per_A": rms(error[labelled & outside]),
        "std_inside_meV_per_A": rms(1e3 * data.atom_std[known & ~outside]),
        "std_outside_meV_per_A": rms(1e3 * data.atom_std[outside]),
        "share_outside_by_config_type": dict(sorted(share.items(), key=lambda item: -item[1])),
    }


def budget(data: ReportData) -> dict:
    """Mean force variance by cause, (meV/A)^2, overall, by species and by config_type; {} without parts."""
    if not data.causes:
        return {}
    per_atom = {cause: 1e6 * data.force_variance[cause].mean(axis=1) for cause in data.causes}
    types = data.types[np.asarray(data.structure)]
    elements = np.asarray(data.species)

    def over(mask: np.ndarray) -> dict[str, float]:
        return {cause: mean(values[mask & np.isfinite(values)]) for cause, values in per_atom.items()}

    by_type = {str(t): over(types == t) for t in set(types)}
    return {
        "overall": over(np.ones(len(elements), dtype=bool)),
        "by_species": {chemical_symbol(z): over(elements == z) for z in data.elements},
        "by_config_type": dict(sorted(by_type.items(), key=lambda item: -sum(item[1].values()))),
    }


def energy_budget(data: ReportData) -> dict[str, float]:
    """Mean variance of the energy per atom by cause, (meV/atom)^2; {} without parts."""
    scale = 1e6 / np.maximum(data.n_atoms, 1) ** 2
    return {cause: mean((scale * values)[np.isfinite(values)]) for cause, values in data.energy_variance.items()}


def everything(data: ReportData, labelled: dict[str, Labelled]) -> dict:
    """All of the above under the names that report.json has."""
    judged = with_std(labelled)
    return {
        "errors": errors(data, labelled),
        "error_quantiles": {
            kind: {by: {k: spread(v) for k, v in grouped(data, view, by).items()} for by in ("config_type", "species")}
            for kind, view in labelled.items()
        },
        "coverage": coverage_table(data, labelled),
        "reliability": {kind: reliability(view) for kind, view in judged.items()},
        "rank_correlation": rank_correlation(data, labelled),
        "error_against_std": {kind: binned(view) for kind, view in judged.items()},
        "sparsification": {kind: sparsification(view) for kind, view in judged.items()},
        "scores": data.scores,
        "rivals": data.rivals,
        "trust_region": trust(data),
        "variance_by_cause_meV2_per_A2": budget(data),
        "energy_variance_by_cause_meV2_per_atom2": energy_budget(data),
    }
