"""K_fu: covariances of energies, forces and stresses with inducing variables (values and gradients of the local energy)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise

import torch
from torch import Tensor

from gpmlp.core import parallel
from gpmlp.core.environments import StructureEnvironments, strain_derivatives
from gpmlp.core.neighbors import Neighbors, fits_compiled_loops
from gpmlp.core.padded_neighbors import padded_places
from gpmlp.core.structures import Structures
from gpmlp.gp.functionals import FunctionalBlock
from gpmlp.gp.inducing import InducingBlock
from gpmlp.gp.kernels import Profile, ZonalKernel
from gpmlp.native import library

BLOCK_BYTES = 1 << 20  # of one block of covariance rows: what stays in cache between its product and its scatter; and
BLOCK_ROWS = 256  # rows it has at least, as products of fewer are slow
ENVIRONMENTS = 32  # whose Jacobian is in memory at a time
SHARE = 128  # columns, at least, that are worth another thread
Block = InducingBlock | FunctionalBlock


@dataclass(frozen=True, eq=False)
class CovarianceRows:
    """K_fu: covariances of the observations of some structures with all inducing columns, unit signal variance.

    Attributes:
        energies: (structures, columns).
        forces: (3 atoms, columns), or of the atoms asked for; no rows if not asked for.
        stresses: (6 structures, columns) Voigt order xx yy zz yz xz xy; zero where there is no volume; no rows if not asked for.
    """

    energies: Tensor
    forces: Tensor
    stresses: Tensor

    @staticmethod
    def side_by_side(parts: Sequence[CovarianceRows]) -> CovarianceRows:
        """Of all descriptors: the columns of the parts in turn."""
        every = zip(*((p.energies, p.forces, p.stresses) for p in parts), strict=True)
        return CovarianceRows(*(torch.cat(rows, dim=1) for rows in every))


@dataclass(frozen=True, eq=False)
class SpeciesEnvironments:
    """Environments of one species with their Jacobian and pairs: all that covariance rows need of them, whatever the inducing set.

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
    environments: StructureEnvironments,
    species: int,
    derivatives: bool = True,
    mask: Tensor | None = None,
) -> Iterator[SpeciesEnvironments]:
    """The environments of a species, ENVIRONMENTS at a time.

    Args:
        derivatives: whether Jacobians are wanted.
        mask: (atoms,) of the environments wanted; all if None.
    """
    mine = structures.species == species
    for centers in (mine if mask is None else mine & mask).nonzero()[:, 0].split(ENVIRONMENTS):
        if not len(centers):
            continue
        part = environments.select(centers)
        pairs = part.surroundings
        jacobian = part.jacobian() if derivatives and len(pairs.centers) else None
        atoms = environments.neighbors.neighbors[environments.surroundings.pairs_of(centers)[1]]
        yield SpeciesEnvironments(species, centers, part.features, jacobian, pairs.centers, atoms, pairs.vectors)


def covariance_rows(
    structures: Structures,
    environments: StructureEnvironments,
    kernel: ZonalKernel,
    inducing: tuple[Block, ...],
    forces: bool = True,
    stresses: bool = True,
    atoms: Tensor | None = None,
) -> CovarianceRows:
    """K_fu by pull-back: GEMMs of a block's feature Jacobian with all centres and tangents of its species.

    Args:
        atoms: distinct atoms whose force rows are wanted, in that order; then only environments that they are part of are made, and
            `energies` and `stresses` are not to be used.
    """
    place, mask = _places(structures, environments.neighbors, atoms)

    def of_species(z: int) -> Iterator[SpeciesEnvironments]:
        return species_environments(structures, environments, z, forces or stresses, mask)

    return rows_from_environments(structures, of_species, kernel, inducing, forces, stresses, place)


def rows_from_environments(
    structures: Structures,
    of_species: Callable[[int], Iterable[SpeciesEnvironments]],
    kernel: ZonalKernel,
    inducing: tuple[Block, ...],
    forces: bool = True,
    stresses: bool = True,
    place: Tensor | None = None,
) -> CovarianceRows:
    """K_fu from the environments of each species.

    Args:
        place: (atoms + 1,) where the forces of each atom go; in their order if None.
    """
    like = structures.positions
    place = torch.arange(structures.n_atoms + 1, device=like.device) if place is None else place
    n, widths = len(structures), [b.n_columns for b in inducing]
    n_forces, n_stresses = int(place[-1]) if forces else 0, n if stresses else 0
    shapes = ((rows, sum(widths)) for rows in (n, 3 * n_forces, 6 * n_stresses))
    out = CovarianceRows(*(like.new_zeros(shape) for shape in shapes))
    fast = forces and fits_compiled_loops(like, *(b.features for b in inducing if isinstance(b, InducingBlock)))
    add = _add_compiled if fast else add_covariance_rows
    columns = zip(*(rows.split(widths, dim=1) for rows in (out.energies, out.forces, out.stresses)), strict=True)
    for block, (energies, of_forces, of_stresses) in zip(inducing, columns, strict=True):
        if isinstance(block, FunctionalBlock):
            bins = like.new_zeros(n_forces + 1 if forces else 0, 3, block.n_columns)
            here = energies, bins, of_stresses.unflatten(0, (n_stresses, 6))
            for z in block.central_species:
                for part in of_species(z):
                    _add_functional_rows(here, structures, part, kernel, block, place)
            of_forces.copy_(bins[:-1].flatten(0, 1))
            continue
        width, sums = len(block.vectors), None
        for part in of_species(block.species):
            # one atom more than there are: where forces that are not wanted may add without harm
            sums = sums or CovarianceRows(
                like.new_zeros(n, width),
                like.new_zeros(n_forces + 1 if forces else 0, 3, width),
                like.new_zeros(n_stresses, 6, width),
            )
            add(sums, structures, part, kernel, block, place)
        if sums is None:
            continue
        energies.copy_(block.take_columns(sums.energies))
        for rows, product in ((of_forces, sums.forces[:-1].flatten(0, 1)), (of_stresses, sums.stresses.flatten(0, 1))):
            by_direction = fast and len(block.features) < width
            rows.copy_(product[:, block.by_direction[1]] if by_direction else block.take_columns(product))
    return out


def atom_rows(features: Tensor, species: Tensor, kernel: ZonalKernel, inducing: tuple[Block, ...]) -> Tensor:
    """k_xu: (environments, columns) covariances of the local energies themselves, unit signal variance."""
    pieces = []
    for block in inducing:
        piece = features.new_zeros(len(features), block.n_columns)
        for z in block.central_species:
            mine = species == z
            if mine.all():
                piece = local_rows(kernel, block, z, features)
            else:
                piece[mine] = local_rows(kernel, block, z, features[mine])
        pieces.append(piece)
    return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]


def local_rows(
    kernel: ZonalKernel, block: Block, species: int, features: Tensor, profile: Profile | None = None
) -> Tensor:
    """k_xu: (environments, columns) covariances of local energies of one of the block's species with it, unit signal variance.

    Args:
        profile: f, f' and f'' of these with centres of which the first ones are the block's, if they are known.
    """
    if isinstance(block, FunctionalBlock):
        return block.local_rows(kernel, species, features)
    if not block.tangents.shape[1]:
        m = len(block.features)
        return block.take_columns(profile[0][:, :m] if profile else kernel.value(features @ block.features.T))
    return block.take_columns(_values(kernel, block, features, profile)[0])


def _values(
    kernel: ZonalKernel, block: InducingBlock, features: Tensor, profile: Profile | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k(x, u) = f(x.x_j) of values and f'(x.x_j) x.t of gradients (environments, M + M R); f' and f'' (environments, M); x.t."""
    m, r = block.tangents.shape[:2]
    value, first, second = (p[:, :m] for p in profile or kernel.profile(features @ block.features.T))
    along = (features @ block.tangents.flatten(0, 1).T).unflatten(1, (m, r))
    # cov(ε(x), ε(x_j)) = f(x.x_j)  and  cov(ε(x), ∂_t ε(x_j)) = f'(x.x_j) x.t
    return torch.cat([value, (first[:, :, None] * along).flatten(1)], dim=1) if r else value, first, second, along


def _places(structures: Structures, neighbors: Neighbors, atoms: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where the forces of each atom go (atoms + 1,), those not wanted and the last entry to a bin after all others; and which
    environments (atoms,) a wanted atom is part of."""
    n_atoms, device = structures.n_atoms, structures.positions.device
    if atoms is None:
        return torch.arange(n_atoms + 1, device=device), torch.ones(n_atoms, dtype=torch.bool, device=device)
    place = torch.full((n_atoms + 1,), len(atoms), device=device)
    place[atoms] = torch.arange(len(atoms), device=device)
    mask = place[:-1] < len(atoms)
    mask[neighbors.centers[mask[neighbors.neighbors]]] = True
    return place, mask


def add_covariance_rows(
    sums: CovarianceRows,
    structures: Structures,
    part: SpeciesEnvironments,
    kernel: ZonalKernel,
    block: InducingBlock,
    place: Tensor,
) -> None:
    """Add what environments of the block's species contribute to K_fu, columns as in `vectors`. With g_ij = ∂k(x_i, u)/∂r_ij:

    cov(E, u) = Σ_i k(x_i, u),   cov(F_i, u) = Σ_j (g_ij - g_ji),   cov(σ, u) = 1/V Σ_ij r_ij ⊗ g_ij, symmetrised.
    """
    energy, first, second, along = _values(kernel, block, part.features)
    owner = structures.structure_of_atom[part.centers]
    sums.energies.index_add_(0, owner, energy)
    if part.jacobian is None:
        return
    m, r = block.tangents.shape[:2]

    def slopes(rows: Tensor, of: Tensor) -> Tensor:
        """Derivatives of k(x, u) from those of the features (n, 3 or 6, features) of the environments `of`."""
        out = rows @ block.vectors.T
        # d/dr f(s) = f' J x_j  and  d/dr [f'(s) x.t] = f' J t + f'' (x.t) J x_j, in place
        on_values = out[..., :m]
        if r:
            on_tangents = out[..., m:].unflatten(-1, (m, r))
            on_tangents.mul_(first[of, None, :, None])
            on_tangents.addcmul_(on_values[..., None], (second[of, :, None] * along[of])[:, None])
        on_values.mul_(first[of, None, :])
        return out

    if len(sums.forces):
        size = max(1, BLOCK_BYTES // (3 * len(block.vectors) * part.jacobian.element_size()))
        centers, neighbors = place[part.centers][part.owners], place[part.atoms]
        for pairs in torch.arange(len(part.owners), device=owner.device).split(size):
            gradients = slopes(part.jacobian[pairs], part.owners[pairs])
            # F_i = Σ_j (g_ij - g_ji)
            sums.forces.index_add_(0, neighbors[pairs], gradients, alpha=-1)
            sums.forces.index_add_(0, centers[pairs], gradients)
    if len(sums.stresses):
        strains = strain_derivatives(part.jacobian, part.owners, part.vectors, len(owner))
        virials = slopes(strains, torch.arange(len(owner), device=owner.device))
        per_volume = torch.nan_to_num(1 / structures.volumes)[owner]
        sums.stresses.index_add_(0, owner, virials * per_volume[:, None, None])


def _add_functional_rows(
    sums: tuple[Tensor, Tensor, Tensor],
    structures: Structures,
    part: SpeciesEnvironments,
    kernel: ZonalKernel,
    block: FunctionalBlock,
    place: Tensor,
) -> None:
    """`add_covariance_rows` of functionals: g_ij = J_ij T_b(x_i).

    Args:
        sums: energies (structures, columns), forces (atoms + 1, 3, columns) and stresses (structures, 6, columns), either may be empty.
    """
    energies, forces, stresses = sums
    owner, n, derivatives = structures.structure_of_atom[part.centers], len(part.centers), []
    coordinates = partial(block.coordinates, part.species)
    slot, width = padded_places(part.owners, n)
    if part.jacobian is not None and len(forces):
        jacobian = coordinates(part.jacobian)
        table = jacobian.new_zeros(n * width, *jacobian.shape[1:])
        table[slot] = jacobian
        derivatives.append(table.view(n, 3 * width, -1))
    if part.jacobian is not None and len(stresses):
        strains = strain_derivatives(part.jacobian, part.owners, part.vectors, n)
        derivatives.append(coordinates(strains) * torch.nan_to_num(1 / structures.volumes)[owner, None, None])
    rows = torch.cat(derivatives, 1) if derivatives else None
    for columns, values, slopes in block.coupled(kernel, part.species, coordinates(part.features)):
        energies[:, columns].index_add_(0, owner, values)
        if rows is None:
            continue
        product = rows @ slopes.permute(1, 2, 0)
        if len(forces):
            gradients = product[:, : 3 * width].unflatten(1, (width, 3)).flatten(0, 1)[slot]
            # F_i = Σ_j (g_ij - g_ji)
            forces[..., columns].index_add_(0, place[part.atoms], gradients, alpha=-1)
            forces[..., columns].index_add_(0, place[part.centers][part.owners], gradients)
        if len(stresses):
            stresses[..., columns].index_add_(0, owner, product[:, -6:])


def _add_compiled(
    sums: CovarianceRows,
    structures: Structures,
    part: SpeciesEnvironments,
    kernel: ZonalKernel,
    block: InducingBlock,
    place: Tensor,
) -> None:
    """`add_covariance_rows` of forces, and stresses if wanted, by compiled loops; columns as in `by_direction`, shared by threads."""
    energy, first, second, along = _values(kernel, block, part.features)
    owner = structures.structure_of_atom[part.centers]
    sums.energies.index_add_(0, owner, energy)
    if part.jacobian is None:
        return
    jacobian, starts = part.jacobian.detach().flatten(0, 1), part.starts.tolist()
    bend = (second[:, :, None] * along).detach().transpose(1, 2).contiguous()
    weight = torch.nan_to_num(1 / structures.volumes)[owner]
    slopes = first.detach().contiguous(), bend, first.shape[1], bend.shape[1]
    about = part.starts, place[part.atoms], place[part.centers], owner, part.vectors.detach().contiguous(), weight
    given = *slopes, *about, sums.forces, len(sums.forces) - 1, sums.stresses, len(sums.stresses)

    def add_share(columns: tuple[int, int, Tensor]) -> None:
        begin, end, vectors = columns
        runs = _runs(starts, BLOCK_BYTES // (len(vectors) * jacobian.element_size()))
        most = max(starts[hi] - starts[lo] for lo, hi in runs)
        products = jacobian.new_empty(3 * most, len(vectors))
        for lo, hi in runs:
            rows = slice(3 * starts[lo], 3 * starts[hi])
            product = torch.mm(jacobian[rows], vectors.T, out=products[: rows.stop - rows.start])
            library.call("add_rows", product, lo, hi, begin, end, *given)

    parallel.map_pieces(add_share, _shares(block))


def _shares(block: InducingBlock) -> list[tuple[int, int, Tensor]]:
    """Ranges of centres, one for each thread, with their vectors `by_direction`; not more than are worth waking a thread for."""
    m, vectors = len(block.features), block.by_direction[0]
    pieces = max(1, min(parallel.available_threads(), m // SHARE))
    if pieces == 1:
        return [(0, m, vectors)]
    by_centre = vectors.unflatten(0, (-1, m))
    edges = [m * k // pieces for k in range(pieces + 1)]
    return [(a, b, by_centre[:, a:b].flatten(0, 1)) for a, b in pairwise(edges)]


def _runs(starts: Sequence[int], rows: int) -> list[tuple[int, int]]:
    """Consecutive environments with about so many rows together, but not fewer than BLOCK_ROWS; those without pairs are in any."""
    edges, least = [0], max(rows, BLOCK_ROWS) // 3
    for e in range(1, len(starts)):
        if starts[e] - starts[edges[-1]] >= least or e == len(starts) - 1:
            edges.append(e)
    return list(pairwise(edges))
