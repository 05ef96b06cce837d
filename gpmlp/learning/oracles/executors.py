"""Executors make the attempts at labels: in worker processes, in this one, or by dask or parsl."""

from __future__ import annotations

import importlib
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from gpmlp.core.errors import UserError, suggest_name
from gpmlp.learning.oracles import results, worker
from gpmlp.learning.oracles.oracle import OracleRecipe

OPTIONS = {
    "processes": ("threads",),
    "inline": (),
    "dask": ("threads", "address", "scheduler_file"),
    "parsl": ("threads", "config"),
}

PATIENCE = 2.0  # s between asking a process to end and ending it
POLL = 0.5  # s between checks for a file that says stop
STOP = b"stop"
TAIL = 400  # characters of the output of a crashed process
Record = dict[str, Any]


class WorkerProcess:
    """A process that makes one attempt after another, and the group of all that it starts."""

    def __init__(self, threads: int = 1) -> None:
        self._errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gpmlp.learning.oracles.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,  # not ours: who reads our output would wait for a worker that outlives us
            env={"OMP_NUM_THREADS": str(threads), **os.environ},
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._jobs, self._answers = self.process.stdin, self.process.stdout
        self._rest = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._answers, selectors.EVENT_READ)

    def call(self, job: Mapping[str, Any]) -> Record:
        """Have the process make an attempt; the process is of no more use if `alive` is false afterwards."""
        try:
            self._jobs.write(json.dumps(job).encode() + b"\n")
            self._jobs.flush()
        except OSError:
            return self._crashed(job)
        deadline, timeout, stop = None, worker.time_limit(job), job.get("stop")
        while True:
            line = self._line(deadline, stop)
            if line == STOP:
                self.end()
                return worker.attempt_record(job, results.INTERRUPTED, "the run ended")
            if line is None:
                self.end(patience=0.0)
                reason = f"hung: no answer within timeout_s {job['timeout_s']:g}, nor to signals"
                return worker.attempt_record(job, results.FAILED, reason)
            if not line:
                return self._crashed(job)
            message = json.loads(line)
            if "waiting" in message:
                worker.give_notice(message["waiting"])
                continue
            if "computing" not in message:
                return message
            if timeout is not None:
                deadline = time.monotonic() + timeout + 2 * worker.grace_seconds(timeout)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def _line(self, deadline: float | None, stop: str | None) -> bytes | None:
        """The next line; b"" if the process closed its output, None if the deadline came first, STOP if a file of that name did."""
        while b"\n" not in self._rest:
            if stop and os.path.exists(stop):
                return STOP
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return None
            if not self._selector.select(min(left or POLL, POLL) if stop else left):
                continue
            part = os.read(self._answers.fileno(), 1 << 16)
            if not part:
                return b""
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _crashed(self, job: Mapping[str, Any]) -> Record:
        self.end(patience=0.0)
        code = self.process.returncode
        if code in worker.STOPPED:
            return worker.attempt_record(
                job, results.INTERRUPTED, f"its worker process was ended by signal {abs(code)}"
            )
        folder = worker.folder_of(job)
        output = _tail(self._errors)
        with suppress(OSError), open(folder / "output.txt", "rb") as file:
            output += _tail(file)
        with suppress(OSError):
            hung = (folder / "hung.txt").read_text(errors="replace")
            if hung:
                reason = f"hung: no answer within timeout_s {job['timeout_s']:g}, stuck in {hung.split(chr(10))[2:4]}"
                return worker.attempt_record(job, results.FAILED, reason)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return worker.attempt_record(job, results.FAILED, f"its worker process crashed ({how}) {output[-TAIL:]}")

    def end(self, patience: float = PATIENCE) -> None:
        """End the process and all that it started, and wait until it is gone."""
        family = results.child_processes(self.process.pid)
        for number in (signal.SIGTERM, signal.SIGKILL) if patience else (signal.SIGKILL,):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)
            for pid in family:  # some start groups of their own
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(patience if number == signal.SIGTERM else None)

    def close(self) -> None:
        """End the process if it lives, and give its pipes back; for the thread that calls, after which there is no more to call."""
        if self.alive:
            self.end()
        self._selector.close()
        for pipe in (self._jobs, self._answers, self._errors):
            with suppress(OSError):  # what a crashed process has not read
                pipe.close()


def _tail(file: IO[bytes]) -> str:
    """The end of what a process wrote, however much that is."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
    return file.read().decode(errors="replace")


class ProcessExecutor(Executor):
    """Runs `worker.make_attempt`, and only that, in worker processes: one that hangs or crashes takes no other with it."""

    def __init__(self, workers: int, threads: int = 1) -> None:
        self._workers, self._omp_threads = workers, threads
        self._queue: queue.SimpleQueue[tuple[Future, Mapping[str, Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._running: set[WorkerProcess] = set()
        self._threads: list[threading.Thread] = []
        self._closing = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        if fn is not worker.make_attempt or len(args) != 1 or kwargs:
            raise ValueError("ProcessExecutor runs worker.make_attempt(job) and nothing else")
        future: Future = Future()
        with self._lock:
            if self._closing:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._queue.put((future, args[0]))
            if len(self._threads) < self._workers:
                self._threads.append(threading.Thread(target=self._serve, daemon=True, name="gpmlp-oracle"))
                self._threads[-1].start()
        return future

    def _serve(self) -> None:
        process: WorkerProcess | None = None
        while (item := self._queue.get()) is not None:
            future, job = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                with self._lock:
                    if not self._closing and (process is None or not process.alive):
                        self._running.discard(process)
                        if process is not None:
                            process.close()
                        process = WorkerProcess(self._omp_threads)
                        self._running.add(process)
                if self._closing or process is None:
                    future.set_result(worker.attempt_record(job, results.INTERRUPTED, "the run ended"))
                    continue
                record = process.call(job)
                stopped = self._closing and record["kind"] == results.FAILED
                future.set_result({**record, "kind": results.INTERRUPTED} if stopped else record)
            except BaseException as error:
                future.set_exception(error)
        if process is not None:
            process.close()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the worker processes, whatever they are doing; attempts that had not ended are as if never made."""
        with self._lock:
            self._closing = True
            running, threads = list(self._running), list(self._threads)
        for _ in threads:
            self._queue.put(None)
        for process in running:
            process.end(PATIENCE if process.alive else 0.0)
        if wait:
            for thread in threads:
                thread.join()


class InlineExecutor(Executor):
    """Makes attempts at once, in the calling thread: for oracles that are cheaper than a process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        future.set_running_or_notify_cancel()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def in_own_process(job: Mapping[str, Any]) -> Record:
    """Make an attempt in a new process, from a worker of dask or parsl, whose threads and memory are not ours to risk."""
    process = WorkerProcess(job.get("threads", 1))
    try:
        return process.call(job)
    finally:
        process.close()


@dataclass(frozen=True)
class JobRunner:
    """An executor and how to use it.

    Attributes:
        function: makes an attempt there: a job in, a record out.
        close: to be called at the end.
        remote: whether a file has to tell attempts to stop, because nothing else reaches them.
    """

    executor: Executor
    function: Callable[..., dict[str, Any]]
    close: Callable[[], None]
    remote: bool = False


def make_runner(recipe: OracleRecipe) -> JobRunner:
    """The executor that a recipe asks for. Raises UserError: it is not installed, or has no such option."""
    for option in recipe.executor_options:
        if option not in OPTIONS[recipe.executor]:
            raise UserError(
                f"oracle: executor {recipe.executor} has no option '{option}'."
                f"{suggest_name(option, OPTIONS[recipe.executor]) if OPTIONS[recipe.executor] else ''}"
            )
    if recipe.executor == "dask":
        return _dask(recipe)
    if recipe.executor == "parsl":
        return _parsl(recipe)
    if recipe.executor == "inline":
        return JobRunner(InlineExecutor(), worker.make_attempt, lambda: None)
    executor = ProcessExecutor(recipe.workers, recipe.executor_options.get("threads", 1))
    return JobRunner(executor, worker.make_attempt, executor.shutdown)


def _missing(name: str, error: ImportError) -> UserError:
    return UserError(f"oracle: executor {name} cannot be imported: {error}; pip install 'gpmlp[{name}]'.")


def _dask(recipe: OracleRecipe) -> JobRunner:
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise _missing("dask", error) from error
    where = {k: v for k, v in recipe.executor_options.items() if k in ("address", "scheduler_file")}
    cluster = None
    if not where:
        # threads are enough: each attempt gets a new process
        options = {"n_workers": 1, "threads_per_worker": recipe.workers, "processes": False}
        cluster = LocalCluster(**options, dashboard_address=None, protocol="inproc://")
        where = {"address": cluster}
    try:
        client = Client(**where, set_as_default=False)
    except OSError as error:
        raise UserError(f"oracle: there is no dask scheduler at {where}: {error}.") from error

    executor = client.get_executor(pure=False)

    def close() -> None:
        executor.shutdown(wait=False)
        client.close()
        if cluster is not None:
            cluster.close()

    return JobRunner(executor, in_own_process, close, remote=True)


def _parsl(recipe: OracleRecipe) -> JobRunner:
    try:
        from parsl import Config, ThreadPoolExecutor
        from parsl.concurrent import ParslPoolExecutor
    except ImportError as error:
        raise _missing("parsl", error) from error
    path = recipe.executor_options.get("config")
    if path is None:
        config = Config(executors=[ThreadPoolExecutor(max_threads=recipe.workers)], initialize_logging=False)
    else:
        module, _, name = str(path).partition(":")
        try:
            config = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"oracle: executor_options.config '{path}' is no 'module:name' of a parsl Config: {error}."
            ) from error
    executor = ParslPoolExecutor(config=config)
    return JobRunner(executor, in_own_process, executor.shutdown, remote=True)
