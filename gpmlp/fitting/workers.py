"""Workers: pieces of work done in this process, one after another, or by an executor; what they give is merged along a tree that the
number of pieces alone fixes, so that no result depends on who did what, or when."""

from __future__ import annotations

import logging
import queue
import signal
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing import resource_tracker
from typing import Any, Protocol
from uuid import uuid4

import torch

import gpmlp
from gpmlp.core import errors
from gpmlp.core.errors import UserError

Report = Callable[[float, float, str], None]  # done, total, note
POLL_S = 0.02
CONNECT_S = 15.0  # until a scheduler has to answer, and its first worker to be there


def silent(done: float, total: float, note: str = "") -> None:
    """Report nothing."""


class Future(Protocol):
    """What an executor returns: of concurrent.futures, or of dask."""

    def done(self) -> bool: ...

    def result(self) -> Any: ...

    def cancel(self) -> Any: ...

    def add_done_callback(self, function: Callable[[Any], Any], /) -> Any: ...


class Executor(Protocol):
    """A concurrent.futures.Executor of processes; or a Client of dask.distributed, whose workers hand results to each other."""

    def submit(self, function: Callable, /, *arguments: Any) -> Any: ...


class Workers:
    """This process alone: work is done where it is submitted."""

    shares = True  # whether small pieces are better done together, by the threads of this process

    def keep(self, value: Any) -> Any:
        """A value for many pieces, as an argument of theirs."""
        return value

    def submit(self, work: Callable, *arguments: Any) -> Any:
        """A promise of work(*arguments), which may be an argument itself."""
        return work(*arguments)

    def result(self, promise: Any) -> Any:
        """What was promised."""
        return promise

    def map(self, work: Callable, pieces: Sequence[tuple], report: Report = silent) -> list[Any]:
        """[work(report, *piece) for piece in pieces]."""
        return [self.result(promise) for promise in self._begin(work, pieces, report)]

    def each(self, function: Callable, pieces: Sequence[tuple]) -> list[Any]:
        """[function(*piece) for piece in pieces]."""
        return self.map(_call, [(function, *piece) for piece in pieces])

    def reduce(self, work: Callable, merge: Callable, pieces: Sequence[tuple], report: Report = silent) -> Any:
        """What work(report, *piece) gives for each piece, merged with its neighbours: merge(merge(a, b), merge(c, d)) of four."""
        promises = self._begin(work, pieces, report)
        return self.result(_merged(promises, len(pieces), partial(self.submit, merge)))

    def _begin(self, work: Callable, pieces: Sequence[tuple], report: Report) -> Iterator[Any]:
        for k, piece in enumerate(pieces):
            yield self.submit(work, within(report, k, len(pieces)), *piece)


def within(report: Report, before: int, pieces: int) -> Report:
    """For the progress of one of several pieces, so many of which are done."""

    def tell(done: float, total: float, note: str = "") -> None:
        report(before + done / total, pieces, f"{before + 1} of {pieces}: {note}" if note and pieces > 1 else note)

    return tell


def _merged(promises: Iterator[Any], n: int, merge: Callable[[Any, Any], Any]) -> Any:
    """The next n in one: the first 2^k of them, the largest such number below n, merged with the others. At most log2 n wait."""
    if n == 1:
        return next(promises)
    left = 1 << (n - 1).bit_length() - 1
    first = _merged(promises, left, merge)
    return merge(first, _merged(promises, n - left, merge))


class RemoteWorkers(Workers):
    """Whoever works for an executor."""

    shares = False

    def __init__(self, executor: Executor) -> None:
        self.executor, self.versions = executor, _versions()
        self.takes_promises = hasattr(executor, "scheduler_info")  # a Client of dask
        self.open: weakref.WeakSet = weakref.WeakSet()  # a result is given up by dask when nobody refers to it
        self.ended: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.progress: tuple[Report, int, int] = (silent, 0, 0)

    def keep(self, value: Any) -> Any:
        return self.submit(_same, value) if self.takes_promises else value

    def submit(self, work: Callable, *arguments: Any) -> Any:
        how: dict[str, Any] = {}
        if self.takes_promises:  # told apart by names, not by hashes of the data
            how = {"pure": False, "key": f"{work.__name__.strip('_')}-{uuid4()}"}
        else:
            arguments = tuple(self.result(a) if any(a is p for p in self.open) else a for a in arguments)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sending large graph")  # the data have to travel once
            try:
                promise = self.executor.submit(_do, self.versions, work, *arguments, **how)
            except Exception as error:
                raise _in_words(error) from error
        self.open.add(promise)
        return promise

    def result(self, promise: Future) -> Any:
        try:
            while not promise.done():
                self._tell()
                time.sleep(POLL_S)
            self._tell()
            return promise.result()
        except BaseException as error:
            for other in () if self.takes_promises else list(self.open):  # a Client forgets what nobody refers to
                other.cancel()
            raise _in_words(error) from error

    def _begin(self, work: Callable, pieces: Sequence[tuple], report: Report) -> Iterator[Any]:
        ended = self.ended = queue.SimpleQueue()
        self.progress = report, 0, len(pieces)
        promises = deque(self.submit(work, silent, *piece) for piece in pieces)
        for promise in promises:
            promise.add_done_callback(lambda _: ended.put(None))
        return (promises.popleft() for _ in pieces)

    def _tell(self) -> None:
        """Report the pieces that have ended."""
        while not self.ended.empty():
            self.ended.get()
            report, done, total = self.progress
            self.progress = report, done + 1, total
            report(done + 1, total, f"{done + 1} of {total} partitions")


def workers_of(executor: Executor | None, device: str = "cpu") -> Workers:
    """Those of an executor; this process if there is none. Raises UserError: it cannot submit, or the fit is on a device."""
    if executor is None:
        return Workers()
    if not callable(getattr(executor, "submit", None)):
        raise UserError(
            f"`executor` must have submit, as a Client of dask.distributed or an Executor of concurrent.futures has; got {executor!r}."
        )
    if device != "cpu":
        raise UserError(
            f"A fit by an executor works on processors, not on '{device}'; leave `device` or the executor out."
        )
    return RemoteWorkers(executor)


def _same(value: Any) -> Any:
    return value


def _call(report: Report, function: Callable, *arguments: Any) -> Any:
    return function(*arguments)


def _versions() -> dict[str, str]:
    """Of what decides about results."""
    return {"gpmlp": str(gpmlp.__version__), "torch": str(torch.__version__)}


def _do(versions: dict[str, str], work: Callable, *arguments: Any) -> Any:
    """The result of a piece of work, on a worker."""
    if _versions() != versions:
        theirs, ours = (" and ".join(f"{k} {v}" for k, v in found.items()) for found in (_versions(), versions))
        raise UserError(f"A worker has {theirs}, this process {ours}; install the same versions for both.")
    return work(*arguments)


def _in_words(error: BaseException) -> BaseException:
    """An error of a worker as a user reads it; errors of the work itself stay as they are."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == "gpmlp":
        return UserError("A worker cannot import gpmlp; install it, in the same version, where workers run.")
    name, source = type(error).__name__, type(error).__module__.split(".")[0]
    if name == "KilledWorker":
        return UserError(
            f"Workers died at one piece of work, again and again: {error} Mostly their memory does not suffice (docs/memory.md): "
            "take fewer workers on a machine, or lower inducing.n."
        )
    if source in ("distributed", "concurrent"):
        return UserError(
            f"The workers are lost: {str(error) or name}. With dask, a worker that dies is replaced; the scheduler is not."
        )
    return error


@contextmanager
def open_executor(workers: int | None = None, address: str | None = None) -> Iterator[Any]:
    """A Client of dask: of so many processes on this machine, of one thread each, or of the scheduler at an address; None of neither.

    A process that dies is started again, and what it had done is done again. None is left when this ends.

    Raises:
        UserError: dask is not installed, both are asked for, fewer than one worker, nobody at the address, no workers there.
    """
    if workers is not None and address is not None:
        raise UserError("Workers on this machine, or those of a scheduler: give one of --workers and --dask.")
    if workers is not None:
        errors.check_integer("number of workers", workers, 1)
    if workers is None and address is None:
        yield None
        return
    distributed = _import_distributed()
    with ExitStack() as stack:
        if workers is not None:
            import dask

            how = {"threads_per_worker": 1, "processes": True, "memory_limit": None, "dashboard_address": "127.0.0.1:0"}
            # a process that is busy is not dead: its end is noticed at once
            with _uninterrupted(), dask.config.set({"distributed.scheduler.worker-ttl": None}):
                made = distributed.LocalCluster(n_workers=workers, silence_logs=logging.CRITICAL, **how)
            address = stack.enter_context(made)
        yield stack.enter_context(_connect(distributed, address))


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Processes and threads that begin in here never hear of Ctrl-C: who began them ends them. This thread hears of it afterwards."""
    resource_tracker.ensure_running()  # whose start would undo what follows in the thread that starts it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _connect(distributed: Any, address: Any) -> Any:
    """A Client that has workers."""
    try:
        client = distributed.Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"There is no dask scheduler at '{address}': {error or type(error).__name__}.") from error
    try:
        client.wait_for_workers(1, timeout=CONNECT_S)
    except TimeoutError:
        client.close()
        raise UserError(f"The scheduler at '{address}' has no workers; start some: dask worker {address}") from None
    return client


def _import_distributed() -> Any:
    try:
        import distributed
    except ImportError as error:
        raise UserError(f"Workers need dask, which cannot be imported: {error}; pip install 'gpmlp[dask]'.") from error
    return distributed
