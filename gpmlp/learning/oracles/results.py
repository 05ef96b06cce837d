"""Results of oracles on disk: a record for each attempt at a label, written before the run gets it, and a lock for each label; no torch."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpmlp.io.files import NO_LOCKS

LABEL, FAILED = "label", "failed"  # these end an attempt and are written
UNUSABLE, INTERRUPTED, DISK = "unusable", "interrupted", "disk"  # these say nothing of the structure and are not
POLL_S = 0.05
GRACE = 5.0  # s in which an orphan must have computed something, it or a process that it started
CHECK_S = 1.0  # between two checks of that
TICKS = os.sysconf("SC_CLK_TCK")
WORKER = b"gpmlp.learning.oracles.worker"


def record_path(folder: str | os.PathLike[str], key: str, attempt: int) -> Path:
    return Path(folder) / f"{key}.{attempt}.json"


def write_record(folder: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Write the record of an attempt: complete and on the disk, or not at all (OSError)."""
    target = record_path(folder, record["key"], record["attempt"])
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    finally:
        temporary.unlink(missing_ok=True)


def read_record(folder: str | os.PathLike[str], key: str, attempt: int) -> dict[str, Any] | None:
    """The record of an attempt; None if it has not ended."""
    try:
        record = json.loads(record_path(folder, key, attempt).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return record if isinstance(record, dict) and record.get("kind") in (LABEL, FAILED) else None


def read_attempts(folder: str | os.PathLike[str], key: str) -> list[dict[str, Any]]:
    """The records of all attempts from the first on that have ended."""
    records: list[dict[str, Any]] = []
    while (record := read_record(folder, key, len(records) + 1)) is not None:
        records.append(record)
    return records


def remove_records(folder: str | os.PathLike[str], key: str) -> None:
    """Remove all files of a key; the lock first, by the absence of which those who wait for it know that nobody needs the key any more."""
    _lock_path(folder, key).unlink(missing_ok=True)
    for file in Path(folder).glob(f"{key}.*"):
        file.unlink(missing_ok=True)


def _lock_path(folder: str | os.PathLike[str], key: str) -> Path:
    return Path(folder) / f"{key}.lock"


def failure_reasons(records: list[dict[str, Any]]) -> str:
    """Why attempts failed: each reason once, with the attempts it stands for."""
    attempts: dict[str, list[int]] = {}
    for record in records:
        attempts.setdefault(record["reason"], []).append(record["attempt"])
    if len(attempts) == 1:
        reason, which = next(iter(attempts.items()))
        return reason if len(which) == 1 else f"{reason} ({len(which)} times)"
    return "; ".join(f"attempt {', '.join(map(str, which))}: {reason}" for reason, which in attempts.items())


@contextmanager
def label_lock(
    folder: str | os.PathLike[str], key: str, waiting: Callable[[str], None] = lambda text: None
) -> Iterator[Callable[[], bool]]:
    """Wait until nobody else computes this key: whoever does may have outlived the run that asked for it.

    The system lets go of the lock when the process that holds it ends, in whatever way.

    Args:
        waiting: called time and again with what the file of the lock says of its holder.

    Yields:
        Whether the key was forgotten while we waited: a later run has its answer.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = _lock_path(folder, key)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)

    def forgotten() -> bool:
        try:
            return not os.path.samestat(os.stat(path), os.fstat(descriptor))
        except FileNotFoundError:
            return True

    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting(os.pread(descriptor, 4096, 0).decode(errors="replace"))
                time.sleep(POLL_S)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                break  # a file system without locks: asked twice at worst
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, LockHolder.this_process().to_text().encode(), 0)
        yield forgotten
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class LockHolder:
    """The process that holds the lock of a label, or makes an attempt of another kind.

    Attributes:
        began: ticks after boot at which it began, which tell it from a later process of the same number.
        parent: process number of the run it works for.
        machine: boot and namespace in which the numbers hold.
    """

    pid: int
    began: int
    parent: int
    host: str
    machine: str

    @staticmethod
    def this_process() -> LockHolder:
        return LockHolder.of_process(os.getpid())

    @staticmethod
    def of_process(pid: int) -> LockHolder:
        """Of a process of this machine."""
        values = _stat(pid)
        parent, began = (int(values[1]), int(values[19])) if values else (os.getppid(), -1)
        return LockHolder(pid, began, parent, socket.gethostname(), _machine())

    @staticmethod
    def from_text(text: str) -> LockHolder | None:
        """From a lock file; None if it says nothing, as of a holder that has just begun."""
        with suppress(ValueError, TypeError):
            return LockHolder(**json.loads(text))
        return None

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @property
    def here(self) -> bool:
        """Whether it is a process of this machine."""
        return self.machine != "" and self.machine == _machine()

    @property
    def alive(self) -> bool:
        """Whether it is, without doubt, at work on this machine."""
        values = _stat(self.pid) if self.here else []
        return bool(values) and int(values[19]) == self.began

    @property
    def orphaned(self) -> bool:
        """Whether it is, without doubt, a worker of this machine the run of which has ended."""
        if not self.alive or _stat(self.pid)[1:2] in ([], [str(self.parent)]):
            return False
        with suppress(OSError):
            return WORKER in (Path("/proc") / str(self.pid) / "cmdline").read_bytes().split(b"\0")
        return False

    def work(self) -> int:
        """Processor time (ticks) that it, all that it started and those of them that have ended have used."""
        stats = (_stat(pid) for pid in (self.pid, *child_processes(self.pid)))
        return sum(sum(map(int, values[11:15])) for values in stats if values)

    def end(self) -> None:
        """End it and all that it started."""
        for pid in (self.pid, *child_processes(self.pid)):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


class LockWaiter:
    """What is done while another process holds a lock: say so, once for each holder, and end an orphan that does nothing."""

    def __init__(self, key: str, tell: Callable[[str], None]) -> None:
        self.key, self.tell = key, tell
        self.holder: LockHolder | None = None
        self.worked, self.since, self.checked = -1, 0.0, 0.0

    def __call__(self, text: str) -> None:
        """Check on the holder, whose lock file holds this text; to be called time and again."""
        now = time.monotonic()
        if now - self.checked < CHECK_S:
            return
        holder, self.checked = LockHolder.from_text(text), now
        if holder is None:
            return
        if holder != self.holder:
            self.holder, self.worked = holder, -1
            self.tell(self._sentence(holder))
        if not holder.orphaned:
            return
        work = holder.work()
        if work != self.worked:
            self.worked, self.since = work, now
        elif now - self.since >= GRACE:
            holder.end()
            self.tell(
                f"process {holder.pid}, an oracle of an earlier run, has done nothing for {GRACE:g} s; it was ended"
            )

    def _sentence(self, holder: LockHolder) -> str:
        who = f"waiting for process {holder.pid} on {'this machine' if holder.here else holder.host}"
        if not holder.orphaned:
            return f"{who}, which computes the label {self.key} already"
        return (
            f"{who}, an oracle of an earlier run, which computes the label {self.key} already: its answer will be taken. It is ended "
            f"where it does nothing for {GRACE:g} s; to have the label computed anew, end it (kill {holder.pid})"
        )


def child_processes(pid: int, since: float = 0.0) -> list[int]:
    """Processes that a process started, and those that they started; only those begun since a time after boot (s)."""
    children: dict[int, list[tuple[int, float]]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        if values := _stat(int(entry.name)):
            children.setdefault(int(values[1]), []).append((int(entry.name), int(values[19]) / TICKS))
    family = list(children.get(pid, []))
    for child, _ in family:  # grows while it is read
        family += children.get(child, [])
    return [child for child, began in family if began >= since]


def _stat(pid: int) -> list[str]:
    """State, parent, ... of a process, as proc(5) lists them from its third on; none if there is no such process."""
    with suppress(OSError):
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return []


def _machine() -> str:
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""
