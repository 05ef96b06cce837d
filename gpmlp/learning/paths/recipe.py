"""Recipes of runs that relax a structure, find the path of a reaction or a saddle."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from gpmlp.learning.oracles.oracle import OracleRecipe
from gpmlp.learning.paths.band import FEWEST_IMAGES
from gpmlp.learning.paths.surface import exact_but, surface_recipe
from gpmlp.recipe import Count, Positive, Recipe, RecipeSection


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


class SaddleRecipe(_PathRecipe):
    """A saddle near the minimum start, without an end point.

    direction: where the search begins to climb: 'random' around a random atom, the model's 'softest' mode, the most 'uncertain' of some
    random ones, or vectors of atoms by their index. seed: of what is random. relax_start: whether a start with forces above the limit is
    relaxed. sides: whether the minima on both sides are sought. It ends when the oracle's forces are below force_eV_per_A, its energy was
    foreseen to energy_eV and the model has one negative mode there, or with labels_at_most labels of the search, or a label that is more
    than highest_eV above the start; labels of relaxations come to these.
    """

    direction: Literal["random", "softest", "uncertain"] | dict[int, tuple[float, float, float]] = "random"
    seed: Annotated[int, Field(ge=0)] = 0
    relax_start: bool = True
    sides: bool = True
    force_eV_per_A: Positive = 0.05
    energy_eV: Positive = 0.01
    highest_eV: Positive = 5.0
    output: str = "saddle"
