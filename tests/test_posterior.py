"""Streaming QR, whitening, the solve, and the optimisation of the evidence, on plain matrices."""

from __future__ import annotations

import math

import pytest
import torch

from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.gp import evidence, inducing, posterior
from gpmlp.gp.evidence import SufficientStatistics
from gpmlp.gp.likelihood import NOISE_PRIORS, SIGNAL_PRIOR, Hyperparameters, StdPrior, observed_labels
from gpmlp.gp.qr import RowFactor

N, COLUMNS = 230, 17


def _data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(N, COLUMNS, generator=generator, dtype=torch.float64)
    return rows, torch.randn(N, generator=generator, dtype=torch.float64)


def _streamed(chunk: int, buffer_rows: int) -> RowFactor:
    rows, values = _data()
    factor = RowFactor(COLUMNS, buffer_rows)
    for r, v in zip(rows.split(chunk), values.split(chunk), strict=True):
        factor.add(r, v)
    return factor


@pytest.mark.parametrize("chunk", [1, 7, 64, N])
@pytest.mark.parametrize("buffer_rows", [1, 34, 10_000])
def test_streamed_factors_are_the_one_shot_factor(chunk, buffer_rows):
    """RᵀR = AᵀA whatever the chunks; R itself is unique up to the signs of its rows."""
    rows, values = _data()
    factor = _streamed(chunk, buffer_rows)
    assert factor.count == N
    found = factor.factor()
    assert found.shape[0] <= max(COLUMNS + 1, buffer_rows)
    once = torch.linalg.qr(torch.cat([rows, values[:, None]], dim=1), mode="r").R
    # backward error of each of up to N QRs is eps x |A|, |A| ~ 15
    torch.testing.assert_close(found.T @ found, once.T @ once, atol=1e-10, rtol=0)
    signs = found.diagonal().sign() * once.diagonal().sign()
    torch.testing.assert_close(found * signs[:, None], once, atol=1e-10, rtol=0)


def test_memory_of_a_factor_does_not_grow_with_the_rows():
    factor = RowFactor(COLUMNS, 2 * COLUMNS)
    largest = 0
    for seed in range(20):
        rows, values = _data(seed)
        for r, v in zip(rows.split(5), values.split(5), strict=True):
            factor.add(r, v)
            largest = max(largest, sum(p.shape[0] for p in factor._parts))
    assert largest < 2 * COLUMNS + (COLUMNS + 1) + 5
    assert factor.count == 20 * N


def test_few_rows_are_kept_as_they_are_and_none_is_an_empty_factor():
    rows, values = _data()
    factor = RowFactor(COLUMNS, 100)
    assert factor.factor().shape == (0, COLUMNS + 1)
    factor.add(rows[:0], values[:0])
    assert factor.count == 0
    factor.add(rows[:3], values[:3])
    assert torch.equal(factor.factor(), torch.cat([rows[:3], values[:3, None]], dim=1))


def test_a_factor_of_dependent_columns_still_has_the_right_gram_matrix():
    rows, values = _data()
    rows = torch.cat([rows, rows[:, :4]], dim=1)  # rank deficient
    factor = RowFactor(rows.shape[1], 30)
    for r, v in zip(rows.split(11), values.split(11), strict=True):
        factor.add(r, v)
    found = factor.factor()
    torch.testing.assert_close(found[:, :-1].T @ found[:, :-1], rows.T @ rows, atol=1e-10, rtol=0)
    torch.testing.assert_close(found[:, :-1].T @ found[:, -1], rows.T @ values, atol=1e-10, rtol=0)


@pytest.fixture(scope="module")
def model():
    """Two kinds of observation of two blocks of inducing variables, and the dense covariance they amount to."""
    generator = torch.Generator().manual_seed(3)
    widths = (10, 7)
    lowers, k_uu = [], []
    for width in widths:
        a = torch.randn(width, width, generator=generator, dtype=torch.float64)
        k_uu.append(a @ a.T + width * torch.eye(width, dtype=torch.float64))
        lowers.append(torch.linalg.cholesky(k_uu[-1]))
    signal = torch.repeat_interleave(torch.tensor([1.4, 0.6], dtype=torch.float64), torch.tensor(widths))
    rows, values = _data()
    parts = {"energies": (rows[:40], values[:40], 0.3), "forces": (rows[40:], values[40:], 0.8)}
    whitened = {k: inducing.whiten_rows(torch.cat([r, y[:, None]], dim=1), lowers) for k, (r, y, _) in parts.items()}
    counts = {k: len(y) for k, (_, y, _) in parts.items()}
    noise = {k: s for k, (_, _, s) in parts.items()}
    prior = torch.block_diag(*k_uu)
    return parts, prior, lowers, signal, whitened, counts, noise


def _dense(model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weights, covariance of the observations, the observations): w = D² K⁻¹ ... written with dense matrices only."""
    parts, prior, _, signal, *_ = model
    rows = torch.cat([r for r, _, _ in parts.values()])
    y = torch.cat([y for _, y, _ in parts.values()])
    sigma = torch.cat([torch.full_like(v, s) for _, v, s in parts.values()])
    scaled = rows * signal  # signal² k_ou K_uu^-1 k_uo, block by block
    q = scaled @ torch.linalg.solve(prior, scaled.T)
    covariance = q + torch.diag(sigma**2)
    weights = torch.linalg.solve(prior, signal * (scaled.T @ torch.linalg.solve(covariance, y)))
    return weights, covariance, y


def test_the_solve_is_the_dense_dtc_mean(model):
    parts, prior, lowers, signal, whitened, counts, noise = model
    solved = posterior.solve_posterior(whitened, counts, noise, signal, lowers)
    weights, covariance, y = _dense(model)
    # condition of the covariance: about 1e3
    torch.testing.assert_close(solved.weights, weights, atol=1e-11, rtol=0)
    for kind, (rows, values, _) in parts.items():
        residual = values - rows @ solved.weights
        assert solved.rms[kind] == pytest.approx(float(residual.square().mean().sqrt()), rel=1e-10)
    inverse = torch.linalg.inv(torch.block_diag(*lowers))
    whole = torch.eye(COLUMNS, dtype=torch.float64)
    for rows, _, sigma in parts.values():
        a = rows @ inverse.T * signal / sigma
        whole = whole + a.T @ a
    torch.testing.assert_close(solved.factor.T @ solved.factor, whole, atol=1e-9, rtol=1e-12)
    assert solved.condition >= 1


def test_the_solve_does_not_depend_on_how_rows_were_folded(model):
    parts, _, lowers, signal, whitened, counts, noise = model
    folded = {}
    for kind, (rows, values, _) in parts.items():
        factor = RowFactor(COLUMNS, 20)
        for r, v in zip(rows.split(9), values.split(9), strict=True):
            factor.add(r, v)
        folded[kind] = inducing.whiten_rows(factor.factor(), lowers)
    a, b = (posterior.solve_posterior(w, counts, noise, signal, lowers) for w in (whitened, folded))
    torch.testing.assert_close(a.weights, b.weights, atol=1e-11, rtol=0)
    assert a.rms == pytest.approx(b.rms, rel=1e-10)


def test_the_evidence_is_the_dense_log_density(model):
    _, _, _, _, whitened, counts, noise = model
    block_of_column = torch.repeat_interleave(torch.arange(2), torch.tensor((10, 7)))
    signal = torch.tensor([1.4, 0.6], dtype=torch.float64)
    statistics = {k: SufficientStatistics.from_factor(w, counts[k]) for k, w in whitened.items()}
    value, _, _ = evidence.negative_log_evidence(statistics, noise, signal, block_of_column)
    _, covariance, y = _dense(model)
    density = torch.distributions.MultivariateNormal(torch.zeros(N, dtype=torch.float64), covariance)
    assert value == pytest.approx(-float(density.log_prob(y)), rel=1e-11)
    some = torch.tensor([0, 1, 2, 12])
    part = {k: SufficientStatistics.from_factor(w, counts[k], some) for k, w in whitened.items()}
    restricted = {k: torch.cat([w[:, some], w[:, -1:]], dim=1) for k, w in whitened.items()}
    whole = {k: SufficientStatistics.from_factor(w, counts[k]) for k, w in restricted.items()}
    both = [evidence.negative_log_evidence(s, noise, signal, block_of_column[some])[0] for s in (part, whole)]
    assert both[0] == pytest.approx(both[1], rel=1e-13)


def test_the_optimum_has_no_slope_and_given_noises_stay(model):
    _, _, _, _, whitened, counts, _ = model
    block_of_column = torch.repeat_interleave(torch.arange(2), torch.tensor((10, 7)))
    statistics = {k: SufficientStatistics.from_factor(w, counts[k]) for k, w in whitened.items()}
    parameters = Hyperparameters(
        {"energies": StdPrior.fixed_at(0.25), "forces": NOISE_PRIORS["forces"]}, [SIGNAL_PRIOR] * 2
    )
    seen = []
    result = evidence.maximise_evidence(
        statistics, parameters, block_of_column, 200, lambda calls, value: seen.append(value)
    )
    noise = parameters.noise()
    assert noise["energies"] == pytest.approx(0.25, rel=1e-13)
    value, d_noise, d_signal = evidence.negative_log_evidence(statistics, noise, parameters.signal(), block_of_column)
    slope = d_noise["forces"] - float(parameters.log_prior("forces")[1][0])
    # L-BFGS stops when the value changes by less than 1e-10 of itself: slope ~ sqrt(1e-10 x value x curvature) ~ 2e-3 x 1e2
    assert abs(slope) < 0.05
    d_signal = d_signal - parameters.log_prior("signal")[1]
    inside = {0, 1} - {at.index for at in result.at_bound if at.name == "signal"}
    assert all(abs(float(d_signal[k])) < 0.05 for k in inside)
    assert len(seen) == result.evaluations
    assert min(seen) == pytest.approx(result.negative_log_evidence, rel=1e-12)


def test_noise_free_labels_are_reported_at_the_bound():
    """Exactly linear data: the noise runs down to its bound, and this is said."""
    rows, _ = _data()
    truth = torch.linspace(-1, 1, COLUMNS, dtype=torch.float64)
    statistics = {"energies": SufficientStatistics.from_factor(torch.cat([rows, (rows @ truth)[:, None]], dim=1), N)}
    parameters = Hyperparameters({"energies": NOISE_PRIORS["energies"]}, [SIGNAL_PRIOR])
    result = evidence.maximise_evidence(statistics, parameters, torch.zeros(COLUMNS, dtype=torch.long), 200)
    assert evidence.AtBound("energies", 0, "lower") in result.at_bound
    assert parameters.noise()["energies"] == pytest.approx(NOISE_PRIORS["energies"].low, rel=1e-2)


def test_hyperparameters_keep_their_bounds_and_priors():
    parameters = Hyperparameters(NOISE_PRIORS, [SIGNAL_PRIOR] * 3)
    assert parameters.signal().tolist() == pytest.approx([1.0] * 3)
    for kind in parameters.kinds:
        prior = NOISE_PRIORS[kind]
        assert parameters.noise()[kind] == pytest.approx(prior.median, rel=1e-12)
        assert torch.cat(parameters.bounds(kind)).tolist() == pytest.approx([math.log(prior.low), math.log(prior.high)])
        value, gradient = parameters.log_prior(kind)
        assert float(gradient) == pytest.approx(0.0, abs=1e-10)  # the prior's mode is where it starts
        parameters.set(kind, torch.tensor([math.log(prior.high) + 5]))
        assert parameters.noise()[kind] == pytest.approx(prior.high, rel=1e-4)
        assert parameters.log_prior(kind)[0] < value
    parameters.set("signal", torch.full((3,), 99.0))
    assert float(parameters.signal().max()) == pytest.approx(SIGNAL_PRIOR.high, rel=1e-4)
    with pytest.raises(UserError, match="`a given standard deviation` must be positive; got -0.1"):
        StdPrior.fixed_at(-0.1)


def test_observations_drop_unknown_labels_only():
    structures = Structures(
        torch.zeros(3, 3, dtype=torch.float64),
        torch.eye(3, dtype=torch.float64).repeat(2, 1, 1) * 5,
        torch.ones(2, 3, dtype=torch.bool),
        torch.tensor([6, 6, 8]),
        torch.tensor([0, 0, 1]),
    )
    targets = Targets.unlabelled(structures)
    targets.energies[0] = 4.0
    targets.forces[1, 2] = 0.5
    targets.stresses[1] = torch.arange(9.0).reshape(3, 3)
    targets.energies_noise[0] = 0.01
    found = observed_labels(targets, structures.counts)
    assert found["energies"].rows.tolist() == [0]
    assert found["energies"].values.tolist() == [2.0]  # per atom
    assert found["energies"].scale.tolist() == [0.5]
    assert found["energies"].noise.tolist() == [0.01]
    assert found["forces"].rows.tolist() == [5]
    assert found["forces"].noise.isnan().all()
    assert found["stresses"].rows.tolist() == [6, 7, 8, 9, 10, 11]
    assert found["stresses"].values.tolist() == [0, 4, 8, 5, 2, 1]
