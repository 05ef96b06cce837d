"""Selection from a pool of the structures, or environments, most worth a label: by conditional variance and novelty, or by descriptors."""

from __future__ import annotations

import bisect
import functools
import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gpmlp import descriptors
from gpmlp.core import errors, neighbors
from gpmlp.core.environments import Descriptor, Surroundings
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import CHUNK_ATOMS, Structures, chunk_structures
from gpmlp.fitting import defaults, sparse_points
from gpmlp.gp.local_variance import inducing_variance
from gpmlp.potential.potential import Potential
from gpmlp.recipe import Recipe
from gpmlp.uncertainty.mahalanobis import SpeciesClusters

FARTHEST = 1e12  # novelty of a species without clusters: finite, so that products with it are numbers
LEAST_NOISE = 1e-10  # variance of a label, relative to the prior variance: above the rounding of covariances

BY_MODEL = ("both", "variance", "mahalanobis")
METHODS = (*BY_MODEL, "farthest", "cur", "random")
UNITS = {method: {"variance": " eV", "both": " eV"}.get(method, "") for method in METHODS}  # of the scores
LIKE = 0.01  # |x - x'| of unit features: displacements of about a hundredth of an A; nearer environments are the same
CACHE_BYTES = 512 << 20  # of candidates; those not used for longest are made again when they are asked for
ROW_BYTES = 256 << 20  # of the rows that 'farthest' and 'cur' compare; longer rows are projected to random directions
EXCLUDED_ROWS = 4096  # of what is excluded: from which 'farthest' keeps away, or that count as labelled
PIVOTS = 32  # environments of a picked structure that count as labelled, at most; fewer where there would be more than
ALL_PIVOTS = 6000  # of all structures together: their covariance is held in memory
LITTLE = 0.03  # of the highest score of the pool, below which excluded structures need not be conditioned on

Progress = Callable[[str, float, float], None]


@dataclass(frozen=True, eq=False)
class PoolSelection:
    """The selected structures or environments, best first.

    Attributes:
        method: of METHODS.
        structures: (n,) index of the structure, or of the structure that holds the environment.
        atoms: (n,) index of the environment's atom in the pool; None where structures were selected.
        scores: (n,) when it was selected, given those before. 'variance': standard deviation of the most uncertain local energy, eV;
            'mahalanobis': largest novelty, in thresholds; 'both': their product; 'farthest': squared distance to the nearest one
            before; 'cur', 'random': the key that was drawn.
        repeats: how many, at the end, are like others before: nothing else was left.
    """

    method: str
    structures: Tensor
    atoms: Tensor | None
    scores: Tensor
    repeats: int

    def places(self, pool: Structures) -> list[int] | None:
        """The index of each environment's atom within its structure; None where structures were selected."""
        return None if self.atoms is None else (self.atoms - pool.offsets.cpu()[self.structures]).tolist()


def select_pool(
    pool: Structures,
    n: int,
    method: str | None = None,
    potential: Potential | None = None,
    environments: bool = False,
    seed: int = 0,
    exclude: Structures | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> PoolSelection:
    """Select n structures, or n environments, of the pool.

    Args:
        method: of METHODS; if not given, 'both' where the potential has variances and novelty, else the one that it has, else 'farthest'.
        environments: whether single environments are selected.
        seed: of 'cur' and 'random'; the others draw nothing.
        exclude: structures that are labelled already; what is like them is not selected, and variances are conditioned on them.

    Raises:
        UserError: more asked for than there is; a method that needs a model, or a part of it, that is not there; a species
            that the model does not know; everything is like what is excluded.
    """
    method = _method(method, potential)
    size = pool.n_atoms if environments else len(pool)
    what = "environments" if environments else "structures"
    if n < 1:
        raise errors.UserError(f"The number to pick must be 1 or more; got {n}.")
    if n > size:
        raise errors.UserError(f"Cannot pick {n} {what}: the pool holds {size}.")
    if potential is not None:
        potential.check_species(pool if exclude is None else Structures.concatenate([pool, exclude]))
    descriptor, species = _descriptor(pool, exclude, potential)
    excluded, done = _EnvironmentSet(), 0
    for part, x in _streamed(descriptor, exclude) if exclude is not None else ():
        excluded.add(part.species, x)
        done += len(part)
        progress("excluded", done, len(exclude) if exclude is not None else 0)
    picks = _Picks(pool, n, environments, excluded, progress)
    if method in BY_MODEL and potential is not None:
        conditioned = ConditionedUncertainty(potential, method != "mahalanobis", method != "variance")
        labelled = _CandidateCache(exclude, conditioned, "known", progress) if exclude is not None else None
        _pick_greedily(_CandidateCache(pool, conditioned, "pool", progress), labelled, conditioned, picks)
    else:
        picks = _pick_in_order(method, descriptor, species, picks, exclude, seed)
    return picks.selection(method)


def _method(method: str | None, potential: Potential | None) -> str:
    has = {
        "variance": potential is not None and potential.variances is not None,
        "mahalanobis": potential is not None and potential.novelty is not None,
    }
    has["both"] = all(has.values())
    if method is None:
        return next((m for m in BY_MODEL if has[m]), "farthest")
    errors.check_choice("method", method, METHODS)
    if not has.get(method, True):
        if potential is None:
            others = ", ".join(m for m in METHODS if m not in BY_MODEL)
            raise errors.UserError(f"The method '{method}' needs a model; give one, or choose one of: {others}.")
        missing = "posterior factor (recipe: variance)" if not has["variance"] else "novelty (recipe: novelty)"
        raise errors.UserError(f"The method '{method}' needs a model fitted with its {missing}; this one has none.")
    return method


def _descriptor(
    pool: Structures, exclude: Structures | None, potential: Potential | None
) -> tuple[Descriptor, tuple[int, ...]]:
    """The first descriptor of the model, or that of the default recipe; and its species."""
    if potential is not None:
        return potential.terms[0].descriptor, potential.species
    species = sorted({*pool.distinct_species, *(exclude.distinct_species if exclude is not None else ())})
    summary = defaults.summarise_data(pool, Targets.unlabelled(pool))
    resolved = defaults.resolve_recipe(Recipe(), summary, len(species))
    return descriptors.make_descriptor(tuple(species), resolved.descriptors[0].model_dump()), tuple(species)


def _features(descriptor: Descriptor, structures: Structures) -> Tensor:
    surroundings = Surroundings.from_structures(structures, neighbors.find_neighbors(structures, descriptor.cutoff))
    return descriptor(surroundings).features.detach().double()


def _streamed(descriptor: Descriptor, structures: Structures) -> Iterator[tuple[Structures, Tensor]]:
    for part in chunk_structures(structures.to(device="cpu"), CHUNK_ATOMS):
        yield part, _features(descriptor, part)


class _EnvironmentSet:
    """Environments by species, that others can be compared with."""

    def __init__(self) -> None:
        self._features: dict[int, list[Tensor]] = {}

    def add(self, species: Tensor, x: Tensor) -> None:
        for z in species.unique().tolist():
            # single precision rounds x.x' by 1e-7, which is nothing against LIKE²
            self._features.setdefault(z, []).append(x[species == z].float())

    def holds(self, species: Tensor, x: Tensor) -> Tensor:
        """(n,) whether each environment is within LIKE of one of the set."""
        out = torch.zeros(len(x), dtype=torch.bool)
        for z in species.unique().tolist():
            if z not in self._features:
                continue
            self._features[z] = [torch.cat(self._features[z])]
            mine = (species == z).nonzero()[:, 0]
            rows = x[mine].float()
            # |x - x'|² = 2 - 2 x.x'
            nearest = torch.stack([(rows @ part.T).amax(1) for part in self._features[z][0].split(8192)]).amax(0)
            out[mine] = 2 - 2 * nearest <= LIKE**2
        return out


class _Picks:
    """What has been picked so far; refuses what is excluded, and sets repeats aside for when nothing else is left."""

    def __init__(
        self, pool: Structures, n: int, environments: bool, excluded: _EnvironmentSet, progress: Progress
    ) -> None:
        self.pool, self.n, self.environments, self.progress = pool, n, environments, progress
        self.excluded, self._environments = excluded, _EnvironmentSet()
        self.offsets = pool.offsets.tolist()
        self.owners = pool.structure_of_atom.cpu()
        self._picked: list[tuple[int, float]] = []
        self._repeats: list[tuple[int, float]] = []

    @property
    def size(self) -> int:
        return self.pool.n_atoms if self.environments else len(self.pool)

    @property
    def full(self) -> bool:
        return len(self._picked) == self.n

    def offer(self, item: int, score: float, species: Tensor, x: Tensor) -> bool:
        """Pick a structure, or an atom, with the species and features of its environments, unless there is a reason not to."""
        excluded = self.excluded.holds(species, x)
        if excluded.all():
            return False
        if (excluded | self._environments.holds(species, x)).all():
            self._repeats.append((item, score))
            return False
        self._environments.add(species, x)
        self._picked.append((item, score))
        self.report()
        return True

    def report(self) -> None:
        """Say how many are picked; the last one ends the stage."""
        self.progress("picking", len(self._picked), self.n)

    def selection(self, method: str) -> PoolSelection:
        every = (self._picked + self._repeats)[: self.n]
        if len(every) < self.n:
            what = "environments" if self.environments else "structures"
            raise errors.UserError(
                f"Cannot pick {self.n} {what}: only {len(every)} of the {self.size} are unlike all that are excluded."
            )
        self.progress("picking", self.n, self.n)
        items = torch.tensor([item for item, _ in every])
        scores = torch.tensor([score for _, score in every], dtype=torch.float64)
        owners, atoms = (self.owners[items], items) if self.environments else (items, None)
        return PoolSelection(method, owners, atoms, scores, self.n - len(self._picked))


class _CandidateCache:
    """The candidates of a pool: computed in one pass, dropped when memory is short, computed again when asked for."""

    def __init__(self, pool: Structures, conditioned: ConditionedUncertainty, name: str, progress: Progress) -> None:
        self.pool, self.conditioned, self._name, self._progress = pool.to(device="cpu"), conditioned, name, progress
        self._cached: OrderedDict[int, tuple[PoolCandidate, int]] = OrderedDict()
        self._bytes = 0

    def queue(self) -> list[tuple[float, int]]:
        """A heap of (− highest score, number) of all candidates."""
        queue: list[tuple[float, int]] = []
        for part in chunk_structures(self.pool, CHUNK_ATOMS):
            for candidate in self.conditioned.candidates(part):
                self._store(len(queue), candidate)
                queue.append((-float(candidate.scores.max()), len(queue)))
            self._progress(self._name, len(queue), len(self.pool))
        heapq.heapify(queue)
        return queue

    def __getitem__(self, s: int) -> PoolCandidate:
        """Candidate s, up to date."""
        candidate, n_bytes = self._cached.pop(s, (None, 0))
        self._bytes -= n_bytes
        if candidate is None:
            candidate = self.conditioned.candidates(self.pool.select([s]))[0]
        self.conditioned.update(candidate)
        self._store(s, candidate)
        return candidate

    def _store(self, s: int, candidate: PoolCandidate) -> None:
        self._cached[s] = candidate, candidate.n_bytes
        self._bytes += candidate.n_bytes
        while self._bytes > CACHE_BYTES and self._cached:
            _, (_, n_bytes) = self._cached.popitem(last=False)
            self._bytes -= n_bytes


def _pick_greedily(
    pool: _CandidateCache, labelled: _CandidateCache | None, conditioned: ConditionedUncertainty, picks: _Picks
) -> None:
    """Pick what has the highest score given all that was picked before.

    Scores only fall as more is conditioned on, so an old one is an upper bound, and a candidate whose bound is below the best score
    need not be updated (Minoux, Optimization Techniques 7, 234 (1978)): the order is the exact one, at a fraction of the work.
    """
    queue = pool.queue()
    if labelled is not None:
        _condition_on_labelled(labelled, conditioned, -queue[0][0])
    left = torch.ones(picks.pool.n_atoms, dtype=torch.bool)
    at_most = max(1, min(PIVOTS, ALL_PIVOTS // picks.n))
    while queue and not picks.full:
        picks.report()
        bound, s = heapq.heappop(queue)
        candidate, first = pool[s], picks.offsets[s]
        scores = torch.where(left[first : first + len(candidate)], candidate.scores, -1.0)
        best = int(scores.argmax())
        score = float(scores[best])
        if score < -bound and queue and score < -queue[0][0]:
            heapq.heappush(queue, (-score, s))
            continue
        species, x = candidate.species, candidate.features[0]
        if not picks.environments:
            if picks.offer(s, score, species, x):
                conditioned.condition_on_structure(candidate, at_most)
            continue
        left[first + best] = False
        if picks.offer(first + best, score, species[best : best + 1], x[best : best + 1]):
            conditioned.condition_on(candidate, best)
        if left[first : first + len(candidate)].any():
            heapq.heappush(queue, (-score, s))


def _condition_on_labelled(labelled: _CandidateCache, conditioned: ConditionedUncertainty, highest: float) -> None:
    """Condition on what is excluded, the most uncertain first, until its scores are small against the highest of the pool."""
    queue = labelled.queue()
    while queue and len(conditioned) < EXCLUDED_ROWS:
        bound, s = heapq.heappop(queue)
        if -bound <= LITTLE * highest:
            return
        candidate = labelled[s]
        score = float(candidate.scores.max())
        if score < -bound and queue and score < -queue[0][0]:
            heapq.heappush(queue, (-score, s))
        else:
            conditioned.condition_on_structure(candidate, PIVOTS)


def _pick_in_order(
    method: str,
    descriptor: Descriptor,
    species: tuple[int, ...],
    picks: _Picks,
    exclude: Structures | None,
    seed: int,
) -> _Picks:
    """Pick in the order of gpmlp.fitting.sparse_points, which is asked for more where something is refused."""
    pool, n, size = picks.pool.to(device="cpu"), picks.n, picks.size
    rows = labelled = torch.zeros(size, 1)
    if method != "random":
        rows = _rows(descriptor, species, picks.pool, picks)
    if method == "farthest" and exclude is not None:
        every = exclude.n_atoms if picks.environments else len(exclude)
        labelled = _rows(descriptor, species, exclude, picks)[:: -(-every // EXCLUDED_ROWS)]
    ask = n
    while True:
        if method == "farthest":
            order, scores = sparse_points.farthest_points(rows, ask, labelled if exclude is not None else None)
        else:
            order, scores = sparse_points.select_rows(method, rows, ask, torch.abs, seed)
        items = list(zip(order.tolist(), scores.tolist(), strict=True))
        if ask == size:  # 'farthest' and 'cur' leave exact duplicates out
            items += [(i, 0.0) for i in sorted(set(range(size)) - set(order.tolist()))]
        picks = _Picks(picks.pool, n, picks.environments, picks.excluded, picks.progress)
        for item, score in items:
            s = int(picks.owners[item]) if picks.environments else item
            one = pool.select([s])
            atom = item - picks.offsets[s]
            here = slice(atom, atom + 1) if picks.environments else slice(None)
            picks.offer(item, score, one.species[here], _features(descriptor, one)[here])
            if picks.full:
                return picks
        if ask == size:
            return picks
        ask = min(2 * ask, size)


def _rows(descriptor: Descriptor, species: tuple[int, ...], structures: Structures, picks: _Picks) -> Tensor:
    """What 'farthest' and 'cur' compare, one row for each structure or environment of the pool or of what is excluded.

    Structures: the mean of the unit features of each species, one after another. Environments: features, and one more coordinate for
    each species, which is 1 for that of the centre. Features that do not fit into ROW_BYTES are projected to random directions
    (Johnson, Lindenstrauss, Contemp. Math. 26, 189 (1984)), the same whatever the structures.
    """
    blocks = 1 if picks.environments else len(species)
    width = min(descriptor.n_features, max(64, ROW_BYTES // (8 * blocks * picks.size)))
    projections: dict[int, Tensor] = {}
    out, done = [], 0
    for part, x in _streamed(descriptor, structures):
        picks.progress("features", done := done + len(part), len(structures))
        slot = torch.tensor([species.index(z) for z in part.species.tolist()])
        if picks.environments:
            centre = torch.nn.functional.one_hot(slot, len(species)).double()
            out.append(torch.cat([_projected(x, width, 0, projections), centre], dim=1))
            continue
        means = x.new_zeros(len(species), len(part), width)
        for k in slot.unique().tolist():
            mine = (slot == k).nonzero()[:, 0]
            owner = part.structure_of_atom[mine]
            counts = torch.bincount(owner, minlength=len(part)).clamp_min(1)
            means[k].index_add_(0, owner, _projected(x[mine], width, k, projections) / counts[owner, None])
        out.append(means.transpose(0, 1).flatten(1))
    return torch.cat(out)


def _projected(x: Tensor, width: int, block: int, projections: dict[int, Tensor]) -> Tensor:
    if width == x.shape[1]:
        return x
    if block not in projections:
        generator = torch.Generator().manual_seed(block)
        projections[block] = torch.randn(x.shape[1], width, generator=generator, dtype=torch.float64) / width**0.5
    return x @ projections[block]


@dataclass(eq=False)
class PoolCandidate:
    """The environments of one structure, conditioned on the first `pivots` pivots. Double precision, CPU.

    Attributes:
        species: (n,) Z; features: (n, features) of each descriptor.
        a, b: (n, columns) D L⁻¹ k_ug and R⁻ᵀ a (VarianceModel.whiten); factor: (n, pivots) covariances with the pivots, whitened:
            C_iP G⁻ᵀ; no columns where no variance is wanted.
        variance: (n,) of the local energies, eV^2; novelty: (n,) in thresholds; one where it is not wanted.
    """

    species: Tensor
    features: tuple[Tensor, ...]
    a: Tensor
    b: Tensor
    factor: Tensor
    variance: Tensor
    novelty: Tensor
    pivots: int = 0

    def __len__(self) -> int:
        return len(self.species)

    @property
    def n_bytes(self) -> int:
        return sum(t.nbytes for t in (*self.features, self.a, self.b, self.factor))

    @property
    def scores(self) -> Tensor:
        """(n,) standard deviation times novelty, of which one may be left out."""
        return self.variance.sqrt() * self.novelty


class _Rows:
    """A matrix that grows by rows, with room for more than it holds."""

    def __init__(self, width: int) -> None:
        self.room = torch.zeros(16, width, dtype=torch.float64)
        self.n = 0

    def append(self, row: Tensor) -> None:
        if self.n == len(self.room):
            self.room = torch.cat([self.room, torch.zeros_like(self.room)])
        if len(row) > self.room.shape[1]:
            self.room = torch.nn.functional.pad(self.room, (0, max(len(row), self.room.shape[1])))
        self.room[self.n, : len(row)] = row
        self.n += 1


class _PivotDistances:
    """Distances from pivots of one species in the metric of its clusters: for each, as from its mean, min_k d_k (Clusters)."""

    def __init__(self, clusters: SpeciesClusters) -> None:
        self.pivots: list[int] = []
        self._clusters = clusters
        self._whitening, self._spread = clusters.precision
        self._rows = _Rows(len(clusters.centre))

    def append(self, x: Tensor, pivot: int) -> None:
        self._rows.append(x)
        self.pivots.append(pivot)

    def distance(self, x: Tensor, first: int) -> Tensor:
        """Distance of x (n, features) to the nearest of the pivots from the first-th on (n,)."""
        pivots = self._rows.room[first : self._rows.n]
        y, z = ((part - self._clusters.centre) @ self._clusters.components for part in (x, pivots))
        # |r - r'|² = |x - x'|² - |y - y'|²: all are far above rounding, relative to the least width that clusters have
        across = (_squared(x, pivots) - _squared(y, z)).clamp_min(0)
        squared = [_squared(y @ w.T, z @ w.T) + across / s for w, s in zip(self._whitening, self._spread, strict=True)]
        return torch.stack(squared).amin((0, 2)).sqrt()


class ConditionedUncertainty:
    """Variance and novelty of environments under a potential, conditioned on labels of pivots, whose values play no part.

    Variance: the posterior covariance of local energies, C_ij = w [k(x_i, x_j) - a_i.a_j] + b_i.b_j, conditioned on the pivots P, whose
    local energies count as observed with the noise of the energies per atom, s²: C - C_iP (C_PP + s² I)⁻¹ C_Pj by a Cholesky factor
    G Gᵀ = C_PP + s² I that grows by one row for each pivot (Rasmussen, Williams, Gaussian Processes (2006), eq. 2.26).
    Novelty: the distance to the nearest of the clusters and of the pivots, in the metric of the clusters.
    Both only fall as pivots are added.
    """

    def __init__(self, potential: Potential, variance: bool, novelty: bool) -> None:
        model = potential.variances if variance else None
        self._potential, self._model = potential, model
        self._novelty = potential.novelty.to("cpu") if novelty and potential.novelty else None
        self._species: list[int] = []
        columns = model.n_columns if model else 0
        self._features = [_Rows(t.descriptor.n_features) for t in potential.terms] if model else []
        self._a, self._b, self._factor = _Rows(columns), _Rows(columns), _Rows(16)
        self._distances = {z: _PivotDistances(c) for z, c in self._novelty.species.items()} if self._novelty else {}

    def __len__(self) -> int:
        """Number of pivots."""
        return len(self._species)

    def candidates(self, structures: Structures) -> list[PoolCandidate]:
        """A candidate for each structure, before any pivot is taken into account."""
        moved = structures.to(device=self._potential.recipe.device, dtype=getattr(torch, self._potential.recipe.dtype))
        terms = self._potential.terms if self._model else self._potential.terms[:1]
        environments = [term.environments(moved) for term in terms]
        features = [_plain(v.environments.features) for v in environments]
        species = structures.species.cpu()
        a = b = torch.zeros(len(species), 0, dtype=torch.float64)
        variance, novelty = torch.ones(len(species), dtype=torch.float64), torch.ones(len(species), dtype=torch.float64)
        if self._model is not None:
            rows = self._model.atom_rows([v.environments for v in environments])
            a, b = (_plain(part) for part in self._model.whiten(rows))
            priors = [p.atom_energies(moved.species, moved.positions) for p in self._model.priors]
            prior = _plain(functools.reduce(torch.add, priors))
            variance = inducing_variance(prior, a.square().sum(1), self._model.amplitude) + b.square().sum(1)
        if self._novelty is not None:
            novelty = self._novelty.novelty(species, features[0]).clamp_max(FARTHEST)
        columns = (t.split(structures.counts.tolist()) for t in (species, a, b, variance, novelty, *features))
        out = []
        for parts in zip(*columns, strict=True):
            z, a, b, variance, novelty, *x = (part.clone() for part in parts)
            out.append(PoolCandidate(z, tuple(x), a, b, torch.zeros(len(z), 0, dtype=torch.float64), variance, novelty))
        return out

    def update(self, candidate: PoolCandidate) -> None:
        """Bring a candidate up to date with all pivots: variance C_ii - |G⁻¹ C_Pi|², novelty = the least of those by cluster and pivot."""
        old, new = candidate.pivots, len(self)
        if old == new:
            return
        candidate.pivots = new
        if self._model is not None:
            g = self._factor.room[old:new]
            residual = self._covariance(candidate, old, new) - candidate.factor @ g[:, :old].T
            factor = torch.linalg.solve_triangular(g[:, old:new], residual.T, upper=False).T
            candidate.factor = torch.cat([candidate.factor, factor], dim=1)
            candidate.variance = (candidate.variance - factor.square().sum(1)).clamp_min(0)
        for z, around in self._distances.items():
            mine = (candidate.species == z).nonzero()[:, 0]
            first = bisect.bisect_left(around.pivots, old)
            if len(mine) and first < len(around.pivots) and self._novelty:
                distance = around.distance(candidate.features[0][mine], first) / self._novelty.thresholds[z]
                candidate.novelty[mine] = torch.minimum(candidate.novelty[mine], distance)

    def condition_on(self, candidate: PoolCandidate, i: int) -> None:
        """Make environment i of a candidate a pivot, and bring the candidate up to date."""
        self.update(candidate)
        z = int(candidate.species[i])
        if self._model is not None:
            corner = (candidate.variance[i] + label_variance(self._potential, z)).sqrt()
            self._factor.append(torch.cat([candidate.factor[i], corner[None]]))
            self._a.append(candidate.a[i])
            self._b.append(candidate.b[i])
            for rows, x in zip(self._features, candidate.features, strict=True):
                rows.append(x[i])
        if z in self._distances:
            self._distances[z].append(candidate.features[0][i], len(self))
        self._species.append(z)
        self.update(candidate)

    def condition_on_structure(self, candidate: PoolCandidate, at_most: int) -> None:
        """Make the environments of a structure pivots, those of the highest scores first, as many as are allowed."""
        self.update(candidate)
        left = torch.ones(len(candidate), dtype=torch.bool)
        for _ in range(min(at_most, len(candidate))):
            best = int(torch.where(left, candidate.scores, -1.0).argmax())
            self.condition_on(candidate, best)
            left[best] = False

    def _covariance(self, candidate: PoolCandidate, old: int, new: int) -> Tensor:
        """C between the candidate and the pivots from old to new (n, new - old), eV^2."""
        assert self._model is not None, "without a model novelty alone is asked"
        z = torch.tensor(self._species[old:new])
        out = -candidate.a @ self._a.room[old:new].T
        for prior, x, pivots in zip(self._model.priors, candidate.features, self._features, strict=True):
            signal = torch.tensor([prior.signal.get(k, 0.0) ** 2 for k in z.tolist()], dtype=torch.float64)
            kernel = prior.kernel.profile(x @ pivots.room[old:new].T)[0]
            out = out + torch.where(candidate.species[:, None] == z, signal * kernel, 0.0)
        return self._model.amplitude * out + candidate.b @ self._b.room[old:new].T


def label_variance(potential: Potential, z: int) -> float:
    """s², the variance of the label of a local energy of species z, eV^2: that of energies per atom, as far as it is of the labels."""
    model = potential.variances
    assert model is not None
    learned = model.noise.get("energies", 0.0)
    prior = sum(p.signal.get(z, 0.0) ** 2 for p in model.priors)
    return max(min(learned, model.label_noise.get("energies", learned)) ** 2, LEAST_NOISE * prior)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().double().cpu()


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|² by differences: near pairs matter."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
