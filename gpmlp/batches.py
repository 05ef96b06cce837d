"""A Batch is structures labelled together, with the rows that the posterior has of them and what makes more rows cheap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpmlp import neighbors, regression
from gpmlp.environments import Surroundings
from gpmlp.gp import covariances, posterior
from gpmlp.gp.covariances import Facets, InducingBlock, Look
from gpmlp.neighbors import Neighbors
from gpmlp.quantities import Targets
from gpmlp.regression import Model
from gpmlp.structures import Structures
from gpmlp.terms import View

KEPT_BYTES = 2 << 30  # of Jacobians kept with all batches of a model; those of more are made again for each pass


@dataclass(frozen=True, eq=False)
class Scales:
    """What rows of unit noise and unit signal are scaled by.

    Attributes:
        noise: standard deviation by kind; 1 where none is given, as for 'given' rows.
        signal: (blocks,) δ, eV.
    """

    noise: dict[str, float]
    signal: Tensor

    @staticmethod
    def unit(blocks: int) -> Scales:
        """Of rows that are not scaled."""
        return Scales({}, torch.ones(blocks, dtype=torch.float64))

    def of(self, kind: str) -> float:
        return self.noise.get(kind, 1.0)

    def columns(self, widths: Sequence[int]) -> Tensor:
        """(columns,) δ of each column of blocks so wide."""
        return self.signal.repeat_interleave(torch.tensor(widths))


@dataclass(frozen=True, eq=False)
class Batch:
    """Structures labelled together.

    Attributes:
        targets: labels as they came; remaining: less the baselines.
        rows: by kind, [A D | y] / σ as the posterior has them; 'given' were divided by their own noise.
        features: (atoms, features) of the first descriptor.
        facets: by descriptor, its environments laid out for rows of other inducing variables; empty where not kept.
    """

    structures: Structures
    targets: Targets
    remaining: Targets
    rows: dict[str, Tensor]
    features: Tensor
    facets: tuple[tuple[Facets, ...], ...]

    @staticmethod
    def of(
        models: Sequence[Model],
        structures: Structures,
        targets: Targets,
        remaining: Targets,
        scales: Scales,
        room: int,
        views: Sequence[View] = (),
    ) -> Batch:
        """Make the rows.

        Args:
            room: bytes that may be kept of facets.
            views: what the descriptors see of the structures, if that is there already.
        """
        outlooks = [_outlook(m, structures, v) for m, v in zip(models, views or [None] * len(models), strict=True)]
        facets: tuple[tuple[Facets, ...], ...] = ()
        if sum(_bytes(m, structures, o) for m, o in zip(models, outlooks, strict=True)) <= room:
            facets = tuple(_facets(m, structures, remaining, o) for m, o in zip(models, outlooks, strict=True))
        made = regression.labelled_rows(models, structures, remaining, views=views, facets=facets)
        lowers = [lower for m in models for lower in m.lowers]
        widths, unit = [len(lower) for lower in lowers], Scales.unit(len(lowers))
        rows = {k: rescaled(posterior.whiten(raw.double(), lowers), k, unit, scales, widths) for k, raw in made.items()}
        features = views[0].environments.features if views else _features(structures, facets, outlooks[0])
        return Batch(structures, targets, remaining, rows, features.double(), facets)

    @property
    def told(self) -> Tensor:
        """(atoms,) bool: of which a label tells something: the force on it, or an energy that it has a share in."""
        whole = self.targets.energies.isfinite()[self.structures.structure_of_atom]
        return whole | self.targets.forces.isfinite().any(1)

    @property
    def count(self) -> int:
        return sum(len(rows) for rows in self.rows.values())

    @property
    def n_bytes(self) -> int:
        """Of facets."""
        return sum(f.n_bytes for some in self.facets for f in some)

    def rescaled(self, old: Scales, new: Scales, widths: Sequence[int]) -> Batch:
        """With other noises and signals."""
        rows = {kind: rescaled(some, kind, old, new, widths) for kind, some in self.rows.items()}
        return replace(self, rows=rows)

    def turned(self, turn: Callable[[Tensor], Tensor]) -> Batch:
        """With rows in another basis."""
        return replace(self, rows={kind: turn(rows) for kind, rows in self.rows.items()})

    def raw(self, models: Sequence[Model], blocks: Sequence[tuple[InducingBlock, ...]]) -> dict[str, Tensor]:
        """By kind, rows [K_ou | y] of other inducing variables."""
        return regression.labelled_rows(models, self.structures, self.remaining, blocks, facets=self.facets)


def rescaled(rows: Tensor, kind: str, old: Scales, new: Scales, widths: Sequence[int]) -> Tensor:
    """Rows [A D | y] / σ of a kind with other σ and D, for blocks so wide."""
    rows = rows * (old.of(kind) / new.of(kind))
    rows[:, :-1] *= new.columns(widths) / old.columns(widths)
    return rows


_Outlook = tuple[Neighbors, Surroundings, Look]


def _outlook(model: Model, structures: Structures, view: View | None) -> _Outlook:
    """Pairs, surroundings, and how to get environments: from the view, or made in small numbers."""
    if view is None:
        pairs = neighbors.find(structures, model.descriptor.cutoff)
        surroundings, look = Surroundings.of(structures, pairs), None
    else:
        pairs, surroundings, look = view.neighbors, view.surroundings, view.look
    return pairs, surroundings, look or (lambda centers: model.descriptor(surroundings.select(centers)))


def _bytes(model: Model, structures: Structures, outlook: _Outlook) -> int:
    """About what facets take."""
    return (
        (3 * len(outlook[0]) + structures.n_atoms) * model.descriptor.n_features * structures.positions.element_size()
    )


def _facets(model: Model, structures: Structures, targets: Targets, outlook: _Outlook) -> tuple[Facets, ...]:
    """Of all environments; with derivatives where labels need them."""
    derivatives = bool((~targets.forces.isnan()).any() or (~targets.stresses.isnan()).any())
    every = structures.distinct_species
    return tuple(f for z in every for f in covariances.facets(structures, *outlook, z, derivatives))


def _features(structures: Structures, facets: Sequence[tuple[Facets, ...]], outlook: _Outlook) -> Tensor:
    """(atoms, features) of the first descriptor."""
    if not facets:
        every = torch.arange(structures.n_atoms).split(covariances.ENVIRONMENTS)
        return torch.cat([outlook[2](some).features for some in every])
    order = torch.cat([f.centers for f in facets[0]]).argsort()
    return torch.cat([f.features for f in facets[0]])[order]
