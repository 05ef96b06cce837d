"""Oracle calls of relaxations and of reaction paths, beside ASE's BFGS and FIRE on the oracle itself.

    python tests/benchmarks/paths.py                 all systems, with EMT and, where tblite is installed, GFN2-xTB
    python tests/benchmarks/paths.py au vacancy      some of them
    python tests/benchmarks/paths.py --relax         relaxations in place of paths
    python tests/benchmarks/paths.py --no-ase        without those of ASE

A line for each: calls without those of end points, which are at rest; barrier with its standard deviation, the oracle's own energy at
the structure of the top, and how the last label was foreseen, in standard deviations.
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
from ase.build import add_adsorbate, bulk, fcc100, minimize_rotation_and_translation
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.mep import NEB
from ase.optimize import BFGS, FIRE

import gpmlp
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
    start = fcc100("Al", (2, 2, 3))
    add_adsorbate(start, "Au", 1.7, "hollow")
    start.center(axis=2, vacuum=4.0)
    start.set_constraint(FixAtoms(mask=[atom.tag > 1 for atom in start]))
    end = start.copy()
    end[-1].x += end.cell[0, 0] / 2
    return rested(start, EMT(), 0.01), rested(end, EMT(), 0.01)


def copper_vacancy() -> Ends:
    crystal = bulk("Cu", "fcc", 3.59, cubic=True).repeat((3, 2, 2))
    distances = crystal.get_distances(0, range(len(crystal)), mic=True)
    j = int(np.argmin(np.where(np.arange(len(crystal)) > 0, distances, np.inf)))
    start, end = crystal.copy(), crystal.copy()
    end.positions[j] += crystal.get_distance(j, 0, mic=True, vector=True)
    del start[0], end[0]
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


def by_ase(ends: Ends, make: Callable[[], object], optimizer: type) -> str:
    images = [ends[0].copy() for _ in range(IMAGES + 1)] + [ends[1].copy()]
    for image in images:
        image.calc = OracleCalculator(make())
    band = NEB(images, climb=True, method="improvedtangent")
    band.interpolate("idpp", mic=bool(ends[0].pbc.any()))
    done = optimizer(band, logfile=None).run(fmax=FMAX, steps=300)
    energies = [image.get_potential_energy() for image in images]
    calls = sum(image.calc.calls for image in images[1:-1])
    return (
        f"{optimizer.__name__} {calls} calls, {max(energies) - energies[0]:.3f} eV{'' if done else ', not converged'}"
    )


def found(ends: Ends, make: Callable[[], object]) -> str:
    began, oracle = time.monotonic(), OracleCalculator(make())
    neb = gpmlp.GPNEB(*ends, oracle, IMAGES)
    done, last = neb.run(FMAX), neb.labels[-1]
    energies = []
    for image in (neb.path.images[0], neb.path.images[neb.path.top]):
        moved = image.copy()
        moved.calc = make()
        energies.append(moved.get_potential_energy())
    truth = energies[1] - energies[0]
    return (
        f"gpmlp {len(neb.labels)} calls, {neb.path.barrier:.4f} ± {neb.path.sigma:.2g} eV (oracle there {truth:.4f}), last label foreseen "
        f"to {1000 * last.error:+.1f} meV, z {last.error / max(last.sigma, 1e-3):+.1f}; {time.monotonic() - began:.0f} s"
        f"{'' if done else ', not converged'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", metavar="SYSTEM", help=f"of {', '.join(PATHS)}; all if none is named")
    parser.add_argument("--relax", action="store_true")
    parser.add_argument("--no-ase", action="store_true")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    if unknown := set(chosen.systems) - set(PATHS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    for name in chosen.systems or [n for n in PATHS if not (chosen.relax and n == "tautomer")]:
        if chosen.relax:
            print(f"{name}: {relaxed(name, not chosen.no_ase)}", flush=True)
            continue
        ends, make = PATHS[name][0](), PATHS[name][1]
        said = [found(ends, make), *([] if chosen.no_ase else [by_ase(ends, make, kind) for kind in (BFGS, FIRE)])]
        print(f"{name}: {'; '.join(said)}", flush=True)


if __name__ == "__main__":
    main()
