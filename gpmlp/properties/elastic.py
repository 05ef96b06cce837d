"""Elastic constants with relaxed ions, of any symmetry, from stresses of strained cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from ase import Atoms
from pydantic import Field

from gpmlp.core.units import GPA
from gpmlp.properties import symmetry
from gpmlp.properties.equation_of_state import FMAX, no_crystal_at_rest
from gpmlp.properties.plan import Calculation, Outputs, Plan
from gpmlp.properties.surface import (
    EnergySurface,
    Point,
    check_stable,
    inverse_hessian,
    strained,
    structure_names,
    voigt,
)

SHIFT = 0.005  # strain of the cells between which the change of elastic constants with the cell is taken
# of the powder, and their units
MODULI = {f"{kind}_modulus_{mean}": "GPa" for kind in ("bulk", "shear") for mean in ("voigt", "reuss", "hill")}
MODULI |= {"young_modulus_hill": "GPa", "poisson_ratio_hill": ""}


class ElasticConstants(Calculation):
    """Elastic constants C_ij (Voigt, GPa) of a crystal at rest, and moduli of its powder (Voigt, Reuss, Hill).

    The crystal lies in its standard orientation (spglib's: cubic axes along x, y, z; a along x and c along z of hexagonal ones); triclinic
    ones lie as they are given. Only strains that symmetry does not make superfluous are computed; the tensor that has the symmetry and is
    nearest to the stresses counts. Elastic constants are those at the lattice constants of each sample: its stress at the mean's cell says
    how far these differ, and the mean how C changes with the cell. strain: of the cells, on either side.
    """

    name: ClassVar[str] = "elastic"
    strain: Annotated[float, Field(gt=0, le=0.05)] = 0.005

    def refusal(self, structures: Sequence[Atoms]) -> str:
        return no_crystal_at_rest(structures, "elastic constants")

    def value_names(self, structures: Sequence[Atoms]) -> list[str]:
        return ["C[1-6][1-6]", *MODULI]

    def plan(self, surface: EnergySurface, structures: Sequence[Atoms]) -> Plan:
        (start,) = structures
        rest = surface.relax(start, "full", FMAX)
        found = symmetry.find_symmetry(rest)
        rest, rotations = symmetry.turned(rest, found.to_standard), found.standard_rotations
        tensors = _SymmetricTensors(rotations, self.strain)
        compliance = inverse_hessian(surface.hessian(rest))
        made = surface.relax_ions(tensors.strained(rest), compliance)
        modes = symmetry.invariant_strains(rotations)
        changes = np.array([self._change(surface, rest, mode, compliance, tensors) for mode in modes])
        for atoms, label in zip((rest, *made), ("at rest", *tensors.labels), strict=True):
            atoms.info["name"] = f"{structure_names([start])[0]} {label}"

        def evaluate(points: Sequence[Point]) -> Outputs:
            return tensors.outputs(points[0], points[1:], modes, changes)

        return Plan(
            (rest, *made), evaluate, tensors.units(), dict.fromkeys(range(1 + len(made)), 0), about=tensors.about()
        )

    def _change(
        self, surface: EnergySurface, rest: Atoms, mode: np.ndarray, compliance: np.ndarray, tensors: _SymmetricTensors
    ) -> np.ndarray:
        """(6, 6) derivative of C with a strain of the cell."""
        cells = surface.relax_ions([strained(rest, sign * SHIFT * mode) for sign in (1, -1)], compliance)
        made = [atoms for cell in cells for atoms in tensors.strained(cell)]
        points = surface.points(surface.relax_ions(made, compliance))
        half = len(points) // 2
        return (tensors.fit(points[:half]) - tensors.fit(points[half:])) / (2 * SHIFT)


class _SymmetricTensors:
    """Elastic tensors of one symmetry, and the strains that tell them."""

    def __init__(self, rotations: np.ndarray, strain: float) -> None:
        self.basis = symmetry.invariant_stiffnesses(rotations)
        self.columns = symmetry.independent_columns(self.basis)
        self.components = symmetry.independent_components(self.basis)
        self.strain = strain
        self.labels = [f"{sign}e{column + 1}" for column in self.columns for sign in "+-"]

    def strained(self, atoms: Atoms) -> list[Atoms]:
        """A cell under each strain and its opposite, ions carried along."""
        strains = [sign * self.strain * np.eye(6)[column] for column in self.columns for sign in (1, -1)]
        return [strained(atoms, strain) for strain in strains]

    def fit(self, points: Sequence[Point]) -> np.ndarray:
        """(6, 6) C, eV/A^3, from the stresses of `strained`: least squares among tensors of the symmetry."""
        stresses = voigt(np.array([point.stress for point in points])).reshape(-1, 2, 6)
        columns = (stresses[:, 0] - stresses[:, 1]) / (2 * self.strain)
        design = self.basis[:, :, self.columns].transpose(2, 1, 0).reshape(-1, len(self.basis))
        coefficients = np.linalg.lstsq(design, columns.ravel(), rcond=None)[0]
        return np.einsum("m,mij->ij", coefficients, self.basis)

    def outputs(self, rest: Point, points: Sequence[Point], modes: np.ndarray, changes: np.ndarray) -> Outputs:
        """Constants and moduli at the cell where this surface has no stress, to first order in that of the given cell."""
        stiffness = self.fit(points)
        check_stable(stiffness, "the crystal")
        cell = -np.linalg.solve(stiffness, voigt(rest.stress))
        stiffness = stiffness + np.einsum("m,mij->ij", modes @ cell, changes)
        check_stable(stiffness, "the crystal")
        compliance = np.linalg.inv(stiffness)
        constants = {f"C{i + 1}{j + 1}": float(stiffness[i, j] / GPA) for i, j in self.components}
        return constants | powder_moduli(stiffness / GPA, compliance * GPA)

    def units(self) -> dict[str, str]:
        return dict.fromkeys([f"C{i + 1}{j + 1}" for i, j in self.components], "GPa") | MODULI

    def about(self) -> dict[str, str]:
        """One sentence on each output."""
        said = {name: f"elastic constant {name}, ions relaxed" for name in self.units() if name.startswith("C")}
        bound = {
            "voigt": "uniform strain (upper bound)",
            "reuss": "uniform stress (lower bound)",
            "hill": "mean of both",
        }
        for kind in ("bulk", "shear"):
            said |= {
                f"{kind}_modulus_{mean}": f"{kind} modulus of the powder, {words}" for mean, words in bound.items()
            }
        return said | {
            "young_modulus_hill": "Young's modulus of the powder, from Hill's means",
            "poisson_ratio_hill": "Poisson's ratio of the powder, from Hill's means",
        }


def powder_moduli(stiffness: np.ndarray, compliance: np.ndarray) -> dict[str, Any]:
    """Moduli of a powder from C and S = C⁻¹ (Hill, Proc. Phys. Soc. A 65, 349 (1952)), in C's unit."""
    c, s = stiffness, compliance
    bulk, shear = {}, {}
    bulk["voigt"] = c[:3, :3].sum() / 9
    bulk["reuss"] = 1 / s[:3, :3].sum()
    off, diagonal = c[0, 1] + c[0, 2] + c[1, 2], np.trace(c[:3, :3])
    shear["voigt"] = (diagonal - off + 3 * np.trace(c[3:, 3:])) / 15
    off, diagonal = s[0, 1] + s[0, 2] + s[1, 2], np.trace(s[:3, :3])
    shear["reuss"] = 15 / (4 * (diagonal - off) + 3 * np.trace(s[3:, 3:]))
    for modulus in (bulk, shear):
        modulus["hill"] = (modulus["voigt"] + modulus["reuss"]) / 2
    k, g = bulk["hill"], shear["hill"]
    moduli = {f"bulk_modulus_{mean}": float(value) for mean, value in bulk.items()}
    moduli |= {f"shear_modulus_{mean}": float(value) for mean, value in shear.items()}
    return moduli | {
        "young_modulus_hill": float(9 * k * g / (3 * k + g)),
        "poisson_ratio_hill": float((3 * k - 2 * g) / (2 * (3 * k + g))),
    }
