"""LabelFile is the append-only file of all labels of a run; each is on the disk before it is used, and used as it reads from there.

Each frame carries a running checksum of itself and all before it, so that a file that was altered, cut or put in another order is refused.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from ase.io.extxyz import key_val_str_to_dict

from gpmlp.core.errors import UserError, chemical_symbol
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures, electronic_bytes
from gpmlp.io import extxyz, files
from gpmlp.io.ase_atoms import ELECTRONIC, from_frames
from gpmlp.io.charges import CHARGE
from gpmlp.io.frames import Frame

Note = int | float | str | bool
NOTE_NAME = re.compile(r"[a-z][a-zA-Z0-9_]*")
RESERVED = frozenset(
    "key oracle reason config_type energy free_energy stress forces pbc virial energy_noise stress_noise force_noise".split()
    + "checksum dipole magmom magmoms charge charges positions".split()
)
CHECKSUM = re.compile(rb" checksum=(s[0-9a-f]{31})$", re.MULTILINE)  # at the end of a frame's second line
STARTS = re.compile(rb"^\s*\d+\s*\n[^\n]*Properties=species", re.MULTILINE)


@dataclass(frozen=True, eq=False)
class LabelEntry:
    """A label of the file.

    Attributes:
        structure, targets: of one structure.
        key: `key_of` the structure and the oracle.
        reason: why it was asked for.
        oracle: hash of the oracle's settings, '' if it came from elsewhere.
        notes: further numbers and texts: step, walker, time, ...
    """

    structure: Structures
    targets: Targets
    key: str
    reason: str = ""
    oracle: str = ""
    notes: Mapping[str, Note] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class LabelResult:
    """An answer of an oracle.

    Attributes:
        structure, targets: of one structure, as it was asked for.
        attempts: how many it took; seconds: that the successful one took.
        extrapolated: energy extrapolated to zero smearing (eV); equals targets.energies where nothing is smeared.
        calls: of the calculator in all attempts; checked: what was compared with the energy ('forces', 'stress').
    """

    key: str
    structure: Structures
    targets: Targets
    attempts: int
    seconds: float
    extrapolated: float
    calls: int = 1
    checked: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelRefusal:
    """A structure for which the oracle had no answer.

    Attributes:
        reason: of each attempt, in words.
        folder: scratch folder of the last attempt, which is not removed.
        labels_before: how many labels there were.
        contradiction: whether energy and forces, or stress, contradicted each other.
    """

    key: str
    reason: str
    attempts: int
    folder: str
    labels_before: int = field(default=0, compare=False)
    contradiction: bool = False


def key_of(structure: Structures, oracle: str = "") -> str:
    """The name of a label: a hash of one structure (elements, positions, cell, periodicity, to the last bit, and magnetic moments,
    initial charges and total charge where there are any) and of the oracle."""
    digest = hashlib.sha256(oracle.encode() + b"\0")
    for tensor, kind in (
        (structure.species, "<i8"),
        (structure.periodic, "<i8"),
        (structure.cells.double() + 0.0, "<f8"),  # + 0.0: no negative zeros
        (structure.positions.double() + 0.0, "<f8"),
    ):
        digest.update(tensor.detach().cpu().numpy().astype(kind).tobytes())
    digest.update(electronic_bytes(structure))
    return "k" + digest.hexdigest()[:31]  # a letter first, so that no reader takes it for a number


def canonical_structure(structure: Structures) -> Structures:
    """A structure as it reads back from the file: the same numbers in double precision on the CPU."""
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
    if not bool(targets.charges.isnan().all()):
        columns, numbers = [*columns, "charges:R:1"], [*numbers, targets.charges[:, None]]
    for name, value in structure.electronic_start().items():
        if bool(value.any()):
            column = value if value.dim() == 2 else value[:, None]
            columns, numbers = [*columns, f"{ELECTRONIC[name]}:R:{column.shape[1]}"], [*numbers, column]
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
    for charge in structure.stated_charges.values():
        yield f"{CHARGE}={charge!r}"
    energy = float(targets.energies[0])
    if energy == energy:
        yield f"energy={energy!r} free_energy={energy!r}"  # the force-consistent one under both names
    if not bool(targets.stresses.isnan().any()):
        yield f'stress="{_numbers(targets.stresses[0].T)}"'
    if not bool(targets.dipoles.isnan().any()):
        yield f'dipole="{_numbers(targets.dipoles)}"'
    for name, noise in (("energy_noise", targets.energies_noise), ("stress_noise", targets.stresses_noise)):
        if not bool(noise.isnan()):
            yield f"{name}={float(noise)!r}"
    yield 'pbc="{}"'.format(" ".join("FT"[int(p)] for p in structure.periodic[0]))
    texts = {"config_type": targets.config_types[0], "key": entry.key, "oracle": entry.oracle, "reason": entry.reason}
    for name, value in {**texts, **entry.notes}.items():
        if name not in texts and (not NOTE_NAME.fullmatch(name) or name in RESERVED):
            raise ValueError(f"'{name}' cannot be the name of a note of a label")
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


def _chained(before: str, frame: bytes) -> str:
    """The running checksum after a frame (without its own), from that before it."""
    return "s" + hashlib.sha256(before.encode() + frame).hexdigest()[:31]


def _sealed(frame: bytes, checksum: str) -> bytes:
    """A frame that carries its checksum."""
    count, comment, atoms = frame.split(b"\n", 2)
    return b"\n".join([count, comment + b" checksum=" + checksum.encode(), atoms])


def _text(text: str) -> str:
    """A text that ASE reads as one value of one line; what looks like a number or a truth value is put in quotes to stay a text."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split()).replace("\\", "/").replace('"', "'")
    if not line:
        return ""
    back = key_val_str_to_dict(f'x="{line}"').get("x")
    return f'"{line}"' if isinstance(back, str) and back == line else f"\"'{line}'\""


def _parse(text: bytes, name: str) -> LabelEntry:
    """The entry that a frame holds, read as `gpmlp.read` does."""
    (atoms,) = ase.io.iread(io.StringIO(text.decode()), index=0, format="extxyz")
    data = from_frames([Frame.from_atoms(atoms)], [name], as_written=True)
    structures, targets = data.structures, data.targets
    info = dict(atoms.info)
    key, reason, oracle = (str(info.pop(part, "")) for part in ("key", "reason", "oracle"))
    notes = {k: v.item() if isinstance(v, np.generic) else v for k, v in info.items() if k not in RESERVED}
    return LabelEntry(structures, targets, key, reason, oracle, notes)


class LabelFile:
    """Labels on the disk, open for more; and in refused.jsonl the structures that were refused.

    Attributes:
        path: the extended XYZ file, which `gpmlp.read` and `gpmlp fit` read as it is.
        repaired: what was broken and was repaired on opening, '' if nothing was.
        checksums: running checksum after each frame. unsealed: frames of older versions that carry none, so that nobody knows whether
            they were altered.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a file, or begin one; what a kill left of an unfinished last frame goes to PATH.broken.

        Raises:
            UserError: the file cannot be read or written, is broken before its end, or was altered.
        """
        files.check_target(path)
        self.path = Path(path)
        self._entries: dict[str, LabelEntry] = {}
        self.checksums: list[str] = []
        self.unsealed = 0
        self.repaired = ""
        try:
            if self.path.exists():
                self._open()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror or error}.") from error
        self._journal = files.reopen_journal(self.refused_path)
        try:
            self._refusals = {e["key"]: LabelRefusal(**e) for e in (self._journal.entries if self._journal else ())}
        except (TypeError, KeyError) as error:
            raise UserError(f"{self.refused_path}: a line of it is no refusal ({error}); remove that line.") from error

    @property
    def refused_path(self) -> Path:
        return self.path.with_name("refused.jsonl")

    def _open(self) -> None:
        layout = extxyz.scan_frames(self.path, closed=True)
        data = self.path.read_bytes()
        starts, end = layout.starts, layout.end
        if STARTS.search(data, end + 1):
            raise UserError(f"{self.path}: {layout.problem or 'broken'}, and more frames follow; repair it by hand.")
        bounds = [*starts, end]
        frames = [data[bounds[i] : bounds[i + 1]] for i in range(len(starts))]
        for i, frame in enumerate(frames):
            try:
                entry = _parse(frame, f"{self.path.name} frame {i}")
            except Exception as error:  # readers refuse in many ways
                if i < len(starts) - 1 or end < len(data) or b"\0" not in frame:  # which a power cut leaves
                    raise UserError(f"{self.path}: frame {i} cannot be read: {error}; repair it by hand.") from error
                end = bounds[i]
                break
            self._verify(i, frames, entry)
            self._entries.setdefault(entry.key or key_of(entry.structure, entry.oracle), entry)
        if end < len(data):
            aside = self.path.with_name(f"{self.path.name}.broken")
            cut, whole = files.cut_tail(self.path, end, aside), len(self._entries)
            self.repaired = (
                f"{self.path}: an unfinished frame ({cut} bytes) after {whole} whole ones was moved to {aside}"
            )

    def _verify(self, i: int, frames: list[bytes], entry: LabelEntry) -> None:
        """Raise UserError, with what differs, unless a frame is the one that was written there; takes its checksum."""
        before, match = self.checksums[-1] if self.checksums else "", CHECKSUM.search(frames[i])
        body = CHECKSUM.sub(b"", frames[i], count=1)
        self.checksums.append(_chained(before, body))
        where = f"{self.path}: frame {i} ({entry.reason or 'no reason given'})"
        mend = "Put the file back as it was, or begin anew in another folder."
        if entry.key and entry.key != key_of(entry.structure, entry.oracle):
            what = "its elements, positions, cell, `key` or `oracle`"
            raise UserError(f"{where} was altered: {what} are not those that it was labelled with. {mend}")
        written = match[1].decode() if match else ""
        if written == self.checksums[-1]:
            return
        if not written and len(self.checksums) - 1 == self.unsealed:  # nor has any before it
            self.unsealed += 1
            whole = entry.targets.energies.isfinite().all() and entry.targets.forces.isfinite().all()
            if entry.oracle and "surrogate" not in entry.notes and not whole:
                raise UserError(f"{where} was altered: it has no energy or not all forces. {mend}")
            return
        if not written:
            raise UserError(f"{where} was not written by the run, or lost its checksum. {mend}")
        others = [(j, CHECKSUM.search(frame)) for j, frame in enumerate(frames)]
        after = [j for j, seal in others if seal and _chained(seal[1].decode(), body) == written]
        if after or _chained("", body) == written:
            first = f"comes after frame {after[0]}" if after else "is the first one"
            raise UserError(f"{where} is whole but {first}: frames were removed, added or put in another order. {mend}")
        raise UserError(
            f"{where} was altered: its energy, forces, stress or notes are not those that were written. {mend}"
        )

    @property
    def fingerprint(self) -> tuple[int, str]:
        """Number of frames, and the running checksum after them."""
        return len(self.checksums), self.checksums[-1] if self.checksums else ""

    def check_frames(self, frames: int, checksum: str) -> None:
        """Raise UserError unless the first frames are those that a checkpoint knows, by their number and running checksum."""
        mend = "Put the file back as it was, or begin anew in another folder."
        if len(self.checksums) < frames:
            raise UserError(f"{self.path}: holds {len(self.checksums)} labels, of {frames} that the run had. {mend}")
        if frames and self.checksums[frames - 1] != checksum:
            raise UserError(f"{self.path}: the first {frames} labels are not those that the run wrote. {mend}")

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
        """All labels, in the order they came. Raises UserError: there are none yet."""
        if not self._entries:
            raise UserError(f"{self.path}: holds no labels yet.")
        structures = Structures.concatenate([entry.structure for entry in self])
        return structures, Targets.concatenate([entry.targets for entry in self])

    def append(self, entry: LabelEntry) -> LabelEntry:
        """Write an entry, and return it as it reads back when it is on the disk; of two with one key the first stays.

        Raises:
            UserError: the disk is full or the file cannot be written; it is then as it was before.
        """
        if entry.key in self._entries:
            return self._entries[entry.key]
        text = format_entry(entry)
        checksum = _chained(self.checksums[-1] if self.checksums else "", text)
        text = _sealed(text, checksum)
        back = _parse(text, f"{self.path.name} frame {len(self.checksums)}")
        _extend(self.path, text)
        self.checksums.append(checksum)
        self._entries[entry.key] = back
        return back

    @property
    def refusals(self) -> tuple[LabelRefusal, ...]:
        """In the order they came."""
        return tuple(self._refusals.values())

    def refusal(self, key: str) -> LabelRefusal | None:
        """Why there is no label of a key; None if it was not refused."""
        return self._refusals.get(key)

    @property
    def refused_in_a_row(self) -> int:
        """How many structures were refused since the last label."""
        return sum(refusal.labels_before == len(self) for refusal in self._refusals.values())

    def refuse(self, refusal: LabelRefusal) -> None:
        """Write down that there is no label, on the disk before it is acted upon.

        Raises:
            UserError: the disk is full or the file cannot be written; it is then as it was before.
        """
        if refusal.key in self._refusals:
            return
        refusal = replace(refusal, labels_before=len(self))
        if self._journal is None:
            about = {"refused": "structures without a label, of " + self.path.name}
            self._journal = files.begin_journal(self.refused_path, about)
        self._journal.append(asdict(refusal))
        self._refusals[refusal.key] = refusal


def _extend(path: Path, text: bytes) -> None:
    """Add a frame to the end of the file: all of it, on the disk, or none."""
    try:
        files.append_whole(path, text)
    except UserError as error:
        raise UserError(f"{error} Make room and go on (--resume): the answer is kept in the spool.") from error


def structure_of(job: Mapping[str, Any]) -> Structures:
    """The structure of an oracle's job."""
    n = len(job["species"])
    more: dict[str, Any] = {name: torch.tensor(job[name], dtype=torch.float64) for name in ELECTRONIC if name in job}
    if "charge" in job:
        more["charges"] = torch.tensor([job["charge"]], dtype=torch.float64)
    return Structures(
        torch.tensor(job["positions"], dtype=torch.float64).reshape(n, 3),
        torch.tensor(job["cell"], dtype=torch.float64)[None],
        torch.tensor(job["periodic"])[None],
        torch.tensor(job["species"]),
        torch.zeros(n, dtype=torch.long),
        **more,
    )


def targets_of(record: Mapping[str, Any], structure: Structures) -> Targets:
    """The targets that the record of a successful attempt holds."""
    targets, stress = Targets.unlabelled(structure.to(device="cpu", dtype=torch.float64)), record["stress"]
    return replace(
        targets,
        energies=torch.tensor([record["energy"]], dtype=torch.float64),
        forces=torch.tensor(record["forces"], dtype=torch.float64).reshape(-1, 3),
        stresses=targets.stresses if stress is None else torch.tensor(stress, dtype=torch.float64)[None],
    )
