"""Properties with error bars: the value against the oracle's own, the fast error bar against one from relaxations of every sample."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

import gpmlp
from gpmlp.core.errors import UserError
from gpmlp.io.ase_atoms import from_ase
from gpmlp.potential.potential import Potential
from gpmlp.properties.compute import exact_properties
from gpmlp.properties.surface import Surface
from gpmlp.properties.values import spread, value_from_samples


def labelled(crystal: Atoms, calculator, n: int, strain: float, rattle: float) -> list[Atoms]:
    """n copies of a crystal, strained and rattled, with labels."""
    rng, out = np.random.default_rng(0), []
    for _ in range(n):
        atoms = crystal.copy()
        atoms.set_cell(atoms.cell @ (np.eye(3) + rng.normal(0, strain, (3, 3))), scale_atoms=True)
        atoms.rattle(rattle, rng=rng)
        asked = atoms.copy()
        asked.calc = calculator
        found = {"energy": asked.get_potential_energy(), "forces": asked.get_forces(), "stress": asked.get_stress()}
        atoms.calc = SinglePointCalculator(atoms, **found)
        out.append(atoms)
    return out


@pytest.fixture(scope="module")
def copper() -> Potential:
    """Of few labels, so that there is something to be unsure of."""
    recipe = gpmlp.Recipe(descriptor={"cutoff": 4.5, "n_max": 6, "l_max": 3}, inducing={"n": 90})
    return gpmlp.fit(*from_ase(labelled(bulk("Cu", cubic=True), EMT(), 24, 0.03, 0.1)), recipe)[0]


@pytest.mark.parametrize("what", ["eos"])
def test_fast_error_bars_are_those_of_relaxed_samples(copper, what):
    """Same samples, so what differs is the Newton step and the like: within a quarter, as the contract says."""
    fast = gpmlp.compute_properties(copper, bulk("Cu"), [what], samples=12)
    full = gpmlp.compute_properties(copper, bulk("Cu"), [what], samples=12, full=True)
    assert not fast.failures and not full.failures
    for a, b in zip(fast.values, full.values, strict=True):
        assert a.value == b.value
        assert a.sigma == pytest.approx(b.sigma, rel=0.25)
        assert a.sigma > 0


def test_values_are_near_those_of_the_oracle(copper):
    """EMT's copper by the same code on the oracle itself; within five standard deviations, as the fit is small."""
    found = gpmlp.compute_properties(copper, bulk("Cu"), ["eos"])
    truth = exact_properties(Surface.of_calculator(EMT()), bulk("Cu"), ["eos"])
    for value in found.values:
        assert abs(value.value - truth[value.name]) < 5 * value.sigma
        assert value.low_90 < value.value < value.high_90
        assert value.samples == 32 and value.failed == 0 and value.novelty > 0
    assert found["bulk_modulus"].value == pytest.approx(truth["bulk_modulus"], rel=0.05)


def test_a_sample_that_fails_does_not_widen_the_rest():
    rng = np.random.default_rng(1)
    samples = rng.normal(2.0, 0.1, 200)
    whole = value_from_samples("hop", "eV", 2.0, samples)
    assert whole.sigma == pytest.approx(0.1, rel=0.1)
    assert whole.high_90 - 2.0 == pytest.approx(1.645 * whole.sigma, rel=0.02)
    lost = value_from_samples("hop", "eV", 2.0, [*samples, np.nan, 9.0])
    assert lost.failed == 1 and lost.samples == 202
    assert lost.sigma == pytest.approx(0.1, rel=0.15)
    far = value_from_samples("hop", "eV", 2.0, [*samples, 9.0])
    assert far.failed == 0 and far.sigma == pytest.approx(0.1, rel=0.15)
    both = value_from_samples("hop", "eV", 2.0, samples, statistical=0.2)
    assert both.sigma == pytest.approx(np.hypot(whole.sigma, 0.2))
    assert np.isnan(spread(np.array([[1.0], [np.nan]]), 1.0)).all()


def test_refusals(copper):
    with pytest.raises(UserError, match="no crystal"):
        gpmlp.compute_properties(copper, Atoms("Cu2", [(0, 0, 0), (2.2, 0, 0)]), ["eos"])
    with pytest.raises(UserError, match="not trained on H "):
        gpmlp.compute_properties(copper, molecule("H2O"), ["eos"])
    with pytest.raises(UserError, match="Unknown property 'eso'. Perhaps you meant 'eos'"):
        gpmlp.compute_properties(copper, bulk("Cu"), ["eso"])
    with pytest.raises(UserError, match="no structures"):
        gpmlp.compute_properties(copper, [], ["eos"])
