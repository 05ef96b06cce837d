"""Observables against known answers: gases, crystals, random walks, and what users get wrong."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from gpmlp.core.errors import UserError
from gpmlp.core.radial_distribution import radial_distribution
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.learning.recipe import ObservableRecipe
from gpmlp.learning.stopping.observables import (
    Observer,
    UnwrappedPath,
    diffusion_of,
    instantaneous_pressure,
    load_function,
    make_observer,
)


def gas(n: int, length: float, seed: int) -> Atoms:
    """Points that know nothing of each other, none nearer than 0.3 A (neighbors refuses these)."""
    rng = np.random.default_rng(seed)
    while True:
        atoms = Atoms(f"Ar{n}", positions=rng.uniform(0, length, (n, 3)), cell=[length] * 3, pbc=True)
        distances = atoms.get_all_distances(mic=True)[np.triu_indices(n, 1)]
        if distances.min() > 0.3:
            return atoms


def test_rdf_of_a_gas_is_one():
    n = 60
    structures = structures_from_ase([gas(n, 30.0, seed) for seed in range(40)])
    r, g = radial_distribution(structures, 12.0, 12)
    known = r > 2  # shells with so few pairs scatter
    pairs_in_shell = 40 * n**2 / 2 / 30.0**3 * 4 * math.pi * r**2
    assert np.abs((g - (n - 1) / n) * np.sqrt(pairs_in_shell))[known].max() < 4
    assert g[known].mean() == pytest.approx((n - 1) / n, abs=0.03)


@pytest.mark.parametrize("cubic", [1, 2])
def test_rdf_of_fcc(cubic):
    """12 neighbours at a/√2, 6 at a, 24 at a √1.5, whatever the size of the cell."""
    a = 4.05
    atoms = bulk("Al", a=a, cubic=True) * (cubic, cubic, cubic)
    r, g = radial_distribution(structures_from_ase([atoms]), 5.2, 104)
    edges = np.arange(105) * 0.05
    found = g * 4 * math.pi / 3 * np.diff(edges**3) * len(atoms) / atoms.get_volume()
    for distance, number in ((a / math.sqrt(2), 12), (a, 6), (a * math.sqrt(1.5), 24)):
        near = np.abs(r - distance) < 0.06
        assert found[near].sum() == pytest.approx(number)
    assert found.sum() == pytest.approx(42)


def test_rdf_of_pairs_and_invariance():
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    atoms.rattle(0.1, seed=1)
    structures = structures_from_ase([atoms])
    _, cross = radial_distribution(structures, 6.0, 60, (11, 17))
    _, turned = radial_distribution(structures, 6.0, 60, (17, 11))
    assert np.allclose(cross, turned)
    _, like = radial_distribution(structures, 6.0, 60, (11, 11))
    _, other = radial_distribution(structures, 6.0, 60, (17, 17))
    _, everything = radial_distribution(structures, 6.0, 60)
    assert np.allclose((like + 2 * cross + other) / 4, everything)
    moved = atoms[np.random.default_rng(2).permutation(len(atoms))]
    moved.rotate(37, (1, 2, 3), rotate_cell=True)
    moved.translate([1.0, -2.0, 30.0])
    # distances within rounding of an edge may change shells
    assert np.allclose(radial_distribution(structures_from_ase([moved]), 6.0, 60)[1], everything)
    assert np.allclose(radial_distribution(structures_from_ase([atoms * (2, 1, 1)]), 6.0, 60)[1], everything)


def test_rdf_refuses():
    with pytest.raises(UserError, match="no volume"):
        radial_distribution(structures_from_ase([molecule("H2O")]))
    with pytest.raises(UserError, match="no pair Cu-Cu"):
        radial_distribution(structures_from_ase([bulk("Al")]), pair=(29, 29))


def walk(n: int, frames: int, step: float, seed: int) -> list[Atoms]:
    """A random walk, wrapped into its cell, whose D is step²/2 per frame."""
    rng = np.random.default_rng(seed)
    moves = rng.normal(0, step, (frames, n, 3))
    positions = rng.uniform(0, 8, (n, 3)) + np.cumsum(moves, axis=0)
    atoms = [Atoms(f"He{n}", positions=p, cell=[8, 9, 10], pbc=True) for p in positions]
    for frame in atoms:
        frame.wrap()
    return atoms


def test_diffusion_of_a_random_walk():
    step, n, time = 0.3, 100, 10.0
    frames = walk(n, 800, step, 3)
    found, sem = diffusion_of(frames, time * np.arange(800), 100.0)
    # the centre of mass is held: one of n atoms' motion is missing
    exact = step**2 / (2 * time) * (1 - 1 / n)
    assert abs(found - exact) < 4 * sem
    assert sem < 0.05 * exact
    with pytest.raises(UserError, match="as long as the trajectory"):
        diffusion_of(frames[:5], time * np.arange(5), 100.0)


def test_diffusion_error_bars_hold():
    covered = []
    for seed in range(25):
        found, sem = diffusion_of(walk(10, 200, 0.3, 100 + seed), np.arange(200.0), 5.0)
        covered.append(abs(found - 0.3**2 / 2 * 0.9) < 2 * sem)
    assert np.mean(covered) > 0.8  # 95 % less 3 standard deviations of 25


def test_msd_grows_over_borders_and_drift_is_taken_off():
    frames = walk(20, 60, 0.3, 4)
    drifting = [f.copy() for f in frames]
    for k, frame in enumerate(drifting):
        frame.translate([0.2 * k, 0, 0])
        frame.wrap()
    paths = [UnwrappedPath(20.0), UnwrappedPath(20.0)]
    for k in range(60):
        for path, trajectory in zip(paths, (frames, drifting), strict=True):
            path.add(trajectory[k], float(k))
    assert paths[0].squared_displacement(20.0) == pytest.approx(paths[1].squared_displacement(20.0))
    assert paths[0].squared_displacement(20.0)[1] == pytest.approx(3 * 20 * 0.09 * 0.95, rel=0.5)
    assert len(paths[0].times) <= 22


def test_path_set_back_and_restored():
    frames = walk(5, 40, 0.2, 5)
    recipe = (ObservableRecipe(name="msd", lag_fs=5.0), ObservableRecipe(name="diffusion", lag_fs=6.0))
    observer = make_observer(recipe)
    seen = [observer(f, walker=k % 2, time_fs=float(k // 2)) for k, f in enumerate(frames[:24])]
    assert math.isnan(seen[0]["msd"])
    assert not math.isnan(seen[-1]["msd"])
    restored = make_observer(recipe).restore({k: np.array(v) for k, v in observer.state().items()})
    for k in range(24, 40):
        ours, theirs = (o(frames[k], walker=k % 2, time_fs=float(k // 2)) for o in (observer, restored))
        assert ours == theirs
    assert math.isnan(observer(frames[0], walker=0, time_fs=2.0)["msd"])  # the walker was set back: it begins anew


def test_pressure_and_energy():
    atoms = bulk("Cu", a=3.5, cubic=True) * (2, 2, 2)
    atoms.calc = EMT()
    step = 1e-4
    energies = []
    for scale in (1 - step, 1 + step):
        strained = atoms.copy()
        strained.set_cell(atoms.cell * scale ** (1 / 3), scale_atoms=True)
        strained.calc = EMT()
        energies.append(strained.get_potential_energy())
    # −dE/dV, without momenta
    finite = -(energies[1] - energies[0]) / (2 * step * atoms.get_volume()) / 6.241509074460763e-3
    assert instantaneous_pressure(atoms) == pytest.approx(finite, rel=1e-4)
    rng = np.random.default_rng(6)
    cold = instantaneous_pressure(atoms)
    atoms.set_momenta(rng.normal(0, 3, (32, 3)))
    ideal = 32 * 8.617333262e-5 * atoms.get_temperature() / atoms.get_volume() / 6.241509074460763e-3
    assert instantaneous_pressure(atoms) - cold == pytest.approx(ideal)
    values = Observer([ObservableRecipe(name=n) for n in ("energy", "pressure", "temperature", "rdf")])(atoms)
    assert values["energy"] == pytest.approx(atoms.get_potential_energy() / 32)
    assert values["rdf"].shape == (60,)
    water = molecule("H2O")
    water.calc = SinglePointCalculator(water, energy=-1.0)
    with pytest.raises(UserError, match="needs a stress"):
        instantaneous_pressure(water)


MODULE = """
import numpy as np
def height(atoms): return atoms.positions[:, 2].max()
def vector(atoms): return atoms.positions.mean(0)
def broken(atoms): raise KeyError("spam")
def wrong(atoms): return atoms.positions
def infinite(atoms): return float("inf")
"""


def test_functions_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "my_observables.py").write_text(MODULE)
    (tmp_path / "my_broken.py").write_text("1/0")
    monkeypatch.syspath_prepend(tmp_path)
    atoms = bulk("Al", cubic=True)
    names = [f"my_observables:{f}" for f in ("height", "vector")]
    found = make_observer([ObservableRecipe(name=n) for n in names])(atoms)
    assert found[names[0]] == pytest.approx(2.025)
    assert found[names[1]].shape == (3,)
    for name, message in (
        ("my_observables:heigth", "Perhaps you meant 'height'"),
        ("no_such_module_at_all:f", "cannot be imported"),
        ("my_broken:f", "ZeroDivisionError"),
    ):
        with pytest.raises(UserError, match=message):
            load_function(name)
    for function, message in (("broken", "spam"), ("wrong", "number or vector"), ("infinite", "infinite values")):
        with pytest.raises(UserError, match=message):
            make_observer([ObservableRecipe(name=f"my_observables:{function}")])(atoms)
    for module in ("my_observables", "my_broken"):
        sys.modules.pop(module, None)


def test_recipe_refuses():
    for bad, message in (
        ({"name": "enery"}, "must be one of"),
        ({"name": "energy", "pair": "O-H"}, "is of rdf"),
        ({"name": "energy", "relative": True}, "give both"),
        ({"tolerance": -1}, "greater than 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ObservableRecipe(**bad)
    with pytest.raises(UserError, match="two chemical symbols"):
        make_observer([ObservableRecipe(name="rdf", pair="O")])
    with pytest.raises(UserError, match="not a chemical symbol"):
        make_observer([ObservableRecipe(name="rdf", pair="Q-H")])
