"""Four-body invariants beside the SOAP power spectrum: products of three principal channels of the density, coupled to a scalar.

Their channels and lengths are learned from training environments, and are constants from then on (docs/decisions/020).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import combinations_with_replacement, permutations, product

import numpy as np
import torch
from torch import Tensor

from gpmlp.core.environments import Environments, Surroundings
from gpmlp.core.errors import UserError
from gpmlp.core.stored_tensors import StoredTensors
from gpmlp.descriptors.compression import check_orthonormal, leading_eigenvectors
from gpmlp.descriptors.soap import Expansion, PowerSpectrum
from gpmlp.descriptors.spherical_harmonics import degree_slices, harmonics_with_gradients

ROUNDING = 1e-15  # of the cube of the density: invariants below are zero but for rounding


@dataclass(frozen=True, eq=False)
class Coupling:
    """Three degrees l1 <= l2 <= l3, which meet the triangle rule and have an even sum: invariant under reflections too.

    Attributes:
        degrees: l1, l2, l3.
        tensor: (2 l1 + 1, 2 l2 + 1, 2 l3 + 1) G, integrals of products of three real harmonics.
        channels: (invariants,) place of (q1, q2, q3) among all Q³, of those that symmetry leaves distinct.
        factors: (invariants,) √ of how many places are equal by symmetry, so that dot products are those of all.
    """

    degrees: tuple[int, int, int]
    tensor: Tensor
    channels: Tensor
    factors: Tensor


@lru_cache(maxsize=32)
def couplings(l_max: int, n_channels: int) -> tuple[Coupling, ...]:
    """Of all degrees 1 <= l1 <= l2 <= l3 <= l_max."""
    integrals, m, out = _gaunt_integrals(l_max), degree_slices(l_max), []
    for l1, l2, l3 in combinations_with_replacement(range(1, l_max + 1), 3):
        if l3 > l1 + l2 or (l1 + l2 + l3) % 2:
            continue
        degrees, places = (l1, l2, l3), {}
        for q in product(range(n_channels), repeat=3):
            # channels of equal degrees may change places
            same = {tuple(q[k] for k in p) for p in permutations(range(3)) if [degrees[k] for k in p] == list(degrees)}
            if q == min(same):
                places[(q[0] * n_channels + q[1]) * n_channels + q[2]] = len(same) ** 0.5
        channels, factors = torch.tensor(list(places)), torch.tensor(list(places.values()), dtype=torch.float64)
        out.append(Coupling(degrees, integrals[m[l1]][:, m[l2]][:, :, m[l3]].clone(), channels, factors))
    return tuple(out)


def _gaunt_integrals(l_max: int) -> Tensor:
    """∫ Y_a Y_b Y_c over the sphere ((l_max + 1)², thrice), by quadrature that is exact for these degrees."""
    n = 3 * l_max // 2 + 1
    z, weights = np.polynomial.legendre.leggauss(n)
    phi = np.arange(3 * l_max + 1) * 2 * np.pi / (3 * l_max + 1)
    z, phi = (part.ravel() for part in np.meshgrid(z, phi, indexing="ij"))
    r = np.sqrt(1 - z**2)
    y, _ = harmonics_with_gradients(l_max, torch.from_numpy(np.stack([r * np.cos(phi), r * np.sin(phi), z], axis=1)))
    weight = torch.from_numpy(np.repeat(weights, 3 * l_max + 1)) * 2 * torch.pi / (3 * l_max + 1)
    integrals = torch.einsum("p,pa,pb,pc->abc", weight, y, y, y)
    return torch.where(integrals.abs() < 1e-12, 0.0, integrals)


@dataclass(frozen=True, eq=False)
class FourBodyInvariants:
    """v = w b / <|b|> of b_{l1 l2 l3, q1 q2 q3} = Σ_m G^{l1 l2 l3}_{m1 m2 m3} y_q1l1m1 y_q2l2m2 y_q3l3m3, y_qlm = Σ_k P⁽ˡ⁾_kq c_klm.

    The bispectrum of Bartok, Kondor, Csanyi, PRB 87, 184115 (2013), of several channels; Drautz, PRB 99, 014104 (2019). What it tells
    apart that the power spectrum does not: Pozdnyakov et al., PRL 125, 166001 (2020).

    Attributes:
        channels: (l_max, channels of the density, Q) P of l = 1, ..., l_max, orthonormal columns.
        lengths: (species,) <|b|> of each central species.
        weight: w.
    """

    channels: Tensor
    lengths: Tensor
    weight: float

    @staticmethod
    def from_stored(stored: StoredTensors, spectrum: PowerSpectrum, parameters: dict) -> FourBodyInvariants:
        """Those of a model file; UserError if the tensors do not fit each other, the power spectrum and the recipe."""
        l_max, q, n_species = parameters["l_max"], parameters["channels"], len(spectrum.species)
        channels = stored.take("channels", (l_max, spectrum.channels, q))
        lengths = stored.take("lengths", (n_species,))
        check_orthonormal("four-body invariants", channels)
        if not bool((lengths > 0).all()):
            raise UserError("a length of four-body invariants is not positive.")
        return FourBodyInvariants(channels, lengths, parameters["weight"])

    @property
    def l_max(self) -> int:
        return self.channels.shape[0]

    @property
    def n_features(self) -> int:
        return sum(len(c.channels) for c in self.couplings)

    @cached_property
    def couplings(self) -> tuple[Coupling, ...]:
        return couplings(self.l_max, self.channels.shape[2])

    @cached_property
    def scales(self) -> Tensor:
        """(species,) w / <|b|>."""
        return self.weight / self.lengths

    def channel_densities(self, density: Tensor) -> list[Tensor]:
        """y (environments, 2 l + 1, Q) by l, the first of l = 0 empty, of densities (environments, channels, lm)."""
        of_l = degree_slices(self.l_max)[1:]
        y = [density[:, :, m].mT @ p for m, p in zip(of_l, self.channels.to(density), strict=True)]
        return [density.new_zeros(len(density), 1, 0), *y]

    def invariants(self, y: Sequence[Tensor]) -> Tensor:
        """b = Σ_m G y y y (environments, invariants), those that symmetry leaves distinct, times √ of how many are equal."""
        parts = []
        for c in self.couplings:
            a, b, d = (y[l] for l in c.degrees)
            every = torch.einsum("uvw,nuq,nvr,nws->nqrs", c.tensor.to(a), a, b, d).flatten(1)
            parts.append(every[:, c.channels.to(a.device)] * c.factors.to(a))
        return torch.cat(parts, dim=1)

    def slopes(self, y: Sequence[Tensor], centers: Tensor, on_y: Tensor) -> Tensor:
        """∂b/∂r_ij (pairs, 3, invariants) from ∂y/∂r_ij (pairs, 3, lm, Q) of pairs with these centres."""
        m, parts = degree_slices(self.l_max), []
        for c in self.couplings:
            (a, b, d), (da, db, dd) = (
                [part(l) for l in c.degrees] for part in (y.__getitem__, lambda l: on_y[:, :, m[l]])
            )
            g = c.tensor.to(a)
            every = torch.einsum("pxuq,purs->pxqrs", da, torch.einsum("uvw,nvr,nws->nurs", g, b, d)[centers])
            every += torch.einsum("pxvr,pvqs->pxqrs", db, torch.einsum("uvw,nuq,nws->nvqs", g, a, d)[centers])
            every += torch.einsum("pxws,pwqr->pxqrs", dd, torch.einsum("uvw,nuq,nvr->nwqr", g, a, b)[centers])
            parts.append(every.flatten(2)[:, :, c.channels.to(a.device)] * c.factors.to(a))
        return torch.cat(parts, dim=2)

    def pull_back(self, y: Sequence[Tensor], on_invariants: Tensor) -> Tensor:
        """∂E/∂y (environments, lm, Q), zero for l = 0, from ∂E/∂b (environments, invariants)."""
        q = self.channels.shape[2]
        out = [y[-1].new_zeros(len(y[-1]), 2 * l + 1, q) for l in range(self.l_max + 1)]
        start = 0
        for c in self.couplings:
            (a, b, d), g = (y[l] for l in c.degrees), c.tensor.to(y[-1])
            here = on_invariants[:, start : start + len(c.channels)] * c.factors.to(y[-1])
            on = here.new_zeros(len(here), q**3).index_copy(1, c.channels.to(here.device), here).unflatten(1, (q, q, q))
            out[c.degrees[0]] = out[c.degrees[0]] + torch.einsum("uvw,nqrs,nvr,nws->nuq", g, on, b, d)
            out[c.degrees[1]] = out[c.degrees[1]] + torch.einsum("uvw,nqrs,nuq,nws->nvr", g, on, a, d)
            out[c.degrees[2]] = out[c.degrees[2]] + torch.einsum("uvw,nqrs,nuq,nvr->nws", g, on, a, b)
            start += len(c.channels)
        return torch.cat(out, dim=1)

    def channel_slopes(self, made: Expansion) -> Tensor:
        """∂y/∂r_ij (pairs, 3, lm, Q), zero for l = 0."""
        pairs, n_max = made.pairs, made.pairs.radial.shape[1]
        by_species = self.channels.to(made.density).unflatten(1, (-1, n_max))  # (l_max, species, n_max, Q)
        of_pair = by_species[:, pairs.slots].movedim(0, 3)  # (pairs, n_max, Q, l_max)
        l = torch.tensor([l for l in range(1, self.l_max + 1) for _ in range(2 * l + 1)], device=pairs.slots.device)
        m = slice(1, (self.l_max + 1) ** 2)
        value, slope = (
            torch.einsum("pnl,pnql->plq", part[:, :, 1 : self.l_max + 1], of_pair)[:, l - 1]
            for part in (pairs.radial, pairs.d_radial)
        )
        along = (slope * pairs.harmonics[:, m, None])[:, None] * pairs.directions[:, :, None, None]
        slopes = along + value[:, None] * pairs.d_harmonics[:, :, m, None]
        return torch.cat([slopes.new_zeros(*slopes.shape[:2], 1, slopes.shape[3]), slopes], dim=2)


@dataclass(frozen=True, eq=False)
class FourBodySpectrum:
    """Features [p/|p|, v] / their length: the SOAP power spectrum with four-body invariants beside it."""

    spectrum: PowerSpectrum
    four_body: FourBodyInvariants

    @property
    def cutoff(self) -> float:
        """A."""
        return self.spectrum.cutoff

    @property
    def n_features(self) -> int:
        return self.spectrum.n_features + self.four_body.n_features

    @property
    def constants(self) -> dict[str, Tensor]:
        """As in Descriptor."""
        made = self.four_body
        return self.spectrum.constants | {"channels": made.channels, "lengths": made.lengths}

    def __call__(self, surroundings: Surroundings) -> Environments:
        """Environments of all surroundings."""
        return self.reference(surroundings)

    def reference(self, surroundings: Surroundings) -> Environments:
        """In plain PyTorch on any device, differentiable in the vectors."""
        made = self.spectrum.expand(surroundings)
        y = self.four_body.channel_densities(made.density)
        scale = self.four_body.scales.to(made.density)[self.spectrum.species_slots(surroundings.species)][:, None]
        both = torch.cat([made.features, scale * self.four_body.invariants(y)], dim=1)
        norm = both.norm(dim=1, keepdim=True).clamp_min(torch.finfo(both.dtype).tiny)
        features = both / norm

        def pull_back(cotangents: Tensor) -> Tensor:
            if cotangents.dim() == 3:
                return torch.stack([pull_back(one) for one in cotangents])
            on_both = (cotangents - features * (features * cotangents).sum(1, keepdim=True)) / norm
            on_p, on_v = on_both.split([self.spectrum.n_features, self.four_body.n_features], dim=1)
            on_density = self.spectrum.on_density(made, on_p)
            on_y = self.four_body.pull_back(y, scale * on_v)
            for l, m in enumerate(degree_slices(self.four_body.l_max)[1:]):
                on_density[:, :, m] += (on_y[:, m] @ self.four_body.channels[l].to(on_y).mT).mT
            return self.spectrum.pull_back_density(made.pairs, on_density)

        def jacobian() -> Tensor:
            centers = made.pairs.centers
            on_b = self.four_body.slopes(y, centers, self.four_body.channel_slopes(made))
            on_v = scale[centers][:, :, None] * on_b
            out = torch.cat([self.spectrum.jacobian(made), on_v], dim=2)
            x = features[centers]
            return out.addcmul_(out @ x[:, :, None], x[:, None, :], value=-1).div_(norm[centers][:, :, None])

        return Environments(surroundings, features, pull_back, jacobian)


def learn_four_body(spectrum: PowerSpectrum, parameters: dict, sample: Surroundings) -> FourBodyInvariants:
    """With constants from a sample of environments of all species; `parameters`: the resolved section `four_body` of a recipe.

    Channels are principal components of the density, by l.
    """
    n_channels, l_max = parameters["channels"], parameters["l_max"]
    density, slots = spectrum.density(sample), spectrum.species_slots(sample.species)
    of_l = [density[:, :, m] for m in degree_slices(l_max)[1:]]
    channels = torch.stack([leading_eigenvectors(torch.einsum("nkm,njm->kj", c, c), n_channels) for c in of_l])
    ones = channels.new_ones(len(spectrum.species))
    made = FourBodyInvariants(channels, ones, parameters["weight"])
    norms = made.invariants(made.channel_densities(density)).norm(dim=1)
    norms = torch.where(norms > ROUNDING * density.flatten(1).norm(dim=1) ** 3, norms, 0.0)
    lengths = torch.zeros_like(ones).index_add(0, slots, norms) / slots.bincount(minlength=len(ones)).clamp_min(1)
    # all are zero without neighbours, and in some crystals by symmetry
    return replace(made, lengths=torch.where(lengths > 0, lengths, 1.0))
