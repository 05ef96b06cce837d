"""A Stopwatch knows what a run spends its time on; what it measures never reaches files that have to repeat to the last bit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Stopwatch:
    """Seconds by activity, added up."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        """Go on from what was measured before."""
        self.seconds = dict(seconds or {})

    @contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Count the time of a block; blocks must not lie inside one another."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[activity] = self.seconds.get(activity, 0.0) + time.monotonic() - began
