"""Stresses against energy differences of strained copies."""

from __future__ import annotations

import re
from dataclasses import replace

import ase.build
import numpy as np
import pytest
import torch
from ase.calculators.emt import EMT

from gpmlp.core import units
from gpmlp.io import ase_atoms
from gpmlp.io.label_checks.stresses import check_stresses, strained_pairs


@pytest.fixture(scope="module")
def strained():
    """Copper cells with strains to 5 %, and rattled cells that are copies of nothing."""
    frames, rng = [], np.random.default_rng(3)
    base = ase.build.bulk("Cu", cubic=True)
    for amount in (-0.05, -0.025, 0.0, 0.025, 0.05):
        for mode in (np.diag([1.0, 0, 0]), np.eye(3), np.array([[0, 1, 0], [0, 0, 0], [0, 0, 0]])):
            frame = base.copy()
            frame.set_cell(frame.cell.array @ (np.eye(3) + amount * mode), scale_atoms=True)
            frames.append(frame)
    for _ in range(6):
        frame = base.copy()
        frame.rattle(0.1, rng=rng)
        frames.append(frame)
    for frame in frames:
        frame.calc = EMT()
        frame.get_stress()
    return ase_atoms.from_ase(frames)


def scaled(targets, factor):
    return replace(targets, stresses=targets.stresses * factor)


def test_consistent_data_are_not_doubted(strained):
    structures, targets = strained
    pairs = strained_pairs(structures, targets)
    assert len(pairs) > 20
    assert max(pairs.first.max(), pairs.second.max()) < 15  # rattled cells are no copies
    assert check_stresses(structures, targets) == []


def test_trapezoid_rule_converges_as_the_cube_of_the_strain():
    def residual(amount):
        frames = []
        for factor in (1.0, 1.0 + amount):
            frame = ase.build.bulk("Cu", cubic=True)
            frame.set_cell(frame.cell.array * factor, scale_atoms=True)
            frame.calc = EMT()
            frame.get_stress()
            frames.append(frame)
        pairs = strained_pairs(*ase_atoms.from_ase(frames))
        return float((pairs.energy - pairs.work).abs()[0])

    assert residual(0.02) / residual(0.01) == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize(
    ("factor", "text"),
    [
        (-1.0, r"dE = -1.* the sign is the opposite one"),
        (1 / units.GPA, r"dE = 0.0062.* the numbers are in GPa"),
        (10 / units.GPA, r"dE = 0.00062.* the numbers are in kbar"),
        (-10 / units.GPA, r"sign is the opposite one .*numbers are in kbar"),
        (units.GPA, r"dE = 16\d .* 0.0062\d* times what they would be in eV/A\^3"),
    ],
)
def test_wrong_sign_and_unit(strained, factor, text):
    structures, targets = strained
    (warning,) = check_stresses(structures, scaled(targets, factor))
    assert re.search(text, str(warning)), warning


def test_virial_in_place_of_stress(strained):
    structures, targets = strained
    (warning,) = check_stresses(structures, scaled(targets, structures.volumes[:, None, None]))
    assert "virials in eV, not divided by the volume" in str(warning)


def test_pressure_offset(strained):
    structures, targets = strained
    shifted = replace(targets, stresses=targets.stresses + 3.0 * units.GPA * torch.eye(3, dtype=torch.float64))
    (warning,) = check_stresses(structures, shifted)
    assert re.search(r"constant pressure: adding -(2\.9\d?|3) GPa", str(warning)), warning


def test_little_data_and_missing_labels_say_nothing(strained):
    structures, targets = strained
    few = structures.select([0, 6])
    assert check_stresses(few, scaled(targets, -1.0).select(structures, [0, 6])) == []
    unknown = scaled(targets, float("nan"))
    assert check_stresses(structures, unknown) == []


def test_copies_are_found_after_a_shift_of_the_origin(strained):
    structures, targets = strained
    offsets = 0.37 * torch.arange(len(structures), dtype=torch.float64)[structures.structure_of_atom]
    moved = structures.with_positions(structures.positions + offsets[:, None])
    assert len(strained_pairs(moved, targets)) == len(strained_pairs(structures, targets))
