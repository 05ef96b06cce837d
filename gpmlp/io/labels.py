"""Labels of one frame: its reference energy, forces and stress, their noises and its config_type, checked.

Units are eV, eV/A and eV/A^3; a virial is -V sigma in eV, as QUIP, MACE (`virials`), NEP, dpdata and metatrain have it. Noises are
energy_noise (eV/atom), force_noise (eV/A; also of atoms) and stress_noise (eV/A^3), or as gap_fit has them energy_sigma (eV, of the
total energy), force_sigma, force_atom_sigma and force_component_sigma (eV/A; of atoms and components) and virial_sigma (eV).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpmlp.core.errors import UserError
from gpmlp.core.findings import Severity
from gpmlp.core.units import VOIGT_INDEX
from gpmlp.io.frames import Frame
from gpmlp.io.label_names import SAME_ENERGY, LabelKeys, Place, is_unknown

NOISES = ("energy_noise", "force_noise", "stress_noise")
SIGMAS = ("energy_sigma", "force_sigma", "force_atom_sigma", "force_component_sigma", "virial_sigma", "stress_sigma")
MASK = "force_mask"  # of gap_fit: true where the force is not to be fitted
ASYMMETRY = 1e-2  # of the largest component; codes print more digits than that


@dataclass(frozen=True)
class Remark:
    """What may be wrong with a label: kind and severity of a Finding, its text with {} for the number, and the number."""

    kind: str
    severity: Severity
    text: str
    number: float = float("nan")
    unit: str = ""


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
        remarks: on what may be wrong.
    """

    energy: float
    forces: np.ndarray
    stress: np.ndarray
    energy_noise: float
    force_noise: np.ndarray
    stress_noise: float
    config_type: str
    remarks: tuple[Remark, ...]


def labels_of(frame: Frame, name: str, keys: LabelKeys) -> FrameLabels:
    """Collect and check the labels of one frame.

    Raises:
        UserError: a label of the wrong shape, infinite, partly NaN, or a noise that is not positive; names the frame.
    """
    remarks: list[Remark] = []
    if frame.stale:
        text = "its calculator's results belong to other positions or another cell and are ignored."
        remarks.append(Remark("stale-results", "warning", text))
    info, arrays = _noise_keys(frame.info), _noise_keys(frame.arrays)
    return FrameLabels(
        energy=_energy(frame, name, keys, remarks),
        forces=_forces(frame, name, _first(frame, keys.forces), arrays, remarks),
        stress=_stress(frame, name, keys, remarks),
        energy_noise=_energy_noise(frame, name, info),
        force_noise=_force_noise(frame, name, info, arrays),
        stress_noise=_stress_noise(frame, name, info),
        config_type=str(frame.info.get("config_type", "")),
        remarks=tuple(remarks),
    )


READ_NAMES = frozenset((*NOISES, *SIGMAS, MASK))


def _noise_keys(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Entries with names of noises and masks, in any case."""
    return {key.lower(): value for key, value in mapping.items() if isinstance(key, str) and key.lower() in READ_NAMES}


def _first(frame: Frame, places: tuple[Place, ...]) -> Any:
    """What the first of the places holds that the frame has a number in, or else NaN; None if it has none of them."""
    values = [value for room, key in places if (value := getattr(frame, room).get(key)) is not None]
    if len(values) > 1:
        values.sort(key=is_unknown)
    return values[0] if values else None


def _array(name: str, key: str, value: Any, *shapes: tuple[int, ...]) -> np.ndarray:
    """Convert a label to an array of one of the shapes, naming the frame if that cannot be."""
    wanted = " or ".join(str(shape) if shape else "one number" for shape in shapes)
    try:
        if isinstance(value, (bool, np.bool_)):  # a name without a value, in extended XYZ
            raise ValueError
        array = np.asarray(value, dtype=float)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: `{key}` must hold numbers, {wanted}; got {str(value)[:60]!r}.") from error
    if shapes[0] == () and array.size == 1:
        array = array.reshape(())
    if array.shape not in shapes:
        raise UserError(f"{name}: `{key}` has the wrong shape: required {wanted}, got {array.shape}.")
    return array


def _energy(frame: Frame, name: str, keys: LabelKeys, remarks: list[Remark]) -> float:
    """The force-consistent energy: free_energy where there is one, else energy."""
    places = [place for place in keys.energy if getattr(frame, place[0]).get(place[1]) is not None]
    if not places:
        return float("nan")
    values = [float(_array(name, "energy", getattr(frame, room)[key], ())) for room, key in places]
    known = [i for i, value in enumerate(values) if not np.isnan(value)] or [0]
    places, values = [places[i] for i in known], [values[i] for i in known]
    energy = values[0]
    if np.isinf(energy):
        raise UserError(f"{name}: the energy is infinite; correct it or remove the frame.")
    for (_, key), other in zip(places[1:], values[1:], strict=True):
        difference = abs(energy - other) / max(len(frame), 1)
        if difference > SAME_ENERGY:
            first = places[0][1]
            same = f"`{key}` of the calculator and the plain key" if key == first else f"`{first}` and `{key}`"
            why = ", because forces belong to it" if "free" in first.lower() else ""
            text = f"{same} differ by {{:.3g}} eV/atom; the first is used{why}"
            remarks.append(Remark("two-energies-of-a-frame", "warning", text, difference, "difference_eV_per_atom"))
    return energy


def _forces(frame: Frame, name: str, value: Any, arrays: dict, remarks: list[Remark]) -> np.ndarray:
    """Forces; an atom whose three components are NaN is not known, a partly NaN or infinite one is an error."""
    if value is None:
        return np.full((len(frame), 3), np.nan)
    forces = _array(name, "forces", value, (len(frame), 3))
    unknown = ~np.isfinite(forces)
    bad = np.isinf(forces).any(axis=1) | (unknown.any(axis=1) & ~unknown.all(axis=1)) if unknown.any() else unknown
    if bad.any():
        atom = int(bad.argmax())
        raise UserError(
            f"{name}: the force on atom {atom} is {forces[atom].tolist()}: NaN or infinite; "
            "correct it, or set all three components to NaN if it is not known."
        )
    masked = ~unknown & per_component(arrays[MASK], len(frame)) if MASK in arrays else None
    if masked is not None and masked.any():
        forces = np.where(masked, np.nan, forces)
        text = f"forces on {{:.0f}} atoms that `{MASK}` masks are left out"
        remarks.append(Remark("masked-forces", "note", text, float(masked.any(axis=1).sum()), "atoms"))
    return forces


def per_component(flags: Any, n: int) -> np.ndarray:
    """Truth values of atoms, or of their components, as (atoms, 3); False where they are of another shape."""
    array = np.asarray(flags)
    if array.dtype.kind not in "biuf" or array.shape not in ((n,), (n, 3)):
        return np.zeros((n, 3), dtype=bool)
    return np.broadcast_to(array.astype(bool) if array.ndim == 2 else array.astype(bool)[:, None], (n, 3))


def _tensor(name: str, key: str, value: Any) -> np.ndarray:
    """A symmetric (3, 3) tensor from 9, 3 x 3 or (Voigt xx yy zz yz xz xy) 6 numbers."""
    array = _array(name, key, value, (3, 3), (9,), (6,))
    array = array[np.array(VOIGT_INDEX)] if array.shape == (6,) else array.reshape(3, 3)
    if not np.isfinite(array).all():
        if np.isnan(array).all():
            return array
        raise UserError(f"{name}: `{key}` is partly NaN or infinite: {array.tolist()}; correct or remove it.")
    if np.abs(array - array.T).max() > ASYMMETRY * np.abs(array).max():
        raise UserError(f"{name}: `{key}` must be symmetric; got {array.tolist()}.")
    return 0.5 * (array + array.T)


def _stress(frame: Frame, name: str, keys: LabelKeys, remarks: list[Remark]) -> np.ndarray:
    """Stress, or -virial / volume where only a virial is given."""
    unknown = np.full((3, 3), np.nan)
    stress, virial = _first(frame, keys.stress), _first(frame, keys.virial)
    if stress is None and virial is None:
        return unknown
    given = _tensor(name, "stress", stress) if stress is not None else unknown
    from_virial = -_tensor(name, "virial", virial) if virial is not None else unknown
    if np.isnan(given[0, 0]) and np.isnan(from_virial[0, 0]):  # a tensor is known or unknown as a whole
        return unknown
    volume = frame.volume
    if volume < 1e-6:
        if not np.nan_to_num(given).any() and not np.nan_to_num(from_virial).any():
            text = "a stress of exactly 0 of a frame without a periodic cell is no label and is left out"
            remarks.append(Remark("zero-stress", "warning", text))
            return unknown
        raise UserError(
            f"{name}: has a stress but no periodic cell (pbc {' '.join('FT'[int(p)] for p in frame.pbc)}, "
            f"volume {abs(np.linalg.det(frame.cell)):.3g} A^3); set pbc and the cell, or remove the stress."
        )
    if virial is None or np.isnan(from_virial[0, 0]):
        return given
    from_virial = from_virial / volume
    if np.isnan(given[0, 0]):
        return from_virial
    difference = float(np.abs(given - from_virial).max())
    if difference > 1e-6 + 1e-4 * np.abs(given).max():
        text = "`stress` and -`virial`/volume differ by {:.3g} eV/A^3; `stress` is used"
        remarks.append(Remark("stress-against-virial", "warning", text, difference, "difference_eV_per_A3"))
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


def _energy_noise(frame: Frame, name: str, info: dict) -> float:
    if "energy_noise" in info or not info:
        return float(_noise(name, "energy_noise", info.get("energy_noise"), ()))
    return float(_noise(name, "energy_sigma", info.get("energy_sigma"), ())) / max(len(frame), 1)


def _stress_noise(frame: Frame, name: str, info: dict) -> float:
    for key in ("stress_noise", "stress_sigma"):
        if key in info:
            return float(_noise(name, key, info[key], ()))
    if "virial_sigma" not in info or frame.volume < 1e-6:
        return float("nan")
    return float(_noise(name, "virial_sigma", info["virial_sigma"], ())) / frame.volume


def _force_noise(frame: Frame, name: str, info: dict, arrays: dict) -> np.ndarray:
    n = len(frame)
    for key in ("force_noise", "force_component_sigma", "force_atom_sigma"):
        if key in arrays:
            noise = _noise(name, key, arrays[key], (n, 3), (n,))
            return np.broadcast_to(noise if noise.ndim == 2 else noise[:, None], (n, 3))
    for key in ("force_noise", "force_sigma"):
        if key in info:
            return np.broadcast_to(_noise(name, key, info[key], ()), (n, 3))
    return np.full((n, 3), np.nan)
