"""ReportData is everything the uncertainty report shows, as plain arrays; what was not computed is None, NaN or empty."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpmlp.core import errors, units

KINDS = ("energies", "forces", "stresses")
UNITS = {"energies": "meV/atom", "forces": "meV/Å", "stresses": "GPa"}
CAUSES = ("noise", "data", "misspecification", "inducing")
NO_TYPE = "(no config_type)"
SCALES = {"energies": 1e3, "forces": 1e3, "stresses": 1 / units.GPA}
COMPONENTS = {"energies": ("",), "forces": ("x", "y", "z"), "stresses": ("xx", "yy", "zz", "yz", "xz", "xy")}


@dataclass(frozen=True, eq=False)
class Labelled:
    """The labelled components of one kind, flat, in the units of the page (UNITS).

    Attributes:
        reference, predicted: (k,); energies are per atom, less a fit of the composition.
        std: (k,) NaN where unknown.
        structure: (k,) index of the structure; row: (k,) index of the atom (forces) or of the structure.
        component: (k,) index into COMPONENTS.
    """

    kind: str
    reference: np.ndarray
    predicted: np.ndarray
    std: np.ndarray
    structure: np.ndarray
    row: np.ndarray
    component: np.ndarray

    def __len__(self) -> int:
        return len(self.reference)

    @property
    def error(self) -> np.ndarray:
        return self.predicted - self.reference

    @property
    def scaled(self) -> np.ndarray:
        """Errors in units of their standard deviation; NaN where that is unknown or zero."""
        return self.error / np.where(self.std > 0, self.std, np.nan)


@dataclass(frozen=True, eq=False)
class ReportData:
    """What the report shows; eV and angstrom.

    Attributes:
        names, config_type, n_atoms: per structure; config_type '' where none was given.
        energy_reference, energy_predicted: (structures,) eV, total; NaN = no label.
        energy_std: (structures,) eV, calibrated; energy_variance: cause -> (structures,) eV^2.
        trained_on: whether the model has learned from these very labels; held_out: how many of the structures are those that its
            calibration was learned from.
        structure, species, atom: (atoms,) index of the structure, Z, index inside the structure.
        force_reference, force_predicted, force_std: (atoms, 3) eV/A; force_variance: cause -> (atoms, 3).
            Causes: 'noise' of the labels, 'data' (what they have not fixed), 'misspecification' (what the model class
            cannot express), 'inducing' (what the inducing set cannot represent).
        local_energy_std: (atoms,) eV.
        novelty: (atoms,) distance / threshold; > 1 is outside the trust region, inf an unseen species.
        positions: (atoms, 3) A; cells: (structures, 3, 3) A, rows; periodic: (structures, 3) bool.
        cutoff: A.
        stress_reference, stress_predicted, stress_std: (structures, 6) eV/A^3, xx yy zz yz xz xy.
        scores: kind -> {coverage_50, ... (of conformal intervals; missing where there are none), miscalibration_area, nll, crps,
            sharpness, spearman_of_structures | _atoms | _components (numbers.ORDERED), ...}; crps and sharpness in eV/atom, eV/A
            or eV/A^3 (the page converts them), all others without unit.
        rivals: what is scored -> {number: value}, or None.
        model: FitReport.as_dict() and recipe, evidence_trace, provenance, calibration; each may be missing.
        dimers: dicts of pair, r (A), energy (eV, less that of the free atoms), std, shortest (A; the shortest distance in the
            training data).
        citations: BibTeX entries.
    """

    title: str
    model_name: str
    data_name: str
    names: tuple[str, ...]
    n_atoms: np.ndarray
    energy_reference: np.ndarray
    energy_predicted: np.ndarray
    structure: np.ndarray
    species: np.ndarray
    atom: np.ndarray
    force_reference: np.ndarray
    force_predicted: np.ndarray
    config_type: tuple[str, ...] = ()
    trained_on: bool = False
    held_out: int = 0
    energy_std: np.ndarray | None = None
    energy_variance: dict[str, np.ndarray] = field(default_factory=dict)
    force_std: np.ndarray | None = None
    force_variance: dict[str, np.ndarray] = field(default_factory=dict)
    local_energy_std: np.ndarray | None = None
    novelty: np.ndarray | None = None
    positions: np.ndarray | None = None
    cells: np.ndarray | None = None
    periodic: np.ndarray | None = None
    cutoff: float | None = None
    stress_reference: np.ndarray | None = None
    stress_predicted: np.ndarray | None = None
    stress_std: np.ndarray | None = None
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    rivals: dict[str, dict[str, float]] | None = None
    model: dict[str, Any] = field(default_factory=dict)
    dimers: tuple[dict[str, Any], ...] = ()
    citations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n, atoms = len(self.names), len(self.structure)
        if not self.config_type:
            object.__setattr__(self, "config_type", ("",) * n)
        if len(self.config_type) != n:
            raise errors.UserError(f"`config_type` must hold {n} labels; got {len(self.config_type)}.")
        shapes = {
            (n,): ("n_atoms", "energy_reference", "energy_predicted", "energy_std"),
            (atoms,): ("species", "atom", "local_energy_std", "novelty"),
            (atoms, 3): ("force_reference", "force_predicted", "force_std", "positions"),
            (n, 3, 3): ("cells",),
            (n, 3): ("periodic",),
            (n, 6): ("stress_reference", "stress_predicted", "stress_std"),
        }
        for required, names in shapes.items():
            for name in names:
                _shape(name, getattr(self, name), required)
        for cause, values in self.energy_variance.items():
            _shape(f"energy_variance[{cause!r}]", values, (n,))
        for cause, values in self.force_variance.items():
            _shape(f"force_variance[{cause!r}]", values, (atoms, 3))
        if atoms and not (0 <= np.min(self.structure) and np.max(self.structure) < n):
            raise errors.UserError(f"`structure` must hold indices of structures, 0 to {n - 1}.")

    def labelled(self, kind: str) -> Labelled:
        """The components of one of KINDS that have a label and a finite prediction."""
        reference, predicted, std = getattr(self, f"_{kind}")()
        known = np.isfinite(reference) & np.isfinite(predicted)
        rows, components = np.nonzero(known)
        structure = np.asarray(self.structure)[rows] if kind == "forces" else rows
        return Labelled(kind, reference[known], predicted[known], std[known], structure, rows, components)

    def _energies(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        per_atom = 1e3 / np.maximum(self.n_atoms, 1)
        reference, predicted = self.energy_reference * per_atom, self.energy_predicted * per_atom
        offset = _composition_fit(self, reference)
        return (reference - offset)[:, None], (predicted - offset)[:, None], _std(self.energy_std, per_atom)

    def _forces(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        std = np.full_like(self.force_predicted, np.nan) if self.force_std is None else self.force_std
        return 1e3 * self.force_reference, 1e3 * self.force_predicted, 1e3 * std

    def _stresses(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        none = np.full((len(self.names), 6), np.nan)
        values = (self.stress_reference, self.stress_predicted, self.stress_std)
        return tuple(none if value is None else value / units.GPA for value in values)

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that occur, sorted."""
        return tuple(int(z) for z in np.unique(self.species))

    @property
    def types(self) -> np.ndarray:
        """(structures,) config_type, NO_TYPE where none was given."""
        return np.array([t or NO_TYPE for t in self.config_type], dtype=object)

    @property
    def atom_error(self) -> np.ndarray:
        """(atoms,) root mean square force error over the three components, eV/A; NaN without a label."""
        return np.sqrt(np.mean((self.force_predicted - self.force_reference) ** 2, axis=1))

    @property
    def atom_std(self) -> np.ndarray:
        """(atoms,) root mean square standard deviation of the three force components, eV/A."""
        if self.force_std is None:
            return np.full(len(self.structure), np.nan)
        return np.sqrt(np.mean(self.force_std**2, axis=1))

    @property
    def shares(self) -> dict[str, np.ndarray]:
        """cause -> (atoms,) share of the force variance of each atom."""
        sums = {cause: self.force_variance[cause].sum(axis=1) for cause in self.causes}
        total = sum(sums.values())
        return {cause: values / np.where(total > 0, total, np.nan) for cause, values in sums.items()}

    @property
    def causes(self) -> tuple[str, ...]:
        """Causes for which force variances are known, in the order in which they are stacked."""
        known = [cause for cause in CAUSES if cause in self.force_variance]
        return tuple(known + [cause for cause in self.force_variance if cause not in CAUSES])


def _std(std: np.ndarray | None, scale: np.ndarray) -> np.ndarray:
    return (np.full_like(scale, np.nan) if std is None else std * scale)[:, None]


def _composition_fit(data: ReportData, reference: np.ndarray) -> np.ndarray:
    """(structures,) least-squares energy per atom of the composition, so that energies of unlike formulas fit one plot."""
    species, where = np.unique(data.species, return_inverse=True)
    fractions = np.zeros((len(data.names), max(len(species), 1)))
    np.add.at(fractions, (np.asarray(data.structure), where), 1.0)
    fractions /= np.maximum(fractions.sum(axis=1, keepdims=True), 1)
    known = np.isfinite(reference)
    if not known.any():
        return np.zeros(len(reference))
    weights = np.linalg.lstsq(fractions[known], reference[known], rcond=1e-10)[0]
    return fractions @ weights


def _shape(name: str, values: np.ndarray | None, required: tuple[int, ...]) -> None:
    if values is not None and np.shape(values) != required:
        raise errors.UserError(f"`{name}` must have shape {required}; got {np.shape(values)}.")
