"""Dispersion beyond the cutoff, as baselines: a tail −C₆/r⁶ of pairs, and DFT-D3; subtracted before a fit, added at prediction."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpmlp.core import errors, neighbors
from gpmlp.core.quantities import Prediction
from gpmlp.core.structures import Structures, chunk_structures
from gpmlp.core.units import BOHR, HARTREE
from gpmlp.potential.baseline import Baseline
from gpmlp.recipe import R6_OFF

# Bohr: those of dftd3, but to the end of which the energy goes to zero smoothly
D3_REACH = {"disp2": 60.0, "disp3": 40.0, "cn": 40.0, "width2": 5.0, "width3": 5.0}
VACUUM = 20.0  # Bohr, beyond the atoms along axes that are not periodic
TOGETHER = 512  # atoms whose pairs are in memory together, unless a structure has more
DAMPINGS = {
    "bj": "RationalDampingParam",
    "zero": "ZeroDampingParam",
    "bjm": "ModifiedRationalDampingParam",
    "zerom": "ModifiedZeroDampingParam",
    "op": "OptimizedPowerDampingParam",
}


@dataclass(frozen=True)
class R6Tail(Baseline):
    """E = −½ Σ_ij C₆(Z_i, Z_j) S(r) / r⁶ over all pairs within `outer`.

    S rises from 0 at `begin` to 1 at `full` and falls to 0 within the last R6_OFF before `outer`, each time by the quintic smoothstep (C2).

    Attributes:
        c6: eV A^6, by pair of atomic numbers (Z_i <= Z_j).
        begin, full, outer: A.
    """

    c6: Mapping[tuple[int, int], float]
    begin: float
    full: float
    outer: float

    def __call__(self, structures: Structures) -> Prediction:
        """Of all atoms; each has half of the energy of its pairs."""
        parts = [self._of_few(part) for part in chunk_structures(structures, TOGETHER)]
        return Prediction.concatenate(parts)

    def _of_few(self, structures: Structures) -> Prediction:
        pairs = neighbors.find_neighbors(structures, self.outer)
        vectors = pairs.vectors(structures)
        c6 = self._by_pair(structures, vectors)[structures.species[pairs.centers], structures.species[pairs.neighbors]]
        r = vectors.norm(dim=1)
        energies, slopes = self.of_pair(r, c6)
        local = structures.positions.new_zeros(structures.n_atoms).index_add(0, pairs.centers, 0.5 * energies)
        gradients = (0.5 * slopes / r)[:, None] * vectors
        return neighbors.assemble_prediction(structures, pairs, vectors, local, gradients)

    def _by_pair(self, structures: Structures, like: Tensor) -> Tensor:
        """(Z, Z) C₆."""
        present = structures.distinct_species
        table = like.new_zeros(max(present, default=0) + 1, max(present, default=0) + 1)
        at = torch.tensor(present, device=like.device)
        table[at[:, None], at] = self.coefficients(present).to(like)
        return table

    def coefficients(self, species: Sequence[int]) -> Tensor:
        """(species, species) C₆, eV A^6. Raises UserError: that of a pair is not known."""
        pairs = [(min(a, b), max(a, b)) for a in species for b in species]
        for pair in pairs:
            if pair not in self.c6:
                raise errors.UserError(
                    f"The dispersion tail of this model has no C6 of {'-'.join(map(errors.chemical_symbol, pair))}."
                )
        return torch.tensor([self.c6[pair] for pair in pairs], dtype=torch.float64).reshape(len(species), -1)

    def of_pair(self, r: Tensor, c6: Tensor | float) -> tuple[Tensor, Tensor]:
        """Energy of a pair and its derivative with respect to r, elementwise."""
        rise, d_rise = _smoothstep(r, self.begin, self.full)
        fall, d_fall = _smoothstep(r, self.outer - R6_OFF, self.outer)
        switch, d_switch = rise * (1 - fall), d_rise * (1 - fall) - rise * d_fall
        bare = -c6 / r**6
        return bare * switch, bare * (d_switch - 6 / r * switch)

    def unit_tails(self) -> dict[tuple[int, int], R6Tail]:
        """Of each pair of elements the tail with C₆ = 1 eV A^6 of that pair alone."""
        nothing = dict.fromkeys(self.c6, 0.0)
        return {pair: R6Tail(nothing | {pair: 1.0}, self.begin, self.full, self.outer) for pair in self.c6}

    def state(self) -> dict:
        """All numbers."""
        pairs = [[a, b, self.c6[a, b]] for a, b in sorted(self.c6)]
        return {"name": "r6", "pairs": pairs, "begin": self.begin, "full": self.full, "outer": self.outer}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> R6Tail:
        """What `state` gave."""
        return R6Tail({(a, b): c6 for a, b, c6 in state["pairs"]}, state["begin"], state["full"], state["outer"])


def _smoothstep(r: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The quintic from 0 at low to 1 at high, and its derivative."""
    x = ((r - low) / (high - low)).clamp(0, 1)
    return x**3 * (10 - 15 * x + 6 * x**2), 30 * x**2 * (1 - x) ** 2 / (high - low)


@dataclass(frozen=True)
class D3Dispersion(Baseline):
    """DFT-D3 (Grimme et al., J. Chem. Phys. 132, 154104 (2010); with Becke-Johnson damping J. Comput. Chem. 32, 1456 (2011)), by the
    package dftd3; atoms of a structure have equal shares of its energy.

    Attributes:
        functional: whose parameters are taken, as dftd3 calls it: 'pbe', 'b3lyp', ...
        damping: one of DAMPINGS.
        atm: whether the three-body term is there.
        versions: of the package, when the model was fitted.
    """

    functional: str
    damping: str = "bj"
    atm: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def asked_for(functional: str, damping: str, atm: bool) -> D3Dispersion:
        """With the version that is installed. Raises UserError: dftd3 is not, or has no parameters of the functional."""
        made = D3Dispersion(functional, damping, atm, {})
        made._parameters  # noqa: B018  are there, or it says why not
        return D3Dispersion(functional, damping, atm, {"dftd3": metadata.version("dftd3")})

    @cached_property
    def _parameters(self) -> Any:
        interface = _dftd3()
        try:
            return getattr(interface, DAMPINGS[self.damping])(method=self.functional, atm=self.atm)
        except (RuntimeError, TypeError, ValueError) as error:
            raise errors.UserError(
                f"dftd3 has no parameters of the functional '{self.functional}' with the damping {self.damping}: {error}."
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        """What other processes get: not what dftd3 holds."""
        return {key: value for key, value in vars(self).items() if key != "_parameters"}

    def __call__(self, structures: Structures) -> Prediction:
        """Of all structures, one after another. Raises UserError: dftd3 refuses one; names it."""
        found = [self._of_structure(structures, i) for i in range(len(structures))]
        counts = structures.counts.tolist()
        shares = np.repeat([e / max(n, 1) for (e, *_), n in zip(found, counts, strict=True)], counts)
        energies, forces = [e for e, *_ in found], np.concatenate([f for _, f, _ in found])
        virials = np.array([v for *_, v in found])
        like = structures.positions

        def tensor(values: Any) -> Tensor:
            return torch.as_tensor(np.asarray(values, dtype=float)).to(like)

        stresses = tensor(virials) / structures.volumes[:, None, None]
        return Prediction(tensor(energies), tensor(shares), tensor(forces), stresses)

    def _of_structure(self, structures: Structures, i: int) -> tuple[float, np.ndarray, np.ndarray]:
        """Energy, forces and virial (stress times volume)."""
        atoms = slice(int(structures.offsets[i]), int(structures.offsets[i + 1]))
        positions = structures.positions[atoms].detach().cpu().double().numpy() / BOHR
        cell, periodic = (
            structures.cells[i].detach().cpu().double().numpy() / BOHR,
            structures.periodic[i].cpu().numpy(),
        )
        around: tuple[np.ndarray, ...] = ()
        if periodic.any():
            cell, positions = _with_vacuum(cell, periodic, positions)
            around = cell, periodic
        try:
            model = _dftd3().DispersionModel(structures.species[atoms].cpu().numpy(), positions, *around)
            model.set_realspace_cutoff(**D3_REACH)
            found = model.get_dispersion(self._parameters, grad=True)
        except RuntimeError as error:
            raise errors.UserError(f"{structures.names[i]}: dftd3 gives no dispersion: {error}.") from error
        return (
            float(found["energy"]) * HARTREE,
            -np.asarray(found["gradient"]) * (HARTREE / BOHR),
            np.asarray(found["virial"]) * HARTREE,
        )

    def state(self) -> dict:
        """The choices, and the version that the model was fitted with."""
        about = {"functional": self.functional, "damping": self.damping, "atm": self.atm}
        return {"name": "d3"} | about | {"versions": dict(self.versions)}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> D3Dispersion:
        """What `state` gave; a DataWarning if another version is installed. Raises UserError: none is."""
        made = D3Dispersion(state["functional"], state["damping"], state["atm"], state["versions"])
        made._parameters  # noqa: B018
        if (here := metadata.version("dftd3")) != made.versions.get("dftd3"):
            text = f"This model was fitted with dftd3 {made.versions.get('dftd3')}; here is {here}. Its dispersion may differ."
            warnings.warn(text, errors.DataWarning, stacklevel=2)
        return made


def _with_vacuum(cell: np.ndarray, periodic: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A cell whose axes without periodicity are perpendicular to all others and longer than the atoms, which are moved inside: dftd3 takes
    them into the cell along all axes."""
    cell, positions = cell.copy(), positions.copy()
    cell[~periodic] = 0.0
    _, values, axes = np.linalg.svd(cell)
    free = axes[int((values > 1e-9).sum()) :]
    along = positions @ free.T
    lowest, extent = along.min(0, initial=0.0), np.ptp(along, axis=0) if len(along) else np.zeros(len(free))
    cell[~periodic] = free * (extent + VACUUM)[:, None]
    return cell, positions + (0.5 * VACUUM - lowest) @ free


def _dftd3() -> Any:
    try:
        from dftd3 import interface
    except ImportError as error:
        raise errors.UserError(
            f"D3 dispersion needs the package dftd3 ({error}); pip install dftd3, or gpmlp[dispersion]."
        ) from error
    return interface
