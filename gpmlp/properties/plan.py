"""A Calculation makes a Plan on one surface: the structures of a property, and the numbers that follow from any surface's values there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from ase import Atoms

from gpmlp.properties.surface import EnergySurface, Point
from gpmlp.recipe import RecipeSection


@dataclass(frozen=True, eq=False)
class CurveAxis:
    """What an output is drawn over: x (n,), what it is called, its unit, and marked places."""

    x: np.ndarray
    label: str
    unit: str
    ticks: tuple[tuple[float, str], ...] = ()


Outputs = Mapping[str, "float | np.ndarray"]


@dataclass(frozen=True, eq=False)
class Plan:
    """What has to be known of a surface for some properties, and how they follow.

    Attributes:
        structures: made (relaxed, displaced, strained) on the surface that was given; info['name'] of each names it.
        evaluate: outputs by name from the Points of these structures on ONE surface. Raises Failed, or gives NaN, where this surface has
            no such value. Called for the mean and each sample; of the surface of the plan it may ask how that answers to
            a sample's forces, nothing else.
        units: of each output that is told, in this order; others serve surfaces whose own plan tells others.
        relaxed: index of a structure whose ions are at rest on the surface -> index of the structure whose Hessian serves for their Newton
            step on another surface (itself, or the one without strain). What constraints hold stays.
        curves: outputs that are arrays, (n,) or (n, branches), and what they are drawn over.
        about: one sentence on each output.
        sources: indices of the structures that an output is from, of a curve also (n, structures) for each of its points; all, if it is not
            there.
        missing: what has no value on the surface of the plan, and why, by its name.
    """

    structures: tuple[Atoms, ...]
    evaluate: Callable[[Sequence[Point]], Outputs]
    units: Mapping[str, str]
    relaxed: Mapping[int, int] = field(default_factory=dict)
    curves: Mapping[str, CurveAxis] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, Sequence[int] | np.ndarray] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)


class Calculation(RecipeSection):
    """A property, or some that come together, with its options (frozen; set by --set NAME.OPTION=VALUE).

    Class attributes:
        name: in the registry (calculations.py), for --only.
        several: whether one plan takes all structures that are given (phases, adsorption), not one plan each.
        by_default: whether it is made without being asked for, where `refusal` does not speak against it.
        to_sharpen: whether labels can be chosen for its values, which takes two evaluations of it for each force.
    """

    name: ClassVar[str]
    several: ClassVar[bool] = False
    by_default: ClassVar[bool] = True
    to_sharpen: ClassVar[bool] = True

    def refusal(self, structures: Sequence[Atoms]) -> str:
        """Why it cannot be made of these structures ('a molecule has no elastic constants'); '' if it can."""
        return ""

    def refusals(self, structures: Sequence[Atoms]) -> list[str]:
        """Of each structure, why no plan takes it; '' where one does."""
        if self.several:
            return [self.refusal(structures)] * len(structures)
        return [self.refusal([atoms]) for atoms in structures]

    def value_names(self, structures: Sequence[Atoms]) -> list[str]:
        """Patterns (fnmatch) of the names of the values of one plan, known before there is a surface.

        Args:
            structures: as of `plan`.
        """
        raise NotImplementedError

    def plan(self, surface: EnergySurface, structures: Sequence[Atoms]) -> Plan:
        """The plan on a surface.

        Args:
            structures: one, or all where `several`; info['name'] of each is its name.

        Raises:
            Failed: the surface has no such property.
            UserError: options that do not suit the structures.
        """
        raise NotImplementedError
