"""Check of the variances of a fit: how those from a subset of the columns compare with those from all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gpmlp.core.environments import StructureEnvironments
from gpmlp.core.structures import Structures
from gpmlp.fitting import regression
from gpmlp.fitting.regression import InducingModel
from gpmlp.gp import covariances
from gpmlp.gp.exact import ExactPosterior
from gpmlp.gp.prior import PriorCovariance
from gpmlp.gp.variance import VarianceModel
from gpmlp.potential.potential import Potential
from gpmlp.uncertainty.scores import spearman_correlation

SUBSET_ATOMS = 100  # whose covariances are compared
QUANTILES = (0.05, 0.5, 0.95)


def subset_error(
    potential: Potential,
    models: Sequence[InducingModel],
    signal: Tensor,
    of_all: Tensor | ExactPosterior,
    structures: Structures,
    seed: int,
) -> dict[str, float]:
    """How force covariances as the potential has them compare with those from all columns, neither calibrated, without noise.

    Args:
        signal: (columns,) δ of each column; of_all: R of all columns (SparsePosterior.factor), or the exact posterior.
        structures: of which about SUBSET_ATOMS atoms are compared, those of structures at random.

    Returns:
        columns, columns_of_fit; where they differ also, over atoms, QUANTILES of the ratio of standard deviations of forces
        (subset / all), Spearman's coefficient between these, and the median of |C - C'| / |C'|, the relative error of the 3 x 3
        covariance (Frobenius norms), as it is and once the subset is scaled by one number, which is what a calibration can do.
    """
    subset = potential.variances
    if subset is None:
        return {}
    numbers: dict[str, float] = {"columns": subset.n_columns, "columns_of_fit": subset.of_fit}
    if subset.n_columns == subset.of_fit and not isinstance(of_all, ExactPosterior):
        return numbers
    part, atoms = _draw_atoms(structures, seed)
    form = (
        "scaled" if isinstance(of_all, ExactPosterior) else "dtc"
    )  # what centres miss is hardly any of what functionals do

    def covariances_of(model: VarianceModel) -> Tensor:
        predict = replace(potential, variances=model, charges=None)  # whose columns are the same in both
        covariance = predict(part, "forces", atoms=atoms, form=form, calibrated=False).forces_covariance
        assert covariance is not None, "forces were asked for"
        return covariance.epistemic[atoms].double()

    cheap = covariances_of(replace(subset, noise={}))
    if isinstance(of_all, ExactPosterior):
        exact = _exact_covariances(models[0], of_all, part, atoms)
    else:
        exact = covariances_of(regression.variance_model(models, signal, of_all))
    sizes = exact.flatten(1).norm(dim=1)
    moving = sizes > 0  # the force on a lone atom is zero
    if not moving.any():
        return numbers
    cheap, exact, sizes = cheap[moving], exact[moving], sizes[moving]
    traces = [c.diagonal(dim1=1, dim2=2).sum(1).sqrt() for c in (cheap, exact)]
    ratio, order = traces[0] / traces[1], spearman_correlation(*traces)
    scale = float((cheap * exact).sum() / cheap.square().sum())
    low, median, high = ratio.quantile(ratio.new_tensor(QUANTILES)).tolist()
    numbers |= {"atoms": len(ratio), "std_ratio_low": low, "std_ratio_median": median, "std_ratio_high": high}
    for name, c in (("covariance_error", cheap), ("covariance_error_scaled", scale * cheap)):
        numbers[name] = float(((c - exact).flatten(1).norm(dim=1) / sizes).quantile(0.5))
    return numbers | ({"std_spearman": order} if order == order else {})


def _exact_covariances(model: InducingModel, given: ExactPosterior, structures: Structures, atoms: Tensor) -> Tensor:
    """(atoms, 3, 3) covariances of forces, k_FF - δ⁴ k_Fu C⁻¹ k_uF (Rasmussen & Williams 2006, eq. 2.26)."""
    (block,), kernel = (b.to(structures.positions) for b in model.of_mean), model.kernel
    here = StructureEnvironments.from_structures(model.descriptor, structures)
    here.keep_jacobian(len(atoms))
    rows = covariances.covariance_rows(structures, here, kernel, (block,), stresses=False, atoms=atoms).forces
    half = given.half_solve(given.signal**2 * rows.T.double()).T.unflatten(0, (-1, 3))
    prior = PriorCovariance(kernel, {z: given.signal * std for z, std in block.relative.items()})
    return prior.forces(structures, here, atoms).double() - half @ half.mT


def _draw(structures: Structures, atoms: int, seed: int) -> tuple[list[int], torch.Generator]:
    """Structures at random with about so many atoms together, one at least, and the generator for what else is drawn."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(structures), generator=generator)
    fit = structures.counts.cpu()[order].cumsum(0) <= atoms
    return [int(i) for i in order[: max(1, int(fit.sum()))]], generator


def _draw_atoms(structures: Structures, seed: int) -> tuple[Structures, Tensor]:
    """Structures at random with about SUBSET_ATOMS atoms together, and at most so many of their atoms."""
    chosen, generator = _draw(structures, SUBSET_ATOMS, seed)
    part = structures.select(chosen)
    return part, torch.randperm(part.n_atoms, generator=generator)[:SUBSET_ATOMS].sort().values
