"""Versions of gpmlp and of the packages it stands on, for model files and bug reports."""

from __future__ import annotations

import platform
from importlib import metadata

NOT_INSTALLED = "not installed"
PACKAGES = (
    "gpmlp",
    "torch",
    "gpytorch",
    "linear_operator",
    "numpy",
    "scipy",
    "ase",
    "numba",
    "sphericart-torch",
    "dscribe",
)


def of(package: str) -> str:
    """Version of an installed package; 'not installed' for one that is not (gpmlp itself run from its sources)."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED


def everything() -> dict[str, str]:
    """Versions of Python, gpmlp and what it stands on."""
    return {"python": platform.python_version()} | {package: of(package) for package in PACKAGES}
