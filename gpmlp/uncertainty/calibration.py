"""Calibration of standard deviations on held-out errors: a scale, weights of the parts of the variance, conformal intervals.

For each kind of observation: one factor on the standard deviation (maximum likelihood), if wanted weights of the parts of the variance
(`fit_variance_weights`), and split-conformal intervals whose half-width is a multiple of the calibrated standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpmlp.core.errors import UserError, check_choice, check_shape
from gpmlp.core.quantities import KINDS, Prediction, Variance, json_value
from gpmlp.core.structures import Structures
from gpmlp.uncertainty.scores import gaussian_multiplier, known_errors, smallest_std

# local energies have no labels; of the forces, which are their slopes, there are most
CALIBRATED_AS = {
    "energies_variance": "energies",
    "atom_energies_variance": "forces",
    "forces_covariance": "forces",
    "sampled_forces_covariance": "forces",
    "stresses_covariance": "stresses",
}

LEVELS = (0.5, 0.68, 0.8, 0.9, 0.95, 0.99)
MEMBERS = 30  # a group with fewer, or with fewer than 3/(1 − p), has no multiplier of its own at level p
TERTILES = (1 / 3, 2 / 3)
PRIOR = 2.0  # standard deviation of log w about 0: weights of 7 or 1/7 cost half a nat
WEIGHTS = (1e-8, 1e8)  # bounds of the weights
EVERYTHING = "all"


@dataclass(frozen=True)
class KindCalibration:
    """Calibration of one kind of observation.

    Attributes:
        scale: factor on the predicted std.
        n: number of held-out errors it was learned from; 0 = nothing learned.
        multipliers: by group, half-widths in calibrated std at each of LEVELS. Groups are 'all', '*/bin' and 'species/bin', bins
            counting up from small to large std; a group that was too small is absent.
        counts: by group, number of held-out errors.
        edges: of the bins, calibrated std, unit of the errors; none = one bin.
        floor: smallest calibrated std, unit of the errors: smaller ones count as this in intervals.
        weights: of the parts of the variance (`fit_variance_weights`) from which the std was formed; empty = 1 each.
    """

    scale: float
    n: int
    multipliers: dict[str, tuple[float, ...]]
    counts: dict[str, int] = field(default_factory=dict)
    edges: tuple[float, ...] = ()
    floor: float = 0.0
    weights: tuple[float, ...] = ()

    def widen_std(self, factor: float) -> KindCalibration:
        """With standard deviations larger by a factor, and unchanged intervals."""
        rows = {name: tuple(m / factor for m in row) for name, row in self.multipliers.items()}
        return replace(self.scale_by(factor), multipliers=rows)

    def scale_by(self, factor: float) -> KindCalibration:
        """With standard deviations and intervals larger by a factor."""
        edges = tuple(factor * e for e in self.edges)
        return replace(self, scale=factor * self.scale, edges=edges, floor=factor * self.floor)

    @staticmethod
    def identity() -> KindCalibration:
        """Scale 1 and Gaussian intervals: changes nothing."""
        return KindCalibration(1.0, 0, {EVERYTHING: tuple(gaussian_multiplier(p) for p in LEVELS)})

    @staticmethod
    def fit(
        errors: Tensor, std: Tensor, species: Tensor | None = None, weights: tuple[float, ...] = ()
    ) -> KindCalibration:
        """See Calibration.fit."""
        keep, e, s = known_errors(errors, std)
        if not len(e):
            return KindCalibration.identity()
        floor = smallest_std(s, e)
        s = s.clamp_min(floor)
        # argmax over s of Σ log N(e; 0, s²σ²)
        scale = max((e / s).square().mean().sqrt().item(), 1e-12)  # errors that are all 0 must leave a std
        s = scale * s
        edges = _edges(s)
        labels = None
        if species is not None:
            check_shape("species", species, (len(errors),))
            labels = species[keep].cpu()
        multipliers, counts = _table((e.abs() / s).cpu(), _bins(s, edges).cpu(), labels, len(edges) + 1)
        return KindCalibration(scale, len(e), multipliers, counts, edges, scale * floor, weights)

    def variance(self, parts: Tensor) -> Tensor:
        """Calibrated variance (n,) of parts of variance (n, parts): scale² Σ_k w_k part_k."""
        if not self.weights:
            return self.scale**2 * parts.sum(1)
        check_shape("parts", parts, ("n", len(self.weights)))
        return self.scale**2 * (parts @ torch.tensor(self.weights).to(parts))

    def half_width(self, std: Tensor, level: float, species: Tensor | None = None) -> Tensor:
        """(n,) q_p max(σ, floor) = half-width of the interval at level p; see Calibration.half_width."""
        if not 0 < level <= LEVELS[-1]:
            raise UserError(f"`level` must be above 0 and at most {LEVELS[-1]}, as 0.9 for 90 %; got {level}.")
        check_shape("std", std, ("n",))
        column = next(k for k, p in enumerate(LEVELS) if p >= level - 1e-9)
        bins = _bins(std, self.edges)
        factor = self._multipliers("*", column).to(std)[bins]
        if species is not None:
            check_shape("species", species, (len(std),))
            for z in sorted({name.split("/")[0] for name in self.multipliers} - {EVERYTHING, "*"}):
                factor = torch.where(species == int(z), self._multipliers(z, column).to(std)[bins], factor)
        return factor * std.clamp_min(self.floor)

    def _multipliers(self, species: str, column: int) -> Tensor:
        """(bins,) multipliers of a species, or else those of the bin, or else those of all."""
        rows, wider = self.multipliers, self.multipliers[EVERYTHING]
        row_of_bin = [rows.get(f"{species}/{b}", rows.get(f"*/{b}", wider)) for b in range(len(self.edges) + 1)]
        return torch.tensor([row[column] for row in row_of_bin], dtype=torch.float64)


@dataclass(frozen=True)
class Calibration:
    """Calibration of every kind of observation.

    Attributes:
        kinds: by 'energies', 'forces', 'stresses'.
        source: the held-out data, as plain data for the model file: number of structures, names, fingerprints, how they were held out.
        typical_novelty: median Mahalanobis novelty of the held-out environments: variances grow in proportion to what is beyond
            it; None = they do not.
        sample_scale: factor on the deviations of posterior samples from the mean, with which those of forces have the rms of the held-out
            errors (Imbalzano et al., J. Chem. Phys. 154, 074102 (2021), rescale committees likewise); None = not learned.
        unsampled: factor on what samples show of the variance of forces, the part due to the data, for the part due to the inducing set,
            which they do not show.
    """

    kinds: dict[str, KindCalibration]
    source: dict = field(default_factory=dict)
    typical_novelty: float | None = None
    sample_scale: float | None = None
    unsampled: float = 1.0

    @staticmethod
    def identity() -> Calibration:
        """Changes nothing; for when there is nothing to calibrate with."""
        return Calibration({kind: KindCalibration.identity() for kind in KINDS}, {})

    @staticmethod
    def fit(
        data: Mapping[str, tuple[Tensor, Tensor, Tensor | None]],
        source: dict | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Calibration:
        """Learn from held-out errors.

        The scale is sqrt(mean((e/σ)²)), the maximum of the Gaussian likelihood: it makes the mean square right, so that single large
        errors count much; the intervals do not depend on it.

        Intervals are split-conformal (Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World, 2005; Angelopoulos & Bates,
        arXiv:2107.07511, sections 1 and 2.3): with conformity scores |e|/(scale σ), the ⌈(n+1)p⌉-th smallest of n covers a new error
        that is exchangeable with them with probability at least p, whatever the distribution. If ⌈(n+1)p⌉ > n the largest score is
        taken and the guarantee is lost. It is an average over new data: not for each structure, and not for data of another kind
        than the held-out ones; atoms of one structure are less than exchangeable.
        Multipliers are by species × bin of calibrated std (tertiles of the held-out data), by bin where that group has fewer
        than max(30, 3/(1 − p)) members, by all where the bin has. They never fall with the level.

        Args:
            data: by kind, (errors, std, species): (n,) predicted − known with NaN = not known; (n,) predicted std; (n,) Z of the
                central atom, or None. Flatten the components of forces and stresses, and repeat the species.
            source: JSON-able, for the record.
            weights: by kind, weights of the parts of variance (`fit_variance_weights`) from which std was formed.

        Raises:
            UserError: an unknown kind, wrong shapes, a std that is negative or not finite where the error is known.
        """
        for kind in data:
            check_choice("kind of observation", kind, KINDS)
        kinds = {kind: KindCalibration.identity() for kind in KINDS}
        for kind, (errors, std, species) in data.items():
            used = tuple(float(w) for w in (weights or {}).get(kind, ()))
            kinds[kind] = KindCalibration.fit(errors, std, species, used)
        return Calibration(kinds, dict(source or {}))

    def with_amplitude(self, amplitude: float) -> Calibration:
        """The same calibrated variances where the first part is `amplitude` times as large as it was when this was learned."""
        kinds = {}
        for kind, learned in self.kinds.items():
            first, *others = learned.weights or (1.0, 1.0, 1.0)
            kinds[kind] = replace(learned, weights=(first / amplitude, *others)) if learned.n else learned
        return replace(self, kinds=kinds)

    def half_width(self, kind: str, std: Tensor, level: float, species: Tensor | None = None) -> Tensor:
        """Half-width (n,) of the interval about the prediction that holds a new error with probability `level`.

        Args:
            std: (n,) calibrated standard deviation; species: (n,) Z of the central atom, not needed.
            level: up to 0.99; between two of LEVELS the next higher is used.
        """
        check_choice("kind of observation", kind, self.kinds)
        return self.kinds[kind].half_width(std, level, species)

    def as_dict(self) -> dict:
        """Plain data for JSON; from_dict restores it exactly."""
        kinds = {kind: json_value(asdict(calibration)) for kind, calibration in self.kinds.items()}
        numbers = {"typical_novelty": self.typical_novelty, "spread": self.sample_scale, "unsampled": self.unsampled}
        return {"levels": list(LEVELS), "kinds": kinds, "source": self.source} | numbers

    @staticmethod
    def from_dict(plain: dict) -> Calibration:
        """Restore what as_dict gave; a UserError if its levels are not LEVELS."""
        if tuple(plain["levels"]) != LEVELS:
            raise UserError(f"Calibration on levels {plain['levels']}; this version of gpmlp has {LEVELS}.")
        kinds = {}
        for kind, entry in plain["kinds"].items():
            rows = {name: tuple(row) for name, row in entry["multipliers"].items()}
            tuples = {"multipliers": rows, "edges": tuple(entry["edges"]), "weights": tuple(entry["weights"])}
            kinds[kind] = KindCalibration(**(entry | tuples))
        numbers = plain.get("typical_novelty"), plain.get("spread"), plain.get("unsampled")
        if numbers[2] is None:  # a file of an older version: as much as makes samples as wide as errors are
            forces, spread = kinds["forces"], numbers[1]
            data = forces.scale**2 * (forces.weights[1] if forces.weights else 1.0)
            numbers = (*numbers[:2], max(1.0, spread**2 / data) if spread else 1.0)
        return Calibration(kinds, plain["source"], *numbers)


def _edges(std: Tensor) -> tuple[float, ...]:
    """Tertiles of std; none where it is constant."""
    ordered = std.sort().values
    edges = [ordered[int(q * len(std))].item() for q in TERTILES]
    return tuple(dict.fromkeys(edges)) if ordered[0] < ordered[-1] else ()


def _bins(std: Tensor, edges: tuple[float, ...]) -> Tensor:
    return torch.bucketize(std.contiguous(), torch.tensor(edges, dtype=torch.float64).to(std))


def _table(
    conformity: Tensor, bins: Tensor, species: Tensor | None, n_bins: int
) -> tuple[dict[str, tuple[float, ...]], dict[str, int]]:
    """Multipliers at LEVELS and number of members of each group that has enough; what it lacks comes from the wider group."""
    multipliers = {EVERYTHING: conformal_multipliers(conformity, None)}
    counts = {EVERYTHING: len(conformity)}

    def add(name: str, members: Tensor, wider: str) -> None:
        if int(members.sum()) >= MEMBERS:
            row = conformal_multipliers(conformity[members], multipliers.get(wider, multipliers[EVERYTHING]))
            multipliers[name], counts[name] = row, int(members.sum())

    for b in range(n_bins if n_bins > 1 else 0):
        add(f"*/{b}", bins == b, EVERYTHING)
    if species is not None:
        for z in species.unique().tolist():
            for b in range(n_bins):
                add(f"{z}/{b}", (bins == b) & (species == z), f"*/{b}")
    return multipliers, counts


def conformal_multipliers(conformity: Tensor, wider: tuple[float, ...] | None) -> tuple[float, ...]:
    """q_p, the ⌈(n+1)p⌉-th smallest of the conformity scores |e|/σ, for each level p = LEVELS; the multiplier of the wider group where n is
    too small for the level."""
    ordered, n = conformity.sort().values, len(conformity)
    row: list[float] = []
    for k, level in enumerate(LEVELS):
        # 1e-9: (n + 1) p that is an integer must not be rounded up to the next
        rank = min(n, math.ceil((n + 1) * level - 1e-9))
        enough = n >= max(MEMBERS, 3 * math.ceil(1 / (1 - level) - 1e-9))
        value = ordered[rank - 1].item() if wider is None or enough else wider[k]
        row.append(max([value, *row[-1:]]))
    return tuple(row)


def fit_variance_weights(errors: Tensor, parts: Tensor, rest: Tensor | None = None) -> Tensor:
    """Weights (parts,) of the parts of a variance: those that make held-out errors most likely under var = Σ_k w_k part_k + rest.

    Maximises Σ_i log N(e_i; 0, var_i) − Σ_k (log w_k)² / (2·PRIOR²) by L-BFGS-B in log w, within WEIGHTS. The prior decides only where
    the errors do not: for a part that is 0, or two parts that are proportional.

    Args:
        errors: (n,) NaN = not known, dropped.
        parts: (n, parts) variances by cause, zero or positive, unit of the errors squared.
        rest: (n,) variance without a weight; none if not given.

    Raises:
        UserError: shapes that do not belong together; a part that is negative or not finite where the error is known.
    """
    from scipy.optimize import minimize

    check_shape("errors", errors, ("n",))
    check_shape("parts", parts, (len(errors), "parts"))
    total = parts.sum(1)
    _, e, s = known_errors(errors, torch.where((parts >= 0).all(1), total.clamp_min(0).sqrt(), math.nan))
    p = parts[~torch.isnan(errors)].double()
    if not len(e):
        return torch.ones(parts.shape[1], dtype=torch.float64, device=parts.device)
    floor = torch.full_like(e, smallest_std(s, e) ** 2)
    # start where a common factor is best
    common = (e.square() / (p.sum(1) + floor)).mean().clamp(*WEIGHTS).log().item()
    if rest is not None:
        floor = floor + rest[~torch.isnan(errors)].to(floor)
        common = 0.0
    optimum = minimize(
        _negative_log_posterior,
        np.full(p.shape[1], common),
        args=(e.square().cpu().numpy(), p.cpu().numpy(), floor.cpu().numpy()),
        jac=True,
        method="L-BFGS-B",
        bounds=[tuple(math.log(w) for w in WEIGHTS)] * p.shape[1],
        options={"ftol": 1e-14, "gtol": 1e-9, "maxiter": 500},
    )
    return torch.from_numpy(np.exp(optimum.x)).to(parts.device)


def _negative_log_posterior(
    log_weights: np.ndarray, squared: np.ndarray, parts: np.ndarray, floor: np.ndarray
) -> tuple[float, np.ndarray]:
    """Minus the objective of `fit_variance_weights` per error, and its gradient in log w; `floor` (n,) is added to the variances.

    f = ½ Σ_i [log v_i + e_i²/v_i] + ½ Σ_k (a_k/τ)²,  v = Σ_k exp(a_k) p_k + floor
    ∂f/∂a_k = ½ Σ_i (1/v_i − e_i²/v_i²) exp(a_k) p_ik + a_k/τ²
    """
    n = len(squared)
    weighted = parts * np.exp(log_weights)
    variance = weighted.sum(1) + floor
    value = 0.5 * (np.log(variance) + squared / variance).sum() + 0.5 * np.square(log_weights / PRIOR).sum()
    gradient = 0.5 * ((1 - squared / variance) / variance) @ weighted + log_weights / PRIOR**2
    return value / n, gradient / n


def novelty_factor(novelty: Tensor, typical: float) -> Tensor:
    """max(1, novelty / typical)², the factor on the variances of an atom."""
    return (novelty / typical).clamp(1.0, 1e4) ** 2


def widen_by_novelty(prediction: Prediction, structures: Structures, typical: float) -> Prediction:
    """The prediction with all variances but label noise times `novelty_factor`, of structures its mean over the atoms.

    Far from the data the posterior of a misspecified model is overconfident, and held-out data of the same kind cannot tell by how
    much. Standard deviations grow there in proportion to the Mahalanobis distance (docs/decisions/004-variances.md).
    """
    if prediction.novelty is None:
        raise ValueError("the prediction has no novelty")
    factor = novelty_factor(prediction.novelty, typical)
    sums = factor.new_zeros(len(structures)).index_add(0, structures.structure_of_atom, factor)
    mean = sums / structures.counts
    changed: dict[str, Any] = {}
    for name in CALIBRATED_AS:
        variance: Variance | None = getattr(prediction, name)
        if variance is not None:
            by = mean if name in ("energies_variance", "stresses_covariance") else factor
            by = by.reshape(-1, *(1,) * (variance.data.dim() - 1))
            inducing, data, misspecification = (
                by * variance.inducing,
                by * variance.data,
                by * variance.misspecification,
            )
            changed[name] = Variance(inducing, data, misspecification, variance.noise)
    return replace(prediction, **changed)


def calibrate_prediction(prediction: Prediction, structures: Structures, calibration: Calibration) -> Prediction:
    """The prediction with calibrated variances, widened where it is novel."""
    if calibration.typical_novelty is not None and prediction.novelty is not None:
        prediction = widen_by_novelty(prediction, structures, calibration.typical_novelty)
    changed: dict[str, Any] = {}
    for name, kind in CALIBRATED_AS.items():
        variance: Variance | None = getattr(prediction, name)
        if variance is None:
            continue
        if name == "sampled_forces_covariance":
            variance = replace(variance, data=calibration.unsampled * variance.data)
        changed[name] = calibrate_variance(variance, calibration.kinds[kind])
    return replace(prediction, **changed)


def _smaller(floor: Tensor, noise: Tensor) -> Tensor:
    """The smaller of two variances; of covariances, of which `noise` is a multiple of the identity, in each principal direction."""
    if floor.dim() < 3:
        return torch.minimum(floor, noise)
    known, out = floor.isfinite().flatten(1).all(1), noise.clone()
    values, vectors = torch.linalg.eigh(floor[known])
    values = torch.minimum(values, noise[known].diagonal(dim1=1, dim2=2))
    out[known] = (vectors * values[..., None, :]) @ vectors.mT
    return out


def calibrate_variance(variance: Variance, learned: KindCalibration) -> Variance:
    """Each part times its weight and the square of the scale."""
    inducing, data, constant = (learned.scale**2 * w for w in learned.weights or (1.0, 1.0, 1.0))
    # Of the constant part, label noise comes first and misspecification is the rest. It also takes what a weight above 1 adds to the
    # part due to the data: more data would narrow the posterior and leave these errors.
    floor = constant * (variance.misspecification + variance.noise)
    noise = _smaller(floor, variance.noise)
    excess = max(0.0, data - 1.0) * variance.data
    return Variance(inducing * variance.inducing, min(1.0, data) * variance.data, floor - noise + excess, noise)
