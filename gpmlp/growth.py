"""Growth is what becomes of models, rows and factor when inducing points come or go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpmlp import checks, defaults, inducing, variances
from gpmlp.batches import Batch, Scales
from gpmlp.defaults import Survey
from gpmlp.gp import covariances
from gpmlp.gp.covariances import InducingBlock
from gpmlp.gp.posterior import RANK_TOLERANCE
from gpmlp.gp.updates import Factor, bordered, shrunk
from gpmlp.recipe import Recipe
from gpmlp.regression import Model

PASS = 200_000  # rows times new columns that one label may cost: some tenths of a second; what it leaves out waits for a model made anew
State = tuple[tuple[Model, ...], tuple[Batch, ...], Factor]


@dataclass(frozen=True, eq=False)
class Border:
    """What a block gains: its new inducing variables, and the new rows [V C] of its Cholesky factor."""

    block: InducingBlock
    bottom: Tensor

    @property
    def width(self) -> int:
        return len(self.bottom)


def resolved(asked: Recipe, found: Survey, n_species: int) -> Recipe:
    """The recipe with what is open filled in. `inducing.n` is the most there may ever be: as many as the labels ask for, below that."""
    free = tuple(i if isinstance(i.shares, dict) else i.model_copy(update={"n": None}) for i in asked.inducings)
    out = defaults.resolve(asked.model_copy(update={"inducing": free}), found, n_species)
    capped = (
        i.model_copy(update={"n": min(i.n, a.n or i.n)}) for i, a in zip(out.inducings, asked.inducings, strict=True)
    )
    return out.model_copy(update={"inducing": tuple(capped)})


def room(asked: Recipe, recipe: Recipe, models: Sequence[Model], k: int, labels: int, periodic: bool) -> int:
    """How many centres more so many labels ask for, of descriptor k, as far as a pass over them may cost.

    Args:
        asked: the recipe as given; recipe: as it was filled in.
    """
    wish, gradients = asked.inducings[k], recipe.inducings[k].gradients
    most = wish.n or (sum(wish.shares.values()) if isinstance(wish.shares, dict) else defaults.MOST_COLUMNS)
    columns = min(defaults.affordable(recipe.memory_GB), defaults.columns_for(labels, periodic)) // len(models)
    wanted = min(most, columns // (1 + gradients)) - sum(len(b.features) for b in models[k].blocks)
    return max(0, min(wanted, max(1, PASS // (labels * (1 + gradients)))))


def widths(models: Sequence[Model]) -> list[int]:
    """Columns of each block."""
    return [len(lower) for m in models for lower in m.lowers]


def extended(
    models: Sequence[Model],
    batches: Sequence[Batch],
    factor: Factor,
    scales: Scales,
    grown: Sequence[Sequence[InducingBlock | None]],
) -> State:
    """With the new inducing variables that do not depend on others: bordered factors, and one pass over all data for the columns.

    Args:
        grown: for each model and block what is new, if anything.
    """
    larger, borders = [], []
    for model, extras in zip(models, grown, strict=True):
        pairs = [_bordered(model, k, new) for k, new in enumerate(extras)]
        borders += [border for *_, border in pairs]
        blocks, lowers = tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)
        larger.append(replace(model, blocks=blocks, lowers=lowers))
    if not any(borders):
        return tuple(models), tuple(batches), factor
    old = widths(models)
    columns = [_columns(models, batch, borders, scales, old) for batch in batches]

    def passes() -> Iterator[tuple[Tensor, Tensor]]:
        for batch, new in zip(batches, columns, strict=True):
            for kind, rows in batch.rows.items():
                yield rows, torch.cat(new[kind], dim=1)

    more = [border.width if border else 0 for border in borders]
    order, first = _places(old, more)
    factor = factor.extended(passes)
    if first < len(order):
        factor = factor.turned(lambda rows: torch.cat([rows[:, order], rows[:, -1:]], dim=1), first)
    grown_rows = []
    for batch, new in zip(batches, columns, strict=True):
        rows = {kind: _interleaved(some, new[kind], old, borders) for kind, some in batch.rows.items()}
        grown_rows.append(replace(batch, rows=rows))
    return tuple(larger), tuple(grown_rows), factor


def _bordered(model: Model, k: int, new: InducingBlock | None) -> tuple[InducingBlock, Tensor, Border | None]:
    """Block k of a model with those of its new variables that are independent, its Cholesky factor, and what is new of it."""
    block, lower = model.blocks[k], model.lowers[k]
    if new is None:
        return block, lower, None
    both = [replace(b, features=b.features.double(), tangents=b.tangents.double()) for b in (block, new)]
    cross, corner = (covariances.covariance(model.kernel, b, both[1]) for b in both)
    # what rounding of the features makes up is no rank
    tolerance = max(RANK_TOLERANCE, 10 * torch.finfo(new.features.dtype).eps)
    longer, kept = bordered(lower, cross, corner, tolerance)
    if not len(kept):
        return block, lower, None
    taken = replace(new, kept=kept)
    return inducing.joined(block, taken), longer, Border(taken, longer[len(lower) :])


def _columns(
    models: Sequence[Model], batch: Batch, borders: Sequence[Border | None], scales: Scales, old: Sequence[int]
) -> dict[str, list[Tensor]]:
    """By kind and block that grows, new columns [K_on D - A Vᵀ] C⁻ᵀ / σ, A being the rows there are."""
    it = iter(borders)
    blocks = [tuple(border.block for border in (next(it) for _ in m.blocks) if border) for m in models]
    out = {}
    for kind, raw in batch.raw(models, blocks).items():
        pieces, start, first = [], 0, 0
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


def _interleaved(rows: Tensor, new: Sequence[Tensor], old: Sequence[int], borders: Sequence[Border | None]) -> Tensor:
    """[A | y] with the new columns of each block behind its old ones."""
    pieces, first, fresh = [], 0, iter(new)
    for border, width in zip(borders, old, strict=True):
        pieces.append(rows[:, first : first + width])
        first += width
        if border is not None:
            pieces.append(next(fresh))
    return torch.cat([*pieces, rows[:, first:]], dim=1)


def _places(old: Sequence[int], new: Sequence[int]) -> tuple[Tensor, int]:
    """Where the columns [all old | all new] go when each block has its new ones behind its old ones; how many of them stay in place."""
    order, first, behind = [], 0, sum(old)
    for a, b in zip(old, new, strict=True):
        order += [*range(first, first + a), *range(behind, behind + b)]
        first, behind = first + a, behind + b
    stay = next((i for i, place in enumerate(order) if i != place), len(order))
    return torch.tensor(order, dtype=torch.long), stay


def reduced(
    models: Sequence[Model],
    batches: Sequence[Batch],
    factor: Factor,
    descriptor: int,
    species: int,
    centres: Sequence[int],
) -> State:
    """Without some inducing points of one block.

    Raises:
        checks.UserError: no such block or centre, or none would be left.
    """
    model = models[descriptor]
    at = next((i for i, b in enumerate(model.blocks) if b.species == species), None)
    if at is None:
        raise checks.UserError(f"There are no inducing points of {checks.symbol(species)} to remove.")
    block = model.blocks[at]
    wrong = [c for c in centres if not 0 <= c < len(block.features)]
    if wrong:
        raise checks.UserError(
            f"There are {len(block.features)} inducing points of {checks.symbol(species)}, counted from 0; got {wrong[:5]}."
        )
    stays = torch.ones(len(block.features), dtype=torch.bool)
    stays[torch.as_tensor(list(centres), dtype=torch.long)] = False
    smaller, columns = inducing.restricted(block, stays)
    if not len(columns):
        raise checks.UserError(f"All inducing points of {checks.symbol(species)} would be removed.")
    shorter, turn = shrunk(model.lowers[at], columns)
    blocks, lowers = list(model.blocks), list(model.lowers)
    blocks[at], lowers[at] = smaller, shorter
    before = sum(len(m.blocks) for m in models[:descriptor]) + at
    sizes = widths(models)
    turns = [turn if i == before else None for i in range(len(sizes))]

    def turned(rows: Tensor) -> Tensor:
        return _turned(rows, turns, sizes)

    changed = replace(model, blocks=tuple(blocks), lowers=tuple(lowers))
    after = tuple(changed if m is model else m for m in models)
    return after, tuple(b.turned(turned) for b in batches), factor.turned(turned, sum(sizes[:before]))


def _turned(rows: Tensor, turns: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    """[A Q | y] with Q block-diagonal; None stands for the identity."""
    pieces = rows.split([*sizes, 1], dim=1)
    return torch.cat([p if q is None else p @ q for p, q in zip(pieces, [*turns, None], strict=True)], dim=1)


def lean(
    models: Sequence[Model], factor: Factor, at_most: int
) -> tuple[list[tuple[InducingBlock, ...]], list[Tensor], Tensor]:
    """A sparse process of its own with about so many columns, for variances: all centres with fewer gradients, as new ones count most.

    Of centres that are too many by themselves, evenly many of old and new.

    Returns:
        blocks of each model, Cholesky factors of all blocks, and (columns, columns) the upper triangular factor.
    """
    centres = sum(len(b.features) for m in models for b in m.blocks)
    directions, share = max(0, at_most // centres - 1), min(1.0, at_most / centres)
    blocks, lowers, turns = [], [], []
    for model in models:
        some = []
        for block, lower in zip(model.blocks, model.lowers, strict=True):
            ranks = (torch.arange(len(block.features) + 1) * share).ceil()
            centre, direction = block.addresses
            chosen = ((direction < directions) & (ranks.diff() > 0)[centre]).nonzero()[:, 0]
            chosen = chosen if len(chosen) else torch.arange(1)  # their values depended on others
            shorter, turn = shrunk(lower, chosen)
            some.append(variances.restricted(block, chosen)), lowers.append(shorter), turns.append(turn)
        blocks.append(tuple(some))
    sizes = widths(models)
    return blocks, lowers, factor.turned(lambda rows: _turned(rows, turns, sizes)).upper[:, :-1]
