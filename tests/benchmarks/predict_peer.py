"""Errors of a GAP on reference data, computed by QUIP; run by the Python of an environment that has quippy-ase.

python predict_peer.py gap.xml test.xyz errors.json
"""

import json
import sys

import ase.io
import numpy as np
from quippy.potential import Potential

BOX = 60.0  # A, around structures without a cell; the same as in training (common.py)


def main(model: str, data: str, output: str) -> None:
    calculator = Potential("IP GAP", param_filename=model)
    energies, forces = [], []
    for atoms in ase.io.iread(data, ":"):
        energy = atoms.get_potential_energy(force_consistent="free_energy" in atoms.calc.results)
        force = atoms.get_forces()
        if atoms.cell.rank < 3:
            atoms.set_cell([BOX] * 3)
        atoms.calc = calculator
        energies.append((atoms.get_potential_energy() - energy) / len(atoms))
        forces.append((atoms.get_forces() - force).ravel())
    out = {}
    for key, unit, values in (
        ("energy", "meV_per_atom", np.array(energies)),
        ("force", "meV_per_A", np.concatenate(forces)),
    ):
        out[f"{key}_mae_{unit}"] = 1e3 * float(np.abs(values).mean())
        out[f"{key}_rmse_{unit}"] = 1e3 * float(np.sqrt((values**2).mean()))
    with open(output, "w", encoding="utf-8") as file:
        json.dump(out, file, indent=2)


if __name__ == "__main__":
    main(*sys.argv[1:])
