"""Mahalanobis distance of environments from the training data, by central species, and its novelty threshold."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import scipy.linalg
import scipy.special
import torch
from torch import Tensor

from gpmlp.core import errors

EXPLAINED = 1 - 1e-6  # share of the variance that the reduced space holds, where
COMPONENTS = 40  # dimensions are enough for it
DIRECTIONS = 200  # in which rows are left out in turn: beyond them there is nothing that a threshold would notice
RELATIVE_FLOOR = 1e-8  # least variance along any direction, relative to the variance of all features of the species,
ABSOLUTE_FLOOR = 1e-12  # and of unit vectors: their rounding in float32 is 6e-8
CLUSTERS = 6  # at most
MEMBERS = 30  # rows of a cluster at least
GAIN = 0.2  # fall of the BIC per row that one more cluster must bring: cutting one curved sheet in two brings less, and costs members
ROUNDING, LARGEST = 1e-6, 1e12  # of statistics that are read from a file: of unit vectors, and their sums
LEADING = 8  # components in which clusters are looked for
MIXTURE_ROWS = 2000  # rows on which they are looked for
FOLDS = 10  # of the structures, each of which is left out in turn
NEAR = 0.2  # of its distance from a tenth of the structures, within which a row repeats another
WIDEST = 2.0  # times the largest distance of a row left out, that few of them are extrapolated
LEAST_THRESHOLD = 1.0  # distance; below one standard deviation nothing is far


class ReservoirSample:
    """A reservoir sample: at most `size` of the rows of a stream, each subset equally likely, whatever the chunks and their order.

    Each row draws a uniform key, and those with the largest keys stay (Efraimidis, Spirakis, Inf. Process. Lett. 97, 181 (2006)).
    """

    def __init__(self, size: int, seed: int, before: int = 0) -> None:
        """Args: before: number of rows of the stream, at least, that others have taken (merge)."""
        errors.check_positive("size", size)
        self._size = size
        self._random = np.random.default_rng(seed)
        self._random.bit_generator.advance(before)  # type: ignore[attr-defined]  # a PCG64 has it
        self._keys = torch.zeros(0, dtype=torch.float64)
        self._owners = torch.zeros(0, dtype=torch.long)
        self._rows: Tensor | None = None

    def add(self, rows: Tensor, owners: Tensor) -> None:
        """Take a chunk (rows, features) with the number of the structure of each row (rows,); only rows that stay are copied."""
        keys, owners = torch.from_numpy(self._random.random(len(rows))), owners.cpu()
        if len(self._keys) == self._size:
            above = (keys > self._keys.min()).nonzero()[:, 0]
            rows, keys, owners = rows[above.to(rows.device)], keys[above], owners[above]
        self._take(rows.detach(), keys, owners)

    def merge(self, later: ReservoirSample) -> ReservoirSample:
        """The sample of both streams, the later one behind; neither is changed."""
        both = copy.copy(self)
        if later._rows is not None:
            both._take(later._rows, later._keys, later._owners)
        return both

    def _take(self, rows: Tensor, keys: Tensor, owners: Tensor) -> None:
        joined = rows if self._rows is None else torch.cat([self._rows, rows])
        keys, owners = torch.cat([self._keys, keys]), torch.cat([self._owners, owners])
        largest = keys.topk(min(self._size, len(keys))).indices.sort().values
        self._keys, self._owners, self._rows = keys[largest], owners[largest], joined[largest.to(joined.device)]

    def rows(self) -> Tensor:
        """The sample (at most size, features), in the order of the stream; (0, 0) of an empty stream."""
        return torch.zeros(0, 0, dtype=torch.float64) if self._rows is None else self._rows

    def owners(self) -> Tensor:
        """(rows,) number of the structure of each row of the sample."""
        return self._owners


@dataclass(frozen=True, eq=False)
class SpeciesClusters:
    """Clusters of the training environments of one central species: sufficient statistics in a reduced space, float64.

    With x − centre = Vy + r, y in the reduced space and r across it, the squared distance to cluster k of n rows is
    d² = (y − m_k)ᵀ S_k⁻¹ (y − m_k) + |r|²/s_k, with n S_k = Σ (y − m)(y − m)ᵀ + t_k I and n s_k = Σ |r|² + t_k: the rows, and one more
    along every direction, as far out as their mean square t_k. It is the mode of S under an inverse Wishart prior worth one row
    (Murphy, Machine Learning (2012), eq. 4.167), and says what n rows cannot: how far the next one reaches where none of them did.

    Attributes:
        centre: (features,)
        components: (features, r) V, orthonormal columns.
        variance: () mean |x − centre|² at the fit; the floor, for rounding, is relative to it.
        count: (clusters,) n.
        mean: (clusters, r) of y.
        scatter: (clusters, r, r) Σ (y − m)(y − m)ᵀ.
        residual: (clusters,) Σ |r|².
        spread: (clusters,) t, mean |x − centre of the cluster|² at the fit.
    """

    centre: Tensor
    components: Tensor
    variance: Tensor
    count: Tensor
    mean: Tensor
    scatter: Tensor
    residual: Tensor
    spread: Tensor

    @staticmethod
    def fit(rows: Tensor, labels: Tensor, spread: Tensor) -> SpeciesClusters:
        """Fit to (n, features) rows, n >= 1, with the cluster of each (n,); clusters without rows are left out."""
        x = rows.detach().double().cpu()
        return SpeciesClusters._empty(*_principal(x), spread).updated(x, labels)._without_empty()

    @staticmethod
    def _empty(centre: Tensor, components: Tensor, variance: Tensor, spread: Tensor) -> SpeciesClusters:
        k, r = len(spread), components.shape[1]
        count, mean, scatter, residual = (centre.new_zeros(shape) for shape in ((k,), (k, r), (k, r, r), (k,)))
        return SpeciesClusters(centre, components, variance, count, mean, scatter, residual, spread)

    def _without_empty(self) -> SpeciesClusters:
        there = self.count > 0
        names = ("count", "mean", "scatter", "residual", "spread")
        return replace(self, **{name: getattr(self, name)[there] for name in names})

    @cached_property
    def precision(self) -> tuple[Tensor, Tensor]:
        """(W, s): W_kᵀW_k = S_k⁻¹ (clusters, r, r), and s (clusters,)."""
        r = self.components.shape[1]
        floor = (RELATIVE_FLOOR * self.variance).clamp_min(ABSOLUTE_FLOOR)
        across = ((self.residual + self.spread) / self.count).clamp_min(floor)
        if not r:
            return self.scatter, across
        eye = torch.eye(r, dtype=self.scatter.dtype, device=self.scatter.device)
        more = (self.spread / self.count + floor)[:, None, None] * eye
        lower = torch.linalg.cholesky(self.scatter / self.count[:, None, None] + more)
        return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False), across

    @cached_property
    def whitening(self) -> tuple[Tensor, Tensor, Tensor]:
        """All W_k side by side (r, clusters r), -W_k m_k (clusters r,), and s (clusters,)."""
        whitening, across = self.precision
        offset = -(whitening @ self.mean[:, :, None])
        return whitening.flatten(0, 1).T.contiguous(), offset.flatten(), across

    def reduce(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(y, |r|²): (n, r) and (n,), of (n, features)."""
        centred = features - self.centre.to(features)
        components = self.components.to(features)
        y = centred @ components
        if features.dtype == torch.float64:  # Pythagoras leaves eps / RELATIVE_FLOOR of d², and saves half the time
            return y, (centred.square().sum(1) - y.square().sum(1)).clamp_min(0)
        return y, (centred - y @ components.T).square().sum(1)

    def squared(self, features: Tensor) -> Tensor:
        """d² = (y − m_k)ᵀ S_k⁻¹ (y − m_k) + |r|²/s_k to each cluster (n, clusters)."""
        y, residual = self.reduce(features)
        whitening, offset, across = (p.to(features) for p in self.whitening)
        z = torch.addmm(offset, y, whitening).unflatten(1, self.mean.shape)
        return z.square().sum(2) + residual[:, None] / across

    def distance(self, features: Tensor) -> Tensor:
        """min_k d_k (n,); infinite for features that are not numbers."""
        squared = self.squared(features).amin(1)
        squared = squared.masked_fill(squared.isnan(), math.inf)
        # the root has no derivative at 0: there it is 0
        zero = squared <= 0
        return squared.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)

    def updated(self, features: Tensor, labels: Tensor | None = None) -> SpeciesClusters:
        """Statistics with more rows, each in its nearest cluster or in that of its label; the reduced space stays."""
        x = features.detach().to(self.centre)
        nearest = self.squared(x).argmin(1) if labels is None else labels
        y, across = self.reduce(x)
        count, mean, scatter, residual = (t.clone() for t in (self.count, self.mean, self.scatter, self.residual))
        for k in nearest.unique().tolist():
            new, extra = y[nearest == k], across[nearest == k]
            centred = new - new.mean(0)
            step, n, total = new.mean(0) - mean[k], count[k].clone(), count[k] + len(new)
            # Chan, Golub, LeVeque, Am. Stat. 37, 242 (1983), eq. 2.1
            mean[k] += step * len(new) / total
            scatter[k] += centred.T @ centred + torch.outer(step, step) * n * len(new) / total
            count[k] = total
            residual[k] += extra.sum()
        return replace(self, count=count, mean=mean, scatter=scatter, residual=residual)

    def to(self, device: torch.device | str) -> SpeciesClusters:
        """The same on another device."""
        return SpeciesClusters(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass(frozen=True, eq=False)
class Mahalanobis:
    """Mahalanobis distances from the training environments and their thresholds, by central species.

    Attributes:
        species: by Z, the clusters.
        thresholds: by Z, the distance that a share `quantile` of environments left out stays below; at least LEAST_THRESHOLD.
        quantile: 0 to 1.
    """

    species: dict[int, SpeciesClusters]
    thresholds: dict[int, float]
    quantile: float

    def distance(self, species: Tensor, features: Tensor) -> Tensor:
        """Distance of environments to the nearest cluster of their species.

        Args:
            species: (n,) Z of the central atoms.
            features: (n, features) unit vectors; the result follows their type and device and can be differentiated in them.

        Returns:
            (n,), in standard deviations; infinite for a species without training data and for features that are not numbers.
        """
        self._check(species, features)
        distance = features.new_full((len(features),), math.inf)
        for z, clusters in self.species.items():
            here = (species == z).nonzero()[:, 0]
            if len(here):
                distance = distance.index_put((here,), clusters.distance(features[here]))
        return distance

    def novelty(self, species: Tensor, features: Tensor) -> Tensor:
        """Distance / threshold of the species (n,): above 1 is as far as few environments left out were; see `distance`."""
        threshold = features.new_ones(len(features))
        for z, value in self.thresholds.items():
            threshold = torch.where(species == z, value, threshold)
        return self.distance(species, features) / threshold

    def updated(self, species: Tensor, features: Tensor) -> Mahalanobis:
        """The same with more training environments, each added to its nearest cluster.

        Reduced spaces and thresholds stay as they are, and are right as long as the rows added are few; a species without training
        data remains so until the next fit.
        """
        self._check(species, features)
        renewed = dict(self.species)
        for z, clusters in self.species.items():
            if (species == z).any():
                renewed[z] = clusters.updated(features[species == z])
        return replace(self, species=renewed)

    def to(self, device: torch.device | str) -> Mahalanobis:
        """The same on another device."""
        return replace(self, species={z: c.to(device) for z, c in self.species.items()})

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """(Plain data for JSON, tensors by name) for the model file; from_state restores them exactly."""
        header = {"quantile": self.quantile, "thresholds": {str(z): t for z, t in self.thresholds.items()}}
        return header, {f"{z}.{f.name}": getattr(c, f.name) for z, c in self.species.items() for f in fields(c)}

    @staticmethod
    def from_state(header: dict, tensors: Mapping[str, Tensor]) -> Mahalanobis:
        """Restore what state gave, or what versions wrote that knew no `spread`."""
        thresholds = {int(z): t for z, t in header["thresholds"].items()}
        names = [f.name for f in fields(SpeciesClusters)]
        species = {}
        for z in thresholds:
            parts = {name: tensors[f"{z}.{name}"] for name in names if f"{z}.{name}" in tensors}
            _check_state(f"novelty.{z}.", parts)
            species[z] = SpeciesClusters(**parts) if "spread" in parts else _without_spread(**parts)
        return Mahalanobis(species, thresholds, header["quantile"])

    def _check(self, species: Tensor, features: Tensor) -> None:
        dimension = next((len(c.centre) for c in self.species.values()), "features")
        errors.check_shape("features", features, ("n", dimension))
        errors.check_shape("species", species, (len(features),), "One atomic number for each row of features.")


def _check_state(prefix: str, parts: Mapping[str, Tensor]) -> None:
    """Raise UserError unless the statistics of a species, read from a file, can be what they are called."""
    for name in ("centre", "components", "variance", "count", "mean", "scatter", "residual"):
        if name not in parts:
            raise errors.UserError(f"the tensor `{prefix}{name}` is missing.")
    d, r, k = (tuple(parts[name].shape)[-1:] for name in ("centre", "components", "count"))
    shapes = {
        "centre": d, "components": d + r, "variance": (), "count": k, "mean": k + r, "scatter": k + r + r, "residual": k, "spread": k,
    }  # fmt: skip
    for name, tensor in parts.items():
        errors.check_shape(prefix + name, tensor, shapes[name])
        if tensor.dtype != torch.float64:
            raise errors.UserError(f"the tensor `{prefix}{name}` must be of type float64.")
    lowest = {"variance": 0.0, "count": 1.0, "residual": 0.0, "spread": 0.0}
    for name, least in lowest.items():
        if name in parts and not bool((parts[name] >= least).all()):
            raise errors.UserError(f"the tensor `{prefix}{name}` holds a number below {least:g}.")
    for name, tensor in parts.items():
        if name != "count" and not bool((tensor.abs() <= LARGEST).all()):
            raise errors.UserError(f"the tensor `{prefix}{name}` holds a number beyond {LARGEST:g}.")
    v, s = parts["components"], parts["scatter"]
    if not torch.allclose(v.T @ v, torch.eye(v.shape[1], dtype=v.dtype), rtol=0, atol=ROUNDING):
        raise errors.UserError(f"the columns of `{prefix}components` are not orthonormal.")
    size = float(s.abs().max()) if s.numel() else 0.0
    if not torch.allclose(s, s.mT, rtol=0, atol=ROUNDING * size) or (
        s.numel() and float(torch.linalg.eigvalsh(s).min()) < -ROUNDING * size
    ):
        raise errors.UserError(f"`{prefix}scatter` is no sum of squares.")


def fit_mahalanobis(
    features: Mapping[int, Tensor],
    structures: Mapping[int, Tensor] | None = None,
    quantile: float = 0.99,
    seed: int = 0,
) -> Mahalanobis:
    """Fit the clusters of the training environments, and thresholds to those that are left out of such a fit in turn.

    Neighbours in one structure are alike, so whole structures are left out, and rows that repeat one of another structure (the same
    frame twice, the next step of a trajectory) count once. See `_threshold` for what few rows leave uncertain.

    Args:
        features: by Z of the central atom, (n, features) unit vectors, a subsample (ReservoirSample) of some thousands; a species
            without any counts as one without training data.
        structures: by Z, (n,) number of the structure of each row; each row one of its own if not given.
        seed: of the mixture and of the structures left out together.

    Raises:
        UserError: features that are not finite or not a matrix; a quantile outside 0 to 1.
    """
    if not 0 < quantile < 1:
        raise errors.UserError(f"`quantile` must lie between 0 and 1, as 0.99; got {quantile}.")
    species, thresholds = {}, {}
    for z in sorted(z for z, x in features.items() if len(x)):
        x, name = features[z], errors.chemical_symbol(z)
        errors.check_shape("features", x, ("n", "features"), f"Species {name}.")
        if not torch.isfinite(x).all():
            raise errors.UserError(f"`features` of {name} hold a NaN or infinite number.")
        owners = torch.arange(len(x)) if structures is None else structures[z].cpu()
        errors.check_shape("structures", owners, (len(x),), f"Species {name}, a structure for each row of features.")
        clusters, distances = _fit_species(x.detach().double().cpu(), owners, seed)
        species[z], thresholds[z] = clusters.to(x.device), _threshold(distances, quantile)
    return Mahalanobis(species, thresholds, quantile)


def _fit_species(x: Tensor, owners: Tensor, seed: int) -> tuple[SpeciesClusters, Tensor]:
    """Clusters of rows (n, features), and the distances of rows from clusters fitted without their structures, if there are others."""
    centre, directions, variance = _principal(x, DIRECTIONS, 1.0)
    y = (x - centre) @ directions
    kept = _distinct(y, owners)
    x, y, owners = x[kept], y[kept], owners[kept]
    labels = _labels(y, seed)
    sums = y.new_zeros(int(labels.max()) + 1, y.shape[1]).index_add(0, labels, y)
    count = labels.bincount()
    from_mean = (y - (sums / count[:, None])[labels]).square().sum(1)
    spread = y.new_zeros(len(count)).index_add(0, labels, from_mean) / count
    at, components, _ = _principal(y)
    clusters = SpeciesClusters._empty(centre + directions @ at, directions @ components, variance, spread)
    return clusters.updated(x, labels), _left_out(y, owners, labels, spread, seed)


def _left_out(rows: Tensor, owners: Tensor, labels: Tensor, spread: Tensor, seed: int) -> Tensor:
    """Distances (n,) of rows from the clusters of the others, FOLDS times a share of the structures left out; none of one structure."""
    structures, of_row = owners.unique(return_inverse=True)
    n = len(structures)
    if n < 2:
        return rows.new_zeros(0)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    fold = torch.empty(n, dtype=torch.long).scatter(0, order, torch.arange(n) % FOLDS)[of_row]
    distances = rows.new_zeros(len(rows))
    for k in fold.unique():
        out = fold == k
        distances[out] = SpeciesClusters.fit(rows[~out], labels[~out], spread).distance(rows[out])
    return distances


def _threshold(distances: Tensor, quantile: float) -> float:
    """The distance that a share `quantile` of new rows stays below: the geometric mean of two estimates, LEAST_THRESHOLD at least.

    The order statistic ⌈(n+1) quantile⌉, or the largest, assumes nothing, and is too small by chance where rows are few. The upper
    half of log d, taken as that of a normal distribution about the median, tells from all rows what the tail may be: the quantile of
    the next of n + 1, by Student's t (Hahn, Meeker, Statistical Intervals (1991), section 4.7), WIDEST times the largest at most.
    """
    n = len(distances)
    if n < 2:
        return LEAST_THRESHOLD
    ordered = distances.clamp_min(LEAST_THRESHOLD).sort().values
    order = ordered[min(n, math.ceil((n + 1) * quantile - 1e-9)) - 1].item()
    logs = ordered.log()
    middle = logs.quantile(0.5)
    width = (logs[logs >= middle] - middle).square().mean().sqrt().item()
    factor = float(scipy.special.stdtrit(n - 1, quantile)) * math.sqrt(1 + 1 / n)
    tail = min(math.exp(middle.item() + factor * width), WIDEST * ordered[-1].item())
    return max(LEAST_THRESHOLD, math.sqrt(order * tail))


def _distinct(rows: Tensor, owners: Tensor) -> Tensor:
    """Indices of rows that do not repeat another: none is within NEAR times the distance that it has from a tenth of the structures."""
    n, structures = len(rows), len(owners.unique())
    if structures < 2:
        return torch.arange(n)
    # by their leading coordinate, so that the order of the stream does not matter
    order = rows[:, :1].sum(1).argsort(stable=True)
    rows, owners = rows[order], owners[order]
    lengths = rows.square().sum(1)
    squared = (lengths[:, None] + lengths - 2 * rows @ rows.T).clamp_min(0)
    from_others = squared.masked_fill(owners[:, None] == owners, math.inf)
    typical = from_others.kthvalue(max(1, structures // 10), dim=1).values
    close = (squared <= NEAR**2 * typical[:, None]).tril(-1)  # to a row before it
    open_, kept = torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    while open_.any():
        new = open_ & ~(close & open_).any(1)
        kept |= new
        open_ &= ~(new | (close & kept).any(1))
    return order[kept].sort().values


def _without_spread(
    centre: Tensor, components: Tensor, variance: Tensor, count: Tensor, mean: Tensor, scatter: Tensor, residual: Tensor
) -> SpeciesClusters:
    """Clusters of a model file without `spread`, whose S was shrunk by OAS (Chen, Wiesel, Eldar, Hero, IEEE Trans. Signal Process. 58, 5016
    (2010), eq. 23) instead."""
    r = components.shape[1]
    if r:
        covariance = scatter / count[:, None, None]
        square, trace = covariance.square().mean((1, 2)), covariance.diagonal(dim1=1, dim2=2).mean(1)
        # ρ = (tr S² + tr² S)/((n + 1)(tr S² − tr² S/r)) but for terms of 1/r, as in scikit-learn
        below = (count + 1) * (square - trace.square() / r)
        rho = ((square + trace.square()) / below.clamp_min(1e-300)).clamp(max=1.0)[:, None, None]
        eye = torch.eye(r, dtype=scatter.dtype)
        scatter = ((1 - rho) * covariance + rho * trace[:, None, None] * eye) * count[:, None, None]
    return SpeciesClusters(centre, components, variance, count, mean, scatter, residual, torch.zeros_like(residual))


def _principal(x: Tensor, most: int = COMPONENTS, explained: float = EXPLAINED) -> tuple[Tensor, Tensor, Tensor]:
    """(centre, components, variance): the fewest leading principal directions with such a share of the variance, `most` at most."""
    centre = x.mean(0)
    centred = x - centre
    variance = centred.square().sum(1).mean()
    if variance <= ABSOLUTE_FLOOR:  # rows equal but for rounding have no directions
        return centre, x.new_zeros(x.shape[1], 0), variance
    wide = len(x) < x.shape[1]
    gram = (centred @ centred.T if wide else centred.T @ centred) / len(x)
    top = (max(0, len(gram) - most), len(gram) - 1)
    values, vectors = (torch.from_numpy(a) for a in scipy.linalg.eigh(gram.numpy(), subset_by_index=top))
    values, vectors = values.flip(0), vectors.flip(1)
    short = int((values.cumsum(0) < explained * variance).sum()) + 1
    rank = min(short, int((values > 1e-12 * values[0]).sum()))
    leading = vectors[:, :rank]
    if wide:
        leading = torch.linalg.qr(centred.T @ leading / (len(x) * values[:rank]).sqrt()).Q
    # the sign of an eigenvector is chance: its largest entry is positive
    largest = leading.gather(0, leading.abs().argmax(0, keepdim=True))
    return centre, leading * largest.sign(), variance


def _labels(y: Tensor, seed: int) -> Tensor:
    """Cluster (n,) of each row of reduced coordinates: a Gaussian mixture, its size chosen by BIC, small clusters dissolved."""
    n = len(y)
    one = torch.zeros(n, dtype=torch.long)
    if n < 2 * MEMBERS or not y.shape[1]:
        return one
    from sklearn.exceptions import ConvergenceWarning  # slow to import
    from sklearn.mixture import GaussianMixture

    z = (y[:, :LEADING] / y[:, :LEADING].std(0)).numpy()
    # sorted before rows are drawn, so that the order of the stream does not matter
    ordered = z[np.argsort(z[:, 0], kind="stable")]
    rows = np.random.default_rng(seed).choice(n, min(n, MIXTURE_ROWS), replace=False)
    sample = ordered[np.sort(rows)]
    least, best = math.inf, GaussianMixture(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a rough mixture is enough
        for k in range(1, CLUSTERS + 1):
            mixture = GaussianMixture(k, random_state=seed).fit(sample)
            score = mixture.bic(sample) + GAIN * k * len(sample)
            if score < least:
                least, best = score, mixture
            elif k > best.n_components + 1:  # two in a row are worse
                break
    raw = torch.from_numpy(best.predict(z))
    large = (torch.bincount(raw, minlength=best.n_components) >= MEMBERS).nonzero()[:, 0]
    if len(large) < 2:
        return one
    to_means = torch.cdist(torch.from_numpy(z), torch.from_numpy(best.means_)[large])
    new = torch.full((best.n_components,), -1).scatter(0, large, torch.arange(len(large)))[raw]
    return torch.where(new < 0, to_means.argmin(1), new)
