"""Portions are runs of atoms whose environments are made, used and dropped together: they bound the memory of a prediction, however
large a structure is, and are what threads share."""

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
from gpmlp.potential.mean import EnergyTerm

ATOMS = 256  # of a portion, for each species: products are by central species, and want many rows
MOST_SPECIES = 3
SHARES, MOST_ATOMS = 8, 1024  # so many portions, if they need not be larger for that: each costs some Python
ON_DEVICE = 1 << 14  # where there are many cores
# environments as each term has them, with profiles of the kernels if there are any -> what else is wanted of these atoms
ExtraPredictions = Callable[
    [Sequence[Environments], Sequence[dict[int, Profile]]], tuple[Variance | None, Tensor | None]
]


@dataclass(frozen=True, eq=False)
class ChunkMean:
    """What is predicted of a run of atoms.

    Attributes:
        local: (atoms,) local energies, eV.
        gradients: of each term and baseline, pairs of these atoms, their vectors, A, and ∂E/∂r_ij (pairs, 3), eV/A.
        variance: of the local energies; novelty: (atoms,); each None if not asked for.
    """

    local: Tensor
    gradients: list[tuple[Neighbors, Tensor, Tensor]]
    variance: Variance | None
    novelty: Tensor | None


def atom_ranges(counts: Sequence[int], atoms: int) -> list[tuple[int, int]]:
    """First and last + 1 atom of each portion: consecutive structures of so many atoms together, or parts of a larger one."""
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
    look: Callable[[int, int], Neighbors],
    beside: ExtraPredictions | None = None,
    shared: bool = False,
    baselines: Sequence[Baseline] = (),
) -> Prediction:
    """Posterior mean of energies, forces and stresses with the baselines, and what `beside` makes of the same environments.

    The same to the last bit for any number of threads, and whatever else is asked for.

    Args:
        look: atoms (start, end) -> all pairs with these as centres, within the largest cutoff of all terms or more, as
            Neighbors.of_centers.
        shared: whether `beside` uses the kernels of the mean.
    """

    def portion(span: tuple[int, int]) -> ChunkMean:
        found = look(*span)
        pairs = tuple(found.within(structures, term.descriptor.cutoff) for term in terms)
        seen = tuple(Surroundings.from_structures(structures, p, *span) for p in pairs)
        made = [term.descriptor(s) for term, s in zip(terms, seen, strict=True)]
        profiles = [term.kernel_profiles(e) if shared else {} for term, e in zip(terms, made, strict=True)]
        local, cotangents = zip(
            *(t.local_energies(e, p) for t, e, p in zip(terms, made, profiles, strict=True)), strict=True
        )
        gradients = [(p, s.vectors, e.pull_back(c)) for p, s, e, c in zip(pairs, seen, made, cotangents, strict=True)]
        energies = list(local)
        for baseline in baselines:
            energy, near, slopes = baseline.of_atoms(structures, found, *span)
            energies.append(energy)
            gradients.append((near, near.vectors(structures), slopes))
        beside_these = beside(made, profiles) if beside else (None, None)
        return ChunkMean(functools.reduce(torch.add, energies), gradients, *beside_these)

    like, local, variances, novelties = structures.positions, [], [], []
    on_atoms, strained = like.new_zeros(like.shape), like.new_zeros(structures.cells.shape)  # whatever the strides

    def take(part: ChunkMean) -> None:
        for pairs, vectors, gradients in part.gradients:
            neighbors.add_pair_gradients(structures, pairs, vectors, gradients, on_atoms, strained)
        local.append(part.local)
        variances.append(part.variance)
        novelties.append(part.novelty)

    least = ATOMS * min(len(structures.distinct_species), MOST_SPECIES)
    atoms = max(least, min(MOST_ATOMS, len(like) // SHARES)) if like.device.type == "cpu" else ON_DEVICE
    parallel.map_pieces(portion, atom_ranges(structures.counts.tolist(), atoms) or [(0, 0)], take)
    return replace(
        neighbors.prediction_from_sums(structures, torch.cat(local), on_atoms, strained),
        atom_energies_variance=None if variances[0] is None else Variance.concatenate(variances),
        novelty=None if novelties[0] is None else torch.cat(novelties),
    )
