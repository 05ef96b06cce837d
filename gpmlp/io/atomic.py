"""Atomic writing: a file is there complete, or the old one is there untouched."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from gpmlp.checks import UserError


def check_target(path: str | os.PathLike[str]) -> None:
    """Raise UserError if no file can be written at path (asked before a long computation, not after it)."""
    path = Path(path)
    if _special(path):
        return
    folder = path.resolve().parent
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of a file to write.")
    if not folder.is_dir():
        raise UserError(f"{path}: the folder {folder} does not exist; make it first (mkdir -p {folder}).")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{path}: the folder {folder} may not be written to; choose another place.")


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
    seen = {role: Path(path) for role, path in sources.items() if path is not None}
    for role, path in targets.items():
        if path is None or _special(Path(path)):
            continue
        for other, known in seen.items():
            if _same(Path(path), known):
                raise UserError(
                    f"{path}: is to be written as {role}, but is {other} too; give {role} a name of its own."
                )
        seen[role] = Path(path)


def _same(a: Path, b: Path) -> bool:
    """Whether two paths lead to one file, whether or not it is there yet."""
    return a.resolve() == b.resolve() or (a.exists() and b.exists() and os.path.samefile(a, b))


@contextmanager
def atomic(path: str | os.PathLike[str], text: bool = False) -> Iterator[IO]:
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
        kept = "; the old file is untouched" if target.is_file() else ""
        raise UserError(f"{path}: could not be written: {error.strerror or error}{kept}.") from error
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
