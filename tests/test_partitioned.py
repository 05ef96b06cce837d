"""The calculator of a partition: the oracle's forces inside, the potential's outside, and one conserved energy that they derive from."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, fcc111, molecule
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.calculators.qmmm import ForceQMMM
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE

import gpmlp
from gpmlp.core.errors import UserError
from gpmlp.engines.ase import GPCalculator
from gpmlp.io.ase_atoms import from_ase, structures_from_ase
from gpmlp.properties.partition import VACUUM, Partition, RegionRule

SMALL = {"descriptor": {"cutoff": 4.0, "n_max": 4, "l_max": 3}, "inducing": {"n": 30, "gradients": 2}}
DIFFERENCE = {"descriptor": {"cutoff": 4.0, "n_max": 4, "l_max": 3}, "inducing": {"n": 40, "gradients": 3}}
BUFFER = 5.0


def labelled(atoms: Atoms) -> Atoms:
    point = atoms.copy()
    point.calc = EMT()
    atoms.calc = SinglePointCalculator(atoms, energy=point.get_potential_energy(), forces=point.get_forces())
    return atoms


def rattled(atoms: Atoms, size: float, seed: int) -> Atoms:
    moved = atoms.copy()
    moved.rattle(size, seed=seed)
    return moved


@pytest.fixture(scope="module")
def copper() -> gpmlp.Potential:
    """Of the perfect crystal."""
    crystal = bulk("Cu", cubic=True) * (2, 2, 2)
    frames = [labelled(rattled(crystal, 0.08, seed)) for seed in range(10)]
    return gpmlp.fit(*from_ase(frames), gpmlp.Recipe.model_validate(SMALL))[0]


@functools.cache
def _interstitial() -> Atoms:
    atoms = bulk("Cu", cubic=True) * (2, 2, 3)
    atoms.append("Cu")
    atoms.positions[-1] = atoms.positions[0] + [1.8, 0.2, 0.1]
    atoms.calc = EMT()
    FIRE(atoms, logfile=None).run(fmax=0.2, steps=100)
    atoms.calc = None
    return atoms


def crowded(seed: int = 0) -> Atoms:
    """A crystal with an atom too many; a little off its places."""
    return rattled(_interstitial(), 0.05, seed)


@pytest.fixture(scope="module")
def region(copper) -> Partition:
    return gpmlp.partition(copper, structures_from_ase([crowded()], ["crowded"]), RegionRule(atoms=8, buffer=BUFFER))


@pytest.fixture(scope="module")
def learned(copper, region) -> gpmlp.PartitionedCalculator:
    calculator = gpmlp.PartitionedCalculator(copper, EMT(), region, None, DIFFERENCE)
    calculator.learn([crowded(seed) for seed in range(4)])
    return calculator


def test_oracle_inside_and_model_outside(copper, region, learned):
    """Of a structure that was not labelled: in the core the error falls to a third, elsewhere forces stay those of the model."""
    atoms = crowded(9)
    truth = labelled(atoms.copy()).get_forces()
    model = copper(structures_from_ase([atoms])).forces.numpy()
    atoms.calc = learned
    forces, core = atoms.get_forces(), region.core
    outside = np.setdiff1d(np.arange(len(atoms)), core)
    before, after = (np.sqrt(np.mean((f - truth)[core] ** 2)) for f in (model, forces))
    assert before > 0.1 and after < 0.4 * before
    moved = np.sqrt(np.mean((forces - model)[outside] ** 2))
    assert moved < 1.5 * np.sqrt(np.mean(region.force_sigma[outside] ** 2 / 3))
    error, of_model = (np.sqrt(np.mean((f - truth)[outside] ** 2)) for f in (forces, model))
    assert error < 1.1 * of_model
    foreseen = learned.force_std(atoms)
    z = np.linalg.norm((forces - truth)[core], axis=1) / foreseen
    assert 0.2 < np.sqrt(np.mean(z**2)) < 2.5


def test_forces_and_stress_derive_from_the_energy(learned):
    """Central differences, of an atom of the core, of one outside, and of a strain; far from every label as well."""
    atoms = crowded(5)
    atoms.positions[3] += 0.3
    atoms.calc = learned
    forces, stress = atoms.get_forces(), atoms.get_stress(voigt=False)
    for i in (int(learned.partition.core[0]), int(np.argmin(learned.partition.force_sigma))):
        for axis in range(3):
            energies = []
            for sign in (1, -1):
                moved = atoms.copy()
                moved.positions[i, axis] += sign * 1e-4
                moved.calc = learned
                energies.append(moved.get_potential_energy())
            assert forces[i, axis] == pytest.approx((energies[1] - energies[0]) / 2e-4, abs=1e-5)
    energies = []
    for sign in (1, -1):
        moved = atoms.copy()
        strain = np.eye(3)
        strain[0, 0] += sign * 1e-5
        moved.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        moved.calc = learned
        energies.append(moved.get_potential_energy())
    assert stress[0, 0] == pytest.approx((energies[0] - energies[1]) / 2e-5 / atoms.get_volume(), abs=1e-5)


def dynamics(calculator: Calculator, steps: int, energy: Calculator | None = None) -> np.ndarray:
    """Total energies, eV per atom, each ten steps of 3 fs at some 600 K; potential energy of another calculator where one is given."""
    atoms, rng = crowded(0), np.random.default_rng(3)
    atoms.set_momenta(rng.standard_normal((len(atoms), 3)) * np.sqrt(units.kB * 600 * atoms.get_masses())[:, None])
    atoms.calc, totals = calculator, []
    moving = VelocityVerlet(atoms, 3 * units.fs)
    for _ in range(steps // 10):
        moving.run(10)
        seen = atoms.copy()
        seen.calc = energy or calculator
        totals.append((atoms.get_kinetic_energy() + seen.get_potential_energy()) / len(atoms))
    return np.array(totals)


def test_energy_is_conserved_where_mixed_forces_drift(copper, region, learned):
    """In one picosecond; mixed forces have no energy of their own: that of the oracle, which they follow in the core, is taken, and that
    of the model, which they follow elsewhere: whichever drifts less."""
    own = dynamics(learned, 330)
    mixing = ForceQMMM(crowded(), region.marks == 1, EMT(), GPCalculator(copper), buffer_width=BUFFER)
    mixed = [dynamics(mixing, 330, calculator) for calculator in (EMT(), GPCalculator(copper))]

    def drift(energies: np.ndarray) -> float:
        return abs(np.polyfit(np.linspace(0, 1, len(energies)), energies, 1)[0])

    assert np.ptp(own) < 1e-3 and drift(own) < 2e-4
    assert min(map(drift, mixed)) > 10 * drift(own)


class Counting(EMT):
    """Counts the structures that it was asked for."""

    calls = 0

    def calculate(self, *about, **more):
        self.calls += 1
        super().calculate(*about, **more)


def test_labels_come_where_it_is_not_sure(copper, region):
    """At the first structure and where the standard deviation exceeds the tolerance, not twice at one place; without one, never."""
    oracle, atoms = Counting(), crowded(0)
    atoms.calc = calculator = gpmlp.PartitionedCalculator(copper, oracle, region, 0.2, DIFFERENCE)
    atoms.get_forces()
    atoms.get_potential_energy()
    assert oracle.calls == len(calculator.labels) == 1
    atoms.positions[-1] += [0.0, 0.0, 0.4]
    before = calculator.force_std(atoms).max()
    assert before > 0.2
    atoms.get_forces()
    atoms.get_potential_energy()
    assert oracle.calls == len(calculator.labels) == 2
    assert calculator.force_std(atoms).max() < 0.9 * before
    calculator.tolerance = None
    atoms.positions[-1] -= [0.0, 0.6, 0.0]
    assert calculator.force_std(atoms).max() > 0.2
    atoms.get_forces()
    assert oracle.calls == 2


def test_without_labels_it_is_the_model(copper, region):
    atoms = crowded(1)
    atoms.calc = gpmlp.PartitionedCalculator(copper, EMT(), region, None)
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    atoms.calc = GPCalculator(copper)
    assert energy == atoms.get_potential_energy()
    assert (forces == atoms.get_forces()).all()


def test_the_page_does_what_it_says(copper):
    """The block of docs/multiscale.md, with the names that it takes as given."""
    page = (Path(__file__).resolve().parents[1] / "docs/multiscale.md").read_text(encoding="utf-8")
    (block,) = (
        b for b in re.findall(r"^```python\n(.*?)^```$", page, flags=re.M | re.S) if "PartitionedCalculator" in b
    )
    oracle, atoms = Counting(), crowded(2)
    exec(block, {"gpmlp": gpmlp, "potential": copper, "oracle": oracle, "atoms": atoms})
    assert oracle.calls and len(atoms.calc.labels) == 2 and atoms.calc.tolerance is None


# --- the cluster


def marked(atoms: Atoms, core: list[int], buffer: float) -> Partition:
    marks = np.zeros(len(atoms), dtype=int)
    marks[core] = 1
    return Partition("slab", marks, np.ones(len(atoms)), buffer, np.arange(len(atoms)), atoms)


@pytest.mark.parametrize("at", [0, 13, 62])
def test_cluster_has_the_surroundings_of_the_structure(at):
    """Distances of atoms of the core to all within the buffer are those of the structure, wherever the cell is cut, skew ones too."""
    atoms = fcc111("Cu", (5, 5, 3), vacuum=5.0)
    atoms.pbc = True
    atoms.rattle(0.1, seed=1)
    cluster, core = marked(atoms, [at], 3.2).cluster(atoms)
    assert core.sum() == 1
    near = np.sort(atoms.get_distances(at, range(len(atoms)), mic=True))
    here = np.sort(cluster.get_distances(int(np.flatnonzero(core)[0]), range(len(cluster)), mic=cluster.pbc.any()))
    near = near[near < 3.2]
    assert len(cluster) == len(near) and here == pytest.approx(near, abs=1e-9)
    assert not cluster.pbc.any()
    cluster.pbc = True
    apart = cluster.get_all_distances()[np.triu_indices(len(cluster), 1)].max()
    images = [cluster.get_distances(0, range(len(cluster)), mic=True)]
    assert apart < 6.5 and np.max(images) < 6.5  # in one piece
    heights = 1 / np.linalg.norm(np.linalg.inv(cluster.cell.array), axis=0)
    assert (heights > VACUUM).all() and heights[:2].max() < atoms.cell.lengths()[0] + 1e-9


def test_forces_on_the_core_are_those_of_the_structure():
    """As EMT hardly reaches farther than the buffer: to 0.01 meV/A, though the cluster is cut free."""
    atoms = bulk("Cu", cubic=True) * (6, 6, 3)
    atoms.rattle(0.1, seed=2)
    cluster, core = marked(atoms, [5, 6], 8.0).cluster(atoms)
    assert cluster.pbc.tolist() == [False, False, True] or cluster.pbc.all()
    atoms.calc, cluster.calc = EMT(), EMT()
    assert cluster.get_forces()[core] == pytest.approx(atoms.get_forces()[[5, 6]], abs=1e-5)


def test_small_structures_are_not_cut():
    atoms = bulk("Cu", cubic=True) * (2, 2, 2)
    cluster, core = marked(atoms, [0], 8.0).cluster(atoms)
    assert len(cluster) == len(atoms) and cluster.pbc.all() and (cluster.cell == atoms.cell).all()


# --- refusals


def test_what_cannot_be_is_refused(copper, region):
    with pytest.raises(UserError, match="no atom is in the region"):
        gpmlp.PartitionedCalculator(copper, EMT(), marked(crowded(), [], 4.0))
    with pytest.raises(UserError, match="`tolerance` must be positive"):
        gpmlp.PartitionedCalculator(copper, EMT(), region, -1.0)
    calculator = gpmlp.PartitionedCalculator(copper, EMT(), region, 0.1, DIFFERENCE)
    with pytest.raises(UserError, match="Nothing is learned"):
        calculator.force_std(crowded())
    with pytest.raises(UserError, match="the partition is of 49 atoms, the structure has 4"):
        calculator.learn(bulk("Cu", cubic=True))
    charged = crowded()
    charged.info["charge"] = 1
    with pytest.raises(UserError, match="total charge of 1 e"):
        calculator.learn(charged)

    class Broken(EMT):
        def calculate(self, *about, **more):
            raise RuntimeError("no convergence")

    broken = gpmlp.PartitionedCalculator(copper, Broken(), region, 0.1, DIFFERENCE)
    with pytest.raises(UserError, match="crowded: the oracle failed: RuntimeError: no convergence"):
        broken.learn(crowded())
    assert not broken.labels


def test_other_structures_are_refused(copper, region):
    """Marks are by index: other elements, periodicity or order are seen, whatever the number of atoms; motion and strain are none."""
    calculator = gpmlp.PartitionedCalculator(copper, EMT(), region, None, DIFFERENCE)
    other, slab, mixed = crowded(), crowded(), crowded()
    other.symbols[4] = "Ag"
    slab.pbc = [True, True, False]
    near = int(np.argmax(crowded().get_distances(region.core[0], range(len(other)), mic=True)))
    mixed.positions[[region.core[0], near]] = mixed.positions[[near, region.core[0]]]
    for atoms, said in (
        (other, "atom 4 is Cu in the partition and Ag in the structure"),
        (slab, "periodic along"),
        (mixed, f"atom {region.core[0]} of the region is .* another order"),
    ):
        with pytest.raises(UserError, match=said):
            calculator.get_property("energy", atoms)
    moving = crowded()
    for _ in range(3):  # farther than at once, and across the cell
        moving.positions += [1.5, 0, 0]
        moving.wrap()
        calculator.get_property("energy", moving)
    moving.set_cell(1.1 * moving.cell, scale_atoms=True)
    calculator.get_property("energy", moving)


def test_molecules_are_carved_whole():
    """Those of the partition, in the buffer too."""
    atoms = Atoms(cell=[40, 40, 40], pbc=True)
    for i in range(6):
        one = molecule("H2O")
        one.translate([3.0 * i, 20, 20])
        atoms += one
    units_of = np.repeat(np.arange(6), 3)
    part = Partition("row", np.repeat([1, 0, 0, 0, 0, 0], 3), np.ones(18), 3.1, units_of, atoms)
    cluster, core = part.cluster(atoms)
    assert len(cluster) == 6 and core.sum() == 3 and not cluster.pbc.any()
