"""The equation of state of a crystal: energy against volume, its minimum, and how hard it is to compress."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from ase import Atoms
from ase.eos import EquationOfState as ASEEquationOfState
from pydantic import Field

from gpmlp.core.structures import empty_layers
from gpmlp.core.units import GPA
from gpmlp.properties.plan import Calculation, CurveAxis, Outputs, Plan
from gpmlp.properties.surface import EnergySurface, Failed, Point, structure_names

FMAX = 5e-4  # eV/A
WIDEST_GAP = 8.0  # A, between atoms of a crystal, along a normal of its cell
DRAWN = 61  # volumes of the curve


def not_a_crystal(structures: Sequence[Atoms]) -> str:
    """Why structures are no crystals; '' if all are."""
    for atoms, name in zip(structures, structure_names(structures), strict=True):
        if not (atoms.pbc.all() and atoms.cell.rank == 3):
            return f"{name} is no crystal: it is not periodic in three directions"
        if (gaps := empty_layers(atoms.cell.array, atoms.positions)).max() > WIDEST_GAP:
            what = ("a slab or a layer", "a chain", "a molecule in a box")[int((gaps > WIDEST_GAP).sum()) - 1]
            return f"{name} is no crystal: its cell has a gap of {gaps.max():.1f} A without atoms, as that of {what}"
    return ""


def no_crystal_at_rest(structures: Sequence[Atoms], what: str) -> str:
    """Why a property of crystals at rest cannot be had of structures; '' if it can.

    Args:
        what: of a crystal, in the plural ('elastic constants').
    """
    for atoms, name in zip(structures, structure_names(structures), strict=True):
        if atoms.constraints:
            return f"{name} has constraints, which a crystal's {what} cannot have: remove them"
    return not_a_crystal(structures)


class EquationOfState(Calculation):
    """Energy per atom, volume, bulk modulus and its derivative from energies at some volumes, by ASE's EquationOfState.

    At each volume ions and shape of the cell are at rest. volumes: how many; span: of volumes about the minimum, on either side, as a
    part of it; form: as ASE calls it, one with a derivative of the bulk modulus.
    """

    name: ClassVar[str] = "eos"
    volumes: Annotated[int, Field(ge=5)] = 9
    span: Annotated[float, Field(gt=0, le=0.3)] = 0.06
    form: Literal["birchmurnaghan", "vinet", "murnaghan", "birch", "pouriertarantola"] = "birchmurnaghan"

    def refusal(self, structures: Sequence[Atoms]) -> str:
        return no_crystal_at_rest(structures, "volumes")

    def value_names(self, structures: Sequence[Atoms]) -> list[str]:
        return ["energy_per_atom", "volume_per_atom", "bulk_modulus", "bulk_modulus_derivative"]

    def plan(self, surface: EnergySurface, structures: Sequence[Atoms]) -> Plan:
        (start,) = structures
        rest = surface.relax(start, "full", FMAX)
        n, v0 = len(rest), rest.get_volume()
        relative = np.linspace(1 - self.span, 1 + self.span, self.volumes)
        made = []
        for ratio in relative:
            scaled = rest.copy()
            scaled.set_cell(rest.cell * ratio ** (1 / 3), scale_atoms=True)
            made.append(scaled if abs(ratio - 1) < 1e-9 else surface.relax(scaled, "shape", FMAX))
            made[-1].info["name"] = f"{structure_names([start])[0]} V={ratio:.3f}"
        volumes = relative * v0 / n
        drawn = np.linspace(volumes[0], volumes[-1], DRAWN)
        reference = surface.points([rest])[0].energy / n

        def evaluate(points: Sequence[Point]) -> Outputs:
            return self._fit(volumes, np.array([point.energy / n for point in points]), drawn, reference)

        unit = {"energy_per_atom": "eV/atom", "volume_per_atom": "A^3/atom", "bulk_modulus": "GPa"}
        return Plan(
            tuple(made), evaluate, unit | {"bulk_modulus_derivative": "", "equation_of_state": "eV/atom"},
            dict.fromkeys(range(len(made)), len(made) // 2),
            {"equation_of_state": CurveAxis(drawn, "volume per atom", "A^3/atom")},
            {
                "energy_per_atom": "energy of the crystal at rest",
                "volume_per_atom": "volume at which the energy is lowest",
                "bulk_modulus": "V d²E/dV² at that volume",
                "bulk_modulus_derivative": "its derivative with pressure",
                "equation_of_state": f"energy less that of the mean at rest, {self.form}",
            },
        )  # fmt: skip

    def _fit(self, volumes: np.ndarray, energies: np.ndarray, drawn: np.ndarray, reference: float) -> Outputs:
        """Parameters and curve of one surface."""
        shift = energies.mean()
        state = ASEEquationOfState(volumes, energies - shift, eos=self.form)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of its covariances
                v0, e0, bulk = state.fit(warn=False)
        except (RuntimeError, ValueError) as error:
            raise Failed(f"the equation of state has no minimum: {error}") from error
        if not (volumes[0] < v0 < volumes[-1] and bulk > 0):
            raise Failed(f"the energy is lowest at {v0:.2f} A^3/atom, outside of the volumes")
        curve = state.func(drawn, *state.eos_parameters) + shift - reference
        return {
            "energy_per_atom": e0 + shift, "volume_per_atom": v0, "bulk_modulus": bulk / GPA,
            "bulk_modulus_derivative": float(state.eos_parameters[2]), "equation_of_state": curve,
        }  # fmt: skip
