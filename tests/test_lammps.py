"""LAMMPS with pair_style gpmlp against the ASE calculator, ranks against each other, virials, heat flux, and what it refuses."""

from __future__ import annotations

import ase.build
import numpy as np
import pytest
from ase import Atoms
from lammps_runs import start, static
from systems import (
    BASELINES,
    DESCRIPTORS,
    KERNELS,
    SPECIES,
    TRICLINIC,
    descriptor,
    low_rank_term,
    random_term,
    scattered,
)

from gpmlp.engines.ase import GPCalculator
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.native import library
from gpmlp.potential.potential import Potential
from gpmlp.recipe import Recipe

pytestmark = pytest.mark.skipif(library.compiled() is None, reason="gpmlp was built without a compiler")
SOAP = next(name for name in DESCRIPTORS if name.startswith("soap"))
TIGHT = 1e-10  # relative; sums over thousands of terms of the same magnitude, in another order


@pytest.fixture(scope="module")
def organic() -> Potential:
    """Random weights on hydrogen, carbon and oxygen, all baselines, two descriptors."""
    terms = random_term(descriptor(SOAP), KERNELS["polynomial 4"], scale=0.2), low_rank_term(descriptor(SOAP), 4)
    return Potential(terms, tuple(made() for made in BASELINES.values()), tuple(sorted(SPECIES)), Recipe())


def organic_atoms(cell: np.ndarray, pbc, n: int = 40, seed: int = 0) -> Atoms:
    import torch

    standard, _ = Atoms(cell=cell, pbc=True).cell.standard_form()
    box = torch.tensor(np.array(standard))
    positions = scattered(n, box, seed, closest=1.05).numpy()
    numbers = np.random.default_rng(seed).choice(SPECIES, n)
    return Atoms(numbers, positions, cell=np.array(standard), pbc=pbc)


STRUCTURES = {
    "triclinic": (2.9 * TRICLINIC.numpy(), True),
    "slab": (np.diag([9.0, 8.0, 14.0]), (True, True, False)),
    "molecule": (np.diag([12.0, 11.0, 10.0]), False),
    "smaller than the cutoff": (np.array([[3.0, 0, 0], [0.9, 3.1, 0], [0.4, -0.7, 16.0]]), True),
}


def compare(found, atoms: Atoms, potential: Potential) -> None:
    atoms = atoms.copy()
    atoms.calc = GPCalculator(potential)
    forces, size = atoms.get_forces(), np.abs(atoms.get_forces()).max()
    assert size > 0.1
    assert found.energy == pytest.approx(atoms.get_potential_energy(), rel=TIGHT)
    np.testing.assert_allclose(found.energies, atoms.get_potential_energies(), rtol=TIGHT)
    np.testing.assert_allclose(found.forces, forces, rtol=0, atol=TIGHT * size)
    if atoms.pbc.all():
        stress = atoms.get_stress(voigt=False)
        np.testing.assert_allclose(found.stress, stress, rtol=0, atol=3e-9 * np.abs(stress).max())  # units of bar


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", STRUCTURES)
def test_as_the_ase_calculator(name, ranks, organic, tmp_path):
    cell, pbc = STRUCTURES[name]
    atoms = organic_atoms(cell, pbc)
    found = static(start(atoms, organic, tmp_path), tmp_path, ranks)
    compare(found, atoms, organic)
    of_atoms, size = found.virials.sum(0), np.abs(found.stress * found.volume).max()
    np.testing.assert_allclose(of_atoms, found.stress * found.volume, rtol=0, atol=1e-10 * size)
    of_centroids = found.centroids.sum(0)
    np.testing.assert_allclose(of_centroids, of_atoms, rtol=0, atol=1e-9 * size)
    assert np.abs(found.centroids - found.centroids.transpose(0, 2, 1)).max() > 1e-3 * np.abs(found.centroids).max()


@pytest.fixture(scope="module")
def copper_start(potential, tmp_path_factory):
    """(Atoms, commands, folder): 108 copper atoms far from equilibrium, by a fitted potential with variances."""
    atoms = ase.build.bulk("Cu", cubic=True).repeat(3)
    atoms.rattle(0.15, seed=5)
    folder = tmp_path_factory.mktemp("copper")
    return atoms, start(atoms, potential, folder), folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_errors_of_local_energies(ranks, potential, copper_start):
    atoms, script, folder = copper_start
    asked = "fix errors all pair 1 gpmlp sigma 1 novelty 1\n"
    found = static(script + asked, folder, ranks, "f_errors[1] f_errors[2]")
    said = potential(structures_from_ase([atoms]), variance="atom_energies", novelty=True)
    np.testing.assert_allclose(found.more[:, 0], said.atom_energies_variance.total.sqrt(), rtol=1e-7)
    np.testing.assert_allclose(found.more[:, 1], said.novelty, rtol=1e-9)
    assert found.more.min() > 0
    compare(found, atoms, potential)
