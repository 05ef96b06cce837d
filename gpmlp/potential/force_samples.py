"""Force covariances of all atoms estimated from a few posterior samples, at the price of a few predictions of the mean.

The difference of a posterior sample from the mean is an energy of its own, δε(x) = k_xu δw, and its forces δF_s have the covariance that
the data leave open, so that C_i ≈ 1/k Σ_s δF_si δF_siᵀ without bias, whatever k. The descriptor is evaluated once for mean and samples,
and what each sample costs is a product with the centres and a pull-back. The relative standard deviation of the estimated variance of
an isotropic force is √(2 / 3k) (docs/decisions/015-alarm.md). The samples are always the same ones, so that estimates along a
trajectory go up and down with the exact variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpmlp.core.environments import Environments
from gpmlp.core.quantities import Variance
from gpmlp.gp.kernels import ZonalKernel
from gpmlp.gp.variance import VarianceModel
from gpmlp.potential.mean import MeanBlock, QuadraticForm
from gpmlp.potential.samples import SampledPotential, draw_deviations

MEMBERS, SEED = 8, 0


@dataclass(frozen=True, eq=False)
class DeviationTerm:
    """Deviations of so many samples (members) from the mean of one term, by central species."""

    kernel: ZonalKernel
    blocks: dict[int, MeanBlock | QuadraticForm]
    members: int

    def slopes(self, environments: Environments) -> Tensor:
        """dδε/dx, (k, environments, features)."""
        x, species = environments.features, environments.species
        out = x.new_zeros(self.members, *x.shape)
        for z in self.blocks:
            mine = (species == z).nonzero()[:, 0]
            if len(mine):
                out[:, mine] = self.of_species(z, x[mine])
        return out

    def of_species(self, z: int, x: Tensor) -> Tensor:
        """The same of environments of one species."""
        if z not in self.blocks:
            return x.new_zeros(self.members, *x.shape)
        block = self.blocks[z]
        return (block(x) if isinstance(block, QuadraticForm) else block(self.kernel, x))[1].movedim(1, 0)


@dataclass(frozen=True, eq=False)
class ForceSamples:
    """Deviations of some posterior samples (members) from a potential, and the variance model that they are drawn from."""

    model: VarianceModel
    terms: tuple[DeviationTerm, ...]
    members: int

    @staticmethod
    def from_potential(potential: SampledPotential) -> ForceSamples:
        """Of a potential with variances; always the same draw."""
        drawn = draw_deviations(potential, MEMBERS, SEED)
        terms = []
        for term, blocks in zip(potential.terms, drawn, strict=True):
            forms = {z: block.cheaper_form(term.kernel) or block for z, block in blocks.items()}
            terms.append(DeviationTerm(term.kernel, forms, MEMBERS))
        return ForceSamples(potential.variance_model(), tuple(terms), MEMBERS)

    def pair_gradients(self, environments: Sequence[Environments]) -> list[Tensor]:
        """∂δE/∂r_ij of the pairs of the environments of each term, (k, pairs, 3)."""
        return [
            torch.stack([e.pull_back(slopes) for slopes in term.slopes(e)])
            for term, e in zip(self.terms, environments, strict=True)
        ]

    def covariance(self, deviations: Tensor) -> Variance:
        """(atoms, 3, 3) from forces of the deviations (k, atoms, 3); see VarianceModel.sampled_force_covariance."""
        return self.model.sampled_force_covariance(deviations)
