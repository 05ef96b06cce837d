"""TorchSim model of a fitted potential: many systems in one batch, with their uncertainties and novelties."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Prediction
from gpmlp.core.structures import Structures
from gpmlp.core.verlet_list import VerletList
from gpmlp.gp.variance import SAMPLED
from gpmlp.potential import species_model
from gpmlp.potential.potential import Potential
from gpmlp.potential.stepper import Stepper

try:
    import torch_sim  # noqa: F401 - its models are a package that this import sets up
    from torch_sim.models.interface import ModelInterface
except ImportError as error:
    raise ImportError(
        f"gpmlp.engines.torchsim needs TorchSim ({error}); pip install 'gpmlp[torchsim]' (0.3 on Python 3.11, 0.6 or later on 3.12)."
    ) from error


ON_TABLES = {"atom_energies", SAMPLED}  # variances that a Stepper has


class GPModel(ModelInterface):
    """A fitted potential as a TorchSim model, for its dynamics, relaxations and autobatching.

    forward(state) returns `energy` (systems,) eV, `forces` (atoms, 3) eV/A and `stress` (systems, 3, 3) eV/A^3, positive = tension
    as TorchSim has it; with `uncertainty` also calibrated standard deviations `energy_std` (systems,), `local_energy_std` (atoms,),
    `forces_std` (atoms, 3), `stress_std` (systems, 6, Voigt) and `force_std` (atoms,) of what was asked for (the last one, by
    'sampled_forces', is an estimate for the force vector that is cheap enough for every step), with `novelty` the Mahalanobis distances
    `novelty` (atoms,). Models with charges also return `charges` (atoms,) e. Stress is zero for systems without volume. Works in double
    precision unless the potential was fitted in single.
    """

    def __init__(
        self,
        potential: Potential,
        uncertainty: str | Sequence[str] | None = None,
        novelty: bool = False,
        skin: float = 0.6,
        tables: bool | None = None,
        total_charge: float = 0.0,
    ) -> None:
        """Wrap a potential.

        Args:
            uncertainty: the `variance` of Potential.__call__: 'atom_energies', 'energies', 'forces', 'stresses', 'sampled_forces', several,
                or 'all'.
            skin: A beyond the cutoff within which neighbours are remembered between calls (verlet_list.VerletList).
            tables: whether all systems are stepped together on tables of neighbours (potential.stepper.Stepper), with variances of local
                energies and estimates of those of forces at most; if not given, where the potential is on a CUDA device and this can be
                done.
            total_charge: of each system (e), where the state has no `charge` (systems,) of its own; of models with charges.

        Raises:
            UserError: the argument is no potential, or one that cannot give these variances, or not on tables.
        """
        super().__init__()
        if not isinstance(potential, Potential):
            raise UserError(f"GPModel needs a potential, e.g. of gpmlp.load('model.gpmlp'); got {potential!r}.")
        potential.check_variance(uncertainty)
        self.uncertainty, self.novelty = uncertainty, novelty
        self._compute_stress = self._compute_forces = True
        self._memory_scales_with = "n_atoms_x_density"
        self._reach, self._wish, self._total_charge = skin, tables, float(total_charge)
        self._use(potential)

    def _use(self, potential: Potential) -> None:
        """Predict with this potential from now on."""
        wanted = self.uncertainty
        names = {wanted} if isinstance(wanted, str) else set(wanted or ())
        why = species_model.why_unsupported(potential) or (
            None if names <= ON_TABLES else "variances of more than local energies and sampled forces are asked for"
        )
        if self._wish and why:
            raise UserError(f"This potential cannot be stepped on tables of neighbours: {why}; leave out `tables`.")
        self.potential = potential
        self._device, self._dtype = torch.device(potential.recipe.device), getattr(torch, potential.recipe.dtype)
        self._tables = why is None and (self._device.type == "cuda" if self._wish is None else self._wish)
        self._last: Structures | None = None
        self._stepper: Stepper | None = None
        self._pairs = VerletList(potential.reach, self._reach)

    def _apply(self, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> GPModel:
        """Move the potential to a device, as `to`, `cuda`, `cpu`, ... of a module do; its precision stays.

        Raises:
            UserError: another precision, or a device that is not there.
        """
        there = convert(torch.empty(0, dtype=self._dtype, device=self._device))
        if there.dtype != self._dtype:
            raise UserError(
                f"A GPModel stays in {self._dtype}, as its potential was fitted, whatever the state is in; for descriptors in single "
                "precision make it anew: GPModel(potential.to(descriptors='float32'))."
            )
        if there.device != self._device:
            self._use(self.potential.to(str(there.device)))
        return super()._apply(convert, recurse)

    def forward(self, state: Any, **_: Any) -> dict[str, Tensor]:
        """Predict all systems of a SimState (or a dictionary with its fields).

        Raises:
            UserError: an element that the potential was not trained on, or atoms on top of each other; systems by their number.
        """
        structures = self._structures(state)
        if self._tables:
            prediction = self._stepped(structures)
        else:
            prediction = self.potential(
                structures, self.uncertainty, self.novelty, pairs=self._pairs.candidates(structures)
            )
        periodic = structures.periodic.any(dim=1)[:, None, None]
        out = {
            "energy": prediction.energies,
            "forces": prediction.forces,
            "stress": torch.where(periodic & prediction.stresses.isfinite(), prediction.stresses, 0.0),
        }
        if prediction.charges is not None:
            out["charges"] = prediction.charges
        for name, variance in {
            "energy_std": prediction.energies_variance,
            "local_energy_std": prediction.atom_energies_variance,
            "forces_std": prediction.forces_covariance and prediction.forces_covariance.diagonal(),
            "stress_std": prediction.stresses_covariance and prediction.stresses_covariance.diagonal(),
        }.items():
            if variance is not None:
                out[name] = variance.total.clamp_min(0).sqrt()
        if prediction.sampled_forces_covariance is not None:
            out["force_std"] = prediction.sampled_forces_covariance.diagonal().total.sum(1).sqrt()
        if prediction.novelty is not None:
            out["novelty"] = prediction.novelty
        return out

    def _structures(self, state: Any) -> Structures:
        """The systems of a state; atoms that are those of the last call keep their Structures, with new positions and cells."""
        positions, cells, *atoms = _tensors(state, self._total_charge)
        if self._last is None or not _same(self._last, positions, atoms):
            system, periodic, species, charges = (part.clone() for part in atoms)  # a state may be changed in place
            names = tuple(f"system {s}" for s in range(len(cells)))
            last = Structures(positions, cells, periodic, species, system, names, charges=charges)
            self._stepper, self._last = None, last
        return self._last.with_unchecked_positions(positions, cells)

    def _stepped(self, structures: Structures) -> Prediction:
        """The prediction of a stepper of these atoms."""
        if self._stepper is None:
            wanted = [name in (self.uncertainty or ()) for name in ("atom_energies", SAMPLED)]
            self._stepper = Stepper(self.potential, structures, wanted[0], self.novelty, wanted[1], self._reach)
        prediction = self._stepper(*(part.to(self._device) for part in (structures.positions, structures.cells)))
        return prediction.map(lambda value: value.to(structures.positions))


def _tensors(state: Any, total_charge: float) -> tuple[Tensor, ...]:
    """Positions, cells, system of each atom, periodicity, species and total charges of a state, whose cells have lattice vectors as columns
    and whose periodicity is one for all systems. Positions and cells are laid out anew where they are views."""

    def get(name: str, default: Any = None) -> Any:
        return state.get(name, default) if isinstance(state, dict) else getattr(state, name, default)

    positions, cell = get("positions").detach(), get("cell").detach()
    system = get("system_idx")
    system = torch.zeros(len(positions), dtype=torch.long, device=positions.device) if system is None else system.long()
    periodic = torch.as_tensor(get("pbc", True), device=positions.device).expand(3).expand(len(cell), 3)
    charge = get("charge")
    charge = torch.as_tensor(total_charge if charge is None else charge, dtype=torch.float64, device=positions.device)
    about = system, periodic, get("atomic_numbers").long(), charge.expand(len(cell))
    return positions.contiguous(), cell.mT.contiguous(), *about


def _same(last: Structures, positions: Tensor, atoms: Sequence[Tensor]) -> bool:
    """Whether atoms are those of before, with one synchronisation of the device."""
    pairs = list(zip((last.structure_of_atom, last.periodic, last.species, last.charges), atoms, strict=True))
    alike = positions.dtype == last.positions.dtype and positions.device == last.positions.device
    if not alike or any(a.shape != b.shape for a, b in pairs):
        return False
    return bool(torch.stack([(a == b).all() for a, b in pairs]).all())
