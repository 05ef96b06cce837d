"""Files that survive an interruption: atomic writing, append-only journals whose torn tail is cut off, locks of folders."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gpmlp.core.errors import UserError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what a file system without locks says


def check_target(path: str | os.PathLike[str], stays: str = "") -> None:
    """Raise UserError if no file can be written at path (asked before a long computation, not after it).

    Args:
        stays: what has to be there afterwards, e.g. 'the model', so that a device or a pipe, which may be written to, is refused.
    """
    path = Path(path)
    if _special(path):
        if stays:
            raise UserError(f"{path}: is a device or a pipe; give the name of a file for {stays}.")
        return
    folder = path.resolve().parent
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of a file to write.")
    if not folder.is_dir():
        raise UserError(f"{path}: the folder {folder} does not exist; make it first (mkdir -p {folder}).")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{path}: the folder {folder} may not be written to; choose another place.")


def check_readable(path: str | os.PathLike[str], what: str) -> None:
    """Raise UserError unless path is a file with an end: not a folder, a device (/dev/zero) or a pipe, which may have none.

    Args:
        what: that it should be, e.g. 'a recipe'.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such file.")
    if not path.is_file():
        raise UserError(f"{path}: is {'a folder' if path.is_dir() else 'a device or a pipe'}, not {what}.")


def check_folder(path: str | os.PathLike[str]) -> None:
    """Raise UserError if path is no folder and cannot be made one."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; give the name of a folder.")
    there = next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.exists())
    if not there.is_dir():
        raise UserError(f"{path}: no folder can be made there, because {there} is a file; choose another place.")
    if not os.access(there, os.W_OK):
        raise UserError(f"{path}: the folder {there} may not be written to; choose another place.")


def check_apart(
    targets: Mapping[str, str | os.PathLike[str] | None], sources: Mapping[str, str | os.PathLike[str] | None]
) -> None:
    """Raise UserError if a file to write is also one that is read, or two files to write are one (links followed).

    Args:
        targets, sources: files by what a message calls them ('the model'); None stands for a file that was not asked for.
    """
    paths = {role: Path(path) for role, path in sources.items() if path is not None}
    for role, path in targets.items():
        if path is None or _special(Path(path)):
            continue
        for other, place in paths.items():
            if _same(Path(path), place):
                raise UserError(
                    f"{path}: is to be written as {role}, but is {other} too; give {role} a name of its own."
                )
        paths[role] = Path(path)


def open_locked(path: Path) -> IO[bytes]:
    """A file to append to, locked as long as it is open. Raises UserError: another process has it."""
    file = open(path, "ab", buffering=0)  # noqa: SIM115 - as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(f"{path.parent}: another process is at work on this run; wait for it, or end it.") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:  # a file system without locks
            file.close()
            raise
    return file


def _same(a: Path, b: Path) -> bool:
    """Whether two paths lead to one file, whether or not it is there yet."""
    return a.resolve() == b.resolve() or (a.exists() and b.exists() and os.path.samefile(a, b))


@contextmanager
def atomic_write(path: str | os.PathLike[str], text: bool = False) -> Iterator[IO]:
    """Yield a file that takes the place of path when the block ends well, and vanishes when it does not.

    The bytes go to a temporary file in the same folder, reach the disk (fsync) and only then take the name (os.replace).
    Devices and pipes (/dev/stdout) are written to directly.

    Raises:
        UserError: the folder is missing, or the system refused to write (disk full, no permission).
    """
    check_target(path)
    # a link keeps pointing at the file it pointed at
    special = _special(Path(path))
    target = Path(path) if special else Path(path).resolve()
    mode, encoding = ("w", "utf-8") if text else ("wb", None)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(
            target if special else temporary, mode if special else mode.replace("w", "x"), encoding=encoding
        ) as file:
            yield file
            if not special:
                file.flush()
                os.fsync(file.fileno())
        if not special:
            os.replace(temporary, target)
            _sync_folder(target.parent)
    except OSError as error:
        untouched = "; the old file is untouched" if target.is_file() else ""
        raise UserError(f"{path}: could not be written: {error.strerror or error}{untouched}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _special(path: Path) -> bool:
    """Whether path is a device or a pipe."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _sync_folder(folder: Path) -> None:
    """Make the new name itself survive a power cut, where the system can (Windows cannot open folders)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Add bytes to the end of a file: all of them, on the disk (fsync), or none.

    Raises:
        UserError: the disk is full or the file cannot be written; it is then as it was before.
    """
    path = Path(path)
    try:
        new = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            before = os.fstat(descriptor).st_size
            try:
                left = data
                while left:  # once, unless the disk is nearly full
                    left = left[os.write(descriptor, left) :]
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)
        if new:
            _sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: could not be written: {reason}; the file is as it was before.") from error


def cut_tail(path: str | os.PathLike[str], end: int, aside: str | os.PathLike[str] | None = None) -> int:
    """Cut off the unfinished bytes after `end` that an interrupted writer left, and return how many they were.

    Args:
        aside: file to whose end these bytes are moved; they are dropped if None.
    """
    with open(path, "rb") as file:
        file.seek(end)
        torn = file.read()
    if torn and aside is not None:
        append_whole(aside, torn)
    if torn:
        os.truncate(path, end)
    return len(torn)


@dataclass(frozen=True)
class JsonJournal:
    """A file of JSON lines open for more entries.

    Attributes:
        header: what the first line says.
        entries: those that were there when it was opened.
    """

    path: Path
    header: dict[str, Any]
    entries: tuple[dict[str, Any], ...] = ()

    def append(self, entry: dict[str, Any]) -> None:
        """Add one line and return when it is on the disk; see append_whole."""
        append_whole(self.path, (json.dumps(entry, allow_nan=False) + "\n").encode())


def begin_journal(path: str | os.PathLike[str], header: dict[str, Any]) -> JsonJournal:
    """Begin a journal where there is none yet (an empty file counts as none)."""
    check_target(path)
    path = Path(path)
    if path.exists() and path.stat().st_size:
        raise UserError(f"{path}: is there already; go on with it (--resume), remove it, or give another name.")
    journal = JsonJournal(path, header)
    journal.append(header)
    return journal


def reopen_journal(path: str | os.PathLike[str]) -> JsonJournal | None:
    """Open a journal to go on with; None where there is none, or none but a torn first line.

    The last line is cut off if writing it was interrupted (no line end, or no JSON).

    Raises:
        UserError: it cannot be read, or a line before the last is no JSON object.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        *lines, _ = path.read_bytes().split(b"\n")  # what follows the last line end was never finished
        whole: list[dict[str, Any]] = []
        for number, line in enumerate(lines, 1):
            entry = _json_object(line)
            if entry is not None:
                whole.append(entry)
            elif number < len(lines):
                raise UserError(f"{path}: line {number} is not a JSON object; is this the right file?")
        cut_tail(path, sum(len(line) + 1 for line in lines[: len(whole)]))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error
    return JsonJournal(path, whole[0], tuple(whole[1:])) if whole else None


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
