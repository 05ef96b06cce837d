"""From sixteen labels to the diffusion coefficient of a vacancy at another temperature: do intervals of 90 % hold the oracle's own value?

    OMP_NUM_THREADS=1 python tests/benchmarks/hop.py [METAL...] [--seeds 4] [--temperature-K 900] [--json hop.json]

Metals of EMT, cells of 31 atoms of which those near the hop are free; labels at random about the minimum and along the straight way to the
saddle, another set for each seed. One line of JSON for each fit: barrier (eV), attempt frequency and diffusion coefficient (log10) with
their errors, standard deviations and whether the interval holds the oracle's own; then the shares for each metal and together. Some ten
seconds of CPU for each fit.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

import gpmlp
from gpmlp.io.ase_atoms import from_ase
from gpmlp.properties.compute import exact_properties
from gpmlp.properties.hop import Hop
from gpmlp.properties.surface import EnergySurface

METALS = ("Cu", "Ag", "Ni", "Al", "Pt")
RECIPE = {"descriptor": {"cutoff": 5.0, "n_max": 6, "l_max": 4}, "inducing": {"n": 60, "gradients": 2}}
NAMES = ("hop_barrier", "log10_attempt_frequency", "log10_diffusion_coefficient")


def vacancy(metal: str) -> tuple[Atoms, Atoms]:
    """Before and after a neighbour has hopped into it."""
    crystal = bulk(metal, cubic=True) * (2, 2, 2)
    neighbour = int(np.argsort(crystal.get_distances(0, range(32), mic=True))[1])
    start, end = crystal.copy(), crystal.copy()
    end.positions[neighbour] += crystal.get_distance(neighbour, 0, mic=True, vector=True)
    way = crystal.get_distances(0, range(32), mic=True) + crystal.get_distances(neighbour, range(32), mic=True)
    for atoms in (start, end):
        del atoms[0]
        atoms.set_constraint(FixAtoms(np.flatnonzero(way[1:] > 1.95 * crystal.cell[0, 0] / 2)))
    return start, end


def labels(ends: tuple[Atoms, Atoms], seed: int, n: int = 16) -> list[Atoms]:
    """By the oracle."""
    rng, (start, end) = np.random.default_rng(seed), ends
    frames = []
    for i in range(n):
        atoms = start.copy()
        atoms.set_constraint()
        atoms.positions += (0.0, 0.25, 0.5, 0.0)[i % 4] * (end.positions - start.positions)
        atoms.positions += rng.normal(0, rng.uniform(0.03, 0.07), atoms.positions.shape)
        point = atoms.copy()
        point.calc = EMT()
        atoms.calc = SinglePointCalculator(atoms, energy=point.get_potential_energy(), forces=point.get_forces())
        frames.append(atoms)
    return frames


def measure(metal: str, seed: int, ends: tuple[Atoms, Atoms], truth: dict[str, float], hop: Hop) -> dict[str, Any]:
    """A line."""
    potential, _ = gpmlp.fit(*from_ase(labels(ends, seed)), gpmlp.Recipe.model_validate(RECIPE))
    results = gpmlp.compute_properties(potential, ends, [hop])
    line: dict[str, Any] = {"metal": metal, "seed": seed}
    for name in NAMES:
        value = results[name]
        line[name] = {
            "value": round(value.value, 4), "error": round(value.value - truth[name], 4), "sigma": round(value.sigma, 4),
            "inside": bool(value.low_90 <= truth[name] <= value.high_90),
        }  # fmt: skip
    return line


def shares(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Of intervals that hold the oracle's value, and root mean squares of errors in standard deviations."""
    out = {}
    for name in NAMES:
        z = np.array([line[name]["error"] / line[name]["sigma"] for line in lines])
        inside = sum(line[name]["inside"] for line in lines)
        out[name] = {"inside": f"{inside}/{len(lines)}", "rms_z": round(float(np.sqrt(np.mean(z**2))), 2)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("metals", nargs="*", metavar="METAL", help=f"of {', '.join(METALS)}; all if not given")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--temperature-K", type=float, default=900.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    hop, lines = Hop(temperature_K=given.temperature_K, equivalent=12), []
    for metal in given.metals or METALS:
        ends = vacancy(metal)
        truth = exact_properties(EnergySurface.of_calculator(EMT()), ends, [hop])
        for seed in range(given.seeds):
            lines.append(measure(metal, seed, ends, truth, hop))
            print(json.dumps(lines[-1]), flush=True)
        print(json.dumps({"metal": metal} | shares([line for line in lines if line["metal"] == metal])), flush=True)
    print(json.dumps({"metal": "all"} | shares(lines)))
    if given.json is not None:
        given.json.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    main()
