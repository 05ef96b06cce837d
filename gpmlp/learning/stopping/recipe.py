"""StopRecipe is the validated list of choices of when a run has learned enough; the defaults need no attention."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
NAMES = ("energy", "pressure", "temperature", "rdf", "msd", "diffusion")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class PlateauRecipe(_Section):
    """Predictive uncertainty that no longer falls or rises, and labels that have become rare.

    drift: change of the uncertainty over the window, relative to its level, that the 95 % interval of the slope must exclude.
    significance: of the Mann-Kendall test. labels_per_1000_steps: of all walkers together; its 95 % upper bound must be below.
    """

    drift: Positive = 0.3
    significance: Share = 0.05
    labels_per_1000_steps: Positive = 2.0


class ObservableRecipe(_Section):
    """A quantity whose mean must be known: energy (eV/atom), pressure (GPa), temperature (K), rdf, msd (A^2), diffusion (A^2/fs), or
    'module:function' of an ase.Atoms that gives a number or a vector.

    tolerance: of the standard error of the mean, rms over components; relative to the rms of the mean if `relative`. None: energy
    0.1 k_B T, pressure 0.2 GPa, temperature 2 %, rdf 0.05, msd 10 %, diffusion 20 %, others 5 %.
    cutoff, bins, pair: of rdf, A, such as pair: O-H; all pairs where None. lag_fs: of msd and diffusion.
    """

    name: str = "energy"
    tolerance: Positive | None = None
    relative: bool | None = None
    cutoff: Positive = 6.0
    bins: Annotated[int, Field(ge=2, le=1000)] = 60
    pair: str | None = None
    lag_fs: Positive = 1000.0

    @model_validator(mode="after")
    def _consistent(self) -> ObservableRecipe:
        module, colon, function = self.name.partition(":")
        if self.name not in NAMES and not (colon and module and function):
            raise ValueError(f"`name` must be one of {', '.join(NAMES)}, or module:function; got '{self.name}'")
        if self.pair is not None and self.name != "rdf":
            raise ValueError(f"`pair` is of rdf; {self.name} has none")
        if self.relative is not None and self.tolerance is None:
            raise ValueError("`relative` says how `tolerance` is meant; give both")
        return self


class CoverageRecipe(_Section):
    """Where the dynamics goes lies inside the trust region (novelty at most 1).

    frames: share of the frames that must be inside (its 95 % lower bound). atoms: share of all atoms; None = 1 - 3 (1 - q), q the
    quantile of held-out environments that novelty 1 stands for. far: novelty that no atom of a frame inside may exceed.
    persistent: share of the frames in which one and the same atom may be outside.
    """

    frames: Share = 0.9
    atoms: Share | None = None
    far: Annotated[float, Field(ge=1)] = 1.5
    persistent: Share = 0.2


class StopRecipe(_Section):
    """When to stop: all criteria that are on hold over the same recent frames, or a limit is reached.

    labels_in_window: how many of the latest labels may lie inside the window, 0: it begins after the last one; None: as many as
    `plateau` allows, so that the window is the longest over which labels were rare and the uncertainty steady.
    window_steps: its greatest length for each walker; None: unlimited. temperature: how far, relative, the mean temperature may lie
    from the target. at_least_steps: of all walkers together, before anything is judged. every_frames: how often to judge.
    labels_at_most, time_at_most_h: limits that end the run whatever the criteria say.
    """

    plateau: PlateauRecipe | Literal[False] = PlateauRecipe()
    observable: ObservableRecipe | tuple[ObservableRecipe, ...] | Literal[False] = ObservableRecipe()
    coverage: CoverageRecipe | Literal[False] = CoverageRecipe()
    labels_in_window: Annotated[int, Field(ge=0)] | None = None
    window_steps: Count | None = None
    temperature: Share = 0.05
    at_least_steps: Annotated[int, Field(ge=0)] = 1000
    every_frames: Count = 25
    labels_at_most: Annotated[int, Field(ge=0)] | None = None
    time_at_most_h: Positive | None = None

    @model_validator(mode="after")
    def _consistent(self) -> StopRecipe:
        names = [o.name for o in self.observables]
        if len(set(names)) < len(names):
            raise ValueError(f"`observable` lists a name twice: {', '.join(names)}")
        return self

    @property
    def observables(self) -> tuple[ObservableRecipe, ...]:
        if self.observable is False:
            return ()
        return self.observable if isinstance(self.observable, tuple) else (self.observable,)
