"""Radial distribution function of periodic structures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gpmlp.core import errors, neighbors
from gpmlp.core.errors import UserError
from gpmlp.core.structures import Structures

Pair = tuple[int, int] | None


def radial_distribution(
    structures: Structures, cutoff: float = 6.0, bins: int = 60, pair: Pair = None
) -> tuple[np.ndarray, np.ndarray]:
    """Radial distribution function, mean over structures; 1 in a gas of points (less 1/N, the atom that does not see itself).

    Args:
        cutoff: A. pair: atomic numbers (a, b); None: all atoms alike.

    Returns:
        (bins,) middles of the shells, A, and (bins,) g.

    Raises:
        UserError: see radial_distributions.
    """
    middles, found = radial_distributions(structures, [pair], cutoff, bins)
    return middles, found[0].mean(0)


def radial_distributions(
    structures: Structures, wanted: Sequence[Pair], cutoff: float = 6.0, bins: int = 60
) -> tuple[np.ndarray, np.ndarray]:
    """Radial distribution functions of several pairs of species in each structure.

    g_ab(r) = V n_ab(r) / (N_a N_b v(r)), n_ab the ordered pairs (all periodic images, however small the cell) in a shell of volume v.

    Args:
        wanted: pairs of atomic numbers; None: all atoms alike. cutoff: A.

    Returns:
        (bins,) middles of the shells, A, and (wanted, structures, bins) g.

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
    place = owner[i] * bins + (np.searchsorted(edges, distance, side="right") - 1).clip(0, bins - 1)
    out = np.empty((len(wanted), len(structures), bins))
    for here, pair in zip(out, wanted, strict=True):
        first = np.ones(len(species), bool) if pair is None else species == pair[0]
        second = first if pair is None else species == pair[1]
        n = np.bincount(owner[first], minlength=len(structures)) * np.bincount(owner[second], minlength=len(structures))
        if (n == 0).any():
            named = "-".join(errors.chemical_symbol(z) for z in pair) if pair else "any"
            raise UserError(
                f"radial distribution (rdf): {structures.names[int((n == 0).argmax())]} has no pair {named}."
            )
        counts = np.bincount(place[first[i] & second[j]], minlength=out[0].size).reshape(-1, bins)
        here[:] = counts * (volumes / n)[:, None] / shells
    return (edges[1:] + edges[:-1]) / 2, out
