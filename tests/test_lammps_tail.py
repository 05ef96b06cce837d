"""LAMMPS with a dispersion tail far beyond the cutoff: against the ASE calculator, an explicit sum over images, and between ranks."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import ase.build
import numpy as np
import pytest
from ase import Atoms
from lammps_runs import Frame, refusal, run, start, static
from systems import BASELINES, DESCRIPTORS, KERNELS, SPECIES, descriptor, random_term
from test_lammps import BY_ATOM, FORCE_ERRORS, NPT, STRUCTURES, compare, learned, organic, organic_atoms, thermo

from gpmlp.core.errors import UserError
from gpmlp.engines.kim import export_kim
from gpmlp.io.export import export_model
from gpmlp.native import library
from gpmlp.potential.dispersion import R6Tail
from gpmlp.potential.potential import Potential
from gpmlp.recipe import R6_OFF

pytestmark = pytest.mark.skipif(library.compiled() is None, reason="gpmlp was built without a compiler")
__all__ = ["learned", "organic"]  # fixtures
C6 = {(1, 1): 40.0, (1, 6): 90.0, (6, 6): 300.0, (1, 8): 60.0, (6, 8): 170.0, (8, 8): 0.0}  # eV A^6


def tail(outer: float) -> R6Tail:
    return R6Tail(C6, begin=1.6, full=3.1, outer=outer)


def with_tail(potential: Potential, *tails: R6Tail) -> Potential:
    return replace(potential, baselines=(*potential.baselines, *tails))


def explicit(atoms: Atoms, of: R6Tail) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Energies (atoms,), forces (atoms, 3) and halves of virials r (x) dE/dr (atoms, 3, 3), atom by atom, over all images."""
    heights = atoms.cell.volume / np.array([np.linalg.norm(np.cross(*np.delete(atoms.cell, k, 0))) for k in range(3)])
    ranges = [
        range(-n, n + 1) if p else (0,) for n, p in zip(np.ceil(of.outer / heights).astype(int), atoms.pbc, strict=True)
    ]
    shifts = np.array(list(itertools.product(*ranges))) @ atoms.cell
    n = len(atoms)
    energies, forces, virials = np.zeros(n), np.zeros((n, 3)), np.zeros((n, 3, 3))

    def step(r: np.ndarray, low: float, high: float) -> np.ndarray:
        x = np.clip((r - low) / (high - low), 0, 1)
        return x**3 * (10 - 15 * x + 6 * x**2)

    def energy(r: np.ndarray, c6: float) -> np.ndarray:
        return -c6 / r**6 * step(r, of.begin, of.full) * (1 - step(r, of.outer - R6_OFF, of.outer))

    for i, j in itertools.product(range(n), repeat=2):
        d = atoms.positions[j] - atoms.positions[i] + shifts
        r = np.linalg.norm(d, axis=1)
        d, r = d[(r > 0) & (r < of.outer)], r[(r > 0) & (r < of.outer)]
        c6, h = of.c6[tuple(sorted((int(atoms.numbers[i]), int(atoms.numbers[j]))))], 1e-5
        slopes = (8 * (energy(r + h, c6) - energy(r - h, c6)) - energy(r + 2 * h, c6) + energy(r - 2 * h, c6)) / (
            12 * h
        )
        energies[i] += 0.5 * energy(r, c6).sum()
        forces[i] += ((slopes / r)[:, None] * d).sum(0)
        virials[i] += 0.5 * np.einsum("p,pa,pb->ab", slopes / r, d, d)
    return energies, forces, virials


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", STRUCTURES)
def test_as_the_ase_calculator(name, ranks, organic, tmp_path):
    """In boxes of all kinds, all of them smaller than the tail reaches; several species."""
    atoms = organic_atoms(*STRUCTURES[name])
    potential = with_tail(organic, tail(25.0))
    found = static(start(atoms, potential, tmp_path), tmp_path, ranks)
    compare(found, atoms, potential)
    of_atoms, size = found.virials.sum(0), np.abs(found.stress * found.volume).max()
    np.testing.assert_allclose(of_atoms, found.stress * found.volume, rtol=0, atol=1e-10 * size)
    np.testing.assert_allclose(found.centroids.sum(0), of_atoms, rtol=0, atol=1e-9 * size)


@pytest.mark.parametrize("threads", ["", " threads 2"])
@pytest.mark.parametrize("name", ["slab", "smaller than the cutoff"])
def test_what_it_adds_by_atom(name, threads, organic, tmp_path):
    """Energies, forces and virials of each atom are those of an explicit sum over pairs."""
    atoms, of = organic_atoms(*STRUCTURES[name], n=20), tail(11.0)
    bare = static(start(atoms, organic, tmp_path), tmp_path)
    found = static(start(atoms, with_tail(organic, of), tmp_path, f"gpmlp{threads}"), tmp_path)
    energies, forces, virials = explicit(atoms, of)
    assert np.abs(energies).min() > 1e-3 and np.abs(forces).max() > 0.01
    np.testing.assert_allclose(found.energies - bare.energies, energies, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.forces - bare.forces, forces, rtol=0, atol=1e-8)
    for symmetric in (found.virials - bare.virials, found.centroids - bare.centroids):
        np.testing.assert_allclose(symmetric, virials, rtol=0, atol=1e-8 * np.abs(virials).max())


@pytest.fixture(scope="module")
def copper_tail(potential) -> Potential:
    return with_tail(potential, R6Tail({(29, 29): 150.0}, begin=3.0, full=4.5, outer=25.0))


def test_ranks_and_restarts_change_nothing(copper_tail, tmp_path):
    """100 steps at constant pressure on 1, 2 and 4 processes; and on from a restart."""
    atoms = ase.build.bulk("Cu", cubic=True).repeat(2)
    atoms.rattle(0.1, seed=5)
    script, found = start(atoms, copper_tail, tmp_path), []
    for ranks in (1, 2, 4):
        done = run(script + NPT, tmp_path, ranks)
        assert done.returncode == 0, done.stdout[-2000:]
        found.append((thermo(done.stdout), np.loadtxt(tmp_path / "final", skiprows=9)))
    for table, final in found[1:]:
        np.testing.assert_allclose(table, found[0][0], rtol=1e-9, atol=1e-6)
        np.testing.assert_allclose(final, found[0][1], rtol=0, atol=1e-9)
    common = "fix nve all nve\ntimestep 0.001\nthermo_style custom step pe etotal\nthermo_modify format float %.17g norm no\n"
    whole = run(script + "velocity all create 600 1\n" + common + "run 5\nwrite_restart half\nrun 20\n", tmp_path)
    rows = thermo(whole.stdout)
    assert abs(rows[-1, 2] - rows[0, 2]) < 1e-3 * abs(rows[-1, 1] - rows[0, 1])
    again = run("read_restart half\npair_style gpmlp\npair_coeff * * model Cu\n" + common + "run 20\n", tmp_path, 2)
    np.testing.assert_allclose(thermo(again.stdout), rows, rtol=1e-10)


@pytest.mark.parametrize("ranks", [1, 2])
def test_beside_other_styles(ranks, organic, tmp_path):
    """Of atoms of other types the tail sees nothing, and the pressure is right where styles share it."""
    atoms = organic_atoms(*STRUCTURES["triclinic"])
    atoms.numbers[:5] = 10
    style, potential = "hybrid/overlay gpmlp lj/cut 6.0", with_tail(organic, tail(12.0))
    script = start(atoms, potential, tmp_path, style, "gpmlp model H C O NULL").replace(
        "thermo_style", "pair_coeff * 4 lj/cut 0.01 2.0\nthermo_style", 1
    )
    found = static(script, tmp_path, ranks)
    for old, new in {style: "lj/cut 6.0", "* * gpmlp model H C O NULL": "* * 0 1", " lj/cut 0.01": " 0.01"}.items():
        script = script.replace(old, new)
    only = static(script, tmp_path)
    parts = {key: getattr(found, key) - getattr(only, key) for key in ("energy", "energies", "forces", "stress")}
    assert max(np.abs(parts[key][:5]).max() for key in ("energies", "forces")) < 1e-12  # differences
    ours = {key: value[5:] if key in ("energies", "forces") else value for key, value in parts.items()}
    rest = Frame(**ours, virials=None, centroids=None, more=None, volume=found.volume)
    compare(rest, atoms[5:], potential)


def test_errors_are_those_without_a_tail(learned, tmp_path):
    atoms, found = organic_atoms(*STRUCTURES["slab"]), []
    for potential in (learned, with_tail(learned, tail(10.0))):
        script = start(atoms, potential, tmp_path, "gpmlp force_atoms 5")
        found.append(static(script + FORCE_ERRORS, tmp_path, 2, BY_ATOM).more)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-12, atol=1e-15)
    assert found[0][:, :2].min() > 0


def test_ranks_without_atoms(organic, tmp_path):
    atoms = organic_atoms(np.diag([6.0, 6.0, 6.0]), False, 20)
    atoms.cell = np.diag([60.0, 60.0, 60.0])
    potential = with_tail(organic, tail(25.0))
    compare(static(start(atoms, potential, tmp_path, before="processors 2 2 1"), tmp_path, 4), atoms, potential)


def test_tiles_of_a_balanced_box(organic, tmp_path):
    atoms, potential = organic_atoms(np.diag([9.0, 8.0, 14.0]), True), with_tail(organic, tail(25.0))
    atoms.set_cell(np.diag([30.0, 31.0, 32.0]))
    script = start(atoms, potential, tmp_path) + "comm_style tiled\nbalance 1.1 rcb\n"
    compare(static(script, tmp_path, 4), atoms, potential)


def test_ghost_atoms_that_do_not_reach_far_enough(organic, tmp_path):
    atoms = organic_atoms(*STRUCTURES["slab"])
    script = start(atoms, with_tail(organic, tail(25.0)), tmp_path)
    compare(static(script + "comm_modify cutoff 7\n", tmp_path), atoms, with_tail(organic, tail(25.0)))  # is mended
    said = refusal(script + "neighbor 2.0 multi\ncomm_modify mode multi\nrun 0\n", tmp_path)
    assert "the dispersion tail needs comm_modify mode single" in said


def test_what_is_refused(organic, tmp_path):
    term = random_term(descriptor(next(iter(DESCRIPTORS))), KERNELS["polynomial 2"])
    made = Potential((term,), (BASELINES["ZBL"](),), tuple(sorted(SPECIES)), organic.recipe)
    with pytest.raises(UserError, match="cannot be exported: .* no form for several dispersion tails"):
        export_model(with_tail(made, tail(9.0), tail(10.0)), tmp_path / "model")
    with pytest.raises(
        UserError, match="This model has a dispersion tail, which the model driver for KIM does not compute"
    ):
        export_kim(with_tail(made, tail(9.0)), tmp_path / "kim")
    less = {pair: value for pair, value in C6.items() if pair != (6, 8)}
    with pytest.raises(UserError, match="has no C6 of C-O"):
        export_model(with_tail(made, replace(tail(9.0), c6=less)), tmp_path / "model")
    assert not list(Path(tmp_path).iterdir())
