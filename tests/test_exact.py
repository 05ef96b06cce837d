"""The exact process of all functionals of the data: its factorisation in place against dense algebra, and a fit against that by QR."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import gpmlp
from gpmlp.core.errors import UserError
from gpmlp.core.structures import Structures
from gpmlp.fitting import inducing_sets, left_out, variance_checks
from gpmlp.gp import exact
from gpmlp.gp.exact import ExactProcess
from gpmlp.gp.likelihood import Hyperparameters, StdPrior
from gpmlp.recipe import Recipe

SMALL = {
    "descriptor": {"n_max": 4, "l_max": 3, "cutoff": 4.0, "four_body": False},
    "mean": "exact",
    "inducing": {"functionals": "all"},
}
NOISE = {"energies": 0.02, "forces": 0.3}


def process(n: int = 700) -> ExactProcess:
    """Labels of a smooth process and noise, more of them than are copied at a time."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 2, generator=generator, dtype=torch.float64) * 6
    covariance = torch.exp(-0.5 * torch.cdist(x, x).square())
    rows = {"energies": torch.arange(0, n, 7), "forces": torch.tensor([i for i in range(n) if i % 7])}
    scale = torch.where(torch.arange(n) % 7 == 0, 9.0, 1.0).double()
    sizes = torch.cat([NOISE[k] * scale[r] for k, r in rows.items()])[torch.cat(list(rows.values())).argsort()]
    values = torch.linalg.cholesky(covariance + 1e-8 * torch.eye(n)) @ torch.randn(n, generator=generator).double() * 2
    values += sizes * torch.randn(n, generator=generator).double()
    upper = torch.full_like(covariance, torch.nan).triu(1)  # only the lower half counts
    given = torch.full_like(scale, torch.nan)
    given[[5, 8]] = sizes[[5, 8]] = 0.05
    rows["forces"] = rows["forces"][~torch.isin(rows["forces"], torch.tensor([5, 8]))]
    return ExactProcess.of_covariance(covariance.tril() + upper, values, rows, scale, given), covariance, sizes


def test_the_posterior_is_that_of_dense_algebra():
    made, covariance, sizes = process()
    square = made.square
    for signal in (2.0, 0.7, 2.0):  # again and again in the same memory
        given = made.condition(NOISE, signal)
        c = signal**2 * covariance + torch.diag(sizes.square())
        alpha = torch.linalg.solve(c, made.values)
        torch.testing.assert_close(given.alpha, alpha, rtol=1e-9, atol=1e-9 * float(alpha.abs().max()))
        torch.testing.assert_close(given.weights, signal**2 * alpha, rtol=1e-9, atol=1e-8)
        mean = signal**2 * covariance @ alpha
        torch.testing.assert_close(given.residuals, made.values - mean, rtol=0, atol=1e-9)
        density = torch.distributions.MultivariateNormal(torch.zeros_like(alpha), c).log_prob(made.values)
        assert given.negative_log_evidence == pytest.approx(-float(density), rel=1e-10)
        assert given.rms == pytest.approx(
            {k: float(((made.values - mean) / made.scale)[r].square().mean().sqrt()) for k, r in made.rows.items()}
            | {"given": float(((made.values - mean)[[5, 8]] / 0.05).square().mean().sqrt())}
        )
    assert made.square is square and torch.equal(square.tril(-1), covariance.tril(-1))


def test_labels_that_come_later_border_the_factor():
    """In four pieces as at once, and again without some of them; what was there is not touched."""
    whole, covariance, sizes = process(120)
    full, known = covariance.tril() + covariance.tril(-1).T, whole.scale.clone()

    def piece(first: int, last: int) -> ExactProcess:
        rows = {k: r[(r >= first) & (r < last)] - first for k, r in whole.rows.items()}
        here = slice(first, last)
        square = full[here, here].clone()
        return ExactProcess.of_covariance(square, whole.values[here], rows, known[here], whole.given[here])

    made = piece(0, 60)
    given = [made.condition(NOISE, 2.0)]
    factor = made.square.clone()
    for first, last in ((60, 64), (64, 100), (100, 101), (101, 120)):
        made = made.bordered(full[first:last, :last].tril(first), piece(first, last))
        given.append(given[-1].bordered(made))
    assert torch.equal(factor, made.square)
    for posterior, n in zip(given, (60, 64, 100, 101, 120), strict=True):
        c = 4 * full[:n, :n] + torch.diag(sizes[:n].square())
        torch.testing.assert_close(posterior.alpha, torch.linalg.solve(c, whole.values[:n]), rtol=1e-9, atol=1e-9)
        density = torch.distributions.MultivariateNormal(torch.zeros(n).double(), c).log_prob(whole.values[:n])
        assert posterior.negative_log_evidence == pytest.approx(-float(density), rel=1e-10)
    left = torch.tensor([i for i in range(120) if i not in (3, 61, 62, 99, 100, 119)])
    fewer = made.select(left).condition(NOISE, 2.0)
    c = 4 * full[left][:, left] + torch.diag(sizes[left].square())
    torch.testing.assert_close(fewer.alpha, torch.linalg.solve(c, whole.values[left]), rtol=1e-9, atol=1e-9)
    assert torch.equal(factor, made.square)


def test_what_is_left_out_is_predicted_by_the_others():
    made, covariance, sizes = process(300)
    given, group = made.condition(NOISE, 2.0), [3, 17, 18, 250]
    others = [i for i in range(300) if i not in group]
    c = 4 * covariance + torch.diag(sizes.square())
    cross, rest = 4 * covariance[group][:, others], torch.linalg.inv(c[others][:, others])
    errors, spread = given.left_out(group)
    torch.testing.assert_close(errors, made.values[group] - cross @ rest @ made.values[others], rtol=0, atol=1e-8)
    torch.testing.assert_close(spread, c[group][:, group] - cross @ rest @ cross.T, rtol=0, atol=1e-8)


def test_hyperparameters_are_where_the_evidence_has_no_slope():
    """To what traces from probes may be off: a few per cent."""
    made, *_ = process()
    wide = {kind: StdPrior(0.1, 1e-4, 10.0, log_width=100.0) for kind in NOISE}
    parameters = Hyperparameters(wide, [StdPrior(1.0, 1e-3, 1e3, log_width=100.0)])
    found = exact.learn(made, parameters, max_iterations=40, tolerance=1e-4)
    assert found.trace[-1][1] < found.trace[0][1] and not found.at_bound
    assert parameters.noise() == pytest.approx(NOISE, rel=0.15) and float(parameters.signal()[0]) == pytest.approx(
        2, rel=0.3
    )
    value = made.condition(parameters.noise(), float(parameters.signal()[0])).negative_log_evidence
    for factor in (0.85, 1.18):
        for kind in NOISE:
            noise = parameters.noise() | {kind: factor * parameters.noise()[kind]}
            assert made.condition(noise, float(parameters.signal()[0])).negative_log_evidence > value
        assert made.condition(parameters.noise(), factor * float(parameters.signal()[0])).negative_log_evidence > value


def test_labels_that_contradict_one_another_without_noise_are_refused():
    y, one = torch.arange(4.0).double(), torch.ones(4).double()
    twins = ExactProcess.of_covariance(torch.ones(4, 4).double(), y, {"forces": torch.arange(4)}, one, one * torch.nan)
    with pytest.raises(UserError, match="give larger ones"):
        twins.condition({"forces": 1e-12}, 1.0)


@pytest.fixture(scope="module")
def both(ethanol):
    """(fit by Cholesky, the same hyperparameters by QR), each with what it left out and what its variances were compared with."""
    fits, noise = [], {}
    original, seen = left_out.predict_left_out, []

    def spy(*arguments, **more):
        seen.append((original(*arguments, **more), arguments))
        return seen[-1][0]

    for columns in (150, "all"):
        recipe = SMALL | {"variance": {"columns": columns}, **noise}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(left_out, "predict_left_out", spy)
            potential, report = gpmlp.fit(*ethanol, Recipe.model_validate(recipe))
        fits.append((potential, report, *seen[-1]))
        signal = {k.removeprefix("0:"): v for k, v in report.signal.items()}
        noise = {
            "signal": signal,
            "noise": {"energy_per_atom": report.noise["energies"], "force": report.noise["forces"]},
        }
    return fits


def test_the_mean_is_that_of_the_fit_by_qr(both, ethanol):
    (one, by_cholesky, *_), (two, by_qr, *_) = both
    assert by_cholesky.rank == by_qr.rank and by_cholesky.centres == by_qr.centres
    assert 75 < one.variances.n_columns <= 150 and one.variances.local_blocks is not None  # centres
    assert two.variances.n_columns == two.variances.of_fit == one.variances.of_fit
    moved = ethanol[0].with_positions(ethanol[0].positions * 1.02)
    a, b = (p(moved) for p in (one, two))
    # both have some 1e-16 of the covariances, over the smallest noise
    torch.testing.assert_close(a.energies, b.energies, rtol=0, atol=1e-7)
    torch.testing.assert_close(a.forces, b.forces, rtol=0, atol=1e-7)
    assert by_cholesky.train_rmse == pytest.approx(by_qr.train_rmse, rel=1e-5)
    assert len(set(by_cholesky.signal.values())) == 3


def test_errors_of_what_is_left_out_are_those_of_the_fit_by_qr(both):
    (*_, one, arguments), (*_, two, _) = both
    assert arguments[1][0].exact is not None
    assert len(one.structures) == len(two.structures) > 5
    torch.testing.assert_close(one.prediction.energies, two.prediction.energies, rtol=0, atol=1e-6)
    # 1e-6 of the largest: products of several threads round otherwise, and move them by 1.6e-6 eV/A
    largest = float(two.prediction.forces.abs().max())
    torch.testing.assert_close(one.prediction.forces, two.prediction.forces, rtol=0, atol=1e-6 * largest)
    missed = (one.prediction.forces - one.targets.forces).nan_to_num().abs().mean()
    assert 0.02 < float(missed) < 0.5  # no residual of a fit that knows them, which is a tenth of that


def test_variances_of_centres_are_compared_with_exact_ones(both, ethanol):
    potential, report, _, arguments = both[0]
    block = arguments[1][0].exact.block
    signal = next(report.signal[f"0:{s}"] / block.relative[z] for z, s in ((1, "H"),))
    given = arguments[1][0].exact.process.condition(report.noise, signal)
    part, atoms = ethanol[0].select([7]), torch.tensor([0, 4])
    found = variance_checks._exact_covariances(arguments[1][0], given, part, atoms)
    of_all = replace(both[1][0], variances=replace(both[1][0].variances, noise={}))
    truth = of_all(part, "forces", calibrated=False, form="dtc").forces_covariance
    torch.testing.assert_close(found, truth.epistemic[atoms], rtol=1e-5, atol=1e-9)
    assert report.variance_subset["columns"] == potential.variances.n_columns
    # what centres miss is left open, and what they express has a noise of its own
    assert 0.5 < report.variance_subset["std_ratio_median"] < 10 and report.variance_subset["std_spearman"] > 0.5


@pytest.mark.parametrize("components", [1, 3])
def test_force_labels_of_different_noises_in_one_structure_go_by_qr(ethanol, components, monkeypatch):
    """Those of one noise each do not: net forces have none of it."""
    structures, targets = ethanol[0].select(range(8)), ethanol[1].select(ethanol[0], range(8))
    noise = torch.full_like(targets.forces_noise, torch.nan)
    noise[structures.structure_of_atom == 6, :components] = 0.1
    targets, seen = replace(targets, forces_noise=noise), []
    original = inducing_sets.goes_exactly
    monkeypatch.setattr(inducing_sets, "goes_exactly", lambda *a: seen.append(original(*a)) or seen[-1])
    recipe = Recipe.model_validate(SMALL | {"variance": {"columns": 60}, "calibration": False})
    potential, report = gpmlp.fit(Structures.concatenate([structures]), targets, recipe)
    assert potential.variances.n_columns <= 60 < potential.variances.of_fit == report.rank
    assert set(seen) == {components == 3} and (potential.variances.local_blocks is None) == (components < 3)


def test_noises_too_small_for_a_fit_are_refused(ethanol):
    """Of structures that are there twice, whose labels all but agree."""
    structures = Structures.concatenate([ethanol[0].select(range(8, 14))] * 2)
    targets = ethanol[1].select(ethanol[0], [*range(8, 14)] * 2)
    recipe = SMALL | {"variance": {"columns": 60}, "noise": {"energy_per_atom": 1e-8, "force": 1e-8}}
    with pytest.raises(UserError, match="is not positive definite to rounding: give larger ones"):
        gpmlp.fit(structures, targets, Recipe.model_validate(recipe))
