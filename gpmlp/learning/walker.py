"""A Walker is one trajectory of molecular dynamics as a value: advance it on a potential and get the next one, and what was seen."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase import units as ase_units
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.md.langevinbaoab import LangevinBAOAB
from ase.stress import full_3x3_to_voigt_6_stress

from gpmlp.core import units
from gpmlp.core.errors import UserError
from gpmlp.core.neighbors import Neighbors
from gpmlp.core.quantities import Prediction, Variance
from gpmlp.core.structures import Structures
from gpmlp.core.verlet_list import VerletList
from gpmlp.engines.md import draw_velocities
from gpmlp.io.ase_atoms import calculator_results, structures_from_ase
from gpmlp.learning import exploration
from gpmlp.learning.recipe import DynamicsRecipe
from gpmlp.learning.triggers import Before, Decision
from gpmlp.potential.potential import Potential

CHEAP = "atom_energies"  # looked at every few steps
FULL = ("atom_energies", "forces")
PRESSURE_FACTOR = 10.0  # of the barostat's time constant to the thermostat's
SWELLING = 2.0  # factor on the volume between two looks that no dynamics worth following brings about


@dataclass(frozen=True, eq=False)
class Walker:
    """Where a trajectory is.

    Attributes:
        atoms: with momenta; never changed in place.
        step: number of steps made on accepted dynamics; falls when the walker is set back.
        p_eps, force_eps: momentum of the cell (npt) and the force on it, as LangevinBAOAB has them; its force is of half a step
            before the velocities, so it cannot be found again. None = find it.
        chance: state of the random numbers of the thermostat.
        energy: potential energy at this step, eV; None = not computed yet.
    """

    number: int
    atoms: Atoms
    step: int
    p_eps: Any
    chance: dict
    energy: float | None = None
    force_eps: Any = None

    @staticmethod
    def begin(number: int, atoms: Atoms, dynamics: DynamicsRecipe, seed: int) -> Walker:
        """Take a structure and give it velocities of the first temperature, unless it has some.

        Raises:
            UserError: npt of what is not periodic.
        """
        if dynamics.ensemble == "npt" and not atoms.pbc.all():
            raise UserError(
                "dynamics.ensemble npt needs a start that is periodic in all directions; take nvt, or give it a cell and pbc."
            )
        generator = np.random.default_rng([seed, number])
        if not (atoms.has("momenta") and np.abs(atoms.get_momenta()).max() > 0):
            atoms = _thermal(atoms, dynamics.temperature(0), generator)
        # only what a state keeps, so that a run that is resumed leaves the same files as one that is not
        return Walker.from_state(*Walker(number, atoms, 0, 0.0, generator.bit_generator.state).state())

    @property
    def generator(self) -> np.random.Generator:
        """The random numbers from here on."""
        generator = np.random.default_rng(0)
        generator.bit_generator.state = copy.deepcopy(self.chance)
        return generator

    def rested(self, dynamics: DynamicsRecipe, salt: int) -> Walker:
        """The same place with new velocities and random numbers: where a trajectory must not repeat itself."""
        generator = np.random.default_rng([salt, self.number, self.step])
        atoms = _thermal(self.atoms, dynamics.temperature(self.step), generator)
        return replace(self, atoms=atoms, p_eps=0.0, force_eps=None, chance=generator.bit_generator.state)

    def state(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """A JSON-able header and tensors: all that is needed to go on bit by bit."""
        header = {
            "number": self.number,
            "step": self.step,
            "chance": json.dumps(self.chance),
            "energy": self.energy,
            "pbc": self.atoms.pbc.tolist(),
        }
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
        return header, tensors

    @staticmethod
    def from_state(header: dict, tensors: dict[str, torch.Tensor]) -> Walker:
        """What `state` gave."""
        t = {name: value.numpy() for name, value in tensors.items()}
        atoms = Atoms(t["numbers"], t["positions"], cell=t["cell"], pbc=header["pbc"])
        if (t["masses"] != atoms.get_masses()).any():
            atoms.set_masses(t["masses"])
        atoms.set_constraint(FixAtoms(t["fixed"]) if len(t["fixed"]) else None)
        atoms.set_momenta(t["momenta"])
        about = header["number"], atoms, header["step"], _of_cell(t["p_eps"]), json.loads(header["chance"])
        return Walker(*about, header["energy"], _of_cell(t["force_eps"]))


def _of_cell(flat: np.ndarray) -> Any:
    """A number, a matrix or None, from as many numbers."""
    return None if not len(flat) else float(flat[0]) if len(flat) == 1 else flat.reshape(3, 3).copy()


@dataclass(frozen=True, eq=False)
class Look:
    """What was seen at one step of a walker.

    Attributes:
        walker: there.
        structure, prediction: of one structure; force variances are there if it was looked at fully.
        decision: what follows.
    """

    walker: Walker
    structure: Structures
    prediction: Prediction
    decision: Decision
    temperature_K: float

    @property
    def full(self) -> bool:
        return self.prediction.forces_covariance is not None


Judge = Callable[[Structures, Prediction, Before], Decision]
Ask = Callable[[Structures, str | tuple[str, ...] | None, Neighbors], Prediction]


class _LostError(Exception):
    """Dynamics has left what can be predicted at all."""


class Watched(Calculator):
    """ASE calculator that keeps the whole prediction, and asks for as many variances as it is told to."""

    implemented_properties = ("energy", "free_energy", "forces", "stress")

    def __init__(self, potential: Potential, name: str, bias: float, ask: Ask) -> None:
        super().__init__()
        self.potential, self.label_in_errors, self.bias = potential, name, exploration.Bias(bias) if bias else None
        self.ask = ask
        self.variance: str | tuple[str, ...] | None = None
        self.structure: Structures | None = None
        self.prediction: Prediction | None = None
        self.volume = 0.0
        self.skin, self.pairs = VerletList(potential.reach), None

    def check_state(self, atoms: Atoms, tol: float = 0.0) -> list[str]:
        """What has changed: of the atoms of one walker only places and cell do. ASE's own comparison takes as long as a neighbour list."""
        known = self.atoms
        if known is None:
            return list(all_changes)
        there = {"positions": (known.positions, atoms.positions), "cell": (known.cell.array, atoms.cell.array)}
        return [name for name, (old, new) in there.items() if not np.array_equal(old, new)]

    def remember(self, atoms: Atoms, seen: Look) -> None:
        """Take over what was predicted of these atoms already."""
        self.atoms, self.structure, self.prediction = atoms.copy(), seen.structure, seen.prediction
        self.volume = abs(atoms.cell.volume)
        self._take()

    def _take(self) -> None:
        """Results that drive the dynamics: those of the potential, and the bias."""
        self.results = calculator_results(self.prediction, 0, slice(0, len(self.atoms)))
        if self.bias is not None:
            energy, forces, stress = self.bias(self.potential, self.structure, self.prediction.forces)
            self.results["energy"] += energy
            self.results["free_energy"] = self.results["energy"]
            self.results["forces"] = self.results["forces"] + forces.numpy()
            if "stress" in self.results:
                self.results["stress"] = self.results["stress"] + full_3x3_to_voigt_6_stress(stress.numpy())

    def calculate(self, atoms: Atoms | None = None, properties=("energy",), system_changes=tuple(all_changes)) -> None:
        """Predict."""
        super().calculate(atoms, list(properties), list(system_changes))
        volume = abs(self.atoms.cell.volume)
        if self.volume and not 1 / SWELLING < volume / self.volume < SWELLING:
            raise _LostError(f"the volume went from {self.volume:.4g} to {volume:.4g} A^3")
        try:
            self.structure = structures_from_ase([self.atoms], [self.label_in_errors])
            self.pairs = self.skin(self.structure)
            self.prediction = self.ask(self.structure, self.variance, self.pairs)
        except UserError as error:  # atoms on top of one another, numbers that are none
            raise _LostError(str(error)) from error
        self._take()


def alone(potential: Potential) -> Ask:
    """How a walker that goes alone asks: to the last bit the same wherever it is asked from, but for the variances."""
    return lambda structure, variance, pairs: potential(structure, variance, novelty=True, pairs=pairs)


def look(walker: Walker, potential: Potential, judge: Judge, dynamics: DynamicsRecipe) -> Look:
    """Look fully at where a walker is."""
    structure = structures_from_ase([walker.atoms], [f"walker {walker.number}, step {walker.step}"])
    prediction = alone(potential)(structure, FULL, VerletList(potential.reach)(structure))
    temperature = walker.atoms.get_temperature()
    freedom = walker.atoms.get_number_of_degrees_of_freedom()
    before = Before(None, dynamics.temperature(walker.step), temperature, freedom)
    return Look(walker, structure, prediction, judge(structure, prediction, before), temperature)


def frame(now: Look) -> Atoms:
    """The atoms of a look with what was predicted of them."""
    atoms = now.walker.atoms.copy()
    atoms.calc = SinglePointCalculator(atoms, **calculator_results(now.prediction, 0, slice(0, len(atoms))))
    return atoms


def advance(
    seen: Look,
    potential: Potential,
    judge: Judge,
    dynamics: DynamicsRecipe,
    timestep_fs: float,
    steps: int,
    watch: int = 1,
    bias: float = 0.0,
    ask: Ask | None = None,
) -> Look:
    """Make steps from where a walker was last looked at until the decision is not to go on, and look fully at the last one.

    In between, forces' variances are looked at only where the cheap look (local energies, novelty) gives reason: where the
    standard deviation of a local energy has grown beyond what the last full look found harmless.

    Args:
        seen: a full look, by the same potential.
        watch: steps from one cheap look to the next; guards and novelty are looked at in every step.
        bias: share of the rms forces that pushes towards uncertainty.
        ask: who predicts; None: the potential, and forces of the first step are those of `seen`. Others, whose last digits need not
            be those of the potential alone, are asked for these too, so that nothing depends on who looked last.
    """
    walker = seen.walker
    atoms = walker.atoms.copy()
    name = f"walker {walker.number}, step {walker.step} to {walker.step + steps}"
    atoms.calc = watched = Watched(potential, name, bias, ask or alone(potential))
    generator = walker.generator
    if ask is None:
        watched.remember(atoms, seen)
    else:
        watched.volume = abs(atoms.cell.volume)
        atoms.get_potential_energy()
    integrator = _integrator(atoms, walker, dynamics, timestep_fs, generator)
    harmless = _per_atom_ratio(seen.prediction)
    energy, freedom = float(seen.prediction.energies[0]), atoms.get_number_of_degrees_of_freedom()
    for made in range(1, steps + 1):
        step = walker.step + made
        _set_targets(integrator, dynamics, step)
        watched.variance = FULL if made == steps else CHEAP if made % watch == 0 else None
        try:
            integrator.step()
        except _LostError as lost:
            return _lost(seen, f"after step {step - 1}: {lost}")
        temperature = atoms.get_temperature()
        prediction = watched.prediction
        if not math.isfinite(temperature):
            temperature = math.inf
        before = Before(energy, dynamics.temperature(step), temperature, freedom, watched.pairs)
        if made < steps:
            decision = judge(watched.structure, _with_guess(prediction, harmless), before)
            if decision.action != "continue" and _cheap_is_fine(decision):
                prediction = watched.ask(watched.structure, FULL, watched.pairs)
                decision = judge(watched.structure, prediction, before)
                harmless = _per_atom_ratio(prediction)
        else:
            decision = judge(watched.structure, prediction, before)
        energy = float(prediction.energies[0])
        if decision.action != "continue":
            break
    now = _caught(walker, atoms, step, integrator, generator, energy)
    return Look(now, watched.structure, prediction, decision, temperature)


def _lost(seen: Look, why: str) -> Look:
    """A decision to halt after what cannot even be looked at; all else is as it was seen last, and no full look."""
    decision = Decision("halt", (), why, math.inf)
    return replace(seen, prediction=replace(seen.prediction, forces_covariance=None), decision=decision)


def _cheap_is_fine(decision: Decision) -> bool:
    """Whether looking more closely makes sense: not where physics is broken."""
    return math.isfinite(decision.severity)


def _per_atom_ratio(prediction: Prediction) -> torch.Tensor:
    """Force covariance of each atom per variance of its local energy, (atoms, 3, 3) 1/A^2."""
    local = prediction.atom_energies_variance.total.clamp_min(1e-12)
    return prediction.forces_covariance.total / local[:, None, None]


def _with_guess(prediction: Prediction, ratio: torch.Tensor) -> Prediction:
    """With force covariances guessed from the variances of local energies, if these are there, by the ratios of the last full look."""
    if prediction.atom_energies_variance is None:
        return prediction
    local = prediction.atom_energies_variance.total[:, None, None]
    none = torch.zeros_like(ratio)
    return replace(prediction, forces_covariance=Variance(none, ratio * local, none, none))


def _integrator(
    atoms: Atoms, walker: Walker, dynamics: DynamicsRecipe, timestep_fs: float, generator: np.random.Generator
) -> LangevinBAOAB:
    relaxation = dynamics.relaxation_fs * ase_units.fs
    options: dict[str, Any] = {}
    if dynamics.ensemble != "nve":
        options |= {"temperature_K": dynamics.temperature(walker.step), "T_tau": relaxation, "rng": generator}
    if dynamics.ensemble == "npt":
        stress = -dynamics.pressure(walker.step) * units.GPA
        options |= {"externalstress": stress, "P_tau": PRESSURE_FACTOR * relaxation}
        options |= {"hydrostatic": dynamics.cell == "isotropic"}
    with warnings.catch_warnings():  # it tells of its mass of the cell, and of fixed atoms
        warnings.simplefilter("ignore", UserWarning)
        integrator = LangevinBAOAB(atoms, timestep_fs * ase_units.fs, **options)
    if dynamics.ensemble == "npt":
        integrator.p_eps = copy.deepcopy(walker.p_eps)  # changed in place
        if walker.force_eps is not None:
            integrator.force_eps = copy.deepcopy(walker.force_eps)
    return integrator


def _set_targets(integrator: LangevinBAOAB, dynamics: DynamicsRecipe, step: int) -> None:
    if dynamics.ensemble != "nve" and isinstance(dynamics.temperature_K, tuple):
        integrator.set_temperature(dynamics.temperature(step))
    if dynamics.ensemble == "npt" and isinstance(dynamics.pressure_GPa, tuple):
        stress = -dynamics.pressure(step) * units.GPA
        integrator.externalstress = stress if dynamics.cell == "isotropic" else stress * np.identity(3)


def _caught(
    walker: Walker, atoms: Atoms, step: int, integrator: LangevinBAOAB, generator: np.random.Generator, energy: float
) -> Walker:
    still = atoms.copy()
    still.calc = None
    p_eps, force_eps = (
        copy.deepcopy(getattr(integrator, n, none)) for n, none in (("p_eps", 0.0), ("force_eps", None))
    )
    return Walker(walker.number, still, step, p_eps, generator.bit_generator.state, energy, force_eps)


def _thermal(atoms: Atoms, temperature_K: float, generator: np.random.Generator) -> Atoms:
    """A copy with Maxwell-Boltzmann velocities, the centre of mass at rest."""
    atoms = atoms.copy()
    draw_velocities(atoms, temperature_K, generator)
    return atoms


def fixed_atoms(atoms: Atoms) -> np.ndarray:
    """Indices of atoms that do not move.

    Raises:
        UserError: a constraint other than FixAtoms.
    """
    fixed = np.zeros(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        if not isinstance(constraint, FixAtoms):
            raise UserError(f"The start has a {type(constraint).__name__}; only fixed atoms (FixAtoms) can be kept.")
        fixed[constraint.index] = True
    return fixed.nonzero()[0]


def default_timestep_fs(numbers: np.ndarray) -> float:
    """A time step for the lightest element: 0.5 fs with hydrogen, 1 fs up to neon, else 2 fs."""
    if not len(numbers):
        raise UserError("The start structure has no atoms.")
    lightest = int(numbers.min())
    return 0.5 if lightest == 1 else 1.0 if lightest <= 10 else 2.0
