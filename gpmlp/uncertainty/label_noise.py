"""Label noise shows where labels break a law that every potential obeys."""

from __future__ import annotations

import math

from gpmlp.quantities import Targets
from gpmlp.structures import Structures


def of_forces(structures: Structures, targets: Targets) -> float:
    """Standard deviation of the noise of force labels, eV/A, from the net force of each structure; NaN if no structure tells.

    Forces of any translation-invariant energy sum to zero, whatever the cutoff or the descriptor, so the sum over N atoms of labels
    with independent noise has the variance N σ² in each direction and nothing else in it: σ² = Σ_s |Σ_i F_i|² / (3 Σ_s N_s). What
    evidence calls noise beyond that is what the model class cannot express. Codes that subtract the net force give 0.
    """
    known = ~targets.forces.isnan().any(1)
    whole = known.new_ones(len(structures)).index_put((structures.structure_of_atom[~known],), known.new_zeros(()))
    whole &= structures.counts > 1
    if not whole.any():
        return math.nan
    net = targets.forces.nan_to_num().new_zeros(len(structures), 3)
    net = net.index_add(0, structures.structure_of_atom, targets.forces.nan_to_num())
    return (net[whole].square().sum() / (3 * structures.counts[whole].sum())).sqrt().item()
