"""Names of a calculation's values: those that its plan has are among those that it foretells without a surface."""

from __future__ import annotations

from fnmatch import fnmatchcase

import numpy as np
import pytest
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111, molecule
from ase.calculators.emt import EMT
from ase.calculators.morse import MorsePotential

from gpmlp.properties.calculations import CALCULATIONS
from gpmlp.properties.compute import named
from gpmlp.properties.motion import Motion
from gpmlp.properties.surface import EnergySurface

for library in ("phonopy", "seekpath", "spglib"):
    pytest.importorskip(library, reason=f"{library} is not installed (pip install 'gpmlp[properties]')")


def adsorbed() -> Atoms:
    slab = fcc111("Cu", (1, 1, 2), vacuum=6.0)
    add_adsorbate(slab, "O", 1.5, "fcc")
    slab.pbc = True
    return slab


def hop() -> list[Atoms]:
    ends = []
    for x in (0.0, 0.5):
        slab = fcc111("Al", (2, 2, 2), vacuum=6.0)
        add_adsorbate(slab, "Au", 2.0, "fcc" if x == 0 else "hcp")
        ends.append(slab)
    return ends


COPPER, GOLD, ALLOY = bulk("Cu", cubic=True), bulk("Au", cubic=True), bulk("Cu", cubic=True)
ALLOY.symbols[0] = "Au"
ALLOY.set_cell(3.74 * np.eye(3), scale_atoms=True)
HEXAGONAL = bulk("Cu", "hcp", a=2.55, c=4.17)
SMALL = {"most_atoms": 32}
SHORT = {"rigid": True, "step": 30}
CASES = {
    "eos": (bulk("Cu"), {"volumes": 5}, "bulk_moduls"),
    "lattice": (HEXAGONAL, {}, "lattice_constant_d"),
    "elastic": (COPPER, {}, "C71"),
    "phases": ([COPPER, bulk("Cu", "bcc", a=2.87)], {}, "Cu.energy_above_Au"),
    "phonons": (bulk("Cu"), {"supercell": (2, 2, 2), "temperatures": (100,)}, "entropy_300K"),
    "quasi_harmonic": (bulk("Cu"), {"supercell": (1, 1, 1), "volumes": 5, "temperatures": (100, 200)}, "volume_300K"),
    "vacancy": (COPPER, SMALL, "vacancy_formation_energy_Au"),
    "vacancy of an alloy": ([ALLOY, COPPER, GOLD], SMALL, "vacancy_formation_energy"),
    "interstitial": (COPPER, SMALL, "interstitial_formation_energy_site"),
    "interstitial of another": ([COPPER, GOLD], SMALL | {"species": ["Au"]}, "Cu.interstitial_formation_energy_Cu_octahedral"),
    "interstitial at a site": (COPPER, SMALL | {"sites": ((0.5, 0.5, 0.5),)}, "interstitial_formation_energy_octahedral"),
    "surface": (HEXAGONAL, {"thickness": 4}, "surface_energy_1000"),
    "surface along a plane": (COPPER, {"thickness": 4, "planes": ((2, -1, 0),)}, "surface_energy_111"),
    "adsorption": (adsorbed(), {"relax": False}, "O.adsorption_energy"),
    "frequencies": (molecule("H2O"), {}, "frequency_4"),
    "frequencies of a linear molecule": (molecule("N2"), {}, "frequency_2"),
    "torsions": (molecule("CH3CH2OH"), SHORT, "torsion_C0_C2_barrier"),
    "torsions about a bond": (molecule("CH3CH2OH"), SHORT | {"bonds": ((0, 1),)}, "torsion_C0_O2_barrier"),
    "dimers": ([COPPER, GOLD], {"points": 8}, "dimer_Au_Cu_bond_length"),
    "hop": (hop(), {"jump_A": 1.65}, "hop_rate"),
}  # fmt: skip


def test_each_calculation_is_here():
    still = {name for name, kind in CALCULATIONS.items() if not issubclass(kind, Motion)}  # of others: test_motion.py
    assert {case.split()[0] for case in CASES} == still


@pytest.mark.parametrize("case", CASES)
def test_names_are_foretold(case):
    given, options, wrong = CASES[case]
    structures = named([given] if isinstance(given, Atoms) else given)
    calculation = CALCULATIONS[case.split()[0]].model_validate(options)
    surface = EnergySurface.of_calculator(
        MorsePotential(r0=1.1, rcut1=4.0, rcut2=4.5) if case.startswith("freq") else EMT()
    )
    plan = calculation.plan(surface, structures if calculation.several else structures[:1])
    patterns = calculation.value_names(structures)
    names = plan.units.keys() - plan.curves.keys()
    assert names and all(any(fnmatchcase(name, pattern) for pattern in patterns) for name in names)
    assert not any(fnmatchcase(wrong, pattern) for pattern in patterns)
