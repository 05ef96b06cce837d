"""Checks of labels that need no second frame: lengths in another unit, forces that leave a net force; and the sign of stresses, which many
frames tell together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT

import gpmlp
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.io.ase_atoms import from_ase, read_labelled, write_frames

BOHR = 0.529177


@pytest.fixture(scope="module")
def strained(tmp_path_factory) -> tuple[Structures, Targets]:
    """Hot copper in cells strained a little, at random: no stress says anything beside the work of the forces of its pair."""
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(24):
        atoms = bulk("Cu", cubic=True) * 2
        atoms.set_cell(atoms.cell @ (np.eye(3) + 0.02 * rng.normal(size=(3, 3))), scale_atoms=True)
        atoms.positions += 0.08 * rng.normal(size=atoms.positions.shape)
        atoms.calc = EMT()
        atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
        frames.append(atoms)
    path = tmp_path_factory.mktemp("copper") / "strained.xyz"
    write_frames(path, frames)
    data = read_labelled(path)
    return data.structures, data.targets


def found(structures: Structures, targets: Targets) -> dict[str, gpmlp.Finding]:
    return {f.kind: f for f in gpmlp.check(structures, targets) if f.severity != "note"}


def test_right_labels_have_no_finding(strained):
    assert found(*strained) == {}


def test_the_opposite_sign_of_stresses_is_told_by_all_frames_together(strained):
    structures, targets = strained
    (finding,) = found(structures, replace(targets, stresses=-targets.stresses)).values()
    assert (finding.kind, finding.severity) == ("stresses-against-energies", "error")
    assert "the sign is the opposite one" in finding.message and -1.6 < finding.numbers["slope"] < -0.4


def scaled(structures: Structures, factor: float) -> Structures:
    return replace(structures, positions=structures.positions * factor, cells=structures.cells * factor)


@pytest.mark.parametrize(("factor", "unit"), [(1 / BOHR, "in Bohr"), (0.1, "in nm"), (20.0, "in another unit")])
def test_lengths_in_another_unit(strained, factor, unit):
    structures, targets = strained
    if factor == 0.1:  # the fit and this check refuse atoms that close as coincident
        assert "coincident-atoms" in found(scaled(structures, factor), targets)
        factor = 0.14
    finding = found(scaled(structures, factor), targets).get("lengths-in-another-unit")
    if factor == 20.0:
        assert finding is None, "no atom is within reach: this may be a gas"
    else:
        assert unit in finding.message and finding.severity == "warning"
        assert finding.numbers["nearest_over_covalent"] == pytest.approx(0.9 * factor, rel=0.15)


def test_fractional_coordinates_for_positions(strained):
    structures, targets = strained
    cells = structures.cells[structures.structure_of_atom]
    fractions = torch.linalg.solve(cells.transpose(1, 2), structures.positions[:, :, None])[:, :, 0]
    finding = found(replace(structures, positions=fractions - fractions.floor()), targets)
    kind = "coincident-atoms" if "coincident-atoms" in finding else "lengths-in-another-unit"
    assert kind == "coincident-atoms" or "fractional coordinates" in finding[kind].message


def test_gases_of_noble_atoms_and_curves_of_two_atoms_are_as_they_are():
    argon = bulk("Ar", "fcc", 5.26, cubic=True)
    pairs = [Atoms("Cu2", [(0, 0, 0), (0, 0, d)]) for d in (2.0, 4.0, 4.5, 5.0)]
    for frames in ([argon] * 3, pairs, [molecule("CH3CH2OH")]):
        structures = from_ase(frames)[0]
        assert "lengths-in-another-unit" not in found(structures, Targets.unlabelled(structures))


def test_forces_that_leave_a_net_force_are_named(strained):
    structures, targets = strained
    forces = targets.forces.clone()
    forces[structures.structure_of_atom == 5] += torch.tensor([0.5, 0.0, 0.0], dtype=forces.dtype)
    (finding,) = [f for f in gpmlp.check(structures, replace(targets, forces=forces)) if f.kind == "net-forces"]
    assert finding.severity == "warning" and finding.frames == (structures.names[5],)
    assert finding.numbers["net_force_eV_per_A"] == pytest.approx(0.5 * 32, rel=1e-6)
    forces[(structures.structure_of_atom == 5).nonzero()[0]] = torch.nan  # a part of the atoms may
    assert "net-forces" not in found(structures, replace(targets, forces=forces))
