"""Power spectra on GPUs: neighbours in tables of fixed width, expansion and pull-back as batched matrix products.

A table has a row for each environment and species of neighbours; places without a neighbour hold a vector beyond the cutoff, whose
weight is zero. So every shape is fixed beforehand, nothing is summed by index, and there is no host synchronisation. The numbers are
those of soap.py, without autograd; _triton.py has the same as three kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gpmlp.core.environments import Environments, Surroundings
from gpmlp.core.padded_neighbors import padded_places
from gpmlp.descriptors.radial import evaluate_splines
from gpmlp.descriptors.soap import PowerSpectrum
from gpmlp.descriptors.spherical_harmonics import BatchedHarmonics

ENVIRONMENTS = 1 << 14  # whose pairs are in memory together


@dataclass(frozen=True, eq=False)
class DenseTables:
    """Tables of a descriptor that dense backends share, on one device and of one type.

    Attributes:
        descriptor: of which the tables are.
        table: (intervals, 6, (l_max + 1) n_max) radial polynomials, highest power first, radial functions of one l side by side.
        center: (n_max,) density of the central atom itself.
        factors: (features,) prefactor of each product, those off the diagonal with their √2.
        pairs: (products,) channels of each product, first and second.
    """

    descriptor: PowerSpectrum
    table: Tensor
    center: Tensor
    factors: Tensor
    pairs: tuple[Tensor, Tensor]

    @staticmethod
    def from_descriptor(descriptor: PowerSpectrum, like: Tensor) -> DenseTables:
        """On the device of a tensor, of its type."""
        radial, double = descriptor.radial_integrals, torch.zeros(0, dtype=torch.float64)
        by_l = radial.coefficients.unflatten(2, (radial.n_max, radial.l_max + 1)).mT.flatten(2)
        center, factors = descriptor.center_density(double).to(like), descriptor.prefactors(double).to(like)
        a, b = descriptor.channel_pairs
        pairs = a.to(like.device), b.to(like.device)
        return DenseTables(descriptor, by_l.to(like).contiguous(), center, factors, pairs)


@dataclass(frozen=True, eq=False)
class DenseExpansion:
    """Spectra of some environments, and what their pull-back needs.

    Attributes:
        spectrum: (environments, features), not of unit norm.
        density: (environments, product_channels, (l_max + 1)²), compressed where the descriptor's is.
        pairs: whatever the backend needs again of the neighbours.
    """

    spectrum: Tensor
    density: Tensor
    pairs: tuple[Tensor, ...]


class DenseBackend(Protocol):
    """Computes dense power spectra and their derivatives."""

    def expand(self, vectors: Tensor, center_slots: Tensor) -> DenseExpansion:
        """Spectra of vectors (environments, species, width, 3), A; `center_slots`: (environments,) slot of the central species."""
        ...

    def pull_back(self, expansion: DenseExpansion, on_spectrum: Tensor) -> Tensor:
        """∂E/∂vectors (environments, species, width, 3) from ∂E/∂spectrum (environments, features)."""
        ...


@dataclass(frozen=True, eq=False)
class BatchedProducts:
    """Batched matrix products in PyTorch: n × pairs times pairs × m for each l, environment and species."""

    tables: DenseTables
    harmonics: BatchedHarmonics

    @staticmethod
    def from_descriptor(descriptor: PowerSpectrum, like: Tensor) -> BatchedProducts:
        """On the device of a tensor, of its type."""
        return BatchedProducts(
            DenseTables.from_descriptor(descriptor, like), BatchedHarmonics.from_degree(descriptor.l_max, like)
        )

    def expand(self, vectors: Tensor, center_slots: Tensor) -> DenseExpansion:
        """As in DenseBackend."""
        descriptor, (n, slots, width, _) = self.tables.descriptor, vectors.shape
        r = vectors.norm(dim=3)
        units = (vectors / r[..., None]).reshape(-1, 3).T.contiguous()
        radial, d_radial = self._radial(r)
        q, slopes, powers = self.harmonics(units)
        y = self.harmonics.values(q, powers).unflatten(1, (n * slots, width))
        parts = [radial[:, :, self._n(l)].mT @ y[m].permute(1, 2, 0) for l, m in enumerate(descriptor.degree_slices())]
        density = torch.cat(parts, dim=2).unflatten(0, (n, slots))
        mine = center_slots[:, None] == torch.arange(slots, device=center_slots.device)
        density[..., 0] += mine[:, :, None] * self.tables.center
        density = descriptor.compress(density.flatten(1, 2))
        spectrum = descriptor.power_spectrum(density, self.tables.pairs, self.tables.factors)
        return DenseExpansion(spectrum, density, (r, units, radial, d_radial, q, slopes, powers))

    def pull_back(self, expansion: DenseExpansion, on_spectrum: Tensor) -> Tensor:
        """As in DenseBackend. With the gradient A_lm = Σ_n R_nl ∂E/∂c_nlm of a harmonic, and B_lm of its slope R': g = r̂ Σ B Y + Σ A ∇Y."""
        r, units, radial, d_radial, q, slopes, powers = expansion.pairs
        n, slots, width = r.shape
        tables, blocks = self.tables, list(enumerate(self.tables.descriptor.degree_slices()))
        on_y = tables.descriptor.pull_back_spectrum(expansion.density, on_spectrum, tables.pairs, tables.factors)
        on_density = tables.descriptor.pull_back_compressed(on_y)
        weights = on_density.unflatten(1, (slots, -1)).flatten(0, 1)
        on_harmonics, on_slope = (
            torch.cat([weights[:, :, m].mT @ part[:, :, self._n(l)].mT for l, m in blocks], dim=1).transpose(0, 1)
            for part in (radial, d_radial)
        )
        gradient = torch.stack(
            [(on_harmonics.flatten(1) * part).sum(0) for part in self.harmonics.gradients(q, slopes, powers)]
        )
        along = (on_slope.flatten(1) * self.harmonics.values(q, powers)).sum(0)
        # a function of the direction has no slope along it
        across = (gradient - units * (units * gradient).sum(0)) / r.flatten()
        return (units * along + across).T.reshape(n, slots, width, 3)

    def _n(self, l: int) -> slice:
        """Where the radial functions of an l are."""
        n_max = self.tables.descriptor.n_max
        return slice(l * n_max, (l + 1) * n_max)

    def _radial(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """w I_nl and its slope, (environments × species, width, (l_max + 1) n_max)."""
        step = self.tables.descriptor.radial_integrals.step
        value, slope = evaluate_splines(self.tables.table, r / step)
        weight, d_weight = (part[..., None] for part in self.tables.descriptor.weights(r))
        slope = slope * (weight / step) + d_weight * value
        return (weight * value).flatten(0, 1), slope.flatten(0, 1)


def dense_environments(descriptor: PowerSpectrum, surroundings: Surroundings, by: DenseBackend) -> Environments:
    """Features of all surroundings, ENVIRONMENTS of them at a time, and derivatives likewise. Jacobians are the plain path's.

    What the pull-back needs of the pairs is stored where there is one chunk, else computed again.
    """
    vectors = surroundings.vectors.detach()
    center_slots = descriptor.species_slots(surroundings.species)
    slots, n, far = len(descriptor.species), len(surroundings), vectors.new_tensor([0.0, 0.0, descriptor.cutoff + 1.0])
    groups = surroundings.centers * slots + descriptor.species_slots(surroundings.neighbor_species)
    place, width = padded_places(groups, n * slots)
    table = far.repeat(n * slots * width, 1).index_copy(0, place, vectors).unflatten(0, (n, slots, width))
    chunks = list(zip(table.split(ENVIRONMENTS), center_slots.split(ENVIRONMENTS), strict=True))
    only = by.expand(*chunks[0]) if len(chunks) == 1 else None
    spectrum = only.spectrum if only else torch.cat([by.expand(*part).spectrum for part in chunks])
    norm = spectrum.norm(dim=1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
    features = spectrum / norm

    def pull_back(cotangents: Tensor) -> Tensor:
        if cotangents.dim() == 3:
            return torch.stack([pull_back(one) for one in cotangents])
        on_spectrum = (cotangents - features * (features * cotangents).sum(1, keepdim=True)) / norm
        parts = zip(chunks, on_spectrum.split(ENVIRONMENTS), strict=True)
        pulled = [by.pull_back(only or by.expand(*part), on) for part, on in parts]
        return torch.cat(pulled).flatten(0, 2)[place]

    return Environments(surroundings, features, pull_back, lambda: descriptor.reference(surroundings).jacobian())
