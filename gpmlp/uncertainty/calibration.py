"""Calibration of standard deviations on held-out errors: weights of the parts of the variance, scales by place and group, intervals.

For each kind of observation: if wanted weights of the parts of the variance (variance_weights), a factor on the standard
deviation (maximum likelihood) that depends on the prediction (`LocalScale`) and on the group of the structure (`GroupFactors`), and
conformal intervals whose half-width is a multiple of the calibrated standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from gpmlp.core.errors import UserError, check_choice, check_shape
from gpmlp.core.quantities import KINDS, Prediction, Variance, json_value
from gpmlp.core.structures import Structures
from gpmlp.uncertainty.local_scale import GroupFactors, LocalScale
from gpmlp.uncertainty.scores import SMALLEST, gaussian_multiplier, known_errors, smallest_std
from gpmlp.uncertainty.separation import SeparationScale, largest_gaps

# local energies have no labels; of the forces, which are their slopes, there are most
CALIBRATED_AS = {
    "energies_variance": "energies",
    "atom_energies_variance": "forces",
    "forces_covariance": "forces",
    "sampled_forces_covariance": "forces",
    "stresses_covariance": "stresses",
}

# whose local scale follows from the prediction: rotation-invariant means of its own variance
INVARIANT = {"forces_covariance": "forces", "energies_variance": "energies", "stresses_covariance": "stresses"}
SAMPLED = "sampled_forces_covariance"
PER_ATOM = ("atom_energies_variance", "forces_covariance", SAMPLED)

LEVELS = (0.5, 0.68, 0.8, 0.9, 0.95, 0.99)
MEMBERS = 30  # a group with fewer, or with fewer than 3/(1 − p), has no multiplier of its own at level p
TRANSFER = 0.8  # of groups that the calibration has not seen are covered as those are that it has
SHRUNK = 4.0  # structures as many as which the wider group counts beside the structures of a group
TERTILES = (1 / 3, 2 / 3)
EVERYTHING = "all"


class KnownErrors(NamedTuple):
    """Errors of one kind of observation, and what was known of each before.

    Attributes:
        errors: (n,) predicted - known, NaN = not known; std: (n,) predicted.
        species: (n,) Z of the central atom, or None.
        structure: (n,) number of the structure, or None: each error is independent of the others then.
        groups: of each error, the group (config_type) of its structure, '' = of none; () = of none.
        parts: (n, 3) weighted parts of the variance by cause, rotation-invariant means over the components;
        squared_force: (n,) mean square of the components of the predicted force. From these two LocalScale is learned; None = none is.
    """

    errors: Tensor
    std: Tensor
    species: Tensor | None = None
    structure: Tensor | None = None
    groups: Sequence[str] = ()
    parts: Tensor | None = None
    squared_force: Tensor | None = None

    def select(self, keep: Tensor) -> KnownErrors:
        """Those of a mask (n,)."""
        tensors = {k: v[keep] for k, v in self._asdict().items() if isinstance(v, Tensor)}
        return self._replace(
            **tensors, groups=tuple(np.asarray(self.groups)[keep.cpu().numpy()]) if self.groups else ()
        )


@dataclass(frozen=True)
class GroupScale:
    """Factors for the structures of one group (config_type).

    Attributes:
        std: on the standard deviation.
        intervals: on the half-widths at each of LEVELS, beyond that of the standard deviation.
        structures: held-out structures from which they were learned.
    """

    std: float = 1.0
    intervals: tuple[float, ...] = (1.0,) * len(LEVELS)
    structures: int = 0


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
        weights: of the parts of the variance (variance_weights) from which the std was formed; empty = 1 each.
        forbidden: std of the errors where symmetry forbids a component, which is scatter of the labels: the least of all.
        local: factor on the std that depends on the prediction; None = 1.
        groups: by config_type, factors for its structures; unseen: for structures of a config_type that is not among them, where there
            are some.
    """

    scale: float
    n: int
    multipliers: dict[str, tuple[float, ...]]
    counts: dict[str, int] = field(default_factory=dict)
    edges: tuple[float, ...] = ()
    floor: float = 0.0
    weights: tuple[float, ...] = ()
    forbidden: float = 0.0
    local: LocalScale | None = None
    groups: dict[str, GroupScale] = field(default_factory=dict)
    unseen: GroupScale = GroupScale()

    def widen_std(self, factor: float) -> KindCalibration:
        """With standard deviations larger by a factor, and unchanged intervals."""
        rows = {name: tuple(m / factor for m in row) for name, row in self.multipliers.items()}
        return replace(self.scale_by(factor), multipliers=rows)

    def scale_by(self, factor: float) -> KindCalibration:
        """With standard deviations and intervals larger by a factor."""
        edges = tuple(factor * e for e in self.edges)
        wider = {name: factor * getattr(self, name) for name in ("scale", "floor", "forbidden")}
        return replace(self, edges=edges, **wider)

    @staticmethod
    def identity() -> KindCalibration:
        """Scale 1 and Gaussian intervals: changes nothing."""
        return KindCalibration(1.0, 0, {EVERYTHING: tuple(gaussian_multiplier(p) for p in LEVELS)})

    @staticmethod
    def fit(known: KnownErrors, weights: tuple[float, ...] = ()) -> KindCalibration:
        """See Calibration.fit."""
        keep, e, s = known_errors(known.errors, known.std)
        if not len(e):
            return KindCalibration.identity()
        if known.species is not None:
            check_shape("species", known.species, (len(known.errors),))
        known = known.select(keep)._replace(errors=e)
        floor = smallest_std(s, e)
        s = s.clamp_min(floor)
        structure = torch.arange(len(e), device=e.device) if known.structure is None else known.structure
        local, scale = None, 1.0
        if known.parts is not None and known.squared_force is not None:
            local, scale = LocalScale.fit((e / s).square(), known.parts, known.squared_force, structure)
            s = scale * local.factor(known.parts, known.squared_force).to(s) * s
        factors = GroupFactors.fit((e / s).square(), known.groups or ("",), structure)
        s = s * _per_error(known.groups, factors.factors).to(s)
        # argmax over s of Σ log N(e; 0, s²σ²)
        rest = max((e / s).square().mean().sqrt().item(), 1e-12)  # errors that are all 0 must leave a std
        s, scale = rest * s, rest * scale
        edges = _edges(s)
        size, bins = (e.abs() / s).cpu(), _bins(s, edges).cpu()
        species = None if known.species is None else known.species.cpu()
        where = None if known.structure is None else structure.cpu()
        multipliers, counts = _table(size, bins, species, len(edges) + 1, where)
        found = KindCalibration(scale, len(e), multipliers, counts, edges, scale * floor, weights, local=local)
        if not factors.factors:
            return found
        conformity = (e.abs()[:, None] / found.half_widths(s, species)).cpu()
        groups = _group_scales(conformity, known.groups, structure.cpu(), factors.factors)
        return replace(found, groups=groups, unseen=_unseen(known, s, factors, structure))

    def variance(self, parts: Tensor) -> Tensor:
        """Calibrated variance (n,) of parts of variance (n, parts): scale² Σ_k w_k part_k, without local or group factors."""
        if not self.weights:
            return self.scale**2 * parts.sum(1)
        check_shape("parts", parts, ("n", len(self.weights)))
        return self.scale**2 * (parts @ torch.tensor(self.weights, dtype=torch.float64).to(parts))

    def group(self, name: str) -> GroupScale:
        """Factors for structures of a config_type; '' = not known."""
        return self.groups.get(name, self.unseen) if name and self.groups else GroupScale()

    def half_width(
        self, std: Tensor, level: float, species: Tensor | None = None, groups: Sequence[str] = ()
    ) -> Tensor:
        """(n,) q_p max(σ, floor) = half-width of the interval at level p; see Calibration.half_width."""
        if not 0 < level <= LEVELS[-1]:
            raise UserError(f"`level` must be above 0 and at most {LEVELS[-1]}, as 0.9 for 90 %; got {level}.")
        check_shape("std", std, ("n",))
        if species is not None:
            check_shape("species", species, (len(std),))
        column = next(k for k, p in enumerate(LEVELS) if p >= level - 1e-9)
        half = self.half_widths(std, species)[:, : column + 1]
        rows = {name: self.group(name).intervals for name in set(groups)}
        if rows:
            half = half * torch.tensor([rows[name] for name in groups], dtype=torch.float64).to(half)[:, : column + 1]
        return half.amax(1)  # an interval is never narrower than that of a lower level

    def half_widths(self, std: Tensor, species: Tensor | None = None) -> Tensor:
        """(n, levels) half-widths at LEVELS of structures of no known group."""
        bins = _bins(std, self.edges)
        factor = self._multipliers("*").to(std)[bins]
        if species is not None:
            species = species.to(std.device)
            for z in sorted({name.split("/")[0] for name in self.multipliers} - {EVERYTHING, "*"}):
                factor = torch.where((species == int(z))[:, None], self._multipliers(z).to(std)[bins], factor)
        return factor * std.clamp_min(self.floor)[:, None]

    def _multipliers(self, species: str) -> Tensor:
        """(bins, levels) multipliers of a species, or else those of the bin, or else those of all."""
        rows, wider = self.multipliers, self.multipliers[EVERYTHING]
        row_of_bin = [rows.get(f"{species}/{b}", rows.get(f"*/{b}", wider)) for b in range(len(self.edges) + 1)]
        return torch.tensor(row_of_bin, dtype=torch.float64)

    @staticmethod
    def from_dict(plain: dict) -> KindCalibration:
        """Restore what dataclasses.asdict gave, of older versions too."""
        changed: dict[str, Any] = {"multipliers": {name: tuple(row) for name, row in plain["multipliers"].items()}}
        changed |= {"edges": tuple(plain["edges"]), "weights": tuple(plain["weights"])}
        if plain.get("local") is not None:
            changed["local"] = LocalScale.from_dict(plain["local"])
        groups = {name: _group_from_dict(entry) for name, entry in plain.get("groups", {}).items()}
        changed |= {"groups": groups, "unseen": _group_from_dict(plain.get("unseen", {}))}
        return KindCalibration(**_known(KindCalibration, plain | changed))


def _group_from_dict(plain: Mapping) -> GroupScale:
    known: dict[str, Any] = _known(GroupScale, plain)
    scale = GroupScale(**(known | ({"intervals": tuple(known["intervals"])} if "intervals" in known else {})))
    if len(scale.intervals) != len(LEVELS):
        raise UserError(
            f"Calibration with {len(scale.intervals)} factors on intervals of a group; there are {len(LEVELS)} levels."
        )
    return scale


def _known(of: type, plain: Mapping) -> dict[str, Any]:
    """The entries that are fields; keys that other versions add pass."""
    return {f.name: plain[f.name] for f in fields(of) if f.name in plain}


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
        posterior_scale: factor on the posterior in samples that also have the shifts of structures left out (VarianceModel.shifts); None =
            there are none, and samples have `sample_scale`.
        apart: factors of structures whose parts are farther apart than nearly all that were learned from; None = not known.
        unsampled: factor on what samples show of the variance of forces, the part due to the data, for the part due to the inducing set,
            which they do not show.
    """

    kinds: dict[str, KindCalibration]
    source: dict = field(default_factory=dict)
    typical_novelty: float | None = None
    sample_scale: float | None = None
    unsampled: float = 1.0
    posterior_scale: float | None = None
    apart: SeparationScale | None = None

    @staticmethod
    def identity() -> Calibration:
        """Changes nothing; for when there is nothing to calibrate with."""
        return Calibration({kind: KindCalibration.identity() for kind in KINDS}, {})

    @staticmethod
    def fit(
        data: Mapping[str, KnownErrors | tuple],
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
        than max(30, 3/(1 − p)) members, by all where the bin has; where structures are known, each is a geometric mean of the group's
        own and that of the wider group, weighted S to SHRUNK for S structures. They never fall with the level.

        Where config_types are known, each has a factor on the std (GroupFactors), and one on the half-widths beyond it, shrunk
        likewise: Mondrian conformal prediction (Vovk et al. 2005, section 4.5). For a config_type that was not among them there is a
        transfer factor: how much larger standard deviations and intervals have to be for one whole group that is left out of the
        calibration and judged by it, each group counting the same (`_unseen`).

        Args:
            data: by kind, KnownErrors, or a tuple of its first fields. Flatten the components of forces and stresses, and repeat
                the species.
            source: JSON-able, for the record.
            weights: by kind, weights of the parts of variance (variance_weights) from which std was formed.

        Raises:
            UserError: an unknown kind, wrong shapes, a std that is negative or not finite where the error is known.
        """
        for kind in data:
            check_choice("kind of observation", kind, KINDS)
        kinds = {kind: KindCalibration.identity() for kind in KINDS}
        for kind, known in data.items():
            used = tuple(float(w) for w in (weights or {}).get(kind, ()))
            kinds[kind] = KindCalibration.fit(KnownErrors(*known), used)
        return Calibration(kinds, dict(source or {}))

    def with_amplitude(self, amplitude: float) -> Calibration:
        """The same calibrated variances where the first part is `amplitude` times as large as it was when this was learned."""
        kinds = {}
        for kind, learned in self.kinds.items():
            first, *others = learned.weights or (1.0, 1.0, 1.0)
            kinds[kind] = replace(learned, weights=(first / amplitude, *others)) if learned.n else learned
        return replace(self, kinds=kinds, apart=self.apart and self.apart.with_amplitude(amplitude))

    def functional_widening(self, novelty: Tensor) -> Tensor:
        """√(novelty / typical), at least 1: factor on the std of a functional of structures with this largest novelty, of which samples do
        not know (docs/decisions/025-error-bars-of-functionals.md)."""
        typical = self.typical_novelty
        return torch.ones_like(novelty) if typical is None else novelty_factor(novelty, typical) ** 0.25

    def half_width(
        self, kind: str, std: Tensor, level: float, species: Tensor | None = None, groups: Sequence[str] = ()
    ) -> Tensor:
        """Half-width (n,) of the interval about the prediction that holds a new error with probability `level`.

        Args:
            std: (n,) calibrated standard deviation; species: (n,) Z of the central atom, not needed; groups: config_type of the structure
                of each (with which `std` was calibrated), not needed.
            level: up to 0.99; between two of LEVELS the next higher is used.
        """
        check_choice("kind of observation", kind, self.kinds)
        return self.kinds[kind].half_width(std, level, species, groups)

    def as_dict(self) -> dict:
        """Plain data for JSON; from_dict restores it exactly."""
        kinds = {kind: json_value(asdict(calibration)) for kind, calibration in self.kinds.items()}
        numbers = {"typical_novelty": self.typical_novelty, "spread": self.sample_scale, "unsampled": self.unsampled}
        more: dict[str, Any] = {"posterior_scale": self.posterior_scale, "apart": self.apart and asdict(self.apart)}
        known = {name: value for name, value in more.items() if value is not None}
        return {"levels": list(LEVELS), "kinds": kinds, "source": self.source} | numbers | known

    @staticmethod
    def from_dict(plain: dict) -> Calibration:
        """Restore what as_dict gave; a UserError if its levels are not LEVELS."""
        if tuple(plain["levels"]) != LEVELS:
            raise UserError(f"Calibration on levels {plain['levels']}; this version of gpmlp has {LEVELS}.")
        kinds = {kind: KindCalibration.from_dict(entry) for kind, entry in plain["kinds"].items()}
        typical, spread, unsampled = (plain.get(name) for name in ("typical_novelty", "spread", "unsampled"))
        if unsampled is None:  # a file of an older version: as much as makes samples as wide as errors are
            forces = kinds["forces"]
            data = forces.scale**2 * (forces.weights[1] if forces.weights else 1.0)
            unsampled = max(1.0, spread**2 / data) if spread else 1.0
        apart = plain.get("apart") and SeparationScale.from_dict(plain["apart"])
        return Calibration(kinds, plain["source"], typical, spread, unsampled, plain.get("posterior_scale"), apart)


def _edges(std: Tensor) -> tuple[float, ...]:
    """Tertiles of std; none where it is constant."""
    ordered = std.sort().values
    edges = [ordered[int(q * len(std))].item() for q in TERTILES]
    return tuple(dict.fromkeys(edges)) if ordered[0] < ordered[-1] else ()


def _bins(std: Tensor, edges: tuple[float, ...]) -> Tensor:
    return torch.bucketize(std.contiguous(), torch.tensor(edges, dtype=torch.float64).to(std))


def _table(
    conformity: Tensor, bins: Tensor, species: Tensor | None, n_bins: int, structure: Tensor | None = None
) -> tuple[dict[str, tuple[float, ...]], dict[str, int]]:
    """Multipliers at LEVELS and number of members of each group that has enough; what it lacks comes from the wider group."""
    multipliers = {EVERYTHING: conformal_multipliers(conformity, None)}
    counts = {EVERYTHING: len(conformity)}

    def add(name: str, members: Tensor, wider: str) -> None:
        if int(members.sum()) >= MEMBERS:
            outer = multipliers.get(wider, multipliers[EVERYTHING])
            own = conformal_multipliers(conformity[members], outer)
            share = 1.0 if structure is None else _own_share(structure[members])
            multipliers[name] = tuple(
                math.exp(share * _log(a) + (1 - share) * _log(b)) if share < 1 else a
                for a, b in zip(own, outer, strict=True)
            )
            counts[name] = int(members.sum())

    for b in range(n_bins if n_bins > 1 else 0):
        add(f"*/{b}", bins == b, EVERYTHING)
    if species is not None:
        for z in species.unique().tolist():
            for b in range(n_bins):
                add(f"{z}/{b}", (bins == b) & (species == z), f"*/{b}")
    return multipliers, counts


def _own_share(structure: Tensor) -> float:
    """Weight of a group's own multiplier beside the wider group's, by how many structures it has."""
    n = len(structure.unique())
    return n / (n + SHRUNK)


def _log(value: float) -> float:
    return math.log(max(value, SMALLEST))


def _per_error(groups: Sequence[str], factors: Mapping[str, float]) -> Tensor:
    """(n,) factor of each error's group, 1 where it has none; (1,) if there are no groups."""
    return torch.tensor([factors.get(name, 1.0) for name in groups or ("",)], dtype=torch.float64)


def _group_scales(
    ratios: Tensor, groups: Sequence[str], structure: Tensor, factors: Mapping[str, float]
) -> dict[str, GroupScale]:
    """Of each group, from ratios (n, levels) of errors to the half-widths without it."""
    names, out = np.asarray(groups), {}
    for name, factor in factors.items():
        mine = torch.from_numpy(names == name)
        n, share = len(structure[mine].unique()), _own_share(structure[mine])
        row = [_quantile(ratios[mine, k], p) for k, p in enumerate(LEVELS)]
        out[name] = GroupScale(factor, tuple(math.exp(share * _log(q)) for q in row), n)
    return out


def _quantile(scores: Tensor, level: float) -> float:
    """The ⌈(n+1)p⌉-th smallest, the largest where there are too few."""
    n = len(scores)
    return float(scores.kthvalue(max(1, min(n, math.ceil((n + 1) * level - 1e-9)))).values)


def _unseen(known: KnownErrors, std: Tensor, factors: GroupFactors, structure: Tensor) -> GroupScale:
    """What a group needs that the calibration has not seen, learned by leaving each group out of it in turn.

    With ρ_g the factor by which the rms of error/std, or the p-quantile of |error|/half-width, of group g differs from 1 under a
    calibration on the others, a new group needs less than exp(mean log ρ + t s √(1 + 1/G)) with probability TRANSFER (Student's t
    with G − 1 degrees of freedom, s the standard deviation of log ρ over the G groups: the prediction interval of a normal variable).
    """
    names = np.asarray(known.groups)
    bare = std / _per_error(known.groups, factors.factors).to(std)
    needed = []
    for name in factors.factors:
        mine = torch.from_numpy(names == name).to(std.device)
        others = (known.errors[~mine] / bare[~mine]).abs()
        scale = others.square().mean().sqrt()
        z = (known.errors[mine] / (scale * bare[mine])).abs().cpu()
        row = conformal_multipliers((others / scale).cpu(), None)
        needed.append(
            [float(z.square().mean().sqrt()), *(_quantile(z, p) / q for p, q in zip(LEVELS, row, strict=True))]
        )
    n = len(needed)
    logs = torch.tensor(needed, dtype=torch.float64).clamp_min(SMALLEST).log()
    reach = float(stdtrit(n - 1, TRANSFER)) * math.sqrt(1 + 1 / n)
    ratio, *widths = (logs.mean(0) + reach * logs.std(0)).exp().clamp_min(1.0).tolist()
    return GroupScale(ratio, tuple(w / ratio for w in widths), len(structure.unique()))


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
            inducing, data, misfit = by * variance.inducing, by * variance.data, by * variance.misspecification
            changed[name] = Variance(inducing, data, misfit, variance.noise)
    return replace(prediction, **changed)


def calibrate_prediction(
    prediction: Prediction, structures: Structures, calibration: Calibration, config_types: Sequence[str] = ()
) -> Prediction:
    """The prediction with calibrated variances, widened where it is novel.

    Args:
        config_types: of the structures, where they are known: '' = not known.
    """
    if calibration.typical_novelty is not None and prediction.novelty is not None:
        prediction = widen_by_novelty(prediction, structures, calibration.typical_novelty)
    changed: dict[str, Any] = {}
    apart = calibration.apart if calibration.apart and calibration.apart.counts else None
    gaps = largest_gaps(structures) if apart else structures.volumes
    for name, kind in CALIBRATED_AS.items():
        variance: Variance | None = getattr(prediction, name)
        if variance is None:
            continue
        learned = calibration.kinds[kind]
        if name == SAMPLED:  # what samples do not show, as its calibrated size says
            inducing, data, _ = learned.weights or (1.0, 1.0, 1.0)
            unseen = (calibration.unsampled - 1) * data / inducing * variance.data
            prediction = replace(prediction, sampled_forces_covariance=replace(variance, inducing=unseen))
            variance = getattr(prediction, name)
        factor = local_factor(name, prediction, structures, learned)
        if config_types and learned.groups:
            factors = [learned.group(label).std for label in config_types]
            group = torch.tensor(factors, dtype=torch.float64).to(variance.data)
            factor = factor * (group[structures.structure_of_atom] if name in PER_ATOM else group)
        if apart:
            far = apart.factor(kind, gaps).to(variance.data)
            factor = factor * (far[structures.structure_of_atom] if name in PER_ATOM else far)
        changed[name] = calibrate_variance(variance, learned, factor)
        if apart and kind == "energies":
            changed[name] = apart.of_parts_alone(variance, changed[name], gaps)
    return replace(prediction, **changed)


def local_factor(name: str, prediction: Prediction, structures: Structures, learned: KindCalibration) -> Tensor | float:
    """(atoms,) or (structures,) factor of LocalScale on the standard deviations in a field of the prediction; 1 where there is none."""
    variance: Variance = getattr(prediction, name)
    if learned.local is None or name not in (*INVARIANT, SAMPLED):
        return 1.0
    if name == SAMPLED:  # as that of the covariances that it stands for
        prediction = replace(prediction, forces_covariance=getattr(prediction, name))
        name = "forces_covariance"
    parts, squared_force = invariants(INVARIANT[name], prediction, structures)
    weights = torch.tensor(learned.weights or (1.0, 1.0, 1.0), dtype=torch.float64).to(parts)
    return learned.local.factor(parts * weights, squared_force).to(variance.data)


def invariants(kind: str, prediction: Prediction, structures: Structures) -> tuple[Tensor, Tensor]:
    """What LocalScale needs of the predictions of a kind: of each atom (forces) or structure (energies, per atom; stresses).

    Returns:
        parts of the variance (n, 3) by cause (inducing set, data, constant), means over the components; mean square of the components
        of the predicted force (n,), of structures over their atoms.
    """
    name = {kind: name for name, kind in INVARIANT.items()}[kind]
    variance: Variance = getattr(prediction, name)
    parts = [variance.inducing, variance.data, variance.misspecification + variance.noise]
    if kind != "energies":
        parts = [part.diagonal(dim1=-2, dim2=-1).mean(-1) for part in parts]
    squared = prediction.forces.square().mean(1)
    if kind != "forces":
        sums = squared.new_zeros(len(structures)).index_add(0, structures.structure_of_atom, squared)
        squared = sums / structures.counts
    joined = torch.stack(parts, dim=1)
    return joined / structures.counts.to(joined)[:, None].square() if kind == "energies" else joined, squared


def _smaller(floor: Tensor, noise: Tensor) -> Tensor:
    """The smaller of two variances; of covariances, of which `noise` is a multiple of the identity, in each principal direction."""
    if floor.dim() < 3:
        return torch.minimum(floor, noise)
    known, out = floor.isfinite().flatten(1).all(1), noise.to(floor, copy=True)
    values, vectors = torch.linalg.eigh(floor[known])
    values = torch.minimum(values, out[known].diagonal(dim1=1, dim2=2))
    out[known] = (vectors * values[..., None, :]) @ vectors.mT
    return out


def calibrate_variance(variance: Variance, learned: KindCalibration, factor: Tensor | float = 1.0) -> Variance:
    """Each part times its weight and the square of the scale, and of a further factor on standard deviations (n,)."""
    if isinstance(factor, Tensor):
        factor = factor.reshape(-1, *(1,) * (variance.data.dim() - 1))
    squared = learned.scale**2 * factor**2
    inducing, data, constant = (w * squared for w in learned.weights or (1.0, 1.0, 1.0))
    # Of the constant part, label noise comes first and misspecification is the rest. It also takes what a weight above 1 adds to the
    # part due to the data: more data would narrow the posterior and leave these errors.
    floor = constant * (variance.misspecification + variance.noise)
    noise = _smaller(floor, variance.noise)
    scatter = learned.forbidden**2 * (torch.eye(noise.shape[-1]).to(noise) if noise.dim() == 3 else 1.0)
    share = data.clamp(max=1.0) if isinstance(data, Tensor) else min(1.0, data)
    excess = (data - share) * variance.data
    return Variance(inducing * variance.inducing, share * variance.data, floor - noise + excess, noise + scatter)
