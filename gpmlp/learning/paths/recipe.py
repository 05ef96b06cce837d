"""Recipes of runs that relax a structure or find the path of a reaction."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from gpmlp.learning.oracles.oracle import OracleRecipe
from gpmlp.learning.paths.band import FEWEST_IMAGES
from gpmlp.learning.paths.surface import exact_but, surface_recipe
from gpmlp.recipe import Count, Positive, Recipe, RecipeSection


class _PathRecipe(RecipeSection):
    """What both have: the structure, the oracle, atoms that are held, and the model.

    fixed: indices of atoms that do not move, counted from 0, besides those that the file holds. model: as in a fit; keys that are not
    given are those of the exact process of all labels (surface.EXACT).
    """

    start: str
    oracle: OracleRecipe
    fixed: tuple[Annotated[int, Field(ge=0)], ...] = ()
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
