"""Harmonic lattice dynamics by phonopy: from forces on displaced supercells to frequencies, densities of states and free energies."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from ase import Atoms

from gpmlp.core.errors import UserError
from gpmlp.properties.surface import Failed
from gpmlp.properties.symmetry import SYMPREC, load_spglib

SAME = 1e-4  # A, the same of one made symmetric
LENGTH = 10.0  # A, of a supercell for a calculator whose range is not known
MESH, DOS_MESH = 60.0, 40.0  # A; of free energies, and of densities of states, which tetrahedra interpolate
IMAGINARY = -0.05  # THz; what lies above is rounding
UNSTABLE = 2e-3  # of the modes; fewer imaginary ones come of interpolating near Gamma from a small supercell
KJ_MOL, J_K_MOL = 96.48533212331, 8.31446261815324  # of 1 eV; of 1 k_B / K
DOS_POINTS = 161


@dataclass(frozen=True, eq=False)
class Harmonic:
    """Vibrational quantities per atom at temperatures (t,): free energy (eV), entropy and heat capacity (k_B); zero-point energy (eV)."""

    free_energy: np.ndarray
    entropy: np.ndarray
    heat_capacity: np.ndarray
    zero_point_energy: float


class LatticeDynamics:
    """A crystal at rest and its supercells with displaced atoms, as few as symmetry allows.

    Force constants are phonopy's: displacements of both signs where symmetry does not give the other, symmetrised by the space group,
    made to obey translation and permutation. Frequencies of unstable modes are negative.

    Attributes:
        structures: the supercell without displacements, whose forces are subtracted, and those with one atom displaced.
    """

    def __init__(self, cell: Atoms, repeats: Sequence[int], displacement: float) -> None:
        self._cell = cell
        self._phonopy = _phonopy(cell, repeats)
        self._phonopy.generate_displacements(distance=displacement)
        self.structures = self.displaced(cell)

    def displaced(self, cell: Atoms) -> tuple[Atoms, ...]:
        """The same supercells, with the same displacements, of the crystal at another volume, shape or with its ions elsewhere."""
        whole = self._phonopy.supercell
        deformation = np.linalg.solve(self._cell.cell.array, cell.cell.array)
        shifts = cell.positions - self._cell.positions @ deformation
        atom_of = [whole.u2u_map[site] for site in whole.s2u_map]
        positions = whole.positions @ deformation + shifts[atom_of]
        name = str(cell.info.get("name") or cell.get_chemical_formula())
        first = Atoms(
            whole.numbers, positions, cell=whole.cell @ deformation, pbc=True, info={"name": f"{name} supercell"}
        )
        made = [first]
        for i, moved in enumerate(self._phonopy.dataset["first_atoms"], 1):
            made.append(first.copy())
            made[-1].positions[moved["number"]] += moved["displacement"]
            made[-1].info["name"] = f"{name} displaced {i}"
        return tuple(made)

    @property
    def n_branches(self) -> int:
        """Three for each atom of the primitive cell."""
        return 3 * len(self._phonopy.primitive)

    def force_constants(self, forces: np.ndarray) -> np.ndarray:
        """(primitive atoms, supercell atoms, 3, 3) eV/A^2 from forces (1 + displaced, atoms, 3) on `structures`."""
        self._phonopy.forces = forces[1:] - forces[0]
        self._phonopy.produce_force_constants(calculate_full_force_constants=False, show_drift=False)
        self._phonopy.symmetrize_force_constants(show_drift=False)
        return np.array(self._phonopy.force_constants)

    def path(self, points: int) -> tuple[np.ndarray, np.ndarray, tuple[tuple[float, str], ...]]:
        """Lines between points of high symmetry as seekpath proposes (Hinuma et al., Comput. Mater. Sci. 128, 140, 2017).

        Args:
            points: q-points of each line, its ends included.

        Returns:
            q (n, 3) in reciprocal vectors of the primitive cell; distance (n,) along the path, 1/A (with 2 pi); marks (distance, label):
            'X|K' where a line ends and the next begins elsewhere.
        """
        import seekpath

        found = seekpath.get_path_orig_cell(self._phonopy.primitive.totuple(), symprec=SYMPREC)
        reciprocal = 2 * np.pi * np.linalg.inv(self._phonopy.primitive.cell).T
        coordinates = found["point_coords"]
        q, distance, end = [], [], 0.0
        marks: list[tuple[float, str]] = []
        for start, stop in found["path"]:
            line = np.linspace(coordinates[start], coordinates[stop], points)
            length = float(np.linalg.norm((line[-1] - line[0]) @ reciprocal))
            q.append(line)
            distance.append(np.linspace(end, end + length, points))
            if marks and marks[-1][1] != start:
                marks[-1] = (end, f"{marks[-1][1]}|{start}")
            elif not marks:
                marks.append((end, start))
            end += length
            marks.append((end, stop))
        return np.concatenate(q), np.concatenate(distance), tuple(marks)

    def frequencies(self, constants: np.ndarray, q: np.ndarray) -> np.ndarray:
        """(n, branches) THz at q (n, 3), in ascending order at each."""
        self._phonopy.force_constants = constants
        return np.array(self._phonopy.run_qpoints(q).frequencies)

    def mesh_frequencies(self, constants: np.ndarray, mesh: float = MESH) -> np.ndarray:
        """(q, branches) THz on a mesh, whose spacing is 2 pi / mesh."""
        self._phonopy.force_constants = constants
        return np.array(self._phonopy.run_mesh(mesh).frequencies)

    def imaginary(self, constants: np.ndarray) -> tuple[float, float]:
        """The lowest frequency (THz) on the mesh, and the share of imaginary modes; there is no free energy if it is above UNSTABLE."""
        frequencies = self.mesh_frequencies(constants)
        shares = (frequencies < IMAGINARY).mean(1)
        return float(frequencies.min()), float(np.average(shares, weights=self._phonopy.mesh.weights))

    def density_of_states(self, constants: np.ndarray, grid: np.ndarray) -> np.ndarray:
        """States per THz and atom on an even grid (THz), by tetrahedra; its integral is 3."""
        self.mesh_frequencies(constants, DOS_MESH)
        found = self._phonopy.run_total_dos(freq_min=grid[0], freq_max=grid[-1], freq_pitch=grid[1] - grid[0])
        return np.array(found.dos)[: len(grid)] * 3 / self.n_branches

    def harmonic(self, constants: np.ndarray, temperatures: Sequence[float] | np.ndarray) -> Harmonic:
        """Free energy of harmonic vibrations at constant volume.

        Raises:
            Failed: so many modes are imaginary that it has no meaning.
        """
        lowest, share = self.imaginary(constants)
        if share > UNSTABLE:
            raise Failed(f"imaginary modes, down to {lowest:.2f} THz")
        found = self._phonopy.run_thermal_properties(temperatures=temperatures, exclude_gamma_acoustic=True)
        n = self.n_branches / 3
        free, entropy, capacity = (np.array(v) / n for v in (found.free_energy, found.entropy, found.heat_capacity))
        zero_point = float(found.zero_point_energy) / n / KJ_MOL
        return Harmonic(free / KJ_MOL, entropy / J_K_MOL, capacity / J_K_MOL, zero_point)


def _phonopy(cell: Atoms, repeats: Sequence[int]) -> Any:
    """Phonopy's object of a crystal."""
    from phonopy import Phonopy
    from phonopy.structure.atoms import PhonopyAtoms

    crystal = PhonopyAtoms(
        numbers=cell.numbers, cell=cell.cell.array, positions=cell.positions, masses=cell.get_masses()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of changed defaults
        return Phonopy(crystal, np.diag(repeats), "auto", symprec=SAME)


def missing_library() -> str:
    """What of the libraries is not installed, as a sentence; '' if all is there."""
    missing = [name for name in ("phonopy", "seekpath", "spglib") if find_spec(name) is None]
    return (
        f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: pip install 'gpmlp[properties]'"
        if missing
        else ""
    )


def standard_cell(atoms: Atoms) -> Atoms:
    """The conventional cell of a crystal, made symmetric (spglib).

    Raises:
        UserError: atoms of one element differ in mass, or spglib finds no cell.
    """
    masses: dict[int, float] = {}
    for z, mass in zip(atoms.numbers, atoms.get_masses(), strict=True):
        if abs(masses.setdefault(z, mass) - mass) > 1e-6:
            raise UserError("Phonons need one mass for each element; here atoms of one element differ in mass.")
    spglib = load_spglib()
    found = spglib.standardize_cell((atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers), symprec=SYMPREC)
    if found is None:
        raise UserError(f"{atoms.get_chemical_formula()}: spglib finds no unit cell; are atoms on top of each other?")
    lattice, places, numbers = found
    cell = Atoms(numbers, scaled_positions=places, cell=lattice, pbc=True, info={"name": atoms.info.get("name", "")})
    cell.set_masses([masses[z] for z in numbers])
    return cell


def supercell_repeats(cell: Atoms, reach: float | None, most_atoms: int) -> tuple[int, int, int]:
    """Repeats of a cell so that no image of an atom is within twice the reach of a potential; fewer where atoms would be too many."""
    heights = _heights(cell)
    repeats = np.ceil((2 * reach if reach else LENGTH) / heights - 1e-6).astype(int).clip(1)
    while repeats.prod() * len(cell) > most_atoms and repeats.max() > 1:
        repeats[np.argmax(np.where(repeats > 1, heights * repeats, 0))] -= 1
    a, b, c = (int(n) for n in repeats)
    return a, b, c


def too_short(supercell: Atoms, reach: float | None, option: str) -> str:
    """A clause that tells of a supercell within which an atom sees what an image of a displaced one does too; '' if none has to."""
    across = float(_heights(supercell).min())
    if reach is None or across >= 2 * reach - 1e-6:
        return ""
    return f"; the supercell is {across:.1f} A across, less than twice the model's reach of {reach:.1f} A ({option} limits it)"


def _heights(cell: Atoms) -> np.ndarray:
    """(3,) A, between opposite faces."""
    return np.asarray(1 / np.linalg.norm(np.linalg.inv(cell.cell.array), axis=0))
