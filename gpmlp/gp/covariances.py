"""Covariances of energies, forces and stresses with inducing variables (values and gradients of the local energy)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpmlp.core import parallel
from gpmlp.core.environments import Descriptor, Environments, Surroundings
from gpmlp.core.neighbors import Neighbors, fits_compiled_loops
from gpmlp.core.structures import Structures
from gpmlp.core.units import VOIGT
from gpmlp.gp.inducing import InducingBlock
from gpmlp.gp.kernels import ZonalKernel

if TYPE_CHECKING:
    import numpy as np

BLOCK_BYTES = 1 << 20  # of one block of covariance rows: what stays in cache between its product and its scatter; and
BLOCK_ROWS = 256  # rows it has at least, as products of fewer are slow
ENVIRONMENTS = 32  # whose Jacobian is in memory at a time
SHARE = 128  # columns, at least, that are worth another thread
EnvironmentsOf = Callable[[Tensor], Environments]  # centres (indices) -> their environments


@dataclass(frozen=True, eq=False)
class CovarianceRows:
    """Covariances of the observations of some structures with all inducing columns.

    Attributes:
        energies: (structures, columns).
        forces: (3 atoms, columns), or of the atoms asked for; None if not asked for.
        stresses: (6 structures, columns) Voigt order xx yy zz yz xz xy; zero where there is no volume; None if not asked for.
    """

    energies: Tensor
    forces: Tensor | None
    stresses: Tensor | None


@dataclass(frozen=True, eq=False)
class SpeciesEnvironments:
    """Environments of one species laid out for rows: all that covariances need of them, whatever the inducing set.

    Attributes:
        species: Z.
        centers: (environments,) their atoms.
        features: (environments, features).
        jacobian: (pairs, 3, features); None where there are no pairs or nothing is differentiated.
        owners: (pairs,) the environment of each pair, sorted; atoms: (pairs,) the neighbour; vectors: (pairs, 3) to it, A.
    """

    species: int
    centers: Tensor
    features: Tensor
    jacobian: Tensor | None
    owners: Tensor
    atoms: Tensor
    vectors: Tensor

    @property
    def n_bytes(self) -> int:
        parts = self.features, self.jacobian, self.owners, self.atoms, self.vectors
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    @cached_property
    def starts(self) -> Tensor:
        """(environments + 1,) the first pair of each environment; the number of pairs."""
        counts = torch.bincount(self.owners, minlength=len(self.centers))
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def species_environments(
    structures: Structures,
    neighbors: Neighbors,
    surroundings: Surroundings,
    environments_of: EnvironmentsOf,
    species: int,
    derivatives: bool = True,
    seeing: Tensor | None = None,
) -> Iterator[SpeciesEnvironments]:
    """The environments of a species, ENVIRONMENTS at a time.

    Args:
        derivatives: whether Jacobians are wanted.
        seeing: (atoms,) mask of the environments wanted; all if None.
    """
    mine = structures.species == species
    for centers in (mine if seeing is None else mine & seeing).nonzero()[:, 0].split(ENVIRONMENTS):
        if not len(centers):
            continue
        environments = environments_of(centers)
        seen = environments.surroundings
        jacobian = environments.jacobian() if derivatives and len(seen.centers) else None
        atoms = neighbors.neighbors[surroundings.pairs_of(centers)[1]]
        yield SpeciesEnvironments(species, centers, environments.features, jacobian, seen.centers, atoms, seen.vectors)


def strain_derivatives(jacobian: Tensor, owners: Tensor, vectors: Tensor, n: int) -> Tensor:
    """(n environments, 6, features) derivatives with respect to the strains of VOIGT: the symmetric part of Σ_j r_ij ⊗ dx/dr_ij."""
    sums = jacobian.new_zeros(n, 3, *jacobian.shape[1:])
    for a in range(3):
        sums[:, a].index_add_(0, owners, jacobian * vectors[:, a, None, None])
    return torch.stack([0.5 * (sums[:, a, b] + sums[:, b, a]) for a, b in VOIGT], dim=1)


def covariance_rows(
    structures: Structures,
    neighbors: Neighbors,
    descriptor: Descriptor,
    kernel: ZonalKernel,
    inducing: tuple[InducingBlock, ...],
    forces: bool = True,
    stresses: bool = True,
    atoms: Tensor | None = None,
    environments_of: EnvironmentsOf | None = None,
) -> CovarianceRows:
    """Covariance rows by pull-back: GEMMs of a block's feature Jacobian with all centres and tangents of its species.

    Args:
        atoms: distinct atoms whose force rows are wanted, in that order; then only environments that see one of them are looked at, and
            `energies` and `stresses` are not to be used.
        environments_of: environments of given centres, if they are there already.
    """
    place, seeing = _places(structures, neighbors, atoms)
    surroundings = Surroundings.from_structures(structures, neighbors)
    environments_of = environments_of or (lambda centers: descriptor(surroundings.select(centers)))

    def made(species: int) -> Iterator[SpeciesEnvironments]:
        return species_environments(
            structures, neighbors, surroundings, environments_of, species, forces or stresses, seeing
        )

    return rows_from_environments(structures, made, kernel, inducing, forces, stresses, place)


def rows_from_environments(
    structures: Structures,
    seen: Callable[[int], Iterable[SpeciesEnvironments]],
    kernel: ZonalKernel,
    inducing: tuple[InducingBlock, ...],
    forces: bool = True,
    stresses: bool = True,
    place: Tensor | None = None,
) -> CovarianceRows:
    """Covariance rows from the facets of each species.

    Args:
        place: (atoms + 1,) where the forces of each atom go; in their order if None.
    """
    like = structures.positions
    place = torch.arange(structures.n_atoms + 1, device=like.device) if place is None else place
    n, n_forces, columns = len(structures), int(place[-1]), sum(b.n_columns for b in inducing)
    out = CovarianceRows(
        like.new_zeros(n, columns),
        like.new_zeros(3 * n_forces, columns) if forces else None,
        like.new_zeros(6 * n, columns) if stresses else None,
    )
    start, fast = 0, forces and fits_compiled_loops(like, *(b.features for b in inducing))
    add = _add_by_loops if fast else _add
    for block in inducing:
        here = slice(start, start + block.n_columns)
        start = here.stop
        # one atom more than there are: where forces that are not wanted may add without harm
        width, sums = len(block.vectors), None
        for some in seen(block.species):
            sums = sums or CovarianceRows(
                like.new_zeros(n, width),
                like.new_zeros(n_forces + 1, 3, width) if forces else None,
                like.new_zeros(n, 6, width) if stresses else None,
            )
            add(sums, structures, some, kernel, block, place)
        if sums is None:
            continue
        out.energies[:, here] = block.take_columns(sums.energies)
        kept = block.by_direction[1] if fast and len(block.features) < width else None
        if forces:
            made = sums.forces[:-1].flatten(0, 1)
            out.forces[:, here] = block.take_columns(made) if kept is None else made[:, kept]
        if stresses:
            made = sums.stresses.flatten(0, 1)
            out.stresses[:, here] = block.take_columns(made) if kept is None else made[:, kept]
    return out


def atom_rows(features: Tensor, species: Tensor, kernel: ZonalKernel, inducing: tuple[InducingBlock, ...]) -> Tensor:
    """(environments, columns) covariances of the local energies themselves, unit signal variance."""
    pieces = []
    for block in inducing:
        mine = species == block.species
        if mine.all():
            pieces.append(local_rows(kernel, block, features))
            continue
        piece = features.new_zeros(len(features), block.n_columns)
        piece[mine] = local_rows(kernel, block, features[mine])
        pieces.append(piece)
    return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]


def local_rows(
    kernel: ZonalKernel, block: InducingBlock, features: Tensor, known: tuple[Tensor, Tensor, Tensor] | None = None
) -> Tensor:
    """(environments, columns) the same of environments of the block's species.

    Args:
        known: f, f' and f'' of these with centres of which the first ones are the block's.
    """
    if not block.tangents.shape[1]:
        m = len(block.features)
        return block.take_columns(known[0][:, :m] if known else kernel.value(features @ block.features.T))
    return block.take_columns(_values(kernel, block, features, known)[0])


def _values(
    kernel: ZonalKernel, block: InducingBlock, features: Tensor, known: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k(x, u) of values and gradients (environments, M + M R); f' and f'' (environments, M); x.t (environments, M, R)."""
    m, r = block.tangents.shape[:2]
    value, first, second = (p[:, :m] for p in known or kernel.profile(features @ block.features.T))
    along = (features @ block.tangents.flatten(0, 1).T).unflatten(1, (m, r))
    return torch.cat([value, (first[:, :, None] * along).flatten(1)], dim=1) if r else value, first, second, along


def _places(structures: Structures, neighbors: Neighbors, atoms: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where the forces of each atom go (atoms + 1,), those not wanted and the last entry to a bin after all others; and which
    environments (atoms,) see a wanted atom."""
    n_atoms, device = structures.n_atoms, structures.positions.device
    if atoms is None:
        return torch.arange(n_atoms + 1, device=device), torch.ones(n_atoms, dtype=torch.bool, device=device)
    place = torch.full((n_atoms + 1,), len(atoms), device=device)
    place[atoms] = torch.arange(len(atoms), device=device)
    seeing = place[:-1] < len(atoms)
    seeing[neighbors.centers[seeing[neighbors.neighbors]]] = True
    return place, seeing


def _add(
    sums: CovarianceRows,
    structures: Structures,
    seen: SpeciesEnvironments,
    kernel: ZonalKernel,
    block: InducingBlock,
    place: Tensor,
) -> None:
    """Add what environments (all of the block's species) contribute to the rows of their structures."""
    energy, first, second, along = _values(kernel, block, seen.features)
    owner = structures.structure_of_atom[seen.centers]
    sums.energies.index_add_(0, owner, energy)
    if sums.forces is None and sums.stresses is None or seen.jacobian is None:
        return
    per_volume = torch.nan_to_num(1 / structures.volumes)[owner]

    def sloped(rows: Tensor, of: Tensor) -> Tensor:
        """Derivatives of k(x, u) from those of the features (n, 3 or 6, features) of the environments `of`."""
        m, r = block.tangents.shape[:2]
        out = rows @ block.vectors.T
        # d/dr f(s) = f' J x_j  and  d/dr [f'(s) x.t] = f' J t + f'' (x.t) J x_j, in place
        on_values = out[..., :m]
        if r:
            on_tangents = out[..., m:].unflatten(-1, (m, r))
            on_tangents.mul_(first[of, None, :, None])
            on_tangents.addcmul_(on_values[..., None], (second[of, :, None] * along[of])[:, None])
        on_values.mul_(first[of, None, :])
        return out

    if sums.forces is not None:
        size = max(1, BLOCK_BYTES // (3 * len(block.vectors) * seen.jacobian.element_size()))
        centers, neighbors = place[seen.centers][seen.owners], place[seen.atoms]
        for some in torch.arange(len(seen.owners), device=owner.device).split(size):
            gradients = sloped(seen.jacobian[some], seen.owners[some])
            # F_i = Σ_j (g_ij - g_ji)
            sums.forces.index_add_(0, neighbors[some], gradients, alpha=-1)
            sums.forces.index_add_(0, centers[some], gradients)
    if sums.stresses is not None:
        virials = sloped(
            strain_derivatives(seen.jacobian, seen.owners, seen.vectors, len(owner)),
            torch.arange(len(owner), device=owner.device),
        )
        sums.stresses.index_add_(0, owner, virials * per_volume[:, None, None])


def _add_by_loops(
    sums: CovarianceRows,
    structures: Structures,
    seen: SpeciesEnvironments,
    kernel: ZonalKernel,
    block: InducingBlock,
    place: Tensor,
) -> None:
    """`_add` of forces, with or without stresses, by compiled loops, with columns as in `by_direction`. Threads share the columns."""
    energy, first, second, along = _values(kernel, block, seen.features)
    owner = structures.structure_of_atom[seen.centers]
    sums.energies.index_add_(0, owner, energy)
    if seen.jacobian is None:
        return
    from gpmlp.gp import _row_kernels

    jacobian, starts = seen.jacobian.detach().flatten(0, 1), seen.starts.numpy()
    first, bend = first.detach().numpy(), (second[:, :, None] * along).detach().transpose(1, 2).contiguous().numpy()
    weight = torch.nan_to_num(1 / structures.volumes)[owner]
    about = [t.numpy() for t in (place[seen.atoms], place[seen.centers], seen.vectors.detach(), owner, weight)]
    forces = sums.forces[:-1].numpy()
    stresses = forces[:0] if sums.stresses is None else sums.stresses.numpy()

    def share(columns: tuple[int, int, Tensor]) -> None:
        begin, end, vectors = columns
        runs = _runs(starts, BLOCK_BYTES // (len(vectors) * jacobian.element_size()))
        most = max(int(starts[hi] - starts[lo]) for lo, hi in runs)
        products = jacobian.new_empty(3 * most, len(vectors))
        for lo, hi in runs:
            rows = slice(3 * int(starts[lo]), 3 * int(starts[hi]))
            made = torch.mm(jacobian[rows], vectors.T, out=products[: rows.stop - rows.start])
            _row_kernels.add_rows(made.numpy(), first, bend, starts, *about, forces, stresses, lo, hi, begin, end)

    parallel.map_pieces(share, _shares(block))


def _shares(block: InducingBlock) -> list[tuple[int, int, Tensor]]:
    """Ranges of centres, one for each thread, with their vectors `by_direction`; not more than are worth waking a thread for."""
    m, vectors = len(block.features), block.by_direction[0]
    pieces = max(1, min(parallel.available_threads(), m // SHARE))
    edges = [m * k // pieces for k in range(pieces + 1)]
    if pieces == 1:
        return [(0, m, vectors)]
    by_centre = vectors.unflatten(0, (-1, m))
    return [(a, b, by_centre[:, a:b].flatten(0, 1)) for a, b in pairwise(edges)]


def _runs(starts: np.ndarray, rows: int) -> list[tuple[int, int]]:
    """Consecutive environments with about so many rows together, but not fewer than BLOCK_ROWS; those without pairs are in any."""
    edges, least = [0], max(rows, BLOCK_ROWS) // 3
    for e in range(1, len(starts)):
        if starts[e] - starts[edges[-1]] >= least or e == len(starts) - 1:
            edges.append(e)
    return list(pairwise(edges))
