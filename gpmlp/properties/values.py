"""A PropertyValue is a property with its error bar: the value of the mean potential, and how far samples of the posterior lie from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from gpmlp.core.quantities import json_value

MAD = 1.4826  # standard deviation of a normal distribution over its median absolute deviation
OUTLIER = 6.0  # standard deviations, by the MAD, that none of some hundred normal samples comes to
EFFICIENCY = 0.37  # of the MAD: its variance is that of the rms of so many of the samples (normal ones; Huber, Robust Statistics, 5.1)
FEWEST = 5  # samples whose median says something, where others failed
INSIDE = 0.9  # of the interval that is given


@dataclass(frozen=True)
class PropertyValue:
    """One number with its uncertainty.

    Attributes:
        name: snake case, without the unit; with the structure's name and a point before it where there are several structures.
        value: of the mean potential (the median of the samples where the mean has none).
        sigma: standard deviation of all parts together.
        low_90, high_90: interval of 90 %, Student's with as many degrees of freedom as samples gave a value, .37 of these where sigma is
            from the median absolute deviation.
        parts: standard deviations of which sigma consists, in quadrature: 'sampled' (what the data leave open, in the size of the errors
            that the calibration of the model has seen, and larger where `novelty` is), 'statistical' (of averages over time); what there is
            none of is left out.
        novelty: largest of the structures that it was computed from; None where the model has none.
        samples, failed: how many were drawn, and how many of these have no value; sigma is from the median absolute deviation then, and
            NaN where fewer than five or than half are left.
        structures: names of the structures that it was computed from.
        about: one sentence on what was computed.
        calculation: that it came from.
    """

    name: str
    value: float
    unit: str
    sigma: float
    low_90: float
    high_90: float
    parts: Mapping[str, float] = field(default_factory=dict)
    novelty: float | None = None
    samples: int = 0
    failed: int = 0
    structures: tuple[str, ...] = ()
    about: str = ""
    calculation: str = ""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form; null for what is no finite number."""
        return json_value(vars(self))


@dataclass(frozen=True, eq=False)
class PropertyCurve:
    """A function with its error band: an equation of state, phonon bands, a free energy.

    Attributes:
        x: (n,); x_label and x_unit say what it is.
        value, sigma: (n,) or (n, branches), of the mean and its standard deviation.
        ticks: (x, label) of marked places, as the points of high symmetry of a band structure.
    """

    name: str
    x: np.ndarray
    x_label: str
    x_unit: str
    value: np.ndarray
    sigma: np.ndarray
    unit: str
    ticks: tuple[tuple[float, str], ...] = ()
    samples: int = 0
    failed: int = 0
    about: str = ""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form; null for what is no finite number."""
        return json_value(vars(self))


def value_from_samples(
    name: str,
    unit: str,
    mean: float,
    samples: Sequence[float] | np.ndarray,
    statistical: float = 0.0,
    wider: float = 1.0,
    **about: Any,
) -> PropertyValue:
    """The property of a mean potential and of k samples (NaN where a sample has none).

    Deviations are from the mean's value. Their root mean square is sigma; 1.4826 times the median of their sizes where a sample failed or
    lies farther off than a normal one of some hundred would (one that lost its saddle says nothing about the rest).

    Args:
        statistical: standard deviation of the mean's value itself, as of an average over time.
        wider: factor on what samples show, for structures unlike the training data (Calibration.functional_widening).
        about: further fields of PropertyValue: novelty, structures, about, parts (instead of 'sampled' alone).
    """
    samples = np.asarray(samples, dtype=float)
    there = samples[np.isfinite(samples)]
    failed = len(samples) - len(there)
    value = float(mean) if np.isfinite(mean) or not len(there) else float(np.median(there))
    sampled, freedom = float("nan"), 1.0
    if len(samples):
        sampled, freedom = (float(each[0]) for each in _spread_and_freedom(samples[:, None], value))
    parts = {"sampled": wider * sampled} if len(samples) else {}
    parts |= {"statistical": float(statistical)} if statistical else {}
    parts = about.pop("parts", parts)
    sigma = float(np.sqrt(np.sum(np.square(list(parts.values()))))) if parts else float("nan")
    reach = sigma * float(stats.t.ppf(0.5 + INSIDE / 2, max(freedom, 1.0)))
    return PropertyValue(
        name, value, unit, sigma, value - reach, value + reach, parts, samples=len(samples), failed=failed, **about
    )


def has_spread(k: Any, n: int) -> Any:
    """Whether k values of n samples say how far they spread (k may be an array)."""
    return (k >= 2) & ((k == n) | ((k >= FEWEST) & (2 * k >= n)))


def spread(samples: np.ndarray, value: np.ndarray | float) -> np.ndarray:
    """Standard deviation of samples (k, ...) about a value (...); NaN where too few of them have one."""
    return _spread_and_freedom(samples, value)[0]


def _spread_and_freedom(samples: np.ndarray, value: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """The standard deviation, and of how many samples the rms would be as sure."""
    deviations = np.abs(samples - value)
    k = np.isfinite(deviations).sum(0)
    enough = has_spread(k, len(samples))
    deviations = np.where(enough, deviations, 0.0)
    typical = MAD * np.nanmedian(deviations, axis=0)
    rms = np.sqrt(np.nanmean(np.square(deviations), axis=0))
    robust = (k < len(samples)) | ((np.nanmax(deviations, axis=0) > OUTLIER * typical) & (typical > 0))
    return np.where(enough, np.where(robust, typical, rms), np.nan), np.where(robust, EFFICIENCY * k, k)
