"""How does LAMMPS stop where the model is uncertain, and go on when it has learned that?"""

from pathlib import Path

import ase.build
import ase.io
from ase.calculators.emt import EMT

import gpmlp
from gpmlp.engines.lammps import build_plugin, find_lammps
from gpmlp.io.export import export_model

HEATED = """plugin load ./gpmlp_plugin.so
units metal
if "$(is_file(state))" then "read_restart state" else "read_data start.data" "velocity all create 600 1"
pair_style gpmlp
pair_coeff * * copper.model Cu
fix heat all nvt temp 300 900 0.1
fix errors all pair 10 gpmlp sigma 1 novelty 1
compute worst all reduce max f_errors[1] f_errors[2]
variable novelty equal c_worst[2]
fix stop all halt 10 v_novelty > 2.0 error continue message no
run 1500 upto start 0 stop 1500
write_restart state
write_dump all extxyz halted.xyz modify sort id element Cu
print "step $(step) at $(temp:%.0f) K: sigma $(1000*c_worst[1]:%.0f) meV, novelty $(c_worst[2]:%.2f)"
"""
Path("gpmlp_plugin.so").exists() or build_plugin(output="gpmlp_plugin.so")  # as gpmlp lammps build does
Path("in.lammps").write_text(HEATED)
crystal = ase.build.bulk("Cu", cubic=True) * 2
ase.io.write("start.data", crystal, format="lammps-data", masses=True)
new = [rattled for seed in range(4) if not (rattled := crystal.copy()).rattle(0.05, seed=seed)]
while new:
    for frame in new:  # effective medium theory, in place of DFT
        frame.calc = EMT()
        frame.get_forces()
        ase.io.write("train.xyz", frame, append=True)
    export_model(gpmlp.fit(*gpmlp.read("train.xyz"))[0], "copper.model")
    print(said := find_lammps().run("-in", "in.lammps", "-log", "none").stdout.splitlines()[-2])
    new = [] if "step 1500" in said else [ase.io.read("halted.xyz")]
