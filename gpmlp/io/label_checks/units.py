"""Units in which energies, forces and stresses come by mistake."""

from __future__ import annotations

from gpmlp.core.units import BOHR, GPA, HARTREE

KCAL, KJ = 0.0433641043, 0.0103642697  # 1 kcal/mol, 1 kJ/mol in eV
# how many of the unit make 1 eV, 1 eV/A, 1 eV/A^3
ENERGY_UNITS = {
    "eV": 1.0, "Hartree": 1 / HARTREE, "Rydberg": 2 / HARTREE, "kcal/mol": 1 / KCAL, "kJ/mol": 1 / KJ, "meV": 1e3,
}  # fmt: skip
FORCE_UNITS = {
    "eV/A": 1.0, "Hartree/Bohr": BOHR / HARTREE, "Rydberg/Bohr": 2 * BOHR / HARTREE, "Hartree/A": 1 / HARTREE, "Rydberg/A": 2 / HARTREE,
    "eV/Bohr": BOHR, "kcal/mol/A": 1 / KCAL, "kJ/mol/A": 1 / KJ, "kJ/mol/nm": 10 / KJ, "meV/A": 1e3,
}  # fmt: skip
STRESS_UNITS = {
    "GPa": 1 / GPA, "kbar": 10 / GPA, "MPa": 1e3 / GPA, "bar": 1e4 / GPA, "Hartree/Bohr^3": BOHR**3 / HARTREE,
    "Rydberg/Bohr^3": 2 * BOHR**3 / HARTREE,
}  # fmt: skip
