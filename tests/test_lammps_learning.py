"""gpmlp learn with dynamics in LAMMPS: halts, labels, goes on, and after a kill wherever it was ends as it would have ended."""

from __future__ import annotations

import json
import pydoc
import shutil
from pathlib import Path

import ase.build
import ase.io
import pytest
import yaml
from counting_oracle import LOG, answers
from lammps_runs import lammps, plugin

from gpmlp.cli.main import main
from gpmlp.core.errors import UserError
from gpmlp.io import archive, structure_files
from gpmlp.learning import lammps_runs
from gpmlp.learning.loop import learn
from gpmlp.learning.recipe import LearnRecipe
from gpmlp.native import library

pytestmark = pytest.mark.skipif(library.compiled() is None, reason="gpmlp was built without a compiler")

SCRIPT = """plugin load ${plugin}
units metal
if "${begun}" then "read_restart ${state}" else "read_data start.data" "velocity all create 600 1"
pair_style gpmlp
pair_coeff * * ${model} Cu
fix heat all nvt temp 300 3000 0.1
fix errors all pair 10 gpmlp sigma 1 novelty 1
compute worst all reduce max f_errors[1] f_errors[2]
variable worst equal c_worst[2]
fix stop all halt 10 v_worst > ${novelty} error continue message no
timestep 0.002
run 400 upto start 0 stop 400
write_restart ${next}
if "$(step) < 400" then "write_dump all extxyz ${halted} modify sort id element Cu"
"""
RECIPE = {
    "start": "start.xyz",
    "oracle": {"calculator": "counting_oracle:Counting", "executor": "inline", "check_every": 0},
    "dynamics": {"temperature_K": 1200},
    "trigger": {"novelty": 1.05},
    "lammps": {"input": "in.heat"},
    "model": {"descriptor": {"n_max": 4, "l_max": 3, "cutoff": 4.0}, "inducing": {"n": 30, "gradients": 1}},
    "bootstrap": {"n": 3, "displacement_A": 0.02, "strain": 0.0},
    "output": "out",
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """With start, script and plugin."""
    crystal = ase.build.bulk("Cu", cubic=True) * 2
    ase.io.write(tmp_path / "start.xyz", crystal)
    ase.io.write(tmp_path / "start.data", crystal, format="lammps-data", masses=True)
    (tmp_path / "in.heat").write_text(SCRIPT)
    monkeypatch.setattr(lammps_runs, "build_plugin", lambda path, made: (shutil.copy(plugin(), made), lammps()))
    monkeypatch.setenv(LOG, str(tmp_path / "answers"))
    return tmp_path


def finish(folder: Path, resume: bool = False, **more):
    """The last state of a run."""
    return list(learn(LearnRecipe.model_validate(RECIPE | more), folder, resume))[-1]


class KilledError(BaseException):
    """In place of a signal."""


@pytest.fixture
def uninterrupted(folder, tmp_path_factory):
    """The folder of a whole run, whose oracle's answers are in `answers`."""
    other = tmp_path_factory.mktemp("whole")
    shutil.copytree(folder, other, dirs_exist_ok=True)
    assert finish(other).stopped == "LAMMPS came to the end of in.heat"
    (folder / "answers").rename(other / "answers")
    return other


def test_it_learns_until_lammps_gets_through(uninterrupted):
    whole = uninterrupted
    events = [json.loads(line) for line in (whole / "out/log.jsonl").read_text().splitlines()]
    learned = [e for e in events if e["event"] == "learned"]
    assert 3 <= len(learned) <= 12 and learned[1]["reason"] == "LAMMPS halted (in.heat)"
    frames = structure_files.read_file(whole / "out/labels.xyz").frames
    assert len(frames) == len(answers(whole / "answers")) == 3 + len(learned) - 1
    assert "step 400" not in (whole / "out/lammps/log.lammps").read_text().splitlines()[-1]
    assert archive.load(whole / "out/model.gpmlp").novelty is not None
    assert not (whole / "out/lammps/ended").exists() and (whole / "out/lammps/state").exists()


PLACES = {
    "in LAMMPS": "gpmlp.learning.lammps_runs.LammpsRuns._run",
    "before the label": "gpmlp.learning.label_requests.LabelRequests.collect",
    "after the label": "gpmlp.learning.lammps_runs.LammpsRuns.done",
    "before a folder is removed": "shutil.rmtree",
    "in a checkpoint": "gpmlp.learning.checkpoint.RunFiles.save_checkpoint",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_was_killed_goes_on(place, folder, uninterrupted, monkeypatch):
    """Labels are those of the run that nobody killed, none of them asked for twice."""
    with monkeypatch.context() as patch:
        times = []

        def kill(*_, **__):
            times.append(1)
            if len(times) == (
                4 if place == "before the label" else 1 if "removed" in place else 2
            ):  # after three first ones
                raise KilledError
            return real(*_, **__)

        real = pydoc.locate(PLACES[place])
        patch.setattr(PLACES[place], kill)
        with pytest.raises(KilledError):
            finish(folder)
    assert finish(folder, resume=True).stopped == "LAMMPS came to the end of in.heat"
    assert (folder / "out/labels.xyz").read_bytes() == (uninterrupted / "out/labels.xyz").read_bytes()
    assert answers(folder / "answers") == answers(uninterrupted / "answers")


def test_the_command(folder, capfd):
    """With a command of the user's, a limit of labels, and a page on the labels."""
    recipe = RECIPE | {
        "stop": {"labels_at_most": 4},
        "lammps": {"input": "in.heat", "command": str(lammps().executable)},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["learn", str(folder / "recipe.yaml")]) == 0
    out = capfd.readouterr().out
    assert "4 labels" in out and "walkers" not in out
    assert (folder / "out/report/model/index.html").exists()
    assert (
        main(["learn", str(folder / "recipe.yaml"), "--resume", "--no-report", "--set", "stop.labels_at_most=5"]) == 0
    )
    assert len(structure_files.read_file(folder / "out/labels.xyz").frames) == 5


def test_what_cannot_be(folder):
    with pytest.raises(ValueError, match="dynamics.steps has no meaning where LAMMPS moves the atoms, .*in.heat"):
        LearnRecipe.model_validate(RECIPE | {"dynamics": {"temperature_K": 300, "steps": 5}})
    with pytest.raises(ValueError, match="stop.plateau has no meaning"):
        LearnRecipe.model_validate(RECIPE | {"stop": {"plateau": False}})
    with pytest.raises(UserError, match="in.none: there is no such file"):
        finish(folder, lammps={"input": "in.none"})
    (folder / "in.wrong").write_text("pair_style nonsense\n")
    with pytest.raises(UserError, match="LAMMPS ended with an error .*in.wrong(?s:.*)nonsense"):
        finish(folder, lammps={"input": "in.wrong"}, output="wrong")
    with pytest.raises(UserError, match="lammps.command: /none cannot be run"):
        finish(folder, lammps={"input": "in.heat", "command": "/none"}, output="none")
    (folder / "in.same").write_text("shell cp frame.xyz ${halted}\n")
    shutil.copy(folder / "start.xyz", folder / "frame.xyz")
    with pytest.raises(UserError, match="halted at a frame that the model has learned: the limit at which in.same"):
        finish(folder, lammps={"input": "in.same"}, output="same")
