"""Rows of a fit that are kept until they are asked for again: K_fu of structures that are to be left out in turn."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpmlp.core.quantities import KINDS
from gpmlp.core.structures import Structures
from gpmlp.gp.covariances import CovarianceRows

KEPT_BYTES = 128 << 20  # of rows, at most


@dataclass(frozen=True, eq=False)
class KeptRows:
    """K_fu of some structures with all columns, by the number of the structure."""

    rows: dict[int, CovarianceRows] = field(default_factory=dict)

    def among(self, numbers: Collection[int]) -> KeptRows:
        """Of these structures, as far as they are here."""
        return KeptRows({i: self.rows[i] for i in numbers if i in self.rows})

    def joined(self, others: KeptRows) -> KeptRows:
        """With those of other structures."""
        return KeptRows(self.rows | others.rows)

    def of(
        self, structures: Structures, numbers: Sequence[int], columns: int, forces: bool, stresses: bool
    ) -> CovarianceRows | None:
        """Of several structures one after another; None unless all that is asked for is there of each."""
        parts = [self.rows[i] for i in numbers if i in self.rows]
        there = [(r.energies.shape[1], len(r.forces), len(r.stresses)) for r in parts]
        if there != [(columns, 3 * n * forces, 6 * stresses) for n in structures.counts.tolist()]:
            return None
        return CovarianceRows(*(torch.cat([getattr(r, kind) for r in parts]) for kind in KINDS))


def affordable(structures: Structures, wanted: Sequence[int], columns: int) -> Tensor:
    """Numbers, rising, of the first of the wanted structures whose rows take KEPT_BYTES together."""
    distinct = torch.tensor([*dict.fromkeys(wanted)], dtype=torch.long)
    sizes = 8 * columns * (3 * structures.counts.cpu()[distinct] + 7)
    return distinct[sizes.cumsum(0) <= KEPT_BYTES].sort().values


def rows_of_each(structures: Structures, parts: Sequence[CovarianceRows]) -> Iterator[CovarianceRows]:
    """K_fu of each of several structures, from that of all by each descriptor."""
    offsets = structures.offsets.tolist()
    for k in range(len(structures)):
        of = slice(k, k + 1), slice(3 * offsets[k], 3 * offsets[k + 1]), slice(6 * k, 6 * k + 6)
        yield CovarianceRows(
            *(
                torch.cat([getattr(part, kind)[rows] for part in parts], dim=1)
                for kind, rows in zip(KINDS, of, strict=True)
            )
        )
