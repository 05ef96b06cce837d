"""Targets are what is known of structures (energies, forces, stresses); a Prediction is what a potential says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gpmlp import checks
from gpmlp.structures import Structures

KINDS = ("energies", "forces", "stresses")


@dataclass(frozen=True, eq=False)
class Targets:
    """Reference values; NaN = not known.

    Attributes:
        energies: (structures,) eV, force-consistent total energy.
        forces: (atoms, 3) eV/A.
        stresses: (structures, 3, 3) eV/A^3, (1/V) dE/d(strain), positive = tension.
        energies_noise: (structures,) standard deviation per atom, eV/atom; NaN = the model's.
        forces_noise: (atoms, 3) standard deviation, eV/A; NaN = the model's.
        stresses_noise: (structures,) standard deviation, eV/A^3; NaN = the model's.
        config_types: a label for each structure, '' where none was given.

    Raises:
        checks.UserError: shapes that do not belong together, infinite values, noise that is not positive.
    """

    energies: Tensor
    forces: Tensor
    stresses: Tensor
    energies_noise: Tensor
    forces_noise: Tensor
    stresses_noise: Tensor
    config_types: tuple[str, ...]

    def __post_init__(self) -> None:
        checks.shape("energies", self.energies, ("structures",))
        n = self.energies.shape[0]
        checks.shape("forces", self.forces, ("atoms", 3))
        checks.shape("stresses", self.stresses, (n, 3, 3))
        checks.shape("energies_noise", self.energies_noise, (n,))
        checks.shape("forces_noise", self.forces_noise, tuple(self.forces.shape))
        checks.shape("stresses_noise", self.stresses_noise, (n,))
        if len(self.config_types) != n:
            raise checks.UserError(f"`config_types` must hold {n} labels; got {len(self.config_types)}.")
        for kind in KINDS:
            if torch.isinf(getattr(self, kind)).any():
                raise checks.UserError(f"`{kind}` holds an infinite value; remove the structure or correct the label.")
            noise = getattr(self, f"{kind}_noise")
            if (noise <= 0).any() or torch.isinf(noise).any():
                raise checks.UserError(f"`{kind}_noise` must be positive and finite (or NaN for the model's noise).")

    @staticmethod
    def unknown(structures: Structures) -> Targets:
        """Return Targets in which nothing is known."""
        n, like = len(structures), structures.positions
        nan = float("nan")
        return Targets(
            like.new_full((n,), nan),
            torch.full_like(like, nan),
            like.new_full((n, 3, 3), nan),
            like.new_full((n,), nan),
            torch.full_like(like, nan),
            like.new_full((n,), nan),
            ("",) * n,
        )

    def __len__(self) -> int:
        return self.energies.shape[0]

    def select(self, structures: Structures, indices: Sequence[int] | Tensor) -> Targets:
        """Return the targets of structures.select(indices)."""
        indices = torch.as_tensor(indices, device=self.energies.device, dtype=torch.long)
        wanted = [torch.arange(structures.offsets[i], structures.offsets[i + 1]) for i in indices.tolist()]
        atoms = torch.cat(wanted) if wanted else torch.zeros(0, dtype=torch.long)
        return Targets(
            self.energies[indices],
            self.forces[atoms],
            self.stresses[indices],
            self.energies_noise[indices],
            self.forces_noise[atoms],
            self.stresses_noise[indices],
            tuple(self.config_types[i] for i in indices.tolist()),
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Targets:
        """Return the same targets on another device or in another floating-point type."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Targets(
            **{k: v.to(device=device, dtype=dtype) if isinstance(v, Tensor) else v for k, v in values.items()}
        )

    def minus(self, prediction: Prediction) -> Targets:
        """Return the targets with predicted energies, forces and stresses taken off (NaN stays NaN)."""
        stresses = self.stresses - torch.nan_to_num(prediction.stresses)
        return Targets(
            self.energies - prediction.energies,
            self.forces - prediction.forces,
            stresses,
            self.energies_noise,
            self.forces_noise,
            self.stresses_noise,
            self.config_types,
        )


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a potential says of structures.

    Attributes:
        energies: (structures,) eV.
        atom_energies: (atoms,) eV, summing to energies.
        forces: (atoms, 3) eV/A.
        stresses: (structures, 3, 3) eV/A^3, positive = tension; NaN where the structure has no volume.
    """

    energies: Tensor
    atom_energies: Tensor
    forces: Tensor
    stresses: Tensor

    def __add__(self, other: Prediction) -> Prediction:
        return Prediction(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @staticmethod
    def concatenate(parts: Sequence[Prediction]) -> Prediction:
        """Return the prediction for the concatenated structures of the parts."""
        return Prediction(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Prediction)))


@dataclass(frozen=True)
class ErrorTable:
    """Errors of a prediction against targets; a field is NaN where there was no label of that kind."""

    energy_mae_meV_per_atom: float
    energy_rmse_meV_per_atom: float
    force_mae_meV_per_A: float
    force_rmse_meV_per_A: float
    stress_mae_GPa: float
    stress_rmse_GPa: float
    n_structures: int
    n_atoms: int


def errors(structures: Structures, targets: Targets, prediction: Prediction, gpa: float) -> ErrorTable:
    """Compare predicted with reference energies (per atom), force components and stress components.

    Args:
        gpa: 1 GPa in eV/A^3 (units.GPA); the table is a border, so units are in its names.
    """

    def both(difference: Tensor, scale: float) -> tuple[float, float]:
        known = difference[~torch.isnan(difference)] * scale
        if not known.numel():
            return float("nan"), float("nan")
        return known.abs().mean().item(), known.square().mean().sqrt().item()

    energy = both((prediction.energies - targets.energies) / structures.counts, 1e3)
    force = both(prediction.forces - targets.forces, 1e3)
    stress = both(prediction.stresses - targets.stresses, 1 / gpa)
    return ErrorTable(*energy, *force, *stress, len(structures), structures.n_atoms)
