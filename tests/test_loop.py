"""Whole learning runs of a few atoms: what they leave behind, what is asked for and what is not, and how they go on or are refused."""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import re
import shutil
from dataclasses import replace

import ase.io
import counting_oracle
import numpy as np
import pytest
from ase import Atoms
from counting_oracle import answers
from learning_runs import cluster, contents, crystal, events, finish, prepare, recipe, tape

from gpmlp.core.errors import UserError
from gpmlp.io import archive
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.learning import checkpoint
from gpmlp.learning.labels import LabelFile
from gpmlp.learning.loop import learn
from gpmlp.learning.model import OnlineModel
from gpmlp.report.run.collect import read_labels

LIMIT = "0.06"  # eV, above which an oracle fails: some of the labels after the first ones are


@pytest.fixture(autouse=True)
def log(tmp_path, monkeypatch):
    """Where the oracle writes down what it answered."""
    monkeypatch.setenv(counting_oracle.LOG, str(tmp_path / "answers"))
    return tmp_path / "answers"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, last state) of a run that nothing happened to; not to be written to."""
    folder = prepare(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(counting_oracle.LOG, str(folder / "answers"))
        return folder, finish(recipe(), folder)


# ---------------------------------------------------------------- a run


def test_a_run(finished):
    folder, last = finished
    assert last.phase == "stopped" and last.stopped.startswith("all 40 steps of 1 walker(s) are made")
    assert last.verdict is not None and not last.verdict.stop
    assert last.labels == len(tape(folder)) == last.model.online.n_labels == last.calls > 5
    assert last.refused == 0 and last.progress.walkers[0].walker.step == 40
    potential = archive.load(folder / "out" / "model.gpmlp")
    assert potential.provenance == {"learned": {"labels": last.labels, "oracle": "counting_oracle:Counting"}}
    structures, targets = tape(folder).structures_and_targets()
    known, saved = last.model.potential(structures), potential(structures)
    assert (known.forces - saved.forces).abs().max() < 1e-12
    assert (saved.forces - targets.forces).abs().mean() < 0.01
    assert not list((folder / "out" / "spool").glob("*.json")) and not list((folder / "out" / "scratch").iterdir())


def test_nothing_is_asked_twice(finished):
    folder, last = finished
    found = answers(folder / "answers")
    assert len(found) == len(set(found)) == last.labels


def test_the_log(finished):
    folder, last = finished
    found = events(folder)
    names = [e["event"] for e in found]
    assert set(names) == {"learned", "look", "ask", "judged", "stopped"} and names[0] == "learned"
    learned, asks = events(folder, "learned"), events(folder, "ask")
    assert [e["labels"] for e in learned] == list(range(3, last.labels + 1))
    assert len(asks) == len(learned) - 1 and all(e["reason"] and e["atoms"] for e in asks)
    assert [e["reason"] for e in asks] == [e["reason"].removeprefix("halted: ") for e in learned[1:]]
    assert [e.reason for e in tape(folder)][3:] == [e["reason"] for e in learned[1:]]
    assert found[-1] == {"event": "stopped", "reason": last.stopped, "ended": "steps"}
    looks = events(folder, "look")
    ahead = [ask["step"] - look["step"] for ask, look in zip(asks, (e for e in looks if e.get("asked")), strict=True)]
    assert min(ahead) >= 0 < max(ahead) <= recipe().trigger.every
    assert all(math.isfinite(e["pressure_GPa"]) for e in looks)
    told = (folder / "out" / "run.log").read_text()
    assert "learned: reason first labels" in told and "stopped" in told and "look:" not in told


def test_the_tape_says_where_labels_come_from(finished):
    folder, _ = finished
    notes = [dict(e.notes) for e in tape(folder)]
    assert notes[0] == {"walker": -1, "step": 0}
    assert notes[-1]["time_fs"] == 4.0 * notes[-1]["step"] and notes[-1]["walker"] == 0


def test_the_trajectory_is_thinned(finished):
    folder, _ = finished
    frames = ase.io.read(folder / "out" / "trajectory.xyz", index=":")
    steps = [f.info["step"] for f in frames]
    assert [s // 10 for s in steps] == [0, 1, 2, 3, 4] and steps == sorted(steps)
    assert frames[-1].info["time_fs"] == 160.0 and all(f.info["temperature_K"] > 0 for f in frames)
    assert all({"forces_std", "novelty", "momenta"} <= set(f.arrays) and "masses" not in f.arrays for f in frames)


def test_a_frame_is_as_the_model_of_its_time_saw_it(finished):
    """A frame is written at the first look at its step that does not ask, by the model that was taught the labels before that."""
    folder, last = finished
    entries, found = list(tape(folder)), events(folder)
    looks = [(k, e["step"]) for k, e in enumerate(found) if e["event"] == "look" and not e.get("asked")]
    first = len(last.progress.first)
    student, known = OnlineModel.from_labels(entries[:first], recipe().model, recipe().refresh), first
    for frame in ase.io.read(folder / "out" / "trajectory.xyz", index=":"):
        at = next(k for k, step in looks if step == frame.info["step"])
        learned = first - 1 + sum(e["event"] == "learned" for e in found[:at])
        for entry in entries[known:learned]:
            student = student.with_label(entry)
        known = learned
        there = student.potential(structures_from_ase([frame]))
        np.testing.assert_allclose(frame.get_forces(), there.forces.numpy(), atol=1e-7)  # the file has 8 digits
    assert known > first  # the run had learned between its frames


def test_a_stride_in_which_a_label_is_asked_for_is_made_again(finished):
    """Whatever is kept was decided upon by a model that asked for nothing there."""
    folder, last = finished
    kept, asked = 0, []
    for event in events(folder):
        if event["event"] == "look" and not event.get("asked"):
            assert (
                kept < event["step"] <= kept + recipe().trigger.every and event["exceedance"] <= recipe().trigger.likely
            )
            kept = event["step"]
        elif event["event"] == "ask" and event["action"] == "label":
            asked.append(event["step"] - kept)  # where the walker goes on from
    assert kept == last.progress.walkers[0].walker.step == 40
    assert asked and 0 < min(asked) and max(asked) <= 2 * recipe().trigger.every


def test_states_are_told_as_they_come(tmp_path):
    prepare(tmp_path)
    phases = [s.phase for s in learn(recipe(dynamics={"steps": 10}), tmp_path)]
    assert phases[:3] == ["first labels"] * 3 and phases[-1] == "stopped"
    assert {"dynamics", "labelling", "learning"} <= set(phases)


def test_same_seed_same_run(finished, tmp_path):
    folder, _ = finished
    finish(recipe(), prepare(tmp_path / "same"))
    assert contents(tmp_path / "same") == contents(folder)
    finish(recipe(seed=2, dynamics={"steps": 5, "ramp_steps": 5}), prepare(tmp_path / "other"))
    assert contents(tmp_path / "other")["labels.xyz"][:2000] != contents(folder)["labels.xyz"][:2000]


def test_interrupted_between_any_two_states(finished, tmp_path):
    """Ended after each seventh state and resumed, over and over, checkpoint or not; the run is the same, and nothing is asked twice."""
    folder, last = finished
    prepare(tmp_path)
    for number in range(7, 400, 7):
        states = learn(recipe(), tmp_path, resume=True)
        state = list(itertools.islice(states, number % 31 + 2))[-1]
        states.close()
        if state.phase == "stopped":
            break
    else:
        state = finish(recipe(), tmp_path, resume=True)
    assert state.stopped == last.stopped
    assert contents(tmp_path) == contents(folder)
    assert sorted(answers(tmp_path / "answers")) == sorted(answers(folder / "answers"))


def test_a_run_with_all_functionals_is_the_same_however_often_it_ends(tmp_path):
    """Its model is the exact process of its labels, whose factor labels border."""
    more = {"model": {"inducing": {"functionals": "all"}}, "trigger": {"force": 0.004}}
    last = finish(recipe(**more), prepare(tmp_path / "whole"))
    learned = events(tmp_path / "whole", "learned")
    # energy, forces but their sum, and stress of four atoms
    assert [e["columns"] for e in learned] == [16 * e["labels"] for e in learned] and len(learned) > 2
    assert archive.load(tmp_path / "whole/out/model.gpmlp").variances.local_blocks is not None
    folder = prepare(tmp_path / "ended")
    for number in range(1, 60):
        states = learn(recipe(**more), folder, resume=True)
        state = list(itertools.islice(states, 11 * number % 31 + 5))[-1]
        states.close()
        if state.phase == "stopped":
            break
    assert state.stopped == last.stopped
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_finished_run_stays_as_it_is(tmp_path):
    short = recipe(dynamics={"steps": 10, "ramp_steps": 10})
    first = finish(short, prepare(tmp_path))
    before = contents(tmp_path)
    again = finish(short, tmp_path, resume=True)
    assert again.stopped == first.stopped and again.calls == 0 and contents(tmp_path) == before


def test_more_steps_for_a_finished_run(tmp_path):
    first = finish(recipe(dynamics={"steps": 10}), prepare(tmp_path))
    before = contents(tmp_path)
    last = finish(recipe(dynamics={"ramp_steps": 10}), tmp_path, resume=True)
    assert (first.progress.walkers[0].walker.step, last.progress.walkers[0].walker.step) == (10, 40)
    assert last.progress.labels > first.progress.labels and last.calls == last.labels - first.labels
    for name in ("labels.xyz", "trajectory.xyz", "log.jsonl"):
        assert contents(tmp_path)[name].startswith(before[name])


# ---------------------------------------------------------------- folders and recipes


def test_a_run_is_not_written_over(finished):
    folder, _ = finished
    with pytest.raises(
        UserError, match=r"out: holds a run already; go on with it \(--resume\), or choose another output"
    ):
        finish(recipe(), folder)


@pytest.mark.parametrize(
    ("key", "more"),
    [
        ("seed = 1, the recipe says 2", {"seed": 2}),
        ("trigger.force = 0.012, the recipe says 0.5", {"trigger": {"force": 0.5}}),
        ("dynamics.temperature_K", {"dynamics": {"temperature_K": 300}}),
        ("explore.directed", {"explore": {"directed": 1}}),
        ("oracle.calculator", {"oracle": {"calculator": "emt"}}),
        ("oracle.stress", {"oracle": {"stress": False}}),
        ("model.descriptor.n_max", {"model": {"descriptor": {"n_max": 5}}}),
        ("bootstrap.n", {"bootstrap": {"n": 4}}),
        ("refresh.drift", {"refresh": {"drift": 9.0}}),
        ("give dynamics.ramp_steps: 30", {"dynamics": {"ramp_steps": 20}}),
    ],
)
def test_another_recipe_cannot_go_on(finished, key, more):
    folder, _ = finished
    before = contents(folder), (folder / "out" / "recipe.json").read_bytes()
    with pytest.raises(UserError) as error:
        finish(recipe(**more), folder, resume=True)
    assert key in str(error.value)
    assert (contents(folder), (folder / "out" / "recipe.json").read_bytes()) == before


def test_what_may_change(finished, tmp_path):
    short = {"dynamics": {"steps": 10, "ramp_steps": 10}}
    finish(recipe(**short), prepare(tmp_path))
    oracle = {"workers": 2, "executor": "processes", "timeout_s": 99.0, "retries": 2, "at_most_failures": 9}
    last = finish(recipe(**short, oracle=oracle, stop={"at_least_steps": 7}, thin=5), tmp_path, resume=True)
    assert last.phase == "stopped"


def test_a_run_goes_on_whose_recipe_says_what_it_now_leaves_open(tmp_path):
    """Runs of versions in which a fit that is told nothing of four-body invariants had none."""
    short = {"dynamics": {"steps": 10, "ramp_steps": 10}}
    finish(recipe(**short), prepare(tmp_path))
    path = tmp_path / "out" / "recipe.json"
    before = json.loads(path.read_text())
    assert before["model"]["descriptor"]["four_body"] is None
    before["model"]["descriptor"]["four_body"] = False
    path.write_text(json.dumps(before))
    assert finish(recipe(**short), tmp_path, resume=True).phase == "stopped"
    with pytest.raises(UserError, match="model.descriptor.four_body = False, the recipe says 'auto'"):
        finish(recipe(**short, model={"descriptor": {"four_body": "auto"}}), tmp_path, resume=True)


def test_two_at_a_time_are_refused(tmp_path):
    prepare(tmp_path)
    states = learn(recipe(), tmp_path)
    next(states)
    with pytest.raises(UserError, match="another process is at work on this run"):
        finish(recipe(), tmp_path, resume=True)
    states.close()


def test_an_oracle_that_cannot_be_used_leaves_nothing_behind(tmp_path):
    prepare(tmp_path)
    with pytest.raises(UserError, match="nonsense"):
        finish(recipe(oracle={"calculator": "fake_oracles:Strict", "kwargs": {"nonsense": 1}}), tmp_path)
    assert finish(recipe(dynamics={"steps": 5}), tmp_path).phase == "stopped"


@pytest.mark.parametrize("name", ["log.jsonl", "trajectory.xyz", "labels.xyz"])
def test_files_that_were_cut_are_told(tmp_path, name):
    finish(recipe(dynamics={"steps": 10}), prepare(tmp_path))
    (tmp_path / "out" / name).write_bytes(b"")
    with pytest.raises(UserError, match="shorter than the run left it|holds 0 labels, of .* that the run had"):
        finish(recipe(dynamics={"steps": 10}), tmp_path, resume=True)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("energy", "its energy, forces, stress or notes are not those that were written"),
        ("element", "its elements, positions, cell, `key` or `oracle` are not those that it was labelled with"),
        ("order", "is whole but"),
        ("last", r"holds \d+ labels, of \d+ that the run had"),
        ("another", "labels are not those that the run wrote"),
        ("older", "was not written by the run, or lost its checksum"),
    ],
)
def test_labels_that_were_altered_are_refused(name, what, finished, tmp_path):
    """By a run that is resumed and by a report, with what differs; the folder stays as it is."""
    folder, _ = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "out" / "labels.xyz"
    frames = re.split(rb"^(?=4\n)", path.read_bytes(), flags=re.MULTILINE)[1:]
    assert len(frames) > 5
    if name == "energy":
        frames[2] = re.sub(rb" energy=\S+", b" energy=-0.125", frames[2])
    elif name == "element":
        frames[-1] = frames[-1].replace(b"Al ", b"Cu ", 1)
    elif name == "order":
        frames[1:3] = frames[2], frames[1]
    elif name == "last":
        frames.pop()
    elif name == "older":
        frames[4] = re.sub(rb" checksum=\S+", b"", frames[4])
    path.write_bytes(b"".join(frames))
    if name == "another":
        entries = list(LabelFile(path))
        path.unlink()
        other = LabelFile(path)
        for entry in entries:
            other.append(replace(entry, targets=replace(entry.targets, forces=-entry.targets.forces)))
    before = contents(tmp_path)
    with pytest.raises(UserError, match=what):
        finish(recipe(), tmp_path, resume=True)
    assert contents(tmp_path) == before
    if name not in ("last", "another"):  # which only the checkpoint tells
        with pytest.raises(UserError, match=f"{tmp_path}/out/labels.xyz: .*{what}"):
            read_labels(tmp_path / "out")


@pytest.mark.parametrize("text", [None, "", "[1, 2]", "{}", '{"dynamics": {"steps": "x"}}'])
def test_a_recipe_that_is_gone_or_broken(text, finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "out" / "recipe.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match="recipe.json: (is gone, so that nobody knows|is no recipe of a run any more)"):
        finish(recipe(), tmp_path, resume=True)
    assert (path.read_text() if path.exists() else None) == text


def test_a_start_that_fails_leaves_nothing(tmp_path):
    """Neither a folder nor its parents, nor what stops the next one; what the oracle left is where the message says."""
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for more, what in (
        ({"oracle": {"calculator": "no_such_module:Own"}}, "No module named"),
        ({"oracle": {"executor": "dask", "executor_options": {"wrong": 1}}}, "has no option 'wrong'"),
        ({"bootstrap": {"given": "none.xyz"}}, "none.xyz"),
    ):
        with pytest.raises(UserError, match=what):
            finish(recipe(output="deep/er/out", **more), tmp_path)
        assert sorted(tmp_path.rglob("*")) == before
    wrong = {"oracle": {"calculator": "emt"}, "output": "gold"}
    ase.io.write(tmp_path / "start.xyz", Atoms("Si2", [[0, 0, 0], [0, 0, 2.3]]))
    with pytest.raises(UserError, match="No EMT-potential for Si.* Correct the oracle, and begin again"):
        finish(recipe(**wrong), tmp_path)
    assert [p.name for p in (tmp_path / "gold").iterdir()] == ["scratch"]
    ase.io.write(tmp_path / "start.xyz", crystal())
    assert finish(recipe(**wrong, dynamics={"steps": 5}), tmp_path).phase == "stopped"


def test_a_finished_run_ends_at_once(finished, tmp_path, monkeypatch):
    """Without learning its labels again."""
    folder, last = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(OnlineModel, "with_label", lambda *_: pytest.fail("it learns"))
    monkeypatch.setattr(OnlineModel, "from_labels", lambda *_: pytest.fail("it learns"))
    states = list(learn(recipe(), tmp_path, resume=True))
    assert [s.phase for s in states] == ["stopped"] and states[0].stopped == last.stopped and states[0].model is None


def test_a_checkpoint_counts_what_belongs_to_it(tmp_path):
    """What was written after the last checkpoint is cut off, and not counted by the next one."""
    folder = prepare(tmp_path)
    trail = checkpoint.RunFiles(folder / "out", recipe(), resume=False)
    trail.truncate(checkpoint.RunProgress())
    trail.log_event("one")
    progress = trail.save_checkpoint(checkpoint.RunProgress())
    trail.log_event("two")
    trail.close()
    again = checkpoint.RunFiles(folder / "out", recipe(), resume=True)
    again.truncate(progress)
    assert again.save_checkpoint(progress).written == progress.written
    again.close()
    assert [e["event"] for e in events(folder)] == ["one"]


def test_lock_ends_with_the_run(tmp_path):
    finish(recipe(dynamics={"steps": 5}), prepare(tmp_path))
    with open(tmp_path / "out" / "run.log") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"dynamics": {"ensemble": "npt"}}, "npt needs a start that is periodic"),
        ({"start": "nothing.xyz"}, "nothing.xyz"),
        ({"bootstrap": {"given": "nothing.xyz"}}, "nothing.xyz"),
        ({"stop": {"observable": {"name": "math:nothing"}}}, "no function 'nothing'"),
    ],
)
def test_bad_input(tmp_path, more, match):
    with pytest.raises(UserError, match=match):
        finish(recipe(**more), prepare(tmp_path, cluster()))


def test_seeds_are_not_negative():
    with pytest.raises(ValueError, match="seed"):
        recipe(seed=-1)


def test_on_failure_stop(finished, tmp_path, monkeypatch):
    """The run ends, and with an oracle that was mended it goes on as if nothing had been."""
    folder, _ = finished
    monkeypatch.setenv(counting_oracle.FAILS, LIMIT)
    stop = {"oracle": {"on_failure": "stop", "retries": 0}}
    with pytest.raises(UserError, match="on_failure is 'stop': .*SCF not converged"):
        finish(recipe(**stop), prepare(tmp_path))
    monkeypatch.delenv(counting_oracle.FAILS)
    assert finish(recipe(**stop), tmp_path, resume=True).refused == 0
    assert contents(tmp_path) == contents(folder)


def test_labels_at_most_counts_what_was_learned(finished, tmp_path):
    """A run that was cut off goes on from its checkpoint; labels that wait on the tape do not count before they are learned again."""
    folder, _ = finished
    out = prepare(tmp_path) / "out"
    out.mkdir()
    for name in ("labels.xyz", "recipe.json"):  # as if all checkpoints were lost
        (out / name).write_bytes((folder / "out" / name).read_bytes())
    finish(recipe(stop={"labels_at_most": 100}), tmp_path, resume=True)
    assert contents(tmp_path) == contents(folder)
    assert answers(tmp_path / "answers") == []
