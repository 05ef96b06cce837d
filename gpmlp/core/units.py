"""Units are eV, angstrom and atomic mass units inside; constants (CODATA 2018) serve at the border. And the order of stress components."""

BOLTZMANN = 8.617333262e-5  # eV/K
GPA = 6.241509074460763e-3  # 1 GPa in eV/A^3
FEMTOSECOND = 0.09822694788464063  # 1 fs in A sqrt(amu/eV)
HARTREE = 27.211386245988  # eV
BOHR = 0.529177210903  # A
COULOMB = HARTREE * BOHR  # e^2/(4 pi eps0) in eV A

VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))  # rows and columns of xx yy zz yz xz xy
VOIGT_INDEX = ((0, 5, 4), (5, 1, 3), (4, 3, 2))  # place of each component of a symmetric matrix in that order
