"""Influence: what leaving the labels of one structure out of a fit does to the mean of any functional."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Influence(NamedTuple):
    """What leaving labels of structures out of a fit does to it, all columns kept, in whitened columns b = R⁻ᵀ D L⁻¹ k_u.

    The mean of a functional with the row b changes by -b.s, with s = Bᵀ (I - B Bᵀ)⁻¹ r of the structure's rows B and residuals r of the
    fit, over the noise.

    Attributes:
        shifts: (structures, columns) s.
        rows: (probes, columns) some of the rows (I - B Bᵀ)⁻¹ B of the structures, whose products with a shift are what the mean without
            the structure, too, changes by.
        errors, variances: (probes,) of the mean and the posterior without the structure, over the noise.
        owner: (probes,) number of the structure among `shifts`; kind: (probes,) of the label, place in KINDS.
    """

    shifts: Tensor
    rows: Tensor
    errors: Tensor
    variances: Tensor
    owner: Tensor
    kind: Tensor

    @staticmethod
    def concatenate(parts: Sequence[Influence]) -> Influence:
        """Of all structures."""
        first = torch.tensor([0, *(len(p.shifts) for p in parts)]).cumsum(0).tolist()
        owners = torch.cat([p.owner + n for p, n in zip(parts, first[:-1], strict=True)])
        joined = Influence(*(torch.cat(values) for values in zip(*parts, strict=True)))
        return joined._replace(owner=owners)
