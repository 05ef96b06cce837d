"""Would another kernel describe my data better?

Fits silicon with a polynomial kernel of body order 5, with one of body order 9, and with a sum of a polynomial and an exponential;
the data themselves, by their evidence, and structures not seen in the fit, by their errors, say which is better.
"""

from pathlib import Path

import gpmlp

DATA = Path(__file__).resolve().parents[1] / "data/silicon"
KERNELS = {
    "(x.x')^2": {"zeta": 2},
    "(x.x')^4": {"zeta": 4},
    "(x.x')^2 + exp(x.x' - 1)": {"name": "sum", "terms": [{"zeta": 2}, {"name": "exponential", "length": 1.0}]},
}

train, test = gpmlp.read(DATA / "train.xyz", "::4"), gpmlp.read(DATA / "test.xyz")
for name, kernel in KERNELS.items():
    recipe = gpmlp.Recipe(kernel=kernel, inducing={"n": 50, "gradients": 2}, variance=False, novelty=False)
    potential, report = gpmlp.fit(*train, recipe)
    errors = gpmlp.evaluate(potential, *test).overall
    print(
        f"{name:24s} log evidence {-report.negative_log_evidence:.0f}, force error {errors.force_mae_meV_per_A:.0f} meV/A"
    )
