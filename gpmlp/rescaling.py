"""Rescaling makes of the posterior's variances those that a calibration asks for: wider where it is novel, each part with its weight."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gpmlp.quantities import Prediction, Variance
from gpmlp.structures import Structures
from gpmlp.uncertainty.calibration import Calibration, KindCalibration
from gpmlp.variances import CALIBRATED_AS


def widened(prediction: Prediction, structures: Structures, typical: float) -> Prediction:
    """The prediction with all variances but label noise times max(1, novelty / typical)², its mean over the atoms of a structure.

    Far from the data the posterior of a misspecified model is too sure of itself, and held-out data of the same kind cannot tell by
    how much; the Mahalanobis distance knows how far it is: standard deviations grow in proportion to it (docs/decisions/004-variances.md).
    """
    factor = growth(prediction.novelty, typical)
    sums = factor.new_zeros(len(structures)).index_add(0, structures.structure_of_atom, factor)
    mean = sums / structures.counts
    changed = {}
    for field in CALIBRATED_AS:
        variance: Variance | None = getattr(prediction, field)
        if variance is not None:
            by = mean if field in ("energies_variance", "stresses_covariance") else factor
            shaped = by.reshape(-1, *(1,) * (variance.data.dim() - 1))
            parts = (shaped * part for part in (variance.inducing, variance.data, variance.misspecification))
            changed[field] = Variance(*parts, variance.noise)
    return replace(prediction, **changed)


def rescaled(prediction: Prediction, structures: Structures, calibration: Calibration) -> Prediction:
    """The prediction with its variances as the calibration has them: widened where it is novel, each part times its weight and the
    square of the scale."""
    if calibration.typical_novelty is not None and prediction.novelty is not None:
        prediction = widened(prediction, structures, calibration.typical_novelty)
    changed = {}
    for field, kind in CALIBRATED_AS.items():
        variance: Variance | None = getattr(prediction, field)
        if variance is None:
            continue
        changed[field] = scaled(variance, calibration.kinds[kind])
    return replace(prediction, **changed)


def scaled(variance: Variance, learned: KindCalibration) -> Variance:
    """Each part times its weight and the square of the scale."""
    inducing, data, constant = (learned.scale**2 * w for w in learned.weights or (1.0, 1.0, 1.0))
    # of what is the same everywhere, label noise comes first; the model class has to answer for the rest, and for errors beyond
    # what the data leave open: a posterior that more data would narrow while the errors stay
    floor = constant * (variance.misspecification + variance.noise)
    noise = torch.minimum(floor, variance.noise)
    excess = max(0.0, data - 1.0) * variance.data
    return Variance(inducing * variance.inducing, min(1.0, data) * variance.data, floor - noise + excess, noise)


def growth(novelty: Tensor, typical: float) -> Tensor:
    """max(1, novelty / typical)², the factor by which variances of an atom are larger where it is novel."""
    return (novelty / typical).clamp(1.0, 1e4) ** 2
