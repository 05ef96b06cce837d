"""Data of the uncertainty report as plain arrays, collected from a potential's evaluation; what was not computed is None, NaN or empty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpmlp.core import errors, units
from gpmlp.core.findings import Finding
from gpmlp.core.quantities import Prediction, Targets, Variance
from gpmlp.core.structures import Structures, chunk_structures
from gpmlp.io import provenance
from gpmlp.io.provenance import DataOverlap
from gpmlp.potential.evaluation import Evaluation
from gpmlp.potential.potential import Potential
from gpmlp.uncertainty.scores import Scores, area_under_roc, spearman_correlation

UNITS = {"energies": "meV/atom", "forces": "meV/Å", "stresses": "GPa"}
CAUSES = ("noise", "data", "misspecification", "inducing")
NO_TYPE = "(no config_type)"
SINGULAR = {"energies": "energy", "forces": "force", "stresses": "stress"}
LEVELS = (50, 68, 90, 95)  # per cent
# what the rank correlation of std and |error| is taken over: the size of one component of a vector is mostly chance
ORDERED = {"energies": "spearman_of_structures", "forces": "spearman_of_atoms", "stresses": "spearman_of_components"}
SCALES = {"energies": 1e3, "forces": 1e3, "stresses": 1 / units.GPA}
WORST = 0.1  # share of atoms whose force error counts as large in the ranking of indicators
DIMER_POINTS = 60
FREE = 300.0  # A, where atoms are out of reach of each other
COMPONENTS = {"energies": ("",), "forces": ("x", "y", "z"), "stresses": ("xx", "yy", "zz", "yz", "xz", "xy")}


@dataclass(frozen=True, eq=False)
class LabelledComponents:
    """The labelled components of one kind, flat, in the units of the page (UNITS).

    Attributes:
        reference, predicted: (k,); energies are per atom, less a fit of the composition.
        std: (k,) NaN where there is none.
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

    @property
    def scored(self) -> np.ndarray:
        """(k,) bool, whether the standard deviation is finite and positive."""
        return np.isfinite(self.std) & (self.std > 0)


@dataclass(frozen=True, eq=False)
class ReportData:
    """What the report shows; eV and angstrom.

    Attributes:
        names, config_type, n_atoms: per structure; config_type '' where none was given.
        energy_reference, energy_predicted: (structures,) eV, total; NaN = no label.
        energy_std: (structures,) eV, calibrated; energy_variance: cause -> (structures,) eV^2.
        trained_on: whether these labels are training data; held_out: how many of the structures its calibration was learned from.
        structure, species, atom: (atoms,) index of the structure, Z, index inside the structure.
        force_reference, force_predicted, force_std: (atoms, 3) eV/A; force_variance: cause -> (atoms, 3).
            Causes: 'noise' of the labels, 'data' (what they have not fixed), 'misspecification' (what the model class
            cannot express), 'inducing' (what the inducing set cannot represent).
        local_energy_std: (atoms,) eV.
        novelty: (atoms,) distance / threshold; > 1 is outside the trust region, inf an unseen species.
        novelty_thresholds: the distances, by symbol of the species, in standard deviations.
        positions: (atoms, 3) A; cells: (structures, 3, 3) A, rows; periodic: (structures, 3) bool.
        cutoff: A.
        stress_reference, stress_predicted, stress_std: (structures, 6) eV/A^3, xx yy zz yz xz xy.
        group_scores: config_type -> the same as `scores`, of its structures.
        scores: kind -> {coverage_50, ... (of conformal intervals; missing where there are none), miscalibration_area, nll, crps,
            sharpness, spearman_of_structures | _atoms | _components (numbers.ORDERED), ...}; crps and sharpness in eV/atom, eV/A
            or eV/A^3 (the page converts them), all others without unit.
        rivals: indicator of large force errors -> {score: value}, or None.
        model: FitReport.as_dict() and recipe, evidence_trace, provenance, calibration; each may be missing.
        charges, charge_reference: (atoms,) e, of a model with charges, and labels of them, NaN = none.
        electrostatic: (structures,) eV, the part of energy_predicted that is of these charges.
        dimers: dicts of pair, r (A), energy (eV, less that of the free atoms), std, shortest (A; the shortest distance in the
            training data) and, of a model with charges, electrostatic (eV, as the energy).
        citations: BibTeX entries.
        findings: about the labels of these structures; those of the fit are in `model`.
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
    findings: tuple[Finding, ...] = ()
    energy_std: np.ndarray | None = None
    energy_variance: dict[str, np.ndarray] = field(default_factory=dict)
    force_std: np.ndarray | None = None
    force_variance: dict[str, np.ndarray] = field(default_factory=dict)
    local_energy_std: np.ndarray | None = None
    novelty: np.ndarray | None = None
    novelty_thresholds: dict[str, float] = field(default_factory=dict)
    positions: np.ndarray | None = None
    cells: np.ndarray | None = None
    periodic: np.ndarray | None = None
    cutoff: float | None = None
    stress_reference: np.ndarray | None = None
    stress_predicted: np.ndarray | None = None
    stress_std: np.ndarray | None = None
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    group_scores: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    rivals: dict[str, dict[str, float]] | None = None
    charges: np.ndarray | None = None
    charge_reference: np.ndarray | None = None
    electrostatic: np.ndarray | None = None
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
            (n,): ("n_atoms", "energy_reference", "energy_predicted", "energy_std", "electrostatic"),
            (atoms,): ("species", "atom", "local_energy_std", "novelty", "charges", "charge_reference"),
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

    def labelled(self, kind: str) -> LabelledComponents:
        """The components of a kind (energies, forces, stresses) that have a label and a finite prediction."""
        reference, predicted, std = getattr(self, f"_{kind}")()
        finite = np.isfinite(reference) & np.isfinite(predicted)
        rows, components = np.nonzero(finite)
        structure = np.asarray(self.structure)[rows] if kind == "forces" else rows
        return LabelledComponents(kind, reference[finite], predicted[finite], std[finite], structure, rows, components)

    def _energies(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        per_atom = 1e3 / np.maximum(self.n_atoms, 1)
        reference, predicted = self.energy_reference * per_atom, self.energy_predicted * per_atom
        offset = _composition_fit(self, reference)
        std = np.full_like(per_atom, np.nan) if self.energy_std is None else self.energy_std * per_atom
        return (reference - offset)[:, None], (predicted - offset)[:, None], std[:, None]

    def _forces(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        std = np.full_like(self.force_predicted, np.nan) if self.force_std is None else self.force_std
        return 1e3 * self.force_reference, 1e3 * self.force_predicted, 1e3 * std

    def _stresses(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        none = np.full((len(self.names), 6), np.nan)
        values = (self.stress_reference, self.stress_predicted, self.stress_std)
        reference, predicted, std = (none if value is None else value / units.GPA for value in values)
        return reference, predicted, std

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
        """Causes of which there are force variances, in the order in which they are stacked."""
        usual = [cause for cause in CAUSES if cause in self.force_variance]
        return tuple(usual + [cause for cause in self.force_variance if cause not in CAUSES])


def _composition_fit(data: ReportData, reference: np.ndarray) -> np.ndarray:
    """(structures,) least-squares energy per atom of the composition, so that energies of unlike formulas fit one plot."""
    species, where = np.unique(data.species, return_inverse=True)
    fractions = np.zeros((len(data.names), max(len(species), 1)))
    np.add.at(fractions, (np.asarray(data.structure), where), 1.0)
    fractions /= np.maximum(fractions.sum(axis=1, keepdims=True), 1)
    finite = np.isfinite(reference)
    if not finite.any():
        return np.zeros(len(reference))
    weights = np.linalg.lstsq(fractions[finite], reference[finite], rcond=1e-10)[0]
    return fractions @ weights


def _shape(name: str, values: np.ndarray | None, required: tuple[int, ...]) -> None:
    if values is not None and np.shape(values) != required:
        raise errors.UserError(f"`{name}` must have shape {required}; got {np.shape(values)}.")


# ---------------------------------------------------------------- from a potential


def collect_data(
    potential: Potential,
    structures: Structures,
    targets: Targets,
    evaluation: Evaluation,
    model_name: str,
    data_name: str,
    version: str,
    overlap: DataOverlap | None = None,
    findings: Sequence[Finding] = (),
) -> ReportData:
    """The data of the report about a potential on labelled structures.

    Args:
        evaluation: evaluate(potential, structures, targets); without variances the sections that need them say so.
        version: of the package that wrote the model, for the citation.
        overlap: which of these structures the model was trained or calibrated on, where that was compared.
        findings: about the labels of these structures.
    """
    return ReportData(
        **_arrays(structures, targets, evaluation.prediction),
        title=f"Uncertainty report: {model_name}",
        model_name=model_name,
        data_name=data_name,
        trained_on=overlap is not None and overlap.training,
        held_out=0 if overlap is None else overlap.held_out,
        findings=tuple(findings),
        novelty_thresholds=_thresholds(potential),
        cutoff=potential.cutoff,
        scores={kind: _scores(potential, kind, s) for kind, s in evaluation.scores.items() if s.n},
        group_scores={
            name: {kind: _scores(potential, kind, s) for kind, s in scores.items() if s.n}
            for name, scores in evaluation.scores_by_config_type.items()
        },
        rivals=compare_indicators(potential, structures, targets, evaluation),
        model=_model(potential),
        dimers=tuple(dimer_curves(potential)),
        citations=tuple(work.bibtex() for work in provenance.citations_of(potential.recipe, version)),
    )


def _arrays(structures: Structures, targets: Targets, prediction: Prediction) -> dict[str, Any]:
    """What ReportData holds of each structure, atom and component."""
    forces, energies, stresses = prediction.forces_variance, prediction.energies_variance, prediction.stresses_variance
    rows, columns = zip(*units.VOIGT, strict=True)
    offsets = structures.offsets[:-1][structures.structure_of_atom]
    return {
        "names": structures.names,
        "config_type": targets.config_types,
        "n_atoms": _numpy(structures.counts),
        "energy_reference": _numpy(targets.energies),
        "energy_predicted": _numpy(prediction.energies),
        "energy_std": _std(energies),
        "energy_variance": _parts(energies),
        "structure": _numpy(structures.structure_of_atom),
        "species": _numpy(structures.species),
        "atom": _numpy(torch.arange(structures.n_atoms) - offsets.cpu()),
        "force_reference": _numpy(targets.forces),
        "force_predicted": _numpy(prediction.forces),
        "force_std": _std(forces),
        "force_variance": _parts(forces),
        "local_energy_std": _std(prediction.atom_energies_variance),
        "novelty": None if prediction.novelty is None else _numpy(prediction.novelty),
        "charges": None if prediction.charges is None else _numpy(prediction.charges),
        "charge_reference": None if prediction.charges is None else _numpy(targets.charges),
        "electrostatic": None if prediction.electrostatic is None else _numpy(prediction.electrostatic),
        "positions": _numpy(structures.positions),
        "cells": _numpy(structures.cells),
        "periodic": _numpy(structures.periodic),
        "stress_reference": _numpy(targets.stresses[:, rows, columns]),
        "stress_predicted": _numpy(prediction.stresses[:, rows, columns]),
        "stress_std": None if stresses is None else _numpy(stresses.total[:, rows, columns].sqrt()),
    }


def _thresholds(potential: Potential) -> dict[str, float]:
    distances = potential.novelty
    return {} if distances is None else {errors.chemical_symbol(z): t for z, t in sorted(distances.thresholds.items())}


def compare_indicators(
    potential: Potential, structures: Structures, targets: Targets, evaluation: Evaluation
) -> dict[str, dict[str, float]] | None:
    """How well each indicator ranks force errors: Spearman's coefficient, and AUROC of finding the worst tenth of the atoms.

    Two trivial indicators are among them: distance to the nearest inducing environment, and the size of the predicted force.
    """
    prediction = evaluation.prediction
    error = (prediction.forces - targets.forces).norm(dim=1)
    labelled = ~error.isnan()
    if int(labelled.sum()) < 20 or prediction.forces_variance is None:
        return None
    indicators: dict[str, Tensor] = {
        "predicted std of the force": prediction.forces_variance.total.sum(1).sqrt(),
        "distance to the nearest inducing environment": nearest_distance(potential, structures),
        "size of the predicted force": prediction.forces.norm(dim=1),
    }
    if prediction.atom_energies_variance is not None:
        indicators["std of the local energy"] = prediction.atom_energies_variance.total.sqrt()
    if prediction.novelty is not None:
        indicators["novelty (Mahalanobis)"] = prediction.novelty
        indicators["std of the force x novelty"] = indicators["predicted std of the force"] * prediction.novelty
    error = error[labelled]
    large = error >= error.quantile(1 - WORST)
    ranked = {name: value[labelled] for name, value in indicators.items()}
    return {
        name: {"Spearman": spearman_correlation(value, error), "AUROC, worst 10 %": area_under_roc(value, large)}
        for name, value in ranked.items()
    }


def nearest_distance(potential: Potential, structures: Structures) -> Tensor:
    """(atoms,) |x - x_j| of each environment to the nearest inducing centre of its species, in features of the first descriptor."""
    term, out = potential.terms[0], []
    device, dtype = potential.recipe.device, getattr(torch, potential.recipe.dtype)
    for chunk in (part.to(device=device, dtype=dtype) for part in chunk_structures(structures, 500)):
        features = term.environments(chunk).environments.features
        nearest = features.new_full((len(features),), math.inf)
        for z, block in term.blocks.items():
            mine = chunk.species == z
            if mine.any():
                dots = (features[mine] @ block.features.T).amax(1)
                nearest[mine] = (2 - 2 * dots).clamp_min(0).sqrt()
        out.append(nearest)
    return torch.cat(out).to(structures.positions)


def dimer_curves(potential: Potential) -> list[dict[str, Any]]:
    """Interaction energy of each pair of species against distance, with its standard deviation, from close repulsion to the cutoff, of
    a model with charges to twice the cutoff.

    The energy is that of the pair less that of the same two atoms out of each other's reach.
    """
    curves, n = [], DIMER_POINTS + 1
    shortest = potential.report.get("shortest", {})
    for a in potential.species:
        for b in potential.species:
            if b < a:
                continue
            pair = f"{errors.chemical_symbol(a)}-{errors.chemical_symbol(b)}"
            start = 0.6 * shortest.get(pair, 1.5)
            end = potential.cutoff + 0.3 if potential.charges is None else 2 * potential.cutoff
            r = torch.linspace(start, end, DIMER_POINTS, dtype=torch.float64)
            positions = torch.zeros(n, 2, 3, dtype=torch.float64)
            positions[:, 1, 0] = torch.cat([r, r.new_tensor([FREE])])  # the last one: free atoms
            structures = Structures(
                positions.flatten(0, 1),
                torch.zeros(n, 3, 3, dtype=torch.float64),
                torch.zeros(n, 3, dtype=torch.bool),
                torch.tensor([a, b]).repeat(n),
                torch.arange(n).repeat_interleave(2),
            )
            prediction = potential(structures, variance=None if potential.variances is None else "energies")
            std = prediction.energies_variance
            entry = {
                "pair": pair,
                "r": _numpy(r),
                "energy": _numpy(prediction.energies[:-1] - prediction.energies[-1]),
                "shortest": shortest.get(pair),
            }
            if prediction.electrostatic is not None:
                entry["electrostatic"] = _numpy(prediction.electrostatic[:-1] - prediction.electrostatic[-1])
            curves.append(entry | {"std": None if std is None else _numpy(std.epistemic[:-1].sqrt())})
    return curves


def _model(potential: Potential) -> dict[str, Any]:
    recipe = potential.recipe.model_dump(mode="json")
    calibration = potential.calibration.as_dict()
    calibration["source"] = {key: value for key, value in calibration["source"].items() if key != "fingerprints"}
    about = {"recipe": recipe, "provenance": potential.provenance, "calibration": calibration, "noise": potential.noise}
    return dict(potential.report) | about


def _scores(potential: Potential, kind: str, scores: Scores) -> dict[str, float]:
    """Scores of a kind under the names of the report: which rank correlation it is; coverages only if intervals are conformal."""
    conformal = bool(potential.calibration.kinds[kind].n)
    values = {
        name: float(value) for name, value in vars(scores).items() if conformal or not name.startswith("coverage")
    }
    values[ORDERED[kind]] = values.pop("spearman")
    return values


def _parts(variance: Variance | None) -> dict[str, np.ndarray]:
    return {} if variance is None else {name: _numpy(part) for name, part in vars(variance).items()}


def _std(variance: Variance | None) -> np.ndarray | None:
    return None if variance is None else _numpy(variance.total.sqrt())


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()
