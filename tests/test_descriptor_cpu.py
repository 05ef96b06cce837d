"""The compiled loops of the power spectrum against its plain PyTorch path."""

from __future__ import annotations

import pytest
import torch
from systems import CUTOFF, DESCRIPTORS, descriptor, everything

from gpmlp.core import neighbors
from gpmlp.core.environments import Surroundings
from gpmlp.core.neighbors import fits_compiled_loops
from gpmlp.descriptors import cpu

SOAPS = [name for name in DESCRIPTORS if not name.startswith("dscribe")]
BLOCK = 16  # environments that a thread does together: gpmlp/native/src/expansion.hpp
# sums of up to some hundred terms of order 1 in another order: 1e-16 or 1e-7 times about ten, and derivatives grow with l
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-5}


def seen(cutoff: float = CUTOFF, dtype: torch.dtype = torch.float64) -> Surroundings:
    batch = everything()
    whole = Surroundings.from_structures(batch, neighbors.find_neighbors(batch, cutoff))
    return Surroundings(whole.species, whole.centers, whole.neighbor_species, whole.vectors.to(dtype))


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def compare(made, surroundings: Surroundings) -> None:
    """Features, Jacobian, and one and several cotangents."""
    ours, reference = cpu.compiled_environments(made, surroundings), made.reference(surroundings)
    tolerance = {"rtol": 0, "atol": TOLERANCE[surroundings.vectors.dtype]}
    torch.testing.assert_close(ours.features, reference.features, **tolerance)
    torch.testing.assert_close(ours.jacobian(), reference.jacobian(), **tolerance)
    cotangents = random(3, *ours.features.shape, dtype=ours.features.dtype)
    tolerance["atol"] *= 10  # another sum, over hundreds of features
    torch.testing.assert_close(ours.pull_back(cotangents[0]), reference.pull_back(cotangents[0]), **tolerance)
    torch.testing.assert_close(ours.pull_back(cotangents), reference.pull_back(cotangents), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("name", SOAPS)
def test_as_the_reference(name, dtype):
    compare(descriptor(name), seen(dtype=dtype))


@pytest.mark.parametrize("n_max", [1, 5, 8])
def test_radial_functions_that_do_not_fill_lanes(n_max):
    """The last lanes of one species reach into the next, those of the last into what nobody reads."""
    compare(descriptor(SOAPS[0], n_max=n_max, l_max=2), seen())


def test_many_neighbours():
    surroundings = seen(cutoff=12.0)
    assert torch.bincount(surroundings.centers).max() > 200
    compare(descriptor(SOAPS[0], cutoff=12.0), surroundings)


@pytest.mark.parametrize("l_max", [0, 1, 3, 4])
def test_angular_momenta_that_do_not_fill_lanes(l_max):
    """Lanes behind the last l of one product of channels reach into the next, those of the last product into what nobody reads."""
    compare(descriptor(SOAPS[0], l_max=l_max), seen())


def test_environments_in_another_order_and_without_neighbours():
    surroundings = seen()
    some = surroundings.select([7, 0, 11, 3])
    vectors = some.vectors[some.centers > 1]
    parted = Surroundings(
        some.species, some.centers[some.centers > 1], some.neighbor_species[some.centers > 1], vectors
    )
    for name in (SOAPS[0], "four-body soap"):
        compare(descriptor(name), parted)
        compare(descriptor(name), surroundings.select([]))


@pytest.mark.parametrize("name", [SOAPS[0], "four-body soap"])
def test_threads_change_nothing(name):
    """More blocks than threads, each environment done by one: equal to the last bit."""
    surroundings = Surroundings.concatenate([seen()] * 8)
    made, before = descriptor(name), torch.get_num_threads()
    assert len(surroundings) > 3 * BLOCK
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            environments = cpu.compiled_environments(made, surroundings)
            pulled = environments.pull_back(environments.features.roll(1, 0))
            found.append((environments.features, environments.jacobian(), pulled))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)


def test_what_autograd_records_goes_the_plain_way():
    surroundings = seen().select([0, 3])
    recorded = Surroundings(
        surroundings.species, surroundings.centers, surroundings.neighbor_species, surroundings.vectors.requires_grad_()
    )
    made = descriptor(SOAPS[0])
    assert not fits_compiled_loops(recorded.vectors) and not fits_compiled_loops(recorded.vectors.detach().half())
    (slopes,) = torch.autograd.grad(made(recorded).features[0, 0], recorded.vectors)
    with torch.no_grad():
        assert fits_compiled_loops(recorded.vectors)
        jacobian = made(recorded).jacobian()
    torch.testing.assert_close(slopes[recorded.centers == 0], jacobian[recorded.centers == 0, :, 0])
