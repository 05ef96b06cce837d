#!/usr/bin/env python3
"""Make (or check) the data of this project on charges and what is beyond the cutoff.

    python generate.py                  all sets: ag3, water, nacl, rocksalt
    python generate.py --set water      one of them
    python generate.py --check          read the files and verify what SOURCE.md says (needs no tblite)

Energies, forces, Mulliken charges and dipoles by GFN2-xTB (tblite); of rocksalt by GFN1-xTB, periodic, without stress. Every set has
a seed of its own. Needs Python 3.10+, numpy, ase, and tblite for the labels.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import CalculationFailed
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

HERE = Path(__file__).resolve().parent
ACCURACY = 0.1  # of tblite's self-consistency
DIGITS = 8  # of positions, so that files are read as they were labelled


def label(atoms: Atoms, charge: int = 0, method: str = "GFN2-xTB") -> Atoms:
    """The same atoms with energy, forces, charges and dipole of tblite; raises where it does not converge."""
    from tblite.ase import TBLite

    out = Atoms(atoms.symbols, positions=atoms.positions.round(DIGITS), cell=atoms.cell, pbc=atoms.pbc)
    out.info = {key: value for key, value in atoms.info.items() if key == "gap_A"} | {"charge": charge}
    work = out.copy()
    work.calc = TBLite(method=method, charge=charge, verbosity=0, accuracy=ACCURACY)
    energy, forces, charges = work.get_potential_energy(), work.get_forces(), work.get_charges()
    more = {} if atoms.pbc.any() else {"dipole": work.get_dipole_moment()}
    out.calc = SinglePointCalculator(out, energy=energy, forces=forces, charges=charges, **more)
    return out


def many(make: Callable[[], tuple[Atoms, int]], count: int) -> list[Atoms]:
    """Labelled structures that `make` gives with their charges; those that do not converge are left out."""
    out: list[Atoms] = []
    while len(out) < count:
        try:
            out.append(label(*make()))
        except (CalculationFailed, RuntimeError) as error:
            print("left out:", " ".join(str(error).split())[:80], flush=True)
    return out


def direction(rng: np.random.Generator) -> np.ndarray:
    vector = rng.normal(size=3)
    return vector / np.linalg.norm(vector)


def closest(a: Atoms, b: Atoms) -> float:
    return float(np.linalg.norm(a.positions[:, None] - b.positions[None], axis=-1).min())


# -------------------------------------------------------------------------- sets


def make_ag3(rng: np.random.Generator) -> dict[str, list[Atoms]]:
    """The same trimers, from triangles to chains, as cations and as anions."""
    triangle = np.array([[0, 0, 0], [2.7, 0, 0], [1.35, 2.34, 0]])
    chain = np.array([[0, 0, 0], [2.65, 0, 0], [5.3, 0, 0]])
    pairs: list[Atoms] = []
    while len(pairs) < 300:
        share = rng.random()
        atoms = Atoms("Ag3", (1 - share) * triangle + share * chain + 0.12 * rng.normal(size=(3, 3)))
        if atoms.get_all_distances()[np.triu_indices(3, 1)].min() < 2.35:
            continue
        try:
            pairs += [label(atoms, 1), label(atoms, -1)]
        except (CalculationFailed, RuntimeError):
            continue
    return {"ag3_train": pairs[:200], "ag3_test": pairs[200:]}


def make_water(rng: np.random.Generator) -> dict[str, list[Atoms]]:
    """Two water molecules, 2.5 to 5.5 A between their centres to fit, 6 to 9 A to test."""

    def one() -> Atoms:
        atoms = molecule("H2O")
        atoms.positions += 0.06 * rng.normal(size=(3, 3))
        atoms.rotate(rng.random() * 360, direction(rng))
        atoms.positions -= atoms.positions.mean(0)
        return atoms

    def dimer(low: float, high: float) -> tuple[Atoms, int]:
        while True:
            a, b = one(), one()
            b.positions += direction(rng) * rng.uniform(low, high)
            if closest(a, b) > 1.6:
                return a + b, 0

    return {
        "water_train": many(lambda: dimer(2.5, 5.5), 150),
        "water_far": many(lambda: dimer(6.0, 9.0), 40),
    }


def make_nacl(rng: np.random.Generator) -> dict[str, list[Atoms]]:
    """Cuts of rocksalt, neutral and charged, and pairs of them: up to 6 A apart to fit, 7 to 13 A to test; larger ones to test, too."""

    def cut(low: int, high: int, charge: int = 0) -> Atoms:
        while True:
            crystal = bulk("NaCl", "rocksalt", 5.5 + 0.3 * rng.random(), cubic=True) * (4, 4, 4)
            centre = crystal.positions.mean(0) + 0.8 * rng.normal(size=3)
            order = np.argsort(np.linalg.norm(crystal.positions - centre, axis=1) + 0.4 * rng.random(len(crystal)))
            pairs = int(rng.integers(low, high + 1))
            wanted = {11: pairs + max(charge, 0), 17: pairs + max(-charge, 0)}
            atoms = crystal[
                sorted(i for z, n in wanted.items() for i in [i for i in order if crystal.numbers[i] == z][:n])
            ]
            atoms.positions += 0.12 * rng.normal(size=atoms.positions.shape)
            atoms.set_cell(None)
            atoms.pbc = False
            if len(atoms) == 1 or atoms.get_all_distances()[np.triu_indices(len(atoms), 1)].min() > 2.1:
                return atoms

    def pair(low: float, high: float, charged: bool) -> tuple[Atoms, int]:
        charge = int(rng.choice([-1, 1])) if charged else 0
        a, b = cut(1, 3, charge), cut(1, 3, -charge)
        away, gap = direction(rng), rng.uniform(low, high)
        b.positions += a.positions.mean(0) - b.positions.mean(0)
        while closest(a, b) < gap:
            b.positions += 0.05 * away
        both = a + b
        both.info["gap_A"] = round(closest(a, b), 3)
        return both, 0

    train = many(lambda: (cut(1, 6), 0), 60) + many(lambda: (cut(8, 14), 0), 15)
    for charge in (1, -1):
        train += many(lambda q=charge: (cut(1, 6, q), q), 20)
    train += many(lambda: pair(2.6, 6.0, False), 30) + many(lambda: pair(2.6, 6.0, True), 30)
    far = many(lambda: pair(7.0, 13.0, False), 15) + many(lambda: pair(7.0, 13.0, True), 15)
    large = many(lambda: (cut(16, 24), 0), 8)
    for charge in (1, -1):
        large += many(lambda q=charge: (cut(12, 18, q), q), 4)
    return {"nacl_train": train, "nacl_far": far, "nacl_large": large}


def make_rocksalt(rng: np.random.Generator) -> dict[str, list[Atoms]]:
    """NaCl, 64 atoms, periodic: strained and displaced, GFN1-xTB."""

    def cell() -> Atoms:
        atoms = bulk("NaCl", "rocksalt", 5.64, cubic=True) * (2, 2, 2)
        strain = rng.uniform(-0.03, 0.03, (3, 3))
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
        atoms.positions += rng.uniform(0.02, 0.25) * rng.normal(size=atoms.positions.shape)
        return atoms

    frames = [label(cell(), 0, "GFN1-xTB") for _ in range(24)]
    return {"rocksalt_train": frames[:12], "rocksalt_test": frames[12:]}


SETS = {"ag3": make_ag3, "water": make_water, "nacl": make_nacl, "rocksalt": make_rocksalt}
SEEDS = {"ag3": 1, "water": 2, "nacl": 3, "rocksalt": 4}


def write_atomically(path: Path, frames: list[Atoms]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    write(temporary, frames, format="extxyz")
    os.replace(temporary, path)


def check(folder: Path) -> int:
    """Print what the files hold; 1 where charges do not sum to the total charge or forces to zero."""
    problems = 0
    for path in sorted(folder.glob("*.xyz")):
        frames = read(path, ":")
        charges = [abs(a.calc.results["charges"].sum() - a.info["charge"]) for a in frames]
        net = [np.linalg.norm(a.get_forces().sum(0)) for a in frames]
        rms = np.sqrt(np.concatenate([a.get_forces().ravel() ** 2 for a in frames]).mean())
        print(
            f"{path.stem:16s} {len(frames):4d} frames {np.mean([len(a) for a in frames]):5.1f} atoms, forces {rms:.3f} eV/A rms, "
            f"net {max(net):.0e}; charges sum to Q within {max(charges):.0e} e; {path.stat().st_size / 1024:.0f} kB"
        )
        problems += max(charges) > 1e-4 or max(net) > 1e-3
    print("check:", "failed" if problems else "all invariants hold")
    return int(problems > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only verify the files")
    parser.add_argument("--set", choices=SETS, action="append", help="make only this one; repeat")
    parser.add_argument("--out", type=Path, default=HERE, help="where the files go")
    args = parser.parse_args()
    if args.check:
        sys.exit(check(args.out))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in args.set or SETS:
        for stem, frames in SETS[name](np.random.default_rng(SEEDS[name])).items():
            write_atomically(args.out / f"{stem}.xyz", frames)
            print(f"{stem}: {len(frames)} frames", flush=True)


if __name__ == "__main__":
    main()
