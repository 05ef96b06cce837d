"""Every registered descriptor: unit features, invariances, derivatives; and SOAP against two brute-force definitions."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from systems import CUTOFF, DESCRIPTORS, cluster, crystal, descriptor, everything, structure

from gpmlp import descriptors
from gpmlp.core import neighbors
from gpmlp.core.environments import Surroundings
from gpmlp.core.errors import UserError

SOAPS = [name for name in DESCRIPTORS if name.startswith("soap")]
# features are of order 1; their Jacobians too. Fourth-order differences with h = 1e-3 A: h^4 f'''''/30 ~ 1e-12 x (1/0.5 A)^5 / 30
# plus rounding 1e-16/h: 1e-12. dscribe's own numerical derivatives add as much again.
STEP, DIFFERENCE = 1e-3, 1e-9


def _surroundings() -> Surroundings:
    batch = everything()
    whole = Surroundings.from_structures(batch, neighbors.find_neighbors(batch, CUTOFF))
    return whole.select([0, 2, 5, 7, 11, batch.n_atoms - 1])


@pytest.fixture(scope="module", params=DESCRIPTORS)
def case(request):
    surroundings = _surroundings()
    made = descriptor(request.param)
    return made, surroundings, made(surroundings)


def test_features_are_unit_vectors_of_the_promised_length(case):
    made, surroundings, environments = case
    assert environments.features.shape == (len(surroundings), made.n_features)
    torch.testing.assert_close(
        environments.features.norm(dim=1), torch.ones(len(surroundings)).double(), atol=1e-14, rtol=0
    )
    assert len(environments) == len(surroundings)
    assert torch.equal(environments.species, surroundings.species)


def test_equal_parameters_give_equal_features(case, request):
    made, surroundings, environments = case
    again = descriptor(request.node.callspec.params["case"])
    assert torch.equal(again(surroundings).features, environments.features)


def test_features_do_not_depend_on_the_company(case):
    """Environments one by one are the same as in a batch: nothing leaks between them."""
    made, surroundings, environments = case
    for e in range(len(surroundings)):
        alone = made(surroundings.select([e]))
        torch.testing.assert_close(alone.features[0], environments.features[e], atol=1e-14, rtol=0)


def test_the_order_of_neighbours_does_not_matter(case):
    made, surroundings, environments = case
    order = torch.cat([(surroundings.centers == e).nonzero()[:, 0].flip(0) for e in range(len(surroundings))])
    shuffled = Surroundings(
        surroundings.species,
        surroundings.centers[order],
        surroundings.neighbor_species[order],
        surroundings.vectors[order],
    )
    torch.testing.assert_close(made(shuffled).features, environments.features, atol=1e-13, rtol=0)  # order of sums


def test_the_jacobian_is_the_derivative_of_the_features(case):
    made, surroundings, environments = case
    jacobian = environments.jacobian()
    assert jacobian.shape == (len(surroundings.centers), 3, made.n_features)
    pairs = torch.linspace(0, len(surroundings.centers) - 1, 7).long()
    for pair in pairs.tolist():
        center = int(surroundings.centers[pair])
        for axis in range(3):
            slope = torch.zeros(made.n_features, dtype=torch.float64)
            for steps, factor in ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12)):
                vectors = surroundings.vectors.clone()
                vectors[pair, axis] += steps * STEP
                moved = Surroundings(surroundings.species, surroundings.centers, surroundings.neighbor_species, vectors)
                slope += factor / STEP * made(moved.select([center])).features[0]
            torch.testing.assert_close(jacobian[pair, axis], slope, atol=DIFFERENCE, rtol=0)


def test_pull_back_is_the_transpose_of_the_jacobian(case):
    made, surroundings, environments = case
    cotangents = torch.randn(
        2, len(surroundings), made.n_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    expected = torch.einsum("pxf,kpf->kpx", environments.jacobian(), cotangents[:, surroundings.centers])
    # the same sums of up to 700 terms of order 1 in another order
    torch.testing.assert_close(environments.pull_back(cotangents), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(environments.pull_back(cotangents[1]), expected[1], atol=1e-12, rtol=0)


def test_the_jacobian_keeps_features_on_the_sphere(case):
    _, surroundings, environments = case
    along = (environments.jacobian() * environments.features[surroundings.centers][:, None]).sum(-1)
    assert along.abs().max() < 1e-12  # x . dx = 0, rounding of sums of 700 terms


def test_no_environments_and_no_neighbours(case):
    made, surroundings, _ = case
    none = made(surroundings.select([]))
    assert none.features.shape == (0, made.n_features)
    assert none.pull_back(none.features).shape == (0, 3)
    alone = structure([[0, 0, 0]], [6])
    lonely = made(Surroundings.from_structures(alone, neighbors.find_neighbors(alone, CUTOFF)))
    assert lonely.jacobian().shape == (0, 3, made.n_features)
    assert torch.isfinite(lonely.features).all()


def test_a_neighbour_of_another_species_changes_the_features(case):
    made, surroundings, environments = case
    species = surroundings.neighbor_species.clone()
    species[0] = 6 if species[0] != 6 else 8
    other = Surroundings(surroundings.species, surroundings.centers, species, surroundings.vectors)
    assert (made(other).features[0] - environments.features[0]).norm() > 1e-4


@pytest.mark.parametrize("name", DESCRIPTORS)
def test_an_atom_alone_without_weight_has_features_of_zero(name):
    alone = structure([[0, 0, 0]], [6])
    made = descriptor(name, central_weight=0.0)
    assert torch.equal(
        made(Surroundings.from_structures(alone, neighbors.find_neighbors(alone, CUTOFF))).features,
        torch.zeros(1, made.n_features).double(),
    )


# SOAP against its definition ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOAPS)
@pytest.mark.parametrize("central_weight", [1.0, 0.3])
def test_dot_products_are_those_of_the_full_spectrum_by_pair_sums(name, central_weight):
    soap, surroundings = descriptor(name, central_weight=central_weight), _surroundings()
    full = torch.stack(
        [
            oracles.full_spectrum(soap, surroundings, e, surroundings.vectors[surroundings.centers == e])
            for e in range(6)
        ]
    )
    features = soap(surroundings).features
    # the same polynomial of the same radial integrals; 1e-13 is the rounding of sums of a thousand products
    torch.testing.assert_close(features @ features.T, full @ full.T, atol=1e-13, rtol=0)


@pytest.mark.parametrize("name", SOAPS)
def test_pull_back_and_jacobian_equal_autograd_of_the_pair_sums(name):
    """d/dr of (x . y) for fixed y: autograd through the brute-force spectrum against both analytic derivatives."""
    soap, surroundings = descriptor(name), _surroundings()
    environments = soap(surroundings)
    other = 3
    y = oracles.full_spectrum(soap, surroundings, other, surroundings.vectors[surroundings.centers == other])
    pulled = environments.pull_back(environments.features[other].expand(6, -1))
    by_jacobian = environments.jacobian() @ environments.features[other]
    for e in range(5):
        mine = surroundings.centers == e
        vectors = surroundings.vectors[mine].clone().requires_grad_()
        (slope,) = torch.autograd.grad(oracles.full_spectrum(soap, surroundings, e, vectors) @ y, vectors)
        torch.testing.assert_close(pulled[mine], slope, atol=1e-12, rtol=0)  # rounding
        torch.testing.assert_close(by_jacobian[mine], slope, atol=1e-12, rtol=0)


def test_gradcheck_of_the_features():
    """torch's own gradcheck with the analytic Jacobian as the backward pass."""
    soap = descriptor("soap gto", (6, 8), n_max=2, l_max=2)
    one = crystal("cubic")
    surroundings = Surroundings.from_structures(one, neighbors.find_neighbors(one, 3.4))

    class Features(torch.autograd.Function):
        @staticmethod
        def forward(ctx, vectors):
            environments = soap(
                Surroundings(
                    surroundings.species, surroundings.centers, surroundings.neighbor_species, vectors.detach()
                )
            )
            ctx.environments = environments
            return environments.features

        @staticmethod
        def backward(ctx, cotangents):
            return ctx.environments.pull_back(cotangents)

    assert torch.autograd.gradcheck(
        Features.apply, (surroundings.vectors.clone().requires_grad_(),), eps=1e-5, atol=1e-7
    )


def test_the_spectrum_of_a_density_expanded_by_quadrature():
    """GTO: coefficients by numerical integration of the density over space, then p = pi sqrt(8/(2l+1)) sum_m c c."""
    soap = descriptor("soap gto", (6,), n_max=2, l_max=2, sigma_atom=0.6)
    heap = cluster((6, 6, 6))
    surroundings = Surroundings.from_structures(heap, neighbors.find_neighbors(heap, CUTOFF))
    features = soap(surroundings).features
    spectra = []
    for e in range(3):
        vectors = surroundings.vectors[surroundings.centers == e]
        weights = np.append(soap.weights(vectors.norm(dim=1))[0].numpy(), 1.0)
        points = np.vstack([vectors.numpy(), np.zeros((1, 3))])
        c = oracles.gto_coefficients(points, weights, 2, 2, 0.6, CUTOFF)
        p = [np.sqrt(8 / (2 * l + 1)) * c[:, l * l : (l + 1) ** 2] @ c[:, l * l : (l + 1) ** 2].T for l in range(3)]
        spectra.append(np.ravel(p) / np.linalg.norm(np.ravel(p)))
    full = np.array(spectra)
    np.testing.assert_allclose(
        (features @ features.T).numpy(), full @ full.T, atol=1e-9
    )  # splines 1e-10, quadrature less


def test_the_optimal_basis_converges_to_the_complete_kernel():
    """(x.x') of growing optimal bases against the complete radial sum, sum_n I_nl I_nl -> C_l, by brute force over pairs."""
    heap, sigma, l_max = cluster((6, 6, 6, 6)), 0.5, 3
    surroundings = Surroundings.from_structures(heap, neighbors.find_neighbors(heap, CUTOFF))
    weights = descriptor("soap optimal", (6,)).weights

    def overlap(i: int, j: int) -> float:
        """sum_l 8/(2l+1) sum_nn' sum_mm' (c_nlm c_n'lm)(c'_nlm' c'_n'lm') = sum_l 8/(2l+1) |sum_n c_nlm c'_nlm'|^2, complete in n."""
        parts = []
        for e in (i, j):
            v = surroundings.vectors[surroundings.centers == e]
            w = torch.cat([weights(v.norm(dim=1))[0], torch.ones(1).double()])
            parts.append((torch.cat([v, torch.zeros(1, 3).double()]), w))
        (a, w_a), (b, w_b) = parts
        total = 0.0
        for l in range(l_max + 1):
            radial = [
                [oracles.gaussian_overlap(float(p.norm()), float(q.norm()), l, sigma) / (4 * np.pi) for q in b]
                for p in a
            ]
            c = torch.tensor(radial) * w_a[:, None] * w_b[None, :] * (4 * np.pi)
            unit_a, unit_b = (x / x.norm(dim=1, keepdim=True).clamp_min(1e-12) for x in (a, b))
            # |sum_pq c_pq Y_lm(p) Y_lm'(q)|^2 = ((2l+1)/(4 pi))^2 sum_pq,p'q' c_pq c_p'q' P_l(p.p') P_l(q.q')
            p_a, p_b = (oracles.legendre(l, x @ x.T) for x in (unit_a, unit_b))
            total += (
                8
                / (2 * l + 1)
                * ((2 * l + 1) / (4 * np.pi)) ** 2
                * float((p_a * (c.double() @ p_b @ c.double().T)).sum())
            )
        return total

    exact = torch.tensor([[overlap(i, j) for j in range(4)] for i in range(4)], dtype=torch.float64)
    exact = exact / (exact.diagonal()[:, None] * exact.diagonal()[None, :]).sqrt()
    errors = []
    for n in (4, 8, 14):
        # counted from 0.05 A on, so that the central atom's own Gaussian at r = 0 is represented as well
        soap = descriptor("soap optimal", (6,), n_max=n, sigma_atom=sigma, shortest=0.05)
        features = soap(surroundings).features
        errors.append(float((features @ features.T - exact).abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6  # the measure w^2 r is small near r = 0, where convergence is last


# names ----------------------------------------------------------------------------------------------------------------------


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="Unknown descriptor 'sope'. Perhaps you meant 'soap'"):
        descriptors.make_descriptor((6,), DESCRIPTORS["soap gto"] | {"name": "sope"})


def test_species_a_descriptor_was_not_made_for():
    soap = descriptor("soap gto", (6, 8))
    heap = cluster((6, 1, 8))
    with pytest.raises((UserError, ValueError)):
        soap(Surroundings.from_structures(heap, neighbors.find_neighbors(heap, CUTOFF)))
