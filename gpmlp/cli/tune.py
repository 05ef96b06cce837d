"""The command `gpmlp tune`: arguments in, trials into the log, the best recipe out."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpmlp.core.errors import UserError

if TYPE_CHECKING:
    from gpmlp.fitting.tune import TuningProblem, TuningTrial


class Objective(StrEnum):
    """What `gpmlp tune` maximises."""

    likelihood = "likelihood"
    evidence = "evidence"


def tune_command(
    train: Annotated[Path, typer.Argument(help="Training data: extended XYZ, or any format of ASE.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Recipe to write, for `gpmlp fit --recipe`.")],
    recipe: Annotated[Path | None, typer.Option("--recipe", help="YAML recipe to start from.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of the start recipe; may be repeated.")
    ] = None,
    search: Annotated[
        list[str] | None,
        typer.Option("--search", help="KEY=LOW:HIGH or KEY=a,b,c; may be repeated; replaces the default space."),
    ] = None,
    objective: Annotated[
        Objective, typer.Option("--objective", help="Of held-out forces, or of the data learned from.")
    ] = Objective.likelihood,
    budget_minutes: Annotated[float, typer.Option("--budget-minutes", help="For all trials, resumed ones too.")] = 30.0,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="Most trials, resumed ones too.")] = None,
    columns: Annotated[int, typer.Option("--columns", min=1, help="Inducing variables of a trial.")] = 400,
    log: Annotated[Path, typer.Option("--log", help="Journal of optuna, one line for each trial.")] = Path(
        "tune.jsonl"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the log.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what is held out, and of the search.")] = 0,
    keys: Annotated[str | None, typer.Option("--keys", help="Names of labels, as of `gpmlp fit`.")] = None,
) -> None:
    """Search the descriptor and kernel with which small fits best predict held-out structures."""
    from gpmlp.cli import console
    from gpmlp.core.errors import check_positive
    from gpmlp.fitting import tune
    from gpmlp.fitting.search_space import load_optuna
    from gpmlp.io import ase_atoms, provenance
    from gpmlp.io.files import check_apart, check_target
    from gpmlp.io.label_names import parse_keys
    from gpmlp.io.recipe_files import load_recipe

    check_positive("--budget-minutes", budget_minutes)
    targets_of = {"the best recipe (--output)": output, "the log (--log)": log}
    for path in targets_of.values():
        check_target(path)
    check_apart(targets_of, {"the training data": train, "the start recipe": recipe})
    load_optuna()
    start = load_recipe(recipe, settings or [])
    structures, targets = ase_atoms.read(train, labelled=True, keys=parse_keys(keys or ""))
    data = {"name": train.name, "sha256": provenance.file_hash(train)}
    problem = tune.tuning_problem(structures, targets, start, search or [], objective.value, seed, data, columns)
    study = tune.open_study(log, problem, resume)
    done = tune.trials_of(study)
    console.print_message("tuning", f"{problem.description}; errors of forces are MAE / RMSE")
    budget_s = 60 * budget_minutes
    try:
        with console.TrialBars(budget_s, trials, done) as bars:
            for trial in tune.run_trials(problem, done, budget_s, trials, bars.show_running):
                tune.record_trial(study, problem, trial)
                done.append(trial)
                bars(trial)
    finally:  # interrupted or not
        written = _write_best(problem, done, output)
    if not written:
        raise UserError("No trial could be fitted (the log tells why); raise --trials, change --search or the start.")


def _write_best(problem: TuningProblem, trials: list[TuningTrial], output: Path) -> bool:
    """Write the best recipe and print the table of trials; False if no trial could be fitted."""
    from gpmlp.cli import console
    from gpmlp.fitting.tune import best_trial, recipe_comment
    from gpmlp.io.recipe_files import save_recipe

    best = best_trial(trials)
    if best is None:
        return False
    save_recipe(problem.final(best.parameters), output, recipe_comment(problem, trials))
    console.standard_output().print(console.trials_table(trials, problem.meaning))
    console.print_line(f"wrote {output}")
    return True
