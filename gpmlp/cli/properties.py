"""The command `gpmlp properties`: a model and structures in, properties with error bars out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpmlp.core.errors import UserError

if TYPE_CHECKING:
    from ase import Atoms
    from rich.table import Table

    from gpmlp.learning.oracles.oracle import OracleRecipe
    from gpmlp.potential.potential import Potential
    from gpmlp.properties.compute import PropertyResults
    from gpmlp.properties.labelling import LabelChoice
    from gpmlp.properties.plan import Calculation
    from gpmlp.properties.values import PropertyValue

VALUES, CURVES, STRUCTURES, NEXT = "properties.json", "curves.json", "structures.xyz", "label_next.xyz"
PAGE = "properties.html"

MOST_COLUMNS = 5


def properties_command(
    model: Annotated[Path, typer.Argument(help="Model file written by `gpmlp fit`.")],
    structures: Annotated[
        list[Path], typer.Argument(help="Structures, each frame one: extended XYZ, or any format of ASE.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for numbers, structures and the page.")],
    only: Annotated[
        str | None, typer.Option("--only", help="What to compute: eos,elastic,...; if not given: all that suits.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=2, help="Of the posterior, from which error bars are.")] = 32,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the samples.")] = 0,
    full: Annotated[
        bool, typer.Option("--full", help="Relax the structures of each sample anew: a check of the error bars; slow.")
    ] = False,
    oracle: Annotated[
        Path | None,
        typer.Option("--oracle", help="YAML: section `oracle` of a learning recipe, or such a recipe: its own values."),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="NAME.OPTION=VALUE, e.g. elastic.strain=0.01; may be repeated.")
    ] = None,
    label: Annotated[int, typer.Option("--label", min=0, help="Structures to write whose labels sharpen most.")] = 0,
    sharpen: Annotated[
        str | None, typer.Option("--sharpen", help="Which of them: C11,C44; if not given: all. With --label.")
    ] = None,
    pool: Annotated[
        Path | None, typer.Option("--pool", help="Further structures that could be labelled. With --label.")
    ] = None,
) -> None:
    """Compute properties of crystals and molecules, each with an error bar; say what to label to make it smaller.

    With --oracle beside those of the code that made the labels, which relaxes structures of its own and may take long.
    """
    from gpmlp.cli import console
    from gpmlp.io import archive
    from gpmlp.properties.compute import compute_properties

    if not label and (sharpen is not None or pool is not None):
        raise UserError("--sharpen and --pool are about what to label; say how many (--label).")
    files = _files(output, model, structures, pool)
    potential = archive.load(model)
    given, calculations = _wanted(potential, files, only, settings or [])
    candidates = _frames(pool, potential) if pool is not None else []
    recipe = _oracle_recipe(oracle) if oracle is not None else None
    _check_variances(potential, model, label, calculations)
    with console.StageBars() as stages:
        results = compute_properties(potential, given, calculations, samples, seed, full, stages)
    for text in results.failures:
        console.print_message("warning", text)
    _write(results, output, {}, model.name)
    truth = _oracle_values(recipe, given, calculations, results) if recipe is not None else {}
    if truth:
        _write(results, output, truth, model.name)
    console.standard_output().print(properties_table(results, truth))
    console.print_line(f"wrote {PAGE}, {VALUES}, {CURVES}, {STRUCTURES} in {output}")
    if label:
        _label(output, potential, given, calculations, results, _words(sharpen), label, candidates)


def _files(output: Path, model: Path, structures: list[Path], pool: Path | None) -> list[Path]:
    """Files of the structures; none of what is read is written over."""
    from gpmlp.io.files import check_apart, check_folder
    from gpmlp.io.structure_files import find_files

    check_folder(output)
    files = find_files(structures)
    sources = {"the model": model} | {f"the structures ({path})": path for path in files}
    sources |= {"the pool (--pool)": pool} if pool is not None else {}
    check_apart({f"{name} (--output)": output / name for name in (VALUES, CURVES, STRUCTURES, PAGE, NEXT)}, sources)
    return files


def _wanted(
    potential: Potential, files: list[Path], only: str | None, settings: list[str]
) -> tuple[list[Atoms], list[Calculation]]:
    """The structures, and what is computed of them."""
    from gpmlp.io.recipe_files import parse_settings
    from gpmlp.properties.calculations import choose_calculations
    from gpmlp.properties.compute import named

    given = named([atoms for path in files for atoms in _frames(path, potential)])
    return given, choose_calculations(given, _words(only), parse_settings(settings))


def _check_variances(potential: Potential, model: Path, label: int, calculations: Sequence[Calculation]) -> None:
    """What to label can be found, before anything is computed."""
    from gpmlp.cli import console

    if potential.variances is None:
        if label:
            raise UserError(f"{model} has no variances, from which follows what to label (fit with variance).")
        console.print_message("note", f"{model} has no variances: values have no error bars (fit with variance).")
    idle = ", ".join(each.name for each in calculations if not each.to_sharpen)
    if label and idle:
        if not any(each.to_sharpen for each in calculations):
            raise UserError(f"--label: labels cannot be chosen for values of {idle}; name others (--only).")
        console.print_message("note", f"labels are not chosen for values of {idle}.")


def _label(
    output: Path,
    potential: Potential,
    given: list[Atoms],
    calculations: list[Calculation],
    results: PropertyResults,
    sharpen: list[str] | None,
    number: int,
    candidates: list[Atoms],
) -> None:
    """Choose what to label, write it and print what is foreseen."""
    from gpmlp.cli import console
    from gpmlp.properties.labelling import choose_labels, sharpened_names

    wanted = sharpen or sharpened_names(calculations, results)
    if not wanted:
        raise UserError("--label: no value has an error bar that labels could make smaller.")
    with console.StageBars() as stages:
        chosen = choose_labels(potential, given, calculations, results, wanted, number, candidates, stages)
    _write_next(chosen, output)
    console.standard_output().print(labels_table(chosen, wanted, results))
    console.print_line(f"wrote {output / NEXT}")


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _frames(path: Path, potential: Potential) -> list[Atoms]:
    """The structures of a file, named after it (and their number where there are several), without labels.

    Raises:
        UserError: there are none; an atom of a species that the potential does not know.
    """
    from gpmlp.io.ase_atoms import read_frames, structures_from_ase
    from gpmlp.io.charges import charge_entries

    frames, numbers = read_frames(path)
    if not frames:
        raise UserError(f"{path}: holds no structures.")
    for atoms, number in zip(frames, numbers, strict=True):
        given = atoms.info.get("name")
        name = str(given) if given else path.stem if len(frames) == 1 else f"{path.stem}_{number}"
        atoms.calc, atoms.info = None, charge_entries(atoms.info) | {"name": name}
    potential.check_species(structures_from_ase(frames, [f"{path}, frame {number}" for number in numbers]))
    return frames


def _oracle_recipe(path: Path) -> OracleRecipe:
    from gpmlp.io.recipe_files import load_recipe_as
    from gpmlp.learning.oracles.oracle import OracleRecipe

    recipe = load_recipe_as(OracleRecipe, path, [], section="oracle")
    recipe.check()
    return recipe


def _oracle_values(
    recipe: OracleRecipe, structures: list[Atoms], calculations: list[Calculation], results: PropertyResults
) -> dict[str, float]:
    """By name, what the code of a learning recipe itself gives; what it fails on, and which values are missing, is warned of."""
    import tempfile

    import numpy as np

    from gpmlp.cli import console
    from gpmlp.core.calculators import build_calculator
    from gpmlp.properties.compute import applications, exact_properties
    from gpmlp.properties.surface import EnergySurface

    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="gpmlp-oracle-") as folder:
        surface = EnergySurface.of_calculator(build_calculator(recipe.calculator, recipe.kwargs, Path(folder)))
        for calculation, these, prefix in applications(calculations, structures):
            try:
                values = exact_properties(surface, these, [calculation])
            except (UserError, NotImplementedError) as error:
                console.print_message("warning", f"{recipe.calculator} itself, {prefix}{calculation.name}: {error}")
                continue
            numbers = {prefix + name: float(value) for name, value in values.items() if np.ndim(value) == 0}
            found |= {name: value for name, value in numbers.items() if np.isfinite(value)}
    if lacking := [value.name for value in results.values if value.name not in found]:
        console.print_message("warning", f"{recipe.calculator} itself gives no {', '.join(lacking)}.")
    return found


def _write(results: PropertyResults, output: Path, truth: dict[str, float], model: str) -> None:
    """Values (with the oracle's), curves, structures and the page, each file atomically; what an earlier run left is removed."""
    import numpy as np

    from gpmlp.io.ase_atoms import write_frames
    from gpmlp.io.files import atomic_write
    from gpmlp.report.properties.page import slug, write_page

    output.mkdir(parents=True, exist_ok=True)
    stale = _curve_names(output / CURVES) - {curve.name for curve in results.curves if np.isfinite(curve.value).any()}
    for path in (
        output / NEXT,
        *(output / "figures" / f"{slug(name)}.{end}" for name in stale for end in ("svg", "png")),
    ):
        path.unlink(missing_ok=True)
    values = [value.as_dict() | ({"oracle": truth.get(value.name)} if truth else {}) for value in results.values]
    for name, content in ((VALUES, values), (CURVES, [curve.as_dict() for curve in results.curves])):
        with atomic_write(output / name, text=True) as file:
            json.dump(content, file, indent=2, allow_nan=False)
            file.write("\n")
    write_frames(output / STRUCTURES, list(results.structures))
    write_page(results, output, model, truth=truth)


def _curve_names(path: Path) -> set[str]:
    """Of the curves that an earlier run has written, whose figures lie beside them."""
    try:
        return {str(curve["name"]) for curve in json.loads(path.read_text())}
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def _write_next(chosen: Sequence[LabelChoice], output: Path) -> None:
    """The structures to label, best first, each with the standard deviations that are foreseen once it is labelled."""
    from gpmlp.io.ase_atoms import write_frames

    frames = []
    for choice in chosen:
        frames.append(choice.atoms.copy())
        frames[-1].info |= {f"sigma_{name}": value for name, value in choice.sigmas.items()}
    write_frames(output / NEXT, frames)


def labels_table(chosen: Sequence[LabelChoice], wanted: Sequence[str], results: PropertyResults) -> Table:
    """Error bars as they are and as foreseen after each label."""
    from rich.table import Table

    from gpmlp.cli.console import literal

    shown = wanted[:MOST_COLUMNS]
    more = f" (and of {len(wanted) - len(shown)} more)" if len(wanted) > len(shown) else ""
    table = Table(title=f"What to label: error bars foreseen{more}", title_justify="left", title_style="bold")
    table.add_column("", overflow="fold")
    for name in shown:
        table.add_column(f"{literal(name)}\n{literal(results[name].unit)}", justify="right")
    table.add_row("now", *(f"{results[name].sigma:.2g}" for name in shown))
    for choice in chosen:
        table.add_row(literal(str(choice.atoms.info["name"])), *(f"{choice.sigmas[name]:.2g}" for name in shown))
    return table


def properties_table(results: PropertyResults, truth: Mapping[str, float] | None = None) -> Table:
    """One row for each value; numbers to the second digit of their error bar; `truth`: by name, those of the oracle."""
    from rich.table import Table

    from gpmlp.cli.console import literal
    from gpmlp.report.properties.words import pretty_unit, to_its_error

    def row(value: PropertyValue) -> tuple[str, ...]:
        known = value.sigma > 0
        low, middle, high, sigma = (
            to_its_error(number, value.sigma) for number in (value.low_90, value.value, value.high_90, value.sigma)
        )
        lost = f" ({value.failed} of {value.samples} failed)" if value.failed else ""
        novelty = "–" if value.novelty is None else f"{value.novelty:.2f}"
        interval = f"{low} … {high}" if known else "–"
        exact = [to_its_error(truth[value.name], value.sigma) if value.name in truth else "–"] if truth else []
        return (
            f"{value.name}{lost}",
            middle,
            sigma if known else "–",
            interval,
            *exact,
            pretty_unit(value.unit),
            novelty,
        )

    means = f"mean of the posterior, standard deviation of {results.samples} samples" if results.samples else "mean"
    table = Table(title=f"Properties ({means})", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for heading in ("value", "±", "90 %", *(["oracle"] if truth else []), "unit", "novelty"):
        table.add_column(heading, justify="left" if heading == "unit" else "right", no_wrap=True)
    for value in results.values:
        table.add_row(*map(literal, row(value)))
    return table
