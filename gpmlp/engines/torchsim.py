"""GPModel is a potential as TorchSim asks for it: many systems in one batch, uncertainties and novelties beside their forces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpmlp import centres
from gpmlp.checks import UserError
from gpmlp.neighbors import Neighbors, Skin
from gpmlp.potential import Potential
from gpmlp.quantities import Prediction
from gpmlp.stepping import Stepper
from gpmlp.structures import Structures

try:
    import torch_sim  # noqa: F401 - its models are a package that this import sets up
    from torch_sim.models.interface import ModelInterface
except ImportError as error:
    raise ImportError(
        f"gpmlp.engines.torchsim needs TorchSim ({error}); pip install 'gpmlp[torchsim]' (0.3 on Python 3.11, 0.6 or later on 3.12)."
    ) from error


class GPModel(ModelInterface):
    """A fitted potential as a TorchSim model, for its dynamics, relaxations and autobatching.

    forward(state) returns `energy` (systems,) eV, `forces` (atoms, 3) eV/A and `stress` (systems, 3, 3) eV/A^3, positive = tension
    as TorchSim has it; with `uncertainty` also calibrated standard deviations `energy_std` (systems,), `local_energy_std` (atoms,),
    `forces_std` (atoms, 3) and `stress_std` (systems, 6, Voigt) of what was asked for, with `novelty` the Mahalanobis distances
    `novelty` (atoms,). Stress is zero for systems without volume. Works in double precision unless the potential was fitted in single.
    """

    def __init__(
        self,
        potential: Potential,
        uncertainty: str | Sequence[str] | None = None,
        novelty: bool = False,
        skin: float = 0.6,
        tables: bool | None = None,
    ) -> None:
        """Wrap a potential.

        Args:
            uncertainty: the `variance` of Potential.__call__: 'atom_energies', 'energies', 'forces', 'stresses', several, or 'all'.
            skin: A beyond the cutoff within which neighbours are remembered between calls (neighbors.Skin).
            tables: whether all systems are stepped together on tables of neighbours (stepping.Stepper), for no variances but those of
                local energies; if not given, where the potential is on a CUDA device and this can be done.

        Raises:
            UserError: what came is no potential, or it cannot give these variances, or not on tables.
        """
        super().__init__()
        if not isinstance(potential, Potential):
            raise UserError(f"GPModel needs a potential, e.g. of gpmlp.load('model.gpmlp'); got {potential!r}.")
        potential.check_variance(uncertainty)
        self.potential, self.uncertainty, self.novelty = potential, uncertainty, novelty
        self._device, self._dtype = torch.device(potential.recipe.device), getattr(torch, potential.recipe.dtype)
        self._compute_stress = self._compute_forces = True
        self._memory_scales_with = "n_atoms_x_density"
        self._skin, self._skins = skin, []
        local = uncertainty is None or uncertainty == "atom_energies" or tuple(uncertainty) in ((), ("atom_energies",))
        why = centres.refusal(potential) or (None if local else "variances of more than local energies are asked for")
        if tables and why:
            raise UserError(f"This potential cannot be stepped on tables of neighbours: {why}; leave out `tables`.")
        self._tables = why is None and (self._device.type == "cuda" if tables is None else tables)
        self._stepper: Stepper | None = None

    def forward(self, state: Any, **_: Any) -> dict[str, Tensor]:
        """Predict all systems of a SimState (or a dictionary with its fields).

        Raises:
            UserError: an element that the potential was not trained on, or atoms on top of each other; systems by their number.
        """
        structures = _structures(state)
        if self._tables:
            found = self._stepped(structures)
        else:
            found = self.potential(structures, self.uncertainty, self.novelty, pairs=self._pairs(structures))
        periodic = structures.periodic.any(dim=1)[:, None, None]
        out = {
            "energy": found.energies,
            "forces": found.forces,
            "stress": torch.where(periodic & found.stresses.isfinite(), found.stresses, 0.0),
        }
        for name, variance in {
            "energy_std": found.energies_variance,
            "local_energy_std": found.atom_energies_variance,
            "forces_std": found.forces_covariance and found.forces_covariance.diagonal(),
            "stress_std": found.stresses_covariance and found.stresses_covariance.diagonal(),
        }.items():
            if variance is not None:
                out[name] = variance.total.clamp_min(0).sqrt()
        if found.novelty is not None:
            out["novelty"] = found.novelty
        return out

    def _stepped(self, structures: Structures) -> Prediction:
        """By the stepper of these atoms, which is made when they are others than in the last call."""
        known, here = self._stepper and self._stepper.structures, structures.to(device=self._device)
        names = ("species", "structure_of_atom", "periodic")
        if known is None or any(not torch.equal(getattr(known, name), getattr(here, name)) for name in names):
            self._stepper = Stepper(self.potential, here, bool(self.uncertainty), self.novelty, self._skin)
        found = self._stepper(here.positions, here.cells)
        return found.map(lambda value: value.to(structures.positions))

    def _pairs(self, structures: Structures) -> Neighbors:
        """Neighbours of all systems, each with the memory of the system that had its number in the last call."""
        while len(self._skins) < len(structures):
            self._skins.append(Skin(self.potential.reach, self._skin))
        parts = [skin(structures.select([s])) for s, skin in zip(range(len(structures)), self._skins, strict=False)]
        return Neighbors.side_by_side(parts, structures.counts.tolist())


def _structures(state: Any) -> Structures:
    """From what TorchSim has: cells with lattice vectors as columns, periodicity for all systems together."""
    get = state.get if isinstance(state, dict) else lambda name, default=None: getattr(state, name, default)
    positions, cell = get("positions"), get("cell")
    system = get("system_idx")
    system = positions.new_zeros(len(positions), dtype=torch.long) if system is None else system.long()
    periodic = torch.as_tensor(get("pbc", True), device=positions.device).expand(3).expand(len(cell), 3)
    names = tuple(f"system {s}" for s in range(len(cell)))
    return Structures(positions.detach(), cell.detach().mT, periodic, get("atomic_numbers").long(), system, names)
