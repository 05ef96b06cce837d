"""Walkers in one batch: each goes where it would have gone alone, one prediction serves all, and one that fails harms no other."""

from __future__ import annotations

import threading
from dataclasses import replace

import ase.build
import counting_oracle
import numpy as np
import pytest
from ase import units
from learning_runs import contents, events, finish, prepare, recipe

from gpmlp.core.errors import UserError
from gpmlp.core.neighbors import Neighbors, find_neighbors
from gpmlp.core.verlet_list import VerletList
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.learning import walker
from gpmlp.learning.loop import learn
from gpmlp.learning.walker import Walker
from gpmlp.potential.potential import Potential

THREE = {"dynamics": {"walkers": 3, "steps": 10, "ramp_steps": 5}, "trigger": {"force": 5.0, "novelty": None}}
THREE |= {"stop": {"coverage": False}}


@pytest.fixture(autouse=True)
def log(tmp_path, monkeypatch):
    monkeypatch.setenv(counting_oracle.LOG, str(tmp_path / "answers"))


def starts():
    """Different numbers of atoms, and one that is not periodic."""
    made = [ase.build.bulk("Cu", cubic=True), ase.build.bulk("Cu", cubic=True).repeat((2, 1, 1)), ase.build.bulk("Cu")]
    made.append(ase.Atoms("Cu3", [[0, 0, 0], [2.5, 0, 0], [0, 2.5, 0.3]]))
    for k, atoms in enumerate(made):
        atoms.rattle(0.05, seed=k)
    return made


def looks(potential, chosen, judge):
    begun = [Walker.from_atoms(i, atoms, chosen, 3) for i, atoms in enumerate(starts())]
    return [walker.take_snapshot(w, potential, judge, chosen) for w in begun]


def go_on(structure, prediction, before):
    return walker.TriggerDecision("continue")


def tasks(seen, potential, chosen, judges, steps=8):
    return [
        lambda ask, one=one, judge=judge: walker.advance_walker(one, potential, judge, chosen, 1.0, steps, 2, 0.0, ask)
        for one, judge in zip(seen, judges, strict=True)
    ]


@pytest.mark.parametrize("ensemble", ["nve", "nvt"])
def test_each_goes_where_it_goes_alone(potential, ensemble):
    chosen = recipe(dynamics={"ensemble": ensemble, "temperature_K": 300}).dynamics
    seen = looks(potential, chosen, go_on)
    found = walker.advance_together(potential, tasks(seen, potential, chosen, [go_on] * 4))
    for one, side_by_side in zip(seen, found, strict=True):
        alone = walker.advance_walker(one, potential, go_on, chosen, 1.0, 8, 2)
        assert side_by_side.walker.step == alone.walker.step == 8 and side_by_side.full
        # rounding of sums in another order, and 8 steps that carry it on
        np.testing.assert_allclose(side_by_side.walker.atoms.positions, alone.walker.atoms.positions, atol=1e-9)
        assert side_by_side.walker.chance == alone.walker.chance
        np.testing.assert_allclose(side_by_side.prediction.novelty, alone.prediction.novelty, atol=1e-7)


def test_one_call_a_step_serves_all(potential, monkeypatch):
    chosen = recipe(dynamics={"temperature_K": 300}).dynamics
    seen, sizes = looks(potential, chosen, go_on), []
    call = Potential.__call__

    def counted(self, structures, *args, **kwargs):
        sizes.append(len(structures))
        return call(self, structures, *args, **kwargs)

    monkeypatch.setattr(Potential, "__call__", counted)
    walker.advance_together(potential, tasks(seen, potential, chosen, [go_on] * 4))
    assert sizes == [4] * 9  # where they are, and eight steps


def test_each_has_its_own_decision(potential):
    """One asks after the third step, one halts after the fifth; the others make all."""
    chosen = recipe(dynamics={"temperature_K": 300}).dynamics

    def at(number, action):
        made = []

        def judge(structure, prediction, before):
            made.append(1)
            stop = len(made) == number
            return (
                walker.TriggerDecision(action, (0,), "so", float("inf")) if stop else walker.TriggerDecision("continue")
            )

        return judge

    seen = looks(potential, chosen, go_on)
    found = walker.advance_together(
        potential, tasks(seen, potential, chosen, [go_on, at(3, "label"), at(5, "halt"), go_on])
    )
    assert [now.walker.step for now in found] == [8, 3, 5, 8]
    assert [now.decision.action for now in found] == ["continue", "label", "halt", "continue"]


def test_one_that_is_lost_harms_no_other(potential, monkeypatch):
    """Atoms on top of one another in one of them: it halts, and the others go where they would have gone."""
    chosen = recipe(dynamics={"ensemble": "nve", "temperature_K": 300}).dynamics
    seen = looks(potential, chosen, go_on)
    fast = seen[1].walker.atoms.copy()
    momenta = fast.get_momenta()
    momenta[0] = fast.get_masses()[0] * (fast.positions[1] - fast.positions[0]) / units.fs  # there in one step
    fast.set_momenta(momenta)
    hot = replace(seen[1], walker=replace(seen[1].walker, atoms=fast))
    others = walker.advance_together(potential, tasks([seen[0], hot, seen[3]], potential, chosen, [go_on] * 3))
    assert others[1].decision.action == "halt" and not others[1].full
    calm = walker.advance_together(potential, tasks([seen[0], seen[3]], potential, chosen, [go_on] * 2))
    for a, b in zip((others[0], others[2]), calm, strict=True):
        np.testing.assert_allclose(a.walker.atoms.positions, b.walker.atoms.positions, atol=1e-9)


def test_errors_of_predictions_reach_their_own_task(potential):
    good, bad = structures_from_ase([ase.build.bulk("Cu")]), structures_from_ase([ase.build.bulk("Al")])

    def asking(structure):
        def task(ask):
            try:
                return ask(structure, None, find_neighbors(structure, potential.reach))
            except UserError as error:
                return str(error)

        return task

    found = walker.advance_together(potential, [asking(good), asking(bad), asking(good)])
    assert "was not trained on Al" in found[1]
    assert float(found[0].energies[0]) == float(found[2].energies[0])


def test_nothing_is_left_running(potential):
    """An error in one task ends the others, and is told."""
    before = threading.active_count()
    structure = structures_from_ase([ase.build.bulk("Cu")])
    pairs = find_neighbors(structure, potential.reach)

    def fails(ask):
        ask(structure, None, pairs)
        raise ZeroDivisionError

    def goes_on(ask):
        for _ in range(3):
            ask(structure, None, pairs)

    with pytest.raises(ZeroDivisionError):
        walker.advance_together(potential, [goes_on, fails])

    class BrokenError(Exception):
        pass

    def broken(*_args, **_kwargs):
        raise BrokenError

    with pytest.raises(BrokenError):
        walker.advance_together(broken, [goes_on, goes_on])
    assert threading.active_count() == before


def test_lists_side_by_side(potential):
    frames = [structures_from_ase([atoms]) for atoms in starts()]
    together_ = type(frames[0]).concatenate(frames)
    joined = Neighbors.batch([VerletList(4.0)(f) for f in frames], together_.counts.tolist())
    known = find_neighbors(together_, 4.0).sorted()
    assert len(joined) == len(known)
    again = joined.sorted()
    assert all((getattr(again, n) == getattr(known, n)).all() for n in ("centers", "neighbors", "shifts"))


# ---------------------------------------------------------------- in the loop


def test_runs_of_several_walkers_repeat_and_resume_to_the_last_bit(tmp_path):
    asks = {"dynamics": {"walkers": 3, "ahead": 2, "steps": 10, "ramp_steps": 8}, "trigger": {"force": 0.01}}
    finish(recipe(**asks), prepare(tmp_path / "a"))
    prepare(tmp_path / "b")
    seen = 0
    for _ in range(40):
        states = learn(recipe(**asks), tmp_path / "b", resume=True)
        for number, state in enumerate(states):
            if number > 12 or state.phase == "stopped":
                break
        states.close()
        seen += 1
        if state.phase == "stopped":
            break
    assert seen > 1
    finish(recipe(**asks), tmp_path / "b", resume=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert events(tmp_path / "a", "ask")


def test_one_walker_needs_no_company(tmp_path, monkeypatch):
    monkeypatch.setattr(walker, "advance_together", None)
    finish(recipe(**{**THREE, "dynamics": {"steps": 5, "ramp_steps": 5}}), prepare(tmp_path))
