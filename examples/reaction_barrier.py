"""How high is the barrier of a reaction, with few calculations, and how sure is that?

A gold atom hops on Al(100). The oracle is EMT here; any calculator of ASE does.
"""

import warnings

from ase.build import add_adsorbate, fcc100
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms

import gpmlp

warnings.simplefilter("ignore")

start = fcc100("Al", (2, 2, 3))
add_adsorbate(start, "Au", 1.7, "hollow")
start.center(axis=2, vacuum=4.0)
start.set_constraint(FixAtoms(mask=[atom.tag > 1 for atom in start]))
end = start.copy()
end[-1].x += end.cell[0, 0] / 2

neb = gpmlp.GPNEB(start, end, EMT(), images=5)
for label in neb.irun(fmax=0.05):
    print(
        f"image {label.image}, {label.reason}: barrier {label.barrier:.3f} +- {label.sigma:.2g} eV foreseen, off by {label.error:+.4f} eV"
    )
print(f"converged: {neb.converged}, after {len(neb.labels)} calculations on the path")
print(f"barrier: {neb.path.barrier:.3f} eV, known to {neb.path.sigma:.2g} eV")
