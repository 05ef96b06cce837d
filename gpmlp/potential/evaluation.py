"""Evaluation of a potential against reference labels: errors, and scores of their predicted standard deviations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from gpmlp.core import units
from gpmlp.core.quantities import Prediction, Targets, json_value
from gpmlp.core.structures import Structures, chunk_structures
from gpmlp.gp.variance import VARIANCES
from gpmlp.potential.potential import Potential
from gpmlp.uncertainty import residuals
from gpmlp.uncertainty.calibration import Calibration
from gpmlp.uncertainty.scores import Scores, score_errors

CHUNK_ATOMS = 500  # atoms between two calls of progress
LEVELS = (0.5, 0.68, 0.9, 0.95)
EXACT = (
    1e-3  # of the rms error: where symmetry forbids a component and the error is smaller, it is no test of an error bar
)
# keys of the JSON: name of a kind there, and the unit of its sharpness
KEYS = {
    "energies": ("energy", "meV_per_atom", 1e3),
    "forces": ("force", "meV_per_A", 1e3),
    "stresses": ("stress", "GPa", 1 / units.GPA),
}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A prediction, its errors, and scores of its variances.

    Attributes:
        prediction: of all structures.
        overall: errors over all structures.
        by_config_type: errors over the structures of each config_type; empty if no structure has one.
        scores: by kind, Scores of the variances (energies per atom); empty where none were predicted.
        scores_by_config_type: the same for each config_type.
    """

    prediction: Prediction
    overall: ErrorTable
    by_config_type: dict[str, ErrorTable]
    scores: dict[str, Scores] = field(default_factory=dict)
    scores_by_config_type: dict[str, dict[str, Scores]] = field(default_factory=dict)

    def as_dict(self) -> dict:
        """JSON-able form, units in the names; None where there is no label of the kind.

        Of variances, for energy (per atom), force and stress: `force_coverage_50`, `_68`, `_90`, `_95` (share of components in the
        intervals), `force_miscalibration_area`, `force_ence`, `force_nll` (nats, errors in eV/A), `force_crps` (eV/A),
        `force_sharpness_meV_per_A` (rms standard deviation), `force_rms_z` (rms of error/std), `force_spearman` (of forces per atom),
        `force_spearman_within_frame` (median over the structures), `force_n_symmetric` (components left out, as they vanish by symmetry).
        """
        scores = self.scores_by_config_type
        tables = {name: _as_dict(table, scores.get(name, {})) for name, table in self.by_config_type.items()}
        return _as_dict(self.overall, self.scores) | {"by_config_type": tables}


def _as_dict(table: ErrorTable, scores: dict[str, Scores]) -> dict:
    values = asdict(table)
    for kind, entry in scores.items():
        name, unit, factor = KEYS[kind]
        numbers = asdict(entry)
        values[f"{name}_sharpness_{unit}"] = factor * numbers.pop("sharpness")
        values |= {f"{name}_{key}": value for key, value in numbers.items() if key != "n"}
        if kind != "forces":
            del values[f"{name}_spearman_within_frame"]
    return json_value(values)


def evaluate(
    potential: Potential,
    structures: Structures,
    targets: Targets,
    progress: Callable[[str, float, float, str], None] | None = None,
    variances: bool = True,
) -> Evaluation:
    """Predict all structures and compare with their labels.

    Args:
        progress: called as progress(stage, done, total, note), in atoms.
        variances: whether to predict variances and novelty too, if the potential can.

    Energies count as unlabelled where the potential has not learned from any: its zero of energy is arbitrary.
    """
    variances = variances and potential.variances is not None
    targets = comparable_targets(potential, targets)
    parts: list[Prediction] = []
    done = 0
    if progress:
        progress("prediction", 0, structures.n_atoms, "")
    for chunk in chunk_structures(structures, CHUNK_ATOMS):
        first = sum(int(part.energies.shape[0]) for part in parts)
        labels = targets.config_types[first : first + len(chunk)]
        about = VARIANCES if variances else None, potential.novelty is not None and variances
        parts.append(potential(chunk, *about, config_types=labels))
        done += chunk.n_atoms
        if progress:
            progress("prediction", done, structures.n_atoms, f"{done} atoms")
    return compare_prediction(structures, targets, Prediction.concatenate(parts), potential.calibration)


def comparable_targets(potential: Potential, targets: Targets) -> Targets:
    """The labels without energies, if the potential has learned from none."""
    if potential.has_energy_zero:
        return targets
    return replace(targets, energies=torch.full_like(targets.energies, float("nan")))


def compare_prediction(
    structures: Structures, targets: Targets, prediction: Prediction, calibration: Calibration
) -> Evaluation:
    """Evaluate a prediction.

    Args:
        calibration: of the variances in the prediction; gives their conformal intervals.
    """
    tables, tables_of_scores = {}, {}
    for name in sorted(set(targets.config_types) - {""}):
        members = [i for i, label in enumerate(targets.config_types) if label == name]
        part = structures.select(members), targets.select(structures, members), prediction.select(structures, members)
        tables[name] = error_table(*part)
        tables_of_scores[name] = score_variances(*part, calibration)
    overall = error_table(structures, targets, prediction)
    scores = score_variances(structures, targets, prediction, calibration)
    return Evaluation(prediction, overall, tables, scores, tables_of_scores)


def score_variances(
    structures: Structures, targets: Targets, prediction: Prediction, calibration: Calibration
) -> dict[str, Scores]:
    """Scores of the variances of a prediction by kind; kinds without variances are left out.

    So are components that vanish by symmetry: error bars of next to nothing hold there, and there may be many (strained crystals).
    """
    scores = {}
    for kind, name in residuals.VARIANCE_FIELDS.items():
        if getattr(prediction, name) is None:
            continue
        error, parts, species = residuals.split_residuals(kind, structures, targets, prediction)
        std = parts.sum(1).sqrt()
        forbidden = residuals.zero_by_symmetry(kind, targets, prediction, parts)
        exact = forbidden & (error.abs() < EXACT * error[~error.isnan()].square().mean().sqrt())
        given = ~error.isnan() & std.isfinite() & ~exact
        owner = residuals.structure_of_error(kind, structures).to(std.device)[given]
        error, std = error[given], std[given]
        z = None if species is None else species[given]
        groups = [targets.config_types[i] for i in owner.tolist()]
        widths = {level: calibration.half_width(kind, std, level, z, groups) for level in LEVELS}
        atom = (
            torch.arange(structures.n_atoms, device=std.device).repeat_interleave(3)[given]
            if kind == "forces"
            else None
        )
        found = score_errors(error, std, widths, atom, None if atom is None else owner)
        scores[kind] = replace(found, n_symmetric=int(exact.sum()))
    return scores


@dataclass(frozen=True)
class ErrorTable:
    """Errors of a prediction against targets; a field is NaN where there was no label of that kind."""

    energy_mae_meV_per_atom: float
    energy_rmse_meV_per_atom: float
    force_mae_meV_per_A: float
    force_rmse_meV_per_A: float
    stress_mae_GPa: float
    stress_rmse_GPa: float
    n_structures: int
    n_atoms: int


def error_table(structures: Structures, targets: Targets, prediction: Prediction) -> ErrorTable:
    """Compare predicted with reference energies (per atom), force components and stress components."""

    def mae_and_rmse(difference: Tensor, scale: float) -> tuple[float, float]:
        given = difference[~torch.isnan(difference)] * scale
        if not given.numel():
            return float("nan"), float("nan")
        return given.abs().mean().item(), given.square().mean().sqrt().item()

    energy = mae_and_rmse((prediction.energies - targets.energies) / structures.counts, 1e3)
    force = mae_and_rmse(prediction.forces - targets.forces, 1e3)
    stress = mae_and_rmse(prediction.stresses - targets.stresses, 1 / units.GPA)
    return ErrorTable(*energy, *force, *stress, len(structures), structures.n_atoms)
