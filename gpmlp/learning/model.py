"""A Student is a model that is taught label by label: what it knows follows from the labels and their order alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gpmlp.core.json_values import json_value
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting.calibrate import PrequentialPrediction
from gpmlp.fitting.online import OnlineFit
from gpmlp.learning.labels import Entry
from gpmlp.learning.recipe import RefreshRecipe
from gpmlp.learning.triggers import bound
from gpmlp.potential.potential import Potential
from gpmlp.recipe import Recipe
from gpmlp.uncertainty.calibration import Calibration, calibrate_prediction

DIGITS = 4  # significant, of numbers that are many

SHARE, FEWEST = 6, 4  # labels between two refreshes: a SHARE-th of those there are, FEWEST at least
GROWTH = 1.3  # of the labels since the model was made, at which a refresh makes it anew: all that takes is then a few times the last
RECENT = 3  # labels over which the likelihood is averaged before it counts as having drifted


@dataclass(frozen=True, eq=False)
class Student:
    """What is known after some labels.

    Attributes:
        made: labels there were when the model was made of all of them together.
        since: labels learned since hyperparameters were refreshed.
        surprise: negative log likelihood per force component (nats, eV/A) of labels since then, as they were foreseen.
        expected: the same right after the refresh, of those it was calibrated with; NaN = unknown.
    """

    online: OnlineFit
    refresh: RefreshRecipe
    made: int
    since: int = 0
    surprise: tuple[float, ...] = ()
    expected: float = math.nan

    @staticmethod
    def begin(entries: Sequence[Entry], recipe: Recipe, refresh: RefreshRecipe) -> Student:
        """Learn from the first half of the labels together, from the others one by one after foreseeing them, and from all together.

        Raises:
            UserError: fewer than two labels.
        """
        first = max(2, (len(entries) + 1) // 2)
        species = {z for e in entries for z in e.structure.distinct_species}
        while {z for e in entries[:first] for z in e.structure.distinct_species} != species:
            first += 1
        structures = Structures.concatenate([e.structure for e in entries[:first]])
        targets = Targets.concatenate([e.targets for e in entries[:first]])
        student = Student(OnlineFit.begin(structures, targets, recipe), refresh, first)
        for entry in entries[first:]:
            student = student.taught(entry)
        fresh = student.made == len(entries) > first  # the last of them has just brought that about
        return student if fresh else student._refreshed("after the first labels", anew=True)

    @property
    def potential(self) -> Potential:
        return self.online.potential

    def taught(self, entry: Entry) -> Student:
        """Learn one label; refresh what is due."""
        online = self.online.learned(entry.structure, entry.targets)
        surprise = (*self.surprise, surprise_of(online.prequential[-1], self.online.calibration))
        new = replace(self, online=online.recalibrated(), since=self.since + 1, surprise=surprise)
        due = self.refresh.labels or max(FEWEST, online.n_labels // SHARE)
        recent = surprise[-RECENT:]
        drifted = len(recent) == RECENT and sum(recent) / RECENT > self.expected + self.refresh.drift
        if new.since >= due:
            return new._refreshed(f"{new.since} labels since the last")
        if drifted:
            rise = sum(recent) / RECENT - self.expected
            return new._refreshed(f"the negative log likelihood of foreseen forces rose by {rise:.2f}")
        return new

    def _refreshed(self, why: str, anew: bool = False) -> Student:
        """With hyperparameters learned again; where labels have grown enough, with a model made anew of all of them."""
        anew = anew or self.online.n_labels >= GROWTH * self.made
        online = self.online.rebuilt(why) if anew else self.online.refreshed(why)
        found = [surprise_of(f, online.calibration) for f in online.prequential]
        expected = sum(found) / len(found) if found else math.nan
        return Student(online, self.refresh, online.n_labels if anew else self.made, 0, (), expected)


def surprise_of(foreseen: PrequentialPrediction, calibration: Calibration) -> float:
    """Mean negative log likelihood of the force components of a label, as they were predicted before it was learned."""
    prediction = calibrate_prediction(foreseen.prediction, foreseen.structures, calibration)
    variance = prediction.forces_covariance.total.diagonal(dim1=1, dim2=2).clamp_min(1e-12)
    error = prediction.forces - foreseen.targets.forces
    known = error.isfinite() & variance.isfinite()
    nll = 0.5 * (error.square() / variance + (2 * torch.pi * variance).log())
    return float(nll[known].mean()) if known.any() else math.nan


def plain(foreseen: PrequentialPrediction, calibration: Calibration, probability: float) -> dict:
    """Errors and standard deviations of one structure for JSON; null where there is no label.

    Args:
        calibration: as it was before this label was learned.
        probability: with which the bound may be exceeded (`trigger.probability`).

    Returns:
        bound: what the largest force error was to stay below, eV/A; largest_error: that error, of atom `worst_atom`.
        force_error, force_sigma: of all components in order, eV/A; energy_error, energy_sigma: eV/atom; novelty: the largest.
    """
    prediction = calibrate_prediction(foreseen.prediction, foreseen.structures, calibration)
    error = (prediction.forces - foreseen.targets.forces).double().cpu()
    norm = error.norm(dim=1)
    known = norm.isfinite()
    out: dict = {"bound": None, "largest_error": None, "worst_atom": None, "novelty": None}
    covariance = prediction.forces_covariance
    if covariance is not None:
        out["bound"] = json_value(bound(covariance.total[known], probability))
        out["force_sigma"] = _numbers(covariance.diagonal().total.clamp_min(0).sqrt())
    if known.any():
        worst = int(torch.where(known, norm, norm.new_full((), -1.0)).argmax())
        out |= {"largest_error": json_value(float(norm[worst])), "worst_atom": worst, "force_error": _numbers(error)}
    atoms = foreseen.structures.n_atoms
    out["energy_error"] = json_value(float(prediction.energies[0] - foreseen.targets.energies[0]) / atoms)
    if prediction.energies_variance is not None:
        out["energy_sigma"] = json_value(float(prediction.energies_variance.total[0].clamp_min(0).sqrt()) / atoms)
    if prediction.novelty is not None:
        out["novelty"] = json_value(float(prediction.novelty.max()))
    return out


def _numbers(values: torch.Tensor) -> list[float | None]:
    return json_value([float(f"{v:.{DIGITS}g}") for v in values.double().flatten().tolist()])
