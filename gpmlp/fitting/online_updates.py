"""Updates of an online fit: rows of labels as they come, and models, rows and factor when inducing points come or go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from gpmlp.core import errors
from gpmlp.core.environments import StructureEnvironments
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting import defaults, regression
from gpmlp.fitting.regression import InducingModel, VarianceSubset, block_widths
from gpmlp.gp import covariances, inducing
from gpmlp.gp.covariances import SpeciesEnvironments
from gpmlp.gp.inducing import InducingBlock, extend_cholesky, rank_tolerance, restrict_cholesky
from gpmlp.gp.qr import PosteriorFactor
from gpmlp.recipe import Recipe
from gpmlp.uncertainty import mahalanobis
from gpmlp.uncertainty.mahalanobis import Mahalanobis, ReservoirSample

JACOBIAN_BYTES = 2 << 30  # of Jacobians kept with all batches of a model; those of more are made again for each pass
PASS = 200_000  # rows times new columns that one label may cost: some tenths of a second; the rest waits for a model made anew


@dataclass(frozen=True, eq=False)
class RowScales:
    """The factors of rows of unit noise and unit signal.

    Attributes:
        noise: standard deviation by kind; 1 where none is given, as for 'given' rows.
        signal: (blocks,) δ, eV.
    """

    noise: dict[str, float]
    signal: Tensor

    @staticmethod
    def unit(blocks: int) -> RowScales:
        """The scales of rows that are not scaled."""
        return RowScales({}, torch.ones(blocks, dtype=torch.float64))

    def of(self, kind: str) -> float:
        return self.noise.get(kind, 1.0)

    def columns(self, widths: Sequence[int]) -> Tensor:
        """(columns,) δ of each column of blocks so wide."""
        return self.signal.repeat_interleave(torch.tensor(widths))


@dataclass(frozen=True, eq=False)
class LabelBatch:
    """Structures labelled together.

    Attributes:
        targets: labels as they came; remaining: less the baselines.
        rows: by kind, [A D | y] / σ as the posterior has them; 'given' were divided by their own noise.
        features: (atoms, features) of the first descriptor; surrounded: (atoms,) bool, those that have neighbours in it.
        environments: by descriptor, for rows of other inducing variables; empty where they would take too much memory.
        charges: by kind, derivatives by the parameters of charges (online_charges.OnlineCharges.rows); empty where there are none.
    """

    structures: Structures
    targets: Targets
    remaining: Targets
    rows: dict[str, Tensor]
    features: Tensor
    surrounded: Tensor
    environments: tuple[tuple[SpeciesEnvironments, ...], ...]
    charges: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def from_labels(
        models: Sequence[InducingModel],
        structures: Structures,
        targets: Targets,
        remaining: Targets,
        scales: RowScales,
        room: int,
        environments: Sequence[StructureEnvironments] = (),
    ) -> LabelBatch:
        """Make the rows.

        Args:
            room: bytes that `LabelBatch.environments` may take.
            environments: the environments of the structures by descriptor, if they are there already.
        """
        every = environments or [StructureEnvironments.from_structures(m.descriptor, structures) for m in models]
        for one in environments:
            one.keep_jacobian()
        by_species: tuple[tuple[SpeciesEnvironments, ...], ...] = ()
        if sum(_bytes(structures, one) for one in every) <= room:
            by_species = tuple(_all_environments(structures, remaining, one) for one in every)
        raw = regression.labelled_rows(models, structures, remaining, environments=environments, by_species=by_species)
        lowers, widths = regression.lowers_of(models), block_widths(models)
        unit = RowScales.unit(len(lowers))
        rows = {
            k: rescaled_rows(inducing.whiten_rows(r.double(), lowers), k, unit, scales, widths) for k, r in raw.items()
        }
        features = (
            environments[0].environments.features if environments else _features(structures, by_species, every[0])
        )
        return LabelBatch(
            structures, targets, remaining, rows, features.double(), every[0].surroundings.surrounded, by_species
        )

    @property
    def labelled_atoms(self) -> Tensor:
        """(atoms,) bool: those with neighbours whose force is labelled, or the energy of whose structure is."""
        whole = self.targets.energies.isfinite()[self.structures.structure_of_atom]
        return self.surrounded & (whole | self.targets.forces.isfinite().any(1))

    @property
    def count(self) -> int:
        return sum(len(rows) for rows in self.rows.values())

    @property
    def n_bytes(self) -> int:
        """Of environments."""
        return sum(f.n_bytes for part in self.environments for f in part)

    def rescaled(self, old: RowScales, new: RowScales, widths: Sequence[int]) -> LabelBatch:
        """With other noises and signals."""
        rows = {kind: rescaled_rows(part, kind, old, new, widths) for kind, part in self.rows.items()}
        return replace(self, rows=rows)

    def rotated(self, rotate: Callable[[Tensor], Tensor]) -> LabelBatch:
        """With rows in another basis."""
        return replace(self, rows={kind: rotate(rows) for kind, rows in self.rows.items()})

    def raw(self, models: Sequence[InducingModel], blocks: Sequence[tuple[InducingBlock, ...]]) -> dict[str, Tensor]:
        """By kind, rows [K_ou | y] of other inducing variables."""
        return regression.labelled_rows(models, self.structures, self.remaining, blocks, by_species=self.environments)


def rescaled_rows(rows: Tensor, kind: str, old: RowScales, new: RowScales, widths: Sequence[int]) -> Tensor:
    """Rows [A D | y] / σ of a kind with other σ and D, for blocks so wide."""
    rows = rows * (old.of(kind) / new.of(kind))
    rows[:, :-1] *= new.columns(widths) / old.columns(widths)
    return rows


def _bytes(structures: Structures, view: StructureEnvironments) -> int:
    """About the bytes of the environments of all atoms with their Jacobian."""
    rows = 3 * len(view.neighbors) + structures.n_atoms
    return rows * view.descriptor.n_features * structures.positions.element_size()


def _all_environments(
    structures: Structures, targets: Targets, view: StructureEnvironments
) -> tuple[SpeciesEnvironments, ...]:
    """By species; with derivatives where labels need them."""
    derivatives = bool((~targets.forces.isnan()).any() or (~targets.stresses.isnan()).any())
    every = structures.distinct_species
    return tuple(e for z in every for e in covariances.species_environments(structures, view, z, derivatives))


def _features(
    structures: Structures, environments: Sequence[tuple[SpeciesEnvironments, ...]], view: StructureEnvironments
) -> Tensor:
    """(atoms, features) of the first descriptor."""
    if not environments:
        every = torch.arange(structures.n_atoms).split(covariances.ENVIRONMENTS)
        return torch.cat([view.select(part).features for part in every])
    order = torch.cat([e.centers for e in environments[0]]).argsort()
    return torch.cat([e.features for e in environments[0]])[order]


State = tuple[tuple[InducingModel, ...], tuple[LabelBatch, ...], PosteriorFactor]


@dataclass(frozen=True, eq=False)
class BlockBorder:
    """New inducing variables of a block, and the new rows [V C] of its Cholesky factor."""

    block: InducingBlock
    bottom: Tensor

    @property
    def width(self) -> int:
        return len(self.bottom)


def missing_centres(
    asked: Recipe, recipe: Recipe, models: Sequence[InducingModel], k: int, labels: int, periodic: bool
) -> int:
    """Number of centres of descriptor k that so many labels ask for beyond those there are, as far as a pass over them may cost; where they
    are for variances alone no more than these are to have.

    Args:
        asked: the recipe as given; recipe: as it was filled in.
    """
    wish, gradients = asked.inducings[k], recipe.inducings[k].gradients or 0
    most = wish.n or (sum(wish.shares.values()) if isinstance(wish.shares, dict) else defaults.MOST_COLUMNS)
    columns = min(
        defaults.affordable_columns(recipe.memory_GB or defaults.MEMORY_GB), defaults.columns_for(labels, periodic)
    ) // len(models)
    columns = min(columns, defaults.variance_columns(recipe)) if models[k].exact else columns
    wanted = min(most, columns // (1 + gradients)) - sum(len(b.features) for b in models[k].local_blocks)
    return max(0, min(wanted, max(1, PASS // (labels * (1 + gradients)))))


def add_inducing(
    models: Sequence[InducingModel],
    batches: Sequence[LabelBatch],
    factor: PosteriorFactor,
    scales: RowScales,
    grown: Sequence[Sequence[InducingBlock | None]],
) -> State:
    """With more inducing variables, those that are independent: bordered Cholesky factors, and one pass over all data for the columns.

    Args:
        grown: for each model and block its new variables, if any.
    """
    larger, borders = [], list[BlockBorder | None]()
    for model, extras in zip(models, grown, strict=True):
        pairs = [_bordered(model, k, new) for k, new in enumerate(extras)]
        borders += [border for *_, border in pairs]
        blocks, lowers = tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)
        larger.append(replace(model, blocks=blocks, lowers=lowers))
    if not any(borders):
        return tuple(models), tuple(batches), factor
    old = block_widths(models)
    columns = [_columns(models, batch, borders, scales, old) for batch in batches]

    def passes() -> Iterator[tuple[Tensor, Tensor]]:
        for batch, new in zip(batches, columns, strict=True):
            for kind, rows in batch.rows.items():
                yield rows, torch.cat(new[kind], dim=1)

    more = [border.width if border else 0 for border in borders]
    order, first = _places(old, more)
    factor = factor.append_columns(passes)
    if first < len(order) - 1:
        factor = factor.rotate_columns(lambda rows: rows[:, order], first)
    wider = []
    for batch, new in zip(batches, columns, strict=True):
        joined = {k: torch.cat([rows[:, :-1], *new[k], rows[:, -1:]], dim=1) for k, rows in batch.rows.items()}
        wider.append(replace(batch, rows={kind: rows[:, order] for kind, rows in joined.items()}))
    return tuple(larger), tuple(wider), factor


def _bordered(
    model: InducingModel, k: int, new: InducingBlock | None
) -> tuple[InducingBlock, Tensor, BlockBorder | None]:
    """Block k of a model with those of its new variables that are independent, its Cholesky factor, and the border of that."""
    block, lower = model.local_blocks[k], model.lowers[k]
    if new is None:
        return block, lower, None
    both = [replace(b, features=b.features.double(), tangents=b.tangents.double()) for b in (block, new)]
    cross, corner = (inducing.K_uu(model.kernel, b, both[1]) for b in both)
    longer, independent = extend_cholesky(lower, cross, corner, rank_tolerance(new.features))
    if not len(independent):
        return block, lower, None
    added = replace(new, columns=independent)
    return inducing.join_blocks(block, added), longer, BlockBorder(added, longer[len(lower) :])


def _columns(
    models: Sequence[InducingModel],
    batch: LabelBatch,
    borders: Sequence[BlockBorder | None],
    scales: RowScales,
    old: Sequence[int],
) -> dict[str, list[Tensor]]:
    """By kind and block that grows, new columns [K_on D - A Vᵀ] C⁻ᵀ / σ, A being the rows there are."""
    it = iter(borders)
    blocks = [tuple(border.block for border in (next(it) for _ in m.blocks) if border) for m in models]
    out = {}
    for kind, raw in batch.raw(models, blocks).items():
        pieces: list[Tensor] = []
        start = first = 0
        for border, width, signal in zip(borders, old, scales.signal.tolist(), strict=True):
            mine = batch.rows[kind][:, first : first + width]
            first += width
            if border is None:
                continue
            new = raw[:, start : start + border.width].double() * (signal / scales.of(kind))
            start += border.width
            new -= mine @ border.bottom[:, :width].T
            pieces.append(torch.linalg.solve_triangular(border.bottom[:, width:], new.T, upper=False).T)
        out[kind] = pieces
    return out


def _places(old: Sequence[int], new: Sequence[int]) -> tuple[Tensor, int]:
    """The order in which columns [all old | all new | y] follow each other by block, old ones first; how many of them stay in place."""
    order: list[int] = []
    first, behind = 0, sum(old)
    for a, b in zip(old, new, strict=True):
        order += [*range(first, first + a), *range(behind, behind + b)]
        first, behind = first + a, behind + b
    stay = next((i for i, place in enumerate(order) if i != place), len(order))
    return torch.tensor([*order, len(order)], dtype=torch.long), stay


def remove_inducing(
    models: Sequence[InducingModel],
    batches: Sequence[LabelBatch],
    factor: PosteriorFactor,
    descriptor: int,
    species: int,
    centres: Sequence[int],
) -> State:
    """Without some inducing points of one block.

    Raises:
        UserError: no such block or centre, or none would be left.
    """
    model = models[descriptor]
    at = next((i for i, b in enumerate(model.local_blocks) if b.species == species), None)
    if at is None:
        raise errors.UserError(f"There are no inducing points of {errors.chemical_symbol(species)} to remove.")
    block = model.local_blocks[at]
    wrong = [c for c in centres if not 0 <= c < len(block.features)]
    if wrong:
        raise errors.UserError(
            f"There are {len(block.features)} inducing points of {errors.chemical_symbol(species)}, counted from 0; got {wrong[:5]}."
        )
    stays = torch.ones(len(block.features), dtype=torch.bool)
    stays[torch.as_tensor(list(centres), dtype=torch.long)] = False
    smaller, columns = inducing.select_centers(block, stays)
    if not len(columns):
        raise errors.UserError(f"All inducing points of {errors.chemical_symbol(species)} would be removed.")
    shorter, rotation = restrict_cholesky(model.lowers[at], columns)
    blocks, lowers = list(model.local_blocks), list(model.lowers)
    blocks[at], lowers[at] = smaller, shorter
    before = sum(len(m.blocks) for m in models[:descriptor]) + at
    sizes = block_widths(models)
    rotations = [rotation if i == before else None for i in range(len(sizes))]

    def rotated(rows: Tensor) -> Tensor:
        return _rotated(rows, rotations, sizes)

    changed = replace(model, blocks=tuple(blocks), lowers=tuple(lowers))
    after = tuple(changed if m is model else m for m in models)
    return after, tuple(b.rotated(rotated) for b in batches), factor.rotate_columns(rotated, sum(sizes[:before]))


def _rotated(rows: Tensor, rotations: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    """[A Q | y] with Q block-diagonal; None stands for the identity."""
    pieces = rows.split([*sizes, 1], dim=1)
    return torch.cat([p if q is None else p @ q for p, q in zip(pieces, [*rotations, None], strict=True)], dim=1)


class StructureMoves(NamedTuple):
    """How leaving structures out moves a fit (VarianceModel.shifts), in a form that stays as columns and labels are added to it.

    With the rows a of functionals and b = R⁻ᵀ a the mean moves by b.s = a.(R⁻¹ s); R changes with every label, a grows with new columns.

    Attributes:
        by_block: (structures, columns) R⁻¹ s of the columns that were there.
    """

    by_block: tuple[Tensor, ...]

    @staticmethod
    def from_shifts(shifts: Tensor | None, upper: Tensor, widths: Sequence[int]) -> StructureMoves | None:
        """Of shifts s and R with blocks of such widths; None where these are not all of its columns (a subset), or more (charges)."""
        if shifts is None or shifts.shape[1] != len(upper):
            return None
        moves = torch.linalg.solve_triangular(upper, shifts.T, upper=True).T
        return StructureMoves(moves.split(list(widths), dim=1))

    def shifts(self, upper: Tensor, widths: Sequence[int]) -> Tensor:
        """s with R of now: columns that came since have no part in them."""
        pad, pieces = torch.nn.functional.pad, zip(self.by_block, widths, strict=True)
        return torch.cat([pad(moves, (0, width - moves.shape[1])) for moves, width in pieces], dim=1) @ upper.T


def variance_factor(
    models: Sequence[InducingModel], factor: PosteriorFactor, scales: RowScales, at_most: int
) -> tuple[Tensor, VarianceSubset, Callable[[Tensor], Tensor]]:
    """The posterior factor of a sparse process with about `at_most` columns, for variances, these columns, and what makes their rows.

    All centres with fewer gradients, as new ones count most; of centres that are too many by themselves, evenly many of old and new.
    """
    centres = sum(len(b.features) for m in models for b in m.local_blocks)
    directions, share = max(0, at_most // centres - 1), min(1.0, at_most / centres)
    blocks, lowers, rotations = [], [], []
    for model in models:
        part = []
        for block, lower in zip(model.local_blocks, model.lowers, strict=True):
            ranks = (torch.arange(len(block.features) + 1) * share).ceil()
            centre, direction = block.column_addresses
            chosen = ((direction < directions) & (ranks.diff() > 0)[centre]).nonzero()[:, 0]
            chosen = chosen if len(chosen) else torch.arange(1)  # their values depended on others
            shorter, rotation = restrict_cholesky(lower, chosen)
            part.append(block.select(chosen))
            lowers.append(shorter)
            rotations.append(rotation)
        blocks.append(tuple(part))
    sizes = block_widths(models)

    def rotate(rows: Tensor) -> Tensor:
        return _rotated(rows, rotations, sizes)

    subset = tuple(blocks), tuple(lowers), scales.columns([len(lower) for lower in lowers])
    return factor.rotate_columns(rotate).upper[:, :-1], subset, rotate


def fit_novelty(batches: Sequence[LabelBatch], recipe: Recipe) -> Mahalanobis:
    """Mahalanobis distances from the environments of labelled atoms."""
    assert recipe.novelty is not False
    samples: dict[int, ReservoirSample] = {}
    first = 0
    for batch in batches:
        structures, labelled = batch.structures, batch.labelled_atoms
        for z in structures.distinct_species:
            here = labelled & (structures.species == z)
            sample = samples.setdefault(z, ReservoirSample(recipe.novelty.samples, recipe.seed + z))
            sample.add(batch.features[here], first + structures.structure_of_atom[here])
        first += len(structures)
    features, owners = {z: s.rows() for z, s in samples.items()}, {z: s.owners() for z, s in samples.items()}
    return mahalanobis.fit_mahalanobis(features, owners, recipe.novelty.quantile, recipe.seed)


def check_species(known: Sequence[int], structures: Structures) -> None:
    """UserError: structures with a species that is not among those known."""
    unknown = [z for z in structures.distinct_species if z not in known]
    if unknown:
        atom = int((structures.species == unknown[0]).nonzero()[0, 0])
        name = structures.names[int(structures.structure_of_atom[atom])]
        raise errors.UserError(
            f"{name}: {errors.chemical_symbol(unknown[0])} was not among the structures that the online model began with; it knows "
            f"{', '.join(errors.chemical_symbol(z) for z in known)}. Begin with structures that hold all species."
        )
