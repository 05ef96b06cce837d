"""Prior covariances of energies, forces and stresses with themselves: what the kernel alone allows, before any data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpmlp.core.environments import Descriptor, Environments, StructureEnvironments, Surroundings
from gpmlp.core.neighbors import Neighbors
from gpmlp.core.structures import Structures
from gpmlp.gp.covariances import ENVIRONMENTS, EnvironmentsOf, strain_derivatives
from gpmlp.gp.kernels import ZonalKernel

CHUNK_ATOMS = 128  # whose force covariances are made together
KEPT_ATOMS = 16  # the same where Jacobians need not be made: what stays in cache
CHUNK_ROWS = 512  # environments of one structure that meet all others at a time
CHUNK_JOINT = 4  # environments whose Jacobian rows meet those of all others at a time


@dataclass(frozen=True, eq=False)
class PriorCovariance:
    """The Gaussian process before it has seen data: one descriptor, its kernel, and a signal for each central species.

    Attributes:
        signal: standard deviation of local energies by Z, eV.
        environments_of: environments of given centres of the structures asked about, if they are there already.
    """

    descriptor: Descriptor
    kernel: ZonalKernel
    signal: dict[int, float]
    environments_of: EnvironmentsOf | None = None

    def with_environments(self, environments_of: EnvironmentsOf | None) -> PriorCovariance:
        """The same with environments that are there already."""
        return replace(self, environments_of=environments_of)

    def _environments(self, surroundings: Surroundings, centers: Tensor) -> Environments:
        return self.environments_of(centers) if self.environments_of else self.descriptor(surroundings.select(centers))

    def atom_energies(self, species: Tensor, like: Tensor) -> Tensor:
        """(atoms,) variance of local energies, δ_z² f(1), eV^2, in the type of `like`."""
        return self._scales(species, like).square()

    def energies(self, structures: Structures, features: Tensor) -> Tensor:
        """(structures,) variance of total energies, Σ_ij δ_i δ_j f(x_i.x_j) over atoms of equal species, eV^2."""
        out = features.new_zeros(len(structures))
        for s, members in self._groups(structures):
            x, scale = features[members], self._scale(structures, members)
            for some in torch.arange(len(members), device=x.device).split(CHUNK_ROWS):
                out[s] += scale**2 * self.kernel.profile(x[some] @ x.T)[0].sum()
        return out

    def stresses(self, structures: Structures, surroundings: Surroundings) -> Tensor:
        """(structures, 6, 6) covariance of stress components in Voigt order, (eV/A^3)^2; NaN where there is no volume.

        V^2 cov(σ_k, σ_l) = Σ_ij δ_i δ_j [f'(s_ij) w_ik.w_jl + f''(s_ij) (w_ik.x_j)(x_i.w_jl)], w_ik = dx_i/d(strain k).
        """
        volumes = structures.volumes
        out = volumes.new_full((len(structures), 6, 6), float("nan"))
        for s, members in self._groups(structures):
            if volumes[s].isnan():
                continue
            out[s].nan_to_num_(0.0)
            x, w = self._strained(surroundings, members)
            for some in torch.arange(len(members), device=x.device).split(CHUNK_ROWS):
                _, first, second = self.kernel.profile(x[some] @ x.T)
                seen = torch.einsum("ikf,jf->kij", w[some], x)
                back = torch.einsum("if,jkf->kij", x[some], w)
                part = torch.einsum("ikf,ijlf->kl", w[some], (first @ w.flatten(1)).unflatten(1, w.shape[1:])[:, None])
                part = part + torch.einsum("kij,lij->kl", seen * second, back)
                out[s] += self._scale(structures, members) ** 2 * part / volumes[s] ** 2
        return out

    def forces(self, structures: Structures, neighbors: Neighbors, surroundings: Surroundings, atoms: Tensor) -> Tensor:
        """(len(atoms), 3, 3) covariance of the force components of each of the given atoms, (eV/A)^2.

        cov(F_ia, F_ib) = Σ_ee' δ_e δ_e' [f'(s_ee') v_ea.v_e'b + f''(s_ee') (v_ea.x_e')(x_e.v_e'b)], v_e = dx_e/dr_i, over the
        environments e, e' of equal species that see atom i: its own and its neighbours'.
        """
        out = structures.positions.new_zeros(len(atoms), 3, 3)
        size = KEPT_ATOMS if isinstance(self.environments_of, StructureEnvironments) else CHUNK_ATOMS
        for some in near_together(structures, atoms).split(size):
            out[some] = self._forces(structures, neighbors, surroundings, atoms[some])
        return out

    def _forces(
        self, structures: Structures, neighbors: Neighbors, surroundings: Surroundings, atoms: Tensor
    ) -> Tensor:
        n, n_atoms, device = len(atoms), structures.n_atoms, atoms.device
        local = torch.full((n_atoms,), -1, dtype=torch.long, device=device)
        local[atoms] = torch.arange(n, device=device)
        hit = (local[neighbors.neighbors] >= 0).nonzero()[:, 0]
        # one incidence for each (atom, environment that sees it), the images of an atom together
        own = local[atoms] * n_atoms + atoms
        seen = local[neighbors.neighbors[hit]] * n_atoms + neighbors.centers[hit]
        keys = torch.unique(torch.cat([seen, own]))
        owner, environment = keys // n_atoms, keys % n_atoms
        counts = torch.bincount(owner, minlength=n)
        slot = torch.arange(len(keys), device=device) - (counts.cumsum(0) - counts)[owner]
        width = int(counts.max())
        place = owner * width + slot
        if len(hit) and isinstance(self.environments_of, StructureEnvironments) and len(keys) == len(seen) + len(own):
            pairs, mine = (place[torch.searchsorted(keys, some)] for some in (seen, own))
            features, gradients = _laid_out(
                self.environments_of, n * width, place, environment, pairs, hit, mine, atoms
            )
        else:
            x, v = self._incidences(surroundings, neighbors, local, keys)
            features, gradients = x.new_zeros(n * width, x.shape[1]), v.new_zeros(n * width, 3, x.shape[1])
            features[place], gradients[place] = x, v
        features, gradients = features.unflatten(0, (n, width)), gradients.unflatten(0, (n, width))
        scale, species = features.new_zeros(n, width), slot.new_zeros(n, width)
        species[owner, slot] = structures.species[environment]
        scale[owner, slot] = self._scales(structures.species[environment], features)
        weight = scale[:, :, None] * scale[:, None, :] * (species[:, :, None] == species[:, None, :])
        _, first, second = self.kernel.profile(features @ features.transpose(1, 2))
        flat = gradients.flatten(1, 2)
        along = (flat @ features.transpose(1, 2)).unflatten(1, (width, 3))  # v_ea . x_e'
        summed = ((weight * first) @ gradients.flatten(2)).unflatten(2, (3, -1))
        out = (gradients.flatten(0, 1) @ summed.flatten(0, 1).mT).unflatten(0, (n, width)).sum(1)
        return out + torch.einsum("neaf,nef,nfbe->nab", along, weight * second, along)

    def _incidences(
        self, surroundings: Surroundings, neighbors: Neighbors, local: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x_e and v_e = dx_e/dr_i of the (atom i, environment e) pairs in `keys` (local index of i times atoms plus e), sorted."""
        n_atoms = len(local)
        features, gradients = None, None
        for centers in torch.unique(keys % n_atoms).split(ENVIRONMENTS):
            within, pairs = surroundings.pairs_of(centers)
            environments = self._environments(surroundings, centers)
            jacobian = environments.jacobian()
            if features is None:
                features = jacobian.new_zeros(len(keys), jacobian.shape[2])
                gradients = jacobian.new_zeros(len(keys), 3, jacobian.shape[2])
            center, neighbor = centers[within], neighbors.neighbors[pairs]
            for atom, sign in (
                (neighbor, 1.0),
                (center, -1.0),
            ):  # x_e changes when a neighbour moves, oppositely when e does
                asked = local[atom] >= 0
                place = torch.searchsorted(keys, local[atom[asked]] * n_atoms + center[asked])
                gradients.index_add_(0, place, jacobian[asked], alpha=sign)
            mine = torch.isin(keys % n_atoms, centers)
            features[mine] = environments.features[torch.searchsorted(centers, keys[mine] % n_atoms)]
        return features, gradients

    def joint(self, structures: Structures, neighbors: Neighbors, surroundings: Surroundings) -> Tensor:
        """Covariances of all energies (structures), forces (3 atoms) and stresses (6 structures, Voigt), each with each.

        Rows and columns in that order; stresses of structures without volume are zero. Holds the full square: for small batches.
        """
        n, atoms = len(structures), structures.n_atoms
        size = n + 3 * atoms + 6 * n
        like = structures.positions
        out = like.new_zeros(size + 3, size + 3)  # a bin more for empty neighbour slots
        for z in structures.distinct_species:
            members = (structures.species == z).nonzero()[:, 0]
            made = [self._functionals(structures, neighbors, surroundings, c) for c in members.split(ENVIRONMENTS)]
            x = torch.cat([m[0] for m in made])
            width = max(m[1].shape[1] for m in made)
            rows = torch.cat([torch.nn.functional.pad(m[1], (0, 0, 0, width - m[1].shape[1])) for m in made])
            places = torch.cat([torch.nn.functional.pad(m[2], (0, width - m[2].shape[1]), value=size) for m in made])
            owner = structures.structure_of_atom[members]
            for some in torch.arange(len(members), device=like.device).split(CHUNK_JOINT):
                value, first, second = self.kernel.profile(x[some] @ x.T)
                to_values = torch.einsum("ird,jd->irj", rows[some], x)
                from_values = torch.einsum("id,jrd->ijr", x[some], rows)
                block = torch.einsum("ird,jqd->irjq", rows[some], rows) * first[:, None, :, None]
                block += (second[:, None, :] * to_values)[..., None] * from_values[:, None]
                scale = self.signal[z] ** 2
                _add(out, places[some].flatten(), places.flatten(), scale * block.flatten(2).flatten(0, 1))
                _add(out, owner[some], owner, scale * value)
                _add(out, places[some].flatten(), owner, scale * (to_values * first[:, None]).flatten(0, 1))
                _add(out, owner[some], places.flatten(), scale * (from_values * first[..., None]).flatten(1))
        return out[:size, :size]

    def _functionals(
        self, structures: Structures, neighbors: Neighbors, surroundings: Surroundings, centers: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features; rows of derivatives; and the entry of the joint covariance that each row adds to."""
        n, atoms = len(structures), structures.n_atoms
        within, pairs = surroundings.pairs_of(centers)
        environments = self._environments(surroundings, centers)
        if not len(pairs):
            empty = centers.new_zeros(len(centers), 0)
            return (
                environments.features,
                environments.features.new_zeros(len(centers), 0, len(environments.features[0])),
                empty,
            )
        jacobian, slots = _padded(environments, within)
        n_slots = (jacobian.shape[1] - 9) // 3
        atom = centers.new_full((len(centers), n_slots + 1), -1)
        atom[within, slots] = neighbors.neighbors[pairs]
        atom[:, n_slots] = centers
        xyz = torch.arange(3, device=atom.device)
        forces = torch.where(atom[..., None] >= 0, n + 3 * atom[..., None] + xyz, n + 3 * atoms + 6 * n + xyz).flatten(
            1
        )
        owner = structures.structure_of_atom[centers]
        virial = n + 3 * atoms + 6 * owner[:, None] + torch.arange(6, device=atom.device)
        rows = -jacobian  # F = -dE/dr
        rows[:, -6:] *= -torch.nan_to_num(1 / structures.volumes)[owner, None, None]
        return environments.features, rows, torch.cat([forces, virial], dim=1)

    def _strained(self, surroundings: Surroundings, members: Tensor) -> tuple[Tensor, Tensor]:
        """Features (members, features) and their derivatives with respect to the six strains (members, 6, features)."""
        features, slopes = [], []
        for centers in members.split(ENVIRONMENTS):
            within, pairs = surroundings.pairs_of(centers)
            environments: Environments = self._environments(surroundings, centers)
            features.append(environments.features)
            if len(pairs):
                vectors = environments.surroundings.vectors
                slopes.append(strain_derivatives(environments.jacobian(), within, vectors, len(centers)))
            else:
                slopes.append(environments.features.new_zeros(len(centers), 6, environments.features.shape[1]))
        return torch.cat(features), torch.cat(slopes)

    def _groups(self, structures: Structures):
        """(structure, its atoms of one species), every combination that occurs."""
        offsets = structures.offsets.tolist()
        for s in range(len(structures)):
            atoms = torch.arange(offsets[s], offsets[s + 1], device=structures.species.device)
            for z in torch.unique(structures.species[atoms]).tolist():
                yield s, atoms[structures.species[atoms] == z]

    def _scale(self, structures: Structures, members: Tensor) -> float:
        return self.signal[int(structures.species[members[0]])]

    def _scales(self, species: Tensor, like: Tensor) -> Tensor:
        out = torch.zeros(len(species), dtype=like.dtype, device=like.device)
        for z, value in self.signal.items():
            out[species == z] = value
        return out


def _padded(environments: Environments, local: Tensor) -> tuple[Tensor, Tensor]:
    """Jacobian rows of each environment: 3 for every neighbour slot, 3 for the centre, 6 for the virial.

    F_i = sum_j (g_ij - g_ji), so with the centre's rows minus the sum of its neighbours' all of them enter forces with a minus sign.

    Returns:
        (environments, 3 slots + 9, features) and the slot of each pair.
    """
    jacobian = environments.jacobian()
    n_env, n_features = environments.features.shape
    counts = torch.bincount(local, minlength=n_env)
    slot = torch.arange(len(local), device=local.device) - (counts.cumsum(0) - counts)[local]
    n_slots = int(counts.max())
    padded = jacobian.new_zeros(n_env, 3 * n_slots + 9, n_features)
    padded[:, : 3 * n_slots].unflatten(1, (n_slots, 3))[local, slot] = jacobian
    padded[:, 3 * n_slots : 3 * n_slots + 3].index_add_(0, local, jacobian, alpha=-1)
    padded[:, 3 * n_slots + 3 :] = strain_derivatives(jacobian, local, environments.surroundings.vectors, n_env)
    return padded, slot


def _add(out: Tensor, rows: Tensor, columns: Tensor, block: Tensor) -> None:
    """Add a block to scattered rows and columns, repeated ones summed."""
    narrow = block.new_zeros(block.shape[0], out.shape[1]).index_add_(1, columns, block)
    out.index_add_(0, rows, narrow)


def _laid_out(
    kept: StructureEnvironments,
    size: int,
    place: Tensor,
    environment: Tensor,
    pairs: Tensor,
    hit: Tensor,
    own: Tensor,
    atoms: Tensor,
) -> tuple[Tensor, Tensor]:
    """x_e (size, features) and v_e (size, 3, features) at the places of (atom, environment): rows of the Jacobian as they are, because
    no environment sees two images of an atom. Empty places hold those of others.

    Args:
        place, environment: of all incidences; pairs, hit: places of those of neighbours, and which pairs these are; own: places of
            the environments of the atoms themselves.
    """
    which, rows = place.new_zeros(size), place.new_zeros(size)
    which[place], rows[pairs] = environment, hit
    gradients = kept.jacobian[rows]
    gradients[own] = kept.center_jacobian[atoms]
    return kept.environments.features[which], gradients


def near_together(structures: Structures, atoms: Tensor) -> Tensor:
    """An order of the atoms in which consecutive ones are near each other: neighbours' Jacobians are then made few times."""
    if len(atoms) <= CHUNK_ATOMS:
        return torch.arange(len(atoms), device=atoms.device)
    box = (structures.positions[atoms] / 6.0).floor().long()
    box = box - box.amin(0)
    sides = box.amax(0) + 1
    key = (structures.structure_of_atom[atoms] * sides[0] + box[:, 0]) * sides[1] + box[:, 1]
    return torch.argsort(key * sides[2] + box[:, 2], stable=True)
