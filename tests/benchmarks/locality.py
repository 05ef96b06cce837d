"""Locality of forces of kinds of matter: spreads beyond radii and their law, or noises of small fits against the cutoff.

    python tests/benchmarks/locality.py [--cases copper salt argon ethanol fits] [--work FOLDER]

copper: EMT, 256 atoms; salt: charges of .7 e and Born-Mayer cores, a ball; argon: Lennard-Jones, a ball; ethanol: GFN2-xTB; fits: small
fits to 40 cells of 32 atoms of copper labelled by EMT.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import ase.build
import common
import numpy as np
from ase import Atoms
from ase.calculators.emt import EMT

sys.path.insert(0, str(common.ROOT))
sys.path.insert(0, str(common.ROOT / "tests"))

import gpmlp
from gpmlp.io.ase_atoms import from_ase, structures_from_ase
from gpmlp.learning.locality import Locality, Redraws
from gpmlp.learning.oracles.oracle import OracleRecipe


def rattled(atoms: Atoms, size: float = 0.1, seed: int = 1) -> Atoms:
    """With every component displaced by normal deviates."""
    atoms.rattle(size, rng=np.random.default_rng(seed))
    return atoms


def ball(crystal: Atoms, radius: float) -> Atoms:
    """All atoms within a sphere around one of them, without a cell."""
    crystal = crystal.repeat(int(np.ceil(2 * radius / crystal.cell.lengths().min())) + 1)
    middle = crystal.positions[np.linalg.norm(crystal.positions - crystal.positions.mean(0), axis=1).argmin()]
    cut = crystal[np.linalg.norm(crystal.positions - middle, axis=1) < radius]
    cut.pbc, cut.cell = False, np.zeros((3, 3))
    return rattled(cut)


def oracle(name: str, **kwargs) -> OracleRecipe:
    return OracleRecipe(calculator=name, kwargs=kwargs, executor="inline")


CASES = {
    "copper": (lambda: rattled(ase.build.bulk("Cu", a=3.6, cubic=True).repeat(5)), lambda: oracle("emt"), ()),
    "salt": (
        lambda: ball(ase.build.bulk("NaCl", "rocksalt", 5.64, cubic=True), 13.0),
        lambda: oracle("born_mayer:BornMayer", charges={"Na": 0.7, "Cl": -0.7}),
        (3.5, 4.5, 5.5, 8.0, 10.0),
    ),
    "argon": (
        lambda: ball(ase.build.bulk("Ar", a=5.26, cubic=True), 16.0),
        lambda: oracle("lennard-jones", epsilon=0.0104, sigma=3.4, rc=40.0),
        (4.5, 5.5, 6.5, 8.0, 10.0),
    ),
    "ethanol": (lambda: ase.build.molecule("CH3CH2OH"), lambda: oracle("tblite"), ()),
}


def with_oracle(name: str, folder: Path) -> Locality:
    atoms, make, radii = CASES[name]
    return gpmlp.locality(
        structures_from_ase([atoms()], [name]),
        oracle=make(),
        folder=folder / name,
        redraws=Redraws(radii, draws=6, centres=4),
    )


def fits() -> Locality:
    frames = []
    for seed in range(40):
        atoms = rattled(ase.build.bulk("Cu", a=3.6, cubic=True).repeat(2), 0.12, seed)
        atoms.calc = EMT()
        atoms.get_forces()
        frames.append(atoms)
    return gpmlp.locality(*from_ase(frames))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[*CASES, "fits"], default=[*CASES, "fits"])
    parser.add_argument("--work", type=Path, help="labels are kept here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.cases:
            found = fits() if name == "fits" else with_oracle(name, options.work or Path(scratch))
            if found.floors:
                rows = [[f"{f.radius:.2f}", f"{1e3 * f.spread:.3g}", f"{1e3 * f.error:.2g}"] for f in found.floors]
                print(common.table(rows, [name, "meV/A", "+-"]))
                print(f"{found.law.kind}: n = {found.law.exponent:.1f}, length {found.law.length:.2f} A", flush=True)
            else:
                rows = [[f"{f.cutoff:.2f}", f"{1e3 * f.noise:.3g}", f"{1e3 * f.rmse:.3g}"] for f in found.fits]
                print(common.table(rows, ["cutoff", "noise meV/A", "rmse meV/A"]))
            print(found.sentence, flush=True)


if __name__ == "__main__":
    main()
