"""LAMMPS with pair_style gpmlp: rattled diamond at constant energy, in turn with ASE's calculator, and on several processes.

python tests/benchmarks/speed_lammps.py --work ../benchmark [--cells 8] [--columns 1000] [--steps 20] [--rounds 5]

Prints microseconds an atom and step (least of the rounds), and how many times as long as others of the same round (median), for zeta 2:
the ASE calculator, LAMMPS on one process, with standard deviations of local energies and novelty every ten steps, at each step, and at each
step from fewer columns, with a dispersion tail to 25 A, and on two processes.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
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
from gpmlp.potential.dispersion import R6Tail
from gpmlp.potential.potential import Potential

INPUT = """plugin load {folder}/gpmlp_plugin.so
units metal
read_data {folder}/data
velocity all create 600 1
pair_style gpmlp
pair_coeff * * {folder}/{model} Si
timestep 0.001
fix 1 all nve
{errors}
run 2
run {steps}
"""
ERRORS = "fix errors all pair {} gpmlp sigma 1 novelty 1"
TAIL = R6Tail({(14, 14): 182.0}, begin=3.5, full=4.75, outer=25.0)  # eV A^6, about that of free atoms


def lammps(folder: Path, steps: int, every: int, model: str, ranks: int) -> float:
    """Seconds of a step; errors every so many steps, 0 for never."""
    found, script, errors = find_lammps(), folder / f"in.{ranks}", ERRORS.format(every) if every else ""
    script.write_text(INPUT.format(folder=folder, steps=steps, errors=errors, model=model))
    launcher = next(p / "bin/mpiexec" for p in found.executable.parents if (p / "bin/mpiexec").is_file())
    command = [launcher, "-n", str(ranks), found.executable, "-in", script, "-log", "none"]
    environment = os.environ | found.environment | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=True)
    return float(re.findall(r"Loop time of (\S+)", done.stdout)[-1]) / steps


def export(potential: Potential, folder: Path) -> dict[str, tuple[int, str, int]]:
    """What is run of the models that are written to the folder: errors every so many steps, model, processes."""
    export_model(potential, folder / "model")
    cases = {"LAMMPS": (0, "model", 1)}
    if potential.variances is not None and potential.novelty is not None:
        for every in (10, 1):
            cases[f"LAMMPS, sigma and novelty every {every}"] = (every, "model", 1)
        if potential.variances.reduced:
            export_model(potential.to(local_variance="reduced"), folder / "reduced")
            cases["LAMMPS, the same every 1, sigma from fewer columns"] = (1, "reduced", 1)
    export_model(replace(potential, baselines=(*potential.baselines, TAIL)), folder / "tail")
    return cases | {"LAMMPS, dispersion tail": (0, "tail", 1), "LAMMPS, 2 processes": (0, "model", 2)}


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
        cases = export(potential, folder)
        ase.io.write(folder / "data", atoms, format="lammps-data", masses=True)
        atoms.calc = GPCalculator(potential)
        dynamics = VelocityVerlet(atoms, units.fs)
        dynamics.run(2)

        def in_ase() -> float:
            begun = time.perf_counter()
            dynamics.run(options.steps)
            return (time.perf_counter() - begun) / options.steps

        runs: dict[str, Callable[[], float]] = {"ASE calculator": in_ase}
        for label, case in cases.items():
            runs[label] = lambda case=case: lammps(folder, options.steps, *case)
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
