"""Variances of local energies from fewer columns: what dynamics can afford at every step, and how far they are from those of all.

The calibrated variance of ε(x), up to a factor, is v(x) = V(x, x) with V = κ [k − a.a'] + aᵀP a' (VarianceModel.atom_energies), κ the
weight of what the inducing set cannot represent beside that of what data leave. ε(x) is nearly Σ_i h_i(x) ε(x_i) of environments x_i,
training environments and moved ones, with h = H φ of the few columns φ: weighted least squares, w_i = 1 / v(x_i). So v ≈ φᵀ Hᵀ V H φ,
the variance of this sum: never negative, and no difference of large numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gpmlp.core import neighbors, parallel
from gpmlp.core.errors import UserError, chemical_symbol
from gpmlp.core.structures import Structures
from gpmlp.fitting.low_rank import enough
from gpmlp.gp.local_variance import ReducedVariance
from gpmlp.gp.variance import VarianceModel
from gpmlp.potential.potential import Potential

# lengths times, and atoms moved by so much of the shortest distance (standard deviation): far from the data, but not absurd
MOVED = ((0.9, 0.0), (0.8, 0.0), (0.7, 0.0), (1.25, 0.0), (1.0, 0.04), (1.0, 0.08), (1.0, 0.13))
ENVIRONMENTS = 1200, 350  # of each species, about: as they are, and of each way to move them
JUDGED = 500, 150  # the same of the structures on which they are compared
COLUMNS = (64, 96, 128, 192, 256, 320)  # of a species that are tried
WORTH = 0.6  # of all columns: with more, the exact form is hardly dearer
LOW, HIGH = 0.9, 1.15  # of the exact standard deviations, between which those QUANTILES shall be, as they are and moved
QUANTILES = (0.05, 0.5, 0.95)
RIDGE = 1e-12  # of the largest of what is inverted
TINY = 1e-300
REACH = 4.0  # A, in which nearest neighbours are looked for
Looks = list[Tensor]  # environments of a species: their features, by descriptor


def with_reduced_variance(
    potential: Potential, known: Structures, others: Structures, seed: int = 0
) -> tuple[Potential, dict[str, Any] | None]:
    """A potential whose variances of local energies are those of fewer columns, where that is cheaper, and numbers for the report.

    Of each species there are as few of COLUMNS as keep standard deviations on `others` between LOW and HIGH; the most if none does.

    Args:
        known: structures whose environments ε(x) is interpolated from; others: different ones.

    Returns:
        the potential; by species the columns, of how many, and QUANTILES of the ratio of standard deviations (reduced / exact), of
        structures as they are and moved. None, and the potential as it is, where there are none.
    """
    model = potential.variances
    if model is None or model.local_blocks is None or not len(known) or not len(others):
        return potential, None
    weights = potential.calibration.kinds["forces"].weights if "forces" in potential.calibration.kinds else None
    kappa = model.amplitude * (weights[0] / weights[1] if weights else 1.0)
    fitted, judged = (_looks(potential, s, n, seed) for s, n in ((known, ENVIRONMENTS), (others, JUDGED)))
    reduced: dict[int, ReducedVariance] = {}
    numbers: dict[str, Any] = {}
    with parallel.one_core():
        for z in sorted({z for blocks in model.blocks for b in blocks for z in b.central_species}):
            if all(len(looks[0][z][0]) for looks in (fitted, judged)):
                posterior = _Posterior.of_species(model, z, kappa)
                found = posterior.cheapest([x[z] for x in fitted], [x[z] for x in judged])
                if found is not None:
                    reduced[z], numbers[chemical_symbol(z)] = found
    if not reduced:
        return potential, None
    return replace(potential, variances=replace(model, reduced=reduced, exact=False)), numbers


def _looks(potential: Potential, structures: Structures, counts: tuple[int, int], seed: int) -> list[dict[int, Looks]]:
    """Environments of about so many atoms of each species, as they are, and of each way to move them, by species."""
    out = []
    for k, (factor, shaken) in enumerate([(1.0, 0.0), *MOVED]):
        chosen = structures.select(enough(structures, counts[min(k, 1)], seed + k))
        try:
            there = potential.to_own_device(_moved(chosen, factor, shaken, seed + k) if k else chosen)
            features = [term.environments(there).environments.features for term in potential.terms]
        except UserError:  # atoms on top of each other
            continue
        out.append({z: [x[there.species == z] for x in features] for z in potential.species})
    return out


def _moved(structures: Structures, factor: float, shaken: float, seed: int) -> Structures:
    """All lengths times a factor, then atoms moved at random by so much of the shortest distance in their structure."""
    noise = torch.randn(structures.positions.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    near = neighbors.find_neighbors(structures, REACH)
    lengths, owner = near.vectors(structures).norm(dim=1), structures.structure_of_atom[near.centers]
    shortest = lengths.new_full((len(structures),), REACH).scatter_reduce(0, owner, lengths, "amin")
    size = shaken * shortest[structures.structure_of_atom, None]
    return structures.with_positions(factor * structures.positions + size * noise.to(size), factor * structures.cells)


@dataclass(frozen=True, eq=False)
class _Posterior:
    """Of local energies of one species: V(x, x') = κ [k - a.a'] + aᵀP a'.

    Attributes:
        model, species: whose; kappa: κ.
        lowers: L of its blocks; signal: (columns,); covariance: P among its columns.
    """

    model: VarianceModel
    species: int
    kappa: float
    lowers: list[Tensor]
    signal: Tensor
    covariance: Tensor

    @staticmethod
    def of_species(model: VarianceModel, z: int, kappa: float) -> _Posterior:
        widths = [len(lower) for lower in model.lowers]
        columns = torch.arange(model.n_columns, device=model.signal.device).split(widths)
        mine = [i for i, b in enumerate(b for blocks in model.blocks for b in blocks) if z in b.central_species]
        here = torch.cat([columns[i] for i in mine])
        covariance = torch.cholesky_inverse(model.factor, upper=True)[here][:, here]
        return _Posterior(model, z, kappa, [model.lowers[i] for i in mine], model.signal[here], covariance)

    def whitened(self, x: Looks) -> Tensor:
        """a = D L⁻¹ k, (environments, columns)."""
        pieces = self.model.local_pieces(self.species, x)
        parts = [
            torch.linalg.solve_triangular(lower, piece.T.to(lower), upper=False).T
            for piece, lower in zip(pieces, self.lowers, strict=True)
        ]
        return torch.cat(parts, dim=1) * self.signal

    def variances(self, a: Tensor) -> Tensor:
        """v, (environments,) eV²."""
        unexplained = (self.model.prior_variance(self.species) - a.square().sum(1)).clamp_min(0)
        return self.kappa * unexplained + ((a @ self.covariance) * a).sum(1)

    def covariances_times(self, x: Looks, a: Tensor, h: Tensor) -> Tensor:
        """V h."""
        along, out = a.T @ h, a.new_zeros(len(a), h.shape[1])
        for prior, features in zip(self.model.priors, x, strict=True):
            if self.species in prior.signal:
                kernels = prior.kernel.value(features @ features.T).to(h)
                out = out + prior.signal[self.species] ** 2 * (kernels @ h)
        return self.kappa * (out - a @ along) + a @ (self.covariance @ along)

    def cheapest(
        self, fitted: Sequence[Looks], judged: Sequence[Looks]
    ) -> tuple[ReducedVariance, dict[str, float]] | None:
        """Of as few columns as do, with numbers for the report; None where the exact form is as cheap."""
        n = len(self.signal)
        x = [torch.cat(parts) for parts in zip(*fitted, strict=True)]
        sizes = [m for m in COLUMNS if m <= min(WORTH * n, len(x[0]))]
        a = self.whitened(x)
        groups = [self.whitened(looks) for looks in judged]
        found = None
        for m in sizes:
            form, projected = self._of_columns(x, a, m)
            ratios = [(g[:, form.columns(self.lowers)] @ projected).square().sum(1) / self.variances(g) for g in groups]
            low, middle, high = ratios[0].sqrt().quantile(a.new_tensor(QUANTILES)).tolist()
            moved = torch.cat(ratios[1:] or ratios).sqrt().quantile(a.new_tensor(QUANTILES)).tolist()
            numbers = {
                "columns": m,
                "columns_of_all": n,
                "std_ratio_low": low,
                "std_ratio_median": middle,
                "std_ratio_high": high,
            }
            numbers |= {f"std_ratio_{q}_moved": v for q, v in zip(("low", "median", "high"), moved, strict=True)}
            found = form, numbers
            if LOW <= min(low, moved[0]) and max(high, moved[2]) <= HIGH:
                break
        return found

    def _of_columns(self, x: Looks, a: Tensor, m: int) -> tuple[ReducedVariance, Tensor]:
        """With so many leading columns, and F with v ≈ |Fᵀφ|², φ those of a."""
        widths = [len(lower) for lower in self.lowers]
        leading = [max(1, min(w, round(m * w / sum(widths)))) for w in widths]
        form = ReducedVariance(tuple(leading), a.new_zeros(0, 0))
        columns = form.columns(self.lowers)
        weights = self.variances(a).clamp_min(TINY).rsqrt()
        q, r = torch.linalg.qr(a[:, columns] * weights[:, None])
        u, s, v = torch.linalg.svd(r, full_matrices=False)
        h = weights[:, None] * (q @ (u * (s / (s.square() + RIDGE * s[0] ** 2))) @ v)  # h_i(x) = (H φ)_i
        values, vectors = torch.linalg.eigh(h.T @ self.covariances_times(x, a, h))
        projected = vectors * values.clamp_min(0).sqrt()
        whiten = torch.block_diag(
            *(torch.linalg.inv(lower[:n, :n]) for lower, n in zip(self.lowers, leading, strict=True))
        )
        whole = projected.T @ (self.signal[columns, None] * whiten)
        triangle = torch.linalg.qr(whole.flip(1)).R.flip(0, 1)
        return ReducedVariance(tuple(leading), triangle.contiguous()), projected
