"""Where the frames of an XYZ file lie: found by counting lines, so that cut-off and dropped frames are noticed."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """The frames of an XYZ file.

    Attributes:
        starts: byte offset of each complete frame.
        end: byte offset after the last complete frame.
        problem: what follows the last complete frame, '' if nothing but blank lines.
    """

    starts: tuple[int, ...]
    end: int
    problem: str


def scan(path: str | os.PathLike[str]) -> Layout:
    """Find the frames of an XYZ file; a last line without a line end counts as complete."""
    starts: list[int] = []
    with open(path, "rb") as file:
        end, number = 0, 1
        while True:
            line = file.readline()
            if not line.strip():
                return Layout(tuple(starts), end, _rest(file, number, len(starts)) if line else "")
            if not line.strip().isdigit():
                got = line.strip()[:40].decode("utf-8", "replace")
                return Layout(tuple(starts), end, f"line {number}: a number of atoms must stand there; got '{got}'")
            n = int(line)
            lines = [file.readline() for _ in range(n + 1)]
            # the comment line may be blank, the lines of atoms may not
            present = sum(bool(entry.strip()) for entry in lines[1:]) if lines[0] else 0
            if present < n or not lines[0]:
                return Layout(tuple(starts), end, f"frame {len(starts)} is cut off: {present} of {n} atoms are there")
            starts.append(end)
            end, number = file.tell(), number + n + 2


def _rest(file, number: int, n_frames: int) -> str:
    """Say what follows a blank line; readers stop there, so anything that does would be lost."""
    for line in file:
        if line.strip():
            return f"line {number} is blank but more follows; frames after frame {n_frames - 1} would be lost"
    return ""
