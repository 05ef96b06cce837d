"""GPMinimizer is an optimizer of ASE that relaxes on the posterior of the labels so far, and asks the calculator where it arrives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from ase import Atoms
from ase.optimize import BFGS
from ase.optimize.optimize import Optimizer

from gpmlp.core.errors import UserError
from gpmlp.learning.paths.oracle import SearchError
from gpmlp.learning.paths.surface import Surface, surface_recipe
from gpmlp.properties.constraints import check_constraints

TRUST = 0.3  # A that an atom may move away from the lowest label in one step
LONGEST_STEP = 0.1  # A, of the relaxation on the posterior
SHARPER = 0.3  # of fmax, to which the posterior is relaxed
STEPS = 100  # of that relaxation at most
MOVED = 1e-5  # A; a label no farther from another teaches nothing: then a step along the forces is made
MOST_LABELS = 100  # of the relaxation of an end point
PLAIN_STEP = 0.01  # A per eV/A, of such a step: it descends wherever there is less than 200 eV/A^2


class GPMinimizer(Optimizer):
    """Relaxes atoms in a fixed cell with few calls of their calculator (the oracle); used as BFGS of ASE is.

        atoms.calc = EMT()
        GPMinimizer(atoms, logfile="-").run(fmax=0.02)

    Each step fits the exact Gaussian process of all labels so far, relaxes on its mean from the lowest of its own labels until no force is
    above SHARPER x fmax or an atom has moved TRUST, and calls the calculator there once. It has converged when the calculator's own
    forces are below fmax.

    Attributes:
        surface: the labels so far, and their posterior.
    """

    def __init__(self, atoms: Atoms, surface: Surface | None = None, **about: Any) -> None:
        """Take atoms that have a calculator.

        Args:
            surface: labels that are there already, of any structures of these elements; none if not given.
            about: logfile, trajectory, append_trajectory and what else an optimizer of ASE takes; `restart` has no meaning.

        Raises:
            UserError: a filter for the cell in place of Atoms, atoms without a calculator, a constraint that is not supported.
        """
        if not isinstance(atoms, Atoms):
            raise UserError(
                f"GPMinimizer relaxes atoms in a fixed cell; got {type(atoms).__name__}. Give it Atoms, not a filter."
            )
        if atoms.calc is None:
            raise UserError("The atoms have no calculator to label them: set atoms.calc first.")
        if about.get("restart") is not None:
            raise UserError("GPMinimizer has no restart file; give the labels that are there as `surface`.")
        check_constraints(atoms, "The atoms")
        self.surface = Surface(surface_recipe()) if surface is None else surface
        self._others = len(self.surface.labels)  # of structures elsewhere, of which one may lie lower
        super().__init__(atoms, **about)

    def step(self) -> None:
        """Learn the label of the present structure, relax on the posterior, and move there.

        Raises:
            UserError: the calculator's energy or forces are not finite.
        """
        self.surface = self.surface.with_oracle(self.atoms)
        own = self.surface.labels[self._others :]
        work, lowest = self.atoms.copy(), min(own, key=lambda label: label.get_potential_energy())
        work.positions = lowest.positions
        assert self.fmax is not None
        descend(work, self.surface, self.fmax, lambda: _moved(work, lowest) > TRUST)
        if min(_moved(work, label) for label in self.surface.labels) < MOVED:
            work.positions, forces = self.atoms.positions, self.atoms.get_forces()
            work.set_positions(work.positions + PLAIN_STEP * forces / max(1.0, np.abs(forces).max()))
        self.atoms.set_positions(work.positions)


def relaxed_surface(atoms: Atoms, surface: Surface, fmax: float, what: str) -> Surface:
    """Relax atoms that have a calculator; the surface with all their labels, of which the last is of the atoms at rest.

    Raises:
        SearchError: `what` is not at rest after MOST_LABELS labels.
    """
    relaxation = GPMinimizer(atoms, surface, logfile=None)
    if not relaxation.run(fmax, MOST_LABELS):
        raise SearchError(f"{what} is not at rest after {MOST_LABELS} labels: relax it first.")
    return relaxation.surface.with_oracle(atoms)


def descend(atoms: Atoms, surface: Surface, fmax: float, far: Callable[[], bool]) -> None:
    """Relax atoms on the posterior mean until no force is above SHARPER x fmax or they are too far."""
    atoms.calc = surface.calculator()
    for _ in BFGS(atoms, logfile=None, maxstep=LONGEST_STEP).irun(fmax=SHARPER * fmax, steps=STEPS):
        if far():
            break


def _moved(atoms: Atoms, before: Atoms) -> float:
    """The farthest that an atom has moved, A."""
    return float(np.linalg.norm(atoms.positions - before.positions, axis=1).max())
