"""Ours and theirs in turn on the same atoms: each in a process of its own, all on one core."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import bursts
import common
import speed_stages
from speed_cases import MOLECULES, SILICON, Case

ACES = {"ace-jax o3d10": ("3", "10"), "ace-jax o4d12": ("4", "12")}  # order and degree: 110 and 338 functions
NEPS = {"NEP4, 8 and 4 A": ("8", "4"), "NEP4, 5 and 4 A": ("5", "4")}  # cutoffs: the default, and one like ours
SNAPS = {"SNAP": "Si_Zuo_JPCA2020", "quadratic SNAP": "Si_Zuo_JPCA2020.quadratic"}  # as LAMMPS ships them


PYTHONS = ("gap", "lammps", "featomic", "ace", "nep")


@dataclass(frozen=True)
class Setup:
    """What all parts of the benchmark share.

    Attributes:
        sizes: cells along each axis of silicon, for scaling.
        rounds, seconds: how often contestants take turns, and for how long.
        pythons: by names of PYTHONS, of environments that hold these.
    """

    silicon: Case
    molecules: Case
    zetas: tuple[int, ...]
    sizes: tuple[int, ...]
    rounds: int
    seconds: float
    pythons: Mapping[str, Path]

    def in_turn(self, contestants: Mapping[str, bursts.Burst]) -> dict[str, bursts.Times]:
        return bursts.in_turn(contestants, self.rounds, self.seconds)


@dataclass(frozen=True)
class Asked:
    """A worker to start: the Python, and the arguments of worker.py after the frames."""

    python: Path
    kind: str
    arguments: tuple[str | Path, ...]


@contextmanager
def started(case: Case, asked: Mapping[str, Asked], cores: tuple[int, ...]) -> Iterator[dict[str, bursts.Worker]]:
    """Workers by name, each on its core (the last one for all that are left); those that fail are left out, and said so."""
    workers: dict[str, bursts.Worker] = {}
    for k, (name, one) in enumerate(asked.items()):
        environment = os.environ | dict.fromkeys(common.THREAD_VARIABLES, "1")
        if one.kind == "snap":
            environment["LD_LIBRARY_PATH"] = str(one.python.parents[1] / "lib")
        command = [one.python, common.HERE / "worker.py", one.kind, case.path.absolute(), *one.arguments]
        log = case.work.absolute() / f"{name.replace(' ', '_')}.log"
        try:
            workers[name] = bursts.Worker(command, cores[min(k, len(cores) - 1)], log, environment)
        except bursts.WorkerError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def ours(case: Case, zeta: int, kind: str = "energies", *more: str) -> Asked:
    return Asked(Path(sys.executable), kind, (case.model(zeta).absolute(), *more))


def means(setup: Setup, case: Case) -> dict[str, Asked]:
    """Our energies and forces, with and without standard deviations of local energies; GAP's."""
    asked = {f"zeta {z}": ours(case, z) for z in setup.zetas}
    asked |= {f"zeta {z}, std": ours(case, z, "energies", "atom_energies") for z in setup.zetas}
    if "gap" in setup.pythons:
        model = case.peer(setup.pythons["gap"]).absolute()
        asked["GAP"] = Asked(setup.pythons["gap"], "gap", (model,))
        asked["GAP, variance"] = Asked(setup.pythons["gap"], "gap", (model, "variance"))
    return asked


def against(setup: Setup, case: Case, asked: Mapping[str, Asked]) -> dict:
    """Microseconds an atom of each, and how many times as long each takes as those of ours."""
    with started(case, asked, (bursts.cores()[0],)) as workers:
        times = setup.in_turn(workers)
    n, own = (
        case.structures.n_atoms,
        [name for name, one in asked.items() if one.kind in ("energies", "known", "values", "pulled")],
    )
    ratios = {name: {of: took.over(times[of]) for of in own if of in times} for name, took in times.items()}
    rows = [
        [name, f"{1e6 * took.least / n:.1f}", f"{1e6 * took.median / n:.1f}", *map(str, ratios[name].values())]
        for name, took in times.items()
    ]
    print(
        f"{case.name}, {n} atoms, us an atom; beside it in turn: ratios of medians (quartiles of {setup.rounds} rounds)"
    )
    print(common.table(rows, ["", "least", "median", *(f"of {name}" for name in own if name in times)]))
    return {
        name: {
            "least": 1e6 * took.least / n,
            "median": 1e6 * took.median / n,
            "ratios": {of: [r.low, r.median, r.high] for of, r in ratios[name].items()},
        }
        for name, took in times.items()
    }


def peers(setup: Setup) -> dict:
    """Silicon: GAP, NEP on a CPU, and LAMMPS' SNAP in dynamics with its own skin; ours searches neighbours in every call, as NEP does."""
    asked = means(setup, setup.silicon)
    if "lammps" in setup.pythons:
        asked |= {name: Asked(setup.pythons["lammps"], "snap", (model,)) for name, model in SNAPS.items()}
    if "nep" in setup.pythons:
        asked |= {name: Asked(setup.pythons["nep"], "nep", cutoffs) for name, cutoffs in NEPS.items()}
    return {"atoms": setup.silicon.structures.n_atoms, "of": against(setup, setup.silicon, asked)}


def known(setup: Setup) -> dict:
    """Silicon with pairs known: the kernel of ace-jax beside."""
    asked = {f"zeta {zeta}": ours(setup.silicon, zeta, "known") for zeta in setup.zetas}
    if "ace" in setup.pythons:
        cutoff = str(SILICON["cutoff"])
        asked |= {name: Asked(setup.pythons["ace"], "ace", (*size, cutoff)) for name, size in ACES.items()}
    return {"atoms": setup.silicon.structures.n_atoms, "of": against(setup, setup.silicon, asked)}


def molecules(setup: Setup) -> dict:
    """Molecules of several species in one batch: stages over their floors, and GAP beside."""
    case = setup.molecules
    found: dict = {"name": case.name, "atoms": case.structures.n_atoms, "floors": {}}
    with bursts.pinned(bursts.cores()[0]):
        for zeta in setup.zetas:
            stages = speed_stages.of_prediction(case.potential(zeta), case.structures)
            found["floors"][f"zeta {zeta}"] = speed_stages.over_floor(stages, setup.rounds, setup.seconds)
            sizes = f"n {MOLECULES['n_max']}, l {MOLECULES['l_max']}, M {case.columns}"
            show_stages(f"{case.name}, zeta {zeta}, {sizes}", found["floors"][f"zeta {zeta}"])
    return found | {"of": against(setup, case, means(setup, case))}


def descriptors(setup: Setup) -> dict:
    """Values with the neighbour search, and pulled back to forces; SOAP of dscribe and featomic of the same size beside."""
    case, size = setup.silicon, tuple(str(SILICON[key]) for key in ("n_max", "l_max", "cutoff"))
    zeta = setup.zetas[0]
    asked = {"values": ours(case, zeta, "values"), "and pulled back": ours(case, zeta, "pulled")}
    asked["dscribe, values"] = Asked(Path(sys.executable), "dscribe", size)
    if "featomic" in setup.pythons:
        asked["featomic, values"] = Asked(setup.pythons["featomic"], "featomic", size)
        asked["featomic, gradients"] = Asked(setup.pythons["featomic"], "featomic", (*size, "gradients"))
    return {"atoms": case.structures.n_atoms, "of": against(setup, case, asked)}


def show_stages(title: str, found: dict) -> None:
    rates = "products {gemm:.0f} Gflop/s, memory {memory:.0f} GB/s".format(**found["machine"])
    rows = [
        [f["stage"], *(f"{f[k]:.1f}" if k in f else "" for k in ("kflop", "kB")), f"{f['floor']:.1f}",
         f"{f['least']:.1f}", f"{f['median']:.1f}", f"{f['least'] / f['floor']:.1f}"]
        for f in found["stages"]
    ]  # fmt: skip
    print(f"{title}; one thread, {rates}, double precision; an atom:")
    print(common.table(rows, ["stage", "kflop", "kB", "floor us", "least us", "median us", "least / floor"]))
