"""Batches of periodic, partly periodic or isolated atomic structures, and how they are cut into chunks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpmlp.core import errors

CHUNK_ATOMS = 256  # atoms whose pair quantities are in memory together

WHOLE = 0.01  # e, by which rounded charges of atoms may sum to other than a whole number
FINGERPRINT_TOLERANCE = 1e-3  # A: files round by less, and frames of dynamics differ by more


@dataclass(frozen=True, eq=False)
class Structures:
    """A batch of atomic structures, their atoms one after another.

    Attributes:
        positions: (atoms, 3) A.
        cells: (structures, 3, 3) A; ROWS are lattice vectors; any value along axes that are not periodic.
        periodic: (structures, 3) bool.
        species: (atoms,) atomic numbers Z.
        structure_of_atom: (atoms,) index of the structure of each atom, sorted.
        names: how error messages call each structure, e.g. "train.xyz frame 12".
        magnetic_moments: (atoms,) or (atoms, 3) from which an electronic structure code begins, Bohr magnetons; None = none. No
            descriptor sees them.
        initial_charges: (atoms,) the same, elementary charges.
        charges: (structures,) total charge Q of each structure, elementary charges, in double precision. If not given it is the sum of
            the initial charges (a whole number where it is one to WHOLE), and zero where there are none.

    Raises:
        UserError: wrong shape, not finite or beyond 1e9 A, flat cell, unsorted or out-of-range structure index.
    """

    positions: Tensor
    cells: Tensor
    periodic: Tensor
    species: Tensor
    structure_of_atom: Tensor
    names: tuple[str, ...] = field(default=())
    magnetic_moments: Tensor | None = None
    initial_charges: Tensor | None = None
    charges: Tensor = None  # type: ignore[assignment]  # None is the sum of the initial charges

    def __post_init__(self) -> None:
        errors.check_shape("positions", self.positions, ("atoms", 3))
        n_atoms = self.positions.shape[0]
        errors.check_shape(
            "cells", self.cells, ("structures", 3, 3), "Rows are lattice vectors; for one structure pass cell[None]."
        )
        n = self.cells.shape[0]
        errors.check_shape("periodic", self.periodic, (n, 3))
        errors.check_shape("species", self.species, (n_atoms,))
        errors.check_shape("structure_of_atom", self.structure_of_atom, (n_atoms,))
        if not self.names:
            object.__setattr__(self, "names", tuple(f"structure {i}" for i in range(n)))
        if len(self.names) != n:
            raise errors.UserError(f"`names` must hold {n} names; got {len(self.names)}.")
        if n_atoms and (n != 1 or self.structure_of_atom.any()):
            first, last = int(self.structure_of_atom[0]), int(self.structure_of_atom[-1])
            if first < 0 or last >= n or (self.structure_of_atom.diff() < 0).any():
                raise errors.UserError(f"`structure_of_atom` must be sorted with values 0 to {n - 1}.")
        if n_atoms and not self.positions.detach().abs().amax() < errors.LARGEST:
            bad = ~(self.positions.abs() < errors.LARGEST).all(dim=1)
            atom = int(bad.nonzero()[0, 0])
            name, far = self.names[int(self.structure_of_atom[atom])], torch.isfinite(self.positions[atom]).all()
            what = (
                f"farther than {errors.LARGEST:g} A from the origin, where distances are rounding"
                if far
                else "NaN or infinite"
            )
            raise errors.UserError(f"{name}: a position is {what}.")
        errors.check_cells(self.cells, self.periodic, self.names)
        for name, value in self.electronic_start().items():
            vectors = name == "magnetic_moments" and value.dim() == 2
            errors.check_shape(name, value, (n_atoms, 3) if vectors else (n_atoms,))
            if not torch.isfinite(value).all():
                raise errors.UserError(f"`{name}` hold a NaN or infinite number.")
        self._set_charges()

    def _set_charges(self) -> None:
        """Take the total charges as they are given, or from the initial charges."""
        charges = self._implied_charges if self.charges is None else self.charges
        errors.check_shape("charges", charges, (len(self),), "Charges of atoms are `initial_charges`.")
        if not torch.isfinite(charges).all():
            raise errors.UserError("`charges` hold a NaN or infinite number.")
        object.__setattr__(self, "charges", charges.to(dtype=_charge_dtype(charges.device)))

    def __len__(self) -> int:
        return self.cells.shape[0]

    @property
    def n_atoms(self) -> int:
        return self.positions.shape[0]

    def electronic_start(self) -> dict[str, Any]:
        """Magnetic moments and initial charges of atoms by name, those that are given."""
        both = {"magnetic_moments": self.magnetic_moments, "initial_charges": self.initial_charges}
        return {name: value for name, value in both.items() if value is not None}

    @property
    def _implied_charges(self) -> Tensor:
        """(structures,) sums of the initial charges, zero where there are none."""
        sums = torch.zeros(len(self), dtype=_charge_dtype(self.positions.device), device=self.positions.device)
        if self.initial_charges is None:
            return sums
        sums.index_add_(0, self.structure_of_atom, self.initial_charges.to(sums))
        whole = sums.round()
        return torch.where((sums - whole).abs() < WHOLE, whole, sums) + 0.0  # no negative zeros

    @cached_property
    def stated_charges(self) -> dict[int, float]:
        """Total charge of the structures, by index, where it is not what the initial charges say."""
        if not bool(self.charges.any()) and self.initial_charges is None:
            return {}
        other = self.charges != self._implied_charges
        return {s: float(self.charges[s]) for s in other.nonzero().flatten().tolist()}

    @cached_property
    def counts(self) -> Tensor:
        """(structures,) number of atoms of each structure."""
        return torch.bincount(self.structure_of_atom, minlength=len(self))

    @cached_property
    def offsets(self) -> Tensor:
        """(structures + 1,) index of the first atom of each structure; the last entry is the number of atoms."""
        return torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])

    @cached_property
    def volumes(self) -> Tensor:
        """(structures,) A^3; NaN where no axis is periodic or the cell has no volume (there is no stress there)."""
        a, b, c = self.cells.unbind(1)
        volume = (torch.linalg.cross(a, b) * c).sum(1).abs()
        return torch.where(self.periodic.any(dim=1) & (volume > 1e-6), volume, torch.full_like(volume, float("nan")))

    @cached_property
    def distinct_species(self) -> tuple[int, ...]:
        """Sorted atomic numbers that occur."""
        return tuple(self.species.bincount().nonzero()[:, 0].tolist())

    def fingerprints(self) -> tuple[str, ...]:
        """By which `count_matches` recognises each structure in another file: 16 hexadecimal digits of species and periodicity
        (SHA-256; of magnetic moments and charges, too, where they are not zero), and three lengths, A, fixed sums over periodic lattice
        vectors and positions.

        The same atoms in another order, or moved together, have another.
        """
        species, periodic = (x.cpu().numpy() for x in (self.species.long(), self.periodic))
        cells = (self.cells * self.periodic[:, :, None]).double().cpu().numpy()
        positions, offsets, out = self.positions.double().cpu().numpy(), self.offsets.tolist(), []
        for i, (first, last) in enumerate(zip(offsets, offsets[1:], strict=False)):
            digest = hashlib.sha256(species[first:last].astype("<i8").tobytes() + periodic[i].tobytes())
            digest.update(electronic_bytes(self, i))
            lengths = np.concatenate([cells[i].ravel(), positions[first:last].ravel()])
            # frequencies that are no multiples of one another: no two coordinates count alike in all three
            weights = np.cos(np.outer(np.sqrt([2.0, 3.0, 5.0]), np.arange(1, len(lengths) + 1)))
            sums = weights @ lengths / math.sqrt(len(lengths))  # rounding of the lengths stays as large as it is
            out.append(" ".join([digest.hexdigest()[:16], *(f"{x:.6f}" for x in sums)]))
        return tuple(out)

    def composition(self, species: Sequence[int]) -> Tensor:
        """(structures, len(species)) number of atoms of each of the given species."""
        counts = torch.zeros(len(self), len(species), dtype=self.positions.dtype, device=self.positions.device)
        for k, z in enumerate(species):
            counts[:, k] = torch.bincount(self.structure_of_atom[self.species == z], minlength=len(self))
        return counts

    def atoms_of(self, indices: Sequence[int] | Tensor) -> Tensor:
        """(atoms,) of the structures with the given indices, in that order."""
        indices = torch.as_tensor(indices, device=self.offsets.device, dtype=torch.long)
        which, rank = repeat_with_rank(self.counts[indices])
        return self.offsets[indices][which] + rank

    def select(self, indices: Sequence[int] | Tensor) -> Structures:
        """The structures with the given indices, in that order."""
        indices = torch.as_tensor(indices, device=self.positions.device, dtype=torch.long)
        atoms = self.atoms_of(indices)
        owner = repeat_with_rank(self.counts[indices])[0]
        names = tuple(self.names[i] for i in indices.tolist())
        here = self.positions[atoms], self.cells[indices], self.periodic[indices], self.species[atoms], owner, names
        more = {name: value[atoms] for name, value in self.electronic_start().items()}
        return Structures(*here, **more, charges=self.charges[indices])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Structures:
        """The same structures on another device or in another floating-point type; UserError for a device not there."""
        if device is not None:
            errors.check_device(str(device))
        positions = self.positions.to(device=device, dtype=dtype)
        if positions is self.positions:  # as everything else then is
            return self
        cells = self.cells.to(device=device, dtype=dtype)
        periodic, species, owner = (x.to(device=device) for x in (self.periodic, self.species, self.structure_of_atom))
        more = {name: value.to(device=device) for name, value in self.electronic_start().items()}
        charges = self.charges.to(device=device, dtype=_charge_dtype(positions.device))
        return Structures(positions, cells, periodic, species, owner, self.names, **more, charges=charges)

    def with_positions(self, positions: Tensor, cells: Tensor | None = None) -> Structures:
        """The same atoms at other positions (and in other cells)."""
        return replace(self, positions=positions, cells=self.cells if cells is None else cells)

    def with_unchecked_positions(self, positions: Tensor, cells: Tensor) -> Structures:
        """As with_positions without any check and without a host synchronisation.

        For steps of dynamics: a search of neighbours checks positions and cells when it has to.
        """
        out = object.__new__(Structures)
        reusable = ["counts", "offsets", "distinct_species"]  # cached, and of the atoms alone
        reusable += ["volumes"] if cells is self.cells else []
        same = {name: getattr(self, name) for name in (*_FIELDS, *reusable)}
        out.__dict__.update(same | {"positions": positions, "cells": cells})
        return out

    @staticmethod
    def concatenate(parts: Sequence[Structures]) -> Structures:
        """Return one batch of all structures of the parts."""
        shifts = torch.tensor([0] + [len(p) for p in parts]).cumsum(0).tolist()
        return Structures(
            torch.cat([p.positions for p in parts]),
            torch.cat([p.cells for p in parts]),
            torch.cat([p.periodic for p in parts]),
            torch.cat([p.species for p in parts]),
            torch.cat([p.structure_of_atom + s for p, s in zip(parts, shifts, strict=False)]),
            tuple(name for p in parts for name in p.names),
            magnetic_moments=_join_electronic(parts, "magnetic_moments"),
            initial_charges=_join_electronic(parts, "initial_charges"),
            charges=torch.cat([p.charges for p in parts]),
        )


def _charge_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which has no double precision


_FIELDS = tuple(f.name for f in fields(Structures))


def _join_electronic(parts: Sequence[Structures], name: str) -> Tensor | None:
    """Moments or initial charges of all parts, zero where a part has none; moments along z where others are vectors."""
    given = [part.electronic_start().get(name) for part in parts]
    if all(value is None for value in given):
        return None
    zeros = [part.positions.new_zeros(part.n_atoms) for part in parts]
    values = [zero if value is None else value for value, zero in zip(given, zeros, strict=True)]
    if any(value.dim() == 2 for value in values):
        values = [v if v.dim() == 2 else torch.nn.functional.pad(v[:, None], (2, 0)) for v in values]
    return torch.cat(values)


def electronic_bytes(structures: Structures, s: int = 0) -> bytes:
    """Moments and charges of structure s for a hash; nothing where they are zero, which is the same as none."""
    out, names = b"", {"magnetic_moments": b"magnetic_moments", "initial_charges": b"charges"}  # as before totals
    for name, value in structures.electronic_start().items():
        here = value[structures.offsets[s] : structures.offsets[s + 1]].detach().cpu().double() + 0.0  # no -0.0
        out += names[name] + here.numpy().astype("<f8").tobytes() if bool(here.any()) else b""
    if s in structures.stated_charges:
        out += b"charge" + np.array(structures.stated_charges[s], dtype="<f8").tobytes()
    return out


def plain_structure(structures: Structures, i: int = 0) -> dict[str, Any]:
    """A structure as plain numbers: positions, cell, periodic, species; moments, initial charges and total charge if they are not zero."""
    one = structures.select([i])
    return {
        "positions": one.positions.double().tolist(),
        "cell": one.cells[0].double().tolist(),
        "periodic": one.periodic[0].tolist(),
        "species": one.species.tolist(),
        **{name: value.tolist() for name, value in one.electronic_start().items() if bool(value.any())},
        **({"charge": float(one.charges[0])} if bool(one.charges.any()) else {}),
    }


def count_matches(fingerprints: Sequence[str], others: Sequence[str]) -> int:
    """How many of `fingerprints` are of a structure that is among `others`, to the rounding of files."""
    places: dict[str, list[np.ndarray]] = {}
    for one in others:
        key, *lengths = one.split()
        places.setdefault(key, []).append(np.array(lengths, dtype=float))
    matches = 0
    for one in fingerprints:
        key, *lengths = one.split()
        if key in places:
            apart = np.abs(np.stack(places[key]) - np.array(lengths, dtype=float)).max(axis=1)
            matches += bool(apart.min() < FINGERPRINT_TOLERANCE)
    return matches


def chunk_ranges(counts: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """First and last + 1 of runs of items whose counts sum to at most `limit`; a larger item is a run by itself."""
    starts, filled = [0], 0
    for i, count in enumerate(counts):
        if filled and filled + count > limit:
            starts.append(i)
            filled = 0
        filled += count
    return list(pairwise([*starts, len(counts)])) if len(counts) else []


def chunk_structures(structures: Structures, atoms: int) -> Iterator[Structures]:
    """Consecutive structures, as many as have about that many atoms together (at least one)."""
    if len(structures) == 1 or 0 < structures.n_atoms <= atoms:
        yield structures
        return
    for first, last in chunk_ranges(structures.counts.tolist(), atoms):
        yield structures.select(range(first, last))


def empty_layers(cell: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """(3,) the widest layer without atoms between the planes of each pair of cell vectors, in units of the cell (3, 3)."""
    places = np.sort(np.linalg.solve(cell.T, positions.T).T % 1.0, axis=0)
    shares = np.diff(np.concatenate([places, places[:1] + 1]), axis=0).max(0)
    return np.asarray(shares / np.linalg.norm(np.linalg.inv(cell), axis=0))


def repeat_with_rank(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Index k repeated counts[k] times, and how many of the same came before each."""
    index = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    return index, torch.arange(len(index), device=counts.device) - (counts.cumsum(0) - counts)[index]


def rank_in_group(groups: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """How many members of its group (0 to n_groups - 1) came before each member, and the number of members of each group."""
    counts = torch.bincount(groups, minlength=n_groups)
    order = groups.argsort(stable=True)
    return torch.empty_like(groups).index_copy_(0, order, repeat_with_rank(counts)[1]), counts
