"""Baselines are energy terms that are added, not learned: isolated atoms and short-range nuclear repulsion (ZBL)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gpmlp import checks, neighbors, units
from gpmlp.neighbors import Neighbors
from gpmlp.quantities import Prediction, Targets
from gpmlp.structures import Structures


class Baseline(Protocol):
    """A term of the energy with its forces and stress."""

    def __call__(self, structures: Structures, pairs: Neighbors | None = None) -> Prediction:
        """`pairs`: neighbours within `cutoff` or more, if they are known."""
        ...

    @property
    def cutoff(self) -> float:
        """Distance within which atoms feel each other, A."""
        ...

    def state(self) -> dict: ...


@dataclass(frozen=True)
class IsolatedAtoms:
    """E = sum_i e(Z_i); energies in eV by atomic number."""

    energies: dict[int, float]
    cutoff = 0.0

    def __call__(self, structures: Structures, pairs: Neighbors | None = None) -> Prediction:
        like = structures.positions
        local = torch.zeros(structures.n_atoms, dtype=like.dtype, device=like.device)
        for z in structures.distinct_species:
            if z not in self.energies:
                raise checks.UserError(
                    f"No isolated-atom energy for atomic number {z}; known: {sorted(self.energies)}."
                )
            local.masked_fill_(structures.species == z, self.energies[z])
        return _without_forces(structures, local)

    def state(self) -> dict:
        return {"name": "isolated_atoms", "energies": {str(z): e for z, e in self.energies.items()}}

    @staticmethod
    def from_frames(structures: Structures, targets: Targets) -> dict[int, float]:
        """Energies of the one-atom frames labelled config_type=isolated_atom, by atomic number."""
        found: dict[int, float] = {}
        for i, label in enumerate(targets.config_types):
            if is_isolated_atom(label) and structures.counts[i] == 1:
                energy = float(targets.energies[i])
                if energy == energy:
                    found[int(structures.species[structures.offsets[i]])] = energy
        return found

    @staticmethod
    def least_squares(structures: Structures, targets: Targets) -> dict[int, float]:
        """Energies that fit the total energies best; of all that fit equally well, the smallest."""
        species = structures.distinct_species
        known = ~torch.isnan(targets.energies)
        if not known.any():
            return dict.fromkeys(species, 0.0)
        counts, energies = structures.composition(species)[known], targets.energies[known]
        weights = 1 / counts.sum(1)  # per atom, as the noise is
        left, right = (counts * weights[:, None]).cpu().double(), (energies * weights).cpu().double()
        solution = torch.linalg.lstsq(left, right[:, None], driver="gelsd").solution[:, 0]
        return dict(zip(species, solution.tolist(), strict=True))


def is_isolated_atom(config_type: str) -> bool:
    """Whether a config_type says so: isolated_atom, IsolatedAtom, ..."""
    return config_type.lower().replace("_", "") == "isolatedatom"


def _without_forces(structures: Structures, local: Tensor) -> Prediction:
    """Of local energies that do not depend on positions."""
    nothing = structures.cells.new_zeros(structures.cells.shape)
    return neighbors.collected(structures, local, torch.zeros_like(structures.positions), nothing)


# universal screening function: Ziegler, Biersack, Littmark, The Stopping and Range of Ions in Matter (1985)
_ZBL_AMPLITUDES = (0.18175, 0.50986, 0.28022, 0.02817)
_ZBL_EXPONENTS = (3.19980, 0.94229, 0.40290, 0.20162)


@dataclass(frozen=True)
class ZBL:
    """E = 1/2 sum_ij S(r) Z_i Z_j k_e / r phi(r / a), a = 0.46850 A / (Z_i^0.23 + Z_j^0.23).

    S falls from 1 at `inner` to 0 at `outer` by the quintic smoothstep (C2), so that no pair beyond `outer` feels it.

    Attributes:
        inner, outer: A, by pair of atomic numbers (Z_i <= Z_j).
    """

    inner: dict[tuple[int, int], float]
    outer: dict[tuple[int, int], float]

    def __post_init__(self) -> None:
        for pair, outer in self.outer.items():
            if not 0 <= self.inner[pair] < outer:
                raise checks.UserError(f"ZBL of pair {pair}: inner {self.inner[pair]} A must be below outer {outer} A.")

    @property
    def cutoff(self) -> float:
        return max(self.outer.values())

    def __call__(self, structures: Structures, pairs: Neighbors | None = None) -> Prediction:
        pairs = neighbors.find(structures, self.cutoff) if pairs is None else pairs.within(structures, self.cutoff)
        if not len(pairs):
            return _without_forces(structures, structures.positions.new_zeros(structures.n_atoms))
        vectors = pairs.vectors(structures)
        z_i, z_j = structures.species[pairs.centers], structures.species[pairs.neighbors]
        inner, outer = self._by_pair(z_i, z_j, vectors)
        r = vectors.norm(dim=1)
        energy, slope = self.of_pair(r, z_i.to(r), z_j.to(r), inner, outer)
        local = r.new_zeros(structures.n_atoms).index_add(0, pairs.centers, 0.5 * energy)
        gradients = 0.5 * slope[:, None] * vectors / r[:, None]
        return neighbors.prediction(structures, pairs, vectors, local, gradients)

    def _by_pair(self, z_i: Tensor, z_j: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        size = max(max(pair) for pair in self.outer) + 1
        table = like.new_zeros(2, size, size)
        for (a, b), outer in self.outer.items():
            for k, value in enumerate((self.inner[a, b], outer)):
                table[k, a, b] = table[k, b, a] = value
        return table[0, z_i, z_j], table[1, z_i, z_j]

    @staticmethod
    def of_pair(r: Tensor, z_i: Tensor, z_j: Tensor, inner: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
        """Energy of a pair and its derivative with respect to r."""
        length = 0.46850 / (z_i**0.23 + z_j**0.23)
        coulomb = units.COULOMB * z_i * z_j / r
        terms = [(a * torch.exp(-b * r / length), b) for a, b in zip(_ZBL_AMPLITUDES, _ZBL_EXPONENTS, strict=True)]
        phi = sum(t for t, _ in terms)
        d_phi = -sum(t * b for t, b in terms) / length
        x = ((r - inner) / (outer - inner).clamp_min(1e-6)).clamp(0, 1)
        x = torch.where(r < outer, x, torch.ones_like(x))
        switch = 1 - x**3 * (10 - 15 * x + 6 * x**2)
        d_switch = -30 * x**2 * (1 - x) ** 2 / (outer - inner).clamp_min(1e-6)
        energy = coulomb * phi
        d_energy = coulomb * (d_phi - phi / r)
        return energy * switch, d_energy * switch + energy * d_switch

    def state(self) -> dict:
        return {
            "name": "zbl",
            "pairs": [[a, b, self.inner[a, b], self.outer[a, b]] for a, b in sorted(self.outer)],
        }


def make(state: dict) -> Baseline:
    """Build a baseline again from its state()."""
    if state["name"] == "isolated_atoms":
        return IsolatedAtoms({int(z): float(e) for z, e in state["energies"].items()})
    if state["name"] == "zbl":
        return ZBL(
            {(a, b): inner for a, b, inner, _ in state["pairs"]}, {(a, b): outer for a, b, _, outer in state["pairs"]}
        )
    raise checks.UserError(f"Unknown baseline '{state['name']}'.")
