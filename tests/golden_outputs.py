"""Golden outputs: what the package computes for small, fixed problems, written to OUTPUT_DIR/arrays.npz and OUTPUT_DIR/scalars.json.

    python tests/golden_outputs.py OUTPUT_DIR [PART ...]

Everything goes through the public API, the command line and the files that these write, in double precision, on one thread, with
fixed seeds, so that the same code gives the same bytes. Large matrices of a model file are kept as their products with a few
fixed vectors.
"""

from __future__ import annotations

# ruff: noqa: E402 - the number of threads is read when libraries are imported
import contextlib
import io
import json
import math
import os
import platform
import re
import runpy
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")

import ase.build
import ase.io
import numpy as np
import safetensors.torch
import torch
import yaml
from ase import Atoms, units
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.filters import FrechetCellFilter
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

import gpmlp
from gpmlp.engines.ase import GPCalculator
from gpmlp.fitting.online import OnlineFit
from gpmlp.io.ase_atoms import from_ase, structures_from_ase
from gpmlp.recipe import Recipe

DATA = Path(__file__).resolve().parents[1] / "data"
VECTORS = 3  # that large matrices are multiplied with
LARGE = 400  # numbers of a tensor beyond which it is large
PARTS = ("energies_variance", "atom_energies_variance", "forces_covariance", "stresses_covariance")
CAUSES = ("inducing", "data", "misspecification", "noise")
MEANS = ("energies", "atom_energies", "forces", "stresses")
# of a report or header: what differs from run to run, or is worded for people
NOT_COMPARED = (
    "stages",
    "warnings",
    "events",
    "how",
    "versions",
    "created",
    "version",
    "archive_sha256",
    "fingerprints",
)
NOT_COMPARED += ("sha256", "evidence", "memory_GB")


class Golden:
    """Arrays and texts by name, in the order they came."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.scalars: dict[str, float | str] = {}

    def array(self, name: str, values: Any) -> None:
        """Keep numbers under a name; integers stay integers."""
        values = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
        assert values.dtype.kind in "fiub" and name not in self.arrays, name
        self.arrays[name] = values.astype(np.float64) if values.dtype.kind == "f" else values.astype(np.int64)

    def tree(self, name: str, value: Any) -> None:
        """Keep what JSON holds: each number and each text by the path to it, lists of numbers as arrays."""
        if isinstance(value, dict):
            for key, entry in value.items():
                if key not in NOT_COMPARED:
                    self.tree(f"{name}/{key}", entry)
        elif isinstance(value, (list, tuple)):
            if value and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value):
                self.array(name, value)
            else:
                for i, entry in enumerate(value):
                    self.tree(f"{name}/{i}", entry)
        else:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            finite = not number or math.isfinite(value)
            folder = tempfile.gettempdir() + r"/[^/ ]+/"  # of this run
            self.scalars[name] = float(value) if number and finite else re.sub(folder, "", str(value))

    def tensor(self, name: str, values: torch.Tensor) -> None:
        """Keep a tensor of a model file: as it is, or where it is large its shape and its products with fixed vectors."""
        values = values.numpy()
        if values.size <= LARGE or values.dtype.kind != "f":
            self.array(name, values)
            return
        flat = values.reshape(-1, values.shape[-1]).astype(np.float64)
        self.tree(f"{name}.shape", "x".join(map(str, values.shape)))
        vectors = np.cos(np.outer(np.arange(flat.shape[1]), 1.0 + np.arange(VECTORS)))
        # sums of products by numpy's own loops: BLAS may split them differently by where memory lies
        self.array(f"{name}.products", (flat[:, :, None] * vectors).sum(1))

    def prediction(self, name: str, found: Any) -> None:
        """Keep all fields of a Prediction; of variances all causes together, of covariances one triangle."""
        for field in (*MEANS, "novelty"):
            if getattr(found, field) is not None:
                self.array(f"{name}/{field}", getattr(found, field))
        for field in PARTS:
            if (variance := getattr(found, field)) is not None:
                values = torch.stack([getattr(variance, cause) for cause in CAUSES])
                if values.dim() > 2:
                    rows, columns = np.triu_indices(values.shape[-1])
                    values = values[..., rows, columns]
                self.array(f"{name}/{field}", values)

    def model(self, name: str, path: Path) -> None:
        """Keep what a model file holds: header and tensors (features of the chosen centres, weights, posterior factor ...)."""
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["gpmlp"])["header"]
        self.tree(f"{name}/header", header)
        for key, values in sorted(safetensors.torch.load(data).items()):
            self.tensor(f"{name}/tensors/{key}", values)

    def trajectory(self, name: str, path: Path) -> None:
        """Keep positions, cells, results, and numbers in `info` and `arrays` of the frames of an extended XYZ file."""
        rows: dict[str, list[np.ndarray]] = {}
        for frame in ase.io.read(path, ":"):
            found = {"positions": frame.positions, "cells": frame.cell.array, "velocities": frame.get_velocities()}
            found |= frame.calc.results if frame.calc is not None else {}
            for key, value in {**frame.info, **frame.arrays, **found}.items():
                if np.asarray(value).dtype.kind in "fiub":
                    rows.setdefault(key, []).append(np.asarray(value).reshape(-1))
        for key, values in sorted(rows.items()):
            self.array(f"{name}/{key}", np.concatenate(values))

    def save(self, folder: Path) -> None:
        """Write all to a folder; bytes depend on the numbers alone."""
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / "arrays.npz", **{name.replace("/", "|"): v for name, v in self.arrays.items()})
        text = json.dumps(self.scalars, indent=0, allow_nan=False)
        (folder / "scalars.json").write_text(text + "\n")


def command(*arguments: object) -> str:
    """`python -m gpmlp ARGUMENTS` in this process; what it printed."""
    before, out, err = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = ["gpmlp", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_module("gpmlp", run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"gpmlp {arguments[0]} ended with {ended.code}: {err.getvalue()}") from ended
    finally:
        sys.argv = before
    return out.getvalue()


def everything(golden: Golden, name: str, potential: Any, structures: Any, few: int) -> None:
    """All that a potential says of structures; samples of the first `few`."""
    golden.prediction(f"{name}/calibrated", potential(structures, variance="all", novelty=True))
    some = structures.select(range(few))
    golden.prediction(f"{name}/raw", potential(some, variance="all", novelty=True, calibrated=False))
    golden.prediction(f"{name}/mean", potential(some))
    golden.prediction(f"{name}/local", potential(some, variance="atom_energies", novelty=True))
    golden.prediction(f"{name}/one atom", potential(some, variance="forces", atoms=[1]))
    golden.array(f"{name}/covariance", potential.covariance(structures.select([0]), calibrated=False).diagonal())
    for how in ("sample", "committee"):
        golden.prediction(f"{name}/{how}", getattr(potential, how)(3, seed=5)(structures.select([0])))
    golden.prediction(f"{name}/sample 1", potential.sample(2, seed=6, calibrated=False)[1](structures.select([0])))


# ---------------------------------------------------------------- parts


def silicon(golden: Golden, folder: Path) -> None:
    """Learned noises, value and gradient columns, calibration; the command line on the model file."""
    chosen = Recipe(
        descriptor={"cutoff": 4.5, "n_max": 5, "l_max": 4}, inducing={"n": 40, "gradients": 2}, kernel={"zeta": 3}
    )
    train = gpmlp.read(DATA / "silicon" / "train.xyz", "::5")
    potential, report = gpmlp.fit(*train, chosen, gpmlp.read(DATA / "silicon" / "validation.xyz", "::8"))
    golden.tree("silicon/report", report.as_dict())
    path = folder / "silicon.gpmlp"
    gpmlp.save(potential, path)
    golden.model("silicon/file", path)
    structures, _ = gpmlp.read(DATA / "silicon" / "test.xyz", "::10")
    everything(golden, "silicon", gpmlp.load(path), structures, 3)
    large = ase.build.bulk("Si", a=5.43, cubic=True) * (5, 5, 5)  # more atoms than are in memory together anywhere
    large.rattle(0.1, seed=2)
    found = gpmlp.load(path)(structures_from_ase([large, large[:30]]), variance="atom_energies")
    golden.array("silicon/large/forces", found.forces[::5])
    golden.array("silicon/large/energies", found.energies)
    golden.array("silicon/large/stresses", found.stresses)
    golden.array("silicon/large/local variances", found.atom_energies_variance.total[::5])


def silicon_commands(golden: Golden, folder: Path) -> None:
    """info, evaluate, select and md of the command line; needs `silicon`."""
    model, pool, start = folder / "silicon.gpmlp", folder / "pool.xyz", folder / "start.xyz"
    frames = ase.io.read(DATA / "silicon" / "test.xyz", "::4")
    ase.io.write(pool, frames)
    golden.tree("info", json.loads(command("info", model, "--json"))["header"]["report"])
    command("evaluate", model, pool, "--json", folder / "errors.json", "--xyz", folder / "beside.xyz")
    golden.tree("evaluate", json.loads((folder / "errors.json").read_text()))
    golden.trajectory("evaluate/xyz", folder / "beside.xyz")
    known = folder / "known.xyz"
    ase.io.write(known, ase.io.read(DATA / "silicon" / "train.xyz", "1::40"))
    ways = {
        "default": ["--model", model],
        "variance": ["--model", model, "--method", "variance"],
        "environments": ["--model", model, "--environments", "--exclude", known],
        "mahalanobis": ["--model", model, "--method", "mahalanobis"],
        "farthest": ["--exclude", known],
        "cur": ["--method", "cur"],
        "random": ["--method", "random", "--seed", 3],
    }
    for name, more in ways.items():
        command("select", pool, "-n", 4, "-o", folder / f"{name}.xyz", *more)
        picked = ase.io.read(folder / f"{name}.xyz", ":")
        where = [next(i for i, f in enumerate(frames) if f.positions.shape == p.positions.shape
                      and np.allclose(f.positions, p.positions)) for p in picked]  # fmt: skip
        golden.array(f"select/{name}/frames", where)
        golden.array(f"select/{name}/scores", [p.info["gpmlp_selected_score"] for p in picked])
        if name == "environments":
            golden.array("select/environments/atoms", np.concatenate([p.arrays["gpmlp_selected"] for p in picked]))
    ase.io.write(start, ase.build.bulk("Si", a=5.47, cubic=True))
    table = folder / "energies.txt"
    more = "--ensemble nvt --temperature-K 900 --steps 20 --interval 5 --uncertainty 10 --seed 4".split()
    command("md", model, start, "-o", folder / "md.xyz", "--energies", table, *more)
    golden.array("md/table", np.nan_to_num(np.loadtxt(table)))
    golden.trajectory("md/trajectory", folder / "md.xyz")


def silicon_engines(golden: Golden, folder: Path) -> None:
    """The ASE calculator in dynamics and in a relaxation of the cell; TorchSim where it is installed; needs `silicon`."""
    potential = gpmlp.load(folder / "silicon.gpmlp")
    atoms = ase.build.bulk("Si", a=5.6, cubic=True)
    atoms.rattle(0.1, seed=1)
    atoms.calc = GPCalculator(potential, uncertainty="all", novelty=True)
    atoms.get_potential_energy()
    for key, value in sorted(atoms.calc.results.items()):
        golden.array(f"calculator/{key}", value)
    atoms.calc = GPCalculator(potential, uncertainty="atom_energies", novelty=True)
    dynamics = VelocityVerlet(atoms, 2.0 * units.fs)
    rows = []
    for _ in dynamics.irun(15):
        rows.append([*atoms.positions.reshape(-1), atoms.get_potential_energy(), *atoms.calc.results["novelty"]])
    golden.array("calculator/dynamics", rows)
    crystal = ase.build.bulk("Si", a=5.6)
    crystal.calc = GPCalculator(potential)
    BFGS(FrechetCellFilter(crystal), logfile=None).run(fmax=0.01, steps=10)
    golden.array("calculator/relaxed", [*crystal.cell.array.reshape(-1), crystal.get_potential_energy()])
    golden.array("calculator/relaxed stress", crystal.get_stress())
    try:
        import torch_sim

        from gpmlp.engines.torchsim import GPModel
    except ImportError:
        return
    state = torch_sim.io.atoms_to_state([atoms, ase.build.bulk("Si", a=5.5)], torch.device("cpu"), torch.float64)
    for tables, wanted in ((None, "all"), (True, "atom_energies")):
        model = GPModel(potential, uncertainty=wanted, novelty=True, tables=tables)
        for key, value in sorted(model(state).items()):
            golden.array(f"torchsim/{'tables' if tables else 'batch'}/{key}", value)


def ethanol(golden: Golden, folder: Path) -> None:
    """Molecules of three elements; noises and signals given, so that nothing is searched for."""
    chosen = Recipe(
        descriptor={"cutoff": 4.0, "n_max": 4, "l_max": 3},
        inducing={"n": 40, "gradients": 2},
        noise={"energy_per_atom": 0.002, "force": 0.08, "config_types": {"ethanol_1000K": {"force": 0.15}}},
        signal={"H": 1.0, "C": 2.0, "O": 1.5},
    )
    potential, report = gpmlp.fit(*gpmlp.read(DATA / "ethanol" / "train.xyz", "::6"), chosen)
    golden.tree("ethanol/report", report.as_dict())
    gpmlp.save(potential, folder / "ethanol.gpmlp")
    golden.model("ethanol/file", folder / "ethanol.gpmlp")
    structures, targets = gpmlp.read(DATA / "ethanol" / "test.xyz", "::12")
    everything(golden, "ethanol", potential, structures, 2)
    command(
        "evaluate",
        folder / "ethanol.gpmlp",
        DATA / "ethanol" / "test.xyz",
        "--json",
        folder / "e.json",
        "--no-variance",
    )
    golden.tree("ethanol/evaluate", json.loads((folder / "e.json").read_text()))


def ethanol_default(golden: Golden, folder: Path) -> None:
    """What the data choose where no recipe is given, but for the number of centres; fitted by the command line."""
    train = folder / "train.xyz"
    frames = ase.io.read(DATA / "ethanol" / "train.xyz", ":")
    ase.io.write(train, frames[:3] + frames[3::9])
    command("fit", train, "-o", folder / "default.gpmlp", "--set", "inducing.n=24", "--set", "inducing.method=farthest")
    golden.model("default/file", folder / "default.gpmlp")
    structures, _ = gpmlp.read(DATA / "ethanol" / "test.xyz", "::20")
    golden.prediction("default", gpmlp.load(folder / "default.gpmlp")(structures, variance="all", novelty=True))


def two_descriptors(golden: Golden, folder: Path) -> None:
    """A short and a long descriptor, kernels of both kinds and their sum, other ways to choose; fewer columns for variances."""
    chosen = Recipe(
        descriptor=[
            {"cutoff": 3.5, "n_max": 4, "l_max": 3, "sigma_atom": 0.35},
            {"cutoff": 5.0, "n_max": 3, "l_max": 2, "basis": "gto", "cutoff_function": "poly", "radial_scaling": False},
        ],
        kernel=[
            {"name": "sum", "terms": [{"zeta": 2}, {"name": "exponential", "length": 0.6, "weight": 2.0}]},
            {"zeta": 2},
        ],
        inducing=[{"n": 25, "gradients": 1}, {"n": 15, "gradients": 0, "method": "cur"}],
        variance={"columns": 40},
    )
    potential, report = gpmlp.fit(*gpmlp.read(DATA / "silicon" / "train.xyz", "::7"), chosen)
    golden.tree("two/report", report.as_dict())
    gpmlp.save(potential, folder / "two.gpmlp")
    golden.model("two/file", folder / "two.gpmlp")
    everything(golden, "two", potential, gpmlp.read(DATA / "silicon" / "test.xyz", "3::25")[0], 2)


def dscribe(golden: Golden, folder: Path) -> None:
    """Descriptors of dscribe, both."""
    short = {"cutoff": 4.0, "n_max": 3, "l_max": 2}
    chosen = Recipe(
        descriptor=[short | {"name": "dscribe-soap"}, {"name": "dscribe-acsf", "cutoff": 4.0}],
        inducing={"n": 10, "gradients": 0},
        calibration=False,
    )
    potential, report = gpmlp.fit(*gpmlp.read(DATA / "silicon" / "train.xyz", "::27"), chosen)
    golden.tree("dscribe/report", report.as_dict())
    structures, _ = gpmlp.read(DATA / "silicon" / "test.xyz", "::40")
    golden.prediction("dscribe", potential(structures, variance="all", novelty=True))


def online(golden: Golden, folder: Path) -> None:
    """A model that is conditioned on labels one by one, loses some, gains and loses centres, and is made anew."""
    structures, targets = gpmlp.read(DATA / "ethanol" / "train.xyz", "3::12")
    test = gpmlp.read(DATA / "ethanol" / "test.xyz", "::30")[0]
    chosen = Recipe(descriptor={"cutoff": 3.5, "n_max": 4, "l_max": 2}, inducing={"n": 60, "gradients": 1})
    some = range(6)
    model = OnlineFit.begin(structures.select(some), targets.select(structures, some), chosen)
    golden.prediction("online/begun", model.potential(test, variance="all", novelty=True))

    def label(k: int) -> tuple[Any, Any]:
        return structures.select([k]), targets.select(structures, [k])

    for k in range(6, 12):
        model = model.learned(*label(k))
    golden.prediction("online/learned", model.potential(test, variance="all", novelty=True))
    golden.tree("online/report learned", model.potential.report)
    model = model.added(*label(12)).recalibrated()
    golden.prediction("online/added", model.potential(test, variance=["forces"], novelty=True))
    model = model.removed(2)
    golden.prediction("online/removed", model.potential(test, variance=["energies"]))
    model = model.extended(structures.select([13]), 70)
    golden.prediction("online/extended", model.potential(test, variance=["energies"]))
    model = model.without(0, 6, [0, 3])
    golden.prediction("online/without", model.potential(test, variance=["energies"]))
    for name, new in {"refreshed": model.refreshed("golden"), "rebuilt": model.rebuilt("golden")}.items():
        golden.prediction(f"online/{name}", new.potential(test, variance="all", novelty=True))
        golden.tree(f"online/report {name}", new.potential.report)
    gpmlp.save(new.potential, folder / "online.gpmlp")
    golden.model("online/file", folder / "online.gpmlp")


RUN: dict[str, Any] = {
    "start": "start.xyz",
    "oracle": {"calculator": "emt", "executor": "inline", "check_every": 4},
    "dynamics": {"temperature_K": [200, 700], "steps": 40, "timestep_fs": 4.0, "ramp_steps": 30},
    "trigger": {"every": 5, "watch": 1, "cooldown": 5, "most_per_1000_steps": 500, "force": 0.02},
    "stop": {"every_frames": 5, "at_least_steps": 10},
    "model": {"descriptor": {"n_max": 4, "l_max": 3, "cutoff": 4.0}, "inducing": {"n": 40, "gradients": 1}},
    "bootstrap": {"n": 4, "displacement_A": 0.05},
    "output": "out",
    "thin": 10,
    "seed": 1,
}


def merged(base: dict, more: dict) -> dict:
    """A mapping with some values replaced, in nested ones too."""
    out = dict(base)
    for key, value in more.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def begin_run(folder: Path, atoms: Atoms | list[Atoms], more: dict) -> Path:
    """A folder with a start and RUN, changed, as a recipe; the path of the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    ase.io.write(folder / "start.xyz", atoms)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(merged(RUN, more)))
    return folder / "recipe.yaml"


def numbers(value: Any) -> Iterator[float]:
    """All numbers in a JSON value, in order; texts are left out, what is none counts as zero."""
    if isinstance(value, dict):
        for key in sorted(value):
            yield from numbers(value[key])
    elif isinstance(value, list):
        for entry in value:
            yield from numbers(entry)
    elif not isinstance(value, str):
        yield float(value or 0.0)


ADDED = {"cause", "ended", "first"}  # texts in the lines of a log that came after the reference


def keep_run(golden: Golden, name: str, out: Path) -> None:
    """Keep what a learning run left: labels, trajectory, every number of its log, and the model."""
    golden.trajectory(f"{name}/labels", out / "labels.xyz")
    golden.trajectory(f"{name}/trajectory", out / "trajectory.xyz")
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    golden.tree(f"{name}/events", " ".join(e["event"] for e in events))
    for kind in sorted({e["event"] for e in events}):
        of_kind = [e for e in events if e["event"] == kind]
        golden.tree(f"{name}/log/{kind}/keys", " ".join(sorted({key for e in of_kind for key in e} - ADDED)))
        golden.array(f"{name}/log/{kind}", [x for e in of_kind for x in numbers(e)])
    golden.model(f"{name}/model", out / "model.gpmlp")
    frames = ase.io.read(out / "labels.xyz", ":")
    structures = structures_from_ase(frames[::3])
    golden.prediction(f"{name}/predicted", gpmlp.load(out / "model.gpmlp")(structures, variance="all", novelty=True))


def learning(golden: Golden, folder: Path) -> None:
    """Two walkers on four atoms of aluminium labelled by EMT, directed first labels, a bias."""
    more = {"dynamics": {"walkers": 2, "ahead": 2}, "oracle": {"workers": 2}, "explore": {"directed": 2, "bias": 0.05}}
    recipe = begin_run(folder / "walkers", ase.build.bulk("Al", cubic=True), more)
    command("learn", recipe, "--no-report")
    keep_run(golden, "learning", folder / "walkers" / "out")


def carving(golden: Golden, folder: Path) -> None:
    """One walker at constant pressure on a cell too large for the oracle, of which surrogates are labelled."""
    atoms = ase.build.bulk("Cu", cubic=True) * (4, 2, 2)
    more = {
        "dynamics": {"ensemble": "npt", "pressure_GPa": 1.0, "steps": 16, "ramp_steps": 12},
        "carve": {"above": 40},
        "trigger": {"force": 0.05},
        "stop": {"observable": [{"name": "energy"}, {"name": "pressure"}, {"name": "rdf"}]},
        "model": {"descriptor": {"n_max": 3, "l_max": 2, "cutoff": 3.2}},
    }
    recipe = begin_run(folder / "carved", atoms, more)
    command("learn", recipe, "--no-report")
    keep_run(golden, "carving", folder / "carved" / "out")


def labelled_by_emt(golden: Golden, folder: Path) -> None:
    """An alloy and clusters labelled here; given noises of frames, unknown labels, forces without stress, constraints of use."""
    frames = []
    for k in range(24):
        frame = ase.build.bulk("Cu", cubic=True) if k % 3 else Atoms("CuAu2", [[0, 0, 0], [2.6, 0, 0], [1.2, 2.3, 0]])
        frame.numbers[k % len(frame)] = 79
        frame.rattle(0.1, seed=k)
        frame.calc = EMT()
        found = {"energy": frame.get_potential_energy(), "forces": frame.get_forces()}
        if frame.pbc.any():
            found["stress"] = frame.get_stress()
        if k % 5 == 0:
            found.pop("energy")
        if k % 4 == 0:
            frame.info["force_noise"] = 0.02
        frame.calc = SinglePointCalculator(frame, **found)
        frames.append(frame)
    chosen = Recipe(
        descriptor={"cutoff": 4.0, "n_max": 3, "l_max": 3},
        inducing={"n": 20, "gradients": 1, "shares": {"Cu": 12, "Au": 8}},
        noise={"stress": {"start": 0.002, "bounds": [1e-4, 0.1]}},
        signal={"Cu": {"prior": {"median": 2.0, "factor": 3.0}}},
        kernel={"name": "exponential", "length": 0.7},
    )
    potential, report = gpmlp.fit(*from_ase(frames), chosen)
    golden.tree("alloy/report", report.as_dict())
    golden.prediction("alloy", potential(structures_from_ase(frames[:4]), variance="all", novelty=True))


STEPS = (
    silicon,
    silicon_commands,
    silicon_engines,
    ethanol,
    ethanol_default,
    two_descriptors,
    dscribe,
    online,
    labelled_by_emt,
    learning,
    carving,
)


def machine() -> dict[str, str]:
    """What last digits depend on beside the code."""
    cpu = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return found | {
        "cpu": cpu[0] if cpu else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def make(output: Path, only: Iterable[str] = ()) -> None:
    """Compute golden outputs and write them to a folder, with machine.json beside them."""
    torch.set_num_threads(1)
    golden, wanted = Golden(), tuple(only)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in STEPS:
            if not wanted or step.__name__ in wanted:
                began = time.perf_counter()
                step(golden, Path(scratch))
                print(f"{step.__name__:20s} {time.perf_counter() - began:6.1f} s", file=sys.stderr, flush=True)
    golden.save(output)
    (output / "machine.json").write_text(json.dumps(machine(), indent=0) + "\n")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    make(Path(sys.argv[1]), sys.argv[2:])
