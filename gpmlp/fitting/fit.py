"""Fit of a sparse Gaussian process to labelled structures, in two passes over the data: a Potential and a FitReport."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpmlp.core import parallel
from gpmlp.core.errors import chemical_symbol
from gpmlp.core.findings import Finding
from gpmlp.core.quantities import Prediction, Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting import (
    calibrate,
    charge_fit,
    energy_zeros,
    inducing_sets,
    label_outliers,
    left_out,
    low_rank,
    passes,
    prepare,
    reduced_variance,
    regression,
    tail_strength,
    variance_checks,
)
from gpmlp.fitting.cost import expected_cost
from gpmlp.fitting.kept_rows import KeptRows, affordable
from gpmlp.fitting.label_outliers import LabelOutliers
from gpmlp.fitting.left_out import Turns
from gpmlp.fitting.passes import FeatureSample
from gpmlp.fitting.regression import ChargeRows, InducingModel, WhitenedData
from gpmlp.fitting.report import FitReport, Progress, StageTimer
from gpmlp.fitting.sparse_points import Candidates, CentreChoice
from gpmlp.fitting.training_data import TrainingData
from gpmlp.fitting.workers import Executor, Workers, within, workers_of
from gpmlp.gp import evidence, hyperparameters, inducing, posterior
from gpmlp.gp.energy_scale import EnergyScale
from gpmlp.gp.exact import ExactPosterior
from gpmlp.gp.likelihood import Hyperparameters
from gpmlp.gp.posterior import SparsePosterior
from gpmlp.gp.stored_factors import rounded_factor
from gpmlp.io.label_checks import charge_fits, work
from gpmlp.io.label_checks.charges import unequal_charges
from gpmlp.io.label_checks.stage import sort_findings
from gpmlp.potential.charges import ChargeModel
from gpmlp.potential.evaluation import ErrorTable, error_table
from gpmlp.potential.potential import Potential
from gpmlp.recipe import Recipe
from gpmlp.uncertainty import separation
from gpmlp.uncertainty.calibration import Calibration
from gpmlp.uncertainty.mahalanobis import Mahalanobis

FEW_COLUMNS = 1000  # up to which the evidence is faster on one core
LEFT_OUT = 3  # atoms that are left out in turn for the calibration, times those that may be set aside
CountedRows = tuple[dict[str, Tensor], dict[str, int]]  # by kind, [A | y] and the number of labels
AMPLITUDE_ATOMS = 400  # of structures left out where there is no calibration
ROBUST_ROUNDS = 3  # of leaving out what the last fit says is wrong
NO_LOW_RANK = (
    "`mean: low_rank` was left aside, and the mean is exact: a low rank needs forces, "
    f"{calibrate.FEWEST} structures that are no near-duplicates, and so few directions that they are cheaper."
)


def fit(
    structures: Structures,
    targets: Targets,
    recipe: Recipe | None = None,
    validation: tuple[Structures, Targets] | None = None,
    progress: Progress | None = None,
    provenance: dict | None = None,
    findings: Sequence[Finding] = (),
    executor: Executor | None = None,
) -> tuple[Potential, FitReport]:
    """Fit a sparse Gaussian process over SOAP power spectra to energies, forces and stresses together.

    Args:
        structures, targets: training data; unknown labels are NaN.
        recipe: choices; what it leaves open is chosen from the data (defaults.resolve_recipe).
        validation: data that are only predicted, for the report.
        progress: called as progress(stage, done, total, note).
        provenance: where the data came from, kept in the model.
        findings: of reading the data; kept in the report before those of the checks of labels.
        executor: whose workers do the passes over the data: a Client of dask.distributed, or an Executor of concurrent.futures with
            processes. The result is the same, whoever works (docs/scale.md).

    Raises:
        UserError: no labels, labels that do not belong to the structures, more inducing points than environments,
            atoms on top of each other.
    """
    recipe, stages = Recipe() if recipe is None else recipe, StageTimer(progress)
    if recipe.long_range.dispersion:
        stages.begin("dispersion")
        recipe, said = tail_strength.settle_dispersion(structures, targets, recipe)
        findings = [*findings, *said]
    about = recipe, validation, stages, provenance, workers_of(executor, recipe.device)
    potential, report, wrong = _fit_once(structures, targets, *about, findings)
    for _ in range(ROBUST_ROUNDS if recipe.robust else 0):
        if not wrong:
            break
        findings, targets = [*findings, *wrong.findings(structures, removed=True)], wrong.remove_from(targets)
        potential, report, wrong = _fit_once(structures, targets, *about, findings)
    return potential, report


def _fit_once(
    structures: Structures,
    targets: Targets,
    recipe: Recipe,
    validation: tuple[Structures, Targets] | None,
    stages: StageTimer,
    provenance: dict | None,
    workers: Workers,
    findings: Sequence[Finding],
    tried: dict[str, Any] | None = None,
) -> tuple[Potential, FitReport, LabelOutliers]:
    """A fit to these labels, and the labels that it says are wrong.

    Args:
        tried: what the FitReport has of charges that a fit before this one has left out.
    """
    stages.begin("data")
    _check_charges(structures, targets, recipe)
    data = TrainingData.from_labels(structures, targets, recipe, findings, workers)
    cost = expected_cost(data.recipe, data.structures, data.targets)
    stages.report(1.0, 1.0, str(cost))
    cost.check()
    fitted, held, judged, turns = _shares(data)
    chosen = _choose_inducing(data, fitted, held, stages)
    data, charges = data.with_charges_fitted(chosen.models, stages)
    if charges is not None and data.charges is None and recipe.long_range.charges is None:
        about = prepare.with_charges(recipe, "off"), validation, stages, provenance, workers, findings, charges
        return _fit_once(
            structures, targets, *about
        )  # with all functionals, where these stood in the way of charges alone
    if data.charges is not None:
        chosen = _choose_inducing(data, fitted, held, stages)
    trained = _train(data, chosen, fitted, held, turns, stages)
    models, columns = trained.models, trained.every_charge_rows
    learned = trained.learned.joined(*trained.held) if len(held) else trained.learned
    stages.begin("posterior")
    solved, given = _solved(trained, learned)
    weights, origin = (solved if given is None else given).weights, dict(provenance or {})
    potential = replace(_potential(data, trained, learned, solved, weights, columns), provenance=origin)
    again = passes.predict(data.partitions, potential)
    if potential.variances is not None:
        stages.begin("calibration")
        potential = _calibrated(
            data, potential, models, learned, solved, given, turns, trained.rows, again.forces, stages
        )
    compared = data.structures.select(judged if len(judged) else fitted)
    of_all = learned.signal, solved.factor if given is None else given
    subset = variance_checks.subset_error(potential, models, *of_all, compared, data.recipe.seed)
    numbers, scale = _numbers(data, trained, learned, solved), regression.scale_of_energies(models, learned)
    wrong, found = _wrong_labels(data, potential, again, scale, numbers)
    potential, cheaper = _with_cheaper_forms(data, potential, _known_and_others(data, fitted, judged), stages)
    errors = None
    if validation is not None:
        stages.begin("validation")
        errors = _validation_errors(potential, *validation, energies=not data.targets.energies.isnan().all())
    stages.end()
    report = FitReport(
        independent_groups=len(data.groups),
        held_out=potential.calibration.source.get("held_out_structures", 0),
        variance_subset=subset,
        charges=charges or tried,
        choices=data.choices,
        **cheaper,
        validation_errors=errors,
        stages=tuple(stages.done),
        findings=found,
        warnings=(
            *(str(finding) for finding in found if finding.severity != "note"),
            *trained.warnings,
            *([NO_LOW_RANK] if _low_rank_left_aside(recipe, cheaper) else []),
            *calibrate.calibration_warnings(potential.calibration, learned.label_noise),
        ),
        **numbers,
    )
    return replace(potential, report=report.as_dict()), report, wrong


def _shares(data: TrainingData) -> tuple[Tensor, Tensor, Tensor, Turns]:
    """Numbers of the structures that are learned from first, that are set aside, and that are judged by; and who is left out in turn."""
    wanted = data.recipe.calibration if data.recipe.variance is not False else False
    if any(i.functionals == "all" for i in data.recipe.inducings):
        wanted = False  # leaving a structure out leaves its functionals out as well: none need be set aside
    labelled, seed, by_errors = (data.structures, data.targets), data.recipe.seed, data.recipe.calibration
    fitted, held, judged = calibrate.calibration_split(*labelled, wanted, seed, data.groups)
    atoms = 0 if data.recipe.variance is False else LEFT_OUT * by_errors.atoms if by_errors else AMPLITUDE_ATOMS
    return fitted, held, judged, Turns.of_groups(*labelled, judged, atoms, seed, data.groups)


def _check_charges(structures: Structures, targets: Targets, recipe: Recipe) -> None:
    """UserError where labels of charges are to be learned from and are missing or wrong."""
    charge_fit.check_labels(recipe, structures, targets)
    if recipe.long_range.labels != "ignore":
        charge_fits.refuse_other_sums(structures, targets)


def _wrong_labels(
    data: TrainingData, potential: Potential, again: Prediction, scale: EnergyScale | None, numbers: dict[str, Any]
) -> tuple[LabelOutliers, tuple[Finding, ...]]:
    """Labels that the fit says are wrong, those of failed calculations among them, and all findings.

    Args:
        again: of the training structures; scale: of energies (`scale_of_energies`); numbers: of the report.
    """
    about = data.structures, data.labels, again
    wrong = label_outliers.find_label_outliers(potential, *about)
    found = [
        *data.findings,
        *replace(wrong, energies=wrong.energies & ~data.failed).findings(data.structures),
        *label_outliers.contradictions(*about, wrong, scale, data.findings),
        *label_outliers.noise_finding(data.structures, wrong, numbers["train_rmse"], numbers["noise_by_evidence"]),
    ]
    if not {"energies-against-forces", work.TWO_ZEROS} & {finding.kind for finding in found}:
        used = ~(wrong.energies | data.failed)
        found += energy_zeros.find_two_zeros(*about, used, numbers["train_rmse"].get("forces", 0.0))
    if again.charges is not None:
        found += charge_fits.check_structures(data.structures, data.recipe.descriptors[0].cutoff or potential.cutoff)
        found += charge_fits.check_fragments(data.structures, again.charges)
    else:
        found += unequal_charges(data.structures)
    return replace(wrong, energies=wrong.energies | data.failed), sort_findings(found)


def _potential(
    data: TrainingData,
    trained: _Trained,
    learned: WhitenedData,
    solved: SparsePosterior,
    weights: Tensor,
    columns: ChargeRows | None,
) -> Potential:
    """The potential of this posterior, not calibrated.

    Args:
        weights: of the mean; columns: of the charges.
    """
    variances, charges = None, data.charges
    if data.recipe.variance is not False:
        most = data.recipe.variance.at_most(len(learned.signal))
        factor, subset, of_charges = regression.variance_factor(trained.models, learned, solved, most, columns)
        charges = charges and replace(charges, posterior=of_charges)
        constant = data.constant | regression.label_scatter(trained.parameters, trained.noise)
        variances = regression.variance_model(
            trained.models, learned.signal, rounded_factor(factor), constant, learned.label_noise, subset
        )
        variances = replace(variances, of_fit=max(len(weights), len(learned.signal)))
    return Potential(
        regression.make_terms(trained.models, weights),
        data.baselines,
        data.structures.distinct_species,
        data.recipe,
        trained.noise,
        variances=variances,
        novelty=trained.novelty,
        charges=charges,
    )


def _solved(trained: _Trained, learned: WhitenedData) -> tuple[SparsePosterior, ExactPosterior | None]:
    """The posterior of the columns, and that of all functionals where the mean is exact, of which residuals and condition then are."""
    about = learned.whitened, learned.counts, learned.every_noise, learned.signal
    solved, every = posterior.solve_posterior(*about, regression.lowers_of(trained.models)), trained.models[0].exact
    if every is None:
        return solved, None
    given = every.process.condition(trained.noise, float(trained.parameters.signal()[0]))
    return replace(solved, rms=given.rms, condition=given.condition), given


def _known_and_others(data: TrainingData, fitted: Tensor, judged: Tensor) -> tuple[Structures, Structures]:
    """The structures fitted and those set aside; without these either half of the independent groups, if there are enough."""
    if not len(judged) and len(data.groups) >= calibrate.FEWEST:
        order = torch.randperm(len(data.groups), generator=torch.Generator().manual_seed(data.recipe.seed))
        fitted, judged = data.groups.leaders[order].tensor_split(2)
    known, others = (data.structures.select(part.sort().values) for part in (fitted, judged))
    return known, others


def _with_cheaper_forms(
    data: TrainingData, potential: Potential, parts: tuple[Structures, Structures], stages: StageTimer
) -> tuple[Potential, dict[str, Any]]:
    """With means of low rank and variances of local energies from fewer columns; entries of the FitReport."""
    potential, ranks = _with_low_rank(data, potential, parts, stages)
    potential, fewer = _with_reduced_variance(data, potential, parts, stages)
    return potential, {"low_rank": ranks, "local_variance": fewer}


def _low_rank_left_aside(recipe: Recipe, cheaper: dict[str, Any]) -> bool:
    """Whether it was asked for in so many words."""
    return recipe.mean == "low_rank" and "mean" in recipe.model_fields_set and not cheaper["low_rank"]


def _with_low_rank(
    data: TrainingData, potential: Potential, parts: tuple[Structures, Structures], stages: StageTimer
) -> tuple[Potential, dict[str, Any] | None]:
    """With means of low rank, where they are wanted: directions from the structures fitted, their number from those set aside."""
    if data.recipe.mean == "exact":
        return potential, None
    stages.begin("low rank")
    return low_rank.with_low_rank(potential, *parts, data.recipe.seed)


def _with_reduced_variance(
    data: TrainingData, potential: Potential, parts: tuple[Structures, Structures], stages: StageTimer
) -> tuple[Potential, dict[str, Any] | None]:
    """With variances of local energies from fewer columns, where they are wanted."""
    if data.recipe.variance is False or data.recipe.variance.local == "exact":
        return potential, None
    stages.begin("variance of fewer columns")
    potential, numbers = reduced_variance.with_reduced_variance(potential, *parts, data.recipe.seed)
    if numbers is None:
        variance = data.recipe.variance.model_copy(update={"local": "exact"})
        potential = replace(potential, recipe=potential.recipe.model_copy(update={"variance": variance}))
    return potential, numbers


def _calibrated(
    data: TrainingData,
    potential: Potential,
    models: list[InducingModel],
    learned: WhitenedData,
    solved: SparsePosterior,
    given: ExactPosterior | None,
    turns: Turns,
    rows: KeptRows,
    forces: Tensor,
    stages: StageTimer,
) -> Potential:
    """With the amplitude of what inducing variables miss, and calibrated if that is wanted.

    Args:
        given: where the mean is exact. rows: of some of those left out. forces: of all structures, by the fit.
    """
    wanted, groups, chosen = data.recipe.calibration, data.groups, turns.chosen
    about = data.structures, data.targets, data.remaining, chosen, turns.near, data.partitions.workers, stages.report
    apart = separation.farthest_apart(data.structures) if wanted and potential.charges is not None else []
    more: dict[str, Any] = {"given": given, "together": apart, "rows": rows}
    predicted = left_out.predict_left_out(potential, models, learned, solved, *about, **more)
    if predicted is None or potential.variances is None:
        return potential
    share = predicted.amplitude(potential.noise)
    calibration = Calibration.identity()
    if wanted and len(chosen) >= calibrate.FEWEST_LEFT_OUT:
        calibration = calibrate.left_out_calibration(predicted, calibrate.scatter_at_rest(data.targets, forces))
        if calibration.apart is not None:
            gaps = separation.largest_gaps(data.structures)
            calibration = replace(calibration, apart=calibration.apart.within(gaps, potential.cutoff))
    calibration, shifts = calibrate.with_shifts(calibration, predicted.influence, len(groups.leaders))
    variances = replace(potential.variances, amplitude=share, shifts=shifts)
    return replace(potential, variances=variances, calibration=calibration.with_amplitude(share))


def _validation_errors(potential: Potential, structures: Structures, targets: Targets, energies: bool) -> ErrorTable:
    """Errors on data that were not learned from; of energies only if any were learned."""
    if not energies:
        targets = replace(targets, energies=torch.full_like(targets.energies, float("nan")))
    return error_table(structures, targets, potential(structures))


@dataclass(frozen=True, eq=False)
class _Trained:
    """Inducing variables, whitened data and hyperparameters of a fit.

    Attributes:
        environments: number of each species; held: whitened rows of the structures set aside and their number, by kind.
        novelty: of the structures fitted and those set aside.
        parameters, noise: of the mean, as learned and as it weighs the labels; where that is exact, `learned` has others of variances.
        charge_rows: columns of charges beside the rows of both. rows: K_fu of some of those that are to be left out.
    """

    models: list[InducingModel]
    environments: dict[int, int]
    learned: WhitenedData
    held: tuple[dict[str, Tensor], dict[str, int]]
    novelty: Mahalanobis | None
    parameters: Hyperparameters
    noise: dict[str, float]
    result: evidence.EvidenceResult
    warnings: tuple[str, ...]
    charge_rows: tuple[ChargeRows, ChargeRows] | None = None
    rows: KeptRows = KeptRows()

    @property
    def every_charge_rows(self) -> ChargeRows | None:
        """Of the structures fitted and those set aside."""
        return self.charge_rows and self.charge_rows[0].joined(self.charge_rows[1])


class _Chosen(NamedTuple):
    """Inducing variables; the number of environments of each species; a sample of these for the novelty."""

    models: list[InducingModel]
    environments: dict[int, int]
    sample: FeatureSample | None


def _choose_inducing(data: TrainingData, fitted: Tensor, held: Tensor, stages: StageTimer) -> _Chosen:
    """Inducing variables, from the fitted structures alone."""
    recipe, structures = data.recipe, data.structures
    stages.begin("inducing points")
    sample: FeatureSample | None = None

    def candidates_of(k: int, choice: CentreChoice) -> Candidates:
        nonlocal sample
        found, of_all = passes.collect_candidates(
            data.partitions, recipe, choice, fitted, held, within(stages.report, k, len(recipe.descriptors))
        )
        sample = sample or of_all
        return found

    models, environments = inducing_sets.make_models(
        recipe,
        structures,
        candidates_of,
        structures.select(fitted),
        data.remaining.select(structures, fitted),
        stages.report,
    )
    return _Chosen([m.numbered(fitted) for m in models], environments, sample)


def _train(
    data: TrainingData, chosen: _Chosen, fitted: Tensor, held: Tensor, turns: Turns, stages: StageTimer
) -> _Trained:
    """Stream the rows, learn noises and signals, from the fitted structures alone."""
    recipe, (models, environments, sample) = data.recipe, chosen
    stages.begin("covariances")
    # the exact posterior takes charges as known
    charges = data.charges if models[0].exact is None else None
    with ThreadPoolExecutor(1) as meanwhile:  # while others make rows
        idle = not data.partitions.workers.shares
        promised = meanwhile.submit(sample.fit) if idle and sample is not None else None
        (whitened, counts), of_held, rows = _whitened(data, models, charges, fitted, held, turns.every, stages)
    novelty = promised.result() if promised else sample.fit() if sample is not None else None
    models = [replace(m, own=None) for m in models]
    stages.begin("evidence")
    lowers = regression.lowers_of(models)
    with parallel.one_core() if sum(map(len, lowers)) <= FEW_COLUMNS else nullcontext():
        about = whitened if charges is None else _around_start(charges, whitened), counts, stages
        parameters, block_of_column, result = regression.learn_hyperparameters(recipe, models, *about, charges=charges)
    signal = parameters.signal().to(block_of_column.device)[block_of_column]
    charge_rows = None
    if charges is not None:
        signal, scale = signal[: sum(map(len, lowers))], signal[sum(map(len, lowers)) :]
        charge_rows = ChargeRows.taken_from(whitened, scale), ChargeRows.taken_from(of_held[0], scale)
    left_out = regression.left_out_energies(data.remaining, data.groups, fitted)
    noise = regression.fit_noise(recipe, parameters, whitened, counts, signal, left_out)
    learned, blocks = WhitenedData(whitened, counts, noise, data.label_noise, signal), regression.blocks_of(models)
    if (every := models[0].exact) is not None:
        parameters, result = regression.learn_exactly(recipe, every, stages)
        noise, blocks = parameters.noise(), [(0, None)]
    warnings = hyperparameters.bound_warnings(recipe, blocks, result.at_bound, noise)
    jitter = max(m.jitter for m in models)
    if jitter:
        warnings.append(f"A jitter of {jitter:.0e} was added to the covariance of the inducing variables.")
    ended = parameters, noise, result, tuple(warnings), charge_rows
    return _Trained(models, environments, learned, of_held, novelty, *ended, rows)


def _around_start(charges: ChargeModel, whitened: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows whose labels are those of a model that is linear in charges around the present ones, with those of the start as prior mean."""
    n, moved = charges.basis.n_columns, charges.parameters - charges.start
    out = {}
    for kind, rows in whitened.items():
        y = rows[:, -1] + rows[:, -n - 1 : -1] @ moved
        out[kind] = torch.cat([rows[:, :-1], y[:, None]], dim=1)
    return out


def _whitened(
    data: TrainingData,
    models: list[InducingModel],
    charges: ChargeModel | None,
    fitted: Tensor,
    held: Tensor,
    kept: list[int],
    stages: StageTimer,
) -> tuple[CountedRows, CountedRows, KeptRows]:
    """Whitened rows of the structures fitted, and of those set aside, and their number, by kind; and K_fu of some."""
    structures, remaining = data.structures.select(fitted), data.remaining.select(data.structures, fitted)
    own = regression.own_rows(models, structures, remaining, charges)
    if own is not None and not len(held):
        return own, ({}, {}), KeptRows()
    lowers, out = regression.lowers_of(models), []
    chosen = fitted, held, affordable(data.structures, kept, sum(map(len, lowers)))
    *factors, rows_kept = passes.make_factors(data.partitions, models, charges, *chosen, stages.report)
    for part in factors:
        counts = {kind: f.count for kind, f in part.items()}
        rows = {kind: inducing.whiten_rows(part.pop(kind).factor().double(), lowers) for kind in list(part)}
        out.append((rows, counts))
    return out[0], out[1], rows_kept


def _numbers(data: TrainingData, trained: _Trained, learned: WhitenedData, solved: SparsePosterior) -> dict[str, Any]:
    """Hyperparameters, columns and posterior for the FitReport."""
    models, parameters, result = trained.models, trained.parameters, trained.result
    return {
        "rows": learned.counts,
        "noise": trained.noise,
        "noise_by_evidence": parameters.noise(),
        "label_noise": learned.label_noise,
        **regression.block_numbers(models, parameters.signal()[: len(regression.blocks_of(models))]),
        "environments": {chemical_symbol(z): n for z, n in sorted(trained.environments.items())},
        "shortest": data.shortest,
        "columns": sum(m.exact.block.n_columns if m.exact else m.asked for m in models),
        "rank": sum(block.n_columns for m in models for block in m.of_mean),
        "condition": solved.condition,
        "jitter": max(m.jitter for m in models),
        "negative_log_evidence": result.negative_log_evidence,
        "evidence_trace": result.trace,
        "train_rmse": solved.rms,
    }
