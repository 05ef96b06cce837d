"""Mahalanobis distance of environments from the training data, by central species, and its novelty threshold."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from gpmlp.core import errors

EXPLAINED = 1 - 1e-6  # share of the variance that the reduced space holds, where
COMPONENTS = 40  # dimensions are enough for it
RELATIVE_FLOOR = 1e-8  # least variance along any direction, relative to the variance of all features of the species,
ABSOLUTE_FLOOR = 1e-12  # and of unit vectors: their rounding in float32 is 6e-8
CLUSTERS = 6  # at most
MEMBERS = 30  # rows of a cluster at least
GAIN = 0.2  # fall of the BIC per row that one more cluster must bring: cutting one curved sheet in two brings less, and costs members
LEADING = 8  # components in which clusters are looked for
MIXTURE_ROWS = 2000  # rows on which they are looked for
HELD_OUT = 20  # rows of a species from which its threshold can be learned
FOLDS = 5  # of the rows, where too few were held out
FEW = 500  # rows up to which each of the folds is left out in turn; above, one of them
LEAST_THRESHOLD = 1.0  # distance; below one standard deviation nothing is far


class ReservoirSample:
    """A reservoir sample: at most `size` of the rows of a stream, each subset equally likely, whatever the chunks and their order.

    Each row draws a uniform key, and those with the largest keys stay (Efraimidis, Spirakis, Inf. Process. Lett. 97, 181 (2006)).
    """

    def __init__(self, size: int, seed: int) -> None:
        errors.check_positive("size", size)
        self._size = size
        self._random = np.random.default_rng(seed)
        self._keys = torch.zeros(0, dtype=torch.float64)
        self._rows: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Take a chunk (rows, features); only rows that stay are copied."""
        keys = torch.from_numpy(self._random.random(len(rows)))
        if len(self._keys) == self._size:
            above = (keys > self._keys.min()).nonzero()[:, 0]
            rows, keys = rows[above.to(rows.device)], keys[above]
        rows = rows.detach()
        joined = rows if self._rows is None else torch.cat([self._rows, rows])
        keys = torch.cat([self._keys, keys])
        smallest = keys.topk(min(self._size, len(keys))).indices.sort().values
        self._keys, self._rows = keys[smallest], joined[smallest.to(joined.device)]

    def rows(self) -> Tensor:
        """The sample (at most size, features), in the order of the stream; (0, 0) of an empty stream."""
        return torch.zeros(0, 0, dtype=torch.float64) if self._rows is None else self._rows


@dataclass(frozen=True, eq=False)
class SpeciesClusters:
    """Clusters of the training environments of one central species: sufficient statistics in a reduced space, float64.

    With x − centre = Vy + r, y in the reduced space and r across it, the squared distance to cluster k is
    d² = (y − m_k)ᵀ S_k⁻¹ (y − m_k) + |r|²/s_k, with S_k the covariance of y, shrunk (OAS: Chen, Wiesel, Eldar, Hero, IEEE Trans. Signal
    Process. 58, 5016 (2010), eq. 23) and with the floor added, and s_k the mean of |r|², at least the floor.

    Attributes:
        centre: (features,)
        components: (features, r) V, orthonormal columns.
        variance: () mean |x − centre|² at the fit; the floor is relative to it.
        count: (clusters,)
        mean: (clusters, r) of y.
        scatter: (clusters, r, r) Σ (y − m)(y − m)ᵀ.
        residual: (clusters,) Σ |r|².
    """

    centre: Tensor
    components: Tensor
    variance: Tensor
    count: Tensor
    mean: Tensor
    scatter: Tensor
    residual: Tensor

    @staticmethod
    def fit(features: Tensor, seed: int) -> SpeciesClusters:
        """Fit to (n, features) rows, n >= 1; the order of the rows does not matter beyond rounding."""
        x = features.detach().double().cpu()
        centre, components, variance = _principal(x)
        y = (x - centre) @ components
        labels = _labels(y, seed)
        k, r = int(labels.max()) + 1, components.shape[1]
        empty = SpeciesClusters(
            centre,
            components,
            variance,
            *(x.new_zeros(shape) for shape in ((k,), (k, r), (k, r, r), (k,))),
        )
        return empty.updated(x, labels).to(features.device)

    @cached_property
    def precision(self) -> tuple[Tensor, Tensor]:
        """(W, s): W_kᵀW_k = S_k⁻¹ (clusters, r, r), and s (clusters,)."""
        r = self.components.shape[1]
        floor = (RELATIVE_FLOOR * self.variance).clamp_min(ABSOLUTE_FLOOR)
        eye = torch.eye(r, dtype=self.scatter.dtype, device=self.scatter.device)
        covariance = self.scatter / self.count[:, None, None]
        across = (self.residual / self.count).clamp_min(floor)
        if not r:
            return covariance, across
        square = covariance.square().mean((1, 2))
        trace = covariance.diagonal(dim1=1, dim2=2).mean(1)
        # ρ = (tr S² + tr² S)/((n + 1)(tr S² − tr² S/r)) but for terms of 1/r, as in scikit-learn
        below = (self.count + 1) * (square - trace.square() / r)
        rho = ((square + trace.square()) / below.clamp_min(1e-300)).clamp(max=1.0)[:, None, None]
        shrunk = (1 - rho) * covariance + (rho * trace[:, None, None] + floor) * eye
        lower = torch.linalg.cholesky(shrunk)
        return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False), across

    @cached_property
    def _whitening(self) -> tuple[Tensor, Tensor, Tensor]:
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
        whitening, offset, across = (p.to(features) for p in self._whitening)
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
        thresholds: by Z, the distance that a share `quantile` of held-out environments stays below; at least LEAST_THRESHOLD.
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
        """Distance / threshold of the species (n,): above 1 is as far as few held-out environments were; see `distance`."""
        threshold = features.new_ones(len(features))
        for z, value in self.thresholds.items():
            threshold = torch.where(species == z, value, threshold)
        return self.distance(species, features) / threshold

    def updated(self, species: Tensor, features: Tensor) -> Mahalanobis:
        """The same with more training environments, each added to its nearest cluster.

        Reduced spaces and thresholds stay as they are; a species without training data remains so until the next fit.
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
        """Restore what state gave."""
        thresholds = {int(z): t for z, t in header["thresholds"].items()}
        species = {z: SpeciesClusters(*(tensors[f"{z}.{f.name}"] for f in fields(SpeciesClusters))) for z in thresholds}
        return Mahalanobis(species, thresholds, header["quantile"])

    def _check(self, species: Tensor, features: Tensor) -> None:
        dimension = next((len(c.centre) for c in self.species.values()), "features")
        errors.check_shape("features", features, ("n", dimension))
        errors.check_shape("species", species, (len(features),), "One atomic number for each row of features.")


def fit_mahalanobis(
    features: Mapping[int, Tensor], held_out: Mapping[int, Tensor] | None = None, quantile: float = 0.99, seed: int = 0
) -> Mahalanobis:
    """Fit the clusters of the training environments, and thresholds to held-out environments.

    A threshold is the quantile (order statistic ⌈(n+1)·quantile⌉, or the largest) of the distances of held-out rows; of rows left out
    of a fit of their own where fewer than HELD_OUT were held out. Neighbours in one structure are alike, so that rows held out by
    structure give the larger, more cautious threshold.

    Args:
        features: by Z of the central atom, (n, features) unit vectors, a subsample (ReservoirSample) of some thousands; a species
            without any counts as one without training data.
        held_out: by Z, the same of structures that are not in `features`.
        seed: of the mixture and of the rows left out.

    Raises:
        UserError: features that are not finite or not a matrix; a quantile outside 0 to 1.
    """
    if not 0 < quantile < 1:
        raise errors.UserError(f"`quantile` must lie between 0 and 1, as 0.99; got {quantile}.")
    species, thresholds = {}, {}
    for z in sorted(z for z, x in features.items() if len(x)):
        for x in (features[z], (held_out or {}).get(z)):
            if x is not None and len(x):
                errors.check_shape("features", x, ("n", features[z].shape[1]), f"Species {errors.chemical_symbol(z)}.")
                if not torch.isfinite(x).all():
                    raise errors.UserError(f"`features` of {errors.chemical_symbol(z)} hold a NaN or infinite number.")
        species[z] = SpeciesClusters.fit(features[z], seed)
        others = (held_out or {}).get(z, features[z][:0])
        enough = len(others) >= HELD_OUT
        distances = species[z].distance(others.double()) if enough else _left_out(features[z], seed)
        ordered = distances.sort().values
        rank = min(len(ordered), math.ceil((len(ordered) + 1) * quantile - 1e-9))
        thresholds[z] = max(LEAST_THRESHOLD, ordered[rank - 1].item() if rank else 0.0)
    return Mahalanobis(species, thresholds, quantile)


def _left_out(features: Tensor, seed: int) -> Tensor:
    """Distances of rows to fits without them; none where there is only one row."""
    n = len(features)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n)).to(features.device)
    folds = order.tensor_split(min(n, FOLDS)) if n > 1 else ()
    distances = [features.new_zeros(0, dtype=torch.float64)]
    for fold in folds[:1] if n > FEW else folds:
        rest = torch.ones(n, dtype=torch.bool, device=features.device)
        rest[fold] = False
        distances.append(SpeciesClusters.fit(features[rest], seed).distance(features[fold].double()))
    return torch.cat(distances)


def _principal(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(centre, components, variance): the fewest leading principal directions with EXPLAINED of the variance, COMPONENTS at most."""
    centre = x.mean(0)
    centred = x - centre
    variance = centred.square().sum(1).mean()
    if variance <= ABSOLUTE_FLOOR:  # rows equal but for rounding have no directions
        return centre, x.new_zeros(x.shape[1], 0), variance
    wide = len(x) < x.shape[1]
    gram = (centred @ centred.T if wide else centred.T @ centred) / len(x)
    top = (max(0, len(gram) - COMPONENTS), len(gram) - 1)
    values, vectors = (torch.from_numpy(a) for a in scipy.linalg.eigh(gram.numpy(), subset_by_index=top))
    values, vectors = values.flip(0), vectors.flip(1)
    short = int((values.cumsum(0) < EXPLAINED * variance).sum()) + 1
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
    fits = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a rough mixture is enough
        for k in range(1, CLUSTERS + 1):
            mixture = GaussianMixture(k, random_state=seed).fit(sample)
            fits.append((mixture.bic(sample) + GAIN * k * len(sample), k, mixture))
    best = min(fits)[2]
    raw = torch.from_numpy(best.predict(z))
    large = (torch.bincount(raw, minlength=best.n_components) >= MEMBERS).nonzero()[:, 0]
    if len(large) < 2:
        return one
    to_means = torch.cdist(torch.from_numpy(z), torch.from_numpy(best.means_)[large])
    new = torch.full((best.n_components,), -1).scatter(0, large, torch.arange(len(large)))[raw]
    return torch.where(new < 0, to_means.argmin(1), new)
