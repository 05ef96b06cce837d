"""OnlineModel is the model of a learning run, updated label by label; labels and their order alone determine it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from gpmlp.core.quantities import Targets, json_value
from gpmlp.core.structures import Structures
from gpmlp.fitting import calibrate
from gpmlp.fitting.calibrate import PrequentialPrediction
from gpmlp.fitting.online import OnlineFit
from gpmlp.learning.labels import LabelEntry
from gpmlp.learning.recipe import RefreshRecipe
from gpmlp.learning.triggers import force_error_bound, frame_exceedance
from gpmlp.potential.potential import Potential
from gpmlp.recipe import Recipe
from gpmlp.uncertainty.calibration import Calibration, calibrate_prediction

DIGITS = 4  # significant, of numbers that are many

SHARE, FEWEST = 12, 4  # labels between two refreshes: a SHARE-th of those there are, FEWEST at least
GROWTH = 1.3  # of the labels, at which a refresh fits all of them together: all fits then take a few times the last
LATEST = 12  # labels asked for that say how errors of the model as it is agree with its standard deviations
PRIOR_LABELS = 2  # as many as which errors and standard deviations are supposed to agree beforehand
PRIOR_EXCEEDANCES = 2.0  # as many errors beyond the limit as were foreseen are supposed to have been seen beforehand
RECENT = 3  # labels over which the likelihood is averaged before it counts as having drifted


@dataclass(frozen=True, eq=False)
class OnlineModel:
    """The model after some labels.

    Attributes:
        fitted_labels: how many there were when the model was last fitted to all of them together.
        since_refresh: labels since hyperparameters were refreshed.
        nll: prequential negative log likelihood per force component (nats, eV/A) of these labels.
        expected_nll: the same right after the refresh, of the labels it was calibrated with; NaN = unknown.
    """

    online: OnlineFit
    refresh: RefreshRecipe
    fitted_labels: int
    since_refresh: int = 0
    nll: tuple[float, ...] = ()
    expected_nll: float = math.nan

    @staticmethod
    def from_labels(entries: Sequence[LabelEntry], recipe: Recipe, refresh: RefreshRecipe) -> OnlineModel:
        """Fit the first half of the labels together, add the others one by one after predicting them, and fit all together.

        Raises:
            UserError: fewer than two labels.
        """
        first = max(2, (len(entries) + 1) // 2)
        species = {z for e in entries for z in e.structure.distinct_species}
        while {z for e in entries[:first] for z in e.structure.distinct_species} != species:
            first += 1
        structures = Structures.concatenate([e.structure for e in entries[:first]])
        targets = Targets.concatenate([e.targets for e in entries[:first]])
        model = OnlineModel(OnlineFit.begin(structures, targets, recipe), refresh, first)
        for entry in entries[first:]:
            model = model.with_label(entry)
        fresh = model.fitted_labels == len(entries) > first  # the last of them has just brought that about
        return model if fresh else model._refreshed("after the first labels", anew=True)

    @property
    def potential(self) -> Potential:
        return self.online.potential

    def error_spread(self, asked: int) -> float:
        """Factor on standard deviations of forces with which the errors of the labels agree that were asked for last.

        exp(Σ log(e/b) / (n + PRIOR_LABELS)) over the latest n labels, with e the largest force error of a label as predicted before it was
        learned and b the median of what it was expected to be. A label is asked for where standard deviations are largest, and these
        need not be right where all of them together are; PRIOR_LABELS are supposed to have agreed.

        Args:
            asked: how many of the labels were asked for; the LATEST of them count, as the model changes.
        """
        logs = [error_over_median(*errors) for errors in self._latest(asked)]
        known = [log for log in logs if math.isfinite(log)]
        return math.exp(sum(known) / (len(known) + PRIOR_LABELS))

    def exceedance_ratio(self, asked: int, limit: float) -> float:
        """Number of labels asked for whose force errors are beyond a limit (eV/A), over what was to be expected.

        (Σ [e > limit] + PRIOR_EXCEEDANCES) / (Σ P + PRIOR_EXCEEDANCES) over the labels of `error_spread`, with that spread. Less than 1
        counts as that where the calibration is of structures left out: a frame is labelled because its P is the largest of many, and these
        are overstated more often than not, which says nothing of frames that pass. Prequential errors are of models that knew less, and
        overstate all of them.
        """
        scaled, seen, expected = limit / self.error_spread(asked), PRIOR_EXCEEDANCES, PRIOR_EXCEEDANCES
        for norm, covariance in self._latest(asked):
            if covariance is not None and len(norm):
                seen += float(norm.max() > limit)
                expected += frame_exceedance(covariance, scaled)
        left_out = self.online.calibration.source.get("how") == calibrate.LEFT_OUT
        return max(1.0, seen / expected) if left_out else seen / expected

    def _latest(self, asked: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """`force_errors` of the LATEST labels among those asked for."""
        return self._errors[-asked:] if asked else []

    @cached_property
    def _errors(self) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        return [force_errors(one, self.online.calibration) for one in self.online.prequential[-LATEST:]]

    def with_label(self, entry: LabelEntry) -> OnlineModel:
        """Add one label; refresh what is due."""
        online = self.online.learned(entry.structure, entry.targets)
        nll = (*self.nll, prequential_nll(online.prequential[-1], self.online.calibration))
        new = replace(self, online=online.recalibrated(), since_refresh=self.since_refresh + 1, nll=nll)
        due = self.refresh.labels or max(FEWEST, online.n_labels // SHARE)
        recent = nll[-RECENT:]
        drifted = len(recent) == RECENT and sum(recent) / RECENT > self.expected_nll + self.refresh.drift
        if new.since_refresh >= due:
            return new._refreshed(f"{new.since_refresh} labels since the last")
        if drifted:
            rise = sum(recent) / RECENT - self.expected_nll
            return new._refreshed(f"the negative log likelihood of predicted forces rose by {rise:.2f}")
        return new

    def _refreshed(self, why: str, anew: bool = False) -> OnlineModel:
        """With refreshed hyperparameters; where labels have grown enough, fitted to all of them together."""
        anew = anew or self.online.n_labels >= GROWTH * self.fitted_labels
        online = self.online.rebuilt(why) if anew else self.online.refreshed(why)
        nll = [prequential_nll(f, online.calibration) for f in online.prequential]
        expected = sum(nll) / len(nll) if nll else math.nan
        return OnlineModel(online, self.refresh, online.n_labels if anew else self.fitted_labels, 0, (), expected)


def force_errors(
    predicted: PrequentialPrediction, calibration: Calibration
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(atoms,) norms of the force errors of a label as predicted before it was learned (eV/A), and their covariances (None = unknown),
    of atoms with labels."""
    prediction = calibrate_prediction(predicted.prediction, predicted.structures, calibration)
    norm = (prediction.forces - predicted.targets.forces).norm(dim=1)
    labelled, covariance = norm.isfinite(), prediction.forces_covariance
    return norm[labelled], None if covariance is None else covariance.total[labelled]


def error_over_median(norm: torch.Tensor, covariance: torch.Tensor | None) -> float:
    """log(e/b): e the largest force error of a label, b = t with P(e > t) = 1/2 if standard deviations are right
    (triggers.force_error_bound); NaN where there is no error.

    Args:
        norm, covariance: see `force_errors`.
    """
    if covariance is None or not len(norm):
        return math.nan
    median, largest = force_error_bound(covariance, 0.5, common=0.0), float(norm.max())
    return math.log(largest / median) if largest > 0 < median < math.inf else math.nan


def prequential_nll(predicted: PrequentialPrediction, calibration: Calibration) -> float:
    """Mean negative log likelihood of the force components of a label under the prediction before it was learned."""
    prediction = calibrate_prediction(predicted.prediction, predicted.structures, calibration)
    assert prediction.forces_covariance is not None
    variance = prediction.forces_covariance.total.diagonal(dim1=1, dim2=2).clamp_min(1e-12)
    error = prediction.forces - predicted.targets.forces
    labelled = error.isfinite() & variance.isfinite()
    nll = 0.5 * (error.square() / variance + (2 * torch.pi * variance).log())
    return float(nll[labelled].mean()) if labelled.any() else math.nan


def prequential_errors(predicted: PrequentialPrediction, calibration: Calibration, probability: float) -> dict:
    """Errors and standard deviations of the prediction before a label was learned, for JSON; null where there is no label.

    Args:
        calibration: as it was before this label was learned.
        probability: with which the bound may be exceeded (`trigger.probability`).

    Returns:
        bound: of the largest force error, eV/A; largest_error: that error, of atom `worst_atom`.
        force_error, force_sigma: of all components in order, eV/A; energy_error, energy_sigma: eV/atom; novelty: the largest.
    """
    prediction = calibrate_prediction(predicted.prediction, predicted.structures, calibration)
    error = (prediction.forces - predicted.targets.forces).double().cpu()
    norm = error.norm(dim=1)
    labelled = norm.isfinite()
    out: dict = {"bound": None, "largest_error": None, "worst_atom": None, "novelty": None}
    covariance = prediction.forces_covariance
    if covariance is not None:
        out["bound"] = force_error_bound(covariance.total[labelled], probability)
        out["force_sigma"] = _numbers(covariance.diagonal().total.clamp_min(0).sqrt())
    if labelled.any():
        worst = int(torch.where(labelled, norm, norm.new_full((), -1.0)).argmax())
        out |= {"largest_error": float(norm[worst]), "worst_atom": worst, "force_error": _numbers(error)}
    atoms = predicted.structures.n_atoms
    out["energy_error"] = float(prediction.energies[0] - predicted.targets.energies[0]) / atoms
    if prediction.energies_variance is not None:
        out["energy_sigma"] = float(prediction.energies_variance.total[0].clamp_min(0).sqrt()) / atoms
    if prediction.novelty is not None:
        out["novelty"] = float(prediction.novelty.max())
    return json_value(out)


def _numbers(values: torch.Tensor) -> list[float | None]:
    return [float(f"{v:.{DIGITS}g}") for v in values.double().flatten().tolist()]
