"""Files of structures as frames: several files, indices, formats told by content, and steps of codes that did not converge."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ase.io
from ase.io.formats import UnknownFileTypeError, string2index

from gpmlp.core.errors import UserError
from gpmlp.core.findings import Finding
from gpmlp.io import extxyz
from gpmlp.io.convergence import unconverged_steps
from gpmlp.io.extxyz import FramePlace
from gpmlp.io.frames import Frame, PackedFrames

Progress = Callable[[str, float, float, str], None]
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
REPEAT = "Repeat it with more electronic steps."
CONVERGED = frozenset("converged unconverged isconverged".split())
OF_ELECTRONS = CONVERGED | frozenset(
    "is not scf electronic electrons energy dft ref reference qm calc calculation vasp qe cp2k aims".split()
)
NO, YES = ("false", "f", "no", "0", ".false."), ("true", "t", "yes", "1", ".true.")
EVERY = 500  # frames between two reports of progress
SHARD_BYTES = 4 << 20  # of frames that a worker parses at a time
Report = Callable[[float, float, str], None]
Each = Callable[[Callable, Sequence[tuple], Report], Iterable]  # calls a function with each tuple, in whatever process

# what readers of the many formats raise on input that they do not understand
UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AssertionError,
    AttributeError,
    RuntimeError,
    EOFError,
    UnknownFileTypeError,
)
_SPECIAL = {
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


@dataclass(frozen=True)
class FileFrames:
    """The frames of a file that were asked for.

    Attributes:
        path: of the file, as it was given.
        frames, numbers: and their numbers in the file, counted from 0.
        names: how messages call them.
        findings: of what was left out or not read.
    """

    path: Path
    frames: list[Frame]
    numbers: list[int]
    names: list[str]
    findings: tuple[Finding, ...] = ()


def find_files(paths: Paths) -> list[Path]:
    """The files that paths and patterns ('data/*.xyz') name, each once.

    Raises:
        UserError: a pattern that fits no file, a file that is named twice.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    found: list[Path] = []
    for path in map(Path, given):
        if glob.has_magic(str(path)) and not path.exists():
            fitting = sorted(glob.glob(str(path), recursive=True))
            if not fitting:
                raise UserError(f"{path}: no file fits this pattern.")
            found += map(Path, fitting)
        else:
            found.append(path)
    if not found:
        raise UserError("No file of structures was given.")
    places: dict[Path, Path] = {}
    for path in found:
        place = _resolved(path)
        if place in places:
            raise UserError(f"{path}: is given twice (also as {places[place]}); name each file once.")
        places[place] = path
    return found


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: is a link that leads nowhere (a loop).") from error


def check_source(path: Path) -> None:
    """Raise UserError if path is no ordinary file with something in it."""
    try:
        status = path.stat()
    except FileNotFoundError:
        link = " (a link to a file that is gone)" if path.is_symlink() else ""
        raise UserError(f"{path}: there is no such file{link}.") from None
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "a loop of links"
        raise UserError(f"{path}: cannot be read: {reason}.") from error
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path}: is a folder; give a file of structures.")
    if not stat.S_ISREG(status.st_mode):
        kind = _SPECIAL.get(stat.S_IFMT(status.st_mode), "no ordinary file")
        raise UserError(f"{path}: is {kind}; give an ordinary file of structures.")
    if status.st_size == 0:
        raise UserError(f"{path}: is empty.")
    if path.suffix == ".gpmlp":
        raise UserError(f"{path}: is a model file by its name; give a file of structures, as train.xyz.")


def called_files(paths: Paths) -> list[tuple[Path, str]]:
    """The files that paths and patterns name, and what messages call each."""
    files = find_files(paths)
    names = [path.name for path in files]
    return [(path, str(path) if names.count(path.name) > 1 else path.name) for path in files]


def read_file(
    path: str | os.PathLike[str],
    index: str | int | slice = ":",
    progress: Progress | None = None,
    called: str | None = None,
    each: Each | None = None,
) -> FileFrames:
    """Read frames of one file; what the index leaves out of an XYZ file is not parsed.

    Args:
        called: how messages call the file; its name without folders, if not given.
        each: by whom frames of an XYZ file that is not compressed are parsed, SHARD_BYTES at a time; this process if not given.

    Raises:
        UserError: the file or a frame of it cannot be used; names the file, the frame and where possible the line.
    """
    path = Path(path)
    check_source(path)
    called = called or path.name
    try:
        if not extxyz.is_xyz(path):
            return _read_by_ase(path, index, called)
        return _read_xyz(path, index, progress, called, None if extxyz.is_compressed(path) else each)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _read_xyz(
    path: Path, index: str | int | slice, progress: Progress | None, called: str, each: Each | None
) -> FileFrames:
    layout = extxyz.scan_frames(path)
    if layout.problem:
        raise UserError(f"{path}: cannot be read: {layout.problem}.")
    numbers = _choose(path, index, len(layout.starts))
    tell = partial(progress, "reading") if progress and len(numbers) > EVERY else lambda done, total, note: None
    frames: list[Frame] = []
    if each is None:
        for frame in extxyz.read_places(path, layout.places(numbers)):
            frames.append(frame)
            if len(frames) % EVERY == 0 or len(frames) == len(numbers):
                tell(len(frames), len(numbers), called)
    else:
        shards = [(path.absolute(), places) for places in _shards(layout.places(numbers))]
        for part in each(_read_shard, shards, lambda done, total, _: tell(done, total, called)):
            frames += part.unpacked() if isinstance(part, PackedFrames) else part
    names = [f"{called} frame {i}" for i in numbers]
    return FileFrames(path, frames, numbers, names, tuple(_not_read(frames, names)))


def _shards(places: Sequence[FramePlace]) -> Iterator[list[FramePlace]]:
    """Runs of frames of about SHARD_BYTES."""
    shard: list[FramePlace] = []
    for place in places:
        shard.append(place)
        if abs(place.end - shard[0].start) >= SHARD_BYTES:  # they may be in any order
            yield shard
            shard = []
    if shard:
        yield shard


def _read_shard(path: Path, places: Sequence[FramePlace]) -> PackedFrames | list[Frame]:
    """Parse frames of a file, on a worker, which has to see it under this path."""
    try:
        return PackedFrames.of(list(extxyz.read_places(path, places)))
    except OSError as error:
        raise UserError(f"{path}: cannot be read by a worker: {error.strerror or error}.") from error


def _not_read(frames: Sequence[Frame], names: Sequence[str]) -> Iterator[Finding]:
    """Columns without a name, and a cell under a name that is not known."""
    ragged = [name for name, frame in zip(names, frames, strict=True) if frame.unnamed_columns]
    if ragged:
        most = max(frame.unnamed_columns for frame in frames)
        text = f"lines of atoms have up to {most} more columns than Properties name; these are not read."
        advice = "Name them in Properties, as Properties=species:S:1:pos:R:3:forces:R:3."
        yield Finding("columns-without-a-name", "warning", text, tuple(ragged), {"columns": float(most)}, advice)
    failed = [name for name, frame in zip(names, frames, strict=True) if _says_unconverged(frame)]
    if failed:
        text = "the file says that the electronic steps have not converged; the labels are taken nevertheless."
        yield Finding("marked-as-not-converged", "warning", text, tuple(failed), {"frames": float(len(failed))}, REPEAT)
    cells: dict[str, list[str]] = {}
    for name, frame in zip(names, frames, strict=True):
        if frame.pbc.any() or frame.cell.any():
            continue
        for key, value in frame.info.items():
            if key.lower().startswith(("cell", "box", "unit_cell", "unitcell", "lattice")) and getattr(
                value, "size", 1
            ) in (1, 3, 6, 9):
                cells.setdefault(key, []).append(name)
    for key, where in cells.items():
        text = f"`{key}` is not known as a cell; the structures are taken as not periodic."
        advice = 'Write the lattice vectors as Lattice="ax ay az bx by bz cx cy cz".'
        yield Finding("cell-of-unknown-name", "warning", text, tuple(where), {"frames": float(len(where))}, advice)


def _says_unconverged(frame: Frame) -> bool:
    """Whether a key as `converged` or `scf_converged` is false; those of relaxations, whose labels are right, do not count."""
    for key, value in frame.info.items():
        words = set(key.lower().replace("-", "_").split("_"))
        if words & CONVERGED and words <= OF_ELECTRONS:
            if str(value).strip().lower() in (YES if words & {"unconverged", "not"} else NO):
                return True
    return False


def _read_by_ase(path: Path, index: str | int | slice, called: str) -> FileFrames:
    """Read every frame in any other format that ASE knows; frames of steps that did not converge are left out."""
    frames: list[Frame] = []
    try:
        for atoms in ase.io.iread(path, index=":", do_not_split_by_at_sign=True):
            frames.append(Frame.from_atoms(atoms))
    except UNREADABLE as error:
        failed = unconverged_steps(path, len(frames) + 1)
        if not frames or len(frames) not in failed.steps:
            reason = failed.reason or str(error) or type(error).__name__
            where = f"frame {len(frames)} of it" if frames else "it"
            raise UserError(f"{path}: {where} cannot be read: {reason}") from error
    else:
        failed = unconverged_steps(path, len(frames))
    numbers = [i for i in _choose(path, index, len(frames)) if i not in failed.steps]
    kept, names = [frames[i] for i in numbers], [f"{called} frame {i}" for i in numbers]
    if not failed.steps:
        return FileFrames(path, kept, numbers, names)
    if not numbers:
        raise UserError(f"{path}: none of its {len(frames)} steps has converged: {failed.reason}.")
    text = f"the electronic steps have not converged ({failed.reason}); the step is left out."
    steps = tuple(f"{called} frame {i}" for i in sorted(failed.steps))
    finding = Finding("step-not-converged", "warning", text, steps, {"steps": float(len(steps))}, REPEAT)
    return FileFrames(path, kept, numbers, names, (finding,))


def _choose(path: Path, index: str | int | slice, n: int) -> list[int]:
    """Numbers of the frames that an index keeps of n."""
    if not n:
        raise UserError(f"{path}: holds no structures.")
    try:
        chosen = string2index(index) if isinstance(index, str) else index
        numbers = list(range(n)[chosen]) if isinstance(chosen, slice) else [range(n)[int(chosen)]]
    except (ValueError, IndexError, TypeError) as error:
        raise UserError(f"{path}: cannot take the frames '{index}' of {n}: {error}.") from error
    if not numbers:
        raise UserError(f"{path}: the index '{index}' keeps none of its {n} frames.")
    return numbers
