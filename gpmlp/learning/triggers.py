"""Criteria turn a prediction into a decision: go on, ask for a label, or halt; pure functions of what was predicted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import ase.data
import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import gammaincc
from torch import Tensor

from gpmlp.core import errors, neighbors
from gpmlp.core.neighbors import Neighbors
from gpmlp.core.quantities import Prediction
from gpmlp.core.structures import Structures
from gpmlp.core.units import BOLTZMANN
from gpmlp.learning.recipe import GuardsRecipe, TriggerRecipe
from gpmlp.uncertainty.calibration import Calibration

Action = Literal["continue", "label", "halt"]
SURE = 1e-30  # eV^2/A^2; no force varies by less, unless symmetry makes it zero
NAMED = 10  # atoms that a decision names at most


@dataclass(frozen=True)
class Decision:
    """What to do with one structure.

    Attributes:
        atoms: those for whose sake, most important first.
        reason: in words, with numbers.
        severity: how far over the limit (1 = at it); below 1 where the run goes on, unless a label was withheld.
    """

    action: Action
    atoms: tuple[int, ...] = ()
    reason: str = ""
    severity: float = 0.0

    def withheld(self) -> Decision:
        """The same where no label may be asked for: the run goes on, and how far over the limit it is remains known."""
        return replace(self, action="continue") if self.action == "label" else self


@dataclass(frozen=True)
class Limits:
    """Limits as numbers; None = not looked at.

    Attributes:
        force: tolerated error of the force on an atom (its norm), eV/A; probability: with which it may be exceeded somewhere.
        local_energy: standard deviation, eV. novelty: in units of the trust region's radius.
        halt: factor on `force` at which the run has to stop.
    """

    force: float | None
    probability: float
    local_energy: float | None
    novelty: float | None
    halt: float
    guards: GuardsRecipe

    def times(self, factor: float) -> Limits:
        """Looser by a factor, as hysteresis asks for; what halts a run stays where it is."""
        force, local, novelty = (
            None if v is None else v * factor for v in (self.force, self.local_energy, self.novelty)
        )
        return Limits(force, self.probability, local, novelty, max(1.0, self.halt / factor), self.guards)


@dataclass(frozen=True)
class Before:
    """What guards compare with: the energy a step ago (eV; None = unknown), target and present kinetic temperature (K).

    freedom: number of velocity components that temperature is the mean of; None: three for each atom. pairs: of the structure, within
    the cutoff of the model, if they are known already.
    """

    energy: float | None
    target_K: float
    temperature_K: float
    freedom: int | None = None
    pairs: Neighbors | None = None


def exceedance(forces_covariance: Tensor, tolerance: float) -> np.ndarray:
    """Probability that the error of the force on each atom is longer than the tolerance (eV/A), (atoms,).

    For a normal error with covariance C the squared norm is nearly χ² of n = (tr C)² / tr C² degrees of freedom times tr C / n
    (Satterthwaite, Biometrics Bull. 2, 110 (1946)); exact where C is isotropic.
    """
    return _exceedance(*_moments(forces_covariance), tolerance)


def risk(forces_covariance: Tensor, tolerance: float) -> float:
    """Probability that the force error of some atom exceeds the tolerance, were errors of atoms independent."""
    return _any(exceedance(forces_covariance, tolerance))


def bound(forces_covariance: Tensor, probability: float) -> float:
    """Tolerance (eV/A) at which `risk` is the probability: what the largest force error stays below, with that exception."""
    trace, freedom = _moments(forces_covariance)
    if not np.isfinite(trace).all():
        return float("inf")
    if not trace.max(initial=0.0) > SURE:
        return 0.0
    top = float(trace.max()) ** 0.5

    def excess(log: float) -> float:
        return _any(_exceedance(trace, freedom, np.exp(log))) - probability

    # the largest norm is no less than 1e-3 and no more than 20 standard deviations of the worst atom
    low, high = np.log(1e-3 * top), np.log(20 * top)
    return float(np.exp(brentq(excess, low, high, xtol=1e-4)))


def _moments(forces_covariance: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """tr C of each atom, and its degrees of freedom."""
    c = forces_covariance.cpu().double().numpy()
    trace, squares = np.trace(c, axis1=1, axis2=2).clip(1e-300), (c * c).sum((1, 2)).clip(1e-300)
    return trace, (trace**2 / squares).clip(1.0, 3.0)


def _exceedance(trace: np.ndarray, freedom: np.ndarray, tolerance: float) -> np.ndarray:
    return gammaincc(0.5 * freedom, 0.5 * tolerance**2 * freedom / trace)


def _any(each: np.ndarray) -> float:
    return float(-np.expm1(np.log1p(-each.clip(0, 1 - 1e-15)).sum()))


def criteria(prediction: Prediction, structure: Structures, limits: Limits, before: Before | None = None) -> Decision:
    """Decide about one structure from its prediction, calibrated and with as many variances as are to be judged.

    What breaks a guard comes first, then what halts, then what asks, worst first.
    """
    broken = guard(prediction, structure, limits.guards, before)
    if broken is not None:
        return broken
    found = [
        d for d in (_forces(prediction, limits), _local(prediction, limits), _novel(prediction, structure, limits)) if d
    ]
    if not found:
        return Decision("continue")
    worst = max(found, key=lambda d: (d.action == "halt", d.action == "label", d.severity))
    reasons = "; ".join(d.reason for d in found if d.action == worst.action)
    return Decision(worst.action, worst.atoms, "" if worst.action == "continue" else reasons, worst.severity)


def _forces(prediction: Prediction, limits: Limits) -> Decision | None:
    variance = prediction.forces_covariance
    if variance is None or limits.force is None:
        return None
    total = variance.total
    largest = bound(total, limits.probability)
    severity = largest / limits.force
    order = total.diagonal(dim1=1, dim2=2).sum(1).argsort(descending=True)[:NAMED].tolist()
    action: Action = "continue" if severity <= 1 else "halt" if severity > limits.halt else "label"
    text = f"force error of atom {order[0]} may reach {largest:.3g} eV/A (limit {limits.force:.3g})"
    return Decision(action, tuple(order), text, severity)


def _local(prediction: Prediction, limits: Limits) -> Decision | None:
    variance = prediction.atom_energies_variance
    if variance is None or limits.local_energy is None:
        return None
    std = variance.total.clamp_min(0).sqrt()
    severity, order = _severity(std, limits.local_energy)
    text = (
        f"local energy of atom {order[0]} is known to {float(std.max()):.3g} eV only (limit {limits.local_energy:.3g})"
    )
    return Decision("label" if severity > 1 else "continue", tuple(order), text, severity)


def _novel(prediction: Prediction, structure: Structures, limits: Limits) -> Decision | None:
    if prediction.novelty is None or limits.novelty is None:
        return None
    largest = float(prediction.novelty.max())
    severity, order = _severity(prediction.novelty, limits.novelty)
    what = f"{errors.chemical_symbol(int(structure.species[order[0]]))} atom {order[0]}"
    text = f"{what} lies at {largest:.3g} times the radius of the trust region (limit {limits.novelty:.3g})"
    return Decision("label" if severity > 1 else "continue", tuple(order), text, severity)


def _severity(values: Tensor, limit: float) -> tuple[float, list[int]]:
    """The largest in units of the limit, and the atoms it is of, worst first; what is unknown counts as infinite."""
    values = values.nan_to_num(nan=float("inf"), posinf=float("inf"))
    return float(values.max()) / limit, values.argsort(descending=True)[:NAMED].tolist()


def guard(
    prediction: Prediction, structure: Structures, guards: GuardsRecipe, before: Before | None = None
) -> Decision | None:
    """A decision to halt where the structure or its prediction is no physics; None where it is."""
    if not (prediction.energies.isfinite().all() and prediction.forces.isfinite().all()):
        return Decision("halt", (), "the prediction is not finite", float("inf"))
    close = too_close(structure, guards.distance, before and before.pairs)
    if close is not None:
        i, j, r, least = close
        pair = (
            f"{errors.chemical_symbol(int(structure.species[i]))}-{errors.chemical_symbol(int(structure.species[j]))}"
        )
        text = f"{pair} distance {r:.2f} A of atoms {i} and {j} (guard {least:.2f})"
        return Decision("halt", (i, j), text, least / max(r, 1e-6))
    if before is None:
        return None
    # a kinetic temperature scatters by sqrt(2 / freedom): six of these are allowed for
    freedom = max(1, 3 * structure.n_atoms if before.freedom is None else before.freedom)
    hottest = guards.temperature * (1 + 6 * (2 / freedom) ** 0.5) * max(before.target_K, 50.0)
    if not before.temperature_K < hottest:
        text = f"temperature {before.temperature_K:.0f} K at a target of {before.target_K:.0f} K (guard {hottest:.0f})"
        return Decision("halt", (), text, before.temperature_K / hottest)
    if before.energy is not None:
        jump = abs(float(prediction.energies[0]) - before.energy) / structure.n_atoms
        most = guards.energy_eV_per_atom + 3 * BOLTZMANN * before.target_K
        if not jump < most:
            return Decision(
                "halt", (), f"energy changed by {jump:.3g} eV/atom in a step (guard {most:.3g})", jump / most
            )
    return None


def too_close(
    structure: Structures, share: float, pairs: Neighbors | None = None
) -> tuple[int, int, float, float] | None:
    """The pair of atoms nearest in terms of their covalent radii, if nearer than that share of their sum: i, j, distance, guard (A).

    Args:
        pairs: of the structure, if they are known; those of a shorter cutoff than is needed will not do.
    """
    radii = torch.as_tensor(ase.data.covalent_radii, dtype=structure.positions.dtype)[structure.species.cpu()]
    reach = 2 * share * float(radii.max())
    if pairs is None or pairs.cutoff < reach:
        pairs = neighbors.find_neighbors(structure, reach)
    r = pairs.vectors(structure).norm(dim=1)
    near = (r < reach).nonzero()[:, 0]
    if not len(near):
        return None
    r, i, j = (part[near].cpu() for part in (r, pairs.centers, pairs.neighbors))
    least = share * (radii[i] + radii[j])
    worst = int((r / least).argmin())
    if r[worst] >= least[worst]:
        return None
    return int(i[worst]), int(j[worst]), float(r[worst]), float(least[worst])


def limits_of(
    trigger: TriggerRecipe, force_rms: float, n_atoms: int, noise: dict[str, float], calibration: Calibration
) -> Limits:
    """Numbers for what the recipe leaves to the data.

    Args:
        force_rms: root mean square of the labelled force components, eV/A.
        n_atoms: of a structure.
        noise: standard deviation of new labels by kind; with `calibration` what is left of the error however much is learned.
    """
    force = trigger.force
    if force in ("auto", "noise"):
        share = trigger.share if force == "auto" else 0.0
        learned = calibration.kinds.get("forces")
        weight = learned.scale * (learned.weights[2] if learned.weights else 1.0) ** 0.5 if learned else 1.0
        floor = noise.get("forces", 0.0) * weight
        eye = (floor**2 * torch.eye(3, dtype=torch.float64)).expand(n_atoms, 3, 3)
        force = max(share * 3**0.5 * force_rms, trigger.noise * bound(eye, trigger.probability), 1e-4)
    return Limits(force, trigger.probability, trigger.local_energy, trigger.novelty, trigger.halt, trigger.guards)
