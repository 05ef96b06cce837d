"""How do I let nuclei be quantum-mechanical?

i-PI moves 8 replicas of a silicon crystal and asks gpmlp for their energies, forces and stresses over a socket.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from ase import io, units
from ase.build import bulk
from ase.calculators.socketio import SocketClient

import gpmlp
from gpmlp.engines.ase import GPCalculator

DATA = Path(__file__).resolve().parents[1] / "data/silicon"
INPUT = """<simulation verbosity="quiet"><total_steps>400</total_steps><prng><seed>1</seed></prng>
<output prefix="pimd"><properties filename="out">[kinetic_cv{electronvolt}, pressure_cv{gigapascal}]</properties></output>
<ffsocket name="gpmlp" mode="unix" pbc="False"><address>ADDRESS</address><latency>1e-4</latency></ffsocket>
<system><initialize nbeads="8"><file mode="ase">start.xyz</file><velocities mode="thermal" units="kelvin">150</velocities>
</initialize><forces><force forcefield="gpmlp"/></forces><ensemble><temperature units="kelvin">150</temperature></ensemble>
<motion mode="dynamics"><dynamics mode="nvt"><timestep units="femtosecond">2</timestep><thermostat mode="pile_l"><tau
units="femtosecond">100</tau></thermostat></dynamics></motion></system></simulation>"""

recipe = gpmlp.Recipe(inducing={"n": 50, "gradients": 2})
atoms = bulk("Si", a=5.47, cubic=True)
atoms.calc = GPCalculator(gpmlp.fit(*gpmlp.read(DATA / "train.xyz", "::4"), recipe)[0])
io.write("start.xyz", atoms)
Path("input.xml").write_text(INPUT.replace("ADDRESS", address := f"gpmlp_{os.getpid()}"))
with subprocess.Popen([Path(sys.executable).with_name("i-pi"), "input.xml"]) as ipi:
    while not Path(f"/tmp/ipi_{address}").exists() and ipi.poll() is None:
        time.sleep(0.01)
    SocketClient(unixsocket=address).run(atoms, use_stress=True)
kinetic, pressure = np.loadtxt("pimd.out")[100:].mean(0)
print(f"kinetic energy {1e3 * kinetic / 8:.1f} meV/atom, {1e3 * 1.5 * units.kB * 150:.1f} in classical mechanics")
print(f"pressure {pressure:.2f} GPa")
