"""Novelty of environments that were not learned from, of stretched bonds and of a crystal at rest, by species and number of structures.

    python tests/benchmarks/novelty.py [--data FOLDER] [--systems ...] [--sizes 10 18 40 72 300] [--seeds 3] [--fits 18]

makes the table of docs/uncertainty.md: for each system and size the range, over seeds, of the 0.99 quantile of the novelty of
held-out environments, the smallest novelty of stretched bonds (larger one of its two atoms), and that of the structure at rest.
FOLDER holds acac/ and water_pbe0ts_deepmd/ (published sets); without it the systems that need them are left out. Metric and
thresholds alone are fitted (`fit_mahalanobis` on the default descriptor); with --fits N, potentials too, to N structures, at once
and label by label.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import covalent_radii
from ase.neighborlist import neighbor_list
from ase.optimize import BFGS
from common import ROOT, table

import gpmlp
from gpmlp import descriptors
from gpmlp.core.calculators import build_calculator
from gpmlp.core.environments import StructureEnvironments
from gpmlp.core.errors import chemical_symbol
from gpmlp.engines.md import LangevinBAOAB
from gpmlp.fitting import prepare
from gpmlp.fitting.online import OnlineFit
from gpmlp.io.ase_atoms import from_ase, structures_from_ase
from gpmlp.recipe import Recipe
from gpmlp.uncertainty.mahalanobis import Mahalanobis, fit_mahalanobis

FEWEST = 10  # rows of a species that the quantile is asked of
ROWS = 2000  # of a species, as many as a fit takes
RECIPE = Recipe(inducing={"n": 60, "gradients": 3})
Novelty = Callable[[Sequence[Atoms]], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class System:
    """Structures to learn from and others of the same kind; at_rest: minima of the energy."""

    train: list[Atoms]
    test: list[Atoms]
    at_rest: list[Atoms]


def trajectory(
    atoms: Atoms, calculator, temperature_K: float, frames: int, every: int, timestep_fs: float
) -> list[Atoms]:
    """Frames of Langevin dynamics, with labels."""
    rng = np.random.default_rng(0)
    atoms = atoms.copy()
    atoms.calc = calculator
    atoms.set_momenta(
        rng.normal(size=(len(atoms), 3)) * np.sqrt(units.kB * temperature_K * atoms.get_masses())[:, None]
    )
    run = LangevinBAOAB(atoms, timestep_fs * units.fs, temperature_K=temperature_K, T_tau=50 * units.fs, rng=rng)
    run.run(200)
    out = []
    for _ in range(frames):
        run.run(every)
        one = atoms.copy()
        one.calc = SinglePointCalculator(one, energy=atoms.get_potential_energy(), forces=atoms.get_forces())
        out.append(one)
    return out


def _divided(frames: list[Atoms], share: float, at_rest: Sequence[Atoms] = ()) -> System:
    order = np.random.default_rng(0).permutation(len(frames))
    n = int(share * len(frames))
    return System([frames[i] for i in order[:n]], [frames[i] for i in order[n:]], list(at_rest))


def _from_files(train: Path, test: Path) -> System:
    frames = [a for a in ase.io.read(train, ":") if len(a) > 1]
    return System(_divided(frames, 1.0).train[:300], ase.io.read(test, ":")[:150], [])


def silicon(frames: int = 380) -> System:
    crystal = ase.build.bulk("Si", cubic=True)
    calculator = build_calculator("stillinger-weber", {}, Path("."))
    return _divided(trajectory(crystal, calculator, 300, frames, 20, 2.0), 0.8, [crystal])


def copper_and_oxygen(frames: int = 380) -> System:
    slab = ase.build.fcc111("Cu", (2, 2, 3), vacuum=6.0)
    ase.build.add_adsorbate(slab, "O", 1.3, "fcc")
    slab.info.clear()
    slab.calc = EMT()
    BFGS(slab, logfile=None).run(0.02, 200)
    return _divided(trajectory(slab, EMT(), 400, frames, 15, 2.0), 0.8, [slab])


def systems(data: Path | None) -> dict[str, Callable[[], System]]:
    ethanol = ROOT / "data" / "ethanol"
    out = {
        "silicon, 300 K": silicon,
        "Cu + O, 400 K": copper_and_oxygen,
        "ethanol": lambda: _from_files(ethanol / "train.xyz", ethanol / "test.xyz"),
    }
    if data:
        acac, water = data / "acac", data / "water_pbe0ts_deepmd"
        out["acac, 300 K"] = lambda: _from_files(acac / "train_300K.xyz", acac / "test_MD_300K.xyz")
        out["water"] = lambda: _from_files(water / "train.xyz", water / "test.xyz")
    return out


def stretched_bonds(frames: Sequence[Atoms], share: float, of_each: int = 5) -> list[tuple[Atoms, int, int]]:
    """Copies in which one atom of a bond has moved away from the other, by a share of the bond; with both atoms."""
    out, count = [], dict[tuple[int, int], int]()
    rng = np.random.default_rng(0)
    for atoms in frames:
        first, second, r, vector = neighbor_list("ijdD", atoms, 3.2)
        z, done = atoms.numbers, set()
        bonds = np.flatnonzero(r < 1.25 * (covalent_radii[z[first]] + covalent_radii[z[second]]))
        for k in rng.permutation(bonds):
            i, j = int(first[k]), int(second[k])
            pair = (min(z[i], z[j]), max(z[i], z[j]))
            if pair in done or count.get(pair, 0) == of_each:
                continue
            done.add(pair)
            count[pair] = count.get(pair, 0) + 1
            moved = atoms.copy()
            moved.positions[j] += share * vector[k]
            out.append((moved, i, j))
    return out


class MetricOnly:
    """The novelty that a fit would have, of the default descriptor's features, without the fit."""

    def __init__(self, frames: Sequence[Atoms]) -> None:
        structures, targets = from_ase(frames)[:2]
        structures, targets = prepare.prepare_data(structures, targets, RECIPE)
        choices = prepare.set_up(structures, targets, RECIPE)[0].descriptors[0].model_dump()
        self.descriptor = descriptors.make_descriptor(structures.distinct_species, choices)

    def environments(self, frames: Sequence[Atoms]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Species, features and structure of each atom."""
        structures = structures_from_ase(frames)
        features = [
            StructureEnvironments.from_structures(self.descriptor, structures.select([i])).environments.features
            for i in range(len(structures))
        ]
        return structures.species, torch.cat(features).double(), structures.structure_of_atom

    def fitted(self, frames: Sequence[Atoms], seed: int) -> Mahalanobis:
        species, features, owner = self.environments(frames)
        rows = {
            z: torch.from_numpy(np.random.default_rng(seed).permutation((species == z).nonzero()[:, 0]))[:ROWS]
            for z in species.unique().tolist()
        }
        return fit_mahalanobis(
            {z: features[k] for z, k in rows.items()}, {z: owner[k] for z, k in rows.items()}, seed=seed
        )

    def novelty(self, model: Mahalanobis) -> Novelty:
        def of(frames: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray]:
            species, features, _ = self.environments(frames)
            return species.numpy(), model.novelty(species, features).numpy()

        return of


def of_potential(potential: gpmlp.Potential) -> Novelty:
    def of(frames: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray]:
        structures = structures_from_ase(frames)
        return structures.species.numpy(), potential(structures, novelty=True).novelty.numpy()

    return of


@dataclass(frozen=True)
class Judgement:
    """quantile: by Z, of species with FEWEST rows or more; bonds: by (share, pair), the novelty of each; at_rest: the largest."""

    quantile: dict[int, float]
    bonds: dict[tuple[float, str], list[float]]
    at_rest: float


def judge(novelty: Novelty, train: Sequence[Atoms], system: System, shares: Sequence[float] = (0.3, 0.5)) -> Judgement:
    rows = np.concatenate([a.numbers for a in train])
    species, found = novelty(system.test)
    quantile = {
        int(z): float(np.quantile(found[species == z], 0.99)) for z in np.unique(rows) if (rows == z).sum() >= FEWEST
    }
    bonds: dict[tuple[float, str], list[float]] = {}
    for share in shares:
        moved = stretched_bonds(system.test, share)
        first = np.cumsum([0, *(len(a) for a, *_ in moved)])
        _, values = novelty([a for a, *_ in moved])
        for (atoms, i, j), at in zip(moved, first, strict=False):
            pair = "-".join(chemical_symbol(z) for z in sorted(atoms.numbers[[i, j]].tolist()))
            bonds.setdefault((share, pair), []).append(float(max(values[at + i], values[at + j])))
    return Judgement(quantile, bonds, float(novelty(system.at_rest)[1].max()) if system.at_rest else float("nan"))


def row(name: str, n: int, found: Sequence[Judgement]) -> list[str]:
    """A line of the table: ranges over seeds, least values of bonds."""
    ranges = []
    for z in sorted(set(itertools.chain(*(f.quantile for f in found)))):
        values = [f.quantile[z] for f in found if z in f.quantile]
        ranges.append(f"{chemical_symbol(z)} {min(values):.2f}-{max(values):.2f}")
    least = []
    for share in sorted({share for f in found for share, _ in f.bonds}):
        values = [v for f in found for (s, _), part in f.bonds.items() if s == share for v in part]
        least.append(f"{min(values):.1f} ({100 * np.mean(np.array(values) > 1):.0f} %)")
    rest = max(f.at_rest for f in found)
    return [name, str(n), ", ".join(ranges), *least, "" if np.isnan(rest) else f"{rest:.2f}"]


HEADER = ("system", "structures", "0.99 quantile of novelty", "least, bonds +30 % (share > 1)", "+50 %", "at rest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of published sets")
    parser.add_argument("--systems", nargs="*", help="names, all if left out")
    parser.add_argument("--sizes", type=int, nargs="*", default=[10, 18, 40, 72, 300])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fits", type=int, nargs="*", default=[], help="sizes of potentials to fit as well")
    options = parser.parse_args()
    rows = []
    made = systems(options.data)
    if unknown := set(options.systems or ()) - made.keys():
        parser.error(f"there is no system {', '.join(sorted(unknown))}; there are {', '.join(made)}")
    for name, make in made.items():
        if options.systems and name not in options.systems:
            continue
        system = make()
        metric = MetricOnly(system.train)

        def drawn(n: int, seed: int, frames: list[Atoms] = system.train) -> list[Atoms]:
            return [frames[i] for i in np.random.default_rng(seed).permutation(len(frames))[:n]]

        for n in sorted({min(n, len(system.train)) for n in options.sizes}):
            parts = [drawn(n, seed) for seed in range(options.seeds if n < len(system.train) else 1)]
            found = [judge(metric.novelty(metric.fitted(p, k)), p, system) for k, p in enumerate(parts)]
            rows.append(row(name, n, found))
            print(" | ".join(rows[-1]), flush=True)
        for n in options.fits:
            part = drawn(n, 0)
            fitted = gpmlp.fit(*from_ase(part)[:2], RECIPE)[0]
            online = OnlineFit.begin(*from_ase(part[: n // 3])[:2], RECIPE)
            for atoms in part[n // 3 :]:
                online = online.learned(*from_ase([atoms])[:2])
            for how, potential in (("fit", fitted), ("online", online.potential)):
                rows.append(row(f"{name}: {how}", n, [judge(of_potential(potential), part, system)]))
                print(" | ".join(rows[-1]), flush=True)
    print(table(rows, HEADER))


if __name__ == "__main__":
    main()
