"""The inducing variables of a fit: centres chosen from the data with their gradients, functionals of the data themselves, or all of these
and centres for variances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gpmlp import descriptors
from gpmlp.core import errors
from gpmlp.core.environments import Descriptor
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting import exact_model, sparse_points
from gpmlp.fitting.exact_model import ExactModel
from gpmlp.fitting.regression import InducingModel, OwnRows
from gpmlp.fitting.sparse_points import Candidates, CentreChoice
from gpmlp.fitting.workers import Report, silent
from gpmlp.gp import functionals, inducing
from gpmlp.gp.functionals import FunctionalBlock
from gpmlp.gp.kernels import ZonalKernel, make_kernel
from gpmlp.recipe import Recipe

ROUNDING = 1e-7  # of the largest standard deviation of a functional; one of less is rounding


def make_models(
    recipe: Recipe,
    structures: Structures,
    candidates_of: Callable[[int, CentreChoice], Candidates],
    fitted: Structures,
    targets: Targets,
    report: Report = silent,
    growing: bool = False,
) -> tuple[list[InducingModel], dict[int, int]]:
    """Choose the inducing variables of every descriptor.

    Args:
        candidates_of: all environments that centres may be, by the number of the descriptor.
        fitted, targets: structures whose functionals may be inducing variables, and their labels less the baselines.
        report: of the structures whose functionals have met those of all others.
        growing: whether more structures are to come.

    Returns:
        the models, and the number of environments of each species.
    """
    models: list[InducingModel] = []
    counts: dict[int, int] = {}
    species, exactly = structures.distinct_species, goes_exactly(recipe, fitted, targets, growing)
    for k, (d, kern, ind) in enumerate(zip(recipe.descriptors, recipe.kernels, recipe.inducings, strict=True)):
        descriptor = descriptors.learn_descriptor(species, d.model_dump(), fitted, recipe.seed)
        kernel = make_kernel(kern)
        if ind.functionals and not exactly:
            # they are none of these environments, which novelty learns from all the same
            counts = candidates_of(k, CentreChoice(descriptor, kernel, "random", 1, "species", recipe.seed)).counts
            models.append(_functional_model(recipe, k, descriptor, kernel, fitted, targets, report))
            continue
        gradients = ind.gradients or 0  # a resolved recipe has numbers for both
        shares: str | dict[int, int]
        if isinstance(ind.shares, dict):
            wanted, shares = sum(ind.shares.values()), {errors.atomic_number(s): n for s, n in ind.shares.items()}
        else:
            wanted, shares = ind.n or 1, ind.shares
        if wanted > structures.n_atoms:
            raise errors.UserError(
                f"inducing.n asks for {wanted} inducing points, but the training data hold only {structures.n_atoms} "
                f"environment{'s' * (structures.n_atoms != 1)} (atoms); ask for fewer."
            )
        candidates = candidates_of(k, CentreChoice(descriptor, kernel, ind.method, wanted, shares, recipe.seed))
        counts = candidates.counts
        built = [
            sparse_points.make_block(z, features, surroundings, descriptor, kernel, gradients)
            for z, (features, surroundings) in candidates.chosen().items()
        ]
        blocks, lowers = tuple(b for b, _, _ in built), tuple(lower for _, lower, _ in built)
        asked = sum(len(block.features) * (1 + gradients) for block in blocks)
        models.append(InducingModel(descriptor, kernel, blocks, lowers, max(jitter for *_, jitter in built), asked))
    if exactly:
        about = models[0].descriptor, models[0].kernel, fitted, targets, report, growing
        models = [replace(models[0], exact=ExactModel.from_labels(recipe, *about))]
    return models, counts


def goes_exactly(recipe: Recipe, structures: Structures, targets: Targets, growing: bool = False) -> bool:
    """Whether the mean is that of all functionals by a Cholesky factorisation, with variances of centres.

    Args:
        growing: whether labels are to come, so that there are no variances of all functionals.
    """
    wanted = all(i.functionals == "all" for i in recipe.inducings)
    all_columns = recipe.variance is not False and recipe.variance.columns == "all" and not growing
    return wanted and not all_columns and not exact_model.why_not_exact(recipe, structures, targets)


def _functional_model(
    recipe: Recipe,
    k: int,
    descriptor: Descriptor,
    kernel: ZonalKernel,
    structures: Structures,
    labels: Targets,
    report: Report,
) -> InducingModel:
    """Functionals of structures in random order: all that have labels, or those of the first ones that have as many as are asked for."""
    like, structures = structures.positions, structures.to(dtype=torch.float64)
    maps = exact_model.label_maps(structures, labels)
    wanted = recipe.inducings[k].functionals
    order, fewest = exact_model.random_order(structures, torch.tensor([len(m) for m in maps]), recipe.seed)
    total = torch.tensor([len(maps[i]) for i in order]).cumsum(0)
    many = len(maps) if wanted in (None, "all") else min(len(maps), int((total < int(wanted)).sum()) + 1)
    chosen = order[: max(many, fewest)]
    structures, labels, maps = structures.select(chosen), labels.select(structures, chosen), [maps[i] for i in chosen]
    species = structures.distinct_species
    block = FunctionalBlock.make(descriptor, structures, maps, dict.fromkeys(species, 1.0))
    if len(species) > 1:
        block = block.of_species(exact_model.first_evidence(recipe, k, kernel, block, labels).signal)
    note = f"covariances of {block.n_columns} functionals"
    half, of = block.lower_K_uu(kernel, lambda done, total: report(done, total, note)), tuple(chosen.tolist())
    columns, lower, jitter, whitened = _independent(half, inducing.rank_tolerance(like))
    own = None
    if wanted == "all":
        pieces, places = whitened.split([len(m) for m in block.maps]), order.argsort().tolist()
        own = OwnRows(tuple(block.maps[i] for i in places), tuple(pieces[i] for i in places))
    block = block.select(columns).to(like)
    about = of[: len(block.structures)], own
    return InducingModel(descriptor, kernel, (block,), (lower,), jitter, int(total[len(of) - 1]), *about)


def _independent(half: Tensor, tolerance: float = inducing.RANK_TOLERANCE) -> tuple[Tensor, Tensor, float, Tensor]:
    """Of functionals those that do not depend on others; L of their covariance; the jitter it took; and of all functionals the covariances
    with them, whitened: k L⁻ᵀ.

    Args:
        half: (n, n) covariance, of which the lower half counts; tolerance: of the prior variance, less than which is dependent.
    """
    square = functionals.mirrored(half)
    scale = square.diagonal().clamp_min(0).sqrt()
    # where symmetry forbids a force, its covariances are rounding
    unit = torch.where(scale > ROUNDING * scale.max(), 1 / scale, torch.zeros_like(scale))
    square.mul_(unit).mul_(unit[:, None])
    columns, lower, jitter = inducing.independent_factor(square, tolerance)
    others = torch.ones(len(half), dtype=torch.bool).index_fill(0, columns.cpu(), jitter > 0).nonzero()[:, 0]
    rows = half.new_empty(len(half), len(columns))
    rows[columns] = lower * scale[columns, None]
    rows[others] = (
        torch.linalg.solve_triangular(lower, square[others][:, columns].T, upper=False).T * scale[others, None]
    )
    return columns, lower.mul_(scale[columns, None]), jitter, rows
