"""Near-duplicates: which structures are found, and that whole groups are set aside and left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from ase.units import fs
from conftest import labelled

import gpmlp
from gpmlp.descriptors import make_descriptor
from gpmlp.fitting import calibrate, left_out, near_duplicates, regression
from gpmlp.fitting.near_duplicates import IndependentGroups, find_groups
from gpmlp.gp.energy_noise import LeftOutEnergies
from gpmlp.io.ase_atoms import from_ase
from gpmlp.recipe import CalibrationRecipe, Recipe

SOAP = {"name": "soap", "cutoff": 4.5, "n_max": 5, "l_max": 3, "sigma_atom": 0.4, "basis": "gto", "shortest": 0.7,
        "radial_scaling": {"scale": 2.0, "exponent": 3.0}, "cutoff_function": "smoothstep", "cutoff_width": 1.0,
        "cutoff_exponent": 2.0, "central_weight": 1.0}  # fmt: skip


def rattled(n: int, seed: int = 0, by: float = 0.2) -> list:
    """Cells of copper, of different shapes and with atoms displaced."""
    rng, out = np.random.default_rng(seed), []
    for _ in range(n):
        frame = bulk("Cu", cubic=True)
        strain = rng.normal(size=(3, 3)) * 0.02
        frame.set_cell(frame.cell.array @ (np.eye(3) + strain + strain.T), scale_atoms=True)
        frame.positions += by * rng.normal(size=(4, 3))
        out.append(frame)
    return out


def twins(frames: list, by: float = 1e-3, seed: int = 7) -> list:
    rng, out = np.random.default_rng(seed), []
    for frame in frames:
        twin = frame.copy()
        twin.positions += by * rng.normal(size=(len(frame), 3))
        out.append(twin)
    return out


def turned(frames: list, seed: int = 5) -> list:
    """The same in another orientation and with atoms in another order."""
    rng, out = np.random.default_rng(seed), []
    for frame in frames:
        other = frame[rng.permutation(len(frame))]
        other.rotate(37, (1, 2, 3), rotate_cell=True)
        out.append(other)
    return out


def trajectory(frame, step_fs: float, n: int, every: int = 1, temperature_K: float = 600.0) -> list:
    """Frames of molecular dynamics after 200 fs of it."""
    frame = frame.copy()
    frame.calc = EMT()
    MaxwellBoltzmannDistribution(frame, temperature_K=2 * temperature_K, rng=np.random.default_rng(0))
    dynamics, out = VelocityVerlet(frame, step_fs * fs), []
    dynamics.run(int(200 / step_fs))
    for _ in range(n):
        dynamics.run(every)
        out.append(frame.copy())
    return out


def grouped(frames: list, config_types: tuple[str, ...] = ()) -> IndependentGroups:
    structures, _ = from_ase(frames)
    descriptor = make_descriptor(structures.distinct_species, SOAP)
    return find_groups(structures, descriptor, config_types or ("",) * len(frames))


@pytest.mark.parametrize("other", [twins, lambda frames: turned(twins(frames)), list], ids=["moved", "turned", "same"])
def test_twins_are_one_group(other):
    frames = rattled(40)
    found = grouped([*frames, *other(frames)])
    assert len(found) == 40
    assert sorted(tuple(sorted(near.tolist())) for near in found.near) == [(i, i + 40) for i in range(40)]
    assert all(near[0] == leader for leader, near in zip(found.leaders, found.near, strict=True))


def test_structures_at_random_are_independent():
    """Whatever their temperature, and a small one next to a large one."""
    cold, hot = rattled(40, by=0.06), rattled(40, seed=1, by=0.3)
    assert len(grouped(cold)) == len(grouped(hot)) == 40
    assert (
        len(grouped([*cold, *hot], ("cold",) * 40 + ("hot",) * 40)) >= 76
    )  # of two clouds in one, a few are near by chance
    assert len(grouped([molecule(name) for name in ("H2O", "CH4", "NH3", "C2H6")])) == 4


def test_few_copies_of_each_of_many_molecules():
    frames = [molecule(name) for name in ("H2O", "CH4", "NH3", "C2H6", "CH3OH")]
    assert len(grouped(frames * 2)) == 5
    assert len(grouped(frames[:1] * 30)) == 1 and len(grouped(rattled(3) * 20)) == 3


@pytest.mark.parametrize("step_fs, most", [(1.0, 0.3), (2.0, 0.5), (5.0, 0.8)])
def test_consecutive_frames_of_dynamics_are_near(step_fs, most):
    """Groups are pieces of the trajectory, which is not one group as a whole."""
    frames = trajectory(bulk("Cu", cubic=True).repeat((2, 2, 1)), step_fs, 120)
    found = grouped(frames)
    assert 5 < len(found) < most * len(frames)
    for near in found.near:
        assert len(near) == near.max() - near.min() + 1
    far = grouped(trajectory(bulk("Cu", cubic=True).repeat((2, 2, 1)), 5.0, 40, every=20))
    assert len(far) == 40


def test_what_is_said_of_them():
    structures, _ = from_ase([*rattled(20), *twins(rattled(20))])
    found = grouped([*rattled(20), *twins(rattled(20))])
    told = found.finding(structures)
    assert told.kind == "near-duplicates" and told.severity == "warning" and len(told.frames) == 20
    assert told.numbers == {"structures": 40, "independent_groups": 20} and "20 independent groups" in told.message
    assert IndependentGroups.of_one(40).finding(structures) is None


def test_groups_are_set_aside_as_a_whole():
    """And structures with a near one among those learned from are not predicted."""
    frames = [*rattled(60), *twins(rattled(60))]
    structures, targets = from_ase([labelled(f) for f in frames])
    groups = grouped(frames)
    fitted, held, judged = calibrate.calibration_split(structures, targets, CalibrationRecipe(), 0, groups)
    assert len(judged) == 10 and len(held) == 20 and len(fitted) == 100
    assert {i % 60 for i in held.tolist()} == {i % 60 for i in judged.tolist()}
    assert not {i % 60 for i in held.tolist()} & {i % 60 for i in fitted.tolist()}
    few = groups.among(torch.tensor([*range(19), *range(60, 79)]), 120)
    some = structures.select([*range(19), *range(60, 79)])
    labels = replace(targets.select(structures, [*range(19), *range(60, 79)]))
    assert not len(calibrate.calibration_split(some, labels, CalibrationRecipe(), 0, few).held)  # 19 groups are too few


def test_one_species_in_a_group_that_must_stay():
    """Where a structure goes back because nothing else holds its species, those near it are not predicted."""
    frames = rattled(30)
    frames[3].symbols[0] = "Ag"
    frames.append(frames[3].copy())
    structures, targets = from_ase([labelled(f) for f in frames])
    groups = grouped(frames)
    assert len(groups) == 30
    for seed in range(12):
        fitted, held, judged = calibrate.calibration_split(
            structures, targets, CalibrationRecipe(fraction=0.4), seed, groups
        )
        assert {3, 30} & set(fitted.tolist()) and not {3, 30} & set(judged.tolist())
        assert len(fitted) + len(held) == 31 and set(judged.tolist()) <= set(held.tolist())


def test_rows_of_energies_left_out_together():
    """Rows count labelled energies with the common noise among the structures learned from."""
    frames = [*rattled(12), *twins(rattled(12))]
    structures, targets = from_ase([labelled(f) for f in frames])
    energies, noise = targets.energies.clone(), targets.energies_noise.clone()
    energies[2], noise[5] = torch.nan, 1e-3
    targets = replace(targets, energies=energies, energies_noise=noise)
    found = regression.left_out_energies(targets, grouped(frames), torch.arange(1, 24))
    assert isinstance(found, LeftOutEnergies)
    rows = [i for i in range(1, 24) if i not in (2, 5)]  # structures that have one
    together = [{rows[r] for r in group.tolist()} for group in found.rows]
    assert all(len({i % 12 for i in group}) == 1 for group in together)
    assert {7, 19} in together and {12} not in [g - {0} for g in together if len(g) > 1]


def test_error_bars_of_a_set_that_was_read_twice():
    """rms z of energies that were not learned from grows by no more than 1.4 because frames have twins; noise does not collapse."""
    z, noise = {}, {}
    test = from_ase([labelled(f) for f in rattled(40, seed=90)])
    for name, copies in (("once", 1), ("twice", 2)):
        frames = rattled(60, seed=2)
        frames = frames if copies == 1 else [*frames, *twins(frames)]
        potential, report = gpmlp.fit(
            *from_ase([labelled(f) for f in frames]), Recipe(inducing={"n": 60, "gradients": 2})
        )
        found = potential(test[0], variance="energies")
        z[name] = float(((found.energies - test[1].energies).square() / found.energies_variance.total).mean().sqrt())
        noise[name] = report.noise["energies"]
        assert report.independent_groups == 60 == report.held_out
        assert any("near-duplicates" in w for w in report.warnings) == (copies == 2)
    assert z["twice"] < 1.4 * max(1.0, z["once"]) and noise["twice"] > 0.3 * noise["once"]


def test_the_amplitude_leaves_out_what_is_near():
    """With twins in the data, errors of structures left out are those without the twins, not the difference of the two."""
    frames = rattled(30, seed=4)
    recipe = Recipe(inducing={"n": 60, "gradients": 2}, calibration=False, novelty=False)
    errors = {}
    original = left_out.predict_left_out

    for name, groups in (("known", find_groups), ("blind", lambda s, *_: IndependentGroups.of_one(len(s)))):
        seen: list[torch.Tensor] = []

        def spy(*arguments, seen=seen, **named):
            found = original(*arguments, **named)
            seen.append(found.targets.forces - found.prediction.forces)
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(near_duplicates, "find_groups", groups)
            patch.setattr(left_out, "predict_left_out", spy)
            gpmlp.fit(*from_ase([labelled(f) for f in [*frames, *twins(frames)]]), recipe)
        errors[name] = float(torch.cat(seen).square().mean().sqrt())
    assert errors["known"] > 2 * errors["blind"]


def test_many_structures_take_no_time_of_their_own():
    """Ten thousand vectors are searched in seconds: nothing is quadratic in Python."""
    vectors = np.random.default_rng(0).normal(size=(10_000, 20)) @ np.random.default_rng(1).normal(size=(20, 48))
    search = near_duplicates._Search.build(vectors, [0] * 10_000, [""] * 10_000, 0.25, torch.Generator().manual_seed(0))
    assert search.alone.mean() > 0.9 and search.near(5) == [5]
