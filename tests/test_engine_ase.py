"""The ASE calculator and molecular dynamics with it."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import ase.build
import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.calculators.calculator import PropertyNotImplementedError
from ase.constraints import FixAtoms, FixBondLength
from ase.md.verlet import VelocityVerlet
from ase.stress import full_3x3_to_voigt_6_stress
from conftest import copper

from gpmlp.core import neighbors
from gpmlp.core.errors import ProgressNotice, UserError
from gpmlp.engines import md
from gpmlp.engines.ase import GPCalculator
from gpmlp.io.ase_atoms import from_ase, read, read_frames, structures_from_ase
from gpmlp.native import library
from gpmlp.potential.potential import Potential


@pytest.fixture
def calculator(potential):
    return GPCalculator(potential, "my cell")


def test_everything_a_calculator_has(calculator, potential, small_atoms, small_set):
    prediction = potential(small_set[0].select([3]))
    frame = small_atoms[3].copy()
    frame.calc = calculator
    assert frame.get_potential_energy() == pytest.approx(float(prediction.energies), abs=1e-12)
    assert frame.get_potential_energy(force_consistent=True) == frame.get_potential_energy()
    np.testing.assert_allclose(frame.get_potential_energies(), prediction.atom_energies.numpy(), atol=1e-12)
    np.testing.assert_allclose(frame.get_forces(), prediction.forces.numpy(), atol=1e-12)
    np.testing.assert_allclose(frame.get_stress(voigt=False), prediction.stresses[0].numpy(), atol=1e-12)


def test_a_calculator_needs_a_potential(model_file):
    for name in (str(model_file), model_file):
        with pytest.raises(UserError, match=r"needs a potential; got .*copper.gpmlp.*GPCalculator\(gpmlp.load\("):
            GPCalculator(name)


def test_a_skin_does_not_show(potential):
    """A frame that is strained, moved and wrapped: the same with every width of the skin, and fewer searches with one."""
    start, rng, widths = copper(7, 2), np.random.default_rng(0), (0.0, 0.3, 0.6)
    calculators = [GPCalculator(potential, skin=skin) for skin in widths]
    for k in range(12):
        frame = start.copy()
        frame.set_cell(start.cell.array @ (np.eye(3) + 0.001 * k), scale_atoms=True)
        frame.positions += 0.01 * rng.standard_normal(frame.positions.shape)
        if k > 9:
            frame.wrap()
        found = []
        for calculator in calculators:
            frame.calc = calculator
            found.append(np.concatenate([frame.get_forces().ravel(), frame.get_stress()]))
        for other in found[1:]:
            np.testing.assert_array_equal(other, found[0])
    searched = [calculator._verlet_list.searched for calculator in calculators]
    assert searched[0] == 12 and searched[2] < 6
    with pytest.raises(UserError, match="`skin` must be zero or positive"):
        GPCalculator(potential, skin=-0.1)


def strain_of(kind: str, size: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Presses along an axis, shears or changes the volume by a strain of this norm; with the direction in which it presses most."""
    strain, axes, sign = np.zeros((3, 3)), rng.permutation(3), rng.choice([-1, 1])
    if kind == "shear":
        strain[axes[0], axes[1]] = sign * size
    else:
        pressed = axes[: 1 if kind == "uniaxial" else 3]
        strain[pressed, pressed] = -size / np.sqrt(len(pressed))
    return np.eye(3) + strain, np.linalg.eigh(strain + strain.T)[1][:, 0].round(12)


@pytest.mark.parametrize("kind", ["uniaxial", "shear", "volume"])
@pytest.mark.parametrize("seed", range(4))
def test_cells_and_moves_use_up_the_same_skin(potential, kind, seed):
    """Two atoms beyond cutoff and skin, across the cell; a strain that the skin bears and moves that it would bear in the same cell bring
    them near: as searched each time, with and without periodicity across."""
    rng = np.random.default_rng(seed)
    kept, afresh = (GPCalculator(potential, skin=skin) for skin in (0.6, 0.0))

    def check() -> None:
        found = []
        for calculator in (kept, afresh):
            frame.calc = calculator
            found.append(np.hstack([frame.get_potential_energy(), frame.get_forces().ravel(), frame.get_stress()]))
        np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-9)

    for _ in range(4):
        gap, size = potential.reach + rng.uniform(0.6, 0.7), rng.uniform(0.4, 0.59) / (potential.reach + 0.6)
        strain, direction = strain_of(kind, size, rng)
        image = (direction / abs(direction).max()).round()
        length = (gap + rng.uniform(2, 3)) / np.linalg.norm(image)
        positions = [[0, 0, 0], image * length - direction * gap]
        frame = Atoms("Cu2", positions=positions, cell=[length] * 3, pbc=(image != 0) | (rng.random(3) < 0.5))
        for _ in range(4):  # a pace at which a skin lasts, and steps that the core makes alone
            frame.positions += 1e-4 * rng.standard_normal((2, 3))
            check()
        searched, start = kept._verlet_list.searched, frame.copy()
        frame.set_cell(frame.cell.array @ strain, scale_atoms=True)
        check()
        assert kept._verlet_list.searched == searched
        carried = frame.positions.copy()
        for way in (0.05, 0.1, 0.15, 0.2, 0.25, 0.28):
            frame.positions = carried + way * np.outer([-1, 1], direction)
            check()
        frame.set_cell(start.cell)
        frame.positions = start.positions
        check()


def test_a_prediction_that_was_stopped_leaves_no_old_pairs(potential, monkeypatch):
    """Stopped after a search, which goes on from other positions than the pairs of before."""
    frame = Atoms("Cu2", positions=[[0, 0, 0], [0, 0, potential.reach + 0.65]])
    frame.calc = GPCalculator(potential)
    for _ in range(12):
        frame.positions[0, 0] += 1e-3
        frame.get_forces()

    def stop(*_, **__):
        raise KeyboardInterrupt

    frame.positions[1, 2] -= 1.0
    with monkeypatch.context() as patch:
        patch.setattr(Potential, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            frame.get_forces()
    frame.positions[1, 2] -= 0.01
    wanted = potential(structures_from_ase([frame])).forces
    assert wanted.abs().max() > 1e-6
    np.testing.assert_allclose(frame.get_forces(), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda of: pickle.loads(pickle.dumps(of))], ids=["copy", "pickle"])
def test_calculators_are_copied_at_work(potential, copied):
    """Between two searches too: the copy and the original go on with atoms of their own."""
    frame, rng = copper(7, 2), np.random.default_rng(0)
    frame.calc = GPCalculator(potential)
    for _ in range(4):
        frame.positions += 0.002 * rng.standard_normal(frame.positions.shape)
        frame.get_forces()
    if library.compiled() is not None:
        assert frame.calc._moving is not None
    other = frame.copy()
    other.calc = copied(frame.calc)
    np.testing.assert_array_equal(other.calc.results["forces"], frame.calc.results["forces"])
    for _ in range(3):
        for one in (frame, other):
            one.positions += 0.01 * rng.standard_normal(frame.positions.shape)
            np.testing.assert_allclose(one.get_forces(), potential(structures_from_ase([one])).forces, atol=1e-12)


@pytest.mark.skipif(library.compiled() is None, reason="gpmlp was built without a compiler")
def test_between_two_searches_the_core_alone_is_asked(potential, monkeypatch, two_threads):
    """Results are those of the potential to the last bit, whatever has changed since the last call."""
    asked, ask = [], Potential.__call__
    monkeypatch.setattr(Potential, "__call__", lambda *args, **kwargs: asked.append(1) or ask(*args, **kwargs))
    monkeypatch.setattr(neighbors, "PAIRS", 100)
    frame, rng, calculator = copper(7, 2), np.random.default_rng(0), GPCalculator(potential)
    frame.calc = calculator

    def check(by) -> None:
        wanted = ask(by, structures_from_ase([frame]))
        np.testing.assert_array_equal(frame.get_forces(), wanted.forces)
        np.testing.assert_array_equal(frame.get_stress(voigt=False), wanted.stresses[0])
        np.testing.assert_array_equal(frame.get_potential_energies(), wanted.atom_energies)
        assert torch.equal(calculator.prediction.energies, wanted.energies)

    for k in range(14):
        torch.set_num_threads(1 + k % 2)
        frame.positions += 0.005 * rng.standard_normal(frame.positions.shape)
        check(potential)
    assert len(asked) < 5
    assert calculator._verlet_list.searched < 4
    assert torch.equal(
        calculator.pairs.centers, neighbors.find_neighbors(calculator.structures, potential.reach).centers
    )
    other = potential.to(descriptors="float32")
    for change in (
        lambda: setattr(calculator, "potential", other),
        lambda: frame.set_cell(1.01 * frame.cell),
        lambda: None,
    ):
        change()
        frame.positions[0] += 0.01
        check(other)
    calculator.uncertainty = "atom_energies"
    frame.positions[0] += 0.01
    frame.get_forces()
    assert calculator.results["local_energy_std"].shape == (len(frame),)
    calculator.uncertainty = None
    frame.positions[1] = frame.positions[0] + 0.05
    with pytest.raises(UserError, match="atoms 0 and 1 are"):
        frame.get_forces()


def test_a_calculation_is_held_in_full(potential):
    """As predicted afresh, to the last bit, however the atoms came to be; with all pairs within the cutoff."""
    frame, calculator = copper(7, 2), GPCalculator(potential)
    frame.calc = calculator

    def check() -> None:
        results = frame.get_forces(), frame.get_stress(), frame.get_potential_energies(), frame.get_potential_energy()
        fresh = structures_from_ase([frame])
        wanted, near = potential(fresh), neighbors.find_neighbors(fresh, potential.reach).sorted()
        for name in ("positions", "cells", "species", "magnetic_moments", "volumes"):
            ours, other = getattr(calculator.structures, name), getattr(fresh, name)
            assert ours is other or torch.equal(ours, other), name
        for name in ("centers", "neighbors", "shifts"):
            assert torch.equal(getattr(calculator.pairs, name), getattr(near, name))
        for name in ("energies", "atom_energies", "forces", "stresses"):
            assert torch.equal(getattr(calculator.prediction, name), getattr(wanted, name))
        stress = full_3x3_to_voigt_6_stress(wanted.stresses[0].numpy())
        for ours, other in zip(results, (wanted.forces, stress, wanted.atom_energies, wanted.energies[0]), strict=True):
            np.testing.assert_array_equal(ours, other)

    check()
    for moments in (None, np.arange(8.0), None):
        frame.set_initial_magnetic_moments(moments)
        for _ in range(3):
            frame.positions[0] += 0.01
            check()
    frame.set_cell(frame.cell.array * 1.01, scale_atoms=True)
    check()
    good = frame.numbers.copy()
    frame.numbers[3] = 0
    for _ in range(2):  # what could not be converted is not taken for the atoms of the last call
        frame.positions[0] += 0.01
        with pytest.raises(UserError, match="atom 3 is"):
            frame.get_forces()
    frame.numbers[:] = good
    check()
    frame.positions[0, 0] = np.nan
    with pytest.raises(UserError, match="a position is NaN or infinite"):
        frame.get_forces()


def test_a_potential_needs_structures(potential, small_atoms):
    for atoms in (small_atoms[0], small_atoms):
        with pytest.raises(UserError, match=r"got (Atoms|list)\. Convert .* gpmlp.io.ase_atoms.structures_from_ase"):
            potential(atoms)


def test_a_potential_shows_itself_in_one_line(potential):
    assert repr(potential) == "Potential(Cu; soap; cutoff 4 A; 40 columns)"


def test_forces_and_stress_are_derivatives(calculator):
    frame = copper(40)
    frame.calc = calculator
    step = 1e-4
    energies = []
    for sign in (1, -1):
        moved = frame.copy()
        moved.positions[1, 2] += sign * step
        moved.calc = calculator
        energies.append(moved.get_potential_energy())
    # central differences: error of the order step^2 = 1e-8 times the third derivative
    assert -(energies[0] - energies[1]) / (2 * step) == pytest.approx(frame.get_forces()[1, 2], abs=1e-5)
    energies = []
    for sign in (1, -1):
        strain = np.eye(3)
        strain[1, 2] = strain[2, 1] = 0.5 * sign * step
        strained = frame.copy()
        strained.set_cell(frame.cell.array @ strain, scale_atoms=True)
        strained.calc = calculator
        energies.append(strained.get_potential_energy())
    stress = (energies[0] - energies[1]) / (2 * step) / frame.get_volume()
    assert stress == pytest.approx(frame.get_stress()[3], abs=1e-7)


def test_changes_are_noticed(calculator, potential):
    frame = copper(41)
    frame.calc = calculator
    first = frame.get_potential_energy()
    frame.set_cell(frame.cell.array * 1.02, scale_atoms=True)
    second = frame.get_potential_energy()
    assert second != first
    frame.pbc = [True, True, False]
    third = frame.get_potential_energy()
    assert third != second
    frame.pbc = True
    del frame[0]
    assert frame.get_forces().shape == (3, 3)
    frame.set_initial_magnetic_moments([1.0, 0.0, 0.0])
    assert calculator.check_state(frame) == []


def test_stress_needs_a_volume(calculator):
    cluster = Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 2.4]])
    cluster.calc = calculator
    assert np.isfinite(cluster.get_forces()).all()
    with pytest.raises(PropertyNotImplementedError):
        cluster.get_stress()
    # energies of an infinite crystal in a periodic cell come with one
    crystal = ase.build.bulk("Cu")
    crystal.calc = calculator
    assert crystal.get_stress().shape == (6,)


def test_unknown_species_are_named(calculator):
    frame = ase.build.bulk("NaCl", "rocksalt", a=5.6)
    frame.calc = calculator
    with pytest.raises(UserError, match=r"my cell: the potential was not trained on Na .*it knows Cu"):
        frame.get_potential_energy()


def test_atoms_on_top_of_each_other(calculator):
    frame = Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 0.1]])
    frame.calc = calculator
    with pytest.raises(UserError, match="my cell: atoms . and . are 0.100 A apart"):
        frame.get_potential_energy()


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
