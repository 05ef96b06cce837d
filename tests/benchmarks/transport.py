"""Does the 90 % interval of an activation energy hold the truth? Liquid copper by EMT; each of ten seeds has labels, a fit and runs.

    python tests/benchmarks/transport.py truth --out FOLDER          # long dynamics of EMT itself, in the same cell
    python tests/benchmarks/transport.py seeds --out FOLDER          # goes on where it was, seed by seed
    python tests/benchmarks/transport.py table --out FOLDER

Each seed melts copper anew, labels frames of its own liquid, fits, and runs `gpmlp.transport`. All is sized for two busy cores: short
trajectories, few samples, little data, so that both the statistical part and the model's are there to be judged.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import ase.build
import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.emt import beta, parameters
from ase.calculators.singlepoint import SinglePointCalculator

import gpmlp
from gpmlp.core.units import VOIGT
from gpmlp.core.verlet_list import VerletList
from gpmlp.io.ase_atoms import from_ase, structures_from_ase
from gpmlp.io.files import atomic_write
from gpmlp.properties.dynamics import DynamicsSettings, Replicas
from gpmlp.properties.transport import TransportSettings, transport
from gpmlp.properties.transport_results import Arrhenius, SegmentAnalysis, analyse_segments

TEMPERATURES = (1200.0, 1400.0, 1600.0)
BETWEEN = 1300.0  # K, at which no run is made
LATTICE, MELT_K = 3.8, 3000.0
TIMESTEP_FS, SEGMENT_PS = 5.0, 2.0
RECIPE = {
    "descriptor": {"cutoff": 4.5, "n_max": 5, "l_max": 3},
    "kernel": {"zeta": 2},
    "inducing": {"n": 60, "gradients": 1},
}
FRAMES, SAMPLES, LENGTH_PS, SEEDS = 6, 5, 6.0, 10


class CopperEMT:
    """ASE's EMT of one element, for copies of the same atoms at once (Jacobsen, Stoltze, Norskov, Surf. Sci. 366, 394 (1996))."""

    def __init__(self, atoms: Atoms, copies: int) -> None:
        e0, s0, v0, eta2, kappa, lam, _ = parameters[atoms.get_chemical_symbols()[0]]
        self.e0, self.s0, self.v0 = e0, s0 * units.Bohr, v0
        self.eta2, self.kappa, self.lam = eta2 / units.Bohr, kappa / units.Bohr, lam / units.Bohr
        nearest = beta * max(p[1] for p in parameters.values()) * units.Bohr
        self.rc = nearest * 0.5 * (math.sqrt(3) + 2)
        self.slope = math.log(1e4 - 1) / (2 * nearest - self.rc)
        r = beta * self.s0 * np.sqrt([1.0, 2.0, 3.0])
        shells = np.array([12, 6, 24]) / (1 + np.exp(self.slope * (r - self.rc))) / 12
        self.gamma1 = shells @ np.exp(-self.eta2 * (r - beta * self.s0))
        self.gamma2 = shells @ np.exp(-self.kappa / beta * (r - beta * self.s0))
        self.structures = structures_from_ase([atoms] * copies)
        self.list, self.n = VerletList(self.rc + 0.5, 0.8), len(atoms)

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Energies, forces and stresses, as gpmlp.properties.dynamics.Forces."""
        now = self.structures.with_unchecked_positions(torch.as_tensor(positions.reshape(-1, 3)), self.structures.cells)
        pairs = self.list.candidates(now)
        d, i, j = pairs.vectors(now).numpy(), pairs.centers.numpy(), pairs.neighbors.numpy()
        r = np.sqrt((d**2).sum(1))
        near = r < self.rc + 0.5
        d, i, j, r = d[near], i[near], j[near], r[near]
        total = positions.shape[0] * self.n
        w = 1 / (1 + np.exp(self.slope * (r - self.rc)))
        falling = self.slope * (w - 1)  # w'/w
        first = np.exp(-self.eta2 * (r - beta * self.s0)) * w
        second = np.exp(-self.kappa * (r / beta - self.s0)) * w
        sigma1 = np.bincount(i, first, total)
        s = -np.log(sigma1 / (12 * self.gamma1)) / (beta * self.eta2)
        damped, repelled = np.exp(-self.lam * s), 6 * self.v0 * np.exp(-self.kappa * s)
        pair = -0.5 * self.v0 / self.gamma2 * second
        local = self.e0 * (1 + self.lam * s) * damped + repelled - self.e0 + np.bincount(i, pair, total)
        slopes = -self.e0 * self.lam**2 * s * damped - self.kappa * repelled  # dE/ds
        by_density = slopes / (-beta * self.eta2 * sigma1)
        along = by_density[i] * first * (falling - self.eta2) + pair * (falling - self.kappa / beta)  # dE_i/dr_ij
        gradient = (along / r)[:, None] * d
        forces = np.stack([np.bincount(i, g, total) - np.bincount(j, g, total) for g in gradient.T], axis=1)
        copy = i // self.n
        stresses = np.stack(
            [np.bincount(copy, gradient[:, a] * d[:, b], len(positions)) for a in range(3) for b in range(3)], axis=1
        ).reshape(-1, 3, 3)
        volumes = self.structures.volumes.numpy()[:, None, None]
        return local.reshape(len(positions), -1).sum(1), forces.reshape(positions.shape), stresses / volumes


def melted(seed: int) -> Replicas:
    """Liquids by EMT, one at each temperature, out of a hot one."""
    atoms = ase.build.bulk("Cu", cubic=True, a=LATTICE) * (3, 3, 3)
    hot = DynamicsSettings((MELT_K,), 1, 3.0, 10, 100, 200, seed=1000 + seed)
    liquid = Replicas(atoms, [CopperEMT(atoms, 1)], hot)
    for _ in range(60):
        liquid.advance()
    atoms.positions = liquid.positions[0, 0]
    settings = DynamicsSettings(TEMPERATURES, 1, TIMESTEP_FS, 10, 40, 200, seed=2000 + seed)
    colder = Replicas(atoms, [CopperEMT(atoms, len(TEMPERATURES))], settings)
    for _ in range(40):
        colder.advance()
    return colder


def frame(liquids: Replicas, k: int, cell: np.ndarray) -> Atoms:
    """A labelled frame of the k-th liquid as it is now."""
    atoms = Atoms(liquids.numbers, liquids.positions[0, k], cell=cell, pbc=True)
    stress = [float(liquids.stresses[0, k, a, b]) for a, b in VOIGT]
    labels = {"energy": float(liquids.energies[0, k]), "forces": liquids.forces[0, k].copy(), "stress": stress}
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


def run_truth(folder: Path, length_ps: float, replicas: int) -> None:
    """EMT's own D and E_a, by the same code; more is added to what is there."""
    liquids = melted(-1)
    atoms = frame(liquids, 1, ase.build.bulk("Cu", cubic=True, a=LATTICE).cell.array * 3)
    record_ps = TIMESTEP_FS * 10 / 1000
    settings = DynamicsSettings(
        TEMPERATURES, replicas, TIMESTEP_FS, 10, round(2 / record_ps), round(SEGMENT_PS / record_ps)
    )
    run = Replicas(atoms, [CopperEMT(atoms, replicas * len(TEMPERATURES))], settings)
    path, begun = folder / "truth.npz", time.monotonic()
    if path.exists():
        with np.load(path) as state:
            run.restore(dict(state))
    while run.time_ps < length_ps:
        if not run.advance():
            continue
        with atomic_write(path) as file:
            np.savez(file, **run.state())
        if len(run.sums) > 1:
            write_truth(run, folder)
        print(f"{run.time_ps:.0f} ps, {time.monotonic() - begun:.0f} s", flush=True)


def write_truth(run: Replicas, folder: Path) -> None:
    averages = SegmentAnalysis(run).diffusion()["Cu"]
    results = analyse_segments(run, ["diffusion", "viscosity"], None, "truth")
    line = Arrhenius.from_members("Cu", TEMPERATURES, averages)
    content = {v.name: [v.value, v.sigma] for v in results.values} | {"time_ps": run.time_ps}
    if line is not None:
        between = line.diffusion_at(BETWEEN)
        content |= {between.name: [between.value, between.sigma]}
    (folder / "truth.json").write_text(json.dumps(content, indent=2))


def run_seed(seed: int, folder: Path, frames: int, samples: int, length_ps: float) -> dict:
    """Labels, fit and transport of one seed."""
    begun = time.process_time()
    liquids = melted(seed)
    cell = ase.build.bulk("Cu", cubic=True, a=LATTICE).cell.array * 3
    labelled = []
    while len(labelled) < frames:
        for _ in range(8):
            liquids.advance()
        labelled.append(frame(liquids, len(labelled) % len(TEMPERATURES), cell))
    potential, report = gpmlp.fit(*from_ase(labelled), gpmlp.Recipe(**RECIPE))
    fitted = time.process_time()
    settings = TransportSettings(
        TEMPERATURES, samples=samples, replicas=1, precision=1e-3, length_ps=length_ps, timestep_fs=TIMESTEP_FS,
        segment_ps=SEGMENT_PS, equilibrate_ps=0.5, seed=seed,
    )  # fmt: skip
    results = transport(potential, labelled[1], settings)
    values = list(results.values)
    values += [line.diffusion_at(BETWEEN) for line in results.arrhenius.values()]
    return {
        "seed": seed,
        "values": [value.as_dict() for value in values],
        "train_rmse": report.as_dict()["train_rmse"],
        "notes": results.notes,
        "seconds": [fitted - begun, time.process_time() - fitted],
    }


def print_table(folder: Path) -> None:
    """Shares of intervals that hold the truth, by quantity."""
    truth = json.loads((folder / "truth.json").read_text())
    seeds = [json.loads(path.read_text()) for path in sorted(folder.glob("seed_*.json"))]
    print(f"truth: {truth['time_ps']:.0f} ps of each trajectory; {len(seeds)} seeds")
    print(f"{'':38} {'truth':>16} {'mean':>8} {'σ':>8} {'model':>8} {'stat.':>8} {'inside 90 %':>12} {'rms z':>6}")
    for name in (v["name"] for v in seeds[0]["values"]):
        if name not in truth:
            continue
        found = [v for seed in seeds for v in seed["values"] if v["name"] == name]
        exact, error = truth[name]
        inside = sum(v["low_90"] <= exact <= v["high_90"] for v in found)
        z = math.sqrt(np.mean([((v["value"] - exact) / math.hypot(v["sigma"], error)) ** 2 for v in found]))
        mean, sigma = (np.mean([v[key] for v in found]) for key in ("value", "sigma"))
        model, noise = (np.mean([v["parts"][key] for v in found]) for key in ("sampled", "statistical"))
        shown = f"{exact:.4g} ± {error:.2g}"
        print(
            f"{name:38} {shown:>16} {mean:8.4g} {sigma:8.2g} {model:8.2g} {noise:8.2g} {inside:>9}/{len(found)} {z:6.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["truth", "seeds", "table"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--length-ps", type=float, default=None)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    arguments = parser.parse_args()
    folder = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.what == "truth":
        run_truth(folder, arguments.length_ps or 100.0, arguments.replicas)
    if arguments.what == "seeds":
        for seed in range(arguments.seeds):
            path = folder / f"seed_{seed:02d}.json"
            if not path.exists():
                found = run_seed(seed, folder, arguments.frames, arguments.samples, arguments.length_ps or LENGTH_PS)
                path.write_text(json.dumps(found, indent=2))
                print(f"seed {seed}: {found['seconds']} s", flush=True)
    if arguments.what == "table" or arguments.what == "seeds":
        print_table(folder)


if __name__ == "__main__":
    main()
