"""Tuning: a search for the recipe whose small fit predicts held-out structures with the largest likelihood."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gpmlp.core import errors
from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Targets, json_value
from gpmlp.core.structures import Structures
from gpmlp.descriptors import make_descriptor
from gpmlp.fitting import calibrate, defaults, near_duplicates
from gpmlp.fitting.fit import fit
from gpmlp.fitting.search_space import (
    SearchParameter,
    default_space,
    frozen_trial,
    load_optuna,
    parse_search,
    propose,
    quiet_optuna,
)
from gpmlp.io import provenance, recipe_files
from gpmlp.io.files import check_target, reopen_journal
from gpmlp.potential import baselines
from gpmlp.potential.evaluation import evaluate
from gpmlp.recipe import CalibrationRecipe, InducingRecipe, Recipe, VarianceRecipe

OBJECTIVES = ("likelihood", "evidence")
COLUMNS = 400  # inducing variables of a trial: a fit to TRAIN_ATOMS atoms takes about ten seconds
TRAIN_ATOMS = 4000  # at most about so many are learned from in a trial
HELD = CalibrationRecipe(fraction=0.2, atoms=1000)  # judged on; the same structures in all trials
CALIBRATION_ATOMS = 400  # set aside within a trial, from what is learned from, to scale its variances
GIVE_UP = 5  # failures from the start on: then it is not the parameters
STUDY = "gpmlp tune"


@dataclass(frozen=True)
class TuningTrial:
    """The outcome of one recipe.

    Attributes:
        number: 0 is the start recipe.
        parameters: values by dotted key.
        objective: larger is better; nats per force component (forces in eV/A) or, for the evidence, per label; None where it failed.
        force_mae_meV_per_A, force_rmse_meV_per_A: of the held-out structures; None where they have no forces.
        seconds: that it took.
        failure: why there is no objective.
    """

    number: int
    parameters: dict[str, Any]
    objective: float | None
    force_mae_meV_per_A: float | None
    force_rmse_meV_per_A: float | None
    seconds: float
    failure: str | None = None

    @property
    def settings(self) -> dict[str, str]:
        """The parameters as text, by their keys without the sections that go without saying."""
        short = {re.sub(r"\b(descriptor|kernel|radial_scaling)\.", "", k): v for k, v in self.parameters.items()}
        return {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in short.items()}


@dataclass(frozen=True, eq=False)
class TuningProblem:
    """A search: the start recipe, the space, and the data on which trials are fitted and judged.

    Attributes:
        start: the recipe to begin with, as given.
        summary: of all the data, from which defaults are filled.
        learned_from, held: the data of every trial.
        data: name and sha256 of the file, for the log and the recipe.
    """

    start: Recipe
    summary: defaults.DataSummary
    species: tuple[int, ...]
    learned_from: tuple[Structures, Targets]
    held: tuple[Structures, Targets]
    search: tuple[SearchParameter, ...]
    objective: str
    columns: int
    seed: int
    data: dict[str, str]

    @property
    def kind(self) -> str:
        """What the likelihood is of: forces, or energies per atom where the held-out structures have no forces."""
        return "energies" if self.held[1].forces.isnan().all() else "forces"

    @property
    def first(self) -> dict[str, Any]:
        """The parameters of the start recipe, those left open filled in."""
        full = self.resolved({})
        return {p.key: recipe_files.value_at(full, p.key) for p in self.search}

    def changed(self, values: Mapping[str, Any]) -> Recipe:
        """The start recipe with other values; None, which the start recipe may have, changes nothing."""
        return recipe_files.changed_recipe(
            self.start, {key: value for key, value in values.items() if value is not None}
        )

    def resolved(self, values: Mapping[str, Any]) -> Recipe:
        """The start recipe with other values, and with what it leaves open chosen from all the data."""
        return _resolved(self.changed(values), self.summary, self.species)

    def final(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe to write: descriptor and kernel in full; inducing set, noise and the rest as the start recipe has them."""
        full = self.resolved(values)
        return _update(self.changed(values), descriptor=full.descriptor, kernel=full.kernel)

    def trial(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe of a trial: a fixed number of columns, no novelty, a small calibration."""
        chosen = self.changed(values)
        opened = tuple(i.model_copy(update={"n": None}) for i in chosen.inducings)
        full = _resolved(_update(chosen, inducing=opened), self.summary, self.species)
        each = max(1, self.columns // len(full.descriptors))
        judged = self.objective == "likelihood"
        most = self.learned_from[0].n_atoms
        present = set(self.learned_from[1].config_types)
        noise = {label: given for label, given in full.noise.config_types.items() if label in present}
        species = {errors.chemical_symbol(z) for z in self.learned_from[0].distinct_species}
        signal = tuple({name: value for name, value in s.items() if name in species} for s in full.signals)
        return _update(
            full,
            inducing=tuple(_limited(i, each, most) for i in full.inducings),
            variance=VarianceRecipe(columns=self.columns) if judged else False,
            calibration=CalibrationRecipe(atoms=CALIBRATION_ATOMS) if judged else False,
            novelty=False,
            noise=full.noise.model_copy(update={"config_types": noise}),
            signal=signal,
        )

    @property
    def meaning(self) -> str:
        """What the objective is, with its unit."""
        if self.objective == "evidence":
            return "log evidence per label of the data learned from"
        return "log likelihood per " + {"forces": "force component, eV/A", "energies": "energy, eV/atom"}[self.kind]

    @property
    def description(self) -> str:
        """The size of a trial."""
        learned, held = self.learned_from[0], self.held[0]
        return (
            f"{len(learned)} structures ({learned.n_atoms} atoms) learned from, {len(held)} ({held.n_atoms} atoms) held out, "
            f"{self.columns} columns, seed {self.seed}; searched: {'; '.join(map(str, self.search))}"
        )

    def identity(self) -> dict[str, Any]:
        """What the log of a search begins with: results are comparable where all of it is the same."""
        return {
            "data": dict(self.data),
            "objective": self.objective,
            "search": [str(p) for p in self.search],
            "columns": self.columns,
            "seed": self.seed,
            "start": self.start.model_dump(mode="json"),
            "structures": {"learned_from": len(self.learned_from[0]), "held_out": len(self.held[0])},
            "version": provenance.version_of("gpmlp"),
        }


def tuning_problem(
    structures: Structures,
    targets: Targets,
    start: Recipe,
    search: Sequence[str] = (),
    objective: str = "likelihood",
    seed: int = 0,
    data: Mapping[str, str] | None = None,
    columns: int = COLUMNS,
) -> TuningProblem:
    """Set structures aside (the same share of every config_type) and fix the search space.

    Args:
        search: KEY=LOW:HIGH or KEY=a,b,c; nothing for the default space around the start recipe.
        data: 'name' and 'sha256' of the file.

    Raises:
        UserError: fewer than calibrate.FEWEST structures, none with a label to judge by, a range that cannot be searched.
    """
    errors.check_choice("objective", objective, OBJECTIVES)
    errors.check_positive("columns", columns)
    start = _update(start)
    summary, species = defaults.summarise_data(structures, targets), structures.distinct_species
    settled = defaults.resolve_recipe(start, summary, len(species))
    descriptor = make_descriptor(species, defaults.local_descriptor(settled, summary, len(species)).model_dump())
    groups = near_duplicates.find_groups(structures, descriptor, targets.config_types, seed)
    fitted, _, judged = calibrate.calibration_split(structures, targets, HELD, seed, groups)
    if not len(judged):
        raise UserError(
            f"tune needs at least {calibrate.FEWEST} structures that are no isolated atoms and no near-duplicates of each other, to "
            f"learn from some and judge by others; got {len(groups)} among {len(structures)}."
        )
    learn, judge = ((structures.select(part), targets.select(structures, part)) for part in (fitted, judged))
    if judge[1].forces.isnan().all() and judge[1].energies.isnan().all():
        raise UserError(
            "The held-out structures have neither forces nor energies to judge by; check the labels in the file."
        )
    learn = _thinned(*learn, seed)
    problem = TuningProblem(start, summary, species, learn, judge, (), objective, columns, seed, dict(data or {}))
    space = parse_search(search, start, objective) if search else default_space(problem.resolved({}))
    return replace(problem, search=space)


def run_trials(
    problem: TuningProblem,
    done: Sequence[TuningTrial] = (),
    budget_s: float = 1800.0,
    most: int | None = None,
    tick: Callable[[int, float], None] | None = None,
) -> Iterator[TuningTrial]:
    """Yield trials, the first that of the start recipe, until time or number is used up or no new point is left.

    The next trial depends on those before and on the seed alone, so that a resumed search equals an uninterrupted one.
    The first trial runs to its end; a later one is given up, unrecorded, when the time is over.

    Args:
        done: trials of the same problem made before; their time and number count.
        budget_s: seconds for all trials together; most: number of all trials.
        tick: called often as tick(number of the running trial, seconds used so far).

    Raises:
        UserError: optuna is not installed, or the first GIVE_UP trials have all failed.
    """
    load_optuna()
    history, began, before = list(done), time.perf_counter(), sum(t.seconds for t in done)

    def used() -> float:
        return before + time.perf_counter() - began

    def check(*_: object) -> None:
        if tick:
            tick(len(history), used())
        if history and used() > budget_s:
            raise _OutOfTimeError

    while most is None or len(history) < most:
        if len(history) >= GIVE_UP and best_trial(history) is None:
            raise UserError(f"The first {len(history)} trials all failed, the last one so: {history[-1].failure}")
        typical = statistics.median(t.seconds for t in history) if history else 0.0
        if history and used() + typical > budget_s:
            return
        values = problem.first
        if history:
            proposed = propose(problem.search, [(t.parameters, t.objective) for t in history], problem.seed)
            if proposed is None:
                return
            values = proposed
        try:
            trial = run_trial(problem, len(history), values, check)
        except _OutOfTimeError:
            return
        history.append(trial)
        yield trial


class _OutOfTimeError(Exception):
    """The time is over during a trial."""


def run_trial(
    problem: TuningProblem, number: int, values: Mapping[str, Any], check: Callable[..., None] = lambda *_: None
) -> TuningTrial:
    """Fit with these values and judge; what cannot be fitted becomes a failed trial with the reason."""
    started = time.perf_counter()
    objective = mae = rmse = failure = None
    try:
        recipe = problem.trial(values)
        potential, report = fit(*problem.learned_from, recipe, progress=check)
        device, dtype = torch.device(recipe.device), getattr(torch, recipe.dtype)
        structures, targets = (
            problem.held[0].to(device=device, dtype=dtype),
            problem.held[1].to(device=device, dtype=dtype),
        )
        judged = problem.objective == "likelihood"
        result = evaluate(potential, structures, targets, check, judged)
        mae, rmse = (json_value(v) for v in (result.overall.force_mae_meV_per_A, result.overall.force_rmse_meV_per_A))
        # mean over components of log N(F; F̂, σ²), σ² with noise and calibrated; or log evidence over the labels
        value = (
            -result.scores[problem.kind].nll if judged else -report.negative_log_evidence / sum(report.rows.values())
        )
        objective = json_value(value)
        failure = None if objective is not None else f"the {problem.objective} is {value}"
    except (UserError, MemoryError, RuntimeError) as error:
        expected = (UserError, MemoryError, torch.linalg.LinAlgError)
        if not isinstance(error, expected) and "memory" not in str(error).lower():
            raise
        failure = " ".join(str(error).split()) or type(error).__name__
    return TuningTrial(number, dict(values), objective, mae, rmse, round(time.perf_counter() - started, 3), failure)


def best_trial(trials: Sequence[TuningTrial]) -> TuningTrial | None:
    """The trial of the largest objective, the earliest of equal ones."""
    scored = [(t.objective, -t.number, t) for t in trials if t.objective is not None]
    return max(scored)[2] if scored else None


def recipe_comment(problem: TuningProblem, trials: Sequence[TuningTrial]) -> list[str]:
    """Lines of comment for the file of the best recipe."""
    start = trials[0]
    top = best_trial(trials) or start

    def of(t: TuningTrial) -> str:
        if t.objective is None:
            return f"failed ({t.failure})"
        mae, rmse = ("-" if v is None else f"{v:.4g}" for v in (t.force_mae_meV_per_A, t.force_rmse_meV_per_A))
        return f"{t.objective:.4f}, held-out force MAE {mae}, RMSE {rmse} meV/A"

    failed = sum(t.objective is None for t in trials)
    data = problem.data
    return [
        f"gpmlp tune {provenance.version_of('gpmlp')}: trial {top.number}, the best of {len(trials)} ({failed} failed)",
        f"objective ({problem.meaning}): {of(top)}",
        f"start recipe: {of(start)}",
        f"data: {data.get('name', 'not recorded')}, sha256 {data.get('sha256', 'not recorded')}",
        f"trials: {problem.description}",
        "inducing.n and noise are as in the start recipe; left open, the fit chooses them.",
    ]


def open_study(path: Path, problem: TuningProblem, resume: bool) -> Any:
    """The optuna study that records a search: a journal file to which each trial is added as one line, on disk before the next begins.

    Args:
        resume: whether to go on with a study that is there; what a kill left of an unfinished last line is cut off.

    Raises:
        UserError: the file is there and `resume` is false, or it is no such journal, or one of other data, another space or other settings.
    """
    optuna = load_optuna()
    check_target(path)
    there = path.exists() and path.stat().st_size > 0
    if there and not resume:
        raise UserError(f"{path}: is there already; go on with it (--resume), remove it, or give another name.")
    journal = reopen_journal(path) if there else None
    if journal is not None and "gpmlp_tune" in journal.header:
        raise UserError(
            f"{path}: was written by gpmlp {journal.header.get('version')}, whose trials are recorded in another form than this version's; "
            "finish that search with it, give another --log, or remove the file."
        )
    if journal is not None and "op_code" not in journal.header:
        raise UserError(f"{path}: is not a log of `gpmlp tune`; give another --log, or remove the file.")
    with quiet_optuna():
        backend = optuna.storages.journal.JournalFileBackend(str(path))
        storage = optuna.storages.journal.JournalStorage(backend)
        if journal is None:
            study = optuna.create_study(storage=storage, study_name=STUDY, direction="maximize")
        else:
            study = optuna.load_study(storage=storage, study_name=STUDY)
    if not study.user_attrs:  # new, or killed before it said what it is of
        study.set_user_attr("gpmlp_tune", problem.identity())
    _check_identity(path, study.user_attrs.get("gpmlp_tune", {}), problem.identity())
    return study


def record_trial(study: Any, problem: TuningProblem, trial: TuningTrial) -> None:
    """Add a trial to the study, and return when it is on the disk."""
    values = {name: value for name, value in asdict(trial).items() if name not in ("number", "objective")}
    study.add_trial(frozen_trial(problem.search, trial.parameters, trial.objective, values))


def trials_of(study: Any) -> list[TuningTrial]:
    """The trials that a study holds."""
    complete = load_optuna().trial.TrialState.COMPLETE
    return [
        TuningTrial(t.number, objective=t.value if t.state == complete else None, **t.user_attrs) for t in study.trials
    ]


def _check_identity(path: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError where a study was made with other data or settings."""
    names = {
        "sha256": "other data",
        "search": "another search space",
        "columns": "another number of columns",
        "start": "another start recipe",
        "structures": "another division of the structures",
    }
    same = [("sha256", was.get("data", {}).get("sha256"), now["data"].get("sha256"))]
    same += [(key, was.get(key), now[key]) for key in now if key not in ("data", "version")]
    for key, before, here in same:
        if before != here:
            shown = "" if key == "start" else f": {_short(before)}, now {_short(here)}"
            raise UserError(
                f"{path}: was made with {names.get(key, f'another {key}')}{shown}. Resume with what it was made with, or "
                "give another --log."
            )


def _short(value: Any) -> str:
    text = "; ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _update(recipe: Recipe, **values: Any) -> Recipe:
    """The recipe with other sections; a list of one section is that section, so that keys need no number."""
    new = recipe.model_copy(update=values)
    parts = {name: getattr(new, name) for name in ("descriptor", "kernel", "inducing")}
    single = {name: v[0] for name, v in parts.items() if isinstance(v, tuple) and len(v) == 1}
    return new.model_copy(update=single)


def _resolved(recipe: Recipe, summary: defaults.DataSummary, species: Sequence[int]) -> Recipe:
    full = defaults.resolve_recipe(recipe, summary, len(species))
    # one kernel for all descriptors stays one
    return _update(full, kernel=full.kernel if isinstance(recipe.kernel, tuple) else full.kernels[0])


def _limited(inducing: InducingRecipe, columns: int, most: int) -> InducingRecipe:
    """The same kind of inducing set with about so many columns, at most `most` centres."""
    if inducing.functionals:
        return inducing.model_copy(update={"functionals": columns, "n": None, "gradients": None})
    n = max(1, min(columns // (1 + (inducing.gradients or 0)), most))
    shares = inducing.shares
    if isinstance(shares, dict):
        total = max(n, sum(shares.values()))
        shares = {symbol: max(1, n * share // total) for symbol, share in shares.items()}
    return inducing.model_copy(update={"n": n, "shares": shares})


def _thinned(structures: Structures, targets: Targets, seed: int) -> tuple[Structures, Targets]:
    """At most about TRAIN_ATOMS atoms, the same share of every config_type; isolated atoms stay."""
    if structures.n_atoms <= TRAIN_ATOMS:
        return structures, targets
    # drawn as structures are set aside, but without a bound on their share
    share = CalibrationRecipe.model_construct(fraction=1.0, atoms=TRAIN_ATOMS)
    rest, part, _ = calibrate.calibration_split(structures, targets, share, seed + 1)
    if not len(part):  # few structures are all kept, however large
        return structures, targets
    alone = [i for i in rest.tolist() if baselines.is_isolated_atom(targets.config_types[i])]
    members = sorted([*alone, *part.tolist()])
    return structures.select(members), targets.select(structures, members)
