"""Covariances of predictions: of energies, forces and stresses with each other, and of linear functionals of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gpmlp.core import errors, units
from gpmlp.core.quantities import KINDS, Prediction
from gpmlp.core.structures import Structures
from gpmlp.gp.covariances import CovarianceRows
from gpmlp.potential.baselines import ZBL
from gpmlp.potential.samples import SampledPotential, sample_spread
from gpmlp.uncertainty.mahalanobis import Mahalanobis


class CorrelatedPotential(SampledPotential, Protocol):
    """What covariances need of a Potential."""

    @property
    def novelty(self) -> Mahalanobis | None: ...

    def __call__(self, structures: Structures, *, novelty: bool = False) -> Prediction: ...

    def energy_deviations(self, structures: Structures) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Functional:
    """Linear functionals of energies, forces and stresses.

    Attributes:
        value: () or (functionals,) posterior mean.
        covariance: () or (functionals, functionals).
    """

    value: Tensor
    covariance: Tensor

    @property
    def std(self) -> Tensor:
        """() or (functionals,) standard deviations."""
        variance = self.covariance.diagonal() if self.covariance.dim() else self.covariance
        return variance.clamp_min(0).sqrt()


def functional(
    potential: CorrelatedPotential, structures: Structures, weights: Mapping[str, Tensor], calibrated: bool
) -> Functional:
    """Value and covariance of Σ of weights times energies, forces and stresses; see Potential.functional."""
    shapes = {
        "energies": (len(structures),), "forces": (structures.n_atoms, 3), "stresses": (len(structures), 3, 3),
    }  # fmt: skip
    if not weights:
        raise errors.UserError(
            "`weights` of a functional must hold some of 'energies', 'forces', 'stresses'; got none."
        )
    like = structures.positions.new_zeros(0, dtype=torch.float64)
    given: dict[str, Tensor] = {}
    for kind, values in weights.items():
        errors.check_choice("kind of observation", kind, KINDS)
        given[kind] = torch.as_tensor(values).to(like)
        leading, expected = given[kind].dim() - len(shapes[kind]), shapes[kind]
        if leading not in (0, 1) or given[kind].shape[leading:] != expected:
            raise errors.UserError(
                f"`weights` of {kind} must be of shape {expected}, or with one more axis (functionals) in front; "
                f"got {tuple(given[kind].shape)}."
            )
    ranks = {kind: values.dim() - len(shapes[kind]) for kind, values in given.items()}
    stacked = {kind: values if ranks[kind] else values[None] for kind, values in given.items()}
    if len({len(values) for values in stacked.values()}) > 1 or len({*ranks.values()}) > 1:
        raise errors.UserError("`weights` of all kinds must be for the same number of functionals.")
    mean = potential(structures, novelty=calibrated and potential.novelty is not None)
    value = sum((w.flatten(1) @ getattr(mean, kind).to(w).nan_to_num().flatten() for kind, w in stacked.items()), 0)
    kinds = [kind for kind in KINDS if kind in stacked]
    rows = torch.cat([_by_entry(kind, stacked[kind]) for kind in kinds], dim=1)
    found = covariance(potential, structures, calibrated, kinds, rows).to(like)
    assert isinstance(value, Tensor), "there are weights"
    if mean.novelty is not None:
        wider = potential.calibration.functional_widening(_largest_novelty(structures, mean.novelty.to(like), stacked))
        found *= wider * wider[:, None]
    if calibrated:
        repulsion = _nuclear_repulsion(potential, structures, stacked)
        found += repulsion * repulsion[:, None]
    return Functional(value, found) if ranks[kinds[0]] else Functional(value[0], found[0, 0])


def _nuclear_repulsion(potential: CorrelatedPotential, structures: Structures, weights: Mapping[str, Tensor]) -> Tensor:
    """(functionals,) what ZBL adds: it begins where the data end, so that none of it was learned, and all of it may be wrong."""
    here, total = potential.to_own_device(structures), next(iter(weights.values())).new_zeros(())
    for baseline in potential.baselines:
        if isinstance(baseline, ZBL):
            added = baseline(here)
            total = total + sum(
                w.flatten(1) @ getattr(added, k).to(w).nan_to_num().flatten() for k, w in weights.items()
            )
    return total.expand(len(next(iter(weights.values()))))


def _largest_novelty(structures: Structures, novelty: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """(functionals,) largest novelty of the structures that a functional depends on, 0 if there are none."""
    owner, n = structures.structure_of_atom, len(structures)
    largest = novelty.new_zeros(n).scatter_reduce(0, owner, novelty, "amax")
    sizes = {
        kind: values.abs().flatten(2).sum(2) if values.dim() > 2 else values.abs() for kind, values in weights.items()
    }
    if "forces" in sizes:
        sizes["forces"] = sizes["forces"].new_zeros(len(sizes["forces"]), n).index_add(1, owner, sizes["forces"])
    return torch.where(torch.stack(list(sizes.values())).sum(0) > 0, largest, 0.0).amax(1)


def _by_entry(kind: str, weights: Tensor) -> Tensor:
    """(functionals, entries) weights of the entries of a kind, of stresses of their Voigt components."""
    if kind != "stresses":
        return weights.flatten(1)
    pairs = [(weights[..., a, b] + (weights[..., b, a] if a != b else 0)) for a, b in units.VOIGT]
    return torch.stack(pairs, dim=-1).flatten(1)


def covariance(
    potential: CorrelatedPotential,
    structures: Structures,
    calibrated: bool,
    kinds: Sequence[str] = KINDS,
    weights: Tensor | None = None,
) -> Tensor:
    """Covariance of the entries of some kinds, or of sums of them with weights (sums, entries); see Potential.covariance."""
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    for kind in kinds:
        errors.check_choice("kind of observation", kind, KINDS)
    if not kinds:
        raise errors.UserError("`kinds` of a covariance must be some of 'energies', 'forces', 'stresses'; got none.")
    kinds = [kind for kind in KINDS if kind in kinds]
    potential.check_species(structures)
    model, here = potential.variance_model(), potential.to_own_device(structures)
    environments = [term.environments(here) for term in potential.terms]
    rows = model.whitened(model.covariance_rows(here, environments, "forces" in kinds, "stresses" in kinds))
    if potential.charges is not None:
        rows = potential.charges.with_charges(here, rows)

    def of(part: CovarianceRows) -> Tensor:
        values = torch.cat([getattr(part, kind) for kind in kinds])
        return values if weights is None else weights.to(values) @ values

    b, (scale, shifts) = of(rows.b), sample_spread(potential) if calibrated else (None, None)
    if scale is None:
        joint = model.unexplained(here, environments, of(rows.a), kinds, weights) + b @ b.T
    else:
        joint = scale**2 * b @ b.T
    if shifts is not None:
        shifted = b @ shifts.T
        joint += shifted @ shifted.T
    if "energies" in kinds:
        deviations = potential.energy_deviations(here).to(joint)
        deviations = deviations if weights is None else weights[:, : len(here)].to(joint) @ deviations
        n = len(deviations)
        joint[:n, :n] += deviations @ deviations.T
    return joint.to(device=structures.positions.device)
