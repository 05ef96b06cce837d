"""Left out in turn, training structures tell how large the process is that the inducing variables do not see."""

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
from gpmlp.fitting.regression import InducingModel, WhitenedData
from gpmlp.gp import likelihood
from gpmlp.gp.local_variance import inducing_variance
from gpmlp.gp.posterior import FIXED, SparsePosterior
from gpmlp.gp.variance import VarianceModel
from gpmlp.potential.potential import Potential
from gpmlp.uncertainty.calibration import fit_variance_weights
from gpmlp.uncertainty.scores import spearman_correlation

SUBSET_ATOMS = 100  # that are looked at
QUANTILES = (0.05, 0.5, 0.95)

ATOMS = 400  # of the structures that are left out in turn
ENOUGH = 100  # forces


def leave_out_amplitude(
    potential: Potential,
    models: Sequence[InducingModel],
    learned: WhitenedData,
    solved: SparsePosterior,
    structures: Structures,
    remaining: Targets,
    seed: int,
) -> float:
    """The w under which forces of structures left out are most likely: var = w [k_gg - k_gu K_uu⁻¹ k_ug] + data + noise.

    DTC's evidence chooses the size of the process at the inducing variables, for which it has data; what lies between them is noise
    to it, and mostly far smaller than the same size would have it. With C the posterior covariance of the labels of one structure
    and Σ their noise, leaving the structure out turns its residuals r into Σ (Σ - C)⁻¹ r and C into Σ (Σ - C)⁻¹ C: no fit is
    made again (Rasmussen & Williams 2006, section 5.4.2, for more labels than one at a time). Inducing variables stay.

    Args:
        potential: with the variances that w is for.
        learned, solved: of all columns and all data, these structures included.
        remaining: labels less the baselines.

    Returns:
        w; 1 where there are less than 100 forces, or forces all have noises of their own.
    """
    kept = potential.variances
    every = regression.variance_model(models, learned.signal, solved.factor)

    def look(piece: tuple[Structures, Targets]) -> tuple[Tensor, Tensor, Tensor] | None:
        """Errors of the forces of a structure, what inducing variables miss of them, and the rest of their variance."""
        structure, targets = piece
        views = [StructureEnvironments.from_structures(m.descriptor, structure) for m in models]
        rows = regression.labelled_rows(models, structure, targets, views=views)
        if "forces" not in rows:
            return None
        z = {kind: r[:, -1] - r[:, :-1] @ solved.weights.to(r) for kind, r in rows.items()}
        left, spread = _left_out({k: r[:, :-1] for k, r in rows.items()}, z, every, learned.noise)
        if kept.n_columns < kept.of_fit:
            rows = regression.labelled_rows(models, structure, targets, kept.blocks, views)
            _, spread = _left_out({k: r[:, :-1] for k, r in rows.items()}, z, kept, learned.noise)
        missed = _missed(kept, structure, targets, views, rows["forces"][:, :-1])
        return left, missed, spread + learned.noise["forces"] ** 2

    seen = [found for found in parallel.map_pieces(look, _some(structures, remaining, seed)) if found is not None]
    if sum(len(left) for left, _, _ in seen) < ENOUGH:
        return 1.0
    errors, missed, rest = (torch.cat(parts) for parts in zip(*seen, strict=True))
    return float(fit_variance_weights(errors, missed[:, None], rest))


def _missed(
    model: VarianceModel, structure: Structures, targets: Targets, views: Sequence[StructureEnvironments], rows: Tensor
) -> Tensor:
    """k_gg - k_gu K_uu⁻¹ k_ug of the known forces with the common noise, whose rows K_ou these are."""
    seen = likelihood.observed_labels(targets, structure.counts)["forces"]
    known = seen.rows[seen.noise.isnan()]
    atoms, place = (known // 3).unique(return_inverse=True)
    prior = sum(p.forces(structure, v, atoms) for p, v in zip(model.priors, views, strict=True))
    explained, _ = model.whiten(rows)
    return inducing_variance(prior.diagonal(dim1=1, dim2=2)[place, known % 3], explained.square().sum(1), 1.0)


def _some(structures: Structures, targets: Targets, seed: int) -> list[tuple[Structures, Targets]]:
    """Structures at random, each by itself, of about ATOMS atoms together; of a larger one the forces on so many of its atoms."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(structures), generator=generator)
    fit = structures.counts.cpu()[order].cumsum(0) <= ATOMS
    chosen = [int(i) for i in order[: max(1, int(fit.sum()))]]
    some = [(structures.select([i]), targets.select(structures, [i])) for i in chosen]
    if some[0][0].n_atoms > ATOMS:
        one, known = some[0]
        unseen = torch.randperm(one.n_atoms, generator=generator)[ATOMS:].to(known.forces.device)
        some[0] = (one, replace(known, forces=known.forces.index_fill(0, unseen, torch.nan)))
    return some


def _left_out(
    rows: dict[str, Tensor], residuals: dict[str, Tensor], model: VarianceModel, noise: dict[str, float]
) -> tuple[Tensor, Tensor]:
    """Errors of the forces of a structure, and what the data leave open of them, had it not been learned from.

    Args:
        rows: by kind, K_ou of its labels; residuals: of the fit with it.
    """
    sizes = [len(r) for r in rows.values()]
    sigma = torch.cat([r.new_full((len(r),), 1.0 if k == FIXED else noise[k]) for k, r in rows.items()])
    _, left = model.whiten(torch.cat(list(rows.values())) / sigma[:, None])
    share = left @ left.T  # Σ^-½ C Σ^-½
    values, vectors = torch.linalg.eigh(share)
    values = values.clamp(0, 1 - 1e-12)  # labels that were learned leave less than their noise
    r = torch.cat(list(residuals.values())).to(share) / sigma
    error = sigma * (vectors @ ((vectors.T @ r) / (1 - values)))
    variance = sigma**2 * (vectors.square() @ (values / (1 - values)))
    here = dict(zip(rows, range(len(sizes)), strict=True))["forces"]
    forces = slice(sum(sizes[:here]), sum(sizes[: here + 1]))
    return error[forces], variance[forces]


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
        for v in (replace(kept, noise={}), regression.variance_model(models, signal, factor))
    )
    sizes = exact.flatten(1).norm(dim=1)
    moving = sizes > 0  # the force on a lone atom is known
    if not moving.any():
        return found
    cheap, exact, sizes = cheap[moving], exact[moving], sizes[moving]
    traces = [c.diagonal(dim1=1, dim2=2).sum(1).sqrt() for c in (cheap, exact)]
    ratio, order = traces[0] / traces[1], spearman_correlation(*traces)
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
    fit = structures.counts.cpu()[order].cumsum(0) <= SUBSET_ATOMS
    some = structures.select(order[: max(1, int(fit.sum()))])
    return some, torch.randperm(some.n_atoms, generator=generator)[:SUBSET_ATOMS].sort().values
