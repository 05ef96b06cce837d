"""Numbers are the tables and curves of the page about a run, as plain dictionaries with units in their names."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from gpmlp.learning.stopping.timeseries import poisson_upper, wilson_bounds
from gpmlp.report.model import numbers
from gpmlp.report.model.data import Labelled
from gpmlp.report.run.data import RunData

LEVELS = (50, 68, 90, 95)
MOST_FRAMES = 1800  # that are drawn and listed
RATE_BINS = 12  # stretches in which labels are counted
SMOOTH = 40  # frames, of running shares


def kept(data: RunData) -> np.ndarray:
    """Indices of the frames that are drawn: all, or those that asked and the extremes of even stretches."""
    frames = data.frames
    n = len(frames)
    if n <= MOST_FRAMES:
        return np.arange(n)
    parts = np.array_split(np.arange(n), (MOST_FRAMES - int(frames.labelled.sum())) // 2)
    sigma = np.nan_to_num(frames.sigma)
    ends = [part[[sigma[part].argmin(), sigma[part].argmax()]] for part in parts if len(part)]
    return np.unique(np.concatenate([*ends, frames.labelled.nonzero()[0]]))


def errors_foretold(data: RunData) -> Labelled:
    """Force components of labels with error and σ as they were foreseen, meV/A; structure counts through `data.foretold`."""
    told = [label.foretold for label in data.foretold]
    error = _joined([t.force_error for t in told])
    sigma = _joined([t.force_sigma for t in told])
    owner = np.repeat(np.arange(len(told)), [len(t.force_error) for t in told])
    rows, components = np.nonzero(np.isfinite(error) & np.isfinite(sigma))
    e, s = 1e3 * error[rows, components], 1e3 * sigma[rows, components]
    return Labelled("forces", np.zeros(len(e)), e, s, owner[rows], rows, components)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.reshape(p, (-1, 3)) for p in parts]) if parts else np.zeros((0, 3))


def honesty(data: RunData) -> dict[str, Any]:
    """How errors compare with what was predicted of them; {} where nothing was."""
    view = errors_foretold(data)
    if not len(view):
        return {}
    halves = np.where(view.structure < (len(data.foretold) + 1) // 2, 0, 1)
    parts = {"all": np.ones(len(view), bool), "first half": halves == 0, "second half": halves == 1}
    shares = {}
    for name, mask in parts.items():
        if mask.any():
            found = numbers.coverage(_some(view, mask), [p / 100 for p in LEVELS])
            shares[name] = {f"coverage_{p}": float(c) for p, c in zip(LEVELS, found, strict=True)}
            shares[name] |= {"components": int(mask.sum()), "labels": len(np.unique(view.structure[mask]))}
    told = [label.foretold for label in data.foretold]
    pairs = [(t.bound, t.largest_error) for t in told if np.isfinite(t.bound) and np.isfinite(t.largest_error)]
    over = sum(error > bound for bound, error in pairs)
    energy = np.array([(t.energy_error, t.energy_sigma) for t in told]).reshape(-1, 2)
    energy = energy[np.isfinite(energy).all(1) & (energy[:, 1] > 0)]
    return {
        "labels": len(told),
        "coverage": shares,
        "reliability": numbers.reliability(view),
        "spearman_of_components": numbers.spearman(view.std, np.abs(view.error)),
        "rms_error_meV_per_A": numbers.rms(view.error),
        "rms_sigma_meV_per_A": numbers.rms(view.std),
        "rms_error_over_sigma": numbers.rms(view.scaled[np.isfinite(view.scaled)]),
        "bounds": len(pairs),
        "bounds_exceeded": over,
        "bounds_exceeded_interval": list(wilson_bounds(over / len(pairs), len(pairs))) if pairs else None,
        "bound_probability": data.probability,
        "energy_rms_error_over_sigma": numbers.rms(energy[:, 0] / energy[:, 1]) if len(energy) else None,
        "energy_rms_error_meV_per_atom": 1e3 * numbers.rms(energy[:, 0]) if len(energy) else None,
    }


def _some(view: Labelled, mask: np.ndarray) -> Labelled:
    values = {name: v[mask] for name, v in vars(view).items() if name != "kind"}
    return Labelled(view.kind, **values)


def label_rate(data: RunData) -> dict[str, list[float]]:
    """Labels per 1000 steps in even stretches of the run, with 95 % upper bounds."""
    total = data.total_steps
    if not total:
        return {"from_step": [], "to_step": [], "per_1000_steps": [], "at_most": []}
    edges = np.linspace(0, total, RATE_BINS + 1)
    made = np.clip([label.made for label in data.asked], 0, total)
    counts = np.histogram(made, edges)[0]
    width = total / RATE_BINS / 1000
    return {
        "from_step": edges[:-1].tolist(),
        "to_step": edges[1:].tolist(),
        "per_1000_steps": (counts / width).tolist(),
        "at_most": [poisson_upper(int(k)) / width for k in counts],
    }


def running(values: np.ndarray, n: int = SMOOTH) -> np.ndarray:
    """Mean of each value and those before it, n at most."""
    total = np.concatenate([[0.0], np.cumsum(values, dtype=float)])
    k = np.arange(1, len(values) + 1)
    first = np.maximum(k - n, 0)
    return (total[k] - total[first]) / (k - first)


def trust(data: RunData) -> dict[str, list[float]]:
    """Running shares of frames and atoms inside the trust region, against the steps of all walkers."""
    frames = data.frames
    return {
        "step": frames.made.tolist(),
        "frames_inside": running(frames.inside).tolist(),
        "atoms_inside": running(1 - frames.outside).tolist(),
    }


def costs(data: RunData) -> dict[str, Any]:
    """What the run cost."""
    seconds = np.array([label.seconds for label in data.labels])
    known = seconds[np.isfinite(seconds)]
    asked, steps = len(data.asked), data.total_steps
    given = sum(label.cause == "given" for label in data.labels)
    dynamics = data.seconds.get("dynamics", float("nan"))
    return {
        "labels": len(data.labels),
        "first_labels": len(data.labels) - asked - given,
        "given_labels": given,
        "labels_asked_by_dynamics": asked,
        "refused": len(data.refused),
        "failed_attempts": sum(label.attempts - 1 for label in data.labels) + sum(r["attempts"] for r in data.refused),
        "oracle_calls": len(data.labels) - given + len(data.refused),
        "steps": steps,
        "steps_per_label": steps / asked if asked else None,
        "share_of_steps_without_oracle": 1 - asked / steps if steps else None,
        "oracle_seconds_median": float(np.median(known)) if len(known) else None,
        "oracle_seconds_total": float(known.sum()) if len(known) else None,
        "seconds_by_activity": data.seconds,
        "seconds_per_step": dynamics / steps if steps else None,
        "hours": data.hours,
    }


def rows_of_labels(data: RunData) -> list[dict[str, Any]]:
    """The table of labels."""
    out = []
    for label in data.labels:
        told = label.foretold
        out.append(
            {
                "number": label.number,
                "key": label.key,
                "walker": label.walker if label.walker >= 0 else None,
                "step": label.step if label.walker >= 0 else None,
                "time_ps": label.time_ps,
                "temperature_K": label.temperature_K,
                "cause": label.cause,
                "reason": label.reason,
                "predicted_bound_eV_per_A": label.bound if told is None else told.bound,
                "bound_when_asked_eV_per_A": label.bound,
                "limit_eV_per_A": label.limit,
                "largest_error_eV_per_A": float("nan") if told is None else told.largest_error,
                "worst_atom": None if told is None else told.worst_atom,
                "force_rmse_eV_per_A": float("nan") if told is None else numbers.rms(_known(told.force_error)),
                "force_sigma_eV_per_A": float("nan") if told is None else numbers.rms(_known(told.force_sigma)),
                "energy_error_meV_per_atom": float("nan") if told is None else 1e3 * told.energy_error,
                "novelty": float("nan") if told is None else told.novelty,
                "columns": label.columns,
                "seconds": label.seconds,
                "attempts": label.attempts,
                "surrogate": label.surrogate or None,
            }
        )
    return out


def _known(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def everything(data: RunData) -> dict[str, Any]:
    """All of the above under the names that report.json has."""
    frames, some = data.frames, kept(data)
    return {
        "ended": data.ended or "not finished",
        "stopped": data.stopped,
        "criteria": list(data.criteria),
        "window": {"frames": int(frames.window.sum()), "frames_of_run": len(frames)},
        "observables": [vars(o) for o in data.observed],
        "label_rate": label_rate(data),
        "trust_region": {k: np.array(v)[some].tolist() for k, v in trust(data).items()},
        "label_causes": dict(Counter(label.cause for label in data.labels).most_common()),
        "honesty": honesty(data),
        "costs": costs(data),
        "labels": rows_of_labels(data),
        "refused": list(data.refused),
        "frames": {name: values[some].tolist() for name, values in vars(frames).items()},
    }
