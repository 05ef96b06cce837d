"""Functionals of structures as inducing variables: covariances against explicit double sums; with all of them, the dense process."""

from __future__ import annotations

from dataclasses import replace

import oracles
import pytest
import torch
from systems import KERNELS, cluster, crystal, descriptor, everything, structure
from test_dense_gp import NOISE, SIGNAL, SIZES, TIGHT, labels, other_structures, training_set
from torch import Tensor

from gpmlp.core.environments import StructureEnvironments
from gpmlp.core.errors import UserError
from gpmlp.core.stored_tensors import StoredTensors
from gpmlp.core.structures import Structures
from gpmlp.fitting.inducing_sets import _independent
from gpmlp.gp import covariances, evidence, inducing, posterior, qr
from gpmlp.gp.evidence import SufficientStatistics
from gpmlp.gp.functionals import TOLERANCE, FunctionalBlock, functional_maps, internal_directions
from gpmlp.gp.kernels import PolynomialKernel
from gpmlp.gp.prior import PriorCovariance
from gpmlp.gp.stored_factors import check_factor
from gpmlp.gp.variance import VarianceModel, VarianceRequest

CASES = [("soap gto", k) for k in KERNELS] + [("soap optimal", "polynomial 2"), ("dscribe-soap", "polynomial 6")]
RELATIVE = {1: 0.7, 6: 1.3, 8: 0.8}


def few() -> Structures:
    """A molecule, a crystal and a lone atom."""
    return Structures.concatenate([cluster((6, 1, 8)), crystal("triclinic"), structure([[0, 0, 0]], [1])])


def block_of(structures: Structures, made, relative: dict[int, float], tolerance: float = 0.0) -> FunctionalBlock:
    """With energies, forces and stresses of the structures, and all directions of the features that these have."""
    on = torch.ones(len(structures), dtype=torch.bool)
    return FunctionalBlock.make(made, structures, functional_maps(structures, on, on, on), relative, tolerance)


def dense_maps(block: FunctionalBlock) -> Tensor:
    """(columns, observations) the functionals in terms of energies per atom, forces and stresses of the oracle."""
    structures = block.structures
    offsets, n = structures.offsets.tolist(), len(structures)
    out = torch.zeros(block.n_columns, 7 * n + 3 * structures.n_atoms, dtype=torch.float64)
    for i, rows in enumerate(block.maps):
        first, last = offsets[i], offsets[i + 1]
        here = out[block.starts[i] : block.starts[i + 1]]
        here[:, i] = rows[:, 0] * (last - first)
        here[:, n + 3 * first : n + 3 * last] = rows[:, 1:-6]
        here[:, n + 3 * structures.n_atoms + 6 * i :][:, :6] = rows[:, -6:]
    return out


def observations(gp: oracles.DenseGP, structures: Structures):
    every, x, z = gp.functionals(structures)
    return [f for kind in ("energies", "forces", "stresses") for f in every[kind]], x, z


@pytest.mark.parametrize(("case", "kernel"), CASES)
def test_covariances_are_the_double_sums_of_the_oracle(case, kernel):
    made, kernel = descriptor(case), KERNELS.get(kernel) or PolynomialKernel(6)
    block = block_of(few(), made, RELATIVE)
    gp = oracles.DenseGP(made, kernel.profile, RELATIVE)
    seen, others = (
        observations(gp, s) for s in (block.structures, Structures.concatenate([cluster((8, 1), 3), crystal("slab")]))
    )
    maps = dense_maps(block)
    expected = maps @ gp.covariance(*seen, *seen) @ maps.T
    scale = expected.diagonal().max()
    torch.testing.assert_close(block.K_uu(kernel), expected, atol=float(scale) * 1e-13, rtol=0)
    batch = Structures.concatenate([cluster((8, 1), 3), crystal("slab")])
    view = StructureEnvironments.from_structures(made, batch)
    rows = covariances.covariance_rows(batch, view, kernel, (block,))
    expected = gp.covariance(*others, *seen) @ maps.T
    expected[: len(batch)] *= batch.counts[:, None]
    got = torch.cat([rows.energies, rows.forces, rows.stresses])
    torch.testing.assert_close(got, expected, atol=float(scale) * 1e-13, rtol=0)
    local = covariances.atom_rows(view.environments.features, batch.species, kernel, (block,))
    summed = torch.zeros(len(batch), local.shape[1], dtype=local.dtype).index_add(0, batch.structure_of_atom, local)
    torch.testing.assert_close(summed, rows.energies, atol=float(scale) * 1e-13, rtol=0)


def test_directions_left_out_change_no_more_than_they_say():
    """Products of the coordinates differ from those of the vectors by 1e-10 of the largest, and so do covariances of the functionals; what
    is left are functionals of the same process: no variance is below zero."""
    made, kernel = descriptor("soap gto"), KERNELS["polynomial 2"]
    full, few_ = (block_of(few(), made, RELATIVE, tolerance) for tolerance in (0.0, TOLERANCE))
    assert all(few_.bases[z].shape[1] < full.bases[z].shape[1] < made.n_features for z in (1, 6, 8))
    exact, cut = full.K_uu(kernel), few_.K_uu(kernel)
    assert 0 < float((exact - cut).abs().max()) < 1e-8 * float(exact.diagonal().max())
    batch = Structures.concatenate([cluster((8, 1), 3), crystal("slab")])
    view = StructureEnvironments.from_structures(made, batch)
    rows, lower = (
        covariances.covariance_rows(batch, view, kernel, (few_,)),
        torch.linalg.cholesky(cut + 1e-12 * torch.eye(len(cut))),
    )
    explained = torch.linalg.solve_triangular(lower, rows.forces.T, upper=False).square().sum(0).view(-1, 3)
    prior = PriorCovariance(kernel, RELATIVE).forces(batch, view, torch.arange(batch.n_atoms)).diagonal(dim1=1, dim2=2)
    assert bool((prior - explained > -1e-9 * prior.max()).all())


def test_some_columns_and_some_atoms():
    made, kernel, block = (
        descriptor("soap gto"),
        KERNELS["sum"],
        block_of(everything(), descriptor("soap gto"), RELATIVE),
    )
    chosen = torch.tensor([0, 3, 12, 13, 40])
    part = block.select(chosen)
    assert len(part.structures) < len(block.structures) and part.n_columns == len(chosen)
    whole = block.K_uu(kernel)
    torch.testing.assert_close(part.K_uu(kernel), whole[chosen][:, chosen], atol=1e-12, rtol=1e-12)
    fresh = replace(part)  # without what was kept
    torch.testing.assert_close(fresh.K_uu(kernel), part.K_uu(kernel), atol=1e-12, rtol=1e-12)
    batch, atoms = cluster(seed=4), torch.tensor([3, 0])
    view = StructureEnvironments.from_structures(made, batch)
    every = covariances.covariance_rows(batch, view, kernel, (block,)).forces.unflatten(0, (-1, 3))
    some = covariances.covariance_rows(batch, view, kernel, (block,), stresses=False, atoms=atoms).forces
    torch.testing.assert_close(some.unflatten(0, (-1, 3)), every[atoms], atol=1e-12, rtol=0)


def test_slopes_are_those_of_local_rows():
    made, kernel = descriptor("soap gto"), KERNELS["polynomial 3"]
    block = block_of(Structures.concatenate([cluster(), crystal()]), made, RELATIVE)
    x = made(StructureEnvironments.from_structures(made, cluster((6, 6, 6), 3)).surroundings).features
    weights = torch.randn(3, block.n_columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x.requires_grad_()
    (expected,) = torch.autograd.grad((weights * block.local_rows(kernel, 6, x)).sum(), x)
    torch.testing.assert_close(block.local_slopes(kernel, 6, x.detach(), weights), expected, atol=1e-12, rtol=1e-10)
    alpha, tau = block.collapse(weights[0], 6)
    centres = block.centres(6)
    value, first, _ = kernel.profile(x @ centres.T)
    mean = value @ alpha + (first * (x @ tau.T)).sum(1)
    torch.testing.assert_close(mean, block.local_rows(kernel, 6, x) @ weights[0], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(
    ("positions", "periodic", "n"),
    [
        ([[0, 0, 0]], False, 0),
        ([[0, 0, 0], [0, 0, 1.1]], False, 1),
        ([[0, 0, -1.2], [0, 0, 0], [0, 0, 1.1]], False, 4),  # linear: one rotation less
        ([[0, 0, 0], [1, 0, 0], [0, 1, 0.3]], False, 3),
        ([[0, 0, 0], [1, 0, 0], [0, 1, 0.3]], True, 6),
    ],
)
def test_internal_directions_leave_out_rigid_motions(positions, periodic, n):
    r = torch.tensor(positions, dtype=torch.float64)
    found = internal_directions(r, torch.tensor([periodic, False, False]))
    assert found.shape == (n, r.numel())
    torch.testing.assert_close(found @ found.T, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)
    for axis in torch.eye(3, dtype=torch.float64):
        moved = [axis.expand_as(r)] + ([] if periodic else [torch.linalg.cross(axis.expand_as(r), r, dim=1)])
        assert all(float((found @ m.reshape(-1)).abs().max() if n else 0) < 1e-12 for m in moved)


@pytest.fixture(scope="module", params=["polynomial 2", "polynomial 3", "exponential", "sum"])
def both(request):
    """(dense process, sparse one with all functionals of the data) conditioned on the same labels."""
    made, kernel, structures = descriptor("soap gto", (6, 8), **SIZES), KERNELS[request.param], training_set()
    block = block_of(structures, made, SIGNAL)
    columns, lower, jitter, _ = _independent(block.K_uu(kernel))
    block = block.select(columns)
    assert jitter == 0
    values = labels(structures)
    noise = {kind: torch.full_like(y, NOISE[kind]) for kind, y in values.items()}
    dense = oracles.DenseGP(made, kernel.profile, SIGNAL).condition(structures, values, noise)
    rows = covariances.covariance_rows(
        structures, StructureEnvironments.from_structures(made, structures), kernel, (block,)
    )
    whitened, counts = {}, {}
    for kind, y in values.items():
        a, known = getattr(rows, kind), ~torch.isnan(y)
        a = a / structures.counts[:, None] if kind == "energies" else a
        factor = qr.RowFactor(a.shape[1], 50)
        factor.add(a[known], y[known])
        whitened[kind], counts[kind] = inducing.whiten_rows(factor.factor(), (lower,)), factor.count
    unit = torch.ones(block.n_columns, dtype=torch.float64)
    solved = posterior.solve_posterior(whitened, counts, NOISE, unit, (lower,))
    return dense, made, kernel, block, lower, whitened, counts, unit, solved


def test_with_all_functionals_predictions_are_those_of_the_dense_process(both):
    dense, made, kernel, block, *_, solved = both
    others = other_structures()
    expected = dense.predict(others)
    rows = covariances.covariance_rows(others, StructureEnvironments.from_structures(made, others), kernel, (block,))
    torch.testing.assert_close(rows.energies @ solved.weights / others.counts, expected["energies"], atol=TIGHT, rtol=0)
    torch.testing.assert_close(rows.forces @ solved.weights, expected["forces"], atol=TIGHT, rtol=0)
    torch.testing.assert_close(rows.stresses @ solved.weights, expected["stresses"], atol=TIGHT, rtol=0)
    assert expected["energies"].abs().max() > 0.1


def test_with_all_functionals_the_evidence_is_the_dense_marginal_likelihood(both):
    dense, *_, whitened, counts, unit, _ = both
    statistics = {kind: SufficientStatistics.from_factor(w, counts[kind]) for kind, w in whitened.items()}
    value, _, _ = evidence.negative_log_evidence(statistics, NOISE, unit[:1], torch.zeros(len(unit), dtype=torch.long))
    assert value == pytest.approx(-dense.log_evidence, abs=1e-6)


def test_with_all_functionals_variances_are_those_of_the_dense_process(both):
    dense, made, kernel, block, lower, *_, unit, solved = both
    model = VarianceModel(
        (PriorCovariance(kernel, SIGNAL),), ((block,),), (lower,), unit, solved.factor, NOISE, {}, len(unit)
    )
    others = other_structures()
    view = [StructureEnvironments.from_structures(made, others)]
    found = model(others, view, VarianceRequest(energies=True, forces=True, stresses=True))
    every, x, z = dense.functionals(others)
    for kind, name in (("energies", "energies_variance"), ("forces", "forces_covariance")):
        exact = dense.posterior_covariance(every[kind], x, z).diagonal()
        part = found[name].inducing + found[name].data
        flat = part / others.counts**2 if kind == "energies" else part.diagonal(dim1=1, dim2=2).flatten()
        torch.testing.assert_close(flat, exact, atol=1e-8 * float(exact.max()) + 1e-9, rtol=1e-7)
    spread = model.atom_energies([view[0].environments], "dtc")
    assert bool((spread.inducing >= 0).all() and (spread.data > 0).all())


def test_a_stored_block_is_the_same_and_altered_ones_are_refused():
    block = block_of(Structures.concatenate([cluster(), crystal()]), descriptor("soap gto"), RELATIVE)
    tensors = block.stored()
    again = FunctionalBlock.from_stored(StoredTensors(tensors), block.descriptor, RELATIVE)
    kernel = KERNELS["polynomial 2"]
    assert torch.equal(again.K_uu(kernel), block.K_uu(kernel))
    for name, value in (
        ("counts", tensors["counts"] + 1),
        ("maps", tensors["maps"][1:]),
        ("functionals", -tensors["functionals"]),
    ):
        with pytest.raises(UserError):
            FunctionalBlock.from_stored(StoredTensors(tensors | {name: value}), block.descriptor, RELATIVE)


def test_a_first_structure_without_functionals():
    """As one atom in a cell with forces alone: a block is checked by the first that has any; of no structures it has no columns."""
    structures = Structures.concatenate([structure([[0, 0, 0]], [1]), cluster((6, 1, 8))])
    yes, no = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    kernel, maps = KERNELS["polynomial 2"], functional_maps(structures, no, yes, no)
    block = FunctionalBlock.make(descriptor("soap gto"), structures, maps, RELATIVE)
    assert block.starts == [0, 0, 3]
    lower = torch.linalg.cholesky(block.K_uu(kernel))
    check_factor(lower, kernel, block)
    with pytest.raises(UserError, match="is that of others"):
        check_factor(1.1 * lower, kernel, block)
    none = block.select(torch.arange(0))
    assert none.K_uu(kernel).shape == (0, 0)
    assert none.centres(6).shape == (0, block.descriptor.n_features)
    alpha, tau = none.collapse(torch.zeros(2, 0, dtype=torch.float64), 6)
    assert alpha.shape == (2, 0) and tau.shape == (2, 0, block.descriptor.n_features)


def test_a_block_goes_to_another_device():
    block = block_of(cluster(), descriptor("soap gto"), RELATIVE)
    assert block.to(torch.ones(1, dtype=torch.float64)) is block
    there, asked = (
        torch.ones(1, dtype=torch.float64, device="meta"),
        [],
    )  # which every machine has, but has no numbers to check
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Structures, "to", lambda self, *where: asked.append(where) or self)
        moved = block.to(there)
    assert asked == [(there.device, torch.float64)]
    assert {t.device.type for t in (*moved.maps, *moved.bases.values())} == {"meta"}
