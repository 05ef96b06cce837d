"""A potential in the compiled core: energies, forces and stresses of all terms and baselines, variances of local energies and novelties in
one call (gpmlp/native/src/model.hpp)."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from gpmlp.core import neighbors, parallel, units
from gpmlp.core.environments import Descriptor, SinglePrecisionDescriptor
from gpmlp.core.neighbors import Neighbors
from gpmlp.core.quantities import Prediction, Variance
from gpmlp.core.structures import Structures
from gpmlp.descriptors.backends import FourBodySoap, SoapPowerSpectrum
from gpmlp.descriptors.cpu import build_spectrum
from gpmlp.gp.inducing import InducingBlock
from gpmlp.gp.kernels import ExponentialKernel, PolynomialKernel, SumKernel, ZonalKernel
from gpmlp.gp.local_variance import leading_first
from gpmlp.gp.stored_factors import pack_triangle
from gpmlp.gp.variance import VarianceModel
from gpmlp.native import library
from gpmlp.potential.baseline import Baseline
from gpmlp.potential.baselines import ZBL, IsolatedAtoms
from gpmlp.potential.dispersion import R6Tail
from gpmlp.potential.local_errors import LocalErrors
from gpmlp.potential.mean import CheaperMean, EnergyTerm, LowRankForm, MeanBlock, ProjectedCentres, QuadraticForm
from gpmlp.recipe import R6_OFF
from gpmlp.uncertainty.calibration import Calibration
from gpmlp.uncertainty.mahalanobis import Mahalanobis


@dataclass(eq=False)
class CompiledMean:
    """The mean of a potential as the core holds it, and what it was told of errors.

    Attributes:
        species: atomic numbers of the potential.
        variances, distances: what the core has of these, None before they were asked for the first time.
    """

    model: library.Handle
    species: Sequence[int]
    variances: VarianceModel | None = None
    distances: Mahalanobis | None = None
    _telling: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def predict(
        self, structures: Structures, pairs: Neighbors, errors: LocalErrors, atom_virials: bool = False
    ) -> Prediction:
        """Energies, forces and stresses, and what is known of the errors of local energies.

        Args:
            pairs: all within the largest cutoff, and perhaps more.
        """
        self.hold(errors.variances, errors.distances)
        like, n, n_atoms = structures.positions, len(structures), structures.n_atoms
        shapes = (n,), (n_atoms,), (n_atoms, 3), (n, 3, 3)
        energies, local, forces, stresses = (like.new_empty(shape) for shape in shapes)
        vectors = pairs.vectors(structures)
        gradients = torch.empty_like(vectors) if atom_virials else None
        parts = None if errors.variances is None else like.new_empty(n_atoms, 2)
        novelty = None if errors.distances is None else like.new_empty(n_atoms)
        by_atom, by_pair = (
            (structures.structure_of_atom, structures.species),
            (pairs.centers, pairs.neighbors, pairs.species(structures), vectors),
        )
        given = (part.contiguous() for part in (*by_atom, *by_pair, structures.volumes))
        asked = (0 if part is None else part for part in (gradients, parts, None, novelty))
        library.call(
            "predict", self.model, n, n_atoms, len(pairs), *given, energies, local, forces, stresses, *asked,
            parallel.available_threads(),
        )  # fmt: skip
        variance = None
        if parts is not None and errors.variances is not None:
            none = torch.zeros_like(local)
            variance = Variance(errors.variances.inducing_share(errors.form) * parts[:, 0], parts[:, 1], none, none)
        virials = None if gradients is None else neighbors.scatter_atom_virials(n_atoms, pairs, vectors, gradients)
        return Prediction(
            energies, local, forces, stresses, atom_energies_variance=variance, novelty=novelty, atom_virials=virials
        )

    def follow(self, structures: Structures, pairs: Neighbors, moves: tuple[Tensor, Tensor, Tensor]) -> MovingAtoms:
        """The mean of these atoms as they move in cells that stay; pairs and `moves` of a Verlet list."""
        by_pair = pairs.centers, pairs.neighbors, pairs.species(structures), pairs.shifts
        given = structures.structure_of_atom, structures.species, *by_pair, structures.cells, structures.volumes
        like = structures.positions
        fixed = tuple(part.contiguous() for part in given)
        return MovingAtoms(self.model, structures, fixed, moves, like.new_empty(len(pairs), 3))

    def hold(self, variances: VarianceModel | None, distances: Mahalanobis | None) -> None:
        """Tell the core of these, unless it has them: once, whichever thread is first."""
        with self._telling:
            if variances is not None and variances is not self.variances:
                build_variances(self.model, variances, self.species, library.build)
                self.variances = variances
            if distances is not None and distances is not self.distances:
                build_novelty(self.model, distances, self.species, library.build)
                self.distances = distances


@dataclass(frozen=True, eq=False)
class MovingAtoms:
    """Predictions of the same atoms between two searches of their neighbours, by one call of the core with hardly any Python around.

    Attributes:
        structures: in the positions in which they were last searched, or later ones.
        given: what does not change: by atom, by pair, cells and volumes; moves: VerletList.moves.
    """

    model: library.Handle
    structures: Structures
    given: tuple[Tensor, ...]
    moves: tuple[Tensor, Tensor, Tensor]
    _vectors: Tensor

    def __call__(self, structures: Structures) -> Prediction | None:
        """As of the potential, to the last bit; None where these are others, or pairs have to be searched or are too close."""
        known, like, n, n_atoms = self.structures, structures.positions, len(structures), structures.n_atoms
        same = structures.species is known.species and structures.cells is known.cells
        if not (same and neighbors.fits_compiled_loops(like)):
            return None
        energies, local, forces, stresses = (like.new_empty(s) for s in ((n,), (n_atoms,), (n_atoms, 3), (n, 3, 3)))
        threads = parallel.available_threads()
        status = library.call(
            "predict_moved", self.model, n, n_atoms, len(self._vectors), *self.given, *self.moves, neighbors.CLOSEST,
            like.contiguous(), self._vectors, energies, local, forces, stresses,
            threads, min(threads, 1 + len(self._vectors) // neighbors.PAIRS),
        )  # fmt: skip
        return None if status else Prediction(energies, local, forces, stresses)


def compile_mean(
    terms: Sequence[EnergyTerm], baselines: Sequence[Baseline], species: Sequence[int]
) -> CompiledMean | None:
    """The mean of these, or None where there is no core, or it has no form for one of them: PyTorch then computes it."""
    if library.compiled() is None or without_form(terms, baselines):
        return None
    return CompiledMean(build_mean(terms, baselines, species, library.build), species)


def build_mean(terms: Sequence[EnergyTerm], baselines: Sequence[Baseline], species: Sequence[int], build: Any) -> Any:
    """The core's model of these, of which it has forms, by calls of `build`: library.build, or one that writes them down."""
    isolated = [sum(b.energies.get(z, 0.0) for b in baselines if isinstance(b, IsolatedAtoms)) for z in species]
    radii = [torch.zeros(len(species), len(species), dtype=torch.float64) for _ in range(2)]
    for zbl in (b for b in baselines if isinstance(b, ZBL)):
        for (i, a), (j, b) in product(enumerate(species), repeat=2):
            for table, values in zip(radii, (zbl.inner, zbl.outer), strict=True):
                table[i, j] = values.get((min(a, b), max(a, b)), 0.0)
    energies = torch.tensor(isolated, dtype=torch.float64)
    model = build("model", len(species), torch.tensor(species), energies, *radii, units.COULOMB)
    for term in terms:
        single = isinstance(term.descriptor, SinglePrecisionDescriptor)
        descriptor = _power_spectrum(term.descriptor)
        assert descriptor is not None
        spectrum = build_spectrum(descriptor, torch.float32 if single else torch.float64, build)
        means = [_build_mean_of(term, z, single, build) if z in term.blocks else None for z in species]
        build("add_term", model, spectrum, int(single), len(species), means)
    return model


def build_tail(model: Any, tail: R6Tail, species: Sequence[int], build: Any) -> None:
    """Give it a dispersion tail, which engines add to what environments give."""
    switches = tail.begin, tail.full, tail.outer - R6_OFF, tail.outer
    build("add_tail", model, len(species), tail.coefficients(species), *switches)


def _power_spectrum(descriptor: Descriptor) -> SoapPowerSpectrum | FourBodySoap | None:
    inner = descriptor.descriptor if isinstance(descriptor, SinglePrecisionDescriptor) else descriptor
    return inner if isinstance(inner, (SoapPowerSpectrum, FourBodySoap)) else None


def without_form(terms: Sequence[EnergyTerm], baselines: Sequence[Baseline]) -> str:
    """What of a potential the core has no form for; empty where it has one for all."""
    for baseline in baselines:
        if not isinstance(baseline, (IsolatedAtoms, ZBL)):
            return f"the baseline {type(baseline).__name__}"
    if sum(isinstance(b, ZBL) for b in baselines) > 1:
        return "several ZBL baselines"
    for term in terms:
        weights = [block.weights for block in term.blocks.values()]
        if _power_spectrum(term.descriptor) is None:
            return f"the descriptor {type(term.descriptor).__name__}"
        if _kernel_parts(term.kernel) is None:
            return f"the kernel {type(term.kernel).__name__}"
        if any(w.dim() != 1 for w in weights):
            return "several samples at once"
        if any(w.dtype != torch.float64 or w.device.type != "cpu" for w in weights):
            return "weights in single precision or on a GPU"
    return ""


def _kernel_parts(kernel: ZonalKernel) -> list[list[float]] | None:
    """(weight, zeta, 1/length²) of each part of a kernel, zeta 0 of an exponential; None if there is one of another kind."""
    if isinstance(kernel, PolynomialKernel):
        return [[1.0, float(kernel.zeta), 0.0]]
    if isinstance(kernel, ExponentialKernel):
        return [[1.0, 0.0, float(kernel.length.detach()) ** -2]]
    if not isinstance(kernel, SumKernel):
        return None
    parts = [_kernel_parts(term) for term in kernel.terms]
    weighted = zip(kernel.weights.tolist(), (part for part in parts if part is not None), strict=False)
    return None if None in parts else [[w * x, *rest] for w, part in weighted for x, *rest in part]


def _build_mean_of(term: EnergyTerm, z: int, single: bool, build: Any) -> Any:
    """The mean of a central species, in single precision where its features are and it is quadratic: weights of centres cancel."""
    form: MeanBlock | CheaperMean = term.cheaper_means.get(z) or term.blocks[z]
    dtype = torch.float32 if single else torch.float64
    if isinstance(form, LowRankForm):
        arrays = (t.to(dtype).contiguous() for t in (form.linear, form.vectors, form.values))
        return build("low_rank_form", *form.vectors.shape, *arrays)
    if isinstance(form, QuadraticForm):
        return build(
            "quadratic_form", len(form.linear), *(t.to(dtype).contiguous() for t in (form.linear, form.hessian))
        )
    double = _build_double(term, form, build)
    return build("widened_mean", term.blocks[z].features.shape[1], double) if single else double


def _build_double(term: EnergyTerm, form: MeanBlock | ProjectedCentres, build: Any) -> Any:
    """A mean whose weights may cancel."""
    if isinstance(form, ProjectedCentres):
        arrays = (t.contiguous() for t in (form.linear, form.vectors))
        inner = _build_centres(form.centres, term.kernel, build)
        return build("projected_mean", *form.vectors.shape, float(form.constant), *arrays, inner)
    return _build_centres(form, term.kernel, build)


def _build_centres(block: MeanBlock, kernel: ZonalKernel, build: Any) -> Any:
    """A sum over centres."""
    parts = torch.tensor(_kernel_parts(kernel), dtype=torch.float64)
    arrays = (t.contiguous() for t in (block.features, block.weights, block.tangents))
    return build("inducing_centres", *block.features.shape, len(block.tangents), len(parts), *arrays, parts)


def build_variances(
    model: Any, variances: VarianceModel, species: Sequence[int], build: Any, forces: bool = False
) -> None:
    """Give the core's model variances of local energies, and if wanted of forces, by calls of `build` as in build_mean."""
    local_blocks = variances.local_blocks
    assert local_blocks is not None, "checked by who asks"
    every = [
        (k, block, prior.kernel)
        for k, (prior, blocks) in enumerate(zip(variances.priors, local_blocks, strict=True))
        for block in blocks
    ]
    columns = {
        (k, block.species): _build_columns(kernel, block, build)
        for k, block, kernel in every
        if forces or block.species not in variances.cheap
    }
    few = {
        z: dict(zip([k for k, b, _ in every if b.species == z], variances.cheap[z].leading, strict=True))
        for z in variances.cheap
    }
    leading = {
        (k, block.species): _build_columns(kernel, block.leading(few[block.species][k]), build)
        for k, block, kernel in every
        if block.species in few
    }
    local = [_build_local_variance(variances, z, leading if z in variances.cheap else columns, build) for z in species]
    build("add_variances", model, len(species), local)
    if forces:
        _build_posterior(model, variances, species, columns, build)


def build_novelty(model: Any, distances: Mahalanobis, species: Sequence[int], build: Any) -> None:
    """Give it distances from the training data."""
    build("add_novelty", model, len(species), [_build_clusters(distances, z, build) for z in species])


def build_calibration(model: Any, calibration: Calibration, variances: VarianceModel, build: Any) -> None:
    """Tell it how standard deviations are calibrated: those of forces, and of local energies, whose slopes these are."""
    learned, typical = calibration.kinds["forces"], calibration.typical_novelty or 0.0
    numbers = [variances.amplitude, *(learned.weights or (1.0, 1.0, 1.0)), learned.scale, learned.forbidden, typical]
    numbers += variances.noise_parts("forces")
    local, none = learned.local, (0.0,) * 3
    rows = [none] * 4 if local is None else [local.slopes, local.middle, local.low, local.high]
    numbers += [0.0 if local is None else local.force, *(x for row in rows for x in row)]
    build("calibrate", model, torch.tensor(numbers, dtype=torch.float64))


def _build_columns(kernel: ZonalKernel, block: InducingBlock, build: Any) -> Any:
    """The inducing variables of a species and descriptor."""
    m, columns = len(block.features), block.columns
    of_tangents = columns >= m
    tangents, centre = block.tangents.flatten(0, 1)[columns[of_tangents] - m], block.column_addresses[0]
    number = torch.where(of_tangents, of_tangents.long().cumsum(0) - 1, -1)
    parts = torch.tensor(_kernel_parts(kernel), dtype=torch.float64)
    arrays = (t.contiguous() for t in (block.features, tangents, centre, number))
    return build("inducing_columns", *block.features.shape, len(tangents), len(columns), len(parts), *arrays, parts)


def _build_local_variance(variances: VarianceModel, z: int, columns: Mapping[tuple[int, int], Any], build: Any) -> Any:
    """Variances of local energies of a central species."""
    mine = [columns.get((k, z)) for k in range(len(variances.blocks))]
    if z in variances.cheap:
        triangle = variances.cheap[z].triangle
        order = torch.arange(len(triangle))
        return build("local_variance", 0.0, len(mine), mine, order, len(triangle), 0, triangle, *[0] * 5)
    local, none = variances.local.get(z), variances.signal.new_zeros(0, 0)
    order, arrays = torch.zeros(0, dtype=torch.long), [none] * 3 + [none.float()] * 3
    if local is not None:
        widths = [b.n_columns for blocks in variances.blocks for b in blocks if z in b.central_species]
        order = leading_first(widths, local.leading)
        arrays = [
            local.whiten_leading, local.posterior_leading, local.project,
            local.whiten_rest, local.posterior_cross, local.posterior_rest,
        ]  # fmt: skip
    sizes = order.argsort(), len(arrays[0]), len(arrays[3])
    arrays = [array.contiguous() for array in arrays]
    return build("local_variance", variances.prior_variance(z), len(mine), mine, *sizes, *arrays)


def _build_posterior(
    model: Any, variances: VarianceModel, species: Sequence[int], columns: Mapping[tuple[int, int], Any], build: Any
) -> None:
    """Variances of forces, from all columns."""
    n_terms = len(variances.priors)
    terms, slots = (torch.tensor(v) for v in zip(*((k, list(species).index(z)) for k, z in columns), strict=True))
    lowers = torch.cat([pack_triangle(lower) for lower in variances.lowers])
    prior = torch.tensor([[p.signal.get(z, 0.0) ** 2 for z in species] for p in variances.priors], dtype=torch.float64)
    parts = [[float(k), *part] for k, p in enumerate(variances.priors) for part in _kernel_parts(p.kernel) or []]
    arrays = lowers, variances.signal.contiguous(), pack_triangle(variances.factor.T), prior
    kernels = torch.tensor(parts, dtype=torch.float64)
    sizes = len(columns), n_terms, len(parts)
    build("add_posterior", model, *sizes, terms, slots, list(columns.values()), *arrays, kernels)


def _build_clusters(distances: Mahalanobis, z: int, build: Any) -> Any:
    """Distances of a central species, None where the training data hold nothing of it."""
    clusters = distances.species.get(z)
    if clusters is None:
        return None
    whiten, offset, across = clusters.whitening
    arrays = (t.contiguous() for t in (clusters.centre, clusters.components, whiten, offset, across))
    return build("clusters", *clusters.components.shape, len(across), float(distances.thresholds.get(z, 1.0)), *arrays)
