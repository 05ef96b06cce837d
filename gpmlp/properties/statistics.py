"""Error bars of averages over dynamics: how far potentials lie apart beyond what their noise explains, and averages over one potential from
the trajectory of another.

| on paper | here |
|---|---|
| y_s = μ + b_s + e_s, b_s ~ N(0, τ²), e_s ~ N(0, ε_s²), of the mean potential y_0 = μ + e_0 | `random_effects` |
| p(τ | y) ∝ Π N(y_s; μ, τ² + ε_s²), μ integrated out, τ uniform: Gelman, Bayesian Anal. 1, 515 (2006) | `_posterior` |
| τ̂² = max(0, ⟨(y_s − ȳ)²⟩ − ⟨ε²⟩): DerSimonian, Laird, Control. Clin. Trials 7, 177 (1986) | `RandomEffects.sampled` |
| ⟨A⟩_s = ⟨A e^{−βΔ}⟩ / ⟨e^{−βΔ}⟩, Δ = E_s − E_0; n_eff = (Σw)²/Σw² | `reweighted_averages` |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats

from gpmlp.core.errors import UserError
from gpmlp.core.units import BOLTZMANN
from gpmlp.properties.values import INSIDE, PropertyValue

GRID = 400  # values of τ
SIGMAS = float(scipy.special.ndtr(1.0) - scipy.special.ndtr(-1.0))  # share inside one standard deviation
FREEDOM = 5  # fewest degrees of freedom of an error that is known well enough to end a run
EFFECTIVE = 0.1  # least share of frames that must count in a reweighted average


@dataclass(frozen=True)
class RandomEffects:
    """A number of which each of several potentials gives a noisy value.

    Attributes:
        value: of the mean of the posterior, from all of them.
        sigma: half of the interval that holds 68.3 %; low_90, high_90: interval of 90 % of the number that the true potential has.
        sampled, statistical: standard deviations from the scatter of potentials, the noise taken off, and from the noise.
        samples, failed: potentials, and those of them without a value.
    """

    value: float
    sigma: float
    low_90: float
    high_90: float
    sampled: float
    statistical: float
    samples: int
    failed: int

    def as_value(self, name: str, unit: str, scale: float = 1.0, least: float = -np.inf, **about: Any) -> PropertyValue:
        """As a property, in units in which one of these is `scale`; no bound of the interval is below `least`."""
        parts = {"sampled": scale * self.sampled} if self.samples else {}
        parts |= {"statistical": scale * self.statistical}
        low, high = (float(np.maximum(least, scale * bound)) for bound in (self.low_90, self.high_90))
        about |= {"samples": self.samples, "failed": self.failed}
        return PropertyValue(name, scale * self.value, unit, scale * self.sigma, low, high, parts, **about)


def random_effects(
    samples: np.ndarray,
    errors: np.ndarray,
    mean: float = np.nan,
    mean_error: float = np.nan,
    freedom: float = math.inf,
) -> RandomEffects:
    """What noisy values of samples, y_s = μ + b_s + e_s, and of the mean, μ + e_0, say of the value that the true potential has.

    The truth is one more draw: its distribution is the mixture of N(μ̂(τ), var μ̂(τ) + τ²) over p(τ | y), which for few samples has the
    heavy tails of Student's, and with much noise does not take the scatter for zero. Without samples it is
    Student's, of the mean alone; where fewer than three of them have a value, the scatter, and so sigma, is unknown (NaN).

    Args:
        samples: (k,) value of each sample, NaN where it has none; errors: (k,) standard error of each.
        mean: of the mean potential, with its standard error; NaN where there is none.
        freedom: degrees of freedom of the errors, which are estimates themselves.

    Raises:
        UserError: neither the mean nor three samples have a value.
    """
    y, e = np.asarray(samples, dtype=float), np.asarray(errors, dtype=float)
    there, centre = np.isfinite(y) & np.isfinite(e), np.isfinite(mean) and np.isfinite(mean_error)
    counts = len(y), int((~there).sum())
    y, e = y[there], e[there]
    if not (centre or len(y) > 2):
        raise UserError(f"{len(y)} of {len(there)} samples have a value; three are needed. Take more, or longer runs.")
    if len(y) < 3:
        return _without_scatter(float(mean), math.nan if counts[0] else 0.0, float(mean_error), freedom, counts)
    observed = np.append(y, mean) if centre else y
    noise = np.append(e, mean_error) if centre else e
    scatters = np.append(np.ones(len(y)), 0.0) if centre else np.ones(len(y))
    tau = math.sqrt(max(0.0, y.var(ddof=1) - (e**2).mean()))
    (weights,) = _posterior(np.array([tau]), observed, noise, scatters)[0]
    sampled, statistical = tau * math.sqrt(1 + (weights * scatters) @ weights), float(np.linalg.norm(weights * noise))
    unit = math.sqrt(y.var(ddof=1) + (e**2).mean())
    if unit <= 1e-12 * max(1e-300, float(np.abs(y).max())):
        return _without_scatter(float(weights @ observed), 0.0, statistical, freedom, counts)
    grid = (np.arange(GRID) + 0.5) / GRID
    _, log, centres, widths = _posterior(unit * grid / (1 - grid), observed, noise, scatters)
    p = np.exp(log - log.max()) / (1 - grid) ** 2  # dτ/d(grid)
    p /= p.sum()
    low, low_68, high_68, high = (
        _quantile(q, p, centres, widths)
        for q in ((1 - INSIDE) / 2, (1 - SIGMAS) / 2, (1 + SIGMAS) / 2, (1 + INSIDE) / 2)
    )
    return RandomEffects(float(p @ centres), (high_68 - low_68) / 2, low, high, sampled, statistical, *counts)


def _without_scatter(
    value: float, sampled: float, statistical: float, freedom: float, counts: tuple[int, int]
) -> RandomEffects:
    """Student's distribution alone, of a scatter that is none, or unknown (NaN)."""
    error = float(np.hypot(sampled, statistical))
    sigma, reach = (error * float(scipy.stats.t.ppf((1 + inside) / 2, freedom)) for inside in (SIGMAS, INSIDE))
    return RandomEffects(value, sigma, value - reach, value + reach, sampled, statistical, *counts)


def _posterior(
    tau: np.ndarray, observed: np.ndarray, noise: np.ndarray, scatters: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For each τ: weights of the values in μ̂, their inverse variances; log p(y | τ), μ̂, and the standard deviation of the truth."""
    variance = (tau[:, None] * scatters) ** 2 + noise**2
    # values without any error share all weight
    variance = np.maximum(variance, 1e-12 * np.maximum(variance.max(1, keepdims=True), 1e-300))
    precisions = 1 / variance
    total = precisions.sum(1)
    weights = precisions / total[:, None]
    centres = weights @ observed
    misfit = (precisions * (observed - centres[:, None]) ** 2).sum(1)
    log = 0.5 * (np.log(precisions).sum(1) - np.log(total) - misfit)
    return weights, log, centres, np.sqrt(1 / total + tau**2)


def _quantile(q: float, p: np.ndarray, centres: np.ndarray, widths: np.ndarray) -> float:
    """Of the mixture of normal distributions."""

    def missing(x: float) -> float:
        return float(p @ scipy.special.ndtr((x - centres) / widths)) - q

    step = float(p @ widths) + float(np.ptp(centres))
    low = high = float(p @ centres)
    while missing(low) > 0:
        low -= step
        step *= 2
    while missing(high) < 0:
        high += step
        step *= 2
    return float(scipy.optimize.brentq(missing, low, high)) if high > low else low


@dataclass(frozen=True, eq=False)
class Reweighted:
    """Averages over other potentials from frames of one.

    Attributes:
        values: (samples, components); effective: (samples,) number of frames that count, of `frames`.
        cumulant: (samples,) for which the average is of first order in the difference, as too few frames count.
    """

    values: np.ndarray
    effective: np.ndarray
    cumulant: np.ndarray
    frames: int


def reweighted_averages(
    observable: np.ndarray, differences: np.ndarray, temperature_K: float, least: float = EFFECTIVE
) -> Reweighted:
    """Canonical averages over samples of a posterior, ⟨A⟩_s = ⟨A e^(−βΔ)⟩/⟨e^(−βΔ)⟩, from frames of the canonical ensemble of the mean.

    Where fewer than a share `least` of the frames count, the average is ⟨A⟩ − β cov(A, Δ), the first term of its expansion in βΔ.

    Args:
        observable: (frames, components), the same for all samples, or (samples, frames, components), as a sample sees it itself.
        differences: (samples, frames) E_s − E_0, eV, of whole structures.
    """
    differences = np.asarray(differences, dtype=float)
    seen = np.broadcast_to(observable, (len(differences), *np.shape(observable)[-2:]))
    frames = differences.shape[1]
    reduced = -(differences - differences.mean(1, keepdims=True)) / (BOLTZMANN * temperature_K)
    weights = np.exp(reduced - reduced.max(1, keepdims=True))
    effective = weights.sum(1) ** 2 / (weights**2).sum(1)
    cumulant = effective < least * frames
    weights = np.where(cumulant[:, None], 1 + reduced, weights)  # ⟨(1 − β(Δ − ⟨Δ⟩)) A⟩
    weights /= weights.sum(1, keepdims=True)
    return Reweighted(np.einsum("sf,sfk->sk", weights, seen), effective, cumulant, frames)
