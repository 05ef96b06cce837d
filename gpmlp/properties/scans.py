"""Scans of one coordinate: the energy of two atoms against their distance, and of a molecule against a torsion angle."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement
from typing import Any, ClassVar

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import chemical_symbols, covalent_radii
from ase.geometry import get_dihedrals_derivatives
from ase.optimize import BFGS
from pydantic import Field
from scipy.interpolate import CubicSpline
from scipy.sparse.csgraph import connected_components

from gpmlp.properties.molecules import internal_directions
from gpmlp.properties.plan import Calculation, CurveAxis, Outputs, Plan
from gpmlp.properties.surface import LONGEST, EnergySurface, Failed, Point, inverse_hessian, structure_names

FREE = 1000.0  # A between atoms that do not feel each other
CLOSE = 0.6  # of the shortest distance in the training data, or of a bond, is where a curve begins
BEYOND = 0.3  # A beyond the reach of the potential, where it ends
FAR = 6.0  # A, where there is no reach
BOND = 1.2  # sums of covalent radii; atoms that are farther apart are not bonded
STRAIGHT = 170.0  # degrees; a bond angle beyond that leaves a torsion without a meaning
SAME = 2e-3  # eV; barriers that differ by less are one
FMAX = 2e-3  # eV/A, of relaxations at a fixed torsion angle
AT_REST = 2 * FMAX
STEPS = 200  # of these
SIDE = 1e-6  # degrees, of what counts as half a turn


class Dimers(Calculation):
    """Energy of two atoms alone against their distance, less that of the two far apart, for each pair of the species of all structures.

    The distances go from repulsion to beyond the cutoff; those that the training data cover are marked. closest, farthest: A, else from
    the data and the model; points: how many.
    """

    name: ClassVar[str] = "dimers"
    several: ClassVar[bool] = True
    by_default: ClassVar[bool] = False

    closest: float | None = Field(None, gt=0)
    farthest: float | None = Field(None, gt=0)
    points: int = Field(60, ge=8, le=1000)

    def value_names(self, structures: Sequence[Atoms]) -> list[str]:
        pairs = (f"dimer_{chemical_symbols[a]}_{chemical_symbols[b]}" for a, b in _pairs(structures))
        return [f"{pair}_{what}" for pair in pairs for what in ("well_depth", "bond_length")]

    def plan(self, surface: EnergySurface, structures: Sequence[Atoms]) -> Plan:
        made: list[Atoms] = []
        axes: dict[str, CurveAxis] = {}
        for a, b in _pairs(structures):
            pair = f"{chemical_symbols[a]}_{chemical_symbols[b]}"
            axes[pair] = self._axis(surface, a, b)
            for r in (*axes[pair].x, FREE):
                made.append(Atoms([a, b], [[0, 0, 0], [0, 0, r]], info={"name": f"{pair} {r:.3f} A"}))

        def evaluate(points: Sequence[Point]) -> Outputs:
            energies = np.array([p.energy for p in points]).reshape(len(axes), -1)
            out: dict[str, float | np.ndarray] = {}
            for (pair, axis), energy in zip(axes.items(), energies, strict=True):
                curve = energy[:-1] - energy[-1]
                out[f"dimer_{pair}"] = curve
                depth, length = _lowest(axis.x, curve)
                out |= {f"dimer_{pair}_well_depth": depth, f"dimer_{pair}_bond_length": length}
            return out

        units: dict[str, str] = {}
        about: dict[str, str] = {}
        sources: dict[str, Sequence[int] | np.ndarray] = {}
        for k, pair in enumerate(axes):
            mine = range(k * (self.points + 1), (k + 1) * (self.points + 1))
            sources[f"dimer_{pair}"] = np.array([(i, mine[-1]) for i in mine[:-1]])
            sources |= {f"dimer_{pair}_well_depth": mine, f"dimer_{pair}_bond_length": mine}
            units |= {f"dimer_{pair}": "eV", f"dimer_{pair}_well_depth": "eV", f"dimer_{pair}_bond_length": "A"}
            about[f"dimer_{pair}"] = "energy of two atoms alone, less that of the same far apart"
            about[f"dimer_{pair}_well_depth"] = "how far the lowest energy of the curve lies below free atoms"
            about[f"dimer_{pair}_bond_length"] = "distance at which it lies there"
        curves = {f"dimer_{pair}": axis for pair, axis in axes.items()}
        return Plan(tuple(made), evaluate, units, curves=curves, about=about, sources=sources)

    def _axis(self, surface: EnergySurface, a: int, b: int) -> CurveAxis:
        potential = getattr(surface, "potential", None)
        shortest = (
            getattr(potential, "report", {}).get("shortest", {}).get(f"{chemical_symbols[a]}-{chemical_symbols[b]}")
        )
        start = self.closest or CLOSE * (shortest or covalent_radii[a] + covalent_radii[b])
        end = self.farthest or (potential.reach + BEYOND if potential is not None else FAR)
        if end <= start:
            raise Failed(f"a scan of distances from {start:.2f} to {end:.2f} A: give closest and farthest")
        ticks = ((float(shortest), "data from here"),) if shortest else ()
        return CurveAxis(np.linspace(start, end, self.points), "distance", "A", ticks)


def _pairs(structures: Sequence[Atoms]) -> list[tuple[int, int]]:
    """Of the species of all structures."""
    species = sorted({int(z) for atoms in structures for z in atoms.numbers})
    return list(combinations_with_replacement(species, 2))


def _lowest(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(-y, x) at the lowest of the minima inside a curve, by a cubic spline; NaN where there is none."""
    spline = CubicSpline(x, y)
    places = spline.derivative().roots(extrapolate=False)
    places = places[(spline(places, 2) > 0) & (spline(places) < 0)]
    if not len(places):
        return float("nan"), float("nan")
    place = places[np.argmin(spline(places))]
    return -float(spline(place)), float(place)


class Torsions(Calculation):
    """Energy of a molecule against the angle of each bond that it can turn about, and the barriers of that.

    A bond joins atoms nearer than 1.2 sums of covalent radii; it can be turned about if it is in no ring, has other atoms on both ends and
    these do not lie straight behind it. From a minimum the smaller end is turned in steps, and all else is relaxed at each angle.
    Barriers are the maxima of a periodic cubic spline above its lowest point, the highest first. On another surface the structures
    take one Newton step in the directions that leave the angle as it is.

    step: degrees; rigid: nothing is relaxed; bonds: pairs of atoms, counted from 0, instead of all; most_atoms: larger molecules are
    refused.
    """

    name: ClassVar[str] = "torsions"

    step: float = Field(15.0, ge=1, le=30)
    rigid: bool = False
    bonds: tuple[tuple[int, int], ...] | None = None
    most_atoms: int = Field(30, ge=4)

    def refusal(self, structures: Sequence[Atoms]) -> str:
        for atoms, name in zip(structures, structure_names(structures), strict=True):
            if atoms.pbc.any():
                return f"{name} is periodic; torsions are scanned in isolated molecules"
            if atoms.constraints:
                return f"{name} is under constraints, so that its torsions are not those of the molecule"
            if len(atoms) > self.most_atoms:
                return f"{name} has {len(atoms)} atoms, more than torsions.most_atoms={self.most_atoms}, so that a scan takes long"
            possible = rotatable_bonds(atoms)
            if not possible:
                return f"{name} has no bond that it can turn about"
            pairs = [{t.atoms[1], t.atoms[2]} for t in possible]
            for bond in self.bonds or ():
                if set(bond) not in pairs:
                    there = ", ".join(f"{t.atoms[1]}-{t.atoms[2]}" for t in possible)
                    return f"{name} cannot turn about the bond {bond[0]}-{bond[1]}; it can about {there} (atoms from 0)"
        return ""

    def value_names(self, structures: Sequence[Atoms]) -> list[str]:
        barriers = [f"{torsion.name}_barrier" for torsion in self._torsions(structures[0])]
        return [each for name in barriers for each in (name, f"{name}_[2-9]")]

    def _torsions(self, atoms: Atoms) -> list[Torsion]:
        """Those that are scanned."""
        wanted = None if self.bonds is None else [set(bond) for bond in self.bonds]
        return [t for t in rotatable_bonds(atoms) if wanted is None or {t.atoms[1], t.atoms[2]} in wanted]

    def plan(self, surface: EnergySurface, structures: Sequence[Atoms]) -> Plan:
        (start,) = structures
        torsions = self._torsions(start)
        rest = surface.relax(start.copy())
        scans = [_Scan.on(surface, rest, torsion, self.step, self.rigid) for torsion in torsions]
        maxima = [scan.maxima(surface.points(scan.structures)) for scan in scans]

        def evaluate(points: Sequence[Point]) -> Outputs:
            out: dict[str, float | np.ndarray] = {}
            first = 0
            for scan, angles in zip(scans, maxima, strict=True):
                mine = points[first : first + len(scan.structures)]
                first += len(scan.structures)
                out |= scan.outputs(mine, angles)
            return out

        units: dict[str, str] = {}
        about: dict[str, str] = {}
        sources: dict[str, Sequence[int] | np.ndarray] = {}
        placed: list[Atoms] = []
        for scan, angles in zip(scans, maxima, strict=True):
            units |= dict.fromkeys((scan.name, *scan.barrier_names(angles)), "eV")
            about[scan.name] = (
                f"energy about the bond {scan.torsion.label}, {'rigid' if self.rigid else 'all else relaxed'}"
            )
            words = (f"top of {about[scan.name]}, at {angle:.0f} degrees, above its lowest point" for angle in angles)
            about |= dict(zip(scan.barrier_names(angles), words, strict=True))
            first = len(placed)
            placed += scan.structures
            sources |= dict.fromkeys((scan.name, *scan.barrier_names(angles)), range(first, len(placed)))
        axis = {scan.name: CurveAxis(scan.angles, "torsion angle", "degrees") for scan in scans}
        return Plan(tuple(placed), evaluate, units, curves=axis, about=about, sources=sources)


@dataclass(frozen=True)
class Torsion:
    """A dihedral angle (four atoms, about the bond between the second and third) and what turns with the third; label names the bond."""

    atoms: tuple[int, int, int, int]
    turning: tuple[int, ...]
    label: str

    @property
    def name(self) -> str:
        """Of its curve."""
        return f"torsion_{self.label}"


def rotatable_bonds(atoms: Atoms) -> list[Torsion]:
    """The bonds of a molecule that it can turn about, by covalent radii; the smaller part turns."""
    radii = covalent_radii[atoms.numbers]
    distances = atoms.get_all_distances()
    bonded = (distances < BOND * (radii[:, None] + radii)) & ~np.eye(len(atoms), dtype=bool)
    found = []
    for j, k in np.argwhere(np.triu(bonded)):
        cut = bonded.copy()
        cut[j, k] = cut[k, j] = False
        part = connected_components(cut)[1]
        if part[j] == part[k]:
            continue  # in a ring
        if np.sum(part == part[k]) > np.sum(part == part[j]):
            j, k = k, j  # noqa: PLW2901 - the smaller part turns
        before, after = _substituent(atoms, bonded, j, k), _substituent(atoms, bonded, k, j)
        if before is None or after is None:
            continue
        turning = tuple(int(i) for i in np.flatnonzero(part == part[k]))
        label = "_".join(f"{atoms[int(i)].symbol}{i}" for i in (j, k))
        found.append(Torsion((before, int(j), int(k), after), turning, label))
    return found


def _substituent(atoms: Atoms, bonded: np.ndarray, of: int, other: int) -> int | None:
    """The heaviest atom bonded to one end of a bond that does not lie straight behind it."""
    able = [int(i) for i in np.flatnonzero(bonded[of]) if i != other and atoms.get_angle(i, of, other) < STRAIGHT]
    return max(able, key=lambda i: (atoms.numbers[i], -i), default=None)


@dataclass(frozen=True, eq=False)
class _Scan:
    """Structures of one torsion, by their angles, and (but for a rigid one) the surface that they are at rest on."""

    torsion: Torsion
    angles: np.ndarray
    structures: tuple[Atoms, ...]
    surface: EnergySurface | None

    @property
    def name(self) -> str:
        return self.torsion.name

    @staticmethod
    def on(surface: EnergySurface, rest: Atoms, torsion: Torsion, step: float, rigid: bool) -> _Scan:
        """The smaller end is turned rigidly from the minimum to each angle, all else relaxed from there."""
        n = int(np.ceil(360 / step))
        angles = -180 + 360 * np.arange(n) / n
        made = []
        for angle in angles:
            made.append(rest.copy())
            made[-1].info["name"] = f"{structure_names([rest])[0]} {torsion.label} {angle:.0f} degrees"
            made[-1].set_dihedral(*torsion.atoms, angle, indices=torsion.turning)
        if not rigid:
            made = _relax_at_angles(surface, made, torsion, angles)
        return _Scan(torsion, angles, tuple(made), None if rigid else surface)

    @cached_property
    def compliances(self) -> tuple[np.ndarray, ...]:
        """(3n, 3n) of each structure, at fixed angle; of no use on the surface itself, so made when another one needs them."""
        if self.surface is None:
            return ()
        out = []
        for atoms in self.structures:
            project = _angle_projection(atoms, self.torsion)
            out.append(inverse_hessian(project @ self.surface.hessian(atoms) @ project))
        return tuple(out)

    def energies(self, points: Sequence[Point]) -> np.ndarray:
        """Of the structures at rest on another surface at the same angle."""
        energies = np.array([point.energy for point in points])
        pairs = zip(self.structures, points, strict=True)
        forces = [_angle_projection(atoms, self.torsion) @ point.forces.ravel() for atoms, point in pairs]
        if np.abs(forces).max() < AT_REST:
            return energies
        for k, (force, compliance) in enumerate(zip(forces, self.compliances, strict=False)):
            move = compliance @ force
            if np.abs(move).max() > LONGEST:
                raise Failed(
                    f"at fixed {self.torsion.label} atoms move farther than a Newton step reaches ({LONGEST} A)"
                )
            energies[k] -= 0.5 * force @ move
        return energies

    def spline(self, points: Sequence[Point]) -> CubicSpline:
        """Energy against angle, periodic."""
        energies = self.energies(points)
        return CubicSpline(
            np.append(self.angles, self.angles[0] + 360), np.append(energies, energies[0]), bc_type="periodic"
        )

    def maxima(self, points: Sequence[Point]) -> list[float]:
        """Angles of the maxima of this surface, of different heights, the highest first."""
        spline = self.spline(points)
        tops, _ = _turning_points(spline)
        distinct: list[float] = []
        for angle in sorted(tops, key=lambda a: -float(spline(a))):
            if not distinct or spline(distinct[-1]) - spline(angle) > SAME:
                distinct.append(float(angle))
        return distinct

    def barrier_names(self, angles: Sequence[float]) -> list[str]:
        return [f"{self.name}_barrier" + (f"_{k}" if k > 1 else "") for k in range(1, len(angles) + 1)]

    def outputs(self, points: Sequence[Point], angles: Sequence[float]) -> dict[str, Any]:
        """Curve and barriers above the lowest point; each barrier is the top nearest to where it was, NaN if that has gone."""
        spline = self.spline(points)
        tops, valleys = _turning_points(spline)
        lowest = float(spline(valleys).min()) if len(valleys) else float(spline(self.angles).min())
        out: dict[str, Any] = {self.name: spline(self.angles) - lowest}
        for name, angle in zip(self.barrier_names(angles), angles, strict=True):
            off = np.abs((tops - angle + 180) % 360 - 180)
            near = len(tops) and off.min() < 45
            out[name] = float(spline(tops[off.argmin()])) - lowest if near else float("nan")
        return out


def _turning_points(spline: CubicSpline) -> tuple[np.ndarray, np.ndarray]:
    """Maxima and minima of a periodic spline over one period."""
    roots = spline.derivative().roots(extrapolate=False)
    roots = roots[np.isfinite(roots) & (roots < spline.x[-1] - SIDE)]
    bend = spline(roots, 2)
    return roots[bend < 0], roots[bend > 0]


def _relax_at_angles(
    surface: EnergySurface, structures: Sequence[Atoms], torsion: Torsion, angles: np.ndarray
) -> list[Atoms]:
    """All else at rest at given angles: ASE's optimizers side by side, so that each step of all of them is one batch.

    Raises:
        Failed: one is not at rest after STEPS steps.
    """
    moved = [atoms.copy() for atoms in structures]
    optimizers = [BFGS(atoms, logfile=os.devnull) for atoms in moved]
    moving = list(range(len(moved)))
    for _ in range(STEPS):
        points = surface.points([moved[k] for k in moving])
        pushed = []
        for k, point in zip(moving, points, strict=True):
            force = _angle_projection(moved[k], torsion) @ point.forces.ravel()
            if np.abs(force).max() > FMAX:
                moved[k].calc = SinglePointCalculator(moved[k], energy=point.energy, forces=force.reshape(-1, 3))
                optimizers[k].step()
                moved[k].calc = None
                moved[k].set_dihedral(*torsion.atoms, angles[k], indices=torsion.turning)
                pushed.append(k)
        if not pushed:
            return moved
        moving = pushed
    raise Failed(f"{moved[moving[0]].info['name']} is not at rest after {STEPS} steps at fixed angle")


def _angle_projection(atoms: Atoms, torsion: Torsion) -> np.ndarray:
    """(3n, 3n) onto directions that leave the torsion angle, and the molecule as a whole."""
    vectors = np.diff(atoms.positions[list(torsion.atoms)], axis=0)[:, None]
    turn = np.zeros((len(atoms), 3))
    turn[list(torsion.atoms)] = get_dihedrals_derivatives(*vectors)[0]
    unit = turn.ravel() / np.linalg.norm(turn)
    equal = atoms.copy()
    equal.set_masses(np.ones(len(atoms)))
    inside = internal_directions(equal)
    return inside @ inside.T - np.outer(unit, unit)  # an angle does not change when the molecule moves or turns
