"""A calculator of ASE with the oracle's forces in the core of a partition and the potential's elsewhere, all from one energy.

Mixed forces (ase.calculators.qmmm.ForceQMMM) derive from no energy, so that dynamics heats up or cools down. Here the difference is
learned: E = E_potential + ΔE, where ΔE is a Gaussian process of few labels of the oracle, on clusters carved out of the structure:

    F_oracle(cluster) - F_potential  on atoms of the core,    0 ± σ_i  on all others,

with σ_i the calibrated standard deviation of the potential's force on atom i. Between two labels energy is conserved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.geometry import find_mic

from gpmlp.core import errors
from gpmlp.core.calculators import merge_kwargs
from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.engines.ase import GPCalculator
from gpmlp.fitting.fit import fit
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.potential.potential import Potential
from gpmlp.properties.partition import Partition
from gpmlp.recipe import Recipe

# labels of one code hardly scatter; a few meV/A are the cluster's edge, and from so few the evidence may take all of them for noise
DIFFERENCE: dict[str, Any] = {
    "inducing": {"n": 100, "gradients": 3},
    "noise": {"force": 0.01},
    "baseline": {"isolated_atoms": "none", "zbl": False},
    "calibration": False,
    "novelty": False,
}
# by which standard deviations from so few labels are taken to be too small, before later ones say by how much they are
DOUBT = 3.0
FARTHEST = 0.5  # of the cutoff, that an atom of the core may move from one structure to the next
SUREST = 1e-3  # eV/A, of a component; no potential is taken to be better


class PartitionedCalculator(Calculator):
    """Energy, forces and stress of a potential, corrected in the core of a partition by an oracle.

        region = gpmlp.partition(potential, structure)
        atoms.calc = gpmlp.PartitionedCalculator(potential, EMT(), region, tolerance=0.1)

    The oracle is asked at the first structure, and wherever the standard deviation of ΔE's force on an atom of the core exceeds the
    tolerance; each label moves the energy. With `tolerance` None it is not asked, and energy is conserved. The core is that of the
    partition; who is in the buffer is found anew for each label.

    Attributes:
        tolerance: eV/A of the force vector, or None; may be set between steps.
        labels: structures and forces that ΔE is learned from.
        difference: ΔE as a potential; None before the first label.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress"]  # noqa: RUF012 - as ASE declares it

    def __init__(
        self,
        potential: Potential,
        oracle: Any,
        partition: Partition,
        tolerance: float | None = 0.1,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        """Take a potential, a calculator of ASE, and the partition of the structure that it is for.

        Args:
            recipe: of ΔE, each key in place of that of DIFFERENCE.

        Raises:
            UserError: a partition without a core, a tolerance that is not positive, a key that no recipe has.
        """
        if not len(partition.core):
            raise UserError(
                f"{partition.name}: no atom is in the region, so that there is nothing to ask the oracle for."
            )
        if tolerance is not None:
            errors.check_positive("tolerance", tolerance)
        super().__init__()
        self.potential, self.oracle, self.partition, self.tolerance = potential, oracle, partition, tolerance
        self.recipe = Recipe.model_validate(merge_kwargs(DIFFERENCE, recipe or {}))
        self.labels: list[tuple[Structures, Targets]] = []
        self.difference: Potential | None = None
        self._model = GPCalculator(potential)
        self._correction: GPCalculator | None = None
        self._last = partition.atoms  # the structure before
        self._squares = [DOUBT**2]  # of errors in units of their standard deviations, of labels that ΔE had not seen

    def learn(self, frames: Atoms | Sequence[Atoms]) -> None:
        """Label structures by the oracle, and learn ΔE from all labels so far.

        Raises:
            UserError: other atoms than those of the partition, or in another order, as far as elements and places say; a total
                charge that is not zero, or the oracle failed.
        """
        for atoms in [frames] if isinstance(frames, Atoms) else frames:
            structure, label = self._label(atoms)
            if self.difference is not None:
                errors_of_core = (self.difference(structure).forces - label.forces)[self.partition.core]
                self._squares.append(float(errors_of_core.square().sum() / self._variance(structure).sum()))
            self.labels.append((structure, label))
        structures, targets = zip(*self.labels, strict=True)
        data = Structures.concatenate(structures)
        self.difference, _ = fit(data, Targets.concatenate(targets), _with_as_many(self.recipe, data.n_atoms))
        self._correction = GPCalculator(self.difference)
        self.results = {}

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Label first where ΔE is not sure enough.

        Raises:
            UserError: see `learn`.
        """
        super().calculate(atoms, list(properties), list(system_changes))
        here = self.atoms.copy()
        self._check(here)
        if self.tolerance is not None and (self.difference is None or self.force_std(here).max() > self.tolerance):
            self.learn(here)
        parts = [self._results(self._model, here)]
        if self._correction is not None:
            parts.append(self._results(self._correction, here))
        names = [name for name in self.implemented_properties if name in parts[0]]
        self.results = {name: sum(part[name] for part in parts) for name in names}

    def force_std(self, atoms: Atoms) -> np.ndarray:
        """(core atoms,) standard deviation of the force of ΔE, eV/A, in the order of the partition's core.

        That of the posterior times the geometric mean of the factors by which it was too small or too large at labels before these were
        learned, and of DOUBT, to begin with.

        Raises:
            UserError: there is no label yet.
        """
        if self.difference is None:
            raise UserError("Nothing is learned of the difference yet: call `learn`.")
        return np.sqrt(np.exp(np.mean(np.log(self._squares))) * self._variance(structures_from_ase([atoms])).numpy())

    def _variance(self, structure: Structures) -> torch.Tensor:
        """(core atoms,) variance of the force of ΔE, as the posterior has it."""
        assert self.difference is not None
        core = self.partition.core
        covariance = self.difference(structure, "forces", atoms=core.tolist()).forces_covariance
        assert covariance is not None
        return covariance.epistemic[core].diagonal(dim1=1, dim2=2).sum(1)

    @staticmethod
    def _results(calculator: Any, atoms: Atoms) -> dict[str, Any]:
        calculator.get_property("forces", atoms)
        return calculator.results

    def _label(self, atoms: Atoms) -> tuple[Structures, Targets]:
        """The structure, and the difference of forces on its atoms."""
        self._check(atoms)
        cluster, core = self.partition.cluster(atoms)
        cluster.calc = self.oracle
        try:
            forces = np.array(cluster.get_forces())[core]
        except Exception as error:  # calculators fail in many ways
            said = " ".join(str(error).split()) or "no message"
            raise UserError(f"{self.partition.name}: the oracle failed: {type(error).__name__}: {said}") from error
        if not np.isfinite(forces).all():
            raise UserError(f"{self.partition.name}: the oracle gave forces that are not finite numbers.")
        structure = structures_from_ase([atoms], [f"{self.partition.name}, label {len(self.labels) + 1}"])
        inside = torch.from_numpy(self.partition.core)
        difference = torch.zeros_like(structure.positions)
        difference[inside] = torch.from_numpy(forces) - self.potential(structure).forces[inside]
        noise = torch.from_numpy(self.partition.force_sigma / np.sqrt(3)).clamp_min(SUREST)
        noise[inside] = torch.nan
        about: dict[str, Any] = {"forces": difference, "forces_noise": noise[:, None].repeat(1, 3)}
        return structure, replace(Targets.unlabelled(structure), **about)

    def _check(self, atoms: Atoms) -> None:
        """Marks are by index: raise UserError unless the atoms are those of the partition, in its order."""
        whole, name = self.partition.atoms, self.partition.name
        if len(atoms) != len(whole):
            raise UserError(f"{name}: the partition is of {len(whole)} atoms, the structure has {len(atoms)}.")
        if (other := np.flatnonzero(atoms.numbers != whole.numbers)).size:
            i = int(other[0])
            raise UserError(
                f"{name}: atom {i} is {whole.symbols[i]} in the partition and {atoms.symbols[i]} in the structure: give the atoms in the "
                "order of the partition, or make it anew."
            )
        if (atoms.pbc != whole.pbc).any():
            raise UserError(
                f"{name}: the partition is of a structure that is periodic along {whole.pbc.tolist()}, this one is along "
                f"{atoms.pbc.tolist()}: make it anew."
            )
        core, farthest = self.partition.core, FARTHEST * self.potential.cutoff
        moved = min((_moves(place, atoms)[core] for place in (whole, self._last)), key=np.max)
        if moved.max() > farthest:
            i = int(moved.argmax())
            raise UserError(
                f"{name}: atom {core[i]} of the region is {moved[i]:.2f} A from where it was in the partition and in the structure before, "
                f"more than {farthest:g} A: are atoms in another order, or is this another structure? Make the partition anew."
            )
        self._last = atoms.copy()


def _moves(before: Atoms, atoms: Atoms) -> np.ndarray:
    """(atoms,) A, how far each has moved, apart from what a change of a periodic cell takes it along."""
    before = before.copy()
    before.set_cell(atoms.cell, scale_atoms=bool(atoms.pbc.all()))
    return np.linalg.norm(find_mic(atoms.positions - before.positions, atoms.cell, atoms.pbc)[0], axis=1)


def _with_as_many(recipe: Recipe, environments: int) -> Recipe:
    """The recipe with no more inducing points than there are environments: the first labels may have few."""
    inducing = recipe.inducing
    if isinstance(inducing, tuple) or (inducing.n or 0) <= environments:
        return recipe
    return recipe.model_copy(update={"inducing": inducing.model_copy(update={"n": environments})})
