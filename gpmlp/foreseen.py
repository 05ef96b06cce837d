"""Foreseen is what was predicted of labels before they were learned from; it tells how large errors are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from scipy.special import chdtri

from gpmlp import held_out
from gpmlp.quantities import Prediction, Targets
from gpmlp.structures import Structures
from gpmlp.uncertainty.calibration import Calibration

FEWEST = 8  # latest structures, at least, whose predictions are kept,
COMPONENTS = 1000  # and force components that they have together: older predictions are of models that knew less
CONFIDENCE = 0.9  # that the standard deviations are not too small: of few structures their size is not known well
HOW = "predicted before they were learned from, in the order in which they came (prequential)"


@dataclass(frozen=True, eq=False)
class Foreseen:
    """What was predicted of structures, uncalibrated, before their labels were learned from."""

    structures: Structures
    targets: Targets
    prediction: Prediction


def latest(foreseen: tuple[Foreseen, ...]) -> tuple[Foreseen, ...]:
    """The latest ones that tell enough."""
    kept, components = 0, 0
    for one in reversed(foreseen):
        if kept >= FEWEST and components >= COMPONENTS:
            break
        kept, components = kept + 1, components + int(one.targets.forces.isfinite().sum())
    return foreseen[len(foreseen) - kept :]


def calibration(foreseen: Sequence[Foreseen]) -> Calibration:
    """Learn it from what was foreseen; standard deviations by the factor larger that covers, with CONFIDENCE, that n structures are few.

    The errors of a structure belong together, so that n structures tell a variance as n normal numbers do: it is less than
    n / χ²_n(1 - CONFIDENCE) of what was found (Pearson & Hartley, Biometrika Tables I, section 4). Intervals stay as they are.

    Novelty does not enter: that of each was measured by what was known then, so that one and the same environment had a hundredth of
    the novelty of now.
    """
    structures = Structures.concatenate([f.structures for f in foreseen])
    targets = Targets.concatenate([f.targets for f in foreseen])
    names = [n for n in Prediction.__dataclass_fields__ if n not in ("energies", "forces")]
    shared = [n for n in names if n != "novelty" and all(getattr(f.prediction, n) is not None for f in foreseen)]
    parts = [replace(f.prediction, **{n: None for n in names if n not in shared}) for f in foreseen]
    learned = held_out.learn(Prediction.concatenate(parts), structures, targets, HOW)
    factor = float((len(structures) / chdtri(len(structures), CONFIDENCE)) ** 0.5)
    return replace(
        learned, kinds={name: kind.widened(factor) if kind.n else kind for name, kind in learned.kinds.items()}
    )
