"""The noise of energies by leaving one out, against fits that really leave one out."""

from __future__ import annotations

import pytest
import torch

from gpmlp.gp.energy_noise import FRACTIONS, WITHIN, energy_noise
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
