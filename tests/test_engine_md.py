"""Molecular dynamics with the ASE calculator: conserved, repeated, resumed, and how sure it is on the way."""

from __future__ import annotations

import dataclasses

import ase.build
import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.constraints import FixAtoms, FixBondLength
from ase.md.verlet import VelocityVerlet
from conftest import copper

from gpmlp.core.errors import ProgressNotice, UserError
from gpmlp.engines import md
from gpmlp.engines.ase import GPCalculator
from gpmlp.io.ase_atoms import from_ase, read, read_frames


@pytest.fixture
def calculator(potential):
    return GPCalculator(potential, "my cell")


# --- dynamics


def start() -> Atoms:
    return copper(42, cells=2, strain=0.0, rattle=0.02)


def test_nve_conserves_energy(calculator):
    settings = md.MDSettings("nve", temperature_K=300, steps=60, timestep_fs=2.0, interval=20, seed=1)
    states = list(md.run_dynamics(start(), calculator, settings))
    assert [state.step for state in states] == [0, 20, 40, 60]
    assert states[-1].time_fs == pytest.approx(120.0)
    # velocity Verlet at 2 fs: fluctuations of 1e-4 of the kinetic energy exchanged, ~0.04 eV/atom
    assert max(abs(state.drift_eV_per_atom) for state in states) < 2e-4
    assert abs(states[-1].kinetic_eV - states[0].kinetic_eV) > 1e-3
    assert states[-1].atoms.calc.results["forces"].shape == (8, 3)


def test_nvt_is_reproducible_and_conserves_energy_less_heat(calculator):
    settings = md.MDSettings("nvt", temperature_K=300, steps=20, timestep_fs=2.0, relaxation_fs=20.0, seed=5)
    first, again = (list(md.run_dynamics(start(), calculator, settings)) for _ in range(2))
    assert first[-1].potential_eV == again[-1].potential_eV
    assert abs(first[-1].drift_eV_per_atom) < 2e-4
    assert abs(first[-1].atoms.info["heat_eV"]) > 1e-3
    other = list(md.run_dynamics(start(), calculator, md.MDSettings("nvt", 300, 20, 2.0, 20.0, seed=6)))
    assert other[-1].potential_eV != first[-1].potential_eV


def test_velocities_of_the_start_are_kept(calculator):
    frame = start()
    frame.set_velocities(np.full((8, 3), 0.01))
    state = next(md.run_dynamics(frame, calculator, md.MDSettings("nve")))
    assert state.kinetic_eV == pytest.approx(frame.get_kinetic_energy())
    with pytest.raises(UserError, match="no velocities: give a temperature"):
        next(md.run_dynamics(start(), calculator, md.MDSettings("nve")))


def test_settings_are_checked():
    with pytest.raises(UserError, match="`temperature_K` must be given for ensemble nvt"):
        md.MDSettings("nvt")
    with pytest.raises(UserError, match="`timestep_fs` must be positive; got -1"):
        md.MDSettings(timestep_fs=-1)
    with pytest.raises(UserError, match="Unknown ensemble 'nve2'. Perhaps you meant 'nve'"):
        md.MDSettings("nve2")


def test_a_run_that_blows_up_says_so(calculator):
    frame = start()
    frame.set_velocities(np.random.default_rng(0).standard_normal((8, 3)) * 10 / units.fs)
    with pytest.raises(UserError, match="blown up|apart"):
        list(md.run_dynamics(frame, calculator, md.MDSettings("nve", steps=5, timestep_fs=1.0, interval=1)))


def test_resumed_run_equals_an_uninterrupted_one(calculator, tmp_path):
    whole = md.MDSettings("nve", 300, steps=20, timestep_fs=2.0, interval=5, seed=1)
    half = md.MDSettings("nve", 300, steps=10, timestep_fs=2.0, interval=5, seed=1)
    expected = list(md.run_dynamics(start(), calculator, whole))
    trajectory, table = tmp_path / "t.xyz", tmp_path / "e.dat"
    with md.record_trajectory(trajectory, table) as append:
        for state in md.run_dynamics(start(), calculator, half):
            append(state)
    # killed while writing the next frame and line
    with open(trajectory, "a") as file:
        file.write("8\nProperties=species:S:1:pos:R:3\nCu 0.0 0.0 0.0\n")
    with open(table, "a") as file:
        file.write("        15   30.0")
    again = md.resume_trajectory(trajectory, table)
    with md.record_trajectory(trajectory, table) as append:
        for state in md.run_dynamics(again, calculator, whole):
            append(state)
    frames = ase.io.read(trajectory, ":")
    assert [frame.info["step"] for frame in frames] == [0, 5, 10, 15, 20]
    # extended XYZ keeps 8 decimals of positions and momenta
    np.testing.assert_allclose(frames[-1].positions, expected[-1].atoms.positions, atol=1e-6)
    rows = np.loadtxt(table)
    np.testing.assert_allclose(rows[:, 0], [0, 5, 10, 15, 20])
    np.testing.assert_allclose(rows[-1, 3], expected[-1].potential_eV, atol=1e-6)
    np.testing.assert_allclose(rows[-1, 6], expected[-1].drift_eV_per_atom, atol=1e-6)
    assert table.read_text().startswith("# step time_fs temperature_K potential_eV")


def test_resume_needs_a_trajectory(tmp_path, small_atoms):
    with pytest.raises(UserError, match="there is no trajectory to resume"):
        md.resume_trajectory(tmp_path / "none.xyz", None)
    ase.io.write(tmp_path / "other.xyz", small_atoms[0])
    with pytest.raises(UserError, match="was not written by gpmlp md"):
        md.resume_trajectory(tmp_path / "other.xyz", None)
    (tmp_path / "cut.xyz").write_text("8\n")
    with pytest.raises(UserError, match="holds no complete frame"):
        md.resume_trajectory(tmp_path / "cut.xyz", None)


def test_resume_cuts_nothing_off_files_that_are_not_of_the_run(calculator, tmp_path):
    trajectory, table = tmp_path / "t.xyz", tmp_path / "e.dat"
    with md.record_trajectory(trajectory, table) as append:
        append(next(md.run_dynamics(start(), calculator, md.MDSettings("nve", 300))))
    before = trajectory.read_text() + "8\ncut off"
    trajectory.write_text(before)
    for notes in ("my notes\n", "notes without a line end"):
        (tmp_path / "notes").write_text(notes)
        with pytest.raises(UserError, match="notes: is no table of energies written by gpmlp md"):
            md.resume_trajectory(trajectory, tmp_path / "notes")
        assert (tmp_path / "notes").read_text() == notes
    with pytest.raises(UserError, match="t.xyz: is a run of Cu8, but the start is Ag4; give the start which that run"):
        md.resume_trajectory(trajectory, table, ase.build.bulk("Ag", cubic=True))
    assert trajectory.read_text() == before
    assert md.resume_trajectory(trajectory, table, start()).info["step"] == 0
    assert trajectory.read_text() == before.removesuffix("8\ncut off")


def test_old_files_are_not_replaced_unasked(tmp_path):
    old = tmp_path / "t.xyz"
    old.touch()
    with pytest.raises(UserError, match="exists; continue that run with --resume"):
        md.check_files([old], existing=False)
    md.check_files([old], existing=True)
    with pytest.raises(UserError, match="the folder .* does not exist"):
        md.check_files([tmp_path / "no" / "t.xyz"], existing=False)


def test_files_are_touched_when_the_first_state_has_come(calculator, tmp_path):
    old, table = tmp_path / "t.xyz", tmp_path / "e.dat"
    old.write_text("old")
    with md.record_trajectory(old, table, replace=True) as append:
        assert old.read_text() == "old" and not table.exists()
        for state in md.run_dynamics(start(), calculator, md.MDSettings("nve", 300, steps=2, interval=1)):
            append(state)
    assert len(ase.io.read(old, ":")) == 3 and len(table.read_text().splitlines()) == 4


# --- how sure it is on the way


def test_doubt_is_what_the_potential_says(potential):
    frame = copper(43, cells=3, rattle=0.2)
    found = md.UncertaintyMonitor(potential)(frame)
    structures, _ = from_ase([frame])
    whole = potential(structures, ["atom_energies", "forces", "sampled_forces"], novelty=True)
    np.testing.assert_allclose(found.local_energy_std, whole.atom_energies_variance.total.sqrt(), rtol=1e-12)
    np.testing.assert_allclose(found.novelty, whole.novelty, rtol=1e-12)
    std = whole.forces_variance.total.sum(1).sqrt()
    assert len(frame) > md.FORCE_ATOMS  # the largest of those that are looked at
    estimates = whole.sampled_forces_covariance.diagonal().total.sum(1).sqrt()
    np.testing.assert_allclose(found.atom_force_std, estimates, rtol=1e-9)
    suspects = estimates.topk(md.FORCE_ATOMS).indices
    assert found.force_std == pytest.approx(float(std[suspects].max()), rel=1e-9)
    assert found.force_atom in suspects.tolist() and found.force_std == pytest.approx(float(std[found.force_atom]))
    assert found.largest == (found.force_std, found.local_energy_std.max(), found.novelty.max())
    frame = copper(44)
    few = md.UncertaintyMonitor(potential)(frame)  # of so few atoms all are looked at
    structures, _ = from_ase([frame])
    every = potential(structures, "forces").forces_variance.total.sum(1).sqrt()
    assert few.force_std == pytest.approx(float(every.max()), rel=1e-9) and few.force_atom == int(every.argmax())


def test_a_run_says_how_sure_the_potential_is(potential, calculator, tmp_path):
    trajectory, table = tmp_path / "t.xyz", tmp_path / "e.dat"
    settings = md.MDSettings("nve", 300, steps=8, timestep_fs=2.0, interval=2, seed=1, uncertainty=4)
    look = md.UncertaintyMonitor(potential)
    plain = list(md.run_dynamics(start(), calculator, settings))
    with md.record_trajectory(trajectory, table) as append:
        states = [state for state in md.run_dynamics(start(), calculator, settings, look) if append(state) is None]
    assert [s.potential_eV for s in states] == [s.potential_eV for s in plain]
    assert [s.uncertainty is not None for s in states] == [True, False, True, False, True]
    frames, rows = ase.io.read(trajectory, ":"), np.loadtxt(table)
    for frame, row, state in zip(frames, rows, states, strict=True):
        own = look(state.atoms) if state.uncertainty else None
        assert ("gpmlp_novelty" in frame.arrays) == ("gpmlp_largest_force_std" in frame.info) == (own is not None)
        if own is None:
            assert np.isnan(row[7:]).all()
            continue
        np.testing.assert_allclose(row[7:], own.largest, rtol=1e-5)
        np.testing.assert_allclose(frame.arrays["gpmlp_local_energy_std"], own.local_energy_std, atol=1e-8)
        np.testing.assert_allclose(frame.arrays["gpmlp_force_std"], own.atom_force_std, atol=1e-8)
        np.testing.assert_allclose(frame.arrays["gpmlp_novelty"], own.novelty, atol=1e-7)
        assert frame.info["gpmlp_largest_force_std"] == pytest.approx(own.force_std, rel=1e-6)
        assert frame.info["gpmlp_largest_force_std_atom"] == own.force_atom
    # what was said of a frame is not handed on by a run that begins with it
    later = md.MDSettings("nve", steps=10, timestep_fs=2.0, interval=2, uncertainty=4)
    (state,) = md.run_dynamics(md.resume_trajectory(trajectory, table), calculator, later, look)
    assert not [key for key in (*state.atoms.arrays, *state.atoms.info) if key.startswith("gpmlp_")]


def test_strides_of_doubt_are_checked(potential):
    with pytest.raises(UserError, match="`uncertainty` must be a multiple of the 10 steps between two frames; got 25"):
        md.MDSettings(uncertainty=25)
    bare = dataclasses.replace(potential, variances=None)
    for changes, why in (
        ({}, "its file is of format 1"),
        ({"provenance": {"sample": {}}}, "it is a sample of a posterior"),
        ({"recipe": potential.recipe.model_copy(update={"variance": False})}, "fitted with variance: false"),
    ):
        with pytest.raises(UserError, match=f"holds no posterior factor, so it can give no variances: .*{why}"):
            md.UncertaintyMonitor(dataclasses.replace(bare, **changes))
    blind = dataclasses.replace(potential, novelty=None)
    found = md.UncertaintyMonitor(blind)(start())
    assert found.novelty is None and np.isnan(found.largest[2]) and found.force_std > 0


# --- starts and trajectories of other programs


def bonded() -> Atoms:
    atoms = copper(41)
    atoms.set_constraint([FixBondLength(0, 1), FixAtoms([3])])
    return atoms


def test_constraints_of_the_start_are_kept_by_resume(calculator, tmp_path):
    ase.io.write(tmp_path / "start.traj", bonded())
    start = read_frames(tmp_path / "start.traj", -1)[0][0]
    settings = md.MDSettings("nvt", 600.0, steps=20, interval=10)
    with md.record_trajectory(tmp_path / "md.xyz", None) as append:
        for state in md.run_dynamics(start, calculator, settings):
            append(state)
    for other in (None, copper(41)):
        with pytest.raises(
            UserError, match="run with the constraints FixBondLengths, and the start has no such constraint"
        ):
            md.resume_trajectory(tmp_path / "md.xyz", None, other)
    again = md.resume_trajectory(tmp_path / "md.xyz", None, read_frames(tmp_path / "start.traj", -1)[0][0])
    assert sorted(type(c).__name__ for c in again.constraints) == ["FixAtoms", "FixBondLengths"]
    length = bonded().get_distance(0, 1, mic=True)
    *_, state = md.run_dynamics(again, calculator, dataclasses.replace(settings, steps=60))
    assert state.step == 60
    assert state.atoms.get_distance(0, 1, mic=True) == pytest.approx(length, abs=1e-6)  # eight decimals in the file
    np.testing.assert_array_equal(state.atoms.positions[3], again.positions[3])


@pytest.mark.parametrize("name", ["velo", "vel", "Velocities"])
def test_velocities_of_other_programs(calculator, tmp_path, name):
    atoms, rng = copper(42), np.random.default_rng(0)
    md.draw_velocities(atoms, 300.0, rng)
    expected, temperature = atoms.get_velocities(), atoms.get_temperature()
    del atoms.arrays["momenta"]
    atoms.set_array(name, expected * units.fs)  # A/fs
    ase.io.write(tmp_path / "start.xyz", atoms)
    start = read_frames(tmp_path / "start.xyz")[0][0]
    with pytest.warns(ProgressNotice, match=rf"velocities of the start are `{name}`, in A/fs: {temperature:.0f} K"):
        first = next(md.run_dynamics(start, calculator, md.MDSettings(steps=0)))
    np.testing.assert_allclose(first.atoms.get_velocities(), expected, atol=1e-6)
    assert name not in first.atoms.arrays
    # in ASE's unit, or in A/ps: another temperature by a factor of a hundred or a million
    for factor in (1 / units.fs, 1000.0):
        start.arrays[name] = expected * units.fs * factor
        with pytest.raises(
            UserError, match=f"The velocities `{name}` of the start would be those of .* K if their unit is A/fs"
        ):
            next(md.run_dynamics(start, calculator, md.MDSettings(steps=0)))


@pytest.mark.parametrize("suffix", ["traj", "xyz"])
def test_trajectories_of_ase_keep_standard_deviations(potential, tmp_path, suffix):
    atoms = copper(43)
    atoms.calc = GPCalculator(potential, uncertainty="forces", novelty=potential.novelty is not None)
    path = tmp_path / f"a.{suffix}"
    with VelocityVerlet(atoms, 1.0 * units.fs) as dynamics:
        dynamics.attach(lambda: ase.io.write(path, atoms, append=True) if suffix == "xyz" else file.write(atoms))
        if suffix == "traj":
            with ase.io.Trajectory(path, "w") as file:
                dynamics.run(3)
        else:
            dynamics.run(3)
    frames = read_frames(path)[0]
    assert len(frames) == 4
    for frame in frames:
        twin = frame.copy()
        twin.calc = GPCalculator(potential, uncertainty="forces")
        twin.get_forces()
        np.testing.assert_allclose(frame.info["gpmlp_forces_std"], twin.calc.results["forces_std"], rtol=1e-5)
        if potential.novelty is not None:
            assert len(frame.info["gpmlp_novelty"]) == len(frame)
    _, targets = read(path)  # and they are no labels
    assert not targets.forces.isnan().any()


def test_info_is_left_alone_without_uncertainty(calculator):
    atoms = copper(43)
    atoms.calc = calculator
    atoms.get_forces()
    assert not atoms.info.keys() - copper(43).info.keys()
