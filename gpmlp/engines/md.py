"""Molecular dynamics with ASE: integrators whose bath may change from step to step, runs as generators of states, and their files."""

from __future__ import annotations

import copy
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import ase.io
import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixCartesian
from ase.md.bussi import Bussi
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.verlet import VelocityVerlet

from gpmlp.core import errors
from gpmlp.core.errors import UserError
from gpmlp.core.units import GPA
from gpmlp.io.ase_atoms import read_frame, structures_from_ase
from gpmlp.io.charges import set_charge, stated_charge
from gpmlp.io.extxyz import FrameOffsets, scan_frames
from gpmlp.io.files import check_target, cut_tail
from gpmlp.io.structure_files import UNREADABLE
from gpmlp.potential.potential import Potential

FORCE_ATOMS = 4  # whose force variances are predicted for a frame
STRIDE = 100  # steps between two frames with uncertainties, at least, by default: they take about as long as ten steps
PREFIX = "gpmlp_"
VELOCITIES = ("velo", "vel", "velocities", "velocity")  # arrays in any case
COLDEST, HOT = 1e-2, 1e4  # K; velocities beyond are in another unit
KEPT = (FixAtoms, FixCartesian)  # constraints that extended XYZ keeps
CONSTRAINTS = "constraints"  # info of a frame: names of those that it does not keep

COLUMNS = "step time_fs temperature_K potential_eV kinetic_eV conserved_eV drift_eV_per_atom"
COLUMNS += " largest_force_std_eV_per_A largest_local_energy_std_eV largest_novelty"
HEADER = f"# {COLUMNS}\n"
HOTTEST = 1e6  # K; beyond, the integration has blown up
PRESSURE_FACTOR = 10.0  # of the barostat's time constant to the thermostat's


@dataclass(frozen=True)
class Bath:
    """What couples to the atoms of a run; temperature and pressure may depend on the number of the step.

    Attributes:
        temperature_K: None for constant energy.
        relaxation_fs: time constant of the thermostat.
        pressure_GPa: None for a fixed cell.
        isotropic: whether only the volume of the cell changes, not its shape.
    """

    temperature_K: Callable[[int], float] | None = None
    relaxation_fs: float = 100.0
    pressure_GPa: Callable[[int], float] | None = None
    isotropic: bool = True


class Integrator:
    """An integrator of ASE that moves atoms, in place, one step at a time under a bath.

    Langevin dynamics in the BAOAB splitting (Leimkuhler & Matthews, J. Chem. Phys. 138, 174102 (2013)) with ASE's barostat, or with
    `rescaling` velocity Verlet with Bussi's stochastic velocity rescaling (J. Chem. Phys. 126, 014101 (2007)).
    """

    def __init__(
        self,
        atoms: Atoms,
        bath: Bath,
        timestep_fs: float,
        generator: np.random.Generator,
        step: int = 0,
        cell_state: tuple[Any, Any] = (0.0, None),
        rescaling: bool = False,
    ) -> None:
        """Set up at a step.

        Args:
            generator: of the thermostat's random numbers.
            cell_state: momentum of the cell and force on it (see `cell_state`), of a run that goes on.
        """
        self.bath, self.step = bath, step
        timestep, relaxation = timestep_fs * units.fs, bath.relaxation_fs * units.fs
        self._temperature = bath.temperature_K(step) if bath.temperature_K else 0.0
        self._pressure = bath.pressure_GPa(step) if bath.pressure_GPa else 0.0
        self.dynamics: Any  # each integrator of ASE has attributes of its own
        if rescaling and bath.temperature_K:
            self.dynamics = Bussi(atoms, timestep, self._temperature, relaxation, rng=generator)
            return
        if rescaling:
            self.dynamics = VelocityVerlet(atoms, timestep)
            return
        options: dict[str, Any] = {}
        if bath.temperature_K:
            options |= {"temperature_K": self._temperature, "T_tau": relaxation, "rng": generator}
        if bath.pressure_GPa:
            options |= {"externalstress": -self._pressure * GPA, "P_tau": PRESSURE_FACTOR * relaxation}
            options |= {"hydrostatic": bath.isotropic}
        with warnings.catch_warnings():  # of its mass of the cell, and of fixed atoms
            warnings.simplefilter("ignore", UserWarning)
            self.dynamics = LangevinBAOAB(atoms, timestep, **options)
        if bath.pressure_GPa:
            momentum, force = copy.deepcopy(cell_state)  # changed in place
            self.dynamics.p_eps = momentum
            if force is not None:
                self.dynamics.force_eps = force

    def advance(self) -> int:
        """Make one step, at the temperature and pressure that the bath has at its end, and return its number."""
        self.step += 1
        if self.bath.temperature_K and (temperature := self.bath.temperature_K(self.step)) != self._temperature:
            self._temperature = temperature
            self.dynamics.set_temperature(temperature)
        if self.bath.pressure_GPa and (pressure := self.bath.pressure_GPa(self.step)) != self._pressure:
            self._pressure, stress = pressure, -pressure * GPA
            self.dynamics.externalstress = stress if self.bath.isotropic else stress * np.identity(3)
        self.dynamics.step()
        return self.step

    @property
    def heat_eV(self) -> float:
        """What the velocity rescaling has brought in since the set-up."""
        return getattr(self.dynamics, "transferred_energy", 0.0)

    @property
    def cell_state(self) -> tuple[Any, Any]:
        """Momentum of the cell and the force on it, as LangevinBAOAB has them: that of half a step before the velocities."""
        return copy.deepcopy((getattr(self.dynamics, "p_eps", 0.0), getattr(self.dynamics, "force_eps", None)))


@dataclass(frozen=True)
class MDSettings:
    """What a run is.

    Attributes:
        ensemble: 'nve' (velocity Verlet) or 'nvt' (the same with Bussi's stochastic velocity rescaling).
        temperature_K: of the thermostat, and of the initial velocities of atoms that have none.
        steps: number of the last step.
        timestep_fs, relaxation_fs: time step, and time constant of the thermostat.
        interval: steps between two states.
        uncertainty: steps between two states with uncertainties, a multiple of the interval; 0 = none.
        seed: of initial velocities and thermostat.
    """

    ensemble: Literal["nve", "nvt"] = "nve"
    temperature_K: float | None = None
    steps: int = 1000
    timestep_fs: float = 1.0
    relaxation_fs: float = 100.0
    interval: int = 10
    seed: int = 0
    uncertainty: int = 0

    def __post_init__(self) -> None:
        errors.check_choice("ensemble", self.ensemble, ("nve", "nvt"))
        errors.check_positive("timestep_fs", self.timestep_fs)
        errors.check_positive("relaxation_fs", self.relaxation_fs)
        errors.check_positive("steps", self.steps, allow_zero=True)
        errors.check_positive("interval", self.interval)
        errors.check_positive("uncertainty", self.uncertainty, allow_zero=True)
        if self.uncertainty % self.interval:
            raise UserError(
                f"`uncertainty` must be a multiple of the {self.interval} steps between two frames; got {self.uncertainty}."
            )
        if self.temperature_K is not None:
            errors.check_positive("temperature_K", self.temperature_K, allow_zero=self.ensemble == "nve")
        elif self.ensemble == "nvt":
            raise UserError("`temperature_K` must be given for ensemble nvt.")

    @property
    def bath(self) -> Bath:
        """The thermostat of nvt."""
        temperature = self.temperature_K
        constant = None if self.ensemble == "nve" or temperature is None else lambda step: temperature
        return Bath(constant, self.relaxation_fs)


@dataclass(frozen=True)
class MDState:
    """One moment of a run.

    Attributes:
        conserved_eV: total energy, less the heat that the thermostat brought in.
        drift_eV_per_atom: conserved_eV since step 0, per atom.
        atoms: copy of the atoms with velocities, energy, forces and stress, and what `uncertainty` writes.
        uncertainty: of the prediction; None where that was not asked for.
    """

    step: int
    time_fs: float
    temperature_K: float
    potential_eV: float
    kinetic_eV: float
    conserved_eV: float
    drift_eV_per_atom: float
    atoms: Atoms
    uncertainty: FrameUncertainty | None = None

    def row(self) -> str:
        """One line of the energies file."""
        force, energy, novelty = self.uncertainty.largest if self.uncertainty else (math.nan,) * 3
        return (
            f"{self.step:10d} {self.time_fs:14.4f} {self.temperature_K:12.3f} {self.potential_eV:18.9f} "
            f"{self.kinetic_eV:16.9f} {self.conserved_eV:18.9f} {self.drift_eV_per_atom:14.6e} "
            f"{force:12.5e} {energy:12.5e} {novelty:12.5e}"
        )


def run_dynamics(
    atoms: Atoms,
    calculator: Calculator,
    settings: MDSettings,
    monitor: Callable[[Atoms], FrameUncertainty] | None = None,
) -> Iterator[MDState]:
    """Run dynamics, yielding the state every `interval` steps, and the first and the last.

    Atoms that come from a state of an earlier run (info: step, time_fs, heat_eV, conserved_start_eV) go on from there and
    yield only what is new. The thermostat of a continued run draws from a generator seeded with (seed, step).

    Args:
        monitor: gives the uncertainty of a frame (UncertaintyMonitor) where `settings.uncertainty` wants it; changes nothing in the run.

    Raises:
        UserError: no velocities and no temperature, or the run has blown up.
    """
    atoms = _start_of_run(atoms)
    first = int(atoms.info.get("step", 0))
    earlier_time = float(atoms.info.get("time_fs", 0.0))
    earlier_heat, start = float(atoms.info.get("heat_eV", 0.0)), atoms.info.get("conserved_start_eV")
    generator = np.random.default_rng([settings.seed, first])
    atoms.calc = calculator
    atoms.get_potential_energy()  # says what cannot be predicted at all before anything else is asked for
    ensure_velocities(atoms, settings.temperature_K, generator)
    integrator = Integrator(atoms, settings.bath, settings.timestep_fs, generator, first, rescaling=True)

    def state() -> MDState:
        nonlocal start
        step = integrator.step
        kinetic, potential = atoms.get_kinetic_energy(), atoms.get_potential_energy()
        heat = earlier_heat + integrator.heat_eV
        conserved, temperature = kinetic + potential - heat, atoms.get_temperature()
        if not (math.isfinite(conserved) and temperature < HOTTEST):
            raise UserError(
                f"step {step}: the run has blown up (temperature {temperature:.3g} K, energy {conserved:.3g} eV); take a shorter "
                "time step, relax the start, or train on structures like those it went to."
            )
        start = conserved if start is None else start
        time = earlier_time + (step - first) * settings.timestep_fs
        snapshot = _snapshot(atoms, {"step": step, "time_fs": time, "heat_eV": heat, "conserved_start_eV": start})
        drift = (conserved - start) / len(atoms)
        uncertainty = None
        if monitor and settings.uncertainty and step % settings.uncertainty == 0:
            uncertainty = monitor(snapshot)
            uncertainty.write_to(snapshot)
        return MDState(step, time, temperature, potential, kinetic, conserved, drift, snapshot, uncertainty)

    if not first:
        yield state()
    while integrator.step < settings.steps:
        stride = min(settings.interval - integrator.step % settings.interval, settings.steps - integrator.step)
        begun = integrator.step
        try:
            for _ in range(stride):
                integrator.advance()
        except UserError as error:
            raise UserError(f"between steps {begun} and {begun + stride}: {error}") from error
        yield state()


def _start_of_run(atoms: Atoms) -> Atoms:
    """A copy without the uncertainties of an earlier run, that names the constraints which its file will not keep."""
    atoms = atoms.copy()
    remove_uncertainty(atoms)
    atoms.info.pop(CONSTRAINTS, None)
    if other := _other_constraints(atoms):
        atoms.info[CONSTRAINTS] = " ".join(other)
    return atoms


def default_timestep_fs(numbers: np.ndarray) -> float:
    """A time step for the lightest element: 0.5 fs with hydrogen, 1 fs up to neon, else 2 fs."""
    if not len(numbers):
        raise UserError("The start structure has no atoms.")
    lightest = int(numbers.min())
    return 0.5 if lightest == 1 else 1.0 if lightest <= 10 else 2.0


def ensure_velocities(atoms: Atoms, temperature_K: float | None, generator: np.random.Generator) -> None:
    """Keep the velocities that the atoms have; draw them at the temperature, in place, if they have none.

    Raises:
        UserError: no velocities and no temperature, or velocities in a unit that cannot be A/fs.
    """
    if atoms.has("momenta") and np.abs(atoms.get_momenta()).max() > 0 or _take_velocities(atoms):
        return
    if temperature_K is None:
        raise UserError("The start has no velocities: give a temperature to draw them at, `temperature_K`.")
    draw_velocities(atoms, temperature_K, generator)


def _take_velocities(atoms: Atoms) -> bool:
    """Take velocities from an array, A/fs, as QUIP (velo), GPUMD (vel) and others write it; False if there is none."""
    found = False
    for key in [key for key in atoms.arrays if key.lower() in VELOCITIES]:
        velocities = np.asarray(atoms.arrays[key], dtype=float)
        del atoms.arrays[key]  # of this moment only
        if found or velocities.shape != (len(atoms), 3) or not np.isfinite(velocities).all() or not velocities.any():
            continue
        atoms.set_velocities(velocities / units.fs)
        temperature, found = atoms.get_temperature(), True
        if not COLDEST < temperature < HOT:
            raise UserError(
                f"The velocities `{key}` of the start would be those of {temperature:.3g} K if their unit is A/fs, which is meant; "
                "convert them, or give `momenta` in ASE's units."
            )
        text = f"velocities of the start are `{key}`, in A/fs: {temperature:.0f} K."
        warnings.warn(text, errors.ProgressNotice, stacklevel=3)
    return found


def draw_velocities(atoms: Atoms, temperature_K: float, generator: np.random.Generator) -> None:
    """Draw velocities at a temperature, in place; the centre of mass rests."""
    masses = atoms.get_masses()[:, None]
    # Maxwell-Boltzmann: each component of v has variance kT / m; then the centre of mass is brought to rest
    velocities = generator.standard_normal((len(atoms), 3)) * np.sqrt(units.kB * temperature_K / masses)
    if len(atoms) > 1:
        velocities -= (masses * velocities).sum(0) / masses.sum()
        velocities *= math.sqrt(len(atoms) / (len(atoms) - 1))
    atoms.set_velocities(velocities)


def _snapshot(atoms: Atoms, info: dict[str, float]) -> Atoms:
    """Copy atoms with what the calculator knows of them."""
    snapshot = atoms.copy()
    snapshot.info |= info
    snapshot.calc = SinglePointCalculator(snapshot, **atoms.calc.results)
    return snapshot


@contextmanager
def record_trajectory(
    trajectory: str | os.PathLike[str], energies: str | os.PathLike[str] | None, replace: bool = False
) -> Iterator[Callable[[MDState], None]]:
    """Yield a function that appends a State to an extended XYZ trajectory and to a table of energies.

    No file is made or changed before the first State has come. Each frame and line is written in one piece and flushed, so
    an interrupted run leaves complete ones.

    Args:
        replace: whether to empty files that are there first.
    """
    with ExitStack() as stack:
        files: list[IO[str]] = []

        def append(state: MDState) -> None:
            text = io.StringIO()
            ase.io.write(text, state.atoms, format="extxyz")
            mode = "w" if replace else "a"
            try:
                if not files:
                    for path in (trajectory, energies or os.devnull):
                        files.append(stack.enter_context(open(path, mode, encoding="utf-8")))
                    if files[1].tell() == 0:
                        files[1].write(HEADER)
                for file, piece in zip(files, (text.getvalue(), state.row() + "\n"), strict=True):
                    file.write(piece)
                    file.flush()
            except OSError as error:
                names = f"{trajectory}{f' or {energies}' if energies else ''}"
                raise UserError(f"{names}: could not be written at step {state.step}: {error.strerror}.") from error

        yield append


def check_files(paths: Sequence[str | os.PathLike[str]], existing: bool) -> None:
    """Raise UserError if a run cannot write these files.

    Args:
        existing: whether files that are there already are to be written to.
    """
    for path in paths:
        check_target(path)
        if not Path(path).is_file():
            continue
        if not existing:
            raise UserError(f"{path}: exists; continue that run with --resume, or replace it with --overwrite.")
        if not os.access(path, os.W_OK):
            raise UserError(f"{path}: may not be written to; choose another name, or change its permissions.")


def resume_trajectory(
    trajectory: str | os.PathLike[str], energies: str | os.PathLike[str] | None, start: Atoms | None = None
) -> Atoms:
    """Return the last complete frame of a trajectory and cut off, in both files, what came after it.

    Args:
        start: what the run began from, if known: must hold the same elements in the same order; its constraints are kept.

    Raises:
        UserError: no trajectory, no complete frame in it, not one written by a run, or a run of other atoms or constraints;
            nothing is cut off then.
    """
    path = Path(trajectory)
    if not path.is_file():
        raise UserError(f"{path}: there is no trajectory to resume.")
    layout = scan_frames(path, closed=True)
    if not layout.starts:
        raise UserError(f"{path}: holds no complete frame to resume from; start anew with --overwrite.")
    frame = _last_frame(path, layout)
    if "step" not in frame.info or not frame.has("momenta"):
        raise UserError(f"{path}: its last frame has no step and velocities; it was not written by gpmlp md.")
    if start is not None and start.numbers.tolist() != frame.numbers.tolist():
        raise UserError(
            f"{path}: is a run of {frame.symbols}, but the start is {start.symbols}; give the start which that run had."
        )
    if start is not None:
        _check_charge(frame, start, path)
    _restore_constraints(frame, start, path)
    table = Path(energies) if energies is not None and Path(energies).is_file() else None
    end = _end_of_table(table, int(frame.info["step"])) if table else 0
    cut_tail(path, layout.end)
    if table:
        cut_tail(table, end)
    return frame


def _check_charge(frame: Atoms, start: Atoms, path: Path) -> None:
    """Raise UserError where the start states another total charge than a frame of the run; a frame that states none takes it."""
    was, now = stated_charge(frame.info, str(path)), stated_charge(start.info, "the start")
    if was is None and now is not None:
        set_charge(frame, now)
    elif now is not None and was != now:
        raise UserError(
            f"{path}: is a run with the total charge {was:g}, but the start has {now:g}; give the start which that run had."
        )


def _other_constraints(atoms: Atoms) -> list[str]:
    """Names of constraints that a frame of extended XYZ does not keep."""
    return sorted(type(constraint).__name__ for constraint in atoms.constraints if not isinstance(constraint, KEPT))


def _restore_constraints(frame: Atoms, start: Atoms | None, path: Path) -> None:
    """Give a frame the constraints of the start, of which its file keeps fixed atoms only.

    Raises:
        UserError: the run had others, and the start does not hold them.
    """
    if start is not None and start.constraints:
        start.set_positions(
            start.positions
        )  # what is measured at the first step, as lengths of bonds, is that of the start
        frame.set_constraint(start.constraints)
    lost = str(frame.info.get(CONSTRAINTS, "")).split()
    if lost and lost != _other_constraints(frame):
        raise UserError(
            f"{path}: is a run with the constraints {' '.join(lost)}, and the start has "
            f"{' '.join(_other_constraints(frame)) or 'no such constraint'}; give the start which that run had."
        )


def _last_frame(path: Path, layout: FrameOffsets) -> Atoms:
    """The last complete frame of an extended XYZ file, whatever follows it."""
    with open(path, "rb") as file:
        file.seek(layout.starts[-1])
        text = file.read(layout.end - layout.starts[-1])
    try:
        return read_frame(text)
    except UNREADABLE as error:
        raise UserError(f"{path}: its last frame cannot be read: {error}.") from error


def _end_of_table(path: Path, last_step: int) -> int:
    """Number of bytes before the lines of later steps, and before an incomplete last line."""
    end = 0
    with open(path, "rb") as file:
        for line in file:
            words = line.split()
            if end == 0 and not HEADER.encode().startswith(line):
                raise UserError(f"{path}: is no table of energies written by gpmlp md; give --energies another name.")
            later = words and words[0] != b"#" and (not words[0].isdigit() or int(words[0]) > last_step)
            if later or not line.endswith(b"\n"):
                break
            end += len(line)
    return end


@dataclass(frozen=True, eq=False)
class FrameUncertainty:
    """Calibrated standard deviations and novelty of one frame.

    Attributes:
        local_energy_std: (atoms,) eV.
        atom_force_std: (atoms,) eV/A, of the force vector, estimated from posterior samples (force_samples.py).
        novelty: (atoms,) Mahalanobis distance / threshold; None where the potential has none.
        force_std: eV/A, the same exactly (the root of the summed variances of its components), the largest of FORCE_ATOMS atoms.
        force_atom: that atom, counted from 0.
    """

    local_energy_std: np.ndarray
    atom_force_std: np.ndarray
    novelty: np.ndarray | None
    force_std: float
    force_atom: int

    @property
    def largest(self) -> tuple[float, float, float]:
        """Force, eV/A; local energy, eV; novelty, NaN where there is none."""
        novelty = float("nan") if self.novelty is None else float(self.novelty.max())
        return self.force_std, float(self.local_energy_std.max()), novelty

    def write_to(self, atoms: Atoms) -> None:
        """Put it into the arrays and the info of a frame."""
        atoms.set_array(f"{PREFIX}local_energy_std", self.local_energy_std)
        atoms.set_array(f"{PREFIX}force_std", self.atom_force_std)
        if self.novelty is not None:
            atoms.set_array(f"{PREFIX}novelty", self.novelty)
        atoms.info[f"{PREFIX}largest_force_std"] = self.force_std
        atoms.info[f"{PREFIX}largest_force_std_atom"] = self.force_atom


def remove_uncertainty(atoms: Atoms) -> None:
    """Remove what FrameUncertainty.write_to wrote, in place."""
    for holder in (atoms.info, atoms.arrays):
        for key in [key for key in holder if key.startswith(PREFIX)]:
            del holder[key]


class UncertaintyMonitor:
    """Predicts the FrameUncertainty of atoms.

    Variances of forces cost some twenty predictions for all atoms: they are computed of the FORCE_ATOMS atoms at which estimates from
    posterior samples, at the price of a few predictions, are largest.
    """

    def __init__(self, potential: Potential, name: str = "atoms") -> None:
        """Watch with a potential.

        Args:
            name: what error messages call the atoms.

        Raises:
            UserError: the potential holds no variances.
        """
        potential.check_variance("forces")
        self.potential, self.name = potential, name

    def __call__(self, atoms: Atoms) -> FrameUncertainty:
        structures = structures_from_ase([atoms], [self.name])
        wanted = "atom_energies", "sampled_forces"
        prediction = self.potential(structures, wanted, novelty=self.potential.novelty is not None)
        local, sampled = prediction.atom_energies_variance, prediction.sampled_forces_covariance
        assert local is not None and sampled is not None, "variances were asked for"
        estimates = sampled.diagonal().total.sum(1).sqrt()
        few = estimates.topk(min(FORCE_ATOMS, len(estimates))).indices
        forces = self.potential(structures, "forces", atoms=few).forces_variance
        assert forces is not None, "variances of forces were asked for"
        variance = forces.total[few].sum(1)
        worst = int(variance.argmax())
        novelty = None if prediction.novelty is None else prediction.novelty.cpu().numpy()
        std = local.total.sqrt().cpu().numpy(), estimates.cpu().numpy()
        return FrameUncertainty(*std, novelty, float(variance[worst].sqrt()), int(few[worst]))
