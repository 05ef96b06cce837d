"""Predictions made in portions, by one thread or several, against those made at once; and what threads carry over."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from systems import CUTOFF, crystal, everything
from test_gpu import CHOICES

import gpmlp
from gpmlp.core import neighbors, parallel
from gpmlp.core.quantities import Targets
from gpmlp.core.verlet_list import VerletList
from gpmlp.potential import chunked
from gpmlp.recipe import Recipe


@pytest.fixture(scope="module")
def potential():
    batch = everything()
    unknown, generator = Targets.unlabelled(batch), torch.Generator().manual_seed(0)
    energies = torch.randn(len(batch), generator=generator, dtype=torch.float64)
    forces = 0.3 * torch.randn(batch.n_atoms, 3, generator=generator, dtype=torch.float64)
    targets = Targets(**vars(unknown) | {"energies": energies, "forces": forces})
    return gpmlp.fit(batch, targets, Recipe.model_validate(CHOICES))[0]


def large():
    """One structure of 96 atoms: copies of a cell side by side."""
    one, n = crystal("triclinic", (6, 8, 1)), 4
    shifts = torch.cartesian_prod(*[torch.arange(float(n), dtype=torch.float64)] * 2, torch.arange(2.0).double())
    positions = (one.positions[None] + (shifts @ one.cells[0])[:, None]).flatten(0, 1)
    moved = positions + 0.05 * torch.randn(positions.shape, generator=torch.Generator().manual_seed(1)).double()
    cells = one.cells * torch.tensor([n, n, 2.0], dtype=torch.float64)[None, :, None]
    species = one.species.repeat(len(shifts))
    return gpmlp.Structures(moved, cells, one.periodic, species, torch.zeros(len(species), dtype=torch.long))


def test_portions_are_runs_of_structures_or_parts_of_one():
    assert chunked.atom_ranges([3, 4, 2, 9, 1], 8) == [(0, 7), (7, 9), (9, 17), (17, 19)]
    assert chunked.atom_ranges([20], 8) == [(0, 8), (8, 16), (16, 20)]
    assert (
        chunked.atom_ranges([0, 8, 0], 8) == [(0, 8)]
        and chunked.atom_ranges([], 8) == chunked.atom_ranges([0], 8) == []
    )


def fields(prediction):
    uncertain = prediction.atom_energies_variance
    return (prediction.energies, prediction.atom_energies, prediction.forces, prediction.stresses, prediction.novelty,
            uncertain.inducing, uncertain.data)  # fmt: skip


def test_a_structure_in_portions_is_the_structure(potential, monkeypatch):
    """Sums over pairs in another order: rounding of values and forces of order 1 to 10; of variances, of prior variances."""
    one, made = large(), []
    for atoms in (1000, 5):
        monkeypatch.setattr(chunked, "ATOMS", atoms)
        made.append(potential(one, variance="atom_energies", novelty=True, calibrated=False))
    assert (
        len(chunked.atom_ranges([one.n_atoms], 5 * len(one.distinct_species))) == 7
    )  # large enough for products of each species
    for whole, cut in zip(*map(fields, made), strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-10, atol=1e-10)


def test_threads_and_variances_change_nothing(potential, monkeypatch, two_threads):
    """To the last bit: else dynamics would depend on the machine, or on what was asked for on the way."""
    monkeypatch.setattr(chunked, "ATOMS", 5)
    monkeypatch.setattr(neighbors, "PAIRS", 100)
    one, made = large(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        made.append(fields(potential(one, variance="atom_energies", novelty=True)))
        found = neighbors.find_neighbors(one, CUTOFF)
        closer = found.within(one, 2.0)
        made[-1] += found.centers, found.neighbors, found.shifts, closer.centers, closer.shifts, closer.vectors(one)
        elsewhere = one.with_positions(1.001 * one.positions)
        made[-1] += found.vectors(elsewhere), torch.tensor(found.closest(elsewhere))
        assert found.closest(elsewhere) == pytest.approx(float(found.vectors(elsewhere).norm(dim=1).min()), rel=1e-15)
    for first, *others in zip(*made, strict=True):
        assert all(torch.equal(first, other) for other in others)
    plain = potential(one)
    assert torch.equal(plain.forces, made[0][2]) and torch.equal(plain.energies, made[0][0])


def test_work_is_done_in_order_in_threads_of_one_core_with_the_modes_of_the_caller(two_threads):
    def work(k):
        return k, torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    assert parallel.map_pieces(work, range(5)) == [(k, 1, True, False) for k in range(5)]
    with torch.no_grad():
        assert parallel.map_pieces(work, range(5)) == [(k, 1, False, False) for k in range(5)]
    with torch.inference_mode():
        assert parallel.map_pieces(work, range(5)) == [(k, 1, False, True) for k in range(5)]
    assert torch.get_num_threads() == 2  # of the caller, as before
    assert parallel.map_pieces(work, []) == []
    nested = parallel.map_pieces(lambda k: parallel.map_pieces(work, range(k)), range(3))
    assert nested == [[], [(0, 1, True, False)], [(0, 1, True, False), (1, 1, True, False)]]


def test_what_a_thread_raises_is_raised(two_threads):
    """Of several the first, whoever was faster; nothing is begun after it, and threads are there for the next."""
    begun = []

    def work(k):
        begun.append(k)
        time.sleep(0.01 if k == 1 else 0)
        return [1.0][k]

    with pytest.raises(ZeroDivisionError):
        parallel.map_pieces(lambda k: 1 / k, [1, 0, 2])
    with pytest.raises(IndexError):
        parallel.map_pieces(work, range(100))
    assert len(begun) < 10
    with pytest.raises(ValueError, match="taken"):
        parallel.map_pieces(lambda k: k, range(10), lambda k: (_ for _ in ()).throw(ValueError("taken")))
    assert parallel.map_pieces(lambda k: k, range(3)) == [0, 1, 2]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_what_was_made_is_taken_in_order_and_by_one_at_a_time(two_threads, n):
    torch.set_num_threads(n)
    taken, inside = [], threading.Lock()

    def work(k):
        time.sleep(0.003 * (k % 3 == 0))  # those that come first are there last
        return k

    def take(k):
        assert inside.acquire(blocking=False)
        taken.append(k)
        inside.release()

    assert parallel.map_pieces(work, range(30), take) == [None] * 30
    assert taken == list(range(30))


LAYOUTS = {
    "columns first": lambda t: t.mT.contiguous().mT,
    "every other number of a larger array": lambda t: torch.stack([t, torch.full_like(t, 7)], dim=-1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, k) for name in ("positions", "cells") for k in LAYOUTS if (name, k) != ("positions", "expanded")],
)
def test_how_tensors_lie_in_memory_changes_no_bit(potential, name, layout):
    one = crystal("triclinic", (6, 8, 1))
    batch = gpmlp.Structures.concatenate([one, one.with_positions(one.positions + 0.1 * torch.sin(one.positions))])
    stored = LAYOUTS[layout](getattr(batch, name))
    assert torch.equal(stored, getattr(batch, name)) and not stored.is_contiguous()
    other = replace(batch, **{name: stored})
    wanted, found = (potential(some, "all", True) for some in (batch, other))
    for a, b in zip(fields(wanted), fields(found), strict=True):
        assert torch.equal(a, b)
    assert float(wanted.forces.abs().max()) > 1e-3 and float(wanted.stresses.abs().max()) > 1e-3
    for baseline in potential.baselines:
        alone, again = baseline(batch), baseline(other)
        assert torch.equal(alone.forces, again.forces) and torch.equal(alone.stresses, again.stresses)
    for a, b in zip(VerletList(CUTOFF)(one.with_positions(LAYOUTS["columns first"](one.positions))).vectors(one),
                    VerletList(CUTOFF)(one).vectors(one), strict=True):  # fmt: skip
        assert torch.equal(a, b)


def test_a_structure_without_atoms_has_no_energy(potential):
    nothing = torch.zeros(0, dtype=torch.long)
    periodic = torch.ones(1, 3, dtype=torch.bool)
    empty = gpmlp.Structures(torch.zeros(0, 3).double(), 4 * torch.eye(3).double()[None], periodic, nothing, nothing)
    found = potential(empty, "atom_energies", True)
    assert found.energies.tolist() == [0.0] and not found.stresses.any()
    assert found.forces.shape == (0, 3) and found.atom_energies_variance.data.shape == found.novelty.shape == (0,)
