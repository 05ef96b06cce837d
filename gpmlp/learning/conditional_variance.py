"""Conditioning tells how uncertain and how novel environments still are, were some of them labelled: no label is needed for that."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import torch
from torch import Tensor

from gpmlp.core.structures import Structures
from gpmlp.gp import covariances
from gpmlp.gp.local_variance import inducing_variance
from gpmlp.potential.potential import Potential
from gpmlp.uncertainty.mahalanobis import SpeciesClusters

FARTHEST = 1e12  # novelty of what cannot be compared with anything seen: finite, so that products with it are numbers
LEAST_NOISE = (
    1e-10  # variance of a label, relative to the prior variance of what it labels: above the rounding of covariances
)


@dataclass(eq=False)
class PoolCandidate:
    """The environments of one structure and what is known of them after the first `learned` pivots. Double precision, CPU.

    Attributes:
        species: (n,) Z.
        features: (n, features) of each descriptor.
        a, b: (n, columns) D L⁻¹ k_ug and R⁻ᵀ a (VarianceModel.whiten); no columns where no variance is wanted.
        factor: (n, learned) covariances with the pivots, whitened: C_iP G⁻ᵀ; no columns where no variance is wanted.
        variance: (n,) of the local energies, eV^2; zero where it is not wanted.
        novelty: (n,) distance in units of the threshold; one where it is not wanted.
    """

    species: Tensor
    features: tuple[Tensor, ...]
    a: Tensor
    b: Tensor
    factor: Tensor
    variance: Tensor
    novelty: Tensor
    learned: int = 0

    def __len__(self) -> int:
        return len(self.species)

    @property
    def n_bytes(self) -> int:
        return sum(t.nbytes for t in (*self.features, self.a, self.b, self.factor))

    @property
    def scores(self) -> Tensor:
        """(n,) standard deviation times novelty, whichever of them is wanted."""
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


class _Around:
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
        y, own = ((part - self._clusters.centre) @ self._clusters.components for part in (x, pivots))
        # |r - r'|² = |x - x'|² - |y - y'|²: all are far above rounding, relative to the least spread that clusters have
        across = (_squared(x, pivots) - _squared(y, own)).clamp_min(0)
        squared = [
            _squared(y @ w.T, own @ w.T) + across / s for w, s in zip(self._whitening, self._spread, strict=True)
        ]
        return torch.stack(squared).amin((0, 2)).sqrt()


class ConditionedUncertainty:
    """What a potential would say of environments, had those it was told of (`learn`) been labelled; labels themselves play no part.

    Variance: the posterior covariance of local energies, C_ij = w [k(x_i, x_j) - a_i.a_j] + b_i.b_j, conditioned on the pivots P, whose
    local energies count as observed with the noise of the energies per atom, s²: C - C_iP (C_PP + s² I)⁻¹ C_Pj by a Cholesky factor
    G Gᵀ = C_PP + s² I that grows by one row for each pivot (Rasmussen, Williams, Gaussian Processes (2006), eq. 2.26).
    Novelty: the distance to the nearest of the clusters seen and of the pivots, in the metric of the clusters.
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
        self._seen = {z: _Around(c) for z, c in self._novelty.species.items()} if self._novelty else {}

    def __len__(self) -> int:
        """Number of pivots."""
        return len(self._species)

    def look(self, structures: Structures) -> list[PoolCandidate]:
        """A candidate for each structure, before any pivot is taken into account."""
        own = structures.to(device=self._potential.recipe.device, dtype=getattr(torch, self._potential.recipe.dtype))
        terms = self._potential.terms if self._model else self._potential.terms[:1]
        views = [term.view(own) for term in terms]
        features = [_plain(v.environments.features) for v in views]
        species = structures.species.cpu()
        a = b = torch.zeros(len(species), 0, dtype=torch.float64)
        variance, novelty = torch.ones(len(species), dtype=torch.float64), torch.ones(len(species), dtype=torch.float64)
        if self._model is not None:
            every = zip(self._model.priors, self._model.blocks, views, strict=True)
            rows = [covariances.atom_rows(v.environments.features, own.species, p.kernel, u) for p, u, v in every]
            a, b = (_plain(part) for part in self._model.whiten(torch.cat(rows, dim=1)))
            prior = _plain(sum(p.atom_energies(own.species, own.positions) for p in self._model.priors))
            variance = inducing_variance(prior, a.square().sum(1), self._model.amplitude) + b.square().sum(1)
        if self._novelty is not None:
            novelty = self._novelty.novelty(species, features[0]).clamp_max(FARTHEST)
        ends = structures.offsets.cpu().tolist()
        out = []
        for first, last in zip(ends[:-1], ends[1:], strict=True):
            here = slice(first, last)
            parts = (x[here].clone() for x in (species, a, b, variance, novelty))
            own_species, own_a, own_b, own_variance, own_novelty = parts
            x = tuple(f[here].clone() for f in features)
            none = torch.zeros(last - first, 0, dtype=torch.float64)
            out.append(PoolCandidate(own_species, x, own_a, own_b, none, own_variance, own_novelty))
        return out

    def update(self, candidate: PoolCandidate) -> None:
        """Bring a candidate up to date with all pivots."""
        old, new = candidate.learned, len(self)
        if old == new:
            return
        candidate.learned = new
        if self._model is not None:
            g = self._factor.room[old:new]
            residual = self._covariance(candidate, old, new) - candidate.factor @ g[:, :old].T
            factor = torch.linalg.solve_triangular(g[:, old:new], residual.T, upper=False).T
            candidate.factor = torch.cat([candidate.factor, factor], dim=1)
            candidate.variance = (candidate.variance - factor.square().sum(1)).clamp_min(0)
        for z, around in self._seen.items():
            mine = (candidate.species == z).nonzero()[:, 0]
            first = bisect.bisect_left(around.pivots, old)
            if len(mine) and first < len(around.pivots):
                distance = around.distance(candidate.features[0][mine], first) / self._novelty.thresholds[z]
                candidate.novelty[mine] = torch.minimum(candidate.novelty[mine], distance)

    def learn(self, candidate: PoolCandidate, i: int) -> None:
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
        if z in self._seen:
            self._seen[z].append(candidate.features[0][i], len(self))
        self._species.append(z)
        self.update(candidate)

    def learn_all(self, candidate: PoolCandidate, at_most: int) -> None:
        """Make the environments of a structure pivots, the most telling first, as many as are allowed."""
        self.update(candidate)
        left = torch.ones(len(candidate), dtype=torch.bool)
        for _ in range(min(at_most, len(candidate))):
            best = int(torch.where(left, candidate.scores, -1.0).argmax())
            self.learn(candidate, best)
            left[best] = False

    def _covariance(self, candidate: PoolCandidate, old: int, new: int) -> Tensor:
        """C between the candidate and the pivots from old to new (n, new - old), eV^2."""
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
    learned = model.noise.get("energies", 0.0)
    prior = sum(p.signal.get(z, 0.0) ** 2 for p in model.priors)
    return max(min(learned, model.label_noise.get("energies", learned)) ** 2, LEAST_NOISE * prior)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().double().cpu()


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|² by differences: near pairs matter."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
