"""Prior distributions of hyperparameters (noises and signal variances): those of the recipe, else wide defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gpmlp.core import errors
from gpmlp.core.structures import Structures
from gpmlp.gp.evidence import AtBound
from gpmlp.gp.likelihood import NOISE_PRIORS, SIGNAL_PRIOR, Hyperparameters, StdPrior
from gpmlp.recipe import LearnedRecipe, Recipe

NOISE_FIELDS = {"energies": "energy_per_atom", "forces": "force", "stresses": "stress"}
UNITS = {"energies": "eV/atom", "forces": "eV/A", "stresses": "eV/A^3", "signal": "eV"}
LEFT = 1.01  # times a bound: what is above has left it
Blocks = Sequence[tuple[int, int | None]]  # (number of the descriptor, atomic number; None = all species together)


def check_species(recipe: Recipe, structures: Structures) -> None:
    """Raise UserError where the recipe has a signal for a species that is not in the data."""
    there = [errors.chemical_symbol(z) for z in structures.distinct_species]
    for name in sorted({name for given in recipe.signals for name in given} - set(there)):
        raise errors.UserError(
            f"`signal.{name}` is given, but there is no {name} in the training structures, which hold {', '.join(there)}."
        )


def make_hyperparameters(
    recipe: Recipe,
    kinds: Sequence[str],
    blocks: Blocks,
    more: Sequence[StdPrior] = (),
    noises: Mapping[str, StdPrior] | None = None,
) -> Hyperparameters:
    """Noises of these kinds and signals of these blocks, with their priors, at their starting values; `noises` of other kinds, and `more`
    signals, that no recipe knows."""
    noise = {kind: _prior(getattr(recipe.noise, NOISE_FIELDS[kind]), NOISE_PRIORS[kind]) for kind in kinds}
    return Hyperparameters(
        noise | dict(noises or {}), [*(_prior(_signal(recipe, block), SIGNAL_PRIOR) for block in blocks), *more]
    )


def bound_warnings(
    recipe: Recipe, blocks: Blocks, ended: Sequence[AtBound], noise: Mapping[str, float] | None = None
) -> list[str]:
    """A warning for each standard deviation that ended at a bound.

    Args:
        noise: by kind, as the fit uses them, where they are not those of the evidence.
    """
    out = []
    for at in ended:
        if at.name == "signal" and at.index >= len(
            blocks
        ):  # of free charges; at the lower bound they are constants, as they may be
            if at.side == "upper":
                out.append(
                    "The signal of free charges ended at the upper bound of its range; the data may not determine charges."
                )
            continue
        if at.name == "signal":
            key, given, default = _signal_key(recipe, blocks[at.index]), _signal(recipe, blocks[at.index]), SIGNAL_PRIOR
        else:
            key, default = f"noise.{NOISE_FIELDS[at.name]}", NOISE_PRIORS[at.name]
            given = getattr(recipe.noise, NOISE_FIELDS[at.name])
        prior = _prior(given, default)
        value = prior.low if at.side == "lower" else prior.high
        if at.side == "lower" and noise and noise.get(at.name, 0.0) > LEFT * prior.low:
            continue  # leave-one-out found what the evidence could not
        ended_at = f"{key} ended at {value:.4g} {UNITS[at.name]}, the {at.side} bound"
        if isinstance(given, LearnedRecipe) and given.bounds:
            out.append(
                f"{ended_at} that the recipe sets ({key}.bounds); the data ask for {'less' if at.side == 'lower' else 'more'}."
            )
        else:
            out.append(f"{ended_at} of its range; the data may not determine it. Give it, or a prior, in the recipe.")
    return out


def _signal(recipe: Recipe, block: tuple[int, int | None]) -> float | LearnedRecipe | None:
    """Of a block of all species it is a factor on what each has: 1 where the recipe says anything of those."""
    descriptor, z = block
    if z is None:
        return 1.0 if recipe.signals[descriptor] else None
    return recipe.signals[descriptor].get(errors.chemical_symbol(z))


def _signal_key(recipe: Recipe, block: tuple[int, int | None]) -> str:
    place = f"{block[0]}." if len(recipe.descriptors) > 1 else ""
    return f"signal.{place}{errors.chemical_symbol(block[1]) if block[1] else 'all'}"


def _prior(given: float | LearnedRecipe | None, default: StdPrior) -> StdPrior:
    """The prior that a recipe asks for: a number is fixed, what is left out is as in the default."""
    if given is None:
        return default
    if not isinstance(given, LearnedRecipe):
        return StdPrior.fixed_at(given)
    low, high = given.bounds or (default.low, default.high)
    median, width = default.median, default.log_width
    if given.prior:
        median, width = given.prior.median, math.log(given.prior.factor)
    start = given.start or median
    if not low < start < high:
        start = math.sqrt(low * high)
    return StdPrior(median, low, high, width, start)
