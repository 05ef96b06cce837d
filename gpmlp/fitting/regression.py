"""Linear algebra of a fit: inducing models, covariance rows folded into factors, hyperparameters, weights and variances."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpmlp.core import errors, parallel
from gpmlp.core.environments import Descriptor, StructureEnvironments
from gpmlp.core.quantities import KINDS, Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting.exact_model import ExactModel
from gpmlp.fitting.near_duplicates import IndependentGroups
from gpmlp.fitting.report import StageTimer
from gpmlp.fitting.workers import Report
from gpmlp.gp import covariances, energy_noise, evidence, exact, hyperparameters, inducing, likelihood, posterior
from gpmlp.gp.covariances import Block, CovarianceRows, SpeciesEnvironments
from gpmlp.gp.energy_noise import LeftOutEnergies
from gpmlp.gp.energy_scale import EnergyScale, energy_scale
from gpmlp.gp.functionals import FunctionalBlock, internal_directions
from gpmlp.gp.inducing import InducingBlock
from gpmlp.gp.kernels import ZonalKernel
from gpmlp.gp.likelihood import Hyperparameters, Observations, StdPrior
from gpmlp.gp.posterior import FIXED, SparsePosterior
from gpmlp.gp.prior import PriorCovariance
from gpmlp.gp.qr import RowFactor
from gpmlp.gp.variance import VarianceModel
from gpmlp.potential.charges import ChargeModel, ChargePosterior
from gpmlp.potential.mean import EnergyTerm, MeanBlock
from gpmlp.recipe import LearnedRecipe, Recipe

RESTART_COLUMNS, RESTARTS = 200, 3  # with so few, noises are learned from several starts
EVIDENCE_COLUMNS = 1200  # columns with which noises are learned first; the rest only refines them
FEWEST_ENERGIES = 10  # that leaving one out can judge, or that say whether they agree with the forces
ROW_BYTES = 64 << 20  # of rows that are there before they are folded in
# e, of free charges as functions of the environment, and of their constants beside tabulated electronegativities
CHARGE_SIGNALS = StdPrior(0.3, 1e-3, 1e2), StdPrior.fixed_at(1.0)


# blocks of each model, Cholesky factors of all blocks and (columns,) δ of a sparse process with some of the columns
VarianceSubset = tuple[tuple[tuple[Block, ...], ...], tuple[Tensor, ...], Tensor]


@dataclass(frozen=True, eq=False)
class OwnRows:
    """Covariances of all functionals of the structures fitted with those of them that are inducing variables: rows of K_uu, whitened.

    Attributes:
        maps: of each structure fitted, (functionals, 1 + 3 atoms + 6) orthonormal rows; rows: of each, (functionals, columns).
    """

    maps: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]

    def of(self, i: int) -> CovarianceRows:
        """K_fu L⁻ᵀ of structure i: its energy, forces and stress are in the span of its functionals, or have no label."""
        every = self.maps[i].T @ self.rows[i]
        return CovarianceRows(every[:1], every[1:-6], every[-6:])


@dataclass(frozen=True, eq=False)
class InducingModel:
    """One descriptor of the model with its kernel and inducing blocks and their Cholesky factors.

    Attributes:
        asked: inducing variables before dependent ones were dropped.
        of: index, among those fitted, of each structure whose functionals are inducing variables.
        own: rows of the data where these and all inducing variables are functionals that have met; None otherwise.
        exact: the process of all functionals, which the mean is of; None where it is not wanted. Variances then are of the blocks, which
            are centres.
    """

    descriptor: Descriptor
    kernel: ZonalKernel
    blocks: tuple[Block, ...]
    lowers: tuple[Tensor, ...]
    jitter: float
    asked: int
    of: tuple[int, ...] = ()
    own: OwnRows | None = None
    exact: ExactModel | None = None

    def numbered(self, fitted: Tensor) -> InducingModel:
        """With the numbers that structures have among all, from those among the fitted ones."""
        exact = self.exact and replace(self.exact, of=tuple(fitted[list(self.exact.of)].tolist()))
        return replace(self, of=tuple(fitted[list(self.of)].tolist()), exact=exact)

    @property
    def of_mean(self) -> tuple[Block, ...]:
        """Blocks of the mean: of all functionals where it is exact."""
        return (self.exact.block,) if self.exact else self.blocks

    @property
    def local_blocks(self) -> tuple[InducingBlock, ...]:
        """Values and gradients at centres, which is all that an online fit has."""
        return tuple(b for b in self.blocks if isinstance(b, InducingBlock))


def blocks_of(models: Sequence[InducingModel]) -> list[tuple[int, int | None]]:
    """(number of the descriptor, species; None = several together) of each inducing block, in the order of the columns."""
    return [
        (k, b.central_species[0] if len(b.central_species) == 1 else None)
        for k, m in enumerate(models)
        for b in m.blocks
    ]


def lowers_of(models: Sequence[InducingModel]) -> tuple[Tensor, ...]:
    """Cholesky factors of all inducing blocks, in the order of the columns."""
    return tuple(lower for m in models for lower in m.lowers)


def block_widths(models: Sequence[InducingModel]) -> list[int]:
    """Columns of each block."""
    return [len(lower) for lower in lowers_of(models)]


def block_numbers(models: Sequence[InducingModel], signal: Tensor) -> dict[str, dict[str, Any]]:
    """Signal and number of centres of each block, by 'descriptor:symbol', for a report; signal (blocks,) eV."""
    stds, centres = {}, {}
    blocks = [(k, b) for k, m in enumerate(models) for b in m.of_mean]
    for (k, block), std in zip(blocks, signal.tolist(), strict=True):
        for z in block.central_species:
            label = f"{k}:{errors.chemical_symbol(z)}"
            stds[label], centres[label] = std * block.relative[z], len(block.centres(z))
    return {"signal": stds, "centres": centres}


def stream_rows(
    models: Sequence[InducingModel],
    parts: Sequence[Structures],
    targets: Sequence[Targets],
    report: Report,
    charges: ChargeModel | None = None,
    observe: Callable[[int, Sequence[CovarianceRows]], object] | None = None,
) -> dict[str, RowFactor]:
    """Make the rows of each chunk once and fold them into one triangular factor for each kind of observation.

    Threads share the chunks, as many at a time as have ROW_BYTES of rows; they are folded in, in their order, by whichever thread has
    the next one ready, while others go on.

    Args:
        observe: called by each thread with the number of a chunk and its K_fu by each model.
    """
    columns = sum(b.n_columns for m in models for b in m.blocks) + (charges.basis.n_columns if charges else 0)
    factors = {kind: RowFactor(columns, 2 * columns) for kind in (*KINDS, FIXED)}
    done = 0

    def rows_of(k: int) -> dict[str, Tensor]:
        return labelled_rows(models, parts[k], targets[k], charges=charges, observe=observe and partial(observe, k))

    def fold(new: dict[str, Tensor]) -> None:
        nonlocal done
        for kind, rows in new.items():
            factors[kind].add(rows[:, :-1], rows[:, -1])
        done += 1
        report(done, len(parts), f"{sum(f.count for f in factors.values())} rows x {columns} columns")

    largest = max((3 * part.n_atoms + 7 * len(part) for part in parts), default=1) * columns * 8
    on_cpu = all(part.positions.device.type == "cpu" for part in parts)
    together = max(1, ROW_BYTES // largest) if on_cpu else 1
    for start in range(0, len(parts), together):
        parallel.map_pieces(rows_of, range(len(parts))[start : start + together], fold)
    return {kind: f for kind, f in factors.items() if f.count}


def merge_factors(first: dict[str, RowFactor], later: dict[str, RowFactor]) -> dict[str, RowFactor]:
    """The factors by kind of the rows of both."""
    with parallel.one_core():  # the last digits depend on it
        kinds = [kind for kind in (*KINDS, FIXED) if kind in first or kind in later]
        both = [[f[kind] for f in (first, later) if kind in f] for kind in kinds]
        return {kind: f[0].merge(f[1]) if len(f) > 1 else f[0] for kind, f in zip(kinds, both, strict=True)}


def own_rows(
    models: Sequence[InducingModel], structures: Structures, targets: Targets, charges: ChargeModel | None = None
) -> tuple[dict[str, Tensor], dict[str, int]] | None:
    """[K_ou L⁻ᵀ | y] of the labels and their number, by kind, without a kernel: None unless all functionals of the structures are inducing
    variables of every model."""
    own = [m.own for m in models if m.own is not None]
    if len(own) < len(models):
        return None
    out: dict[str, list[Tensor]] = {}
    for i in range(len(structures)):
        part = structures.select([i])
        labels = likelihood.observed_labels(targets.select(structures, [i]), part.counts)
        parts = [*(o.of(i) for o in own), *([charges.columns(part)] if charges else [])]
        for kind, rows in rows_of_labels(parts, labels, part).items():
            out.setdefault(kind, []).append(rows)
    whitened = {kind: torch.cat(out.pop(kind)).double() for kind in (*KINDS, FIXED) if kind in out}
    return whitened, {kind: len(rows) for kind, rows in whitened.items()}


def labelled_rows(
    models: Sequence[InducingModel],
    structures: Structures,
    targets: Targets,
    blocks: Sequence[tuple[Block, ...]] = (),
    environments: Sequence[StructureEnvironments] = (),
    by_species: Sequence[tuple[SpeciesEnvironments, ...]] = (),
    charges: ChargeModel | None = None,
    observe: Callable[[Sequence[CovarianceRows]], object] | None = None,
) -> dict[str, Tensor]:
    """Rows [K_ou | y] of the labels by kind, energies per atom; those with a noise of their own divided by it ('given').

    Args:
        charges: whose columns follow those of the models.
        blocks: inducing variables for each model, if not all of its own.
        environments: of the structures, by descriptor; by_species: the same sorted by species, with what rows need. Each if there already.
        observe: called with K_fu by each model.
    """
    labels = likelihood.observed_labels(targets, structures.counts)
    forces, stresses = len(labels["forces"].rows) > 0, len(labels["stresses"].rows) > 0
    parts = []
    for k, m in enumerate(models):
        wanted = m.kernel, blocks[k] if blocks else m.blocks, forces, stresses
        if by_species:
            of_species = partial(_of_species, by_species[k])
            parts.append(covariances.rows_from_environments(structures, of_species, *wanted))
            continue
        of_model = environments[k] if environments else StructureEnvironments.from_structures(m.descriptor, structures)
        if environments:
            of_model.keep_jacobian()
        parts.append(covariances.covariance_rows(structures, of_model, *wanted))
    if observe is not None:
        observe(parts)
    if charges is not None:
        parts.append(charges.columns(structures))
    functional = any(isinstance(b, FunctionalBlock) for m in models for b in m.blocks)
    return rows_of_labels(parts, labels, structures if functional else None)


def rows_of_labels(
    parts: Sequence[CovarianceRows], labels: dict[str, Observations], internal: Structures | None = None
) -> dict[str, Tensor]:
    """Rows [K_ou | y] of labels as in `labelled_rows`, from K_fu of their structures by each model.

    Args:
        internal: the structures, if forces count along internal directions only. No model has others, and labels often have none: as
            residuals of zero they would make the noise small.
    """
    out: dict[str, list[Tensor]] = {}
    for kind, label in labels.items():
        if not len(label.rows):
            continue
        joined = torch.cat([*(getattr(r, kind)[label.rows] for r in parts), label.values[:, None]], dim=1)
        if kind == "energies":
            joined[:, :-1] *= label.scale[:, None]
        common = label.noise.isnan()
        if common.any():
            shared = joined if common.all() else joined[common]
            if internal is not None and kind == "forces":
                shared = _internal_rows(shared, label.rows[common], internal)
            out.setdefault(kind, []).append(shared)
        if not common.all():
            out.setdefault(FIXED, []).append(joined[~common] / label.noise[~common, None])
    return {kind: torch.cat(part) if len(part) > 1 else part[0] for kind, part in out.items()}


def _internal_rows(rows: Tensor, components: Tensor, structures: Structures) -> Tensor:
    """Rows of force components along the internal directions of each structure, where it has all components; others as they are."""
    known = torch.bincount(structures.structure_of_atom[components // 3], minlength=len(structures))
    out, offsets = [], structures.offsets.tolist()
    for i, part in enumerate(rows.split(known.tolist())):
        atoms = slice(offsets[i], offsets[i + 1])
        if len(part) == 3 * (atoms.stop - atoms.start):
            part = internal_directions(structures.positions[atoms], structures.periodic[i]).to(part) @ part
        out.append(part)
    return torch.cat(out)


def _of_species(laid_out: Sequence[SpeciesEnvironments], species: int) -> Iterator[SpeciesEnvironments]:
    return (e for e in laid_out if e.species == species)


def learn_hyperparameters(
    recipe: Recipe,
    models: Sequence[InducingModel],
    whitened: dict[str, Tensor],
    counts: dict[str, int],
    stages: StageTimer,
    restarts: int = RESTARTS,
    charges: ChargeModel | None = None,
) -> tuple[Hyperparameters, Tensor, evidence.EvidenceResult]:
    """Learn noises and signal variances: from several starts with few of the columns, then with some, then with all.

    Args:
        charges: whose columns follow those of the models, with a signal for free charges, which comes last but one, and one for constants.
    """
    widths = [b.n_columns for m in models for b in m.blocks]
    widths += [charges.basis.n_weights, len(charges.basis.species)] if charges else []
    device = next(iter(whitened.values())).device
    block_of_column = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths)).to(device)
    kinds, more = [k for k in KINDS if k in whitened], CHARGE_SIGNALS if charges else ()
    parameters = hyperparameters.make_hyperparameters(recipe, kinds, blocks_of(models), more)

    def tell(calls: int, value: float) -> None:
        noises = ", ".join(f"{k} {v:.2g}" for k, v in parameters.noise().items())
        stages.report(min(calls, 39), 40, f"-log evidence {value:.0f}; {noises}")

    total = sum(widths)

    def smaller(columns: int) -> tuple[dict[str, evidence.SufficientStatistics], Tensor]:
        part = _leading_columns(widths, columns).to(device)
        statistics = {k: evidence.SufficientStatistics.from_factor(w, counts[k], part) for k, w in whitened.items()}
        return statistics, block_of_column[part]

    if restarts:
        few, of_few = smaller(RESTART_COLUMNS)
        evidence.restart_optimisation(few, parameters, of_few, restarts, recipe.seed)
    if total > EVIDENCE_COLUMNS:
        part, of_some = smaller(EVIDENCE_COLUMNS)
        evidence.maximise_evidence(part, parameters, of_some, progress=tell)
    statistics = {k: evidence.SufficientStatistics.from_factor(w, counts[k]) for k, w in whitened.items()}
    if total > EVIDENCE_COLUMNS:
        result = evidence.iterate_fixed_point(statistics, parameters, block_of_column, progress=tell)
    else:
        result = evidence.maximise_evidence(statistics, parameters, block_of_column, progress=tell, settle=True)
    return parameters, block_of_column, result


def learn_exactly(
    recipe: Recipe, every: ExactModel, stages: StageTimer
) -> tuple[Hyperparameters, evidence.EvidenceResult]:
    """Noises and the signal of the process of all functionals."""
    parameters = every.begin(recipe)

    def tell(calls: int, value: float) -> None:
        noises = ", ".join(f"{k} {v:.2g}" for k, v in parameters.noise().items())
        stages.report(
            min(calls, 9), 10, f"all {every.block.n_columns} functionals: -log evidence {value:.0f}; {noises}"
        )

    return parameters, exact.learn(every.process, parameters, progress=tell)


def fit_noise(
    recipe: Recipe,
    parameters: Hyperparameters,
    whitened: dict[str, Tensor],
    counts: dict[str, int],
    signal: Tensor,
    left_out: LeftOutEnergies | None = None,
) -> dict[str, float]:
    """Standard deviations by kind that weigh the labels: of the evidence, that of energies chosen by leave-one-out.

    Where the recipe gives it, or a prior of it, that has the last word; bounds that it gives hold.

    Args:
        signal: (columns,) δ of each column.
        left_out: which energies are left out together.
    """
    noise, given = parameters.noise(), recipe.noise.energy_per_atom
    settled = isinstance(given, LearnedRecipe) and given.prior
    n = counts.get("energies", 0) if left_out is None else len(left_out.rows)
    if settled or "energies" not in parameters.learned or n < FEWEST_ENERGIES:
        return noise
    low, high = given.bounds if isinstance(given, LearnedRecipe) and given.bounds else (0.0, math.inf)
    chosen = energy_noise.energy_noise(whitened, counts["energies"], noise, signal, left_out)
    return noise | {"energies": min(max(low, chosen), max(high, noise["energies"]))}


def label_scatter(parameters: Hyperparameters, noise: dict[str, float]) -> dict[str, float]:
    """Standard deviation by kind by which new labels scatter: that of the evidence, or `noise` of the fit where the evidence had none."""
    return {kind: max(std, noise[kind]) for kind, std in parameters.noise().items()}


def left_out_energies(targets: Targets, groups: IndependentGroups, fitted: Tensor) -> LeftOutEnergies:
    """Rows of energies that are left out together: groups of near-duplicates among the structures learned from.

    Args:
        targets: of all structures, less the baselines; fitted: the structures whose energies with the common noise have rows.
    """
    common = ~targets.energies.isnan() & targets.energies_noise.isnan()
    with_rows = fitted[common.cpu()[fitted]]
    among = groups.among(with_rows, len(targets))
    return LeftOutEnergies(among.near, tuple(targets.config_types[i] for i in with_rows[among.leaders].tolist()))


@dataclass(frozen=True, eq=False)
class ChargeRows:
    """Columns of charges, linear around the parameters of the fit, beside whitened rows.

    Attributes:
        rows: by kind, (rows, columns); scale: (columns,) prior standard deviations of the parameters.
    """

    rows: dict[str, Tensor]
    scale: Tensor

    @staticmethod
    def taken_from(whitened: dict[str, Tensor], scale: Tensor) -> ChargeRows:
        """The last columns but the labels, taken off rows [A | C | y] in place."""
        m, taken = len(scale), {}
        for kind, rows in whitened.items():
            taken[kind] = rows[:, -m - 1 : -1].clone()
            whitened[kind] = torch.cat([rows[:, : -m - 1], rows[:, -1:]], dim=1)
        return ChargeRows(taken, scale)

    def joined(self, others: ChargeRows) -> ChargeRows:
        """With those of more data, as WhitenedData.joined."""
        kinds = [*self.rows, *(k for k in others.rows if k not in self.rows)]
        together = {k: torch.cat([r.rows[k] for r in (self, others) if k in r.rows]) for k in kinds}
        return ChargeRows(together, self.scale)


@dataclass(frozen=True, eq=False)
class WhitenedData:
    """The data as triangular factors of their rows by kind, and the hyperparameters learned from them.

    Attributes:
        whitened: by kind, [R L⁻ᵀ | y] (inducing.whiten_rows).
        counts: number of observations by kind.
        noise: standard deviation by kind.
        label_noise: as much of it as the labels themselves show, by kind.
        signal: (columns,) δ of each column, eV.
    """

    whitened: dict[str, Tensor]
    counts: dict[str, int]
    noise: dict[str, float]
    label_noise: dict[str, float]
    signal: Tensor

    @property
    def every_noise(self) -> dict[str, float]:
        return self.noise | {FIXED: 1.0}

    def joined(self, others: dict[str, Tensor], counts: dict[str, int]) -> WhitenedData:
        """With the whitened rows of more data; empties `whitened` of both on the way, so that little is held twice."""
        together = {}
        for kind in [*self.whitened, *(k for k in others if k not in self.whitened)]:
            rows = [r.pop(kind) for r in (self.whitened, others) if kind in r]
            together[kind] = torch.cat(rows) if len(rows) > 1 else rows[0]
        total = {kind: self.counts.get(kind, 0) + counts.get(kind, 0) for kind in together}
        return WhitenedData(together, total, self.noise, self.label_noise, self.signal)


def make_terms(models: Sequence[InducingModel], weights: Tensor) -> tuple[EnergyTerm, ...]:
    """Energy terms of the mean: all directions of a centre collapse into one; weights (columns,), where it is exact those of all
    functionals, to whose centres those of the variances are added: the first ones always are these."""
    terms, start = [], 0
    for m in models:
        blocks = {}
        for block in m.of_mean:
            part = weights[start : start + block.n_columns]
            start += block.n_columns
            for z in block.central_species:
                centres = block.centres(z)
                mean = MeanBlock(centres, *block.collapse(part.to(centres), z))
                first = [b.features for b in m.local_blocks if b.species == z] if m.exact else []
                blocks[z] = mean.after(torch.cat(first)) if first else mean
        terms.append(EnergyTerm(m.descriptor, m.kernel, blocks))
    return tuple(terms)


def make_priors(models: Sequence[InducingModel], signal: Tensor) -> list[PriorCovariance]:
    """The prior process of each descriptor; signal (columns,)."""
    priors, start = [], 0
    for m in models:
        by_species: dict[int, float] = {}
        for block in m.blocks:
            by_species |= {z: float(signal[start]) * block.relative[z] for z in block.central_species}
            start += block.n_columns
        priors.append(PriorCovariance(m.kernel, by_species))
    return priors


def variance_model(
    models: Sequence[InducingModel],
    signal: Tensor,
    factor: Tensor,
    constant: dict[str, float] | None = None,
    label_noise: dict[str, float] | None = None,
    subset: VarianceSubset | None = None,
) -> VarianceModel:
    """The posterior for variances, of all columns or of a subset of them.

    Args:
        signal: (columns,) δ of each column of the fit; factor: R of the columns that are kept (SparsePosterior.factor).
        constant: by kind, the noise of a new label: that of the evidence, not the smaller one that leave-one-out gives
            energies in the fit; label_noise: how much of it labels themselves show.
    """
    columns = subset or (tuple(m.blocks for m in models), lowers_of(models), signal)
    return VarianceModel(
        tuple(make_priors(models, signal)), *columns, factor, constant or {}, label_noise or {}, len(signal)
    )


def variance_factor(
    models: Sequence[InducingModel],
    learned: WhitenedData,
    solved: SparsePosterior,
    at_most: int,
    charges: ChargeRows | None = None,
) -> tuple[Tensor, VarianceSubset | None, ChargePosterior | None]:
    """The posterior factor for variances: that of all columns or, where these are more than `at_most`, of those of leading centres.

    A subset is a sparse process of its own with the same hyperparameters: its factors are columns of those of the fit.

    Args:
        charges: whose posterior is joint with that of the columns.
    """
    signal, lowers = learned.signal, lowers_of(models)
    if len(signal) <= at_most:
        if charges is None:
            return solved.factor, None, None
        factor, of_charges = _joint_factor(learned.whitened, learned, signal, lowers, charges)
        return factor, None, of_charges
    chosen = [block.leading_columns(at_most / len(signal)) for m in models for block in m.blocks]
    starts = torch.tensor([0, *(len(lower) for lower in lowers)]).cumsum(0).tolist()
    columns = torch.cat([s + c for s, c in zip(starts, chosen, strict=False)])
    picked = iter(chosen)
    blocks = tuple(tuple(block.select(next(picked)) for block in m.blocks) for m in models)
    whitened = {kind: inducing.unwhiten_columns(rows, lowers, chosen) for kind, rows in learned.whitened.items()}
    lowers = tuple(torch.linalg.cholesky(low[c] @ low[c].T) for low, c in zip(lowers, chosen, strict=True))
    whitened = {kind: inducing.whiten_rows(rows, lowers) for kind, rows in whitened.items()}
    signal = signal[columns]
    subset = blocks, lowers, signal
    if charges is not None:
        factor, of_charges = _joint_factor(whitened, learned, signal, lowers, charges)
        return factor, subset, of_charges
    return posterior.solve_posterior(whitened, learned.counts, learned.every_noise, signal, lowers).factor, subset, None


def _joint_factor(
    whitened: dict[str, Tensor], learned: WhitenedData, signal: Tensor, lowers: Sequence[Tensor], charges: ChargeRows
) -> tuple[Tensor, ChargePosterior]:
    """R of the columns alone and what that of charges behind them adds: [[R, R_c], [0, R_cc]] is the factor of both."""
    rows = {k: torch.cat([r[:, :-1], charges.rows[k], r[:, -1:]], dim=1) for k, r in whitened.items()}
    every = torch.cat([signal, charges.scale]), (*lowers, torch.eye(len(charges.scale)).to(signal))
    factor, n = posterior.solve_posterior(rows, learned.counts, learned.every_noise, *every).factor, len(signal)
    return factor[:n, :n], ChargePosterior(charges.scale, factor[:n, n:], factor[n:, n:])


def _leading_columns(widths: Sequence[int], columns: int) -> Tensor:
    """About so many columns: those of each block come most important first, so leading ones are a smaller model of the same data."""
    share, starts = min(1.0, columns / sum(widths)), [0, *itertools.accumulate(widths)]
    return torch.cat([torch.arange(s, s + max(1, int(share * w))) for s, w in zip(starts, widths, strict=False)])


def scale_of_energies(models: Sequence[InducingModel], learned: WhitenedData) -> EnergyScale | None:
    """Scale of the energies against the forces, by some of the columns; None where either have no noise in common or are few."""
    whitened, noise = learned.whitened, learned.noise
    if any(kind not in whitened or kind not in noise for kind in ("energies", "forces")):
        return None
    if learned.counts["energies"] < FEWEST_ENERGIES:
        return None
    part = _leading_columns(block_widths(models), EVIDENCE_COLUMNS).to(learned.signal.device)
    taken = torch.cat([part, part.new_tensor([len(learned.signal)])])
    energies, forces = (whitened[kind][:, taken] for kind in ("energies", "forces"))
    return energy_scale(energies, forces, learned.counts["energies"], noise["forces"], learned.signal[part])
