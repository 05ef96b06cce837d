#!/usr/bin/env python3
"""Make (or check) the silicon data set of this project.

    python generate.py                  plan, label with Quantum ESPRESSO, measure
                                        the consistency numbers, write the files
    python generate.py --stage plan     one stage only: plan, label, consistency,
                                        sensitivity (cutoff, k-points; printed), write
    python generate.py --check          read the files and verify what SOURCE.md says
                                        (needs neither Quantum ESPRESSO nor the plan)

The configurations come from static scans and from molecular dynamics with the
Stillinger-Weber potential below; every one of them is then labelled with pw.x
(PBE).  The potential therefore only decides *where* the labels are, not what they
are.

The run is seeded and can be killed and started again: the plan is kept in
WORK/plan.xyz and every label is appended to WORK/labels*.jsonl as it comes.
Several processes may share the work (``--stage label --shard 0/2`` and ``1/2``).
Needs: Python 3.10+, numpy, ase; for the labels pw.x (made with version 6.7).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import zlib
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import bulk, diamond100, diamond111
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.neighborlist import neighbor_list
from ase.optimize import FIRE

HERE = Path(__file__).resolve().parent
SPLITS = ("train", "validation", "test")
PSEUDO = "Si.pbe-rrkj.UPF"
PSEUDO_MD5 = "d7f89eb60b7b396f5f4f9eaa825fcfdc"
ECUT = 30.0  # Ry
K_SPACING = 0.60  # 1/Angstrom, 2 pi / (n L) <= K_SPACING
DEGAUSS = 0.01  # Ry
CONV_THR = 1e-9  # Ry
TIMESTEP = 2.0 * units.fs
# Planned frames that are not labelled: the most expensive ones, left out to keep the
# whole set within an hour or so of computing (patterns of `source`)
LEFT_OUT = (
    "phase_simple_hexagonal/level0[01]*/variant0",
    "phase_simple_hexagonal/level0[24]*/variant0",
    "phase_*/level05*/variant0",
    "phase_[bf]*/level01*/variant1",
    "phase_sc/level01*/variant0",
    "slab111/*/train/t=1.[036]0ps",
    "slab111/*/train/t=2.20ps",
    "slab111/*/test/t=1.00ps",
    "slab001/*/train/t=[12].[29]0ps",
    "slab001/*,300K/train/t=1.60ps",
    "slab001/*,900K/test/t=1.30ps",
    "dense_liquid/*/train/t=3.[135]0ps",
    "liquid_16/*/train/t=3.[14]0ps",
    "diamond_thermal_16/*/train/t=2.[13]0ps",
    "vacancy_16/*/train/t=1.80ps",
    "vacancy_16/*/train/t=2.00ps",
)


# --------------------------------------------------------------------------
# Stillinger-Weber silicon, only used to move the atoms
# --------------------------------------------------------------------------
class StillingerWeber(Calculator):
    """Silicon of F. H. Stillinger and T. A. Weber, Phys. Rev. B 31, 5262 (1985)."""

    implemented_properties = ("energy", "forces")
    A, B, p, q, a = 7.049556277, 0.6022245584, 4, 0, 1.80
    lam, gamma, sigma, eps = 21.0, 1.20, 2.0951, 2.1683

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        rc = self.a * self.sigma
        positions = self.atoms.positions
        n = len(positions)
        # all pairs of atoms and images: cheap and exact for these small cells
        shifts = self._shifts(rc)
        vec = positions[None, :, None] - positions[:, None, None] + shifts
        dist2 = np.einsum("ijsx,ijsx->ijs", vec, vec)
        i, j, s = np.nonzero((dist2 < rc**2) & (dist2 > 1e-12))
        d = vec[i, j, s]
        r = np.sqrt(dist2[i, j, s])
        unit = d / r[:, None]
        x = r / self.sigma

        # two-body part; every pair appears twice
        cut = np.exp(1.0 / (x - self.a))
        pre = self.A * self.eps
        v2 = pre * (self.B * x**-self.p - 1.0) * cut
        dv2 = (-pre * self.p * self.B * x ** (-self.p - 1) * cut - v2 / (x - self.a) ** 2) / self.sigma
        energy = 0.5 * v2.sum()
        grad = 0.5 * dv2[:, None] * unit  # dE/d(d) of every directed pair

        # three-body part over unordered pairs of neighbours of the same atom
        first, second = np.nonzero(np.triu(i[:, None] == i[None, :], 1))
        g = np.exp(self.gamma / (x - self.a))
        dg = -self.gamma / (x - self.a) ** 2 / self.sigma  # d ln(g) / dr
        cos = np.einsum("px,px->p", unit[first], unit[second])
        t = cos + 1.0 / 3.0
        w = self.lam * self.eps * g[first] * g[second]
        energy += np.sum(w * t * t)
        for one, two in ((first, second), (second, first)):
            dcos = (unit[two] - cos[:, None] * unit[one]) / r[one][:, None]
            contribution = (w * t * t * dg[one])[:, None] * unit[one]
            contribution += (2.0 * w * t)[:, None] * dcos
            np.add.at(grad, one, contribution)

        forces = np.zeros((n, 3))
        np.add.at(forces, i, grad)
        np.add.at(forces, j, -grad)
        self.results = {"energy": float(energy), "forces": forces}

    def _shifts(self, rc):
        cell = self.atoms.cell.array
        heights = 1.0 / np.linalg.norm(np.linalg.inv(cell).T, axis=1)
        # positions may be unwrapped by about half a cell, hence the extra image
        reach = [int(np.ceil(rc / h)) + 1 if pbc else 0 for h, pbc in zip(heights, self.atoms.pbc)]
        grid = np.mgrid[tuple(slice(-m, m + 1) for m in reach)].reshape(3, -1).T
        return grid @ cell


# --------------------------------------------------------------------------
# The plan: which configurations
# --------------------------------------------------------------------------
class Plan:
    """Collects frames; every random number comes from (seed, name of the source)."""

    def __init__(self, seed):
        self.seed = seed
        self.frames = []

    def rng(self, name):
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def add(self, atoms, split, config_type, source):
        atoms = Atoms(atoms.symbols, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        if "slab" not in config_type and config_type != "isolated_atom":
            atoms.wrap()
        atoms.info = {"config_type": config_type, "source": source, "split": split}
        self.frames.append(atoms)

    def scan(self, config_type, levels, make, test=(2, 7), validation=(4,), variants=1):
        """Static scan: the *level* decides the split, so that a test value of the
        scanned quantity never occurs in training."""
        for n, level in enumerate(levels):
            k = n % 10
            split = "test" if k in test else "validation" if k in validation else "train"
            for v in range(variants):
                source = f"{config_type}/level{n:02d}={level:+.4f}/variant{v}"
                self.add(make(level, n, v, self.rng(source)), split, config_type, source)

    def dynamics(self, config_type, label, start, temperature, counts, every, warm, melt=None):
        """One trajectory per split, each with its own seed, sampled after `warm` ps
        every `every` ps.  `start(rng)` makes the first frame."""
        for split, count in zip(SPLITS, counts):
            if not count:
                continue
            name = f"{config_type}/{label}/{split}"
            rng = self.rng(name)
            atoms = start(rng)
            md = begin(atoms, melt or temperature, rng)
            if melt:
                md.run(steps(1.5))
                md.set_temperature(temperature_K=temperature)
            md.run(steps(warm))
            for k in range(count):
                if k:
                    md.run(steps(every))
                at = (1.5 if melt else 0.0) + warm + k * every
                self.add(atoms, split, config_type, f"{name}/t={at:.2f}ps")

    def quench(self, config_type, label, start, counts, length, samples):
        """Melt at 5000 K, then cool linearly from 2500 K to 300 K in `length` ps; keep
        the last part of the way and the end.  One quench never serves two splits."""
        for split, count in zip(SPLITS, counts):
            for run in range(count):
                name = f"{config_type}/{label}/{split}{run}"
                rng = self.rng(name)
                atoms = start(rng)
                md = begin(atoms, 5000, rng)
                md.run(steps(1.5))
                blocks = 50
                keep = np.unique(np.linspace(blocks // 2, blocks, samples[split]).astype(int))
                for b in range(1, blocks + 1):
                    md.set_temperature(temperature_K=2500 - (2500 - 300) * b / blocks)
                    md.run(steps(length / blocks))
                    if b in keep:
                        t = 1.5 + length * b / blocks
                        self.add(atoms, split, config_type, f"{name}/t={t:.2f}ps")


def steps(picoseconds):
    return round(picoseconds * 1000 * units.fs / TIMESTEP)


def begin(atoms, temperature, rng):
    atoms.calc = StillingerWeber()
    MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=rng)
    return Langevin(atoms, TIMESTEP, temperature_K=temperature, friction=0.02 / units.fs, rng=rng)


def rattled(atoms, sigma, rng):
    atoms = atoms.copy()
    atoms.positions += rng.normal(0.0, sigma, (len(atoms), 3))
    return atoms


def diamond(a=5.47, repeat=(1, 1, 1)):
    return bulk("Si", "diamond", a, cubic=True).repeat(repeat)


def deformed(atoms, strain):
    atoms = atoms.copy()
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    return atoms


def near_diamond(rng, repeat=(1, 1, 1), spread=0.012):
    """Diamond cell with a small random strain of its own (one per trajectory)."""
    strain = rng.normal(0.0, spread, (3, 3))
    return deformed(diamond(repeat=repeat), 0.5 * (strain + strain.T))


def disordered(rng, n, density, aspect=0.06):
    """n atoms in an orthorhombic box at `density` g/cm^3, melted later."""
    volume = n * 28.0855 / (0.602214 * density)
    shape = np.array([1.0, 1.0, 1.0 if n <= 8 else 2.0]) * np.exp(rng.normal(0, aspect, 3))
    lengths = shape * (volume / shape.prod()) ** (1 / 3)
    base = diamond(repeat=(1, 1, 1 if n <= 8 else 2))
    base.set_cell(lengths, scale_atoms=True)
    return rattled(base, 0.15, rng)


def phases():
    """Other phases, about 8 atoms each, near the volume where PBE has them."""
    beta_tin = Atoms(
        "Si4",
        scaled_positions=[(0, 0, 0), (0.5, 0, 0.25), (0.5, 0.5, 0.5), (0, 0.5, 0.75)],
        cell=(4.82, 4.82, 2.66),
        pbc=True,
    )
    hexagonal = Atoms("Si", cell=[2.66, 2.66, 2.50, 90, 90, 120], pbc=True)
    return {
        "beta_tin": beta_tin.repeat((1, 1, 2)),
        "simple_hexagonal": hexagonal.repeat((2, 2, 2)),
        "sc": bulk("Si", "sc", 2.54).repeat((2, 2, 2)),
        "bcc": bulk("Si", "bcc", 3.10, cubic=True).repeat((2, 2, 1)),
        "fcc": bulk("Si", "fcc", 3.88, cubic=True).repeat((2, 1, 1)),
    }


def slab001(rng):
    slab = diamond100("Si", size=(2, 1, 6), a=5.47, vacuum=4.0)
    slab.pbc = True
    # push the atoms of both surfaces together into dimers, then let SW relax them
    z = slab.positions[:, 2]
    for layer, inner in ((z.max(), -1), (z.min(), 1)):
        pair = np.nonzero(abs(z - layer) < 0.1)[0]
        axis = np.argmax(abs(slab.get_distance(*pair, mic=False, vector=True)))
        sign = np.sign(slab.positions[pair[1], axis] - slab.positions[pair[0], axis])
        slab.positions[pair[0], axis] += 0.6 * sign
        slab.positions[pair[1], axis] -= 0.6 * sign
        slab.positions[pair, 2] += 0.2 * inner
    return relaxed(rattled(slab, 0.03, rng))


def slab111(rng):
    slab = diamond111("Si", size=(1, 1, 8), a=5.47, vacuum=4.0)
    slab.pbc = True
    return relaxed(rattled(slab, 0.03, rng))


def relaxed(atoms):
    atoms.calc = StillingerWeber()
    FIRE(atoms, logfile=None).run(fmax=0.05, steps=200)
    return atoms


def vacancy(rng, repeat=(1, 1, 1)):
    atoms = near_diamond(rng, repeat, 0.008)
    del atoms[int(rng.integers(len(atoms)))]
    return atoms


def short_pair(distance, rng):
    """Compressed, rattled diamond with one pair pushed to `distance`."""
    atoms = rattled(deformed(diamond(), np.eye(3) * rng.uniform(-0.04, 0.02)), 0.10, rng)
    d = atoms.get_all_distances(mic=True)
    np.fill_diagonal(d, 99.0)
    i = int(rng.integers(len(atoms)))
    j = int(np.argmin(d[i]))
    atoms.set_distance(i, j, distance, fix=0.5, mic=True)
    return atoms


def build_plan(seed):
    plan = Plan(seed)
    atom = Atoms("Si", positions=[(0, 0, 0)], cell=(10.0, 10.5, 11.0), pbc=False)
    plan.add(atom, "train", "isolated_atom", "isolated_atom")

    # diamond: static strains (every second isotropic one is the perfect crystal)
    plan.scan(
        "diamond_isotropic",
        np.linspace(-0.10, 0.10, 16),
        lambda e, n, v, rng: rattled(deformed(diamond(), np.eye(3) * e), 0.06 * (n % 2), rng),
    )
    plan.scan(
        "diamond_uniaxial",
        np.linspace(-0.10, 0.10, 14),
        lambda e, n, v, rng: rattled(deformed(diamond(), np.diag([0, 0, e])), 0.05 * (n % 3 > 0), rng),
    )

    def sheared(e, n, v, rng):
        strain = np.zeros((3, 3))
        strain[1, 2] = strain[2, 1] = e / 2
        return rattled(deformed(diamond(), strain), 0.05 * (n % 3 > 0 or v), rng)

    plan.scan("diamond_shear", np.linspace(-0.13, 0.15, 12), sheared, variants=2)

    # diamond: thermal
    for t in (300, 600, 900, 1200):
        plan.dynamics("diamond_thermal", f"8atoms,{t}K", near_diamond, t, (14, 2, 4), 0.2, 1.5)
    plan.dynamics(
        "diamond_thermal_16",
        "16atoms,900K",
        lambda rng: near_diamond(rng, (2, 1, 1)),
        900,
        (5, 1, 2),
        0.2,
        1.5,
    )

    # liquid
    for density, t in ((2.20, 3000), (2.32, 2000), (2.45, 2500), (2.60, 3500)):
        plan.dynamics(
            "liquid",
            f"8atoms,{density:.2f}g/cc,{t}K",
            lambda rng, density=density: disordered(rng, 8, density),
            t,
            (12, 2, 3),
            0.2,
            1.0,
            melt=5000,
        )
    plan.dynamics(
        "liquid_16",
        "16atoms,2.48g/cc,2300K",
        lambda rng: disordered(rng, 16, 2.48),
        2300,
        (7, 1, 2),
        0.3,
        1.0,
        melt=5000,
    )
    # dense liquid: short distances in a condensed surrounding
    plan.dynamics(
        "dense_liquid",
        "8atoms,3.10g/cc,4500K",
        lambda rng: disordered(rng, 8, 3.10),
        4500,
        (6, 1, 2),
        0.2,
        1.0,
        melt=6000,
    )

    # quench of the liquid
    plan.quench(
        "amorphous",
        "8atoms,2.28g/cc",
        lambda rng: disordered(rng, 8, 2.28, 0.04),
        (4, 1, 2),
        8.0,
        {"train": 6, "validation": 3, "test": 4},
    )
    plan.quench(
        "amorphous_16",
        "16atoms,2.28g/cc",
        lambda rng: disordered(rng, 16, 2.28, 0.04),
        (2, 1, 1),
        10.0,
        {"train": 3, "validation": 1, "test": 3},
    )

    # vacancy
    for t in (300, 700, 1200):
        plan.dynamics("vacancy", f"7atoms,{t}K", vacancy, t, (7, 1, 3), 0.2, 1.0)
    plan.dynamics(
        "vacancy_16",
        "15atoms,700K",
        lambda rng: vacancy(rng, (2, 1, 1)),
        700,
        (6, 1, 2),
        0.2,
        1.0,
    )

    # other phases: the volume decides the split
    for n, (name, atoms) in enumerate(phases().items()):
        plan.scan(
            f"phase_{name}",
            np.linspace(-0.06, 0.09, 7),
            lambda e, n, v, rng, atoms=atoms: rattled(deformed(atoms, np.eye(3) * e), (0.02, 0.12)[v], rng),
            test=(4,) if n % 2 else (2,),
            validation=(2,) if n % 2 else (4,),
            variants=2,
        )

    # surfaces: relaxed (SW) starting frames and dynamics from them
    for split in SPLITS:
        name = f"slab001/relaxed/{split}"
        plan.add(slab001(plan.rng(name)), split, "slab001", name)
    for t, counts in ((300, (5, 1, 2)), (900, (5, 1, 2))):
        plan.dynamics("slab001", f"12atoms,{t}K", slab001, t, counts, 0.3, 1.0)
    plan.dynamics("slab111", "8atoms,600K", slab111, 600, (6, 1, 2), 0.3, 1.0)

    # one short pair in a condensed cell
    plan.scan(
        "short_pair",
        np.linspace(1.65, 2.16, 20),
        lambda e, n, v, rng: short_pair(e, rng),
    )
    return plan.frames


def stratified(frames, seed):
    """Order of labelling: every prefix holds all kinds and splits in proportion, so
    that the first N of the plan are a usable set of their own."""
    rng = np.random.default_rng([seed, 7])
    groups = {}
    for n, atoms in enumerate(frames):
        groups.setdefault((atoms.info["config_type"], atoms.info["split"]), []).append(n)
    keyed = []
    for members in groups.values():
        members = rng.permutation(members)
        offset = rng.uniform(0.2, 0.8)
        keyed += [((k + offset) / len(members), int(m)) for k, m in enumerate(members)]
    return [frames[m] for _, m in sorted(keyed)]


# --------------------------------------------------------------------------
# The labels: Quantum ESPRESSO
# --------------------------------------------------------------------------
def find_pseudo_dir(given):
    for folder in filter(None, (given, os.environ.get("ESPRESSO_PSEUDO"), "/usr/share/espresso/pseudo")):
        path = Path(folder) / PSEUDO
        if path.exists():
            md5 = hashlib.md5(path.read_bytes()).hexdigest()
            if md5 != PSEUDO_MD5:
                sys.exit(f"{path} has md5 {md5}, this data set was made with {PSEUDO_MD5}")
            return str(folder)
    sys.exit(f"{PSEUDO} not found; give --pseudo-dir")


def reference_lengths(atoms):
    """Cell lengths of the undeformed cell of the family that `atoms` belongs to."""
    kind = atoms.info["config_type"]
    if kind.startswith("phase_"):
        return phases()[kind.removeprefix("phase_")].cell.lengths()
    lengths = atoms.cell.lengths()
    if "slab" in kind:
        return lengths
    reference = np.full(3, 5.47)  # the cubic cell of diamond, ...
    if len(atoms) > 8:
        reference[np.argmax(lengths)] *= 2  # ... doubled for the 15 and 16 atoms
    return reference


def kpoints(atoms):
    """Number of k-points per axis and the shift; the vacuum axis of a slab gets one.

    The mesh belongs to the family and not to the single strained cell: a mesh that
    changes with the length of a cell makes a step of up to 75 meV/atom in the energy
    (see SOURCE.md), and no potential can learn that.
    """
    numbers = [int(np.ceil(2 * np.pi / (K_SPACING * x))) for x in reference_lengths(atoms)]
    if "mesh" in atoms.info:  # only for the measured sensitivities
        numbers = [int(atoms.info["mesh"])] * 3
    shift = [1, 1, 1]
    if "slab" in atoms.info["config_type"]:
        numbers[2], shift[2] = 1, 0
    return numbers, shift


def espresso(atoms, pseudo_dir, command, directory, mixing_beta, ecut=ECUT):
    from ase.calculators.espresso import Espresso, EspressoProfile

    system = {"ecutwfc": ecut, "occupations": "smearing", "smearing": "mv", "degauss": DEGAUSS}
    electrons = {"conv_thr": CONV_THR, "mixing_beta": mixing_beta, "electron_maxstep": 150}
    if atoms.info["config_type"] == "isolated_atom":
        # triplet ground state, gamma point; the two p electrons share three orbitals
        system |= {"nspin": 2, "tot_magnetization": 2.0}
        kwargs = {"kpts": None}
    else:
        numbers, shift = kpoints(atoms)
        kwargs = {"kpts": numbers, "koffset": shift}
    return Espresso(
        profile=EspressoProfile(command=command, pseudo_dir=pseudo_dir),
        directory=directory,
        pseudopotentials={"Si": PSEUDO},
        input_data={
            "control": {"tprnfor": True, "tstress": True, "disk_io": "none"},
            "system": system,
            "electrons": electrons,
        },
        **kwargs,
    )


def label(atoms, pseudo_dir, command, scratch, ecut=ECUT):
    """Energy (the force-consistent E - TS), forces and stress of one frame."""
    work = atoms.copy()
    work.pbc = True  # pw.x knows nothing else
    if work.info["config_type"] == "isolated_atom":
        work.set_initial_magnetic_moments([0.5])  # fraction of the valence
    problem = None
    for beta in (0.5, 0.2):
        directory = Path(tempfile.mkdtemp(dir=scratch))
        began = time.time()
        try:
            work.calc = espresso(work, pseudo_dir, command, directory, beta, ecut)
            result = {
                "energy": work.get_potential_energy(),
                "free_energy": work.get_potential_energy(force_consistent=True),
                "forces": work.get_forces().tolist(),
                "stress": work.get_stress(voigt=True).tolist(),
            }
            out = (directory / "espresso.pwo").read_text()
            if "convergence has been achieved" not in out:
                raise RuntimeError("self-consistency was not reached")
            result["minus_TS"] = pwo_value(out, "smearing contrib. (-TS)") * units.Ry
            result["cpu_s"] = cpu_seconds(out)
            result["wall_s"] = time.time() - began
            result["mixing_beta"] = beta
            return result
        except Exception as error:  # noqa: BLE001 - try gentler mixing, then give the frame up
            problem = f"{type(error).__name__}: {error}"
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    return {"failed": problem}


def pwo_value(text, name):
    found = [line for line in text.splitlines() if name in line]
    return float(found[-1].split("=")[1].split()[0]) if found else 0.0


def cpu_seconds(text):
    import re

    line = [x for x in text.splitlines() if x.strip().startswith("PWSCF") and "CPU" in x][-1]
    part = line.split(":")[1].split("CPU")[0]
    scale = {"h": 3600.0, "m": 60.0, "s": 1.0}
    return sum(float(x) * scale[u] for x, u in re.findall(r"([\d.]+)\s*([hms])", part))


def load_plan(work, limit=None):
    """The planned frames without those left out."""
    frames = read(work / "plan.xyz", ":")
    frames = [a for a in frames if not any(fnmatch(a.info["source"], pattern) for pattern in LEFT_OUT)]
    return frames[:limit]


def load_labels(work):
    """Labels by the source of their frame."""
    labels = {}
    for path in sorted(work.glob("labels*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                item = json.loads(line)
            except json.JSONDecodeError:
                continue  # a line cut off by a kill; it is made again
            labels[item["source"]] = item
    return labels


def run_labels(args, work):
    pseudo_dir = find_pseudo_dir(args.pseudo_dir)
    shard, shards = (int(x) for x in args.shard.split("/"))
    todo = load_plan(work, args.limit)[shard::shards]
    if args.reverse:
        todo.reverse()
    path = work / f"labels_{os.getpid()}.jsonl"
    for atoms in todo:
        if atoms.info["source"] in load_labels(work):
            continue
        result = {"source": atoms.info["source"], **label(atoms, pseudo_dir, args.pw, work)}
        with path.open("a") as handle:
            handle.write(json.dumps(result) + "\n")
        print(
            time.strftime("%H:%M:%S"),
            len(atoms),
            atoms.info["source"],
            result.get("failed")
            or f"E/N={result['energy'] / len(atoms):.4f} cpu={result['cpu_s']:.1f}s "
            f"fmax={np.abs(result['forces']).max():.2f}",
            flush=True,
        )


# --------------------------------------------------------------------------
# The files
# --------------------------------------------------------------------------
def frame_with(atoms, result):
    out = Atoms(atoms.symbols, positions=atoms.positions)
    values = {
        "energy": result["energy"],
        "free_energy": result["free_energy"],
        "forces": np.array(result["forces"]),
    }
    if atoms.info["config_type"] != "isolated_atom":
        out.set_cell(atoms.cell)
        out.pbc = True
        values["stress"] = np.array(result["stress"])
    out.info = {k: atoms.info[k] for k in ("config_type", "source")}
    out.calc = SinglePointCalculator(out, **values)
    return out


def write_atomically(path, frames):
    temporary = path.with_name(path.name + ".tmp")
    write(temporary, frames, format="extxyz")
    os.replace(temporary, path)


def write_files(args, work):
    labels = load_labels(work)
    done = [a for a in load_plan(work, args.limit) if "energy" in labels.get(a.info["source"], {})]
    order = {"isolated_atom": 0}
    done.sort(
        key=lambda a: (
            order.get(a.info["config_type"], 1),
            a.info["config_type"],
            a.info["source"],
        )
    )
    for split in SPLITS:
        chosen = [frame_with(a, labels[a.info["source"]]) for a in done if a.info["split"] == split]
        write_atomically(args.out / f"{split}.xyz", chosen)
        print(f"{split}: {len(chosen)} frames")
    failed = [x for x in labels.values() if "failed" in x]
    cpu = sum(x.get("cpu_s", 0.0) for x in labels.values())
    print(f"{len(failed)} failed, {cpu / 3600:.2f} h of CPU time in pw.x")
    for x in failed:
        print("  failed:", x["source"], x["failed"][:200])
    ts = [labels[a.info["source"]]["minus_TS"] / len(a) for a in done]
    print(f"-TS per atom: {min(ts):.4f} to {max(ts):.4f} eV")


# --------------------------------------------------------------------------
# Consistency of energies with forces and stress (finite differences)
# --------------------------------------------------------------------------
DISPLACEMENT = 0.01  # Angstrom
STRAIN = 0.004
STRAINS = {"xx": [(0, 0)], "yz": [(1, 2), (2, 1)], "hydrostatic": [(0, 0), (1, 1), (2, 2)]}


def consistency_frames(seed):
    """A displaced metallic-like frame and a strained one, with their +- partners."""
    rng = np.random.default_rng([seed, 11])
    frames = []

    def add(atoms, name):
        atoms = atoms.copy()
        atoms.info = {"config_type": "consistency", "source": name}
        frames.append(atoms)

    base = rattled(diamond(5.50), 0.25, rng)
    add(base, "force/base")
    for sign in (-1, 1):
        moved = base.copy()
        moved.positions[0, 0] += sign * DISPLACEMENT
        add(moved, f"force/atom0,x/{sign:+d}")
    shear = np.array([[0.02, 0.01, 0.0], [0.01, -0.01, 0.02], [0.0, 0.02, 0.03]])
    base = rattled(deformed(diamond(5.55), shear), 0.10, rng)
    add(base, "stress/base")
    for name, entries in STRAINS.items():
        for sign in (-1, 1):
            strain = np.zeros((3, 3))
            for entry in entries:
                strain[entry] = sign * STRAIN * (0.5 if name == "yz" else 1.0)
            add(deformed(base, strain), f"stress/{name}/{sign:+d}")
    return frames


def run_consistency(args, work):
    pseudo_dir = find_pseudo_dir(args.pseudo_dir)
    path = work / "consistency.jsonl"
    frames = consistency_frames(args.seed)
    done = {}
    if path.exists():
        done = {json.loads(x)["source"]: json.loads(x) for x in path.read_text().splitlines()}
    for atoms in frames:
        name = atoms.info["source"]
        if name not in done:
            done[name] = {"source": name, **label(atoms, pseudo_dir, args.pw, work)}
            with path.open("a") as handle:
                handle.write(json.dumps(done[name]) + "\n")
        print(name, done[name].get("energy"), done[name].get("minus_TS"), flush=True)
    write_atomically(
        args.out / "consistency.xyz",
        [frame_with(a, done[a.info["source"]]) for a in frames],
    )
    report_consistency(args.out)
    base, low, high = (done[f"force/{x}"] for x in ("base", "atom0,x/-1", "atom0,x/+1"))
    slope = (high["energy"] - high["minus_TS"]) - (low["energy"] - low["minus_TS"])
    print(
        f"for comparison, -dU/dx with U = F + TS: {-slope / (2 * DISPLACEMENT):.5f} eV/A,"
        f" force {base['forces'][0][0]:.5f}"
    )


def run_sensitivity(args, work):
    """What the cutoff and the switch of the k-point mesh do to a label (printed only)."""
    pseudo_dir = find_pseudo_dir(args.pseudo_dir)
    atoms = next(a for a in consistency_frames(args.seed) if a.info["source"] == "stress/base")
    n = len(atoms)
    low, high = (label(atoms, pseudo_dir, args.pw, work, ecut) for ecut in (ECUT, 1.5 * ECUT))
    print(
        f"cutoff {ECUT:.0f} against {1.5 * ECUT:.0f} Ry, one strained diamond cell: energy "
        f"{1000 * (low['energy'] - high['energy']) / n:+.2f} meV/atom, force (largest) "
        f"{np.abs(np.subtract(low['forces'], high['forces'])).max():.4f} eV/A, pressure "
        f"{-np.subtract(low['stress'], high['stress'])[:3].mean() / units.GPa:+.3f} GPa"
    )
    edge = 2 * np.pi / (2 * K_SPACING)  # the cell length where 2 k-points become 3
    for name, atoms in (
        ("diamond", diamond(edge)),
        ("sc", bulk("Si", "sc", edge / 2).repeat((2, 2, 2))),
    ):
        results = []
        for mesh in (2, 3):
            atoms.info = {"config_type": "sensitivity", "mesh": mesh}
            results.append(label(atoms, pseudo_dir, args.pw, work))
        two, three = results
        print(
            f"2x2x2 against 3x3x3 k-points, perfect {name} of {edge:.3f} A: energy "
            f"{1000 * (two['energy'] - three['energy']) / len(atoms):+.2f} meV/atom, pressure "
            f"{-np.subtract(two['stress'], three['stress'])[:3].mean() / units.GPa:+.3f} GPa"
        )


def report_consistency(folder):
    """Finite differences of the stored consistency frames; returns the mismatches."""
    stored = {a.info["source"]: a for a in read(folder / "consistency.xyz", ":")}
    energy = {k: a.get_potential_energy() for k, a in stored.items()}
    out = {}
    slope = (energy["force/atom0,x/+1"] - energy["force/atom0,x/-1"]) / (2 * DISPLACEMENT)
    force = stored["force/base"].get_forces()[0, 0]
    out["force"] = -slope - force
    print(f"force: -dE/dx = {-slope:.5f}, stored {force:.5f}, difference {out['force']:+.5f} eV/A")
    base = stored["stress/base"]
    stress = base.get_stress(voigt=False)
    for name, entries in STRAINS.items():
        slope = energy[f"stress/{name}/+1"] - energy[f"stress/{name}/-1"]
        slope /= 2 * STRAIN * base.get_volume()
        value = sum(stress[e] for e in entries) * (0.5 if name == "yz" else 1.0)
        if name == "hydrostatic":
            slope, value = slope / 3, value / 3
        out[name] = slope - value
        print(
            f"stress {name}: dE/de/V = {slope:.6f}, stored {value:.6f} eV/A^3, difference "
            f"{out[name]:+.6f} eV/A^3 = {out[name] / units.GPa:+.3f} GPa"
        )
    return out


# --------------------------------------------------------------------------
# --check
# --------------------------------------------------------------------------
def fingerprint(atoms):
    """Sorted distances below 5.5 A: equal for frames that are equal up to symmetry."""
    d = np.sort(neighbor_list("d", atoms, 5.5))
    return len(atoms), d


def check(folder):
    """Verify the invariants of SOURCE.md; exits with 1 when one does not hold."""
    problems = []

    def demand(condition, text):
        if not condition:
            problems.append(text)

    sets = {s: read(folder / f"{s}.xyz", ":") for s in SPLITS}
    total = sum(map(len, sets.values()))
    table = {}
    sources = {}
    prints = []
    for split, frames in sets.items():
        for n, atoms in enumerate(frames):
            where = f"{split}[{n}]"
            kind = atoms.info["config_type"]
            table.setdefault(kind, dict.fromkeys(SPLITS, 0))[split] += 1
            results = atoms.calc.results
            isolated = kind == "isolated_atom"
            for key in ("energy", "free_energy", "forces") + (() if isolated else ("stress",)):
                demand(key in results, f"{where}: no {key}")
                demand(np.all(np.isfinite(results.get(key, np.nan))), f"{where}: {key} not finite")
            demand(set(atoms.symbols) == {"Si"}, f"{where}: not silicon")
            demand(
                abs(results["energy"] - results["free_energy"]) < 1e-8,
                f"{where}: energy is not the free energy",
            )
            # units: 4 valence electrons with this pseudopotential, eV per atom
            demand(-109 < results["energy"] / len(atoms) < -98, f"{where}: energy per atom")
            demand(np.abs(results["forces"]).max() < 60, f"{where}: force above 60 eV/A")
            demand(np.abs(results["forces"].sum(axis=0)).max() < 1e-3, f"{where}: net force")
            demand(bool(atoms.pbc.any()) != isolated, f"{where}: pbc")
            if not isolated:
                demand(np.abs(results["stress"]).max() < 1.5, f"{where}: stress")
                dmin = neighbor_list("d", atoms, 3.0).min(initial=3.0)
                demand(dmin > 1.5, f"{where}: distance {dmin:.2f}")
                source, _, last = atoms.info["source"].rpartition("/")
                if not last.startswith(("t=", "variant")):
                    source = atoms.info["source"]
                sources.setdefault(source, set()).add(split)
                prints.append((split, n, *fingerprint(atoms), results["energy"]))
    for source, where in sources.items():
        demand(len(where) == 1, f"{source} appears in {sorted(where)}")
    closest = np.inf
    for a in range(len(prints)):
        for b in range(a):
            if prints[a][2] != prints[b][2] or len(prints[a][3]) != len(prints[b][3]):
                continue
            if abs(prints[a][4] - prints[b][4]) > 1e-3:
                continue
            gap = np.abs(prints[a][3] - prints[b][3]).max()
            demand(gap > 1e-3, f"duplicate: {prints[a][:2]} {prints[b][:2]}")
            closest = min(closest, gap)
    demand(total >= 400, f"only {total} frames")
    for split, low, high in (
        ("train", 0.6, 0.8),
        ("validation", 0.05, 0.16),
        ("test", 0.14, 0.28),
    ):
        demand(low < len(sets[split]) / total < high, f"{split}: share {len(sets[split]) / total:.2f}")

    print(f"{'config_type':22s}" + "".join(f"{s:>12s}" for s in SPLITS) + f"{'all':>8s}")
    for kind in sorted(table):
        row = table[kind]
        print(f"{kind:22s}" + "".join(f"{row[s]:12d}" for s in SPLITS) + f"{sum(row.values()):8d}")
    print(f"{'all':22s}" + "".join(f"{len(sets[s]):12d}" for s in SPLITS) + f"{total:8d}")
    if (folder / "consistency.xyz").exists():
        mismatch = report_consistency(folder)
        demand(abs(mismatch["force"]) < 0.005, "forces do not match the energies")
        for name in STRAINS:
            demand(abs(mismatch[name]) < 0.003, f"stress {name} does not match the energies")
    else:
        problems.append("consistency.xyz is missing")
    for text in problems:
        print("PROBLEM", text)
    print("check:", "failed" if problems else "all invariants hold")
    return 1 if problems else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only verify the files")
    parser.add_argument(
        "--stage",
        default="all",
        choices=("all", "plan", "label", "consistency", "sensitivity", "write"),
    )
    parser.add_argument("--seed", type=int, default=20251)
    parser.add_argument("--limit", type=int, default=None, help="use only the first LIMIT frames of the plan")
    parser.add_argument("--reverse", action="store_true", help="label from the end of the plan, as a second process")
    parser.add_argument("--shard", default="0/1", help="label only the frames I of N: I/N")
    parser.add_argument(
        "--work",
        type=Path,
        help="folder for the plan and the labels",
        default=Path(tempfile.gettempdir()) / "gpmlp-data-silicon",
    )
    parser.add_argument("--out", type=Path, default=HERE, help="where the files go")
    parser.add_argument("--pw", default="pw.x", help="command that runs pw.x")
    parser.add_argument("--pseudo-dir", help=f"folder that holds {PSEUDO}")
    args = parser.parse_args()
    if args.check:
        sys.exit(check(args.out))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    work = args.work
    work.mkdir(parents=True, exist_ok=True)
    if args.stage in ("all", "plan") and not (work / "plan.xyz").exists():
        frames = stratified(build_plan(args.seed), args.seed)
        write_atomically(work / "plan.xyz", frames)
        print(f"plan: {len(frames)} frames")
    if args.stage in ("all", "label"):
        run_labels(args, work)
    if args.stage in ("all", "consistency"):
        run_consistency(args, work)
    if args.stage == "sensitivity":
        run_sensitivity(args, work)
    if args.stage in ("all", "write"):
        write_files(args, work)


if __name__ == "__main__":
    main()
