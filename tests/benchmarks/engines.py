"""Steps of dynamics in several engines, each in turn with ASE's: rattled diamond at constant energy, one core.

python tests/benchmarks/engines.py --work ../benchmark [--cells 4] [--columns 1000] [--zeta 2] [--engines ase kim ...]

Prints microseconds an atom and step, least and median, and how many times as long as in ASE (quartiles of the rounds). An engine that
is not installed is left out. LAMMPS with the plugin and with KIM are programs of their own, whose loop time is taken.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import ase.io
import bursts
import common
import numpy as np
import speed_cases
import torch
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet

from gpmlp.core.errors import UserError
from gpmlp.engines import kim
from gpmlp.engines.ase import GPCalculator
from gpmlp.engines.lammps import build_plugin, find_lammps
from gpmlp.engines.lammps_external import ExternalPotential, open_lammps
from gpmlp.io.export import export_model
from gpmlp.potential.potential import Potential

STEPS = 10  # of a call
LOOP = 50  # steps of a LAMMPS that is started for each burst
DEBIAN = Path("/usr/bin/lmp")  # has the package KIM
TEMPERATURE = 600.0  # K

Engine = Callable[[Potential, Atoms, Path], bursts.Burst]


def in_ase(potential: Potential, atoms: Atoms, work: Path) -> bursts.Burst:
    atoms.calc = GPCalculator(potential)
    dynamics = VelocityVerlet(atoms, units.fs)
    return bursts.of(lambda: dynamics.run(STEPS))


def fix_external(potential: Potential, atoms: Atoms, work: Path) -> bursts.Burst:
    lmp = open_lammps("-log", "none", "-screen", "none")
    lx, ly, lz = atoms.cell.lengths()
    lmp.commands_string(f"""
        units metal
        atom_modify map array
        region box block 0 {lx} 0 {ly} 0 {lz} units box
        create_box 1 box
        mass 1 {atoms.get_masses()[0]}
        comm_modify cutoff 2.0
        timestep 0.001
        fix 1 all nve
    """)
    n, positions = len(atoms), atoms.get_positions(wrap=True)
    velocities = atoms.get_velocities() * 1e3 * units.fs
    lmp.create_atoms(n, range(1, n + 1), [1] * n, positions.ravel().tolist(), velocities.ravel().tolist())
    ExternalPotential(lmp, potential, [atoms.symbols[0]])
    lmp.command("run 0 post no")
    return bursts.of(lambda: lmp.command(f"run {STEPS} pre no post no"))


def plugin(potential: Potential, atoms: Atoms, work: Path) -> bursts.Burst:
    lammps, made = find_lammps(), (work / "gpmlp_plugin.so").resolve()
    if not made.exists():
        build_plugin(lammps.executable, made)
    export_model(potential, work / "model.export")
    commands = f"pair_style gpmlp\npair_coeff * * model.export {atoms.symbols[0]}"
    before = f"plugin load {made}\nunits metal"
    return started(lammps.executable, lammps.environment, before, commands, atoms, work)


def by_kim(potential: Potential, atoms: Atoms, work: Path) -> bursts.Burst:
    folders = {f"KIM_API_{kind}_DIR": work / kind for kind in ("MODEL_DRIVERS", "PORTABLE_MODELS", "SIMULATOR_MODELS")}
    environment = {name: str(folder.resolve()) for name, folder in folders.items()}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    command = kim.export_kim(potential, work / "benchmark").replace(" user ", " environment ").split()
    subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.DEVNULL)
    commands = f"kim interactions {atoms.symbols[0]}"
    return started(DEBIAN, environment, "kim init benchmark metal", commands, atoms, work)


def started(
    executable: Path, environment: dict[str, str], before: str, after: str, atoms: Atoms, work: Path
) -> bursts.Burst:
    """Commands before and after the atoms are there; each burst is a run of a new process."""
    ase.io.write(work / "atoms.data", atoms, format="lammps-data", masses=True, velocities=True)
    script = work / f"in.{executable.parent.name}"
    script.write_text(f"{before}\nread_data atoms.data\n{after}\nfix 1 all nve\ntimestep 0.001\nrun 0\nrun {LOOP}\n")
    command, environment = [executable, "-in", script.name, "-log", "none"], environment | {"OMP_NUM_THREADS": "1"}

    def run(_: float) -> list[float]:
        done = subprocess.run(
            command, cwd=work, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True
        )
        return [float(re.findall(r"Loop time of (\S+)", done.stdout)[-1]) * STEPS / LOOP]

    return run


def openmm(potential: Potential, atoms: Atoms, work: Path) -> bursts.Burst:
    import openmm as mm

    atoms.calc, ev = GPCalculator(potential), units.mol / units.kJ

    def compute(state):
        atoms.set_positions(state.getPositions(asNumpy=True) / mm.unit.angstrom)
        return ev * atoms.get_potential_energy(), 10 * ev * atoms.get_forces()

    system = mm.System()
    system.setDefaultPeriodicBoxVectors(*(0.1 * atoms.cell.array))
    for mass in atoms.get_masses():
        system.addParticle(mass)
    system.getForce(system.addForce(mm.PythonForce(compute))).setUsesPeriodicBoundaryConditions(True)
    context = mm.Context(system, mm.VerletIntegrator(0.001), mm.Platform.getPlatform("Reference"))
    context.setPositions(0.1 * atoms.positions)
    context.setVelocitiesToTemperature(TEMPERATURE, 1)
    return bursts.of(lambda: context.getIntegrator().step(STEPS))


ENGINES: dict[str, Engine] = {
    "ase": in_ase,
    "plugin": plugin,
    "kim": by_kim,
    "fix_external": fix_external,
    "openmm": openmm,
}


def warm(cells: int) -> Atoms:
    """Rattled diamond with velocities."""
    atoms, rng = speed_cases.silicon_atoms(cells), np.random.default_rng(0)
    spread = np.sqrt(atoms.get_masses() * units.kB * TEMPERATURE)
    atoms.set_momenta(spread[:, None] * rng.standard_normal((len(atoms), 3)))
    return atoms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of models, which are fitted once")
    for name, default in {"cells": 4, "columns": 1000, "zeta": 2, "rounds": 12}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each engine in a round")
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    potential = speed_cases.silicon_case(options.cells, options.columns, options.work).potential(options.zeta)
    runs, atoms = {}, warm(options.cells)
    with bursts.pinned(bursts.cores()[0]):
        for name in ["ase", *(name for name in options.engines if name != "ase")]:
            try:
                runs[name] = ENGINES[name](potential, atoms.copy(), options.work)
            except (ImportError, OSError, UserError) as error:
                print(f"{name} is left out: {error}")
        times = bursts.in_turn(runs, options.rounds, options.seconds)
    per_step = 1e6 / STEPS / len(atoms)
    found = {
        name: {"us": [per_step * t.least, per_step * t.median], "ratio": vars(t.over(times["ase"]))}
        for name, t in times.items()
    }
    rows = [[name, *(f"{v:.1f}" for v in one["us"]), str(bursts.Spread(**one["ratio"]))] for name, one in found.items()]
    print(
        f"us an atom and step, least and median; times ASE (quartiles of {options.rounds} rounds); {len(atoms)} atoms"
    )
    print(common.table(rows, ["", "least", "median", "ratio"]))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
