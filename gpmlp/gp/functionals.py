"""Inducing variables that are functionals of whole structures: energies, internal force components and stresses.

A functional b is a linear combination of energy, forces and stress of one structure, and so a sum over its environments j,
b = Σ_j [c_b ε(x_j) + v_bj.∂ε/∂x_j]. Its covariances with a local energy and their slopes, unit signal variance, are

    k(x, b) = Σ_j [c_b f(x.x_j) + f'(x.x_j) x.v_bj],   T_b(x) = ∂k/∂x = Σ_j [f' v_bj + (f'' x.v_bj + f' c_b) x_j],

so that those of data and of functionals among themselves are pull-backs of T, by products of matrices; sums run over environments of
equal central species. With all labels of the data among the functionals the sparse process is the exact one (representer theorem).

All x_j and v_bj of a species lie, but for a rounding of TOLERANCE, in few directions of the features, and so does every T_b: x_j and v_bj
are taken as their projections onto these, which makes them functionals of the same process once more, and only coordinates are multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from gpmlp.core import parallel
from gpmlp.core.environments import Descriptor, StructureEnvironments, strain_derivatives
from gpmlp.core.errors import UserError
from gpmlp.core.stored_tensors import StoredTensors
from gpmlp.core.structures import Structures, chunk_ranges
from gpmlp.gp.kernels import ZonalKernel

RIGID = 1e-6  # of the size of a molecule: a rotation that moves its atoms by less is none (a linear molecule about its axis)
TOGETHER = 64  # functionals, about, whose slopes are in memory at a time
GROUP_ATOMS = 64  # of structures of one shape whose rows of K_uu are made together
CHUNK_ATOMS = 128  # of structures whose Jacobian is in memory at a time
STORED = 1e-4  # by which the directions of a file may be no orthonormal ones; they may be in single precision
TOLERANCE = 1e-10  # of the largest eigenvalue of Σ [x_j x_jᵀ + v_bj v_bjᵀ]: directions with less are left out


class Part(NamedTuple):
    """Environments of one species in one structure: x_j (environments, directions), and v_bj (functionals, environments, directions),
    in coordinates along the directions of the species."""

    features: Tensor
    slopes: Tensor


@dataclass(frozen=True, eq=False)
class FunctionalBlock:
    """Functionals of some structures, of one descriptor and all central species together.

    Attributes:
        structures: whose functionals they are, most important ones first.
        maps: for each, (functionals, 1 + 3 atoms + 6) coefficients of its energy, forces and stress (Voigt).
        relative: by central species, those that count, standard deviation of local energies in units of the block's signal.
        bases: by central species, (features, directions) orthonormal directions of the features that x_j and v_bj are in.
    """

    descriptor: Descriptor
    structures: Structures
    maps: tuple[Tensor, ...]
    relative: dict[int, float]
    bases: dict[int, Tensor]

    @staticmethod
    def make(
        descriptor: Descriptor,
        structures: Structures,
        maps: Sequence[Tensor],
        relative: dict[int, float],
        tolerance: float = TOLERANCE,
    ) -> FunctionalBlock:
        """With the directions that these functionals span.

        Args:
            tolerance: of the largest eigenvalue; 0 for all directions there are.
        """
        every = FunctionalBlock(descriptor, structures, tuple(maps), relative, {})
        grams: dict[int, Tensor] = {}
        for part in every._made(relative):
            for z, (x, v) in part.items():
                vectors = torch.cat([x, v.flatten(0, 1)]).double()
                grams[z] = vectors.T @ vectors + grams.get(z, 0.0)
        bases = {z: _directions(gram, tolerance).to(structures.positions) for z, gram in grams.items()}
        return replace(every, bases=bases)

    @staticmethod
    def with_all_directions(
        descriptor: Descriptor, structures: Structures, maps: Sequence[Tensor], relative: dict[int, float]
    ) -> FunctionalBlock:
        """With the unit vectors as directions, so that later structures have all of theirs."""
        unit = torch.eye(descriptor.n_features).to(structures.positions)
        return FunctionalBlock(descriptor, structures, tuple(maps), relative, dict.fromkeys(relative, unit))

    def joined(self, structures: Structures, maps: Sequence[Tensor]) -> FunctionalBlock:
        """With functionals of other structures after these."""
        new = replace(self, structures=structures, maps=tuple(maps))
        joined = Structures.concatenate([self.structures, structures])
        block = replace(self, structures=joined, maps=(*self.maps, *maps))
        vars(block)["parts"] = [*self.parts, *new.parts]
        return block

    def of_structures(self, chosen: Sequence[int]) -> FunctionalBlock:
        """Those of some of the structures."""
        block = replace(self, structures=self.structures.select(chosen), maps=tuple(self.maps[i] for i in chosen))
        vars(block)["parts"] = [self.parts[i] for i in chosen]
        return block

    @property
    def central_species(self) -> tuple[int, ...]:
        return tuple(sorted(self.relative))

    @cached_property
    def starts(self) -> list[int]:
        """(structures + 1,) the first column of each structure; the number of columns."""
        return torch.tensor([0, *map(len, self.maps)]).cumsum(0).tolist()

    @property
    def n_columns(self) -> int:
        return self.starts[-1]

    @cached_property
    def parts(self) -> list[dict[int, Part]]:
        """For each structure, by central species, what covariances need of it."""
        return [{z: Part(*(v @ self.bases[z] for v in p)) for z, p in part.items()} for part in self._made(self.bases)]

    def _made(self, species: Collection[int]) -> Iterator[dict[int, Part]]:
        """Parts of every structure with all features in place of coordinates."""
        for first, last in chunk_ranges(self.structures.counts.tolist(), CHUNK_ATOMS):
            chunk = self.structures.select(range(first, last))
            view = StructureEnvironments.from_structures(self.descriptor, chunk)
            view.keep_jacobian()
            for i, rows in enumerate(self.maps[first:last]):
                atoms = torch.arange(int(chunk.offsets[i]), int(chunk.offsets[i + 1]), device=rows.device)
                out = {}
                for z in set(chunk.species[atoms].tolist()) & set(species):
                    x, slopes = _derivatives(view, chunk, atoms[chunk.species[atoms] == z], i)
                    out[z] = Part(x, (rows[:, 1:] @ slopes).transpose(0, 1).contiguous())
                yield out

    def coordinates(self, z: int, vectors: Tensor) -> Tensor:
        """(..., directions) of vectors (..., features): what covariances see of them."""
        return vectors @ self.bases[z]

    def of_species(self, relative: dict[int, float]) -> FunctionalBlock:
        """The same functionals of a process with other standard deviations, or of some species only."""
        block = replace(self, relative=relative)
        vars(block)["parts"] = self.parts
        return block

    def centres(self, z: int) -> Tensor:
        """(centres, features) x_j of a species, by structure."""
        none = self.bases[z].new_zeros(0, self.bases[z].shape[1])
        return torch.cat([none, *(part[z].features for part in self.parts if z in part)]) @ self.bases[z].T

    def collapse(self, weights: Tensor, z: int) -> tuple[Tensor, Tensor]:
        """α_j = Σ_b w_b c_b and τ_j = Σ_b w_b v_bj of the centres of a species: ε(x) = Σ_j [α_j f(x.x_j) + f'(x.x_j) x.τ_j].

        Args:
            weights: (..., columns).

        Returns:
            (..., centres) and (..., centres, features), times the relative variance of the species.
        """
        alpha, scale = [weights.new_zeros(*weights.shape[:-1], 0)], self.relative[z] ** 2
        tau = [weights.new_zeros(*weights.shape[:-1], 0, self.bases[z].shape[1])]
        for part, rows, mine in zip(self.parts, self.maps, weights.split(list(map(len, self.maps)), -1), strict=True):
            if z in part:
                n = len(part[z].features)
                alpha.append((mine @ rows[:, 0])[..., None].expand(*mine.shape[:-1], n))
                tau.append((mine @ part[z].slopes.flatten(1)).unflatten(-1, part[z].features.shape))
        return scale * torch.cat(alpha, -1), scale * torch.cat(tau, -2) @ self.bases[z].T

    def local_rows(self, kernel: ZonalKernel, z: int, x: Tensor) -> Tensor:
        """k_xu: (environments, columns) covariances of local energies of a species, unit signal variance."""
        out, x = x.new_zeros(len(x), self.n_columns), self.coordinates(z, x)
        for part, rows, columns in self._of_species(z):
            value, first, _ = kernel.profile(x @ part.features.T)
            along = torch.einsum("bjd,nd->nbj", part.slopes, x)
            out[:, columns] = torch.einsum("nj,nbj->nb", first, along) + value.sum(1, keepdim=True) * rows[:, 0]
        return out.mul_(self.relative[z] ** 2)

    def local_slopes(self, kernel: ZonalKernel, z: int, x: Tensor, weights: Tensor) -> Tensor:
        """∂/∂x_i Σ_b w_ib k(x_i, b), with weights (environments, columns) for each environment; (environments, features)."""
        x = self.coordinates(z, x)
        out = torch.zeros_like(x)
        for part, rows, columns in self._of_species(z):
            _, slopes = _couple(kernel, x, part, rows[:, 0])
            out += torch.einsum("nb,bnd->nd", weights[:, columns], slopes)
        return out.mul_(self.relative[z] ** 2) @ self.bases[z].T

    def _of_species(self, z: int) -> Iterator[tuple[Part, Tensor, slice]]:
        """The structures with that species: what they are made of, their maps and columns."""
        for part, rows, (first, last) in zip(self.parts, self.maps, pairwise(self.starts), strict=True):
            if z in part and last > first:
                yield part[z], rows, slice(first, last)

    def coupled(
        self, kernel: ZonalKernel, z: int, x: Tensor, up_to: int | None = None
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Columns, k (environments, columns) and T (columns, environments, directions) of some of them at a time.

        Args:
            x: (environments, directions), coordinates.
            up_to: columns before it only.
        """
        values: list[Tensor] = []
        slopes: list[Tensor] = []
        start = held = 0
        scale = self.relative[z] ** 2
        for part, rows, columns in self._of_species(z):
            if up_to is not None and columns.start >= up_to:
                break
            if values and (columns.start != start + held or held + len(rows) > TOGETHER):
                yield slice(start, start + held), torch.cat(values, 1), torch.cat(slopes)
                values, slopes, held = [], [], 0
            start = start if values else columns.start
            value, slope = _couple(kernel, x, part, rows[:, 0])
            values.append(value.mul_(scale))
            slopes.append(slope.mul_(scale))
            held += len(rows)
        if values:
            yield slice(start, start + held), torch.cat(values, 1), torch.cat(slopes)

    def K_uu(self, kernel: ZonalKernel) -> Tensor:
        """(columns, columns) covariance of the functionals, unit signal variance: Σ_z ρ_z² Σ_i [c_b k(x_i, b') + v_bi.T_b'(x_i)]."""
        return mirrored(self.lower_K_uu(kernel))

    def lower_K_uu(
        self,
        kernel: ZonalKernel,
        report: Callable[[float, float], None] = lambda done, total: None,
        first: int = 0,
    ) -> Tensor:
        """K_uu of which the lower half counts, made for structures of one shape together.

        Args:
            report: of the pairs of structures done.
            first: the structure with which its rows begin.
        """
        done, n, before = 0, len(self.maps), self.starts[first]
        out = self.structures.positions.new_zeros(self.n_columns - before, self.n_columns)

        def rows_of(group: tuple[int, int]) -> int:
            first, last = group
            here = out[self.starts[first] - before : self.starts[last] - before]
            maps = torch.stack(self.maps[first:last])
            for z in self.parts[first].keys() & self.relative.keys():
                mine = [part[z] for part in self.parts[first:last]]
                x, own = torch.cat([m.features for m in mine]), torch.stack([m.slopes.flatten(1) for m in mine])
                for columns, values, slopes in self.coupled(kernel, z, x, self.starts[last]):
                    # (structures, functionals, columns)
                    product = own @ slopes.unflatten(1, (len(mine), -1)).flatten(2).permute(1, 2, 0)
                    totals = values.unflatten(0, (len(mine), -1)).sum(1)
                    product += maps[:, :, :1] * totals[:, None]
                    here[:, columns] += product.flatten(0, 1)
            return (last - first) * (first + last + 1) // 2

        def tell(pairs: int) -> None:
            nonlocal done
            done += pairs
            report(done, (n - first) * (n + first + 1) // 2)

        parallel.map_pieces(rows_of, self._groups(first), tell)
        return out

    def _groups(self, first: int) -> list[tuple[int, int]]:
        """Runs of structures of one composition with as many functionals each, from one structure on."""
        shapes = [
            (len(m), sorted((z, len(p.features)) for z, p in part.items()))
            for m, part in zip(self.maps, self.parts, strict=True)
        ]
        edges, counts = [first], self.structures.counts.tolist()
        for i in range(first + 1, len(shapes)):
            if shapes[i] != shapes[i - 1] or sum(counts[edges[-1] : i + 1]) > GROUP_ATOMS:
                edges.append(i)
        return list(pairwise([*edges, len(shapes)])) if len(shapes) > first else []

    def leading_columns(self, share: float) -> Tensor:
        """Positions of that share of the columns, the most important ones."""
        return torch.arange(max(1, int(share * self.n_columns)))

    def select(self, chosen: Tensor) -> FunctionalBlock:
        """The block with the chosen columns (sorted) only, and without structures after the last that has any."""
        picks = [chosen[(chosen >= a) & (chosen < b)] - a for a, b in pairwise(self.starts)]
        kept = max((i + 1 for i, pick in enumerate(picks) if len(pick)), default=0)
        maps = tuple(rows[pick] for rows, pick in zip(self.maps[:kept], picks, strict=False))
        block = replace(self, structures=self.structures.select(range(kept)), maps=maps)
        if "parts" in vars(self):
            parts = [
                {z: Part(p.features, p.slopes[pick]) for z, p in part.items()}
                for part, pick in zip(self.parts[:kept], picks, strict=False)
            ]
            vars(block)["parts"] = parts
        return block

    def to(self, like: Tensor) -> FunctionalBlock:
        """In the precision and on the device of a tensor."""
        here = like.device, like.dtype
        return (
            self
            if (self.structures.positions.device, self.structures.positions.dtype) == here
            else replace(
                self,
                structures=self.structures.to(*here),
                maps=tuple(m.to(like) for m in self.maps),
                bases={z: basis.to(like) for z, basis in self.bases.items()},
            )
        )

    def stored(self) -> dict[str, Tensor]:
        """What a model file holds of it, besides the descriptor."""
        here = self.structures
        return {
            "positions": here.positions,
            "cells": here.cells,
            "periodic": here.periodic,
            "atomic_numbers": here.species,
            "counts": here.counts,
            "functionals": torch.tensor([len(m) for m in self.maps]),
            "maps": torch.cat([m.flatten() for m in self.maps]),
        } | {f"directions.{z}": basis for z, basis in self.bases.items()}

    @staticmethod
    def from_stored(
        stored: StoredTensors, descriptor: Descriptor, relative: dict[int, float], dtype: torch.dtype = torch.float64
    ) -> FunctionalBlock:
        """That of a model file, with tensors as in `stored` and of that precision; UserError if these do not fit each other."""
        z, counts = (
            stored.take("atomic_numbers", ("atoms",), torch.int64),
            stored.take("counts", ("structures",), torch.int64),
        )
        n = len(counts)
        numbers, flat = stored.take("functionals", (n,), torch.int64), stored.take("maps", ("coefficients",), dtype)
        if bool((counts < 1).any() or (numbers < 0).any()) or int(counts.sum()) != len(z):
            raise UserError("the numbers of atoms of the inducing structures are not those of their positions.")
        owner = torch.repeat_interleave(torch.arange(n, device=z.device), counts)
        shapes = torch.stack([numbers, 7 + 3 * counts], dim=1)
        sizes = shapes.prod(1)
        if int(sizes.sum()) != len(flat) or not set(z.tolist()) <= set(relative):
            raise UserError("the maps of inducing functionals are not those of their structures.")
        structures = Structures(
            stored.take("positions", (len(z), 3), dtype),
            stored.take("cells", (n, 3, 3), dtype),
            stored.take("periodic", (n, 3), torch.bool),
            z,
            owner,
            tuple(f"inducing structure {i}" for i in range(n)),
        )
        maps = tuple(part.view(*shape) for part, shape in zip(flat.split(sizes.tolist()), shapes.tolist(), strict=True))
        bases = {z: stored.take(f"directions.{z}", (descriptor.n_features, "directions"), dtype) for z in relative}
        for basis in bases.values():
            eye = torch.eye(basis.shape[1]).to(basis)
            if bool((basis.T @ basis - eye).abs().gt(STORED).any()):
                raise UserError("the directions of inducing functionals are not orthonormal.")
        return FunctionalBlock(descriptor, structures, maps, relative, bases)


def mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix of a lower half."""
    half = lower.tril()
    return half.add_(half.tril(-1).T)


def _directions(gram: Tensor, tolerance: float) -> Tensor:
    """(features, directions) principal directions of vectors with that Σ v vᵀ."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors[:, values > tolerance * values[-1]].flip(1).contiguous()


def _couple(kernel: ZonalKernel, x: Tensor, part: Part, on_values: Tensor) -> tuple[Tensor, Tensor]:
    """k(x, b) (environments, functionals) and T_b(x) (functionals, environments, features) with environments of one structure."""
    value, first, second = kernel.profile(x @ part.features.T)
    along = (part.slopes.flatten(0, 1) @ x.T).unflatten(0, part.slopes.shape[:2]).mT  # (functionals, environments, j)
    k = torch.einsum("bnj,nj->nb", along, first) + value.sum(1, keepdim=True) * on_values
    on_centres = along * second + first * on_values[:, None, None]
    slopes = (on_centres.flatten(0, 1) @ part.features).unflatten(0, on_centres.shape[:2])
    return k, slopes.baddbmm_(first.expand(len(slopes), -1, -1), part.slopes)


def _derivatives(view: StructureEnvironments, structures: Structures, centers: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """x_j (environments, features) of atoms of structure i, and their derivatives (environments, 3 atoms + 6, features) as they enter
    its forces and stress: F = -dE/dr, σ = 1/V dE/d(strain)."""
    part, (within, pairs) = view.select(centers), view.surroundings.pairs_of(centers)
    n, offset, n_atoms = len(centers), int(structures.offsets[i]), int(structures.counts[i])
    out = part.features.new_zeros(n, 3 * n_atoms + 6, part.features.shape[1])
    if not len(pairs):
        return part.features, out
    jacobian, flat = part.jacobian(), part.features.new_zeros(n * n_atoms, *out.shape[2:]).unsqueeze(1).repeat(1, 3, 1)
    flat.index_add_(0, within * n_atoms + view.neighbors.neighbors[pairs] - offset, jacobian, alpha=-1)
    flat.index_add_(0, within * n_atoms + centers[within] - offset, jacobian)
    out[:, : 3 * n_atoms] = flat.view(n, 3 * n_atoms, -1)
    strains = strain_derivatives(jacobian, within, part.surroundings.vectors, n)
    out[:, 3 * n_atoms :] = strains * torch.nan_to_num(1 / structures.volumes[i])
    return part.features, out


def internal_directions(positions: Tensor, periodic: Tensor) -> Tensor:
    """(functionals, 3 atoms) an orthonormal basis of displacements without translations, and without rotations where no axis is periodic:
    of forces along the others every potential has none."""
    n = len(positions)
    unit = torch.eye(3, dtype=positions.dtype, device=positions.device)
    rigid = [unit.repeat(n, 1)]  # (3 atoms, 3)
    if not bool(periodic.any()):
        away = positions - positions.mean(0)
        size = away.square().sum(1).mean().sqrt().clamp_min(1e-12)
        rigid.append(
            torch.linalg.cross(unit[None].expand(n, 3, 3), (away / size)[:, None].expand(n, 3, 3)).mT.flatten(0, 1)
        )
    every = torch.cat(rigid, dim=1)
    u, s, _ = torch.linalg.svd(every, full_matrices=True)
    rank = int((s > RIGID * s[0]).sum())
    return u[:, rank:].T.contiguous()


def functional_maps(structures: Structures, energies: Tensor, forces: Tensor, stresses: Tensor) -> list[Tensor]:
    """For each structure, coefficients of its functionals: the energy, internal forces and stress components, those that are wanted.

    Args:
        energies, forces, stresses: (structures,) bool.
    """
    out = []
    volumes = structures.volumes
    for i, (first, last) in enumerate(pairwise(structures.offsets.tolist())):
        width = 1 + 3 * (last - first) + 6
        eye = torch.eye(width, dtype=structures.positions.dtype, device=structures.positions.device)
        rows = [eye[:1]] if energies[i] else []
        if forces[i]:
            inner = internal_directions(structures.positions[first:last], structures.periodic[i])
            rows.append(torch.nn.functional.pad(inner, (1, 6)))
        if stresses[i] and not volumes[i].isnan():
            rows.append(eye[-6:])
        out.append(torch.cat([eye[:0], *rows]))
    return out
