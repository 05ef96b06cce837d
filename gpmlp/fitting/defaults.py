"""Defaults for what a recipe leaves open, from the data: species, shortest bonds, periodicity, number of labels, memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from gpmlp.core import neighbors
from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.descriptors.network_features import check_network
from gpmlp.recipe import (
    CompressionRecipe,
    DescriptorRecipe,
    FourBodyRecipe,
    InducingRecipe,
    KernelRecipe,
    NetworkRecipe,
    RadialScaling,
    Recipe,
)


@dataclass(frozen=True)
class DataSummary:
    """Distances and counts of the data, from which defaults follow; lengths in A.

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


def summarise_data(structures: Structures, targets: Targets, at_most: int = 10_000) -> DataSummary:
    """Distances from structures with about `at_most` atoms, evenly drawn, and counts from all."""
    step = max(1, round(structures.n_atoms / at_most))
    sample = structures.select(range(0, len(structures), step))
    reach = 4.0
    pairs = neighbors.find_neighbors(sample, reach)
    while len(pairs) < sample.n_atoms and reach < 12:
        reach += 2.0
        pairs = neighbors.find_neighbors(sample, reach)
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
    return DataSummary(
        shortest, float(nearest.median()) if len(nearest) else 2.0, periodic, n_labels, structures.n_atoms
    )


# measured in docs/decisions/003-default-recipe.md
MATRICES = 12  # of columns^2 doubles that a fit holds at its peak (docs/memory.md)
LABELS_PER_COLUMN = {True: 12, False: 3}  # periodic, isolated: molecules gain longer from more columns
GRADIENTS = {True: 3, False: 12}
FEW_COLUMNS = 1000  # up to as many labels there is a column for each
CHEAP_COLUMNS = 1500  # a fit with so many takes seconds: small sets of solids may have them too
MOST_COLUMNS = 10_000  # beyond, a fit takes more than some twenty minutes on two cores
MEMORY_GB = 10.0
CHANNELS_PER_SPECIES = 3  # of a compressed density (docs/decisions/024-many-species.md)
FOUR_BODY_DEGREE = 4  # docs/decisions/020-four-body.md
MOST_FUNCTIONALS = 6000  # of a descriptor with features of a network, unless more are asked for
NETWORK_WEIGHT = 0.1  # docs/decisions/022-pretrained-features.md
VARIANCE_COLUMNS = 1500  # of the posterior kept for variances


def resolve_recipe(recipe: Recipe, summary: DataSummary, n_species: int, growing: bool = False) -> Recipe:
    """Return the recipe with every None replaced, except for what is learned (noise) and ZBL radii (one for each pair).

    Args:
        growing: whether inducing points are added as labels come: `inducing.n` is then the most there may ever be, and these labels ask
            for as many as they do where it is open.
    """
    budget = recipe.memory_GB or memory_budget_GB()
    columns = variance_columns(recipe)
    return recipe.model_copy(
        update={
            "descriptor": tuple(_descriptor(d, summary, n_species) for d in recipe.descriptors),
            "kernel": tuple(_kernel(k, summary) for k in recipe.kernels),
            "inducing": tuple(
                _inducing(
                    _functionals_for(d, i, summary, growing), summary, budget, len(recipe.descriptors), growing, columns
                )
                for d, i in zip(recipe.descriptors, recipe.inducings, strict=True)
            ),
            "memory_GB": budget,
            "variance": recipe.variance
            and recipe.variance.model_copy(update={"columns": recipe.variance.columns or VARIANCE_COLUMNS}),
        }
    )


def physical_memory_GB() -> float:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def variance_columns(recipe: Recipe) -> int:
    """Columns of variances, where centres are for these alone."""
    given = recipe.variance.columns if recipe.variance is not False else None
    return VARIANCE_COLUMNS if given in (None, "all") else int(given)


def memory_budget_GB() -> float:
    """Of it, what the factors of a fit may take where the recipe does not say."""
    return min(MEMORY_GB, 0.4 * physical_memory_GB())


def local_descriptor(recipe: Recipe, summary: DataSummary, n_species: int) -> DescriptorRecipe:
    """The first local descriptor of a resolved recipe, or the default one: for what needs features before any are learned."""
    given = (d for d in recipe.descriptors if isinstance(d, DescriptorRecipe))
    return next(given, None) or _local(DescriptorRecipe(), summary, n_species)


def _network(n: NetworkRecipe) -> NetworkRecipe:
    """With its layers and the SHA-256 of its weights."""
    *_, sha256, layers = check_network(n.model_dump())
    return n.model_copy(update={"sha256": sha256, "layers": layers, "weight": n.weight or NETWORK_WEIGHT})


def _descriptor(
    d: DescriptorRecipe | NetworkRecipe, summary: DataSummary, n_species: int
) -> DescriptorRecipe | NetworkRecipe:
    return _network(d) if isinstance(d, NetworkRecipe) else _local(d, summary, n_species)


def _local(d: DescriptorRecipe, summary: DataSummary, n_species: int) -> DescriptorRecipe:
    shortest = min(summary.shortest.values(), default=1.0)
    cutoff = d.cutoff or (min(6.0, max(4.0, 2.2 * summary.bond)) if summary.periodic else 5.0)
    scaling = d.radial_scaling
    if scaling is not False:
        scaling = RadialScaling(
            scale=scaling.scale or (0.85 * summary.bond if summary.periodic and n_species == 1 else 2.0),
            exponent=3.0 if scaling.exponent is None else scaling.exponent,
        )
    n_max, l_max = d.n_max or (8 if n_species == 1 else 6), (6 if n_species == 1 else 4) if d.l_max is None else d.l_max
    four_body: FourBodyRecipe | Literal["auto", False] = d.four_body or False
    if isinstance(four_body, FourBodyRecipe):
        four_body = full_four_body(four_body, l_max, n_species * n_max)
    elif l_max < 2:  # there are none, and the evidence has no choice
        four_body = False
    return d.model_copy(
        update={
            "cutoff": cutoff,
            "n_max": n_max,
            "l_max": l_max,
            "compression": d.compression
            and CompressionRecipe(
                channels=min(d.compression.channels or CHANNELS_PER_SPECIES * n_species, n_species * n_max)
            ),
            "four_body": four_body,
            "sigma_atom": d.sigma_atom or 0.4,
            "basis": d.basis or ("optimal" if n_species == 1 else "gto"),
            "radial_scaling": scaling,
            "cutoff_width": d.cutoff_width or min(cutoff, 1.0),
            "shortest": d.shortest or min(0.8 * shortest, 0.5 * cutoff),
            "beside": d.beside and _network(d.beside),
        }
    )


def full_four_body(f: FourBodyRecipe, l_max: int, channels: int) -> FourBodyRecipe:
    """With what it leaves open, for a density of so many channels up to l_max. Raises UserError: it asks for a higher degree."""
    if (f.l_max or 2) > l_max:
        raise UserError(f"four_body.l_max {f.l_max or 2} is above the l_max of the descriptor, {l_max}.")
    return f.model_copy(
        update={"channels": min(f.channels, channels), "l_max": f.l_max or min(FOUR_BODY_DEGREE, l_max)}
    )


def _kernel(k: KernelRecipe, summary: DataSummary) -> KernelRecipe:
    return k.model_copy(
        update={
            "zeta": (4 if summary.periodic else 2) if k.zeta is None else k.zeta,
            "length": k.length or 0.5,
            "terms": tuple(_kernel(t, summary) for t in k.terms),
        }
    )


def columns_for(n_labels: int, periodic: bool) -> int:
    """Number of columns for so many labels, whatever the memory."""
    cheap = max(min(n_labels, FEW_COLUMNS), min(n_labels // 3, CHEAP_COLUMNS))
    return min(MOST_COLUMNS, max(n_labels // LABELS_PER_COLUMN[periodic], cheap))


def affordable_columns(memory_GB: float) -> int:
    """Number of columns that a fit may have in so much memory."""
    return int((memory_GB * 1e9 / (8 * MATRICES)) ** 0.5)


def _functionals_for(
    d: DescriptorRecipe | NetworkRecipe, i: InducingRecipe, summary: DataSummary, growing: bool
) -> InducingRecipe:
    """Functionals of the data in place of centres where features are a network's, which few centres represent badly, unless inducing
    variables are given or have to be added as labels come."""
    if growing or i.model_fields_set or not (isinstance(d, NetworkRecipe) or d.beside):
        return i
    most = MOST_FUNCTIONALS
    return i.model_copy(update={"functionals": "all" if summary.n_labels <= most else most})


def _inducing(
    i: InducingRecipe, summary: DataSummary, budget: float, n_descriptors: int, growing: bool, for_variances: int
) -> InducingRecipe:
    """As many columns as memory, data and time allow, shared by centres and their gradients; of functionals as many as asked for. With all
    functionals centres are for variances alone, which have at most so many columns."""
    if i.functionals not in (None, "none", "all"):
        return i
    i = i.model_copy(update={"functionals": None}) if i.functionals == "none" else i
    columns = min(affordable_columns(budget), columns_for(summary.n_labels, summary.periodic))
    if i.functionals:
        columns = min(columns, for_variances)
    columns = max(columns, 50) // n_descriptors
    gradients, most = i.gradients, i.n
    if growing and not isinstance(i.shares, dict):
        i = i.model_copy(update={"n": None})
    if isinstance(i.shares, dict):
        n = i.n or sum(i.shares.values())
    else:
        n = i.n or max(
            1,
            min(
                columns // (1 + (GRADIENTS[summary.periodic] if gradients is None else gradients)),
                summary.n_environments,
            ),
        )
    if gradients is None:
        gradients = max(0, min(15, columns // n - 1)) if i.n else GRADIENTS[summary.periodic]
    return i.model_copy(update={"n": min(n, most or n), "gradients": gradients})
