"""Lengths: whether the distances between atoms are those of matter in Å, or positions are fractional, or in Bohr or nm."""

from __future__ import annotations

import torch
from ase.data import covalent_radii
from ase.units import Bohr
from torch import Tensor

from gpmlp.core.findings import Finding
from gpmlp.core.neighbors import find_neighbors
from gpmlp.core.structures import Structures

MOST = 64  # structures that are looked at, evenly over all
# Distances to the nearest atom over the sum of covalent radii (Cordero et al., Dalton Trans. 2832 (2008)): molecules, metals and salts
# have .9 to 1.25, noble gases 1.8
CLOSE, FAR = 0.4, 1.5
LIKELY = (0.75, 1.35)
NOBLE_GASES = (2, 10, 18, 36, 54, 86)


def check_lengths(structures: Structures) -> list[Finding]:
    """A warning where half of the atoms are far too close to the nearest one, or far too far. No two atoms may coincide."""
    step = max(1, len(structures) // MOST)
    some = structures.select(list(range(0, len(structures), step)))
    ratios = _nearest(some)
    if not len(ratios):
        return []
    typical = float(ratios.median())
    if CLOSE <= typical <= FAR:
        return []
    units = {"in Bohr": 1 / Bohr, "in nm": 0.1}
    likely = [name for name, x in units.items() if LIKELY[0] < typical / x < LIKELY[1]]
    if typical < CLOSE and _look_fractional(some):
        likely = ["fractional coordinates", *likely]
    text = (
        f"the nearest atom is at {typical:.3g} of the sum of the covalent radii, as half of the atoms have it, where 0.9 to 1.3 is usual: "
        f"positions are {'probably ' + ' or '.join(likely) if likely else 'in another unit, or atoms are meant to be so'}."
    )
    numbers = {"nearest_over_covalent": typical}
    return [Finding("lengths-in-another-unit", "warning", text, (), numbers, "Positions and cells are needed in A.")]


def _nearest(structures: Structures) -> Tensor:
    """Of each atom that has another one within reach, the distance to the nearest one over the sum of their covalent radii; not of noble
    gases, nor of two atoms alone, which curves of their energy are made of."""
    structures = structures.select(((structures.counts > 2) | structures.periodic.any(1)).nonzero().flatten().tolist())
    radii = torch.from_numpy(covalent_radii)
    species = structures.species
    noble = torch.isin(species, torch.tensor(NOBLE_GASES))
    if noble.all():  # or nothing is left
        return radii[:0]
    reach = LIKELY[1] / Bohr * 2 * float(radii[species[~noble]].max())
    pairs = find_neighbors(structures, reach)
    i, j = pairs.centers, pairs.neighbors
    ratio = pairs.vectors(structures).norm(dim=1).double() / (radii[species[i]] + radii[species[j]])
    nearest = torch.full((structures.n_atoms,), torch.inf, dtype=torch.float64).scatter_reduce(0, i, ratio, "amin")
    return nearest[nearest.isfinite() & ~noble]


def _look_fractional(structures: Structures) -> bool:
    """Whether positions are between 0 and 1, in cells that are larger."""
    inside = bool(((structures.positions > -0.5) & (structures.positions < 1.5)).all())
    return inside and bool((structures.volumes.nan_to_num() > 8).all())
