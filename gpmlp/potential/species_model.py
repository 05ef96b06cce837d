"""Centre is what a potential says of atoms of one species from tables of their neighbours: energies, slopes, variances, novelties.

The same as `Potential` to rounding, as one run of tensor operations whose shapes are known beforehand: nothing is asked of the host, so
that a GPU never waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpmlp.core import errors
from gpmlp.core.environments import Descriptor, SinglePrecisionDescriptor
from gpmlp.descriptors import backends, gpu
from gpmlp.descriptors.backends import SoapPowerSpectrum
from gpmlp.descriptors.gpu import DenseBackend
from gpmlp.gp.covariances import local_rows
from gpmlp.gp.inducing import InducingBlock
from gpmlp.gp.kernels import Profile, ZonalKernel
from gpmlp.gp.local_variance import LocalVariance
from gpmlp.gp.variance import VarianceModel
from gpmlp.potential.baselines import ZBL, IsolatedAtoms
from gpmlp.potential.mean import MeanBlock, QuadraticForm
from gpmlp.potential.potential import Potential
from gpmlp.uncertainty.mahalanobis import SpeciesClusters


@dataclass(frozen=True, eq=False)
class LocalPrediction:
    """Of some environments: energies (n,) eV, slopes (n, slots, width, 3) eV/A with respect to their pair vectors; the two parts of the
    variance of energies (n,) eV² and novelties (n,), None where they were not asked for."""

    energies: Tensor
    slopes: Tensor
    inducing: Tensor | None = None
    data: Tensor | None = None
    novelty: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SpeciesTerm:
    """One term of a potential, for one central species: how features are made, and the mean as a function of them.

    Attributes:
        mean: None where there is nothing to add up.
        block: its inducing variables in the variances, None where these were not asked for or there are none.
    """

    form: DenseBackend
    single: bool
    kernel: ZonalKernel
    mean: MeanBlock | QuadraticForm | None
    block: InducingBlock | None

    def features(self, vectors: Tensor, own: Tensor) -> tuple[gpu.DenseExpansion, Tensor, Tensor]:
        """What was expanded, features in double precision, and the norm that they were divided by."""
        made = self.form.expand(vectors.float() if self.single else vectors, own)
        spectrum = made.spectrum.to(vectors.dtype)
        norm = spectrum.norm(dim=1, keepdim=True).clamp_min(torch.finfo(made.spectrum.dtype).tiny)
        return made, spectrum / norm, norm

    def local_energies(self, x: Tensor) -> tuple[Tensor, Tensor, Profile | None]:
        """Energies, their slopes dε/dx, and the kernel with all centres where there is one to make."""
        if self.mean is None:
            return x.new_zeros(len(x)), torch.zeros_like(x), None
        if isinstance(self.mean, QuadraticForm):
            return *self.mean(x), None
        profile = self.kernel.profile(x @ self.mean.features.T)
        return *self.mean.from_profile(x, profile), profile

    def pull_back(self, made: gpu.DenseExpansion, x: Tensor, norm: Tensor, slope: Tensor) -> Tensor:
        """∂ε/∂vectors; what points along the features is taken off in double precision, where it may be large."""
        on_spectrum = (slope - x * (x * slope).sum(1, keepdim=True)) / norm
        return self.form.pull_back(made, on_spectrum.to(made.spectrum.dtype)).to(slope.dtype)


@dataclass(frozen=True, eq=False)
class SpeciesVariance:
    """Variances of local energies of one central species.

    Attributes:
        prior: δ² of all terms, eV²; amplitude: w of the VarianceModel.
        local: None where the species has no inducing variables.
    """

    prior: float
    amplitude: float
    local: LocalVariance | None

    @staticmethod
    def from_model(model: VarianceModel, z: int) -> SpeciesVariance:
        return SpeciesVariance(
            sum(p.signal.get(z, 0.0) ** 2 for p in model.priors), model.amplitude, model.local.get(z)
        )

    def __call__(self, pieces: Sequence[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
        """What the inducing set cannot represent, and what the data have not fixed; of covariances as LocalVariance takes them."""
        if self.local is None:
            return torch.full_like(like, self.amplitude * self.prior), torch.zeros_like(like)
        explained, left = self.local(pieces)
        return self.amplitude * (self.prior - explained).clamp_min(0), left


@dataclass(frozen=True, eq=False)
class SpeciesZBL:
    """ZBL of one central species with each of the others: charges and radii by slot, (slots, 1)."""

    own: Tensor
    others: Tensor
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
        energy, slope = ZBL.of_pair(r, self.own, self.others, self.inner, self.outer)
        return 0.5 * energy.sum((1, 2)), (0.5 * slope / r)[..., None] * vectors


@dataclass(frozen=True, eq=False)
class SpeciesModel:
    """A potential seen from one central species.

    Attributes:
        slot: of the species among those of the potential.
        alone: energy of the isolated atom, eV.
        spread: None where no variances were asked for.
        novelty: whether it was asked for; clusters, threshold: of the species, None where none of it was seen: it is infinite then.
    """

    slot: int
    parts: tuple[SpeciesTerm, ...]
    alone: float
    repulsion: tuple[SpeciesZBL, ...]
    spread: SpeciesVariance | None
    novelty: bool
    clusters: SpeciesClusters | None
    threshold: float

    @staticmethod
    def from_potential(potential: Potential, z: int, variance: bool, novelty: bool) -> SpeciesModel:
        """On the potential's device."""
        like = torch.zeros(0, dtype=getattr(torch, potential.recipe.dtype), device=potential.recipe.device)
        blocks = potential.variances.blocks if variance else [()] * len(potential.terms)
        parts = []
        for term, mine in zip(potential.terms, blocks, strict=True):
            made, single = _plain(term.descriptor)
            by = backends.fastest_backend(made, like.float() if single else like)
            mean = term.quadratic_forms.get(z) or term.blocks.get(z)
            block = next((b for b in mine if b.species == z), None)
            # its numbers were left on the host, from where a step would have to fetch them
            parts.append(SpeciesTerm(by, single, deepcopy(term.kernel).to(like.device), mean, block))
        alone = sum(b.energies.get(z, 0.0) for b in potential.baselines if isinstance(b, IsolatedAtoms))
        zbl = [
            SpeciesZBL.from_baseline(b, z, potential.species, like) for b in potential.baselines if isinstance(b, ZBL)
        ]
        clusters = potential.novelty.species.get(z) if novelty else None
        threshold = potential.novelty.thresholds.get(z, 1.0) if novelty else 1.0
        spread = SpeciesVariance.from_model(potential.variances, z) if variance else None
        slot, seen = potential.species.index(z), (novelty, clusters, float(threshold))
        return SpeciesModel(slot, tuple(parts), float(alone), tuple(zbl), spread, *seen)

    def __call__(self, vectors: Tensor) -> LocalPrediction:
        """Of vectors (n, slots, width, 3) from n atoms of the species to their neighbours, A."""
        own = torch.full(vectors.shape[:1], self.slot, dtype=torch.long, device=vectors.device)
        energies, slopes = vectors.new_full(vectors.shape[:1], self.alone), torch.zeros_like(vectors)
        rows, novelty = [], energies.new_full(energies.shape, math.inf) if self.novelty else None
        for k, part in enumerate(self.parts):
            made, x, norm = part.features(vectors, own)
            energy, slope, profile = part.local_energies(x)
            energies, slopes = energies + energy, slopes + part.pull_back(made, x, norm, slope)
            if part.block is not None:
                rows.append(local_rows(part.kernel, part.block, x, profile))
            if k == 0 and self.clusters is not None:
                novelty = self.clusters.distance(x) / self.threshold
        for repulsion in self.repulsion:
            energy, slope = repulsion(vectors)
            energies, slopes = energies + energy, slopes + slope
        found = LocalPrediction(energies, slopes, novelty=novelty)
        if self.spread is None:
            return found
        inducing, data = self.spread(rows, energies)
        return replace(found, inducing=inducing, data=data)


def why_unsupported(potential: Potential) -> str | None:
    """Why a potential cannot be seen this way; None if it can."""
    for term in potential.terms:
        if _plain(term.descriptor)[0] is None:
            return f"its descriptor {type(term.descriptor).__name__} is not gpmlp's own SOAP"
    for baseline in potential.baselines:
        if not isinstance(baseline, (IsolatedAtoms, ZBL)):
            return f"its baseline {type(baseline).__name__} has no form for tables of neighbours"
    return None


def check_supported(potential: Potential) -> None:
    """Raise a UserError if a potential cannot be seen this way."""
    why = why_unsupported(potential)
    if why:
        raise errors.UserError(f"This potential cannot be stepped on tables of neighbours: {why}; call it itself.")


def _plain(descriptor: Descriptor) -> tuple[SoapPowerSpectrum | None, bool]:
    """The power spectrum, if it is one, and whether it works in single precision."""
    inner = descriptor.descriptor if isinstance(descriptor, SinglePrecisionDescriptor) else descriptor
    return inner if isinstance(inner, SoapPowerSpectrum) else None, isinstance(descriptor, SinglePrecisionDescriptor)
