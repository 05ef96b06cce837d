"""Labels chosen for a property, with Quantum ESPRESSO as oracle: C11 and the bulk modulus of silicon before and after a few of them.

    python tests/benchmarks/property_labels.py [--labels 5] [--first 8] [--work FOLDER] [--json FILE]

The model begins with a few frames of data/silicon at 300 to 1200 K (cubic cells of 8 atoms, settings of that set) and is fitted as
exact process of all labels. Labels are chosen by gpmlp.properties.labelling and computed by pw.x; the truth is pw.x's own: energies of
seven volumes and stresses at strains of 0.5 % of the same cell, which has the same k-points.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.espresso import Espresso, EspressoProfile
from ase.calculators.singlepoint import SinglePointCalculator
from ase.eos import EquationOfState

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gpmlp
from gpmlp.core.units import GPA
from gpmlp.io.ase_atoms import from_ase
from gpmlp.properties.calculations import choose_calculations
from gpmlp.properties.compute import compute_properties, named
from gpmlp.properties.labelling import choose_labels

DATA = Path(__file__).resolve().parents[2] / "data"
WANTED = ("C11", "bulk_modulus")
RECIPE = gpmlp.Recipe.model_validate({"descriptor": {"cutoff": 5.0}, "inducing": {"functionals": "all"}})


class Oracle:
    """pw.x with the settings of data/silicon; counts its calls."""

    def __init__(self, work: Path, pseudo: str) -> None:
        self.work, self.pseudo, self.calls, self.seconds = work, pseudo, 0, 0.0

    def __call__(self, atoms: Atoms) -> Atoms:
        """A copy with energy, forces and stress."""
        began, out = time.monotonic(), atoms.copy()
        out.set_constraint()
        out.info = {}
        work = out.copy()
        work.calc = Espresso(
            profile=EspressoProfile(command="pw.x", pseudo_dir=self.pseudo), directory=self.work / f"{self.calls}",
            pseudopotentials={"Si": "Si.pbe-rrkj.UPF"}, kpts=(2, 2, 2), koffset=(1, 1, 1),
            input_data={
                "control": {"tprnfor": True, "tstress": True, "disk_io": "none"},
                "system": {"ecutwfc": 30.0, "occupations": "smearing", "smearing": "mv", "degauss": 0.01},
                "electrons": {"conv_thr": 1e-9},
            },
        )  # fmt: skip
        energy, forces, stress = work.get_potential_energy(force_consistent=True), work.get_forces(), work.get_stress()
        out.calc = SinglePointCalculator(out, energy=energy, forces=forces, stress=stress)
        self.calls, self.seconds = self.calls + 1, self.seconds + time.monotonic() - began
        return out


def truth(oracle: Oracle) -> dict[str, float]:
    """C11 and bulk modulus of the oracle, GPa."""
    edges = 5.47 * np.linspace(0.98, 1.02, 7)
    energies = [oracle(bulk("Si", a=a, cubic=True)).get_potential_energy() for a in edges]
    volume, _, modulus = EquationOfState(edges**3, energies, eos="birchmurnaghan").fit()
    stresses = []
    for strain in (0.005, -0.005):
        atoms = bulk("Si", a=volume ** (1 / 3), cubic=True)
        atoms.set_cell(atoms.cell.array @ np.diag([1 + strain, 1, 1]), scale_atoms=True)
        stresses.append(oracle(atoms).get_stress()[0])
    return {"C11": (stresses[0] - stresses[1]) / 0.01 / GPA, "bulk_modulus": modulus / GPA}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=5)
    parser.add_argument("--first", type=int, default=8)
    parser.add_argument("--pseudo", default="/usr/share/espresso/pseudo")
    parser.add_argument("--work", type=Path, help="folder for pw.x; a temporary one if not given")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    frames = ase.io.read(DATA / "silicon/train.xyz", ":")
    thermal = [a for a in frames if a.info["config_type"] == "diamond_thermal"]
    labels = thermal[:: max(1, len(thermal) // arguments.first)][: arguments.first]
    crystal = named([bulk("Si", a=5.47, cubic=True)])
    calculations = choose_calculations(crystal, ["eos", "elastic"])
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as temporary:
        oracle = Oracle(arguments.work or Path(temporary), arguments.pseudo)
        for k in range(arguments.labels + 1):
            potential = gpmlp.fit(*from_ase(labels), RECIPE)[0]
            results = compute_properties(potential, crystal, calculations)
            row: dict = {"chosen_labels": k}
            for name in WANTED:
                row |= {f"{name}_GPa": results[name].value, f"{name}_sigma_GPa": results[name].sigma}
            if k < arguments.labels:
                (choice,) = choose_labels(potential, crystal, calculations, results, WANTED, 1)
                row |= {"next": choice.atoms.info["name"], "foreseen_sigma_GPa": dict(choice.sigmas)}
                labels.append(oracle(choice.atoms))
            rows.append(row)
            print(json.dumps(row), flush=True)
        exact = truth(oracle)
    print(f"pw.x: {exact}; {oracle.calls} calls, {oracle.seconds / oracle.calls:.0f} s each")
    for name in WANTED:
        scores = ", ".join(f"{(row[f'{name}_GPa'] - exact[name]) / row[f'{name}_sigma_GPa']:+.2f}" for row in rows)
        print(f"{name}: (model - pw.x) / sigma after 0, 1, ... labels: {scores}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "pw.x_GPa": exact}, indent=1) + "\n")


if __name__ == "__main__":
    main()
