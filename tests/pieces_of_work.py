"""Pieces of work for `test_workers.py`: functions that worker processes import."""

from __future__ import annotations

import os
import resource
import signal

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


def fail(report, k):
    """A mistake of ours."""
    raise ZeroDivisionError(f"piece {k}")


def die(report, k):
    """End this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def peak_memory_kB():
    """The largest memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
