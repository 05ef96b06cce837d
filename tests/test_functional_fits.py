"""Fits whose inducing variables are functionals of the data: all of them, or some; every use of such a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles import fitted_without

import gpmlp
from gpmlp.core.errors import UserError
from gpmlp.core.structures import Structures
from gpmlp.engines.ase import GPCalculator
from gpmlp.fitting import cost, left_out, prepare, regression
from gpmlp.gp import covariances, inducing
from gpmlp.gp.functionals import FunctionalBlock
from gpmlp.gp.posterior import FIXED
from gpmlp.io import ase_atoms
from gpmlp.io.recipe_files import validate_recipe
from gpmlp.recipe import Recipe

SMALL = {"descriptor": {"n_max": 4, "l_max": 3, "cutoff": 4.0}, "mean": "exact"}


@pytest.fixture(scope="module")
def fitted(ethanol):
    """A fit with all functionals, in variances too, and the arguments with which it asks for left-out predictions."""
    seen = []
    original = left_out.predict_left_out

    def spy(*arguments, **more):
        seen.append(arguments)
        return original(*arguments, **more)

    left_out.predict_left_out = spy
    try:
        recipe = SMALL | {"inducing": {"functionals": "all"}, "variance": {"columns": "all"}}
        potential, report = gpmlp.fit(*ethanol, Recipe.model_validate(recipe))
    finally:
        left_out.predict_left_out = original
    return potential, report, seen[0]


def test_all_functionals_of_the_data_are_inducing_variables(ethanol, fitted):
    potential, report, _ = fitted
    structures, _ = ethanol
    (block,) = potential.variances.blocks[0]
    assert isinstance(block, FunctionalBlock) and len(block.structures) == len(structures)
    atoms = int(structures.counts.max())
    isolated = [i for i, n in enumerate(structures.counts.tolist()) if n == 1]
    moving = len(structures) - len(isolated) - 1
    assert report.columns == moving * (3 * atoms - 6) + len(structures) - 1
    assert report.rank == report.columns  # none depends on others
    assert set(report.signal) == {"0:H", "0:C", "0:O"} and len(set(report.signal.values())) == 3
    assert all(
        potential.variances.priors[0].signal[z] == pytest.approx(report.signal[f"0:{s}"])
        for z, s in ((1, "H"), (6, "C"), (8, "O"))
    )


@pytest.mark.parametrize(("i", "near"), [(4, []), (11, [12, 20])])
def test_a_structure_left_out_is_left_out_with_its_functionals(fitted, i, near):
    """In closed form what a fit without it and those near it gives: prediction, and both parts of the variance."""
    arguments = fitted[2]
    together = {i: torch.tensor([i, *near])} if near else None
    found = left_out.predict_left_out(*arguments[:7], [i], together).prediction
    part = arguments[4].select([i])
    truth = fitted_without(arguments, [i, *near])(part, ("energies", "forces"), calibrated=False)
    assert (found.forces - arguments[0](part).forces).abs().max() > 1e-3
    # the condition of K_uu is 1e9, of which both ways lose their own share
    torch.testing.assert_close(found.energies, truth.energies, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.forces, truth.forces, rtol=0, atol=1e-5)
    for kind in ("energies", "forces"):
        got, expected = (getattr(p, f"{kind}_variance") for p in (found, truth))
        for name in ("inducing", "data"):
            a, b = getattr(got, name), getattr(expected, name)
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(expected.epistemic.max())), (kind, name)
        assert float(got.inducing.mean()) > 0.1 * float(got.data.mean())  # of its own it would have none


def test_rows_of_the_data_are_those_of_the_functionals(ethanol, monkeypatch):
    """No kernel is needed for them: streamed from the environments they are the same, for labels with noises of their own too, and for
    components of forces and energies that are not there."""
    structures, targets = ethanol[0].select(range(8)), ethanol[1].select(ethanol[0], range(8))
    noise, forces = torch.full_like(targets.forces_noise, torch.nan), targets.forces.clone()
    noise[structures.structure_of_atom == 2] = 0.1
    forces[structures.offsets[5] : structures.offsets[5] + 2] = torch.nan
    targets, seen = replace(targets, forces_noise=noise, forces=forces), []
    original = regression.own_rows

    def spy(models, *part):
        seen.append((models, *part, original(models, *part)))
        return seen[0][-1]

    monkeypatch.setattr(regression, "own_rows", spy)
    gpmlp.fit(structures, targets, Recipe.model_validate(SMALL | {"inducing": {"functionals": "all"}}))
    models, part, labels, _, (found, counts) = seen[0]
    lowers = regression.lowers_of(models)
    expected = regression.labelled_rows(models, part, labels)
    assert found.keys() == expected.keys() == {"energies", "forces", FIXED}
    for kind, rows in expected.items():
        rows = inducing.whiten_rows(rows.double(), lowers)
        assert len(found[kind]) == counts[kind] == len(rows)
        # whitening loses 1e-16 times the condition of L, 1e4 here
        torch.testing.assert_close(found[kind], rows, rtol=0, atol=1e-9 * float(rows.abs().max()))


def test_the_model_file_keeps_it(fitted, ethanol, tmp_path):
    potential = fitted[0]
    gpmlp.save(potential, tmp_path / "model.gpmlp")
    again = gpmlp.load(tmp_path / "model.gpmlp")
    part = ethanol[0].select([0, 7])
    a, b = (p(part, "all", novelty=True) for p in (potential, again))
    assert torch.equal(a.energies, b.energies) and torch.equal(a.forces, b.forces)
    for name in ("energies_variance", "forces_covariance", "atom_energies_variance"):
        torch.testing.assert_close(getattr(b, name).total, getattr(a, name).total, rtol=1e-6, atol=1e-12)


def test_samples_scatter_by_what_the_data_leave(fitted, ethanol):
    potential = fitted[0]
    samples = potential.sample(400, seed=1, calibrated=False)
    part = ethanol[0].select([12]).with_positions(ethanol[0].select([12]).positions * 1.03)
    drawn, data_part = samples(part).forces, potential(part, "forces", calibrated=False).forces_variance.data
    spread = drawn.var(0)
    assert abs(float(spread.mean() / data_part.mean()) - 1) < 0.25
    assert float(potential(part, "sampled_forces").sampled_forces_covariance.data.diagonal(dim1=1, dim2=2).mean()) > 0


def test_some_functionals_and_fewer_for_variances(ethanol, tmp_path):
    """As many structures as have that number; variances from the leading ones of these."""
    recipe = SMALL | {"inducing": {"functionals": 100}, "variance": {"columns": 60}, "calibration": False}
    potential, report = gpmlp.fit(*ethanol, Recipe.model_validate(recipe))
    assert 100 <= report.columns < 123 and potential.variances.n_columns == 60 * report.rank // report.rank
    (block,) = potential.variances.blocks[0]
    assert len(block.structures) < 6
    gpmlp.save(potential, tmp_path / "model.gpmlp")
    part = ethanol[0].select([9])
    a, b = (p(part, "all") for p in (potential, gpmlp.load(tmp_path / "model.gpmlp")))
    torch.testing.assert_close(b.forces_covariance.total, a.forces_covariance.total, rtol=1e-6, atol=1e-12)
    samples = potential.sample(8, seed=0, calibrated=False)  # paths of what the subset misses, at the other centres
    assert float(samples(part).forces.std(0).mean()) > 0
    errors = [potential(ethanol[0]).forces - ethanol[1].forces, ethanol[1].forces]
    assert errors[0].nan_to_num().abs().mean() < 0.5 * errors[1].nan_to_num().abs().mean()


def test_dynamics_has_it(fitted, ethanol):
    """The calculator of ASE, whose mean is compiled, and the stepper on tables of neighbours with its variances."""
    potential, atoms = fitted[0], ase_atoms.to_ase(ethanol[0].select([8]))[0]
    atoms.calc = GPCalculator(potential)
    expected = potential(ethanol[0].select([8]), "atom_energies", calibrated=False)
    torch.testing.assert_close(torch.from_numpy(atoms.get_forces()), expected.forces, rtol=0, atol=1e-9)
    spread = expected.atom_energies_variance
    for z in potential.species:
        mine = ethanol[0].select([8]).species == z
        x = potential.terms[0].environments(ethanol[0].select([8])).environments.features[mine]
        block = potential.variances.blocks[0][0]
        rows = covariances.local_rows(potential.terms[0].kernel, block, z, x)
        a, b = potential.variances.whiten(rows)
        torch.testing.assert_close(spread.data[mine], b.square().sum(1), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(
    ("inducing", "message"),
    [
        ({"functionals": 7, "n": 5}, "`functionals` take the place of centres: leave `n` out"),
        ({"functionals": 10, "gradients": 2}, "leave `gradients` out"),
        ({"functionals": 0}, "must be at least 1"),
        ({"functionals": "some"}, "must be 'all'"),
    ],
)
def test_what_cannot_be_is_refused(inducing, message):
    with pytest.raises(UserError, match=message):
        validate_recipe({"inducing": inducing})


def test_auto_is_all_of_molecules_where_they_can_be_had(ethanol):
    """Of solids, with labels known in part, with error bars of all columns or without memory it is none, as if the key were left out."""
    part, labels = ethanol[0].select(range(8, 14)), ethanol[1].select(ethanol[0], range(8, 14))
    solid, known = gpmlp.read(Path(__file__).parents[1] / "data/silicon/train.xyz", "1:4")
    forces = labels.forces.clone()
    forces[0, 0] = torch.nan

    def chosen(structures, targets, **changes):
        recipe = Recipe.model_validate(SMALL | {"inducing": {"functionals": "auto"}} | changes)
        return prepare.set_up(structures, targets, recipe)[0].inducings[0]

    found = chosen(part, labels)
    assert found.functionals == "all" and found.n and found.gradients is not None
    for i in (
        chosen(solid, known),
        chosen(part, replace(labels, forces=forces)),
        chosen(part, labels, variance={"columns": "all"}),
        chosen(part, labels, memory_GB=1e-5),
    ):
        assert i.functionals is None
    without = {"inducing": {"functionals": "none"}}
    assert chosen(solid, known) == prepare.set_up(solid, known, Recipe.model_validate(SMALL | without))[0].inducings[0]


def test_a_fit_that_is_told_nothing_of_inducing_variables_is_exact_where_it_can_be(ethanol):
    """And says so; a learning run that is not told, and whoever says something of centres, has centres."""
    structures, targets = ethanol[0].select(range(8, 14)), ethanol[1].select(ethanol[0], range(8, 14))

    def found(growing=False, **changes):
        made = prepare.set_up(structures, targets, Recipe.model_validate(SMALL | changes), growing)
        return made.recipe.inducings[0].functionals, made.choice

    assert found() == ("all", "all functionals of the data: the exact process")
    for changes in ({"inducing": {"n": 8}}, {"inducing": {"gradients": 1}}, {"inducing": {"functionals": "none"}}):
        assert found(**changes) == (None, "")
    assert found(growing=True) == (None, "")
    assert found(growing=True, inducing={"functionals": "none"}) == (None, "")
    for changes, why in (
        ({"kernel": {"zeta": 4}}, "of this kernel a prediction would cost more with each structure"),
        ({"memory_GB": 1e-5}, "where memory_GB is 1e-05"),
        ({"long_range": {"charges": "local"}}, "no columns for charges"),
    ):
        functionals, said = found(**changes)
        assert functionals is None and said.startswith("centres, not all functionals of the data") and why in said
    _, report = gpmlp.fit(structures, targets, Recipe.model_validate(SMALL | {"novelty": False}))
    assert report.choices[0] == "all functionals of the data: the exact process" and report.rank == report.columns
    assert report.choices[1].endswith(" nats each with them, and 0.03 or more is asked for")


def test_a_long_fit_has_all_functionals_where_centres_would_take_longer_still(ethanol, monkeypatch):
    structures, targets = ethanol[0].select(range(8, 14)), ethanol[1].select(ethanol[0], range(8, 14))
    seconds = {"all": 4000.0, None: 5000.0}
    expected = cost.expected_cost
    monkeypatch.setattr(
        cost,
        "expected_cost",
        lambda recipe, *data: replace(expected(recipe, *data), seconds=seconds[recipe.inducings[0].functionals]),
    )

    def found():
        return prepare.set_up(structures, targets, Recipe.model_validate(SMALL))

    assert found().recipe.inducings[0].functionals == "all"
    seconds[None] = 3000.0
    assert found().recipe.inducings[0].functionals is None and "a fit would take 67 min" in found().choice


def test_two_descriptors_with_functionals_of_one(ethanol):
    recipe = SMALL | {
        "descriptor": [SMALL["descriptor"], {"n_max": 2, "l_max": 2, "cutoff": 3.0}],
        "inducing": [{"functionals": "all"}, {"n": 20, "gradients": 2}],
        "calibration": False,
    }
    structures = Structures.concatenate([ethanol[0].select(range(6))])
    potential, report = gpmlp.fit(structures, ethanol[1].select(ethanol[0], range(6)), Recipe.model_validate(recipe))
    assert [type(b).__name__ for blocks in potential.variances.blocks for b in blocks] == [
        "FunctionalBlock",
        *3 * ["InducingBlock"],
    ]
    found = potential(structures, ("energies", "forces"))
    assert float((found.forces - ethanol[1].select(ethanol[0], range(6)).forces).nan_to_num().abs().mean()) < 0.1
    assert bool((found.forces_variance.total > 0).all())


def test_what_is_left_out_keeps_a_variance_due_to_the_data(ethanol):
    """Where variances come from fewer functionals than the fit as well. Without it a component would count as one that symmetry forbids,
    and its error as scatter of the labels, which every error bar then has."""
    recipe = SMALL | {"inducing": {"functionals": "all"}, "variance": {"columns": 250}}
    seen, original = [], left_out.predict_left_out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(left_out, "predict_left_out", lambda *a, **more: seen.append(original(*a, **more)) or seen[0])
        potential, _ = gpmlp.fit(*ethanol, Recipe.model_validate(recipe))
    assert potential.variances.n_columns < potential.variances.of_fit
    spread = seen[0].prediction.forces_variance.data
    known = spread[seen[0].targets.forces.isfinite()]
    assert float(known.min()) > 1e-6 * float(known.mean())
    assert potential.calibration.kinds["forces"].forbidden == 0


def test_noises_of_labels_are_those_of_the_recipe(ethanol):
    """Also where each label has one of its own, and those of one structure differ: signals of species are learned from all of them."""
    structures, targets = ethanol
    given = replace(
        targets,
        energies_noise=torch.full_like(targets.energies_noise, 0.002),
        forces_noise=torch.full_like(targets.forces_noise, 0.05),
    )
    mixed = given.forces_noise.clone()
    mixed[::2] *= 1.0 + 1e-9
    noise = {"noise": {"energy_per_atom": 0.002, "force": 0.05}}
    found = []
    for labels, more in ((targets, noise), (given, {}), (replace(given, forces_noise=mixed), {})):
        recipe = SMALL | {"inducing": {"functionals": 80}, "variance": False, "novelty": False} | more
        potential, report = gpmlp.fit(structures, labels, Recipe.model_validate(recipe))
        found.append((report.signal, potential(structures).forces))
    for signal, forces in found[1:]:
        assert signal == pytest.approx(found[0][0], rel=1e-3)
        torch.testing.assert_close(forces, found[0][1], rtol=0, atol=1e-3)  # the optimum is not known better


def test_force_labels_that_are_all_partly_unknown_say_nothing_of_species(ethanol):
    structures, targets = ethanol[0].select(range(8)), ethanol[1].select(ethanol[0], range(8))
    forces = targets.forces.clone()
    forces[structures.offsets[:-1], 0] = torch.nan
    targets = replace(targets, forces=forces, energies=torch.full_like(targets.energies, torch.nan))
    recipe = SMALL | {"inducing": {"functionals": "all"}, "variance": {"columns": 30}, "calibration": False}
    potential, report = gpmlp.fit(structures, targets, Recipe.model_validate(recipe))
    assert len(set(report.signal.values())) == 1
    errors = (potential(structures).forces - forces).nan_to_num()
    assert float(errors.square().mean()) < 0.1 * float(forces.nan_to_num().square().mean())


@pytest.fixture(scope="module")
def with_rare(ethanol):
    """Molecules, the last of which has a species that no other has."""
    structures, targets = ethanol[0].select(range(8, 14)), ethanol[1].select(ethanol[0], range(8, 14))
    species = structures.species.clone()
    species[structures.offsets[4]] = 9
    return replace(structures, species=species), targets


@pytest.mark.parametrize(
    ("functionals", "variance"), [(5, {"columns": None}), (5, False), ("all", {"columns": 30}), (10**6, False)]
)
def test_every_species_has_its_functionals(with_rare, functionals, variance, tmp_path):
    """With fewer than there are, with more, and where those of variances have not all species."""
    structures, targets = with_rare
    recipe = SMALL | {"inducing": {"functionals": functionals}, "variance": variance, "calibration": False}
    potential, report = gpmlp.fit(structures, targets, Recipe.model_validate(recipe))
    assert report.columns <= 6 * 22 and report.signal.keys() == {"0:H", "0:C", "0:O", "0:F"}
    assert all(len(potential.terms[0].blocks[z].features) for z in (1, 6, 8, 9))
    gpmlp.save(potential, tmp_path / "model.gpmlp")
    again = gpmlp.load(tmp_path / "model.gpmlp")
    assert torch.equal(again(structures).forces, potential(structures).forces)
    if variance:
        assert float(potential.sample(4, 0)(structures).forces.std(0).mean()) > 0
        assert bool((again(structures, "sampled_forces").sampled_forces_covariance.total.isfinite()).all())


@pytest.mark.parametrize(("functionals", "columns"), [("all", 60), ("all", None), (80, 60)])
def test_single_precision(ethanol, functionals, columns, tmp_path):
    structures, targets = ethanol[0].select(range(8)), ethanol[1].select(ethanol[0], range(8))
    forces = []
    for dtype in ("float32", "float64"):
        about = {"dtype": dtype, "inducing": {"functionals": functionals}, "variance": {"columns": columns}}
        noise = {"noise": {"energy_per_atom": 0.01, "force": 0.1}}
        potential, _ = gpmlp.fit(structures, targets, Recipe.model_validate(SMALL | about | noise))
        gpmlp.save(potential, tmp_path / "model.gpmlp")
        found, again = (p(structures, "all").forces for p in (potential, gpmlp.load(tmp_path / "model.gpmlp")))
        assert torch.equal(found, again)
        forces.append(found.double())
    assert 0 < float((forces[0] - forces[1]).square().mean().sqrt()) < 0.02
