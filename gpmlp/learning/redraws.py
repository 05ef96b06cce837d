"""Redraws: the force on an atom while all atoms beyond a radius are displaced (Deringer and Csányi, Phys. Rev. B 95, 094203 (2017))."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from ase.geometry import get_distances

from gpmlp.core import errors
from gpmlp.core.errors import UserError, chemical_symbol
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting.report import Progress
from gpmlp.io.ase_atoms import structures_from_ase, to_ase
from gpmlp.io.files import check_folder, open_locked
from gpmlp.learning.labels import LabelEntry, LabelFile, LabelRefusal, canonical_structure, key_of
from gpmlp.learning.oracles.labeller import Labeller, check_refusal
from gpmlp.learning.oracles.oracle import OracleRecipe
from gpmlp.learning.oracles.single_point import FORCES

RADII = (3.5, 4.5, 5.5, 6.5, 8.0)  # A
FEWEST_RADII = 3  # of these that there is room for; otherwise so many between half of the room and all of it
LEAST_ROOM = 2.0  # A, for any radius, unless they are given
MARGIN = 1.0  # A, around the sphere, of atoms to redraw before it meets its own images
CANDIDATES = 64  # atoms among which central ones with room are chosen


@dataclass(frozen=True)
class Redraws:
    """What is redrawn.

    Attributes:
        radii: A; () for those of RADII that the structures have room for.
        displacement: standard deviation of each component, A.
        draws: for each radius and central atom; centres: number of central atoms.
        repeat: whether periodic cells that are too small for the longest radius are repeated.
    """

    radii: tuple[float, ...] = ()
    displacement: float = 0.1
    draws: int = 8
    centres: int = 8
    repeat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "radii", tuple(sorted({float(radius) for radius in self.radii})))
        for name, value in (("displacement", self.displacement), *(("radii", radius) for radius in self.radii)):
            errors.check_positive(name, value)
        errors.check_integer("number of draws", self.draws, 2)
        errors.check_integer("number of central atoms", self.centres, 1)


@dataclass(frozen=True)
class LocalityFloor:
    """The spread of forces due to atoms beyond a radius.

    Attributes:
        radius: A.
        spread: rms over components and central atoms of the standard deviation of the force, eV/A; error: its standard error.
        species: the spread by symbol of the central atom.
        labels: that it is made of.
    """

    radius: float
    spread: float
    error: float
    species: dict[str, float]
    labels: int


@dataclass(frozen=True)
class Sphere:
    """A central atom and how far all atoms are from it.

    Attributes:
        structure: one structure; atom: the central one.
        distances: (atoms,) A, of the nearest image.
    """

    structure: Structures
    atom: int
    distances: np.ndarray

    @staticmethod
    def around(structure: Structures, atom: int) -> Sphere:
        where, cell = structure.positions.cpu().double().numpy(), structure.cells[0].cpu().double().numpy()
        _, distances = get_distances(where[[atom]], where, cell=cell, pbc=structure.periodic[0].numpy())
        return Sphere(structure, atom, distances[0])

    @property
    def symbol(self) -> str:
        return chemical_symbol(int(self.structure.species[self.atom]))

    @property
    def room(self) -> float:
        """Radius (A) beyond which there are atoms to redraw, and that leaves MARGIN between the sphere and its images."""
        return min(float(self.distances.max()), 0.5 * _least_height(self.structure) - MARGIN)


def _heights(structure: Structures) -> np.ndarray:
    """(3,) A, of the cell along its three axes; infinite along those that are not periodic."""
    cell, periodic = structure.cells[0].cpu().double().numpy(), structure.periodic[0].numpy()
    filled = np.where(periodic[:, None], cell, 0.0)
    if not periodic.any():
        return np.full(3, np.inf)
    # 1/|b*| with reciprocal vectors within the space of the periodic axes
    return np.where(periodic, 1 / np.maximum(np.linalg.norm(np.linalg.pinv(filled), axis=0), 1e-12), np.inf)


def _least_height(structure: Structures) -> float:
    return float(_heights(structure).min())


def _repeated(structure: Structures, radius: float) -> Structures:
    heights = _heights(structure)
    times = [1 if math.isinf(h) else max(1, math.ceil(2 * (radius + MARGIN) / h + 1e-9)) for h in heights]
    if max(times) == 1:
        return structure
    return structures_from_ase(
        [to_ase(structure)[0].repeat(times)], [f"{structure.names[0]}, {'x'.join(map(str, times))}"]
    )


def _candidates(structures: Structures, chosen: Redraws, radius: float) -> Iterator[Sphere]:
    """Atoms drawn at random: of each structure in turn one of each species, until all are used up."""
    rng = np.random.default_rng([chosen.seed, 0])
    order, turn, left = rng.permutation(len(structures)), 0, True
    while left:
        left = False
        for s in order:
            structure = structures.select([int(s)])
            if chosen.repeat:
                structure = _repeated(structure, radius)
            for z in structure.distinct_species:
                atoms = (structure.species == z).nonzero()[:, 0].numpy()
                if turn < len(atoms):
                    left = True
                    shuffled = np.random.default_rng([chosen.seed, 1, int(s), z]).permutation(atoms)
                    yield Sphere.around(structure, int(shuffled[turn]))
        turn += 1


def draw_spheres(
    structures: Structures, chosen: Redraws, cutoff: float = math.nan
) -> tuple[list[Sphere], tuple[float, ...]]:
    """Central atoms with room for all radii, and these.

    Args:
        cutoff: A, that becomes one of the radii where they are not given and there is room; NaN = none.

    Raises:
        UserError: no structure has room; says which has most.
    """
    longest = chosen.radii[-1] if chosen.radii else RADII[-1]
    candidates = []
    for sphere in _candidates(structures, chosen, longest):
        candidates.append(sphere)
        if len(candidates) >= max(CANDIDATES, chosen.centres):
            break
    roomy = sorted(candidates, key=lambda sphere: -sphere.room)
    needed = chosen.radii[-1] if chosen.radii else LEAST_ROOM
    if roomy[0].room <= needed:
        raise UserError(_no_room(roomy[0], needed, chosen.repeat))
    radii = chosen.radii
    if not radii:
        room = max(roomy[min(chosen.centres, len(roomy)) - 1].room, LEAST_ROOM)
        radii = tuple(sorted(r for r in {*RADII, *([cutoff] if cutoff == cutoff else [])} if r < room))
        if len(radii) < FEWEST_RADII:
            radii = tuple(round(r, 2) for r in np.linspace(0.5, 0.95, FEWEST_RADII + 1) * room)
    return [sphere for sphere in candidates if sphere.room > radii[-1]][: chosen.centres], radii


def _no_room(best: Sphere, radius: float, repeated: bool) -> str:
    name, farthest = best.structure.names[0], float(best.distances.max())
    if best.room < farthest:
        height = _least_height(best.structure)
        return (
            f"The cells are too small for R = {radius:g} A: that of {name}, which has most room, is {height:.3g} A across, and "
            f"2 (R + {MARGIN:g} A) are needed, so that R is at most {max(best.room, 0):.2f} A. Take shorter radii (--radii), larger "
            "cells, or let them be repeated (--repeat)."
        )
    return (
        f"No atom lies beyond R = {radius:g} A of another one: in {name}, which has most room, the farthest is at {farthest:.2f} A. "
        f"Take shorter radii (--radii){'' if repeated else ', or larger structures'}."
    )


def measure_floors(
    spheres: Sequence[Sphere],
    radii: Sequence[float],
    oracle: OracleRecipe,
    folder: Path,
    chosen: Redraws,
    progress: Progress = lambda *_: None,
) -> tuple[LocalityFloor, ...]:
    """Spread of the force on each central atom over draws in which all atoms beyond a radius are displaced.

    Labels are appended to FOLDER/labels.xyz as they come, and not asked for again.

    Raises:
        UserError: the oracle cannot be used, contradicts itself, or failed too often (names the structure).
    """
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [(i, j, k) for i in range(len(spheres)) for j in range(len(radii)) for k in range(chosen.draws)]
    forces = np.full((len(spheres), len(radii), chosen.draws, 3), np.nan)
    with closing(open_locked(folder / "locality.lock")), Labeller(oracle, folder) as labeller:
        labels = LabelFile(folder / "labels.xyz")
        sent = 0
        progress("oracle", 0, len(tasks), "")
        for n, (i, j, k) in enumerate(tasks):
            while sent < min(len(tasks), n + 2 * oracle.workers):
                a, b, c = tasks[sent]
                _submit(labeller, labels, _redrawn(spheres[a], radii[b], c, a, chosen))
                sent += 1
            structure = _redrawn(spheres[i], radii[j], k, i, chosen)
            found = _collect(labeller, labels, structure)
            if found is not None:
                forces[i, j, k] = found.forces[spheres[i].atom].numpy()
            progress("oracle", n + 1, len(tasks), structure.names[0])
    return tuple(_floor(spheres, radii[j], forces[:, j]) for j in range(len(radii)))


def _redrawn(sphere: Sphere, radius: float, draw: int, number: int, chosen: Redraws) -> Structures:
    """The structure with all atoms beyond the radius displaced; the same deviates for each radius, so that floors compare."""
    deviates = np.random.default_rng([chosen.seed, 2, number, draw]).standard_normal((len(sphere.distances), 3))
    moved = torch.from_numpy(chosen.displacement * deviates * (sphere.distances > radius)[:, None])
    structure = sphere.structure
    where = f"{structure.names[0]}, all beyond {radius:g} A of {sphere.symbol} atom {sphere.atom} redrawn, draw {draw}"
    return canonical_structure(replace(structure, positions=structure.positions.cpu().double() + moved, names=(where,)))


def _submit(labeller: Labeller, labels: LabelFile, structure: Structures) -> None:
    key = key_of(structure, labeller.recipe.settings_hash)
    if key not in labels and labels.refusal(key) is None:
        first = not len(labels) and labeller.recipe.check_every
        labeller.submit(key, structure, (FORCES,) if first else ())


def _collect(labeller: Labeller, labels: LabelFile, structure: Structures) -> Targets | None:
    """The label of a structure, once it is in the file; None if the oracle has none."""
    oracle, name = labeller.recipe, structure.names[0]
    key = key_of(structure, oracle.settings_hash)
    if (entry := labels.find(key)) is not None:
        return entry.targets
    refusal = labels.refusal(key)
    if refusal is None:
        answer = labeller.result(key)
        if not isinstance(answer, LabelRefusal):
            entry = LabelEntry(structure, answer.targets, key, name, oracle.settings_hash)
            targets = labels.append(entry).targets
            labeller.forget(key)
            return targets
        if answer.contradiction:
            raise UserError(
                f"{name}: the oracle contradicts itself: {answer.reason} (its files are in {answer.folder})."
            )
        labels.refuse(refusal := answer)
        labeller.forget(key)
    try:
        check_refusal(oracle, refusal, labels.refused_in_a_row, begun=len(labels) > 0)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return None


def _floor(spheres: Sequence[Sphere], radius: float, forces: np.ndarray) -> LocalityFloor:
    """From forces (spheres, draws, 3); NaN where there is no label."""
    known = np.isfinite(forces[..., 0])
    if not (known.sum(1) > 1).any():
        raise UserError(
            f"The oracle gave less than two labels for each central atom at R = {radius:g} A; see refused.jsonl."
        )
    enough = known.sum(1) > 1
    variances = np.array([f[k].var(axis=0, ddof=1).mean() for f, k in zip(forces[enough], known[enough], strict=True)])
    spread = math.sqrt(variances.mean())
    if len(variances) > 1:
        scatter = variances.std(ddof=1) / math.sqrt(len(variances))
    else:  # of χ² with 3 (draws - 1) degrees of freedom
        scatter = variances[0] * math.sqrt(2 / (3 * (known[enough].sum() - 1)))
    error = float(scatter / (2 * spread)) if spread > 0 else 0.0
    symbols = np.array([sphere.symbol for sphere in spheres])[enough]
    species = {str(symbol): math.sqrt(variances[symbols == symbol].mean()) for symbol in dict.fromkeys(symbols)}
    return LocalityFloor(radius, spread, error, species, int(known.sum()))
