"""A Labeller has structures labelled by an executor: submit now, fetch later; results outlive the run that asked for them."""

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
from gpmlp.learning.oracles.single_point import FORCES

INTERRUPTIONS = 3  # of one attempt, before it counts as failed
STOP_S = 20.0  # for attempts elsewhere to notice that nobody waits for them
CLOSED = "it was not labelled, because the labeller was closed"


@dataclass(eq=False)
class _Request:
    """A structure that was submitted, and its attempts so far."""

    key: str
    structure: Structures
    records: list[dict[str, Any]]
    check: tuple[str, ...]
    outcome: Future = field(default_factory=Future)
    running: Future | None = None
    interruptions: int = 0

    def lacks(self, check: Sequence[str]) -> bool:
        """Whether the last attempt gave a label that was not checked as wanted."""
        return bool(self.records) and worker.lacks_check(self.records[-1], check)

    def answer(self, answer: LabelResult | LabelRefusal) -> None:
        if not self.outcome.done():
            self.outcome.set_result(answer)

    def fail(self, reason: str) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(UserError(f"{self.structure.names[0]}: {reason.removesuffix('.')}."))


class Labeller:
    """Asks the oracle of a recipe, any number of structures at a time.

    Attempts leave their records in FOLDER/spool before the run gets them, and their files in FOLDER/scratch. A key that was asked for
    in an earlier run is answered from there, or waited for where a worker of that run still computes it.
    """

    def __init__(self, recipe: OracleRecipe, folder: str | os.PathLike[str]) -> None:
        """Raises UserError if the calculator cannot be made, the executor is not there, or the folder cannot be written to."""
        recipe.check()
        check_folder(folder)
        self.recipe = recipe
        self.spool = Path(folder).absolute() / "spool"
        self.scratch = Path(recipe.directory or Path(folder) / "scratch").absolute()
        self._requests: dict[str, _Request] = {}
        self._lock = threading.RLock()
        self._closing = False
        self._stop = self.spool / f".stop.{os.getpid()}.{secrets.token_hex(4)}"
        self._runner = executors.make_runner(recipe)

    def __enter__(self) -> Labeller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, key: str, structure: Structures, check: Sequence[str] = ()) -> None:
        """Ask for the label of one structure and return (with executor: inline, when it is there); asking again does nothing.

        Args:
            check: what to compare with the energy, by further calls ('forces', 'stress'), besides the forces of about one label in
                `check_every`; a label that came unchecked is checked when it is asked for again.
        """
        if len(structure) != 1:
            raise UserError(f"One structure is labelled at a time; got {len(structure)}: take structures.select([i]).")
        with self._lock:
            if self._closing:
                raise UserError("The labeller was closed; nothing more can be asked.")
            before = self._requests.get(key)
            if before is not None and not (before.outcome.done() and before.lacks(check)):
                return
            try:
                records = results.read_attempts(self.spool, key)
            except OSError as error:
                raise UserError(f"{self.spool}: cannot be read: {error.strerror or error}.") from error
            request = self._requests[key] = _Request(key, structure, records, (*check, *self._by_chance(key)))
        self._go_on(request)

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
        """Wait until one of the keys (of all not forgotten) has its answer; return those that have, in the order of submission."""
        with self._lock:
            waiting = [self._of(key) for key in keys] if keys is not None else list(self._requests.values())
        concurrent.futures.wait([r.outcome for r in waiting], timeout_s, concurrent.futures.FIRST_COMPLETED)
        return tuple(r.key for r in waiting if r.outcome.done())

    def forget(self, key: str) -> None:
        """Remove the records of a key, once its answer is on disk elsewhere."""
        with self._lock:
            if self._of(key).outcome.done():
                del self._requests[key]
                results.remove_records(self.spool, key)

    def discard(self, labels: bool) -> None:
        """Remove failures that are not on disk elsewhere, so that they are asked for again, and labels, too; after `close`."""
        for file in self.spool.glob("k*.json"):
            key, attempt, _ = file.name.split(".")
            record = results.read_record(self.spool, key, int(attempt))
            if labels or record is None or record["kind"] != results.LABEL:
                file.unlink(missing_ok=True)

    def close(self) -> None:
        """End all that is under way; attempts that had not ended are as if never made, the records of those that had stay."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        running = [r.running for r in self._requests.values() if r.running and not r.running.done()]
        if self._runner.remote and running:
            with suppress(OSError):
                self._stop.touch()
            concurrent.futures.wait(running, STOP_S)
        self._runner.close()
        with suppress(OSError):
            self._stop.unlink()
        for request in list(self._requests.values()):
            request.fail(CLOSED)

    def _by_chance(self, key: str) -> tuple[str, ...]:
        """What is checked of a label unasked: by the key alone, so that a resumed run checks the same labels."""
        every = self.recipe.check_every
        return (FORCES,) if every and zlib.crc32(key.encode()) % every == 0 else ()

    def _of(self, key: str) -> _Request:
        if key not in self._requests:
            raise UserError(f"The label {key} was not asked for; submit it first.")
        return self._requests[key]

    def _go_on(self, request: _Request) -> None:
        """Give the answer, or make the next attempt."""
        key, structure, records, recipe = request.key, request.structure, request.records, self.recipe
        if request.lacks(request.check):
            records.pop()  # the same attempt again, of which only the check is missing
        calls = sum(record.get("calls", 1) for record in records)
        if records and records[-1]["kind"] == results.LABEL:
            last, targets = records[-1], targets_of(records[-1], structure)
            checked = tuple(last.get("checked", ()))
            seconds, extrapolated = last["seconds"], last["extrapolated"]
            answer = LabelResult(key, structure, targets, len(records), seconds, extrapolated, calls, checked)
            request.answer(answer)
        elif len(records) >= recipe.attempts:
            reasons, last = results.failure_reasons(records), records[-1]
            contradiction = last.get("contradiction", False)
            request.answer(LabelRefusal(key, reasons, len(records), last["folder"], contradiction=contradiction))
        else:
            job = make_job(recipe, key, len(records) + 1, structure, self.spool, self.scratch, request.check)
            job["stop"] = str(self._stop) if self._runner.remote else ""
            try:
                future = request.running = self._runner.executor.submit(self._runner.function, job)
            except RuntimeError as error:  # it was shut down meanwhile
                request.fail(str(error))
                return
            future.add_done_callback(lambda future: self._ended(request, job, future))

    def _ended(self, request: _Request, job: dict[str, Any], future: Future) -> None:
        """An attempt ended; called in a thread of the executor."""
        try:
            self._take(request, self._record(job, future))
        except OSError as error:
            request.fail(_on_disk(f"{self.spool}: {error.strerror or error}"))
        except BaseException as error:
            if not request.outcome.done():
                request.outcome.set_exception(error)

    def _record(self, job: dict[str, Any], future: Future) -> dict[str, Any]:
        if future.cancelled():
            return worker.attempt_record(job, results.INTERRUPTED, "it was cancelled")
        error = future.exception()
        if error is None:
            return future.result()
        kind = results.INTERRUPTED if self._closing else results.FAILED
        return worker.attempt_record(job, kind, f"{self.recipe.executor}: {type(error).__name__}: {error}")

    def _take(self, request: _Request, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == results.INTERRUPTED and not self._closing:
            request.interruptions += 1
            if request.interruptions >= INTERRUPTIONS:
                record = {**record, "kind": (kind := results.FAILED)}
        if kind in (results.LABEL, results.FAILED):
            if results.read_record(self.spool, request.key, record["attempt"]) is None:
                results.write_record(self.spool, record)  # of a crash, or of a machine that does not see our folder
            request.records.append(record)
            self._go_on(request)
        elif kind == results.INTERRUPTED and not self._closing:
            self._go_on(request)
        elif kind == results.INTERRUPTED:
            request.fail(CLOSED)
        elif kind == results.DISK:
            request.fail(_on_disk(record["reason"]))
        else:
            request.fail(f"the oracle cannot be used: {record['reason']}")


def _on_disk(text: str) -> str:
    return f"the label could not be kept: {text}; nothing before it is lost: make room and go on (--resume)"


def check_refusal(recipe: OracleRecipe, refusal: LabelRefusal, in_a_row: int, begun: bool = True) -> None:
    """Raise UserError if the run has to end with this refusal.

    Args:
        in_a_row: how many structures were refused since the last label, this one included.
        begun: whether there is any label yet.
    """
    where = (
        f"{refusal.reason} (label {refusal.key}, after {refusal.attempts} attempts; its files are in {refusal.folder})"
    )
    if recipe.on_failure == "stop":
        raise UserError(f"The oracle failed, and on_failure is 'stop': {where}.")
    if in_a_row > recipe.at_most_failures:
        raise UserError(
            f"The oracle failed for {in_a_row} structures in a row, more than at_most_failures {recipe.at_most_failures}; the last: "
            f"{where}. "
            + (
                "Correct the oracle, remove refused.jsonl to have them asked again, and go on (--resume)."
                if begun
                else "There is no label yet: correct the oracle and begin again."
            )
        )
