"""Cost of predictions on a CUDA device, and their agreement with the CPU.

    python -m tests.benchmarks.gpu [--cells 4 8 16 24] [--columns 1000] [--minutes 8] [--json gpu.json]

Si diamond rattled by 0.05 A, n 8, l 6, cutoff 5 A, descriptors in single and double precision, kernels in double; energy, forces and
stress, and with std of local energies. Microseconds an atom with neighbours given (as in dynamics between two searches) and of the
search itself, and peak memory of the device. Sizes that do not fit, or for which there is no time left, are left out and said so.
Without a CUDA device it says so and ends with status 2.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import common
import speed
import torch

from gpmlp import neighbors
from gpmlp.potential import Potential
from gpmlp.structures import Structures


def least(run: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest run, the device's work included."""
    run()
    best = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def measured(potential: Potential, cell: Structures, variance: str | None) -> dict[str, float]:
    """Microseconds and bytes an atom."""
    pairs = neighbors.find(cell, potential.reach)
    torch.cuda.reset_peak_memory_stats()
    us = 1e6 * least(lambda: potential(cell, variance, pairs=pairs)) / cell.n_atoms
    search = 1e6 * least(lambda: neighbors.find(cell, potential.reach), 1) / cell.n_atoms
    return {"us": us, "search us": search, "peak kB": torch.cuda.max_memory_allocated() / 1e3 / cell.n_atoms}


def errors(potential: Potential, moved: Potential) -> dict[str, float]:
    """Largest differences between the CPU in double precision and the device: forces, meV/A; std of local energies, relative."""
    cell = speed.silicon(2)
    here = potential(cell, "atom_energies")
    there = moved(cell.to(device="cuda"), "atom_energies")
    std = (there.atom_energies_variance.total.cpu() / here.atom_energies_variance.total).sqrt() - 1
    return {"force meV/A": 1e3 * float((there.forces.cpu() - here.forces).abs().max()), "std": float(std.abs().max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[4, 8, 16, 24], help="cubic cells along each axis")
    parser.add_argument("--columns", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--work", type=Path, default=Path("speed"), help="models are kept here")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device: nothing was measured", file=sys.stderr)
        raise SystemExit(2)
    end, record, rows = time.monotonic() + 60 * options.minutes, [], []
    print(torch.cuda.get_device_name(), torch.__version__)
    for zeta in (2, 4):
        potential = speed.model(zeta, options.columns, options.work)
        for precision in ("float32", "float64"):
            moved = potential.to("cuda", precision)
            off = errors(potential, moved)
            for k in options.cells:
                cell = speed.silicon(k).to(device="cuda")
                for variance in (None, "atom_energies"):
                    what = {"zeta": zeta, "descriptors": precision, "atoms": cell.n_atoms, "variance": variance}
                    if time.monotonic() > end:
                        print("left out for lack of time:", what, file=sys.stderr)
                        continue
                    try:
                        found = what | measured(moved, cell, variance) | off
                    except torch.cuda.OutOfMemoryError:
                        print("left out for lack of memory:", what, file=sys.stderr)
                        torch.cuda.empty_cache()
                        continue
                    record.append(found)
                    rows.append([f"{v:.3g}" if isinstance(v, float) else str(v) for v in found.values()])
                    options.json.write_text(json.dumps(record, indent=1) + "\n")
    print(common.table(rows, list(record[0])) if record else "nothing was measured")


if __name__ == "__main__":
    main()
