"""i-PI and OpenMM with the ASE calculator: energies, forces and stresses arrive in their units, and neighbours are kept between calls."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import units
from ase.calculators.socketio import SocketClient
from systems import mixed_potential
from test_lammps_external import crystal_atoms, mixed_atoms

from gpmlp.engines.ase import GPCalculator

IPI = """<simulation verbosity="quiet"><total_steps>{steps}</total_steps><prng><seed>1</seed></prng><output prefix="out">
<properties filename="energy">[potential{{electronvolt}}, virial_md, conserved{{electronvolt}}]</properties>
<trajectory filename="forces" format="ase" stride="{steps}">forces{{ase}}</trajectory>
</output><ffsocket name="gpmlp" mode="unix" pbc="False"><address>{address}</address><latency>1e-4</latency></ffsocket>
<system><initialize nbeads="{beads}"><file mode="ase">start.xyz</file><velocities mode="thermal" units="kelvin">300</velocities>
</initialize><forces><force forcefield="gpmlp"/></forces><ensemble><temperature units="kelvin">300</temperature></ensemble>
<motion mode="dynamics"><dynamics mode="nve"><timestep units="femtosecond">1</timestep></dynamics></motion></system></simulation>"""


def run_ipi(atoms, folder: Path, steps: int, beads: int) -> np.ndarray:
    """Columns of the properties file of a run, with forces of these atoms' calculator."""
    pytest.importorskip("ipi", reason="i-PI is not installed (pip install 'gpmlp[engines]')")
    address = f"gpmlp_test_{time.time_ns()}"
    ase.io.write(folder / "start.xyz", atoms)
    (folder / "input.xml").write_text(IPI.format(address=address, steps=steps, beads=beads))
    command = [Path(sys.executable).with_name("i-pi"), "input.xml"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as ipi:
        try:
            while not (socket := Path(f"/tmp/ipi_{address}")).exists():
                assert ipi.poll() is None, ipi.stdout.read()
                time.sleep(0.01)
            SocketClient(unixsocket=address, timeout=60).run(atoms, use_stress=True)
            said, _ = ipi.communicate(timeout=60)
            assert ipi.returncode == 0, said
        finally:
            ipi.kill()
    assert not socket.exists()
    return np.loadtxt(folder / "out.energy", ndmin=2)


def test_ipi_gets_energies_and_stresses(tmp_path):
    """Of a triclinic cell with three species; the file has nine digits."""
    atoms = mixed_atoms("triclinic")
    atoms.calc = GPCalculator(mixed_potential())
    energy, forces, stress = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()[[0, 1, 2, 5, 4, 3]]
    row = run_ipi(atoms, tmp_path, 1, 1)[0]
    assert row[0] == pytest.approx(energy, rel=1e-7)
    np.testing.assert_allclose(
        row[1:7] * units.Hartree / units.Bohr**3, -stress, rtol=1e-6, atol=1e-8
    )  # CODATA of other years
    there = np.loadtxt(tmp_path / "out.forces_0.extxyz", skiprows=2, usecols=(4, 5, 6), max_rows=len(atoms))
    np.testing.assert_allclose(there, forces, rtol=1e-6, atol=1e-7)


def test_ipi_moves_replicas_with_one_list_of_neighbours(potential, tmp_path):
    atoms = crystal_atoms(potential)
    conserved = run_ipi(atoms, tmp_path, 40, 4)[:, 7]
    assert np.ptp(conserved) < 2e-3 * len(atoms)
    assert atoms.calc._verlet_list.searched < 10  # of 164 calls


def test_openmm_gets_energies_and_forces(potential):
    """Of a triclinic cell as OpenMM wants it; 300 steps of constant energy."""
    mm = pytest.importorskip("openmm", reason="OpenMM is not installed (pip install 'gpmlp[engines]')")
    from openmm.unit import angstrom, kilojoule_per_mole, nanometer

    atoms, ev = crystal_atoms(potential), units.mol / units.kJ
    atoms.set_cell(atoms.cell.array + [[0, 0, 0], [0.3, 0, 0], [-0.2, 0.1, 0]], scale_atoms=True)

    def compute(state):
        atoms.set_cell(state.getPeriodicBoxVectors(asNumpy=True).value_in_unit(angstrom))
        atoms.set_positions(state.getPositions(asNumpy=True).value_in_unit(angstrom))
        return ev * atoms.get_potential_energy(), 10 * ev * atoms.get_forces()

    wanted, forces = atoms.get_potential_energy(), atoms.get_forces()
    force, system = mm.PythonForce(compute), mm.System()
    force.setUsesPeriodicBoundaryConditions(True)
    system.addForce(force)
    system.setDefaultPeriodicBoxVectors(*(0.1 * atoms.cell.array))
    for mass in atoms.get_masses():
        system.addParticle(mass)
    context = mm.Context(system, mm.VerletIntegrator(0.002), mm.Platform.getPlatform("Reference"))
    context.setPositions(0.1 * atoms.positions)
    context.setVelocitiesToTemperature(300, 1)
    state = context.getState(energy=True, forces=True)
    assert state.getPotentialEnergy().value_in_unit(kilojoule_per_mole) / ev == pytest.approx(wanted, abs=1e-9)
    there = state.getForces(asNumpy=True).value_in_unit(kilojoule_per_mole / nanometer) / (10 * ev)
    np.testing.assert_allclose(there, forces, atol=1e-9)
    total = []
    for _ in range(30):
        state = context.getState(energy=True)
        total.append((state.getPotentialEnergy() + state.getKineticEnergy()).value_in_unit(kilojoule_per_mole) / ev)
        context.getIntegrator().step(10)
    assert np.ptp(total) < 1e-3 * len(atoms)
    assert atoms.calc._verlet_list.searched < 40
