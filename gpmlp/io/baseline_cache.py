"""What baseline calculators say of structures, kept in a folder beside the data, so that it is computed once.

Each file holds points that were computed together and is named by the SHA-256 of its bytes: it appears whole (files.atomic_write), is
never changed, and what does not fit its name is not read. Several processes may write at the same time.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from gpmlp.core.errors import DataWarning, UserError
from gpmlp.core.structures import Structures
from gpmlp.io.files import atomic_write
from gpmlp.potential.baseline import Baseline
from gpmlp.potential.calculator_energies import COMPUTED, CalculatorEnergies, CalculatorPoint, structure_hashes

FOLDER = "gpmlp-baseline"  # beside the data
FLUSH_S = 30.0  # between two files, of work that an interruption costs
Progress = Callable[[str, float, float, str], None]


def compute_baselines(
    baselines: Iterable[Baseline], structures: Structures, data: Path, progress: Progress | None = None
) -> None:
    """Have baseline calculators compute structures, as far as the cache beside a file of data does not know them, and keep the new points
    there.

    Args:
        progress: called as progress("baseline", done, total, note).

    Raises:
        UserError: a calculator failed; what was computed is kept.
    """
    for baseline in baselines:
        if isinstance(baseline, CalculatorEnergies):
            _compute(baseline, structures, data.resolve().parent / FOLDER, progress)


def _compute(baseline: CalculatorEnergies, structures: Structures, parent: Path, progress: Progress | None) -> None:
    name = re.sub(r"[^\w.+-]", "-", baseline.name)
    folder = parent / f"{name}-{baseline.settings_hash}"
    wanted = {(baseline.settings_hash, digest) for digest in structure_hashes(structures)}
    if not wanted <= COMPUTED.keys():
        COMPUTED.update(((baseline.settings_hash, digest), point) for digest, point in _read_points(folder))
    known = len(wanted & COMPUTED.keys())
    new: dict[str, CalculatorPoint] = {}
    written = time.monotonic()

    def keep(digest: str, point: CalculatorPoint) -> None:
        nonlocal new, written
        new[digest] = point
        if time.monotonic() - written > FLUSH_S:
            _write_points(folder, new)
            new, written = {}, time.monotonic()

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress(
                "baseline", known + done, known + total, f"{known} of {known + total} from {parent.name}" * bool(known)
            )

    try:
        baseline.compute(structures, tell, keep)
    finally:
        _write_points(folder, new)
    tell(len(wanted) - known, len(wanted) - known)


def _write_points(folder: Path, points: Mapping[str, CalculatorPoint]) -> None:
    """One more file; where none can be written, a warning that says so."""
    if not points:
        return
    none = np.full((3, 3), np.nan)
    arrays = {
        "energies": np.array([p.energy for p in points.values()]),
        "forces": np.concatenate([p.forces for p in points.values()]),
        "stresses": np.stack([none if p.stress is None else p.stress for p in points.values()]),
        "counts": np.array([len(p.forces) for p in points.values()], dtype=np.int64),
    }
    data = safetensors.numpy.save(arrays, metadata={"structures": json.dumps(list(points))})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / f"{hashlib.sha256(data).hexdigest()}.safetensors") as file:
            file.write(data)
    except (OSError, UserError) as error:
        why = f"Energies of the baseline are not kept for another time: {str(error).removesuffix('.')}."
        warnings.warn(why, DataWarning, stacklevel=2)


def _read_points(folder: Path) -> Iterable[tuple[str, CalculatorPoint]]:
    """Hash of a structure and its point, of all files that are what their names say."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != path.stem:
                raise ValueError("it is not what was written")
            yield from _points(path, data)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            text = f"{path}: is damaged and not used ({error}); remove it. What it held is computed again."
            warnings.warn(text, DataWarning, stacklevel=2)


def _points(path: Path, data: bytes) -> list[tuple[str, CalculatorPoint]]:
    arrays = safetensors.numpy.load(data)
    with safetensors.safe_open(path, "np") as file:
        names = json.loads(file.metadata()["structures"])
    forces = np.split(arrays["forces"], arrays["counts"].cumsum()[:-1])
    rows = zip(names, arrays["energies"].tolist(), forces, arrays["stresses"], strict=True)
    return [
        (name, CalculatorPoint(energy, f, None if np.isnan(stress).any() else stress))
        for name, energy, f, stress in rows
    ]
