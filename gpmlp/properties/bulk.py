"""The bulk that defects and surfaces are measured against: a crystal at rest, and its lattice on another potential energy surface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.geometry import find_mic

from gpmlp.core.units import VOIGT_INDEX
from gpmlp.properties.equation_of_state import FMAX, not_a_crystal
from gpmlp.properties.lattice_dynamics import standard_cell
from gpmlp.properties.surface import EnergySurface, Failed, Point, check_stable, structure_names, voigt
from gpmlp.properties.symmetry import SYMPREC, load_spglib

NEAR = 0.05  # A, within which two sites are one


@dataclass(frozen=True, eq=False)
class Bulk:
    """A crystal at rest on one surface (or a molecule, whose lattice has no say).

    On another surface s, with the crystal's stress sigma_s in this lattice, its own lattice differs by the strain

        eps_s = -S sigma_s,   and any structure there has   E(eps_s) = E_s + V (sigma_s' + sigma') : eps_s / 2

    with its stresses sigma_s' there and sigma' here, as long as what is not bulk in it has about the same stress on both.

    Attributes:
        atoms: the conventional cell.
        compliance: (6, 6) S, A^3/eV, of the crystal with its ions at rest, Voigt, shears twice the tensor's.
    """

    atoms: Atoms
    compliance: np.ndarray

    @staticmethod
    def at_rest(surface: EnergySurface, start: Atoms) -> Bulk:
        """The crystal or molecule relaxed.

        Raises:
            Failed: it does not come to rest, or its lattice is not stable.
        """
        if not is_crystal(start):
            return Bulk(surface.relax(start), np.zeros((6, 6)))
        atoms = conventional(surface.relax(conventional(start), "full", FMAX))
        stiffness = surface.elastic_response(atoms).stiffness
        check_stable(stiffness, structure_names([start])[0])
        return Bulk(atoms, np.linalg.inv(stiffness))

    def strain(self, point: Point) -> np.ndarray:
        """(3, 3) strain to the lattice of the surface that this point of the crystal is on."""
        components = -self.compliance @ voigt(point.stress)
        return components[np.array(VOIGT_INDEX)] * np.where(np.eye(3, dtype=bool), 1.0, 0.5)

    def energy_per_atom(self, point: Point) -> float:
        """Energy of the crystal in the lattice of that surface, eV/atom."""
        return InLattice(self.atoms, np.zeros((3, 3))).energy(point, self.strain(point)) / len(self.atoms)


@dataclass(frozen=True, eq=False)
class InLattice:
    """A structure built in a crystal's lattice, with its stress (3, 3) on the surface that it was relaxed on."""

    atoms: Atoms
    stress: np.ndarray

    @staticmethod
    def of(surface: EnergySurface, structures: Sequence[Atoms]) -> list[InLattice]:
        points = surface.points(structures)
        return [InLattice(atoms, point.stress) for atoms, point in zip(structures, points, strict=True)]

    def energy(self, point: Point, strain: np.ndarray) -> float:
        """Energy in the lattice that differs by a strain (3, 3), see Bulk."""
        if not strain.any():
            return point.energy
        return point.energy + 0.5 * self.atoms.get_volume() * float(np.sum((point.stress + self.stress) * strain))


def is_crystal(atoms: Atoms) -> bool:
    return not not_a_crystal([atoms])


def conventional(atoms: Atoms) -> Atoms:
    """The conventional cell in its standard orientation. Raises as standard_cell."""
    bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True, info={"name": structure_names([atoms])[0]})
    return standard_cell(bare)  # masses have no say here


def primitive(crystal: Atoms) -> Atoms:
    """The primitive cell of a conventional one, in its orientation."""
    found = load_spglib().standardize_cell(_for_spglib(crystal), to_primitive=True, symprec=SYMPREC)
    assert found is not None  # as there is a conventional cell
    cell, positions, numbers = found
    return Atoms(numbers, cell=cell, scaled_positions=positions, pbc=True, info=dict(crystal.info))


def symmetry(atoms: Atoms) -> Any:
    """spglib's dataset: space group, operations and equivalent atoms.

    Raises:
        Failed: there is none.
    """
    dataset = load_spglib().get_symmetry_dataset(_for_spglib(atoms), symprec=SYMPREC)
    if dataset is None:
        raise Failed(f"spglib finds no symmetry in {structure_names([atoms])[0]}")
    return dataset


def _for_spglib(atoms: Atoms) -> Any:
    return atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers


def crystal_system(number: int) -> str:
    """By the number of a space group."""
    ends = ((2, "triclinic"), (15, "monoclinic"), (74, "orthorhombic"), (142, "tetragonal"), (167, "trigonal"))
    return next((name for last, name in ends if number <= last), "hexagonal" if number <= 194 else "cubic")


def inequivalent_sites(atoms: Atoms, sites: np.ndarray) -> np.ndarray:
    """Indices of scaled positions (n, 3) in a crystal that its symmetry does not turn into earlier ones."""
    operations = symmetry(atoms)
    kept: list[int] = []
    images = np.empty((0, 3))
    for index, site in enumerate(sites):
        if len(images):
            apart = (images - site) @ atoms.cell.array
            if find_mic(apart, atoms.cell, True)[1].min() < NEAR:
                continue
        kept.append(index)
        images = np.concatenate([images, operations.rotations @ site + operations.translations])
    return np.array(kept, dtype=int)
