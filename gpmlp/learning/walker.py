"""A Walker is a trajectory of molecular dynamics as a value; advanced on a potential it gives a snapshot: prediction and decision."""

from __future__ import annotations

import copy
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import all_changes
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.stress import full_3x3_to_voigt_6_stress

from gpmlp.core.errors import UserError
from gpmlp.core.neighbors import Neighbors
from gpmlp.core.quantities import Prediction
from gpmlp.core.structures import Structures
from gpmlp.core.verlet_list import VerletList
from gpmlp.engines.ase import GPCalculator
from gpmlp.engines.md import Bath, Integrator, draw_velocities, ensure_velocities
from gpmlp.io.ase_atoms import ELECTRONIC, calculator_results, structures_from_ase
from gpmlp.io.charges import CHARGE, set_charge, stated_charge
from gpmlp.learning import exploration
from gpmlp.learning.recipe import DynamicsRecipe
from gpmlp.learning.triggers import SURE, StepContext, TriggerDecision, guard_decision
from gpmlp.potential.potential import Potential

CHEAP = ("sampled_forces",)  # variances of every few steps
FULL = ("forces", "sampled_forces")
LOCAL = ("atom_energies",)  # with both, where these have a limit
STRIDES_AHEAD = 8  # that a walker looks ahead at most for a frame worth a label
SWELLING = 2.0  # factor on the volume in one step at which the dynamics counts as lost


@dataclass(frozen=True, eq=False)
class Walker:
    """Where a trajectory is.

    Attributes:
        atoms: with momenta; never changed in place.
        step: number of accepted steps; falls when the walker is set back.
        p_eps, force_eps: momentum of the cell (npt) and the force on it, as LangevinBAOAB has them; its force is of half a step
            before the velocities, so it cannot be computed again. None = compute it.
        chance: state of the random numbers of the thermostat.
        energy: potential energy at this step, eV; None = not computed yet.
    """

    number: int
    atoms: Atoms
    step: int
    p_eps: Any
    chance: Mapping[str, Any]
    energy: float | None = None
    force_eps: Any = None

    @staticmethod
    def from_atoms(number: int, atoms: Atoms, dynamics: DynamicsRecipe, seed: int) -> Walker:
        """A structure with velocities of the first temperature, unless it has some.

        Raises:
            UserError: npt of what is not periodic.
        """
        if dynamics.ensemble == "npt" and not atoms.pbc.all():
            raise UserError(
                "dynamics.ensemble npt needs a start that is periodic in all directions; take nvt, or give it a cell and pbc."
            )
        generator = np.random.default_rng([seed, number])
        atoms = atoms.copy()
        ensure_velocities(atoms, dynamics.temperature(0), generator)
        # only what a state holds, so that a run that is resumed leaves the same files as one that is not
        return Walker.from_state(*Walker(number, atoms, 0, 0.0, generator.bit_generator.state).state())

    @property
    def generator(self) -> np.random.Generator:
        """The random numbers from here on."""
        generator = np.random.default_rng(0)
        generator.bit_generator.state = copy.deepcopy(self.chance)
        return generator

    def with_new_velocities(self, dynamics: DynamicsRecipe, salt: int) -> Walker:
        """The same place with new velocities and random numbers, so that a trajectory does not repeat itself."""
        generator = np.random.default_rng([salt, self.number, self.step])
        atoms = self.atoms.copy()
        draw_velocities(atoms, dynamics.temperature(self.step), generator)
        return replace(self, atoms=atoms, p_eps=0.0, force_eps=None, chance=generator.bit_generator.state)

    def state(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """A JSON-able header and tensors, from which it goes on bit by bit."""
        header = {
            "number": self.number,
            "step": self.step,
            "chance": json.dumps(self.chance),
            "energy": self.energy,
            "pbc": self.atoms.pbc.tolist(),
        }
        charge = stated_charge(self.atoms.info, f"walker {self.number}")
        header |= {} if charge is None else {CHARGE: charge}
        tensors = {
            "numbers": torch.as_tensor(self.atoms.numbers.astype(np.int64)),
            "positions": torch.as_tensor(self.atoms.positions.copy()),
            "momenta": torch.as_tensor(self.atoms.get_momenta().copy()),
            "masses": torch.as_tensor(self.atoms.get_masses().copy()),
            "cell": torch.as_tensor(self.atoms.cell.array.copy()),
            "p_eps": torch.as_tensor(np.array(self.p_eps, dtype=float).reshape(-1)),
            "force_eps": torch.as_tensor(np.array([] if self.force_eps is None else self.force_eps, float).reshape(-1)),
            "fixed": torch.as_tensor(fixed_atoms(self.atoms)),
        }
        tensors |= {key: torch.as_tensor(self.atoms.arrays[key]) for key in ELECTRONIC.values() if self.atoms.has(key)}
        return header, tensors

    @staticmethod
    def from_state(header: dict, tensors: dict[str, torch.Tensor]) -> Walker:
        """What `state` gave."""
        t = {name: value.numpy() for name, value in tensors.items()}
        atoms = Atoms(t["numbers"], t["positions"], cell=t["cell"], pbc=header["pbc"])
        for key in ELECTRONIC.values():
            if key in t:
                atoms.set_array(key, t[key])
        if CHARGE in header:
            set_charge(atoms, header[CHARGE])
        if (t["masses"] != atoms.get_masses()).any():
            atoms.set_masses(t["masses"])
        atoms.set_constraint(FixAtoms(t["fixed"]) if len(t["fixed"]) else None)
        atoms.set_momenta(t["momenta"])
        p_eps, force_eps = (_number_or_matrix(t[name]) for name in ("p_eps", "force_eps"))
        chance = json.loads(header["chance"])
        return Walker(header["number"], atoms, header["step"], p_eps, chance, header["energy"], force_eps)


def _number_or_matrix(flat: np.ndarray) -> Any:
    """A number, a matrix or None, from as many numbers."""
    return None if not len(flat) else float(flat[0]) if len(flat) == 1 else flat.reshape(3, 3).copy()


@dataclass(frozen=True, eq=False)
class WalkerSnapshot:
    """A walker with the prediction there.

    Attributes:
        structure, prediction: of one structure.
        decision: what follows.
        worst: where a label is asked for, the frame to be labelled (`look_ahead`); None: this one.
        exceedances: probabilities that a force error was beyond its limit, at each estimate of force variances since the last snapshot.
    """

    walker: Walker
    structure: Structures
    prediction: Prediction
    decision: TriggerDecision
    temperature_K: float
    worst: WalkerSnapshot | None = None
    exceedances: tuple[float, ...] = ()

    @property
    def full(self) -> bool:
        """Whether it holds force variances."""
        return self.prediction.forces_covariance is not None

    @property
    def force_variances(self) -> torch.Tensor:
        """(atoms, 3) of a full one, eV^2/A^2."""
        assert self.prediction.forces_covariance is not None
        return self.prediction.forces_covariance.total.diagonal(dim1=1, dim2=2)

    @property
    def novelty(self) -> np.ndarray:
        """(atoms,) in thresholds."""
        assert self.prediction.novelty is not None
        return self.prediction.novelty.numpy()


Variances = str | tuple[str, ...] | None
DecideFunction = Callable[[Structures, Prediction, StepContext], TriggerDecision]
PredictFunction = Callable[[Structures, Variances, Neighbors | None], Prediction]


class _LostError(Exception):
    """Dynamics has left what can be predicted at all."""


class RecordingCalculator(GPCalculator):
    """ASE calculator whose forces may be biased, with the variances that `variance` asks for."""

    def __init__(self, potential: Potential, name: str, bias: float, ask: PredictFunction) -> None:
        super().__init__(potential, name)
        self.ask, self.bias = ask, exploration.UncertaintyBias(bias) if bias else None
        self.variance: Variances = None
        self.volume = 0.0

    def take_over(self, atoms: Atoms, snapshot: WalkerSnapshot) -> None:
        """Use the prediction of a snapshot for its atoms."""
        self.atoms, self.structures, self.prediction = atoms.copy(), snapshot.structure, snapshot.prediction
        self.volume = abs(atoms.cell.volume)
        self.results = self._ase_results()

    @property
    def last(self) -> tuple[Structures, Prediction]:
        """The structure and prediction of the last call."""
        assert self.structures is not None and self.prediction is not None
        return self.structures, self.prediction

    def _ase_results(self) -> dict[str, Any]:
        """Results that drive the dynamics: those of the potential, and the bias."""
        structure, prediction = self.last
        results = calculator_results(prediction, 0, slice(0, structure.n_atoms))
        if self.bias is not None:
            energy, forces, stress = self.bias(self.potential, structure, prediction.forces)
            results["energy"] += energy
            results["free_energy"] = results["energy"]
            results["forces"] = results["forces"] + forces.numpy()
            if "stress" in results:
                results["stress"] = results["stress"] + full_3x3_to_voigt_6_stress(stress.numpy())
        return results

    def _predict(self) -> Prediction:
        assert self.structures is not None
        return self.ask(self.structures, self.variance, self._candidates)

    def calculate(self, atoms: Atoms | None = None, properties=("energy",), system_changes=tuple(all_changes)) -> None:
        """Predict."""
        volume = abs((self.atoms if atoms is None else atoms).cell.volume)
        if self.volume and not 1 / SWELLING < volume / self.volume < SWELLING:
            raise _LostError(f"the volume went from {self.volume:.4g} to {volume:.4g} A^3")
        try:
            super().calculate(atoms, properties, system_changes)
        except UserError as error:  # atoms on top of one another, numbers that are none
            raise _LostError(str(error)) from error


def predict_alone(potential: Potential) -> PredictFunction:
    """Predictions of one structure at a time: to the last bit the same whoever asks, but for the variances."""
    return lambda structure, variance, pairs: potential(structure, variance, novelty=True, pairs=pairs)


def take_snapshot(
    walker: Walker, potential: Potential, decide: DecideFunction, dynamics: DynamicsRecipe, local: bool = False
) -> WalkerSnapshot:
    """Predict with force variances where a walker is, with those of local energies if wanted, and decide."""
    structure = structures_from_ase([walker.atoms], [f"walker {walker.number}, step {walker.step}"])
    wanted = FULL + LOCAL * local
    prediction = predict_alone(potential)(structure, wanted, VerletList(potential.reach)(structure))
    temperature = walker.atoms.get_temperature()
    freedom = walker.atoms.get_number_of_degrees_of_freedom()
    context = StepContext(None, dynamics.temperature(walker.step), temperature, freedom)
    return WalkerSnapshot(walker, structure, prediction, decide(structure, prediction, context), temperature)


def atoms_with_results(snapshot: WalkerSnapshot) -> Atoms:
    """The atoms of a snapshot with the prediction as results of their calculator."""
    atoms = snapshot.walker.atoms.copy()
    atoms.calc = SinglePointCalculator(atoms, **calculator_results(snapshot.prediction, 0, slice(0, len(atoms))))
    return atoms


def advance_walker(
    snapshot: WalkerSnapshot,
    potential: Potential,
    decide: DecideFunction,
    dynamics: DynamicsRecipe,
    timestep_fs: float,
    steps: int,
    watch: int = 1,
    bias: float = 0.0,
    predict: PredictFunction | None = None,
    local: bool = False,
) -> WalkerSnapshot:
    """Make steps until the decision is not to go on, with force variances at the last one.

    In between, force variances are estimated from posterior samples every few steps, and computed where the decision by these estimates
    is not to go on. Estimates of the atoms of a species are in proportion to what they were where variances were computed last.

    Args:
        snapshot: with force variances, by the same potential.
        watch: steps from one estimate to the next; guards and novelty hold in every step.
        bias: share of the rms forces that pushes towards uncertainty.
        predict: who predicts; None: the potential, and forces of the first step are those of the snapshot. Others, whose last digits
            need not be those of the potential alone, are asked for these too, so that results do not depend on who predicted last.
        local: whether variances of local energies are wanted beside those of forces.
    """
    walker, generator = snapshot.walker, snapshot.walker.generator
    name = f"walker {walker.number}, step {walker.step} to {walker.step + steps}"
    atoms, calculator = _begun(
        snapshot, RecordingCalculator(potential, name, bias, predict or predict_alone(potential)), predict is None
    )
    bath, cell_state = bath_of(dynamics), (walker.p_eps, walker.force_eps)
    integrator = Integrator(atoms, bath, timestep_fs, generator, walker.step, cell_state)
    ratio = _computed_to_estimated_variance(snapshot.prediction, snapshot.structure)
    energy, freedom = float(snapshot.prediction.energies[0]), atoms.get_number_of_degrees_of_freedom()
    exceedances: list[float] = []
    computed, estimated = FULL + LOCAL * local, CHEAP + LOCAL * local
    for k in range(1, steps + 1):
        calculator.variance = computed if k == steps else estimated if k % watch == 0 else None
        try:
            step = integrator.advance()
        except _LostError as lost:
            return _lost(snapshot, f"after step {walker.step + k - 1}: {lost}")
        structure, prediction = calculator.last
        temperature = float(np.nan_to_num(atoms.get_temperature(), nan=math.inf, posinf=math.inf, neginf=math.inf))
        context = StepContext(energy, dynamics.temperature(step), temperature, freedom, calculator.pairs)
        decision = decide(structure, prediction if k == steps else _with_estimated_forces(prediction, ratio), context)
        if (
            k < steps and decision.action != "continue" and math.isfinite(decision.severity)
        ):  # not where physics is broken
            prediction = calculator.ask(structure, computed, calculator.pairs)
            decision = decide(structure, prediction, context)
            ratio = _computed_to_estimated_variance(prediction, structure)
        energy = float(prediction.energies[0])
        exceedances += [decision.exceedance] if math.isfinite(decision.exceedance) else []
        if decision.action != "continue":
            break
    atoms.calc = None
    p_eps, force_eps = integrator.cell_state
    now = Walker(walker.number, atoms.copy(), step, p_eps, generator.bit_generator.state, energy, force_eps)
    return WalkerSnapshot(now, structure, prediction, decision, temperature, exceedances=tuple(exceedances))


def _begun(snapshot: WalkerSnapshot, calculator: RecordingCalculator, known: bool) -> tuple[Atoms, RecordingCalculator]:
    """The atoms of a snapshot with a calculator that has the forces there, those of the snapshot if these are `known` to be its own."""
    atoms = snapshot.walker.atoms.copy()
    atoms.calc = calculator
    if known:
        calculator.take_over(atoms, snapshot)
    else:
        calculator.volume = abs(atoms.cell.volume)
        atoms.get_potential_energy()
    return atoms, calculator


def look_ahead(
    advance: Callable[[WalkerSnapshot, DecideFunction, int], WalkerSnapshot],
    snapshot: WalkerSnapshot,
    decide: DecideFunction,
    steps: int,
    likely: float = 0.0,
) -> WalkerSnapshot:
    """A snapshot that asks for a label, with the most severe frame of the steps after it as the one to be labelled.

    Errors come and go with the motion of atoms, and the first frame that asks is at the foot of such a wave, about as likely as not
    within the limit. So the walker goes on as if nothing had been, for a stride and for as many more, up to STRIDES_AHEAD, as it takes to
    come to a frame whose error is likely to be beyond the limit, or to where it would have to halt; these steps are not kept.

    Args:
        advance: makes steps from a snapshot until a decision is not to go on, or as many as there are (`advance_walker`).
        steps: of a stride; likely: probability of an error beyond the limit at which a frame is worth a label.
    """
    passed: list[TriggerDecision] = []

    def watch(structure: Structures, prediction: Prediction, context: StepContext) -> TriggerDecision:
        decision = decide(structure, prediction, context)
        if decision.action != "halt":
            passed.append(decision)
        return decision.withheld()

    start, severest, most_severe = snapshot, None, max(1.0, snapshot.decision.severity)
    for _ in range(STRIDES_AHEAD):
        passed.clear()
        end = advance(start, watch, steps)
        k = max(range(len(passed)), key=lambda i: passed[i].severity, default=0)
        if passed and passed[k].severity > most_severe:
            severest, most_severe = (start, k + 1), passed[k].severity
        if (
            end.decision.action == "halt"
            or not np.fmax.reduce([d.exceedance for d in (snapshot.decision, *passed)]) < likely
        ):
            break
        start = end
    if severest is None:
        return snapshot
    worst = advance(severest[0], watch, severest[1])
    if worst.decision.severity <= snapshot.decision.severity or worst.decision.action == "halt":
        return snapshot
    return replace(snapshot, worst=replace(worst, decision=replace(worst.decision, action="label")))


def _lost(snapshot: WalkerSnapshot, why: str) -> WalkerSnapshot:
    """A decision to halt after what cannot be predicted; all else is of the last snapshot, without force variances."""
    prediction = replace(snapshot.prediction, forces_covariance=None)
    return replace(snapshot, prediction=prediction, decision=guard_decision(why, math.inf))


def _computed_to_estimated_variance(prediction: Prediction, structure: Structures) -> torch.Tensor:
    """(atoms,) sum of the force variances of all atoms of the same species over that of their estimates."""
    computed, estimated = prediction.forces_covariance, prediction.sampled_forces_covariance
    assert computed is not None and estimated is not None
    traces = [c.total.diagonal(dim1=1, dim2=2).sum(1) for c in (computed, estimated)]
    _, slots = structure.species.unique(return_inverse=True)
    sums = [trace.new_zeros(int(slots.max()) + 1).index_add(0, slots, trace) for trace in traces]
    return (sums[0] / sums[1].clamp_min(SURE))[slots]


def _with_estimated_forces(prediction: Prediction, ratio: torch.Tensor) -> Prediction:
    """With force covariances in proportion to their estimates, if these are there."""
    estimated = prediction.sampled_forces_covariance
    if estimated is None:
        return prediction
    return replace(prediction, forces_covariance=estimated.map(lambda part: ratio[:, None, None] * part))


def bath_of(dynamics: DynamicsRecipe) -> Bath:
    """Thermostat and barostat of the recipe."""
    temperature = None if dynamics.ensemble == "nve" else dynamics.temperature
    pressure = dynamics.pressure if dynamics.ensemble == "npt" else None
    return Bath(temperature, dynamics.relaxation_fs, pressure, dynamics.cell == "isotropic")


def fixed_atoms(atoms: Atoms) -> np.ndarray:
    """Indices of atoms that do not move. Raises UserError: a constraint other than FixAtoms."""
    fixed = np.zeros(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        if not isinstance(constraint, FixAtoms):
            raise UserError(f"The start has a {type(constraint).__name__}; only fixed atoms (FixAtoms) can be kept.")
        fixed[constraint.index] = True
    return fixed.nonzero()[0]


# ------------------------------------------------------------ several walkers, whose predictions are batched


def advance_together(
    potential: Potential, tasks: Sequence[Callable[[PredictFunction], WalkerSnapshot]]
) -> list[WalkerSnapshot]:
    """What the tasks return, each of which makes as many predictions as it likes by the function that it gets.

    Tasks take turns: all of them go on, one after another, until each waits for a prediction or has ended; then all predictions are
    made in one batch. What is in one batch, and so the last digits of predictions, follows from the tasks alone.

    Raises:
        Exception: that of the first task that raised one.
    """
    running = [_Task(task) for task in tasks]
    try:
        waiting = running
        while waiting:
            for task in waiting:
                task.resume()
            waiting = [task for task in waiting if not task.ended]
            _reply(potential, waiting)
        return [task.result() for task in running]
    finally:
        for task in running:
            task.close()


class _ClosedError(BaseException):
    """Nobody waits for a task any more."""


class _Task:
    """A task that stops wherever it predicts, in its thread; never more than one of them runs."""

    def __init__(self, function: Callable[[PredictFunction], WalkerSnapshot]) -> None:
        self.function, self.ended = function, False
        self.request: tuple[Structures, Variances, Neighbors]
        self.reply: Prediction | BaseException | None = None
        self._outcome: Any = None
        self._error: BaseException | None = None
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def resume(self) -> None:
        """Let it run until it predicts or ends."""
        self._go.release()
        self._stopped.acquire()

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._outcome

    def close(self) -> None:
        """End it where it is."""
        while not self.ended:
            self.reply = _ClosedError()
            self.resume()
        self._thread.join()

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not isinstance(self.reply, _ClosedError):
                self._outcome = self.function(self._predict)
        except BaseException as error:
            self._error = error
        self.ended = True
        self._stopped.release()

    def _predict(self, structure: Structures, variance: Variances, pairs: Neighbors | None) -> Prediction:
        assert pairs is not None
        self.request = structure, variance, pairs
        self._stopped.release()
        self._go.acquire()
        if isinstance(self.reply, Prediction):
            return self.reply
        assert self.reply is not None
        raise self.reply


def _reply(potential: Potential, tasks: Sequence[_Task]) -> None:
    """One prediction for all tasks that want the same variances."""
    for variance in dict.fromkeys(task.request[1] for task in tasks):
        same = [task for task in tasks if task.request[1] == variance]
        try:
            for task, reply in zip(same, _predict_batch(potential, same, variance), strict=True):
                task.reply = reply
        except UserError:  # of one of them: which one it is shows when they are alone
            for task in same:
                task.reply = _prediction_or_error(potential, task, variance)


def _predict_batch(potential: Potential, tasks: Sequence[_Task], variance: Variances) -> list[Prediction]:
    structures = Structures.concatenate([task.request[0] for task in tasks])
    pairs = Neighbors.batch([task.request[2] for task in tasks], structures.counts.tolist())
    prediction = potential(structures, variance, novelty=True, pairs=pairs)
    return [prediction.select(structures, [k]) for k in range(len(tasks))]


def _prediction_or_error(potential: Potential, task: _Task, variance: Variances) -> Prediction | UserError:
    try:
        return _predict_batch(potential, [task], variance)[0]
    except UserError as error:
        return error
