#!/usr/bin/env python3
"""Make the alloy data set of this project: ten species, labelled by ASE's effective medium theory (EMT) in some seconds.

    python generate.py FOLDER            writes train.xyz, test.xyz, quaternary.xyz

Crystals of 32 sites (fcc) of one, two or three of seven metals in random amounts, up to three atoms of C, N and O on
octahedral sites of every other one; lengths and angles of the cell and positions at random. quaternary.xyz holds four metals
in about equal amounts, which no training frame has. EMT is smooth, has forces and stresses, and knows no magnetism or charge:
the set tests how a model scales with species, not nature (its C, N and O were made for molecules on metals).
Needs ase and numpy. Licence: CC0 1.0 (public domain dedication), the script: MIT.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from ase import Atom, Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

METALS = {
    "Al": 3.99,
    "Ni": 3.49,
    "Cu": 3.59,
    "Pd": 3.88,
    "Ag": 4.06,
    "Pt": 3.92,
    "Au": 4.06,
}  # lattice constants of EMT, A
SOLUTES = ("C", "N", "O")
FRAMES = {"train": 150, "test": 60, "quaternary": 60}
STRAIN, SHAKEN = 0.03, (0.02, 0.2)  # of the cell; standard deviation of positions, A


def crystal(rng: np.random.Generator, metals: list[str], equal: bool, solutes: bool) -> Atoms:
    """One frame without labels."""
    shares = np.full(len(metals), 1 / len(metals)) if equal else rng.dirichlet(np.ones(len(metals)))
    symbols = rng.choice(metals, size=32, p=shares)
    a = float(np.mean([METALS[s] for s in symbols]))
    atoms = bulk("Cu", a=a, cubic=True).repeat(2)
    atoms.symbols = symbols
    if solutes:
        sites = np.array([[i, j, k] for i in range(4) for j in range(4) for k in range(4) if (i + j + k) % 2]) * a / 2
        for site in rng.choice(sites, size=rng.integers(1, 4), replace=False):
            atoms.append(Atom(rng.choice(SOLUTES), site))
    strain = np.eye(3) + rng.normal(0, STRAIN, (3, 3))
    atoms.set_cell(atoms.cell.array @ (strain + strain.T) / 2, scale_atoms=True)
    atoms.positions += rng.normal(0, rng.uniform(*SHAKEN), (len(atoms), 3))
    return atoms


def labelled(atoms: Atoms, config_type: str) -> Atoms:
    """With energy, forces and stress by EMT."""
    atoms.calc = EMT()
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
    atoms.calc = SinglePointCalculator(atoms, **results)
    atoms.info["config_type"] = config_type
    return atoms


def frames(split: str, n: int, seed: int) -> list[Atoms]:
    """n frames of a split."""
    rng = np.random.default_rng(seed)
    out = []
    for k in range(n):
        count = 4 if split == "quaternary" else 1 + k % 3
        metals = list(rng.choice(list(METALS), size=count, replace=False))
        out.append(labelled(crystal(rng, metals, split == "quaternary", k % 2 == 1), f"{count} metals"))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, n) in enumerate(FRAMES.items()):
        write(folder / f"{split}.xyz", frames(split, n, seed), format="extxyz")


if __name__ == "__main__":
    main()
