"""Left-out predictions: of training structures, by the posterior without their labels, without a new fit.

With C the posterior covariance of the labels of some structures and Σ their noise, leaving these out turns residuals r into
Σ (Σ - C)⁻¹ r and C into Σ (Σ - C)⁻¹ C (Rasmussen & Williams 2006, section 5.4.2, for more labels than one at a time).

Their environments are no inducing points then either, nor their functionals inducing variables, as those of a new structure are not. The
mean is k_gu w with w = L⁻ᵀ D β, so without some of the inducing variables it is the posterior given that their weights w_r = Tᵀ β are
zero, T the columns of D L⁻¹: T is projected out of the rows a of the prior, and R⁻ᵀ T out of the rows b of the posterior.
Hyperparameters stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpmlp.core import parallel, units
from gpmlp.core.environments import Descriptor, StructureEnvironments
from gpmlp.core.quantities import KINDS, Prediction, Targets, Variance
from gpmlp.core.structures import Structures
from gpmlp.fitting import regression
from gpmlp.fitting.exact_model import ExactModel
from gpmlp.fitting.influence import Influence
from gpmlp.fitting.kept_rows import KeptRows
from gpmlp.fitting.near_duplicates import IndependentGroups
from gpmlp.fitting.regression import InducingModel, WhitenedData
from gpmlp.fitting.standard_labels import StandardLabels
from gpmlp.fitting.workers import Report, Workers, silent
from gpmlp.gp.covariances import CovarianceRows
from gpmlp.gp.exact import ExactPosterior
from gpmlp.gp.functionals import FunctionalBlock
from gpmlp.gp.posterior import SparsePosterior
from gpmlp.gp.variance import ByDescriptor, VarianceModel, VarianceRequest, WhitenedRows
from gpmlp.potential import baselines
from gpmlp.potential.charges import ChargePosterior
from gpmlp.potential.potential import Potential
from gpmlp.uncertainty import residuals
from gpmlp.uncertainty.variance_weights import fit_variance_weights

EACH = 8  # structures of each config_type that come first, moving or at rest, those set aside before others
NEAR_ATOMS = 600  # of a structure and those near it, which are left out together
FORCE_ATOMS = 16  # of a structure, whose force variances are computed: its errors depend on each other
PART_ATOMS = 128  # of structures whose rows are made together
SAME = 2e-6  # |x - x'|² of an environment and a centre that is this environment
EVERY = slice(None), slice(None), slice(None)
ENOUGH = 100  # forces from which the amplitude is learned


@dataclass(frozen=True, eq=False)
class LeftOut:
    """Structures with their labels, and uncalibrated predictions of them that know none of these labels.

    Attributes:
        prediction: as the potential gives it where there is no label; of covariances only the diagonal of the part due to the data.
        expected: where the mean is exact, by kind the mean squares of the errors (of energies per atom) that its process expects, noise
            included; otherwise empty.
        influence: of leaving each of them out.
        together: other structures, of which none knows the labels of any other.
    """

    structures: Structures
    targets: Targets
    prediction: Prediction
    expected: dict[str, Tensor] = field(default_factory=dict)
    influence: Influence | None = None
    together: LeftOut | None = None

    def select(self, indices: Sequence[int]) -> LeftOut:
        """Some of the structures."""
        parts = self.structures.select(indices), self.targets.select(self.structures, indices)
        return LeftOut(*parts, self.prediction.select(self.structures, indices))

    def amplitude(self, noise: dict[str, float]) -> float:
        """The w under which forces are most likely: var = w [k_gg - k_gu K_uu⁻¹ k_ug] + data + noise².

        DTC's evidence chooses the signal variance at the inducing variables, for which it has data; what lies between them is noise
        to it, and mostly far smaller than this signal variance implies.

        Where there are less than ENOUGH, the exact process says how large they are, if there is one; without forces, how large those of
        energies are.

        Args:
            noise: in the fit, by kind, of energies per atom; labels with a noise of their own do not count.

        Returns:
            w; 1 where neither is known.
        """
        kind = "forces" if self.prediction.forces_covariance is not None else "energies"
        if kind not in noise or (kind == "energies" and not self.expected):
            return 1.0
        errors, parts, _ = residuals.split_residuals(kind, self.structures, self.targets, self.prediction)
        common = getattr(self.targets, f"{kind}_noise").flatten().isnan() & ~errors.isnan() & parts.isfinite().all(1)
        if int(common.sum()) < ENOUGH or kind == "energies":
            if not self.expected or not common.any():
                return 1.0
            errors = self.expected[kind].to(errors).sqrt()
        missed, opened, _ = parts[common].unbind(1)
        return float(fit_variance_weights(errors[common], missed[:, None], opened + noise[kind] ** 2))


class Turns(NamedTuple):
    """Structures that are left out in turn, those near each of them, and all that are left out, the most important ones first."""

    chosen: list[int]
    near: dict[int, Tensor]
    every: list[int]

    @staticmethod
    def of_groups(
        structures: Structures, targets: Targets, held: Tensor, atoms: int, seed: int, groups: IndependentGroups
    ) -> Turns:
        """As `choose_left_out`, of the leaders of groups of near-duplicates; none of no atoms."""
        chosen = choose_left_out(structures, targets, held, atoms, seed, groups.leaders) if atoms else []
        near = dict(zip(groups.leaders.tolist(), groups.near, strict=True))
        return Turns(chosen, near, [*chosen, *(j for i in chosen for j in _others_near(structures, i, near))])


def choose_left_out(
    structures: Structures, targets: Targets, held: Tensor, atoms: int, seed: int, among: Tensor | None = None
) -> list[int]:
    """Indices of structures to leave out in turn, of about so many atoms together.

    First come EACH of every config_type, of those with forces and of those at rest, as far as there are so many, and among these the
    structures that were set aside (`held`): no inducing point was chosen from them. All others follow at random.

    Args:
        among: indices of the structures to choose from; all if not given.
    """
    aside = set(held.tolist())
    candidates = torch.arange(len(structures)) if among is None else among
    order = candidates[torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))].tolist()
    order.sort(key=lambda i: i not in aside)
    pushed = (targets.forces.nan_to_num().abs() > residuals.ZERO_LABEL["forces"]).any(1).cpu()
    moving = torch.zeros(len(structures), dtype=torch.bool)
    moving[structures.structure_of_atom.cpu()[pushed]] = True
    taken: dict[tuple[str, bool], int] = {}
    rank = []
    for i in order:
        label = targets.config_types[i], bool(moving[i])
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
    workers: Workers | None = None,
    report: Report = silent,
    given: ExactPosterior | None = None,
    together: Sequence[int] = (),
    rows: KeptRows | None = None,
) -> LeftOut | None:
    """Predict some of the structures without their labels; None if there are none that can be left out.

    Args:
        potential: with variances. learned, solved: of all columns and all data, these structures included.
        targets, remaining: labels of `structures`, and the same less the baselines.
        near: for some structures, others whose labels are left out with theirs (near-duplicates).
        workers: who does it; this process if not given. report: of the structures done.
        given: where the mean is exact. together: structures to leave out all at once as well. rows: of some structures, if they are there.
    """
    if not chosen:
        return None
    beside, rows = {i: _others_near(structures, i, near or {}) for i in chosen}, rows or KeptRows()
    errors, expected = dict[int, Tensor](), dict[str, Tensor]()
    if given is not None and (exact := models[0].exact) is not None:
        errors, expected = _exact_errors(exact, given, structures, remaining, chosen, beside)
    workers = workers or Workers()
    wanted: dict[str, Any] = {kind: bool(getattr(remaining, kind).isfinite().any()) for kind in KINDS}
    own = potential.variance_model()
    every = regression.variance_model(models, learned.signal, solved.factor)
    fitted = _Fitted(
        potential,
        tuple(m.descriptor for m in models),
        tuple(m.of for m in models),
        # of a subset of the columns come the variances, the errors of all
        (own,) if errors else (every,) if own.n_columns == own.of_fit else (every, own),
        errors,
        solved.weights[:0] if errors else solved.weights,
        learned.noise,
        VarianceRequest(**wanted),
    )

    def select(indices: Sequence[int]) -> _Labelled:
        labels = targets.select(structures, indices), remaining.select(structures, indices)
        return _Labelled(structures.select(indices), *labels, indices, rows.among(indices))

    parts = [
        (select(part), [select(beside[i]) if beside[i] else None for i in part]) for part in _parts(structures, chosen)
    ]
    pieces = [parts] if workers.shares else [[part] for part in parts]
    shared = workers.keep(fitted)
    found = workers.map(_leave_out, [(shared, piece) for piece in pieces], report)
    predicted, influence = zip(*sum(found, []), strict=True)
    about = structures.select(chosen), targets.select(structures, chosen), Prediction.concatenate(predicted)
    block = select(together) if together else None
    apart = LeftOut(block.structures, block.targets, fitted.leave_out_together(block)) if block else None
    return LeftOut(*about, expected, Influence.concatenate(influence), apart)


def _exact_errors(
    exact: ExactModel,
    given: ExactPosterior,
    structures: Structures,
    remaining: Targets,
    chosen: Sequence[int],
    beside: dict[int, list[int]],
) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    """Errors of each structure left out, where the mean is exact, and by kind the mean squares that its process expects."""
    labels = {i: remaining.forces[structures.structure_of_atom == i].flatten() for i in chosen}
    left = {i: exact.left_out(given, [i, *beside[i]], labels[i]) for i in chosen}
    errors, squares = {i: error for i, (error, _) in left.items()}, [left[i][1] for i in chosen]
    energies = torch.stack([each[0] for each in squares]) / structures.counts[chosen].to(squares[0]).square()
    return errors, {"energies": energies, "forces": torch.cat([each[1:-6] for each in squares])}


@dataclass(frozen=True, eq=False)
class _Labelled:
    """Some structures, their labels, the same less the baselines, their numbers among all, and rows of some of them."""

    structures: Structures
    targets: Targets
    remaining: Targets
    numbers: Sequence[int]
    rows: KeptRows


@dataclass(frozen=True, eq=False)
class _Fitted:
    """What predictions of left-out structures need of a fit.

    Attributes:
        potential: with variances; models: that of the variances with all columns, and that of the potential, if it has fewer.
        functionals_of: for each descriptor, numbers of the structures whose functionals are inducing variables.
        errors: where the mean is exact, (1 + 3 atoms + 6,) errors of energy, forces and stress of each structure that is left out.
        weights: of the mean, none where that is exact; noise: by kind.
    """

    potential: Potential
    descriptors: tuple[Descriptor, ...]
    functionals_of: tuple[tuple[int, ...], ...]
    models: tuple[VarianceModel, ...]
    errors: dict[int, Tensor]
    weights: Tensor
    noise: dict[str, float]
    request: VarianceRequest

    def standard(
        self, labelled: _Labelled, environments: ByDescriptor, unused: Sequence[Sequence[_Unused]]
    ) -> list[StandardLabels]:
        """The labels over their noise, by each of the models, without the `unused` columns: each structure without its own, or all
        without the same ones; and last with all columns, by the mean and what variances have."""
        out, part, whole, residual = [], labelled.structures, None, None
        for model, columns in zip(self.models, unused, strict=True):
            wanted = self.request.forces, self.request.stresses
            k_fu = labelled.rows.of(part, labelled.numbers, model.n_columns, *wanted)
            k_fu = k_fu or model.covariance_rows(part, environments, *wanted)
            rows, mean = self.whitened(model, part, k_fu), None
            if model is self.models[0] and not self.errors:
                weights = self.weights.to(model.signal)
                mean = CovarianceRows(*(getattr(k_fu, kind).to(weights) @ weights for kind in KINDS))
                residual = CovarianceRows(*(getattr(mean, kind).clone() for kind in KINDS))
            whole = replace(rows, b=CovarianceRows(*(getattr(rows.b, kind).clone() for kind in KINDS)))
            for k, gone in enumerate(columns):
                gone.leave(rows, mean, _rows_of(part, k) if len(columns) == len(part) else EVERY)
            out.append(StandardLabels.make(rows, mean, part, labelled.remaining, self.noise))
        assert whole is not None, "there is a model"
        return [*out, StandardLabels.make(whole, residual, part, labelled.remaining, self.noise)]

    def whitened(self, model: VarianceModel, structures: Structures, rows: CovarianceRows) -> WhitenedRows:
        """Of the columns of a model and, where it is the potential's, of charges."""
        charges, whitened = self.potential.charges, model.whitened(rows)
        return (
            whitened if charges is None or model is not self.models[-1] else charges.with_charges(structures, whitened)
        )

    def unused(self, here: _Seen, beside: _Seen | None, k: int) -> list[_Unused]:
        """By each of the models, its columns at structure k and at those beside it."""
        seen = [here.features(k), *([beside.features()] if beside else [])]
        numbers = {here.labelled.numbers[k], *(beside.labelled.numbers if beside else ())}
        return self._unused(seen, numbers)

    def _unused(self, seen: list[list[tuple[Tensor, Tensor]]], numbers: set[int]) -> list[_Unused]:
        """By each of the models, its columns at structures of these features and numbers."""
        columns = [_columns_at(model, seen, self.functionals_of, numbers) for model in self.models]
        charges = self.potential.charges
        joint = [charges.posterior if charges and m is self.models[-1] else None for m in self.models]
        return [_Unused.make(m, c, self.weights, p) for m, c, p in zip(self.models, columns, joint, strict=True)]

    def environments(self, labelled: _Labelled) -> _Seen:
        """Of the structures, by descriptor."""
        return _Seen(
            labelled, [StructureEnvironments.from_structures(d, labelled.structures) for d in self.descriptors]
        )

    def leave_out(self, part: tuple[_Labelled, list[_Labelled | None]]) -> tuple[Prediction, Influence]:
        """Predictions of structures, each without its labels and those of the others beside it, and without inducing variables at
        these, and what that does to the fit."""
        labelled, near = part
        here, seen = labelled.structures, self.environments(labelled)
        beside = [self.environments(others) if others else None for others in near]
        unused = [self.unused(seen, other, k) for k, other in enumerate(beside)]
        labels = self.standard(labelled, seen.by_descriptor, list(zip(*unused, strict=True)))
        error, variance = self.weights.new_full((2, 7 * len(here) + 3 * here.n_atoms), torch.nan)
        influence = []
        for k, other in enumerate(beside):
            more: Sequence[StandardLabels | None] = [None] * len(labels)
            if other:
                more = self.standard(other.labelled, other.by_descriptor, [[columns] for columns in unused[k]])
            *found, whole = (a.left_out(k, b) for a, b in zip(labels, more, strict=True))
            place, sigma, known = found[0].place, found[0].sigma, whole.errors
            error[place], variance[place] = sigma * found[0].errors[: len(place)], sigma**2 * found[-1].variances
            if self.errors:
                at = torch.cat([torch.arange(len(error))[rows] for rows in _places_of(here, k)])
                error[at] = self.errors[labelled.numbers[k]].where(~error[at].isnan(), torch.nan)
                known = torch.cat([error[place].to(sigma) / sigma, torch.zeros_like(known[len(place) :])])
            influence.append(whole.influence(known, _kinds_of(place, here), labelled.numbers[k]))
        return self._predicted(seen, labels[-2].rows, error, variance), Influence.concatenate(influence)

    def leave_out_together(self, labelled: _Labelled) -> Prediction:
        """Predictions of structures without the labels of any of them and without inducing variables at any of them."""
        seen, here = self.environments(labelled), labelled.structures
        unused = self._unused([seen.features()], set(labelled.numbers))
        labels = self.standard(labelled, seen.by_descriptor, [[columns] for columns in unused])
        error, variance = self.weights.new_full((2, 7 * len(here) + 3 * here.n_atoms), torch.nan)
        of_mean, of_variance = (labels[k].left_out(slice(None), None) for k in (0, -2))
        error[of_mean.place] = of_mean.sigma * of_mean.errors
        variance[of_mean.place] = of_mean.sigma**2 * of_variance.variances
        return self._predicted(seen, labels[-2].rows, error, variance)

    def _predicted(self, seen: _Seen, rows: WhitenedRows, error: Tensor, variance: Tensor) -> Prediction:
        """As the potential predicts them, with these errors and variances due to the data."""
        labelled, here, environments = seen.labelled, seen.labelled.structures, seen.by_descriptor
        atoms = [here.offsets[k] + _some_atoms(here.select([k]), i) for k, i in enumerate(labelled.numbers)]
        asked = replace(self.request, atoms=torch.cat(atoms))
        spread: dict[str, Any] = dict(self.potential.variance_model()(here, environments, asked, rows))
        novelty = self.potential.novelty is not None
        raw = replace(self.potential(here, novelty=novelty, environments=environments), **spread)
        return _replaced(raw, labelled.targets, error, variance)


@dataclass(frozen=True, eq=False)
class _Seen:
    """Structures with their environments by each descriptor."""

    labelled: _Labelled
    by_descriptor: list[StructureEnvironments]

    def features(self, k: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Species and features of the environments of structure k, or of all, by each descriptor."""
        part = self.labelled.structures
        first, end = (0, None) if k is None else part.offsets[k : k + 2].tolist()
        return [(part.species[first:end], e.environments.features[first:end]) for e in self.by_descriptor]


@dataclass(frozen=True, eq=False)
class _Unused:
    """Columns that a posterior is to do without: orthonormal bases of T and of R⁻ᵀ T, and the coefficients of the mean along the latter."""

    of_prior: Tensor
    of_data: Tensor
    mean: Tensor

    @staticmethod
    def make(model: VarianceModel, columns: Tensor, weights: Tensor, charges: ChargePosterior | None = None) -> _Unused:
        """Those columns of a model whose mean has such weights; charges: whose posterior is joint with it."""
        unit = torch.zeros(len(columns), model.n_columns).to(model.signal)
        unit[torch.arange(len(columns)), columns] = 1.0
        a, b = model.whiten(unit)
        b = b if charges is None else charges.extend(b)
        data, upper = torch.linalg.qr(b.T)
        # the weights of another model mean nothing here, and nobody asks for them
        own = weights[columns, None].to(upper) if len(weights) == model.n_columns else upper.new_zeros(len(columns), 1)
        return _Unused(torch.linalg.qr(a.T).Q, data, torch.linalg.solve_triangular(upper.T, own, upper=False)[:, 0])

    def leave(self, rows: WhitenedRows, mean: CovarianceRows | None, of: tuple[slice, slice, slice]) -> None:
        """Change some rows, and the mean there, to those of the posterior without these columns, in place."""
        for kind, here in zip(KINDS, of, strict=True) if len(self.mean) else ():
            of_prior, of_data = getattr(rows.a, kind)[here], getattr(rows.b, kind)[here]
            of_prior -= (of_prior @ self.of_prior) @ self.of_prior.T
            along = of_data @ self.of_data
            of_data -= along @ self.of_data.T
            if mean is not None:
                getattr(mean, kind)[here] -= along @ self.mean


def _rows_of(structures: Structures, k: int) -> tuple[slice, slice, slice]:
    """Of structure k among the rows of energies, forces and stresses."""
    first, end = structures.offsets[k : k + 2].tolist()
    return slice(k, k + 1), slice(3 * first, 3 * end), slice(6 * k, 6 * k + 6)


def _places_of(structures: Structures, k: int) -> tuple[slice, slice, slice]:
    """Of the energy, forces and stress of structure k among all energies, forces and stresses in turn."""
    energy, forces, stress = _rows_of(structures, k)
    n, atoms = len(structures), 3 * structures.n_atoms
    return energy, slice(n + forces.start, n + forces.stop), slice(n + atoms + stress.start, n + atoms + stress.stop)


def _columns_at(
    model: VarianceModel,
    groups: Sequence[list[tuple[Tensor, Tensor]]],
    functionals_of: Sequence[Sequence[int]],
    numbers: set[int],
) -> Tensor:
    """Columns of the inducing variables at some structures.

    Args:
        groups: _Seen.features of the structures. numbers: theirs; functionals_of: by descriptor, of those with functionals.
    """
    start, out = 0, []
    for d, blocks in enumerate(model.blocks):
        for block in blocks:
            if isinstance(block, FunctionalBlock):
                mine = torch.tensor([i in numbers for i in functionals_of[d][: len(block.maps)]])
                own = mine.repeat_interleave(torch.tensor(block.starts).diff())
            else:
                here = torch.cat([group[d][1][group[d][0] == block.species] for group in groups]).to(block.features)
                apart = torch.cdist(block.features, here) if len(here) else here.new_ones(len(block.features), 1)
                own = (apart.amin(1).square() < SAME)[block.column_addresses[0]]
            out.append(start + own.nonzero()[:, 0])
            start += block.n_columns
    return torch.cat(out) if out else torch.zeros(0, dtype=torch.long)


def _leave_out(report: Report, fitted: _Fitted, parts: Sequence[tuple]) -> list[tuple[Prediction, Influence]]:
    found: list[tuple[Prediction, Influence]] = []
    total = sum(len(labelled.structures) for labelled, _ in parts)

    def take(one: tuple[Prediction, Influence]) -> None:
        found.append(one)
        done = sum(len(p.energies) for p, _ in found)
        report(done, total, f"{done} of {total} structures left out in turn")

    parallel.map_pieces(fitted.leave_out, parts, take)
    return found


def _parts(structures: Structures, chosen: Sequence[int]) -> list[list[int]]:
    """Structures of about PART_ATOMS atoms together."""
    parts: list[list[int]] = []
    counts, total = structures.counts.tolist(), 0
    for i in chosen:
        total = total + counts[i] if parts else PART_ATOMS + 1
        if total > PART_ATOMS:
            parts.append([])
            total = counts[i]
        parts[-1].append(i)
    return parts


def _others_near(structures: Structures, i: int, near: dict[int, Tensor]) -> list[int]:
    """The others that are left out with structure i: of a long trajectory the frames next to it, which matter most."""
    order = sorted((near[i].tolist() if i in near else [i]), key=lambda j: abs(j - i))
    together = max(1, int((structures.counts.cpu()[order].cumsum(0) <= NEAR_ATOMS).sum()))
    return [j for j in order[:together] if j != i]


def _some_atoms(structures: Structures, seed: int) -> Tensor:
    """FORCE_ATOMS atoms of a structure at random, as many of each species as far as there are so many."""
    order = torch.randperm(structures.n_atoms, generator=torch.Generator().manual_seed(seed))
    species = structures.species.cpu()[order]
    rank = torch.zeros(len(order), dtype=torch.long)
    for z in species.unique():
        rank[species == z] = torch.arange(int((species == z).sum()))
    chosen = order[rank.argsort(stable=True)[:FORCE_ATOMS]].sort().values
    return chosen.to(structures.species.device)


def _kinds_of(place: Tensor, structures: Structures) -> Tensor:
    """Place in KINDS of entries among energies, force components and stress components of structures."""
    ends = torch.tensor([len(structures), len(structures) + 3 * structures.n_atoms], device=place.device)
    return torch.bucketize(place, ends, right=True)


def _replaced(raw: Prediction, known: Targets, error: Tensor, variance: Tensor) -> Prediction:
    """The prediction with other values (label - error) and variances due to the data, where these are known.

    Args:
        error, variance: of energies (structures), force components (3 atoms) and stress components (6 structures).
    """
    n = len(raw.energies)
    errors, variances = (x.split([n, 3 * len(raw.forces), 6 * n]) for x in (error, variance))
    order = torch.tensor(units.VOIGT_INDEX, device=error.device)
    shaped = {
        "energies": errors[0],
        "forces": errors[1].view(-1, 3),
        "stresses": errors[2].view(n, 6)[:, order],
    }
    values = {kind: getattr(known, kind) - e for kind, e in shaped.items()}
    known_values: dict[str, Any] = {k: torch.where(v.isnan(), getattr(raw, k), v) for k, v in values.items()}
    return replace(
        raw,
        **known_values,
        energies_variance=_with_data(raw.energies_variance, variances[0]),
        forces_covariance=_with_data(raw.forces_covariance, variances[1].view(-1, 3)),
        stresses_covariance=_with_data(raw.stresses_covariance, variances[2].view(n, 6)),
    )


def _with_data(variance: Variance | None, data: Tensor) -> Variance | None:
    """With another part due to the data, where that is known; of covariances the rest of it is left as zero."""
    if variance is None:
        return None
    scalar = variance.data.dim() == data.dim()
    old = variance.data if scalar else variance.data.diagonal(dim1=-2, dim2=-1)
    new = torch.where(data.isnan(), old, data)
    return replace(variance, data=new if scalar else torch.diag_embed(new))
