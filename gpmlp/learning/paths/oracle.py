"""An OracleCalculator is the oracle of a path as a calculator of ASE: it counts its calls, and says of each failure where it happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from gpmlp.core.errors import UserError
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.learning.label_requests import LabelRequest, LabelRequests
from gpmlp.learning.labels import LabelEntry, canonical_structure


class SearchError(UserError):
    """What ends one search, but no exploration of many: a structure that the oracle has no label of, a relaxation that takes too long."""


class OracleCalculator(Calculator):
    """Energy and forces of another calculator, which constraints of the atoms do not concern.

    Attributes:
        reason: what is being asked for: 'the start', 'image 3 of 8 (the top)'; in errors.
        calls: how often it was asked.
    """

    implemented_properties = ["energy", "forces"]  # noqa: RUF012 - as ASE declares it

    def __init__(self, calculator: Any, reason: str = "the structure") -> None:
        super().__init__()
        self.inner, self.reason, self.calls = calculator, reason, 0

    @staticmethod
    def around(calculator: Any) -> OracleCalculator:
        """The calculator as an oracle, unless it is one."""
        return calculator if isinstance(calculator, OracleCalculator) else OracleCalculator(calculator)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Raises UserError: the calculator failed, or its answer is not finite; says of what."""
        super().calculate(atoms, list(properties), list(system_changes))
        free = self.atoms.copy()
        free.set_constraint()
        self.calls += 1
        energy, forces = self._label(free)
        if not (np.isfinite(energy) and np.isfinite(forces).all()):
            raise SearchError(f"{self.reason}: the oracle gave an energy or forces that are not finite numbers.")
        self.results = {"energy": float(energy), "free_energy": float(energy), "forces": np.array(forces)}

    def is_shared(self, atoms: Atoms) -> bool:
        """Whether another run has labelled these atoms, so that they are no call."""
        return False

    def _label(self, atoms: Atoms) -> tuple[float, np.ndarray]:
        atoms.calc = self.inner
        try:
            return atoms.get_potential_energy(), atoms.get_forces()
        except Exception as error:  # calculators fail in many ways
            said = " ".join(str(error).split()) or "no message"
            raise SearchError(f"{self.reason}: the oracle failed: {type(error).__name__}: {said}") from error


class RunOracle(OracleCalculator):
    """The oracle of a run: what is in its label file, or in those of others, is not computed again, and what is computed is there before
    it is used.

    Attributes:
        shared: labels of other runs by key; they are no calls.
        needed: whether a structure without a label ends the run; otherwise SearchError is raised, and it is not asked for again.
    """

    def __init__(self, requests: LabelRequests, shared: Mapping[str, LabelEntry], needed: bool = True) -> None:
        super().__init__(None)
        self.requests, self.shared, self.needed = requests, shared, needed

    def key(self, atoms: Atoms) -> str:
        """Of the label of some atoms."""
        return self.requests.key(canonical_structure(structures_from_ase([atoms], [self.reason])))

    @property
    def replays(self) -> bool:
        """Whether no label has been computed yet since the run began or was resumed."""
        return self.requests.calls == 0

    def is_shared(self, atoms: Atoms) -> bool:
        """See OracleCalculator."""
        return self.key(atoms) in self.shared

    def _label(self, atoms: Atoms) -> tuple[float, np.ndarray]:
        request = LabelRequest(canonical_structure(structures_from_ase([atoms], [self.reason])))
        entry = self.shared.get(self.requests.key(request.structure))
        if entry is not None:
            self.calls -= 1
        else:
            entry = self.requests.collect(request, self.reason, {}, needed=self.needed)
        if entry is None:
            raise SearchError(f"{self.reason}: the oracle gave no label: {self.requests.refused}")
        return float(entry.targets.energies[0]), entry.targets.forces.numpy()
