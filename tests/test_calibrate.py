"""Calibration on structures set aside: noise that was put in is recovered, and a model class that is too narrow gives a warning."""

from __future__ import annotations

import math
from dataclasses import replace

import ase.build
import pytest
import torch
from ase import Atoms
from conftest import copper, labelled
from systems import cluster

import gpmlp
from gpmlp.core.quantities import Prediction, Targets, Variance
from gpmlp.core.structures import Structures
from gpmlp.fitting import calibrate
from gpmlp.fitting.fit import fit
from gpmlp.io.ase_atoms import from_ase
from gpmlp.recipe import CalibrationRecipe, Recipe
from gpmlp.uncertainty import residuals

SMALL = {"descriptor": {"cutoff": 4.0, "n_max": 4, "l_max": 2}, "inducing": {"n": 30, "gradients": 0}}
BARE = {"calibration": False, "novelty": False, "variance": False, "baseline": {"zbl": False, "isolated_atoms": "none"}}
NOISE = {"energies": 1e-3, "forces": 0.02, "stresses": 5e-4}


def strained(scale: float) -> Atoms:
    """A perfect cubic cell of copper."""
    frame = ase.build.bulk("Cu", cubic=True)
    frame.set_cell(scale * frame.cell.array, scale_atoms=True)
    return labelled(frame)


@pytest.fixture(scope="module")
def silicon():
    return gpmlp.read("data/silicon/train.xyz", "1:")


def many(labels: list[str], atoms: int = 2) -> tuple[Structures, Targets]:
    structures = Structures.concatenate([cluster((6,) * atoms, seed) for seed in range(len(labels))])
    return structures, replace(Targets.unlabelled(structures), config_types=tuple(labels))


def test_every_config_type_gives_its_share():
    structures, targets = many(["a"] * 80 + ["b"] * 40 + ["isolated_atom"])
    kept, held, _ = calibrate.calibration_split(structures, targets, CalibrationRecipe(fraction=0.1), 0)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(121))
    assert sum(i < 80 for i in held.tolist()) == 8 and sum(80 <= i < 120 for i in held.tolist()) == 4
    assert 120 in kept.tolist()
    again = calibrate.calibration_split(structures, targets, CalibrationRecipe(fraction=0.1), 0)[1]
    other = calibrate.calibration_split(structures, targets, CalibrationRecipe(fraction=0.1), 1)[1]
    assert torch.equal(held, again) and not torch.equal(held, other)


def test_rare_config_types_take_their_turn():
    """Of thirty kinds of four structures each, twelve give one, and which do is left to chance."""
    structures, targets = many([f"kind {i // 4}" for i in range(120)])
    draws = [
        calibrate.calibration_split(structures, targets, CalibrationRecipe(fraction=0.1), seed)[1] for seed in range(20)
    ]
    assert all(len(held) == 12 == len({i // 4 for i in held.tolist()}) for held in draws)
    assert len({i // 4 for held in draws for i in held.tolist()}) == 30


@pytest.mark.parametrize("n, held", [(24, 8), (60, 10), (200, 20)])
def test_ten_structures_at_least_up_to_a_third(n, held):
    assert len(calibrate.calibration_split(*many(["a"] * n), CalibrationRecipe(), 0)[1]) == held


def test_forces_that_vanish_calibrate_nothing():
    """Strained perfect crystals: forces are zero by symmetry, and that says nothing of how large errors of others are."""
    structures, targets = from_ase([strained(1 + 0.002 * i) for i in range(24)])
    potential, report = fit(structures, targets, Recipe.model_validate({"inducing": {"n": 8, "gradients": 2}}))
    assert potential.calibration.kinds["forces"].n == 0 and potential.calibration.sample_scale is None
    assert any("Error bars of forces are not calibrated" in text for text in report.warnings)
    assert not any("Misspecification" in text for text in report.warnings)
    moved, known = from_ase([copper(seed) for seed in range(4)])
    prediction = potential(moved, variance="forces")
    std = prediction.forces_variance.total.sqrt()
    assert ((prediction.forces - known.forces).abs() < 1.645 * std).double().mean() > 0.9


def test_labels_scatter_where_symmetry_forbids_a_force():
    """Perfect crystals beside others, labels with noise of 1e-3 eV/A: error bars of forbidden forces are as wide as that and no wider."""
    frames = [strained(1 + 0.003 * (i % 12)) if i % 2 else copper(i) for i in range(48)]
    structures, targets = from_ase(frames)
    noise = 1e-3 * torch.randn(targets.forces.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisy = replace(targets, forces=targets.forces + noise)
    potential, _ = fit(structures, noisy, Recipe.model_validate({"inducing": {"n": 30, "gradients": 2}}))
    assert potential.calibration.kinds["forces"].forbidden == pytest.approx(1e-3, rel=0.2)
    std = potential(from_ase([strained(1.02)])[0], variance="forces").forces_variance.total.sqrt()
    assert torch.allclose(std, torch.full_like(std, 1e-3), rtol=0.25)


def test_no_more_atoms_than_asked():
    structures, targets = many(["a"] * 50)
    _, held, _ = calibrate.calibration_split(structures, targets, CalibrationRecipe(fraction=0.3, atoms=10), 0)
    assert len(held) == 5


@pytest.mark.parametrize("labels, recipe", [(["a"] * 19, CalibrationRecipe()), (["a"] * 60, False)])
def test_nothing_is_set_aside(labels, recipe):
    assert len(calibrate.calibration_split(*many(labels), recipe, 0)[1]) == 0


def test_what_was_set_aside_is_learned_from_too(silicon):
    """All labels are in the posterior, and the fit says how many structures calibrated it: each was left out in turn."""
    structures, targets = silicon
    some = list(range(0, 120, 2))
    data = structures.select(some), targets.select(structures, some)
    potential, report = fit(*data, Recipe.model_validate(SMALL))
    assert report.held_out == report.independent_groups == potential.calibration.source["held_out_structures"]
    assert report.rows["forces"] == 3 * data[0].n_atoms and report.rows["energies"] == 60


@pytest.mark.parametrize("size", [1, 3, 10])
def test_noise_that_was_put_in_is_found(silicon, size):
    """Labels of a potential of the class, with noise: within 10 % on average over 5 seeds, three standard errors each."""
    structures, targets = silicon
    truth = fit(structures, targets, Recipe.model_validate(SMALL | BARE))[0](structures)
    ratios: dict[str, list[float]] = {kind: [] for kind in NOISE}
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)

        def scatter(like: torch.Tensor, generator=generator) -> torch.Tensor:
            return torch.randn(like.shape, generator=generator, dtype=torch.float64)

        upper = torch.triu(scatter(truth.stresses))
        stresses = upper + torch.triu(upper, 1).transpose(1, 2)
        noisy = replace(
            targets,
            energies=truth.energies + size * NOISE["energies"] * structures.counts * scatter(truth.energies),
            forces=truth.forces + size * NOISE["forces"] * scatter(truth.forces),
            stresses=truth.stresses + size * NOISE["stresses"] * stresses,
        )
        _, report = fit(structures, noisy, Recipe.model_validate(SMALL | BARE))
        for kind, sigma in NOISE.items():
            ratios[kind].append(report.noise[kind] / (size * sigma))
        assert report.label_noise["forces"] == pytest.approx(size * NOISE["forces"], rel=0.15)
    for kind, found in ratios.items():
        n = {"energies": 240, "forces": 6000, "stresses": 1500}[kind]  # what is left of them after 30 columns
        assert sum(found) / 5 == pytest.approx(1, abs=0.1), kind
        assert max(abs(r - 1) for r in found) < 0.01 + 3.5 / math.sqrt(2 * n), (kind, found)


def test_label_noise_needs_whole_structures():
    structures = cluster((6, 8, 6))
    unknown = Targets.unlabelled(structures)
    assert math.isnan(residuals.force_label_noise(structures, unknown))
    forces = torch.tensor([[1.0, 0, 0], [0, 1, 0], [-1, -1, 0]], dtype=torch.float64)
    assert residuals.force_label_noise(structures, replace(unknown, forces=forces)) == pytest.approx(0, abs=1e-15)
    one_missing = forces.clone()
    one_missing[0] = float("nan")
    assert math.isnan(residuals.force_label_noise(structures, replace(unknown, forces=one_missing)))


def test_a_cutoff_that_is_too_short_is_told(silicon):
    """And it is misspecification that grows, not what more data would fix."""
    some = range(0, 268, 4)
    structures, targets = silicon[0].select(some), silicon[1].select(silicon[0], some)
    found = {}
    for cutoff in (2.6, 5.0):
        shape = {"cutoff": cutoff, "n_max": 6, "l_max": 4}
        recipe = Recipe(descriptor=shape, inducing={"n": 60, "gradients": 2}, seed=1)
        potential, report = fit(structures, targets, recipe)
        told = [w for w in report.warnings if w.startswith("Misspecification")]
        variance = potential(structures.select(range(0, 65, 5)), variance="forces").forces_variance
        found[cutoff] = float(variance.misspecification.mean()), float(variance.data.mean()), told
    assert found[2.6][2] and not found[5.0][2]
    assert found[2.6][0] > 2 * found[5.0][0]
    assert found[2.6][0] > 5 * found[2.6][1]


def test_more_data_narrow_the_data_part_alone(silicon):
    structures, targets = silicon
    recipe = Recipe.model_validate(SMALL | {"calibration": False})
    some = list(range(0, 268, 10))
    probe = structures.select(range(5, 268, 30))
    few = fit(structures.select(some), targets.select(structures, some), recipe)[0](probe, variance="forces")
    many_ = fit(structures, targets, recipe)[0](probe, variance="forces")
    data = float(many_.forces_variance.data.mean() / few.forces_variance.data.mean())
    rest = [float((p.forces_variance.misspecification + p.forces_variance.noise).mean()) for p in (few, many_)]
    assert data < 0.3  # ten times the data
    assert 0.5 < rest[1] / rest[0] < 2


def test_a_rare_species_is_not_set_aside():
    structures = Structures.concatenate([*(cluster((6, 6), seed) for seed in range(40)), cluster((6, 8), 3)])
    targets = replace(Targets.unlabelled(structures), config_types=("a",) * 41)
    for seed in range(30):
        kept, held, _ = calibrate.calibration_split(structures, targets, CalibrationRecipe(fraction=0.3), seed)
        assert 40 in kept.tolist() and len(kept) + len(held) == 41


def test_what_symmetry_makes_zero_teaches_nothing():
    """As many exact zeros beside: the same calibration as without them."""
    generator = torch.Generator().manual_seed(3)
    n = 240
    data = 1e-3 * torch.rand(n, 3, generator=generator).double() + 1e-5
    error = (2 * data + 1e-4).sqrt() * torch.randn(n, 3, generator=generator).double()

    def learned(zeros: int):
        def padded(values):
            return torch.cat([values, values.new_zeros(zeros, *values.shape[1:])])

        count = n + zeros
        alone = Structures(
            torch.zeros(count, 3).double(), torch.zeros(count, 3, 3).double(), torch.zeros(count, 3, dtype=torch.bool),
            torch.full((count,), 14), torch.arange(count),
        )  # fmt: skip
        zero = torch.zeros(count, 3, 3).double()
        variance = Variance(
            zero, torch.diag_embed(padded(data)), 1e-4 * torch.eye(3).double().expand(count, 3, 3), zero
        )
        unknown = Targets.unlabelled(alone)
        prediction = Prediction(
            torch.zeros(count).double(), torch.zeros(count).double(), padded(error), unknown.stresses,
            forces_covariance=variance,
        )  # fmt: skip
        found = calibrate.learn_calibration(
            prediction, alone, replace(unknown, forces=torch.zeros(count, 3).double()), "a test"
        )
        return found.kinds["forces"]

    assert learned(3 * n) == learned(0)
    assert learned(0).weights[2] > 0.1  # without the zeros the constant part counts


@pytest.mark.parametrize("n", [25, 400])
def test_sizes_of_energies_follow_the_exact_process_too(n):
    """Errors of energies of few structures happen to be half as large as it expects, those of their many forces are 1.5 times as large."""
    structures, targets = many(["a"] * n, atoms=3)
    generator = torch.Generator().manual_seed(1)
    errors = {"energies": torch.randn(n, generator=generator).double() * 3 * 1e-3}
    errors["forces"] = torch.randn(3 * n, 3, generator=generator).double() * 0.15
    targets = replace(targets, energies=0 * errors["energies"], forces=0 * errors["forces"])
    squares = {kind: error.square().mean() for kind, error in errors.items()}

    def variance(like: torch.Tensor, size: float) -> Variance:
        parts = (torch.rand(len(like), generator=generator).double() + 0.5 for _ in range(2))
        shape = (-1,) if like.dim() == 1 else (-1, 1, 1)
        unit = torch.ones(()) if like.dim() == 1 else torch.eye(3)
        inducing, data = (size * part.reshape(shape) * unit.double() for part in parts)
        return Variance(inducing, data, 0 * data, 0.1 * size * torch.ones_like(data) * unit.double())

    prediction = Prediction(
        errors["energies"],
        errors["forces"].new_zeros(3 * n),
        errors["forces"],
        errors["forces"].new_full((n, 3, 3), torch.nan),
        energies_variance=variance(errors["energies"], 1e-5),
        forces_covariance=variance(errors["forces"], 0.02),
    )
    expected = {
        "energies": squares["energies"].expand(n) / 9 * 4,
        "forces": squares["forces"].expand(9 * n) / 1.5**2,
    }
    left = calibrate.LeftOut(structures, targets, prediction, expected)
    factor = calibrate.size_by_process(left)
    assert factor == pytest.approx(3 ** (100 / (100 + n)))
    assert calibrate.size_by_process(replace(left, expected={})) == 1.0
    found, without = (calibrate.left_out_calibration(one).kinds for one in (left, replace(left, expected={})))
    assert found["energies"].scale == pytest.approx(factor * without["energies"].scale)
    assert found["forces"].scale == pytest.approx(without["forces"].scale)


def test_every_structure_is_predicted_by_a_fit_to_others():
    structures, targets = many(["a"] * 11 + ["isolated_atom"])
    targets = replace(targets, energies=2.0 ** torch.arange(12.0, dtype=torch.float64))

    def fit_to(known: Structures, labels: Targets):
        seen = set(labels.energies.tolist())

        def potential(here: Structures, variance, novelty, calibrated) -> Prediction:
            assert "isolated_atom" in labels.config_types and variance == ["energies"] and not calibrated
            assert len(known) == len(seen) and len(seen) + len(here) == 12
            nothing = torch.zeros(len(here), dtype=torch.float64)
            out = Prediction(nothing + sum(seen), *(torch.zeros(1, dtype=torch.float64),) * 3)
            return replace(out, energies_variance=Variance(*(nothing,) * 4))

        potential.novelty = None
        return potential

    found = calibrate.predict_in_folds(structures, targets, fit_to)
    assert sorted(found.targets.energies.tolist()) == [2.0**i for i in range(11)]
    # what it was predicted from does not hold its own label, nor those of its part
    parts = [(found.prediction.energies == total).nonzero()[:, 0] for total in found.prediction.energies.unique()]
    for part in parts:
        assert found.prediction.energies[part[0]] == 4095.0 - found.targets.energies[part].sum()
    assert len(found.structures) == 11 and {len(part) for part in parts} == {1, 2}
    apart = Structures.concatenate([cluster((6, 6), 0), cluster((8, 8), 1)])
    # no fit to the other knows its species
    assert calibrate.predict_in_folds(apart, Targets.unlabelled(apart), fit_to) is None
