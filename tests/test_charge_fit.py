"""Fits with charges: ions beyond the cutoff that a short-range model cannot see, when charges are tried, files, samples and refusals."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from systems import scattered, structure

import gpmlp
from gpmlp.cli.main import main
from gpmlp.core.coulomb import CoulombMatrix
from gpmlp.core.errors import DataWarning, UserError
from gpmlp.core.neighbors import assemble_prediction, find_neighbors
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.engines.ase import GPCalculator
from gpmlp.fitting import charge_data, charge_fit, prepare
from gpmlp.io import archive
from gpmlp.io.export import export_model
from gpmlp.potential.evaluation import evaluate
from gpmlp.potential.potential import Potential
from gpmlp.recipe import InducingRecipe, Recipe
from gpmlp.report.model.data import collect_data
from gpmlp.report.model.page import write_model_page

CUTOFF = 4.0
OPEN = torch.zeros(3, 3, dtype=torch.float64)
SMALL = {
    "descriptor": {"cutoff": CUTOFF, "n_max": 4, "l_max": 2},
    "inducing": {"n": 24, "gradients": 3},
    "variance": {"columns": "all"},
    "mean": "exact",
}


def labelled(parts: list[Structures], charges: list[float]) -> tuple[Structures, Targets]:
    """Structures with Gaussian charges and a pair term of short range: exact energies, forces and stresses."""
    found, q = [], torch.tensor(charges, dtype=torch.float64)
    for one in parts:
        coulomb, pairs = CoulombMatrix.of_structure(one), find_neighbors(one, CUTOFF)
        vectors = pairs.vectors(one)
        r = vectors.norm(dim=1)
        inside = 1 - (r / CUTOFF) ** 2
        bare = 8 * torch.exp(-1.5 * (r - 1.6))
        value, slope = bare * inside**3, -bare * (1.5 * inside**3 + 6 * r / CUTOFF**2 * inside**2)
        local = torch.zeros(len(q), dtype=torch.float64).index_add(0, pairs.centers, 0.5 * value)
        short = assemble_prediction(one, pairs, vectors, local, (0.5 * slope / r)[:, None] * vectors)
        on_atoms, strained = coulomb.energy_gradients(q)
        stresses = short.stresses + strained / one.volumes[:, None, None]
        found.append((short.energies + 0.5 * q @ coulomb.matrix @ q, short.forces - on_atoms, stresses))
    energies, forces, stresses = (torch.cat(column) for column in zip(*found, strict=True))
    every = Structures.concatenate(parts)
    return every, replace(Targets.unlabelled(every), energies=energies, forces=forces, stresses=stresses)


def ions(n: int, seed: int, size: float, closest: float = 2.2) -> tuple[Structures, Targets]:
    """Two sodium and two chlorine ions at random in an open box."""
    box = size * torch.eye(3, dtype=torch.float64)
    species = (11, 17, 11, 17)
    parts = [structure(scattered(4, box, seed + i, closest), species, OPEN) for i in range(n)]
    return labelled(parts, [1.0, -1.0, 1.0, -1.0])


ROCKSALT = [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]


def crystals(n: int, seed: int) -> tuple[Structures, Targets]:
    """Rocksalt of some lengths, strained, with displaced ions."""
    parts = []
    for i in range(n):
        generator = torch.Generator().manual_seed(seed + i)
        length = 5.0 + 0.8 * torch.rand(1, generator=generator, dtype=torch.float64)
        cell = length * torch.eye(3, dtype=torch.float64)
        cell = cell + 0.2 * torch.randn(3, 3, generator=generator, dtype=torch.float64)
        shaken = 0.15 * torch.randn(8, 3, generator=generator, dtype=torch.float64)
        positions = 0.5 * torch.tensor(ROCKSALT, dtype=torch.float64) @ cell + shaken
        parts.append(structure(positions, [11] * 4 + [17] * 4, cell, (True, True, True)))
    return labelled(parts, [1.0] * 4 + [-1.0] * 4)


def _recipe(**long_range) -> Recipe:
    return Recipe.model_validate(SMALL | {"long_range": long_range})


@pytest.fixture(scope="module")
def fitted():
    structures, targets = ions(60, 0, 6.0)
    return {name: gpmlp.fit(structures, targets, _recipe(charges=name)) for name in ("off", "auto")}


def test_ions_beyond_the_cutoff_are_found_where_a_short_range_model_is_blind(fitted):
    far, labels = ions(12, 500, 12.0, 4.5)
    errors = {
        name: gpmlp.evaluate(potential, far, labels, variances=False).overall for name, (potential, _) in fitted.items()
    }
    assert errors["off"].force_rmse_meV_per_A > 100
    assert errors["auto"].force_rmse_meV_per_A < 0.1 * errors["off"].force_rmse_meV_per_A
    potential, report = fitted["auto"]
    assert (
        report.charges is not None
        and report.charges["kept"]
        and report.charges["gain_nats_per_label"] > charge_fit.WORTH
        and report.charges["left_out_errors_ratio"] < 0.5
    )
    found = potential(far)
    assert torch.allclose(
        found.charges.view(-1, 4).sum(1), torch.zeros(len(far), dtype=torch.float64), rtol=0, atol=1e-10
    )
    assert (found.charges[far.species == 11] > 0.5).all() and (found.charges[far.species == 17] < -0.5).all()


def test_a_start_a_tenth_of_a_charge_away_ends_at_the_same_charges(fitted, monkeypatch):
    original, begun = charge_fit.fit_charges, []

    def scattered(data, *about):
        start = charge_fit.physical_start(data)
        noise = torch.randn(len(start), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        begun.append(start + 0.1 * noise)
        return original(data, *about, begin=begun[0])

    monkeypatch.setattr(charge_fit, "fit_charges", scattered)
    potential, report = gpmlp.fit(*ions(60, 0, 6.0), _recipe(charges="auto"))
    (before, first), (far, _) = fitted["auto"], ions(12, 500, 12.0, 4.5)
    assert len(begun) == 1 and report.charges["form"] == first.charges["form"]
    assert report.negative_log_evidence == pytest.approx(first.negative_log_evidence, abs=10)
    assert torch.allclose(potential(far).energies, before(far).energies, rtol=0, atol=1e-3)


def test_errors_left_out_are_those_of_fits_to_the_other_folds():
    """Against least squares of the rows that are left, and of the prior."""
    generator = torch.Generator().manual_seed(0)
    rows = {
        k: torch.randn(n, 9, generator=generator, dtype=torch.float64) for k, n in (("energies", 12), ("forces", 30))
    }
    folds = {k: torch.arange(len(r)) % 3 for k, r in rows.items()}
    noise, scale = {"energies": 0.1, "forces": 2.0}, torch.linspace(0.1, 3, 8, dtype=torch.float64)
    found, expected = charge_fit._left_out_squares(rows, folds, noise, scale), dict.fromkeys(rows, 0.0)
    prior = torch.cat([torch.diag(1 / scale), torch.zeros(8, 1, dtype=torch.float64)], dim=1)
    for fold in range(3):
        kept = torch.cat([*(r[folds[k] != fold] / noise[k] for k, r in rows.items()), prior])
        weights = torch.linalg.lstsq(kept[:, :-1], kept[:, -1:]).solution[:, 0]
        for kind, r in rows.items():
            left = r[folds[kind] == fold]
            expected[kind] += float((left[:, -1] - left[:, :-1] @ weights).square().sum()) / len(r)
    assert found == pytest.approx(expected, rel=1e-9)


def test_chunks_of_charge_data_hold_each_structure_once():
    structures, targets = ions(7, 0, 6.0)
    found = charge_data._chunks(structures, targets)
    assert [fold for fold, _, _ in found] == list(range(charge_data.FOLDS)) and sum(len(p) for _, p, _ in found) == 7
    for _, part, labels in found:
        same = [
            i for i in range(7) for p in part.positions.split(4) if torch.equal(structures.select([i]).positions, p)
        ]
        assert torch.equal(labels.energies, targets.energies[same])


def test_charges_of_crystals_are_learned_from_energies_forces_and_stresses():
    """Ions of one charge each: their charges come out, and errors of forces and stresses that nearby neighbours cannot explain go."""
    data, (others, labels) = crystals(18, 0), crystals(8, 900)
    (alone, _), (charged, report) = (gpmlp.fit(*data, _recipe(charges=name)) for name in ("off", "polarisable"))
    before, after = (gpmlp.evaluate(p, others, labels, variances=False).overall for p in (alone, charged))
    assert after.force_rmse_meV_per_A < 0.5 * before.force_rmse_meV_per_A
    assert after.stress_rmse_GPa < 0.6 * before.stress_rmse_GPa
    assert report.charges is not None and report.charges["form"].startswith("polarisable")
    found = charged(others, variance="all")
    assert torch.allclose(found.charges.abs(), torch.ones(64, dtype=torch.float64), rtol=0, atol=0.1)
    assert (found.stresses_variance.data > 0).all() and (found.forces_variance.data > 0).all()


def test_error_bars_of_far_structures_hold_the_uncertainty_of_charges(fitted):
    far, labels = ions(12, 500, 12.0, 4.5)
    potential, _ = fitted["auto"]
    certain = replace(potential, charges=replace(potential.charges, posterior=None))
    stds = []
    for model in (potential, certain):
        found = model(far, variance=("energies", "forces"), calibrated=False)
        stds.append((found.energies_variance.data.sqrt(), found.forces_variance.data.sqrt()))
    assert (stds[0][0] > stds[1][0]).all() and (stds[0][1] >= stds[1][1] - 1e-12).all()
    # draws of whole potentials scatter by as much, as far as energies are linear in charges
    samples = potential.sample(48, seed=1, calibrated=False)
    deviations = samples(far).energies - potential(far).energies
    ratio = deviations.square().mean(0).sqrt() / stds[0][0]
    assert 0.7 < float(ratio.median()) < 1.4
    one = samples[3]
    assert torch.allclose(one(far).energies, samples(far).energies[3], rtol=0, atol=1e-8)


def test_calibrated_samples_scatter_as_the_covariance_says(tmp_path):
    """Shifts of left-out structures move charges by far more than what energies are linear in, and cancel with the rest."""
    structures, targets = ions(40, 0, 6.0)
    potential, _ = gpmlp.fit(structures, targets, _recipe(charges="local"))
    some = Structures.concatenate([structures.select([0, 1, 2]), ions(2, 500, 9.0, 3.0)[0]])
    mean, n = potential(some), len(some)
    drawn = potential.sample(200, seed=1)
    assert torch.stack([charges.move for charges in drawn.charges]).std(0).max() > 10  # e
    found, std = drawn(some), potential.covariance(some).diagonal().sqrt()
    energies, forces = found.energies - mean.energies, (found.forces - mean.forces).flatten(1)
    for deviations, expected in ((energies, std[:n]), (forces, std[n : n + forces.shape[1]])):
        assert ((deviations.std(0) / expected).log().abs() < math.log(1.3)).all()  # 5 % of 200 draws
        assert (deviations.mean(0).abs() < 0.35 * expected).all()  # five standard deviations
    # each is one potential, in a file too
    one, h, up = drawn[3], 1e-2, torch.zeros_like(some.positions)
    up[1, 0] = h
    ends = [one(replace(some, positions=some.positions + by)).energies[0] for by in (up, -up)]
    assert one(some).forces[1, 0].item() == pytest.approx(
        float(ends[1] - ends[0]) / (2 * h), rel=1e-3
    )  # rounding of energies: 1e-7 eV
    archive.save(one, tmp_path / "sample.gpmlp")
    again = archive.load(tmp_path / "sample.gpmlp")(some)
    for name in ("energies", "forces", "stresses", "charges"):
        torch.testing.assert_close(getattr(again, name), getattr(one(some), name), rtol=1e-9, atol=1e-9, equal_nan=True)
    header, tensors = potential.state()
    header["variances"]["shifts"] -= 1
    tensors["variances.shifts"] = tensors["variances.shifts"][:, 1:].clone()
    with pytest.raises(UserError, match="columns of shifts"):
        Potential.from_state(header, tensors)


def test_a_file_holds_the_charges(fitted, tmp_path):
    potential, _ = fitted["auto"]
    gpmlp.save(potential, tmp_path / "model.gpmlp")
    again, (far, _) = gpmlp.load(tmp_path / "model.gpmlp"), ions(4, 900, 9.0)
    wanted = {"variance": ("energies", "forces")}
    before, after = potential(far, **wanted), again(far, **wanted)
    for name in ("energies", "forces", "charges", "electrostatic"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    assert torch.allclose(before.energies_variance.total, after.energies_variance.total, rtol=1e-9)


def test_the_calculator_of_ase_gives_charges(fitted):
    potential, _ = fitted["auto"]
    far, _ = ions(1, 900, 9.0)
    ase = pytest.importorskip("ase")
    atoms = ase.Atoms(far.species.numpy(), far.positions.numpy())
    atoms.calc = GPCalculator(potential)
    assert atoms.get_potential_energy() == pytest.approx(float(potential(far).energies), abs=1e-10)
    assert torch.allclose(torch.from_numpy(atoms.get_charges()), potential(far).charges, rtol=0, atol=1e-10)


def test_torchsim_gives_charges_of_its_own_totals(fitted):
    pytest.importorskip("torch_sim", reason="torch-sim is not installed (pip install 'gpmlp[torchsim]')")
    from gpmlp.engines.torchsim import GPModel

    potential, _ = fitted["auto"]
    far = replace(ions(2, 900, 9.0)[0], charges=torch.tensor([1.0, -1.0], dtype=torch.float64))
    state = {"positions": far.positions, "cell": far.cells.mT, "system_idx": far.structure_of_atom, "pbc": False}
    state |= {"atomic_numbers": far.species}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # totals beyond those of the training
        of_state = GPModel(potential)(state | {"charge": far.charges})
        of_model, right = GPModel(potential, total_charge=1.0)(state), potential(far)
    assert torch.allclose(of_state["charges"], right.charges, rtol=0, atol=1e-10)
    assert torch.allclose(of_state["forces"], right.forces, rtol=0, atol=1e-10)
    sums = torch.zeros(2, dtype=torch.float64).index_add(0, far.structure_of_atom, of_model["charges"])
    assert torch.allclose(sums, torch.ones(2, dtype=torch.float64))
    with pytest.raises(UserError, match="charges act on each other"):
        GPModel(potential, tables=True)


def test_the_report_shows_charges_and_their_part_of_the_energy(fitted, tmp_path):
    far, labels = ions(6, 500, 12.0, 4.5)
    for name in ("auto", "off"):
        potential, _ = fitted[name]
        evaluation = evaluate(potential, far, labels)
        data = collect_data(potential, far, labels, evaluation, "model.gpmlp", "far.xyz", "0")
        page = write_model_page(data, tmp_path / name).read_text()
        assert ("Where are the charges?" in page) == (name == "auto")
        record = json.loads((tmp_path / name / "report.json").read_text())
        assert (record["charges"] is None) == (name == "off")
    potential, _ = fitted["auto"]
    right, record = potential(far), json.loads((tmp_path / "auto/report.json").read_text())["charges"]
    for z, row in zip(far.distinct_species, record["by_species"].values(), strict=True):
        assert row["mean_e"] == pytest.approx(float(right.charges[far.species == z].mean()), abs=1e-9)
    of_charges = record["energies"]["of charges"]["mean_eV_per_atom"]
    assert of_charges == pytest.approx(float((right.electrostatic / far.counts).mean()), abs=1e-9)


def test_engines_without_a_form_for_charges_refuse_them(fitted, tmp_path):
    potential, _ = fitted["auto"]
    with pytest.raises(UserError, match="charges act on each other at any distance"):
        export_model(potential, tmp_path / "model.gpx")
    with pytest.raises(UserError, match="have no meaning with charges"):
        potential(ions(1, 900, 9.0)[0], atom_virials=True)


def test_when_charges_are_tried():
    """Different total charges, or two species and atoms beyond the cutoff; not where all is within it, nor of one element."""
    near, _ = ions(6, 0, 2.2, 1.5)
    wide, _ = ions(6, 0, 9.0)
    recipe = _recipe(charges="auto")
    assert charge_fit.reason_to_try(near, recipe) is None
    assert charge_fit.reason_to_try(wide, recipe) is not None
    assert charge_fit.reason_to_try(replace(wide, species=torch.full_like(wide.species, 11)), recipe) is None
    charged = replace(near, charges=torch.tensor([0.0, 1.0, 0.0, 0.0, -1.0, 0.0], dtype=torch.float64))
    assert charge_fit.reason_to_try(charged, recipe) is not None
    assert charge_fit.reason_to_try(charged, _recipe(charges="off")) is None


def test_a_recipe_that_says_nothing_tries_charges_of_molecules_and_clusters_that_a_short_range_model_cannot_know():
    """Several total charges, or atoms beyond the cutoff, isolated or in a box; not a crystal, or what no charges fit."""
    (near, labels), (apart, far), (solid, of_solid) = ions(6, 0, 2.2, 1.5), ions(6, 0, 9.0), crystals(4, 0)
    charged = replace(near, charges=torch.tensor([0.0, 1.0, 0.0, 0.0, -1.0, 0.0], dtype=torch.float64))
    metal = replace(apart, species=torch.full_like(apart.species, 11))
    plain = Recipe.model_validate(SMALL)
    given = plain.model_copy(update={"inducing": InducingRecipe(functionals="all")})

    def boxed(one: Structures, length: float) -> Structures:
        cells = (length * torch.eye(3, dtype=torch.float64)).expand(len(one), 3, 3)
        return replace(one, cells=cells, periodic=torch.ones_like(one.periodic))

    cases = [
        (near, labels, plain, "off"),
        (charged, labels, plain, "auto"),
        (apart, far, plain, "auto"),
        (boxed(apart, 30.0), far, plain, "auto"),
        (boxed(apart, 10.0), far, plain, "off"),
        (boxed(near, 30.0), labels, plain, "off"),
        (solid, of_solid, plain, "off"),
        (metal, far, plain, "off"),
        (apart, far, given, "off"),
        (apart, far, _recipe(charges="off"), "off"),
        (near, labels, _recipe(charges="auto"), "auto"),
    ]
    for structures, targets, recipe, wanted in cases:
        assert prepare.set_up(structures, targets, recipe)[0].long_range.charges == wanted
    assert prepare.set_up(apart, far, plain, growing=True)[0].long_range.charges == "off"
    assert Recipe.model_validate({"long_range": {"charges": False}}).long_range.charges == "off"


def test_error_bars_of_fewer_columns_beside_charges_are_compared_with_those_of_all():
    recipe = Recipe.model_validate(SMALL | {"variance": {"columns": 60}, "long_range": {"charges": "local"}})
    told = gpmlp.fit(*ions(20, 0, 6.0), recipe)[1].variance_subset
    assert told["columns"] <= 60 < told["columns_of_fit"] and 0.8 < told["std_ratio_median"] < 1.5


def test_where_charges_tried_unasked_bring_nothing_the_fit_is_the_one_without():
    """With all functionals, which had stood back for them; and a line that says that they were tried."""
    apart = ions(12, 0, 14.0)[0]
    data = labelled([apart.select([i]) for i in range(12)], [0.0] * 4)
    recipe = {"descriptor": SMALL["descriptor"], "variance": False}
    (open_, told), (off, _) = (
        gpmlp.fit(*data, Recipe.model_validate(recipe | more)) for more in ({}, {"long_range": {"charges": "off"}})
    )
    assert told.charges["kept"] is False and "tried and left out" in told.charges["sentence"] and open_.charges is None
    assert any("the exact process" in choice for choice in told.choices)
    assert torch.equal(open_(apart).forces, off(apart).forces)


def test_functionals_left_to_the_data_make_room_for_charges(tmp_path, capsys):
    """`functionals: auto` is none where charges are asked for or have a reason to be tried; what `auto` does not try, a line says."""
    (near, labels), (wide, far) = ions(6, 0, 2.2, 1.5), ions(6, 0, 9.0)

    def recipe(functionals, **long_range) -> Recipe:
        few = {"inducing": {"functionals": functionals}, "variance": False, "long_range": long_range}
        return Recipe.model_validate(SMALL | few)

    cases = [(near, labels, "off", "all"), (near, labels, "auto", "all"), (wide, far, "auto", None)]
    cases += [(wide, far, "off", "all"), (near, labels, "polarisable", None), (near, labels, "local", None)]
    for structures, targets, charges, wanted in cases:
        found = prepare.set_up(structures, targets, recipe("auto", charges=charges))[0]
        assert found.inducings[0].functionals == wanted, charges
    potential, _ = gpmlp.fit(wide, far, recipe("auto", charges="polarisable", kappa=3.0))
    assert potential.charges is not None
    for structures, targets, words in ((near, labels, "fewer than a tenth"), (wide, far, "`inducing.functionals`")):
        potential, report = gpmlp.fit(structures, targets, recipe("all", charges="auto"))
        assert potential.charges is None and not report.charges["kept"]
        assert report.charges["sentence"].startswith("charges were not tried: ") and words in report.charges["sentence"]
    with pytest.raises(UserError, match=r"long_range.charges: local. is not possible: .*functionals"):
        gpmlp.fit(wide, far, recipe("all", charges="local"))
    gpmlp.save(potential, tmp_path / "m.gpmlp")
    assert main(["info", str(tmp_path / "m.gpmlp")]) == 0
    assert "charges were not tried" in " ".join(capsys.readouterr().out.split())


def test_charges_know_a_species_of_one_structure_that_was_not_drawn(monkeypatch, tmp_path):
    """Of many labels some are drawn: whichever structure holds the only potassium, the model has charges of it and can be read again."""
    structures, targets = ions(12, 0, 6.0)
    monkeypatch.setattr(charge_data, "ROWS", 3 * 13)
    drawn = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for i in drawn.tolist():
        species = structures.species.clone()
        species[4 * i] = 19
        some = charge_data._some_structures(replace(structures, species=species), targets, 0)
        assert some[0].distinct_species == (11, 17, 19)
        assert torch.equal(some[1].energies, targets.energies[sorted({i, *drawn[:3].tolist()})])
    potential, _ = gpmlp.fit(replace(structures, species=species), targets, _recipe(charges="polarisable", kappa=1.0))
    gpmlp.save(potential, tmp_path / "m.gpmlp")
    assert gpmlp.load(tmp_path / "m.gpmlp").charges.basis.species == (11, 17, 19)


def test_charges_that_bring_nothing_are_left_out():
    """Labels of a short-range pair term alone, with noise: `auto` tries charges, and the model is to the last bit that without them."""
    structures, targets = ions(24, 40, 6.0)
    generator = torch.Generator().manual_seed(0)
    electrostatic = []
    for i in range(len(structures)):
        one, q = structures.select([i]), torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        matrix = CoulombMatrix.of_structure(one)
        electrostatic.append((0.5 * q @ matrix.matrix @ q, -matrix.energy_gradients(q)[0]))
    energies, forces = (torch.stack([e for e, _ in electrostatic]), torch.cat([f for _, f in electrostatic]))
    energies = energies + 0.04 * torch.randn(len(structures), generator=generator, dtype=torch.float64)
    forces = forces + 0.2 * torch.randn(forces.shape, generator=generator, dtype=torch.float64)
    targets = replace(targets, energies=targets.energies - energies, forces=targets.forces - forces)
    (tried, report), (without, _) = (gpmlp.fit(structures, targets, _recipe(charges=name)) for name in ("auto", "off"))
    assert report.charges is not None and not report.charges["kept"] and tried.charges is None
    assert torch.equal(tried(structures).forces, without(structures).forces)


def test_charges_follow_labels_of_charges_and_dipoles_alone_where_that_is_asked_for():
    """Half of the structures have dipoles, and one more has charges, of 0.7 where energies and forces say 1."""
    structures, targets = ions(16, 0, 6.0)
    told = torch.tensor([0.7, -0.7, 0.7, -0.7], dtype=torch.float64).repeat(16)
    charges, dipoles = told.clone(), (told[:, None] * structures.positions).view(16, 4, 3).sum(1)
    charges[4:], dipoles[:1], dipoles[9:] = torch.nan, torch.nan, torch.nan
    some = replace(targets, charges=charges, dipoles=dipoles)
    structures.species[-4] = 19  # of which no label says anything
    potential, report = gpmlp.fit(structures, some, _recipe(charges="local", labels="only"))
    assert report.charges is not None and report.charges["labels"] == 4 + 8 * 3
    assert "nats per label of charges and dipoles" in report.charges["sentence"]
    assert torch.allclose(potential(structures).charges[:-4], told[:-4], rtol=0, atol=1e-3)
    assert set(potential.charges.basis.species) == {11, 17, 19}


def test_labels_of_charges_help_energies_and_forces_where_they_are_right():
    """Few structures: their own charges as labels beside energies and forces make those of far structures better."""
    (structures, targets), (far, labels) = ions(16, 0, 6.0), ions(12, 500, 12.0, 4.5)
    targets = replace(targets, charges=torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).repeat(16))
    errors, counts = [], []
    for choice in ("ignore", "use"):
        potential, report = gpmlp.fit(structures, targets, _recipe(charges="local", labels=choice))
        errors.append(gpmlp.evaluate(potential, far, labels, variances=False).overall.force_rmse_meV_per_A)
        counts.append(report.charges["labels"])
    assert counts == [16 * 13, 16 * 17]
    assert errors[1] < 0.2 * errors[0]


def test_labels_of_charges_that_are_not_there_or_of_another_total_are_refused():
    structures, targets = ions(8, 0, 6.0)
    charged = replace(structures, charges=torch.ones(8, dtype=torch.float64))
    dipoles = torch.ones(8, 3, dtype=torch.float64)
    for s, t in ((structures, targets), (charged, replace(targets, dipoles=dipoles))):
        with pytest.raises(UserError, match="dipoles of neutral isolated structures, in the data, and there are none"):
            gpmlp.fit(s, t, _recipe(charges="local", labels="use"))
    charges = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64).repeat(8)
    with pytest.raises(UserError, match="charges sum to 2.000 e where the total charge is 0 e"):
        gpmlp.fit(structures, replace(targets, charges=charges), _recipe(charges="local", labels="only"))
    with pytest.raises(ValueError, match="no meaning where charges are off"):
        _recipe(labels="use")
