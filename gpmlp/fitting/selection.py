"""Selection picks rows of a feature matrix: greedy conditional variance, farthest point, CUR, random. Pure functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpmlp.core import errors

METHODS = ("greedy", "farthest", "cur", "random")


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
        return greedy_selection(features, n, kernel)
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
    factor = features.new_zeros(pool, n)
    chosen: list[int] = []
    scores: list[float] = []
    while len(chosen) < n and variance.max() > tolerance:
        size = min(64, pool)
        top = variance.topk(min(size + 1, pool))
        candidates, outside = top.indices[:size], float(top.values[-1]) if pool > size else 0.0
        k = len(chosen)
        past = factor[candidates, :k]
        block = kernel(features[candidates] @ features[candidates].T) - past @ past.T
        taken = _pivots(block, variance[candidates], n - k, max(slack * outside, tolerance))
        picks = candidates[taken]
        # L_k for the new columns: (K - L L^T)[:, picks] = new @ chol^T
        residual = kernel(features @ features[picks].T) - factor[:, :k] @ factor[picks, :k].T
        corner = torch.linalg.cholesky(block[taken][:, taken] + tolerance * 1e-4 * torch.eye(len(taken)).to(block))
        new = torch.linalg.solve_triangular(corner, residual.T, upper=False).T
        factor[:, k : k + len(taken)] = new
        variance = (variance - new.square().sum(1)).clamp_min(0)
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


def farthest_points(features: Tensor, n: int, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Farthest-point sampling in the distance |x - x'|, starting from the point farthest from the mean.

    Args:
        known: (m, features) rows that count as chosen before; the first point is then the one farthest from all of them.
    """
    distance = (features - features.mean(0)).square().sum(1)
    chosen: list[int] = []
    scores: list[float] = []
    if known is not None and len(known):
        distance = torch.full_like(distance, torch.inf)
        squares = features.square().sum(1)
        for some in known.split(256):
            nearest = (some.square().sum(1) - 2 * features @ some.T).amin(1)
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
