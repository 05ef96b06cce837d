"""Weights of the parts of a variance: those under which held-out errors are most likely."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from gpmlp.core.errors import check_shape
from gpmlp.uncertainty.minimise import minimise
from gpmlp.uncertainty.scores import known_errors, smallest_std

PRIOR = 2.0  # standard deviation of log w about 0: weights of 7 or 1/7 cost half a nat
WEIGHTS = (1e-8, 1e8)  # bounds of the weights


def fit_variance_weights(errors: Tensor, parts: Tensor, rest: Tensor | None = None) -> Tensor:
    """Weights (parts,) of the parts of a variance: those that make held-out errors most likely under var = Σ_k w_k part_k + rest.

    Maximises Σ_i log N(e_i; 0, var_i) − Σ_k (log w_k)² / (2·PRIOR²) in log w, within WEIGHTS. The prior decides only where
    the errors do not: for a part that is 0, or two parts that are proportional.

    Args:
        errors: (n,) NaN = not known, dropped.
        parts: (n, parts) variances by cause, zero or positive, unit of the errors squared.
        rest: (n,) variance without a weight; none if not given.

    Raises:
        UserError: shapes that do not belong together; a part that is negative or not finite where the error is known.
    """
    check_shape("errors", errors, ("n",))
    check_shape("parts", parts, (len(errors), "parts"))
    total = parts.sum(1)
    _, e, s = known_errors(errors, torch.where((parts >= 0).all(1), total.clamp_min(0).sqrt(), math.nan))
    p = parts[~torch.isnan(errors)].double()
    if not len(e):
        return torch.ones(parts.shape[1], dtype=torch.float64, device=parts.device)
    floor = torch.full_like(e, smallest_std(s, e) ** 2)
    # start where a common factor is best
    common = (e.square() / (p.sum(1) + floor)).mean().clamp(*WEIGHTS).log().item()
    if rest is not None:
        floor = floor + rest[~torch.isnan(errors)].to(floor)
        common = 0.0
    about = e.square().cpu().numpy(), p.cpu().numpy(), floor.cpu().numpy()
    bounds = [(math.log(WEIGHTS[0]), math.log(WEIGHTS[1]))] * p.shape[1]
    best, _ = minimise(
        lambda a: _negative_log_posterior(a, *about),
        lambda a: _second_derivatives(a, *about),
        np.full(p.shape[1], common),
        bounds,
        ftol=1e-14,
        gtol=1e-9,
    )
    return torch.from_numpy(np.exp(best)).to(parts.device)


def _negative_log_posterior(
    log_weights: np.ndarray, squared: np.ndarray, parts: np.ndarray, floor: np.ndarray
) -> tuple[float, np.ndarray]:
    """Minus the objective of `fit_variance_weights` per error, and its gradient in log w; `floor` (n,) is added to the variances.

    f = ½ Σ_i [log v_i + e_i²/v_i] + ½ Σ_k (a_k/τ)²,  v = Σ_k exp(a_k) p_k + floor
    ∂f/∂a_k = ½ Σ_i (1/v_i − e_i²/v_i²) exp(a_k) p_ik + a_k/τ²
    """
    n = len(squared)
    weighted = parts * np.exp(log_weights)
    variance = weighted.sum(1) + floor
    value = 0.5 * (np.log(variance) + squared / variance).sum() + 0.5 * np.square(log_weights / PRIOR).sum()
    gradient = 0.5 * ((1 - squared / variance) / variance) @ weighted + log_weights / PRIOR**2
    return value / n, gradient / n


def _second_derivatives(
    log_weights: np.ndarray, squared: np.ndarray, parts: np.ndarray, floor: np.ndarray
) -> np.ndarray:
    """Of `_negative_log_posterior` in log w, with p_k exp(a_k) = u_k:

    ∂²f/∂a_k∂a_l = ½ Σ_i (2 e_i²/v_i³ − 1/v_i²) u_ik u_il + δ_kl [½ Σ_i (1/v_i − e_i²/v_i²) u_ik + 1/τ²]
    """
    weighted = parts * np.exp(log_weights)
    variance = weighted.sum(1) + floor
    shares = weighted / variance[:, None]
    across = shares.T @ (0.5 * (2 * squared / variance - 1)[:, None] * shares)
    along = 0.5 * ((1 - squared / variance) / variance) @ weighted + 1 / PRIOR**2
    return (across + np.diag(along)) / len(squared)
