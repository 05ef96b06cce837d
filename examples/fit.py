"""How large are the errors of a potential that is fitted to my DFT data?

Fits silicon to every fourth structure with a small recipe (leave it out for the default, which is larger and better), keeps the model
in a file, and compares it with structures that it has not seen.
"""

from pathlib import Path

import gpmlp
from gpmlp.recipe import Recipe

DATA = Path(__file__).resolve().parents[1] / "data/silicon"

structures, targets = gpmlp.read(DATA / "train.xyz", "::4")
potential, report = gpmlp.fit(structures, targets, Recipe(inducing={"n": 50, "gradients": 2}))
gpmlp.save(potential, "silicon.gpmlp")

structures, targets = gpmlp.read(DATA / "test.xyz")
prediction = gpmlp.load("silicon.gpmlp")(structures)
energy = (prediction.energies - targets.energies) / structures.counts
force = prediction.forces - targets.forces
print(f"force error on the training set: {1e3 * report.train_rmse['forces']:.0f} meV/A")
print(f"mean absolute error of energies: {1e3 * energy.abs().mean():.1f} meV/atom")
print(f"mean absolute error of forces: {1e3 * force.abs().mean():.0f} meV/A")
