"""Averages over molecular dynamics at a temperature: radial distributions, energy and pressure; mean-square displacements and diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

from ase import Atoms
from pydantic import Field, model_validator

from gpmlp.core.errors import UserError
from gpmlp.potential.potential import Potential
from gpmlp.properties.lattice_dynamics import supercell_repeats
from gpmlp.properties.plan import Calculation, Plan
from gpmlp.properties.surface import EnergySurface, Failed, Progress, structure_names
from gpmlp.properties.transport import SEGMENTS, TransportSettings, transport
from gpmlp.properties.transport_results import TransportResults

ACROSS = 10.0  # A, of the cell that moves, at least
FEWEST_SAMPLES = 3  # whose scatter says something

Picoseconds = Annotated[float, Field(gt=0)]


class Motion(Calculation):
    """What averages over molecular dynamics share: the structure in the cell that is given, repeated to 10 A, at constant volume.

    temperature_K: of the run; length_ps: of each trajectory at most (it ends before where statistical errors are a tenth, or half of what
    samples scatter), after equilibrate_ps; segment_ps: pieces that are averaged; replicas: trajectories; timestep_fs: by default 0.5 with
    hydrogen, 1 up to neon, else 2; most_atoms: of the repeated cell. Statistical and model parts of error bars are told apart.
    """

    by_default: ClassVar[bool] = False
    to_sharpen: ClassVar[bool] = False
    moves: ClassVar[tuple[str, ...]]  # of TransportSettings.what

    temperature_K: Annotated[float, Field(gt=0)] = 300.0
    length_ps: Picoseconds = 10.0
    equilibrate_ps: Annotated[float, Field(ge=0)] = 2.0
    segment_ps: Picoseconds = 2.0
    replicas: Annotated[int, Field(ge=1)] = 1
    timestep_fs: Picoseconds | None = None
    most_atoms: Annotated[int, Field(ge=2)] = 200

    @model_validator(mode="after")
    def _two_segments(self) -> Self:
        if self.length_ps < SEGMENTS * self.segment_ps * (1 - 1e-9):
            raise ValueError(
                f"length_ps ({self.length_ps:g}) must be at least two of segment_ps ({self.segment_ps:g}), whose scatter gives the "
                "error bars: take longer trajectories, or a smaller segment_ps"
            )
        return self

    def refusal(self, structures: Sequence[Atoms]) -> str:
        for atoms, name in zip(structures, structure_names(structures), strict=True):
            if not atoms.pbc.all() or atoms.cell.rank < 3:
                return f"{name} is not periodic in three directions, so that its atoms have no density"
            if atoms.constraints:
                return f"{name} has constraints, which the dynamics do not keep: remove them"
            if len(self.start(atoms)) < 2:
                return f"{name} has one atom, which cannot move against others: repeat the cell"
        return ""

    def plan(self, surface: EnergySurface, structures: Sequence[Atoms]) -> Plan:
        raise Failed("it takes molecular dynamics, which runs on a fitted potential alone")

    def start(self, atoms: Atoms) -> Atoms:
        """The repeated cell."""
        cell = atoms.repeat(supercell_repeats(atoms, ACROSS / 2, self.most_atoms))
        cell.info = {key: value for key, value in atoms.info.items() if key != "name"}
        cell.info["name"] = f"{structure_names([atoms])[0]} in {len(cell)} atoms"
        return cell

    def samples_of(self, samples: int) -> int:
        """How many samples there are, of those that are drawn for other properties."""
        return samples

    def check_samples(self, samples: int) -> None:
        """Raise UserError where so few samples are drawn that their scatter says nothing."""
        if 0 < self.samples_of(samples) < FEWEST_SAMPLES:
            raise UserError(
                f"{self.name}: {self.samples_of(samples)} samples are too few, as their scatter is judged: take {FEWEST_SAMPLES} or more."
            )

    def run(self, potential: Potential, start: Atoms, samples: int, seed: int, say: Progress) -> TransportResults:
        """Averages from the start of the dynamics, whose values say that they are of this calculation."""
        settings = TransportSettings(
            (self.temperature_K,), self.moves, self.samples_of(samples), self.replicas,
            None, self.length_ps, None, self.timestep_fs, self.segment_ps, self.equilibrate_ps, seed,
        )  # fmt: skip
        stage = f"{start.info['name']}, {self.name}"
        results = transport(
            potential, start, settings, progress=lambda now: say(stage, now.share, 1.0, f"{now.time_ps:.1f} ps")
        )
        results.values = [replace(value, calculation=self.name) for value in results.values]
        return results


class RadialDistributions(Motion):
    """Radial distribution of each pair of elements up to 6 A, energy and pressure, from dynamics of the mean; samples by reweighting.

    Options: see Motion.
    """

    name: ClassVar[str] = "rdf"
    moves: ClassVar[tuple[str, ...]] = ("energy", "pressure", "rdf")

    def value_names(self, structures: Sequence[Atoms]) -> list[str]:
        return [f"{what}_{self.temperature_K:g}K" for what in ("potential_energy", "pressure")]


class MeanSquareDisplacements(Motion):
    """Mean-square displacements and velocity autocorrelations of each element, and diffusion coefficients; samples move by themselves.

    Options: see Motion; samples: how many of those that are drawn move, which takes that many times as long.
    """

    name: ClassVar[str] = "msd"
    moves: ClassVar[tuple[str, ...]] = ("diffusion",)

    samples: Annotated[int, Field(ge=FEWEST_SAMPLES)] | Literal[0] = 4

    def samples_of(self, samples: int) -> int:
        return min(samples, self.samples)

    def value_names(self, structures: Sequence[Atoms]) -> list[str]:
        symbols = sorted(set(structures[0].get_chemical_symbols()))
        return [f"diffusion_coefficient_{symbol}_{self.temperature_K:g}K" for symbol in symbols]
