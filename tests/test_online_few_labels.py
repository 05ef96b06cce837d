"""Few labels of an online model: its energies and forces are calibrated on fits made anew without a part of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_online import begun, first_data, labelled, probes, recipe, refit, together

from gpmlp.core.quantities import Prediction, Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting import calibrate
from gpmlp.fitting.online import OnlineFit


def test_few_labels_are_calibrated_on_fits_made_anew():
    """Each part of the labels is predicted by a fit begun with the others, at the hyperparameters of all; stresses stay as they were."""
    data = together(*(labelled(seed) for seed in range(12)))
    online = OnlineFit.begin(*data, recipe())
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for k in range(calibrate.FOLDS):
        held = sorted(order[k :: calibrate.FOLDS])
        others = [i for i in range(12) if i not in held]
        part = OnlineFit.begin(data[0].select(others), data[1].select(data[0], others), recipe())
        part = replace(part, noise=online.noise, signal=online.signal, constant=online.constant)
        here, labels = data[0].select(held), data[1].select(data[0], held)
        wanted = refit(replace(part, label_noise=online.label_noise))
        novelty = part.potential(here, novelty=True).novelty
        kinds = ("energies", "forces", "stresses")
        found.append((here, labels, replace(wanted(here, kinds, calibrated=False), novelty=novelty)))
    parts = zip(*found, strict=True)
    left = calibrate.LeftOut(*(a.concatenate(b) for a, b in zip((Structures, Targets, Prediction), parts, strict=True)))
    expected, learned = calibrate.left_out_calibration(left).kinds, online.calibration.kinds
    for kind in ("energies", "forces"):
        assert learned[kind].n == expected[kind].n
        assert learned[kind].scale == pytest.approx(expected[kind].scale, rel=1e-5)
        assert learned[kind].multipliers["all"] == pytest.approx(expected[kind].multipliers["all"], rel=1e-4)
    assert learned["energies"].n == 12
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "FEW_ANEW", 11)
        before = online._calibrated().calibration.kinds
    assert before["stresses"] == learned["stresses"]
    assert all(before[kind] != learned[kind] for kind in ("energies", "forces"))


def test_a_fit_made_anew_to_all_labels_is_the_fit():
    online = begun(12)
    anew = online._anew(online.structures, online.targets)
    kinds = ("energies", "forces")
    for a, b in zip(
        *([p.energies, p.forces, p.energies_variance.total, p.forces_covariance.total]
          for p in (anew(probes(), kinds, calibrated=False), online.potential(probes(), kinds, calibrated=False))),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
    fewer = online._anew(*first_data(2))  # that have fewer environments than the recipe asks for
    assert fewer(probes(), "energies").energies_variance.total.isfinite().all()
