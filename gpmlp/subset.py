"""Subset compares force covariances from a subset of the columns, the cheap form of large models, with those from all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gpmlp import regression
from gpmlp.potential import Potential
from gpmlp.regression import Model
from gpmlp.structures import Structures
from gpmlp.uncertainty.scores import spearman
from gpmlp.variances import VarianceModel

ATOMS = 100  # that are looked at
QUANTILES = (0.05, 0.5, 0.95)


def every_column(models: Sequence[Model], signal: Tensor, factor: Tensor) -> VarianceModel:
    """The variance model of all columns, without noise; where there are many it is too large to keep.

    Args:
        signal: (columns,) δ of each column; factor: R of all columns (SparsePosterior.factor).
    """
    blocks, lowers = tuple(m.blocks for m in models), tuple(lower for m in models for lower in m.lowers)
    priors = tuple(regression.make_priors(models, signal))
    return VarianceModel(priors, blocks, lowers, signal, factor, {}, {}, len(signal))


def error(
    potential: Potential, models: Sequence[Model], signal: Tensor, factor: Tensor, structures: Structures, seed: int
) -> dict[str, float]:
    """How force covariances as the potential has them compare with those from all columns, neither calibrated, without noise.

    Args:
        models, signal, factor: see `every_column`.
        structures: of which about ATOMS atoms are looked at, those of structures at random.

    Returns:
        columns, columns_of_fit; where they differ also, over atoms, QUANTILES of the ratio of standard deviations of forces
        (subset / all), Spearman's coefficient between these, and the median of |C - C'| / |C'|, the relative error of the 3 x 3
        covariance (Frobenius norms), as it is and once the subset is scaled by one number, which is what a calibration can do.
    """
    kept = potential.variances
    if kept is None:
        return {}
    found: dict[str, float] = {"columns": kept.n_columns, "columns_of_fit": kept.of_fit}
    if kept.n_columns == kept.of_fit:
        return found
    some, atoms = _sample(structures, seed)
    cheap, exact = (
        replace(potential, variances=v)(some, "forces", atoms=atoms, form="dtc", calibrated=False)
        .forces_covariance.epistemic[atoms]
        .double()
        for v in (replace(kept, noise={}), every_column(models, signal, factor))
    )
    sizes = exact.flatten(1).norm(dim=1)
    moving = sizes > 0  # the force on a lone atom is known
    if not moving.any():
        return found
    cheap, exact, sizes = cheap[moving], exact[moving], sizes[moving]
    traces = [c.diagonal(dim1=1, dim2=2).sum(1).sqrt() for c in (cheap, exact)]
    ratio, order = traces[0] / traces[1], spearman(*traces)
    scale = float((cheap * exact).sum() / cheap.square().sum())
    low, median, high = ratio.quantile(ratio.new_tensor(QUANTILES)).tolist()
    found |= {"atoms": len(ratio), "std_ratio_low": low, "std_ratio_median": median, "std_ratio_high": high}
    for name, c in (("covariance_error", cheap), ("covariance_error_scaled", scale * cheap)):
        found[name] = float(((c - exact).flatten(1).norm(dim=1) / sizes).quantile(0.5))
    return found | ({"std_spearman": order} if order == order else {})


def _sample(structures: Structures, seed: int) -> tuple[Structures, Tensor]:
    """Structures at random with about ATOMS atoms together, one at least, and at most so many of their atoms."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(structures), generator=generator)
    fit = structures.counts.cpu()[order].cumsum(0) <= ATOMS
    some = structures.select(order[: max(1, int(fit.sum()))])
    return some, torch.randperm(some.n_atoms, generator=generator)[:ATOMS].sort().values
