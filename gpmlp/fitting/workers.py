"""Workers: pieces of work done in this process, one after another, or by an executor; what they give is merged along a tree that the
number of pieces alone fixes, so that no result depends on who did what, or when."""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from multiprocessing import resource_tracker
from typing import Any, Protocol
from uuid import uuid4

import torch

import gpmlp
from gpmlp.core import errors
from gpmlp.core.errors import UserError

Report = Callable[[float, float, str], None]  # done, total, note
Span = tuple[int, int]  # of pieces: the first one, and how many
POLL_S = 0.02
CONNECT_S = 15.0  # until a scheduler has to answer, and its first worker to be there
LOOK_S = 5.0  # between two looks whether there are workers
ALONE_S = 600.0  # that a fit waits for workers where none is left
AHEAD = 2  # pieces a worker that may be begun beyond the oldest that has not ended: what they give waits to be merged
OF_SCHEDULERS = "With dask, a worker that dies is replaced; the scheduler is not."
BUNDLES = 4  # a worker, in which pieces travel to those of an executor that is not dask's


def silent(done: float, total: float, note: str = "") -> None:
    """Report nothing."""


class Future(Protocol):
    """What an executor returns: of concurrent.futures, or of dask."""

    def done(self) -> bool: ...

    def result(self) -> Any: ...

    def cancel(self) -> Any: ...

    def exception(self) -> BaseException | None: ...

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

    def map(self, work: Callable, pieces: Sequence[tuple], report: Report = silent) -> list[Any]:
        """[work(report, *piece) for piece in pieces]."""
        return [work(within(report, k, len(pieces)), *piece) for k, piece in enumerate(pieces)]

    def each(self, function: Callable, pieces: Sequence[tuple], report: Report = silent) -> list[Any]:
        """[function(*piece) for piece in pieces]."""
        return self.map(_call, [(function, *piece) for piece in pieces], report)

    def reduce(self, work: Callable, merge: Callable, pieces: Sequence[tuple], report: Report = silent) -> Any:
        """What work(report, *piece) gives for each piece, merged with its neighbours: merge(merge(a, b), merge(c, d)) of four. At most
        log2 of the number of pieces wait to be merged."""

        def whole(span: Span) -> Any:
            if span[1] == 1:
                return work(within(report, span[0], len(pieces)), *pieces[span[0]])
            first, later = _halves(span)
            made = whole(first)
            return merge(made, whole(later))

        return whole((0, len(pieces)))


def within(report: Report, before: int, pieces: int) -> Report:
    """For the progress of one of several pieces, so many of which are done."""

    def tell(done: float, total: float, note: str = "") -> None:
        report(before + done / total, pieces, f"{before + 1} of {pieces}: {note}" if note and pieces > 1 else note)

    return tell


def _halves(span: Span) -> tuple[Span, Span]:
    """What a span of several pieces is merged of: its first 2^k, the largest such number below all of them, and the others."""
    first, n = span
    left = 1 << (n - 1).bit_length() - 1
    return (first, left), (first + left, n - left)


def _merges(span: Span) -> Iterator[tuple[Span, Span, Span]]:
    """Each merge of the tree: both halves and what they make."""
    if span[1] > 1:
        halves = _halves(span)
        yield (*halves, span)
        for half in halves:
            yield from _merges(half)


class RemoteWorkers(Workers):
    """Whoever works for an executor.

    Pieces are begun in their order, AHEAD for each worker beyond the oldest that has not ended, and merges go before further pieces. So
    no more than AHEAD for each worker and log2 of the number of pieces wait to be merged.
    """

    shares = False

    def __init__(self, executor: Executor) -> None:
        self.executor, self.versions = executor, _versions()
        self.takes_promises = hasattr(executor, "scheduler_info")  # a Client of dask
        self.number: int = getattr(executor, "_max_workers", None) or os.cpu_count() or 1
        self.looked, self.attended = -LOOK_S, time.monotonic()  # when we looked for workers, and when some were there

    def keep(self, value: Any) -> Any:
        return self._submit(0, _same, value) if self.takes_promises else value

    def map(self, work: Callable, pieces: Sequence[tuple], report: Report = silent) -> list[Any]:
        n = len(pieces)
        if self.takes_promises:
            made = self._run(work, pieces, report)
            return [self._result(made[k, 1]) for k in range(n)]
        size = -(-n // (BUNDLES * self.number)) or 1  # what pieces of a bundle share travels once
        bundles = [(work, pieces[k : k + size]) for k in range(0, n, size)]

        def tell(done: float, _: float, note: str) -> None:
            done = min(n, int(done) * size)
            report(done, n, f"{done} of {n} partitions" if done else note)

        made = self._run(_bundled, bundles, tell)
        return [result for k in range(len(bundles)) for result in made[k, 1].result()]

    def reduce(self, work: Callable, merge: Callable, pieces: Sequence[tuple], report: Report = silent) -> Any:
        (made,) = self._run(work, pieces, report, merge).values()
        return self._result(made)

    def _run(
        self, work: Callable, pieces: Sequence[tuple], report: Report, merge: Callable | None = None
    ) -> dict[Span, Any]:
        """Promises of each piece, or of all of them merged, that have been kept."""
        n, begun = len(pieces), 0
        into = {half: merged for merged in _merges((0, n)) for half in merged[:2]} if merge else {}
        running: dict[Span, Any] = {}
        made: dict[Span, Any] = {}
        errors: dict[Span, BaseException] = {}
        ended: queue.SimpleQueue[Span] = queue.SimpleQueue()
        progress = _Progress(report, n, len(into) // 2)
        self.attended = time.monotonic()

        def begin(span: Span, *call: Any) -> None:
            running[span] = promise = self._submit(int(span[1] > 1), *call)
            promise.add_done_callback(lambda _: ended.put(span))

        try:
            while running or begun < n:
                oldest = min((first for first, size in running if size == 1), default=begun)
                while begun < min(n, oldest + AHEAD * max(1, self.number)) and not errors:
                    begin((begun, 1), work, silent, *pieces[begun])
                    begun += 1
                span = self._next(ended, progress)
                made[span] = promise = running.pop(span)
                if error := promise.exception():
                    errors[span] = error
                if errors:  # that of the first piece, whichever ended first
                    if all(other > min(errors) for other in running):
                        raise errors[min(errors)]
                    continue
                progress.count(span)
                one, later, both = into.get(span, (span, span, span))
                if both != span and one in made and later in made:
                    begin(both, merge, *(self._argument(made.pop(half)) for half in (one, later)))
        except BaseException as error:
            for other in () if self.takes_promises else running.values():  # a Client forgets what nobody refers to
                other.cancel()
            raise _in_words(error) from error
        return made

    def _submit(self, priority: int, work: Callable, *arguments: Any) -> Any:
        """A promise of work(*arguments), of dask's among which may be others."""
        how: dict[str, Any] = {}
        if self.takes_promises:  # told apart by names, not by hashes of the data
            how = {"pure": False, "key": f"{work.__name__.strip('_')}-{uuid4()}", "priority": priority}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sending large graph")  # the data have to travel once
            try:
                return self.executor.submit(_do, self.versions, work, *arguments, **how)
            except Exception as error:
                raise _in_words(error) from error

    def _argument(self, promise: Future) -> Any:
        return promise if self.takes_promises else promise.result()

    def _next(self, ended: queue.SimpleQueue[Span], progress: _Progress) -> Span:
        """What ends next."""
        while True:
            if self._deserted():
                progress.tell("waiting for workers")
            with suppress(queue.Empty):
                return ended.get(timeout=LOOK_S)

    def _result(self, promise: Future) -> Any:
        """What was promised, which a worker that dies afterwards takes with it, and others make again."""
        try:
            while not promise.done():
                self._deserted()
                time.sleep(POLL_S)
            return promise.result()
        except BaseException as error:
            raise _in_words(error) from error

    def _deserted(self) -> bool:
        """Whether dask has no workers at the moment.

        Raises:
            UserError: there have been none for ALONE_S.
        """
        now = time.monotonic()
        if self.takes_promises and now >= self.looked + LOOK_S:
            client: Any = self.executor
            if client.status == "closed":
                raise UserError(f"The workers are lost: the scheduler does not answer. {OF_SCHEDULERS}")
            with suppress(OSError, AttributeError):  # on the way to being closed
                self.number = sum(client.nthreads().values())
            self.looked = time.monotonic()
        if self.number:
            self.attended = now
        elif now > self.attended + ALONE_S:
            raise UserError(
                f"The scheduler has had no workers for {ALONE_S / 60:.3g} minutes, and the fit ends. Start some and fit again; if they "
                "died for want of memory (docs/memory.md), take fewer on a machine, or lower inducing.n."
            )
        return not self.number


class _Progress:
    """Pieces that have ended, and what is merged of them."""

    def __init__(self, report: Report, pieces: int, merges: int) -> None:
        self.report, self.pieces, self.merges, self.ended, self.merged = report, pieces, merges, 0, 0

    def count(self, span: Span) -> None:
        """One more has ended."""
        self.ended, self.merged = self.ended + (span[1] == 1), self.merged + (span[1] > 1)
        note = f", {self.merged} of {self.merges} merged" if self.merged else ""
        self.tell(f"{self.ended} of {self.pieces} partitions{note}")

    def tell(self, note: str) -> None:
        """Report it in other words."""
        self.report(self.ended + self.merged, self.pieces + self.merges, note)


def _bundled(report: Report, work: Callable, pieces: Sequence[tuple]) -> list[Any]:
    return [work(report, *piece) for piece in pieces]


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


def _get_ready() -> None:
    """Import what a worker of a fit needs."""
    import_module("gpmlp.fitting.fit")


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
        return UserError(f"The workers are lost: {str(error).rstrip('.') or name}. {OF_SCHEDULERS}")
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
    stack = ExitStack()
    try:
        if workers is not None:
            import dask

            how = {"threads_per_worker": 1, "processes": True, "memory_limit": None, "dashboard_address": "127.0.0.1:0"}
            # a process that is busy is not dead: its end is noticed at once
            with _uninterrupted(), dask.config.set({"distributed.scheduler.worker-ttl": None}):
                made = distributed.LocalCluster(n_workers=workers, silence_logs=logging.CRITICAL, **how)
            address = stack.enter_context(made)
        client = stack.enter_context(_connect(distributed, address))
        for worker in client.nthreads() if workers is not None else ():  # while this process reads and checks the data
            ready = client.submit(_get_ready, workers=[worker], allow_other_workers=True, pure=False)
            distributed.fire_and_forget(ready)
        yield client
    finally:
        with _interrupted_later():  # a Client that is half closed waits for its scheduler, which is gone
            stack.close()


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Ctrl-C in here is heard when this ends."""
    here = threading.current_thread() is threading.main_thread()
    if not here or not callable(signal.getsignal(signal.SIGINT)):  # nobody hears of it
        yield
        return
    heard: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        raise KeyboardInterrupt


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
