"""Four-body invariants: sums over triples of neighbours, invariance, what only they tell apart, their constants, their recipe."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import oracles
import pytest
import torch
from ase.build import bulk
from systems import (
    CUTOFF,
    DESCRIPTORS,
    KERNELS,
    cluster,
    descriptor,
    everything,
    force_sigma_by_core,
    random_term,
    structure,
    surroundings_of,
    targets_of,
)

import gpmlp
from gpmlp.core import neighbors
from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Targets
from gpmlp.core.stored_tensors import StoredTensors
from gpmlp.core.structures import Structures
from gpmlp.descriptors import learn_descriptor, make_descriptor
from gpmlp.descriptors.backends import FourBodySoap
from gpmlp.descriptors.four_body import couplings
from gpmlp.fitting import defaults, four_body_choice, prepare
from gpmlp.fitting.fit import fit
from gpmlp.io import archive, ase_atoms
from gpmlp.native import library
from gpmlp.potential import baselines
from gpmlp.potential.compiled import build_calibration, build_novelty, build_variances, compile_mean
from gpmlp.potential.potential import Potential
from gpmlp.recipe import DescriptorRecipe, FourBodyRecipe, Recipe

CASE = "four-body soap"
SOME = Structures.concatenate([cluster((1, 6, 8, z), 60 + k) for k, z in enumerate((1, 6, 8))])  # it was learned from


@pytest.fixture(scope="module")
def made() -> FourBodySoap:
    return descriptor(CASE)


def of_environments(structures: Structures) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Species and vectors of the neighbours of each atom."""
    all_of = surroundings_of(structures)
    mine = [all_of.centers == e for e in range(len(all_of))]
    return [(all_of.neighbor_species[m], all_of.vectors[m]) for m in mine]


def test_invariants_are_sums_over_triples_of_neighbours(made):
    heap = cluster()
    expansion = made.spectrum.expand(surroundings_of(heap))
    invariants = made.four_body.invariants(made.four_body.channel_densities(expansion.density))
    full = []
    for e, (species, vectors) in enumerate(of_environments(heap)):
        by_degrees = oracles.four_body_by_triples(made, species, vectors)
        assert list(by_degrees) == [c.degrees for c in made.four_body.couplings]
        expected = [by_degrees[c.degrees].flatten()[c.channels] * c.factors for c in made.four_body.couplings]
        torch.testing.assert_close(invariants[e], torch.cat(expected), atol=1e-14, rtol=1e-10)
        full.append(torch.cat([by_degrees[c.degrees].flatten() for c in made.four_body.couplings]))
    # those left out are equal to others: dot products are those of all
    full = torch.stack(full)
    torch.testing.assert_close(invariants @ invariants.T, full @ full.T, atol=1e-14, rtol=1e-10)
    assert invariants.shape[1] < full.shape[1]


def features_by_triples(made: FourBodySoap, center: int, species: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """[full power spectrum, four-body part] of unit length, the power spectrum by pair sums: for dot products."""
    pairs = oracles.soap_by_pairs(made.spectrum, center, species, vectors)
    spectrum = torch.cat([pairs[key].flatten() for key in sorted(pairs)])
    by_degrees = oracles.four_body_by_triples(made, species, vectors)
    b = torch.cat([by_degrees[c.degrees].flatten()[c.channels] * c.factors for c in made.four_body.couplings])
    slot, four = made.spectrum.species.index(center), made.four_body
    v = four.weight / four.lengths[slot] * b
    both = torch.cat([spectrum / spectrum.norm(), v])
    return both / both.norm()


def test_features_and_derivatives_equal_brute_force_and_its_autograd(made):
    heap = cluster()
    species, all_of = heap.species.tolist(), surroundings_of(heap)
    environments, brute, other = made(all_of), [], 3
    target = features_by_triples(made, species[other], *of_environments(heap)[other]).detach()
    pulled = environments.pull_back(environments.features[other].expand(len(heap.species), -1))
    along = environments.jacobian() @ environments.features[other]
    for e, (of, vectors) in enumerate(of_environments(heap)):
        vectors = vectors.clone().requires_grad_()
        x = features_by_triples(made, species[e], of, vectors)
        (slope,) = torch.autograd.grad(x @ target, vectors)
        mine = all_of.centers == e
        torch.testing.assert_close(pulled[mine], slope, atol=1e-12, rtol=0)
        torch.testing.assert_close(along[mine], slope, atol=1e-12, rtol=0)
        brute.append(x.detach())
    dots = environments.features @ environments.features.T
    torch.testing.assert_close(dots, torch.stack(brute) @ torch.stack(brute).T, atol=1e-13, rtol=0)


def test_gradcheck_through_the_reference(made):
    all_of = surroundings_of(cluster((6, 8, 1)))

    def features(vectors):
        return made.reference(replace(all_of, vectors=vectors)).features

    assert torch.autograd.gradcheck(features, (all_of.vectors.clone().requires_grad_(),), eps=1e-5, atol=1e-7)


@pytest.mark.parametrize("reflected", [False, True])
def test_rotations_and_reflections_change_nothing(made, reflected):
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    turn = turn * turn.det().sign() * (-1.0 if reflected else 1.0)
    assert (turn.det() < 0) == reflected
    all_of = surroundings_of(everything())
    turned = replace(all_of, vectors=all_of.vectors @ turn.T)
    torch.testing.assert_close(made(turned).features, made(all_of).features, atol=1e-12, rtol=0)


def test_a_neighbour_comes_and_goes_without_a_step(made):
    """A fourth neighbour at the cutoff changes neither features nor Jacobian of the others: errors fall as the cube of the distance."""
    steps = []
    for inside in (1e-2, 1e-3):
        positions = [
            [0, 0, 0],
            [1.2, 0, 0],
            [0, 1.3, 0.2],
            [-0.3, 0.1, 1.4],
            [0, (CUTOFF - inside) * 0.6, (CUTOFF - inside) * 0.8],
        ]
        four, three = (surroundings_of(structure(positions[:k], [6, 1, 8, 1, 6][:k])).select([0]) for k in (5, 4))
        near, without = made(four), made(three)
        steps.append(float((near.features - without.features).norm()))
        last = int(four.vectors.norm(dim=1).argmax())
        assert float(near.jacobian()[last].norm()) < 100 * inside**2
    assert steps[0] < 1e-4 and steps[1] < 2e-3 * steps[0]


def test_degrees_of_the_couplings_are_even_and_meet_the_triangle_rule():
    degrees = [c.degrees for c in couplings(4, 2)]
    assert degrees == [
        (1, 1, 2),
        (1, 2, 3),
        (1, 3, 4),
        (2, 2, 2),
        (2, 2, 4),
        (2, 3, 3),
        (2, 4, 4),
        (3, 3, 4),
        (4, 4, 4),
    ]
    assert [len(c.channels) for c in couplings(4, 5)] == [75, 125, 125, 35, 75, 75, 75, 75, 35]


# what only they tell apart --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probe():
    sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
    yield importlib.import_module("body_order")
    sys.path.pop(0)


def test_environments_that_no_power_spectrum_tells_apart_are_told_apart(probe):
    vectors, energies = probe.degenerate(20, torch.Generator().manual_seed(0))
    pairs = probe.environments(vectors, (6, 1, 1, 1, 1))
    both = learn_descriptor((1, 6), probe.DESCRIPTORS["nu 2 and 3"], pairs, 0)
    assert (energies[::2] - energies[1::2]).abs().min() > 1e-3
    for made, least, most in ((both.spectrum, 0.0, 1e-12), (both, 1e-3, 1.0)):
        x = probe.features(made, pairs)
        apart = (x[::2] - x[1::2]).norm(dim=1)
        assert least < float(apart.min()) + 1e-300 and float(apart.max()) < most


def test_energies_of_body_order_four_are_learned_that_nu_2_cannot_learn(probe):
    two, three = probe.DESCRIPTORS.values()
    for zeta in (1, 2, 4):
        assert probe.unlearned(two, "degenerate pairs", zeta, 200) > 0.5
        assert probe.unlearned(three, "degenerate pairs", zeta, 200) < 0.02
    # a linear kernel of the power spectrum is a sum over pairs of neighbours, which a dihedral angle is not
    assert probe.unlearned(two, "dihedral angle", 1, 1000) > 0.5
    assert probe.unlearned(three, "dihedral angle", 1, 1000) < 0.2


# constants ------------------------------------------------------------------------------------------------------------------


def test_constants_do_not_depend_on_what_is_predicted_and_are_learned_again_the_same(made):
    again = descriptor(CASE)
    assert all(torch.equal(again.constants[name], value) for name, value in made.constants.items())
    whole = made(surroundings_of(everything())).features
    first = everything().select([0])
    assert torch.allclose(made(surroundings_of(first)).features, whole[: first.n_atoms], atol=1e-14, rtol=0)


def test_channels_hold_most_of_the_density_of_the_environments_they_were_learned_from(made):
    """No other channels of as many leave less of it out: those of the largest singular values."""
    density = made.spectrum.expand(surroundings_of(SOME)).density
    for l, channels in enumerate(made.four_body.channels, 1):
        of_l = density[:, :, l * l : (l + 1) ** 2].transpose(1, 2).flatten(0, 1)
        left = of_l - of_l @ channels @ channels.T
        singular = torch.linalg.svdvals(of_l)
        torch.testing.assert_close(
            left.square().sum(), singular[channels.shape[1] :].square().sum(), rtol=1e-8, atol=1e-14
        )


def test_the_part_of_four_bodies_has_the_weight_for_its_length_on_average(made):
    x, all_of = made(surroundings_of(SOME)).features, surroundings_of(SOME)
    of_pairs, of_triples = x.split([made.spectrum.n_features, made.four_body.n_features], dim=1)
    ratio = of_triples.norm(dim=1) / of_pairs.norm(dim=1)
    for z in (1, 6, 8):
        torch.testing.assert_close(ratio[all_of.species == z].mean(), torch.tensor(0.5).double(), rtol=1e-12, atol=0)


def test_a_species_without_neighbours_in_the_data_has_no_four_body_part():
    lonely = Structures.concatenate([cluster((6, 6, 6, 6)), structure([[0, 0, 0]], [1])])
    learned = learn_descriptor((1, 6), DESCRIPTORS[CASE], lonely, 0)
    x = learned(surroundings_of(lonely)).features
    assert torch.isfinite(x).all() and not x[-1, learned.spectrum.n_features :].any()
    assert x[0, learned.spectrum.n_features :].any()


@pytest.mark.parametrize("l_max", [2, 3, 4])
def test_invariants_that_are_zero_by_symmetry_are_not_rounding_made_large(l_max):
    """Around an atom of a perfect cubic crystal the densities of l = 1, 2 and 3 vanish."""
    crystals = ase_atoms.from_ase([bulk("Cu", cubic=True, a=a) for a in (3.5, 3.6, 3.7)])[0]
    choices = DESCRIPTORS[CASE] | {"l_max": 4, "four_body": {"channels": 2, "l_max": l_max, "weight": 0.5}}
    learned = learn_descriptor((29,), choices, crystals, 0)
    of_four = learned(surroundings_of(crystals)).features[:, learned.spectrum.n_features :].norm(dim=1)
    assert (of_four > 0.01).all() if l_max == 4 else (of_four < 1e-12).all()


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("channels", lambda t: 2 * t, "channels of four-body invariants are not orthonormal"),
        ("lengths", lambda t: -t, "length of four-body invariants is not positive"),
        ("lengths", lambda t: t.float(), "lengths"),
        ("channels", lambda t: t[:, :, :1].contiguous(), "channels"),
    ],
)
def test_constants_that_do_not_fit_are_refused(made, name, change, message):
    stored = made.constants | {name: change(made.constants[name])}
    with pytest.raises(UserError, match=message):
        make_descriptor((1, 6, 8), DESCRIPTORS[CASE], StoredTensors(stored))


# fits -----------------------------------------------------------------------------------------------------------------------

TRUTH = random_term(descriptor(CASE), KERNELS["polynomial 2"])
FOUR_BODY = {"cutoff": CUTOFF, "n_max": 3, "l_max": 3, "four_body": {"channels": 3, "weight": 0.3}}
SMALL = {"descriptor": FOUR_BODY, "kernel": {"zeta": 2}, "inducing": {"n": 15, "gradients": 4}}


def labelled(seeds) -> tuple[Structures, Targets]:
    some = Structures.concatenate([cluster((6, 8, 1, 6), k, 2.8) for k in seeds])
    return some, targets_of(some, TRUTH(some))


@pytest.fixture(scope="module")
def potential() -> Potential:
    return fit(*labelled(range(40)), Recipe.model_validate(SMALL))[0]


def test_they_lower_the_evidence_of_an_energy_that_has_them():
    data = labelled(range(40))
    with_, without = (
        fit(*data, Recipe.model_validate(SMALL | {"descriptor": FOUR_BODY | {"four_body": value}}))[1]
        for value in (FOUR_BODY["four_body"], False)
    )
    assert with_.negative_log_evidence < without.negative_log_evidence - 10


def test_functionals_of_the_data_have_them_too(potential, tmp_path):
    asked = {"descriptor": FOUR_BODY, "kernel": {"zeta": 2}, "inducing": {"functionals": "all"}}
    exact, (new, truth) = fit(*labelled(range(30)), Recipe.model_validate(asked))[0], labelled([200, 201])
    archive.save(exact, tmp_path / "model.gpmlp")
    found, again = (p(new, variance="forces") for p in (exact, gpmlp.load(tmp_path / "model.gpmlp")))
    assert torch.equal(again.forces, found.forces)
    torch.testing.assert_close(again.forces_variance.total, found.forces_variance.total, rtol=1e-10, atol=0)
    # a pair closer than any of the data is repelled by ZBL
    assert (found.forces - truth.forces).abs().median() < 0.5 * truth.forces.abs().median()


@pytest.mark.skipif(library.compiled() is None, reason="gpmlp was built without a compiler")
def test_standard_deviations_of_forces_in_the_compiled_core(potential):
    """Which are made of Jacobians of those environments that the atom is part of, and of those pairs only."""
    (new, _), atoms = labelled([500, 501]), [0, 3, 6]
    core = compile_mean(potential.terms, potential.baselines, potential.species)
    build_variances(core.model, potential.variances, core.species, library.build, forces=True)
    build_novelty(core.model, potential.novelty, core.species, library.build)
    build_calibration(core.model, potential.calibration, potential.variances, library.build)
    found = force_sigma_by_core(core.model, new, neighbors.find_neighbors(new, potential.reach), atoms)
    wanted = potential(new, variance="forces", atoms=atoms).forces_variance.total[atoms].sqrt()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def test_a_weight_that_is_left_open_is_that_of_the_largest_evidence(monkeypatch):
    data, asked = (
        labelled(range(30)),
        Recipe.model_validate(SMALL | {"descriptor": FOUR_BODY | {"four_body": {"channels": 3, "weight": None}}}),
    )
    values = {0.03: 5.0, 0.1: 2.0, 0.3: 3.0}
    recipe, base, *_ = prepare.set_up(*data, asked)
    remaining = prepare.subtract_baselines(*data, base)
    chosen, said = four_body_choice.settle(recipe, data[0], remaining)
    assert not said
    assert chosen.descriptors[0].four_body.weight in values
    monkeypatch.setattr(
        four_body_choice, "_negative_log_evidence", lambda r, *_: values[r.descriptors[0].four_body.weight]
    )
    potential, _ = fit(*data, asked)
    assert potential.recipe.descriptors[0].four_body.weight == 0.1
    assert potential.terms[0].descriptor.four_body.weight == 0.1


def chosen(
    structures: Structures, targets: Targets, growing: bool = False, **changes
) -> tuple[FourBodyRecipe | bool, str]:
    """Four-body section of the recipe of a fit that leaves them open, or of a learning run, and what is said of the choice."""
    asked = Recipe.model_validate({"descriptor": {k: v for k, v in FOUR_BODY.items() if k != "four_body"}} | changes)
    recipe, base, *_ = prepare.set_up(structures, targets, asked, growing)
    remaining = prepare.subtract_baselines(structures, targets, base)
    full, said = four_body_choice.settle(recipe, structures, remaining, growing)
    return full.descriptors[0].four_body, said


def test_molecules_have_them_where_the_evidence_of_the_exact_process_rises():
    structures, targets = labelled(range(12))
    section, said = chosen(structures, targets)
    assert isinstance(section, FourBodyRecipe) and said.startswith("four-body invariants: the evidence of ")
    # an energy of pairs, which the power spectrum has
    pairs = baselines.ZBL(
        {(a, b): 0.3 for a in (1, 6, 8) for b in (1, 6, 8)}, {(a, b): 3.0 for a in (1, 6, 8) for b in (1, 6, 8)}
    )
    section, said = chosen(structures, targets_of(structures, pairs(structures)), baseline={"zbl": False})
    assert section is False and said.startswith("no four-body invariants: ")


def test_nothing_is_asked_where_centres_limit_the_mean_or_labels_are_to_come():
    structures, targets = labelled(range(6))
    assert chosen(structures, targets, inducing={"n": 5}) == (False, "")
    assert chosen(structures, targets, growing=True) == (False, "")
    solid = replace(
        structures, cells=20 * torch.eye(3).double().expand(6, 3, 3), periodic=torch.ones(6, 3, dtype=torch.bool)
    )
    assert chosen(solid, targets) == (False, "")


# recipe ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section, message",
    [
        ({"name": "dscribe-soap", "four_body": {}}, "four_body needs the descriptor soap"),
        ({"l_max": 2, "four_body": {"l_max": 3}}, "not above the l_max of the descriptor, 2"),
        ({"l_max": 0, "four_body": True}, "2 or more, and not above the l_max of the descriptor, 0"),
        ({"four_body": {"channels": 0}}, "channels"),
        ({"four_body": {"weight": 0}}, "weight"),
        ({"four_body": {"kanals": 3}}, "kanals"),
    ],
)
def test_recipes_that_mean_nothing_are_refused(section, message):
    with pytest.raises(ValueError, match=message):
        DescriptorRecipe.model_validate(section)


def test_what_a_recipe_leaves_open_is_filled_in():
    summary = defaults.DataSummary({(14, 14): 2.3}, 2.35, True, 1000, 300)
    for given, n_max, expected in (
        (True, None, (5, 4, 0.1)),
        ({"channels": 9}, 3, (3, 4, 0.1)),
        ({"l_max": 2}, None, (5, 2, 0.1)),
    ):
        section = DescriptorRecipe(four_body=given, n_max=n_max)
        found = defaults._descriptor(section, summary, 1).four_body
        assert found == FourBodyRecipe(channels=expected[0], l_max=expected[1], weight=expected[2])
    assert defaults._descriptor(DescriptorRecipe(), summary, 1).four_body is False
    for l_max, expected in ((None, "auto"), (1, False)):
        assert defaults._descriptor(DescriptorRecipe(four_body="auto", l_max=l_max), summary, 1).four_body == expected
    with pytest.raises(UserError, match="four_body.l_max 5 is above the l_max of the descriptor, 4"):
        defaults._descriptor(DescriptorRecipe(four_body={"l_max": 5}), summary, 2)
