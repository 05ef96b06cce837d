"""Speed of properties with error bars: 20 properties of silicon from 32 samples, and how far fast error bars are from full ones.

    OMP_NUM_THREADS=2 python tests/benchmarks/properties_speed.py [--samples 32] [--full] [--json FILE]

The model is fitted to every other frame of data/silicon. Everything is counted that `gpmlp properties` does after loading the model.
--full lets each sample relax structures of its own and compares standard deviations; it takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from ase.build import bulk

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gpmlp
from gpmlp.properties.calculations import choose_calculations

DATA = Path(__file__).resolve().parents[2] / "data/silicon"
WHAT = ("eos", "lattice", "elastic", "vacancy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--inducing", type=int, default=200)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    potential, _ = gpmlp.fit(*gpmlp.read(DATA / "train.xyz", "::2"), gpmlp.Recipe(inducing={"n": arguments.inducing}))
    crystal, rows, count = bulk("Si", a=5.47), [], 0
    for name in WHAT:
        calculations = choose_calculations([crystal], [name])
        began, spent = time.perf_counter(), time.process_time()
        fast = gpmlp.compute_properties(potential, crystal, calculations, arguments.samples)
        row = {"calculation": name, "values": len(fast.values), "seconds": time.perf_counter() - began}
        row["processor_seconds"] = time.process_time() - spent  # what counts on a machine that is shared
        count += len(fast.values)
        if arguments.full:
            began = time.perf_counter()
            full = gpmlp.compute_properties(potential, crystal, calculations, arguments.samples, full=True)
            ratios = {a.name: a.sigma / b.sigma for a, b in zip(fast.values, full.values, strict=True)}
            row |= {"seconds_full": time.perf_counter() - began, "sigma_over_full": ratios}
        rows.append(row)
        print(json.dumps(row), flush=True)
    seconds = sum(row["seconds"] for row in rows)
    spent = sum(row["processor_seconds"] for row in rows)
    print(f"{count} properties from {arguments.samples} samples in {seconds:.1f} s, {spent:.1f} s of processors")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
