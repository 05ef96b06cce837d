"""Compressed densities: the full spectrum where no channel is left out, brute force, what is learned and kept, fits, recipe."""

from __future__ import annotations

from dataclasses import replace

import oracles
import pytest
import torch
from systems import (
    CUTOFF,
    DESCRIPTORS,
    SPECIES,
    cluster,
    descriptor,
    everything,
    structure,
    surroundings_of,
)

from gpmlp.core.errors import UserError
from gpmlp.core.stored_tensors import StoredTensors
from gpmlp.core.structures import Structures
from gpmlp.descriptors import learn_descriptor, make_descriptor, most_features
from gpmlp.descriptors.backends import SoapPowerSpectrum
from gpmlp.fitting import defaults
from gpmlp.recipe import CompressionRecipe, DescriptorRecipe

CASE = "compressed soap"
KEPT = DESCRIPTORS[CASE]["compression"]["channels"]


@pytest.fixture(scope="module")
def made() -> SoapPowerSpectrum:
    return descriptor(CASE)


@pytest.mark.parametrize("by_core", [True, False])
def test_with_as_many_channels_as_there_are_it_is_the_full_spectrum(by_core):
    """Dot products, pulled-back cotangents and Jacobians, in the compiled core and in PyTorch."""
    all_of, found = surroundings_of(everything()), []
    for changes in ({"compression": {"channels": 9}}, {"compression": False}):
        one = descriptor(CASE, **changes)
        x = one(all_of) if by_core else one.reference(all_of)
        target = x.features[3]
        pulled = x.pull_back(target.expand(len(x.features), -1).contiguous())
        found.append((x.features @ x.features.T, pulled, x.jacobian() @ target))
    for compressed, full in zip(*found, strict=True):
        torch.testing.assert_close(compressed, full, atol=1e-12, rtol=0)


def compressed_by_pairs(made: SoapPowerSpectrum, species: int, neighbor_species, vectors) -> torch.Tensor:
    """Every product of channels and l: Pᵀ p P of the full spectrum as a sum over pairs of neighbours, divided by its length."""
    blocks, n = oracles.soap_by_pairs(made, species, neighbor_species, vectors), len(made.species)
    rows = [torch.cat([blocks[a, b] for b in made.species], dim=1) for a in made.species]
    p = torch.cat(rows, dim=0)
    assert p.shape[0] == n * made.n_max
    out = torch.einsum("lkq,kjl,ljr->qrl", made.compression.channels, p, made.compression.channels).flatten()
    return out / out.norm()


def test_features_and_derivatives_equal_brute_force_and_its_autograd(made):
    all_of, other, brute = surroundings_of(cluster()), 3, []
    environments = made(all_of)

    def by_pairs(e: int, vectors: torch.Tensor) -> torch.Tensor:
        return compressed_by_pairs(
            made, int(all_of.species[e]), all_of.neighbor_species[all_of.centers == e], vectors[all_of.centers == e]
        )

    target = by_pairs(other, all_of.vectors)
    pulled = environments.pull_back(environments.features[other].expand(len(all_of), -1).contiguous())
    along = environments.jacobian() @ environments.features[other]
    for e in range(len(all_of)):
        vectors = all_of.vectors.clone().requires_grad_()
        x = by_pairs(e, vectors)
        slope = torch.autograd.grad(x @ target, vectors)[0][all_of.centers == e]
        for ours in (pulled, along):
            torch.testing.assert_close(ours[all_of.centers == e], slope, atol=1e-12, rtol=0)
        brute.append(x.detach())
    dots = environments.features @ environments.features.T
    torch.testing.assert_close(dots, torch.stack(brute) @ torch.stack(brute).T, atol=1e-13, rtol=0)


@pytest.mark.parametrize("case", [CASE, "compressed four-body soap"])
def test_gradcheck_through_the_reference(case):
    made, all_of = descriptor(case), surroundings_of(cluster((6, 8, 1)))

    def features(vectors):
        return made.reference(replace(all_of, vectors=vectors)).features

    assert torch.autograd.gradcheck(features, (all_of.vectors.clone().requires_grad_(),), eps=1e-5, atol=1e-7)


def test_a_neighbour_comes_and_goes_without_a_step(made):
    steps = []
    for inside in (1e-2, 1e-3):
        last = [0, (CUTOFF - inside) * 0.6, (CUTOFF - inside) * 0.8]
        positions, species = [[0, 0, 0], [1.2, 0, 0], [0, 1.3, 0.2], last], [6, 1, 8, 6]
        near, far = (surroundings_of(structure(positions[:k], species[:k])).select([0]) for k in (4, 3))
        steps.append(float((made(near).features - made(far).features).norm()))
        assert float(made(near).jacobian()[int(near.vectors.norm(dim=1).argmax())].norm()) < 100 * inside**2
    assert 0 < steps[0] < 1e-4 and steps[1] < 2e-3 * steps[0]


# what is learned --------------------------------------------------------------------------------------------------------------


def test_channels_are_the_principal_ones_and_orthonormal(made):
    """Of densities and of their slopes by autograd, each species of neighbours counting alike: no others of as many hold more of them."""
    some = Structures.concatenate([cluster((*SPECIES, z), 60 + k) for k, z in enumerate(SPECIES)])
    sample = surroundings_of(some)
    density = made.density(sample)
    slopes = torch.autograd.functional.jacobian(lambda v: made.density(replace(sample, vectors=v)), sample.vectors)
    for l, p in enumerate(made.compression.channels):
        m = slice(l * l, (l + 1) ** 2)
        both = density[:, :, m].transpose(1, 2).reshape(-1, 9), slopes[:, :, m].permute(0, 2, 3, 4, 1).reshape(-1, 9)
        both = [part.unflatten(1, (len(SPECIES), -1)) for part in both]
        rows = torch.cat([(part / part.square().sum((0, 2), keepdim=True).sqrt()).flatten(1) for part in both])
        held, singular = (rows @ p).square().sum(), torch.linalg.svdvals(rows)
        torch.testing.assert_close(held, singular[:KEPT].square().sum(), rtol=1e-8, atol=1e-14)
        torch.testing.assert_close(p.T @ p, torch.eye(KEPT).double(), atol=1e-12, rtol=0)


def test_a_rare_species_is_not_lost():
    """One oxygen among hundreds of atoms: its neighbours still know where it is."""
    metal = [cluster((29,) * 6, k, 5.0) for k in range(40)]
    both = Structures.concatenate([*metal, cluster((29, 29, 29, 8), 99, 4.0)])
    learned = learn_descriptor((8, 29), DESCRIPTORS[CASE] | {"compression": {"channels": 2}}, both, 0)
    p = learned.compression.channels[0].unflatten(0, (2, -1))
    assert (p.square().sum((1, 2)) > 0.3).all()
    with_oxygen = learned.density(surroundings_of(cluster((29, 8), 99, 2.0))).flatten(1)
    assert with_oxygen[0].norm() > 0


def test_learned_again_it_is_the_same_and_does_not_depend_on_what_is_predicted(made):
    again, whole = descriptor(CASE), everything()
    assert torch.equal(again.compression.channels, made.compression.channels)
    first = whole.select([0])
    torch.testing.assert_close(
        made(surroundings_of(first)).features,
        made(surroundings_of(whole)).features[: first.n_atoms],
        atol=1e-14,
        rtol=0,
    )


def test_features_fewer_than_the_full_spectrum_has(made):
    assert made.n_features == KEPT * (KEPT + 1) // 2 * 4 == most_features(SPECIES, DESCRIPTORS[CASE])
    assert made(surroundings_of(cluster())).features.shape[1] == made.n_features
    assert make_descriptor(SPECIES, DESCRIPTORS[CASE]).n_features == 9 * 10 // 2 * 4


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: 2 * t, "channels of compression are not orthonormal"),
        (lambda t: t.float(), "compression"),
        (lambda t: t[:, :, :1].contiguous(), "compression"),
        (lambda t: t * torch.nan, "NaN"),
    ],
)
def test_constants_that_do_not_fit_are_refused(made, change, message):
    with pytest.raises(UserError, match=message):
        make_descriptor(SPECIES, DESCRIPTORS[CASE], StoredTensors({"compression": change(made.compression.channels)}))


# recipe ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section, message",
    [
        ({"name": "dscribe-soap", "compression": {}}, "compression needs the descriptor soap"),
        ({"compression": {"channels": 0}}, "channels"),
        ({"compression": {"kanals": 3}}, "kanals"),
        ({"compression": 12}, "compression"),
    ],
)
def test_recipes_that_mean_nothing_are_refused(section, message):
    with pytest.raises(ValueError, match=message):
        DescriptorRecipe.model_validate(section)


def test_what_a_recipe_leaves_open_is_filled_in():
    summary = defaults.DataSummary({(14, 14): 2.3}, 2.35, True, 1000, 300)
    for given, n_species, expected in ((True, 4, 12), ({"channels": 3}, 1, 3), ({"channels": 100}, 2, 12)):
        found = defaults._descriptor(DescriptorRecipe(compression=given), summary, n_species).compression
        assert found == CompressionRecipe(channels=expected)
    assert defaults._descriptor(DescriptorRecipe(n_max=2, compression=True), summary, 5).compression.channels == 10
    assert defaults._descriptor(DescriptorRecipe(), summary, 10).compression is False
