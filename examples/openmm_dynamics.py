"""How do I run a potential in OpenMM?

OpenMM 8.6 takes forces from Python (PythonForce); a silicon crystal at constant energy. OpenMM's units are nm, kJ/mol and ps.
"""

from pathlib import Path

import openmm as mm
from ase import units
from ase.build import bulk

import gpmlp
from gpmlp.engines.ase import GPCalculator

TRAIN = Path(__file__).resolve().parents[1] / "data/silicon/train.xyz"
EV = units.mol / units.kJ  # in kJ/mol

atoms = bulk("Si", a=5.47, cubic=True).repeat(2)
atoms.calc = GPCalculator(gpmlp.fit(*gpmlp.read(TRAIN, "::4"), gpmlp.Recipe(inducing={"n": 50, "gradients": 2}))[0])


def compute(state: mm.State):
    atoms.set_cell(state.getPeriodicBoxVectors(asNumpy=True) / mm.unit.angstrom)
    atoms.set_positions(state.getPositions(asNumpy=True) / mm.unit.angstrom)
    return EV * atoms.get_potential_energy(), 10 * EV * atoms.get_forces()


system = mm.System()
system.setDefaultPeriodicBoxVectors(*(atoms.cell.array * mm.unit.angstrom))
for mass in atoms.get_masses():
    system.addParticle(mass)
system.getForce(system.addForce(mm.PythonForce(compute))).setUsesPeriodicBoundaryConditions(True)
context = mm.Context(system, mm.VerletIntegrator(0.001), mm.Platform.getPlatform("Reference"))
context.setPositions(atoms.positions * mm.unit.angstrom)
context.setVelocitiesToTemperature(600, 1)
for _ in range(11):
    now = context.getState(energy=True)
    u, k = (e / mm.unit.kilojoule_per_mole / EV for e in (now.getPotentialEnergy(), now.getKineticEnergy()))
    print(f"{now.getStepCount():3} fs: potential {u:.4f}, kinetic {k:.4f}, together {u + k:.4f} eV")
    context.getIntegrator().step(20)
