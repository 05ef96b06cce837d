"""Cheap estimates of the force σ beside the exact one and the true errors, by config_type, and what they cost.

    OMP_NUM_THREADS=1 python tests/benchmarks/alarm.py MODEL.gpmlp LABELLED.xyz [--most 20] [--samples 4 8 16] [--json alarm.json]

Spearman correlations over all atoms of a config_type with the exact calibrated σ of the force vector / with the true error of it, for the
σ of the local energy, the novelty and estimates from posterior samples (potential/force_samples.py); the median and the 5 to 95 %
interval of estimated / exact σ. The file is to hold structures that the model was not fitted to. Costs are CPU times of one prediction of
the largest structure, in predictions of energy and forces alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import common

sys.path.insert(0, str(common.ROOT))

import numpy as np
import torch
from torch import Tensor

import gpmlp
from gpmlp.core.quantities import Prediction, Variance
from gpmlp.potential import force_samples
from gpmlp.potential.potential import Potential
from gpmlp.uncertainty.scores import spearman_correlation

TURNS = 7


def std(covariance: Variance) -> Tensor:
    """(atoms,) of the force vector, eV/A."""
    return covariance.total.diagonal(dim1=1, dim2=2).sum(1).sqrt()


def with_members(potential: Potential, members: int) -> Potential:
    """A copy whose estimates are made from so many samples."""
    force_samples.MEMBERS = members
    copy = replace(potential)
    _ = copy.force_samples
    return copy


def candidates(potential: Potential, structures, members: list[int]) -> tuple[Prediction, dict[str, Tensor]]:
    """The prediction with exact variances, and by name (atoms,) what might stand for them."""
    apart = [structures.select([i]) for i in range(len(structures))]
    exact = Prediction.concatenate([potential(one, ("forces", "atom_energies"), novelty=True) for one in apart])
    out = {"local energy": exact.atom_energies_variance.total.sqrt(), "novelty": exact.novelty}
    for n in members:
        few = with_members(potential, n)
        estimates = [few(one, "sampled_forces").sampled_forces_covariance for one in apart]
        out[f"{n} samples"] = torch.cat([std(one) for one in estimates])
    return exact, out


def ranks(exact: Tensor, errors: Tensor, found: dict[str, Tensor], mask: Tensor) -> dict[str, dict[str, float]]:
    """Of the atoms of a mask: correlations with the exact σ and with the errors, and quantiles of the ratio to the former."""
    rows = {}
    for name, value in {**found, "exact": exact}.items():
        ratio = (value / exact)[mask].quantile(torch.tensor([0.05, 0.5, 0.95], dtype=value.dtype)).tolist()
        with_exact, with_error = (spearman_correlation(value[mask], other[mask]) for other in (exact, errors))
        rows[name] = {"exact": with_exact, "error": with_error, "low": ratio[0], "median": ratio[1], "high": ratio[2]}
    return rows


def costs(potential: Potential, structure, members: list[int]) -> dict[str, float]:
    """Force calls that a prediction takes."""

    def least(run: Callable[[], object], turns: int = TURNS) -> float:
        run()
        taken = []
        for _ in range(turns):
            start = time.process_time()
            run()
            taken.append(time.process_time() - start)
        return min(taken)

    call = least(lambda: potential(structure))
    out = {"local energy": least(lambda: potential(structure, "atom_energies", novelty=True)) / call}
    for n in members:
        few = with_members(potential, n)
        out[f"{n} samples"] = least(lambda few=few: few(structure, "sampled_forces", novelty=True)) / call
    return out | {"exact": least(lambda: potential(structure, "forces", novelty=True), 1) / call}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--most", type=int, default=20, help="structures of each config_type")
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    structures, known = gpmlp.read(options.data)
    types, counts = np.array(known.config_types), structures.counts.numpy()
    chosen = [
        i for t in sorted(set(types)) for i in ((types == t) & (counts > 1)).nonzero()[0][: options.most].tolist()
    ]
    known, structures = known.select(structures, chosen), structures.select(chosen)
    potential = gpmlp.load(options.model)
    prediction, found = candidates(potential, structures, options.samples)
    exact, errors = std(prediction.forces_covariance), (prediction.forces - known.forces).norm(dim=1)
    of_atoms = np.array(known.config_types)[structures.structure_of_atom.numpy()]
    groups = {"all": np.ones(len(of_atoms), bool)} | {t: of_atoms == t for t in sorted(set(of_atoms))}
    tables = {t: ranks(exact, errors, found, torch.as_tensor(mask)) for t, mask in groups.items()}
    cost = costs(potential, structures.select([int(structures.counts.argmax())]), options.samples)
    rows = [[t, *(f"{row[n]['exact']:.2f}/{row[n]['error']:.2f}" for n in row)] for t, row in tables.items()]
    print(common.table(rows, ["with exact / error", *tables["all"]]))
    quantiles = {n: [f"{tables['all'][n][k]:.2f}" for k in ("low", "median", "high")] for n in cost}
    rows = [[n, *quantiles[n], f"{cost[n]:.1f}"] for n in cost]
    print(common.table(rows, ["over exact", "5 %", "median", "95 %", "force calls"]))
    if options.json:
        options.json.write_text(json.dumps({"ranks": tables, "cost": cost}, indent=1) + "\n")


if __name__ == "__main__":
    main()
