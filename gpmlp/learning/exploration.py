"""Exploration of thinly sampled regions: displacements along rare directions, ascent of σ, and biased dynamics."""

from __future__ import annotations

import torch
from torch import Tensor

from gpmlp.core import errors, neighbors
from gpmlp.core.environments import Environments, StructureEnvironments
from gpmlp.core.quantities import Prediction
from gpmlp.core.structures import Structures
from gpmlp.gp.covariances import Block
from gpmlp.gp.functionals import FunctionalBlock
from gpmlp.gp.kernels import ZonalKernel
from gpmlp.learning.triggers import too_close
from gpmlp.potential.potential import Potential
from gpmlp.uncertainty.mahalanobis import SpeciesClusters

LEAST = 1e-6  # eV, of a standard deviation that is divided by
SMALLEST = 1e-3  # of the largest singular value of a Jacobian: directions that positions hardly move are left out
SHRINK = 0.7  # of a step that brought atoms too close or led nowhere
TRIES = 12
DIRECTIONS = 4  # of which the one that leads to the greatest novelty is taken


def explored_structure(
    k: int, potential: Potential, start: Structures, radius_A: float, share: float
) -> tuple[Structures, str]:
    """The k-th structure of a series, and how it was made: in turn along a rare direction (around each atom with neighbours) and up the
    slope of σ."""
    atoms = neighbors.find_neighbors(start, potential.terms[0].descriptor.cutoff).centers.unique().tolist()
    if k % 2 or not atoms:
        return ascend_uncertainty(
            potential, start, radius_A, share=share
        ), "explored: up the slope of the standard deviations"
    atom = atoms[k // 2 % len(atoms)]
    return displace_rare(potential, start, atom, radius_A, share), f"explored: a rare direction around atom {atom}"


def displace_rare(
    potential: Potential, structure: Structures, atom: int, radius_A: float = 0.3, share: float = 0.6
) -> Structures:
    """Displace the neighbourhood of an atom along a thinly sampled direction of descriptor space.

    Of the principal directions e_k of the environments of this species (Mahalanobis clusters, in the cluster nearest to the atom)
    each is mapped to displacements by the pseudo-inverse of the Jacobian of the atom's features, δ_k = J⁺ e_k. Of the few that move
    features farthest in standard deviations per A, with either sign, the one is taken that leads to the greatest novelty.

    Args:
        structure: one structure.
        radius_A: trust radius: the largest displacement of an atom.
        share: least distance of atoms, of the sum of their covalent radii (as `too_close`).

    Raises:
        UserError: a model without novelty; an atom without neighbours, or of a species without data.
    """
    if potential.novelty is None:
        raise errors.UserError("This model holds no Mahalanobis distances (novelty: false); fit it again.")
    z = int(structure.species[atom])
    clusters = potential.novelty.species.get(z)
    if clusters is None:
        raise errors.UserError(
            f"{structure.names[0]}: {errors.chemical_symbol(z)} has no data in this model; label a structure with it first."
        )
    descriptor = potential.terms[0].descriptor
    view = StructureEnvironments.from_structures(descriptor, structure)
    jacobian = _jacobian_by_atom(structure, view, descriptor(view.surroundings.select(torch.tensor([atom]))), atom)
    if not jacobian.abs().sum() > 0:
        raise errors.UserError(f"{structure.names[0]}: atom {atom} has no neighbours within {descriptor.cutoff:g} A.")
    best, highest = structure, -1.0
    for displacement in _rarest(clusters, view.environments.features[atom].double(), jacobian):
        moved = _within(structure, displacement, radius_A, share)
        novelty = potential(moved, novelty=True).novelty
        assert novelty is not None
        if float(novelty.max()) > highest:
            best, highest = moved, float(novelty.max())
    return best


def _jacobian_by_atom(
    structure: Structures, view: StructureEnvironments, environment: Environments, atom: int
) -> Tensor:
    """(features, 3 atoms): how the features of an atom change with all positions."""
    jacobian = environment.jacobian().double()  # (pairs, 3, features)
    pairs = view.surroundings.pairs_of(torch.tensor([atom]))[1]
    out = jacobian.new_zeros(structure.n_atoms, 3, jacobian.shape[2])
    out.index_add_(0, view.neighbors.neighbors[pairs], jacobian)
    out[atom] -= jacobian.sum(0)
    return out.flatten(0, 1).T


def _rarest(clusters: SpeciesClusters, x: Tensor, jacobian: Tensor) -> Tensor:
    """(2 DIRECTIONS, atoms, 3) displacements, rarest first, each with its opposite."""
    whitening, _ = clusters.precision
    nearest = int(clusters.squared(x[None])[0].argmin())
    inverse = whitening[nearest].T @ whitening[nearest]
    vectors = torch.linalg.eigh(inverse).eigenvectors
    u, s, vh = torch.linalg.svd(jacobian, full_matrices=False)
    moving = s > SMALLEST * s[0]
    directions = clusters.components.to(jacobian) @ vectors
    displacements = vh[moving].T @ ((u[:, moving].T @ directions) / s[moving, None])
    unit = displacements / displacements.norm(dim=0).clamp_min(1e-300)
    # how many standard deviations features move per A, in all directions together
    moved = whitening[nearest] @ (clusters.components.to(jacobian).T @ (jacobian @ unit))
    order = moved.norm(dim=0).argsort(descending=True)[:DIRECTIONS]
    chosen = unit[:, order].T.reshape(len(order), -1, 3)
    return torch.stack([chosen, -chosen], dim=1).flatten(0, 1)


def ascend_uncertainty(
    potential: Potential, structure: Structures, radius_A: float = 0.3, steps: int = 10, share: float = 0.6
) -> Structures:
    """Move atoms up the slope of the sum of the standard deviations of local energies, each by at most radius_A.

    Steps that bring atoms too close or do not lead upwards are made smaller.
    """
    size, here = radius_A / steps * 2, structure
    value = summed_std(potential, here)
    for _ in range(steps):
        uphill = -value.forces
        longest = float(uphill.norm(dim=1).max())
        if longest == 0 or size < 1e-3 * radius_A:
            break
        shift = here.positions + size * uphill / longest - structure.positions
        shift = shift * (radius_A / shift.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)
        moved = _moved(structure, shift)
        higher = summed_std(potential, moved) if too_close(moved, share) is None else None
        if higher is None or float(higher.energies[0]) <= float(value.energies[0]):
            size *= SHRINK
        else:
            here, value = moved, higher
    return here


def _within(structure: Structures, displacement: Tensor, radius_A: float, share: float) -> Structures:
    """Displaced so that the atom that moves farthest moves by the radius, or less where atoms would come too close."""
    size = radius_A / float(displacement.norm(dim=1).max().clamp_min(1e-12))
    for _ in range(TRIES):
        moved = _moved(structure, size * displacement)
        if too_close(moved, share) is None:
            return moved
        size *= SHRINK
    return structure


def _moved(structure: Structures, shift: Tensor) -> Structures:
    return structure.with_positions(structure.positions + shift.to(structure.positions))


class UncertaintyBias:
    """Uncertainty as a bias of dynamics, E - τ Σ σ_i, with τ such that the bias forces are a share of the forces.

    After Zaverkin et al., npj Comput. Mater. 10, 83 (2024): rescaling by the ratio of running rms forces makes one setting do for
    all systems. τ follows from where the trajectory is and holds no memory, so that a run can be resumed anywhere.

    Attributes:
        share: rms of the bias forces, in units of the rms forces.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, potential: Potential, structure: Structures, forces: Tensor) -> tuple[float, Tensor, Tensor]:
        """(−τ Σ σ_i, bias forces (atoms, 3), bias stress (3, 3)) to add to those of the potential; τ is a number here, not a
        function of positions, so the biased energy is not conserved: use a thermostat."""
        std = summed_std(potential, structure)
        rms, std_rms = (float(f.square().mean().sqrt()) for f in (forces, std.forces))
        tau = self.share * rms / std_rms if std_rms > 0 else 0.0
        return -tau * float(std.energies[0]), -tau * std.forces, -tau * std.stresses[0]


def summed_std(potential: Potential, structures: Structures) -> Prediction:
    """The sum over atoms of the posterior standard deviation of their local energies, uncalibrated, and its derivatives.

    var_i = w (k_ii - a.a) + |R⁻ᵀ a|² with a = D L⁻¹ k_u(x_i), so
    dvar_i = 2 (L⁻ᵀ D (R⁻¹ R⁻ᵀ a - w a)) . dk_u(x_i): for each atom a mean with
    weights of its own, pulled back as that of the potential is.

    Returns:
        energies Σ σ_i and atom_energies σ_i (eV), forces -∂Σσ/∂r (eV/A), towards smaller uncertainty;
        stresses (eV/A^3).

    Raises:
        UserError: a model without variances; a species that it was not fitted to.
    """
    model = potential.variances
    if model is None:
        raise errors.UserError("This model holds no posterior factor, so it has no standard deviations: fit it again.")
    potential.check_species(structures)
    structures = structures.to(device=potential.recipe.device, dtype=getattr(torch, potential.recipe.dtype))
    environments = [term.environments(structures) for term in potential.terms]
    a, left = model.whiten(model.atom_rows([view.environments for view in environments]))
    prior = sum(p.atom_energies(structures.species, structures.positions) for p in model.priors)
    std = (model.amplitude * (prior - a.square().sum(1)) + left.square().sum(1)).clamp_min(LEAST**2).sqrt()
    inner = torch.linalg.solve_triangular(model.factor, left.T, upper=True).T - model.amplitude * a
    weights = inner * model.signal / std[:, None]
    total: Prediction | None = None
    start, lowers = 0, iter(model.lowers)
    for prior_of, blocks, view in zip(model.priors, model.blocks, environments, strict=True):
        features = view.environments.features
        cotangents = torch.zeros_like(features)
        for block in blocks:
            here = slice(start, start + block.n_columns)
            start, lower = here.stop, next(lowers)
            for z in block.central_species:
                mine = (structures.species == z).nonzero()[:, 0]
                if not len(mine):
                    continue
                unwhitened = torch.linalg.solve_triangular(lower.T, weights[mine][:, here].T, upper=True).T
                cotangents[mine] = kernel_gradients(block, z, prior_of.kernel, features[mine], unwhitened.to(features))
        gradients = view.environments.pull_back(cotangents)
        local = std.to(features) if total is None else torch.zeros_like(std)
        part = neighbors.assemble_prediction(structures, view.neighbors, view.surroundings.vectors, local, gradients)
        total = part if total is None else total + part
    assert total is not None
    return total


def kernel_gradients(block: Block, z: int, kernel: ZonalKernel, x: Tensor, weights: Tensor) -> Tensor:
    """∂/∂x_i Σ_u w_iu k_u(x_i) of environments of a species of the block, with weights (environments, columns) for each; (environments,
    features)."""
    if isinstance(block, FunctionalBlock):
        return block.local_slopes(kernel, z, x, weights)
    alpha, gamma = block.expand_columns(weights)
    _, first, second = kernel.profile(x @ block.features.T)
    along = (x @ block.tangents.flatten(0, 1).T).view_as(gamma)
    on_centres = alpha * first + second * (gamma * along).sum(2)
    on_tangents = (first[:, :, None] * gamma).flatten(1)
    return on_centres @ block.features + on_tangents @ block.tangents.flatten(0, 1)
