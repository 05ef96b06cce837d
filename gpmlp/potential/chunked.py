"""Chunked prediction: runs of atoms whose environments are computed, used and dropped together.

They bound the memory of a prediction, however large a structure is, and are what threads share.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpmlp.core import neighbors, parallel
from gpmlp.core.environments import Environments, Surroundings
from gpmlp.core.neighbors import Neighbors, fits_compiled_loops
from gpmlp.core.quantities import Prediction, Variance
from gpmlp.core.structures import Structures
from gpmlp.potential.baseline import LocalBaseline
from gpmlp.potential.compiled import CompiledMean
from gpmlp.potential.force_samples import ForceSamples
from gpmlp.potential.local_errors import NOTHING, LocalErrors
from gpmlp.potential.mean import EnergyTerm

ATOMS = 256  # of a chunk, for each species: products are by central species, and want many rows
MOST_SPECIES = 3
SHARES, MOST_ATOMS = 8, 1024  # so many chunks, if they need not be larger for that: each costs some Python
ON_DEVICE = 1 << 14  # where there are many cores
PairGradients = tuple[Neighbors, Tensor, Tensor]  # pairs, their vectors, A, and derivatives with respect to these


@dataclass(frozen=True, eq=False)
class ChunkPrediction:
    """Prediction of a run of atoms.

    Attributes:
        local: (atoms,) local energies, eV.
        gradients: of each term and baseline, pairs of these atoms, their vectors, A, and ∂E/∂r_ij (pairs, 3), eV/A.
        variance: of the local energies; novelty: (atoms,); each None if not asked for.
        sampled: the same of posterior samples, ∂δE/∂r_ij (k, pairs, 3); empty if not asked for.
    """

    local: Tensor
    gradients: list[PairGradients]
    variance: Variance | None
    novelty: Tensor | None
    sampled: Sequence[PairGradients] = ()


def atom_ranges(counts: Sequence[int], atoms: int) -> list[tuple[int, int]]:
    """First and last + 1 atom of each chunk: consecutive structures of so many atoms together, or parts of a larger one."""
    out, start, end = [], 0, 0
    for count in counts:
        if end > start and end - start + count > atoms:
            out.append((start, end))
            start = end
        end += count
        while end - start > atoms:
            out.append((start, start + atoms))
            start += atoms
    return [*out, (start, end)] if end > start else out


def predict_mean(
    terms: Sequence[EnergyTerm],
    structures: Structures,
    pairs_of: Callable[[int, int], Neighbors],
    errors: LocalErrors = NOTHING,
    baselines: Sequence[LocalBaseline] = (),
    samples: ForceSamples | None = None,
    compiled: CompiledMean | None = None,
    atom_virials: bool = False,
) -> Prediction:
    """Posterior mean of energies, forces and stresses with the baselines, and of the same environments what `errors` asks for.

    Bit for bit the same for any number of threads, and whatever else is asked for.

    Args:
        pairs_of: atoms (start, end) -> all pairs with these as centres, within the largest cutoff of all terms or more, as
            Neighbors.of_centers.
        samples: whose forces the force covariances are estimated from.
        compiled: the mean of the terms and baselines, if there is one.
        atom_virials: whether they are wanted.
    """
    whole = any(term.descriptor.cutoff == math.inf for term in terms) or any(b.whole_structures for b in baselines)
    chunks, spans = _Chunks(terms, structures, pairs_of, errors, baselines, samples), _spans(structures, whole)
    deviations = structures.positions.new_zeros(samples.members if samples else 0, structures.n_atoms, 3)
    has_form = errors.variances is None or errors.variances.local_blocks is not None
    if compiled is not None and has_form and fits_compiled_loops(structures.positions, structures.cells):
        prediction = compiled.predict(structures, pairs_of(0, structures.n_atoms), errors, atom_virials)
        if samples:
            add = functools.partial(_add_deviations, structures, deviations)
            parallel.map_pieces(chunks.sampled, spans, add)
    else:
        sums = _Sums(structures, deviations, atom_virials)
        parallel.map_pieces(chunks.predict, spans, sums.add)
        prediction = sums.prediction()
    return replace(prediction, sampled_forces_covariance=samples.covariance(deviations)) if samples else prediction


@dataclass(frozen=True, eq=False)
class _Chunks:
    """How runs of atoms, each given by its first and last + 1, are predicted; attributes as arguments of `predict_mean`."""

    terms: Sequence[EnergyTerm]
    structures: Structures
    pairs_of: Callable[[int, int], Neighbors]
    errors: LocalErrors
    baselines: Sequence[LocalBaseline]
    samples: ForceSamples | None

    def predict(self, span: tuple[int, int]) -> ChunkPrediction:
        near = self.pairs_of(*span)
        pairs, environments = self._environments(near, span)
        together = list(zip(self.terms, environments, strict=True))
        shared = self.errors.variances is not None  # mean and variances have the same kernels
        profiles = [term.kernel_profiles(e) if shared else {} for term, e in together]
        energies, gradients = [], []
        for (term, e), p, profile in zip(together, pairs, profiles, strict=True):
            local, slopes = term.local_energies(e, profile)
            energies.append(local)
            gradients.append((p, e.surroundings.vectors, e.pull_back(slopes)))
        for baseline in self.baselines:
            local, closer, slopes = baseline.of_atoms(self.structures, near, *span)
            energies.append(local)
            gradients.append((closer, closer.vectors(self.structures), slopes))
        extra, sampled = self.errors(environments, profiles), self._sampled(pairs, environments)
        return ChunkPrediction(functools.reduce(torch.add, energies), gradients, *extra, sampled)

    def sampled(self, span: tuple[int, int]) -> Sequence[PairGradients]:
        """Those of posterior samples only."""
        return self._sampled(*self._environments(self.pairs_of(*span), span))

    def _environments(self, near: Neighbors, span: tuple[int, int]) -> tuple[list[Neighbors], list[Environments]]:
        """Of each term: pairs within its cutoff, and the environments."""
        pairs = [near.within(self.structures, term.descriptor.cutoff) for term in self.terms]
        pairs = [p if p.cutoff < math.inf else p.of_centers(*span) for p in pairs]
        surroundings = (Surroundings.from_structures(self.structures, p, *span) for p in pairs)
        return pairs, [term.descriptor(s) for term, s in zip(self.terms, surroundings, strict=True)]

    def _sampled(self, pairs: list[Neighbors], environments: list[Environments]) -> list[PairGradients]:
        members = self.samples.pair_gradients(environments) if self.samples else []
        return [(p, p.vectors(self.structures), m) for p, m in zip(pairs, members, strict=bool(members))]


class _Sums:
    """What chunks, in the order of their atoms, add up to."""

    def __init__(self, structures: Structures, deviations: Tensor, atom_virials: bool) -> None:
        like = structures.positions
        self.structures, self.deviations = structures, deviations
        self.forces, self.strained = like.new_zeros(like.shape), like.new_zeros(structures.cells.shape)  # any strides
        self.atom_virials = like.new_zeros(len(like), 3, 3) if atom_virials else None
        self.local: list[Tensor] = []
        self.variances: list[Variance] = []
        self.novelties: list[Tensor] = []

    def add(self, chunk: ChunkPrediction) -> None:
        """The next one."""
        for pairs, vectors, gradients in chunk.gradients:
            neighbors.add_pair_gradients(self.structures, pairs, vectors, gradients, self.forces, self.strained)
            if self.atom_virials is not None:
                self.atom_virials += neighbors.scatter_atom_virials(len(self.forces), pairs, vectors, gradients)
        _add_deviations(self.structures, self.deviations, chunk.sampled)
        self.local.append(chunk.local)
        if chunk.variance is not None:
            self.variances.append(chunk.variance)
        if chunk.novelty is not None:
            self.novelties.append(chunk.novelty)

    def prediction(self) -> Prediction:
        """Of all structures."""
        return replace(
            neighbors.prediction_from_sums(self.structures, torch.cat(self.local), self.forces, self.strained),
            atom_energies_variance=Variance.concatenate(self.variances) if self.variances else None,
            novelty=torch.cat(self.novelties) if self.novelties else None,
            atom_virials=self.atom_virials,
        )


def _spans(structures: Structures, whole: bool) -> list[tuple[int, int]]:
    """First and last + 1 atom of each chunk; `whole`: no structure is to be cut."""
    least, n = ATOMS * min(len(structures.distinct_species), MOST_SPECIES), structures.n_atoms
    on_cpu = structures.positions.device.type == "cpu"
    atoms = max(least, min(MOST_ATOMS, n // SHARES)) if on_cpu else ON_DEVICE
    atoms = max(atoms, int(structures.counts.max())) if whole and len(structures) else atoms
    return atom_ranges(structures.counts.tolist(), atoms) or [(0, 0)]


def _add_deviations(structures: Structures, deviations: Tensor, sampled: Sequence[PairGradients]) -> None:
    """Add forces from pair gradients of samples to `deviations` (members, atoms, 3)."""
    unused = torch.zeros_like(structures.cells)
    for pairs, vectors, members in sampled:
        for forces, gradients in zip(deviations, members, strict=True):
            neighbors.add_pair_gradients(structures, pairs, vectors, gradients, forces, unused)
