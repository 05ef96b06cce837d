"""A Labeller has structures labelled elsewhere: ask now, fetch later; what was computed outlives the run that asked for it."""

from __future__ import annotations

import concurrent.futures
import os
import secrets
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpmlp.core.errors import UserError
from gpmlp.core.structures import Structures
from gpmlp.io.files import check_folder
from gpmlp.learning.labels import LabelRefusal, LabelResult, targets_of
from gpmlp.learning.oracles import executors, results, worker
from gpmlp.learning.oracles.oracle import OracleRecipe, make_job

INTERRUPTIONS = 3  # of one attempt, before it counts as failed
FAREWELL = 20.0  # s for attempts elsewhere to notice that nobody waits for them
CLOSED = "it was not labelled, because the labeller was closed"


@dataclass(eq=False)
class _Asked:
    """What is known of one key."""

    key: str
    structure: Structures
    records: list[dict[str, Any]]
    outcome: Future = field(default_factory=Future)
    running: Future | None = None
    interruptions: int = 0


class Labeller:
    """Asks the oracle of a recipe, any number of structures at a time.

    Attempts leave their records in FOLDER/spool before anyone is told, and their files in FOLDER/scratch. A key that was asked for
    in an earlier run is answered from there, or waited for where a worker of that run still computes it.
    """

    def __init__(self, recipe: OracleRecipe, folder: str | os.PathLike[str]) -> None:
        """Raises UserError if the calculator cannot be made, the executor is not there, or the folder cannot be written to."""
        recipe.check()
        check_folder(folder)
        self.recipe = recipe
        self.spool = Path(folder).absolute() / "spool"
        self.scratch = Path(recipe.directory or Path(folder) / "scratch").absolute()
        self._asked: dict[str, _Asked] = {}
        self._lock = threading.RLock()
        self._closing = False
        self._stop = self.spool / f".stop.{os.getpid()}.{secrets.token_hex(4)}"
        self._runner = executors.make_runner(recipe)

    def __enter__(self) -> Labeller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, key: str, structure: Structures) -> None:
        """Ask for the label of one structure and return (with executor: inline, when it is there); asking again does nothing."""
        if len(structure) != 1:
            raise UserError(f"One structure is labelled at a time; got {len(structure)}: take structures.select([i]).")
        with self._lock:
            if self._closing:
                raise UserError("The labeller was closed; nothing more can be asked.")
            if key in self._asked:
                return
            try:
                records = results.read_attempts(self.spool, key)
            except OSError as error:
                raise UserError(f"{self.spool}: cannot be read: {error.strerror or error}.") from error
            asked = self._asked[key] = _Asked(key, structure, records)
        self._go_on(asked)

    def done(self, key: str) -> bool:
        """Whether `result` would return at once."""
        return self._of(key).outcome.done()

    def result(self, key: str, timeout_s: float | None = None) -> LabelResult | LabelRefusal:
        """Wait for the answer.

        Raises:
            UserError: the oracle cannot be used as it is set up, the disk is full, or the labeller was closed.
            TimeoutError: there was no answer within timeout_s; it may still come.
        """
        return self._of(key).outcome.result(timeout_s)

    def wait(self, keys: Sequence[str] | None = None, timeout_s: float | None = None) -> tuple[str, ...]:
        """Wait until one of the keys (of all not forgotten) has its answer; return those that have, in the order they were asked."""
        with self._lock:
            asked = [self._of(key) for key in keys] if keys is not None else list(self._asked.values())
        concurrent.futures.wait([a.outcome for a in asked], timeout_s, concurrent.futures.FIRST_COMPLETED)
        return tuple(a.key for a in asked if a.outcome.done())

    def forget(self, key: str) -> None:
        """Remove an answer from the spool, once it is safe on the tape."""
        with self._lock:
            if self._of(key).outcome.done():
                del self._asked[key]
                results.remove_records(self.spool, key)

    def close(self) -> None:
        """End all that is under way; attempts that had not ended are as if never made, those that had stay in the spool."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        running = [asked.running for asked in self._asked.values() if asked.running and not asked.running.done()]
        if self._runner.far and running:
            with suppress(OSError):
                self._stop.touch()
            concurrent.futures.wait(running, FAREWELL)
        self._runner.close()
        with suppress(OSError):
            self._stop.unlink()
        for asked in list(self._asked.values()):
            self._fail(asked, CLOSED)

    def _of(self, key: str) -> _Asked:
        if key not in self._asked:
            raise UserError(f"The label {key} was not asked for; submit it first.")
        return self._asked[key]

    def _go_on(self, asked: _Asked) -> None:
        """Give the answer, or make the next attempt."""
        records = asked.records
        if records and records[-1]["kind"] == results.LABEL:
            record = records[-1]
            targets = targets_of(record, asked.structure)
            label = LabelResult(
                asked.key, asked.structure, targets, len(records), record["seconds"], record["extrapolated"]
            )
            self._answer(asked, label)
        elif len(records) >= self.recipe.attempts:
            self._answer(
                asked, LabelRefusal(asked.key, results.failure_reasons(records), len(records), records[-1]["folder"])
            )
        else:
            attempt = len(records) + 1
            # by the key alone, so that a resumed run checks the same labels
            check = self.recipe.check_every > 0 and zlib.crc32(asked.key.encode()) % self.recipe.check_every == 0
            wanted = make_job(self.recipe, asked.key, attempt, asked.structure, self.spool, self.scratch, check)
            wanted["stop"] = str(self._stop) if self._runner.far else ""
            try:
                future = asked.running = self._runner.executor.submit(self._runner.function, wanted)
            except RuntimeError as error:  # it was shut down meanwhile
                self._fail(asked, str(error))
                return
            future.add_done_callback(lambda future: self._ended(asked, wanted, future))

    def _ended(self, asked: _Asked, wanted: dict[str, Any], future: Future) -> None:
        """An attempt ended; called in a thread of the executor."""
        try:
            self._take(asked, wanted, self._record(wanted, future))
        except OSError as error:
            self._fail(asked, _disk(f"{self.spool}: {error.strerror or error}"))
        except BaseException as error:
            if not asked.outcome.done():
                asked.outcome.set_exception(error)

    def _record(self, wanted: dict[str, Any], future: Future) -> dict[str, Any]:
        if future.cancelled():
            return worker.attempt_record(wanted, results.INTERRUPTED, "it was cancelled")
        error = future.exception()
        if error is None:
            return future.result()
        kind = results.INTERRUPTED if self._closing else results.FAILED
        return worker.attempt_record(wanted, kind, f"{self.recipe.executor}: {type(error).__name__}: {error}")

    def _take(self, asked: _Asked, wanted: dict[str, Any], record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == results.INTERRUPTED and not self._closing:
            asked.interruptions += 1
            if asked.interruptions >= INTERRUPTIONS:
                record = {**record, "kind": (kind := results.FAILED)}
        if kind in (results.LABEL, results.FAILED):
            if results.read_record(self.spool, asked.key, record["attempt"]) is None:
                results.write_record(self.spool, record)  # of a crash, or of a machine that does not see our spool
            asked.records.append(record)
            self._go_on(asked)
        elif kind == results.INTERRUPTED and not self._closing:
            self._go_on(asked)
        elif kind == results.INTERRUPTED:
            self._fail(asked, CLOSED)
        elif kind == results.DISK:
            self._fail(asked, _disk(record["reason"]))
        else:
            self._fail(asked, f"the oracle cannot be used: {record['reason']}")

    def _answer(self, asked: _Asked, answer: LabelResult | LabelRefusal) -> None:
        if not asked.outcome.done():
            asked.outcome.set_result(answer)

    def _fail(self, asked: _Asked, reason: str) -> None:
        if not asked.outcome.done():
            asked.outcome.set_exception(UserError(f"{asked.structure.names[0]}: {reason.removesuffix('.')}."))


def _disk(text: str) -> str:
    return f"the label could not be kept: {text}; nothing before it is lost: make room and go on (--resume)"


def check_refusal(recipe: OracleRecipe, refusal: LabelRefusal, in_a_row: int) -> None:
    """Raise UserError if the run has to end with this refusal.

    Args:
        in_a_row: how many structures were set aside since the last label, this one included.
    """
    where = (
        f"{refusal.reason} (label {refusal.key}, after {refusal.attempts} attempts; its files are in {refusal.folder})"
    )
    if recipe.on_failure == "stop":
        raise UserError(f"The oracle failed, and on_failure is 'stop': {where}.")
    if in_a_row > recipe.at_most_failures:
        raise UserError(
            f"The oracle failed for {in_a_row} structures in a row, more than at_most_failures {recipe.at_most_failures}; the last: "
            f"{where}. Correct the oracle, remove refused.jsonl to have them asked again, and go on (--resume)."
        )
