"""Exact zeros that are no labels, and those that are."""

from __future__ import annotations

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixCartesian

from gpmlp.core.findings import FindingWarning
from gpmlp.io.ase_atoms import from_ase, read, structures_from_ase
from gpmlp.io.zero_labels import not_at_rest


def labelled(atoms: Atoms, forces=None, stress=None) -> Atoms:
    forces = np.random.default_rng(0).normal(size=(len(atoms), 3)) if forces is None else forces
    atoms.calc = SinglePointCalculator(
        atoms, energy=-1.0, forces=forces, **({} if stress is None else {"stress": stress})
    )
    return atoms


def slab() -> Atoms:
    atoms = fcc111("Cu", (2, 2, 3), vacuum=6)
    add_adsorbate(atoms, "O", 1.3, "fcc")
    atoms.rattle(0.05, seed=1)
    return atoms


@pytest.mark.parametrize("in_file", [True, False])
def test_zeros_on_fixed_atoms_are_missing(tmp_path, in_file):
    atoms = slab()
    atoms.set_constraint(FixAtoms(range(4)))
    forces = np.random.default_rng(0).normal(size=(13, 3))
    forces[:4] = 0
    forces[7, 1] = 0  # one component of an atom that moves
    labelled(atoms, forces)
    with pytest.warns(FindingWarning, match="forces of exactly 0 on 4 atoms that are fixed") as caught:
        if in_file:
            ase.io.write(tmp_path / "a.xyz", atoms)
            _, targets = read(tmp_path / "a.xyz")
        else:
            _, targets = from_ase([atoms])
    assert targets.forces.isnan().any(1).nonzero()[:, 0].tolist() == [0, 1, 2, 3]
    (said,) = [w.message for w in caught if isinstance(w.message, FindingWarning)]
    assert said.finding.numbers == {"atoms": 4.0}


def test_forces_that_are_not_zero_on_fixed_atoms_are_labels():
    atoms = slab()
    atoms.set_constraint(FixAtoms(range(4)))
    assert not from_ase([labelled(atoms)])[1].forces.isnan().any()


def test_fixed_components():
    atoms = slab()
    atoms.set_constraint(FixCartesian([2], mask=[True, False, True]))
    forces = np.random.default_rng(0).normal(size=(13, 3))
    forces[2] = 0, 1, 0
    forces[5, 0] = 0
    with pytest.warns(FindingWarning, match="on 1 atoms that are fixed"):
        unknown = from_ase([labelled(atoms, forces)])[1].forces.isnan()
    assert unknown.nonzero().tolist() == [[2, 0], [2, 2]]


@pytest.mark.parametrize(("name", "held"), [("fixed", True), ("FREE", False)])
def test_marks_under_other_names(tmp_path, name, held):
    atoms, forces = slab(), np.zeros((13, 3))
    forces[4:] = 1.0
    flags = np.full(13, not held)
    flags[:4] = held
    atoms.set_array(name, flags)
    ase.io.write(tmp_path / "a.xyz", labelled(atoms, forces))
    with pytest.warns(FindingWarning, match="on 4 atoms that are fixed"):
        read(tmp_path / "a.xyz")


def test_zeros_of_whole_frames_that_are_not_at_rest_are_missing():
    moving = bulk("Si", cubic=True) * (2, 1, 1)
    moving.rattle(0.05, seed=0)
    water = molecule("H2O")
    with pytest.warns(FindingWarning, match=r"on 19 atoms that symmetry does not keep at rest"):
        _, targets = from_ase([labelled(a, np.zeros((len(a), 3))) for a in (moving, bulk("Si"), water)])
    assert targets.forces.isnan().all(1).tolist() == [True] * 16 + [False] * 2 + [True] * 3


@pytest.mark.parametrize(
    "atoms",
    [
        bulk("Si", cubic=True),
        bulk("Mg"),
        bulk("NaCl", "rocksalt", 5.6),
        bulk("Fe"),
        Atoms("H"),
        Atoms("H", cell=[9] * 3, pbc=True),
    ],
    ids=str,
)
def test_zeros_by_symmetry_are_labels(atoms):
    atoms.positions += 0.001 * np.random.default_rng(0).uniform(-1, 1, atoms.positions.shape)  # as files round
    assert not from_ase([labelled(atoms, np.zeros((len(atoms), 3)))])[1].forces.isnan().any()


def test_rounded_zeros_of_relaxed_structures_are_labels():
    forces = np.round(np.random.default_rng(0).normal(size=(13, 3)) * 0.01, 3)
    forces[5] = 0
    assert not from_ase([labelled(slab(), forces)])[1].forces.isnan().any()
    forces[1] = 1.0
    with pytest.warns(FindingWarning, match="on 1 atoms that symmetry does not keep at rest"):
        assert from_ase([labelled(slab(), forces)])[1].forces[5].isnan().all()


def test_the_middle_of_a_molecule_is_at_rest():
    co2 = molecule("CO2")
    moving = not_at_rest(structures_from_ase([co2]))
    assert moving.tolist() == [False, True, True]
    co2.positions[0] += 0.1
    assert not_at_rest(structures_from_ase([co2])).all()


def test_zero_stresses():
    crystal, gas = bulk("Si"), molecule("H2O")
    with pytest.warns(FindingWarning, match="exactly 0"):
        _, targets = from_ase([labelled(crystal, stress=np.zeros(6)), labelled(gas, stress=np.zeros(6))])
    assert targets.stresses.isnan().all() and not targets.energies.isnan().any()
    shear = torch.as_tensor([0.1, 0.1, 0.1, 0, 0, 0])
    assert not from_ase([labelled(bulk("Si"), stress=shear.numpy())])[1].stresses.isnan().any()
