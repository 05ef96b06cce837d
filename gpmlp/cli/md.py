"""The command `gpmlp md`: a model and a start in, a trajectory and a table of energies out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpmlp.core.errors import UserError

if TYPE_CHECKING:
    from ase import Atoms

    from gpmlp.engines.md import MDSettings, MDState
    from gpmlp.potential.potential import Potential


class Ensemble(StrEnum):
    """Ensembles of `gpmlp md`."""

    nve = "nve"
    nvt = "nvt"


def md_command(
    model: Annotated[Path, typer.Argument(help="Model file written by `gpmlp fit`.")],
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
    uncertainty: Annotated[
        int | None,
        typer.Option(
            "--uncertainty",
            help="Steps between two frames with standard deviations and novelties, a multiple of --interval; 0: none. If not given: "
            "100 or the next multiple.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of initial velocities and thermostat.")] = 0,
    energies: Annotated[Path | None, typer.Option("--energies", help="Table of energies to write.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last frame of the trajectory; START is only compared.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
) -> None:
    """Run a short molecular dynamics with a potential."""
    from gpmlp.engines.md import STRIDE, MDSettings, check_files
    from gpmlp.io import archive
    from gpmlp.io.files import check_apart

    if resume and overwrite:
        raise UserError("--resume goes on with files that --overwrite would replace; give one of them.")
    targets = {"the trajectory (--output)": output, "the table (--energies)": energies}
    itself = resume and start.resolve() == output.resolve()
    check_apart(targets, {"the model": model} | ({} if itself else {"the start": start}))
    with _arguments_named_as_options():
        settings = MDSettings(ensemble.value, temperature_k, steps, timestep_fs, relaxation_fs, interval, seed)
        every = interval * -(-STRIDE // interval) if uncertainty is None else uncertainty
        settings = replace(settings, uncertainty=every)
    check_files([path for path in targets.values() if path is not None], existing=resume or overwrite)
    potential = archive.load(model)
    monitored = bool(every and (potential.variances is not None or uncertainty))
    first = _first_frame(start, output, energies, resume, itself)
    _run(potential, start, first, settings, monitored, output, energies, overwrite)


def _run(
    potential: Potential,
    start: Path,
    first: Atoms,
    settings: MDSettings,
    monitored: bool,
    output: Path,
    energies: Path | None,
    overwrite: bool,
) -> None:
    """Run the dynamics with its progress, and print how it ended."""
    from gpmlp.cli import console
    from gpmlp.engines.ase import GPCalculator
    from gpmlp.engines.md import UncertaintyMonitor, record_trajectory, run_dynamics

    calculator = GPCalculator(potential, str(start))
    monitor = UncertaintyMonitor(potential, str(start)) if monitored else None
    state, largest = None, LargestUncertainty()
    with (
        _arguments_named_as_options(),
        record_trajectory(output, energies, overwrite) as append,
        console.StageBars() as stages,
    ):
        for state in run_dynamics(first, calculator, settings, monitor):
            append(state)
            largest.add_state(state)
            stages("dynamics", state.step, settings.steps, f"step {state.step}, {_summary(state)}")
    if state is None:
        console.print_message("note", f"{output}: step {settings.steps} is reached already; raise --steps to go on.")
        return
    if not first.pbc.any():
        cell = "has a cell, but pbc is F F F" if first.cell.any() else "has no cell"
        console.print_message(
            "note",
            f"{start} {cell}: its atoms moved in empty space, without stress or pressure; nve and nvt are what is possible. "
            "Set pbc if it was meant to be periodic.",
        )
    console.print_line(f"step {state.step}: {_summary(state)}; wrote {output}")
    if largest.force[0] > -math.inf:
        console.print_line(largest.sentence())


def _first_frame(start: Path, output: Path, energies: Path | None, resume: bool, itself: bool) -> Atoms:
    """The frame that the dynamics begins from: of START, or the last of the trajectory that is resumed."""
    from gpmlp.engines.md import resume_trajectory
    from gpmlp.io.ase_atoms import read_frames
    from gpmlp.io.charges import is_total_charge

    if itself:
        return resume_trajectory(output, energies, None)
    first = read_frames(start, -1)[0][0]
    if resume:
        return resume_trajectory(output, energies, first)
    first.info = {key: value for key, value in first.info.items() if key == "config_type" or is_total_charge(key)}
    return first


def _summary(state: MDState) -> str:
    """Temperature, energy, and where they were computed the largest standard deviation of a force and novelty."""
    text = f"{state.temperature_K:.0f} K, {state.potential_eV:.4f} eV, drift {state.drift_eV_per_atom:+.1e} eV/atom"
    if state.uncertainty is None:
        return text
    force, _, novelty = state.uncertainty.largest
    return f"{text}, std of forces up to {force:.2g} eV/A" + (f", novelty {novelty:.2g}" if novelty == novelty else "")


@dataclass
class LargestUncertainty:
    """The largest standard deviation of a force and the largest novelty of a run, each with its step and atom."""

    force: tuple[float, int, int] = (-math.inf, 0, 0)
    novelty: tuple[float, int, int] = (-math.inf, 0, 0)

    def add_state(self, state: MDState) -> None:
        """Count a state in."""
        now = state.uncertainty
        if now is None:
            return
        self.force = max(self.force, (now.force_std, state.step, now.force_atom), key=itemgetter(0))
        if now.novelty is not None:
            atom = int(now.novelty.argmax())
            self.novelty = max(self.novelty, (float(now.novelty[atom]), state.step, atom), key=itemgetter(0))

    def sentence(self) -> str:
        """One or two sentences; atoms are counted from 0."""
        force, step, atom = self.force
        text = f"largest std of a force {force:.3g} eV/A (step {step}, atom {atom})"
        novelty, step, atom = self.novelty
        if novelty > -math.inf:
            text += f", largest novelty {novelty:.2f} (step {step}, atom {atom})"
            text += ": beyond 1, outside of what the model was trained on" if novelty > 1 else ""
        return text


@contextmanager
def _arguments_named_as_options() -> Iterator[None]:
    """Let the errors of `md` name --temperature-K where the library says `temperature_K`."""
    try:
        yield
    except UserError as error:
        names = "temperature_K|steps|timestep_fs|relaxation_fs|interval|uncertainty"
        raise UserError(re.sub(f"`({names})`", lambda name: "--" + name[1].replace("_", "-"), str(error))) from error
