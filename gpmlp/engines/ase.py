"""ASE calculator of a fitted potential, with its uncertainties; ASE's units are gpmlp's, only shapes change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from gpmlp.core.errors import UserError
from gpmlp.core.neighbors import Neighbors
from gpmlp.core.quantities import Prediction
from gpmlp.core.structures import Structures
from gpmlp.core.verlet_list import VerletList
from gpmlp.io.ase_atoms import ELECTRONIC, calculator_results, structures_from_ase, uncertainty_results
from gpmlp.io.charges import stated_charge
from gpmlp.potential.compiled import MovingAtoms
from gpmlp.potential.potential import Potential

# what the energy depends on, of moments and charges with charges or a calculator as baseline
ARRAYS = ("positions", "numbers", "cell", "pbc")
RELEVANT_CHANGES = (*ARRAYS, "initial_charges")


class GPCalculator(Calculator):
    """Energy, free energy (the same: no electrons), energies, forces and stress from a fitted potential.

    Stress (eV/A^3, Voigt xx yy zz yz xz xy, positive = tension) is there where at least one axis is periodic and the cell has a
    volume; asked for elsewhere it raises ASE's PropertyNotImplementedError. Cells, species and pbc may change between calls.

    With `uncertainty`, `results` also hold calibrated standard deviations `energy_std` (eV), `local_energy_std` (atoms,) eV,
    `forces_std` (atoms, 3) eV/A, `stress_std` (6,) eV/A^3, `force_std` (atoms,) eV/A and `novelty` (atoms,), each where it was asked
    for. `force_std`, by 'sampled_forces', is of the force vector, an estimate that is cheap enough for every step. `info` of the atoms
    holds them too, as `gpmlp_energy_std` and so on, so that trajectories of ASE keep them. After a calculation the attributes
    `structures`, `pairs` and `prediction` hold it in full.
    """

    structures: Structures
    prediction: Prediction

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]  # noqa: RUF012 - as ASE declares it
    ignored_changes = set(all_changes) - set(RELEVANT_CHANGES)

    def __init__(
        self,
        potential: Potential,
        name: str = "atoms",
        uncertainty: str | Sequence[str] | bool | None = None,
        novelty: bool = False,
        skin: float = 0.6,
    ) -> None:
        """Wrap a potential.

        Args:
            name: what error messages call the structure.
            uncertainty: the `variance` of Potential.__call__: 'atom_energies', 'energies', 'forces', 'stresses', 'sampled_forces',
                several, or 'all' (the same as True; without the last one).
            novelty: whether to compute Mahalanobis distances too.
            skin: A beyond the cutoff in which neighbours are kept between calls (verlet_list.VerletList); 0: searched each time.

        Raises:
            UserError: the argument is no potential, e.g. the name of its file; a negative skin.
        """
        if not callable(potential):
            raise UserError(
                f"GPCalculator needs a potential; got {potential!r}. A model file is read by gpmlp.load: "
                "GPCalculator(gpmlp.load('model.gpmlp'))."
            )
        super().__init__()
        self.potential = potential
        if getattr(potential, "charges", None) is not None:
            self.implemented_properties = [*self.implemented_properties, "charges"]
        self.uncertainty = {True: "all", False: None}[uncertainty] if isinstance(uncertainty, bool) else uncertainty
        if self.uncertainty is not None:
            potential.check_variance(self.uncertainty)
        self.novelty = novelty
        self._verlet_list = VerletList(potential.reach, skin)
        self._near: Neighbors | None = None
        self._moving: MovingAtoms | None = None
        self.label_in_errors = name

    def __getstate__(self) -> dict[str, Any]:
        """All but what is of this process and made again by the next calculations."""
        return vars(self) | {"_moving": None}

    def check_state(self, atoms: Atoms, tol: float = 0.0) -> list[str]:
        """What has changed since the last calculation, of RELEVANT_CHANGES and to the last bit, which costs less than a tolerance.

        'initial_charges' stands for magnetic moments and the total charge too, which info states and ASE does not compare.
        """
        if self.atoms is None:
            return list(RELEVANT_CHANGES)
        before, now = ((a.positions, a.numbers, a.cell.array, a.pbc) for a in (self.atoms, atoms))
        arrays = zip(ARRAYS, before, now, strict=True)
        changes = [name for name, a, b in arrays if a.shape != b.shape or a.tobytes() != b.tobytes()]
        return changes if self._electrons(self.atoms) == self._electrons(atoms) else [*changes, "initial_charges"]

    def _electrons(self, atoms: Atoms) -> tuple[float | None, list[bytes]]:
        """The total charge that info states, the initial charges, and moments where there is a baseline that may begin with them."""
        names = ELECTRONIC.values() if getattr(self.potential, "outer_baselines", ()) else ["initial_charges"]
        initial = (atoms.arrays.get(name) for name in names)
        by_site = [v.tobytes() if v is not None and v.any() else b"" for v in initial]
        return stated_charge(atoms.info, self.label_in_errors), by_site

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Predict everything at once: forces and stress cost little more than the energy.

        Raises:
            UserError: an element that the potential was not trained on, or atoms on top of each other.
        """
        self.atoms = self.atoms if atoms is None else atoms.copy()
        self.structures, self._near = self._convert(self.atoms, system_changes), None
        self.prediction = self._predict()
        self.results = self._ase_results()
        if atoms is not None:  # trajectories of ASE keep info, but no results of these names
            doubts = uncertainty_results(self.prediction, 0, slice(0, len(atoms)))
            atoms.info.update({f"gpmlp_{key}": value for key, value in doubts.items()})

    @property
    def _candidates(self) -> Neighbors:
        """Those and some beyond."""
        if self._near is None:
            self._near = self._verlet_list.candidates(self.structures)
        return self._near

    @property
    def pairs(self) -> Neighbors:
        """All pairs of `structures` within the reach of the potential."""
        return self._candidates.within(self.structures, self.potential.reach)

    def _convert(self, atoms: Atoms, changes: Sequence[str]) -> Structures:
        """The atoms as Structures: those of the last call where only positions have changed, which the Verlet list checks if need be."""
        last = vars(self).pop("structures", None)  # those of other atoms, should this fail
        name, plain = self.label_in_errors, atoms.arrays.keys().isdisjoint(ELECTRONIC.values())
        if last and plain and list(changes) == ["positions"] and last.names == (name,) and not last.electronic_start():
            return last.with_unchecked_positions(torch.from_numpy(atoms.positions.astype(float)), last.cells)
        return structures_from_ase([atoms], [name])

    def _predict(self) -> Prediction:
        mean = None if self.uncertainty or self.novelty else self.potential.compiled_prediction
        moving, self._moving = self._moving, None  # should this fail
        if mean and moving and moving.model is mean.model:
            prediction = moving(self.structures)
            if prediction is not None:
                self._moving = moving
                return prediction
        prediction = self.potential(self.structures, self.uncertainty, self.novelty, pairs=self._candidates)
        moves = self._verlet_list.moves(self.structures) if mean else None
        if mean and moves:
            self._moving = mean.follow(self.structures, self._candidates, moves)
        return prediction

    def _ase_results(self) -> dict[str, Any]:
        every = slice(0, len(self.atoms))
        return calculator_results(self.prediction, 0, every) | uncertainty_results(self.prediction, 0, every)
