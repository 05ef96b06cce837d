"""Labels that are written as exact zeros but are none.

Forces on atoms that the file marks as fixed (codes and Atoms.get_forces() write zeros there), forces on atoms that no symmetry
keeps at rest, and stresses whose six components are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gpmlp.core.errors import UserError
from gpmlp.core.findings import Finding
from gpmlp.core.neighbors import find_neighbors
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.io.frames import Frame
from gpmlp.io.labels import per_component

FIXED = ("fixed", "is_fixed", "frozen", "is_frozen", "constrained", "fix")  # true where an atom is held
FREE = ("free", "moving", "movable", "selective_dynamics")  # true where it is not
CUTOFF = 5.0  # A
POWERS = (0, 1, 2)  # of the radial functions
AT_REST = 3e-3  # of the sum of weights: an atom some 0.02 A off its site
SMALL = 0.1  # eV/A
TOGETHER = 100  # structures whose neighbours are in memory together
NAN = float("nan")


def without_false_zeros(
    frames: Sequence[Frame], structures: Structures, targets: Targets
) -> tuple[Targets, list[Finding]]:
    """Targets, NaN where a label is 0 but is none, and what was left out."""
    findings = []
    forces, stresses = targets.forces, targets.stresses
    zero = forces == 0
    if zero.any():
        held = _held(frames, structures, zero.any(1))
        held &= (zero | ~held).all(1, keepdim=True)
        forces = forces.masked_fill(held, NAN)
        moving = _moving(structures, (forces == 0).all(1) & ~_nearly_relaxed(structures, forces))
        forces = forces.masked_fill(moving[:, None], NAN)
        findings += _finding("zero-forces-on-fixed-atoms", "that are fixed", structures, held.any(1))
        findings += _finding("zero-forces-not-at-rest", "that symmetry does not keep at rest", structures, moving)
    empty = (stresses == 0).all(2).all(1)
    if empty.any():
        stresses = stresses.masked_fill(empty[:, None, None], NAN)
        names = tuple(structures.names[i] for i in empty.nonzero()[:, 0].tolist())
        text = "a stress that is exactly 0 in all its components is no label and is left out."
        findings.append(Finding("zero-stress", "warning", text, names, {"frames": float(len(names))}))
    return replace(targets, forces=forces, stresses=stresses), findings


def _finding(kind: str, which: str, structures: Structures, atoms: Tensor) -> list[Finding]:
    if not atoms.any():
        return []
    owners, n = structures.structure_of_atom[atoms].unique().tolist(), int(atoms.sum())
    text = f"forces of exactly 0 on {n} atoms {which} are taken as missing."
    names = tuple(structures.names[i] for i in owners)
    return [Finding(kind, "warning", text, names, {"atoms": float(n)}, "Give the forces on all atoms (raw forces).")]


def _held(frames: Sequence[Frame], structures: Structures, zero: Tensor) -> Tensor:
    """(atoms, 3) whether a file says that an atom is held there, in frames with zeros; all held components of it are 0."""
    held = np.zeros((structures.n_atoms, 3), dtype=bool)
    offsets = structures.offsets.tolist()
    for i in structures.structure_of_atom[zero].unique().tolist():
        frame, here = frames[i], held[offsets[i] : offsets[i + 1]]
        if frame.fixed is not None:
            here |= per_component(frame.fixed, len(frame))
        for key, value in frame.arrays.items():
            if str(key).lower() in FIXED + FREE:
                here |= per_component(value, len(frame)) ^ (str(key).lower() in FREE)
    return torch.from_numpy(held)


def _nearly_relaxed(structures: Structures, forces: Tensor) -> Tensor:
    """(atoms,) whether the forces of the structure are small but not all 0: zeros among them may be rounded."""
    sizes = forces.nan_to_num().abs().amax(1)
    largest = torch.zeros(len(structures), dtype=sizes.dtype).scatter_reduce(
        0, structures.structure_of_atom, sizes, "amax"
    )
    return ((largest > 0) & (largest < SMALL))[structures.structure_of_atom]


def _moving(structures: Structures, zero: Tensor) -> Tensor:
    """(atoms,) whether a force is 0 though the atom is not at rest by symmetry."""
    found = torch.zeros_like(zero)
    for part in structures.structure_of_atom[zero].unique().split(TOGETHER):
        atoms = structures.atoms_of(part)
        found[atoms] = zero[atoms] & not_at_rest(structures.select(part))
    return found


def not_at_rest(structures: Structures) -> Tensor:
    """(atoms,) whether no symmetry forbids a force on an atom.

    Where the symmetry of a site forbids a force, it forbids every vector that the environment gives, such as the sums over
    neighbours of unit vectors times a function of distance (and of element). Those of several functions are compared with 0.
    """
    moving = torch.zeros(structures.n_atoms, dtype=torch.bool)
    try:
        pairs = find_neighbors(structures, CUTOFF)
    except UserError:  # atoms on top of each other, which is said elsewhere
        return moving
    vectors = pairs.vectors(structures)
    lengths = vectors.norm(dim=1, keepdim=True)
    near = 1 - lengths / CUTOFF
    weights = near**2 * torch.cat([(lengths / CUTOFF) ** power for power in POWERS], dim=1)
    for element in structures.distinct_species:
        of_element = weights * (structures.species[pairs.neighbors] == element)[:, None]
        total = weights.new_zeros(len(moving), len(POWERS)).index_add_(0, pairs.centers, of_element)
        sums = weights.new_zeros(len(moving), len(POWERS), 3)
        sums.index_add_(0, pairs.centers, of_element[:, :, None] * (vectors / lengths)[:, None, :])
        moving |= (sums.norm(dim=2) > AT_REST * total).any(1)
    return moving
