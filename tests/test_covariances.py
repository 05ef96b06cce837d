"""Covariance rows and the covariance of inducing variables, against differences, strained cells and explicit double sums."""

from __future__ import annotations

from dataclasses import replace

import oracles
import pytest
import torch
from systems import (
    CUTOFF,
    DESCRIPTORS,
    KERNELS,
    SPECIES,
    cluster,
    crystal,
    descriptor,
    everything,
    replicate,
    structure,
)

from gpmlp.core import neighbors
from gpmlp.core.environments import StructureEnvironments, Surroundings
from gpmlp.core.structures import Structures
from gpmlp.core.units import VOIGT
from gpmlp.fitting.sparse_points import gradient_directions, make_block
from gpmlp.gp import covariances
from gpmlp.gp import inducing as inducing_module
from gpmlp.gp.inducing import InducingBlock
from gpmlp.potential.mean import MeanBlock

FIRST = "soap gto"
CASES = [(d, "polynomial 3") for d in DESCRIPTORS] + [(FIRST, k) for k in KERNELS if k != "polynomial 3"]
STEP = 1e-4  # A; see test_physics.py for the size of the errors
FINITE_DIFFERENCE = 1e-6


def inducing_blocks(made, kernel, n_directions: int, of: Structures | None = None, species=SPECIES):
    """One block for each species from environments of a few heaps of atoms."""
    of = Structures.concatenate([cluster(seed=s) for s in (20, 21)]) if of is None else of
    surroundings = Surroundings.from_structures(of, neighbors.find_neighbors(of, made.cutoff))
    blocks, lowers = [], []
    for z in species:
        mine = surroundings.select((of.species == z).nonzero()[:, 0])
        block, lower, jitter = make_block(z, made(mine).features, mine, made, kernel, n_directions)
        assert jitter == 0
        blocks.append(block)
        lowers.append(lower)
    return tuple(blocks), lowers


@pytest.fixture(scope="module", params=CASES, ids=lambda c: ", ".join(c))
def model(request):
    made, kernel = descriptor(request.param[0]), KERNELS[request.param[1]]
    blocks, _ = inducing_blocks(made, kernel, 2)
    return made, kernel, blocks


def _rows(structures: Structures, model, **kinds) -> covariances.CovarianceRows:
    made, kernel, blocks = model
    view = StructureEnvironments.from_structures(made, structures)
    return covariances.covariance_rows(structures, view, kernel, blocks, **kinds)


def test_force_rows_are_minus_the_gradient_of_energy_rows(model):
    batch = Structures.concatenate([cluster(), crystal("triclinic", (6, 8))])
    forces = _rows(batch, model).forces
    for atom, axis in ((0, 0), (3, 1), (5, 2), (6, 0)):
        sides = []
        for sign in (-1, 1):
            moved = batch.positions.clone()
            moved[atom, axis] += sign * STEP
            sides.append(_rows(batch.with_positions(moved), model, forces=False, stresses=False).energies.sum(0))
        slope = (sides[1] - sides[0]) / (2 * STEP)
        torch.testing.assert_close(forces[3 * atom + axis], -slope, atol=FINITE_DIFFERENCE, rtol=1e-6)


@pytest.mark.parametrize("kind", ["triclinic", "left-handed", "slab"])
def test_stress_rows_are_the_strain_derivative_of_energy_rows(model, kind):
    one = crystal(kind)
    stresses = _rows(one, model).stresses
    for k, (a, b) in enumerate(VOIGT):
        sides = []
        for sign in (-1, 1):
            strain = torch.eye(3, dtype=torch.float64)
            strain[a, b] += 0.5 * sign * STEP
            strain[b, a] += 0.5 * sign * STEP
            strained = one.with_positions(one.positions @ strain, one.cells @ strain)
            sides.append(_rows(strained, model, forces=False, stresses=False).energies[0])
        slope = (sides[1] - sides[0]) / (2 * STEP) / one.volumes[0]
        torch.testing.assert_close(stresses[k], slope, atol=FINITE_DIFFERENCE, rtol=1e-6)


def test_rows_are_the_double_sums_of_the_oracle(model):
    """Every energy, force and stress row against explicit sums over environments and pairs."""
    made, kernel, blocks = model
    batch = Structures.concatenate([cluster((6, 1, 8)), crystal("triclinic")])
    gp = oracles.DenseGP(made, kernel.profile, dict.fromkeys(SPECIES, 1.0))
    every, x, z = gp.functionals(batch)
    inducing, features, species = [], [], []
    for block in blocks:
        m, r = block.tangents.shape[:2]
        zero = torch.zeros_like(block.features[0])
        columns = []
        for j in range(m):
            columns.append(oracles.Functional())
            columns[-1].add(len(features) + j, 1.0, zero)
        for j in range(m):
            for k in range(r):
                columns.append(oracles.Functional())
                columns[-1].add(len(features) + j, 0.0, block.tangents[j, k])
        inducing += [columns[c] for c in block.columns.tolist()]
        features += list(block.features)
        species += [block.species] * m
    u, z_u = torch.stack(features), torch.tensor(species)
    found = _rows(batch, model)
    expected = {kind: gp.covariance(fs, x, z, inducing, u, z_u) for kind, fs in every.items()}
    # the same sums in another order; up to 50 pairs of terms of order 1
    torch.testing.assert_close(found.energies / batch.counts[:, None], expected["energies"], atol=1e-12, rtol=0)
    torch.testing.assert_close(found.forces, expected["forces"], atol=1e-12, rtol=0)
    torch.testing.assert_close(found.stresses, expected["stresses"], atol=1e-12, rtol=0)
    between = gp.covariance(inducing, u, z_u, inducing, u, z_u)
    expected = torch.block_diag(*(inducing_module.K_uu(kernel, block, block) for block in blocks))
    torch.testing.assert_close(between, expected, atol=1e-12, rtol=0)


def test_rows_do_not_depend_on_the_size_of_blocks(model, monkeypatch):
    batch = everything()
    whole = _rows(batch, model)
    monkeypatch.setattr(covariances, "BLOCK_BYTES", 1)  # one environment at a time
    monkeypatch.setattr(covariances, "BLOCK_ROWS", 1)
    monkeypatch.setattr(covariances, "ENVIRONMENTS", 3)
    single = _rows(batch, model)
    for name in ("energies", "forces", "stresses"):
        torch.testing.assert_close(getattr(single, name), getattr(whole, name), atol=1e-12, rtol=0)


def test_only_what_is_asked_for(model):
    batch = Structures.concatenate([cluster(), crystal("slab")])
    full = _rows(batch, model)
    assert (full.stresses[:6] == 0).all()  # no volume
    energies = _rows(batch, model, forces=False, stresses=False)
    assert len(energies.forces) == len(energies.stresses) == 0
    torch.testing.assert_close(energies.energies, full.energies, atol=1e-13, rtol=0)
    forces, stresses = _rows(batch, model, stresses=False), _rows(batch, model, forces=False)
    torch.testing.assert_close(forces.forces, full.forces, atol=1e-13, rtol=0)
    torch.testing.assert_close(stresses.stresses, full.stresses, atol=1e-13, rtol=0)


def test_two_point_covariances_are_derivatives_of_the_kernel():
    """The oracle's own formula for cov(v.d/dx eps(x), w.d/dy eps(y)), by differentiating f(x.y)."""
    kernel = KERNELS["polynomial 3"]
    x, y, v, w = (torch.randn(5, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(4))

    def f(x, y):
        return (x @ y) ** 3

    x.requires_grad_()
    y.requires_grad_()
    (slope,) = torch.autograd.grad(f(x, y), x, create_graph=True)
    both = torch.autograd.grad(slope @ v, y)[0].detach() @ w
    x, y = x.detach(), y.detach()
    _, f1, f2 = kernel.profile(x @ y)
    assert float(both) == pytest.approx(float(f1 * (v @ w) + f2 * (x @ w) * (v @ y)), rel=1e-13)


# inducing variables ---------------------------------------------------------------------------------------------------------


def test_the_covariance_of_inducing_variables_is_symmetric_and_positive_definite(model):
    made, kernel, blocks = model
    for block in blocks:
        k = inducing_module.K_uu(kernel, block, block)
        assert torch.equal(block.columns, block.columns.unique())
        torch.testing.assert_close(k, k.T, atol=1e-14, rtol=0)
        values = torch.linalg.eigvalsh(k)
        # columns kept have RANK_TOLERANCE of variance of their own or more; eigenvalues may be smaller by the number of columns
        assert values.min() > inducing_module.RANK_TOLERANCE * 1e-3


def test_tangents_are_orthonormal_physical_directions(model):
    """t_jr: orthonormal, orthogonal to x_j, and in the span of the rows of the descriptor's Jacobian."""
    made, _, _ = model
    heap = cluster()
    surroundings = Surroundings.from_structures(heap, neighbors.find_neighbors(heap, CUTOFF))
    environments = made(surroundings)
    tangents = gradient_directions(made, surroundings, 4)
    for e in range(len(surroundings)):
        t = tangents[e]
        torch.testing.assert_close(
            t @ t.T, torch.eye(4).double(), atol=1e-9, rtol=0
        )  # right singular vectors by way of J Jᵀ
        assert (t @ environments.features[e]).abs().max() < 1e-9
        rows = environments.jacobian()[surroundings.centers == e].flatten(0, 1)
        inside = torch.linalg.lstsq(rows.T, t.T, driver="gelsd").solution
        torch.testing.assert_close(rows.T @ inside, t.T, atol=1e-8, rtol=0)


def test_more_directions_than_there_are_come_as_zeros_and_are_dropped():
    """Two neighbours move the features in 3 ways only (two lengths, one angle); an isolated atom has none at all."""
    made, kernel = descriptor(FIRST), KERNELS["polynomial 3"]
    trimer = cluster((6, 1, 8), 2, 2.5)
    surroundings = Surroundings.from_structures(trimer, neighbors.find_neighbors(trimer, CUTOFF))
    assert len(surroundings.centers) == 6
    tangents = gradient_directions(made, surroundings, 8)
    assert (tangents.norm(dim=2) > 0.5).sum(1).tolist() == [3, 3, 3]
    mine = surroundings.select([0])
    block, _, _ = make_block(6, made(mine).features, mine, made, kernel, 8)
    assert block.columns.tolist() == [0, 1, 2, 3]
    assert not block.has_all_columns
    nobody = Surroundings(torch.tensor([6]), mine.centers[:0], mine.neighbor_species[:0], mine.vectors[:0])
    block, _, _ = make_block(6, made(nobody).features, nobody, made, kernel, 5)
    assert block.columns.tolist() == [0]


def test_duplicates_and_perfect_crystals_are_dropped_without_jitter():
    made, kernel = descriptor(FIRST), KERNELS["polynomial 3"]
    heap = cluster()
    surroundings = Surroundings.from_structures(heap, neighbors.find_neighbors(heap, CUTOFF))
    carbon = surroundings.select([0, 4])
    alone, _, _ = make_block(6, made(carbon).features, carbon, made, kernel, 2)
    twice = Surroundings.concatenate([carbon, carbon, carbon])
    block, lower, jitter = make_block(6, made(twice).features, twice, made, kernel, 2)
    assert jitter == 0
    assert block.n_columns == alone.n_columns == 6
    assert torch.isfinite(lower).all()
    # a simple cubic crystal: every atom sees the same, and no displacement changes the features to first order
    perfect = replicate(structure([[0, 0, 0]], [6], 2.4 * torch.eye(3), (True, True, True)), (2, 2, 1))
    surroundings = Surroundings.from_structures(perfect, neighbors.find_neighbors(perfect, CUTOFF))
    block, lower, jitter = make_block(6, made(surroundings).features, surroundings, made, kernel, 6)
    assert jitter == 0
    assert 1 <= block.n_columns <= 1 + 6
    assert (block.columns < 4).sum() == 1


def test_rank_is_that_of_the_feature_space():
    """zeta = 1: f(x.y) = x.y has no more independent values than features; here all gradients and values span a few."""
    made, kernel = descriptor(FIRST, (6,), n_max=2, l_max=0), KERNELS["polynomial 1"]
    heap = cluster((6, 6, 6, 6, 6, 6), 4, 4.0)
    surroundings = Surroundings.from_structures(heap, neighbors.find_neighbors(heap, CUTOFF))
    block, _, jitter = make_block(6, made(surroundings).features, surroundings, made, kernel, 3)
    assert jitter == 0
    assert block.n_columns == made.n_features == 3


def test_pivoted_rank_of_matrices_with_known_rank():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    kept = inducing_module.pivoted_rank(a @ a.T, 1e-9)
    assert len(kept) == 5
    assert torch.equal(kept, kept.sort().values)
    assert torch.linalg.matrix_rank(a[kept]) == 5
    padded = torch.block_diag(torch.zeros(2, 2, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    assert inducing_module.pivoted_rank(padded, 1e-9).tolist() == [2, 3, 4]


# collapse -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
def test_directions_collapse_into_one_vector_per_centre(name):
    """MeanBlock against the uncollapsed sum over all values and derivatives, to 1e-12 of its terms."""
    made, kernel = descriptor(FIRST), KERNELS[name]
    heap = Structures.concatenate([cluster(seed=7), cluster(seed=8)])
    carbon = (heap.species == 6).nonzero()[:, 0]
    surroundings = Surroundings.from_structures(heap, neighbors.find_neighbors(heap, CUTOFF)).select(
        torch.cat([carbon, carbon[:1]])
    )
    block, _, _ = make_block(6, made(surroundings).features, surroundings, made, kernel, 5)
    assert not block.has_all_columns  # one centre twice: its columns have no weights
    weights = torch.randn(block.n_columns, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mean = MeanBlock(block.features, *block.collapse(weights, block.species))
    others = cluster(seed=9)
    x = made(Surroundings.from_structures(others, neighbors.find_neighbors(others, CUTOFF))).features
    points = InducingBlock(6, x, x.new_zeros(len(x), 0, x.shape[1]), torch.arange(len(x)))
    expected = inducing_module.K_uu(kernel, points, block) @ weights
    energy, slope = mean(kernel, x)
    torch.testing.assert_close(energy, expected, atol=1e-12, rtol=1e-12)
    # the slope along any direction is the covariance of that derivative
    along = torch.randn(len(x), 1, x.shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    n = len(x)
    slopes = inducing_module.K_uu(kernel, InducingBlock(6, x, along, torch.arange(n, 2 * n)), block) @ weights
    torch.testing.assert_close(
        (slope * along[:, 0]).sum(1), slopes, atol=1e-11, rtol=1e-12
    )  # terms of order |along| ~ 15


@pytest.mark.parametrize("some", [None, [2, 0]])
def test_compiled_rows_are_those_of_tensors(model, some, monkeypatch):
    """The compiled scatter against `index_add`, with columns shared by threads, and derivatives that were dropped."""
    made, kernel, blocks = model
    blocks = tuple(replace(b, columns=torch.cat([b.columns[:-5:2], b.columns[1:4:2]])) for b in blocks)
    kinds = {"atoms": None if some is None else torch.tensor(some)}
    rows = [_rows(everything(), (made, kernel, blocks), **kinds)]
    monkeypatch.setattr(covariances, "SHARE", 1)
    rows.append(_rows(everything(), (made, kernel, blocks), **kinds))
    monkeypatch.setattr(covariances, "fits_compiled_loops", lambda *tensors: False)
    plain = _rows(everything(), (made, kernel, blocks), **kinds)
    for one in rows:
        torch.testing.assert_close(one.forces, plain.forces, atol=1e-12, rtol=0)
        torch.testing.assert_close(one.stresses, plain.stresses, atol=1e-12, rtol=0)
