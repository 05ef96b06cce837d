"""Threads share out independent pieces of work, as many as PyTorch may use; each piece has one core to itself, so that what comes
out does not depend on how many there are."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import torch

Piece, Made = TypeVar("Piece"), TypeVar("Made")
_here = threading.local()


def available() -> int:
    """How many pieces `each` does side by side where this is asked."""
    return getattr(_here, "threads", None) or torch.get_num_threads()


def each(work: Callable[[Piece], Made], pieces: Sequence[Piece]) -> list[Made]:
    """[work(piece) for piece in pieces], side by side where there are several; what a piece raises is raised here.

    Pieces are done by threads, so work is worth sharing where it spends its time outside of Python.
    """
    threads = min(available(), len(pieces))
    if threads < 2 or _local("MKL_Set_Num_Threads_Local") is None:
        with one_core():  # the last digits of products depend on it
            return [work(piece) for piece in pieces]
    # of modes that are a thread's own, the ones that change what is computed
    guarded = partial(_as_here, work, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    return list(_pool(os.getpid(), threads).map(guarded, pieces))


def _as_here(work: Callable[[Piece], Made], grad: bool, inference: bool, piece: Piece) -> Made:
    with torch.inference_mode(inference), torch.set_grad_enabled(grad and not inference):
        return work(piece)


@lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Kept, as starting a thread may take a millisecond; threads do not survive a fork, so each process has its own."""
    return ThreadPoolExecutor(threads, "gpmlp", initializer=_take_one_core)


def _take_one_core() -> None:
    """Products and loops of PyTorch in this thread, and in no other, use one core from now on."""
    torch.get_num_threads()  # PyTorch sets up a thread at its first question: before, not after
    for name in ("omp_set_num_threads", "MKL_Set_Num_Threads_Local"):
        if (limit := _local(name)) is not None:
            limit(1)


@contextmanager
def one_core() -> Iterator[None]:
    """What PyTorch computes in this thread keeps to one core, but for what `each` shares out.

    For work that is nothing but `each` and short passes around it. OpenMP's threads wait for more by turning in circles, and after
    each pass they would do so on the cores that `each` is about to use.
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
    found = sorted(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"))
    return getattr(ctypes.CDLL(str(found[0])), name, None) if found else None
