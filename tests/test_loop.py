"""Whole learning runs of a few atoms: what they leave behind, what is asked for and what is not, and how they end."""

from __future__ import annotations

import fcntl
import itertools
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import ase.io
import counting_oracle
import numpy as np
import pytest
from ase import Atoms
from conftest import labelled
from counting_oracle import answers
from learning_runs import cluster, contents, crystal, events, finish, merged, prepare, recipe

from gpmlp.core.errors import DataWarning, UserError
from gpmlp.io import archive
from gpmlp.io.ase_atoms import structures_from_ase, write_frames
from gpmlp.learning import checkpoint, loop, walker_state
from gpmlp.learning.labels import LabelFile
from gpmlp.learning.loop import learn
from gpmlp.learning.model import OnlineModel
from gpmlp.learning.stopping.history import History, Record
from gpmlp.learning.stopping.judge import judged_window
from gpmlp.report.run.collect import read_labels

LIMIT = "0.06"  # eV, above which an oracle fails: some of the labels after the first ones are
TWO = {"dynamics": {"walkers": 2, "ahead": 2, "steps": 30}, "oracle": {"workers": 2}}


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


def tape(folder) -> LabelFile:
    return LabelFile(folder / "out" / "labels.xyz")


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


# ---------------------------------------------------------------- walkers and workers


def test_order_of_answers_does_not_matter(tmp_path, monkeypatch, log):
    """Two walkers, two workers, answers that take a random time: the same run as with an oracle that answers at once."""
    last = finish(recipe(**TWO), prepare(tmp_path / "inline"))
    assert {m.walker.number for m in last.progress.walkers} == {0, 1}
    asked = {e["walker"] for e in events(tmp_path / "inline", "ask")}
    assert asked == {0, 1}
    log.unlink()
    monkeypatch.setenv(counting_oracle.DELAY, "0.15")
    more = {**TWO, "oracle": {"workers": 2, "executor": "processes"}}
    finish(recipe(**more), prepare(tmp_path / "processes"))
    assert contents(tmp_path / "processes") == contents(tmp_path / "inline")
    assert len(answers(log)) == len(set(answers(log))) == last.labels


def test_walkers_go_on_while_others_wait(tmp_path):
    """A label that is asked for is settled no later than `ahead` strides after, whatever the other walkers do meanwhile."""
    prepare(tmp_path)
    run = loop._Run(
        recipe(**merged(TWO, {"trigger": {"force": 0.012}, "dynamics": {"steps": 60, "ramp_steps": 60}})),
        tmp_path,
        False,
    )
    settled, ahead = [], 0
    settle = run._settle

    def watch(i):
        state = run.progress.walkers[i]
        settled.append(run.progress.round - state.pending_round)
        yield from settle(i)

    run._settle = watch
    for state in run.states():
        waiting = [m for m in state.progress.walkers if m.sent]
        ahead += bool(waiting) and state.phase == "dynamics"
    run.close()
    assert settled and max(settled) == 2 and ahead > 0


def test_like_structures_are_not_asked_for_at_the_same_time(tmp_path):
    """Two walkers at the same place: one of them waits, and may know without a label of its own when the other's has come."""
    prepare(tmp_path)
    run = loop._Run(recipe(**TWO), tmp_path, False)
    for state in run.states():
        if state.phase == "dynamics":
            break
    state = run.progress.walkers[0]
    twin = replace(state, walker=replace(state.walker, number=1), pending=replace(state.walker, number=1), reason="so")
    run.progress = replace(run.progress, walkers=(replace(state, pending=state.walker, reason="halted: so"), twin))
    run.limits = replace(run.limits, force=1e-9)
    run._send()
    assert [m.sent for m in run.progress.walkers] == [True, False]
    run.close()


# ---------------------------------------------------------------- labels that fail


def test_labels_that_fail_are_set_aside(tmp_path, monkeypatch, log):
    """Structures of high energy cannot be labelled: each is tried as often as told, written down, and the run goes on."""
    monkeypatch.setenv(counting_oracle.FAILS, LIMIT)
    last = finish(recipe(oracle={"at_most_failures": 100}), prepare(tmp_path))
    assert last.phase == "stopped" and last.refused > 0 and last.progress.walkers[0].walker.step == 40
    refused = events(tmp_path, "refused")
    assert len(refused) == last.refused and "SCF not converged" in refused[0]["reason"]
    counts = {a: answers(log).count(a) for a in answers(log)}
    assert {counts[a] for a in counts if float(a) > float(LIMIT)} == {2}  # one retry
    assert {counts[a] for a in counts if float(a) <= float(LIMIT)} == {1}
    assert int(last.progress.history.column("labelled").sum()) == len(last.progress.learned)
    assert not (tmp_path / "out" / "labels.xyz").read_text().count("SCF")
    before = contents(tmp_path)
    finish(recipe(oracle={"at_most_failures": 100}), tmp_path, resume=True)
    assert contents(tmp_path) == before


def test_too_many_failures_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv(counting_oracle.FAILS, LIMIT)
    with pytest.raises(UserError, match="The oracle failed for 1 structures in a row, more than at_most_failures 0"):
        finish(recipe(oracle={"at_most_failures": 0, "retries": 0}), prepare(tmp_path))
    with pytest.raises(UserError, match="1 structures in a row"):  # they are not tried again unless that is asked for
        finish(recipe(oracle={"at_most_failures": 0}), tmp_path, resume=True)
    monkeypatch.delenv(counting_oracle.FAILS)
    (tmp_path / "out" / "refused.jsonl").unlink()
    last = finish(recipe(oracle={"at_most_failures": 0}), tmp_path, resume=True)
    assert last.phase == "stopped" and last.refused == 0


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


def test_first_labels_that_fail(tmp_path, monkeypatch):
    monkeypatch.setenv(counting_oracle.FAILS, "-100")
    said = "Only 0 of the first 3 structures could be labelled; two are needed. The last was set aside: .*SCF not converged"
    with pytest.raises(UserError, match=said):
        finish(recipe(), prepare(tmp_path))


# ---------------------------------------------------------------- halts


def test_halts_go_back(tmp_path):
    """Where the error is far beyond its limit the walker goes back to where it was trusted, and the label is learned."""
    last = finish(recipe(trigger={"halt": 1.001}), prepare(tmp_path))
    halts = [e for e in events(tmp_path, "ask") if e["action"] == "halt"]
    assert halts and last.progress.walkers[0].walker.step == 40
    learned = [e for e in events(tmp_path, "learned") if e["reason"].startswith("halted: ")]
    assert len(learned) == len(halts)
    found = [(e["event"], e["step"]) for e in events(tmp_path) if e["event"] in ("look", "ask")]
    after = [found[k + 1][1] for k, (name, _) in enumerate(found[:-1]) if name == "ask"]
    assert len(after) >= len(halts) and min(a - e["step"] for a, e in zip(after, halts, strict=False)) < 5
    steps = [f.info["step"] for f in ase.io.read(tmp_path / "out" / "trajectory.xyz", index=":")]
    assert steps == sorted(steps)  # what is walked again is not written again


def test_guards_and_a_hot_ramp(tmp_path):
    """A melt far above its boiling point: guards fire, walkers go back, labels come, nothing crashes."""
    hot = {"temperature_K": [3000, 60000], "steps": 20, "ramp_steps": 15, "relaxation_fs": 10.0}
    trigger = {"force": 5.0, "novelty": None, "guards": {"distance": 0.8}}
    last = finish(recipe(dynamics=hot, trigger=trigger, stop={"coverage": False}), prepare(tmp_path))
    asks = events(tmp_path, "ask")
    assert last.stopped and any("(guard" in e["reason"] for e in asks)
    assert any(e["reason"].startswith("halted: ") for e in events(tmp_path, "learned"))
    assert not any(np.isnan(e.structure.positions.numpy()).any() for e in tape(tmp_path))


def test_a_start_that_cannot_be_kept(tmp_path, monkeypatch):
    """Guards that fire in the first step, always: the run gives up and says why, and does not go round for ever."""
    monkeypatch.setattr(walker_state, "MOST_SETBACKS", 2)
    monkeypatch.setattr(loop, "MOST_RESTARTS", 1)
    last = finish(recipe(trigger={"guards": {"temperature": 0.01}}), prepare(tmp_path))
    assert last.stopped == "a walker could not be kept stable; see log.jsonl for the guards that fired"
    assert last.progress.walkers[0].restarts == loop.MOST_RESTARTS + 1
    assert "temperature" in events(tmp_path, "ask")[-1]["reason"]


def test_atoms_on_top_of_one_another_in_the_start(tmp_path):
    with pytest.raises(UserError, match="atoms 0 and 1 are 0.100 A apart"):
        finish(recipe(), prepare(tmp_path, Atoms("Al2", [[0, 0, 0], [0.1, 0, 0]])))


# ---------------------------------------------------------------- how often


def test_labels_are_rationed(tmp_path):
    last = finish(recipe(trigger={"most_per_1000_steps": 2, "halt": 1e9}), prepare(tmp_path))
    assert len(last.progress.learned) == 2 and last.progress.walkers[0].walker.step == 40
    # what it may not ask for is not forgotten: it counts in the rate of labels by which the run is judged
    asked, withheld = (last.progress.history.column(name) for name in ("asked", "withheld"))
    assert asked.sum() > 2 and withheld.sum() == asked.sum() - len(events(tmp_path, "ask"))
    assert [e.get("withheld", False) for e in events(tmp_path, "look")] == withheld.tolist()


def test_a_walker_that_may_not_ask_still_halts(tmp_path):
    last = finish(recipe(trigger={"most_per_1000_steps": 2, "halt": 1.001, "force": 0.01}), prepare(tmp_path))
    assert len(last.progress.learned) == 2
    halts = [e for e in events(tmp_path, "ask") if e["action"] == "halt"]
    assert len(halts) > 2 and last.progress.walkers[0].restarts > 0


def test_cool_down(tmp_path):
    """After a label the next has to wait, unless the error is much larger than right after it."""
    last = finish(recipe(trigger={"cooldown": 12, "hysteresis": 1e6, "halt": 1e9}), prepare(tmp_path))
    gaps = np.diff([e.notes["step"] for e in tape(tmp_path)][3:])
    assert len(last.progress.learned) > 1 and gaps.min() >= 12


def test_what_was_left_after_a_label_is_in_units_of_the_plain_limits(tmp_path):
    last = None
    for state in learn(recipe(trigger={"cooldown": 30}), prepare(tmp_path)):
        if state.phase == "learning":
            last = None
        elif state.phase == "dynamics" and last is None and state.progress.learned:
            last = state
            first = state.progress.walkers[0]
            assert first.label_severity > 0 and first.label_step <= dict(list(tape(tmp_path))[-1].notes)["step"]
    assert last is not None


def test_labels_at_most(tmp_path):
    last = finish(recipe(stop={"labels_at_most": 5}), prepare(tmp_path / "one"))
    assert last.labels == 5 and last.verdict.limit == "labels"
    assert "stopped at a limit, not converged: 5 labels" in last.stopped
    more = finish(recipe(stop={"labels_at_most": 6}), tmp_path / "one", resume=True)
    assert more.labels == 6 and more.calls == 1
    last = finish(recipe(**TWO, stop={"labels_at_most": 5}), prepare(tmp_path / "two"))
    assert last.labels == 5


def test_labels_at_most_counts_first_and_explored_structures(tmp_path):
    last = finish(recipe(stop={"labels_at_most": 2}), prepare(tmp_path / "first"))
    assert last.labels == last.calls == 2 and last.verdict.limit == "labels"
    last = finish(recipe(stop={"labels_at_most": 4}, explore={"directed": 3}), prepare(tmp_path / "explored"))
    assert last.labels == last.calls == 4 and len(last.progress.first) == 3


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


def test_time_at_most(tmp_path):
    last = finish(recipe(stop={"time_at_most_h": 1e-9}), prepare(tmp_path))
    assert last.verdict.limit == "time" and last.progress.round == 1
    assert last.progress.hours > 0


# ---------------------------------------------------------------- kinds of runs


def test_given_labels(tmp_path):
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(4):
        atoms = crystal()
        atoms.rattle(0.05, rng=rng)
        frames.append(labelled(atoms))
    write_frames(prepare(tmp_path) / "given.xyz", frames)
    last = finish(recipe(bootstrap={"n": 2, "given": "given.xyz"}, dynamics={"steps": 10}), tmp_path)
    entries = list(tape(tmp_path))
    assert [e.reason for e in entries[:4]] == ["given"] * 4 and entries[0].oracle == ""
    assert last.progress.first[:4] == tuple(e.key for e in entries[:4]) and len(last.progress.first) == 6
    np.testing.assert_allclose(entries[0].targets.forces.numpy(), frames[0].get_forces(), atol=1e-7)


def test_given_structures_without_labels(tmp_path):
    """They would count as labels, and teach nothing."""
    one, other = labelled(crystal()), crystal()
    write_frames(prepare(tmp_path) / "given.xyz", [one, other])
    with pytest.raises(UserError, match="given.xyz: frame 1 has neither energy nor forces"):
        finish(recipe(bootstrap={"n": 2, "given": "given.xyz"}), tmp_path)
    assert not (tmp_path / "out" / "labels.xyz").exists() and not (tmp_path / "answers").exists()


def test_exploring_around_an_atom_alone(tmp_path):
    """It has no direction: the others are explored."""
    atoms = cluster() + Atoms("Al", [[20, 0, 0]])
    atoms = atoms[[3, 0, 1, 2]]
    last = finish(recipe(explore={"directed": 3}, dynamics={"steps": 5}), prepare(tmp_path, atoms))
    reasons = [e.reason for e in tape(tmp_path) if e.reason.startswith("explored: a rare")]
    assert last.stopped and reasons == [f"explored: a rare direction around atom {k}" for k in (1, 2)]


def test_several_starts_and_the_same_one_twice(tmp_path):
    other = crystal()
    other.set_cell(1.02 * other.cell.array, scale_atoms=True)
    prepare(tmp_path, [crystal(), crystal(), other])
    last = finish(recipe(dynamics={"walkers": 3, "steps": 5, "ramp_steps": 5}), tmp_path)
    assert len(last.progress.first) == 2  # of the three, which are the first structures
    sizes = [m.walker.atoms.cell[0, 0] for m in last.progress.walkers]
    assert sizes == [crystal().cell[0, 0], crystal().cell[0, 0], other.cell[0, 0]]


@pytest.mark.parametrize("cell", ["isotropic", "full"])
def test_npt(tmp_path, cell):
    npt = {"ensemble": "npt", "pressure_GPa": [0, 5], "cell": cell, "steps": 20, "ramp_steps": 15}
    # nothing is asked for: a label at the end would begin the averages anew
    last = finish(recipe(dynamics=npt, trigger={"force": 1000.0, "novelty": None}), prepare(tmp_path))
    history = last.progress.history
    assert np.isfinite(history.column("pressure_GPa")).all()
    assert history.column("target_pressure_GPa")[-1] == 5.0 and history.column("ramp_finished")[-1]
    assert last.progress.walkers[0].walker.atoms.cell.volume != crystal().cell.volume
    ensemble = next(c for c in last.verdict.criteria if c.name == "ensemble")
    assert "mean pressure" in ensemble.sentence


def test_a_molecule(tmp_path):
    last = finish(recipe(dynamics={"ensemble": "nve", "temperature_K": 300, "steps": 10}), prepare(tmp_path, cluster()))
    history = last.progress.history
    assert last.phase == "stopped" and np.isnan(history.column("pressure_GPa")).all()
    assert np.isnan(history.column("target_temperature_K")).all()


def test_an_atom_alone(tmp_path):
    """Its force is zero by symmetry, and is known to be."""
    atoms = Atoms("Al", cell=[[0, 2.02, 2.02], [2.02, 0, 2.02], [2.02, 2.02, 0]], pbc=True)
    assert finish(recipe(dynamics={"steps": 10}), prepare(tmp_path, atoms)).phase == "stopped"


def test_observables_come_and_go(tmp_path):
    """Which observables stopping looks at may be changed on the way; those that need a path begin theirs then."""
    short = {"dynamics": {"steps": 10, "ramp_steps": 5}}
    paths = {"observable": [{"name": "msd", "lag_fs": 20.0}, {"name": "energy"}]}
    finish(recipe(**short, stop=paths), prepare(tmp_path))
    last = finish(
        recipe(dynamics={"steps": 20, "ramp_steps": 5}, stop={"observable": {"name": "pressure"}}), tmp_path, True
    )
    assert set(last.progress.history.observables) == {"msd", "energy", "pressure"}


# ---------------------------------------------------------------- what history knows of labels


def test_history_counts_labels_when_they_are_learned():
    history = History()
    assert len(history.with_label()) == 0
    for step in range(4):
        history = history.append(Record(0, step, float(step)))
    before = history
    history = history.with_label()
    assert history.column("labelled").tolist() == [False, False, False, True]
    assert history.with_label().column("labelled").tolist() == [False, False, True, True]
    assert not before.column("labelled").any()
    longer = history.append(Record(0, 4, 4.0))
    assert longer.column("labelled").tolist() == [False, False, False, True, False]
    assert before.append(Record(1, 9, 9.0)).column("walker").tolist() == [0, 0, 0, 0, 1]
    assert [len(rows) for rows in judged_window(longer).rows] == [1]


def test_what_was_dropped_is_no_label(tmp_path, monkeypatch):
    """A walker asks, the other's label comes first and teaches enough: the question is dropped, and the window goes on."""
    last = finish(recipe(**TWO, trigger={"force": 0.01}), prepare(tmp_path))
    asked, dropped = events(tmp_path, "ask"), events(tmp_path, "dropped")
    assert len(asked) == len(last.progress.learned) + len(dropped)
    assert int(last.progress.history.column("labelled").sum()) == len(last.progress.learned)


def test_paths_of_the_recipe_start_from_its_folder(tmp_path, monkeypatch):
    folder = prepare(tmp_path / "deep" / "down")
    monkeypatch.chdir(tmp_path)
    finish(recipe(dynamics={"steps": 5}), Path("deep/down"))
    assert (folder / "out" / "model.gpmlp").exists()


def test_an_antiferromagnetic_ion_is_labelled_as_one(tmp_path, monkeypatch):
    """Moments by site and the charge reach each question to the oracle, before and after an interruption, and are in every file."""
    start = crystal()
    start.set_initial_magnetic_moments([2.0, -2.0, 2.0, -2.0])
    start.set_initial_charges([-1.0, 0.0, 0.0, 0.0])
    asked = []
    plain = counting_oracle.Counting.calculate

    def noting(self, atoms=None, *more):
        asked.append((atoms.get_initial_magnetic_moments().tolist(), float(atoms.get_initial_charges().sum())))
        plain(self, atoms, *more)

    monkeypatch.setattr(counting_oracle.Counting, "calculate", noting)
    whole = prepare(tmp_path / "whole", start)
    last = finish(recipe(), whole)
    broken = prepare(tmp_path / "broken", start)
    for k, _ in enumerate(learn(recipe(), broken)):
        if k == 9:
            break
    finish(recipe(), broken, resume=True)
    assert contents(whole) == contents(broken)
    assert len(asked) >= 2 * last.labels > 6 and set(map(str, asked)) == {"([2.0, -2.0, 2.0, -2.0], -1.0)"}
    for name in ("labels.xyz", "trajectory.xyz"):
        for frame in ase.io.iread(whole / "out" / name):
            assert frame.get_initial_magnetic_moments().tolist() == [2.0, -2.0, 2.0, -2.0]
            assert frame.get_initial_charges().sum() == -1.0


def test_what_the_starts_say_of_charge_and_spin_is_not_dropped_without_a_word(tmp_path):
    start = crystal()
    start.info["multiplicity"] = 2
    folder = prepare(tmp_path / "a", start)
    with pytest.warns(DataWarning, match=r"start.xyz: frame 0 says multiplicity = 2, which does not reach the oracle"):
        next(iter(learn(recipe(), folder)))
    start = crystal()
    start.set_initial_magnetic_moments([1.0] * 4)
    folder = prepare(tmp_path / "b", start)
    with pytest.warns(DataWarning, match=r"frame 0 has magnetic moments of its own, by site"):
        next(iter(learn(recipe(oracle={"magnetic_moments": {"Al": 1.0}}), folder)))
