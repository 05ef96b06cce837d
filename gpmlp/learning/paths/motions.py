"""A Motion is a way out of a minimum in terms of bonds: a part that turns about one, an atom that goes over to another, one that breaks.

Its direction is that at the present positions, so that a search follows an arc where a straight line would stretch bonds. Bonds join
atoms that are nearer than BONDED times the sum of their covalent radii (Cordero et al. 2008, those of ASE).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from scipy.sparse.csgraph import connected_components

from gpmlp.core.errors import UserError

BONDED = 1.25
DOUBLE = 0.92  # of that sum; a shorter bond hardly turns, and is tried late
FARTHEST = 3.2  # A between atoms, of which one goes over to the other
HYDROGEN = 1
Kind = Literal["rotate", "transfer", "stretch"]


@dataclass(frozen=True)
class Motion:
    """Of the atoms i and j.

    rotate: `part`, which hangs on j, turns about the bond i-j; transfer: i goes to j; stretch: `part`, which hangs on j, goes away from i.

    Attributes:
        part: indices of the atoms that turn or go away. reverse: whether it turns the other way round.
    """

    kind: Kind
    i: int
    j: int
    part: tuple[int, ...] = ()
    reverse: bool = False

    @staticmethod
    def of(atoms: Atoms, kind: Kind, i: int, j: int, reverse: bool = False) -> Motion:
        """Of a structure.

        Raises:
            UserError: there is no such atom, the two are not bonded (of a transfer: they are), or lie in a ring, so that nothing can turn.
        """
        if i == j or not (0 <= i < len(atoms) and 0 <= j < len(atoms)):
            raise UserError(
                f"direction: {kind}: [{i}, {j}] must be two different atoms of the start, from 0 to {len(atoms) - 1}."
            )
        bonds = bond_matrix(atoms)
        names = " and ".join(f"{atoms.symbols[k]}{k}" for k in (i, j))
        if kind == "transfer":
            if bonds[i, j]:
                raise UserError(
                    f"direction: transfer: {names} are bonded already; give the atom that moves and one that it goes to."
                )
            return Motion(kind, i, j)
        if not bonds[i, j]:
            raise UserError(
                f"direction: {kind}: {names} are not bonded; their distance is above {BONDED} covalent radii."
            )
        part = _hanging(bonds, i, j)
        if i in part or len(part) == len(atoms):
            raise UserError(
                f"direction: {kind}: the bond of {names} is part of a ring (or crystal), about which nothing turns."
            )
        if kind == "rotate" and min(len(part), _size(bonds, i) - len(part)) < 2:
            raise UserError(f"direction: rotate: {names}: nothing hangs on one of them, so that nothing turns.")
        return Motion(kind, i, j, part, reverse)

    def vectors(self, atoms: Atoms) -> np.ndarray:
        """(atoms, 3), of no particular length, at the present positions."""
        periodic = bool(atoms.pbc.any())
        axis = atoms.get_distance(self.i, self.j, mic=periodic, vector=True)
        axis /= np.linalg.norm(axis)
        out, part = np.zeros((len(atoms), 3)), list(self.part)
        if self.kind == "rotate":
            away = atoms.get_distances(self.j, part, mic=periodic, vector=True)
            out[part] = np.cross(axis, away) * (-1 if self.reverse else 1)
        elif self.kind == "transfer":
            out[self.i], out[self.j] = axis, -axis
        else:
            out[part] = axis
        return out

    def name(self, atoms: Atoms) -> str:
        """In words."""
        i, j = (f"{atoms.symbols[k]}{k}" for k in (self.i, self.j))
        if self.kind == "rotate":
            return f"turn about {i}–{j}{', the other way' if self.reverse else ''}"
        return f"{i} to {j}" if self.kind == "transfer" else f"{i}–{j} breaks"


def bond_matrix(atoms: Atoms) -> np.ndarray:
    """(atoms, atoms) whether two are bonded."""
    radii = covalent_radii[atoms.numbers]
    near = atoms.get_all_distances(mic=bool(atoms.pbc.any())) < BONDED * (radii[:, None] + radii)
    np.fill_diagonal(near, False)
    return np.asarray(near)


def fragments(atoms: Atoms) -> str:
    """Formulas of what is bonded together: 'C2H4O', 'CO + H2'."""
    _, labels = connected_components(bond_matrix(atoms), directed=False)
    formulas = Counter(atoms[labels == k].get_chemical_formula() for k in np.unique(labels))
    return " + ".join(f"{n} {formula}" if n > 1 else formula for formula, n in sorted(formulas.items()))


def bond_changes(first: Atoms, second: Atoms) -> str:
    """Which bonds a structure has lost and won on the way to another with the same order of atoms: 'O2–H3 → C1–H3'; '' for none."""
    before, after = bond_matrix(first), bond_matrix(second)

    def named(bonds: np.ndarray) -> str:
        return ", ".join(f"{first.symbols[i]}{i}–{first.symbols[j]}{j}" for i, j in np.argwhere(np.triu(bonds)))

    lost, won = named(before & ~after), named(after & ~before)
    return f"{lost or 'none'} → {won or 'none'}" if lost or won else ""


def proposed_motions(atoms: Atoms, kinds: Collection[str], movable: Collection[int]) -> list[Motion]:
    """Those of a structure: turns about bonds that are in no ring, both ways; atoms with one bond that go over to others near by, but not
    to hydrogen; turns about short bonds; bonds that break.

    Args:
        movable: indices of atoms that can move; of the others none does.
    """
    bonds, radii = bond_matrix(atoms), covalent_radii[atoms.numbers]
    turns: list[Motion] = []
    stiff: list[Motion] = []
    breaks: list[Motion] = []
    pairs = [(int(i), int(j)) for i, j in np.argwhere(np.triu(bonds))]
    for i, j in pairs:
        whole, first, second = _size(bonds, i), _hanging(bonds, i, j), _hanging(bonds, j, i)
        ends, part = ((i, j), first) if len(first) <= len(second) else ((j, i), second)
        if i in first or not set(part) <= set(movable):
            continue
        if "rotate" in kinds and 2 <= len(part) <= whole - 2:
            double = atoms.get_distance(i, j, mic=bool(atoms.pbc.any())) < DOUBLE * (radii[i] + radii[j])
            both_ways = [Motion("rotate", *ends, part, reverse) for reverse in (False, True)]
            (stiff if double else turns).extend(both_ways)
        if "stretch" in kinds:
            breaks.append(Motion("stretch", *ends, part))
    return [*turns, *(_transfers(atoms, bonds, movable) if "transfer" in kinds else []), *stiff, *breaks]


def _transfers(atoms: Atoms, bonds: np.ndarray, movable: Collection[int]) -> list[Motion]:
    """Hydrogen before others, over several bonds before those to the neighbour of its own, then the nearest first."""
    radii, distances = covalent_radii[atoms.numbers], atoms.get_all_distances(mic=bool(atoms.pbc.any()))
    found = []
    for i in (k for k in np.flatnonzero(bonds.sum(axis=1) == 1) if k in movable):
        for j in np.flatnonzero(~bonds[i] & (distances[i] < FARTHEST) & (atoms.numbers != HYDROGEN)):
            if j != i:
                last = bool(bonds[j, bonds[i].argmax()]), bool(atoms.numbers[i] != HYDROGEN)
                found.append((*last, distances[i, j] / (radii[i] + radii[j]), Motion("transfer", int(i), int(j))))
    return [motion for *_, motion in sorted(found, key=lambda entry: entry[:3])]


def _hanging(bonds: np.ndarray, i: int, j: int) -> tuple[int, ...]:
    """What is bonded to j, itself with it, by ways that do not lead along the bond i-j; i among it if that is in a ring."""
    cut = bonds.copy()
    cut[i, j] = cut[j, i] = False
    labels = connected_components(cut, directed=False)[1]
    return tuple(int(k) for k in np.flatnonzero(labels == labels[j]))


def _size(bonds: np.ndarray, i: int) -> int:
    """How many atoms are bonded together with i, itself with it."""
    labels = connected_components(bonds, directed=False)[1]
    return int((labels == labels[i]).sum())
