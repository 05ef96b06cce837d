"""How well predicted uncertainties match errors, with and without calibration, beside a committee of equal cost and trivial indicators.

    python tests/benchmarks/uncertainty.py --data DATA [--cases acac zuo_si] [--no-committee] [--json uncertainty.json]

DATA holds the folders named in accuracy.py. Each case is fitted with its recipe (recipes/CASE.yaml; an empty one is the default) and
judged on its test files: coverage, NLL (nats per force component, eV/A) and Spearman's coefficient of per-atom norms. The committee
is eight sparse processes on bootstrap samples of the structures, each with 1/sqrt(8) of the columns (the cost goes with their square), its
variance weighted and given a constant by the same held-out structures as ours: without those it would have none.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common
from accuracy import CASES

import gpmlp
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting import calibrate
from gpmlp.gp.variance import VARIANCES
from gpmlp.potential.evaluation import compare_prediction, score_variances
from gpmlp.recipe import Recipe
from gpmlp.report.model.data import compare_indicators
from gpmlp.uncertainty.calibration import Calibration, calibrate_prediction
from gpmlp.uncertainty.scores import Scores, score_errors
from gpmlp.uncertainty.variance_weights import fit_variance_weights

MEMBERS = 8
SHARE = 6  # of the centres, for each member


def read(paths: list[Path]) -> tuple[Structures, Targets]:
    parts = [gpmlp.read(path) for path in paths]
    return Structures.concatenate([s for s, _ in parts]), Targets.concatenate([t for _, t in parts])


def committee(recipe: Recipe, structures: Structures, targets: Targets, tests: dict) -> tuple[dict[str, Scores], float]:
    """Forces of bootstrap members: their mean as prediction, their weighted variance and a constant as uncertainty."""
    kept, held, _ = calibrate.calibration_split(structures, targets, recipe.calibration, recipe.seed)
    inducing = tuple(i.model_copy(update={"n": max(1, round(i.n / SHARE))}) for i in recipe.inducings)
    small = recipe.model_copy(update={"inducing": inducing, "variance": False, "calibration": False, "novelty": False})
    sets = tests | {"held out": (structures.select(held), targets.select(structures, held))}
    forces: dict[str, list[torch.Tensor]] = {name: [] for name in sets}
    start = time.process_time()
    for member in range(MEMBERS):
        drawn = kept[torch.randint(len(kept), (len(kept),), generator=torch.Generator().manual_seed(member))]
        potential, _ = gpmlp.fit(structures.select(drawn), targets.select(structures, drawn), small)
        for name, (some, _) in sets.items():
            forces[name].append(potential(some).forces)
    cpu = time.process_time() - start
    found, weights = {}, None
    for name in ["held out", *tests]:
        stacked = torch.stack(forces[name])
        error = (stacked.mean(0) - sets[name][1].forces).flatten()
        parts = torch.stack([stacked.var(0).flatten(), torch.full_like(error, 1e-3)], dim=1)
        weights = fit_variance_weights(error, parts) if weights is None else weights
        atom = torch.arange(sets[name][0].n_atoms).repeat_interleave(3)
        found[name] = score_errors(error, (parts @ weights).sqrt(), group=atom)
    return found, cpu


def run(name: str, data: Path, options: argparse.Namespace) -> dict:
    case = CASES[name]
    structures, targets = read([data / path for path in case.train])
    tests = {label: gpmlp.read(data / path, f"::{options.step}") for label, path in case.tests.items()}
    recipe = Recipe.model_validate(
        yaml.safe_load((options.recipe or common.RECIPES / f"{name}.yaml").read_text()) or {}
    )
    start = time.process_time()
    potential, report = gpmlp.fit(structures, targets, recipe)
    result: dict = {"cpu_s": time.process_time() - start, "columns": report.rank, "tests": {}}
    result["variance_columns"] = potential.variances.n_columns
    result["calibration"] = {k: asdict(v) for k, v in potential.calibration.kinds.items()}
    rival, cpu = committee(potential.recipe, structures, targets, tests) if options.committee else ({}, 0.0)
    result["committee_cpu_s"] = cpu
    for label, (some, known) in tests.items():
        start = time.process_time()
        plain = potential(some, variance=VARIANCES, novelty=True, calibrated=False)
        result["predict_ms_per_atom"] = 1e3 * (time.process_time() - start) / some.n_atoms
        found = compare_prediction(
            some, known, calibrate_prediction(plain, some, potential.calibration), potential.calibration
        )
        entry = {"calibrated": found.as_dict(), "rivals": compare_indicators(potential, some, known, found)}
        # as the evidence left it: with some, all and nothing of what the inducing set cannot represent
        raw, size = plain.forces_covariance, potential.variances.amplitude
        for form, share in (("scaled", 1.0), ("dtc", 1 / size), ("sor", 0.0)):
            prediction = replace(plain, forces_covariance=replace(raw, inducing=share * raw.inducing))
            entry[f"raw_{form}"] = asdict(score_variances(some, known, prediction, Calibration.identity())["forces"])
        entry |= {"committee": asdict(rival[label])} if rival else {}
        result["tests"][label] = entry
    return result


def rows(results: dict[str, dict]) -> list[list[str]]:
    out = []
    for name, result in results.items():
        for label, entry in result["tests"].items():
            c = entry["calibrated"]
            k, raw = entry.get("committee"), [entry[f"raw_{form}"] for form in ("scaled", "dtc", "sor")]
            nearest = (entry["rivals"] or {}).get("distance to the nearest inducing environment", {}).get("Spearman")
            out.append(
                [
                    f"{name} {label}",
                    f"{c['force_mae_meV_per_A']:.1f}",
                    f"{100 * c['force_coverage_90']:.1f}",
                    " / ".join(f"{100 * r['coverage_90']:.1f}" for r in raw),
                    f"{c['force_spearman']:.2f} / {nearest:.2f}",
                    f"{c['force_nll']:.3f}",
                    f"{k['nll']:.3f} / {100 * k['coverage_90']:.0f} / {k['spearman']:.2f}" if k else "-",
                    f"{100 * c['energy_coverage_90']:.0f}",
                    f"{result['cpu_s']:.0f} / {result['committee_cpu_s']:.0f}",
                ]
            )
    return out


HEADER = [
    "case", "F MAE", "90 % covered", "raw scaled / dtc / sor", "Spearman / nearest", "NLL", "committee NLL / cov / rho", "E cov", "CPU s",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["acac", "zuo_si", "zuo_mo", "ethanol"])
    parser.add_argument("--recipe", type=Path, help="use this recipe for every case")
    parser.add_argument("--step", type=int, default=1, help="take every so many frames of the test files")
    parser.add_argument("--committee", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, default=Path("uncertainty.json"), help="where to write the numbers")
    options = parser.parse_args()
    results: dict[str, dict] = {}
    for name in options.cases:
        results[name] = run(name, options.data, options)
        print(common.table(rows({name: results[name]}), HEADER), flush=True)
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    if len(results) > 1:
        print(f"\nall cases\n{common.table(rows(results), HEADER)}")


if __name__ == "__main__":
    main()
