"""Structures left out give the amplitude of what the inducing set misses, that of fits without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles import fitted_without

import gpmlp
from gpmlp.fitting import left_out
from gpmlp.fitting.fit import AMPLITUDE_ATOMS
from gpmlp.potential.evaluation import evaluate
from gpmlp.recipe import Recipe
from gpmlp.uncertainty import residuals as residuals_module

DATA = Path(__file__).parents[1] / "data" / "silicon"
SMALL = {"descriptor": {"n_max": 5, "l_max": 3, "cutoff": 4.5}}


@pytest.fixture(scope="module")
def silicon():
    return gpmlp.read(DATA / "train.xyz", "::10")


@pytest.fixture(scope="module")
def caught(silicon):
    """The arguments with which a fit leaves structures out, what it gets, and the potential that it gives."""
    recipe = Recipe.model_validate(
        SMALL
        | {"inducing": {"n": 60, "gradients": 1}, "calibration": False, "novelty": False, "variance": {"columns": 400}}
    )
    seen = []
    original = left_out.predict_left_out
    left_out.predict_left_out = lambda *arguments, **named: (
        seen.append((arguments, original(*arguments, **named))) or seen[-1][1]
    )
    try:
        potential, _ = gpmlp.fit(*silicon, recipe)
    finally:
        left_out.predict_left_out = original
    return *seen[0], potential


def test_the_amplitude_is_the_most_likely(caught, silicon):
    """On all structures that are left out, refitted one by one, no other size of the missing part is more likely."""
    arguments, predicted, potential = caught
    raw, learned, structures, chosen = arguments[0], arguments[2], arguments[4], arguments[7]
    assert raw.variances.n_columns == raw.variances.of_fit and structures.counts[chosen].sum() <= AMPLITUDE_ATOMS
    errors, missed, rest = [], [], []
    for k, i in enumerate(chosen):
        without = fitted_without(arguments, [i])(structures.select([i]), "forces", form="dtc", calibrated=False)
        mine = slice(*(predicted.structures.offsets[k : k + 2].tolist()))
        seen = predicted.prediction.forces_variance.inducing[mine].isfinite().flatten()
        assert seen.sum() == 3 * min(left_out.FORCE_ATOMS, len(seen) // 3)
        found, known = without.forces_variance, arguments[5].select(structures, [i]).forces
        errors.append((known - without.forces).flatten()[seen]), missed.append(found.inducing.flatten()[seen])
        rest.append(found.data.flatten()[seen] + learned.noise["forces"] ** 2)
    errors, missed, rest = (torch.cat(x) for x in (errors, missed, rest))

    def value(w):
        variance = w * missed + rest
        return float(
            -0.5 * (variance.log() + errors.square() / variance).sum() - 0.5 * (torch.tensor(w).log() / 2) ** 2
        )

    best = potential.variances.amplitude
    assert 1e-6 < best < 1.0  # evidence makes the missing part too large
    assert value(best) > max(value(1.1 * best), value(best / 1.1))


def test_forms(caught, silicon):
    """`scaled` has the amplitude, `dtc` has not."""
    *_, potential = caught
    some = silicon[0].select([5, 9])
    found = {f: potential(some, variance="all", form=f, calibrated=False) for f in ("scaled", "dtc")}
    for name in ("energies_variance", "atom_energies_variance", "forces_covariance", "stresses_covariance"):
        parts = {form: getattr(prediction, name) for form, prediction in found.items()}
        size = potential.variances.amplitude
        torch.testing.assert_close(parts["scaled"].inducing, size * parts["dtc"].inducing, rtol=1e-12, atol=0)
        torch.testing.assert_close(parts["scaled"].data, parts["dtc"].data, rtol=0, atol=0)
    asked = [potential(some, variance="forces", form=f).forces_variance.inducing for f in ("scaled", "dtc")]
    assert (asked[0] < asked[1]).any()  # nothing was calibrated, so the form counts


def test_calibration_does_not_depend_on_it(silicon, monkeypatch):
    """Weights learned with one size of the part give the same variances with another."""
    structures, targets = silicon
    recipe = Recipe.model_validate({"descriptor": {"n_max": 4, "l_max": 2, "cutoff": 4.0}, "inducing": {"n": 30}})
    one, _ = gpmlp.fit(structures, targets, recipe)
    monkeypatch.setattr(left_out.LeftOut, "amplitude", lambda *_: 1.0)
    other, _ = gpmlp.fit(structures, targets, recipe)
    assert one.variances.amplitude != 1.0
    some = structures.select([2, 9])
    a, b = (p(some, variance="all") for p in (one, other))
    for name in ("energies_variance", "forces_variance", "stresses_variance", "atom_energies_variance"):
        torch.testing.assert_close(getattr(a, name).total, getattr(b, name).total, rtol=1e-12, atol=0)
    forms = [one(some, variance="forces", form=f).forces_variance.total for f in ("scaled", "dtc")]
    torch.testing.assert_close(*forms, rtol=0, atol=0)  # a calibration has weights of its own


def test_what_evidence_alone_says_of_errors(silicon):
    """Nothing set aside, nothing calibrated: 90 % intervals of forces never seen hold 80 to 97 %, also after a save."""
    recipe = Recipe.model_validate(
        {"descriptor": {"n_max": 6, "l_max": 4}, "inducing": {"n": 200, "gradients": 2}, "calibration": False}
    )
    potential, _ = gpmlp.fit(*silicon, recipe)
    structures, targets = gpmlp.read(DATA / "test.xyz")
    prediction = potential(structures, variance="forces", calibrated=False)
    errors, parts, _ = residuals_module.split_residuals("forces", structures, targets, prediction)
    covered = (errors.abs() < 1.645 * parts.sum(1).sqrt()).double().mean()
    assert 0.8 <= covered <= 0.97


def test_without_energies_they_are_not_judged(silicon):
    """Forces leave the zero of energy open: that is said, and energies are not scored against it."""
    structures, targets = silicon
    potential, report = gpmlp.fit(structures, targets, Recipe(use_energies=False, inducing={"n": 30}, **SMALL), silicon)
    assert not potential.has_energy_zero and any("zero of predicted energies" in w for w in report.warnings)
    assert report.validation_errors.energy_mae_meV_per_atom != report.validation_errors.energy_mae_meV_per_atom
    found = evaluate(potential, structures, targets).as_dict()
    assert found["energy_mae_meV_per_atom"] is None and found["force_mae_meV_per_A"] > 0
    whole, _ = gpmlp.fit(structures, targets, Recipe(inducing={"n": 30}, **SMALL))
    assert whole.has_energy_zero and evaluate(whole, structures, targets).as_dict()["energy_mae_meV_per_atom"] > 0


def test_few_forces_leave_it_alone(silicon):
    structures, targets = silicon
    potential, _ = gpmlp.fit(structures, targets, Recipe(use_forces=False, use_stresses=False, **SMALL))
    assert potential.variances.amplitude == 1.0
