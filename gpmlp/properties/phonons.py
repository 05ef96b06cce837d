"""Phonons of a crystal: bands, density of states, and the free energy, entropy and heat capacity of its harmonic vibrations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, ClassVar

import numpy as np
from ase import Atoms
from pydantic import Field

from gpmlp.properties.equation_of_state import no_crystal_at_rest
from gpmlp.properties.lattice_dynamics import (
    DOS_POINTS,
    IMAGINARY,
    UNSTABLE,
    LatticeDynamics,
    missing_library,
    standard_cell,
    supercell_repeats,
    too_short,
)
from gpmlp.properties.plan import Calculation, CurveAxis, Outputs, Plan
from gpmlp.properties.surface import (
    LONGEST,
    EnergySurface,
    Failed,
    Point,
    strained,
    structure_names,
    voigt,
)

FMAX = 5e-4  # eV/A
STRETCH = 0.01  # of the volume, of the second one
LARGEST_STRAIN = 0.1
DEGENERATE = 1e-6  # THz; symmetric force constants differ by less
FEW_BRANCHES = 12  # whose frequencies are given one by one at every point of high symmetry
CURVE_TEMPERATURES = np.linspace(0.0, 1000.0, 51)

Temperature = Annotated[float, Field(ge=0, le=10000)]
Repeats = Annotated[int, Field(ge=1, le=100)]


class CrystalVibrations(Calculation):
    """What all calculations on displaced supercells choose.

    supercell: how often to repeat the conventional cell; None = so that no image of an atom is within twice the model's reach, with
    most_atoms at most. most_displaced: supercells with displaced atoms; of a crystal that takes more nothing is computed. displacement: A.
    temperatures: K, at which values are given.
    """

    to_sharpen: ClassVar[bool] = False  # bands and meshes for each force of each supercell would not end
    supercell: tuple[Repeats, Repeats, Repeats] | None = None
    most_atoms: Annotated[int, Field(ge=1)] = 250
    most_displaced: Annotated[int, Field(ge=1)] = 150
    displacement: Annotated[float, Field(gt=0, le=0.2)] = 0.01
    temperatures: Annotated[tuple[Temperature, ...], Field(min_length=1)] = (300.0,)

    def refusal(self, structures: Sequence[Atoms]) -> str:
        return missing_library() or no_crystal_at_rest(structures, "vibrations")

    def cell_at_rest(self, surface: EnergySurface, start: Atoms) -> Atoms:
        """The conventional cell at rest, with the symmetry that it has."""
        cell = standard_cell(surface.relax(standard_cell(start), "full", FMAX))
        cell.info["name"] = structure_names([start])[0]
        return cell

    def at_volume(self, surface: EnergySurface, cell: Atoms, ratio: float) -> Atoms:
        """The cell with another volume, its shape and ions at rest."""
        scaled = cell.copy()
        scaled.set_cell(cell.cell * ratio ** (1 / 3), scale_atoms=True)
        scaled.info["name"] = f"{cell.info['name']} V={ratio:.3f}"
        return scaled if ratio == 1 else surface.relax(scaled, "shape", FMAX)

    def dynamics(self, surface: EnergySurface, cell: Atoms) -> LatticeDynamics:
        """Of a crystal at rest.

        Raises:
            Failed: it has so little symmetry that more than `most_displaced` supercells are needed.
        """
        repeats = self.supercell or supercell_repeats(cell, surface.reach, self.most_atoms)
        dynamics = LatticeDynamics(cell, repeats, self.displacement)
        n = len(dynamics.structures) - 1
        if n > self.most_displaced:
            atoms = len(dynamics.structures[0])
            how = f"--set {self.name}.most_displaced={n} lets it"
            raise Failed(f"it takes {n} supercells of {atoms} atoms, more than {self.most_displaced}; {how}")
        return dynamics

    def too_short(self, surface: EnergySurface, dynamics: LatticeDynamics) -> str:
        """See lattice_dynamics.too_short."""
        option = f"{self.name}.{'supercell' if self.supercell else 'most_atoms'}"
        return too_short(dynamics.structures[0], surface.reach, option)


class Phonons(CrystalVibrations):
    """Frequencies (THz, imaginary ones negative) of a crystal at rest, and its harmonic free energy, entropy and heat capacity.

    Another surface's crystal is at rest elsewhere. Its forces on displaced supercells are computed at two volumes and taken on the line
    between them, where its pressure vanishes; to them is added by what this surface's differ between there and where the other's crystal
    is at rest with all its strains and ions (Reaction). Without the field of polar modes (no non-analytic correction): longitudinal ones
    of polar crystals are too low near Gamma. points: of each line of the bands, its ends included.
    """

    name: ClassVar[str] = "phonons"
    points: Annotated[int, Field(ge=2, le=1000)] = 41

    def value_names(self, structures: Sequence[Atoms]) -> list[str]:
        at_temperatures = [name for kelvin in self.temperatures for name in _Outputs.thermal_names(kelvin)]
        return ["frequency_*_[0-9]*", "zero_point_energy", *at_temperatures]

    def plan(self, surface: EnergySurface, structures: Sequence[Atoms]) -> Plan:
        (start,) = structures
        cell = self.cell_at_rest(surface, start)
        dynamics = self.dynamics(surface, cell)
        mean = forces_of(surface.points(dynamics.structures))
        constants = dynamics.force_constants(mean)
        lowest, share = dynamics.imaginary(constants)
        highest = dynamics.mesh_frequencies(constants).max()
        grid = np.linspace(1.1 * lowest if share > UNSTABLE else 0.0, 1.1 * highest, DOS_POINTS)
        path = dynamics.path(self.points)
        special = special_frequencies(dynamics.frequencies(constants, path[0]), *path[1:])
        outputs = _Outputs(dynamics, path, special, grid, self.temperatures)
        wide = self.at_volume(surface, cell, 1 + STRETCH)
        displaced = dynamics.displaced(wide)
        reaction = cache(lambda: Reaction(surface, cell))
        mean_wide = cache(lambda: forces_of(surface.points(displaced)))
        n = len(displaced)

        def evaluate(points: Sequence[Point]) -> Outputs:
            forces, there = forces_of(points[2 : 2 + n]), forces_of(points[2 + n :])
            if not at_rest(points[0], cell):
                moved, steps = reaction().rest(points[0]), reaction().stretch(points[0], points[1])
                ratio = (1 + STRETCH * steps) * cell.get_volume() / moved.get_volume()
                moved.set_cell(moved.cell * ratio ** (1 / 3), scale_atoms=True)
                on_line = mean + steps * (mean_wide() - mean)
                forces = (
                    forces + steps * (there - forces) + forces_of(surface.points(dynamics.displaced(moved))) - on_line
                )
            return outputs.of(dynamics.force_constants(forces))

        made = (cell, wide, *dynamics.structures, *displaced)
        short = self.too_short(surface, dynamics)
        about = {name: words + short for name, words in _about(outputs, cell, lowest, share).items()}
        return Plan(made, evaluate, outputs.units(), curves=outputs.axes(), about=about)


class Reaction:
    """How a crystal at rest on one surface gives way to forces and stresses: to first order its structure at rest on another surface.

    With H = -dF/dr, L = dF/dε and C = dσ/dε of clamped ions, zero forces F + Lᵀε - H u = 0 and zero stress σ + C ε - L u / V = 0 give
    u = H⁺(F + Lᵀε) and (C - L H⁺Lᵀ / V) ε = L H⁺F / V - σ.
    """

    def __init__(self, surface: EnergySurface, cell: Atoms) -> None:
        self._cell, self._response = cell, surface.elastic_response(cell)

    def rest(self, point: Point) -> Atoms:
        """The crystal where it is at rest with these forces and stresses more.

        Raises:
            Failed: it is unstable, or farther away than a first order reaches.
        """
        force = point.forces.ravel()
        stiffness, compliance = self._response.stiffness, self._response.compliance
        if np.linalg.eigvalsh(stiffness).min() <= 0:
            raise Failed("the crystal is unstable against strains")
        strain = -np.linalg.solve(stiffness, self._tension(point))
        step = (compliance @ (force + self._response.strain_forces.T @ strain)).reshape(-1, 3)
        if np.abs(strain).max() > LARGEST_STRAIN or np.abs(step).max() > LONGEST:
            raise Failed(
                f"it is at rest {100 * np.abs(strain).max():.0f} % of strain away, ions {np.abs(step).max():.2f} A"
            )
        moved = strained(self._cell, strain)
        moved.positions += step
        return moved

    def stretch(self, first: Point, second: Point) -> float:
        """How far from the first volume towards the second, STRETCH larger, the pressure vanishes, in steps of their distance.

        Raises:
            Failed: the bulk modulus is negative.
        """
        near, far = (float(self._tension(point)[:3].mean()) for point in (first, second))
        if far <= near:
            raise Failed("the bulk modulus is negative")
        return -near / (far - near)

    def _tension(self, point: Point) -> np.ndarray:
        """(6,) stress after the ions have come to rest."""
        move = self._response.compliance @ point.forces.ravel()
        return voigt(point.stress) - self._response.strain_forces @ move / self._cell.get_volume()


def at_rest(point: Point, cell: Atoms) -> bool:
    """Whether a relaxation would have ended here."""
    return max(np.abs(point.forces).max(), np.abs(point.stress).max() * cell.get_volume() / len(cell)) < 2 * FMAX


def forces_of(points: Sequence[Point]) -> np.ndarray:
    """(points, atoms, 3) eV/A."""
    return np.array([point.forces for point in points])


def special_frequencies(
    bands: np.ndarray, distances: np.ndarray, marks: Sequence[tuple[float, str]]
) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Name of a frequency at a point of high symmetry -> its q-point on the path and its branches, of which degenerate ones are one.

    Points that symmetry makes equal (U and K of an fcc crystal) are one, and acoustic modes at Gamma are left out.
    """
    branches = bands.shape[1]
    found: dict[str, tuple[int, tuple[int, ...]]] = {}
    rows: list[np.ndarray] = []
    for place, label in marks:
        at = np.flatnonzero(np.isclose(distances, place))
        for point, q in zip(label.split("|"), (at[0], at[-1]), strict=False):
            if any(np.allclose(bands[q], row, rtol=0, atol=DEGENERATE) for row in rows):
                continue
            rows.append(bands[q])
            edges = np.flatnonzero(np.diff(bands[q]) > DEGENERATE) + 1
            groups = [tuple(group.tolist()) for group in np.split(np.arange(branches), edges)]
            if point == "GAMMA":
                groups = [group for group in groups if group[0] > 2]
            elif branches > FEW_BRANCHES:
                groups = [groups[0], groups[-1]]
            found |= {f"frequency_{point}_{group[0] + 1}": (int(q), group) for group in groups}
    return found


@dataclass(frozen=True, eq=False)
class _Outputs:
    """What is told of force constants.

    Attributes:
        path: q, distances and marks of LatticeDynamics.path; special: its special_frequencies; grid: of the density of states.
    """

    dynamics: LatticeDynamics
    path: tuple[np.ndarray, np.ndarray, tuple[tuple[float, str], ...]]
    special: Mapping[str, tuple[int, tuple[int, ...]]]
    grid: np.ndarray
    temperatures: Sequence[float]

    def special_points(self) -> dict[str, int]:
        """Name of a point of high symmetry -> its q-point on the path."""
        return {name.removeprefix("frequency_").rpartition("_")[0]: q for name, (q, _) in self.special.items()}

    def of(self, constants: np.ndarray) -> dict[str, float | np.ndarray]:
        """Every output of force constants, all branches at special points; NaN for what has no meaning with imaginary modes."""
        bands = self.dynamics.frequencies(constants, self.path[0])
        out: dict[str, float | np.ndarray] = {
            f"frequency_{point}_{k + 1}": float(bands[q, k])
            for point, q in self.special_points().items()
            for k in range(bands.shape[1])
        }
        out |= {"phonon_bands": bands, "phonon_dos": self.dynamics.density_of_states(constants, self.grid)}
        every = [*self.temperatures, *CURVE_TEMPERATURES]
        nothing = np.full(len(every), np.nan)
        try:
            found = self.dynamics.harmonic(constants, every)
            free, entropy, capacity, zero = (
                found.free_energy,
                found.entropy,
                found.heat_capacity,
                found.zero_point_energy,
            )
        except Failed:
            free = entropy = capacity = nothing
            zero = float("nan")
        k = len(self.temperatures)
        for i, kelvin in enumerate(self.temperatures):
            for name, values in zip(self.thermal_names(kelvin), (free, entropy, capacity), strict=True):
                out[name] = float(values[i])
        return out | {"zero_point_energy": zero, "vibrational_free_energy": free[k:], "heat_capacity": capacity[k:]}

    @staticmethod
    def thermal_names(kelvin: float) -> list[str]:
        """Of the values at a temperature."""
        return [f"{name}_{kelvin:g}K" for name in ("vibrational_free_energy", "entropy", "heat_capacity")]

    def units(self) -> dict[str, str]:
        """Of each output."""
        units = dict.fromkeys(self.special, "THz") | {"phonon_bands": "THz", "phonon_dos": "1/THz/atom"}
        for kelvin in self.temperatures:
            units |= dict(zip(self.thermal_names(kelvin), ("eV/atom", "kB/atom", "kB/atom"), strict=True))
        return units | {
            "zero_point_energy": "eV/atom",
            "vibrational_free_energy": "eV/atom",
            "heat_capacity": "kB/atom",
        }

    def axes(self) -> dict[str, CurveAxis]:
        """Of each curve."""
        _, distances, marks = self.path
        ticks = tuple((place, "|".join(map(_written, label.split("|")))) for place, label in marks)
        kelvin = CurveAxis(CURVE_TEMPERATURES, "temperature", "K")
        return {
            "phonon_bands": CurveAxis(distances, "wave vector", "1/A", ticks),
            "phonon_dos": CurveAxis(self.grid, "frequency", "THz"),
            "vibrational_free_energy": kelvin,
            "heat_capacity": kelvin,
        }


def _written(point: str) -> str:
    """A point of high symmetry as figures show it."""
    name, _, index = point.partition("_")
    greek = {"GAMMA": "Γ", "SIGMA": "Σ", "DELTA": "Δ", "LAMBDA": "Λ"}.get(name, name)
    return greek + index.translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def _about(outputs: _Outputs, cell: Atoms, lowest: float, share: float) -> Mapping[str, str]:
    """One sentence on each output."""
    n = len(outputs.dynamics.structures[0])
    polar = "; polar modes without their long-range field" if len(set(cell.numbers)) > 1 else ""
    where = "" if share > UNSTABLE else f" in {100 * share:.2g} % of the zone, which a larger supercell may not have"
    unstable = f"; imaginary modes down to {lowest:.2f} THz{where}, drawn as negative" if lowest < IMAGINARY else ""
    no_meaning = "; without meaning here, because modes are imaginary" if share > UNSTABLE else ""
    about = {}
    for name, (_, group) in outputs.special.items():
        point = _written(name.split("_", 1)[1].rsplit("_", 1)[0])
        branches = f"branch {group[0] + 1}" if len(group) == 1 else f"branches {group[0] + 1}–{group[-1] + 1}"
        about[name] = f"{branches} at {point}, from below"
    about |= {
        "phonon_bands": f"from supercells of {n} atoms{polar}{unstable}",
        "phonon_dos": f"density of states per atom, its integral is 3{polar}{unstable}",
        "zero_point_energy": f"of harmonic vibrations{no_meaning}",
        "vibrational_free_energy": f"Helmholtz free energy of harmonic vibrations at the volume at rest{no_meaning}",
        "heat_capacity": f"at constant volume, from harmonic vibrations{no_meaning}",
    }
    words = ("Helmholtz free energy", "entropy", "heat capacity at constant volume")
    for kelvin in outputs.temperatures:
        for name, what in zip(outputs.thermal_names(kelvin), words, strict=True):
            about[name] = f"{what} of harmonic vibrations at {kelvin:g} K{no_meaning}"
    return about
