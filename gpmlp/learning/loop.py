"""The learning loop: molecular dynamics on the model, labels where its uncertainty is too large, until a criterion says stop."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Prediction
from gpmlp.core.structures import Structures
from gpmlp.engines import md
from gpmlp.io import archive
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.learning import exploration, initial_structures, model, surrogate, walker, walker_state
from gpmlp.learning.checkpoint import ActivityTimer, RunFiles, RunProgress, load_checkpoint, recipe_as_begun
from gpmlp.learning.label_requests import LabelRequest, LabelRequests, share_environment
from gpmlp.learning.labels import canonical_structure
from gpmlp.learning.lammps_runs import LammpsRuns
from gpmlp.learning.model import OnlineModel
from gpmlp.learning.recipe import LearnRecipe
from gpmlp.learning.stopping import judge, observables
from gpmlp.learning.stopping.judge import StopVerdict
from gpmlp.learning.target import PropertyTarget, limited, nearly_same
from gpmlp.learning.triggers import StepContext, TriggerDecision, TriggerLimits, trigger_decision, trigger_limits
from gpmlp.learning.walker import Walker, WalkerSnapshot
from gpmlp.learning.walker_state import HALTED, WalkerState
from gpmlp.potential.potential import Potential

CHECKPOINT_S = 20.0  # between two checkpoints, of dynamics that a restart has to repeat
MOST_RESTARTS = 3  # of a walker, before the run gives up
UNSTABLE = "a walker could not be kept stable; see log.jsonl for the guards that fired"


@dataclass(frozen=True, eq=False)
class LoopState:
    """What the loop is doing.

    Attributes:
        phase: 'first labels', 'dynamics', 'labelling', 'learning' or 'stopped'.
        model: None before the first labels are learned, and of a run that had stopped when it was resumed.
        snapshots: the last one of each walker.
        labels, refused, surrogates: how many there are so far; calls: labels asked of the oracle in this process.
        reason: why the last label was asked for; refusal: why the oracle gave none where it last did not.
        verdict: of the stopping criteria; stopped: why the run ended, '' while it goes on.
    """

    phase: str
    progress: RunProgress
    model: OnlineModel | None
    snapshots: tuple[WalkerSnapshot, ...]
    limits: TriggerLimits | None
    labels: int
    refused: int
    surrogates: int
    calls: int
    reason: str
    verdict: StopVerdict | None = None
    stopped: str = ""
    refusal: str = ""

    @property
    def student(self) -> OnlineModel | None:
        """The model, under its name in versions before 0.2."""
        return self.model


def learn(recipe: LearnRecipe, base: Path = Path("."), resume: bool = False) -> Generator[LoopState, None, None]:
    """Run the loop; files go to recipe.output and a run that was interrupted goes on from there.

    Args:
        base: folder that relative paths of the recipe start from.
        resume: go on with the run in the output folder; without it there must be none.

    Raises:
        UserError: bad input; an oracle that cannot be used or fails too often; a disk that is full. The run can be resumed then.
    """
    run = _Run(recipe, base, resume)
    try:
        yield from run.states()
    except UserError:
        run.close()
        run.files.discard_unused()
        raise
    finally:
        run.close()


class _Run:
    """A run under way: the only object here that changes."""

    def __init__(self, recipe: LearnRecipe, base: Path, resume: bool) -> None:
        recipe.oracle.check()  # before anything is written
        recipe = recipe_as_begun(recipe, base / recipe.output)
        self.recipe, self.folder = recipe, base / recipe.output
        self.starts = initial_structures.read_starts(base / recipe.start)
        moments = recipe.oracle.magnetic_moments
        initial_structures.warn_of_electronic_start(self.starts, base / recipe.start, moments)
        if recipe.lammps:
            initial_structures.refuse_electronic_start(self.starts, base / recipe.start)
        if recipe.carve:
            initial_structures.refuse_charged_surrogates(self.starts, base / recipe.start)
        dynamics, starts = recipe.dynamics, self.starts
        self.lammps = LammpsRuns(recipe.lammps, base, self.folder) if recipe.lammps else None
        chosen = recipe.target
        self.target = PropertyTarget.from_recipe(chosen, base, recipe.start, recipe.seed) if chosen else None
        self.walkers = [
            Walker.from_atoms(i, starts[i % len(starts)], dynamics, recipe.seed)
            for i in range(0 if self.lammps or self.target else dynamics.walkers)
        ]
        self.given = base / recipe.bootstrap.given if recipe.bootstrap.given else None
        self.timestep_fs = dynamics.timestep_fs or md.default_timestep_fs(min((a.numbers for a in starts), key=min))
        observer = observables.make_observer(recipe.stop.observables, starts)
        self.files = RunFiles(self.folder, recipe, resume)
        try:
            self.progress = load_checkpoint(self.folder) or RunProgress()
            self.observer, self.timer = observer.restore(self.progress.observer), ActivityTimer(self.progress.seconds)
            self.requests = LabelRequests(recipe.oracle, self.folder, self.files, self.timer)
            self.requests.verify(self.progress.labelled)
        except BaseException:
            self.files.close()
            self.files.discard_unused()
            raise
        self.began = time.monotonic()
        self.reason = ""
        self.verdict: StopVerdict | None = None
        self.model: OnlineModel  # with limits and snapshots, after the first labels
        self.limits: TriggerLimits
        self.snapshots: list[WalkerSnapshot] = []
        self.saved, self.unsaved = time.monotonic(), False

    def close(self) -> None:
        try:
            self.requests.close()
        finally:
            self.files.close()

    # ------------------------------------------------------------ the course of a run

    def states(self) -> Iterator[LoopState]:
        """Go on from the last checkpoint, or begin."""
        self.files.truncate(self.progress)
        if (
            self.files.changed and self.progress.stopped
        ):  # there may be another reason to stop now, whatever ends this process
            self.progress = replace(self.progress, stopped="")
            self._checkpoint()
        if self.progress.stopped:
            yield self._state("stopped")
            return
        if self.lammps:
            self.lammps.plugin()  # what is lacking for it is told before labels are asked for
        if not self.progress.first:
            yield from self._first_labels()
        else:
            yield from self._restore_model()
        while not self.progress.stopped and self.lammps:
            yield from self._lammps_round(self.lammps)
        while not self.progress.stopped and self.target:
            yield from self._target_round(self.target)
        while not self.progress.stopped:
            yield from self._round()
            self._judge()
            if self.progress.stopped or self.unsaved or time.monotonic() - self.saved > CHECKPOINT_S:
                self._checkpoint()
        yield self._state("stopped")

    def _state(self, phase: str) -> LoopState:
        requests, model, limits = self.requests, getattr(self, "model", None), getattr(self, "limits", None)
        return LoopState(
            phase, self.progress, model, tuple(self.snapshots), limits,
            len(requests.labels), len(requests.labels.refusals), requests.n_surrogates, requests.calls, self.reason,
            self.verdict, self.progress.stopped, requests.refused,
        )  # fmt: skip

    def _first_labels(self) -> Iterator[LoopState]:
        given = initial_structures.read_given(self.given) if self.given is not None else []
        entries = [self.requests.labels.append(entry) for entry in given]
        atoms = initial_structures.make_structures(self.starts, self.recipe, len(entries))
        structures = [
            canonical_structure(structures_from_ase([a], [f"first structure {i}"])) for i, a in enumerate(atoms)
        ]
        causes = ["given"] * len(entries)
        for structure in structures:
            self.requests.submit(LabelRequest(structure))
        for i, structure in enumerate(structures):
            self.reason = f"first structure {i + 1} of {len(structures)}"
            yield self._state("first labels")
            entry = self.requests.collect(LabelRequest(structure), self.reason, {"walker": -1, "step": 0})
            if entry is not None:
                entries.append(entry)
                causes.append("first")
        first = {entry.key: entry for entry in entries}
        initial_structures.check_enough(len(first), len(structures), self.requests.labels)
        with self.timer("learning"):
            self.model = OnlineModel.from_labels(list(first.values()), self.recipe.model, self.recipe.refresh_as_used)
        self.progress = replace(self.progress, first=tuple(first))
        yield from self._explore()
        self.progress = replace(self.progress, walkers=tuple(WalkerState(w, w) for w in self.walkers))
        first_causes = dict(zip([entry.key for entry in entries], causes, strict=True))
        first_causes |= dict.fromkeys(self.progress.learned, "explored")
        self._model_changed("first labels", first=[{"key": k, "cause": cause} for k, cause in first_causes.items()])
        self._checkpoint()

    def _explore(self) -> Iterator[LoopState]:
        """Label structures where the model of the first labels is most uncertain."""
        chosen, distance = self.recipe.explore, self.recipe.trigger.guards.distance
        for k in range(chosen.directed):
            if self._all_labels():
                return
            start = structures_from_ase([self.starts[k % len(self.starts)]], [f"explored {k}"])
            structure, self.reason = exploration.explored_structure(k, self.potential, start, chosen.radius_A, distance)
            request = self._request(
                canonical_structure(structure), surrogate.most_uncertain_atom(self.potential, structure)
            )
            self.requests.submit(request)
            yield self._state("first labels")
            entry = self.requests.collect(request, self.reason, {"walker": -1, "step": 0}, self.potential)
            if entry is not None and entry.key not in self.progress.labels:
                self.progress = replace(self.progress, learned=(*self.progress.learned, entry.key))
                with self.timer("learning"):
                    self.model = self.model.with_label(entry)

    def _restore_model(self) -> Iterator[LoopState]:
        """Learn all labels of the checkpoint again, in the same order: the model is then the same, bit by bit."""
        first, others = self.progress.first, self.progress.learned
        entries = [self.requests.entry(key) for key in first]
        self.model = OnlineModel.from_labels(entries, self.recipe.model, self.recipe.refresh_as_used)
        for state in self.progress.walkers:
            if state.sent:
                self.requests.submit(self._request_of(state))
        for key in others:
            yield self._state("learning")
            self.model = self.model.with_label(self.requests.entry(key))
        self._update_snapshots()

    def _round(self) -> Iterator[LoopState]:
        """Let every walker that does not wait go on for a stride, then see to the labels that were asked for."""
        self.progress = replace(self.progress, round=self.progress.round + 1)
        self.limits = self._limits()
        active = [i for i, state in enumerate(self.progress.walkers) if self._is_active(state)]
        with self.timer("dynamics"):
            if len(self.progress.walkers) == 1:
                snapshots = [self._advanced(i) for i in active]
            else:  # even one that goes alone for now: last digits must not depend on who is predicted with whom
                snapshots = walker.advance_together(self.potential, [partial(self._advanced, i) for i in active])
        for i, snapshot in zip(active, snapshots, strict=True):
            self._take(i, snapshot)
            yield self._state("dynamics")
        yield from self._serve_requests()

    def _lammps_round(self, lammps: LammpsRuns) -> Iterator[LoopState]:
        """Let LAMMPS go on until it halts, and learn the frame at which it did; without one it has come to its end."""
        frame = left = lammps.waiting()
        limited, sentence = judge.reached_limit(len(self.progress.labels), self._hours(), self.recipe.stop)
        if frame is None and not limited:
            yield self._state("dynamics")
            with self.timer("dynamics"):
                limits = self.recipe.novelty_limit, self.recipe.trigger.local_energy
                frame = lammps.advance(self.potential, self.folder / "model.gpmlp", *limits)
        if frame is None or limited:
            stopped = sentence if limited else f"LAMMPS came to the end of {lammps.recipe.input}"
            self.progress = replace(self.progress, stopped=stopped)
            self.files.log_event("stopped", reason=stopped, ended=limited or "steps")
            self._checkpoint()
            if not limited:
                lammps.done()
            return
        request = LabelRequest(canonical_structure(frame))
        key, self.reason = self.requests.key(request.structure), f"LAMMPS halted ({lammps.recipe.input})"
        if key not in self.progress.labels:
            yield self._state("labelling")
            notes = {"walker": 0, "step": self.progress.round + 1}
            entry = self.requests.collect(request, self.reason, notes, self.potential, needed=True)
            assert entry is not None
            learned = (*self.progress.learned, key)
            self.progress = replace(self.progress, learned=learned, round=self.progress.round + 1)
            yield self._state("learning")
            with self.timer("learning"):
                self.model = self.model.with_label(entry)
            self._model_changed(self.reason, key=key)
            self._checkpoint()
        elif left is None:
            raise UserError(
                f"LAMMPS halted at a frame that the model has learned: the limit at which {lammps.recipe.input} halts is too low for it."
            )
        lammps.done()

    def _target_round(self, target: PropertyTarget) -> Iterator[LoopState]:
        """Judge the property, and learn the label that sharpens it most."""
        with self.timer("properties"):
            verdict, results = target.judge(self.potential)
        reached = judge.reached_limit(len(self.progress.labels), self._hours(), self.recipe.stop)
        verdict = self.verdict = limited(verdict, *reached)
        self.files.log_event("judged", **verdict.to_json())
        chosen = None
        if not verdict.stop:
            with self.timer("properties"):
                chosen = target.next_label(self.potential, results, self._is_done)
        if chosen is None:
            why = verdict.sentence if verdict.stop else f"the best structures are labelled; {verdict.sentence}"
            ended = "converged" if verdict.converged else verdict.limit or "labelled"
            self.progress = replace(self.progress, stopped=why)
            self.files.log_event("stopped", reason=why, ended=ended)
        else:
            structure, self.reason = chosen
            yield self._state("labelling")
            entry = self.requests.collect(
                LabelRequest(structure), self.reason, {"walker": -1, "step": self.progress.round + 1}, self.potential
            )
            self.progress = replace(self.progress, round=self.progress.round + 1)
            if entry is not None:
                self.progress = replace(self.progress, learned=(*self.progress.learned, entry.key))
                yield self._state("learning")
                with self.timer("learning"):
                    self.model = self.model.with_label(entry)
                self._model_changed(self.reason, key=entry.key)
        self._checkpoint()

    def _is_done(self, structure: Structures) -> bool:
        """Whether a structure, or one as good as the same, is learned, or was refused by the oracle."""
        if self.requests.labels.refusal(self.requests.key(structure)) is not None:
            return True
        return any(nearly_same(structure, self.requests.entry(key).structure) for key in self.progress.labels)

    def _advanced(self, i: int, predict: walker.PredictFunction | None = None) -> WalkerSnapshot:
        """Where a walker is after a stride, or where it stopped in it."""
        trigger, dynamics = self.recipe.trigger, self.recipe.dynamics
        stride = min(trigger.every, dynamics.steps - self.progress.walkers[i].walker.step)

        def advance(start: WalkerSnapshot, decide: walker.DecideFunction, steps: int) -> WalkerSnapshot:
            return walker.advance_walker(
                start, self.potential, decide, dynamics, self.timestep_fs, steps, trigger.watch,
                self.recipe.explore.bias, predict, trigger.local_energy is not None,
            )  # fmt: skip

        decide = self._decide(i)
        snapshot = advance(self.snapshots[i], decide, stride)
        if snapshot.decision.action != "label":
            return snapshot
        return walker.look_ahead(advance, snapshot, decide, trigger.every, trigger.likely)

    def _is_active(self, state: WalkerState) -> bool:
        return state.pending is None and state.walker.step < self.recipe.dynamics.steps

    def _serve_requests(self) -> Iterator[LoopState]:
        """Send requests, and settle what is due: after `ahead` rounds, or when no walker can go on without it.

        What is settled in which round follows from the run alone and not from how fast the oracle is, so that runs repeat.
        """
        while True:
            self._send()
            walkers, now = self.progress.walkers, self.progress.round
            waiting = [i for i, w in enumerate(walkers) if w.sent]
            idle = not any(self._is_active(w) for w in walkers)
            due = [i for i in waiting if idle or now - walkers[i].pending_round >= self.recipe.dynamics.ahead]
            if not due:
                return
            yield from self._settle(min(due, key=lambda i: (walkers[i].pending_round, i)))

    def _send(self) -> None:
        """Ask the oracle, for as many structures at a time as it has workers, none like another that is under way.

        A request of the time before the model last learned is decided upon again first: its label may be needless now.
        """
        for i, state in enumerate(self.progress.walkers):
            if state.pending is None or state.sent:
                continue
            snapshot = self._snapshot(i, state.pending)
            if snapshot.decision.action == "continue" and not state.reason.startswith(HALTED):
                self.files.log_event("dropped", walker=i, step=state.pending.step)
                self.progress = self.progress.with_walker(i, replace(state.without_request(), trusted=state.walker))
                self._update_snapshots([i])
                continue
            under_way = [_structure(w.requested) for w in self.progress.walkers if w.sent]
            room = len(under_way) < self.recipe.oracle.workers
            if not room or self._all_labels(len(under_way)):
                continue
            if any(share_environment(self.potential, snapshot, other) for other in under_way):
                continue
            atoms = snapshot.decision.atoms
            atom = atoms[0] if atoms else surrogate.most_uncertain_atom(self.potential, snapshot.structure)
            state = self._with_surrogate_checked(i, replace(state, sent=True, central_atom=atom))
            self.requests.submit(self._request_of(state))
            self.progress = self.progress.with_walker(i, state)

    def _all_labels(self, under_way: int = 0) -> bool:
        """Whether there are as many labels as there may be."""
        most = self.recipe.stop.labels_at_most
        return most is not None and len(self.progress.labels) + under_way >= most

    def _request(self, frame: Structures, atom: int) -> LabelRequest:
        return LabelRequest.from_frame(frame, atom, self.recipe.carve, self.potential)

    def _request_of(self, state: WalkerState) -> LabelRequest:
        return self._request(_structure(state.requested), state.central_atom)

    def _with_surrogate_checked(self, i: int, state: WalkerState) -> WalkerState:
        """Without the atom around which a surrogate is cut where that would change its environment: all is labelled then."""
        cluster = self._request_of(state).surrogate
        if cluster is None:
            return replace(state, central_atom=-1)
        apart = surrogate.feature_distance(self.potential, _structure(state.requested), cluster)
        notes = {"walker": i, "step": state.requested.step, "atoms": cluster.structure.n_atoms, **cluster.notes()}
        self.files.log_event("carved", **notes, differs=apart, kept=apart <= surrogate.SAME)
        return state if apart <= surrogate.SAME else replace(state, central_atom=-1)

    def _decide(self, i: int) -> walker.DecideFunction:
        """The trigger with the limits that hold for a walker."""
        state, trigger = self.progress.walkers[i], self.recipe.trigger
        factor, withheld = state.limit_factor(trigger), state.at_label_rate(trigger)
        limits = self.limits.times(factor) if factor > 1 else self.limits

        def decide(structure: Structures, prediction: Prediction, context: StepContext) -> TriggerDecision:
            decision = trigger_decision(prediction, structure, limits, context)
            return decision.withheld() if withheld else decision

        return decide

    def _take(self, i: int, snapshot: WalkerSnapshot) -> None:
        """Move a walker to where the decision tells it to."""
        decision = snapshot.decision
        self._record(snapshot)
        if decision.action == "continue":
            self.snapshots[i] = snapshot
        else:
            worst = snapshot.worst or snapshot
            decision = worst.decision
            self.files.log_event(
                "ask", walker=i, step=worst.walker.step, action=decision.action, reason=decision.reason,
                severity=decision.severity, force_limit=self.limits.force, atoms=list(decision.atoms),
                cause=" and ".join(decision.causes), probability=self.limits.probability,
                spread=self.limits.spread, temperature_K=worst.temperature_K,
            )  # fmt: skip
        state = self.progress.walkers[i].after_decision(snapshot, self.recipe, self.starts, self.progress.round)
        self.progress = self.progress.with_walker(i, state)
        if decision.action != "continue" and state.pending is None:  # set back without asking
            self._update_snapshots([i])

    def _settle(self, i: int) -> Iterator[LoopState]:
        """Get the label that a walker waits for, learn it, and let the walker go on from where it is."""
        state = self.progress.walkers[i]
        labelled = state.requested
        request, self.reason, cause = self._request_of(state), state.reason, state.cause
        key = self.requests.key(request.structure)
        yield self._state("labelling")
        step = labelled.step
        notes = {"walker": i, "step": step, "time_fs": step * self.timestep_fs}
        learned = key in self.progress.labels
        entry = None if learned else self.requests.collect(request, self.reason, notes, self.potential)
        state = state.with_request_settled()
        if entry is None:  # refused, or learned already: the same place must not ask for the same thing again
            state = state.with_new_velocities(self.recipe, self.progress.round)
            self.progress = self.progress.with_walker(i, state)
            self._update_snapshots([i])
        else:
            self.progress = replace(self.progress.with_walker(i, state), learned=(*self.progress.learned, key))
            yield self._state("learning")
            calibration = self.model.online.calibration
            with self.timer("learning"):
                self.model = self.model.with_label(entry)
            history = self.progress.history.with_label(updated=self.model.since_refresh == 0)
            self.progress = replace(self.progress, history=history)
            errors = model.prequential_errors(
                self.model.online.prequential[-1], calibration, self.recipe.trigger.probability
            )
            self._model_changed(self.reason, key=key, walker=i, step=step, foreseen=errors, cause=cause)
        snapshot = self._snapshot(i, labelled)
        severity = trigger_decision(snapshot.prediction, snapshot.structure, self.limits).severity
        state = replace(self.progress.walkers[i], label_severity=severity)
        self.progress = self.progress.with_walker(i, state)
        self.unsaved = True

    # ------------------------------------------------------------ learning

    def _model_changed(self, reason: str, **more: object) -> None:
        """What follows from a new label: limits, snapshots, the log, the model file."""
        self._update_snapshots()
        online = self.model.online
        self.files.log_event(
            "learned", reason=reason, labels=online.n_labels, columns=online.rank, noise=online.noise_of_mean,
            force_limit=self.limits.force, refreshed=self.model.since_refresh == 0, **more,
        )  # fmt: skip
        origin = {"learned": {"labels": online.n_labels, "oracle": self.recipe.oracle.calculator}}
        archive.save(replace(self.potential, provenance=origin), self.folder / "model.gpmlp")

    @property
    def potential(self) -> Potential:
        """Of the model as it stands."""
        return self.model.potential

    def _update_snapshots(self, walkers_to_update: Sequence[int] | None = None) -> None:
        """Limits and snapshots under the present model."""
        self.limits = self._limits()
        walkers, snapshots = self.progress.walkers, dict(enumerate(self.snapshots))
        for i in range(len(walkers)) if walkers_to_update is None else walkers_to_update:
            snapshots[i] = self._snapshot(i, walkers[i].walker)
        self.snapshots = list(snapshots.values())

    def _snapshot(self, i: int, place: Walker) -> WalkerSnapshot:
        """Of a place of walker i under the present model."""
        local = self.recipe.trigger.local_energy is not None
        return walker.take_snapshot(place, self.potential, self._decide(i), self.recipe.dynamics, local)

    def _limits(self) -> TriggerLimits:
        """From the model and the history alone, which a run that is resumed has, too."""
        online = self.model.online
        rms = walker_state.typical_force(self.progress.history, self.recipe.dynamics, online.targets)
        atoms = max(len(a) for a in self.starts)
        limits = trigger_limits(self.recipe.trigger, rms, atoms, online.constant, online.calibration)
        asked = len(self.progress.learned)
        spread, ratio = self.model.error_spread(asked), 1.0
        if limits.force is not None:
            ratio = self.model.exceedance_ratio(asked, limits.force)
        asking = walker_state.label_probability(self.progress.history, self.recipe.trigger)
        return replace(limits, probability=asking, novelty=self.recipe.novelty_limit, spread=spread, ratio=ratio)

    # ------------------------------------------------------------ records

    def _record(self, snapshot: WalkerSnapshot) -> None:
        if snapshot.full:
            record = walker_state.record_from_snapshot(
                snapshot, self.recipe.dynamics, self.timestep_fs, self.limits, self.observer
            )
            self.progress = replace(self.progress, history=self.progress.history.append(record))
            self.files.log_event("look", **record.to_json())
        if snapshot.decision.action == "continue":
            self.progress = self.files.write_frame(self.progress, snapshot, self.recipe.thin, self.timestep_fs)

    def _judge(self) -> None:
        """Whether the run has reason to stop."""
        walkers, stop, steps = self.progress.walkers, self.recipe.stop, self.recipe.dynamics.steps
        frames, labels, hours = len(self.progress.history), len(self.progress.labels), self._hours()
        finished = all(w.walker.step >= steps for w in walkers)
        unstable = any(w.restarts > MOST_RESTARTS for w in walkers)
        due = frames - self.progress.judged >= stop.every_frames
        if not (finished or unstable or due or judge.reached_limit(labels, hours, stop)[0]):
            return
        assert self.recipe.model.novelty is not False  # nor does the recipe let it be
        quantile = self.recipe.model.novelty.quantile
        verdict = judge.judge(self.progress.history, stop, quantile=quantile, labels=labels, elapsed_h=hours)
        self.verdict, self.progress = verdict, replace(self.progress, judged=frames)
        self.files.log_event("judged", **verdict.to_json())
        stopped = ended = ""
        if verdict.stop:
            stopped, ended = verdict.sentence, "converged" if verdict.converged else verdict.limit
        elif unstable:
            stopped, ended = UNSTABLE, "unstable"
        elif finished:
            stopped = f"all {steps} steps of {len(walkers)} walker(s) are made; {verdict.sentence}"
            ended = "steps"
        if stopped:
            self.progress = replace(self.progress, stopped=stopped)
            self.files.log_event("stopped", reason=stopped, ended=ended)

    def _hours(self) -> float:
        return self.progress.hours + (time.monotonic() - self.began) / 3600

    def _checkpoint(self) -> None:
        hours, self.began = self._hours(), time.monotonic()
        spent: dict[str, Any] = {"labelled": self.requests.labels.fingerprint, "observer": self.observer.state()}
        spent |= {"hours": hours, "seconds": dict(self.timer.seconds)}
        self.progress = self.files.save_checkpoint(replace(self.progress, **spent))
        self.saved, self.unsaved = time.monotonic(), False


def _structure(w: Walker) -> Structures:
    """What the oracle is asked for at the place of a walker, as the label file will have it."""
    return canonical_structure(structures_from_ase([w.atoms], [f"walker {w.number}, step {w.step}"]))
