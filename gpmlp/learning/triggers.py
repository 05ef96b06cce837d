"""The trigger turns a prediction into a decision: go on, ask for a label, or halt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import ase.data
import numpy as np
import torch
from numpy.polynomial.hermite_e import hermegauss
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
HORIZON = (
    1000  # latest steps of all walkers that say how many will be missed: of steps long ago another model knew less
)
# errors of a frame of n atoms are larger or smaller together than they are foreseen: standard deviation of the logarithm of that factor,
# times n^(1/3); it is .3 in ethanol and .2 in 32 atoms of aluminium (decision 015)
COMMON = 0.62
NODES, WEIGHTS = hermegauss(7)


@dataclass(frozen=True)
class TriggerDecision:
    """What to do with one structure.

    Attributes:
        atoms: those for whose sake, most important first.
        reason: in words, with numbers; causes: of 'force', 'local energy', 'novelty', 'guard'.
        severity: the largest ratio to a limit; below 1 where the run goes on, unless a label was withheld.
        exceedance: probability that the error of some force is beyond its limit (`frame_exceedance`); NaN = unknown.
    """

    action: Action
    atoms: tuple[int, ...] = ()
    reason: str = ""
    severity: float = 0.0
    causes: tuple[str, ...] = ()
    exceedance: float = np.nan

    def withheld(self) -> TriggerDecision:
        """The same where no label may be asked for: the run goes on, with the severity as it is."""
        return replace(self, action="continue") if self.action == "label" else self


@dataclass(frozen=True)
class TriggerLimits:
    """Limits as numbers; None = there is none.

    Attributes:
        force: tolerated error of the force on an atom (its norm), eV/A; probability: with which it may be exceeded somewhere.
        local_energy: standard deviation, eV. novelty: in units of the trust region's radius.
        halt: factor on `force` at which the run has to stop.
        spread: factor on the standard deviations of forces with which errors of the labels asked for so far agree.
        ratio: of errors beyond the limit to those foreseen, in labels (`OnlineModel.exceedance_ratio`).
        raised: factor by which `force` is above the limit of the recipe for now; probabilities of exceedance are of that of the recipe.
    """

    force: float | None
    probability: float
    local_energy: float | None
    novelty: float | None
    halt: float
    guards: GuardsRecipe
    spread: float = 1.0
    ratio: float = 1.0
    raised: float = 1.0

    def times(self, factor: float) -> TriggerLimits:
        """Looser by a factor, as hysteresis asks for; what halts a run stays where it is."""
        force, local, novelty = (
            None if v is None else v * factor for v in (self.force, self.local_energy, self.novelty)
        )
        halt = max(1.0, self.halt / factor)
        raised = self.raised * factor
        return replace(self, force=force, local_energy=local, novelty=novelty, halt=halt, raised=raised)


@dataclass(frozen=True)
class StepContext:
    """What guards compare a prediction with: the energy a step ago (eV; None = unknown), target and present kinetic temperature (K).

    freedom: number of velocity components that temperature is the mean of; None: three for each atom. pairs: neighbour list of
    the structure within the cutoff of the model, if there is one already.
    """

    energy: float | None
    target_K: float
    temperature_K: float
    freedom: int | None = None
    pairs: Neighbors | None = None


def exceedance_probability(trace: np.ndarray, freedom: np.ndarray, tolerance: float | np.ndarray) -> np.ndarray:
    """P_i = P(χ²_n > n t² / tr C_i), (atoms,): the probability that the error of the force on each atom is longer than t (eV/A).

    For a normal error with covariance C the squared norm is nearly χ² of n = (tr C)² / tr C² degrees of freedom times tr C / n
    (Satterthwaite, Biometrics Bull. 2, 110 (1946)); exact where C is isotropic.

    Args:
        trace, freedom: tr C and n of each atom (`covariance_moments`).
    """
    return gammaincc(0.5 * freedom, 0.5 * tolerance**2 * freedom / trace)


def covariance_moments(forces_covariance: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """tr C and (tr C)² / tr C², of each atom."""
    c = forces_covariance.cpu().double().numpy()
    trace, squares = np.trace(c, axis1=1, axis2=2).clip(1e-300), (c * c).sum((1, 2)).clip(1e-300)
    return trace, (trace**2 / squares).clip(1.0, 3.0)


def frame_exceedance(forces_covariance: Tensor, tolerance: float, common: float = COMMON) -> float:
    """E_f[1 - Π_i (1 - P_i(t / f))], the probability that some atom's force error is longer than t (eV/A).

    Errors of a frame of n atoms share a factor f, ln f ~ N(0, common² / n^(2/3)), as the size of standard deviations is known no better;
    they are independent otherwise.
    """
    trace, freedom = covariance_moments(forces_covariance)
    if not np.isfinite(trace).all():
        return 1.0
    scaled = tolerance * np.exp(-common / max(len(trace), 1) ** (1 / 3) * NODES)[:, None]
    each = exceedance_probability(trace, freedom, scaled).clip(0, 1 - 1e-15)
    return float(-np.expm1(np.log1p(-each).sum(1)) @ WEIGHTS / WEIGHTS.sum())


def asking_probability(largest: np.ndarray, missed: np.ndarray, allowed: float, trigger: TriggerRecipe) -> float:
    """The probability of exceeding the limit above which a label is asked for: `likely`, or less where strides that may pass below would
    have an error beyond the limit in too many steps.

        p* = sup{p ≤ likely: Σ_k m_k [P_k ≤ p] ≤ allowed}, but not less than `probability`

    Args:
        largest: (strides,) P_k, largest probability (`frame_exceedance`) in each of the latest strides, in any order, NaN = not known.
        missed: (strides,) m_k, expected number of steps beyond the limit in it; allowed: number of steps.
    """
    known = np.isfinite(largest)
    order = largest[known].argsort()
    least, most = trigger.probability, max(trigger.likely, trigger.probability)
    beyond = largest[known][order][missed[known][order].cumsum() > allowed]
    return float(beyond.min(initial=most).clip(least, most))


def force_error_bound(forces_covariance: Tensor, probability: float, common: float = COMMON) -> float:
    """Tolerance t (eV/A) with `frame_exceedance` = probability."""
    trace, freedom = covariance_moments(forces_covariance)
    if not np.isfinite(trace).all():
        return float("inf")
    if not trace.max(initial=0.0) > SURE:
        return 0.0
    top = float(trace.max()) ** 0.5

    # the largest norm is no less than 1e-3 and no more than 50 standard deviations of the worst atom
    low, high = np.log(1e-3 * top), np.log(50 * top)

    def excess(log: float) -> float:
        return frame_exceedance(forces_covariance, np.exp(log), common) - probability

    return float(np.exp(brentq(excess, low, high, xtol=1e-4)))


def trigger_decision(
    prediction: Prediction, structure: Structures, limits: TriggerLimits, context: StepContext | None = None
) -> TriggerDecision:
    """Decide about one structure from its prediction, calibrated and with as many variances as there are limits for.

    What breaks a guard comes first, then what halts, then what asks, worst first.
    """
    broken = broken_guard(prediction, structure, limits.guards, context)
    if broken is not None:
        return broken
    every = (_forces(prediction, limits), _local_energies(prediction, limits), _novelty(prediction, structure, limits))
    decisions = [d for d in every if d]
    if not decisions:
        return TriggerDecision("continue")
    worst = max(decisions, key=lambda d: (d.action == "halt", d.action == "label", d.severity))
    worst = replace(worst, exceedance=every[0].exceedance if every[0] else np.nan)
    if worst.action == "continue":
        return replace(worst, reason="", causes=())
    same = [d for d in decisions if d.action == worst.action]
    return replace(worst, reason="; ".join(d.reason for d in same), causes=tuple(c for d in same for c in d.causes))


def _forces(prediction: Prediction, limits: TriggerLimits) -> TriggerDecision | None:
    variance = prediction.forces_covariance
    if variance is None or limits.force is None:
        return None
    total = variance.total
    largest = limits.spread * force_error_bound(total, limits.probability)
    severity = largest / limits.force
    order = total.diagonal(dim1=1, dim2=2).sum(1).argsort(descending=True)[:NAMED].tolist()
    action: Action = "continue" if severity <= 1 else "halt" if severity > limits.halt else "label"
    text = f"force error of atom {order[0]} may reach {largest:.3g} eV/A (limit {limits.force:.3g})"
    exceedance = frame_exceedance(total, limits.force / (limits.raised * limits.spread))
    return TriggerDecision(action, tuple(order), text, severity, ("force",), exceedance)


def _local_energies(prediction: Prediction, limits: TriggerLimits) -> TriggerDecision | None:
    variance = prediction.atom_energies_variance
    if variance is None or limits.local_energy is None:
        return None
    std, limit = variance.total.clamp_min(0).sqrt(), limits.local_energy
    text = f"is known to {float(std.max()):.3g} eV only (limit {limit:.3g})"
    return _by_atom(std, limit, lambda atom: f"local energy of atom {atom} {text}", "local energy")


def _novelty(prediction: Prediction, structure: Structures, limits: TriggerLimits) -> TriggerDecision | None:
    novelty, limit = prediction.novelty, limits.novelty
    if novelty is None or limit is None:
        return None
    text = f"lies at {float(novelty.max()):.3g} times the radius of the trust region (limit {limit:.3g})"
    return _by_atom(
        novelty,
        limit,
        lambda atom: f"{errors.chemical_symbol(int(structure.species[atom]))} atom {atom} {text}",
        "novelty",
    )


def _by_atom(values: Tensor, limit: float, text: Callable[[int], str], cause: str) -> TriggerDecision:
    """By the largest value over its limit; NaN counts as infinite."""
    values = values.nan_to_num(nan=float("inf"), posinf=float("inf"))
    severity, order = float(values.max()) / limit, values.argsort(descending=True)[:NAMED].tolist()
    action: Action = "label" if severity > 1 else "continue"
    return TriggerDecision(action, tuple(order), text(order[0]), severity, (cause,))


def broken_guard(
    prediction: Prediction, structure: Structures, guards: GuardsRecipe, context: StepContext | None = None
) -> TriggerDecision | None:
    """A decision to halt where the structure or its prediction is unphysical; None where it is not."""
    if not (prediction.energies.isfinite().all() and prediction.forces.isfinite().all()):
        return guard_decision("the prediction is not finite", float("inf"))
    close = too_close(structure, guards.distance, context.pairs if context else None)
    if close is not None:
        i, j, r, least = close
        pair = (
            f"{errors.chemical_symbol(int(structure.species[i]))}-{errors.chemical_symbol(int(structure.species[j]))}"
        )
        text = f"{pair} distance {r:.2f} A of atoms {i} and {j} (guard {least:.2f})"
        return guard_decision(text, least / max(r, 1e-6), (i, j))
    if context is None:
        return None
    # a kinetic temperature scatters by sqrt(2 / freedom): six of these are allowed for
    freedom = max(1, 3 * structure.n_atoms if context.freedom is None else context.freedom)
    kinetic, target = context.temperature_K, context.target_K
    hottest = guards.temperature * (1 + 6 * (2 / freedom) ** 0.5) * max(target, 50.0)
    if not kinetic < hottest:
        text = f"temperature {kinetic:.0f} K at a target of {target:.0f} K (guard {hottest:.0f})"
        return guard_decision(text, kinetic / hottest)
    if context.energy is not None:
        jump = abs(float(prediction.energies[0]) - context.energy) / structure.n_atoms
        most = guards.energy_eV_per_atom + 3 * BOLTZMANN * target
        if not jump < most:
            return guard_decision(f"energy changed by {jump:.3g} eV/atom in a step (guard {most:.3g})", jump / most)
    return None


def guard_decision(reason: str, severity: float, atoms: tuple[int, ...] = ()) -> TriggerDecision:
    """To halt where the dynamics is unphysical."""
    return TriggerDecision("halt", atoms, reason, severity, ("guard",))


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


def trigger_limits(
    trigger: TriggerRecipe, force_rms: float, n_atoms: int, noise: dict[str, float], calibration: Calibration
) -> TriggerLimits:
    """The limits of the recipe, where it leaves them to the data from forces and noises.

    Args:
        force_rms: root mean square of the force components, eV/A; n_atoms: of a structure.
        noise: standard deviation of new labels by kind; with `calibration` the error that remains however many labels there are.
    """
    force = trigger.force
    if isinstance(force, str):
        share = trigger.share if force == "auto" else 0.0
        learned = calibration.kinds.get("forces")
        weight = learned.scale * (learned.weights[2] if learned.weights else 1.0) ** 0.5 if learned else 1.0
        floor = noise.get("forces", 0.0) * weight
        eye = (floor**2 * torch.eye(3, dtype=torch.float64)).expand(n_atoms, 3, 3)
        remaining = force_error_bound(eye, trigger.probability, common=0.0)
        force = max(share * 3**0.5 * force_rms, trigger.noise * remaining, 1e-4)
    return TriggerLimits(
        force, trigger.probability, trigger.local_energy, trigger.novelty, trigger.halt, trigger.guards
    )
