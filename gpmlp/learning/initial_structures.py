"""Initial structures to label: the starts of the trajectories, and copies displaced and strained at random."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms

from gpmlp.core.errors import DataWarning, UserError
from gpmlp.core.quantities import Targets
from gpmlp.core.units import BOLTZMANN
from gpmlp.fitting import defaults
from gpmlp.io.ase_atoms import read, read_frames, structures_from_ase
from gpmlp.io.charges import charge_entries, stated_charge
from gpmlp.io.label_checks.coincident import check_coincident
from gpmlp.learning.labels import LabelEntry, LabelFile, canonical_structure, key_of
from gpmlp.learning.recipe import FEWEST_LABELS, LearnRecipe
from gpmlp.learning.surrogate import cut_surrogate
from gpmlp.learning.triggers import too_close
from gpmlp.learning.walker import fixed_atoms

# eV/A^2 of an atom in a solid, of a bond in a molecule: for sizes of displacements only
STIFFNESS = {True: 4.0, False: 25.0}
LARGEST = 0.15  # A, of a standard deviation
FEWER = 0.8  # displacements are made smaller by this until no atoms are too close
TRIES = 20
SPINS = frozenset("spin multiplicity spin_multiplicity total_spin magmom".split())
FEWEST, MOST, ATOMS = 6, 20, 150  # structures to begin with, and atoms that they should hold together


def read_starts(path: Path) -> list[Atoms]:
    """The structures that trajectories begin from.

    Raises:
        UserError: there are none, one has no atoms or atoms on top of one another, or they hold constraints other than fixed atoms.
    """
    frames, _ = read_frames(path)
    for i, atoms in enumerate(frames):
        if not len(atoms):
            raise UserError(f"{path}: frame {i} has no atoms; a start needs one at least.")
        fixed_atoms(atoms)
        atoms.calc = None
    if not frames:
        raise UserError(f"{path}: holds no structure to start from.")
    # before an oracle is asked, which may take forever
    for finding in check_coincident(structures_from_ase(frames, [f"{path}: frame {i}" for i in range(len(frames))])):
        raise UserError(str(finding))
    return frames


def refuse_electronic_start(starts: Sequence[Atoms], path: Path) -> None:
    """Raises UserError: a total charge, or charges or magnetic moments by site, which frames of LAMMPS do not have."""
    for i, atoms in enumerate(starts):
        if stated_charge(atoms.info, f"{path}: frame {i}"):
            raise UserError(
                f"{path}: frame {i} has a total charge, which the frames that LAMMPS writes would not have; give it in oracle.kwargs."
            )
        if atoms.get_initial_magnetic_moments().any() or atoms.get_initial_charges().any():
            raise UserError(
                f"{path}: frame {i} has initial magnetic moments or charges by site, which the frames that LAMMPS writes would not have; "
                "remove them, and give moments by symbol (oracle.magnetic_moments) or in oracle.kwargs."
            )


def refuse_charged_surrogates(starts: Sequence[Atoms], path: Path) -> None:
    """Raises UserError: a total charge that is not that of its atoms' initial charges, of which nobody knows where it is."""
    for i in structures_from_ase(starts, [f"{path}: frame {i}" for i in range(len(starts))]).stated_charges:
        raise UserError(
            f"{path}: frame {i} has a total charge, and a surrogate that `carve` cuts from it might hold any part of it; give the charges "
            "of its atoms (column initial_charges), or leave carve out."
        )


def warn_of_electronic_start(starts: Sequence[Atoms], path: Path, by_symbol: Mapping[str, float]) -> None:
    """Say what of the starts' magnetic moments reaches the oracle otherwise than one may think (DataWarning).

    Args:
        by_symbol: `oracle.magnetic_moments`.
    """
    moments = [i for i, atoms in enumerate(starts) if atoms.get_initial_magnetic_moments().any()]
    if moments and by_symbol:
        warnings.warn(
            f"{path}: frame {moments[0]} has magnetic moments of its own, by site; the oracle begins with these there, and with "
            "oracle.magnetic_moments, by symbol, only where a structure has none.",
            DataWarning,
            stacklevel=2,
        )
    for i, atoms in enumerate(starts):
        totals = sorted(name for name in atoms.info if name.lower() in SPINS)
        if totals and not atoms.get_initial_magnetic_moments().any():
            warnings.warn(
                f"{path}: frame {i} says {', '.join(f'{name} = {atoms.info[name]}' for name in totals)}, which does not reach the oracle: "
                "give it as magnetic moments of atoms (column initial_magmoms), or in oracle.kwargs.",
                DataWarning,
                stacklevel=2,
            )
            return


def read_given(path: Path) -> Iterator[LabelEntry]:
    """Labelled structures of a file, as entries of the label file.

    Raises:
        UserError: a frame without forces, which the trigger judges by.
    """
    structures, targets = read(path)
    for i in range(len(structures)):
        label = targets.select(structures, [i])
        if bool(label.forces.isnan().all()):
            only = "neither energy nor forces" if bool(label.energies.isnan().all()) else "an energy, but no forces"
            raise UserError(
                f"{path}: frame {i} has {only}; structures of bootstrap.given need their labels: leave it out, or label it."
            )
    for i in range(len(structures)):
        one = canonical_structure(structures.select([i]))
        yield LabelEntry(one, targets.select(structures, [i]), key_of(one), "given", "", {"frame": i})


def _cell_maker(starts: Sequence[Atoms], recipe: LearnRecipe) -> Callable[[Atoms, int], Atoms]:
    """What copies are made of: starts, or of those that are too large the surrogate around some atom, which a number picks."""
    chosen = recipe.carve
    if chosen is None or all(len(atoms) <= chosen.above for atoms in starts):
        return lambda atoms, _: atoms
    whole = structures_from_ase(starts)
    summary = defaults.summarise_data(whole, Targets.unlabelled(whole))
    resolved = defaults.resolve_recipe(recipe.model, summary, len(whole.distinct_species))
    reach = max(d.cutoff or 0.0 for d in resolved.descriptors)

    def small(atoms: Atoms, number: int) -> Atoms:
        atom = int(np.random.default_rng([recipe.seed, 2, number]).integers(len(atoms)))
        frame = structures_from_ase([atoms])
        cut = cut_surrogate(frame, atom, reach, chosen.core_A) if len(atoms) > chosen.above else None
        if cut is None:
            return atoms
        part = atoms[cut.origin.numpy()]
        for key in charge_entries(part.info):  # which was that of the whole
            del part.info[key]
        part.set_cell(cut.structure.cells[0].numpy())
        part.positions = cut.structure.positions.numpy()
        return part

    return small


def make_structures(starts: Sequence[Atoms], recipe: LearnRecipe, there: int = 0) -> list[Atoms]:
    """Starts first, then displaced copies of them in turn, recipe.bootstrap.n in all (each start at least once).

    Displacements shrink from copy to copy from one and a half times `displacement_A` to half of it, so that the second half, which
    is predicted before it is learned, interpolates as dynamics will. No more than stop.labels_at_most leaves room for.

    Args:
        there: labels that there are already.
    """
    chosen, small = recipe.bootstrap, _cell_maker(starts, recipe)
    out = [small(_still(atoms), k) for k, atoms in enumerate(starts)]
    generator = np.random.default_rng([recipe.seed, 1])
    n = chosen.n or min(MOST, max(FEWEST, round(ATOMS * len(starts) / sum(len(a) for a in starts))))
    more = max(0, n - len(out))
    for k in range(more):
        atoms = small(_still(starts[k % len(starts)]), len(starts) + k)
        size = chosen.displacement_A or _thermal_displacement(atoms, recipe.dynamics.highest_K)
        size *= 1.5 - (k / (more - 1) if more > 1 else 0.5)
        out.append(_displaced(atoms, size, chosen.strain if atoms.pbc.all() else 0.0, recipe, generator))
    most = recipe.stop.labels_at_most
    return out if most is None else out[: max(0, most - there)]


def check_enough(labels: int, asked: int, file: LabelFile) -> None:
    """Raise UserError, with the reason of the last refusal, where there are too few first labels to make a model from."""
    if labels >= FEWEST_LABELS:
        return
    said = f"Only {labels} of the first {asked} structures could be labelled; two are needed."
    if file.refusals:
        again = f"remove {file.refused_path} to have them asked again, and go on (--resume); or raise bootstrap.n"
        raise UserError(
            f"{said} The last was set aside: {file.refusals[-1].reason}. Correct the oracle, {again if labels else 'and begin again'}."
        )
    raise UserError(f"{said} Raise bootstrap.n: the others are alike.")


def _still(atoms: Atoms) -> Atoms:
    still = atoms.copy()
    still.calc = None
    still.arrays.pop("momenta", None)
    return still


def _thermal_displacement(atoms: Atoms, temperature_K: float) -> float:
    """sqrt(kT / stiffness), A."""
    return min(LARGEST, max(0.02, (BOLTZMANN * temperature_K / STIFFNESS[bool(atoms.pbc.any())]) ** 0.5))


def _too_close(atoms: Atoms, share: float) -> bool:
    try:
        return too_close(structures_from_ase([atoms]), share) is not None
    except UserError:  # closer than any two atoms may be
        return True


def _displaced(atoms: Atoms, size: float, strain: float, recipe: LearnRecipe, generator: np.random.Generator) -> Atoms:
    shifts = generator.standard_normal((len(atoms), 3))
    shifts[fixed_atoms(atoms)] = 0.0
    deformation = generator.uniform(-1, 1, (3, 3))
    deformation = np.eye(3) + strain * 0.5 * (deformation + deformation.T)
    for _ in range(TRIES):
        new = atoms.copy()
        if strain:
            new.set_cell(atoms.cell.array @ deformation, scale_atoms=True)
        new.positions += size * shifts
        if not _too_close(new, recipe.trigger.guards.distance):
            return new
        size *= FEWER
    return atoms
