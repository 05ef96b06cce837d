"""Neighbors says who sees whom: pairs within a cutoff, their vectors, and the scatters pair gradient -> forces and virial."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import vesin
from torch import Tensor

from gpmlp.checks import UserError
from gpmlp.quantities import Prediction
from gpmlp.structures import Structures

CLOSEST = 0.3  # A; nearer pairs are taken for an error in the data


@dataclass(frozen=True, eq=False)
class Neighbors:
    """A full neighbour list (every pair in both directions), sorted by centre.

    Attributes:
        centers: (pairs,) atom index i.
        neighbors: (pairs,) atom index j.
        shifts: (pairs, 3) integer lattice shifts of atom j.
        cutoff: A.
    """

    centers: Tensor
    neighbors: Tensor
    shifts: Tensor
    cutoff: float

    def __len__(self) -> int:
        return self.centers.shape[0]

    def vectors(self, structures: Structures) -> Tensor:
        """(pairs, 3) r_ij = r_j + shift . cell - r_i, A; differentiable in positions and cells."""
        cells = structures.cells[structures.structure_of_atom[self.centers]]
        shift = torch.einsum("pa,pab->pb", self.shifts.to(cells.dtype), cells)
        return structures.positions[self.neighbors] + shift - structures.positions[self.centers]

    def within(self, structures: Structures, cutoff: float) -> Neighbors:
        """Return the pairs closer than a smaller cutoff."""
        keep = self.vectors(structures).norm(dim=1) < cutoff
        return Neighbors(self.centers[keep], self.neighbors[keep], self.shifts[keep], cutoff)


def find(structures: Structures, cutoff: float) -> Neighbors:
    """Find all pairs within the cutoff (vesin; cells smaller than the cutoff, triclinic and left-handed cells included).

    Raises:
        UserError: two atoms closer than 0.3 A, naming the structure and the atoms.
    """
    positions = structures.positions.detach().cpu().double().numpy()
    cells, periodic = structures.cells.detach().cpu().double().numpy(), structures.periodic.cpu().numpy()
    offsets = structures.offsets.tolist()
    search = vesin.NeighborList(cutoff=float(cutoff), full_list=True, sorted=True, n_threads=1)
    found: list[tuple[np.ndarray, ...]] = []
    for s in range(len(structures)):
        start, end = offsets[s], offsets[s + 1]
        box = np.where(periodic[s][:, None], cells[s], _padding(cells[s], periodic[s]))
        i, j, shift, distance = search.compute(positions[start:end], box, periodic[s], quantities="ijSd")
        if len(distance) and distance.min() < CLOSEST:
            k = int(distance.argmin())
            raise UserError(
                f"{structures.names[s]}: atoms {i[k]} and {j[k]} are {distance[k]:.3f} A apart (closer than {CLOSEST} A); "
                "check the positions, the cell and the unit (A) of this structure, or remove it."
            )
        found.append((i.astype(np.int64) + start, j.astype(np.int64) + start, shift))
    if found:
        centers, neighbors, shifts = (np.concatenate(part) for part in zip(*found, strict=True))
    else:
        centers, neighbors, shifts = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 3), np.int64)
    device = structures.positions.device
    return Neighbors(
        torch.as_tensor(centers, device=device),
        torch.as_tensor(neighbors, device=device),
        torch.as_tensor(shifts.astype(np.int64), device=device),
        float(cutoff),
    )


def _padding(cell: np.ndarray, periodic: np.ndarray) -> np.ndarray:
    """Lattice vectors for the axes that are not periodic: unit vectors normal to the periodic ones."""
    padding = np.zeros((3, 3))
    if periodic.all():
        return padding
    kept = cell[periodic]
    _, _, basis = np.linalg.svd(np.vstack([kept, np.zeros((1, 3))]))
    padding[~periodic] = basis[len(kept) :]
    return padding


def forces(neighbors: Neighbors, n_atoms: int, pair_gradients: Tensor) -> Tensor:
    """Scatter g_ij = dE/dr_ij to forces, F_i = sum_j (g_ij - g_ji).

    Args:
        pair_gradients: (pairs, 3, ...) eV/A; trailing axes are carried along.

    Returns:
        (atoms, 3, ...) eV/A.
    """
    out = pair_gradients.new_zeros(n_atoms, *pair_gradients.shape[1:])
    return out.index_add(0, neighbors.centers, pair_gradients).index_add(
        0, neighbors.neighbors, pair_gradients, alpha=-1
    )


def virials(structures: Structures, neighbors: Neighbors, vectors: Tensor, pair_gradients: Tensor) -> Tensor:
    """Scatter g_ij to dE/d(strain) = V sigma = sum_ij r_ij (x) g_ij, symmetrised.

    Args:
        vectors: (pairs, 3) r_ij, A.
        pair_gradients: (pairs, 3, ...) eV/A; trailing axes are carried along.

    Returns:
        (structures, 3, 3, ...) eV.
    """
    if len(structures) == 1:
        out = torch.einsum("pa,pb...->ab...", vectors, pair_gradients)[None]
    else:
        outer = torch.einsum("pa,pb...->pab...", vectors, pair_gradients)
        out = outer.new_zeros(len(structures), *outer.shape[1:])
        out = out.index_add(0, structures.structure_of_atom[neighbors.centers], outer)
    return 0.5 * (out + out.transpose(1, 2))


def prediction(
    structures: Structures, neighbors: Neighbors, vectors: Tensor, atom_energies: Tensor, pair_gradients: Tensor
) -> Prediction:
    """Assemble a Prediction from local energies (atoms,) and pair gradients (pairs, 3): the house's one derivative rule."""
    energies = atom_energies.new_zeros(len(structures)).index_add(0, structures.structure_of_atom, atom_energies)
    stresses = virials(structures, neighbors, vectors, pair_gradients) / structures.volumes[:, None, None]
    return Prediction(energies, atom_energies, forces(neighbors, structures.n_atoms, pair_gradients), stresses)
