"""How do I put features of a network of my own under the Gaussian process?

Registers a small message-passing network, whose weights are random here, and fits ethanol with SOAP alone and with the network beside it.
"""

from pathlib import Path

import torch

import gpmlp

DATA = Path(__file__).resolve().parents[1] / "data/ethanol"


class TwoLayers(torch.nn.Module):
    cutoff, widths, species = 4.0, (16, 16), None

    def __init__(self) -> None:
        super().__init__()
        sizes = {"elements": (100, 16), "radial": (8, 16), "mixing": (16, 16)}
        random = torch.Generator().manual_seed(0)
        for name, size in sizes.items():
            weights = torch.randn(*size, generator=random, dtype=torch.float64) / 4
            self.register_parameter(name, torch.nn.Parameter(weights))

    def layers(self, species, centers, neighbors, vectors):
        h, r = self.elements[species], vectors.norm(dim=1, keepdim=True) / self.cutoff
        filters = (torch.sin(torch.arange(1, 9) * torch.pi * r) * (1 - r**2) ** 3) @ self.radial
        for _ in self.widths:
            h = torch.tanh(h @ self.mixing).index_add(0, centers, filters * h[neighbors])
            yield h


gpmlp.register_network("two layers", TwoLayers())
beside = [{"name": "soap"}, {"name": "network", "checkpoint": "two layers", "weight": 0.1}]
train, test = gpmlp.read(DATA / "train.xyz", "::12"), gpmlp.read(DATA / "test.xyz", "::4")
for name, descriptor in {"SOAP": {"name": "soap"}, "SOAP and network": beside}.items():
    recipe = gpmlp.Recipe(descriptor=descriptor, inducing={"functionals": "all"}, variance=False)
    potential, _ = gpmlp.fit(*train, recipe)
    print(f"{name}: force error {gpmlp.evaluate(potential, *test).overall.force_mae_meV_per_A:.1f} meV/A")
