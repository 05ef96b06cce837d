"""Data of a fit of charges: the short-range rows of all labels, and what the energy of charges of each structure is made of."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpmlp.core.environments import StructureEnvironments
from gpmlp.core.quantities import KINDS, Targets
from gpmlp.core.structures import CHUNK_ATOMS, Structures, chunk_structures
from gpmlp.fitting import regression
from gpmlp.fitting.regression import InducingModel
from gpmlp.fitting.sparse_points import select_rows
from gpmlp.gp import inducing, likelihood
from gpmlp.gp.covariances import CovarianceRows
from gpmlp.gp.evidence import SufficientStatistics
from gpmlp.gp.likelihood import Observations, StdPrior
from gpmlp.potential.charges import ChargeBasis, ChargeForm, ElectrostaticColumns, EqualStructures, stack_rows
from gpmlp.recipe import Recipe

SHORT_COLUMNS = 600  # of the short-range model beside which charges are fitted
CENTRES = 60  # of q⁰, of each species
ROWS = 12_000  # labels, about, from which charges are fitted: of structures at random where there are more
SPREAD_BYTES = 512 << 20  # of the derivatives of their functions in memory
LABEL_NOISE = {"charges": StdPrior(2e-2, 1e-4, 1.0), "dipoles": StdPrior(5e-2, 1e-4, 5.0)}  # e; e A
FOLDS = 5  # parts of the structures, each of which is left out once


def learned_charge_labels(recipe: Recipe, structures: Structures, targets: Targets) -> Targets:
    """The targets with those labels of charges and dipoles alone that are learned from. Dipoles are those of neutral isolated
    structures: others have none but that of an origin and a cell."""
    used = recipe.long_range.labels != "ignore"
    neutral = (structures.charges == 0) & ~structures.periodic.any(1)
    charges, dipoles = targets.charges.double(), targets.dipoles.double()
    return replace(
        targets,
        charges=charges if used else torch.full_like(charges, torch.nan),
        dipoles=dipoles.masked_fill(~(used & neutral).to(dipoles.device)[:, None], torch.nan),
    )


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Some structures with their labels and short-range rows.

    Attributes:
        fold: of the parts of the data, the one that they belong to.
        rows: by kind, [A | composition | y], whitened.
        labels: observations that rows are of; internal: as in rows_of_labels.
        charges: (atoms,) labels, e; dipoles: (structures, 3), e A; NaN where there are none, or they are not to be learned from.
    """

    fold: int
    structures: list[EqualStructures]
    rows: dict[str, Tensor]
    labels: dict[str, Observations]
    internal: Structures | None
    charges: Tensor
    dipoles: Tensor

    def electrostatic(self, form: ChargeForm, a: Tensor, columns: bool) -> dict[str, Tensor]:
        """By kind, rows [C | e] of E_ES at a, or e alone; of charges and dipoles too."""
        found = [one.evaluate(form, a, columns) for one in self.structures]
        parts = [stack_rows([f.columns for f in found if f.columns is not None])] if columns else []
        return self.as_rows([*parts, stack_rows([f.values for f in found])]) | self._of_charges(found)

    def _of_charges(self, found: Sequence[ElectrostaticColumns]) -> dict[str, Tensor]:
        """Rows of the labels of charges and dipoles, Σ q r, which are linear in charges."""
        charges = [
            f.charges[:, None] if f.of_charges is None else torch.cat([f.of_charges, f.charges[:, None]], dim=1)
            for f in found
        ]
        dipoles = [
            (one.coulomb.positions.mT @ rows.view(*one.coulomb.self_terms.shape, -1)).flatten(0, 1)
            for one, rows in zip(self.structures, charges, strict=True)
        ]
        known = ~self.charges.isnan(), ~self.dipoles.flatten().isnan()
        return {"charges": torch.cat(charges)[known[0]], "dipoles": torch.cat(dipoles)[known[1]]}

    def as_rows(self, parts: Sequence[CovarianceRows]) -> dict[str, Tensor]:
        """Of the labels by kind, without these."""
        return {
            kind: rows[:, :-1] for kind, rows in regression.rows_of_labels(parts, self.labels, self.internal).items()
        }


class ChargeData:
    """Data of a fit of charges: short-range rows once, and what E_ES of each structure is made of.

    Attributes:
        short: by kind, rows [A | composition | y] of all labels; folds: to which part of the structures each belongs.
    """

    def __init__(
        self, recipe: Recipe, models: Sequence[InducingModel], structures: Structures, targets: Targets
    ) -> None:
        """Args: targets: less the baselines."""
        self.recipe, self.models = recipe, _leading_models(models)
        targets = learned_charge_labels(recipe, structures, targets)
        if recipe.long_range.labels == "only":
            charged = torch.zeros(len(structures), dtype=torch.bool)
            charged[structures.structure_of_atom.cpu()[~targets.charges.cpu().isnan()]] = True
            labelled = (charged | ~targets.dipoles.cpu().isnan().all(1)).nonzero()[:, 0]
            held = structures.composition(structures.distinct_species).cpu() > 0
            chosen = torch.cat([labelled, held.long().argmax(0)]).unique()  # charges are of every species
            structures, targets = structures.select(chosen), targets.select(structures, chosen)
        self.structures, self.targets = _some_structures(structures, targets, recipe.seed)
        self.basis = make_basis(self.models[0], self.structures)
        self.chunks = [self._chunk(*one) for one in _chunks(self.structures, self.targets)]
        kinds = [
            k for k in (*KINDS, regression.FIXED, *LABEL_NOISE) if any(len(c.rows.get(k, ())) for c in self.chunks)
        ]
        if recipe.long_range.labels == "only":
            kinds = [k for k in kinds if k in LABEL_NOISE]
        self.short = {k: torch.cat([c.rows[k] for c in self.chunks if k in c.rows]) for k in kinds}
        self.folds = {
            k: torch.cat([torch.full((len(c.rows[k]),), c.fold) for c in self.chunks if k in c.rows]) for k in kinds
        }
        self.counts = {kind: len(rows) for kind, rows in self.short.items()}
        self.grams = {kind: SufficientStatistics.from_factor(rows, len(rows)) for kind, rows in self.short.items()}
        # of the columns of `short`
        self.widths = [*regression.block_widths(self.models), len(self.structures.distinct_species)]

    def leading(self, columns: int) -> ChargeData:
        """The same with about so many of the short-range columns, the most important ones."""
        if columns >= sum(self.widths[:-1]):
            return self
        out, starts = copy.copy(self), [0, *itertools.accumulate(self.widths)]
        share = columns / starts[-2]
        out.widths = [*(max(1, int(share * w)) for w in self.widths[:-1]), self.widths[-1]]
        kept = [torch.arange(s, s + w) for s, w in zip(starts, [*out.widths, 1], strict=True)]  # and the labels
        out.short = {kind: rows[:, torch.cat(kept)] for kind, rows in self.short.items()}
        out.grams = {kind: SufficientStatistics.from_factor(rows, len(rows)) for kind, rows in out.short.items()}
        return out

    @property
    def n_labels(self) -> int:
        return sum(self.counts.values())

    def _chunk(self, fold: int, part: Structures, targets: Targets) -> _Chunk:
        rows = regression.labelled_rows(self.models, part, targets)
        rows = {kind: inducing.whiten_rows(r.double(), regression.lowers_of(self.models)) for kind, r in rows.items()}
        labels = likelihood.observed_labels(targets, part.counts)
        functional = any(not m.local_blocks for m in self.models)
        about = targets.charges, targets.dipoles
        equal = EqualStructures.of_structures(self.basis, part)
        chunk = _Chunk(fold, equal, {}, labels, part if functional else None, *about)
        counts = part.composition(self.structures.distinct_species).double()
        nothing = [
            counts.new_zeros(len(value), counts.shape[1])
            for value in (targets.forces.flatten(), part.volumes.repeat(6))
        ]
        composition = chunk.as_rows([CovarianceRows(counts, *nothing)])
        made = {k: torch.cat([r[:, :-1], composition[k], r[:, -1:]], dim=1) for k, r in rows.items()}
        columns = sum(regression.block_widths(self.models)) + counts.shape[1]
        for kind, values in zip(LABEL_NOISE, about, strict=True):  # of which no short-range column knows
            known = values.flatten()[~values.flatten().isnan()]
            made[kind] = torch.cat([known.new_zeros(len(known), columns), known[:, None]], dim=1)
        return replace(chunk, rows=made)

    def electrostatic(self, form: ChargeForm, a: Tensor, columns: bool) -> dict[str, Tensor]:
        """By kind, rows [C | e] of all labels."""
        parts = [chunk.electrostatic(form, a, columns) for chunk in self.chunks]
        return {kind: torch.cat([p[kind] for p in parts if kind in p]) for kind in self.short}


def make_basis(model: InducingModel, structures: Structures) -> ChargeBasis:
    """Centres of q⁰ among the environments of structures, by the descriptor and kernel of a short-range model."""
    features: dict[int, list[Tensor]] = {z: [] for z in structures.distinct_species}
    for part in chunk_structures(structures, CHUNK_ATOMS):
        here = StructureEnvironments.from_structures(model.descriptor, part).environments
        for z in part.distinct_species:
            features[z].append(here.features[here.species == z].double())
    centres, lowers = {}, {}
    for z, parts in features.items():
        x = torch.cat(parts)
        chosen = x[select_rows("greedy", x, CENTRES, model.kernel.value, 0)[0]]
        covariance = model.kernel.value(chosen @ chosen.T)
        columns, lowers[z], _ = inducing.independent_factor(covariance, inducing.rank_tolerance(x))
        centres[z] = chosen[columns]
    return ChargeBasis(model.descriptor, model.kernel, centres, lowers)


def _leading_models(models: Sequence[InducingModel]) -> list[InducingModel]:
    """With about SHORT_COLUMNS of the columns, those of the most important centres."""
    share = min(1.0, SHORT_COLUMNS / sum(regression.block_widths(models)))
    out = []
    for model in models:
        columns = [block.leading_columns(share) for block in model.blocks]
        blocks = tuple(block.select(c) for block, c in zip(model.blocks, columns, strict=True))
        lowers = tuple(torch.linalg.cholesky(low[c] @ low[c].T) for low, c in zip(model.lowers, columns, strict=True))
        out.append(replace(model, blocks=blocks, lowers=lowers, exact=None, own=None))
    return out


def _some_structures(structures: Structures, targets: Targets, seed: int) -> tuple[Structures, Targets]:
    """At random, of about ROWS labels together, and few enough to be in memory; besides, the first of each species. Those of as many atoms
    follow each other."""
    order = torch.randperm(len(structures), generator=torch.Generator().manual_seed(seed))
    counts = structures.counts.cpu()[order]
    labels, spread = (3 * counts + 1).cumsum(0), (counts * 60 * 3 * CENTRES * 8).cumsum(0)
    few = int(((labels <= ROWS) & (spread <= SPREAD_BYTES)).sum())
    held = structures.composition(structures.distinct_species).cpu()[order] > 0
    chosen = torch.cat([order[:few], order[held.long().argmax(0)]]).unique()
    chosen = chosen[structures.counts.cpu()[chosen].argsort(stable=True)]
    return structures.select(chosen), targets.select(structures, chosen)


def _chunks(structures: Structures, targets: Targets) -> list[tuple[int, Structures, Targets]]:
    """Fold, structures and targets of each chunk: one structure in FOLDS is of the same fold."""
    out = []
    for fold in range(min(FOLDS, len(structures))):
        chosen = range(fold, len(structures), FOLDS)
        first = 0
        for part in chunk_structures(structures.select(chosen), CHUNK_ATOMS):
            out.append((fold, part, targets.select(structures, chosen[first : first + len(part)])))
            first += len(part)
    return out
