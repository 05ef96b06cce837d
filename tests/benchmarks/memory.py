"""Peak memory of a fit as the training set grows by repetition: the same structures 1, 2, 4 and 8 times over.

    python tests/benchmarks/memory.py --data DATA/zuo2020_Si/train.xyz [--peer-python /path/to/quippy/bin/python]

The recipe fixes the number of inducing points, so the factors of the fit have one size; what may grow is what is kept of the
structures themselves (docs/memory.md).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import common
from accuracy import CASES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="training file, extended XYZ")
    parser.add_argument("--times", type=int, nargs="+", default=[1, 2, 4, 8], help="how often the set is repeated")
    parser.add_argument(
        "--recipe", type=Path, default=common.RECIPES / "memory.yaml", help="recipe with inducing.n given"
    )
    parser.add_argument("--peer-python", type=Path, help="python of an environment with quippy-ase and gap_fit")
    parser.add_argument(
        "--peer-case", choices=list(CASES), default="zuo_si_matched", help="whose settings the peer has"
    )
    parser.add_argument("--frames", type=int, help="only the first frames of the file: a trial, not a benchmark")
    parser.add_argument("--threads", type=int, default=1, help="threads of each fit")
    parser.add_argument("--json", type=Path, default=Path("memory.json"), help="where to write the numbers")
    options = parser.parse_args()
    python = options.peer_python and options.peer_python.absolute()
    results: dict[str, dict[int, dict]] = {"ours": {}, **({"peer": {}} if python else {})}
    with tempfile.TemporaryDirectory(prefix="gpmlp_memory_") as temporary:
        folder = Path(temporary)
        common.join([options.data], folder / "once.xyz", options.frames)
        common.join([options.data], folder / "peer_once.xyz", options.frames, for_peer=True)
        for times in options.times:
            common.repeat(folder / "once.xyz", folder / "train.xyz", times)
            print(f"x {times}: fitting", file=sys.stderr)
            results["ours"][times] = asdict(common.fit_ours(folder, options.recipe.absolute(), options.threads))
            if python:
                common.repeat(folder / "peer_once.xyz", folder / "peer.xyz", times)
                print(f"x {times}: fitting the peer", file=sys.stderr)
                peer = CASES[options.peer_case].peer
                results["peer"][times] = asdict(common.fit_peer(folder, python, peer, options.threads))
            options.json.write_text(json.dumps(results, indent=2) + "\n")
    rows = []
    for side, costs in results.items():
        first = costs[options.times[0]]["peak_GB"]
        for times, cost in costs.items():
            peak = cost["peak_GB"]
            rows.append([side, f"{times}", f"{peak:.3f}", f"{100 * (peak / first - 1):+.1f} %", f"{cost['cpu_s']:.1f}"])
    print(common.table(rows, ["", "times", "peak GB", "growth", "CPU s"]))


if __name__ == "__main__":
    main()
