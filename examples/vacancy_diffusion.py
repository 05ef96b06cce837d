"""How fast do vacancies in copper diffuse at 900 K, by how much may that be wrong, and what did it cost?

Twenty-four labels of a cell of 31 atoms, a potential, and transition state theory on the mean and on samples of its posterior. The
oracle is EMT here, so that its own value can be told; any calculator of ASE does.
"""

import numpy as np
from ase.build import bulk
from ase.calculators.emt import EMT

import gpmlp
from gpmlp.io.ase_atoms import from_ase
from gpmlp.properties.compute import exact_properties
from gpmlp.properties.hop import Hop
from gpmlp.properties.surface import EnergySurface

crystal = bulk("Cu", cubic=True) * (2, 2, 2)
neighbour = int(np.argsort(crystal.get_distances(0, range(32), mic=True))[1])
start, end = crystal.copy(), crystal.copy()
end.positions[neighbour] += crystal.get_distance(neighbour, 0, mic=True, vector=True)
del start[0], end[0]

rng, labels = np.random.default_rng(0), []
for i in range(24):  # about the start and on the way
    atoms = start.copy()
    atoms.positions += (0, 0.25, 0.5, 0)[i % 4] * (end.positions - start.positions)
    atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)
    atoms.calc = EMT()
    atoms.get_forces()
    labels.append(atoms)
recipe = {"descriptor": {"cutoff": 5.0, "n_max": 6, "l_max": 4}, "inducing": {"n": 150, "gradients": 2}}
potential, _ = gpmlp.fit(*from_ase(labels), gpmlp.Recipe.model_validate(recipe))

hop = Hop(temperature_K=900, equivalent=12)
found = gpmlp.compute_properties(potential, [start, end], [hop], samples=16)
own = exact_properties(EnergySurface.of_calculator(EMT()), [start, end], [hop])
for name in ("hop_barrier", "log10_attempt_frequency", "log10_diffusion_coefficient"):
    it = found[name]
    print(f"{name}: {it.value:.3f}, 90 % within {it.low_90:.3f} to {it.high_90:.3f} {it.unit}; EMT {own[name]:.3f}")
