"""Chunked prediction: runs of atoms whose environments are computed, used and dropped together.

They bound the memory of a prediction, however large a structure is, and are what threads share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpmlp.core import neighbors, parallel
from gpmlp.core.environments import Environments, Surroundings
from gpmlp.core.neighbors import Neighbors
from gpmlp.core.quantities import Prediction, Variance
from gpmlp.core.structures import Structures
from gpmlp.gp.kernels import Profile
from gpmlp.potential.baselines import Baseline
from gpmlp.potential.force_samples import ForceSamples
from gpmlp.potential.mean import EnergyTerm

ATOMS = 256  # of a chunk, for each species: products are by central species, and want many rows
MOST_SPECIES = 3
SHARES, MOST_ATOMS = 8, 1024  # so many chunks, if they need not be larger for that: each costs some Python
ON_DEVICE = 1 << 14  # where there are many cores
# environments of each term, with profiles of the kernels if there are any -> variance of local energies, novelty
ExtraPredictions = Callable[
    [Sequence[Environments], Sequence[dict[int, Profile]]], tuple[Variance | None, Tensor | None]
]


@dataclass(frozen=True, eq=False)
class ChunkPrediction:
    """Prediction of a run of atoms.

    Attributes:
        local: (atoms,) local energies, eV.
        gradients: of each term and baseline, pairs of these atoms, their vectors, A, and ∂E/∂r_ij (pairs, 3), eV/A.
        variance: of the local energies; novelty: (atoms,); each None if not asked for.
        sampled: of each term, ∂δE/∂r_ij of posterior samples (k, pairs, 3); empty if not asked for.
    """

    local: Tensor
    gradients: list[tuple[Neighbors, Tensor, Tensor]]
    variance: Variance | None
    novelty: Tensor | None
    sampled: Sequence[Tensor] = ()


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
    extras: ExtraPredictions | None = None,
    share_kernels: bool = False,
    baselines: Sequence[Baseline] = (),
    samples: ForceSamples | None = None,
) -> Prediction:
    """Posterior mean of energies, forces and stresses with the baselines, and what `extras` predicts from the same environments.

    Bit for bit the same for any number of threads, and whatever else is asked for.

    Args:
        pairs_of: atoms (start, end) -> all pairs with these as centres, within the largest cutoff of all terms or more, as
            Neighbors.of_centers.
        share_kernels: whether `extras` uses the kernels of the mean.
        samples: whose forces the force covariances are estimated from.
    """

    def predict(span: tuple[int, int]) -> ChunkPrediction:
        near = pairs_of(*span)
        pairs = tuple(near.within(structures, term.descriptor.cutoff) for term in terms)
        surroundings = tuple(Surroundings.from_structures(structures, p, *span) for p in pairs)
        environments = [term.descriptor(s) for term, s in zip(terms, surroundings, strict=True)]
        profiles = [t.kernel_profiles(e) if share_kernels else {} for t, e in zip(terms, environments, strict=True)]
        energies, gradients = [], []
        for term, p, s, e, profile in zip(terms, pairs, surroundings, environments, profiles, strict=True):
            local, slopes = term.local_energies(e, profile)
            energies.append(local)
            gradients.append((p, s.vectors, e.pull_back(slopes)))
        for baseline in baselines:
            local, closer, slopes = baseline.of_atoms(structures, near, *span)
            energies.append(local)
            gradients.append((closer, closer.vectors(structures), slopes))
        extra = extras(environments, profiles) if extras else (None, None)
        sampled = samples.pair_gradients(environments) if samples else ()
        return ChunkPrediction(functools.reduce(torch.add, energies), gradients, *extra, sampled)

    like, local = structures.positions, []
    variances: list[Variance] = []
    novelties: list[Tensor] = []
    on_atoms, strained = like.new_zeros(like.shape), like.new_zeros(structures.cells.shape)  # whatever the strides

    deviations = like.new_zeros(samples.members if samples else 0, *like.shape)
    unused = torch.zeros_like(strained)

    def take(chunk: ChunkPrediction) -> None:
        for pairs, vectors, gradients in chunk.gradients:
            neighbors.add_pair_gradients(structures, pairs, vectors, gradients, on_atoms, strained)
        for (pairs, vectors, _), members in zip(chunk.gradients, chunk.sampled, strict=False):
            for forces, gradients in zip(deviations, members, strict=True):
                neighbors.add_pair_gradients(structures, pairs, vectors, gradients, forces, unused)
        local.append(chunk.local)
        if chunk.variance is not None:
            variances.append(chunk.variance)
        if chunk.novelty is not None:
            novelties.append(chunk.novelty)

    least = ATOMS * min(len(structures.distinct_species), MOST_SPECIES)
    atoms = max(least, min(MOST_ATOMS, len(like) // SHARES)) if like.device.type == "cpu" else ON_DEVICE
    parallel.map_pieces(predict, atom_ranges(structures.counts.tolist(), atoms) or [(0, 0)], take)
    return replace(
        neighbors.prediction_from_sums(structures, torch.cat(local), on_atoms, strained),
        atom_energies_variance=Variance.concatenate(variances) if variances else None,
        sampled_forces_covariance=samples.covariance(deviations) if samples else None,
        novelty=torch.cat(novelties) if novelties else None,
    )
