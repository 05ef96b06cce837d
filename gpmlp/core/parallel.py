"""Threads for independent pieces of work, as many as PyTorch may use: each piece has one core, so that results do not depend on
their number."""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

Piece = TypeVar("Piece")
Made = TypeVar("Made")
_here = threading.local()


def available_threads() -> int:
    """How many pieces `map_pieces` does side by side where this is called."""
    return getattr(_here, "threads", None) or torch.get_num_threads()


def map_pieces(
    work: Callable[[Piece], Made], pieces: Sequence[Piece], take: Callable[[Made], object] | None = None
) -> list[Made]:
    """[work(piece) for piece in pieces], side by side where there are several; what a piece raises is raised here.

    Worth it for work that spends its time outside of Python.

    Args:
        take: is called with each result, in the order of pieces and never two at once, as soon as all before it are there; results
            are then not kept, and None is in their place.
    """
    shared = _Shared(work, pieces, take)
    threads = min(available_threads(), len(pieces))
    if threads < 2 or _local("MKL_Set_Num_Threads_Local") is None:
        with one_core():  # the last digits of products depend on it
            return shared.finished()
    # of the modes of each thread, the ones that change what is computed
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    helpers = [_pool(os.getpid(), threads - 1).submit(shared.help, *modes) for _ in range(threads - 1)]
    with one_core():
        shared.help(*modes)
    for helper in helpers:
        helper.result()
    return shared.finished()


class _Shared(Generic[Piece, Made]):
    """Pieces that several threads take from, and their results."""

    def __init__(
        self, work: Callable[[Piece], Made], pieces: Sequence[Piece], take: Callable[[Made], object] | None
    ) -> None:
        self.work, self.pieces, self.take = work, pieces, take
        self.results: list[Any] = [None] * len(pieces)
        self.raised: dict[int, BaseException] = {}
        self.next = itertools.count()
        self.there = [False] * len(pieces)
        self.taken, self.taking = 0, threading.Lock()

    def help(self, grad: bool, inference: bool) -> None:
        """Do pieces until none is left or one has failed."""
        before, _here.threads = getattr(_here, "threads", None), 1  # pieces within pieces are not shared again
        try:
            with torch.inference_mode(inference), torch.set_grad_enabled(grad and not inference):
                self.run()
        finally:
            _here.threads = before

    def run(self) -> None:
        """As `help`, in the modes of this thread."""
        while not self.raised and (k := next(self.next)) < len(self.pieces):
            try:
                self.results[k] = self.work(self.pieces[k])
                self.there[k] = True
                self.hand_on()
            except BaseException as error:  # of the thread that asked, which raises it
                self.raised[k] = error

    def hand_on(self) -> None:
        """Call `take` with the results whose turn it is, unless another thread does so, which then checks again."""
        while self.take is not None and self.is_turn() and self.taking.acquire(blocking=False):
            try:
                while self.is_turn():
                    result, self.results[self.taken] = self.results[self.taken], None
                    self.take(result)
                    self.taken += 1
            finally:
                self.taking.release()

    def is_turn(self) -> bool:
        return self.taken < len(self.there) and self.there[self.taken]

    def finished(self) -> list[Made]:
        """Results, after pieces that are left were done here; or raise what the first of the failed pieces raised."""
        self.run()
        if self.raised:
            raise self.raised[min(self.raised)]
        return self.results


@lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Cached, as starting a thread may take a millisecond; threads do not survive a fork, so each process has its own."""
    return ThreadPoolExecutor(threads, "gpmlp", initializer=_take_one_core)


def _take_one_core() -> None:
    """Products and loops of PyTorch in this thread, and in no other, use one core from now on."""
    _here.threads = 1
    torch.get_num_threads()  # PyTorch sets up a thread at its first question: before, not after
    for name in ("omp_set_num_threads", "MKL_Set_Num_Threads_Local"):
        if (limit := _local(name)) is not None:
            limit(1)


@contextmanager
def one_core() -> Iterator[None]:
    """PyTorch uses one core in this thread, `map_pieces` excepted.

    For work that is nothing but `map_pieces` and short passes around it. OpenMP's threads wait for more by spinning, and after each
    pass they would do so on the cores that `map_pieces` is about to use.
    """
    if getattr(_here, "threads", None) is not None:
        yield
        return
    _here.threads = torch.get_num_threads()
    omp, mkl = _local("omp_set_num_threads"), _local("MKL_Set_Num_Threads_Local")
    if omp is not None:
        omp(1)
    before = mkl(1) if mkl is not None else 0
    try:
        yield
    finally:
        if omp is not None:
            omp(_here.threads)
        if mkl is not None:
            mkl(before)
        _here.threads = None


@lru_cache(maxsize=2)
def _local(name: str) -> Callable[[int], int] | None:
    """A function of the libraries inside PyTorch that sets how many threads the calling thread may use, or None without MKL."""
    libraries = sorted(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"))
    return getattr(ctypes.CDLL(str(libraries[0])), name, None) if libraries else None
