"""Extended XYZ: where the frames of a file begin, and a parser of one frame that is several times as quick as ASE's.

What ASE reads is read alike (tests/test_extxyz.py compares them). Beyond that, the names Lattice, pbc, Properties, species and pos
are known in any case, as NEP writes them, a stress or virial may have six numbers, numbers may be Fortran's (1.0D-3), and a mark of
byte order may come first. Compression is told by the first bytes.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from ase.data import atomic_numbers
from ase.io.extxyz import key_val_str_to_dict

from gpmlp.core.errors import UserError
from gpmlp.io.frames import Frame

SUFFIXES = (".xyz", ".extxyz", ".exyz")
LONGEST_LINE = 1 << 26  # bytes; beyond, it is no text
MOST_DIGITS = 15  # of a number of atoms
SHORTEST_ATOM = 2  # bytes of its line
HEAD = 1 << 16  # bytes that a format is told by

_FORTRAN = re.compile(r"[-+]?\d*\.\d*[dD][-+]?\d+")  # 1.0D-3; without a point it may be a name
# one key, or key=value with a plain or quoted value; whatever is written otherwise is left to ASE's parser
_ENTRY = re.compile(r"""([^\s="'{}\[\]\\]+)(?:=(?:"([^"\\]*)"|([^\s="'{}\[\]\\]+)))?(?:\s+|$)""")
_NUMERIC = frozenset("+-.0123456789nNiI")
_BOOL = {
    "T": True,
    "true": True,
    "True": True,
    "TRUE": True,
    "F": False,
    "false": False,
    "False": False,
    "FALSE": False,
}
_TENSORS = ("virial", "stress")
# names of columns in any case -> ASE's
_COLUMNS = {"pos": "positions", "positions": "positions", "species": "symbols", "symbols": "symbols", "z": "numbers"}
_COLUMNS |= {"numbers": "numbers", "charge": "charges"}


class _UnavailableError(Exception):
    """A compression that cannot be read here."""


class ParseError(ValueError):
    """A frame that cannot be read; `line` is counted from 0 in the frame."""

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.line = line


@dataclass(frozen=True)
class FrameOffsets:
    """The complete frames of an XYZ file.

    Attributes:
        starts: byte offset of each frame.
        lines: line of each frame's count of atoms, counted from 1.
        end: byte offset after the last one.
        problem: what follows it, '' if nothing but blank lines.
    """

    starts: tuple[int, ...]
    lines: tuple[int, ...]
    end: int
    problem: str

    def places(self, chosen: Sequence[int]) -> list[FramePlace]:
        """Where some of the frames are, by their numbers."""
        bounds = [*self.starts, self.end]
        return [FramePlace(i, self.lines[i], bounds[i], bounds[i + 1]) for i in chosen]


class FramePlace(NamedTuple):
    """A frame of a file: its number, the line that it begins with, and its bytes."""

    number: int
    line: int
    start: int
    end: int


def _zstandard(raw: IO[bytes]) -> IO[bytes]:
    for module in ("compression.zstd", "backports.zstd", "pyzstd"):
        try:
            return importlib.import_module(module).ZstdFile(raw)
        except ImportError:
            continue
    try:
        return importlib.import_module("zstandard").open(raw, "rb")
    except ImportError:
        raise _UnavailableError(
            "is compressed by zstd, which this Python cannot read; decompress it first (unzstd)"
        ) from None


_OPENERS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": _zstandard,
}


@contextmanager
def open_decompressed(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed where its first bytes are those of gzip, bzip2, xz or zstd."""
    with open(path, "rb") as raw:
        magic = raw.read(6)
        raw.seek(0)
        opener = next((opener for start, opener in _OPENERS.items() if magic.startswith(start)), None)
        if opener is None:
            yield raw
            return
        try:
            with io.BufferedReader(opener(raw)) as stream:
                yield stream
        except _UnavailableError as error:
            raise UserError(f"{path}: {error}.") from None
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            raise UserError(f"{path}: cannot be decompressed: {error}; is the file complete?") from error


def is_xyz(path: Path) -> bool:
    """Whether a file holds frames of (extended) XYZ, by its suffix in any case or else by what is in it."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".bz2", ".xz", ".zst"):
        suffixes.pop()
    if suffixes and suffixes[-1] in SUFFIXES:
        return True
    with open_decompressed(path) as file:
        head = file.read(HEAD).decode("utf-8-sig", "replace").lstrip().split("\n")
    if len(head) < 3 or not head[0].strip().isdecimal():
        return False
    words = head[2].split()
    return "properties=" in head[1].lower() or (len(words) >= 4 and words[0].capitalize() in atomic_numbers)


def scan_frames(path: str | os.PathLike[str], closed: bool = False) -> FrameOffsets:
    """Find the frames of an XYZ file, compressed or not, without parsing them.

    Args:
        closed: whether a frame whose last line has no line end is incomplete: an interrupted writer may have cut its last number short.
    """
    with open_decompressed(path) as file:
        return _scan(file, os.stat(path).st_size if _is_raw(file) else None, closed)


def is_compressed(path: str | os.PathLike[str]) -> bool:
    """Whether frames can be reached only through those before them."""
    with open_decompressed(path) as file:
        return not _is_raw(file)


def _is_raw(file: IO[bytes]) -> bool:
    return isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO)


def _scan(file: IO[bytes], size: int | None, closed: bool) -> FrameOffsets:
    starts: list[int] = []
    lines: list[int] = []
    end, number = 0, 1

    def result(problem: str) -> FrameOffsets:
        return FrameOffsets(tuple(starts), tuple(lines), end, problem)

    while True:
        line = file.readline(LONGEST_LINE)
        count = line.strip() if starts else line.removeprefix(codecs.BOM_UTF8).strip()
        if not count:
            return result(_rest(file, number, len(starts)) if line else "")
        if not count.isdigit() or len(count) > MOST_DIGITS:
            if count.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                return result("it is text in UTF-16; save it as UTF-8")
            got = count[:40].decode("utf-8", "replace")
            where = f" (frame {len(starts)} should begin there)" if starts else ""
            return result(f"line {number}: a number of atoms must stand there; got '{got}'{where}")
        n = int(count)
        if size is not None and n * SHORTEST_ATOM > size - end:
            return result(
                f"frame {len(starts)} (line {number}) is cut off: the file is too short for the {n} atoms it claims"
            )
        last = comment = file.readline(LONGEST_LINE)
        present = 0
        for _ in range(n):
            last = file.readline(LONGEST_LINE)
            if not last.strip():  # the comment line may be blank, the lines of atoms may not
                break
            present += 1
        if present < n or not comment or (closed and not last.endswith(b"\n")):
            return result(
                f"frame {len(starts)} is cut off: {present} of {n} atoms are there (it begins at line {number})"
            )
        starts.append(end)
        lines.append(number)
        end, number = file.tell(), number + n + 2


def _rest(file: IO[bytes], number: int, n_frames: int) -> str:
    """Say what follows a blank line; readers stop there, so anything that does would be lost."""
    while line := file.readline(LONGEST_LINE):
        if line.strip():
            if not n_frames:
                return f"line {number} is blank; a number of atoms must stand there"
            return f"line {number} is blank but more follows; frames after frame {n_frames - 1} would be lost"
    return ""


def read_places(path: str | os.PathLike[str], places: Sequence[FramePlace]) -> Iterator[Frame]:
    """Parse these frames; nothing else is parsed.

    Raises:
        UserError: a frame cannot be read; names file, frame and line.
    """
    with open_decompressed(path) as file:
        for place in places:
            file.seek(place.start)
            try:
                yield parse_frame(file.read(place.end - place.start))
            except ParseError as error:
                line = place.line + error.line
                raise UserError(f"{path}: frame {place.number} of it cannot be read: {error} (line {line}).") from error


def parse_frame(text: bytes) -> Frame:
    """The frame that the bytes hold: a count of atoms, a comment, a line for each atom.

    Raises:
        ParseError: it cannot be read.
    """
    try:
        count, comment, *lines = text.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ParseError("it is no text in UTF-8", text[: error.start].count(b"\n")) from error
    n = int(count)
    info = parse_comment(comment)
    cell, pbc = _cell_and_pbc(info)
    properties = _pop(info, "Properties")
    layout = _layout("species:S:1:pos:R:3" if properties is None else str(properties))
    arrays, unnamed = _columns(lines[:n], layout)
    if "positions" not in arrays:
        raise ParseError("Properties name no positions (pos:R:3)", 1)
    positions = arrays.pop("positions")
    symbols, numbers = arrays.pop("symbols", None), arrays.pop("numbers", None)
    if numbers is None:
        numbers = _numbers(symbols)
    fixed = ~arrays.pop("move_mask").astype(bool) if "move_mask" in arrays else None
    return Frame(numbers, positions, cell, pbc, info, arrays, fixed=fixed, unnamed_columns=unnamed)


def parse_comment(comment: str) -> dict[str, Any]:
    """Names and values of a comment line: numbers, arrays of them, truth values, else text."""
    comment, place = comment.strip(), 0
    entries: dict[str, Any] = {}
    texts: dict[str, str] = {}
    while place < len(comment):
        match = _ENTRY.match(comment, place)
        if match is None:
            return _parse_unusual(comment)
        key, quoted, plain = match.groups()
        text = quoted if quoted is not None else "T" if plain is None else plain
        if text.startswith("_JSON"):
            return _parse_unusual(comment)
        if key in entries and text != texts[key]:
            raise ParseError(f"'{key}' is given twice, as {texts[key]} and as {text}", 1)
        texts[key] = text
        entries[key] = _value(key, text)
        place = match.end()
    return entries


def _parse_unusual(comment: str) -> dict[str, Any]:
    """As ASE parses it: nested quotes, brackets, JSON; but any tensor may have six numbers."""
    try:
        return key_val_str_to_dict(comment)
    except (ValueError, LookupError) as error:
        raise ParseError(f"the comment line cannot be understood ({error})", 1) from error


def _value(key: str, text: str) -> Any:
    if key.lower() == "uid":
        return text
    words = text.replace(",", " ").split() if "," in text else text.split()
    if words and words[0][0] not in _NUMERIC:
        known = [_BOOL.get(word) for word in words]
        return text if None in known else known[0] if len(known) == 1 else known
    try:
        if "." in text:
            raise ValueError
        array = np.array(list(map(int, words)), dtype=int)
    except (ValueError, OverflowError):
        try:
            array = np.array(_converted(float, words))
        except ValueError:
            return text
    if key in _TENSORS and array.shape == (9,):
        return array.reshape(3, 3, order="F")  # as ASE, whose tensors are symmetric
    return array[0] if len(array) == 1 else array


def _pop(info: dict[str, Any], name: str) -> Any:
    """Remove an entry, whatever the case of its name; None if there is none."""
    if name in info:
        return info.pop(name)
    for key in info:
        if key.lower() == name.lower():
            return info.pop(key)
    return None


def _cell_and_pbc(info: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    lattice, pbc = _pop(info, "Lattice"), _pop(info, "pbc")
    cell = np.zeros((3, 3))
    if lattice is not None:
        array = np.asarray(lattice)
        if array.size != 9 or array.dtype.kind not in "if":
            raise ParseError(f"Lattice must hold nine numbers, the three lattice vectors; got '{lattice}'", 1)
        # ASE's parser has transposed what is called Lattice
        cell = array.T.astype(float) if array.shape == (3, 3) else array.reshape(3, 3).astype(float)
    if pbc is None:
        return cell, np.full(3, lattice is not None)
    flags = np.asarray(pbc)
    if flags.size not in (1, 3) or flags.dtype.kind not in "bi":
        raise ParseError(f"pbc must hold three of T and F; got '{pbc}'", 1)
    return cell, np.broadcast_to(flags.astype(bool), 3).copy()


@lru_cache(maxsize=256)
def _layout(properties: str) -> tuple[tuple[str, str, int, int], ...]:
    """Name, type, first column and last + 1 of each property."""
    fields = properties.split(":")
    out, column = [], 0
    for name, kind, number in zip(fields[::3], fields[1::3], fields[2::3], strict=False):
        if kind.upper() not in ("R", "I", "S", "L") or not number.isdecimal() or len(fields) % 3:
            raise ParseError(f"Properties must be name:type:columns, of the types R, I, S and L; got '{properties}'", 1)
        out.append((_COLUMNS.get(name.lower(), name), kind.upper(), column, column + int(number)))
        column += int(number)
    names = [name for name, *_ in out]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ParseError(f"Properties name '{twice}' twice", 1)
    return tuple(out)


def _converted(convert: Callable[[str], Any], words: Iterable[str]) -> list:
    """Words as numbers, also of Fortran, or as what their column is."""
    words = list(words)
    try:
        return list(map(convert, words))
    except ValueError:
        if convert is not float:
            raise
        return [float(word.lower().replace("d", "e") if _FORTRAN.fullmatch(word) else word) for word in words]


_CONVERT: dict[str, tuple[Callable[[str], Any], Any]] = {
    "R": (float, float),
    "I": (int, np.int32),
    "S": (str, object),
    "L": (lambda word: word in ("T", "True"), bool),
}


def _columns(lines: Sequence[str], layout: tuple[tuple[str, str, int, int], ...]) -> tuple[dict[str, np.ndarray], int]:
    """The properties of the atoms, and how many columns more there are than these have."""
    n, width = len(lines), layout[-1][3] if layout else 0
    rows = [line.split() for line in lines]
    lengths = list(map(len, rows)) or [width]
    if min(lengths) < width:
        i = next(i for i, length in enumerate(lengths) if length < width)
        raise ParseError(f"{lengths[i]} columns where Properties name {width}", 2 + i)
    columns = list(zip(*rows, strict=False))[:width] if n else [()] * width
    arrays = {}
    for name, kind, first, last in layout:
        convert, dtype = _CONVERT[kind]
        try:
            values = _converted(convert, chain.from_iterable(columns[first:last]))
        except ValueError as error:
            raise ParseError(str(error), 2 + _first_bad(columns[first:last], convert)) from error
        array = np.array(values, dtype=dtype)
        arrays[name] = array if last - first == 1 else array.reshape(last - first, n).T
    return arrays, max(lengths) - width


def _first_bad(columns: Sequence[Sequence[str]], convert: Callable[[str], Any]) -> int:
    """Row of the first word that cannot be converted."""
    for i, words in enumerate(zip(*columns, strict=True)):
        try:
            _converted(convert, words)
        except ValueError:
            return i
    return 0


def _numbers(symbols: np.ndarray | None) -> np.ndarray:
    if symbols is None:
        raise ParseError("Properties name no elements (species:S:1 or Z:I:1)", 1)
    if symbols.dtype.kind == "i":
        return symbols
    try:
        return np.array([atomic_numbers[symbol] for symbol in symbols], dtype=int)
    except KeyError:
        for i, symbol in enumerate(symbols):
            if str(symbol).capitalize() not in atomic_numbers:
                raise ParseError(f"'{symbol}' is no element", 2 + i) from None
        return np.array([atomic_numbers[symbol.capitalize()] for symbol in symbols], dtype=int)
