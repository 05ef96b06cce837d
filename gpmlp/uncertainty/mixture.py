"""A Mixture is a density made of Gaussians, found by expectation and maximisation (Bishop, Pattern Recognition and Machine Learning
(2006), section 9.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

STEPS = 100  # at most, of k-means and of expectation and maximisation
GAIN = 1e-3  # of the mean log density, below which it has converged: a rough mixture is enough
TRIALS = 4  # rows that are tried for each next centre of k-means
WIDTH = 1e-6  # added to each variance: the rows are of unit variance or so


@dataclass(frozen=True, eq=False)
class Mixture:
    """p(x) = Σ_k w_k N(x; m_k, L_k L_kᵀ).

    Attributes:
        weights: (k,) w; means: (k, d) m; lowers: (k, d, d) L.
    """

    weights: Tensor
    means: Tensor
    lowers: Tensor

    def logs(self, x: Tensor) -> Tensor:
        """(n, k) log [w_k N(x; m_k, L_k L_kᵀ)] of rows x (n, d)."""
        across = torch.linalg.solve_triangular(self.lowers, (x - self.means[:, None]).mT, upper=False)
        half = self.lowers.diagonal(dim1=1, dim2=2).log().sum(1) + 0.5 * x.shape[1] * math.log(2 * math.pi)
        return self.weights.log() - half - 0.5 * across.square().sum(1).T

    def labels(self, x: Tensor) -> Tensor:
        """(n,) the Gaussian to which each row belongs most."""
        return self.logs(x).argmax(1)

    def bic(self, x: Tensor) -> float:
        """Schwarz's criterion, -2 log p(x) + parameters log n: the lower the better."""
        k, d = self.means.shape
        parameters = k * (d * (d + 3) // 2 + 1) - 1
        return float(-2 * self.logs(x).logsumexp(1).sum()) + parameters * math.log(len(x))


def fit(x: Tensor, k: int, seed: int) -> Mixture:
    """The mixture of k Gaussians that k-means leads to.

    Args:
        x: (n, d) rows, n >= k, float64; seed: of the start of k-means.
    """
    shares = torch.nn.functional.one_hot(_k_means(x, k, seed), k).to(x)
    before = -math.inf
    for _ in range(STEPS):
        found = _likeliest(x, shares)
        logs = found.logs(x)
        total = logs.logsumexp(1, keepdim=True)
        now = float(total.mean())
        if now - before < GAIN:
            break
        before, shares = now, (logs - total).exp()
    return found


def _likeliest(x: Tensor, shares: Tensor) -> Mixture:
    """The mixture of which rows belong to each Gaussian by these shares (n, k)."""
    counts = shares.sum(0).clamp_min(1e-12)
    means = (shares.T @ x) / counts[:, None]
    off = x - means[:, None]
    covariances = (off * shares.T[:, :, None]).mT @ off / counts[:, None, None]
    lowers = torch.linalg.cholesky(covariances + WIDTH * torch.eye(x.shape[1]).to(x))
    return Mixture(counts / len(x), means, lowers)


def _k_means(x: Tensor, k: int, seed: int) -> Tensor:
    """(n,) the nearest of k centres that are the means of the rows nearest to them.

    They start at rows drawn by their squared distance from those before (Arthur, Vassilvitskii, SODA 2007), the best of some.
    """
    random = np.random.default_rng(seed)
    centres = x[torch.from_numpy(random.integers(len(x), size=1))]
    squared = (x - centres).square().sum(1)
    while len(centres) < k:
        chances = squared + 1e-12 / len(x)  # rows may all be equal
        trials = torch.from_numpy(random.choice(len(x), TRIALS, p=(chances / chances.sum()).numpy()))
        left = torch.minimum(squared[:, None], torch.cdist(x, x[trials]).square())
        best = int(left.sum(0).argmin())
        centres, squared = torch.cat([centres, x[trials[best]][None]]), left[:, best]
    nearest = torch.cdist(x, centres).argmin(1)
    for _ in range(STEPS):
        counts = torch.bincount(nearest, minlength=k)
        means = torch.zeros_like(centres).index_add_(0, nearest, x) / counts.clamp_min(1)[:, None]
        centres = torch.where(counts[:, None] > 0, means, centres)
        before, nearest = nearest, torch.cdist(x, centres).argmin(1)
        if torch.equal(before, nearest):
            break
    return nearest
