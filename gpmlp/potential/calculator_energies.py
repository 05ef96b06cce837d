"""CalculatorEnergies is a baseline: what any ASE calculator says of whole structures, so that the difference to it is learned."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpmlp.core import calculators, errors
from gpmlp.core.calculator_pool import PointCalculator, compute_points
from gpmlp.core.calculators import CalculatorError
from gpmlp.core.quantities import Prediction
from gpmlp.core.structures import Structures, electronic_bytes, plain_structure
from gpmlp.potential.baseline import Baseline

ALLOWED = "GPMLP_ALLOW_CALCULATORS"  # names, separated by commas
ANY: str = "any keyword arguments"
PERMITTED: set[tuple[str, str]] = (
    set()
)  # names with keyword arguments, as JSON, that the user asked for in this process
POINTS = 1 << 20  # numbers that are kept of structures predicted last; those computed beforehand stay
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class CalculatorPoint:
    """What a calculator says of a structure.

    Attributes:
        energy: eV; forces: (atoms, 3) eV/A; stress: (3, 3) eV/A^3, None where there is none.
    """

    energy: float
    forces: np.ndarray
    stress: np.ndarray | None

    @staticmethod
    def from_answer(answer: Mapping[str, Any]) -> CalculatorPoint:
        """Of the answer of a PointCalculator, here or from another process."""
        stress = answer["stress"]
        forces = np.asarray(answer["forces"], dtype=float)
        return CalculatorPoint(float(answer["energy"]), forces, None if stress is None else np.asarray(stress))


COMPUTED: dict[tuple[str, str], CalculatorPoint] = {}  # by settings and structure: what `compute` was asked for


def allow_calculator(name: str) -> str:
    """Let model files of this process import and use a calculator, 'module:Class' or a ready-made name, with any keyword arguments.

    Those of `harmless_calculators` need no permission. In place of this call the environment variable GPMLP_ALLOW_CALCULATORS may
    list names, separated by commas.

    Returns:
        the name.

    Raises:
        UserError: it is neither.
    """
    try:
        calculators.check_calculator_name(name)
    except CalculatorError as error:
        raise errors.UserError(f"{str(error).removesuffix('.')}.") from error
    PERMITTED.add((name, ANY))
    return name


def harmless_calculators() -> list[str]:
    """Ready-made names that a model file may use without permission: they can neither start a program nor read or write a file, but by
    the keyword arguments FILE_KEYWORDS, which need it."""
    return [name for name, entry in calculators.READY.items() if entry.harmless]


@dataclass(frozen=True)
class CalculatorEnergies(Baseline):
    """Energies, forces and stresses of an ASE calculator; atoms of a structure have equal shares of its energy.

    Attributes:
        name: ready-made ('tblite', 'emt', ...) or 'module:Class', as of oracles (core/calculators.py).
        kwargs: of the calculator.
        versions: of the packages that compute, or hashes of sources and files (package_versions), as they were at the fit.
        reuse: whether one calculator serves one structure after another; else each has a new one.
    """

    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    reuse: bool = False

    @staticmethod
    def asked_for(name: str, kwargs: Mapping[str, Any], reuse: bool = False) -> CalculatorEnergies:
        """What the recipe of a user names, which is permission to use it in this process.

        Raises:
            UserError: there is no such calculator, it is not installed, or cannot be made.
        """
        made = CalculatorEnergies(name, dict(kwargs), {}, reuse)
        PERMITTED.add((name, made._arguments))
        try:
            calculators.find_calculator(name)
            return CalculatorEnergies(name, dict(kwargs), calculators.package_versions(name, kwargs), reuse)
        except CalculatorError as error:
            raise made._unusable(error) from error

    @property
    def title(self) -> str:
        """The name with the versions it was fitted with."""
        versions = ", ".join(f"{package} {version}" for package, version in self.versions.items())
        return f"{self.name}{f' ({versions})' if versions else ''}"

    def check(self) -> None:
        """Raise UserError where it may not be used or is not installed, and warn if it is another version than that of the fit."""
        listed = {name.strip() for name in os.environ.get(ALLOWED, "").split(",")}
        entry = calculators.READY.get(self.name)
        asked = not PERMITTED.isdisjoint({(self.name, ANY), (self.name, self._arguments)})
        if not (self.name in harmless_calculators() or asked or self.name in listed):
            raise errors.UserError(
                f"this model needs the baseline calculator {self.title} with the keyword arguments {self._arguments}, and nothing that "
                "a model file names is imported or run by itself. If you trust it, allow it: in the environment, "
                f"{ALLOWED}='{self.name}', or in Python, gpmlp.allow_calculator({self.name!r}), before the model is loaded."
            )
        if (
            entry
            and not (asked or self.name in listed)
            and (names := calculators.file_keywords(self.name, self.kwargs))
        ):
            raise errors.UserError(
                f"this model gives the baseline calculator {self.name} the keyword argument {names[0]}, by which it may read or write "
                f"files, and that is not done for a model file by itself. If you trust it, allow it: {ALLOWED}='{self.name}'."
            )
        try:
            here = calculators.package_versions(self.name, self.kwargs)
        except CalculatorError as error:
            raise self._unusable(error) from error
        if not here and self.versions:
            install = (entry.install if entry else "") or "install it"
            raise errors.UserError(
                f"this model needs the baseline calculator {self.title}, which is not installed; {install}."
            )
        if here != self.versions:
            now = ", ".join(
                [f"{package} {version}" for package, version in here.items()]
                + [f"no {package}" for package in self.versions if package not in here]
            )
            warnings.warn(
                f"This model was fitted on the baseline calculator {self.title}; here is {now}. If its energies differ, so do those of "
                "the model: compare a structure of the training data, or install the version of the fit.",
                errors.DataWarning,
                stacklevel=2,
            )

    def __call__(self, structures: Structures) -> Prediction:
        """Of all structures, one after another.

        Raises:
            UserError: the calculator failed; names the structure.
        """
        points = [self._known(structures, i) for i in range(len(structures))]
        like, n = structures.positions, structures.counts.tolist()
        stress = np.array([np.full((3, 3), np.nan) if p.stress is None else p.stress for p in points])

        def tensor(values: Any) -> Tensor:
            return torch.as_tensor(np.asarray(values, dtype=float)).to(like)

        shares = np.repeat([p.energy / max(m, 1) for p, m in zip(points, n, strict=True)], n)
        forces = np.concatenate([p.forces for p in points])
        return Prediction(tensor([p.energy for p in points]), tensor(shares), tensor(forces), tensor(stress))

    def compute(self, structures: Structures, progress: Progress | None = None, keep: Any = None) -> None:
        """Compute the points of structures side by side and keep them in this process, those there are already excepted.

        Args:
            progress: called with how many there are and will be.
            keep: called with (hash of the structure, its point) of each new one.

        Raises:
            UserError: the calculator failed; names the structures. Points of the others are kept.
        """
        hashes = structure_hashes(structures)
        missing = list(dict.fromkeys(i for i, h in enumerate(hashes) if (self.settings_hash, h) not in COMPUTED))
        first = {hashes[i]: i for i in reversed(missing)}
        order, failures, done = sorted(first.values()), {}, 0

        def take(k: int, answer: dict[str, Any]) -> None:
            nonlocal done
            i, done = order[k], done + 1
            if "error" in answer:
                failures[i] = answer["error"]
            else:
                COMPUTED[self.settings_hash, hashes[i]] = point = CalculatorPoint.from_answer(answer)
                if keep is not None:
                    keep(hashes[i], point)
            if progress is not None:
                progress(done, len(order))

        try:
            compute_points(self._calculator, [plain_structure(structures, i) for i in order], take)
        except CalculatorError as error:
            raise self._unusable(error) from error
        if failures:
            raise self._failed([structures.names[i] for i in sorted(failures)], failures[min(failures)])

    @cached_property
    def settings_hash(self) -> str:
        """Of all that decides about its numbers in this process."""
        arguments = {key: value for key, value in self.kwargs.items() if key != "command"}
        physics = [self.name, arguments, self.reuse, calculators.package_versions(self.name, arguments)]
        return hashlib.sha256(json.dumps(physics, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def _arguments(self) -> str:
        return json.dumps(dict(self.kwargs), sort_keys=True)

    @cached_property
    def _calculator(self) -> PointCalculator:
        return PointCalculator(self.name, self.kwargs, self.reuse)

    @cached_property
    def _latest(self) -> OrderedDict[str, CalculatorPoint]:
        """Points of the structures predicted last: as a rule the same are asked for again, with variances."""
        return OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """What other processes get: not the calculator."""
        return {key: value for key, value in vars(self).items() if key in ("name", "kwargs", "versions", "reuse")}

    def _known(self, structures: Structures, i: int) -> CalculatorPoint:
        """The point of a structure, computed if need be."""
        (digest,) = structure_hashes(structures, [i])
        point = COMPUTED.get((self.settings_hash, digest)) or self._latest.get(digest)
        if point is None:
            try:
                answer = self._calculator(plain_structure(structures, i))
            except CalculatorError as error:
                raise self._unusable(error) from error
            if "error" in answer:
                raise self._failed([structures.names[i]], answer["error"])
            self._latest[digest] = point = CalculatorPoint.from_answer(answer)
            most = max(2, POINTS // max(1, point.forces.size))
            while len(self._latest) > most:
                self._latest.popitem(last=False)
        return point

    def _unusable(self, error: CalculatorError) -> errors.UserError:
        return errors.UserError(f"baseline.calculator: {str(error).removesuffix('.')}.")

    def _failed(self, names: list[str], why: str) -> errors.UserError:
        others = f" and {len(names) - 1} more ({', '.join(names[1:4])}{', ...' if len(names) > 4 else ''})"
        return errors.UserError(
            f"{names[0]}{others if names[1:] else ''}: the baseline calculator {self.name} failed: {why.removesuffix('.')}. Leave "
            "such structures out, or give it other kwargs."
        )

    def state(self) -> dict:
        """The name and keyword arguments, and the versions that the model was fitted with."""
        more = {"reuse": True} if self.reuse else {}
        return {
            "name": "calculator",
            "calculator": self.name,
            "kwargs": dict(self.kwargs),
            "versions": dict(self.versions),
        } | more

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> CalculatorEnergies:
        """What a model file names, checked by `check`."""
        made = CalculatorEnergies(state["calculator"], state["kwargs"], state["versions"], state.get("reuse", False))
        made.check()
        return made


def structure_hashes(structures: Structures, indices: Iterable[int] | None = None) -> list[str]:
    """SHA-256 of all that a calculator sees of each structure, to the last bit."""
    offsets, out = structures.offsets.tolist(), []
    species = structures.species.cpu().numpy().astype("<i8")
    positions, cells = (
        x.detach().cpu().double().numpy().astype("<f8") for x in (structures.positions, structures.cells)
    )
    periodic = structures.periodic.cpu().numpy()
    for i in range(len(structures)) if indices is None else indices:
        here = slice(offsets[i], offsets[i + 1])
        parts = species[here], positions[here] + 0.0, cells[i] + 0.0, periodic[i]
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts))
        digest.update(electronic_bytes(structures, i))
        out.append(digest.hexdigest())
    return out
