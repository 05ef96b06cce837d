"""Total charges: labels of charges that sum to another one, compositions with several, and charged cells."""

from __future__ import annotations

import torch
from torch import Tensor

from gpmlp.core.errors import hill_formula
from gpmlp.core.findings import Finding, Severity
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures

ROUNDED, ROUNDED_ATOM = 0.05, 0.005  # e, and for each atom: grids of Hirshfeld's and Bader's partitions lose that much
SAME = 1e-6  # e


def check_charges(structures: Structures, targets: Targets) -> list[Finding]:
    """Findings about total charges and the labels of charges; none where there are neither."""
    return [*other_sums(structures, targets), *unequal_charges(structures, "note"), *charged_cells(structures)]


def other_sums(structures: Structures, targets: Targets) -> list[Finding]:
    """A finding where labels of charges sum to another total charge than that of the structure."""
    sums = torch.zeros(len(structures), dtype=torch.float64)
    sums.index_add_(0, structures.structure_of_atom, targets.charges.double())
    off = (sums - structures.charges.cpu()).abs()
    wrong = off > ROUNDED + ROUNDED_ATOM * structures.counts  # NaN, where a label is unknown, is not
    if not wrong.any():
        return []
    worst = int(off.where(wrong, -1.0).argmax())
    text = (
        f"the labels of charges sum to {sums[worst]:.3f} e where the total charge is {structures.charges[worst]:g} e "
        f"({int(wrong.sum())} frames)."
    )
    numbers = {"sum_e": float(sums[worst]), "total_charge_e": float(structures.charges[worst])}
    advice = (
        "Give the total charge of these frames (charge=1), or correct the labels (--keys charges=none leaves them out)."
    )
    return [Finding("charges-sum-to-another-total", "error", text, _names(structures, worst, wrong), numbers, advice)]


def unequal_charges(structures: Structures, severity: Severity = "warning") -> list[Finding]:
    """A finding where one composition has several total charges, which a model without charges cannot tell apart."""
    charges = structures.charges.cpu()
    if not len(charges) or bool((charges - charges[0]).abs().max() < SAME):
        return []
    composition = structures.composition(structures.distinct_species).double().cpu()
    _, group = composition.unique(dim=0, return_inverse=True)
    low, high = (charges.new_zeros(int(group.max()) + 1).scatter_reduce(0, group, charges, way, include_self=False)
                 for way in ("amin", "amax"))  # fmt: skip
    several = ((high - low) > SAME)[group]
    if not several.any():
        return []
    first = int(several.nonzero()[0])
    formula = hill_formula(dict(zip(structures.distinct_species, composition[first].tolist(), strict=True)))
    values = ", ".join(f"{q:g}" for q in charges[group == group[first]].unique().tolist())
    text = (
        f"{formula} has several total charges ({values} e; {int(several.sum())} frames of such compositions): a model without charges "
        "sees the same atoms and predicts the same energy for all of them."
    )
    advice = "Fit with long_range.charges (auto or polarisable), or fit each charge by a model of its own."
    numbers = {
        "frames": float(several.sum()),
        "smallest_e": float(low[group[first]]),
        "largest_e": float(high[group[first]]),
    }
    return [Finding("total-charge-varies", severity, text, _names(structures, first, several), numbers, advice)]


def charged_cells(structures: Structures) -> list[Finding]:
    """A warning about charged structures that are periodic, whose energy is that with a neutralising background."""
    charged = ((structures.charges != 0) & structures.periodic.any(dim=1)).cpu()
    if not charged.any():
        return []
    text = f"{int(charged.sum())} periodic cells are charged: their energies are those with a uniform background, and change with the cell."
    advice = "Add a counter-ion, or compare energies of one cell only; forces between images remain."
    first = int(charged.nonzero()[0])
    return [
        Finding(
            "charged-cell",
            "warning",
            text,
            _names(structures, first, charged),
            {"frames": float(charged.sum())},
            advice,
        )
    ]


def _names(structures: Structures, first: int, which: Tensor) -> tuple[str, ...]:
    """Names of the frames, that one first."""
    return tuple(structures.names[i] for i in dict.fromkeys([first, *which.nonzero().flatten().tolist()]))
