"""Predictions of structures left out are those of a fit without them, in every kind of label, and the choice of structures is fair."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles import fitted_without, without_columns_of

import gpmlp
from gpmlp.core.quantities import KINDS
from gpmlp.core.structures import Structures
from gpmlp.fitting import calibrate, left_out
from gpmlp.fitting.influence import Influence
from gpmlp.recipe import Recipe

DATA = Path(__file__).parents[1] / "data" / "silicon"
SMALL = {"descriptor": {"n_max": 5, "l_max": 3, "cutoff": 4.5}, "inducing": {"n": 50, "gradients": 1}, "novelty": False}


@pytest.fixture(scope="module")
def caught():
    """The arguments with which a fit of structures, some of them with noises of their own, asks for left-out predictions."""
    structures, targets = gpmlp.read(DATA / "train.xyz", "::8")
    noise = torch.full_like(targets.forces_noise, torch.nan)
    noise[structures.structure_of_atom % 3 == 0] = 0.3
    energies = torch.full_like(targets.energies_noise, torch.nan)
    energies[1::4] = 0.01
    targets = replace(targets, forces_noise=noise, energies_noise=energies)
    seen = []
    original = left_out.predict_left_out

    def spy(*arguments, **more):
        seen.append(arguments)
        return original(*arguments, **more)

    left_out.predict_left_out = spy
    try:
        gpmlp.fit(structures, targets, Recipe.model_validate(SMALL))
    finally:
        left_out.predict_left_out = original
    return seen[0]


@pytest.mark.parametrize("i, near", [(5, []), (4, []), (6, [7, 8])])
def test_left_out_is_not_learned(caught, i, near):
    """Energies, forces and stresses, and the variances that the data leave, with common noise and noises of their own."""
    structures, targets = caught[4], caught[5]
    together = {i: torch.tensor([*near, i])} if near else None
    said = []
    found = left_out.predict_left_out(*caught[:7], [i], together, report=lambda *report: said.append(report))
    assert said == [(1, 1, "1 of 1 structures left out in turn")]
    _, kept = without_columns_of(caught[1], structures, [i, *near])
    assert len(kept) < len(caught[2].signal)  # some of its environments are inducing points
    assert len(found.structures) == 1 and torch.equal(found.targets.forces, targets.select(structures, [i]).forces)
    truth = fitted_without(caught, [i, *near])(structures.select([i]), KINDS, calibrated=False)
    with_it = caught[0](structures.select([i]))
    assert (found.prediction.forces - with_it.forces).abs().max() > 1e-4  # what was learned from is another prediction
    for kind, size in (("energies", 1e-7), ("forces", 1e-7), ("stresses", 1e-9)):
        torch.testing.assert_close(getattr(found.prediction, kind), getattr(truth, kind), rtol=1e-6, atol=size)
    assert torch.allclose(found.prediction.energies_variance.data, truth.energies_variance.data, rtol=1e-6)
    assert torch.allclose(found.prediction.forces_variance.data, truth.forces_variance.data, rtol=1e-5, atol=1e-12)
    for kind, n in (("energies", 1), ("forces", left_out.FORCE_ATOMS), ("stresses", 1)):
        got, expected = (getattr(p, f"{kind}_variance") for p in (found.prediction, truth))
        known = got.inducing.isfinite()
        assert known.sum() == known[0].numel() * min(n, len(known))
        for part in ("inducing", "misspecification", "noise"):
            a, b = getattr(got, part)[known], getattr(expected, part)[known]
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-9), (kind, part)
    assert torch.allclose(found.prediction.stresses_variance.data, truth.stresses_variance.data, rtol=1e-5, atol=1e-14)


def test_structures_left_out_together_know_none_of_their_labels(caught):
    structures, block = caught[4], [4, 5, 6]
    found = left_out.predict_left_out(*caught[:7], [9], together=block).together
    truth = fitted_without(caught, block)(structures.select(block), KINDS, calibrated=False)
    assert torch.equal(found.targets.forces, caught[5].select(structures, block).forces)
    for kind, size in (("energies", 1e-7), ("forces", 1e-7), ("stresses", 1e-9)):
        torch.testing.assert_close(getattr(found.prediction, kind), getattr(truth, kind), rtol=1e-6, atol=size)
    assert torch.allclose(found.prediction.energies_variance.data, truth.energies_variance.data, rtol=1e-6)
    assert torch.allclose(found.prediction.forces_variance.data, truth.forces_variance.data, rtol=1e-5, atol=1e-12)


def test_influence_is_how_far_the_fit_moves(caught):
    """By a structure none of whose environments is an inducing point, so that the reference has the same columns."""
    structures, model = caught[4], caught[0].variances
    same = (len(without_columns_of(caught[1], structures, [i])[1]) == len(model.signal) for i in range(len(structures)))
    i = next(i for i, kept in enumerate(same) if kept and structures.counts[i] > 1)
    influence = left_out.predict_left_out(*caught[:7], [i]).influence
    others = structures.select([j for j in range(8) if j != i])
    rows = model.whitened(model.covariance_rows(others, [t.environments(others) for t in caught[0].terms])).b
    moved = fitted_without(caught, [i])(others).energies - caught[0](others).energies
    torch.testing.assert_close(moved, -(rows.energies @ influence.shifts[0]), rtol=1e-5, atol=1e-9)
    assert moved.abs().max() > 1e-4 and set(influence.kind.tolist()) == {0, 1, 2}


def test_functional_scale_is_that_of_errors():
    """Of probes whose variance is half the posterior's, half that of shifts: errors three times as large ask for a scale so much larger."""
    generator = torch.Generator().manual_seed(0)
    n, columns = 200, 400
    shifts = torch.eye(n, columns, dtype=torch.float64)
    rows = torch.zeros(n, columns, dtype=torch.float64)
    rows[torch.arange(n), (torch.arange(n) + 1) % n] = ((n - 1) / n) ** 0.5
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    about = torch.ones(n, dtype=torch.float64), torch.arange(n), torch.arange(n) % 3
    scale = {s: calibrate.functional_scale(Influence(shifts, rows, s * 2**0.5 * noise, *about)) for s in (3.0, 0.5)}
    assert scale[3.0] == pytest.approx(3.0, rel=0.15)
    assert scale[0.5] == pytest.approx(scale[3.0] / 6)


def test_scales_are_judged_on_structures_that_they_were_not_learned_from(caught):
    found = left_out.predict_left_out(*caught[:8])
    n, sizes = len(found.structures), calibrate.cross_fitted_size(found)
    plain = calibrate.learn_calibration(found.prediction, found.structures, found.targets, "")
    for kind, learned in calibrate.left_out_calibration(found).kinds.items():
        factor = max((n / (n - 2)) ** 0.5, min(sizes[kind], calibrate.LARGEST_FACTOR))
        assert learned.scale == pytest.approx(factor * plain.kinds[kind].scale) and 0.9 < sizes[kind] < 1.5
    # one far error is as large as a scale that follows it, and far beyond one that does not
    energies = found.targets.energies.clone()
    energies[3] += 5.0
    far = calibrate.cross_fitted_size(replace(found, targets=replace(found.targets, energies=energies)))
    assert far["energies"] > 2 and far["forces"] == pytest.approx(sizes["forces"])
    assert calibrate.cross_fitted_size(found.select(range(2 * calibrate.FOLDS - 1))) == {}


def test_of_many_that_are_near_the_next_are_left_out(caught, monkeypatch):
    monkeypatch.setattr(left_out, "NEAR_ATOMS", int(caught[4].counts[12:15].sum()))
    found = left_out.predict_left_out(*caught[:7], [13], {13: torch.tensor([13, *range(1, 13), *range(14, 20)])})
    expected = left_out.predict_left_out(*caught[:7], [13], {13: torch.tensor([13, 12, 14])})
    torch.testing.assert_close(found.prediction.forces, expected.prediction.forces)


def test_every_config_type_has_its_turn_and_those_set_aside_come_first():
    structures, targets = gpmlp.read(DATA / "train.xyz")
    labels = targets.config_types
    held = torch.arange(0, len(structures), 7)
    chosen = left_out.choose_left_out(structures, targets, held, 1500, 0)
    assert int(structures.counts[chosen].sum()) <= 1500 and chosen == sorted(set(chosen))
    assert "isolated_atom" not in {labels[i] for i in chosen}
    for name in set(labels) - {"isolated_atom"}:
        members = [i for i, label in enumerate(labels) if label == name]
        taken = set(chosen) & set(members)
        assert len(taken) >= min(left_out.EACH, len(members)), name
        aside = [i for i in members if i in held.tolist()]
        assert len(taken & set(aside)) >= min(len(aside), left_out.EACH)
    everything = left_out.choose_left_out(structures, targets, held, 10**9, 0)
    assert len(everything) == len(structures) - 1
    one = left_out.choose_left_out(*_first(structures, targets, 3), held[:0], 1, 0)
    assert len(one) == 1  # one at least


def test_crystals_at_rest_do_not_take_the_place_of_those_with_forces():
    """Of one config_type with thirty cells at rest and nine that are not, eight of these are left out."""
    structures, targets = gpmlp.read(DATA / "train.xyz", "1:40")
    forces = targets.forces.clone()
    forces[structures.structure_of_atom >= 9] = 0.0
    one_type = replace(targets, forces=forces, config_types=("strained",) * len(structures))
    atoms = int(structures.counts.max()) * 2 * left_out.EACH
    chosen = left_out.choose_left_out(structures, one_type, torch.zeros(0, dtype=torch.long), atoms, 0)
    assert sum(i < 9 for i in chosen) == left_out.EACH


def _first(structures: Structures, targets, n: int):
    return structures.select(range(1, n + 1)), targets.select(structures, range(1, n + 1))
