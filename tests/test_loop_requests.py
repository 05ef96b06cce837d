"""Whole learning runs of a few atoms: walkers side by side, labels that fail, halts, how often labels are asked for, kinds of runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ase.io
import counting_oracle
import numpy as np
import pytest
from ase import Atoms
from conftest import labelled
from counting_oracle import answers
from learning_runs import cluster, contents, crystal, events, finish, merged, prepare, recipe, tape

from gpmlp.core.errors import DataWarning, UserError
from gpmlp.io.ase_atoms import write_frames
from gpmlp.learning import loop, walker_state
from gpmlp.learning.loop import learn
from gpmlp.learning.stopping.history import History, Record
from gpmlp.learning.stopping.judge import judged_window

LIMIT = "0.06"  # eV, above which an oracle fails: some of the labels after the first ones are
TWO = {"dynamics": {"walkers": 2, "ahead": 2, "steps": 30}, "oracle": {"workers": 2}}


@pytest.fixture(autouse=True)
def log(tmp_path, monkeypatch):
    """Where the oracle writes down what it answered."""
    monkeypatch.setenv(counting_oracle.LOG, str(tmp_path / "answers"))
    return tmp_path / "answers"


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
