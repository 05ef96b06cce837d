"""Conversion between ASE's Atoms (and every file that ASE reads) and Structures with their Targets."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress

from gpmlp.core.errors import UserError, chemical_symbol
from gpmlp.core.findings import Finding, Severity, warn_of
from gpmlp.core.quantities import ISOLATED, Prediction, Targets, is_isolated_atom
from gpmlp.core.structures import Structures
from gpmlp.io import charge_labels, extxyz, label_names, labels, structure_files
from gpmlp.io.charges import set_charge, total_charge
from gpmlp.io.files import atomic_write
from gpmlp.io.frames import Frame
from gpmlp.io.structure_files import Each, Paths, Progress
from gpmlp.io.zero_labels import without_false_zeros

ELECTRONIC = {
    "magnetic_moments": "initial_magmoms",
    "initial_charges": "initial_charges",
}  # of Structures: ASE's arrays
Keys = Mapping[str, str | Sequence[str]]
ALONE = 8.0  # A, from the images of a single atom that make it an isolated one,
LONE = re.compile("^$|atom|isolated|single", re.IGNORECASE)  # and what its config_type may be then
UNNAMED = ("labels-of-unknown-name", "no-labels")  # findings that matter only where there should be labels


@dataclass(frozen=True)
class LabelledData:
    """Structures and labels of files, with what was found when they were read.

    Attributes:
        findings: which labels were taken ('note'), and what may be wrong with them.
    """

    structures: Structures
    targets: Targets
    findings: tuple[Finding, ...]


def read(
    path: Paths,
    index: str | int | slice = ":",
    labelled: bool = False,
    keys: Keys | None = None,
    progress: Progress | None = None,
) -> tuple[Structures, Targets]:
    """Read structures and whatever labels they carry from files in any format known to ASE (extended XYZ is meant).

    Energies in eV, forces in eV/A, stresses in eV/A^3 (positive = tension), as ASE stores the results of calculators; else
    plain keys as gpmlp.io.label_names knows them, of one source in each file. What is absent is NaN in Targets. What may be
    wrong is warned of (FindingWarning).

    Args:
        path: file to read, a pattern (``data/*.xyz``), or several of these.
        index: frames to keep of each file: 0, -1, ':100', '::10', ... Frames are counted from 0 in the file, whatever is kept.
        labelled: whether to warn too if no energies or no forces were recognised, though there may be some.
        keys: names of labels where they are not to be found out, as {'energy': 'E_pbe', 'forces': 'F_pbe', 'stress': 'none'}.
        progress: called with ('reading', done, total, file).

    Raises:
        UserError: a file or a frame of it cannot be used; names the file and the frame.
    """
    data = read_labelled(path, index, keys, progress)
    for finding in data.findings:
        if finding.severity != "note" and (labelled or finding.kind not in UNNAMED):
            warn_of(finding)
    return data.structures, data.targets


def read_labelled(
    path: Paths,
    index: str | int | slice = ":",
    keys: Keys | None = None,
    progress: Progress | None = None,
    each: Each | None = None,
) -> LabelledData:
    """Read structures and labels, and everything that was found on the way; see `read`, nothing is warned of.

    Args:
        each: by whom files are read, each by one, and a single one in shards; this process if not given.
    """
    files = structure_files.called_files(path)
    if each is None or len(files) == 1:
        parts = [_read_file(index, keys, progress, each, *file) for file in files]
    else:
        tell = partial(progress, "reading") if progress else lambda done, total, note: None
        absolute = [(path.absolute(), called) for path, called in files]
        parts = list(each(partial(_read_file, index, keys, None, None), absolute, tell))
    if len(parts) == 1:
        return parts[0]
    structures, targets = Structures.concatenate([d.structures for d in parts]), [d.targets for d in parts]
    return LabelledData(structures, Targets.concatenate(targets), tuple(f for d in parts for f in d.findings))


def _read_file(
    index: str | int | slice, keys: Keys | None, progress: Progress | None, each: Each | None, path: Path, called: str
) -> LabelledData:
    file = structure_files.read_file(path, index, progress, called, each)
    data = from_frames(file.frames, file.names, str(file.path), keys)
    return replace(data, findings=(*file.findings, *data.findings))


def read_frames(path: str | os.PathLike[str], index: str | int | slice = ":") -> tuple[list[Atoms], list[int]]:
    """Read Atoms and their numbers in the file, counted from 0."""
    file = structure_files.read_file(path, index)
    for finding in file.findings:
        warn_of(finding)
    return [frame.to_atoms() for frame in file.frames], file.numbers


def read_unlabelled(path: str | os.PathLike[str]) -> tuple[list[Atoms], Structures]:
    """Read Atoms, with all that is in the file, and their Structures without labels."""
    frames, numbers = read_frames(path)
    return frames, structures_from_ase(frames, [f"{Path(path).name} frame {i}" for i in numbers])


def structures_from_ase(atoms: Iterable[Atoms], names: Sequence[str] | None = None) -> Structures:
    """Convert Atoms to Structures, without any labels.

    Raises:
        UserError: no frames, a frame without atoms, an atom without an element, a cell that spans no volume.
    """
    frames = [Frame(a.numbers, a.positions, a.cell.array, a.pbc, a.info, a.arrays) for a in atoms]
    return _structures(frames, names)


def _structures(frames: Sequence[Frame], names: Sequence[str] | None) -> Structures:
    names = tuple(names) if names is not None else tuple(f"frame {i}" for i in range(len(frames)))
    if not frames:
        raise UserError("There are no structures: the list of atoms is empty.")
    for name, frame in zip(names, frames, strict=True):
        if len(frame) == 0:
            raise UserError(f"{name}: holds no atoms; remove this frame.")
        if (frame.numbers <= 0).any():
            atom = int((frame.numbers <= 0).argmax())
            symbol = chemical_symbol(int(frame.numbers[atom]))
            raise UserError(f"{name}: atom {atom} is '{symbol}', which is no element.")
    counts = [len(frame) for frame in frames]
    structures = Structures(
        torch.as_tensor(np.concatenate([frame.positions for frame in frames]), dtype=torch.float64),
        torch.as_tensor(np.stack([frame.cell for frame in frames]), dtype=torch.float64),
        torch.as_tensor(np.stack([frame.pbc for frame in frames])),
        torch.as_tensor(np.concatenate([frame.numbers for frame in frames]), dtype=torch.long),
        torch.from_numpy(np.repeat(np.arange(len(frames)), counts)),
        names,
        magnetic_moments=_electronic(frames, names, "initial_magmoms"),
        initial_charges=_electronic(frames, names, "initial_charges"),
    )
    stated = [total_charge(frame, name) for frame, name in zip(frames, names, strict=True)]
    if not any(charge is not None for charge in stated):
        return structures
    implied = structures.charges.tolist()
    charges = [total if charge is None else charge for charge, total in zip(stated, implied, strict=True)]
    return replace(structures, charges=torch.tensor(charges, dtype=torch.float64))


def _electronic(frames: Sequence[Frame], names: Sequence[str], key: str) -> torch.Tensor | None:
    """Initial magnetic moments or charges, zero where a frame has none; None where no frame has any but zeros."""
    if not any(key in frame.arrays for frame in frames):
        return None
    given = [np.asarray(frame.arrays.get(key, np.zeros(len(frame)))) for frame in frames]
    for name, frame, value in zip(names, frames, given, strict=True):
        shapes = [(len(frame),), (len(frame), 3)] if key == "initial_magmoms" else [(len(frame),)]
        if value.dtype.kind not in "if" or value.shape not in shapes or not np.isfinite(value).all():
            raise UserError(
                f"{name}: `{key}` must be one finite number for each atom; got {value.dtype} of shape {value.shape}."
            )
    if not any(value.any() for value in given):
        return None
    if any(value.ndim == 2 for value in given):  # a moment that is one number points along z
        given = [value if value.ndim == 2 else np.stack([0 * value, 0 * value, value], 1) for value in given]
    return torch.as_tensor(np.concatenate(given), dtype=torch.float64)


def from_ase(
    atoms: Iterable[Atoms], names: Sequence[str] | None = None, keys: Keys | None = None
) -> tuple[Structures, Targets]:
    """Convert Atoms to Structures and the Targets found in their calculator results, info and arrays; computes nothing.

    Args:
        names: how error messages call each frame; 'frame 0', 'frame 1', ... if not given.
        keys: see `read`.

    Raises:
        UserError: see `read`.
    """
    data = from_frames([Frame.from_atoms(frame) for frame in atoms], names, keys=keys)
    for finding in data.findings:
        if finding.severity != "note" and finding.kind not in UNNAMED:
            warn_of(finding)
    return data.structures, data.targets


def from_frames(
    frames: Sequence[Frame],
    names: Sequence[str] | None = None,
    path: str = "The data",
    keys: Keys | None = None,
    as_written: bool = False,
) -> LabelledData:
    """Convert frames of one file to Structures and Targets.

    Args:
        path: how messages call the file.
        as_written: whether exact zeros are labels in any case (gpmlp.io.zero_labels), as in files of our own.
    """
    structures = _structures(frames, names)
    names = structures.names
    table = label_names.LabelTable(frames, names)
    given = {kind: (name,) if isinstance(name, str) else tuple(name) for kind, name in (keys or {}).items()}
    of_charges = charge_labels.choose_keys(table, path, given)
    given = {kind: keys for kind, keys in given.items() if kind not in charge_labels.KINDS}
    chosen, findings = label_names.choose_keys(table, path, given)
    collected = [labels.labels_of(frame, name, chosen) for frame, name in zip(frames, names, strict=True)]
    findings += label_names.weights(table, path, labels.READ_NAMES) + label_names.other_units(table, path)
    findings += _grouped(collected, names) + list(of_charges.findings)

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
        torch.as_tensor(of_charges.charges(frames), dtype=torch.float64),
        torch.as_tensor(of_charges.dipoles(frames), dtype=torch.float64),
    )
    if not as_written:
        targets, lone = _mark_lone_atoms(structures, targets)
        findings += lone
        targets, zeros = without_false_zeros(frames, structures, targets)
        findings += zeros
    return LabelledData(structures, targets, tuple(findings))


def _mark_lone_atoms(structures: Structures, targets: Targets) -> tuple[Targets, list[Finding]]:
    """Mark single atoms without an image of theirs near as isolated ones, unless their config_type is something else; say which."""
    lengths = torch.where(structures.periodic, structures.cells.norm(dim=2), torch.inf).amin(1)
    alone = ((structures.counts == 1) & (lengths > ALONE) & ~targets.energies.isnan()).nonzero().flatten().tolist()
    alone = [i for i in alone if LONE.search(targets.config_types[i]) and not is_isolated_atom(targets.config_types[i])]
    if not alone:
        return targets, []
    labels = list(targets.config_types)
    for i in alone:
        labels[i] = ISOLATED
    names = tuple(structures.names[i] for i in alone)
    text = "a single atom without neighbours is taken as an isolated atom (config_type=isolated_atom)."
    advice = "Give it a config_type of its own if it is to be learned like other structures."
    finding = Finding("lone-atoms", "note", text, names, {"frames": float(len(names))}, advice)
    return replace(targets, config_types=tuple(labels)), [finding]


def _grouped(collected: Sequence[labels.FrameLabels], names: Sequence[str]) -> list[Finding]:
    """Gather equal remarks, so that a thousand frames give one finding; its number is the largest."""
    groups: dict[tuple[str, Severity, str, str], list[tuple[str, float]]] = {}
    for label, name in zip(collected, names, strict=True):
        for remark in label.remarks:
            key = (remark.kind, remark.severity, remark.text, remark.unit)
            groups.setdefault(key, []).append((name, remark.number))
    findings = []
    for (kind, severity, text, unit), members in groups.items():
        members = sorted(members, key=lambda member: -member[1]) if unit else members
        numbers = {unit: members[0][1]} if unit else {}
        findings.append(
            Finding(kind, severity, text.format(members[0][1]), tuple(name for name, _ in members), numbers)
        )
    return findings


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
            magmoms=None if cpu.magnetic_moments is None else cpu.magnetic_moments[rows].double().numpy(),
            charges=None if cpu.initial_charges is None else cpu.initial_charges[rows].double().numpy(),
        )
        if s in cpu.stated_charges:
            set_charge(frame, cpu.stated_charges[s])
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
    energy, forces, (xx, yy, zz) = float(values.energies[s]), numbers(values.forces[atoms]), values.stresses[s].tolist()
    if not math.isnan(energy):
        results |= {"energy": energy, "free_energy": energy}
    if isinstance(values, Prediction):
        results["energies"] = numbers(values.atom_energies[atoms])
        if values.charges is not None:
            results["charges"] = numbers(values.charges[atoms])
    if forces.size and not (math.isnan(forces.item(0)) and np.isnan(forces).all()):
        results["forces"] = forces
    if isinstance(values, Targets):
        of_charges = {"charges": numbers(values.charges[atoms]), "dipole": numbers(values.dipoles[s])}
        results |= {name: value for name, value in of_charges.items() if not np.isnan(value).any()}
    if not any(map(math.isnan, (*xx, *yy, *zz))):
        sheared = (yy[2] + zz[1]) / 2, (xx[2] + zz[0]) / 2, (xx[1] + yy[0]) / 2
        results["stress"] = np.array([xx[0], yy[1], zz[2], *sheared])
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
    if prediction.sampled_forces_covariance is not None:
        results["force_std"] = numbers(prediction.sampled_forces_covariance.diagonal().total[atoms].sum(1).sqrt())
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
    return extxyz.parse_frame(text).to_atoms()


def iterate_frames(path: Path, at_most: int, most_atoms: int) -> Iterator[Atoms]:
    """Frames of an extended XYZ trajectory at even distances, the last first; one that is cut off is left out.

    Args:
        at_most: frames; most_atoms: of all frames together, but for the first.
    """
    if not path.exists():
        return
    layout = extxyz.scan_frames(path, closed=True)
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
