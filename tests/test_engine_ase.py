"""The ASE calculator."""

from __future__ import annotations

import copy
import pickle

import ase.build
import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.stress import full_3x3_to_voigt_6_stress
from conftest import copper

from gpmlp.core import neighbors
from gpmlp.core.errors import UserError
from gpmlp.engines.ase import GPCalculator
from gpmlp.io.ase_atoms import structures_from_ase
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
