"""What may be wrong with charges and the data they are fitted to: slabs, nothing beyond the cutoff, fragments without a whole charge."""

from __future__ import annotations

import math

import numpy as np
import torch
from ase.data import covalent_radii
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from gpmlp.core.errors import UserError
from gpmlp.core.findings import Finding
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.io.label_checks.charges import other_sums

BONDED = 1.3  # times the sum of covalent radii
APART = 4.0  # A, least gap between fragments
FARTHEST = 10  # structures with the largest gaps that are looked at
WHOLE = 0.2  # e, by which the charge of a fragment may differ from a whole number


def refuse_other_sums(structures: Structures, targets: Targets) -> None:
    """Raise UserError where labels of charges that are to be learned from sum to another total charge."""
    for finding in other_sums(structures, targets):
        raise UserError(str(finding))


def check_structures(structures: Structures, cutoff: float) -> list[Finding]:
    """Findings about structures that charges are fitted to."""
    out = []
    slabs = (structures.periodic.sum(1) == 2).nonzero().flatten().tolist()
    if slabs:
        text = (
            f"{len(slabs)} structures are slabs: their Coulomb sum has no images along the normal, as labels of codes with three periodic "
            "axes have."
        )
        advice = "Label slabs with a correction for dipoles, or set all three axes periodic, as the labels are."
        out.append(
            Finding(
                "charges-of-slabs", "warning", text, _names(structures, slabs), {"frames": float(len(slabs))}, advice
            )
        )
    widest = max((math.inf if bool(p.any()) else _extent(x) for x, p in _each(structures)), default=0.0)
    if widest <= cutoff:
        text = (
            f"no two atoms of a structure are farther apart than the cutoff ({widest:.2f} of {cutoff:.2f} A): nothing tells charges from "
            "the rest."
        )
        advice = "Label structures with parts farther apart, or leave charges out."
        out.append(
            Finding("nothing-beyond-the-cutoff", "warning", text, (), {"widest_A": widest, "cutoff_A": cutoff}, advice)
        )
    return out


def check_fragments(structures: Structures, charges: Tensor) -> list[Finding]:
    """A finding where fragments of the structures that are farthest apart have no whole charge.

    Args:
        charges: (atoms,) e, predicted.
    """
    gaps, offsets = [], structures.offsets.tolist()
    for s, (positions, periodic) in enumerate(_each(structures)):
        if not bool(periodic.any()) and 1 < len(positions):
            species = structures.species[offsets[s] : offsets[s + 1]].numpy()
            gap, owner = fragments(positions.double().numpy(), species)
            gaps += [(gap, s, owner)] if gap > APART else []
    worst, places = (0.0, 0.0, 0.0, -1), []
    for gap, s, owner in sorted(gaps, key=lambda g: -g[0])[:FARTHEST]:
        sums = np.bincount(owner, weights=charges[offsets[s] : offsets[s + 1]].double().numpy())
        off = float(np.abs(sums - sums.round()).max())
        places += [s] if off > WHOLE else []
        worst = max(worst, (off, float(sums[np.abs(sums - sums.round()).argmax()]), gap, s))
    if not places:
        return []
    off, charge, gap, s = worst
    text = (
        f"a fragment {gap:.1f} A from the others has the charge {charge:.2f} e, far from a whole number ({len(places)} of "
        f"{min(len(gaps), FARTHEST)} structures)."
    )
    advice = "Energies of parts that leave each other will be wrong; label structures with parts farther apart."
    numbers = {"fragment_charge_e": charge, "gap_A": gap}
    return [
        Finding("fragments-without-whole-charge", "warning", text, _names(structures, [s, *places]), numbers, advice)
    ]


def fragments(positions: np.ndarray, species: np.ndarray) -> tuple[float, np.ndarray]:
    """The smallest gap between atoms of different bonded fragments (A; 0 where there is one), and the fragment of each atom."""
    distance = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    radii = covalent_radii[species]
    count, owner = connected_components(distance < BONDED * (radii[:, None] + radii))
    other = owner[:, None] != owner[None]
    return (float(distance[other].min()) if count > 1 else 0.0), owner


def _each(structures: Structures) -> list[tuple[Tensor, Tensor]]:
    """Positions and periodicity of each structure."""
    return list(zip(structures.positions.split(structures.counts.tolist()), structures.periodic, strict=True))


def _extent(positions: Tensor) -> float:
    return float(torch.cdist(positions, positions).max()) if len(positions) else 0.0


def _names(structures: Structures, indices: list[int]) -> tuple[str, ...]:
    return tuple(structures.names[i] for i in dict.fromkeys(indices))
