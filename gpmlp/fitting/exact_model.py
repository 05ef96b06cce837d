"""The exact process of labelled structures: all their functionals and the labels of these, some of which may come later or go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from gpmlp.core.environments import Descriptor
from gpmlp.core.quantities import KINDS, Targets
from gpmlp.core.structures import Structures
from gpmlp.core.units import VOIGT
from gpmlp.fitting.workers import Report
from gpmlp.gp import functionals, hyperparameters
from gpmlp.gp.evidence import DenseData
from gpmlp.gp.exact import ExactPosterior, ExactProcess
from gpmlp.gp.functionals import FunctionalBlock
from gpmlp.gp.kernels import ZonalKernel
from gpmlp.gp.likelihood import Hyperparameters
from gpmlp.recipe import Recipe

FIRST = (
    1200  # functionals, about, whose evidence compares the signals of species, and where hyperparameters of all start
)


class FunctionalLabels(NamedTuple):
    """Labels of functionals as `functional_maps` has them.

    Attributes:
        values: (functionals,) NaN where not known; kinds: index in KINDS; scale: noise over that of the kind.
        given: noise of its own, NaN where that of the kind holds; their root mean square where a functional mixes several.
    """

    values: Tensor
    kinds: Tensor
    scale: Tensor
    given: Tensor

    def by_kind(self) -> dict[str, Tensor]:
        """Which have the noise of the kind."""
        common = self.given.isnan()
        rows = {kind: ((self.kinds == i) & common).nonzero()[:, 0] for i, kind in enumerate(KINDS)}
        return {kind: which for kind, which in rows.items() if len(which)}

    def process(self, covariance: Tensor) -> ExactProcess:
        """With the covariance (n, n) of the functionals, of which the lower half counts and which it takes over."""
        return ExactProcess.of_covariance(covariance, self.values, self.by_kind(), self.scale, self.given)


@dataclass(frozen=True, eq=False)
class ExactModel:
    """All functionals of the data and their labels.

    Attributes:
        of: index, among those fitted, of each structure of the block.
        start: noise by kind where learning of all hyperparameters begins: by evidence of the first functionals alone, as `relative` of the
            block is.
        first: structures that these are of; 0 once some have gone.
    """

    block: FunctionalBlock
    process: ExactProcess
    of: tuple[int, ...]
    start: dict[str, float]
    first: int

    @staticmethod
    def from_labels(
        recipe: Recipe,
        descriptor: Descriptor,
        kernel: ZonalKernel,
        structures: Structures,
        targets: Targets,
        report: Report,
        growing: bool = False,
    ) -> ExactModel:
        """Of the labels of structures in random order, less the baselines.

        Args:
            growing: whether others are to come, which need directions of the features that these have not.
            report: of the pairs of structures whose covariances are done.
        """
        like, structures = structures.positions, structures.to(dtype=torch.float64)
        maps = label_maps(structures, targets)
        order, _ = random_order(structures, torch.tensor([len(m) for m in maps]), recipe.seed)
        structures, targets = structures.select(order), targets.select(structures, order)
        unit = dict.fromkeys(structures.distinct_species, 1.0)
        make = FunctionalBlock.with_all_directions if growing else FunctionalBlock.make
        block = make(descriptor, structures, [maps[i] for i in order.tolist()], unit)
        relative, noise, _ = first_evidence(recipe, 0, kernel, block, targets)
        block, note = block.of_species(relative), f"covariances of {block.n_columns} functionals"
        half = block.lower_K_uu(kernel, lambda done, total: report(done, total, note))
        process = functional_labels(structures, targets, block.maps).process(half)
        about = process, tuple(order.tolist()), noise, first_structures(block)
        return ExactModel(block if growing else block.to(like), *about)

    def begin(self, recipe: Recipe) -> Hyperparameters:
        """Noises and the signal, a factor on `relative`, where learning begins."""
        kinds = [kind for kind in KINDS if kind in self.process.rows]
        parameters = hyperparameters.make_hyperparameters(recipe, kinds, [(0, None)])
        for kind in kinds:
            if kind in self.start:
                parameters.set(kind, torch.tensor([self.start[kind]]).log())
        return parameters

    def bordered(self, kernel: ZonalKernel, structures: Structures, targets: Targets) -> ExactModel:
        """With structures that come later, and their labels less the baselines, in O(k n)."""
        here = structures.to(dtype=torch.float64)
        maps, first = label_maps(here, targets), len(self.of)
        block = self.block.joined(here, maps)
        covariance = block.lower_K_uu(kernel, first=first)
        later = functional_labels(here, targets, maps).process(covariance[:, self.block.n_columns :])
        numbers = range(first, first + len(structures))
        return replace(self, block=block, process=self.process.bordered(covariance, later), of=(*self.of, *numbers))

    def relearned(self, recipe: Recipe, kernel: ZonalKernel, targets: Targets) -> ExactModel:
        """With the signals of species, and noises to start from, by evidence of the first functionals as these are now, and covariances
        anew; itself where they are those that it learned from, as they are once there are FIRST.

        Args:
            targets: labels of the structures less the baselines, in the order of the block.
        """
        if self.first == first_structures(self.block):
            return self
        structures = self.block.structures
        relative, noise, _ = first_evidence(recipe, 0, kernel, self.block, targets)
        block = self.block.of_species(relative)
        process = functional_labels(structures, targets, block.maps).process(block.lower_K_uu(kernel))
        return ExactModel(block, process, self.of, noise, first_structures(block))

    def select(self, numbers: Sequence[int]) -> ExactModel:
        """Of some of the structures, which get the numbers in this (rising) order; its covariances are one square again."""
        place = {number: i for i, number in enumerate(numbers)}
        stays = [i for i, number in enumerate(self.of) if number in place]
        starts = self.block.starts
        columns = torch.cat([torch.arange(*starts[i : i + 2]) for i in stays])
        of = tuple(place[self.of[i]] for i in stays)
        block, process = self.block.of_structures(stays), self.process.select(columns)
        first = self.first if len(stays) == len(self.of) else 0
        return replace(self, block=block, process=process, of=of, first=first)

    def left_out(self, posterior: ExactPosterior, numbers: Sequence[int], forces: Tensor) -> tuple[Tensor, Tensor]:
        """(1 + 3 atoms + 6,) errors, label - mean, of energy, forces and stress of the first of some structures without all of them, and
        their variances, noise included; zero where there is no functional.

        Args:
            numbers: as `of` has them; forces: (3 atoms,) labels of the first, along rigid motions of which the mean is zero.
        """
        places = [self.of.index(i) for i in numbers]
        columns = [c for p in places for c in range(*self.block.starts[p : p + 2])]
        maps = self.block.maps[places[0]].double()
        error, covariance = posterior.left_out(columns)
        errors = maps.T @ error[: len(maps)]
        forces = forces.to(maps)
        errors[1:-6] += forces - maps[:, 1:-6].T @ (maps[:, 1:-6] @ forces)
        return errors, (maps * (covariance[: len(maps), : len(maps)] @ maps)).sum(0)


def why_not_exact(recipe: Recipe, structures: Structures, targets: Targets) -> str:
    """What stands in the way of a Cholesky factorisation of all functionals; empty where nothing does."""
    if len(recipe.inducings) > 1:
        return "there are several descriptors"
    if structures.positions.device.type != "cpu":
        return "it is made on the CPU alone"
    noise = targets.forces_noise.nan_to_num(-1.0).masked_fill(targets.forces.isnan(), torch.inf)
    first = noise[structures.offsets[:-1], :1][structures.structure_of_atom]
    if not (noise == first).all():
        return "force labels of one structure have different noises, or are known in part"
    unknown = targets.stresses.isnan().flatten(1)
    return "" if bool((unknown == unknown[:, :1]).all()) else "stress labels are known in part"


def label_maps(structures: Structures, targets: Targets) -> list[Tensor]:
    """`functional_maps` of what has labels."""
    moving = torch.zeros(len(structures), dtype=torch.bool, device=structures.species.device)
    moving[structures.structure_of_atom[~targets.forces.isnan().all(1)]] = True
    stressed = ~targets.stresses.isnan().flatten(1).all(1)
    return functionals.functional_maps(structures, ~targets.energies.isnan(), moving, stressed)


def random_order(structures: Structures, functionals: Tensor, seed: int) -> tuple[Tensor, int]:
    """A random order of the structures that begins with some that hold every species, and how many these are; structures that have
    functionals (of each, how many) rather than others."""
    order = torch.randperm(len(structures), generator=torch.Generator().manual_seed(seed))
    there = structures.composition(structures.distinct_species)[order.to(structures.species.device)].cpu() > 0
    some = there & (functionals[order] > 0)[:, None]
    best = torch.where(some.any(0), some, there).int().argmax(0).unique()
    rest = torch.ones(len(order), dtype=torch.bool).index_fill(0, best, False)
    return torch.cat([order[best], order[rest]]), len(best)


def first_structures(block: FunctionalBlock) -> int:
    """How many of its structures have FIRST functionals."""
    return max(1, sum(start <= FIRST for start in block.starts[1:]))


class FirstEvidence(NamedTuple):
    """What the functionals of the first structures say alone: signal of local energies of each species, eV; noise by kind; and minus the
    log evidence, less the log prior of these, nats."""

    signal: dict[int, float]
    noise: dict[str, float]
    negative_log: float


def first_evidence(
    recipe: Recipe, k: int, kernel: ZonalKernel, block: FunctionalBlock, targets: Targets
) -> FirstEvidence:
    """By the evidence of the dense process, hyperparameters of descriptor k learned."""
    few = block.select(torch.arange(block.starts[first_structures(block)]))
    structures, maps = few.structures, few.maps
    labels = targets.select(block.structures, range(len(structures)))
    species = structures.distinct_species
    every = [few.of_species({z: 1.0}).K_uu(kernel) for z in species]
    of_all = functional_labels(structures, labels, maps)
    known = ~of_all.values.isnan()
    shown = FunctionalLabels(*(part[known] for part in of_all))
    rows, own_variance = shown.by_kind(), shown.given.nan_to_num(0.0).square()
    data = DenseData(tuple(c[known][:, known] for c in every), shown.values, rows, shown.scale, own_variance)
    own = recipe.model_copy(update={"descriptor": recipe.descriptors[k], "signal": recipe.signals[k]})
    parameters = hyperparameters.make_hyperparameters(own, list(rows), [(0, z) for z in species])
    negative_log = data.maximise(parameters).negative_log_evidence if len(data.values) else 0.0
    found = dict(zip(species, parameters.signal().tolist(), strict=True))
    typical = sum(found.values()) / len(found)
    return FirstEvidence({z: found.get(z, typical) for z in block.relative}, parameters.noise(), negative_log)


def functional_labels(structures: Structures, targets: Targets, maps: Sequence[Tensor]) -> FunctionalLabels:
    """Labels of the functionals of structures, of as many as there are structures."""
    parts, offsets = [], structures.offsets.tolist()
    a, b = torch.tensor(VOIGT).T
    for i, rows in enumerate(maps[: len(structures)]):
        atoms = slice(offsets[i], offsets[i + 1])
        n = atoms.stop - atoms.start
        label = torch.cat([targets.energies[i, None], targets.forces[atoms].flatten(), targets.stresses[i][a, b]]).to(
            rows
        )
        noises = (
            n * targets.energies_noise[i, None],
            targets.forces_noise[atoms].flatten(),
            targets.stresses_noise[i].expand(6),
        )
        noise = torch.cat(noises).to(rows)
        used = rows != 0
        own = (used & ~noise.isnan()) * rows.square()
        given = ((own * noise.nan_to_num().square()).sum(1) / own.sum(1)).sqrt()  # NaN where none has one of its own
        values = (rows * label.nan_to_num()).sum(1).masked_fill((used & label.isnan()).any(1), torch.nan)
        kinds = torch.where(used[:, 0], 0, torch.where(used[:, -6:].any(1), 2, 1))
        scale = torch.where(used[:, 0], n, 1).to(rows)
        parts.append((values, kinds, scale, given))
    return FunctionalLabels(*(torch.cat(part) for part in zip(*parts, strict=True)))
