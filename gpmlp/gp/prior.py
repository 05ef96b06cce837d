"""Prior covariances K_ff of energies, forces and stresses with themselves: what the kernel alone allows, before any data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gpmlp.core.environments import StructureEnvironments, strain_derivatives
from gpmlp.core.padded_neighbors import padded_places
from gpmlp.core.quantities import KINDS
from gpmlp.core.structures import Structures
from gpmlp.gp.covariances import ENVIRONMENTS
from gpmlp.gp.kernels import ZonalKernel

CHUNK_ATOMS = 128  # whose force covariances are made together
KEPT_ATOMS = 16  # the same where Jacobians need not be made: what stays in cache
CHUNK_ROWS = 512  # environments of one structure that meet all others at a time
JOINT_BYTES = 1 << 26  # of the slopes of environments that meet all others together


@dataclass(frozen=True, eq=False)
class PriorCovariance:
    """The Gaussian process before data, for one descriptor: k(x, x') = δ_z² f(x.x') for equal central species z, else 0.

    Attributes:
        signal: δ_z, standard deviation of local energies by Z, eV.
    """

    kernel: ZonalKernel
    signal: dict[int, float]

    def atom_energies(self, species: Tensor, like: Tensor) -> Tensor:
        """(atoms,) variance of local energies, δ_z² f(1), eV^2, in the type of `like`."""
        return self._scales(species, like).square()

    def energies(self, structures: Structures, features: Tensor) -> Tensor:
        """(structures,) variance of total energies, Σ_ij δ_i δ_j f(x_i.x_j) over atoms of equal species, eV^2."""
        out = features.new_zeros(len(structures))
        for s, z, members in _species_members(structures):
            x = features[members]
            for part in torch.arange(len(members), device=x.device).split(CHUNK_ROWS):
                out[s] += self.signal[z] ** 2 * self.kernel.profile(x[part] @ x.T)[0].sum()
        return out

    def stresses(self, structures: Structures, environments: StructureEnvironments) -> Tensor:
        """(structures, 6, 6) covariance of stress components in Voigt order, (eV/A^3)^2; NaN where there is no volume.

        V^2 cov(σ_k, σ_l) = Σ_ij δ_i δ_j [f'(s_ij) w_ik.w_jl + f''(s_ij) (w_ik.x_j)(x_i.w_jl)], w_ik = dx_i/d(strain k).
        """
        environments.keep_jacobian()
        volumes = structures.volumes
        out = volumes.new_full((len(structures), 6, 6), float("nan"))
        for s, z, members in _species_members(structures):
            if volumes[s].isnan():
                continue
            out[s].nan_to_num_(0.0)
            x, w = _strained_features(environments, members)
            for chunk in torch.arange(len(members), device=x.device).split(CHUNK_ROWS):
                _, first, second = self.kernel.profile(x[chunk] @ x.T)
                w_x = torch.einsum("ikf,jf->kij", w[chunk], x)
                x_w = torch.einsum("if,jkf->kij", x[chunk], w)
                part = torch.einsum("ikf,ijlf->kl", w[chunk], (first @ w.flatten(1)).unflatten(1, w.shape[1:])[:, None])
                part = part + torch.einsum("kij,lij->kl", w_x * second, x_w)
                out[s] += self.signal[z] ** 2 * part / volumes[s] ** 2
        return out

    def forces(self, structures: Structures, environments: StructureEnvironments, atoms: Tensor) -> Tensor:
        """(len(atoms), 3, 3) covariance of the force components of each of the given atoms, (eV/A)^2.

        cov(F_ia, F_ib) = Σ_ee' δ_e δ_e' [f'(s_ee') v_ea.v_e'b + f''(s_ee') (v_ea.x_e')(x_e.v_e'b)], v_e = dx_e/dr_i, over the
        environments e, e' of equal species that atom i is part of: its own and its neighbours'.
        """
        out = structures.positions.new_zeros(len(atoms), 3, 3)
        size = KEPT_ATOMS if environments.keep_jacobian(len(atoms)) else CHUNK_ATOMS
        for part in near_together(structures, atoms).split(size):
            x, v, weight = self._around_atoms(structures, environments, atoms[part])
            n, width = x.shape[:2]
            _, first, second = self.kernel.profile(x @ x.transpose(1, 2))
            v_x = (v.flatten(1, 2) @ x.transpose(1, 2)).unflatten(1, (width, 3))  # v_ea . x_e'
            # Σ_ee' f' v_ea.v_e'b
            summed = ((weight * first) @ v.flatten(2)).unflatten(2, (3, -1))
            through_first = (v.flatten(0, 1) @ summed.flatten(0, 1).mT).unflatten(0, (n, width)).sum(1)
            # Σ_ee' f'' (v_ea.x_e')(x_e.v_e'b)
            out[part] = through_first + torch.einsum("neaf,nef,nfbe->nab", v_x, weight * second, v_x)
        return out

    def _around_atoms(
        self, structures: Structures, environments: StructureEnvironments, atoms: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The environments that each atom is part of, in a table padded with others of no weight.

        Returns:
            x_e (atoms, width, features), v_e = dx_e/dr_i (atoms, width, 3, features), and δ_e δ_e' (atoms, width, width), zero where
            species differ.
        """
        neighbors, n, n_atoms = environments.neighbors, len(atoms), structures.n_atoms
        local = torch.full((n_atoms,), -1, dtype=torch.long, device=atoms.device)
        local[atoms] = torch.arange(n, device=atoms.device)
        hit = (local[neighbors.neighbors] >= 0).nonzero()[:, 0]
        # one key for each (atom, environment that it is part of), the images of an atom together
        center_slots = local[atoms] * n_atoms + atoms
        others = local[neighbors.neighbors[hit]] * n_atoms + neighbors.centers[hit]
        keys = torch.unique(torch.cat([others, center_slots]))
        owner, environment = keys // n_atoms, keys % n_atoms
        place, width = padded_places(owner, n)
        if len(hit) and environments.keep_jacobian(n) and len(keys) == len(others) + len(center_slots):
            # no environment holds two images of an atom: rows of the Jacobian as they are
            which, rows = place.new_zeros(n * width), place.new_zeros(n * width)
            which[place], rows[place[torch.searchsorted(keys, others)]] = environment, hit
            assert environments.jacobian is not None
            v = environments.jacobian[rows]
            v[place[torch.searchsorted(keys, center_slots)]] = environments.center_jacobian[atoms]
            x = environments.environments.features[which]
        else:
            some_x, some_v = _position_derivatives(environments, local, keys)
            x, v = some_x.new_zeros(n * width, some_x.shape[1]), some_v.new_zeros(n * width, 3, some_x.shape[1])
            x[place], v[place] = some_x, some_v
        scale, species = x.new_zeros(n * width), place.new_zeros(n * width)
        species[place] = structures.species[environment]
        scale[place] = self._scales(structures.species[environment], x)
        scale, species = scale.unflatten(0, (n, width)), species.unflatten(0, (n, width))
        weight = scale[:, :, None] * scale[:, None, :] * (species[:, :, None] == species[:, None, :])
        return x.unflatten(0, (n, width)), v.unflatten(0, (n, width)), weight

    def joint(
        self,
        structures: Structures,
        environments: StructureEnvironments,
        kinds: Sequence[str] = KINDS,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Covariances of all energies, forces and stresses of a few structures, or of sums of them, each with each.

        Each is g = Σ_e c_e ε(x_e) + v_e.∇ε(x_e) over environments e, so that

            cov(g, g') = Σ_ee' δ_e δ_e' [f c_e c'_e' + f' (c_e v'_e'.x_e + c'_e' v_e.x_e' + v_e.v'_e') + f'' (v_e.x_e')(v'_e'.x_e)]

        over those of equal species.

        Args:
            kinds: of KINDS, which are wanted.
            weights: (sums, entries) of sums of entries; each entry for itself if None.

        Returns:
            (entries, entries): energies (structures), force components (3 atoms), stress components (6 structures, Voigt; zero where
            there is no volume), of `kinds`; or (sums, sums).
        """
        entries = KindEntries.of(structures, kinds)
        if entries.derivatives:
            environments.keep_jacobian()
        size = entries.n if weights is None else len(weights)
        out = structures.positions.new_zeros(size, size)
        for z in structures.distinct_species:
            members = (structures.species == z).nonzero()[:, 0]
            together = max(1, min(ENVIRONMENTS, JOINT_BYTES // (8 * size * environments.descriptor.n_features)))
            parts = [entries.part(structures, environments, m, weights) for m in members.split(together)]
            for one in parts:
                out += self.signal[z] ** 2 * self._with_all(one, parts, size)
        return out

    def _with_all(self, one: _LinearPart, parts: Sequence[_LinearPart], size: int) -> Tensor:
        """(size, size) what some environments add to the joint covariance with all of their species, unit signal variance."""
        out = one.features.new_zeros(size, size)
        slopes = one.features.new_zeros(size, *one.slopes.shape[1:])  # Σ_e' f' v'_e'
        for other in parts:
            value, first, second = self.kernel.profile(one.features @ other.features.T)
            if not other.slopes.shape[2]:
                _add_block(out, one, other, one.values @ (value @ other.values.T))
                continue
            to_other = one.slopes @ other.features.T  # v_e.x_e', (sums, e, e')
            to_one = (other.slopes @ one.features.T).transpose(1, 2)
            values = other.values[:, None]
            block = one.values @ (values * value + to_one * first).sum(2).T
            block += to_other.flatten(1) @ (values * first + to_one * second).flatten(1).T
            _add_block(out, one, other, block)
            slopes[other.sums] += first @ other.slopes
        out[one.sums] += one.slopes.flatten(1) @ slopes.flatten(1).T
        return out

    def _scales(self, species: Tensor, like: Tensor) -> Tensor:
        """δ of each environment."""
        out = torch.zeros(len(species), dtype=like.dtype, device=like.device)
        for z, value in self.signal.items():
            out[species == z] = value
        return out


def near_together(structures: Structures, atoms: Tensor) -> Tensor:
    """An order of the atoms in which consecutive ones are near each other: neighbours' Jacobians are then made few times."""
    if len(atoms) <= CHUNK_ATOMS:
        return torch.arange(len(atoms), device=atoms.device)
    box = (structures.positions[atoms] / 6.0).floor().long()
    box = box - box.amin(0)
    sides = box.amax(0) + 1
    key = (structures.structure_of_atom[atoms] * sides[0] + box[:, 0]) * sides[1] + box[:, 1]
    return torch.argsort(key * sides[2] + box[:, 2], stable=True)


def _species_members(structures: Structures) -> Iterator[tuple[int, int, Tensor]]:
    """(structure, Z, its atoms of that species), every combination that occurs."""
    offsets = structures.offsets.tolist()
    for s in range(len(structures)):
        atoms = torch.arange(offsets[s], offsets[s + 1], device=structures.species.device)
        for z in torch.unique(structures.species[atoms]).tolist():
            yield s, z, atoms[structures.species[atoms] == z]


def _strained_features(environments: StructureEnvironments, members: Tensor) -> tuple[Tensor, Tensor]:
    """Features (members, features) and their derivatives with respect to the six strains (members, 6, features)."""
    features, slopes = [], []
    for centers in members.split(ENVIRONMENTS):
        part = environments.select(centers)
        features.append(part.features)
        pairs = part.surroundings
        if len(pairs.centers):
            slopes.append(strain_derivatives(part.jacobian(), pairs.centers, pairs.vectors, len(centers)))
        else:
            slopes.append(part.features.new_zeros(len(centers), 6, part.features.shape[1]))
    return torch.cat(features), torch.cat(slopes)


def _position_derivatives(environments: StructureEnvironments, local: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """x_e and v_e = dx_e/dr_i of the (atom i, environment e) pairs in `keys` (local index of i times atoms plus e), sorted."""
    n_atoms, width = len(local), environments.descriptor.n_features
    like = environments.surroundings.vectors
    features, gradients = like.new_zeros(len(keys), width), like.new_zeros(len(keys), 3, width)
    for centers in torch.unique(keys % n_atoms).split(ENVIRONMENTS):
        within, pairs = environments.surroundings.pairs_of(centers)
        part = environments.select(centers)
        jacobian = part.jacobian()
        center, neighbor = centers[within], environments.neighbors.neighbors[pairs]
        # x_e changes when a neighbour moves, oppositely when e does
        for atom, sign in ((neighbor, 1.0), (center, -1.0)):
            wanted = local[atom] >= 0
            place = torch.searchsorted(keys, local[atom[wanted]] * n_atoms + center[wanted])
            gradients.index_add_(0, place, jacobian[wanted], alpha=sign)
        mine = torch.isin(keys % n_atoms, centers)
        features[mine] = part.features[torch.searchsorted(centers, keys[mine] % n_atoms)]
    return features, gradients


class _LinearPart(NamedTuple):
    """What some environments of one species add to sums of energies, forces and stresses.

    Attributes:
        features: (environments, features).
        sums: which of the sums they add to, each once; values: (sums, environments) c_e; slopes: (sums, environments, features) v_e,
            none (sums, environments, 0) where nothing is differentiated.
    """

    features: Tensor
    sums: Tensor
    values: Tensor
    slopes: Tensor


@dataclass(frozen=True, eq=False)
class KindEntries:
    """Energies, force components and stress components (Voigt) of structures, of some kinds, in this order.

    Attributes:
        place: of each entry of all kinds and one more, that of empty slots, among those wanted; their number where it is not.
        n: how many are wanted. derivatives: whether forces or stresses are among them.
    """

    place: Tensor
    n: int
    derivatives: bool

    @staticmethod
    def of(structures: Structures, kinds: Sequence[str]) -> KindEntries:
        """Of structures."""
        sizes = dict(zip(KINDS, (len(structures), 3 * structures.n_atoms, 6 * len(structures)), strict=True))
        wanted = torch.cat([torch.full((n,), kind in kinds) for kind, n in sizes.items()] + [torch.zeros(1) > 0])
        n = int(wanted.sum())
        place = torch.full((len(wanted),), n)
        place[wanted] = torch.arange(n)
        return KindEntries(place.to(structures.species.device), n, set(kinds) != {"energies"})

    def part(
        self, structures: Structures, environments: StructureEnvironments, centers: Tensor, weights: Tensor | None
    ) -> _LinearPart:
        """Of some environments; weights as in PriorCovariance.joint."""
        owner = self.place[structures.structure_of_atom[centers]]
        if self.derivatives:
            x, rows, places = _derivative_rows(structures, environments, centers)
            places = self.place[places]
        else:
            x = environments.environments.features[centers]
            rows, places = x.new_zeros(len(x), 0, 0), owner.new_zeros(len(x), 0)
        each = torch.arange(len(x), device=x.device)
        if weights is not None:
            padded = torch.cat([weights.to(x), x.new_zeros(len(weights), 1)], dim=1)
            slopes = torch.einsum("ger,erd->ged", padded[:, places], rows)
            return _LinearPart(x, torch.arange(len(weights), device=x.device), padded[:, owner], slopes)
        sums, index = torch.cat([owner[:, None], places], dim=1).unique(return_inverse=True)
        values = x.new_zeros(len(sums), len(x))
        values[index[:, 0], each] = 1.0
        slopes = x.new_zeros(len(sums) * len(x), rows.shape[2])
        slopes.index_add_(0, (index[:, 1:] * len(x) + each[:, None]).flatten(), rows.flatten(0, 1))
        kept = sums < self.n
        return _LinearPart(x, sums[kept], values[kept], slopes.view(len(sums), len(x), -1)[kept])


def _derivative_rows(
    structures: Structures, environments: StructureEnvironments, centers: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of environments; rows of derivatives; and the entry of the joint covariance that each row adds to.

    The rows of an environment are 3 for every neighbour slot, 3 for the centre, 6 for the virial. F_i = Σ_j (g_ij - g_ji), so with
    the centre's rows minus the sum of its neighbours' all of them enter forces with a minus sign.
    """
    n, atoms, part = len(structures), structures.n_atoms, environments.select(centers)
    local, pairs = environments.surroundings.pairs_of(centers)
    n_env, n_features = part.features.shape
    if not len(pairs):
        return part.features, part.features.new_zeros(n_env, 0, n_features), centers.new_zeros(n_env, 0)
    jacobian = part.jacobian()
    place, n_slots = padded_places(local, n_env)
    rows = jacobian.new_zeros(n_env, 3 * n_slots + 9, n_features)
    slots = rows[:, : 3 * n_slots].unflatten(1, (n_slots, 3))
    slots[local, place % n_slots] = jacobian
    rows[:, 3 * n_slots : 3 * n_slots + 3].index_add_(0, local, jacobian, alpha=-1)
    rows[:, 3 * n_slots + 3 :] = strain_derivatives(jacobian, local, part.surroundings.vectors, n_env)
    rows.neg_()  # F = -dE/dr
    owner = structures.structure_of_atom[centers]
    rows[:, -6:] *= -torch.nan_to_num(1 / structures.volumes)[owner, None, None]
    atom = centers.new_full((n_env, n_slots + 1), -1)
    atom[local, place % n_slots] = environments.neighbors.neighbors[pairs]
    atom[:, n_slots] = centers
    xyz = torch.arange(3, device=atom.device)
    empty = n + 3 * atoms + 6 * n
    forces = torch.where(atom[..., None] >= 0, n + 3 * atom[..., None] + xyz, empty).flatten(1)
    virial = n + 3 * atoms + 6 * owner[:, None] + torch.arange(6, device=atom.device)
    return part.features, rows, torch.cat([forces, virial], dim=1)


def _add_block(out: Tensor, one: _LinearPart, other: _LinearPart, block: Tensor) -> None:
    """Add the covariances of the sums of two parts."""
    out[one.sums[:, None], other.sums] += block
