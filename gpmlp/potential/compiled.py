"""A potential's mean in the compiled core: local energies, and pair gradients or their sums, of all terms and baselines in one call
(gpmlp/native/src/model.hpp)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from gpmlp.core import parallel, units
from gpmlp.core.environments import Descriptor, SinglePrecisionDescriptor, Surroundings
from gpmlp.core.neighbors import Neighbors
from gpmlp.core.quantities import Prediction
from gpmlp.core.structures import Structures
from gpmlp.descriptors.backends import SoapPowerSpectrum
from gpmlp.descriptors.cpu import spectrum_arguments
from gpmlp.gp.kernels import ExponentialKernel, PolynomialKernel, SumKernel, ZonalKernel
from gpmlp.native import library
from gpmlp.potential.baselines import ZBL, Baseline, IsolatedAtoms
from gpmlp.potential.mean import EnergyTerm, LowRankForm, MeanBlock, QuadraticForm


@dataclass(frozen=True, eq=False)
class CompiledMean:
    """The mean of a potential as the core holds it.

    Attributes:
        n_features: of each term.
    """

    model: library.Handle
    n_features: tuple[int, ...]

    def __call__(self, surroundings: Surroundings, features: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Local energies (environments,), eV, ∂E/∂r_ij (pairs, 3), eV/A, and if wanted the features of each term.

        Args:
            surroundings: pairs within the largest cutoff or more; those beyond have a gradient of zero.
        """
        n, vectors = len(surroundings), surroundings.vectors
        local, gradients = vectors.new_empty(n), torch.empty_like(vectors)
        rows = [vectors.new_empty(n, width) for width in self.n_features] if features else []
        addresses = torch.tensor([row.data_ptr() for row in rows] if features else [0] * len(self.n_features))
        given = surroundings.species, surroundings.centers, surroundings.neighbor_species, vectors
        library.call(
            "evaluate", self.model, n, len(vectors), *(part.contiguous() for part in given),
            local, gradients, addresses, parallel.available_threads(),
        )  # fmt: skip
        return local, gradients, rows

    def predict(self, structures: Structures, pairs: Neighbors) -> Prediction:
        """Energies, forces and stresses, to the last bit those that come from the pair gradients.

        Args:
            pairs: all within the largest cutoff, and perhaps more.
        """
        like, n, n_atoms = structures.positions, len(structures), structures.n_atoms
        shapes = (n,), (n_atoms,), (n_atoms, 3), (n, 3, 3)
        energies, local, forces, stresses = (like.new_empty(shape) for shape in shapes)
        by_atom, by_pair = (
            (structures.structure_of_atom, structures.species),
            (pairs.centers, pairs.neighbors, pairs.species(structures), pairs.vectors(structures)),
        )
        given = (part.contiguous() for part in (*by_atom, *by_pair, structures.volumes))
        library.call(
            "predict", self.model, n, n_atoms, len(pairs), *given, energies, local, forces, stresses,
            parallel.available_threads(),
        )  # fmt: skip
        return Prediction(energies, local, forces, stresses)


def compile_mean(
    terms: Sequence[EnergyTerm], baselines: Sequence[Baseline], species: Sequence[int]
) -> CompiledMean | None:
    """The mean of these, or None where there is no core, or it has no form for one of them: PyTorch then computes it."""
    if library.compiled() is None or without_form(terms, baselines):
        return None
    return CompiledMean(
        build_mean(terms, baselines, species, library.build), tuple(t.descriptor.n_features for t in terms)
    )


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
        spectrum = build("spectrum", *spectrum_arguments(descriptor, torch.float32 if single else torch.float64))
        means = [_build_mean_of(term, z, build) if z in term.blocks else None for z in species]
        build("add_term", model, spectrum, int(single), len(species), means)
    return model


def _power_spectrum(descriptor: Descriptor) -> SoapPowerSpectrum | None:
    inner = descriptor.descriptor if isinstance(descriptor, SinglePrecisionDescriptor) else descriptor
    return inner if isinstance(inner, SoapPowerSpectrum) else None


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


def _build_mean_of(term: EnergyTerm, z: int, build: Any) -> Any:
    """The mean of a central species."""
    form: MeanBlock | QuadraticForm | LowRankForm = term.quadratic_forms.get(z) or term.blocks[z]
    if isinstance(form, LowRankForm):
        arrays = (t.contiguous() for t in (form.linear, form.vectors, form.values))
        return build("low_rank_form", *form.vectors.shape, *arrays)
    if isinstance(form, QuadraticForm):
        return build("quadratic_form", len(form.linear), form.linear.contiguous(), form.hessian.contiguous())
    parts = torch.tensor(_kernel_parts(term.kernel), dtype=torch.float64)
    arrays = (t.contiguous() for t in (form.features, form.weights, form.tangents))
    return build("inducing_centres", *form.features.shape, len(form.tangents), len(parts), *arrays, parts)
