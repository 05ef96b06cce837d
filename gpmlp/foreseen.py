"""Foreseen is what was predicted of labels before they were learned from; it tells how large errors are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from scipy.special import chdtri
from torch import Tensor

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
    """Learn it from what was foreseen; standard deviations of each kind larger by what covers, with CONFIDENCE, that structures are few.

    Intervals stay as they are. Novelty does not enter: that of each was measured by what was known then, so that one and the same
    environment had a hundredth of the novelty of now.
    """
    structures = Structures.concatenate([f.structures for f in foreseen])
    targets = Targets.concatenate([f.targets for f in foreseen])
    names = [n for n in Prediction.__dataclass_fields__ if n not in ("energies", "forces")]
    shared = [n for n in names if n != "novelty" and all(getattr(f.prediction, n) is not None for f in foreseen)]
    parts = [replace(f.prediction, **{n: None for n in names if n not in shared}) for f in foreseen]
    prediction = Prediction.concatenate(parts)
    learned = held_out.learn(prediction, structures, targets, HOW)
    kinds = {}
    for name, kind in learned.kinds.items():
        squares = held_out.squares(name, kind, structures, targets, prediction) if kind.n else ()
        kinds[name] = kind.widened(few(squares)) if len(squares) else kind
    return replace(learned, kinds=kinds)


def few(squares: Tensor) -> float:
    """Factor on a standard deviation, so that with CONFIDENCE it is not too small for what so few structures told of it.

    The true variance is less than ν/χ²_ν(1 - CONFIDENCE) times what was found (Pearson & Hartley, Biometrika Tables I, section 4).

    Args:
        squares: (n,) mean (error/σ)² of each structure.
    """
    if not squares.mean() > 0:
        return 1.0
    freedom = held_out.freedom(squares)
    return float((freedom / chdtri(freedom, CONFIDENCE)) ** 0.5)
