"""Point defects of crystals: formation energies of vacancies and interstitial atoms at the sites that symmetry does not relate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, Literal

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols
from pydantic import Field
from scipy.spatial import Voronoi, cKDTree

from gpmlp.core.errors import check_choice
from gpmlp.properties.bulk import Bulk, InLattice, crystal_system, inequivalent_sites, is_crystal, symmetry
from gpmlp.properties.equation_of_state import no_crystal_at_rest, not_a_crystal
from gpmlp.properties.lattice_dynamics import missing_library, supercell_repeats, too_short
from gpmlp.properties.plan import Calculation, Outputs, Plan
from gpmlp.properties.surface import EnergySurface, Failed, Point, structure_names

TOUCHING = 1.05  # distances to the nearest atom of a hole; who is nearer than that is its neighbour
APART = 0.8  # of the distance of nearest neighbours, between the two atoms of a dumbbell before it is relaxed
RIGHT = 0.3  # cosine below which two directions count as at right angles
EDGE = 1e-6  # of a cell, by which a site on its face may be outside
DIRECTIONS = {
    "cubic": ((1, 0, 0), (1, 1, 0), (1, 1, 1)),
    "other": ((0, 0, 1), (1, 0, 0), (1, 1, 0)),
}


@dataclass(frozen=True)
class _Start:
    """A defect before it is relaxed: an atom of species z too many (+1) or too few (-1) in a supercell."""

    name: str
    words: str
    atoms: Atoms
    z: int
    change: int


@dataclass(frozen=True, eq=False)
class _Defect:
    """A relaxed defect, which is structure `index`; the crystal it is in, and what sets the price of its atom, are structures too."""

    name: str
    index: int
    lattice: InLattice
    host: int
    reference: int
    change: int


class _PointDefects(Calculation):
    """What vacancies and interstitials share: the formation energy E(defect) - N e(bulk) +- mu, relaxed in the lattice of the bulk.

    In an element mu is the bulk's energy per atom. Elsewhere it is the energy per atom of the element's structure, which has to be given
    too (gpmlp properties MODEL NaCl.xyz Na.xyz Cl2.xyz): formation in the limit that is rich in that element. Charged defects are not
    made.
    """

    several: ClassVar[bool] = True

    supercell: float | None = Field(None, gt=0)
    most_atoms: int = Field(250, ge=8)
    species: tuple[str, ...] | None = None
    rattle: float = Field(0.0, ge=0, le=0.2)

    def starts(self, crystal: Atoms, supercell: Atoms, species: set[int]) -> Iterator[_Start]:
        """The defects to relax in a supercell whose first atoms are those of the conventional cell."""
        raise NotImplementedError

    def refusal(self, structures: Sequence[Atoms]) -> str:
        if why := missing_library():
            return why
        hosts, references = _hosts_and_references(structures)
        if not hosts:
            return f"no crystal is among the structures: {not_a_crystal(structures)}"
        if why := no_crystal_at_rest([atoms for atoms in structures if is_crystal(atoms)], "defects"):
            return why
        for host in hosts:
            if why := self.unsuited(host):
                return why
            lacking = sorted(
                self._species(host) - (references.keys() | ({*host.numbers} if _is_element(host) else set()))
            )
            if lacking:
                symbols = " and ".join(chemical_symbols[z] for z in lacking)
                return (
                    f"what an atom of {symbols} costs in {structure_names([host])[0]} is not said: give a structure of the element too "
                    "(gpmlp properties MODEL COMPOUND.xyz ELEMENT.xyz...)"
                )
        return ""

    def unsuited(self, host: Atoms) -> str:
        """Why the species that are asked for do not suit a crystal; '' if they do."""
        return ""

    def _species(self, host: Atoms) -> set[int]:
        """Of the atoms that are taken out or added."""
        for symbol in self.species or ():
            check_choice(f"{self.name}.species", symbol, atomic_numbers)
        return {int(z) for z in host.numbers} if self.species is None else {atomic_numbers[s] for s in self.species}

    def plan(self, surface: EnergySurface, structures: Sequence[Atoms]) -> Plan:
        hosts, references = _hosts_and_references(structures)
        needed = [*hosts, *(references[z] for host in hosts if not _is_element(host) for z in self._species(host))]
        needed += [references[z] for host in hosts for z in self._species(host) - {*host.numbers}]
        places = {id(atoms): k for k, atoms in enumerate({id(a): a for a in needed}.values())}
        solids = [Bulk.at_rest(surface, atoms) for atoms in {id(a): a for a in needed}.values()]
        made = [solid.atoms for solid in solids]
        defects: list[_Defect] = []
        about: dict[str, str] = {}
        missing: dict[str, str] = {}
        for host, prefix in _prefixes(hosts):
            crystal = solids[places[id(host)]].atoms
            supercell = self._supercell(surface, crystal)
            short = too_short(supercell, surface.reach, f"{self.name}.most_atoms")
            for start in self.starts(crystal, supercell, self._species(host)):
                name, words = prefix + start.name, f"{start.words} in {len(start.atoms) - start.change} atoms"
                start.atoms.info["name"] = f"{structure_names([host])[0]} {start.words}"
                start.atoms.rattle(self.rattle, seed=0)
                try:
                    atoms = surface.relax(start.atoms)
                except Failed as why:
                    missing[name] = str(why)
                    continue
                own = _is_element(host) and start.z == host.numbers[0]
                price = places[id(host if own else references[start.z])]
                lattice = InLattice.of(surface, [atoms])[0]
                defects.append(_Defect(name, len(made), lattice, places[id(host)], price, start.change))
                made.append(atoms)
                about[name] = f"formation energy of {words}, ions relaxed in the lattice of the bulk{short}"

        def evaluate(points: Sequence[Point]) -> Outputs:
            energies = [solid.energy_per_atom(point) for solid, point in zip(solids, points, strict=False)]
            out: dict[str, float] = {}
            for d in defects:
                energy = d.lattice.energy(points[d.index], solids[d.host].strain(points[d.host]))
                bulk = (len(d.lattice.atoms) - d.change) * energies[d.host]
                out[d.name] = energy - bulk - d.change * energies[d.reference]
            return out

        if not defects:
            raise Failed("; ".join(f"{name}: {why}" for name, why in missing.items()))
        at_rest = {k: k for k in range(len(made))}
        sources = {d.name: sorted({d.host, d.reference, d.index}) for d in defects}
        units = dict.fromkeys(about, "eV")
        return Plan(tuple(made), evaluate, units, at_rest, about=about, sources=sources, missing=missing)

    def value_names(self, structures: Sequence[Atoms]) -> list[str]:
        hosts, _ = _hosts_and_references(structures)
        return [prefix + name for host, prefix in _prefixes(hosts) for name in self.names_in(host)]

    def names_in(self, host: Atoms) -> list[str]:
        """Patterns of the names of the defects in one crystal."""
        raise NotImplementedError

    def _supercell(self, surface: EnergySurface, crystal: Atoms) -> Atoms:
        reach = self.supercell / 2 if self.supercell else surface.reach
        return crystal.repeat(supercell_repeats(crystal, reach, self.most_atoms))


class Vacancies(_PointDefects):
    """Formation energies of vacancies, one for each site that symmetry does not relate to another.

    supercell: A, distance from a defect to its image, else twice the model's reach, with most_atoms at most; species: of the atoms taken
    out, else all; rattle: A, random displacements before the relaxation, which lets a vacancy leave its symmetry.
    """

    name: ClassVar[str] = "vacancy"

    def unsuited(self, host: Atoms) -> str:
        absent = [chemical_symbols[z] for z in sorted(self._species(host) - {*host.numbers})]
        return f"there is no {' and no '.join(absent)} in {structure_names([host])[0]} to take out" if absent else ""

    def names_in(self, host: Atoms) -> list[str]:
        symbols = [chemical_symbols[z] for z in sorted(self._species(host))]
        single = ["vacancy_formation_energy"] if len(symbols) == 1 else []
        return single + _numbered([f"vacancy_formation_energy_{symbol}" for symbol in symbols], "")

    def starts(self, crystal: Atoms, supercell: Atoms, species: set[int]) -> Iterator[_Start]:
        sites = [int(k) for k in np.unique(symmetry(crystal).equivalent_atoms) if crystal.numbers[k] in species]
        symbols = [crystal[k].symbol for k in sites]
        for k, symbol in zip(sites, symbols, strict=True):
            label = symbol if symbols.count(symbol) == 1 else f"{symbol}{k}"
            atoms = supercell.copy()
            del atoms[k]
            name = "vacancy_formation_energy" + (f"_{label}" if len(sites) > 1 else "")
            yield _Start(name, f"a vacancy of {label}", atoms, int(crystal.numbers[k]), -1)


class Interstitials(_PointDefects):
    """Formation energies of interstitial atoms: in the largest holes of a crystal, and as dumbbells that share a site.

    Holes are the corners of Voronoi's cells; a dumbbell takes the place of an atom of its own species, along directions of low index.
    supercell, most_atoms, species, rattle as of vacancies; kinds: which are made; holes: how many of those that symmetry does not relate,
    the largest first; sites: scaled positions in the conventional cell, instead of holes and dumbbells.
    """

    name: ClassVar[str] = "interstitial"
    by_default: ClassVar[bool] = False

    kinds: tuple[Literal["hole", "dumbbell"], ...] = ("hole", "dumbbell")
    holes: int = Field(3, ge=1, le=20)
    sites: tuple[tuple[float, float, float], ...] | None = None

    def names_in(self, host: Atoms) -> list[str]:
        found: list[str] = []
        species = self._species(host)
        for z in sorted(species):
            labels = ["tetrahedral", "octahedral", "[0-9]*_neighbours"] if "hole" in self.kinds else []
            if "dumbbell" in self.kinds and z in host.numbers:
                labels.append("dumbbell_[01][01][01]")
            middle = _species_label(z, species, host)
            labels = labels if self.sites is None else ["site"]
            found += _numbered([f"interstitial_formation_energy{middle}_{label}" for label in labels], "_")
        return found

    def starts(self, crystal: Atoms, supercell: Atoms, species: set[int]) -> Iterator[_Start]:
        for z in sorted(species):
            symbol = chemical_symbols[z]
            middle = _species_label(z, species, crystal)
            places = self._placed(crystal, z)
            labels = [label for label, _, _ in places]
            for k, (label, replaced, positions) in enumerate(places):
                again = f"_{labels[: k + 1].count(label)}" if labels.count(label) > 1 else ""
                atoms = supercell.copy()
                if replaced is not None:
                    atoms.positions[replaced] = positions[1]
                atoms += Atoms([z], positions=positions[:1])
                name = f"interstitial_formation_energy{middle}_{label}{again}"
                yield _Start(name, f"an interstitial {symbol}, {label.replace('_', ' ')}{again}", atoms, z, 1)

    def _placed(self, crystal: Atoms, z: int) -> list[tuple[str, int | None, np.ndarray]]:
        """(label, atom that shares its site or none, positions of the added atom and of that one) of each start."""
        if self.sites is not None:
            return [("site", None, np.array([site]) @ crystal.cell.array) for site in self.sites]
        places: list[tuple[str, int | None, np.ndarray]] = []
        if "hole" in self.kinds:
            places += [(label, None, position[None]) for label, position in largest_holes(crystal, self.holes)]
        if "dumbbell" in self.kinds:
            dataset = symmetry(crystal)
            directions = DIRECTIONS["cubic" if crystal_system(dataset.number) == "cubic" else "other"]
            half = 0.5 * APART * _nearest_neighbour(crystal)
            for atom in np.unique(dataset.equivalent_atoms):
                for index in directions if crystal.numbers[atom] == z else ():
                    along = np.array(index) @ crystal.cell.array
                    ends = crystal.positions[atom] + np.outer([half, -half], along / np.linalg.norm(along))
                    places.append(("dumbbell_" + "".join(map(str, index)), int(atom), ends))
        return places


def largest_holes(crystal: Atoms, most: int) -> list[tuple[str, np.ndarray]]:
    """(label, position) of the corners of Voronoi's cells that symmetry does not relate, farthest from all atoms first."""
    shifts = np.array(list(product((-1, 0, 1, 2), repeat=3)))
    around = (crystal.get_scaled_positions()[None] + shifts[:, None]).reshape(-1, 3)
    corners = np.linalg.solve(crystal.cell.array.T, Voronoi(around @ crystal.cell.array).vertices.T).T
    inside = corners[((corners > -EDGE) & (corners < 1 - EDGE)).all(1)]
    tree = cKDTree(around @ crystal.cell.array)
    radii = tree.query(inside @ crystal.cell.array)[0]
    order = np.lexsort((*inside.T.round(6), -radii.round(6)))
    kept = order[inequivalent_sites(crystal, inside[order])][:most]
    found = []
    for site, radius in zip(inside[kept] @ crystal.cell.array, radii[kept], strict=True):
        bonds = tree.data[tree.query_ball_point(site, TOUCHING * radius)] - site
        found.append((_hole_label(bonds), site))
    return found


def _hole_label(bonds: np.ndarray) -> str:
    """By the neighbours of a hole (k, 3)."""
    units = bonds / np.linalg.norm(bonds, axis=1, keepdims=True)
    cosines = np.abs(units @ units.T)[~np.eye(len(units), dtype=bool)]
    if len(bonds) == 4:
        return "tetrahedral"
    if len(bonds) == 6 and ((cosines < RIGHT) | (cosines > 1 - RIGHT)).all():
        return "octahedral"
    return f"{len(bonds)}_neighbours"


def _nearest_neighbour(crystal: Atoms) -> float:
    around = crystal.repeat(3).positions
    return float(cKDTree(around).query(around, 2)[0][:, 1].min())


def _is_element(atoms: Atoms) -> bool:
    return len(set(atoms.numbers)) == 1


def _species_label(z: int, species: set[int], crystal: Atoms) -> str:
    """What a name says of the species of an interstitial atom: nothing where there is one choice."""
    return f"_{chemical_symbols[z]}" if len(species) > 1 or not _is_element(crystal) else ""


def _numbered(names: Sequence[str], separator: str) -> list[str]:
    """Patterns of names that come with a number where there are several of one."""
    return [each for name in names for each in (name, f"{name}{separator}[0-9]*")]


def _prefixes(hosts: Sequence[Atoms]) -> list[tuple[Atoms, str]]:
    """Each crystal, and what goes before the names of its defects."""
    names = structure_names(hosts)
    return [(host, f"{name}." if len(hosts) > 1 else "") for host, name in zip(hosts, names, strict=True)]


def _hosts_and_references(structures: Sequence[Atoms]) -> tuple[list[Atoms], Mapping[int, Atoms]]:
    """Crystals that defects are made in (compounds, if there are any), and the first structure of each element."""
    crystals = [atoms for atoms in structures if is_crystal(atoms)]
    compounds = [atoms for atoms in crystals if not _is_element(atoms)]
    references: dict[int, Atoms] = {}
    for atoms in structures:
        if _is_element(atoms):
            references.setdefault(int(atoms.numbers[0]), atoms)
    return compounds or crystals, references
