"""The command `gpmlp locality`: whether a cutoff is long enough, from redrawn structures or small fits."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpmlp.cli.check import Keys
from gpmlp.cli.interrupts import resumable
from gpmlp.core.errors import UserError

if TYPE_CHECKING:
    from gpmlp.learning.locality import Locality
    from gpmlp.learning.oracles.oracle import OracleRecipe

RESULT, FIGURE = "locality.json", "locality"


def locality_command(
    data: Annotated[
        list[Path], typer.Argument(help="Structures: extended XYZ, or any format of ASE; with labels if there are.")
    ],
    oracle: Annotated[
        Path | None, typer.Option("--oracle", help="YAML: the section `oracle` of a learning recipe, or such a recipe.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of the oracle, e.g. workers=4; may be repeated.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="Model file whose cutoff and force error are judged.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Recipe of the small fits that stand in for a model.")
    ] = None,
    radii: Annotated[str | None, typer.Option("--radii", help="Radii or cutoffs, A: 3.5,4.5,5.5.")] = None,
    displacement_A: Annotated[
        float, typer.Option("--displacement-A", help="Standard deviation of what is redrawn, each component.")
    ] = 0.1,
    draws: Annotated[int, typer.Option("--draws", min=2, help="For each radius and central atom.")] = 8,
    centres: Annotated[int, typer.Option("--centres", min=1, help="Central atoms.")] = 8,
    repeat: Annotated[bool, typer.Option("--repeat", help="Repeat periodic cells that are too small.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of central atoms, draws and held-out structures.")] = 0,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for numbers, figure and the labels of the oracle.")
    ] = Path("locality"),
    keys: Keys = None,
) -> None:
    """Say whether a cutoff is long enough: a longer one, charges, dispersion, or fine as it is.

    With --oracle, atoms beyond a radius are redrawn and the oracle says by how much the force on a central atom varies; the same command
    goes on with the labels in the folder. Without, small fits are made with several cutoffs.
    """
    from gpmlp.cli import console
    from gpmlp.io import archive, ase_atoms
    from gpmlp.io.files import check_apart, check_folder
    from gpmlp.io.label_names import parse_keys
    from gpmlp.io.recipe_files import load_recipe
    from gpmlp.io.structure_files import find_files
    from gpmlp.learning.locality import locality
    from gpmlp.learning.redraws import Redraws

    if settings and oracle is None:
        raise UserError("--set is of the oracle; give one (--oracle RECIPE).")
    check_folder(output)
    chosen = Redraws(_numbers(radii), displacement_A, draws, centres, repeat, seed)
    asked = _oracle_recipe(oracle, settings or []) if oracle is not None else None
    fitted = load_recipe(recipe) if recipe is not None else None
    potential = archive.load(model) if model is not None else None
    files = find_files(data)
    check_apart({"the labels of the oracle": output / "labels.xyz"}, {f"the data ({path})": path for path in files})
    going_on = nullcontext() if asked is None else resumable(sys.argv[1:], f"labels are kept in {output}, ")
    with going_on, console.StageBars() as stages:
        read = ase_atoms.read_labelled(files, keys=parse_keys(keys or ""), progress=stages)
        found = locality(read.structures, read.targets, asked, potential, output, chosen, fitted, stages)
    if asked is None:
        console.print_findings(read.findings)
    _present(found, output)


def _present(found: Locality, output: Path) -> None:
    """Numbers and figure, and what is printed."""
    from gpmlp.cli import console
    from gpmlp.io.files import atomic_write
    from gpmlp.report.locality import locality_picture

    picture = locality_picture(found)
    output.mkdir(parents=True, exist_ok=True)
    with atomic_write(output / RESULT, text=True) as file:
        json.dump(found.as_dict(), file, indent=2, allow_nan=False)
        file.write("\n")
    for suffix, content in (("svg", picture.svg), ("png", picture.png)):
        with atomic_write(output / f"{FIGURE}.{suffix}") as file:
            file.write(content)
    console.standard_output().print(console.locality_table(found))
    console.print_line(found.sentence)
    console.print_line(f"wrote {output / RESULT}, {FIGURE}.svg, {FIGURE}.png")


def _numbers(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(",")) if text is not None else ()
    except ValueError:
        raise UserError(f"--radii {text}: must be numbers with commas between them, as 3.5,4.5,5.5.") from None


def _oracle_recipe(path: Path, settings: list[str]) -> OracleRecipe:
    from gpmlp.core.calculators import add_import_folder
    from gpmlp.io.recipe_files import load_recipe_as
    from gpmlp.learning.oracles.oracle import OracleRecipe

    add_import_folder(path.parent)
    return load_recipe_as(OracleRecipe, path, settings, section="oracle")
