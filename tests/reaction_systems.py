"""A hop of gold on aluminium by EMT, what ASE says of it, and the command, for tests of reactions."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ase import Atoms
from ase.build import add_adsorbate, fcc100
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.mep import NEB
from ase.optimize import BFGS

from gpmlp.cli import main


def slab(site: str = "hollow", height: float = 1.7) -> Atoms:
    """A gold atom on Al(100) whose lower layers are held."""
    atoms = fcc100("Al", (2, 2, 2))
    add_adsorbate(atoms, "Au", height, site)
    atoms.center(axis=2, vacuum=4.0)
    atoms.set_constraint(FixAtoms(mask=[atom.tag > 1 for atom in atoms]))
    atoms.info.clear()
    return atoms


def hop() -> tuple[Atoms, Atoms]:
    """End points that are at rest by the oracle."""
    start = slab()
    start.calc = EMT()
    BFGS(start, logfile=None).run(fmax=0.005)
    end = start.copy()
    end[-1].x += end.cell[0, 0] / 2
    end.calc = EMT()
    BFGS(end, logfile=None).run(fmax=0.005)
    return start, end


def oracle_barrier(start: Atoms, end: Atoms) -> float:
    """By ASE's own climbing band on the oracle."""
    images = [start.copy() for _ in range(4)] + [end.copy()]
    for image in images:
        image.calc = EMT()
    band = NEB(images, climb=True, method="improvedtangent")
    band.interpolate("idpp")
    assert BFGS(band, logfile=None).run(fmax=0.02, steps=300)
    return max(image.get_potential_energy() for image in images) - images[0].get_potential_energy()


def gpmlp_command(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """`gpmlp WORDS` in a folder, in this process, whose lines are counted; modules of the folder are forgotten afterwards."""
    out, err, before, path = io.StringIO(), io.StringIO(), set(sys.modules), list(sys.path)
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            sys.path.insert(0, str(folder))
            code = main.main(list(words))
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def killed_and_resumed(
    tmp_path: Path, written: Callable[[Path], Path], command: str, recipe: str, output: str, labels_before: int
) -> tuple[list[Path], subprocess.CompletedProcess]:
    """One run that nothing happens to, and one that kill -9 ends once there are so many labels and that goes on with --resume: they
    have asked for the same labels. Their two output folders, and the end of the first."""
    folders = [written((tmp_path / name).mkdir() or tmp_path / name) for name in ("whole", "killed")]
    whole = gpmlp_command(folders[0], command, recipe)
    assert whole.returncode == 0, whole.stderr
    words = [sys.executable, "-m", "gpmlp", command, recipe]
    process = subprocess.Popen(words, cwd=folders[1], stderr=subprocess.DEVNULL)
    labels, deadline = folders[1] / output / "labels.xyz", time.monotonic() + 120
    while time.monotonic() < deadline and not (
        labels.exists() and labels.read_text().count("Properties") >= labels_before
    ):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = labels.read_bytes()
    again = gpmlp_command(folders[1], command, recipe)
    assert again.returncode == 2 and "holds a run already" in again.stderr
    resumed = gpmlp_command(folders[1], command, recipe, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert labels.read_bytes() == (folders[0] / output / "labels.xyz").read_bytes()
    assert labels.read_bytes().startswith(before) and len(before) < len(labels.read_bytes())
    return [folder / output for folder in folders], whole
