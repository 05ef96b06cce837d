"""Variances of local energies from fewer columns: least squares by dense algebra, the compiled core, files, reports, choices."""

from __future__ import annotations

import pytest
import torch
from conftest import copper
from systems import CUTOFF, evaluate_by_core, everything, force_sigma_by_core
from test_export import load
from test_low_rank import CHOICES
from test_stepper import shaken

import gpmlp
from gpmlp.core import neighbors
from gpmlp.core.environments import Surroundings
from gpmlp.core.errors import UserError
from gpmlp.core.structures import Structures
from gpmlp.fitting import reduced_variance
from gpmlp.fitting.reduced_variance import MOVED, RIDGE, with_reduced_variance
from gpmlp.io import ase_atoms
from gpmlp.io.export import export_model
from gpmlp.potential import chunked
from gpmlp.potential.local_errors import LocalErrors
from gpmlp.potential.potential import Potential
from gpmlp.recipe import Recipe

SETTINGS = CHOICES | {"mean": "exact", "variance": {"local": "reduced"}, "calibration": False, "novelty": {}}


@pytest.fixture(scope="module")
def many():
    return ase_atoms.from_ase([copper(seed, 1 + seed % 2) for seed in range(24)])


@pytest.fixture(scope="module", params=["values", "gradients"])
def fitted(many, request):
    columns = {"n": 120, "gradients": 0} if request.param == "values" else {"n": 60, "gradients": 3}
    return gpmlp.fit(*many, Recipe.model_validate(SETTINGS | {"inducing": columns}))


def two_descriptors() -> Potential:
    """Of several species, periodic and not."""
    batch = Structures.concatenate([shaken(everything(), 0.05, seed) for seed in range(6)])
    energies = torch.randn(len(batch), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    forces = 0.3 * torch.randn(batch.n_atoms, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets = gpmlp.Targets.unlabelled(batch)
    targets = type(targets)(**vars(targets) | {"energies": energies, "forces": forces})
    choices = {
        "descriptor": [{"cutoff": CUTOFF, "n_max": 3, "l_max": 3}, {"cutoff": 2.8, "n_max": 2, "l_max": 1}],
        "kernel": [{"zeta": 4}, {"zeta": 2}], "inducing": {"n": 60, "gradients": 0},
        "noise": {"energy_per_atom": 0.01, "force": 0.1}, "variance": {}, "calibration": False,
    }  # fmt: skip
    potential = gpmlp.fit(batch, targets, Recipe.model_validate(SETTINGS | choices))[0]
    return with_reduced_variance(potential, batch.select(range(0, 48, 2)), batch.select(range(1, 48, 2)))[0]


def std(potential: Potential, structures) -> torch.Tensor:
    return potential(structures, "atom_energies").atom_energies_variance.total.sqrt()


def test_it_is_the_variance_of_a_least_squares_interpolation(fitted, many):
    """Of ε(x) from environments x_i, whose posterior covariance is dense here; all columns give the exact variance."""
    potential, structures = fitted[0].to(local_variance="exact"), many[0]
    posterior = reduced_variance._Posterior.of_species(potential.variances, 29, 0.3)
    features = [potential.terms[0].environments(structures).environments.features]
    a = posterior.whitened(features)
    kernel = potential.terms[0].kernel.value(features[0] @ features[0].T) * potential.variances.prior_variance(29)
    covariance = 0.3 * (kernel - a @ a.T) + a @ posterior.covariance @ a.T
    for m in (10, 40):
        form, _ = posterior._of_columns(features, a, m)
        pieces = potential.variances.local_pieces(29, features)
        k = pieces[0][:, :m]
        weights = covariance.diagonal().rsqrt()
        # in the basis that the ridge is in
        basis = a[:, :m] * weights[:, None]
        ridge = RIDGE * torch.linalg.matrix_norm(basis, 2) ** 2
        h = torch.linalg.solve(basis.T @ basis + ridge * torch.eye(m), basis.T).T * weights[:, None]
        whiten = torch.linalg.inv(posterior.lowers[0][:m, :m]) * posterior.signal[:m, None]
        expected = torch.linalg.vecdot(k @ whiten.T @ h.T @ covariance, k @ whiten.T @ h.T)
        torch.testing.assert_close(form(pieces), expected, rtol=1e-5, atol=0)
        assert torch.equal(form.triangle, form.triangle.tril()) and form.triangle.shape == (m, m)


def test_near_the_exact_ones(fitted, many):
    potential, report = fitted
    numbers = report.local_variance["Cu"]
    assert numbers["columns"] < numbers["columns_of_all"] == potential.variances.n_columns
    ratio = std(potential, many[0]) / std(potential.to(local_variance="exact"), many[0])
    assert 0.9 < float(ratio.quantile(0.05)) < float(ratio.quantile(0.95)) < 1.15
    assert float((ratio - 1).abs().max()) > 1e-6
    assert 0.8 < numbers["std_ratio_low"] <= numbers["std_ratio_median"] <= numbers["std_ratio_high"] < 1.3


def test_as_few_columns_as_keep_to_the_limits(fitted, many, monkeypatch):
    potential, structures = fitted[0].to(local_variance="exact"), many[0]
    halves = structures.select(range(0, 24, 2)), structures.select(range(1, 24, 2))
    monkeypatch.setattr(reduced_variance, "COLUMNS", (2, 8, 16, 24, 32))
    found = with_reduced_variance(potential, *halves)[1]["Cu"]
    assert 2 < found["columns"]
    monkeypatch.setattr(reduced_variance, "LOW", 0.0)
    monkeypatch.setattr(reduced_variance, "HIGH", 1e9)
    assert with_reduced_variance(potential, *halves)[1]["Cu"]["columns"] == 2
    monkeypatch.setattr(reduced_variance, "COLUMNS", (1000,))
    assert with_reduced_variance(potential, *halves) == (potential, None)  # as dear as all of them


def test_the_core_has_them(fitted, many, monkeypatch):
    monkeypatch.setattr(reduced_variance, "COLUMNS", (4, 8, 12))
    for potential, structures in ((fitted[0], many[0]), (two_descriptors(), everything())):
        model = potential.variances
        assert model.cheap and potential.compiled_mean is not None
        near = neighbors.find_neighbors(structures, potential.reach).of_centers
        errors = LocalErrors(model, None)
        ours, reference = (
            chunked.predict_mean(potential.terms, structures, near, errors, compiled=core).atom_energies_variance
            for core in (potential.compiled_mean, None)
        )
        torch.testing.assert_close(ours.total.sqrt(), reference.total.sqrt(), rtol=1e-8, atol=0)
        assert not ours.inducing.any() and reference.data.min() > 0


def test_exports_have_them(fitted, many, tmp_path):
    """And variances of forces, which are of all columns."""
    potential, structures = fitted[0], many[0].select([0, 1])
    export_model(potential, tmp_path / "model")
    near = neighbors.find_neighbors(structures, potential.reach)
    *_, sigma, _ = evaluate_by_core(load(tmp_path / "model"), Surroundings.from_structures(structures, near), True)
    torch.testing.assert_close(sigma, std(potential, structures), rtol=1e-12, atol=0)
    forces = force_sigma_by_core(load(tmp_path / "model"), structures, near, [0, 3])
    wanted = potential(structures, "forces", atoms=[0, 3]).forces_covariance.total.diagonal(dim1=1, dim2=2).sqrt()
    torch.testing.assert_close(forces, wanted[[0, 3]], rtol=1e-6, atol=1e-8)


def test_files_keep_both(fitted, many, tmp_path):
    potential, structures = fitted[0], many[0]
    gpmlp.save(potential, tmp_path / "m.gpmlp")
    again = gpmlp.load(tmp_path / "m.gpmlp")
    assert torch.equal(std(again, structures), std(potential, structures))
    exact = again.to(local_variance="exact")
    gpmlp.save(exact, tmp_path / "e.gpmlp")
    back = gpmlp.load(tmp_path / "e.gpmlp")
    assert not torch.equal(std(back, structures), std(potential, structures))
    assert torch.equal(std(back.to(local_variance="reduced"), structures), std(potential, structures))
    found, there = (p(structures, "forces").forces_covariance.total for p in (again, back))
    assert torch.equal(found, there)  # all other variances are of all columns


def test_exact_where_it_was_not_asked_for(many):
    with pytest.raises(UserError, match="Unknown form of the variance of local energies .few"):
        gpmlp.fit(*many, Recipe.model_validate(SETTINGS | {"variance": {}}))[0].to(local_variance="few")
    plain, report = gpmlp.fit(*many, Recipe.model_validate(SETTINGS | {"variance": {}}))
    assert report.local_variance is None and not plain.variances.reduced
    with pytest.raises(UserError, match="no variances of fewer columns"):
        plain.to(local_variance="reduced")


@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: 0 * t, lambda t: t.float(), lambda t: None])
def test_altered_ones_are_refused(fitted, change):
    header, tensors = fitted[0].state()
    altered = tensors | {"variances.reduced.29": change(tensors["variances.reduced.29"])}
    with pytest.raises(UserError):
        Potential.from_state(header, {name: t for name, t in altered.items() if t is not None})


@pytest.mark.parametrize("leading", [[], [0], [10**6], [40, 40]])
def test_altered_columns_are_refused(fitted, leading):
    header, tensors = fitted[0].state()
    header["variances"]["reduced"]["29"] = leading
    with pytest.raises(UserError):
        Potential.from_state(header, tensors)


def test_ways_to_move(many):
    """Each structure by its own shortest distance; lengths by their factor."""
    some = many[0].select([0, 1])
    for factor, shaken_by in MOVED:
        moved = reduced_variance._moved(some, factor, shaken_by, 0)
        step = (moved.positions - factor * some.positions).square().mean().sqrt()
        assert float(step) == pytest.approx(shaken_by * 2.4, rel=0.2)
        torch.testing.assert_close(moved.cells, factor * some.cells)


def test_no_more_columns_than_environments(fitted, many, monkeypatch):
    monkeypatch.setattr(reduced_variance, "ENVIRONMENTS", (2, 1))
    potential, few = fitted[0].to(local_variance="exact"), many[0].select([0])
    found = with_reduced_variance(potential, few, many[0].select([1]))[1]
    assert found is None or found["Cu"]["columns"] <= 2 + len(MOVED)
    monkeypatch.setattr(reduced_variance, "COLUMNS", (4,))
    there, numbers = with_reduced_variance(potential, few, many[0].select([1]))
    assert numbers["Cu"]["columns"] == 4 and torch.isfinite(std(there, many[0])).all()
