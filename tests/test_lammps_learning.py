"""gpmlp learn with dynamics in LAMMPS: halts, labels, goes on, and after a kill wherever it was ends as it would have ended."""

from __future__ import annotations

import json
import pydoc
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ase.build
import ase.io
import pytest
import yaml
from counting_oracle import FAILS, LOG, answers
from lammps_runs import lammps, plugin

from gpmlp.cli.main import main
from gpmlp.core.errors import UserError
from gpmlp.io import archive, structure_files
from gpmlp.learning import lammps_runs
from gpmlp.learning.loop import learn
from gpmlp.learning.oracles.results import LockHolder
from gpmlp.learning.recipe import LammpsRecipe, LearnRecipe
from gpmlp.native import library
from gpmlp.report.run.collect import run_recipe

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


FAKE = """import json, os, sys
import ase.io, numpy as np
words, v = sys.argv[1:], {}
for i, word in enumerate(words):
    if word == "-var":
        v[words[i + 1]] = words[i + 2]
n = int(open(v["state"]).read()) if v["begun"] == "1" else 0
open(v["next"], "w").write(str(n + 1))
sys.stdout.buffer.write(b"\\xff")
frames = 2 if os.path.exists("two") else 1
if n < 3:
    atoms = ase.io.read("start.xyz")
    atoms.positions += np.random.default_rng(n).normal(size=atoms.positions.shape) * 0.1
    ase.io.write(v["halted"], [atoms] * frames, format="extxyz")
"""


@pytest.fixture
def fake(folder) -> Path:
    """With a program in place of LAMMPS, which halts three times."""
    (folder / "fake.py").write_text(FAKE)
    (folder / "p.so").write_text("")
    ase.io.write(folder / "start.xyz", ase.build.bulk("Cu", cubic=True))
    return folder


FAKED = {"lammps": {"input": "in.heat", "command": f"{sys.executable} fake.py", "plugin": "p.so"}}


def faked(folder: Path, resume: bool = False, **more):
    return finish(folder, resume, **(FAKED | more))


@pytest.mark.parametrize("when", ["before it is done with", "while it is removed"])
def test_a_kill_after_the_checkpoint(when, fake, tmp_path_factory, monkeypatch):
    """Each frame is learned once, in the round that it has without a kill."""
    whole = tmp_path_factory.mktemp("whole")
    shutil.copytree(fake, whole, dirs_exist_ok=True)
    assert faked(whole).labels == 6
    with monkeypatch.context() as patch:

        def kill(place, *_, **__):
            if "removed" in when:
                for path in Path(place).iterdir():
                    path.unlink()
            raise KilledError

        patch.setattr("shutil.rmtree" if "removed" in when else "gpmlp.learning.lammps_runs.LammpsRuns.done", kill)
        with pytest.raises(KilledError):
            faked(fake)
    assert faked(fake, resume=True).stopped == "LAMMPS came to the end of in.heat"
    assert (fake / "out/labels.xyz").read_bytes() == (whole / "out/labels.xyz").read_bytes()


def test_the_page_of_a_folder(fake):
    faked(fake, trigger={"novelty": 5})
    recipe = run_recipe(fake / "out")
    assert recipe.lammps and recipe.novelty_limit == 5


def test_the_engine_does_not_change(fake):
    faked(fake)
    with pytest.raises(UserError, match="LAMMPS moves the atoms of the run there, and gpmlp would"):
        list(learn(LearnRecipe.model_validate({k: v for k, v in RECIPE.items() if k != "lammps"}), fake, True))
    path = fake / "out/recipe.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lammps": None}))
    with pytest.raises(UserError, match="gpmlp moves the atoms of the run there, and LAMMPS would"):
        faked(fake, resume=True)


def test_a_frame_without_a_label_is_asked_for_again(fake, monkeypatch):
    oracle = RECIPE["oracle"] | {"retries": 0}
    faked(fake, oracle=oracle, stop={"labels_at_most": 3})
    with monkeypatch.context() as patch:
        patch.setenv(FAILS, "-1000")
        with pytest.raises(UserError, match=r"no label for that frame(?s:.*)not converged(?s:.*)--resume"):
            faked(fake, resume=True, oracle=oracle)
    assert faked(fake, resume=True, oracle=oracle).labels == 6


def test_a_script_that_writes_two_frames_is_run_again(fake):
    (fake / "two").touch()
    with pytest.raises(UserError, match="it wrote 2"):
        faked(fake)
    (fake / "two").unlink()
    assert faked(fake, resume=True).labels == 6


def test_lammps_left_behind_is_ended(fake):
    faked(fake, stop={"labels_at_most": 3})
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as left:
        attempt = fake / "out/lammps/attempt.old"
        attempt.mkdir(parents=True)
        (attempt / lammps_runs.PROCESS).write_text(LockHolder.of_process(left.pid).to_text())
        faked(fake, resume=True)
        assert left.wait(10) == -signal.SIGKILL and not attempt.exists()


def test_plugins_are_of_a_version(fake, monkeypatch):
    runs = lammps_runs.LammpsRuns(LammpsRecipe(input="in.heat"), fake, fake / "out")
    first = runs.plugin()
    assert first.exists() and runs.plugin() == first
    runs.installation = replace(runs.installation, version="1 Jan 2030")
    assert runs.plugin() != first


@pytest.mark.parametrize(
    "more, said",
    [
        ({"carve": {"above": 100}}, "carve is of gpmlp's own dynamics"),
        ({"trigger": {"novelty": None}}, "LAMMPS would never halt"),
        ({"lammps": {"input": "x", "command": 'lmp "x'}}, "is no command of a shell: No closing quotation"),
        ({"lammps": {"input": "x", "command": "  "}}, "is empty"),
        ({"model": {"descriptor": {"name": "dscribe-soap"}}}, "leave out the descriptor dscribe-soap"),
        ({"model": {"descriptor": {"name": "sevennet"}}}, "leave out the descriptor sevennet"),
        ({"model": {"descriptor": {"beside": {"name": "sevennet"}}}}, "leave out descriptor.beside"),
        ({"model": {"baseline": {"network": {"name": "sevennet"}}}}, "without baseline.network"),
        ({"model": {"baseline": {"calculator": {"name": "emt"}}}}, "without baseline.calculator"),
        ({"model": {"long_range": {"dispersion": {"d3": {"functional": "pbe"}}}}}, "without long_range.dispersion.d3"),
        ({"model": {"dtype": "float32"}}, "float64"),
    ],
)
def test_what_lammps_cannot_take_is_told_at_once(more, said):
    with pytest.raises(ValueError, match=said):
        LearnRecipe.model_validate(RECIPE | more)


def test_starts_with_moments_are_refused(fake):
    atoms = ase.io.read(fake / "start.xyz")
    atoms.set_initial_magnetic_moments([2.0] * len(atoms))
    ase.io.write(fake / "start.xyz", atoms)
    with pytest.raises(UserError, match="frame 0 has initial magnetic moments"):
        faked(fake)
