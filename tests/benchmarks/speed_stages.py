"""Stages of a prediction and of a fit: floating-point operations and bytes an atom (docs/performance.md), and what to time."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import bursts
import torch
from speed_cases import silicon

from gpmlp.core import neighbors
from gpmlp.core.environments import StructureEnvironments, Surroundings
from gpmlp.core.structures import Structures
from gpmlp.descriptors import cpu
from gpmlp.gp import covariances, inducing
from gpmlp.potential.mean import EnergyTerm
from gpmlp.potential.potential import Potential

WHOLE = "whole: energy, forces, stress"
UNCERTAIN = "whole, with std of local energies"
N, COPIED = 1000, 16_000_000  # rows of the matrices, numbers copied


@dataclass(frozen=True)
class Machine:
    """Gflop/s of products of float64 matrices, and GB/s of memory read and written, by one thread."""

    gemm: float
    memory: float

    @staticmethod
    def contestants() -> dict[str, bursts.Burst]:
        """What is timed in turn with the stages, as rates vary from moment to moment."""
        a, b = (torch.randn(N, N, dtype=torch.float64) for _ in range(2))
        out, big = torch.empty_like(a), torch.zeros(COPIED, dtype=torch.float64)
        copy = torch.empty_like(big)
        return {"products": bursts.of(lambda: torch.mm(a, b, out=out)), "copies": bursts.of(lambda: copy.copy_(big))}

    @staticmethod
    def of(times: Mapping[str, bursts.Times]) -> Machine:
        """From the least times of the contestants."""
        return Machine(2e-9 * N**3 / times["products"].least, 16e-9 * COPIED / times["copies"].least)


@dataclass(frozen=True)
class Stage:
    """Flops and bytes an atom (NaN for a whole), and what to time."""

    name: str
    flops: float
    bytes: float
    run: Callable[[], object]
    atoms: int

    def floor(self, machine: Machine) -> float:
        """Seconds that arithmetic or memory traffic take, an atom."""
        return max(self.flops / (1e9 * machine.gemm), self.bytes / (1e9 * machine.memory))


def _kernel_flops(term: EnergyTerm, structures: Structures) -> float:
    """Of the mean's kernel and its slope, an atom."""
    total = 0.0
    for z, block in term.blocks.items():
        mean = term.cheaper_means.get(z, block)
        total += float((structures.species == z).sum()) * 2 * mean.products
    return total / structures.n_atoms


def _variance_flops(potential: Potential, structures: Structures) -> float:
    """Of variances of local energies and their kernel, an atom."""
    term, uncertain, total = potential.terms[0], potential.variances, 0.0
    for z, part in uncertain.local.items():
        n, others = sum(part.leading), len(part.whiten_rest)
        spread = 4 * n**2 + 3 * n * others + others**2  # products in single precision count half
        kernel = 2 * (n + others) * term.descriptor.n_features
        total += float((structures.species == z).sum()) * (kernel + spread)
    return total / structures.n_atoms


def of_prediction(potential: Potential, cell: Structures) -> list[Stage]:
    """What a prediction consists of, each stage made from the results of those before."""
    term, uncertain = potential.terms[0], potential.variances
    made = term.descriptor
    view = StructureEnvironments.from_structures(made, cell)
    pairs, x, vectors = view.neighbors, view.environments.features, view.surroundings.vectors
    local, cotangents = term.local_energies(view.environments)
    gradients = view.environments.pull_back(cotangents)
    p, d, columns = len(pairs) / len(x), made.n_features, uncertain.n_columns
    channels, lm, nl = made.n_max * len(made.species), (made.l_max + 1) ** 2, made.n_max * (made.l_max + 1)
    gram, states = channels * (channels + 1) * lm, channels * lm + 2 * d  # of a pair of channels one order

    def alone(name: str, flops: float, numbers: float, run: Callable[[], object]) -> Stage:
        return Stage(name, flops, 8 * numbers, run, len(x))

    return [
        alone("neighbours", 0, 9 * p, lambda: neighbors.find_neighbors(cell, made.cutoff)),
        alone("vectors of pairs", 24 * p, 14 * p, lambda: Surroundings.from_structures(cell, replace(pairs))),
        alone("expansion, power spectrum", p * (11 * nl + 4 * lm + 2 * made.n_max * lm + 30) + gram, 18 * p + states,
              lambda: cpu.compiled_environments(made, view.surroundings)),
        alone("kernel, slope of the mean", _kernel_flops(term, cell), 3 * d, lambda: term.local_energies(view.environments)),
        alone("pull-back", p * (24 * nl + 4 * made.n_max * lm + 6 * lm) + 2 * channels**2 * lm, 12 * p + states,
              lambda: view.environments.pull_back(cotangents)),
        alone("forces, stress", 24 * p, 10 * p, lambda: neighbors.assemble_prediction(cell, pairs, vectors, local, gradients)),
        alone(WHOLE, math.nan, math.nan, lambda: potential(cell)),
        alone("variance of local energies, its kernel", _variance_flops(potential, cell), 4 * columns,
              lambda: uncertain.atom_energies([view.environments])),
        alone(UNCERTAIN, math.nan, math.nan, lambda: potential(cell, variance="atom_energies")),
    ]  # fmt: skip


def of_fit(potential: Potential, cell: Structures) -> list[Stage]:
    """What a fit does with the forces of a structure."""
    term, uncertain = potential.terms[0], potential.variances
    blocks, columns, d = uncertain.blocks[0], uncertain.n_columns, term.descriptor.n_features
    seen = StructureEnvironments.from_structures(term.descriptor, cell)
    p = len(seen.neighbors) / cell.n_atoms

    def rows() -> torch.Tensor:
        return covariances.covariance_rows(cell, seen, term.kernel, blocks, True, False).forces

    forces = rows()
    white = inducing.whiten_rows(forces, uncertain.lowers)

    def alone(name: str, flops: float, numbers: float, run: Callable[[], object]) -> Stage:
        return Stage("fit: " + name, flops, 8 * numbers, run, cell.n_atoms)

    return [
        alone("force rows", 6 * (p + 1) * columns * d, 3 * columns, rows),
        alone("whitening", 3 * columns**2, 6 * columns, lambda: inducing.whiten_rows(forces, uncertain.lowers)),
        alone("QR", 6 * columns**2 * (1 + columns / len(white) / 3), 6 * columns,
              lambda: torch.linalg.qr(torch.cat([uncertain.factor, white]), mode="r")),
    ]  # fmt: skip


def over_floor(stages: list[Stage], rounds: int, seconds: float) -> dict:
    """Rates of the machine; time and floor of each stage, microseconds an atom, all in turn. The floor of a whole is the sum of the
    stages before it, but for those of a fit."""
    times = bursts.in_turn(Machine.contestants() | {s.name: bursts.of(s.run) for s in stages}, rounds, seconds)
    machine, found, total = Machine.of(times), [], 0.0
    for stage in stages:
        whole, took = math.isnan(stage.flops), times[stage.name]
        counted = {} if whole else {"kflop": stage.flops / 1e3, "kB": stage.bytes / 1e3}
        own = 0.0 if whole else 1e6 * stage.floor(machine)
        total += own if not stage.name.startswith("fit") else 0.0
        us = {"least": 1e6 * took.least / stage.atoms, "median": 1e6 * took.median / stage.atoms}
        found.append({"stage": stage.name} | counted | {"floor": total if whole else own} | us)
    return {"machine": asdict(machine), "stages": found}


def peak_kB() -> float:
    """Largest resident memory of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 1024 if sys.platform == "darwin" else used


def by_size(potential: Potential, cells: list[int], rounds: int, seconds: float, variance: str | None = None) -> dict:
    """Microseconds an atom for several sizes, the slope of log least time against log atoms, and the peak memory of the process."""
    sizes: list[int] = []
    least, median, peak = [], [], []
    for k in sorted(cells):
        cell = silicon(k)
        times = bursts.in_turn(
            {"": bursts.of(lambda c=cell: potential(c, variance))}, rounds if k < 12 else 1, seconds
        )[""]
        sizes.append(cell.n_atoms)
        least.append(1e6 * times.least / cell.n_atoms)
        median.append(1e6 * times.median / cell.n_atoms)
        peak.append(peak_kB() / 1e3)
    out = {"atoms": sizes, "least": least, "median": median, "peak MB": peak}
    return out | ({"slope": slope(sizes, least)} if len(sizes) > 1 else {})


def slope(sizes: list[int], us: list[float]) -> float:
    """Of log time against log atoms, by least squares."""
    x, y = torch.tensor(sizes).log(), (torch.tensor(us) * torch.tensor(sizes)).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
