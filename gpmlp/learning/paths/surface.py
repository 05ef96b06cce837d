"""A Surface is the potential energy surface near a few labelled structures: the exact Gaussian process of all their energies and forces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.geometry import find_mic

from gpmlp.core.calculators import merge_kwargs
from gpmlp.core.errors import UserError, chemical_symbol
from gpmlp.core.neighbors import find_neighbors
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.engines.ase import GPCalculator
from gpmlp.fitting.fit import fit
from gpmlp.gp.likelihood import SIGNAL_PRIOR
from gpmlp.io.ase_atoms import from_ase, structures_from_ase
from gpmlp.potential.potential import Potential
from gpmlp.recipe import LearnedRecipe, Recipe

# all functionals of the labels, for the mean and for error bars, as there are few; nothing that a path does not need. Noises are given:
# labels of one code hardly scatter, and from so few the evidence may take all energies for noise
EXACT: dict[str, Any] = {
    "inducing": {"functionals": "all"},
    "variance": {"columns": "all", "local": "exact"},
    "noise": {"energy_per_atom": 5e-5, "force": 5e-4},
    "mean": "exact",
    "calibration": False,
    "novelty": False,
}

# eV, of a local energy. Labels of structures at rest have no forces, from which the evidence takes all energies for nearly constant
LEAST_SIGNAL = 1.0
PRIOR_LABELS, PRIOR_SCORE = 4, 2.0  # of `scale`, found with tests/benchmarks/paths.py
FEWEST = 2  # labels, from which energies of others are foreseen
SMALLEST = 5e-4  # eV; errors are compared with no less
SAME_PLACE = 1e-6  # A; to which a structure and a label of it agree


def exact_but(given: Mapping[str, Any]) -> dict[str, Any]:
    """EXACT with each key that is given in place of its own, in sections too, also in those of several descriptors."""
    merged = merge_kwargs(EXACT, given)
    if isinstance(merged["inducing"], Sequence) and not isinstance(merged["inducing"], str):
        merged["inducing"] = [
            merge_kwargs(EXACT["inducing"], one) if isinstance(one, Mapping) else one for one in merged["inducing"]
        ]
    return merged


def surface_recipe(given: Mapping[str, Any] | None = None) -> Recipe:
    """The model of a path: EXACT, but for what is given."""
    return Recipe.model_validate(exact_but(given or {}))


@dataclass(frozen=True, eq=False)
class Prediction:
    """Of several structures: energies and their standard deviations (structures,) eV, forces (structures, atoms, 3) eV/A."""

    energies: np.ndarray
    sigmas: np.ndarray
    forces: np.ndarray

    @property
    def difference_sigmas(self) -> np.ndarray:
        """(structures,) eV, of energies less that of the first, which is labelled: its own error is next to nothing, and independent."""
        sigmas = np.hypot(self.sigmas, self.sigmas[0])
        sigmas[0] = 0.0
        return sigmas


@dataclass(frozen=True, eq=False)
class Surface:
    """A value; labels are added by making a new one.

    Standard deviations are the posterior's times `scale`, which errors of energies as they were foreseen set: the posterior assumes that
    structures elsewhere vary as much as those that are labelled, which are few and at rest at first.

    Attributes:
        labels: structures with energy and forces of the oracle as results of their calculators.
        scores: of the labels that were foreseen, errors of their energies in the posterior's standard deviations.
    """

    recipe: Recipe
    labels: tuple[Atoms, ...] = ()
    scores: tuple[float, ...] = ()

    @property
    def scale(self) -> float:
        """Of standard deviations: the mean of its square under an inverse gamma prior of PRIOR_LABELS labels with errors of PRIOR_SCORE."""
        weight = PRIOR_LABELS + len(self.scores)
        return float(np.sqrt((PRIOR_LABELS * PRIOR_SCORE**2 + np.square(self.scores).sum()) / weight))

    def with_label(self, atoms: Atoms, energy: float, forces: np.ndarray) -> Surface:
        """With one more labelled structure.

        Args:
            energy, forces: of the oracle, eV and (atoms, 3) eV/A, of all atoms, whether they are held or not.

        Raises:
            UserError: the label is not finite.
        """
        if not (np.isfinite(energy) and np.isfinite(forces).all()):
            raise UserError("The oracle gave an energy or forces that are not finite numbers.")
        label = atoms.copy()
        label.set_constraint()
        label.calc = SinglePointCalculator(label, energy=float(energy), forces=np.array(forces))
        scores = self.scores
        if len(self.labels) >= FEWEST:
            foreseen = self.predict([label])
            error, sigma = float(foreseen.energies[0]) - energy, float(foreseen.sigmas[0]) / self.scale
            scores = (*scores, error / max(sigma, SMALLEST))
        return replace(self, labels=(*self.labels, label), scores=scores)

    def with_oracle(self, atoms: Atoms) -> Surface:
        """With the label that the calculator of the atoms gives. Raises UserError: see `with_label`."""
        energy = atoms.get_potential_energy(apply_constraint=False)
        return self.with_label(atoms, energy, atoms.get_forces(apply_constraint=False))

    @cached_property
    def data(self) -> tuple[Structures, Targets]:
        """All labels."""
        return from_ase(self.labels, [f"label {i + 1}" for i in range(len(self.labels))])

    @cached_property
    def potential(self) -> Potential:
        """The posterior mean, with variances.

        Raises:
            UserError: what a fit refuses; no label has two atoms within the model's cutoff, so that all forces would be zero.
        """
        potential = fit(*self.data, self._bounded())[0]
        cutoff = max(term.descriptor.cutoff for term in potential.terms)
        if not len(find_neighbors(self.data[0], cutoff)):
            raise UserError(
                f"No pair of atoms lies within the model's cutoff, {cutoff:g} A: it cannot tell one structure from another. Give a longer "
                "one (model: {descriptor: {cutoff: ...}})."
            )
        return potential

    def _bounded(self) -> Recipe:
        """The recipe, with LEAST_SIGNAL as the lower bound of each signal that it leaves open."""
        species = [chemical_symbol(z) for z in self.data[0].distinct_species]
        open_one: float | LearnedRecipe = LearnedRecipe(bounds=(LEAST_SIGNAL, SIGNAL_PRIOR.high))
        signals = tuple(dict.fromkeys(species, open_one) | given for given in self.recipe.signals)
        return self.recipe.model_copy(
            update={"signal": signals if isinstance(self.recipe.signal, tuple) else signals[0]}
        )

    def calculator(self) -> GPCalculator:
        """The posterior mean for ASE."""
        return GPCalculator(self.potential)

    def predict(self, images: Sequence[Atoms]) -> Prediction:
        """Energies with their standard deviations, and forces, of structures with equally many atoms."""
        predicted = self.potential(structures_from_ase(images), variance="energies", form="dtc", calibrated=False)
        assert predicted.energies_variance is not None
        sigmas = self.scale * predicted.energies_variance.epistemic.clamp_min(0).sqrt()
        forces = predicted.forces.reshape(len(images), -1, 3)
        return Prediction(*(x.detach().numpy() for x in (predicted.energies, sigmas, forces)))

    def label_of(self, atoms: Atoms) -> Atoms | None:
        """The label of this very structure, or of one that lattice vectors move onto it, if there is one."""
        for label in reversed(self.labels):
            if len(label) == len(atoms) and (label.numbers == atoms.numbers).all() and (label.pbc == atoms.pbc).all():
                if np.abs(label.cell.array - atoms.cell.array).max() > SAME_PLACE:
                    continue
                if find_mic(label.positions - atoms.positions, atoms.cell, atoms.pbc)[1].max() < SAME_PLACE:
                    return label
        return None

    def known(self, images: Sequence[Atoms]) -> Prediction:
        """As `predict`, but labels are what the oracle says: of an image that is labelled, where the first is, energy and forces are those
        of its label, with the noise of labels as its standard deviation; other energies are as far above the first as the posterior has
        them."""
        predicted, labels = self.predict(images), [self.label_of(image) for image in images]
        if labels[0] is None:
            return predicted
        energies = predicted.energies + (labels[0].get_potential_energy() - predicted.energies[0])
        sigmas, forces = predicted.sigmas.copy(), predicted.forces.copy()
        noise = self.potential.noise["energies"] * len(images[0])
        for i, label in enumerate(labels):
            if label is not None:
                energies[i], forces[i] = label.get_potential_energy(), label.get_forces()
                sigmas[i] = min(sigmas[i], noise)
        return Prediction(energies, sigmas, forces)

    def forces(self, images: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray]:
        """Mean energies (structures,) eV and forces (structures, atoms, 3) eV/A, without variances, which take longer."""
        predicted = self.potential(structures_from_ase(images))
        return predicted.energies.detach().numpy(), predicted.forces.detach().numpy().reshape(len(images), -1, 3)
