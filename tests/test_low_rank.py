"""Means of low rank: how many directions, what they change, files, and what is left exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_mean
import torch
from conftest import copper
from systems import CUTOFF, KERNELS, descriptor, everything, random_term, targets_of
from test_stepper import shaken

import gpmlp
from gpmlp.cli import main
from gpmlp.core.errors import UserError, chemical_symbol
from gpmlp.core.structures import Structures
from gpmlp.fitting import low_rank
from gpmlp.fitting.low_rank import SHARE_OF_NOISE, with_low_rank
from gpmlp.fitting.online import OnlineFit
from gpmlp.io import ase_atoms
from gpmlp.potential.potential import Potential
from gpmlp.recipe import Recipe

CHOICES = {
    "descriptor": {"cutoff": 4.0, "n_max": 6, "l_max": 4},
    "kernel": {"zeta": 2},
    "inducing": {"n": 60, "gradients": 0},
    "noise": {"force": 0.05, "energy_per_atom": 0.005, "stress": 0.01},
    "variance": False,
    "calibration": False,
    "novelty": False,
}


def recipe(**changes) -> Recipe:
    return Recipe.model_validate(CHOICES | {"mean": "low_rank"} | changes)


@pytest.fixture(scope="module")
def many():
    """Enough structures to hold some out."""
    return ase_atoms.from_ase([copper(seed, 1 + seed % 2) for seed in range(24)])


@pytest.fixture(scope="module", params=[2, 4], ids=["zeta 2", "zeta 4"])
def fitted(many, request):
    return gpmlp.fit(*many, recipe(kernel={"zeta": request.param}))


@pytest.fixture(scope="module")
def halves(many):
    structures = many[0]
    return structures.select(range(0, len(structures), 2)), structures.select(range(1, len(structures), 2))


def changes(potential: Potential, structures) -> dict[str, torch.Tensor]:
    """Root mean square change of each structure's forces, energy per atom and stress against the exact mean."""
    exact, found = potential.to(mean="exact")(structures), potential(structures)
    forces = (exact.forces - found.forces).square().mean(1)
    of = structures.structure_of_atom
    return {
        "forces": (torch.zeros(len(structures)).double().index_add_(0, of, forces) / structures.counts).sqrt(),
        "energies": ((exact.energies - found.energies) / structures.counts).abs(),
        "stresses": (exact.stresses - found.stresses).square().mean((1, 2)).sqrt(),
    }


def test_the_smallest_rank_that_changes_no_structure_by_more_than_its_share_of_the_noise(fitted, halves):
    potential, numbers = with_low_rank(fitted[0].to(mean="exact"), *halves)
    (form,) = potential.terms[0].low_rank.values()
    rank = form.rank
    assert numbers["rank"] == {"0:Cu": rank} and numbers["features"] == {"0:Cu": 105} and 0 < rank < 70
    assert numbers["structures"] == len(halves[1])
    found = changes(potential, halves[1])
    for (kind, each), unit in zip(found.items(), ("eV_per_A", "eV_per_atom", "eV_per_A3"), strict=True):
        assert numbers[f"change_of_{kind}_{unit}"] == pytest.approx(float(each.square().mean().sqrt()), rel=1e-6)
        assert numbers[f"worst_change_of_{kind}_{unit}"] == pytest.approx(float(each.max()), rel=1e-6)
        assert numbers[f"noise_of_{kind}_{unit}"] == potential.noise[kind]
        assert 0 < float(each.max()) <= SHARE_OF_NOISE * potential.noise[kind]
    (term,) = potential.terms
    less = low_rank._directions(term, halves[0], 0)[29].leading(rank - 1)
    found = changes(replace(potential, terms=(replace(term, low_rank={29: less}),)), halves[1])
    assert any(float(each.max()) > SHARE_OF_NOISE * potential.noise[kind] for kind, each in found.items())


def test_a_larger_noise_needs_fewer_directions(fitted, halves):
    exact = fitted[0].to(mean="exact")
    ranks = [
        with_low_rank(replace(exact, noise={k: by * v for k, v in exact.noise.items()}), *halves)[1]["rank"]["0:Cu"]
        for by in (1, 10)
    ]
    assert ranks[1] < ranks[0]


def test_all_directions_are_the_exact_mean(fitted, halves):
    """Of a real fit, whose features do not fill their space, so that the whitening is all but singular."""
    (term,) = fitted[0].terms
    (directions,) = low_rank._directions(term, halves[0], 0).values()
    x = term.environments(halves[1]).environments.features
    for found, expected in zip(directions.leading(x.shape[1])(x), directions.exact(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_directions_are_those_that_forces_feel(fitted, halves, monkeypatch):
    """Eigenvectors of the matrix itself, whatever features do, are far more for the same change of forces."""
    exact = fitted[0].to(mean="exact")
    rank = with_low_rank(exact, *halves)[1]["rank"]["0:Cu"]
    monkeypatch.setattr(low_rank, "_whitening", lambda x, *_: torch.eye(x.shape[1]).to(x))
    numbers = with_low_rank(exact, *halves)[1]
    assert numbers is None or numbers["rank"]["0:Cu"] > 1.1 * rank


def test_the_moment_of_jacobians_is_what_pulling_back_gives(fitted, halves, monkeypatch):
    """cᵀ A c is the mean over environments of |∂(c·x)/∂r|²; from some of the rows nearly so."""
    (term,) = fitted[0].terms
    view = term.environments(halves[0])
    n, d = len(view.surroundings), term.descriptor.n_features
    along = torch.randn(d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = float(view.environments.pull_back(along.expand(n, d).contiguous()).square().sum() / n)
    few = low_rank._jacobian_moment(term.descriptor, view, torch.arange(n), torch.Generator().manual_seed(0))
    monkeypatch.setattr(low_rank, "ROWS", 10**6)
    all_rows = low_rank._jacobian_moment(term.descriptor, view, torch.arange(n), torch.Generator().manual_seed(0))
    assert float(along @ all_rows @ along) == pytest.approx(expected, rel=1e-9)
    assert not torch.equal(few, all_rows) and float(along @ few @ along) == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("tangents", [False, True], ids=["values", "gradients"])
@pytest.mark.parametrize("kernel", ["polynomial 4", "exponential", "sum"])
def test_second_derivatives_are_those_of_the_mean(kernel, tangents, monkeypatch):
    """Along as many directions as there are features, against differences of slopes; whitened on both sides."""
    monkeypatch.setattr(low_rank, "ALONG", 12)
    generator = torch.Generator().manual_seed(0)
    block, x = test_mean.block(9, 12, tangents), test_mean.unit(4, 12, seed=5)
    lower = torch.tril(torch.randn(12, 12, generator=generator, dtype=torch.float64))
    drawn = torch.randn(12, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = low_rank._second_derivatives(block, KERNELS[kernel], lower, x, torch.Generator().manual_seed(2))
    for k in range(12):
        step = 1e-4 * (lower @ drawn[:, k])
        ahead, behind = (block(KERNELS[kernel], x + s * step)[1] for s in (1, -1))
        expected = (ahead - behind) / 2e-4 @ lower
        torch.testing.assert_close(found[:, :, k], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_several_descriptors_and_species():
    """Changes are those of whole predictions, and only cheaper forms are kept."""
    batch = Structures.concatenate([shaken(everything(), 0.05, seed) for seed in range(6)])
    targets = targets_of(batch, random_term(descriptor("soap optimal"), KERNELS["polynomial 3"])(batch))
    choices = {
        "descriptor": [{"cutoff": CUTOFF, "n_max": 3, "l_max": 3}, {"cutoff": 2.8, "n_max": 2, "l_max": 1}],
        "kernel": [{"zeta": 2}, {"zeta": 3}],
        "noise": {"energy_per_atom": 0.01, "force": 0.1},
    }
    exact = gpmlp.fit(batch, targets, recipe(**choices))[0].to(mean="exact")
    known, others = batch.select(range(0, 48, 2)), batch.select(range(1, 48, 2))
    potential, numbers = with_low_rank(exact, known, others)
    assert {label[0] for label in numbers["rank"]} == {"0", "1"} and len(numbers["rank"]) > 3
    found = changes(potential, others)
    assert numbers["worst_change_of_forces_eV_per_A"] == pytest.approx(float(found["forces"].max()), rel=1e-3, abs=1e-9)
    assert numbers["worst_change_of_energies_eV_per_atom"] == pytest.approx(
        float(found["energies"].max()), rel=1e-3, abs=1e-9
    )
    assert float(found["forces"].max()) <= SHARE_OF_NOISE * 0.1
    for k, term in enumerate(potential.terms):
        for z, form in term.low_rank.items():
            assert numbers["rank"][f"{k}:{chemical_symbol(z)}"] == form.rank
            assert form.products < replace(term, exact=True).cheaper_means.get(z, term.blocks[z]).products


def test_both_forms_are_in_the_file(fitted, many, tmp_path):
    """And the exact one is to the last bit that of a fit which has no other."""
    potential, report = fitted
    assert potential.recipe.mean == "low_rank" and report.low_rank == potential.report["low_rank"]
    gpmlp.save(potential, tmp_path / "m.gpmlp")
    again, structures = gpmlp.load(tmp_path / "m.gpmlp"), many[0]
    assert torch.equal(again(structures).forces, potential(structures).forces)
    plain = gpmlp.fit(*many, recipe(mean="exact", kernel={"zeta": potential.recipe.kernels[0].zeta}))[0]
    assert not plain.terms[0].low_rank and plain.report["low_rank"] is None
    exact = again.to(mean="exact")
    assert torch.equal(exact(structures).forces, plain(structures).forces)
    assert not torch.equal(exact(structures).forces, potential(structures).forces)
    gpmlp.save(exact, tmp_path / "e.gpmlp")
    back = gpmlp.load(tmp_path / "e.gpmlp")
    assert torch.equal(back(structures).forces, plain(structures).forces)
    assert torch.equal(back.to(mean="low_rank")(structures).forces, potential(structures).forces)
    single = potential.to(descriptors="float32")(structures).forces
    torch.testing.assert_close(single, potential(structures).forces, rtol=0, atol=1e-4)


def test_what_the_command_line_says(fitted, tmp_path, capsys):
    gpmlp.save(fitted[0], tmp_path / "m.gpmlp")
    assert main.main(["info", str(tmp_path / "m.gpmlp")]) == 0
    rank = fitted[1].low_rank["rank"]["0:Cu"]
    assert f"{rank} of 105 0:Cu; on 12 structures forces change by" in " ".join(capsys.readouterr().out.split())


CHANGES = {
    "values": (lambda t: t[:-1], lambda t: t[:0], lambda t: t * float("nan")),
    "vectors": (lambda t: t[1:], lambda t: 2 * t, lambda t: t.float(), lambda t: t[:, :0]),
    "duals": (lambda t: 1.01 * t, lambda t: t[:, :-1], lambda t: t * float("nan")),
    "constant": (lambda t: t[:0], lambda t: None),
    "linear": (lambda t: t[:-1], lambda t: None),
    "more": (lambda t: torch.zeros(2),),
}


def test_altered_directions_are_refused(fitted):
    header, tensors = fitted[0].state()
    prefix = "term0.Z29.low_rank."
    names = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    assert names <= CHANGES.keys()
    for name in (*names, "more"):
        for change in CHANGES[name]:
            altered = tensors | {prefix + name: change(tensors.get(prefix + name))}
            with pytest.raises(UserError):
                Potential.from_state(header, {key: t for key, t in altered.items() if t is not None})


def test_it_is_the_default_where_structures_can_be_held_out(fitted, many, small_set):
    """Of too few it is exact, and nothing is said unless a low rank was asked for."""
    choices = {key: value for key, value in CHOICES.items() if key not in ("calibration", "variance")}
    potential, report = gpmlp.fit(*many, Recipe.model_validate(choices))
    assert potential.recipe.mean == "low_rank" and report.low_rank["structures"] == 8
    for recipe_of_few, said in ((Recipe.model_validate(choices), False), (recipe(), True)):
        potential, report = gpmlp.fit(*small_set, recipe_of_few)
        assert potential.recipe.mean == "exact" and report.low_rank is None
        assert any("`mean: low_rank` was left aside" in text for text in report.warnings) == said


def test_forms_that_are_not_there(fitted, many):
    with pytest.raises(UserError, match="Unknown form of the mean .low_rnk.*low_rank"):
        fitted[0].to(mean="low_rnk")
    potential, report = gpmlp.fit(*many, recipe(kernel={"zeta": 4}, use_forces=False))
    assert potential.recipe.mean == "exact" and report.low_rank is None
    assert any("`mean: low_rank` was left aside" in text for text in report.warnings)
    with pytest.raises(UserError, match="has no mean of low rank"):
        potential.to(mean="low_rank")


def test_samples_are_exact(many):
    potential = gpmlp.fit(*many, recipe(variance={}))[0]
    assert potential.terms[0].low_rank
    sample = potential.sample(2, 0)[0]
    assert sample.recipe.mean == "exact" and not sample.terms[0].low_rank
    there = potential.to(mean="exact").sample(2, 0)[0]
    assert torch.equal(sample(many[0]).forces, there(many[0]).forces)


def test_what_learns_label_by_label_is_exact_and_says_so(many):
    online = OnlineFit.begin(*many, recipe())
    assert online.potential.recipe.mean == "exact" and not online.potential.terms[0].low_rank
    assert "mean stays exact" in online.report()["events"][0]
    silent = OnlineFit.begin(*many, Recipe.model_validate(CHOICES))
    assert silent.potential.recipe.mean == "exact" and "exact" not in silent.report()["events"][0]


def test_directions_in_single_precision(many):
    """Moments are summed in double precision: a ridge of 1e-10 does not survive single."""
    potential, report = gpmlp.fit(*many, recipe(dtype="float32"))
    assert report.low_rank is not None
    torch.testing.assert_close(
        potential(many[0]).forces, potential.to(mean="exact")(many[0]).forces, rtol=0, atol=0.05 * 0.05
    )
