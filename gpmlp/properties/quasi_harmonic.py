"""The quasi-harmonic approximation: volume, thermal expansion and bulk modulus at temperatures, from phonons at several volumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
from ase import Atoms
from ase.units import kB
from pydantic import Field

from gpmlp.core.units import GPA
from gpmlp.properties.lattice_dynamics import Harmonic
from gpmlp.properties.phonons import CURVE_TEMPERATURES, CrystalVibrations, forces_of
from gpmlp.properties.plan import CurveAxis, Outputs, Plan
from gpmlp.properties.surface import EnergySurface, Failed, Point

MICRO = 1e6
UNITS = {
    "volume": "A^3/atom",
    "volumetric_thermal_expansion": "1e-6/K",
    "isothermal_bulk_modulus": "GPa",
    "isobaric_heat_capacity": "kB/atom",
    "gruneisen_parameter": "",
}
ABOUT = {
    "volume": "at which the free energy F(V, T) is lowest",
    "volumetric_thermal_expansion": "(1/V) dV/dT; a third of it for lengths of cubic crystals",
    "isothermal_bulk_modulus": "V d²F/dV²",
    "isobaric_heat_capacity": "C_V + T V α² B",
    "gruneisen_parameter": "V α B / C_V",
}


class QuasiHarmonic(CrystalVibrations):
    """Free energy F(V, T) = E(V) + harmonic vibrations at V, lowest at V(T) (Allen, Mod. Phys. Lett. B 34, 2050025, 2020).

    At each volume the shape of the cell and the ions are at rest without vibrations. F and the entropy S are cubic polynomials of V^(-2/3)
    (Birch and Murnaghan's equation of state), and dV/dT = (dS/dV) / (d²F/dV²). volumes: how many; smallest, largest: as parts of the
    volume at rest. A temperature at which the free energy is lowest outside of them has no values.
    """

    name: ClassVar[str] = "quasi_harmonic"
    by_default: ClassVar[bool] = False
    volumes: Annotated[int, Field(ge=5, le=50)] = 7
    smallest: Annotated[float, Field(gt=0.7, lt=1)] = 0.97
    largest: Annotated[float, Field(gt=1, lt=1.3)] = 1.08

    def value_names(self, structures: Sequence[Atoms]) -> list[str]:
        return [f"{name}_{kelvin:g}K" for kelvin in self.temperatures for name in UNITS]

    def plan(self, surface: EnergySurface, structures: Sequence[Atoms]) -> Plan:
        (start,) = structures
        cell = self.cell_at_rest(surface, start)
        dynamics = self.dynamics(surface, cell)
        cells = [self.at_volume(surface, cell, r) for r in np.linspace(self.smallest, self.largest, self.volumes)]
        displaced = [dynamics.displaced(each) for each in cells]
        volumes = np.array([each.get_volume() for each in cells]) / len(cell)
        every = np.array([*self.temperatures, *CURVE_TEMPERATURES])
        k, n, each = len(self.temperatures), self.volumes, len(dynamics.structures)

        def evaluate(points: Sequence[Point]) -> Outputs:
            static = np.array([point.energy for point in points[:n]]) / len(cell)
            forces = forces_of(points[n:]).reshape(n, each, -1, 3)
            found = [dynamics.harmonic(dynamics.force_constants(each), every) for each in forces]
            states = states_of(volumes, static, found, every)
            at_temperatures = (float(states[name][i]) for i in range(k) for name in UNITS)
            values = dict(zip(self.value_names(structures), at_temperatures, strict=True))
            return values | {name: states[name][k:] for name in UNITS}

        short = self.too_short(surface, dynamics)
        names = {f"{name}_{kelvin:g}K": (name, f" at {kelvin:g} K") for kelvin in self.temperatures for name in UNITS}
        names |= {name: (name, "") for name in UNITS}
        return Plan(
            (*cells, *(atoms for part in displaced for atoms in part)), evaluate,
            {each: UNITS[name] for each, (name, _) in names.items()},
            {i: i for i in range(n)},
            dict.fromkeys(UNITS, CurveAxis(CURVE_TEMPERATURES, "temperature", "K")),
            {each: f"{ABOUT[name]}{at}, quasi-harmonic{short}" for each, (name, at) in names.items()},
        )  # fmt: skip


def states_of(
    volumes: np.ndarray, energies: np.ndarray, vibrations: Sequence[Harmonic], temperatures: np.ndarray
) -> dict[str, np.ndarray]:
    """Quantities of UNITS at temperatures (t,), NaN where the free energy is lowest outside of the volumes.

    Args:
        volumes, energies: (v,) A^3 and eV per atom, without vibrations; vibrations: at each volume, at these temperatures.

    Raises:
        Failed: it is so at every temperature.
    """
    scale = volumes.mean()
    inverse = np.linalg.pinv(_powers(volumes / scale)[0])

    def coefficients(rows: np.ndarray) -> np.ndarray:
        return inverse @ rows  # (4, t)

    free = coefficients(energies[:, None] + np.array([each.free_energy for each in vibrations]))
    entropy = kB * coefficients(np.array([each.entropy for each in vibrations]))
    capacity = kB * coefficients(np.array([each.heat_capacity for each in vibrations]))
    lowest = _minimum(free)
    inside = (lowest > volumes[0] / scale) & (lowest < volumes[-1] / scale)
    if not inside.any():
        raise Failed("the free energy is lowest outside of the volumes at every temperature")
    at, slope, curvature = (each.T for each in _powers(np.where(inside, lowest, 1.0)))  # (4, t)

    def value(of: np.ndarray, powers: np.ndarray) -> np.ndarray:
        return np.where(inside, (of * powers).sum(0), np.nan)

    volume = np.where(inside, lowest, np.nan) * scale
    stiffness = value(free, curvature) / scale**2
    expansion = value(entropy, slope) / scale / (volume * stiffness)
    bulk = volume * stiffness
    fixed_volume = value(capacity, at)
    with np.errstate(divide="ignore", invalid="ignore"):  # at 0 K
        gruneisen = np.where(fixed_volume > 1e-6 * kB, volume * expansion * bulk / fixed_volume, np.nan)
    return {
        "volume": volume,
        "volumetric_thermal_expansion": MICRO * expansion,
        "isothermal_bulk_modulus": bulk / GPA,
        "isobaric_heat_capacity": (fixed_volume + temperatures * volume * expansion**2 * bulk) / kB,
        "gruneisen_parameter": gruneisen,
    }


def _powers(volume: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(v, 4) of V^(-2k/3), k = 0 ... 3, and their first and second derivatives with V."""
    p = -2 * np.arange(4) / 3
    v = volume[:, None]
    return v**p, p * v ** (p - 1), p * (p - 1) * v ** (p - 2)


def _minimum(coefficients: np.ndarray) -> np.ndarray:
    """(t,) V at which polynomials (4, t) of x = V^(-2/3) are lowest; NaN where they have no minimum at V > 0."""
    _, a, b, c = coefficients  # a + 2 b x + 3 c x² = 0, where 2 b + 6 c x > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        root = np.sqrt(b * b - 3 * a * c)
        x = -a / (b + root)  # the root at which the curvature is 2 root > 0, in the form that also serves c = 0
        return np.where(x > 0, x, np.nan) ** -1.5
