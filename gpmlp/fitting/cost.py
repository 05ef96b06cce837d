"""Expected cost of a fit: columns, memory and time, known before it starts from the number of labels and the speed of this machine."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpmlp import descriptors
from gpmlp.core.errors import DataWarning, UserError
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting import exact_model, inducing_sets
from gpmlp.fitting.defaults import VARIANCE_COLUMNS, memory_budget_GB, physical_memory_GB
from gpmlp.fitting.regression import EVIDENCE_COLUMNS
from gpmlp.recipe import InducingRecipe, Recipe

# fitted to five fits of 400 to 2000 columns (docs/memory.md)
MATRICES, BASE_GB = 16, 0.12  # of columns² doubles at the peak, and what chunks and compiled loops take
BASE_S = 20.0  # of reading, compiling and choosing sparse points
ROW_PRODUCTS = 4.0  # operations per row and columns²: the factor of the rows
EVIDENCE_PRODUCTS, POSTERIOR_PRODUCTS = 100.0, 40.0  # per columns³ that hyperparameters are learned with, and of all
FEATURE_DIRECTIONS = 500  # that functionals of one species span, about
PRODUCTS_PER_SLOPE = 60.0  # operations per functional, environment and direction: covariances of all pairs, each once
EXACT_MATRICES, EXACT_PRODUCTS = 1.2, 4.0  # of n² doubles; per n³ (gp/exact.py)
LONG_S = 3600.0


@dataclass(frozen=True)
class FitCost:
    """What a fit will take: within a factor of two in time, and up to 1.5 times less than this in memory.

    Attributes:
        columns: at most, centres times (1 + gradients) of all descriptors, or functionals; rows: labels.
        functionals: whether there are any.
        variance_columns: of them for variances, where they are more than by default; file_GB: in the model file for their sake, at most;
            atom_seconds: for the force variances of an atom.
    """

    columns: int
    rows: int
    memory_GB: float
    seconds: float
    functionals: bool = False
    variance_columns: int = 0
    file_GB: float = 0.0
    atom_seconds: float = 0.0

    def __str__(self) -> str:
        minutes = self.seconds / 60
        length = (
            f"{self.seconds:.0f} s"
            if minutes < 2
            else f"{minutes:.0f} min"
            if minutes < 120
            else f"{minutes / 60:.0f} h"
        )
        variances = (
            f"; error bars from {self.variance_columns} columns: up to {self.file_GB:.2g} GB in the model file, about "
            f"{self.atom_seconds:.1g} s for the force of an atom (fewer: --set variance.columns={VARIANCE_COLUMNS})"
        )
        expected = f"expected: {self.columns} columns x {self.rows} rows, {self.memory_GB:.2g} GB, about {length}"
        return expected + variances * (self.variance_columns > 0)

    def check(self) -> None:
        """Warn of more than an hour (DataWarning). Raises UserError: more memory than this machine has."""
        there, smaller = physical_memory_GB(), "lower inducing.n or inducing.gradients (--set inducing.n=500)"
        smaller = "ask for fewer functionals (--set inducing.functionals=2000)" if self.functionals else smaller
        if self.memory_GB > there:
            raise UserError(
                f"The fit would need {self.memory_GB:.3g} GB for {self.columns} columns; this machine has {there:.3g} GB: {smaller}."
            )
        if self.seconds > LONG_S:
            warnings.warn(f"E{str(self)[1:]}; to have it sooner {smaller}.", DataWarning, stacklevel=3)


def expected_cost(recipe: Recipe, structures: Structures, targets: Targets) -> FitCost:
    """The cost of a fit with a resolved recipe."""
    known = [int(label.isfinite().sum()) for label in (targets.energies, targets.forces, targets.stresses)]
    columns, rows = most_columns(recipe, structures), known[0] + known[1] + known[2] * 6 // 9
    few = recipe.variance.at_most(columns) if recipe.variance is not False else 0
    cost = cost_of(columns, rows, few)
    if inducing_sets.goes_exactly(recipe, structures, targets):
        few = centre_columns(recipe.inducings[0], structures)
        cost = _exact_cost(columns, cost_of(few, rows, few))
    numbers, atoms = functionals_of(structures), structures.counts
    for inducing, descriptor in zip(recipe.inducings, recipe.descriptors, strict=True):
        if not inducing.functionals:
            continue
        features = descriptors.most_features(structures.distinct_species, descriptor.model_dump())
        directions = min(features, FEATURE_DIRECTIONS)
        share = min(1.0, _wanted(inducing, numbers) / max(1, int(numbers.sum())))
        numbers_kept = share * float((numbers * atoms).sum()) * directions  # of the derivatives of their environments
        pairs = 1.0 if inducing.functionals == "all" else share**2 + 2 * share  # among themselves, and with the data
        products = pairs * float(numbers.sum()) * structures.n_atoms * directions * PRODUCTS_PER_SLOPE
        seconds = cost.seconds + products / operations_per_second()
        cost = replace(cost, memory_GB=cost.memory_GB + 8e-9 * numbers_kept, seconds=seconds, functionals=True)
    return cost


def why_not_all(recipe: Recipe, instead: Recipe, structures: Structures, targets: Targets) -> str:
    """What stands in the way of all functionals, by a resolved recipe that asks for them: empty where they go by a Cholesky factorisation
    within `memory_GB`, and within an hour or the time that centres take.

    Args:
        instead: the resolved recipe with centres.
    """
    if why := exact_model.why_not_exact(recipe, structures, targets):
        return why
    if not inducing_sets.goes_exactly(recipe, structures, targets):
        return "variances are of all columns"
    expected, budget = expected_cost(recipe, structures, targets), recipe.memory_GB or memory_budget_GB()
    if expected.memory_GB > BASE_GB + budget:
        return f"{expected.columns} of them take {expected.memory_GB:.3g} GB, where memory_GB is {budget:.3g}"
    longest = max(LONG_S, expected_cost(instead, structures, targets).seconds)
    return f"a fit would take {expected.seconds / 60:.0f} min" if expected.seconds > longest else ""


def _exact_cost(n: int, of_variances: FitCost) -> FitCost:
    """Of n functionals by a Cholesky factorisation in place, with variances of centres."""
    memory = of_variances.memory_GB + 8e-9 * EXACT_MATRICES * float(n) ** 2
    seconds = of_variances.seconds + EXACT_PRODUCTS * float(n) ** 3 / operations_per_second()
    return replace(of_variances, columns=n, memory_GB=memory, seconds=seconds)


def functionals_of(structures: Structures) -> Tensor:
    """(structures,) number of their functionals, at most: energy, internal forces and stress."""
    isolated = ~structures.periodic.any(dim=1)
    internal = 3 * structures.counts - torch.where(isolated, 5, 3)  # of linear molecules; one less of others
    return 1 + internal.clamp_min(0) + torch.where(isolated, 0, 6)


def _wanted(inducing: InducingRecipe, numbers: Tensor) -> int:
    most = int(numbers.sum())
    return most if inducing.functionals == "all" else min(most, int(inducing.functionals or 0) + int(numbers.max()))


def most_columns(recipe: Recipe, structures: Structures) -> int:
    """Columns of a fit with a resolved recipe, at most."""
    columns = 0
    for inducing in recipe.inducings:
        if inducing.functionals:
            columns += _wanted(inducing, functionals_of(structures))
            continue
        columns += centre_columns(inducing, structures)
    return columns


def centre_columns(inducing: InducingRecipe, structures: Structures) -> int:
    """Columns of centres and their gradients, at most."""
    wanted = sum(inducing.shares.values()) if isinstance(inducing.shares, dict) else inducing.n or 1
    return min(wanted, structures.n_atoms) * (1 + (inducing.gradients or 0))


def cost_of(columns: int, rows: int, variance_columns: int = 0) -> FitCost:
    """The cost of a fit with so many columns and rows, and variances from so many of the columns."""
    u, e = float(columns), float(min(columns, EVIDENCE_COLUMNS))
    operations = ROW_PRODUCTS * rows * u**2 + EVIDENCE_PRODUCTS * e**3 + POSTERIOR_PRODUCTS * u**3
    speed, v = operations_per_second(), float(variance_columns if variance_columns > VARIANCE_COLUMNS else 0)
    # three rows, each solved with two triangles; packed triangles of R in single and of K_uu in double precision
    cost = FitCost(columns, rows, BASE_GB + 8e-9 * MATRICES * u**2, BASE_S + operations / speed)
    return replace(cost, variance_columns=int(v), file_GB=6e-9 * v**2, atom_seconds=3 * 2 * v**2 / speed)


def operations_per_second(size: int = 400, times: int = 3) -> float:
    """Of products of matrices in double precision, here and now."""
    matrix, taken = torch.ones(size, size, dtype=torch.float64), []
    for _ in range(times + 1):
        begun = time.perf_counter()
        matrix @ matrix
        taken.append(time.perf_counter() - begun)
    return 2 * size**3 / max(min(taken), 1e-9)  # the fastest, as others may be at work
