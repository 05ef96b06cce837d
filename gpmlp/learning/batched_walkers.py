"""Together advances several walkers step by step side by side: each asks for its forces as if alone, and one prediction answers all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from gpmlp.core.errors import UserError
from gpmlp.core.neighbors import Neighbors
from gpmlp.core.quantities import Prediction
from gpmlp.core.structures import Structures
from gpmlp.learning.walker import Ask, Look
from gpmlp.potential.potential import Potential


def advance(potential: Potential, tasks: Sequence[Callable[[Ask], Look]]) -> list[Look]:
    """What the tasks return, each of which asks for as many predictions as it likes.

    Tasks take turns: all of them go on, one after another, until each has asked or ended; then all that was asked is predicted
    at once. What is in one batch, and so the last digits of predictions, follows from the tasks alone.

    Raises:
        Exception: that of the first task that raised one.
    """
    voices = [_Voice(task) for task in tasks]
    try:
        asking = voices
        while asking:
            for voice in asking:
                voice.go_on()
            asking = [voice for voice in asking if not voice.ended]
            _answer(potential, asking)
        return [voice.result() for voice in voices]
    finally:
        for voice in voices:
            voice.close()


class _ClosedError(BaseException):
    """Nobody waits for a task any more."""


class _Voice:
    """A task that is stopped wherever it asks, by a thread of its own of which never more than one runs."""

    def __init__(self, task: Callable[[Ask], Look]) -> None:
        self.task, self.ended, self.asked = task, False, None
        self.reply: Prediction | BaseException | None = None
        self._outcome: Any = None
        self._error: BaseException | None = None
        self._mine, self._yours = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Let it run until it asks or ends."""
        self._mine.release()
        self._yours.acquire()

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._outcome

    def close(self) -> None:
        """End it where it is."""
        while not self.ended:
            self.reply = _ClosedError()
            self.go_on()
        self._thread.join()

    def _run(self) -> None:
        self._mine.acquire()
        try:
            if not isinstance(self.reply, _ClosedError):
                self._outcome = self.task(self._ask)
        except BaseException as error:
            self._error = error
        self.ended = True
        self._yours.release()

    def _ask(self, structure: Structures, variance: str | tuple[str, ...] | None, pairs: Neighbors) -> Prediction:
        self.asked = structure, variance, pairs
        self._yours.release()
        self._mine.acquire()
        if isinstance(self.reply, BaseException):
            raise self.reply
        return self.reply


def _answer(potential: Potential, asking: Sequence[_Voice]) -> None:
    """One prediction for all that want the same variances."""
    for wanted in dict.fromkeys(voice.asked[1] for voice in asking):
        some = [voice for voice in asking if voice.asked[1] == wanted]
        try:
            replies = _predicted(potential, some, wanted)
        except UserError:  # of one of them: which one it is shows when they are alone
            replies = [_or_error(potential, voice, wanted) for voice in some]
        for voice, reply in zip(some, replies, strict=True):
            voice.reply = reply


def _predicted(
    potential: Potential, some: Sequence[_Voice], wanted: str | tuple[str, ...] | None
) -> list[Prediction | UserError]:
    structures = Structures.concatenate([voice.asked[0] for voice in some])
    pairs = Neighbors.batch([voice.asked[2] for voice in some], structures.counts.tolist())
    found = potential(structures, wanted, novelty=True, pairs=pairs)
    return [found.select(structures, [k]) for k in range(len(some))]


def _or_error(potential: Potential, voice: _Voice, wanted: str | tuple[str, ...] | None) -> Prediction | UserError:
    try:
        return _predicted(potential, [voice], wanted)[0]
    except UserError as error:
        return error
