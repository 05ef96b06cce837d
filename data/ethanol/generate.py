#!/usr/bin/env python3
"""Make (or check) the ethanol data set of this project.

    python generate.py                  dynamics, PySCF labels, consistency, files
    python generate.py --stage plan     one stage only: plan, label, consistency, write
    python generate.py --check          read the files and verify what SOURCE.md says
                                        (needs neither PySCF nor tblite)

Configurations: GFN2-xTB Langevin dynamics of one gas-phase molecule at 300, 600 and
1000 K, every split with trajectories of its own.  Labels: RKS PBE/def2-SVP with
density fitting, analytic gradients with the response of the integration grid.

The run is seeded and can be killed and started again: the plan is kept in
WORK/plan.xyz and every label is appended to WORK/labels*.jsonl as it comes.
Needs: Python 3.10+, numpy, ase; for the configurations tblite, for the labels pyscf.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution

HERE = Path(__file__).resolve().parent
SPLITS = ("train", "validation", "test")
TEMPERATURES = (300, 600, 1000)
COUNTS = {"train": 73, "validation": 10, "test": 21}  # per temperature
LIMIT = 303  # this many frames of the (shuffled) plan were labelled
# trajectories per temperature, each with a seed of its own
TRAJECTORIES = {"train": 2, "validation": 1, "test": 1}
TIMESTEP = 0.5  # fs
INTERVAL = 120.0  # fs between samples
WARM = 3000.0  # fs before the first sample
BASIS = "def2-svp"
GRID_LEVEL = 3
CONV_TOL = 1e-9  # Hartree
ATOM_SPINS = {"H": 1, "C": 2, "O": 2}  # unpaired electrons


# --------------------------------------------------------------------------
# The plan
# --------------------------------------------------------------------------
def trajectory(name, temperature, count, seed):
    """Sample one GFN2-xTB Langevin trajectory; the seed comes from its name."""
    from tblite.ase import TBLite

    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    atoms = molecule("CH3CH2OH")
    # a random torsion of the hydroxyl group: trajectories start in different wells
    c1, c2, o, h = hydroxyl(atoms)
    atoms.set_dihedral(c1, c2, o, h, rng.uniform(0, 360))
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
    MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=rng)
    md = Langevin(atoms, TIMESTEP * units.fs, temperature_K=temperature, friction=0.01 / units.fs, rng=rng)
    md.run(round(WARM / TIMESTEP))
    frames = []
    for k in range(count):
        if k:
            md.run(round(INTERVAL / TIMESTEP))
        frame = Atoms(atoms.symbols, positions=atoms.positions - atoms.get_center_of_mass())
        at = (WARM + k * INTERVAL) / 1000
        frame.info = {"config_type": f"ethanol_{temperature}K", "source": f"{name}/t={at:.2f}ps"}
        frames.append(frame)
    return frames


def hydroxyl(atoms):
    """Indices C, C, O, H of the torsion of the hydroxyl group."""
    d = atoms.get_all_distances()
    symbols = np.array(atoms.get_chemical_symbols())
    o = int(np.nonzero(symbols == "O")[0][0])
    carbons = sorted(np.nonzero(symbols == "C")[0], key=lambda i: d[i, o])
    h = min(np.nonzero(symbols == "H")[0], key=lambda i: d[i, o])
    return int(carbons[1]), int(carbons[0]), o, int(h)


def build_plan(seed):
    frames = []
    for symbol in ATOM_SPINS:
        atom = Atoms(symbol, positions=[(0, 0, 0)])
        atom.info = {
            "config_type": "isolated_atom",
            "source": f"isolated_atom/{symbol}",
            "split": "train",
        }
        frames.append(atom)
    molecules = []
    for split in SPLITS:
        runs = TRAJECTORIES[split]
        for t in TEMPERATURES:
            for run in range(runs):
                count = COUNTS[split] * (run + 1) // runs - COUNTS[split] * run // runs
                name = f"gfn2-xtb/{t}K/{split}{run}"
                for atoms in trajectory(name, t, count, seed):
                    atoms.info["split"] = split
                    molecules.append(atoms)
                print(name, count, flush=True)
    # a shuffled order: the first N of the plan are a usable set of their own
    order = np.random.default_rng([seed, 7]).permutation(len(molecules))
    frames += [molecules[n] for n in order]
    for n, atoms in enumerate(frames):
        atoms.info["id"] = n
    return frames


# --------------------------------------------------------------------------
# The labels: PySCF
# --------------------------------------------------------------------------
def label(atoms, forces=True):
    """PBE/def2-SVP energy in eV and forces in eV/Angstrom."""
    from pyscf import dft, gto

    cpu, began = time.process_time(), time.time()
    symbols = atoms.get_chemical_symbols()
    single = len(atoms) == 1
    mol = gto.M(
        atom=list(zip(symbols, atoms.positions.tolist())),
        unit="Angstrom",
        basis=BASIS,
        spin=ATOM_SPINS[symbols[0]] if single else 0,
        verbose=0,
    )
    mf = (dft.UKS if single else dft.RKS)(mol, xc="PBE").density_fit()
    mf.with_df.build()  # three-centre integrals once, in memory
    # a first pass on a coarse grid only gives the starting density: it saves most of
    # the cycles on the real grid and changes nothing within CONV_TOL
    mf.grids.level = 0
    mf.conv_tol = 1e-6
    mf.kernel()
    start = mf.make_rdm1()
    mf.grids = dft.Grids(mol)
    mf.grids.level = GRID_LEVEL
    mf.conv_tol = CONV_TOL
    energy = mf.kernel(dm0=start)
    if not mf.converged:
        mf = mf.newton()
        energy = mf.kernel()
        if not mf.converged:
            return {"failed": "self-consistency was not reached"}
    result = {"energy": float(energy) * units.Hartree}
    if single:
        result["forces"] = [[0.0, 0.0, 0.0]]
        result["spin_square"] = float(mf.spin_square()[0])
    elif forces:
        gradient = mf.nuc_grad_method()
        gradient.grid_response = True
        result["forces"] = (-gradient.kernel() * units.Hartree / units.Bohr).tolist()
    result["cpu_s"] = time.process_time() - cpu
    result["wall_s"] = time.time() - began
    return result


def load_labels(work):
    labels = {}
    for path in sorted(work.glob("labels*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                item = json.loads(line)
            except json.JSONDecodeError:
                continue  # a line cut off by a kill; it is made again
            labels[item["id"]] = item
    return labels


def run_labels(args, work):
    frames = read(work / "plan.xyz", ":")
    path = work / f"labels_{os.getpid()}.jsonl"
    done = load_labels(work)
    for atoms in frames[: args.limit]:
        number = int(atoms.info["id"])
        if number in done:
            continue
        result = {"id": number, **label(atoms)}
        with path.open("a") as handle:
            handle.write(json.dumps(result) + "\n")
        print(
            time.strftime("%H:%M:%S"),
            number,
            atoms.info["source"],
            result.get("failed")
            or f"E={result['energy']:.4f} cpu={result['cpu_s']:.1f}s fmax={np.abs(result['forces']).max():.2f}",
            flush=True,
        )


# --------------------------------------------------------------------------
# The files
# --------------------------------------------------------------------------
def frame_with(atoms, result):
    out = Atoms(atoms.symbols, positions=atoms.positions)
    out.info = {k: atoms.info[k] for k in ("config_type", "source")}
    out.calc = SinglePointCalculator(
        out,
        energy=result["energy"],
        free_energy=result["energy"],
        forces=np.array(result["forces"]),
    )
    return out


def write_atomically(path, frames):
    temporary = path.with_name(path.name + ".tmp")
    write(temporary, frames, format="extxyz")
    os.replace(temporary, path)


def write_files(args, work):
    frames = read(work / "plan.xyz", ":")
    labels = load_labels(work)
    done = [a for a in frames[: args.limit] if "energy" in labels.get(a.info["id"], {})]
    done.sort(
        key=lambda a: (
            a.info["config_type"] != "isolated_atom",
            len(a.info["config_type"]),
            a.info["source"],
        )
    )
    for split in SPLITS:
        chosen = [frame_with(a, labels[a.info["id"]]) for a in done if a.info["split"] == split]
        write_atomically(args.out / f"{split}.xyz", chosen)
        print(f"{split}: {len(chosen)} frames")
    failed = [x for x in labels.values() if "failed" in x]
    cpu = [x["cpu_s"] for x in labels.values() if "cpu_s" in x and len(x["forces"]) > 1]
    print(f"{len(failed)} failed; CPU time of the labels {sum(cpu) / 3600:.2f} h, median {np.median(cpu):.1f} s")
    for x in labels.values():
        if "spin_square" in x:
            print("isolated", frames[x["id"]].symbols, x["energy"], "<S^2> =", x["spin_square"])


# --------------------------------------------------------------------------
# Consistency
# --------------------------------------------------------------------------
DISPLACEMENT = 0.002  # Angstrom


def run_consistency(args, work):
    """Stored +- pairs of two displaced coordinates, and the same molecule turned."""
    base = molecule("CH3CH2OH")
    base.rattle(0.06, seed=args.seed % 2**31)
    frames = [(base, "force/base")]
    for atom, axis in ((0, 0), (2, 1)):
        for sign in (-1, 1):
            moved = base.copy()
            moved.positions[atom, axis] += sign * DISPLACEMENT
            frames.append((moved, f"force/atom{atom},axis{axis}/{sign:+d}"))
    turned = base.copy()
    turned.rotate(53.0, (1, 2, 3))
    frames.append((turned, "rotated"))
    out = []
    for atoms, source in frames:
        atoms.info = {"config_type": "consistency", "source": source}
        out.append(frame_with(atoms, label(atoms)))
    write_atomically(args.out / "consistency.xyz", out)
    report_consistency(args.out)


def report_consistency(folder):
    stored = {a.info["source"]: a for a in read(folder / "consistency.xyz", ":")}
    energy = {k: a.get_potential_energy() for k, a in stored.items()}
    out = {}
    for atom, axis in ((0, 0), (2, 1)):
        name = f"force/atom{atom},axis{axis}"
        slope = (energy[name + "/+1"] - energy[name + "/-1"]) / (2 * DISPLACEMENT)
        force = stored["force/base"].get_forces()[atom, axis]
        out[name] = -slope - force
        print(f"{name}: -dE/dx = {-slope:.6f}, stored {force:.6f}, difference {out[name]:+.6f} eV/A")
    out["rotation"] = energy["rotated"] - energy["force/base"]
    print(f"rotated molecule: energy differs by {out['rotation']:+.2e} eV")
    return out


# --------------------------------------------------------------------------
# --check
# --------------------------------------------------------------------------
def check(folder):
    """Verify the invariants of SOURCE.md; exits with 1 when one does not hold."""
    problems = []

    def demand(condition, text):
        if not condition:
            problems.append(text)

    sets = {s: read(folder / f"{s}.xyz", ":") for s in SPLITS}
    total = sum(map(len, sets.values()))
    table, sources, prints = {}, {}, []
    atoms_seen = []
    for split, frames in sets.items():
        for n, atoms in enumerate(frames):
            where = f"{split}[{n}]"
            kind = atoms.info["config_type"]
            table.setdefault(kind, dict.fromkeys(SPLITS, 0))[split] += 1
            results = atoms.calc.results
            for key in ("energy", "free_energy", "forces"):
                demand(key in results, f"{where}: no {key}")
                demand(np.all(np.isfinite(results.get(key, np.nan))), f"{where}: {key} not finite")
            demand(not atoms.pbc.any(), f"{where}: periodic")
            demand(results["energy"] == results["free_energy"], f"{where}: free energy")
            if kind == "isolated_atom":
                atoms_seen.append((split, str(atoms.symbols)))
                continue
            demand(atoms.get_chemical_formula() == "C2H6O", f"{where}: not ethanol")
            demand(np.abs(results["forces"]).max() < 40, f"{where}: force above 40 eV/A")
            demand(np.abs(results["forces"].sum(axis=0)).max() < 1e-5, f"{where}: net force")
            d = atoms.get_all_distances()
            demand(whole(atoms, d), f"{where}: the molecule is broken")
            sources.setdefault(atoms.info["source"].rsplit("/", 1)[0], set()).add(split)
            prints.append((split, n, d[np.triu_indices(9, 1)]))
    for source, where in sources.items():
        demand(len(where) == 1, f"{source} appears in {sorted(where)}")
    reference = {
        str(a.symbols): a.get_potential_energy() for a in sets["train"] if a.info["config_type"] == "isolated_atom"
    }
    demand(sorted(atoms_seen) == [("train", x) for x in "CHO"], f"isolated atoms: {atoms_seen}")
    # units: atomisation energy of ethanol, about 35 eV with PBE
    if len(reference) == 3:
        separate = 2 * reference["C"] + 6 * reference["H"] + reference["O"]
        for split, frames in sets.items():
            bound = [a.get_potential_energy() - separate for a in frames if len(a) == 9]
            demand(
                -37 < min(bound) and max(bound) < -31,
                f"{split}: atomisation energies {min(bound):.2f} to {max(bound):.2f} eV",
            )
    # distances of atoms by index, so a copy that is turned or moved is found as well
    vectors = np.array([p[2] for p in prints])
    closest = np.inf
    for a in range(1, len(vectors)):
        gaps = np.abs(vectors[:a] - vectors[a]).max(axis=1)
        for b in np.nonzero(gaps < 1e-3)[0]:
            problems.append(f"duplicate: {prints[a][:2]} {prints[b][:2]}")
        for b, gap in enumerate(gaps):
            if {prints[a][0], prints[b][0]} == {"train", "test"}:
                closest = min(closest, gap)
    print(f"closest train-test pair: largest distance difference {closest:.3f} A")
    demand(total >= 300, f"only {total} frames")
    for split, low, high in (
        ("train", 0.6, 0.8),
        ("validation", 0.05, 0.16),
        ("test", 0.14, 0.28),
    ):
        demand(low < len(sets[split]) / total < high, f"{split}: share {len(sets[split]) / total:.2f}")

    print(f"{'config_type':16s}" + "".join(f"{s:>12s}" for s in SPLITS) + f"{'all':>8s}")
    for kind in sorted(table):
        row = table[kind]
        print(f"{kind:16s}" + "".join(f"{row[s]:12d}" for s in SPLITS) + f"{sum(row.values()):8d}")
    print(f"{'all':16s}" + "".join(f"{len(sets[s]):12d}" for s in SPLITS) + f"{total:8d}")
    if (folder / "consistency.xyz").exists():
        for name, value in report_consistency(folder).items():
            demand(abs(value) < 1e-3, f"{name}: mismatch {value}")
    else:
        problems.append("consistency.xyz is missing")
    for text in problems:
        print("PROBLEM", text)
    print("check:", "failed" if problems else "all invariants hold")
    return 1 if problems else 0


def whole(atoms, d):
    """Ethanol is still ethanol: every C-C, C-O, C-H, O-H bond of the start exists."""
    start = molecule("CH3CH2OH").get_all_distances()
    symbols = atoms.get_chemical_symbols()
    for i in range(9):
        for j in range(i):
            limit = 1.25 if "H" in (symbols[i], symbols[j]) else 1.65
            if start[i, j] < limit and d[i, j] > limit + 0.45:
                return False
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only verify the files")
    parser.add_argument("--stage", default="all", choices=("all", "plan", "label", "consistency", "write"))
    parser.add_argument("--seed", type=int, default=20252)
    parser.add_argument("--limit", type=int, default=LIMIT, help="use only the first LIMIT frames of the plan")
    parser.add_argument(
        "--work",
        type=Path,
        help="folder for the plan and the labels",
        default=Path(tempfile.gettempdir()) / "gpmlp-data-ethanol",
    )
    parser.add_argument("--out", type=Path, default=HERE, help="where the files go")
    args = parser.parse_args()
    if args.check:
        sys.exit(check(args.out))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    work = args.work
    work.mkdir(parents=True, exist_ok=True)
    if args.stage in ("all", "plan") and not (work / "plan.xyz").exists():
        frames = build_plan(args.seed)
        write_atomically(work / "plan.xyz", frames)
        print(f"plan: {len(frames)} frames")
    if args.stage in ("all", "label"):
        run_labels(args, work)
    if args.stage in ("all", "consistency"):
        run_consistency(args, work)
    if args.stage in ("all", "write"):
        write_files(args, work)


if __name__ == "__main__":
    main()
