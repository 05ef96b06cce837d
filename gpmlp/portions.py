"""Portions are runs of atoms whose environments are made, used and dropped together: they bound the memory of a prediction, however
large a structure is, and are what threads share."""

from __future__ import annotations

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

ATOMS = 256  # of a portion; ON_DEVICE: where there are many cores
ON_DEVICE = 1 << 14
# environments as each term has them, with profiles of the kernels if there are any -> what else is wanted of these atoms
Beside = Callable[[Sequence[Environments], Sequence[dict[int, Profile]]], tuple[Variance | None, Tensor | None]]


@dataclass(frozen=True, eq=False)
class Portion:
    """What is predicted of a run of atoms.

    Attributes:
        local: for each term, (atoms,) local energies, eV.
        gradients: for each term, (pairs, 3) ∂E/∂r_ij, eV/A.
        variance: of the local energies; novelty: (atoms,); each None if not asked for.
    """

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
    lists: Sequence[Neighbors],
    beside: Beside | None = None,
    shared: bool = False,
) -> Prediction:
    """Posterior mean of energies, forces and stresses, and what `beside` makes of the same environments.

    The same to the last bit for any number of threads, and whatever else is asked for.

    Args:
        lists: for each term, all pairs within its cutoff.
        shared: whether `beside` uses the kernels of the mean.
    """
    seen = [Surroundings.of(structures, pairs) for pairs in lists]

    def portion(span: tuple[int, int]) -> Portion:
        made = [term.descriptor(s.between(*span)) for term, s in zip(terms, seen, strict=True)]
        profiles = [term.profiles(e) if shared else {} for term, e in zip(terms, made, strict=True)]
        local, cotangents = zip(*(t.local(e, p) for t, e, p in zip(terms, made, profiles, strict=True)), strict=True)
        gradients = tuple(e.pull_back(c) for e, c in zip(made, cotangents, strict=True))
        return Portion(local, gradients, *(beside(made, profiles) if beside else (None, None)))

    atoms = ATOMS if structures.positions.device.type == "cpu" else ON_DEVICE
    parts = threads.each(portion, spans(structures.counts.tolist(), atoms))
    total = None
    for k, (pairs, surroundings) in enumerate(zip(lists, seen, strict=True)):
        local, gradients = torch.cat([p.local[k] for p in parts]), torch.cat([p.gradients[k] for p in parts])
        part = neighbors.prediction(structures, pairs, surroundings.vectors, local, gradients)
        total = part if total is None else total + part
    variances, novelties = [p.variance for p in parts], [p.novelty for p in parts]
    return replace(
        total,
        atom_energies_variance=None if variances[0] is None else Variance.concatenate(variances),
        novelty=None if novelties[0] is None else torch.cat(novelties),
    )
