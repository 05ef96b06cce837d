"""Files of commit d1a0732 (golden/old, old_files.py) still work: models predict what they did, runs go on, every recipe key is read."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import old_files
import pytest
from golden_outputs import machine
from old_files import MODELS, OLD
from test_golden import REFERENCE, difference

import gpmlp
from gpmlp import __main__ as entry

# Of the largest number of an array. Predictions are sums in which nothing is searched for; with other instructions or libraries
# more digits differ, where distances and variances are small differences of large numbers.
HERE = machine() == json.loads((REFERENCE / "machine.json").read_text())
ROUNDING = 1e-10 if HERE else 1e-6
SEARCHED = 1e-5  # what a search for the best noises leaves open
# what directions that move nothing add is told otherwise now (docs/decisions/014-groups-noise-columns.md)
VARIANCES = 2e-3
# the compiled core rounds the last digit of features otherwise than numba did, and distances divide that by the least spread there is
NOVELTY = 1e-7


@pytest.fixture
def command(monkeypatch, capsys):
    """`gpmlp ARGUMENTS` in this process: returns what it printed."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["gpmlp", *map(str, arguments)])
        status = entry.main()
        said = capsys.readouterr()
        assert not status, said.err
        return said.out

    return run


def apart(now: dict[str, np.ndarray], before: dict[str, np.ndarray], tolerance: float) -> list[str]:
    """A line for each array that is not what it was."""
    assert before and now.keys() == before.keys()
    found = {name: difference(np.asarray(now[name]), np.asarray(before[name])) for name in before}
    looser = {name: VARIANCES * ("variance" in name) + NOVELTY * ("novelty" in name) for name in before}
    return [
        f"{name}: {size:.1e}, {where}" for name, (size, where) in found.items() if size > max(tolerance, looser[name])
    ]


def numbers(value: Any, name: str = "") -> dict[str, np.ndarray]:
    """The numbers in a JSON value, lists of them as arrays, by the path to them."""
    plain = [v for v in (value if isinstance(value, list) else [value]) if type(v) in (int, float)]
    if plain and (not isinstance(value, list) or len(plain) == len(value)):
        return {name: np.array(value, dtype=float)}
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {k: v for key, entry in entries for k, v in numbers(entry, f"{name}/{key}").items()}


def scores_apart(now: Any, before: Any) -> list[str]:
    """A line for each number of an evaluation or a report that is not what it was."""
    now, before = numbers(now), numbers(before)
    assert now.keys() >= before.keys()  # newer versions may say more
    # of error bars more components count as zero by symmetry now, and ranks and shares jump where these have other last digits
    now, before = ({k: some[k] for k in before if "_mae_" in k or "_rmse_" in k} for some in (now, before))
    return apart(now, before, 100 * ROUNDING)  # errors are differences of large numbers


def predicted(name: str) -> dict[str, np.ndarray]:
    """What a model predicted when it was new."""
    with np.load(OLD / "predictions.npz") as stored:
        return {k.replace("|", "/"): stored[k] for k in stored.files if k.startswith(f"{name}|")}


def mean(numbers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a new fit has in common with an old one: its error bars and novelty are others (docs/decisions/012 to 015)."""
    return {
        k: v for k, v in numbers.items() if k.rpartition("/")[2] in ("energies", "atom_energies", "forces", "stresses")
    }


@pytest.mark.parametrize("name", MODELS)
def test_models_predict_what_they_did(name):
    potential = gpmlp.load(OLD / "models" / f"{name}.gpmlp")
    assert not apart(old_files.predictions(name, potential), predicted(name), ROUNDING)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_saved_again_is_the_same(name, tmp_path):
    path = tmp_path / "again.gpmlp"
    gpmlp.save(gpmlp.load(OLD / "models" / f"{name}.gpmlp"), path)
    assert not apart(old_files.predictions(name, gpmlp.load(path)), predicted(name), ROUNDING)


@pytest.mark.parametrize("name", MODELS)
def test_commands_on_models(name, tmp_path, command):
    model = OLD / "models" / f"{name}.gpmlp"
    header = json.loads(command("info", model, "--json"))["header"]
    assert header["report"]["rank"] > 0 and header["species"] == ([1, 6, 8] if name == "ethanol" else [14])
    assert "inducing" in command("info", model) and "@" in command("cite", model)
    command("evaluate", model, old_files.data_of(name)[0], "--json", tmp_path / "errors.json")
    before = json.loads((OLD / "evaluations.json").read_text())[name]
    now = json.loads((tmp_path / "errors.json").read_text())
    assert not scores_apart(now, before)


def test_every_key_of_a_recipe(tmp_path, command):
    train = tmp_path / "train.xyz"
    ase.io.write(train, ase.io.read(old_files.DATA / "silicon" / "train.xyz", "::9"))
    command("fit", train, "-o", tmp_path / "model.gpmlp", "--recipe", OLD / "every_key.yaml")
    found = old_files.predictions("every_key", gpmlp.load(tmp_path / "model.gpmlp"))
    assert not apart(*map(mean, (found, predicted("every_key"))), SEARCHED)


# ---------------------------------------------------------------- learning runs


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder, elsewhere, with what runs start from: recipe.yaml, start.xyz, emt_oracle.py."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for path in (OLD / "run").iterdir():
        if path.is_file() and not path.name.startswith("finished"):
            shutil.copy(path, folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "emt_oracle", raising=False)
    yield folder
    sys.modules.pop("emt_oracle", None)


def labels(folder: Path) -> dict[str, np.ndarray]:
    """All numbers of the labels of a run."""
    frames = ase.io.read(folder / "labels.xyz", ":")
    return {
        "steps": np.array([[f.info["walker"], f.info["step"]] for f in frames]),
        "positions": np.concatenate([f.positions for f in frames]),
        "cells": np.concatenate([f.cell.array for f in frames]),
        "energies": np.array([f.get_potential_energy() for f in frames]),
        "forces": np.concatenate([f.get_forces() for f in frames]),
        "stresses": np.concatenate([f.get_stress() for f in frames]),
    }


@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_run_goes_on_to_its_end(torn, place, command, monkeypatch):
    """As it was left; or with a label and a line of the log half written, too. No answer that is on the disk is asked for again.

    What is asked for from then on may differ: error bars and novelty are others (docs/decisions/012 to 015).
    """
    monkeypatch.setenv("EMT_KILLS_AT", "0")  # only counts
    out, finished = place / "out", OLD / "run" / "finished"
    shutil.copytree(OLD / "run" / "killed", out)
    known = labels(out)
    before = len(known["energies"])
    if torn:
        for name in ("labels.xyz", "log.jsonl"):
            data = (finished / name).read_bytes()
            there = (out / name).stat().st_size
            assert data[:there] == (out / name).read_bytes()
            (out / name).write_bytes(data[: there + 150])
    command("learn", place / "recipe.yaml", "--resume", "--no-report", "--set", "oracle.executor=inline")
    now = labels(out)
    assert len(now["energies"]) > before
    assert all(np.array_equal(now[name][: len(value)], value) for name, value in known.items())
    assert (out / "labels.xyz.broken").exists() == torn
    assert (place / "asked").stat().st_size == len(now["energies"]) - before - 1  # one was in the spool
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "stopped" and "all 40 steps of 2 walker(s) are made" in events[-1]["reason"]
    assert gpmlp.load(out / "model.gpmlp").novelty is not None


def test_a_finished_run_is_reported_and_prolonged(place, command):
    out = place / "out"
    shutil.copytree(OLD / "run" / "finished", out)
    command("report", out)
    assert (out / "report" / "index.html").stat().st_size > 100_000
    for name, path in {"finished": "report.json", "finished.model": "model/report.json"}.items():
        before = json.loads((OLD / "run" / f"{name}.json").read_text())
        now = json.loads((out / "report" / path).read_text())
        assert not scores_apart(now, before), path
    command("learn", place / "recipe.yaml", "--resume", "--no-report")
    before = labels(OLD / "run" / "finished")
    assert len(labels(out)["energies"]) == len(before["energies"])
    command("learn", place / "recipe.yaml", "--resume", "--no-report", "--set", "dynamics.steps=80")
    now = labels(out)
    assert len(now["energies"]) > len(before["energies"]) and now["steps"][:, 1].max() > 40
    assert all(np.array_equal(now[name][: len(before[name])], before[name]) for name in before)
