"""A worker makes one attempt at one label, in this process or another, and answers for all that a calculator may do meanwhile; no torch."""

from __future__ import annotations

import errno
import faulthandler
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from gpmlp.core.calculators import CalculatorError, find_calculator
from gpmlp.core.single_point import LabelError
from gpmlp.learning.oracles import results
from gpmlp.learning.oracles.results import TICKS, LockWaiter, child_processes
from gpmlp.learning.oracles.single_point import ContradictionError, compute_label, failure_text

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
STOPPED = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, 128 + signal.SIGTERM, 128 + signal.SIGINT)
LONGEST_REASON = 600


class _TimedOut(BaseException):
    """Not an Exception, so that no calculator swallows it."""


# ------------------------------------------------------------ an attempt and its record


def grace_seconds(timeout: float) -> float:
    """How long to wait before the next, harder way to end what takes too long."""
    return min(max(1.0, 0.05 * timeout), 30.0)


def make_attempt(job: Mapping[str, Any], say: Callable[[Mapping[str, Any]], bool] | None = None) -> dict[str, Any]:
    """Make one attempt at a label, write its record, and return it.

    Nothing is computed if the record is there already, or appears while another process computes this key, which is waited for; of a
    label that is there but was not checked as the job wants it, only the check is. Nor is anything begun for a run that has ended.

    Args:
        job: what `gpmlp.learning.oracles.oracle.make_job` makes.
        say: takes {"waiting": why}, and {"computing": True} when the computation begins; returns whether anybody heard it; given in a
            process that is ours alone.
    """

    def wait(text: str) -> None:
        give_notice(text) if say is None else say({"waiting": text})

    try:
        with results.label_lock(job["spool"], job["key"], LockWaiter(job["key"], wait)) as forgotten:
            record = results.read_record(job["spool"], job["key"], job["attempt"])
            if record is not None and not lacks_check(record, job["check"]):
                return record
            if forgotten() or (say is not None and not say({"computing": True})):
                return attempt_record(job, results.INTERRUPTED, "the run that asked for it has ended")
            record = _attempt(job, record, ours=say is not None)
            if record["kind"] in (results.LABEL, results.FAILED):
                results.write_record(job["spool"], record)
            return record
    except OSError as error:
        return attempt_record(job, results.DISK, f"{job['spool']}: {error.strerror or error}")


def lacks_check(record: Mapping[str, Any], wanted: Iterable[str]) -> bool:
    """Whether a label was not compared with its energy as is wanted."""
    return record["kind"] == results.LABEL and not set(wanted) <= set(record.get("checked", ()))


def time_limit(job: Mapping[str, Any]) -> float | None:
    """Seconds that an attempt may take: timeout_s for each call of the calculator."""
    return None if job["timeout_s"] is None else job["timeout_s"] * (1 + len(job["check"]))


def give_notice(text: str) -> None:
    """Tell whoever watches this process."""
    from gpmlp.core.errors import ProgressNotice

    warnings.warn(text, ProgressNotice, stacklevel=2)


def attempt_record(job: Mapping[str, Any], kind: str, reason: str = "", **values: Any) -> dict[str, Any]:
    """The record of an attempt."""
    reason = " ".join(reason.split())
    if len(reason) > LONGEST_REASON:
        reason = f"{reason[: LONGEST_REASON // 2]} ... {reason[-LONGEST_REASON // 2 :]}"
    record = {"key": job["key"], "attempt": job["attempt"], "kind": kind, "reason": reason}
    return {**record, "folder": str(folder_of(job)), "host": socket.gethostname(), "pid": os.getpid(), **values}


def folder_of(job: Mapping[str, Any]) -> Path:
    """The scratch folder of an attempt."""
    return Path(job["scratch"]) / f"{job['key']}.{job['attempt']}"


def _attempt(job: Mapping[str, Any], earlier: Mapping[str, Any] | None, ours: bool) -> dict[str, Any]:
    folder = folder_of(job)
    if folder.exists():
        shutil.rmtree(folder)  # of the same attempt, cut off
    folder.mkdir(parents=True)
    booted = _uptime()
    try:
        find_calculator(job["calculator"])  # importing it takes no time of the label's
        start = time.monotonic()
        with _redirected(folder, ours), _limited(job, folder, ours), _same_process():
            answer = compute_label(job, folder, earlier)
    except CalculatorError as error:
        return attempt_record(job, results.UNUSABLE, str(error))
    except _TimedOut:
        kill_children(booted)
        return attempt_record(job, results.FAILED, f"no answer within timeout_s {job['timeout_s']:g}")
    except ContradictionError as error:
        return attempt_record(job, results.FAILED, str(error), contradiction=True, calls=error.calls)
    except BaseException as error:  # calculators raise what they like
        if isinstance(error, KeyboardInterrupt) and not ours:  # the user's
            raise
        return attempt_record(job, *_failure(error, folder))
    finally:
        if ours:
            kill_children(booted)  # servers and forks that nobody ended
    if not job["keep"]:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = time.monotonic() - start + (earlier or {}).get("seconds", 0.0)
    return attempt_record(job, results.LABEL, seconds=seconds, **answer)


@contextmanager
def _same_process() -> Iterator[None]:
    """What a calculator forks and lets return, or the folder it changes to, is no concern of the run."""
    process, folder = os.getpid(), os.open(".", os.O_RDONLY)
    try:
        yield
    finally:
        if os.getpid() != process:
            os._exit(0)
        os.fchdir(folder)
        os.close(folder)


def _failure(error: BaseException, folder: Path) -> tuple[str, str]:
    """Kind and reason of an attempt that an exception ended."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
            return results.DISK, f"{folder}: {cause.strerror}"
        if isinstance(cause, subprocess.CalledProcessError) and cause.returncode in STOPPED:
            return results.INTERRUPTED, f"{cause.cmd} was ended by a signal"
        cause = cause.__cause__ or cause.__context__
    text = str(error) if isinstance(error, LabelError) else f"{type(error).__name__}: {error}"
    return results.FAILED, f"{text} {failure_text(folder)}"


@contextmanager
def _redirected(folder: Path, ours: bool) -> Iterator[None]:
    """What calculators print goes into the scratch folder; what their programs print, too, where the process is ours."""
    if not ours:
        with open(folder / "output.txt", "a") as text, redirect_stdout(text):
            yield
        return
    with open(folder / "output.txt", "ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        with suppress(ValueError):  # it was closed
            sys.stdout.flush()
        nothing = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nothing, descriptor)
        os.close(nothing)


@contextmanager
def _limited(job: Mapping[str, Any], folder: Path, ours: bool) -> Iterator[None]:
    """Raise _TimedOut after the time limit; where compiled code never lets Python do so, end the process (only if it is ours)."""
    timeout = time_limit(job)
    if timeout is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise _TimedOut

    before = signal.signal(signal.SIGALRM, ring)
    file = open(folder / "hung.txt", "w") if ours else None
    if file is not None:
        faulthandler.dump_traceback_later(timeout + grace_seconds(timeout), exit=True, file=file)
    signal.setitimer(signal.ITIMER_REAL, timeout, grace_seconds(timeout))  # again, where a bare `except` swallows it
    try:
        yield
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)  # it may still ring just before
        finally:
            signal.signal(signal.SIGALRM, before)
            if file is not None:
                faulthandler.cancel_dump_traceback_later()
                file.close()
                (folder / "hung.txt").unlink(missing_ok=True)


def _uptime() -> float:
    """Seconds since boot, in whole ticks of the clock that processes are begun by."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS) / TICKS


def kill_children(since: float) -> None:
    """End what a calculator started and did not wait for."""
    for pid in child_processes(os.getpid(), since):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):  # a grandchild, or one that somebody waited for
            os.waitpid(pid, 0)


# ------------------------------------------------------------ a process that makes attempts


def main() -> None:
    """Read jobs, one JSON line each, and answer with lines: "waiting" if it has to, "computing" when it begins, then the record."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    jobs, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):  # mpirun would read our jobs, and compiled code print among our answers
        os.dup2(nothing, descriptor)

    def say(message: Mapping[str, Any]) -> bool:
        try:
            answers.write(json.dumps(message) + "\n")
            answers.flush()
        except BrokenPipeError:  # the run that asked is gone; what is computed is on disk
            return False
        return True

    for line in jobs:
        job = json.loads(line)
        sys.path += [entry for entry in job["path"] if entry not in sys.path]
        say(make_attempt(job, say))


if __name__ == "__main__":
    main()
