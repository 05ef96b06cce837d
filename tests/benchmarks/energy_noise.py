"""Noise of energies: what leave-one-out chooses, with and without config_types, and how errors in the test depend on it.

    python tests/benchmarks/energy_noise.py --data DATA --case zuo_si [--n 100] [--gradients 3] [--step 1] [--sigma 0.01 0.1 1]

Rows: the choice of a fit; that without config_types; that which follows config_types whatever it costs in forces; and each --sigma
(meV/atom) given. DATA as in accuracy.py. Columns: σ of energies, RMSE of the training energies, MAE and RMSE of energies (meV/atom) and
MAE of forces (meV/A) in each test file.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common
from accuracy import CASES
from groups import OWN, files, read

import gpmlp
from gpmlp.gp import energy_noise
from gpmlp.potential.evaluation import error_table
from gpmlp.recipe import Recipe


def run(options: argparse.Namespace) -> tuple[list[list[str]], list[str]]:
    """Rows of the table, and its header."""
    train, tests = files(options.case, options.data)
    structures, targets = read(options.case, train)
    judged = {name: read(options.case, [path], options.step) for name, path in tests.items()}
    plain = {"inducing": {"n": options.n, "gradients": options.gradients}, "variance": False, "calibration": False}
    plain["novelty"] = False
    alike = tuple(c if "isolated" in c else "" for c in targets.config_types)
    guard = energy_noise.FORCES
    fits: list[tuple] = [
        ("chosen", targets, {}, guard),
        ("without config_types", replace(targets, config_types=alike), {}, guard),
    ]
    fits.append(("without guard", targets, {}, math.inf))
    fits += [(f"given {s:g}", targets, {"noise": {"energy_per_atom": 1e-3 * s}}, guard) for s in options.sigma]
    rows = []
    for name, labels, more, limit in fits:
        energy_noise.FORCES = limit
        potential, report = gpmlp.fit(structures, labels, Recipe.model_validate(plain | more))
        row = [name, f"{1e3 * report.noise['energies']:.3g}", f"{1e3 * report.train_rmse['energies']:.3g}"]
        for some, known in judged.values():
            table = error_table(some, known, potential(some))
            row += [f"{table.energy_mae_meV_per_atom:.2f}", f"{table.energy_rmse_meV_per_atom:.2f}"]
            row += [f"{table.force_mae_meV_per_A:.1f}"]
        rows.append(row)
    energy_noise.FORCES = guard
    return rows, [
        "noise",
        "sigma",
        "train",
        *(f"{name} {what}" for name in judged for what in ("MAE", "RMSE", "F MAE")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the data sets")
    parser.add_argument("--case", choices=[*OWN, *CASES], default="data_silicon")
    parser.add_argument("--n", type=int, default=100, help="inducing points")
    parser.add_argument("--gradients", type=int, default=3, help="of each")
    parser.add_argument("--step", type=int, default=1, help="take every so many frames of the test files")
    parser.add_argument("--sigma", type=float, nargs="*", default=[], help="meV/atom, given")
    rows, header = run(parser.parse_args())
    print(common.table(rows, header))


if __name__ == "__main__":
    main()
