"""What a fit says of charges: compositions with several totals, slabs, nothing beyond the cutoff, fragments without a whole charge."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

import gpmlp
from gpmlp.core.findings import FindingWarning
from gpmlp.io.ase_atoms import from_ase, structures_from_ase
from gpmlp.io.label_checks.charge_fits import check_fragments, check_structures, fragments
from gpmlp.potential.charges import warn_of_total_charges
from gpmlp.recipe import Recipe


def pair(gap, pbc=False) -> Atoms:
    """Na and a molecule of chlorine, so far apart."""
    positions = [[0, 0, 0], [0, 0, gap], [0, 0, gap + 2.0]]
    return Atoms(
        "NaCl2", positions=positions, cell=[9, 9, 30] if pbc else None, pbc=[True, True, False] if pbc else False
    )


def test_fragments():
    gap, owner = fragments(pair(6.0).positions, pair(6.0).numbers)
    assert gap == pytest.approx(6.0) and owner.tolist() == [0, 1, 1]
    assert fragments(pair(2.5).positions, pair(2.5).numbers)[0] == 0


def test_fragments_without_a_whole_charge():
    """Of the structures that are far apart only, the worst is named first; parts that are whole are right."""
    structures = structures_from_ase([pair(2.5), pair(6.0), pair(8.0), pair(3.9), Atoms("Na")])
    charges = torch.tensor([0.5, -0.25, -0.25, 0.7, -0.3, -0.4, 0.45, -0.2, -0.25, 0.5, -0.2, -0.3, 0.0]).double()
    (finding,) = check_fragments(structures, charges)
    assert finding.frames == ("frame 2", "frame 1") and finding.numbers["gap_A"] == pytest.approx(8.0)
    assert abs(finding.numbers["fragment_charge_e"]) == pytest.approx(0.45)
    whole = torch.tensor([0.5, -0.25, -0.25, 0.95, -0.45, -0.5, 0.05, -0.05, 0.0, 0.5, -0.2, -0.3, 0.0]).double()
    assert check_fragments(structures, whole) == []


def test_slabs_and_nothing_beyond_the_cutoff():
    def found(*frames):
        return [f.kind for f in check_structures(structures_from_ase(frames), 5.0)]

    assert found(pair(2.5)) == ["nothing-beyond-the-cutoff"]
    assert found(pair(2.5), pair(6.0)) == [] == found(pair(2.5), Atoms("Na", cell=[4, 4, 4], pbc=True))
    assert found(pair(2.5, pbc=True)) == ["charges-of-slabs"]


def test_a_fit_without_charges_says_what_it_cannot_tell_apart():
    frames = []
    for k, charge in enumerate((0, 1, 0, 1)):
        atoms = Atoms("NaCl", positions=[[0, 0, 0], [0, 0, 2.4 + 0.1 * k]], info={"charge": charge})
        atoms.calc = SinglePointCalculator(atoms, energy=-5.0 + charge, forces=np.zeros((2, 3)) + 0.1)
        frames.append(atoms)
    structures, targets = from_ase(frames)
    recipe = Recipe.model_validate(
        {"inducing": {"n": 3}, "descriptor": {"n_max": 2, "l_max": 1}, "long_range": {"charges": "off"}}
    )
    said = " ".join(gpmlp.fit(structures, targets, recipe)[1].warnings)
    assert re.search(r"ClNa has several total charges \(0, 1 e; 4 frames.*Fit with long_range.charges", said)
    same = replace(structures, charges=torch.ones(4))
    assert "several total charges" not in " ".join(gpmlp.fit(same, targets, recipe)[1].warnings)


def test_a_total_charge_outside_the_training_is_said():
    structures = replace(structures_from_ase([pair(2.5), pair(6.0)]), charges=torch.tensor([0.0, 2.0]))
    with pytest.warns(
        FindingWarning, match="frame 1: the total charge 2 e is outside those of the training, 0 to 1 e"
    ) as said:
        warn_of_total_charges(structures, [0.0, 1.0])
    assert [w.message.finding.kind for w in said] == ["charge-outside-training"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_total_charges(structures, [0.0, 2.0])


def test_a_fit_with_charges_says_what_it_found_and_warns_at_other_charges():
    """Ions that are pulled apart: the report has the range of total charges, by which predictions are judged."""
    frames = []
    for k in range(14):
        r = 2.3 + 0.5 * k
        atoms = Atoms("NaCl", positions=[[0, 0, 0], [0, 0, r]])
        slope = np.array([[0, 0, -14.4 / r**2], [0, 0, 14.4 / r**2]])
        atoms.calc = SinglePointCalculator(atoms, energy=-14.4 / r, forces=-slope)
        frames.append(atoms)
    structures, targets = from_ase(frames)
    recipe = {"long_range": {"charges": "polarisable", "kappa": 3}, "inducing": {"n": 6}, "calibration": False}
    recipe["descriptor"] = {"n_max": 3, "l_max": 1, "cutoff": 4.0}
    potential, report = gpmlp.fit(structures, targets, Recipe.model_validate(recipe))
    assert report.charges["kept"] and report.charges["total_charges_e"] == [0, 0]
    with pytest.warns(FindingWarning, match="the total charge 1 e is outside those of the training"):
        ion = potential(replace(structures.select([5]), charges=torch.ones(1)))
    assert float(ion.charges.sum()) == pytest.approx(1, abs=1e-9)
