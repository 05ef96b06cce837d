"""Tables and curves of the page about a run as plain dictionaries with units in their names."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from gpmlp.report.model import numbers
from gpmlp.report.model.data import LabelledComponents
from gpmlp.report.run.data import RunData
from gpmlp.uncertainty.timeseries import poisson_upper, wilson_bounds

MOST_FRAMES = 1800  # that are drawn and listed
RATE_BINS = 12  # stretches in which labels are counted
SMOOTH = 40  # frames, of running shares


def drawn_frames(data: RunData) -> np.ndarray:
    """Indices of the frames that are drawn: all, or those that asked and the extremes of even stretches."""
    frames = data.frames
    n = len(frames)
    if n <= MOST_FRAMES:
        return np.arange(n)
    parts = np.array_split(np.arange(n), (MOST_FRAMES - int(frames.labelled.sum())) // 2)
    sigma = np.nan_to_num(frames.sigma)
    ends = [part[[sigma[part].argmin(), sigma[part].argmax()]] for part in parts if len(part)]
    return np.unique(np.concatenate([*ends, frames.labelled.nonzero()[0]]))


def prequential_errors(data: RunData) -> LabelledComponents:
    """Force components of the labels, predicted before they were learned, meV/A; structure counts through `data.predicted`."""
    errors = [e for _, e in data.predicted]
    error = np.concatenate([np.zeros((0, 3)), *(e.force_error for e in errors)])
    sigma = np.concatenate([np.zeros((0, 3)), *(e.force_sigma for e in errors)])
    owner = np.repeat(np.arange(len(errors)), [len(e.force_error) for e in errors])
    rows, components = np.nonzero(np.isfinite(error) & np.isfinite(sigma))
    e, s = 1e3 * error[rows, components], 1e3 * sigma[rows, components]
    return LabelledComponents("forces", np.zeros(len(e)), e, s, owner[rows], rows, components)


def prequential_scores(data: RunData) -> dict[str, Any]:
    """How errors compare with the uncertainty predicted before each label was learned; {} where nothing was predicted."""
    view = prequential_errors(data)
    if not len(view):
        return {}
    first = view.structure < (len(data.predicted) + 1) // 2
    parts = {"all": np.ones(len(view), bool), "first half": first, "second half": ~first}
    shares = {}
    for name, mask in parts.items():
        if mask.any():
            part = LabelledComponents(view.kind, *(values[mask] for key, values in vars(view).items() if key != "kind"))
            counts = {"components": int(mask.sum()), "labels": len(np.unique(part.structure))}
            shares[name] = numbers.level_coverage(part) | counts
    errors = [e for _, e in data.predicted]
    pairs = [(e.bound, e.largest_error) for e in errors if np.isfinite(e.bound) and np.isfinite(e.largest_error)]
    over = sum(error > bound for bound, error in pairs)
    energy = np.array([(e.energy_error, e.energy_sigma) for e in errors]).reshape(-1, 2)
    energy = energy[np.isfinite(energy).all(1) & (energy[:, 1] > 0)]
    rms = numbers.root_mean_square
    return {
        "labels": len(errors),
        "coverage": shares,
        "reliability": numbers.reliability_numbers(view),
        "spearman_of_components": numbers.rank_correlation(view.std, np.abs(view.error)),
        "rms_error_meV_per_A": rms(view.error),
        "rms_sigma_meV_per_A": rms(view.std),
        "rms_error_over_sigma": rms(view.scaled[view.scored]),
        "bounds": len(pairs),
        "bounds_exceeded": over,
        "bounds_exceeded_interval": list(wilson_bounds(over / len(pairs), len(pairs))) if pairs else None,
        "bound_probability": data.probability,
        "energy_rms_error_over_sigma": rms(energy[:, 0] / energy[:, 1]) if len(energy) else None,
        "energy_rms_error_meV_per_atom": 1e3 * rms(energy[:, 0]) if len(energy) else None,
    }


def label_rate(data: RunData) -> dict[str, list[float]]:
    """Labels per 1000 steps in even stretches of the run, with 95 % upper bounds."""
    total = data.total_steps
    if not total:
        return {"from_step": [], "to_step": [], "per_1000_steps": [], "at_most": []}
    edges = np.linspace(0, total, RATE_BINS + 1)
    asked_at = np.clip([label.total_step for label in data.asked], 0, total)
    counts = np.histogram(asked_at, edges)[0]
    width = total / RATE_BINS / 1000
    return {
        "from_step": edges[:-1].tolist(),
        "to_step": edges[1:].tolist(),
        "per_1000_steps": (counts / width).tolist(),
        "at_most": [poisson_upper(int(k)) / width for k in counts],
    }


def running_mean(values: np.ndarray, n: int = SMOOTH) -> np.ndarray:
    """Mean of each value and those before it, n at most."""
    total = np.concatenate([[0.0], np.cumsum(values, dtype=float)])
    k = np.arange(1, len(values) + 1)
    first = np.maximum(k - n, 0)
    return (total[k] - total[first]) / (k - first)


def trust_shares(data: RunData) -> dict[str, list[float]]:
    """Running shares of frames and atoms inside the trust region, against the steps of all walkers."""
    frames = data.frames
    return {
        "step": frames.total_step.tolist(),
        "frames_inside": running_mean(frames.inside).tolist(),
        "atoms_inside": running_mean(1 - frames.outside).tolist(),
    }


def run_costs(data: RunData) -> dict[str, Any]:
    """Labels, oracle calls, steps and time of the run."""
    seconds = np.array([label.seconds for label in data.labels])
    seconds = seconds[np.isfinite(seconds)]
    asked, steps = len(data.asked), data.total_steps
    given = sum(label.cause == "given" for label in data.labels)
    checks = sum(label.checks for label in data.labels)
    dynamics = data.seconds.get("dynamics", float("nan"))
    return {
        "labels": len(data.labels),
        "first_labels": len(data.labels) - asked - given,
        "given_labels": given,
        "labels_asked_by_dynamics": asked,
        "refused": len(data.refused),
        "failed_attempts": sum(label.attempts - 1 for label in data.labels) + sum(r["attempts"] for r in data.refused),
        "oracle_calls": len(data.labels) - given + len(data.refused) + checks,
        "oracle_checks": checks,
        "steps": steps,
        "steps_per_label": steps / asked if asked else None,
        "share_of_steps_without_oracle": 1 - asked / steps if steps else None,
        "oracle_seconds_median": float(np.median(seconds)) if len(seconds) else None,
        "oracle_seconds_total": float(seconds.sum()) if len(seconds) else None,
        "seconds_by_activity": data.seconds,
        "seconds_per_step": dynamics / steps if steps else None,
        "hours": data.hours,
    }


def label_rows(data: RunData) -> list[dict[str, Any]]:
    """The table of labels."""
    nan, rows = float("nan"), []
    for label in data.labels:
        row = {
            "number": label.number,
            "key": label.key,
            "walker": label.walker if label.walker >= 0 else None,
            "step": label.step if label.walker >= 0 else None,
            "time_ps": label.time_ps,
            "temperature_K": label.temperature_K,
            "cause": label.cause,
            "reason": label.reason,
            "predicted_bound_eV_per_A": label.bound,
            "bound_when_asked_eV_per_A": label.bound,
            "limit_eV_per_A": label.limit,
            "largest_error_eV_per_A": nan,
            "worst_atom": None,
            "force_rmse_eV_per_A": nan,
            "force_sigma_eV_per_A": nan,
            "energy_error_meV_per_atom": nan,
            "novelty": nan,
            "columns": label.columns,
            "seconds": label.seconds,
            "attempts": label.attempts,
            "surrogate": label.surrogate or None,
            "atom": label.atom if label.atom >= 0 else None,
        }
        if (errors := label.prequential) is not None:
            row |= {
                "predicted_bound_eV_per_A": errors.bound,
                "largest_error_eV_per_A": errors.largest_error,
                "worst_atom": errors.worst_atom,
                "force_rmse_eV_per_A": _finite_rms(errors.force_error),
                "force_sigma_eV_per_A": _finite_rms(errors.force_sigma),
                "energy_error_meV_per_atom": 1e3 * errors.energy_error,
                "novelty": errors.novelty,
            }
        rows.append(row)
    return rows


def _finite_rms(values: np.ndarray) -> float:
    return numbers.root_mean_square(values[np.isfinite(values)])


def all_numbers(data: RunData) -> dict[str, Any]:
    """All of the above under the names that report.json has."""
    frames, drawn = data.frames, drawn_frames(data)
    columns = {"made" if name == "total_step" else name: values for name, values in vars(frames).items()}
    return {
        "ended": data.ended or "not finished",
        "stopped": data.stopped,
        "criteria": list(data.criteria),
        "window": {"frames": int(frames.window.sum()), "frames_of_run": len(frames)},
        "observables": [vars(curve) for curve in data.observables],
        "label_rate": label_rate(data),
        "trust_region": {k: np.array(v)[drawn].tolist() for k, v in trust_shares(data).items()},
        "label_causes": dict(Counter(label.cause for label in data.labels).most_common()),
        "honesty": prequential_scores(data),
        "costs": run_costs(data),
        "labels": label_rows(data),
        "refused": list(data.refused),
        "frames": {name: values[drawn].tolist() for name, values in columns.items()},
    }
