"""The noise of energies by leaving one out, against fits that really leave one out."""

from __future__ import annotations

import pytest
import torch

from gpmlp.gp import energy_noise as module
from gpmlp.gp import energy_scale
from gpmlp.gp.energy_noise import FRACTIONS, WITHIN, LeftOutEnergies, energy_noise
from gpmlp.gp.qr import RowFactor

NOISE = {"energies": 0.3, "forces": 0.2}


def problem(n: int, columns: int = 6, shared: float = 0.0):
    """Energies and forces that follow a linear model, energies with noise 0.05, and a misfit that forces and energies share."""
    generator = torch.Generator().manual_seed(n)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    truth = draw(columns)
    energies, forces = draw(n, columns), draw(40, columns)
    y = energies @ truth + 0.05 * draw(n)
    f = forces @ (truth + shared * draw(columns)) + 0.2 * draw(40)
    return {"energies": torch.cat([energies, y[:, None]], 1), "forces": torch.cat([forces, f[:, None]], 1)}


def solve(rows: dict[str, torch.Tensor], noise: dict[str, float], signal: torch.Tensor) -> torch.Tensor:
    """Weights of the linear model with prior N(0, signal^2)."""
    system = torch.diag(signal**-2)
    right = torch.zeros_like(signal)
    for kind, r in rows.items():
        system = system + r[:, :-1].T @ r[:, :-1] / noise[kind] ** 2
        right = right + r[:, :-1].T @ r[:, -1] / noise[kind] ** 2
    return torch.linalg.solve(system, right)


@pytest.mark.parametrize("shared", [0.0, 0.3])
def test_against_fits_without_each_energy(shared):
    rows, signal = problem(12, shared=shared), torch.linspace(0.5, 2.0, 6, dtype=torch.float64)
    errors = []
    for fraction in FRACTIONS:
        noise = NOISE | {"energies": fraction * NOISE["energies"]}
        left_out = []
        for i in range(12):
            others = rows["energies"][torch.arange(12) != i]
            w = solve({"energies": others, "forces": rows["forces"]}, noise, signal)
            left_out.append(float(rows["energies"][i, :-1] @ w - rows["energies"][i, -1]))
        errors.append(torch.tensor(left_out).square().mean().sqrt().item())
    expected = next(f for f, e in zip(FRACTIONS, errors, strict=True) if e <= WITHIN * min(errors)) * NOISE["energies"]
    assert energy_noise(rows, 12, NOISE, signal) == pytest.approx(expected, rel=1e-12)
    assert min(errors) < 0.99 * max(errors)  # there was something to choose


def test_a_folded_factor_tells_the_same_as_its_rows():
    """Generalised cross-validation sees rotations of the rows as nothing, so the factor of 50 energies is as good as they are."""
    rows, signal = problem(50, shared=0.3), torch.ones(6, dtype=torch.float64)
    fold = RowFactor(6, 20)
    fold.add(rows["energies"][:, :-1], rows["energies"][:, -1])
    factor = fold.factor()
    assert len(factor) == 7
    # the errors of generalised cross-validation from all rows
    errors = []
    for fraction in FRACTIONS:
        sigma = fraction * NOISE["energies"]
        prior = torch.linalg.inv(torch.eye(6) + rows["forces"][:, :-1].T @ rows["forces"][:, :-1] / 0.04)
        a, y = rows["energies"][:, :-1], rows["energies"][:, -1]
        mean = prior @ rows["forces"][:, :-1].T @ rows["forces"][:, -1] / 0.04
        q = torch.linalg.inv(a @ prior @ a.T + sigma**2 * torch.eye(50, dtype=torch.float64))
        errors.append(float((q @ (y - a @ mean)).square().mean().sqrt() / (q.trace() / 50)))
    expected = next(f for f, e in zip(FRACTIONS, errors, strict=True) if e <= WITHIN * min(errors)) * NOISE["energies"]
    assert energy_noise(rows | {"energies": factor}, 50, NOISE, signal) == pytest.approx(expected, rel=1e-12)


def test_true_noise_is_kept_where_the_model_is_right():
    rows, signal = problem(60), torch.ones(6, dtype=torch.float64)
    assert energy_noise(rows, 60, NOISE | {"energies": 0.05}, signal) == pytest.approx(0.05)


def fits_without(rows, groups, noise, signal) -> torch.Tensor:
    """Errors of the first energy of each group in fits that leave the group out."""
    out = []
    for group in groups:
        others = torch.ones(len(rows["energies"]), dtype=torch.bool)
        others[group] = False
        w = solve(rows | {"energies": rows["energies"][others]}, noise, signal)
        out.append(float(rows["energies"][group[0], :-1] @ w - rows["energies"][group[0], -1]))
    return torch.tensor(out, dtype=torch.float64)


def with_twins(rows: dict, by: float = 1e-4) -> dict:
    """Each energy twice, almost."""
    moved = rows["energies"] + by * torch.randn(rows["energies"].shape, generator=torch.Generator().manual_seed(1))
    return rows | {"energies": torch.cat([rows["energies"], moved.double()])}


def test_against_fits_without_each_group():
    """Groups of several sizes, which overlap; the noise is that of the least error of these fits."""
    rows, signal = problem(14, columns=40, shared=0.3), torch.ones(40, dtype=torch.float64)
    groups = [[0], [1, 2], [2, 1], [3, 4, 5], *[[i] for i in range(6, 14)]]
    left_out = LeftOutEnergies(tuple(torch.tensor(g) for g in groups), ("",) * len(groups))
    errors = []
    for fraction in FRACTIONS:
        noise = NOISE | {"energies": fraction * NOISE["energies"]}
        errors.append(float(fits_without(rows, groups, noise, signal).square().mean().sqrt()))
    expected = next(f for f, e in zip(FRACTIONS, errors, strict=True) if e <= WITHIN * min(errors)) * NOISE["energies"]
    assert energy_noise(rows, 14, NOISE, signal, left_out) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("columns", [6, 80], ids=["factor", "rows"])
def test_twins_change_next_to_nothing(columns):
    """The noise chosen from energies that all have twins is that without; blind to them it is the smallest there is."""
    once = problem(30, columns, shared=0.3)
    twice, signal = with_twins(once), torch.ones(columns, dtype=torch.float64)
    if columns < 30:
        fold = RowFactor(columns, 20)
        fold.add(twice["energies"][:, :-1], twice["energies"][:, -1])
        twice |= {"energies": fold.factor()}
    pairs = LeftOutEnergies(tuple(torch.tensor([i, i + 30]) for i in range(30)), ("",) * 30)
    alone, known = energy_noise(once, 30, NOISE, signal), energy_noise(twice, 60, NOISE, signal, pairs)
    assert alone / 2.1 < known < 2.1 * alone
    if columns > 30:
        assert energy_noise(twice, 60, NOISE, signal) < 0.1 * known


def test_a_noise_that_the_evidence_cannot_tell_is_chosen_by_leave_one_out():
    """More columns than energies, which they follow exactly: whatever tiny noise the evidence has, the choice is the same."""
    rows, signal = problem(20, columns=80), torch.ones(80, dtype=torch.float64)
    found = [energy_noise(rows, 20, NOISE | {"energies": tiny}, signal) for tiny in (1e-7, 1e-5)]
    assert found[0] == pytest.approx(found[1], rel=1e-2) and found[0] > 1e-2
    folded, few = RowFactor(6, 20), problem(50)
    folded.add(few["energies"][:, :-1], few["energies"][:, -1])
    groups = LeftOutEnergies(
        tuple(torch.arange(50).split(10)), ("",) * 5
    )  # five groups cannot determine six parameters
    noise = energy_noise(
        few | {"energies": folded.factor()}, 50, NOISE | {"energies": 1e-6}, torch.ones(6).double(), groups
    )
    assert 1e-3 < noise < 10.0


def test_every_config_type_counts(monkeypatch):
    """One kind of energy is off by far more than the others' error: pooled, it alone decides, and the others are hardly learned."""
    rows, signal = problem(60, columns=10, shared=0.3), torch.ones(10, dtype=torch.float64)
    rows["energies"][:6, -1] += 10.0 * torch.randn(6, generator=torch.Generator().manual_seed(0)).double()
    alone, noise = tuple(torch.arange(60).split(1)), NOISE | {"energies": 3.0}
    kinds = ("surface",) * 6 + ("bulk",) * 54

    def chosen(labels):
        return energy_noise(rows, 60, noise, signal, LeftOutEnergies(alone, labels))

    def residual(sigma):
        weights = solve(rows, noise | {"energies": sigma}, signal)
        return float((rows["forces"][:, :-1] @ weights - rows["forces"][:, -1]).norm())

    pooled, followed = chosen(("",) * 60), chosen(kinds)
    assert residual(followed) <= module.FORCES * residual(pooled) < residual(followed / 2)  # as far as forces allow
    monkeypatch.setattr(module, "FORCES", 10.0)
    assert chosen(kinds) < 0.6 * pooled and residual(chosen(kinds)) <= 10 * residual(pooled)


def test_the_typical_error():
    """Each config_type by the logarithm of its error, those of one or two energies together."""
    errors = torch.tensor([3.0, 4.0, 0.03, 0.04, 0.05, 7.0], dtype=torch.float64)
    some = LeftOutEnergies(tuple(torch.arange(6).split(1)), ("a", "a", "b", "b", "b", "c"))
    first, second = (float(errors[i].square().mean().sqrt()) for i in ([0, 1, 5], [2, 3, 4]))
    assert some.typical_error(errors) == pytest.approx((first * second) ** 0.5)
    one = LeftOutEnergies(tuple(torch.arange(6).split(1)), ("",) * 6)
    assert one.typical_error(errors) == pytest.approx(float(errors.square().mean().sqrt()))


def test_scale_of_energies_is_that_of_the_dense_likelihood():
    """By the joint density of whitened rows, which for each s is log N(y; s A b, s² A C Aᵀ + σ²) with σ of the same grid."""
    generator = torch.Generator().manual_seed(0)
    columns, n, noise, truth = 6, 40, 0.1, 1.9
    signal = torch.rand(columns, dtype=torch.float64, generator=generator) + 0.5
    rows, slopes = (torch.randn(m, columns, dtype=torch.float64, generator=generator) for m in (n, 8))
    beta = torch.randn(columns, dtype=torch.float64, generator=generator)
    y = truth * (rows * signal) @ beta + 0.01 * torch.randn(n, dtype=torch.float64, generator=generator)
    f = (slopes * signal) @ beta + noise * torch.randn(8, dtype=torch.float64, generator=generator)
    energies, forces = torch.cat([rows, y[:, None]], 1), torch.cat([slopes, f[:, None]], 1)
    small = torch.linalg.qr(energies, mode="r").R
    found = energy_scale.energy_scale(small, forces, n, noise, signal)
    a = slopes * signal / noise
    precision = torch.eye(columns, dtype=torch.float64) + a.T @ a
    mean = torch.linalg.solve(precision, a.T @ (f / noise))
    whole = rows * signal

    def best(s: float) -> float:
        mu, c = s * whole @ mean, s**2 * whole @ torch.linalg.solve(precision, whole.T)
        sigmas = energy_scale.NOISES * y.square().mean().sqrt()
        eye = torch.eye(n, dtype=torch.float64)
        return max(
            float(torch.distributions.MultivariateNormal(mu, c + t**2 * eye).log_prob(y)) for t in sigmas.tolist()
        )

    assert found.factor == pytest.approx(truth, rel=0.1)
    assert found.gain == pytest.approx(best(found.factor) - best(1.0), rel=1e-6)
    assert found.gain > 20 and found.noise < found.noise_at_one
