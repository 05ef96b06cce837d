"""Model file of one potential: safetensors with a JSON header and a checksum over every byte.

The safetensors metadata hold one key, ``gpmlp``: a JSON object with ``archive_sha256`` (of the file with this number replaced by
zeros), ``format`` (an integer, raised whenever older versions could not read the file), ``version`` of the package, ``units``,
and ``header``, the first part of Potential.state(). Nothing in it is executed on loading.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from gpmlp.core.errors import UserError
from gpmlp.io import provenance
from gpmlp.io.files import atomic_write, check_readable
from gpmlp.io.model_header import check_header

FORMAT_VERSION = 4  # 2: posterior factor, calibration, novelty besides the mean; 3: means of low rank; 4: of any kernel
UNITS = "eV, angstrom, atomic mass units; stress eV/angstrom^3, positive = tension"
LONGEST_HEADER = 100 << 20  # bytes, as in safetensors
BLANK = "0" * 64
# the checksum comes first in the JSON text, whose quotes safetensors escapes
CHECKSUM = re.compile(rb'"gpmlp":"\{\\"archive_sha256\\":\\"([0-9a-f]{64})\\"')


class _Archivable(Protocol):
    """Values that can be saved."""

    def state(self) -> tuple[dict[str, Any], Mapping[str, Tensor]]: ...


def save(potential: _Archivable, path: str | os.PathLike[str]) -> None:
    """Write a potential to one file, atomically.

    Raises:
        UserError: the file cannot be written; an old file of that name is then untouched. Or this is no potential.
    """
    if not hasattr(potential, "state"):
        raise UserError(
            f"A model file holds one potential; got {type(potential).__name__}. Of samples or a committee save each for itself: "
            "gpmlp.save(samples[0], 'sample0.gpmlp')."
        )
    header, tensors = potential.state()
    content = {
        "archive_sha256": BLANK,
        "format": FORMAT_VERSION,
        "version": provenance.version_of("gpmlp"),
        "units": UNITS,
        "header": header,
    }
    # clones: tensors that share memory or are strided cannot be stored as they are
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    data = safetensors.torch.save(plain, metadata={"gpmlp": json.dumps(content, separators=(",", ":"))})
    match = CHECKSUM.search(data)
    if match is None:
        raise RuntimeError("safetensors wrote its metadata in an unexpected way; the checksum has no place")
    digest = hashlib.sha256(data).hexdigest().encode()
    with atomic_write(path) as file:
        file.write(data[: match.start(1)])
        file.write(digest)
        file.write(data[match.end(1) :])


def load(
    path: str | os.PathLike[str], factory: Callable[[dict[str, Any], dict[str, Tensor]], Any] | None = None
) -> Any:
    """Read a potential; needs no training data and no optimiser.

    Args:
        factory: makes the object from header and tensors; Potential.from_state if not given.

    Raises:
        UserError: there is no such file, it is not a gpmlp model, it is damaged, or a newer version wrote it.
    """
    content, data = _verified(Path(path))
    with _meaning(path):
        if factory is None:
            from gpmlp.potential.potential import Potential

            check_header(content["header"])
            factory = Potential.from_state
        return factory(content["header"], safetensors.torch.load(data))


def read_header(path: str | os.PathLike[str], potential: bool = True) -> dict[str, Any]:
    """Read format, version, units and header of a model file, whose checksum is verified.

    Args:
        potential: whether the header has to be that of a potential.
    """
    content = _verified(Path(path))[0]
    with _meaning(path):
        if potential:
            check_header(content["header"])
    return content


@contextmanager
def _meaning(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name the file in what is said of its content; what nobody foresaw of an altered file is said, too, not thrown."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (
        SafetensorError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        what = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: holds what no version of gpmlp writes ({type(error).__name__}: {what}).") from error


def _verified(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the JSON content and all bytes of a model file whose checksum is right."""
    check_readable(path, "a model file")
    try:
        with open(path, "rb") as file:
            content, start = _content(path, file, path.stat().st_size)
            data = start + file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error
    match = CHECKSUM.search(data)
    digest = hashlib.sha256(data[: match.start(1)] + BLANK.encode() + data[match.end(1) :]).hexdigest() if match else ""
    if match is None or digest != match[1].decode():
        raise UserError(
            f"{path}: the model file is damaged or was altered (its checksum does not fit); fetch or fit it again."
        )
    return content, data


def _content(path: Path, file: IO[bytes], length: int) -> tuple[dict[str, Any], bytes]:
    """The JSON text in the metadata, without trusting it, and the bytes read for that; the rest is as long as these say."""
    start = file.read(9)
    size = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:] != b"{":
        raise UserError(f"{path}: is {'not a gpmlp model file' if start else 'empty'}.")
    if 8 + size > length:
        raise UserError(f"{path}: the model file is damaged: it is cut off within its header, after {length} bytes.")
    if size > LONGEST_HEADER:
        raise UserError(f"{path}: the model file is damaged: its header claims {size} bytes.")
    start += file.read(size - 1)
    try:
        outer = _json(start[8:])
        metadata = outer.pop("__metadata__", {})
        ends = [entry["data_offsets"][1] for entry in outer.values()]
        needed = 8 + size + max(ends, default=0)
        if needed > length:
            raise UserError(
                f"{path}: the model file is cut off: {length} of {needed} bytes are there; fetch or fit it again."
            )
        if needed < length:
            raise UserError(f"{path}: the model file is damaged or was altered: {length - needed} bytes are too many.")
        if "gpmlp" not in metadata:
            raise UserError(f"{path}: holds tensors (safetensors) but is not a gpmlp model file.")
        content = _json(metadata["gpmlp"])
        if not isinstance(content, dict) or "format" not in content or "header" not in content:
            raise UserError(f"{path}: the model file is damaged: its header lacks the format or the model.")
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: the model file is damaged: its header cannot be read ({error}).") from error
    _check_format(path, content)
    return content, start


def _check_format(path: Path, content: dict[str, Any]) -> None:
    number, version = content["format"], content.get("version")
    if type(number) is not int or number < 1 or not isinstance(version, str):
        raise UserError(f"{path}: the model file is damaged: its format is {number!r}, its version {version!r}.")
    if number > FORMAT_VERSION:
        raise UserError(
            f"{path}: is of format {number}, written by gpmlp {version}; this version reads formats up to {FORMAT_VERSION}. Upgrade "
            "gpmlp (pip install --upgrade gpmlp)."
        )
    if content.get("units") != UNITS:
        raise UserError(f"{path}: its units are {content.get('units')!r}; this version reads {UNITS!r} only.")


def _json(text: bytes | str) -> Any:
    """JSON in which a key is given once."""

    def whole(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) < len(pairs):
            raise ValueError(f"a key is given twice among {', '.join(map(repr, list(out)[:5]))}")
        return out

    return json.loads(text, object_pairs_hook=whole)
