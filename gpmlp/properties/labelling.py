"""What to label so that a property gets sharper: structures whose labels shrink its posterior variance most, and by how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from gpmlp.core.errors import UserError
from gpmlp.core.units import VOIGT_INDEX
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.potential.potential import Potential
from gpmlp.properties.compute import PlannedCalculation, PropertyResults, corrected_outputs, ion_responses, plan_all
from gpmlp.properties.plan import Calculation
from gpmlp.properties.surface import EnergySurface, Failed, Point, Progress, structure_names

STEPS = {"energy": 1e-3, "forces": 1e-3, "stress": 1e-5}  # eV, eV/A, eV/A^3: of the derivatives of properties
AMPLIFIED = 0.02  # strain to which smaller ones are made larger
RELATIVE = 1e-9  # of its largest derivative, below which a property does not depend on a value


@dataclass(frozen=True, eq=False)
class LabelChoice:
    """A structure to label, with the standard deviation of each property once it and those chosen before it are labelled."""

    atoms: Atoms
    sigmas: Mapping[str, float]


def choose_labels(
    potential: Potential,
    structures: Sequence[Atoms],
    calculations: Sequence[Calculation],
    results: PropertyResults,
    wanted: Sequence[str],
    number: int,
    pool: Sequence[Atoms] = (),
    progress: Progress | None = None,
) -> list[LabelChoice]:
    """Structures whose energies, forces and stresses would shrink the variances of some properties most, one after the other.

    To first order a property is a linear functional f = w.y of what its structures' energies, forces and stresses y are, with w from finite
    differences of the calculation. With b the whitened covariances of f, and B those of a candidate's labels with the noise N,

        var(f) = b.b   before,    b.b - b Bᵀ (B Bᵀ + N)⁻¹ B bᵀ   after it is labelled,

    and the candidate with the largest mean over the properties of this share of their variances is taken, and so on; its labels
    need not be known for that. Foreseen standard deviations are those of `results` with the part that the data leave open times the
    root of the share that is left. Candidates are the structures that the properties are computed from, those that are strained by
    little also with a strain of AMPLIFIED, at which a label tells more.

    Args:
        structures, calculations, results: as given to compute_properties, and what it returned.
        wanted: names of values. number: of labels. pool: candidates besides the structures that the properties are computed from.

    Raises:
        UserError: a name without a value, or of phonons; a model without variances; fewer candidates than labels.
    """
    if potential.variances is None:
        raise UserError("What to label follows from variances, and this model has none (fit with variance).")
    calculations = [each for each in calculations if each.to_sharpen]
    possible = sharpened_names(calculations, results)
    if lacking := [name for name in wanted if results[name].name not in possible]:
        raise UserError(
            f"{lacking[0]}: labels cannot be chosen for values of {results[lacking[0]].calculation}, nor for those without error bars; "
            f"they can for {', '.join(possible) or 'none of these'}."
        )
    sigmas = {name: results[name].sigma for name in wanted}
    parts = {name: results[name].parts for name in wanted}
    surface, say = EnergySurface(potential), progress or (lambda *_: None)
    tasks, _ = plan_all(surface, calculations, structures, say)
    answers = ion_responses(surface, tasks, say)
    functionals: dict[str, Tensor] = {}
    candidates: list[Atoms] = list(pool)
    for task, responses in zip(tasks, answers, strict=True):
        mine = [name for name in wanted if name.startswith(task.prefix) and name[len(task.prefix) :] in task.plan.units]
        if mine:
            functionals |= _functional_rows(potential, surface, task, responses, mine, say)
            candidates += [*task.plan.structures, *_amplified(task)]
    if len(candidates) < number:
        raise UserError(f"There are only {len(candidates)} structures that could be labelled; {number} are asked for.")
    rows, left = torch.stack([functionals[name] for name in wanted]), []
    for index, shares in _greedily(potential, rows, candidates, number, say):
        foreseen = {
            name: float(np.sqrt(sigma**2 - parts[name].get("sampled", sigma) ** 2 * (1 - share)))
            for (name, sigma), share in zip(sigmas.items(), shares, strict=True)
        }
        left.append(LabelChoice(candidates[index], foreseen))
    return left


def sharpened_names(calculations: Sequence[Calculation], results: PropertyResults) -> list[str]:
    """Values for which labels can be chosen."""
    kinds = {each.name for each in calculations if each.to_sharpen}
    return [value.name for value in results.values if value.calculation in kinds and value.sigma > 0]


def _amplified(task: PlannedCalculation) -> list[Atoms]:
    """Structures that are strained for derivatives, with a strain at which a label tells more than its noise."""
    out = []
    for i, reference in task.plan.relaxed.items():
        atoms, rest = task.plan.structures[i], task.plan.structures[reference]
        if len(atoms) != len(rest) or not rest.cell.rank == 3:
            continue
        strain = np.linalg.solve(rest.cell.array, atoms.cell.array) - np.eye(3)
        times = AMPLIFIED / max(float(np.abs(strain).max()), 1e-300)
        if 1.5 < times < 1000:
            more = atoms.copy()
            more.set_cell(rest.cell.array @ (np.eye(3) + times * strain), scale_atoms=True)
            moved = atoms.get_scaled_positions(wrap=False) - rest.get_scaled_positions(wrap=False)
            more.set_scaled_positions(rest.get_scaled_positions(wrap=False) + times * moved)
            more.info["name"] = f"{structure_names([atoms])[0]} x{times:.0f}"
            out.append(more)
    return out


def _greedily(
    potential: Potential, rows: Tensor, candidates: Sequence[Atoms], number: int, say: Progress
) -> list[tuple[int, list[float]]]:
    """Indices of the candidates in the order of choice, and the shares of the functionals' variances that are left after each."""
    labels = []
    for k, atoms in enumerate(candidates):
        say("candidates", k, len(candidates), structure_names([atoms])[0])
        labels.append(_whitened_rows(potential, atoms) / _noise(potential, atoms)[:, None])
    say("candidates", len(candidates), len(candidates), f"{len(candidates)} structures")
    before = rows.square().sum(1)
    chosen: list[tuple[int, list[float]]] = []
    while len(chosen) < number:
        gains = []
        for k, b in enumerate(labels):
            cross = b @ rows.T
            inner = torch.eye(len(b)).to(b) + b @ b.T
            gain = (cross * torch.linalg.solve(inner, cross)).sum(0) / before
            gains.append(-1.0 if any(k == one for one, _ in chosen) else float(gain.mean()))
        best = int(np.argmax(gains))
        # (I + BᵀN⁻¹B)^-½ = I + V ((1 + s²)^-½ - 1) Vᵀ, with N^-½ B = U s Vᵀ
        _, values, vectors = torch.linalg.svd(labels[best], full_matrices=False)
        shrunk = vectors.T * ((1 + values.square()).rsqrt() - 1)
        rows = rows + (rows @ shrunk) @ vectors
        labels = [b + (b @ shrunk) @ vectors for b in labels]
        chosen.append((best, (rows.square().sum(1) / before).tolist()))
    return chosen


def _whitened_rows(potential: Potential, atoms: Atoms) -> Tensor:
    """(1 + 3n + 6, columns) of the energy, the forces and the stress (Voigt) of a structure; their products are posterior covariances."""
    here = potential.to_own_device(structures_from_ase([atoms], structure_names([atoms])))
    model = potential.variance_model()
    rows = model.whitened(model.covariance_rows(here, [term.environments(here) for term in potential.terms]))
    if potential.charges is not None:
        rows = potential.charges.with_charges(here, rows)
    return torch.cat([rows.b.energies, rows.b.forces, rows.b.stresses]).double().cpu()


def _noise(potential: Potential, atoms: Atoms) -> Tensor:
    """(1 + 3n + 6,) standard deviations of the labels of a structure, as the fit has learned them; a kind that it had none of tells
    nothing."""
    n = len(atoms)
    energy, force, stress = (potential.noise.get(kind, np.inf) for kind in ("energies", "forces", "stresses"))
    each = [n * energy, *[force] * (3 * n), *[stress] * 6]
    return torch.tensor(each, dtype=torch.float64)


def _functional_rows(
    potential: Potential,
    surface: EnergySurface,
    task: PlannedCalculation,
    responses: Mapping,
    names: Sequence[str],
    say: Progress,
) -> dict[str, Tensor]:
    """(columns,) by name: whitened covariances of properties, to first order."""
    points = surface.points(task.plan.structures)
    found: dict[str, Tensor] = {}
    for i, atoms in enumerate(task.plan.structures):
        say("sensitivities", i, len(points), f"{task.calculation.name}: {structure_names([atoms])[0]}")
        weights = _derivatives(task, responses, points, i, [name[len(task.prefix) :] for name in names])
        if weights.any():
            b = _whitened_rows(potential, atoms)
            for name, row in zip(names, torch.from_numpy(weights) @ b, strict=True):
                found[name] = found[name] + row if name in found else row
    say("sensitivities", len(points), len(points), task.calculation.name)
    if lacking := [name for name in names if name not in found]:
        raise UserError(f"{lacking[0]} does not depend on energies, forces or stresses of its structures.")
    return found


def _derivatives(
    task: PlannedCalculation, responses: Mapping, points: Sequence[Point], i: int, names: Sequence[str]
) -> np.ndarray:
    """(names, 1 + 3n + 6) derivatives of outputs with energy, forces and stress (Voigt) of structure i."""
    n = len(points[i].forces)
    steps = [STEPS["energy"], *[STEPS["forces"]] * (3 * n), *[STEPS["stress"]] * 6]

    def outputs(change: np.ndarray) -> np.ndarray:
        here = points[i]
        forces = here.forces + change[1:-6].reshape(n, 3)
        moved = Point(here.energy + change[0], forces, here.stress + change[-6:][np.array(VOIGT_INDEX)])
        found = corrected_outputs(task, responses, [*points[:i], moved, *points[i + 1 :]])
        if isinstance(found, Failed):
            raise UserError(f"{task.calculation.name}: {found}; so it is not known on what it depends.")
        return np.array([float(found[name]) for name in names])

    out = np.zeros((len(names), len(steps)))
    middle = outputs(np.zeros(len(steps)))
    # most properties need no forces of most structures: one look at all of them together says so
    rng = np.random.default_rng(0)
    some = np.zeros(len(steps))
    some[1:-6] = STEPS["forces"] * rng.standard_normal(3 * n)
    of_forces = np.abs(outputs(some) - middle).max() > RELATIVE * np.abs(middle).max()
    for k in range(len(steps)):
        if of_forces or not 0 < k <= 3 * n:
            change = np.zeros(len(steps))
            change[k] = steps[k]
            out[:, k] = (outputs(change) - outputs(-change)) / (2 * steps[k])
    return out
