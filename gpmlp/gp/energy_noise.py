"""Noise of energies by leave-one-out: how well the model predicts each energy from all other labels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpmlp.gp.posterior import FIXED

FRACTIONS = tuple(2.0**-k for k in range(8))
WITHIN = 1.05  # of the best leave-one-out error is as good
UNDETERMINED = 0.1  # of the leave-one-out error: with a noise below, the data do not say how large it is
FEW = 3  # energies of a config_type, which have a typical error of their own


@dataclass(frozen=True, eq=False)
class LeftOutEnergies:
    """What is left out together, one after the other.

    Attributes:
        rows: for each group, rows of the energies to leave out; the error is that of the first.
        config_types: of these first ones.
    """

    rows: tuple[Tensor, ...]
    config_types: tuple[str, ...]

    @staticmethod
    def one_by_one(n: int) -> LeftOutEnergies:
        """Each of n energies by itself, all of one kind."""
        return LeftOutEnergies(tuple(torch.arange(n).split(1)), ("",) * n)

    def typical_error(self, errors: Tensor) -> float:
        """exp of the mean of log rms, over energies, of the rms error (groups,) of their config_type; rare ones are taken together.

        Where errors of one config_type are ten times as large as those of others, a change by a factor counts as much in either.
        """
        sizes = Counter(self.config_types)
        kinds = [c if sizes[c] >= FEW else "rare" for c in self.config_types]
        names = sorted(set(kinds))
        which = torch.tensor([names.index(c) for c in kinds], device=errors.device)
        squares = errors.new_zeros(len(names)).index_add(0, which, errors.square())
        counts = torch.bincount(which, minlength=len(names))
        return float(((counts * (squares / counts).clamp_min(1e-300).log()).sum() / (2 * len(errors))).exp())


def energy_noise(
    whitened: dict[str, Tensor],
    count: int,
    noise: dict[str, float],
    signal: Tensor,
    left_out: LeftOutEnergies | None = None,
) -> float:
    """The largest σ_E, at most that of the evidence, with rms of (Q_gg)⁻¹ [Q r]_g within 5 % of the least: the leave-one-out error.

    What a sparse model with few columns cannot express is no independent noise: it is shared by energy and forces of a structure, so
    the evidence gives the few energies too little weight. Where it gives them far too much, because the columns can follow every energy
    or structures have near-duplicates, its noise is below a tenth of the leave-one-out error and says nothing; candidates then begin
    at that error.

    Args:
        whitened: by kind, [A | y] (posterior.whiten).
        count: number of energies.
        noise: by kind, as learned by evidence.
        signal: (columns,) diagonal of D.
        left_out: which energies are left out together; each by itself if None.
    """
    error = _leave_out_error(whitened, count, noise, signal, left_out or LeftOutEnergies.one_by_one(count))
    start = noise["energies"]
    while error(start) == math.inf:  # more parameters determined than there are groups
        start *= 2
    if start < UNDETERMINED * error(start):
        start = error(start)
    errors = [error(fraction * start) for fraction in FRACTIONS]
    best = min(errors)
    return start * next(f for f, e in zip(FRACTIONS, errors, strict=True) if e <= WITHIN * best)


def _leave_out_error(
    whitened: dict[str, Tensor], count: int, noise: dict[str, float], signal: Tensor, left_out: LeftOutEnergies
) -> Callable[[float], float]:
    """The leave-one-out error of energies per atom, eV, as a function of their noise.

    Given forces and stresses, the energies are a small Gaussian process of their own with covariance K = A D S₀⁻¹ D Aᵀ and residuals r;
    leaving out a group g leaves the errors (Q_gg)⁻¹ [Q r]_g, Q = (K + σ² I)⁻¹ (Rasmussen & Williams 2006, eqs. 5.10 to 5.12, for one at
    a time). Where the energies are more than the columns and only their triangular factor is left, generalised cross-validation takes
    its place: residuals divided by 1 - tr(K Q) / groups, which the factor knows (Golub, Heath, Wahba, Technometrics 21, 215 (1979),
    eq. 1.4, where each energy is a group).
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
    values = values.clamp_min(0)
    rotated = vectors.T @ (whitened["energies"][:, columns] - energies @ mean)
    groups = len(left_out.rows)

    def of_factor(sigma: float) -> float:
        residuals = sigma**2 * rotated / (values + sigma**2)
        free = 1 - float((values / (values + sigma**2)).sum()) / groups
        return float(residuals.square().sum() / count) ** 0.5 / free if free > 0 else math.inf

    def of_rows(sigma: float) -> float:
        inverse = 1 / (values + sigma**2)
        image = vectors @ (inverse * rotated)
        return left_out.typical_error(_left_out(vectors, inverse, image, left_out.rows))

    return of_factor if count > len(rotated) else of_rows


def _left_out(vectors: Tensor, inverse: Tensor, image: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """(groups,) [(Q_gg)⁻¹ (Q r)_g]₀ with Q = V diag(inverse) Vᵀ and image = Q r; groups of one size together."""
    sizes = torch.tensor([len(g) for g in groups])
    out = image.new_zeros(len(groups))
    for size in sizes.unique().tolist():
        at = (sizes == size).nonzero()[:, 0]
        rows = torch.stack([groups[i] for i in at.tolist()]).to(image.device)
        if size == 1:
            out[at.to(image.device)] = image[rows[:, 0]] / (vectors[rows[:, 0]].square() @ inverse)
            continue
        for part, g in zip(at.split(size), rows.split(size), strict=True):  # so that products stay small
            q = (vectors[g] * inverse) @ vectors[g].mT
            out[part.to(image.device)] = torch.linalg.solve(q, image[g][..., None])[:, 0, 0]
    return out
