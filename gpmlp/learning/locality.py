"""Locality: how much of a force depends on atoms beyond a cutoff, so that a potential of that cutoff cannot know it.

With an oracle, atoms farther than R from a central one are redrawn, and the spread of the force on it is measured (Deringer and Csányi,
Phys. Rev. B 95, 094203 (2017)). Without one, small fits say from which cutoff on a longer one does not help.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Targets, json_value
from gpmlp.core.structures import Structures
from gpmlp.fitting.cutoff_fits import CUTOFFS, CutoffFit, default_cutoff, fit_cutoffs
from gpmlp.fitting.report import Progress
from gpmlp.learning.force_decay import RESOLVED, DecayLaw, fit_decay
from gpmlp.learning.oracles.oracle import OracleRecipe
from gpmlp.learning.redraws import LocalityFloor, Redraws, draw_spheres, measure_floors
from gpmlp.potential.evaluation import evaluate
from gpmlp.potential.potential import Potential
from gpmlp.recipe import Recipe

NEGLIGIBLE = 0.3  # share of the force error (9 % of its square) up to which what is beyond the cutoff does not matter
FLAT = 1.2  # noise, or error, of a small fit over that with a longer cutoff, up to which that does not help
FORESEEN = 20  # structures, whose error bars say what the force error is where there are no labels
LONGEST = 8.0  # A, that a cutoff may reasonably have


@dataclass(frozen=True)
class Locality:
    """Whether a cutoff is long enough, and what that is judged by.

    Attributes:
        floors: by radius, with an oracle; law: of their decay; fits: by cutoff, without one.
        cutoff: that is judged, A; force_error: rmse of a model with it, eV/A; error_of: which model, on what.
        whole: radius of a sphere that holds every structure, A; infinite where one is periodic.
        settings: of the redraws.
    """

    floors: tuple[LocalityFloor, ...]
    fits: tuple[CutoffFit, ...]
    law: DecayLaw
    cutoff: float
    force_error: float
    error_of: str
    whole: float
    settings: Redraws

    @property
    def verdict(self) -> str:
        """'fine', 'longer cutoff', 'charges' or 'dispersion'; 'unknown' where there is no force error to compare with."""
        return self._judged[0]

    @property
    def sentence(self) -> str:
        """The verdict with its reasons."""
        return self._judged[1]

    @property
    def floor(self) -> float:
        """Spread due to atoms beyond the cutoff that is judged, eV/A, between radii and beyond them by the law."""
        known = [(f.radius, f.spread) for f in self.floors]
        for (a, low), (b, high) in zip(known, known[1:], strict=False):
            if a <= self.cutoff <= b and min(low, high) > RESOLVED:
                return low * (high / low) ** ((self.cutoff - a) / (b - a))
        radius, spread = min(known, key=lambda one: abs(one[0] - self.cutoff))
        return spread * (1.0 if radius == self.cutoff else self.law.ratio(radius, self.cutoff))

    @property
    def _judged(self) -> tuple[str, str]:
        return _judge_floors(self) if self.floors else _judge_fits(self.fits, self.cutoff)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, units in the keys; null where there is no number."""
        floors = [
            {
                "radius_A": one.radius,
                "spread_meV_per_A": 1e3 * one.spread,
                "standard_error_meV_per_A": 1e3 * one.error,
                "spread_by_species_meV_per_A": {symbol: 1e3 * value for symbol, value in one.species.items()},
                "labels": one.labels,
            }
            for one in self.floors
        ]
        fits = [
            {"cutoff_A": one.cutoff, "noise_meV_per_A": 1e3 * one.noise, "force_rmse_meV_per_A": 1e3 * one.rmse}
            for one in self.fits
        ]
        content = {
            "verdict": self.verdict,
            "sentence": self.sentence,
            "floors": floors,
            "decay": {"kind": self.law.kind, "exponent": self.law.exponent, "length_A": self.law.length},
            "fits": fits,
            "cutoff_A": self.cutoff,
            "floor_at_cutoff_meV_per_A": 1e3 * self.floor if floors and self.cutoff == self.cutoff else None,
            "force_error_meV_per_A": 1e3 * self.force_error,
            "force_error_of": self.error_of,
        }
        if floors:
            chosen = self.settings
            content |= {"displacement_A": chosen.displacement, "draws": chosen.draws, "seed": chosen.seed}
        return json_value(content)


def _judge_floors(found: Locality) -> tuple[str, str]:
    last = found.floors[-1]
    if found.law.kind == "none":
        left = (
            "the radii are too few or too short to tell how that decays"
            if last.spread > RESOLVED
            else "nothing is left"
        )
        decay = f"{left} beyond {last.radius:g} A"
    elif found.law.kind == "exponential":
        decay = f"it falls exponentially, by a factor e every {found.law.length:.2g} A"
    else:
        what = "as between charges" if found.law.kind == "Coulomb" else "as dispersion does"
        decay = f"force constants fall as r^-{found.law.exponent:.1f}, {what}"
    if not found.force_error == found.force_error:
        text = f"The spread due to atoms beyond {last.radius:g} A is {1e3 * last.spread:.2g} meV/A; {decay}."
        return "unknown", f"{text} With a model, or labels, it would be compared with a force error."
    floor, error = found.floor, found.force_error
    text = (
        f"Atoms beyond the cutoff of {found.cutoff:.3g} A move forces by {1e3 * floor:.2g} meV/A, {100 * floor / error:.0f} % of "
        f"the force error ({1e3 * error:.3g} meV/A, {found.error_of}); {decay}."
    )
    if floor <= NEGLIGIBLE * error:
        return "fine", f"Fine as it is: {text[0].lower()}{text[1:]}"
    enough = min(
        found.law.reach(found.cutoff, NEGLIGIBLE * error / floor),
        found.whole,
        *(f.radius for f in found.floors if f.radius > found.cutoff and f.spread <= NEGLIGIBLE * error),
    )
    cutoff = f"a cutoff of {enough:.1f} A would make that {100 * NEGLIGIBLE:.0f} %"
    cutoff = cutoff if enough < math.inf else "longer radii would say which"
    if found.law.kind in ("exponential", "none") or found.whole <= LONGEST:
        return "longer cutoff", f"Take a longer cutoff: {cutoff}. {text}"
    advice = f"; {cutoff}" if enough <= LONGEST else ""
    if found.law.kind == "Coulomb":
        return "charges", f"Add charges (long_range: {{charges: auto}}){advice}. {text}"
    return "dispersion", f"Add dispersion (long_range: {{dispersion: ...}}){advice}. {text}"


def _judge_fits(fits: Sequence[CutoffFit], cutoff: float) -> tuple[str, str]:
    flat = next(
        f
        for i, f in enumerate(fits)
        if all(f.noise <= FLAT * g.noise and f.rmse <= FLAT * g.rmse for g in fits[i + 1 :])
    )
    at = min(fits, key=lambda f: abs(f.cutoff - cutoff))
    numbers = f"{1e3 * flat.noise:.3g} and {1e3 * flat.rmse:.3g} meV/A; with {at.cutoff:.3g} A {1e3 * at.noise:.3g} and {1e3 * at.rmse:.3g}"
    what = "Noise of forces and error on held-out structures of small fits"
    text = f"{what} are flat from {flat.cutoff:.3g} A on ({numbers})"
    if flat.cutoff <= cutoff:
        return "fine", f"{text}: the cutoff of {cutoff:.3g} A is fine as it is."
    if flat is not fits[-1]:
        return "longer cutoff", f"{text}: take a longer cutoff than {cutoff:.3g} A."
    return "longer cutoff", (
        f"{what} still fall at the longest cutoff, {flat.cutoff:.3g} A ({numbers}): take a longer one. With an oracle (--oracle) it can be "
        "told whether charges or dispersion are what is missing."
    )


def locality(
    structures: Structures,
    targets: Targets | None = None,
    oracle: OracleRecipe | None = None,
    potential: Potential | None = None,
    folder: Path = Path("locality"),
    redraws: Redraws | None = None,
    recipe: Recipe | None = None,
    progress: Progress = lambda *_: None,
) -> Locality:
    """Judge whether a cutoff is long enough for the forces in structures like these.

    With an oracle all atoms farther than R from a central one are redrawn, and the spread of the force on it is compared with the force
    error of the potential. Without one, small fits with different cutoffs show where a longer one stops to help. A force F = -∂E/∂r of
    local energies sees up to twice their cutoff, through neighbours in common; what is compared is what no direct term of that cutoff has.

    Args:
        targets: labels; needed without an oracle, and for the force error.
        oracle: which code computes forces, as in a learning run.
        potential: whose cutoff and force error are judged; None: those of a small fit to the labels by `recipe`.
        folder: keeps the labels of the oracle (labels.xyz), so that the same call goes on after an interruption.
        redraws: what is redrawn; its radii are the cutoffs of the small fits where there is no oracle.
        progress: called as progress(stage, done, total, note).

    Raises:
        UserError: a radius for which no structure has room; an oracle that fails (names the structure); neither oracle nor forces.
    """
    chosen, recipe = redraws or Redraws(), recipe or Recipe()
    labelled = targets is not None and bool(targets.forces.isfinite().any())
    if oracle is None and not labelled:
        raise UserError(
            "The data have no forces that small fits could learn; give labelled data, or an oracle (--oracle RECIPE)."
        )
    cutoff, error, error_of = math.nan, math.nan, ""
    if potential is not None:
        cutoff = potential.cutoff
        error, error_of = _model_error(potential, structures, targets if labelled else None, chosen.seed, progress)
    elif labelled:
        assert targets is not None
        cutoff = default_cutoff(structures, targets, recipe)
    if oracle is None:
        assert targets is not None
        cutoffs = sorted({*(chosen.radii or CUTOFFS), cutoff})
        fits = fit_cutoffs(structures, targets, recipe, cutoffs, chosen.seed, progress)
        return Locality((), fits, DecayLaw("none"), cutoff, error, error_of, math.inf, chosen)
    if potential is None and labelled:
        assert targets is not None
        (one,) = fit_cutoffs(structures, targets, recipe, [cutoff], chosen.seed, progress)
        error, error_of = one.rmse, "small fit, held-out structures"
    spheres, radii = draw_spheres(structures, chosen, cutoff)
    floors = measure_floors(spheres, radii, oracle, folder, chosen, progress)
    isolated = not bool(structures.periodic.any())
    whole = max(float(sphere.distances.max()) for sphere in spheres) if isolated else math.inf
    return Locality(floors, (), fit_decay(floors, spheres), cutoff, error, error_of, whole, chosen)


def _model_error(
    potential: Potential, structures: Structures, targets: Targets | None, seed: int, progress: Progress
) -> tuple[float, str]:
    """Rmse of force components (eV/A), by the labels or, without them, as the potential itself predicts it; and which it is."""
    if targets is not None:
        return 1e-3 * evaluate(
            potential, structures, targets, progress, False
        ).overall.force_rmse_meV_per_A, "model, labels of the data"
    if potential.variances is None:
        raise UserError(
            "The data have no forces and the model no error bars to judge it by; give labelled data, or another model."
        )
    some = np.random.default_rng([seed, 3]).permutation(len(structures))[:FORESEEN].tolist()
    variance = potential(structures.select(some), variance="forces").forces_variance
    assert variance is not None
    return float(variance.total.mean().sqrt()), "model, its own error bars"
