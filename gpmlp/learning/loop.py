"""The loop of learning on the fly: dynamics on the model, labels where it does not know, until there is a reason to stop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from gpmlp.core.quantities import Prediction
from gpmlp.core.structures import Structures
from gpmlp.io import archive
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.learning import batched_walkers, exploration, initial_structures, model, walker, walker_state
from gpmlp.learning import surrogate as carving
from gpmlp.learning.checkpoint import Progress, Stopwatch, Trail, load
from gpmlp.learning.label_requests import Desk, Question, alike
from gpmlp.learning.labels import canonical
from gpmlp.learning.model import Student
from gpmlp.learning.recipe import LearnRecipe
from gpmlp.learning.stopping import judge as stopping
from gpmlp.learning.stopping import observables
from gpmlp.learning.stopping.judge import Verdict
from gpmlp.learning.triggers import Before, Decision, Limits, criteria, limits_of
from gpmlp.learning.walker import Look, Walker
from gpmlp.learning.walker_state import HALTED, Mind
from gpmlp.potential.potential import Potential

CHECKPOINT_S = 20.0  # between two checkpoints, of dynamics that a restart has to repeat
MOST_RESTARTS = 3  # before the run gives up on it
UNSTABLE = "a walker could not be kept stable; see log.jsonl for the guards that fired"


@dataclass(frozen=True, eq=False)
class State:
    """What the loop is doing.

    Attributes:
        phase: 'first labels', 'dynamics', 'labelling', 'learning' or 'stopped'.
        looks: the last look at each walker.
        labels, refused, surrogates (labels of what was cut out of larger frames): so far; calls: labels asked of the oracle in this run.
        reason: why the last label was asked for.
        verdict: of the stopping criteria; stopped: why the run ended, '' while it goes on.
    """

    phase: str
    progress: Progress
    student: Student | None
    looks: tuple[Look | None, ...]
    limits: Limits | None
    labels: int
    refused: int
    surrogates: int
    calls: int
    reason: str
    verdict: Verdict | None = None
    stopped: str = ""


def learn(recipe: LearnRecipe, base: Path = Path("."), resume: bool = False) -> Iterator[State]:
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
    finally:
        run.close()


class _Run:
    """A run under way: the only object here that changes."""

    def __init__(self, recipe: LearnRecipe, base: Path, resume: bool) -> None:
        self.recipe, self.folder = recipe, base / recipe.output
        self.starts = initial_structures.starts(base / recipe.start)
        dynamics = recipe.dynamics
        self.walkers = [
            Walker.begin(i, self.starts[i % len(self.starts)], dynamics, recipe.seed) for i in range(dynamics.walkers)
        ]
        self.given = base / recipe.bootstrap.given if recipe.bootstrap.given else None
        numbers = min((a.numbers for a in self.starts), key=min)
        self.timestep_fs = recipe.dynamics.timestep_fs or walker.default_timestep_fs(numbers)
        observer = observables.make(recipe.stop.observables, self.starts)
        self.trail = Trail(self.folder, recipe, resume)
        try:
            self.progress = load(self.folder) or Progress()
            self.observer, self.clock = observer.restore(self.progress.observer), Stopwatch(self.progress.seconds)
            self.desk = Desk(recipe.oracle, self.folder, self.trail, self.clock)
        except BaseException:
            self.trail.close()
            raise
        self.began = time.monotonic()
        self.reason, self.verdict = "", None
        self.student: Student | None = None
        self.limits: Limits | None = None
        self.looks: list[Look | None] = []
        self.saved, self.unsaved = time.monotonic(), False

    def close(self) -> None:
        try:
            self.desk.close()
        finally:
            self.trail.close()

    # ------------------------------------------------------------ the course of a run

    def states(self) -> Iterator[State]:
        """Go on from the last checkpoint, or begin."""
        self.trail.cut(self.progress)
        if self.trail.changed:  # there may be another reason to stop now
            self.progress = replace(self.progress, stopped="")
        if not self.progress.first:
            yield from self._first_labels()
        else:
            yield from self._remember()
        while not self.progress.stopped:
            yield from self._round()
            self._judge()
            if self.progress.stopped or self.unsaved or time.monotonic() - self.saved > CHECKPOINT_S:
                self._checkpoint()
        yield self._state("stopped")

    def _state(self, phase: str) -> State:
        return State(
            phase, self.progress, self.student, tuple(self.looks), self.limits,
            len(self.desk.tape), len(self.desk.tape.refusals), self.desk.surrogates, self.desk.calls, self.reason,
            self.verdict, self.progress.stopped,
        )  # fmt: skip

    def _first_labels(self) -> Iterator[State]:
        found = (
            [self.desk.tape.append(e) for e in initial_structures.given(self.given)] if self.given is not None else []
        )
        wanted = initial_structures.structures(self.starts, self.recipe, len(found))
        structures = [canonical(structures_from_ase([a], [f"first structure {i}"])) for i, a in enumerate(wanted)]
        for structure in structures:
            self.desk.ask(Question(structure))
        for i, structure in enumerate(structures):
            self.reason = f"first structure {i + 1} of {len(structures)}"
            yield self._state("first labels")
            found.append(self.desk.answer(Question(structure), self.reason, {"walker": -1, "step": 0}))
        entries = {entry.key: entry for entry in found if entry is not None}
        initial_structures.enough(len(entries), len(structures), self.desk.tape)
        with self.clock("learning"):
            self.student = Student.begin(list(entries.values()), self.recipe.model, self.recipe.refresh)
        self.progress = replace(self.progress, first=tuple(entries))
        yield from self._explore()
        self.progress = replace(self.progress, minds=tuple(Mind(w, w) for w in self.walkers))
        self._taught("first labels")
        self._checkpoint()

    def _explore(self) -> Iterator[State]:
        """Label structures made where the first ones have left the model blind."""
        chosen = self.recipe.explore
        for k in range(chosen.directed):
            if self._full():
                return
            start = structures_from_ase([self.starts[k % len(self.starts)]], [f"explored {k}"])
            made, self.reason = exploration.make(
                k, self.potential, start, chosen.radius_A, self.recipe.trigger.guards.distance
            )
            asked = self._question(canonical(made), carving.blindest(self.potential, made))
            self.desk.ask(asked)
            yield self._state("first labels")
            entry = self.desk.answer(asked, self.reason, {"walker": -1, "step": 0})
            if entry is not None and entry.key not in self.progress.known:
                self.progress = replace(self.progress, learned=(*self.progress.learned, entry.key))
                with self.clock("learning"):
                    self.student = self.student.taught(entry)

    def _remember(self) -> Iterator[State]:
        """Teach a student all that was learned before, in the same order: what it knows is then the same, bit by bit."""
        first, others = self.progress.first, self.progress.learned
        self.student = Student.begin([self.desk.entry(k) for k in first], self.recipe.model, self.recipe.refresh)
        for mind in self.progress.minds:
            if mind.sent:
                self.desk.ask(self._question(_structure(mind.asked), mind.around))
        for key in others:
            yield self._state("learning")
            self.student = self.student.taught(self.desk.entry(key))
        self._renew()

    def _round(self) -> Iterator[State]:
        """Let every walker that does not wait go on for a stride, then see to the labels that were asked for."""
        self.progress = replace(self.progress, round=self.progress.round + 1)
        self.limits = self._limits()
        active = [i for i, mind in enumerate(self.progress.minds) if self._is_active(mind)]
        with self.clock("dynamics"):
            if len(self.progress.minds) == 1:
                found = [self._advanced(i) for i in active]
            else:  # even one that goes alone for now: last digits must not depend on who was looked at with whom
                found = batched_walkers.advance(self.potential, [partial(self._advanced, i) for i in active])
        for i, now in zip(active, found, strict=True):
            self._follow(i, now)
            yield self._state("dynamics")
        yield from self._serve()

    def _advanced(self, i: int, ask: walker.Ask | None = None) -> Look:
        """Where a walker is after a stride, or where it stopped in it."""
        trigger, dynamics = self.recipe.trigger, self.recipe.dynamics
        mind = self.progress.minds[i]
        stride = min(mind.stride(trigger), dynamics.steps - mind.walker.step)
        return walker.advance(
            self.looks[i], self.potential, self._judge_of(i), dynamics, self.timestep_fs, stride, trigger.watch,
            self.recipe.explore.bias, ask,
        )  # fmt: skip

    def _is_active(self, mind: Mind) -> bool:
        return mind.asked is None and mind.walker.step < self.recipe.dynamics.steps

    def _serve(self) -> Iterator[State]:
        """Send what was asked, and settle what is due: after `ahead` rounds, or when no walker can go on without it.

        What is settled in which round follows from the run alone and not from how fast the oracle is, so that runs repeat.
        """
        while True:
            self._send()
            minds, now = self.progress.minds, self.progress.round
            waiting = [i for i, m in enumerate(minds) if m.sent]
            idle = not any(self._is_active(m) for m in minds)
            due = [i for i in waiting if idle or now - minds[i].since >= self.recipe.dynamics.ahead]
            if not due:
                return
            yield from self._settle(min(due, key=lambda i: (minds[i].since, i)))

    def _send(self) -> None:
        """Ask the oracle, for as many structures at a time as it has workers, none like another that is under way.

        What was asked before the model last learned is judged again first: it may know now.
        """
        for i, mind in enumerate(self.progress.minds):
            if mind.asked is None or mind.sent:
                continue
            look = walker.look(mind.asked, self.potential, self._judge_of(i), self.recipe.dynamics)
            if look.decision.action == "continue" and not mind.why.startswith(HALTED):
                self.trail.log("dropped", walker=i, step=mind.asked.step)
                self.progress = self.progress.with_mind(i, replace(mind, asked=None, why="", trusted=mind.walker))
                self._renew([i])
                continue
            under_way = [_structure(m.asked) for m in self.progress.minds if m.sent]
            room = len(under_way) < self.recipe.oracle.workers
            if not room or self._full(len(under_way)) or any(alike(self.potential, look, other) for other in under_way):
                continue
            around = look.decision.atoms[0] if look.decision.atoms else carving.blindest(self.potential, look.structure)
            mind = self._carved(i, replace(mind, sent=True, around=around))
            self.desk.ask(self._question(_structure(mind.asked), mind.around))
            self.progress = self.progress.with_mind(i, mind)

    def _full(self, under_way: int = 0) -> bool:
        """Whether there are as many labels as there may be."""
        most = self.recipe.stop.labels_at_most
        return most is not None and len(self.progress.known) + under_way >= most

    def _question(self, frame: Structures, around: int) -> Question:
        return Question.about(frame, around, self.recipe.carve, self.potential)

    def _carved(self, i: int, mind: Mind) -> Mind:
        """With the atom around which a surrogate is carved, having said what it is like; without where all is labelled."""
        frame = _structure(mind.asked)
        surrogate = self._question(frame, mind.around).surrogate
        if surrogate is None:
            return replace(mind, around=-1)
        differs = carving.differs(self.potential, frame, surrogate)
        notes = {"walker": i, "step": mind.asked.step, "atoms": surrogate.structure.n_atoms, **surrogate.notes()}
        self.trail.log("carved", **notes, differs=differs, kept=differs <= carving.SAME)
        return mind if differs <= carving.SAME else replace(mind, around=-1)

    def _judge_of(self, i: int) -> walker.Judge:
        """Criteria with the limits that hold for a walker."""
        mind, trigger = self.progress.minds[i], self.recipe.trigger
        loose, rationed = mind.looseness(trigger), mind.rationed(trigger)
        limits = self.limits.times(loose) if loose > 1 else self.limits

        def judge(structure: Structures, prediction: Prediction, before: Before) -> Decision:
            found = criteria(prediction, structure, limits, before)
            return found.withheld() if rationed else found

        return judge

    def _follow(self, i: int, now: Look) -> None:
        """Move a walker to where the look tells it to."""
        mind, decision = self.progress.minds[i], now.decision
        self._record(now)
        if decision.action == "continue":
            self.looks[i] = now
        else:
            self.trail.log(
                "ask", walker=i, step=now.walker.step, action=decision.action, reason=decision.reason,
                severity=decision.severity, force_limit=self.limits.force, atoms=list(decision.atoms),
            )  # fmt: skip
        mind = mind.following(now, self.recipe, self.starts, self.progress.round)
        self.progress = self.progress.with_mind(i, mind)
        if decision.action != "continue" and mind.asked is None:  # set back without asking
            self._renew([i])

    def _settle(self, i: int) -> Iterator[State]:
        """Get the label that a walker waits for, learn it, and let the walker go on from where it is."""
        mind = self.progress.minds[i]
        question, self.reason = self._question(_structure(mind.asked), mind.around), mind.why
        key = self.desk.key(question.structure)
        yield self._state("labelling")
        step = mind.asked.step
        notes = {"walker": i, "step": step, "time_fs": step * self.timestep_fs}
        entry = None if key in self.progress.known else self.desk.answer(question, self.reason, notes)
        mind = mind.answered()
        if entry is None:  # refused, or known already: the same place must not ask for the same thing again
            self.progress = self.progress.with_mind(i, mind.rested(self.recipe, self.progress.round))
            self._renew([i])
        else:
            self.progress = replace(self.progress.with_mind(i, mind), learned=(*self.progress.learned, key))
            yield self._state("learning")
            before = self.student.online.calibration
            with self.clock("learning"):
                self.student = self.student.taught(entry)
            history = self.progress.history.with_label(updated=self.student.since == 0)
            self.progress = replace(self.progress, history=history)
            told = model.plain(self.student.online.prequential[-1], before, self.recipe.trigger.probability)
            self._taught(self.reason, key=key, walker=i, step=step, foreseen=told)
        left = criteria(self.looks[i].prediction, self.looks[i].structure, self.limits).severity
        self.progress = self.progress.with_mind(i, replace(self.progress.minds[i], left=left))
        self.unsaved = True

    # ------------------------------------------------------------ learning

    def _taught(self, why: str, **more: object) -> None:
        """What follows from a new label: limits, looks, the model file, the log."""
        self._renew()
        online = self.student.online
        self.trail.log(
            "learned", reason=why, labels=online.n_labels, columns=online.factor.columns, noise=online.noise,
            force_limit=self.limits.force, refreshed=self.student.since == 0, **more,
        )  # fmt: skip
        self._save_model()

    @property
    def potential(self) -> Potential:
        """The model as it stands."""
        return self.student.potential

    def _save_model(self) -> None:
        """With where it came from."""
        about = {"learned": {"labels": self.student.online.n_labels, "oracle": self.recipe.oracle.calculator}}
        archive.save(replace(self.potential, provenance=about), self.folder / "model.gpmlp")

    def _renew(self, some: Sequence[int] | None = None) -> None:
        """Limits and looks under the present model."""
        self.limits = self._limits()
        self.looks = self.looks or [None] * len(self.progress.minds)
        for i in range(len(self.looks)) if some is None else some:
            self.looks[i] = walker.look(
                self.progress.minds[i].walker, self.potential, self._judge_of(i), self.recipe.dynamics
            )

    def _limits(self) -> Limits:
        """From the model and what was seen so far: what a run that is resumed knows too."""
        online = self.student.online
        rms = walker_state.typical_force(self.progress.history, self.recipe.dynamics, online.targets)
        atoms = max(len(a) for a in self.starts)
        return limits_of(self.recipe.trigger, rms, atoms, online.constant, online.calibration)

    # ------------------------------------------------------------ records

    def _record(self, now: Look) -> None:
        if now.full:
            record = walker_state.record_of(
                now, self.recipe.dynamics, self.timestep_fs, self.limits.force, self.observer
            )
            self.progress = replace(self.progress, history=self.progress.history.append(record))
            self.trail.log("look", **record.plain())
        if now.decision.action != "halt":
            self.progress = self.trail.frame(self.progress, now, self.recipe.thin, self.timestep_fs)

    def _judge(self) -> None:
        """Whether the run has reason to stop."""
        minds, stop = self.progress.minds, self.recipe.stop
        looks, labels, hours = len(self.progress.history), len(self.progress.known), self._hours()
        made = all(m.walker.step >= self.recipe.dynamics.steps for m in minds)
        lost = any(m.restarts > MOST_RESTARTS for m in minds)
        due = looks - self.progress.judged >= stop.every_frames
        if not (made or lost or due or stopping.limit(labels, hours, stop)[0]):
            return
        quantile = self.recipe.model.novelty.quantile
        self.verdict = stopping.judge(self.progress.history, stop, quantile=quantile, labels=labels, elapsed_h=hours)
        self.progress = replace(self.progress, judged=looks)
        self.trail.log("judged", **self.verdict.plain())
        stopped = ""
        if self.verdict.stop:
            stopped = self.verdict.sentence
        elif lost:
            stopped = UNSTABLE
        elif made:
            stopped = (
                f"all {self.recipe.dynamics.steps} steps of {len(minds)} walker(s) are made; {self.verdict.sentence}"
            )
        if stopped:
            self.progress = replace(self.progress, stopped=stopped)
            self.trail.log("stopped", reason=stopped)

    def _hours(self) -> float:
        return self.progress.hours + (time.monotonic() - self.began) / 3600

    def _checkpoint(self) -> None:
        hours, self.began = self._hours(), time.monotonic()
        spent = {"observer": self.observer.state(), "hours": hours, "seconds": dict(self.clock.seconds)}
        self.progress = self.trail.checkpoint(replace(self.progress, **spent))
        self.saved, self.unsaved = time.monotonic(), False


def _structure(w: Walker) -> Structures:
    """What the oracle is asked for at the place of a walker, as the tape will have it."""
    return canonical(structures_from_ase([w.atoms], [f"walker {w.number}, step {w.step}"]))
