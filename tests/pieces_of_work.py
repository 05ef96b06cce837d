"""Pieces of work for `test_workers.py`: functions that worker processes import."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time

from gpmlp.core.errors import UserError


def doubled(report, shared, k):
    """shared + 2 k, half of it reported."""
    report(1, 2, "half")
    return shared + 2 * k


def named(report, k):
    """The piece as a leaf of a tree."""
    return str(k)


def join(a, b):
    """Two trees as one."""
    return f"({a}{b})"


def refuse(report, k):
    """A mistake of the user's."""
    raise UserError(f"piece {k} is wrong")


def refuse_late(report, k):
    """The first piece takes longest."""
    time.sleep(0.3 if k == 1 else 0.0)
    raise UserError(f"piece {k} is wrong")


def slowly(report, k):
    """The piece, after a while."""
    time.sleep(0.1)
    return k


def length(report, shared, k):
    """Of what is shared, and the piece."""
    return len(shared) + k


class Factor:
    """Which pieces it is made of; how many there have been at a time, at most, in this process."""

    now, most, lock = 0, 0, threading.Lock()

    def __init__(self, pieces):
        self.pieces = pieces
        with Factor.lock:
            Factor.now += 1
            Factor.most = max(Factor.most, Factor.now)

    def __del__(self):
        with Factor.lock:
            Factor.now -= 1


def factor(report, k):
    """Of one piece."""
    time.sleep(0.01 * (k % 3))
    return Factor((k,))


def merged_factors(first, later):
    """Of both, which takes longer than to make one."""
    time.sleep(0.02)
    return Factor(first.pieces + later.pieces)


def fail(report, k):
    """A mistake of ours."""
    raise ZeroDivisionError(f"piece {k}")


def die(report, k):
    """End this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def peak_memory_kB():
    """The largest memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
