"""Means that collapse to a quadratic form against the sum over centres, and products done in portions against those done at once."""

from __future__ import annotations

import pytest
import torch
from systems import low_rank_form, projected_centres

from gpmlp.gp import kernels
from gpmlp.potential import mean as terms
from gpmlp.potential.mean import ROWS, LowRankForm, MeanBlock

QUADRATIC = {
    "zeta 1": kernels.PolynomialKernel(1),
    "zeta 2": kernels.PolynomialKernel(2),
    "sum": kernels.SumKernel([kernels.PolynomialKernel(1), kernels.PolynomialKernel(2)], [0.3, 0.7]),
}


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=-1)


def block(centres: int, features: int, tangents: bool) -> MeanBlock:
    """With weights that cancel, as those of fits do."""
    weights = 1e3 * torch.randn(centres, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return MeanBlock(unit(centres, features), weights, 50 * unit(centres if tangents else 0, features, seed=2))


@pytest.mark.parametrize("tangents", [False, True], ids=["values", "gradients"])
@pytest.mark.parametrize("name", QUADRATIC)
def test_collapsed_is_the_sum_over_centres(name, tangents):
    mean, kernel, x = block(60, 20, tangents), QUADRATIC[name], unit(150, 20, seed=3)
    energy, slope = mean.quadratic_form(kernel)(x)
    expected, steep = mean(kernel, x)
    torch.testing.assert_close(energy, expected, rtol=1e-11, atol=1e-10)
    torch.testing.assert_close(slope, steep, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_directions_are_the_exact_form(dtype):
    """And one less is not; energies are those whose slopes these are."""
    mean, kernel, x = block(60, 20, True), QUADRATIC["sum"], unit(150, 20, seed=3)
    exact = mean.quadratic_form(kernel)
    whole, less = (
        LowRankForm(*(v.to(dtype) for v in vars(low_rank_form(mean, kernel, rank)).values())) for rank in (20, 19)
    )
    close = {"rtol": 1e-11, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-2}
    for found, expected in zip(whole(x.to(dtype)), exact(x), strict=True):
        torch.testing.assert_close(found.double(), expected, **close)
    energy, slope = less(x.to(dtype))
    assert float((slope.double() - exact(x)[1]).abs().max()) > 1e-2
    x.requires_grad_(True)
    if dtype == torch.float64:
        (derivative,) = torch.autograd.grad(less(x)[0].sum(), x)
        torch.testing.assert_close(slope, derivative, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("tangents", [False, True], ids=["values", "gradients"])
@pytest.mark.parametrize("kernel", [kernels.PolynomialKernel(4), kernels.ExponentialKernel(0.6)])
def test_projected_centres(kernel, tangents):
    """In all directions the sum over centres, with a linear function added; in fewer one with these slopes."""
    mean, x = block(60, 20, tangents), unit(150, 20, seed=3)
    whole = projected_centres(mean, kernel, 20)
    energy, slope = whole(x)
    expected, steep = mean(kernel, x)
    torch.testing.assert_close(energy, expected + x @ whole.linear + whole.constant, rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(slope, steep + whole.linear, rtol=1e-9, atol=1e-8)
    less = projected_centres(mean, kernel, 7)
    x = (1.3 * x).requires_grad_(True)  # of any length
    energy, slope = less(x)
    assert float((slope - mean(kernel, x)[1]).detach().abs().max()) > 1.0 and less.rank == 7
    assert less.products == mean.products * 7 // 20 + 2 * 7 * 20
    torch.testing.assert_close(slope, torch.autograd.grad(energy.sum(), x)[0], rtol=1e-10, atol=1e-9)


def test_collapsed_only_where_it_is_exact_and_cheaper():
    assert block(60, 20, False).cheaper_form(kernels.PolynomialKernel(4)) is None
    assert (
        block(60, 20, False).cheaper_form(
            kernels.SumKernel([QUADRATIC["zeta 2"], kernels.ExponentialKernel(0.5)], [1, 1])
        )
        is None
    )
    assert block(10, 20, False).cheaper_form(QUADRATIC["zeta 2"]) is None  # 2 D² = 4 M D
    assert block(11, 20, False).cheaper_form(QUADRATIC["zeta 2"]) is not None
    assert block(5, 20, True).cheaper_form(QUADRATIC["zeta 2"]) is None and block(6, 20, True).cheaper_form(
        QUADRATIC["zeta 2"]
    )


@pytest.mark.parametrize("tangents", [False, True], ids=["values", "gradients"])
def test_portions_and_a_known_kernel_change_nothing(tangents, monkeypatch):
    """To the last bit: else dynamics would depend on which variances were asked for on the way."""
    monkeypatch.setattr(terms, "PRODUCTS", 1)  # three times ROWS environments and less, else all at once
    mean, kernel, x = block(30, 20, tangents), kernels.PolynomialKernel(4), unit(2 * ROWS + 7, 20, seed=3)
    energy, slope = mean(kernel, x)
    again, steep = mean(kernel, x, mean.profile(kernel, x))
    assert torch.equal(energy, again) and torch.equal(slope, steep)
    parts = [mean(kernel, some) for some in x.split(13)]
    torch.testing.assert_close(torch.cat([e for e, _ in parts]), energy, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(torch.cat([s for _, s in parts]), slope, rtol=1e-12, atol=1e-10)
