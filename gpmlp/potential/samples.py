"""Posterior samples: whole potentials drawn from the posterior, with one evaluation of the descriptors for all of them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, overload

import torch
from torch import Tensor

from gpmlp.core import errors, neighbors, parallel
from gpmlp.core.quantities import Prediction
from gpmlp.core.structures import CHUNK_ATOMS, Structures, chunk_structures
from gpmlp.gp import inducing
from gpmlp.gp.covariances import Block, local_rows
from gpmlp.gp.variance import VarianceModel
from gpmlp.potential.baseline import Baseline
from gpmlp.potential.charges import ChargeModel
from gpmlp.potential.mean import EnergyTerm, MeanBlock
from gpmlp.uncertainty.calibration import Calibration

HOW = ("posterior", "label_noise")


class SampledPotential(Protocol):
    """What samples need of a Potential."""

    @property
    def terms(self) -> tuple[EnergyTerm, ...]: ...

    @property
    def baselines(self) -> tuple[Baseline, ...]: ...

    @property
    def calibration(self) -> Calibration: ...

    @property
    def charges(self) -> ChargeModel | None: ...

    def variance_model(self) -> VarianceModel: ...

    def check_species(self, structures: Structures) -> None: ...

    def to_own_device(self, structures: Structures) -> Structures: ...

    def as_sample(
        self, terms: tuple[EnergyTerm, ...], charges: ChargeModel | None, origin: dict[str, Any]
    ) -> SampledPotential: ...


@dataclass(frozen=True, eq=False)
class PosteriorSamples(Sequence):
    """k potentials that differ in their weights; an index gives one as a Potential (to save, to run dynamics with), a slice some.

    Attributes:
        mean: the potential they were drawn from.
        terms: its terms, whose blocks hold the weights of all samples (k, M).
        origin: how they were drawn; with their index, what the provenance of each says under 'sample'.
        indices: of these samples in the draw.
        charges: of each sample; empty where the potential has none.
    """

    mean: SampledPotential
    terms: tuple[EnergyTerm, ...]
    origin: dict[str, Any]
    indices: tuple[int, ...]
    charges: tuple[ChargeModel, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> SampledPotential: ...

    @overload
    def __getitem__(self, index: slice) -> PosteriorSamples: ...

    def __getitem__(self, index: int | slice) -> SampledPotential | PosteriorSamples:
        """One sample as a Potential, or some of them as PosteriorSamples."""
        if isinstance(index, slice) and not self.indices[index]:
            raise errors.UserError(f"A slice of samples must hold one or more of the {len(self)}; got {index}.")
        index = index if isinstance(index, slice) else range(len(self))[index]
        terms = tuple(
            replace(
                t, blocks={z: MeanBlock(b.features, b.weights[index], b.tangents[index]) for z, b in t.blocks.items()}
            )
            for t in self.terms
        )
        if isinstance(index, slice):
            return replace(self, terms=terms, indices=self.indices[index], charges=self.charges[index])
        charges = self.charges[index] if self.charges else None
        return self.mean.as_sample(terms, charges, self.origin | {"index": self.indices[index]})

    def __iter__(self) -> Iterator[SampledPotential]:
        return (self[i] for i in range(len(self)))

    def __call__(self, structures: Structures) -> Prediction:
        """Predictions of all samples, stacked: every field of the Prediction has a leading axis (samples).

        Neighbours, features and kernels are computed once; what differs is matrix products with the weights.
        """
        self.mean.check_species(structures)
        parts = []
        for chunk in chunk_structures(structures, CHUNK_ATOMS):
            moved = self.mean.to_own_device(chunk)
            shared = [baseline(moved).map(lambda v: v[None]) for baseline in self.mean.baselines]
            if self.charges:
                shared.append(_stacked([charges(moved.to(dtype=torch.float64)) for charges in self.charges]))
            parts.append(
                functools.reduce(operator.add, [*shared, *(_predict_term(term, moved) for term in self.terms)])
            )
        fields = [(p.energies, p.atom_energies, p.forces, p.stresses) for p in parts]
        energies, local, forces, stresses = (torch.cat(values, dim=1) for values in zip(*fields, strict=True))
        joined = Prediction(energies, local, forces, stresses)
        return joined.map(lambda v: v.to(structures.positions))


def draw_samples(
    potential: SampledPotential, k: int, seed: int, how: str = "posterior", calibrated: bool = True
) -> PosteriorSamples:
    """Draw k potentials around the mean.

    'posterior': weights of the inducing variables from their posterior, δβ = R⁻¹z, w = w̄ + L⁻ᵀ D δβ; where the variances are of a
    subset of the fit's columns, what this subset misses is drawn from the prior conditioned on it, at the other centres (Wilson
    et al., ICML 2020, eq. 9: a path is a prior path corrected at the inducing points). 'label_noise': the committee of fits to
    labels that scatter by their noise, δβ = S⁻¹(S − 1)^½ z; it knows nothing of what the data do not touch, and is narrower.

    Args:
        calibrated: whether deviations from the mean are scaled to the size of the errors of forces that the calibration has seen
            (Calibration.sample_scale): they are of what the data leave open alone, so that nothing is drawn of what a subset misses.

    Raises:
        UserError: k < 1, k or the seed no integer, an unknown `how`, or a model without variances.
    """
    errors.check_choice("way of sampling", how, HOW)
    k, seed = errors.check_integer("number of samples `k`", k, 1), errors.check_integer("`seed`", seed, 0)
    model = potential.variance_model()
    generator = torch.Generator().manual_seed(seed)
    scale, shifts = sample_spread(potential, how) if calibrated else (None, None)
    joint = model.factor if potential.charges is None else potential.charges.joint_factor(model.factor)
    moves = (1.0 if scale is None else scale) * _whitened_deviations(joint, k, generator, how)
    if shifts is not None:
        xi = torch.randn(len(shifts), k, generator=generator, dtype=torch.float64).to(shifts)
        moves += torch.linalg.solve_triangular(joint, shifts.T @ xi, upper=True)
    whitened, of_charges = moves.tensor_split([model.n_columns])
    deviations = model.signal[:, None] * whitened
    charges = () if potential.charges is None else potential.charges.moved(of_charges)
    start, i, terms = 0, 0, []
    for term, blocks in zip(potential.terms, model.blocks, strict=True):
        drawn: dict[int, MeanBlock] = {}
        for block in blocks:
            here = slice(start, start + block.n_columns)
            lower = model.lowers[i]
            start, i = here.stop, i + 1
            weights = torch.linalg.solve_triangular(lower.T, deviations[here], upper=True)
            means = {z: term.blocks[z] for z in block.central_species}
            others = {z: mean.features[len(block.centres(z)) :] for z, mean in means.items()}
            values: dict[int, Tensor] = {}
            if scale is None and how == "posterior" and any(map(len, others.values())):
                values, correction = _prior_residual_paths(term, block, lower, others, k, generator)
                std = model.amplitude**0.5 * model.signal[here.start]
                weights, values = weights + std * correction, {z: std * v for z, v in values.items()}
            drawn |= {z: _add_deviations(mean, block, z, weights, values.get(z)) for z, mean in means.items()}
        terms.append(EnergyTerm(term.descriptor, term.kernel, drawn))
    origin = {"how": how, "seed": seed, "of": k, "calibrated": scale is not None}
    return PosteriorSamples(potential, tuple(terms), origin, tuple(range(k)), charges)


def sample_spread(potential: SampledPotential, how: str = "posterior") -> tuple[float | None, Tensor | None]:
    """Factor on the posterior in calibrated samples, and the shifts of left-out structures that come on top (VarianceModel.shifts); None
    where nothing was learned, or there are none."""
    calibration, shifts = potential.calibration, potential.variance_model().shifts
    if how != "posterior" or shifts is None or calibration.posterior_scale is None:
        return calibration.sample_scale, None
    return calibration.posterior_scale, shifts


def draw_deviations(potential: SampledPotential, k: int, seed: int) -> list[dict[int, MeanBlock]]:
    """What k posterior samples add to the mean, as the data leave it: for each term and species, at the inducing variables.

    By one thread and from factors laid out in one way, so that a model that was saved and loaded has the same to the last bit.
    """
    model = potential.variance_model()
    model = replace(model, factor=model.factor.contiguous())
    generator = torch.Generator().manual_seed(seed)
    with parallel.one_core():
        drawn = model.signal[:, None] * _whitened_deviations(model.factor, k, generator, "posterior")
        return _deviation_blocks(model, drawn)


def _deviation_blocks(model: VarianceModel, drawn: Tensor) -> list[dict[int, MeanBlock]]:
    """Blocks of weights from (columns, k) draws of D (β - β̄)."""
    pieces, lowers = iter(drawn.split([len(lower) for lower in model.lowers])), iter(model.lowers)
    out = []
    for blocks in model.blocks:
        mine = {}
        for block in blocks:
            weights = torch.linalg.solve_triangular(next(lowers).contiguous().T, next(pieces), upper=True)
            for z in block.central_species:
                centres = block.centres(z).to(weights)
                nothing = MeanBlock(centres, weights.new_zeros(len(centres)), weights.new_zeros(0, centres.shape[1]))
                mine[z] = _add_deviations(nothing, block, z, weights, None)
        out.append(mine)
    return out


def _stacked(parts: Sequence[Prediction]) -> Prediction:
    """Predictions of samples with a leading axis (samples)."""
    fields = zip(*((p.energies, p.atom_energies, p.forces, p.stresses) for p in parts), strict=True)
    energies, local, forces, stresses = map(torch.stack, fields)
    return Prediction(energies, local, forces, stresses)


def _whitened_deviations(factor: Tensor, k: int, generator: torch.Generator, how: str) -> Tensor:
    """(columns, k) draws of β - β̄, from R (columns, columns)."""
    z = torch.randn(len(factor), k, generator=generator, dtype=torch.float64).to(factor)
    if how == "posterior":
        return torch.linalg.solve_triangular(factor, z, upper=True)
    values, vectors = torch.linalg.eigh(factor.T @ factor)
    return vectors @ ((values - 1).clamp_min(0).sqrt() / values)[:, None].mul(z)


def _prior_residual_paths(
    term: EnergyTerm, block: Block, lower: Tensor, others: dict[int, Tensor], k: int, generator: torch.Generator
) -> tuple[dict[int, Tensor], Tensor]:
    """Prior paths conditioned on zero at the block's variables: weights at other centres (n, k) by species and their correction (columns,
    k), unit signal variance.

    With S = K_ww - K_wu K_uu⁻¹ K_uw = C Cᵀ: h(x) = (k_xw - k_xu K_uu⁻¹ K_uw) C⁻ᵀ ξ has the covariance of the prior residual at w.
    """
    block, kernel = block.to(lower), term.kernel
    centres = {z: x.to(lower) for z, x in others.items()}
    scale = torch.cat([x.new_full((len(x),), block.relative[z]) for z, x in centres.items()])
    prior = torch.block_diag(*(kernel.value(x @ x.T) for x in centres.values())) * scale * scale[:, None]
    rows = torch.cat([local_rows(kernel, block, z, x) for z, x in centres.items()])
    cross = torch.linalg.solve_triangular(lower, rows.T, upper=False)
    values, vectors = torch.linalg.eigh(prior - cross.T @ cross)
    usable = values > inducing.RANK_TOLERANCE * float(scale.max()) ** 2
    xi = torch.randn(int(usable.sum()), k, generator=generator, dtype=torch.float64).to(lower)
    weights = (vectors[:, usable] * values[usable].rsqrt()) @ xi
    correction = -torch.linalg.solve_triangular(lower.T, cross @ weights, upper=True)
    weights = weights * scale[:, None].square()  # k_xw = ρ² f(x.x_w)
    return dict(zip(centres, weights.split([len(x) for x in centres.values()]), strict=True)), correction


def _add_deviations(mean: MeanBlock, block: Block, z: int, weights: Tensor, others: Tensor | None) -> MeanBlock:
    """The mean plus k deviations: (columns, k) of the block's inducing variables, (others, k) of the values at the other centres."""
    k, m = weights.shape[1], len(block.centres(z))
    more, directions = block.collapse(weights.to(mean.weights).T, z)
    alpha = mean.weights.repeat(k, 1)
    alpha[:, :m] += more
    if others is not None:
        alpha[:, m:] += others.to(alpha).T
    if not len(mean.tangents) and not directions.shape[-2]:
        return MeanBlock(mean.features, alpha, mean.tangents.expand(k, -1, -1))
    tau = (mean.tangents if len(mean.tangents) else torch.zeros_like(mean.features)).repeat(k, 1, 1)
    tau[:, : directions.shape[-2]] += directions
    return MeanBlock(mean.features, alpha, tau)


def _predict_term(term: EnergyTerm, structures: Structures) -> Prediction:
    """One term of all samples, with a leading axis (samples)."""
    view = term.environments(structures)
    local, cotangents = term.local_energies(view.environments)
    gradients = view.environments.pull_back(cotangents.movedim(1, 0))
    vectors = view.surroundings.vectors
    # the scatters carry trailing axes along: samples go last and come back first
    last = gradients.movedim(0, -1)
    forces = neighbors.scatter_forces(view.neighbors, structures.n_atoms, last).movedim(-1, 0)
    stresses = neighbors.scatter_virials(structures, view.neighbors, vectors, last).movedim(-1, 0)
    energies = local.new_zeros(len(structures), local.shape[1]).index_add(0, structures.structure_of_atom, local)
    return Prediction(energies.T, local.T, forces, stresses / structures.volumes[:, None, None])
