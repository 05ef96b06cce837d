"""Vibrations, torsions and pairs of atoms: against ase.vibrations on GFN2-xTB, analytic potentials, and relaxed samples."""
