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
    from gpmlp.engines.md import MDState


class Ensemble(StrEnum):
    """Ensembles of `gpmlp md`."""

    nve = "nve"
    nvt = "nvt"


def md(
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
    from gpmlp.cli import console
    from gpmlp.engines import md as dynamics
    from gpmlp.engines.ase import GPCalculator
    from gpmlp.engines.md import STRIDE, UncertaintyMonitor
    from gpmlp.io import archive, ase_atoms
    from gpmlp.io.files import check_apart

    if resume and overwrite:
        raise UserError("--resume goes on with files that --overwrite would replace; give one of them.")
    targets = {"the trajectory (--output)": output, "the table (--energies)": energies}
    own = resume and start.resolve() == output.resolve()
    check_apart(targets, {"the model": model} | ({} if own else {"the start": start}))
    with _arguments_named_as_options():
        plain = dynamics.MDSettings(ensemble.value, temperature_k, steps, timestep_fs, relaxation_fs, interval, seed)
        every = interval * -(-STRIDE // interval) if uncertainty is None else uncertainty
        settings = replace(plain, uncertainty=every)
    dynamics.check_files([path for path in targets.values() if path is not None], existing=resume or overwrite)
    potential = archive.load(model)
    calculator, monitor = GPCalculator(potential, str(start)), None
    if every and (potential.variances is not None or uncertainty):
        monitor = UncertaintyMonitor(potential, str(start))
    first = None if own else ase_atoms.read_frames(start, -1)[0][0]
    if resume:
        first = dynamics.resume_trajectory(output, energies, first)
    else:
        first.info = {key: first.info[key] for key in ("config_type",) if key in first.info}
    with (
        _arguments_named_as_options(),
        dynamics.record_trajectory(output, energies, overwrite) as append,
        console.Stages() as stages,
    ):
        state, largest = None, Largest()
        for state in dynamics.run_dynamics(first, calculator, settings, monitor):
            append(state)
            largest.see(state)
            energy = f"{state.potential_eV:.4f} eV, drift {state.drift_eV_per_atom:+.1e} eV/atom"
            note = f"step {state.step}, {state.temperature_K:.0f} K, {energy}{_uncertainty(state)}"
            stages("dynamics", state.step, settings.steps, note)
    if state is None:
        console.message("note", f"{output}: step {steps} is reached already; raise --steps to go on.")
        return
    if not first.pbc.any():
        _tell_of_empty_space(start, bool(first.cell.any()))
    console.output().print(f"step {state.step}: {note.split(', ', 1)[1]}; wrote {output}", soft_wrap=True, markup=False)
    if largest.force[0] > -math.inf:
        console.output().print(largest.said(), soft_wrap=True, markup=False)


def _tell_of_empty_space(start: Path, has_cell: bool) -> None:
    """What a start without periodicity means."""
    from gpmlp.cli import console

    cell = "has a cell, but pbc is F F F" if has_cell else "has no cell"
    console.message(
        "note",
        f"{start} {cell}: its atoms moved in empty space, without stress or pressure; nve and nvt are what is possible. "
        "Set pbc if it was meant to be periodic.",
    )


def _uncertainty(state: MDState) -> str:
    """The largest standard deviation of a force and the largest novelty, for the progress bar."""
    if state.uncertainty is None:
        return ""
    force, _, novelty = state.uncertainty.largest
    return f", std of forces up to {force:.2g} eV/A" + (f", novelty {novelty:.2g}" if novelty == novelty else "")


@dataclass
class Largest:
    """The largest uncertainties of a run so far, each with the step and the atom where it was."""

    force: tuple[float, int, int] = (-math.inf, 0, 0)
    novelty: tuple[float, int, int] = (-math.inf, 0, 0)

    def see(self, state: MDState) -> None:
        """Count a state in."""
        if state.uncertainty is None:
            return
        self.force = max(
            self.force, (state.uncertainty.force_std, state.step, state.uncertainty.force_atom), key=itemgetter(0)
        )
        if state.uncertainty.novelty is not None:
            atom = int(state.uncertainty.novelty.argmax())
            self.novelty = max(
                self.novelty, (float(state.uncertainty.novelty[atom]), state.step, atom), key=itemgetter(0)
            )

    def said(self) -> str:
        """One or two sentences; atoms are counted from 0."""
        (force, *at), (novelty, *there) = self.force, self.novelty
        text = f"largest std of a force {force:.3g} eV/A (step {at[0]}, atom {at[1]})"
        if novelty > -math.inf:
            text += f", largest novelty {novelty:.2f} (step {there[0]}, atom {there[1]})"
            text += ": beyond 1, outside of what the model was trained on" if novelty > 1 else ""
        return text


@contextmanager
def _arguments_named_as_options() -> Iterator[None]:
    """Let the errors of `md` name --temperature-K where the library says `temperature_K`."""
    try:
        yield
    except UserError as error:
        names = "|".join(("temperature_K", "steps", "timestep_fs", "relaxation_fs", "interval", "uncertainty"))
        raise UserError(re.sub(f"`({names})`", lambda name: "--" + name[1].replace("_", "-"), str(error))) from error
