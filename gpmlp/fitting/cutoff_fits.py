"""Small fits with different cutoffs: where the noise that they learn no longer falls, a longer cutoff knows no more of the forces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting import tune
from gpmlp.fitting.fit import fit
from gpmlp.fitting.report import Progress
from gpmlp.potential.evaluation import evaluate
from gpmlp.recipe import Recipe

CUTOFFS = (3.0, 3.6, 4.2, 5.0, 6.0)  # A
KEY = "descriptor.cutoff"


@dataclass(frozen=True)
class CutoffFit:
    """A small fit.

    Attributes:
        cutoff: A.
        noise: standard deviation of forces that the fit takes for noise, eV/A: what it cannot explain.
        rmse: of force components of structures that were held out, eV/A.
    """

    cutoff: float
    noise: float
    rmse: float


def default_cutoff(structures: Structures, targets: Targets, recipe: Recipe) -> float:
    """The cutoff (A) that a fit of these data by this recipe has."""
    return float(_problem(structures, targets, recipe, 0).first[KEY])


def fit_cutoffs(
    structures: Structures,
    targets: Targets,
    recipe: Recipe,
    cutoffs: Sequence[float],
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> tuple[CutoffFit, ...]:
    """Fits of the size of a trial of `gpmlp tune`, all to the same structures and judged by the same others.

    Args:
        cutoffs: A; recipe: all else.
        progress: called as progress(stage, done, total, note).

    Raises:
        UserError: too few structures, no forces, a recipe of more than one descriptor.
    """
    problem = _problem(structures, targets, recipe, seed)
    fits = []
    for i, cutoff in enumerate(cutoffs):
        progress("small fits", i, len(cutoffs), f"cutoff {cutoff:g} A")
        chosen = problem.trial({KEY: cutoff})
        potential, report = fit(*problem.learned_from, chosen)
        errors = evaluate(potential, *problem.held, variances=False).overall
        rmse = errors.force_rmse_meV_per_A
        fits.append(
            CutoffFit(cutoff, report.noise.get("forces", math.nan), 1e-3 * (math.nan if rmse is None else rmse))
        )
        progress("small fits", i + 1, len(cutoffs), f"cutoff {cutoff:g} A")
    return tuple(fits)


def _problem(structures: Structures, targets: Targets, recipe: Recipe, seed: int) -> tune.TuningProblem:
    if len(recipe.descriptors) > 1 or recipe.descriptors[0].name != "soap":
        raise UserError("Small fits with other cutoffs need a recipe of one descriptor, soap; leave the others out.")
    low, high = min(CUTOFFS), max(CUTOFFS)
    return tune.tuning_problem(structures, targets, recipe, [f"{KEY}={low}:{high}"], "evidence", seed)
