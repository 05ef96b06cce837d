"""Tables and curves of the uncertainty report as plain dictionaries with units in their names."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gpmlp.core.errors import chemical_symbol
from gpmlp.report.model.data import LEVELS, NO_TYPE, ORDERED, LabelledComponents, ReportData
from gpmlp.uncertainty import scores

KEYS = {
    "energies": ("energy", "meV_per_atom"),
    "forces": ("force", "meV_per_A"),
    "stresses": ("stress", "GPa"),
}
SMALLEST = 1e-5  # of the largest error, that an axis of errors begins at
CURVE = np.linspace(0.02, 0.98, 49)  # expected coverages
TOLERANCE = 0.06  # by which a coverage may differ before it is called off
REMOVED = np.linspace(0, 0.95, 40)  # shares of the most uncertain components


def root_mean_square(values: np.ndarray) -> float:
    """Root mean square; NaN of nothing."""
    return float(np.sqrt(np.mean(np.square(values)))) if len(values) else float("nan")


def mean_value(values: np.ndarray) -> float:
    """Mean; NaN of nothing."""
    return float(np.mean(values)) if len(values) else float("nan")


def finite_median(values: np.ndarray) -> float:
    """Median of the finite values; NaN of nothing."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else float("nan")


def rank_correlation(std: np.ndarray, error: np.ndarray) -> float:
    """Spearman's coefficient of standard deviations and |errors|, of those that are finite."""
    finite = np.isfinite(std) & np.isfinite(error)
    return scores.spearman_correlation(std[finite], error[finite])


def labelled_views(data: ReportData) -> dict[str, LabelledComponents]:
    """kind -> its labelled components, for the kinds that have any."""
    views = {kind: data.labelled(kind) for kind in ("forces", "energies", "stresses")}
    return {kind: view for kind, view in views.items() if len(view)}


def with_std(labelled: dict[str, LabelledComponents]) -> dict[str, LabelledComponents]:
    """Those of views that have standard deviations."""
    return {kind: view for kind, view in labelled.items() if view.scored.any()}


def error_table(data: ReportData, labelled: dict[str, LabelledComponents], structures: np.ndarray) -> dict[str, float]:
    """MAE, RMSE and largest error of each kind over the structures of a mask; of stresses over all nine components."""
    row: dict[str, float] = {"n_structures": int(structures.sum()), "n_atoms": int(data.n_atoms[structures].sum())}
    for kind, (name, unit) in KEYS.items():
        error = np.zeros(0)
        if kind in labelled:
            view = labelled[kind]
            # both σ_yz and σ_zy, as `gpmlp evaluate` has them
            twice = np.where(view.component < 3, 1, 2) if kind == "stresses" else 1
            error = np.repeat(view.error, twice * structures[view.structure])
        row[f"{name}_mae_{unit}"] = mean_value(np.abs(error))
        row[f"{name}_rmse_{unit}"] = root_mean_square(error)
        row[f"{name}_max_{unit}"] = float(np.abs(error).max()) if len(error) else float("nan")
    return row


def error_tables(data: ReportData, labelled: dict[str, LabelledComponents]) -> dict:
    """Tables of errors overall and by config_type, worst forces (or else energies) first."""
    overall = error_table(data, labelled, np.ones(len(data.names), dtype=bool))
    types = sorted(set(data.types))
    if types == [NO_TYPE]:
        return {"overall": overall, "by_config_type": {}}
    tables = {name: error_table(data, labelled, data.types == name) for name in types}
    key = "force_rmse_meV_per_A" if "forces" in labelled else "energy_rmse_meV_per_atom"
    order = sorted(tables, key=lambda name: -np.nan_to_num(tables[name][key], nan=-1.0))
    return {"overall": overall, "by_config_type": {name: tables[name] for name in order}}


def group_errors(data: ReportData, view: LabelledComponents, by: str) -> dict[str, np.ndarray]:
    """config_type or element -> |errors|, largest root mean square first."""
    if by == "species":
        if view.kind != "forces":
            return {}
        labels = np.array([chemical_symbol(int(z)) for z in data.species], dtype=object)[view.row]
    else:
        labels = data.types[view.structure]
    groups = {str(name): np.abs(view.error[labels == name]) for name in set(labels)}
    return dict(sorted(groups.items(), key=lambda item: -root_mean_square(item[1])))


def error_quantiles(values: np.ndarray) -> dict[str, float]:
    """Quantiles of |errors| that a box shows."""
    names = ("p05", "p25", "p50", "p75", "p95", "max")
    quantiles = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)).tolist()
    return dict(zip(names, quantiles, strict=True)) | {"n": len(values)}


def level_coverage(view: LabelledComponents) -> dict[str, float]:
    """Share of the errors inside the central Gaussian interval of each of LEVELS."""
    shares = scores.gaussian_coverage(view.scaled[view.scored], [p / 100 for p in LEVELS]).tolist()
    return {f"coverage_{p}": share for p, share in zip(LEVELS, shares, strict=True)}


def calibration_verdict(shares: Mapping[str, float]) -> tuple[str, str]:
    """Whether error bars are calibrated, in a word, and how they are off ('' = not), by shares of errors in two intervals.

    Args:
        shares: of `level_coverage`; judged are those in the 68 and the 90 % interval: off by less than TOLERANCE is 'Yes', by less than
            twice that 'Roughly'.
    """
    gaps = [shares[f"coverage_{level}"] - level / 100 for level in (68, 90)]
    off = max(map(abs, gaps))
    if off < TOLERANCE:
        return "Yes", ""
    way = "too large" if min(gaps) > -TOLERANCE else "too small"
    if way == "too small" and max(gaps) > TOLERANCE:
        way = "too small for large errors, too large for small ones"
    if way == "too large":
        return "On the cautious side", way
    return ("Roughly" if off < 2 * TOLERANCE else "No"), way


def reliability_numbers(view: LabelledComponents) -> dict:
    """Observed against expected coverage, and the area between the two."""
    z = view.scaled[view.scored]
    curve = scores.reliability_curve(z, CURVE)
    return {
        "n": len(z),
        "expected": curve.expected.tolist(),
        "observed": curve.observed.tolist(),
        "area": curve.area,
        "bias": curve.bias,
    }


def coverage_table(data: ReportData, labelled: dict[str, LabelledComponents]) -> dict[str, dict[str, dict[str, float]]]:
    """Observed coverage at LEVELS, by intervals and kind: 'gaussian' from std, counted here; 'conformal' as the scores say."""
    judged = with_std(labelled)
    gaussian = {kind: level_coverage(view) for kind, view in judged.items()}
    given = {kind: data.scores.get(kind) or {} for kind in judged}
    keys = [f"coverage_{p}" for p in LEVELS]
    conformal = {kind: {k: row[k] for k in keys if row.get(k) is not None} for kind, row in given.items()}
    return {"gaussian": gaussian, "conformal": {kind: row for kind, row in conformal.items() if row}}


def std_bins(view: LabelledComponents, bins: int = 20) -> dict:
    """Root mean square of std and of error in bins of equally many components, sorted by std."""
    std, error = view.std[view.scored], view.error[view.scored]
    table = scores.binned_calibration(error, std, min(bins, max(len(std) // 10, 1)))
    rms_std, rms_error, counts = (list(column) for column in zip(*table, strict=True))
    size = np.abs(error)
    return {
        "std": rms_std,
        "rmse": rms_error,
        "n": counts,
        "spearman_of_components": rank_correlation(std, size),
        # below lie errors that symmetry makes zero, of whole configurations perhaps: an axis for them would leave no room for others
        "floor": max(float(np.quantile(size, 0.02)), SMALLEST * float(size.max()), 1e-9),
    }


def rank_correlations(data: ReportData, labelled: dict[str, LabelledComponents]) -> dict[str, dict[str, float]]:
    """Spearman's coefficient of std and |error| of each kind under the name that says of what: as given in scores, or counted."""
    ranks = {}
    for kind, view in with_std(labelled).items():
        std, error = (data.atom_std, data.atom_error) if kind == "forces" else (view.std, np.abs(view.error))
        value = (data.scores.get(kind) or {}).get(ORDERED[kind])
        ranks[kind] = {ORDERED[kind]: rank_correlation(std, error) if value is None or value != value else value}
    return ranks


def sparsification_numbers(view: LabelledComponents) -> dict:
    """RMSE of what remains after the components with the largest std, or (oracle) the largest errors, are removed."""
    curve = scores.sparsification_curve(view.error[view.scored], view.std[view.scored], REMOVED)
    return {
        "removed": curve.removed.tolist(),
        "rmse": curve.rmse.tolist(),
        "oracle": curve.oracle.tolist(),
        "share_of_oracle": curve.share_of_oracle,
    }


def trust_region(data: ReportData) -> dict | None:
    """Atoms inside and outside the trust region with their force errors; None without novelty."""
    if data.novelty is None or np.isnan(data.novelty).all():
        return None
    finite = ~np.isnan(data.novelty)
    outside = finite & (data.novelty > 1)
    error = 1e3 * data.atom_error
    labelled = np.isfinite(error)
    types = data.types[np.asarray(data.structure)]
    share = {str(t): float(outside[(types == t) & finite].mean()) for t in set(types[finite])}
    return {
        "n_atoms": int(finite.sum()),
        "n_outside": int(outside.sum()),
        "n_unseen": int(np.isinf(data.novelty).sum()),
        "rmse_inside_meV_per_A": root_mean_square(error[labelled & finite & ~outside]),
        "rmse_outside_meV_per_A": root_mean_square(error[labelled & outside]),
        "std_inside_meV_per_A": root_mean_square(1e3 * data.atom_std[finite & ~outside]),
        "std_outside_meV_per_A": root_mean_square(1e3 * data.atom_std[outside]),
        "share_outside_by_config_type": dict(sorted(share.items(), key=lambda item: -item[1])),
        "by_species": _novelty_by_species(data),
    }


def _novelty_by_species(data: ReportData) -> dict[str, dict[str, float]]:
    """Threshold of each species, in standard deviations, and how novel its atoms are."""
    assert data.novelty is not None
    elements, out = np.asarray(data.species), {}
    for z in data.elements:
        novelty, name = data.novelty[(elements == z) & ~np.isnan(data.novelty)], chemical_symbol(z)
        if len(novelty):
            out[name] = {
                "n_atoms": len(novelty),
                "threshold": data.novelty_thresholds.get(name, float("nan")),
                "novelty_median": float(np.median(novelty)),
                "novelty_quantile_99": float(np.quantile(novelty, 0.99, method="lower")),
                "share_outside": float((novelty > 1).mean()),
            }
    return out


def variance_budget(data: ReportData) -> dict:
    """Mean force variance by cause, (meV/A)^2, overall, by species and by config_type; {} without parts."""
    if not data.causes:
        return {}
    per_atom = {cause: 1e6 * data.force_variance[cause].mean(axis=1) for cause in data.causes}
    types = data.types[np.asarray(data.structure)]
    elements = np.asarray(data.species)

    def over(mask: np.ndarray) -> dict[str, float]:
        return {cause: mean_value(values[mask & np.isfinite(values)]) for cause, values in per_atom.items()}

    by_type = {str(t): over(types == t) for t in set(types)}
    return {
        "overall": over(np.ones(len(elements), dtype=bool)),
        "by_species": {chemical_symbol(z): over(elements == z) for z in data.elements},
        "by_config_type": dict(sorted(by_type.items(), key=lambda item: -sum(item[1].values()))),
    }


def energy_budget(data: ReportData) -> dict[str, float]:
    """Mean variance of the energy per atom by cause, (meV/atom)^2; {} without parts."""
    scale = 1e6 / np.maximum(data.n_atoms, 1) ** 2
    return {cause: mean_value((scale * values)[np.isfinite(values)]) for cause, values in data.energy_variance.items()}


def charge_numbers(data: ReportData) -> dict | None:
    """Charges by element, and the parts of the energy per atom that are of charges and of the rest; None of a model without charges."""
    if data.charges is None or data.electrostatic is None or not len(data.charges):
        return None
    reference = np.full(len(data.charges), np.nan) if data.charge_reference is None else data.charge_reference
    by_species = {}
    for z in data.elements:
        mine = data.species == z
        q, error = data.charges[mine], (data.charges - reference)[mine]
        by_species[chemical_symbol(z)] = {
            "n": len(q),
            "mean_e": float(q.mean()),
            "std_e": float(q.std()),
            "min_e": float(q.min()),
            "max_e": float(q.max()),
            "mae_e": mean_value(np.abs(error[np.isfinite(error)])),
        }
    rest = data.energy_predicted - data.electrostatic
    parts = {"of charges": data.electrostatic / data.n_atoms, "of the rest": rest / data.n_atoms}
    energies = {
        name: {"mean_eV_per_atom": float(e.mean()), "std_meV_per_atom": 1e3 * float(e.std())}
        for name, e in parts.items()
    }
    return {"by_species": by_species, "energies": energies}


def all_numbers(data: ReportData, labelled: dict[str, LabelledComponents]) -> dict:
    """All of the above under the names that report.json has."""
    judged = with_std(labelled)
    return {
        "errors": error_tables(data, labelled),
        "error_quantiles": {
            kind: {
                by: {k: error_quantiles(v) for k, v in group_errors(data, view, by).items()}
                for by in ("config_type", "species")
            }
            for kind, view in labelled.items()
        },
        "coverage": coverage_table(data, labelled),
        "reliability": {kind: reliability_numbers(view) for kind, view in judged.items()},
        "rank_correlation": rank_correlations(data, labelled),
        "error_against_std": {kind: std_bins(view) for kind, view in judged.items()},
        "sparsification": {kind: sparsification_numbers(view) for kind, view in judged.items()},
        "scores": data.scores,
        "scores_by_config_type": data.group_scores,
        "rivals": data.rivals,
        "trust_region": trust_region(data),
        "charges": charge_numbers(data),
        "variance_by_cause_meV2_per_A2": variance_budget(data),
        "energy_variance_by_cause_meV2_per_atom2": energy_budget(data),
    }
