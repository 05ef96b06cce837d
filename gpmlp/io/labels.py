"""Labels of one ASE Atoms: reference values from the results of a calculator, or from plain keys of info and arrays.

Names of plain keys, in any case: energy, forces (or force), stress, virial (QUIP's sign, -V sigma), each bare or after ref_,
reference_ or dft_. Per-frame noise: energy_noise (eV/atom), force_noise (eV/A; also as an array), stress_noise (eV/A^3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms

from gpmlp.core.errors import UserError
from gpmlp.core.units import VOIGT_INDEX

PREFIXES = ("ref_", "reference_", "dft_", "")
NAMES = {"energies": ("free_energy", "energy"), "forces": ("forces", "force")}
NO_FORCES = frozenset(("positions", "momenta", "velocities", "initial_magmoms", "force_noise"))
SAME_ENERGY = 1e-6  # eV/atom
ASYMMETRY = 1e-2  # of the largest component; codes print more digits than that


@dataclass(frozen=True)
class FrameLabels:
    """Labels of one frame in gpmlp's units; NaN where there is none.

    Attributes:
        energy: eV.
        forces: (atoms, 3) eV/A.
        stress: (3, 3) eV/A^3, positive = tension.
        energy_noise: eV/atom.
        force_noise: (atoms, 3) eV/A.
        stress_noise: eV/A^3.
        config_type: label of the frame, '' if none.
        remarks: on what may be wrong: (text with {} for the number, number).
    """

    energy: float
    forces: np.ndarray
    stress: np.ndarray
    energy_noise: float
    force_noise: np.ndarray
    stress_noise: float
    config_type: str
    remarks: tuple[tuple[str, str], ...]


def labels_of(atoms: Atoms, name: str) -> FrameLabels:
    """Collect and check the labels of one frame.

    Raises:
        UserError: a label of the wrong shape, infinite, partly NaN, or a noise that is not positive; names the frame.
    """
    remarks: list[tuple[str, str]] = []
    results = _calculator_results(atoms, remarks)
    info, arrays = _lower(atoms.info), _lower(atoms.arrays)
    return FrameLabels(
        energy=_energy(atoms, name, results, info, remarks),
        forces=_forces(atoms, name, _first(results, arrays, NAMES["forces"])),
        stress=_stress(atoms, name, results, info, remarks),
        energy_noise=float(_noise(name, "energy_noise", info.get("energy_noise"), ())),
        force_noise=_force_noise(atoms, name, info, arrays),
        stress_noise=float(_noise(name, "stress_noise", info.get("stress_noise"), ())),
        config_type=str(atoms.info.get("config_type", "")),
        remarks=tuple(remarks),
    )


def unrecognised_keys(frames: Sequence[Atoms], kind: str) -> list[str]:
    """Keys that may hold labels of a kind ('energies', 'forces') under a name that is not recognised: numbers of its shape."""
    keys: dict[str, None] = {}
    for frame in frames:
        places = frame.info if kind == "energies" else frame.arrays
        for key, value in places.items():
            name, array = str(key).lower(), np.asarray(value)
            recognised = any(name == prefix + k for prefix in PREFIXES for k in NAMES[kind])
            if recognised or array.dtype.kind != "f" or name.endswith("_noise") or name in NO_FORCES:
                continue
            if array.shape == (() if kind == "energies" else (len(frame), 3)):
                keys[str(key)] = None
    return list(keys)


def _lower(mapping: dict[str, Any]) -> dict[str, Any]:
    return {str(key).lower(): value for key, value in mapping.items()}


def _calculator_results(atoms: Atoms, remarks: list[tuple[str, str]]) -> dict[str, Any]:
    """Results that the calculator already holds for these very atoms; nothing is computed."""
    results = getattr(atoms.calc, "results", None)
    if not results:
        return {}
    if atoms.calc.check_state(atoms):
        remarks.append(("its calculator's results belong to other positions or cell and are ignored{}", ""))
        return {}
    return results


def _first(results: dict[str, Any], plain: dict[str, Any], kinds: tuple[str, ...]) -> Any:
    """The result of the calculator, else the first plain key that is there; None if none is."""
    for kind in kinds:
        if results.get(kind) is not None:
            return results[kind]
    for prefix in PREFIXES:
        for kind in kinds:
            if prefix + kind in plain:
                return plain[prefix + kind]
    return None


def _array(name: str, key: str, value: Any, *shapes: tuple[int, ...]) -> np.ndarray:
    """Convert a label to an array of one of the shapes, naming the frame if that cannot be."""
    wanted = " or ".join(str(shape) if shape else "one number" for shape in shapes)
    try:
        array = np.asarray(value, dtype=float)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: `{key}` must hold numbers, {wanted}; got {str(value)[:60]!r}.") from error
    if shapes[0] == () and array.size == 1:
        array = array.reshape(())
    if array.shape not in shapes:
        raise UserError(f"{name}: `{key}` has the wrong shape: required {wanted}, got {array.shape}.")
    return array


def _energy(atoms: Atoms, name: str, results: dict, info: dict, remarks: list[tuple[str, str]]) -> float:
    """The force-consistent energy: free_energy where there is one, else energy."""
    value = _first(results, info, NAMES["energies"])
    if value is None:
        return float("nan")
    energy = float(_array(name, "energy", value, ()))
    if np.isinf(energy):
        raise UserError(f"{name}: the energy is infinite; correct it or remove the frame.")
    extrapolated = _first(results, {}, ("energy",))
    for other, text in (
        (
            extrapolated,
            "`free_energy` and `energy` differ by {} eV/atom; the first is used, because forces belong to it",
        ),
        (
            _first({}, info, ("energy",)),
            "`energy` of the calculator and the plain key differ by {} eV/atom; the first is used",
        ),
    ):
        if other is not None:
            difference = abs(energy - float(_array(name, "energy", other, ()))) / len(atoms)
            if difference > SAME_ENERGY:
                remarks.append((text, f"{difference:.3g}"))
    return energy


def _forces(atoms: Atoms, name: str, value: Any) -> np.ndarray:
    """Forces; an atom whose three components are NaN is not known, a partly NaN or infinite one is an error."""
    if value is None:
        return np.full((len(atoms), 3), np.nan)
    forces = _array(name, "forces", value, (len(atoms), 3))
    unknown = np.isnan(forces)
    bad = np.isinf(forces).any(axis=1) | (unknown.any(axis=1) & ~unknown.all(axis=1))
    if bad.any():
        atom = int(bad.argmax())
        raise UserError(
            f"{name}: the force on atom {atom} is {forces[atom].tolist()}: NaN or infinite; "
            "correct it, or set all three components to NaN if it is not known."
        )
    return forces


def _tensor(name: str, key: str, value: Any) -> np.ndarray:
    """A symmetric (3, 3) tensor from 9, 3 x 3 or (Voigt xx yy zz yz xz xy) 6 numbers."""
    array = _array(name, key, value, (3, 3), (9,), (6,))
    array = array[np.array(VOIGT_INDEX)] if array.shape == (6,) else array.reshape(3, 3)
    if np.isnan(array).all():
        return array
    if not np.isfinite(array).all():
        raise UserError(f"{name}: `{key}` is partly NaN or infinite: {array.tolist()}; correct or remove it.")
    if np.abs(array - array.T).max() > ASYMMETRY * np.abs(array).max():
        raise UserError(f"{name}: `{key}` must be symmetric; got {array.tolist()}.")
    return 0.5 * (array + array.T)


def _stress(atoms: Atoms, name: str, results: dict, info: dict, remarks: list[tuple[str, str]]) -> np.ndarray:
    """Stress, or -virial / volume where only a virial is given (QUIP's sign)."""
    unknown = np.full((3, 3), np.nan)
    stress, virial = _first(results, info, ("stress",)), _first({}, info, ("virial",))
    if stress is None and virial is None:
        return unknown
    given = _tensor(name, "stress", stress) if stress is not None else unknown
    from_virial = -_tensor(name, "virial", virial) if virial is not None else unknown
    if np.isnan(given).all() and np.isnan(from_virial).all():
        return unknown
    volume = abs(np.linalg.det(atoms.cell.array))
    if not atoms.pbc.any() or volume < 1e-6:
        raise UserError(
            f"{name}: has a stress but no periodic cell (pbc {' '.join('FT'[int(p)] for p in atoms.pbc)}, "
            f"volume {volume:.3g} A^3); set pbc and the cell, or remove the stress."
        )
    from_virial = from_virial / volume
    if np.isnan(given).all():
        return from_virial
    difference = np.abs(given - from_virial).max()
    if difference > 1e-6 + 1e-4 * np.abs(given).max():
        remarks.append(("`stress` and -`virial`/volume differ by {} eV/A^3; `stress` is used", f"{difference:.3g}"))
    return given


def _noise(name: str, key: str, value: Any, *shapes: tuple[int, ...]) -> np.ndarray:
    """A standard deviation given with a frame; NaN if none is."""
    if value is None:
        return np.array(np.nan)
    noise = _array(name, key, value, *shapes)
    if ((noise <= 0) | np.isinf(noise)).any():
        worst = float(noise[(noise <= 0) | np.isinf(noise)].flat[0])
        raise UserError(f"{name}: `{key}` must be positive and finite (or NaN for the model's own); got {worst}.")
    return noise


def _force_noise(atoms: Atoms, name: str, info: dict, arrays: dict) -> np.ndarray:
    n = len(atoms)
    if "force_noise" in arrays:
        noise = _noise(name, "force_noise", arrays["force_noise"], (n, 3), (n,))
        return np.broadcast_to(noise if noise.ndim == 2 else noise[:, None], (n, 3))
    return np.broadcast_to(_noise(name, "force_noise", info.get("force_noise"), ()), (n, 3))
