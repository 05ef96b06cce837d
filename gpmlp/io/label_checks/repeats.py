"""The same structure twice with unequal labels, which nothing can fit, and the same labels on unequal structures, which are stale.

Structures are compared by numbers that translations, rotations, reflections, the order of the atoms and lattice translations do not
change: for each atom a smooth function of where the others are, sorted within each element. Of molecules it is a sum over distances,

    a_i = sum_j w_j exp(-r_ij / 2 A),

of periodic structures a filtered density in fractional coordinates s, a_i = Re sum_h c_h exp(2 pi i h.s_i) conj(S_h) with
S_h = sum_j w_j exp(2 pi i h.s_j), beside the metric C C^T of the cell. Other lattice vectors or a repeated cell are not recognised.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from gpmlp.core.findings import Finding, Severity
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.io.label_checks.near_frames import whole_cells

SAME = 2e-3  # of signatures, which change by about that where an atom moves by as many A
WINDOW = 16  # neighbours in the order of a projection of signatures that are compared
VERIFIED = 500  # pairs with contradictory labels that are compared atom by atom
DISPLACED = 0.02  # A, by which the atoms of equal structures may differ
ENERGIES_DIFFER = 1e-3  # eV/atom; more is a warning,
ENERGIES_CONTRADICT = 0.02  # more an error
STIFFNESS = 15.0  # eV/A^2, half the largest force constant of a displacement
FORCES_DIFFER = 0.05, 0.1  # eV/A and relative, of the rms force
CHUNK = 1 << 22  # numbers of one array that are in memory together


def check_repeats(structures: Structures, targets: Targets) -> list[Finding]:
    """Findings about equal structures with unequal energies or forces, and about unequal structures with the same forces."""
    out = []
    pairs = [torch.zeros(0, 2, dtype=torch.long)]
    for members in same_composition(structures):
        pairs.append(equal_pairs(structures, members))
    equal = torch.cat(pairs)
    rms = rms_forces(structures, targets)
    energies, counts = targets.energies.double(), structures.counts.double()
    difference = (energies[equal[:, 0]] - energies[equal[:, 1]]).abs()
    of_forces = (rms[equal[:, 0]] - rms[equal[:, 1]]).abs()
    shift = rms[equal].nan_to_num().max(1).values * DISPLACED
    by_motion = (counts[equal[:, 0]].sqrt() * shift) + STIFFNESS * DISPLACED**2
    exact = _exact_pairs(structures, equal)
    allowed = torch.where(exact, 0.0, by_motion)
    unequal = difference > (ENERGIES_DIFFER * counts[equal[:, 0]]).maximum(allowed)
    bad = unequal & _verified(structures, equal, unequal, exact)
    out += _energy_findings(structures, energies, equal[bad], difference[bad])
    least = torch.tensor(FORCES_DIFFER[0]).maximum(FORCES_DIFFER[1] * rms[equal].max(1).values)
    other = (of_forces > least) & exact & ~bad
    if other.any():
        pair = equal[other][of_forces[other].argmax()]
        text = (
            f"the same structure with two sets of forces: {rms[pair[0]]:.3g} and {rms[pair[1]]:.3g} eV/A (rms); nothing can fit both "
            f"({len(equal[other].unique())} frames)."
        )
        numbers = {"rms_force_eV_per_A": float(rms[pair[0]]), "other_rms_force_eV_per_A": float(rms[pair[1]])}
        frames = _names(structures, pair, equal[other])
        out.append(Finding("same-structure-two-forces", "error", text, frames, numbers, "Keep one of them."))
    return out + _stale_labels(structures, targets, equal)


def rms_forces(structures: Structures, targets: Targets) -> Tensor:
    """(structures,) root mean square of the force vectors, eV/A; NaN where one is unknown."""
    squares = targets.forces.double().square().sum(1)
    summed = torch.zeros(len(structures), dtype=torch.float64).index_add_(0, structures.structure_of_atom, squares)
    return (summed / structures.counts).sqrt()


def same_composition(structures: Structures) -> Iterator[Tensor]:
    """(members,) indices of structures with the same atoms, in any order, charge and periodicity; more than one each."""
    charges = structures.charges.numpy() + 0.0
    order = np.lexsort((structures.species.numpy(), structures.structure_of_atom.numpy()))
    species, offsets = structures.species.numpy()[order], structures.offsets.tolist()
    periodic = structures.periodic.numpy().astype(np.uint8)
    groups: dict[bytes, list[int]] = {}
    for s, (first, last) in enumerate(itertools.pairwise(offsets)):
        if last > first:
            key = charges[s].tobytes() + periodic[s].tobytes() + species[first:last].tobytes()
            groups.setdefault(key, []).append(s)
    return (torch.tensor(members) for members in groups.values() if len(members) > 1)


def equal_pairs(structures: Structures, members: Tensor) -> Tensor:
    """(pairs, 2) members with equal signatures."""
    n_atoms = int(structures.counts[members[0]])
    step = max(1, CHUNK // (n_atoms * max(n_atoms, 13)))
    signature = torch.cat([_signature(structures, members[k : k + step]) for k in range(0, len(members), step)])
    weights = torch.cos(torch.arange(signature.shape[1], dtype=torch.float64) * 2.399963)
    shadow = signature @ weights / len(weights) ** 0.5
    order = shadow.argsort()
    pairs = []
    for k in range(1, min(WINDOW, len(members) - 1) + 1):
        left, right = order[:-k], order[k:]
        near = (shadow[right] - shadow[left]) < SAME * len(weights) ** 0.5
        left, right = left[near], right[near]
        same = (signature[left] - signature[right]).abs().max(1).values < SAME
        pairs.append(torch.stack([members[left[same]], members[right[same]]], 1).sort(1).values)
    return torch.cat(pairs)


def _signature(structures: Structures, members: Tensor) -> Tensor:
    """(members, numbers) that are equal where structures are."""
    n_atoms = int(structures.counts[members[0]])
    rows = structures.offsets[members][:, None] + torch.arange(n_atoms)
    positions, species = structures.positions[rows].double(), structures.species[rows]
    weights, periodic = species.double().sqrt(), structures.periodic[members[0]]
    if not periodic.any():
        around = torch.exp(-0.5 * torch.cdist(positions, positions)) @ weights[:, :, None]
        values, metric = around[:, :, 0], positions.new_zeros(len(members), 0)
    else:
        cells = whole_cells(structures.cells[members].double(), periodic)
        fractional = torch.linalg.solve(cells.mT, positions.mT).mT
        vectors = torch.tensor([h for h in itertools.product((-1, 0, 1), repeat=3) if h > (0, 0, 0)]).double()
        waves = torch.exp(2j * torch.pi * (fractional @ vectors.T))
        density = (weights[:, :, None] * waves).sum(1)
        strength = 1 / torch.sqrt(torch.arange(2.0, 2 + len(vectors))).double()
        values = (waves * (strength * density.conj())[:, None]).real.sum(2)
        metric = (cells @ cells.mT).flatten(1) / cells.flatten(1).norm(dim=1, keepdim=True)
    # by element, then by value
    ordered = (values + 1e4 * species).sort(1).values - 1e4 * species.sort(1).values
    return torch.cat([ordered, metric], 1)


def _exact_pairs(structures: Structures, pairs: Tensor) -> Tensor:
    """(pairs,) whether atom by atom, in the order of the file, positions and cells agree to SAME A."""
    counts = structures.counts
    atoms = [structures.atoms_of(pairs[:, e]) for e in (0, 1)]
    owner = torch.repeat_interleave(torch.arange(len(pairs)), counts[pairs[:, 0]])
    apart = (structures.positions[atoms[0]] - structures.positions[atoms[1]]).abs().max(1).values
    apart = torch.where(structures.species[atoms[0]] == structures.species[atoms[1]], apart, torch.inf)
    largest = torch.zeros(len(pairs), dtype=apart.dtype).scatter_reduce(0, owner, apart, "amax")
    cells = (structures.cells[pairs[:, 0]] - structures.cells[pairs[:, 1]]) * structures.periodic[pairs[:, 0]][
        :, :, None
    ]
    return (largest < SAME) & (cells.abs().flatten(1).max(1).values < SAME)


def _verified(structures: Structures, pairs: Tensor, wanted: Tensor, exact: Tensor) -> Tensor:
    """(pairs,) of the wanted ones, whether the structures are equal atom by atom up to motion and order; of at most VERIFIED."""
    out = exact & wanted
    for k in (wanted & ~exact).nonzero().flatten()[:VERIFIED].tolist():
        out[k] = same_atoms_elsewhere(structures.select(pairs[k]))
    return out


def same_atoms_elsewhere(two: Structures) -> bool:
    """Whether the second of two periodic structures has the atoms of the first, moved together and in any order, to DISPLACED A.

    Of molecules, whether the sorted distances of each atom from the others are equal.
    """
    n, periodic = int(two.counts[0]), two.periodic[0]
    positions, species = two.positions.double().view(2, n, 3), two.species.view(2, n)
    if not periodic.any():
        order = species.argsort(dim=1, stable=True)
        distances = torch.cdist(positions, positions).sort(2).values.gather(1, order[:, :, None].expand(2, n, n))
        key = distances.sum(2) + 1e6 * species.gather(1, order)
        distances = distances.gather(1, key.argsort(1)[:, :, None].expand(2, n, n))
        return bool((distances[0] - distances[1]).abs().max() < DISPLACED)
    cells = whole_cells(two.cells.double(), periodic)
    if (cells[0] @ cells[0].T - cells[1] @ cells[1].T).abs().max() > DISPLACED * cells[0].norm():
        return False
    fractional = torch.linalg.solve(cells.mT, positions.mT).mT
    rarest = min(species[0].unique().tolist(), key=lambda z: int((species[0] == z).sum()))
    anchor = int((species[0] == rarest).nonzero()[0])
    for image in (species[1] == rarest).nonzero().flatten().tolist():
        for sign in (1.0, -1.0):  # an inversion keeps the energy
            moved = sign * (fractional[1] - fractional[1, image])
            step = moved[:, None] - (fractional[0] - fractional[0, anchor])[None]
            step = step - torch.where(periodic, step.round(), 0.0)
            distance = (step @ cells[0]).norm(dim=2)
            distance[species[1][:, None] != species[0][None]] = torch.inf
            nearest, which = distance.min(1)
            if nearest.max() < DISPLACED and len(which.unique()) == n:
                return True
    return False


def _energy_findings(structures: Structures, energies: Tensor, pairs: Tensor, difference: Tensor) -> list[Finding]:
    if not len(pairs):
        return []
    per_atom = difference / structures.counts[pairs[:, 0]]
    worst = int(per_atom.argmax())
    a, b = pairs[worst].tolist()
    count = len(pairs.unique())
    severity: Severity = "error" if float(per_atom[worst]) > ENERGIES_CONTRADICT else "warning"
    text = (
        f"the same structure with two energies: {energies[a]:.6g} and {energies[b]:.6g} eV, {1e3 * per_atom[worst]:.3g} meV/atom apart"
        f"{f', and so on: {count} frames contradict one another' if count > 2 else ''}; nothing can fit both."
    )
    numbers = {
        "energy_eV": float(energies[a]),
        "other_energy_eV": float(energies[b]),
        "difference_eV": float(difference[worst]),
        "frames": float(count),
    }
    advice = (
        "Charge (give it, as charge=1), spin, functional, k-points or convergence differ: keep the frames of one kind."
    )
    return [
        Finding("same-structure-two-energies", severity, text, _names(structures, pairs[worst], pairs), numbers, advice)
    ]


def _names(structures: Structures, first: Tensor, all_pairs: Tensor) -> tuple[str, ...]:
    """Names of the frames of one pair, then those of the others."""
    return tuple(structures.names[i] for i in dict.fromkeys([*first.tolist(), *all_pairs.flatten().tolist()]))


def _stale_labels(structures: Structures, targets: Targets, equal: Tensor) -> list[Finding]:
    """Different structures whose forces are the same to the last digit: labels of an earlier frame."""
    size = torch.zeros(len(structures), dtype=torch.float64)
    place = torch.arange(structures.n_atoms) - structures.offsets[structures.structure_of_atom]
    weights = torch.cos(place[:, None] * 3.0 + torch.arange(3.0)).double()
    size.index_add_(0, structures.structure_of_atom, (targets.forces.double() * weights).sum(1))
    known = ~size.isnan() & (rms_forces(structures, targets) > 1e-3) & (structures.counts > 1)
    index = known.nonzero().flatten()
    order = index[size[index].argsort()]
    left, right = order[:-1], order[1:]
    same = (size[left] == size[right]) & (structures.counts[left] == structures.counts[right])
    known_equal = {tuple(pair) for pair in equal.tolist()}
    pairs = torch.stack([left[same], right[same]], 1).sort(1).values
    stale = [pair for pair in pairs.tolist() if tuple(pair) not in known_equal]
    if not stale:
        return []
    frames = tuple(structures.names[i] for i in dict.fromkeys(itertools.chain(*stale)))
    text = (
        f"different structures with the same forces to the last digit ({len(frames)} frames): labels of another frame."
    )
    advice = "Compute these frames again, or remove them."
    return [Finding("stale-labels", "error", text, frames, {"frames": float(len(frames))}, advice)]
