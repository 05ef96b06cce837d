"""Which structures of a pool are worth the next DFT calculations?

Fits silicon to a few structures and picks five of those left, none of which says what another says already: once picked, a structure
counts as known when the next is chosen.
"""

from pathlib import Path

import gpmlp
from gpmlp.learning import pool

DATA = Path(__file__).resolve().parents[1] / "data/silicon"

structures, targets = gpmlp.read(DATA / "train.xyz", "::8")
potential, _ = gpmlp.fit(structures, targets, gpmlp.Recipe(inducing={"n": 50, "gradients": 2}))

candidates, labels = gpmlp.read(DATA / "test.xyz")
picked = pool.select_pool(candidates, 5, "variance", potential, exclude=structures)
for index, score in zip(picked.structures.tolist(), picked.scores.tolist()):
    kind = labels.config_types[index]
    print(f"structure {index:2d} ({kind}): standard deviation of a local energy {1e3 * score:.0f} meV")
