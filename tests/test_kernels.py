"""Zonal kernels: profiles, gpytorch's view of them, positive definiteness."""

from __future__ import annotations

import pytest
import torch
from systems import KERNELS

from gpmlp.core.errors import UserError
from gpmlp.gp import kernels
from gpmlp.io.recipe_files import validate_recipe

S = torch.linspace(-0.95, 1.0, 41, dtype=torch.float64)


def _unit(n: int, features: int = 7, seed: int = 0) -> torch.Tensor:
    x = torch.randn(n, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True)


@pytest.fixture(params=KERNELS)
def kernel(request):
    return KERNELS[request.param]


def test_the_value_alone_is_that_of_the_profile(kernel):
    """To the last bit: whether a mean shares its kernel with a variance must not show."""
    assert torch.equal(kernel.value(S), kernel.profile(S)[0])


def test_profiles_are_derivatives_of_each_other(kernel):
    s = S.clone().requires_grad_()
    value, first, second = kernel.profile(s)
    by_autograd = torch.autograd.grad(value.sum(), s, create_graph=True)[0]
    # two formulas for numbers up to zeta (zeta - 1) = 12
    torch.testing.assert_close(first, by_autograd, atol=1e-13, rtol=1e-13)
    if by_autograd.requires_grad:
        twice = torch.autograd.grad(by_autograd.sum(), s)[0]
    else:  # zeta = 1: a constant slope
        twice = torch.zeros_like(s)
    torch.testing.assert_close(second, twice, atol=1e-12, rtol=1e-12)
    for order in range(2):
        assert torch.autograd.gradcheck(
            lambda x, o=order: kernel.profile(x)[o] + 0 * x, (S[:12].clone().requires_grad_(),)
        )


def test_a_vector_with_itself_has_covariance_one(kernel):
    assert float(kernel.profile(torch.ones(1, dtype=torch.float64))[0]) == pytest.approx(1.0, abs=1e-15)


def test_gpytorch_sees_the_same_covariance(kernel):
    x, y = _unit(5), _unit(3, seed=1)
    dense = kernel(x, y).to_dense().detach()
    torch.testing.assert_close(dense, kernel.profile(x @ y.T)[0].detach(), atol=1e-15, rtol=0)
    torch.testing.assert_close(kernel(x, diag=True).detach(), torch.ones(5).double(), atol=1e-15, rtol=0)


def test_covariance_matrices_are_positive_semidefinite(kernel):
    x = _unit(30, 5)
    values = torch.linalg.eigvalsh(kernel.profile(x @ x.T)[0])
    assert values.min() > -1e-14 * values.max() * len(x)  # rounding of eigenvalues: n eps


def test_sums_of_kernels():
    a, b = KERNELS["polynomial 2"], KERNELS["exponential"]
    both = a + b
    for order in range(3):
        expected = 0.5 * (a.profile(S)[order] + b.profile(S)[order])
        torch.testing.assert_close(both.profile(S)[order].detach(), expected, atol=1e-14, rtol=1e-14)
    weighted = kernels.SumKernel([a, b], [3.0, 1.0])
    torch.testing.assert_close(weighted.weights.detach(), torch.tensor([0.75, 0.25]).double(), atol=1e-14, rtol=0)


def test_single_precision_stays_single_precision(kernel):
    assert {v.dtype for v in kernel.profile(S.float())} == {torch.float32}


def test_choices_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match=r"`kernel.zeta` must be a whole number of 1 or more; got 0"):
        kernels.PolynomialKernel(0)
    with pytest.raises(UserError, match="`kernel.length` must be positive; got 0"):
        kernels.ExponentialKernel(0.0)
    with pytest.raises(UserError, match="`kernel.name` must be .* got 'polynomal'. Perhaps you meant 'polynomial'"):
        validate_recipe({"kernel": {"name": "polynomal"}})
