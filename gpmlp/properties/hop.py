"""The rate of a hop from one place to another, and what it diffuses, at any temperature: transition state theory with harmonic modes.

G. H. Vineyard, J. Phys. Chem. Solids 3, 121 (1957), eq. 24:  Γ = Π ν_i (minimum) / Π' ν_j (saddle) exp(-ΔE / kT), and for equivalent hops
that do not remember each other  D = n d² Γ / (2 dimensions), d from site to site. A single atom moves less far than that where it relaxes
towards a vacancy, and less still where several pass it on; the sum of all displacements is d, as what relaxes about both sites cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.geometry import find_mic
from ase.mep import NEB
from ase.optimize import FIRE
from pydantic import Field

from gpmlp.properties.constraints import allowed_directions, allowed_forces, allowed_of_atoms, rigid_motions
from gpmlp.properties.plan import Calculation, Outputs, Plan
from gpmlp.properties.surface import (
    SOFT,
    EnergySurface,
    Failed,
    Point,
    displaced,
    hessian_within,
    inverse_hessian,
    structure_names,
)

SAME = 0.1  # A, between places that are one
SAME_CELL = 1e-6  # A
RIGID = 1e-3  # A, within which displacements are one drift
UNCLEAR = 0.3  # A, between the displacement of the farthest atom and that of all
FMAX = 1e-3  # eV/A, at minimum and saddle
CLIMBED = 0.05  # eV/A, to which a band climbs, if it does; Newton's steps find the saddle from there
BAND_STEPS, NEWTON_STEPS = 300, 10
FARTHEST = 0.1  # A, of one of Newton's steps
THZ = 1e-12 * units.second  # one over ASE's unit of time, in THz
PER_METRE = 1e-10
UNITS = {
    "hop_barrier": "eV",
    "log10_attempt_frequency": "log10(THz)",
    "log10_hop_rate": "log10(1/s)",
    "log10_diffusion_coefficient": "log10(m^2/s)",
}


class Hop(Calculation):
    """Barrier, attempt frequency, rate and diffusion coefficient of a hop between two given structures.

    Γ = Π ν(minimum) / Π' ν(saddle) exp(-ΔE / kT),  D = n d² Γ / (2 dimensions).

    temperature_K: of rate and diffusion coefficient; equivalent: hops of the same kind that lead away from a place (12 for a vacancy in an
    fcc crystal); dimensions: in which they lead; images: between the end points, of the band that finds the saddle; jump_A: from site to
    site, by default the length of the sum of all displacements between the structures as they are given.
    """

    name: ClassVar[str] = "hop"
    several: ClassVar[bool] = True
    by_default: ClassVar[bool] = False
    temperature_K: Annotated[float, Field(gt=0)] = 300.0
    equivalent: Annotated[int, Field(ge=1)] = 1
    dimensions: Annotated[int, Field(ge=1, le=3)] = 3
    images: Annotated[int, Field(ge=3)] = 5
    jump_A: Annotated[float, Field(gt=0)] | None = None

    def refusal(self, structures: Sequence[Atoms]) -> str:
        if len(structures) != 2:
            return f"it needs two structures, the place before the hop and the one after it; got {len(structures)}"
        start, end = structures
        if len(start) != len(end) or (start.numbers != end.numbers).any():
            return "start and end must have the same atoms in the same order"
        if (start.pbc != end.pbc).any() or np.abs(start.cell.array - end.cell.array)[start.pbc].max(
            initial=0.0
        ) > SAME_CELL:
            return "start and end must have the same cell"
        if not start.pbc.any() and rigid_motions(start).size:
            return (
                "an isolated molecule turns as well as it vibrates; take a periodic structure, or one with fixed atoms"
            )
        jump, farthest = _jump(start, end)
        if self.jump_A is None and allowed_of_atoms(start).any(axis=(1, 2)).all() and abs(jump - farthest) > UNCLEAR:
            return (
                f"the farthest atom moves by {farthest:.3f} A and all together by {jump:.3f} A, which is a drift of "
                "the whole, or a hop that several atoms pass on: give the distance from site to site (hop.jump_A)"
            )
        return ""

    def value_names(self, structures: Sequence[Atoms]) -> list[str]:
        return list(UNITS)

    def plan(self, surface: EnergySurface, structures: Sequence[Atoms]) -> Plan:
        start, end = (surface.relax(atoms, fmax=FMAX) for atoms in structures)
        end.positions = start.positions + find_mic(end.positions - start.positions, start.cell, start.pbc)[0]
        farthest = float(np.linalg.norm(end.positions - start.positions, axis=1).max())
        jump = self.jump_A or _jump(*structures)[0]
        saddle = self._saddle(surface, start, end)
        name = structure_names(structures[:1])[0]
        if farthest < SAME:
            raise Failed(
                f"{name} and where it hops to relax to one place: no atom is farther than {farthest:.3f} A from its own"
            )
        start.info["name"], saddle.info["name"] = f"{name} before the hop", f"{name} saddle"
        made = [start, saddle, *displaced(start), *displaced(saddle)]
        half = 2 + (len(made) - 2) // 2

        def evaluate(points: Sequence[Point]) -> Outputs:
            barrier = points[1].energy - points[0].energy
            below, at_top = (
                _log_modes(a, p, n) for a, p, n in ((start, points[2:half], 0), (saddle, points[half:], 1))
            )
            return self._outputs(barrier, below - at_top, jump)

        about = {
            "hop_barrier": "energy of the saddle less that of the place before the hop",
            "log10_attempt_frequency": "by all harmonic modes of both (Vineyard)",
            "log10_hop_rate": f"of one hop at {self.temperature_K:g} K",
            "log10_diffusion_coefficient": (
                f"of {self.equivalent} equivalent hops of {jump:.4f} A at {self.temperature_K:g} K, "
                f"{'the sum of all displacements' if self.jump_A is None else 'a distance that was given'}"
            ),
        }
        return Plan(tuple(made), evaluate, UNITS, {0: 0, 1: 1}, {}, about)

    def _outputs(self, barrier: float, log_frequency: float, jump: float) -> Outputs:
        """log_frequency: natural, of the attempt frequency in ASE's unit."""
        attempts = (log_frequency + np.log(THZ)) / np.log(10)
        rate = attempts + 12 - barrier / (units.kB * self.temperature_K) / np.log(10)
        area = self.equivalent * (jump * PER_METRE) ** 2 / (2 * self.dimensions)
        return {
            "hop_barrier": barrier,
            "log10_attempt_frequency": attempts,
            "log10_hop_rate": rate,
            "log10_diffusion_coefficient": rate + float(np.log10(area)),
        }

    def _saddle(self, surface: EnergySurface, start: Atoms, end: Atoms) -> Atoms:
        """The stationary point between two minima: a climbing band, then Newton's steps."""
        images = [start.copy() for _ in range(self.images + 1)] + [end.copy()]
        band = _Band(surface, images)
        band.interpolate("idpp", apply_constraint=True)
        FIRE(band, logfile=None).run(fmax=CLIMBED, steps=BAND_STEPS)
        top = images[1 + int(np.argmax([image.get_potential_energy() for image in images[1:-1]]))]
        top.calc = None
        for _ in range(NEWTON_STEPS):
            force = allowed_forces(top, surface.points([top])[0].forces)
            if np.linalg.norm(force, axis=1).max() < FMAX:
                return top
            step = (inverse_hessian(surface.hessian(top)) @ force.ravel()).reshape(-1, 3)
            top.positions += step * min(1.0, FARTHEST / float(np.abs(step).max()))
        raise Failed("there is no saddle near the top of the path")


class _Band(NEB):
    """A climbing elastic band whose images are asked for at once."""

    def __init__(self, surface: EnergySurface, images: list[Atoms]) -> None:
        super().__init__(images, climb=True, method="improvedtangent")
        self._surface = surface

    def get_forces(self) -> np.ndarray:
        for image, point in zip(self.images, self._surface.points(self.images), strict=True):
            image.calc = SinglePointCalculator(image, energy=point.energy, forces=point.forces)
        return super().get_forces()


def _jump(start: Atoms, end: Atoms) -> tuple[float, float]:
    """A, length of the sum of all displacements and of the largest; less those that atoms which are held have in the mean, or, where none
    are, those that most atoms share."""
    moves = find_mic(end.positions - start.positions, start.cell, start.pbc)[0]
    held = ~allowed_of_atoms(start).any(axis=(1, 2))
    drift = moves[held].mean(axis=0) if held.any() else np.median(moves, axis=0)
    if held.any() or np.mean(np.linalg.norm(moves - drift, axis=1) < RIGID) > 0.5:
        moves = moves - drift
    return float(np.linalg.norm(moves[~held].sum(axis=0))), float(np.linalg.norm(moves, axis=1).max())


def _log_modes(atoms: Atoms, points: Sequence[Point], unstable: int) -> float:
    """Sum of ln ν of the real modes, ν in ASE's unit; those of the whole that constraints allow are left out.

    Raises:
        Failed: there are more or fewer unstable modes.
    """
    masses = atoms.get_masses()[allowed_directions(atoms)[0]]
    values = np.linalg.eigvalsh(
        hessian_within(atoms, [point.forces for point in points]) / np.sqrt(masses[:, None] * masses)
    )
    values = np.delete(values, np.argsort(np.abs(values))[: rigid_motions(atoms).shape[1]])
    if (n := int((values < 0).sum())) != unstable or (np.abs(values) < SOFT / masses.max()).any():
        raise Failed(f"{structure_names([atoms])[0]} has {n} unstable modes, not {unstable}")
    return float(0.5 * np.log(values[unstable:]).sum() - (len(values) - unstable) * np.log(2 * np.pi))
