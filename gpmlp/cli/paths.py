"""The commands `gpmlp relax`, `gpmlp neb` and `gpmlp saddle`: a recipe in, a run on few labels, its progress and what came of it out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpmlp.cli.learn import resumable, terminated_as_interrupted

if TYPE_CHECKING:
    from gpmlp.learning.paths.band import BandLabel
    from gpmlp.learning.paths.run import PathOutcome, RelaxOutcome, RelaxStep, SaddleOutcome
    from gpmlp.learning.paths.saddle import SaddleLabel

Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")]
MORE = "Raise labels_at_most and go on (--resume)"
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
    from gpmlp.report.path.page import relaxation_page

    chosen = _recipe(RelaxRecipe, recipe, settings)
    folder = recipe.parent / chosen.output
    outcome: RelaxOutcome | None = None
    labels: list[RelaxStep] = []
    with _interruptible("relax", recipe, settings), closing(run.relax(chosen, recipe.parent, resume)) as states:
        for state in states:
            if isinstance(state, run.RelaxOutcome):
                outcome = state
            else:
                labels.append(state)
                _line(state.labels, _relaxed(state))
    assert outcome is not None
    page = relaxation_page(outcome, labels, chosen.model_dump(mode="json")).write(folder)
    pairs = [
        ("energy", f"{labels[-1].energy:.4f} eV"),
        ("largest force", f"{labels[-1].force:.4f} eV/A"),
        ("oracle calls", str(outcome.numbers["oracle_calls"])),
        ("structure", str(folder / "relaxed.xyz")),
        ("page", str(page)),
        ("numbers, labels", f"relax.json, labels.xyz in {folder}"),
    ]
    console.standard_output().print(console.pairs_table("Relaxation", pairs))
    _check_converged(outcome.converged, len(labels), folder)


def neb_command(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe with start, end and oracle; see docs/reactions.md.")],
    resume: Resume = False,
    settings: Settings = None,
) -> None:
    """Find the minimum-energy path of a reaction and its barrier with few calculations, and an error bar for it."""
    from gpmlp.cli import console
    from gpmlp.io.files import atomic_write
    from gpmlp.learning.paths import run
    from gpmlp.learning.paths.recipe import NebRecipe
    from gpmlp.report.path.page import path_page

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
    page = path_page(outcome, labels, chosen.model_dump(mode="json"))
    with atomic_write(folder / "path.png") as file:
        file.write(page.pictures["course"].png)
    console.standard_output().print(
        console.pairs_table("Path", _outcome_pairs(outcome.numbers, folder, page.write(folder)))
    )
    _check_converged(outcome.converged, len(labels), folder)


def saddle_command(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe with start and oracle; see docs/reactions.md.")],
    resume: Resume = False,
    settings: Settings = None,
) -> None:
    """Find a saddle near a minimum, without an end point, its barrier with an error bar and the minima that it joins."""
    from gpmlp.cli import console
    from gpmlp.learning.paths import run
    from gpmlp.learning.paths.recipe import SaddleRecipe
    from gpmlp.report.path.page import saddle_page

    chosen = _recipe(SaddleRecipe, recipe, settings)
    folder = recipe.parent / chosen.output
    outcome: SaddleOutcome | None = None
    labels: list[SaddleLabel] = []
    with _interruptible("saddle", recipe, settings), closing(run.find_saddle(chosen, recipe.parent, resume)) as states:
        for state in states:
            if isinstance(state, run.SaddleOutcome):
                outcome = state
            else:
                labels.append(state)
                _line(state.number, _searched(state))
    assert outcome is not None
    page = saddle_page(outcome, labels, chosen.model_dump(mode="json")).write(folder)
    console.standard_output().print(console.pairs_table("Saddle", _saddle_pairs(outcome.numbers, folder, page)))
    advice = MORE
    if outcome.numbers["highest_eV_met"]:
        advice = (
            f"The last label lies more than highest_eV, {chosen.highest_eV:g} eV, above the start: raise that and go on (--resume), or try "
            "another direction or seed in a new folder"
        )
    _check_converged(outcome.converged, len(labels), folder, advice)


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


def _searched(label: SaddleLabel) -> str:
    return (
        f"{label.reason}: {label.barrier:.3f} ± {label.sigma:.2g} eV above the start foreseen, off by {1000 * abs(label.error):.0f} meV, "
        f"lowest curvature {label.curvature:.2f} eV/A^2, largest force {label.force:.3f} eV/A"
    )


def _frequencies(imaginary: list[float]) -> tuple[str, str]:
    said = ", ".join(f"{f:.0f}" for f in imaginary) or "none"
    order = "; a saddle has one: this is none, or the model is not sure of its curvature"
    return ("imaginary frequencies", f"{said} cm^-1 (by the model){'' if len(imaginary) == 1 else order}")


def _saddle_pairs(numbers: dict[str, Any], folder: Path, page: Path) -> list[tuple[str, str]]:
    sides = ", ".join(f"{e:.3f} eV" for e in numbers["energies_of_sides_eV"])
    joins = {True: "", False: "; neither is the start: the barrier is not that of one step from it", None: "not sought"}
    height = "barrier" if numbers["converged"] else "last place, no saddle"
    above = f"{numbers['energy_above_start_eV']:.3f} ± {numbers['energy_above_start_sigma_eV']:.2g} eV"
    return [
        (height, above if numbers["converged"] else f"{above} above the start"),
        ("minima on its sides", f"{sides}{joins[numbers['joins_start']]}"),
        _frequencies(numbers["imaginary_frequencies_per_cm"]),
        ("oracle calls", f"{numbers['oracle_calls']}, and {numbers['oracle_calls_relaxations']} for relaxations"),
        ("structures", str(folder / "saddle.xyz")),
        ("page", str(page)),
        ("numbers, labels, model", f"saddle.json, labels.xyz, model.gpmlp in {folder}"),
    ]


def _outcome_pairs(numbers: dict[str, Any], folder: Path, page: Path) -> list[tuple[str, str]]:
    return [
        ("barrier", f"{numbers['barrier_eV']:.3f} ± {numbers['barrier_sigma_eV']:.2g} eV"),
        ("reverse barrier", f"{numbers['reverse_barrier_eV']:.3f} eV"),
        ("energy of reaction", f"{numbers['reaction_energy_eV']:.3f} ± {numbers['reaction_energy_sigma_eV']:.2g} eV"),
        _frequencies(numbers["imaginary_frequencies_per_cm"]),
        ("oracle calls", f"{numbers['oracle_calls']}, and {numbers['oracle_calls_end_points']} for the end points"),
        ("path", f"path.xyz, path.png in {folder}"),
        ("page", str(page)),
        ("numbers, labels, model", f"neb.json, labels.xyz, model.gpmlp in {folder}"),
    ]


def _line(number: int, text: str) -> None:
    from gpmlp.cli.console import literal, standard_error

    standard_error().print(f"[dim]label {number}:[/] {literal(text)}", soft_wrap=True)


def _check_converged(converged: bool, labels: int, folder: Path, advice: str = MORE) -> None:
    from gpmlp.core.errors import UserError

    if not converged:
        raise UserError(f"{folder}: not converged after {labels} labels; what there is so far is written. {advice}.")


@contextmanager
def _interruptible(command: str, recipe: Path, settings: list[str] | None) -> Iterator[None]:
    """Say how to go on when a run is interrupted."""
    with (
        terminated_as_interrupted(),
        resumable([command, str(recipe), *(f"--set={s}" for s in settings or []), "--resume"]),
    ):
        yield
