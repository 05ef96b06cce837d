"""Body-order probe: which energies of an environment can be learned from a descriptor at all? Prints the table of docs/body_order.md.

The energies are toys without noise and labels are many, so what is left of the error is what cannot be told apart.
"""

from __future__ import annotations

import argparse
import json
import math

import torch
from torch import Tensor

from gpmlp.core import neighbors
from gpmlp.core.environments import Descriptor, Surroundings
from gpmlp.core.structures import Structures
from gpmlp.descriptors import learn_descriptor
from gpmlp.gp.kernels import PolynomialKernel

SOAP = {
    "name": "soap", "cutoff": 4.0, "n_max": 4, "l_max": 4, "sigma_atom": 0.4, "basis": "optimal", "cutoff_function": "smoothstep",
    "cutoff_width": 1.0, "cutoff_exponent": 2.0, "central_weight": 1.0, "shortest": 1.0, "radial_scaling": {"scale": 2.0, "exponent": 3.0},
}  # fmt: skip
DESCRIPTORS = {"nu 2": SOAP, "nu 2 and 3": SOAP | {"four_body": {"channels": 4, "l_max": 4, "weight": 0.3}}}
ZETAS = (1, 2, 4)
RIDGE = 1e-10  # of the prior variance
# azimuths of four neighbours on a cone, in eighths of a turn: angles between pairs are the same, triples of neighbours are not
DEGENERATE = (0, 1, 3, 4), (0, 1, 2, 5)


def environments(neighbors_of: Tensor, species: tuple[int, ...]) -> Structures:
    """One structure of each environment (n, neighbours, 3); `species`: of the centre and its neighbours."""
    n, k, _ = neighbors_of.shape
    positions = torch.cat([neighbors_of.new_zeros(n, 1, 3), neighbors_of], dim=1)
    owners = torch.arange(n).repeat_interleave(k + 1)
    none = torch.zeros(n, 3, dtype=torch.bool)
    return Structures(positions.flatten(0, 1), torch.zeros(n, 3, 3).double(), none, torch.tensor(species * n), owners)


def features(descriptor: Descriptor, structures: Structures) -> Tensor:
    """Of the centres."""
    centres = structures.offsets[:-1]
    pairs = neighbors.find_neighbors(structures, descriptor.cutoff)
    return descriptor(Surroundings.from_structures(structures, pairs).select(centres)).features


def degenerate(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Environments (2 n, 4, 3), each followed by one that no power spectrum tells from it, and their energies: Σ over triples of
    neighbours of the square of their triple product (a body order of four). After Pozdnyakov et al., PRL 125, 166001 (2020)."""
    radius, polar = (torch.rand(n, 1, generator=generator).double() for _ in range(2))
    radius, polar = 1.5 + 0.7 * radius, 0.7 + 0.6 * polar
    azimuths = torch.tensor(DEGENERATE).double() * math.pi / 4
    pair = [
        torch.stack([polar.sin() * a.cos(), polar.sin() * a.sin(), polar.cos().expand(-1, 4)], -1) * radius[..., None]
        for a in azimuths
    ]
    vectors = torch.stack(pair, dim=1).flatten(0, 1)
    turned = vectors @ torch.linalg.qr(torch.randn(2 * n, 3, 3, generator=generator).double())[0]
    units = torch.nn.functional.normalize(turned, dim=-1)
    triples = torch.combinations(torch.arange(4), 3)
    return turned, torch.linalg.det(units[:, triples]).square().sum(1)


def dihedral(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Environments (n, 3, 3) of an atom with three different neighbours in any directions, and cos of the dihedral angle between the
    first and the last, seen along the bond to the second."""
    units = torch.nn.functional.normalize(torch.randn(n, 3, 3, generator=generator).double(), dim=-1)
    first, axis, last = units.unbind(1)
    a, b = torch.linalg.cross(first, axis), torch.linalg.cross(last, axis)
    apart = (first - last).norm(dim=1) > 0.5
    usable = (a.norm(dim=1) > 0.5) & (b.norm(dim=1) > 0.5) & apart
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1)
    lengths = 1.2 + 0.6 * torch.rand(n, 3, 1, generator=generator).double()
    return (units * lengths)[usable], cosine[usable]


CASES = {"degenerate pairs": (degenerate, (6, 1, 1, 1, 1)), "dihedral angle": (dihedral, (6, 1, 8, 7))}


def unlearned(parameters: dict, case: str, zeta: int, n: int, seed: int = 0) -> float:
    """Root mean square error for environments that were not learned from, in standard deviations of the energies."""
    make, species = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    known, energies = make(n, generator)
    new, truth = make(n // 4, generator)
    known, new = environments(known, species), environments(new, species)
    descriptor = learn_descriptor(known.distinct_species, parameters, known, seed)
    x, y = features(descriptor, known), features(descriptor, new)
    kernel, mean = PolynomialKernel(zeta), energies.mean()
    covariance = kernel.value(x @ x.T)
    weights = torch.linalg.solve(covariance + RIDGE * torch.eye(len(x)).double(), energies - mean)
    errors = kernel.value(y @ x.T) @ weights + mean - truth
    return float(errors.square().mean().sqrt() / truth.std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environments", type=int, default=1500)
    parser.add_argument("--json", help="where to write the numbers, too")
    chosen, record = parser.parse_args(), {}
    print("| energy of an environment | " + " | ".join(f"{name}, ζ {z}" for name in DESCRIPTORS for z in ZETAS) + " |")
    print("|---" * (1 + len(DESCRIPTORS) * len(ZETAS)) + "|")
    for case in CASES:
        record[case] = {
            f"{name}, zeta {zeta}": unlearned(parameters, case, zeta, chosen.environments)
            for name, parameters in DESCRIPTORS.items()
            for zeta in ZETAS
        }
        print(f"| {case} | " + " | ".join(f"{error:.3f}" for error in record[case].values()) + " |", flush=True)
    if chosen.json:
        with open(chosen.json, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
