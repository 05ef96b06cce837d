"""Shared data: small cells of copper labelled by ASE's effective medium theory, and a potential fitted to them once."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ase.build
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

import gpmlp
from gpmlp.io import archive, ase_atoms, recipe_files


def pytest_configure(config):
    """In a source tree, make the compiled core of its sources, if these have changed."""
    root = Path(gpmlp.__file__).parents[1]
    if (root / "setup.py").exists() and not hasattr(config, "workerinput"):
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=root, check=True)


def labelled(frame: Atoms) -> Atoms:
    """The frame with energy, free energy, forces and (where it is periodic) stress by EMT as results."""
    frame.calc = EMT()
    frame.get_forces()
    if frame.pbc.any():
        frame.get_stress()
    kept = ("energy", "free_energy", "forces", "stress")
    frame.calc = SinglePointCalculator(frame, **{k: v for k, v in frame.calc.results.items() if k in kept})
    return frame


def copper(seed: int, cells: int = 1, strain: float = 0.03, rattle: float = 0.08) -> Atoms:
    """A strained and rattled cubic cell of fcc copper."""
    rng = np.random.default_rng(seed)
    frame = ase.build.bulk("Cu", cubic=True) * (cells, 1, 1)
    frame.set_cell(frame.cell.array @ (np.eye(3) + strain * rng.standard_normal((3, 3))), scale_atoms=True)
    frame.rattle(rattle, rng=rng)
    frame.info["config_type"] = "small" if cells == 1 else "big"
    return labelled(frame)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small tensors gain nothing from threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small_atoms() -> list[Atoms]:
    """16 labelled cells of 4 and 8 copper atoms."""
    return [copper(seed, 1 + seed % 2) for seed in range(16)]


@pytest.fixture(scope="session")
def small_set(small_atoms):
    """Structures and targets of small_atoms."""
    return ase_atoms.from_ase(small_atoms)


@pytest.fixture(scope="session")
def small_recipe():
    """A recipe that fits in seconds."""
    return recipe_files.validate_recipe(
        {
            "descriptor": {"cutoff": 4.0, "n_max": 5, "l_max": 3},
            "kernel": {"zeta": 2},
            "inducing": {"n": 20, "gradients": 1},
        }
    )


@pytest.fixture(scope="session")
def fitted(small_set, small_recipe):
    """(Potential, FitReport) of small_set."""
    from gpmlp.fitting.fit import fit

    return fit(*small_set, small_recipe)


@pytest.fixture(scope="session")
def potential(fitted):
    """The potential of small_set."""
    return fitted[0]


@pytest.fixture(scope="session")
def model_file(potential, tmp_path_factory):
    """The potential of small_set in a file; not to be written to."""
    path = tmp_path_factory.mktemp("model") / "copper.gpmlp"
    archive.save(potential, path)
    return path


@pytest.fixture(scope="session")
def train_file(small_atoms, tmp_path_factory):
    """small_atoms as extended XYZ; not to be written to."""
    path = tmp_path_factory.mktemp("data") / "train.xyz"
    ase_atoms.write_frames(path, small_atoms)
    return path


@pytest.fixture(scope="session")
def ethanol():
    """Structures and targets of 24 molecules, one of them without forces and one without an energy."""
    structures, targets = gpmlp.read(Path(__file__).parents[1] / "data" / "ethanol" / "train.xyz", ":24")
    forces, energies = targets.forces.clone(), targets.energies.clone()
    forces[structures.structure_of_atom == 3] = torch.nan
    energies[5] = torch.nan
    return structures, replace(targets, forces=forces, energies=energies)
