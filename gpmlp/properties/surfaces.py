"""Surfaces of crystals: the energy to make them by cleavage, and of what is adsorbed on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from glob import escape
from itertools import combinations, product
from math import gcd
from typing import ClassVar

import numpy as np
from ase import Atoms
from ase.build.general_surface import build
from ase.geometry import find_mic
from pydantic import Field

from gpmlp.properties.bulk import Bulk, InLattice, crystal_system, primitive, symmetry
from gpmlp.properties.equation_of_state import no_crystal_at_rest
from gpmlp.properties.lattice_dynamics import missing_library
from gpmlp.properties.plan import Calculation, Outputs, Plan
from gpmlp.properties.surface import EnergySurface, Failed, Point, structure_names

J_PER_M2 = 16.02176634  # of 1 eV/A^2
THINNEST = 10.0  # A, of a slab
EMPTY = 2.0  # A of vacuum beyond the reach of the model
UNKNOWN_REACH = 8.0  # A, on a surface without a reach
LEVEL = 0.05  # A; atoms whose heights differ by less are one layer
PLANES = {
    "cubic": ((1, 0, 0), (1, 1, 0), (1, 1, 1)),
    "hexagonal": ((0, 0, 1), (1, 0, 0), (1, 1, 0)),
    "trigonal": ((0, 0, 1), (1, 0, 0), (1, 1, 0)),
    "tetragonal": ((0, 0, 1), (1, 0, 0), (1, 1, 0), (1, 0, 1)),
}
OTHER_PLANES = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
Index = tuple[int, int, int]


class SurfaceEnergies(Calculation):
    """Energies of surfaces (E(slab) - n e(bulk)) / 2A, ions relaxed in the lattice of the bulk, not reconstructed.

    Slabs are made of whole primitive cells, so that they have the composition of the crystal, and cut where layers are farthest apart. In a
    compound both faces must be equal by symmetry, else the slab is polar or its two terminations differ; of all cuts the widest that has
    such a slab is taken, and a plane without one has no value. In an element the value is the mean of both faces.

    planes: Miller indices in the conventional cell, else those of low index; thickness: A, at least, else twice the model's reach;
    unequal_faces: where no cut has equal faces the widest is taken, for the mean of both (of alloys, which are not polar).
    """

    name: ClassVar[str] = "surface"

    planes: tuple[Index, ...] | None = None
    thickness: float | None = Field(None, gt=0)
    unequal_faces: bool = False

    def refusal(self, structures: Sequence[Atoms]) -> str:
        if any(not any(plane) for plane in self.planes or ()):
            return "the Miller indices 0 0 0 are no plane"
        return missing_library() or no_crystal_at_rest(structures, "surfaces")

    def value_names(self, structures: Sequence[Atoms]) -> list[str]:
        return ["surface_energy_[01][01][01]"] if self.planes is None else list(map(_called, self.planes))

    def plan(self, surface: EnergySurface, structures: Sequence[Atoms]) -> Plan:
        (start,) = structures
        bulk = Bulk.at_rest(surface, start)
        name = structure_names([start])[0]
        reach = surface.reach or UNKNOWN_REACH
        thickness = self.thickness or max(2 * reach, THINNEST)
        planes = self.planes or PLANES.get(crystal_system(symmetry(bulk.atoms).number), OTHER_PLANES)
        slabs: dict[str, tuple[Slab, InLattice]] = {}
        about: dict[str, str] = {}
        missing: dict[str, str] = {}
        made = [bulk.atoms]
        for plane in planes:
            output = _called(plane)
            slab = cut_slab(bulk.atoms, plane, thickness, reach + EMPTY, self.unequal_faces)
            if slab is None:
                missing[output] = (
                    f"every cut of the composition of {name} along this plane has two different faces, as polar ones have; "
                    "the mean of both is given with surface.unequal_faces=true"
                )
                continue
            slab.atoms.info["name"] = f"{name} ({_index(plane)}) slab"
            relaxed = surface.relax(slab.atoms)
            slabs[output] = slab, InLattice.of(surface, [relaxed])[0]
            made.append(relaxed)
            faces = "both faces equal" if slab.symmetric else "mean of two faces"
            about[output] = f"relaxed, not reconstructed, {len(relaxed)} atoms in {slab.layers} layers, {faces}"
        if not slabs:
            raise Failed("; ".join(f"{output}: {why}" for output, why in missing.items()))

        def evaluate(points: Sequence[Point]) -> Outputs:
            strain, energy = bulk.strain(points[0]), bulk.energy_per_atom(points[0])
            out: dict[str, float] = {}
            for (output, (slab, lattice)), point in zip(slabs.items(), points[1:], strict=True):
                turned = slab.rotation @ strain @ slab.rotation.T
                area = slab.area * (1 + turned[0, 0] + turned[1, 1])
                excess = lattice.energy(point, turned) - len(lattice.atoms) * energy
                out[output] = J_PER_M2 * excess / (2 * area)
            return out

        at_rest = {k: k for k in range(len(made))}
        sources = {output: (0, k) for k, output in enumerate(slabs, 1)}
        units = dict.fromkeys(about, "J/m^2")
        return Plan(tuple(made), evaluate, units, at_rest, about=about, sources=sources, missing=missing)


def _index(plane: Index) -> str:
    return "".join(f"m{-i}" if i < 0 else str(i) for i in plane)


def _called(plane: Index) -> str:
    return f"surface_energy_{_index(plane)}"


class Slab:
    """A slab of whole primitive cells with vacuum, its plane across z.

    Attributes:
        atoms: periodic in all directions, unrelaxed.
        rotation: (3, 3) that turns vectors of the crystal into those of the slab.
        layers: how many lattice planes thick.
        symmetric: whether an operation of its symmetry exchanges its faces.
        area: A^2, of one face.
    """

    def __init__(self, atoms: Atoms, rotation: np.ndarray, layers: int) -> None:
        self.atoms, self.rotation, self.layers = atoms, rotation, layers
        self.area = float(np.linalg.norm(np.cross(*atoms.cell.array[:2])))
        self.symmetric = bool((symmetry(atoms).rotations[:, 2, 2] < 0).any())


def cut_slab(crystal: Atoms, plane: Index, thickness: float, vacuum: float, unequal_faces: bool = False) -> Slab | None:
    """A slab along a lattice plane, cut in the widest gap between layers that SurfaceEnergies allows; None if there is none.

    Args:
        crystal: conventional cell.
        plane: Miller indices in it.
        thickness, vacuum: A, at least.
    """
    cell = primitive(crystal)
    miller = _primitive_indices(crystal, cell, plane)
    basis = _plane_basis(cell, miller)
    a1, a2 = basis[:2] @ cell.cell.array
    normal = np.cross(a1, a2) / np.linalg.norm(np.cross(a1, a2))
    rotation = np.stack([a1 / np.linalg.norm(a1), np.cross(normal, a1 / np.linalg.norm(a1)), normal])
    spacing = cell.get_volume() / np.linalg.norm(np.cross(a1, a2))
    least = int(np.ceil(thickness / spacing - 1e-3))
    widest = None
    element = len(set(cell.numbers)) == 1
    for height in _cuts(cell, miller, spacing):
        shifted = cell.copy()
        shifted.set_scaled_positions(cell.get_scaled_positions() - height * miller / np.dot(miller, miller))
        for layers in (least, least + 1):
            atoms = build(shifted, basis, layers, 1e-10, False)
            atoms.center(vacuum=vacuum / 2, axis=2)
            atoms.pbc = True
            atoms.set_tags(None)
            slab = Slab(atoms, rotation, layers)
            if element or slab.symmetric:
                return slab
            widest = widest or slab
    return widest if unequal_faces else None


def _primitive_indices(crystal: Atoms, cell: Atoms, plane: Index) -> np.ndarray:
    """Miller indices in the primitive cell, without a common divisor."""
    parts = 12 * np.linalg.solve(crystal.cell.array.T, cell.cell.array.T).T @ np.array(plane)
    whole = np.rint(parts).astype(int)
    if np.abs(parts - whole).max() > 0.01:
        raise Failed(
            f"the primitive cell of {structure_names([crystal])[0]} does not lie in the lattice of the conventional one"
        )
    return whole // gcd(*(int(k) for k in whole))


def _plane_basis(cell: Atoms, miller: np.ndarray) -> np.ndarray:
    """(3, 3) whole vectors of the lattice: the two shortest in the plane, and the shortest to the next plane; right-handed."""
    reach = int(np.abs(miller).max()) + 2
    vectors = np.array(list(product(range(-reach, reach + 1), repeat=3)))
    vectors = vectors[np.argsort((np.linalg.norm(vectors @ cell.cell.array, axis=1)).round(8), kind="stable")]
    within, beyond = vectors[(vectors @ miller == 0) & vectors.any(1)], vectors[vectors @ miller == 1]
    first = within[0]
    second = next(v for v in within if np.cross(first, v).any())
    if np.linalg.det([first, second, beyond[0]]) * np.linalg.det(cell.cell.array) < 0:
        second = -second
    return np.array([first, second, beyond[0]])


def _cuts(cell: Atoms, miller: np.ndarray, spacing: float) -> list[float]:
    """Heights between layers, in parts of the distance of lattice planes, the widest gap first."""
    heights = np.sort(cell.get_scaled_positions() @ miller % 1)
    gaps = np.diff(np.append(heights, heights[0] + 1))
    order = np.argsort(-gaps.round(6), kind="stable")
    return [float(heights[k] + gaps[k] / 2) for k in order if gaps[k] * spacing > LEVEL]


class AdsorptionEnergies(Calculation):
    """Energy E(slab with adsorbate) - E(slab) - n E(molecule), over n: negative where it binds; all three relaxed in the cells given.

    Either the three are given, and known by their composition, or one structure in which tags tell adsorbate (0) from slab, as
    ase.build.add_adsorbate leaves them. Atoms that are fixed stay so. relax: else the structures are taken as they are, also those that
    are parts of one.
    """

    name: ClassVar[str] = "adsorption"
    several: ClassVar[bool] = True

    relax: bool = True

    def refusal(self, structures: Sequence[Atoms]) -> str:
        if not adsorption_systems(structures):
            return (
                "an adsorption energy needs a slab with an adsorbate, the slab and the molecule, or one structure whose tags are 0 for the "
                "adsorbate and greater for the slab"
            )
        return ""

    def value_names(self, structures: Sequence[Atoms]) -> list[str]:
        return list(map(escape, _named_systems(structures)))

    def plan(self, surface: EnergySurface, structures: Sequence[Atoms]) -> Plan:
        names = _named_systems(structures)
        made: dict[int, Atoms] = {id(atoms): atoms for system in names.values() for atoms in system}
        places = {key: k for k, key in enumerate(made)}
        at_rest = tuple(surface.relax(atoms) if self.relax else atoms for atoms in made.values())

        def evaluate(points: Sequence[Point]) -> Outputs:
            out = {}
            for name, (together, slab, molecule) in names.items():
                energies = [points[places[id(atoms)]].energy for atoms in (together, slab, molecule)]
                times = (len(together) - len(slab)) // len(molecule)
                out[name] = (energies[0] - energies[1]) / times - energies[2]
            return out

        relaxed = {k: k for k in range(len(at_rest))} if self.relax else {}
        about = {
            name: f"of {structure_names([molecule])[0]} on {structure_names([slab])[0]}, {'relaxed' if self.relax else 'as given'}"
            for name, (_, slab, molecule) in names.items()
        }
        sources = {name: [places[id(atoms)] for atoms in system] for name, system in names.items()}
        return Plan(at_rest, evaluate, dict.fromkeys(names, "eV"), relaxed, about=about, sources=sources)


def _named_systems(structures: Sequence[Atoms]) -> dict[str, tuple[Atoms, Atoms, Atoms]]:
    """adsorption_systems by the names of their values."""
    systems = adsorption_systems(structures)
    if len(systems) == 1:
        return {"adsorption_energy": systems[0]}
    return {f"{structure_names(system[:1])[0]}.adsorption_energy": system for system in systems}


def adsorption_systems(structures: Sequence[Atoms]) -> list[tuple[Atoms, Atoms, Atoms]]:
    """(slab with adsorbate, slab, molecule), each once."""
    found: list[tuple[Atoms, Atoms, Atoms]] = []
    parts = [(atoms, Counter(atoms.numbers.tolist())) for atoms in structures]
    for (a, count_a), (b, count_b) in combinations(sorted(parts, key=lambda part: -len(part[0])), 2):
        rest = count_a - count_b
        if not a.pbc.any() or not rest or count_b - count_a or not np.allclose(a.cell, b.cell, atol=1e-3):
            continue
        for c, count_c in parts:
            times = rest.total() // len(c)
            if c is not b and times and Counter({z: times * n for z, n in count_c.items()}) == rest:
                found.append((a, b, c))
    whole = {id(system[0]) for system in found}
    tagged = [
        atoms for atoms in structures if 0 < np.sum(atoms.get_tags() == 0) < len(atoms) and id(atoms) not in whole
    ]
    return found + [_split_by_tags(atoms) for atoms in tagged]


def _split_by_tags(atoms: Atoms) -> tuple[Atoms, Atoms, Atoms]:
    """The structure, its slab and its adsorbate alone, made whole across faces of the cell."""
    name, free = structure_names([atoms])[0], atoms.get_tags() == 0
    slab, molecule = atoms[~free], atoms[free]
    molecule.set_constraint()
    apart = find_mic(molecule.positions - molecule.positions[0], atoms.cell, atoms.pbc)[0]
    molecule.positions = molecule.positions[0] + apart
    molecule.set_cell(None)
    molecule.pbc = False
    slab.info["name"], molecule.info["name"] = f"{name} slab", f"{name} adsorbate"
    return atoms, slab, molecule
