"""An oracle computes the labels of structures; OracleRecipe holds the choices of one, CalculatorOracle asks any ASE calculator."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, field_validator, model_validator

from gpmlp.core import calculators, errors
from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures, plain_structure
from gpmlp.learning.labels import targets_of
from gpmlp.learning.oracles import results, worker
from gpmlp.learning.oracles.single_point import FORCES, STRESS
from gpmlp.recipe import Count, PlainValues, Positive, RecipeSection

NOT_PHYSICS = ("command",)  # keyword arguments that say how a code is started, not what it computes


class Oracle(Protocol):
    """Computes the labels of structures."""

    def label(self, structures: Structures) -> Targets:
        """Energies (free, where electrons are smeared), forces and stresses; NaN = not computed."""
        ...


class OracleRecipe(RecipeSection):
    """Which code labels, how it is run, and what happens when it fails; docs/oracles.md explains the keys."""

    calculator: str
    kwargs: PlainValues = {}
    free_energy: bool | None = None
    stress: bool | None = None
    magnetic_moments: dict[str, float] = {}
    timeout_s: Positive | None = 86400.0
    retries: Annotated[int, Field(ge=0)] = 1
    retry_kwargs: tuple[PlainValues, ...] = ()
    on_failure: Literal["set aside", "stop"] = "set aside"
    at_most_failures: Annotated[int, Field(ge=0)] = 5
    workers: Count = 1
    executor: Literal["processes", "inline", "dask", "parsl"] = "processes"
    executor_options: dict[str, Any] = {}
    directory: str | None = None
    keep: bool = False
    check_forces: bool = True
    largest_force: Positive = 1000.0
    largest_net_force: Positive = 0.1
    check_every: Annotated[int, Field(ge=0)] = 20

    @field_validator("calculator")
    @classmethod
    def _named(cls, name: str) -> str:
        calculators.check_calculator_name(name)  # a recipe is read without importing what it names; `check` does that
        return name

    @model_validator(mode="after")
    def _consistent(self) -> OracleRecipe:
        for symbol in self.magnetic_moments:
            errors.atomic_number(symbol)
        return self

    @property
    def attempts(self) -> int:
        """How many attempts at a structure are made."""
        return 1 + max(self.retries, len(self.retry_kwargs))

    @property
    def settings_hash(self) -> str:
        """Of all that decides what a label is, and of nothing that only says how it is obtained."""
        kwargs = {key: value for key, value in self.kwargs.items() if key not in NOT_PHYSICS}
        physics = [self.calculator, kwargs, self.free_energy, self.stress, self.magnetic_moments]
        return "o" + hashlib.sha256(json.dumps(physics, sort_keys=True).encode()).hexdigest()[:15]

    def kwargs_of(self, attempt: int) -> dict[str, Any]:
        """Keyword arguments of an attempt, counted from 1: later ones with retry_kwargs in turn, the last of them again."""
        if attempt == 1 or not self.retry_kwargs:
            return dict(self.kwargs)
        return calculators.merge_kwargs(self.kwargs, self.retry_kwargs[min(attempt - 2, len(self.retry_kwargs) - 1)])

    def check(self) -> None:
        """Import the calculator and make it once. Raises UserError: that fails, or its program is not there."""
        ready = calculators.READY.get(self.calculator)
        if ready and ready.program and self.executor in ("processes", "inline"):
            program = str(self.kwargs.get("command", ready.program)).split()[0]
            if shutil.which(program) is None:
                raise UserError(
                    f"oracle: there is no program '{program}' for {self.calculator}; {ready.install}, or give kwargs.command"
                )
        with tempfile.TemporaryDirectory(prefix="gpmlp-oracle-") as folder:
            try:
                for attempt in range(1, self.attempts + 1):
                    calculators.build_calculator(self.calculator, self.kwargs_of(attempt), Path(folder))
            except calculators.CalculatorError as error:
                raise UserError(f"oracle: {str(error).removesuffix('.')}.") from error


@dataclass(frozen=True)
class CalculatorOracle:
    """Asks an ASE calculator in this process; each structure gets a new one, so that no label depends on those before it."""

    recipe: OracleRecipe

    def label(self, structures: Structures) -> Targets:
        """Label one structure after another. Raises UserError: all attempts at a structure failed; names it."""
        self.recipe.check()
        targets = []
        with tempfile.TemporaryDirectory(prefix="gpmlp-oracle-") as folder:
            for i in range(len(structures)):
                structure = structures.select([i])
                check = (
                    ()
                    if not self.recipe.check_every or i % self.recipe.check_every
                    else (FORCES,)
                    if i
                    else (FORCES, STRESS)
                )
                targets.append(self._label_one(structure, Path(folder), f"structure{i}", check))
        return Targets.concatenate(targets)

    def _label_one(self, structure: Structures, folder: Path, key: str, check: Sequence[str]) -> Targets:
        records = []
        for attempt in range(1, self.recipe.attempts + 1):
            asked = make_job(self.recipe, key, attempt, structure, folder / "spool", folder / "scratch", check)
            records.append(worker.make_attempt(asked))
            if records[-1]["kind"] == results.LABEL:
                return targets_of(records[-1], structure)
            if records[-1]["kind"] != results.FAILED:
                break
        raise UserError(f"{structure.names[0]}: the oracle gave no label: {results.failure_reasons(records)}.")


def make_job(
    recipe: OracleRecipe,
    key: str,
    attempt: int,
    structure: Structures,
    spool_folder: Path,
    scratch: Path,
    check: Sequence[str],
) -> dict[str, Any]:
    """The input of an attempt, as plain numbers and texts; `check`: what to compare with the energy ('forces', 'stress')."""
    choices = ["calculator", "magnetic_moments", "free_energy", "stress", "timeout_s", "keep", "check_forces"]
    choices += ["largest_force", "largest_net_force"]
    return {name: getattr(recipe, name) for name in choices} | {
        "key": key,
        "attempt": attempt,
        "check": sorted(set(check)),
        "kwargs": recipe.kwargs_of(attempt),
        "structure": plain_structure(structure),
        "threads": recipe.executor_options.get("threads", 1),
        "spool": str(Path(spool_folder).absolute()),
        "scratch": str(Path(scratch).absolute()),
        "path": list(sys.path),
    }
