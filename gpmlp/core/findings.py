"""Findings of the checks of data: what was found in which frames, how grave it is, and what to do about it."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field
from typing import Literal

from gpmlp.core.errors import DataWarning

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
FRAMES_SHOWN = 3  # in a sentence; the finding itself keeps all


@dataclass(frozen=True)
class Finding:
    """A finding of a check of labelled data.

    Attributes:
        kind: short name of the check in kebab-case, as 'same-structure-two-energies'.
        severity: 'error' (a fit from these data is wrong), 'warning' (it may be), 'note' (a decision that was taken).
        message: one sentence with the numbers, without frames and advice.
        frames: names of the frames concerned, as Structures.names gives them (file and number of the frame).
        numbers: by name with unit, as {'difference_eV': 2.0}.
        advice: one sentence on what to do; '' if nothing.
    """

    kind: str
    severity: Severity
    message: str
    frames: tuple[str, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)
    advice: str = ""

    def __str__(self) -> str:
        """Frames, message and advice as one text."""
        named = ", ".join(self.frames[:FRAMES_SHOWN])
        more = f" and {len(self.frames) - FRAMES_SHOWN} more" if len(self.frames) > FRAMES_SHOWN else ""
        first, space, rest = self.message.partition(" ")
        capital = first[:1].upper() + first[1:] if first.isalpha() else first  # names of files stay as they are
        text = f"{named}{more}: {self.message}" if named else f"{capital}{space}{rest}"
        return f"{text}{' ' + self.advice if self.advice else ''}"

    def as_dict(self) -> dict:
        """JSON-able form."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict) -> Finding:
        """The finding of as_dict(), which may have been through JSON."""
        return Finding(**values | {"frames": tuple(values["frames"])})


class FindingWarning(DataWarning):
    """The warning of a finding, which it carries as `finding`."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding


def warn_of(finding: Finding, stacklevel: int = 2) -> None:
    """Issue the finding as a FindingWarning."""
    warnings.warn(FindingWarning(finding), stacklevel=stacklevel + 1)
