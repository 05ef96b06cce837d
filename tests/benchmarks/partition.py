"""How much of the squared force error lies in a tenth of the atoms, chosen by the potential's own error bars.

    OMP_NUM_THREADS=1 python tests/benchmarks/partition.py [SYSTEM...] [--fraction 0.1] [--json partition.json]

Each potential is fitted to what is cheap to label (a perfect crystal, a clean surface, a free molecule) and meets what it has not seen, at
300 K, some minutes of CPU together. One line of JSON for each system: the share of the squared error in the region by calibrated force
variances (`share`), by eight posterior samples (`sampled`) and by local energies (`local_energies`), the best share that any region of so
many atoms holds (`best`), what was foreseen, and the seconds that variances of all forces, samples and local energies took.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atom, Atoms, units
from ase.build import add_adsorbate, bulk, fcc111, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.langevin import Langevin
from ase.optimize import FIRE

import gpmlp
from gpmlp.core.calculators import build_calculator
from gpmlp.io.ase_atoms import from_ase
from gpmlp.properties.partition import RegionRule

System = tuple[list[Atoms], Atoms]
RECIPE = {"inducing": {"n": 150, "gradients": 2}}


def hot(
    atoms: Atoms, calculator: Any, temperature: float, frames: int, seed: int, timestep_fs: float = 2.0
) -> list[Atoms]:
    """Labelled frames of dynamics, ten steps apart, after a hundred."""
    atoms, rng = atoms.copy(), np.random.default_rng(seed)
    atoms.calc = calculator
    atoms.set_momenta(
        rng.standard_normal((len(atoms), 3)) * np.sqrt(2 * units.kB * temperature * atoms.get_masses())[:, None]
    )
    about = {"temperature_K": temperature, "friction": 0.02 / units.fs, "rng": rng, "fixcm": False}
    dynamics = Langevin(atoms, timestep_fs * units.fs, **about)
    dynamics.run(100)
    out = []
    for _ in range(frames):
        dynamics.run(10)
        frame = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        frame.calc = SinglePointCalculator(frame, energy=atoms.get_potential_energy(), forces=atoms.get_forces())
        out.append(frame)
    return out


def relaxed(atoms: Atoms, calculator: Any) -> Atoms:
    """Nearly at rest."""
    atoms.calc = calculator
    FIRE(atoms, logfile=None).run(fmax=0.2, steps=60)
    return atoms


def interstitial() -> System:
    """An atom too many in silicon (Stillinger-Weber); the potential knows the perfect crystal."""
    oracle = build_calculator("stillinger-weber", {}, Path())
    perfect, defect = bulk("Si", cubic=True) * (2, 2, 2), bulk("Si", cubic=True) * (3, 3, 3)
    train = hot(perfect, oracle, 300, 8, 0) + hot(perfect, oracle, 700, 8, 1)
    defect.append(Atom("Si", defect.positions[0] + 0.5 * 5.43))
    return train, hot(relaxed(defect, oracle), oracle, 300, 1, 2)[0]


def island() -> System:
    """Three atoms on Cu(111) (EMT); the potential knows the clean surface."""
    train = hot(fcc111("Cu", (3, 3, 4), vacuum=6.0), EMT(), 300, 20, 0)
    slab = fcc111("Cu", (6, 6, 4), vacuum=6.0)
    for place in ((0, 0), (1, 0), (0, 1)):
        add_adsorbate(slab, "Cu", 1.9, "fcc", offset=place)
    return train, hot(relaxed(slab, EMT()), EMT(), 300, 1, 2, 1.0)[0]


def adsorbate() -> System:
    """CO on Cu(111) (EMT); the potential knows the clean surface and the free molecule."""
    gas = molecule("CO")
    gas.center(vacuum=6.0)
    train = hot(fcc111("Cu", (3, 3, 4), vacuum=6.0), EMT(), 300, 12, 0) + hot(gas, EMT(), 300, 10, 1, 0.5)
    slab = fcc111("Cu", (6, 6, 4), vacuum=6.0)
    add_adsorbate(slab, molecule("CO"), 1.6, "fcc", mol_index=1)
    return train, hot(relaxed(slab, EMT()), EMT(), 300, 1, 2, 1.0)[0]


def dumbbell() -> System:
    """Two atoms in one place of copper (EMT); the potential knows the perfect crystal, and errs there hardly more than elsewhere."""
    perfect, defect = bulk("Cu", cubic=True) * (2, 2, 2), bulk("Cu", cubic=True) * (4, 4, 4)
    train = hot(perfect, EMT(), 300, 10, 0) + hot(perfect, EMT(), 700, 10, 1)
    defect.append(Atom("Cu", defect.positions[100] - [0, 0, 0.9]))
    defect.positions[100, 2] += 0.9
    return train, hot(relaxed(defect, EMT()), EMT(), 300, 1, 2)[0]


SYSTEMS: dict[str, Callable[[], System]] = {f.__name__: f for f in (interstitial, island, adsorbate, dumbbell)}


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def measure(name: str, fraction: float) -> dict[str, Any]:
    """A line of the table."""
    train, test = SYSTEMS[name]()
    potential, _ = gpmlp.fit(*from_ase(train), gpmlp.Recipe.model_validate(RECIPE))
    structure, truth = from_ase([test])
    found, seconds = timed(lambda: gpmlp.partition(potential, structure, RegionRule(fraction, whole_molecules=False)))
    sampled, sampled_s = timed(lambda: potential(structure, "sampled_forces").sampled_forces_covariance)
    local, local_s = timed(lambda: potential(structure, "atom_energies").atom_energies_variance)
    squares = (potential(structure).forces - truth.forces).square().sum(1)
    scores = {"sampled": sampled.diagonal().total.sum(1), "local_energies": local.total, "best": squares}

    def share(core: torch.Tensor) -> float:
        return round(float(squares[core].sum() / squares.sum()), 4)

    shares = {key: share(score.argsort(descending=True)[: len(found.core)]) for key, score in scores.items()}
    line = {
        "system": name,
        "atoms": len(found.marks),
        "region": len(found.core),
        "share": share(torch.from_numpy(found.core)),
    }
    rmse = {"force_rmse_meV_per_A": round(1e3 * float((squares.mean() / 3).sqrt()), 1)}
    times = {"variance_s": round(seconds, 2), "sampled_s": round(sampled_s, 2), "local_energies_s": round(local_s, 2)}
    return line | shares | {"foreseen": round(found.share, 4)} | rmse | times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("systems", nargs="*", metavar="SYSTEM", help=f"of {', '.join(SYSTEMS)}; all if not given")
    parser.add_argument("--fraction", type=float, default=0.1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    for name in given.systems:
        if name not in SYSTEMS:
            parser.error(f"{name}: must be one of {', '.join(SYSTEMS)}")
    lines = []
    for name in given.systems or SYSTEMS:
        lines.append(measure(name, given.fraction))
        print(json.dumps(lines[-1]), flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    main()
