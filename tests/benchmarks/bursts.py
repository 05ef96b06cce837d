"""Bursts are runs of one call again and again for a moment: contestants take turns at them, so that what the machine does to one it
does to all.

Standard library only: a contestant may live in a process of its own (Worker, serve), run by the Python of another environment.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

Burst = Callable[[float], Sequence[float]]  # seconds to fill -> seconds of each call


@dataclass(frozen=True)
class Times:
    """Seconds of each call of one contestant, burst by burst."""

    bursts: tuple[tuple[float, ...], ...]

    @property
    def least(self) -> float:
        return min(map(min, self.bursts))

    @property
    def median(self) -> float:
        """Of all calls."""
        return statistics.median(itertools.chain(*self.bursts))

    def over(self, other: Times) -> Spread:
        """How many times as long as the other, whose bursts came in turn with these: of the medians, burst by burst."""
        return Spread.of(
            [statistics.median(a) / statistics.median(b) for a, b in zip(self.bursts, other.bursts, strict=True)]
        )


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some ratios."""

    low: float
    median: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3
        return Spread(*quartiles)

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


def burst(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call until so many have passed. The first one finds cold caches: it counts only where it is the only one."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times[1:] or times


def of(call: Callable[[], object]) -> Burst:
    """A contestant of this process."""
    return lambda seconds: burst(call, seconds)


def in_turn(contestants: Mapping[str, Burst], rounds: int, seconds: float) -> dict[str, Times]:
    """All of them in every round; before, each once, uncounted, but for workers, which have done so to be ready."""
    for run in contestants.values():
        if not isinstance(run, Worker):
            run(0.0)
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            found[name].append(tuple(run(seconds)))
    return {name: Times(tuple(times)) for name, times in found.items()}


def cores() -> list[int]:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """This thread, and what it starts meanwhile, keep to one core where the system can be told so."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class WorkerError(RuntimeError):
    """A worker ended; what it wrote last."""


class Worker:
    """A contestant in a process of its own, started once and asked for one burst after another."""

    def __init__(self, command: Sequence[str | Path], core: int, log: Path, environment: Mapping[str, str]) -> None:
        """Start it and wait until it is ready.

        Args:
            log: file for all that it prints beside its answers.

        Raises:
            WorkerError: it could not be started, or ended.
        """
        self.log = log
        with open(log, "w", encoding="utf-8") as out, pinned(core):
            try:
                self.process = subprocess.Popen(
                    [str(part) for part in command], env=dict(environment), cwd=log.parent, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out,
                )  # fmt: skip
            except OSError as error:
                raise WorkerError(str(error)) from error
        self.answer()

    def ask(self, seconds: float) -> None:
        """Begin a burst."""
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()

    def answer(self) -> list[float]:
        """Seconds of each call of the burst that was begun."""
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            last = self.log.read_text(errors="replace").strip().splitlines()[-3:]
            raise WorkerError(f"ended with status {self.process.returncode}: {' / '.join(last)}")
        return json.loads(line)

    def __call__(self, seconds: float) -> list[float]:
        self.ask(seconds)
        return self.answer()

    def close(self) -> None:
        """End it."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def serve(make: Callable[[], tuple[Callable[[], object], int]]) -> None:
    """Be a worker: (call, how many evaluations it is) = make(), then a burst for every line of the standard input."""
    # whatever libraries print goes to the log
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)
    call, evaluations = make()
    call()
    print("[]", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps([t / evaluations for t in burst(call, float(line))]), file=answers, flush=True)
