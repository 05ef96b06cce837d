"""Runs of LAMMPS with the plugin: compiled once for all tests, structures in, what LAMMPS computes out."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from gpmlp.engines.lammps import SOURCES, Installation, build_plugin, find_lammps
from gpmlp.io.export import export_model
from gpmlp.potential.potential import Potential

BAR = 1 / 1.6021765e6  # in eV/A^3, as LAMMPS has it
MVV2E = 1.0364269e-4  # amu A^2/ps^2 in eV, the same
VOIGT = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))  # LAMMPS's order


@cache
def lammps() -> Installation:
    return find_lammps()


@cache
def plugin() -> Path:
    """The plugin of these sources, from an earlier run or another process where there is one."""
    made_of = (
        sorted(SOURCES.glob("src/*.hpp")) + sorted(SOURCES.glob("lammps/*")) + [SOURCES.parent / "engines/lammps.py"]
    )
    sources = (
        b"".join(path.read_bytes() for path in made_of)
        + "".join(map(importlib.metadata.version, ("gpmlp", "lammps"))).encode()
    )
    folder = Path(tempfile.gettempdir()) / f"gpmlp-plugin-{os.getuid()}-{hashlib.sha256(sources).hexdigest()[:16]}"
    made = folder / "gpmlp_plugin.so"
    try:
        folder.mkdir()
    except FileExistsError:  # by this process or another, which may still be at it
        begun = time.time()
        while not made.exists() and time.time() < begun + 600:
            time.sleep(0.2)
        return made
    try:
        return build_plugin(lammps().executable, made)[0]
    except BaseException:
        folder.rmdir()
        raise


def run(script: str, folder: Path, ranks: int = 1, load: bool = True) -> subprocess.CompletedProcess[str]:
    """An input script, in a folder; the plugin is loaded before if `load`."""
    file = folder / "in.lammps"
    file.write_text(f"plugin load {plugin()}\n{script}" if load else script)
    command = [str(lammps().executable), "-in", str(file), "-log", "none", "-nocite"]
    if ranks > 1:
        launcher = next(p / "bin/mpiexec" for p in lammps().executable.parents if (p / "bin/mpiexec").is_file())
        command = [str(launcher), "-n", str(ranks), *command]
    environment = os.environ | lammps().environment | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def refusal(script: str, folder: Path) -> str:
    """What LAMMPS says of an input script that it stops at."""
    done = run(script, folder)
    errors = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
    assert done.returncode and errors, done.stdout[-2000:]
    return errors[0]


def start(
    atoms: Atoms,
    potential: Potential,
    folder: Path,
    style: str = "gpmlp",
    coeff: str = "",
    before: str = "",
    boundary: str = "",
) -> str:
    """Commands that set up atoms, whose cell is lower triangular, and the potential."""
    export_model(potential, folder / "model")
    symbols = [chemical_symbols[z] for z in sorted(set(atoms.numbers))]
    ase.io.write(folder / "data", atoms, format="lammps-data", specorder=symbols, masses=True, atom_style="atomic")
    boundary = boundary or " ".join("p" if periodic else "f" for periodic in atoms.pbc)
    return f"""units metal
boundary {boundary}
atom_style atomic
atom_modify map array
box tilt large
{before}
read_data data
pair_style {style}
pair_coeff * * {coeff or f"model {' '.join(symbols)}"}
thermo_style custom step temp pe press pxx pyy pzz pxy pxz pyz vol
thermo_modify format float %.17g norm no
"""


DUMP = """compute energies all pe/atom
compute virials all stress/atom NULL virial
compute centroids all centroid/stress/atom NULL virial
dump all all custom 1 dump id x y z fx fy fz c_energies c_virials[*] c_centroids[*] {more}
dump_modify all sort id format float %.17g
run 0
"""


@dataclass(frozen=True)
class Frame:
    """What LAMMPS says of one moment: eV, A, and stress positive = tension.

    Attributes:
        virials: (atoms, 3, 3) symmetric, eV, whose sum is stress x volume, as `centroids`, which are not symmetric.
        more: (atoms, columns) of what else was asked for.
    """

    energy: float
    forces: np.ndarray
    stress: np.ndarray
    energies: np.ndarray
    virials: np.ndarray
    centroids: np.ndarray
    more: np.ndarray
    volume: float


def static(script: str, folder: Path, ranks: int = 1, more: str = "") -> Frame:
    """One evaluation after the commands of a script."""
    done = run(script + DUMP.format(more=more), folder, ranks)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    table = np.loadtxt(folder / "dump", skiprows=9, ndmin=2)
    lines = done.stdout.splitlines()
    header = max(k for k, line in enumerate(lines) if line.split()[:2] == ["Step", "Temp"])
    thermo = dict(zip(lines[header].split(), map(float, lines[header + 1].split()), strict=True))
    stress = np.empty((3, 3))
    for (i, j), name in zip(VOIGT, ("Pxx", "Pyy", "Pzz", "Pxy", "Pxz", "Pyz"), strict=True):
        stress[i, j] = stress[j, i] = -thermo[name] * BAR
    virials = np.empty((len(table), 3, 3))
    for k, (i, j) in enumerate(VOIGT):
        virials[:, i, j] = virials[:, j, i] = table[:, 8 + k] * BAR
    rows = [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2), (1, 0), (2, 0), (2, 1)]
    centroids = np.empty((len(table), 3, 3))
    for k, (i, j) in enumerate(rows):
        centroids[:, i, j] = table[:, 14 + k] * BAR
    return Frame(
        thermo["PotEng"], table[:, 4:7], stress, table[:, 7], virials, centroids, table[:, 23:], thermo["Volume"]
    )
