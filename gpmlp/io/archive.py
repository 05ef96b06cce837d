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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from gpmlp.core.errors import UserError
from gpmlp.io import provenance
from gpmlp.io.files import atomic_write

FORMAT_VERSION = 2  # 2: posterior factor, calibration and novelty besides the mean
UNITS = "eV, angstrom, atomic mass units; stress eV/angstrom^3, positive = tension"
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
    if factory is None:
        from gpmlp.potential.potential import Potential

        factory = Potential.from_state
    content, data = _verified(Path(path))
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise UserError(f"{path}: the model file is damaged: {error}.") from error
    return factory(content["header"], tensors)


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read format, version, units and header of a model file. The whole file is verified."""
    return _verified(Path(path))[0]


def _verified(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the JSON content and all bytes of a model file whose checksum is right."""
    if path.is_dir() or not path.exists():
        raise UserError(
            f"{path}: there is no such file." if not path.exists() else f"{path}: is a folder, not a model file."
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error
    content = _content(path, data)
    version = content.get("format")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"{path}: is of format {version}, written by gpmlp {content.get('version')}; this version reads formats up to "
            f"{FORMAT_VERSION}. Upgrade gpmlp (pip install --upgrade gpmlp)."
        )
    match = CHECKSUM.search(data)
    digest = hashlib.sha256(data[: match.start(1)] + BLANK.encode() + data[match.end(1) :]).hexdigest() if match else ""
    if match is None or digest != match[1].decode():
        raise UserError(
            f"{path}: the model file is damaged or was altered (its checksum does not fit); fetch or fit it again."
        )
    return content, data


def _content(path: Path, data: bytes) -> dict[str, Any]:
    """Parse the JSON text in the metadata, without trusting it."""
    size = int.from_bytes(data[:8], "little")
    looks_right = len(data) > 8 and data[8:9] == b"{"
    if not looks_right:
        raise UserError(f"{path}: is {'empty' if not data else 'not a gpmlp model file'}.")
    if 8 + size > len(data):
        raise UserError(f"{path}: the model file is damaged: it is cut off within its header, after {len(data)} bytes.")
    try:
        outer = json.loads(data[8 : 8 + size])
        metadata = outer.pop("__metadata__", {})
        ends = [entry["data_offsets"][1] for entry in outer.values()]
        if 8 + size + max(ends, default=0) > len(data):
            needed = 8 + size + max(ends)
            raise UserError(
                f"{path}: the model file is cut off: {len(data)} of {needed} bytes are there; fetch or fit it again."
            )
        if "gpmlp" not in metadata:
            raise UserError(f"{path}: holds tensors (safetensors) but is not a gpmlp model file.")
        content = json.loads(metadata["gpmlp"])
        if not isinstance(content, dict) or "format" not in content or "header" not in content:
            raise UserError(f"{path}: the model file is damaged: its header lacks the format or the model.")
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: the model file is damaged: its header cannot be read ({error}).") from error
    return content
