"""The command `gpmlp learn`: a recipe in, a run of the learning loop, its progress and what came of it out."""

from __future__ import annotations

import difflib
import json
from contextlib import closing, suppress
from pathlib import Path
from typing import Annotated

import typer

from gpmlp.cli.interrupts import resumable, terminated_as_interrupted

KINDS = ("dynamics", "reactions")  # of runs
PAGES = {"reactions": ("learn", "network.html"), "end": ("neb", "path.html"), "direction": ("saddle", "saddle.html")}


def learn_command(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="YAML recipe with start, oracle and dynamics, or reactions; see docs/learning.md, docs/reactions.md."
        ),
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of the recipe; may be repeated.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write report/ when the run has stopped.")
    ] = True,
) -> None:
    """Run molecular dynamics, or explore reactions, on a model that learns while it runs, with labels of an ab initio code."""
    from gpmlp.cli import console, progress
    from gpmlp.cli.paths import explore_reactions
    from gpmlp.core import calculators
    from gpmlp.core.errors import UserError
    from gpmlp.io.recipe_files import load_recipe_as, sections_of
    from gpmlp.learning import loop
    from gpmlp.learning.recipe import LearnRecipe
    from gpmlp.report.page import PAGE
    from gpmlp.report.run.page import report_run

    sections = sections_of(recipe, settings or [])
    if "reactions" in sections:
        explore_reactions(recipe, resume, settings, report)
        return
    if "dynamics" not in sections:
        close = [(name, like) for like in KINDS for name in difflib.get_close_matches(like, sections, 1, 0.7)]
        hint = "".join(f" Perhaps '{name}' was meant to be '{like}'." for name, like in close)
        raise UserError(
            f"{recipe}: has neither `dynamics` (molecular dynamics that learns) nor `reactions` (an exploration).{hint}"
        )
    calculators.add_import_folder(recipe.parent)
    chosen = load_recipe_as(LearnRecipe, recipe, settings or [])
    folder = recipe.parent / chosen.output
    if resume and not folder.exists():
        console.print_message("new", f"{folder} does not exist: there is nothing to resume, a new run begins")
    page = None
    with terminated_as_interrupted(), progress.LearningBar(chosen) as bar:
        words = ["learn", str(recipe), *(f"--set={s}" for s in settings or []), "--resume"]
        with resumable(words), closing(loop.learn(chosen, recipe.parent, resume)) as states:
            bar(last := next(states))
            over = last.phase == "stopped"  # before this began
            for last in states:
                bar(last)
        if report and over and (folder / "report" / PAGE).exists():
            page = folder / "report" / PAGE
        elif report:
            bar.show_report()
            page = report_run(folder, chosen)
    if over:
        more = (
            "another section `stop` lets it go on"
            if chosen.lammps or chosen.target
            else "more dynamics.steps, or another section `stop`, let it go on"
        )
        console.print_message("finished", f"the run in {folder} had stopped already, and nothing was done; {more}")
    console.standard_output().print(progress.learning_table(last, folder, page, chosen.target is not None))
    if last.stopped == loop.UNSTABLE:
        raise UserError(
            f"{folder}: the run ended early: {last.stopped}. Try a shorter dynamics.timestep_fs, a lower temperature or another start."
        )


def report_folder(folder: Path, data: Path | None, output: Path | None) -> None:
    """Write the page about a learning run, finished or not; of other runs say which page there is."""
    from gpmlp.cli import console
    from gpmlp.core.errors import UserError
    from gpmlp.report.run.collect import run_recipe
    from gpmlp.report.run.page import report_run

    if data is not None or output is not None:
        raise UserError(
            f"{folder}: is a folder; the report of a run goes to {folder / 'report'}: leave out DATA and --output."
        )
    if other := _other_run(folder):
        command, page = other
        if not page.exists():
            raise UserError(
                f"{folder}: the run of `gpmlp {command}` there has no page yet; `gpmlp {command} RECIPE --resume` writes {page.name}."
            )
        console.print_line(f"{page} is the page of this run; `gpmlp {command} RECIPE --resume` writes it again")
        return
    page = report_run(folder, run_recipe(folder))
    console.print_line(f"wrote {page}")


def _other_run(folder: Path) -> tuple[str, Path] | None:
    """The command of a run that is not one with dynamics, and its page."""
    recipe = {}
    with suppress(OSError, ValueError):  # said where a learning run is read
        recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    if "dynamics" in recipe or not {"start", "fixed"} <= set(recipe):
        return None
    command, page = next((of for key, of in PAGES.items() if key in recipe), ("relax", "relaxed.html"))
    return command, folder / page
