"""Training data of a fit: checked, on the device, with the recipe filled in from them and baselines subtracted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from gpmlp.core.errors import chemical_symbol
from gpmlp.core.findings import Finding
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.descriptors import learn_descriptor
from gpmlp.fitting import charge_fit, defaults, four_body_choice, near_duplicates, prepare
from gpmlp.fitting.cost import most_columns
from gpmlp.fitting.near_duplicates import IndependentGroups
from gpmlp.fitting.partitions import Partitions
from gpmlp.fitting.regression import InducingModel
from gpmlp.fitting.report import StageTimer
from gpmlp.fitting.workers import Workers
from gpmlp.io.label_checks.stage import sort_findings
from gpmlp.potential.baseline import Baseline
from gpmlp.potential.charges import ChargeModel
from gpmlp.recipe import Recipe
from gpmlp.uncertainty.residuals import force_label_noise


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Training data on the device, with the recipe filled in.

    Attributes:
        targets: labels that can be right; remaining: `labels` less the baselines.
        shortest: distance of each pair of species that occurs, by symbols, A.
        label_noise: as much of the noise as labels themselves show, by kind; constant: what labels bring with them.
        groups: structures that are independent of each other, and what is near each.
        findings: of reading and checking the labels.
        labels: those that can be right, and energies of failed calculations with a large noise.
        partitions: of the structures with what remains of their labels.
        choices: see FitReport.
        charges: whose electrostatics were subtracted as well; None where there are none.
    """

    recipe: Recipe
    structures: Structures
    targets: Targets
    remaining: Targets
    baselines: tuple[Baseline, ...]
    shortest: dict[str, float]
    label_noise: dict[str, float]
    constant: dict[str, float]
    groups: IndependentGroups
    findings: tuple[Finding, ...]
    labels: Targets
    partitions: Partitions
    choices: tuple[str, ...]
    charges: ChargeModel | None = None

    @property
    def failed(self) -> Tensor:
        """(structures,) bool: energies that can be of no structure."""
        return (self.targets.energies.isnan() & ~self.labels.energies.isnan()).cpu()

    @staticmethod
    def from_labels(
        structures: Structures, targets: Targets, recipe: Recipe, findings: Sequence[Finding], workers: Workers
    ) -> TrainingData:
        """Check and move the data, fill in the recipe and subtract the baselines."""
        structures, targets = prepare.prepare_data(structures, targets, recipe)
        findings = sort_findings([*findings, *prepare.check_labels(structures, targets, recipe)])
        trusted = prepare.trusted_labels(structures, targets, recipe)
        learned = prepare.with_failed_energies(trusted, structures, targets)
        recipe, base, summary, inducing_choice = prepare.set_up(structures, trusted, recipe)
        remaining = prepare.subtract_baselines(structures, learned, base)
        recipe, four_body = four_body_choice.settle(recipe, structures, remaining)
        shortest = {f"{chemical_symbol(a)}-{chemical_symbol(b)}": r for (a, b), r in summary.shortest.items()}
        given = prepare.labels_noise(trusted)
        shown = [force_label_noise(structures, trusted), given.get("forces", math.nan)]
        shown = [x for x in shown if x == x]
        noise = {"forces": max(shown)} if shown else {}
        species = structures.distinct_species
        local = defaults.local_descriptor(recipe, summary, len(species))
        spectrum = local.model_copy(update={"four_body": False, "beside": False})
        descriptor = learn_descriptor(species, spectrum.model_dump(), structures, recipe.seed)
        partitions = Partitions.of_data(structures, remaining, most_columns(recipe, structures), workers)
        groups = near_duplicates.find_groups(structures, descriptor, targets.config_types, recipe.seed, partitions)
        twins = groups.finding(structures)
        findings = sort_findings([*findings, *([twins] if twins else [])])
        known = recipe, structures, trusted, remaining, base, shortest, noise, given, groups, findings, learned
        return TrainingData(*known, partitions, tuple(filter(None, (inducing_choice, four_body))))

    def with_charges_fitted(
        self, models: Sequence[InducingModel], stages: StageTimer
    ) -> tuple[TrainingData, dict[str, Any] | None]:
        """With electrostatics subtracted, where charges are asked for or the data ask for them; and an entry of the FitReport."""
        if self.recipe.long_range.charges == "off":
            return self, None
        stages.begin("charges")
        found, record = charge_fit.tried_charges(self.recipe, self.structures, self.remaining, models, stages.report)
        if found is None:
            return self, record
        about = self.structures, self.targets, self.labels, self.recipe, self.baselines, found.model
        base, remaining = prepare.subtract_charges(*about)
        workers, columns = self.partitions.workers, most_columns(self.recipe, self.structures)
        partitions = Partitions.of_data(self.structures, remaining, columns, workers)
        return replace(self, remaining=remaining, baselines=base, partitions=partitions, charges=found.model), record
