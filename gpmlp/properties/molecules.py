"""Harmonic vibrations of isolated molecules: frequencies and zero-point energy at a minimum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from ase import Atoms, units
from pydantic import Field

from gpmlp.properties.plan import Calculation, Outputs, Plan
from gpmlp.properties.surface import EnergySurface, Failed, Point, structure_names

# energy of a quantum, eV, of a mode whose curvature is 1 eV/A^2 per amu
QUANTUM = units._hbar * 1e10 / np.sqrt(units._e * units._amu)
AGAIN = 5  # times that a relaxation that ended on a saddle is pushed off it
PUSH = 0.1  # A, by which


class Frequencies(Calculation):
    """Harmonic frequencies of a molecule at a minimum, rising, in cm^-1, and its zero-point energy.

    Structures are the minimum of the mean and displacements +-s along each of its modes q_i. On another surface, with forces g in
    mass-weighted modes, H_ij from the odd and the cubic constants T_iik from the even part of the displaced forces, the minimum lies at
    u = H^-1 g_0 and

        H_ii <- H_ii + sum_k T_iik u_k,    H_ij <- H_ij + T_iij u_i + T_jji u_j

    so that frequencies are those at that surface's own minimum, to first order in the shift.
    """

    name: ClassVar[str] = "frequencies"

    step: float = Field(0.01, gt=0, le=0.2)  # A, length of a displacement of all atoms together

    def refusal(self, structures: Sequence[Atoms]) -> str:
        for atoms, name in zip(structures, structure_names(structures), strict=True):
            if atoms.pbc.any():
                return f"{name} is periodic; frequencies are of isolated molecules (phonons of crystals)"
            if len(atoms) < 2:
                return f"{name} is a single atom, which has no vibration"
            if atoms.constraints:
                return f"{name} is under constraints, so that its vibrations are not those of the molecule"
        return ""

    def value_names(self, structures: Sequence[Atoms]) -> list[str]:
        return [*_names(internal_directions(structures[0]).shape[1]), "zero_point_energy"]

    def plan(self, surface: EnergySurface, structures: Sequence[Atoms]) -> Plan:
        atoms, modes = relax_to_minimum(surface, structures[0])
        (name,) = structure_names([atoms])
        lengths = self.step / np.linalg.norm(modes.displacements, axis=1)
        made = [atoms]
        for k, (displacement, length) in enumerate(zip(modes.displacements, lengths, strict=True), 1):
            for sign in (1, -1):
                moved = atoms.copy()
                moved.positions += sign * length * displacement.reshape(-1, 3)
                moved.info["name"] = f"{name} {'+-'[sign < 0]} mode {k}"
                made.append(moved)
        names = _names(len(lengths))

        def evaluate(points: Sequence[Point]) -> Outputs:
            forces = np.stack([p.forces.ravel() for p in points]) @ modes.displacements.T
            curvatures = curvatures_at_minimum(forces, lengths)
            if (curvatures <= 0).any():
                raise Failed(f"{np.sum(curvatures <= 0)} imaginary frequencies where a minimum was wanted")
            quanta = QUANTUM * np.sqrt(curvatures)
            return dict(zip(names, quanta / units.invcm, strict=True)) | {"zero_point_energy": quanta.sum() / 2}

        return Plan(
            tuple(made),
            evaluate,
            dict.fromkeys(names, "cm^-1") | {"zero_point_energy": "eV"},
            about={n: f"harmonic frequency {k} of {len(names)}" for k, n in enumerate(names, 1)}
            | {"zero_point_energy": "half the sum of the harmonic quanta"},
        )


def _names(modes: int) -> list[str]:
    return [f"frequency_{k}" for k in range(1, modes + 1)]


@dataclass(frozen=True, eq=False)
class Modes:
    """Normal modes: curvatures (m,) eV/(A^2 amu), rising; displacements (m, 3n), A for a unit of the mass-weighted coordinate."""

    curvatures: np.ndarray
    displacements: np.ndarray


def normal_modes(surface: EnergySurface, atoms: Atoms) -> Modes:
    """The 3n - 6 normal modes (3n - 5 of a linear molecule), translations and rotations projected out."""
    root_mass = np.repeat(np.sqrt(atoms.get_masses()), 3)
    basis = internal_directions(atoms)
    weighted = surface.hessian(atoms) / np.outer(root_mass, root_mass)
    curvatures, vectors = np.linalg.eigh(basis.T @ weighted @ basis)
    return Modes(curvatures, (basis @ vectors).T / root_mass)


def internal_directions(atoms: Atoms) -> np.ndarray:
    """(3n, m) orthonormal mass-weighted directions that neither move nor turn the molecule (Eckart's conditions)."""
    root_mass = np.sqrt(atoms.get_masses())[:, None]
    arms = atoms.positions - atoms.get_center_of_mass()
    rigid = [root_mass * np.eye(3)[k] for k in range(3)] + [root_mass * np.cross(np.eye(3)[k], arms) for k in range(3)]
    left, sizes, _ = np.linalg.svd(np.stack([v.ravel() for v in rigid], axis=1))
    return left[:, np.sum(sizes > 1e-3 * sizes[0]) :]


def relax_to_minimum(surface: EnergySurface, atoms: Atoms) -> tuple[Atoms, Modes]:
    """The molecule at a minimum, pushed off saddles that symmetry holds it on, and its modes there.

    Raises:
        Failed: no minimum was reached.
    """
    for _ in range(AGAIN):
        atoms = surface.relax(atoms)
        modes = normal_modes(surface, atoms)
        if modes.curvatures[0] > 0:
            return atoms, modes
        push = modes.displacements[0].reshape(-1, 3)
        atoms.positions += PUSH * push / np.linalg.norm(push)
    raise Failed(f"{structure_names([atoms])[0]} has no minimum here: {AGAIN} relaxations ended on saddles")


def curvatures_at_minimum(forces: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Curvatures (m,), rising, at the minimum near where forces were taken (see Frequencies).

    Args:
        forces: (1 + 2m, m) in mass-weighted modes: undisplaced, then + and - along each mode.
        lengths: (m,) of the displacements, in mass-weighted coordinates.
    """
    still, plus, minus = forces[0], forces[1::2], forces[2::2]
    hessian = -(plus - minus) / (2 * lengths[:, None])
    hessian = (hessian + hessian.T) / 2
    cubic = -(plus + minus - 2 * still) / np.square(lengths)[:, None]  # T_iik
    shift = np.linalg.solve(hessian, still)
    mixed = cubic * shift[:, None]
    change = mixed + mixed.T
    np.fill_diagonal(change, cubic @ shift)
    return np.linalg.eigvalsh(hessian + change)
