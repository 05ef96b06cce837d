"""A small message-passing network with random weights: what the tests plug in where a pretrained one would stand."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gpmlp.descriptors.networks import register_network

WIDTH, RADIAL = 6, 5


class ToyNetwork(torch.nn.Module):
    """Three layers: messages h_j ⊗ R(r_ij) and their vectors along r_ij, whose lengths the next layer sees."""

    def __init__(self, cutoff: float = 3.6, seed: int = 0, layers: int = 3, energies: bool = True) -> None:
        super().__init__()
        self.cutoff, self.widths, self.species = cutoff, (WIDTH,) * layers, None
        generator = torch.Generator().manual_seed(seed)

        def weights(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5)

        self.embedding = weights(100, WIDTH)
        self.radial = torch.nn.ParameterList(weights(RADIAL, WIDTH) for _ in range(layers))
        self.mixing = torch.nn.ParameterList(weights(WIDTH, WIDTH) for _ in range(layers))
        if energies:
            self.readout = weights(WIDTH)
            self.atom_energies = self._atom_energies

    def layers(self, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Iterator[Tensor]:
        h, r = self.embedding[species], vectors.norm(dim=1, keepdim=True)
        basis = torch.sin(torch.arange(1, RADIAL + 1) * torch.pi * r / self.cutoff) / r
        basis = basis * (1 - (r / self.cutoff) ** 2).clamp_min(0) ** 3
        none = torch.zeros_like(h)
        for radial, mixing in zip(self.radial, self.mixing, strict=True):
            message = (basis @ radial) * h[neighbors]
            scalar = none.index_add(0, centers, message)
            along = (message[:, :, None] * (vectors / r)[:, None]).flatten(1)
            vector = none.repeat(1, 3).index_add(0, centers, along).unflatten(1, (WIDTH, 3))
            h = torch.tanh(h @ mixing + scalar + vector.square().sum(2))
            yield h

    def _atom_energies(self, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Tensor:
        *_, last = self.layers(species, centers, neighbors, vectors)
        return last @ self.readout


TOY = ToyNetwork()
SHA256 = register_network("toy", TOY)
