"""A dispersion tail in fit and prediction: argon, whose labels are of a Lennard-Jones potential to 40 A, fitted with a short cutoff.

    OMP_NUM_THREADS=1 python tests/benchmarks/dispersion.py [--cutoff 4.6] [--c6 learned] [--json dispersion.json]

Training data: 24 strained and rattled cells of 4 atoms, 6 slabs of 16 and 2 cells nearly at rest. One line of JSON for each of the fits,
without a tail, with the C6 of the truth (64.3 eV A^6), with that of free atoms (38.4, which is not that of these labels) and with a learned
one: errors of the cohesive energy (meV/atom) and pressure (GPa) of crystals at lattice constants of 5.0 to 5.6 A, and what two slabs of 16
atoms say of each other at gaps of 6 to 10 A, less what they say at 12 A, as a share of the truth.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import ase
import ase.build
import numpy as np
import torch

import gpmlp
from gpmlp.core import neighbors
from gpmlp.core.quantities import Prediction, Targets
from gpmlp.core.structures import Structures
from gpmlp.core.units import GPA
from gpmlp.io.ase_atoms import structures_from_ase

EPSILON, SIGMA, REACH = 0.0104, 3.40, 40.0  # eV, A
CELL = 5.26  # A
GAPS = 6.0, 8.0, 10.0, 12.0  # A
C6 = {"none": None, "true": {"Ar-Ar": 4 * EPSILON * SIGMA**6}, "free_atoms": "free_atoms", "learned": "learned"}


def truth(structures: Structures) -> Prediction:
    """The Lennard-Jones potential, one structure after another: there are many pairs."""
    parts = []
    for i in range(len(structures)):
        one = structures.select([i])
        pairs = neighbors.find_neighbors(one, REACH)
        vectors = pairs.vectors(one)
        r = vectors.norm(dim=1)
        x = (SIGMA / r) ** 6
        energies, slopes = 4 * EPSILON * (x * x - x), 4 * EPSILON * (6 * x - 12 * x * x) / r
        local = one.positions.new_zeros(one.n_atoms).index_add(0, pairs.centers, 0.5 * energies)
        parts.append(neighbors.assemble_prediction(one, pairs, vectors, local, (0.5 * slopes / r)[:, None] * vectors))
    return Prediction.concatenate(parts)


def training() -> tuple[Structures, Targets]:
    """Crystals and slabs with their labels."""
    rng, atoms = np.random.default_rng(0), []
    for seed in range(24):
        cell = ase.build.bulk("Ar", "fcc", CELL * (0.94 + 0.12 * rng.random()), cubic=True)
        cell.set_cell(cell.cell.array @ (np.eye(3) + 0.03 * rng.standard_normal((3, 3))), scale_atoms=True)
        cell.rattle(0.15, seed=seed)
        atoms.append(cell)
    for seed in range(6):
        slab = ase.build.fcc111("Ar", (2, 2, 4), a=CELL, vacuum=12.0, periodic=True)
        slab.rattle(0.12, seed=seed)
        atoms.append(slab)
    for seed in range(2):
        atoms.append(ase.build.bulk("Ar", "fcc", CELL, cubic=True))
        atoms[-1].rattle(0.02, seed=seed)
    structures = structures_from_ase(atoms)
    right = truth(structures)
    nothing = vars(Targets.unlabelled(structures))
    return structures, Targets(
        **nothing | {"energies": right.energies, "forces": right.forces, "stresses": right.stresses}
    )


def crystals() -> Structures:
    """At four lattice constants."""
    return structures_from_ase([ase.build.bulk("Ar", "fcc", a, cubic=True) for a in (5.0, 5.26, 5.4, 5.6)])


def two_slabs() -> Structures:
    """At the gaps."""
    out = []
    for gap in GAPS:
        lower = ase.build.fcc111("Ar", (2, 2, 4), a=CELL, vacuum=0)
        upper = lower.copy()
        upper.positions[:, 2] += np.ptp(lower.positions[:, 2]) + gap
        both = lower + upper
        both.cell[2, 2], both.pbc = 80.0, True
        out.append(both)
    return structures_from_ase(out)


def measure(name: str, cutoff: float, data: tuple[Structures, Targets]) -> dict:
    """A line of the table."""
    tail = C6[name]
    recipe = {
        "descriptor": {"cutoff": cutoff},
        "inducing": {"n": 60, "gradients": 3},
        "baseline": {"isolated_atoms": {"Ar": 0.0}, "zbl": False},
        "calibration": False,
        "novelty": False,
        "variance": False,
    }
    if tail is not None:
        recipe["long_range"] = {"dispersion": {"r6": {"outer": 25.0, "c6": tail}}}
    potential, _ = gpmlp.fit(*data, gpmlp.Recipe.model_validate(recipe))
    line: dict = {"c6": name, "cutoff_A": cutoff}
    for baseline in potential.outer_baselines:
        line["c6_eV_A6"] = baseline.state()["pairs"][0][2]
    bulk, right = potential(crystals()), truth(crystals())
    atoms = crystals().counts
    pressure = (bulk.stresses - right.stresses).diagonal(dim1=1, dim2=2).mean(1) / GPA
    line["cohesive_energy_error_meV_per_atom"] = 1e3 * float(((bulk.energies - right.energies) / atoms).abs().mean())
    line["pressure_error_GPa"] = float(pressure.abs().mean())
    found, expected = potential(two_slabs()).energies, truth(two_slabs()).energies
    found, expected = found[:-1] - found[-1], expected[:-1] - expected[-1]
    line["slab_interaction_meV"] = (1e3 * found).tolist()
    line["of_the_truth"] = (found / expected).tolist()
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cutoff", type=float, default=4.6)
    parser.add_argument("--c6", nargs="+", choices=tuple(C6), default=list(C6))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    data = training()
    lines = []
    for name in given.c6:
        lines.append(measure(name, given.cutoff, data))
        print(json.dumps(lines[-1]), flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
