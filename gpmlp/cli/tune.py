"""The command `gpmlp tune`: arguments in, trials into the log, the best recipe out."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gpmlp.core.errors import UserError


class Objective(StrEnum):
    """What `gpmlp tune` maximises."""

    likelihood = "likelihood"
    evidence = "evidence"


def tune(
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
) -> None:
    """Search the descriptor and kernel with which small fits best foresee held-out structures."""
    from gpmlp.cli import console
    from gpmlp.core import errors
    from gpmlp.fitting import search_space
    from gpmlp.fitting import tune as tuning
    from gpmlp.io import ase_atoms, provenance
    from gpmlp.io.files import check_apart, check_target
    from gpmlp.io.recipe_files import load_recipe, save_recipe

    errors.check_positive("--budget-minutes", budget_minutes)
    targets_of = {"the best recipe (--output)": output, "the log (--log)": log}
    for path in targets_of.values():
        check_target(path)
    check_apart(targets_of, {"the training data": train, "the start recipe": recipe})
    search_space.load_optuna()
    start = load_recipe(recipe, settings or [])
    structures, targets = ase_atoms.read(train, labelled=True)
    data = {"name": train.name, "sha256": provenance.file_hash(train)}
    problem = tuning.tuning_problem(structures, targets, start, search or [], objective.value, seed, data, columns)
    study = tuning.open_study(log, problem, resume)
    done = tuning.trials_of(study)
    console.message("tuning", f"{problem.summary}; errors of forces are MAE / RMSE")
    interrupted = False
    try:
        with console.Trials(60 * budget_minutes, trials, done) as show:
            for trial in tuning.run_trials(problem, done, 60 * budget_minutes, trials, show.tick):
                tuning.record_trial(study, problem, trial)
                done.append(trial)
                show(trial)
    except KeyboardInterrupt:
        interrupted = True
    top = tuning.best_trial(done)
    if top is not None:
        save_recipe(problem.final(top.parameters), output, tuning.recipe_comment(problem, done))
        console.output().print(console.trials_table(done, problem.meaning))
        console.output().print(f"wrote {output}", soft_wrap=True, markup=False)
    if interrupted:
        raise KeyboardInterrupt
    if top is None:
        raise UserError(
            "No trial could be fitted; the log tells why. Raise --trials, or change --search or the start recipe."
        )
