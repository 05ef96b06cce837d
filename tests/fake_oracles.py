"""Oracles that misbehave, for worker processes to import."""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT


class Fake(Calculator):
    """EMT that writes down each call in `log` and then behaves as the list says: its first entry at the first call, the last from then on.

    gate: a file to wait for before answering.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress"]

    def __init__(self, log: str, behaviour=("well",), gate: str = "", **kwargs) -> None:
        super().__init__(**kwargs)
        self.log, self.behaviour, self.gate = Path(log), list(behaviour), gate

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        with open(self.log, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # two calls at once are a first and a second one
            file.write(f"{os.getpid()}\n")
            file.flush()
            call = len(self.log.read_text().split())
        emt = EMT()
        emt.calculate(self.atoms, ["energy", "forces", "stress"], all_changes)
        self.results = {k: emt.results[k] for k in ("energy", "free_energy", "forces", "stress")}
        while self.gate and not Path(self.gate).exists():
            time.sleep(0.02)
        getattr(self, self.behaviour[min(call, len(self.behaviour)) - 1])()

    def well(self) -> None:
        pass

    def exit(self) -> None:
        os._exit(7)

    def segfault(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def unconverged(self) -> None:
        raise RuntimeError("SCF not converged in 100 cycles")

    def nan(self) -> None:
        self.results["forces"] = np.full_like(self.results["forces"], np.nan)

    def huge(self) -> None:
        self.results["forces"][0] = 1e5

    def pulled(self) -> None:
        self.results["forces"] = self.results["forces"] + [0.0, 0.0, 0.5]

    def contradiction(self) -> None:
        self.results["forces"] = 1.2 * self.results["forces"]

    def smeared(self) -> None:
        self.results["energy"] = self.results["free_energy"] + 0.25

    def full_disk(self) -> None:
        raise OSError(28, "No space left on device")

    def hang(self) -> None:
        time.sleep(1000)

    def hang_in_a_program(self) -> None:
        subprocess.Popen(f"echo $$ >> {self.log}.children; exec sleep 1000", shell=True).wait()

    def hang_deaf(self) -> None:
        sum(itertools.repeat(0))  # never leaves compiled code, so that Python sees no signal

    def freeze(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def terminated(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


class OwnOracle:
    """What a user writes who has no ASE calculator."""

    def label(self, structures):
        import torch

        from gpmlp.core.quantities import Targets

        unknown = Targets.unlabelled(structures)
        forces = -2.0 * structures.positions
        energy = structures.positions.square().sum()[None]
        nan = torch.full_like(unknown.stresses, float("nan"))
        return Targets(energy, forces, nan, unknown.energies_noise, unknown.forces_noise, unknown.stresses_noise, ("",))


class Strict:
    """Takes one keyword argument and no other."""

    def __init__(self, cutoff: float = 5.0) -> None:
        pass

    def calculate(self, atoms) -> None:
        pass
