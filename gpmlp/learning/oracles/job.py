"""A labelling job in plain numbers becomes structures, its answer targets; what came of it is a Label or a Refusal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures


@dataclass(frozen=True, eq=False)
class LabelResult:
    """An answer of an oracle.

    Attributes:
        structure: one structure, as it was asked for.
        targets: of this one structure.
        attempts: how many it took.
        seconds: that the successful one took.
        extrapolated: energy extrapolated to zero smearing (eV); equals targets.energies where nothing is smeared.
    """

    key: str
    structure: Structures
    targets: Targets
    attempts: int
    seconds: float
    extrapolated: float


@dataclass(frozen=True)
class LabelRefusal:
    """A structure for which the oracle had no answer.

    Attributes:
        reason: of each attempt, in words.
        folder: scratch folder of the last attempt, kept for who wants to look.
    """

    key: str
    reason: str
    attempts: int
    folder: str


def structure_of(given: Mapping[str, Any]) -> Structures:
    """The structure of a job."""
    n = len(given["species"])
    return Structures(
        torch.tensor(given["positions"], dtype=torch.float64).reshape(n, 3),
        torch.tensor(given["cell"], dtype=torch.float64)[None],
        torch.tensor(given["periodic"])[None],
        torch.tensor(given["species"]),
        torch.zeros(n, dtype=torch.long),
    )


def targets_of(record: Mapping[str, Any], structure: Structures) -> Targets:
    """The Targets that the record of a successful attempt holds."""
    unknown = Targets.unlabelled(structure.to(device="cpu", dtype=torch.float64))
    stress = record["stress"]
    return Targets(
        torch.tensor([record["energy"]], dtype=torch.float64),
        torch.tensor(record["forces"], dtype=torch.float64).reshape(-1, 3),
        unknown.stresses if stress is None else torch.tensor(stress, dtype=torch.float64)[None],
        unknown.energies_noise,
        unknown.forces_noise,
        unknown.stresses_noise,
        ("",),
    )


def failure_reasons(records: list[dict[str, Any]]) -> str:
    """Why attempts failed: each reason once, with the attempts it stands for."""
    found: dict[str, list[int]] = {}
    for record in records:
        found.setdefault(record["reason"], []).append(record["attempt"])
    if len(found) == 1:
        reason, which = next(iter(found.items()))
        return reason if len(which) == 1 else f"{reason} ({len(which)} times)"
    return "; ".join(f"attempt {', '.join(map(str, which))}: {reason}" for reason, which in found.items())
