"""Which atoms need the quantum code, and how do I run dynamics with its forces there and a potential's elsewhere?

The potential knows perfect copper, and meets an atom too many. The oracle is EMT here; any calculator of ASE does.
"""

from ase import units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE

import gpmlp
from gpmlp.io.ase_atoms import from_ase, structures_from_ase
from gpmlp.properties.partition import RegionRule

labels = [bulk("Cu", cubic=True) * (2, 2, 2) for _ in range(10)]
for seed, atoms in enumerate(labels):
    atoms.rattle(0.08, seed=seed)
    atoms.calc = EMT()
    atoms.get_forces()
recipe = {"descriptor": {"cutoff": 4.0, "n_max": 4, "l_max": 3}, "inducing": {"n": 40, "gradients": 3}}
potential, _ = gpmlp.fit(*from_ase(labels), gpmlp.Recipe.model_validate(recipe))

atoms = bulk("Cu", cubic=True) * (2, 2, 3)
atoms.append("Cu")
atoms.positions[-1] = atoms.positions[0] + [1.3, 1.3, 1.0]
region = gpmlp.partition(potential, structures_from_ase([atoms]), RegionRule(fraction=0.2, buffer=5.0))
print(f"{len(region.core)} of {len(atoms)} atoms hold {100 * region.share:.1f} % of the squared error that is foreseen")

atoms.calc = gpmlp.PartitionedCalculator(potential, EMT(), region, 0.6, recipe)  # asks EMT where it is not sure
FIRE(atoms, logfile=None).run(fmax=0.1, steps=60)
atoms.rattle(0.08, seed=1)
dynamics = VelocityVerlet(atoms, 3 * units.fs)
dynamics.run(100)
atoms.calc.tolerance = None  # from here on it does not ask, and energy is conserved
before = atoms.get_total_energy()
dynamics.run(200)
change = 1e3 * (atoms.get_total_energy() - before) / len(atoms)
temperature = atoms.get_temperature()
print(f"{len(atoms.calc.labels)} labels; then {temperature:.0f} K, where energy changed by {change:+.3f} meV/atom")
