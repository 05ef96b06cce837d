"""LAMMPS with pair_style gpmlp: rattled diamond at constant energy, in turn with ASE's calculator, and on several processes.

python tests/benchmarks/lammps.py --work ../benchmark [--cells 8] [--columns 1000] [--steps 20] [--rounds 5]

Prints microseconds an atom and step (least of the rounds), and how many times as long as others of the same round (median), for zeta 2:
the ASE calculator, LAMMPS on one process, with standard deviations of local energies and novelty at each step, and on two processes.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import ase.io
import common
import engines
import speed_cases
import torch
from ase import units
from ase.md.verlet import VelocityVerlet

from gpmlp.engines.ase import GPCalculator
from gpmlp.engines.lammps import build_plugin, find_lammps
from gpmlp.io.export import export_model

INPUT = """plugin load {folder}/gpmlp_plugin.so
units metal
read_data {folder}/data
velocity all create 600 1
pair_style gpmlp
pair_coeff * * {folder}/model Si
timestep 0.001
fix 1 all nve
{errors}
run 2
run {steps}
"""
ERRORS = "fix errors all pair 1 gpmlp sigma 1 novelty 1"


def lammps(folder: Path, steps: int, errors: str, ranks: int) -> float:
    """Seconds of a step."""
    found, script = find_lammps(), folder / f"in.{ranks}"
    script.write_text(INPUT.format(folder=folder, steps=steps, errors=errors))
    launcher = next(p / "bin/mpiexec" for p in found.executable.parents if (p / "bin/mpiexec").is_file())
    command = [launcher, "-n", str(ranks), found.executable, "-in", script, "-log", "none"]
    environment = os.environ | found.environment | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=True)
    return float(re.findall(r"Loop time of (\S+)", done.stdout)[-1]) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of models, which are fitted once")
    for name, default in {"cells": 8, "columns": 1000, "steps": 20, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    potential = speed_cases.silicon_case(options.cells, options.columns, options.work).potential(2)
    atoms = engines.warm(options.cells)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_plugin(output=folder / "gpmlp_plugin.so")
        export_model(potential, folder / "model")
        ase.io.write(folder / "data", atoms, format="lammps-data", masses=True)
        atoms.calc = GPCalculator(potential)
        dynamics = VelocityVerlet(atoms, units.fs)
        dynamics.run(2)

        def in_ase() -> float:
            begun = time.perf_counter()
            dynamics.run(options.steps)
            return (time.perf_counter() - begun) / options.steps

        runs: dict[str, Callable[[], float]] = {"ASE calculator": in_ase}
        cases = {"LAMMPS": ("", 1), "LAMMPS, sigma and novelty": (ERRORS, 1), "LAMMPS, 2 processes": ("", 2)}
        for label, (errors, ranks) in cases.items():
            if not errors or (potential.variances is not None and potential.novelty is not None):
                runs[label] = lambda errors=errors, ranks=ranks: lammps(folder, options.steps, errors, ranks)
        seconds = [{label: run() for label, run in runs.items()} for _ in range(options.rounds)]
    scale, rows = 1e6 / len(atoms), []
    for label in runs:
        ratio = median(found[label] / found["ASE calculator"] for found in seconds)
        of_one = median(found[label] / found["LAMMPS"] for found in seconds)
        rows.append([label, f"{scale * min(found[label] for found in seconds):.1f}", f"{ratio:.2f}", f"{of_one:.2f}"])
    print(f"{len(atoms)} atoms, {options.columns} inducing values, {options.rounds} rounds")
    print(common.table(rows, ["", "us an atom and step", "times ASE", "times one process"]))


if __name__ == "__main__":
    main()
