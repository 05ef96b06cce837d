"""The cell lists of the device, run on the CPU, against the compiled search and against trying every lattice shift."""

from __future__ import annotations

import oracles
import pytest
import torch
from systems import CELLS, CUTOFF, cluster, crystal, everything, replicate, scattered, structure

from gpmlp.core import cell_list, neighbors
from gpmlp.core.neighbors import Neighbors
from gpmlp.core.structures import Structures


def searched(structures: Structures, cutoff: float) -> Neighbors:
    box = cell_list.complete_cells(structures.cells, structures.periodic)
    i, j, shifts, distances = cell_list.find_pairs(
        structures.positions, box, structures.periodic, structures.structure_of_atom, cutoff
    )
    assert (i.diff() >= 0).all()
    found = Neighbors(i, j, shifts, cutoff)
    # rounding of coordinates some tens of A long
    torch.testing.assert_close(found.vectors(structures).norm(dim=1), distances, rtol=0, atol=1e-12)
    return found.sorted()


def assert_same(found: Neighbors, there: Neighbors) -> None:
    for name in ("centers", "neighbors", "shifts"):
        assert torch.equal(getattr(found, name), getattr(there, name)), name


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("cutoff", [2.0, CUTOFF, 7.5])
def test_pairs_are_those_of_brute_force(kind, cutoff):
    one = crystal(kind, (6, 8, 1))
    found = searched(one, cutoff)
    columns = torch.cat([found.centers[:, None], found.neighbors[:, None], found.shifts], dim=1)
    assert {tuple(row) for row in columns.tolist()} == oracles.neighbor_set(one, cutoff)
    assert len(columns.unique(dim=0)) == len(columns)


@pytest.mark.parametrize("cutoff", [2.0, CUTOFF, 6.0])
def test_batches_are_as_the_search_on_cpus_has_them(cutoff):
    """Narrow and wide cells, of every periodicity, molecules and a single atom at once; some with several bins along each axis."""
    large = [replicate(crystal(kind), (4, 3, 5)) for kind in ("cubic", "triclinic", "left-handed")]
    cloud = structure(scattered(80, 14 * torch.eye(3, dtype=torch.float64), 3), [6] * 80)
    batch = Structures.concatenate([everything(), *large, cloud, cluster(), crystal("wire")])
    assert_same(searched(batch, cutoff), neighbors.find_neighbors(batch, cutoff).sorted())


def test_atoms_far_outside_the_cell():
    one = replicate(crystal("triclinic"), (3, 3, 3))
    away = torch.randn(one.n_atoms, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    far = one.with_positions(one.positions + (5 * away).round() @ one.cells[0])
    assert_same(searched(far, CUTOFF), neighbors.find_neighbors(far, CUTOFF).sorted())
    assert len(searched(far, CUTOFF)) == len(searched(one, CUTOFF))


def test_an_atom_at_the_edge_of_its_cell_and_a_flat_heap():
    edge = structure([[-1e-17, 0.0, 4.0], [2.0, 4.0 - 1e-16, 0.0]], [6, 8], 4.0 * torch.eye(3), (True, True, True))
    flat = structure([[0.0, 0, 0], [1.0, 0, 0], [0, 1.2, 0], [30.0, 0, 0]], [6, 8, 1, 1])
    for one in (edge, flat):
        assert_same(searched(one, CUTOFF), neighbors.find_neighbors(one, CUTOFF).sorted())


def test_blocks_do_not_show(monkeypatch):
    batch = everything()
    whole = searched(batch, CUTOFF)
    monkeypatch.setattr(cell_list, "ROWS", 100)
    assert_same(searched(batch, CUTOFF), whole)


def test_nothing_there():
    assert len(searched(everything().select([]), CUTOFF)) == 0
    assert len(searched(structure([[0.0, 0, 0]], [1]), CUTOFF)) == 0


def test_boxes_are_cells_with_normals():
    """Right-handed or not, every axis that is not periodic is normal to all others and of length 1."""
    batch = everything()
    box = cell_list.complete_cells(batch.cells, batch.periodic)
    assert torch.equal(box[batch.periodic], batch.cells[batch.periodic])
    products = box @ box.mT
    free = ~batch.periodic
    unit = torch.eye(3, dtype=box.dtype).expand_as(products)
    torch.testing.assert_close(products[free], unit[free], rtol=0, atol=1e-12)
