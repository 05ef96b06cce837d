"""A Mind is a walker with what the loop remembers of it: how it follows what was seen, is set back, and waits for its label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from ase import Atoms

from gpmlp.core.quantities import Targets
from gpmlp.learning import walker
from gpmlp.learning.recipe import DynamicsRecipe, LearnRecipe, TriggerRecipe
from gpmlp.learning.stopping import observables
from gpmlp.learning.stopping.history import History, Record
from gpmlp.learning.triggers import guard
from gpmlp.learning.walker import Look, Walker

NAN = math.nan
# frames that say what forces are typical: the latest half, RECENT at least; labels until there are FEWEST
RECENT, FEWEST = 50, 5

NEVER = -(10**9)  # a step long ago
MOST_SETBACKS = 8  # of a walker that gets nowhere, before it starts again from the beginning
HALTED = "halted"
SOONEST = 2  # cheap looks before the first full one after a label
PER = 1000  # steps, of trigger.most_per_1000_steps


@dataclass(frozen=True, eq=False)
class Mind:
    """A walker with what the loop remembers of it.

    Attributes:
        walker: where it is; trusted: the last place where all was well.
        asked: the place whose label it waits for; why: the reason; since: the round when it asked; sent: whether the oracle knows.
        around: the atom of that place around which a surrogate is carved; -1: none is, all of it is labelled.
        labelled_at: step of its last label; asked_at: steps of those of the last thousand steps; left: severity right after the last.
        setbacks: since it last got farther than ever; farthest: step it ever got to; restarts: from its start structure.
    """

    walker: Walker
    trusted: Walker
    asked: Walker | None = None
    why: str = ""
    since: int = 0
    sent: bool = False
    around: int = -1
    labelled_at: int = NEVER
    asked_at: tuple[int, ...] = ()
    left: float = 0.0
    setbacks: int = 0
    farthest: int = 0
    restarts: int = 0

    def looseness(self, trigger: TriggerRecipe) -> float:
        """Factor on the limits: more than 1 shortly after a label."""
        young = self.walker.step - self.labelled_at < trigger.cooldown
        return max(1.0, trigger.hysteresis * self.left) if young else 1.0

    def stride(self, trigger: TriggerRecipe) -> int:
        """Steps to the next full look: no more than there are since its last label, which tells more of forces than of local energies:
        right after it what these say of forces is too little."""
        return min(trigger.every, max(SOONEST * trigger.watch, self.walker.step - max(self.labelled_at, 0)))

    def rationed(self, trigger: TriggerRecipe) -> bool:
        """Whether labels came so often that this walker may not ask for another one now."""
        return sum(step > self.walker.step - PER for step in self.asked_at) >= trigger.most_per_1000_steps

    def following(self, now: Look, recipe: LearnRecipe, starts: Sequence[Atoms], round_: int) -> Mind:
        """Where the decision of a look leads: on, to a question, or back and, unless it may not ask now, to a question."""
        decision = now.decision
        if decision.action == "continue":
            setbacks = self.setbacks if now.walker.step <= self.farthest else 0
            farthest = max(self.farthest, now.walker.step)
            trusted = now.walker if decision.severity * self.looseness(recipe.trigger) <= 1 else self.trusted
            return replace(self, walker=now.walker, trusted=trusted, setbacks=setbacks, farthest=farthest)
        physical = guard(now.prediction, now.structure, recipe.trigger.guards) is None
        if decision.action == "label":
            mind, why = replace(self, walker=now.walker), decision.reason
        else:
            if self.rationed(recipe.trigger):
                return self._set_back(recipe, starts, fresh=True)
            mind, why = self._set_back(recipe, starts, fresh=not physical), f"{HALTED}: {decision.reason}"
        asked = now.walker if decision.action == "label" or physical else mind.trusted
        return replace(mind, asked=asked, why=why, since=round_, sent=False, around=-1)

    def _set_back(self, recipe: LearnRecipe, starts: Sequence[Atoms], fresh: bool) -> Mind:
        """At the last trusted place; at its start if that has led nowhere time and again.

        Args:
            fresh: whether velocities have to be drawn again; they are in any case where that place did not help before.
        """
        setbacks, restarts, back = self.setbacks + 1, self.restarts, self.trusted
        if fresh or setbacks > 1:
            back = back.rested(recipe.dynamics, recipe.seed + 7919 * setbacks)
        if setbacks > MOST_SETBACKS:
            setbacks, restarts = 0, restarts + 1
            start = starts[self.walker.number % len(starts)]
            begun = Walker.begin(self.walker.number, start, recipe.dynamics, recipe.seed + 104729 * restarts)
            back = replace(begun, step=self.trusted.step)
        since = min(self.labelled_at, back.step)  # what is walked again is after the label
        return replace(self, walker=back, trusted=back, setbacks=setbacks, restarts=restarts, labelled_at=since)

    def answered(self) -> Mind:
        """Without its question."""
        step = self.asked.step
        recent = (*(s for s in self.asked_at if s > step - PER), step)
        mind = replace(self, asked=None, why="", sent=False, around=-1)
        return replace(mind, labelled_at=self.walker.step, asked_at=recent)

    def rested(self, recipe: LearnRecipe, round_: int) -> Mind:
        """At the last trusted place with new velocities, where the same place must not ask for the same thing again."""
        back = self.trusted.rested(recipe.dynamics, recipe.seed + 31 * (1 + round_))
        return replace(self, walker=back, trusted=back)


def record_of(
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
