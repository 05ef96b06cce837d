"""Means of low rank: the directions of features that forces feel, and how many of them are enough.

With Jacobians J of the features x, what is left of H = H' + E moves forces by J E x. Its mean square over environments is
tr(A E B E) for A = E[JᵀJ] and B = E[xxᵀ], as far as J and x are independent, and ‖Lᵀ E L‖² bounds it where M = LLᵀ holds both. So the
eigenvalues of Lᵀ H L of largest magnitude are kept, U = L⁻ᵀ times their vectors (balanced truncation with one Gramian; Moore, IEEE
Trans. Autom. Control 26, 17 (1981)). Where the kernel is not quadratic, and H depends on x, they are the leading eigenvectors of
E[(Lᵀ H L)²]. Their number is not bounded but measured, on structures that had no part in A and B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gpmlp.core import neighbors
from gpmlp.core.environments import Descriptor, StructureEnvironments
from gpmlp.core.errors import chemical_symbol
from gpmlp.core.structures import Structures
from gpmlp.gp.kernels import ZonalKernel
from gpmlp.potential.mean import EnergyTerm, LowRankForm, MeanBlock, ProjectedCentres, QuadraticForm
from gpmlp.potential.potential import Potential

SHARE_OF_NOISE = 0.01  # by which predictions may change, root mean square, for each kind
ENVIRONMENTS, JACOBIANS = 1000, 300  # of each species, about, for B and for A
ROWS = 4  # derivatives, times the features, that A is estimated from
JUDGED = 1000  # environments of each species, about, in the structures on which predictions are compared
CHUNK = 50  # environments whose Jacobians are in memory together
LEVEL = 10.0  # weight of the mean of x in B, for energies, next to its covariance
RIDGE = 1e-10  # of the mean eigenvalue of M, where the kernel is quadratic
CURVED_RIDGE = 1e-6  # elsewhere: what projects must not magnify what training data lack, which enters with a high power
BENT, ALONG = 200, 32  # environments that H is seen in, and displacements at random of each
STEP = 1e-4  # of a dot product, for the derivative of f''
TINY = 1e-300
UNITS = {"forces": "eV_per_A", "energies": "eV_per_atom", "stresses": "eV_per_A3"}


@dataclass(frozen=True, eq=False)
class MeanDirections:
    """All directions of one exact mean, the most important first.

    Attributes:
        importance: (features,) magnitude of the whitened eigenvalues.
        every: the mean with all of them; exact: as it is; cheap: fewer directions than so many are cheaper than what there was.
    """

    importance: Tensor
    every: LowRankForm
    exact: QuadraticForm
    cheap: int

    @staticmethod
    def from_moments(exact: QuadraticForm, whitening: Tensor, cheap: int) -> MeanDirections:
        """Of a mean, with M = LLᵀ of its features; whitening: L."""
        values, vectors = torch.linalg.eigh(whitening.T @ exact.hessian @ whitening)
        order = values.abs().argsort(descending=True, stable=True)
        vectors = torch.linalg.solve_triangular(whitening.T, vectors[:, order], upper=True)
        lengths = vectors.norm(dim=0)
        every = LowRankForm(exact.linear, values[order] * lengths.square(), vectors / lengths)
        return MeanDirections(values[order].abs(), every, exact, cheap)

    def leading(self, rank: int) -> LowRankForm:
        """The mean with so many directions."""
        every = self.every
        return LowRankForm(every.linear, every.values[:rank].clone(), every.vectors[:, :rank].contiguous())


@dataclass(frozen=True, eq=False)
class CentreDirections:
    """All directions for a sum over centres, the most important first.

    Attributes:
        importance: (features,) root of the eigenvalues of E[(Lᵀ H L)²].
        vectors, duals: (features, features) L⁻ᵀ and L times the eigenvectors; of the leading ones, one projects onto what the other spans.
        exact_mean, kernel: as it is; seen: (environments, features) in which it is on average what its projection is.
        cheap: fewer directions than so many are cheaper than the exact mean.
    """

    importance: Tensor
    vectors: Tensor
    duals: Tensor
    exact_mean: MeanBlock
    kernel: ZonalKernel
    seen: Tensor

    @staticmethod
    def from_moments(
        block: MeanBlock, kernel: ZonalKernel, whitening: Tensor, x: Tensor, generator: torch.Generator
    ) -> CentreDirections:
        """Of a mean, with M = LLᵀ of its features; whitening: L; x: (environments, features), some of them."""
        bent = _second_derivatives(block, kernel, whitening, x[:BENT], generator)
        squares = bent.square().sum((1, 2), keepdim=True)  # each environment counts alike: its forces are judged alike
        bent = bent * (squares.mean() / squares.clamp_min(TINY)).sqrt()
        values, vectors = torch.linalg.eigh(torch.einsum("ndk,nek->de", bent, bent) / (len(bent) * ALONG))
        order = values.argsort(descending=True, stable=True)
        duals = whitening @ vectors[:, order]
        vectors = torch.linalg.solve_triangular(whitening.T, vectors[:, order], upper=True)
        return CentreDirections(values[order].clamp_min(0).sqrt(), vectors, duals, block, kernel, x)

    @property
    def cheap(self) -> int:
        d, exact = len(self.importance), self.exact_mean.products
        return -(-exact // (exact // d + 2 * d))

    def exact(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean as it is, and its slopes."""
        return self.exact_mean(self.kernel, x)

    @cached_property
    def _seen_mean(self) -> tuple[Tensor, Tensor]:
        return self.exact(self.seen)

    def leading(self, rank: int) -> ProjectedCentres:
        """The mean with so many directions."""
        vectors, r = torch.linalg.qr(self.vectors[:, :rank])
        none = torch.zeros_like(self.seen[0])
        parts = vectors.to(none), (self.duals[:, :rank] @ r.T).to(none), none[:1], none
        form = ProjectedCentres.from_exact(self.exact_mean, self.kernel, *parts)
        (energy, slope), (mine, steep) = self._seen_mean, form(self.seen)
        linear = (slope - steep).mean(0)
        constant = (energy - mine - self.seen @ linear).mean()
        return replace(form, constant=constant[None], linear=linear)


def _second_derivatives(
    block: MeanBlock, kernel: ZonalKernel, whitening: Tensor, x: Tensor, generator: torch.Generator
) -> Tensor:
    """(environments, features, ALONG) Lᵀ H(x) L along directions at random.

    H = Σ_j (α_j f'' + f''' x.τ_j) x_j x_jᵀ + f'' (x_j τ_jᵀ + τ_j x_jᵀ).
    """
    along = torch.randn(x.shape[1], ALONG, generator=generator, dtype=torch.float64).to(x.device)
    x, block = x.double(), MeanBlock(block.features.double(), block.weights.double(), block.tangents.double())
    centres, tangents = block.features @ whitening, block.tangents @ whitening
    s, steep = x @ block.features.T, len(tangents) > 0
    second = kernel.profile(s)[2]
    weights = second * block.weights
    if steep:
        third = (kernel.profile(s + STEP)[2] - kernel.profile(s - STEP)[2]) / (2 * STEP)
        weights = weights + third * (x @ block.tangents.T)
    across, across_tangents = centres @ along, tangents @ along
    out = x.new_empty(len(x), x.shape[1], ALONG)
    for i, (w, f) in enumerate(zip(weights, second, strict=True)):
        on_centres = w[:, None] * across
        if steep:
            out[i] = centres.T @ (on_centres + f[:, None] * across_tangents) + tangents.T @ (f[:, None] * across)
        else:
            out[i] = centres.T @ on_centres
    return out


Directions = list[dict[int, MeanDirections | CentreDirections]]  # of each term, by species
Form = LowRankForm | ProjectedCentres


def with_low_rank(
    potential: Potential, known: Structures, others: Structures, seed: int = 0
) -> tuple[Potential, dict[str, Any] | None]:
    """A potential whose means are of low rank, and the numbers for the report.

    The rank is the smallest at which energies, forces and stresses of `others` change by at most SHARE_OF_NOISE of the potential's noise,
    root mean square, all species together. Species whose mean is no cheaper for it stay as they are.

    Args:
        known: structures whose environments tell which directions matter; others: different ones.

    Returns:
        the potential, exact where nothing is cheaper or there is no noise of forces to go by; the numbers, None then: rank and features
        by term and species, changes and noise by kind, largest change of a force, and the number of structures.
    """
    forms: list[dict[int, Form]] = [{} for _ in potential.terms]
    if "forces" in potential.noise and len(known) and len(others):
        known = known.select(enough(known, ENVIRONMENTS, seed))
        others = others.select(enough(others, JUDGED, seed))
        directions = [_directions(term, known, seed) for term in potential.terms]
        comparison = _Comparison(potential.terms, directions, others, potential.noise)
        forms = comparison.cheapest()
    some = any(forms)
    terms = tuple(replace(t, low_rank=f, exact=not some) for t, f in zip(potential.terms, forms, strict=True))
    recipe = potential.recipe.model_copy(update={"mean": "low_rank" if some else "exact"})
    labelled = [(f"{k}:{chemical_symbol(z)}", form) for k, of in enumerate(forms) for z, form in of.items()]
    numbers: dict[str, Any] | None = None
    if some:
        numbers = {
            "rank": {label: form.rank for label, form in labelled},
            "features": {label: len(form.linear) for label, form in labelled},
            "structures": len(others),
            **comparison.changes(forms),
            **{f"noise_of_{kind}_{UNITS[kind]}": potential.noise[kind] for kind in comparison.kinds},
        }
    return replace(potential, terms=terms, recipe=recipe), numbers


def enough(structures: Structures, each: int, seed: int) -> list[int]:
    """Structures at random, until there are about so many environments of each species, if there are."""
    species = structures.distinct_species
    counts = torch.stack(
        [(structures.species == z).new_zeros(len(structures), dtype=torch.long).index_add_(
            0, structures.structure_of_atom, (structures.species == z).long()) for z in species]
    ).cpu()  # fmt: skip
    order = torch.randperm(len(structures), generator=torch.Generator().manual_seed(seed))
    before = counts[:, order].cumsum(1) - counts[:, order]
    wanted = ((before < each) & (counts[:, order] > 0)).any(0)
    return sorted(order[wanted].tolist())


def _directions(term: EnergyTerm, known: Structures, seed: int) -> dict[int, MeanDirections | CentreDirections]:
    """Of the species of a term whose environments are known."""
    view = term.environments(known)
    features, surrounded = view.environments.features, view.surroundings.surrounded
    out: dict[int, MeanDirections | CentreDirections] = {}
    generator = torch.Generator().manual_seed(seed)
    for z, block in term.blocks.items():
        mine = (surrounded & (known.species == z)).nonzero()[:, 0]
        if len(mine) < 2:
            continue
        few = mine[torch.randperm(len(mine), generator=generator)[:JACOBIANS].to(mine.device)]
        jacobians = _jacobian_moment(term.descriptor, view, few, generator)
        form, d = block.quadratic_form(term.kernel), features.shape[1]
        if form is None:
            whitening = _whitening(features[mine], jacobians, CURVED_RIDGE)
            out[z] = CentreDirections.from_moments(block, term.kernel, whitening, features[few], generator)
        else:
            cheap = -(-min(block.products, d * d) // (2 * d))
            out[z] = MeanDirections.from_moments(form, _whitening(features[mine], jacobians).to(features), cheap)
    return out


def _jacobian_moment(
    descriptor: Descriptor, view: StructureEnvironments, chosen: Tensor, generator: torch.Generator
) -> Tensor:
    """(features, features) mean over some environments of Σ JᵀJ over their neighbours, from so many of the rows, drawn at random."""
    moment = torch.zeros(descriptor.n_features, descriptor.n_features).to(view.environments.features).double()
    share = ROWS * descriptor.n_features / max(1, 3 * len(view.surroundings.pairs_of(chosen)[1]))
    for some in chosen.split(CHUNK):
        rows = descriptor(view.surroundings.select(some)).jacobian().flatten(0, 1)
        drawn = (torch.rand(len(rows), generator=generator) < share).to(rows.device)
        some_rows = rows[drawn].double()  # sums in single precision would be less exact than the ridge
        moment += some_rows.T @ some_rows / min(1.0, share)
    return moment / len(chosen)


def _whitening(x: Tensor, jacobians: Tensor, ridge: float = RIDGE) -> Tensor:
    """L with LLᵀ = √(tr A tr C) [A / tr A + C / tr C + LEVEL x̄x̄ᵀ], C the covariance of x: the scale makes species comparable."""
    x = x.double()
    mean, covariance = x.mean(0), torch.cov(x.T)
    sizes = jacobians.trace(), covariance.trace().clamp_min(1e-12)
    moment = jacobians / sizes[0] + covariance / sizes[1] + LEVEL * torch.outer(mean, mean)
    moment.diagonal().add_(ridge * moment.trace() / len(mean))
    return (sizes[0] * sizes[1]) ** 0.25 * torch.linalg.cholesky(moment)


class _Comparison:
    """Predictions for some structures by means of fewer directions, against the exact ones."""

    def __init__(
        self, terms: Sequence[EnergyTerm], directions: Directions, structures: Structures, noise: dict[str, float]
    ) -> None:
        self.structures, self.directions, self.noise = structures, directions, noise
        self.views = [term.environments(structures) for term in terms]
        self.exact = [
            {z: d.exact(view.environments.features[structures.species == z]) for z, d in of.items()}
            for view, of in zip(self.views, directions, strict=True)
        ]
        self.kinds = [kind for kind in UNITS if kind in noise]
        ranked = [
            (value, k, z) for k, of in enumerate(directions) for z, d in of.items() for value in d.importance.tolist()
        ]
        self.order = [(k, z) for _, k, z in sorted(ranked, key=lambda entry: -entry[0])]

    def cheapest(self) -> list[dict[int, Form]]:
        """Forms of the smallest rank that changes predictions little enough, of the species that they make cheaper."""
        low, high = 0, len(self.order)  # all directions change nothing
        while low < high:
            middle = (low + high) // 2
            changes = self.changes(self._forms(middle))
            enough = all(
                changes[f"worst_change_of_{k}_{UNITS[k]}"] <= SHARE_OF_NOISE * self.noise[k] for k in self.kinds
            )
            low, high = (low, middle) if enough else (middle + 1, high)
        return [
            {z: form for z, form in of.items() if form.rank < self.directions[k][z].cheap}
            for k, of in enumerate(self._forms(low))
        ]

    def _forms(self, total: int) -> list[dict[int, Form]]:
        kept = self.order[:total]
        return [
            {z: d.leading(max(1, kept.count((k, z)))) for z, d in of.items()} for k, of in enumerate(self.directions)
        ]

    def changes(self, forms: Sequence[dict[int, Form]]) -> dict[str, float]:
        """Root mean square change by kind, and the largest of a force component."""
        s = self.structures
        energies, forces = s.positions.new_zeros(s.n_atoms), s.positions.new_zeros(s.n_atoms, 3)
        virials = s.positions.new_zeros(len(s), 3, 3)
        for view, exact, of in zip(self.views, self.exact, forms, strict=True):
            x = view.environments.features
            slopes = torch.zeros_like(x)
            for z, form in of.items():
                mine = (s.species == z).nonzero()[:, 0]
                energy, slope = form(x[mine])
                energies[mine] += energy - exact[z][0]
                slopes[mine] = slope - exact[z][1]
            gradients = view.environments.pull_back(slopes)
            vectors = view.surroundings.vectors
            neighbors.add_pair_gradients(s, view.neighbors, vectors, gradients, forces, virials)
        found = neighbors.prediction_from_sums(s, energies, forces, virials)
        of_atoms = forces.square().mean(1)
        squares = {
            "forces": of_atoms.new_zeros(len(s)).index_add_(0, s.structure_of_atom, of_atoms) / s.counts,
            "energies": (found.energies / s.counts).square(),
            "stresses": found.stresses.square().mean((1, 2)).nan_to_num(0.0),
        }
        out = {}
        for kind in self.kinds:
            out[f"change_of_{kind}_{UNITS[kind]}"] = float(squares[kind].mean().sqrt())
            out[f"worst_change_of_{kind}_{UNITS[kind]}"] = float(squares[kind].max().sqrt())
        return out | {"largest_change_of_forces_eV_per_A": float(forces.abs().max())}
