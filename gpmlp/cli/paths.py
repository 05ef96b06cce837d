"""The commands `gpmlp relax`, `neb`, `saddle` and `learn` with `reactions`: a recipe in, a run on few labels, its progress and outcome."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpmlp.cli.interrupts import resumable, terminated_as_interrupted

if TYPE_CHECKING:
    from gpmlp.learning.paths.band import BandLabel
    from gpmlp.learning.paths.run import RelaxStep
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
    from gpmlp.learning.paths import run
    from gpmlp.learning.paths.recipe import RelaxRecipe
    from gpmlp.report.path.page import relaxation_page

    chosen, folder = _recipe(RelaxRecipe, recipe, settings, resume)
    states = run.relax(chosen, recipe.parent, resume)
    labels, outcome = _followed("relax", recipe, settings, states, run.RelaxOutcome, _relaxed)
    page = relaxation_page(outcome, labels, chosen.model_dump(mode="json")).write(folder)
    pairs = [
        ("energy", f"{labels[-1].energy:.4f} eV"),
        ("largest force", f"{labels[-1].force:.4f} eV/A"),
        ("oracle calls", str(outcome.numbers["oracle_calls"])),
        ("structure", str(folder / "relaxed.xyz")),
        ("page", str(page)),
        ("numbers, labels", f"relax.json, labels.xyz in {folder}"),
    ]
    _print_pairs("Relaxation", pairs)
    _check_converged(outcome.converged, len(labels), folder)


def neb_command(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe with start, end and oracle; see docs/reactions.md.")],
    resume: Resume = False,
    settings: Settings = None,
) -> None:
    """Find the minimum-energy path of a reaction and its barrier with few calculations, and an error bar for it."""
    from gpmlp.io.files import atomic_write
    from gpmlp.learning.paths import run
    from gpmlp.learning.paths.recipe import NebRecipe
    from gpmlp.report.path.page import path_page

    chosen, folder = _recipe(NebRecipe, recipe, settings, resume)
    states = run.find_path(chosen, recipe.parent, resume)
    labels, outcome = _followed("neb", recipe, settings, states, run.PathOutcome, _labelled)
    page = path_page(outcome, labels, chosen.model_dump(mode="json"))
    with atomic_write(folder / "path.png") as file:
        file.write(page.pictures["course"].png)
    _print_pairs("Path", _outcome_pairs(outcome.numbers, folder, page.write(folder)))
    _check_converged(outcome.converged, len(labels), folder)


def saddle_command(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe with start and oracle; see docs/reactions.md.")],
    resume: Resume = False,
    settings: Settings = None,
) -> None:
    """Find a saddle near a minimum, without an end point, its barrier with an error bar and the minima that it joins."""
    from gpmlp.learning.paths import run
    from gpmlp.learning.paths.recipe import SaddleRecipe
    from gpmlp.report.path.page import saddle_page

    chosen, folder = _recipe(SaddleRecipe, recipe, settings, resume)
    states = run.find_saddle(chosen, recipe.parent, resume)
    labels, outcome = _followed("saddle", recipe, settings, states, run.SaddleOutcome, _searched)
    page = saddle_page(outcome, labels, chosen.model_dump(mode="json")).write(folder)
    _print_pairs("Saddle", _saddle_pairs(outcome.numbers, folder, page))
    advice = MORE
    if outcome.numbers["highest_eV_met"]:
        advice = (
            f"The last label lies more than highest_eV, {chosen.highest_eV:g} eV, above the start: raise that and go on (--resume), or try "
            "another direction or seed in a new folder"
        )
    _check_converged(outcome.converged, len(labels), folder, advice)


def explore_reactions(recipe: Path, resume: bool, settings: list[str] | None, report: bool) -> None:
    """`gpmlp learn` with `reactions`: explore from a minimum to a network of products."""
    from gpmlp.cli.console import standard_output
    from gpmlp.cli.exploration import ExplorationBar, network_tables
    from gpmlp.learning.paths import run
    from gpmlp.learning.paths.recipe import NetworkRecipe
    from gpmlp.report.path.network import network_page

    chosen, folder = _recipe(NetworkRecipe, recipe, settings, resume)
    states = run.find_network(chosen, recipe.parent, resume)
    with ExplorationBar(chosen.labels_at_most) as bar:
        _, outcome = _followed("learn", recipe, settings, states, run.NetworkOutcome, bar)
    page = network_page(outcome, chosen.model_dump(mode="json")).write(folder) if report else None
    for table in network_tables(outcome.numbers, folder, page):
        standard_output().print(table)


def _followed(
    command: str,
    recipe: Path,
    settings: list[str] | None,
    states: Generator[Any, None, None],
    kind: type,
    say: Callable[[Any], str | None],
) -> tuple[list[Any], Any]:
    """Labels of a run and its outcome, which is of that kind, each said in a line as it comes."""
    labels: list[Any] = []
    outcome: Any = None
    with _interruptible(command, recipe, settings), closing(states):
        for state in states:
            if isinstance(state, kind):
                outcome = state
                continue
            labels.append(state)
            if line := say(state):
                _line(line)
    assert outcome is not None
    return labels, outcome


def _print_pairs(title: str, pairs: list[tuple[str, str]]) -> None:
    from gpmlp.cli import console

    console.standard_output().print(console.pairs_table(title, pairs))


def _recipe(kind: type, recipe: Path, settings: list[str] | None, resume: bool) -> tuple[Any, Path]:
    """The recipe, and the folder of the run, of which is said if there is none to resume."""
    from gpmlp.cli import console
    from gpmlp.core import calculators
    from gpmlp.io.recipe_files import load_recipe_as

    calculators.add_import_folder(recipe.parent)
    chosen: Any = load_recipe_as(kind, recipe, settings or [])
    folder = recipe.parent / chosen.output
    if resume and not folder.exists():
        console.print_message("new", f"{folder} does not exist: there is nothing to resume, a new run begins")
    return chosen, folder


def _relaxed(step: RelaxStep) -> str:
    return f"label {step.labels}: energy {step.energy:.4f} eV, largest force {step.force:.3f} eV/A"


def _labelled(label: BandLabel) -> str:
    return (
        f"label {label.number}: image {label.image} ({label.reason}): barrier {label.barrier:.3f} ± {label.sigma:.2g} eV foreseen, "
        f"energy there off by {1000 * abs(label.error):.0f} meV, largest force {label.force:.3f} eV/A"
    )


def _searched(label: SaddleLabel) -> str:
    return (
        f"label {label.number}: {label.reason}: {label.barrier:.3f} ± {label.sigma:.2g} eV above the start foreseen, "
        f"off by {1000 * abs(label.error):.0f} meV, lowest curvature {label.curvature:.2f} eV/A^2, largest force {label.force:.3f} eV/A"
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


def _line(text: str) -> None:
    """What a line is of, dimmed, and the rest."""
    from gpmlp.cli.console import literal, standard_error

    what, _, rest = text.partition(":")
    standard_error().print(f"[dim]{literal(what)}:[/]{literal(rest)}", soft_wrap=True)


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
