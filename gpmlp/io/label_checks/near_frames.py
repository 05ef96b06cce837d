"""Pairs of near frames: the same atoms, a little displaced, with their energy difference and the work of forces and stresses on the way.

Between frames A and B of the same atoms in the same order, with fractional displacements ds and a change dC of the cell, the
trapezoid rule gives

    E_B - E_A = w_F + w_S + O(displacement^3),
    w_F = -1/2 sum_i [F_i,A . (ds_i C_A) + F_i,B . (ds_i C_B)],   w_S = 1/2 [V_A sigma_A : C_A^-1 dC + V_B sigma_B : C_B^-1 dC].

Isolated molecules are turned onto each other first (Kabsch, Acta Cryst. A 32, 922 (1976)).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures

LARGEST_DISPLACEMENT = 0.6  # A, of any atom: farther apart the trapezoid rule says little
LARGEST_STRAIN = 0.15
ALL_PAIRS = 100  # frames of which every pair is tried
MOST_FRAMES = 20_000  # of one molecule or cell: more would only repeat what these say
RUN = 100  # frames that follow one another and are taken together
PROJECTIONS = 6  # random directions along which frames are sorted; neighbours there may be near
PAIR_ATOMS = 1 << 20  # atoms of pairs that are in memory together
NORMAL = 50.0  # A, in place of a lattice vector along an axis that is not periodic


@dataclass(frozen=True, eq=False)
class NearPairs:
    """Pairs of near frames.

    Attributes:
        first, second: (pairs,) structure indices.
        energy: (pairs,) E_B - E_A, eV; force_work, stress_work: (pairs,) w_F, w_S, eV.
        curvature: (pairs,) |1/2 (F_B - F_A) . dr|, eV: the second-order part of w_F, by which the third order is judged.
        displacement: (pairs,) the largest of any atom, A; strain: (pairs,) |C^-1 dC|; atoms: (pairs,).
    """

    first: Tensor
    second: Tensor
    energy: Tensor
    force_work: Tensor
    stress_work: Tensor
    curvature: Tensor
    displacement: Tensor
    strain: Tensor
    atoms: Tensor

    def __len__(self) -> int:
        return len(self.first)

    def select(self, which: Tensor) -> NearPairs:
        """The pairs of a mask or of indices."""
        return NearPairs(*(getattr(self, f.name)[which] for f in fields(self)))


def find_near_pairs(structures: Structures, targets: Targets) -> NearPairs:
    """Pairs of frames that follow one another or are neighbours along random directions, and are near.

    The cost grows as the number of frames. Pairs in different cells need the stresses of both, all pairs the forces on all atoms that move.
    """
    parts = [_empty()]
    for members in same_atoms(structures, ~targets.energies.isnan()):
        if len(members) > MOST_FRAMES:
            runs = torch.linspace(0, len(members) - RUN, MOST_FRAMES // RUN).long()
            members = members[(runs[:, None] + torch.arange(RUN)).flatten().unique()]
        frames = _Frames.of_members(structures, targets, members)
        pairs = _candidates(frames)
        step = max(1, PAIR_ATOMS // frames.positions.shape[1])
        parts += [frames.compare(*pairs[k : k + step].unbind(1)) for k in range(0, len(pairs), step)]
    return NearPairs(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(NearPairs)))


def _empty() -> NearPairs:
    index, number = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.float64)
    return NearPairs(index, index, *(number,) * 7)


def same_atoms(structures: Structures, usable: Tensor) -> Iterator[Tensor]:
    """(members,) indices of the usable structures of two atoms or more with the same charge, periodicity and species, in this order."""
    charges = structures.charges.cpu().numpy() + 0.0
    species, offsets = structures.species.cpu().numpy(), structures.offsets.tolist()
    periodic = structures.periodic.cpu().numpy().astype(np.uint8)
    groups: dict[bytes, list[int]] = {}
    for s in (usable & (structures.counts > 1)).nonzero().flatten().tolist():
        key = charges[s].tobytes() + periodic[s].tobytes() + species[offsets[s] : offsets[s + 1]].tobytes()
        groups.setdefault(key, []).append(s)
    return (torch.tensor(members) for members in groups.values() if len(members) > 1)


def whole_cells(cells: Tensor, periodic: Tensor) -> Tensor:
    """(n, 3, 3) cells whose vectors along axes that are not periodic are replaced by vectors of length NORMAL normal to the others."""
    if periodic.all():
        return cells
    cells = cells.clone()
    axes, free = periodic.nonzero().flatten().tolist(), (~periodic).nonzero().flatten().tolist()
    if len(axes) == 2:
        normals = [torch.linalg.cross(cells[:, axes[0]], cells[:, axes[1]])]
    elif len(axes) == 1:
        along = cells[:, axes[0]]
        helper = torch.eye(3, dtype=cells.dtype)[along.abs().argmin(1)]
        normals = [torch.linalg.cross(along, helper)]
        normals.append(torch.linalg.cross(along, normals[0]))
    else:
        normals = list(torch.eye(3, dtype=cells.dtype).expand(len(cells), 3, 3).unbind(1))
    for axis, normal in zip(free, normals, strict=True):
        cells[:, axis] = NORMAL * normal / normal.norm(dim=1, keepdim=True)
    return cells


@dataclass(frozen=True, eq=False)
class _Frames:
    """Frames of the same atoms as arrays: (frames, atoms, 3) positions, fractional coordinates and forces, (frames,) energies, ..."""

    index: Tensor
    positions: Tensor
    fractional: Tensor
    forces: Tensor
    energies: Tensor
    stresses: Tensor
    cells: Tensor
    periodic: Tensor

    @staticmethod
    def of_members(structures: Structures, targets: Targets, members: Tensor) -> _Frames:
        """The structures of these indices."""
        rows = structures.offsets[members][:, None] + torch.arange(int(structures.counts[members[0]]))
        positions, periodic = structures.positions[rows].double(), structures.periodic[members[0]]
        cells = whole_cells(structures.cells[members].double(), periodic)
        fractional = torch.linalg.solve(cells.mT, positions.mT).mT
        forces, energies = targets.forces[rows].double(), targets.energies[members].double()
        stresses = targets.stresses[members].double()
        return _Frames(members, positions, fractional, forces, energies, stresses, cells, periodic)

    def compare(self, a: Tensor, b: Tensor) -> NearPairs:
        """The pairs among those with these places that are near and labelled."""
        if not self.periodic.any():
            return self._compare_molecules(a, b)
        step = self.fractional[b] - self.fractional[a]
        step = step - torch.where(self.periodic, step.round(), 0.0)
        step = step - step.mean(1, keepdim=True)
        change = torch.where(self.periodic[:, None], self.cells[b] - self.cells[a], 0.0)
        strain = torch.linalg.solve(self.cells[a], change).flatten(1).norm(dim=1)
        near = ((step @ self.cells[a]).norm(dim=2).max(1).values < LARGEST_DISPLACEMENT) & (strain < LARGEST_STRAIN)
        a, b, step, change, strain = a[near], b[near], step[near], change[near], strain[near]
        moves = step @ self.cells[a], step @ self.cells[b]
        work = [
            0.5 * torch.linalg.det(self.cells[e]).abs() * (self.stresses[e] * torch.linalg.solve(self.cells[e], change)).sum((1, 2))
            for e in (a, b)
        ]  # fmt: skip
        stress = torch.where(strain > 1e-6, work[0] + work[1], 0.0)
        return self._near(a, b, moves, (self.forces[a], self.forces[b]), stress, strain)

    def _compare_molecules(self, a: Tensor, b: Tensor) -> NearPairs:
        first, second = (self.positions[e] - self.positions[e].mean(1, keepdim=True) for e in (a, b))
        left, _, right = torch.linalg.svd(second.mT @ first)
        left = torch.cat([left[:, :, :2], left[:, :, 2:] * torch.linalg.det(left @ right)[:, None, None].sign()], 2)
        move = second @ (left @ right) - first
        near = move.norm(dim=2).max(1).values < LARGEST_DISPLACEMENT
        a, b, move, turn = a[near], b[near], move[near], (left @ right)[near]
        zero = torch.zeros(len(a), dtype=torch.float64)
        return self._near(a, b, (move, move), (self.forces[a], self.forces[b] @ turn), zero, zero)

    def _near(
        self, a: Tensor, b: Tensor, moves: tuple[Tensor, Tensor], forces: tuple[Tensor, Tensor], stress: Tensor, strain: Tensor
    ) -> NearPairs:  # fmt: skip
        # an unknown force on an atom that does not move does no work
        first, second = (
            torch.where(d.abs() < 1e-9, 0.0, f * d).sum((1, 2)) for f, d in zip(forces, moves, strict=True)
        )
        displacement, energy = moves[0].norm(dim=2).max(1).values, self.energies[b] - self.energies[a]
        atoms = torch.full_like(energy, moves[0].shape[1])
        values = energy, -0.5 * (first + second), stress, 0.5 * (second - first).abs(), displacement, strain, atoms
        known = ~torch.stack(values).isnan().any(0)
        return NearPairs(self.index[a], self.index[b], *values).select(known)


def _candidates(frames: _Frames) -> Tensor:
    """(pairs, 2) places of frames that follow one another or are neighbours along random directions of their shapes."""
    n = len(frames.index)
    if n <= ALL_PAIRS:
        return torch.combinations(torch.arange(n))
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.stack([torch.arange(n - 1), torch.arange(1, n)], 1)]
    for shadow in _project(frames, generator).unbind(1):
        order = shadow.argsort()
        pairs += [torch.stack([order[:-k], order[k:]], 1) for k in (1, 2) if n > k]
    return torch.cat(pairs).sort(1).values.unique(dim=0)


def _project(frames: _Frames, generator: torch.Generator) -> Tensor:
    """(frames, PROJECTIONS) smooth functions of the shape, which translations and rotations do not change."""
    n_atoms = frames.positions.shape[1]
    if frames.periodic.any():
        angles = 2 * torch.pi * (frames.fractional - frames.fractional[:, :1])
        weights = torch.randn(2, 3 * n_atoms, PROJECTIONS, dtype=torch.float64, generator=generator)
        return angles.sin().flatten(1) @ weights[0] + angles.cos().flatten(1) @ weights[1]
    one, other = torch.randint(n_atoms, (2, 4 * n_atoms), generator=generator)
    weights = torch.randn(4 * n_atoms, PROJECTIONS, dtype=torch.float64, generator=generator)
    return (frames.positions[:, one] - frames.positions[:, other]).norm(dim=2) @ weights
