"""Oracles that misbehave, in the ways that test_oracle_faults.py lists, for worker processes to import."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT

CACHE: dict = {}


def emt_results(atoms) -> dict:
    """Energy (both), forces and, of crystals, stress."""
    emt = EMT()
    emt.calculate(atoms, ["energy", "forces", *(["stress"] if atoms.pbc.all() else [])], all_changes)
    return {k: emt.results[k] for k in ("energy", "free_energy", "forces", "stress") if k in emt.results}


class Fake(Calculator):
    """EMT that writes down each call in `log` and then behaves as the list says: its first entry at the first call, the last from then on.

    gate: a file to wait for before answering. mended: a file with which all is well again.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress"]

    def __init__(self, log: str, behaviour=("well",), gate: str = "", mended: str = "", **kwargs) -> None:
        super().__init__(**kwargs)
        # by an environment variable where the keys of structures, which hash all settings, are to be the same in all runs
        log, mended = (os.path.expandvars(path) for path in (log, mended))
        self.log, self.behaviour, self.gate, self.mended = Path(log), list(behaviour), gate, mended

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        with open(self.log, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # two calls at once are a first and a second one
            file.write(f"{os.getpid()}\n")
            file.flush()
            call = len(self.log.read_text().split())
        self.asked = atoms  # what it was handed, not a copy
        self.results = emt_results(self.atoms)
        while self.gate and not Path(self.gate).exists():
            time.sleep(0.02)
        if not (self.mended and Path(self.mended).exists()):
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

    # --- numbers that are none

    def set(self, **values) -> None:
        self.results.update(values)

    def of(self, **factors) -> None:
        for name, factor in factors.items():
            self.results[name] = factor * self.results[name]

    def infinite_energy(self) -> None:
        self.set(energy=np.inf, free_energy=np.inf)

    def nan_energy(self) -> None:
        self.set(energy=np.nan, free_energy=np.nan)

    def energies_of_atoms(self) -> None:
        self.set(free_energy=np.full(len(self.atoms), self.results["energy"] / len(self.atoms)))

    def text(self) -> None:
        self.set(energy=str(self.results["energy"]), free_energy=str(self.results["free_energy"]))

    def texts(self) -> None:
        self.set(forces=self.results["forces"].astype(str))

    def nothing(self) -> None:
        self.set(forces=None)

    def no_energy(self) -> None:
        self.set(energy=None, free_energy=None)

    def complex(self) -> None:
        self.of(forces=1 + 1e-3j)

    def ragged(self) -> None:
        self.set(forces=[[0.0, 0.0, 0.0], [0.0, 0.0]])

    def one_too_few(self) -> None:
        self.set(forces=self.results["forces"][1:])

    def transposed(self) -> None:
        self.set(forces=self.results["forces"].T)

    def nan_stress(self) -> None:
        self.set(stress=np.full(6, np.nan))

    def short_stress(self) -> None:
        self.set(stress=np.zeros(3))

    def no_stress(self) -> None:
        del self.results["stress"]

    def single_precision(self) -> None:
        self.set(forces=self.results["forces"].astype(np.float32))

    # --- labels that are those of something else

    def wrong_sign(self) -> None:
        self.of(forces=-1.0)

    def wrong_unit(self) -> None:
        self.of(forces=1 / 51.422)

    def energy_in_hartree(self) -> None:
        self.of(energy=1 / 27.2114, free_energy=1 / 27.2114)

    def energy_per_atom(self) -> None:
        self.of(energy=1 / len(self.atoms), free_energy=1 / len(self.atoms))

    def other_order(self) -> None:
        self.set(forces=np.roll(self.results["forces"], 1, axis=0))

    def zero(self) -> None:
        self.of(forces=0.0)

    def held(self) -> None:
        self.results["forces"][:2] = 0.0

    def flat(self) -> None:
        self.results["forces"][:, 2] = 0.0

    def flipped_axis(self) -> None:
        self.results["forces"][:, 0] *= -1.0

    def frozen_energy(self) -> None:
        self.set(energy=-1.0, free_energy=-1.0)

    def bytes_for_energy(self) -> None:
        self.set(energy=b"3.1")

    def at_random(self) -> None:
        forces = np.random.default_rng().standard_normal(self.results["forces"].shape)
        self.set(forces=forces - forces.mean(axis=0))

    def noisy(self) -> None:
        noise = np.random.default_rng().choice([-1.0, 1.0]) * np.random.default_rng().uniform(0.5, 1.0)
        self.set(energy=self.results["energy"] + noise, free_energy=self.results["free_energy"] + noise)

    def cached(self) -> None:
        self.results = CACHE.setdefault(str(self.log), self.results)

    def relaxed(self) -> None:
        """Of the structure at the end of the slope, as of a code that relaxes although nobody asked it to."""
        other = self.atoms.copy()
        for _ in range(20):
            other.positions += 0.1 * emt_results(other)["forces"]
        self.results = emt_results(other)

    def moved(self) -> None:
        self.asked.positions += 0.1

    def wrapped(self) -> None:
        self.asked.positions[0] += self.asked.cell[0]

    def transmuted(self) -> None:
        self.asked.numbers[0] = 79

    def another_cell(self) -> None:
        self.asked.set_cell(1.01 * self.asked.cell.array)

    def stress_sign(self) -> None:
        self.of(stress=-1.0)

    def virial(self) -> None:
        self.of(stress=-self.atoms.get_volume())

    def stress_in_GPa(self) -> None:
        self.of(stress=160.2177)

    # --- behaviour

    def slow(self) -> None:
        time.sleep(0.3)

    def abort(self) -> None:
        os.abort()

    def no_memory(self) -> None:
        raise MemoryError

    def endless(self) -> None:
        self.endless()

    def leave(self) -> None:
        raise SystemExit(3)

    def base(self) -> None:
        raise type("Stranger", (BaseException,), {})("it is none of the usual ones")

    def interrupt(self) -> None:
        raise KeyboardInterrupt

    def long_story(self) -> None:
        raise RuntimeError("no " * 10**6)

    def deaf(self) -> None:
        with suppress(BaseException):
            time.sleep(1000)
        time.sleep(1000)

    def prints(self) -> None:
        print("SCF cycle 1")
        os.system("echo SCF cycle 2")

    def prints_much(self) -> None:
        for _ in range(200):
            print("x" * 10**5)

    def closes(self) -> None:
        sys.stdout.close()

    def elsewhere(self) -> None:
        os.chdir("/")

    def tidy(self) -> None:
        shutil.rmtree(Path(self.directory).parent)

    def forks(self) -> None:
        """The child returns from here as its parent does."""
        child = os.fork()
        if child:
            self.started(child)

    def started(self, child: int) -> None:
        with open(f"{self.log}.children", "a") as file:
            file.write(f"{child}\n")

    def leaves_a_child(self) -> None:
        self.started(subprocess.Popen(["sleep", "1000"]).pid)


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
