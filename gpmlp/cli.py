"""The command `gpmlp`: arguments in, calls, tables out; no physics.

Exit status: 0 success, 2 an error of the user's (one message, no traceback), 1 an error of ours, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from gpmlp import versions
from gpmlp.checks import DataWarning, UserError, symbol

# typer carries its own copy of click or uses the installed one, according to its version: take the class from the family tree
ClickException = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
DEBUG = "GPMLP_DEBUG"
INTERRUPTED = 130  # by convention 128 + the number of the signal; typer turns Ctrl-C into this status

app = typer.Typer(
    name="gpmlp",
    help="Sparse Gaussian process interatomic potentials on SOAP power spectra.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Ensemble(StrEnum):
    """Ensembles of `gpmlp md`."""

    nve = "nve"
    nvt = "nvt"


Model = Annotated[Path, typer.Argument(help="Model file written by `gpmlp fit`.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"gpmlp {versions.of('gpmlp')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help=f"Show tracebacks (also: {DEBUG}=1).")] = False,
) -> None:
    """Sparse Gaussian process interatomic potentials on SOAP power spectra."""


@app.command("fit")
def fit_command(
    train: Annotated[Path, typer.Argument(help="Training data: extended XYZ, or any format of ASE.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Model file to write.")],
    valid: Annotated[Path | None, typer.Option("--valid", help="Validation data, only predicted.")] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="YAML recipe; what it leaves open is chosen from the data.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, e.g. kernel.zeta=2; may be repeated.")
    ] = None,
) -> None:
    """Fit a potential to energies, forces and stresses."""
    from gpmlp import console
    from gpmlp.fit import fit
    from gpmlp.io import archive, atoms, provenance
    from gpmlp.io.atomic import check_target
    from gpmlp.io.recipes import load_recipe

    check_target(output)
    for path in (train, valid):
        if path is not None and path.resolve() == output.resolve():
            raise UserError(f"{output}: is also a data file of this fit; give the model another name.")
    chosen = load_recipe(recipe, settings or [])
    structures, targets = atoms.read(train)
    validation = atoms.read(valid) if valid is not None else None
    origin = provenance.of_files(training=train, validation=valid)
    with console.Stages() as stages:
        potential, report = fit(structures, targets, chosen, validation, stages, origin)
    for text in report.warnings:
        warnings.warn(text, DataWarning, stacklevel=1)
    archive.save(potential, output)
    out = console.output()
    out.print(console.fit_summary(report.as_dict()))
    out.print(f"wrote {output}", soft_wrap=True, markup=False)


@app.command("evaluate")
def evaluate_command(
    model: Model,
    data: Annotated[Path, typer.Argument(help="Reference data: extended XYZ, or any format of ASE.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the errors to this file.")] = None,
    xyz_file: Annotated[
        Path | None, typer.Option("--xyz", help="Write predictions beside references to this file.")
    ] = None,
    variance: Annotated[
        bool, typer.Option("--variance/--no-variance", help="Predict uncertainties and score them (some times slower).")
    ] = True,
) -> None:
    """Compare a potential with reference data: errors in all and by config_type, and how well they were foreseen."""
    from gpmlp import console
    from gpmlp.evaluation import evaluate
    from gpmlp.io import archive, atoms, provenance
    from gpmlp.io.atomic import atomic, check_target

    for path in (json_file, xyz_file):
        if path is not None:
            check_target(path)
    potential = archive.load(model)
    structures, targets = atoms.read(data)
    role = provenance.same_data(potential.provenance, data)
    if role == "training":
        warnings.warn(
            f"{data}: is the file this model was trained on; its errors say nothing of new structures.",
            DataWarning,
            stacklevel=1,
        )
    with console.Stages() as stages:
        result = evaluate(potential, structures, targets, stages, variance)
    if json_file is not None:
        with atomic(json_file, text=True) as file:
            json.dump(result.as_dict(), file, indent=2, allow_nan=False)
            file.write("\n")
    if xyz_file is not None:
        atoms.write(xyz_file, atoms.beside(structures, targets, result.prediction))
    out = console.output()
    out.print(console.evaluation_table(result))
    if any(entry.n for entry in result.scores.values()):
        out.print(console.scores_table(result))


@app.command("report")
def report_command(
    model: Model,
    data: Annotated[Path, typer.Argument(help="Reference data: extended XYZ, or any format of ASE.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to; made if it is not there.")],
) -> None:
    """Write the uncertainty report: one HTML page, its figures, and every number as JSON."""
    from gpmlp import console, reporting
    from gpmlp.evaluation import evaluate
    from gpmlp.io import archive, atoms
    from gpmlp.io.atomic import atomic
    from gpmlp.report import build

    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; give the name of a folder.")
    version = archive.read_header(model)["version"]
    potential = archive.load(model)
    structures, targets = atoms.read(data)
    with console.Stages() as stages:
        result = evaluate(potential, structures, targets, stages)
        stages("report", 0, 1, "figures")
        collected = reporting.collect(potential, structures, targets, result, model.name, data.name, version)
        page = build(collected, output, atomic)
        stages("report", 1, 1, "figures")
    out = console.output()
    out.print(console.evaluation_table(result))
    out.print(f"wrote {page}", soft_wrap=True, markup=False)


@app.command()
def info(
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what a model file is: species, noise, recipe, data, fit report."""
    from gpmlp import console
    from gpmlp.io import archive

    content = archive.read_header(model)
    if as_json:
        typer.echo(json.dumps(console.plain(content), indent=2, allow_nan=False))
        return
    out = console.output()
    out.print(console.model_summary(content, [symbol(z) for z in content["header"]["species"]]))
    if content["header"].get("report"):
        out.print(console.fit_summary(content["header"]["report"]))


@app.command()
def cite(model: Model) -> None:
    """Print BibTeX entries of what a model stands on."""
    from gpmlp import references
    from gpmlp.io import archive
    from gpmlp.io.recipes import validate

    content = archive.read_header(model)
    recipe = validate(content["header"]["recipe"], str(model))
    typer.echo("\n".join(work.bibtex() for work in references.of(recipe, content["version"])))


@app.command()
def md(
    model: Model,
    start: Annotated[Path, typer.Argument(help="Start structure (the last frame of the file).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Trajectory to write, extended XYZ.")],
    ensemble: Annotated[
        Ensemble, typer.Option("--ensemble", help="nve, or nvt (stochastic velocity rescaling).")
    ] = Ensemble.nve,
    temperature_k: Annotated[
        float | None, typer.Option("--temperature-K", help="Thermostat and initial velocities.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Number of the last step.")] = 1000,
    timestep_fs: Annotated[float, typer.Option("--timestep-fs", help="Time step.")] = 1.0,
    relaxation_fs: Annotated[float, typer.Option("--relaxation-fs", help="Time constant of the thermostat.")] = 100.0,
    interval: Annotated[int, typer.Option("--interval", help="Steps between two frames.")] = 10,
    seed: Annotated[int, typer.Option("--seed", help="Of initial velocities and thermostat.")] = 0,
    energies: Annotated[Path | None, typer.Option("--energies", help="Table of energies to write.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last frame of the trajectory.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
) -> None:
    """Run a short molecular dynamics with a potential."""
    from gpmlp import console
    from gpmlp.engines import md as dynamics
    from gpmlp.engines.ase import GPCalculator
    from gpmlp.io import archive, atoms

    settings = dynamics.Settings(ensemble.value, temperature_k, steps, timestep_fs, relaxation_fs, interval, seed)
    calculator = GPCalculator(archive.load(model), start.name)
    if resume:
        first = dynamics.resume(output, energies)
    else:
        first = atoms.read_frames(start, -1)[0][0]
        first.info = {key: first.info[key] for key in ("config_type",) if key in first.info}
        dynamics.fresh([path for path in (output, energies) if path is not None], overwrite, start)
    with dynamics.record(output, energies) as append, console.Stages() as stages:
        state = None
        for state in dynamics.run(first, calculator, settings):
            append(state)
            energy = f"{state.potential_eV:.4f} eV, drift {state.drift_eV_per_atom:+.1e} eV/atom"
            note = f"step {state.step}, {state.temperature_K:.0f} K, {energy}"
            stages("dynamics", state.step, settings.steps, note)
    if state is None:
        console.message("note", f"{output}: step {steps} is reached already; raise --steps to go on.")
    else:
        console.output().print(
            f"step {state.step}: {note.split(', ', 1)[1]}; wrote {output}", soft_wrap=True, markup=False
        )


def _show_warning(text: Any, category: type[Warning], *_: object, **__: object) -> None:
    from gpmlp import console

    console.message("warning", str(text) if issubclass(category, DataWarning) else f"{text} ({category.__name__})")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    from gpmlp.console import message

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments or os.environ.get(DEBUG, "") not in ("", "0")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("always", DataWarning)
        try:
            # --debug may stand anywhere
            status = app(args=[a for a in arguments if a != "--debug"], prog_name="gpmlp", standalone_mode=False)
            if status == INTERRUPTED:
                raise KeyboardInterrupt
            return status if isinstance(status, int) else 0
        except UserError as error:
            message("error", str(error))
            return 2
        except ClickException as error:
            return _usage_error(error)
        except (KeyboardInterrupt, typer.Abort):
            message("error", "interrupted; files that were complete are kept, others are as they were.")
            return INTERRUPTED
        except BrokenPipeError:
            # the reader of a pipe (head, less) has gone: nobody is left to tell
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except MemoryError:
            message(
                "error", "out of memory; lower memory_GB or inducing.n (--set memory_GB=1), or use a larger machine."
            )
            return 1
        except Exception as error:  # reported, with a traceback on demand: the last line of defence
            if debug:
                traceback.print_exc()
            message(
                "error",
                f"{type(error).__name__}: {error}. This is a fault of gpmlp, not of your input. Please report it with the "
                f"command, the traceback (run again with --debug) and the version ({versions.of('gpmlp')}).",
            )
            return 1


def _usage_error(error: Any) -> int:
    """One line about wrong arguments; the help itself where nothing was asked for."""
    from gpmlp.console import message

    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(error.format_message(), err=True)
        return 2
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "gpmlp"
    message("error", f"{error.format_message().rstrip('.')}. Try '{command} --help'.")
    return 2
