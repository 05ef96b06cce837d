"""Novelty of environments not learned from, of stretched bonds and of structures at rest: a small part of the benchmark's table."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

import gpmlp
from gpmlp.fitting.online import OnlineFit
from gpmlp.io.ase_atoms import from_ase
from gpmlp.recipe import Recipe

SYSTEMS = {"silicon, 300 K": 90, "Cu + O, 400 K": 90, "ethanol": None}  # frames of dynamics


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
    yield importlib.import_module("novelty")
    sys.path.pop(0)


@pytest.fixture(scope="module", params=SYSTEMS)
def system(benchmark, request):
    frames = SYSTEMS[request.param]
    make = {"silicon, 300 K": benchmark.silicon, "Cu + O, 400 K": benchmark.copper_and_oxygen}
    return make[request.param](frames) if frames else benchmark.systems(None)[request.param]()


def _check(found) -> None:
    """What novelty is for. Near 1 for the farthest of 100 held-out environments of each species, larger where a bond is stretched."""
    for z, quantile in found.quantile.items():
        assert 0.5 < quantile < 1.5, (z, quantile)
    far = np.concatenate([v for (share, _), v in found.bonds.items() if share == 0.5])
    near = np.concatenate([v for (share, _), v in found.bonds.items() if share == 0.3])
    # hot ethanol nearly reaches C-H + 30 %: 0.7 where ten molecules were learned
    assert len(near) >= 5 and (far > 1).all() and (near > 1).mean() > 0.6
    assert not found.at_rest > 1.05  # NaN where there is none


@pytest.mark.parametrize("n", [10, 18, 60])
def test_metric_and_threshold(benchmark, system, n):
    metric = benchmark.MetricOnly(system.train)
    train = system.train[:n]
    _check(benchmark.judge(metric.novelty(metric.fitted(train, 0)), train, system))


def test_fit_and_online(benchmark):
    """Potentials, fitted at once with structures set aside, and label by label: the same rules."""
    system = benchmark.silicon(60)
    recipe, train = Recipe(inducing={"n": 20, "gradients": 2}), system.train[:30]
    fitted = gpmlp.fit(*from_ase(train)[:2], recipe)[0]
    online = OnlineFit.begin(*from_ase(train[:4])[:2], recipe)
    for atoms in train[4:12]:
        before, online = online, online.learned(*from_ase([atoms])[:2])
        assert online.novelty_labels == online.n_labels > before.n_labels
    assert online.novelty.species[14].count.sum() == 8 * 12
    assert fitted.novelty.species[14].count.sum() == 8 * 30  # those set aside for the calibration too
    for part, potential in ((train, fitted), (train[:12], online.potential)):
        _check(benchmark.judge(benchmark.of_potential(potential), part, system))


def test_isolated_atoms_are_no_environments(benchmark):
    """An isolated atom says nothing of what surrounds atoms; its features would make everything else near."""
    system = benchmark.copper_and_oxygen(20)
    alone = benchmark.Atoms("O")
    alone.calc = benchmark.SinglePointCalculator(alone, energy=0.0, forces=[[0.0, 0.0, 0.0]])
    recipe = Recipe(inducing={"n": 20, "gradients": 1}, calibration=False)
    one, two = (gpmlp.fit(*from_ase(part)[:2], recipe)[0].novelty for part in (system.train, [*system.train, alone]))
    assert two.thresholds[8] == pytest.approx(one.thresholds[8], rel=1e-6)
    online = OnlineFit.begin(*from_ase([*system.train, alone])[:2], recipe)
    assert online.novelty.species[8].count == len(system.train)
