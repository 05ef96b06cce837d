"""Energies of two zeros in one set are named with their frames and offset; those of one zero are not."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ase.calculators.emt import EMT
from test_label_outliers import SMALL, crystals

import gpmlp
from gpmlp.fitting.energy_zeros import FEWEST, find_two_zeros
from gpmlp.io import ase_atoms
from gpmlp.io.label_checks.work import TWO_ZEROS, _alike, _tied
from gpmlp.recipe import Recipe

OFFSET = 0.03  # eV/atom


@pytest.fixture(scope="module")
def data():
    structures, targets = crystals(40, 0)
    return structures, replace(targets, config_types=tuple("ab"[i % 2] for i in range(40)))


def zeros(findings):
    return [finding for finding in findings if finding.kind == TWO_ZEROS]


@pytest.mark.parametrize("named", [True, False])
def test_a_fit_names_frames_of_another_zero(data, named):
    structures, targets = data
    other = torch.arange(40) % 5 == 0
    kinds = tuple("slab" if o else "bulk" for o in other.tolist()) if named else ("",) * 40
    targets = replace(targets, config_types=kinds)
    assert not zeros(gpmlp.fit(structures, targets, Recipe(**SMALL))[1].findings)
    shifted = replace(targets, energies=targets.energies + torch.where(other, 4 * OFFSET, 0.0))
    (finding,) = zeros(gpmlp.fit(structures, shifted, Recipe(**SMALL))[1].findings)
    assert finding.frames == tuple(n for n, o in zip(structures.names, other.tolist(), strict=True) if o)
    assert finding.numbers["offset_eV_per_atom"] == pytest.approx(OFFSET, abs=0.2 * OFFSET)
    assert ("config_type (slab)" in finding.message) == named


def test_near_frames_of_two_config_types_tell_it_without_a_fit(data):
    structures, targets = data
    assert not zeros(gpmlp.check(structures, targets))
    other = torch.arange(40) % 2 == 1
    (finding,) = zeros(
        gpmlp.check(structures, replace(targets, energies=targets.energies + torch.where(other, 4 * 0.5, 0.0)))
    )
    assert finding.severity == "error"
    assert abs(finding.numbers["offset_eV_per_atom"]) == pytest.approx(0.5, abs=0.1)


def test_the_group_that_deviates_from_all_others_is_named_alone(data):
    """Of three config_types, with its sign, however many frames it has; of two, that of fewer frames."""
    structures, targets = data
    for kinds, sign in ((tuple("abc"[i % 3] for i in range(40)), 1), (tuple("bcbbc"[i % 5] for i in range(40)), -1)):
        other = torch.tensor([kind == "c" for kind in kinds])
        energies = targets.energies + torch.where(other, sign * 4 * 0.5, 0.0)
        (finding,) = zeros(gpmlp.check(structures, replace(targets, energies=energies, config_types=kinds)))
        assert finding.message.startswith("the energies of c are ")
        assert finding.numbers["offset_eV_per_atom"] == pytest.approx(sign * 0.5, abs=0.1)


def test_groups_without_near_pairs_between_them_have_one_zero():
    """Two groups that are each off a third by as much as the other, and chains of groups."""
    assert [sorted(map(tuple, _alike(tied))) for tied in _tied({(0, 2): 0.5, (1, 2): 0.51})] == [[(0, 1), (2,)]]
    assert list(_tied({(0, 1): 0.0, (1, 2): -0.3, (3, 4): 0.1})) == [{1: 0.0, 2: -0.3, 0: 0.0}, {3: 0.0, 4: 0.1}]


def test_few_frames_of_one_heap_are_no_two_zeros():
    """Normal residuals of 6 to 12 frames, which the widest gap parts: one in a hundred at most is believed."""
    rng, structures, targets = torch.Generator().manual_seed(0), *(part for part in crystals(12, 0))
    targets = replace(targets, config_types=("",) * 12)
    for n in (6, 8, 2 * FEWEST, 2 * FEWEST + 2):
        believed, used, zero = 0, torch.arange(12) < n, torch.zeros(12).double()
        for _ in range(300):
            labels = replace(targets, energies=0.4 * torch.randn(12, generator=rng).double())
            believed += bool(find_two_zeros(structures, labels, SimpleNamespace(energies=zero), used, 0.0))
        assert believed <= 3, n


def test_a_liquid_beside_a_crystal_is_no_other_zero(data):
    """Errors of a model that is too small for one of its groups."""
    structures, targets = data
    poor = Recipe(**SMALL | {"inducing": {"n": 3, "gradients": 0}})
    hot = torch.arange(40) < 8
    kinds = tuple("hot" if h else "cold" for h in hot.tolist())
    moves = 0.15 * torch.randn(160, 3, generator=torch.Generator().manual_seed(0)).double()
    positions = structures.positions + moves * hot.repeat_interleave(4)[:, None]
    frames = ase_atoms.to_ase(replace(structures, positions=positions))
    for frame in frames:
        frame.calc = EMT()
        frame.get_stress()
    labelled, labels = ase_atoms.from_ase(frames)
    report = gpmlp.fit(labelled, replace(labels, config_types=kinds), poor)[1]
    assert not zeros(report.findings), report.findings


def test_energies_of_exactly_zero_are_named(data):
    structures, targets = data
    energies = targets.energies.clone()
    energies[[3, 9]] = 0.0
    (finding,) = (
        f for f in gpmlp.check(structures, replace(targets, energies=energies)) if f.kind == "energies-exactly-zero"
    )
    assert finding.frames == (structures.names[3], structures.names[9])
    assert not [f for f in gpmlp.check(structures, targets) if f.kind == "energies-exactly-zero"]
