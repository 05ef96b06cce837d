"""A potential's mean in the compiled core against PyTorch's, over descriptors, kernels, baselines and environments."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from systems import (
    BASELINES,
    DESCRIPTORS,
    KERNELS,
    SPECIES,
    cluster,
    descriptor,
    everything,
    low_rank_term,
    random_term,
)

from gpmlp.core import neighbors
from gpmlp.core.environments import SinglePrecisionDescriptor
from gpmlp.core.structures import Structures
from gpmlp.descriptors.backends import FourBodySoap, SoapPowerSpectrum
from gpmlp.descriptors.compression import sample_environments
from gpmlp.descriptors.four_body import learn_four_body
from gpmlp.descriptors.radial import NeighborWeights
from gpmlp.native import library
from gpmlp.potential import chunked
from gpmlp.potential.compiled import compile_mean

pytestmark = pytest.mark.skipif(library.compiled() is None, reason="gpmlp was built without a compiler")
SOAPS = [name for name in DESCRIPTORS if not name.startswith("dscribe")]


def compare(terms, structures: Structures, baselines=(), margin: float = 0.4, energy=1e-10, force=1e-9) -> None:
    """With pairs beyond all cutoffs among those given, as a Verlet list has them."""
    reach = max(t.cutoff for t in (*(term.descriptor for term in terms), *baselines)) + margin
    pairs = neighbors.find_neighbors(structures, reach)
    compiled = compile_mean(terms, baselines, sorted(SPECIES))
    assert compiled is not None
    given = terms, structures, pairs.of_centers
    ours = chunked.predict_mean(*given, baselines=baselines, compiled=compiled)
    reference = chunked.predict_mean(*given, baselines=baselines)
    isolated = reference.atom_energies.abs().max() * 1e-15  # the rounding of thousands of eV
    torch.testing.assert_close(ours.atom_energies, reference.atom_energies, rtol=0, atol=energy + float(isolated))
    torch.testing.assert_close(ours.forces, reference.forces, rtol=0, atol=force)
    torch.testing.assert_close(ours.stresses, reference.stresses, rtol=0, atol=force, equal_nan=True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", SOAPS)
def test_every_descriptor_and_kernel(name, kernel):
    compare([random_term(descriptor(name), KERNELS[kernel])], everything())


@pytest.mark.parametrize("kernel", ["polynomial 2", "polynomial 4", "exponential", "sum"])
@pytest.mark.parametrize("rank", [1, 7, 20])
def test_low_ranks(rank, kernel):
    term = low_rank_term(descriptor(SOAPS[0]), rank, kernel)
    compare([term], everything(), [made() for made in BASELINES.values()])


@pytest.mark.parametrize("kernel", ["polynomial 2", "polynomial 4"])
def test_several_descriptors_and_all_baselines(kernel):
    terms = [random_term(descriptor(name), KERNELS[kernel], seed=k) for k, name in enumerate(SOAPS[:2])]
    compare(terms, everything(), [made() for made in BASELINES.values()])


def test_a_term_that_holds_nothing_of_a_species():
    term = random_term(descriptor(SOAPS[0]), KERNELS["polynomial 4"])
    del term.blocks[SPECIES[1]]
    compare([term], everything(), [made() for made in BASELINES.values()])


@pytest.mark.parametrize("kernel", ["polynomial 2", "polynomial 4"])
@pytest.mark.parametrize("name", [SOAPS[0], "four-body soap"])
def test_single_precision(name, kernel):
    """The reference removes the slope along the features, which may be large, in single precision, the core in double."""
    single = SinglePrecisionDescriptor(descriptor(name))
    compare([random_term(single, KERNELS[kernel])], everything(), energy=1e-5, force=1e-4)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    n_max=st.integers(1, 9),
    l_max=st.integers(0, 7),
    cutoff=st.floats(2.0, 5.0),
    zeta=st.sampled_from([k for k in KERNELS if k.startswith("polynomial")]),
    function=st.sampled_from(["smoothstep", "poly"]),
    exponent=st.sampled_from([0.0, 4.0, 2.5]),
    species=st.lists(st.sampled_from(SPECIES), min_size=1, max_size=25),
    channels=st.integers(0, 6),
    kept=st.integers(0, 40),
    seed=st.integers(0, 99),
)
def test_any_environments(n_max, l_max, cutoff, zeta, function, exponent, species, channels, kept, seed):
    """Single atoms, without neighbours, among them; with four-body invariants of so many channels, and densities
    compressed to so many, if there are any."""
    weights = NeighborWeights(cutoff, function, width=0.8, cutoff_exponent=2.5, exponent=exponent)
    made = SoapPowerSpectrum(tuple(sorted(SPECIES)), cutoff, n_max, l_max, 0.5, weights)
    structures = Structures.concatenate([cluster(tuple(species), seed), cluster(SPECIES[:1], seed + 1)])
    sample = sample_environments(structures, made.species, cutoff, seed)
    if kept:
        made = made.compressed(min(kept, made.channels), sample)
    if channels and l_max > 1:
        asked = {"channels": min(channels, made.channels), "l_max": min(l_max, 5), "weight": 0.5}
        made = FourBodySoap(made, learn_four_body(made, asked, sample))
    compare([random_term(made, KERNELS[zeta])], structures)


@pytest.mark.parametrize("kernel", ["polynomial 2", "polynomial 4"])
@pytest.mark.parametrize("name", [SOAPS[0], "four-body soap"])
def test_threads_and_company_change_no_bit(name, kernel):
    """Neither the number of threads, nor which structures are predicted together, what else is asked for, or pairs that are too far."""
    term, batch = random_term(descriptor(name), KERNELS[kernel]), Structures.concatenate([everything()] * 6)
    compiled, before = compile_mean([term], [], sorted(SPECIES)), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            near_all = neighbors.find_neighbors(batch, term.descriptor.cutoff)
            found.append(chunked.predict_mean([term], batch, near_all.of_centers, compiled=compiled))
    finally:
        torch.set_num_threads(before)
    alone = everything()
    near = neighbors.find_neighbors(alone, term.descriptor.cutoff)
    found.append(chunked.predict_mean([term], alone, near.of_centers, compiled=compiled))
    far = neighbors.find_neighbors(batch, term.descriptor.cutoff + 0.5)
    assert len(far) > len(near_all)
    found.append(chunked.predict_mean([term], batch, far.of_centers, compiled=compiled))
    for other in found[1:]:
        for name in ("atom_energies", "forces", "energies", "stresses"):
            whole, part = getattr(found[0], name), getattr(other, name)
            torch.testing.assert_close(whole[: len(part)], part, rtol=0, atol=0, equal_nan=True)


def test_copies_and_other_processes_compile_again(potential, small_set):
    """A potential that was used is sent without its addresses, which mean nothing elsewhere."""
    structures, _ = small_set
    before = potential(structures).forces
    assert potential.compiled_mean is not None and "compiled_mean" in vars(potential)
    for again in (pickle.loads(pickle.dumps(potential)), copy.deepcopy(potential)):
        assert "compiled_mean" not in vars(again)
        assert torch.equal(again(structures).forces, before)
    with pytest.raises(TypeError, match="is of its process"):
        pickle.dumps(potential.compiled_mean)
