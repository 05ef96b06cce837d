"""Variances of local energies by products, mostly in single precision, against triangular solves in double precision."""

from __future__ import annotations

from dataclasses import replace

import ase
import numpy as np
import pytest
import torch
from ase.build import bulk
from systems import KERNELS, descriptor, everything

import gpmlp
from gpmlp.core.environments import SinglePrecisionDescriptor, StructureEnvironments
from gpmlp.core.structures import Structures
from gpmlp.fitting import sparse_points
from gpmlp.gp import local_variance
from gpmlp.gp.inducing import InducingBlock, K_uu
from gpmlp.gp.local_variance import LocalVariance
from gpmlp.gp.prior import PriorCovariance
from gpmlp.gp.variance import VarianceModel
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.recipe import Recipe

UNIT = 2.0**-24  # half the distance of 1 from the next number in single precision
# kernels of the descriptors, and tangents at each centre
CASES = {name: ([kernel], 0) for name, kernel in KERNELS.items()} | {
    "tangents": ([KERNELS["polynomial 3"]], 2),
    "two descriptors": ([KERNELS["polynomial 4"], KERNELS["exponential"]], 0),
}  # fmt: skip


def shaken(batch: Structures, by: float, seed: int) -> Structures:
    noise = torch.randn(batch.positions.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return batch.with_positions(batch.positions + by * noise)


def block_of(species: int, x: torch.Tensor, kernel, tangents: int) -> InducingBlock:
    """Centres chosen as a fit chooses them; tangents at random."""
    chosen = sparse_points.greedy_selection(x, 40, lambda s: kernel.profile(s)[0], 1e-7)[0]
    random = torch.randn(
        len(chosen), x.shape[1], tangents, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    across = random - x[chosen, :, None] * (x[chosen, None] @ random)
    turned = torch.linalg.qr(across)[0].mT.contiguous()
    return InducingBlock(species, x[chosen], turned, torch.arange(len(chosen) * (1 + tangents)))


def model_of(case: str) -> VarianceModel:
    """The posterior of local energies that were seen with noise, by definition (posterior.py knows how to do better)."""
    kernels, tangents = CASES[case]
    seen = Structures.concatenate([shaken(everything(), 0.1, seed) for seed in range(12)])
    priors, blocks, lowers, signals = [], [], [], []
    for k, kernel in enumerate(kernels):
        made = descriptor("soap gto", seen.distinct_species)
        x = StructureEnvironments.from_structures(made, seen).environments.features
        blocks.append(tuple(block_of(z, x[seen.species == z], kernel, tangents) for z in seen.distinct_species))
        priors.append(PriorCovariance(kernel, {b.species: 2.0 + k + 0.1 * b.species for b in blocks[-1]}))
        for block in blocks[-1]:
            own = K_uu(kernel, block, block)
            lowers.append(torch.linalg.cholesky(own + 1e-10 * torch.eye(len(own)).double()))
            signals.append(torch.full((len(own),), priors[-1].signal[block.species], dtype=torch.float64))
    signal = torch.cat(signals)
    model = VarianceModel(
        tuple(priors), tuple(blocks), tuple(lowers), signal, torch.eye(len(signal)).double(), {}, {}, 0
    )
    a, _ = model.whiten(model.atom_rows(looks(model, seen)))
    stacked = torch.cat([torch.eye(len(signal)).double(), a[::3] / 0.03])
    return replace(model, factor=torch.linalg.qr(stacked)[1], amplitude=0.7)


def looks(model: VarianceModel, structures: Structures) -> list:
    made = descriptor("soap gto", structures.distinct_species)
    return [StructureEnvironments.from_structures(made, structures).environments] * len(model.priors)


@pytest.fixture(params=CASES)
def model(request):
    return model_of(request.param)


@pytest.fixture
def few(monkeypatch):
    """Small blocks are treated as large ones are, whatever rounding does to them."""
    monkeypatch.setattr(local_variance, "LEADING", 12)
    monkeypatch.setattr(local_variance, "TOLERANCE", 1.0)


def by_solves(model: VarianceModel, seen: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The prior variance, what the inducing set explains of it, and what the data leave."""
    a, left = model.whiten(model.atom_rows(seen))
    prior = sum(p.atom_energies(seen[0].species, a) for p in model.priors)
    return prior, a.square().sum(1), left.square().sum(1)


def test_small_blocks_are_in_double_precision(model):
    seen = looks(model, shaken(everything(), 0.2, 50))
    prior, explained, left = by_solves(model, seen)
    found = model.atom_energies(seen)
    assert all(not len(part.whiten_rest) for part in model.local.values())
    close = 1e-10 * float(prior.max())  # rounding of prior variances
    torch.testing.assert_close(found.inducing, 0.7 * (prior - explained).clamp_min(0), rtol=1e-9, atol=close)
    torch.testing.assert_close(found.data, left, rtol=1e-8, atol=close)
    assert found.data.max() > 1e-3 and found.inducing.max() > 1e-3


def rounding(part: LocalVariance, pieces: list, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds of what single precision does to y and to C a + √p y, (environments,): Higham, Accuracy and Stability (2002), eq. 3.13.

    |fl(B r) − B r| ≤ γ |B| |r|, γ = (n + 2) u / (1 − (n + 2) u), n terms and the rounding of B and r themselves.
    """
    gamma = (others.shape[1] + 2) * UNIT / (1 - (others.shape[1] + 2) * UNIT)
    a = torch.cat([k[:, :n] for k, n in zip(pieces, part.leading, strict=True)], dim=1) @ part.whiten_leading.T
    wrong = gamma * (others.abs() @ part.whiten_rest.double().abs().T)
    y = others @ part.whiten_rest.double().T
    across, roots = part.posterior_cross.double(), part.posterior_rest.double()
    more = gamma * (a.abs() @ across.abs().T) + roots * (wrong + 4 * UNIT * y.abs()) + 4 * UNIT * (a @ across.T).abs()
    return wrong.norm(dim=1), more.norm(dim=1)


def test_single_precision_stays_within_its_bound(model, few):
    """Of what is computed in it, and what that makes of variances; all else is rounding of double precision."""
    seen = looks(model, shaken(everything(), 0.2, 51))
    prior, explained, left = by_solves(model, seen)
    found = model.atom_energies(seen, "dtc")
    largest = 0.0
    for z, part in model.local.items():
        mine = seen[0].species == z
        pieces = model.local_pieces(z, [e.features[mine] for e in seen], [None] * len(seen))
        assert part.whiten_rest.dtype == torch.float32 and len(part.whiten_rest) == sum(
            k.shape[1] for k in pieces
        ) - sum(part.leading)
        first = torch.cat([k[:, :n] for k, n in zip(pieces, part.leading, strict=True)], dim=1)
        others = torch.cat([k[:, n:] for k, n in zip(pieces, part.leading, strict=True)], dim=1)
        others = others - first @ part.whiten_leading.T @ part.project.T
        of_y, of_z = rounding(part, pieces, others)
        y = (others @ part.whiten_rest.double().T).norm(dim=1)
        double = 1e-10 * float(prior.max())
        off = (prior[mine] - found.inducing[mine] - explained[mine]).abs()
        known = prior[mine] > explained[mine] + double
        assert (off <= 2 * y * of_y + of_y.square() + double)[known].all()
        assert ((found.data[mine].sqrt() - left[mine].sqrt()).abs() <= of_z + double**0.5).all()
        largest = max(largest, float(off.max()))
    assert largest > 1e-13  # single precision it was
    std, exact = found.total.sqrt(), ((prior - explained).clamp_min(0) + left).sqrt()
    torch.testing.assert_close(std, exact, rtol=1e-3, atol=0)


def test_as_many_leading_columns_as_rounding_asks_for(monkeypatch):
    """Labels that pin energies down better leave less, of which rounding is a larger part; in the end all is in double precision."""
    monkeypatch.setattr(local_variance, "LEADING", 6)
    model, leading = model_of("polynomial 4"), []
    sure = replace(model, factor=100 * model.factor)  # standard deviations of what data leave: 0.01 of what they were
    for one, tolerance in ((model, 1.0), (model, 1e-6), (sure, 1e-6), (model, 1e-14)):
        monkeypatch.setattr(local_variance, "TOLERANCE", tolerance)
        one = replace(one)  # without what was made before
        leading.append({z: part.leading[0] for z, part in one.local.items()})
        start = 0
        for block, lower in zip(one.blocks[0], one.lowers, strict=True):
            here = slice(start, start + len(lower))
            start = here.stop
            rows = torch.zeros(len(lower), one.n_columns, dtype=torch.float64)
            rows[:, here] = lower @ lower.T
            a, left = one.whiten(rows)
            explained, found = one.local[block.species]([rows[:, here]])
            off = (explained - a.square().sum(1)).abs() + (found - left.square().sum(1)).abs()
            assert (0.5 * off / left.square().sum(1)).quantile(0.99) <= max(1.01 * tolerance, 1e-7)
    first, more, most, every = leading
    assert set(first.values()) == {6} and all(6 <= more[z] <= most[z] <= every[z] for z in first)
    assert sum(first.values()) < sum(more.values()) < sum(most.values())
    assert every == {b.species: b.n_columns for b in model.blocks[0]}


def test_squares_are_those_of_all_columns(few):
    """By the definition, for any k at all: not only for what a kernel can give."""
    model = model_of("two descriptors")
    widths = [len(lower) for lower in model.lowers]
    generator = torch.Generator().manual_seed(3)
    z = model.blocks[0][1].species
    pieces = [torch.rand(5, w, generator=generator, dtype=torch.float64) for w in (widths[1], widths[4])]
    row = torch.zeros(5, sum(widths), dtype=torch.float64)
    row[:, widths[0] : sum(widths[:2])], row[:, sum(widths[:4]) : sum(widths[:5])] = pieces
    a, left = model.whiten(row)
    explained, found = model.local[z](pieces)
    torch.testing.assert_close(explained, a.square().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(found, left.square().sum(1), rtol=1e-5, atol=0)


def test_what_the_mean_knows_of_the_kernel_is_used(few):
    model = model_of("polynomial 3")
    seen = looks(model, everything())
    x, species, kernel = seen[0].features, seen[0].species, model.priors[0].kernel
    known = {b.species: kernel.profile(x[species == b.species] @ b.features.T) for b in model.blocks[0]}
    alone, shared = model.atom_energies(seen), model.atom_energies(seen, profiles=[known])
    assert torch.equal(alone.inducing, shared.inducing) and torch.equal(alone.data, shared.data)
    doubled = model.atom_energies(seen, profiles=[{z: tuple(2 * part for part in p) for z, p in known.items()}])
    assert (doubled.data > 3.9 * shared.data).all()


def test_a_species_without_inducing_variables_has_its_prior(few):
    model = model_of("polynomial 2")
    z = model.blocks[0][0].species
    lacking = replace(model, blocks=(model.blocks[0][1:],), lowers=model.lowers[1:])
    n = len(model.lowers[0])
    lacking = replace(lacking, signal=model.signal[n:], factor=model.factor[n:, n:])
    seen = looks(model, everything())
    found = lacking.atom_energies(seen, "dtc")
    mine = seen[0].species == z
    assert mine.any() and (found.inducing[mine] == model.priors[0].signal[z] ** 2).all()
    assert (found.data[mine] == 0).all() and (found.data[~mine] > 0).all()
    inducing, data = lacking.local_energy_variance(z, [], torch.ones(3).double())
    assert inducing.tolist() == [0.7 * model.priors[0].signal[z] ** 2] * 3 and not data.any()


@pytest.fixture(scope="module")
def silicon():
    """As many columns as large models have."""
    structures, known = gpmlp.read("data/silicon/train.xyz", "::2")
    choices = {
        "descriptor": {"n_max": 6, "l_max": 4},
        "inducing": {"n": 600, "gradients": 0},
        "kernel": {"zeta": 3},
        "calibration": False,
    }
    return gpmlp.fit(structures, known, Recipe.model_validate(choices))[0]


def elsewhere() -> dict[str, list[ase.Atoms]]:
    """Silicon as no training structure has it."""

    def made(kind: str, a: float, times: int, by: float) -> ase.Atoms:
        atoms = bulk("Si", kind, a, cubic=True).repeat(times)
        atoms.rattle(by, seed=7)
        return atoms

    sheared = made("diamond", 5.43, 2, 0.05)
    sheared.set_cell(sheared.cell.array @ (np.eye(3) + 0.1 * np.eye(3, k=1)), scale_atoms=True)
    return {
        "compressed": [made("diamond", 4.4, 2, 0.05)],
        "stretched": [made("diamond", 6.6, 2, 0.05)],
        "sheared": [sheared],
        "liquid-like": [made("diamond", 5.43, 2, 0.6)],
        "other phases": [made("fcc", 3.9, 2, 0.05), made("bcc", 3.1, 2, 0.05), made("sc", 2.6, 2, 0.05)],
        "gas": [ase.Atoms("Si4", [[0, 0, 0], [2.5, 0, 0], [0, 2.8, 0], [3, 3, 1.0]])],
    }


@pytest.mark.parametrize("kind", ["training", "test", *elsewhere()])
def test_standard_deviations_are_those_by_solves_wherever_atoms_are(silicon, kind):
    """Near the data and far away; the largest is 5e-4 of itself here (decision 009: 6e-4, with 1000 columns), which rounding may double."""
    if kind in ("training", "test"):
        some = gpmlp.read(f"data/silicon/{kind.removesuffix('ing')}.xyz", "::4")[0]
    else:
        some = structures_from_ase(elsewhere()[kind])
    model, seen = silicon.variances, [term.environments(some).environments for term in silicon.terms]
    assert len(next(iter(model.local.values())).whiten_rest) > 400
    prior, explained, left = by_solves(model, seen)
    for form in ("scaled", "dtc"):
        exact = (model.inducing_share(form) * (prior - explained).clamp_min(0) + left).sqrt()
        torch.testing.assert_close(model.atom_energies(seen, form).total.sqrt(), exact, rtol=1e-3, atol=0)


def test_a_saved_model_says_the_same_to_the_last_bit_whatever_the_threads(silicon, tmp_path):
    gpmlp.save(silicon, tmp_path / "model")
    some = gpmlp.read("data/silicon/test.xyz", "::9")[0]
    here = silicon(some, "atom_energies").atom_energies_variance
    before = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            there = gpmlp.load(tmp_path / "model")(some, "atom_energies").atom_energies_variance
            assert torch.equal(here.inducing, there.inducing) and torch.equal(here.data, there.data)
    finally:
        torch.set_num_threads(before)


def test_single_descriptors_change_nothing_here(silicon):
    """Of the same features, variances are the same whether or not descriptors are in single precision."""
    seen = [term.environments(gpmlp.read("data/silicon/test.xyz", "3")[0]).environments for term in silicon.terms]
    single = silicon.to(descriptors="float32")
    assert isinstance(single.terms[0].descriptor, SinglePrecisionDescriptor)
    assert torch.equal(single.variances.atom_energies(seen).data, silicon.variances.atom_energies(seen).data)
