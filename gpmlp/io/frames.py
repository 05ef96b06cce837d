"""A frame of a file: atoms of one structure with everything that the file says of them, before labels are told from the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian
from ase.io.extxyz import set_calc_and_arrays


@dataclass(eq=False)
class Frame:
    """One structure as a file gives it.

    Attributes:
        numbers: (atoms,) atomic numbers.
        positions: (atoms, 3) A.
        cell: (3, 3) A, rows are lattice vectors; zeros where there is none.
        pbc: (3,) bool.
        info: what the file says of the structure, by name.
        arrays: what it says of each atom, by name.
        results: of a calculator, for these very positions, in ASE's units and names.
        fixed: (atoms,) or (atoms, 3) bool, whether it is held in place; None where nothing is.
        stale: whether a calculator held results of other positions or of another cell; these are left out.
        unnamed_columns: columns of an XYZ file that it gives no name and that were not read.
        atoms: what it was made from, which holds more (other constraints, parameters of a calculator); None for an XYZ file.
    """

    numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray
    info: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    fixed: np.ndarray | None = None
    stale: bool = False
    unnamed_columns: int = 0
    atoms: Atoms | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def volume(self) -> float:
        """A^3, 0 where no axis is periodic."""
        if not self.pbc.any():
            return 0.0
        a, b, c = self.cell.tolist()  # nine numbers: quicker than a determinant of numpy
        cross = (b[1] * c[2] - b[2] * c[1], b[2] * c[0] - b[0] * c[2], b[0] * c[1] - b[1] * c[0])
        return abs(a[0] * cross[0] + a[1] * cross[1] + a[2] * cross[2])

    @staticmethod
    def from_atoms(atoms: Atoms) -> Frame:
        """The frame of Atoms; computes nothing."""
        results = getattr(atoms.calc, "results", None) or {}
        stale = bool(results) and bool(atoms.calc.check_state(atoms))
        standard = ("numbers", "positions")
        arrays = {key: value for key, value in atoms.arrays.items() if key not in standard}
        return Frame(
            atoms.numbers,
            atoms.positions,
            atoms.cell.array,
            atoms.pbc,
            atoms.info,
            arrays,
            {} if stale else results,
            fixed=_fixed(atoms),
            stale=stale,
            atoms=atoms,
        )

    def to_atoms(self) -> Atoms:
        """Atoms as ASE reads them: names that ASE knows become results of a calculator."""
        if self.atoms is not None:
            return self.atoms
        arrays, info = dict(self.arrays), dict(self.info)
        atoms = Atoms(
            self.numbers,
            positions=self.positions,
            cell=self.cell,
            pbc=self.pbc,
            info=info,
            charges=arrays.pop("initial_charges", None),
        )
        if self.fixed is not None and self.fixed.ndim == 1:
            atoms.set_constraint(FixAtoms(mask=self.fixed))
        elif self.fixed is not None:
            atoms.set_constraint([FixCartesian(a, mask=mask) for a, mask in enumerate(self.fixed)])
        set_calc_and_arrays(atoms, arrays)
        return atoms


@dataclass(frozen=True, eq=False)
class PackedFrames:
    """Frames of an XYZ file on their way between processes: what all of them have is in one array, which travels many times faster."""

    first: Frame  # for names of arrays, in their order
    counts: tuple[int, ...]
    of_atoms: dict[str, np.ndarray]
    of_frames: dict[str, np.ndarray]
    infos: tuple[dict[str, Any], ...]  # with None where an array was

    @staticmethod
    def of(frames: list[Frame]) -> PackedFrames | list[Frame]:
        """The frames themselves where they are not alike."""
        first = frames[0]
        stacked = {key: value for key, value in first.info.items() if isinstance(value, np.ndarray)}
        for frame in frames:
            if (
                frame.fixed is not None or frame.unnamed_columns or frame.results or frame.atoms is not None
                or list(frame.arrays) != list(first.arrays) or not _alike(frame.arrays, first.arrays, 1)
                or any(key not in frame.info for key in stacked) or not _alike(frame.info, stacked, 0)
            ):  # fmt: skip
                return frames
        joined = {"numbers": [f.numbers for f in frames], "positions": [f.positions for f in frames]}
        joined |= {f"array {key}": [f.arrays[key] for f in frames] for key in first.arrays}
        each = {"cell": [f.cell for f in frames], "pbc": [f.pbc for f in frames]}
        each |= {f"info {key}": [f.info[key] for f in frames] for key in stacked}
        return PackedFrames(
            first,
            tuple(map(len, frames)),
            {key: np.concatenate(parts) for key, parts in joined.items()},
            {key: np.stack(parts) for key, parts in each.items()},
            tuple(frame.info | dict.fromkeys(stacked) for frame in frames),
        )

    def unpacked(self) -> list[Frame]:
        """As they were packed."""
        out, start = [], 0
        arrays = {key: self.of_atoms[f"array {key}"] for key in self.first.arrays}
        stacked = {key.removeprefix("info "): rows for key, rows in self.of_frames.items() if key.startswith("info ")}
        numbers, positions, cells, pbc = (
            *(self.of_atoms[key] for key in ("numbers", "positions")),
            *(self.of_frames[key] for key in ("cell", "pbc")),
        )
        for k, (count, info) in enumerate(zip(self.counts, self.infos, strict=True)):
            here = slice(start, start := start + count)
            info |= {key: rows[k] for key, rows in stacked.items()}
            mine = {key: rows[here] for key, rows in arrays.items()}
            out.append(Frame(numbers[here], positions[here], cells[k], pbc[k], info, mine))
        return out


def _alike(values: dict[str, Any], wanted: dict[str, np.ndarray], axis: int) -> bool:
    """Whether arrays have the same types and shapes, but along the first `axis` axes."""
    return all(
        isinstance(values[key], np.ndarray)
        and values[key].dtype == array.dtype
        and values[key].shape[axis:] == array.shape[axis:]
        for key, array in wanted.items()
    )


def _fixed(atoms: Atoms) -> np.ndarray | None:
    """Which atoms, or which of their components, the constraints of Atoms hold in place."""
    held = [c for c in atoms.constraints if isinstance(c, (FixAtoms, FixCartesian))]
    if not held:
        return None
    fixed = np.zeros((len(atoms), 3), dtype=bool)
    for constraint in held:
        fixed[constraint.index] |= True if isinstance(constraint, FixAtoms) else np.asarray(constraint.mask, bool)
    return fixed[:, 0] if all(isinstance(c, FixAtoms) for c in held) else fixed
