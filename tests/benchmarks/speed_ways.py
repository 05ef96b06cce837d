"""Ways to predict, each in turn with the usual one, pairs known: with standard deviations, in single precision, with the exact mean; and
how long a new process takes to its first prediction."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import bursts
import common
from speed_cases import Case
from speed_peers import Setup

from gpmlp.core import neighbors
from gpmlp.potential.potential import Potential

FIRST = """
import json, sys, time
times = {}
def took(name, call):
    start = time.perf_counter()
    found = call()
    times[name] = time.perf_counter() - start
    return found
took("import gpmlp", lambda: __import__("gpmlp"))
import gpmlp
took("and what a prediction needs", lambda: (gpmlp.load, gpmlp.read))
structures = gpmlp.read([sys.argv[2]])[0]
potential = took("load a model", lambda: gpmlp.load(sys.argv[1]))
for name in ("first prediction", "second prediction"):
    took(name, lambda: potential(structures))
for name in ("first with std", "second with std"):
    took(name, lambda: potential(structures, "atom_energies"))
print(json.dumps(times))
"""

Way = Callable[[Potential], tuple[Potential, str | None]]


def sigma(setup: Setup) -> dict:
    """With standard deviations of local energies: what they cost."""
    return _beside(setup, "mean", "with std", lambda potential: (potential, "atom_energies"))


def reduced(setup: Setup) -> dict:
    """With standard deviations of local energies from fewer columns, of models that have them."""

    def fewer(potential: Potential) -> tuple[Potential, str]:
        return potential.to(local_variance="reduced"), "atom_energies"

    return _beside(
        setup, "mean", "with std of fewer columns", fewer, lambda p: bool(p.variances and p.variances.reduced)
    )


def float32(setup: Setup) -> dict:
    """Descriptors in single precision."""
    return _beside(setup, "float64", "float32", lambda potential: (potential.to(descriptors="float32"), None))


def low_rank(setup: Setup) -> dict:
    """The exact mean, of models that have one of low rank."""
    return _beside(setup, "low rank", "exact", lambda potential: (potential.to(mean="exact"), None), has_low_rank)


def has_low_rank(potential: Potential) -> bool:
    return potential.recipe.mean == "low_rank" and any(term.low_rank for term in potential.terms)


def _beside(setup: Setup, usual: str, other: str, way: Way, of: Callable[[Potential], bool] = lambda _: True) -> dict:
    """Microseconds an atom of both, and how many times as long the other takes, of all models that `of` holds for."""
    found, rows = {}, []
    with bursts.pinned(bursts.cores()[0]):
        for case in (setup.silicon, setup.molecules):
            for zeta in setup.zetas:
                potential = case.potential(zeta)
                if of(potential):
                    runs = {usual: _call(case, potential, None), other: _call(case, *way(potential))}
                    found[f"{case.name}, zeta {zeta}"] = _ratio(setup, case, runs)
    for name, one in found.items():
        us = [f"{v:.1f}" for pair in one["us"].values() for v in pair]
        rows.append([name, *us, f"{one['least']:.2f}", str(bursts.Spread(*one["ratio"]))])
    print(f"us an atom, least and median, pairs known; in turn: ratio of medians (quartiles of {setup.rounds} rounds)")
    print(common.table(rows, ["", usual, "", other, "", "least / least", "ratio"]))
    return {"of": found}


def _call(case: Case, potential: Potential, variance: str | None) -> bursts.Burst:
    pairs = neighbors.find_neighbors(case.structures, potential.reach)
    return bursts.of(lambda: potential(case.structures, variance, pairs=pairs))


def _ratio(setup: Setup, case: Case, runs: dict[str, bursts.Burst]) -> dict:
    times, n = setup.in_turn(runs), case.structures.n_atoms
    usual, other = times.values()
    us = {name: [1e6 * t.least / n, 1e6 * t.median / n] for name, t in times.items()}
    ratio = other.over(usual)
    return {"us": us, "least": other.least / usual.least, "ratio": [ratio.low, ratio.median, ratio.high]}


def start(setup: Setup) -> dict:
    """Seconds from the start of a process, of --rounds of them: imports, the help, the first prediction and the second."""
    case, runs = setup.silicon, []
    environment = os.environ | dict.fromkeys(common.THREAD_VARIABLES, "1") | {"PYTHONPATH": str(common.ROOT)}
    model = case.model(setup.zetas[0]).absolute()

    def run(*arguments: object) -> tuple[float, str]:
        begun = time.perf_counter()
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return time.perf_counter() - begun, done.stdout

    for _ in range(setup.rounds):
        alone, help_ = run("-c", "pass")[0], run("-m", "gpmlp", "--help")[0]
        told = json.loads(run("-c", FIRST, model, case.path.absolute())[1])
        runs.append({"Python alone": alone, "gpmlp --help, the whole process": help_} | told)
    found = {name: [min(v), statistics.median(v)] for name in runs[0] for v in [[one[name] for one in runs]]}
    rows = [[name, f"{least:.3f}", f"{median:.3f}"] for name, (least, median) in found.items()]
    print(f"seconds, {case.structures.n_atoms} atoms, zeta {setup.zetas[0]}, {setup.rounds} processes")
    print(common.table(rows, ["", "least", "median"]))
    return {"atoms": case.structures.n_atoms, "zeta": setup.zetas[0], "of": found}
