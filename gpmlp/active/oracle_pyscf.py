"""PySCF is an ASE calculator for isolated molecules: Kohn-Sham or Hartree-Fock energies and analytic forces by the pyscf package."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase.calculators.calculator import Calculator, all_changes
from ase.units import Bohr, Hartree


class PySCF(Calculator):
    """xc: a functional, or 'hf'; charge and spin (unpaired electrons) of the whole molecule; grid_level and conv_tol (Hartree) as in
    pyscf; density_fit for speed."""

    implemented_properties = ["energy", "free_energy", "forces"]
    default_parameters = {
        "xc": "pbe",
        "basis": "def2-svp",
        "charge": 0,
        "spin": 0,
        "density_fit": True,
        "grid_level": 3,
        "conv_tol": 1e-9,
        "max_cycle": 100,
    }
    discard_results_on_any_change = True

    def __init__(self, **kwargs: Any) -> None:
        unknown = set(kwargs) - set(self.default_parameters)
        if unknown:
            raise TypeError(f"unknown keyword arguments {sorted(unknown)}")
        import pyscf  # noqa: F401 - missing: said when the recipe is read, not at the first label

        super().__init__(**kwargs)

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        if self.atoms.pbc.any():
            raise ValueError("pyscf labels isolated molecules here; switch periodicity off or take a periodic code")
        field = self._field()
        energy = field.kernel()
        if not field.converged:
            field = field.newton()  # second order: slower and surer
            energy = field.kernel()
        if not field.converged:
            raise RuntimeError("self-consistency was not reached")
        gradient = field.nuc_grad_method()
        if self.parameters["xc"].lower() != "hf":
            gradient.grid_response = True  # else forces are not the slope of the energy to better than the grid
        forces = -np.asarray(gradient.kernel()) * (Hartree / Bohr)
        self.results = {"energy": energy * Hartree, "free_energy": energy * Hartree, "forces": forces}

    def _field(self) -> Any:
        """The unsolved self-consistent field."""
        from pyscf import dft, gto, scf

        p = self.parameters
        molecule = gto.M(
            atom=list(zip(self.atoms.get_chemical_symbols(), self.atoms.positions.tolist(), strict=True)),
            unit="Angstrom",
            basis=p["basis"],
            charge=p["charge"],
            spin=p["spin"],
            verbose=0,
        )
        open_shell = p["spin"] != 0
        if p["xc"].lower() == "hf":
            field = scf.UHF(molecule) if open_shell else scf.RHF(molecule)
        else:
            field = (dft.UKS if open_shell else dft.RKS)(molecule, xc=p["xc"])
            field.grids.level = p["grid_level"]
        field.conv_tol, field.max_cycle = p["conv_tol"], p["max_cycle"]
        return field.density_fit() if p["density_fit"] else field
