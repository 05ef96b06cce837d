"""Stages of the descriptor in isolation: weights, radial integrals, harmonics."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import scipy.special
import torch

from gpmlp.core.errors import UserError
from gpmlp.descriptors import radial
from gpmlp.descriptors.radial import NeighborWeights
from gpmlp.descriptors.spherical_harmonics import harmonics_with_gradients

WEIGHTS = {
    "smoothstep": NeighborWeights(4.0),
    "smoothstep, narrow": NeighborWeights(4.0, width=0.4),
    "smoothstep, scaled": NeighborWeights(4.0, scale=2.0, exponent=3.0),
    "poly 2": NeighborWeights(4.0, "poly"),
    "poly 1": NeighborWeights(4.0, "poly", cutoff_exponent=1.0),
    "poly 3, scaled": NeighborWeights(4.0, "poly", cutoff_exponent=3.0, scale=1.7, exponent=2.5),
    "none, scaled": NeighborWeights(4.0, "none", scale=1.5, exponent=4.0),
}


def _distances(n: int = 60, low: float = 0.0, high: float = 3.999) -> torch.Tensor:
    return torch.linspace(low, high, n, dtype=torch.float64)


@pytest.mark.parametrize("name", WEIGHTS)
def test_slope_of_the_weights(name):
    weights = WEIGHTS[name]
    r = _distances(low=0.05).requires_grad_()
    value, slope = weights(r)
    (expected,) = torch.autograd.grad(value.sum(), r)
    torch.testing.assert_close(slope, expected, atol=1e-13, rtol=1e-12)  # two formulas for the same numbers
    assert torch.autograd.gradcheck(lambda x: weights(x)[0], (_distances(23, 0.05).requires_grad_(),))


@pytest.mark.parametrize(("name", "order"), [(n, 3) for n in WEIGHTS if "smooth" in n] + [("poly 2", 4), ("poly 1", 2)])
def test_weights_vanish_at_the_cutoff_with_their_derivatives(name, order):
    """w ~ d^order at distance d inside the cutoff: C2 for order 3 and more."""
    weights = WEIGHTS[name]
    d = torch.tensor([2e-3, 1e-3], dtype=torch.float64)
    value, slope = weights(4.0 - d)
    # the next order in d is d / (shortest length in the weights, 0.4 A) of the leading one: 1 %
    assert float(value[0] / value[1]) == pytest.approx(2**order, rel=0.02)
    assert float(slope[0] / slope[1]) == pytest.approx(2 ** (order - 1), rel=0.02)
    beyond = weights(torch.tensor([4.0, 5.0], dtype=torch.float64))
    assert torch.equal(beyond[0], torch.zeros(2).double())
    assert torch.equal(beyond[1], torch.zeros(2).double())


def test_weights_at_the_centre_are_one():
    for weights in WEIGHTS.values():
        assert float(weights(torch.zeros(1, dtype=torch.float64))[0]) == 1.0


def test_weights_refuse_what_makes_no_sense():
    with pytest.raises(UserError, match="Unknown cutoff_function 'smothstep'. Perhaps you meant 'smoothstep'"):
        NeighborWeights(4.0, "smothstep")
    with pytest.raises(UserError, match="`cutoff` must be positive; got -1"):
        NeighborWeights(-1.0)
    with pytest.raises(UserError, match="radial_scaling.scale"):
        NeighborWeights(4.0, scale=0.0)


SIZES = [(8, 6, 0.5, 5.0), (12, 9, 0.25, 6.0), (3, 2, 0.8, 3.0)]


def _exact(basis: str, n: int, l: int, sigma: float, cutoff: float, monkeypatch) -> tuple:
    """The table, and the function it tabulates."""
    kept = {}

    def catch(integrals, *sizes):
        kept["integrals"] = integrals
        return spline(integrals, *sizes)

    spline = radial._spline
    monkeypatch.setattr(radial, "_spline", catch)
    made = (
        radial.gto_integrals(n, l, sigma, cutoff)
        if basis == "gto"
        else radial.optimal_integrals(n, l, sigma, cutoff, 0.9, lambda r: r)
    )
    return made, kept["integrals"]


@pytest.mark.parametrize("basis", ["gto", "optimal"])
@pytest.mark.parametrize("size", SIZES)
def test_splines_are_exact_to_1e_10_of_the_largest_integral(basis, size, monkeypatch):
    table, integrals = _exact(basis, *size, monkeypatch)
    # distances occur from 0.3 A (closer pairs are refused), and 0 itself for the central atom; within 0.02 A of the end at 0,
    # where nothing is evaluated, quintic splines lose an order (9e-10)
    r = np.append(np.random.default_rng(0).uniform(0.3, size[3], 400), 0.0)
    exact = integrals(r)
    assert np.abs(table(torch.from_numpy(r))[0].numpy() - exact).max() < 1e-10 * np.abs(exact).max()


@pytest.mark.parametrize("basis", ["gto", "optimal"])
def test_slope_of_the_splines(basis, monkeypatch):
    table, _ = _exact(basis, 4, 3, 0.4, 4.0, monkeypatch)
    r = _distances(50, 0.01, 3.98).requires_grad_()
    value, slope = table(r)
    probe = torch.linspace(-1, 1, value[0].numel(), dtype=torch.float64).reshape(value[0].shape)
    (expected,) = torch.autograd.grad((value * probe).sum(), r)
    found = (slope * probe).sum((1, 2))
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)  # rounding of values up to 10
    assert torch.autograd.gradcheck(lambda x: table(x)[0], (_distances(9, 0.3, 3.9).requires_grad_(),))
    # continuous across the joints of the spline: value and slope from both sides of each
    joints = torch.arange(1, 20, dtype=torch.float64) * table.step
    for left, right in zip(table(joints - 1e-12), table(joints + 1e-12), strict=True):
        torch.testing.assert_close(left, right, atol=1e-9, rtol=0)  # slopes change by 1e-12 x curvature, below 1e-10


def test_gto_integrals_are_those_of_quadrature():
    """One Gaussian on the z axis: c_nlm is zero for m > 0 and I_nl(r) Y_l0 for m = 0."""
    sigma, cutoff, r = 0.6, 3.5, 1.7
    table = radial.gto_integrals(3, 2, sigma, cutoff)
    found = table(torch.tensor([r], dtype=torch.float64))[0][0].numpy()
    expected = oracles.gto_coefficients(np.array([[0, 0, r]]), np.ones(1), 3, 2, sigma, cutoff)
    for l in range(3):
        y = np.sqrt((2 * l + 1) / (4 * np.pi))
        # Gauss-Legendre converges beyond rounding here; 1e-9 is the splines' 1e-10 times the Loewdin matrix of order 10
        np.testing.assert_allclose(found[:, l] * y, expected[:, l * l + l], atol=1e-9)
        np.testing.assert_allclose(np.delete(expected[:, l * l : (l + 1) ** 2], l, axis=1), 0, atol=1e-12)


@pytest.mark.parametrize("l", [0, 1, 4])
def test_complete_basis_overlap_is_the_angular_average(l):
    r, s, sigma = np.array([0.0, 0.7, 2.1, 4.9]), np.array([1.3, 3.3]), 0.45
    found = radial._overlap(r, s, l, sigma)
    expected = [[oracles.gaussian_overlap(a, b, l, sigma) for b in s] for a in r]
    # 80-point Gauss-Legendre of a function with e-folding width 2 sigma^2/(r s) >= 0.02 in u: rounding only
    np.testing.assert_allclose(found, expected, atol=1e-11 * found.max())


def test_optimal_basis_converges_to_the_complete_one():
    """sum_n I_nl(r) I_nl(s) -> C_l(r, s) as n grows, for distances where the measure is not zero."""
    sigma, cutoff, shortest = 0.4, 4.0, 1.0
    r = torch.linspace(1.05, 3.95, 12, dtype=torch.float64)
    errors = []
    for n in (4, 8, 12, 20):
        table = radial.optimal_integrals(n, 4, sigma, cutoff, shortest, lambda x: x)
        values = table(r)[0].numpy()
        error = 0.0
        for l in range(5):
            exact = radial._overlap(r.numpy(), r.numpy(), l, sigma)
            error = max(error, np.abs(values[:, :, l] @ values[:, :, l].T - exact).max() / exact.max())
        errors.append(error)
    # eigenvalues of a Gaussian kernel fall faster than exponentially; those below 1e-11 of the largest are cut off on purpose,
    # which leaves up to about the root of n x 1e-11 x (density of nodes) pointwise
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-8


def test_optimal_basis_is_orthogonal_and_ordered():
    """int I_nl I_n'l dmu is diagonal with falling entries: each function keeps the most of what those before it left."""
    sigma, cutoff, shortest = 0.4, 4.0, 1.0
    table = radial.optimal_integrals(6, 3, sigma, cutoff, shortest, lambda x: np.exp(-x))
    nodes, weights = np.polynomial.legendre.leggauss(150)
    r = shortest + (cutoff - shortest) * (nodes + 1) / 2
    measure = weights * (cutoff - shortest) / 2 * np.exp(-r)
    values = table(torch.from_numpy(r))[0].numpy()
    for l in range(4):
        gram = (values[:, :, l] * measure[:, None]).T @ values[:, :, l]
        off = gram - np.diag(np.diag(gram))
        assert np.abs(off).max() < 1e-9 * gram[0, 0]  # the splines' error
        assert (np.diff(np.diag(gram)) < 0).all()


def test_radial_tables_are_shared_and_refuse_unknown_names():
    weights = NeighborWeights(4.0)
    first = radial.tabulate_integrals("optimal", 3, 2, 0.5, 4.0, 1.0, weights)
    assert radial.tabulate_integrals("optimal", 3, 2, 0.5, 4.0, 1.0, NeighborWeights(4.0)) is first
    with pytest.raises(UserError, match="Unknown radial basis 'gtos'. Perhaps you meant 'gto'"):
        radial.tabulate_integrals("gtos", 3, 2, 0.5, 4.0, 1.0, weights)
    with pytest.raises(UserError, match="gto basis needs a cutoff above 1 A; got 0.9"):
        radial.gto_integrals(3, 2, 0.5, 0.9)


def test_harmonics_are_real_spherical_harmonics_with_their_gradients():
    vectors = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y, dy = harmonics_with_gradients(4, vectors)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    for l in range(5):  # addition theorem: independent of the order and signs of m
        block = slice(l * l, (l + 1) ** 2)
        expected = (2 * l + 1) / (4 * np.pi) * scipy.special.eval_legendre(l, (unit @ unit.T).numpy())
        np.testing.assert_allclose((y[:, block] @ y[:, block].T).numpy(), expected, atol=1e-13)
    step = 1e-5  # error step^2 f'''/6: 1e-10 x 4^3 / shortest^3, below 1e-7 here
    for axis in range(3):
        shift = torch.zeros(3, dtype=torch.float64)
        shift[axis] = step
        slope = (harmonics_with_gradients(4, vectors + shift)[0] - harmonics_with_gradients(4, vectors - shift)[0]) / (
            2 * step
        )
        torch.testing.assert_close(dy[:, axis], slope, atol=1e-7, rtol=0)
    empty, d_empty = harmonics_with_gradients(2, vectors[:0])
    assert empty.shape == (0, 9)
    assert d_empty.shape == (0, 3, 9)
