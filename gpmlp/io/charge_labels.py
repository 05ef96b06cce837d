"""Labels of charges of atoms and of dipoles: their names in files, which are taken, and what does not fit the total charge.

Charges are e, as a partition of the electrons gives them (Mulliken, Hirshfeld, Bader, ...), dipoles e A, as ASE has them. Initial and
formal charges are no labels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gpmlp.core.errors import UserError, suggest_name
from gpmlp.core.findings import Finding
from gpmlp.io.frames import Frame
from gpmlp.io.label_names import METHODS, NONE, LabelTable, Place

KINDS = ("charges", "dipole")
SCHEMES = frozenset("mulliken hirshfeld bader lowdin cm5 mbis ddec ddec3 ddec6 esp resp chelpg npa nbo voronoi".split())
WORDS = {  # one of the first has to be there, and any of the second may be
    "charges": ({"charge", "charges", *SCHEMES}, {"atomic", "atom", "partial", "atoms", "i", "e", *SCHEMES, *METHODS}),
    "dipole": ({"dipole", "dipoles"}, {"moment", "moments", "total", "vector", "ea", *METHODS}),
}
ROOMS = {"charges": ("results", "arrays"), "dipole": ("results", "info")}


def label_kind(place: Place) -> str | None:
    """'charges' or 'dipole' where a key names such labels."""
    words = {word for word in re.split(r"[_\-. ]+", place[1].lower()) if word}
    for kind, (needed, allowed) in WORDS.items():
        if place[0] in ROOMS[kind] and words & needed and words <= needed | allowed:
            return kind
    return None


@dataclass(frozen=True)
class ChargeKeys:
    """Where charges of atoms and dipoles are.

    Attributes:
        places: by kind, in the order in which they are tried.
        findings: what is taken, and what has another shape.
    """

    places: Mapping[str, tuple[Place, ...]]
    findings: tuple[Finding, ...] = ()

    def charges(self, frames: Sequence[Frame]) -> np.ndarray:
        """(atoms,) e, NaN where there are none."""
        return np.concatenate([self._value(frame, "charges") for frame in frames])

    def dipoles(self, frames: Sequence[Frame]) -> np.ndarray:
        """(frames, 3) e A, NaN where there is none."""
        return np.stack([self._value(frame, "dipole") for frame in frames])

    def _value(self, frame: Frame, kind: str) -> np.ndarray:
        for place in self.places[kind]:
            if (value := _numbers(frame, kind, place)) is not None:
                return value
        return np.full(len(frame) if kind == "charges" else 3, np.nan)


def _numbers(frame: Frame, kind: str, place: Place) -> np.ndarray | None:
    """What a frame holds there, None if it is not there or has another shape."""
    value = getattr(frame, place[0]).get(place[1])
    if value is None:
        return None
    array = np.asarray(value)
    if array.dtype.kind not in "fiu" or array.size != (len(frame) if kind == "charges" else 3):
        return None
    return array.astype(float).reshape(-1)


def choose_keys(table: LabelTable, path: str, given: Mapping[str, Sequence[str]]) -> ChargeKeys:
    """The keys that charges and dipoles of a file are taken from: those given, else that of most frames.

    Raises:
        UserError: a given key that no frame has, an infinite number; names the frame.
    """
    places: dict[str, tuple[Place, ...]] = {}
    findings: list[Finding] = []
    taken: list[str] = []
    counts: dict[str, float] = {}
    for kind in KINDS:
        there = [place for place in table.holders if label_kind(place) == kind]
        if kind in given:
            chosen = _given(table, path, kind, given[kind])
        else:
            there.sort(key=lambda place: (-len(table.holders[place]), place[0] != "results", place[1]))
            chosen = there[:1]
        right = {
            p: [i for i in table.holders[p].tolist() if _numbers(table.frames[i], kind, p) is not None] for p in chosen
        }
        for place, members in right.items():
            _refuse_infinite(table, kind, place, members)
            wrong = sorted(set(table.holders[place].tolist()) - set(members))
            if wrong:
                size = "one number for each atom" if kind == "charges" else "three numbers"
                text = f"`{place[1]}` does not hold {size}; it is not read."
                names = tuple(table.names[i] for i in wrong)
                findings.append(
                    Finding("charges-of-another-shape", "warning", text, names, {"frames": float(len(wrong))})
                )
        places[kind] = tuple(chosen)
        count = len({i for members in right.values() for i in members})
        if count:
            keys = " or ".join(f"`{place[1]}`" for place in chosen)
            others = [f"`{place[1]}`" for place in there if place not in chosen]
            beside = f" (not from {', '.join(others)}: --keys {kind}={others[0][1:-1]})" if others else ""
            taken.append(f"{'charges of atoms' if kind == 'charges' else 'dipoles'} from {keys} in {count}{beside}")
            counts[f"{kind}_frames"] = float(count)
    if taken:
        text = f"{path}: {', '.join(taken)} of {len(table.frames)} frames."
        findings.insert(0, Finding("charges-taken", "note", text, (), counts))
    return ChargeKeys(places, tuple(findings))


def _given(table: LabelTable, path: str, kind: str, names: Sequence[str]) -> list[Place]:
    """Where the keys are that the user gave."""
    if tuple(names) == (NONE,):
        return []
    there = [place for place in table.holders if place[0] in ROOMS[kind]]
    out: list[Place] = []
    for name in names:
        exact = [p for p in there if p[1] == name] or [p for p in there if p[1].lower() == name.lower()]
        if not exact:
            hint = suggest_name(name, sorted({p[1] for p in there})) if there else ""
            raise UserError(f"{path}: no frame has `{name}`, which --keys gives for the {kind}.{hint}")
        out += sorted(exact, key=lambda p: p[0] != "results")
    return out


def _refuse_infinite(table: LabelTable, kind: str, place: Place, members: Sequence[int]) -> None:
    for i in members:
        value = _numbers(table.frames[i], kind, place)
        if value is not None and np.isinf(value).any():
            raise UserError(f"{table.names[i]}: `{place[1]}` holds an infinite number; correct it or remove it.")
