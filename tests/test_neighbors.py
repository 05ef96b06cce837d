"""The neighbour list against trying every lattice shift, and the scatters against autograd."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from systems import CELLS, CUTOFF, cluster, crystal, dimer, everything, scattered, structure

from gpmlp.core import cell_list, neighbors, parallel
from gpmlp.core.environments import Surroundings
from gpmlp.core.errors import UserError
from gpmlp.core.neighbors import find_neighbors
from gpmlp.core.structures import Structures
from gpmlp.core.verlet_list import VerletList
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.io.label_checks.coincident import check_coincident


def as_set(found, first=0):
    columns = torch.cat([found.centers[:, None] - first, found.neighbors[:, None] - first, found.shifts], dim=1)
    return {tuple(row) for row in columns.tolist()}


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("cutoff", [2.0, CUTOFF, 7.5])
def test_pairs_are_those_of_brute_force(kind, cutoff):
    one = crystal(kind, (6, 8, 1))
    found = neighbors.find_neighbors(one, cutoff)
    assert as_set(found) == oracles.neighbor_set(one, cutoff)
    assert len(found) == len(as_set(found))  # none twice


def test_a_batch_is_its_structures_one_after_another():
    batch = everything()
    found = neighbors.find_neighbors(batch, CUTOFF)
    assert (found.centers.diff() >= 0).all()
    offsets = batch.offsets.tolist()
    for s in range(len(batch)):
        mine = batch.structure_of_atom[found.centers] == s
        part = neighbors.Neighbors(found.centers[mine], found.neighbors[mine], found.shifts[mine], CUTOFF)
        assert as_set(part, offsets[s]) == oracles.neighbor_set(batch.select([s]), CUTOFF)


@pytest.mark.parametrize("kind", CELLS)
def test_pairs_come_in_the_order_of_centres_neighbours_and_shifts(kind):
    """Also where an atom sees many images of another, and itself."""
    batch = Structures.concatenate([dimer(1.1), crystal(kind, (6, 8, 1)), cluster((8, 1, 1))])
    found = neighbors.find_neighbors(batch, 9.0)
    again = found.sorted()
    for name in ("centers", "neighbors", "shifts"):
        assert torch.equal(getattr(found, name), getattr(again, name))


def test_the_number_of_threads_changes_no_pair(monkeypatch):
    monkeypatch.setattr(neighbors, "THREAD_ATOMS", 1)
    one, found = crystal("triclinic", (6, 8, 1)), []
    for count in (1, 2):
        monkeypatch.setattr(parallel, "available_threads", lambda count=count: count)
        found.append(neighbors.find_neighbors(one, 9.0))
    for name in ("centers", "neighbors", "shifts"):
        assert torch.equal(*(getattr(part, name) for part in found))


def test_atoms_far_outside_the_cell_and_cells_of_one_atom():
    one = crystal("triclinic")
    moved = one.positions + torch.tensor([[30.0, -12.0, 5.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    far = one.with_positions(moved)
    assert as_set(neighbors.find_neighbors(far, CUTOFF)) == oracles.neighbor_set(far, CUTOFF, reach=16)
    small = structure([[0.1, 0.2, 0.3]], [29], 2.3 * torch.eye(3), (True, True, True))
    assert as_set(neighbors.find_neighbors(small, 5.0)) == oracles.neighbor_set(small, 5.0)


def test_no_atoms_within_reach_and_no_structures():
    assert len(neighbors.find_neighbors(dimer(9.0), CUTOFF)) == 0
    assert len(neighbors.find_neighbors(everything().select([]), CUTOFF)) == 0


def test_vectors_that_are_remembered_keep_their_gradient():
    one = dimer(2.0)
    moved = one.with_positions(one.positions.clone().requires_grad_())
    found = neighbors.find_neighbors(moved, 3.0)
    with torch.no_grad():
        found.vectors(moved)
        closer = found.within(moved, 2.5)
    (found.vectors(moved).square().sum() + closer.vectors(moved).square().sum()).backward()
    assert moved.positions.grad.abs().max() > 1
    assert closer.vectors(moved).requires_grad
    assert found.vectors(one) is found.vectors(one) and found.vectors(one) is not found.vectors(moved)


def test_within_does_not_grow():
    with pytest.raises(ValueError, match="does not hold"):
        neighbors.find_neighbors(dimer(2.0), 3.0).within(dimer(2.0), 3.5)


def test_within_drops_the_pairs_beyond_a_smaller_cutoff():
    batch = everything()
    smaller, direct = neighbors.find_neighbors(batch, 5.0).within(batch, 3.0), neighbors.find_neighbors(batch, 3.0)
    assert as_set(smaller) == as_set(direct)


def test_pairs_of_a_run_of_atoms_are_those_of_the_list():
    """To the last bit, with their vectors; and no pairs where all are farther apart, whether that is known or has to be looked at."""
    batch = Structures.concatenate([crystal("triclinic"), cluster(), crystal("slab", (6, 8, 1))])
    whole = neighbors.find_neighbors(batch, CUTOFF)
    closest = float(whole.vectors(batch).norm(dim=1).min())
    for start, end in ((0, 5), (3, batch.n_atoms), (4, 4)):
        found, mine = whole.of_centers(start, end), (whole.centers >= start) & (whole.centers < end)
        for name in ("centers", "neighbors", "shifts"):
            assert torch.equal(getattr(found, name), getattr(whole, name)[mine])
        assert torch.equal(found.vectors(batch), whole.vectors(batch)[mine])
        assert torch.equal(replace(found).vectors(batch), found.vectors(batch))
    copy = neighbors.Neighbors(whole.centers, whole.neighbors, whole.shifts, CUTOFF)
    for found in (whole, copy):
        assert len(found.within(batch, closest)) == 0 < len(found.within(batch, 1.001 * closest))
    moved = batch.with_positions(0.9 * batch.positions, 0.9 * batch.cells)
    assert len(whole.within(moved, closest)) > 0  # what is known of some positions is not said of others


def test_molecules_are_searched_together(monkeypatch):
    """Each sees itself alone, wherever they lie, and whatever is between them in the batch; the order is that of the batch."""
    parts = [
        cluster(seed=1),
        cluster(seed=2),
        crystal("triclinic"),
        *(cluster(seed=k) for k in range(3, 9)),
        dimer(1.1),
    ]
    batch = Structures.concatenate(parts)
    alone = neighbors.Neighbors.batch([neighbors.find_neighbors(p, CUTOFF) for p in parts], batch.counts.tolist())
    for most in (256, 4, 1):
        monkeypatch.setattr(neighbors, "MOLECULES", most)
        found = neighbors.find_neighbors(batch, CUTOFF)
        for name in ("centers", "neighbors", "shifts"):
            assert torch.equal(getattr(found, name), getattr(alone, name))
        assert torch.equal(found.vectors(batch), replace(alone).vectors(batch))


def test_many_neighbours_of_an_atom():
    one = crystal("cubic", (6, 8, 1))
    assert as_set(neighbors.find_neighbors(one, 14.0)) == oracles.neighbor_set(one, 14.0)


def test_atoms_on_top_of_each_other_are_named():
    batch = Structures.concatenate([cluster(), dimer(0.2)])
    with pytest.raises(UserError, match=r"structure 0: atoms 0 and 1 are 0\.200 A apart \(closer than 0\.3 A\)"):
        neighbors.find_neighbors(batch, CUTOFF)
    same = structure([[0, 0, 0], [0, 0, 0]], [6, 8])
    with pytest.raises(UserError, match=r"0\.000 A apart"):
        neighbors.find_neighbors(same, CUTOFF)


def tilted(height: float) -> torch.Tensor:
    """A wide cell of that height between its two larger faces, nowhere orthogonal."""
    return torch.tensor([[3000.0, 40.0, 3.0], [-500.0, 900.0, 0.5 * height], [1.2 * height, -0.4 * height, height]])


ALL, NONE, ALONG_XY, ALONG_X = [True] * 3, [False] * 3, [True, True, False], [True, False, False]
WIDE = {  # cell, periodic axes, box of the atoms
    "case": ([3000.0, 1000.0, 6.0], ALL, [8.0, 8.0, 6.0]),
    "sheet along z": ([6.0, 1000.0, 3000.0], ALL, [6.0, 9.0, 9.0]),
    "sheet along y": ([1000.0, 6.0, 3000.0], ALL, [9.0, 6.0, 9.0]),
    "slab": ([3000.0, 3000.0, 30.0], ALONG_XY, [9.0, 9.0, 9.0]),
    "slab without height": ([3000.0, 3000.0, 0.0], ALONG_XY, [9.0, 9.0, 9.0]),
    "wire": ([1e7, 6.0, 6.0], ALONG_X, [9.0, 9.0, 9.0]),
    "needle": ([1e7, 6.0, 6.0], ALL, [9.0, 6.0, 6.0]),
    "huge": ([3e8, 3e8, 3e8], ALL, [9.0, 9.0, 9.0]),
    "huge slab": ([3e8, 3e8, 1.0], ALONG_XY, [9.0, 9.0, 9.0]),
    "evaporated": (None, NONE, [3000.0, 1000.0, 6.0]),
    "vapour of a slab": ([20.0, 20.0, 1.0], ALONG_XY, [20.0, 20.0, 1e7]),
    "tilted": (tilted(6.0), ALL, [8.0, 8.0, 6.0]),
    "tilted, thin": (tilted(0.9), ALL, [8.0, 8.0, 0.9]),
    "tiny": ([1.9, 2.1, 2.0], ALL, [1.9, 2.1, 2.0]),
    "thin and wide": ([1.9, 2.1, 5e5], ALL, [1.9, 2.1, 9.0]),
}


def wide_cells() -> list[tuple[str, Structures]]:
    """Cells and clouds whose grids of bins are as uneven as can be: two dozen atoms, most in a corner, one at the far end."""
    out = []
    for name, (cell, periodic, box) in WIDE.items():
        cell = None if cell is None else torch.diag(torch.tensor(cell)) if isinstance(cell, list) else cell
        edges = torch.diag(torch.tensor(box, dtype=torch.float64))
        volume = edges.diagonal().prod()
        points = scattered(1 if volume < 20 else 24, edges, 5, closest=1.0)
        if cell is not None and volume > 20:
            away = torch.tensor([2.0, -3.0, 1.0], dtype=torch.float64) * torch.tensor(periodic)
            points[0] += away @ cell.double()
        out.append((name, structure(points, [29] * len(points), cell, tuple(periodic))))
    return out


def brute_force(one: Structures, cutoff: float) -> set[tuple[int, ...]]:
    """As oracles.neighbor_set, of atoms anywhere: each is put into the cell first, and shifts are tried as far as heights ask for."""
    box = cell_list.complete_cells(one.cells, one.periodic)[0]
    fractions = one.positions @ torch.linalg.inv(box)
    wraps = torch.where(one.periodic[0], fractions.floor(), 0.0).long()
    x = one.positions - wraps.double() @ box
    heights = 1 / torch.linalg.inv(box).norm(dim=0)
    most = torch.where(one.periodic[0], (cutoff / heights).ceil() + 1, 0.0).int().tolist()
    found = set()
    for shift in itertools.product(*(range(-k, k + 1) for k in most)):
        near = ((x[None] + torch.tensor(shift).double() @ box - x[:, None]).norm(dim=2) < cutoff).nonzero().tolist()
        for i, j in near:
            if i != j or any(shift):
                found.add((i, j, *(torch.tensor(shift) + wraps[i] - wraps[j]).tolist()))
    return found


def check_wide_cells() -> None:
    """Run in a process of its own, as a fault in a compiled library ends it."""
    parts = dict(wide_cells())
    for cutoff in (2.5, 5.0, 11.0):
        alone = []
        for name, one in parts.items():
            neighbors_of = brute_force(one, cutoff)
            found = neighbors.find_neighbors(one, cutoff)
            assert as_set(found) == neighbors_of, (name, cutoff, len(found), len(neighbors_of))
            assert all(torch.equal(getattr(found, k), getattr(found.sorted(), k)) for k in ("centers", "shifts")), name
            assert as_set(VerletList(cutoff)(one)) == neighbors_of, (name, cutoff)
            alone.append(found)
        batch = Structures.concatenate([*parts.values(), *(parts["evaporated"] for _ in range(3)), cluster()])
        joined = neighbors.find_neighbors(batch, cutoff)
        together = neighbors.Neighbors.batch(alone, [one.n_atoms for one in parts.values()])
        assert torch.equal(joined.centers[: len(together)], together.centers)
        assert torch.equal(joined.shifts[: len(together)], together.shifts)


def check_clouds() -> None:
    """Molecules that are searched in one call, whose grid is the sum of theirs."""
    flat = [
        structure(scattered(20, torch.diag(torch.tensor([200.0, 200.0, 3.0]).double()), k), [29] * 20)
        for k in range(300)
    ]
    batch = Structures.concatenate(flat)
    found = neighbors.find_neighbors(batch, 5.0)
    alone = neighbors.Neighbors.batch([neighbors.find_neighbors(one, 5.0) for one in flat], batch.counts.tolist())
    assert torch.equal(found.centers, alone.centers) and torch.equal(found.neighbors, alone.neighbors)


@pytest.mark.parametrize("check", ["check_wide_cells", "check_clouds"])
def test_no_cell_is_too_wide_or_too_thin(check):
    """vesin thins a grid of more than 1e5 bins, and divides by zero where it leaves an axis none."""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    command = [sys.executable, "-c", f"import test_neighbors; test_neighbors.{check}()"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-1500:]}"


def test_atoms_and_cells_beyond_double_precision_are_refused():
    with pytest.raises(UserError, match=r"structure 0: a position is farther than 1e\+09 A from the origin"):
        structure([[0, 0, 0], [2e9, 0, 0]], [29, 29])
    with pytest.raises(UserError, match=r"structure 0: a lattice vector is longer than 1e\+09 A"):
        structure([[0, 0, 0]], [29], torch.diag(torch.tensor([1e12, 6.0, 6.0])), (True, True, True))


def test_vectors_are_differentiable_and_scatters_are_their_transposes():
    """forces() and virials() against autograd through positions and strain of an arbitrary pair function."""
    batch = Structures.concatenate([crystal("triclinic"), crystal("left-handed", (1, 6, 8))])
    pairs = neighbors.find_neighbors(batch, CUTOFF)
    positions = batch.positions.clone().requires_grad_()
    strain = torch.zeros(len(batch), 3, 3, dtype=torch.float64, requires_grad=True)
    deform = torch.eye(3, dtype=torch.float64) + 0.5 * (strain + strain.transpose(1, 2))
    r = torch.einsum(
        "pa,pab->pb", batch.positions.new_zeros(len(pairs), 3), deform[batch.structure_of_atom[pairs.centers]]
    )
    strained = torch.einsum("na,nab->nb", positions, deform[batch.structure_of_atom])
    cells = batch.cells @ deform
    shift = torch.einsum("pa,pab->pb", pairs.shifts.double(), cells[batch.structure_of_atom[pairs.centers]])
    r = strained[pairs.neighbors] + shift - strained[pairs.centers]
    weights = torch.linspace(-1, 1, len(pairs), dtype=torch.float64)
    energy = (weights * (r.square().sum(1) + r[:, 0] * r[:, 1] ** 2)).sum()
    vectors = pairs.vectors(batch)
    gradients = weights[:, None] * (2 * vectors)
    gradients[:, 0] += weights * vectors[:, 1] ** 2
    gradients[:, 1] += weights * 2 * vectors[:, 0] * vectors[:, 1]
    on_positions, on_strain = torch.autograd.grad(energy, (positions, strain))
    # the same sums in another order
    torch.testing.assert_close(
        neighbors.scatter_forces(pairs, batch.n_atoms, gradients), -on_positions, atol=1e-11, rtol=0
    )
    torch.testing.assert_close(
        neighbors.scatter_virials(batch, pairs, vectors, gradients), on_strain, atol=1e-11, rtol=0
    )


def test_surroundings_select_and_concatenate():
    batch = everything()
    whole = Surroundings.from_structures(batch, neighbors.find_neighbors(batch, CUTOFF))
    chosen = whole.select([3, 0, 8])
    again = Surroundings.concatenate([whole.select([3]), whole.select([0, 8])])
    for name in ("species", "centers", "neighbor_species", "vectors"):
        assert torch.equal(getattr(chosen, name), getattr(again, name))
    assert torch.equal(chosen.vectors[chosen.centers == 2], whole.vectors[whole.centers == 8])
    assert chosen.species.tolist() == whole.species[[3, 0, 8]].tolist()


@pytest.mark.parametrize(
    ("cell", "periodic"),
    [
        (np.eye(3) * 4e-3, True),  # a unit that is wrong by a thousand
        (np.diag([4.0, 4.0, 0.2]), True),
        ([[4, 0, 0], [4, 0.2, 0], [0, 0, 4]], True),
        (np.diag([0.25, 5, 5]), [True, False, False]),
        ([[5, 0, 0], [5, 0.01, 0], [0, 0, 5]], [True, True, False]),
    ],
)
def test_cells_that_hold_an_atom_and_its_image_together(cell, periodic):
    """Within a second, whatever the number of images."""
    structures = structures_from_ase(
        [Atoms("Cu2", [[0, 0, 0], [1.8, 0, 0]], cell=cell, pbc=periodic)], ["a.xyz frame 3"]
    )
    with pytest.raises(UserError, match="a.xyz frame 3: .*closer than 0.3 A"):
        find_neighbors(structures, 5.0)
    (finding,) = check_coincident(structures)[:1]
    assert finding.severity == "error" and finding.frames == ("a.xyz frame 3",)


@pytest.mark.parametrize(
    ("cell", "periodic"),
    [
        (np.eye(3) * 2.0, True),
        ([[5, 0, 0], [5, 0.5, 0], [0, 0, 5]], True),
        (np.diag([0.5, 5, 5]), [True, False, False]),
        (np.zeros((3, 3)), False),
        (bulk("Cu").cell.array, True),
    ],
)
def test_small_and_skewed_cells_are_no_mistake(cell, periodic):
    structures = structures_from_ase([Atoms("Cu", cell=cell, pbc=periodic)])
    find_neighbors(structures, 2.5)
    assert check_coincident(structures) == []
