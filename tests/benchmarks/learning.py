"""Learning on the fly against labels chosen at random and at uniform times, and against ten times as many; errors that were missed.

    python tests/benchmarks/learning.py [--cases al ...] [--seeds 0 1 2 3 4] [--json learning.json] [--work FOLDER] [--set KEY=VALUE ...]

Every case is one recipe (start, oracle, dynamics; all else as it is by default) and is run once for each seed. Models are tested on
forces of an independent trajectory of the oracle with the same protocol; rivals are fitted to as many frames of another such
trajectory, drawn at random or evenly spaced, and to ten times as many. Missed: steps of the trajectory, drawn at random and whether looked
at or not, at which the true error of some atom's force was above the limit that held; steps that were walked again after a label count as
they were in the end. False: labels for which it was below. A second table has the same by the number of labels of the model, beside
what the run foresaw. `--set stop.time_at_most_h=0.5` ends a run early; it is judged as far as it came.
"""

from __future__ import annotations

import argparse
import bisect
import json
import re
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.langevinbaoab import LangevinBAOAB

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common

import gpmlp
from gpmlp.core import calculators
from gpmlp.engines import md
from gpmlp.io.recipe_files import load_recipe_as
from gpmlp.learning import loop, walker
from gpmlp.learning.recipe import LearnRecipe

TIMES = 10  # as many labels in the large rival
TESTS = 100  # frames of the test trajectory
LENGTH = 12_000  # steps of a trajectory of the oracle, at most
SAMPLES = 2000  # steps of a run, as long as it may be, that are looked at by the oracle


@dataclass(frozen=True)
class Case:
    """A start, an oracle and dynamics; `frames`: of the oracle's own trajectories, for tests and rivals (0 = none are made)."""

    start: Atoms
    oracle: dict
    dynamics: dict
    frames: int = 1000


def _adsorbate() -> Atoms:
    slab = ase.build.fcc111("Cu", (3, 3, 3), vacuum=6.0)
    ase.build.add_adsorbate(slab, "O", 1.2, "fcc")
    slab.pbc = (True, True, False)
    slab.set_constraint(ase.constraints.FixAtoms(mask=[atom.tag == 3 for atom in slab]))
    return slab


def _waters() -> Atoms:
    rng = np.random.default_rng(3)
    cluster = Atoms()
    for corner in np.indices((2, 2, 1)).reshape(3, -1).T:
        water = ase.build.molecule("H2O")
        water.rotate(float(rng.uniform(0, 360)), rng.normal(size=3))
        water.translate(2.9 * corner)
        cluster += water
    return cluster


EMT = {"calculator": "emt", "executor": "inline"}
XTB = {"calculator": "tblite", "kwargs": {"method": "GFN2-xTB", "verbosity": 0}, "executor": "inline"}
CASES = {
    "al": lambda: Case(
        ase.build.bulk("Al", cubic=True).repeat((2, 2, 2)),
        EMT,
        {"temperature_K": [300, 1500], "timestep_fs": 4.0, "ramp_steps": 8000, "steps": 30_000},
    ),
    "cu_surface": lambda: Case(_adsorbate(), EMT, {"temperature_K": 500, "timestep_fs": 2.0}),
    "si_sw": lambda: Case(
        ase.build.bulk("Si", cubic=True).repeat((2, 2, 1)),
        {"calculator": "stillinger-weber", "executor": "inline"},
        {"temperature_K": [300, 2500], "timestep_fs": 2.0, "ramp_steps": 8000, "steps": 30_000},
    ),
    "ethanol": lambda: Case(
        ase.build.molecule("CH3CH2OH"), XTB, {"temperature_K": 500, "timestep_fs": 0.5, "steps": 60_000}, 700
    ),
    "water": lambda: Case(_waters(), XTB, {"temperature_K": 300, "timestep_fs": 0.5, "steps": 60_000}, 700),
}


def oracle_run(case: Case, recipe: LearnRecipe, seed: int, frames: int, path: Path) -> Path:
    """A trajectory of the oracle itself, with labels; made once."""
    if path.exists():
        return path
    atoms, dynamics = case.start.copy(), recipe.dynamics
    timestep = dynamics.timestep_fs or md.default_timestep_fs(atoms.numbers)
    one = walker.Walker.from_atoms(0, atoms, dynamics, seed)
    atoms = one.atoms.copy()
    atoms.calc = calculators.build_calculator(case.oracle["calculator"], case.oracle.get("kwargs", {}), path.parent)
    run = LangevinBAOAB(
        atoms, timestep * units.fs, temperature_K=dynamics.temperature(0),
        T_tau=dynamics.relaxation_fs * units.fs, rng=one.generator,
    )  # fmt: skip
    found = []
    steps = min(dynamics.steps, LENGTH)
    for step in range(1, steps + 1):
        run.set_temperature(dynamics.temperature(step))
        run.step()
        if step * frames // steps > (step - 1) * frames // steps:
            kept = atoms.copy()
            kept.set_constraint()
            labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(apply_constraint=False)}
            labels["energy"] = atoms.calc.results.get("free_energy", labels["energy"])  # which forces belong to
            if atoms.pbc.all():
                labels["stress"] = atoms.get_stress()
            kept.calc = SinglePointCalculator(kept, **labels)
            found.append(kept)
    ase.io.write(path, found)
    return path


def force_errors(potential, data) -> dict[str, float]:
    """Errors of the norm of forces (max, 99th percentile) and of components (mean, rms), meV/A; coverage of 90 % intervals."""
    structures, known = data
    predicted = potential(structures, variance="forces")
    error = predicted.forces - known.forces
    norm, std = error.norm(dim=1), predicted.forces_variance.total.sqrt()
    return {
        "mae": 1e3 * float(error.abs().mean()),
        "rmse": 1e3 * float(error.square().mean().sqrt()),
        "p99": 1e3 * float(np.quantile(norm.numpy(), 0.99)),
        "max": 1e3 * float(norm.max()),
        "coverage_90": float((error.abs() < 1.645 * std).double().mean()),
    }


@dataclass(frozen=True)
class Step:
    """A step of the run as the dynamics had it, with forces as predicted."""

    walker: int
    step: int
    positions: np.ndarray
    cell: np.ndarray
    forces: np.ndarray


@contextmanager
def sampled(share: float, seed: int) -> Iterator[list[Step]]:
    """Keep that share of all steps that walkers make meanwhile, drawn at random; of steps that are walked again the last time."""
    rng, kept, calculate = np.random.default_rng(seed), [], walker.RecordingCalculator.calculate
    reached: dict[int, int] = {}

    def keeping(self: walker.RecordingCalculator, atoms: Atoms | None = None, *others: object) -> None:
        calculate(self, atoms, *others)
        self.made = getattr(self, "made", 0) + 1
        number, first = (int(k) for k in re.match(r"walker (\d+), step (\d+)", self.label_in_errors).groups())
        step = first + self.made
        if step <= reached.get(number, 0):
            kept[:] = [one for one in kept if one.walker != number or one.step < step]
        reached[number] = step
        if rng.random() < share:
            about = self.atoms.positions.copy(), self.atoms.cell.array.copy(), self.results["forces"].copy()
            kept.append(Step(number, step, *about))

    walker.RecordingCalculator.calculate = keeping
    try:
        yield kept
    finally:
        walker.RecordingCalculator.calculate = calculate


def judged(folder: Path, case: Case, steps: Sequence[Step]) -> dict:
    """Share of the steps at which an error was above the limit that held then, and of labels asked for by the trigger that were not
    needed, each with its number of cases; and the steps by the number of labels that the model of their stride had: with the share above
    the limit, the share that was foreseen, and the median of the largest force error over the limit."""
    looks, limits, needed, labels = defaultdict(list), {}, [], 0
    for line in (folder / "log.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "look" and (not event.get("asked") or event.get("withheld")):  # others are walked again
            seen = event["step"], labels, event["threshold"], event.get("missed", float("nan"))
            looks[event["walker"]] = [one for one in looks[event["walker"]] if one[0] < event["step"]] + [seen]
        if event["event"] == "ask":
            limits[event["walker"]] = event["force_limit"]
        if event["event"] == "learned":
            labels = event["labels"]
            if (event.get("foreseen") or {}).get("largest_error") is not None:
                needed.append(event["foreseen"]["largest_error"] > limits[event["walker"]])
    atoms, groups = case.start.copy(), defaultdict(list)
    atoms.set_constraint()
    atoms.calc = calculators.build_calculator(case.oracle["calculator"], case.oracle.get("kwargs", {}), folder)
    for one in steps:
        mine = looks[one.walker]
        place = bisect.bisect_left(mine, one.step, key=lambda look: look[0])
        if place == len(mine):  # of a stride that did not end
            continue
        atoms.set_cell(one.cell)
        atoms.positions = one.positions
        _, n, limit, foreseen = mine[place]
        error = np.linalg.norm(one.forces - atoms.get_forces(), axis=1).max()
        groups[n].append((float(error / limit), foreseen))
    ratios = np.array([ratio for group in groups.values() for ratio, _ in group])
    return {
        "frames": len(ratios), "missed": float((ratios > 1).mean()) if len(ratios) else float("nan"), "asks": len(needed),
        "false": 1 - float(np.mean(needed)) if needed else float("nan"),
        "by_labels": {n: _of_steps(np.array(group)) for n, group in sorted(groups.items())},
    }  # fmt: skip


def _of_steps(group: np.ndarray) -> dict[str, float]:
    """From (steps, 2): error over limit, and the share of its stride that was foreseen to be above it."""
    ratio, foreseen = group.T
    return {"frames": len(group), "missed": float((ratio > 1).mean()), "foreseen": float(np.nanmean(foreseen)),
            "median_error_over_limit": float(np.median(ratio)), "largest_error_over_limit": float(ratio.max())}  # fmt: skip


def run(name: str, seed: int, work: Path, options: argparse.Namespace) -> dict:
    """Learn one case with one seed, and test what was learned beside its rivals."""
    case = CASES[name]()
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    ase.io.write(folder / "start.xyz", case.start)
    made = {"start": "start.xyz", "oracle": case.oracle, "dynamics": case.dynamics, "seed": seed, "thin": 10}
    (folder / f"recipe{seed}.yaml").write_text(json.dumps(made | {"output": f"run{seed}"}))
    recipe = load_recipe_as(LearnRecipe, folder / f"recipe{seed}.yaml", options.settings)
    start = time.perf_counter()
    with sampled(min(0.1, SAMPLES / recipe.dynamics.steps), seed) as steps:
        last = deque(loop.learn(recipe, folder, resume=(folder / f"run{seed}").exists()), maxlen=1)[0]
    wall = time.perf_counter() - start
    result = {
        "labels": last.labels, "stopped": last.stopped, "steps": sum(m.walker.step for m in last.progress.walkers),
        "wall_s": wall, "columns": last.model.online.factor.columns, "limit": last.limits.force,
        "restarts": sum(m.restarts for m in last.progress.walkers),
    }  # fmt: skip
    result |= judged(folder / f"run{seed}", case, steps)
    if case.frames and options.rivals:
        test = gpmlp.read(oracle_run(case, recipe, 1000 + seed, TESTS, folder / f"test{seed}.xyz"))
        pool = gpmlp.read(oracle_run(case, recipe, 2000 + seed, case.frames, folder / f"pool{seed}.xyz"))
        result["learned"] = force_errors(gpmlp.load(folder / f"run{seed}" / "model.gpmlp"), test)
        for rival, chosen in _rivals(last.labels, len(pool[0]), seed).items():
            potential, _ = gpmlp.fit(pool[0].select(chosen), pool[1].select(pool[0], chosen), recipe.model)
            result[rival] = force_errors(potential, test)
    return result


def _rivals(labels: int, frames: int, seed: int) -> dict[str, torch.Tensor]:
    order = torch.randperm(frames, generator=torch.Generator().manual_seed(seed))
    even = ((torch.arange(labels) + 0.5) * frames / labels).long()
    return {"random": order[:labels], "uniform": even, "ten times": order[: min(TIMES * labels, frames)]}


HEADER = [
    "case",
    "seed",
    "labels",
    "steps",
    "wall s",
    "missed %",
    "false %",
    "MAE",
    "p99",
    "max",
    "90 %",
    "random",
    "uniform",
    "x10",
    "stopped",
]


def row(name: str, seed: int, r: dict) -> list[str]:
    """One line of the table; errors in meV/A, of rivals MAE/p99/max."""

    def three(key: str) -> str:
        return "/".join(f"{r[key][k]:.0f}" for k in ("mae", "p99", "max")) if key in r else "-"

    own = r.get("learned")
    mine = (
        [f"{own['mae']:.1f}", f"{own['p99']:.0f}", f"{own['max']:.0f}", f"{100 * own['coverage_90']:.0f}"]
        if own
        else ["-"] * 4
    )
    return [
        name, str(seed), str(r["labels"]), str(r["steps"]), f"{r['wall_s']:.0f}", f"{100 * r['missed']:.1f}",
        f"{100 * r['false']:.0f}", *mine,
        three("random"), three("uniform"), three("ten times"), r["stopped"][:40],
    ]  # fmt: skip


BY_LABELS = ["labels", "frames", "missed %", "foreseen %", "median error/limit", "largest"]


def _by_labels(r: dict) -> list[list[str]]:
    return [
        [str(n), str(one["frames"]), f"{100 * one['missed']:.1f}", f"{100 * one['foreseen']:.1f}",
         f"{one['median_error_over_limit']:.2f}", f"{one['largest_error_over_limit']:.2f}"]
        for n, one in r["by_labels"].items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rivals", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--work", type=Path, default=Path("learning"), help="runs and trajectories are kept here")
    parser.add_argument("--json", type=Path, default=Path("learning.json"))
    options = parser.parse_args()
    results: dict[str, dict] = {}
    for name in options.cases:
        for seed in options.seeds:
            results[f"{name} {seed}"] = run(name, seed, options.work, options)
            print(common.table([row(name, seed, results[f"{name} {seed}"])], HEADER), flush=True)
            print(common.table(_by_labels(results[f"{name} {seed}"]), BY_LABELS), flush=True)
            options.json.write_text(json.dumps(results, indent=2) + "\n")
    print(common.table([row(*key.rsplit(" ", 1), r) for key, r in results.items()], HEADER))


if __name__ == "__main__":
    main()
