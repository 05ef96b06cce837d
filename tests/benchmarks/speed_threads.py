"""One core and two: calls with one thread and with two in turn, beside what the machine gives two processes; and dynamics in ASE."""

from __future__ import annotations

import time
from collections.abc import Callable
from unittest import mock

import bursts
import common
import numpy as np
import speed_peers
import torch
from ase import units
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from speed_cases import silicon, silicon_atoms
from speed_peers import Setup

from gpmlp.core import neighbors
from gpmlp.engines.ase import GPCalculator
from gpmlp.potential.potential import Potential

COUNTS = (1, 2)
KELVIN, FS = 600.0, 2.0


def with_threads(count: int, call: Callable[[], object]) -> bursts.Burst:
    """A contestant that may use so many threads."""

    def run(seconds: float) -> list[float]:
        torch.set_num_threads(count)
        return bursts.burst(call, seconds)

    return run


def stepping(potential: Potential, cells: int) -> Callable[[], object]:
    """Forces by ASE's calculator, with its skin, of atoms that are each time elsewhere within 0.01 A."""
    atoms, rng = silicon_atoms(cells), np.random.default_rng(0)
    atoms.calc = GPCalculator(potential)
    places = atoms.positions.copy()

    def call() -> None:
        atoms.positions = places + rng.normal(scale=0.01, size=places.shape)
        atoms.get_forces()

    return call


def calls(setup: Setup) -> dict[str, tuple[Callable[[], object], int]]:
    """What to do with one thread and with two: a call, and of how many atoms."""
    out: dict[str, tuple[Callable[[], object], int]] = {}
    k = round((setup.silicon.structures.n_atoms / 8) ** (1 / 3))
    for zeta in setup.zetas:
        potential = setup.silicon.potential(zeta)
        for cell in map(silicon, sorted({k, *setup.sizes})):
            out[f"zeta {zeta}, {cell.n_atoms} atoms"] = lambda p=potential, c=cell: p(c), cell.n_atoms
        some, n = setup.silicon.structures, setup.silicon.structures.n_atoms
        out[f"zeta {zeta}, std, {n} atoms"] = lambda p=potential, c=some: p(c, "atom_energies"), n
        batch, known = setup.molecules.structures, setup.molecules.potential(zeta)
        out[f"zeta {zeta}, {setup.molecules.name}"] = lambda p=known, c=batch: p(c), batch.n_atoms
    return out


def threads(setup: Setup) -> dict:
    """Calls with both numbers of threads in turn, and the ceiling beside it."""
    return compared(setup, calls(setup)) | {"ceiling": ceiling(setup)}


def ase(setup: Setup) -> dict:
    """The same of ASE's calculator."""
    n = setup.silicon.structures.n_atoms
    steps = {zeta: stepping(setup.silicon.potential(zeta), round((n / 8) ** (1 / 3))) for zeta in setup.zetas}
    return compared(setup, {f"zeta {zeta}, {n} atoms": (step, n) for zeta, step in steps.items()})


def compared(setup: Setup, of: dict[str, tuple[Callable[[], object], int]]) -> dict:
    """Both numbers of threads in turn."""
    print(f"{len(bursts.cores())} core(s) to use; us an atom, ratios of medians (quartiles of {setup.rounds} rounds)")
    found, rows = [], []
    for name, (call, n) in of.items():
        times = setup.in_turn({str(count): with_threads(count, call) for count in COUNTS})
        one, two = (times[str(count)] for count in COUNTS)
        ratio = one.over(two)
        us = {count: [1e6 * t.least / n, 1e6 * t.median / n] for count, t in times.items()}
        found.append(
            {"case": name, "atoms": n, "us": us, "least": one.least / two.least,
             "ratio": [ratio.low, ratio.median, ratio.high]}
        )  # fmt: skip
        rows.append(
            [name, *(f"{v:.1f}" for pair in us.values() for v in pair), f"{one.least / two.least:.2f}", str(ratio)]
        )
    torch.set_num_threads(1)
    print(common.table(rows, ["", "1: least", "median", "2: least", "median", "least / least", "1 / 2"]))
    return {"cores": len(bursts.cores()), "calls": found}


def ceiling(setup: Setup) -> dict:
    """How much more two processes of one thread each do than one of them alone, by turns."""
    cores, found = bursts.cores()[:2], {}
    for zeta in setup.zetas:
        asked = {f"process {k}": speed_peers.ours(setup.silicon, zeta) for k in range(2)}
        with speed_peers.started(setup.silicon, asked, tuple(cores)) as workers:
            first, second = workers.values()
            ratios = []
            for _ in range(setup.rounds):
                alone = rate(first(setup.seconds))
                for worker in (first, second):
                    worker.ask(setup.seconds)
                ratios.append(sum(rate(worker.answer()) for worker in (first, second)) / alone)
        spread = bursts.Spread.of(ratios)
        found[f"zeta {zeta}"] = [spread.low, spread.median, spread.high]
        print(f"ceiling, zeta {zeta}: two processes do {spread} times as much as one")
    return found


def rate(times: list[float]) -> float:
    """Calls a second."""
    return len(times) / sum(times)


def dynamics(setup: Setup) -> dict:
    """Steps a second of ASE's velocity Verlet (2 fs, from 600 K) with the calculator's skin, one thread, and searches meanwhile."""
    found, rows = [], []
    cells = sorted({2, round((setup.silicon.structures.n_atoms / 8) ** (1 / 3))})
    for zeta in setup.zetas:
        potential = setup.silicon.potential(zeta)
        for k in cells:
            for uncertainty in (None, "atom_energies"):
                one = _run(potential, k, uncertainty, 2 * setup.rounds * setup.seconds)
                found.append({"zeta": zeta, "std": uncertainty is not None} | one)
                rows.append(
                    [f"zeta {zeta}, {one['atoms']} atoms{', std' if uncertainty else ''}", f"{one['steps']}",
                     f"{one['steps per s']:.0f}", f"{one['us']:.1f}", f"{one['searches']}"]
                )  # fmt: skip
    print(common.table(rows, ["", "steps", "steps/s", "us an atom", "searches"]))
    return {"of": found}


def _run(potential: Potential, cells: int, uncertainty: str | None, seconds: float) -> dict:
    atoms = silicon_atoms(cells)
    MaxwellBoltzmannDistribution(atoms, temperature_K=KELVIN, rng=np.random.default_rng(0))
    atoms.calc = GPCalculator(potential, uncertainty=uncertainty)
    run = VelocityVerlet(atoms, FS * units.fs)
    with (
        bursts.pinned(bursts.cores()[0]),
        mock.patch.object(neighbors, "find_neighbors", wraps=neighbors.find_neighbors) as search,
    ):
        run.run(5)
        search.reset_mock()
        steps, start = 0, time.perf_counter()
        while time.perf_counter() < start + seconds:
            run.run(5)
            steps += 5
        took = time.perf_counter() - start
    return {
        "atoms": len(atoms), "steps": steps, "steps per s": steps / took,
        "us": 1e6 * took / steps / len(atoms), "searches": search.call_count,
    }  # fmt: skip
