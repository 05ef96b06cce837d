"""Charges of a model that learns label by label: known in the mean between two fits of them, uncertain in variances."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from ase import Atoms
from learning_runs import contents, finish, prepare, recipe
from test_charge_fit import _recipe, ions, labelled

import gpmlp
from gpmlp.core.errors import DataWarning
from gpmlp.fitting.online import OnlineFit
from gpmlp.learning.loop import learn
from gpmlp.potential.charges import ChargePosterior


def part(data, chosen):
    structures, targets = data
    return structures.select(chosen), targets.select(structures, chosen)


@pytest.fixture(scope="module")
def data():
    return ions(40, 0, 6.0)


@pytest.fixture(scope="module")
def begun(data):
    return OnlineFit.begin(*part(data, range(25)), _recipe(charges="polarisable", kappa=3.0))


@pytest.fixture(scope="module")
def grown(data, begun):
    online = begun
    for i in range(25, 32):
        online = online.learned(*part(data, [i]))
    return online


def test_it_sees_beyond_the_cutoff_and_says_how_it_was_fitted(begun, grown):
    far, labels = ions(12, 500, 12.0, 4.5)
    alone = OnlineFit.begin(*ions(25, 0, 6.0), _recipe(charges="off"))
    error = {name: (m.potential(far).energies - labels.energies).abs().mean() for name, m in
             {"alone": alone, "begun": begun, "grown": grown}.items()}  # fmt: skip
    assert error["begun"] < 0.2 * error["alone"] and error["grown"] < 0.2 * error["alone"]
    assert grown.potential.charges is not None and grown.report()["charges"]["kept"]
    assert torch.equal(grown.potential.charges.parameters, begun.potential.charges.parameters)


def dense_posterior(online: OnlineFit) -> ChargePosterior:
    """By one QR of all rows and both priors."""
    scale, n = online.charges.scale, online.factor.columns
    rows = [torch.eye(n + len(scale), dtype=torch.float64)]
    for batch in online.batches:
        for kind, a in batch.rows.items():
            c = batch.charges[kind] * scale / online.noise.get(kind, 1.0)
            rows.append(torch.cat([a[:, :-1], c], dim=1))
    upper = torch.linalg.qr(torch.cat(rows), mode="r").R
    upper = upper * upper.diagonal().sign()[:, None]
    return ChargePosterior(scale, upper[:n, n:], upper[n:, n:])


@pytest.mark.parametrize("name", ["begun", "grown"])
def test_variances_hold_the_posterior_of_charges(request, name):
    online = request.getfixturevalue(name)
    found, right = online.potential.charges.posterior, dense_posterior(online)
    sign = online.factor.upper[:, :-1].diagonal().sign()[:, None]
    assert torch.allclose(found.cross * sign, right.cross, rtol=0, atol=1e-7 * float(right.cross.abs().max()))
    assert torch.allclose(found.factor, right.factor, rtol=0, atol=1e-7 * float(right.factor.abs().max()))


def test_made_anew_it_is_what_begins_with_all_labels(data, grown):
    anew = grown.rebuilt("a test")
    begun = OnlineFit.begin(*part(data, range(32)), grown.asked)
    far, _ = ions(3, 500, 9.0)
    assert torch.allclose(anew.potential.charges.parameters, begun.potential.charges.parameters, rtol=0, atol=1e-12)
    assert torch.allclose(anew.potential(far).forces, begun.potential(far).forces, rtol=0, atol=1e-8)


def test_charges_that_bring_nothing_are_left_out_and_that_is_said(data):
    same = [data[0].select([i]) for i in range(25)]
    online = OnlineFit.begin(*labelled(same, [0.0] * 4), _recipe(charges="auto"))
    report = online.report()["charges"]
    assert online.potential.charges is None and report["kept"] is False
    # 325 labels without noise: of such the evidence rises by what is more flexible, errors of structures left out do not fall
    assert report["left_out_errors_ratio"] > 1 and "errors of structures left out are" in report["sentence"]


IONS = {
    "oracle": {"calculator": "born_mayer:BornMayer", "kwargs": {"charges": {"Na": 0.8, "Cl": -0.8}}, "executor": "inline",
               "check_every": 0},
    "model": {"descriptor": {"cutoff": 4.0}, "long_range": {"charges": "polarisable", "kappa": 3.0}},
    "dynamics": {"timestep_fs": 2.0, "steps": 20},
    "trigger": {"force": 0.5},
    "bootstrap": {"n": 5, "displacement_A": 0.1},
}  # fmt: skip


def test_a_learning_run_with_charges_is_the_same_however_often_it_ends(tmp_path):
    start = Atoms("NaClNaCl", [[0, 0, 0], [2.7, 0, 0], [2.8, 2.7, 0.2], [0.1, 2.8, 5.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        last = finish(recipe(**IONS), prepare(tmp_path / "whole", start))
        folder = prepare(tmp_path / "ended", start)
        for looks in (6, None):
            states = learn(recipe(**IONS), folder, resume=True)
            state = list(itertools.islice(states, looks))[-1]
            states.close()
    model = gpmlp.load(tmp_path / "whole/out/model.gpmlp")
    assert model.charges is not None and model.charges.posterior is not None
    assert state.stopped == last.stopped and contents(folder) == contents(tmp_path / "whole")
