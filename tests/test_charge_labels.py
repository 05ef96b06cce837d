"""Labels of charges of atoms and dipoles: their names, what is taken, and what `gpmlp check` says of charges."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from systems import crystal

from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.io.ase_atoms import from_ase, read, read_labelled, structures_from_ase, to_ase, write_frames
from gpmlp.io.charge_labels import label_kind
from gpmlp.io.label_checks.charges import check_charges, unequal_charges
from gpmlp.io.label_checks.near_frames import find_near_pairs
from gpmlp.io.label_checks.repeats import check_repeats
from gpmlp.io.label_names import parse_keys
from gpmlp.learning.labels import LabelEntry, LabelFile, key_of
from gpmlp.recipe import Recipe

FIELDS = ("positions", "cells", "periodic", "species", "structure_of_atom", "names")


def ions(distance=2.5, charge=0, energy=-5.0, q=(0.8, -0.8)) -> Atoms:
    atoms = Atoms("NaCl", positions=[[0, 0, 0], [0, 0, distance]], info={"charge": charge})
    results = {"energy": energy, "forces": np.array([[0, 0, 0.1], [0, 0, -0.1]])}
    atoms.calc = SinglePointCalculator(atoms, **results, charges=np.array(q), dipole=np.array([0, 0, -2.0]))
    return atoms


@pytest.mark.parametrize(
    ("room", "key", "kind"),
    [
        *(
            ("arrays", key, "charges")
            for key in ("charges", "mulliken_charges", "Mulliken", "hirshfeld", "bader_charge")
        ),
        *(("arrays", key, "charges") for key in ("REF_charges", "dft_charges", "partial_charges", "cm5", "DDEC6")),
        *(("info", key, "dipole") for key in ("dipole", "REF_dipole", "dipole_moment", "total_dipole")),
        ("results", "charges", "charges"),
        ("results", "dipole", "dipole"),
        *(
            ("arrays", key, None)
            for key in ("initial_charges", "formal_charges", "nuclear_charges", "q_tags", "forces")
        ),
        *(("arrays", key, None) for key in ("mace_charges", "charges_std", "hirshfeld_volumes")),
        *(("info", key, None) for key in ("charge", "total_charge", "dipole_correction", "charges", "dipole_debye")),
    ],
)
def test_names(room, key, kind):
    assert label_kind((room, key)) == kind


def test_labels_of_a_file(tmp_path):
    path = tmp_path / "a.xyz"
    path.write_text(
        '2\nProperties=species:S:1:pos:R:3:mulliken_charges:R:1:hirshfeld:R:1 dipole="0 0 1.5"\nNa 0 0 0 0.8 0.6\nCl 0 0 2.5 -0.8 -0.6\n'
        "2\nProperties=species:S:1:pos:R:3:hirshfeld:R:1\nNa 0 0 0 0.5\nCl 0 0 2.5 nan\n"
    )
    data = read_labelled(path)
    (taken,) = [f for f in data.findings if f.kind == "charges-taken"]
    assert (
        "charges of atoms from `hirshfeld` in 2 (not from `mulliken_charges`: --keys charges=mulliken_charges)"
        in str(taken)
    )
    assert taken.severity == "note" and taken.numbers == {"charges_frames": 2, "dipole_frames": 1}
    assert data.targets.charges.isnan().tolist() == [False, False, False, True]
    assert data.targets.dipoles[0].tolist() == [0, 0, 1.5] and bool(data.targets.dipoles[1].isnan().all())
    chosen, dropped = (read(path, keys=parse_keys(text))[1] for text in ("charges=Mulliken_charges", "charges=none"))
    assert chosen.charges[:2].tolist() == [0.8, -0.8] and bool(chosen.charges[2:].isnan().all())
    assert bool(dropped.charges.isnan().all()) and not bool(dropped.dipoles[0].isnan().any())
    with pytest.raises(UserError, match="no frame has `bader`, which --keys gives for the charges"):
        read(path, keys={"charges": "bader"})


def test_labels_of_another_shape_or_infinite():
    odd, bad = ions(), ions()
    odd.arrays["charges"] = np.zeros((2, 2))
    odd.calc.results.pop("charges")
    with pytest.warns(UserWarning, match="`charges` does not hold one number for each atom; it is not read"):
        _, targets = from_ase([odd])
    assert bool(targets.charges.isnan().all())
    bad.calc.results["charges"][0] = np.inf
    with pytest.raises(UserError, match="frame 0: `charges` holds an infinite number"):
        from_ase([bad])


def test_they_stay_with_their_structures(tmp_path):
    structures, targets = from_ase([ions(), Atoms("H"), ions(2.6, q=(0.7, -0.7))])
    both = Targets.concatenate([targets, targets]).select(Structures.concatenate([structures] * 2), [5, 1])
    assert both.charges[:2].tolist() == [0.7, -0.7] and bool(both.charges[2].isnan())
    assert both.dipoles[0].tolist() == [0, 0, -2] and both.to(dtype=torch.float32).charges.dtype == torch.float32
    write_frames(tmp_path / "b.xyz", to_ase(structures, targets))
    back = read(tmp_path / "b.xyz")[1]
    assert torch.equal(back.charges.nan_to_num(9), targets.charges.nan_to_num(9))
    assert torch.equal(back.dipoles.nan_to_num(9), targets.dipoles.nan_to_num(9))
    one = structures.select([2])
    LabelFile(tmp_path / "labels.xyz").append(LabelEntry(one, targets.select(structures, [2]), key_of(one)))
    (entry,) = LabelFile(tmp_path / "labels.xyz")
    assert entry.targets.charges.tolist() == [0.7, -0.7] and entry.targets.dipoles[0].tolist() == [0, 0, -2]


def test_charges_that_sum_to_another_total():
    frames = [ions(), ions(2.6, charge=1, q=(0.9, 0.09)), ions(2.7, q=(0.9, -0.0)), ions(2.8, q=(0.3, np.nan))]
    (finding,) = [f for f in check_charges(*from_ase(frames)) if f.severity == "error"]
    assert finding.kind == "charges-sum-to-another-total" and finding.frames == ("frame 2",)
    assert finding.numbers == {"sum_e": pytest.approx(0.9), "total_charge_e": 0}
    assert check_charges(*from_ase(frames[:1])) == []


def test_one_composition_with_several_charges():
    same = structures_from_ase([ions(), ions(2.7)])
    assert unequal_charges(same) == []
    cation = Atoms("Na2", positions=[[0, 0, 0], [0, 0, 3]], info={"charge": 1})
    assert unequal_charges(structures_from_ase([ions(), cation])) == []
    (finding,) = unequal_charges(structures_from_ase([cation, ions(), ions(2.6, charge=-1), ions(2.7, charge=1)]))
    assert finding.severity == "warning" and finding.frames == ("frame 1", "frame 2", "frame 3")
    assert "ClNa has several total charges (-1, 0, 1 e; 3 frames" in finding.message
    for choice in re.search(r"long_range.charges \((\w+) or (\w+)\)", finding.advice).groups():
        Recipe.model_validate({"long_range": {"charges": choice}})


def test_charged_cells():
    whole = crystal()
    charged = Structures(whole.positions, whole.cells, whole.periodic, whole.species, whole.structure_of_atom,
                         charges=torch.ones(len(whole)))  # fmt: skip
    assert [f.kind for f in check_charges(charged, Targets.unlabelled(charged))] == ["charged-cell"]
    assert check_charges(whole, Targets.unlabelled(whole)) == []


def test_structures_of_unequal_charge_are_not_compared():
    """One geometry with two charges is no contradiction, and their energies have nothing to do with forces between them."""
    frames = [ions(), ions(charge=1, energy=-1.0, q=(1.0, 0.0)), ions(2.55), ions(2.55, charge=1, q=(1.0, 0.0))]
    for k, frame in enumerate(frames):
        frame.calc.results["forces"] *= 1 + k
    structures, targets = from_ase(frames)
    assert check_repeats(structures, targets) == []
    neutral = Structures(*(getattr(structures, name) for name in FIELDS))
    assert "same-structure-two-energies" in {f.kind for f in check_repeats(neutral, targets)}
    near = find_near_pairs(structures, targets)
    assert len(near.first) == 2 and bool((structures.charges[near.first] == structures.charges[near.second]).all())
