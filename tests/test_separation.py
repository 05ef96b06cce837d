"""Gaps between parts of structures, and standard deviations that are larger where they are larger than those learned from."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from systems import structure

from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Prediction, Variance
from gpmlp.core.structures import Structures
from gpmlp.io.model_header import check_header
from gpmlp.uncertainty import calibration as of_calibration
from gpmlp.uncertainty import separation
from gpmlp.uncertainty.calibration import Calibration, calibrate_prediction
from gpmlp.uncertainty.separation import SeparationScale, farthest_apart, largest_gaps

NAN, OPEN = float("nan"), torch.zeros(3, 3, dtype=torch.float64)


def pair(gap: float, periodic: bool = False) -> Structures:
    """Two chains of two atoms each with a bond of 1 A, so far apart."""
    positions = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1 + gap, 0, 0], [2 + gap, 0, 0]], dtype=torch.float64)
    cell = 30 * torch.eye(3, dtype=torch.float64) if periodic else OPEN
    return structure(positions, (1, 8, 1, 8), cell, (periodic,) * 3)


def test_gap_is_the_smallest_distance_between_the_parts():
    one = structure(torch.zeros(1, 3, dtype=torch.float64), (8,), OPEN)
    every = Structures.concatenate([pair(5.0), pair(0.5), pair(5.0, periodic=True), one])
    assert largest_gaps(every).tolist() == pytest.approx([5.0, 1.0, 0.0, 0.0])


def test_the_farthest_of_those_in_parts_are_left_out(monkeypatch):
    gaps = [1.0] * 10 + [4.0 + 0.1 * k for k in range(24)]
    every = Structures.concatenate([pair(gap) for gap in gaps])
    assert farthest_apart(every) == list(range(26, 34))
    assert farthest_apart(every.select(range(30))) == []  # a third of them are too few
    monkeypatch.setattr(separation, "LABELS", 9 * 13)
    assert len(farthest_apart(Structures.concatenate([every, every]))) == 9


def test_factor_is_the_size_of_errors_and_grows_with_the_gap():
    squares = {"energies": torch.full((10,), 4.0), "forces": torch.full((120,), 0.25)}
    found = SeparationScale.fit(torch.linspace(5.0, 7.0, 10, dtype=torch.float64), squares)
    assert (found.begin, found.structures) == (5.0, 10) and 5.0 < found.full < 7.0
    assert found.factors["energies"] == pytest.approx(2 * (10 / 8) ** 0.5) and found.factors["forces"] == 1.0
    every = Structures.concatenate([pair(gap) for gap in (4.9, 0.5 * (5.0 + found.full), 20.0)])
    near, middle, far = found.factor("energies", largest_gaps(every)).tolist()
    assert near == 1.0 and far == pytest.approx(found.factors["energies"]) and middle == pytest.approx(far**0.5)


def test_calibration_widens_what_is_apart_and_keeps_it_in_files():
    every = Structures.concatenate([pair(1.0), pair(20.0)])
    apart = SeparationScale(5.0, 6.0, {"energies": 3.0, "forces": 2.0}, 9)
    calibration = replace(Calibration.identity(), apart=apart)
    assert (
        Calibration.from_dict(calibration.as_dict()) == calibration and "apart" not in Calibration.identity().as_dict()
    )
    ones, eyes = torch.ones(2, dtype=torch.float64), torch.eye(3, dtype=torch.float64).expand(8, 3, 3)
    zeros = torch.zeros(8, 3, dtype=torch.float64)
    raw = Prediction(ones, ones.repeat(4), zeros, torch.zeros(2, 3, 3, dtype=torch.float64))
    raw = replace(raw, energies_variance=Variance(*[ones] * 4), forces_covariance=Variance(*[eyes] * 4))
    found = calibrate_prediction(raw, every, calibration)
    assert found.energies_variance.total.tolist() == pytest.approx([4.0, 36.0])
    # of a part alone, of which there are no labels, the process itself says how large the part due to the inducing set is
    alone = apart.within(largest_gaps(every).repeat(7), 10.0)
    assert alone.reach == 10.0 and apart.within(largest_gaps(every).repeat(8), 10.0).reach is None
    assert apart.within(largest_gaps(every), math.inf).reach is None  # nothing is beyond it
    smaller = replace(calibration, apart=replace(alone, factors={}, prior=9.0))
    assert calibrate_prediction(raw, every, smaller).energies_variance.total.tolist() == pytest.approx([4.0, 12.0])
    assert smaller.with_amplitude(0.5).apart.prior == 18.0
    assert Calibration.from_dict(smaller.as_dict()) == smaller
    sizes = found.forces_covariance.total.diagonal(dim1=1, dim2=2).mean(1)
    assert sizes.tolist() == pytest.approx([4.0] * 4 + [16.0] * 4)


def test_gaps_are_not_looked_for_where_nothing_depends_on_them(monkeypatch):
    every, ones = pair(20.0), torch.ones(1, dtype=torch.float64)
    raw = Prediction(ones, ones, torch.zeros(len(every.species), 3, dtype=torch.float64), torch.zeros(1, 3, 3))
    raw = replace(raw, energies_variance=Variance(*[ones] * 4))
    calls = []
    monkeypatch.setattr(of_calibration, "largest_gaps", lambda s: calls.append(s) or largest_gaps(s))
    for apart, wanted in (
        (SeparationScale(5.0, 6.0, {"energies": 1.0}, 9), 0),
        (SeparationScale(5.0, 6.0, {}, 9, 10.0), 1),
    ):
        calls.clear()
        calibrate_prediction(raw, every, replace(Calibration.identity(), apart=apart))
        assert len(calls) == wanted


APART = {"begin": 5.0, "full": 6.0, "factors": {"energies": 2.0}, "structures": 9, "reach": 10.0, "prior": 2.0}
ALTERED = [
    *({"factors": {"energies": value}} for value in (-2.0, 0, 0.001, 1e300, "2", NAN, [2.0])),
    *({"factors": value} for value in ([2.0], {"charges": 2.0}, None)),
    *({"begin": value} for value in ("5", 7.0, -1.0, NAN)),
    *({"full": value} for value in (4.0, math.inf, None)),
    *({"reach": value} for value in ("a", math.inf, 0.0)),
    *({"prior": value} for value in (-1e9, 0, "1")),
    *({"structures": value} for value in (-1, 1.5)),
]


@pytest.mark.parametrize("changed", [*ALTERED, [1]], ids=str)
def test_files_that_were_altered_are_refused(changed, potential):
    header = json.loads(json.dumps(potential.state()[0]))
    header["calibration"]["apart"] = changed if isinstance(changed, list) else APART | changed
    with pytest.raises(UserError, match="calibration.apart"):
        check_header(header)


def test_keys_of_other_versions_pass(potential):
    header = json.loads(json.dumps(potential.state()[0]))
    header["calibration"]["apart"] = APART | {"of_another_version": 1}
    check_header(header)
    assert Calibration.from_dict(header["calibration"]).apart == SeparationScale(**APART)
