"""The inducing variables of a fit: centres chosen from the data with their gradients, or functionals of the data themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpmlp import descriptors
from gpmlp.core import errors
from gpmlp.core.environments import Descriptor
from gpmlp.core.quantities import KINDS, Targets
from gpmlp.core.structures import Structures
from gpmlp.core.units import VOIGT
from gpmlp.fitting import sparse_points
from gpmlp.fitting.regression import ExactModel, InducingModel, OwnRows
from gpmlp.fitting.sparse_points import Candidates, CentreChoice
from gpmlp.fitting.workers import Report, silent
from gpmlp.gp import functionals, hyperparameters, inducing
from gpmlp.gp.evidence import DenseData
from gpmlp.gp.exact import ExactProcess
from gpmlp.gp.functionals import FunctionalBlock
from gpmlp.gp.kernels import ZonalKernel, make_kernel
from gpmlp.recipe import Recipe

RELATIVE_COLUMNS = 1200  # functionals by which the signals of several species are compared


def make_models(
    recipe: Recipe,
    structures: Structures,
    candidates_of: Callable[[int, CentreChoice], Candidates],
    fitted: Structures,
    targets: Targets,
    report: Report = silent,
) -> tuple[list[InducingModel], dict[int, int]]:
    """Choose the inducing variables of every descriptor.

    Args:
        candidates_of: all environments that centres may be, by the number of the descriptor.
        fitted, targets: structures whose functionals may be inducing variables, and their labels less the baselines.
        report: of the structures whose functionals have met those of all others.

    Returns:
        the models, and the number of environments of each species.
    """
    models: list[InducingModel] = []
    counts: dict[int, int] = {}
    species = structures.distinct_species
    for k, (d, kern, ind) in enumerate(zip(recipe.descriptors, recipe.kernels, recipe.inducings, strict=True)):
        descriptor = descriptors.learn_descriptor(species, d.model_dump(), fitted, recipe.seed)
        kernel = make_kernel(kern)
        if ind.functionals:
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
    return models, counts


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
    owner, known = structures.structure_of_atom, ~labels.forces.isnan().all(1)
    moving = torch.zeros(len(structures), dtype=torch.bool, device=owner.device)
    moving[owner[known]] = True
    stressed = ~labels.stresses.isnan().flatten(1).all(1)
    maps = functionals.functional_maps(structures, ~labels.energies.isnan(), moving, stressed)
    wanted = recipe.inducings[k].functionals
    order, fewest = _random_order(structures, torch.tensor([len(m) for m in maps]), recipe.seed)
    total = torch.tensor([len(maps[i]) for i in order]).cumsum(0)
    many = len(maps) if wanted in (None, "all") else min(len(maps), int((total < int(wanted)).sum()) + 1)
    chosen = order[: max(many, fewest)]
    structures, labels, maps = structures.select(chosen), labels.select(structures, chosen), [maps[i] for i in chosen]
    species = structures.distinct_species
    block = FunctionalBlock.make(descriptor, structures, maps, dict.fromkeys(species, 1.0))
    if len(species) > 1:
        block = block.of_species(_relative_signals(recipe, k, kernel, block, labels))
    note = f"covariances of {block.n_columns} functionals"
    half, of = block.lower_K_uu(kernel, lambda done, total: report(done, total, note)), tuple(chosen.tolist())
    exact, leading, own = None, block.n_columns, None
    few = recipe.variance.at_most(leading) if recipe.variance is not False else leading
    if wanted == "all" and few < leading and (process := _exact_process(recipe, block, labels, half)):
        exact, leading = ExactModel(block.to(like), process, of), few
    columns, lower, jitter, whitened = _independent(half, leading, inducing.rank_tolerance(like))
    if wanted == "all":
        pieces, places = whitened.split([len(m) for m in block.maps]), order.argsort().tolist()
        own = OwnRows(tuple(block.maps[i] for i in places), tuple(pieces[i] for i in places))
    block = block.select(columns).to(like)
    about = of[: len(block.structures)], own, exact
    return InducingModel(descriptor, kernel, (block,), (lower,), jitter, int(total[len(of) - 1]), *about)


def _random_order(structures: Structures, functionals: Tensor, seed: int) -> tuple[Tensor, int]:
    """A random order of the structures that begins with some that hold every species, and how many these are; structures that have
    functionals (of each, how many) rather than others."""
    order = torch.randperm(len(structures), generator=torch.Generator().manual_seed(seed))
    there = structures.composition(structures.distinct_species)[order.to(structures.species.device)].cpu() > 0
    some = there & (functionals[order] > 0)[:, None]
    best = torch.where(some.any(0), some, there).int().argmax(0).unique()
    rest = torch.ones(len(order), dtype=torch.bool).index_fill(0, best, False)
    return torch.cat([order[best], order[rest]]), len(best)


def goes_exactly(recipe: Recipe, structures: Structures, targets: Targets) -> bool:
    """Whether the process of all functionals goes by a Cholesky factorisation; only the QR will do where force labels of one structure
    have different noises, some of its components are unknown, there are several descriptors, or on a GPU."""
    if len(recipe.inducings) > 1 or structures.positions.device.type != "cpu":
        return False
    noise = targets.forces_noise.nan_to_num(-1.0).masked_fill(targets.forces.isnan(), torch.inf)
    first = noise[structures.offsets[:-1], :1][structures.structure_of_atom]
    unknown = targets.stresses.isnan().flatten(1)
    return bool((noise == first).all() and (unknown == unknown[:, :1]).all())


def _exact_process(recipe: Recipe, block: FunctionalBlock, targets: Targets, half: Tensor) -> ExactProcess | None:
    """The process of all functionals for a Cholesky factorisation; None where only the QR will do (`goes_exactly`)."""
    if not goes_exactly(recipe, block.structures, targets):
        return None
    labels = _functional_labels(block.structures, targets, block.maps)
    return ExactProcess.of_covariance(half, labels.values, labels.by_kind(), labels.scale, labels.given)


def _independent(
    half: Tensor, leading: int, tolerance: float = inducing.RANK_TOLERANCE
) -> tuple[Tensor, Tensor, float, Tensor]:
    """Of the leading functionals those that do not depend on others; L of their covariance; the jitter it took; and of all functionals
    the covariances with them, whitened: k L⁻ᵀ.

    Args:
        half: (n, n) covariance, of which the lower half counts; tolerance: of the prior variance, less than which is dependent.
    """
    square = functionals.mirrored(half[:leading, :leading])
    scale = square.diagonal().clamp_min(0).sqrt()
    unit = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    square.mul_(unit).mul_(unit[:, None])
    columns, lower, jitter = inducing.independent_factor(square, tolerance)
    others = torch.ones(leading, dtype=torch.bool).index_fill(0, columns.cpu(), jitter > 0).nonzero()[:, 0]
    rows = half.new_empty(len(half), len(columns))
    rows[columns] = lower * scale[columns, None]
    rows[others] = (
        torch.linalg.solve_triangular(lower, square[others][:, columns].T, upper=False).T * scale[others, None]
    )
    rest = half[leading:, :leading][:, columns] * unit[columns]
    rows[leading:] = torch.linalg.solve_triangular(lower, rest.T, upper=False).T
    return columns, lower.mul_(scale[columns, None]), jitter, rows


def _relative_signals(
    recipe: Recipe, k: int, kernel: ZonalKernel, block: FunctionalBlock, targets: Targets
) -> dict[int, float]:
    """Signal of local energies of each species, eV, by evidence of the functionals of the first structures alone."""
    many = max(1, sum(start <= RELATIVE_COLUMNS for start in block.starts[1:]))
    few = block.select(torch.arange(block.starts[many]))
    structures, maps = few.structures, few.maps
    labels = targets.select(block.structures, range(len(structures)))
    species = structures.distinct_species
    every = [few.of_species({z: 1.0}).K_uu(kernel) for z in species]
    of_all = _functional_labels(structures, labels, maps)
    known = ~of_all.values.isnan()
    shown = _FunctionalLabels(*(part[known] for part in of_all))
    rows, own_variance = shown.by_kind(), shown.given.nan_to_num(0.0).square()
    data = DenseData(tuple(c[known][:, known] for c in every), shown.values, rows, shown.scale, own_variance)
    own = recipe.model_copy(update={"descriptor": recipe.descriptors[k], "signal": recipe.signals[k]})
    parameters = hyperparameters.make_hyperparameters(own, list(rows), [(0, z) for z in species])
    if len(data.values):
        data.maximise(parameters)
    found = dict(zip(species, parameters.signal().tolist(), strict=True))
    typical = sum(found.values()) / len(found)
    return {z: found.get(z, typical) for z in block.relative}


class _FunctionalLabels(NamedTuple):
    """Labels of functionals as `functional_maps` has them.

    Attributes:
        values: (functionals,) NaN where not known; kinds: index in KINDS; scale: noise over that of the kind.
        given: noise of its own, NaN where that of the kind holds; their root mean square where a functional mixes several.
    """

    values: Tensor
    kinds: Tensor
    scale: Tensor
    given: Tensor

    def by_kind(self) -> dict[str, Tensor]:
        """Which have the noise of the kind."""
        common = self.given.isnan()
        rows = {kind: ((self.kinds == i) & common).nonzero()[:, 0] for i, kind in enumerate(KINDS)}
        return {kind: which for kind, which in rows.items() if len(which)}


def _functional_labels(structures: Structures, targets: Targets, maps: Sequence[Tensor]) -> _FunctionalLabels:
    parts, offsets = [], structures.offsets.tolist()
    a, b = torch.tensor(VOIGT).T
    for i, rows in enumerate(maps[: len(structures)]):
        atoms = slice(offsets[i], offsets[i + 1])
        n = atoms.stop - atoms.start
        label = torch.cat([targets.energies[i, None], targets.forces[atoms].flatten(), targets.stresses[i][a, b]]).to(
            rows
        )
        noises = (
            n * targets.energies_noise[i, None],
            targets.forces_noise[atoms].flatten(),
            targets.stresses_noise[i].expand(6),
        )
        noise = torch.cat(noises).to(rows)
        used = rows != 0
        own = (used & ~noise.isnan()) * rows.square()
        given = ((own * noise.nan_to_num().square()).sum(1) / own.sum(1)).sqrt()  # NaN where none has one of its own
        values = (rows * label.nan_to_num()).sum(1).masked_fill((used & label.isnan()).any(1), torch.nan)
        kinds = torch.where(used[:, 0], 0, torch.where(used[:, -6:].any(1), 2, 1))
        scale = torch.where(used[:, 0], n, 1).to(rows)
        parts.append((values, kinds, scale, given))
    return _FunctionalLabels(*(torch.cat(part) for part in zip(*parts, strict=True)))
