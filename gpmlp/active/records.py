"""Records are what a History keeps of looks: uncertainties, novelties, the ensemble and the observables."""

from __future__ import annotations

import math

import numpy as np

from gpmlp.active import observables, walker
from gpmlp.active.history import History, Record
from gpmlp.active.recipe import DynamicsRecipe
from gpmlp.active.walker import Look
from gpmlp.quantities import Targets

NAN = math.nan
# frames that say what forces are typical: the latest half, RECENT at least; labels until there are FEWEST
RECENT, FEWEST = 50, 5


def of(
    now: Look, dynamics: DynamicsRecipe, timestep_fs: float, threshold: float | None, observer: observables.Observer
) -> Record:
    """The record of a full look.

    Args:
        threshold: tolerated force error, eV/A; None where there is none.
    """
    place, time_fs = now.walker, now.walker.step * timestep_fs
    frame = walker.frame(now)
    sigma = now.prediction.forces_covariance.total.diagonal(dim1=1, dim2=2).sum(1).clamp_min(0).sqrt()
    has_stress = "stress" in frame.calc.results
    return Record.of(
        place.number,
        place.step,
        time_fs,
        now.structure.species.numpy(),
        sigma.numpy(),
        now.prediction.novelty.numpy(),
        temperature_K=now.temperature_K,
        target_temperature_K=NAN if dynamics.ensemble == "nve" else dynamics.temperature(place.step),
        pressure_GPa=observables.pressure(frame) if has_stress else NAN,
        target_pressure_GPa=dynamics.pressure(place.step) if dynamics.ensemble == "npt" else NAN,
        asked=now.decision.severity > 1,
        ramp_finished=place.step >= dynamics.ramp,
        force_rms=float(now.prediction.forces.square().mean().sqrt()),
        threshold=threshold or NAN,
        observables=observer(frame, place.number, time_fs),
    )


def typical_force(history: History, dynamics: DynamicsRecipe, labels: Targets) -> float:
    """Rms force component that the dynamics will come to at its hottest, eV/A: from the latest half of the frames; from labels at first.

    Squares of forces are taken in proportion to the temperature, as in a harmonic crystal. Labels would not do for long: structures
    made by random displacements have forces two to three times as large.
    """
    if len(history) < FEWEST:
        known = labels.forces[labels.forces.isfinite()]
        return float(known.square().mean().sqrt())
    latest = slice(-max(RECENT, len(history) // 2), None)
    squares = history.column("force_rms")[latest].astype(float) ** 2
    target = history.column("target_temperature_K")[latest].astype(float)
    known = np.isfinite(target) & (target > 0)
    squares[known] *= dynamics.highest_K / target[known]
    return float(np.sqrt(squares.mean()))
