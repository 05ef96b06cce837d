"""Print which lines of gpmlp ran, as the files in a folder have it (sitecustomize.py), by coverage.py with the settings of setup.cfg.

python tests/line_coverage/report.py FOLDER; it ends with an error where less ran than `fail_under` of setup.cfg.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import coverage


def main(folder: Path) -> tuple[float, float]:
    """Print the report; the share of lines that ran, and the least that is allowed, %."""
    package = Path(importlib.util.find_spec("gpmlp").origin).parent
    settings = Path(__file__).resolve().parents[2] / "setup.cfg"
    os.chdir(package.parent)  # names in the report start there
    measured = coverage.Coverage(data_file=None, config_file=settings)
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        if name.rpartition(".")[2].startswith("_"):  # as sitecustomize.py has it
            continue
        file = folder / f"{name}.lines"
        ran = [line for line, mark in enumerate(file.read_bytes()) if mark] if file.exists() else []
        measured.get_data().add_lines({str(path): ran})
    total = measured.report()
    return total, measured.get_option("report:fail_under")


if __name__ == "__main__":
    total, floor = main(Path(sys.argv[1]).resolve())
    if total < floor:
        sys.exit(f"{total:.2f} % of the lines ran in the tests, fewer than fail_under of setup.cfg, {floor} %")
