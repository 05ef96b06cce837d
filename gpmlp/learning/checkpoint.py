"""A checkpoint holds the progress of a learning run, so that a run that was killed goes on from it as if it had not been."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import ase.io
import numpy as np
import torch
from torch import Tensor

from gpmlp.core.errors import UserError
from gpmlp.core.quantities import json_value
from gpmlp.io import archive
from gpmlp.io.files import atomic_write, check_folder, open_locked
from gpmlp.learning.recipe import DynamicsRecipe, LearnRecipe
from gpmlp.learning.stopping.history import History
from gpmlp.learning.walker import WalkerSnapshot, atoms_with_results
from gpmlp.learning.walker_state import NEVER, WalkerState
from gpmlp.recipe import RecipeSection

NAME = "checkpoint.gpmlp-run"
TEXT_LOG, TIMES = "run.log", "times.jsonl"
SENTENCES = {"judged": "sentence", "stopped": "reason"}  # what says all there is to say of an event
LEFT_OUT = ("atoms", "foreseen", "criteria", "cause", "first", "ended")  # of the line that a person reads
HOW = (
    *("timeout_s", "retries", "retry_kwargs", "on_failure", "at_most_failures", "workers", "executor"),
    *("executor_options", "directory", "keep", "check_forces", "largest_force", "largest_net_force", "check_every"),
    "kwargs.command",
)
LEFT_OPEN = {"four_body": False, "functionals": "none"}  # of a model that is updated
MAY_CHANGE = (
    "stop.",
    "thin",
    "labels_at_most",
    "highest_eV",
    "reactions.minima_at_most",
    "reactions.highest_eV",
    "lammps.",
    "output",
    "target.property",
    "target.sigma",
    "dynamics.steps",
    "dynamics.ramp_steps",
    *(f"oracle.{name}" for name in HOW),
)


@dataclass(frozen=True, eq=False)
class RunProgress:
    """How far a run is.

    Attributes:
        first, learned: keys of labels in the order they were learned: the first ones together, then one by one.
        observer: state of the observables; hours: time the run has taken; seconds: by activity.
        round: number of strides so far.
        written: bytes of each file that belong to this moment.
        labelled: frames of the label file, and the running checksum after them; None in checkpoints of older versions.
        framed: step of the last frame of each walker in the trajectory.
        stopped: why the run ended, '' while it goes on; judged: frames there were at the last judgement.
    """

    first: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()
    walkers: tuple[WalkerState, ...] = ()
    history: History = field(default_factory=History)
    observer: dict[str, np.ndarray] = field(default_factory=dict)
    hours: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    round: int = 0
    written: dict[str, int] = field(default_factory=dict)
    labelled: tuple[int, str] | None = (0, "")
    framed: tuple[int, ...] = ()
    stopped: str = ""
    judged: int = 0

    @cached_property
    def labels(self) -> frozenset[str]:
        """Keys of all labels that were learned."""
        return frozenset((*self.first, *self.learned))

    def with_walker(self, i: int, state: WalkerState) -> RunProgress:
        """With another state of one walker."""
        return replace(self, walkers=(*self.walkers[:i], state, *self.walkers[i + 1 :]))

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """What a checkpoint file holds: a JSON-able header and tensors."""
        names = ("first", "learned", "hours", "seconds", "round", "written", "framed", "stopped", "judged", "labelled")
        header: dict[str, Any] = {name: getattr(self, name) for name in names} | {"minds": []}
        tensors: dict[str, Tensor] = {}
        for i, walker in enumerate(self.walkers):
            entry, more = walker.state()
            header["minds"].append(entry)
            tensors |= {f"{i}.{k}": v for k, v in more.items()}
        header["history"], columns = self.history.state()
        tensors |= {f"history.{k}": torch.as_tensor(np.array(v)) for k, v in columns.items()}
        tensors |= {f"observer.{k}": torch.as_tensor(np.array(v)) for k, v in self.observer.items()}
        return header, tensors

    @staticmethod
    def from_state(header: dict, tensors: dict[str, Tensor]) -> RunProgress:
        """What `state` gave."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        columns, observer = ({k: v.numpy() for k, v in part(p).items()} for p in ("history.", "observer."))
        return RunProgress(
            first=tuple(header["first"]),
            learned=tuple(header["learned"]),
            walkers=tuple(WalkerState.from_state(e, part(f"{i}.")) for i, e in enumerate(header["minds"])),
            history=History.from_state(header["history"], columns),
            observer=observer,
            seconds=header.get("seconds", {}),
            framed=tuple(header["framed"]),
            labelled=tuple(header["labelled"]) if "labelled" in header else None,
            **{name: header[name] for name in ("hours", "round", "written", "stopped", "judged")},
        )


def load_checkpoint(folder: Path) -> RunProgress | None:
    """The last checkpoint of a run; None if there is none yet. Raises UserError: the file is damaged."""
    path = folder / NAME
    return archive.load(path, RunProgress.from_state) if path.exists() else None


class RunFiles:
    """The files of a run: log.jsonl and trajectory.xyz, which depend on the recipe alone; run.log and times.jsonl, which hold the time
    of day; and its checkpoints.

    What log and trajectory hold beyond the last checkpoint is cut off on resuming, because it will be written again.
    """

    REPEATABLE: tuple[str, ...] = ("log.jsonl", "trajectory.xyz")

    def __init__(self, folder: Path, recipe: RecipeSection, resume: bool) -> None:
        """Take a folder for a run.

        Raises:
            UserError: there is a run in it already, of another recipe if it is to be resumed; it cannot be written to.
        """
        check_folder(folder)
        self.folder = folder
        self._made = [place for place in (folder, *folder.parents) if not place.exists()]
        self._files: dict[str, IO[bytes]] = {}
        begun = any((folder / name).exists() for name in (NAME, "labels.xyz", "refused.jsonl"))
        if begun and not resume:
            raise UserError(f"{folder}: holds a run already; go on with it (--resume), or choose another output.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._files[TEXT_LOG] = open_locked(folder / TEXT_LOG)
            for stale in folder.glob(".*.tmp"):  # what a kill left of atomic writing
                stale.unlink()
            mine, path = recipe.model_dump(mode="json"), folder / "recipe.json"
            before = _read_recipe(path) if begun else mine
            _check_same_run(before, mine, folder)
            self.changed = before != mine
            with atomic_write(path, text=True) as file:
                file.write(json.dumps(mine, indent=1) + "\n")
            self._files[TIMES] = open(folder / TIMES, "ab", buffering=0)  # noqa: SIM115 - as long as the run
            if self._files[TIMES].tell() and not (folder / TIMES).read_bytes().endswith(b"\n"):
                self._write(TIMES, b"\n")  # after a line that a kill cut short
        except OSError as error:
            self.close()
            raise UserError(f"{folder}: cannot be written to: {error.strerror or error}.") from error
        except BaseException:
            self.close()
            raise

    def discard_unused(self) -> None:
        """Remove what a run wrote that ended before there was any label, but what its oracle left in scratch/; after `close`."""
        parts = [self.folder / name for name in ("spool", "scratch")]
        if any((self.folder / name).exists() for name in (NAME, "labels.xyz")) or any(parts[0].glob("k*.json")):
            return
        for place in parts[0].glob("*.lock"):
            place.unlink(missing_ok=True)
        for name in (*self.REPEATABLE, TEXT_LOG, TIMES, "recipe.json", "refused.jsonl"):
            (self.folder / name).unlink(missing_ok=True)
        for place in (*parts, *self._made):
            with suppress(OSError):  # it was never there, or holds what is not ours
                place.rmdir()

    def truncate(self, progress: RunProgress) -> None:
        """Open log and trajectory where the checkpoint left them."""
        for name in self.REPEATABLE:
            path, end = self.folder / name, progress.written.get(name, 0)
            with _worded(path):
                self._files[name] = file = open(path, "ab", buffering=0)  # noqa: SIM115 - as long as the run
                if file.seek(0, os.SEEK_END) < end:
                    raise UserError(f"{path}: is shorter than the run left it; put the file back, or begin anew.")
                file.truncate(end)
                file.seek(end)

    def log_event(self, event: str, **values: object) -> None:
        """An event, which depends on the recipe alone: a line of log.jsonl and of run.log, and its time."""
        self._write("log.jsonl", _json_line({"event": event} | values))
        if event != "look":
            self._log_text(event, values, {})

    def log_time(self, event: str, **values: object) -> None:
        """An event that differs from run to run: a line of times.jsonl and of run.log."""
        self._log_text(event, values, values)

    def _log_text(self, event: str, values: Mapping[str, object], recorded: Mapping[str, object]) -> None:
        text = values.get(SENTENCES.get(event, "")) or ", ".join(
            f"{k} {_short(v)}" for k, v in values.items() if k not in LEFT_OUT
        )
        moment = time.strftime("%Y-%m-%d %H:%M:%S")
        self._write(TEXT_LOG, f"{moment}  {event}: {text}\n".encode())
        self._write(TIMES, _json_line({"event": event, "time": moment, **recorded}))

    def write_frame(
        self, progress: RunProgress, snapshot: WalkerSnapshot, thin: int, timestep_fs: float
    ) -> RunProgress:
        """Add a frame to the trajectory where a walker enters the next `thin` steps; what it walks again is not written again."""
        i, step = snapshot.walker.number, snapshot.walker.step
        framed = list(progress.framed or [NEVER] * len(progress.walkers))
        if step // thin <= framed[i] // thin or not snapshot.full:
            return progress
        framed[i] = step
        atoms = atoms_with_results(snapshot)
        atoms.info |= {"walker": i, "step": step, "time_fs": step * timestep_fs}
        atoms.info["temperature_K"] = snapshot.temperature_K
        atoms.arrays["forces_std"] = snapshot.force_variances.clamp_min(0).sqrt().numpy()
        atoms.arrays["novelty"] = snapshot.novelty
        text = io.StringIO()
        ase.io.write(text, atoms, format="extxyz")
        self._write("trajectory.xyz", text.getvalue().encode())
        return replace(progress, framed=tuple(framed))

    def _write(self, name: str, data: bytes) -> None:
        with _worded(self.folder / name):
            while data:  # once, unless the disk is nearly full
                data = data[self._files[name].write(data) :]

    def save_checkpoint(self, progress: RunProgress) -> RunProgress:
        """Put all files on the disk, and then the progress."""
        for name, file in self._files.items():
            with _worded(self.folder / name):
                os.fsync(file.fileno())
        progress = replace(progress, written={name: self._files[name].tell() for name in self.REPEATABLE})
        archive.save(progress, self.folder / NAME)
        return progress

    def close(self) -> None:
        for file in self._files.values():
            file.close()


@contextmanager
def _worded(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        text = f"{path}: could not be written: {error.strerror or error}; make room and go on with --resume."
        raise UserError(text) from error


def _read_recipe(path: Path) -> dict:
    """What the recipe of a run was."""
    mend = f"put it back, or begin anew (the recipe can go on in another folder with bootstrap.given: {path.parent}/labels.xyz)."
    if not path.exists():
        raise UserError(f"{path}: is gone, so that nobody knows which recipe the run there had; {mend}")
    try:
        recipe = json.loads(path.read_text())
        if "end" not in recipe and "force_eV_per_A" not in recipe:  # a path or a relaxation, which have no dynamics
            DynamicsRecipe.model_validate(recipe["dynamics"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: is no recipe of a run any more ({' '.join(str(error).split())}); {mend}") from error
    return recipe


def _check_same_run(before: dict, now: dict, folder: Path) -> None:
    """What decides what a run is must not change on the way; when to stop, and how the oracle and LAMMPS are run, may."""
    engines = ["LAMMPS" if recipe.get("lammps") else "gpmlp" for recipe in (before, now)]
    if engines[0] != engines[1]:
        raise UserError(
            f"{folder}: {engines[0]} moves the atoms of the run there, and {engines[1]} would with this recipe; go on with the recipe it "
            "began with, or begin another run from its labels (bootstrap.given)."
        )
    a, b = (dict(_flat(_meant("", recipe), "")) for recipe in (before, now))
    for name in sorted(a.keys() | b.keys()):
        if (
            name in a and a[name] != b.get(name) and not name.startswith(MAY_CHANGE)
        ):  # a newer key says what was always done
            raise UserError(
                f"{folder}: the run there had {name} = {a.get(name)!r}, the recipe says {b.get(name)!r}; a run is resumed with "
                "the recipe it began with (only when it stops, the property of a target and its sigma, `thin`, dynamics.steps and how the "
                "oracle is run may change)."
            )
    if "dynamics" not in now:
        return
    ramps = [DynamicsRecipe.model_validate(recipe["dynamics"]).ramp for recipe in (before, now)]
    if ramps[0] != ramps[1]:
        raise UserError(
            f"{folder}: with these dynamics.steps the ramp would take {ramps[1]} steps instead of {ramps[0]}; give "
            f"dynamics.ramp_steps: {ramps[0]}."
        )


def _meant(key: str, value: Any) -> Any:
    """A value of a recipe, in it what a run does where it leaves that open, as older ones wrote it down."""
    if isinstance(value, dict):
        return {name: _meant(name, entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_meant(key, entry) for entry in value]
    return LEFT_OPEN.get(key) if value is None else value


def recipe_as_begun(recipe: LearnRecipe, folder: Path) -> LearnRecipe:
    """The recipe of a run that an older version began: what it leaves out of these keys of `trigger` is as it was by default then."""
    path = folder / "recipe.json"
    before = _read_recipe(path).get("trigger", {}) if path.exists() else {}
    if not before:
        return recipe
    before = {"likely": before.get("probability")} | before  # before there was `likely`
    names = {"probability", "likely", "novelty"} - recipe.trigger.model_fields_set
    return recipe.model_copy(
        update={"trigger": recipe.trigger.model_copy(update={name: before.get(name) for name in names})}
    )


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _flat(entry, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _json_line(values: dict) -> bytes:
    return (json.dumps(json_value(values), allow_nan=False) + "\n").encode()


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return " ".join(f"{k}={_short(v)}" for k, v in value.items())
    return str(value)


class ActivityTimer:
    """Seconds by activity, added up."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        """Go on from what was measured before."""
        self.seconds = dict(seconds or {})

    @contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Count the time of a block; blocks must not lie inside one another."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[activity] = self.seconds.get(activity, 0.0) + time.monotonic() - start
