"""Noise of energies by leave-one-out: how well the model predicts each energy from all other labels."""

from __future__ import annotations

import torch
from torch import Tensor

from gpmlp.gp.posterior import FIXED

FRACTIONS = tuple(2.0**-k for k in range(8))
WITHIN = 1.05  # of the best leave-one-out error is as good


def energy_noise(whitened: dict[str, Tensor], count: int, noise: dict[str, float], signal: Tensor) -> float:
    """The largest noise of energies, at most that of the evidence, whose leave-one-out error is within 5 % of the best.

    What a sparse model with few columns cannot express is no independent noise: it is shared by energy and forces of a structure, so
    the evidence gives the few energies too little weight. Given forces and stresses, the energies are a small Gaussian process of
    their own with covariance K = A D S₀⁻¹ D Aᵀ and residuals r; leaving out i leaves the error [Q r]_i / Q_ii, Q = (K + σ² I)⁻¹
    (Rasmussen & Williams 2006, eqs. 5.10 to 5.12). Where the energies are more than the columns and only their triangular factor is
    left, Q_ii is replaced by its mean, tr Q / n, which the factor knows (generalised cross-validation; Golub, Heath, Wahba,
    Technometrics 21, 215 (1979), eq. 1.4).

    Args:
        whitened: by kind, [A | y] (posterior.whiten).
        count: number of energies.
        noise: by kind, as learned by evidence.
        signal: (columns,) diagonal of D.
    """
    columns = len(signal)
    system = torch.eye(columns, dtype=signal.dtype, device=signal.device)
    right = torch.zeros_like(signal)
    for kind, rows in whitened.items():
        if kind == "energies":
            continue
        scaled = rows[:, :columns] * signal
        weight = (1.0 if kind == FIXED else noise[kind]) ** -2
        system.addmm_(scaled.T, scaled, alpha=weight)
        right.addmv_(scaled.T, rows[:, columns], alpha=weight)
    lower = torch.linalg.cholesky(system)
    mean = torch.cholesky_solve(right[:, None], lower)[:, 0]
    energies = whitened["energies"][:, :columns] * signal
    root = torch.linalg.solve_triangular(lower, energies.T, upper=False)
    values, vectors = torch.linalg.eigh(root.T @ root)
    rotated = vectors.T @ (whitened["energies"][:, columns] - energies @ mean)
    errors, folded = [], count - len(rotated)
    for fraction in FRACTIONS:
        variance = (fraction * noise["energies"]) ** 2
        inverse = 1 / (values.clamp_min(0) + variance)
        if folded:
            mean_trace = (float(inverse.sum()) + folded / variance) / count  # tr Q / n
            errors.append(float((inverse * rotated).square().sum() / count) ** 0.5 / mean_trace)
        else:
            left_out = (vectors @ (inverse * rotated)) / (vectors.square() @ inverse)
            errors.append(float(left_out.square().mean().sqrt()))
    best = min(errors)
    fraction = next(f for f, e in zip(FRACTIONS, errors, strict=True) if e <= WITHIN * best)
    return fraction * noise["energies"]
