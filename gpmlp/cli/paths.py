"""The commands `gpmlp relax` and `gpmlp neb`: a recipe in, a run on the posterior of few labels, its progress and what came of it out."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpmlp.cli.learn import INTERRUPTED, terminated_as_interrupted

if TYPE_CHECKING:
    from gpmlp.learning.paths.band import BandLabel
    from gpmlp.learning.paths.run import PathOutcome, RelaxStep

Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of the recipe; may be repeated.")]


def relax_command(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe with start and oracle; see docs/reactions.md.")],
    resume: Resume = False,
    settings: Settings = None,
) -> None:
    """Relax a structure with few calculations: on a model of all labels so far, with a label where it arrives."""
    from gpmlp.cli import console
    from gpmlp.learning.paths import run
    from gpmlp.learning.paths.recipe import RelaxRecipe

    chosen = _recipe(RelaxRecipe, recipe, settings)
    folder = recipe.parent / chosen.output
    with _interruptible("relax", recipe, settings), closing(run.relax(chosen, recipe.parent, resume)) as steps:
        for step in steps:
            _line(step.labels, _relaxed(step))
    pairs = [
        ("energy", f"{step.energy:.4f} eV"),
        ("largest force", f"{step.force:.4f} eV/A"),
        ("oracle calls", str(step.labels)),
        ("structure", str(folder / "relaxed.xyz")),
        ("numbers, labels", f"relax.json, labels.xyz in {folder}"),
    ]
    console.standard_output().print(console.pairs_table("Relaxation", pairs))
    _check_converged(step.converged, step.labels, folder)


def neb_command(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe with start, end and oracle; see docs/reactions.md.")],
    resume: Resume = False,
    settings: Settings = None,
) -> None:
    """Find the minimum-energy path of a reaction and its barrier with few calculations, and an error bar for it."""
    from gpmlp.cli import console
    from gpmlp.learning.paths import run
    from gpmlp.learning.paths.recipe import NebRecipe
    from gpmlp.report.path import draw_path

    chosen = _recipe(NebRecipe, recipe, settings)
    folder = recipe.parent / chosen.output
    outcome: PathOutcome | None = None
    labels: list[BandLabel] = []
    with _interruptible("neb", recipe, settings), closing(run.find_path(chosen, recipe.parent, resume)) as states:
        for state in states:
            if isinstance(state, run.PathOutcome):
                outcome = state
            else:
                labels.append(state)
                _line(state.number, _labelled(state))
    assert outcome is not None
    draw_path(outcome.path, labels, folder / "path.png")
    console.standard_output().print(console.pairs_table("Path", _outcome_pairs(outcome.numbers, folder)))
    _check_converged(outcome.converged, len(labels), folder)


def _recipe(kind: type, recipe: Path, settings: list[str] | None) -> Any:
    from gpmlp.core import calculators
    from gpmlp.io.recipe_files import load_recipe_as

    calculators.add_import_folder(recipe.parent)
    return load_recipe_as(kind, recipe, settings or [])


def _relaxed(step: RelaxStep) -> str:
    return f"energy {step.energy:.4f} eV, largest force {step.force:.3f} eV/A"


def _labelled(label: BandLabel) -> str:
    return (
        f"image {label.image} ({label.reason}): barrier {label.barrier:.3f} ± {label.sigma:.2g} eV foreseen, energy there off by "
        f"{1000 * abs(label.error):.0f} meV, largest force {label.force:.3f} eV/A"
    )


def _outcome_pairs(numbers: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    imaginary = numbers["imaginary_frequencies_per_cm"]
    said = ", ".join(f"{f:.0f}" for f in imaginary) or "none"
    order = (
        "" if len(imaginary) == 1 else "; a saddle has one: the top is none, or the model is not sure of its curvature"
    )
    return [
        ("barrier", f"{numbers['barrier_eV']:.3f} ± {numbers['barrier_sigma_eV']:.2g} eV"),
        ("reverse barrier", f"{numbers['reverse_barrier_eV']:.3f} eV"),
        ("energy of reaction", f"{numbers['reaction_energy_eV']:.3f} ± {numbers['reaction_energy_sigma_eV']:.2g} eV"),
        ("imaginary frequencies", f"{said} cm^-1 (by the model){order}"),
        ("oracle calls", f"{numbers['oracle_calls']}, and {numbers['oracle_calls_end_points']} for the end points"),
        ("path", f"path.xyz, path.png in {folder}"),
        ("numbers, labels, model", f"neb.json, labels.xyz, model.gpmlp in {folder}"),
    ]


def _line(number: int, text: str) -> None:
    from gpmlp.cli.console import literal, standard_error

    standard_error().print(f"[dim]label {number}:[/] {literal(text)}", soft_wrap=True)


def _check_converged(converged: bool, labels: int, folder: Path) -> None:
    from gpmlp.core.errors import UserError

    if not converged:
        raise UserError(
            f"{folder}: not converged after {labels} labels; what there is so far is written. Raise labels_at_most and go on (--resume)."
        )


@contextmanager
def _interruptible(command: str, recipe: Path, settings: list[str] | None) -> Iterator[None]:
    """Say how to go on when a run is interrupted."""
    from gpmlp.cli import console

    with terminated_as_interrupted():
        try:
            yield
        except KeyboardInterrupt:
            again = shlex.join(["gpmlp", command, str(recipe), *(f"--set={s}" for s in settings or []), "--resume"])
            console.print_message("stopped", f"interrupted; go on with: {again}")
            raise SystemExit(INTERRUPTED) from None
