"""A checkpoint is where a run is, written so that a run that was killed goes on from there as if it had not been."""

from __future__ import annotations

import fcntl
import io
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import ase.io
import numpy as np
import torch
from torch import Tensor

from gpmlp.core.errors import UserError
from gpmlp.core.json_values import json_value
from gpmlp.io import archive
from gpmlp.io.files import atomic_write, check_folder
from gpmlp.learning.oracles import results
from gpmlp.learning.recipe import DynamicsRecipe, LearnRecipe
from gpmlp.learning.stopping.history import History
from gpmlp.learning.walker import Look, Walker, frame
from gpmlp.learning.walker_state import NEVER, Mind

NAME = "checkpoint.gpmlp-run"
DIARY = "run.log"
SENTENCES = {"judged": "sentence", "stopped": "reason"}  # what says all there is to say of an event
HOW = (
    "timeout_s",
    "retries",
    "retry_kwargs",
    "on_failure",
    "at_most_failures",
    "workers",
    "executor",
    "executor_options",
)
HOW += ("directory", "keep", "check_forces", "largest_force", "largest_net_force", "check_every", "kwargs.command")
MAY_CHANGE = ("stop.", "thin", "output", "dynamics.steps", "dynamics.ramp_steps", *(f"oracle.{name}" for name in HOW))
UNTOLD = ("atoms", "foreseen", "criteria")  # too long for a line that a person reads


WALKERS = ("walker", "trusted", "asked")


@dataclass(frozen=True, eq=False)
class Progress:
    """Where a run is.

    Attributes:
        first, learned: keys of labels in the order they were learned: the first ones together, then one by one.
        observer: what observables remember; hours: time the run has taken; seconds: by what it did.
        round: number of strides so far.
        written: bytes of each file that belong to this moment.
        framed: step of the last frame of each walker in the trajectory.
        stopped: why the run ended, '' while it goes on; judged: frames there were when that was last asked.
    """

    first: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()
    minds: tuple[Mind, ...] = ()
    history: History = field(default_factory=History)
    observer: dict[str, np.ndarray] = field(default_factory=dict)
    hours: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    round: int = 0
    written: dict[str, int] = field(default_factory=dict)
    framed: tuple[int, ...] = ()
    stopped: str = ""
    judged: int = 0

    @cached_property
    def known(self) -> frozenset[str]:
        return frozenset((*self.first, *self.learned))

    def with_mind(self, i: int, mind: Mind) -> Progress:
        """With one walker's mind changed."""
        return replace(self, minds=(*self.minds[:i], mind, *self.minds[i + 1 :]))

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """What a checkpoint file holds: a JSON-able header and tensors."""
        tensors: dict[str, Tensor] = {}
        minds = []
        for i, mind in enumerate(self.minds):
            entry: dict[str, Any] = {f.name: getattr(mind, f.name) for f in fields(Mind) if f.name not in WALKERS}
            entry["asked_at"] = list(mind.asked_at)
            for name in WALKERS:
                one: Walker | None = getattr(mind, name)
                if one is not None:
                    entry[name], more = one.state()
                    tensors |= {f"{i}.{name}.{k}": v for k, v in more.items()}
            minds.append(entry)
        history, columns = self.history.state()
        tensors |= {f"history.{k}": torch.as_tensor(np.array(v)) for k, v in columns.items()}
        tensors |= {f"observer.{k}": torch.as_tensor(np.array(v)) for k, v in self.observer.items()}
        header = {
            "first": list(self.first),
            "learned": list(self.learned),
            "minds": minds,
            "round": self.round,
            "written": self.written,
            "framed": list(self.framed),
            "stopped": self.stopped,
            "judged": self.judged,
            "history": history,
            "hours": self.hours,
            "seconds": self.seconds,
        }
        return header, tensors

    @staticmethod
    def from_state(header: dict, tensors: dict[str, Tensor]) -> Progress:
        """What `state` gave."""
        minds = []
        for i, entry in enumerate(header["minds"]):
            values = dict(entry) | {"asked_at": tuple(entry["asked_at"])}
            for name in WALKERS:
                if name in entry:
                    prefix = f"{i}.{name}."
                    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                    values[name] = Walker.from_state(entry[name], own)
            minds.append(Mind(**values))
        columns, observer = (
            {k.removeprefix(prefix): v.numpy() for k, v in tensors.items() if k.startswith(prefix)}
            for prefix in ("history.", "observer.")
        )
        return Progress(
            tuple(header["first"]),
            tuple(header["learned"]),
            tuple(minds),
            History.from_state(header["history"], columns),
            observer,
            header["hours"],
            header.get("seconds", {}),
            header["round"],
            header["written"],
            tuple(header["framed"]),
            header["stopped"],
            header["judged"],
        )


def load(folder: Path) -> Progress | None:
    """The last checkpoint of a run; None if there is none yet.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / NAME
    return archive.load(path, Progress.from_state) if path.exists() else None


class Trail:
    """The files that a run leaves behind it: log.jsonl, trajectory.xyz, run.log, and its checkpoints.

    What was written after the last checkpoint is cut off on resuming, because it will be written again.
    """

    FILES = ("log.jsonl", "trajectory.xyz")

    def __init__(self, folder: Path, recipe: LearnRecipe, resume: bool) -> None:
        """Take a folder for a run.

        Raises:
            UserError: there is a run in it already, of another recipe if it is to be resumed; it cannot be written to.
        """
        check_folder(folder)
        self.folder, self._files = folder, {}
        begun = any((folder / name).exists() for name in (NAME, "labels.xyz", "refused.jsonl"))
        if begun and not resume:
            raise UserError(f"{folder}: holds a run already; go on with it (--resume), or choose another output.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._files[DIARY] = _alone(folder / DIARY)
            for stale in folder.glob(".*.tmp"):  # what a kill left of atomic writing
                stale.unlink()
            mine, path = recipe.model_dump(mode="json"), folder / "recipe.json"
            before = json.loads(path.read_text()) if begun and path.exists() else mine
            _same_run(before, mine, folder)
            self.changed = before != mine
            with atomic_write(path, text=True) as file:
                file.write(json.dumps(mine, indent=1) + "\n")
        except OSError as error:
            self.close()
            raise UserError(f"{folder}: cannot be written to: {error.strerror or error}.") from error
        except BaseException:
            self.close()
            raise

    def cut(self, progress: Progress) -> None:
        """Open the files where the checkpoint left them."""
        for name in self.FILES:
            path, end = self.folder / name, progress.written.get(name, 0)
            with _told(path):
                self._files[name] = file = open(path, "ab", buffering=0)  # noqa: SIM115 - as long as the run
                if file.seek(0, os.SEEK_END) < end:
                    raise UserError(f"{path}: is shorter than the run left it; put the file back, or begin anew.")
                file.truncate(end)
                file.seek(end)

    def log(self, event: str, **values: object) -> None:
        """One line for programs, which holds no time of day, and one for people, which does."""
        self._write("log.jsonl", (json.dumps(json_value({"event": event} | values), allow_nan=False) + "\n").encode())
        if event != "look":
            self.tell(event, **values)

    def tell(self, event: str, **values: object) -> None:
        """One line for people alone, which may say how long something took."""
        sentence = values.get(SENTENCES.get(event, ""))
        told = sentence or ", ".join(f"{k} {_short(v)}" for k, v in values.items() if k not in UNTOLD)
        self._write(DIARY, f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {event}: {told}\n".encode())

    def frame(self, progress: Progress, now: Look, thin: int, timestep_fs: float) -> Progress:
        """Add a frame to the trajectory where a walker enters the next `thin` steps; what it walks again is not written again."""
        i, step = now.walker.number, now.walker.step
        framed = list(progress.framed or [NEVER] * len(progress.minds))
        if step // thin <= framed[i] // thin or not now.full:
            return progress
        framed[i] = step
        atoms = frame(now)
        atoms.info |= {"walker": i, "step": step, "time_fs": step * timestep_fs, "temperature_K": now.temperature_K}
        variance = now.prediction.forces_covariance.total.diagonal(dim1=1, dim2=2).clamp_min(0)
        atoms.arrays["forces_std"] = variance.sqrt().numpy()
        atoms.arrays["novelty"] = now.prediction.novelty.numpy()
        text = io.StringIO()
        ase.io.write(text, atoms, format="extxyz")
        self._write("trajectory.xyz", text.getvalue().encode())
        return replace(progress, framed=tuple(framed))

    def _write(self, name: str, data: bytes) -> None:
        with _told(self.folder / name):
            while data:  # once, unless the disk is nearly full
                data = data[self._files[name].write(data) :]

    def checkpoint(self, progress: Progress) -> Progress:
        """Put all files on the disk, and then where the run is."""
        for name, file in self._files.items():
            with _told(self.folder / name):
                os.fsync(file.fileno())
        progress = replace(progress, written={name: self._files[name].tell() for name in self.FILES})
        archive.save(progress, self.folder / NAME)
        return progress

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _alone(path: Path) -> IO[bytes]:
    """A file to write to, which nobody else has as long as this process lives."""
    file = open(path, "ab", buffering=0)  # noqa: SIM115 - as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(f"{path.parent}: another process is at work on this run; wait for it, or end it.") from error
    except OSError as error:
        if error.errno not in results.NO_LOCKS:  # a file system without locks
            file.close()
            raise
    return file


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: could not be written: {error.strerror or error}; make room and go on with --resume."
        ) from error


def _same_run(before: dict, now: dict, folder: Path) -> None:
    """What decides what a run is must not change on the way; when to stop, and how the oracle is run, may."""
    a, b = dict(_flat(before, "")), dict(_flat(now, ""))
    for name in sorted(a.keys() | b.keys()):
        if a.get(name) != b.get(name) and not name.startswith(MAY_CHANGE):
            raise UserError(
                f"{folder}: the run there had {name} = {a.get(name)!r}, the recipe says {b.get(name)!r}; a run is resumed with "
                "the recipe it began with (only `stop`, `thin`, dynamics.steps and how the oracle is run may change)."
            )
    ramps = [DynamicsRecipe.model_validate(recipe["dynamics"]).ramp for recipe in (before, now)]
    if ramps[0] != ramps[1]:
        raise UserError(
            f"{folder}: with these dynamics.steps the ramp would take {ramps[1]} steps instead of {ramps[0]}; give "
            f"dynamics.ramp_steps: {ramps[0]}."
        )


def _flat(value: Any, name: str):
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _flat(entry, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return " ".join(f"{k}={_short(v)}" for k, v in value.items())
    return str(value)


class Stopwatch:
    """Seconds by activity, added up."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        """Go on from what was measured before."""
        self.seconds = dict(seconds or {})

    @contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Count the time of a block; blocks must not lie inside one another."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[activity] = self.seconds.get(activity, 0.0) + time.monotonic() - began
