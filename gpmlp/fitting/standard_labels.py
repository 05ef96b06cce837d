"""Labels of structures over their noise, and what the posterior without those of one of them says of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gpmlp.core.quantities import KINDS, Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting.influence import Influence
from gpmlp.gp import likelihood
from gpmlp.gp.covariances import CovarianceRows
from gpmlp.gp.variance import WhitenedRows

PROBES = 6  # labels of each kind of a structure by which its influence is judged


@dataclass(frozen=True, eq=False)
class StandardLabels:
    """Labels of some structures over their noise σ.

    Attributes:
        rows: of these structures.
        left: (labels, columns) whose products are the posterior covariances Σ^-½ C Σ^-½; residuals: (labels,) of the fit, over σ.
        sigma: (labels,) σ of energies (totals), forces and stresses.
        owner: (labels,) structure; place: (labels,) among energies, force components and stress components of all structures.
    """

    rows: WhitenedRows
    left: Tensor
    residuals: Tensor
    sigma: Tensor
    owner: Tensor
    place: Tensor

    @staticmethod
    def make(
        rows: WhitenedRows,
        mean: CovarianceRows | None,
        structures: Structures,
        targets: Targets,
        noise: dict[str, float],
    ) -> StandardLabels:
        """From `rows` of the structures, labels less baselines, and the mean at these rows (no residuals if None)."""
        labels = likelihood.observed_labels(targets, structures.counts)
        of_atom, each = structures.structure_of_atom, torch.arange(len(structures), device=structures.species.device)
        owners = {"energies": each, "forces": of_atom.repeat_interleave(3), "stresses": each.repeat_interleave(6)}
        parts, start = [], 0
        for kind, owner in owners.items():
            label = labels[kind]
            sigma = label.noise.nan_to_num(nan=noise.get(kind, math.nan)) / label.scale
            total, b = label.values / label.scale, getattr(rows.b, kind)
            fitted = total if mean is None else getattr(mean, kind)[label.rows].to(total)
            left = b[label.rows] / sigma[:, None] if len(label.rows) else b[:0]
            parts.append((left, (total - fitted) / sigma, sigma, owner[label.rows], start + label.rows))
            start += len(owner)
        return StandardLabels(rows, *(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def left_out(self, structure: int | slice, others: StandardLabels | None) -> WithoutLabels:
        """The labels of a structure, or of all, without these and the `others`."""
        mine = (
            torch.ones_like(self.owner, dtype=torch.bool) if isinstance(structure, slice) else self.owner == structure
        )
        parts = [(self.left[mine], self.residuals[mine]), *([(others.left, others.residuals)] if others else [])]
        left, residuals = (torch.cat(part) for part in zip(*parts, strict=True))
        return WithoutLabels(self.place[mine], self.sigma[mine], left, residuals)


@dataclass(frozen=True, eq=False)
class WithoutLabels:
    """Labels of a structure, and others near it behind them, by the fit to the other data, over their noise.

    Attributes:
        place, sigma: as of StandardLabels, of the structure.
        left: B (labels, columns), C = B Bᵀ their posterior covariance in the fit; residuals: (labels,) r of the fit.
    """

    place: Tensor
    sigma: Tensor
    left: Tensor
    residuals: Tensor

    @cached_property
    def inverse(self) -> Tensor:
        """(I - B Bᵀ)⁻¹, or (I - Bᵀ B)⁻¹ where there are more labels than columns."""
        few = len(self.left) <= self.left.shape[1]
        covariance = self.left @ self.left.T if few else self.left.T @ self.left
        lower, failed = torch.linalg.cholesky_ex(torch.eye(len(covariance)).to(covariance) - covariance)
        if not int(failed):
            return torch.cholesky_inverse(lower)
        values, vectors = torch.linalg.eigh(covariance)  # labels in the data leave less than their noise
        return vectors / (1 - values.clamp(0, 1 - 1e-12)) @ vectors.T

    @cached_property
    def errors(self) -> Tensor:
        """(labels,) (I - C)⁻¹ r."""
        r, inverse = self.residuals.to(self.left), self.inverse
        if len(inverse) == len(r):
            return inverse @ r
        return r + self.left @ (inverse @ (self.left.T @ r))  # Woodbury

    @property
    def variances(self) -> Tensor:
        """[(I - C)⁻¹ C]_ii of the labels of the structure."""
        own = torch.arange(len(self.place), device=self.left.device)
        return (self.rows(own) * self.left[own]).sum(1)

    def rows(self, chosen: Tensor) -> Tensor:
        """(I - C)⁻¹ B of some labels, B (I - BᵀB)⁻¹."""
        if len(self.inverse) == len(self.left):
            return self.inverse[chosen] @ self.left
        return self.left[chosen] @ self.inverse

    def influence(self, errors: Tensor, kind: Tensor, seed: int) -> Influence:
        """Of leaving the structure out, with its energy, PROBES of its force components at random and of its stress as probes.

        Args:
            errors: of the mean, over the noise, as that has all columns; kind: (labels,) of each label, place in KINDS.
        """
        shift = errors.to(self.left) @ self.left
        order = torch.randperm(len(kind), generator=torch.Generator().manual_seed(seed))
        chosen = torch.cat([order[kind.cpu()[order] == k][:PROBES] for k in range(len(KINDS))]).to(kind.device)
        rows = self.rows(chosen)
        about = errors[chosen].to(rows), (rows * self.left[chosen]).sum(1), torch.zeros_like(chosen), kind[chosen]
        return Influence(shift[None], rows, *about)
