"""Provenance is where a model came from: the files it was trained on with their hashes, versions, and when."""

from __future__ import annotations

import hashlib
import os
import platform
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from gpmlp.core.errors import DataWarning, UserError
from gpmlp.core.structures import Structures, count_matches

NOT_INSTALLED = "not installed"
PACKAGES = (
    "gpmlp",
    "torch",
    "gpytorch",
    "linear_operator",
    "numpy",
    "scipy",
    "ase",
    "vesin",
    "numba",
    "sphericart-torch",
    "dscribe",
)


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of the bytes of a file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error


def file_provenance(**files: str | os.PathLike[str] | None) -> dict:
    """Provenance of a fit, e.g. of_files(training='train.xyz', validation=None)."""
    known = {role: path for role, path in files.items() if path is not None}
    return {
        "files": {role: {"name": Path(path).name, "sha256": file_hash(path)} for role, path in known.items()},
        "versions": installed_versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@dataclass(frozen=True)
class DataOverlap:
    """What a model knows already of data that it is held against.

    Attributes:
        training: whether it was trained on a file of these very bytes.
        held_out: how many of the structures are those from which its calibration was learned (and then the model).
    """

    training: bool
    held_out: int


def check_overlap(
    provenance: dict, calibrated_on: dict, structures: Structures, path: str | os.PathLike[str]
) -> DataOverlap:
    """Whether a model has seen data before; if so, with a warning.

    Args:
        provenance: of the model; calibrated_on: Calibration.source.
        structures: as read from the file `path`.
    """
    training = provenance.get("files", {}).get("training", {}).get("sha256") == file_hash(path)
    found = DataOverlap(training, count_matches(structures.fingerprints(), calibrated_on.get("fingerprints", ())))
    if training:
        text = f"{path}: is the file this model was trained on; its errors say nothing of new structures."
        warnings.warn(text, DataWarning, stacklevel=2)
    elif found.held_out:
        text = (
            f"{path}: {found.held_out} of {len(structures)} structures are among those from which this model learned how large its "
            "errors are, and then learned from; there may be others of its training set. Its errors and error bars say less of new "
            "structures than they seem to."
        )
        warnings.warn(text, DataWarning, stacklevel=2)
    return found


def version_of(package: str) -> str:
    """Version of an installed package; 'not installed' for one that is not (gpmlp itself run from its sources)."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED


def installed_versions() -> dict[str, str]:
    """Versions of Python, gpmlp and what it stands on."""
    return {"python": platform.python_version()} | {package: version_of(package) for package in PACKAGES}
