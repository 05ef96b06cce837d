"""Inducing sets: centres chosen from a pool that streams by, and the gradient directions each of them carries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.linalg import lapack
from torch import Tensor

from gpmlp.core import neighbors, parallel
from gpmlp.core.environments import Descriptor, StructureEnvironments, Surroundings
from gpmlp.core.structures import Structures
from gpmlp.fitting import selection
from gpmlp.gp import covariances
from gpmlp.gp.inducing import InducingBlock, independent_columns
from gpmlp.gp.kernels import ZonalKernel
from gpmlp.uncertainty.mahalanobis import Mahalanobis

WORTH = 3e-7  # of its prior variance: an environment with less left of its own is not worth an inducing point
MOST_WEIGHT = 10.0  # of novelty beside variance
TOGETHER = 32  # chunks that threads look at before all that was seen in them is pooled
POOL_BYTES = 128 << 20  # in memory while choosing; a fuller pool is thinned by the selection itself


@dataclass
class _Pool:
    """Environments of one species seen so far."""

    features: list[Tensor]
    surroundings: list[Surroundings]

    def size(self) -> int:
        return sum(len(f) for f in self.features)

    def merge(self) -> tuple[Tensor, Surroundings]:
        self.features = [torch.cat(self.features)]
        self.surroundings = [Surroundings.concatenate(self.surroundings)]
        return self.features[0], self.surroundings[0]

    def keep(self, chosen: Tensor) -> None:
        features, surroundings = self.merge()
        self.features, self.surroundings = [features[chosen]], [surroundings.select(chosen)]


def choose_centers(
    parts: Sequence[Structures],
    descriptor: Descriptor,
    kernel: ZonalKernel,
    method: str,
    n: int,
    shares: str | dict[int, int],
    seed: int,
    progress: Callable[[float], None],
    observe: Callable[[int, Tensor], None] = lambda z, features: None,
) -> tuple[dict[int, tuple[Tensor, Surroundings]], dict[int, int]]:
    """Stream over the structures once and choose n centres.

    Args:
        shares: 'species' (in proportion to how many environments there are), 'total' (the best of all species together) or
            a number for each species.
        observe: called with Z and features of all environments as they stream by.

    Returns:
        by species (features, surroundings) of the chosen centres, most important first; and the number of environments seen.
    """
    pools: dict[int, _Pool] = {}
    seen: dict[int, int] = {}

    def profile(s: Tensor) -> Tensor:
        return kernel.profile(s)[0]

    def look(part: Structures) -> tuple[Structures, Surroundings, Tensor]:
        surroundings = Surroundings.from_structures(part, neighbors.find_neighbors(part, descriptor.cutoff))
        return part, surroundings, descriptor(surroundings).features

    done = 0

    def take(looked: tuple[Structures, Surroundings, Tensor]) -> None:
        nonlocal done
        part, surroundings, features = looked
        for z in part.distinct_species:
            mine = (part.species == z).nonzero()[:, 0]
            pool = pools.setdefault(z, _Pool([], []))
            pool.features.append(features[mine])
            observe(z, pool.features[-1])
            pool.surroundings.append(surroundings.select(mine))
            seen[z] = seen.get(z, 0) + len(mine)
        if sum(pool.size() for pool in pools.values()) > _room(surroundings, features, n):
            spare = _quotas(2 * n, shares, seen)
            for z, pool in pools.items():
                merged, _ = pool.merge()
                pool.keep(selection.select_rows(method, merged, spare[z], profile, seed)[0].sort().values)
        done += 1
        progress(done)

    for start in range(0, len(parts), TOGETHER):
        parallel.map_pieces(look, parts[start : start + TOGETHER], take)
    quota = _quotas(n, shares, seen)
    chosen = {
        z: selection.select_rows(method, pool.merge()[0], quota[z], profile, seed + z) for z, pool in pools.items()
    }
    if shares == "total":
        chosen = _best_of_all(chosen, n)
    out = {}
    for z, pool in sorted(pools.items()):
        features, surroundings = pool.merge()
        out[z] = features[chosen[z][0]], surroundings.select(chosen[z][0])
    return out, seen


def _room(surroundings: Surroundings, features: Tensor, n: int) -> int:
    """How many such environments may be held while n are chosen."""
    # features twice while merging, a factor of pool x 2n at most in the selection, and the pairs
    per_pair = 3 * features.element_size() + 16
    own = 2 * (features.shape[1] + n) * features.element_size()
    return max(4 * n, POOL_BYTES // (own + per_pair * len(surroundings.centers) // max(1, len(surroundings))))


def _quotas(n: int, shares: str | dict[int, int], seen: dict[int, int]) -> dict[int, int]:
    if isinstance(shares, dict):
        scale = n / sum(shares.values())
        return {z: round(scale * shares.get(z, 0)) or 1 for z in seen}
    if shares == "total":
        return dict.fromkeys(seen, n)
    total = sum(seen.values())
    return {z: max(1, round(n * count / total)) for z, count in seen.items()}


def _best_of_all(chosen: dict[int, tuple[Tensor, Tensor]], n: int) -> dict[int, tuple[Tensor, Tensor]]:
    scores = torch.cat([s for _, s in chosen.values()])
    if len(scores) <= n:
        return chosen
    threshold = scores.topk(n).values[-1]
    return {z: (i[: max(1, int((s >= threshold).sum()))], s) for z, (i, s) in chosen.items()}


def gradient_directions(
    descriptor: Descriptor, surroundings: Surroundings, n_directions: int, block: int = 64
) -> Tensor:
    """Leading right singular vectors of the feature Jacobian of each centre: what small displacements of neighbours change most.

    Returns:
        (centres, n_directions, features) orthonormal rows, zero where the Jacobian has no more directions.
    """
    if not n_directions:
        return torch.zeros(len(surroundings), 0, descriptor.n_features, dtype=torch.float64)
    out = []
    for start in range(0, len(surroundings), block):
        part = surroundings.select(torch.arange(start, min(start + block, len(surroundings))))
        environments = descriptor(part)
        jacobian, n = environments.jacobian(), len(part)
        counts = torch.bincount(part.centers, minlength=n)
        slot = torch.arange(len(part.centers)) - (counts.cumsum(0) - counts)[part.centers].cpu()
        padded = jacobian.new_zeros(n, max(int(counts.max()), 1), 3, jacobian.shape[2])
        padded[part.centers, slot.to(part.centers.device)] = jacobian
        flat = padded.flatten(1, 2).double()  # squares of single precision would not tell directions from rounding
        values, vectors = _leading_eigenpairs(flat @ flat.transpose(1, 2), n_directions)
        rank = values.shape[1]
        usable = values > 1e-10 * values[:, :1].clamp_min(1e-300)
        scale = torch.where(usable, values.clamp_min(1e-300).rsqrt(), torch.zeros_like(values))
        tangents = (vectors.transpose(1, 2) @ flat) * scale[:, :, None]
        padding = tangents.new_zeros(n, n_directions - rank, tangents.shape[2])
        out.append(torch.cat([tangents, padding], dim=1))
    return torch.cat(out) if out else torch.zeros(0, n_directions, descriptor.n_features)


def _leading_eigenpairs(matrices: Tensor, at_most: int) -> tuple[Tensor, Tensor]:
    """Largest eigenvalues (batch, k), falling, and eigenvectors (batch, size, k) of positive matrices, k = min(at_most, size).

    Large matrices by subspace iteration (Halko, Martinsson, Tropp, SIAM Rev. 53, 217 (2011), algorithm 4.4): the last step is exact in
    the subspace found, so tangents come out orthonormal, and near-degenerate directions may mix, which does not matter here.
    """
    size = matrices.shape[1]
    k, width = min(at_most, size), at_most + 8
    if size <= 2 * width:
        values, vectors = torch.linalg.eigh(matrices)
        return values.flip(1)[:, :k], vectors.flip(2)[:, :, :k]
    generator = torch.Generator().manual_seed(0)
    basis = (
        torch.randn(size, width, generator=generator, dtype=torch.float64).to(matrices).expand(len(matrices), -1, -1)
    )
    for _ in range(6):
        basis = torch.linalg.qr(matrices @ basis).Q
    values, rotation = torch.linalg.eigh(basis.transpose(1, 2) @ matrices @ basis)
    return values.flip(1)[:, :k], (basis @ rotation).flip(2)[:, :, :k]


def make_block(
    species: int,
    features: Tensor,
    surroundings: Surroundings,
    descriptor: Descriptor,
    kernel: ZonalKernel,
    n_directions: int,
) -> tuple[InducingBlock, Tensor, float]:
    """Build the inducing block of one species, dependent columns dropped.

    Returns:
        the block, the Cholesky factor of its covariance, and the jitter that was needed.
    """
    tangents = gradient_directions(descriptor, surroundings, n_directions).to(features)
    every = torch.arange(len(features) * (1 + n_directions), device=features.device)
    kept, lower, jitter = independent_columns(kernel, InducingBlock(species, features, tangents, every))
    return InducingBlock(species, features, tangents, kept), lower, jitter


def choose_more(
    descriptor: Descriptor,
    kernel: ZonalKernel,
    blocks: Sequence[InducingBlock],
    lowers: Sequence[Tensor],
    signal: Tensor,
    structures: Structures,
    n: int,
    novelty: Mahalanobis | None,
    view: StructureEnvironments | None = None,
) -> list[InducingBlock | None]:
    """Environments that the present inducing variables represent worst, at most n, as blocks of their own.

    A pivoted Cholesky factorisation of the covariance that is left of the environments of each species given its block, in units
    of energy, weighted with their novelty where that is above 1: posterior variance and Mahalanobis distance together.

    Args:
        lowers: Cholesky factor of the covariance of each block.
        signal: (blocks,) standard deviation, eV.
        view: what the descriptor sees of the structures, if that is there already.

    Returns:
        for each block its new inducing variables, with tangents, all columns kept; None where there are none.
    """
    if not n:
        return [None] * len(blocks)
    view = view or StructureEnvironments.from_structures(descriptor, structures)
    features = view.environments.features
    weight = torch.ones(len(features), dtype=torch.float64)
    if novelty is not None:
        weight = novelty.novelty(structures.species, features.double()).clamp(1.0, MOST_WEIGHT)
    scores, chosen = [], []
    for block, lower, size in zip(blocks, lowers, signal.tolist(), strict=True):
        mine = (structures.species == block.species).nonzero()[:, 0]
        x = features[mine]
        known = covariances.atom_rows(x, structures.species[mine], kernel, (block,)).double()
        whitened = torch.linalg.solve_triangular(lower, known.T, upper=False)
        left = kernel.profile(x @ x.T)[0].double() - whitened.T @ whitened
        scale = weight[mine].sqrt() * size
        order, pivots = _pivots(left * scale[:, None] * scale, WORTH * size**2)
        scores.append(pivots)
        chosen.append(mine[order])
    every = torch.cat(scores)
    least = every.topk(min(n, len(every))).values.min() if len(every) else 0.0
    out: list[InducingBlock | None] = []
    for block, pivots, picks in zip(blocks, scores, chosen, strict=True):
        taken = picks[pivots >= least]
        tangents = gradient_directions(descriptor, view.surroundings.select(taken), block.tangents.shape[1]).to(
            features
        )
        columns = torch.arange(len(taken) * (1 + block.tangents.shape[1]))
        out.append(InducingBlock(block.species, features[taken], tangents, columns) if len(taken) else None)
    return out


def _pivots(matrix: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Order and values of the pivots of a Cholesky factorisation that are above `least`."""
    if not len(matrix):
        return torch.zeros(0, dtype=torch.long), matrix.new_zeros(0)
    lower, order, rank, _ = lapack.dpstrf(matrix.numpy(), tol=least, lower=1)
    pivots = torch.from_numpy(lower.diagonal()[:rank].copy()).square()
    above = pivots > least
    return torch.as_tensor(order[:rank] - 1, dtype=torch.long)[above], pivots[above]
