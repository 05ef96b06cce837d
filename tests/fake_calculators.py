"""Calculators for tests of baselines, for other processes to import: they count, remember, fail or die."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT

if os.environ.get("FAKE_CALCULATORS_IMPORTED"):  # whoever imports this leaves a trace
    Path(os.environ["FAKE_CALCULATORS_IMPORTED"]).touch()


class Counting(Calculator):
    """EMT without a stress of clusters that writes down each call in the file `log`.txt, and prints."""

    implemented_properties = ["energy", "forces", "stress"]

    def __init__(self, log: str, shift: float = 0.0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.log, self.shift, self.calls = log, shift, 0

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        print("something nobody wants to read")
        with open(f"{self.log}.txt", "a") as file:
            file.write(f"{os.getpid()}\n")
        self.calls += 1
        self.answer()

    def answer(self) -> None:
        emt = EMT()
        emt.calculate(self.atoms, ["energy", "forces", *(["stress"] if self.atoms.pbc.any() else [])], all_changes)
        self.results = {key: emt.results[key] for key in self.implemented_properties if key in emt.results}
        self.results["energy"] += self.shift * len(self.atoms)


class Remembering(Counting):
    """The energy depends on how often it was asked."""

    def answer(self) -> None:
        super().answer()
        self.results["energy"] += self.calls


class NoStress(Counting):
    """Energies and forces only."""

    implemented_properties = ["energy", "forces"]


class Failing(Counting):
    """Gives up where two atoms are closer than `closest`, or has its process killed."""

    def __init__(self, log: str, closest: float, kill: bool = False) -> None:
        super().__init__(log)
        self.closest, self.kill = closest, kill

    def answer(self) -> None:
        distances = self.atoms.get_all_distances(mic=True)
        if distances[np.triu_indices(len(self.atoms), 1)].min() < self.closest:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("self-consistency was not reached")
        super().answer()


class Electronic(Calculator):
    """E = 10 Σ q + Σ m of the initial charges and magnetic moments."""

    implemented_properties = ["energy", "forces"]

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        charge, moment = self.atoms.get_initial_charges().sum(), self.atoms.get_initial_magnetic_moments().sum()
        self.results = {"energy": 10 * charge + moment, "forces": np.zeros((len(self.atoms), 3))}


class Oracle:
    """Labels, but is no calculator."""

    def label(self, structures):
        raise AssertionError("it was asked")
