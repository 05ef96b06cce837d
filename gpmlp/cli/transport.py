"""The command `gpmlp transport`: a model and a liquid in; diffusion, viscosity, activation energies and averages with intervals out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpmlp.cli.interrupts import resumable, terminated_as_interrupted
from gpmlp.core.errors import UserError

if TYPE_CHECKING:
    from ase import Atoms
    from rich.table import Table

    from gpmlp.cli.console import StageBars
    from gpmlp.properties.transport import TransportSettings, TransportState
    from gpmlp.properties.transport_results import TransportResults
    from gpmlp.properties.values import PropertyValue

VALUES, CURVES = "transport.json", "curves.json"


def transport_command(
    model: Annotated[Path, typer.Argument(help="Model file written by `gpmlp fit`.")],
    start: Annotated[Path, typer.Argument(help="Periodic start, e.g. a liquid: the last frame of a file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for numbers and the state of the run.")],
    temperatures: Annotated[
        str, typer.Option("--temperatures-K", "--temperatures", help="Of the runs: 1200,1400,1600.")
    ],
    what: Annotated[
        str, typer.Option("--what", help="Any of diffusion,viscosity,energy,pressure,rdf, with commas between them.")
    ] = "diffusion",
    samples: Annotated[int, typer.Option("--samples", min=0, help="Of the posterior; 0: statistics alone.")] = 8,
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="Of each sample at each temperature.")] = 2,
    precision: Annotated[
        float | None,
        typer.Option(
            "--precision",
            help="Relative statistical error of D and viscosity to reach. If not given: 0.1, or half of what samples scatter.",
        ),
    ] = None,
    length_ps: Annotated[float, typer.Option("--length-ps", help="Longest trajectories.")] = 200.0,
    time_limit_s: Annotated[
        float | None,
        typer.Option("--time-limit-s", "--time-limit", help="Seconds of computing, at most, of this call."),
    ] = None,
    timestep_fs: Annotated[
        float | None,
        typer.Option("--timestep-fs", "--timestep", help="If not given: 0.5 with hydrogen, 1 up to neon, else 2."),
    ] = None,
    segment_ps: Annotated[
        float, typer.Option("--segment-ps", help="Pieces that are averaged; displacements are followed over half.")
    ] = 4.0,
    equilibrate_ps: Annotated[float, typer.Option("--equilibrate-ps", help="Time that does not count.")] = 2.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of samples, velocities and thermostats.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
) -> None:
    """Compute diffusion and viscosity of a liquid or a fast conductor, their activation energy, and static averages."""
    from gpmlp.cli import console
    from gpmlp.io import archive
    from gpmlp.io.ase_atoms import read_frames
    from gpmlp.io.files import check_apart, check_folder
    from gpmlp.properties.transport import STATE, TransportSettings, transport
    from gpmlp.report.properties.page import FILE

    settings = TransportSettings(
        _temperatures(temperatures), tuple(name.strip() for name in what.split(",") if name.strip()), samples, replicas,
        precision, length_ps, time_limit_s, timestep_fs, segment_ps, equilibrate_ps, seed,
    )  # fmt: skip
    check_folder(output)
    targets = {f"{name} (--output)": output / name for name in (VALUES, CURVES, STATE, FILE)}
    check_apart(targets, {"the model": model, "the start": start})
    potential, atoms = archive.load(model), read_frames(start, -1)[0][0]
    if samples and potential.variances is None:
        console.print_message("note", f"{model} has no variances: intervals hold the statistical part alone.")
    words = [*(word for word in sys.argv[1:] if word != "--resume"), "--resume"]
    with terminated_as_interrupted(), resumable(words), console.StageBars() as stages:
        results = transport(potential, atoms, settings, output, resume, lambda state: _show(state, settings, stages))
    _write(results, output)
    _present(results, atoms, samples, output, model.name, start.name)


def _present(results: TransportResults, atoms: Atoms, samples: int, output: Path, model: str, start: str) -> None:
    """The page, and what is printed."""
    from gpmlp.cli import console
    from gpmlp.properties.compute import PropertyResults, named
    from gpmlp.report.properties.page import FILE, write_page

    shown = PropertyResults(
        tuple(results.values), tuple(results.curves), tuple(named([atoms])), tuple(results.notes), samples
    )
    how = "Each sample of the posterior ran molecular dynamics of its own." if samples else None
    origin = f"from which the dynamics began ({start})"
    write_page(shown, output, model, f"{VALUES} and {CURVES}", how, origin)
    for text in results.notes:
        console.print_message("note", text)
    console.standard_output().print(transport_table(results))
    console.print_line(f"{results.stopped}.")
    console.print_line(f"wrote {FILE}, {VALUES}, {CURVES} in {output}")


def _temperatures(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(",") if word.strip())
    except ValueError:
        raise UserError(f"--temperatures-K {text}: must be numbers with commas between them, as 1200,1400.") from None


def _show(state: TransportState, settings: TransportSettings, stages: StageBars) -> None:
    """Where the run is, on its bar."""
    from gpmlp.properties.transport import format_duration

    where = ", ".join(f"{t:g}" for t in settings.temperatures_K) + f" K, {format_duration(state.left_s)} left"
    if state.time_ps < 0:
        whole = max(settings.equilibrate_ps, -state.time_ps)
        stages("equilibration", whole + state.time_ps, whole, where)
        return
    said = ", ".join(_short(value) for value in state.results.values if "infinite" not in value.name)
    stages("dynamics", state.share, 1.0, f"{state.time_ps:.1f} ps at {where}{'; ' if said else ''}{said}")


def _short(value: PropertyValue) -> str:
    """As D Cu 1400 K 0.23 ± 0.02."""
    words = value.name.replace("diffusion_coefficient", "D").replace("activation_energy", "E_a").split("_")
    return f"{' '.join(words)} {value.value:.3g} ± {value.sigma:.1g}"


def _write(results: TransportResults, output: Path) -> None:
    """Values, with what was said of them, and curves."""
    from gpmlp.io.files import atomic_write

    for name, content in ((VALUES, results.values), (CURVES, results.curves)):
        with atomic_write(output / name, text=True) as file:
            json.dump([entry.as_dict() for entry in content], file, indent=2, allow_nan=False)
            file.write("\n")


def transport_table(results: TransportResults) -> Table:
    """One row for each value, with its parts."""
    from rich.table import Table

    from gpmlp.cli.console import literal

    table = Table(title=f"Transport ({results.time_ps:.3g} ps)", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for heading in ("value", "±", "90 %", "model", "statistics", "unit"):
        table.add_column(heading, justify="left" if heading == "unit" else "right", no_wrap=True)
    for value in results.values:
        numbers = value.value, value.sigma, value.parts.get("sampled"), value.parts.get("statistical")
        mean, sigma, sampled, statistical = ("-" if n is None else f"{n:.3g}" for n in numbers)
        interval = f"{value.low_90:.3g} … {value.high_90:.3g}"
        lost = f" ({value.failed} of {value.samples} failed)" if value.failed else ""
        row = f"{value.name}{lost}", mean, sigma, interval, sampled, statistical, value.unit
        table.add_row(*map(literal, row))
    return table
