"""Compression of the neighbour density: principal channels of species × radial functions for each l, in place of all of them.

They are learned from training environments, and are constants from then on (docs/decisions/024).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpmlp.core import neighbors
from gpmlp.core.environments import Surroundings
from gpmlp.core.errors import UserError
from gpmlp.core.stored_tensors import StoredTensors
from gpmlp.core.structures import Structures
from gpmlp.descriptors.spherical_harmonics import degree_slices

SAMPLE = 300  # environments of each species that constants of a descriptor are learned from
ORTHONORMAL = 1e-6  # of products of channels in a file


@dataclass(frozen=True, eq=False)
class Compression:
    """y_qlm = Σ_k P⁽ˡ⁾_kq c_klm: a density on Q channels of each l, k over species and radial functions.

    Radial functions of all species mixed: Darby, Kermode, Csanyi, npj Comput. Mater. 8, 166 (2022); principal components by l: Goscinski,
    Musil, Pozdnyakov, Nigam, Ceriotti, J. Chem. Phys. 155, 104106 (2021).

    Attributes:
        channels: (l_max + 1, channels of the density, Q) P, orthonormal columns.
    """

    channels: Tensor

    @staticmethod
    def from_stored(stored: StoredTensors, n_degrees: int, n_channels: int, kept: int) -> Compression:
        """That of a model file; UserError if it does not fit the descriptor and the recipe."""
        channels = stored.take("compression", (n_degrees, n_channels, kept))
        check_orthonormal("compression", channels)
        return Compression(channels)

    @property
    def kept(self) -> int:
        """Q."""
        return self.channels.shape[2]

    def __call__(self, density: Tensor) -> Tensor:
        """y (environments, Q, (l_max + 1)²) of densities (environments, channels, (l_max + 1)²)."""
        of_l = zip(self.channels.to(density), degree_slices(len(self.channels) - 1), strict=True)
        return torch.cat([p.T @ density[:, :, m] for p, m in of_l], dim=2)

    def pull_back(self, on_y: Tensor) -> Tensor:
        """∂E/∂c (environments, channels, (l_max + 1)²) from ∂E/∂y."""
        of_l = zip(self.channels.to(on_y), degree_slices(len(self.channels) - 1), strict=True)
        return torch.cat([p @ on_y[:, :, m] for p, m in of_l], dim=2)

    def of_pairs(self, radial: Tensor, slots: Tensor) -> Tensor:
        """Radial functions (pairs, Q, l_max + 1) from those of the neighbour's own species (pairs, n_max, l_max + 1)."""
        by_species = self.channels.to(radial).unflatten(1, (-1, radial.shape[1]))
        return torch.einsum("pnl,lpnq->pql", radial, by_species[:, slots])


def principal_channels(density: Tensor, slopes: Tensor, n: int) -> Tensor:
    """(l_max + 1, channels, n) orthonormal: eigenvectors of the largest eigenvalues of the second moments of a density and of its slopes.

    Both count alike, and so does each species of neighbours, however rare. Of densities alone the central atom and what all environments
    have in common would take the first places, which forces do not feel.

    Args:
        density: (environments, channels, (l_max + 1)²) c.
        slopes: (l_max + 1, species, n_max, n_max) second moments of ∂c/∂r over neighbours of each species.
    """
    out = []
    for m, of_slopes in zip(degree_slices(len(slopes) - 1), slopes, strict=True):
        c = density[:, :, m]
        of_density = _by_species(torch.einsum("nkm,njm->kj", c, c), len(of_slopes))
        out.append(leading_eigenvectors(of_density + _by_species(torch.block_diag(*of_slopes), len(of_slopes)), n))
    return torch.stack(out)


def _by_species(moment: Tensor, n_species: int) -> Tensor:
    """Second moments (channels, channels) divided so that those of each species sum up to 1, or to 0 where nothing is there."""
    sums = moment.diagonal().unflatten(0, (n_species, -1)).sum(1, keepdim=True)
    scale = torch.where(sums > 0, sums, 1.0).rsqrt().expand(-1, len(moment) // n_species).flatten()
    return scale[:, None] * moment * scale


def leading_eigenvectors(moment: Tensor, n: int) -> Tensor:
    """n eigenvectors of the largest eigenvalues as columns, each with its largest element positive."""
    vectors = torch.linalg.eigh(moment)[1].flip(1)[:, :n]
    return vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()


def check_orthonormal(name: str, channels: Tensor) -> None:
    """Raise UserError unless the columns of these matrices are."""
    products = channels.mT @ channels
    if not bool(((products - torch.eye(channels.shape[-1]).to(products)).abs() < ORTHONORMAL).all()):
        raise UserError(f"the channels of {name} are not orthonormal.")


def sample_environments(structures: Structures, species: tuple[int, ...], cutoff: float, seed: int) -> Surroundings:
    """At most SAMPLE environments of each species, of structures in random order."""
    order = torch.randperm(len(structures), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(len(structures), len(species), dtype=torch.long)
    owners = structures.structure_of_atom.cpu()
    slots = torch.searchsorted(torch.tensor(species), structures.species.cpu())
    counts.index_put_((owners, slots), torch.ones(1, dtype=torch.long), accumulate=True)
    before = counts[order].cumsum(0) - counts[order]
    wanted = ((before < SAMPLE) & (counts[order] > 0)).any(1)
    some = structures.select(order[wanted]).to(dtype=torch.float64)
    surroundings = Surroundings.from_structures(some, neighbors.find_neighbors(some, cutoff))
    shuffled = torch.randperm(len(surroundings), generator=torch.Generator().manual_seed(seed))
    of_shuffled = surroundings.species.cpu()[shuffled]
    picks = [shuffled[(of_shuffled == z).nonzero()[:SAMPLE, 0]] for z in species]
    return surroundings.select(torch.cat(picks).sort().values)
