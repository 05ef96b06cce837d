"""Lattice constants: the standard cell of a crystal at rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from ase import Atoms
from ase.cell import Cell

from gpmlp.properties.equation_of_state import FMAX, no_crystal_at_rest
from gpmlp.properties.plan import Calculation, Outputs, Plan
from gpmlp.properties.surface import EnergySurface, Point, check_stable, strained, structure_names, voigt
from gpmlp.properties.symmetry import find_symmetry

CONSTANTS = ("a", "b", "c", "alpha", "beta", "gamma")
# last space group of each crystal system, and what its standard cells do not have in common
SYSTEMS = ((2, "a b c alpha beta gamma"), (15, "a b c beta"), (74, "a b c"), (194, "a c"), (230, "a"))


class LatticeConstants(Calculation):
    """Lengths (A) and angles (degrees) of the standard cell that symmetry does not fix.

    A sample's cell differs from the mean's by the strain that its stress there asks for, by the mean's elastic constants.
    """

    name: ClassVar[str] = "lattice"

    def refusal(self, structures: Sequence[Atoms]) -> str:
        return no_crystal_at_rest(structures, "lattice constants")

    def value_names(self, structures: Sequence[Atoms]) -> list[str]:
        return [_called(name) for name in CONSTANTS]

    def plan(self, surface: EnergySurface, structures: Sequence[Atoms]) -> Plan:
        (start,) = structures
        rest = surface.relax(start, "full", FMAX)
        rest.info["name"] = f"{structure_names([start])[0]} at rest"
        found = find_symmetry(rest)
        stiffness = surface.elastic_response(rest).stiffness
        check_stable(stiffness, structure_names([start])[0])
        free = next(names.split() for last, names in SYSTEMS if found.space_group <= last)

        def evaluate(points: Sequence[Point]) -> Outputs:
            strain = -np.linalg.solve(stiffness, voigt(points[0].stress))
            cell = Cell(found.basis @ strained(rest, strain).cell.array).cellpar()
            return {_called(name): float(cell[CONSTANTS.index(name)]) for name in free}

        units = {_called(name): "A" if len(name) == 1 else "degree" for name in free}
        about = {_called(name): f"{name} of the standard cell of {found.symbol}" for name in free}
        return Plan((rest,), evaluate, units, {0: 0}, about=about)


def _called(name: str) -> str:
    return f"lattice_constant_{name}" if len(name) == 1 else f"cell_angle_{name}"
