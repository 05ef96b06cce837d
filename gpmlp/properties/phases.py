"""Differences of energy between phases of one composition."""

from __future__ import annotations

from collections.abc import Sequence
from glob import escape
from typing import ClassVar

from ase import Atoms

from gpmlp.properties.equation_of_state import FMAX, not_a_crystal
from gpmlp.properties.plan import Calculation, Outputs, Plan
from gpmlp.properties.surface import EnergySurface, Point, structure_names


class PhaseEnergies(Calculation):
    """Energy per atom of each structure above that of the first, all at rest (the cells of crystals too).

    relax: whether they are relaxed before.
    """

    name: ClassVar[str] = "phases"
    several: ClassVar[bool] = True
    relax: bool = True

    def refusal(self, structures: Sequence[Atoms]) -> str:
        if len(structures) < 2:
            return "differences between phases need two structures or more"
        first, *others = (atoms.symbols.formula.reduce()[0].format("hill") for atoms in structures)
        for other in others:
            if other != first:
                return (
                    f"energies per atom of {first} and {other} cannot be compared: give structures of one composition"
                )
        return ""

    def value_names(self, structures: Sequence[Atoms]) -> list[str]:
        first, *others = map(escape, structure_names(structures))
        return [_called(name, first) for name in others]

    def plan(self, surface: EnergySurface, structures: Sequence[Atoms]) -> Plan:
        names = structure_names(structures)
        made = tuple(
            surface.relax(atoms, "fixed" if not_a_crystal([atoms]) else "full", FMAX) if self.relax else atoms.copy()
            for atoms in structures
        )
        for atoms, name in zip(made, names, strict=True):
            atoms.info["name"] = f"{name} at rest" if self.relax else name
        called = [_called(name, names[0]) for name in names[1:]]

        def evaluate(points: Sequence[Point]) -> Outputs:
            first, *others = (point.energy / len(atoms) for point, atoms in zip(points, made, strict=True))
            return {name: other - first for name, other in zip(called, others, strict=True)}

        return Plan(
            made, evaluate, dict.fromkeys(called, "eV/atom"),
            {i: i for i in range(len(made))} if self.relax else {},
            about=dict.fromkeys(called, "difference of energies per atom"),
        )  # fmt: skip


def _called(name: str, reference: str) -> str:
    return f"{name}.energy_above_{reference}"
