"""Signals that end a command: SIGTERM of a batch system counts as Ctrl-C, and either ends it with INTERRUPTED and says how to go on."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

INTERRUPTED = 130  # by convention 128 + the number of the signal


@contextmanager
def resumable(words: Sequence[str], kept: str = "") -> Iterator[None]:
    """Where it is interrupted, say what is kept and which command goes on (gpmlp WORDS...), and end with INTERRUPTED."""
    from gpmlp.cli import console

    try:
        yield
    except KeyboardInterrupt:
        console.print_message("stopped", f"interrupted; {kept}go on with: {shlex.join(['gpmlp', *words])}")
        raise SystemExit(INTERRUPTED) from None


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Batch systems end a job by SIGTERM: treat it as Ctrl-C, so that everything is closed in order."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
