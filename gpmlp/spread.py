"""Spread is the standard deviation of local energies as a function of positions: its values, and its slopes as forces and stress."""

from __future__ import annotations

import torch
from torch import Tensor

from gpmlp import checks, neighbors
from gpmlp.gp.covariances import InducingBlock
from gpmlp.gp.kernels import ZonalKernel
from gpmlp.potential import Potential
from gpmlp.quantities import Prediction
from gpmlp.structures import Structures

LEAST = 1e-6  # eV, of a standard deviation that is divided by


def spread(potential: Potential, structures: Structures) -> Prediction:
    """The sum over atoms of the posterior standard deviation of their local energies, uncalibrated, and its derivatives.

    var_i = w (k_ii - a.a) + |R⁻ᵀ a|² with a = D L⁻¹ k_u(x_i), so
    dvar_i = 2 (L⁻ᵀ D (R⁻¹ R⁻ᵀ a - w a)) . dk_u(x_i): for each atom a mean with
    weights of its own, pulled back as that of the potential is.

    Returns:
        energies Σ σ_i and atom_energies σ_i (eV), forces -∂Σσ/∂r (eV/A): they point to where the potential is sure;
        stresses (eV/A^3).

    Raises:
        checks.UserError: a model without variances; a species that it does not know.
    """
    model = potential.variances
    if model is None:
        raise checks.UserError("This model holds no posterior factor, so it has no standard deviations: fit it again.")
    potential.check_species(structures)
    structures = structures.to(device=potential.recipe.device, dtype=getattr(torch, potential.recipe.dtype))
    views = [term.view(structures) for term in potential.terms]
    a, left = model.whitened(model.atom_rows([view.environments for view in views]))
    prior = sum(p.atom_energies(structures.species, structures.positions) for p in model.priors)
    std = (model.amplitude * (prior - a.square().sum(1)) + left.square().sum(1)).clamp_min(LEAST**2).sqrt()
    inner = torch.linalg.solve_triangular(model.factor, left.T, upper=True).T - model.amplitude * a
    weights = inner * model.signal / std[:, None]
    total, start, lowers = None, 0, iter(model.lowers)
    for prior_of, blocks, view in zip(model.priors, model.blocks, views, strict=True):
        features = view.environments.features
        cotangents = torch.zeros_like(features)
        for block in blocks:
            here = slice(start, start + block.n_columns)
            start, lower = here.stop, next(lowers)
            mine = (structures.species == block.species).nonzero()[:, 0]
            if len(mine):
                own = torch.linalg.solve_triangular(lower.T, weights[mine][:, here].T, upper=True).T
                cotangents[mine] = slopes(block, prior_of.kernel, features[mine], own.to(features))
        gradients = view.environments.pull_back(cotangents)
        local = std.to(features) if total is None else torch.zeros_like(std)
        part = neighbors.prediction(structures, view.neighbors, view.surroundings.vectors, local, gradients)
        total = part if total is None else total + part
    return total


def slopes(block: InducingBlock, kernel: ZonalKernel, x: Tensor, weights: Tensor) -> Tensor:
    """∂/∂x_i Σ_u w_iu k_u(x_i), with weights (environments, columns) of each environment's own; (environments, features)."""
    m, r = block.tangents.shape[:2]
    full = weights.new_zeros(len(x), m + m * r)
    full[:, block.kept] = weights
    alpha, gamma = full[:, :m], full[:, m:].reshape(-1, m, r)
    _, first, second = kernel.profile(x @ block.features.T)
    along = (x @ block.tangents.flatten(0, 1).T).reshape(-1, m, r)
    on_centres = alpha * first + second * (gamma * along).sum(2)
    on_tangents = (first[:, :, None] * gamma).flatten(1)
    return on_centres @ block.features + on_tangents @ block.tangents.flatten(0, 1)
