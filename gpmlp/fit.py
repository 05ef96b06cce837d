"""Fit turns structures with targets into a Potential and a FitReport, in two passes over the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpmlp import checks, defaults, held_out, hyperpriors, left_out, preparation, regression, units
from gpmlp.consistency import check_stress_consistency
from gpmlp.environments import Descriptor
from gpmlp.fit_report import FitReport, Progress, Stages
from gpmlp.gp import evidence, posterior
from gpmlp.gp.likelihood import Hyperparameters
from gpmlp.gp.posterior import SparsePosterior
from gpmlp.potential import Potential
from gpmlp.quantities import ErrorTable, Targets, errors
from gpmlp.recipe import Recipe
from gpmlp.regression import Learned, Model
from gpmlp.structures import Structures
from gpmlp.terms import View, chunks
from gpmlp.uncertainty import label_noise, mahalanobis
from gpmlp.uncertainty.calibration import Calibration
from gpmlp.uncertainty.mahalanobis import Mahalanobis, Reservoir

PASS_ATOMS = 128  # atoms of a chunk of rows
SUBSET_ATOMS = 100  # on which variances from a subset of the columns are compared with those from all
SAMPLE_BYTES = 16 << 20  # of features of one species from which novelty is learned


def fit(
    structures: Structures,
    targets: Targets,
    recipe: Recipe | None = None,
    validation: tuple[Structures, Targets] | None = None,
    progress: Progress | None = None,
    provenance: dict | None = None,
) -> tuple[Potential, FitReport]:
    """Fit a sparse Gaussian process over SOAP power spectra to energies, forces and stresses together.

    Args:
        structures, targets: training data; unknown labels are NaN.
        recipe: choices; what it leaves open is chosen from the data (defaults.py).
        validation: data that are only predicted, for the report.
        progress: called as progress(stage, done, total, note).
        provenance: where the data came from, kept in the model.

    Raises:
        checks.UserError: no labels, labels that do not belong to the structures, more inducing points than environments,
            atoms on top of each other.
    """
    recipe = Recipe() if recipe is None else recipe
    stages = Stages(progress)
    stages.begin("data")
    structures, targets = preparation.prepared(structures, targets, recipe)
    suspicions = [*check_stress_consistency(structures, targets), *preparation.doubts(structures, targets, recipe)]
    found = defaults.survey(structures, targets)
    recipe = defaults.resolve(recipe, found, len(structures.distinct_species))
    base = preparation.make_baselines(structures, targets, recipe, found)
    remaining = preparation.trust_isolated_atoms(structures, targets.minus(preparation.total(base, structures)))
    aside = recipe.variance and recipe.calibration
    kept, held = held_out.choose(structures, targets, aside, recipe.seed)
    seen, unseen = ((structures.select(some), remaining.select(structures, some)) for some in (kept, held))
    trained = _trained(recipe, structures, seen, unseen, stages)
    learned, models = trained.learned, trained.models
    scatter = label_noise.of_forces(structures, targets)
    learned = replace(learned, label_noise={"forces": scatter} if scatter == scatter else {})
    constant = preparation.given_noise(targets) | trained.parameters.noise()
    lowers = [lower for m in models for lower in m.lowers]

    def potential_of(weights: Tensor, learned: Learned, **more: object) -> Potential:
        more["variances"] = regression.make_variances(recipe, models, learned, constant)
        about = structures.distinct_species, recipe, learned.noise, dict(provenance or {})
        return Potential(regression.make_terms(models, weights), base, *about, **more)

    calibration = Calibration.identity()
    if len(held):
        stages.begin("calibration")
        interim = potential_of(learned.weights(lowers), learned, novelty=trained.novelty)
        calibration = held_out.calibrate(interim, structures.select(held), targets.select(structures, held))
        del interim
        learned = learned.joined(*trained.held)
    stages.begin("posterior")
    solved = posterior.solve(learned.whitened, learned.counts, learned.every_noise, learned.signal, lowers)
    potential = potential_of(solved.weights, learned, calibration=calibration, novelty=trained.novelty)
    if potential.variances is not None:
        share = left_out.amplitude(potential, models, learned, solved, structures, remaining, recipe.seed)
        scaled = replace(potential.variances, amplitude=share)
        potential = replace(potential, variances=scaled, calibration=calibration.with_amplitude(share))
    some = structures.select(held if len(held) else kept)
    few = some.select(range(max(1, int((some.counts.cumsum(0) <= SUBSET_ATOMS).sum()))))
    looked = regression.check_subset(potential, models, learned, solved.factor, few)
    validation_errors = None
    if validation is not None:
        stages.begin("validation")
        validation_errors = _validated(potential, *validation, energies=not remaining.energies.isnan().all())
    stages.end()
    shortest = {f"{checks.symbol(a)}-{checks.symbol(b)}": r for (a, b), r in found.shortest.items()}
    size = potential.variances.amplitude if potential.variances is not None else 1.0
    report = _report(
        trained, learned, solved, calibration, validation_errors, stages, suspicions, len(held), shortest, looked, size
    )
    return replace(potential, report=report.as_dict()), report


def _validated(potential: Potential, structures: Structures, targets: Targets, energies: bool) -> ErrorTable:
    """Errors on data that were not learned from; of energies only if any were learned."""
    if not energies:
        targets = replace(targets, energies=torch.full_like(targets.energies, float("nan")))
    return errors(structures, targets, potential(structures), units.GPA)


@dataclass(frozen=True, eq=False)
class _Trained:
    """What the data seen have come to, with the whitened rows of those set aside and their number by kind."""

    models: list[Model]
    environments: dict[int, int]
    learned: Learned
    held: tuple[dict[str, Tensor], dict[str, int]]
    novelty: Mahalanobis | None
    parameters: Hyperparameters
    result: evidence.EvidenceResult
    doubts: list[str]


def _trained(
    recipe: Recipe,
    structures: Structures,
    seen: tuple[Structures, Targets],
    unseen: tuple[Structures, Targets],
    stages: Stages,
) -> _Trained:
    """Choose inducing variables, stream the rows, learn noises and signals; all from the data seen alone."""
    (parts, targets), (held, held_targets) = (_chunked(*some) for some in (seen, unseen))
    stages.begin("inducing points")
    sample = _Sample(recipe)
    models, environments = regression.make_models(recipe, structures, parts, stages, sample.add)
    novelty = sample.fit(models[0].descriptor, held)
    stages.begin("covariances")
    factors, traces = regression.stream(recipe, models, parts, targets, stages)
    extra, _ = regression.stream(recipe, models, held, held_targets, stages)
    stages.begin("evidence")
    lowers = [lower for m in models for lower in m.lowers]
    counts, counts_held = ({kind: f.count for kind, f in some.items()} for some in (factors, extra))
    whitened, whitened_held = (
        {kind: posterior.whiten(some.pop(kind).factor().double(), lowers) for kind in list(some)}
        for some in (factors, extra)
    )
    parameters, block_of_column, result = regression.learn(recipe, models, whitened, counts, traces, stages)
    signal = parameters.signal().to(block_of_column.device)[block_of_column]
    noise = regression.fit_noise(recipe, parameters, whitened, counts, signal)
    learned = Learned(whitened, counts, noise, {}, signal)
    doubts = hyperpriors.warnings(recipe, regression.blocks_of(models), result.at_bound)
    return _Trained(models, environments, learned, (whitened_held, counts_held), novelty, parameters, result, doubts)


class _Sample:
    """A sample of the features that stream by, by species, and the novelty learned from it."""

    def __init__(self, recipe: Recipe) -> None:
        self.choices, self.seed = recipe.novelty, recipe.seed
        self.reservoirs: dict[int, Reservoir] = {}

    def add(self, z: int, features: Tensor) -> None:
        if self.choices is False:
            return
        rows = max(10, min(self.choices.samples, SAMPLE_BYTES // (features.shape[1] * features.element_size())))
        self.reservoirs.setdefault(z, Reservoir(rows, self.seed + z)).add(features)

    def fit(self, descriptor: Descriptor, held: Sequence[Structures]) -> Mahalanobis | None:
        """Distances whose thresholds come from the environments of held-out structures, where there are enough."""
        if self.choices is False:
            return None
        unseen: dict[int, list[Tensor]] = {}
        for part in held:
            features = View.of(descriptor, part).environments.features
            for z in part.distinct_species:
                unseen.setdefault(z, []).append(features[part.species == z].double())
        seen = {z: r.rows().double() for z, r in self.reservoirs.items()}
        return mahalanobis.fit(seen, {z: torch.cat(x) for z, x in unseen.items()}, self.choices.quantile, self.seed)


def _chunked(structures: Structures, targets: Targets) -> tuple[list[Structures], list[Targets]]:
    """Chunks of PASS_ATOMS atoms, and the targets of each."""
    parts = list(chunks(structures, PASS_ATOMS))
    out, first, atom = [], 0, 0
    for part in parts:
        here, atoms = slice(first, first + len(part)), slice(atom, atom + part.n_atoms)
        values = {
            name: value[atoms] if name.startswith("forces") else value[here] for name, value in vars(targets).items()
        }
        out.append(Targets(**values))
        first, atom = here.stop, atoms.stop
    return parts, out


def _report(
    trained: _Trained,
    learned: Learned,
    solved: SparsePosterior,
    calibration: Calibration,
    validation_errors: ErrorTable | None,
    stages: Stages,
    suspicions: Sequence[str],
    n_held: int,
    shortest: dict[str, float],
    looked: dict[str, float],
    amplitude: float,
) -> FitReport:
    models, parameters, result = trained.models, trained.parameters, trained.result
    labels = [f"{k}:{checks.symbol(b.species)}" for k, m in enumerate(models) for b in m.blocks]
    every = [b for m in models for b in m.blocks]
    warnings = [*suspicions, *trained.doubts]
    jitter = max(m.jitter for m in models)
    if jitter:
        warnings.append(f"A jitter of {jitter:.0e} was added to the covariance of the inducing variables.")
    return FitReport(
        rows=learned.counts,
        held_out=n_held,
        noise=learned.noise,
        noise_by_evidence=parameters.noise(),
        label_noise=learned.label_noise,
        signal=dict(zip(labels, parameters.signal().tolist(), strict=True)),
        environments={checks.symbol(z): n for z, n in sorted(trained.environments.items())},
        centres={label: len(b.features) for label, b in zip(labels, every, strict=True)},
        shortest=shortest,
        variance_subset=looked,
        amplitude=amplitude,
        columns=sum(m.asked for m in models),
        rank=sum(b.n_columns for b in every),
        condition=solved.condition,
        jitter=jitter,
        negative_log_evidence=result.negative_log_evidence,
        evidence_trace=result.trace,
        train_rmse=solved.rms,
        validation_errors=validation_errors,
        stages=tuple(stages.done),
        warnings=tuple(warnings + held_out.misspecified(calibration, learned.label_noise.get("forces", 0.0))),
    )
