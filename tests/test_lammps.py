"""LAMMPS with pair_style gpmlp against the ASE calculator, ranks against each other, virials, heat flux, and what it refuses."""

from __future__ import annotations

import re
import shutil
import subprocess
import zlib
from pathlib import Path

import ase.build
import numpy as np
import pytest
from ase import Atoms
from lammps_runs import MVV2E, lammps, plugin, refusal, run, start, static
from systems import (
    BASELINES,
    DESCRIPTORS,
    KERNELS,
    SPECIES,
    TRICLINIC,
    descriptor,
    low_rank_term,
    random_term,
    scattered,
)

from gpmlp.cli import main
from gpmlp.core.errors import UserError
from gpmlp.engines import lammps as engine
from gpmlp.engines.ase import GPCalculator
from gpmlp.engines.lammps import build_plugin
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.native import library
from gpmlp.potential.potential import Potential
from gpmlp.recipe import Recipe

pytestmark = pytest.mark.skipif(library.compiled() is None, reason="gpmlp was built without a compiler")
SOAP = next(name for name in DESCRIPTORS if name.startswith("soap"))
TIGHT = 1e-12  # relative; sums over thousands of terms of the same magnitude, in another order


@pytest.fixture(scope="module")
def organic() -> Potential:
    """Random weights on hydrogen, carbon and oxygen, all baselines, two descriptors."""
    terms = random_term(descriptor(SOAP), KERNELS["polynomial 4"], scale=0.2), low_rank_term(descriptor(SOAP), 4)
    return Potential(terms, tuple(made() for made in BASELINES.values()), tuple(sorted(SPECIES)), Recipe())


BONDS = (
    "region box block 0 9 0 9 0 9\ncreate_box 3 box\nmass * 1.0\ncreate_atoms 1 random 9 1 NULL overlap 1.5 maxtry 900"
)


def organic_atoms(cell: np.ndarray, pbc, n: int = 40, seed: int = 0) -> Atoms:
    import torch

    standard, _ = Atoms(cell=cell, pbc=True).cell.standard_form()
    box = torch.tensor(np.array(standard))
    positions = scattered(n, box, seed, closest=1.05).numpy()
    numbers = np.random.default_rng(seed).choice(SPECIES, n)
    return Atoms(numbers, positions, cell=np.array(standard), pbc=pbc)


STRUCTURES = {
    "triclinic": (2.9 * TRICLINIC.numpy(), True),
    "slab": (np.diag([9.0, 8.0, 14.0]), (True, True, False)),
    "molecule": (np.diag([12.0, 11.0, 10.0]), False),
    "smaller than the cutoff": (np.array([[3.0, 0, 0], [0.9, 3.1, 0], [0.4, -0.7, 16.0]]), True),
}


def compare(found, atoms: Atoms, potential: Potential) -> None:
    atoms = atoms.copy()
    atoms.calc = GPCalculator(potential)
    forces, size = atoms.get_forces(), np.abs(atoms.get_forces()).max()
    assert size > 0.1
    assert found.energy == pytest.approx(atoms.get_potential_energy(), rel=TIGHT)
    np.testing.assert_allclose(found.energies, atoms.get_potential_energies(), rtol=TIGHT)
    np.testing.assert_allclose(found.forces, forces, rtol=0, atol=TIGHT * size)
    if atoms.pbc.all():
        stress = atoms.get_stress(voigt=False)
        np.testing.assert_allclose(found.stress, stress, rtol=0, atol=TIGHT * np.abs(stress).max())


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", STRUCTURES)
def test_as_the_ase_calculator(name, ranks, organic, tmp_path):
    cell, pbc = STRUCTURES[name]
    atoms = organic_atoms(cell, pbc)
    found = static(start(atoms, organic, tmp_path), tmp_path, ranks)
    compare(found, atoms, organic)
    of_atoms, size = found.virials.sum(0), np.abs(found.stress * found.volume).max()
    np.testing.assert_allclose(of_atoms, found.stress * found.volume, rtol=0, atol=1e-10 * size)
    of_centroids = found.centroids.sum(0)
    np.testing.assert_allclose(of_centroids, of_atoms, rtol=0, atol=1e-9 * size)
    assert np.abs(found.centroids - found.centroids.transpose(0, 2, 1)).max() > 1e-3 * np.abs(found.centroids).max()


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("boundary", ["p p s", "p p m", "s s p", "s s s"])
def test_boxes_that_follow_their_atoms(boundary, ranks, organic, tmp_path):
    """After some steps, in which atoms leave the box that there was."""
    periodic = [side == "p" for side in boundary.split()]
    atoms = organic_atoms(np.diag([9.0, 8.0, 14.0]), periodic)
    moving = "velocity all create 9000 1\nfix nve all nve\ntimestep 0.0005\nrun 25\nunfix nve\n"
    script = start(atoms, organic, tmp_path, boundary=boundary, before="processors * 1 2" if ranks > 1 else "")
    end = "write_dump all custom end id x y z modify sort id format float %.17g\n"
    found = static(script + moving + "reset_timestep 0\n" + end, tmp_path, ranks)
    atoms.positions[:] = np.loadtxt(tmp_path / "end", skiprows=9)[:, 1:]
    compare(found, atoms, organic)


@pytest.fixture(scope="module")
def learned(organic) -> Potential:
    """Fitted to labels of the other one, on hydrogen, carbon and oxygen: with variances and novelty."""
    import gpmlp
    from gpmlp.io import ase_atoms

    frames = [organic_atoms(np.diag([8.0, 8.0, 9.0]), True, 20, seed) for seed in range(8)]
    for frame in frames:
        frame.calc = GPCalculator(organic)
        frame.get_forces()
    choices = {"descriptor": {"cutoff": 3.5, "n_max": 3, "l_max": 2}, "inducing": {"n": 30, "gradients": 1}}
    recipe = gpmlp.Recipe.model_validate(choices | {"baseline": {"zbl": False}} | {"calibration": {"atoms": 60}})
    return gpmlp.fit(*ase_atoms.from_ase(frames), recipe)[0]


FORCE_ERRORS = "fix errors all pair 1 gpmlp sigma 1 novelty 1\nfix forces all pair 1 gpmlp force_sigma 1\n"
BY_ATOM = "f_errors[1] f_errors[2] f_forces[*]"


def compare_force_errors(more: np.ndarray, flagged: np.ndarray, atoms: Atoms, potential: Potential) -> None:
    said = potential(structures_from_ase([atoms]), variance="forces", atoms=np.flatnonzero(flagged).tolist())
    expected = said.forces_variance.total.sqrt().numpy()[flagged]
    np.testing.assert_allclose(more[flagged, 2:], expected, rtol=1e-6)
    assert expected.min() > 0 and not more[~flagged, 2:].any() and 0 < flagged.sum() < len(atoms)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", STRUCTURES)
def test_errors_of_forces_in_boxes_of_all_kinds(name, ranks, learned, tmp_path):
    cell, pbc = STRUCTURES[name]
    atoms = organic_atoms(cell, pbc)
    more = static(start(atoms, learned, tmp_path, "gpmlp force_atoms 5") + FORCE_ERRORS, tmp_path, ranks, BY_ATOM).more
    said = learned(structures_from_ase([atoms]), variance="atom_energies", novelty=True)
    np.testing.assert_allclose(more[:, 0], said.atom_energies_variance.total.sqrt(), rtol=1e-6)
    np.testing.assert_allclose(more[:, 1], said.novelty, rtol=1e-9)
    compare_force_errors(more, more[:, 0] >= np.sort(more[:, 0])[-5], atoms, learned)


def test_errors_of_forces_beside_atoms_of_others(learned, tmp_path):
    """Atoms whose type is NULL are none to the model."""
    atoms = organic_atoms(2.9 * TRICLINIC.numpy(), True)
    numbers = atoms.numbers.copy()
    numbers[::4] = 10
    mixed = Atoms(numbers, atoms.positions, cell=atoms.cell, pbc=True)
    style = "hybrid/overlay gpmlp force_atoms 5 lj/cut 6.0"
    script = start(mixed, learned, tmp_path, style, "gpmlp model H C O NULL").replace(
        "thermo_style", "pair_coeff * 4 lj/cut 0.01 2.0\nthermo_style", 1
    )
    more = static(script + FORCE_ERRORS, tmp_path, 2, BY_ATOM).more
    ours = numbers != 10
    assert not more[~ours].any()
    compare_force_errors(more[ours], more[ours, 0] >= np.sort(more[ours, 0])[-5], mixed[ours], learned)


def test_thresholds_of_errors_of_forces(learned, tmp_path):
    """Atoms beyond one of them, as many as these are, besides the least certain ones where these are asked for."""
    atoms = organic_atoms(*STRUCTURES["slab"])
    said = learned(structures_from_ase([atoms]), variance="atom_energies", novelty=True)
    sigma, novelty = said.atom_energies_variance.total.sqrt().numpy(), said.novelty.numpy()
    sigma_above, novelty_above = np.sort(sigma)[-12] + 1e-9, np.sort(novelty)[-7] + 1e-9
    cases = {
        f"sigma_above {sigma_above:.17g}": sigma > sigma_above,
        f"novelty_above {novelty_above:.17g}": novelty > novelty_above,
        f"novelty_above {novelty_above:.17g} sigma_above {sigma_above:.17g}": (sigma > sigma_above)
        | (novelty > novelty_above),
        f"novelty_above {novelty_above:.17g} force_atoms 3": (sigma >= np.sort(sigma)[-3]) | (novelty > novelty_above),
    }
    assert len({flagged.sum() for flagged in cases.values()}) > 2
    for options, flagged in cases.items():
        script = start(atoms, learned, tmp_path, f"gpmlp {options}") + FORCE_ERRORS
        compare_force_errors(static(script, tmp_path, 2, BY_ATOM).more, flagged, atoms, learned)
    none = start(atoms, learned, tmp_path, "gpmlp sigma_above 1e9") + FORCE_ERRORS
    assert not static(none, tmp_path, 2, BY_ATOM).more[:, 2:].any()
    # of an earlier pair_style nothing stays
    again = start(atoms, learned, tmp_path, "gpmlp sigma_above 1e-9 force_atoms 5\npair_style gpmlp force_atoms 3")
    flagged = sigma >= np.sort(sigma)[-3]
    compare_force_errors(static(again + FORCE_ERRORS, tmp_path, 2, BY_ATOM).more, flagged, atoms, learned)


@pytest.fixture(scope="module")
def copper_start(potential, tmp_path_factory):
    """(Atoms, commands, folder): 108 copper atoms far from equilibrium, by a fitted potential with variances."""
    atoms = ase.build.bulk("Cu", cubic=True).repeat(3)
    atoms.rattle(0.15, seed=5)
    folder = tmp_path_factory.mktemp("copper")
    return atoms, start(atoms, potential, folder), folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_errors_of_local_energies(ranks, potential, copper_start):
    atoms, script, folder = copper_start
    asked = "fix errors all pair 1 gpmlp sigma 1 novelty 1\n"
    found = static(script + asked, folder, ranks, "f_errors[1] f_errors[2]")
    said = potential(structures_from_ase([atoms]), variance="atom_energies", novelty=True)
    np.testing.assert_allclose(found.more[:, 0], said.atom_energies_variance.total.sqrt(), rtol=1e-7)
    np.testing.assert_allclose(found.more[:, 1], said.novelty, rtol=1e-9)
    assert found.more.min() > 0
    compare(found, atoms, potential)


@pytest.mark.parametrize("ranks", [1, 2])
def test_errors_of_forces(ranks, potential, copper_start):
    """Of the five atoms with the largest standard deviation of the local energy; 0 of all others."""
    atoms, script, folder = copper_start
    asked = "fix errors all pair 1 gpmlp sigma 1\nfix forces all pair 1 gpmlp force_sigma 1\n"
    script = script.replace("pair_style gpmlp", "pair_style gpmlp force_atoms 5")
    found = static(script + asked, folder, ranks, "f_errors f_forces[*]").more
    chosen = np.sort(np.argsort(found[:, 0])[-5:])
    said = potential(structures_from_ase([atoms]), variance="forces", atoms=chosen.tolist())
    expected = said.forces_variance.total.sqrt().numpy()[chosen]
    np.testing.assert_allclose(found[chosen, 1:], expected, rtol=1e-6)
    assert expected.min() > 0 and not np.delete(found[:, 1:], chosen, axis=0).any()


def test_ghosts_that_do_not_reach_far_enough(copper_start):
    """Standard deviations of forces would be those of environments cut off."""
    _, script, folder = copper_start
    asked = "fix forces all pair 1 gpmlp force_sigma 1\n"
    said = refusal(script + asked + "comm_modify cutoff 7\nrun 0\n", folder)
    assert "ghost atoms do not reach as far as force_sigma needs" in said


NPT = """neighbor 1.0 bin
neigh_modify every 1 delay 0 check yes
velocity all create 600 4321 mom yes loop geom
timestep 0.001
fix npt all npt temp 600 600 0.1 iso 0 0 1.0
thermo_style custom step temp pe etotal press pxx pxy vol
thermo_modify format float %.17g norm no
thermo 20
run 100
write_dump all custom final id x y z fx fy fz modify sort id format float %.17g
"""


def thermo(text: str) -> np.ndarray:
    """Rows of the last table that LAMMPS printed."""
    lines = text.splitlines()
    begin = max(k for k, line in enumerate(lines) if line.split()[:1] == ["Step"])
    end = next(k for k in range(begin, len(lines)) if lines[k].startswith("Loop time"))
    return np.array([[float(x) for x in line.split()] for line in lines[begin + 1 : end]])


def test_ranks_and_threads_change_nothing(copper_start):
    """100 steps at constant pressure, on 1, 2 and 4 processes, and with threads."""
    _, script, folder = copper_start
    found = []
    for ranks, style in ((1, "gpmlp"), (2, "gpmlp"), (4, "gpmlp"), (2, "gpmlp threads 2")):
        done = run(script.replace("pair_style gpmlp", f"pair_style {style}") + NPT, folder, ranks)
        assert done.returncode == 0, done.stdout[-2000:]
        found.append((thermo(done.stdout), np.loadtxt(folder / "final", skiprows=9)))
    assert len(found[0][0]) == 6 and found[0][0][-1, 7] != found[0][0][0, 7]
    for table, atoms in found[1:]:
        np.testing.assert_allclose(table, found[0][0], rtol=1e-9, atol=1e-6)  # of stress, whose parts cancel
        np.testing.assert_allclose(atoms, found[0][1], rtol=0, atol=1e-9)


def test_ranks_without_atoms(organic, tmp_path):
    atoms = organic_atoms(np.diag([6.0, 6.0, 6.0]), False, 20)
    atoms.cell = np.diag([40.0, 40.0, 40.0])
    script = start(atoms, organic, tmp_path, before="processors 2 2 1")
    found = static(script, tmp_path, 4, "proc")
    compare(found, atoms, organic)
    assert set(found.more[:, 0]) == {0}, "the others have no atoms"


def test_errors_where_ranks_have_no_atoms(learned, tmp_path):
    atoms = organic_atoms(np.diag([6.0, 6.0, 6.0]), False, 20)
    atoms.cell = np.diag([40.0, 40.0, 40.0])
    script = start(atoms, learned, tmp_path, "gpmlp force_atoms 5", before="processors 2 2 1") + FORCE_ERRORS
    more = static(script, tmp_path, 4, BY_ATOM).more
    compare_force_errors(more, more[:, 0] >= np.sort(more[:, 0])[-5], atoms, learned)
    apart = organic_atoms(np.diag([40.0, 40.0, 40.0]), False, 3)  # fewer atoms than are asked for
    script = start(apart, learned, tmp_path, "gpmlp force_atoms 8", before="processors 2 2 1") + FORCE_ERRORS
    assert len(static(script, tmp_path, 4, BY_ATOM).more) == 3


def test_errors_that_nobody_asks_for(copper_start):
    """`fix pair ... sigma 0` reads what was not computed; with another fix that asks on the same steps it is there."""
    atoms, script, folder = copper_start
    for name in ("sigma", "novelty", "force_sigma"):
        said = refusal(script + f"run 0\nfix errors all pair 2 gpmlp {name} 0\nrun 4\n", folder)
        assert f"fix pair reads {name}, which is computed on steps that ask for it only: write {name} 1" in said
    both = "run 0\nfix one all pair 2 gpmlp sigma 1\nrun 3\nfix two all pair 4 gpmlp sigma 0\n" + DUMP_BOTH
    done = run(script + both, folder)
    assert done.returncode == 0, done.stdout[-2000:]
    table = np.loadtxt((folder / "both").read_text().splitlines()[-len(atoms) :])
    assert table[:, 0].min() > 0 and np.array_equal(table[:, 0], table[:, 1])
    said = refusal(script + both.replace("pair 4", "pair 3"), folder)
    assert "fix pair reads sigma" in said


DUMP_BOTH = "dump both all custom 4 both f_one f_two\nrun 5\n"


def test_what_is_loaded_is_told(potential, copper_start, tmp_path):
    """The model file that an export comes from, and whether plugin and export are of one version."""
    _, script, folder = copper_start
    assert "gpmlp: model was exported by gpmlp " in (told := run(script, folder).stdout)
    assert "from a model that was in no file" in told and "WARNING: pair_style" not in told
    from gpmlp.io import archive
    from gpmlp.io.provenance import file_hash

    archive.save(potential, tmp_path / "m.gpmlp")
    exported = folder / "of_file"
    assert main.main(["export", str(tmp_path / "m.gpmlp"), "--to", "lammps", "-o", str(exported)]) == 0
    script = script.replace("* * model", "* * of_file")
    assert f"from the model file with sha256 {file_hash(tmp_path / 'm.gpmlp')}\n" in run(script, folder).stdout
    data = exported.read_bytes()
    version = re.search(rb" gpmlp (\S+) ", data)[1]
    other = data[:-8].replace(b" gpmlp " + version, b" gpmlp " + b"9" * len(version), 1)
    exported.write_bytes(other + zlib.crc32(other).to_bytes(8, "little"))
    told = " ".join(run(script + "run 0\n", folder, 2).stdout.split())
    assert f"exported by gpmlp {'9' * len(version)}, and the plugin was built by gpmlp {version.decode()}" in told
    assert told.count("WARNING: pair_style gpmlp") == 1 and "Loop time" in told


def called_by(file: Path, symbol: str) -> dict[str, str]:
    """Disassembly of a function of a shared library and of whatever it calls in there, by name; of those that run on loading too."""
    text = subprocess.run(["objdump", "-dC", "--no-show-raw-insn", str(file)], capture_output=True, text=True).stdout
    functions = dict(re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)*)", text, re.MULTILINE))
    waiting = [symbol, *(name for name in functions if "GLOBAL__sub_I" in name)]
    found: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        if name in functions and name not in found:
            found[name] = functions[name]
            waiting += re.findall(
                r"(?:call|jmp|j[a-z]+) +[0-9a-f]+ <(.*?)(?:\+0x[0-9a-f]+)?>$", found[name], re.MULTILINE
            )
    return found


def test_any_processor_can_tell_that_it_lacks_instructions():
    """What runs before the processor is known to have them makes use of none beyond those of every x86-64."""
    found = called_by(plugin(), "lammpsplugin_init")
    assert found["lammpsplugin_init"].count("call") > 10, "the guard is in here"
    wide = re.compile(r"\t(v[a-z0-9]+|andn|bextr|blsr|rorx|shlx|shrx|sarx|mulx|pdep|pext|tzcnt|lzcnt) .*")
    assert not [(name, line) for name, body in found.items() for line in wide.findall(body)]
    if "avx2" in plugin_needs():
        compute = "LAMMPS_NS::PairGPMLP::compute(int, int)"
        assert wide.search(called_by(plugin(), compute)[compute])


def plugin_needs() -> str:
    """Strings of the plugin that name instructions."""
    return " ".join(re.findall(r"avx2|fma|bmi2", plugin().read_bytes().decode("latin-1")))


def test_a_processor_that_lacks_instructions_refuses_the_plugin(tmp_path):
    """The part that runs first, told that there are none: all other parts of the plugin are left out here."""
    found = lammps()
    from gpmlp.engines import lammps as built

    headers = found.headers()
    command = [*built._compiler(found, headers), *built.FLAGS.split(), f"-I{headers}", f"-I{built.SOURCES / 'src'}"]
    quoted = {"LAMMPS_VERSION": found.version, "LAMMPS_COMMIT": found.commit, "VERSION": "1"}
    command += [f'-DGPMLP_{name}="{value}"' for name, value in quoted.items()]
    command += ["-DLAMMPS_SMALLBIG", '-DGPMLP_NEEDS=out = "avx2, fma";', "-DGPMLP_API=extern"]
    made = tmp_path / "plugin.o"
    built._run([*command, "-c", str(built.SOURCES / "lammps/plugin.cpp"), "-o", str(made)], found)
    built._run(["objcopy", "--wildcard", "--weaken-symbol=*LAMMPS_NS*", str(made)], found)
    built._run([*command, "-shared", str(made), "-o", str(tmp_path / "plugin.so")], found)
    said = run("plugin load ./plugin.so\n", tmp_path, load=False).stdout
    assert "cannot be loaded by this processor, which lacks avx2, fma: build one for this LAMMPS" in said


def test_energy_is_conserved(copper_start):
    """Over 400 steps of 1 fs at about 300 K; fluctuations are of the integrator, some 1e-4 of the kinetic energy."""
    _, script, folder = copper_start
    nve = "minimize 0 1e-3 200 500\nvelocity all create 600 4321\nfix nve all nve\ntimestep 0.001\nthermo 10\nrun 400\n"
    style = "thermo_style custom step temp pe etotal ke\nthermo_modify format float %.17g norm no\n"
    rows = thermo(run(script + style + nve, folder).stdout)
    total, kinetic = rows[:, 3], rows[:, 4]
    slope = np.polyfit(rows[:, 0], total, 1)[0] * 400
    assert abs(slope) < 1e-3 * kinetic.mean() and np.ptp(total) < 5e-3 * kinetic.mean() < np.ptp(kinetic)


def test_a_run_goes_on_from_a_restart(copper_start):
    _, script, folder = copper_start
    common = "fix nve all nve\ntimestep 0.001\nthermo_style custom step pe etotal\nthermo_modify format float %.17g norm no\n"
    whole = run(script + "velocity all create 600 1\n" + common + "run 20\nwrite_restart half\nrun 20\n", folder)
    again = run("read_restart half\npair_style gpmlp\npair_coeff * * model Cu\n" + common + "run 20\n", folder)
    assert again.returncode == 0, again.stdout[-2000:]
    np.testing.assert_allclose(thermo(again.stdout), thermo(whole.stdout), rtol=1e-10)


def test_heat_flux(organic, tmp_path):
    """Against the change of sum r_i E_i of an isolated heap in time: dE_i/dt by differences, from the ASE calculator."""
    atoms = organic_atoms(np.diag([12.0, 11.0, 10.0]), False)
    velocities = np.random.default_rng(3).standard_normal((len(atoms), 3))  # A/ps
    lines = "".join(
        f"set atom {k + 1} vx {v[0]:.17g} vy {v[1]:.17g} vz {v[2]:.17g}\n" for k, v in enumerate(velocities)
    )
    flux = """compute kinetic all ke/atom
compute potential all pe/atom
compute stress all centroid/stress/atom NULL virial
compute flux all heat/flux kinetic potential stress
thermo_style custom step pe c_flux[1] c_flux[2] c_flux[3] c_flux[4] c_flux[5] c_flux[6]
thermo_modify format float %.17g norm no
run 0
"""
    row = thermo(run(start(atoms, organic, tmp_path) + lines + flux, tmp_path).stdout)[0]
    kinetic = 0.5 * atoms.get_masses() * (velocities**2).sum(1) * MVV2E
    calculator, h = GPCalculator(organic), 1e-4

    def moved(step: float) -> Atoms:
        copy = atoms.copy()
        copy.positions += step * velocities
        copy.calc = calculator
        return copy

    here = moved(0)
    energies, power = here.get_potential_energies(), (here.get_forces() * velocities).sum(1)
    rates = (moved(h).get_potential_energies() - moved(-h).get_potential_energies()) / (2 * h)
    expected = (energies[:, None] * velocities).sum(0) + (atoms.positions * (rates + power)[:, None]).sum(0)
    found = row[2:5] - (kinetic[:, None] * velocities).sum(0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7 * np.abs(expected).max())


def test_beside_other_styles(organic, tmp_path):
    """Of the atoms of other types it sees nothing; virials are tallied pair by pair where a style beside it needs that."""
    atoms = organic_atoms(2.9 * TRICLINIC.numpy(), True)
    numbers = atoms.numbers.copy()
    numbers[:5] = 10
    mixed = Atoms(numbers, atoms.positions, cell=atoms.cell, pbc=True)
    style = "hybrid/overlay gpmlp lj/cut 6.0"
    script = start(mixed, organic, tmp_path, style, "gpmlp model H C O NULL").replace(
        "thermo_style", "pair_coeff * 4 lj/cut 0.01 2.0\nthermo_style", 1
    )
    found = static(script, tmp_path, 2)
    alone = {style: "lj/cut 6.0", "* * gpmlp model H C O NULL": "* * 0 1", " lj/cut 0.01": " 0.01"}
    for old, new in alone.items():
        script = script.replace(old, new)
    only = static(script, tmp_path)
    rest = mixed[5:]
    rest.calc = GPCalculator(organic)
    forces = np.concatenate([np.zeros((5, 3)), rest.get_forces()])
    size = np.abs(forces).max()
    assert found.energy - only.energy == pytest.approx(rest.get_potential_energy(), rel=TIGHT)
    np.testing.assert_allclose(found.forces - only.forces, forces, rtol=0, atol=TIGHT * size)
    stress = rest.get_stress(voigt=False)
    np.testing.assert_allclose(
        found.stress - only.stress, stress, rtol=0, atol=1e-11 * np.abs(stress).max()
    )  # differences

    grains = "hybrid/overlay gpmlp gran/hooke 0 NULL 0 NULL 0 0"  # needs that, and does nothing
    script = start(atoms, organic, tmp_path, grains, "gpmlp model H C O", before="comm_modify vel yes")
    script = script.replace("thermo_style", "pair_coeff * * gran/hooke\nthermo_style", 1)
    script = script.replace("atom_style atomic", "atom_style sphere").replace("read_data data", "read_data spheres")
    head, body = re.split(r"Masses.*Atoms[^\n]*", (tmp_path / "data").read_text(), flags=re.DOTALL)
    (tmp_path / "spheres").write_text(
        head + "Atoms" + re.sub(r"^( *\d+ +\d+)", r"\1 0.001 1.0", body, flags=re.MULTILINE)
    )
    usual = thermo(run(start(atoms, organic, tmp_path) + "run 0\n", tmp_path).stdout)[0]
    explicit = thermo(run(script + "run 0\n", tmp_path, 2).stdout)[0]
    np.testing.assert_allclose(explicit[3:], usual[3:], rtol=0, atol=1e-10 * np.abs(usual[3:-1]).max())


def test_what_is_refused(organic, potential, tmp_path):
    atoms = organic_atoms(np.diag([9.0, 9.0, 9.0]), True, 20)
    script = start(atoms, organic, tmp_path)
    (tmp_path / "torn").write_bytes((tmp_path / "model").read_bytes()[:-8])
    (tmp_path / "text").write_text("no model")
    line = "pair_coeff * * model H C O"
    cases = {
        "newton on": script.replace("units metal", "newton off\nunits metal"),
        "needs units metal, not real": script.replace("units metal", "units real"),
        "was not trained on Si, given for atom type 2; it knows H,C,O": script.replace(
            line, "pair_coeff * * model H Si O"
        ),
        "one element (or NULL) for each of the 3 atom types": script.replace(line, "pair_coeff * * model H C"),
        "none: cannot be read: No such file": script.replace(line, "pair_coeff * * none H C O"),
        "torn: is damaged": script.replace(line, "pair_coeff * * torn H C O"),
        "text: is no model for engines; write one by: gpmlp export": script.replace(line, "pair_coeff * * text H C O"),
        "has no option thread": script.replace("pair_style gpmlp", "pair_style gpmlp thread 2"),
        "an option lacks its value": script.replace("pair_style gpmlp", "pair_style gpmlp threads"),
        "threads must be 1 or more": script.replace("pair_style gpmlp", "pair_style gpmlp threads 0"),
        "the model knows no sigma": script + "fix errors all pair 1 gpmlp sigma 1\n",
        "the model knows no novelty": script + "fix errors all pair 1 gpmlp novelty 1\n",
        "the model knows no force_sigma": script + "fix errors all pair 1 gpmlp force_sigma 1\n",
        "sigma_above must be 0 or more": script.replace("pair_style gpmlp", "pair_style gpmlp sigma_above -1"),
        "force_atoms must be 1 or more": script.replace("pair_style gpmlp", "pair_style gpmlp force_atoms 0"),
        "give pair_coeff before fix pair": script.replace(line, "") + "fix errors all pair 1 gpmlp sigma 1\n",
        "two atoms are on top of each other": script + "set atom 1*2 x 1 y 1 z 1\n",
        "needs special_bonds lj/coul 1.0 1.0 1.0": script.replace("atom_style atomic", "atom_style bond").replace(
            "read_data data", BONDS
        ),
    }
    for said, wrong in cases.items():
        found = refusal(wrong + "run 0\n", tmp_path)
        assert said in found, (said, found)
    done = run(script + "neigh_modify exclude type 1 2\nrun 0\n", tmp_path)
    assert "WARNING: pair_style gpmlp does not see the pairs that neigh_modify exclude leaves out" in done.stdout


# what is needed to build the plugin


def fake(folder: Path, said: str = "", packages: str = "MANYBODY PLUGIN", mpi: str = "MPICH Version: 5.0") -> Path:
    """An executable that describes itself as LAMMPS does."""
    text = (
        said
        or f"""
Large-scale Atomic/Molecular Massively Parallel Simulator - 22 Jul 2025 - Update 4

MPI v5.0: {mpi}

Installed packages:

{packages}

"""
    )
    folder.mkdir(exist_ok=True)
    executable = folder / "lmp"
    executable.write_text(f"#!/bin/sh\ncat <<'EOF'\n{text}\nEOF\n")
    executable.chmod(0o755)
    return executable


def test_what_lacks_for_the_plugin_is_named(tmp_path, monkeypatch, capsys):
    headers = tmp_path / "full/include/lammps"
    headers.mkdir(parents=True)
    (headers / "pair.h").touch()
    (tmp_path / "old/src").mkdir(parents=True)
    (tmp_path / "old/src/pair.h").touch()
    (tmp_path / "old/src/version.h").write_text('#define LAMMPS_VERSION "2 Aug 2023"')
    (tmp_path / "empty").mkdir()
    without_compiler = tmp_path / "tools"
    without_compiler.mkdir()
    (without_compiler / "cat").symlink_to(shutil.which("cat"))
    cases = {
        "there is no executable of LAMMPS": tmp_path / "empty",
        "does not say as LAMMPS does which version": fake(tmp_path / "other", "hello"),
        "was built without the package PLUGIN.*pip install lammps mpich": fake(tmp_path / "bare", packages="MANYBODY"),
        "its header files are not there.*liblammps-dev": fake(tmp_path / "headless"),
        "are of version 2 Aug 2023; build LAMMPS of them again": fake(tmp_path / "old/build"),
        "no compiler with its MPI was found.*libopenmpi-dev": fake(tmp_path / "full", mpi="Open MPI v4.1"),
        "no compiler with its MPI was found.*src/STUBS/mpi.h": fake(tmp_path / "full2", mpi="LAMMPS MPI STUBS"),
    }
    shutil.copytree(headers, tmp_path / "full2/include/lammps")
    for said, place in cases.items():
        with pytest.raises(UserError, match=f"(?s){said}"), monkeypatch.context() as changed:
            changed.setenv("PATH", "/bin" if "compiler" not in said else str(without_compiler))
            build_plugin(place, tmp_path / "made.so")
    assert not (tmp_path / "made.so").exists()
    command = ["lammps", "build", "--lammps", str(tmp_path / "bare/lmp"), "-o", str(tmp_path / "made.so")]
    assert main.main(command) == 2 and "without the package PLUGIN" in " ".join(capsys.readouterr().err.split())


def test_flags_about_the_processor_reach_the_fast_part_only(tmp_path, monkeypatch):
    found, commands = lammps(), []
    monkeypatch.setattr(engine, "_run", lambda command, found: commands.append(command) or "")
    monkeypatch.setattr(engine.Installation, "run", lambda *_: subprocess.CompletedProcess([], 0, "", ""))
    monkeypatch.setenv("CXXFLAGS", "-march=native -DMINE -I/mine")
    engine._compile(found, tmp_path, tmp_path)
    made = {Path(command[command.index("-c") + 1]).stem: command for command in commands if "-c" in command}
    assert set(made) == {"plugin", "pair_gpmlp"}
    assert all({"-DMINE", "-I/mine"} < set(command) for command in made.values())
    assert "-march=native" in made["pair_gpmlp"] and not [f for f in made["plugin"] if f.startswith("-m")]


def test_another_version_refuses_the_plugin(tmp_path):
    """By one sentence: made for another version, update, or sizes; nothing else of LAMMPS is touched before."""
    data = plugin().read_bytes()
    found = lammps()
    for old, new in ((found.version, "29 Aug 2024"), (found.commit, found.commit[:-1] + "3")):
        assert len(old) == len(new)
        (tmp_path / "other.so").write_bytes(data.replace(old.encode(), new.encode()))
        done = run("plugin load ./other.so\npair_style gpmlp\n", tmp_path, load=False)
        (said,) = (line for line in done.stdout.splitlines() if line.startswith("ERROR"))
        assert "this plugin of gpmlp is for LAMMPS" in said and new in said.split("cannot")[0]
        assert f"cannot be loaded by LAMMPS {found.version}" in said
        assert done.returncode and "gpmlp lammps build --lammps PATH" in done.stdout
