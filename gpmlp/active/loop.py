"""The loop of learning on the fly: dynamics on the model, labels where it does not know, until there is a reason to stop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ase import Atoms

from gpmlp.active import bootstrap, explore, observables, prophecy, stopping, walker
from gpmlp.active.checkpoint import Mind, Progress, Trail, load
from gpmlp.active.criteria import Before, Decision, Limits, criteria, guard, limits_of
from gpmlp.active.history import Record
from gpmlp.active.labelling import Labeller, stop_if_told
from gpmlp.active.oracle import Refusal
from gpmlp.active.recipe import LearnRecipe
from gpmlp.active.stopping import Verdict
from gpmlp.active.stopwatch import Stopwatch
from gpmlp.active.student import Student
from gpmlp.active.tape import Entry, Tape, canonical, key_of
from gpmlp.active.walker import Look, Walker
from gpmlp.checks import UserError
from gpmlp.io import archive
from gpmlp.io.atoms import read_frames, structures_from_ase
from gpmlp.potential import Potential
from gpmlp.quantities import Prediction
from gpmlp.structures import Structures
from gpmlp.terms import View

CHECKPOINT_S = 20.0  # between two checkpoints, of dynamics that a restart has to repeat
MOST_SETBACKS = 8  # of a walker that gets nowhere, before it starts again from the beginning
MOST_RESTARTS = 3  # before the run gives up on it
HALTED = "halted"
ALIKE = 0.999  # covariance of unit environments above which two atoms that ask are one


@dataclass(frozen=True, eq=False)
class State:
    """What the loop is doing.

    Attributes:
        phase: 'first labels', 'dynamics', 'labelling', 'learning' or 'stopped'.
        looks: the last look at each walker.
        labels, refused: so far; calls: labels asked of the oracle in this run.
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
        self.starts = _starts(base / recipe.start)
        self.given = base / recipe.bootstrap.given if recipe.bootstrap.given else None
        numbers = min((a.numbers for a in self.starts), key=min)
        self.timestep_fs = recipe.dynamics.timestep_fs or walker.default_timestep_fs(numbers)
        self.trail = Trail(self.folder, recipe, resume)
        self.tape = Tape(self.folder / "labels.xyz")
        self.labeller = Labeller(recipe.oracle, self.folder)
        self.oracle_hash = recipe.oracle.settings_hash
        self.observer = observables.make(recipe.stop.observables)
        self.began = time.monotonic()
        self.calls, self.reason, self.verdict = 0, "", None
        self.student: Student | None = None
        self.limits: Limits | None = None
        self.looks: list[Look | None] = []
        self.saved, self.unsaved = time.monotonic(), False
        self.progress, self.clock = Progress(), Stopwatch()

    def close(self) -> None:
        self.labeller.close()
        self.trail.close()

    # ------------------------------------------------------------ the course of a run

    def states(self) -> Iterator[State]:
        """Go on from the last checkpoint, or begin."""
        self.progress = load(self.folder) or Progress()
        self.clock = Stopwatch(self.progress.seconds)
        self.observer = self.observer.restore(self.progress.observer)
        self.trail.cut(self.progress)
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
            len(self.tape), len(self.tape.refusals), self.calls, self.reason, self.verdict, self.progress.stopped,
        )  # fmt: skip

    def _first_labels(self) -> Iterator[State]:
        entries: list[Entry] = []
        if self.given is not None:
            entries += [self.tape.append(e) for e in _given(self.given)]
        wanted = bootstrap.structures(self.starts, self.recipe)
        structures = [canonical(structures_from_ase([a], [f"first structure {i}"])) for i, a in enumerate(wanted)]
        for structure in structures:
            self._ask(structure)
        for i, structure in enumerate(structures):
            self.reason = f"first structure {i + 1} of {len(structures)}"
            yield self._state("first labels")
            found = self._answer(structure, self.reason, {"walker": -1, "step": 0})
            entries += [found] if found is not None else []
        if len(entries) < 2:
            raise UserError(
                f"Only {len(entries)} of the first {len(structures)} structures could be labelled; see {self.tape.refused_path}."
            )
        with self.clock("learning"):
            self.student = Student.begin(entries, self.recipe.model, self.recipe.refresh)
        self.progress = replace(self.progress, first=tuple(e.key for e in entries))
        yield from self._explore()
        dynamics = self.recipe.dynamics
        walkers = [
            Walker.begin(i, self.starts[i % len(self.starts)], dynamics, self.recipe.seed)
            for i in range(dynamics.walkers)
        ]
        minds = tuple(Mind(w, w) for w in walkers)
        self.progress = replace(self.progress, minds=minds)
        self._taught("first labels")
        self._checkpoint()

    def _explore(self) -> Iterator[State]:
        """Label structures made where the first ones have left the model blind."""
        chosen = self.recipe.explore
        for k in range(chosen.directed):
            start = structures_from_ase([self.starts[k % len(self.starts)]], [f"explored {k}"])
            share = self.recipe.trigger.guards.distance
            if k % 2:
                made, how = explore.ascend(self.potential, start, chosen.radius_A, share=share), "up the slope of σ"
            else:
                atom = k // 2 % start.n_atoms
                made, how = (
                    explore.rare(self.potential, start, atom, chosen.radius_A, share),
                    f"rare around atom {atom}",
                )
            asked, self.reason = canonical(made), f"explored: {how}"
            self._ask(asked)
            yield self._state("first labels")
            entry = self._answer(asked, self.reason, {"walker": -1, "step": 0})
            if entry is not None and entry.key not in self.progress.known:
                self.progress = replace(self.progress, learned=(*self.progress.learned, entry.key))
                with self.clock("learning"):
                    self.student = self.student.taught(entry)

    def _remember(self) -> Iterator[State]:
        """Teach a student all that was learned before, in the same order: what it knows is then the same, bit by bit."""
        first, others = self.progress.first, self.progress.learned
        self.student = Student.begin([self._entry(k) for k in first], self.recipe.model, self.recipe.refresh)
        for key in others:
            yield self._state("learning")
            self.student = self.student.taught(self._entry(key))
        self._renew()

    def _entry(self, key: str) -> Entry:
        entry = self.tape.find(key)
        if entry is None:
            raise UserError(
                f"{self.tape.path}: the label {key} that the run learned from is gone; put the file back, or begin anew."
            )
        return entry

    def _round(self) -> Iterator[State]:
        """Let every walker that does not wait go on for a stride, then see to the labels that were asked for."""
        trigger, dynamics = self.recipe.trigger, self.recipe.dynamics
        self.progress = replace(self.progress, round=self.progress.round + 1)
        for i, mind in enumerate(self.progress.minds):
            if not self._is_active(mind):
                continue
            stride = min(trigger.every, dynamics.steps - mind.walker.step)
            judge = self._judge_of(i)
            with self.clock("dynamics"):
                now = walker.advance(
                    self.looks[i], self.potential, judge, dynamics, self.timestep_fs, stride, self.recipe.explore.bias
                )
            self._follow(i, now)
            yield self._state("dynamics")
        yield from self._serve()

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
                self.progress = self.progress.with_mind(i, replace(mind, asked=None, why="", trusted=mind.walker))
                self._renew([i])
                continue
            under_way = [m for m in self.progress.minds if m.sent]
            if len(under_way) >= self.recipe.oracle.workers or any(self._is_like(look, m) for m in under_way):
                continue
            self._ask(_structure(mind.asked))
            self.progress = self.progress.with_mind(i, replace(mind, sent=True))

    def _is_like(self, look: Look, other: Mind) -> bool:
        """Whether the atoms for whose sake a look asks are like atoms of a structure under way."""
        term, there = self.potential.terms[0], _structure(other.asked)
        mine = View.of(term.descriptor, look.structure).environments.features
        known = View.of(term.descriptor, there).environments.features
        atoms = list(look.decision.atoms[:3]) or list(range(len(mine)))
        same = look.structure.species[atoms][:, None] == there.species[None]
        return bool((same & (term.kernel.profile(mine[atoms] @ known.T)[0] > ALIKE)).any())

    def _judge_of(self, i: int) -> walker.Judge:
        """Criteria with the limits that hold for a walker: looser shortly after a label, none where labels came too often."""
        mind, trigger = self.progress.minds[i], self.recipe.trigger
        age = mind.walker.step - mind.labelled_at
        recent = sum(step > mind.walker.step - 1000 for step in mind.asked_at)
        factor = max(1.0, trigger.hysteresis * mind.left) if age < trigger.cooldown else 1.0
        if recent >= trigger.most_per_1000_steps:
            factor = 1e6
        limits = self.limits.times(factor) if factor > 1 else self.limits

        def judge(structure: Structures, prediction: Prediction, before: Before) -> Decision:
            return criteria(prediction, structure, limits, before)

        return judge

    def _follow(self, i: int, now: Look) -> None:
        """Move a walker to where the look tells it to."""
        mind, decision = self.progress.minds[i], now.decision
        self._record(now)
        if decision.action == "continue":
            setbacks = mind.setbacks if now.walker.step <= mind.farthest else 0
            farthest = max(mind.farthest, now.walker.step)
            mind = replace(mind, walker=now.walker, trusted=now.walker, setbacks=setbacks, farthest=farthest)
            self.looks[i] = now
        else:
            self.trail.log(
                "ask", walker=i, step=now.walker.step, action=decision.action, reason=decision.reason,
                severity=decision.severity, atoms=list(decision.atoms),
            )  # fmt: skip
            mind = self._set_back(mind, now) if decision.action == "halt" else replace(mind, walker=now.walker)
            asked = now.walker if decision.action == "label" or self._is_physical(now) else mind.trusted
            why = decision.reason if decision.action == "label" else f"{HALTED}: {decision.reason}"
            mind = replace(mind, asked=asked, why=why, since=self.progress.round, sent=False)
        self.progress = self.progress.with_mind(i, mind)

    def _is_physical(self, now: Look) -> bool:
        return guard(now.prediction, now.structure, self.recipe.trigger.guards) is None

    def _set_back(self, mind: Mind, now: Look) -> Mind:
        """A walker that halted returns to the last trusted place; from its start if that has led nowhere time and again."""
        setbacks, restarts, back = mind.setbacks + 1, mind.restarts, mind.trusted
        if not self._is_physical(now) or setbacks > 1:
            back = back.rested(self.recipe.dynamics, self.recipe.seed + 7919 * setbacks)
        if setbacks > MOST_SETBACKS:
            setbacks, restarts = 0, restarts + 1
            start = self.starts[mind.walker.number % len(self.starts)]
            fresh = Walker.begin(mind.walker.number, start, self.recipe.dynamics, self.recipe.seed + 104729 * restarts)
            back = replace(fresh, step=mind.trusted.step)
        return replace(mind, walker=back, trusted=back, setbacks=setbacks, restarts=restarts)

    def _settle(self, i: int) -> Iterator[State]:
        """Get the label that a walker waits for, learn it, and let the walker go on from where it is."""
        mind = self.progress.minds[i]
        structure, self.reason = _structure(mind.asked), mind.why
        key = key_of(structure, self.oracle_hash)
        yield self._state("labelling")
        step = mind.asked.step
        notes = {"walker": i, "step": step, "time_fs": step * self.timestep_fs}
        entry = None if key in self.progress.known else self._answer(structure, self.reason, notes)
        recent = (*(s for s in mind.asked_at if step - 1000 < s <= step), step)
        mind = replace(mind, asked=None, why="", sent=False, labelled_at=mind.walker.step, asked_at=recent)
        if entry is None:  # refused, or known already: the same place must not ask for the same thing again
            rested = mind.trusted.rested(self.recipe.dynamics, self.recipe.seed + 31 * (1 + self.progress.round))
            self.progress = self.progress.with_mind(i, replace(mind, walker=rested, trusted=rested))
            self._renew([i])
        else:
            self.progress = replace(self.progress.with_mind(i, mind), learned=(*self.progress.learned, key))
            yield self._state("learning")
            before = self.student.online.calibration
            with self.clock("learning"):
                self.student = self.student.taught(entry)
            told = prophecy.plain(self.student.online.foreseen[-1], before, self.recipe.trigger.probability)
            self._taught(self.reason, key=key, walker=i, step=step, foreseen=told)
        self.progress = self.progress.with_mind(
            i, replace(self.progress.minds[i], left=self.looks[i].decision.severity)
        )
        self.unsaved = True

    # ------------------------------------------------------------ labels

    def _ask(self, structure: Structures) -> None:
        """Set the oracle to work, unless the answer is known."""
        key = key_of(structure, self.oracle_hash)
        if key in self.tape or self.tape.refusal(key) is not None:
            return
        with self.clock("oracle"):
            self.labeller.submit(key, structure)

    def _answer(self, structure: Structures, reason: str, notes: dict) -> Entry | None:
        """The label of a structure that was asked for, once it is on the tape; None if there is none."""
        key = key_of(structure, self.oracle_hash)
        if key in self.tape:
            return self.tape.find(key)
        refusal = self.tape.refusal(key)
        if refusal is None:
            with self.clock("oracle"):
                found = self.labeller.result(key)
            self.calls += 1
            if isinstance(found, Refusal):
                self.tape.refuse(found)
                refusal = found
            else:
                entry = self.tape.append(Entry(structure, found.targets, key, reason, self.oracle_hash, notes))
                self.labeller.forget(key)
                self.trail.tell("labelled", key=key, seconds=found.seconds, attempts=found.attempts)
                return entry
            self.labeller.forget(key)
        stop_if_told(self.recipe.oracle, refusal, self.tape.refused_in_a_row)
        self.trail.log("refused", key=key, reason=refusal.reason)
        return None

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
        online = self.student.online
        forces = online.targets.forces
        rms = float(forces[forces.isfinite()].square().mean().sqrt())
        atoms = max(len(a) for a in self.starts)
        self.limits = limits_of(self.recipe.trigger, rms, atoms, online.constant, online.calibration)
        self.looks = self.looks or [None] * len(self.progress.minds)
        for i in range(len(self.looks)) if some is None else some:
            self.looks[i] = walker.look(
                self.progress.minds[i].walker, self.potential, self._judge_of(i), self.recipe.dynamics
            )

    # ------------------------------------------------------------ records

    def _record(self, now: Look) -> None:
        dynamics, w = self.recipe.dynamics, now.walker
        if now.full:
            sigma = now.prediction.forces_covariance.total.diagonal(dim1=1, dim2=2).sum(1).sqrt()
            thermostat = dynamics.ensemble != "nve"
            seen = self.observer(walker.frame(now), w.number, w.step * self.timestep_fs)
            record = Record.of(
                w.number, w.step, w.step * self.timestep_fs, now.structure.species.numpy(), sigma.numpy(),
                now.prediction.novelty.numpy(), temperature_K=now.temperature_K,
                target_temperature_K=dynamics.temperature(w.step) if thermostat else float("nan"),
                target_pressure_GPa=dynamics.pressure(w.step) if dynamics.ensemble == "npt" else float("nan"),
                ramp_finished=w.step >= dynamics.ramp, threshold=self.limits.force or float("nan"),
                labelled=now.decision.action != "continue", observables=seen,
            )  # fmt: skip
            self.progress = replace(self.progress, history=self.progress.history.append(record))
            self.trail.log("look", **record.plain())
        if now.decision.action == "continue":
            self.progress = self.trail.frame(self.progress, now, self.recipe.thin, self.timestep_fs)

    def _judge(self) -> None:
        """Whether the run has reason to stop."""
        dynamics, minds = self.recipe.dynamics, self.progress.minds
        looks = len(self.progress.history)
        made = all(m.walker.step >= dynamics.steps for m in minds)
        if not looks or (looks % self.recipe.stop.every_frames >= len(minds) and not made):
            return
        hours = self.progress.hours + (time.monotonic() - self.began) / 3600
        labels, quantile = len(self.tape), self.recipe.model.novelty.quantile
        self.verdict = stopping.judge(
            self.progress.history, self.recipe.stop, quantile=quantile, labels=labels, elapsed_h=hours
        )
        self.trail.log("judged", **self.verdict.plain())
        stopped = ""
        if self.verdict.stop:
            stopped = self.verdict.sentence
        elif any(m.restarts > MOST_RESTARTS for m in minds):
            stopped = "a walker could not be kept stable; see log.jsonl for the guards that fired"
        elif made:
            stopped = f"all {dynamics.steps} steps of {len(minds)} walker(s) are made; {self.verdict.sentence}"
        if stopped:
            self.progress = replace(self.progress, stopped=stopped)
            self.trail.log("stopped", reason=stopped)

    def _checkpoint(self) -> None:
        hours = self.progress.hours + (time.monotonic() - self.began) / 3600
        self.began = time.monotonic()
        spent = {"observer": self.observer.state(), "hours": hours, "seconds": dict(self.clock.seconds)}
        self.progress = self.trail.checkpoint(replace(self.progress, **spent))
        self.saved, self.unsaved = time.monotonic(), False


def _structure(w: Walker) -> Structures:
    """What the oracle is asked for at the place of a walker, as the tape will have it."""
    return canonical(structures_from_ase([w.atoms], [f"walker {w.number}, step {w.step}"]))


def _starts(path: Path) -> list[Atoms]:
    frames, _ = read_frames(path)
    for atoms in frames:
        walker.fixed_atoms(atoms)
        atoms.calc = None
    if not frames:
        raise UserError(f"{path}: holds no structure to start from.")
    return frames


def _given(path: Path) -> Iterator[Entry]:
    from gpmlp.io.atoms import read

    structures, targets = read(path)
    for i in range(len(structures)):
        one = canonical(structures.select([i]))
        yield Entry(one, targets.select(structures, [i]), key_of(one), "given", "", {"frame": i})
