"""Atoms that move in ASE's calculator, whose compiled core follows them: every kind of model gives what the potential itself gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from systems import (
    BASELINES,
    DESCRIPTORS,
    KERNELS,
    SPECIES,
    cluster,
    crystal,
    descriptor,
    everything,
    low_rank_term,
    mixed_potential,
    network_descriptor,
    random_term,
)
from toy_network import SHA256

import gpmlp
from gpmlp.core.environments import SinglePrecisionDescriptor
from gpmlp.engines.ase import GPCalculator
from gpmlp.fitting.charge_data import make_basis
from gpmlp.io.ase_atoms import structures_from_ase, to_ase
from gpmlp.native import library
from gpmlp.potential.baselines import NetworkEnergies
from gpmlp.potential.calculator_energies import CalculatorEnergies
from gpmlp.potential.charges import ChargeForm, ChargeModel
from gpmlp.potential.dispersion import D3Dispersion, R6Tail
from gpmlp.potential.potential import Potential
from gpmlp.recipe import Recipe

USUAL = KERNELS["polynomial 2"]


def with_baseline(baseline) -> Potential:
    plain = mixed_potential()
    return replace(plain, baselines=(*plain.baselines, baseline))


def with_charges() -> Potential:
    plain = mixed_potential()
    basis = make_basis(plain.terms[0], everything())
    start = basis.physical(dict.fromkeys(SPECIES, 1))
    noise = torch.randn(basis.n_columns, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return replace(plain, charges=ChargeModel(ChargeForm(3.0), basis, start + 0.2 * noise, start))


def of_functionals() -> Potential:
    structures = gpmlp.Structures.concatenate([cluster(seed=k) for k in range(6)])
    prediction = mixed_potential()(structures)
    labels = gpmlp.Targets.unlabelled(structures)
    labels = replace(labels, energies=prediction.energies, forces=prediction.forces)
    small = {"descriptor": {"n_max": 3, "l_max": 2, "cutoff": 3.5}, "inducing": {"functionals": "all"}}
    recipe = Recipe.model_validate(small | {"baseline": {"zbl": False}, "calibration": False})
    return gpmlp.fit(structures, labels, recipe)[0]


def of_term(term) -> Potential:
    return Potential((term,), tuple(made() for made in BASELINES.values()), SPECIES, Recipe())


PAIRS = [(a, b) for a in SPECIES for b in SPECIES if a <= b]
MODELS = {
    **{name: (lambda name=name: of_term(random_term(descriptor(name), USUAL))) for name in DESCRIPTORS},
    "low rank": lambda: of_term(low_rank_term(descriptor("soap gto"))),
    "single precision": lambda: of_term(random_term(SinglePrecisionDescriptor(descriptor("soap gto")), USUAL)),
    "sum of kernels": lambda: mixed_potential("sum"),
    "network": lambda: of_term(random_term(network_descriptor(), USUAL)),
    "network alone": lambda: of_term(random_term(network_descriptor(None), USUAL)),
    "functionals": of_functionals,
    "charges": with_charges,
    "r6": lambda: with_baseline(R6Tail(dict.fromkeys(PAIRS, 20.0), 2.0, 3.5, 9.0)),
    "d3": lambda: with_baseline(D3Dispersion.asked_for("pbe", "bj", False)),
    "calculator": lambda: with_baseline(CalculatorEnergies.asked_for("emt", {}, False)),
    "network as baseline": lambda: with_baseline(NetworkEnergies("network", "toy", SHA256)),
}
FOLLOWED = {"soap gto", "four-body soap", "compressed soap", "low rank", "single precision", "sum of kernels"}


@pytest.mark.parametrize("charge", [0, 1])
@pytest.mark.parametrize("start", [cluster, crystal], ids=["cluster", "crystal"])
@pytest.mark.parametrize("name", MODELS)
def test_moves_are_those_of_the_potential(name, start, charge):
    if name == "d3":
        pytest.importorskip("dftd3")
    potential = MODELS[name]()
    frame, rng = to_ase(start())[0], np.random.default_rng(0)
    frame.info["charge"] = charge
    calculator = GPCalculator(potential, skin=0.6)
    frame.calc = calculator
    for _ in range(6):
        wanted = potential(structures_from_ase([frame]))
        size = max(1.0, float(wanted.energies.abs()))
        assert frame.get_potential_energy() == pytest.approx(float(wanted.energies), abs=1e-12 * size)
        np.testing.assert_allclose(frame.get_forces(), wanted.forces, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(calculator.prediction.stresses, wanted.stresses, rtol=1e-9, atol=1e-11)
        if wanted.charges is not None:
            np.testing.assert_allclose(frame.get_charges(), wanted.charges, rtol=0, atol=1e-10)
            assert frame.get_charges().sum() == pytest.approx(charge, abs=1e-9)
        frame.positions += 0.004 * rng.standard_normal(frame.positions.shape)
    assert calculator._verlet_list.searched == 2  # the second time with the skin
    if library.compiled() is not None and name in FOLLOWED:
        assert calculator._moving is not None  # what is not followed proves nothing of it
