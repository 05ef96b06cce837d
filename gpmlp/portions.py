"""Portions are runs of atoms whose environments are made, used and dropped together: they bound the memory of a prediction, however
large a structure is, and are what threads share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpmlp import neighbors, threads
from gpmlp.environments import Environments, Surroundings
from gpmlp.neighbors import Neighbors
from gpmlp.quantities import Prediction, Variance
from gpmlp.structures import Structures
from gpmlp.terms import Profile, Term

ATOMS = 256  # of a portion, for each species: products are by central species, and want many rows; ON_DEVICE: where there are many cores
MOST_SPECIES = 3
ON_DEVICE = 1 << 14
# environments as each term has them, with profiles of the kernels if there are any -> what else is wanted of these atoms
Beside = Callable[[Sequence[Environments], Sequence[dict[int, Profile]]], tuple[Variance | None, Tensor | None]]


@dataclass(frozen=True, eq=False)
class Portion:
    """What is predicted of a run of atoms.

    Attributes:
        pairs, surroundings: of these atoms, for each term.
        local: for each term, (atoms,) local energies, eV.
        gradients: for each term, (pairs, 3) ∂E/∂r_ij, eV/A.
        variance: of the local energies; novelty: (atoms,); each None if not asked for.
    """

    pairs: tuple[Neighbors, ...]
    surroundings: tuple[Surroundings, ...]
    local: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    variance: Variance | None
    novelty: Tensor | None


def spans(counts: Sequence[int], atoms: int) -> list[tuple[int, int]]:
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


def mean(
    terms: Sequence[Term],
    structures: Structures,
    look: Callable[[int, int], Neighbors],
    beside: Beside | None = None,
    shared: bool = False,
) -> Prediction:
    """Posterior mean of energies, forces and stresses, and what `beside` makes of the same environments.

    The same to the last bit for any number of threads, and whatever else is asked for.

    Args:
        look: atoms (start, end) -> all pairs with these as centres, within the largest cutoff of the terms or more, as
            Neighbors.of_atoms.
        shared: whether `beside` uses the kernels of the mean.
    """

    def portion(span: tuple[int, int]) -> Portion:
        found = look(*span)
        pairs = tuple(found.within(structures, term.descriptor.cutoff) for term in terms)
        seen = tuple(Surroundings.of(structures, p, *span) for p in pairs)
        made = [term.descriptor(s) for term, s in zip(terms, seen, strict=True)]
        profiles = [term.profiles(e) if shared else {} for term, e in zip(terms, made, strict=True)]
        local, cotangents = zip(*(t.local(e, p) for t, e, p in zip(terms, made, profiles, strict=True)), strict=True)
        gradients = tuple(e.pull_back(c) for e, c in zip(made, cotangents, strict=True))
        return Portion(pairs, seen, local, gradients, *(beside(made, profiles) if beside else (None, None)))

    like, local, variances, novelties = structures.positions, [], [], []
    on_atoms, strained = torch.zeros_like(like), torch.zeros_like(structures.cells)

    def take(part: Portion) -> None:
        for pairs, seen, gradients in zip(part.pairs, part.surroundings, part.gradients, strict=True):
            neighbors.collect(structures, pairs, seen.vectors, gradients, on_atoms, strained)
        local.append(functools.reduce(torch.add, part.local))
        variances.append(part.variance)
        novelties.append(part.novelty)

    n_species = min(len(structures.distinct_species), MOST_SPECIES)
    atoms = ATOMS * n_species if like.device.type == "cpu" else ON_DEVICE
    threads.each(portion, spans(structures.counts.tolist(), atoms), take)
    return replace(
        neighbors.collected(structures, torch.cat(local), on_atoms, strained),
        atom_energies_variance=None if variances[0] is None else Variance.concatenate(variances),
        novelty=None if novelties[0] is None else torch.cat(novelties),
    )
