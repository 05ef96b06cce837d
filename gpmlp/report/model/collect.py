"""Reporting gathers what the uncertainty report shows: a potential, labelled structures and their evaluation become plain arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpmlp.core import errors
from gpmlp.core.quantities import Targets, Variance
from gpmlp.core.structures import Structures, chunk_structures
from gpmlp.core.units import VOIGT
from gpmlp.io import citations
from gpmlp.io.provenance import DataOverlap
from gpmlp.potential.evaluation import Evaluation
from gpmlp.potential.potential import Potential
from gpmlp.report.model.data import ReportData
from gpmlp.report.model.numbers import ORDERED
from gpmlp.uncertainty.scores import Scores, area_under_roc, spearman_correlation

WORST = 0.1  # share of atoms whose force error counts as large in the ranking of indicators
DIMER_POINTS = 60


def collect(
    potential: Potential,
    structures: Structures,
    targets: Targets,
    found: Evaluation,
    model_name: str,
    data_name: str,
    version: str,
    known: DataOverlap | None = None,
) -> ReportData:
    """Everything the report shows of a potential on labelled structures.

    Args:
        found: evaluation.evaluate of the same; without variances the sections that need them say so.
        version: of the package that made the model, for the citation.
        known: what the model has learned of these very structures, if that was looked at.
    """
    prediction = found.prediction
    forces, energies, stresses = prediction.forces_variance, prediction.energies_variance, prediction.stresses_variance
    rows, columns = zip(*VOIGT, strict=True)
    offsets = structures.offsets[:-1][structures.structure_of_atom]
    atoms = torch.arange(structures.n_atoms) - offsets.cpu()
    return ReportData(
        title=f"Uncertainty report: {model_name}",
        model_name=model_name,
        data_name=data_name,
        trained_on=known is not None and known.training,
        held_out=0 if known is None else known.held_out,
        names=structures.names,
        n_atoms=_numpy(structures.counts),
        energy_reference=_numpy(targets.energies),
        energy_predicted=_numpy(prediction.energies),
        structure=_numpy(structures.structure_of_atom),
        species=_numpy(structures.species),
        atom=_numpy(atoms),
        force_reference=_numpy(targets.forces),
        force_predicted=_numpy(prediction.forces),
        config_type=targets.config_types,
        energy_std=_std(energies),
        energy_variance=_parts(energies),
        force_std=_std(forces),
        force_variance=_parts(forces),
        local_energy_std=_std(prediction.atom_energies_variance),
        novelty=None if prediction.novelty is None else _numpy(prediction.novelty),
        positions=_numpy(structures.positions),
        cells=_numpy(structures.cells),
        periodic=_numpy(structures.periodic),
        cutoff=potential.cutoff,
        stress_reference=_numpy(targets.stresses[:, rows, columns]),
        stress_predicted=_numpy(prediction.stresses[:, rows, columns]),
        stress_std=None if stresses is None else _numpy(stresses.total[:, rows, columns].sqrt()),
        scores={kind: _scores(potential, kind, s) for kind, s in found.scores.items() if s.n},
        rivals=rivals(potential, structures, targets, found),
        model=_model(potential),
        dimers=tuple(dimers(potential)),
        citations=tuple(work.bibtex() for work in citations.citations_of(potential.recipe, version)),
    )


def rivals(
    potential: Potential, structures: Structures, targets: Targets, found: Evaluation
) -> dict[str, dict[str, float]] | None:
    """How well each indicator ranks force errors: Spearman's coefficient, and AUROC of finding the worst tenth of the atoms.

    Trivial indicators stand beside: distance to the nearest inducing environment, and the size of the predicted force.
    """
    prediction = found.prediction
    error = (prediction.forces - targets.forces).norm(dim=1)
    known = ~error.isnan()
    if int(known.sum()) < 20 or prediction.forces_variance is None:
        return None
    indicators: dict[str, Tensor] = {
        "predicted std of the force": prediction.forces_variance.total.sum(1).sqrt(),
        "distance to the nearest inducing environment": nearest_centre(potential, structures),
        "size of the predicted force": prediction.forces.norm(dim=1),
    }
    if prediction.atom_energies_variance is not None:
        indicators["std of the local energy"] = prediction.atom_energies_variance.total.sqrt()
    if prediction.novelty is not None:
        indicators["novelty (Mahalanobis)"] = prediction.novelty
        indicators["std of the force x novelty"] = indicators["predicted std of the force"] * prediction.novelty
    large = error >= error[known].quantile(1 - WORST)
    return {
        name: {
            "Spearman": spearman_correlation(value[known], error[known]),
            "AUROC, worst 10 %": area_under_roc(value[known], large[known]),
        }
        for name, value in indicators.items()
    }


def nearest_centre(potential: Potential, structures: Structures) -> Tensor:
    """(atoms,) |x - x_j| of each environment to the nearest inducing centre of its species, in features of the first descriptor."""
    term, out = potential.terms[0], []
    own = {"device": potential.recipe.device, "dtype": getattr(torch, potential.recipe.dtype)}
    for chunk in (part.to(**own) for part in chunk_structures(structures, 500)):
        features = term.view(chunk).environments.features
        nearest = features.new_full((len(features),), math.inf)
        for z, block in term.blocks.items():
            mine = chunk.species == z
            if mine.any():
                dots = (features[mine] @ block.features.T).amax(1)
                nearest[mine] = (2 - 2 * dots).clamp_min(0).sqrt()
        out.append(nearest)
    return torch.cat(out).to(structures.positions)


def dimers(potential: Potential) -> list[dict[str, Any]]:
    """Interaction energy of each pair of species against distance, with its standard deviation, from close repulsion to the cutoff.

    The energy is that of the pair less that of the same two atoms too far apart to see each other.
    """
    made, n = [], DIMER_POINTS + 1
    shortest = potential.report.get("shortest", {})
    for a in potential.species:
        for b in potential.species:
            if b < a:
                continue
            pair = f"{errors.chemical_symbol(a)}-{errors.chemical_symbol(b)}"
            start = 0.6 * shortest.get(pair, 1.5)
            r = torch.linspace(start, potential.cutoff + 0.3, DIMER_POINTS, dtype=torch.float64)
            positions = torch.zeros(n, 2, 3, dtype=torch.float64)
            positions[:, 1, 0] = torch.cat([r, r.new_tensor([2 * potential.reach + 1])])  # the last one: free atoms
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
            made.append(entry | {"std": None if std is None else _numpy(std.epistemic[:-1].sqrt())})
    return made


def _model(potential: Potential) -> dict[str, Any]:
    recipe = potential.recipe.model_dump(mode="json")
    calibration = potential.calibration.as_dict()
    calibration["source"] = {key: value for key, value in calibration["source"].items() if key != "fingerprints"}
    own = {"recipe": recipe, "provenance": potential.provenance, "calibration": calibration}
    return dict(potential.report) | own | {"noise": potential.noise}


def _scores(potential: Potential, kind: str, found: Scores) -> dict[str, float]:
    """Scores of a kind under the names of the report: which rank correlation it is; coverages only if intervals are conformal."""
    conformal = bool(potential.calibration.kinds[kind].n)
    values = {name: float(value) for name, value in vars(found).items() if conformal or not name.startswith("coverage")}
    values[ORDERED[kind]] = values.pop("spearman")
    return values


def _parts(variance: Variance | None) -> dict[str, np.ndarray]:
    return {} if variance is None else {name: _numpy(part) for name, part in vars(variance).items()}


def _std(variance: Variance | None) -> np.ndarray | None:
    return None if variance is None else _numpy(variance.total.sqrt())


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()
