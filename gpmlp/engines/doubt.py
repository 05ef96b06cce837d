"""Doubt is how sure a potential is of one frame of a run: standard deviations and novelty, the largest of each and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from ase import Atoms

from gpmlp.io.atoms import structures_from_ase
from gpmlp.potential import Potential

SUSPECTS = 4  # atoms whose forces are looked at
STRIDE = (
    100  # steps between two looks, at least, where nothing else is asked for: a look takes about as long as ten steps
)
PREFIX = "gpmlp_"


@dataclass(frozen=True, eq=False)
class Doubt:
    """Calibrated standard deviations and novelty of one frame.

    Attributes:
        local_energy_std: (atoms,) eV.
        novelty: (atoms,) Mahalanobis distance / threshold; None where the potential has none.
        force_std: eV/A, of the force vector (the root of the summed variances of its components) on the atom where it is largest of
            those looked at.
        force_atom: that atom, counted from 0.
    """

    local_energy_std: np.ndarray
    novelty: np.ndarray | None
    force_std: float
    force_atom: int

    @property
    def largest(self) -> tuple[float, float, float]:
        """Force, eV/A; local energy, eV; novelty, NaN where there is none."""
        novelty = float("nan") if self.novelty is None else float(self.novelty.max())
        return self.force_std, float(self.local_energy_std.max()), novelty

    def write_to(self, atoms: Atoms) -> None:
        """Put it into the arrays and the info of a frame."""
        atoms.set_array(f"{PREFIX}local_energy_std", self.local_energy_std)
        if self.novelty is not None:
            atoms.set_array(f"{PREFIX}novelty", self.novelty)
        atoms.info[f"{PREFIX}largest_force_std"] = self.force_std
        atoms.info[f"{PREFIX}largest_force_std_atom"] = self.force_atom


def forget(atoms: Atoms) -> None:
    """Take what gpmlp wrote of an earlier frame out of one, in place."""
    for holder in (atoms.info, atoms.arrays):
        for key in [key for key in holder if key.startswith(PREFIX)]:
            del holder[key]


def watch(potential: Potential, name: str = "atoms") -> Callable[[Atoms], Doubt]:
    """Return what says how sure the potential is of atoms.

    Variances of forces cost some twenty predictions for all atoms: they are computed of the SUSPECTS atoms at which the standard
    deviation of the local energy, times the novelty where there is one, is largest.

    Args:
        name: what error messages call the atoms.

    Raises:
        checks.UserError: the potential holds no variances.
    """
    potential.check_variance("forces")

    def look(atoms: Atoms) -> Doubt:
        structures = structures_from_ase([atoms], [name])
        seen = potential(structures, "atom_energies", novelty=potential.novelty is not None)
        local = seen.atom_energies_variance.total.sqrt()
        suspicion = local if seen.novelty is None else local * seen.novelty
        suspects = suspicion.topk(min(SUSPECTS, len(local))).indices
        variance = potential(structures, "forces", atoms=suspects).forces_variance.total[suspects].sum(1)
        worst = int(variance.argmax())
        novelty = None if seen.novelty is None else seen.novelty.cpu().numpy()
        return Doubt(local.cpu().numpy(), novelty, float(variance[worst].sqrt()), int(suspects[worst]))

    return look
