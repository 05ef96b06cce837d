"""Provenance is where a model came from: the files it was trained on with their hashes, versions, and when."""

from __future__ import annotations

import hashlib
import os
import warnings
from datetime import UTC, datetime
from pathlib import Path

from gpmlp import versions
from gpmlp.checks import DataWarning, UserError


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of the bytes of a file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error


def of_files(**files: str | os.PathLike[str] | None) -> dict:
    """Provenance of a fit, e.g. of_files(training='train.xyz', validation=None)."""
    known = {role: path for role, path in files.items() if path is not None}
    return {
        "files": {role: {"name": Path(path).name, "sha256": file_hash(path)} for role, path in known.items()},
        "versions": versions.everything(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def trained_on(provenance: dict, path: str | os.PathLike[str]) -> bool:
    """Whether a model was trained on a file of these very bytes; if so, with a warning."""
    if provenance.get("files", {}).get("training", {}).get("sha256") != file_hash(path):
        return False
    text = f"{path}: is the file this model was trained on; its errors say nothing of new structures."
    warnings.warn(text, DataWarning, stacklevel=2)
    return True
