"""Structures, Targets and Prediction: shapes, selections, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from systems import cluster, crystal, dimer, everything, structure

from gpmlp.core import units
from gpmlp.core.errors import UserError, hill_formula
from gpmlp.core.quantities import Prediction, Targets
from gpmlp.core.structures import Structures, count_matches
from gpmlp.potential.evaluation import error_table

BATCH = everything()
FIELDS = ("positions", "cells", "periodic", "species", "structure_of_atom")


def _changed(**changes) -> Structures:
    return Structures(**{name: getattr(BATCH, name) for name in FIELDS} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": BATCH.positions[:, :2]}, r"`positions` must have shape \(atoms, 3\); got \(18, 2\)"),
        ({"cells": BATCH.cells[0]}, r"`cells` must have shape \(structures, 3, 3\); got \(3, 3\). .*pass cell\[None\]"),
        ({"periodic": BATCH.periodic[:2]}, r"`periodic` must have shape \(8, 3\); got \(2, 3\)"),
        ({"species": BATCH.species[:4]}, r"`species` must have shape \(18\); got \(4,\)"),
        ({"structure_of_atom": BATCH.structure_of_atom.flip(0)}, "`structure_of_atom` must be sorted with values 0 to 7"),
        ({"structure_of_atom": BATCH.structure_of_atom + 1}, "must be sorted with values 0 to 7"),
        ({"names": ("only one",)}, "`names` must hold 8 names; got 1"),
        ({"positions": BATCH.positions.clone().index_fill_(0, torch.tensor([6]), float("nan"))}, "structure 1: a position is NaN"),
        ({"cells": BATCH.cells * float("inf")}, "the cell holds a NaN or infinite number"),
        ({"cells": torch.zeros_like(BATCH.cells)}, "structure 1: periodic along a lattice vector of zero length"),
        ({"cells": torch.ones_like(BATCH.cells)}, "structure 1: the cell is flat .* normalised volume"),
    ],
)  # fmt: skip
def test_structures_refuse(changes, message):
    with pytest.raises(UserError, match=message):
        _changed(**changes)


def test_names_are_used_in_errors():
    with pytest.raises(UserError, match=r"train\.xyz frame 3: the cell is flat"):
        _changed(names=tuple(f"train.xyz frame {i + 2}" for i in range(8)), cells=torch.ones_like(BATCH.cells))


def test_counts_offsets_volumes_and_compositions():
    assert BATCH.counts.tolist() == [5, 2, 2, 2, 2, 2, 2, 1]
    assert BATCH.offsets.tolist() == [0, 5, 7, 9, 11, 13, 15, 17, 18]
    assert len(BATCH) == 8
    assert BATCH.n_atoms == 18
    assert BATCH.distinct_species == (1, 6, 8)
    assert BATCH.composition((6, 1))[0].tolist() == [2.0, 2.0]
    assert BATCH.volumes.isnan().tolist() == [True, False, False, False, False, True, False, True]
    assert float(BATCH.volumes[2]) == pytest.approx(float(BATCH.volumes[3]))  # left-handed cells have positive volume
    assert float(crystal("cubic").volumes) == pytest.approx(3.9**3)


def test_formulas_are_in_the_order_of_hill():
    assert hill_formula({1: 6, 6: 2, 8: 1}) == "C2H6O" and hill_formula({1: 2, 8: 1, 6: 0}) == "H2O"
    assert hill_formula({11: 4, 17: 4.0}) == "Cl4Na4" and hill_formula({13: 1}) == "Al"


def test_select_and_concatenate_are_inverse():
    parts = [BATCH.select([i]) for i in range(len(BATCH))]
    whole = Structures.concatenate(parts)
    for name in FIELDS:
        assert torch.equal(getattr(whole, name), getattr(BATCH, name))
    chosen = BATCH.select([3, 0, 3])
    assert chosen.counts.tolist() == [2, 5, 2]
    assert torch.equal(chosen.positions[2:7], BATCH.positions[:5])
    assert torch.equal(chosen.positions[7:], chosen.positions[:2])
    assert _changed(names=tuple("abcdefgh")).select([3, 0, 3]).names == ("d", "a", "d")
    assert len(BATCH.select([])) == 0


def test_conversion_and_replacement():
    assert BATCH.to(dtype=torch.float32).cells.dtype == torch.float32
    moved = BATCH.with_positions(BATCH.positions + 1)
    assert torch.equal(moved.cells, BATCH.cells)
    assert moved.names == BATCH.names


# targets --------------------------------------------------------------------------------------------------------------------


def _targets() -> Targets:
    unknown = Targets.unlabelled(BATCH)
    count = torch.arange(1.0, 9.0, dtype=torch.float64)
    return replace(
        unknown, energies=count, forces=BATCH.positions.clone(), stresses=count[:, None, None] * torch.eye(3).double(),
        config_types=tuple("abcdefgh"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"energies": torch.zeros(8, 1)}, r"`energies` must have shape \(structures\); got \(8, 1\)"),
        ({"forces": torch.zeros(18, 2)}, r"`forces` must have shape \(atoms, 3\); got \(18, 2\)"),
        ({"stresses": torch.zeros(8, 6)}, r"`stresses` must have shape \(8, 3, 3\); got \(8, 6\)"),
        ({"energies_noise": torch.ones(3)}, r"`energies_noise` must have shape \(8\); got \(3,\)"),
        ({"forces_noise": torch.ones(17, 3)}, r"`forces_noise` must have shape \(18, 3\); got \(17, 3\)"),
        ({"stresses_noise": torch.ones(9)}, r"`stresses_noise` must have shape"),
        ({"config_types": ("a",)}, "`config_types` must hold 8 labels; got 1"),
        ({"energies": torch.full((8,), float("inf"))}, "`energies` holds an infinite value"),
        ({"forces": torch.full((18, 3), -float("inf"))}, "`forces` holds an infinite value"),
        ({"energies_noise": torch.zeros(8)}, "`energies_noise` must be positive and finite"),
        ({"forces_noise": -torch.ones(18, 3)}, "`forces_noise` must be positive and finite"),
        ({"stresses_noise": torch.full((8,), float("inf"))}, "`stresses_noise` must be positive and finite"),
    ],
)
def test_targets_refuse(changes, message):
    with pytest.raises(UserError, match=message):
        replace(_targets(), **changes)


def test_targets_select_as_structures_do():
    targets = _targets()
    chosen = targets.select(BATCH, [7, 0])
    assert chosen.energies.tolist() == [8.0, 1.0]
    assert chosen.config_types == ("h", "a")
    assert torch.equal(chosen.forces, torch.cat([BATCH.positions[17:], BATCH.positions[:5]]))
    assert len(targets.select(BATCH, [])) == 0
    assert targets.to(dtype=torch.float32).forces.dtype == torch.float32


def test_minus_keeps_unknown_labels_unknown():
    zero = torch.zeros(8, dtype=torch.float64)
    prediction = Prediction(
        zero + 0.5, torch.zeros(18), BATCH.positions / 2, torch.full((8, 3, 3), float("nan")).double()
    )
    left = _targets().minus(prediction)
    assert left.energies.tolist() == [0.5 + i for i in range(8)]
    torch.testing.assert_close(left.forces, BATCH.positions / 2)
    assert torch.equal(left.stresses, _targets().stresses)  # nothing to take off where there is no predicted stress
    assert Targets.unlabelled(BATCH).minus(prediction).energies.isnan().all()


def test_the_error_table():
    targets = _targets()
    prediction = Prediction(
        targets.energies + BATCH.counts * 0.002, torch.zeros(18), targets.forces + torch.tensor([0.1, 0.0, -0.2]).double(),
        targets.stresses + 2 * units.GPA,
    )  # fmt: skip
    table = error_table(BATCH, targets, prediction)
    assert table.energy_mae_meV_per_atom == pytest.approx(2.0)
    assert table.force_mae_meV_per_A == pytest.approx(100.0)
    assert table.force_rmse_meV_per_A == pytest.approx(1e3 * math.sqrt(0.05 / 3))
    assert table.stress_mae_GPa == pytest.approx(2.0)
    assert (table.n_structures, table.n_atoms) == (8, 18)
    nothing = error_table(BATCH, Targets.unlabelled(BATCH), prediction)
    assert math.isnan(nothing.energy_mae_meV_per_atom)


def test_one_structure_without_atoms_of_a_species():
    assert cluster((6, 8)).composition((1,)).tolist() == [[0.0]]
    assert structure([[0, 0, 0]], [6]).counts.tolist() == [1]


def test_a_fingerprint_is_of_the_structure_wherever_it_stands():
    whole = BATCH.fingerprints()
    assert len(set(whole)) == len(BATCH)
    assert BATCH.select([7, 0]).fingerprints() == (whole[7], whole[0])
    assert count_matches(BATCH.select([7, 0]).fingerprints(), whole) == 2
    assert replace(BATCH, names=tuple("abcdefgh")).fingerprints() == whole
    elsewhere = replace(BATCH, cells=torch.where(BATCH.periodic[:, :, None], BATCH.cells, 7.0))
    assert elsewhere.fingerprints() == whole


@pytest.mark.parametrize("digits", [4, 5, 6, 7])
def test_a_structure_is_known_again_however_files_round(digits):
    """1000 atoms, so that some coordinate lies at every edge of rounding; a frame of dynamics later it is another."""
    positions = 30 * torch.rand(1000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = structure(positions.tolist(), [6] * 1000)
    rounded = one.with_positions((10**digits * positions).round() / 10**digits)
    assert count_matches(rounded.fingerprints(), one.fingerprints()) == 1
    later = positions + 0.02 * torch.randn(1000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert count_matches(one.with_positions(later).fingerprints(), one.fingerprints()) == 0


@pytest.mark.parametrize("changed", ["positions", "cells", "species", "periodic"])
def test_a_fingerprint_changes_with_what_the_structure_is(changed):
    value, row = (
        getattr(BATCH, changed).clone(),
        5 if changed in ("positions", "species") else 1,
    )  # of structure 1, a crystal
    steps = {"species": 1, "positions": 0.05, "cells": 0.05}
    value[row] = torch.tensor([True, False, True]) if changed == "periodic" else value[row] + steps[changed]
    found, whole = replace(BATCH, **{changed: value}).fingerprints(), BATCH.fingerprints()
    assert count_matches(found[1:2], whole) == 0
    assert (found[0], *found[2:]) == (whole[0], *whole[2:])


def test_moments_and_charges_stay_with_their_atoms():
    """Through selection, batches, devices and new positions; where a part has none they are zero, and moments along z beside vectors."""
    one, two = dimer(2.0), cluster()
    magnet = replace(
        one,
        magnetic_moments=torch.tensor([2.0, -2.0]).double(),
        initial_charges=torch.tensor([-1.0, 0.0]).double(),
        charges=None,
    )
    batch = Structures.concatenate([two, magnet])
    assert batch.initial_charges.tolist() == [0.0] * 5 + [-1.0, 0.0] and batch.charges.tolist() == [0.0, -1.0]
    again = batch.select([1]).with_positions(3 * one.positions).to(dtype=torch.float32)
    assert again.magnetic_moments.tolist() == [2.0, -2.0] and again.initial_charges.dtype == torch.float64
    moved = again.with_unchecked_positions(one.positions, one.cells)
    assert torch.equal(moved.magnetic_moments, magnet.magnetic_moments)
    tilted = replace(one, magnetic_moments=torch.tensor([[1.0, 0, 0], [0, 1, 0]]).double())
    assert Structures.concatenate([magnet, tilted]).magnetic_moments.tolist() == [
        [0, 0, 2],
        [0, 0, -2],
        [1, 0, 0],
        [0, 1, 0],
    ]
    assert Structures.concatenate([one, two]).magnetic_moments is None
    for name, bad, said in (
        ("initial_charges", torch.zeros(3), "must have shape"),
        ("initial_charges", torch.zeros(2, 3), "must have shape"),
        (
            "charges",
            torch.zeros(2),
            r"`charges` must have shape \(1\); got \(2,\). Charges of atoms are `initial_charges`",
        ),
        ("charges", torch.tensor([float("inf")]), "`charges` hold a NaN or infinite"),
        ("magnetic_moments", torch.tensor([1.0, float("nan")]), "hold a NaN"),
    ):
        with pytest.raises(UserError, match=said):
            replace(one, **{name: bad})


def test_fingerprints_tell_orders_of_spins_apart():
    """And are what they were where there are none, or only zeros."""
    one = dimer(2.0)
    plain = one.fingerprints()
    up, down = (replace(one, magnetic_moments=torch.tensor(m).double()) for m in ([2.0, 2.0], [2.0, -2.0]))
    charged = replace(one, initial_charges=torch.tensor([0.0, 1.0]), charges=None)
    ion, zero = replace(one, charges=torch.tensor([1.0])), replace(one, initial_charges=torch.zeros(2))
    assert len({f for s in (one, up, down, charged, ion) for f in s.fingerprints()}) == 5
    assert zero.fingerprints() == plain == Structures.concatenate([up, one]).select([1]).fingerprints()
