"""What fast paths cost in accuracy: standard deviations by products against triangular solves, single precision against double."""

from __future__ import annotations

from dataclasses import dataclass, replace

import bursts
import common
import numpy as np
from ase import Atoms
from ase.build import bulk
from speed_cases import Case, silicon_atoms
from speed_peers import Setup
from torch import Tensor

import gpmlp
from gpmlp.core.environments import Environments
from gpmlp.core.quantities import Prediction
from gpmlp.core.structures import Structures
from gpmlp.gp.kernels import Profile
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.potential.mean import EnergyTerm, MeanBlock
from gpmlp.potential.potential import Potential
from gpmlp.potential.stepper import Stepper

TEST = common.ROOT / "data/silicon/test.xyz"
SHAKEN = 0.15  # A


def variance(setup: Setup) -> dict:
    """How far the fast path of standard deviations of local energies is from triangular solves."""
    found: dict = {"errors": []}
    with bursts.pinned(bursts.cores()[0]):
        for case, systems in ((setup.silicon, _silicon()), (setup.molecules, _molecules(setup.molecules))):
            for zeta in setup.zetas:
                potential = case.potential(zeta)
                for name, some in systems.items():
                    found["errors"].append(
                        {"model": f"{case.name}, zeta {zeta}", "of": name} | std_errors(potential, some)
                    )
    print("standard deviations of local energies by products against triangular solves, relative errors")
    rows = [
        [f"{e['model']}: {e['of']}", *(f"{e[k]:.1e}" for k in ("largest", "99 %", "median"))] for e in found["errors"]
    ]
    print(common.table(rows, ["", "largest", "99 %", "median"]))
    return found


def _silicon() -> dict[str, Structures]:
    """What the model knows, and what it does not."""
    far = [
        *(bulk("Si", phase, a=a, cubic=True).repeat(2) for phase, a in (("sc", 2.53), ("bcc", 3.09), ("fcc", 3.87))),
        *(_strained(silicon_atoms(2), factor) for factor in (0.9, 1.1)),
    ]
    liquid = silicon_atoms(2)
    liquid.rattle(0.3, seed=1)
    return {
        "training": gpmlp.read(common.ROOT / "data/silicon/train.xyz")[0],
        "test": gpmlp.read(TEST)[0],
        "crystal of 216 atoms": structures_from_ase([silicon_atoms(3)]),
        "other phases, squeezed, stretched, shaken by 0.3 A": structures_from_ase([*far, liquid]),
    }


def _strained(atoms: Atoms, factor: float) -> Atoms:
    atoms.set_cell(factor * atoms.cell, scale_atoms=True)
    return atoms


def _molecules(case: Case) -> dict[str, Structures]:
    rng = np.random.default_rng(0)
    shaken = [Atoms(a.numbers, a.positions + rng.normal(scale=SHAKEN, size=(len(a), 3))) for a in case.frames]
    return {"test": case.structures, f"shaken by {SHAKEN} A": structures_from_ase(shaken)}


def std_errors(potential: Potential, some: Structures) -> dict[str, float]:
    """Relative errors of standard deviations of local energies, not calibrated, form 'scaled'."""
    model = potential.variances
    seen = [term.environments(some).environments for term in potential.terms]
    fast = model.atom_energies(seen, "scaled").total.sqrt()
    a, left = model.whiten(model.atom_rows(seen))
    prior = sum(p.atom_energies(e.species, e.features) for p, e in zip(model.priors, seen, strict=True))
    exact = (model.amplitude * (prior - a.square().sum(1)).clamp_min(0) + left.square().sum(1)).sqrt()
    error = (fast / exact - 1).abs()
    return {"largest": float(error.max()), "99 %": float(error.quantile(0.99)), "median": float(error.median())}


@dataclass(frozen=True, eq=False)
class RoundedTerm(EnergyTerm):
    """A term whose kernel and sums over centres are in single precision: what is not done, and why."""

    def local_energies(
        self, environments: Environments, profiles: dict[int, Profile] | None = None
    ) -> tuple[Tensor, Tensor]:
        energies, slopes = super().local_energies(replace(environments, features=environments.features.float()))
        return energies.double(), slopes.double()


def _rounded(potential: Potential) -> Potential:
    terms = [
        RoundedTerm(t.descriptor, t.kernel, {z: MeanBlock(*(v.float() for v in vars(b).values())) for z, b in t.blocks.items()})
        for t in potential.terms
    ]  # fmt: skip
    return replace(potential, terms=tuple(terms))


def precision(setup: Setup) -> dict:
    """Single precision against double on the test structures of data/silicon."""
    test, found = gpmlp.read(TEST)[0], []
    with bursts.pinned(bursts.cores()[0]):
        for zeta in setup.zetas:
            double = setup.silicon.potential(zeta)
            exact = double(test, ("atom_energies", "forces"))
            single = double.to(descriptors="float32")
            ways = {
                "descriptors in single precision": single(test, ("atom_energies", "forces")),
                "and the kernel too": _rounded(single)(test),
                "Stepper, double": _stepped(double, test),
                "Stepper, descriptors in single precision": _stepped(single, test),
            }
            found += [{"zeta": zeta, "way": way} | differences(test, exact, other) for way, other in ways.items()]
    columns = list(found[0])[2:]
    rows = [[f"zeta {f['zeta']}, {f['way']}", *(f"{f[k]:.1e}" if k in f else "-" for k in columns)] for f in found]
    print(f"{len(test)} structures, against double precision")
    print(common.table(rows, ["", *columns]))
    return {"of": found}


def _stepped(potential: Potential, some: Structures) -> Prediction:
    step = Stepper(potential, some, variance=True)
    return step(step.structures.positions)


def differences(some: Structures, exact: Prediction, other: Prediction) -> dict[str, float]:
    """Of forces, energies and standard deviations (relative), those that both have."""
    force, energy = 1e3 * (other.forces - exact.forces), 1e3 * (other.energies - exact.energies) / some.counts
    out = {
        "force rms, meV/A": float(force.square().mean().sqrt()),
        "force max, meV/A": float(force.abs().max()),
        "energy max, meV/atom": float(energy.abs().max()),
    }
    if other.atom_energies_variance is not None:
        ratio = (other.atom_energies_variance.total / exact.atom_energies_variance.total).sqrt()
        out["local std, relative"] = float((ratio - 1).abs().max())
    if other.forces_covariance is not None:
        ours, theirs = (p.forces_covariance.total.diagonal(dim1=1, dim2=2).sqrt() for p in (exact, other))
        free = ours > 1e-3 * ours.max()  # symmetry forbids some forces
        out["force std, relative"] = float((theirs / ours - 1)[free].abs().max())
    return out
