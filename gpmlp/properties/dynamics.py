"""Dynamics of many copies of the same atoms: each member (a potential and samples of it) moves its own replicas at several temperatures.

A trajectory is cut into segments. Of each, sums are kept: mean-square displacements, velocity autocorrelations, and mean-square
displacements of the Helfand moments of the stress, from all origins in the segment. All that a run is, with the frames of the segment that
goes on, are a few arrays, and random numbers follow from the seed and the step: a run that is ended anywhere goes on to the last bit.

| on paper | here |
|---|---|
| BAOAB: Leimkuhler, Matthews, J. Chem. Phys. 138, 174102 (2013); O: Langevin at first, then velocity rescaling | `Replicas._step` |
| stochastic velocity rescaling: Bussi, Donadio, Parrinello, J. Chem. Phys. 126, 014101 (2007), eq. A7 | `_rescaling` |
| MSD_a(t) = ⟨|r(t₀ + t) − r(t₀)|²⟩, the drift of the centre of mass taken off; D = MSD'/6 = ∫₀ᵗ⟨v·v⟩/3 | `_segment_sums` |
| G_ab(t) = V ∫₀ᵗ P_ab; η = ⟨ΔG²⟩'/(2 V kT) = V/kT ∫₀ᵗ⟨P_ab P_ab⟩: Helfand, Phys. Rev. 119, 1 (1960) | `_segment_sums` |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ase import Atoms

from gpmlp.core import errors
from gpmlp.core.errors import UserError
from gpmlp.core.structures import Structures
from gpmlp.core.units import BOLTZMANN, FEMTOSECOND
from gpmlp.core.verlet_list import VerletList
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.potential.compiled import MovingAtoms
from gpmlp.potential.potential import Potential

HOTTEST = 5.0  # times the temperature: the integration has blown up
SHEARS = 5  # independent components of the pressure without its trace: xy, xz, yz, (xx - yy)/2, (yy - zz)/2
SKIN = 0.8  # A, of neighbours that are remembered: atoms of a liquid move far

Forces = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Positions (copies, n, 3) -> energies (copies,) eV, forces (copies, n, 3) eV/A, stresses (copies, 3, 3) eV/A^3, positive = tension."""


class MovingForces:
    """Forces of a potential on copies of the same atoms as they move, by one call of the core for all copies between two searches."""

    def __init__(self, potential: Potential, atoms: Atoms, copies: int) -> None:
        self.potential = potential
        self.structures: Structures = structures_from_ase([atoms] * copies, [f"copy {k}" for k in range(copies)])
        self._list = VerletList(potential.reach, SKIN)
        self._moving: MovingAtoms | None = None

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        flat = torch.as_tensor(positions.reshape(-1, 3))
        now = self.structures.with_unchecked_positions(flat, self.structures.cells)
        prediction = self._moving(now) if self._moving is not None else None
        if prediction is None:
            pairs = self._list.candidates(now)
            prediction = self.potential(now, pairs=pairs)
            core, moves = self.potential.compiled_prediction, self._list.moves(now)
            self._moving = core.follow(now, pairs, moves) if core is not None and moves is not None else None
        parts = prediction.energies, prediction.forces.reshape(positions.shape), prediction.stresses
        energies, forces, stresses = (part.detach().cpu().numpy() for part in parts)
        return energies, forces, stresses


@dataclass(frozen=True)
class DynamicsSettings:
    """How replicas move and what is recorded.

    Attributes:
        temperatures_K: of which there are `replicas` each.
        timestep_fs, stride: time step, and how many lie between two records.
        equilibrate: records for which a Langevin thermostat (relaxation_fs) acts before anything counts; then velocities are rescaled as a
            whole, with the time constant weak_fs: dynamics of atoms stay Newton's but for that.
        segment: records in one segment; displacements are taken over half of it at most.
        seed: of velocities and thermostats.
    """

    temperatures_K: tuple[float, ...]
    replicas: int = 2
    timestep_fs: float = 2.0
    stride: int = 10
    equilibrate: int = 100
    segment: int = 200
    relaxation_fs: float = 100.0
    weak_fs: float = 1000.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperatures_K:
            raise UserError("`temperatures` must name one temperature at least, as 1200,1400,1600.")
        for temperature in self.temperatures_K:
            errors.check_positive("temperatures", temperature)
        if len(set(self.temperatures_K)) < len(self.temperatures_K):
            raise UserError(f"`temperatures` must differ; got {', '.join(f'{t:g}' for t in self.temperatures_K)}.")
        errors.check_positive("timestep_fs", self.timestep_fs)
        for name, least in {"replicas": 1, "stride": 1, "equilibrate": 0, "segment": 8, "seed": 0}.items():
            errors.check_integer(f"`{name}`", getattr(self, name), least)

    @property
    def copies_K(self) -> np.ndarray:
        """(copies,) temperature of each copy of a member: all replicas of the first temperature, then of the next."""
        return np.repeat(np.array(self.temperatures_K, dtype=float), self.replicas)

    @property
    def record_fs(self) -> float:
        """Time between two records."""
        return self.timestep_fs * self.stride


class Replicas:
    """All copies of all members, and what was summed over their segments.

    Attributes:
        records: made so far, equilibration included.
        positions, velocities: (members, copies, n, 3) A, not wrapped into the cell, and A/sqrt(amu/eV).
        alive: (members,) which did not blow up or were pressed into what cannot be predicted; failures: why the others did.
        sums: of each segment that is over, by name: 'msd' and 'vacf' (members, copies, species, lags) A^2 and (A/fs)^2, 'helfand'
            (members, copies, lags) (eV fs)^2, 'temperature_K', 'energy_eV', 'pressure_eV_per_A3' (members, copies).
    """

    def __init__(self, atoms: Atoms, members: Sequence[Forces], settings: DynamicsSettings) -> None:
        """Set up at the start, all copies at the positions of the atoms.

        Args:
            members: forces of each; the first is that of the mean, without which there is nothing to run.
        """
        self.settings, self.members = settings, list(members)
        self.masses = atoms.get_masses()
        self.numbers = atoms.numbers.copy()
        self.species = [int(z) for z in dict.fromkeys(sorted(atoms.numbers))]
        self.volume, self.n = float(atoms.get_volume()), len(atoms)
        self.heights = 1 / np.linalg.norm(atoms.cell.reciprocal().array, axis=1)  # of the cell, A
        shape = len(self.members), len(settings.copies_K), self.n, 3
        self.positions = np.broadcast_to(atoms.positions, shape).copy()
        self.velocities = np.zeros(shape)
        self.helfand = np.zeros((*shape[:2], SHEARS))
        self.frames: dict[str, list[np.ndarray]] = {"x": [], "v": [], "g": [], "scalars": []}
        self.records, self.alive = 0, np.ones(shape[0], dtype=bool)
        self.failures: dict[int, str] = {}
        self.sums: list[dict[str, np.ndarray]] = []
        self.forces = np.full(shape, np.nan)
        self.energies, self.stresses = np.full(shape[:2], np.nan), np.full((*shape[:2], 3, 3), np.nan)

    @property
    def lags_fs(self) -> np.ndarray:
        """(lags,) times of the sums, from 0 to half a segment."""
        return np.arange(self.settings.segment // 2 + 1) * self.settings.record_fs

    @property
    def time_ps(self) -> float:
        """Length of each trajectory, without equilibration."""
        return max(0, self.records - self.settings.equilibrate) * self.settings.record_fs / 1000

    def advance(self) -> bool:
        """Go on to the next record, and say whether a segment is over by it."""
        settings = self.settings
        generator = np.random.default_rng([settings.seed, self.records])
        if not self.records:
            noise = generator.standard_normal(self.velocities.shape[1:])  # the same for all members
            self.velocities[:] = noise * np.sqrt(BOLTZMANN * settings.copies_K[:, None, None] / self.masses[:, None])
            self._rest()
        if not np.isfinite(self.forces[self.alive]).all():
            self._predict()
        if self.records == settings.equilibrate:
            self._rest()
            self._record()
        langevin = self.records < settings.equilibrate
        for _ in range(settings.stride):
            self._step(generator, langevin)
        self.records += 1
        if langevin:
            return False
        self._record()
        if len(self.frames["x"]) <= settings.segment:
            return False
        self.sums.append(self._segment_sums())
        self.frames = {name: frames[-1:] for name, frames in self.frames.items()}
        return True

    def _step(self, generator: np.random.Generator, langevin: bool) -> None:
        """One step BAOAB of all copies that are alive."""
        dt = self.settings.timestep_fs * FEMTOSECOND
        mass = self.masses[:, None]
        alive = self.alive
        self.velocities[alive] += 0.5 * dt * self.forces[alive] / mass
        self.positions[alive] += 0.5 * dt * self.velocities[alive]
        thermal = BOLTZMANN * self.settings.copies_K
        if langevin:
            keep = np.exp(-self.settings.timestep_fs / self.settings.relaxation_fs)
            noise = generator.standard_normal(self.velocities.shape) * np.sqrt(thermal[:, None, None] / mass)
            self.velocities[alive] = (keep * self.velocities + np.sqrt(1 - keep**2) * noise)[alive]
        else:
            keep = np.exp(-self.settings.timestep_fs / self.settings.weak_fs)
            factor = _rescaling(self.kinetic_eV, thermal, 3 * self.n - 3, keep, generator)
            self.velocities[alive] *= factor[alive][:, :, None, None]
        self.positions[alive] += 0.5 * dt * self.velocities[alive]
        self._predict()
        self.velocities[self.alive] += 0.5 * dt * self.forces[self.alive] / mass
        self.helfand += self._shears() * self.settings.timestep_fs

    def _predict(self) -> None:
        """Energies, forces and stresses where atoms are now; a sample that cannot is given up, with the reason."""
        for member in self.alive.nonzero()[0]:
            try:
                energies, forces, stresses = self.members[member](self.positions[member])
                if not (np.isfinite(energies).all() and np.isfinite(forces).all()):
                    raise UserError("energies or forces are no numbers")
                hottest = float((self._temperatures(self.velocities[member]) / self.settings.copies_K).max())
                if hottest > HOTTEST:
                    raise UserError(f"it heats up to {hottest:.1f} times its temperature")
            except UserError as error:
                if member == 0:
                    raise UserError(
                        f"record {self.records}: the mean potential cannot go on: {error} Take a shorter time step, relax the start, or "
                        "train on structures like those it went to."
                    ) from error
                self.alive[member], self.failures[int(member)] = False, str(error)
                continue
            self.energies[member], self.forces[member], self.stresses[member] = energies, forces, stresses

    def _rest(self) -> None:
        """Bring the centre of mass of each copy to rest."""
        mass = self.masses[:, None]
        self.velocities -= (mass * self.velocities).sum(2, keepdims=True) / mass.sum()

    @property
    def kinetic_eV(self) -> np.ndarray:
        """(members, copies)"""
        return 0.5 * (self.masses[:, None] * self.velocities**2).sum((2, 3))

    def _temperatures(self, velocities: np.ndarray) -> np.ndarray:
        return (self.masses[:, None] * velocities**2).sum((-2, -1)) / ((3 * self.n - 3) * BOLTZMANN)

    def _shears(self) -> np.ndarray:
        """(members, copies, SHEARS) volume times the components of the pressure without its trace, eV."""
        momenta = self.velocities * np.sqrt(self.masses)[:, None]
        p = momenta.swapaxes(-1, -2) @ momenta - self.volume * np.nan_to_num(self.stresses)
        diagonal = np.diagonal(p, axis1=-2, axis2=-1)
        parts = p[..., 0, 1], p[..., 0, 2], p[..., 1, 2], -np.diff(diagonal[..., :2])[..., 0] / 2
        return np.stack([*parts, -np.diff(diagonal[..., 1:])[..., 0] / 2], axis=-1)

    def _record(self) -> None:
        """Keep a frame of the segment."""
        mass = self.masses[:, None]
        moved = self.positions - (mass * self.positions).sum(2, keepdims=True) / mass.sum()
        self.frames["x"].append(moved.astype(np.float32))
        self.frames["v"].append((self.velocities * FEMTOSECOND).astype(np.float32))
        self.frames["g"].append(self.helfand.copy())
        virial = -np.trace(self.stresses, axis1=-2, axis2=-1) / 3
        pressure = virial + 2 * self.kinetic_eV / (3 * self.volume)
        self.frames["scalars"].append(np.stack([self._temperatures(self.velocities), self.energies, pressure]))

    def _segment_sums(self) -> dict[str, np.ndarray]:
        """What is kept of a segment; NaN for members that failed in it."""
        x, v, g, scalars = (np.array(self.frames[name]) for name in ("x", "v", "g", "scalars"))
        lags = len(self.lags_fs)
        by_species = [np.flatnonzero(self.numbers == z) for z in self.species]
        msd = np.zeros((*x.shape[1:3], len(by_species), lags))
        vacf, helfand = np.zeros_like(msd), np.zeros((*x.shape[1:3], lags))
        for k in range(lags):
            origins = slice(None, len(x) - k)
            squared = ((x[k:] - x[origins]) ** 2).sum(4).mean(0, dtype=float)
            product = (v[k:] * v[origins]).sum(4).mean(0, dtype=float)
            for s, atoms in enumerate(by_species):
                msd[:, :, s, k], vacf[:, :, s, k] = squared[..., atoms].mean(2), product[..., atoms].mean(2)
            helfand[:, :, k] = ((g[k:] - g[origins]) ** 2).mean((0, 3))
        names = "temperature_K", "energy_eV", "pressure_eV_per_A3"
        out = {"msd": msd, "vacf": vacf, "helfand": helfand}
        out |= dict(zip(names, scalars[1:].mean(0), strict=True))
        for values in out.values():
            values[~self.alive] = np.nan
        return out

    def state(self) -> dict[str, np.ndarray]:
        """Arrays from which `restore` goes on to the last bit."""
        names = "positions", "velocities", "helfand", "alive", "energies", "forces", "stresses"
        out: dict[str, np.ndarray] = {name: getattr(self, name) for name in names}
        out |= {"records": np.array(self.records), "failures": np.array([f"{k} {w}" for k, w in self.failures.items()])}
        out |= {f"frames/{name}": np.array(frames) for name, frames in self.frames.items() if frames}
        if self.sums:
            out |= {f"sums/{name}": np.stack([s[name] for s in self.sums]) for name in self.sums[0]}
        return out

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a state of the same atoms, members and settings was."""
        for name in ("positions", "velocities", "helfand", "alive", "energies", "forces", "stresses"):
            setattr(self, name, np.array(state[name]))
        self.records = int(state["records"])
        self.failures = {int(k): why for k, _, why in (str(text).partition(" ") for text in state["failures"])}
        self.frames = {name: list(state.get(f"frames/{name}", ())) for name in self.frames}
        sums = {name.partition("/")[2]: values for name, values in state.items() if name.startswith("sums/")}
        self.sums = [
            {name: values[k] for name, values in sums.items()} for k in range(len(next(iter(sums.values()), ())))
        ]


def _rescaling(
    kinetic: np.ndarray, thermal: np.ndarray, freedom: int, keep: float, generator: np.random.Generator
) -> np.ndarray:
    """(members, copies) factors of all velocities of a copy, by the exact solution of the stochastic equation of its kinetic energy."""
    wanted = 0.5 * thermal * np.ones_like(kinetic) / np.where(kinetic > 0, kinetic, np.inf)
    first, others = generator.standard_normal(kinetic.shape), generator.chisquare(freedom - 1, kinetic.shape)
    gain = wanted * (1 - keep)
    squared = keep + gain * (first**2 + others) + 2 * first * np.sqrt(keep * gain)
    sign = np.where(first + np.sqrt(keep / np.where(gain > 0, gain, np.inf)) < 0, -1.0, 1.0)
    return np.where(kinetic > 0, sign * np.sqrt(np.maximum(squared, 0)), 1.0)
