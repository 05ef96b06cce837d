"""Radial distribution function of periodic structures."""

from __future__ import annotations

import math

import numpy as np

from gpmlp.core import errors, neighbors
from gpmlp.core.errors import UserError
from gpmlp.core.structures import Structures


def radial_distribution(
    structures: Structures, cutoff: float = 6.0, bins: int = 60, pair: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Radial distribution function, mean over structures; 1 in a gas of points (less 1/N, the atom that does not see itself).

    g_ab(r) = V n_ab(r) / (N_a N_b v(r)), n_ab the ordered pairs (all periodic images, however small the cell) in a shell of volume v.

    Args:
        cutoff: A. pair: atomic numbers (a, b); None: all atoms alike.

    Returns:
        (bins,) middles of the shells, A, and (bins,) g.

    Raises:
        UserError: a structure without a volume, or without atoms of a species asked for.
    """
    errors.check_positive("cutoff", cutoff)
    errors.check_positive("bins", bins)
    volumes = structures.volumes.cpu().numpy()
    if np.isnan(volumes).any():
        which = structures.names[int(np.isnan(volumes).argmax())]
        raise UserError(
            f"radial distribution (rdf): {which} has no volume, so no density to compare with; take the energy instead."
        )
    edges = np.linspace(0.0, cutoff, bins + 1)
    shells = 4 * math.pi / 3 * np.diff(edges**3)
    pairs = neighbors.find_neighbors(structures, cutoff)
    species, owner = structures.species.cpu().numpy(), structures.structure_of_atom.cpu().numpy()
    i, j = pairs.centers.cpu().numpy(), pairs.neighbors.cpu().numpy()
    distance = pairs.vectors(structures).detach().norm(dim=1).cpu().numpy()
    first = np.ones(len(species), bool) if pair is None else species == pair[0]
    second = np.ones(len(species), bool) if pair is None else species == pair[1]
    n = np.bincount(owner[first], minlength=len(structures)) * np.bincount(owner[second], minlength=len(structures))
    if (n == 0).any():
        wanted = "-".join(errors.chemical_symbol(z) for z in pair) if pair else "any"
        raise UserError(f"radial distribution (rdf): {structures.names[int((n == 0).argmax())]} has no pair {wanted}.")
    chosen = first[i] & second[j]
    weight = (volumes / n)[owner[i[chosen]]]
    counts, _ = np.histogram(distance[chosen], edges, weights=weight)
    return (edges[1:] + edges[:-1]) / 2, counts / (shells * len(structures))
