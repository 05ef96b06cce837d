"""Separation: how far apart the parts of a structure are, and how much larger its errors are than those of structures nearer together.

What a model adds beyond its cutoff is learned up to some separation and used at larger ones, where no label says what it is worth. The
structures with the largest separations are therefore predicted without any of them, and their errors, in standard deviations that were
calibrated on structures left out one at a time, are the factor of structures as far apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gpmlp.core.structures import Structures

APART = 3.0  # A, gap of a structure in two parts
SHARE = 1 / 3  # of the structures whose parts are apart, those with the largest gaps
FEWEST = 8  # structures, at least
LABELS = 900  # of them together, about, at most


@dataclass(frozen=True)
class SeparationScale:
    """Factors on standard deviations of structures whose parts are far apart.

    Attributes:
        begin, full: gaps (A) at which the factors begin to grow, and are there in full.
        factors: by kind, at least 1. structures: from which they were learned.
    """

    begin: float
    full: float
    factors: dict[str, float]
    structures: int

    @staticmethod
    def fit(gaps: Tensor, squares: Mapping[str, Tensor]) -> SeparationScale:
        """From the gaps (structures,) of structures predicted without each other, and by kind their (error/σ)².

        As of any variance known from n structures only, a new error is distributed as Student's t: larger by √(n / (n - 2)).
        """
        n = len(gaps)
        widening = (n / (n - 2)) ** 0.5
        factors = {kind: max(1.0, widening * float(found.mean().sqrt())) for kind, found in squares.items()}
        return SeparationScale(float(gaps.min()), float(gaps.median()), factors, n)

    def factor(self, kind: str, structures: Structures) -> Tensor:
        """(structures,) factor on standard deviations of a kind; its logarithm grows as the gap does, from `begin` to `full`."""
        share = (largest_gaps(structures) - self.begin) / max(self.full - self.begin, 1e-9)
        return torch.exp(share.clamp(0.0, 1.0) * math.log(self.factors.get(kind, 1.0)))


def largest_gaps(structures: Structures) -> Tensor:
    """(structures,) A: the largest gap that separates the atoms of an isolated structure into two parts, the longest edge of its minimum
    spanning tree; of a molecule its longest bond. Zero where there is one atom, or lattice vectors."""
    from scipy.sparse.csgraph import minimum_spanning_tree

    out, parts = [], structures.positions.detach().cpu().double().split(structures.counts.tolist())
    for positions, periodic in zip(parts, structures.periodic.cpu(), strict=True):
        alone = len(positions) < 2 or bool(periodic.any())
        out.append(0.0 if alone else float(minimum_spanning_tree(torch.cdist(positions, positions).numpy()).max()))
    return structures.positions.new_tensor(out)


def farthest_apart(structures: Structures) -> list[int]:
    """Indices of the structures with the largest gaps, of those with gaps above APART; none where there are too few."""
    gaps = largest_gaps(structures).tolist()
    order = sorted((i for i, gap in enumerate(gaps) if gap > APART), key=lambda i: -gaps[i])
    counts, chosen, labels = structures.counts.tolist(), list[int](), 0
    for i in order[: round(SHARE * len(order))]:
        labels += 3 * counts[i] + 1
        if labels <= LABELS:
            chosen.append(i)
    return sorted(chosen) if len(chosen) >= FEWEST else []
