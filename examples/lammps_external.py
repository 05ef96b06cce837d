"""How do I run a potential in LAMMPS where nothing can be compiled?

LAMMPS' Python package asks gpmlp at each step (fix external, one process). A silicon crystal at constant pressure is heated until the
standard deviation of some atom's energy is larger than a limit.
"""

from pathlib import Path

import gpmlp
from gpmlp.engines.lammps_external import ExternalPotential, open_lammps

DATA = Path(__file__).resolve().parents[1] / "data/silicon"
LIMIT = 0.2  # eV

potential, _ = gpmlp.fit(*gpmlp.read(DATA / "train.xyz", "::4"), gpmlp.Recipe(inducing={"n": 50, "gradients": 2}))

lmp = open_lammps("-log", "none", "-screen", "none")
lmp.commands_string("""
    units metal
    lattice diamond 5.47
    region box block 0 2 0 2 0 2
    create_box 1 box
    create_atoms 1 box
    mass 1 28.0855
    velocity all create 600 1
    comm_modify cutoff 2.0
    fix bath all npt temp 300 3000 0.05 iso 0 0 1
    thermo_style custom step temp pe press vol
""")
ExternalPotential(lmp, potential, ["Si"], uncertainty="atom_energies")
lmp.commands_string(f"variable std equal f_gpmlp[1]\nfix stop all halt 1 v_std > {LIMIT} error soft")
for end in range(50, 501, 50):
    lmp.command(f"run {end} upto start 0 stop 500")
    step, temperature, volume = (lmp.get_thermo(name) for name in ("step", "temp", "vol"))
    std = lmp.extract_variable("std")
    print(f"{step:.0f} fs, {temperature:.0f} K: {volume / 64:.2f} A^3/atom, largest std {1e3 * std:.0f} meV")
    if std > LIMIT:
        break
