"""A partition says which atoms of a structure need the quantum code: a core whose forces the potential knows least, and a buffer around it.

Inside the core the oracle's forces are wanted; the buffer surrounds it, so that these are those of the whole structure (Bernstein, Kermode
and Csányi, Rep. Prog. Phys. 72, 026501 (2009)). Calibrated force variances say where the squared error is that the oracle would take away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.geometry import complete_cell

from gpmlp.core import errors
from gpmlp.core.errors import UserError
from gpmlp.core.molecules import bonded_units
from gpmlp.core.neighbors import Neighbors, find_neighbors
from gpmlp.core.structures import Structures
from gpmlp.io.ase_atoms import structures_from_ase, to_ase
from gpmlp.io.charges import stated_charge
from gpmlp.potential.potential import Potential

REST, CORE, BUFFER = 0, 1, 2  # hybrid_mark of QUIP
WORDS = np.array(["MM", "QM", "buffer"])  # `region` of ase.calculators.qmmm.ForceQMMM
LONGEST_BOND = 3.5  # A; up to which bonds are looked for
VACUUM = 8.0  # A, between a cluster and its images
FRACTION = 0.1  # of the atoms, unless something else is asked for


@dataclass(frozen=True)
class RegionRule:
    """How large the core is; one of three.

    Attributes:
        fraction: of the atoms; atoms: how many; sigma: standard deviation of the force vector from which an atom is in, eV/A.
        buffer: A around an atom of the core, within which others are in the buffer; None: the cutoff of the potential.
        whole_molecules: whether molecules are in as a whole or not at all.

    Raises:
        UserError: a number out of its range, or more than one of the three.
    """

    fraction: float | None = None
    atoms: int | None = None
    sigma: float | None = None
    buffer: float | None = None
    whole_molecules: bool = True

    def __post_init__(self) -> None:
        given = [name for name in ("fraction", "atoms", "sigma") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"The size of the region is given twice, by {' and '.join(given)}; give one of them.")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise UserError(
                f"fraction must be a share of the atoms, above 0 and at most 1; got {self.fraction:g}. A tenth is 0.1."
            )
        if self.atoms is not None:
            errors.check_integer("number of atoms of the region", self.atoms, 1)
        if self.sigma is not None:
            errors.check_positive("sigma", self.sigma)
        if self.buffer is not None:
            errors.check_positive("buffer", self.buffer, allow_zero=True)

    def size(self, n_atoms: int, name: str) -> int:
        """Atoms that the core of a structure of so many is to have."""
        if self.atoms is None:
            return max(1, round((FRACTION if self.fraction is None else self.fraction) * n_atoms))
        if self.atoms > n_atoms:
            raise UserError(f"{name}: a region of {self.atoms} atoms is asked for, but there are {n_atoms}.")
        return self.atoms

    def exceeded(self, made: Partition) -> bool:
        """Whether the core is larger than was asked for, as the last molecule is whole."""
        return self.sigma is None and len(made.core) > self.size(len(made.marks), made.name)


@dataclass(frozen=True, eq=False)
class Partition:
    """Core, buffer and rest of one structure.

    Attributes:
        name: of the structure.
        marks: (atoms,) CORE, BUFFER or REST.
        force_sigma: (atoms,) calibrated standard deviation of the force vector, eV/A.
        buffer: A, its width.
        units: (atoms,) the molecule that an atom is in the buffer with.
        atoms: the structure, without results.
    """

    name: str
    marks: np.ndarray
    force_sigma: np.ndarray
    buffer: float
    units: np.ndarray
    atoms: Atoms

    @property
    def core(self) -> np.ndarray:
        """Indices of its atoms."""
        return np.flatnonzero(self.marks == CORE)

    @property
    def share(self) -> float:
        """Of the squared force error that is foreseen, what the core holds: Σ_core σᵢ² / Σ σᵢ²."""
        squares = self.force_sigma**2
        return float(squares[self.core].sum() / squares.sum()) if squares.any() else 0.0

    @property
    def largest_outside(self) -> float:
        """Largest standard deviation of an atom that is not in the core, eV/A; 0 if there is none."""
        return float(self.force_sigma[self.marks != CORE].max(initial=0.0))

    def as_dict(self) -> dict[str, Any]:
        """For JSON; indices count from 0."""
        return {
            "structure": self.name,
            "atoms": len(self.marks),
            "core": self.core.tolist(),
            "buffer": np.flatnonzero(self.marks == BUFFER).tolist(),
            "buffer_width_A": self.buffer,
            "share_of_foreseen_squared_force_error": self.share,
            "foreseen_force_rmse_meV_per_A": 1e3 * float(np.sqrt(np.mean(self.force_sigma**2) / 3)),
            "largest_force_sigma_eV_per_A": float(self.force_sigma.max()),
            "largest_force_sigma_outside_eV_per_A": self.largest_outside,
        }

    def marked(self, atoms: Atoms) -> Atoms:
        """A copy with arrays `qm_region` (1 core, 2 buffer, 0 rest, as QUIP's hybrid_mark), `region` ('QM', 'buffer', 'MM', which
        ForceQMMM of ASE reads) and `force_sigma`, eV/A; results of a calculator are kept."""
        marked = atoms.copy()
        marked.calc = atoms.calc
        values = {"qm_region": self.marks, "region": WORDS[self.marks], "force_sigma": self.force_sigma}
        for name, value in values.items():
            marked.set_array(name, None)  # of an earlier partition, of another type perhaps
            marked.set_array(name, value)
        return marked

    def cluster(self, atoms: Atoms) -> tuple[Atoms, np.ndarray]:
        """Core and buffer, as the atoms stand now, cut out of the structure, and which atoms of the cluster are of the core.

        Along a periodic axis with a gap wider than the buffer the cluster is free, in a cell that leaves VACUUM around it; along others it
        is periodic as the structure is.

        Raises:
            UserError: the structure has a total charge, of which nobody knows how much is in the cluster.
        """
        charge = stated_charge(atoms.info, self.name)
        if charge:
            raise UserError(
                f"{self.name}: has a total charge of {charge:g} e, and how much of it is in the cluster is not known."
            )
        core = self.marks == CORE
        taken = core | _around(structures_from_ase([atoms], [self.name]), core, self.units, self.buffer)
        cluster = atoms[taken]
        cluster.info, cluster.calc = {}, None
        cluster.set_constraint()
        for axis in np.flatnonzero(atoms.pbc):
            _cut_free(cluster, int(axis), self.buffer)
        return cluster, core[taken]


def partition(potential: Potential, structure: Structures, rule: RegionRule | None = None) -> Partition:
    """Core, buffer and rest of one structure.

    The core takes the atoms of the largest force variance, trace of the calibrated covariance; of molecules, which are taken whole,
    those with the largest mean. The last one may exceed the size that was asked for.

    Raises:
        UserError: several structures, an element that the potential was not trained on, a model without variances, a region of more
            atoms than there are.
    """
    rule = rule or RegionRule()
    if len(structure) != 1:
        raise UserError(f"A partition is of one structure; got {len(structure)}.")
    (name,), n = structure.names, structure.n_atoms
    wanted = rule.size(n, name)
    covariance = potential(structure, variance="forces").forces_covariance
    assert covariance is not None
    variance = covariance.total.diagonal(dim1=1, dim2=2).sum(1).cpu().numpy()
    units = _units(structure) if rule.whole_molecules else np.arange(n)
    core = _core(variance, units, wanted, rule.sigma)
    width = potential.cutoff if rule.buffer is None else rule.buffer
    marks = np.where(core, CORE, np.where(_around(structure, core, units, width), BUFFER, REST))
    return Partition(name, marks, np.sqrt(variance), width, units, to_ase(structure)[0])


def _units(structure: Structures) -> np.ndarray:
    """(atoms,) the molecule of each; atoms of solids, and of a structure that is one molecule, alone."""
    pairs = find_neighbors(structure, LONGEST_BOND)
    r = pairs.vectors(structure).norm(dim=1)
    about = (x.cpu().numpy() for x in (structure.species, pairs.centers, pairs.neighbors, r, pairs.shifts))
    units = bonded_units(*about)
    return units if units.max() else np.arange(structure.n_atoms)


def _core(variance: np.ndarray, units: np.ndarray, wanted: int, sigma: float | None) -> np.ndarray:
    """(atoms,) whether an atom is in the core."""
    if sigma is not None:
        return np.isin(units, units[variance >= sigma**2])
    counts = np.bincount(units)
    order = np.argsort(-np.bincount(units, variance) / counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    return np.isin(units, order[before < wanted])


def _around(structure: Structures, core: np.ndarray, units: np.ndarray, width: float) -> np.ndarray:
    """(atoms,) whether an atom, or one of its molecule, is within `width` of an atom of the core."""
    pairs = find_neighbors(structure, width) if width > 0 else Neighbors.empty(structure)
    near = pairs.neighbors.cpu().numpy()[core[pairs.centers.cpu().numpy()]]
    return np.isin(units, units[near])


def _cut_free(cluster: Atoms, axis: int, buffer: float) -> None:
    """Open the cell of a cluster along an axis at its widest gap, if that is wider than the buffer."""
    basis = complete_cell(cluster.cell.array)
    height = 1 / np.linalg.norm(np.linalg.inv(basis)[:, axis])
    places = (cluster.positions @ np.linalg.inv(basis))[:, axis] % 1.0
    order = np.sort(places)
    gaps = np.diff(order, append=order[0] + 1.0)
    widest = int(gaps.argmax())
    if gaps[widest] * height <= buffer:
        return
    begin = order[(widest + 1) % len(order)]
    moved = (places - begin) % 1.0
    cluster.positions += (moved - (cluster.positions @ np.linalg.inv(basis))[:, axis])[:, None] * basis[axis]
    cluster.pbc[axis] = False
    cell = cluster.cell.array.copy()
    cell[axis] *= min(1.0, 1.0 - gaps[widest] + VACUUM / height)
    cluster.set_cell(cell)
