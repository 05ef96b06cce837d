"""Fit of charges end to end: Levenberg-Marquardt over their parameters, with the short-range weights marginalised.

The energy of charges is not linear in their parameters a. Labels less E_ES(a) are a linear model of the short-range columns, whose weights
are integrated out, so that what is minimised is

    φ(a) = ½ (y - e(a))ᵀ (A D² Aᵀ + Σ)⁻¹ (y - e(a)) + ½ |(a - a₀)/s|²,

with noises and signals of the evidence of the model that is linear around the present a. A step is taken only if φ falls. The columns are
the leading ones of the short-range model and the composition, whose energies of isolated atoms absorb what charges add to each atom.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gpmlp.core import errors, parallel
from gpmlp.core.coulomb import IONISATION
from gpmlp.core.environments import StructureEnvironments
from gpmlp.core.quantities import KINDS, Targets
from gpmlp.core.structures import CHUNK_ATOMS, Structures, chunk_structures
from gpmlp.fitting import regression
from gpmlp.fitting.regression import InducingModel
from gpmlp.fitting.sparse_points import select_rows
from gpmlp.fitting.workers import Report, silent
from gpmlp.gp import evidence, hyperparameters, inducing, likelihood
from gpmlp.gp.covariances import CovarianceRows
from gpmlp.gp.evidence import SufficientStatistics
from gpmlp.gp.likelihood import Hyperparameters, Observations, StdPrior
from gpmlp.potential.charges import (
    LOCAL,
    ChargeBasis,
    ChargeForm,
    ChargeModel,
    ElectrostaticColumns,
    EqualStructures,
    stack_rows,
)
from gpmlp.recipe import Recipe

SHORT_COLUMNS = 600  # of the short-range model beside which charges are fitted,
SEARCH_COLUMNS = 300  # while their form is searched for
CENTRES = 60  # of q⁰, of each species
ROWS = 12_000  # labels, about, from which charges are fitted: of structures at random where there are more
SPREAD_BYTES = 512 << 20  # of the derivatives of their functions in memory
FORMS = (ChargeForm(LOCAL), ChargeForm(10.0), ChargeForm(3.0), ChargeForm(1.0))  # each from where the one before ended
COMPOSITION = 5.0  # eV, of the energy of an atom that charges may shift
LABEL_NOISE = {"charges": StdPrior(2e-2, 1e-4, 1.0), "dipoles": StdPrior(5e-2, 1e-4, 5.0)}  # e; e A
ITERATIONS, EVIDENCE_AT, EVALUATIONS = 30, (0, 3, 7), 12
DAMPING, TRIES = 1e-3, 12
ROUGH, FINE = (
    1e-3,
    2e-5,
)  # nats per label, by which φ has to fall for a search to go on: where forms are compared, of the best one
WORTH = 0.1  # nats per label, by which the evidence has to rise for charges that nobody asked for
LARGE_SHARE = 0.1  # of the structures that have atoms beyond the cutoff, for charges to be tried
LOOKED_AT = 200  # structures, at random, that this is judged by
NO_REASON = (
    "all structures have the same total charge, and fewer than a tenth have two elements and atoms beyond the cutoff"
)


@dataclass(frozen=True, eq=False)
class FittedCharges:
    """Charges as a fit leaves them.

    Attributes:
        scale: (columns,) prior standard deviations of its parameters, by the evidence.
        negative_log_evidence: of the columns of this fit; alone: the same without charges; labels: how many.
        tried: the former by form, as text, of the fewer columns of the search. learned: `long_range.labels`, what these labels are.
    """

    model: ChargeModel
    scale: Tensor
    negative_log_evidence: float
    alone: float
    labels: int
    tried: dict[str, float]
    learned: str = "ignore"

    @property
    def gain(self) -> float:
        """Rise of the evidence by charges, nats per label."""
        return (self.alone - self.negative_log_evidence) / self.labels

    def report(self, kept: bool) -> dict[str, Any]:
        """Numbers for the FitReport, and a sentence."""
        among = {"ignore": "", "use": ", charges and dipoles among them", "only": " of charges and dipoles"}[
            self.learned
        ]
        verdict = (
            f"charges are {self.model.form}: the evidence rises by {self.gain:.2g} nats per label{among}"
            if kept
            else f"charges were tried and left out: the evidence rises by {self.gain:.2g} nats per label{among}, less than {WORTH}"
        )
        return {
            "kept": kept,
            "form": str(self.model.form),
            "gain_nats_per_label": self.gain,
            "labels": self.labels,
            "negative_log_evidence": self.tried,
            "negative_log_evidence_without": self.alone,
            "sentence": verdict,
        }


def reason_to_try(structures: Structures, recipe: Recipe) -> str | None:
    """Why charges are to be fitted: they are asked for, or the data ask for them; None if neither."""
    wanted, labels = recipe.long_range.charges, recipe.long_range.labels
    if wanted != "auto" or labels != "ignore":
        return None if wanted == "off" else "asked for"
    if len(structures.charges.unique()) > 1:
        return "the structures have different total charges"
    cutoff = recipe.descriptors[0].cutoff or torch.inf
    order = torch.randperm(len(structures), generator=torch.Generator().manual_seed(recipe.seed))[:LOOKED_AT]
    large = [_reaches_beyond(structures.select([i]), cutoff) for i in order.tolist()]
    return "structures have atoms beyond the cutoff" if sum(large) >= LARGE_SHARE * len(large) else None


def why_impossible(structures: Structures, models: Sequence[InducingModel]) -> str | None:
    """Why charges cannot be fitted to some data; None if they can."""
    if models[0].descriptor.cutoff == torch.inf:
        return "free charges need a local descriptor, which has to come first"
    if models[0].exact:
        return "all functionals leave no columns for charges; leave out `inducing.functionals`"
    if structures.positions.device.type != "cpu":
        return "charges are computed on the CPU; leave out `device`"
    if bool((structures.periodic.sum(1) == 1).any()):
        return "structures with one periodic axis have no Coulomb sum"
    unknown = [z for z in structures.distinct_species if z > len(IONISATION)]
    return f"there is no hardness of {errors.chemical_symbol(unknown[0])}" if unknown else None


def learned_charge_labels(recipe: Recipe, structures: Structures, targets: Targets) -> Targets:
    """The targets with those labels of charges and dipoles alone that are learned from. Dipoles are those of neutral isolated
    structures: others have none but that of an origin and a cell."""
    used = recipe.long_range.labels != "ignore"
    neutral = (structures.charges == 0) & ~structures.periodic.any(1)
    charges, dipoles = targets.charges.double(), targets.dipoles.double()
    return replace(
        targets,
        charges=charges if used else torch.full_like(charges, torch.nan),
        dipoles=dipoles.masked_fill(~(used & neutral).to(dipoles.device)[:, None], torch.nan),
    )


def check_labels(recipe: Recipe, structures: Structures, targets: Targets) -> None:
    """UserError if labels of charges are to be learned from and there are none."""
    labels = recipe.long_range.labels
    if labels == "ignore":
        return
    found = learned_charge_labels(recipe, structures, targets)
    if bool(found.charges.isnan().all()) and bool(found.dipoles.isnan().all()):
        raise errors.UserError(
            f"`long_range.labels: {labels}` needs charges of atoms, or dipoles of neutral isolated structures, in the data, and there are "
            "none; leave it out, or name them: --keys charges=NAME."
        )


def _reaches_beyond(one: Structures, cutoff: float) -> bool:
    if len(one.distinct_species) < 2:
        return False
    return bool(one.periodic.any()) or float(torch.cdist(one.positions, one.positions).max()) > cutoff


def forms_of(recipe: Recipe) -> tuple[ChargeForm, ...]:
    """The forms that a recipe leaves to choose from."""
    wanted = recipe.long_range
    if wanted.charges == "local":
        return (ChargeForm(LOCAL),)
    if wanted.kappa is not None:
        return (ChargeForm(wanted.kappa),)
    return FORMS if wanted.charges == "auto" else FORMS[1:]


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Some structures with their labels and short-range rows.

    Attributes:
        rows: by kind, [A | composition | y], whitened.
        labels: observations that rows are of; internal: as in rows_of_labels.
        charges: (atoms,) labels, e; dipoles: (structures, 3), e A; NaN where there are none, or they are not to be learned from.
    """

    structures: list[EqualStructures]
    rows: dict[str, Tensor]
    labels: dict[str, Observations]
    internal: Structures | None
    charges: Tensor
    dipoles: Tensor

    def electrostatic(self, form: ChargeForm, a: Tensor, columns: bool) -> dict[str, Tensor]:
        """By kind, rows [C | e] of E_ES at a, or e alone; of charges and dipoles too."""
        found = [one.evaluate(form, a, columns) for one in self.structures]
        parts = [stack_rows([f.columns for f in found if f.columns is not None])] if columns else []
        return self.as_rows([*parts, stack_rows([f.values for f in found])]) | self._of_charges(found)

    def _of_charges(self, found: Sequence[ElectrostaticColumns]) -> dict[str, Tensor]:
        """Rows of the labels of charges and dipoles, Σ q r, which are linear in charges."""
        charges = [
            f.charges[:, None] if f.of_charges is None else torch.cat([f.of_charges, f.charges[:, None]], dim=1)
            for f in found
        ]
        dipoles = [
            (one.coulomb.positions.mT @ rows.view(*one.coulomb.self_terms.shape, -1)).flatten(0, 1)
            for one, rows in zip(self.structures, charges, strict=True)
        ]
        known = ~self.charges.isnan(), ~self.dipoles.flatten().isnan()
        return {"charges": torch.cat(charges)[known[0]], "dipoles": torch.cat(dipoles)[known[1]]}

    def as_rows(self, parts: Sequence[CovarianceRows]) -> dict[str, Tensor]:
        """Of the labels by kind, without these."""
        return {
            kind: rows[:, :-1] for kind, rows in regression.rows_of_labels(parts, self.labels, self.internal).items()
        }


class ChargeData:
    """Data of a fit of charges: short-range rows once, and what E_ES of each structure is made of."""

    def __init__(
        self, recipe: Recipe, models: Sequence[InducingModel], structures: Structures, targets: Targets
    ) -> None:
        """Args: targets: less the baselines."""
        self.recipe, self.models = recipe, _leading_models(models)
        targets = learned_charge_labels(recipe, structures, targets)
        if recipe.long_range.labels == "only":
            charged = torch.zeros(len(structures), dtype=torch.bool)
            charged[structures.structure_of_atom.cpu()[~targets.charges.cpu().isnan()]] = True
            labelled = (charged | ~targets.dipoles.cpu().isnan().all(1)).nonzero()[:, 0]
            held = structures.composition(structures.distinct_species).cpu() > 0
            chosen = torch.cat([labelled, held.long().argmax(0)]).unique()  # charges are of every species
            structures, targets = structures.select(chosen), targets.select(structures, chosen)
        self.structures, self.targets = _some_structures(structures, targets, recipe.seed)
        self.basis = make_basis(self.models[0], self.structures)
        self.chunks = [self._chunk(part, labels) for part, labels in _chunks(self.structures, self.targets)]
        kinds = [
            k for k in (*KINDS, regression.FIXED, *LABEL_NOISE) if any(len(c.rows.get(k, ())) for c in self.chunks)
        ]
        if recipe.long_range.labels == "only":
            kinds = [k for k in kinds if k in LABEL_NOISE]
        self.short = {k: torch.cat([c.rows[k] for c in self.chunks if k in c.rows]) for k in kinds}
        self.counts = {kind: len(rows) for kind, rows in self.short.items()}
        self.grams = {kind: SufficientStatistics.from_factor(rows, len(rows)) for kind, rows in self.short.items()}
        # of the columns of `short`
        self.widths = [*regression.block_widths(self.models), len(self.structures.distinct_species)]

    def leading(self, columns: int) -> ChargeData:
        """The same with about so many of the short-range columns, the most important ones."""
        if columns >= sum(self.widths[:-1]):
            return self
        out, starts = copy.copy(self), [0, *itertools.accumulate(self.widths)]
        share = columns / starts[-2]
        out.widths = [*(max(1, int(share * w)) for w in self.widths[:-1]), self.widths[-1]]
        kept = [torch.arange(s, s + w) for s, w in zip(starts, [*out.widths, 1], strict=True)]  # and the labels
        out.short = {kind: rows[:, torch.cat(kept)] for kind, rows in self.short.items()}
        out.grams = {kind: SufficientStatistics.from_factor(rows, len(rows)) for kind, rows in out.short.items()}
        return out

    @property
    def n_labels(self) -> int:
        return sum(self.counts.values())

    def _chunk(self, part: Structures, targets: Targets) -> _Chunk:
        rows = regression.labelled_rows(self.models, part, targets)
        rows = {kind: inducing.whiten_rows(r.double(), regression.lowers_of(self.models)) for kind, r in rows.items()}
        labels = likelihood.observed_labels(targets, part.counts)
        functional = any(not m.local_blocks for m in self.models)
        about = targets.charges, targets.dipoles
        chunk = _Chunk(
            EqualStructures.of_structures(self.basis, part), {}, labels, part if functional else None, *about
        )
        counts = part.composition(self.structures.distinct_species).double()
        nothing = [
            counts.new_zeros(len(value), counts.shape[1])
            for value in (targets.forces.flatten(), part.volumes.repeat(6))
        ]
        composition = chunk.as_rows([CovarianceRows(counts, *nothing)])
        made = {k: torch.cat([r[:, :-1], composition[k], r[:, -1:]], dim=1) for k, r in rows.items()}
        columns = sum(regression.block_widths(self.models)) + counts.shape[1]
        for kind, values in zip(LABEL_NOISE, about, strict=True):  # of which no short-range column knows
            known = values.flatten()[~values.flatten().isnan()]
            made[kind] = torch.cat([known.new_zeros(len(known), columns), known[:, None]], dim=1)
        return replace(chunk, rows=made)

    def electrostatic(self, form: ChargeForm, a: Tensor, columns: bool) -> dict[str, Tensor]:
        """By kind, rows [C | e] of all labels."""
        parts = [chunk.electrostatic(form, a, columns) for chunk in self.chunks]
        return {kind: torch.cat([p[kind] for p in parts if kind in p]) for kind in self.short}


def make_basis(model: InducingModel, structures: Structures) -> ChargeBasis:
    """Centres of q⁰ among the environments of structures, by the descriptor and kernel of a short-range model."""
    features: dict[int, list[Tensor]] = {z: [] for z in structures.distinct_species}
    for part in chunk_structures(structures, CHUNK_ATOMS):
        here = StructureEnvironments.from_structures(model.descriptor, part).environments
        for z in part.distinct_species:
            features[z].append(here.features[here.species == z].double())
    centres, lowers = {}, {}
    for z, parts in features.items():
        x = torch.cat(parts)
        chosen = x[select_rows("greedy", x, CENTRES, model.kernel.value, 0)[0]]
        covariance = model.kernel.value(chosen @ chosen.T)
        columns, lowers[z], _ = inducing.independent_factor(covariance, inducing.rank_tolerance(x))
        centres[z] = chosen[columns]
    return ChargeBasis(model.descriptor, model.kernel, centres, lowers)


def _leading_models(models: Sequence[InducingModel]) -> list[InducingModel]:
    """With about SHORT_COLUMNS of the columns, those of the most important centres."""
    share = min(1.0, SHORT_COLUMNS / sum(regression.block_widths(models)))
    out = []
    for model in models:
        columns = [block.leading_columns(share) for block in model.blocks]
        blocks = tuple(block.select(c) for block, c in zip(model.blocks, columns, strict=True))
        lowers = tuple(torch.linalg.cholesky(low[c] @ low[c].T) for low, c in zip(model.lowers, columns, strict=True))
        out.append(replace(model, blocks=blocks, lowers=lowers, exact=None, own=None))
    return out


def _some_structures(structures: Structures, targets: Targets, seed: int) -> tuple[Structures, Targets]:
    """At random, of about ROWS labels together, and few enough to be in memory; besides, the first of each species. Those of as many atoms
    follow each other."""
    order = torch.randperm(len(structures), generator=torch.Generator().manual_seed(seed))
    counts = structures.counts.cpu()[order]
    labels, spread = (3 * counts + 1).cumsum(0), (counts * 60 * 3 * CENTRES * 8).cumsum(0)
    few = int(((labels <= ROWS) & (spread <= SPREAD_BYTES)).sum())
    held = structures.composition(structures.distinct_species).cpu()[order] > 0
    chosen = torch.cat([order[:few], order[held.long().argmax(0)]]).unique()
    chosen = chosen[structures.counts.cpu()[chosen].argsort(stable=True)]
    return structures.select(chosen), targets.select(structures, chosen)


def _chunks(structures: Structures, targets: Targets) -> list[tuple[Structures, Targets]]:
    out, first = [], 0
    for part in chunk_structures(structures, CHUNK_ATOMS):
        out.append((part, targets.select(structures, range(first, first + len(part)))))
        first += len(part)
    return out


class _Search:
    """One search by Levenberg's and Marquardt's method, of one form."""

    def __init__(
        self, data: ChargeData, form: ChargeForm, a: Tensor, parameters: Hyperparameters, start: Tensor
    ) -> None:
        self.data, self.form, self.a, self.parameters, self.start = data, form, a, parameters, start
        self.value = float("nan")

    @property
    def scale(self) -> Tensor:
        """(columns,) prior standard deviations of a."""
        of_free, of_constants = self.parameters.signal()[-2:].tolist()
        out = torch.full((self.data.basis.n_columns,), of_free, dtype=torch.float64)
        out[self.data.basis.n_weights :] = of_constants
        return out

    def statistics(self) -> tuple[dict[str, SufficientStatistics], Tensor]:
        """Of the model that is linear around a, columns [A | composition | C], and the block of each column."""
        out, around = {}, self.a - self.start
        rows = self.data.electrostatic(self.form, self.a, True)
        for kind, short in self.data.short.items():
            c, a = rows[kind][:, :-1], short[:, :-1]
            y = short[:, -1] - rows[kind][:, -1] + c @ around
            cross = a.T @ c
            gram = torch.cat([torch.cat([self.data.grams[kind].gram, cross], 1), torch.cat([cross.T, c.T @ c], 1)])
            out[kind] = SufficientStatistics(gram, torch.cat([a.T @ y, c.T @ y]), float(y @ y), len(y))
        return out, _block_of_column(self.data, charges=True)

    def learn(self, statistics: dict[str, SufficientStatistics], blocks: Tensor) -> None:
        """Noises and signals by the evidence of the linear model."""
        found = evidence.maximise_evidence(statistics, self.parameters, blocks, max_evaluations=EVALUATIONS)
        self.value = found.negative_log_evidence

    def objective(self) -> _Objective:
        """φ with the present noises and signals."""
        return _Objective.make(self.data, self.parameters, self.start, self.scale)

    def run(self, report: Report, tolerance: float = ROUGH) -> _Search:
        """Until φ falls by less than the tolerance, nats per label; hyperparameters are learned on the way and are then of the end."""
        damping, due, least = DAMPING, set(EVIDENCE_AT), tolerance * self.data.n_labels
        for iteration in range(ITERATIONS):
            statistics, blocks = self.statistics()
            if iteration in due:
                self.learn(statistics, blocks)
            objective = self.objective()
            before = objective(self.form, self.a)
            after, damping = self._step(statistics, blocks, objective, before, damping)
            report(iteration, ITERATIONS, f"charges {self.form}: -log evidence {self.value:.0f}, objective {after:.1f}")
            if before - after < least:
                later = sorted(k for k in due if k > iteration)
                if not later:
                    break
                due = {iteration + 1, *later[1:]}
        self.learn(*self.statistics())
        return self

    def _step(
        self, statistics, blocks: Tensor, objective: _Objective, before: float, damping: float
    ) -> tuple[float, float]:
        """Move a where that lowers φ; the new φ and damping."""
        noise = self.parameters.noise() | {regression.FIXED: 1.0}
        short = len(blocks) - len(self.a)
        scale = torch.cat([self.parameters.signal()[blocks[:short]], self.scale])
        system = sum(s.gram * noise[kind] ** -2 for kind, s in statistics.items()) * scale * scale[:, None]
        system.diagonal().add_(1.0)
        right = sum(s.projection * noise[kind] ** -2 for kind, s in statistics.items()) * scale
        of_charges = torch.zeros_like(scale)
        of_charges[short:] = system.diagonal()[short:]
        now = torch.cat([torch.zeros(short, dtype=torch.float64), (self.a - self.start) / self.scale])
        for _ in range(TRIES):
            extra = damping * of_charges
            lower, failed = torch.linalg.cholesky_ex(system + torch.diag(extra))
            if not int(failed):
                beta = torch.cholesky_solve((right + extra * now)[:, None], lower)[:, 0]
                moved = self.start + (beta * scale)[short:]
                after = objective(self.form, moved)
                if after <= before:
                    self.a = moved
                    return after, max(damping / 5, 1e-9)
            damping *= 6
        return before, damping


@dataclass(frozen=True, eq=False)
class _Objective:
    """φ(a) = ½ (y - e(a))ᵀ (A D² Aᵀ + Σ)⁻¹ (y - e(a)) + ½ |(a - a₀)/s|²: the true one, of E_ES(a) itself."""

    data: ChargeData
    noise: dict[str, float]
    scale: Tensor
    lower: Tensor
    start: Tensor
    prior: Tensor

    @staticmethod
    def make(data: ChargeData, parameters: Hyperparameters, start: Tensor, prior: Tensor) -> _Objective:
        noise = parameters.noise() | {regression.FIXED: 1.0}
        scale = parameters.signal()[_block_of_column(data, charges=False)]
        system = sum(s.gram * noise[kind] ** -2 for kind, s in data.grams.items()) * scale * scale[:, None]
        system.diagonal().add_(1.0)
        return _Objective(data, noise, scale, torch.linalg.cholesky(system), start, prior)

    def __call__(self, form: ChargeForm, a: Tensor) -> float:
        rows = self.data.electrostatic(form, a, False)
        total, right = float(((a - self.start) / self.prior).square().sum()), torch.zeros_like(self.scale)
        for kind, short in self.data.short.items():
            y = (short[:, -1] - rows[kind][:, 0]) / self.noise[kind]
            total += float(y @ y)
            right += short[:, :-1].T @ y / self.noise[kind]
        half = torch.linalg.solve_triangular(self.lower, (right * self.scale)[:, None], upper=False)
        found = 0.5 * (total - float(half.square().sum()))
        return found if found == found else float("inf")


def _block_of_column(data: ChargeData, charges: bool) -> Tensor:
    """Which signal each column has: those of the short-range blocks, of the composition, of g, of its constants."""
    widths = [*data.widths, *([data.basis.n_weights, len(data.basis.species)] if charges else [])]
    return torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))


def _parameters(data: ChargeData) -> Hyperparameters:
    more = StdPrior.fixed_at(COMPOSITION), *regression.CHARGE_SIGNALS
    kinds, noises = [k for k in KINDS if k in data.short], {k: p for k, p in LABEL_NOISE.items() if k in data.short}
    return hyperparameters.make_hyperparameters(data.recipe, kinds, regression.blocks_of(data.models), more, noises)


def _without(data: ChargeData) -> tuple[Hyperparameters, float]:
    """Hyperparameters and negative log evidence of the short-range columns alone."""
    parameters, blocks = _parameters(data), _block_of_column(data, charges=False)
    evidence.restart_optimisation(data.grams, parameters, blocks, 1, data.recipe.seed)
    found = evidence.maximise_evidence(data.grams, parameters, blocks)
    return parameters, found.negative_log_evidence


def tried_charges(
    recipe: Recipe,
    structures: Structures,
    remaining: Targets,
    models: Sequence[InducingModel],
    report: Report = silent,
) -> tuple[FittedCharges | None, dict[str, Any] | None]:
    """Charges where they are asked for or the evidence asks for them, else None; and what the FitReport has of that.

    Args:
        remaining: labels less the baselines.

    Raises:
        UserError: they are asked for and cannot be fitted.
    """
    wanted = recipe.long_range.charges
    if wanted == "off":
        return None, None
    reason = reason_to_try(structures, recipe)
    lacking = why_impossible(structures, models) if reason else NO_REASON
    if lacking and wanted != "auto":
        raise errors.UserError(f"`long_range.charges: {wanted}` is not possible: {lacking}.")
    if lacking:
        return None, {"kept": False, "sentence": f"charges were not tried: {lacking}"}
    report(0, ITERATIONS, "charges")
    with parallel.one_core():
        found = fit_charges(ChargeData(recipe, models, structures, remaining), forms_of(recipe), report)
    if wanted == "auto" and found.gain <= WORTH:
        return None, found.report(kept=False)
    totals = structures.charges
    return found, found.report(kept=True) | {"total_charges_e": [float(totals.min()), float(totals.max())]}


def physical_start(data: ChargeData) -> Tensor:
    """(columns,) a of tabulated electronegativities, at the mean composition and total charge: the mean of the prior."""
    species, structures = data.basis.species, data.structures
    composition = structures.composition(species).double().mean(0).tolist()
    return data.basis.physical(dict(zip(species, composition, strict=True)), float(structures.charges.mean()))


def fit_charges(
    data: ChargeData, forms: Sequence[ChargeForm] = FORMS, report: Report = silent, begin: Tensor | None = None
) -> FittedCharges:
    """The charges of the form that the evidence prefers: each form from where the one before ended, as long as the evidence rises.

    Args:
        begin: (columns,) a with which the first form begins; `physical_start` if None.
    """
    start = physical_start(data)
    parameters, alone = _without(data)
    few = data.leading(SEARCH_COLUMNS)
    found: dict[ChargeForm, _Search] = {}

    def search(form: ChargeForm, a: Tensor, former: Hyperparameters) -> _Search:
        fresh = _parameters(data)
        for name in (*fresh.kinds, "signal"):
            fresh.set(name, former.log_std(name).detach())
        found[form] = _Search(few, form, a, fresh, start).run(report)
        return found[form]

    a, best = start if begin is None else begin, None
    for form in dict.fromkeys((ChargeForm(LOCAL), *forms)):  # from local charges the others end in better optima
        last = search(form, a, parameters)
        if form not in forms:
            a, parameters = last.a, last.parameters
            continue
        if best is not None and last.value > best.value:
            break
        a, parameters, best = last.a, last.parameters, last
    assert best is not None
    if best.form.kappa != LOCAL:  # what is local the short-range part can learn
        other = search(replace(best.form, without_self=True), best.a, best.parameters)
        best = min(best, other, key=lambda one: one.value)
    best = _Search(data, best.form, best.a, best.parameters, start).run(report, FINE)
    tried = {str(form): search.value for form, search in found.items()}
    model = ChargeModel(best.form, data.basis, best.a, start)
    return FittedCharges(model, best.scale, best.value, alone, data.n_labels, tried, data.recipe.long_range.labels)
