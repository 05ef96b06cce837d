"""WalkerState is the state of a walker in the learning loop: its trusted frame, the label that it waits for, its set-backs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from ase import Atoms
from torch import Tensor

from gpmlp.core.quantities import Targets
from gpmlp.learning import walker
from gpmlp.learning.recipe import DynamicsRecipe, LearnRecipe, TriggerRecipe
from gpmlp.learning.stopping import observables
from gpmlp.learning.stopping.history import History, Record
from gpmlp.learning.triggers import HORIZON, TriggerLimits, asking_probability, broken_guard
from gpmlp.learning.walker import Walker, WalkerSnapshot

NAN = math.nan
# the typical force is that of the latest half of the frames, RECENT at least; of the labels until there are FEWEST frames
RECENT, FEWEST = 50, 2

NEVER = -(10**9)  # a step long ago
MOST_SETBACKS = 8  # in a row, before a walker starts again from the beginning
HALTED = "halted"
RATE_STEPS = 1000  # of trigger.most_per_1000_steps
WALKERS = ("walker", "trusted", "pending")
ON_DISK = {  # keys of a checkpoint that differ from the fields
    "pending": "asked",
    "reason": "why",
    "pending_round": "since",
    "central_atom": "around",
    "label_step": "labelled_at",
    "request_steps": "asked_at",
    "label_severity": "left",
    "farthest_step": "farthest",
}


@dataclass(frozen=True, eq=False)
class WalkerState:
    """A walker and what the loop remembers of it.

    Attributes:
        walker: where it is; trusted: the last place where all limits were kept.
        pending: the place whose label it waits for; reason, cause: of the request, in words and in a word; pending_round: when it was
            made; sent: whether the oracle has it.
        central_atom: of the pending frame, around which a surrogate is cut; -1: the whole frame is labelled.
        label_step: step of the last label; request_steps: steps of the requests of the last 1000 steps; label_severity: severity right
            after the last label.
        setbacks: since it last got farther than ever; farthest_step: that it ever got to; restarts: from its start structure.
    """

    walker: Walker
    trusted: Walker
    pending: Walker | None = None
    reason: str = ""
    cause: str = ""
    pending_round: int = 0
    sent: bool = False
    central_atom: int = -1
    label_step: int = NEVER
    request_steps: tuple[int, ...] = ()
    label_severity: float = 0.0
    setbacks: int = 0
    farthest_step: int = 0
    restarts: int = 0

    def limit_factor(self, trigger: TriggerRecipe) -> float:
        """Factor on the limits: more than 1 in strides that hold a labelled frame, or begin shortly after it.

        Steps on the way to a frame that was labelled ahead (`walker.look_ahead`) are judged as all others are.
        """
        young = -trigger.every < self.walker.step - self.label_step < trigger.cooldown
        return max(1.0, trigger.hysteresis * self.label_severity) if young else 1.0

    def at_label_rate(self, trigger: TriggerRecipe) -> bool:
        """Whether this walker has asked so often that it may not ask for another label now."""
        return sum(step > self.walker.step - RATE_STEPS for step in self.request_steps) >= trigger.most_per_1000_steps

    def after_decision(
        self, snapshot: WalkerSnapshot, recipe: LearnRecipe, starts: Sequence[Atoms], round_: int
    ) -> WalkerState:
        """Go on, wait for a label, or go back and, unless the label rate forbids it, wait for a label."""
        decision = snapshot.decision
        if decision.action == "continue":
            setbacks = self.setbacks if snapshot.walker.step <= self.farthest_step else 0
            farthest = max(self.farthest_step, snapshot.walker.step)
            trusted = snapshot.walker if decision.severity * self.limit_factor(recipe.trigger) <= 1 else self.trusted
            return replace(self, walker=snapshot.walker, trusted=trusted, setbacks=setbacks, farthest_step=farthest)
        physical = broken_guard(snapshot.prediction, snapshot.structure, recipe.trigger.guards) is None
        cause = " and ".join(decision.causes)
        labelled = snapshot
        if decision.action == "label":
            labelled = snapshot.worst or snapshot
            cause, reason = " and ".join(labelled.decision.causes), labelled.decision.reason
            state = self
        else:
            if self.at_label_rate(recipe.trigger):
                return self._set_back(recipe, starts, new_velocities=True)
            state = self._set_back(recipe, starts, new_velocities=not physical)
            reason = f"{HALTED}: {decision.reason}"
            cause += "" if decision.causes == ("guard",) else f", {HALTED}"
        pending = labelled.walker if decision.action == "label" or physical else state.trusted
        request: dict[str, Any] = {"pending": pending, "reason": reason, "cause": cause, "pending_round": round_}
        return replace(state, **request, sent=False, central_atom=-1)

    def _set_back(self, recipe: LearnRecipe, starts: Sequence[Atoms], new_velocities: bool) -> WalkerState:
        """At the last trusted place; at its start if that has led nowhere time and again.

        Args:
            new_velocities: whether velocities have to be drawn again; they are in any case where that place did not help before.
        """
        setbacks, restarts, back = self.setbacks + 1, self.restarts, self.trusted
        if new_velocities or setbacks > 1:
            back = back.with_new_velocities(recipe.dynamics, recipe.seed + 7919 * setbacks)
        if setbacks > MOST_SETBACKS:
            setbacks, restarts = 0, restarts + 1
            start = starts[self.walker.number % len(starts)]
            again = Walker.from_atoms(self.walker.number, start, recipe.dynamics, recipe.seed + 104729 * restarts)
            back = replace(again, step=self.trusted.step)
        label_step = min(self.label_step, back.step)  # what is walked again is after the label
        return replace(self, walker=back, trusted=back, setbacks=setbacks, restarts=restarts, label_step=label_step)

    @property
    def requested(self) -> Walker:
        """The place whose label it waits for; only while it waits."""
        assert self.pending is not None
        return self.pending

    def with_request_settled(self) -> WalkerState:
        """Without its request, which counts from now on."""
        step = self.requested.step
        recent = (*(s for s in self.request_steps if s > step - RATE_STEPS), step)
        return replace(self.without_request(), label_step=step, request_steps=recent)

    def without_request(self) -> WalkerState:
        return replace(self, pending=None, reason="", cause="", sent=False, central_atom=-1)

    def with_new_velocities(self, recipe: LearnRecipe, round_: int) -> WalkerState:
        """At the last trusted place with new velocities, so that it does not come to the same place again."""
        back = self.trusted.with_new_velocities(recipe.dynamics, recipe.seed + 31 * (1 + round_))
        return replace(self, walker=back, trusted=back)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A JSON-able header and tensors for a checkpoint."""
        header: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for field in fields(self):
            name, value = ON_DISK.get(field.name, field.name), getattr(self, field.name)
            if field.name not in WALKERS:
                header[name] = list(value) if isinstance(value, tuple) else value
            elif value is not None:
                header[name], more = value.state()
                tensors |= {f"{name}.{k}": v for k, v in more.items()}
        return header, tensors

    @staticmethod
    def from_state(header: dict[str, Any], tensors: dict[str, Tensor]) -> WalkerState:
        """What `state` gave; checkpoints before version 0.2 hold no cause."""
        values: dict[str, Any] = {}
        for field in fields(WalkerState):
            name = ON_DISK.get(field.name, field.name)
            if name not in header:
                continue
            value = header[name]
            if field.name in WALKERS:
                prefix = f"{name}."
                part = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                value = Walker.from_state(value, part)
            values[field.name] = tuple(value) if isinstance(value, list) else value
        return WalkerState(**values)


def record_from_snapshot(
    snapshot: WalkerSnapshot,
    dynamics: DynamicsRecipe,
    timestep_fs: float,
    limits: TriggerLimits,
    observer: observables.Observer,
) -> Record:
    """The record of a snapshot with force variances.

    Args:
        limits: of the trigger, as they are for a walker that was not labelled just now.
    """
    place, time_fs = snapshot.walker, snapshot.walker.step * timestep_fs
    covariance = snapshot.prediction.forces_covariance
    assert covariance is not None
    frame = walker.atoms_with_results(snapshot)
    has_stress = "stress" in frame.calc.results
    return Record.from_arrays(
        place.number,
        place.step,
        time_fs,
        snapshot.structure.species.numpy(),
        snapshot.force_variances.sum(1).clamp_min(0).sqrt().numpy(),
        snapshot.novelty,
        temperature_K=snapshot.temperature_K,
        target_temperature_K=NAN if dynamics.ensemble == "nve" else dynamics.temperature(place.step),
        pressure_GPa=observables.instantaneous_pressure(frame) if has_stress else NAN,
        target_pressure_GPa=dynamics.pressure(place.step) if dynamics.ensemble == "npt" else NAN,
        asked=snapshot.decision.severity > 1,
        withheld=snapshot.decision.severity > 1 and snapshot.decision.action == "continue",
        ramp_finished=place.step >= dynamics.ramp,
        force_rms=float(snapshot.prediction.forces.square().mean().sqrt()),
        threshold=limits.force or NAN,
        exceedance=max(snapshot.exceedances, default=NAN),
        missed=min(1.0, limits.ratio * float(np.mean(snapshot.exceedances))) if snapshot.exceedances else NAN,
        observables=observer(frame, place.number, time_fs),
    )


def label_probability(history: History, trigger: TriggerRecipe) -> float:
    """The probability of exceeding the limit above which a label is asked for, from strides that are part of the trajectory.

    As many errors may pass in the latest HORIZON steps as would be a share `probability` of these steps, and besides what was not used up
    in those before; what was missed beyond it there has to be made up for.
    """
    kept = ~history.column("asked") | history.column("withheld")  # others are walked again
    walkers, at, largest, share = (history.column(name)[kept] for name in ("walker", "step", "exceedance", "missed"))
    steps = np.zeros(len(at))
    for number in history.walkers:
        mine = walkers == number
        steps[mine] = np.diff(np.maximum.accumulate(at[mine]), prepend=0)  # a walker that was set back makes some again
    known = np.isfinite(share)  # it is not in what a version before 0.2 recorded
    steps, largest, missed = steps[known], largest[known], (share * steps)[known]
    latest = steps[::-1].cumsum()[::-1] <= HORIZON
    left = (trigger.probability * steps - missed)[~latest].sum()
    allowed = trigger.probability * steps[latest].sum() + float(left)
    return asking_probability(largest[latest], missed[latest], allowed, trigger)


def typical_force(history: History, dynamics: DynamicsRecipe, labels: Targets) -> float:
    """Rms force component that the dynamics will come to at its hottest, eV/A: from the latest half of the frames; from labels at first.

    Squares of forces are taken in proportion to the temperature, as in a harmonic crystal. Labels would not do for long: structures
    made by random displacements have forces two to three times as large.
    """
    if len(history) < FEWEST:
        forces = labels.forces[labels.forces.isfinite()]
        return float(forces.square().mean().sqrt())
    latest = slice(-max(RECENT, len(history) // 2), None)
    squares = history.column("force_rms")[latest].astype(float) ** 2
    target = history.column("target_temperature_K")[latest].astype(float)
    heated = np.isfinite(target) & (target > 0)
    squares[heated] *= dynamics.highest_K / target[heated]
    return float(np.sqrt(squares.mean()))
