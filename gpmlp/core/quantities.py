"""Labels (Targets), predictions and their variances for energies, forces and stresses of a batch of structures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from gpmlp.core import errors, units
from gpmlp.core.structures import Structures

KINDS = ("energies", "forces", "stresses")
ISOLATED = "isolated_atom"  # config_type of isolated atoms


def is_isolated_atom(config_type: str) -> bool:
    """Whether a config_type marks isolated atoms: isolated_atom, IsolatedAtom, ..."""
    return config_type.lower().replace("_", "") == ISOLATED.replace("_", "")


@dataclass(frozen=True, eq=False)
class Targets:
    """Labels of structures: reference values, NaN where there is none.

    Attributes:
        energies: (structures,) eV, force-consistent total energy.
        forces: (atoms, 3) eV/A.
        stresses: (structures, 3, 3) eV/A^3, (1/V) dE/d(strain), positive = tension.
        energies_noise: (structures,) standard deviation per atom, eV/atom; NaN = the model's.
        forces_noise: (atoms, 3) standard deviation, eV/A; NaN = the model's.
        stresses_noise: (structures,) standard deviation, eV/A^3; NaN = the model's.
        config_types: a label for each structure, '' where none was given.
        charges: (atoms,) e, of a partition of the electrons (Mulliken, Hirshfeld, Bader, ...); of None all are NaN.
        dipoles: (structures, 3) e A; of None all are NaN.

    Raises:
        UserError: shapes that do not belong together, infinite values, noise that is not positive.
    """

    energies: Tensor
    forces: Tensor
    stresses: Tensor
    energies_noise: Tensor
    forces_noise: Tensor
    stresses_noise: Tensor
    config_types: tuple[str, ...]
    charges: Tensor = None  # type: ignore[assignment]
    dipoles: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        errors.check_shape("energies", self.energies, ("structures",))
        n = self.energies.shape[0]
        errors.check_shape("forces", self.forces, ("atoms", 3))
        errors.check_shape("stresses", self.stresses, (n, 3, 3))
        errors.check_shape("energies_noise", self.energies_noise, (n,))
        errors.check_shape("forces_noise", self.forces_noise, tuple(self.forces.shape))
        errors.check_shape("stresses_noise", self.stresses_noise, (n,))
        for name, shape in (("charges", (self.forces.shape[0],)), ("dipoles", (n, 3))):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.energies.new_full(shape, float("nan")))
            errors.check_shape(name, getattr(self, name), shape)
            if torch.isinf(getattr(self, name)).any():
                raise errors.UserError(f"`{name}` hold an infinite value; remove the structure or correct the label.")
        if len(self.config_types) != n:
            raise errors.UserError(f"`config_types` must hold {n} labels; got {len(self.config_types)}.")
        for kind in KINDS:
            if torch.isinf(getattr(self, kind)).any():
                raise errors.UserError(f"`{kind}` holds an infinite value; remove the structure or correct the label.")
            noise = getattr(self, f"{kind}_noise")
            if (noise <= 0).any() or torch.isinf(noise).any():
                raise errors.UserError(f"`{kind}_noise` must be positive and finite (or NaN for the model's noise).")

    @staticmethod
    def unlabelled(structures: Structures) -> Targets:
        """Targets that are all NaN."""
        n, atoms = len(structures), structures.n_atoms
        shapes: dict[str, tuple[int, ...]] = {"energies": (n,), "forces": (atoms, 3), "stresses": (n, 3, 3)}
        shapes |= {"energies_noise": (n,), "forces_noise": (atoms, 3), "stresses_noise": (n,)}
        nothing = {name: structures.positions.new_full(shape, float("nan")) for name, shape in shapes.items()}
        return Targets(**nothing, config_types=("",) * n)

    unknown = unlabelled  # its name before 0.2

    def __len__(self) -> int:
        return self.energies.shape[0]

    def select(self, structures: Structures, indices: Sequence[int] | Tensor) -> Targets:
        """The targets of structures.select(indices)."""
        indices = torch.as_tensor(indices, device=self.energies.device, dtype=torch.long)
        atoms = structures.atoms_of(indices).to(indices.device)
        return Targets(
            self.energies[indices],
            self.forces[atoms],
            self.stresses[indices],
            self.energies_noise[indices],
            self.forces_noise[atoms],
            self.stresses_noise[indices],
            tuple(self.config_types[i] for i in indices.tolist()),
            self.charges[atoms],
            self.dipoles[indices],
        )

    @staticmethod
    def concatenate(parts: Sequence[Targets]) -> Targets:
        """The targets of the concatenated structures of the parts."""
        values = {f.name: [getattr(p, f.name) for p in parts] for f in fields(Targets)}
        types = tuple(itertools.chain(*values.pop("config_types")))
        return Targets(**{name: torch.cat(v) for name, v in values.items()}, config_types=types)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Targets:
        """The same targets on another device or in another floating-point type."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "config_types"}
        moved = {name: value.to(device=device, dtype=dtype) for name, value in tensors.items()}
        return Targets(**moved, config_types=self.config_types)

    def minus(self, prediction: Prediction) -> Targets:
        """The targets less predicted energies, forces and stresses (NaN stays NaN)."""
        return replace(
            self,
            energies=self.energies - prediction.energies,
            forces=self.forces - prediction.forces,
            stresses=self.stresses - torch.nan_to_num(prediction.stresses),
        )


@dataclass(frozen=True, eq=False)
class Variance:
    """The variance of a prediction by cause, all in the squared unit of the quantity; NaN where it was not asked for.

    Attributes:
        inducing: what the inducing set cannot represent.
        data: what the data have not fixed.
        misspecification: what the model class cannot express, whatever the data.
        noise: what labels scatter by themselves.
    """

    inducing: Tensor
    data: Tensor
    misspecification: Tensor
    noise: Tensor

    @property
    def total(self) -> Tensor:
        """All parts: of a new label around the prediction."""
        return self.inducing + self.data + self.misspecification + self.noise

    @property
    def epistemic(self) -> Tensor:
        """Without label noise: of the true value around the prediction."""
        return self.inducing + self.data + self.misspecification

    def map(self, function: Callable[[Tensor], Tensor]) -> Variance:
        """Apply a function to every part."""
        return Variance(*(function(getattr(self, f.name)) for f in fields(self)))

    @staticmethod
    def concatenate(parts: Sequence[Variance]) -> Variance:
        """Of all atoms or structures of the parts."""
        return Variance(*(torch.cat([getattr(v, f.name) for v in parts]) for f in fields(Variance)))

    def diagonal(self) -> Variance:
        """Variances of the components, from covariances (..., n, n)."""
        return self.map(lambda part: part.diagonal(dim1=-2, dim2=-1))


@dataclass(frozen=True, eq=False)
class Prediction:
    """Energies, forces, stresses and their uncertainties of structures by a potential.

    Attributes:
        energies: (structures,) eV.
        atom_energies: (atoms,) eV, summing to energies.
        forces: (atoms, 3) eV/A.
        stresses: (structures, 3, 3) eV/A^3, positive = tension; NaN where the structure has no volume.
        energies_variance: (structures,) eV^2; this and what follows is None where it was not asked for.
        atom_energies_variance: (atoms,) eV^2.
        forces_covariance: (atoms, 3, 3) (eV/A)^2, of the components of one atom.
        sampled_forces_covariance: (atoms, 3, 3) (eV/A)^2, an estimate of the same from posterior samples.
        stresses_covariance: (structures, 6, 6) (eV/A^3)^2, in the order xx yy zz yz xz xy.
        novelty: (atoms,) Mahalanobis distance of each environment over the threshold of its species; above 1: outside the data.
        atom_virials: (atoms, 3, 3) eV, symmetric, summing to stress times volume: half of what a pair adds belongs to either atom.
        charges: (atoms,) e, summing to the total charge of each structure; None of a model without charges, as what follows.
        electrostatic: (structures,) eV, the part of `energies` that is of these charges.
    """

    energies: Tensor
    atom_energies: Tensor
    forces: Tensor
    stresses: Tensor
    energies_variance: Variance | None = None
    atom_energies_variance: Variance | None = None
    forces_covariance: Variance | None = None
    sampled_forces_covariance: Variance | None = None
    stresses_covariance: Variance | None = None
    novelty: Tensor | None = None
    atom_virials: Tensor | None = None
    charges: Tensor | None = None
    electrostatic: Tensor | None = None

    @property
    def forces_variance(self) -> Variance | None:
        """(atoms, 3) (eV/A)^2, of each component."""
        return None if self.forces_covariance is None else self.forces_covariance.diagonal()

    @property
    def stresses_variance(self) -> Variance | None:
        """(structures, 3, 3) (eV/A^3)^2, of each component."""
        if self.stresses_covariance is None:
            return None
        order = torch.tensor(units.VOIGT_INDEX, device=self.stresses.device)
        return self.stresses_covariance.diagonal().map(lambda part: part[:, order])

    def __add__(self, other: Prediction) -> Prediction:
        """The sum of energy terms; what only one of them has (variances, novelty) stays as it is."""

        def plus(a: Any, b: Any) -> Any:
            if a is None or b is None:
                return b if a is None else a
            if isinstance(a, Variance):
                return Variance(*(getattr(a, f.name) + getattr(b, f.name) for f in fields(a)))
            return a + b

        return self._with(lambda name, value: plus(value, getattr(other, name)))

    def map(self, function: Callable[[Tensor], Tensor]) -> Prediction:
        """Apply a function to every tensor."""
        return self._with(lambda _, value: _apply(function, value))

    @staticmethod
    def concatenate(parts: Sequence[Prediction]) -> Prediction:
        """The prediction for the concatenated structures of the parts."""
        if len(parts) == 1:
            return parts[0]

        def join(name: str, first: Any) -> Any:
            if first is None:
                return None
            values = [getattr(p, name) for p in parts]
            return Variance.concatenate(values) if isinstance(first, Variance) else torch.cat(values)

        return parts[0]._with(join)

    def select(self, structures: Structures, indices: Sequence[int] | Tensor) -> Prediction:
        """The prediction of structures.select(indices)."""
        indices = torch.as_tensor(indices, device=self.energies.device, dtype=torch.long)
        atoms = structures.atoms_of(indices).to(indices.device)
        per_atom = {"atom_energies", "forces", "atom_virials", "atom_energies_variance", "forces_covariance", "novelty"}
        per_atom |= {"sampled_forces_covariance", "charges"}
        return self._with(lambda name, v: _apply(lambda part: part[atoms if name in per_atom else indices], v))

    def _with(self, function: Callable[[str, Any], Any]) -> Prediction:
        """With each field as a function of its name and value gives it."""
        return Prediction(**{f.name: function(f.name, getattr(self, f.name)) for f in fields(self)})


def _apply(function: Callable[[Tensor], Tensor], value: Tensor | Variance | None) -> Tensor | Variance | None:
    if value is None:
        return None
    return value.map(function) if isinstance(value, Variance) else function(value)


def json_value(value: Any) -> Any:
    """The same value for JSON: arrays, tuples and sets as lists, numbers that are not finite as None, anything else as text."""
    if isinstance(value, Mapping):
        return {str(key): json_value(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [json_value(entry) for entry in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return json_value(value.tolist()) if hasattr(value, "tolist") else str(value)
