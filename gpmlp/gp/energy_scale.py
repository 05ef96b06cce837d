"""Scale of energies against forces: the factor s under which energies are most likely s times those of the forces' own process.

Given the forces, whitened energies A β less their noise are N(m, C), with β ~ N(b, (RᵀR)⁻¹), m = A b and C = A (RᵀR)⁻¹ Aᵀ (Rasmussen &
Williams 2006, section 2.1). Labels in another unit are y = s (A β + ε). With C = U Λ Uᵀ the likelihood is a product over the entries of
Uᵀy for every s and every noise of ε, so both are tried on a grid. What the forces do not determine, as energies of elements, has a large
variance in C.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FACTORS = torch.linspace(-6.0, 6.0, 301, dtype=torch.float64)  # log s
NOISES = torch.logspace(-5, 1, 49, dtype=torch.float64)  # of rms of the energies


@dataclass(frozen=True)
class EnergyScale:
    """The most likely scale.

    Attributes:
        factor: s; gain: log likelihood less that of s = 1, nats.
        noise, noise_at_one: most likely noise of energies (in their unit, over s) under s and under 1.
    """

    factor: float
    gain: float
    noise: float
    noise_at_one: float


def energy_scale(energies: Tensor, forces: Tensor, n_energies: int, force_noise: float, signal: Tensor) -> EnergyScale:
    """The most likely scale of the energies, each noise being the most likely one.

    Args:
        energies, forces: whitened rows [A | y] (inducing.whiten_rows), or some of their columns and the last one.
        n_energies: number of energies; force_noise: eV/A; signal: (columns,) δ of each column, eV.
    """
    columns = len(signal)
    eye = torch.zeros(columns, columns + 1).to(signal).fill_diagonal_(1.0)
    scaled = forces / force_noise
    scaled[:, :columns] *= signal
    upper = torch.linalg.qr(torch.cat([scaled, eye]), mode="r").R
    factor, right = upper[:columns, :columns], upper[:columns, columns:]
    rows, y = energies[:, :columns] * signal, energies[:, columns]
    mean = (rows @ torch.linalg.solve_triangular(factor, right, upper=True))[:, 0]
    spread = torch.linalg.solve_triangular(factor.T, rows.T, upper=False)
    variances, vectors = torch.linalg.eigh(spread.T @ spread)
    y, mean, variances = (v.double().cpu() for v in (vectors.T @ y, vectors.T @ mean, variances.clamp_min(0)))
    noises = NOISES * max(float(y.square().sum() / n_energies) ** 0.5, 1e-300)
    best: list[tuple[float, float, float]] = []
    for s in FACTORS.exp().tolist():
        variance = s**2 * variances + noises[:, None].square()
        likelihood = -0.5 * ((y - s * mean).square() / variance + variance.log()).sum(1)
        likelihood -= (
            n_energies - len(y)
        ) * noises.log()  # entries that the factor of the rows has gathered in its last one
        k = int(likelihood.argmax())
        best.append((float(likelihood[k]), s, float(noises[k]) / s))
    top, one = max(best), min(best, key=lambda entry: abs(math.log(entry[1])))
    return EnergyScale(top[1], top[0] - one[0], top[2], one[2])
