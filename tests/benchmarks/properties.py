"""Error bars of properties: functionals of energies and stresses that no fit was told, against the truth of an oracle.

    OMP_NUM_THREADS=1 python tests/benchmarks/properties.py [--systems cu si ...] [--samples 32] [--online] [--json properties.json]

For each system one fit with the default recipe to structures that a user would label, and some twenty properties at the oracle's own
geometries: phases, equation of state, elastic constants, defects, surfaces, force constants, torsions. A property is a linear functional of
energies, forces and stresses, so its error and its variance need no relaxation. Decision 025 has what was found.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ase.build
import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.filters import FrechetCellFilter
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.neighborlist import neighbor_list
from ase.optimize import BFGS

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gpmlp
from gpmlp.core.units import VOIGT
from gpmlp.fitting.online import OnlineFit
from gpmlp.io.ase_atoms import from_ase, structures_from_ase
from gpmlp.potential.potential import Potential
from gpmlp.recipe import Recipe

Oracle = Callable[[], Calculator]


@dataclass(frozen=True)
class Property:
    """Σ of weights times energies (eV) and stresses (eV/Å³, Voigt) of structures that carry the oracle's values."""

    name: str
    atoms: tuple[Atoms, ...]
    energies: tuple[float, ...] = ()
    stresses: tuple[Sequence[float], ...] = ()
    forces: tuple[np.ndarray, ...] = ()

    def weights(self) -> dict[str, torch.Tensor]:
        """By kind, as `Potential.functional` takes them."""
        out = {}
        if self.energies:
            out["energies"] = torch.tensor(self.energies, dtype=torch.float64)
        if self.stresses:
            full = np.zeros((len(self.atoms), 3, 3))
            for k, (i, j) in enumerate(VOIGT):
                full[:, i, j] = [w[k] for w in self.stresses]
            out["stresses"] = torch.tensor(full)
        if self.forces:
            out["forces"] = torch.tensor(np.concatenate(self.forces))
        return out

    def truth(self) -> float:
        """The oracle's value."""
        total = sum(w * a.get_potential_energy() for w, a in zip(self.energies, self.atoms, strict=False))
        total += sum(np.dot(w, a.get_stress()) for w, a in zip(self.stresses, self.atoms, strict=False))
        return float(total + sum((w * a.get_forces()).sum() for w, a in zip(self.forces, self.atoms, strict=False)))


@dataclass(frozen=True)
class System:
    """What is fitted and asked for."""

    train: list[Atoms]
    properties: list[Property]
    recipe: dict = field(default_factory=dict)


class StillingerWeber(Calculator):
    """Silicon by Stillinger and Weber, Phys. Rev. B 31, 5262 (1985), eqs. 2.3, 2.4 and table I; ε = 2.1683 eV, σ = 2.0951 Å."""

    implemented_properties = ["energy", "forces", "stress"]

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        epsilon, sigma, a = 2.1683, 2.0951, 1.80
        i, j, shift = neighbor_list("ijS", self.atoms, a * sigma)
        positions = torch.tensor(self.atoms.positions, requires_grad=True)
        strain = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
        i, j = torch.from_numpy(i).long(), torch.from_numpy(j).long()
        vectors = positions[j] - positions[i] + torch.tensor(shift @ self.atoms.cell.array)
        vectors = vectors @ (torch.eye(3, dtype=torch.float64) + 0.5 * (strain + strain.T)) / sigma
        r = vectors.norm(dim=1)
        inside = (a - r).clamp_min(1e-9)
        pair = 7.049556277 * (0.6022245584 * r**-4 - 1) * torch.exp(-1 / inside)
        hinge, unit = torch.exp(-1.20 / inside), vectors / r[:, None]
        count = torch.bincount(i, minlength=len(self.atoms))
        width = max(1, int(count.max()))
        place = i * width + torch.arange(len(i)) - (count.cumsum(0) - count)[i]
        u = torch.zeros(len(self.atoms) * width, 3, dtype=torch.float64).index_put((place,), unit).view(-1, width, 3)
        g = torch.zeros(len(self.atoms) * width, dtype=torch.float64).index_put((place,), hinge).view(-1, width)
        cosine = u @ u.transpose(1, 2)
        triple = 21.0 * g[:, :, None] * g[:, None, :] * (cosine + 1 / 3) ** 2
        three = 0.5 * (triple.sum() - triple.diagonal(dim1=1, dim2=2).sum())
        energy = epsilon * (0.5 * pair.sum() + three)
        forces, virial = torch.autograd.grad(energy, [positions, strain])
        self.results = {"energy": energy.item(), "free_energy": energy.item(), "forces": -forces.numpy()}
        if self.atoms.cell.rank == 3:
            stress = virial.numpy() / self.atoms.get_volume()
            self.results["stress"] = stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]


def labelled(atoms: Atoms, oracle: Oracle) -> Atoms:
    """A copy with the oracle's values."""
    copy = atoms.copy()
    copy.set_constraint()
    copy.calc = oracle()
    values = {"energy": copy.get_potential_energy(), "forces": copy.get_forces().copy()}
    if copy.cell.rank == 3 and copy.pbc.all():
        values["stress"] = copy.get_stress().copy()
    copy.calc = SinglePointCalculator(copy, **values)
    return copy


def relaxed(atoms: Atoms, oracle: Oracle, cell: bool = False) -> Atoms:
    """At a minimum of the oracle."""
    copy = atoms.copy()
    copy.calc = oracle()
    BFGS(FrechetCellFilter(copy) if cell else copy, logfile=None).run(fmax=2e-3, steps=300)
    return labelled(copy, oracle)


def trajectory(
    atoms: Atoms, oracle: Oracle, temperature_K: float, n: int, between: int = 20, seed: int = 0
) -> list[Atoms]:
    """Frames of a Langevin trajectory."""
    rng = np.random.default_rng(seed)
    run = atoms.copy()
    run.calc = oracle()
    MaxwellBoltzmannDistribution(run, temperature_K=2 * temperature_K, rng=rng)
    step = 0.5 if min(atoms.numbers) < 5 else 3.0
    dynamics = LangevinBAOAB(run, step * units.fs, temperature_K=temperature_K, T_tau=100 * units.fs, rng=rng)
    dynamics.run(2 * between)
    frames = []
    for _ in range(n):
        dynamics.run(between)
        frames.append(labelled(run, oracle))
    return frames


def strained(atoms: Atoms, strain: Sequence[float], oracle: Oracle | None = None) -> Atoms:
    """With a small strain in Voigt order (engineering shear), ions carried along."""
    xx, yy, zz, yz, xz, xy = strain
    matrix = np.eye(3) + np.array([[xx, xy / 2, xz / 2], [xy / 2, yy, yz / 2], [xz / 2, yz / 2, zz]])
    copy = atoms.copy()
    copy.set_cell(atoms.cell.array @ matrix, scale_atoms=True)
    return copy if oracle is None else labelled(copy, oracle)


def rattled(atoms: Atoms, by: float, strain: float, oracle: Oracle, seed: int) -> Atoms:
    """Displaced at random, with a random strain."""
    rng = np.random.default_rng(seed)
    copy = strained(atoms, strain * rng.normal(size=6))
    copy.positions += by * rng.normal(size=copy.positions.shape)
    return labelled(copy, oracle)


def elastic(crystal: Atoms, oracle: Oracle, step: float = 5e-3) -> list[Property]:
    """Of a crystal at its minimum: lattice pressure, bulk modulus, its slope's precursor, and C11, C12, C44 with ions carried along."""
    out = []
    volume = np.array([1, 1, 1, 0, 0, 0]) / 3

    def slope(name: str, strain: Sequence[float], component: Sequence[float]) -> None:
        pair = tuple(strained(crystal, s * step * np.asarray(strain), oracle) for s in (1, -1))
        out.append(Property(name, pair, stresses=tuple(s / (2 * step) * np.asarray(component) for s in (1, -1))))

    out.append(Property("pressure", (crystal,), stresses=(volume,)))
    slope("B", [1 / 3, 1 / 3, 1 / 3, 0, 0, 0], volume * 3 / 3)
    slope("C11", [1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0])
    slope("C12", [1, 0, 0, 0, 0, 0], [0, 0.5, 0.5, 0, 0, 0])
    slope("C44", [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0])
    for s in (0.94, 0.97, 1.03, 1.06):
        scaled = strained(crystal, [s ** (1 / 3) - 1] * 3 + [0, 0, 0], oracle)
        out.append(Property(f"E(V {s})", (scaled, crystal), (1 / len(crystal), -1 / len(crystal))))
    return out


def per_atom(name: str, atoms: Atoms, reference: Atoms, scale: float = 1.0) -> Property:
    """Energy of atoms less as many of a reference crystal, times a scale."""
    return Property(name, (atoms, reference), (scale, -scale * len(atoms) / len(reference)))


def force_constant(name: str, atoms: Atoms, oracle: Oracle, atom: int, other: int, step: float = 0.02) -> Property:
    """−∂F_x(other)/∂x(atom)."""
    pair = []
    for s in (1, -1):
        copy = atoms.copy()
        copy.positions[atom, 0] += s * step
        pair.append(labelled(copy, oracle))
    weights = []
    for s in (1, -1):
        weights.append(np.zeros((len(atoms), 3)))
        weights[-1][other, 0] = -s / (2 * step)
    return Property(name, tuple(pair), forces=tuple(weights))


def copper() -> System:
    """Copper by EMT: bulk, vacancies and slabs at several temperatures."""
    crystal = relaxed(ase.build.bulk("Cu", cubic=True), EMT, cell=True)
    a = crystal.cell.lengths()[0]
    big = ase.build.bulk("Cu", a=a, cubic=True).repeat(2)
    hole = big.copy()
    del hole[0]
    slab = ase.build.fcc111("Cu", (2, 2, 5), a=a, vacuum=6.0, periodic=True)
    train = [f for k, t in enumerate((300, 700, 1100)) for f in trajectory(big, EMT, t, 8, seed=k)]
    train += [rattled(big, 0.05, 0.02, EMT, k) for k in range(8)]
    train += trajectory(hole, EMT, 600, 6, seed=5) + trajectory(slab, EMT, 500, 6, seed=6)
    found = elastic(crystal, EMT)
    for name in ("bcc", "sc", "diamond", "hcp"):
        found.append(per_atom(name, _phase("Cu", name, EMT), crystal, 1.0))
    found.append(per_atom("vacancy", relaxed(hole, EMT), labelled(big, EMT)))
    for face, build in (("100", ase.build.fcc100), ("110", ase.build.fcc110), ("111", ase.build.fcc111)):
        some = build("Cu", (1, 1, 7), a=a, vacuum=6.0, periodic=True)
        found.append(per_atom(f"surface {face}", relaxed(some, EMT), crystal, 0.5))
    adatom = ase.build.fcc100("Cu", (2, 2, 4), a=a, vacuum=7.0, periodic=True)
    plain = relaxed(adatom, EMT)
    ase.build.add_adsorbate(adatom, "Cu", 1.7, "hollow")
    adatom = relaxed(adatom, EMT)
    found.append(Property("adatom", (adatom, plain, crystal), (1, -1, -1 / len(crystal))))
    found += [force_constant("k self", big, EMT, 0, 0), force_constant("k neighbour", big, EMT, 0, 1)]
    return System(train, found)


def aluminium() -> System:
    """Aluminium by EMT: small cells, some of them with a vacancy, and a liquid; no surface."""
    crystal = relaxed(ase.build.bulk("Al", cubic=True), EMT, cell=True)
    a = crystal.cell.lengths()[0]
    small = ase.build.bulk("Al", a=a, cubic=True).repeat((2, 2, 1))
    hole = ase.build.bulk("Al", a=a, cubic=True).repeat(2)
    full = labelled(hole, EMT)
    del hole[0]
    train = trajectory(small, EMT, 400, 15, seed=1) + trajectory(small, EMT, 2500, 10, seed=2)
    train += [rattled(small, 0.04, 0.03, EMT, k) for k in range(10)] + trajectory(hole, EMT, 500, 5, seed=3)
    found = elastic(crystal, EMT)
    for name in ("bcc", "sc", "hcp"):
        found.append(per_atom(name, _phase("Al", name, EMT), crystal))
    found.append(per_atom("vacancy", relaxed(hole, EMT), full))
    octahedral = ase.build.bulk("Al", a=a, cubic=True).repeat(2)
    octahedral.append(ase.Atom("Al", (a / 2, a / 2, a / 2)))
    found.append(per_atom("interstitial O", relaxed(octahedral, EMT), full))
    for face, build in (("100", ase.build.fcc100), ("111", ase.build.fcc111)):
        some = build("Al", (1, 1, 7), a=a, vacuum=6.0, periodic=True)
        found.append(per_atom(f"surface {face}", relaxed(some, EMT), crystal, 0.5))
    found += [force_constant(f"k {j}", small, EMT, 0, j) for j in (0, 1)]
    return System(train, found)


def nickel() -> System:
    """Nickel by EMT, as a first fit would have it: 25 structures, surfaces among them."""
    crystal = relaxed(ase.build.bulk("Ni", cubic=True), EMT, cell=True)
    a = crystal.cell.lengths()[0]
    big = ase.build.bulk("Ni", a=a, cubic=True).repeat(2)
    hole = big.copy()
    del hole[0]
    slab = ase.build.fcc100("Ni", (2, 2, 4), a=a, vacuum=6.0, periodic=True)
    train = trajectory(big, EMT, 800, 8, seed=1) + [rattled(big, 0.03, 0.015, EMT, k) for k in range(9)]
    train += trajectory(slab, EMT, 300, 8, seed=3)
    found = elastic(crystal, EMT)
    for name in ("bcc", "hcp"):
        found.append(per_atom(name, _phase("Ni", name, EMT), crystal))
    found.append(per_atom("vacancy", relaxed(hole, EMT), labelled(big, EMT)))
    for face, build in (("100", ase.build.fcc100), ("110", ase.build.fcc110), ("111", ase.build.fcc111)):
        some = build("Ni", (1, 1, 7), a=a, vacuum=6.0, periodic=True)
        found.append(per_atom(f"surface {face}", relaxed(some, EMT), crystal, 0.5))
    adatom = ase.build.fcc111("Ni", (2, 2, 4), a=a, vacuum=7.0, periodic=True)
    plain = relaxed(adatom, EMT)
    ase.build.add_adsorbate(adatom, "Ni", 1.8, "fcc")
    found.append(Property("adatom", (relaxed(adatom, EMT), plain, crystal), (1, -1, -1 / len(crystal))))
    found += [force_constant("k self", big, EMT, 0, 0), force_constant("k neighbour", big, EMT, 0, 1)]
    return System(train, found)


def formic_acid() -> System:
    """Formic acid by GFN2-xTB: torsion of OH, stretches of both CO, CH and OH."""
    atoms = ase.build.molecule("HCOOH")
    s, d = atoms.get_chemical_symbols(), atoms.get_all_distances()
    c = s.index("C")
    oxygens, hydrogens = ([i for i, x in enumerate(s) if x == symbol] for symbol in "OH")
    ho = min(hydrogens, key=lambda i: min(d[o, i] for o in oxygens))
    hc = next(i for i in hydrogens if i != ho)
    bound = min(oxygens, key=lambda o: d[o, ho])
    other = next(o for o in oxygens if o != bound)
    stretches = {
        "CO": (c, bound, [bound, ho]),
        "C=O": (c, other, [other]),
        "OH": (bound, ho, [ho]),
        "CH": (c, hc, [hc]),
    }
    return molecule("HCOOH", 50, {"OH": ((other, c, bound, ho), [ho], (20, 40, 60, 90))}, stretches)


def _phase(symbol: str, name: str, oracle: Oracle) -> Atoms:
    """Another structure of an element at the oracle's minimum along its volume."""
    guess = {"bcc": 0.80, "sc": 0.66, "diamond": 1.55, "hcp": 0.708, "fcc": 1.0}[name]
    base = {"Cu": 3.6, "Si": 3.85, "Al": 4.0, "Ni": 3.5}[symbol]
    make = {"hcp": "hcp"}.get(name, name)
    options = {"cubic": True} if name in ("bcc", "diamond", "fcc") else {}
    best = None
    for scale in np.linspace(0.9, 1.12, 23):
        atoms = labelled(ase.build.bulk(symbol, make, a=base * guess * scale, **options), oracle)
        if best is None or atoms.get_potential_energy() / len(atoms) < best.get_potential_energy() / len(best):
            best = atoms
    return best


def silicon() -> System:
    """Silicon by Stillinger and Weber: bulk at several temperatures, strained cells, some of them molten, vacancies."""
    oracle = StillingerWeber
    crystal = relaxed(ase.build.bulk("Si", cubic=True), oracle, cell=True)
    a = crystal.cell.lengths()[0]
    big = ase.build.bulk("Si", a=a, cubic=True).repeat((2, 2, 1))
    hole = ase.build.bulk("Si", a=a, cubic=True).repeat(2)
    full = labelled(hole, oracle)
    del hole[0]
    train = [f for k, t in enumerate((300, 900, 3000)) for f in trajectory(big, oracle, t, 8, seed=k)]
    train += [rattled(big, 0.05, 0.02, oracle, k) for k in range(8)]
    train += trajectory(hole, oracle, 600, 4, seed=5)
    found = elastic(crystal, oracle)
    for name in ("bcc", "sc", "fcc"):
        found.append(per_atom(name, _phase("Si", name, oracle), crystal, 1.0))
    found.append(per_atom("vacancy", relaxed(hole, oracle), full))
    inter = ase.build.bulk("Si", a=a, cubic=True).repeat(2)
    inter.append(ase.Atom("Si", (a / 2, a / 2, a / 2)))
    found.append(per_atom("interstitial T", relaxed(inter, oracle), full))
    for face, build in (("100", ase.build.diamond100), ("111", ase.build.diamond111)):
        some = build("Si", (1, 1, 8), a=a, vacuum=6.0, periodic=True)
        found.append(per_atom(f"surface {face}", labelled(some, oracle), crystal, 0.5))
    found += [force_constant(f"k {j}", big, oracle, 0, j) for j in (0, 1, 2)]
    for s in (0.01, 0.03):
        moved = crystal.copy()
        moved.positions[[i for i in range(8) if _sublattice(crystal, i)]] += s * a / np.sqrt(3)
        found.append(Property(f"optical {s}", (labelled(moved, oracle), crystal), (1 / 8, -1 / 8)))
    return System(train, found)


def _sublattice(crystal: Atoms, i: int) -> bool:
    return bool(abs((crystal.get_scaled_positions()[i].sum() * 4) % 2 - 1) < 0.1)


def silicon_pbe() -> System:
    """data/silicon, without the frames from which the properties are: validation and test scans, and what is beside them."""
    root = Path(__file__).resolve().parents[2] / "data" / "silicon"
    train = list(ase.io.read(root / "train.xyz", ":"))[::2]
    known = [a for name in ("validation", "test") for a in ase.io.read(root / f"{name}.xyz", ":")]
    by_type: dict[str, list[Atoms]] = {}
    for atoms in known:
        by_type.setdefault(atoms.info["config_type"], []).append(atoms)
    diamond = min(by_type["diamond_isotropic"], key=lambda x: x.get_potential_energy() / len(x))
    found = []
    for kind in ("phase_bcc", "phase_beta_tin", "phase_fcc", "phase_sc"):
        best = min(by_type[kind], key=lambda x: x.get_potential_energy() / len(x))
        found.append(per_atom(kind, best, diamond, 1 / len(best)))
    for kind in ("diamond_isotropic", "diamond_shear", "diamond_uniaxial"):
        others = [x for x in by_type[kind] if x is not diamond]
        for k, other in enumerate(others[:4]):
            found.append(per_atom(f"{kind} {k}", other, diamond, 1 / len(other)))
            w = np.zeros(6)
            w[np.argmax(abs(other.get_stress() - diamond.get_stress()))] = 1.0
            found.append(Property(f"{kind} {k} stress", (other, diamond), stresses=(w, -w)))
    return System(train, found)


class Salt(Calculator):
    """Sodium chloride: Born and Mayer's repulsion, and charges of ±1 e whose Coulomb energy is damped and cut off at 7 Å.

    Fennell & Gezelter, J. Chem. Phys. 124, 234104 (2006), eq. 19 (shifted force), with α = 0.3/Å.
    """

    implemented_properties = ["energy", "forces", "stress"]

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        cutoff, alpha, unit = 7.0, 0.3, units.Hartree * units.Bohr
        i, j, shift = neighbor_list("ijS", self.atoms, cutoff)
        positions = torch.tensor(self.atoms.positions, requires_grad=True)
        strain = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
        charges = torch.tensor(np.where(self.atoms.numbers == 11, 1.0, -1.0))
        i, j = torch.from_numpy(i).long(), torch.from_numpy(j).long()
        vectors = positions[j] - positions[i] + torch.tensor(shift @ self.atoms.cell.array)
        r = (vectors @ (torch.eye(3, dtype=torch.float64) + 0.5 * (strain + strain.T))).norm(dim=1)
        end = torch.tensor(cutoff, dtype=torch.float64)
        screened = torch.erfc(alpha * end) / end
        slope = screened / end + 2 * alpha / np.pi**0.5 * torch.exp(-((alpha * end) ** 2)) / end
        coulomb = torch.erfc(alpha * r) / r - screened + slope * (r - end)
        energy = 0.5 * (1090.0 * torch.exp(-r / 0.321) + unit * charges[i] * charges[j] * coulomb).sum()
        forces, virial = torch.autograd.grad(energy, [positions, strain])
        self.results = {"energy": energy.item(), "free_energy": energy.item(), "forces": -forces.numpy()}
        if self.atoms.cell.rank == 3:
            stress = virial.numpy() / self.atoms.get_volume()
            self.results["stress"] = stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]


def salt() -> System:
    """Sodium chloride: bulk at two temperatures, strained cells, a pair of vacancies."""
    oracle = Salt
    crystal = relaxed(ase.build.bulk("NaCl", "rocksalt", a=5.6, cubic=True), oracle, cell=True)
    a = crystal.cell.lengths()[0]
    big = ase.build.bulk("NaCl", "rocksalt", a=a, cubic=True).repeat((2, 2, 1))
    hole = ase.build.bulk("NaCl", "rocksalt", a=a, cubic=True).repeat((2, 2, 1))
    numbers = hole.get_chemical_symbols()
    del hole[[numbers.index("Na"), len(numbers) - 1 - numbers[::-1].index("Cl")]]
    train = [f for k, t in enumerate((300, 800)) for f in trajectory(big, oracle, t, 10, seed=k)]
    train += [rattled(big, 0.06, 0.02, oracle, k) for k in range(8)] + trajectory(hole, oracle, 400, 6, seed=5)
    found = elastic(crystal, oracle)
    for name, spacing in (("zincblende", 6.1), ("cesiumchloride", 3.45)):
        found.append(per_atom(name, relaxed(ase.build.bulk("NaCl", name, a=spacing), oracle, cell=True), crystal))
    found.append(per_atom("pair of vacancies", relaxed(hole, oracle), labelled(big, oracle)))
    rock = ase.build.bulk("NaCl", "rocksalt", a=a, cubic=True)
    slab = rock.repeat((1, 1, 2))
    slab.center(vacuum=6.0, axis=2)
    found.append(per_atom("surface 100", relaxed(slab, oracle), crystal, 0.5))
    found += [force_constant(f"k {j}", big, oracle, 0, j) for j in (0, 1, 2)]
    return System(train, found)


def acetaldehyde() -> System:
    """Acetaldehyde by GFN2-xTB: torsion of CH3, stretches of CC, CO and CH."""
    atoms = ase.build.molecule("CH3CHO")
    s, d = atoms.get_chemical_symbols(), atoms.get_all_distances()
    o = s.index("O")
    c1 = min((i for i, x in enumerate(s) if x == "C"), key=lambda i: d[o, i])
    c2 = next(i for i, x in enumerate(s) if x == "C" and i != c1)
    methyl = [i for i, x in enumerate(s) if x == "H" and d[c2, i] < 1.25]
    lone = next(i for i, x in enumerate(s) if x == "H" and i not in methyl)
    twists = {"CH3": ((o, c1, c2, methyl[0]), methyl, (20, 40, 60))}
    stretches = {"CC": (c2, c1, [c1, o, lone]), "CO": (c1, o, [o]), "CH": (c2, methyl[0], methyl[:1]),
                 "CHO": (c1, lone, [lone])}  # fmt: skip
    return molecule("CH3CHO", 60, twists, stretches)


def _gfn2() -> Calculator:
    from tblite.ase import TBLite

    return TBLite(method="GFN2-xTB", verbosity=0)


def molecule(name: str, n: int, twists: dict[str, tuple], stretches: dict[str, tuple]) -> System:
    """A molecule by GFN2-xTB at 500 K: torsions, stretches and bends from its minimum."""
    least = relaxed(ase.build.molecule(name) if isinstance(name, str) else name, _gfn2)
    train = trajectory(least, _gfn2, 500, n, between=25)
    found = []
    for label, (bond, moving, angles) in twists.items():
        for angle in angles:
            turned = least.copy()
            turned.set_dihedral(*bond, turned.get_dihedral(*bond) + angle, indices=moving)
            found.append(per_atom(f"{label} {angle}", labelled(turned, _gfn2), least))
    for label, (i, j, moving) in stretches.items():
        along = least.positions[j] - least.positions[i]
        for d in (-0.06, 0.06, 0.15):
            longer = least.copy()
            longer.positions[moving] += d * along / np.linalg.norm(along)
            found.append(per_atom(f"{label} {d:+}", labelled(longer, _gfn2), least))
    return System(train, found)


def ethanol() -> System:
    """Ethanol by GFN2-xTB: torsions of OH and CH3, stretches of CC, CO, OH."""
    atoms = ase.build.molecule("CH3CH2OH")  # C1 O0? the order is found below
    s = atoms.get_chemical_symbols()
    d = atoms.get_all_distances()
    o = s.index("O")
    c1 = min((i for i, x in enumerate(s) if x == "C"), key=lambda i: d[o, i])
    c2 = next(i for i, x in enumerate(s) if x == "C" and i != c1)
    ho = min((i for i, x in enumerate(s) if x == "H"), key=lambda i: d[o, i])
    methyl = [i for i, x in enumerate(s) if x == "H" and d[c2, i] < 1.2]
    angles = (30, 60, 90, 120, 180)
    twists = {"OH": ((c2, c1, o, ho), [ho], angles), "CH3": ((o, c1, c2, methyl[0]), methyl, (30, 60))}
    rest = [i for i in range(len(s)) if i not in (c2, *methyl)]
    stretches = {"CC": (c2, c1, rest), "CO": (c1, o, [o, ho]), "OH": (o, ho, [ho]), "CH": (c2, methyl[0], methyl[:1])}
    return molecule("CH3CH2OH", 60, twists, stretches)


SYSTEMS = {
    "cu": copper, "si": silicon, "si_pbe": silicon_pbe, "ethanol": ethanol, "salt": salt, "acetaldehyde": acetaldehyde,
    "al": aluminium, "ni": nickel, "formic_acid": formic_acid,
}  # fmt: skip


def statistics(z: Sequence[float]) -> dict[str, float]:
    """Shares within 1 and 2 σ, and rms z."""
    values = np.abs(np.asarray(z))
    shares = {f"within_{k}_sigma": float((values < k).mean()) for k in (1, 2)}
    return {"n": len(values)} | shares | {"rms_z": float(np.sqrt((values**2).mean()))}


def learned_online(system: System) -> Potential:
    """A fit to four of five structures, in random order, that learns the others one after the other."""
    structures, targets = from_ase(system.train)
    order = torch.randperm(len(structures), generator=torch.Generator().manual_seed(0)).tolist()
    first, later = order[: int(0.8 * len(order))], order[int(0.8 * len(order)) :]
    online = OnlineFit.begin(structures.select(first), targets.select(structures, first), Recipe(**system.recipe))
    for i in later:
        online = online.learned(structures.select([i]), targets.select(structures, [i]))
    return online.potential


def measure(name: str, samples: int, keep: Path | None, online: bool) -> dict:
    """Fit a system, and judge its properties."""
    system = SYSTEMS[name]()
    potential = learned_online(system) if online else gpmlp.fit(*from_ase(system.train), Recipe(**system.recipe))[0]
    if keep is not None:
        gpmlp.save(potential, keep / f"{name}.gpmlp")
    rows = []
    drawn = potential.sample(samples, seed=0)
    for one in system.properties:
        structures, weights, truth = structures_from_ase(list(one.atoms)), one.weights(), one.truth()
        found = potential.functional(structures, weights)
        values = sum((w * getattr(drawn(structures), kind)).flatten(1).sum(1) for kind, w in weights.items())
        spread = float((values - found.value).square().mean().sqrt())
        novelty = float(potential(structures, novelty=True).novelty.max())
        error = float(found.value) - truth
        rows.append({"name": one.name, "truth": truth, "error": error, "std": float(found.std), "sampled_std": spread,
                     "novelty": novelty})  # fmt: skip
        print(f"{one.name:28s} {truth:11.5f}  error {error:10.6f}  σ {rows[-1]['std']:9.6f} (of samples {spread:9.6f})  "
              f"z {error / rows[-1]['std']:6.2f}  novelty {novelty:5.2f}", flush=True)  # fmt: skip
    found = {"system": name, "structures": len(system.train), "properties": rows}
    for kind in ("std", "sampled_std"):
        found[f"by_{kind}"] = statistics([r["error"] / r[kind] for r in rows])
    scores = {kind: score for kind, score in found.items() if kind.startswith("by_")}
    print(
        name, len(system.train), "structures; scale", potential.calibration.sample_scale, json.dumps(scores), flush=True
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--online", action="store_true", help="models that learn label by label")
    parser.add_argument("--keep", type=Path, help="folder for the models")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = [measure(name, arguments.samples, arguments.keep, arguments.online) for name in arguments.systems]
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
