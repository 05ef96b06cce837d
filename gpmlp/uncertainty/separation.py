"""Separation: how far apart the parts of a structure are, and how much larger its errors are than those of structures nearer together.

What a model adds beyond its cutoff is learned up to some separation and used at larger ones, where no label says what it is worth. The
structures with the largest separations are therefore predicted without any of them, and their errors, in standard deviations that were
calibrated on structures left out one at a time, are the factor of structures as far apart.

Where hardly any label is of parts that do not reach each other, nothing says what the energy of a part alone is: no force tells of it, and
structures left out do not show it. There the variance of energies that is due to the inducing set is that of the process itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from gpmlp.core.quantities import Variance
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
        reach: A, gap from which on parts are alone, where hardly any label is of such; None = there are enough.
        prior: factor on the variance due to the inducing set with which it is that of the process.
    """

    begin: float
    full: float
    factors: dict[str, float]
    structures: int
    reach: float | None = None
    prior: float = 1.0

    @staticmethod
    def fit(gaps: Tensor, squares: Mapping[str, Tensor]) -> SeparationScale:
        """From the gaps (structures,) of structures predicted without each other, and by kind their (error/σ)².

        As of any variance known from n structures only, a new error is distributed as Student's t: larger by √(n / (n - 2)).
        """
        n = len(gaps)
        widening = (n / (n - 2)) ** 0.5
        factors = {kind: max(1.0, widening * float(found.mean().sqrt())) for kind, found in squares.items()}
        return SeparationScale(float(gaps.min()), float(gaps.median()), factors, n)

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> SeparationScale:
        """Restore what dataclasses.asdict gave; what other versions add is left aside."""
        return SeparationScale(**{f.name: plain[f.name] for f in fields(SeparationScale) if f.name in plain})

    @property
    def counts(self) -> bool:
        """Whether any structure has another variance for it."""
        return self.reach is not None or any(factor != 1.0 for factor in self.factors.values())

    def within(self, learned: Tensor, cutoff: float) -> SeparationScale:
        """With the cutoff as reach, if fewer than FEWEST of the gaps that were learned from are beyond it; nothing is beyond an infinite
        one."""
        few = math.isfinite(cutoff) and int((learned > cutoff).sum()) < FEWEST
        return replace(self, reach=cutoff) if few else self

    def with_amplitude(self, amplitude: float) -> SeparationScale:
        """Where the part due to the inducing set is `amplitude` times as large as it was."""
        return replace(self, prior=self.prior / amplitude)

    def factor(self, kind: str, gaps: Tensor) -> Tensor:
        """(structures,) factor on standard deviations of a kind; its logarithm grows as the gap does, from `begin` to `full`."""
        share = (gaps - self.begin) / max(self.full - self.begin, 1e-9)
        return torch.exp(share.clamp(0.0, 1.0) * math.log(self.factors.get(kind, 1.0)))

    def of_parts_alone(self, raw: Variance, calibrated: Variance, gaps: Tensor) -> Variance:
        """The calibrated variance of energies, with what the process itself says of structures whose gap is beyond the reach."""
        if self.reach is None:
            return calibrated
        of_process = (self.prior * raw.inducing).maximum(calibrated.inducing)
        beyond = (gaps > self.reach).to(raw.inducing.device)
        return replace(calibrated, inducing=torch.where(beyond, of_process, calibrated.inducing))


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
