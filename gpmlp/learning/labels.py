"""A Tape is the file of all labels in the order they came; each is on the disk before it is used, and used as it reads from there."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.io.extxyz import key_val_str_to_dict

from gpmlp.core.errors import UserError, chemical_symbol
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.io import ase_atoms as border
from gpmlp.io import files
from gpmlp.io.files import check_target
from gpmlp.learning.oracles.job import LabelRefusal

Note = int | float | str | bool
NOTE_NAME = re.compile(r"[a-z][a-zA-Z0-9_]*")
RESERVED = ("key", "oracle", "reason", "config_type", "energy", "free_energy", "stress", "forces", "pbc", "virial")
RESERVED += ("energy_noise", "stress_noise", "force_noise", "dipole", "magmom", "magmoms", "charges", "positions")
STARTS = re.compile(rb"^\s*\d+\s*\n[^\n]*Properties=species", re.MULTILINE)


@dataclass(frozen=True, eq=False)
class LabelEntry:
    """A label on the tape.

    Attributes:
        structure, targets: of one structure.
        key: `key_of` the structure and the oracle.
        reason: why it was asked for.
        oracle: hash of the oracle's settings, '' if it came from elsewhere.
        notes: whatever else is to be remembered: step, walker, time, seconds ...
    """

    structure: Structures
    targets: Targets
    key: str
    reason: str = ""
    oracle: str = ""
    notes: Mapping[str, Note] = field(default_factory=dict)


def key_of(structure: Structures, oracle: str = "") -> str:
    """The name of a label: a hash of one structure (elements, positions, cell, periodicity, to the last bit) and of the oracle."""
    digest = hashlib.sha256(oracle.encode() + b"\0")
    for tensor, kind in (
        (structure.species, "<i8"),
        (structure.periodic, "<i8"),
        (structure.cells.double() + 0.0, "<f8"),  # + 0.0: no negative zeros
        (structure.positions.double() + 0.0, "<f8"),
    ):
        digest.update(tensor.detach().cpu().numpy().astype(kind).tobytes())
    return "k" + digest.hexdigest()[:31]  # a letter first, so that no reader takes it for a number


def canonical_structure(structure: Structures) -> Structures:
    """A structure as it reads back from a tape: the same numbers in double precision on the CPU."""
    return _parse(format_entry(LabelEntry(structure, Targets.unlabelled(structure), "")), structure.names[0]).structure


def format_entry(entry: LabelEntry) -> bytes:
    """The text of an entry: extended XYZ from which every float64 reads back as it was."""
    structure, targets = entry.structure, entry.targets
    columns = ["species:S:1", "pos:R:3"]
    numbers = [structure.positions]
    if not bool(targets.forces.isnan().all()):
        columns, numbers = [*columns, "forces:R:3"], [*numbers, targets.forces]
    if not bool(targets.forces_noise.isnan().all()):
        columns, numbers = [*columns, "force_noise:R:3"], [*numbers, targets.forces_noise]
    table = torch.cat([n.detach().cpu().double() for n in numbers], dim=1).tolist()
    symbols = [chemical_symbol(z) for z in structure.species.tolist()]
    lines = [str(len(symbols)), " ".join(_comment(entry, ":".join(columns)))]
    lines += [" ".join([s, *map(repr, row)]) for s, row in zip(symbols, table, strict=True)]
    return ("\n".join(lines) + "\n").encode()


def _comment(entry: LabelEntry, columns: str) -> Iterator[str]:
    structure, targets = entry.structure, entry.targets
    if bool(structure.cells.any()):
        yield f'Lattice="{_numbers(structure.cells)}"'
    yield f"Properties={columns}"
    energy = float(targets.energies[0])
    if energy == energy:
        yield f"energy={energy!r} free_energy={energy!r}"  # the force-consistent one under both names
    if not bool(targets.stresses.isnan().any()):
        yield f'stress="{_numbers(targets.stresses[0].T)}"'
    for name, noise in (("energy_noise", targets.energies_noise), ("stress_noise", targets.stresses_noise)):
        if not bool(noise.isnan()):
            yield f"{name}={float(noise)!r}"
    yield 'pbc="{}"'.format(" ".join("FT"[int(p)] for p in structure.periodic[0]))
    texts = {"config_type": targets.config_types[0], "key": entry.key, "oracle": entry.oracle, "reason": entry.reason}
    for name, value in {**texts, **entry.notes}.items():
        if name not in texts and (not NOTE_NAME.fullmatch(name) or name in RESERVED):
            raise ValueError(f"'{name}' cannot be the name of a note on a tape")
        if text := _value(value):
            yield f"{name}={text}"


def _value(value: Note) -> str:
    """How a note is written; '' if there is nothing to write."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, (bool, np.bool_)):
        return "FT"[int(value)]
    return repr(value.item() if isinstance(value, np.generic) else value)


def _numbers(tensor: torch.Tensor) -> str:
    return " ".join(map(repr, tensor.detach().cpu().double().reshape(-1).tolist()))


def _text(text: str) -> str:
    """A text that ASE reads as one value of one line; what looks like a number or a truth value is put in quotes to stay a text."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split()).replace("\\", "/").replace('"', "'")
    if not line:
        return ""
    found = key_val_str_to_dict(f'x="{line}"').get("x")
    return f'"{line}"' if isinstance(found, str) and found == line else f"\"'{line}'\""


def _parse(text: bytes, name: str) -> LabelEntry:
    """The entry that a frame holds, by the same road as `gpmlp.read`."""
    atoms: Atoms = ase.io.read(io.StringIO(text.decode()), format="extxyz", index=0)
    structures, targets = border.from_ase([atoms], [name])
    info = dict(atoms.info)
    key, reason, oracle = (str(info.pop(part, "")) for part in ("key", "reason", "oracle"))
    notes = {k: v.item() if isinstance(v, np.generic) else v for k, v in info.items() if k not in RESERVED}
    return LabelEntry(structures, targets, key, reason, oracle, notes)


class LabelFile:
    """Labels on the disk, open for more; and beside them, in refused.jsonl, the structures for which there is none.

    Attributes:
        path: the extended XYZ file, which `gpmlp.read` and `gpmlp fit` read as it is.
        repaired: what was found broken and put right on opening, '' if nothing was.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a tape, or begin one where there is none.

        What a kill left of an unfinished last frame goes to PATH.broken.

        Raises:
            UserError: the file cannot be read or written, or is broken before its end.
        """
        check_target(path)
        self.path = Path(path)
        self._entries: dict[str, LabelEntry] = {}
        self.repaired = ""
        try:
            self._open()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror or error}.") from error
        self._refused = files.reopen_journal(self.refused_path)
        found = [_refusal(entry) for entry in self._refused.entries] if self._refused else []
        self._refusals = {refusal.key: (refusal, after) for refusal, after in found}

    @property
    def refused_path(self) -> Path:
        return self.path.with_name("refused.jsonl")

    def _open(self) -> None:
        if not self.path.exists():
            return
        layout = files.scan_frames(self.path, closed=True)
        data = self.path.read_bytes()
        starts, end = layout.starts, layout.end
        if STARTS.search(data, end + 1):
            raise UserError(f"{self.path}: {layout.problem or 'broken'}, and more frames follow; repair it by hand.")
        bounds = [*starts, end]
        for i in range(len(starts)):
            try:
                entry = _parse(data[bounds[i] : bounds[i + 1]], f"{self.path.name} frame {i}")
            except Exception as error:  # zeros or garbage, which readers refuse in many ways
                if i < len(starts) - 1 or end < len(data):
                    raise UserError(f"{self.path}: frame {i} cannot be read: {error}; repair it by hand.") from error
                end = bounds[i]
                break
            self._entries.setdefault(entry.key or key_of(entry.structure, entry.oracle), entry)
        if end < len(data):
            self._cut(end)

    def _cut(self, end: int) -> None:
        """Put what follows the last complete frame aside."""
        aside = self.path.with_name(f"{self.path.name}.broken")
        cut = files.cut_tail(self.path, end, aside)
        self.repaired = (
            f"{self.path}: an unfinished frame ({cut} bytes) after {len(self._entries)} whole ones was moved to {aside}"
        )

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[LabelEntry]:
        return iter(list(self._entries.values()))

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def find(self, key: str) -> LabelEntry | None:
        """The entry of a key; None if there is none."""
        return self._entries.get(key)

    def structures_and_targets(self) -> tuple[Structures, Targets]:
        """All labels, in the order they came.

        Raises:
            UserError: there are none yet.
        """
        if not self._entries:
            raise UserError(f"{self.path}: holds no labels yet.")
        structures = Structures.concatenate([entry.structure for entry in self])
        return structures, Targets.concatenate([entry.targets for entry in self])

    def append(self, entry: LabelEntry) -> LabelEntry:
        """Write an entry, and return it as it reads back when it is on the disk; the first of a key is kept.

        Raises:
            UserError: the disk is full or the file cannot be written; the tape is then as it was before.
        """
        if entry.key in self._entries:
            return self._entries[entry.key]
        text = format_entry(entry)
        back = _parse(text, f"{self.path.name} frame {len(self._entries)}")
        _extend(self.path, text)
        self._entries[entry.key] = back
        return back

    @property
    def refusals(self) -> tuple[LabelRefusal, ...]:
        """Structures that were set aside, in the order they were."""
        return tuple(refusal for refusal, _ in self._refusals.values())

    def refusal(self, key: str) -> LabelRefusal | None:
        """Why there is no label of a key; None if it was not refused."""
        return self._refusals[key][0] if key in self._refusals else None

    @property
    def refused_in_a_row(self) -> int:
        """How many structures were set aside since the last label."""
        return sum(after == len(self) for _, after in self._refusals.values())

    def refuse(self, refusal: LabelRefusal) -> None:
        """Remember that there is no label, on the disk before it is acted upon.

        Raises:
            UserError: the disk is full or the file cannot be written; it is then as it was before.
        """
        if refusal.key in self._refusals:
            return
        after = len(self)
        entry = {
            "key": refusal.key,
            "reason": refusal.reason,
            "attempts": refusal.attempts,
            "folder": refusal.folder,
            "labels_before": after,
        }
        if self._refused is None:
            about = {"refused": "structures without a label, beside " + self.path.name}
            self._refused = files.begin_journal(self.refused_path, about)
        self._refused.append(entry)
        self._refusals[refusal.key] = (refusal, after)


def _refusal(entry: Mapping) -> tuple[LabelRefusal, int]:
    return LabelRefusal(entry["key"], entry["reason"], entry["attempts"], entry["folder"]), entry["labels_before"]


def _extend(path: Path, text: bytes) -> None:
    """Add a frame to the end of the file: all of it, on the disk, or none."""
    try:
        files.append_whole(path, text)
    except UserError as error:
        raise UserError(f"{error} Make room and go on (--resume): the answer is kept in the spool.") from error
