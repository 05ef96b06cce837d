"""The error bar of a property: a plan on the mean potential, and what its numbers are on every sample of the posterior."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from ase import Atoms

from gpmlp.core.errors import UserError
from gpmlp.core.structures import CHUNK_ATOMS, chunk_structures
from gpmlp.core.units import VOIGT_INDEX
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.potential.potential import Potential
from gpmlp.potential.samples import PosteriorSamples
from gpmlp.properties.calculations import check_suited, choose_calculations
from gpmlp.properties.constraints import allowed_forces, check_supported
from gpmlp.properties.motion import Motion
from gpmlp.properties.plan import Calculation, CurveAxis, Outputs, Plan
from gpmlp.properties.surface import (
    LONGEST,
    EnergySurface,
    Failed,
    Point,
    Progress,
    inverse_hessian,
    structure_names,
)
from gpmlp.properties.transport_results import TransportResults
from gpmlp.properties.values import FEWEST, PropertyCurve, PropertyValue, has_spread, spread, value_from_samples
from gpmlp.uncertainty.calibration import Calibration

SAMPLES = 32


@dataclass(frozen=True, eq=False)
class PropertyResults:
    """What was computed.

    Attributes:
        values, curves: in the order of the calculations.
        structures: all that they were computed from; info['name'] names each.
        failures: what could not be computed, what a calculation does not suit, and how many samples have no value, with the reason.
        samples: how many were drawn; 0 for a model without variances.
        full: whether each sample had structures of its own.
    """

    values: tuple[PropertyValue, ...] = ()
    curves: tuple[PropertyCurve, ...] = ()
    structures: tuple[Atoms, ...] = ()
    failures: tuple[str, ...] = ()
    samples: int = 0
    full: bool = False

    def __getitem__(self, name: str) -> PropertyValue:
        """The value of a name.

        Raises:
            UserError: there is none.
        """
        found = {value.name: value for value in self.values}
        if name not in found:
            raise UserError(f"There is no property '{name}'; there are {', '.join(found) or 'none'}.")
        return found[name]


@dataclass(frozen=True, eq=False)
class PlannedCalculation:
    """A calculation of some structures: its plan on the mean, and where its structures are among all."""

    calculation: Calculation
    structures: tuple[Atoms, ...]
    prefix: str
    plan: Plan
    first: int

    @property
    def slice(self) -> slice:
        return slice(self.first, self.first + len(self.plan.structures))


@dataclass(frozen=True, eq=False)
class IonResponse:
    """How ions at rest on the mean answer forces: H⁺ (3n, 3n), and L = dF/dstrain (6, 3n) where the cell has a volume."""

    compliance: np.ndarray
    strain_forces: np.ndarray | None

    def corrected(self, point: Point, atoms: Atoms) -> Point:
        """The point of a sample after one Newton step of its ions: u = H⁺ F, E - F u / 2, stress - L u / V, no forces.

        Raises:
            Failed: the step is no small one.
        """
        force = allowed_forces(atoms, point.forces).ravel()
        step = self.compliance @ force
        if np.abs(step).max(initial=0.0) > LONGEST:
            raise Failed(f"ions of {structure_names([atoms])[0]} move farther than a Newton step reaches ({LONGEST} A)")
        stress = point.stress
        if self.strain_forces is not None:
            change = self.strain_forces @ step / atoms.get_volume()
            stress = stress - change[np.array(VOIGT_INDEX)]
        return Point(point.energy - 0.5 * float(force @ step), point.forces - force.reshape(-1, 3), stress)


def compute_properties(
    potential: Potential,
    structures: Sequence[Atoms] | Atoms,
    what: Sequence[str] | Sequence[Calculation] | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    full: bool = False,
    progress: Progress | None = None,
) -> PropertyResults:
    """Properties of structures with error bars.

    The structures of each calculation are made on the mean potential; all samples of the posterior are evaluated there in one batch, and
    ions that were at rest on the mean take one Newton step with its force constants, which is right to first order in what a sample
    differs by. With `full` each sample relaxes structures of its own, to check that. Values and points of curves from structures unlike
    the training data have larger standard deviations than samples (Calibration.functional_widening).

    Args:
        structures: of ASE; info['name'] is what results call them (their formula if it is not there).
        what: names of calculations (calculations.CALCULATIONS), or calculations with their options; None: all that suit the structures.
        samples: of the posterior, from which standard deviations are; a model without variances has none.
        progress: called with (stage, done, total, note).

    Raises:
        UserError: a species that the potential does not know, a calculation that suits no structure, none that succeeds.
    """
    given = named([structures] if isinstance(structures, Atoms) else structures)
    potential.check_species(structures_from_ase(given, structure_names(given)))
    chosen = _chosen(given, what)
    still = [each for each in chosen if not isinstance(each, Motion)]
    if potential.variances is not None:
        for each in chosen:
            if isinstance(each, Motion):
                each.check_samples(samples)
    surface, say = EnergySurface(potential), progress or (lambda *_: None)
    tasks, failures = plan_all(surface, still, given, say)
    failures = [*left_out(chosen, given), *failures]
    if not tasks and len(still) == len(chosen):
        raise UserError(f"No property could be computed: {'; '.join(failures)}.")
    there = [atoms for task in tasks for atoms in task.plan.structures]
    mean = surface.points(there)
    drawn = potential.sample(samples, seed) if potential.variances is not None and samples else None
    outputs = _sampled_outputs(surface, tasks, there, drawn, full, say)
    novelty = surface.novelty(there)
    results = PropertyResults((), (), tuple(there), tuple(failures), len(drawn or ()), full)
    for task, found in zip(tasks, outputs, strict=True):
        largest = None if novelty is None else novelty[task.slice]
        results = _with_task(results, task, mean[task.slice], found, largest, potential.calibration)
    for calculation in chosen:
        if isinstance(calculation, Motion):
            for _, (atoms,), prefix in applications([calculation], given):
                start = calculation.start(atoms)
                results = _with_motion(results, calculation.run(potential, start, samples, seed, say), start, prefix)
    return results


def _sampled_outputs(
    surface: EnergySurface,
    tasks: Sequence[PlannedCalculation],
    structures: Sequence[Atoms],
    drawn: PosteriorSamples | None,
    full: bool,
    say: Progress,
) -> list[list[Outputs | Failed]]:
    """For each task, its outputs on each sample: at the structures of all tasks together, or with `full` at those of the sample's own."""
    outputs: list[list[Outputs | Failed]] = [[] for _ in tasks]
    if drawn is None or not tasks:
        return outputs
    if full:
        for k, sample in enumerate(drawn):
            say("samples", k, len(drawn), f"sample {k + 1} of {len(drawn)} relaxes its own structures")
            for task, found in zip(tasks, outputs, strict=True):
                found.append(_on_surface(EnergySurface(sample), task.calculation, task.structures, task.plan.curves))
        say("samples", len(drawn), len(drawn), "")
        return outputs
    responses = ion_responses(surface, tasks, say)
    for points in _sampled_points(drawn, structures, say):
        for task, answer, found in zip(tasks, responses, outputs, strict=True):
            found.append(corrected_outputs(task, answer, points[task.slice]))
    return outputs


def _with_motion(results: PropertyResults, moved: TransportResults, start: Atoms, prefix: str) -> PropertyResults:
    """The results with averages over dynamics of one structure."""
    return replace(
        results,
        values=(*results.values, *(replace(value, name=prefix + value.name) for value in moved.values)),
        curves=(*results.curves, *(replace(curve, name=prefix + curve.name) for curve in moved.curves)),
        structures=(*results.structures, start),
        failures=(*results.failures, *(f"{start.info['name']}: {note}" for note in moved.notes)),
    )


def exact_properties(
    surface: EnergySurface,
    structures: Sequence[Atoms] | Atoms,
    what: Sequence[str] | Sequence[Calculation] | None = None,
) -> dict[str, float | np.ndarray]:
    """The same numbers on one surface, by name: the truth of an oracle (EnergySurface.of_calculator), from relaxations of its own."""
    given = named([structures] if isinstance(structures, Atoms) else structures)
    found: dict[str, float | np.ndarray] = {}
    for calculation, these, prefix in applications(_chosen(given, what), given):
        outputs = _on_surface(surface, calculation, these)
        if isinstance(outputs, Failed):
            raise UserError(f"{calculation.name}: {outputs}.")
        found |= {prefix + name: value for name, value in outputs.items()}
    return found


def named(structures: Sequence[Atoms]) -> list[Atoms]:
    """Copies whose info['name'] differ: a number is added to a name that comes again, one that makes no other structure's name.

    Raises:
        UserError: there are none, or one has constraints that no sample can hold.
    """
    if not structures:
        raise UserError("There are no structures: give one or more.")
    names = structure_names(structures)
    for atoms, name in zip(structures, names, strict=True):
        check_supported(atoms, name)
    times, taken, out = Counter(names), set(names), []
    for atoms, name in zip(structures, names, strict=True):
        numbered = (f"{name}_{k}" for k in count(1))
        out.append(atoms.copy())
        out[-1].info["name"] = name if times[name] == 1 else next(new for new in numbered if new not in taken)
        taken.add(out[-1].info["name"])
    return out


def _chosen(structures: list[Atoms], what: Sequence[Any] | None) -> list[Calculation]:
    if what is None or all(isinstance(each, str) for each in what):
        return choose_calculations(structures, what)
    check_suited(what, structures)
    return list(what)


def applications(
    chosen: Sequence[Calculation], structures: Sequence[Atoms]
) -> Iterator[tuple[Calculation, tuple[Atoms, ...], str]]:
    """Each calculation with the structures of one plan, which it suits, and what goes before the names of its outputs."""
    for calculation in chosen:
        if calculation.several or len(structures) == 1:
            yield calculation, tuple(structures), ""
        else:
            reasons = calculation.refusals(structures)
            suited = [atoms for atoms, why in zip(structures, reasons, strict=True) if not why]
            yield from ((calculation, (atoms,), f"{atoms.info['name']}.") for atoms in suited)


def left_out(chosen: Sequence[Calculation], structures: Sequence[Atoms]) -> list[str]:
    """Which structures a calculation does not suit, and why."""
    found = []
    for calculation in chosen:
        reasons = zip(structure_names(structures), calculation.refusals(structures), strict=True)
        found += [f"{name}.{calculation.name} is left out: {why}" for name, why in reasons if why]
    return found


def plan_all(
    surface: EnergySurface, chosen: Sequence[Calculation], structures: Sequence[Atoms], say: Progress
) -> tuple[list[PlannedCalculation], list[str]]:
    """Plans on the mean, and why some cannot be made."""
    tasks: list[PlannedCalculation] = []
    failures, first = [], 0
    wanted = list(applications(chosen, structures))
    for k, (calculation, these, prefix) in enumerate(wanted):
        say("structures", k, len(wanted), f"{prefix}{calculation.name}: relaxing on the mean potential")
        try:
            plan = calculation.plan(surface, these)
            plan.evaluate(surface.points(plan.structures))
        except Failed as why:
            failures.append(f"{prefix}{calculation.name}: {why}")
            continue
        failures += [f"{prefix}{name}: {why}" for name, why in plan.missing.items()]
        tasks.append(PlannedCalculation(calculation, these, prefix, plan, first))
        first += len(plan.structures)
    say("structures", len(wanted), len(wanted), f"{first} structures")
    return tasks, failures


def ion_responses(
    surface: EnergySurface, tasks: Sequence[PlannedCalculation], say: Progress
) -> list[dict[int, IonResponse]]:
    """For each plan, the responses of the structures whose force constants serve."""
    wanted = [sorted(set(task.plan.relaxed.values())) for task in tasks]
    total, done, out = sum(map(len, wanted)), 0, []
    for task, indices in zip(tasks, wanted, strict=True):
        here = {}
        for i in indices:
            atoms = task.plan.structures[i]
            say("force constants", done, total, structure_names([atoms])[0])
            whole = atoms.cell.rank == 3 and atoms.pbc.any()
            compliance = inverse_hessian(surface.hessian(atoms))
            here[i] = IonResponse(compliance, surface.strain_response(atoms)[0] if whole else None)
            done += 1
        out.append(here)
    if total:
        say("force constants", total, total, "")
    return out


def _sampled_points(drawn: PosteriorSamples, structures: Sequence[Atoms], say: Progress) -> list[list[Point]]:
    """Points of all structures, for each sample."""
    points: list[list[Point]] = [[] for _ in range(len(drawn))]
    whole = structures_from_ase(structures, structure_names(structures))
    for part in chunk_structures(whole, CHUNK_ATOMS):
        say("samples", len(points[0]), len(structures), f"{len(drawn)} samples of the potential")
        predicted = drawn(part)
        energies, forces, stresses = (
            v.detach().cpu().numpy() for v in (predicted.energies, predicted.forces, predicted.stresses)
        )
        ends = np.cumsum(np.bincount(part.structure_of_atom.cpu().numpy(), minlength=len(part)))[:-1]
        for k, mine in enumerate(points):
            each = zip(energies[k].tolist(), np.split(forces[k], ends), np.nan_to_num(stresses[k]), strict=True)
            mine.extend(Point(*values) for values in each)
    say("samples", len(structures), len(structures), "")
    return points


def corrected_outputs(
    task: PlannedCalculation, responses: Mapping[int, IonResponse], points: Sequence[Point]
) -> Outputs | Failed:
    """Outputs of one sample, with the Newton step of the ions that are at rest on the mean."""
    moved = list(points)
    try:
        for i, reference in task.plan.relaxed.items():
            moved[i] = responses[reference].corrected(points[i], task.plan.structures[i])
        return task.plan.evaluate(moved)
    except Failed as why:
        return why


def _on_surface(
    surface: EnergySurface, calculation: Calculation, structures: Sequence[Atoms], axes: Mapping[str, CurveAxis] = {}
) -> Outputs | Failed:
    """Outputs from structures that are made on this surface; curves over the given axes, unless they go along marked places."""
    try:
        plan = calculation.plan(surface, structures)
        outputs = dict(plan.evaluate(surface.points(plan.structures)))
    except Failed as why:
        return why
    for name, axis in axes.items():
        if name not in plan.curves or _labels(axis) != _labels(plan.curves[name]):
            outputs.pop(name, None)  # another symmetry has another path
            continue
        own = plan.curves[name].x
        if not axis.ticks and not np.array_equal(own, axis.x):
            columns = np.asarray(outputs[name], dtype=float).reshape(len(own), -1).T
            moved = np.stack([np.interp(axis.x, own, y, np.nan, np.nan) for y in columns], axis=-1)
            outputs[name] = moved.reshape(len(axis.x), *np.shape(outputs[name])[1:])
    return outputs


def _labels(axis: CurveAxis) -> list[str]:
    return [label for _, label in axis.ticks]


def _with_task(
    results: PropertyResults,
    task: PlannedCalculation,
    mean: Sequence[Point],
    found: Sequence[Outputs | Failed],
    novelty: np.ndarray | None,
    calibration: Calibration,
) -> PropertyResults:
    """The results with the values and curves of one task.

    Args:
        novelty: of each of its structures; by how much wider than samples it makes results, the calibration says.
    """
    plan, values, curves = task.plan, [], []
    outputs = plan.evaluate(mean)
    reasons = Counter(str(each) for each in found if isinstance(each, Failed))
    failures = [
        f"{task.prefix}{task.calculation.name}: {n} of {len(found)} samples: {why}" for why, n in reasons.items()
    ]
    names = tuple(structure_names(plan.structures))
    for name in plan.units:
        value = outputs[name]
        nothing = np.full(np.shape(value), np.nan)
        told: list[Outputs] = [{} if isinstance(each, Failed) or name not in each else each for each in found]
        told = [each if each and np.shape(each[name]) == nothing.shape else {} for each in told]
        samples = np.array([each.get(name, nothing) for each in told], dtype=float)
        full_name, unit, about = task.prefix + name, plan.units[name], plan.about.get(name, "")
        sources = np.asarray(plan.sources.get(name, range(len(names))))
        largest = None if novelty is None else novelty[sources].max(-1)
        wider = 1.0 if largest is None else calibration.functional_widening(torch.as_tensor(largest)).numpy()
        if name in plan.curves:
            axis, value = plan.curves[name], np.asarray(value, dtype=float)
            sigma = spread(samples, value) if len(samples) else np.full_like(value, np.nan)
            sigma = (sigma.T * wider).T
            lost = sum(name not in each for each in told)
            numbers = axis.x, axis.label, axis.unit, value, sigma, unit, axis.ticks
            curves.append(PropertyCurve(full_name, *numbers, len(found), lost, about))
            if other := lost - sum(reasons.values()):
                failures.append(
                    f"{full_name}: {other} of {len(found)} samples have another symmetry, and so another curve"
                )
        else:
            more: dict[str, Any] = {"about": about, "calculation": task.calculation.name}
            more |= {"structures": tuple(names[i] for i in sources), "wider": float(wider)}
            if largest is not None:
                more["novelty"] = float(largest)
            values.append(value_from_samples(full_name, unit, float(value), samples, **more))
    if unsure := [
        value.name for value in values if len(found) and not has_spread(len(found) - value.failed, len(found))
    ]:
        failures.append(
            f"{', '.join(unsure)}: no error bar, as fewer than {FEWEST} or than half of the samples have a value"
        )
    return replace(
        results,
        values=(*results.values, *values),
        curves=(*results.curves, *curves),
        failures=(*results.failures, *failures),
    )
