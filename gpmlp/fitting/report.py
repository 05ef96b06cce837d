"""Report of a fit: rows, noise, rank, condition, jitter, errors, time and memory of each stage."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from gpmlp.core.findings import Finding
from gpmlp.potential.evaluation import ErrorTable

Progress = Callable[[str, float, float, str], None]


@dataclass(frozen=True)
class FitReport:
    """Numbers of a fit.

    Attributes:
        rows: number of observations by kind.
        independent_groups: of structures that are no near-duplicates of each other (fitting/near_duplicates.py).
        held_out: structures that were left out in turn, each with what is near it, to learn the calibration, and learned from otherwise.
        noise: standard deviations used, 'energies' eV/atom, 'forces' eV/A, 'stresses' eV/A^3.
        noise_by_evidence: the same before leave-one-out chose that of the energies (gp/energy_noise.py).
        label_noise: how much of it the labels themselves show (uncertainty/residuals.py); forces only.
        signal: prior standard deviation of local energies by descriptor and species, eV.
        environments: number of each species; centres: number chosen, by descriptor and species.
        shortest: distance of each pair of species in the data, A.
        variance_subset: columns kept for variances; where they are not all, how covariances of forces from them compare with those
            from all, on some atoms (variance_checks.subset_error).
        local_variance: of variances of local energies from fewer columns, by species how many and how they compare with those of all
            (reduced_variance.with_reduced_variance); None where these are exact.
        low_rank: of a mean of low rank, its rank and what it changes (low_rank.with_low_rank); None where the mean is exact.
        charges: of charges that were tried, whether they were kept, their form, what the evidence says of each, and a sentence
            (charge_fit.FittedCharges.report); a sentence that says why where `auto` did not try them; None where they are off.
        choices: of inducing variables and of four-body invariants, where the recipe left them open: a sentence each, with its reason.
        columns: inducing variables asked for; rank: those that are linearly independent.
        condition: of the posterior factor; jitter: largest added to a covariance of inducing variables.
        negative_log_evidence: of the posterior's columns, nats, priors of the hyperparameters included.
        evidence_trace: (evaluation, negative log evidence) as it was minimised, with all columns.
        train_rmse: residuals of the training labels by kind, eV/atom, eV/A, eV/A^3.
        validation_errors: ErrorTable, or None.
        stages: (name, seconds, peak memory of the process so far in MB).
        findings: about the labels, the gravest first.
        warnings: sentences for the user, those of findings (but notes) first.
    """

    rows: dict[str, int]
    independent_groups: int
    held_out: int
    noise: dict[str, float]
    noise_by_evidence: dict[str, float]
    label_noise: dict[str, float]
    signal: dict[str, float]
    environments: dict[str, int]
    centres: dict[str, int]
    shortest: dict[str, float]
    variance_subset: dict[str, float]
    local_variance: dict[str, Any] | None
    low_rank: dict[str, Any] | None
    columns: int
    rank: int
    condition: float
    jitter: float
    negative_log_evidence: float
    evidence_trace: tuple[tuple[int, float], ...]
    train_rmse: dict[str, float]
    validation_errors: ErrorTable | None
    stages: tuple[tuple[str, float, float], ...]
    charges: dict[str, Any] | None = None
    choices: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict:
        """JSON-able form."""
        return asdict(self)


@dataclass
class StageTimer:
    """Times the stages and passes progress on."""

    progress: Progress | None
    done: list[tuple[str, float, float]] = field(default_factory=list)
    _name: str = ""
    _start: float = 0.0

    def begin(self, name: str) -> None:
        self.end()
        self._name, self._start = name, time.perf_counter()
        self.report(0.0, 1.0)

    def end(self) -> None:
        if self._name:
            self.report(1.0, 1.0)
            self.done.append((self._name, time.perf_counter() - self._start, peak_memory_MB()))
            self._name = ""

    def report(self, done: float, total: float, note: str = "") -> None:
        if self.progress:
            self.progress(self._name, done, total, note)


def peak_memory_MB() -> float:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
