"""Observables averaged over a trajectory: energy, pressure, radial distribution, diffusion, or any function of a frame.

`make` turns recipes into an Observer, which is called with each frame (an ase.Atoms with the results of its calculator) and gives the
values that a History keeps.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError

from gpmlp.core import errors, units
from gpmlp.core.errors import UserError
from gpmlp.core.radial_distribution import radial_distribution
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.learning.recipe import ObservableRecipe
from gpmlp.uncertainty import timeseries

Value = float | np.ndarray


def potential_energy(frame: Atoms) -> float:
    """Potential energy per atom, eV/atom."""
    return float(frame.get_potential_energy()) / len(frame)


def kinetic_temperature(frame: Atoms) -> float:
    """Kinetic temperature, K."""
    return float(frame.get_temperature())


def instantaneous_pressure(frame: Atoms) -> float:
    """p = −tr σ / 3 + 2 E_kin / (3 V), GPa, positive = compression.

    Raises:
        UserError: a frame that has no stress, such as one that is not periodic.
    """
    try:
        virial = -float(frame.get_stress(voigt=True)[:3].mean())
    except (PropertyNotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(
            "observable 'pressure' needs a stress; this frame has none (is it periodic, with a cell?). Take 'energy' instead."
        ) from error
    return (virial + 2 * frame.get_kinetic_energy() / (3 * frame.get_volume())) / units.GPA


class UnwrappedPath:
    """Unwrapped positions of the last `lag_fs` of one trajectory, and how far atoms moved in that time.

    Between frames an atom is taken to have moved to its nearest image: frames must be so close that none moves half a cell. The drift
    of the centre of mass is taken off.
    """

    def __init__(self, lag_fs: float) -> None:
        self.lag = lag_fs
        self.times = np.zeros(0)
        self.positions = np.zeros((0, 0, 3))
        self.last: np.ndarray | None = None  # fractional (atoms, 3) along periodic axes of the last frame

    def add(self, frame: Atoms, time_fs: float) -> None:
        """Take the next frame; one earlier than the last sets the path back to that time."""
        back = self.times >= time_fs - 1e-9
        if back.any() or (len(self.times) and self.positions.shape[1] != len(frame)):
            self.times, self.positions, self.last = self.times[:0], self.positions[:0], None
        cell, periodic = frame.cell.complete().array, np.asarray(frame.pbc)
        fractional = np.linalg.solve(cell.T, frame.positions.T).T
        if self.last is None:
            here = frame.positions.copy()
        else:
            moved = fractional - self.last
            moved[:, periodic] -= np.round(moved[:, periodic])
            step = moved @ cell
            masses = frame.get_masses()[:, None]
            here = self.positions[-1] + step - (masses * step).sum(0) / masses.sum()
        self.last = fractional
        spacing = time_fs - self.times[-1] if len(self.times) else 0.0  # room for one frame more than the lag
        within = self.times >= time_fs - self.lag - spacing
        self.times = np.append(self.times[within], time_fs)
        self.positions = np.concatenate([self.positions[within].reshape(-1, len(frame), 3), here[None]])

    def squared_displacement(self, lag_fs: float) -> tuple[float, float]:
        """(lag in fs nearest to the one asked for, mean squared displacement over it in A²); NaN where the path is too short."""
        if len(self.times) < 2:
            return math.nan, math.nan
        lags = self.times[-1] - self.times[:-1]
        k = int(np.abs(lags - lag_fs).argmin())
        if abs(lags[k] - lag_fs) > 0.51 * (self.times[-1] - self.times[-2]):
            return math.nan, math.nan
        moved = self.positions[-1] - self.positions[k]
        return float(lags[k]), float((moved**2).sum(1).mean())

    def state(self) -> dict[str, np.ndarray]:
        """Arrays, from which `from_state` restores the path exactly."""
        last = np.zeros((0, 3)) if self.last is None else self.last
        return {"times": self.times, "positions": self.positions, "last": last}

    @staticmethod
    def from_state(lag_fs: float, state: Mapping[str, np.ndarray]) -> UnwrappedPath:
        path = UnwrappedPath(lag_fs)
        path.times, path.positions = np.array(state["times"]), np.array(state["positions"])
        path.last = np.array(state["last"]) if len(state["last"]) else None
        return path


def mean_squared_displacement(path: UnwrappedPath) -> float:
    """Mean squared displacement over the last lag, A²: a stationary series, the mean of which is MSD(lag)."""
    return path.squared_displacement(path.lag)[1]


def diffusion_estimate(path: UnwrappedPath) -> float:
    """D = (MSD(lag) − MSD(lag/2)) / (6 · lag/2), A²/fs (0.1 cm²/s): Einstein's relation without the ballistic start."""
    (long, far), (short, near) = path.squared_displacement(path.lag), path.squared_displacement(path.lag / 2)
    return (far - near) / (6 * (long - short)) if long > short else math.nan


def diffusion_of(frames: Sequence[Atoms], times_fs: Sequence[float], lag_fs: float) -> tuple[float, float]:
    """Diffusion coefficient of a whole trajectory and its standard error, A²/fs.

    Raises:
        UserError: a trajectory that is not longer than the lag.
    """
    path, estimates = UnwrappedPath(lag_fs), []
    for frame, time in zip(frames, times_fs, strict=True):
        path.add(frame, float(time))
        estimates.append(diffusion_estimate(path))
    finite = np.array([d for d in estimates if not math.isnan(d)])
    if len(finite) < 2:
        raise UserError(f"`lag_fs` = {lag_fs} fs is as long as the trajectory; take a shorter one.")
    mean = timeseries.series_mean(finite)
    return float(mean.value[0]), mean.sem


def load_function(name: str) -> Callable[[Atoms], Value]:
    """The function 'module:function'. Raises UserError: a module that cannot be imported, or no such function in it."""
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module does on import
        raise UserError(
            f"observable '{name}': module '{module_name}' cannot be imported ({type(error).__name__}: {error}). "
            "It has to be in the folder of the recipe or the one you start from, or be installed."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        public = [n for n in dir(module) if not n.startswith("_") and callable(getattr(module, n))]
        raise UserError(
            f"observable '{name}': no function '{function_name}' in {module_name}.{errors.suggest_name(function_name, public)}"
        )
    return function


class Observer:
    """Values of the observables of a recipe, frame by frame; keeps a Path for each walker where displacements are asked for."""

    def __init__(self, recipes: Sequence[ObservableRecipe]) -> None:
        """Load what is asked for. Raises UserError: a function of the user's that cannot be loaded, or a pair that is none."""
        self.recipes = tuple(recipes)
        self._functions = {r.name: load_function(r.name) for r in self.recipes if ":" in r.name}
        self._pairs = {r.name: _pair(r.pair) for r in self.recipes if r.pair}
        self._paths: dict[tuple[str, int], UnwrappedPath] = {}

    def __call__(self, frame: Atoms, walker: int = 0, time_fs: float = 0.0) -> dict[str, Value]:
        """Value of each observable, by name; NaN while it is unknown.

        Args:
            frame: with the results of a calculator, and momenta where temperature or pressure are asked for.
        """
        return {r.name: self._value(r, frame, walker, time_fs) for r in self.recipes}

    def _value(self, recipe: ObservableRecipe, frame: Atoms, walker: int, time_fs: float) -> Value:
        name = recipe.name
        if name == "rdf":
            structures = structures_from_ase([frame], [f"walker {walker} at {time_fs:g} fs"])
            return radial_distribution(structures, recipe.cutoff, recipe.bins, self._pairs.get(name))[1]
        if name in ("msd", "diffusion"):
            path = self._paths.setdefault((name, walker), UnwrappedPath(recipe.lag_fs))
            path.add(frame, time_fs)
            return mean_squared_displacement(path) if name == "msd" else diffusion_estimate(path)
        if name in self._functions:
            return _checked(name, self._functions[name], frame)
        return {"energy": potential_energy, "pressure": instantaneous_pressure, "temperature": kinetic_temperature}[
            name
        ](frame)

    def state(self) -> dict[str, np.ndarray]:
        """Arrays by name, for npz or safetensors, from which `restore` goes on exactly."""
        return {f"{n}/{w}/{k}": v for (n, w), path in self._paths.items() for k, v in path.state().items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> Observer:
        """Return an observer of the same recipes that goes on where state was."""
        observer, lags = Observer(self.recipes), {r.name: r.lag_fs for r in self.recipes}
        for name, walker in {tuple(key.split("/")[:2]) for key in state if key.split("/")[0] in lags}:
            arrays = {key.split("/")[2]: v for key, v in state.items() if key.startswith(f"{name}/{walker}/")}
            observer._paths[name, int(walker)] = UnwrappedPath.from_state(lags[name], arrays)
        return observer


def make_observer(recipes: Sequence[ObservableRecipe], starts: Sequence[Atoms] = ()) -> Observer:
    """The observer of `StopRecipe.observables`.

    Raises:
        UserError: as Observer; or one of the starts, which trajectories begin from, has no such pair of atoms, volume or stress.
    """
    observer = Observer(recipes)
    for recipe in recipes:
        for i, atoms in enumerate(starts):
            if recipe.name not in ("rdf", "pressure"):
                continue
            structures = structures_from_ase([atoms], [f"start {i}"])
            if recipe.name == "rdf":
                radial_distribution(structures, recipe.cutoff, recipe.bins, observer._pairs.get(recipe.name))
            if recipe.name == "pressure" and bool(structures.volumes.isnan().any()):
                raise UserError(
                    f"observable 'pressure' needs a stress, and start {i} is not periodic in all directions; take 'energy' instead."
                )
    return observer


def _pair(text: str) -> tuple[int, int]:
    parts = text.split("-")
    if len(parts) != 2:
        raise UserError(f"`pair` must be two chemical symbols as O-H; got '{text}'.")
    return errors.atomic_number(parts[0]), errors.atomic_number(parts[1])


def _checked(name: str, function: Callable[[Atoms], Value], frame: Atoms) -> Value:
    """The value of a user's function, if it can be used."""
    try:
        value = function(frame)
        array = np.asarray(value, dtype=np.float64)
    except Exception as error:  # whatever a function of the user's raises
        raise UserError(f"observable '{name}' failed on a frame: {type(error).__name__}: {error}") from error
    if array.ndim > 1 or not array.size or np.isinf(array).any():
        raise UserError(
            f"observable '{name}' must give a finite number or vector (NaN = not known); got shape {array.shape}"
            f"{' with infinite values' if array.size and np.isinf(array).any() else ''}."
        )
    return float(array) if array.ndim == 0 else array
