"""How good is the model of the quickstart? Its errors on a trajectory of GFN2-xTB's own at 300 K that it has never seen.

sh quickstart.sh
python tests/benchmarks/quickstart.py data/learning/ethanol-learned/model.gpmlp [--frames 50]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from tblite.ase import TBLite

import gpmlp
from gpmlp.io.ase_atoms import from_ase

START = Path(__file__).resolve().parents[2] / "data/learning/ethanol.xyz"
APART, BEFORE = 400, 2000  # steps of 0.5 fs between frames, and before the first


def trajectory(frames: int, seed: int = 77) -> list[Atoms]:
    """Labelled frames of a trajectory of the oracle."""
    atoms, rng, out = ase.io.read(START), np.random.default_rng(seed), []
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
    MaxwellBoltzmannDistribution(atoms, temperature_K=600, rng=rng)  # half of it goes into the bonds
    dynamics = Langevin(atoms, 0.5 * units.fs, temperature_K=300, friction=0.02 / units.fs, rng=rng)
    dynamics.run(BEFORE)
    for _ in range(frames):
        dynamics.run(APART)
        frame = atoms.copy()
        found = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        frame.calc = SinglePointCalculator(frame, **found)
        out.append(frame)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--frames", type=int, default=50)
    options = parser.parse_args()
    structures, targets = from_ase(trajectory(options.frames))
    found = gpmlp.load(options.model)(structures, variance="forces")
    error, std = found.forces - targets.forces, found.forces_variance.total.sqrt()
    inside = float((error.abs() < 1.645 * std).double().mean())
    rms, foreseen = (1e3 * float(x.square().mean().sqrt()) for x in (error, std))
    print(
        f"{len(structures)} frames: force error {rms:.1f} meV/A rms, {foreseen:.1f} foreseen, {inside:.0%} in 1.645 std"
    )


if __name__ == "__main__":
    main()
