"""The command `gpmlp`: arguments in, calls, tables out.

Exit status: 0 success, 2 an error of the user's (one message, no traceback), 1 an error of ours, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import gpmlp
from gpmlp.cli.check import Keys, check_command
from gpmlp.cli.export import export_command
from gpmlp.cli.interrupts import INTERRUPTED
from gpmlp.cli.lammps import app as lammps_app
from gpmlp.cli.learn import learn_command, report_folder
from gpmlp.cli.locality import locality_command
from gpmlp.cli.md import md_command
from gpmlp.cli.partition import partition_command
from gpmlp.cli.paths import neb_command, relax_command, saddle_command
from gpmlp.cli.properties import properties_command
from gpmlp.cli.transport import transport_command
from gpmlp.cli.tune import tune_command
from gpmlp.core.errors import DataWarning, ProgressNotice, UserError, chemical_symbol, visible_text

if TYPE_CHECKING:
    from gpmlp.fitting.report import FitReport

# typer carries its own copy of click or uses the installed one, according to its version: take the class from the family tree
ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
DEBUG = "GPMLP_DEBUG"
OUT_OF_MEMORY = (
    "out of memory; lower memory_GB or inducing.n (--set memory_GB=1) or take a smaller descriptor.cutoff (--set "
    "descriptor.cutoff=5; what one chunk needs grows with its third power), or use a larger machine."
)

app = typer.Typer(
    name="gpmlp",
    help="Sparse Gaussian process interatomic potentials on SOAP power spectra.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class SelectMethod(StrEnum):
    """Methods of `gpmlp select` (gpmlp.learning.pool.METHODS, which is not imported here, so that --help is quick)."""

    both = "both"
    variance = "variance"
    mahalanobis = "mahalanobis"
    farthest = "farthest"
    cur = "cur"
    random = "random"


Model = Annotated[Path, typer.Argument(help="Model file written by `gpmlp fit`.")]


def _by_role(role: str, paths: Sequence[Path]) -> dict[str, Path]:
    """Files of a role by what messages call them."""
    return {role if not i else f"{role} ({path})": path for i, path in enumerate(paths)}


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"gpmlp {gpmlp.__version__}")
        raise typer.Exit


@app.callback()
def common_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help=f"Show tracebacks (also: {DEBUG}=1).")] = False,
) -> None:
    """Sparse Gaussian process interatomic potentials on SOAP power spectra."""


@app.command("fit")
def fit_command(
    train: Annotated[
        list[Path], typer.Argument(help="Training data: extended XYZ, or any format of ASE; patterns, as 'data/*.xyz'.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Model file to write.")],
    valid: Annotated[Path | None, typer.Option("--valid", help="Validation data, only predicted.")] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="YAML recipe; what it leaves open is chosen from the data.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, e.g. kernel.zeta=2; may be repeated.")
    ] = None,
    robust: Annotated[
        bool, typer.Option("--robust", help="Leave out labels that the fit says are wrong (recipe: robust: true).")
    ] = False,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Processes on this machine that share the work, by dask.")
    ] = None,
    dask: Annotated[
        str | None, typer.Option("--dask", help="Address of a dask scheduler whose workers share it: tcp://host:8786.")
    ] = None,
    keys: Keys = None,
) -> None:
    """Fit a potential to energies, forces and stresses."""
    from gpmlp.cli import console
    from gpmlp.core.calculators import add_import_folder
    from gpmlp.fitting.fit import fit
    from gpmlp.fitting.prepare import outer_baselines
    from gpmlp.fitting.workers import open_executor, workers_of
    from gpmlp.io import archive, ase_atoms, provenance
    from gpmlp.io.baseline_cache import compute_baselines
    from gpmlp.io.files import check_apart, check_target
    from gpmlp.io.label_names import parse_keys
    from gpmlp.io.recipe_files import load_recipe
    from gpmlp.io.structure_files import find_files

    check_target(output, "the model")
    files, parsed = find_files(train), parse_keys(keys or "")
    sources = _by_role("the training data", files) | {"the validation data": valid, "the recipe": recipe}
    check_apart({"the model (--output)": output}, sources)
    chosen = load_recipe(recipe, [*(settings or []), *(["robust=true"] if robust else [])])
    if recipe is not None and chosen.baseline.calculator:
        add_import_folder(recipe.parent)
    outer = outer_baselines(chosen)
    with open_executor(workers, dask) as executor:
        each = workers_of(executor).each if executor is not None else None  # by whom files are read
        with console.StageBars() as stages:
            data = ase_atoms.read_labelled(files, keys=parsed, progress=stages, each=each)
            validation = ase_atoms.read(valid, labelled=True, keys=parsed) if valid is not None else None
        with console.StageBars() as stages:
            compute_baselines(outer, data.structures, files[0], stages)
            if valid is not None and validation is not None:
                compute_baselines(outer, validation[0], valid, stages)
            origin = provenance.file_provenance(training=files, validation=valid)
            about = chosen, validation, stages, origin, data.findings
            potential, report = fit(data.structures, data.targets, *about, executor)
    _warn_of_fit(report)
    archive.save(potential, output)
    console.standard_output().print(console.fit_summary(report.as_dict()))
    console.print_line(f"wrote {output}")


def _warn_of_fit(report: FitReport) -> None:
    """Its findings, and the warnings that are none."""
    from gpmlp.cli import console

    console.print_findings(report.findings)
    for text in report.warnings[sum(finding.severity != "note" for finding in report.findings) :]:
        warnings.warn(text, DataWarning, stacklevel=1)


app.command("check")(check_command)
app.command("locality")(locality_command)
app.command("tune")(tune_command)
app.command("learn")(learn_command)
app.command("relax")(relax_command)
app.command("neb")(neb_command)
app.command("saddle")(saddle_command)
app.command("properties")(properties_command)
app.command("md")(md_command)
app.command("partition")(partition_command)
app.command("transport")(transport_command)
app.command("export")(export_command)
app.add_typer(lammps_app, name="lammps")


@app.command("evaluate")
def evaluate_command(
    model: Model,
    data: Annotated[
        list[Path],
        typer.Argument(help="Reference data: extended XYZ, or any format of ASE; patterns, as 'data/*.xyz'."),
    ],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the errors to this file.")] = None,
    xyz_file: Annotated[
        Path | None, typer.Option("--xyz", help="Write predictions beside references to this file.")
    ] = None,
    variance: Annotated[
        bool, typer.Option("--variance/--no-variance", help="Predict uncertainties and score them (some times slower).")
    ] = True,
    keys: Keys = None,
) -> None:
    """Compare a potential with reference data: errors in all and by config_type, and how well error bars match them."""
    from gpmlp.cli import console
    from gpmlp.io import archive, ase_atoms, provenance
    from gpmlp.io.baseline_cache import compute_baselines
    from gpmlp.io.files import atomic_write, check_apart, check_target
    from gpmlp.io.label_checks.stage import check_evaluated
    from gpmlp.io.label_names import parse_keys
    from gpmlp.io.structure_files import find_files
    from gpmlp.potential.evaluation import evaluate

    for path in (json_file, xyz_file):
        if path is not None:
            check_target(path)
    targets_of = {"the errors (--json)": json_file, "the predictions (--xyz)": xyz_file}
    files = find_files(data)
    check_apart(targets_of, {"the model": model} | _by_role("the data", files))
    potential = archive.load(model)
    with console.StageBars() as stages:
        read = ase_atoms.read_labelled(files, keys=parse_keys(keys or ""), progress=stages)
    structures, targets = read.structures, read.targets
    findings = check_evaluated(structures, targets, read.findings)
    provenance.check_overlap(potential.provenance, potential.calibration.source, structures, files)
    with console.StageBars() as stages:
        compute_baselines(potential.outer_baselines, structures, files[0], stages)
        result = evaluate(potential, structures, targets, stages, variance)
    if json_file is not None:
        with atomic_write(json_file, text=True) as file:
            content = result.as_dict() | {"label_findings": [finding.as_dict() for finding in findings]}
            json.dump(content, file, indent=2, allow_nan=False)
            file.write("\n")
    if xyz_file is not None:
        ase_atoms.write_frames(xyz_file, ase_atoms.with_predictions(structures, targets, result.prediction))
    console.print_findings(findings)
    out = console.standard_output()
    out.print(console.evaluation_table(result))
    if any(entry.n for entry in result.scores.values()):
        out.print(console.scores_table(result))


@app.command("report")
def report_command(
    model: Annotated[Path, typer.Argument(help="Model file; or the folder of a learning run, for the page about it.")],
    data: Annotated[Path | None, typer.Argument(help="Reference data: extended XYZ, or any format of ASE.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write to; created if missing.")
    ] = None,
    keys: Keys = None,
) -> None:
    """Write the uncertainty report: one HTML page, its figures, and every number as JSON."""
    if model.is_dir():
        report_folder(model, data, output)
        return
    if data is None or output is None:
        if not model.exists():
            raise UserError(f"{model}: there is no such file or folder.")
        raise UserError("`gpmlp report MODEL` needs DATA and --output; only the folder of a learning run goes without.")
    from gpmlp.cli import console
    from gpmlp.io import archive, ase_atoms, provenance
    from gpmlp.io.baseline_cache import compute_baselines
    from gpmlp.io.files import check_apart, check_folder
    from gpmlp.io.label_checks.stage import check_evaluated
    from gpmlp.io.label_names import parse_keys
    from gpmlp.potential.evaluation import comparable_targets, evaluate
    from gpmlp.report.model.data import collect_data
    from gpmlp.report.model.page import write_model_page

    check_apart({"the report (--output)": output}, {"the model": model, "the data": data})
    check_folder(output)
    version = archive.read_header(model)["version"]
    potential = archive.load(model)
    read = ase_atoms.read_labelled(data, keys=parse_keys(keys or ""))
    structures, findings = read.structures, check_evaluated(read.structures, read.targets, read.findings)
    targets = comparable_targets(potential, read.targets)
    overlap = provenance.check_overlap(potential.provenance, potential.calibration.source, structures, data)
    with console.StageBars() as stages:
        compute_baselines(potential.outer_baselines, structures, data, stages)
        result = evaluate(potential, structures, targets, stages)
        stages("report", 0, 1, "figures")
        names = model.name, data.name, version
        page = write_model_page(collect_data(potential, structures, targets, result, *names, overlap, findings), output)
        stages("report", 1, 1, "figures")
    console.print_findings(findings)
    out = console.standard_output()
    out.print(console.evaluation_table(result))
    console.print_line(f"wrote {page}")


@app.command("select")
def select_command(
    data: Annotated[Path, typer.Argument(help="The pool: extended XYZ, or any format of ASE; labels are not needed.")],
    number: Annotated[int, typer.Option("--number", "-n", help="How many to pick.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, extended XYZ; best first.")],
    model: Annotated[
        Path | None, typer.Option("--model", help="Model file; variance and mahalanobis need one.")
    ] = None,
    method: Annotated[
        SelectMethod | None, typer.Option("--method", help="If not given: both with a model, farthest without.")
    ] = None,
    environments: Annotated[
        bool, typer.Option("--environments", help="Pick atoms with their surroundings instead of structures.")
    ] = False,
    exclude: Annotated[
        Path | None, typer.Option("--exclude", help="Structures labelled already: nothing like them is picked.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of cur and random; the others draw nothing.")] = 0,
) -> None:
    """Pick the structures of a pool that are most worth a reference calculation."""
    from gpmlp.cli import console
    from gpmlp.io import archive, ase_atoms
    from gpmlp.io.files import check_apart, check_target
    from gpmlp.learning.pool import UNITS, select_pool

    check_target(output)
    check_apart({"the selection (--output)": output}, {"the pool": data, "the model": model, "--exclude": exclude})
    potential = archive.load(model) if model is not None else None
    frames, pool = ase_atoms.read_unlabelled(data)
    excluded = ase_atoms.read_unlabelled(exclude)[1] if exclude is not None else None
    name = method.value if method is not None else None
    with console.StageBars() as stages:
        picked = select_pool(pool, number, name, potential, environments, seed, excluded, stages)
    if picked.repeats:
        warnings.warn(
            f"{data}: the last {picked.repeats} of {number} are like others picked before; nothing else was left.",
            DataWarning,
            stacklevel=1,
        )
    chosen = ase_atoms.picked_frames(frames, picked.structures.tolist(), picked.scores.tolist(), picked.places(pool))
    ase_atoms.write_frames(output, chosen)
    what = f"{number} environments in {len(chosen)}" if environments else f"{number}"
    text = f"picked {what} of {len(frames)} structures ({sum(map(len, chosen))} of {pool.n_atoms} atoms) by {picked.method}"
    scores = f"scores {picked.scores[0]:.3g} to {picked.scores[-1]:.3g}{UNITS[picked.method]}"
    console.print_line(f"{text}, {scores}; wrote {output}")


@app.command("info")
def info_command(
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what a model file is: species, noise, recipe, data, fit report."""
    from gpmlp.cli import console
    from gpmlp.io import archive

    content = archive.read_header(model)
    if as_json:
        from gpmlp.core.quantities import json_value

        typer.echo(json.dumps(json_value(content), indent=2, allow_nan=False))
        return
    out = console.standard_output()
    out.print(console.model_summary(content, [chemical_symbol(z) for z in content["header"]["species"]]))
    if content["header"].get("report"):
        out.print(console.report_summary(content["header"]["report"]))


@app.command("cite")
def cite_command(model: Model) -> None:
    """Print BibTeX entries of the works that a model uses."""
    from gpmlp.io import archive, provenance
    from gpmlp.recipe import Recipe

    content = archive.read_header(model)
    recipe = Recipe.from_header(content["header"]["recipe"])
    typer.echo(visible_text("\n".join(work.bibtex() for work in provenance.citations_of(recipe, content["version"]))))


def print_message(kind: str, text: str) -> None:
    """console.print_message, which is imported where there is something to say."""
    from gpmlp.cli import console

    console.print_message(kind, text)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, ProgressNotice):
        print_message("note", str(message))
    else:
        text = str(message)
        ours = issubclass(category, DataWarning) or category is UserWarning
        print_message("warning", text if ours else f"{text} ({category.__name__})")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments or os.environ.get(DEBUG, "") not in ("", "0")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("always", DataWarning)
        warnings.simplefilter("always", ProgressNotice)
        try:
            # --debug may stand anywhere
            status = app(args=[a for a in arguments if a != "--debug"], prog_name="gpmlp", standalone_mode=False)
            if status == INTERRUPTED:
                raise KeyboardInterrupt
            return status if isinstance(status, int) else 0
        except UserError as error:
            print_message("error", str(error))
            return 2
        except ClickException as error:
            return _usage_error(error)
        except SystemExit as ended:  # of a command that has printed its message
            return int(ended.code or 0)
        except (KeyboardInterrupt, typer.Abort):
            print_message("error", "interrupted; files that were complete are kept, others are as they were.")
            return INTERRUPTED
        except BrokenPipeError:
            # the reader of a pipe (head, less) has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except Exception as error:  # reported, with a traceback on demand: the last line of defence
            if _out_of_memory(error):
                print_message("error", OUT_OF_MEMORY)
                return 1
            if debug:
                traceback.print_exc()
            print_message(
                "error",
                f"{type(error).__name__}: {error}. This is a fault of gpmlp, not of your input. Please report it with the "
                f"command, the traceback (run again with --debug) and the version ({gpmlp.__version__}).",
            )
            return 1


def _out_of_memory(error: Exception) -> bool:
    """Whether memory is used up, which torch reports by a RuntimeError, on a GPU by a subclass of it."""
    texts = ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)
    )


def _usage_error(error: Any) -> int:
    """One line about wrong arguments; the help itself where nothing was asked for."""
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(error.format_message(), err=True)
        return 2
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "gpmlp"
    text = error.format_message().rstrip(".")
    print_message("error", f"{text}{'' if text.endswith('?') else '.'} Try '{command} --help'.")
    return 2
