"""Covariances of energies, forces and stresses with inducing variables (values and gradients of the local energy)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gpmlp.environments import Descriptor, Surroundings
from gpmlp.gp.kernels import ZonalKernel
from gpmlp.neighbors import Neighbors
from gpmlp.structures import Structures

VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))
BLOCK_BYTES = 64 << 20  # of one block of covariance rows: a few times the cache, far below the factors


@dataclass(frozen=True, eq=False)
class InducingBlock:
    """Inducing variables of one central species: at each centre a value and R directional derivatives.

    Attributes:
        species: Z.
        features: (M, features) x_j, unit norm.
        tangents: (M, R, features) t_jr, orthonormal among themselves and orthogonal to x_j; zero rows where there are fewer.
        kept: (columns,) indices into the M values followed by M * R derivatives, those not linearly dependent on others.
    """

    species: int
    features: Tensor
    tangents: Tensor
    kept: Tensor

    @property
    def n_columns(self) -> int:
        return self.kept.shape[0]

    @property
    def vectors(self) -> Tensor:
        """(M + M R, features) the centres, then the tangents."""
        return torch.cat([self.features, self.tangents.flatten(0, 1)])

    @property
    def is_whole(self) -> bool:
        """Whether no column was dropped."""
        return self.n_columns == self.features.shape[0] + self.tangents.shape[0] * self.tangents.shape[1]

    def keep(self, columns: Tensor) -> Tensor:
        return columns if self.is_whole else columns[..., self.kept]


def covariance(kernel: ZonalKernel, a: InducingBlock, b: InducingBlock) -> Tensor:
    """(columns of a, columns of b) covariance of inducing variables of one species, unit signal variance.

    value-value f(s); value-gradient f'(s) (x_j . t_ks); gradient-gradient f''(s) (x_j . t_ks)(t_jr . x_k) + f'(s)(t_jr . t_ks).
    """
    (m, r), (n, q) = a.tangents.shape[:2], b.tangents.shape[:2]
    dots = a.vectors @ b.vectors.T
    value, first, second = kernel.profile(dots[:m, :n])
    x_t = dots[:m, n:].reshape(m, n, q)
    t_x = dots[m:, :n].reshape(m, r, n)
    t_t = dots[m:, n:].reshape(m, r, n, q)
    out = torch.empty_like(dots)
    out[:m, :n] = value
    out[:m, n:] = (first[:, :, None] * x_t).reshape(m, n * q)
    out[m:, :n] = (first[:, None, :] * t_x).reshape(m * r, n)
    mixed = t_t * first[:, None, :, None]
    mixed += second[:, None, :, None] * t_x[:, :, :, None] * x_t[:, None, :, :]
    out[m:, n:] = mixed.reshape(m * r, n * q)
    return out[a.kept][:, b.kept]


@dataclass(frozen=True, eq=False)
class Rows:
    """Covariances of the observations of some structures with all inducing columns.

    Attributes:
        energies: (structures, columns).
        forces: (3 atoms, columns), None if not asked for.
        stresses: (6 structures, columns) Voigt order xx yy zz yz xz xy; zero where there is no volume; None if not asked for.
    """

    energies: Tensor
    forces: Tensor | None
    stresses: Tensor | None


def rows(
    structures: Structures,
    neighbors: Neighbors,
    descriptor: Descriptor,
    kernel: ZonalKernel,
    inducing: tuple[InducingBlock, ...],
    forces: bool = True,
    stresses: bool = True,
) -> Rows:
    """Covariance rows by pull-back: GEMMs of a block's feature Jacobian with all centres and tangents of its species."""
    like = structures.positions
    n, atoms, columns = len(structures), structures.n_atoms, sum(b.n_columns for b in inducing)
    out = Rows(
        like.new_zeros(n, columns),
        like.new_zeros(3 * atoms, columns) if forces else None,
        like.new_zeros(6 * n, columns) if stresses else None,
    )
    surroundings = Surroundings.of(structures, neighbors)
    start = 0
    for block in inducing:
        here = slice(start, start + block.n_columns)
        start = here.stop
        mine = (structures.species == block.species).nonzero()[:, 0]
        vectors = block.vectors
        for centers in _batches(surroundings, mine, vectors.shape[0], forces or stresses):
            _add_block(out, here, structures, neighbors, surroundings, descriptor, kernel, block, vectors, centers)
    return out


def _batches(surroundings: Surroundings, wanted: Tensor, n_vectors: int, derivatives: bool) -> Iterator[Tensor]:
    """Split environments so that a block of rows has about BLOCK_BYTES."""
    if not len(wanted):
        return
    counts = torch.bincount(surroundings.centers, minlength=len(surroundings))[wanted]
    per_environment = (3 * int(counts.max()) + 9 if derivatives else 1) * n_vectors * surroundings.vectors.element_size()
    yield from wanted.split(max(1, BLOCK_BYTES // per_environment))


def _add_block(
    out: Rows,
    here: slice,
    structures: Structures,
    neighbors: Neighbors,
    surroundings: Surroundings,
    descriptor: Descriptor,
    kernel: ZonalKernel,
    block: InducingBlock,
    vectors: Tensor,
    centers: Tensor,
) -> None:
    """Add what the environments `centers` (one species) contribute to the rows of their structures."""
    local, pairs = surroundings.pairs_of(centers)
    environments = descriptor(surroundings.select(centers))
    m, r = block.tangents.shape[:2]
    dots = environments.features @ vectors.T
    value, first, second = kernel.profile(dots[:, :m])
    along = dots[:, m:].reshape(len(centers), m, r)
    energy = torch.cat([value, (first[:, :, None] * along).flatten(1)], dim=1) if r else value
    owner = structures.structure_of_atom[centers]
    out.energies[:, here].index_add_(0, owner, block.keep(energy))
    if out.forces is None and out.stresses is None or not len(pairs):
        return
    padded, slots = _padded_jacobian(environments, local, out.stresses is not None)
    gradients = (padded.flatten(0, 1) @ vectors.T).reshape(len(centers), padded.shape[1], -1)
    # d/dr f(s) = f' J x_j  and  d/dr [f'(s) x.t] = f' J t + f'' (x.t) J x_j, in place
    on_values = gradients[..., :m]
    if r:
        on_tangents = gradients[..., m:].unflatten(-1, (m, r))
        on_tangents.mul_(first[:, None, :, None])
        on_tangents.addcmul_(on_values[..., None], (second[:, :, None] * along)[:, None])
    on_values.mul_(first[:, None, :])
    if out.forces is not None:
        n_slots = 3 * (int(slots.max()) + 1)
        # F_i = sum_j (g_ij - g_ji); empty slots are zero rows, it does not matter whom they are added to
        away = centers[:, None].repeat(1, n_slots // 3)
        away[local, slots] = neighbors.neighbors[pairs]
        target = out.forces.unflatten(0, (-1, 3))[..., here]
        for index, part, sign in (
            (away.flatten(), gradients[:, :n_slots].unflatten(1, (-1, 3)).flatten(0, 1), -1),
            (centers, gradients[:, n_slots : n_slots + 3], 1),
        ):
            target.index_add_(0, index, block.keep(part), alpha=sign)
    if out.stresses is not None:
        volumes = structures.volumes[owner]
        per_volume = torch.nan_to_num(1 / volumes)
        virial = gradients[:, -6:] * per_volume[:, None, None]
        target = out.stresses[:, here].reshape(len(structures), 6, -1)
        target = target.index_add(0, owner, block.keep(virial))
        out.stresses[:, here] = target.flatten(0, 1)


def _padded_jacobian(environments, local: Tensor, stresses: bool) -> tuple[Tensor, Tensor]:
    """Jacobian rows of each environment: 3 for every neighbour slot, 3 for the centre (their sum), 6 for the virial.

    Returns:
        (environments, 3 slots + 3 (+ 6), features) and the slot of each pair.
    """
    jacobian = environments.jacobian()
    n_env, n_features = environments.features.shape
    counts = torch.bincount(local, minlength=n_env)
    slot = torch.arange(len(local), device=local.device) - (counts.cumsum(0) - counts)[local]
    n_slots = int(counts.max())
    extra = 9 if stresses else 3
    padded = jacobian.new_zeros(n_env, 3 * n_slots + extra, n_features)
    by_neighbor = padded[:, : 3 * n_slots].unflatten(1, (n_slots, 3))
    by_neighbor[local, slot] = jacobian
    displacements = jacobian.new_zeros(n_env, n_slots, 3)
    displacements[local, slot] = environments.surroundings.vectors
    # one small product per environment: [ones; r_x; r_y; r_z] (4, slots) times the Jacobian (slots, 3 features)
    left = torch.cat([torch.ones_like(displacements[..., :1]), displacements], dim=2).transpose(1, 2)
    sums = (left @ by_neighbor.flatten(2)).unflatten(2, (3, n_features))
    padded[:, 3 * n_slots : 3 * n_slots + 3] = sums[:, 0]
    if stresses:
        for k, (a, b) in enumerate(VOIGT):
            padded[:, 3 * n_slots + 3 + k] = 0.5 * (sums[:, 1 + a, b] + sums[:, 1 + b, a])
    return padded, slot
