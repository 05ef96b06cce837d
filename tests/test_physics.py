"""What every energy term must obey, run over every registered descriptor, kernel and baseline."""

from __future__ import annotations

import pytest
import torch
from systems import CELLS, TERMS, cluster, crystal, everything, reach, replicate, rotation, single, structure

from gpmlp.core.structures import Structures

# Energies here are of order 1 eV and forces of order 1 eV/A. Central differences with steps of 1e-4 A have a truncation error of
# step^2 f'''/6, about 1e-8 of f' for densities of width 0.5 A, and rounding of 1e-16/1e-4 = 1e-12.
STEP, FINITE_DIFFERENCE = 1e-4, 1e-6
# Symmetries change only the order and the rounding of sums of some thousand terms.
ROUNDING = 1e-10
# The numerical derivatives of dscribe's descriptors are good to 1e-10 of the Jacobian; forces add some hundred of them.
ROUNDING_OF_FORCES = 2e-9


@pytest.fixture(scope="module", params=TERMS)
def term(request):
    return TERMS[request.param]()


def _energy(term, positions, like: Structures) -> torch.Tensor:
    return term(like.with_positions(positions)).energies


def test_forces_are_minus_the_gradient_of_the_energy(term):
    batch = Structures.concatenate([cluster(), crystal("triclinic"), crystal("slab")])
    forces = term(batch).forces
    for atom, axis in ((0, 0), (2, 1), (4, 2), (5, 1), (6, 0), (7, 2), (8, 2)):
        moved = [batch.positions.clone() for _ in range(2)]
        moved[0][atom, axis] -= STEP
        moved[1][atom, axis] += STEP
        low, high = (_energy(term, p, batch).sum() for p in moved)
        scale = max(1.0, abs(float(high)) * 1e-3)  # isolated atoms are thousands of eV, and rounding grows with them
        assert abs(float(forces[atom, axis] + (high - low) / (2 * STEP))) < FINITE_DIFFERENCE * scale


def test_total_force_and_torque_vanish(term):
    heap = cluster()
    forces = term(heap).forces
    # exact cancellation of pair gradients; the torque vanishes as far as the descriptor is invariant under rotation
    assert forces.sum(0).abs().max() < ROUNDING
    assert torch.linalg.cross(heap.positions, forces).sum(0).abs().max() < 10 * ROUNDING_OF_FORCES


@pytest.mark.parametrize("kind", [k for k in CELLS if k not in ("slab-no-height", "wire")])
def test_stress_is_the_derivative_with_respect_to_strain(term, kind):
    one = crystal(kind)
    stress = term(one).stresses[0]
    assert torch.equal(stress, stress.T)
    for a, b in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)):
        energies = []
        for sign in (-1, 1):
            strain = torch.eye(3, dtype=torch.float64)
            strain[a, b] += 0.5 * sign * STEP
            strain[b, a] += 0.5 * sign * STEP
            strained = one.with_positions(one.positions @ strain, one.cells @ strain)
            energies.append(float(term(strained).energies))
        slope = (energies[1] - energies[0]) / (2 * STEP) / float(one.volumes)
        assert abs(float(stress[a, b]) - slope) < FINITE_DIFFERENCE


def test_stress_of_a_structure_without_volume_is_not_a_number(term):
    assert term(Structures.concatenate([cluster(), crystal("slab-no-height")])).stresses.isnan().all()


def test_rotation_and_reflection(term):
    for turn in (rotation(1), -rotation(2)):
        batch = everything()
        turned = batch.with_positions(batch.positions @ turn.T, batch.cells @ turn.T)
        before, after = term(batch), term(turned)
        torch.testing.assert_close(after.energies, before.energies, atol=ROUNDING, rtol=1e-12)
        torch.testing.assert_close(after.atom_energies, before.atom_energies, atol=ROUNDING, rtol=1e-12)
        torch.testing.assert_close(after.forces, before.forces @ turn.T, atol=ROUNDING_OF_FORCES, rtol=0)
        expected = turn @ before.stresses @ turn.T
        torch.testing.assert_close(after.stresses, expected, atol=ROUNDING_OF_FORCES, rtol=0, equal_nan=True)


def test_translation_and_wrapping(term):
    batch = everything()
    shift = torch.tensor([0.37, -1.9, 4.2], dtype=torch.float64)
    before, after = term(batch), term(batch.with_positions(batch.positions + shift))
    torch.testing.assert_close(after.energies, before.energies, atol=ROUNDING, rtol=1e-12)
    torch.testing.assert_close(after.forces, before.forces, atol=ROUNDING_OF_FORCES, rtol=0)
    one = crystal("triclinic")
    moved = one.positions.clone()
    moved[0] += 2 * one.cells[0, 0] - one.cells[0, 2]  # another image of the same atom
    torch.testing.assert_close(
        term(one.with_positions(moved)).forces, term(one).forces, atol=ROUNDING_OF_FORCES, rtol=0
    )


def test_permutation_of_atoms_and_of_structures(term):
    heap = cluster()
    order = torch.tensor([3, 0, 4, 2, 1])
    before, after = term(heap), term(structure(heap.positions[order], heap.species[order]))
    torch.testing.assert_close(after.energies, before.energies, atol=ROUNDING, rtol=1e-12)
    torch.testing.assert_close(after.forces, before.forces[order], atol=ROUNDING_OF_FORCES, rtol=0)
    batch = everything()
    alone = term(batch.select([3]))
    together = term(batch.select([5, 3, 0]))
    torch.testing.assert_close(together.energies[1], alone.energies[0], atol=ROUNDING, rtol=1e-12)
    torch.testing.assert_close(together.stresses[1], alone.stresses[0], atol=ROUNDING_OF_FORCES, rtol=0)


@pytest.mark.parametrize("kind", ["triclinic", "left-handed", "slab", "wire"])
def test_a_replicated_cell_is_the_same_crystal(term, kind):
    one = crystal(kind)
    times = tuple(2 if p else 1 for p in one.periodic[0].tolist())
    large = replicate(one, times)
    ratio = large.n_atoms // one.n_atoms
    before, after = term(one), term(large)
    torch.testing.assert_close(after.energies, ratio * before.energies, atol=ratio * ROUNDING, rtol=1e-12)
    torch.testing.assert_close(after.forces, before.forces.repeat(ratio, 1), atol=ROUNDING_OF_FORCES, rtol=0)
    torch.testing.assert_close(after.stresses, before.stresses, atol=ROUNDING_OF_FORCES, rtol=0, equal_nan=True)


def test_far_apart_molecules_do_not_feel_each_other(term):
    a, b = cluster(seed=0), cluster((8, 1, 6), seed=5)
    together = structure(torch.cat([a.positions, b.positions + 40.0]), torch.cat([a.species, b.species]))
    first, second, both = term(a), term(b), term(together)
    torch.testing.assert_close(both.energies, first.energies + second.energies, atol=ROUNDING, rtol=1e-12)
    expected = torch.cat([first.forces, second.forces])
    torch.testing.assert_close(both.forces, expected, atol=ROUNDING_OF_FORCES, rtol=0)


def test_energy_and_force_are_continuous_through_the_cutoff(term, request):
    """A third atom leaves the sight of a pair: the energy change vanishes like d^2 or faster (d^3 where the weights are C2)."""
    edge = reach(term)
    if not edge:
        pytest.skip("no cutoff")
    cosine = "acsf" in request.node.callspec.id  # its cutoff (1 + cos(pi r/r_c))/2 is C1: energy ~ d^2, force ~ d
    order = 2 if cosine else 3

    def at(distance: float):
        # atom 2 is on the edge of atom 0's sphere only
        return term(structure([[0, 0, 0], [0, 1.2, 0], [0, -distance, 0]], [6, 8, 1]))

    outside = at(edge + 1e-6)
    jumps = []
    for d in (0.04, 0.02):
        inside = at(edge - d)
        jumps.append(
            (float((inside.energies - outside.energies).abs()), float((inside.forces - outside.forces).abs().max()))
        )
    # halving d divides by 2^order, up to the next order in d, which is d / 1 A of the leading one
    assert jumps[0][0] / jumps[1][0] > 0.9 * 2**order
    assert jumps[0][1] / jumps[1][1] > 0.9 * 2 ** (order - 1)
    just_inside = at(edge - 1e-6)
    assert (just_inside.energies - outside.energies).abs() < 1e-11 * max(1.0, float(outside.energies.abs()))
    # numerical derivatives see the kink of the cosine's slope over their stencil of 1e-3 A
    assert (just_inside.forces - outside.forces).abs().max() < (1e-4 if cosine else 1e-10)


def test_an_isolated_atom_has_energy_and_no_force(term):
    alone = term(structure([[0.3, 0.1, -2.0]], [8]))
    assert alone.energies.isfinite().all()
    assert torch.equal(alone.forces, torch.zeros(1, 3, dtype=torch.float64))


def test_single_precision_agrees_with_double(term):
    batch = everything()
    double, rough = term(batch), single(term)(batch.to(dtype=torch.float32))
    assert rough.forces.dtype == torch.float32
    # 6e-8 relative rounding, amplified by the cancellation between weights of order 1 (a dozen terms) and by sums over pairs
    torch.testing.assert_close(rough.energies.double(), double.energies, atol=2e-5, rtol=1e-6)
    torch.testing.assert_close(rough.forces.double(), double.forces, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(rough.stresses.double(), double.stresses, atol=1e-5, rtol=1e-5, equal_nan=True)
