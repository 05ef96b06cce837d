"""The command `gpmlp check`: findings about the labels of files, before anything is fitted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from gpmlp.core.findings import SEVERITIES, Finding

Keys = Annotated[
    str | None,
    typer.Option(
        "--keys",
        help="Names of labels in the files, where they are not to be found out: energy=REF_energy,forces=REF_forces,stress=none.",
    ),
]


def check_command(
    data: Annotated[list[Path], typer.Argument(help="Labelled data: extended XYZ, or any format of ASE.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    keys: Keys = None,
) -> None:
    """Check labels against one another: contradictions, units, signs, references, outliers.

    Findings are no failure of the command: it exits with 0 unless a file cannot be read. `--json` counts them by severity.
    """
    from gpmlp.cli import console
    from gpmlp.io import ase_atoms
    from gpmlp.io.label_checks.stage import check, sort_findings
    from gpmlp.io.label_names import parse_keys
    from gpmlp.io.structure_files import find_files

    files = find_files(data)
    with console.StageBars() as stages:
        read = ase_atoms.read_labelled(files, keys=parse_keys(keys or ""), progress=stages)
    structures = read.structures
    findings = sort_findings([*read.findings, *check(structures, read.targets)])
    if as_json:
        content = {
            "files": [str(path) for path in files],
            "n_structures": len(structures),
            "n_atoms": structures.n_atoms,
            "counts": count_severities(findings),
            "findings": [finding.as_dict() for finding in findings],
        }
        typer.echo(json.dumps(content, indent=2, allow_nan=False))
        return
    out = console.standard_output()
    if findings:
        out.print(console.findings_table(findings))
    counts = count_severities(findings)
    numbers = ", ".join(f"{n} {severity}{'s' * (n != 1)}" for severity, n in counts.items())
    console.print_line(f"{len(structures)} structures, {structures.n_atoms} atoms: {numbers}")


def count_severities(findings: tuple[Finding, ...]) -> dict[str, int]:
    """Number of findings of each severity."""
    counts = Counter(finding.severity for finding in findings)
    return {severity: counts[severity] for severity in SEVERITIES}
