"""Cost of steps on a CUDA device, and their agreement with the CPU.

    python -m tests.benchmarks.gpu [--atoms 64 4096 110592 1000000] [--columns 1000] [--minutes 7.5] [--json gpu.json]
    python -m tests.benchmarks.gpu --device cpu --atoms 64 --columns 30     # that it runs at all, where there is no device

Si diamond rattled by 0.05 A, n 8, l 6, cutoff 5 A, skin 0.6 A, kernels ζ 2 (a quadratic form) and ζ 4 in double precision on
descriptors in single and double precision: energy, forces, stress, and with std of local energies, by stepping.Stepper. Printed and
kept as JSON: microseconds an atom of a step between two searches and of a search with its table, peak memory of the device an atom,
differences from the CPU in double precision; the expansion with its pull-back alone, by Triton and by batched products; 64 atoms with
and without CUDA graphs, and 512 of them in a batch. What does not fit, or is not reached in the time, is left out and said so. The
models are fitted to the silicon of this repository by the CPU and kept in --work: carry that folder along to save the time.
Without a CUDA device it says so and ends with status 2, unless --device cpu.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import count, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import common
import speed_cases
import speed_stages
import torch
from torch import Tensor

from gpmlp.core.structures import Structures
from gpmlp.descriptors import _triton, gpu
from gpmlp.descriptors.backends import SoapPowerSpectrum
from gpmlp.potential.potential import Potential
from gpmlp.potential.stepper import Stepper

SKIN = 0.6
PRECISIONS = ("float32", "float64")
LEAST_SECONDS = 1.0  # that steps are repeated for
LARGE = 50_000  # atoms of the sizes that targets are set for: measured first


def side(atoms: int) -> int:
    """Cubic cells along a cube of at least that many atoms."""
    return next(n for n in count(1) if 8 * n**3 >= atoms)


def silicon(atoms: int) -> Structures:
    """At least that many atoms."""
    return speed_cases.silicon(side(atoms))


def least(run: Callable[[], object], device: str, least_runs: int = 3) -> float:
    """Seconds of the fastest run, the device's work included, after one that is not counted."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    run()
    wait()
    best, begun, runs = float("inf"), time.perf_counter(), 0
    while runs < least_runs or (time.perf_counter() - begun < LEAST_SECONDS and runs < 100):
        start = time.perf_counter()
        run()
        wait()
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return best


def peak(device: str) -> float:
    """Largest memory, kB: of the device since the last reset; on the CPU of this process, ever."""
    return torch.cuda.max_memory_allocated() / 1e3 if device.startswith("cuda") else speed_stages.peak_kB()


def stepped(potential: Potential, some: Structures, variance: bool, graphs: bool = True) -> dict:
    """A search, and a step between two searches; of memory on the CPU, by how much the peak grew, which it may not after larger cases."""
    device, n = potential.recipe.device, some.n_atoms
    on_device = device.startswith("cuda")
    if on_device:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = 0.0 if on_device else peak(device)
    stepper = Stepper(potential, some, variance, skin=SKIN, wait=False, graphs=graphs)
    positions, cells = stepper.structures.positions, stepper.structures.cells
    search = 1e6 * least(lambda: stepper._search(positions, cells), device, 1) / n
    backends = {type(term.backend) for _, _, mean in stepper._chunks for term in mean.terms}
    if on_device and backends != {
        _triton.TritonKernels
    }:  # never the time of PyTorch's products under the name of the kernels
        raise RuntimeError(f"descriptors are made by {backends}, not by Triton's kernels")
    searched = (peak(device) - before) / n
    if on_device:
        torch.cuda.reset_peak_memory_stats()
    us = 1e6 * least(lambda: stepper(positions), device) / n
    return {
        "us": us,
        "search us": search,
        "peak kB": (peak(device) - before) / n,
        "peak kB of search": searched,
        "graph": stepper._replay not in (None, stepper._step),
        "width": stepper._table.width,
    }


def differences(here: Potential, there: Potential) -> dict[str, float]:
    """Largest differences between the CPU in double precision and the device: forces, meV/A; energies, meV/atom; std, relative."""
    cell = speed_cases.silicon(2)
    expected, step = here(cell, "atom_energies"), Stepper(there, cell, variance=True)
    found = step(step.structures.positions)
    std = (found.atom_energies_variance.total.cpu() / expected.atom_energies_variance.total).sqrt() - 1
    return {
        "forces meV/A": 1e3 * float((found.forces.cpu() - expected.forces).abs().max()),
        "energy meV/atom": 1e3 * float((found.energies.cpu() - expected.energies).abs().max()) / cell.n_atoms,
        "local std, relative": float(std.abs().max()),
    }


def chunk(potential: Potential, some: Structures, precision: str) -> tuple[Tensor, SoapPowerSpectrum]:
    """Vectors of a chunk of environments from a table, and the descriptor that is made of them."""
    stepper = Stepper(potential, some, skin=SKIN)
    positions, cells = stepper.structures.positions, stepper.structures.cells
    stepper._search(positions, cells)
    vectors = stepper._table.vectors(positions, cells, 0, min(some.n_atoms, gpu.ENVIRONMENTS))
    return vectors.to(getattr(torch, precision)), stepper._chunks[0][2].terms[0].backend.tables.descriptor


def form(kind: type[gpu.DenseBackend], vectors: Tensor, descriptor: SoapPowerSpectrum) -> dict:
    """Expansion, and with its pull-back, by one form."""
    device, n = str(vectors.device), len(vectors)
    by, own = kind.from_descriptor(descriptor, vectors), torch.zeros(n, dtype=torch.long, device=vectors.device)

    def whole() -> object:
        made = by.expand(vectors, own)
        return by.pull_back(made, made.spectrum)

    expand, both = (1e6 * least(run, device) / n for run in (lambda: by.expand(vectors, own), whole))
    return {"atoms": n, "us expand": expand, "us": both}


def plan(options: argparse.Namespace) -> list[dict]:
    """What to measure, the most important first: single precision and large, then the rest."""
    cases = [
        {"zeta": zeta, "descriptors": precision, "atoms": atoms, "variance": variance}
        for precision in PRECISIONS
        for atoms in sorted(options.atoms, key=lambda n: (n < LARGE, n))
        for zeta in options.zeta
        for variance in (False, True)
    ]
    return sorted(cases, key=lambda case: (case["atoms"] < LARGE, case["descriptors"] == "float64"))


def show(title: str, found: Sequence[dict]) -> None:
    """A table of rows with the same keys."""
    if found:
        rows = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in found]
        print(f"\n{title}\n{common.table(rows, list(found[0]))}", flush=True)


def batches(potential: Potential) -> Iterator[dict]:
    """64 atoms, as they are and recorded, and 512 such systems together."""
    one, large = speed_cases.silicon(2), potential.recipe.device.startswith("cuda")
    many = Structures.concatenate([one] * (512 if large else 2))
    for name, some, graphs in (("1, called", one, False), ("1, recorded", one, True), (f"{len(many)}", many, True)):
        yield {"systems of 64 atoms": name} | stepped(potential, some, False, graphs)


class Record:
    """What was measured so far, on the disk after each case."""

    def __init__(self, path: Path, end: float, **about: object) -> None:
        kinds = ("differences", "steps", "forms", "batches", "left out")
        self.path, self.end, self.failed = path, end, False
        self.found: dict = about | {kind: [] for kind in kinds}
        self._write()

    def attempt(self, kind: str, what: dict, run: Callable[[], Iterable[dict]]) -> None:
        """Add what a run yields; whatever it raises, the next case is tried."""
        if time.monotonic() > self.end:
            return self._leave_out(kind, what, "no time")
        try:
            for found in run():
                self.found[kind].append(what | found)
                self._write()
        except torch.cuda.OutOfMemoryError as error:
            self._leave_out(kind, what, f"no memory: {error}")
        except Exception as error:
            self.failed = True
            traceback.print_exc()
            self._leave_out(kind, what, f"{type(error).__name__}: {error}")

    def _leave_out(self, kind: str, what: dict, why: str) -> None:
        print("left out:", kind, what, why, file=sys.stderr, flush=True)
        self.found["left out"].append({"kind": kind} | what | {"why": why})
        self._write()

    def _write(self) -> None:
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(json.dumps(self.found, indent=1) + "\n")
        beside.replace(self.path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--atoms", type=int, nargs="+", default=[64, 4096, 110592, 1000000], help="at least so many")
    parser.add_argument("--zeta", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--columns", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=7.5, help="nothing is begun later; fits are part of it")
    parser.add_argument("--work", type=Path, default=Path("speed"), help="models are kept here")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    end, on_device = time.monotonic() + 60 * options.minutes, options.device.startswith("cuda")
    if on_device and not torch.cuda.is_available():
        print("there is no CUDA device: nothing was measured", file=sys.stderr)
        raise SystemExit(2)
    name = torch.cuda.get_device_name() if on_device else "CPU"
    record = Record(options.json, end, device=name, torch=torch.__version__)
    print(name, torch.__version__, flush=True)
    here = cache(lambda zeta: speed_cases.silicon_case(1, options.columns, options.work).potential(zeta))
    moved = cache(lambda zeta, precision: here(zeta).to(options.device, precision))
    some = cache(silicon)

    for zeta, precision in product(options.zeta, PRECISIONS):
        what = {"zeta": zeta, "descriptors": precision}
        record.attempt("differences", what, lambda z=zeta, p=precision: [differences(here(z), moved(z, p))])
    show("largest differences from the CPU in double precision, 64 atoms", record.found["differences"])
    for case in plan(options):
        zeta, precision, atoms, variance = case.values()
        which = partial(lambda z, p, n, v: [stepped(moved(z, p), some(n), v)], zeta, precision, atoms, variance)
        record.attempt("steps", case | {"atoms": 8 * side(atoms) ** 3}, which)
    show("a step, per atom", record.found["steps"])
    large = max(options.atoms, key=lambda n: min(n, 2 * LARGE))
    kinds = [gpu.BatchedProducts, *([_triton.TritonKernels] if on_device else [])]
    for precision, kind in product(PRECISIONS, kinds):
        what = {"form": kind.__name__, "descriptors": precision}
        these = partial(lambda k, p: [form(k, *chunk(moved(options.zeta[0], p), some(large), p))], kind, precision)
        record.attempt("forms", what, these)
    show("expansion, and with pull-back, per atom", record.found["forms"])
    record.attempt("batches", {}, lambda: batches(moved(options.zeta[0], "float32")))
    show("small systems, per atom", record.found["batches"])
    raise SystemExit(int(record.failed))


if __name__ == "__main__":
    main()
