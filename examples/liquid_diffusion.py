"""How fast does it diffuse at another temperature, and how sure is that, from DFT labels of a few small cells?

Fits silicon (PBE), lets the mean potential and samples of its posterior move a liquid at three temperatures, and reads the Arrhenius line
where nothing was run. A larger cell, more samples and longer runs narrow the interval; results.notes say what to know of them.
"""

from pathlib import Path

import ase.io

import gpmlp
from gpmlp.properties.transport import TransportSettings

DATA = Path(__file__).resolve().parents[1] / "data/silicon"

potential, _ = gpmlp.fit(
    *gpmlp.read(DATA / "train.xyz", "::2"),
    gpmlp.Recipe(descriptor={"cutoff": 4.5, "n_max": 5, "l_max": 4}, inducing={"n": 100, "gradients": 2}),
)
frames = ase.io.read(DATA / "train.xyz", ":")
liquid = next(frame for frame in frames if frame.info["config_type"] == "liquid_16")

settings = TransportSettings(
    (1800.0, 2200.0, 2600.0), samples=5, replicas=2, segment_ps=1.0, equilibrate_ps=0.5, length_ps=2.0
)
results = gpmlp.transport(potential, liquid, settings)
for value in (*results.values, results.arrhenius["Si"].diffusion_at(2000.0)):
    parts = ", ".join(f"{name} {part:.2g}" for name, part in value.parts.items())
    print(f"{value.name}: {value.value:.3g} {value.unit}, 90 % in {value.low_90:.3g} to {value.high_90:.3g} ({parts})")
print(f"stopped as {results.stopped}")
