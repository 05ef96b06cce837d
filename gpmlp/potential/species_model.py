"""A potential for atoms of one species, from padded tables of their neighbours: energies, slopes, variances, novelties.

The same as `Potential` to rounding, as tensor operations of constant shape without host synchronisation, so that a GPU never waits.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpmlp.core import errors
from gpmlp.core.environments import Descriptor, SinglePrecisionDescriptor
from gpmlp.descriptors import backends, gpu
from gpmlp.descriptors.backends import SoapPowerSpectrum
from gpmlp.descriptors.gpu import DenseBackend
from gpmlp.gp.covariances import Block, local_rows
from gpmlp.gp.kernels import Profile, ZonalKernel
from gpmlp.gp.variance import VarianceModel
from gpmlp.potential.baselines import ZBL, IsolatedAtoms
from gpmlp.potential.force_samples import DeviationTerm
from gpmlp.potential.mean import CheaperMean, MeanBlock, ProjectedCentres
from gpmlp.potential.potential import Potential
from gpmlp.uncertainty.mahalanobis import SpeciesClusters


@dataclass(frozen=True, eq=False)
class LocalPrediction:
    """Prediction for n environments; None where it was not asked for.

    Attributes:
        energies: (n,) eV; slopes: (n, slots, width, 3) eV/A with respect to their pair vectors.
        inducing, data: (n,) eV², the two parts of the variance of the energies.
        novelty: (n,)
        sampled: (members, n, slots, width, 3) eV/A, slopes of what posterior samples add to the mean.
    """

    energies: Tensor
    slopes: Tensor
    inducing: Tensor | None = None
    data: Tensor | None = None
    novelty: Tensor | None = None
    sampled: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SpeciesTerm:
    """One term of a potential for one central species: the descriptor, and the mean as a function of its features.

    Attributes:
        backend: of the descriptor; single: whether it works in single precision.
        mean: None where the term holds nothing of the species.
        block: its inducing variables in the variances, None where these were not asked for or there are none.
        deviations: of posterior samples from the mean, None where these were not asked for.
    """

    backend: DenseBackend
    single: bool
    kernel: ZonalKernel
    mean: MeanBlock | CheaperMean | None
    block: Block | None
    deviations: DeviationTerm | None = None

    def features(self, vectors: Tensor, slots: Tensor) -> tuple[gpu.DenseExpansion, Tensor, Tensor]:
        """The expansion, features in double precision, and the norm that they were divided by."""
        expansion = self.backend.expand(vectors.float() if self.single else vectors, slots)
        spectrum = expansion.spectrum.to(vectors.dtype)
        norm = spectrum.norm(dim=1, keepdim=True).clamp_min(torch.finfo(expansion.spectrum.dtype).tiny)
        return expansion, spectrum / norm, norm

    def local_energies(self, x: Tensor) -> tuple[Tensor, Tensor, Profile | None]:
        """Energies, their slopes dε/dx, and the kernel with all centres where the mean needs it."""
        if self.mean is None:
            return x.new_zeros(len(x)), torch.zeros_like(x), None
        if not isinstance(self.mean, MeanBlock):
            return *self.mean(x), None
        profile = self.kernel.profile(x @ self.mean.features.T)
        return *self.mean.from_profile(x, profile), profile

    def pull_back(self, expansion: gpu.DenseExpansion, x: Tensor, norm: Tensor, slope: Tensor) -> Tensor:
        """∂ε/∂vectors; the component along the features, which may be large, is removed in double precision."""
        on_spectrum = (slope - x * (x * slope).sum(1, keepdim=True)) / norm
        return self.backend.pull_back(expansion, on_spectrum.to(expansion.spectrum.dtype)).to(slope.dtype)


@dataclass(frozen=True, eq=False)
class SpeciesZBL:
    """ZBL of one central species with each of the others: charges and radii by slot, (slots, 1)."""

    charge: Tensor
    charges: Tensor
    inner: Tensor
    outer: Tensor

    @staticmethod
    def from_baseline(zbl: ZBL, z: int, species: tuple[int, ...], like: Tensor) -> SpeciesZBL:
        """With species in the order of their slots."""
        pairs = [(min(z, other), max(z, other)) for other in species]
        # a pair that the baseline does not know feels nothing: its range is empty
        radii = ([table.get(pair, 0.0) for pair in pairs] for table in (zbl.inner, zbl.outer))
        columns = (like.new_tensor(list(map(float, column)))[:, None] for column in (species, *radii))
        return SpeciesZBL(like.new_tensor(float(z)), *columns)

    def __call__(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Half of the energy of each pair for its centre, and the slopes."""
        r = vectors.norm(dim=3)
        energy, slope = ZBL.of_pair(r, self.charge, self.charges, self.inner, self.outer)
        return 0.5 * energy.sum((1, 2)), (0.5 * slope / r)[..., None] * vectors


@dataclass(frozen=True, eq=False)
class SpeciesModel:
    """A potential restricted to one central species.

    Attributes:
        species: Z; slot: its place among the species of the potential.
        isolated: energy of the isolated atom, eV.
        variance: None where no variances were asked for.
        novelty: whether it was asked for; clusters, threshold: of the species, None where the training data hold none of it: its novelty
            is infinite then.
    """

    species: int
    slot: int
    terms: tuple[SpeciesTerm, ...]
    isolated: float
    repulsion: tuple[SpeciesZBL, ...]
    variance: VarianceModel | None
    novelty: bool
    clusters: SpeciesClusters | None
    threshold: float

    @staticmethod
    def from_potential(
        potential: Potential, z: int, variance: bool, novelty: bool, sampled: bool = False
    ) -> SpeciesModel:
        """On the potential's device."""
        like = torch.zeros(0, dtype=getattr(torch, potential.recipe.dtype), device=potential.recipe.device)
        model = potential.variance_model() if variance else None
        if model:
            model.prepare()
        terms = []
        for k, term in enumerate(potential.terms):
            descriptor, single = _soap_descriptor(term.descriptor)
            assert descriptor is not None, "check_supported"
            backend = backends.fastest_backend(descriptor, like.float() if single else like)
            mean = term.cheaper_means.get(z) or term.blocks.get(z)
            block = next((b for b in model.blocks[k] if z in b.central_species), None) if model else None
            # a kernel's parameters are on the host, from where each step would have to fetch them
            kernel = deepcopy(term.kernel).to(like.device)
            mean = replace(mean, kernel=kernel) if isinstance(mean, ProjectedCentres) else mean
            deviations = replace(potential.force_samples.terms[k], kernel=kernel) if sampled else None
            terms.append(SpeciesTerm(backend, single, kernel, mean, block, deviations))
        isolated = sum(b.energies.get(z, 0.0) for b in potential.baselines if isinstance(b, IsolatedAtoms))
        zbl = [
            SpeciesZBL.from_baseline(b, z, potential.species, like) for b in potential.baselines if isinstance(b, ZBL)
        ]
        distances = potential.novelty if novelty else None
        return SpeciesModel(
            z,
            potential.species.index(z),
            tuple(terms),
            float(isolated),
            tuple(zbl),
            model,
            novelty,
            distances.species.get(z) if distances else None,
            float(distances.thresholds.get(z, 1.0)) if distances else 1.0,
        )

    def __call__(self, vectors: Tensor) -> LocalPrediction:
        """Of vectors (n, slots, width, 3) from n atoms of the species to their neighbours, A."""
        slots = torch.full(vectors.shape[:1], self.slot, dtype=torch.long, device=vectors.device)
        energies, slopes = vectors.new_full(vectors.shape[:1], self.isolated), torch.zeros_like(vectors)
        rows, sampled, novelty = [], [], energies.new_full(energies.shape, math.inf) if self.novelty else None
        for k, term in enumerate(self.terms):
            expansion, x, norm = term.features(vectors, slots)
            energy, slope, profile = term.local_energies(x)
            energies, slopes = energies + energy, slopes + term.pull_back(expansion, x, norm, slope)
            if term.block is not None:
                rows.append(local_rows(term.kernel, term.block, self.species, x, profile))
            if term.deviations is not None:
                members = term.deviations.of_species(self.species, x)
                sampled.append(torch.stack([term.pull_back(expansion, x, norm, member) for member in members]))
            if k == 0 and self.clusters is not None:
                novelty = self.clusters.distance(x) / self.threshold
        for repulsion in self.repulsion:
            energy, slope = repulsion(vectors)
            energies, slopes = energies + energy, slopes + slope
        inducing, data = None, None
        if self.variance:
            inducing, data = self.variance.local_energy_variance(self.species, rows, energies)
        return LocalPrediction(
            energies, slopes, inducing, data, novelty, sum(sampled[1:], sampled[0]) if sampled else None
        )


def why_unsupported(potential: Potential) -> str | None:
    """Why a potential has no species models; None if it has."""
    if potential.charges is not None:
        return "its charges act on each other at any distance"
    for term in potential.terms:
        if _soap_descriptor(term.descriptor)[0] is None:
            return f"its descriptor {type(term.descriptor).__name__} is not gpmlp's own SOAP"
    for baseline in potential.baselines:
        if not isinstance(baseline, (IsolatedAtoms, ZBL)):
            return f"its baseline {type(baseline).__name__} has no form for tables of neighbours"
    return None


def check_supported(potential: Potential) -> None:
    """Raise a UserError if a potential has no species models."""
    why = why_unsupported(potential)
    if why:
        raise errors.UserError(f"This potential cannot be stepped on tables of neighbours: {why}; call it itself.")


def _soap_descriptor(descriptor: Descriptor) -> tuple[SoapPowerSpectrum | None, bool]:
    """The power spectrum, None if it is another descriptor, and whether it works in single precision."""
    single = isinstance(descriptor, SinglePrecisionDescriptor)
    inner = descriptor.descriptor if isinstance(descriptor, SinglePrecisionDescriptor) else descriptor
    return inner if isinstance(inner, SoapPowerSpectrum) else None, single
