"""Checks of the variances of a fit: the amplitude of what inducing variables miss, by leaving structures out, and the column subset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gpmlp.core import parallel
from gpmlp.core.environments import StructureEnvironments
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting import regression
from gpmlp.fitting.left_out import leave_one_out
from gpmlp.fitting.near_duplicates import IndependentGroups
from gpmlp.fitting.regression import InducingModel, WhitenedData
from gpmlp.gp import likelihood
from gpmlp.gp.local_variance import inducing_variance
from gpmlp.gp.posterior import SparsePosterior
from gpmlp.gp.variance import VarianceModel
from gpmlp.potential.potential import Potential
from gpmlp.uncertainty.scores import spearman_correlation
from gpmlp.uncertainty.variance_weights import fit_variance_weights

SUBSET_ATOMS = 100  # whose covariances are compared
QUANTILES = (0.05, 0.5, 0.95)

ATOMS = 400  # of the structures that are left out in turn
NEAR_ATOMS = 600  # of a structure and those near it, which are left out together
ENOUGH = 100  # forces


def leave_out_amplitude(
    potential: Potential,
    models: Sequence[InducingModel],
    learned: WhitenedData,
    solved: SparsePosterior,
    structures: Structures,
    remaining: Targets,
    groups: IndependentGroups,
    seed: int,
) -> float:
    """The w under which forces of structures left out are most likely: var = w [k_gg - k_gu K_uu⁻¹ k_ug] + data + noise.

    DTC's evidence chooses the signal variance at the inducing variables, for which it has data; what lies between them is noise
    to it, and mostly far smaller than this signal variance implies. With C the posterior covariance of the labels of one structure
    and Σ their noise, leaving the structure out turns its residuals r into Σ (Σ - C)⁻¹ r and C into Σ (Σ - C)⁻¹ C: no fit is
    made again (Rasmussen & Williams 2006, section 5.4.2, for more labels than one at a time). Inducing variables stay. Structures near
    it are left out with it.

    Args:
        potential: with the variances that w is for.
        learned, solved: of all columns and all data, these structures included.
        remaining: labels less the baselines; groups: of the structures that are near each other.

    Returns:
        w; 1 where there are less than 100 forces, or forces all have noises of their own.
    """
    model = potential.variances
    if model is None:
        return 1.0
    every = regression.variance_model(models, learned.signal, solved.factor)

    def leave_out(group: tuple[Structures, Targets]) -> tuple[Tensor, Tensor, Tensor] | None:
        """Errors of the forces of the first structure of a group, the variance that inducing variables miss, and the rest of it."""
        structures, targets = group
        environments = [StructureEnvironments.from_structures(m.descriptor, structures) for m in models]
        rows = regression.labelled_rows(models, structures, targets, environments=environments)
        judged = _common_forces(structures, targets)
        if not len(judged):
            return None
        z = {kind: r[:, -1] - r[:, :-1] @ solved.weights.to(r) for kind, r in rows.items()}
        error, opened = leave_one_out({k: r[:, :-1] for k, r in rows.items()}, z, every, learned.noise)
        if model.n_columns < model.of_fit:
            rows = regression.labelled_rows(models, structures, targets, model.blocks, environments)
            _, opened = leave_one_out({k: r[:, :-1] for k, r in rows.items()}, z, model, learned.noise)
        n = len(judged)
        missed = _missed_variance(model, structures, judged, environments, rows["forces"][:n, :-1])
        return error["forces"][:n], missed, opened["forces"][:n] + learned.noise["forces"] ** 2

    pieces = parallel.map_pieces(leave_out, _some_groups(structures, remaining, groups, seed))
    results = [piece for piece in pieces if piece is not None]
    if sum(len(error) for error, _, _ in results) < ENOUGH:
        return 1.0
    errors, missed, rest = (torch.cat(parts) for parts in zip(*results, strict=True))
    return float(fit_variance_weights(errors, missed[:, None], rest))


def _common_forces(structures: Structures, targets: Targets) -> Tensor:
    """Labelled force components of the first structure that have the common noise."""
    labels = likelihood.observed_labels(targets, structures.counts)["forces"]
    components = labels.rows[labels.noise.isnan()]
    return components[components < 3 * structures.counts[0]]


def _missed_variance(
    model: VarianceModel,
    structures: Structures,
    components: Tensor,
    environments: Sequence[StructureEnvironments],
    rows: Tensor,
) -> Tensor:
    """k_gg - k_gu K_uu⁻¹ k_ug of some force components, whose rows K_ou these are."""
    atoms, place = (components // 3).unique(return_inverse=True)
    priors = [p.forces(structures, v, atoms) for p, v in zip(model.priors, environments, strict=True)]
    variance = sum(priors[1:], start=priors[0]).diagonal(dim1=1, dim2=2)[place, components % 3]
    explained, _ = model.whiten(rows)
    return inducing_variance(variance, explained.square().sum(1), 1.0)


def _some_groups(
    structures: Structures, targets: Targets, groups: IndependentGroups, seed: int
) -> list[tuple[Structures, Targets]]:
    """Structures at random of about ATOMS atoms together, each first among those that are near it, of NEAR_ATOMS atoms at most; of a
    larger structure the forces on so many of its atoms."""
    chosen, generator = _draw(structures.select(groups.leaders), ATOMS, seed)
    counts = structures.counts.cpu()
    some = []
    for i in chosen:
        near = groups.near[i]
        near = near[: max(1, int((counts[near].cumsum(0) <= NEAR_ATOMS).sum()))]
        some.append((structures.select(near), targets.select(structures, near)))
    if some[0][0].counts[0] > ATOMS:
        one, labels = some[0]
        others = torch.randperm(one.n_atoms, generator=generator)[ATOMS:].to(labels.forces.device)
        some[0] = (one, replace(labels, forces=labels.forces.index_fill(0, others, torch.nan)))
    return some


def subset_error(
    potential: Potential,
    models: Sequence[InducingModel],
    signal: Tensor,
    factor: Tensor,
    structures: Structures,
    seed: int,
) -> dict[str, float]:
    """How force covariances as the potential has them compare with those from all columns, neither calibrated, without noise.

    Args:
        signal: (columns,) δ of each column; factor: R of all columns (SparsePosterior.factor).
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
    if subset.n_columns == subset.of_fit:
        return numbers
    part, atoms = _draw_atoms(structures, seed)

    def covariances_of(model: VarianceModel) -> Tensor:
        predict = replace(potential, variances=model)
        covariance = predict(part, "forces", atoms=atoms, form="dtc", calibrated=False).forces_covariance
        assert covariance is not None, "forces were asked for"
        return covariance.epistemic[atoms].double()

    cheap = covariances_of(replace(subset, noise={}))
    exact = covariances_of(regression.variance_model(models, signal, factor))
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
