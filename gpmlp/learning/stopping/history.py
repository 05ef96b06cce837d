"""History holds what stopping is judged by, frame by frame: columns to which records are appended.

What it holds are plain arrays (`state`, for npz) or one JSON object a frame (`Record.to_json`, for a log).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from gpmlp.core.errors import UserError, check_choice

FLOATS = (
    *("time_fs", "temperature_K", "target_temperature_K", "pressure_GPa", "target_pressure_GPa"),
    *("force_rms", "sigma_max", "sigma_median", "threshold", "exceedance", "missed", "novelty_max"),
)
INTEGERS = ("walker", "step")
FLAGS = ("ramp_finished", "asked", "withheld", "labelled", "updated")
KINDS = {**dict.fromkeys(FLOATS, np.float64), **dict.fromkeys(INTEGERS, np.int64), **dict.fromkeys(FLAGS, np.bool_)}


@dataclass(frozen=True, eq=False)
class Record:
    """What one frame of molecular dynamics with force variances adds to the history.

    Attributes:
        walker, step, time_fs: number of the trajectory, from 0, its step (which falls when it was set back) and time.
        temperature_K, pressure_GPa: now (NaN = unknown); target_...: of thermostat and barostat (NaN = there is none).
        ramp_finished: whether targets will not change any more.
        force_rms: of the predicted force components, eV/A.
        sigma_max, sigma_median: largest and median calibrated standard deviation of an atom's force, eV/A.
        threshold: that of the trigger, eV/A; NaN = there is none.
        exceedance: largest probability, since the last record, that the error of some force is beyond the threshold; NaN = unknown.
        missed: share of the steps since then in which it is expected to be, by these and by what labels said of such; NaN = unknown.
        novelty_max: largest novelty of an atom (infinite for a species without data); NaN = not computed.
        atoms: number of atoms by atomic number; outside: of those with a novelty above 1; outside_atoms: indices of these.
        asked: whether this frame was reason to ask for a label, whether it was granted, refused or withheld.
        withheld: whether it was, and the run went on all the same, as no more labels were allowed then.
        labelled: whether a label was learned after this frame (of any walker: the model is common); `History.with_label` says so.
        updated: whether the model changed after this frame for another reason, such as new hyperparameters.
        observables: by name, a number or (components,); NaN = unknown yet.
    """

    walker: int
    step: int
    time_fs: float
    temperature_K: float = math.nan
    target_temperature_K: float = math.nan
    pressure_GPa: float = math.nan
    target_pressure_GPa: float = math.nan
    ramp_finished: bool = True
    force_rms: float = math.nan
    sigma_max: float = math.nan
    sigma_median: float = math.nan
    threshold: float = math.nan
    exceedance: float = math.nan
    missed: float = math.nan
    novelty_max: float = math.nan
    atoms: Mapping[int, int] = field(default_factory=dict)
    outside: Mapping[int, int] = field(default_factory=dict)
    outside_atoms: tuple[int, ...] = ()
    asked: bool = False
    withheld: bool = False
    labelled: bool = False
    updated: bool = False
    observables: Mapping[str, float | np.ndarray] = field(default_factory=dict)

    @staticmethod
    def from_arrays(
        walker: int,
        step: int,
        time_fs: float,
        species: np.ndarray,
        force_sigma: np.ndarray | None = None,
        novelty: np.ndarray | None = None,
        **others: Any,
    ) -> Record:
        """Make a record from the prediction of one frame.

        Args:
            species: (atoms,) atomic numbers.
            force_sigma: (atoms,) standard deviation of each atom's force, eV/A; or (atoms, 3) of the components (the norm is taken).
            novelty: (atoms,) of `Prediction.novelty`.
            others: any other field of Record but those that follow from the arrays.

        Raises:
            UserError: arrays that are not as long as `species`.
        """
        species = np.asarray(species)
        values: dict[str, Any] = {"atoms": _counts(species)}
        if force_sigma is not None:
            sigma = _per_atom("force_sigma", force_sigma, len(species))
            sigma = np.sqrt((sigma**2).sum(1)) if sigma.ndim == 2 else sigma
            values |= {"sigma_max": float(sigma.max()), "sigma_median": float(np.median(sigma))}
        if novelty is not None:
            distance = _per_atom("novelty", novelty, len(species))
            distance = np.where(np.isnan(distance), math.inf, distance)
            beyond = (distance > 1).nonzero()[0]
            values["novelty_max"] = float(distance.max())
            values |= {"outside": _counts(species[beyond]), "outside_atoms": tuple(beyond.tolist())}
        return Record(walker, step, time_fs, **(values | others))

    of = from_arrays  # its name before 0.2

    def to_json(self) -> dict:
        """The record for JSON: NaN becomes null, infinity the string 'inf'; what is as by default is left out."""
        out: dict[str, object] = {"walker": int(self.walker), "step": int(self.step), "time_fs": _number(self.time_fs)}
        for name in FLOATS[1:]:
            if not math.isnan(getattr(self, name)):
                out[name] = _number(getattr(self, name))
        out["ramp_finished"] = bool(self.ramp_finished)
        out |= {name: True for name in ("asked", "withheld", "labelled", "updated") if getattr(self, name)}
        out |= {name: {str(z): int(n) for z, n in getattr(self, name).items()} for name in ("atoms", "outside")}
        out["outside_atoms"] = [int(i) for i in self.outside_atoms]
        out["observables"] = {
            name: _number(float(v)) if np.ndim(v) == 0 else [_number(x) for x in np.asarray(v, dtype=float).tolist()]
            for name, v in self.observables.items()
        }
        return out

    @staticmethod
    def from_json(plain: Mapping) -> Record:
        """Restore what to_json gave; other keys are ignored."""
        names = {f.name for f in fields(Record)}
        values = {name: v for name, v in plain.items() if name in names}
        for name in FLOATS:
            if name in values:
                values[name] = _float(values[name])
        for name in ("atoms", "outside"):
            values[name] = {int(z): int(n) for z, n in values.get(name, {}).items()}
        values["outside_atoms"] = tuple(values.get("outside_atoms", ()))
        values["observables"] = {
            name: np.array([_float(x) for x in v]) if isinstance(v, list) else _float(v)
            for name, v in values.get("observables", {}).items()
        }
        return Record(**values)


def _per_atom(name: str, values: np.ndarray, n: int) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if len(values) != n or not n:
        raise UserError(f"`{name}` must have one row for each of the {n} atoms; got shape {values.shape}.")
    return values


def _counts(species: np.ndarray) -> dict[int, int]:
    return {int(z): int(n) for z, n in zip(*np.unique(species, return_counts=True), strict=True)}


def _number(value: float) -> float | str | None:
    value = float(value)
    return None if math.isnan(value) else value if math.isfinite(value) else str(value)


def _float(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


class History:
    """The records of a run in the order in which they came, as columns.

    A History never changes: `append` returns a longer one, which shares the columns of this one.
    """

    def __init__(self, columns: dict[str, list] | None = None, records: int = 0) -> None:
        """An empty history; or the first records of columns, to which only the longest history that shares them appends."""
        self._columns: dict[str, list] = {} if columns is None else columns
        self._n = records
        self._arrays: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self._n

    def append(self, record: Record) -> History:
        """Return the history with one more record; the time it takes does not grow with the length.

        Raises:
            UserError: an observable with another number of components than before.
        """
        n, columns = self._n, self._columns
        if columns and len(columns["step"]) > n:  # another history went on from here
            columns = self._copied()
        values: dict[str, Any] = {name: getattr(record, name) for name in KINDS}
        values["outside_atoms"] = tuple(record.outside_atoms)
        values["outside_end"] = (columns["outside_end"][-1] if n else 0) + len(record.outside_atoms)
        for kind in ("atoms", "outside"):
            values |= {f"{kind}/{z}": count for z, count in getattr(record, kind).items()}
        for name, value in record.observables.items():
            components, before = np.atleast_1d(np.asarray(value, dtype=np.float64)), columns.get(f"observable/{name}")
            if components.ndim != 1 or (before and len(before[0]) != len(components)):
                after = f" after {(len(before[0]),)}" if before else ""
                raise UserError(
                    f"observable '{name}' must give a number or a vector of one length, always the same; got shape {np.shape(value)}"
                    f"{after}."
                )
            values[f"observable/{name}"] = components.tolist()
        for name, value in values.items():
            if name not in columns:
                columns[name] = [_blank(name, value)] * n
            columns[name].append(value)
        for name in columns.keys() - values.keys():
            columns[name].append(_blank(name, columns[name][0]))
        return History(columns, n + 1)

    def with_label(self, updated: bool = False) -> History:
        """Return the history with a label learned after its last record; of several, each at a record of its own.

        Args:
            updated: whether more than that label changed the model: hyperparameters were refreshed.
        """
        columns, n = self._copied(), self._n
        if updated and n:
            columns["updated"][-1] = True
        free = [i for i in range(n) if not columns["labelled"][i]]
        if free:
            columns["labelled"][free[-1]] = True
        return History(columns, n)

    def column(self, name: str) -> np.ndarray:
        """(records,) of a field of Record, or (records, components) of 'observable/NAME'; read-only.

        'atoms/Z' and 'outside/Z' count atoms by atomic number. Records that say nothing, and those of an
        older version that had no such column, hold NaN; of counts and flags 0.
        """
        if name not in self._arrays:
            kind, _, rest = name.partition("/")
            if name not in self._columns:
                if kind == "observable":
                    check_choice("observable", rest, self.observables)
                elif kind not in ("atoms", "outside") and self._n:
                    check_choice("column", name, tuple(KINDS))
            dtype = (
                np.int32 if kind in ("atoms", "outside") else (KINDS | {"outside_end": np.int64}).get(name, np.float64)
            )
            array: np.ndarray = np.array(self._columns.get(name, [_blank(name)] * self._n)[: self._n], dtype=dtype)
            array.flags.writeable = False
            self._arrays[name] = array
        return self._arrays[name]

    @property
    def walkers(self) -> tuple[int, ...]:
        """Numbers of the walkers, sorted."""
        return tuple(np.unique(self.column("walker")).tolist())

    @property
    def species(self) -> tuple[int, ...]:
        """Atomic numbers of all atoms so far, sorted."""
        return tuple(sorted(int(name[6:]) for name in self._columns if name.startswith("atoms/")))

    @property
    def observables(self) -> tuple[str, ...]:
        """Names of the observables that were recorded."""
        return tuple(name[11:] for name in self._columns if name.startswith("observable/"))

    def outside_atoms(self, record: int) -> np.ndarray:
        """Indices of the atoms of a record whose novelty is above 1."""
        return np.array(self._columns["outside_atoms"][record], dtype=np.int32)

    def state(self) -> tuple[dict, dict[str, np.ndarray]]:
        """Return (plain data for JSON, arrays by name for npz or safetensors); from_state restores them exactly."""
        outside = self._columns.get("outside_atoms", [])[: self._n]
        arrays = {name: np.array(self.column(name)) for name in self._columns if name != "outside_atoms"}
        arrays["outside_atoms"] = np.array([i for atoms in outside for i in atoms], dtype=np.int32)
        return {"records": self._n}, arrays

    @staticmethod
    def from_state(header: Mapping, arrays: Mapping[str, np.ndarray]) -> History:
        """Restore what state gave."""
        n = int(header["records"])
        columns = {name: values.tolist() for name, values in arrays.items() if name != "outside_atoms"}
        for name, values in columns.items():
            if len(values) != n:
                raise UserError(f"history: column '{name}' holds {len(values)} records instead of {n}.")
        if n:
            parts = np.split(arrays["outside_atoms"], arrays["outside_end"][:-1])
            columns["outside_atoms"] = [tuple(part.tolist()) for part in parts]
        return History(columns, n)

    def _copied(self) -> dict[str, list]:
        return {name: values[: self._n] for name, values in self._columns.items()}


def _blank(name: str, like: Any = ()) -> Any:
    """What a column holds for a record that says nothing."""
    if name.startswith("observable/"):
        return [math.nan] * len(like)
    return math.nan if name in FLOATS else () if name == "outside_atoms" else 0
