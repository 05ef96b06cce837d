"""How strong a dispersion tail is in labels: coefficients C₆ learned from them, and whether they hold the tail that is asked for once.

With the local Gaussian process marginalised, labels are y ~ N(Φ c, K + σ²), Φ the tails of C₆ = 1 of each pair of elements: c is linear and
has a posterior of its own. What the process can represent within its cutoff says nothing of it; what it cannot, as the forces between
molecules or slabs apart and the stress of crystals at several densities, does. Just beyond the cutoff there are other interactions than
r⁻⁶; a column r⁻¹⁰ of each pair, of any strength, stands for what falls faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gpmlp.core.errors import chemical_symbol
from gpmlp.core.findings import Finding
from gpmlp.core.quantities import Prediction, Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting import defaults, prepare, regression
from gpmlp.fitting.online import OnlineFit
from gpmlp.gp import likelihood
from gpmlp.gp.posterior import FIXED
from gpmlp.gp.qr import RowFactor
from gpmlp.potential.baseline import Baseline
from gpmlp.potential.dispersion import R6Tail
from gpmlp.recipe import InducingRecipe, LongRangeRecipe, R6Recipe, Recipe

ATOMS = 500  # of the structures at random from which a tail is judged
CENTRES = 100  # of each species
ROUNDS, SETTLED = 4, 0.01  # of learning the noise at the latest C₆, until that changes by less
FACTOR = 2.0  # of the log-normal prior around free atoms
FASTER = 4  # powers of 1/r by which what else is beyond the cutoff falls faster than the tail
ONCE = 0.5, 1.5  # between which labels hold a tail once
SURE = 3.0  # standard deviations from which anything is said,
CLEAR = 0.2  # and the largest standard deviation of a strength at which it is
WITH_DISPERSION = ("tblite",)  # calculators that hold dispersion by themselves: GFN1-xTB has D3, GFN2-xTB D4


class FasterTail(R6Tail):
    """A tail that falls as r⁻¹⁰ from where the other is whole, with the same strength there."""

    def of_pair(self, r: Tensor, c6: Tensor | float) -> tuple[Tensor, Tensor]:
        """As of R6Tail."""
        energies, slopes = super().of_pair(r, c6)
        factor = (self.full / r) ** FASTER
        return factor * energies, factor * (slopes - FASTER / r * energies)


@dataclass(frozen=True, eq=False)
class TailEvidence:
    """The likelihood of the strengths of tails, exp(−½ |R (c − c₀) − r|²), with the local process and energies of atoms marginalised.

    Attributes:
        factor: (tails, tails) R; residual: (tails,) r; strengths: (tails,) c₀.
    """

    factor: Tensor
    residual: Tensor
    strengths: Tensor

    def free(self) -> tuple[Tensor, Tensor]:
        """Strengths and standard deviations without any prior, each (tails,)."""
        inverse = torch.linalg.pinv(self.factor)
        return self.strengths + inverse @ self.residual, (inverse @ inverse.T).diagonal().sqrt()

    def positive(self, medians: Tensor) -> Tensor:
        """The most probable strengths under log-normal priors of FACTOR around the medians, by Newton's method in their logarithms."""
        width, theta = math.log(FACTOR), torch.zeros_like(medians)

        def loss(theta: Tensor) -> Tensor:
            misfit = self.factor @ (medians * theta.exp() - self.strengths) - self.residual
            return 0.5 * misfit.square().sum() + 0.5 * (theta / width).square().sum()

        for _ in range(100):
            values = medians * theta.exp()
            misfit, slopes = self.factor @ (values - self.strengths) - self.residual, self.factor * values
            gradient = slopes.T @ misfit + theta / width**2
            step = torch.linalg.solve(slopes.T @ slopes + torch.eye(len(theta)).to(theta) / width**2, gradient)
            length = 1.0
            while loss(theta - length * step) > loss(theta) and length > 1e-6:
                length /= 2
            theta = theta - length * step
            if float(step.abs().max()) < 1e-9:
                break
        return medians * theta.exp()


def settle_dispersion(structures: Structures, targets: Targets, recipe: Recipe) -> tuple[Recipe, tuple[Finding, ...]]:
    """The recipe with C₆ learned from the labels, where it asks for that, and what the labels say of the tail that it asks for."""
    chosen = recipe.long_range.dispersion
    if not chosen:
        return recipe, ()
    here = recipe.model_copy(update={"device": "cpu", "dtype": "float64"})
    structures, targets = prepare.prepare_data(structures, targets, here)
    part = _some(structures, recipe.seed)
    labels = prepare.trusted_labels(structures, targets, recipe)
    data = structures.select(part), labels.select(structures, part)
    resolved = defaults.resolve_recipe(here, defaults.summarise_data(*data), len(structures.distinct_species))
    tail = prepare.dispersion_of(resolved, structures.distinct_species)
    assert tail is not None
    if chosen.r6 and chosen.r6.c6 == "learned":
        assert isinstance(tail, R6Tail)
        learned = _learned_c6(*data, here, tail)
        c6 = {"-".join(map(chemical_symbol, pair)): value for pair, value in learned.items()}
        r6 = chosen.r6.model_copy(update={"c6": c6})
        long_range = recipe.long_range.model_copy(update={"dispersion": chosen.model_copy(update={"r6": r6})})
        return recipe.model_copy(update={"long_range": long_range}), _twice_by_name(recipe)
    if twice := _twice_by_name(recipe):
        return recipe, twice
    ((strength, deviation),) = zip(
        *(v.tolist() for v in _evidence(*data, here, [tail], torch.ones(1).double()).free()), strict=True
    )
    return recipe, _finding(strength, deviation, chosen.r6)


def _finding(strength: float, deviation: float, r6: R6Recipe | bool) -> tuple[Finding, ...]:
    """What is said of labels that hold a tail so many times."""
    if deviation > CLEAR or abs(strength - 1) < SURE * deviation or ONCE[0] < strength < ONCE[1]:
        return ()
    much = f"the labels hold {strength:.2f} ± {deviation:.2f} times the dispersion that long_range.dispersion subtracts and adds again"
    advice = (
        "It is for labels that hold it once: leave it out where the method that labelled has no dispersion, or label with it."
        if strength < 1
        else "Do they hold it twice? If not, its coefficients are not those of the labels."
    )
    advice += " `c6: learned` takes them from the labels." if r6 else ""
    numbers = {"strength": strength, "strength_std": deviation}
    return (Finding("dispersion-of-another-strength", "warning", f"{much}.", (), numbers, advice),)


def _twice_by_name(recipe: Recipe) -> tuple[Finding, ...]:
    """A baseline calculator that holds dispersion by itself, or is told to by its keyword arguments."""
    calculator = recipe.baseline.calculator
    if not calculator:
        return ()
    said = str(calculator.kwargs).lower()
    if calculator.name not in WITH_DISPERSION and not any(word in said for word in ("d3", "d4", "vdw", "dispersion")):
        return ()
    text = f"the baseline calculator {calculator.name} holds dispersion itself, which long_range.dispersion then subtracts a second time."
    return (Finding("dispersion-twice", "warning", text, advice="Leave out one of both."),)


def _some(structures: Structures, seed: int) -> Tensor:
    """Structures at random, so many that they have about ATOMS atoms, in their order."""
    order = torch.randperm(len(structures), generator=torch.Generator().manual_seed(seed))
    counts = structures.counts.cpu()[order].cumsum(0)
    return order[: max(2, int((counts <= ATOMS).sum()))].sort().values


def _learned_c6(structures: Structures, targets: Targets, recipe: Recipe, tail: R6Tail) -> dict[tuple[int, int], float]:
    """C₆ by pair of elements, eV A^6: the most probable ones; of free atoms where labels do not say."""
    pairs = list(tail.c6)
    tails = [tail.unit_tails()[pair] for pair in pairs]
    medians = torch.tensor([tail.c6[pair] for pair in pairs], dtype=torch.float64)
    values = medians
    for _ in range(ROUNDS):
        before, values = values, _evidence(structures, targets, recipe, tails, values).positive(medians)
        if float((values / before).log().abs().max()) < SETTLED:
            break
    return dict(zip(pairs, values.tolist(), strict=True))


def _evidence(
    structures: Structures, targets: Targets, recipe: Recipe, tails: Sequence[Baseline], strengths: Tensor
) -> TailEvidence:
    """Of a small fit to labels less tails of these strengths, whose noise and signal are learned by evidence."""
    known = [tail(structures) for tail in tails]
    for prediction, strength in zip(known, strengths, strict=True):
        targets = targets.minus(prediction.map(strength.mul))
    pilot = recipe.model_copy(
        update={
            "inducing": InducingRecipe(n=CENTRES),
            "long_range": LongRangeRecipe(charges="off"),
            "variance": False,
            "calibration": False,
            "novelty": False,
            "mean": "exact",
        }
    )
    fit = OnlineFit.begin(structures, targets, pilot)
    columns = sum(regression.block_widths(fit.models))
    faster = [f(structures) for tail in tails if isinstance(tail, R6Tail) for f in _faster(tail)]
    beside = [*_atoms(structures, pilot), *faster, *known]
    size = columns + len(beside)
    rows = RowFactor(size, 2 * size)
    rows.add(torch.eye(size)[:columns].double(), torch.zeros(columns).double())
    for batch in fit.batches:
        remaining, counts = batch.remaining, batch.structures.counts
        more = [
            regression.rows_of_labels([], likelihood.observed_labels(_labelled(term, remaining), counts))
            for term in beside
        ]
        for kind, own in batch.rows.items():
            noise = fit.noise[kind] if kind != FIXED else 1.0
            extra = torch.cat([values[kind].double() for values in more], dim=1) / noise
            rows.add(torch.cat([own[:, :-1], extra], dim=1), own[:, -1])
    triangle = rows.factor()[-len(known) - 1 :, -len(known) - 1 :]
    return TailEvidence(triangle[:-1, :-1], triangle[:-1, -1], strengths)


def _faster(tail: R6Tail) -> list[R6Tail]:
    """Of each pair of elements that the tail is of, what falls faster."""
    around = tail.begin, tail.full, tail.outer
    nothing = dict.fromkeys(tail.c6, 0.0)
    return [FasterTail(nothing | {pair: 1.0}, *around) for pair, c6 in tail.c6.items() if c6]


def _labelled(term: Prediction, labels: Targets) -> Targets:
    """What a term says, where there are labels."""
    values: dict[str, Any] = {}
    for name in ("energies", "forces", "stresses"):
        given = getattr(labels, name)
        values[name] = torch.where(given.isnan(), given, torch.nan_to_num(getattr(term, name)))
    return replace(labels, **values)


def _atoms(structures: Structures, recipe: Recipe) -> list[Prediction]:
    """Of each element an energy of 1 eV, where the fit finds those of isolated atoms by itself."""
    if recipe.baseline.isolated_atoms not in ("auto", "least_squares"):
        return []
    out = []
    for z in structures.distinct_species:
        like = structures.positions
        energies, nothing = structures.composition([z])[:, 0], like.new_zeros(structures.cells.shape)
        out.append(Prediction(energies, (structures.species == z).to(like), torch.zeros_like(like), nothing))
    return out
