"""Partitions of the training data: runs of structures that one worker takes at a time, fixed by the data and the number of columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting.workers import Report, Workers, silent

PARTITION_ATOMS = 1 << 15  # of a partition, about: less, and merging costs as much as what is merged
PARTITIONS = 2048  # at most: each sends a triangular factor


@dataclass(frozen=True, eq=False)
class Partition:
    """Consecutive structures with their labels.

    Attributes:
        targets: less the baselines.
        first: number of structures before these; atoms_before: number of atoms before these, by species.
    """

    structures: Structures
    targets: Targets
    first: int
    atoms_before: dict[int, int]


@dataclass(frozen=True, eq=False)
class Partitions:
    """All partitions, and who works on them.

    Attributes:
        bounds: first structure of each and of what follows; kept: the partitions, as the workers have them.
    """

    workers: Workers
    bounds: tuple[tuple[int, int], ...]
    kept: tuple[Any, ...]

    @staticmethod
    def of_data(structures: Structures, targets: Targets, columns: int, workers: Workers) -> Partitions:
        """Of about equal numbers of atoms."""
        number = _number_of(structures.n_atoms, columns)
        owner = structures.offsets[:-1] * number // structures.n_atoms
        _, sizes = owner.unique_consecutive(return_counts=True)
        ends = sizes.cumsum(0).tolist()
        bounds = tuple(zip([0, *ends], ends, strict=False))
        kept, before = [], dict.fromkeys(structures.distinct_species, 0)
        for first, last in bounds:
            here = torch.arange(first, last)
            part = structures if len(bounds) == 1 else structures.select(here)
            kept.append(workers.keep(Partition(part, targets.select(structures, here), first, before)))
            before = {z: n + int((part.species == z).sum()) for z, n in before.items()}
        return Partitions(workers, bounds, tuple(kept))

    def map(self, work: Callable, *shared: Any, report: Report = silent) -> list[Any]:
        """work(report, *shared, partition) of each."""
        return self.workers.map(work, self._pieces(shared), report)

    def reduce(
        self, work: Callable, merge: Callable, *shared: Any, chosen: Sequence[Tensor], report: Report = silent
    ) -> Any:
        """work(report, *shared, partition, *which) of each, merged.

        Args:
            chosen: indices of structures, rising; `which` are those in the partition, counted there.
        """
        return self.workers.reduce(work, merge, self._pieces(shared, chosen), report)

    def _pieces(self, shared: Sequence[Any], chosen: Sequence[Tensor] = ()) -> list[tuple]:
        shared = [self.workers.keep(value) for value in shared]
        return [
            (*shared, kept, *(i[(i >= first) & (i < last)] - first for i in chosen))
            for kept, (first, last) in zip(self.kept, self.bounds, strict=True)
        ]


def _number_of(atoms: int, columns: int) -> int:
    """How many partitions: each has at least PARTITION_ATOMS atoms, or four forces for each column, if it can."""
    return max(1, min(PARTITIONS, atoms // max(PARTITION_ATOMS, 4 * columns // 3)))
