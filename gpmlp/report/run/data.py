"""Data of the page about a learning run as plain arrays; what there is not is None, NaN or empty."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpmlp.core.errors import UserError
from gpmlp.report.model.data import ReportData

FINISHED = {
    "converged": "Converged",
    "labels": "Stopped with as many labels as allowed",
    "time": "Stopped when its time was up",
    "steps": "All steps made",
    "unstable": "Given up",
    "": "Not finished",
}


@dataclass(frozen=True, eq=False)
class RunFrames:
    """The frames on which the model was evaluated with uncertainty, in their order; (frames,) each.

    Attributes:
        walker, step: of which trajectory, where; time_ps: of that trajectory.
        temperature_K, target_K: kinetic, and of the thermostat (NaN = none).
        sigma, sigma_median: largest and median standard deviation of an atom's force, eV/A; limit: of the trigger (NaN = none).
        novelty: the largest. outside: share of the atoms beyond 1.
        inside: whether the frame lies inside the trust region, as the criterion of coverage has it.
        labelled: whether it asked for a label. window: whether stopping was judged over it.
        total_step: steps of all walkers together up to it.
    """

    walker: np.ndarray
    step: np.ndarray
    time_ps: np.ndarray
    temperature_K: np.ndarray
    target_K: np.ndarray
    sigma: np.ndarray
    sigma_median: np.ndarray
    limit: np.ndarray
    novelty: np.ndarray
    outside: np.ndarray
    inside: np.ndarray
    labelled: np.ndarray
    window: np.ndarray
    total_step: np.ndarray

    def __post_init__(self) -> None:
        for name, values in vars(self).items():
            if np.shape(values) != np.shape(self.walker):
                raise UserError(f"`{name}` must have shape {np.shape(self.walker)}; got {np.shape(values)}.")

    def __len__(self) -> int:
        return len(self.walker)

    @property
    def walkers(self) -> list[int]:
        return np.unique(self.walker).tolist()


@dataclass(frozen=True, eq=False)
class PrequentialError:
    """Errors of a label against what the model predicted before it was conditioned on the label.

    Attributes:
        bound: that the largest force error exceeds with the probability of the trigger, eV/A; largest_error: that error, of
            atom `worst_atom`.
        force_error, force_sigma: (atoms, 3) eV/A. energy_error, energy_sigma: eV/atom. novelty: the largest.
    """

    bound: float
    largest_error: float
    worst_atom: int
    force_error: np.ndarray
    force_sigma: np.ndarray
    energy_error: float
    energy_sigma: float
    novelty: float


@dataclass(frozen=True, eq=False)
class LabelRecord:
    """One label of a run.

    Attributes:
        number: from 1, in the order they were learned; key: in the label file.
        cause: 'first', 'given', 'force', 'novelty', 'force and novelty', 'guard', ...; reason: in words.
        walker: -1 for none; total_step: steps of all walkers together until it was learned.
        atom: for whose sake it was asked for, -1 = none or unknown.
        bound: of the force error where it was asked for, eV/A; limit: of the trigger then.
        species: (atoms,). columns: of the model after it. seconds: that it took the oracle.
        checks: further calls that compared its energy with its forces and stress.
        surrogate: what was labelled in place of a frame that was too large, in words; '' = the frame itself.
    """

    number: int
    key: str
    cause: str
    reason: str
    walker: int = -1
    step: int = 0
    time_ps: float = float("nan")
    temperature_K: float = float("nan")
    total_step: int = 0
    bound: float = float("nan")
    limit: float = float("nan")
    species: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    columns: int = 0
    seconds: float = float("nan")
    attempts: int = 1
    prequential: PrequentialError | None = None
    surrogate: str = ""
    checks: int = 0
    atom: int = -1

    @property
    def name(self) -> str:
        where = "" if self.walker < 0 else f": walker {self.walker}, step {self.step:,}"
        return f"label {self.number}{where}"


@dataclass(frozen=True, eq=False)
class ObservableCurve:
    """Running mean of an observable over the window; (points,) each.

    Attributes:
        steps: of all walkers, from the start of the window. mean: until then (rms over its components).
        sem: its standard error; NaN = cannot be judged. tolerance: of the criterion. enough: whether the frames suffice.
    """

    name: str
    unit: str
    steps: np.ndarray
    mean: np.ndarray
    sem: np.ndarray
    tolerance: float
    enough: np.ndarray


@dataclass(frozen=True, eq=False)
class RunData:
    """What the page shows of a run.

    Attributes:
        title: of the page; folder: name of the run's.
        ended: a key of FINISHED; stopped: why it ended, in words.
        criteria: dicts of name, met, sentence, numbers; sentence: of the verdict.
        steps: done, by walker; wanted: of each walker.
        probability: with which a bound may be exceeded; wanted_rate: labels per 1000 steps; wanted_frames, wanted_atoms: shares.
        refused: dicts of key, reason, attempts.
        seconds: by activity; hours: of the whole run. began, ended_at: texts.
        trajectory: predictions of the final model on its frames, without labels; None = there are none.
        recipe: all choices; given: those that differ from the defaults.
        files: (role, name, SHA-256). versions, model: what `Potential` and its report say. oracle: name, hash.
        labels_page: link to the uncertainty report of the labels, ''.
    """

    title: str
    folder: str
    ended: str
    stopped: str
    sentence: str
    criteria: tuple[dict[str, Any], ...]
    frames: RunFrames
    labels: tuple[LabelRecord, ...]
    observables: tuple[ObservableCurve, ...] = ()
    steps: tuple[int, ...] = ()
    wanted: int = 0
    probability: float = 0.1
    novelty_limit: float = float("nan")
    wanted_rate: float = float("nan")
    wanted_frames: float = float("nan")
    wanted_atoms: float = float("nan")
    refused: tuple[dict[str, Any], ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    hours: float = 0.0
    began: str = ""
    ended_at: str = ""
    trajectory: ReportData | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    files: tuple[tuple[str, str, str], ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    oracle: tuple[str, str] = ("", "")
    labels_page: str = ""

    def __post_init__(self) -> None:
        if self.ended not in FINISHED:
            raise UserError(f"`ended` must be one of {', '.join(map(repr, FINISHED))}; got {self.ended!r}.")

    @property
    def total_steps(self) -> int:
        return sum(self.steps)

    @property
    def asked(self) -> tuple[LabelRecord, ...]:
        """Labels that the dynamics asked for."""
        return tuple(label for label in self.labels if label.walker >= 0)

    @property
    def predicted(self) -> tuple[tuple[LabelRecord, PrequentialError], ...]:
        """Labels of which the model predicted something before it was conditioned on them."""
        return tuple((label, label.prequential) for label in self.labels if label.prequential is not None)
