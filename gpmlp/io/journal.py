"""A journal is a file of JSON lines that only grows: what it is about in the first line, then one entry a line, each on disk at once."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpmlp.checks import UserError
from gpmlp.io.atomic import check_target


@dataclass(frozen=True)
class Journal:
    """A journal open for more entries.

    Attributes:
        header: what the first line says.
        entries: those that were there when it was opened.
    """

    path: Path
    header: dict[str, Any]
    entries: tuple[dict[str, Any], ...] = ()

    def append(self, entry: dict[str, Any]) -> None:
        """Add one line and return when it is on the disk."""
        line = json.dumps(entry, allow_nan=False) + "\n"
        try:
            with open(self.path, "ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: could not be written: {error.strerror or error}.") from error


def begin(path: str | os.PathLike[str], header: dict[str, Any]) -> Journal:
    """Begin a journal where there is none yet (an empty file counts as none)."""
    check_target(path)
    path = Path(path)
    if path.exists() and path.stat().st_size:
        raise UserError(f"{path}: is there already; go on with it (--resume), remove it, or give another name.")
    journal = Journal(path, header)
    journal.append(header)
    return journal


def reopen(path: str | os.PathLike[str]) -> Journal | None:
    """Open a journal to go on with; None where there is none, or none but a torn first line.

    The last line is cut off if writing it was interrupted (no line end, or no JSON).

    Raises:
        UserError: it cannot be read, or a line before the last is no JSON object.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        lines = path.read_bytes().split(b"\n")
        whole, good = [], 0
        for number, line in enumerate(lines, 1):
            entry = _parse(line) if number < len(lines) else None  # what follows the last line end was never finished
            if entry is None:
                if number < len(lines) - 1:
                    raise UserError(f"{path}: line {number} is not a JSON object; is this the right file?")
                break
            whole.append(entry)
            good += len(line) + 1
        if path.stat().st_size > good:
            os.truncate(path, good)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error
    return Journal(path, whole[0], tuple(whole[1:])) if whole else None


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
