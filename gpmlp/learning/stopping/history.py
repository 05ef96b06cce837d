"""History is the record of a run frame by frame: columns that grow, cheap to append to, from which stopping is judged.

A History never changes: `append` returns a longer one, which shares the memory of what was there before. What it holds are plain arrays
(`state`, for npz) or one JSON object a frame (`Record.plain`, for a log).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from gpmlp.core.errors import UserError, check_choice

FLOATS = (
    *("time_fs", "temperature_K", "target_temperature_K", "pressure_GPa", "target_pressure_GPa"),
    *("force_rms", "sigma_max", "sigma_median", "threshold", "novelty_max"),
)
INTEGERS = ("walker", "step")
FLAGS = ("ramp_finished", "asked", "labelled", "updated")
FIRST_CAPACITY = 64


@dataclass(frozen=True, eq=False)
class Record:
    """What is kept of one frame of molecular dynamics that was looked at.

    Attributes:
        walker: number of the trajectory, from 0.
        step: of that trajectory; falls when it was set back.
        time_fs: of that trajectory.
        temperature_K, pressure_GPa: at this moment; NaN = not known.
        target_temperature_K, target_pressure_GPa: of thermostat and barostat now; NaN = there is none.
        ramp_finished: whether targets will not change any more.
        force_rms: of the predicted force components, eV/A.
        sigma_max, sigma_median: largest and median calibrated standard deviation of an atom's force, eV/A.
        threshold: that of the trigger, eV/A; NaN = there is none.
        novelty_max: largest novelty of an atom (infinite for a species never seen); NaN = not computed.
        atoms: by atomic number, how many there are.
        outside: by atomic number, how many have a novelty above 1.
        outside_atoms: indices of these atoms.
        asked: whether this frame was reason to ask for a label, whether it was granted, refused or kept back.
        labelled: whether a label was learned after this frame (of any walker: the model is common); `History.with_label` says so.
        updated: whether the model changed after this frame for another reason, such as new hyperparameters.
        observables: by name, a number or (components,); NaN = not known yet.
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
    novelty_max: float = math.nan
    atoms: Mapping[int, int] = field(default_factory=dict)
    outside: Mapping[int, int] = field(default_factory=dict)
    outside_atoms: tuple[int, ...] = ()
    asked: bool = False
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
        **others: object,
    ) -> Record:
        """Make a record from what was predicted of one frame.

        Args:
            species: (atoms,) atomic numbers.
            force_sigma: (atoms,) standard deviation of each atom's force, eV/A; or (atoms, 3) of the components (the norm is taken).
            novelty: (atoms,) of `Prediction.novelty`.
            others: any other field of Record but those that follow from the arrays.

        Raises:
            UserError: arrays that are not as long as `species`.
        """
        species = np.asarray(species)
        found: dict[str, object] = {"atoms": _counts(species)}
        if force_sigma is not None:
            sigma = _per_atom("force_sigma", force_sigma, len(species))
            sigma = np.sqrt((sigma**2).sum(1)) if sigma.ndim == 2 else sigma
            found |= {"sigma_max": float(sigma.max()), "sigma_median": float(np.median(sigma))}
        if novelty is not None:
            distance = _per_atom("novelty", novelty, len(species))
            distance = np.where(np.isnan(distance), math.inf, distance)
            beyond = (distance > 1).nonzero()[0]
            found["novelty_max"] = float(distance.max())
            found |= {"outside": _counts(species[beyond]), "outside_atoms": tuple(beyond.tolist())}
        return Record(walker, step, time_fs, **(found | others))

    of = from_arrays  # its name before 0.2

    def to_json(self) -> dict:
        """The record for JSON: NaN becomes null, infinity the string 'inf'; what is as by default is left out."""
        out: dict[str, object] = {"walker": int(self.walker), "step": int(self.step), "time_fs": _number(self.time_fs)}
        for name in FLOATS[1:]:
            if not math.isnan(getattr(self, name)):
                out[name] = _number(getattr(self, name))
        out["ramp_finished"] = bool(self.ramp_finished)
        out |= {name: True for name in ("asked", "labelled", "updated") if getattr(self, name)}
        for name in ("atoms", "outside"):
            out[name] = {str(z): int(n) for z, n in getattr(self, name).items()}
        out["outside_atoms"] = [int(i) for i in self.outside_atoms]
        out["observables"] = {
            name: _number(float(v)) if np.ndim(v) == 0 else [_number(x) for x in np.asarray(v, dtype=float).tolist()]
            for name, v in self.observables.items()
        }
        return out

    @staticmethod
    def from_json(plain: Mapping) -> Record:
        """Restore what plain gave, whatever else stands beside it."""
        known = {f.name for f in fields(Record)}
        values = {name: v for name, v in plain.items() if name in known}
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


class _Buffer:
    """Arrays with room to grow; only the longest History of a buffer writes to it."""

    def __init__(self) -> None:
        self.used = 0
        self.arrays: dict[str, np.ndarray] = {}
        self.outside_atoms = np.zeros(FIRST_CAPACITY, dtype=np.int32)

    def put(self, name: str, row: int, value: object, blank: np.ndarray) -> None:
        """Write one entry of a column, made of `blank` where it is not there yet."""
        column = self.arrays.get(name)
        if column is None or row >= len(column):
            longer = np.empty((max(FIRST_CAPACITY, 2 * row), *blank.shape), dtype=blank.dtype)
            longer[...] = blank
            if column is not None:
                longer[: len(column)] = column
            self.arrays[name] = column = longer
        column[row] = value

    def outside(self, start: int, indices: Sequence[int]) -> None:
        end = start + len(indices)
        while end > len(self.outside_atoms):
            self.outside_atoms = np.concatenate([self.outside_atoms, np.zeros_like(self.outside_atoms)])
        self.outside_atoms[start:end] = indices


class History:
    """The records of a run in the order in which they came, as columns."""

    def __init__(self) -> None:
        """Make an empty history."""
        self._buffer, self._n = _Buffer(), 0

    def __len__(self) -> int:
        return self._n

    def append(self, record: Record) -> History:
        """Return the history with one more record; the time it takes does not grow with the length (but for copies at doublings).

        Raises:
            UserError: an observable with another number of components than before.
        """
        buffer = self._buffer if self._buffer.used == self._n else _copy(self)
        row = self._n
        for name, value in record.observables.items():
            column, shape = buffer.arrays.get(f"observable/{name}"), np.atleast_1d(value).shape
            if len(shape) != 1 or (column is not None and column.shape[1:] != shape):
                raise UserError(
                    f"observable '{name}' must give a number or a vector of one length, always the same; got shape {np.shape(value)}"
                    + (f" after {column.shape[1:]}." if column is not None else ".")
                )
        for names, blank in ((FLOATS, np.array(math.nan)), (INTEGERS, np.array(0)), (FLAGS, np.array(False))):
            for name in names:
                buffer.put(name, row, getattr(record, name), blank)
        for name in ("atoms", "outside"):
            for z, count in getattr(record, name).items():
                buffer.put(f"{name}/{z}", row, count, np.array(0, dtype=np.int32))
        for name, value in record.observables.items():
            value = np.atleast_1d(np.asarray(value, dtype=np.float64))
            buffer.put(f"observable/{name}", row, value, np.full(len(value), math.nan))
        start = int(buffer.arrays["outside_end"][row - 1]) if row else 0
        buffer.outside(start, record.outside_atoms)
        buffer.put("outside_end", row, start + len(record.outside_atoms), np.array(0))
        buffer.used = row + 1
        return _view(buffer, row + 1)

    def with_label(self, updated: bool = False) -> History:
        """Return the history with a label learned after its last record; of several, each at a record of its own.

        Args:
            updated: whether more than that label changed the model: hyperparameters were learned again.
        """
        history = _view(_copy(self), self._n)
        if updated and self._n:
            changed = np.array(history.column("updated"))
            changed[-1] = True
            history._buffer.arrays["updated"] = changed
        free = (~history.column("labelled").astype(bool)).nonzero()[0] if self._n else ()
        if len(free):
            labelled = np.array(history.column("labelled"))
            labelled[free[-1]] = True
            history._buffer.arrays["labelled"] = labelled
        return history

    def column(self, name: str) -> np.ndarray:
        """(records,) of a field of Record, or (records, components) of 'observable/NAME'; read-only.

        'atoms/Z' and 'outside/Z' count atoms by atomic number. Records that say nothing hold NaN or 0.
        """
        if name in self._buffer.arrays:
            column = self._buffer.arrays[name]
        elif name.partition("/")[0] in ("atoms", "outside"):
            column = np.zeros(self._n, dtype=np.int32)
        elif name.startswith("observable/"):
            check_choice("observable", name.partition("/")[2], self.observables)
        elif self._n:
            check_choice("column", name, (*FLOATS, *INTEGERS, *FLAGS))
        else:
            column = np.zeros(0)
        if len(column) < self._n:  # was not written of late
            blank = np.zeros if column.dtype.kind in "ib" else lambda s, d: np.full(s, math.nan, d)
            column = np.concatenate([column, blank((self._n - len(column), *column.shape[1:]), column.dtype)])
        column = column[: self._n]
        column.flags.writeable = False
        return column

    @property
    def walkers(self) -> tuple[int, ...]:
        """Numbers of the walkers, sorted."""
        return tuple(np.unique(self.column("walker")).tolist())

    @property
    def species(self) -> tuple[int, ...]:
        """Atomic numbers that were seen, sorted."""
        return tuple(sorted(int(name[6:]) for name in self._buffer.arrays if name.startswith("atoms/")))

    @property
    def observables(self) -> tuple[str, ...]:
        """Names of the observables that were recorded."""
        return tuple(name[11:] for name in self._buffer.arrays if name.startswith("observable/"))

    def outside_atoms(self, record: int) -> np.ndarray:
        """Indices of the atoms of a record whose novelty is above 1."""
        ends = self.column("outside_end")
        return self._buffer.outside_atoms[ends[record - 1] if record else 0 : ends[record]]

    def state(self) -> tuple[dict, dict[str, np.ndarray]]:
        """Return (plain data for JSON, arrays by name for npz or safetensors); from_state restores them exactly."""
        names = [n for n in self._buffer.arrays if self._n]
        arrays = {name: np.array(self.column(name)) for name in names}
        end = int(arrays["outside_end"][-1]) if self._n else 0
        arrays["outside_atoms"] = self._buffer.outside_atoms[:end].copy()
        return {"records": self._n}, arrays

    @staticmethod
    def from_state(header: Mapping, arrays: Mapping[str, np.ndarray]) -> History:
        """Restore what state gave."""
        buffer, n = _Buffer(), int(header["records"])
        for name, values in arrays.items():
            if name == "outside_atoms":
                buffer.outside(0, values)
            elif len(values) != n:
                raise UserError(f"history: column '{name}' holds {len(values)} records instead of {n}.")
            else:
                buffer.arrays[name] = np.array(values)
        buffer.used = n
        return _view(buffer, n)


def _view(buffer: _Buffer, n: int) -> History:
    history = History()
    history._buffer, history._n = buffer, n
    return history


def _copy(history: History) -> _Buffer:
    """A buffer of its own for a history that another one has outgrown."""
    return History.from_state(*history.state())._buffer
