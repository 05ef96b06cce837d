"""Cost of a prediction with and without uncertainty: Si diamond rattled, 512 atoms, M = 1000 inducing values, n 8, l 6, cutoff 5 A.

    OMP_NUM_THREADS=1 python tests/benchmarks/cost.py [--columns 1000] [--repeats 5]

Times are CPU microseconds per atom, the least of the repeats, each kind in turn, so that the ratio to the mean alone holds on a noisy
machine. The data are those of this repository.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import common
import torch

sys.path.insert(0, str(common.ROOT))

from ase.build import bulk

import gpmlp
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.recipe import Recipe

RECIPE = {"descriptor": {"cutoff": 5.0, "n_max": 8, "l_max": 6}, "kernel": {"zeta": 4}, "variance": {"columns": 1000}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=1000, help="inducing values")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cells", type=int, default=4, help="cubic cells along each axis")
    options = parser.parse_args()
    structures, targets = gpmlp.read(Path(common.ROOT) / "data/silicon/train.xyz")
    recipe = Recipe.model_validate(RECIPE | {"inducing": {"n": options.columns, "gradients": 0}})
    potential, report = gpmlp.fit(structures, targets, recipe)
    atoms = bulk("Si", cubic=True).repeat(options.cells)
    atoms.rattle(0.05, seed=0)
    cell = structures_from_ase([atoms])
    samples = potential.sample(32, seed=0)
    runs: dict[str, Callable[[], object]] = {
        "mean: energy, forces, stress": lambda: potential(cell),
        "and std of local energies": lambda: potential(cell, variance="atom_energies"),
        "and std of local energies, novelty": lambda: potential(cell, variance="atom_energies", novelty=True),
        "and std of the energy": lambda: potential(cell, variance="energies"),
        "and std of the forces of one atom": lambda: potential(cell, variance="forces", atoms=[0]),
        "and std of all forces": lambda: potential(cell, variance="forces"),
        "and std of the stress": lambda: potential(cell, variance="stresses"),
        "32 samples": lambda: samples(cell),
    }
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(options.repeats):
        for name, run in runs.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    mean = best["mean: energy, forces, stress"]
    rows = [[name, f"{1e6 * t / len(atoms):.0f}", f"{t / mean:.2f}"] for name, t in best.items()]
    print(
        f"{len(atoms)} atoms, {report.rank} columns, {torch.get_num_threads()} thread(s), evidence {_share(report):.1f} % of the fit"
    )
    print(common.table(rows, ["", "us/atom", "of the mean"]))


def _share(report) -> float:
    stages = {name: seconds for name, seconds, _ in report.stages}
    return 100 * stages["evidence"] / sum(stages.values())


if __name__ == "__main__":
    main()
