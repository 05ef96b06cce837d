"""How do I run many systems at once?

Dynamics of four strained silicon crystals in one batch with TorchSim (pip install '.[torchsim]'), then their energies with error bars.
"""

from pathlib import Path

import torch_sim as ts
from ase.build import bulk

import gpmlp
from gpmlp.engines.torchsim import GPModel

DATA = Path(__file__).resolve().parents[1] / "data/silicon"

potential, _ = gpmlp.fit(*gpmlp.read(DATA / "train.xyz", "::4"), gpmlp.Recipe(inducing={"n": 50, "gradients": 2}))
model = GPModel(potential, uncertainty="energies", novelty=True)

lattice = (5.3, 5.4, 5.5, 5.6)
state = ts.initialize_state([bulk("Si", a=a, cubic=True) for a in lattice], model.device, model.dtype)
langevin = ts.Integrator.nvt_langevin if hasattr(ts, "Integrator") else ts.integrators.nvt_langevin  # TorchSim 0.6, 0.3
state = ts.integrate(
    system=state, model=model, integrator=langevin, n_steps=50, timestep=0.002, temperature=300
)  # ps, K

found = model(state)
for a, energy, std in zip(lattice, found["energy"] / 8, found["energy_std"] / 8):
    print(f"a = {a:.1f} A: {energy:.3f} +- {std:.3f} eV/atom")
