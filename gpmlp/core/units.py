"""Units are eV, angstrom and atomic mass units inside; these constants are used only at the border (CODATA 2018)."""

BOLTZMANN = 8.617333262e-5  # eV/K
GPA = 6.241509074460763e-3  # 1 GPa in eV/A^3
FEMTOSECOND = 0.09822694788464063  # 1 fs in A sqrt(amu/eV)
HARTREE = 27.211386245988  # eV
BOHR = 0.529177210903  # A
COULOMB = HARTREE * BOHR  # e^2/(4 pi eps0) in eV A
