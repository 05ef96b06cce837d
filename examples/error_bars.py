"""Which predictions can I trust, and are the error bars as large as the errors?

Predicts silicon structures that the potential has not seen, with calibrated standard deviations of forces; then stretches a crystal
until it has nothing in common with the data.
"""

from pathlib import Path

from ase.build import bulk

import gpmlp
from gpmlp.io.ase_atoms import structures_from_ase

DATA = Path(__file__).resolve().parents[1] / "data/silicon"

potential, _ = gpmlp.fit(*gpmlp.read(DATA / "train.xyz", "::4"), gpmlp.Recipe(inducing={"n": 50, "gradients": 2}))

structures, targets = gpmlp.read(DATA / "test.xyz", "::2")
prediction = potential(structures, variance="forces")
error = (prediction.forces - targets.forces).abs()
std = prediction.forces_variance.total.sqrt()
print(f"typical error bar: {1e3 * std.square().mean().sqrt():.0f} meV/A")
print(f"typical error: {1e3 * error.square().mean().sqrt():.0f} meV/A")
print(f"errors within 1.645 standard deviations (90 % expected): {100 * (error < 1.645 * std).double().mean():.0f} %")

lattice = [5.0, 5.47, 6.0, 6.6]
crystals = potential(structures_from_ase([bulk("Si", a=a) for a in lattice]), variance="energies", novelty=True)
for a, std, novelty in zip(lattice, crystals.energies_variance.total.sqrt(), crystals.novelty.view(-1, 2)[:, 0]):
    print(
        f"a = {a:.2f} A: energy known to {1e3 * std / 2:.1f} meV/atom, novelty {novelty:.2f} (1 = the edge of the data)"
    )
