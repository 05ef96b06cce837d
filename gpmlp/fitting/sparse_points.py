"""Inducing sets: selection of rows of a feature matrix, centres chosen in one pass over the data, and their gradient directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpmlp.core import errors, neighbors, parallel
from gpmlp.core.environments import Descriptor, StructureEnvironments, Surroundings
from gpmlp.core.structures import Structures
from gpmlp.gp import covariances
from gpmlp.gp.inducing import InducingBlock, independent_columns, pivoted_cholesky
from gpmlp.gp.kernels import ZonalKernel
from gpmlp.uncertainty.mahalanobis import Mahalanobis

METHODS = ("greedy", "farthest", "cur", "random")

WORTH = 3e-7  # of its prior variance: an environment with less left of its own is not worth an inducing point
MOST_WEIGHT = 10.0  # of novelty, the factor on a variance
TOGETHER = 32  # chunks that threads describe before their environments are pooled
POOL_BYTES = 128 << 20  # in memory while choosing; a fuller pool is thinned by the selection itself


@dataclass(frozen=True, eq=False)
class CentreChoice:
    """How centres are chosen.

    Attributes:
        method: of METHODS; n: how many.
        shares: 'species' (in proportion to how many environments there are), 'total' (the best of all species together) or
            a number for each species.
    """

    descriptor: Descriptor
    kernel: ZonalKernel
    method: str
    n: int
    shares: str | dict[int, int]
    seed: int

    def select(self, features: Tensor, wanted: int, seed: int) -> tuple[Tensor, Tensor]:
        """As select_rows."""
        return select_rows(self.method, features, wanted, self.kernel.value, seed)


@dataclass
class _Pool:
    """Candidate environments of one species."""

    features: list[Tensor]
    surroundings: list[Surroundings]

    def size(self) -> int:
        return sum(len(f) for f in self.features)

    def merge(self) -> tuple[Tensor, Surroundings]:
        self.features = [torch.cat(self.features)]
        self.surroundings = [Surroundings.concatenate(self.surroundings)]
        return self.features[0], self.surroundings[0]

    def merged(self, chosen: Tensor) -> tuple[Tensor, Surroundings]:
        features, surroundings = self.merge()
        return features[chosen], surroundings.select(chosen)

    def keep(self, chosen: Tensor) -> None:
        features, surroundings = self.merged(chosen)
        self.features, self.surroundings = [features], [surroundings]


Observe = Callable[
    [int, Tensor, Tensor], object
]  # Z, features and number of the structure of environments with neighbors


class Candidates:
    """Environments among which centres are chosen, collected as structures stream by.

    A pool that is full is thinned to twice the centres by the selection itself, and so are two pools that are too much together:
    what is chosen depends on the order of the structures and on where the stream was cut, on nothing else.
    """

    def __init__(self, choice: CentreChoice) -> None:
        self.choice = choice
        self.counts: dict[int, int] = {}
        self.pools: dict[int, _Pool] = {}

    def collect(
        self,
        parts: Sequence[Structures],
        told: Callable[[int], object] = lambda done: None,
        observe: Observe = lambda z, features, structures: None,
    ) -> Candidates:
        """With the environments of chunks of structures; `told` is called with the number of chunks done."""
        descriptor, done, structures = self.choice.descriptor, 0, 0

        def describe(part: Structures) -> tuple[Structures, Surroundings, Tensor]:
            surroundings = Surroundings.from_structures(part, neighbors.find_neighbors(part, descriptor.cutoff))
            return part, surroundings, descriptor(surroundings).features

        def take(described: tuple[Structures, Surroundings, Tensor]) -> None:
            nonlocal done, structures
            part, surroundings, features = described
            surrounded = surroundings.surrounded
            for z in part.distinct_species:
                mine = (part.species == z).nonzero()[:, 0]
                pool = self.pools.setdefault(z, _Pool([], []))
                pool.features.append(features[mine])
                with_neighbors = mine[surrounded[mine]]
                observe(z, features[with_neighbors], structures + part.structure_of_atom[with_neighbors])
                pool.surroundings.append(surroundings.select(mine))
                self.counts[z] = self.counts.get(z, 0) + len(mine)
            self._thin([surroundings], features)
            structures += len(part)
            done += 1
            told(done)

        for start in range(0, len(parts), TOGETHER):
            parallel.map_pieces(describe, parts[start : start + TOGETHER], take)
        return self

    def merge(self, later: Candidates) -> Candidates:
        """The candidates of both, later ones behind; neither is changed."""
        both = Candidates(self.choice)
        for z in [*self.pools, *(z for z in later.pools if z not in self.pools)]:
            pools = [c.pools[z] for c in (self, later) if z in c.pools]
            both.pools[z] = _Pool([f for p in pools for f in p.features], [s for p in pools for s in p.surroundings])
            both.counts[z] = self.counts.get(z, 0) + later.counts.get(z, 0)
        if both.pools:
            every = list(both.pools.values())
            both._thin([s for pool in every for s in pool.surroundings], every[0].features[0])
        return both

    def _thin(self, like: Sequence[Surroundings], features: Tensor) -> None:
        """Keep no more than may be in memory of such environments."""
        if sum(pool.size() for pool in self.pools.values()) > _room(like, features, self.choice.n):
            spare = _quotas(2 * self.choice.n, self.choice.shares, self.counts)
            for z, pool in self.pools.items():
                pool.keep(self.choice.select(pool.merge()[0], spare[z], self.choice.seed)[0].sort().values)

    def chosen(self) -> dict[int, tuple[Tensor, Surroundings]]:
        """By species (features, surroundings) of the centres, most important first."""
        c = self.choice
        quota = _quotas(c.n, c.shares, self.counts)
        best = {z: c.select(pool.merge()[0], quota[z], c.seed + z) for z, pool in self.pools.items()}
        if c.shares == "total":
            best = _best_of_all(best, c.n)
        return {z: pool.merged(best[z][0]) for z, pool in sorted(self.pools.items())}


def _room(like: Sequence[Surroundings], features: Tensor, n: int) -> int:
    """Number of such environments that may be in memory while n are chosen."""
    # features twice while merging, a factor of pool x 2n at most in the selection, and the pairs
    per_pair = 3 * features.element_size() + 16
    per_environment = 2 * (features.shape[1] + n) * features.element_size()
    pairs, environments = sum(len(s.centers) for s in like), sum(len(s) for s in like)
    return max(4 * n, POOL_BYTES // (per_environment + per_pair * pairs // max(1, environments)))


def _quotas(n: int, shares: str | dict[int, int], counts: dict[int, int]) -> dict[int, int]:
    if isinstance(shares, dict):
        scale = n / sum(shares.values())
        return {z: round(scale * shares.get(z, 0)) or 1 for z in counts}
    if shares == "total":
        return dict.fromkeys(counts, n)
    total = sum(counts.values())
    return {z: max(1, round(n * count / total)) for z, count in counts.items()}


def _best_of_all(chosen: dict[int, tuple[Tensor, Tensor]], n: int) -> dict[int, tuple[Tensor, Tensor]]:
    scores = torch.cat([s for _, s in chosen.values()])
    if len(scores) <= n:
        return chosen
    threshold = scores.topk(n).values[-1]
    return {z: (i[: max(1, int((s >= threshold).sum()))], s) for z, (i, s) in chosen.items()}


def gradient_directions(
    descriptor: Descriptor, surroundings: Surroundings, n_directions: int, block: int = 64
) -> Tensor:
    """Leading right singular vectors of the feature Jacobian of each centre: the changes that displaced neighbours bring about.

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
    independent, lower, jitter = independent_columns(kernel, InducingBlock(species, features, tangents, every))
    return InducingBlock(species, features, tangents, independent), lower, jitter


def choose_more(
    descriptor: Descriptor,
    kernel: ZonalKernel,
    blocks: Sequence[InducingBlock],
    lowers: Sequence[Tensor],
    signal: Tensor,
    structures: Structures,
    n: int,
    novelty: Mahalanobis | None,
    environments: StructureEnvironments | None = None,
) -> list[InducingBlock | None]:
    """Environments that the present inducing variables represent worst, at most n, as blocks of their own.

    A pivoted Cholesky factorisation of the covariance that is left of the environments of each species given its block, in units
    of energy, weighted with their novelty where that is above 1: posterior variance and Mahalanobis distance together.

    Args:
        lowers: Cholesky factor of the covariance of each block.
        signal: (blocks,) standard deviation, eV.
        environments: the environments of the structures, if they are there already.

    Returns:
        for each block its new inducing variables, with tangents, all columns kept; None where there are none.
    """
    if not n:
        return [None] * len(blocks)
    environments = environments or StructureEnvironments.from_structures(descriptor, structures)
    features = environments.environments.features
    weight = torch.ones(len(features), dtype=torch.float64)
    if novelty is not None:
        weight = novelty.novelty(structures.species, features.double()).clamp(1.0, MOST_WEIGHT)
    scores, chosen = [], []
    for block, lower, size in zip(blocks, lowers, signal.tolist(), strict=True):
        mine = (structures.species == block.species).nonzero()[:, 0]
        x = features[mine]
        cross = covariances.atom_rows(x, structures.species[mine], kernel, (block,)).double()
        whitened = torch.linalg.solve_triangular(lower, cross.T, upper=False)
        left = kernel.profile(x @ x.T)[0].double() - whitened.T @ whitened
        scale = weight[mine].sqrt() * size
        worth = WORTH * size**2
        order, pivots = pivoted_cholesky(left * scale[:, None] * scale, worth)
        scores.append(pivots[pivots > worth])
        chosen.append(mine[order[pivots > worth]])
    every = torch.cat(scores)
    least = every.topk(min(n, len(every))).values.min() if len(every) else 0.0
    out: list[InducingBlock | None] = []
    for block, pivots, picks in zip(blocks, scores, chosen, strict=True):
        taken = picks[pivots >= least]
        n_directions = block.tangents.shape[1]
        tangents = gradient_directions(descriptor, environments.surroundings.select(taken), n_directions).to(features)
        columns = torch.arange(len(taken) * (1 + n_directions))
        out.append(InducingBlock(block.species, features[taken], tangents, columns) if len(taken) else None)
    return out


def select_rows(
    method: str, features: Tensor, n: int, kernel: Callable[[Tensor], Tensor], seed: int
) -> tuple[Tensor, Tensor]:
    """Choose up to n rows by the named method.

    Args:
        features: (pool, features) unit rows.
        kernel: f, the covariance as a function of the dot product, f(1) = 1 (used by 'greedy').
        seed: of the random choices ('cur', 'random').

    Returns:
        (chosen,) distinct indices, most important first, and their scores, never rising: selections from several pools are merged
        by taking the highest scores. Exact duplicates are chosen at most once by 'greedy', 'farthest' and 'cur', so fewer
        than n may come back.
    """
    errors.check_choice("selection method", method, METHODS)
    generator = torch.Generator().manual_seed(seed)
    n = min(n, features.shape[0])
    if method == "greedy":
        # variances that are left are below the rounding of single precision
        indices, scores = greedy_selection(features.double(), n, kernel)
        return indices, scores.to(features)
    if method == "farthest":
        return farthest_points(features, n)
    if method == "cur":
        return cur_selection(features, n, generator)
    keys = torch.rand(features.shape[0], generator=generator, dtype=torch.float64).to(features.device).topk(n)
    return keys.indices, keys.values


def greedy_selection(
    features: Tensor, n: int, kernel: Callable[[Tensor], Tensor], tolerance: float = 1e-10, slack: float = 0.8
) -> tuple[Tensor, Tensor]:
    """Pivoted Cholesky: each next point has (nearly) the largest variance given those already chosen.

    Works in rounds so that the inner products are matrix products: of the candidates with the largest variance, those are taken,
    in turn, whose variance given all before them is at least `slack` times the largest outside; slack = 1 is the exact greedy order.
    Stops where no variance above `tolerance` is left (Foster et al., JMLR 10, 857 (2009), section 4).
    """
    pool = features.shape[0]
    variance = torch.ones(pool, dtype=features.dtype, device=features.device)
    factor = features.new_zeros(n, pool)  # Lᵀ: few long rows are multiplied twice as fast as many short ones
    chosen: list[int] = []
    scores: list[float] = []
    while len(chosen) < n and variance.max() > tolerance:
        size = min(64, pool)
        top = variance.topk(min(size + 1, pool))
        candidates, outside = top.indices[:size], float(top.values[-1]) if pool > size else 0.0
        k = len(chosen)
        past = factor[:k, candidates]
        block = kernel(features[candidates] @ features[candidates].T) - past.T @ past
        taken = _pivots(block, variance[candidates], n - k, max(slack * outside, tolerance))
        picks = candidates[taken]
        # L_k for the new columns: (K - L Lᵀ)[picks] = chol @ new
        residual = kernel(features[picks] @ features.T)
        residual.addmm_(factor[:k, picks].T, factor[:k], alpha=-1)
        corner = torch.linalg.cholesky(block[taken][:, taken] + tolerance * 1e-4 * torch.eye(len(taken)).to(block))
        new = torch.linalg.solve_triangular(corner, residual, upper=False)
        factor[k : k + len(taken)] = new
        variance = (variance - new.square().sum(0)).clamp_min(0)
        variance[picks] = 0
        chosen.extend(picks.tolist())
        scores.extend(corner.diagonal().square().tolist())
    order = torch.tensor(scores, dtype=features.dtype).cummin(0).values if scores else torch.zeros(0)
    return torch.tensor(chosen, dtype=torch.long, device=features.device), order.to(features)


def _pivots(block: Tensor, variance: Tensor, at_most: int, threshold: float) -> list[int]:
    """Pivoted Cholesky inside a small block, until the best variance falls below the threshold; at least one pivot."""
    block, left = block.cpu().clone(), variance.cpu().clone()
    taken: list[int] = []
    while len(taken) < min(at_most, len(left)):
        best = int(left.argmax())
        if taken and (left[best] < threshold or left[best] <= 0):
            break
        taken.append(best)
        column = block[:, best] / block[best, best].clamp_min(1e-300).sqrt()
        block = block - column[:, None] * column[None, :]
        left = torch.minimum(left, block.diagonal().clone())
        left[taken] = -1
    return taken


def farthest_points(features: Tensor, n: int, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Farthest-point sampling in the distance |x - x'|, starting from the point farthest from the mean.

    Args:
        given: (m, features) rows that count as chosen before; the first point is then the one farthest from all of them.
    """
    distance = (features - features.mean(0)).square().sum(1)
    chosen: list[int] = []
    scores: list[float] = []
    if given is not None and len(given):
        distance = torch.full_like(distance, torch.inf)
        squares = features.square().sum(1)
        for part in given.split(256):
            nearest = (part.square().sum(1) - 2 * features @ part.T).amin(1)
            distance = torch.minimum(distance, (squares + nearest).clamp_min(0))
    else:
        chosen, scores = [int(distance.argmax())], [4.0]
        distance = (features - features[chosen[0]]).square().sum(1)
    while len(chosen) < n and distance.max() > 1e-14:
        chosen.append(int(distance.argmax()))
        scores.append(float(distance.max()))
        distance = torch.minimum(distance, (features - features[chosen[-1]]).square().sum(1))
    return (
        torch.tensor(chosen, dtype=torch.long, device=features.device),
        torch.tensor(scores, dtype=torch.float64).to(features),
    )


def cur_selection(features: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sampling without replacement by leverage scores (Mahoney, Drineas, PNAS 106, 697 (2009)), duplicates aside."""
    distinct = _distinct(features)
    unique = features[distinct]
    values, vectors = torch.linalg.eigh(unique.T @ unique)
    rank = max(1, min(n, int((values > 1e-10 * values[-1]).sum())))
    scores = (unique @ (vectors[:, -rank:] * values[-rank:].rsqrt())).square().sum(1)
    # Gumbel keys: the n largest are a weighted sample without replacement
    uniform = torch.rand(len(unique), generator=generator, dtype=torch.float64).to(features.device)
    keys = scores.clamp_min(1e-300).log() - (-uniform.clamp(1e-12, 1 - 1e-12).log()).log()
    best = keys.topk(min(n, len(unique)))
    return distinct[best.indices], best.values.to(features)


def _distinct(features: Tensor) -> Tensor:
    """Indices of the first of each group of equal rows (to 1e-10)."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(features.shape[1], 2, generator=generator, dtype=torch.float64).to(features)
    keys = ((features @ probe) * 1e9).round()
    _, inverse = torch.unique(keys, dim=0, return_inverse=True)
    order = torch.arange(len(inverse), device=features.device)
    first = torch.full((int(inverse.max()) + 1,), len(inverse), dtype=torch.long, device=features.device)
    return first.scatter_reduce(0, inverse, order, "amin").sort().values
