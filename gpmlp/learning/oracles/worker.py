"""A worker makes one attempt at one label: a single point by a calculator, checked, in this process or another; no torch."""

from __future__ import annotations

import errno
import faulthandler
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError

from gpmlp.core.units import VOIGT_INDEX
from gpmlp.learning.oracles import results
from gpmlp.learning.oracles.codes import OracleError, build_calculator, find_calculator
from gpmlp.learning.oracles.results import TICKS, LockWaiter, child_processes

STEP = 0.02  # A, the largest displacement of an atom when energies are compared with forces
SLOPE = 0.05  # by which energies and forces may disagree: a share of the change of energy,
ROUGHNESS = 5e-5  # and eV/atom, what a self-consistent code leaves unconverged
RESTING = 0.05  # eV/A; below there is no slope to compare
ASYMMETRY = 1e-2  # of the largest component of a stress; codes print more digits than that
NOT_CONVERGED = "convergence NOT achieved"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
STOPPED = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, 128 + signal.SIGTERM, 128 + signal.SIGINT)
LONGEST_REASON = 600


class LabelError(ValueError):
    """A label that came back but cannot be trusted."""


class _TimedOut(BaseException):
    """Not an Exception, so that no calculator swallows it."""


# ------------------------------------------------------------ an attempt and its record


def grace_seconds(timeout: float) -> float:
    """How long to wait before the next, harder way to end what takes too long."""
    return min(max(1.0, 0.05 * timeout), 30.0)


def make_attempt(job: Mapping[str, Any], say: Callable[[Mapping[str, Any]], None] | None = None) -> dict[str, Any]:
    """Make one attempt at a label, write its record, and return it.

    Nothing is computed if the record is there already, or appears while another process computes this key, which is waited for.

    Args:
        job: what `gpmlp.learning.oracles.oracle.make_job` makes.
        say: takes {"waiting": why}, and {"computing": True} when the computation begins; given in a process that is ours alone.
    """
    waiting = LockWaiter(job["key"], give_notice if say is None else lambda text: say({"waiting": text}))
    try:
        with results.label_lock(job["spool"], job["key"], waiting):
            record = results.read_record(job["spool"], job["key"], job["attempt"])
            if record is not None:
                return record
            if say is not None:
                say({"computing": True})
            record = _attempt(job, ours=say is not None)
            if record["kind"] in (results.LABEL, results.FAILED):
                results.write_record(job["spool"], record)
            return record
    except OSError as error:
        return attempt_record(job, results.DISK, f"{job['spool']}: {error.strerror or error}")


def give_notice(text: str) -> None:
    """Tell whoever watches this process."""
    from gpmlp.core.errors import ProgressNotice

    warnings.warn(text, ProgressNotice, stacklevel=2)


def attempt_record(job: Mapping[str, Any], kind: str, reason: str = "", **values: Any) -> dict[str, Any]:
    """The record of an attempt."""
    reason = " ".join(reason.split())
    if len(reason) > LONGEST_REASON:
        reason = f"{reason[: LONGEST_REASON // 2]} ... {reason[-LONGEST_REASON // 2 :]}"
    record = {"key": job["key"], "attempt": job["attempt"], "kind": kind, "reason": reason}
    return {**record, "folder": str(folder_of(job)), "host": socket.gethostname(), "pid": os.getpid(), **values}


def folder_of(job: Mapping[str, Any]) -> Path:
    """The scratch folder of an attempt."""
    return Path(job["scratch"]) / f"{job['key']}.{job['attempt']}"


def _attempt(job: Mapping[str, Any], ours: bool) -> dict[str, Any]:
    folder = folder_of(job)
    if folder.exists():
        shutil.rmtree(folder)  # of the same attempt, cut off
    folder.mkdir(parents=True)
    try:
        find_calculator(job["calculator"])  # importing it takes no time of the label's
        start, booted = time.monotonic(), _uptime()
        with _redirected(folder, ours), _limited(job["timeout_s"], folder, ours):
            answer = compute_label(job, folder)
    except OracleError as error:
        return attempt_record(job, results.UNUSABLE, str(error))
    except _TimedOut:
        kill_children(booted)
        return attempt_record(job, results.FAILED, f"no answer within timeout_s {job['timeout_s']:g}")
    except (Exception, SystemExit) as error:
        return attempt_record(job, *_failure(error, folder))
    if not job["keep"]:
        shutil.rmtree(folder, ignore_errors=True)
    return attempt_record(job, results.LABEL, seconds=time.monotonic() - start, **answer)


def _failure(error: BaseException, folder: Path) -> tuple[str, str]:
    """Kind and reason of an attempt that an exception ended."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
            return results.DISK, f"{folder}: {cause.strerror}"
        if isinstance(cause, subprocess.CalledProcessError) and cause.returncode in STOPPED:
            return results.INTERRUPTED, f"{cause.cmd} was ended by a signal"
        cause = cause.__cause__ or cause.__context__
    text = str(error) if isinstance(error, LabelError) else f"{type(error).__name__}: {error}"
    return results.FAILED, f"{text} {failure_text(folder)}"


@contextmanager
def _redirected(folder: Path, ours: bool) -> Iterator[None]:
    """What calculators print goes into the scratch folder, where the process is ours."""
    if not ours:
        yield
        return
    with open(folder / "output.txt", "ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        sys.stdout.flush()
        nothing = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nothing, descriptor)
        os.close(nothing)


@contextmanager
def _limited(timeout: float | None, folder: Path, ours: bool) -> Iterator[None]:
    """Raise _TimedOut after the timeout; where compiled code never lets Python do so, end the process (only if it is ours)."""
    if timeout is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise _TimedOut

    before = signal.signal(signal.SIGALRM, ring)
    file = open(folder / "hung.txt", "w") if ours else None
    if file is not None:
        faulthandler.dump_traceback_later(timeout + grace_seconds(timeout), exit=True, file=file)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    try:
        yield
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)  # it may still ring just before
        finally:
            signal.signal(signal.SIGALRM, before)
            if file is not None:
                faulthandler.cancel_dump_traceback_later()
                file.close()
                (folder / "hung.txt").unlink(missing_ok=True)


def _uptime() -> float:
    """Seconds since boot, in whole ticks of the clock that processes are begun by."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS) / TICKS


def kill_children(since: float) -> None:
    """End what a calculator started and did not wait for."""
    for pid in child_processes(os.getpid(), since):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):  # a grandchild, or one that somebody waited for
            os.waitpid(pid, 0)


# ------------------------------------------------------------ a single point


def compute_label(job: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The label that a job asks for: energy (eV), forces (eV/A), stress ((3, 3) eV/A^3 or None), as plain numbers.

    Args:
        directory: where the calculator may leave files.

    Raises:
        OracleError: the oracle cannot label anything like this.
        LabelError: what came back cannot be trusted.
        Exception: whatever the calculator raises.
    """
    given, moments = job["structure"], job["magnetic_moments"]
    atoms = Atoms(given["species"], positions=given["positions"], cell=given["cell"], pbc=given["periodic"])
    if moments:
        atoms.set_initial_magnetic_moments([moments.get(symbol, 0.0) for symbol in atoms.get_chemical_symbols()])
    answer = _answer(job, atoms, directory / "label")
    if job["check"]:
        _compare_energy_with_forces(job, atoms, answer, directory / "displaced")
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in answer.items()}


def _answer(job: Mapping[str, Any], atoms: Atoms, directory: Path) -> dict[str, Any]:
    directory.mkdir(parents=True, exist_ok=True)
    calculator = build_calculator(job["calculator"], job["kwargs"], directory)
    if callable(getattr(type(calculator), "label", None)):
        answer = _by_oracle(calculator, job)
    else:
        answer = _by_calculator(calculator, job, atoms)
        _check_converged(calculator, directory)
    _check(job, answer, len(atoms))
    return answer


def _by_calculator(calculator: Any, job: Mapping[str, Any], atoms: Atoms) -> dict[str, Any]:
    work, name = atoms.copy(), job["calculator"]
    if name == "quantum-espresso":
        _suit_espresso(calculator, work)
    work.calc = calculator
    forces = np.array(work.get_forces(apply_constraint=False), dtype=float)
    energy = free = float(work.get_potential_energy())
    if job["free_energy"] is not False:
        try:
            free = float(work.get_potential_energy(force_consistent=True))
        except (PropertyNotImplementedError, KeyError) as error:
            if job["free_energy"]:
                text = "gives no free energy, which free_energy: true asks for; leave it out to take the energy"
                raise OracleError(f"{name} {text}") from error
    stress = None
    properties = getattr(calculator, "implemented_properties", ())
    if job["stress"] is not False and all(job["structure"]["periodic"]) and (job["stress"] or "stress" in properties):
        try:
            stress = np.array(work.get_stress(voigt=True, apply_constraint=False), dtype=float)
        except (PropertyNotImplementedError, NotImplementedError) as error:
            if job["stress"]:
                raise OracleError(f"{name} gives no stress, which stress: true asks for") from error
    return {"energy": free, "extrapolated": energy, "forces": forces, "stress": stress}


def _by_oracle(oracle: Any, job: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of a class of the user's that has `label(structures) -> Targets` in place of a calculator."""
    from gpmlp.learning.labels import structure_of

    targets = oracle.label(structure_of(job["structure"]))
    stress, energy = targets.stresses[0].numpy(), float(targets.energies[0])
    stress = None if np.isnan(stress).all() else stress
    return {"energy": energy, "extrapolated": energy, "forces": targets.forces.numpy(), "stress": stress}


def _suit_espresso(calculator: Any, atoms: Atoms) -> None:
    """pw.x computes nothing but periodic cells, and stops in its middle where a pseudopotential is missing."""
    if abs(atoms.cell.volume) < 1e-6:
        raise OracleError("pw.x needs a cell in all three directions; put the molecule into a box")
    missing = set(atoms.get_chemical_symbols()) - set(calculator.parameters["pseudopotentials"])
    if missing:
        raise OracleError(f"kwargs.pseudopotentials names no file for {', '.join(sorted(missing))}")
    atoms.pbc = True


def failure_text(folder: Path) -> str:
    """What a program wrote in a folder about its end, '' if nothing."""
    text = ""
    with suppress(OSError):
        for output in sorted(folder.glob("*/espresso.pwo")):
            if NOT_CONVERGED in output.read_text(errors="replace"):
                text += " self-consistency was not reached"
        for crash in sorted(folder.glob("*/CRASH")):
            text += " ".join(line for line in crash.read_text(errors="replace").split("\n") if "%%" not in line)
    return text


def _check_converged(calculator: Any, directory: Path) -> None:
    """Some codes answer although they did not converge."""
    output = directory / "espresso.pwo"
    text = output.read_text(errors="replace") if output.is_file() else ""
    if getattr(calculator, "converged", None) is False or NOT_CONVERGED in text:
        raise LabelError("self-consistency was not reached")


def _check(job: Mapping[str, Any], answer: dict[str, Any], n: int) -> None:
    """Shapes, NaN, and forces that no code means; makes stress (3, 3) and exactly symmetric."""
    energy, forces = answer["energy"], answer["forces"]
    if not np.isfinite(energy):
        raise LabelError(f"the energy is {energy}")
    if forces.shape != (n, 3):
        raise LabelError(f"forces have the shape {forces.shape} for {n} atoms")
    if not np.isfinite(forces).all():
        raise LabelError(f"the force on atom {int((~np.isfinite(forces)).any(axis=1).argmax())} is NaN or infinite")
    if answer["stress"] is not None:
        answer["stress"] = _symmetric(np.asarray(answer["stress"], dtype=float))
    if not job["check_forces"]:
        return
    sizes, most = np.linalg.norm(forces, axis=1), job["largest_force"]
    if sizes.max() > most:
        atom = int(sizes.argmax())
        raise LabelError(f"the force on atom {atom} is {sizes.max():.3g} eV/A, more than largest_force {most:g}")
    net, most = float(np.linalg.norm(forces.sum(axis=0))) / n, job["largest_net_force"]
    if net > most:
        raise LabelError(f"forces sum up to {net:.3g} eV/A per atom instead of 0, more than largest_net_force {most:g}")


def _symmetric(stress: np.ndarray) -> np.ndarray:
    if stress.shape not in ((6,), (3, 3)):
        raise LabelError(f"the stress has the shape {stress.shape}")
    if not np.isfinite(stress).all():
        raise LabelError("the stress is NaN or infinite")
    if stress.shape == (6,):
        return stress[np.array(VOIGT_INDEX)]
    if np.abs(stress - stress.T).max() > ASYMMETRY * np.abs(stress).max():
        raise LabelError("the stress is not symmetric")
    return 0.5 * (stress + stress.T)


def _compare_energy_with_forces(job: Mapping[str, Any], atoms: Atoms, answer: dict[str, Any], directory: Path) -> None:
    """One more call a step along the forces: E(x + s) - E(x) = -s.(F(x) + F(x + s)) / 2 up to the third order of s."""
    forces = answer["forces"]
    largest = np.linalg.norm(forces, axis=1).max()
    if largest < RESTING:
        return
    step = forces * (STEP / largest)
    moved = atoms.copy()
    moved.positions += step
    shifted = {**job["structure"], "positions": moved.positions.tolist()}
    other = _answer({**job, "structure": shifted}, moved, directory)
    change = other["energy"] - answer["energy"]
    expected = -float((step * (forces + other["forces"])).sum()) / 2
    if abs(change - expected) > SLOPE * abs(expected) + ROUGHNESS * len(atoms):
        raise LabelError(
            f"energy and forces contradict each other: a step of at most {STEP} A along the forces changes the energy by "
            f"{change:.6g} eV, the forces say {expected:.6g} eV"
        )


# ------------------------------------------------------------ a process that makes attempts


def main() -> None:
    """Read jobs, one JSON line each, and answer with lines: "waiting" if it has to, "computing" when it begins, then the record."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    jobs, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):  # mpirun would read our jobs, and compiled code print among our answers
        os.dup2(nothing, descriptor)

    def say(message: Mapping[str, Any]) -> None:
        with suppress(BrokenPipeError):  # the run that asked is gone; the record is on disk
            answers.write(json.dumps(message) + "\n")
            answers.flush()

    for line in jobs:
        job = json.loads(line)
        sys.path += [entry for entry in job["path"] if entry not in sys.path]
        say(make_attempt(job, say))


if __name__ == "__main__":
    main()
