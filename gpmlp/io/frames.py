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


def _fixed(atoms: Atoms) -> np.ndarray | None:
    """Which atoms, or which of their components, the constraints of Atoms hold in place."""
    held = [c for c in atoms.constraints if isinstance(c, (FixAtoms, FixCartesian))]
    if not held:
        return None
    fixed = np.zeros((len(atoms), 3), dtype=bool)
    for constraint in held:
        fixed[constraint.index] |= True if isinstance(constraint, FixAtoms) else np.asarray(constraint.mask, bool)
    return fixed[:, 0] if all(isinstance(c, FixAtoms) for c in held) else fixed
