"""Particle mesh: the Coulomb sum of a large periodic structure, in memory proportional to its atoms.

The sum of CoulombMatrix, A q without A: pairs in real space, and the charges on a mesh for the sum in reciprocal space (Darden, York,
Pedersen, J. Chem. Phys. 98, 10089 (1993)), by torch-pme (Loche et al., J. Chem. Phys. 162, 142501 (2025)). Energies agree with those of the
matrix to 3e-7 of them and forces to 1e-5 eV/A.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from scipy.fft import next_fast_len
from torch import Tensor

from gpmlp.core import errors, neighbors
from gpmlp.core.coulomb import CoulombMatrix, half_space, hardness_and_widths, own_wave_term, slab_box, smeared
from gpmlp.core.structures import Structures
from gpmlp.core.units import COULOMB

DENSE = 1000  # atoms up to which a matrix is faster, or as fast
CONVERGED = 4.2  # erfc(x) and exp(-x²) beyond it are below 3e-8: where the sum over pairs ends
NARROWEST = 2.0  # A, smearing at least: about as many operations for pairs as for the mesh
SPARSE = 0.8  # times the distance (volume of an atom)^⅓, smearing at least: so that points of the mesh are in proportion to atoms
SPACING = 0.15  # of points of the mesh along each lattice vector, times the smearing
NODES = 7  # along each axis, between which charges are interpolated: the most that torch-pme has
LONGEST = 150  # waves of the sum in reciprocal space, about, that precondition a solution
VACUUM = 2.5  # times the longest lattice vector of a slab, between its images: what Yeh and Berkowitz leave out is below 2e-7


def coulomb_sum(structure: Structures) -> CoulombMatrix | ParticleMesh:
    """Of one structure: the matrix up to DENSE atoms and without periodic axes, a mesh for more. Errors as those of both."""
    if structure.n_atoms > DENSE and int(structure.periodic.sum()) >= 2:
        return ParticleMesh.of_structure(structure)
    return CoulombMatrix.of_structure(structure)


@dataclass(frozen=True, eq=False)
class ParticleMesh:
    """A (n, n) of CoulombMatrix as an operator, of a structure with three periodic axes or a slab.

    Attributes:
        self_terms: (n,) S = η of each atom, eV/e². widths: (n,) σ, A.
        centers, others: (pairs,) i and j of the sum in real space; vectors: (pairs, 3) d + R, A; values, slopes: (pairs,) of its terms
            and their derivatives by the distance.
        positions: (n, 3) A; cell: (3, 3) A, of a slab with vacuum. smearing: of Ewald's method, A.
        normal: (3,) of a slab, zero otherwise; area_factor: 2π/V of it; height: of its cell, A.
    """

    self_terms: Tensor
    widths: Tensor
    centers: Tensor
    others: Tensor
    vectors: Tensor
    values: Tensor
    slopes: Tensor
    positions: Tensor
    cell: Tensor
    smearing: float
    normal: Tensor
    area_factor: float
    height: float

    @staticmethod
    def of_structure(structure: Structures, hardnesses: Mapping[int, float] | None = None) -> ParticleMesh:
        """Of one structure; arguments as CoulombMatrix.of_structure.

        Raises:
            UserError: torch-pme is not installed, an element without a hardness, a cell without volume, atoms on top of each other.
        """
        _require_torchpme(structure)
        eta, widths = hardness_and_widths(structure, hardnesses)
        whole = structure.to(dtype=torch.float64)
        normal, factor, height = whole.positions.new_zeros(3), 0.0, 0.0
        if not bool(whole.periodic.all()):
            whole, normal, factor, height = slab_box(whole, VACUUM)
        apart = (float(torch.linalg.det(whole.cells[0]).abs()) / len(eta)) ** (1 / 3)
        smearing = max(math.sqrt(2) * float(widths.max()), NARROWEST, SPARSE * apart)
        pairs = neighbors.find_neighbors(whole, math.sqrt(2) * CONVERGED * smearing)
        vectors = pairs.vectors(whole)
        i, j, r = pairs.centers, pairs.neighbors, vectors.norm(dim=1)
        narrow, wide = smeared(r, (widths[i].square() + widths[j].square()).sqrt()), smeared(r, smearing)
        value, slope = (COULOMB * (a - b) for a, b in zip(narrow, wide, strict=True))
        about = whole.positions, whole.cells[0], smearing, normal, factor, height
        return ParticleMesh(eta, widths, i, j, vectors, value, slope, *about)

    def __len__(self) -> int:
        return len(self.self_terms)

    @cached_property
    def _volume(self) -> float:
        return abs(float(torch.linalg.det(self.cell)))

    @cached_property
    def _here(self) -> _Mesh:
        return _Mesh(self.positions, self.cell, self.smearing)

    def longest_waves(self) -> Tensor:
        """(n, 2 waves) U, whose U Uᵀ are the terms of A with the longest waves: nearly those along which A is largest."""
        waves = half_space(self.cell, (12 * math.pi**2 * LONGEST / self._volume) ** (1 / 3))
        squares = waves.square().sum(1)
        weights = 8 * math.pi * COULOMB / self._volume * torch.exp(-0.5 * self.smearing**2 * squares) / squares
        phase = self.positions @ waves.T
        return torch.cat([phase.cos(), phase.sin()], dim=1) * weights.sqrt().repeat(2)

    def potential(self, charges: Tensor) -> Tensor:
        """(n,) A q, V, of charges (n,), e."""
        q = charges
        out = torch.zeros_like(q).index_add_(0, self.centers, self.values * q[self.others])
        out += self._here.potential(q) + own_wave_term(self.smearing) * q + self._background(q)
        if self.area_factor:
            out += self._slab_term(q)
        return out

    def _background(self, q: Tensor) -> Tensor:
        """Of the uniform density that makes the cell neutral: inversely proportional to the volume."""
        squares, total = self.widths.square(), q.sum()
        of_widths = squares * total + squares @ q
        factor = 2 * math.pi / self._volume
        return COULOMB * (factor * (of_widths - self.smearing**2 * total) - self.area_factor * of_widths)

    def _slab_term(self, q: Tensor) -> Tensor:
        """Less the images along the normal: -2π k_e/V Σ_j q_j ((z_i - z_j)² + height²/6)."""
        z, total = self.positions @ self.normal, q.sum()
        z = z - z.mean()
        squares = z.square() * total - 2 * z * (z @ q) + z.square() @ q
        return -self.area_factor * COULOMB * (squares + self.height**2 / 6 * total)

    def energy_gradients(self, charges: Tensor) -> tuple[Tensor, Tensor]:
        """∂/∂r (n, 3), eV/A, and ∂/∂ε (3, 3), eV, of ½ qᵀAq at constant charges (n,)."""
        q, one = charges, torch.eye(3).to(charges)
        along = 0.5 * q[self.centers] * q[self.others] * self.slopes / self.vectors.norm(dim=1)
        pulled = along[:, None] * self.vectors
        strained = self.vectors.T @ pulled - 0.5 * q @ self._background(q) * one
        on_atoms, of_mesh = self._mesh_gradients(q)
        on_atoms.index_add_(0, self.others, pulled).index_add_(0, self.centers, -pulled)
        strained += of_mesh
        if self.area_factor:
            z = self.positions @ self.normal
            moved = -2 * self.area_factor * COULOMB * q * (z * q.sum() - z @ q)
            on_atoms += moved[:, None] * self.normal
            strained += 0.5 * q @ self._slab_term(q) * (2 * self.normal[:, None] * self.normal - one)
        return on_atoms, 0.5 * (strained + strained.T)

    def _mesh_gradients(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """By automatic differentiation of the sum on the mesh, whose energy forces then are the exact slope of."""
        with torch.inference_mode(False), torch.enable_grad():
            q, cell = q.clone(), self.cell.clone()
            positions, strain = self.positions.clone().requires_grad_(), torch.zeros(3, 3).to(q).requires_grad_()
            deformed = torch.eye(3).to(q) + strain
            mesh = _Mesh(positions @ deformed.T, cell @ deformed.T, self.smearing)
            on_atoms, strained = torch.autograd.grad(0.5 * q @ mesh.potential(q), (positions, strain))
            return on_atoms, strained


class _Mesh:
    """Points of a mesh in a cell, and the potential of Gaussians on it, without the wave of zero length."""

    def __init__(self, positions: Tensor, cell: Tensor, smearing: float) -> None:
        from torchpme import CoulombPotential
        from torchpme.lib import KSpaceFilter, MeshInterpolator

        lengths = cell.detach().norm(dim=1).tolist()
        sizes = torch.tensor([next_fast_len(max(NODES, math.ceil(x / (SPACING * smearing))), True) for x in lengths])
        kernel = CoulombPotential(smearing, prefactor=COULOMB).to(cell)
        self._waves = KSpaceFilter(cell, sizes, kernel, "backward", "forward")
        self._waves.update(cell, sizes)
        self._points = MeshInterpolator(cell, sizes, NODES, "Lagrange")
        self._points.compute_weights(positions)
        self._volume = torch.linalg.det(cell).abs()

    def potential(self, q: Tensor) -> Tensor:
        """(n,) V of charges (n,), e."""
        on_mesh = self._waves.forward(self._points.points_to_mesh(q[:, None]))
        return self._points.mesh_to_points(on_mesh)[:, 0] / self._volume


def _require_torchpme(structure: Structures) -> None:
    try:
        import torchpme  # noqa: F401
    except ImportError as error:
        raise errors.UserError(
            f"{structure.names[0]}: charges of more than {DENSE} atoms need the package torch-pme ({error}); pip install torch-pme, or "
            "gpmlp[long-range]."
        ) from error
