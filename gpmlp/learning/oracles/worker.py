"""A worker is what makes one attempt at one label, as a function or as a process that reads jobs from its input; no torch."""

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gpmlp.learning.oracles import results, single_point
from gpmlp.learning.oracles.codes import OracleError, find_calculator
from gpmlp.learning.oracles.results import TICKS, LockWaiter, child_processes
from gpmlp.learning.oracles.single_point import LabelError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
STOPPED = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, 128 + signal.SIGTERM, 128 + signal.SIGINT)
LONGEST_REASON = 600


class _TimedOut(BaseException):
    """Not an Exception, so that no calculator swallows it."""


def grace_seconds(timeout: float) -> float:
    """How long to wait before the next, harder way to end what takes too long."""
    return min(max(1.0, 0.05 * timeout), 30.0)


def make_attempt(job: Mapping[str, Any], say: Callable[[Mapping[str, Any]], None] | None = None) -> dict[str, Any]:
    """Make one attempt at a label, put its record into the spool, and return it.

    Nothing is computed if the record is there already, or appears while somebody else computes this key, which is waited for.

    Args:
        job: what `gpmlp.learning.oracles.oracle.make_job` makes.
        say: takes {"waiting": why}, and {"computing": True} when the computation begins; given in a process that is ours alone.
    """
    waiting = LockWaiter(job["key"], give_notice if say is None else lambda text: say({"waiting": text}))
    try:
        with results.label_lock(job["spool"], job["key"], waiting):
            known = results.read_record(job["spool"], job["key"], job["attempt"])
            if known is not None:
                return known
            if say is not None:
                say({"computing": True})
            record = _made(job, own=say is not None)
            if record["kind"] in (results.LABEL, results.FAILED):
                results.write_record(job["spool"], record)
            return record
    except OSError as error:
        return attempt_record(job, results.DISK, f"{job['spool']}: {error.strerror or error}")


def give_notice(text: str) -> None:
    """Tell whoever looks at this process."""
    from gpmlp.core.errors import ProgressNotice

    warnings.warn(text, ProgressNotice, stacklevel=2)


def attempt_record(job: Mapping[str, Any], kind: str, reason: str = "", **values: Any) -> dict[str, Any]:
    """The record of an attempt."""
    reason = " ".join(reason.split())
    if len(reason) > LONGEST_REASON:
        reason = f"{reason[: LONGEST_REASON // 2]} ... {reason[-LONGEST_REASON // 2 :]}"
    return {
        "key": job["key"],
        "attempt": job["attempt"],
        "kind": kind,
        "reason": reason,
        "folder": str(folder_of(job)),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        **values,
    }


def folder_of(job: Mapping[str, Any]) -> Path:
    """The scratch folder of an attempt."""
    return Path(job["scratch"]) / f"{job['key']}.{job['attempt']}"


def _made(job: Mapping[str, Any], own: bool) -> dict[str, Any]:
    folder = folder_of(job)
    if folder.exists():
        shutil.rmtree(folder)  # of the same attempt, cut off
    folder.mkdir(parents=True)
    try:
        find_calculator(job["calculator"])  # importing it takes no time of the label's
        began, started = time.monotonic(), _uptime()
        with _output(folder, own), _limited(job["timeout_s"], folder, own):
            answer = single_point.compute_label(job, folder)
    except OracleError as error:
        return attempt_record(job, results.UNUSABLE, str(error))
    except _TimedOut:
        kill_children(started)
        return attempt_record(job, results.FAILED, f"no answer within timeout_s {job['timeout_s']:g}")
    except (Exception, SystemExit) as error:
        return attempt_record(job, *_told(error, folder))
    if not job["keep"]:
        shutil.rmtree(folder, ignore_errors=True)
    return attempt_record(job, results.LABEL, seconds=time.monotonic() - began, **answer)


def _told(error: BaseException, folder: Path) -> tuple[str, str]:
    """Kind and reason of an attempt that an exception ended."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
            return results.DISK, f"{folder}: {cause.strerror}"
        if isinstance(cause, subprocess.CalledProcessError) and cause.returncode in STOPPED:
            return results.INTERRUPTED, f"{cause.cmd} was ended by a signal"
        cause = cause.__cause__ or cause.__context__
    text = str(error) if isinstance(error, LabelError) else f"{type(error).__name__}: {error}"
    return results.FAILED, f"{text} {single_point.failure_text(folder)}"


@contextmanager
def _output(folder: Path, own: bool) -> Iterator[None]:
    """What calculators print goes into the scratch folder, where the process is ours."""
    if not own:
        yield
        return
    with open(folder / "output.txt", "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        os.close(nothing)


@contextmanager
def _limited(timeout: float | None, folder: Path, own: bool) -> Iterator[None]:
    """Raise _TimedOut after the timeout; where compiled code never lets Python do so, end the process (only if it is ours)."""
    if timeout is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise _TimedOut

    before = signal.signal(signal.SIGALRM, ring)
    file = open(folder / "hung.txt", "w") if own else None
    if file is not None:
        faulthandler.dump_traceback_later(timeout + grace_seconds(timeout), exit=True, file=file)
    signal.setitimer(signal.ITIMER_REAL, timeout)
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


def main() -> None:
    """Read jobs, one JSON line each, and answer with lines: "waiting" if it has to, "computing" when it begins, then the record."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    jobs, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):  # mpirun would read our jobs, and compiled code print among our answers
        os.dup2(nothing, descriptor)

    def say(message: Mapping[str, Any]) -> None:
        with suppress(BrokenPipeError):  # the run that asked is gone; the spool has the record
            answers.write(json.dumps(message) + "\n")
            answers.flush()

    for line in jobs:
        job = json.loads(line)
        sys.path += [entry for entry in job["path"] if entry not in sys.path]
        say(make_attempt(job, say))


if __name__ == "__main__":
    main()
