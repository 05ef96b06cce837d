"""Hops: rates and diffusion coefficients by Vineyard's formula, against vibrations of ASE, and error bars that cover the oracle's own."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import add_adsorbate, bulk, fcc100, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixCartesian, FixedLine, FixedPlane
from ase.optimize import BFGS
from ase.vibrations import Vibrations

import gpmlp
from gpmlp.core.errors import UserError
from gpmlp.io.ase_atoms import from_ase
from gpmlp.properties.compute import compute_properties, exact_properties
from gpmlp.properties.hop import Hop, _jump, _log_modes
from gpmlp.properties.surface import EnergySurface, displaced

HOP = Hop(temperature_K=900, equivalent=12)


def vacancy() -> tuple[Atoms, Atoms]:
    """Copper with a vacancy, before and after one of its neighbours has hopped into it; atoms that are far from that are held."""
    crystal = bulk("Cu", cubic=True) * (2, 2, 2)
    neighbour = int(np.argsort(crystal.get_distances(0, range(32), mic=True))[1])
    start, end = crystal.copy(), crystal.copy()
    end.positions[neighbour] += crystal.get_distance(neighbour, 0, mic=True, vector=True)
    middle = crystal.get_distances(0, range(32), mic=True) + crystal.get_distances(neighbour, range(32), mic=True)
    for atoms in (start, end):
        del atoms[0]
        atoms.set_constraint(FixAtoms(np.flatnonzero(middle[1:] > 5.2)))
    return start, end


@pytest.fixture(scope="module")
def truth() -> dict[str, float]:
    return exact_properties(EnergySurface.of_calculator(EMT()), vacancy(), [HOP])


def adatom() -> tuple[Atoms, Atoms]:
    """Gold on Al(100), whose layers are held."""
    start = fcc100("Al", (2, 2, 2))
    add_adsorbate(start, "Au", 1.7, "hollow")
    start.center(axis=2, vacuum=5.0)
    start.set_constraint(FixAtoms(mask=[atom.tag > 0 for atom in start]))
    end = start.copy()
    end.positions[-1, 0] += end.cell[0, 0] / 2
    return start, end


def test_vineyard_by_vibrations_of_ase(tmp_path):
    """One free atom on a rigid surface: the saddle is the bridge; frequencies by ASE."""
    start, end = adatom()
    found = exact_properties(
        EnergySurface.of_calculator(EMT()), [start, end], [Hop(temperature_K=500, equivalent=4, dimensions=2)]
    )
    energies, modes = [], []
    for i, share in enumerate((0.0, 0.5)):
        atoms = start.copy()
        atoms.positions[-1] += share * (end.positions[-1] - start.positions[-1])
        atoms.calc = EMT()
        heights = atoms.positions[-1, 2] + np.linspace(-0.6, 0.8, 1401)
        along = []
        for z in heights:  # by symmetry nothing else moves
            atoms.positions[-1, 2] = z
            along.append(atoms.get_potential_energy())
        atoms.positions[-1, 2] = heights[int(np.argmin(along))]
        energies.append(min(along))
        vibrations = Vibrations(atoms, indices=[len(atoms) - 1], name=str(tmp_path / f"vib{i}"))
        vibrations.run()
        modes.append(vibrations.get_frequencies())  # cm^-1
    real = [np.sort(f.real[np.abs(f.imag) < 1e-6]) for f in modes]
    assert len(real[0]) == 3 and len(real[1]) == 2
    attempts = real[0].prod() / real[1].prod() * 2.99792458e10  # Hz
    rate = attempts * np.exp(-(energies[1] - energies[0]) / (units.kB * 500))
    assert found["hop_barrier"] == pytest.approx(energies[1] - energies[0], abs=1e-4)
    assert found["log10_attempt_frequency"] == pytest.approx(np.log10(attempts / 1e12), abs=5e-3)
    assert found["log10_hop_rate"] == pytest.approx(np.log10(rate), abs=5e-3)
    distance = start.cell[0, 0] / 2
    assert 10 ** found["log10_diffusion_coefficient"] == pytest.approx(4 * (distance * 1e-10) ** 2 / 4 * rate, rel=2e-2)


def test_modes_are_those_that_constraints_allow():
    """An adatom that is held along y has two modes; free ones are the roots of those of the whole matrix."""
    (start, _), surface = adatom(), EnergySurface.of_calculator(EMT())
    start = surface.relax(start)
    whole = _log_modes(start, surface.points(displaced(start)), 0)
    parts = []
    for normal in ([1, 0, 0], [0, 1, 0], [0, 0, 1]):
        start.set_constraint([start.constraints[0], FixedLine(8, normal)])
        parts.append(_log_modes(start, surface.points(displaced(start)), 0))
    assert whole == pytest.approx(sum(parts), abs=1e-6)  # by symmetry the modes are along the axes
    start.set_constraint([start.constraints[0], FixedPlane(8, [0, 1, 0])])
    assert _log_modes(start, surface.points(displaced(start)), 0) == pytest.approx(parts[0] + parts[2], abs=1e-6)


def test_only_motions_of_the_whole_are_left_out():
    """All atoms are held along z: of the translations two are left, which are no modes."""
    surface, crystal = EnergySurface.of_calculator(EMT()), bulk("Cu", cubic=True)
    crystal = surface.relax(crystal)
    whole = _log_modes(crystal, surface.points(displaced(crystal)), 0)
    crystal.set_constraint(FixCartesian(range(4), [False, False, True]))
    # the modes of the cell are along its axes
    assert _log_modes(crystal, surface.points(displaced(crystal)), 0) == pytest.approx(2 / 3 * whole, abs=1e-6)


def test_diffusion_of_a_vacancy(truth):
    """D = a^2 times the rate of one hop, as 12 hops of a/sqrt 2 in three dimensions; attempts of some THz; Arrhenius."""
    a = bulk("Cu", cubic=True).cell[0, 0] * 1e-10
    rate = 10 ** truth["log10_hop_rate"]
    assert 10 ** truth["log10_diffusion_coefficient"] == pytest.approx(a**2 * rate, rel=1e-3)
    assert 0.5 < truth["hop_barrier"] < 1.0 and 0 < truth["log10_attempt_frequency"] < 1.5
    attempts = 10 ** truth["log10_attempt_frequency"] * 1e12
    assert rate == pytest.approx(attempts * np.exp(-truth["hop_barrier"] / (units.kB * 900)), rel=1e-9)


@pytest.mark.parametrize("relaxed", [False, True], ids=["ideal", "relaxed"])
def test_jump_is_from_site_to_site(relaxed):
    """That of a vacancy is a lattice vector, though its neighbours lie nearer; a drift of all ideal places is none of it."""
    crystal = bulk("Cu", cubic=True) * (3, 3, 3)
    there = int(np.argsort(crystal.get_distances(0, range(len(crystal)), mic=True))[1])
    vector = crystal.get_distance(there, 0, mic=True, vector=True)
    start, end = crystal.copy(), crystal.copy()
    end.positions[there] += vector
    ends = [start, end]
    for atoms in ends:
        del atoms[0]
        if relaxed:
            atoms.calc = EMT()
            assert BFGS(atoms, logfile=None).run(fmax=2e-3)
    jump, farthest = _jump(*ends)
    if relaxed:
        assert farthest < np.linalg.norm(vector) - 0.02
    else:
        end.positions += [0.2, 0.1, 0.0]
    assert _jump(*ends)[0] == pytest.approx(np.linalg.norm(vector), abs=2e-3) == jump
    assert not HOP.refusal(ends)


def test_jump_that_is_not_clear_has_to_be_given():
    """Two atoms pass a hop on; with the distance given D has it."""
    start = bulk("Cu", cubic=True) * (2, 2, 2)
    end = start.copy()
    end.positions[:2] += [1.2, 0, 0]
    assert "hop.jump_A" in HOP.refusal([start, end])
    given = Hop(jump_A=2.5, equivalent=6)
    assert not given.refusal([start, end])
    end.set_cell(1.01 * end.cell)
    assert "same cell" in given.refusal([start, end])
    ends = adatom()
    found = [
        exact_properties(EnergySurface.of_calculator(EMT()), ends, [Hop(jump_A=jump)])["log10_diffusion_coefficient"]
        for jump in (None, ends[0].cell[0, 0])
    ]
    assert found[1] - found[0] == pytest.approx(np.log10(4), abs=1e-6)


def labels(seed: int, n: int = 24) -> list[Atoms]:
    """Of the oracle, at random about the minimum and along the straight way."""
    rng, (start, end) = np.random.default_rng(seed), vacancy()
    frames = []
    for i in range(n):
        atoms = start.copy()
        atoms.positions += (0.0, 0.25, 0.5, 0.0)[i % 4] * (end.positions - start.positions)
        atoms.positions += rng.normal(0, rng.uniform(0.03, 0.07), atoms.positions.shape)
        atoms.set_constraint()
        point = atoms.copy()
        point.calc = EMT()
        atoms.calc = SinglePointCalculator(atoms, energy=point.get_potential_energy(), forces=point.get_forces())
        frames.append(atoms)
    return frames


RECIPE = {"descriptor": {"cutoff": 5.0, "n_max": 6, "l_max": 4}, "inducing": {"n": 150, "gradients": 2}}


@pytest.fixture(scope="module")
def fitted() -> list[gpmlp.Potential]:
    """Of the labels of four seeds."""
    return [gpmlp.fit(*from_ase(labels(seed)), gpmlp.Recipe.model_validate(RECIPE))[0] for seed in range(4)]


def test_intervals_cover_the_oracle(truth, fitted):
    """From twenty-four labels to a diffusion coefficient at 900 K, over seeds: as many intervals of 90 % hold the oracle's own value as
    should, and they are no wider than they need to be."""
    found = [compute_properties(potential, vacancy(), [HOP], samples=16) for potential in fitted]
    for name in ("hop_barrier", "log10_attempt_frequency", "log10_diffusion_coefficient"):
        values = [results[name] for results in found]
        z = np.array([(value.value - truth[name]) / value.sigma for value in values])
        assert sum(value.low_90 <= truth[name] <= value.high_90 for value in values) >= 3, (name, z)
        assert np.sqrt(np.mean(z**2)) > 0.1 and np.abs(z).max() < 4, (name, z)
    assert all(0.01 < results["log10_diffusion_coefficient"].sigma < 0.3 for results in found)


def test_what_cannot_hop_is_refused(truth):
    surface, (start, end), pinned = EnergySurface.of_calculator(EMT()), vacancy(), molecule("N2")
    pinned.set_constraint(FixAtoms([0]))
    for structures, said in (
        ([start], "needs two structures"),
        ([start, end[:-1]], "same atoms in the same order"),
        ([molecule("N2"), molecule("N2")], "isolated molecule turns"),
        ([pinned, pinned.copy()], "isolated molecule turns"),  # about the atom that is held
    ):
        with pytest.raises(UserError, match=said):
            exact_properties(surface, structures, [HOP])
    with pytest.raises(UserError, match="no path|one place|no saddle|unstable"):
        exact_properties(surface, [start, start.copy()], [HOP])
