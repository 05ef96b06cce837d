"""Calibration of variances: on structures left out of a fit in turn, or on prequential errors (predicted before conditioning)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gpmlp.core.quantities import KINDS, Prediction, Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting.influence import Influence
from gpmlp.fitting.left_out import LeftOut
from gpmlp.fitting.near_duplicates import IndependentGroups
from gpmlp.potential import baselines
from gpmlp.potential.potential import Potential
from gpmlp.recipe import CalibrationRecipe
from gpmlp.uncertainty.calibration import (
    Calibration,
    KnownErrors,
    calibrate_prediction,
    invariants,
    widen_by_novelty,
)
from gpmlp.uncertainty.residuals import (
    VARIANCE_FIELDS,
    degrees_of_freedom,
    mean_square_residuals,
    split_residuals,
    structure_of_error,
    zero_by_symmetry,
)
from gpmlp.uncertainty.separation import SeparationScale, largest_gaps
from gpmlp.uncertainty.variance_weights import fit_variance_weights

FEWEST_PREQUENTIAL = 8  # latest structures, at least, whose predictions count,
COMPONENTS = 1000  # and force components that they have together: older predictions are of models with less data
FEW_ANEW = 30  # labels of an online model; up to so many, kinds ANEW are calibrated by fits made anew without each of FOLDS parts of them
ANEW = ("energies", "forces")
FEWEST_ONLINE = 10  # structures of an online model that are left out in turn; of fewer, prequential errors say more
LEFT_OUT = "left out of the training set in turn, several of each config_type; learned from otherwise"
HOW = "predicted before they were learned from, in the order in which they came (prequential)"

PROCESS = 100.0  # structures, as many as which the exact process counts where it says how large errors of energies are
FOLDS = 8  # in which standard deviations are judged that were calibrated on the others
LARGEST_FACTOR = 1.5  # on standard deviations that follows from it
CENTRAL = 0.683  # of normal errors, within one standard deviation
LARGEST_SHIFT = 5.0  # times the median of their norms, of a shift: beyond, one structure would decide for all
SEEN = 1e-9  # of a typical variance over the noise: what is smaller, symmetry forbids
FEWEST = 20  # structures; of fewer none is set aside
FEWEST_LEFT_OUT = 5  # structures whose left-out errors say how large others are
ENOUGH_HELD = 10  # structures that are set aside at least,
LARGEST_SHARE = 1 / 3  # up to that share
LEAST_FREEDOM = 3.0  # below it a new error would have no variance
ENOUGH = 100  # errors of a kind from which weights of the parts of its variance are learned
FEW = 30  # from which the constant part is weighed against the others for a kind of its own
LEAST = 1e-6  # weight of the constant part, a thousandth of its std: where symmetry leaves nothing else, labels are still not exact
AT_REST = 1e-4  # of the rms force: a smaller vector is none; those of moving atoms are that small one time in 10¹²
TYPICAL = 0.9  # quantile of the novelty beyond which standard deviations grow with it
LEAST_NOVELTY = 1e-3  # that is called typical
REMOVED = 1e-4  # of the size of forces: a net force below it was subtracted
LARGE = 0.3  # share of the size of forces that the model class may miss without a warning


class CalibrationSplit(NamedTuple):
    """Indices of structures: those learned from first; those set aside; and of these the ones that are predicted, none of which has a
    near-duplicate among those learned from."""

    fitted: Tensor
    held: Tensor
    judged: Tensor


def calibration_split(
    structures: Structures,
    targets: Targets,
    recipe: CalibrationRecipe | Literal[False],
    seed: int,
    groups: IndependentGroups | None = None,
) -> CalibrationSplit:
    """Structures to learn from and those to set aside.

    Of every config_type the same share, at random; isolated atoms always stay. Where `recipe.fraction` is less than ENOUGH_HELD structures
    it is more, up to LARGEST_SHARE: errors within one structure are correlated, so that a few structures say little. At most about
    `recipe.atoms` atoms are predicted: they suffice for the scale of the errors, and more would only be missing from the inducing set.

    Args:
        groups: what counts as one structure, each set aside with all that is near its leader; every structure for itself if None.
    """
    everything, groups = torch.arange(len(structures)), groups or IndependentGroups.of_one(len(structures))
    alone = torch.tensor([baselines.is_isolated_atom(label) for label in targets.config_types])
    group_of = dict(zip(groups.leaders.tolist(), groups.near, strict=True))
    usable = everything[~alone]
    drawn = usable[torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed))].tolist()
    order = [i for i in drawn if i in group_of]
    n = len(order)
    if recipe is False or n < FEWEST:
        return CalibrationSplit(everything, everything[:0], everything[:0])
    atoms = int(structures.counts.cpu()[groups.leaders].sum())
    share = min(max(recipe.fraction, min(ENOUGH_HELD / n, LARGEST_SHARE)), recipe.atoms / atoms)
    by_type: dict[str, list[int]] = {}
    for i in order:
        by_type.setdefault(targets.config_types[i], []).append(i)
    chosen: list[int] = []
    owed = 0.0
    for members in by_type.values():  # in the order of chance; what rounding leaves of one config_type goes to the next
        owed += share * len(members)
        chosen += members[: int(owed + 0.5)]
        owed -= int(owed + 0.5)
    mask = torch.zeros(len(structures), dtype=torch.bool)
    for i in chosen:
        mask[group_of[i]] = True
    mask &= ~alone
    _keep_every_species(structures, mask)
    judged = sorted(i for i in chosen if (mask | alone)[group_of[i]].all())
    return CalibrationSplit(everything[~mask], everything[mask], torch.tensor(judged, dtype=torch.long))


def _keep_every_species(structures: Structures, held: Tensor) -> None:
    """Give back, in place, structures that hold a species which those that stay do not."""
    species, owner = structures.species.cpu(), structures.structure_of_atom.cpu()
    for z in structures.distinct_species:
        with_it = owner[species == z].unique()
        if held[with_it].all():
            held[with_it[0]] = False


def left_out_calibration(left_out: LeftOut, at_rest: float | None = None) -> Calibration:
    """Calibration from structures predicted without their labels, with standard deviations and intervals larger for their small number.

    Errors within a structure depend on each other, so n structures count as n errors; the variance of so many is uncertain itself, and
    a new error is distributed as Student's t: larger by √(n / (n - 2)). What else is learned from them (weights, local scale, groups)
    follows their errors too; the factor is that of `cross_fitted_size` where it is more. Energies have `size_by_process` besides.

    Args:
        at_rest: scatter of force labels where symmetry forbids a force, if known better than from these structures (scatter_at_rest).
    """
    learned = learn_calibration(left_out.prediction, left_out.structures, left_out.targets, LEFT_OUT)
    n = max(len(left_out.structures), LEAST_FREEDOM)
    larger, least = cross_fitted_size(left_out), (n / (n - 2)) ** 0.5
    kinds = {
        name: kind.scale_by(max(least, min(larger.get(name, least), LARGEST_FACTOR))) if kind.n else kind
        for name, kind in learned.kinds.items()
    }
    if kinds["forces"].n and at_rest is not None:
        kinds["forces"] = replace(kinds["forces"], forbidden=at_rest)
    if kinds["energies"].n:
        kinds["energies"] = kinds["energies"].scale_by(size_by_process(left_out))
    calibration, together = replace(learned, kinds=kinds), left_out.together
    if together is None:
        return calibration
    squares = {kind: found for kind, found in _squares(together, calibration).items() if len(found)}
    return replace(calibration, apart=SeparationScale.fit(largest_gaps(together.structures), squares))


def size_by_process(left_out: LeftOut) -> float:
    """Factor on standard deviations of energies by which their size follows the exact process, too, where the mean is that.

    Each structure has one energy and many forces, and a few of the errors of energies are many times as large as others: from 50 of them
    their root mean square was known to a third (decision 019). The process knows how errors of energies compare with those of forces: its
    expectation, times the ratio by which errors of forces differ from theirs, counts as much as PROCESS structures.
    """
    if not left_out.expected:
        return 1.0
    sizes = {}
    for kind, expected in left_out.expected.items():
        if getattr(left_out.prediction, VARIANCE_FIELDS[kind]) is None:  # energies are all there is
            return 1.0
        errors, *_ = split_residuals(kind, left_out.structures, left_out.targets, left_out.prediction)
        known = ~errors.isnan() & (expected.to(errors) > 0)
        if not known.any():
            return 1.0
        sizes[kind] = int(known.sum()), float(errors[known].square().mean() / expected.to(errors)[known].mean())
    (n, of_energies), (_, of_forces) = sizes["energies"], sizes["forces"]
    if min(of_energies, of_forces) <= 0:
        return 1.0
    return (of_forces / of_energies) ** (0.5 * PROCESS / (PROCESS + n))


def predict_in_folds(
    structures: Structures, targets: Targets, fit: Callable[[Structures, Targets], Potential]
) -> LeftOut | None:
    """Uncalibrated predictions of each of FOLDS parts of the structures by a fit to the others; isolated atoms always stay among these.

    Args:
        fit: the potential of some labels, with variances; a part without which a species would be missing is not predicted.

    Returns:
        None where no part can be.
    """
    alone = [i for i, label in enumerate(targets.config_types) if baselines.is_isolated_atom(label)]
    order = torch.randperm(len(structures), generator=torch.Generator().manual_seed(0)).tolist()
    order = [i for i in order if i not in alone]
    wanted = [kind for kind in KINDS if bool(getattr(targets, kind).isfinite().any())]
    parts = []
    for k in range(FOLDS):
        held = sorted(order[k::FOLDS])
        others = sorted({*range(len(structures))} - {*held})
        known = structures.select(others)
        if not held or known.distinct_species != structures.distinct_species:
            continue
        potential = fit(known, targets.select(structures, others))
        here, novelty = structures.select(held), potential.novelty is not None
        predicted = potential(here, variance=wanted, novelty=novelty, calibrated=False)
        parts.append((here, targets.select(structures, held), predicted))
    if not parts:
        return None
    judged, labels, predictions = zip(*parts, strict=True)
    return LeftOut(Structures.concatenate(judged), Targets.concatenate(labels), Prediction.concatenate(predictions))


def cross_fitted_size(left_out: LeftOut) -> dict[str, float]:
    """By kind, rms of error/σ where σ was calibrated on other structures: FOLDS times on all but one part of them."""
    n, squares = len(left_out.structures), dict[str, list[Tensor]]()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    for k in range(FOLDS if n >= 2 * FOLDS else 0):
        judged, others = (
            left_out.select(sorted(order[k::FOLDS])),
            left_out.select(sorted({*order} - {*order[k::FOLDS]})),
        )
        learned = learn_calibration(others.prediction, others.structures, others.targets, LEFT_OUT)
        for kind, found in _squares(judged, learned).items():
            squares.setdefault(kind, []).append(found)
    return {kind: float(torch.cat(found).mean().sqrt()) for kind, found in squares.items()}


def _squares(left_out: LeftOut, learned: Calibration) -> dict[str, Tensor]:
    """By kind, (error/σ)² with calibrated σ, of components that symmetry does not forbid."""
    structures, targets, out = left_out.structures, left_out.targets, dict[str, Tensor]()
    predicted = calibrate_prediction(left_out.prediction, structures, learned, targets.config_types)
    for kind, one in learned.kinds.items():
        if not one.n or getattr(predicted, VARIANCE_FIELDS[kind]) is None:
            continue
        errors, parts, _ = split_residuals(kind, structures, targets, predicted)
        usable = ~errors.isnan() & parts.isfinite().all(1)
        usable &= ~zero_by_symmetry(kind, targets, predicted, parts)
        out[kind] = (errors.square() / parts.sum(1))[usable]
    return out


def functional_scale(influence: Influence) -> float:
    """The factor on posterior and shifts together with which errors of left-out structures are as large as their standard deviations.

    The variance of a label of a structure is that of the posterior without it and what leaving others out as well changes, over all of
    them: the jackknife of clusters of labels (Cameron & Miller, J. Hum. Resour. 50, 317 (2015), section VI.B), which sees errors that
    labels of a structure share, where the posterior takes every label as independent. It has to do for every kind, as a function has one
    factor for its energies, forces and stresses, so it is that of the kind which needs the largest. For each it is the
    geometric mean of two sizes of error / standard deviation that are 1 for normal errors, the one below which CENTRAL of them lie and the
    root mean square: where tails are heavy the first alone would promise too much of large errors, the second too little of the many.
    Like other factors (left_out_calibration) it is larger for few structures.
    """
    variances = _with_shifts(influence)
    z = influence.errors.abs() / variances.sqrt()
    usable = z.isfinite() & (influence.variances > SEEN * influence.variances.median())
    sizes = [z[usable & (influence.kind == k)] for k in range(len(KINDS))]
    needed = [
        float((size.quantile(CENTRAL) * size.square().mean().sqrt()).clamp_min(LEAST)) ** 0.5
        for size in sizes
        if len(size)
    ]
    n = max(len(influence.shifts), LEAST_FREEDOM)
    return (n / (n - 2)) ** 0.5 * max(needed, default=1.0)


def _with_shifts(influence: Influence) -> Tensor:
    """(probes,) variances of the posterior and of the shifts of the other structures together, over the noise."""
    others = (influence.rows @ influence.shifts.T).square()
    others[torch.arange(len(others)), influence.owner] = 0.0
    n = len(influence.shifts)
    return influence.variances + others.sum(1) * n / (n - 1)


def with_shifts(
    calibration: Calibration, influence: Influence | None, structures: int
) -> tuple[Calibration, Tensor | None]:
    """The calibration with the scale of calibrated samples, and their shifts (VarianceModel.shifts).

    Args:
        structures: of all that the fit is to, of which some were left out: they show so much of what leaving out all would.
    """
    if influence is None or calibration.sample_scale is None:
        return calibration, None
    influence = bounded_shifts(influence)
    scale, share = functional_scale(influence), structures / len(influence.shifts)
    return replace(calibration, posterior_scale=scale), scale * share**0.5 * influence.shifts


def bounded_shifts(influence: Influence) -> Influence:
    """With shifts of structures that hardly any other resembles shortened to LARGEST_SHIFT times the median (Huber, Robust Statistics,
    1981, chapter 6: estimates of bounded influence)."""
    norms = influence.shifts.norm(dim=1)
    factor = (LARGEST_SHIFT * norms.median() / norms).clamp_max(1.0).nan_to_num(1.0)
    return influence._replace(shifts=factor[:, None] * influence.shifts)


def scatter_at_rest(targets: Targets, forces: Tensor) -> float | None:
    """Root mean square of the errors of force labels on atoms at which the model has none, as it does where symmetry forbids them.

    Few structures may have such atoms, and labels of few of these scatter (some calculations use the symmetry, some do not), so it takes
    all training structures to know.

    Args:
        forces: (atoms, 3) predicted.

    Returns:
        eV/A; None where there are fewer than FEW such atoms.
    """
    known = ~targets.forces.isnan().any(1)
    size = targets.forces[known].square().mean().sqrt()
    still = known & (forces.norm(dim=1) < AT_REST * size)
    errors = (targets.forces - forces)[still]
    return errors.square().mean().sqrt().item() if len(errors) >= FEW else None


def learn_calibration(raw: Prediction, structures: Structures, targets: Targets, how: str) -> Calibration:
    """Calibration from uncalibrated predictions that were made before the labels were learned from.

    The posterior variance has the right shape and often the wrong size: the kernel that the data chose is rougher than the energy
    surface, so what the inducing set cannot represent is overestimated, and noise that is in truth a misfit of the model is the
    same everywhere. Forces, of which there are many, decide with which weights the parts enter (calibration.weigh); then each
    kind has its own scale.

    Args:
        raw: with variances of energies and forces, of stresses where they are labelled, and novelty if it is to widen them.
        how: where the structures come from, for the record.
    """
    prediction = raw
    typical = max(float(raw.novelty.double().quantile(TYPICAL)), LEAST_NOVELTY) if raw.novelty is not None else None
    if typical is not None:
        prediction = widen_by_novelty(raw, structures, typical)
    kinds = _kinds_of_errors(prediction, structures, targets)
    data = {kind: one.known for kind, one in kinds.items() if one.known is not None}
    weights = {kind: one.weights for kind, one in kinds.items() if one.weights is not None}
    source: dict[str, object] = {
        "held_out_structures": len(structures),
        "held_out_atoms": structures.n_atoms,
        "names": list(structures.names[:200]),
        "fingerprints": list(structures.fingerprints()),
        "how": how,
        "blind": [kind for kind, one in kinds.items() if one.known is None],
    }
    learned = Calibration.fit(data, source, weights)
    calibration = replace(
        learned,
        kinds={k: replace(one, forbidden=kinds[k].scatter) if one.n else one for k, one in learned.kinds.items()},
        typical_novelty=typical,
        sample_scale=sample_spread(structures, targets, raw) if "forces" in data else None,
        unsampled=kinds["forces"].unsampled if "forces" in data else 1.0,
    )
    if prediction.forces_variance is not None and "forces" in data:
        source |= _misspecification(calibration, raw, structures, targets)
    return replace(calibration, source=source)


class _ErrorsOfKind(NamedTuple):
    """What is known of the errors of a kind.

    Attributes:
        known: None where nearly all labels vanish by symmetry. weights: of the parts of the variance; None = 1 each.
        scatter: of labels where symmetry forbids them, 0 if not known. unsampled: see `unsampled_factor`.
    """

    known: KnownErrors | None
    weights: Tensor | None = None
    scatter: float = 0.0
    unsampled: float = 1.0


def _kinds_of_errors(prediction: Prediction, structures: Structures, targets: Targets) -> dict[str, _ErrorsOfKind]:
    """By kind, forces first; those without labels or variances are left out."""
    out: dict[str, _ErrorsOfKind] = {}
    of_forces: Tensor | None = None
    for kind in ("forces", "energies", "stresses"):
        if getattr(prediction, VARIANCE_FIELDS[kind]) is None:
            continue
        errors, parts, species = split_residuals(kind, structures, targets, prediction)
        labelled = ~errors.isnan() & parts.isfinite().all(1)
        # components that vanish by symmetry say nothing of the size of errors, and there may be many (strained crystals)
        usable = labelled & ~zero_by_symmetry(kind, targets, prediction, parts)
        if int(usable.sum()) < (FEW if usable.sum() < labelled.sum() else 1):
            out |= {kind: _ErrorsOfKind(None)} if labelled.any() else {}
            continue
        forbidden = errors[labelled & ~usable]
        scatter = forbidden.square().mean().sqrt().item() if len(forbidden) >= FEW and kind != "energies" else 0.0
        errors, parts, species = errors[usable], parts[usable], species if species is None else species[usable]
        weights = _weights(errors, parts, of_forces)
        of_forces = weights if of_forces is None else of_forces
        used = (torch.ones(parts.shape[1]) if weights is None else weights).to(parts)
        known = KnownErrors(errors, (parts @ used).sqrt(), species)
        if len(structures) >= FEWEST:
            owner = structure_of_error(kind, structures).to(errors.device)[usable]
            labels = tuple(targets.config_types[i] for i in owner.tolist())
            mean, squared_force = (
                x.repeat_interleave(len(usable) // len(x), 0)[usable] for x in invariants(kind, prediction, structures)
            )
            known = KnownErrors(*known[:3], owner, labels, mean * used, squared_force)
        out[kind] = _ErrorsOfKind(known, weights, scatter, unsampled_factor(parts, used))
    return out


def _weights(errors: Tensor, parts: Tensor, of_forces: Tensor | None) -> Tensor | None:
    """Weights of the parts of a variance: those of the forces, as far as it is the same process; None = there are too few errors."""
    if of_forces is None:
        if len(errors) < ENOUGH:
            return None
        inducing, opened, constant = fit_variance_weights(errors, parts).tolist()
    else:  # its parts have the weights of the forces; noise is separate for each kind
        inducing, opened, constant = of_forces.tolist()
        if len(errors) >= FEW:
            both = torch.stack([inducing * parts[:, 0] + opened * parts[:, 1], parts[:, 2]], dim=1)
            common, constant = fit_variance_weights(errors, both).tolist()
            inducing, opened = common * inducing, common * opened
    return torch.tensor([inducing, opened, max(constant, LEAST)], dtype=torch.float64)


def _misspecification(
    calibration: Calibration, raw: Prediction, structures: Structures, targets: Targets
) -> dict[str, float]:
    """Sizes of forces and of what the model class misses of them, for the record: of a typical atom, as a few may be far out."""
    labels = targets.forces[~targets.forces.isnan()]
    sizes = {"force_eV_per_A": labels.square().mean().sqrt().item()}
    calibrated = calibrate_prediction(raw, structures, calibration).forces_variance
    if calibrated is not None:
        sizes["misspecification_eV_per_A"] = (
            calibrated.misspecification.sum(1).div(3).nanmedian().clamp_min(0).sqrt().item()
        )
    return sizes


def sample_spread(structures: Structures, targets: Targets, raw: Prediction) -> float | None:
    """The factor by which deviations of posterior samples get the size of the errors of forces, less their constant part.

    A sample differs from the mean by the posterior covariance alone; errors have other causes as well. The factor fits the errors that
    grow with the posterior variance; the others, label noise among them, are no function of the structure that could be drawn.
    None where too few errors are known.
    """
    errors, parts, _ = split_residuals("forces", structures, targets, raw)
    usable = ~errors.isnan() & parts.isfinite().all(1) & ~zero_by_symmetry("forces", targets, raw, parts)
    if int(usable.sum()) < ENOUGH:
        return None
    return float(fit_variance_weights(errors[usable], parts[usable][:, 1:])[0]) ** 0.5


def unsampled_factor(parts: Tensor, weights: Tensor) -> float:
    """Median over force components of (inducing + data) / data, with their weights: what samples show is the latter.

    Args:
        parts: (n, 3) of variances of forces (`split_residuals`); weights: (3,).
    """
    inducing, data, _ = (parts * weights.to(parts)).unbind(1)
    return float(1 + (inducing / data).nan_to_num(0.0, posinf=0.0).median())


def calibration_warnings(calibration: Calibration, label_noise: dict[str, float]) -> list[str]:
    """Warnings of a kind whose held-out errors all vanish by symmetry, and of a model class that misses much of the forces."""
    out = [
        f"Error bars of {kind} are not calibrated: nearly all {kind} of the structures set aside vanish by symmetry. Add structures with "
        "displaced atoms, above all if the model is to be used for dynamics."
        for kind in calibration.source.get("blind", ())
    ]
    misfit, size = (calibration.source.get(key, 0.0) for key in ("misspecification_eV_per_A", "force_eV_per_A"))
    if misfit < LARGE * size or not size:
        return out
    removed = label_noise.get("forces", 0.0) < REMOVED * size
    net = " (net forces were removed from the labels: what noise they have counts here too)" if removed else ""
    return [
        *out,
        f"Misspecification: the model class misses held-out forces (rms {size:.3g} eV/A) by about {misfit:.2g} eV/A that is neither "
        f"noise of the labels nor lack of data{net}. Try a longer descriptor.cutoff first, then larger l_max and n_max, then more "
        "inducing points.",
    ]


@dataclass(frozen=True, eq=False)
class PrequentialPrediction:
    """An uncalibrated prediction that was made before the labels of its structures were learned from."""

    structures: Structures
    targets: Targets
    prediction: Prediction

    def with_amplitude(self, ratio: float) -> PrequentialPrediction:
        """As of variances whose part due to the inducing set is so many times as large."""
        fields = ("energies_variance", "forces_covariance", "stresses_covariance")
        parts = {name: v for name in fields if (v := getattr(self.prediction, name)) is not None}
        larger: dict[str, Any] = {name: replace(v, inducing=ratio * v.inducing) for name, v in parts.items()}
        return replace(self, prediction=replace(self.prediction, **larger))


def latest_prequential(predictions: tuple[PrequentialPrediction, ...]) -> tuple[PrequentialPrediction, ...]:
    """The latest predictions, as many as a calibration needs."""
    count, components = 0, 0
    for one in reversed(predictions):
        if count >= FEWEST_PREQUENTIAL and components >= COMPONENTS:
            break
        count, components = count + 1, components + int(one.targets.forces.isfinite().sum())
    return predictions[len(predictions) - count :]


def prequential_calibration(predictions: Sequence[PrequentialPrediction]) -> Calibration:
    """Calibration from prequential errors; standard deviations are larger by small_sample_factor, intervals are not.

    Novelty does not enter: each was measured against the data of its time, by which one and the same environment may have had a
    hundredth of its novelty of now.
    """
    structures = Structures.concatenate([f.structures for f in predictions])
    targets = Targets.concatenate([f.targets for f in predictions])
    names = [n for n in Prediction.__dataclass_fields__ if n not in ("energies", "forces")]
    shared = [n for n in names if n != "novelty" and all(getattr(f.prediction, n) is not None for f in predictions)]
    dropped: dict[str, Any] = {n: None for n in names if n not in shared}
    parts = [replace(f.prediction, **dropped) for f in predictions]
    prediction = Prediction.concatenate(parts)
    learned = learn_calibration(prediction, structures, targets, HOW)
    kinds = {}
    for name, kind in learned.kinds.items():
        errors = mean_square_residuals(name, kind, structures, targets, prediction) if kind.n else torch.zeros(0)
        kinds[name] = kind.widen_std(small_sample_factor(errors)) if len(errors) else kind
    return replace(learned, kinds=kinds)


def small_sample_factor(squares: Tensor) -> float:
    """√(ν / (ν - 2)), the factor on a standard deviation estimated from few structures: a new error is distributed as Student's t.

    As in `left_out_calibration`, with ν of `degrees_of_freedom`. With a factor that hardly ever is too small a learning run asks for labels
    that are not needed (decision 015).

    Args:
        squares: (n,) mean (error/σ)² of each structure.
    """
    if not squares.mean() > 0:
        return 1.0
    degrees = max(degrees_of_freedom(squares), LEAST_FREEDOM)
    return (degrees / (degrees - 2)) ** 0.5
