"""The command `gpmlp export`: a model file in the form that other programs load."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Engine(StrEnum):
    """What a model can be written for."""

    lammps = "lammps"
    kim = "kim"


class Mean(StrEnum):
    """Forms of a mean (gpmlp.recipe.MEANS)."""

    exact = "exact"
    low_rank = "low_rank"


class Precision(StrEnum):
    """Of descriptors."""

    float64 = "float64"
    float32 = "float32"


def export_command(
    model: Annotated[Path, typer.Argument(help="Model file written by `gpmlp fit`.")],
    engine: Annotated[Engine, typer.Option("--to", help="What the file is for.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write; for KIM a folder, which names the model.")
    ],
    mean: Annotated[
        Mean | None, typer.Option("--mean", help="Form of the mean; if not given, that of the model.")
    ] = None,
    descriptors: Annotated[
        Precision | None, typer.Option("--descriptors", help="Precision of the descriptors; float32 is faster.")
    ] = None,
) -> None:
    """Write a model for an engine: for LAMMPS the file that pair_coeff of pair_style gpmlp reads, for KIM a portable model."""
    from gpmlp.cli import console
    from gpmlp.engines.kim import export_kim
    from gpmlp.io import archive, provenance
    from gpmlp.io.export import export_model
    from gpmlp.io.files import check_apart, check_target

    if engine is Engine.lammps:
        check_target(output, "the exported model")
    check_apart({"the exported model (--output)": output}, {"the model": model})
    potential = archive.load(model)
    if mean or descriptors:
        potential = potential.to(mean=mean and mean.value, descriptors=descriptors and descriptors.value)
    if engine is Engine.kim:
        command = export_kim(potential, output, provenance.file_hash(model))
        console.print_line(f"wrote {output}; to compile and install it: {command}")
        return
    export_model(potential, output, provenance.file_hash(model))
    console.print_line(f"wrote {output}")
    if potential.outer_baselines and potential.variances is not None:
        console.print_line(
            "sigma is that of what was learned: it holds no uncertainty of the C6 of the dispersion tail"
        )
