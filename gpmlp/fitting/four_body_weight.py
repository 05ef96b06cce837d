"""Weight of four-body invariants by evidence: that of small fits to a part of the data, with each of a few weights."""

from __future__ import annotations

from functools import partial

import torch

from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting import inducing_sets, passes, regression
from gpmlp.fitting.cost import most_columns
from gpmlp.fitting.partitions import Partitions
from gpmlp.fitting.report import StageTimer
from gpmlp.fitting.workers import Workers, silent
from gpmlp.gp import inducing
from gpmlp.recipe import DescriptorRecipe, InducingRecipe, NetworkRecipe, Recipe

WEIGHTS = (0.03, 0.1, 0.3)
ATOMS, COLUMNS = 600, 400  # of the small fits, about
GRADIENTS = 4  # at a centre, where the fit itself has functionals of the data in place of centres


def with_weights(recipe: Recipe, structures: Structures, remaining: Targets) -> Recipe:
    """A resolved recipe with a weight where it leaves one open; `remaining`: labels less the baselines."""
    open_ = [d.four_body is not False and d.four_body.weight is None for d in recipe.descriptors]
    if not any(open_):
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
        if isinstance(d, NetworkRecipe) or d.four_body is False or d.four_body.weight is not None:
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
