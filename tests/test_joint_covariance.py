"""Covariances of predictions with each other, and of functionals: the same posterior from which samples are drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import gpmlp
from gpmlp.core.errors import UserError
from gpmlp.core.units import VOIGT
from gpmlp.fitting.fit import fit
from gpmlp.potential.baselines import ZBL
from gpmlp.recipe import Recipe

KINDS = ("energies", "forces", "stresses")


@pytest.fixture(scope="module")
def silicon():
    structures, known = gpmlp.read("data/silicon/train.xyz", "::4")
    potential = fit(structures, known, Recipe(inducing={"n": 30, "gradients": 3}))[0]
    return potential, gpmlp.read("data/silicon/test.xyz")[0].select([0, 40])


def entries(prediction) -> torch.Tensor:
    """(samples, entries) energies, forces and stresses in the order of covariances."""
    stresses = torch.stack([prediction.stresses[..., a, b] for a, b in VOIGT], -1)
    return torch.cat([prediction.energies, prediction.forces.flatten(1), stresses.flatten(1)], dim=1)


@pytest.mark.parametrize("calibrated", [True, False])
def test_kinds_are_blocks_of_the_whole(silicon, calibrated):
    potential, some = silicon
    whole = potential.covariance(some, calibrated)
    sizes = dict(zip(KINDS, (len(some), 3 * some.n_atoms, 6 * len(some)), strict=True))
    places = dict(zip(KINDS, torch.arange(len(whole)).split(list(sizes.values())), strict=True))
    for kinds in (["energies"], ["forces"], ["stresses"], ["stresses", "energies"], ["energies", "forces"]):
        at = torch.cat([places[kind] for kind in KINDS if kind in kinds])
        found = potential.covariance(some, calibrated, kinds)
        scale = whole.diagonal()[at].clamp_min(1e-12).sqrt()  # symmetry forbids some
        assert ((found - whole[at][:, at]) / scale / scale[:, None]).abs().max() < 1e-8


@pytest.mark.parametrize("calibrated", [True, False])
def test_functionals_are_sums_of_entries(silicon, calibrated):
    potential, some = silicon
    generator = torch.Generator().manual_seed(0)
    shapes = {"energies": (3, 2), "forces": (3, some.n_atoms, 3), "stresses": (3, 2, 3, 3)}
    weights = {kind: torch.randn(shape, generator=generator, dtype=torch.float64) for kind, shape in shapes.items()}
    found = potential.functional(some, weights, calibrated)
    mean = potential(some)
    value = sum((weights[kind].flatten(1) * getattr(mean, kind).flatten()).sum(1) for kind in KINDS)
    torch.testing.assert_close(found.value, value, rtol=1e-10, atol=1e-10)
    symmetric = weights["stresses"] + weights["stresses"].mT
    voigt = torch.stack([symmetric[..., a, b] / (2 if a == b else 1) for a, b in VOIGT], -1)
    rows = torch.cat([weights["energies"], weights["forces"].flatten(1), voigt.flatten(1)], 1)
    expected = rows @ potential.covariance(some, calibrated) @ rows.T
    if calibrated:
        novelty = potential(some, novelty=True).novelty.max()
        expected *= max(1.0, float(novelty) / potential.calibration.typical_novelty)
    torch.testing.assert_close(found.covariance, expected, rtol=1e-7, atol=1e-9)
    one = potential.functional(some, {kind: w[1] for kind, w in weights.items()}, calibrated)
    torch.testing.assert_close(one.std, found.std[1], rtol=1e-9, atol=0)
    energy = potential.functional(some, {"energies": torch.tensor([1.0, -1.0])}, False)
    block = potential.covariance(some, False, ["energies"])
    torch.testing.assert_close(energy.std**2, block[0, 0] + block[1, 1] - 2 * block[0, 1], rtol=1e-7, atol=1e-12)


def test_nuclear_repulsion_is_as_unsure_as_it_is_large(silicon):
    """Of bonds shorter than those of the data nothing was learned: all kinds together, calibrated only; nothing where it is zero."""
    potential, some = silicon
    (repulsion,) = (b for b in potential.baselines if isinstance(b, ZBL))
    bare = replace(potential, baselines=tuple(b for b in potential.baselines if b is not repulsion))
    short = replace(some, positions=some.positions.clone())
    near = short.positions[1] - short.positions[0]
    short.positions[1] -= 0.5 * near
    generator = torch.Generator().manual_seed(3)
    forces = torch.randn(2, some.n_atoms, 3, generator=generator, dtype=torch.float64)
    energies, stresses = torch.eye(2, dtype=torch.float64), torch.randn(2, 2, 3, 3, generator=generator).double()
    weights = {"energies": energies, "forces": forces, "stresses": stresses}
    found = repulsion(short)
    parts = [(w.flatten(1) @ getattr(found, kind).double().flatten()) for kind, w in weights.items()]
    added = torch.stack(parts).sum(0)
    assert float(added.abs().max()) > 0.1
    more = potential.functional(short, weights).covariance - bare.functional(short, weights).covariance
    torch.testing.assert_close(more, torch.outer(added, added), rtol=1e-5, atol=1e-7)
    raw = (p.functional(short, weights, calibrated=False).covariance for p in (potential, bare))
    torch.testing.assert_close(*raw)


def test_functionals_of_novel_structures_are_wider(silicon):
    """By the root of the largest novelty among the structures whose weights are not zero, and not below what is typical."""
    potential, some = silicon
    potential = replace(potential, baselines=tuple(b for b in potential.baselines if not isinstance(b, ZBL)))
    far = replace(some, positions=some.positions.clone())
    first = some.structure_of_atom == 0
    far.positions[first] += 0.4 * torch.randn(int(first.sum()), 3, generator=torch.Generator().manual_seed(1))
    novelty, typical = potential(far, novelty=True).novelty, potential.calibration.typical_novelty
    of_structure = torch.stack([novelty[far.structure_of_atom == s].max() for s in (0, 1)]) / typical
    assert of_structure[0] > 2 * max(1.0, of_structure[1])
    plain = replace(potential, calibration=replace(potential.calibration, typical_novelty=None))
    one, both = torch.eye(2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    weights = torch.cat([one, both])
    of_atom = torch.randn(far.n_atoms, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    forces = torch.stack([of_atom * (far.structure_of_atom == s)[:, None] for s in (0, 1)])
    forces = torch.cat([forces, of_atom[None]])
    stresses = weights[:, :, None, None] * torch.eye(3, dtype=torch.float64)
    expected = of_structure.clamp_min(1.0).sqrt()[[0, 1, 0]].double()
    for given in (
        {"energies": weights},
        {"forces": forces},
        {"stresses": stresses},
        {"forces": forces, "energies": weights},
    ):
        wider = potential.functional(far, given).std / plain.functional(far, given).std
        torch.testing.assert_close(wider, expected, rtol=1e-5, atol=0)
    raw = potential.functional(far, {"energies": weights}, calibrated=False).std
    torch.testing.assert_close(raw, plain.functional(far, {"energies": weights}, calibrated=False).std)
    without = replace(potential, novelty=None)
    torch.testing.assert_close(
        without.functional(far, {"energies": weights}).std, plain.functional(far, {"energies": weights}).std
    )


def test_samples_are_drawn_from_the_calibrated_covariance(silicon):
    """4000 draws give each correlation to 1.6 %; six standard deviations."""
    potential, some = silicon
    drawn = entries(potential.sample(4000, seed=3)(some))
    expected = potential.covariance(some)
    scale = expected.diagonal().clamp_min(1e-20).sqrt()
    found = torch.cov(drawn.T)
    free = scale > 1e-6 * scale.max()
    difference = ((found - expected) / scale / scale[:, None])[free][:, free]
    assert difference.abs().max() < 0.14 and free.sum() > 20
    assert (
        (drawn[:, free].mean(0) - entries(potential(some).map(lambda v: v[None]))[0, free])
        .abs()
        .lt(0.1 * scale[free])
        .all()
    )


def test_bad_requests_are_explained(silicon):
    potential, some = silicon
    with pytest.raises(UserError, match="kind of observation"):
        potential.covariance(some, kinds=["virials"])
    with pytest.raises(UserError, match="got none"):
        potential.covariance(some, kinds=[])
    with pytest.raises(UserError, match="shape"):
        potential.functional(some, {"energies": torch.ones(3)})
    with pytest.raises(UserError, match="same number"):
        potential.functional(some, {"energies": torch.ones(2, 2), "stresses": torch.ones(3, 2, 3, 3)})
    with pytest.raises(UserError, match="got none"):
        potential.functional(some, {})
