"""The command `gpmlp partition`: which atoms of a structure need the quantum code, as arrays for QM/MM."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from gpmlp.properties.partition import Partition


def partition_command(
    model: Annotated[Path, typer.Argument(help="Model file written by `gpmlp fit`.")],
    structure: Annotated[Path, typer.Argument(help="Structure, in any format of ASE; of a trajectory, every frame.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, extended XYZ.")],
    fraction: Annotated[
        float | None,
        typer.Option("--fraction", help="Share of the atoms that the region is to have; if nothing is given 0.1."),
    ] = None,
    atoms: Annotated[int | None, typer.Option("--atoms", help="Number of atoms that the region is to have.")] = None,
    sigma: Annotated[
        float | None, typer.Option("--sigma", help="Standard deviation of a force, eV/A, from which an atom is in.")
    ] = None,
    buffer: Annotated[
        float | None,
        typer.Option("--buffer", help="Width of the buffer around the region, A; if not given the model's cutoff."),
    ] = None,
    cut_molecules: Annotated[
        bool, typer.Option("--cut-molecules", help="Take atoms one by one; else molecules are in as a whole.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write, indices and shares.")] = None,
) -> None:
    """Say which atoms need the quantum code, by the calibrated standard deviations of their forces, and mark them for QM/MM.

    Arrays: qm_region (1 region, 2 buffer, 0 rest: hybrid_mark of QUIP), region (QM, buffer, MM: ForceQMMM of ASE), force_sigma (eV/A).
    """
    from gpmlp.cli import console
    from gpmlp.io import archive, ase_atoms
    from gpmlp.io.files import atomic_write, check_apart, check_target
    from gpmlp.properties.partition import RegionRule, partition

    rule = RegionRule(fraction, atoms, sigma, buffer, not cut_molecules)
    targets = {"the marked structures (--output)": output, "the numbers (--json)": json_file}
    for path in filter(None, targets.values()):
        check_target(path)
    check_apart(targets, {"the model": model, "the structure": structure})
    potential = archive.load(model)
    frames, structures = ase_atoms.read_unlabelled(structure)
    found = []
    with console.StageBars() as stages:
        for i in range(len(structures)):
            stages("partition", i, len(structures), "frames")
            found.append(partition(potential, structures.select([i]), rule))
        stages("partition", len(structures), len(structures), "frames")
    marked = [one.marked(frame) for one, frame in zip(found, frames, strict=True)]
    ase_atoms.write_frames(output, marked)
    if json_file is not None:
        with atomic_write(json_file, text=True) as file:
            json.dump([one.as_dict() for one in found], file, indent=2, allow_nan=False)
            file.write("\n")
    larger = sum(rule.exceeded(one) for one in found)
    if larger:
        console.print_message(
            "note",
            f"{larger} of {len(found)} regions are larger than was asked for, as molecules (what covalent radii bond) are in as a whole; "
            "--cut-molecules takes atoms one by one.",
        )
    console.standard_output().print(_table(found))
    console.print_line(f"wrote {output}{f', {json_file}' if json_file is not None else ''}")


def _table(found: Sequence[Partition]) -> Table:
    """One row for each structure."""
    from rich.table import Table

    from gpmlp.cli.console import format_number, literal

    table = Table(title="Partition", title_justify="left", title_style="bold")
    table.add_column("structure")
    for heading in (
        "atoms",
        "region",
        "buffer",
        "share of squared\nerror foreseen",
        "largest σ\neV/A",
        "outside\neV/A",
    ):
        table.add_column(heading, justify="right")
    for one in found:
        numbers = one.as_dict()
        sizes = (str(numbers["atoms"]), str(len(numbers["core"])), str(len(numbers["buffer"])))
        sigmas = (format_number(float(one.force_sigma.max())), format_number(one.largest_outside))
        table.add_row(literal(one.name), *sizes, f"{100 * one.share:.1f} %", *sigmas)
    return table
