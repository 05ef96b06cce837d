"""Charges of an online fit: fitted where it begins or is made anew, known in its mean until then, uncertain in its variances."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting import regression
from gpmlp.fitting.charge_fit import FittedCharges
from gpmlp.gp import likelihood
from gpmlp.gp.qr import RowFactor
from gpmlp.potential.charges import ChargeModel, ChargePosterior


@dataclass(frozen=True, eq=False)
class OnlineCharges:
    """Charges between two fits of them.

    Attributes:
        model: with the parameters a of the last fit, around which energies are linear, and no posterior.
        scale: (columns,) prior standard deviations of a.
        record: of that fit, JSON-able.
    """

    model: ChargeModel
    scale: Tensor
    record: dict

    @staticmethod
    def from_fit(fitted: FittedCharges) -> OnlineCharges:
        return OnlineCharges(fitted.model, fitted.scale, fitted.report(kept=True))

    def subtract(self, structures: Structures, targets: Targets) -> Targets:
        """Labels less the electrostatic energy, forces and stresses."""
        return targets.minus(self.model(structures.to(dtype=torch.float64)).map(lambda v: v.to(structures.positions)))

    def rows(self, structures: Structures, targets: Targets) -> dict[str, Tensor]:
        """By kind, (rows, columns) derivatives of the labels by a, those with a noise of their own divided by it."""
        labels = likelihood.observed_labels(targets, structures.counts)
        parts = [self.model.columns(structures.to(dtype=torch.float64))]
        return {kind: rows[:, :-1].double() for kind, rows in regression.rows_of_labels(parts, labels).items()}

    def with_posterior(self, upper: Tensor, rows: Iterable[tuple[Tensor, Tensor]]) -> ChargeModel:
        """The model with the posterior of a, joint with that of the short-range columns.

        R_c = R⁻ᵀAᵀC; R_cc is the factor of what the columns leave of C, and of both priors: those rows are C - A R⁻¹R_c, -R⁻¹R_c and 1.

        Args:
            upper: (columns, columns) R, of [A; 1]. rows: pairs of A (rows, columns), as R has them, and C (rows, columns of charges) over
                the noise; run through twice.
        """
        pairs = [(a, c * self.scale) for a, c in rows]
        cross = sum((a.T @ c for a, c in pairs), upper.new_zeros(len(upper), len(self.scale)))
        cross = torch.linalg.solve_triangular(upper.T, cross, upper=False)
        weights = torch.linalg.solve_triangular(upper, cross, upper=True)
        left = RowFactor(len(self.scale), 2 * len(self.scale))
        for part in (torch.eye(len(self.scale)).to(upper), -weights, *(c - a @ weights for a, c in pairs)):
            left.add(part, part.new_zeros(len(part)))
        factor = left.factor()[: len(self.scale), :-1]
        factor = factor * factor.diagonal().sign()[:, None]
        return replace(self.model, posterior=ChargePosterior(self.scale, cross, factor))

    def report(self, structures: Structures) -> dict:
        """Numbers for the report, with the range of total charges that were learned from."""
        totals = structures.charges
        return self.record | {"total_charges_e": [float(totals.min()), float(totals.max())]}


def noise_scaled(charges: dict[str, Tensor], noise: dict[str, float], kinds: Sequence[str]) -> list[Tensor]:
    """Rows of charges over the noise of their kind, in the order of these."""
    return [charges[kind] / noise.get(kind, 1.0) for kind in kinds]
