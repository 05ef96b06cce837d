"""Records are what a History keeps of looks: uncertainties, novelties, the ensemble and the observables."""

from __future__ import annotations

import math

from gpmlp.active import observables, walker
from gpmlp.active.history import Record
from gpmlp.active.recipe import DynamicsRecipe
from gpmlp.active.walker import Look

NAN = math.nan


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
        ramp_finished=place.step >= dynamics.ramp,
        threshold=threshold or NAN,
        observables=observer(frame, place.number, time_fs),
    )
