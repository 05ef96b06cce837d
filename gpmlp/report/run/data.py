"""RunData is everything the page about a learning run shows, as plain arrays; what is not known is None, NaN or empty."""

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
class Frames:
    """The frames that were looked at, in the order in which they came; (frames,) each.

    Attributes:
        walker, step: of which trajectory, where; time_ps: of that trajectory.
        temperature_K, target_K: kinetic, and of the thermostat (NaN = none).
        sigma, sigma_median: largest and median standard deviation of an atom's force, eV/A; limit: of the trigger (NaN = none).
        novelty: the largest. outside: share of the atoms beyond 1.
        inside: whether the frame lies inside the trust region, as the criterion of coverage has it.
        labelled: whether it asked. window: whether stopping was judged over it.
        made: steps of all walkers together up to it.
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
    made: np.ndarray

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
class Foretold:
    """What was predicted of a label before it was learned.

    Attributes:
        bound: what the largest force error was to stay below, eV/A; largest_error: that error, of atom `worst_atom`.
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
class Labelling:
    """One label.

    Attributes:
        number: from 1, in the order they were learned; key: its name on the tape.
        cause: 'first', 'given', 'force', 'novelty', 'force and novelty', 'guard', ...; reason: in words.
        walker: -1 for none; made: steps of all walkers together until it was learned.
        bound: what the force error might reach where it was asked for, eV/A; limit: of the trigger then.
        species: (atoms,). columns: of the model after it. seconds: that it took the oracle.
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
    made: int = 0
    bound: float = float("nan")
    limit: float = float("nan")
    species: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    columns: int = 0
    seconds: float = float("nan")
    attempts: int = 1
    foretold: Foretold | None = None
    surrogate: str = ""

    @property
    def name(self) -> str:
        where = "" if self.walker < 0 else f": walker {self.walker}, step {self.step:,}"
        return f"label {self.number}{where}"


@dataclass(frozen=True, eq=False)
class Observed:
    """How the mean of an observable came to rest in the window; (points,) each.

    Attributes:
        steps: of all walkers, from the start of the window. mean: of what was seen until then (of its components the rms).
        sem: its standard error; NaN = cannot be judged. tolerance: that was wanted.
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
        steps: by walker, made; wanted: to be made by each.
        probability: with which a bound may be exceeded; wanted_rate: labels per 1000 steps; wanted_frames, wanted_atoms: shares.
        refused: dicts of key, reason, attempts. calls: asked of the oracle, as far as is known.
        seconds: by activity; hours: of the whole run. began, ended_at: texts.
        blind: what the model says now of frames of the trajectory, without labels; None = not looked at.
        recipe: all choices; given: those that differ from the defaults.
        files: (role, name, SHA-256). versions, model: what `Potential` and its report say. oracle: name, hash.
        beside: link to the uncertainty report of the labels, ''.
    """

    title: str
    folder: str
    ended: str
    stopped: str
    sentence: str
    criteria: tuple[dict[str, Any], ...]
    frames: Frames
    labels: tuple[Labelling, ...]
    observed: tuple[Observed, ...] = ()
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
    blind: ReportData | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    files: tuple[tuple[str, str, str], ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    oracle: tuple[str, str] = ("", "")
    beside: str = ""

    def __post_init__(self) -> None:
        if self.ended not in FINISHED:
            raise UserError(f"`ended` must be one of {', '.join(map(repr, FINISHED))}; got {self.ended!r}.")

    @property
    def total_steps(self) -> int:
        return sum(self.steps)

    @property
    def asked(self) -> tuple[Labelling, ...]:
        """Labels that the dynamics asked for."""
        return tuple(label for label in self.labels if label.walker >= 0)

    @property
    def foretold(self) -> tuple[Labelling, ...]:
        """Labels of which something was predicted before they were learned."""
        return tuple(label for label in self.labels if label.foretold is not None)
