"""Coulomb matrix: interaction of Gaussian charges on the atoms of one structure, isolated, periodic or a slab, and its derivatives.

The charge of atom i is a Gaussian of standard deviation σ_i = k_e / (√π η_i), whose self energy ½ η_i q_i² is the hardness of the atom: so
A + S is that of a charge density with itself, and never negative. Dense: n² numbers for A, and nine times as many for its derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from gpmlp.core import errors, neighbors
from gpmlp.core.structures import Structures
from gpmlp.core.units import COULOMB, VOIGT

CONVERGED = 5.4  # erfc(x) and exp(-x²) beyond it are below 1e-12: where both sums of Ewald's method end
NARROWEST = 1.4  # A, smearing of Ewald's method at least: a smaller one only moves work to the reciprocal sum
VACUUM = 4.5  # times the longest lattice vector of a slab, between its images: what Yeh and Berkowitz leave out is below 1e-11
LAYER = 5.0  # A, in steps of which the thickness of a slab counts
LARGEST = 3000  # atoms of a dense matrix: of more, with its derivatives, it would take many gigabytes

# First ionisation energies and electron affinities (0 where no anion is bound) of Z = 1, 2, ..., eV, rounded. The former agree with the
# NIST Atomic Spectra Database, as in mendeleev 1.3.0, to 0.005 eV. Of the affinities 65 agree with those of mendeleev (CRC Handbook of
# Chemistry and Physics) to 0.006 eV; 10 (Pm, Sm, Gd, Ho, Er, actinides) are not there, and 20 differ, as experiments and calculations do:
# Pr, Nd, Eu and Tb by 0.7 to 1.8 eV, Ga, Dy, Lu, Hf, Po and At by 0.1 to 0.5. They set the widths of charges, their stiffness (in a unit,
# κ, that the fit chooses) and prior means. A file of a model does not hold them: other values here would change models of before.
IONISATION = (
    13.598, 24.587, 5.392, 9.323, 8.298, 11.260, 14.534, 13.618, 17.423, 21.565, 5.139, 7.646, 5.986, 8.152, 10.487, 10.360, 12.968, 15.760,
    4.341, 6.113, 6.561, 6.828, 6.746, 6.767, 7.434, 7.902, 7.881, 7.640, 7.726, 9.394, 5.999, 7.899, 9.789, 9.752, 11.814, 14.000,
    4.177, 5.695, 6.217, 6.634, 6.759, 7.092, 7.119, 7.361, 7.459, 8.337, 7.576, 8.994, 5.786, 7.344, 8.608, 9.010, 10.451, 12.130,
    3.894, 5.212, 5.577, 5.539, 5.470, 5.525, 5.577, 5.644, 5.670, 6.150, 5.864, 5.939, 6.022, 6.108, 6.184, 6.254, 5.426, 6.825, 7.550,
    7.864, 7.834, 8.438, 8.967, 8.959, 9.226, 10.438, 6.108, 7.417, 7.286, 8.414, 9.318, 10.749,
    4.073, 5.278, 5.380, 6.307, 5.89, 6.194, 6.266, 6.026, 5.974,
)  # fmt: skip
AFFINITY = (
    0.754, 0.0, 0.618, 0.0, 0.280, 1.262, 0.0, 1.461, 3.401, 0.0, 0.548, 0.0, 0.433, 1.390, 0.747, 2.077, 3.613, 0.0,
    0.501, 0.025, 0.188, 0.084, 0.526, 0.676, 0.0, 0.153, 0.662, 1.157, 1.236, 0.0, 0.301, 1.233, 0.805, 2.021, 3.364, 0.0,
    0.486, 0.052, 0.307, 0.433, 0.917, 0.747, 0.55, 1.046, 1.143, 0.562, 1.304, 0.0, 0.384, 1.112, 1.047, 1.971, 3.059, 0.0,
    0.472, 0.145, 0.558, 0.600, 0.109, 0.098, 0.13, 0.16, 0.116, 0.212, 0.131, 0.015, 0.338, 0.312, 1.03, 0.0, 0.239, 0.178, 0.329,
    0.816, 0.060, 1.078, 1.564, 2.125, 2.309, 0.0, 0.320, 0.357, 0.942, 1.40, 2.416, 0.0,
    0.486, 0.10, 0.35, 0.608, 0.55, 0.315, 0.48, 0.0, 0.10,
)  # fmt: skip


def hardness(z: int) -> float:
    """η_Z = I - A of a free atom, eV/e² (Parr, Pearson, J. Am. Chem. Soc. 105, 7512 (1983), without their factor of one half).

    Raises:
        UserError: an element that is not in the table.
    """
    return _of_atom(IONISATION, z) - _of_atom(AFFINITY, z)


def electronegativity(z: int) -> float:
    """χ_Z = (I + A) / 2 of a free atom, eV/e (Mulliken, J. Chem. Phys. 2, 782 (1934)); UserError as `hardness`."""
    return 0.5 * (_of_atom(IONISATION, z) + _of_atom(AFFINITY, z))


def _of_atom(table: Sequence[float], z: int) -> float:
    if not 1 <= z <= len(table):
        raise errors.UserError(
            f"Charges of {errors.chemical_symbol(z)} (Z = {z}) cannot be modelled: no ionisation energy and electron affinity is tabulated "
            f"beyond {errors.chemical_symbol(len(table))}. Set `long_range: {{charges: off}}`."
        )
    return table[z - 1]


@dataclass(frozen=True, eq=False)
class CoulombMatrix:
    """A (n, n), eV/e²: ½ qᵀAq is the energy of the charges with each other and with all images, without self terms.

        A_ij = k_e Σ_R erf(|d + R| / (√2 γ_ij)) / |d + R|,   d = r_j - r_i,   γ_ij² = σ_i² + σ_j²,

    by Ewald's method where lattice vectors are periodic, in a uniform background that makes the cell neutral: the potential of each
    Gaussian averages to zero. Of a slab, without its images along the normal (Yeh, Berkowitz, J. Chem. Phys. 111, 3155 (1999); with a
    net charge Ballenegger, Arnold, Cerdà, J. Chem. Phys. 131, 094107 (2009)). A + diag(S) has no negative eigenvalue.

    Attributes:
        self_terms: (n,) S = η of each atom, eV/e².
        centers, others: (pairs,) i and j of the sum in real space; vectors: (pairs, 3) d + R, A; values, slopes: (pairs,) of its terms
            and their derivatives by the distance.
        waves: (waves, 3) k of the sum in reciprocal space, half of them, 1/A; weights: (waves,) of cos(k·d); smearing: of Ewald, A.
        positions: (n, 3) A. constant: (n, n) what comes with no vector. normal: (3,) of a slab, zero otherwise; area_factor: 2π/V of it.
    """

    self_terms: Tensor
    centers: Tensor
    others: Tensor
    vectors: Tensor
    values: Tensor
    slopes: Tensor
    waves: Tensor
    weights: Tensor
    smearing: float
    positions: Tensor
    constant: Tensor
    normal: Tensor
    area_factor: float
    height: float

    @staticmethod
    def of_structure(structure: Structures, hardnesses: Mapping[int, float] | None = None) -> CoulombMatrix:
        """Of one structure, by the hardness of its elements.

        Args:
            hardnesses: η by atomic number, eV/e²; those of the table if None.

        Raises:
            UserError: an element without a hardness, one periodic axis only, a cell without volume, atoms on top of each other, more
                than LARGEST atoms.
        """
        if structure.n_atoms > LARGEST:
            raise errors.UserError(
                f"{structure.names[0]}: has {structure.n_atoms} atoms. With charges, structures of more than {LARGEST} have energies, "
                "forces and stresses where two or three axes are periodic (a cluster: with vacuum around it), but no error bars of these, "
                "and cannot be fitted to."
            )
        eta, widths = hardness_and_widths(structure, hardnesses)
        periodic = int(structure.periodic.sum())
        if periodic == 1:
            raise errors.UserError(
                f"{structure.names[0]}: charges of a structure with one periodic axis have no sum here. Make it periodic along all three "
                "axes with vacuum around it, or isolated."
            )
        moved = structure.to(dtype=torch.float64)
        if not periodic:
            return _isolated(moved, eta, widths)
        return _periodic(moved, eta, widths) if periodic == 3 else _slab(moved, eta, widths)

    def __len__(self) -> int:
        return len(self.self_terms)

    def potential(self, charges: Tensor) -> Tensor:
        """(n,) A q, V, of charges (n,), e."""
        return self.matrix @ charges

    @cached_property
    def _phases(self) -> tuple[Tensor, Tensor]:
        """(n, waves) cos(k·r) and sin(k·r)."""
        phase = self.positions @ self.waves.T
        return phase.cos(), phase.sin()

    @cached_property
    def matrix(self) -> Tensor:
        """A, symmetric: two products for the sum in reciprocal space, Σ_k w cos(k·(r_j - r_i))."""
        out = self._summed(self.values) + self._waves_sum(self.weights) + self.constant
        if self.area_factor:
            out -= self.area_factor * COULOMB * (self._heights.square() + self.height**2 / 6)
        return out

    @property
    def shift(self) -> Tensor:
        """() c of A + c 11ᵀ, which is positive on all charges and changes none of a given sum: a slab's A is so on neutral ones only."""
        return self.matrix.abs().max() if self.area_factor else self.constant.new_zeros(())

    @property
    def _heights(self) -> Tensor:
        """(n, n) of d along the normal."""
        z = self.positions @ self.normal
        return z[None, :] - z[:, None]

    def _summed(self, of_pairs: Tensor) -> Tensor:
        """(n, n) sums over images of what pairs give."""
        n = len(self)
        return of_pairs.new_zeros(n * n).index_add_(0, self.centers * n + self.others, of_pairs).view(n, n)

    def _waves_sum(self, weights: Tensor) -> Tensor:
        cosines, sines = self._phases
        return (cosines * weights) @ cosines.T + (sines * weights) @ sines.T

    @cached_property
    def gradients(self) -> Tensor:
        """(3, n, n) ∂A_ij/∂d, d = r_j - r_i: antisymmetric in i and j."""
        cosines, sines = self._phases
        along = (self.slopes / self.vectors.norm(dim=1))[:, None] * self.vectors
        out = torch.stack([self._summed(column) for column in along.unbind(1)])
        for x, k in enumerate(self.waves.unbind(1)):
            # -Σ_k w k sin(k·(r_j - r_i))
            out[x] -= (cosines * (self.weights * k)) @ sines.T - (sines * (self.weights * k)) @ cosines.T
        if self.area_factor:
            out -= 2 * self.area_factor * COULOMB * self._heights * self.normal[:, None, None]
        return out

    @cached_property
    def strains(self) -> Tensor:
        """(6, n, n) ∂A/∂ε for the strains of VOIGT, ε symmetric: both ends of each term and all lattice vectors move."""
        per_length = self.slopes / self.vectors.norm(dim=1)
        squares = self.waves.square().sum(1)
        slab = -self.area_factor * COULOMB * (self._heights.square() + self.height**2 / 6) if self.area_factor else None
        out = []
        for a, b in VOIGT:
            here = self._summed(per_length * self.vectors[:, a] * self.vectors[:, b])
            one = float(a == b)
            if len(self.waves):
                # w = 4π/V exp(-s²k²/2)/k², and k·r stays
                of_weight = (self.smearing**2 + 2 / squares) * self.waves[:, a] * self.waves[:, b] - one
                here += self._waves_sum(self.weights * of_weight) - one * self.background
            if slab is not None:
                here += slab * (2 * float(self.normal[a] * self.normal[b]) - one)
            out.append(here)
        return torch.stack(out)

    @property
    def background(self) -> Tensor:
        """(n, n) the part of `constant` that is inversely proportional to the volume."""
        return self.constant - torch.diag(self.constant.new_full((len(self),), own_wave_term(self.smearing)))

    def energy_gradients(self, charges: Tensor) -> tuple[Tensor, Tensor]:
        """∂/∂r (n, 3), eV/A, and ∂/∂ε (3, 3), eV, of ½ qᵀAq at constant charges (n,), in O(pairs + n waves)."""
        q, n = charges, len(self)
        pulled = (0.5 * q[self.centers] * q[self.others] * self.slopes / self.vectors.norm(dim=1))[
            :, None
        ] * self.vectors
        on_atoms = pulled.new_zeros(n, 3).index_add_(0, self.others, pulled).index_add_(0, self.centers, -pulled)
        strained = self.vectors.T @ pulled
        if len(self.waves):
            cosines, sines = self._phases
            even, odd = q @ cosines, q @ sines
            # of ½ Σ_k w (C² + S²), C = Σ q cos(k·r), S = Σ q sin(k·r)
            on_atoms += q[:, None] * ((cosines * odd - sines * even) * self.weights) @ self.waves
            power = 0.5 * self.weights * (even.square() + odd.square())
            squares = self.waves.square().sum(1)
            strained += (self.waves * (power * (self.smearing**2 + 2 / squares))[:, None]).T @ self.waves
            rest = power.sum() + 0.5 * q @ self.background @ q
            strained -= rest * torch.eye(3).to(strained)
        if self.area_factor:
            scaled = self.area_factor * COULOMB * q[:, None] * q
            heights = self._heights
            on_atoms -= 2 * (scaled * heights).sum(0)[:, None] * self.normal
            energy = -0.5 * (scaled * (heights.square() + self.height**2 / 6)).sum()
            strained += energy * (2 * self.normal[:, None] * self.normal - torch.eye(3).to(strained))
        return on_atoms, 0.5 * (strained + strained.T)


def hardness_and_widths(structure: Structures, hardnesses: Mapping[int, float] | None = None) -> tuple[Tensor, Tensor]:
    """η, eV/e², and σ, A, of the atoms of one structure (n,); arguments and errors as CoulombMatrix.of_structure."""
    if len(structure) != 1:
        raise ValueError("a Coulomb sum is of one structure")
    eta = structure.positions.new_zeros(structure.n_atoms, dtype=torch.float64)
    for z in structure.distinct_species:
        eta[structure.species == z] = hardness(z) if hardnesses is None else hardnesses[z]
    return eta, COULOMB / (math.sqrt(math.pi) * eta)


def own_wave_term(smearing: float) -> float:
    """What the sum in reciprocal space counts of an atom with itself, eV/e²."""
    return -COULOMB * math.sqrt(2 / math.pi) / smearing


def smeared(r: Tensor, width: Tensor | float) -> tuple[Tensor, Tensor]:
    """erf(r / (√2 γ)) / r and its derivative."""
    a = 1 / (math.sqrt(2) * width)
    value = torch.special.erf(a * r) / r
    return value, (2 / math.sqrt(math.pi) * a * torch.exp(-((a * r) ** 2)) - value) / r


def _isolated(structure: Structures, eta: Tensor, widths: Tensor) -> CoulombMatrix:
    n, like = structure.n_atoms, structure.positions
    i, j = (~torch.eye(n, dtype=torch.bool, device=like.device)).nonzero().unbind(1)
    vectors = like[j] - like[i]
    r = vectors.norm(dim=1)
    if len(r) and float(r.min()) < neighbors.CLOSEST - 1e-9:
        neighbors.find_neighbors(structure, neighbors.CLOSEST)  # which says what is wrong
    value, slope = smeared(r, (widths[i].square() + widths[j].square()).sqrt())
    none, nothing = like.new_zeros(0, 3), like.new_zeros(n, n)
    pairs = i, j, vectors, COULOMB * value, COULOMB * slope
    return CoulombMatrix(eta, *pairs, none, none[:, 0], 1.0, like, nothing, like.new_zeros(3), 0.0, 0.0)


def _periodic(structure: Structures, eta: Tensor, widths: Tensor) -> CoulombMatrix:
    """By Ewald's method: pairs of Gaussians less pairs of wider ones, and these in reciprocal space."""
    volume = float(structure.volumes[0])
    if not volume > 0:
        raise errors.UserError(
            f"{structure.names[0]}: is periodic but its cell has no volume, so that charges have no sum."
        )
    smearing = max(math.sqrt(2) * float(widths.max()), NARROWEST)
    pairs = neighbors.find_neighbors(structure, math.sqrt(2) * CONVERGED * smearing)
    vectors = pairs.vectors(structure)
    i, j, r = pairs.centers, pairs.neighbors, vectors.norm(dim=1)
    narrow, wide = smeared(r, (widths[i].square() + widths[j].square()).sqrt()), smeared(r, smearing)
    value, slope = (COULOMB * (a - b) for a, b in zip(narrow, wide, strict=True))
    waves = half_space(structure.cells[0], math.sqrt(2) * CONVERGED / smearing)
    squares = waves.square().sum(1)
    weights = 2 * COULOMB * 4 * math.pi / volume * torch.exp(-0.5 * smearing**2 * squares) / squares
    spread = widths.square()[:, None] + widths.square()
    constant = -COULOMB * 2 * math.pi / volume * (smearing**2 - spread)
    constant.diagonal().add_(own_wave_term(smearing))
    like = structure.positions
    about = waves, weights, smearing, like, constant, like.new_zeros(3), 0.0, 0.0
    return CoulombMatrix(eta, i, j, vectors, value, slope, *about)


def half_space(cell: Tensor, cutoff: float) -> Tensor:
    """(waves, 3) reciprocal lattice vectors up to a length, one of each pair ±k, without zero."""
    reciprocal = 2 * math.pi * torch.linalg.inv(cell).T
    most = (cutoff * cell.norm(dim=1) / (2 * math.pi)).floor().int().tolist()
    indices = torch.cartesian_prod(*(torch.arange(-m, m + 1, device=cell.device) for m in most)).reshape(-1, 3)
    first, second, third = indices.unbind(1)
    half = (first > 0) | (first == 0) & ((second > 0) | (second == 0) & (third > 0))
    waves = indices[half].to(cell) @ reciprocal
    return waves[waves.square().sum(1) < cutoff**2]


def _slab(structure: Structures, eta: Tensor, widths: Tensor) -> CoulombMatrix:
    """As periodic along its normal, with vacuum between images and their interaction taken off."""
    whole, normal, factor, height = slab_box(structure, VACUUM)
    inside = _periodic(whole, eta, widths)
    # with this, the average over the area is -2π/area |d·n|, smeared by γ, whatever the height of the cell
    constant = inside.constant - COULOMB * factor * (widths.square()[:, None] + widths.square())
    return replace(inside, constant=constant, normal=normal, area_factor=factor, height=height)


def slab_box(structure: Structures, vacuum: float) -> tuple[Structures, Tensor, float, float]:
    """One slab in a cell that is periodic along its normal (3,) too, `vacuum` times its longest lattice vector between images; that
    normal; 2π over the volume of the cell, 1/A³; its height, A."""
    cell, flat = structure.cells[0].clone(), structure.periodic[0]
    axis = int((~flat).nonzero()[0, 0])
    a, b = cell[flat]
    normal = torch.linalg.cross(a, b)
    area = float(normal.norm())
    if not area > 0:
        raise errors.UserError(
            f"{structure.names[0]}: its two periodic lattice vectors are parallel, so that charges have no sum."
        )
    normal = normal / area
    heights = structure.positions @ normal
    thick = LAYER * math.ceil(float(heights.max() - heights.min()) / LAYER + 1e-9)
    height = max(thick + vacuum * float(torch.stack([a, b]).norm(dim=1).max()), thick + 2 * LAYER)
    cell[axis] = height * normal
    whole = Structures(
        structure.positions, cell[None], torch.ones_like(structure.periodic), structure.species,
        structure.structure_of_atom, structure.names,
    )  # fmt: skip
    return whole, normal, 2 * math.pi / (area * height), height
