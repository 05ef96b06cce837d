"""Transport in a liquid or a fast conductor: replicas of a potential and of samples of its posterior move until averages are known well.

Averages that do not depend on time (energy, pressure, radial distribution) are of the mean potential's trajectories alone; for the samples
they are reweighted (statistics.reweighted_averages).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from ase import Atoms

from gpmlp.core import errors
from gpmlp.core.errors import UserError
from gpmlp.core.structures import Structures
from gpmlp.engines.md import default_timestep_fs
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.io.files import atomic_write, check_folder, open_locked
from gpmlp.potential.potential import Potential
from gpmlp.potential.samples import PosteriorSamples
from gpmlp.properties.dynamics import DynamicsSettings, MovingForces, Replicas
from gpmlp.properties.static_averages import STATIC, StaticFrames
from gpmlp.properties.statistics import FREEDOM
from gpmlp.properties.transport_results import TransportResults, analyse_segments
from gpmlp.properties.values import PropertyValue

DYNAMIC = ("diffusion", "viscosity")
WATCHED = ("diffusion_coefficient_", "viscosity_")  # values that are to be precise
STATE, LOCK = "state.npz", "run.lock"
SAVE_S = 30.0  # seconds between two states on disk
SEGMENTS = 2  # fewest that are judged
STEPS = 10  # between two records
STATIC_FS = 500.0  # between two frames for static averages
PRECISION, MODEL_SHARE = 0.1, 0.5  # if no precision is given: relative, and of the model's part
SAID = ("provenance", "report")  # of a model, which they do not change
FREE = ("precision", "length_ps", "time_limit_s")  # settings that may change when a run goes on


@dataclass(frozen=True)
class TransportSettings:
    """What is computed and how precisely.

    Attributes:
        temperatures_K: of the runs, in the cell of the start.
        what: any of 'diffusion', 'viscosity', 'energy', 'pressure', 'rdf'.
        samples, replicas: samples of the posterior, and trajectories of each and of the mean at each temperature.
        precision: relative standard error of D and viscosity, statistics alone, at which the run is over; None: 0.1 or, where that is more,
            half of what the samples scatter, as longer runs hardly narrow the interval then. Without D and viscosity: of the energy, in
            standard deviations of its fluctuations.
        length_ps: longest trajectories. time_limit_s: of computing, from the start or from where the run is resumed; None: none.
        timestep_fs: None: 0.5 fs with hydrogen, 1 fs up to neon, else 2 fs.
        segment_ps: pieces in which trajectories are averaged; displacements are followed over half of one.
        equilibrate_ps: time that does not count, with Langevin's thermostat.
        seed: of samples, velocities and thermostats.
    """

    temperatures_K: tuple[float, ...]
    what: tuple[str, ...] = ("diffusion",)
    samples: int = 8
    replicas: int = 2
    precision: float | None = None
    length_ps: float = 200.0
    time_limit_s: float | None = None
    timestep_fs: float | None = None
    segment_ps: float = 4.0
    equilibrate_ps: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.what:
            raise UserError(f"`what` must name one or more of {', '.join((*DYNAMIC, *STATIC))}.")
        for name in self.what:
            if name in ("conductivity", "thermal_conductivity"):
                raise UserError(
                    "Thermal conductivity is not offered: the heat flux of these potentials is not computed."
                )
            errors.check_choice("transport property", name, (*DYNAMIC, *STATIC))
        errors.check_integer("`samples`", self.samples, 0)
        if self.samples in (1, 2):
            raise UserError(f"`samples` must be 0 or at least 3: {self.samples} say nothing about their scatter.")
        for name in ("length_ps", "segment_ps"):
            errors.check_positive(name, getattr(self, name))
        for name in ("precision", "time_limit_s", "timestep_fs"):
            if getattr(self, name) is not None:
                errors.check_positive(name, getattr(self, name))
        errors.check_positive("equilibrate_ps", self.equilibrate_ps, allow_zero=True)

    def dynamics(self, numbers: np.ndarray) -> DynamicsSettings:
        """Steps and records for atoms of these numbers."""
        timestep = default_timestep_fs(numbers) if self.timestep_fs is None else self.timestep_fs
        record = timestep * STEPS / 1000
        return DynamicsSettings(
            self.temperatures_K, self.replicas, timestep, STEPS, math.ceil(self.equilibrate_ps / record),
            max(8, round(self.segment_ps / record)), seed=self.seed,
        )  # fmt: skip

    def noise(self, value: PropertyValue) -> float:
        """The statistical error of a value at which it is known well enough."""
        if self.precision is not None:
            return self.precision * value.value
        return max(PRECISION * value.value, MODEL_SHARE * value.parts.get("sampled", 0.0))

    @property
    def wish(self) -> str:
        """What statistical errors are to be, in words."""
        return f"{PRECISION:g}, or half of what samples scatter" if self.precision is None else f"{self.precision:g}"

    @property
    def dynamic(self) -> tuple[str, ...]:
        """What is asked for that samples have to move for."""
        return tuple(name for name in DYNAMIC if name in self.what)

    @property
    def static(self) -> tuple[str, ...]:
        """What is asked for that is reweighted."""
        return tuple(name for name in STATIC if name in self.what)


@dataclass(frozen=True)
class TransportState:
    """Where a run is.

    Attributes:
        results: of the segments that are over, as of the last one. time_ps: of each trajectory so far, negative in equilibration.
        share: of the run that is over; left_s: seconds that it may still take.
    """

    results: TransportResults
    time_ps: float
    share: float
    left_s: float


def transport(
    potential: Potential,
    atoms: Atoms,
    settings: TransportSettings,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: Callable[[TransportState], None] | None = None,
) -> TransportResults:
    """Diffusion coefficients, viscosities, their activation energy and static averages of a periodic structure, with error bars.

    Args:
        atoms: the start, e.g. a liquid: it is equilibrated for a short while only, in its own cell.
        folder: where the state of the run is kept, so that it can be resumed; None: nowhere.
        resume: whether to go on with the run in the folder, if there is one.

    Raises:
        UserError: a start that is not periodic in all directions or has constraints; a species that is unknown; a folder with another run,
            or at which another process is at work; a mean potential that blows up.
    """
    state = None
    with closing(TransportRun(potential, atoms, settings, folder, resume)) as run:
        for state in run:
            if progress is not None:
                progress(state)
    assert state is not None
    return state.results


class TransportRun:
    """A run: iterating it moves the replicas, and gives its state after each record."""

    def __init__(
        self, potential: Potential, atoms: Atoms, settings: TransportSettings, folder: str | Path | None, resume: bool
    ) -> None:
        _check_start(atoms)
        self.potential, self.settings = potential, settings
        self.folder = None if folder is None else Path(folder)
        self.name = str(atoms.info.get("name") or atoms.get_chemical_formula())
        self.samples: PosteriorSamples | None = None
        if settings.samples and potential.variances is not None:
            self.samples = potential.sample(settings.samples, settings.seed)
        dynamics = settings.dynamics(atoms.numbers)
        self.structures: Structures = structures_from_ase([atoms] * len(dynamics.copies_K))
        potential.check_species(self.structures)
        moving = [potential, *(self.samples if self.samples is not None and settings.dynamic else ())]
        self.replicas = Replicas(atoms, [MovingForces(p, atoms, len(dynamics.copies_K)) for p in moving], dynamics)
        self.static = StaticFrames(settings.static, self.replicas, self.samples)
        self.novelty: float | None = None
        self.spent_s = self.earlier_s = 0.0  # in all, and before this run was resumed
        self.about = json.dumps(_fingerprint(potential, atoms, self.structures, settings, dynamics), sort_keys=True)
        self.lock: IO[bytes] | None = None
        try:
            self._begin(resume)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other processes have the folder."""
        if self.lock is not None:
            self.lock.close()

    def _begin(self, resume: bool) -> None:
        """Take the folder, and up the state of an earlier run; a new one is on disk before it moves."""
        if self.folder is None:
            self._check_length()
            return
        check_folder(self.folder)
        path = self.folder / STATE
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open_locked(self.folder / LOCK)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written to: {error.strerror or error}.") from error
        if not path.exists():
            self._check_length()
            self._save()
            return
        if not resume:
            raise UserError(
                f"{path}: there is a run in this folder. Go on with it by --resume, or give another folder."
            )
        try:
            with np.load(path, allow_pickle=False) as file:
                state = dict(file)
            before, now = json.loads(str(state["about"])), json.loads(self.about)
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UserError(f"{path}: this is no state of a run ({error}).") from error
        other = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
        if other:
            raise UserError(
                f"{path}: the run in this folder was begun with another {', '.join(other)}; it goes on as it began."
            )
        self.replicas.restore(state)
        self._check_length()
        self.static.restore(state)
        self.spent_s = self.earlier_s = float(state["spent_s"])
        novelty = float(state["novelty"])
        self.novelty = None if math.isnan(novelty) else novelty

    def _check_length(self) -> None:
        """Raise UserError unless two segments, which are rounded to records, fit in what is still to be run."""
        dynamics = self.replicas.settings
        segment_fs = dynamics.record_fs * dynamics.segment
        lacks = SEGMENTS * segment_fs > 1000 * self.settings.length_ps + dynamics.record_fs
        if lacks and len(self.replicas.sums) < SEGMENTS:
            raise UserError(
                f"`length_ps` ({self.settings.length_ps:g}) is shorter than two segments of {segment_fs / 1000:g} ps, whose scatter gives "
                "the error bars: take longer trajectories, or a smaller `segment_ps`."
            )

    def _save(self) -> None:
        if self.folder is None:
            return
        novelty = np.array(math.nan if self.novelty is None else self.novelty)
        arrays = {"about": np.array(self.about), "spent_s": np.array(self.spent_s), "novelty": novelty}
        with atomic_write(self.folder / STATE) as file:
            np.savez(file, allow_pickle=False, **(self.replicas.state() | self.static.state() | arrays))

    def __iter__(self) -> Iterator[TransportState]:
        settings, replicas = self.settings, self.replicas
        dynamics = replicas.settings
        every = max(1, round(STATIC_FS / dynamics.record_fs))
        segment_fs = dynamics.record_fs * dynamics.segment
        most = max(SEGMENTS, math.floor(1000 * settings.length_ps / segment_fs + 1e-9))
        results = self.results()
        results.stopped = self._verdict(results, most)
        saved = time.monotonic()
        while not results.stopped:
            begun = time.monotonic()
            over = replicas.advance()
            made = replicas.records - dynamics.equilibrate
            if made > 0 and made % every == 0:
                self._look()
            self.spent_s += time.monotonic() - begun
            if over:
                results = self.results()
                results.stopped = self._verdict(results, most)
            if self._time_left_s() < 0 and not results.stopped:
                results.stopped = f"the time limit is reached; {self._outlook(results)}"
            if over or results.stopped or time.monotonic() - saved > SAVE_S:
                self._save()
                saved = time.monotonic()
            left = self._left_s(results, most)
            share = self.spent_s / max(self.spent_s + left, 1e-9)
            yield TransportState(results, made * dynamics.record_fs / 1000, share, left)
        if len(replicas.sums) < SEGMENTS:
            least = dynamics.record_fs * dynamics.segment / 1000
            raise UserError(
                f"Two segments of {least:g} ps are needed: {results.stopped}. Give it more time, or take shorter segments."
            )
        yield TransportState(results, replicas.time_ps, 1.0, 0.0)

    def results(self) -> TransportResults:
        """What the segments that are over say."""
        if len(self.replicas.sums) < SEGMENTS:
            return TransportResults(time_ps=self.replicas.time_ps)
        results = analyse_segments(self.replicas, self.settings.dynamic, self.novelty, self.name)
        sought = (v for v in results.values if v.name.startswith(WATCHED) and "_infinite_" not in v.name)
        needed = [(v.parts["statistical"] / self.settings.noise(v)) ** 2 if v.value > 0 else math.inf for v in sought]
        if needed:
            needed.append(FREEDOM / results.freedom if results.freedom else math.inf)
        if self.settings.static:
            values, curves, notes = self.static.averages({"novelty": self.novelty, "structures": (self.name,)})
            results.values, results.curves = results.values + values, results.curves + curves
            results.notes += self.static.lost
            results.notes += (
                notes
                if values or curves or self.static.lost
                else ["There are too few frames yet for static averages: longer runs give them."]
            )
            if not self.settings.dynamic:
                needed.append((self.static.precision() / (self.settings.precision or PRECISION)) ** 2)
        results.needed = max(needed, default=math.nan)
        if self.samples is None:
            results.notes.append("There are no samples of a posterior: intervals hold the statistical part alone.")
        return results

    def _verdict(self, results: TransportResults, most: int) -> str:
        """Why the run is over; empty while it is not."""
        if len(self.replicas.sums) >= SEGMENTS and results.needed <= 1 and not results.doubts:
            return f"statistical errors are as small as asked for ({self.settings.wish})"
        if len(self.replicas.sums) >= most:
            return f"trajectories are {results.time_ps:g} ps long; {self._outlook(results)}"
        return ""

    def _outlook(self, results: TransportResults) -> str:
        """How long it would take."""
        if not math.isfinite(results.needed):
            return f"when statistical errors will be {self.settings.wish} cannot be foreseen yet"
        if results.needed <= 1:
            but = ", but segments are too short: see the notes" if results.doubts else ""
            return f"statistical errors are within {self.settings.wish}{but}"
        length, seconds = results.needed * results.time_ps, (results.needed - 1) * self.spent_s
        return f"statistical errors of {self.settings.wish} would take {length:.3g} ps in all, {format_duration(seconds)} more"

    def _left_s(self, results: TransportResults, most: int) -> float:
        """Seconds that the run may still take."""
        replicas = self.replicas
        dynamics = replicas.settings
        longest = dynamics.equilibrate + most * dynamics.segment
        wanted = longest
        if math.isfinite(results.needed) and not results.doubts:
            made = max(SEGMENTS, len(replicas.sums)) * dynamics.segment
            wanted = min(
                longest, dynamics.equilibrate + math.ceil(max(SEGMENTS * dynamics.segment, results.needed * made))
            )
        left = self.spent_s * max(0.0, wanted / max(1, replicas.records) - 1)
        return min(left, max(0.0, self._time_left_s()))

    def _time_left_s(self) -> float:
        """Of the time limit, which counts from where the run was resumed."""
        limit = self.settings.time_limit_s
        return math.inf if limit is None else limit - (self.spent_s - self.earlier_s)

    def _look(self) -> None:
        """Take frames of the mean's trajectories: the largest novelty, and for static averages what all samples say of them."""
        replicas = self.replicas
        here = self.structures.with_positions(
            self.structures.positions.new_tensor(replicas.positions[0].reshape(-1, 3))
        )
        if self.potential.novelty is not None:
            novelty = self.potential(here, novelty=True).novelty
            assert novelty is not None
            self.novelty = max(self.novelty or 0.0, float(novelty.max()))
        if self.settings.static:
            self.static.add(here)


def _check_start(atoms: Atoms) -> None:
    if not atoms.pbc.all() or atoms.cell.rank < 3:
        raise UserError(
            "The start must be periodic in all directions: diffusion in an empty space has no density. Set pbc and a cell."
        )
    if atoms.constraints:
        raise UserError("The start has constraints, which transport does not keep; remove them.")
    if len(atoms) < 2:
        raise UserError("The start has one atom, which cannot move against others; repeat the cell.")


def _fingerprint(
    potential: Potential, atoms: Atoms, structures: Structures, settings: TransportSettings, dynamics: DynamicsSettings
) -> dict[str, Any]:
    """What a run that goes on must have in common with how it began."""
    header, tensors = potential.state()
    parts = {name: value for name, value in header.items() if name not in SAID}
    model, start = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()), hashlib.sha256()
    for name, value in sorted(tensors.items()):
        model.update(name.encode() + value.numpy().tobytes())
    for part in (
        atoms.positions,
        atoms.cell.array,
        atoms.numbers,
        atoms.get_masses(),
        structures.charges.cpu().numpy(),
    ):
        start.update(np.ascontiguousarray(part).tobytes())
    chosen = {name: value for name, value in asdict(settings).items() if name not in FREE}
    resolved = asdict(dynamics) | chosen | {"model": model.hexdigest()[:16], "start": start.hexdigest()[:16]}
    return json.loads(json.dumps(resolved))


def format_duration(seconds: float) -> str:
    """As 40 s, 12 min or 3.5 h."""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
