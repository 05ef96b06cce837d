"""Surrogates: small structures cut around an atom of a frame with too many atoms for an ab initio code.

The environments of that atom, and of all others within `core` of it, are those of the frame; what lies farther out closes the cell.
As in Hodapp and Shapeev, Mach. Learn.: Sci. Technol. 1, 045005 (2020) and Lysogorskiy et al., Phys. Rev. Mater. 7,
043801 (2023), the surrogate is periodic where the frame is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import ase.geometry
import numpy as np
import torch
from ase.neighborlist import primitive_neighbor_list
from scipy.spatial import cKDTree

from gpmlp.core import neighbors
from gpmlp.core.environments import StructureEnvironments
from gpmlp.core.molecules import bonded_units
from gpmlp.core.neighbors import Neighbors
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.learning.labels import canonical_structure
from gpmlp.potential.potential import Potential

CLOSER = 0.95  # of the smallest distance in the frame, below which two atoms of a surrogate do not both stay
PLANES = 1.2  # A, least distance of lattice planes: a cell of length a has no period shorter than that
PERIOD = 6.0  # A beyond what is needed, within which a period of the frame is sought
ALIKE = 0.25  # of the mean squared distance by which a random shift misses atoms: one that misses by less is a period
SAMPLES = 300  # atoms of which that is judged
SAME = 1e-6  # A, and distance of unit features: what rounding may do


@dataclass(frozen=True, eq=False)
class SurrogateCluster:
    """A small structure to be labelled for the sake of an atom of a large one.

    Attributes:
        structure: as the label file will have it.
        origin: (atoms,) the atom of the frame that each one is; centre: the one it was cut around, here.
        intact: (atoms,) whether all neighbours within reach, and no others, are as in the frame.
        small_cell: whether what is around the ball can be trusted, too: cut by periods of the frame alone, of the same composition,
            and without atoms that have fewer or more neighbours within reach than atoms of their element have in the frame.
        of: atoms of the frame.
    """

    structure: Structures
    origin: torch.Tensor
    centre: int
    intact: torch.Tensor
    small_cell: bool
    of: int

    def trusted_targets(self, targets: Targets) -> Targets:
        """The part of a label that is learned: all of it of a small cell; else the forces on intact atoms, NaN elsewhere."""
        if self.small_cell:
            return targets
        nothing = Targets.unlabelled(self.structure)
        forces = torch.where(self.intact[:, None], targets.forces, nothing.forces)
        return replace(targets, energies=nothing.energies, stresses=nothing.stresses, forces=forces)

    def notes(self) -> dict[str, int | str]:
        """Of the label."""
        kind = "small cell" if self.small_cell else "carved"
        return {
            "surrogate": kind,
            "carved_from": self.of,
            "carved_around": int(self.origin[self.centre]),
            "intact": int(self.intact.sum()),
        }


def cut_surrogate(frame: Structures, atom: int, reach: float, core: float = 0.0) -> SurrogateCluster | None:
    """Cut a surrogate out of one structure; None where it would not be smaller.

    Along each periodic direction it is as long as the ball of radius core + reach needs, up to the next period of the frame
    if there is one (in a crystal: whole lattice vectors); along others nothing is cut. Where nothing is periodic the ball is cut out,
    with vacuum around it. Atoms, or whole molecules, are then taken in the order of their distance, up to the density of the frame,
    unless they come closer to one that was taken, or to an image of it, than atoms of these elements are anywhere in the frame.

    Args:
        atom: whose environment is to be that of the frame.
        reach: farthest neighbour of an environment, A.
        core: A around the atom, within which environments are those of the frame.
    """
    pairs = neighbors.find_neighbors(frame, reach)
    view = _Frame.from_structure(frame, pairs, atom)
    radius = core + reach
    apart, best = view.closest.max(), None
    for more in (0.0, apart, apart + view.extent, apart + 2 * view.extent):  # room between the ball and its images
        cut = _cut(view, radius, more)
        if cut is None:
            break
        atoms, cell, lattice, cramped = cut
        surrogate = _described(frame, pairs, view, atom, atoms, cell, lattice, reach)
        inside = torch.as_tensor(view.distance[surrogate.origin.numpy()] <= core)
        if bool(surrogate.intact[inside].all()):
            best = best or surrogate
            if not cramped:
                return surrogate
    return best


def feature_distance(potential: Potential, frame: Structures, surrogate: SurrogateCluster) -> float:
    """Distance of the unit features of the atom that was cut around, in the frame and in the surrogate: 0 but for rounding."""
    atom, far = int(surrogate.origin[surrogate.centre]), 0.0
    for term in potential.terms:
        x, y = (
            StructureEnvironments.from_structures(term.descriptor, one).environments.features[i]
            for one, i in ((frame, atom), (surrogate.structure, surrogate.centre))
        )
        far = max(far, float((x - y).norm()))
    return far


def most_uncertain_atom(potential: Potential, structure: Structures) -> int:
    """The atom whose force has the largest variance, as samples show it."""
    covariance = potential(structure, "sampled_forces").sampled_forces_covariance
    assert covariance is not None
    return int(covariance.total.diagonal(dim1=1, dim2=2).sum(1).argmax())


@dataclass(frozen=True, eq=False)
class _Frame:
    """A frame in the coordinates of one of its atoms.

    Attributes:
        basis: (3, 3) A, rows are lattice vectors, and normals of length 1 along axes that are not periodic.
        places: (atoms, 3) in units of the basis, from the atom; of all images the nearest to it, molecules whole.
        unit: (atoms,) number of the molecule, or of the atom itself; extent: A, largest distance of two atoms of one.
        distance: (atoms,) A, from the atom; rank: the same of the nearest atom of the unit.
        closest: (elements, elements) A, that two atoms of different units may come; element: (atoms,) index in it.
    """

    basis: np.ndarray
    periodic: np.ndarray
    places: np.ndarray
    unit: np.ndarray
    distance: np.ndarray
    rank: np.ndarray
    element: np.ndarray
    closest: np.ndarray
    extent: float

    @staticmethod
    def from_structure(frame: Structures, pairs: Neighbors, atom: int) -> _Frame:
        periodic, species = frame.periodic[0].numpy(), frame.species.numpy()
        basis = ase.geometry.complete_cell(np.where(periodic[:, None], frame.cells[0].numpy(), 0.0))
        positions = frame.positions.numpy()
        places = _wrapped((positions - positions[atom]) @ np.linalg.inv(basis), periodic)
        distance = np.linalg.norm(places @ basis, axis=1)
        i, j = pairs.centers.numpy(), pairs.neighbors.numpy()
        r = pairs.vectors(frame).norm(dim=1).numpy()
        unit = bonded_units(species, i, j, r)
        nearest = np.lexsort([distance, unit])
        nearest = nearest[np.unique(unit[nearest], return_index=True)[1]][
            unit
        ]  # of each atom, the nearest one of its unit
        places = places[nearest] + _wrapped(places - places[nearest], periodic)
        elements, element = np.unique(species, return_inverse=True)
        closest = np.full((len(elements), len(elements)), r.max(initial=0.0))
        apart = unit[i] != unit[j]
        np.minimum.at(closest, (element[i][apart], element[j][apart]), r[apart])
        extent = float(np.linalg.norm((places - places[nearest]) @ basis, axis=1).max())
        about = unit, distance, distance[nearest], element, CLOSER * closest, extent
        return _Frame(basis, periodic, places, *about)


def _wrapped(places: np.ndarray, periodic: np.ndarray) -> np.ndarray:
    return np.where(periodic, places - np.round(places), places)


def _cut(view: _Frame, radius: float, more: float) -> tuple[np.ndarray, np.ndarray, bool, bool] | None:
    """(atoms that are taken, cell (3, 3), whether it was cut by periods alone, whether images came too near); None if that is all."""
    if not view.periodic.any():
        atoms = np.flatnonzero(np.isin(view.unit, view.unit[view.distance <= radius]))
        return (atoms, view.basis, False, False) if len(atoms) < len(view.unit) else None
    heights = 1 / np.linalg.norm(np.linalg.inv(view.basis), axis=0)
    margin = view.closest.max() + view.extent
    shares, lattice = np.ones(3), True
    for k in np.flatnonzero(view.periodic).tolist():
        least = (2 * radius + more) / heights[k]
        if least + margin / heights[k] < 1:
            period = _period(view, k, least)
            shares[k], lattice = period or least, lattice and period is not None
    if (shares == 1).all():
        return None
    beyond = np.where(view.periodic, np.abs(view.places) - 0.5 * shares, 0.0) * heights
    beyond = beyond.max(1).clip(0)  # A, outside of the cell
    image = np.linalg.norm(_wrapped(view.places / shares, view.periodic) * shares @ view.basis, axis=1)
    intrudes = (image < radius) & (view.distance >= radius)  # an image of it would lie where the frame has a hole
    taken = np.isin(view.unit, view.unit[beyond <= margin]) & ~np.isin(view.unit, view.unit[intrudes])
    atoms = np.flatnonzero(taken)
    outside = np.full(int(view.unit.max()) + 1, np.inf)
    np.minimum.at(outside, view.unit, beyond)
    order = np.lexsort([view.unit, view.rank, outside[view.unit]])
    place = np.empty(len(outside), dtype=int)
    place[view.unit[order][::-1]] = np.arange(len(order))[::-1]  # units: those inside by distance, then those outside
    cell = view.basis * shares[:, None]
    atoms = _apart(view, atoms, cell, place)
    atoms = atoms[np.argsort(place[view.unit[atoms]], kind="stable")]
    full = np.arange(1, len(atoms) + 1) > round(len(view.unit) * shares.prod())
    atoms = atoms[~np.isin(view.unit[atoms], view.unit[atoms[full & (view.rank[atoms] > radius)]])]
    return _balanced(view, atoms, radius), cell, lattice, bool((intrudes & (beyond <= 0.5 * view.closest.max())).any())


def _period(view: _Frame, k: int, least: float) -> float | None:
    """The first share of a lattice vector, `least` or more, that is a period of the frame; None if there is none."""
    length = float(np.linalg.norm(view.basis[k]))
    denominators = np.arange(1, max(2, int(length / PLANES) + 1))
    shares = np.unique((np.arange(1, len(denominators) + 1)[:, None] / denominators).round(12))
    shares = shares[(shares >= least) & (shares <= min(1.0, least + PERIOD / length))]
    samples = np.linspace(0, len(view.places) - 1, min(len(view.places), SAMPLES)).round().astype(int)
    chance = np.random.default_rng(0).random((len(samples), 3)) * view.periodic
    shifts = [chance, *(share * np.eye(3)[k] for share in shares)]
    misses = _misses(view, samples, np.stack([np.broadcast_to(shift, (len(samples), 3)) for shift in shifts]))
    like = np.flatnonzero(misses[1:] < ALIKE * misses[0])
    if not len(like):
        return None
    here = like[shares[like] <= shares[like[0]] + PLANES / length]
    return float(shares[here[misses[1:][here].argmin()]])


def _misses(view: _Frame, atoms: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """(shifts,) mean squared distance, A^2, from atoms that are shifted (shifts, atoms, 3) to the nearest one of their element."""
    images = np.stack(np.meshgrid(*[(-1, 0, 1) if p else (0,) for p in view.periodic], indexing="ij"), -1).reshape(
        -1, 3
    )
    places = _wrapped(view.places, view.periodic)
    all_places = (places[None] + images[:, None]).reshape(-1, 3)
    near = ((np.abs(all_places) < 0.75) | ~view.periodic).all(1)
    apart = 1e3 * view.element  # A: other elements are far away
    tree = cKDTree(np.column_stack([all_places @ view.basis, np.tile(apart, len(images))])[near])
    moved = _wrapped(places[atoms] + shifts, view.periodic) @ view.basis
    fourth = np.broadcast_to(apart[atoms][None, :, None], (*moved.shape[:2], 1))
    return (tree.query(np.concatenate([moved, fourth], axis=2))[0] ** 2).mean(1)


def _apart(view: _Frame, atoms: np.ndarray, cell: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Of the atoms those whose units are not too close to one of a lower place, in the periodic cell."""
    positions = view.places[atoms] @ view.basis
    i, j, r = primitive_neighbor_list("ijd", view.periodic, cell, positions, float(view.closest.max()))
    i, j = atoms[i], atoms[j]
    clash = (r < view.closest[view.element[i], view.element[j]]) & (view.unit[i] != view.unit[j])
    a, b = view.unit[i[clash]], view.unit[j[clash]]
    a, b = a[place[a] > place[b]], b[place[a] > place[b]]  # a has to give way to b, if b stays
    stays, undecided = np.zeros(len(place), dtype=bool), np.ones(len(place), dtype=bool)
    while undecided.any():  # who has nobody before him stays, and who is in his way goes: as if one after another
        held = np.zeros(len(place), dtype=bool)
        held[a[undecided[b]]] = True
        stays |= undecided & ~held
        undecided &= held
        undecided[a[stays[b]]] = False
    return atoms[stays[view.unit[atoms]]]


def _balanced(view: _Frame, atoms: np.ndarray, radius: float) -> np.ndarray:
    """Without the outermost single atoms that are too many for the formula of the frame, where it has one."""
    formula = np.bincount(view.element)
    formula = formula // np.gcd.reduce(formula)
    counts = np.bincount(view.element[atoms], minlength=len(formula))
    surplus = counts - (counts // formula).min() * formula
    if formula.sum() == len(view.element) or len(np.unique(view.unit)) < len(view.unit) or (surplus == counts).any():
        return atoms
    order = atoms[np.argsort(-view.distance[atoms], kind="stable")]
    number = np.zeros(len(order), dtype=int)  # from outside, among those of its element
    for e in range(len(formula)):
        mine = view.element[order] == e
        number[mine] = np.arange(mine.sum())
    goes = (number < surplus[view.element[order]]) & (view.distance[order] > radius)
    return np.sort(order[~goes])


def _described(
    frame: Structures,
    pairs: Neighbors,
    view: _Frame,
    atom: int,
    atoms: np.ndarray,
    cell: np.ndarray,
    lattice: bool,
    reach: float,
) -> SurrogateCluster:
    atoms = atoms[np.argsort(view.distance[atoms], kind="stable")]
    cut = Structures(
        torch.as_tensor(view.places[atoms] @ view.basis),
        torch.as_tensor(np.where(view.periodic[:, None], cell, 0.0))[None],
        frame.periodic,
        frame.species[atoms],
        torch.zeros(len(atoms), dtype=torch.long),
        (f"{frame.names[0]}, around atom {atom}",),
        **{name: value[atoms] for name, value in frame.electronic_start().items()},
    )
    cut, origin = canonical_structure(cut), torch.as_tensor(atoms)
    cut_pairs = neighbors.find_neighbors(cut, reach)
    was = np.bincount(pairs.centers.numpy(), minlength=frame.n_atoms)
    centers = cut_pairs.centers.numpy()
    now = np.bincount(centers, minlength=cut.n_atoms)
    here, there = origin[cut_pairs.centers].numpy(), origin[cut_pairs.neighbors].numpy()
    vectors = cut_pairs.vectors(cut).numpy() - (view.places[there] - view.places[here]) @ view.basis
    off = _wrapped(vectors @ np.linalg.inv(view.basis), view.periodic) @ view.basis
    wrong = np.bincount(centers[np.linalg.norm(off, axis=1) > SAME], minlength=cut.n_atoms)
    intact = torch.as_tensor((wrong == 0) & (now == was[atoms]))
    small = lattice and _like(view.element, was, view.element[atoms], now)
    return SurrogateCluster(cut, origin, int((origin == atom).nonzero()[0, 0]), intact, small, frame.n_atoms)


def _like(element: np.ndarray, was: np.ndarray, element_now: np.ndarray, now: np.ndarray) -> bool:
    """Whether composition and numbers of neighbours are those of the frame."""
    formula, counts = np.bincount(element), np.bincount(element_now, minlength=int(element.max()) + 1)
    formula_unit = formula // np.gcd.reduce(formula)
    if formula_unit.sum() < len(element) and (counts * formula_unit[0] != counts[0] * formula_unit).any():
        return False
    least, most = np.full(len(formula), np.iinfo(int).max), np.zeros(len(formula), dtype=int)
    np.minimum.at(least, element, was)
    np.maximum.at(most, element, was)
    return bool(((least[element_now] <= now) & (now <= most[element_now])).all())
