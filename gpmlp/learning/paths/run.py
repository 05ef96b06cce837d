"""Runs of `gpmlp relax`, `neb`, `saddle` and `learn` with `reactions`: labels in a folder, from which a killed one goes on.

The course of a run follows from its recipe and its labels alone: one that is resumed goes the same way, and what is in the label file
is not asked of the oracle.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms

from gpmlp.core.errors import UserError
from gpmlp.core.quantities import json_value
from gpmlp.io import archive
from gpmlp.io.ase_atoms import structures_from_ase, write_frames
from gpmlp.io.files import atomic_write
from gpmlp.io.label_checks.coincident import check_coincident
from gpmlp.learning.checkpoint import ActivityTimer, RunFiles, RunProgress
from gpmlp.learning.label_requests import LabelRequests
from gpmlp.learning.paths import vibrations
from gpmlp.learning.paths.band import GPNEB, BandLabel
from gpmlp.learning.paths.band import Path as ReactionPath
from gpmlp.learning.paths.minimizer import GPMinimizer
from gpmlp.learning.paths.network import GPReactionNetwork, NetworkLabel, Search
from gpmlp.learning.paths.oracle import RunOracle
from gpmlp.learning.paths.recipe import MotionRecipe, NebRecipe, NetworkRecipe, RelaxRecipe, SaddleRecipe
from gpmlp.learning.paths.saddle import BESIDE, GPSaddle, Saddle, SaddleLabel
from gpmlp.learning.paths.shared_labels import FOLDER, SharedLabels
from gpmlp.learning.paths.surface import Surface
from gpmlp.learning.paths.vibrations import SaddleModes

MODEL, LABELS = "model.gpmlp", "labels.xyz"


class PathFiles(RunFiles):
    """The files of a run: log.jsonl, which depends on recipe and labels alone and is written anew when a run is resumed, and the others."""

    REPEATABLE = ("log.jsonl",)

    def discard_unused(self) -> None:
        """See RunFiles; the copies of labels of other runs as well."""
        super().discard_unused()
        if not (self.folder / "recipe.json").exists():
            shutil.rmtree(self.folder / FOLDER, ignore_errors=True)
            with suppress(OSError):
                self.folder.rmdir()


@dataclass(frozen=True)
class RelaxStep:
    """A label of a relaxation.

    Attributes:
        labels: so far; energy: eV; force: the largest on a free atom, eV/A; of the oracle.
    """

    labels: int
    energy: float
    force: float
    converged: bool


@dataclass(frozen=True, eq=False)
class RelaxOutcome:
    """What a relaxation came to.

    Attributes:
        numbers: of relax.json; start, atoms: before and after, the latter with the oracle's results.
    """

    converged: bool
    numbers: dict[str, Any]
    start: Atoms
    atoms: Atoms


@dataclass(frozen=True, eq=False)
class PathOutcome:
    """What a search came to.

    Attributes:
        numbers: of neb.json; modes: of the top of the path.
    """

    converged: bool
    numbers: dict[str, Any]
    path: ReactionPath
    modes: SaddleModes


@dataclass(frozen=True, eq=False)
class SaddleOutcome:
    """What a search without an end point came to.

    Attributes:
        numbers: of saddle.json; modes: of the saddle.
    """

    converged: bool
    numbers: dict[str, Any]
    saddle: Saddle
    modes: SaddleModes


def relax(
    recipe: RelaxRecipe, base: Path = Path("."), resume: bool = False
) -> Generator[RelaxStep | RelaxOutcome, None, None]:
    """Relax a structure; yields each label, and the outcome last. OUTPUT/relax.json and relaxed.xyz hold what came of it.

    Args:
        base: folder that relative paths of the recipe start from.
        resume: go on with the run in the output folder; without it there must be none.

    Raises:
        UserError: bad input, an oracle that cannot be used or failed, a disk that is full. The run can be resumed then.
    """
    start = read_structure(base / recipe.start, recipe.fixed)
    atoms = start.copy()
    folder = base / recipe.output
    with _opened(recipe, base, resume, start) as (oracle, files, surface):
        oracle.reason, atoms.calc = "the relaxation", oracle
        minimizer = GPMinimizer(atoms, surface, logfile=None)
        converged, labels = False, []
        for converged in minimizer.irun(recipe.force_eV_per_A, recipe.labels_at_most - 1):
            force = float(np.linalg.norm(atoms.get_forces(), axis=1).max())
            step = RelaxStep(minimizer.nsteps + 1, atoms.get_potential_energy(), force, bool(converged))
            labels.append(_with_units(asdict(step)))
            files.log_event("label", **labels[-1])
            yield step
        write_frames(folder / "relaxed.xyz", atoms)
        numbers = {
            "energy_eV": atoms.get_potential_energy(),
            "largest_force_eV_per_A": float(np.linalg.norm(atoms.get_forces(), axis=1).max()),
            "oracle_calls": oracle.calls,
            "converged": bool(converged),
            "labels": labels,
        }
        _write_json(folder / "relax.json", numbers)
        yield RelaxOutcome(bool(converged), numbers, start, atoms)


def find_path(
    recipe: NebRecipe, base: Path = Path("."), resume: bool = False
) -> Generator[BandLabel | PathOutcome, None, None]:
    """Find a minimum-energy path; yields each label of it, and the outcome last.

    OUTPUT/neb.json and path.xyz hold what came of it.

    Args:
        base, resume: see `relax`.

    Raises:
        UserError: see `relax`.
    """
    start, end = (read_structure(base / name, recipe.fixed) for name in (recipe.start, recipe.end))
    folder = base / recipe.output
    # bad end points are refused before anything is written
    GPNEB(start, end, object(), recipe.images, recipe.relax_ends)
    with _opened(recipe, base, resume, start) as (oracle, files, surface):
        neb = GPNEB(start, end, oracle, recipe.images, recipe.relax_ends, surface)
        for label in neb.irun(recipe.force_eV_per_A, recipe.labels_at_most, recipe.energy_eV):
            files.log_event("label", **_with_units(asdict(label)))
            yield label
        assert neb.path is not None
        write_frames(folder / "path.xyz", _frames(neb.path))
        archive.save(neb.surface.potential, folder / MODEL)
        modes = vibrations.saddle_modes(neb.surface, neb.path.images[neb.path.top])
        numbers = path_numbers(neb, modes)
        _write_json(folder / "neb.json", numbers)
        yield PathOutcome(neb.converged, numbers, neb.path, modes)


def path_numbers(neb: GPNEB, modes: SaddleModes) -> dict[str, Any]:
    """What neb.json holds."""
    path, last = neb.path, neb.labels[-1]
    assert path is not None
    return {
        "barrier_eV": path.barrier,
        "barrier_sigma_eV": path.sigma,
        "reverse_barrier_eV": path.barrier - path.reaction_energy,
        "reaction_energy_eV": path.reaction_energy,
        "reaction_energy_sigma_eV": path.reaction_sigma,
        "foreseen_barrier_eV": last.barrier,
        "foreseen_barrier_sigma_eV": last.sigma,
        "foreseen_error_eV": last.error,
        "oracle_calls": neb.calls,
        "oracle_calls_end_points": neb.oracle.calls - neb.calls,
        "largest_force_at_top_eV_per_A": last.force,
        "converged": neb.converged,
        "top_image": path.top,
        "energies_eV": path.energies,
        "sigmas_eV": path.sigmas,
        "distances_A": path.distances,
        "imaginary_frequencies_per_cm": modes.imaginary,
        "frequencies_per_cm": modes.frequencies,
        "labels": [_with_units(asdict(label)) for label in neb.labels],
    }


def find_saddle(
    recipe: SaddleRecipe, base: Path = Path("."), resume: bool = False
) -> Generator[SaddleLabel | SaddleOutcome, None, None]:
    """Find a saddle near a minimum; yields each label of the search, and the outcome last.

    OUTPUT/saddle.json and saddle.xyz hold what came of it.

    Args:
        base, resume: see `relax`.

    Raises:
        UserError: see `relax`.
    """
    start, folder = read_structure(base / recipe.start, recipe.fixed), base / recipe.output
    given = recipe.direction
    direction = given.motion(start) if isinstance(given, MotionRecipe) else given
    about = direction, recipe.seed, recipe.relax_start, recipe.sides
    GPSaddle(start, object(), *about)  # a bad direction is refused before anything is written
    with _opened(recipe, base, resume, start) as (oracle, files, surface):
        search = GPSaddle(start, oracle, *about, surface)
        limits = recipe.force_eV_per_A, recipe.labels_at_most, recipe.energy_eV, recipe.highest_eV
        for label in search.irun(*limits):
            files.log_event("label", **_with_units(asdict(label)))
            yield label
        assert search.saddle is not None
        write_frames(folder / "saddle.xyz", _saddle_frames(search.saddle))
        archive.save(search.surface.potential, folder / MODEL)
        modes = vibrations.saddle_modes(search.surface, search.saddle.atoms)
        numbers = saddle_numbers(search, modes)
        _write_json(folder / "saddle.json", numbers)
        yield SaddleOutcome(search.converged, numbers, search.saddle, modes)


def saddle_numbers(search: GPSaddle, modes: SaddleModes) -> dict[str, Any]:
    """What saddle.json holds; where no saddle was found there is no barrier."""
    saddle = search.saddle
    assert saddle is not None
    last = [label for label in search.labels if label.reason != BESIDE][-1]
    sides = [side.get_potential_energy() - saddle.start.get_potential_energy() for side in saddle.sides]
    return {
        "barrier_eV": saddle.barrier if search.converged else None,
        "barrier_sigma_eV": saddle.sigma if search.converged else None,
        "energy_above_start_eV": saddle.barrier,
        "energy_above_start_sigma_eV": saddle.sigma,
        "foreseen_barrier_eV": last.barrier,
        "foreseen_barrier_sigma_eV": last.sigma,
        "foreseen_error_eV": last.error,
        "oracle_calls": search.calls,
        "oracle_calls_relaxations": search.oracle.calls - search.calls,
        "largest_force_eV_per_A": last.force,
        "converged": search.converged,
        "highest_eV_met": search.too_high and not search.converged,
        "curvature_eV_per_A2": saddle.curvature,
        "imaginary_frequencies_per_cm": modes.imaginary,
        "frequencies_per_cm": modes.frequencies,
        "joins_start": saddle.joins_start,
        "energies_of_sides_eV": sides,
        "labels": [_with_units(asdict(label)) for label in search.labels],
    }


def _saddle_frames(saddle: Saddle) -> list[Atoms]:
    """The start, the saddle with its mode, and the sides, with the oracle's energies less the start's."""
    frames = []
    sides = [(f"side {i + 1}", side) for i, side in enumerate(saddle.sides)]
    for what, atoms in [("start", saddle.start), ("saddle", saddle.atoms), *sides]:
        frame = atoms.copy()
        frame.calc = atoms.calc
        relative = atoms.get_potential_energy() - saddle.start.get_potential_energy()
        frame.info |= {"what": what, "relative_energy_eV": relative}
        if what == "saddle":
            frame.set_array("mode", saddle.mode)
        frames.append(frame)
    return frames


@dataclass(frozen=True, eq=False)
class NetworkOutcome:
    """What an exploration came to; `numbers` are of network.json."""

    numbers: dict[str, Any]
    network: GPReactionNetwork


def find_network(
    recipe: NetworkRecipe, base: Path = Path("."), resume: bool = False
) -> Generator[NetworkLabel | Search | NetworkOutcome, None, None]:
    """Explore the reactions around a minimum; yields each label of a search, each search that is over, and the outcome last.

    OUTPUT/network.json, minima.xyz and saddles.xyz hold what came of it so far, after each search.

    Args:
        base, resume: see `relax`.

    Raises:
        UserError: see `relax`; the oracle calls were spent before the start was at rest.
    """
    start, chosen = read_structure(base / recipe.start, recipe.fixed), recipe.reactions
    GPReactionNetwork(start, object(), chosen.ways)  # what is bad is refused before anything is written
    with _opened(recipe, base, resume, start) as (oracle, files, surface):
        oracle.needed = False
        network = GPReactionNetwork(start, oracle, chosen.ways, recipe.seed, surface)
        limits = recipe.labels_at_most, chosen.highest_eV, recipe.energy_eV, chosen.minima_at_most
        for event in network.irun(recipe.force_eV_per_A, *limits):
            if isinstance(event, NetworkLabel):
                search = asdict(event)
                files.log_event("label", **_with_units(search | search.pop("label")))
            else:
                files.log_event("search", **asdict(event))
                if not oracle.replays:  # what is there may be further than this
                    _write_network(network, oracle, base / recipe.output)
            yield event
        if not network.minima:
            raise UserError(
                f"{base / recipe.output}: {network.ended}; go on with --resume and a higher labels_at_most."
            )
        yield NetworkOutcome(_write_network(network, oracle, base / recipe.output), network)


def _write_network(network: GPReactionNetwork, oracle: RunOracle, folder: Path) -> dict[str, Any]:
    """network.json, whose numbers are returned, and the structures."""
    numbers = network_numbers(network, oracle.key)
    write_frames(folder / "minima.xyz", [_frame(m.atoms, m.energy, f"minimum {m.number}") for m in network.minima])
    saddles = []
    for r in network.reactions:
        saddles.append(_frame(r.saddle, r.energy, f"saddle {r.number}"))
        saddles[-1].set_array("mode", r.mode)
    if saddles:
        write_frames(folder / "saddles.xyz", saddles)
    _write_json(folder / "network.json", numbers)
    return numbers


def _frame(atoms: Atoms, energy: float, what: str) -> Atoms:
    frame = atoms.copy()
    frame.calc = atoms.calc
    frame.info |= {"what": what, "relative_energy_eV": energy}
    return frame


def network_numbers(network: GPReactionNetwork, key: Callable[[Atoms], str]) -> dict[str, Any]:
    """What network.json holds.

    Args:
        key: of the label of a structure in labels.xyz.
    """
    minima = [
        {
            "number": m.number,
            "energy_eV": m.energy,
            "sigma_eV": m.sigma,
            "fragments": m.fragments,
            "lowest_curvature_eV_per_A2": m.softest,
            "doubt": m.doubt,
            "found_in_search": m.found_in,
            "ways_left": network.ways_left(m),
            "frame": m.number - 1,
            "label": key(m.atoms),
        }
        for m in network.minima
    ]
    reactions = [
        {
            "number": r.number,
            "from": r.first,
            "to": r.second,
            "bonds": r.bonds,
            "saddle_energy_eV": r.energy,
            "barrier_eV": r.forward,
            "barrier_sigma_eV": r.sigma,
            "barrier_90_eV": r.interval,
            "reverse_barrier_eV": r.backward,
            "reverse_barrier_sigma_eV": r.sigma_backward,
            "reverse_barrier_90_eV": r.interval_backward,
            "imaginary_frequencies_per_cm": r.imaginary,
            "doubt": r.doubt,
            "found_in_search": r.found_in,
            "frame": r.number - 1,
            "labels": [
                key(x) for x in (network.minima[r.first - 1].atoms, r.saddle, network.minima[r.second - 1].atoms)
            ],
        }
        for r in network.reactions
    ]
    return {
        "ended": network.ended,
        "oracle_calls": network.calls,
        "minima_file": "minima.xyz",
        "minima": minima,
        "saddles_file": "saddles.xyz",
        "reactions": reactions,
        "searches": [asdict(search) for search in network.searches],
    }


def read_structure(path: Path, fixed: tuple[int, ...] = ()) -> Atoms:
    """The one structure of a file, in any format that ASE reads, with the constraints that it holds and some more fixed atoms.

    Raises:
        UserError: the file cannot be read, holds no structure or several, atoms on top of each other, or not so many atoms.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file.")
    try:
        frames = list(ase.io.iread(path, index=":"))
    except Exception as error:  # readers refuse in many ways
        raise UserError(
            f"{path}: cannot be read as a structure: {' '.join(str(error).split()) or type(error).__name__}."
        ) from error
    if len(frames) != 1 or not len(frames[0]):
        what = f"{len(frames)} structures" if len(frames) != 1 else "a structure without atoms"
        raise UserError(f"{path}: holds {what}; it must be one structure: write the one that is meant to a file.")
    atoms = frames[0]
    for finding in check_coincident(structures_from_ase([atoms], [str(path)])):
        raise UserError(str(finding))
    if fixed and max(fixed) >= len(atoms):
        raise UserError(f"fixed: {path} has atoms 0 to {len(atoms) - 1}; there is no atom {max(fixed)}.")
    atoms.calc = None
    if fixed:
        atoms.set_constraint([*atoms.constraints, FixAtoms(sorted(set(fixed)))])
    return atoms


@contextmanager
def _opened(
    recipe: RelaxRecipe | NebRecipe | SaddleRecipe | NetworkRecipe, base: Path, resume: bool, start: Atoms
) -> Iterator[tuple[RunOracle, PathFiles, Surface]]:
    """The oracle, the files of a run, closed in the end, and the surface that it begins with; what a run wrote that failed before its
    first label is removed."""
    recipe.oracle.check()  # before anything is written
    folder, others = base / recipe.output, [base / name for name in recipe.labels]
    begun = any((folder / name).exists() for name in (LABELS, "refused.jsonl"))
    shared = SharedLabels.read(others, folder if begun else None, recipe.oracle.settings_hash, start)
    files = PathFiles(folder, recipe, resume)
    try:
        with closing(files):
            shared.keep(folder, begun)
            requests = LabelRequests(recipe.oracle, folder, files, ActivityTimer())
            with closing(requests):
                files.truncate(RunProgress())
                yield RunOracle(requests, shared.entries), files, Surface(recipe.model, shared.atoms())
    except UserError:
        files.discard_unused()
        raise


def _frames(path: ReactionPath) -> list[Atoms]:
    frames = []
    for image, energy, sigma in zip(path.images, path.energies, path.sigmas, strict=True):
        frame = image.copy()
        frame.calc = image.calc
        frame.info |= {"relative_energy_eV": float(energy), "relative_energy_std_eV": float(sigma)}
        frames.append(frame)
    return frames


UNITS = {
    "energy": "energy_eV",
    "force": "largest_force_eV_per_A",
    "barrier": "foreseen_barrier_eV",
    "sigma": "foreseen_barrier_sigma_eV",
    "largest_sigma": "largest_sigma_eV",
    "image_sigma": "image_sigma_eV",
    "error": "foreseen_error_eV",
    "curvature": "lowest_curvature_eV_per_A2",
}


def _with_units(numbers: dict[str, Any]) -> dict[str, Any]:
    return {UNITS.get(name, name): value for name, value in numbers.items()}


def _write_json(path: Path, numbers: dict[str, Any]) -> None:
    with atomic_write(path, text=True) as file:
        file.write(json.dumps(json_value(numbers), indent=1) + "\n")
