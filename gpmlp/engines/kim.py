"""Portable models of the KIM API (openkim.org): what `kim-api-collections-management install` compiles and installs.

A model is the exported file (gpmlp.io.export) and the name of its driver, which is the compiled core with gpmlp/native/kim/driver.cpp;
one driver, compiled once, serves all models of its version.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from gpmlp.core.errors import UserError
from gpmlp.io.export import export_model
from gpmlp.io.files import atomic_write, check_folder
from gpmlp.io.provenance import version_of
from gpmlp.native import library
from gpmlp.potential.dispersion import R6Tail
from gpmlp.potential.potential import Potential

SOURCES = Path(library.__file__).parent
DRIVER = f"gpmlp_driver_{library.ABI}"
INSTALL = "kim-api-collections-management install --force"


def export_kim(potential: Potential, folder: str | os.PathLike[str], source: str = "") -> str:
    """Write a portable model, named as the folder, and its driver, each into a folder in this one.

    Args:
        source: hash of the model file that it comes from.

    Returns:
        The command that compiles and installs both for this user.

    Raises:
        UserError: see export_model; a name that KIM does not take; a dispersion tail.
    """
    folder = Path(folder)
    check_folder(folder)
    name = folder.resolve().name
    if not (name.isidentifier() and name.isascii()) or name == DRIVER:
        raise UserError(
            f"{folder}: KIM names the model as this folder: letters, digits and _ only, a letter first, and not {DRIVER}."
        )
    if any(isinstance(baseline, R6Tail) for baseline in potential.baselines):
        raise UserError(
            "This model has a dispersion tail, which the model driver for KIM does not compute: use pair_style gpmlp in LAMMPS (gpmlp "
            "export --to lammps), or ASE."
        )
    model, driver = folder / name, folder / DRIVER
    for made in (model, driver):
        made.mkdir(parents=True, exist_ok=True)
    mean = replace(potential, variances=None, novelty=None)  # KIM has no place for more
    export_model(mean, model / f"{name}.export", source)
    _fill("model.cmake", model, {"NAME": name, "DRIVER": DRIVER, "FILE": f"{name}.export"})
    _fill("driver.cmake", driver, {"NAME": DRIVER, "VERSION": version_of("gpmlp")})
    for path in (SOURCES / "kim/driver.cpp", *(SOURCES / "src").glob("*.hpp")):
        with atomic_write(driver / path.name) as file:
            file.write(path.read_bytes())
    return f"{INSTALL} user {driver} {model}"


def _fill(template: str, folder: Path, values: dict[str, str]) -> None:
    """Write CMakeLists.txt from a template with @NAME@s."""
    text = (SOURCES / "kim" / template).read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    with atomic_write(folder / "CMakeLists.txt", text=True) as file:
        file.write(text)
