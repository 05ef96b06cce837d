"""What is the bulk modulus of silicon by a potential, how sure is it, and what should be labelled to make it surer?

Draws 32 potentials from the posterior of a fit and computes elastic constants with all of them; then looks for the calculations that
would make the error bar of C11 smallest.
"""

from pathlib import Path

from ase.build import bulk

import gpmlp
from gpmlp.properties.calculations import choose_calculations
from gpmlp.properties.compute import named
from gpmlp.properties.labelling import choose_labels

DATA = Path(__file__).resolve().parents[1] / "data/silicon"

potential, _ = gpmlp.fit(*gpmlp.read(DATA / "train.xyz", "::2"), gpmlp.Recipe(inducing={"n": 200, "gradients": 3}))

crystals = named([bulk("Si", a=5.47)])
calculations = choose_calculations(crystals, ["eos", "elastic"])
results = gpmlp.compute_properties(potential, crystals, calculations)
for name in ("bulk_modulus", "C11", "C12", "C44"):
    value = results[name]
    print(
        f"{name}: {value.value:.1f} +- {value.sigma:.1f} {value.unit}, 90 % in {value.low_90:.1f} to {value.high_90:.1f}"
    )

for choice in choose_labels(potential, crystals, calculations, results, ["C11"], 3):
    print(f"label {choice.atoms.info['name']}: C11 to +- {choice.sigmas['C11']:.1f} GPa")
