"""A prophecy is what was predicted of a label before it was learned, beside what came: whether the uncertainty was honest."""

from __future__ import annotations

import math

import torch

from gpmlp.active.criteria import bound
from gpmlp.foreseen import Foreseen
from gpmlp.rescaling import rescaled
from gpmlp.uncertainty.calibration import Calibration

DIGITS = 4  # significant, of numbers that are many


def plain(foreseen: Foreseen, calibration: Calibration, probability: float) -> dict:
    """Errors and standard deviations of one structure for JSON; null where there is no label.

    Args:
        calibration: as it was before this label was learned.
        probability: with which the bound may be exceeded (`trigger.probability`).

    Returns:
        bound: what the largest force error was to stay below, eV/A; largest_error: that error, of atom `worst_atom`.
        force_error, force_sigma: of all components in order, eV/A; energy_error, energy_sigma: eV/atom; novelty: the largest.
    """
    prediction = rescaled(foreseen.prediction, foreseen.structures, calibration)
    error = (prediction.forces - foreseen.targets.forces).double().cpu()
    norm = error.norm(dim=1)
    known = norm.isfinite()
    out: dict = {"bound": None, "largest_error": None, "worst_atom": None, "novelty": None}
    covariance = prediction.forces_covariance
    if covariance is not None:
        out["bound"] = _number(bound(covariance.total[known], probability))
        out["force_sigma"] = _numbers(covariance.diagonal().total.clamp_min(0).sqrt())
    if known.any():
        worst = int(torch.where(known, norm, norm.new_full((), -1.0)).argmax())
        out |= {"largest_error": _number(float(norm[worst])), "worst_atom": worst, "force_error": _numbers(error)}
    atoms = foreseen.structures.n_atoms
    out["energy_error"] = _number(float(prediction.energies[0] - foreseen.targets.energies[0]) / atoms)
    if prediction.energies_variance is not None:
        out["energy_sigma"] = _number(float(prediction.energies_variance.total[0].clamp_min(0).sqrt()) / atoms)
    if prediction.novelty is not None:
        out["novelty"] = _number(float(prediction.novelty.max()))
    return out


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _numbers(values: torch.Tensor) -> list[float | None]:
    return [float(f"{v:.{DIGITS}g}") if math.isfinite(v) else None for v in values.double().flatten().tolist()]
