"""Partitions: the region holds the largest foreseen errors, molecules whole, and the files are what codes of QM/MM read."""

from __future__ import annotations

import json

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.qmmm import ForceQMMM
from ase.calculators.singlepoint import SinglePointCalculator

import gpmlp
from gpmlp.cli import main
from gpmlp.core.errors import UserError
from gpmlp.core.molecules import MOLECULE, bonded_units
from gpmlp.core.neighbors import find_neighbors
from gpmlp.io.ase_atoms import from_ase, structures_from_ase
from gpmlp.properties.partition import BUFFER, CORE, REST, RegionRule

SMALL = {"descriptor": {"cutoff": 4.0, "n_max": 4, "l_max": 3}, "inducing": {"n": 40, "gradients": 2}}


def rattled(atoms: Atoms, size: float, seed: int) -> Atoms:
    """Labelled by EMT."""
    atoms = atoms.copy()
    atoms.rattle(size, seed=seed)
    return labelled(atoms)


def labelled(atoms: Atoms) -> Atoms:
    point = atoms.copy()
    point.calc = EMT()
    atoms.calc = SinglePointCalculator(atoms, energy=point.get_potential_energy(), forces=point.get_forces())
    return atoms


@pytest.fixture(scope="module")
def copper() -> gpmlp.Potential:
    """Of the perfect crystal."""
    crystal = bulk("Cu", cubic=True) * (2, 2, 2)
    return gpmlp.fit(
        *from_ase([rattled(crystal, 0.08, seed) for seed in range(12)]), gpmlp.Recipe.model_validate(SMALL)
    )[0]


@pytest.fixture(scope="module")
def oxides() -> gpmlp.Potential:
    """Of free molecules of CO and of their ions' distances at random."""
    frames = [rattled(crowd(4, seed), 0.08, seed) for seed in range(12)]
    return gpmlp.fit(*from_ase(frames), gpmlp.Recipe.model_validate(SMALL))[0]


def crowd(n: int, seed: int, pbc: bool = False) -> Atoms:
    """n molecules of CO in a row, 3.2 A apart, turned at random."""
    rng = np.random.default_rng(seed)
    out = Atoms(cell=[3.2 * n, 9, 9], pbc=pbc)
    for i in range(n):
        one = molecule("CO")
        one.rotate(rng.uniform(0, 360), rng.standard_normal(3))
        one.translate([3.2 * i, 4.5, 4.5])
        out += one
    return out


def vacancy(n: int = 3) -> Atoms:
    atoms = bulk("Cu", cubic=True) * (n, n, n)
    del atoms[0]
    return rattled(atoms, 0.05, 99)


def test_region_holds_the_largest_variances(copper):
    """By the definition: the n atoms with the largest trace of the force covariance, and whoever is within the buffer, by ASE."""
    atoms = vacancy()
    structure = structures_from_ase([atoms])
    found = gpmlp.partition(copper, structure, RegionRule(atoms=12, buffer=3.0))
    variance = copper(structure, variance="forces").forces_covariance.total.diagonal(dim1=1, dim2=2).sum(1).numpy()
    assert set(found.core) == set(np.argsort(-variance)[:12])
    assert found.force_sigma == pytest.approx(np.sqrt(variance))
    assert found.share == pytest.approx(np.sort(variance)[-12:].sum() / variance.sum())
    assert found.largest_outside == pytest.approx(np.sqrt(np.sort(variance)[-13]))
    near = atoms.get_all_distances(mic=True)[found.core].min(0) < 3.0
    assert ((found.marks == BUFFER) == near & (found.marks != CORE)).all()
    assert (found.marks == REST).any()


def test_a_tenth_holds_most_of_the_error(copper):
    """An atom too many in the crystal that the potential knows: the squared error itself, and what was foreseen of it."""
    atoms = bulk("Cu", cubic=True) * (4, 4, 4)
    atoms.append("Cu")
    atoms.positions[-1] = atoms.positions[0] + [1.8, 0.3, 0.2]  # in an edge of the cell, between two neighbours
    atoms = rattled(atoms, 0.03, 3)
    structure, truth = from_ase([atoms])
    found = gpmlp.partition(copper, structure)
    squares = (copper(structure).forces - truth.forces).square().sum(1).numpy()
    assert len(found.core) == 26
    assert squares[found.core].sum() > 0.95 * squares.sum()
    assert found.share > 0.95
    nearest = np.argsort(atoms.get_distances(len(atoms) - 1, range(len(atoms)), mic=True))[:7]
    assert set(nearest) <= set(found.core)


def test_how_large_the_region_is(copper):
    structure = structures_from_ase([vacancy()])
    n = structure.n_atoms
    by_fraction = gpmlp.partition(copper, structure, RegionRule(fraction=0.2))
    assert len(by_fraction.core) == round(0.2 * n)
    assert by_fraction.buffer == copper.cutoff
    assert len(gpmlp.partition(copper, structure).core) == round(0.1 * n)
    assert gpmlp.partition(copper, structure, RegionRule(fraction=1.0)).share == pytest.approx(1.0)
    least = by_fraction.force_sigma[by_fraction.core].min() * (
        1 - 1e-9
    )  # rounding depends on where arrays lie in memory
    by_sigma = gpmlp.partition(copper, structure, RegionRule(sigma=float(least)))
    assert (by_sigma.core == by_fraction.core).all()
    nobody = gpmlp.partition(copper, structure, RegionRule(sigma=1e3))
    assert len(nobody.core) == 0 and nobody.share == 0 and (nobody.marks == REST).all()
    bare = gpmlp.partition(copper, structure, RegionRule(buffer=0.0))
    assert not (bare.marks == BUFFER).any()


@pytest.mark.parametrize("pbc", [False, True])
def test_molecules_are_whole(oxides, pbc):
    """In the region and in the buffer; with --cut-molecules they are not."""
    atoms = crowd(8, 3, pbc)
    structure = structures_from_ase([atoms])
    whole = gpmlp.partition(oxides, structure, RegionRule(atoms=2, buffer=3.3))
    worst = int((whole.force_sigma**2).reshape(-1, 2).mean(1).argmax())
    assert set(whole.core) == {2 * worst, 2 * worst + 1}
    assert (whole.marks[::2] == whole.marks[1::2]).all()
    assert (whole.marks == REST).sum() >= 8
    one = gpmlp.partition(oxides, structure, RegionRule(atoms=3, buffer=3.3))
    assert len(one.core) == 4  # the last molecule is whole
    cut = gpmlp.partition(oxides, structure, RegionRule(atoms=3, buffer=0.0, whole_molecules=False))
    assert len(cut.core) == 3


def units(atoms: Atoms) -> np.ndarray:
    structure = structures_from_ase([atoms])
    pairs = find_neighbors(structure, 3.5)
    r = pairs.vectors(structure).norm(dim=1).numpy()
    return bonded_units(atoms.numbers, pairs.centers.numpy(), pairs.neighbors.numpy(), r, pairs.shifts.numpy())


def test_what_is_a_molecule():
    """What covalent radii bond, unless it is large or bonded to its own images; across the edge of a cell too."""
    crystal = bulk("Cu", cubic=True) * (2, 2, 2)
    assert len(crystal) < MOLECULE and len(set(units(crystal))) == len(crystal)
    ethanol = molecule("CH3CH2OH")
    ethanol.center(vacuum=4.0)
    assert len(set(units(ethanol))) == 1
    ethanol.pbc = True
    ethanol.positions += 0.5 * ethanol.cell.sum(0)
    ethanol.wrap()
    assert len(set(units(ethanol))) == 1
    chain = Atoms("C4", [[1.3 * i, 5, 5] for i in range(4)], cell=[5.2, 10, 10], pbc=True)
    assert len(set(units(chain))) == 4
    assert len(set(units(bulk("Cu", cubic=True) * (3, 3, 3)))) == 108


def test_a_single_molecule_is_cut(oxides):
    """As a whole there would be nothing to choose."""
    found = gpmlp.partition(oxides, structures_from_ase([molecule("CO")]), RegionRule(atoms=1, buffer=0.0))
    assert len(found.core) == 1


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"fraction": 0.0}, "above 0 and at most 1; got 0"),
        ({"fraction": 1.5}, "above 0 and at most 1; got 1.5"),
        ({"fraction": float("nan")}, "above 0 and at most 1"),
        ({"atoms": 0}, "must be 1 or more"),
        ({"atoms": 1.5}, "whole number"),
        ({"sigma": -1.0}, "`sigma` must be positive"),
        ({"sigma": float("nan")}, "`sigma` must be positive"),
        ({"buffer": -1.0}, "`buffer` must be zero or positive"),
        ({"fraction": 0.1, "atoms": 3}, "given twice, by fraction and atoms"),
    ],
)
def test_rules_that_make_no_sense(rule, said):
    with pytest.raises(UserError, match=said):
        RegionRule(**rule)


def test_structures_that_cannot_be_cut(copper):
    with pytest.raises(UserError, match="slab: a region of 300 atoms is asked for, but there are 107"):
        gpmlp.partition(copper, structures_from_ase([vacancy()], ["slab"]), RegionRule(atoms=300))
    with pytest.raises(UserError, match="not trained on Ag"):
        gpmlp.partition(copper, structures_from_ase([bulk("Ag")]))
    with pytest.raises(UserError, match="of one structure; got 2"):
        gpmlp.partition(copper, structures_from_ase([bulk("Cu"), bulk("Cu")]))


@pytest.fixture
def command(tmp_path, copper, capsys, monkeypatch):
    """Runs `gpmlp partition` in an empty folder with a model; status, output, errors."""
    monkeypatch.chdir(tmp_path)
    gpmlp.save(copper, "copper.gpmlp")

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main.main(["partition", "copper.gpmlp", *arguments])
        return status, *capsys.readouterr()

    return run


def test_command_writes_what_codes_read(command):
    """Results and arrays that were there stay; QUIP's marks, and a region that ASE's force mixing takes as it is."""
    atoms = vacancy()
    atoms.set_tags(np.arange(len(atoms)) % 3)
    atoms.info["origin"] = "here"
    atoms.new_array("qm_region", np.full(len(atoms), 0.5))  # of something else
    ase.io.write("vacancy.xyz", atoms)
    status, printed, errors = command(
        "vacancy.xyz", "-o", "out.xyz", "--atoms", "12", "--buffer", "4", "--json", "out.json"
    )
    assert status == 0, errors
    assert "107" in printed and "12" in printed
    (numbers,) = json.loads(open("out.json").read())
    marked = ase.io.read("out.xyz")
    assert marked.get_potential_energy() == pytest.approx(atoms.get_potential_energy())
    assert (marked.get_tags() == atoms.get_tags()).all() and marked.info["origin"] == "here"
    assert numbers["core"] == np.flatnonzero(marked.arrays["qm_region"] == 1).tolist() and len(numbers["core"]) == 12
    assert numbers["buffer"] == np.flatnonzero(marked.arrays["qm_region"] == 2).tolist()
    assert numbers["buffer_width_A"] == 4 and numbers["atoms"] == 107
    variance = marked.arrays["force_sigma"] ** 2
    assert numbers["share_of_foreseen_squared_force_error"] == pytest.approx(
        variance[numbers["core"]].sum() / variance.sum(), rel=1e-6
    )
    mixing = ForceQMMM.import_extxyz("out.xyz", EMT(), EMT())
    assert (np.flatnonzero(mixing.qm_selection_mask) == numbers["core"]).all()
    assert mixing.qm_buffer_mask.sum() == 12 + len(numbers["buffer"])


def test_command_takes_every_frame(command):
    ase.io.write("run.xyz", [vacancy(2), vacancy(3)])
    status, printed, errors = command("run.xyz", "-o", "out.xyz", "--json", "out.json")
    assert status == 0, errors
    assert [len(frame) for frame in ase.io.read("out.xyz", ":")] == [31, 107]
    assert [one["structure"] for one in json.loads(open("out.json").read())] == ["run.xyz frame 0", "run.xyz frame 1"]
    assert "run.xyz frame 1" in printed


def test_command_says_when_a_region_is_larger(command):
    """A particle of 32 atoms is a molecule by its covalent radii."""
    particle = bulk("Cu", cubic=True) * (2, 2, 2)
    particle.pbc = False
    particle.append("Cu")
    particle.positions[-1] = 30.0
    ase.io.write("particle.xyz", particle)
    status, _, errors = command("particle.xyz", "-o", "out.xyz")
    assert status == 0 and "1 of 1 regions are larger than was asked for" in " ".join(errors.split())
    assert (ase.io.read("out.xyz").arrays["qm_region"] == 1).sum() == 32
    status, _, errors = command("particle.xyz", "-o", "out.xyz", "--cut-molecules")
    assert status == 0 and "larger" not in errors
    assert (ase.io.read("out.xyz").arrays["qm_region"] == 1).sum() == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fraction", "2"], "at most 1; got 2"),
        (["--atoms", "32"], "run.xyz frame 0: a region of 32 atoms is asked for, but there are 31"),
        (["--atoms", "3", "--sigma", "1"], "given twice"),
        (["--json", "out.xyz"], "is the marked structures"),
    ],
)
def test_command_refuses(command, tmp_path, arguments, said):
    ase.io.write("run.xyz", vacancy(2))
    status, _, errors = command("run.xyz", "-o", "out.xyz", *arguments)
    assert status == 2
    assert said in " ".join(errors.split())
    assert not (tmp_path / "out.xyz").exists()


def test_command_names_the_frame_of_an_unknown_element(command):
    ase.io.write("run.xyz", [vacancy(2), bulk("Ag", cubic=True)])
    status, _, errors = command("run.xyz", "-o", "out.xyz")
    assert status == 2 and "run.xyz frame 1: the potential was not trained on Ag" in " ".join(errors.split())
