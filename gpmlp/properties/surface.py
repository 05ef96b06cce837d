"""A potential energy surface that calculations ask: many structures at once, relaxations, force constants; of any calculator too."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS

from gpmlp.core.errors import UserError
from gpmlp.core.structures import empty_layers
from gpmlp.core.units import GPA, VOIGT, VOIGT_INDEX
from gpmlp.engines.ase import GPCalculator
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.potential.potential import Potential
from gpmlp.properties.constraints import allowed_directions, allowed_forces

STEP = 0.01  # A, of central differences of forces
STRAIN = 1e-3  # of central differences of forces with the cell
STEPS = 500  # of a relaxation
NEWTON_STEPS = 8
LONGEST = 0.3  # A; a Newton step beyond that is no small correction
SOFT = 0.01  # eV/A^2; a softer mode (a translation, a rotation) is left as it is
SLACK = 1e-5  # of the largest eigenvalue of an elastic tensor; what is softer is as good as loose
AT_ONCE = 4000  # atoms in displaced structures

Cell = Literal["fixed", "shape", "full"]


class Failed(Exception):  # noqa: N818 - an outcome, no error
    """There is no such value on this surface: a relaxation that does not end, a saddle that is lost. Counted, never silent."""


@dataclass(frozen=True, eq=False)
class Point:
    """One structure on one surface: energy (eV), forces (n, 3) eV/A, stress (3, 3) eV/A^3, positive = tension, zero without volume."""

    energy: float
    forces: np.ndarray
    stress: np.ndarray


@dataclass(frozen=True, eq=False)
class ElasticResponse:
    """How a crystal at rest gives way, to first order; strains and stresses in Voigt's order, shears twice the tensor's components.

    Attributes:
        strain_forces: (6, 3n) L = dF/dε, ions carried along, eV/A.
        compliance: (3n, 3n) H⁺, inverse_hessian.
        stiffness: (6, 6) elastic tensor with relaxed ions, C - L H⁺Lᵀ / V, eV/A^3.
    """

    strain_forces: np.ndarray
    compliance: np.ndarray
    stiffness: np.ndarray


class EnergySurface:
    """The potential energy surface of a potential, or of any calculator of ASE (of_calculator)."""

    def __init__(self, potential: Potential) -> None:
        self.potential = potential

    @staticmethod
    def of_calculator(calculator: Any) -> EnergySurface:
        """The surface of a calculator of ASE: the truth of a test, or what an oracle itself says."""
        return _CalculatorSurface(calculator)

    @property
    def reach(self) -> float | None:
        """A, beyond which atoms do not see each other; None where it is not known."""
        return self.potential.reach

    def calculator(self) -> Any:
        """A calculator of ASE."""
        return GPCalculator(self.potential)

    def points(self, structures: Sequence[Atoms]) -> list[Point]:
        """Energies, forces and stresses of structures of any sizes."""
        if not structures:
            return []
        predicted = self.potential(structures_from_ase(structures, structure_names(structures)))
        ends = np.cumsum([len(atoms) for atoms in structures])[:-1]
        forces = np.split(predicted.forces.detach().cpu().numpy(), ends)
        stresses = np.nan_to_num(predicted.stresses.detach().cpu().numpy())
        return [
            Point(float(e), f, s)
            for e, f, s in zip(predicted.energies.detach().cpu().tolist(), forces, stresses, strict=True)
        ]

    def novelty(self, structures: Sequence[Atoms]) -> np.ndarray | None:
        """(structures,) largest novelty of the atoms of each; None where the model has none."""
        if getattr(self.potential, "novelty", None) is None or not structures:
            return None
        found = self.potential(structures_from_ase(structures, structure_names(structures)), None, True)
        assert found.novelty is not None
        ends = np.cumsum([len(atoms) for atoms in structures])[:-1]
        return np.array([part.max() for part in np.split(found.novelty.detach().cpu().numpy(), ends)])

    def relax(self, atoms: Atoms, cell: Cell = "fixed", fmax: float = 1e-3, steps: int = STEPS) -> Atoms:
        """The structure at rest: ions (but for constraints), and with cell='shape' the cell at its volume, with 'full' the whole cell.

        Args:
            fmax: eV/A, largest force on an atom, and on the cell as ASE's FrechetCellFilter measures it.

        Raises:
            Failed: not at rest after `steps` steps, or the whole cell cannot be: it has a gap that the potential does not reach across.
        """
        if (
            cell == "full"
            and self.reach is not None
            and (gap := empty_layers(atoms.cell.array, atoms.positions).max()) > self.reach
        ):
            raise Failed(
                f"{structure_names([atoms])[0]} has a gap of {gap:.1f} A without atoms, across which the model does not reach "
                f"({self.reach:.1f} A), so that nothing holds its cell"
            )
        moving = atoms.copy()
        moving.calc = self.calculator()
        target: Any = moving if cell == "fixed" else FrechetCellFilter(moving, constant_volume=cell == "shape")
        optimizer = BFGS(target, logfile=os.devnull)
        if not optimizer.run(fmax=fmax, steps=steps):
            raise Failed(f"{structure_names([atoms])[0]} is not at rest after {steps} steps of a relaxation")
        moving.calc = None
        return moving

    def hessian(self, atoms: Atoms) -> np.ndarray:
        """(3n, 3n) second derivatives of the energy, eV/A^2, by central differences, of motions that constraints allow."""
        return hessian_of_all(atoms, [point.forces for point in self._in_parts(displaced(atoms))])

    def elastic_response(self, atoms: Atoms) -> ElasticResponse:
        """Of a crystal at rest."""
        strain_forces, clamped = self.strain_response(atoms)
        compliance = inverse_hessian(self.hessian(atoms))
        stiffness = clamped - strain_forces @ compliance @ strain_forces.T / atoms.get_volume()
        return ElasticResponse(strain_forces, compliance, 0.5 * (stiffness + stiffness.T))

    def strain_response(self, atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
        """(6, 3n) derivatives of forces (eV/A) and (6, 6) of stresses (eV/A^3) with strain, ions carried along, by central differences.

        Strains and stresses are in Voigt's order, shears twice the tensor's components.
        """
        strains = [sign * STRAIN * unit for unit in np.eye(6) for sign in (1, -1)]
        found = self._in_parts([strained(atoms, strain) for strain in strains])
        forces = np.array([allowed_forces(atoms, point.forces) for point in found]).reshape(6, 2, -1)
        stresses = voigt(np.array([point.stress for point in found])).reshape(6, 2, 6)
        return tuple((values[:, 0] - values[:, 1]) / (2 * STRAIN) for values in (forces, stresses))

    def relax_ions(self, structures: Sequence[Atoms], compliance: np.ndarray, fmax: float = 1e-4) -> list[Atoms]:
        """Structures near one whose force constants are known, with their ions at rest; all at once, by Newton steps.

        Args:
            compliance: (3n, 3n) inverse_hessian of that structure.

        Raises:
            Failed: a step is too long, or the forces do not vanish; neither do they in ordinary relaxations.
        """
        moved = [atoms.copy() for atoms in structures]
        for _ in range(NEWTON_STEPS):
            forces = [allowed_forces(a, point.forces) for a, point in zip(moved, self.points(moved), strict=True)]
            if max((np.abs(force).max() for force in forces), default=0.0) < fmax:
                return moved
            for atoms, force in zip(moved, forces, strict=True):
                step = (compliance @ force.ravel()).reshape(-1, 3)
                atoms.positions += step * min(1.0, LONGEST / max(float(np.abs(step).max()), 1e-300))
        return [self.relax(atoms, fmax=10 * fmax) for atoms in moved]

    def _in_parts(self, structures: Sequence[Atoms]) -> list[Point]:
        """Points of many copies of one structure, some at a time."""
        together = max(1, AT_ONCE // max(map(len, structures), default=1))
        parts = (structures[i : i + together] for i in range(0, len(structures), together))
        return [point for part in parts for point in self.points(part)]


class _CalculatorSurface(EnergySurface):
    """That of a calculator, one structure after the other."""

    def __init__(self, calculator: Any) -> None:
        self._calculator = _Named(calculator)
        self._known: dict[bytes, Point] = {}

    @property
    def reach(self) -> None:
        return None

    def calculator(self) -> Any:
        return self._calculator

    def points(self, structures: Sequence[Atoms]) -> list[Point]:
        """What was asked before is not asked again: calculators may be dear."""
        for atoms in structures:
            key = _state(atoms)
            if key not in self._known:
                self._known[key] = self._point(atoms)
        return [self._known[_state(atoms)] for atoms in structures]

    def novelty(self, structures: Sequence[Atoms]) -> None:
        return None

    def _point(self, atoms: Atoms) -> Point:
        asked = atoms.copy()
        asked.calc = self._calculator
        forces = asked.get_forces(apply_constraint=False)
        stress = np.zeros((3, 3))
        if asked.cell.rank == 3 and asked.pbc.any():
            stress = asked.get_stress(voigt=True, apply_constraint=False)[np.array(VOIGT_INDEX)]
        return Point(float(asked.get_potential_energy()), np.array(forces), stress)


class _Named:
    """A calculator of ASE whose failures are UserErrors that name the structure."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":  # asked when it is copied
            raise AttributeError(name)
        found = getattr(self.inner, name)
        if not callable(found):
            return found

        def asked(*args: Any, **kwargs: Any) -> Any:
            try:
                return found(*args, **kwargs)
            except (UserError, NotImplementedError):
                raise
            except Exception as error:
                atoms = next((each for each in (*args, *kwargs.values()) if isinstance(each, Atoms)), None)
                where = f"{structure_names([atoms])[0]}: " if atoms is not None else ""
                raise UserError(f"{where}the calculator failed ({type(error).__name__}: {error})") from error

        return asked


def _state(atoms: Atoms) -> bytes:
    """What a Point depends on."""
    arrays = atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, atoms.get_initial_charges()
    return b"".join(np.ascontiguousarray(each).tobytes() for each in (*arrays, atoms.get_initial_magnetic_moments()))


def inverse_hessian(hessian: np.ndarray) -> np.ndarray:
    """Pseudo-inverse of force constants without their translations, rotations and other modes below SOFT, A^2/eV."""
    values, vectors = np.linalg.eigh(hessian)
    stiff = np.abs(values) > SOFT
    return (vectors[:, stiff] / values[stiff]) @ vectors[:, stiff].T


def check_stable(stiffness: np.ndarray, name: str) -> None:
    """Raises Failed: an elastic tensor (6, 6) of a crystal that some strain costs no energy, or wins it."""
    values = np.linalg.eigvalsh((stiffness + stiffness.T) / 2)
    if values[0] <= SLACK * values[-1]:
        raise Failed(f"{name} is not stable: an eigenvalue of its elastic tensor is {values[0] / GPA:.2g} GPa")


def strained(atoms: Atoms, strain: Sequence[float] | np.ndarray) -> Atoms:
    """The structure under a small strain (6,) (Voigt, shears twice the tensor's components), ions carried along."""
    matrix = np.asarray(strain, dtype=float)[np.array(VOIGT_INDEX)] * np.where(np.eye(3, dtype=bool), 1.0, 0.5)
    moved = atoms.copy()
    moved.set_cell(atoms.cell.array @ (np.eye(3) + matrix), scale_atoms=True)
    return moved


def voigt(tensor: np.ndarray) -> np.ndarray:
    """(..., 6) components xx yy zz yz xz xy of symmetric (..., 3, 3)."""
    return np.stack([tensor[..., i, j] for i, j in VOIGT], axis=-1)


def displaced(atoms: Atoms) -> list[Atoms]:
    """The structure moved by STEP forth and back along each of constraints.allowed_directions."""
    moved = []
    for index, direction in zip(*allowed_directions(atoms), strict=True):
        for sign in (1, -1):
            moved.append(atoms.copy())
            moved[-1].positions[index] += sign * STEP * direction
    return moved


def allowed_basis(atoms: Atoms) -> np.ndarray:
    """(k, 3n) constraints.allowed_directions as displacements of all atoms."""
    index, directions = allowed_directions(atoms)
    basis = np.zeros((len(index), len(atoms), 3))
    basis[np.arange(len(index)), index] = directions
    return basis.reshape(len(index), 3 * len(atoms))


def hessian_within(atoms: Atoms, forces: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """(k, k) second derivatives of the energy along constraints.allowed_directions, eV/A^2, from forces on `displaced`."""
    pairs = np.reshape(forces, (-1, 2, 3 * len(atoms)))
    within = ((pairs[:, 1] - pairs[:, 0]) / (2 * STEP)) @ allowed_basis(atoms).T
    return 0.5 * (within + within.T)


def hessian_of_all(atoms: Atoms, forces: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """(3n, 3n) hessian_within of displacements of all atoms; zero for those that constraints forbid."""
    basis = allowed_basis(atoms)
    return basis.T @ hessian_within(atoms, forces) @ basis


def structure_names(structures: Sequence[Atoms]) -> list[str]:
    """info['name'] of each, else its formula."""
    return [str(atoms.info.get("name") or atoms.get_chemical_formula()) for atoms in structures]


Progress = Callable[[str, float, float, str], None]
