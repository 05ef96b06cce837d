"""Walkers: the dynamics of a learning run, in strides, through checkpoints, and what is noticed on the way."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import ase.build
import numpy as np
import pytest
import torch
from ase import Atoms
from ase import units as ase_units
from ase.constraints import FixAtoms, FixBondLengths
from ase.md.langevinbaoab import LangevinBAOAB

from gpmlp.core import neighbors, units
from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Prediction, Variance
from gpmlp.engines import md
from gpmlp.engines.ase import GPCalculator
from gpmlp.learning import walker
from gpmlp.learning.recipe import DynamicsRecipe, GuardsRecipe
from gpmlp.learning.triggers import TriggerDecision, TriggerLimits, trigger_decision
from gpmlp.learning.walker import Walker, advance_walker, look_ahead, take_snapshot

NVE = DynamicsRecipe(ensemble="nve", temperature_K=300, steps=100)
NVT = DynamicsRecipe(temperature_K=300, steps=100)
RAMP = DynamicsRecipe(temperature_K=[300, 900], steps=40, ramp_steps=30)
ISO = DynamicsRecipe(ensemble="npt", temperature_K=[300, 600], pressure_GPa=[0, 5], steps=40, ramp_steps=30)
FULL = DynamicsRecipe(ensemble="npt", temperature_K=300, pressure_GPa=[0, 5], steps=40, ramp_steps=30, cell="full")
ALL = {"nve": NVE, "nvt": NVT, "ramp": RAMP, "isotropic": ISO, "full": FULL}


def go_on(structure, prediction, before):
    return TriggerDecision("continue", (), "", 0.0)


def copper(cells=1, rattle=0.03) -> Atoms:
    atoms = ase.build.bulk("Cu", cubic=True) * (cells, 1, 1)
    atoms.rattle(rattle, rng=np.random.default_rng(1))
    return atoms


def begin(dynamics, atoms=None, number=0):
    return Walker.from_atoms(number, copper() if atoms is None else atoms, dynamics, seed=5)


def run(potential, place, dynamics, steps, stride=None, timestep_fs=4.0, judge=go_on):
    now = take_snapshot(place, potential, judge, dynamics)
    for _ in range(0, steps, stride or steps):
        now = advance_walker(now, potential, judge, dynamics, timestep_fs, stride or steps)
    return now


def same(a: Walker, b: Walker) -> bool:
    """Whether two walkers are the same to the last bit."""
    (head_a, tensors_a), (head_b, tensors_b) = a.state(), b.state()
    return head_a == head_b and all(torch.equal(tensors_a[k], tensors_b[k]) for k in tensors_a)


def again(place: Walker) -> Walker:
    """Through the text and the bytes of a checkpoint."""
    header, tensors = place.state()
    return Walker.from_state(json.loads(json.dumps(header)), {k: v.clone() for k, v in tensors.items()})


# ---------------------------------------------------------------- physics


class Springs:
    """A potential of atoms on springs, quick enough for statistics; errors are what it is told."""

    def __init__(self, atoms: Atoms, stiffness: float = 2.0) -> None:
        self.home, self.stiffness, self.full = torch.tensor(atoms.positions), stiffness, 0
        self.sigma = lambda shift: torch.full((len(shift),), 0.01, dtype=torch.float64)

    reach = 3.0

    def __call__(self, structures, variance, novelty=True, pairs=None) -> Prediction:
        shift = structures.positions - self.home
        local = 0.5 * self.stiffness * shift.square().sum(1)
        sigma = self.sigma(shift)
        none, eye = torch.zeros_like(sigma), torch.eye(3, dtype=torch.float64)
        total = sigma.square()[:, None, None] * eye
        estimated, exact = (Variance(0 * total, scale * total, 0 * total, 0 * total) for scale in (3.0, 4.0))
        self.full += "forces" in (variance or ())
        return Prediction(
            local.sum()[None], local, -self.stiffness * shift, torch.full((1, 3, 3), math.nan, dtype=torch.float64),
            atom_energies_variance=Variance(none, sigma.square(), none, none) if variance else None,
            forces_covariance=exact if "forces" in (variance or ()) else None,
            sampled_forces_covariance=estimated if variance else None, novelty=none,
        )  # fmt: skip


def cluster(n=12) -> Atoms:
    return Atoms(f"Cu{n}", [[3.0 * (i % 3), 3.0 * (i // 3), 0] for i in range(n)])


def test_nve_conserves_energy(potential):
    now = take_snapshot(begin(NVE), potential, go_on, NVE)
    energies = []
    for _ in range(20):
        now = advance_walker(now, potential, go_on, NVE, 2.0, 5)
        energies.append(float(now.prediction.energies[0]) + now.walker.atoms.get_kinetic_energy())
    kinetic = now.walker.atoms.get_kinetic_energy()
    # velocity Verlet: errors of the order of the square of the time step, here some thousandth of what moves
    assert np.ptp(energies) < 0.01 * kinetic


def test_nvt_mean_temperature():
    atoms, dynamics = cluster(), DynamicsRecipe(temperature_K=400, relaxation_fs=20, steps=3000)
    potential = Springs(atoms)
    now = take_snapshot(begin(dynamics, atoms), potential, go_on, dynamics)
    found = []
    for _ in range(200):
        now = advance_walker(now, potential, go_on, dynamics, 4.0, 5)
        found.append(now.temperature_K)
    # 36 degrees of freedom, correlated over some 20 fs: 200 samples are about 100, sqrt(2 / (36 * 100)) = 2.4 %
    assert np.mean(found[20:]) == pytest.approx(400, rel=0.08)
    assert np.std(found[20:]) == pytest.approx(400 * (2 / 36) ** 0.5, rel=0.3)


@pytest.mark.parametrize("name", ["nvt", "isotropic", "full"])
def test_same_as_ase(potential, name):
    """The same trajectory as that of ASE's integrator at constant targets, in one go, with another calculator."""
    ends = {"temperature_K": 300.0, "pressure_GPa": 2.0 if ALL[name].ensemble == "npt" else 0.0}
    dynamics = DynamicsRecipe(**(ALL[name].model_dump() | ends))
    place = begin(dynamics)
    atoms = place.atoms.copy()
    atoms.calc = GPCalculator(potential)
    options = {"temperature_K": 300.0, "T_tau": 100 * ase_units.fs, "rng": place.generator}
    if name != "nvt":
        options |= {"externalstress": -2.0 * units.GPA, "P_tau": 1000 * ase_units.fs, "hydrostatic": name != "full"}
    with pytest.warns(UserWarning) if name != "nvt" else pytest.MonkeyPatch.context():
        integrator = LangevinBAOAB(atoms, 4.0 * ase_units.fs, **options)
    for _ in range(20):
        integrator.step()
    now = run(potential, place, dynamics, 20, 5)
    np.testing.assert_array_equal(now.walker.atoms.positions, atoms.positions)
    np.testing.assert_array_equal(now.walker.atoms.cell.array, atoms.cell.array)
    np.testing.assert_array_equal(now.walker.atoms.get_momenta(), atoms.get_momenta())
    assert (name == "nvt") == bool((atoms.cell.array == place.atoms.cell.array).all())


def test_npt_gives_way_to_pressure(potential):
    dynamics = DynamicsRecipe(ensemble="npt", temperature_K=50, pressure_GPa=10, steps=200, relaxation_fs=10)
    place = begin(dynamics)
    now = run(potential, place, dynamics, 60, 20)
    assert now.walker.atoms.cell.volume < 0.97 * place.atoms.cell.volume


def test_targets_of_ramps(potential, monkeypatch):
    told = []
    before = LangevinBAOAB.step
    monkeypatch.setattr(
        LangevinBAOAB, "step", lambda self: (told.append((self.temperature_K, self.externalstress)), before(self))
    )
    run(potential, begin(ISO), ISO, 40, 8)
    temperatures, stresses = np.array(told).T
    share = np.minimum(np.arange(1, 41) / 30, 1.0)
    np.testing.assert_allclose(temperatures, 300 + 300 * share)
    np.testing.assert_allclose(stresses, -5 * share * units.GPA)
    assert ISO.temperature(0) == 300 and ISO.pressure(40) == 5


def test_recipes_of_ramps():
    assert DynamicsRecipe(temperature_K=[1, 2], steps=1).ramp == 1  # two thirds of it
    assert DynamicsRecipe(temperature_K=[1, 2], steps=10, ramp_steps=10).ramp == 10
    assert DynamicsRecipe(temperature_K=1, steps=10, ramp_steps=5).ramp == 0
    assert RAMP.highest_K == 900 and RAMP.temperature(15) == pytest.approx(600)


# ---------------------------------------------------------------- strides and checkpoints


@pytest.mark.parametrize("name", ALL)
def test_strides_are_the_same_as_one_run(potential, name):
    """Bit by bit: with ramps, with a breathing cell, and through the text of a checkpoint between any two strides."""
    dynamics = ALL[name]
    whole = run(potential, begin(dynamics), dynamics, 24)
    parts = run(potential, begin(dynamics), dynamics, 24, 4)
    assert same(whole.walker, parts.walker)
    now = take_snapshot(begin(dynamics), potential, go_on, dynamics)
    for _ in range(3):
        place = again(now.walker)
        assert same(place, now.walker)
        now = take_snapshot(place, potential, go_on, dynamics)
        now = advance_walker(now, potential, go_on, dynamics, 4.0, 8)
    assert same(whole.walker, now.walker)
    assert np.shape(now.walker.p_eps) == ((3, 3) if name == "full" else ())
    for field in ("energies", "forces"):
        assert torch.equal(getattr(whole.prediction, field), getattr(now.prediction, field))


@pytest.mark.parametrize("name", ALL)
def test_a_walker_is_never_changed(potential, name):
    """It may be gone back to: neither atoms nor the momentum of the cell are changed by going on from it."""
    dynamics = ALL[name]
    place = run(potential, begin(dynamics), dynamics, 4).walker
    kept = again(place)
    first = run(potential, place, dynamics, 6)
    assert same(place, kept)
    assert same(first.walker, run(potential, place, dynamics, 6).walker)


def test_what_was_predicted_belongs_to_where_the_walker_is(potential):
    for dynamics in (NVT, ISO, FULL):
        now = run(potential, begin(dynamics), dynamics, 5)
        pairs = neighbors.find_neighbors(now.structure, potential.reach).sorted()
        there = potential(now.structure, walker.FULL, novelty=True, pairs=pairs)
        np.testing.assert_array_equal(now.structure.positions.numpy(), now.walker.atoms.positions)
        np.testing.assert_array_equal(now.structure.cells[0].numpy(), now.walker.atoms.cell.array)
        assert torch.equal(there.energies, now.prediction.energies) and now.full
        assert now.walker.energy == float(there.energies[0])


def test_begin():
    hot = begin(NVT)
    assert hot.step == 0 and hot.atoms.get_temperature() > 0
    assert np.abs(hot.atoms.get_momenta().sum(0)).max() < 1e-12
    moving = copper()
    moving.set_momenta(np.random.default_rng(0).standard_normal((4, 3)))
    np.testing.assert_array_equal(begin(NVT, moving).atoms.get_momenta(), moving.get_momenta())
    assert not same(begin(NVT, number=1), hot)
    assert same(begin(NVT), hot)
    assert begin(DynamicsRecipe(temperature_K=0), copper()).atoms.get_temperature() == 0


def test_begin_keeps_what_a_checkpoint_keeps():
    """Otherwise the trajectory of a run that is resumed would look different."""
    atoms = copper()
    atoms.info["config_type"], atoms.arrays["tags"] = "bulk", np.arange(4)
    atoms.set_initial_magnetic_moments([1.0, -1.0, 1.0, -1.0])
    atoms.set_initial_charges([-1.0, 0.0, 0.0, 0.0])
    place = begin(NVT, atoms)
    for arrays in (place.atoms.arrays, again(place).atoms.arrays):
        assert set(arrays) == {"numbers", "positions", "momenta", "initial_magmoms", "initial_charges"}
        assert arrays["initial_magmoms"].tolist() == [1, -1, 1, -1] and arrays["initial_charges"].tolist() == [
            -1,
            0,
            0,
            0,
        ]
    assert not place.atoms.info


def test_isotopes_are_kept():
    atoms = copper()
    atoms.set_masses([63.0, 65.0, 63.0, 65.0])
    np.testing.assert_array_equal(again(begin(NVT, atoms)).atoms.get_masses(), [63, 65, 63, 65])


def test_npt_needs_a_cell():
    with pytest.raises(UserError, match="npt needs a start that is periodic in all directions"):
        begin(ISO, cluster())


def test_rested():
    place = begin(NVT)
    rested = place.with_new_velocities(NVT, 3)
    np.testing.assert_array_equal(rested.atoms.positions, place.atoms.positions)
    assert np.abs(rested.atoms.get_momenta() - place.atoms.get_momenta()).max() > 0.1
    assert rested.chance != place.chance and same(rested, place.with_new_velocities(NVT, 3))
    assert not same(rested, place.with_new_velocities(NVT, 4))


# ---------------------------------------------------------------- constraints


@pytest.mark.parametrize("name", ["nve", "ramp"])
def test_fixed_atoms_stay_where_they_are(potential, name):
    atoms, dynamics = copper(2), ALL[name]
    atoms.set_constraint(FixAtoms([0, 3]))
    place = begin(dynamics, atoms)
    assert (place.atoms.get_momenta()[[0, 3]] == 0).all()
    now = take_snapshot(place, potential, go_on, dynamics)
    for _ in range(3):
        now = take_snapshot(again(now.walker), potential, go_on, dynamics)
        now = advance_walker(now, potential, go_on, dynamics, 4.0, 4)
        now = replace(now, walker=now.walker.with_new_velocities(dynamics, now.walker.step))
    np.testing.assert_array_equal(now.walker.atoms.positions[[0, 3]], atoms.positions[[0, 3]])
    assert np.abs(now.walker.atoms.positions - atoms.positions)[[1, 2]].min() > 0
    assert walker.fixed_atoms(now.walker.atoms).tolist() == [0, 3]


def test_temperature_counts_what_moves(potential):
    """With most atoms held, few degrees of freedom scatter much; the guard has to know how many there are."""
    atoms = copper(2)
    atoms.set_constraint(FixAtoms(list(range(7))))
    seen = []
    place = begin(NVT, atoms)
    assert place.atoms.get_temperature() > 0
    run(potential, place, NVT, 2, judge=lambda s, p, before: seen.append(before.freedom) or go_on(s, p, before))
    assert set(seen) == {3}


def test_other_constraints_are_refused():
    atoms = copper()
    atoms.set_constraint(FixBondLengths([[0, 1]]))
    with pytest.raises(UserError, match="The start has a FixBondLengths; only fixed atoms"):
        walker.fixed_atoms(atoms)


def test_warnings_of_the_integrator_are_not_passed_on(potential, recwarn):
    atoms = copper()
    atoms.set_constraint(FixAtoms([0]))
    run(potential, begin(ISO, atoms), ISO, 2)
    assert not [w for w in recwarn if "LangevinBAOAB" in str(w.message) or "P_mass" in str(w.message)]


# ---------------------------------------------------------------- looks

LIMITS = TriggerLimits(0.5, 0.1, None, 1.5, 100.0, GuardsRecipe())


def judged(limits):
    return lambda structure, prediction, before: trigger_decision(prediction, structure, limits, before)


def test_the_cheap_look_notices_what_a_full_one_would():
    """Errors that grow with the distance from home are noticed in the step in which they pass the limit, not at the next full look."""
    atoms, dynamics = cluster(), DynamicsRecipe(temperature_K=600, steps=400, relaxation_fs=20)
    potential = Springs(atoms, stiffness=0.2)
    potential.sigma = lambda shift: 0.01 + 0.3 * shift.norm(dim=1).square()
    place, judge = begin(dynamics, atoms), judged(LIMITS)
    every = run(potential, place, dynamics, 1, judge=judge)
    while every.decision.action == "continue":
        every = advance_walker(every, potential, judge, dynamics, 4.0, 1)
    potential.full = 0
    rare = run(potential, place, dynamics, 200, judge=judge)
    assert 10 < every.walker.step < 200  # else there is nothing to notice
    assert rare.walker.step == every.walker.step and rare.decision == every.decision
    assert rare.full and same(rare.walker, every.walker)
    assert potential.full < 0.5 * every.walker.step


def ahead(potential, now, judge, dynamics, steps, likely=0.0):
    """`look_ahead` from the first frame that asks."""

    def advance(start, decide, count):
        return advance_walker(start, potential, decide, dynamics, 4.0, count)

    asks = advance(now, judge, 400)
    assert asks.decision.action == "label"
    return asks, look_ahead(advance, asks, judge, steps, likely)


def test_the_frame_to_be_labelled_is_the_worst_of_those_ahead():
    atoms, dynamics = cluster(), DynamicsRecipe(temperature_K=600, steps=400, relaxation_fs=20)
    potential = Springs(atoms, stiffness=0.2)
    potential.sigma = lambda shift: 0.01 + 0.3 * shift.norm(dim=1).square()
    judge = judged(replace(LIMITS, halt=100.0))
    start = take_snapshot(begin(dynamics, atoms), potential, judge, dynamics)
    asks, seen = ahead(potential, start, judge, dynamics, 60)
    assert same(seen.walker, asks.walker) and seen.decision == asks.decision  # from where it looked
    every = [asks]
    for _ in range(60):
        every.append(advance_walker(every[-1], potential, judge, dynamics, 4.0, 1))
    worst = max(every, key=lambda one: one.decision.severity)
    assert 0 < worst.walker.step - asks.walker.step < 60  # else there is nothing to find
    assert same(seen.worst.walker, worst.walker) and seen.worst.full
    assert seen.worst.decision.action == "label"
    assert asks.decision.severity < seen.worst.decision.severity == pytest.approx(worst.decision.severity)
    assert seen.worst.decision.reason == worst.decision.reason
    assert ahead(potential, start, judge, dynamics, 1)[1].worst.walker.step == asks.walker.step + 1
    # not as far as where it would halt
    halts = judged(replace(LIMITS, halt=0.5 * (1 + worst.decision.severity)))
    nearer = ahead(potential, start, halts, dynamics, 60)[1].worst
    assert nearer.walker.step < worst.walker.step and 1 < nearer.decision.severity < worst.decision.severity


def test_it_looks_ahead_until_an_error_is_likely():
    """Stride after stride, to the end of that with a frame whose error is as likely as that, but no more than STRIDES_AHEAD."""
    atoms, dynamics = cluster(), DynamicsRecipe(temperature_K=600, steps=400, relaxation_fs=20)
    potential = Springs(atoms, stiffness=0.2)
    potential.sigma = lambda shift: 0.01 + 0.3 * shift.norm(dim=1).square()
    judge = judged(replace(LIMITS, halt=100.0))
    asks, _ = ahead(potential, take_snapshot(begin(dynamics, atoms), potential, judge, dynamics), judge, dynamics, 1)
    every = [asks]
    for _ in range(5 * walker.STRIDES_AHEAD):
        every.append(advance_walker(every[-1], potential, judge, dynamics, 4.0, 1))
    chances = [one.decision.exceedance for one in every]
    found = set()
    for likely in (0.5 * chances[0], 0.9 * max(chances[:11]), 0.99 * max(chances), 1.1 * max(chances)):
        enough = next((k for k, chance in enumerate(chances) if chance >= likely), len(every) - 1)
        reach = 5 * max(1, math.ceil(enough / 5))
        worst = max(every[: reach + 1], key=lambda one: one.decision.severity)
        seen = ahead(
            potential, take_snapshot(begin(dynamics, atoms), potential, judge, dynamics), judge, dynamics, 5, likely
        )[1]
        assert same((seen.worst or seen).walker, worst.walker), likely
        found.add(reach)
    assert len(found) > 2  # else there is nothing to tell


def test_nothing_worse_ahead():
    """The frame that asked is the one to be labelled."""
    atoms, dynamics = cluster(), DynamicsRecipe(temperature_K=600, steps=400, relaxation_fs=20)
    potential = Springs(atoms, stiffness=0.2)
    potential.sigma = lambda shift: 0.01 + 0.3 * shift.norm(dim=1).square()
    seen = []

    def judge(structure, prediction, context):
        """As the trigger does, until a label was asked for; then all is well."""
        decision = judged(LIMITS)(structure, prediction, context)
        seen.extend([1] * (decision.action == "label" and prediction.forces_covariance is not None))
        return decision if len(seen) < 3 else TriggerDecision("continue", severity=0.5)

    asks, found = ahead(
        potential, take_snapshot(begin(dynamics, atoms), potential, judge, dynamics), judge, dynamics, 20
    )
    assert found.worst is None and found is asks


def test_watching_in_some_steps_only():
    """Variances are made in every fourth step, and what passes the limit is noticed there."""
    atoms, dynamics = cluster(), DynamicsRecipe(temperature_K=600, steps=400, relaxation_fs=20)

    class Counted(Springs):
        cheap = 0

        def __call__(self, structures, variance, novelty=True, pairs=None):
            self.cheap += variance == walker.CHEAP
            return super().__call__(structures, variance, novelty)

    potential = Counted(atoms, stiffness=0.2)
    potential.sigma = lambda shift: 0.01 + 0.3 * shift.norm(dim=1).square()
    judge = judged(LIMITS)
    now = take_snapshot(begin(dynamics, atoms), potential, judge, dynamics)
    first, fourth = (advance_walker(now, potential, judge, dynamics, 4.0, 200, watch) for watch in (1, 4))
    assert first.decision.action == fourth.decision.action == "label" and fourth.full
    assert 0 <= fourth.walker.step - first.walker.step < 4 and fourth.walker.step % 4 == 0
    potential.sigma, potential.cheap = lambda shift: 0.01 + 0.0 * shift.norm(dim=1), 0
    assert advance_walker(now, potential, judge, dynamics, 4.0, 40, 4).walker.step == 40
    assert potential.cheap == 9  # the last of ten is the full look


def test_a_false_alarm_of_the_cheap_look_does_not_stop_a_walker():
    """Where estimates grow and variances of forces do not, the full look says so, and is not asked for at each step again."""
    atoms, dynamics = cluster(), DynamicsRecipe(temperature_K=300, steps=400)

    class Calm(Springs):
        def __call__(self, structures, variance, novelty=True, pairs=None):
            found = super().__call__(structures, variance, novelty)
            if found.forces_covariance is None:
                return found
            none = torch.zeros(len(self.home), 3, 3, dtype=torch.float64)
            total = none + 1e-4 * torch.eye(3, dtype=torch.float64)
            return replace(found, forces_covariance=Variance(none, total, none, none))

    potential = Calm(atoms)
    now = take_snapshot(begin(dynamics, atoms), potential, judged(LIMITS), dynamics)
    potential.sigma = lambda shift: torch.full((len(shift),), 5.0, dtype=torch.float64)  # 500 times that of the look
    potential.full = 0
    now = advance_walker(now, potential, judged(LIMITS), dynamics, 4.0, 50)
    assert now.walker.step == 50 and now.decision.action == "continue"
    assert potential.full == 2  # one to see, one at the end


def test_novelty_is_seen_in_every_step(potential):
    judge = judged(replace(LIMITS, force=None, novelty=1e-6))
    now = run(potential, begin(NVT), NVT, 20, judge=judge)
    assert now.walker.step == 1 and now.decision.action == "label" and now.full


@pytest.mark.parametrize("momentum", [1e4, 1e12, 1e200])
def test_an_explosion_is_a_reason_to_halt(potential, momentum):
    """Atoms on top of one another, positions beyond all numbers: nothing to look at, and no reason to crash."""
    place = begin(NVT)
    atoms = place.atoms.copy()
    momenta = np.zeros((4, 3))
    momenta[0, 0] = momentum
    atoms.set_momenta(momenta)
    before = replace(place, atoms=atoms)
    now = run(potential, before, NVT, 10, judge=judged(LIMITS))
    assert now.decision.action == "halt" and now.decision.reason
    assert np.isfinite(now.walker.atoms.positions).all() or now.walker.step > 0


def test_atoms_that_meet_are_a_reason_to_halt(potential):
    atoms = Atoms("Cu2", [[0, 0, 0], [2.5, 0, 0]])
    place = begin(NVE, atoms)
    atoms = place.atoms.copy()
    atoms.set_momenta([[63.5 * 2.5 / (4 * ase_units.fs), 0, 0], [0, 0, 0]])  # on top of the other in a step
    now = advance_walker(
        take_snapshot(replace(place, atoms=atoms), potential, go_on, NVE), potential, judged(LIMITS), NVE, 4.0, 10
    )
    assert now.decision.action == "halt" and "A apart" in now.decision.reason and now.decision.severity == math.inf
    assert not now.full
    np.testing.assert_array_equal(now.walker.atoms.positions, atoms.positions)


def test_a_cell_that_bursts_is_a_reason_to_halt(potential):
    place = replace(begin(ISO), p_eps=1e7)
    now = run(potential, place, ISO, 10, judge=judged(LIMITS))
    assert now.decision.action == "halt" and "the volume went from" in now.decision.reason


def test_default_timestep():
    assert [md.default_timestep_fs(np.array(n)) for n in ([1, 8], [6, 79], [13])] == [0.5, 1.0, 2.0]
    with pytest.raises(UserError, match="no atoms"):
        md.default_timestep_fs(np.array([]))
