"""Learning runs small enough for tests: a few atoms of aluminium, labelled by EMT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ase.build
import ase.io
import numpy as np
from ase import Atoms

from gpmlp.learning.labels import LabelFile
from gpmlp.learning.loop import LoopState, learn
from gpmlp.learning.recipe import LearnRecipe

FILES = ("labels.xyz", "model.gpmlp", "trajectory.xyz", "log.jsonl")
SMALL = {
    "start": "start.xyz",
    "oracle": {
        "calculator": "counting_oracle:Counting",
        "executor": "inline",
        "check_every": 0,
    },  # every answer is a label
    "dynamics": {"temperature_K": [100, 600], "steps": 40, "timestep_fs": 4.0, "ramp_steps": 30},
    "trigger": {
        "every": 5,
        "watch": 1,
        "cooldown": 5,
        "most_per_1000_steps": 500,
        "force": 0.012,
        "probability": 0.02,
        "likely": 0.02,
    },  # so that short runs ask
    "stop": {"every_frames": 5},
    "model": {"descriptor": {"n_max": 4, "l_max": 3, "cutoff": 4.0}, "inducing": {"n": 30, "gradients": 1}},
    "bootstrap": {"n": 3, "displacement_A": 0.02},
    "output": "out",
    "thin": 10,
    "seed": 1,
}


def cluster(distance: float = 2.7) -> Atoms:
    """Three atoms in vacuum."""
    return Atoms("Al3", distance * np.array([[0, 0, 0], [1, 0, 0], [0.5, 0.8, 0]]))


def crystal() -> Atoms:
    """Four atoms."""
    return ase.build.bulk("Al", cubic=True)


def merged(base: dict, more: dict) -> dict:
    out = dict(base)
    for key, value in more.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def recipe(**more: Any) -> LearnRecipe:
    """SMALL with some values changed; nested mappings are merged."""
    chosen = merged(SMALL, more)
    dynamics = chosen["dynamics"]
    if "ramp_steps" not in more.get("dynamics", {}):  # a run that is shorter has a shorter ramp
        dynamics["ramp_steps"] = min(dynamics["ramp_steps"], dynamics["steps"])
    return LearnRecipe.model_validate(chosen)


def prepare(folder: Path, atoms: Atoms | list[Atoms] | None = None) -> Path:
    """A folder with a start."""
    folder.mkdir(parents=True, exist_ok=True)
    ase.io.write(folder / "start.xyz", crystal() if atoms is None else atoms)
    return folder


def finish(chosen: LearnRecipe, folder: Path, resume: bool = False) -> LoopState:
    """Run until it stops, and return the last state."""
    return list(learn(chosen, folder, resume))[-1]


def events(folder: Path, name: str | None = None) -> list[dict]:
    """Of the log: all, or those of one name. Strict JSON."""

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    lines = (folder / "out" / "log.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=refuse) for line in lines]
    return [e for e in found if name in (None, e["event"])]


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / "out" / name).read_bytes() for name in FILES}


def tape(folder: Path) -> LabelFile:
    """The labels of a run in a folder."""
    return LabelFile(folder / "out" / "labels.xyz")
