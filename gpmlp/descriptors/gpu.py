"""Dense power spectra: neighbours in tables of fixed width, expansion and pull-back as batched matrix products, for GPUs.

A table has a row for each environment and species of neighbours; places without a neighbour hold a vector beyond the cutoff, whose
weight is zero. So every shape is known beforehand, nothing is summed by index, and nothing is asked of the host. The numbers are those
of power_spectrum.py, without autograd; triton_soap.py has the same as three kernels.
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
    """What both forms of the dense power spectrum are made of, on one device and of one type.

    Attributes:
        descriptor: whose numbers they are.
        table: (intervals, 6, (l_max + 1) n_max) radial polynomials, highest power first, radial functions of one l side by side.
        center: (n_max,) density of the central atom itself.
        factors: (features,) prefactor of each product, those off the diagonal with their √2.
        first, second: (products,) channels of each product.
    """

    descriptor: PowerSpectrum
    table: Tensor
    center: Tensor
    factors: Tensor
    first: Tensor
    second: Tensor

    @staticmethod
    def from_descriptor(descriptor: PowerSpectrum, like: Tensor) -> DenseTables:
        """On the device of a tensor, of its type."""
        radial = descriptor._radial
        at_zero, _ = radial(torch.zeros(1, dtype=torch.float64))
        center = descriptor.central_weight * at_zero[0, :, 0] / (4 * torch.pi) ** 0.5
        by_l = radial.coefficients.unflatten(2, (radial.n_max, radial.l_max + 1)).mT.flatten(2)
        a, b = (index.to(like.device) for index in descriptor._pairs)
        factors = descriptor._prefactors(torch.zeros(0, dtype=torch.float64)).flatten()
        return DenseTables(descriptor, by_l.to(like).contiguous(), center.to(like), factors.to(like), a, b)


@dataclass(frozen=True, eq=False)
class DenseExpansion:
    """Spectra of some environments, and what their pull-back needs.

    Attributes:
        spectrum: (environments, features), not of unit norm.
        density: (environments, channels, (l_max + 1)²).
        pairs: of the neighbours, whatever the form that made it wants to keep.
    """

    spectrum: Tensor
    density: Tensor
    pairs: tuple[Tensor, ...]


class DenseBackend(Protocol):
    """A way to make dense power spectra."""

    def expand(self, vectors: Tensor, own: Tensor) -> DenseExpansion:
        """Spectra of vectors (environments, species, width, 3), A; `own`: (environments,) slot of the central species."""
        ...

    def pull_back(self, made: DenseExpansion, on_spectrum: Tensor) -> Tensor:
        """∂E/∂vectors (environments, species, width, 3) from ∂E/∂spectrum (environments, features)."""
        ...


@dataclass(frozen=True, eq=False)
class BatchedProducts:
    """Batched matrix products in PyTorch: n × pairs times pairs × m for each l, environment and species."""

    numbers: DenseTables
    harmonics: BatchedHarmonics

    @staticmethod
    def from_descriptor(descriptor: PowerSpectrum, like: Tensor) -> BatchedProducts:
        """On the device of a tensor, of its type."""
        return BatchedProducts(
            DenseTables.from_descriptor(descriptor, like), BatchedHarmonics.from_degree(descriptor.l_max, like)
        )

    def expand(self, vectors: Tensor, own: Tensor) -> DenseExpansion:
        """As in Form."""
        made, (n, slots, width, _) = self.numbers.descriptor, vectors.shape
        r = vectors.norm(dim=3)
        units = (vectors / r[..., None]).reshape(-1, 3).T.contiguous()
        radial, d_radial = self._radial(r)
        q, slopes, powers = self.harmonics(units)
        y = self.harmonics.values(q, powers).unflatten(1, (n * slots, width))
        parts = [radial[:, :, self._n(l)].mT @ y[m].permute(1, 2, 0) for l, m in enumerate(made._l_blocks())]
        density = torch.cat(parts, dim=2).unflatten(0, (n, slots))
        mine = own[:, None] == torch.arange(slots, device=own.device)
        density[..., 0] += mine[:, :, None] * self.numbers.center
        density = density.flatten(1, 2)
        products = [
            (density[:, :, m] @ density[:, :, m].mT)[:, self.numbers.first, self.numbers.second]
            for m in made._l_blocks()
        ]
        spectrum = torch.stack(products, dim=-1).flatten(1) * self.numbers.factors
        return DenseExpansion(spectrum, density, (r, units, radial, d_radial, q, slopes, powers))

    def pull_back(self, made: DenseExpansion, on_spectrum: Tensor) -> Tensor:
        """As in Form. With the gradient A_lm = Σ_n R_nl ∂E/∂c_nlm of a harmonic, and B_lm of its slope R': g = r̂ Σ B Y + Σ A ∇Y."""
        r, units, radial, d_radial, q, slopes, powers = made.pairs
        n, slots, width = r.shape
        weights = self.on_density(made.density, on_spectrum).unflatten(1, (slots, -1)).flatten(0, 1)
        blocks = list(enumerate(self.numbers.descriptor._l_blocks()))
        on_y, on_slope = (
            torch.cat([weights[:, :, m].mT @ part[:, :, self._n(l)].mT for l, m in blocks], dim=1).transpose(0, 1)
            for part in (radial, d_radial)
        )
        gradient = torch.stack(
            [(on_y.flatten(1) * part).sum(0) for part in self.harmonics.gradients(q, slopes, powers)]
        )
        along = (on_slope.flatten(1) * self.harmonics.values(q, powers)).sum(0)
        # of a function of the direction only what is across it
        across = (gradient - units * (units * gradient).sum(0)) / r.flatten()
        return (units * along + across).T.reshape(n, slots, width, 3)

    def on_density(self, density: Tensor, on_spectrum: Tensor) -> Tensor:
        """∂E/∂c (environments, channels, (l_max + 1)²)."""
        made = self.numbers.descriptor
        scaled = (on_spectrum * self.numbers.factors).unflatten(1, (-1, made.l_max + 1))
        full = scaled.new_zeros(len(scaled), made.channels, made.channels, made.l_max + 1)
        full[:, self.numbers.first, self.numbers.second] = scaled
        full = full + full.transpose(1, 2)
        return torch.cat([full[..., l] @ density[:, :, m] for l, m in enumerate(made._l_blocks())], dim=-1)

    def _n(self, l: int) -> slice:
        """Where the radial functions of an l are."""
        n_max = self.numbers.descriptor.n_max
        return slice(l * n_max, (l + 1) * n_max)

    def _radial(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """w I_nl and its slope, (environments × species, width, (l_max + 1) n_max)."""
        step = self.numbers.descriptor._radial.step
        value, slope = evaluate_splines(self.numbers.table, r / step)
        weight, d_weight = (part[..., None] for part in self.numbers.descriptor.weights(r))
        slope = slope * (weight / step) + d_weight * value
        return (weight * value).flatten(0, 1), slope.flatten(0, 1)


def dense_environments(descriptor: PowerSpectrum, surroundings: Surroundings, by: DenseBackend) -> Environments:
    """Features of all surroundings, ENVIRONMENTS of them at a time, and derivatives likewise. Jacobians are the plain path's.

    What the pull-back needs of the pairs is kept where it is that of one chunk, else made again.
    """
    vectors = surroundings.vectors.detach()
    own = descriptor._slot(surroundings.species)
    place, width = _places(descriptor, surroundings)
    slots, n, far = len(descriptor.species), len(surroundings), vectors.new_tensor([0.0, 0.0, descriptor.cutoff + 1.0])
    table = far.repeat(n * slots * width, 1).index_copy(0, place, vectors).unflatten(0, (n, slots, width))
    chunks = list(zip(table.split(ENVIRONMENTS), own.split(ENVIRONMENTS), strict=True))
    only = by.expand(*chunks[0]) if len(chunks) == 1 else None
    spectrum = only.spectrum if only else torch.cat([by.expand(*some).spectrum for some in chunks])
    norm = spectrum.norm(dim=1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
    features = spectrum / norm

    def pull_back(cotangents: Tensor) -> Tensor:
        if cotangents.dim() == 3:
            return torch.stack([pull_back(one) for one in cotangents])
        on_spectrum = (cotangents - features * (features * cotangents).sum(1, keepdim=True)) / norm
        parts = zip(chunks, on_spectrum.split(ENVIRONMENTS), strict=True)
        pulled = [by.pull_back(only or by.expand(*some), on) for some, on in parts]
        return torch.cat(pulled).flatten(0, 2)[place]

    return Environments(surroundings, features, pull_back, lambda: descriptor.reference(surroundings).jacobian())


def _places(descriptor: PowerSpectrum, surroundings: Surroundings) -> tuple[Tensor, int]:
    """Where each pair goes in a table of (environments, species, width), and that width."""
    slots = len(descriptor.species)
    groups = surroundings.centers * slots + descriptor._slot(surroundings.neighbor_species)
    return padded_places(groups, len(surroundings) * slots)
