"""How far can I trust a molecular dynamics run while it is running?

Heats a silicon crystal that starts at rest with ASE's Langevin dynamics. At each step the calculator also gives the standard deviation
of the force on every atom, and the novelty of its surroundings: how far they lie from the training data.
"""

from pathlib import Path

import numpy as np
from ase import units
from ase.build import bulk
from ase.md.langevin import Langevin

import gpmlp
from gpmlp.engines.ase import GPCalculator

DATA = Path(__file__).resolve().parents[1] / "data/silicon"

potential, _ = gpmlp.fit(*gpmlp.read(DATA / "train.xyz", "::4"), gpmlp.Recipe(inducing={"n": 50, "gradients": 2}))

atoms = bulk("Si", a=5.47, cubic=True)
atoms.calc = GPCalculator(potential, uncertainty="sampled_forces", novelty=True)
friction, rng = 0.02 / units.fs, np.random.default_rng(0)
dynamics = Langevin(atoms, 2 * units.fs, temperature_K=900, friction=friction, fixcm=False, rng=rng)


def show() -> None:
    std, novelty = (atoms.calc.results[key].max() for key in ("force_std", "novelty"))
    time = dynamics.get_time() / units.fs
    print(
        f"{time:3.0f} fs, {atoms.get_temperature():4.0f} K: largest std {1e3 * std:3.0f} meV/A, novelty {novelty:.2f}"
    )


dynamics.attach(show, interval=20)
dynamics.run(200)
