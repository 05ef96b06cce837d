"""Label noise shows where labels break a law that every potential obeys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gpmlp.core.errors import check_choice
from gpmlp.core.quantities import KINDS, Prediction, Targets, Variance
from gpmlp.core.structures import Structures
from gpmlp.uncertainty.calibration import KindCalibration

PRIOR_STRUCTURES = 2.0  # structures whose errors are taken to belong together entirely
# eV/A, eV/A^3: below it, labels and predictions are zero by symmetry
ZERO_LABEL = {"forces": 1e-6, "stresses": 1e-8, "energies": 0.0}
SYMMETRIC = 1e-9  # of the mean of what the data leave open: far less is left only where symmetry leaves nothing
VARIANCE_FIELDS = {"energies": "energies_variance", "forces": "forces_variance", "stresses": "stresses_variance"}


def force_label_noise(structures: Structures, targets: Targets) -> float:
    """Standard deviation of the noise of force labels, eV/A, from the net force of each structure; NaN if no structure tells.

    Forces of any translation-invariant energy sum to zero, whatever the cutoff or the descriptor, so the sum over N atoms of labels
    with independent noise has the variance N σ² in each direction and nothing else in it: σ² = Σ_s |Σ_i F_i|² / (3 Σ_s N_s). What
    evidence calls noise beyond that is what the model class cannot express. Codes that subtract the net force give 0.
    """
    known = ~targets.forces.isnan().any(1)
    whole = known.new_ones(len(structures)).index_put((structures.structure_of_atom[~known],), known.new_zeros(()))
    whole &= structures.counts > 1
    if not whole.any():
        return math.nan
    net = targets.forces.nan_to_num().new_zeros(len(structures), 3)
    net = net.index_add(0, structures.structure_of_atom, targets.forces.nan_to_num())
    return (net[whole].square().sum() / (3 * structures.counts[whole].sum())).sqrt().item()


def degrees_of_freedom(squares: Tensor) -> float:
    """ν, as how many normal numbers structures tell a variance.

    Errors of one structure belong together; how much so is seen from how much (error/σ)² differs between structures. With v its
    relative variance, their mean is distributed as χ²_ν/ν with ν = 2 n / v (Satterthwaite, Biometrics Bull. 2, 110 (1946)). To v come
    SUPPOSED structures that differ as squares of single normal numbers do, 2: a few that happen to agree are no proof.

    Args:
        squares: (n,) mean (error/σ)² of each structure.
    """
    n = len(squares)
    differences = (squares / squares.mean() - 1).square().sum()
    return 2 * n / float((differences + 2 * PRIOR_STRUCTURES) / (n - 1 + PRIOR_STRUCTURES))


def mean_square_residuals(
    name: str, kind: KindCalibration, structures: Structures, targets: Targets, prediction: Prediction
) -> Tensor:
    """(n,) mean squares of calibrated errors of a kind, of structures with a label of it."""
    errors, parts, _ = split_residuals(name, structures, targets, prediction)
    owner = structures.structure_of_atom if name == "forces" else torch.arange(len(structures))
    owner = owner.to(errors.device).repeat_interleave(len(errors) // len(owner))
    known = errors.isfinite() & parts.isfinite().all(1)
    found = (errors[known].square() / kind.variance(parts[known]).clamp_min(kind.floor**2)).double()
    counts = torch.zeros(len(structures)).to(found).index_add(0, owner[known], torch.ones_like(found))
    sums = torch.zeros_like(counts).index_add(0, owner[known], found)
    return (sums / counts)[counts > 0]


def zero_by_symmetry(kind: str, targets: Targets, prediction: Prediction, parts: Tensor) -> Tensor:
    """(n,) where symmetry leaves nothing: label and prediction are both zero, or next to nothing is open to the data.

    Args:
        parts: (n, 3) of the variance (`residuals`).
    """
    label, mean = getattr(targets, kind), getattr(prediction, kind)
    if kind == "stresses":
        a, b = torch.triu_indices(3, 3, device=mean.device)
        label, mean = label[:, a, b], mean[:, a, b]
    none = ((label.abs() < ZERO_LABEL[kind]) & (mean.abs() < ZERO_LABEL[kind])).flatten()
    return none | (parts[:, 1] <= SYMMETRIC * parts[:, 1].nanmean())


def split_residuals(
    kind: str, structures: Structures, targets: Targets, prediction: Prediction
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Errors of a kind, per atom for energies, and by what their variance is made up.

    Returns:
        errors (n,); parts of the variance (n, 3): inducing set, data, all that is constant; Z of the atom (n,), of forces only.
    """
    check_choice("kind of observation", kind, KINDS)
    difference = getattr(prediction, kind) - getattr(targets, kind)
    variance: Variance | None = getattr(prediction, VARIANCE_FIELDS[kind])
    if variance is None:
        raise ValueError(f"the prediction has no variance of {kind}")
    scale, species = torch.ones((), dtype=difference.dtype, device=difference.device), None
    if kind == "energies":
        scale = 1 / structures.counts.to(difference)
    if kind == "stresses":  # nine components, six of them different
        a, b = torch.triu_indices(3, 3, device=difference.device)
        difference = difference[:, a, b]
        variance = variance.map(lambda part: part[:, a, b])
    if kind == "forces":
        species = structures.species.repeat_interleave(3)
    causes = (variance.inducing, variance.data, variance.misspecification + variance.noise)
    parts = torch.stack([(part * scale**2).flatten() for part in causes], dim=1)
    return (difference * scale).flatten(), parts, species
