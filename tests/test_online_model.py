"""An online model gets label after label, and is fitted to all of them together as these grow."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ase import Atoms
from systems import KERNELS, crystal, descriptor, random_term, targets_of

from gpmlp.core.quantities import Prediction, Targets, Variance
from gpmlp.core.structures import Structures
from gpmlp.fitting import calibrate
from gpmlp.fitting.calibrate import PrequentialPrediction
from gpmlp.fitting.online import OnlineFit
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.learning.labels import LabelEntry
from gpmlp.learning.model import LATEST, OnlineModel, error_over_median, force_errors
from gpmlp.learning.recipe import RefreshRecipe
from gpmlp.learning.triggers import frame_exceedance
from gpmlp.recipe import Recipe
from gpmlp.uncertainty.calibration import Calibration

RECIPE = Recipe.model_validate(
    {
        "descriptor": {"cutoff": 3.2, "n_max": 3, "l_max": 2, "sigma_atom": 0.5},
        "inducing": {"gradients": 1},
        "baseline": {"zbl": False, "isolated_atoms": "none"},
    }
)
TRUTH = random_term(descriptor("soap gto"), KERNELS["polynomial 3"])


def entries(n: int) -> list[LabelEntry]:
    out = []
    for seed in range(n):
        one = crystal("cubic", (6, 8), seed)
        out.append(LabelEntry(one, targets_of(one, TRUTH(one)), f"k{seed}", "a test", "", {}))
    return out


def test_the_model_is_made_anew_as_labels_grow():
    some = entries(12)
    taught = OnlineModel.from_labels(some[:4], RECIPE, RefreshRecipe(labels=2))
    made = [taught.fitted_labels]
    for entry in some[4:]:
        taught = taught.with_label(entry)
        made.append(taught.fitted_labels)
    # due after every second label: 6 >= 1.3 x 4, 8 >= 1.3 x 6, 10 < 1.3 x 8 (10.4), 12
    assert made == [4, 4, 6, 6, 8, 8, 8, 8, 12]
    anew = [e for e in taught.online.events if "made anew" in e]
    assert [int(e.split()[0]) for e in anew] == [4, 6, 8, 12]
    assert any(e.startswith("10 labels: refreshed: 2 labels since") for e in taught.online.events)


def test_made_anew_it_knows_what_all_labels_together_tell():
    """Whatever it was before: to 1e-9, the sums over labels being taken in turn or together."""
    some = entries(6)
    taught = OnlineModel.from_labels(some[:4], RECIPE, RefreshRecipe(labels=2))
    for entry in some[4:]:
        taught = taught.with_label(entry)
    data = Structures.concatenate([e.structure for e in some]), Targets.concatenate([e.targets for e in some])
    together, probe = OnlineFit.begin(*data, RECIPE).potential, crystal("cubic", (6, 8), 99)
    a, b = taught.potential(probe), together(probe)
    torch.testing.assert_close(a.forces, b.forces, rtol=0, atol=1e-9)
    assert float(a.energies) == pytest.approx(float(b.energies), abs=1e-9)
    assert taught.fitted_labels == 6  # all of them


def test_refreshed_where_labels_become_unlikely():
    """Forces twenty times as large as those before: their likelihood falls, averaged over three labels, and that is said."""
    some = entries(10)
    usual, other = some[:6], [replace(e, targets=replace(e.targets, forces=20 * e.targets.forces)) for e in some[6:]]
    refresh = RefreshRecipe(labels=100, drift=1.0)
    taught = OnlineModel.from_labels(usual[:4], RECIPE, refresh)
    since = []
    for entry in (*usual[4:], *other):
        taught = taught.with_label(entry)
        since.append(taught.since_refresh)
    assert since[:2] == [1, 2] and 0 in since[2:]
    assert any("the negative log likelihood of predicted forces rose by" in e for e in taught.online.events)
    deaf = OnlineModel.from_labels(usual[:4], RECIPE, RefreshRecipe(labels=100, drift=1e9))
    for entry in (*usual[4:], *other):
        deaf = deaf.with_label(entry)
    assert deaf.since_refresh == 6 and not any("rose by" in e for e in deaf.online.events)


# ---------------------------------------------------------------- errors of what was asked for


def foretold(errors: list[float], sigma: float = 0.1) -> PrequentialPrediction:
    """A prediction of atoms far apart whose forces are off by so much along x (NaN: no label), with isotropic standard deviations."""
    n = len(errors)
    structures = structures_from_ase([Atoms(f"Cu{n}", positions=[[5.0 * i, 0, 0] for i in range(n)])])
    zeros, none = torch.zeros(n, 3, dtype=torch.float64), torch.zeros(n, 3, 3, dtype=torch.float64)
    covariance = Variance(none, none + sigma**2 * torch.eye(3, dtype=torch.float64), none, none)
    prediction = Prediction(
        torch.zeros(1, dtype=torch.float64), zeros[:, 0], zeros, none[:1], forces_covariance=covariance
    )
    forces = zeros.clone()
    forces[:, 0] = torch.tensor(errors, dtype=torch.float64)
    return PrequentialPrediction(structures, replace(Targets.unlabelled(structures), forces=forces), prediction)


def test_errors_of_labels_beside_what_was_expected():
    """One atom: the median of the norm of three normal numbers is 1.5382 times their standard deviation."""
    identity = Calibration.identity()

    def of(errors: list[float]) -> float:
        return error_over_median(*force_errors(foretold(errors), identity))

    assert of([0.15382]) == pytest.approx(0, abs=2e-4)  # xtol of brentq
    assert of([0.30764, math.nan]) == pytest.approx(math.log(2), abs=2e-4)
    assert math.isnan(of([math.nan]))


def test_spread_of_what_was_asked_for():
    """Six labels with errors a third of what was expected, after others that do not count; two are supposed to have agreed."""
    third, first = foretold([0.15382 / 3]), foretold([9.0])
    online = SimpleNamespace(prequential=(first, *[third] * 6), calibration=Calibration.identity())
    model = OnlineModel(online, RefreshRecipe(), 1)
    assert model.error_spread(6) == pytest.approx(3 ** (-6 / 8), rel=1e-3)
    assert model.error_spread(0) == 1.0
    few = replace(Calibration.identity(), source={"how": calibrate.HOW})
    prequential = OnlineModel(SimpleNamespace(prequential=(third,) * 6, calibration=few), RefreshRecipe(), 1)
    assert prequential.error_spread(6) == model.error_spread(6)  # narrower too
    wide = OnlineModel(SimpleNamespace(prequential=(first,) * 6, calibration=few), RefreshRecipe(), 1)
    assert wide.error_spread(6) > 10
    many = SimpleNamespace(prequential=(*[first] * 9, *[third] * LATEST), calibration=Calibration.identity())
    of_latest = OnlineModel(many, RefreshRecipe(), 1).error_spread(9 + LATEST)
    assert of_latest == pytest.approx(3 ** (-LATEST / (LATEST + 2)), rel=1e-3)  # the model has changed since the others


def test_errors_beyond_a_limit_beside_those_foreseen():
    """Of six labels, whose largest errors are as expected, as many as probabilities say, and two that are supposed to have been seen."""
    as_expected, first = foretold([0.15382]), foretold([9.0])
    found = {"prequential": (first, *[as_expected] * 6)}
    for how in (calibrate.HOW, calibrate.LEFT_OUT):
        known = replace(Calibration.identity(), source={"how": how})
        model = OnlineModel(SimpleNamespace(**found, calibration=known), RefreshRecipe(), 1)
        for limit, seen in ((0.15, 6), (0.16, 0), (0.5, 0)):
            expected = 6 * frame_exceedance(0.01 * torch.eye(3, dtype=torch.float64)[None], limit)
            ratio = (seen + 2) / (expected + 2)
            # frames chosen for a large probability say nothing of those that pass, where standard deviations are right on the whole
            least = 1.0 if how == calibrate.LEFT_OUT else 0.0
            assert model.exceedance_ratio(6, limit) == pytest.approx(max(least, ratio), rel=1e-4)
        assert model.exceedance_ratio(6, 0.15) > 1.1
    assert model.exceedance_ratio(0, 0.1) == 1.0
