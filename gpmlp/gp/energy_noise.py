"""Noise of energies by leave-one-out: how well the model predicts each energy from all other labels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpmlp.gp.posterior import FIXED

FRACTIONS = tuple(2.0**-k for k in range(8))
WITHIN = 1.05  # of the best leave-one-out error is as good
UNDETERMINED = 0.1  # of the leave-one-out error: with a noise below, the data do not say how large it is
FEW = 3  # energies of a config_type, which have a typical error of their own
FORCES = 1.01  # of the residual of forces: so much may energies of some config_types cost


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
    at that error. The typical error of the config_types asks for a smaller noise where most of them are easier than the worst: it is
    followed as far as the residual of the forces grows by no more than a factor FORCES.

    Args:
        whitened: by kind, [A | y] (posterior.whiten).
        count: number of energies.
        noise: by kind, as learned by evidence.
        signal: (columns,) diagonal of D.
        left_out: which energies are left out together; each by itself if None.
    """
    left_out = left_out or LeftOutEnergies.one_by_one(count)
    conditioned = _EnergiesGivenForces.build(whitened, count, noise, signal)
    start = noise["energies"]
    while (errors := conditioned.errors(start, left_out.rows)).isinf().any():  # more parameters than there are groups
        start *= 2
    if start < UNDETERMINED * left_out.typical_error(errors):
        start = left_out.typical_error(errors)
    judged = {fraction * start: conditioned.errors(fraction * start, left_out.rows) for fraction in FRACTIONS}

    def largest(values: Sequence[float]) -> float:
        return next(s for s, value in zip(judged, values, strict=True) if value <= WITHIN * min(values))

    pooled = largest([float(errors.square().mean().sqrt()) for errors in judged.values()])
    typical = largest([left_out.typical_error(errors) for errors in judged.values()])
    if typical >= pooled:
        return typical
    most = FORCES * conditioned.force_residual(pooled)
    return min(s for s in judged if typical <= s <= pooled and (s == pooled or conditioned.force_residual(s) <= most))


@dataclass(frozen=True, eq=False)
class _EnergiesGivenForces:
    """The energies as a small Gaussian process given forces and stresses: covariance K = A D S₀⁻¹ D Aᵀ = V diag(values) Vᵀ, residuals r.

    Attributes:
        count: number of energies; values, vectors: of K, of the rows or of the triangular factor of the energies; rotated: Vᵀ r.
        lower: Cholesky factor of S₀; root: L⁻¹ D Aᵀ; mean: weights over D given forces and stresses.
        forces: [A D | y] of the forces, None if there are none.
    """

    count: int
    values: Tensor
    vectors: Tensor
    rotated: Tensor
    lower: Tensor
    root: Tensor
    mean: Tensor
    forces: tuple[Tensor, Tensor] | None

    @staticmethod
    def build(whitened: dict[str, Tensor], count: int, noise: dict[str, float], signal: Tensor) -> _EnergiesGivenForces:
        columns = len(signal)
        system = torch.eye(columns, dtype=signal.dtype, device=signal.device)
        right = torch.zeros_like(signal)
        scaled = {kind: (rows[:, :columns] * signal, rows[:, columns]) for kind, rows in whitened.items()}
        for kind, (a, y) in scaled.items():
            if kind != "energies":
                weight = (1.0 if kind == FIXED else noise[kind]) ** -2
                system.addmm_(a.T, a, alpha=weight)
                right.addmv_(a.T, y, alpha=weight)
        lower = torch.linalg.cholesky(system)
        mean = torch.cholesky_solve(right[:, None], lower)[:, 0]
        energies, known = scaled["energies"]
        root = torch.linalg.solve_triangular(lower, energies.T, upper=False)
        values, vectors = torch.linalg.eigh(root.T @ root)
        rotated = vectors.T @ (known - energies @ mean)
        return _EnergiesGivenForces(
            count, values.clamp_min(0), vectors, rotated, lower, root, mean, scaled.get("forces")
        )

    def errors(self, sigma: float, groups: Sequence[Tensor]) -> Tensor:
        """(groups,) leave-one-out errors of energies per atom, eV, with noise sigma; infinite where nothing is left to judge by.

        Leaving out a group g leaves the errors (Q_gg)⁻¹ [Q r]_g, Q = (K + σ² I)⁻¹ (Rasmussen & Williams 2006, eqs. 5.10 to 5.12, for one
        at a time), that of its first row counts. Where the energies are more than the columns and only their triangular factor is left,
        generalised cross-validation takes its place, the same for all: rms residual divided by 1 - tr(K Q) / groups, which the factor
        knows (Golub, Heath, Wahba, Technometrics 21, 215 (1979), eq. 1.4, where each energy is a group).
        """
        inverse = 1 / (self.values + sigma**2)
        if self.count > len(self.rotated):
            residuals = sigma**2 * self.rotated * inverse
            free = 1 - float((self.values * inverse).sum()) / len(groups)
            error = float(residuals.square().sum() / self.count) ** 0.5 / free if free > 0 else math.inf
            return inverse.new_full((len(groups),), error)
        image = self.vectors @ (inverse * self.rotated)
        return _left_out(self.vectors, inverse, image, groups)

    def force_residual(self, sigma: float) -> float:
        """Norm of the residuals of the forces when the energies have noise sigma; 0 without forces."""
        if self.forces is None:
            return 0.0
        moved = self.root @ (self.vectors @ (self.rotated / (self.values + sigma**2)))
        weights = self.mean + torch.linalg.solve_triangular(self.lower.T, moved[:, None], upper=True)[:, 0]
        return float(torch.linalg.vector_norm(self.forces[0] @ weights - self.forces[1]))


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
