"""Left-out predictions: of training structures, by the posterior without their labels, without a new fit.

With C the posterior covariance of the labels of some structures and Σ their noise, leaving these out turns residuals r into
Σ (Σ - C)⁻¹ r and C into Σ (Σ - C)⁻¹ C (Rasmussen & Williams 2006, section 5.4.2, for more labels than one at a time). Inducing
variables and hyperparameters stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gpmlp.core import parallel, units
from gpmlp.core.environments import StructureEnvironments
from gpmlp.core.quantities import KINDS, Prediction, Targets, Variance
from gpmlp.core.structures import CHUNK_ATOMS, Structures, chunk_structures
from gpmlp.fitting import regression
from gpmlp.fitting.regression import InducingModel, WhitenedData
from gpmlp.gp import likelihood
from gpmlp.gp.posterior import FIXED, SparsePosterior
from gpmlp.gp.variance import VarianceModel
from gpmlp.potential import baselines
from gpmlp.potential.potential import Potential

EACH = 8  # structures of each config_type that come first, those set aside before others
NEAR_ATOMS = 600  # of a structure and those near it, which are left out together


@dataclass(frozen=True, eq=False)
class LeftOut:
    """Structures with their labels, and uncalibrated predictions of them that know none of these labels.

    Attributes:
        prediction: as the potential gives it where there is no label; of covariances only the diagonal of the part due to the data.
    """

    structures: Structures
    targets: Targets
    prediction: Prediction


def choose_left_out(
    structures: Structures, targets: Targets, held: Tensor, atoms: int, seed: int, among: Tensor | None = None
) -> list[int]:
    """Indices of structures to leave out in turn, of about so many atoms together.

    First come EACH of every config_type, as far as there are so many, and among these the structures that were set aside (`held`): no
    inducing point was chosen from them. All others follow at random.

    Args:
        among: indices of the structures to choose from; all if not given.
    """
    aside = set(held.tolist())
    candidates = torch.arange(len(structures)) if among is None else among
    order = candidates[torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))].tolist()
    order.sort(key=lambda i: i not in aside)
    taken: dict[str, int] = {}
    rank = []
    for i in order:
        label = targets.config_types[i]
        taken[label] = taken.get(label, 0) + 1
        rank.append(taken[label])
    turn = sorted(range(len(order)), key=lambda k: min(rank[k], EACH + 1))
    counts, total = structures.counts.tolist(), 0
    chosen: list[int] = []
    for i in (order[k] for k in turn):
        if baselines.is_isolated_atom(targets.config_types[i]) or (chosen and total + counts[i] > atoms):
            continue
        chosen.append(i)
        total += counts[i]
    return sorted(chosen)


def predict_left_out(
    potential: Potential,
    models: Sequence[InducingModel],
    learned: WhitenedData,
    solved: SparsePosterior,
    structures: Structures,
    targets: Targets,
    remaining: Targets,
    chosen: Sequence[int],
    near: dict[int, Tensor] | None = None,
) -> LeftOut | None:
    """Predict some of the structures without their labels; None if there are none that can be left out.

    Args:
        potential: with variances. learned, solved: of all columns and all data, these structures included.
        targets, remaining: labels of `structures`, and the same less the baselines.
        near: for some structures, others whose labels are left out with theirs (near-duplicates).
    """
    every = regression.variance_model(models, learned.signal, solved.factor)
    near = near or {}

    def leave_out(i: int) -> tuple[int, Structures, Targets, dict[str, Tensor], dict[str, Tensor]]:
        # of a long trajectory the frames next to it matter most
        others = sorted((near[i].tolist() if i in near else [i]), key=lambda j: abs(j - i))
        others = others[: max(1, int((structures.counts.cpu()[others].cumsum(0) <= NEAR_ATOMS).sum()))]
        members = structures.select(others), remaining.select(structures, others)
        return i, *members, *_errors(potential.variance_model(), models, every, learned, solved, *members)

    def predict(part: Structures) -> Prediction:
        return potential(part, KINDS, potential.novelty is not None, calibrated=False)

    found = parallel.map_pieces(leave_out, list(chosen))
    if not found:
        return None
    indices = [one[0] for one in found]
    here, labels = structures.select(indices), targets.select(structures, indices)
    pieces = parallel.map_pieces(predict, list(chunk_structures(here, CHUNK_ATOMS)))
    raw = Prediction.concatenate(pieces)
    each = [
        _replaced(raw.select(here, [k]), labels.select(here, [k]), members, known, error, variance)
        for k, (_, members, known, error, variance) in enumerate(found)
    ]
    return LeftOut(here, labels, Prediction.concatenate(each))


def _errors(
    own: VarianceModel,
    models: Sequence[InducingModel],
    every: VarianceModel,
    learned: WhitenedData,
    solved: SparsePosterior,
    structures: Structures,
    targets: Targets,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By kind of rows, errors (label - prediction) of a posterior without these labels, and variances due to the data by `own`."""
    environments = [StructureEnvironments.from_structures(m.descriptor, structures) for m in models]
    rows = regression.labelled_rows(models, structures, targets, environments=environments)
    residuals = {kind: r[:, -1] - r[:, :-1] @ solved.weights.to(r) for kind, r in rows.items()}
    error, variance = leave_one_out({k: r[:, :-1] for k, r in rows.items()}, residuals, every, learned.noise)
    if own.n_columns < own.of_fit:
        rows = regression.labelled_rows(models, structures, targets, own.blocks, environments)
        _, variance = leave_one_out({k: r[:, :-1] for k, r in rows.items()}, residuals, own, learned.noise)
    return error, variance


def leave_one_out(
    rows: dict[str, Tensor], residuals: dict[str, Tensor], model: VarianceModel, noise: dict[str, float]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By kind, errors (label - prediction) Σ (Σ - C)⁻¹ r and posterior variances Σ (Σ - C)⁻¹ C of a fit to the other data.

    Args:
        rows: by kind, K_ou of the labels; residuals: of the fit with them.
    """
    sizes = [len(r) for r in rows.values()]
    sigma = torch.cat([r.new_full((len(r),), 1.0 if k == FIXED else noise[k]) for k, r in rows.items()])
    _, left = model.whiten(torch.cat(list(rows.values())) / sigma[:, None])
    share = left @ left.T  # Σ^-½ C Σ^-½
    values, vectors = torch.linalg.eigh(share)
    values = values.clamp(0, 1 - 1e-12)  # labels in the data leave less than their noise
    r = torch.cat(list(residuals.values())).to(share) / sigma
    error = sigma * (vectors @ ((vectors.T @ r) / (1 - values)))
    variance = sigma**2 * (vectors.square() @ (values / (1 - values)))
    return dict(zip(rows, error.split(sizes), strict=True)), dict(zip(rows, variance.split(sizes), strict=True))


def _replaced(
    raw: Prediction,
    known: Targets,
    structures: Structures,
    targets: Targets,
    error: dict[str, Tensor],
    variance: dict[str, Tensor],
) -> Prediction:
    """The prediction of the first of the structures with other values (label - error) and variances due to the data.

    Args:
        known: its labels, baselines and all; targets: of all the structures, less baselines; error, variance: of their rows.
    """
    labels = likelihood.observed_labels(targets, structures.counts)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    given = 0
    for kind, label in labels.items():
        size = {"energies": len(structures), "forces": 3 * structures.n_atoms, "stresses": 6 * len(structures)}[kind]
        of_error, of_variance = (raw.energies.new_full((size,), torch.nan, dtype=torch.float64) for _ in range(2))
        common = label.noise.isnan()
        if common.any():
            of_error[label.rows[common]], of_variance[label.rows[common]] = error[kind], variance[kind]
        if not common.all():
            rows = slice(given, given + int((~common).sum()))
            given = rows.stop
            of_error[label.rows[~common]] = error[FIXED][rows] * label.noise[~common]
            of_variance[label.rows[~common]] = variance[FIXED][rows] * label.noise[~common].square()
        found[kind] = of_error, of_variance
    n, atoms = int(structures.counts[0]), len(known.forces)
    order = torch.tensor(units.VOIGT_INDEX, device=raw.energies.device)
    errors = {
        "energies": n * found["energies"][0][:1],
        "forces": found["forces"][0][: 3 * atoms].view(-1, 3),
        "stresses": found["stresses"][0][:6][order][None],
    }
    values = {kind: getattr(known, kind) - error for kind, error in errors.items()}
    known_values: dict[str, Any] = {
        kind: torch.where(value.isnan(), getattr(raw, kind), value) for kind, value in values.items()
    }
    return replace(
        raw,
        **known_values,
        energies_variance=_with_data(raw.energies_variance, n**2 * found["energies"][1][:1]),
        forces_covariance=_with_data(raw.forces_covariance, found["forces"][1][: 3 * atoms].view(-1, 3)),
        stresses_covariance=_with_data(raw.stresses_covariance, found["stresses"][1][None, :6]),
    )


def _with_data(variance: Variance | None, data: Tensor) -> Variance | None:
    """With another part due to the data, where that is known; of covariances the rest of it is left as zero."""
    if variance is None:
        return None
    scalar = variance.data.dim() == data.dim()
    old = variance.data if scalar else variance.data.diagonal(dim1=-2, dim2=-1)
    new = torch.where(data.isnan(), old, data)
    return replace(variance, data=new if scalar else torch.diag_embed(new))
