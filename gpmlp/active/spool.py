"""The spool is a folder of attempts at labels, written by whoever computed them before anyone is told; no torch."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpmlp.active.holders import Holder

LABEL, FAILED = "label", "failed"  # these end an attempt and are kept
UNUSABLE, INTERRUPTED, DISK = "unusable", "interrupted", "disk"  # these say nothing of the structure and are not
POLL = 0.05  # s
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def path(folder: str | os.PathLike[str], key: str, attempt: int) -> Path:
    return Path(folder) / f"{key}.{attempt}.json"


def write(folder: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Put the record of an attempt into the spool: complete and on the disk, or not at all (OSError)."""
    target = path(folder, record["key"], record["attempt"])
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


def read(folder: str | os.PathLike[str], key: str, attempt: int) -> dict[str, Any] | None:
    """The record of an attempt; None if it has not ended."""
    try:
        record = json.loads(path(folder, key, attempt).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return record if isinstance(record, dict) and record.get("kind") in (LABEL, FAILED) else None


def attempts(folder: str | os.PathLike[str], key: str) -> list[dict[str, Any]]:
    """The records of all attempts from the first on that have ended."""
    found = []
    while (record := read(folder, key, len(found) + 1)) is not None:
        found.append(record)
    return found


def forget(folder: str | os.PathLike[str], key: str) -> None:
    """Remove what the spool holds of a key."""
    for file in Path(folder).glob(f"{key}.*"):
        file.unlink(missing_ok=True)


@contextmanager
def lock(
    folder: str | os.PathLike[str], key: str, waiting: Callable[[str], None] = lambda text: None
) -> Iterator[None]:
    """Wait until nobody else computes this key: whoever does may have outlived the run that asked for it.

    The system lets go of the lock when the process that holds it ends, in whatever way.

    Args:
        waiting: called time and again with what the file of the lock says of who holds it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(Path(folder) / f"{key}.lock", os.O_RDWR | os.O_CREAT)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting(os.pread(descriptor, 4096, 0).decode(errors="replace"))
                time.sleep(POLL)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                break  # a file system without locks: asked twice at worst
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, Holder.me().plain().encode(), 0)
        yield
    finally:
        os.close(descriptor)
