"""The SOAP power spectrum: rotational invariants of the smoothed neighbour density, with analytic derivatives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from gpmlp.core import errors
from gpmlp.core.environments import Environments, Surroundings
from gpmlp.descriptors import radial
from gpmlp.descriptors.compression import Compression, principal_channels
from gpmlp.descriptors.radial import NeighborWeights
from gpmlp.descriptors.spherical_harmonics import degree_slices, harmonics_with_gradients


@dataclass(frozen=True)
class PowerSpectrum:
    """The SOAP power spectrum of Bartok, Kondor, Csanyi, PRB 87, 184115 (2013).

    c_anlm = sum_{j of species a} w(r_j) I_nl(r_j) Y_lm(r_j), the central atom counted at r = 0 with weight central_weight;
    p_{an,bn',l} = pi sqrt(8 / (2l+1)) sum_m c_anlm c_bn'lm for an <= bn', off-diagonal entries times sqrt(2), so that dot products
    are those of the full spectrum; features = p / |p|.

    Attributes:
        species: all atomic numbers that may occur.
        cutoff: A.
        n_max, l_max: number of radial functions; largest angular momentum.
        sigma_atom: width of the Gaussian density, A.
        basis: 'gto' or 'optimal' (descriptors/radial.py); shortest: A, distance from which the optimal basis counts.
        weights: the cutoff and radial scaling of neighbours.
        compression: of the density, whose channels then take the place of a and n in products; None: products of all.
    """

    species: tuple[int, ...]
    cutoff: float
    n_max: int
    l_max: int
    sigma_atom: float
    weights: NeighborWeights
    basis: str = "optimal"
    shortest: float = 0.0
    central_weight: float = 1.0
    compression: Compression | None = None

    def __post_init__(self) -> None:
        errors.check_positive("cutoff", self.cutoff)
        errors.check_positive("sigma_atom", self.sigma_atom)

    @property
    def channels(self) -> int:
        """Number of (species, n) combinations."""
        return len(self.species) * self.n_max

    @property
    def product_channels(self) -> int:
        """Number of channels that products are made of."""
        return self.channels if self.compression is None else self.compression.kept

    @property
    def n_features(self) -> int:
        return self.product_channels * (self.product_channels + 1) // 2 * (self.l_max + 1)

    @cached_property
    def radial_integrals(self) -> radial.RadialIntegrals:
        return radial.tabulate_integrals(
            self.basis, self.n_max, self.l_max, self.sigma_atom, self.cutoff, self.shortest, self.weights
        )

    @cached_property
    def channel_pairs(self) -> tuple[Tensor, Tensor]:
        """Channel indices (a, b) with a <= b of the unique products."""
        a, b = torch.triu_indices(self.product_channels, self.product_channels)
        return a, b

    def prefactors(self, like: Tensor) -> Tensor:
        """(features,) pi sqrt(8/(2l+1)), times sqrt(2) off the diagonal."""
        a, b = self.channel_pairs
        l = torch.arange(self.l_max + 1, dtype=torch.float64)
        double = torch.where(a == b, 1.0, 2.0).to(torch.float64).sqrt()
        return (torch.pi * double[:, None] * (8 / (2 * l + 1)).sqrt()[None]).flatten().to(like)

    def center_density(self, like: Tensor) -> Tensor:
        """(n_max,) density coefficients c_n00 of the central atom itself."""
        at_zero, _ = self.radial_integrals(like.new_zeros(1))
        return self.central_weight * at_zero[0, :, 0] / (4 * torch.pi) ** 0.5

    @cached_property
    def slot_table(self) -> Tensor:
        """(largest Z + 1,) index of each atomic number within self.species, -1 for others."""
        table = torch.full((max(self.species) + 1,), -1)
        table[list(self.species)] = torch.arange(len(self.species))
        return table

    def species_slots(self, species: Tensor) -> Tensor:
        """Index of each atomic number within self.species."""
        mine = torch.tensor(self.species, device=species.device)
        slot = torch.searchsorted(mine, species.contiguous()).clamp_max(len(self.species) - 1)
        if (mine[slot] != species).any():
            missing = sorted(set(species.tolist()) - set(self.species))
            raise errors.UserError(f"The descriptor was not made for species with atomic numbers {missing}.")
        return slot

    def _expand_l(self, per_l: Tensor) -> Tensor:
        """Repeat the last axis (l) to (l, m), as a product with zeros and ones: exact, and half the time of a gather."""
        return per_l @ self._repetition.to(per_l)

    @cached_property
    def _repetition(self) -> Tensor:
        """(l_max + 1, (l_max + 1)^2) one where l is the l of (l, m)."""
        return torch.block_diag(*(torch.ones(1, 2 * l + 1) for l in range(self.l_max + 1)))

    def degree_slices(self) -> list[slice]:
        """Of (l, m), by l."""
        return degree_slices(self.l_max)

    @property
    def constants(self) -> dict[str, Tensor]:
        """As in Descriptor."""
        return {} if self.compression is None else {"compression": self.compression.channels}

    def __call__(self, surroundings: Surroundings) -> Environments:
        """Environments of all surroundings."""
        return self.reference(surroundings)

    def reference(self, surroundings: Surroundings) -> Environments:
        """In plain PyTorch on any device, differentiable in the vectors: the reference for all backends."""
        made = self.expand(surroundings)

        def pull_back(cotangents: Tensor) -> Tensor:
            if cotangents.dim() == 3:
                return torch.stack([pull_back(one) for one in cotangents])
            return self.pull_back_density(made.pairs, self.on_density(made, cotangents))

        return Environments(surroundings, made.features, pull_back, lambda: self.jacobian(made))

    def expand(self, surroundings: Surroundings) -> Expansion:
        """Density and features in plain PyTorch."""
        pairs = PairTerms.from_surroundings(self, surroundings)
        density = self.density(surroundings, pairs)
        y = self.compress(density)
        spectrum = self.power_spectrum(y, self.channel_pairs, self.prefactors(y))
        # an atom alone and without central weight has features of zero, not NaN
        norm = spectrum.norm(dim=1, keepdim=True).clamp_min(torch.finfo(spectrum.dtype).tiny)
        return Expansion(pairs, density, y, spectrum / norm, norm)

    def compressed(self, channels: int, sample: Surroundings) -> Self:
        """The same with a density compressed to so many channels of each l, the principal ones of a sample of environments."""
        pairs = PairTerms.from_surroundings(self, sample)
        slopes = pairs.slope_moments(len(self.species))
        made = principal_channels(self.density(sample, pairs), slopes, channels)
        return replace(self, compression=Compression(made))

    def compress(self, density: Tensor) -> Tensor:
        """Of a density, what products are made of."""
        return density if self.compression is None else self.compression(density)

    def pull_back_compressed(self, on_y: Tensor) -> Tensor:
        """∂E/∂c from ∂E/∂y of what products are made of."""
        return on_y if self.compression is None else self.compression.pull_back(on_y)

    def density(self, surroundings: Surroundings, pairs: PairTerms | None = None) -> Tensor:
        """(environments, channels, (l_max+1)^2) expansion coefficients c_anlm = sum_{j of species a} w(r_j) I_nl(r_j) Y_lm(r_j)."""
        pairs = pairs or PairTerms.from_surroundings(self, surroundings)
        n_env, n_species = len(surroundings), len(self.species)
        products = self._expand_l(pairs.radial) * pairs.harmonics[:, None, :]
        density = products.new_zeros(n_env * n_species, self.n_max, (self.l_max + 1) ** 2)
        density = density.index_add(0, surroundings.centers * n_species + pairs.slots, products)
        rows = torch.arange(n_env, device=density.device) * n_species + self.species_slots(surroundings.species)
        center = density.new_zeros(1, *density.shape[1:])
        center[0, :, 0] = self.center_density(products)
        density = density.index_add(0, rows, center.expand(n_env, -1, -1))
        return density.reshape(n_env, self.channels, (self.l_max + 1) ** 2)

    def power_spectrum(self, density: Tensor, pairs: tuple[Tensor, Tensor], factors: Tensor) -> Tensor:
        """p_{an,bn',l} = pi sqrt(8 / (2l+1)) sum_m c_anlm c_bn'lm (environments, features), off the diagonal times sqrt(2), of a density c
        (environments, product_channels, (l_max + 1)²), compressed or not.

        Args:
            pairs, factors: `channel_pairs` and `prefactors` on the device of the density.
        """
        a, b = pairs
        products = [(density[:, :, m] @ density[:, :, m].mT)[:, a, b] for m in self.degree_slices()]
        return torch.stack(products, dim=-1).flatten(1) * factors

    def pull_back_spectrum(
        self, density: Tensor, on_spectrum: Tensor, pairs: tuple[Tensor, Tensor], factors: Tensor
    ) -> Tensor:
        """∂E/∂c (environments, channels, (l_max + 1)²) from ∂E/∂p (environments, features)."""
        a, b = pairs
        scaled = (on_spectrum * factors).unflatten(-1, (-1, self.l_max + 1))
        n_channels = density.shape[1]
        full = scaled.new_zeros(len(scaled), n_channels, n_channels, self.l_max + 1)
        full[:, a, b] = scaled
        full = full + full.transpose(1, 2)
        return torch.cat([full[..., l] @ density[:, :, m] for l, m in enumerate(self.degree_slices())], dim=-1)

    def on_density(self, made: Expansion, cotangents: Tensor) -> Tensor:
        """∂E/∂c (environments, channels, (l_max + 1)²) from ∂E/∂x (environments, features) of one cotangent."""
        x = made.features
        on_spectrum = (cotangents - x * (x * cotangents).sum(-1, keepdim=True)) / made.norm
        on_y = self.pull_back_spectrum(made.compressed, on_spectrum, self.channel_pairs, self.prefactors(on_spectrum))
        return self.pull_back_compressed(on_y)

    def pull_back_density(self, pairs: PairTerms, on_density: Tensor) -> Tensor:
        """Pair gradients (pairs, 3) from ∂E/∂c; nothing of size pairs x features."""
        # gather the block of the neighbour's species, then contract with d(R Y)/dr = R' Y r^ + R dY
        block = on_density.unflatten(1, (len(self.species), self.n_max))[pairs.centers, pairs.slots]
        radial_part = (block * self._expand_l(pairs.d_radial)).sum(1)
        angular_part = (block * self._expand_l(pairs.radial)).sum(1)
        along = (radial_part * pairs.harmonics).sum(1, keepdim=True) * pairs.directions
        return along + (pairs.d_harmonics @ angular_part[:, :, None])[:, :, 0]

    def jacobian(self, made: Expansion) -> Tensor:
        """d(features)/dr_ij. With A_bl = sum_m Y_lm c_blm and B_bl = sum_m dY_lm c_blm the derivative of the product (a, b) is
        [R'_a A_b + R'_b A_a] r^ + R_a B_b + R_b B_a, where R_a is zero unless a is of the neighbour's species; of a compressed density
        R_q is that of the neighbour's species on channel q."""
        pairs, density, features, norm = made.pairs, made.compressed, made.features, made.norm
        centers = pairs.centers
        at_center = density[centers]
        both = torch.cat([pairs.harmonics[:, None], pairs.d_harmonics], dim=1).transpose(1, 2)
        contracted = torch.stack([at_center[:, :, m] @ both[:, m] for m in self.degree_slices()], dim=-1)
        inner, gradient = contracted[:, :, 0], contracted[:, :, 1:].transpose(1, 2)
        # sum the radial slope into the gradient first: R' r^ A + R B, one product over channels and xyz
        value, slope = self._all_channels(pairs.radial, pairs.slots), self._all_channels(pairs.d_radial, pairs.slots)
        a, b = self.channel_pairs
        factors = self.prefactors(density).unflatten(0, (-1, self.l_max + 1))
        value_a, value_b = value[:, a] * factors, value[:, b] * factors
        radial_part = slope[:, a] * factors * inner[:, b] + slope[:, b] * factors * inner[:, a]
        out = pairs.directions[:, :, None, None] * radial_part[:, None]
        for x in range(3):
            out[:, x].addcmul_(value_a, gradient[:, x, b]).addcmul_(value_b, gradient[:, x, a])
        out = out.flatten(2)
        # x = p/|p|:  dx = (dp - x (x . dp)) / |p|
        unit = features[centers]
        shares = out @ unit[:, :, None]
        return out.addcmul_(shares, unit[:, None, :], value=-1).div_(norm[centers][:, :, None])

    def _all_channels(self, radial: Tensor, slots: Tensor) -> Tensor:
        """Radial functions of pairs (pairs, n_max, l_max + 1) as changes of all channels that products are made of."""
        if self.compression is not None:
            return self.compression.of_pairs(radial, slots)
        place = torch.arange(self.n_max, device=slots.device) + slots[:, None] * self.n_max
        full = radial.new_zeros(len(radial), self.channels, self.l_max + 1)
        return full.scatter_(1, place[:, :, None].expand_as(radial), radial)


@dataclass(frozen=True, eq=False)
class PairTerms:
    """Per pair: centre, species slot of the neighbour, unit direction, w I_nl and its slope, Y_lm and its gradient."""

    centers: Tensor
    slots: Tensor
    directions: Tensor
    radial: Tensor
    d_radial: Tensor
    harmonics: Tensor
    d_harmonics: Tensor

    def slope_moments(self, n_species: int) -> Tensor:
        """(l_max + 1, species, n_max, n_max) Σ of ∂(w I_nl Y_lm)/∂r · ∂(w I_n'l Y_lm)/∂r over m and neighbours of each species: what is
        along the pair, R'_n R'_n' Y², and across it, R_n R_n' |∇Y|²."""
        out = []
        for l, m in enumerate(degree_slices(self.radial.shape[2] - 1)):
            value, slope = self.radial[:, :, l], self.d_radial[:, :, l]
            across = self.d_harmonics[:, :, m].square().sum((1, 2)).sqrt()[:, None] * value
            along = self.harmonics[:, m].square().sum(1).sqrt()[:, None] * slope
            of_pairs = along[:, :, None] * along[:, None] + across[:, :, None] * across[:, None]
            out.append(of_pairs.new_zeros(n_species, *of_pairs.shape[1:]).index_add(0, self.slots, of_pairs))
        return torch.stack(out)

    @staticmethod
    def from_surroundings(descriptor: PowerSpectrum, surroundings: Surroundings) -> PairTerms:
        r = surroundings.vectors.norm(dim=1)
        value, slope = descriptor.radial_integrals(r)
        weight, d_weight = (w[:, None, None] for w in descriptor.weights(r))
        y, dy = harmonics_with_gradients(descriptor.l_max, surroundings.vectors)
        return PairTerms(
            surroundings.centers,
            descriptor.species_slots(surroundings.neighbor_species),
            surroundings.vectors / r[:, None],
            weight * value,
            weight * slope + d_weight * value,
            y,
            dy,
        )


@dataclass(frozen=True, eq=False)
class Expansion:
    """The density of some environments and the features that come of it.

    Attributes:
        density: (environments, channels, (l_max + 1)²) c.
        compressed: (environments, product_channels, (l_max + 1)²) what products are made of, c itself where nothing is compressed.
        features: (environments, features) p / |p|; norm: (environments, 1) |p|.
    """

    pairs: PairTerms
    density: Tensor
    compressed: Tensor
    features: Tensor
    norm: Tensor
