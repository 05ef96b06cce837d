"""Exploration: slopes of the standard deviation, rare directions, ascent, bias."""

from __future__ import annotations

from dataclasses import replace

import ase.build
import pytest
import torch

import gpmlp
from gpmlp.core.errors import UserError
from gpmlp.io.ase_atoms import from_ase, structures_from_ase
from gpmlp.learning import exploration
from gpmlp.learning.exploration import summed_std
from gpmlp.learning.triggers import too_close
from gpmlp.recipe import Recipe

SMALL = {"n_max": 3, "l_max": 2, "cutoff": 3.5, "sigma_atom": 0.5}


@pytest.fixture(scope="module")
def learned():
    """Two species, gradients, a cell that is smaller than the cutoff sees."""
    from ase.calculators.emt import EMT

    frames = []
    for seed in range(12):
        atoms = ase.build.bulk("Cu", "fcc", a=3.7, cubic=True)
        atoms.symbols[seed % 4] = "Au"
        atoms.rattle(0.12, seed=seed)
        atoms.calc = EMT()
        atoms.get_forces()
        frames.append(atoms)
    structures, targets = from_ase(frames)
    recipe = Recipe.model_validate({"descriptor": SMALL, "inducing": {"n": 8, "gradients": 2}, "memory_GB": 1.0})
    potential, _ = gpmlp.fit(structures, targets, recipe)
    return replace(potential, variances=replace(potential.variances, amplitude=0.3)), structures


def test_values_are_the_standard_deviations_of_local_energies(learned):
    potential, structures = learned
    some = structures.select([0, 3])
    found = summed_std(potential, some)
    known = potential(some, "atom_energies", calibrated=False).atom_energies_variance.epistemic.sqrt()
    torch.testing.assert_close(found.atom_energies, known, rtol=1e-9, atol=1e-12)
    sums = torch.zeros(2, dtype=torch.float64).index_add(0, some.structure_of_atom, known)
    torch.testing.assert_close(found.energies, sums, rtol=1e-9, atol=1e-12)


def test_forces_and_stress_are_slopes(learned):
    """Central differences of step 1e-4 A: error of the order of 1e-8 times the third derivative."""
    potential, structures = learned
    one = structures.select([5])
    found, h = summed_std(potential, one), 1e-4

    def value(positions, cells=None):
        return float(summed_std(potential, one.with_positions(positions, cells)).energies[0])

    for atom, axis in ((0, 0), (1, 2), (3, 1)):
        shift = torch.zeros_like(one.positions)
        shift[atom, axis] = h
        slope = (value(one.positions + shift) - value(one.positions - shift)) / (2 * h)
        assert found.forces[atom, axis] == pytest.approx(-slope, abs=1e-6)
    strain = torch.zeros(3, 3, dtype=torch.float64)
    strain[0, 1] = strain[1, 0] = 0.5 * h
    eye = torch.eye(3, dtype=torch.float64)
    sides = [value(one.positions @ (eye + s * strain), one.cells @ (eye + s * strain)) for s in (1, -1)]
    slope = (sides[0] - sides[1]) / (2 * h) / float(one.volumes[0])
    assert found.stresses[0, 0, 1] == pytest.approx(slope, abs=1e-7)


def test_a_rare_direction_leads_to_greater_novelty_within_the_radius(learned):
    potential, structures = learned
    one = structures.select([2])
    moved = exploration.displace_rare(potential, one, 1, radius_A=0.25)
    shift = (moved.positions - one.positions).norm(dim=1)
    assert 0 < float(shift.max()) <= 0.25 + 1e-9
    before, after = (float(potential(s, novelty=True).novelty.max()) for s in (one, moved))
    assert after > before
    # a random displacement of the same size does less
    generator = torch.Generator().manual_seed(0)
    others = []
    for _ in range(8):
        noise = torch.randn(one.positions.shape, generator=generator, dtype=torch.float64)
        other = one.with_positions(one.positions + noise * shift.norm() / noise.norm())
        others.append(float(potential(other, novelty=True).novelty.max()))
    assert after > sorted(others)[4]


def test_ascent_climbs_and_keeps_its_distances(learned):
    potential, structures = learned
    one = structures.select([4])
    climbed = exploration.ascend_uncertainty(potential, one, radius_A=0.3, steps=6)
    assert float(summed_std(potential, climbed).energies[0]) > 1.01 * float(summed_std(potential, one).energies[0])
    assert float((climbed.positions - one.positions).norm(dim=1).max()) <= 0.3 + 1e-9
    assert too_close(climbed, 0.6) is None


def test_the_bias_pushes_uphill_with_the_share_asked_for(learned):
    potential, structures = learned
    one = structures.select([1])
    forces = potential(one).forces
    energy, push, stress = exploration.UncertaintyBias(0.3)(potential, one, forces)
    assert energy < 0 and stress.shape == (3, 3)
    assert float(push.square().mean().sqrt()) == pytest.approx(0.3 * float(forces.square().mean().sqrt()))
    further = one.with_positions(one.positions + 1e-3 * push / push.norm())
    assert float(summed_std(potential, further).energies[0]) > float(summed_std(potential, one).energies[0])


def test_what_cannot_be_explored_is_refused(learned):
    potential, _ = learned
    alone = structures_from_ase([ase.Atoms("Cu", [[0, 0, 0]])])
    with pytest.raises(UserError, match="no neighbours"):
        exploration.displace_rare(potential, alone, 0)
    silver = structures_from_ase([ase.build.bulk("Ag", cubic=True)])
    with pytest.raises(UserError, match="Ag has no data in this model"):
        exploration.displace_rare(potential, silver, 0)
    with pytest.raises(UserError, match="Ag"):
        summed_std(potential, silver)
