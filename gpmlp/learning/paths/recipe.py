"""Recipes of runs that relax a structure, find the path of a reaction or a saddle."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from ase import Atoms
from pydantic import Field, field_validator, model_validator

from gpmlp.learning.oracles.oracle import OracleRecipe
from gpmlp.learning.paths.band import FEWEST_IMAGES
from gpmlp.learning.paths.motions import Motion
from gpmlp.learning.paths.network import DEFAULT_WAYS, Name
from gpmlp.learning.paths.surface import exact_but, surface_recipe
from gpmlp.recipe import Count, Positive, Recipe, RecipeSection

Word = Literal["random", "softest", "uncertain"]
Pair = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


class _PathRecipe(RecipeSection):
    """What all have: the structure, the oracle, atoms that are held, and the model.

    labels: label files of other runs of the same oracle, which the model begins with. fixed: indices of atoms that do not move, counted
    from 0, besides those that the file holds. model: as in a fit; keys that are not given are those of the exact process of all labels
    (surface.EXACT).
    """

    start: str
    oracle: OracleRecipe
    fixed: tuple[Annotated[int, Field(ge=0)], ...] = ()
    labels: tuple[str, ...] = ()
    labels_at_most: Count = 60
    model: Recipe = surface_recipe()

    @field_validator("model", mode="before")
    @classmethod
    def _exact(cls, given: Any) -> Any:
        return exact_but(given) if isinstance(given, dict) else given

    @field_validator("model")
    @classmethod
    def _uncertain(cls, model: Recipe) -> Recipe:
        if model.variance is False:
            raise ValueError("variance says which labels are needed; it cannot be false")
        return model


class RelaxRecipe(_PathRecipe):
    """A relaxation in a fixed cell until no force of the oracle is above force_eV_per_A, or there are labels_at_most labels."""

    force_eV_per_A: Positive = 0.02
    output: str = "relaxed"


class NebRecipe(_PathRecipe):
    """A minimum-energy path from start to end.

    images: between the end points. relax_ends: whether end points with forces above the limit are relaxed. It ends when the oracle's
    forces at the top are below force_eV_per_A and its energy was foreseen to energy_eV, or with labels_at_most labels on the path; those of
    end points and their relaxations come to these.
    """

    end: str
    images: Annotated[int, Field(ge=FEWEST_IMAGES)] = 7
    relax_ends: bool = True
    force_eV_per_A: Positive = 0.05
    energy_eV: Positive = 0.01
    output: str = "path"


class MotionRecipe(RecipeSection):
    """One of: `rotate`, what hangs on atom j turns about the bond of atoms i and j (`reverse`: the other way round); `transfer`, atom i
    goes to atom j; `stretch`, their bond breaks. All are [i, j], counted from 0."""

    rotate: Pair | None = None
    transfer: Pair | None = None
    stretch: Pair | None = None
    reverse: bool = False

    @model_validator(mode="after")
    def _one(self) -> MotionRecipe:
        given = [name for name in ("rotate", "transfer", "stretch") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give one of rotate, transfer and stretch, as rotate: [1, 2]")
        if self.reverse and self.rotate is None:
            raise ValueError("reverse is of rotate; leave it out")
        return self

    def motion(self, atoms: Atoms) -> Motion:
        """Of the start. Raises UserError: there are no such atoms, or nothing can move that way."""
        if self.transfer is not None:
            return Motion.of(atoms, "transfer", *self.transfer)
        if self.stretch is not None:
            return Motion.of(atoms, "stretch", *self.stretch)
        assert self.rotate is not None  # _one
        return Motion.of(atoms, "rotate", *self.rotate, self.reverse)


class SaddleRecipe(_PathRecipe):
    """A saddle near the minimum start, without an end point.

    direction: where the search begins to climb: 'random' around a random atom, the model's 'softest' mode, the most 'uncertain' of some
    random ones, a motion (`rotate: [i, j]`), or vectors of atoms by their index. seed: of what is random. relax_start: whether a start
    with forces above the limit is relaxed. sides: whether the minima on both sides are sought. It ends when the oracle's forces are below
    force_eV_per_A, its energy was foreseen to energy_eV and the model has one negative mode there, or with labels_at_most labels of the
    search, or a label that is more than highest_eV above the start; labels of relaxations come to these.
    """

    direction: Word | MotionRecipe | dict[int, tuple[float, float, float]] = "random"
    seed: Annotated[int, Field(ge=0)] = 0
    relax_start: bool = True
    sides: bool = True
    force_eV_per_A: Positive = 0.05
    energy_eV: Positive = 0.01
    highest_eV: Positive = 5.0
    output: str = "saddle"


class ReactionsRecipe(RecipeSection):
    """What is explored. ways: out of each minimum. minima_at_most: with as many it ends. highest_eV: above the start, to which saddles are
    sought and from which minima are explored."""

    ways: Annotated[tuple[Name, ...], Field(min_length=1)] = DEFAULT_WAYS
    minima_at_most: Annotated[int, Field(ge=2)] = 20
    highest_eV: Positive = 3.0


class NetworkRecipe(_PathRecipe):
    """The reactions around the minimum start, and of the products: a learning run with `reactions` in place of `dynamics`.

    seed: of what is random. Each search ends as `gpmlp saddle` does (force_eV_per_A, energy_eV), or after some labels. It ends when every
    way of every minimum was tried, or with labels_at_most oracle calls.
    """

    reactions: ReactionsRecipe
    seed: Annotated[int, Field(ge=0)] = 0
    labels_at_most: Count = 200
    force_eV_per_A: Positive = 0.03
    energy_eV: Positive = 0.01
    output: str = "network"

    @field_validator("reactions", mode="before")
    @classmethod
    def _defaults(cls, given: Any) -> Any:
        return {} if given is None else given  # nothing after `reactions:`
