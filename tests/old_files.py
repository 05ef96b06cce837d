"""Files that the package wrote before its modules moved (commit d1a0732), and how they were made. In a checkout of that commit, with
this file and tests/golden/old/run beside its tests:

    OMP_NUM_THREADS=1 PYTHONPATH=$PWD python tests/old_files.py /tmp/old

models/*.gpmlp are model files, predictions.npz what `predictions` gave for them, evaluations.json what `gpmlp evaluate` did. run/ is a
learning run: recipe, start and oracle; `finished`, to which nothing happened, with the numbers of its report; `killed`, ended by SIGKILL
when it waited for a label that then came to lie in the spool. They are not made anew: that later versions read them is what they are for.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import ase.build
import ase.io
import numpy as np
import torch

import gpmlp
from gpmlp.recipe import Recipe

OLD = Path(__file__).resolve().parent / "golden" / "old"
DATA = Path(__file__).resolve().parents[1] / "data"
SMALL = {"cutoff": 4.0, "n_max": 3, "l_max": 2}
RECIPES: dict[str, dict[str, Any]] = {
    "silicon": {"descriptor": SMALL, "inducing": {"n": 20, "gradients": 1}},
    "vfe": {
        "descriptor": SMALL | {"cutoff": 5.0, "cutoff_function": "poly"},
        "inducing": {"n": 20, "gradients": 0, "method": "cur"},
        "evidence": "vfe",
        "use_stresses": False,
    },
    "mean": {
        "descriptor": SMALL | {"cutoff_function": "none", "radial_scaling": False},
        "inducing": {"n": 20, "gradients": 2, "method": "random"},
        "baseline": {"zbl": False, "isolated_atoms": "least_squares"},
        "variance": False,
        "novelty": False,
        "calibration": False,
    },
    "ethanol": {
        "descriptor": [{"cutoff": 3.0, "n_max": 2, "l_max": 1}, {"cutoff": 4.5, "n_max": 2, "l_max": 1, "sigma_atom": 0.6}],
        "kernel": [{"name": "sum", "terms": [{"zeta": 2}, {"name": "exponential", "weight": 0.5}]}, {"zeta": 2}],
        "inducing": [{"n": 12, "gradients": 1, "shares": {"C": 4, "H": 5, "O": 3}}, {"n": 9, "gradients": 0}],
        "variance": {"columns": 25},
    },
}  # fmt: skip
MODELS = (*RECIPES, "sample", "every_key")  # a sample of `silicon`; what every_key.yaml gives
CAUSES = ("inducing", "data", "misspecification", "noise")
PARTS = ("energies_variance", "atom_energies_variance", "forces_covariance", "stresses_covariance")


def data_of(name: str) -> tuple[Path, str]:
    """The data that a model is held against, and the frames of them that it predicts."""
    kind, frames = ("ethanol", "::30") if name == "ethanol" else ("silicon", "5::40")
    return DATA / kind / "test.xyz", frames


def predictions(name: str, potential: Any) -> dict[str, np.ndarray]:
    """What a model says, calibrated and not, with all that it can give."""
    structures, out = gpmlp.read(*data_of(name))[0], {}
    sure = potential.variances is not None
    for calibrated in (True, False):
        found = potential(structures, "all" if sure else None, potential.novelty is not None, calibrated=calibrated)
        for field in ("energies", "atom_energies", "forces", "stresses", "novelty"):
            if getattr(found, field) is not None:
                out[f"{name}/{calibrated}/{field}"] = getattr(found, field).numpy()
        for field in PARTS if sure else ():
            variance = getattr(found, field)
            out[f"{name}/{calibrated}/{field}"] = np.stack([getattr(variance, cause).numpy() for cause in CAUSES])
    if sure:
        out[f"{name}/sample"] = potential.sample(2, seed=3)(structures).forces.numpy()
    return out


def gpmlp_command(*arguments: object, code: int = 0, **environment: str) -> None:
    """`python -m gpmlp ARGUMENTS`, which has to end with this code."""
    command = [sys.executable, "-m", "gpmlp", *map(str, arguments)]
    ended = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr


def make_models(out: Path) -> None:
    """Model files and their predictions."""
    (out / "models").mkdir(parents=True)
    for name, recipe in RECIPES.items():
        kind, frames = ("ethanol", "::8") if name == "ethanol" else ("silicon", "::6")
        potential, _ = gpmlp.fit(*gpmlp.read(DATA / kind / "train.xyz", frames), Recipe(**recipe))
        gpmlp.save(potential, out / "models" / f"{name}.gpmlp")
    gpmlp.save(gpmlp.load(out / "models" / "silicon.gpmlp").sample(2, seed=1)[1], out / "models" / "sample.gpmlp")
    train, errors = out / "train.xyz", out / "errors.json"
    ase.io.write(train, ase.io.read(DATA / "silicon" / "train.xyz", "::9"))
    gpmlp_command("fit", train, "-o", out / "models" / "every_key.gpmlp", "--recipe", OLD / "every_key.yaml")
    found: dict[str, np.ndarray] = {}
    evaluations: dict[str, dict] = {}
    for name in MODELS:
        path = out / "models" / f"{name}.gpmlp"
        found |= predictions(name, gpmlp.load(path))
        gpmlp_command("evaluate", path, data_of(name)[0], "--json", errors)
        evaluations[name] = json.loads(errors.read_text())
    (out / "evaluations.json").write_text(json.dumps(evaluations, indent=0) + "\n")
    train.unlink()
    errors.unlink()
    np.savez_compressed(out / "predictions.npz", **{k.replace("/", "|"): v for k, v in found.items()})


def make_runs(out: Path) -> None:
    """A learning run to which nothing happens, and one that is killed."""
    out.mkdir()
    for name in ("finished", "killed"):
        folder = out.parent / "run of old"
        shutil.copytree(OLD / "run", folder)
        atoms = ase.build.bulk("Al", cubic=True)
        atoms.rattle(0.05, seed=3)
        ase.io.write(folder / "start.xyz", atoms)
        dies = {"EMT_KILLS_AT": "11"} if name == "killed" else {}
        gpmlp_command("learn", folder / "recipe.yaml", code=-9 if dies else 0, **dies)
        time.sleep(2)  # until the worker that is left has ended
        shutil.move(folder / "out", out / name)
        for file in ("recipe.yaml", "start.xyz", "emt_oracle.py"):
            shutil.copy(folder / file, out / file)
        shutil.rmtree(folder)
    report = out / "finished" / "report"
    shutil.move(report / "report.json", out / "finished.json")
    shutil.move(report / "model" / "report.json", out / "finished.model.json")
    shutil.rmtree(report)
    for lock in (out / "killed" / "spool").glob("*.lock"):
        held = json.loads(lock.read_text())
        lock.chmod(0o644)
        lock.write_text(json.dumps(held | {"host": "elsewhere", "machine": "elsewhere"}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    make_models(Path(sys.argv[1]))
    make_runs(Path(sys.argv[1]) / "run")
