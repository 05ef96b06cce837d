"""Oracle calls of relaxations and of reaction paths, beside ASE's BFGS and FIRE on the oracle itself.

    python tests/benchmarks/paths.py                 all systems, with EMT and, where tblite is installed, GFN2-xTB
    python tests/benchmarks/paths.py au vacancy      some of them
    python tests/benchmarks/paths.py --kept          reactions with which nothing was tried out
    python tests/benchmarks/paths.py --saddle        saddles from the start alone, along the straight line to the end, in place of paths
    python tests/benchmarks/paths.py --relax         relaxations in place of paths
    python tests/benchmarks/paths.py --no-ase        without those of ASE

A line for each: calls without those of end points, which are at rest; barrier with its standard deviation, the oracle's own energy at
the structure of the top, and how the last label was foreseen, in standard deviations. Beside BFGS, what part of its calls it took, and how
far off its barrier is. Sella would be a rival of --saddle; it is not installed.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc100, minimize_rotation_and_translation, molecule
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.mep import NEB
from ase.optimize import BFGS, FIRE

import gpmlp
from gpmlp.learning.paths.ends import lay_on
from gpmlp.learning.paths.oracle import OracleCalculator

ETHANOL = Path(__file__).resolve().parents[2] / "data" / "learning" / "ethanol.xyz"
IMAGES, FMAX = 7, 0.05
Ends = tuple[Atoms, Atoms]


def xtb() -> object:
    from tblite.ase import TBLite

    return TBLite(method="GFN2-xTB", verbosity=0)


def rested(atoms: Atoms, calculator: object, fmax: float = 0.005) -> Atoms:
    atoms.calc = calculator
    BFGS(atoms, logfile=None, maxstep=0.1).run(fmax=fmax, steps=500)
    return atoms


def gold_on_aluminium() -> Ends:
    return hop("Au", "Al")


def hop(adatom: str, metal: str) -> Ends:
    """Of an adatom from hollow to hollow of a (100) surface."""
    start = fcc100(metal, (2, 2, 3))
    add_adsorbate(start, adatom, 1.7, "hollow")
    start.center(axis=2, vacuum=4.0)
    start.set_constraint(FixAtoms(mask=[atom.tag > 1 for atom in start]))
    end = start.copy()
    end[-1].x += end.cell[0, 0] / 2
    return rested(start, EMT(), 0.01), rested(end, EMT(), 0.01)


def copper_vacancy() -> Ends:
    return vacancy("Cu", 3.59)


def vacancy(metal: str, lattice_constant: float, also: int | None = None) -> Ends:
    """Of an atom next to a vacancy into it; `also`: another vacancy, by the index of its atom."""
    crystal = bulk(metal, "fcc", lattice_constant, cubic=True).repeat((3, 2, 2))
    distances = crystal.get_distances(0, range(len(crystal)), mic=True)
    j = int(np.argmin(np.where(np.arange(len(crystal)) > 0, distances, np.inf)))
    start, end = crystal.copy(), crystal.copy()
    end.positions[j] += crystal.get_distance(j, 0, mic=True, vector=True)
    gone = [0] if also is None else sorted([0, also], reverse=True)
    for atoms in (start, end):
        for i in gone:
            del atoms[i]
    return rested(start, EMT(), 0.01), rested(end, EMT(), 0.01)


def malonaldehyde() -> Ends:
    places = [[-1.25, -1.05], [-1.2, 0.2], [0, 0.9], [1.2, 0.2], [1.25, -1.05], [0.35, -1.45], [-2.1, 0.8], [0, 1.98]]
    start = Atoms("OCCCOHHHH", [[x, y, 0] for x, y in [*places, [2.1, 0.8]]])
    rested(start, xtb())
    end = start.copy()
    end.positions = start.positions[[4, 3, 2, 1, 0, 5, 8, 7, 6]] * [-1, 1, 1]
    return laid(start, end)


def ethanol_rotation() -> Ends:
    """Hydroxyl from trans to gauche."""
    ethanol = ase.io.read(ETHANOL)
    oxygen, hydrogen = 2, 3
    methyl, carbon = sorted((0, 1), key=lambda c: -ethanol.get_distance(c, oxygen))
    ends = []
    for angle in (180, 60):
        atoms = ethanol.copy()
        atoms.set_dihedral(methyl, carbon, oxygen, hydrogen, angle, indices=[hydrogen])
        ends.append(rested(atoms, xtb()))
    return laid(*ends)


def tautomer() -> Ends:
    """Vinyl alcohol to acetaldehyde."""
    vinyl = [[0, 0, 0], [1.33, 0, 0], [-0.68, 1.17, 0], [0.02, 1.83, 0], [-0.6, -0.91, 0], [1.88, 0.93, 0.02]]
    aldehyde = [[0, 0, 0], [1.5, 0, 0], [-0.62, 1.04, 0], [1.87, 1.03, 0], [-0.6, -0.93, 0], [1.87, -0.5, 0.88]]
    start = rested(Atoms("CCOHHHH", [*vinyl, [1.9, -0.92, -0.02]]), xtb())
    return laid(start, rested(Atoms("CCOHHHH", [*aldehyde, [1.87, -0.5, -0.88]]), xtb()))


def formic_acid() -> Ends:
    """Hydroxyl from cis to trans."""
    ends = []
    for angle in (0, 180):
        atoms = molecule("HCOOH")
        atoms.set_dihedral(2, 1, 0, 3, angle, indices=[3])
        ends.append(rested(atoms, xtb()))
    return laid(*ends)


def methyl(name: str, carbon: int, other: int) -> Ends:
    """A third of a turn of a methyl group."""
    start = rested(molecule(name), xtb())
    near = [i for i in range(len(start)) if start.numbers[i] == 1 and start.get_distance(i, carbon) < 1.2]
    end = start.copy()
    end.rotate(120, start.positions[carbon] - start.positions[other], center=start.positions[carbon])
    end.positions = np.where(np.isin(np.arange(len(start)), near)[:, None], end.positions, start.positions)
    return laid(start, rested(end, xtb()))


def ammonia() -> Ends:
    """Inversion."""
    start = rested(molecule("NH3"), xtb())
    end = start.copy()
    end.positions[:, 2] *= -1
    return start, rested(end, xtb())


def formaldehyde() -> Ends:
    """To trans-hydroxymethylene."""
    start = rested(molecule("H2CO"), xtb())
    oxygen, carbon = start.positions[0], start.positions[1]
    end, along = start.copy(), (oxygen - carbon) / np.linalg.norm(oxygen - carbon)
    across = start.positions[2] - carbon
    across -= along * (across @ along)
    end.positions[2] = oxygen + 0.3 * along + across
    return laid(start, rested(end, xtb()))


def laid(start: Atoms, end: Atoms) -> Ends:
    minimize_rotation_and_translation(start, end)
    return start, end


PATHS: dict[str, tuple[Callable[[], Ends], Callable[[], object]]] = {
    "au": (gold_on_aluminium, EMT),
    "vacancy": (copper_vacancy, EMT),
    "malonaldehyde": (malonaldehyde, xtb),
    "ethanol": (ethanol_rotation, xtb),
    "tautomer": (tautomer, xtb),
}
KEPT: dict[str, tuple[Callable[[], Ends], Callable[[], object]]] = {
    "silver": (lambda: hop("Ag", "Cu"), EMT),
    "platinum": (lambda: hop("Pt", "Al"), EMT),
    "nickel": (lambda: vacancy("Ni", 3.49), EMT),
    "divacancy": (lambda: vacancy("Cu", 3.59, also=11), EMT),
    "formic": (formic_acid, xtb),
    "ethane": (lambda: methyl("C2H6", 0, 1), xtb),
    "acetaldehyde": (lambda: methyl("CH3CHO", 3, 1), xtb),
    "methanol": (lambda: methyl("CH3OH", 0, 1), xtb),
    "ammonia": (ammonia, xtb),
    "formaldehyde": (formaldehyde, xtb),
}
EVERY = PATHS | KEPT
ROUGH = ("au", "vacancy", "malonaldehyde", "ethanol")
SMALLEST = 5e-4  # eV, with which errors are compared at least


def rough(name: str) -> Atoms:
    """A structure to relax."""
    if name == "au":
        atoms = fcc100("Al", (2, 2, 3))
        add_adsorbate(atoms, "Au", 2.3, "bridge")
        atoms.center(axis=2, vacuum=4.0)
        atoms.set_constraint(FixAtoms(mask=[atom.tag > 1 for atom in atoms]))
        atoms.rattle(0.1, seed=2)
    elif name == "vacancy":
        atoms = bulk("Cu", "fcc", 3.59, cubic=True).repeat((2, 2, 2))
        del atoms[0]
        atoms.rattle(0.1, seed=3)
    elif name == "malonaldehyde":
        atoms = malonaldehyde()[0].copy()
        atoms.rattle(0.08, seed=5)
    else:
        atoms = ase.io.read(ETHANOL)
        atoms.rattle(0.08, seed=3)
    return atoms


def relaxed(name: str, with_ase: bool) -> str:
    said = []
    for optimizer in (BFGS, gpmlp.GPMinimizer) if with_ase else (gpmlp.GPMinimizer,):
        atoms, began = rough(name), time.monotonic()
        atoms.calc = OracleCalculator(PATHS[name][1]())
        with optimizer(atoms, logfile=None) as run:
            done = run.run(fmax=0.02, steps=200)
        how = f"{atoms.calc.calls} calls to {atoms.get_potential_energy():.4f} eV in {time.monotonic() - began:.0f} s"
        said.append(f"{optimizer.__name__} {how}{'' if done else ', not converged'}")
    return "; ".join(said)


def by_ase(ends: Ends, make: Callable[[], object], optimizer: type) -> tuple[int, float, bool]:
    """Calls on the path, barrier (eV), whether it converged."""
    images = [ends[0].copy() for _ in range(IMAGES + 1)] + [lay_on(*ends)]
    for image in images:
        image.calc = OracleCalculator(make())
    band = NEB(images, climb=True, method="improvedtangent")
    band.interpolate("idpp", mic=False)
    done = optimizer(band, logfile=None).run(fmax=FMAX, steps=300)
    energies = [image.get_potential_energy() for image in images]
    return sum(image.calc.calls for image in images[1:-1]), max(energies) - energies[0], bool(done)


def found(ends: Ends, make: Callable[[], object], saddle: bool) -> tuple[int, float, str]:
    """Calls of the path or of the search, barrier (eV), and what there is to say."""
    began, oracle = time.monotonic(), OracleCalculator(make())
    if saddle:
        search = gpmlp.GPSaddle(ends[0], oracle, lay_on(*ends).positions - ends[0].positions, sides=False)
        done, labels = search.run(FMAX), search.labels
        places, barrier, sigma = (search.saddle.start, search.saddle.atoms), search.saddle.barrier, search.saddle.sigma
    else:
        neb = gpmlp.GPNEB(*ends, oracle, IMAGES)
        done, labels = neb.run(FMAX), neb.labels
        places, barrier, sigma = (neb.path.images[0], neb.path.images[neb.path.top]), neb.path.barrier, neb.path.sigma
    energies = []
    for image in places:
        moved = image.copy()
        moved.calc = make()
        energies.append(moved.get_potential_energy())
    scores = [x.error / max(x.sigma if saddle else x.image_sigma, SMALLEST) for x in labels]
    said = (
        f"gpmlp {len(labels)} calls, {barrier:.4f} ± {sigma:.2g} eV (oracle there {energies[1] - energies[0]:.4f}), last label foreseen to "
        f"{1000 * labels[-1].error:+.1f} meV, z {scores[-1]:+.1f}; z of all {' '.join(f'{z:+.1f}' for z in scores)}; "
        f"{time.monotonic() - began:.0f} s{'' if done else ', not converged'}"
    )
    return len(labels), barrier, said


def compared(name: str, chosen: argparse.Namespace) -> str:
    """One line of paths or saddles."""
    ends, make = EVERY[name][0](), EVERY[name][1]
    calls, barrier, said = found(ends, make, chosen.saddle)
    parts = [said]
    for kind in () if chosen.no_ase else (BFGS, FIRE):
        n, other, done = by_ase(ends, make, kind)
        ratio = f", of which {calls / n:.2f}; {1000 * (barrier - other):+.0f} meV apart" if kind is BFGS else ""
        parts.append(f"{kind.__name__} {n} calls, {other:.4f} eV{'' if done else ', not converged'}{ratio}")
    return "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "systems", nargs="*", metavar="SYSTEM", help=f"of {', '.join(EVERY)}; the first five if none is named"
    )
    parser.add_argument("--kept", action="store_true")
    parser.add_argument("--saddle", action="store_true")
    parser.add_argument("--relax", action="store_true")
    parser.add_argument("--no-ase", action="store_true")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    if unknown := set(chosen.systems) - set(EVERY):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if chosen.relax and (wrong := set(chosen.systems) - set(ROUGH)):
        parser.error(f"nothing to relax: {', '.join(sorted(wrong))}")
    for name in chosen.systems or (ROUGH if chosen.relax else KEPT if chosen.kept else PATHS):
        line = relaxed(name, not chosen.no_ase) if chosen.relax else compared(name, chosen)
        print(f"{name}: {line}", flush=True)


if __name__ == "__main__":
    main()
