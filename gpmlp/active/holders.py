"""A holder is the process that computes a label and has its lock: who it is, and whether it still works for anybody; no torch.

A worker outlives a run that was killed. It is left to finish, because its answer is paid for; one that does nothing is ended, but only
where it is surely such a worker: of this machine, the very process that wrote its name into the lock, and no longer the child of its run.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
GRACE = 5.0  # s in which an orphan must have computed something, it or a process that it started
LOOK = 1.0  # s between two looks at that
MODULE = b"gpmlp.active.worker"


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        began: ticks after boot when the process began, which tells it from a later one of the same number.
        parent: process number of the run it works for.
        machine: boot and namespace in which the numbers hold.
    """

    pid: int
    began: int
    parent: int
    host: str
    machine: str

    @staticmethod
    def me() -> Holder:
        values = _stat(os.getpid())
        return Holder(os.getpid(), int(values[19]) if values else -1, os.getppid(), socket.gethostname(), _machine())

    @staticmethod
    def of(text: str) -> Holder | None:
        """What a lock file says; None if nothing, as of a holder that has just begun."""
        with suppress(ValueError, TypeError):
            return Holder(**json.loads(text))
        return None

    def plain(self) -> str:
        return json.dumps(asdict(self))

    @property
    def here(self) -> bool:
        """Whether it is a process of this machine."""
        return self.machine != "" and self.machine == _machine()

    @property
    def orphaned(self) -> bool:
        """Whether it is, without doubt, a worker of this machine the run of which has ended."""
        values = _stat(self.pid) if self.here else []
        if not values or int(values[19]) != self.began or int(values[1]) == self.parent:
            return False
        with suppress(OSError):
            return MODULE in (Path("/proc") / str(self.pid) / "cmdline").read_bytes().split(b"\0")
        return False

    def work(self) -> int:
        """Processor time (ticks) that it, all that it started and those of them that have ended have used."""
        found = (_stat(pid) for pid in (self.pid, *children(self.pid)))
        return sum(sum(map(int, values[11:15])) for values in found if values)

    def end(self) -> None:
        """End it and all that it started."""
        for pid in (self.pid, *children(self.pid)):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


class Waiting:
    """What is done while somebody else has a lock: say so, once for each holder, and end an orphan that does nothing."""

    def __init__(self, key: str, tell: Callable[[str], None]) -> None:
        self.key, self.tell = key, tell
        self.holder: Holder | None = None
        self.worked, self.since, self.looked = -1, 0.0, 0.0

    def __call__(self, text: str) -> None:
        """Look at the holder, whose lock file holds this text; to be called time and again."""
        now = time.monotonic()
        if now - self.looked < LOOK:
            return
        holder, self.looked = Holder.of(text), now
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

    def _sentence(self, holder: Holder) -> str:
        who = f"waiting for process {holder.pid} on {'this machine' if holder.here else holder.host}"
        if not holder.orphaned:
            return f"{who}, which computes the label {self.key} already"
        return (
            f"{who}, an oracle of an earlier run, which computes the label {self.key} already: its answer will be taken. It is ended "
            f"where it does nothing for {GRACE:g} s; to have the label computed anew, end it (kill {holder.pid})"
        )


def children(pid: int, since: float = 0.0) -> list[int]:
    """Processes that a process started, and those that they started; only those begun since a time after boot (s)."""
    known: dict[int, list[tuple[int, float]]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        if values := _stat(int(entry.name)):
            known.setdefault(int(values[1]), []).append((int(entry.name), int(values[19]) / TICKS))
    found = list(known.get(pid, []))
    for child, _ in found:  # grows while it is read
        found += known.get(child, [])
    return [child for child, began in found if began >= since]


def _stat(pid: int) -> list[str]:
    """State, parent, ... of a process, as proc(5) lists them from its third on; none if there is no such process."""
    with suppress(OSError):
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return []


def _machine() -> str:
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""
