"""Steps on tables of neighbours against the potential itself; what they may not ask of the host; searches that are seldom and in time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from systems import CELLS, CUTOFF, cluster, crystal, everything, replicate
from torch.utils._python_dispatch import TorchDispatchMode

import gpmlp
from gpmlp.core import neighbors
from gpmlp.core.errors import DataWarning, UserError
from gpmlp.core.padded_neighbors import PaddedNeighbors, SegmentSums
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.potential import species_model
from gpmlp.potential import stepper as stepping
from gpmlp.potential.baselines import ZBL
from gpmlp.potential.stepper import Stepper
from gpmlp.recipe import Recipe

SOAP = {"cutoff": CUTOFF, "n_max": 3, "l_max": 3}
CHOICES = {
    # few features, so that the mean of some species collapses to a quadratic form
    "quadratic": {"descriptor": SOAP | {"n_max": 1, "l_max": 0}, "kernel": {"zeta": 2}, "inducing": {"n": 50, "gradients": 0}},
    "low rank": {"descriptor": SOAP, "kernel": {"zeta": 2}, "inducing": {"n": 60, "gradients": 0}, "mean": "low_rank"},
    "low rank, zeta 3": {"descriptor": SOAP, "kernel": {"zeta": 3}, "inducing": {"n": 24, "gradients": 0}, "mean": "low_rank"},
    "tangents": {"descriptor": SOAP, "kernel": {"zeta": 3}, "inducing": {"n": 8, "gradients": 2}},
    "two": {
        "descriptor": [SOAP, {"cutoff": 2.8, "n_max": 2, "l_max": 1}],
        "kernel": [{"zeta": 4}, {"name": "exponential", "length": 0.7}], "inducing": {"n": 8, "gradients": 1},
    },
}  # fmt: skip


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])


def fitted(name: str):
    """A potential with ZBL and what else a fit makes."""
    batch = Structures.concatenate([shaken(everything(), 0.05, seed) for seed in range(6)])
    generator = torch.Generator().manual_seed(0)
    energies = torch.randn(len(batch), generator=generator, dtype=torch.float64)
    forces = 0.3 * torch.randn(batch.n_atoms, 3, generator=generator, dtype=torch.float64)
    targets = replace(Targets.unlabelled(batch), energies=energies, forces=forces)
    noise = {"energy_per_atom": 0.01, "force": 0.1, "stress": 0.01}
    recipe = Recipe.model_validate(CHOICES[name] | {"noise": noise})
    return gpmlp.fit(batch, targets, recipe)[0]


@pytest.fixture(scope="module", params=CHOICES)
def potential(request):
    return fitted(request.param)


@pytest.fixture(scope="module")
def plain():
    return fitted("tangents")


def shaken(batch: Structures, by: float, seed: int = 0) -> Structures:
    noise = torch.randn(batch.positions.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return batch.with_positions(batch.positions + by * noise)


def prior_rounding(potential) -> float:
    """What rounding leaves of differences from prior variances, eV²; these may be 1e6."""
    variances, learned = potential.variances, potential.calibration.kinds["forces"]
    return 2e-15 * learned.scale**2 * max(map(variances.prior_variance, potential.species))


def compare(found, there, close: float = 1e-8, rounding: float = 0.0) -> None:
    """Means, variances of local energies, novelties; weights of thousands of eV cancel, as labels are random."""
    for name in ("energies", "atom_energies", "forces", "stresses", "novelty"):
        torch.testing.assert_close(getattr(found, name), getattr(there, name), rtol=close, atol=close, equal_nan=True)
    for part in ("inducing", "data", "misspecification", "noise", "total"):
        ours, theirs = (getattr(p.atom_energies_variance, part) for p in (found, there))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=close + rounding)


def test_the_same_as_the_potential(potential):
    """Of every periodicity and species at once, at the start and after a move; so are energies, forces and all else."""
    batch = everything()
    assert any(isinstance(b, ZBL) for b in potential.baselines)
    cheaper = potential.recipe.kernels[0].zeta == 2 or potential.recipe.mean == "low_rank"
    assert bool(potential.terms[0].cheaper_means) == cheaper
    stepper = Stepper(potential, batch, variance=True, novelty=True)
    for moved in (batch, shaken(batch, 0.03), shaken(batch, 0.13)):
        there = potential(moved, "atom_energies", novelty=True)
        compare(stepper(moved.positions), there, rounding=prior_rounding(potential))
    assert stepper.searches == 2


def test_estimated_force_covariances_are_those_of_the_potential(potential):
    batch = everything()
    stepper = Stepper(potential, batch, sampled_forces=True)
    for moved in (batch, shaken(batch, 0.03), shaken(batch, 0.13)):
        found, there = stepper(moved.positions), potential(moved, "sampled_forces")
        assert found.atom_energies_variance is None and found.novelty is None
        ours, theirs = (p.sampled_forces_covariance.total for p in (found, there))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8 * float(theirs.abs().max()))


def test_single_precision(plain):
    batch = everything()
    stepper = Stepper(plain.to(descriptors="float32"), batch)
    found, there = stepper(batch.positions), plain(batch)
    assert not torch.equal(found.forces, there.forces) and found.forces.dtype == torch.float64
    torch.testing.assert_close(found.forces, there.forces, rtol=1e-4, atol=1e-4)


def test_precision_stays_until_it_is_asked_for(plain):
    batch, single = everything(), plain.to(descriptors="float32")
    assert not torch.equal(single(batch).forces, plain(batch).forces)
    assert torch.equal(single.to("cpu")(batch).forces, single(batch).forces)
    assert torch.equal(single.to("cpu", "float64")(batch).forces, plain(batch).forces)


def test_chunks_do_not_show(plain, monkeypatch):
    batch = everything()
    whole = Stepper(plain, batch, True, True)(batch.positions)
    monkeypatch.setattr(stepping, "ENVIRONMENTS", 3)
    compare(Stepper(plain, batch, True, True)(batch.positions), whole, 1e-12)


@DEVICES
@pytest.mark.parametrize("wait", [True, False])
def test_a_long_way_with_few_searches(plain, wait, device):
    """Atoms and the cell of a crystal move a little each step: always as a search of its own has it, with one search in many steps."""
    one = replicate(crystal("triclinic"), (2, 2, 2))
    batch = Structures.concatenate([one, crystal("slab")])
    stepper, generator = Stepper(plain.to(device), batch, wait=wait), torch.Generator().manual_seed(3)
    drift = torch.randn(batch.positions.shape, generator=generator, dtype=torch.float64)
    shear = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    for k in range(30):
        strain = torch.eye(3, dtype=torch.float64) + 0.0007 * k * shear
        moved = batch.with_positions((batch.positions + 0.005 * k * drift) @ strain, batch.cells @ strain)
        found, there = stepper(moved.positions, moved.cells).map(torch.Tensor.cpu), plain(moved)
        for name in ("energies", "forces", "stresses"):
            torch.testing.assert_close(getattr(found, name), getattr(there, name), rtol=1e-9, atol=1e-9, equal_nan=True)
    assert 1 < stepper.searches < 15


def test_a_leap_is_caught(plain):
    """With `wait` by a search; without, as NaN rather than wrong numbers, and set right two steps later."""
    batch = everything()
    leap = shaken(batch, 0.3)
    careful, swift = Stepper(plain, batch), Stepper(plain, batch, wait=False)
    there = plain(leap)
    for stepper in (careful, swift):
        stepper(batch.positions)
    torch.testing.assert_close(careful(leap.positions).forces, there.forces, rtol=1e-9, atol=1e-9)
    found = swift(leap.positions)
    assert found.forces.isnan().all() and found.energies.isnan().all() and found.atom_energies.isnan().all()
    swift(leap.positions)
    torch.testing.assert_close(swift(leap.positions).forces, there.forces, rtol=1e-9, atol=1e-9)


class Asked(TorchDispatchMode):
    """Operations that make the host wait for a device, or whose shapes depend on numbers: they are raised as errors."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "unique",
        "masked_select",
        "bincount",
        "equal",
        "is_nonzero",
        "repeat_interleave",
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.FORBIDDEN, name
        if name == "where":  # a number given to it would be a copy from the host
            assert all(t.dim() for t in args[1:]), "where with a number"
        if name.startswith("index"):
            indices = [
                t for part in args if isinstance(part, (list, tuple)) for t in part if isinstance(t, torch.Tensor)
            ]
            assert not any(t.dtype == torch.bool for t in indices), f"{name} by a mask"
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_step_asks_nothing_of_the_host(potential):
    """What a step between two searches consists of, seen from beneath; with `wait`, the two questions are found."""
    batch = everything()
    swift, careful = (Stepper(potential, batch, True, True, wait=wait) for wait in (False, True))
    for stepper in (swift, careful):
        stepper(batch.positions)
        stepper(batch.positions)
    with Asked() as seen:
        swift._step(batch.positions, batch.cells)
    assert seen.count > 50
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Asked():
        careful(batch.positions)


def test_tables_hold_every_pair_once_and_its_reverse():
    for batch in (everything(), replicate(crystal("left-handed"), (2, 1, 1))):
        pairs, slots = neighbors.find_neighbors(batch, CUTOFF), (batch.species > 4).long()
        rows = slots.argsort(stable=True)
        table = PaddedNeighbors.from_neighbors(pairs, batch, rows, slots, 2)
        vectors = table.vectors(batch.positions, batch.cells, 0, batch.n_atoms)
        assert int(table.real.sum()) == len(pairs) and (vectors[~table.real] == table.beyond).all()
        flat, back = vectors.flatten(0, 2), table.reverse.flatten()
        real = table.real.flatten()
        torch.testing.assert_close(flat[back][real], -flat[real], rtol=0, atol=1e-12)
        assert torch.equal(back[back], torch.arange(len(back)))
        gradients = torch.randn(len(pairs), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        # gradients in the order of pairs, put where their vectors are
        match = torch.cdist(pairs.vectors(batch), flat[real], compute_mode="donot_use_mm_for_euclid_dist") < 1e-9
        owner = rows[:, None, None].expand_as(table.neighbors).flatten()[real]
        match &= pairs.centers[:, None] == owner
        assert (match.sum(1) == 1).all()
        placed = torch.zeros_like(flat)
        placed[real.nonzero()[:, 0][match.long().argmax(1)]] = gradients
        found = torch.empty_like(batch.positions)
        found[rows] = table.forces(placed.view_as(vectors), 0, batch.n_atoms)
        there = neighbors.scatter_forces(pairs, batch.n_atoms, gradients)
        torch.testing.assert_close(found, there, rtol=0, atol=1e-12)


def test_sums_over_segments():
    """Of any sizes and order, none of their rows twice; empty ones are zero; 33 and 1025 are one more than a level holds."""
    for sizes in ([5], [0, 3, 0], [33, 1, 1025, 0, 32], [1] * 7, [2000]):
        segment = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        segment = segment[torch.randperm(len(segment), generator=torch.Generator().manual_seed(0))]
        rows = torch.randn(len(segment), 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        expected = torch.stack([rows[segment == s].sum(0) for s in range(len(sizes))])
        sums = SegmentSums.from_segments(segment, len(sizes))
        torch.testing.assert_close(sums(rows), expected, rtol=0, atol=1e-12)
        ones = torch.ones(len(segment), dtype=torch.float64)
        assert sums(ones).tolist() == sizes  # exactly


def test_a_structure_in_a_batch_is_summed_as_alone(plain):
    """Nothing is added by index, whose order a device does not keep."""
    batch = everything()
    together = Stepper(plain, batch)
    found = together(batch.positions)
    for s in range(len(batch)):
        one = batch.select([s])
        alone = Stepper(plain, one)(one.positions)
        torch.testing.assert_close(found.energies[s], alone.energies[0], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found.stresses[s], alone.stresses[0], rtol=1e-9, atol=1e-11, equal_nan=True)

    class Added(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            puts = name.startswith("index_put") and (kwargs or {}).get("accumulate", len(args) > 3 and args[3])
            assert not name.startswith(("index_add", "scatter_add", "scatter_reduce")) and not puts, name
            return function(*args, **(kwargs or {}))

    with Added():
        together._step(batch.positions, batch.cells)


def test_positions_of_other_atoms_are_refused(plain):
    batch = everything()
    stepper = Stepper(plain, batch)
    with pytest.raises(
        UserError, match=r"`positions` must have shape \(18, 3\); got \(17, 3\). A Stepper is bound to its atoms"
    ):
        stepper(batch.positions[1:])
    with pytest.raises(UserError, match=r"`cell` must have shape \(8, 3, 3\); got \(3, 3\)"):
        stepper(batch.positions, batch.cells[0])


def test_a_step_that_cannot_be_recorded_is_called(monkeypatch):
    """As if on a device, where there is none to record on."""
    like = torch.zeros(2)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(stepping, "_recorded", lambda step, *inputs: 1 / 0)
    with pytest.warns(DataWarning, match=r"cannot be recorded as a CUDA graph \(ZeroDivisionError: .*\): it is called"):
        step = stepping.record_graph(lambda x: (x + 1,), like)
    assert step(like)[0].tolist() == [1, 1]


def test_tables_are_renewed_in_place(plain):
    batch = everything()
    stepper = Stepper(plain, batch)
    stepper(batch.positions)
    memory = stepper._table.neighbors.data_ptr()
    stepper(shaken(batch, 0.13).positions)
    assert stepper.searches == 2 and stepper._table.neighbors.data_ptr() == memory
    wide = PaddedNeighbors.from_neighbors(neighbors.find_neighbors(batch, 6.0), batch, stepper._rows, stepper._slots, 3)
    assert not stepper._table.copy_from(wide)


def test_what_cannot_be_stepped(plain):
    batch = everything()
    with pytest.raises(UserError, match="no atoms"):
        Stepper(plain, batch.select([]))
    with pytest.raises(UserError, match="skin"):
        Stepper(plain, batch, skin=0.0)
    with pytest.raises(UserError, match="not trained on"):
        Stepper(plain, replace(batch, species=torch.full_like(batch.species, 26)))
    with pytest.raises(UserError, match="no Mahalanobis"):
        Stepper(replace(plain, novelty=None), batch, novelty=True)
    with pytest.raises(UserError, match="posterior factor"):
        Stepper(replace(plain, variances=None), batch, variance=True)
    foreign = replace(plain.terms[0], descriptor=object())
    with pytest.raises(UserError, match="not gpmlp's own SOAP"):
        Stepper(replace(plain, terms=(foreign,)), batch)
    assert "no form" in species_model.why_unsupported(replace(plain, baselines=(object(),)))


@pytest.mark.parametrize("wait", [True, False])
def test_atoms_on_top_of_each_other_are_named_or_at_least_noticed(plain, wait):
    batch = crystal("cubic")
    stepper = Stepper(plain, batch, skin=4.0, wait=wait)
    close = batch.positions.clone()
    close[1] = close[0] + (close[1] - close[0]) * 0.1 / (close[1] - close[0]).norm()
    stepper(batch.positions)
    with pytest.raises(UserError, match=r"0\.100 A apart"):
        for _ in range(3):
            stepper(close)


@DEVICES
@pytest.mark.parametrize("graphs", [False, True])
def test_a_table_that_has_to_grow(plain, graphs, device):
    """Atoms of a molecule far apart, then close, then apart again: the table, and what was recorded on it, is made anew and stays wide."""
    near = Structures.concatenate([cluster((6,) * 12 + (1, 8), size=3.4), crystal("slab")])
    alone = torch.arange(14.0).double()[:, None] * 20.0
    far = near.with_positions(torch.cat([near.positions[:14] + alone, near.positions[14:]]))
    stepper, widths = Stepper(plain.to(device), far, True, True, skin=0.1, graphs=graphs), []
    for batch in (far, near, far, near):
        for _ in range(2):
            compare(stepper(batch.positions).map(torch.Tensor.cpu), plain(batch, "atom_energies", novelty=True))
        widths.append(stepper._table.width)
    assert widths[0] < widths[1] == widths[2] == widths[3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("kind", [*CELLS, "all"])
def test_on_a_device(plain, kind, graphs):
    """As on the CPU, recorded or not; and PyTorch itself finds nothing that waits for the device between two searches."""
    one = everything() if kind == "all" else crystal(kind, (6, 8, 1))
    moved = shaken(one, 0.02)
    stepper = Stepper(plain.to("cuda"), one, True, True, wait=False, graphs=graphs)
    start, later = (x.positions.to("cuda") for x in (one, moved))
    for _ in range(3):
        stepper(start)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = stepper(later)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stepper.searches == 1
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    again = [stepper(later) for _ in range(5)][-1]
    for name in ("energies", "atom_energies", "forces", "stresses", "novelty"):  # sums have one order
        assert torch.equal(getattr(again, name).nan_to_num(), getattr(found, name).nan_to_num()), name
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 256 * found.forces.numel()
    compare(found.map(torch.Tensor.cpu), plain(moved, "atom_energies", novelty=True), 1e-8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_at_size(plain):
    """What a step needs grows with the atoms by no more than its table and gradients: 10⁶ atoms in 80 GB are 80 kB each."""
    peaks, sizes = [], []
    for n in (24, 32):
        one = replicate(crystal("triclinic"), (n, n, n))
        stepper = Stepper(plain.to("cuda"), one, True)
        positions = stepper.structures.positions
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            stepper(positions)
        peaks.append(torch.cuda.max_memory_allocated())
        sizes.append(one.n_atoms)
        del stepper
        torch.cuda.empty_cache()
    assert (peaks[1] - peaks[0]) / (sizes[1] - sizes[0]) < 80e3
