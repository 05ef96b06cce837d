"""Residuals: errors of predictions with the parts of their variance, how many of them are independent, and the noise of force labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gpmlp.core.errors import check_choice
from gpmlp.core.quantities import KINDS, Prediction, Targets, Variance
from gpmlp.core.structures import Structures
from gpmlp.uncertainty.calibration import Calibration, KindCalibration, calibrate_prediction

VARIANCE_FIELDS = {"energies": "energies_variance", "forces": "forces_variance", "stresses": "stresses_variance"}
# eV/A, eV/A^3: labels and predictions below it are zero by symmetry
ZERO_LABEL = {"forces": 1e-6, "stresses": 1e-8, "energies": 0.0}
SYMMETRIC = 1e-9  # of the mean variance due to the data: only where symmetry forbids a component is there far less
PRIOR_STRUCTURES = 2.0  # a priori, structures whose errors are entirely dependent


def split_residuals(
    kind: str, structures: Structures, targets: Targets, prediction: Prediction
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Errors of a kind of observation, per atom for energies, and the parts of their variance.

    Returns:
        errors (n,); parts of the variance (n, 3): due to the inducing set, due to the data, constant; Z of the atom (n,), of forces only.
    """
    check_choice("kind of observation", kind, KINDS)
    difference = getattr(prediction, kind) - getattr(targets, kind)
    variance: Variance | None = getattr(prediction, VARIANCE_FIELDS[kind])
    if variance is None:
        raise ValueError(f"the prediction has no variance of {kind}")
    scale, species = torch.ones((), dtype=difference.dtype, device=difference.device), None
    if kind == "energies":
        scale = 1 / structures.counts.to(difference)
    if kind == "stresses":
        difference, variance = _six_components(difference), variance.map(_six_components)
    if kind == "forces":
        species = structures.species.repeat_interleave(3)
    causes = (variance.inducing, variance.data, variance.misspecification + variance.noise)
    parts = torch.stack([(part * scale**2).flatten() for part in causes], dim=1)
    return (difference * scale).flatten(), parts, species


def structure_of_error(kind: str, structures: Structures) -> Tensor:
    """(n,) number of the structure of each error of `split_residuals`."""
    if kind == "forces":
        return structures.structure_of_atom.repeat_interleave(3)
    each = 6 if kind == "stresses" else 1
    return torch.arange(len(structures), device=structures.positions.device).repeat_interleave(each)


def _six_components(stresses: Tensor) -> Tensor:
    """(n, 6) different ones of the nine components."""
    a, b = torch.triu_indices(3, 3, device=stresses.device)
    return stresses[:, a, b]


def zero_by_symmetry(kind: str, targets: Targets, prediction: Prediction, parts: Tensor) -> Tensor:
    """(n,) where label and prediction are both zero, or next to nothing of the variance is due to the data.

    Args:
        parts: (n, 3) of the variance (`split_residuals`).
    """
    label, mean = getattr(targets, kind), getattr(prediction, kind)
    if kind == "stresses":
        label, mean = _six_components(label), _six_components(mean)
    none = ((label.abs() < ZERO_LABEL[kind]) & (mean.abs() < ZERO_LABEL[kind])).flatten()
    return none | (parts[:, 1] <= SYMMETRIC * parts[:, 1].nanmean())


def mean_square_residuals(
    name: str, kind: KindCalibration, structures: Structures, targets: Targets, prediction: Prediction
) -> Tensor:
    """(n,) mean (error/σ)², with calibrated σ, of each structure that has a label of the kind."""
    about = calibrate_prediction(prediction, structures, Calibration(dict.fromkeys(KINDS, kind)), targets.config_types)
    errors, parts, _ = split_residuals(name, structures, targets, about)
    owner = structure_of_error(name, structures).to(errors.device)
    given = errors.isfinite() & parts.isfinite().all(1) & ~zero_by_symmetry(name, targets, about, parts)
    squares = (errors[given].square() / parts[given].sum(1).clamp_min(kind.floor**2)).double()
    counts = torch.zeros(len(structures)).to(squares).index_add(0, owner[given], torch.ones_like(squares))
    sums = torch.zeros_like(counts).index_add(0, owner[given], squares)
    return (sums / counts)[counts > 0]


def degrees_of_freedom(squares: Tensor) -> float:
    """Effective number ν of independent errors from which a variance is known, where errors within a structure depend on each other.

    The mean of (error/σ)² over n structures, whose values have the relative variance v, is distributed as χ²_ν/ν with ν = 2 n / v
    (Satterthwaite, Biometrics Bull. 2, 110 (1946)). The estimate of v is averaged with PRIOR_STRUCTURES structures of v = 2, which is
    that of the square of a single normal number: a few structures that happen to agree are no proof of independence.

    Args:
        squares: (n,) mean (error/σ)² of each structure.
    """
    n = len(squares)
    differences = (squares / squares.mean() - 1).square().sum()
    return 2 * n / float((differences + 2 * PRIOR_STRUCTURES) / (n - 1 + PRIOR_STRUCTURES))


def force_label_noise(structures: Structures, targets: Targets) -> float:
    """Standard deviation of the noise of force labels, eV/A, from the net force of each structure; NaN if no structure is labelled.

    Forces of any translation-invariant energy sum to zero, whatever the cutoff or the descriptor, so the sum over N atoms of labels
    with independent noise has the variance N σ² in each direction and no other: σ² = Σ_s |Σ_i F_i|² / (3 Σ_s N_s). What the evidence
    takes for noise beyond that is misspecification. Codes that subtract the net force give 0.
    """
    given = ~targets.forces.isnan().any(1)
    whole = given.new_ones(len(structures)).index_put((structures.structure_of_atom[~given],), given.new_zeros(()))
    whole &= structures.counts > 1
    if not whole.any():
        return math.nan
    forces = targets.forces.nan_to_num()
    net = forces.new_zeros(len(structures), 3).index_add(0, structures.structure_of_atom, forces)
    return (net[whole].square().sum() / (3 * structures.counts[whole].sum())).sqrt().item()
