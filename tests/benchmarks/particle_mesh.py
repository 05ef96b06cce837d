"""Charges of large rocksalt crystals by the mesh and by the matrix: seconds of processor, memory, iterations, and how they differ.

    python tests/benchmarks/particle_mesh.py [--cells 3 6 8]

Of 8 cells³ atoms with random displacements; kappa 1, free charges of atoms and a total charge of 0.7 e. One line each.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from systems import structure

from gpmlp.core import coulomb
from gpmlp.core.coulomb import CoulombMatrix
from gpmlp.core.particle_mesh import ParticleMesh
from gpmlp.core.structures import Structures
from gpmlp.potential.charges import ChargeForm, equilibrate

MATRIX = 1728  # atoms up to which a matrix is made, too


def _rocksalt(cells: int, light: bool) -> Structures:
    """NaCl, or MgO, whose Gaussians are narrower."""
    generator = torch.Generator().manual_seed(cells)
    grid = torch.cartesian_prod(*[torch.arange(2 * cells)] * 3)
    species = torch.where(grid.sum(1) % 2 == 0, 12 if light else 11, 8 if light else 17)
    spacing = 2.11 if light else 2.82
    positions = grid * spacing + 0.1 * torch.randn(grid.shape, generator=generator)
    lattice = 2 * cells * spacing * torch.eye(3, dtype=torch.float64)
    return structure(positions.double(), species, lattice, (True, True, True))


def _measured(one: Structures, kind: type) -> tuple[float, int, list[torch.Tensor]]:
    """Seconds, products A q, and energy, charges, slopes and strain derivatives."""
    products, potential = [], kind.potential
    kind.potential = lambda self, q: products.append(0) or potential(self, q)
    free = torch.tensor([coulomb.electronegativity(int(z)) for z in one.species], dtype=torch.float64)
    free = (free.mean() - free) / 4
    start = time.process_time()
    made = kind.of_structure(one)
    found = equilibrate(ChargeForm(1.0), made, free, torch.tensor(0.7))
    on_atoms, strained = made.energy_gradients(found.charges)
    taken = time.process_time() - start
    kind.potential = potential
    return taken, len(products), [found.atom_energies.sum(), found.charges, on_atoms, strained]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", type=int, default=[3, 6, 8])
    meshes = []
    for cells in sorted(parser.parse_args().cells):
        for light in (False, True):
            one = _rocksalt(cells, light)
            name = f"{'MgO' if light else 'NaCl'} {one.n_atoms} atoms"
            taken, products, found = _measured(one, ParticleMesh)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            # the first product is of the start, the last for the energy
            print(f"{name}: mesh {taken:.1f} s, {products - 2} iterations, peak {peak:.0f} MB", flush=True)
            meshes.append((name, one, found))
    for name, one, mesh in meshes:
        if one.n_atoms > MATRIX:
            continue
        taken, _, matrix = _measured(one, CoulombMatrix)
        energy, charges, forces, virial = (float((a - b).abs().max()) for a, b in zip(mesh, matrix, strict=True))
        print(
            f"{name}: matrix {taken:.1f} s; energy differs by {energy / abs(float(matrix[0])):.1e} of it, charges {charges:.1e} e, forces "
            f"{forces:.1e} of {float(matrix[2].abs().max()):.2f} eV/A, virial {virial / float(matrix[3].abs().max()):.1e} of it",
            flush=True,
        )


if __name__ == "__main__":
    main()
