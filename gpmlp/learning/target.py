"""The target of a run: a property that has to be as sure as is wanted, and the labels that make it so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from ase import Atoms

from gpmlp.core.errors import UserError
from gpmlp.core.structures import Structures
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.learning.initial_structures import read_starts
from gpmlp.learning.labels import canonical_structure
from gpmlp.learning.recipe import TargetRecipe
from gpmlp.learning.stopping.criteria import StopCriterion
from gpmlp.learning.stopping.judge import StopVerdict
from gpmlp.potential.potential import Potential
from gpmlp.properties.calculations import choose_calculations
from gpmlp.properties.compute import PropertyResults, compute_properties, named
from gpmlp.properties.labelling import choose_labels
from gpmlp.properties.plan import Calculation

CHOICES = 6  # structures that are looked at for one that is not labelled yet
SAME = 0.01  # A; structures that differ by less in all positions and lattice vectors have one label


@dataclass(frozen=True, eq=False)
class PropertyTarget:
    """A property (`calculation.name`, as 'elastic.C11') of structures, and the standard deviation at which it is sure enough."""

    recipe: TargetRecipe
    structures: tuple[Atoms, ...]
    calculation: Calculation
    seed: int

    @staticmethod
    def from_recipe(recipe: TargetRecipe, base: Path, start: str, seed: int) -> PropertyTarget:
        """The target that a recipe names.

        Args:
            base: folder that its paths start from; start: the structures that are taken where it names none.

        Raises:
            UserError: an unknown property, value of one or option; structures that it does not suit.
        """
        structures = named(read_starts(base / (recipe.structure or start)))
        kind, _, name = recipe.property.partition(".")
        if not name:
            raise UserError(f"target.property: {recipe.property} must name a calculation and a value, as elastic.C11.")
        options = {kind: recipe.options} if recipe.options else {}
        (calculation,) = choose_calculations(structures, [kind], options)
        if not calculation.to_sharpen:
            raise UserError(f"target.property: labels cannot be chosen for values of {kind}.")
        if len(structures) > 1 and not calculation.several:
            raise UserError(
                f"target: {kind} is of one structure, and there are {len(structures)}; name a file with one."
            )
        names = calculation.value_names(structures)
        if not any(fnmatchcase(name, pattern) for pattern in names):
            raise UserError(f"target.property: {kind} has no value '{name}' here; there are {', '.join(names)}.")
        return PropertyTarget(recipe, tuple(structures), calculation, seed)

    @property
    def name(self) -> str:
        """Of the value."""
        return self.recipe.property.partition(".")[2]

    def judge(self, potential: Potential) -> tuple[StopVerdict, PropertyResults]:
        """Whether it is sure enough, and what it is.

        Raises:
            UserError: the model has no such value.
        """
        results = compute_properties(potential, self.structures, [self.calculation], seed=self.seed)
        value, wanted = results[self.name], self.recipe.sigma
        numbers = {"value": value.value, "sigma": value.sigma, "low_90": value.low_90, "high_90": value.high_90}
        met = bool(value.sigma <= wanted)
        unit = f" {value.unit}" if value.unit else ""
        sentence = (
            f"{self.name} {value.value:.5g} ± {value.sigma:.2g}{unit} (90 % interval {value.low_90:.5g} to {value.high_90:.5g}); "
            f"± {wanted:g}{unit} is wanted"
        )
        criterion = StopCriterion(f"target {self.recipe.property}", met, sentence, numbers)
        return StopVerdict(met, met, (criterion,), sentence), results

    def next_label(
        self, potential: Potential, results: PropertyResults, is_done: Callable[[Structures], bool]
    ) -> tuple[Structures, str] | None:
        """The structure whose label shrinks the error bar most, and why; None if the best ones are labelled, or were refused."""
        about = potential, self.structures, [self.calculation], results, [self.name]
        for choice in choose_labels(*about, CHOICES):
            bare = choice.atoms.copy()
            bare.info = {key: value for key, value in bare.info.items() if key != "name"}
            structure = canonical_structure(structures_from_ase([bare], [str(choice.atoms.info["name"])]))
            if not is_done(structure):
                sigma = f"{self.name} to ± {choice.sigmas[self.name]:.2g} foreseen"
                return structure, f"{choice.atoms.info['name']}: {sigma}"
        return None


def nearly_same(a: Structures, b: Structures) -> bool:
    """Whether two structures, atoms in the same order, differ by less than SAME."""
    if a.species.tolist() != b.species.tolist():
        return False
    return all(float((x - y).abs().max()) < SAME for x, y in ((a.cells, b.cells), (a.positions, b.positions)))


def limited(verdict: StopVerdict, limit: str, phrase: str) -> StopVerdict:
    """The verdict of a run that a limit ends, unless its target is met."""
    if verdict.stop or not limit:
        return verdict
    return replace(verdict, stop=True, limit=limit, sentence=f"{phrase}; {verdict.sentence}")
