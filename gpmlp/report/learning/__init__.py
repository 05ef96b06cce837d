"""The page about a learning run: why it stopped, how it learned, whether it was honest, what it cost, where it is blind."""

from __future__ import annotations

from gpmlp.report.learning.data import Foretold, Frames, Labelling, Observed, RunData
from gpmlp.report.learning.page import build

__all__ = ["Foretold", "Frames", "Labelling", "Observed", "RunData", "build"]
