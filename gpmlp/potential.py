"""Potential is a potential energy surface: potential(structures) -> Prediction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpmlp import baselines, checks, descriptors, neighbors
from gpmlp.baselines import Baseline
from gpmlp.environments import Descriptor, Surroundings
from gpmlp.gp import kernels
from gpmlp.gp.kernels import ZonalKernel
from gpmlp.quantities import Prediction
from gpmlp.recipe import KernelRecipe, Recipe
from gpmlp.structures import Structures

CHUNK_ATOMS = 256  # atoms whose pair quantities are in memory together


@dataclass(frozen=True, eq=False)
class MeanBlock:
    """The posterior mean of local energies of one central species, ε(x) = Σ_j [α_j f(x·x_j) + f'(x·x_j) x·τ_j].

    Attributes:
        features: (M, features) centres x_j.
        weights: (M,) α_j, eV.
        tangents: (M, features) τ_j, eV; empty (0, features) where no centre carries gradients.
    """

    features: Tensor
    weights: Tensor
    tangents: Tensor

    def __call__(self, kernel: ZonalKernel, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ε (environments,) and dε/dx (environments, features)."""
        value, first, second = kernel.profile(x @ self.features.T)
        energy = value @ self.weights
        on_dots = first * self.weights
        if not len(self.tangents):
            return energy, on_dots @ self.features
        along = x @ self.tangents.T
        energy = energy + (first * along).sum(1)
        return energy, (on_dots + second * along) @ self.features + first @ self.tangents


@dataclass(frozen=True, eq=False)
class Term:
    """One descriptor with its kernel and, for each central species, the mean of the local energies."""

    descriptor: Descriptor
    kernel: ZonalKernel
    blocks: dict[int, MeanBlock]

    def __call__(self, structures: Structures) -> Prediction:
        pairs = neighbors.find(structures, self.descriptor.cutoff)
        surroundings = Surroundings.of(structures, pairs)
        environments = self.descriptor(surroundings)
        local = structures.positions.new_zeros(structures.n_atoms)
        cotangents = torch.zeros_like(environments.features)
        for z, block in self.blocks.items():
            mine = (structures.species == z).nonzero()[:, 0]
            if len(mine):
                local[mine], cotangents[mine] = block(self.kernel, environments.features[mine])
        gradients = environments.pull_back(cotangents)
        return neighbors.prediction(structures, pairs, surroundings.vectors, local, gradients)


@dataclass(frozen=True, eq=False)
class Potential:
    """A fitted potential: call it on structures. Holds no training data and needs no optimiser.

    Attributes:
        terms: one for each descriptor; their energies add up.
        baselines: terms that were not learned.
        species: atomic numbers it was trained on.
        recipe: the choices made, those left to the data filled in; learned noises are in `noise`, see also the baselines.
        noise: standard deviations of the likelihood, 'energies' eV/atom, 'forces' eV/A, 'stresses' eV/A^3.
        provenance: training files with hashes, package versions.
        report: the FitReport as a dictionary.
    """

    terms: tuple[Term, ...]
    baselines: tuple[Baseline, ...]
    species: tuple[int, ...]
    recipe: Recipe
    noise: dict[str, float] = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)
    report: dict = field(default_factory=dict)

    @property
    def cutoff(self) -> float:
        """Largest distance at which atoms see each other, A."""
        return max(term.descriptor.cutoff for term in self.terms)

    def __call__(self, structures: Structures) -> Prediction:
        """Predict energies, forces and stresses.

        Raises:
            checks.UserError: a species that was not in the training data; atoms on top of each other.
        """
        self._check_species(structures)
        device, dtype = structures.positions.device, structures.positions.dtype
        own = {"device": self.recipe.device, "dtype": getattr(torch, self.recipe.dtype)}
        parts = [self._predict(chunk.to(**own)) for chunk in chunks(structures, CHUNK_ATOMS)]
        if not parts:
            raise checks.UserError("There are no structures to predict.")
        together = Prediction.concatenate(parts)
        return Prediction(*(v.to(device=device, dtype=dtype) for v in vars(together).values()))

    def _predict(self, structures: Structures) -> Prediction:
        total = None
        for term in (*self.terms, *self.baselines):
            part = term(structures)
            total = part if total is None else total + part
        return total

    def _check_species(self, structures: Structures) -> None:
        for i, z in enumerate(structures.distinct_species):
            if z not in self.species:
                atom = int((structures.species == structures.distinct_species[i]).nonzero()[0, 0])
                name = structures.names[int(structures.structure_of_atom[atom])]
                raise checks.UserError(
                    f"{name}: the potential was not trained on {checks.symbol(z)} (Z = {z}); "
                    f"it knows {', '.join(checks.symbol(k) for k in self.species)}."
                )

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """What a model file holds: a JSON-able header and named tensors."""
        header = {
            "species": list(self.species),
            "recipe": self.recipe.model_dump(mode="json"),
            "noise": self.noise,
            "provenance": self.provenance,
            "report": self.report,
            "baselines": [b.state() for b in self.baselines],
        }
        tensors = {
            f"term{k}.Z{z}.{name}": value.detach().cpu().contiguous()
            for k, term in enumerate(self.terms)
            for z, block in term.blocks.items()
            for name, value in vars(block).items()
        }
        return header, tensors

    @classmethod
    def from_state(cls, header: dict, tensors: dict[str, Tensor]) -> Potential:
        """Build a potential again from state()."""
        recipe = Recipe.model_validate(header["recipe"])
        if torch.device(recipe.device).type == "cuda" and not torch.cuda.is_available():
            recipe = recipe.model_copy(update={"device": "cpu"})  # fitted on a GPU, used where there is none
        species = tuple(header["species"])
        terms = []
        for k, (descriptor, kernel) in enumerate(zip(recipe.descriptors, recipe.kernels, strict=True)):
            blocks = {}
            for z in species:
                if f"term{k}.Z{z}.features" in tensors:
                    names = ("features", "weights", "tangents")
                    blocks[z] = MeanBlock(*(tensors[f"term{k}.Z{z}.{n}"].to(recipe.device) for n in names))
            terms.append(Term(descriptors.make(species, descriptor.model_dump()), make_kernel(kernel), blocks))
        return cls(
            tuple(terms),
            tuple(baselines.make(state) for state in header["baselines"]),
            species,
            recipe,
            dict(header["noise"]),
            dict(header["provenance"]),
            dict(header["report"]),
        )


def make_kernel(recipe: KernelRecipe) -> ZonalKernel:
    """Build the kernel that a recipe describes."""
    terms = [(term.weight, make_kernel(term)) for term in recipe.terms]
    return kernels.make(recipe.name, recipe.zeta, recipe.length, terms)


def chunks(structures: Structures, atoms: int) -> Iterator[Structures]:
    """Consecutive structures, as many as have about that many atoms together (at least one)."""
    start, filled = 0, 0
    counts = structures.counts.tolist()
    for i, count in enumerate(counts):
        if filled and filled + count > atoms:
            yield structures.select(range(start, i))
            start, filled = i, 0
        filled += count
    if start < len(counts):
        yield structures.select(range(start, len(counts)))
