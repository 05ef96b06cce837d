"""Charges that adapt to the environment and to each other: a second sparse Gaussian process, and the least energy at the total charge.

With q⁰_i = c_Z + g(x_i), g a sparse process of the environment, and the Coulomb matrix A of Gaussian charges with their self terms S:

    E = min over q, Σq = Q, of  ½ Σ J_i (q_i - q⁰_i)² + ½ qᵀ(A + S)q,   J_Z = κ η_Z.

κ small is charge equilibration (Rappé, Goddard, J. Phys. Chem. 95, 3358 (1991)), with electronegativities -J q⁰ of the environment as in
4G networks (Ko et al., Nat. Commun. 12, 398 (2021)). κ → ∞ is a branch of its own, `local`: q = q⁰ + (Q - Σq⁰)/n and E = ½ qᵀAq. As E is
least in q, forces need no dq/dr. With H = A + S + J, h = H⁻¹1, s = 1ᵀh, P = H⁻¹ - hhᵀ/s:

    q = P J q⁰ + h Q/s,   w = ∂E/∂q⁰ = J(q⁰ - q),   F = -wᵀ∂q⁰/∂r - ½ qᵀ(∂A/∂r)q.

The parameters are a: whitened weights of g, then the constants c. With K = ∂q⁰/∂a, what a fit and variances need are

    ∂q/∂a = P J K,   ∂w/∂a = J(K - ∂q/∂a),   ∂E/∂a = wᵀK,
    ∂F/∂a = -[wᵀ∂K/∂r + (∂q⁰/∂r)ᵀ∂w/∂a + ((∂A/∂r)q)ᵀ∂q/∂a],

and the same with strains. docs/notation.md has them by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from gpmlp.core import neighbors
from gpmlp.core.coulomb import CoulombMatrix, electronegativity, hardness
from gpmlp.core.environments import Descriptor, Environments, StructureEnvironments, strain_derivatives
from gpmlp.core.errors import UserError
from gpmlp.core.findings import Finding, warn_of
from gpmlp.core.neighbors import Neighbors
from gpmlp.core.particle_mesh import ParticleMesh, coulomb_sum
from gpmlp.core.quantities import Prediction
from gpmlp.core.stored_tensors import StoredTensors
from gpmlp.core.structures import CHUNK_ATOMS, Structures
from gpmlp.gp.covariances import CovarianceRows
from gpmlp.gp.kernels import ZonalKernel
from gpmlp.gp.variance import WhitenedRows
from gpmlp.potential.mean import EnergyTerm, MeanBlock

LOCAL = math.inf
CONVERGED = 1e-7  # e, what charges found by iteration may be off by
JACOBIANS = 32  # of so many atoms are in memory together
MOST_ITERATIONS = 300  # of these; a dozen or two are usual
STORED = 1e-6  # by which the factor of a prior covariance in a file may differ from it


@dataclass(frozen=True)
class ChargeForm:
    """Which of the family: κ (LOCAL: charges do not respond), and whether the local self energy ½ Σ S q⁰² is taken off, which the
    short-range part can learn."""

    kappa: float
    without_self: bool = False

    def __str__(self) -> str:
        name = "local" if self.kappa == LOCAL else f"polarisable, kappa {self.kappa:g}"
        return name + (", without the self energy of free charges" if self.without_self else "")


@dataclass(frozen=True, eq=False)
class ChargeBasis:
    """The functions whose sum is q⁰: values of a kernel at centres by species, whitened, and a constant of each species.

    Attributes:
        centres: by species in rising order, (M, features) x_j; lowers: (M, M) L of their covariance, L Lᵀ = k(x_j, x_k).
    """

    descriptor: Descriptor
    kernel: ZonalKernel
    centres: dict[int, Tensor]
    lowers: dict[int, Tensor]

    @property
    def species(self) -> tuple[int, ...]:
        return tuple(self.centres)

    @property
    def n_weights(self) -> int:
        """Columns of g, without the constants that follow."""
        return sum(map(len, self.centres.values()))

    @property
    def n_columns(self) -> int:
        return self.n_weights + len(self.centres)

    def columns(self, z: int) -> slice:
        """Those of g of a species."""
        sizes = [len(x) for other, x in self.centres.items() if other < z]
        return slice(sum(sizes), sum(sizes) + len(self.centres[z]))

    def physical(self, composition: Mapping[int, float], total: float = 0.0) -> Tensor:
        """(columns,) a of free charges (χ̄ - χ_Z)/η_Z: electronegativities of atoms, made equal at so many of each species together with
        a total charge (Sanderson, Science 114, 670 (1951))."""
        chi, eta = ({z: of(z) for z in self.species} for of in (electronegativity, hardness))
        inverse = sum(n / eta[z] for z, n in composition.items())
        mean = (sum(n * chi[z] / eta[z] for z, n in composition.items()) + total) / inverse
        out = next(iter(self.centres.values())).new_zeros(self.n_columns, dtype=torch.float64)
        out[self.n_weights :] = out.new_tensor([(mean - chi[z]) / eta[z] for z in self.species])
        return out

    def functions(self, structures: Structures) -> ChargeFunctions:
        """Of structures of the same number of atoms."""
        every = StructureEnvironments.from_structures(self.descriptor, structures)
        values = structures.positions.new_zeros(structures.n_atoms, self.n_columns, dtype=torch.float64)
        pieces = []
        for k, z in enumerate(self.centres):
            mine, here = (structures.species == z).nonzero()[:, 0], self.columns(z)
            values[mine, self.n_weights + k] = 1.0
            if not len(mine):
                continue
            parts = [self._at(every.select(some), z) for some in mine.split(JACOBIANS)]
            of_value, slopes = (torch.cat(column) for column in zip(*parts, strict=True))
            values[mine, here] = of_value
            pieces.append(_SpeciesSlopes(here, every.surroundings.pairs_of(mine)[1], slopes))
        owners, vectors = every.surroundings.centers, every.surroundings.vectors.double()
        return ChargeFunctions(len(structures), values, owners, every.neighbors.neighbors, vectors, tuple(pieces))

    def _at(self, part: Environments, z: int) -> tuple[Tensor, Tensor]:
        """Functions (environments, columns of the species) and their slopes (pairs, 3, columns of the species)."""
        x, lower = self.centres[z].double(), self.lowers[z]
        value, first, _ = self.kernel.profile(part.features.double() @ x.T)
        slopes = (part.jacobian().double() @ x.T) * first[part.surroundings.centers, None, :]
        value, flat = (
            torch.linalg.solve_triangular(lower, rows.T, upper=False).T for rows in (value, slopes.flatten(0, 1))
        )
        return value, flat.reshape(slopes.shape)


@dataclass(frozen=True, eq=False)
class _SpeciesSlopes:
    """Of the pairs with a centre of one species: slopes (pairs, 3, columns of the species) ∂K/∂r_ij."""

    columns: slice
    pairs: Tensor
    slopes: Tensor


@dataclass(frozen=True, eq=False)
class ChargeFunctions:
    """K = ∂q⁰/∂a of the atoms of some structures of n atoms each, and its derivatives by pair vectors.

    Attributes:
        structures: how many. values: (atoms, columns) K. owners, others: (pairs,) i and j; vectors: (pairs, 3) r_ij, A.
    """

    structures: int
    values: Tensor
    owners: Tensor
    others: Tensor
    vectors: Tensor
    pieces: tuple[_SpeciesSlopes, ...]

    def pair_gradients(self, a: Tensor) -> Tensor:
        """(pairs, 3) ∂q⁰_i/∂r_ij."""
        out = self.vectors.new_zeros(self.vectors.shape)
        for piece in self.pieces:
            out[piece.pairs] = piece.slopes @ a[piece.columns]
        return out

    def derivatives(self, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """∂q⁰/∂r (structures, n, 3n) and ∂q⁰/∂ε (structures, n, 6) from pair gradients: r_j moves with +, the centre itself with -."""
        atoms, shape = len(self.values), (self.structures, len(self.values) // self.structures, -1)
        n = shape[1]
        flat = gradients.new_zeros(atoms * n, 3)
        flat.index_add_(0, self.owners * n + self.others % n, gradients)
        flat.index_add_(0, self.owners * n + self.owners % n, -gradients)
        strained = strain_derivatives(gradients[:, :, None], self.owners, self.vectors, atoms)
        return flat.view(shape), strained.view(shape)

    def weighted(self, w: Tensor, strains: bool) -> tuple[Tensor, Tensor]:
        """Σ_i w_i ∂K_i/∂r (structures, 3n, columns) and, if wanted, Σ_i w_i ∂K_i/∂ε (structures, 6, columns), else zero."""
        atoms, m = self.values.shape
        on_atoms, strained = w.new_zeros(atoms, 3, m), w.new_zeros(self.structures, 6, m)
        for piece in self.pieces:
            owners, others = self.owners[piece.pairs], self.others[piece.pairs]
            pulled = piece.slopes * w[owners, None, None]
            part = pulled.new_zeros(atoms, *pulled.shape[1:])
            on_atoms[..., piece.columns] = part.index_add_(0, others, pulled).index_add_(0, owners, pulled, alpha=-1)
            if strains:
                structure = owners // (atoms // self.structures)
                vectors = self.vectors[piece.pairs]
                strained[..., piece.columns] = strain_derivatives(pulled, structure, vectors, self.structures)
        return on_atoms.view(self.structures, -1, m), strained


@dataclass(frozen=True, eq=False)
class CoulombMatrices:
    """Those of some structures of n atoms each (core/coulomb.CoulombMatrix), one after another.

    Attributes:
        self_terms: (structures, n); matrix: (structures, n, n); gradients: (structures, 3, n, n); strains: (structures, 6, n, n), None
            where no structure has a volume; shift: (structures,); positions: (structures, n, 3), A.
    """

    self_terms: Tensor
    matrix: Tensor
    gradients: Tensor
    strains: Tensor | None
    shift: Tensor
    positions: Tensor

    @staticmethod
    def of_structures(structures: Structures) -> CoulombMatrices:
        """Of structures of the same number of atoms."""
        every = [CoulombMatrix.of_structure(structures.select([i])) for i in range(len(structures))]
        fields = zip(*((c.self_terms, c.matrix, c.gradients, c.shift, c.positions) for c in every), strict=True)
        terms, matrix, gradients, shift, positions = (torch.stack(field) for field in fields)
        strains = torch.stack([c.strains for c in every]) if bool(structures.periodic.any()) else None
        return CoulombMatrices(terms, matrix, gradients, strains, shift, positions)

    def potential(self, charges: Tensor) -> Tensor:
        """(structures, n) A q, V, of charges (structures, n), e."""
        return (self.matrix @ charges[..., None])[..., 0]


@dataclass(frozen=True, eq=False)
class Equilibrium:
    """Charges of least energy, of one structure or, with a first dimension, of some.

    Attributes:
        charges: (n,) q, e. pull: (n,) w = ∂E/∂q⁰, eV/e. atom_energies: (n,) shares of E, eV.
        projector: (n, n) P of polarisable charges, where there is a matrix of A.
    """

    charges: Tensor
    pull: Tensor
    atom_energies: Tensor
    projector: Tensor | None


def equilibrate(
    form: ChargeForm, coulomb: CoulombMatrix | CoulombMatrices | ParticleMesh, free: Tensor, total: Tensor
) -> Equilibrium:
    """The charges of one structure, q = P J q⁰ + h Q/s or q⁰ + (Q - Σq⁰)/n of local ones, or of some with as many atoms: by Cholesky's
    factor of H, or to CONVERGED by iteration where A is no matrix.

    Args:
        free: (n,) q⁰, e. total: () Q, e. Both with a first dimension if of several structures.
    """
    s = coulomb.self_terms
    if form.kappa == LOCAL:
        q = free + ((total - free.sum(-1)) / free.shape[-1])[..., None]
        potential = coulomb.potential(q)
        return Equilibrium(q, potential - potential.mean(-1, keepdim=True), 0.5 * q * potential, None)
    j = form.kappa * s
    if isinstance(coulomb, ParticleMesh):
        q, projector = _iterated(coulomb, s + j, j * free, float(total)), None
    else:
        q, projector = _solved(coulomb, s + j, j * free, total)
    moved, off = q - free, s if form.without_self else torch.zeros_like(s)
    energies = 0.5 * (j * moved.square() + q * (coulomb.potential(q) + s * q) - off * free.square())
    return Equilibrium(q, -j * moved - off * free, energies, projector)


def _solved(
    coulomb: CoulombMatrix | CoulombMatrices, diagonal: Tensor, pull: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    """q of the least ½ qᵀ(A + D)q - bᵀq with a total charge, and P, for D and b (n,)."""
    h = coulomb.matrix + torch.diag_embed(diagonal) + coulomb.shift[..., None, None]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    along = inverse.sum(-1)
    shares = along / along.sum(-1, keepdim=True)
    projector = inverse - along[..., None] * shares[..., None, :]
    return (projector @ pull[..., None])[..., 0] + shares * total[..., None], projector


def _iterated(coulomb: ParticleMesh, diagonal: Tensor, pull: Tensor, total: float) -> Tensor:
    """q as `_solved`, by conjugate gradients on charges of that sum (Gould, Hribar, Nocedal, SIAM J. Sci. Comput. 23, 1376 (2001),
    algorithm 2.1), preconditioned by D + U Uᵀ, U the longest waves of A, whose inverse is Woodbury's."""
    waves = coulomb.longest_waves()
    over = waves / diagonal[:, None]
    inner = torch.linalg.cholesky(torch.eye(waves.shape[1]).to(over) + waves.T @ over)

    def preconditioned(residual: Tensor) -> Tensor:
        along = torch.cholesky_solve((over.T @ residual)[:, None], inner)[:, 0]
        return residual / diagonal - over @ along

    shares = preconditioned(torch.ones_like(diagonal))
    shares = shares / shares.sum()

    def neutral(residual: Tensor) -> Tensor:
        moved = preconditioned(residual)
        return moved - moved.sum() * shares

    q = preconditioned(pull)
    q = q + (total - q.sum()) * shares
    residual = pull - diagonal * q - coulomb.potential(q)
    step = move = neutral(residual)
    for _ in range(MOST_ITERATIONS):
        if float(step.abs().max()) < CONVERGED:
            return q + (total - q.sum()) * shares
        power, against = residual @ step, diagonal * move + coulomb.potential(move)
        length = power / (move @ against)
        q, residual = q + length * move, residual - length * against
        step = neutral(residual)
        move = step + (residual @ step / power) * move
    raise UserError(
        f"Charges of {len(q)} atoms did not converge to {CONVERGED:g} e in {MOST_ITERATIONS} iterations: look for atoms or a cell out of "
        "the ordinary."
    )


def _responses(form: ChargeForm, coulomb: CoulombMatrices, found: Equilibrium, k: Tensor) -> tuple[Tensor, Tensor]:
    """∂q/∂a = P J K and ∂w/∂a = J(K - ∂q/∂a) (structures, n, columns)."""
    if found.projector is None:
        dq = k - k.mean(1, keepdim=True)
        dw = coulomb.matrix @ dq
        return dq, dw - dw.mean(1, keepdim=True)
    s = coulomb.self_terms[..., None]
    j = form.kappa * s
    dq = found.projector @ (j * k)
    return dq, j * (k - dq) - (s * k if form.without_self else 0.0)


@dataclass(frozen=True, eq=False)
class ElectrostaticColumns:
    """E, F, σ and q of structures, and their derivatives by a.

    Attributes:
        values: of E (structures, 1), F (3 atoms, 1) and σ (6 structures, 1; zero without volume). columns: of the same, (·, columns).
        charges: (atoms,) q; of_charges: (atoms, columns) ∂q/∂a.
    """

    values: CovarianceRows
    columns: CovarianceRows | None
    charges: Tensor
    of_charges: Tensor | None


@dataclass(frozen=True, eq=False)
class EqualStructures:
    """What E_ES of some structures of n atoms each is made of, whatever a: to be evaluated many times, all at once.

    Attributes:
        per_volume: (structures, 1, 1) 1/V, 1/A³; 0 without volume. totals: (structures,) Q, e.
    """

    coulomb: CoulombMatrices
    functions: ChargeFunctions
    per_volume: Tensor
    totals: Tensor

    @staticmethod
    def of_structures(basis: ChargeBasis, structures: Structures) -> list[EqualStructures]:
        """Of consecutive structures that have as many atoms, about CHUNK_ATOMS together."""
        counts, first, out = structures.counts.tolist(), 0, []
        for n, run in groupby(counts):
            end = first + len(list(run))
            each = max(1, CHUNK_ATOMS // n)
            out += [structures.select(range(k, min(k + each, end))) for k in range(first, end, each)]
            first = end
        return [EqualStructures._make(basis, part) for part in out]

    @staticmethod
    def _make(basis: ChargeBasis, structures: Structures) -> EqualStructures:
        matrices = CoulombMatrices.of_structures(structures)
        per_volume = torch.nan_to_num(1 / structures.volumes.to(matrices.matrix))[:, None, None]
        totals = structures.charges.to(matrices.matrix)
        return EqualStructures(matrices, basis.functions(structures), per_volume, totals)

    def evaluate(self, form: ChargeForm, a: Tensor, columns: bool = True) -> ElectrostaticColumns:
        """At parameters a (columns,): E, F = -wᵀ∂q⁰/∂r - ½ qᵀ(∂A/∂r)q and σ; `columns`: whether their derivatives are wanted."""
        functions, coulomb, k = self.functions, self.coulomb, self.functions.values
        shape = coulomb.self_terms.shape
        found = equilibrate(form, coulomb, (k @ a).view(shape), self.totals)
        q, w = found.charges, found.pull
        free_r, free_strain = functions.derivatives(functions.pair_gradients(a))
        # (∂A/∂r_j q)_i = q_j ∂A_ij/∂d for j ≠ i, and minus the sum of these for j = i
        field = coulomb.gradients * q[:, None, None, :]
        moved = field.permute(0, 2, 3, 1).contiguous()
        moved.diagonal(dim1=1, dim2=2).sub_(field.sum(3))
        coulomb_r = moved.flatten(2)
        coulomb_strain = None
        if coulomb.strains is not None:
            coulomb_strain = (coulomb.strains @ q[:, None, :, None])[..., 0].mT
        values = CovarianceRows(
            found.atom_energies.sum(1, keepdim=True),
            -_along(w, free_r, 0.5 * q, coulomb_r).reshape(-1, 1),
            (self.per_volume * _along(w, free_strain, 0.5 * q, coulomb_strain)).reshape(-1, 1),
        )
        if not columns:
            return ElectrostaticColumns(values, None, q.flatten(), None)
        k = k.view(*shape, -1)
        dq, dw = _responses(form, coulomb, found, k)
        weighted_r, weighted_strain = functions.weighted(w.flatten(), coulomb_strain is not None)
        forces = -(weighted_r + _along(dw.mT, free_r, dq.mT, coulomb_r).mT)
        if coulomb_strain is not None:
            weighted_strain += _along(dw.mT, free_strain, dq.mT, coulomb_strain).mT
        stresses = self.per_volume * weighted_strain
        rows = CovarianceRows((w[:, None] @ k)[:, 0], forces.flatten(0, 1), stresses.flatten(0, 1))
        return ElectrostaticColumns(values, rows, q.flatten(), dq.flatten(0, 1))


def _along(w: Tensor, of_free: Tensor, q: Tensor, of_coulomb: Tensor | None) -> Tensor:
    """w.∂q⁰ + q.(∂A q) of each structure, (structures, n, ·) both, for w and q (structures, n) or (structures, columns, n)."""
    w, q = (x[:, None] if x.dim() == 2 else x for x in (w, q))
    return w @ of_free if of_coulomb is None else w @ of_free + q @ of_coulomb


@dataclass(frozen=True, eq=False)
class ChargePosterior:
    """The posterior of a joint with the weights of the short-range columns: with R the factor of these alone, that of both is
    [[R, R_c], [0, R_cc]].

    Attributes:
        scale: (columns,) prior standard deviations of a; cross: (short-range columns, columns) R_c; factor: (columns, columns) R_cc.
    """

    scale: Tensor
    cross: Tensor
    factor: Tensor

    def extend(self, b: Tensor, rows: Tensor | None = None) -> Tensor:
        """[R⁻ᵀa | R_cc⁻ᵀ(D c - R_cᵀ R⁻ᵀa)] from R⁻ᵀa (n, short-range columns) and the derivatives c (n, columns) by a, none if None."""
        right = -(b @ self.cross) if rows is None else rows * self.scale - b @ self.cross
        return torch.cat([b, torch.linalg.solve_triangular(self.factor.T, right.T, upper=False).T], dim=1)


@dataclass(frozen=True, eq=False)
class ChargeModel:
    """Charges and electrostatic energy of structures: a form, a basis and its parameters.

    Attributes:
        parameters: (columns,) a; start: (columns,) mean of their prior. posterior: of a; None where it counts as known.
        move: (columns,) δ of a sample, whose energy is E(a) + δ.∂E/∂a, as the posterior and shifts of left-out structures are of models
            that are linear in a (docs/decisions/025-error-bars-of-functionals.md); None = none.
    """

    form: ChargeForm
    basis: ChargeBasis
    parameters: Tensor
    start: Tensor
    posterior: ChargePosterior | None = None
    move: Tensor | None = None

    @cached_property
    def _ends(self) -> tuple[float, ChargeModel, ChargeModel]:
        """t, and the models at a + δ/(2t) and a - δ/(2t), at about a charge from the mean."""
        assert self.move is not None, "it has moved"
        size = max(0.5, float(self.move.abs().max()))
        ahead, behind = (
            replace(self, parameters=self.parameters + s / size * self.move, move=None) for s in (0.5, -0.5)
        )
        return size, ahead, behind

    @cached_property
    def _free(self) -> EnergyTerm:
        """g as a sum over centres, without the constants."""
        blocks = {}
        for z, x in self.basis.centres.items():
            a = self.parameters[self.basis.columns(z), None]
            weights = torch.linalg.solve_triangular(self.basis.lowers[z].T, a, upper=True)[:, 0]
            blocks[z] = MeanBlock(x, weights.to(x), x[:0])
        return EnergyTerm(self.basis.descriptor, self.basis.kernel, blocks)

    def __call__(self, structures: Structures, pairs: Neighbors | None = None) -> Prediction:
        """Electrostatic energies, forces, stresses, and charges, of structures.

        Args:
            pairs: neighbours within the cutoff or more, if they are there already.
        """
        found = self._at_parameters(structures, pairs)
        if self.move is None:
            return found
        size, *ends = self._ends  # everything is quadratic in a, so that the difference of two is exact
        ahead, behind = (end(structures, pairs) for end in ends)
        return found + ahead.map(lambda value: size * value) + behind.map(lambda value: -size * value)

    def _at_parameters(self, structures: Structures, pairs: Neighbors | None) -> Prediction:
        """As if there were no move."""
        view = self._free.environments(structures, pairs)
        free, cotangents = self._free.local_energies(view.environments)
        constants = self.parameters[self.basis.n_weights :]
        for z, constant in zip(self.basis.species, constants.tolist(), strict=True):
            free = torch.where(structures.species == z, free + constant, free)
        parts, pull, offsets = [], torch.zeros_like(free), structures.offsets.tolist()
        for i, (first, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
            coulomb = coulomb_sum(structures.select([i]))
            found = equilibrate(self.form, coulomb, free[first:end].double(), structures.charges[i].double())
            parts.append((found.atom_energies, found.charges, *coulomb.energy_gradients(found.charges)))
            pull[first:end] = found.pull
        gradients = view.environments.pull_back(pull[:, None] * cotangents)
        vectors, like = view.surroundings.vectors, structures.positions
        energies, charges, on_atoms = (torch.cat(column).to(like) for column in list(zip(*parts, strict=True))[:3])
        strained = torch.stack([part[3] for part in parts]).to(like)
        forces = -on_atoms
        neighbors.add_pair_gradients(structures, view.neighbors, vectors, gradients, forces, strained)
        out = neighbors.prediction_from_sums(structures, energies, forces, strained)
        return replace(out, charges=charges, electrostatic=out.energies)

    def joint_factor(self, factor: Tensor) -> Tensor:
        """R of the short-range columns with those of charges behind them, if these have a posterior."""
        if self.posterior is None:
            return factor
        below = torch.cat([torch.zeros_like(self.posterior.cross).T, self.posterior.factor], dim=1)
        return torch.cat([torch.cat([factor, self.posterior.cross], dim=1), below])

    def moved(self, deviations: Tensor) -> tuple[ChargeModel, ...]:
        """Models whose parameters move by so many prior standard deviations (columns, k), to first order, and have no posterior."""
        if self.posterior is None:
            return (replace(self, posterior=None),) * deviations.shape[1]
        moves = self.posterior.scale[:, None] * deviations
        return tuple(replace(self, posterior=None, move=move) for move in moves.T)

    def with_charges(self, structures: Structures, rows: WhitenedRows) -> WhitenedRows:
        """Whitened rows of short-range columns with those of charges, in what the data leave open."""
        if self.posterior is None:
            return rows
        columns, b = self.columns(structures), rows.b
        pairs = ((getattr(b, kind), getattr(columns, kind)) for kind in ("energies", "forces", "stresses"))
        return replace(rows, b=CovarianceRows(*(self.posterior.extend(x, c[: len(x)]) for x, c in pairs)))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a model file holds of it: a JSON-able header and tensors; its descriptor and kernel are the first ones of the mean."""
        header = {
            "kappa": None if self.form.kappa == LOCAL else self.form.kappa,
            "without_self": self.form.without_self,
            "species": list(self.basis.species),
        }
        tensors = {"parameters": self.parameters, "start": self.start}
        tensors |= {} if self.move is None else {"move": self.move}
        if self.posterior is not None:
            tensors |= {f"posterior.{name}": value for name, value in vars(self.posterior).items()}
        for z in self.basis.species:
            tensors |= {f"Z{z}.centres": self.basis.centres[z], f"Z{z}.lower": self.basis.lowers[z]}
        return header, tensors

    @staticmethod
    def from_state(
        header: dict[str, Any], stored: StoredTensors, descriptor: Descriptor, kernel: ZonalKernel, short: int
    ) -> ChargeModel:
        """Restore what `state` gave.

        Args:
            short: short-range columns that variances have.

        Raises:
            UserError: tensors that do not fit each other and the descriptor, or are not those of the kernel.
        """
        form = ChargeForm(LOCAL if header["kappa"] is None else header["kappa"], header["without_self"])
        centres, lowers = {}, {}
        for z in header["species"]:
            x = centres[z] = stored.take(f"Z{z}.centres", ("centres", descriptor.n_features))
            lowers[z] = stored.take(f"Z{z}.lower", (len(x), len(x)))
            hardness(z)
            off = lowers[z] @ lowers[z].T - kernel.value(x @ x.T)
            if bool(
                (off.abs() > STORED).any() or (lowers[z].diagonal() <= 0).any() or (lowers[z] != lowers[z].tril()).any()
            ):
                raise UserError("the factor of the prior covariance of free charges is that of others.")
        basis = ChargeBasis(descriptor, kernel, centres, lowers)
        m, part, posterior = basis.n_columns, stored.part("posterior."), None
        if len(part):
            scale, cross = part.take("scale", (m,)), part.take("cross", (short, m))
            posterior = ChargePosterior(scale, cross, part.take("factor", (m, m)))
            upper = posterior.factor
            if bool((scale <= 0).any() or (upper != upper.triu()).any() or (upper.diagonal().abs() < 1 - STORED).any()):
                raise UserError("the posterior of free charges is smaller than that without any data, or none.")
        move = stored.take("move", (m,)) if "move" in stored else None
        return ChargeModel(form, basis, stored.take("parameters", (m,)), stored.take("start", (m,)), posterior, move)

    def columns(self, structures: Structures) -> CovarianceRows:
        """∂/∂a of energies, forces and stresses of structures, one after another."""
        parts = [
            one.evaluate(self.form, self.parameters).columns
            for one in EqualStructures.of_structures(self.basis, structures)
        ]
        return stack_rows([part for part in parts if part is not None])


def stack_rows(parts: Sequence[CovarianceRows]) -> CovarianceRows:
    """Rows of several structures."""
    return CovarianceRows(
        *(torch.cat(rows) for rows in zip(*((p.energies, p.forces, p.stresses) for p in parts), strict=True))
    )


def warn_of_total_charges(structures: Structures, known: Sequence[float]) -> None:
    """Warn (FindingWarning) where total charges are beyond the smallest and largest of a training."""
    charges = structures.charges.cpu()
    outside = ((charges < min(known) - 1e-6) | (charges > max(known) + 1e-6)).nonzero().flatten().tolist()
    if not outside:
        return
    charge = float(charges[outside[0]])
    text = f"the total charge {charge:g} e is outside those of the training, {min(known):g} to {max(known):g} e."
    advice = "Error bars are too small there; label some structures with this charge."
    names = tuple(structures.names[i] for i in outside)
    warn_of(
        Finding("charge-outside-training", "warning", text, names, {"total_charge_e": charge}, advice), stacklevel=3
    )
