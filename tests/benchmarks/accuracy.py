"""Accuracy and cost of gpmlp, and of QUIP's gap_fit beside it in the same run, on data that are not shipped.

    python tests/benchmarks/accuracy.py --data DATA [--cases zuo_si_matched ethanol] [--peer-python /path/to/quippy/bin/python]
    python tests/benchmarks/accuracy.py --data DATA --cases ethanol --structures 50 100 250 [--set inducing.functionals=all]

DATA holds the folders named in CASES. Every fit is a process of its own; CPU seconds and peak memory are that process's. The
recipe of a case is recipes/CASE.yaml (an empty one is the default recipe); the peer's settings stand in CASES. The peer
(pip install quippy-ase, in an environment of its own, with its gap_fit beside its python) fits energies and forces; gpmlp
fits stresses too where the data have them. --frames 20 is a quick trial.

--structures makes learning curves in place of that: fits of so many training structures at random (isolated atoms in addition) by the
recipe of the case, and by the same with every --set; errors, and how much 90 % intervals hold, on --tests test structures at random.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import common


@dataclass(frozen=True)
class Case:
    """Training files (joined), test files by name, and the peer's settings."""

    train: tuple[str, ...]
    tests: dict[str, str]
    peer: dict[str, str]


def _solid(cutoff: float, n_sparse: int, sigma: str = "0.01 0.05 0.01 1.0") -> dict[str, str]:
    soap = f"n_max=8 l_max=8 cutoff={cutoff} cutoff_transition_width=0.5 atom_sigma=0.5 zeta=4 n_sparse={n_sparse}"
    return {"soap": soap, "default_sigma": sigma, "e0_method": "average"}


def _molecule(e0_method: str) -> dict[str, str]:
    soap = "n_max=6 l_max=4 cutoff=5.0 cutoff_transition_width=1.0 atom_sigma=0.4 zeta=4 n_sparse=300 add_species=T"
    return {"soap": soap, "default_sigma": "0.001 0.02 0.0 0.0", "e0_method": e0_method}


# Solids: the settings published with Zuo et al., J. Phys. Chem. A 124, 731 (2020), but 1000 sparse points at most
CASES = {
    "zuo_si_matched": Case(
        ("zuo2020_Si/train.xyz",), {"test": "zuo2020_Si/test.xyz"}, _solid(5.0, 500, "0.001 0.05 0.05 0.0")
    ),
    "zuo_si": Case(("zuo2020_Si/train.xyz",), {"test": "zuo2020_Si/test.xyz"}, _solid(5.4, 1000)),
    "zuo_mo": Case(("zuo2020_Mo/train.xyz",), {"test": "zuo2020_Mo/test.xyz"}, _solid(5.2, 1000)),
    "zuo_cu": Case(("zuo2020_Cu/train.xyz",), {"test": "zuo2020_Cu/test.xyz"}, _solid(4.1, 1000)),
    "ethanol": Case(("rmd17_ethanol/train.xyz",), {"test": "rmd17_ethanol/test.xyz"}, _molecule("average")),
    "aspirin": Case(("rmd17_aspirin/train.xyz",), {"test": "rmd17_aspirin/test.xyz"}, _molecule("average")),
    "acac": Case(
        ("acac/isolated_atoms.xyz", "acac/train_300K.xyz"),
        {"300 K": "acac/test_MD_300K.xyz", "600 K": "acac/test_MD_600K.xyz"},
        _molecule("isolated"),
    ),
}
ERRORS = {
    "E MAE": "energy_mae_meV_per_atom",
    "E RMSE": "energy_rmse_meV_per_atom",
    "F MAE": "force_mae_meV_per_A",
    "F RMSE": "force_rmse_meV_per_A",
    "S MAE": "stress_mae_GPa",
}
INTERVALS = {"F in 90 %": "force_coverage_90", "E in 90 %": "energy_coverage_90", "F NLL": "force_nll"}
COSTS = {"fit CPU s": "cpu_s", "fit wall s": "wall_s", "peak GB": "peak_GB"}


def run(name: str, data: Path, work: Path, options: argparse.Namespace) -> dict:
    """Fit and test one case, ours and (where asked for) the peer's."""
    case, folder = CASES[name], work / name
    folder.mkdir(parents=True, exist_ok=True)
    train = [data / path for path in case.train]
    n_train = common.join(train, folder / "train.xyz", options.frames)
    tests = {}
    for k, (test, path) in enumerate(case.tests.items()):
        tests[test] = folder / f"test{k}.xyz"
        common.join([data / path], tests[test], options.frames)
    recipe = options.recipe or common.RECIPES / f"{name}.yaml"
    result: dict = {"train_structures": n_train, "recipe": recipe.read_text(), "ours": {}}
    print(f"{name}: fitting", file=sys.stderr)
    cost = common.fit_ours(folder, recipe, options.threads)
    result["ours"]["fit"] = asdict(cost)
    result["ours"]["stages_wall_s"] = common.stages_ours(folder, cost, options.threads)
    result["ours"]["tests"] = {t: _test(common.errors_ours(folder, p, options.threads)) for t, p in tests.items()}
    if options.peer_python:
        python = options.peer_python
        common.join(train, folder / "peer.xyz", options.frames, for_peer=True)
        print(f"{name}: fitting the peer", file=sys.stderr)
        result["peer"] = {"settings": case.peer}
        result["peer"]["fit"] = asdict(common.fit_peer(folder, python, case.peer, options.threads))
        result["peer"]["tests"] = {
            t: _test(common.errors_peer(folder, python, p, options.threads)) for t, p in tests.items()
        }
    return result


def curve(name: str, data: Path, work: Path, options: argparse.Namespace) -> list[dict]:
    """Learning curves of a case: by its recipe, and by that with each setting."""
    case, out = CASES[name], []
    recipe = options.recipe or common.RECIPES / f"{name}.yaml"
    for n in options.structures:
        folder = work / f"{name}_{n}"
        folder.mkdir(parents=True, exist_ok=True)
        common.draw([data / path for path in case.train], folder / "train.xyz", n)
        for k, path in enumerate(case.tests.values()):
            common.draw([data / path], folder / f"test{k}.xyz", options.tests)
        for i, settings in enumerate([[], *([s] for s in options.set)] if not options.only_set else [options.set]):
            print(f"{name}: fitting {n} structures, {' '.join(settings) or 'its recipe'}", file=sys.stderr)
            cost = common.fit_ours(folder, recipe, options.threads, f"ours{i}", settings)
            rank = common.report_ours(folder, options.threads, f"ours{i}")["rank"]
            for k, test in enumerate(case.tests):
                errors, _ = common.errors_ours(folder, folder / f"test{k}.xyz", options.threads, f"ours{i}")
                about = {"case": f"{name} {test}", "structures": n, "settings": settings, "columns": rank}
                out.append(about | {"errors": errors, "fit": asdict(cost)})
                print(common.table([_curve_row(out[-1])], CURVE), flush=True)
    return out


CURVE = ["case", "structures", "settings", "columns", *list(ERRORS)[:4], *INTERVALS, *COSTS]


def _curve_row(found: dict) -> list[str]:
    errors = [found["errors"].get(k) for k in [*list(ERRORS.values())[:4], *INTERVALS.values()]]
    numbers = [*errors, *(found["fit"][k] for k in COSTS.values())]
    about = [found["case"], str(found["structures"]), " ".join(found["settings"]) or "-", str(found["columns"])]
    return [*about, *map(_number, numbers)]


def _test(measured: tuple[dict, common.Cost]) -> dict:
    errors, cost = measured
    return {"errors": errors, "cost": asdict(cost)}


def rows(results: dict[str, dict]) -> list[list[str]]:
    """For each case and test set a line of ours, of the peer, and of their ratio."""
    out = []
    for name, result in results.items():
        for test in result["ours"]["tests"]:
            lines = {}
            for side in ("ours", "peer"):
                if side in result:
                    errors, fit = result[side]["tests"][test]["errors"], result[side]["fit"]
                    lines[side] = [errors.get(k) for k in ERRORS.values()] + [fit[k] for k in COSTS.values()]
            out += [[f"{name} {test}", side, *map(_number, line)] for side, line in lines.items()]
            if "peer" in lines:
                ratio = [a / b if a and b else None for a, b in zip(lines["ours"], lines["peer"], strict=True)]
                out.append([f"{name} {test}", "ratio", *map(_number, ratio)])
    return out


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument(
        "--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE", help=str([*CASES])
    )
    parser.add_argument("--recipe", type=Path, help="use this recipe for every case")
    parser.add_argument("--peer-python", type=Path, help="python of an environment with quippy-ase and gap_fit")
    parser.add_argument("--frames", type=int, help="only the first frames of every file: a trial, not a benchmark")
    parser.add_argument("--structures", nargs="+", type=int, help="learning curves: numbers of training structures")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of curves: fit with this setting too; repeat"
    )
    parser.add_argument("--only-set", action="store_true", help="of curves: one fit, with all settings together")
    parser.add_argument("--tests", type=int, default=100, help="of curves: test structures (default 100)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each fit (default 1: CPU time compares)")
    parser.add_argument("--work", type=Path, help="keep models and logs here (default: a temporary folder)")
    parser.add_argument("--json", type=Path, default=Path("accuracy.json"), help="where to write the numbers")
    options = parser.parse_args()
    # subprocesses run elsewhere: every path must hold there; a link to a virtual environment's python must stay a link
    for key in ("data", "recipe", "work", "peer_python"):
        path = getattr(options, key)
        setattr(options, key, path and path.absolute())
    work = options.work or Path(tempfile.mkdtemp(prefix="gpmlp_accuracy_"))
    header = ["case", "", *ERRORS, *COSTS]
    print(f"energies in meV/atom, forces in meV/A, stresses in GPa; {options.threads} thread(s)")
    results: dict[str, dict] = {}
    try:
        if options.structures:
            curves = [row for name in options.cases for row in curve(name, options.data, work, options)]
            options.json.write_text(json.dumps({"machine": platform.platform(), "curves": curves}, indent=2) + "\n")
            print(f"\n{common.table([_curve_row(row) for row in curves], CURVE)}")
            return
        for name in options.cases:
            results[name] = run(name, options.data, work, options)
            print(common.table(rows({name: results[name]}), header), flush=True)
            stages = results[name]["ours"]["stages_wall_s"]
            print(
                f"wall seconds of our fit: {', '.join(f'{stage} {s:.1f}' for stage, s in stages.items())}", flush=True
            )
            record = {"machine": platform.platform(), "threads": options.threads, "frames": options.frames}
            options.json.write_text(json.dumps(record | {"cases": results}, indent=2) + "\n")
    finally:
        if not options.work:
            shutil.rmtree(work)
    if len(results) > 1:
        print(f"\nall cases\n{common.table(rows(results), header)}")


if __name__ == "__main__":
    main()
