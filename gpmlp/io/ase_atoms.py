"""Conversion between ASE's Atoms (and every file that ASE reads) and Structures with their Targets."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.formats import UnknownFileTypeError, string2index
from ase.stress import full_3x3_to_voigt_6_stress

from gpmlp.core.errors import DataWarning, UserError
from gpmlp.core.quantities import Prediction, Targets
from gpmlp.core.structures import Structures
from gpmlp.io import files, labels
from gpmlp.io.files import atomic_write

# what readers of the many formats raise on input that they do not understand
UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AssertionError,
    AttributeError,
    RuntimeError,
    UnknownFileTypeError,
)


def read(
    path: str | os.PathLike[str], index: str | int | slice = ":", labelled: bool = False
) -> tuple[Structures, Targets]:
    """Read structures and whatever labels they carry from a file in any format known to ASE (extended XYZ is meant).

    Energies in eV, forces in eV/A, stresses in eV/A^3 (positive = tension), as ASE stores the results of calculators; else
    plain keys as listed in gpmlp.io.labels. What is absent is NaN in Targets.

    Args:
        path: file to read.
        index: frames to keep: 0, -1, ':100', '::10', ... Frames are counted from 0 in the file, whatever is kept.
        labelled: whether to warn (DataWarning) if no energies or no forces were recognised, though there may be some.

    Raises:
        UserError: the file or a frame of it cannot be used; names the file and the frame.
    """
    frames, numbers = read_frames(path, index)
    structures, targets = from_ase(frames, [f"{Path(path).name} frame {i}" for i in numbers])
    if labelled:
        _warn_of_other_names(Path(path), frames, targets)
    return structures, targets


def _warn_of_other_names(path: Path, frames: Sequence[Atoms], targets: Targets) -> None:
    """Warn of labels that seem to be there under names that are not recognised, or of none at all."""
    missing = [kind for kind in labels.NAMES if bool(getattr(targets, kind).isnan().all())]
    nothing = len(missing) == len(labels.NAMES) and bool(targets.stresses.isnan().all())
    candidates = {kind: labels.unrecognised_keys(frames, kind) for kind in missing}
    for kind in missing:
        if not candidates[kind] and not nothing:
            continue
        names = " or ".join(labels.NAMES[kind])
        there = ", ".join(candidates[kind]) if candidates[kind] else "nothing that could be them"
        where = "info" if kind == "energies" else "arrays"
        warnings.warn(
            f"{path}: no {kind} were recognised in any of its {len(frames)} frame{'s' * (len(frames) > 1)}; their {where} hold "
            f"{there}. {kind.capitalize()} are called {names}, bare or after {', '.join(labels.PREFIXES[:-1])}: rename them.",
            DataWarning,
            stacklevel=3,
        )


def read_frames(path: str | os.PathLike[str], index: str | int | slice = ":") -> tuple[list[Atoms], list[int]]:
    """Read Atoms and their numbers in the file, counted from 0."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give a file of structures.")
    if not path.exists():
        raise UserError(f"{path}: there is no such file.")
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{path}: is empty.")
    if path.suffix == ".gpmlp":
        raise UserError(f"{path}: is a model file by its name; give a file of structures, as train.xyz.")
    frames: list[Atoms] = []
    try:
        if path.suffix in (".xyz", ".extxyz") and (problem := files.scan_frames(path).problem):
            raise UserError(f"{path}: cannot be read: {problem}.")
        for atoms in ase.io.iread(path, index=":", do_not_split_by_at_sign=True):
            frames.append(atoms)
    except UserError:
        raise
    except UNREADABLE as error:
        reason = str(error) or type(error).__name__
        where = f"frame {len(frames)} of it" if frames or path.suffix in (".xyz", ".extxyz") else "it"
        raise UserError(f"{path}: {where} cannot be read: {reason}") from error
    if not frames:
        raise UserError(f"{path}: holds no structures.")
    try:
        chosen = string2index(index) if isinstance(index, str) else index
        every = range(len(frames))
        numbers = list(every[chosen]) if isinstance(chosen, slice) else [every[int(chosen)]]
    except (ValueError, IndexError) as error:
        raise UserError(f"{path}: cannot take the frames '{index}' of {len(frames)}: {error}.") from error
    if not numbers:
        raise UserError(f"{path}: the index '{index}' keeps none of its {len(frames)} frames.")
    return [frames[i] for i in numbers], numbers


def read_unlabelled(path: str | os.PathLike[str]) -> tuple[list[Atoms], Structures]:
    """Read Atoms, with all that is in the file, and their Structures without labels."""
    frames, numbers = read_frames(path)
    return frames, structures_from_ase(frames, [f"{Path(path).name} frame {i}" for i in numbers])


def structures_from_ase(atoms: Iterable[Atoms], names: Sequence[str] | None = None) -> Structures:
    """Convert Atoms to Structures, without any labels.

    Raises:
        UserError: no frames, a frame without atoms, an atom without an element, a cell that spans no volume.
    """
    frames = list(atoms)
    names = tuple(names) if names is not None else tuple(f"frame {i}" for i in range(len(frames)))
    if not frames:
        raise UserError("There are no structures: the list of atoms is empty.")
    for name, frame in zip(names, frames, strict=True):
        if len(frame) == 0:
            raise UserError(f"{name}: holds no atoms; remove this frame.")
        if (frame.numbers <= 0).any():
            atom = int((frame.numbers <= 0).argmax())
            raise UserError(f"{name}: atom {atom} is '{frame.symbols[atom]}', which is no element.")
    counts = [len(frame) for frame in frames]
    return Structures(
        torch.as_tensor(np.concatenate([frame.positions for frame in frames]), dtype=torch.float64),
        torch.as_tensor(np.stack([frame.cell.array for frame in frames]), dtype=torch.float64),
        torch.as_tensor(np.stack([frame.pbc for frame in frames])),
        torch.as_tensor(np.concatenate([frame.numbers for frame in frames]), dtype=torch.long),
        torch.from_numpy(np.repeat(np.arange(len(frames)), counts)),
        names,
    )


def from_ase(atoms: Iterable[Atoms], names: Sequence[str] | None = None) -> tuple[Structures, Targets]:
    """Convert Atoms to Structures and the Targets found in their calculator results, info and arrays; computes nothing.

    Args:
        names: how error messages call each frame; 'frame 0', 'frame 1', ... if not given.

    Raises:
        UserError: see `read`.
    """
    frames = list(atoms)
    structures = structures_from_ase(frames, names)
    collected = [labels.labels_of(frame, name) for frame, name in zip(frames, structures.names, strict=True)]
    for note, where in _group(collected, structures.names).items():
        more = f" (and {len(where) - 1} more)" if len(where) > 1 else ""
        warnings.warn(f"{where[0][0]}{more}: {note.format(where[0][1])}", DataWarning, stacklevel=2)

    def join(part: str, combine) -> torch.Tensor:
        return torch.as_tensor(combine([getattr(label, part) for label in collected]), dtype=torch.float64)

    targets = Targets(
        join("energy", np.array),
        join("forces", np.concatenate),
        join("stress", np.stack),
        join("energy_noise", np.array),
        join("force_noise", np.concatenate),
        join("stress_noise", np.array),
        tuple(label.config_type for label in collected),
    )
    return structures, targets


def _group(collected: Sequence[labels.FrameLabels], names: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Gather equal remarks, so that a thousand frames give one warning: text -> [(frame, number in it)]."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for label, name in zip(collected, names, strict=True):
        for text, number in label.remarks:
            groups.setdefault(text, []).append((name, number))
    return groups


def to_ase(structures: Structures, values: Prediction | Targets | None = None) -> list[Atoms]:
    """Convert Structures to Atoms that carry a prediction, or labels, as calculator results (ASE's units and signs)."""
    frames = []
    offsets = structures.offsets.tolist()
    cpu = structures.to(device="cpu")
    for s in range(len(structures)):
        rows = slice(offsets[s], offsets[s + 1])
        frame = Atoms(
            numbers=cpu.species[rows].numpy(),
            positions=cpu.positions[rows].double().numpy(),
            cell=cpu.cells[s].double().numpy(),
            pbc=cpu.periodic[s].numpy(),
        )
        if isinstance(values, Targets) and values.config_types[s]:
            frame.info["config_type"] = values.config_types[s]
        if values is not None:
            frame.calc = SinglePointCalculator(frame, **calculator_results(values, s, rows))
        frames.append(frame)
    return frames


def calculator_results(values: Prediction | Targets, s: int, atoms: slice) -> dict[str, float | np.ndarray]:
    """ASE calculator results of structure s, whose atoms are the given rows; NaN is left out.

    ASE's stress is in Voigt order xx, yy, zz, yz, xz, xy, in eV/A^3 and positive under tension, as ours is.
    """

    def numbers(tensor: torch.Tensor) -> np.ndarray:
        return tensor.detach().cpu().double().numpy()

    results: dict[str, float | np.ndarray] = {}
    energy, forces, stress = float(values.energies[s]), numbers(values.forces[atoms]), numbers(values.stresses[s])
    if not np.isnan(energy):
        results |= {"energy": energy, "free_energy": energy}
    if isinstance(values, Prediction):
        results["energies"] = numbers(values.atom_energies[atoms])
    if not np.isnan(forces).all():
        results["forces"] = forces
    if not np.isnan(stress).any():
        results["stress"] = full_3x3_to_voigt_6_stress(stress)
    return results


def uncertainty_results(prediction: Prediction, s: int, atoms: slice) -> dict[str, float | np.ndarray]:
    """Standard deviations and novelty of structure s, whose atoms are the given rows, as far as they were predicted."""
    results: dict[str, float | np.ndarray] = {}

    def numbers(tensor: torch.Tensor) -> np.ndarray:
        return tensor.detach().cpu().double().numpy()

    if prediction.energies_variance is not None:
        results["energy_std"] = float(prediction.energies_variance.total[s].sqrt())
    if prediction.atom_energies_variance is not None:
        results["local_energy_std"] = numbers(prediction.atom_energies_variance.total[atoms].sqrt())
    if prediction.forces_variance is not None:
        results["forces_std"] = numbers(prediction.forces_variance.total[atoms].sqrt())
    if prediction.stresses_variance is not None and not bool(prediction.stresses_variance.total[s].isnan().any()):
        results["stress_std"] = full_3x3_to_voigt_6_stress(numbers(prediction.stresses_variance.total[s].sqrt()))
    if prediction.novelty is not None:
        results["novelty"] = numbers(prediction.novelty[atoms])
    return results


def write_frames(path: str | os.PathLike[str], atoms: Atoms | Sequence[Atoms]) -> None:
    """Write Atoms as extended XYZ, atomically.

    Raises:
        UserError: the file cannot be written; an old file of that name is then untouched.
    """
    with atomic_write(path, text=True) as file:
        ase.io.write(file, atoms, format="extxyz")


def with_predictions(structures: Structures, targets: Targets, prediction: Prediction) -> list[Atoms]:
    """Atoms with the references as calculator results, and predictions as further info and arrays.

    Predictions are gpmlp_energy, gpmlp_forces and gpmlp_stress (Voigt xx yy zz yz xz xy), so that read() sees the references;
    standard deviations are gpmlp_energy_std, gpmlp_forces_std, gpmlp_local_energy_std and gpmlp_stress_std, where they were
    predicted, and gpmlp_novelty is the Mahalanobis distance in units of its threshold.
    """
    frames, offsets = to_ase(structures, targets), structures.offsets.tolist()
    for s, frame in enumerate(frames):
        rows = slice(offsets[s], offsets[s + 1])
        predicted = calculator_results(prediction, s, rows)
        values = uncertainty_results(prediction, s, rows)
        values |= {key: predicted[key] for key in ("energy", "forces", "stress") if key in predicted}
        for key, value in values.items():
            of_atoms = np.ndim(value) and not key.startswith("stress")
            holder: dict[str, Any] = frame.arrays if of_atoms else frame.info
            holder[f"gpmlp_{key}"] = value
    return frames


def picked_frames(
    frames: Sequence[Atoms], structures: Sequence[int], scores: Sequence[float], places: Sequence[int] | None
) -> list[Atoms]:
    """Copies of the frames that were picked, once each and best first, with info gpmlp_selected_rank and gpmlp_selected_score.

    Args:
        structures: frame of each pick.
        scores: of each pick; a frame has that of its best.
        places: where environments were picked, the atom of each in its frame; arrays gpmlp_selected then hold the rank of each
            environment, -1 for those that were not picked.
    """
    chosen: dict[int, Atoms] = {}
    for pick, (s, score) in enumerate(zip(structures, scores, strict=True)):
        if s not in chosen:
            frame = frames[s].copy()
            frame.calc = frames[s].calc
            frame.info |= {"gpmlp_selected_rank": len(chosen), "gpmlp_selected_score": float(score)}
            frame.arrays.pop("gpmlp_selected", None)  # of an earlier selection
            if places is not None:
                frame.new_array("gpmlp_selected", np.full(len(frame), -1))
            chosen[s] = frame
        if places is not None:
            chosen[s].arrays["gpmlp_selected"][places[pick]] = pick
    return list(chosen.values())


def read_frame(text: bytes) -> Atoms:
    """The Atoms of one frame of extended XYZ."""
    atoms = ase.io.read(io.StringIO(text.decode("utf-8")), format="extxyz", index=0)
    assert isinstance(atoms, Atoms), "one index, one frame"
    return atoms


def iterate_frames(path: Path, at_most: int, most_atoms: int) -> Iterator[Atoms]:
    """Frames of an extended XYZ trajectory at even distances, the last first; one that is cut off is left out.

    Args:
        at_most: frames; most_atoms: of all frames together, but for the first.
    """
    if not path.exists():
        return
    layout = files.scan_frames(path, closed=True)
    bounds = [*layout.starts, layout.end]
    n, used = len(layout.starts), 0
    wanted = np.unique(np.linspace(0, n - 1, min(n, at_most)).round().astype(int)).tolist() if n else []
    with open(path, "rb") as file:
        for i in reversed(wanted):  # the end of the run matters most
            file.seek(bounds[i])
            atoms = read_frame(file.read(bounds[i + 1] - bounds[i]))
            used += len(atoms)
            if used > most_atoms and used > len(atoms):
                return
            atoms.calc = None
            yield atoms
