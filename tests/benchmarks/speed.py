"""Time of every stage of a prediction over what its arithmetic and its memory traffic need on this machine, and the whole beside peers.

    python tests/benchmarks/speed.py [--threads 1] [--zeta 2 4] [--columns 1000] [--cells 4] [--sizes 2 4 8]
        [--peer-python /path/to/quippy/bin/python] [--lammps-python /path/to/lammps/bin/python] [--json speed.json]

Si diamond rattled by 0.05 A, 8 cells³ atoms, n 8, l 6, cutoff 5 A; models are fitted to the silicon of this repository and kept in
--work. First the machine: the rate of its matrix products and of copying memory. Then each stage: floating-point operations and bytes
an atom by the formulas of docs/performance.md, the floor that follows, the time (least of the repeats, one after another), and how
many floors that is. Then all of it for cells of several sizes, with the slope of log time against log atoms, and for one and two
threads. Peers predict the same atoms in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import common
import torch

sys.path.insert(0, str(common.ROOT))

from ase.build import bulk

import gpmlp
from gpmlp import neighbors
from gpmlp.descriptors import fused
from gpmlp.environments import Surroundings
from gpmlp.gp import covariances, posterior
from gpmlp.io.atoms import structures_from_ase
from gpmlp.potential import Potential
from gpmlp.recipe import Recipe
from gpmlp.structures import Structures
from gpmlp.terms import View

SHAPE = {"cutoff": 5.0, "n_max": 8, "l_max": 6}
WHOLE = "whole: energy, forces, stress"
SNAPS = {"SNAP": "Si_Zuo_JPCA2020", "quadratic SNAP": "Si_Zuo_JPCA2020.quadratic"}  # as LAMMPS ships them


@dataclass(frozen=True)
class Machine:
    """Gflop/s of products of float64 matrices, and GB/s of memory read and written."""

    gemm: float
    memory: float

    @staticmethod
    def measured() -> Machine:
        """With as many threads as PyTorch uses."""
        a, b = (torch.randn(1500, 1500, dtype=torch.float64) for _ in range(2))
        out, big = torch.empty_like(a), torch.zeros(32_000_000, dtype=torch.float64)
        copy = torch.empty_like(big)
        products, copies = least(lambda: torch.mm(a, b, out=out), 8), least(lambda: copy.copy_(big), 8)
        return Machine(2e-9 * 1500**3 / products, 16e-9 * len(big) / copies)


@dataclass(frozen=True)
class Stage:
    """Flops and bytes an atom, and what to time."""

    name: str
    flops: float
    bytes: float
    run: Callable[[], object]
    atoms: int


def least(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest run, after one that is not counted."""
    run()
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def model(zeta: int, columns: int, work: Path) -> Potential:
    """A potential with so many inducing values; fitted once."""
    path = work / f"si_zeta{zeta}_{columns}.gpmlp"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        choices = {"descriptor": SHAPE, "kernel": {"zeta": zeta}, "inducing": {"n": columns, "gradients": 0}}
        recipe = Recipe.model_validate(choices | {"variance": {"columns": columns}})
        gpmlp.save(gpmlp.fit(*gpmlp.read(common.ROOT / "data/silicon/train.xyz"), recipe)[0], path)
    return gpmlp.load(path)


def silicon(cells: int) -> Structures:
    """8 cells³ atoms."""
    atoms = bulk("Si", cubic=True).repeat(cells)
    atoms.rattle(0.05, seed=0)
    return structures_from_ase([atoms])


def stages(potential: Potential, cell: Structures) -> list[Stage]:
    """What a prediction and a fit consist of, each made from the results of those before."""
    term, uncertain = potential.terms[0], potential.variances
    made, block, blocks = term.descriptor, next(iter(term.blocks.values())), uncertain.blocks[0]
    view = View.of(made, cell)
    pairs, x, vectors = view.neighbors, view.environments.features, view.surroundings.vectors
    local, cotangents = term.local(view.environments)
    gradients = view.environments.pull_back(cotangents)
    rows = covariances.atom_rows(x, cell.species, term.kernel, blocks)
    few = silicon(2)
    seen = View.of(made, few)
    force_rows = covariances.rows(few, seen.neighbors, made, term.kernel, blocks, True, False).forces
    white = posterior.whiten(force_rows, uncertain.lowers)
    p, q, d, m, columns = (
        len(pairs) / len(x),
        len(seen.neighbors) / few.n_atoms,
        made.n_features,
        len(block.features),
        rows.shape[1],
    )
    part = next(iter(uncertain.local.values()))
    n, others = sum(part.leading), len(part.rest)
    spread = 4 * n**2 + 3 * n * others + others**2  # products in single precision count half
    channels, lm, nl = made.n_max * len(made.species), (made.l_max + 1) ** 2, made.n_max * (made.l_max + 1)
    gram, states = 2 * channels**2 * lm, channels * lm + 2 * d

    def alone(name: str, flops: float, numbers: float, run: Callable[[], object], atoms: int = len(x)) -> Stage:
        return Stage(name, flops, 8 * numbers, run, atoms)

    return [
        alone("neighbours", 0, 9 * p, lambda: neighbors.find(cell, made.cutoff)),
        alone("vectors of pairs", 24 * p, 14 * p, lambda: Surroundings.of(cell, replace(pairs))),
        alone("expansion, power spectrum", p * (11 * nl + 4 * lm + 2 * made.n_max * lm + 30) + gram, 18 * p + states,
              lambda: fused.environments(made, view.surroundings)),
        alone("kernel, slope of the mean", 2 * d * d if term.collapsed else 4 * m * d, 3 * d, lambda: term.local(view.environments)),
        alone("pull-back", p * (24 * nl + 4 * made.n_max * lm + 6 * lm) + gram, 12 * p + states,
              lambda: view.environments.pull_back(cotangents)),
        alone("forces, stress", 24 * p, 10 * p, lambda: neighbors.prediction(cell, pairs, vectors, local, gradients)),
        alone(WHOLE, math.nan, math.nan, lambda: potential(cell)),
        alone("variance of local energies, its kernel", 2 * columns * d + spread, 4 * columns,
              lambda: uncertain.of_atoms([view.environments])),
        alone("whole, with std of local energies", math.nan, math.nan, lambda: potential(cell, variance="atom_energies")),
        alone("fit: force rows", 6 * (q + 1) * columns * d, 3 * columns,
              lambda: covariances.rows(few, seen.neighbors, made, term.kernel, blocks, True, False), few.n_atoms),
        alone("fit: whitening", 3 * columns**2, 6 * columns, lambda: posterior.whiten(force_rows, uncertain.lowers), few.n_atoms),
        alone("fit: QR", 6 * columns**2 * (1 + columns / len(white) / 3), 6 * columns,
              lambda: torch.linalg.qr(torch.cat([uncertain.factor, white]), mode="r"), few.n_atoms),
    ]  # fmt: skip


def over_floor(potential: Potential, cell: Structures, machine: Machine, repeats: int) -> list[dict]:
    """Time and floor of each stage, microseconds an atom; the floor of a whole is the sum of its parts."""
    found, total = [], 0.0
    for stage in stages(potential, cell):
        floor = 1e6 * max(stage.flops / (1e9 * machine.gemm), stage.bytes / (1e9 * machine.memory))
        took = 1e6 * least(stage.run, repeats) / stage.atoms
        if math.isnan(floor):
            floor = total
        elif not stage.name.startswith("fit"):
            total += floor
        found.append(
            {"stage": stage.name, "kflop": stage.flops / 1e3, "kB": stage.bytes / 1e3, "floor": floor, "us": took}
        )
    return found


def scaling(potential: Potential, cells: Sequence[int], repeats: int, variance: str | None = None) -> dict:
    """Time an atom for several sizes, the slope of log time against log atoms, and by how much the peak memory grew, an atom."""
    sizes, times, grown = [], [], []
    for k in sorted(cells):
        cell = silicon(k)
        sizes.append(cell.n_atoms)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        times.append(least(lambda c=cell: potential(c, variance), max(1, repeats if k < 12 else 1)))
        grown.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / cell.n_atoms)
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (sizes, times))
    slope = (
        float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()) if len(sizes) > 1 else math.nan
    )
    us = [1e6 * t / n for t, n in zip(times, sizes, strict=True)]
    return {"atoms": sizes, "us": us, "slope": slope, "kB": grown}


def threads(potential: Potential, cell: Structures, repeats: int, variance: str | None) -> float:
    """Time with one thread over time with two."""
    before, took = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        took.append(least(lambda: potential(cell, variance), repeats))
    torch.set_num_threads(before)
    return took[0] / took[1]


def peers(options: argparse.Namespace) -> dict[str, float]:
    """Microseconds an atom of each peer that there is, on one core."""
    found, work = {}, options.work.resolve()
    environment = os.environ | dict.fromkeys(common.THREAD_VARIABLES, "1")
    asked: dict[str, list[str]] = {}
    if options.peer_python:
        asked["GAP (zeta 4)"] = [options.peer_python, "gap", str(_gap(work, options))]
    if options.lammps_python:
        environment["LD_LIBRARY_PATH"] = str(Path(options.lammps_python).parents[1] / "lib")
        asked |= {kind: [options.lammps_python, "snap", name] for kind, name in SNAPS.items()}
    for name, (python, kind, model) in asked.items():
        command = [python, str(common.HERE / "peer_speed.py"), kind, str(options.cells), model]
        run = subprocess.run(command, cwd=work, capture_output=True, text=True, env=environment)
        if run.returncode:
            print(f"{name} failed: {run.stderr.strip()[-300:]}", file=sys.stderr)
        else:
            found[name] = float(run.stdout.split()[-1])
    return found


def _gap(work: Path, options: argparse.Namespace) -> Path:
    """A GAP fitted to the same data, once."""
    if not (work / "gap.xml").exists():
        work.mkdir(parents=True, exist_ok=True)
        soap = (
            f"n_max=8 l_max=6 cutoff=5.0 cutoff_transition_width=0.5 atom_sigma=0.5 zeta=4 n_sparse={options.columns}"
        )
        common.join([common.ROOT / "data/silicon/train.xyz"], work / "peer.xyz", for_peer=True)
        settings = {"soap": soap, "default_sigma": "0.001 0.05 0.05 0.0", "e0_method": "isolated"}
        common.fit_peer(work, Path(options.peer_python), settings, 1)
    return work / "gap.xml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--zeta", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--columns", type=int, default=1000, help="inducing values")
    parser.add_argument("--cells", type=int, default=4, help="cubic cells along each axis")
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[2, 4, 8], help="cells along each axis, for the scaling"
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--work", type=Path, default=Path("speed"), help="models are kept here")
    parser.add_argument("--peer-python", help="Python of an environment with quippy-ase")
    parser.add_argument("--lammps-python", help="Python of an environment with lammps")
    parser.add_argument("--json", type=Path, default=Path("speed.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine, record = Machine.measured(), {}
    print(
        f"{options.threads} thread(s): products {machine.gemm:.0f} Gflop/s, memory {machine.memory:.0f} GB/s (float64)"
    )
    for zeta in options.zeta:
        potential = model(zeta, options.columns, options.work)
        found = over_floor(potential, silicon(options.cells), machine, options.repeats)
        rows = [
            [f["stage"], *("" if math.isnan(f[k]) else f"{f[k]:.1f}" for k in ("kflop", "kB")), f"{f['floor']:.1f}",
             f"{f['us']:.1f}", f"{f['us'] / f['floor']:.1f}"]
            for f in found
        ]  # fmt: skip
        print(f"\nzeta {zeta}, {8 * options.cells**3} atoms; an atom:")
        print(common.table(rows, ["stage", "kflop", "kB", "floor us", "us", "floors"]))
        grown = scaling(potential, options.sizes, options.repeats)
        uncertain = scaling(potential, options.sizes, options.repeats, "atom_energies")
        for name, found_of in (("mean", grown), ("with std of local energies", uncertain)):
            columns = zip(found_of["atoms"], found_of["us"], found_of["kB"], strict=True)
            steps = ", ".join(f"{n}: {t:.1f} us ({kB:.1f} kB)" for n, t, kB in columns)
            print(f"{name}, an atom by atoms (growth of the peak memory): {steps}; slope {found_of['slope']:.3f}")
        faster = {
            v or "mean": threads(potential, silicon(options.cells), options.repeats, v) for v in (None, "atom_energies")
        }
        print("two threads: " + ", ".join(f"{name} {ratio:.2f} times as fast as one" for name, ratio in faster.items()))
        record[f"zeta {zeta}"] = {
            "stages": found, "scaling": grown, "scaling with std": uncertain, "two threads": faster
        }  # fmt: skip
    ours = {z: next(s["us"] for s in record[f"zeta {z}"]["stages"] if s["stage"] == WHOLE) for z in options.zeta}
    record |= {"machine": asdict(machine), "peers": peers(options)}
    for name, us in record["peers"].items():
        print(f"{name}: {us:.0f} us/atom, " + ", ".join(f"{us / t:.1f} times ours (zeta {z})" for z, t in ours.items()))
    options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
