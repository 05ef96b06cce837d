"""Power spectra on CPUs: the numbers of soap.py by compiled loops over environments (_cpu_kernels.py), shared by threads."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gpmlp.core import parallel
from gpmlp.core.environments import Environments, Surroundings
from gpmlp.descriptors.radial import CUTOFF_FUNCTIONS
from gpmlp.descriptors.soap import PowerSpectrum
from gpmlp.descriptors.spherical_harmonics import recurrence_coefficients

if TYPE_CHECKING:
    from gpmlp.descriptors._cpu_kernels import BasisTables, SortedPairs

BLOCK = 16  # environments whose Jacobian is worth handing to another thread
SHARED = 128  # environments that are worth handing to another thread
FEW = 8  # environments whose Jacobian stays in cache while many cotangents are pulled back


def compiled_environments(descriptor: PowerSpectrum, surroundings: Surroundings) -> Environments:
    """Features of all surroundings; derivatives when asked for."""
    from gpmlp.descriptors import _cpu_kernels

    vectors, l_max = surroundings.vectors.detach().contiguous(), descriptor.l_max
    basis = _basis(descriptor, vectors.dtype)
    pairs = _pairs(descriptor, surroundings, vectors, basis)
    n, row = len(surroundings), _cpu_kernels.row_length(descriptor.n_max, basis.n_species)
    density = np.empty((n, (l_max + 1) ** 2, row), basis.table.dtype)
    features, norms = vectors.new_empty(n, descriptor.n_features), vectors.new_empty(n)
    buffers = density.reshape(-1), features.numpy(), norms.numpy()
    tiny = basis.table.dtype.type(torch.finfo(vectors.dtype).tiny)
    starts = pairs.starts[:: basis.n_species].tolist()

    threads = parallel.available_threads()
    together = max(SHARED, -(-n // (4 * threads))) if threads > 1 else max(1, n)
    _in_blocks(0, n, lambda lo, hi: _cpu_kernels.expand_features(lo, hi, pairs, basis, tiny, row, *buffers), together)

    def jacobian(start: int = 0, end: int = n, out: Tensor | None = None) -> Tensor:
        """Of environments start to end, in the first rows of `out` if it is given."""
        n_pairs = starts[end] - starts[start]
        out = vectors.new_empty(n_pairs, 3, descriptor.n_features) if out is None else out[:n_pairs]
        array = out.numpy()

        def block(lo: int, hi: int) -> None:
            here = array[starts[lo] - starts[start] :]
            _cpu_kernels.feature_jacobian(lo, hi, starts[lo], pairs, basis, row, *buffers, here)

        _in_blocks(start, end, block, BLOCK)
        return out

    def pull_back(cotangents: Tensor) -> Tensor:
        cotangents = cotangents.detach()
        if cotangents.dim() == 3:
            return _pull_back_many(jacobian, starts, cotangents)
        out = torch.empty_like(vectors)
        given, array = cotangents.contiguous().numpy(), out.numpy()

        _in_blocks(
            0, n, lambda lo, hi: _cpu_kernels.pull_back(lo, hi, pairs, basis, row, *buffers, given, array), together
        )
        return out

    return Environments(surroundings, features, pull_back, jacobian)


def _pull_back_many(jacobian: Callable[[int, int, Tensor], Tensor], starts: list[int], cotangents: Tensor) -> Tensor:
    """(k, pairs, 3) from (k, environments, features): a product with the Jacobian of each environment. Samples are last in memory."""
    k, n, n_features = cotangents.shape
    out = cotangents.new_empty(3 * starts[-1], k)
    edges = [*range(0, n, FEW), n]
    most = max((starts[hi] - starts[lo] for lo, hi in pairwise(edges)), default=0)
    buffer = cotangents.new_empty(most, 3, n_features)
    for lo, hi in pairwise(edges):
        rows = jacobian(lo, hi, buffer).flatten(0, 1)
        for e in range(lo, hi):
            here = slice(3 * (starts[e] - starts[lo]), 3 * (starts[e + 1] - starts[lo]))
            torch.mm(rows[here], cotangents[:, e].T, out=out[3 * starts[e] : 3 * starts[e + 1]])
    return out.unflatten(0, (-1, 3)).movedim(2, 0)


def _in_blocks(start: int, end: int, work: Callable[[int, int], None], size: int) -> None:
    """Do work(lo, hi) for blocks of start to end, in as many threads as PyTorch may use."""
    parallel.map_pieces(lambda lo: work(lo, min(end, lo + size)), range(start, end, size))


def _pairs(descriptor: PowerSpectrum, surroundings: Surroundings, vectors: Tensor, basis: BasisTables) -> SortedPairs:
    w, table = descriptor.weights, descriptor.radial_integrals
    from gpmlp.descriptors._cpu_kernels import CutoffParameters, lay_out

    cut = CutoffParameters(
        CUTOFF_FUNCTIONS.index(w.function), w.cutoff, w.width, w.cutoff_exponent, w.scale, float(w.exponent)
    )
    species = surroundings.neighbor_species, surroundings.species
    given = vectors, surroundings.centers, *species, descriptor.slot_table
    arrays = (part.contiguous().numpy() for part in given)
    pairs, complete = lay_out(*arrays, cut, 1 / table.step, len(table.coefficients))
    if not complete:
        descriptor.species_slots(torch.cat(species))  # which says what is wrong
    return pairs


@lru_cache(maxsize=32)
def _basis(descriptor: PowerSpectrum, dtype: torch.dtype) -> BasisTables:
    """Equal descriptors share one."""
    from gpmlp.descriptors._cpu_kernels import BasisTables
    from gpmlp.descriptors._simd import LANES

    integrals, like = descriptor.radial_integrals, torch.zeros(0, dtype=dtype)
    of, n_max, l_max = like.numpy().dtype.type, descriptor.n_max, descriptor.l_max
    table = integrals.coefficients.to(dtype).unflatten(2, (n_max, l_max + 1)).mT
    return BasisTables(
        torch.nn.functional.pad(table, (0, -n_max % LANES)).flatten().numpy(),
        of(1 / integrals.step),
        of(0),
        of(1),
        descriptor.prefactors(like).numpy(),
        descriptor.center_density(like).numpy(),
        recurrence_coefficients(l_max).astype(of).reshape(-1),
        n_max,
        l_max,
        len(descriptor.species),
    )
