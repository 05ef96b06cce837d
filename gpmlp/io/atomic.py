"""Atomic writing: a file is there complete, or the old one is there untouched."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
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
