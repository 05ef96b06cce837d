"""Passes over the training data: candidates for centres, rows, and predictions of each partition, and how they are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor

from gpmlp.core import parallel
from gpmlp.core.environments import Descriptor, StructureEnvironments
from gpmlp.core.quantities import Prediction, Targets
from gpmlp.core.structures import CHUNK_ATOMS, Structures, chunk_structures
from gpmlp.fitting import regression
from gpmlp.fitting.kept_rows import KeptRows, rows_of_each
from gpmlp.fitting.partitions import Partition, Partitions
from gpmlp.fitting.regression import InducingModel
from gpmlp.fitting.sparse_points import Candidates, CentreChoice
from gpmlp.fitting.workers import Report, silent
from gpmlp.gp.covariances import CovarianceRows
from gpmlp.gp.qr import RowFactor
from gpmlp.potential.charges import ChargeModel
from gpmlp.potential.potential import Potential
from gpmlp.recipe import Recipe
from gpmlp.uncertainty import mahalanobis
from gpmlp.uncertainty.mahalanobis import Mahalanobis, ReservoirSample

PASS_ATOMS = 128  # atoms of a chunk of rows
SAMPLE_BYTES = 16 << 20  # of features of one species to which novelty is fitted
BEHIND = 1 << 40  # added to the numbers of structures set aside: they come after all that are fitted

Factors = dict[str, RowFactor]


class FeatureSample:
    """A uniform sample of the features of each species, and the novelty fitted to it."""

    def __init__(self, recipe: Recipe, before: dict[int, int]) -> None:
        """Args: before: number of atoms of each species in earlier partitions."""
        self.choices, self.seed, self.before = recipe.novelty, recipe.seed, before
        self.reservoirs: dict[int, ReservoirSample] = {}

    def add(self, z: int, features: Tensor, structures: Tensor) -> None:
        """Features (n, features) of environments with neighbours, and the number of the structure of each, in whose order they count."""
        if self.choices is False:
            return
        if z not in self.reservoirs:
            rows = max(10, min(self.choices.samples, SAMPLE_BYTES // (features.shape[1] * features.element_size())))
            self.reservoirs[z] = ReservoirSample(rows, self.seed + z, self.before[z])
        self.reservoirs[z].add(features, structures)

    def add_structures(self, descriptor: Descriptor, parts: Sequence[Structures], first: int) -> None:
        """Chunks that come after `first` structures."""
        for part in parts if self.choices is not False else ():
            here = StructureEnvironments.from_structures(descriptor, part)
            features, surrounded = here.environments.features, here.surroundings.surrounded
            for z in part.distinct_species:
                mine = surrounded & (part.species == z)
                self.add(z, features[mine], first + part.structure_of_atom[mine])
            first += len(part)

    def merge(self, later: FeatureSample) -> FeatureSample:
        """The sample of both; neither is changed."""
        both = FeatureSample.__new__(FeatureSample)
        both.__dict__ |= self.__dict__ | {"reservoirs": later.reservoirs | self.reservoirs}
        for z in self.reservoirs.keys() & later.reservoirs.keys():
            both.reservoirs[z] = self.reservoirs[z].merge(later.reservoirs[z])
        return both

    def fit(self) -> Mahalanobis | None:
        """None if no novelty is wanted."""
        if self.choices is False:
            return None
        order = {z: r.owners().argsort(stable=True) for z, r in self.reservoirs.items()}
        features = {z: r.rows().double()[order[z]] for z, r in self.reservoirs.items()}
        structures = {z: r.owners()[order[z]] for z, r in self.reservoirs.items()}
        return mahalanobis.fit_mahalanobis(features, structures, self.choices.quantile, self.seed)


def collect_candidates(
    partitions: Partitions, recipe: Recipe, choice: CentreChoice, fitted: Tensor, held: Tensor, report: Report
) -> tuple[Candidates, FeatureSample]:
    """Environments of the structures fitted, of which centres are chosen, and a sample of these and of those set aside."""
    return partitions.reduce(_collect, _merge_both, recipe, choice, chosen=(fitted, held), report=report)


def _collect(
    report: Report, recipe: Recipe, choice: CentreChoice, partition: Partition, fitted: Tensor, held: Tensor
) -> tuple[Candidates, FeatureSample]:
    (parts, _), (parts_held, _) = (_chunked(partition, which) for which in (fitted, held))
    sample, first = FeatureSample(recipe, partition.atoms_before), partition.first
    candidates = Candidates(choice).collect(
        parts,
        lambda done: report(done, len(parts), ""),
        lambda z, features, structures: sample.add(z, features, first + structures),
    )
    with parallel.one_core():
        sample.add_structures(choice.descriptor, parts_held, first + BEHIND)
    return candidates, sample


def _merge_both(
    first: tuple[Candidates, FeatureSample], later: tuple[Candidates, FeatureSample]
) -> tuple[Candidates, FeatureSample]:
    with parallel.one_core():
        return first[0].merge(later[0]), first[1].merge(later[1])


def make_factors(
    partitions: Partitions,
    models: Sequence[InducingModel],
    charges: ChargeModel | None,
    fitted: Tensor,
    held: Tensor,
    kept: Tensor,
    report: Report,
) -> tuple[Factors, Factors, KeptRows]:
    """Triangular factors of the rows of the structures fitted, and of those set aside, by kind; columns of charges behind the others.

    Args:
        kept: numbers of the structures whose rows are kept.
    """
    light = [replace(model, lowers=()) for model in models]
    work = _make_factors if len(partitions.bounds) == 1 else _make_triangles
    return partitions.reduce(work, _merge_factors, light, charges, chosen=(fitted, held, kept), report=report)


def _make_factors(
    report: Report,
    models: Sequence[InducingModel],
    charges: ChargeModel | None,
    partition: Partition,
    fitted: Tensor,
    held: Tensor,
    kept: Tensor,
) -> tuple[Factors, Factors, KeptRows]:
    rows: dict[int, CovarianceRows] = {}
    wanted, made = set(kept.tolist()), []
    for chosen, told in ((fitted, report), (held, silent)):
        parts, targets = _chunked(partition, chosen)
        numbers = chosen.split([len(part) for part in parts])

        def keep(k: int, of_chunk: Sequence[CovarianceRows], parts: list = parts, numbers: tuple = numbers) -> None:
            if not wanted.isdisjoint(here := numbers[k].tolist()):
                each = zip(here, rows_of_each(parts[k], of_chunk), strict=True)
                rows.update({partition.first + i: row for i, row in each if i in wanted})

        made.append(regression.stream_rows(models, parts, targets, told, charges, keep))
    return made[0], made[1], KeptRows(rows)


def _make_triangles(report: Report, *about: Any) -> tuple[Factors, Factors, KeptRows]:
    """The same with nothing left to be folded in, which is a third of what waits to be merged and is sent."""
    found = _make_factors(report, *about)
    with parallel.one_core():  # the last digits depend on it
        for factor in (*found[0].values(), *found[1].values()):
            factor.compress()
    return found


def _merge_factors(
    first: tuple[Factors, Factors, KeptRows], later: tuple[Factors, Factors, KeptRows]
) -> tuple[Factors, Factors, KeptRows]:
    (fitted, held, rows), (fitted_later, held_later, rows_later) = first, later
    return (
        regression.merge_factors(fitted, fitted_later),
        regression.merge_factors(held, held_later),
        rows.joined(rows_later),
    )


def predict(partitions: Partitions, potential: Potential) -> Prediction:
    """Energies, forces and stresses of all structures."""
    light = replace(potential, variances=None, novelty=None, report={}, provenance={})
    return Prediction.concatenate(partitions.map(_predict, light))


def _predict(report: Report, potential: Potential, partition: Partition) -> Prediction:
    parts = list(chunk_structures(partition.structures, CHUNK_ATOMS))
    return Prediction.concatenate(parallel.map_pieces(lambda part: potential(part), parts))


def _chunked(partition: Partition, chosen: Tensor) -> tuple[list[Structures], list[Targets]]:
    """Chunks of PASS_ATOMS atoms of the chosen structures, and the targets of each."""
    structures, targets = partition.structures.select(chosen), partition.targets.select(partition.structures, chosen)
    parts = list(chunk_structures(structures, PASS_ATOMS))
    ends = list(accumulate(map(len, parts), initial=0))
    return parts, [targets.select(structures, range(*chunk)) for chunk in pairwise(ends)]
