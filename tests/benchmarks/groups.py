"""Error bars in every group: coverage, rms of error/σ, NLL and ranks within frames by config_type, for data/ and literature sets.

    python tests/benchmarks/groups.py --data DATA [--cases data_silicon zuo_si acac] [--without Surface] [--n 200] [--least 300]
    python tests/benchmarks/groups.py --data DATA --few 10 20 40 [--draws 0 1 2] [--models online] [--cases ...] [--step 10]

DATA holds the folders named in accuracy.py (not needed for `data_silicon` and `data_ethanol`, which are in data/). Each case is fitted with
--n inducing points and 3 gradients of each, and judged on its test files twice: with the config_types of the file, and without. --without
leaves the config_types that begin so out of the training. Components that vanish by symmetry are left out (column "symmetric").

--few fits the default recipe to so many structures drawn at random, at once and as the online model that `learn` begins with, and shows
how much 90 % intervals hold, and rms z, of all test structures together, for each of some draws.

In zuo_si the components yz and xz of the stresses are exchanged in all frames but `Elastic` (a fit says so); they are put right here.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common
import torch
from accuracy import CASES

import gpmlp
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting.online import OnlineFit
from gpmlp.potential.baselines import is_isolated_atom
from gpmlp.potential.evaluation import evaluate
from gpmlp.recipe import Recipe

OWN = {
    name: common.ROOT / "data" / folder for name, folder in (("data_silicon", "silicon"), ("data_ethanol", "ethanol"))
}
HEADER = [
    "case, config_type",
    "kind",
    "label",
    "n",
    "symmetric",
    "90 % covered",
    "rms z",
    "NLL",
    "Spearman",
    "in frames",
]


HEADER_FEW = ["case, structures, draw", "model", "kind", "n", "90 % covered", "rms z"]


def files(case: str, data: Path | None) -> tuple[list[Path], dict[str, Path]]:
    """Training files, and test files by name."""
    if case in OWN:
        return [OWN[case] / "train.xyz"], {"test": OWN[case] / "test.xyz"}
    if data is None:
        raise SystemExit(f"{case} needs --data")
    return [data / path for path in CASES[case].train], {name: data / path for name, path in CASES[case].tests.items()}


def read(case: str, paths: list[Path], step: int = 1) -> tuple[Structures, Targets]:
    """The structures of some files of a case."""
    parts = [gpmlp.read(path, f"::{step}") for path in paths]
    structures, targets = Structures.concatenate([s for s, _ in parts]), Targets.concatenate([t for _, t in parts])
    if case.startswith("zuo_si"):
        stresses, moved = targets.stresses.clone(), [i for i, c in enumerate(targets.config_types) if c != "Elastic"]
        for i in moved:
            yz, xz = targets.stresses[i, 1, 2], targets.stresses[i, 0, 2]
            stresses[i, 0, 2] = stresses[i, 2, 0] = yz
            stresses[i, 1, 2] = stresses[i, 2, 1] = xz
        targets = replace(targets, stresses=stresses)
    return structures, targets


def run(case: str, options: argparse.Namespace) -> list[list[str]]:
    train, tests = files(case, options.data)
    structures, targets = read(case, train)
    left = [
        i for i, label in enumerate(targets.config_types) if not (options.without and label.startswith(options.without))
    ]
    recipe = Recipe.model_validate({"inducing": {"n": options.n, "gradients": 3}})
    potential, _ = gpmlp.fit(structures.select(left), targets.select(structures, left), recipe)
    rows = []
    for name, path in tests.items():
        some, known = read(case, [path], options.step)
        for label, types in (("given", known.config_types), ("not given", ("",) * len(some))):
            found = evaluate(potential, some, replace(known, config_types=types))
            groups = {"all": found.scores} | found.scores_by_config_type
            if label == "not given":  # the same groups, judged by error bars that know nothing of them
                groups |= scores_by_type(potential, some, known, found.prediction)
            for group, scores in groups.items():
                rows += [
                    [f"{case} {name}, {group}", kind, label, str(s.n), str(s.n_symmetric), f"{100 * s.coverage_90:.1f}"]
                    + [f"{v:.2f}" for v in (s.rms_z, s.nll, s.spearman, s.spearman_within_frame)]
                    for kind, s in scores.items()
                    if s.n >= (options.least if kind == "forces" else 1)
                ]
    return rows


def run_few(case: str, options: argparse.Namespace) -> list[list[str]]:
    """Coverage and rms z of models of few structures."""
    train, tests = files(case, options.data)
    structures, targets = read(case, train)
    name, path = next(iter(tests.items()))
    test, known = read(case, [path], options.step)
    alone = [i for i, label in enumerate(targets.config_types) if is_isolated_atom(label)]
    rows = []
    for n, draw in itertools.product(options.few, options.draws):
        order = torch.randperm(len(structures), generator=torch.Generator().manual_seed(draw)).tolist()
        chosen = alone + [i for i in order if i not in alone][:n]
        data = structures.select(chosen), targets.select(structures, chosen)
        for how in options.models:
            potential = gpmlp.fit(*data)[0] if how == "fit" else OnlineFit.begin(*data).potential
            scores = evaluate(potential, test, known).scores
            rows += [
                [f"{case} {name}, {n}, {draw}", how, kind, str(s.n), f"{100 * s.coverage_90:.1f}", f"{s.rms_z:.2f}"]
                for kind, s in scores.items()
                if s.n
            ]
    return rows


def scores_by_type(potential, structures: Structures, targets: Targets, prediction) -> dict:
    """Scores of a prediction by the config_types of the labels, with intervals that do not know them."""
    from gpmlp.potential.evaluation import score_variances

    out = {}
    for name in sorted(set(targets.config_types) - {""}):
        mine = [i for i, label in enumerate(targets.config_types) if label == name]
        blind = replace(targets.select(structures, mine), config_types=("",) * len(mine))
        part = structures.select(mine), blind, prediction.select(structures, mine)
        out[name] = score_variances(*part, potential.calibration)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the data sets")
    parser.add_argument("--cases", nargs="+", choices=[*OWN, *CASES], default=list(OWN))
    parser.add_argument("--without", default="", help="leave config_types that begin so out of the training")
    parser.add_argument("--n", type=int, default=200, help="inducing points")
    parser.add_argument("--step", type=int, default=1, help="take every so many frames of the test files")
    parser.add_argument("--least", type=int, default=300, help="force components of a group that is shown")
    parser.add_argument("--few", type=int, nargs="+", help="models of so many structures")
    parser.add_argument("--draws", type=int, nargs="+", default=[0], help="seeds of their permutations")
    parser.add_argument("--models", nargs="+", choices=["fit", "online"], default=["fit", "online"])
    options = parser.parse_args()
    for case in options.cases:
        if options.few:
            print(common.table(run_few(case, options), HEADER_FEW), flush=True)
        else:
            print(common.table(run(case, options), HEADER), flush=True)


if __name__ == "__main__":
    main()
