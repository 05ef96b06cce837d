"""Single points of many structures by a calculator: the first second in this process, then by a process for each core; no torch.

What a structure gets does not depend on who computed it, nor on the structures before it: each has a calculator of its own, unless
calculators are to be used again.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from gpmlp.core.calculators import ANSWERS, CalculatorError, build_calculator, electronic_kwargs
from gpmlp.core.single_point import LabelError, ask_calculator, build_atoms, check_answer

ALONE_S = 1.0  # s of work before other processes are worth their start
Point = dict[str, Any]  # energy (eV), forces (eV/A), stress ((3, 3) eV/A^3 or None); or error
Take = Callable[[int, Point], None]


class PointCalculator:
    """A calculator as recipes name it, asked of one structure after another in this process."""

    def __init__(self, name: str, kwargs: Mapping[str, Any], reuse: bool = False) -> None:
        """Say which.

        Args:
            reuse: whether one calculator serves all structures of the same total charge, which has to forget each before the next.
        """
        self.name, self.kwargs, self.reuse = name, dict(kwargs), reuse
        self._kept: dict[str, tuple[Any, tempfile.TemporaryDirectory]] = {}
        self._one = threading.Lock()

    def settings(self) -> dict[str, Any]:
        """Arguments of the same in another process."""
        return {"name": self.name, "kwargs": self.kwargs, "reuse": self.reuse}

    def __call__(self, structure: Mapping[str, Any]) -> Point:
        """The point of a structure given by plain numbers (single_point.build_atoms), or {"error": why there is none}.

        Raises:
            CalculatorError: there is no such calculator, or it cannot be made.
        """
        # what calculators keep between calls is not made for several threads, and what they print is for nobody
        with self._one, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            try:
                return self._point(structure)
            except CalculatorError:
                raise
            except LabelError as error:
                return {"error": str(error)}
            except Exception as error:  # calculators raise what they like
                return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}

    def _point(self, structure: Mapping[str, Any]) -> Point:
        kwargs = electronic_kwargs(self.name, self.kwargs, structure, needed=False)
        key = json.dumps(kwargs, sort_keys=True)
        if key in self._kept:
            calculator, folder = self._kept[key]
        else:
            folder = tempfile.TemporaryDirectory(prefix="gpmlp-baseline-")
            calculator = build_calculator(self.name, kwargs, Path(folder.name))
        if not callable(getattr(calculator, ANSWERS[0], None)):
            raise CalculatorError(f"{self.name} has no `calculate`, as ASE calculators have")
        if self.reuse:
            self._kept[key] = calculator, folder
        atoms = build_atoms(structure, calculator=self.name)
        stress = None if any(structure["periodic"]) and atoms.cell.rank == 3 else False
        try:
            answer = ask_calculator(calculator, self.name, atoms, Path(folder.name), stress=stress)
        finally:
            if not self.reuse:
                folder.cleanup()
        check_answer(answer, len(atoms))
        return {name: answer[name] for name in ("energy", "forces", "stress")}


def compute_points(calculator: PointCalculator, structures: Sequence[Mapping[str, Any]], take: Take) -> None:
    """Call take(index, point) for each structure, in this thread and in any order."""
    begun = time.monotonic()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for i, structure in enumerate(structures):
        left = len(structures) - i
        if time.monotonic() - begun > ALONE_S and min(cores, left) > 1:
            _by_processes(calculator, structures, range(i, len(structures)), min(cores, left), take)
            return
        take(i, calculator(structure))


def _by_processes(
    calculator: PointCalculator, structures: Sequence[Mapping[str, Any]], indices: range, processes: int, take: Take
) -> None:
    jobs: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    points: queue.SimpleQueue[tuple[int, Point]] = queue.SimpleQueue()
    for i in [*indices, *[None] * processes]:
        jobs.put(i)
    workers = [_Worker(calculator.settings()) for _ in range(processes)]

    def serve(worker: _Worker) -> None:
        while (i := jobs.get()) is not None:
            points.put((i, worker.ask(structures[i])))

    threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        for _ in indices:
            i, point = points.get()
            if "unusable" in point:
                raise CalculatorError(point["unusable"])
            take(i, point)
    finally:
        with suppress(queue.Empty):
            while True:
                jobs.get_nowait()
        for _ in threads:
            jobs.put(None)
        for worker in workers:
            worker.end()


class _Worker:
    """A process that computes one point after another; another takes its place should it die."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings, self._over = json.dumps(settings), False
        self._process: subprocess.Popen[str] | None = None

    def ask(self, structure: Mapping[str, Any]) -> Point:
        """The point of a structure, or why there is none."""
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        line = ""
        with suppress(OSError, ValueError):  # it is gone
            process.stdin.write(json.dumps(structure) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        if line.endswith("\n"):
            return json.loads(line)
        self._process = None
        process.kill()
        code = process.wait()
        return {"error": f"its process was ended by signal {-code}" if code < 0 else f"its process ended with {code}"}

    def _start(self) -> subprocess.Popen[str]:
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | threads | {"PYTHONPATH": path},
            start_new_session=True,
        )
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.write(self._settings + "\n")
        return process

    def end(self) -> None:
        """End the process, and what it has started."""
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def main() -> None:
    """Read the arguments of a PointCalculator, then structures, one JSON line each, and answer each with the line of its point."""
    jobs, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):  # what calculators read and print
        os.dup2(nothing, descriptor)
    calculator = PointCalculator(**json.loads(jobs.readline()))
    for line in jobs:
        try:
            point = calculator(json.loads(line))
        except CalculatorError as error:
            point = {"unusable": str(error)}
        plain = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in point.items()}
        answers.write(json.dumps(plain) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
