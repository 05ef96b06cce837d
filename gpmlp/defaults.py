"""Defaults fill what a recipe leaves open from the data: species, shortest bonds, density, number of labels, memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpmlp import neighbors
from gpmlp.quantities import Targets
from gpmlp.recipe import DescriptorRecipe, InducingRecipe, KernelRecipe, RadialScaling, Recipe
from gpmlp.structures import Structures


@dataclass(frozen=True)
class Survey:
    """What the data say before a model is chosen; lengths in A.

    Attributes:
        shortest: nearest distance of each pair of species that occurs.
        bond: typical nearest-neighbour distance: the median over atoms.
        periodic: whether most structures are periodic.
        n_labels: number of known label components.
        n_environments: number of atoms.
    """

    shortest: dict[tuple[int, int], float]
    bond: float
    periodic: bool
    n_labels: int
    n_environments: int


def survey(structures: Structures, targets: Targets, at_most: int = 400) -> Survey:
    """Look at up to `at_most` structures, evenly spread, for distances and at all for labels."""
    step = max(1, len(structures) // at_most)
    sample = structures.select(range(0, len(structures), step))
    reach = 4.0
    pairs = neighbors.find(sample, reach)
    while len(pairs) < sample.n_atoms and reach < 12:
        reach += 2.0
        pairs = neighbors.find(sample, reach)
    r = pairs.vectors(sample).norm(dim=1)
    z_i, z_j = sample.species[pairs.centers], sample.species[pairs.neighbors]
    shortest: dict[tuple[int, int], float] = {}
    for a in sample.distinct_species:
        for b in sample.distinct_species:
            here = r[(z_i == a) & (z_j == b)]
            if a <= b and len(here):
                shortest[a, b] = float(here.min())
    nearest = r.new_full((sample.n_atoms,), float("inf")).scatter_reduce(0, pairs.centers, r, "amin")
    nearest = nearest[nearest.isfinite()]
    n_labels = sum(int((~torch.isnan(v)).sum()) for v in (targets.energies, targets.forces)) + 6 * int(
        (~torch.isnan(targets.stresses[:, 0, 0])).sum()
    )
    periodic = bool(structures.periodic.any(dim=1).double().mean() > 0.5)
    return Survey(shortest, float(nearest.median()) if len(nearest) else 2.0, periodic, n_labels, structures.n_atoms)


def resolve(recipe: Recipe, found: Survey, n_species: int) -> Recipe:
    """Return the recipe with every None replaced; docs/decisions tells where the numbers come from."""
    descriptors = tuple(_descriptor(d, found, n_species) for d in recipe.descriptors)
    kernels = tuple(_kernel(k) for k in recipe.kernels)
    budget = (recipe.memory_GB or 3.0) * 1e9
    inducing = tuple(_inducing(i, found, budget, len(descriptors)) for i in recipe.inducings)
    return recipe.model_copy(
        update={"descriptor": descriptors, "kernel": kernels, "inducing": inducing, "memory_GB": budget / 1e9}
    )


def _descriptor(d: DescriptorRecipe, found: Survey, n_species: int) -> DescriptorRecipe:
    shortest = min(found.shortest.values(), default=1.0)
    cutoff = d.cutoff or (min(6.0, max(4.0, 2.2 * found.bond)) if found.periodic else 5.0)
    scaling = d.radial_scaling
    if scaling is not False:
        scaling = RadialScaling(
            scale=scaling.scale or (0.85 * found.bond if found.periodic else 2.0),
            exponent=3.0 if scaling.exponent is None else scaling.exponent,
        )
    return d.model_copy(
        update={
            "cutoff": cutoff,
            "n_max": d.n_max or 8,
            "l_max": (6 if n_species == 1 else 4) if d.l_max is None else d.l_max,
            "sigma_atom": d.sigma_atom or (0.4 if found.periodic else 0.3),
            "radial_scaling": scaling,
            "cutoff_width": d.cutoff_width or min(cutoff, 1.0),
            "shortest": d.shortest or 0.8 * shortest,
        }
    )


def _kernel(k: KernelRecipe) -> KernelRecipe:
    return k.model_copy(
        update={"zeta": 3 if k.zeta is None else k.zeta, "length": k.length or 0.5, "terms": tuple(_kernel(t) for t in k.terms)}
    )


def _inducing(i: InducingRecipe, found: Survey, budget: float, n_descriptors: int) -> InducingRecipe:
    # the factors and their work space: about 8 matrices of columns^2 doubles
    columns = int((budget / 64) ** 0.5)
    columns = min(columns, max(50, found.n_labels // 6)) // n_descriptors
    if i.n is None and i.gradients is None:
        gradients = 3 if found.periodic else 12
        n = columns // (1 + gradients)
    elif i.n is None:
        gradients = i.gradients
        n = columns // (1 + gradients)
    else:
        n = i.n
        gradients = i.gradients if i.gradients is not None else min(15, max(0, columns // n - 1))
    n = max(1, n) if i.n else max(1, min(n, found.n_environments))
    return i.model_copy(update={"n": n, "gradients": gradients})
