"""A skin against a search of its own in every call: moves, strains, wraps, permutations, batches; and how often it searches."""

from __future__ import annotations

import pytest
import torch
from systems import CELLS, CUTOFF, crystal, dimer, everything, replicate

from gpmlp.core import neighbors, verlet_list
from gpmlp.core.errors import UserError
from gpmlp.core.structures import Structures
from gpmlp.core.verlet_list import VerletList
from gpmlp.native import library

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)
NAMES = ("centers", "neighbors", "shifts")


def noise(like: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(like)


def strained(batch: Structures, by: float, seed: int) -> Structures:
    """Every structure by another strain and rotation."""
    strain = torch.eye(3).to(batch.cells) + by * noise(batch.cells, seed)
    moved = (batch.positions[:, :, None] * strain[batch.structure_of_atom]).sum(1)
    return batch.with_positions(moved, batch.cells @ strain)


def wrapped(batch: Structures) -> Structures:
    """Every atom by another lattice vector along a periodic axis."""
    along = batch.periodic[batch.structure_of_atom]
    jumps = torch.where(along, noise(batch.positions, 5).round(), 0.0)
    return batch.with_positions(batch.positions + (jumps[:, :, None] * batch.cells[batch.structure_of_atom]).sum(1))


def permuted(batch: Structures) -> Structures:
    """Atoms of each structure in another order."""
    order = (
        batch.structure_of_atom
        + torch.rand(batch.n_atoms, generator=torch.Generator().manual_seed(1)).to(batch.positions)
    ).argsort()
    parts = batch.positions[order], batch.cells, batch.periodic, batch.species[order], batch.structure_of_atom
    return Structures(*parts)


def true_to(found: neighbors.Neighbors, batch: Structures) -> None:
    """The same pairs in the same order, with the same vectors, as a search of its own; which is tested against brute force."""
    afresh = neighbors.find_neighbors(batch, CUTOFF).sorted()
    for name in NAMES:
        assert torch.equal(getattr(found, name), getattr(afresh, name)), name
    torch.testing.assert_close(found.vectors(batch), afresh.vectors(batch), rtol=0, atol=1e-12)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("kind", [*CELLS, "all"])
def test_what_a_search_gives(kind, device):
    """Through small steps of atoms and cells, and all that is no small step."""
    one = everything() if kind == "all" else crystal(kind, (6, 8, 1))
    one = one.to(device=device)
    remember, calls = VerletList(CUTOFF), 0
    for k in range(24):
        one = one.with_positions(one.positions + 0.01 * noise(one.positions, k))
        one = strained(one, 0.002, k)
        if k % 8 == 3:
            one = wrapped(one)
        if k % 8 == 5:
            one = permuted(one)
        if k % 8 == 7:
            one = strained(one, 0.05, k)
        true_to(remember(one), one)
        calls += len(one)
    assert len(one) < remember.searched < 0.8 * calls


def test_displacements_by_compiled_loops():
    """Of each structure where no cell has changed, as by tensors; where one is no number, that is none."""
    start, remember = everything(), VerletList(CUTOFF)
    remember(start)
    positions = start.positions + 0.01 * noise(start.positions, 2)
    for one in (start.with_positions(positions), start.with_positions(positions.mT.contiguous().mT)):
        by_atom = remember._reference.displacement(one, one.positions, one.cells)
        expected = torch.stack([part.max() for part in by_atom.split(one.counts.tolist())])
        torch.testing.assert_close(remember._displacements(one, remember._reference), expected, rtol=1e-12, atol=1e-12)
    positions[1] = torch.nan
    lost = torch.empty(2, dtype=torch.float64)
    given = torch.zeros(4, dtype=torch.long), positions[:4].contiguous(), start.positions[:4].contiguous()
    library.call("displacements", 4, *given, 2, lost)
    assert lost[0].isnan() and lost[1] == 0


@pytest.mark.parametrize("kind", CELLS)
def test_a_skin_outlives_small_strains(kind):
    """A cell that changes in every step, as in NPT and relaxations: three searches at most, the first two to see how it goes."""
    start, remember = replicate(crystal(kind), (2, 1, 1)), VerletList(CUTOFF)
    for k in range(20):
        one = strained(start, 0.0005 * k, 3)
        true_to(remember(one), one)
    assert remember.searched <= 3


def test_the_bound_is_kept_to_its_last_tenth():
    """Pairs that come from just beyond the skin, by strain and by moves together, are there in time."""
    for share in (0.1, 0.5, 0.9):
        start, remember = replicate(crystal("triclinic"), (2, 2, 2)), VerletList(CUTOFF)
        remember(start), remember(start)
        squeeze = 1 - 0.99 * share * 0.6 / (CUTOFF + 0.6) / 3**0.5
        towards = -start.positions / start.positions.norm(dim=1, keepdim=True).clamp_min(1e-9)
        one = start.with_positions(
            start.positions * squeeze + 0.99 * (1 - share) * 0.3 * towards, start.cells * squeeze
        )
        before = remember.searched
        true_to(remember(one), one)
        assert remember.searched == before


def test_only_those_that_moved_are_searched():
    batch, remember = Structures.concatenate([crystal(kind, (6, 8, 1)) for kind in CELLS]), VerletList(CUTOFF)
    for _ in range(2):
        remember(batch)
    count = remember.searched
    assert count == 2 * len(batch)
    for s in range(len(batch)):
        mine = (batch.structure_of_atom == s)[:, None]
        batch = batch.with_positions(batch.positions + mine * 0.3 * noise(batch.positions, 10 + s))
        true_to(remember(batch), batch)
    assert remember.searched == count + 2 * len(batch) - 1  # as one has leapt, it is looked at once more


def test_no_skin_where_it_would_not_last(monkeypatch):
    """Atoms that leap are searched without one, and with one again when they have come to rest."""
    one, remember, searches, search = crystal("cubic", (6, 8, 1)), VerletList(CUTOFF), [], neighbors.find_neighbors
    monkeypatch.setattr(
        verlet_list.neighbors, "find_neighbors", lambda s, cutoff: searches.append(cutoff) or search(s, cutoff)
    )
    for k in range(6):
        remember(one.with_positions(one.positions + 0.2 * (k % 2)))
    assert searches == [CUTOFF + verlet_list.HAIR] * 6
    remember(one), remember(one), remember(one)
    assert searches[6:] in ([CUTOFF + 0.6], [CUTOFF + verlet_list.HAIR, CUTOFF + 0.6])


def test_candidates_hold_what_is_near_and_stay():
    one, remember = crystal("triclinic", (6, 8, 1)), VerletList(CUTOFF)
    remember(one)
    one = one.with_positions(one.positions + 1e-3 * noise(one.positions, 0))
    before = remember.candidates(one)  # now with a skin
    for k in range(4):
        one = one.with_positions(one.positions + 1e-3 * noise(one.positions, k))
        found = remember.candidates(one)
        assert found is before and len(found) > len(found.within(one, CUTOFF))
        true_to(found.within(one, CUTOFF), one)
        assert found.closest(one) == float(found.vectors(one).norm(dim=1).min())


def test_atoms_that_meet_between_two_searches_are_noticed():
    none, two = torch.eye(3, dtype=torch.float64)[None], torch.tensor([29, 29])
    apart = torch.tensor([[0.0, 0, 0], [0.36, 0, 0]], dtype=torch.float64)
    one, remember = Structures(apart, none, torch.zeros(1, 3, dtype=torch.bool), two, 0 * two), VerletList(CUTOFF)
    by = torch.tensor([[0.0, 0, 0], [-0.01, 0, 0]], dtype=torch.float64)
    for k in range(6):  # to 0.31 A
        remember(one.with_positions(apart + k * by))
    searched = remember.searched
    with pytest.raises(UserError, match="atoms 0 and 1 are 0.290 A apart"):
        remember(one.with_positions(apart + 7 * by))
    assert remember.searched == searched


def test_without_a_skin_every_call_searches():
    one, remember = crystal("cubic"), VerletList(CUTOFF, 0.0)
    for _ in range(3):
        true_to(remember(one), one)
    assert remember.searched == 3
    with pytest.raises(UserError, match="`skin` must be zero or positive; got -1"):
        VerletList(CUTOFF, -1)


def test_other_atoms_are_not_mistaken():
    """Other species, periodicity or numbers of atoms at the same places; positions changed in place."""
    remember, one = VerletList(CUTOFF), crystal("cubic", (6, 8, 1))
    other = Structures(
        one.positions, one.cells, torch.tensor([[True, False, True]]), one.species, one.structure_of_atom
    )
    for batch in (one, one, other, everything(), one, dimer(1.3), dimer(9.0)):
        true_to(remember(batch), batch)
    single = one.to(dtype=torch.float32)
    for batch in (single, one, single):
        assert remember(batch).vectors(batch).dtype == batch.positions.dtype
    place = one.positions.clone()
    for _ in range(12):
        place += 0.05 * torch.sin(5 * place)
        here = one.with_positions(place)
        true_to(remember(here), here)


def test_what_is_wrong_is_said_and_forgotten():
    """Atoms on top of each other, and positions that are none, also where nobody looked at them before; then all is well again."""
    one, remember = Structures.concatenate([crystal("cubic"), crystal("slab")]), VerletList(CUTOFF)
    remember(one), remember(one)
    close, lost = one.positions.clone(), one.positions.clone()
    close[1] = close[0] + 0.1
    lost[-1, 0] = torch.nan
    with pytest.raises(UserError, match="structure 0: atoms 0 and 1 are 0.173 A apart"):
        remember(one.with_unchecked_positions(close, one.cells))
    with pytest.raises(UserError, match="a position is NaN"):
        remember(one.with_unchecked_positions(lost, one.cells))
    flat = one.cells.clone()
    flat[0, 2] = flat[0, 0] + flat[0, 1]
    with pytest.raises(UserError, match="structure 0: the cell is flat"):
        remember(one.with_unchecked_positions(one.positions, flat))
    true_to(remember(one), one)
