"""Net forces: whether the forces on the atoms of a structure add up to zero."""

from __future__ import annotations

import torch

from gpmlp.core.findings import Finding
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures

SHARE, SMALLEST = 0.3, 0.05  # of what forces usually are; eV/A


def check_net_forces(structures: Structures, targets: Targets) -> list[Finding]:
    """Forces that do not add up to zero, as those of every potential do; of whole frames with more than one atom."""
    owner, forces = structures.structure_of_atom, targets.forces.double()
    empty = torch.zeros(len(structures), 3, dtype=torch.float64)
    sums, squares = empty.index_add(0, owner, forces), empty.index_add(0, owner, forces.square())
    known = ~sums.isnan().any(1) & (structures.counts > 1)
    # errors of single forces that would make such a sum
    size = (sums.square().sum(1) / structures.counts / 3).sqrt()
    usual = (squares.sum(1) / structures.counts / 3).sqrt()
    frames = (known & (size > (SHARE * usual).clamp_min(SMALLEST))).nonzero().flatten()
    if not len(frames):
        return []
    worst = frames[size[frames].argsort(descending=True)].tolist()
    net = float(sums[worst[0]].norm())
    text = (
        f"the forces of {len(worst)} of {int(known.sum())} frames do not add up to zero: in the worst they leave {net:.3g} eV/A, as errors "
        f"of {float(size[worst[0]]):.2g} eV/A of each component would, where forces are {float(usual[worst[0]]):.2g} eV/A. No potential "
        "has such forces; a fit takes them for noise."
    )
    numbers = {"net_force_eV_per_A": net, "frames": float(len(worst))}
    advice = "Compute them again; where a part of the atoms is meant (fixed ones, a region, a field), give the others no force (NaN)."
    return [Finding("net-forces", "warning", text, tuple(structures.names[f] for f in worst), numbers, advice)]
