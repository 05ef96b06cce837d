"""Preparation of training data: checks, noise per config_type, the recipe filled in, baselines made and subtracted."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch

from gpmlp.core import errors, free_atoms
from gpmlp.core.findings import Finding
from gpmlp.core.quantities import KINDS, Prediction, Targets
from gpmlp.core.structures import Structures
from gpmlp.descriptors.networks import find_network
from gpmlp.fitting import charge_fit, cost, defaults, exact_model
from gpmlp.gp import hyperparameters
from gpmlp.gp.hyperparameters import NOISE_FIELDS
from gpmlp.gp.kernels import make_kernel
from gpmlp.io.label_checks import outliers, totals
from gpmlp.io.label_checks import stage as label_checks
from gpmlp.potential import baselines
from gpmlp.potential.baseline import Baseline
from gpmlp.potential.calculator_energies import CalculatorEnergies
from gpmlp.potential.charges import ChargeModel
from gpmlp.potential.dispersion import D3Dispersion, R6Tail
from gpmlp.recipe import NARROWEST, R6_OFF, DescriptorRecipe, InducingRecipe, R6Recipe, Recipe

ISOLATED_NOISE = 1e-3  # eV
MOST_FUNCTIONALS = (
    12_000  # of a model that is updated: a label with 6000 takes less than a second, and time grows with the square
)
ONLINE_MATRICES = 3  # of as many rows and columns, at the peak of a refresh
SWITCH = 0.7, 0.95  # of the cutoff, between which a dispersion tail is switched on


def prepare_data(
    structures: Structures, targets: Targets, recipe: Recipe, whole: bool = True
) -> tuple[Structures, Targets]:
    """Check that labels and structures belong together, move them to the device, and blank labels not to be used.

    Args:
        whole: whether these are all the data, so that every config_type and species that the recipe names has to be among them.
    """
    if not len(structures):
        raise errors.UserError("There are no training structures.")
    if len(targets) != len(structures) or targets.forces.shape[0] != structures.n_atoms:
        raise errors.UserError(
            f"The targets are of {len(targets)} structures with {targets.forces.shape[0]} atoms, "
            f"the structures are {len(structures)} with {structures.n_atoms} atoms."
        )
    for name in ("energies", "forces", "stresses"):
        if not getattr(recipe, f"use_{name}"):
            blank: dict[str, Any] = {name: torch.full_like(getattr(targets, name), float("nan"))}
            targets = replace(targets, **blank)
    no_volume = structures.volumes.isnan() & ~targets.stresses.isnan().all(2).all(1)
    if no_volume.any():
        name = structures.names[int(no_volume.nonzero()[0, 0])]
        raise errors.UserError(
            f"{name}: has a stress but is not periodic or has no volume; remove the stress or set pbc."
        )
    if all(getattr(targets, kind).isnan().all() for kind in KINDS):
        raise errors.UserError(
            "No structure has an energy, forces or a stress to learn from; check the names of the labels in the file."
        )
    if whole:
        hyperparameters.check_species(recipe, structures)
    targets = _with_config_noise(targets, structures, recipe, whole)
    device, dtype = torch.device(recipe.device), getattr(torch, recipe.dtype)
    return structures.to(device=device, dtype=dtype), targets.to(device=device, dtype=dtype)


def _with_config_noise(targets: Targets, structures: Structures, recipe: Recipe, whole: bool) -> Targets:
    """Write the recipe's noise per config_type where a structure has none of its own."""
    given = recipe.noise.config_types
    unknown = set(given) - set(targets.config_types)
    if unknown and whole:
        name = sorted(unknown)[0]
        hint = errors.suggest_name(name, {c for c in targets.config_types if c})
        raise errors.UserError(
            f"noise.config_types names '{name}', but no training structure has this config_type.{hint}"
        )
    if not given:
        return targets
    values: dict[str, Any] = {f"{kind}_noise": getattr(targets, f"{kind}_noise").clone() for kind in KINDS}
    for kind, key in NOISE_FIELDS.items():
        for i, label in enumerate(targets.config_types):
            value = getattr(given[label], key) if label in given else None
            if value is None:
                continue
            here = slice(int(structures.offsets[i]), int(structures.offsets[i + 1])) if kind == "forces" else i
            field_ = values[f"{kind}_noise"]
            field_[here] = torch.where(field_[here].isnan(), torch.full_like(field_[here], value), field_[here])
    return replace(targets, **values)


class SetUp(NamedTuple):
    """What follows from the data before anything is learned.

    Attributes:
        recipe: filled in; baselines; summary: that both come from.
        choice: what inducing variables are, and why, where the recipe left that open.
    """

    recipe: Recipe
    baselines: tuple[Baseline, ...]
    summary: defaults.DataSummary
    choice: str


def set_up(structures: Structures, targets: Targets, recipe: Recipe, growing: bool = False) -> SetUp:
    """The recipe filled in from the data, and the baselines.

    Args:
        growing: see defaults.resolve_recipe.
    """
    summary = defaults.summarise_data(structures, targets)
    recipe = recipe if growing else with_open_choices(recipe, summary.periodic)
    recipe = _with_charges_chosen(structures, recipe, summary, growing)
    full, choice = _filled_in(structures, targets, recipe, summary, growing)
    return SetUp(full, make_baselines(structures, targets, full, summary), summary, choice)


def _filled_in(
    structures: Structures, targets: Targets, recipe: Recipe, summary: defaults.DataSummary, growing: bool
) -> tuple[Recipe, str]:
    """With all functionals of the data where `auto` finds nothing that stands in their way; and what it chose."""
    every, n_species = with_functionals(recipe, "all"), len(structures.distinct_species)
    full = defaults.resolve_recipe(every, summary, n_species, growing)
    if every is recipe:
        return full, ""
    few = defaults.resolve_recipe(with_functionals(recipe, None), summary, n_species, growing)
    if summary.periodic:
        why = "most structures are periodic"
    elif charge_fit.reason_to_try(structures, full):
        why = "they leave no columns for charges"
    elif any(make_kernel(k).quadratic is None for k in full.kernels):
        why = "of this kernel a prediction would cost more with each structure"
    else:
        why = cost.why_not_all(full, few, structures, targets)
    if why:
        return few, f"centres, not all functionals of the data: {why}"
    return full, "all functionals of the data: the exact process"


def _with_charges_chosen(
    structures: Structures, recipe: Recipe, summary: defaults.DataSummary, growing: bool
) -> Recipe:
    """With charges `auto` or `off` where the recipe leaves it open: tried where a model without them cannot be right."""
    if recipe.long_range.charges is not None:
        return recipe
    chosen: Literal["auto", "off"] = "off"
    if not growing:
        few = defaults.resolve_recipe(with_functionals(recipe, None), summary, len(structures.distinct_species))
        chosen = "auto" if charge_fit.are_tried_unasked(structures, few) else "off"
    return with_charges(recipe, chosen)


def with_charges(recipe: Recipe, chosen: Literal["auto", "off"]) -> Recipe:
    """The recipe with this choice of charges."""
    return recipe.model_copy(update={"long_range": recipe.long_range.model_copy(update={"charges": chosen})})


def with_open_choices(recipe: Recipe, periodic: bool) -> Recipe:
    """The recipe with `auto` where it says nothing of inducing variables or, of molecules, of four-body invariants; networks have defaults
    of their own."""
    local = all(isinstance(d, DescriptorRecipe) and not d.beside for d in recipe.descriptors)
    if local and all(i == InducingRecipe() for i in recipe.inducings):
        opened = tuple(i.model_copy(update={"functionals": "auto"}) for i in recipe.inducings)
        recipe = recipe.model_copy(update={"inducing": opened})
    if periodic:
        return recipe
    descriptors = (
        d.model_copy(update={"four_body": "auto"}) if d.name == "soap" and d.four_body is None else d
        for d in recipe.descriptors
    )
    return recipe.model_copy(update={"descriptor": tuple(descriptors)})


def with_functionals(recipe: Recipe, chosen: Literal["all"] | None) -> Recipe:
    """The recipe with these where it leaves the choice open."""
    if all(i.functionals != "auto" for i in recipe.inducings):
        return recipe
    given = (i.model_copy(update={"functionals": chosen}) if i.functionals == "auto" else i for i in recipe.inducings)
    return recipe.model_copy(update={"inducing": tuple(given)})


def affordable_functionals(asked: Recipe, structures: Structures, targets: Targets) -> tuple[Recipe, str]:
    """The recipe without functionals where these cannot be had, and why; of solids without any where it leaves the choice open."""
    solids = bool(structures.periodic.any(dim=1).double().mean() > 0.5)
    if solids or asked.long_range.charges not in (None, "off"):  # all functionals leave no columns for charges
        asked = with_functionals(asked, None)
    asked = with_functionals(asked, "all")
    if asked.inducings[0].functionals in (None, "none"):
        return asked, ""
    why, n = exact_model.why_not_exact(asked, structures, targets), int(cost.functionals_of(structures).sum())
    needed, budget = 8e-9 * ONLINE_MATRICES * n**2, asked.memory_GB or defaults.memory_budget_GB()
    if not why and n > MOST_FUNCTIONALS:
        why = f"{n} of them, {MOST_FUNCTIONALS} at most"
    if not why and needed > budget:
        why = f"{n} of them would take {needed:.2g} of {budget:.2g} GB, memory_GB"
    inducing = tuple(i.model_copy(update={"functionals": None}) for i in asked.inducings)
    return (asked.model_copy(update={"inducing": inducing}) if why else asked), why


def make_baselines(
    structures: Structures, targets: Targets, recipe: Recipe, summary: defaults.DataSummary
) -> tuple[Baseline, ...]:
    """Isolated-atom energies (given, from frames, or by least squares), ZBL repulsion below the shortest distances of the data, and what
    the recipe names besides."""
    out = outer_baselines(recipe)
    if dispersion := dispersion_of(recipe, structures.distinct_species):
        out.append(dispersion)
    network, zbl = recipe.baseline.network, recipe.baseline.zbl
    if network:
        known = find_network(network.name, network.checkpoint, network.sha256)
        out.append(baselines.NetworkEnergies(network.name, network.checkpoint, known.sha256))
    species = structures.distinct_species
    if zbl is not False:
        pairs = [(a, b) for a in species for b in species if a <= b]
        outer = {p: zbl.outer or summary.shortest.get(p, 0.6 * summary.bond) for p in pairs}
        out.append(baselines.ZBL({p: zbl.inner or 0.4 * outer[p] for p in pairs}, outer))
    choice = recipe.baseline.isolated_atoms
    if choice == "none":
        return tuple(out)
    if isinstance(choice, dict):
        energies = {errors.atomic_number(s): e for s, e in choice.items()}
        energies = _less_atoms_of([term for term in out if not isinstance(term, baselines.ZBL)], energies)
        missing = [errors.chemical_symbol(z) for z in species if z not in energies]
        if missing:
            raise errors.UserError(f"baseline.isolated_atoms gives no energy for {', '.join(missing)}.")
    else:
        remaining = less_baselines(structures, targets, out) if out else targets
        return (*out, *_isolated_atoms(structures, remaining, recipe))
    return (*out, baselines.IsolatedAtoms(energies))


def outer_baselines(recipe: Recipe) -> list[Baseline]:
    """What the recipe names that is asked of whole structures. Raises UserError: it is not to be had here."""
    calculator = recipe.baseline.calculator
    return [CalculatorEnergies.asked_for(calculator.name, calculator.kwargs, calculator.reuse)] if calculator else []


def dispersion_of(recipe: Recipe, species: Sequence[int]) -> Baseline | None:
    """The dispersion that a resolved recipe asks for. Raises UserError: a coefficient or a distance is not given and not known."""
    chosen = recipe.long_range.dispersion
    if not chosen:
        return None
    if chosen.d3:
        return D3Dispersion.asked_for(chosen.d3.functional, chosen.d3.damping, chosen.d3.atm)
    assert chosen.r6
    cutoffs = [d.cutoff for d in recipe.descriptors if d.cutoff is not None]
    if not cutoffs and None in (chosen.r6.begin, chosen.r6.full):
        raise errors.UserError(
            "long_range.dispersion.r6 begins within the cutoff, and this descriptor has none: give `begin` and `full` (A)."
        )
    begin, full = (
        given or share * max(cutoffs) for given, share in zip((chosen.r6.begin, chosen.r6.full), SWITCH, strict=True)
    )
    if not begin + NARROWEST <= full <= chosen.r6.outer - R6_OFF - NARROWEST:
        raise errors.UserError(
            f"long_range.dispersion.r6: the tail is switched on from begin {begin:.3g} to full {full:.3g} A and goes to zero from "
            f"{chosen.r6.outer - R6_OFF:.3g} to outer {chosen.r6.outer:.3g} A, which must come one after the other."
        )
    pairs = [(a, b) for a in species for b in species if a <= b]
    return R6Tail(
        {pair: _c6(chosen.r6, *map(errors.chemical_symbol, pair)) for pair in pairs}, begin, full, chosen.r6.outer
    )


def _c6(chosen: R6Recipe, a: str, b: str) -> float:
    """Of a pair of elements as it is given, or of free atoms."""
    if not isinstance(chosen.c6, dict):
        return free_atoms.pair_c6(a, b)
    for name in (f"{a}-{b}", f"{b}-{a}"):
        if name in chosen.c6:
            return chosen.c6[name]
    raise errors.UserError(f"long_range.dispersion.r6.c6 gives none of {a}-{b}; the data have this pair.")


def _isolated_atoms(structures: Structures, remaining: Targets, recipe: Recipe) -> tuple[Baseline, ...]:
    """Energies of isolated atoms from frames, or by least squares, of labels less the other baselines."""
    auto = recipe.baseline.isolated_atoms == "auto"
    from_frames = baselines.IsolatedAtoms.from_frames(structures, remaining) if auto else {}
    if set(from_frames) >= set(structures.distinct_species):
        return (baselines.IsolatedAtoms(from_frames),)
    energies = baselines.IsolatedAtoms.least_squares(structures, remaining)
    return (baselines.IsolatedAtoms(energies, baselines.open_directions(structures, remaining)),)


def _less_atoms_of(base: Sequence[Baseline | ChargeModel], energies: dict[int, float]) -> dict[int, float]:
    """Energies of isolated atoms less those of other baselines, or of charges."""
    n, species = len(energies), torch.tensor(list(energies))
    cells = torch.zeros(n, 3, 3, dtype=torch.float64)
    alone = Structures(cells[:, 0], cells, cells[:, 0].bool(), species, torch.arange(n))
    own = baseline_sum(base, alone).energies.tolist()
    return {z: e - mine for (z, e), mine in zip(energies.items(), own, strict=True)}


def check_labels(structures: Structures, targets: Targets, recipe: Recipe) -> list[Finding]:
    """Findings of the checks of labels, without those that choices of the recipe make void."""
    void = set()
    if recipe.baseline.isolated_atoms != "auto":
        void |= {"isolated-atoms-missing", "isolated-atoms-differ", "isolated-atoms-of-another-reference"}
    if isinstance(recipe.baseline.isolated_atoms, dict):
        void.add("energies-of-elements-undetermined")
    return [finding for finding in label_checks.check(structures, targets) if finding.kind not in void]


def trusted_labels(structures: Structures, targets: Targets, recipe: Recipe) -> Targets:
    """Labels without energies that cannot be right: those of failed calculations, and of isolated atoms of another reference.

    Baselines and the calibration come from these alone.
    """
    wrong = outliers.failed_energies(structures, targets)
    if recipe.baseline.isolated_atoms == "auto" and totals.atoms_of_another_reference(structures, targets):
        wrong |= totals.isolated_frames(structures, targets)
    return replace(targets, energies=targets.energies.masked_fill(wrong.to(targets.energies.device), math.nan))


def with_failed_energies(trusted: Targets, structures: Structures, targets: Targets) -> Targets:
    """Trusted labels, and those of failed calculations with a noise of their own as large as their deviation.

    So they weigh next to nothing, and do not enter the noise that all others share.
    """
    failed = outliers.failed_energies(structures, targets).to(targets.energies.device)
    deviation = outliers.energy_deviations(structures, targets).abs().to(targets.energies)
    return replace(
        trusted,
        energies=torch.where(failed, targets.energies, trusted.energies),
        energies_noise=torch.where(failed, deviation, targets.energies_noise),
    )


def subtract_baselines(structures: Structures, targets: Targets, base: Sequence[Baseline]) -> Targets:
    """Labels less the baselines; energies of isolated atoms get a small noise of their own.

    They lie far from all else and would inflate the common noise.
    """
    remaining = less_baselines(structures, targets, base)
    alone = torch.tensor([baselines.is_isolated_atom(label) for label in remaining.config_types]) & (
        structures.counts.cpu() == 1
    )
    open_ = alone.to(remaining.energies.device) & remaining.energies_noise.isnan()
    return replace(remaining, energies_noise=remaining.energies_noise.masked_fill(open_, ISOLATED_NOISE))


def less_baselines(structures: Structures, targets: Targets, base: Sequence[Baseline]) -> Targets:
    """Labels less the baselines. Raises UserError: a baseline gives no stress where there is a label of it."""
    summed = baseline_sum(base, structures)
    lacking = (summed.stresses.isnan() & ~targets.stresses.isnan()).flatten(1).any(1)
    if lacking.any():
        raise errors.UserError(
            f"{structures.names[int(lacking.nonzero()[0, 0])]}: it has a stress, but the baseline gives none for such structures; set "
            "use_stresses: false, or take another baseline."
        )
    return targets.minus(summed)


def subtract_charges(
    structures: Structures,
    trusted: Targets,
    learned: Targets,
    recipe: Recipe,
    base: Sequence[Baseline],
    charges: ChargeModel,
) -> tuple[tuple[Baseline, ...], Targets]:
    """Baselines and what remains of the labels beside charges: energies of isolated atoms are those that the charges leave.

    Args:
        trusted: labels that baselines come from; learned: those that the fit learns from; base: the baselines without charges.
    """
    electrostatic = charges(structures.to(dtype=torch.float64))
    others = tuple(b for b in base if not isinstance(b, baselines.IsolatedAtoms))
    if isinstance(recipe.baseline.isolated_atoms, dict):
        given = next(b for b in base if isinstance(b, baselines.IsolatedAtoms))
        atoms: tuple[Baseline, ...] = (baselines.IsolatedAtoms(_less_atoms_of([charges], given.energies)),)
    elif recipe.baseline.isolated_atoms == "none":
        atoms = ()
    else:
        remaining = trusted.minus(electrostatic)
        atoms = _isolated_atoms(
            structures, less_baselines(structures, remaining, others) if others else remaining, recipe
        )
    every = (*others, *atoms)
    return every, subtract_baselines(structures, learned.minus(electrostatic), every)


def baseline_sum(base: Sequence[Baseline | ChargeModel], structures: Structures) -> Prediction:
    """Energies, forces and stresses of all baselines together."""
    if not base:
        zero = baselines.IsolatedAtoms(dict.fromkeys(structures.distinct_species, 0.0))
        return zero(structures)
    for term in base:
        if isinstance(term, CalculatorEnergies):
            term.compute(structures)
    return functools.reduce(operator.add, (term(structures) for term in base))


def labels_noise(targets: Targets) -> dict[str, float]:
    """Root mean square of the noise that is given with labels, by kind."""
    out = {}
    for kind in KINDS:
        given = getattr(targets, f"{kind}_noise")
        given = given[~given.isnan()]
        if len(given):
            out[kind] = given.square().mean().sqrt().item()
    return out
