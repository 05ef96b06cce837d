"""Baselines: energy terms that are added, not learned: isolated atoms and short-range nuclear repulsion (ZBL)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gpmlp.core import errors, units
from gpmlp.core.neighbors import Neighbors
from gpmlp.core.quantities import Targets, is_isolated_atom
from gpmlp.core.structures import Structures, chunk_ranges
from gpmlp.descriptors.networks import InvariantNetwork, find_network
from gpmlp.potential.baseline import Baseline, LocalBaseline
from gpmlp.potential.calculator_energies import CalculatorEnergies
from gpmlp.potential.dispersion import D3Dispersion, R6Tail

NETWORK_ATOMS = 64  # of structures in one graph of a network, unless one has more
RANK = 1e-9  # of the largest singular value of compositions: below, a direction is open
LEAST_OPEN = 1.0  # eV, by which the energy of an element may be off where total energies are about zero


@dataclass(frozen=True)
class IsolatedAtoms(LocalBaseline):
    """E = Σ_i e(Z_i).

    Attributes:
        energies: eV, by atomic number.
        open_directions: what the compositions of the data leave open: e may be off by Σ_k x_k d_k with x_k standard normal, each d_k eV
            by atomic number. Energies of compositions like those of the data are the same along all of them.
    """

    energies: dict[int, float]
    open_directions: tuple[dict[int, float], ...] = ()
    cutoff = 0.0

    def of_atoms(
        self, structures: Structures, pairs: Neighbors, start: int, end: int
    ) -> tuple[Tensor, Neighbors, Tensor]:
        species, local = structures.species[start:end], structures.positions.new_zeros(end - start)
        for z in structures.distinct_species:
            if z not in self.energies:
                raise errors.UserError(
                    f"No isolated-atom energy for atomic number {z}; known: {sorted(self.energies)}."
                )
            local.masked_fill_(species == z, self.energies[z])
        return local, Neighbors.empty(structures), local.new_zeros(0, 3)

    def energy_deviations(self, structures: Structures) -> Tensor:
        """(structures, directions) Σ_i d_k(Z_i), eV: how far total energies move along each open direction."""
        species = structures.distinct_species
        table = [[direction.get(z, 0.0) for direction in self.open_directions] for z in species]
        like = structures.positions
        return structures.composition(species).to(like) @ like.new_tensor(table).reshape(len(species), -1)

    def state(self) -> dict:
        directions = [{str(z): d for z, d in direction.items()} for direction in self.open_directions]
        more = {"open_directions": directions} if directions else {}
        return {"name": "isolated_atoms", "energies": {str(z): e for z, e in self.energies.items()}} | more

    @staticmethod
    def from_frames(structures: Structures, targets: Targets) -> dict[int, float]:
        """Energies of the one-atom frames labelled config_type=isolated_atom, by atomic number."""
        energies: dict[int, float] = {}
        for i, label in enumerate(targets.config_types):
            if is_isolated_atom(label) and structures.counts[i] == 1:
                energy = float(targets.energies[i])
                if energy == energy:
                    energies[int(structures.species[structures.offsets[i]])] = energy
        return energies

    @staticmethod
    def least_squares(structures: Structures, targets: Targets) -> dict[int, float]:
        """Energies that fit the total energies best; of all that fit equally well, the smallest."""
        species = structures.distinct_species
        given = ~torch.isnan(targets.energies)
        if not given.any():
            return dict.fromkeys(species, 0.0)
        counts, energies = structures.composition(species)[given], targets.energies[given]
        weights = 1 / counts.sum(1)  # per atom, as the noise is
        left, right = (counts * weights[:, None]).cpu().double(), (energies * weights).cpu().double()
        solution = torch.linalg.lstsq(left, right[:, None], driver="gelsd").solution[:, 0]
        return dict(zip(species, solution.tolist(), strict=True))


def open_directions(structures: Structures, targets: Targets) -> tuple[dict[int, float], ...]:
    """The directions in which compositions with a known energy leave energies of elements open, as long as those may be off.

    Conditional on the energies A e of the compositions A (frames, elements), e ~ N(., S²) has the covariance N (Nᵀ S⁻² N)⁻¹ Nᵀ, N spanning
    the null space of A. The prior S is as large as an energy of an element may be: an equal share of the total energies, as that of
    valence electrons, or a share that grows as Z^(7/3), as that of all electrons (Thomas-Fermi; Lieb, Rev. Mod. Phys. 53, 603 (1981)).
    """
    species = structures.distinct_species
    known = ~torch.isnan(targets.energies)
    if not known.any():
        return ()
    counts, energies = structures.composition(species)[known].cpu().double(), targets.energies[known].cpu().double()
    _, values, axes = torch.linalg.svd(counts.unique(dim=0), full_matrices=True)
    null = axes[int((values > RANK * values[0]).sum()) :].T
    if not null.shape[1]:
        return ()
    electrons = torch.tensor(species, dtype=torch.float64) ** (7 / 3)
    shares = torch.stack([(1 / counts.sum(1))[:, None].expand_as(counts), electrons / (counts @ electrons)[:, None]])
    prior = (shares.amax(0) * energies[:, None]).square().mean(0).sqrt().clamp_min(LEAST_OPEN)
    lower = torch.linalg.cholesky(null.T @ (null / prior[:, None] ** 2))
    directions = torch.linalg.solve_triangular(lower, null.T, upper=False)
    return tuple(dict(zip(species, d, strict=True)) for d in directions.tolist())


# universal screening function: Ziegler, Biersack, Littmark, The Stopping and Range of Ions in Matter (1985)
_ZBL_AMPLITUDES = (0.18175, 0.50986, 0.28022, 0.02817)
_ZBL_EXPONENTS = (3.19980, 0.94229, 0.40290, 0.20162)


@dataclass(frozen=True)
class ZBL(LocalBaseline):
    """E = 1/2 sum_ij S(r) Z_i Z_j k_e / r phi(r / a), a = 0.46850 A / (Z_i^0.23 + Z_j^0.23).

    S falls from 1 at `inner` to 0 at `outer` by the quintic smoothstep (C2), so that it vanishes beyond `outer`.

    Attributes:
        inner, outer: A, by pair of atomic numbers (Z_i <= Z_j).
    """

    inner: dict[tuple[int, int], float]
    outer: dict[tuple[int, int], float]

    def __post_init__(self) -> None:
        for pair, outer in self.outer.items():
            if not 0 <= self.inner[pair] < outer:
                raise errors.UserError(f"ZBL of pair {pair}: inner {self.inner[pair]} A must be below outer {outer} A.")

    @property
    def cutoff(self) -> float:
        return max(self.outer.values())

    def of_atoms(
        self, structures: Structures, pairs: Neighbors, start: int, end: int
    ) -> tuple[Tensor, Neighbors, Tensor]:
        near, local = pairs.within(structures, self.cutoff), structures.positions.new_zeros(end - start)
        vectors = near.vectors(structures)
        if not len(near):
            return local, near, vectors
        z_i, z_j = structures.species[near.centers], structures.species[near.neighbors]
        inner, outer = self._by_pair(z_i, z_j, vectors)
        r = vectors.norm(dim=1)
        energy, slope = self.of_pair(r, z_i.to(r), z_j.to(r), inner, outer)
        return local.index_add(0, near.centers - start, 0.5 * energy), near, 0.5 * slope[:, None] * vectors / r[:, None]

    def _by_pair(self, z_i: Tensor, z_j: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        size = max(max(pair) for pair in self.outer) + 1
        table = like.new_zeros(2, size, size)
        for (a, b), outer in self.outer.items():
            for k, value in enumerate((self.inner[a, b], outer)):
                table[k, a, b] = table[k, b, a] = value
        return table[0, z_i, z_j], table[1, z_i, z_j]

    @staticmethod
    def of_pair(r: Tensor, z_i: Tensor, z_j: Tensor, inner: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
        """Energy of a pair and its derivative with respect to r, elementwise."""
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


@dataclass(frozen=True)
class NetworkEnergies(LocalBaseline):
    """The energy of a network (descriptors/networks.py), so that what is learned is the difference to it; derivatives by autograd.

    Attributes:
        name, checkpoint, sha256: as in networks.find_network.
    """

    name: str
    checkpoint: str
    sha256: str
    whole_structures = True

    @cached_property
    def network(self) -> InvariantNetwork:
        """UserError if it has no energies, or as find_network."""
        network = find_network(self.name, self.checkpoint, self.sha256).network
        if not hasattr(network, "atom_energies"):
            raise errors.UserError(f"The network {self.checkpoint!r} has no `atom_energies`: it cannot be a baseline.")
        return network

    def __getstate__(self) -> dict:
        """What other processes get: not the network, which they find by its name."""
        return {key: value for key, value in vars(self).items() if key != "network"}

    @property
    def cutoff(self) -> float:
        return self.network.cutoff

    def of_atoms(
        self, structures: Structures, pairs: Neighbors, start: int, end: int
    ) -> tuple[Tensor, Neighbors, Tensor]:
        """As in Baseline; dE/dr_ij of a pair counts what messages along it do to all atoms."""
        unknown = set(structures.distinct_species) - set(self.network.species or structures.distinct_species)
        if unknown:
            symbols = ", ".join(map(errors.chemical_symbol, sorted(unknown)))
            raise errors.UserError(f"The network {self.checkpoint!r} does not know {symbols}.")
        near, first = pairs.within(structures, self.cutoff), 0
        local, slopes = [], []
        counts = structures.structure_of_atom[start:end].unique_consecutive(return_counts=True)[1].tolist()
        for a, b in chunk_ranges(counts, NETWORK_ATOMS):
            last = first + sum(counts[a:b])
            energies, gradients = self._of_graph(
                structures, near.of_centers(start + first, start + last), start + first, last - first
            )
            local.append(energies)
            slopes.append(gradients)
            first = last
        none = structures.positions.new_zeros(0)
        return torch.cat([none, *local]), near, torch.cat([none.new_zeros(0, 3), *slopes])

    def _of_graph(self, structures: Structures, near: Neighbors, first: int, n: int) -> tuple[Tensor, Tensor]:
        """Energies of so many atoms and derivatives with respect to the vectors of their pairs."""
        like = near.vectors(structures)
        with torch.inference_mode(False), torch.enable_grad():
            vectors = like.detach().double().clone().requires_grad_()
            species = structures.species[first : first + n].clone()
            energies = self.network.atom_energies(species, near.centers - first, near.neighbors - first, vectors)
            if not energies.requires_grad:  # no pairs
                return energies.to(like), torch.zeros_like(like)
            (gradients,) = torch.autograd.grad(energies.sum(), vectors)
        return energies.detach().to(like), gradients.to(like)

    def state(self) -> dict:
        """The name and the SHA-256 of the weights."""
        return {"name": "network", "network": self.name, "checkpoint": self.checkpoint, "sha256": self.sha256}


def baseline_from_state(state: dict) -> Baseline:
    """Build a baseline again from its state()."""
    if state["name"] == "isolated_atoms":
        directions = ({int(z): float(d) for z, d in one.items()} for one in state.get("open_directions", ()))
        return IsolatedAtoms({int(z): float(e) for z, e in state["energies"].items()}, tuple(directions))
    if state["name"] == "zbl":
        return ZBL(
            {(a, b): inner for a, b, inner, _ in state["pairs"]}, {(a, b): outer for a, b, _, outer in state["pairs"]}
        )
    if state["name"] == "network":
        made = NetworkEnergies(state["network"], state["checkpoint"], state["sha256"])
        made.network  # noqa: B018  is there, or says why not
        return made
    if state["name"] in ("r6", "d3"):
        return (R6Tail if state["name"] == "r6" else D3Dispersion).from_state(state)
    if state["name"] == "calculator":
        return CalculatorEnergies.from_state(state)
    raise errors.UserError(f"Unknown baseline '{state['name']}'.")
