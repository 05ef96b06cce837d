"""Four-body invariants by evidence: whether they pay, by that of the exact process of a part of the data, and with which weight, by that of
small fits."""

from __future__ import annotations

from functools import partial

import torch

from gpmlp import descriptors
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting import defaults, exact_model, inducing_sets, passes, regression
from gpmlp.fitting.cost import most_columns
from gpmlp.fitting.partitions import Partitions
from gpmlp.fitting.report import StageTimer
from gpmlp.fitting.workers import Workers, silent
from gpmlp.gp import inducing
from gpmlp.gp.functionals import FunctionalBlock
from gpmlp.gp.kernels import make_kernel
from gpmlp.recipe import DescriptorRecipe, FourBodyRecipe, InducingRecipe, NetworkRecipe, Recipe

WEIGHTS = (0.03, 0.1, 0.3)
ATOMS, COLUMNS = 600, 400  # of the small fits, about
GRADIENTS = 4  # at a centre, where the fit itself has functionals of the data in place of centres
FUNCTIONALS = 300  # whose evidence is compared, about
PAYS = 0.03  # nats per label by which it has to rise, for predictions that take 2.5 times as long (docs/decisions/020-four-body.md)


def settle(recipe: Recipe, structures: Structures, remaining: Targets, growing: bool = False) -> tuple[Recipe, str]:
    """A resolved recipe that leaves nothing of four-body invariants open, and a sentence where `auto` had a choice.

    Where the mean is of centres `auto` has none: then these limit it more than the descriptor does.

    Args:
        remaining: labels less the baselines; growing: whether labels are to come.
    """
    if all(d.four_body != "auto" for d in recipe.descriptors):
        return _with_weights(recipe, structures, remaining), ""
    n_species = len(structures.distinct_species)
    none, every = (
        recipe.model_copy(update={"descriptor": tuple(_with(wanted, d, n_species) for d in recipe.descriptors)})
        for wanted in (False, True)
    )
    if not inducing_sets.goes_exactly(recipe, structures, remaining, growing):
        return _with_weights(none, structures, remaining), ""
    some, labels, n = _first_functionals(recipe, structures, remaining)
    gain = (_exact_evidence(none, some, labels) - _exact_evidence(every, some, labels)) / max(n, 1)
    said = f"the evidence of {n} labels rises by {gain:.2f} nats each with them, and {PAYS:g} or more is asked for"
    return (every, f"four-body invariants: {said}") if gain >= PAYS else (none, f"no four-body invariants: {said}")


def _with(wanted: bool, d: DescriptorRecipe | NetworkRecipe, n_species: int) -> DescriptorRecipe | NetworkRecipe:
    """With four-body invariants, or without, where `auto` is to choose."""
    if not isinstance(d, DescriptorRecipe) or d.four_body != "auto":
        return d
    channels, l_max = n_species * (d.n_max or 1), d.l_max or 0  # a resolved recipe has numbers for both
    return d.model_copy(update={"four_body": wanted and defaults.full_four_body(FourBodyRecipe(), l_max, channels)})


def _first_functionals(recipe: Recipe, structures: Structures, remaining: Targets) -> tuple[Structures, Targets, int]:
    """Some structures at random, every species among them, their labels, and how many functionals these have."""
    numbers = torch.tensor([len(m) for m in exact_model.label_maps(structures, remaining)])
    order, fewest = exact_model.random_order(structures, numbers, recipe.seed)
    chosen = order[: max(fewest, int((numbers[order].cumsum(0) <= FUNCTIONALS).sum()))]
    return structures.select(chosen), remaining.select(structures, chosen), int(numbers[chosen].sum())


def _exact_evidence(recipe: Recipe, structures: Structures, remaining: Targets) -> float:
    """Minus the log evidence of all functionals, its hyperparameters learned."""
    species, maps = structures.distinct_species, exact_model.label_maps(structures, remaining)
    descriptor = descriptors.learn_descriptor(species, recipe.descriptors[0].model_dump(), structures, recipe.seed)
    block = FunctionalBlock.make(descriptor, structures, maps, dict.fromkeys(species, 1.0))
    return exact_model.first_evidence(recipe, 0, make_kernel(recipe.kernels[0]), block, remaining).negative_log


def _with_weights(recipe: Recipe, structures: Structures, remaining: Targets) -> Recipe:
    """A resolved recipe with a weight where it leaves one open; `remaining`: labels less the baselines."""
    sections = [d.four_body for d in recipe.descriptors]
    if not any(isinstance(f, FourBodyRecipe) and f.weight is None for f in sections):
        return recipe
    order = torch.randperm(len(structures), generator=torch.Generator().manual_seed(recipe.seed))
    n = max(1, int((structures.counts.cpu()[order].cumsum(0) <= ATOMS).sum()))
    some = order[:n].sort().values
    data = structures.select(some), remaining.select(structures, some)
    each = max(1, COLUMNS // len(recipe.descriptors))
    small = recipe.model_copy(
        update={"inducing": tuple(_smaller(i, each, data[0]) for i in recipe.inducings), "novelty": False}
    )
    tried = [_with_weight(small, w) for w in WEIGHTS]
    best = min(range(len(WEIGHTS)), key=lambda k: _negative_log_evidence(tried[k], *data))
    return _with_weight(recipe, WEIGHTS[best])


def _with_weight(recipe: Recipe, weight: float) -> Recipe:
    def changed(d: DescriptorRecipe | NetworkRecipe) -> DescriptorRecipe | NetworkRecipe:
        if not isinstance(d.four_body, FourBodyRecipe) or d.four_body.weight is not None:
            return d
        return d.model_copy(update={"four_body": d.four_body.model_copy(update={"weight": weight})})

    return recipe.model_copy(update={"descriptor": tuple(map(changed, recipe.descriptors))})


def _smaller(i: InducingRecipe, columns: int, structures: Structures) -> InducingRecipe:
    gradients = GRADIENTS if i.functionals else i.gradients or 0
    n = max(1, min(i.n or columns, columns // (1 + gradients), structures.n_atoms))
    return i.model_copy(update={"n": n, "gradients": gradients, "shares": "species", "functionals": None})


def _negative_log_evidence(recipe: Recipe, structures: Structures, remaining: Targets) -> float:
    """Of a fit to these structures alone, its hyperparameters learned."""
    partitions = Partitions.of_data(structures, remaining, most_columns(recipe, structures), Workers())
    all_, none = torch.arange(len(structures)), torch.zeros(0, dtype=torch.long)
    collect = partial(passes.collect_candidates, partitions, recipe, fitted=all_, held=none, report=silent)
    models, _ = inducing_sets.make_models(
        recipe, structures, lambda k, choice: collect(choice)[0], structures, remaining
    )
    factors, *_ = passes.make_factors(partitions, models, None, all_, none, none, silent)
    lowers = regression.lowers_of(models)
    whitened = {kind: inducing.whiten_rows(f.factor().double(), lowers) for kind, f in factors.items()}
    counts = {kind: f.count for kind, f in factors.items()}
    _, _, result = regression.learn_hyperparameters(recipe, models, whitened, counts, StageTimer(None))
    return result.negative_log_evidence
