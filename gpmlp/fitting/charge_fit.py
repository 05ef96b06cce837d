"""Fit of charges end to end: Levenberg-Marquardt over their parameters, with the short-range weights marginalised.

The energy of charges is not linear in their parameters a. Labels less E_ES(a) are a linear model of the short-range columns, whose weights
are integrated out, so that what is minimised is

    φ(a) = ½ (y - e(a))ᵀ (A D² Aᵀ + Σ)⁻¹ (y - e(a)) + ½ |(a - a₀)/s|²,

with noises and signals of the evidence of the model that is linear around the present a. A step is taken only if φ falls. The columns are
the leading ones of the short-range model and the composition, whose energies of isolated atoms absorb what charges add to each atom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gpmlp.core import errors, parallel
from gpmlp.core.coulomb import IONISATION, LARGEST
from gpmlp.core.quantities import KINDS, Targets
from gpmlp.core.structures import Structures, empty_layers
from gpmlp.fitting import regression
from gpmlp.fitting.charge_data import LABEL_NOISE, ChargeData, learned_charge_labels
from gpmlp.fitting.regression import InducingModel
from gpmlp.fitting.workers import Report, silent
from gpmlp.gp import evidence, hyperparameters
from gpmlp.gp.evidence import SufficientStatistics
from gpmlp.gp.likelihood import Hyperparameters, StdPrior
from gpmlp.potential.charges import (
    LOCAL,
    ChargeForm,
    ChargeModel,
)
from gpmlp.recipe import DescriptorRecipe, Recipe

SEARCH_COLUMNS = 300  # of the short-range model, while the form of charges is searched for
FORMS = (ChargeForm(LOCAL), ChargeForm(10.0), ChargeForm(3.0), ChargeForm(1.0))  # each from where the one before ended
COMPOSITION = 5.0  # eV, of the energy of an atom that charges may shift
ITERATIONS, EVIDENCE_AT, EVALUATIONS = 30, (0, 3, 7), 12
DAMPING, TRIES = 1e-3, 12
ROUGH, FINE = (
    1e-3,
    2e-5,
)  # nats per label, by which φ has to fall for a search to go on: where forms are compared, of the best one
WORTH = 0.2  # nats per label, by which the evidence has to rise for charges that nobody asked for,
FALL = 0.75  # to which part errors of structures left out have to fall (docs/decisions/023-charges.md)
TINY = 1e-24  # of mean squares
LARGE_SHARE = 0.1  # of the structures that have atoms beyond the cutoff, for charges to be tried
LOOKED_AT = 200  # structures, at random, that this is judged by
REFUSED = "; LAMMPS, KIM and GPUs refuse such a model: for them fit with `long_range: {charges: off}`"
NO_REASON = (
    "all structures have the same total charge, and fewer than a tenth have two elements and atoms beyond the cutoff"
)


@dataclass(frozen=True, eq=False)
class FittedCharges:
    """Charges as a fit leaves them.

    Attributes:
        scale: (columns,) prior standard deviations of its parameters, by the evidence.
        left_out: errors of structures left out, in units of those without charges; None where only labels of charges are learned.
        negative_log_evidence: of the columns of this fit; alone: the same without charges; labels: how many.
        tried: the former by form, as text, of the fewer columns of the search. learned: `long_range.labels`, what these labels are.
    """

    model: ChargeModel
    scale: Tensor
    negative_log_evidence: float
    alone: float
    labels: int
    left_out: float | None
    tried: dict[str, float]
    learned: str = "ignore"

    @property
    def gain(self) -> float:
        """Rise of the evidence by charges, nats per label."""
        return (self.alone - self.negative_log_evidence) / self.labels

    @property
    def worth_it(self) -> bool:
        """Whether they are kept where nobody asked for them."""
        return self.gain > WORTH and (self.left_out is None or self.left_out < FALL)

    def report(self, kept: bool) -> dict[str, Any]:
        """Numbers for the FitReport, and a sentence."""
        among = {"ignore": "", "use": ", charges and dipoles among them", "only": " of charges and dipoles"}[
            self.learned
        ]
        found = f"the evidence rises by {self.gain:.2g} nats per label{among}"
        if self.left_out is not None:
            found += f", and errors of structures left out are {self.left_out:.2g} times those without charges"
        verdict = (
            f"charges are {self.model.form}: {found}{REFUSED}"
            if kept
            else f"charges were tried and left out: {found} (wanted: more than {WORTH}, and less than {FALL})"
        )
        return {
            "kept": kept,
            "form": str(self.model.form),
            "gain_nats_per_label": self.gain,
            "left_out_errors_ratio": self.left_out,
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
    return _reason_of_data(structures, recipe)


def _reason_of_data(structures: Structures, recipe: Recipe) -> str | None:
    if len(structures.charges.unique()) > 1:
        return "the structures have different total charges"
    large = [_reaches_beyond(one, recipe.descriptors[0].cutoff or torch.inf) for one in _some(structures, recipe.seed)]
    return "structures have atoms beyond the cutoff" if sum(large) >= LARGE_SHARE * len(large) else None


def are_tried_unasked(structures: Structures, recipe: Recipe) -> bool:
    """Whether charges, of which the recipe says nothing, are tried: molecules and clusters have a reason, and what was asked for admits
    them. Crystals, liquids and surfaces are fitted without, as engines and GPUs take them."""
    local = isinstance(recipe.descriptors[0], DescriptorRecipe) and not recipe.descriptors[0].beside
    cutoff = recipe.descriptors[0].cutoff or torch.inf
    given = any(i.functionals == "all" for i in recipe.inducings)  # which leave no columns for charges
    fits = int(structures.counts.max()) <= LARGEST and max(structures.distinct_species) <= len(IONISATION)
    admitted = local and cutoff < torch.inf and fits and not given and recipe.device == "cpu"
    if not admitted or not all(_away_from_images(one, cutoff) for one in _some(structures, recipe.seed)):
        return False
    return _reason_of_data(structures, recipe) is not None


def _some(structures: Structures, seed: int) -> list[Structures]:
    order = torch.randperm(len(structures), generator=torch.Generator().manual_seed(seed))[:LOOKED_AT]
    return [structures.select([i]) for i in order.tolist()]


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
    return not _away_from_images(one, cutoff) or float(torch.cdist(one.positions, one.positions).max()) > cutoff


def _away_from_images(one: Structures, cutoff: float) -> bool:
    """Whether it is isolated, or in a cell in which all its images are beyond the cutoff."""
    if not bool(one.periodic.all()):
        return not bool(one.periodic.any())
    return bool((empty_layers(one.cells[0].cpu().numpy(), one.positions.cpu().numpy()) > cutoff).all())


def forms_of(recipe: Recipe) -> tuple[ChargeForm, ...]:
    """The forms that a recipe leaves to choose from."""
    wanted = recipe.long_range
    if wanted.charges == "local":
        return (ChargeForm(LOCAL),)
    if wanted.kappa is not None:
        return (ChargeForm(wanted.kappa),)
    return FORMS if wanted.charges == "auto" else FORMS[1:]


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

    def rows(self) -> dict[str, Tensor]:
        """By kind, [A | composition | C | y] of the model that is linear around a."""
        out, around = {}, self.a - self.start
        for kind, rows in self.data.electrostatic(self.form, self.a, True).items():
            short, c, e = self.data.short[kind], rows[:, :-1], rows[:, -1:]
            out[kind] = torch.cat([short[:, :-1], c, short[:, -1:] - e + c @ around[:, None]], dim=1)
        return out

    def statistics(self) -> tuple[dict[str, SufficientStatistics], Tensor]:
        """Of the model that is linear around a, columns [A | composition | C], and the block of each column."""
        out = {}
        for kind, rows in self.rows().items():
            n, y = sum(self.data.widths), rows[:, -1]
            a, c = rows[:, :n], rows[:, n:-1]
            cross = a.T @ c
            gram = torch.cat([torch.cat([self.data.grams[kind].gram, cross], 1), torch.cat([cross.T, c.T @ c], 1)])
            out[kind] = SufficientStatistics(gram, torch.cat([a.T @ y, c.T @ y]), float(y @ y), len(y))
        return out, _block_of_column(self.data, charges=True)

    def left_out(self) -> dict[str, float]:
        """As `_left_out_squares`."""
        scale = torch.cat([self.parameters.signal()[_block_of_column(self.data, charges=False)], self.scale])
        return _left_out_squares(self.rows(), self.data.folds, self.parameters.noise(), scale)

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


def _left_out_squares(
    rows: dict[str, Tensor], folds: dict[str, Tensor], noise: dict[str, float], scale: Tensor
) -> dict[str, float]:
    """By kind, the mean square of errors of a linear model [A | y], prior deviations `scale`, fitted to the other folds."""
    noise, n = noise | {regression.FIXED: 1.0}, len(scale)
    present = sorted({int(f) for of_kind in folds.values() for f in of_kind.unique()})
    parts = []
    for fold in present:
        inside = [rows[kind][folds[kind] == fold] / noise[kind] for kind in rows]
        parts.append(torch.stack([part.T @ part for part in inside]).sum(0))
    squares = {kind: 0.0 for kind in KINDS if kind in rows}
    for i, fold in enumerate(present):
        others = sum((part for part in parts[:i] + parts[i + 1 :]), start=torch.zeros_like(parts[0]))
        system = others[:n, :n] * scale * scale[:, None] + torch.eye(n, dtype=torch.float64)
        right = (others[:n, -1] * scale)[:, None]
        weights = scale * torch.cholesky_solve(right, torch.linalg.cholesky(system))[:, 0]
        for kind in squares:
            left = rows[kind][folds[kind] == fold]
            squares[kind] += float((left[:, -1] - left[:, :-1] @ weights).square().sum()) / len(rows[kind])
    return squares


def _ratio(found: dict[str, float], alone: dict[str, float], counts: dict[str, int]) -> float | None:
    """Geometric mean over labels of the ratio of errors."""
    if not alone:
        return None
    logs = [counts[k] * math.log(max(found[k], TINY) / max(alone[k], TINY)) / 2 for k in alone]
    return math.exp(sum(logs) / sum(counts[k] for k in alone))


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
    if wanted == "auto" and not found.worth_it:
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
    noise, scale = parameters.noise(), parameters.signal()[_block_of_column(data, charges=False)]
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
    left_out = _ratio(best.left_out(), _left_out_squares(data.short, data.folds, noise, scale), data.counts)
    tried = {str(form): search.value for form, search in found.items()}
    model, learned = ChargeModel(best.form, data.basis, best.a, start), data.recipe.long_range.labels
    return FittedCharges(model, best.scale, best.value, alone, data.n_labels, left_out, tried, learned)
