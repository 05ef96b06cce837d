"""Power spectra on CPUs: the numbers of soap.py and four_body.py by the compiled core (gpmlp/native/src/expansion.hpp), shared by
threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gpmlp.core import parallel
from gpmlp.core.environments import Environments, Surroundings
from gpmlp.descriptors.four_body import FourBodyInvariants, FourBodySpectrum
from gpmlp.descriptors.radial import CUTOFF_FUNCTIONS
from gpmlp.descriptors.soap import PowerSpectrum
from gpmlp.descriptors.spherical_harmonics import recurrence_coefficients
from gpmlp.native import library

FEW = 8  # environments whose Jacobian stays in cache while many cotangents are pulled back


Spectrum = PowerSpectrum | FourBodySpectrum


def compiled_environments(descriptor: Spectrum, surroundings: Surroundings) -> Environments:
    """Features of all surroundings; derivatives when asked for."""
    vectors = surroundings.vectors.detach().contiguous()
    given = tuple(
        part.contiguous() for part in (surroundings.species, surroundings.centers, surroundings.neighbor_species)
    )
    n, features = len(surroundings), vectors.new_empty(len(surroundings), descriptor.n_features)
    spectrum = compiled_spectrum(descriptor, vectors.dtype)
    address = library.call("expand", spectrum, n, len(vectors), *given, vectors, features, parallel.available_threads())
    if not address:
        spectrum_of(descriptor).species_slots(torch.cat([given[0], given[2]]))  # which says what is wrong
    expansion = library.Handle(address, spectrum, features)
    starts = torch.searchsorted(given[1], torch.arange(n + 1)).tolist()

    def jacobian(start: int = 0, end: int = n, out: Tensor | None = None) -> Tensor:
        """Of environments start to end, in the first rows of `out` if it is given."""
        n_pairs = starts[end] - starts[start]
        out = vectors.new_empty(n_pairs, 3, descriptor.n_features) if out is None else out[:n_pairs]
        library.call("jacobian", expansion, start, end, out, parallel.available_threads())
        return out

    def pull_back(cotangents: Tensor) -> Tensor:
        cotangents = cotangents.detach()
        if cotangents.dim() == 3:
            return _pull_back_many(jacobian, starts, cotangents)
        out = torch.empty_like(vectors)
        library.call("pull_back", expansion, cotangents.contiguous(), out, parallel.available_threads())
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


@lru_cache(maxsize=32)
def compiled_spectrum(descriptor: Spectrum, dtype: torch.dtype) -> library.Handle:
    """A descriptor as the core holds it; equal descriptors share one."""
    return build_spectrum(descriptor, dtype, library.build)


def spectrum_of(descriptor: Spectrum) -> PowerSpectrum:
    """The power spectrum alone."""
    return descriptor.spectrum if isinstance(descriptor, FourBodySpectrum) else descriptor


def build_spectrum(descriptor: Spectrum, dtype: torch.dtype, build: Any) -> Any:
    """The core's form of a descriptor, by calls of `build`: library.build, or one that writes them down."""
    spectrum = spectrum_of(descriptor)
    made = build("spectrum", *_spectrum_arguments(replace(spectrum, compression=None), dtype))
    if spectrum.compression is not None:
        channels = spectrum.compression.channels.to(dtype=dtype, device="cpu").contiguous()
        build("compress", made, channels.shape[2], channels, spectrum.prefactors(channels))
    if isinstance(descriptor, FourBodySpectrum):
        build("add_four_body", made, *_four_body_arguments(descriptor.four_body, dtype))
    return made


def _four_body_arguments(four_body: FourBodyInvariants, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Sizes and tables, as gpmlp_add_four_body takes them."""
    all_of, entries = four_body.couplings, [c.tensor.nonzero() for c in four_body.couplings]
    values = torch.cat([c.tensor[tuple(places.T)] for c, places in zip(all_of, entries, strict=True)])
    starts = torch.tensor([0, *(len(places) for places in entries)]).cumsum(0)
    l_max, density_channels, n_channels = four_body.channels.shape
    sizes = torch.tensor([l_max, n_channels, density_channels, len(four_body.lengths), len(all_of), len(values)])
    degrees = torch.tensor([c.degrees for c in all_of], dtype=torch.int64)
    factors = torch.cat([c.factors for c in all_of])
    places = torch.cat(entries)
    numbers = (
        t.to(dtype=dtype, device="cpu").contiguous() for t in (values, factors, four_body.channels, four_body.scales)
    )
    return sizes, degrees, starts, places.contiguous(), *numbers


def _spectrum_arguments(descriptor: PowerSpectrum, dtype: torch.dtype) -> tuple[Any, ...]:
    """Sizes and tables of a descriptor, as gpmlp_spectrum takes them."""
    integrals, like, w = descriptor.radial_integrals, torch.zeros(0, dtype=dtype), descriptor.weights
    n_max, l_max, slots = descriptor.n_max, descriptor.l_max, descriptor.slot_table
    table = integrals.coefficients.to(dtype).unflatten(2, (n_max, l_max + 1)).mT.contiguous()
    sizes = torch.tensor([n_max, l_max, len(descriptor.species), len(table), len(slots)])
    recurrence = torch.from_numpy(recurrence_coefficients(l_max)).to(dtype)
    return (
        sizes, slots, table, descriptor.prefactors(like), descriptor.center_density(like), recurrence,
        1 / integrals.step, CUTOFF_FUNCTIONS.index(w.function), w.cutoff, w.width, w.cutoff_exponent, w.scale, w.exponent,
    )  # fmt: skip
