"""Accuracy and cost of features of pretrained networks, beside SOAP alone, from few structures.

    python tests/benchmarks/pretrained.py --data DATA/rmd17_ethanol [--train 50] [--tests 100] [--recipes soap beside]

DATA holds train.xyz and test.xyz. Structures are evenly drawn. Needs the package sevenn (the extra `pretrained`). One line of JSON for each
recipe: errors, coverage of intervals of 90 %, seconds of the fit and of a prediction with forces, on the threads that there are.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import gpmlp


def recipes(checkpoint: str, weight: float) -> dict[str, dict]:
    """By name."""
    network = {"name": "sevennet", "checkpoint": checkpoint}
    return {
        "soap": {},
        "soap, functionals": {"inducing": {"functionals": "all"}},
        "beside": {"descriptor": [{"name": "soap"}, network | {"weight": weight}]},
        "alone": {"descriptor": network},
        "added": {"descriptor": [{"name": "soap"}, network]},
        "delta": {"baseline": {"network": network}, "inducing": {"functionals": "all"}},
        "delta and beside": {
            "descriptor": [{"name": "soap"}, network | {"weight": weight}],
            "baseline": {"network": network},
        },
    }


def measure(recipe: gpmlp.Recipe, train: tuple, test: tuple) -> dict:
    start = time.perf_counter()
    potential, report = gpmlp.fit(*train, recipe)
    fitted = time.perf_counter()
    potential(test[0])
    predicted = time.perf_counter()
    errors = gpmlp.evaluate(potential, *test).overall
    made = potential.terms[0].descriptor
    return {
        "force_mae_meV_per_A": errors.force_mae_meV_per_A,
        "energy_mae_meV_per_atom": errors.energy_mae_meV_per_atom,
        "log_evidence": -report.negative_log_evidence,
        "columns": report.columns,
        "features": made.n_features,
        "lost": made.network.lost.tolist() if hasattr(made, "network") else None,
        "fit_s": fitted - start,
        "predict_ms_per_structure": 1e3 * (predicted - fitted) / len(test[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", type=int, default=50)
    parser.add_argument("--tests", type=int, default=100)
    parser.add_argument("--checkpoint", default="7net-l3i5")
    parser.add_argument("--weight", type=float, default=0.1)
    parser.add_argument("--recipes", nargs="+", default=["soap", "beside", "delta"])
    given = parser.parse_args()
    known, both = recipes(given.checkpoint, given.weight), []
    for name, wanted in (("train", given.train), ("test", given.tests)):
        structures, targets = gpmlp.read(given.data / f"{name}.xyz")
        chosen = torch.linspace(0, len(structures) - 1, wanted).long()
        both.append((structures.select(chosen), targets.select(structures, chosen)))
    for name in given.recipes:
        numbers = measure(gpmlp.Recipe.model_validate(known[name]), *both)
        about = {"recipe": name, "checkpoint": given.checkpoint, "train": given.train, "tests": given.tests}
        print(json.dumps(about | numbers), flush=True)


if __name__ == "__main__":
    main()
