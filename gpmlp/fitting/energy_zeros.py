"""Energies of two zeros in one set: frames whose energies are off all others by the same amount per atom, as another code has them.

A constant that some frames have in addition is no noise: residuals of a fit, which forces tie together, then lie in two heaps. The heaps
are looked for along config_types and files first, and then in the residuals alone, at their widest gap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gpmlp.core.findings import Finding
from gpmlp.core.quantities import Prediction, Targets
from gpmlp.core.structures import Structures
from gpmlp.io.label_checks.totals import isolated_frames
from gpmlp.io.label_checks.work import TWO_ZEROS, ZERO_ADVICE, source_of

FEWEST, FEWEST_NAMED = 5, 4  # frames of a heap found in the residuals; of one with a name, and of all others
SMALLEST = 5e-3  # eV/atom between heaps: less is a matter of cutoffs and k-points, and of the model
LENGTH = 0.1  # A, that forces have to be wrong along to make such a difference of an atom's energy
# of the variance by heaps along names, and of those found in the residuals (one normal heap: 0.64 of many frames, of 10 up to 0.9)
EXPLAINED = 0.75, 0.9


def find_two_zeros(
    structures: Structures, targets: Targets, prediction: Prediction, used: Tensor, force_error: float
) -> list[Finding]:
    """The heap of fewer frames, if there are two; one finding at most.

    Args:
        prediction: of these structures by a fit to them; force_error: its own, eV/A.
        used: (structures,) bool, those to be judged.
    """
    residuals = ((targets.energies - prediction.energies) / structures.counts).double().cpu()
    used = used & ~residuals.isnan() & ~isolated_frames(structures, targets)
    least = max(SMALLEST, LENGTH * force_error)
    best: tuple[float, Tensor, str] | None = None
    for name, heap, explained in _heaps(structures, targets, residuals, used):
        other = used & ~heap
        if min(int(heap.sum()), int(other.sum())) < (FEWEST_NAMED if name else FEWEST):
            continue
        share = _explained(residuals[heap], residuals[other])
        apart = abs(float(residuals[heap].mean() - residuals[other].mean()))
        if share > explained and apart > least and (best is None or (bool(best[2]), best[0]) < (bool(name), share)):
            best = share, heap if heap.sum() <= other.sum() else other, name
    if best is None:
        return []
    share, heap, name = best
    other = used & ~heap
    off = float(residuals[heap].mean() - residuals[other].mean())
    within = float(
        torch.cat([residuals[heap] - residuals[heap].mean(), residuals[other] - residuals[other].mean()]).std()
    )
    index = heap.nonzero().flatten().tolist()
    alike = f", which are told apart by {name}," if name else ""
    text = (
        f"the energies of {len(index)} frames{alike} are {1e3 * off:+.3g} meV/atom off those of the other {int(other.sum())} "
        f"when forces are followed, and scatter by {1e3 * within:.2g} meV/atom within each: probably they have two zeros (code, "
        "functional, pseudopotential, settings, isolated atoms)."
    )
    numbers = {"offset_eV_per_atom": off, "scatter_eV_per_atom": within, "frames": float(len(index))}
    return [Finding(TWO_ZEROS, "warning", text, tuple(structures.names[i] for i in index), numbers, ZERO_ADVICE)]


def _heaps(
    structures: Structures, targets: Targets, residuals: Tensor, used: Tensor
) -> Iterator[tuple[str, Tensor, float]]:
    """(what names it, (structures,) bool, share of the variance it has to explain) of frames that may have a zero of their own."""
    labels: dict[str, Sequence[str]] = {
        "their config_type": targets.config_types,
        "their file": [source_of(name) for name in structures.names],
    }
    for kind, of in labels.items():
        for label in dict.fromkeys(of):
            members = used & torch.tensor([other == label for other in of])
            yield f"{kind} ({label or 'none'})", members, EXPLAINED[0]
    ordered = residuals[used].sort().values
    if len(ordered) >= 2 * FEWEST:
        inner = ordered[FEWEST - 1 : len(ordered) - FEWEST + 1]
        k = int(inner.diff().argmax())
        yield "", used & (residuals > 0.5 * (inner[k] + inner[k + 1])), EXPLAINED[1]


def _explained(heap: Tensor, other: Tensor) -> float:
    """Share of the variance of two heaps together that is between them."""
    together = torch.cat([heap, other])
    inside = (heap - heap.mean()).square().sum() + (other - other.mean()).square().sum()
    return 1 - float(inside / (together - together.mean()).square().sum().clamp_min(1e-300))
