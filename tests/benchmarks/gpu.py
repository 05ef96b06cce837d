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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import common
import speed_cases
import speed_stages
import torch

from gpmlp.descriptors import dense, triton_soap
from gpmlp.potential import Potential
from gpmlp.stepping import Stepper
from gpmlp.structures import Structures

SKIN = 0.6
LEAST_SECONDS = 1.0  # that steps are repeated for
LARGE = 50_000  # atoms of the sizes that targets are set for: measured first


def silicon(atoms: int) -> Structures:
    """At least that many atoms, a cube of cubic cells."""
    cells = 1
    while 8 * cells**3 < atoms:
        cells += 1
    return speed_cases.silicon(cells)


def least(run: Callable[[], object], device: str, least_runs: int = 3) -> float:
    """Seconds of the fastest run, the device's work included, after one that is not counted."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    run()
    wait()
    best, begun, count = float("inf"), time.perf_counter(), 0
    while count < least_runs or (time.perf_counter() - begun < LEAST_SECONDS and count < 100):
        start = time.perf_counter()
        run()
        wait()
        best, count = min(best, time.perf_counter() - start), count + 1
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
    searched = (peak(device) - before) / n
    if on_device:
        torch.cuda.reset_peak_memory_stats()
    us = 1e6 * least(lambda: stepper(positions), device) / n
    return {
        "us": us,
        "search us": search,
        "peak kB": (peak(device) - before) / n,
        "peak kB of search": searched,
        "graph": stepper._replay is not None,
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


def forms(potential: Potential, some: Structures, precision: str) -> Iterator[dict]:
    """Expansion, and with its pull-back, of a chunk of environments: by each form that there is."""
    stepper = Stepper(potential, some, skin=SKIN)
    stepper._search(stepper.structures.positions, stepper.structures.cells)
    device, n = potential.recipe.device, min(some.n_atoms, dense.ENVIRONMENTS)
    vectors = stepper._table.vectors(stepper.structures.positions, stepper.structures.cells, 0, n)
    vectors, own = vectors.to(getattr(torch, precision)), torch.zeros(n, dtype=torch.long, device=device)
    descriptor = stepper._chunks[0][2].parts[0].form.numbers.descriptor
    for kind in (triton_soap.Kernels, dense.Products):
        if kind is triton_soap.Kernels and not triton_soap.usable(vectors):
            continue
        form = kind.of(descriptor, vectors)
        made = form.expand(vectors, own)

        def whole(form: dense.Form = form) -> object:
            made = form.expand(vectors, own)
            return form.pull_back(made, made.spectrum)

        expand, both = (1e6 * least(run, device) / n for run in (lambda f=form: f.expand(vectors, own), whole))
        yield {"form": kind.__name__, "descriptors": precision, "atoms": n, "us expand": expand, "us": both}
        del made


def plan(options: argparse.Namespace) -> list[dict]:
    """What to measure, the most important first: single precision and large, then the rest."""
    cases = [
        {"zeta": zeta, "descriptors": precision, "atoms": atoms, "variance": variance}
        for precision in ("float32", "float64")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--atoms", type=int, nargs="+", default=[64, 4096, 110592, 1000000], help="at least so many")
    parser.add_argument("--zeta", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--columns", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=7.5, help="nothing is begun later; fits are part of it")
    parser.add_argument("--work", type=Path, default=Path("speed"), help="models are kept here")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    on_device = options.device.startswith("cuda")
    if on_device and not torch.cuda.is_available():
        print("there is no CUDA device: nothing was measured", file=sys.stderr)
        raise SystemExit(2)
    name = torch.cuda.get_device_name() if on_device else "CPU"
    record: dict = {
        "device": name,
        "torch": torch.__version__,
        "steps": [],
        "differences": [],
        "forms": [],
        "batches": [],
    }
    print(name, torch.__version__, flush=True)
    here = {zeta: speed_cases.silicon_case(1, options.columns, options.work).potential(zeta) for zeta in options.zeta}
    moved = {(z, p): model.to(options.device, p) for z, model in here.items() for p in ("float32", "float64")}

    def attempt(kind: str, what: dict, run: Callable[[], Iterator[dict]]) -> None:
        """Add what a run yields to the record, which is on the disk after each."""
        if time.monotonic() > end:
            print("left out for lack of time:", kind, what, file=sys.stderr, flush=True)
            return
        try:
            for found in run():
                record[kind].append(what | found)
                options.json.write_text(json.dumps(record, indent=1) + "\n")
        except torch.cuda.OutOfMemoryError:
            print("left out for lack of memory:", kind, what, file=sys.stderr, flush=True)

    for (zeta, precision), there in moved.items():
        what = {"zeta": zeta, "descriptors": precision}
        attempt("differences", what, lambda a=here[zeta], b=there: iter([differences(a, b)]))
    show("largest differences from the CPU in double precision, 64 atoms", record["differences"])
    known: dict[int, Structures] = {}
    for case in plan(options):
        if case["atoms"] not in known:
            known[case["atoms"]] = silicon(case["atoms"])
        some = known[case["atoms"]]
        what = case | {"atoms": some.n_atoms}
        there = moved[case["zeta"], case["descriptors"]]
        attempt("steps", what, lambda p=there, s=some, v=case["variance"]: iter([stepped(p, s, v)]))
    show("a step, per atom", record["steps"])
    for precision in ("float32", "float64"):
        there, some = moved[options.zeta[0], precision], known[max(options.atoms, key=lambda n: min(n, 2 * LARGE))]
        attempt("forms", {}, lambda p=there, s=some, d=precision: forms(p, s, d))
    show("expansion, and with pull-back, per atom", record["forms"])
    attempt("batches", {}, lambda: batches(moved[options.zeta[0], "float32"]))
    show("small systems, per atom", record["batches"])


if __name__ == "__main__":
    main()
