"""Portable models of KIM: compiled and installed as a user does, then asked by ASE and by Debian's LAMMPS for the potential's numbers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from systems import mixed_potential
from test_lammps_external import ANGLES, UNITS, mixed_atoms

from gpmlp.core.errors import UserError
from gpmlp.engines.ase import GPCalculator
from gpmlp.engines.kim import DRIVER, INSTALL, export_kim
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.io.provenance import file_hash, version_of

COLLECTIONS = {f"KIM_API_{kind}_DIR": kind.lower() for kind in ("MODEL_DRIVERS", "PORTABLE_MODELS", "SIMULATOR_MODELS")}
KIM = all(map(shutil.which, ("kim-api-collections-management", "cmake", "c++")))
needs_kim = pytest.mark.skipif(
    not KIM, reason="the KIM API or cmake is not installed (apt install libkim-api-dev cmake)"
)
LAMMPS = next(filter(os.path.isfile, ("/usr/bin/lmp",)), None)
needs_lammps = pytest.mark.skipif(
    not LAMMPS, reason="a LAMMPS with the package KIM is not installed (apt install lammps)"
)
MPIRUN = shutil.which("mpirun.openmpi")


def install(command: str, folder: Path) -> None:
    """Run the command that the export gives, into the collections of this folder."""
    assert command.startswith(f"{INSTALL} user ")
    done = subprocess.run(
        command.replace(" user ", " environment ").split(), cwd=folder, capture_output=True, text=True,
        env=os.environ | {name: str(folder / where) for name, where in COLLECTIONS.items()},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def collections(tmp_path_factory, model_file):
    """A folder where a model of three species and one of copper are installed, and a damaged one; it is the current one."""
    folder = tmp_path_factory.mktemp("kim")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, where in COLLECTIONS.items():
            (folder / where).mkdir()
            patch.setenv(name, str(folder / where))
        install(export_kim(mixed_potential(), "mixed"), folder)
        command = [sys.executable, "-m", "gpmlp", "export", model_file, "--to", "kim", "-o", folder / "copper"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        install(re.search(rf"{INSTALL}.*", done.stdout)[0].replace(f" {folder / 'copper' / DRIVER}", ""), folder)
        shutil.copytree(folder / "copper/copper", folder / "damaged")
        made = folder / "damaged/CMakeLists.txt"
        made.write_text(made.read_text().replace("project(copper", "project(damaged"))
        path = folder / "damaged/copper.export"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        install(f"{INSTALL} user damaged", folder)
        yield folder


@needs_kim
@pytest.mark.parametrize("kind", ["triclinic", "slab", "cluster"])
@pytest.mark.parametrize("skin", [0.0, 0.2])
def test_ase_gives_the_same_digits(collections, kind, skin):
    """With a skin the simulator's lists have neighbours beyond the cutoff."""
    pytest.importorskip("kimpy", reason="kimpy is not installed (pip install kimpy, with libkim-api-dev)")
    from ase.calculators.kim import KIM

    atoms = mixed_atoms(kind)
    atoms.calc = GPCalculator(mixed_potential())
    wanted = atoms.get_potential_energy(), atoms.get_forces()
    stress = atoms.get_stress() if kind != "cluster" else None
    atoms.calc = KIM("mixed", options={"neigh_skin_ratio": skin})
    assert atoms.get_potential_energy() == pytest.approx(wanted[0], abs=1e-10, rel=1e-14)
    np.testing.assert_allclose(atoms.get_forces(), wanted[1], atol=1e-10)
    if stress is not None:
        np.testing.assert_allclose(atoms.get_stress(), stress, atol=1e-10)


@needs_kim
def test_sentences_in_the_log(collections, model_file):
    """KIM has codes and a log file."""
    pytest.importorskip("kimpy", reason="kimpy is not installed (pip install kimpy, with libkim-api-dev)")
    from ase.calculators.kim import KIM

    log = collections / "kim.log"
    with pytest.raises(Exception, match="create"):
        KIM("damaged")
    assert "gpmlp: the model is damaged" in log.read_text()
    atoms = Atoms("Cu2", [[0, 0, 0], [0, 0, 1e-4]], calculator=KIM("copper"))
    assert (
        f"gpmlp: copper.export was exported by gpmlp {version_of('gpmlp')} from the model file with sha256"
        in log.read_text()
    )
    assert file_hash(model_file) in log.read_text() and "the driver is of" not in log.read_text()
    with pytest.raises(Exception, match="compute"):
        atoms.get_potential_energy()
    assert "gpmlp: particles 0 and 1 are on top of each other" in log.read_text()
    with pytest.raises(Exception, match="Ni"):
        Atoms("Ni2", [[0, 0, 0], [0, 0, 2.4]], calculator=KIM("copper")).get_potential_energy()


def write_data(path: Path, atoms: Atoms, elements: list[str], length: float) -> None:
    """A data file of LAMMPS with all digits, of a cell that is lower triangular."""
    (lx, _, _), (xy, ly, _), (xz, yz, lz) = (atoms.cell.array / length).tolist()
    head = [f"{len(atoms)} atoms", f"{len(elements)} atom types", f"{xy!r} {xz!r} {yz!r} xy xz yz"]
    head += [f"0 {edge!r} {axis}lo {axis}hi" for axis, edge in zip("xyz", (lx, ly, lz), strict=True)]
    masses = [f"{k} {Atoms(s).get_masses()[0]}" for k, s in enumerate(elements, 1)]
    placed = zip(atoms.symbols, (atoms.positions / length).tolist(), strict=True)
    rows = [f"{i} {elements.index(s) + 1} {x!r} {y!r} {z!r}" for i, (s, (x, y, z)) in enumerate(placed, 1)]
    path.write_text("\n".join(["of a test", "", *head, "", "Masses", "", *masses, "", "Atoms", "", *rows, ""]))


def run_lammps(folder: Path, style: str, ranks: int, commands: str) -> np.ndarray:
    """A row for each atom, in the order of IDs, of what the last dump has."""
    ids = "dump d all custom 1 dump.out id c_pe fx fy fz c_st[1] c_st[2] c_st[3] c_st[4] c_st[5] c_st[6] x y z\n"
    text = f"""
        kim init mixed {style}
        box tilt large
        read_data data.{style}
        kim interactions C H O
        compute pe all pe/atom
        compute st all stress/atom NULL virial
        {ids}
        dump_modify d sort id format float %24.17g
        {commands}
    """
    (folder / "in.lammps").write_text(text.replace("        ", ""))
    mpi = [MPIRUN, "--oversubscribe", "-n", str(ranks)] if ranks > 1 else []
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    command = [*mpi, LAMMPS, "-in", "in.lammps", "-log", "none"]
    done = subprocess.run(command, cwd=folder, env=os.environ | allowed, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    frames = (folder / "dump.out").read_text().split("ITEM: TIMESTEP\n")
    rows = frames[-1].partition("c_st[6] x y z")[2].strip().splitlines()
    return np.array([line.split() for line in rows], dtype=float)[:, 1:]


@needs_kim
@needs_lammps
@pytest.mark.parametrize("style", UNITS)
def test_lammps_has_energies_and_virials_of_atoms(collections, style):
    """In its units, of a triclinic cell."""
    atoms, (energy, length, pressure) = mixed_atoms("triclinic"), UNITS[style]
    write_data(collections / f"data.{style}", atoms, ["C", "H", "O"], length)
    rows = run_lammps(collections, style, 1, "run 0")
    wanted = mixed_potential()(structures_from_ase([atoms]), atom_virials=True)
    local = wanted.atom_energies.numpy()
    digits = 1e-10 if style == "metal" else 1e-5  # elsewhere KIM and LAMMPS have constants of their own
    np.testing.assert_allclose(rows[:, 0] * energy, local, rtol=1e-13 if style == "metal" else ANGLES, atol=1e-10)
    np.testing.assert_allclose(rows[:, 1:4] * energy / length, wanted.forces.numpy(), rtol=digits, atol=digits)
    virials = wanted.atom_virials.numpy()[:, [0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]]
    np.testing.assert_allclose(rows[:, 4:10] * pressure * length**3, virials, rtol=1e-5, atol=2e-4)


@needs_kim
@needs_lammps
@pytest.mark.skipif(not MPIRUN, reason="Open MPI is not installed (apt install openmpi-bin)")
def test_ranks_do_not_matter(collections):
    """Steps at constant pressure on one rank and on two."""
    atoms = mixed_atoms("triclinic")
    write_data(collections / "data.metal", atoms, ["C", "H", "O"], 1.0)
    commands = "velocity all create 300 1 loop geom\nfix 1 all npt temp 300 300 0.1 tri 0 0 1\ntimestep 2e-4\nrun 20"
    one, two = (run_lammps(collections, "metal", ranks, commands) for ranks in (1, 2))
    np.testing.assert_allclose(two[:, :10], one[:, :10], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["my-model", "3d", "modèle", DRIVER])
def test_names_that_kim_does_not_take(potential, tmp_path, name):
    with pytest.raises(UserError, match="letters, digits and _ only"):
        export_kim(potential, tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_export_is_what_the_driver_is_compiled_of(potential, tmp_path):
    """Also without KIM: names in both files, all sources, and an older export is replaced."""
    for _ in range(2):
        command = export_kim(potential, tmp_path / "copper")
    assert command == f"{INSTALL} user {tmp_path}/copper/{DRIVER} {tmp_path}/copper/copper"
    made = (tmp_path / "copper/copper/CMakeLists.txt").read_text()
    assert "project(copper CXX)" in made and f'DRIVER_NAME "{DRIVER}"' in made and '"copper.export"' in made
    assert f"project({DRIVER} CXX)" in (tmp_path / "copper" / DRIVER / "CMakeLists.txt").read_text()
    sources = {path.name: path.read_text() for path in (tmp_path / "copper" / DRIVER).glob("*.?pp")}
    for text in sources.values():
        assert set(re.findall(r'#include "((?!KIM_).*)"', text)) <= set(sources)
