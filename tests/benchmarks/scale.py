"""What many processes gain, and what large fits and runs cost: measured here, and by the constants measured here.

    OMP_NUM_THREADS=1 python tests/benchmarks/scale.py --data data/silicon/train.xyz [--times 30] [--centres 200] [--workers 1 2]

What two processes gain (docs/scale.md), on a machine that does nothing else: --times 60 --centres 600 --workers 1 2, some eight minutes.

The set is repeated, each copy strained and displaced at random, so that no two structures are near-duplicates; labels are those of the
file, as nothing but time is asked. Each fit runs in a process of its own. On a busy machine wall times say nothing: `alone` is what
they would be if each process had a core to itself, the processor time of the process that asks and of the busiest worker together.
Then the constants, and from these the costs of a fit of --structures with --atoms each and --columns, and of dynamics.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import common

sys.path.insert(0, str(common.ROOT))
RECIPE = {"descriptor": {"cutoff": 5.0, "n_max": 8, "l_max": 4}, "kernel": {"zeta": 2}}
ATOMS = 1500  # from which constants are measured, about
QR_COLUMNS = 1500
LINK_GB_s = 1.25  # of a network of 10 Gbit/s
MARK = "result: "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=common.ROOT / "data/silicon/train.xyz")
    parser.add_argument("--times", type=int, default=30, help="how often the set is repeated")
    parser.add_argument("--centres", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="fits by so many processes; 0: by none")
    parser.add_argument("--structures", type=float, default=1e6)
    parser.add_argument("--atoms", type=float, default=50)
    parser.add_argument("--columns", type=float, default=1e4)
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--cores", type=int, default=18, help="of a node, a worker on each")
    parser.add_argument("--seconds", type=float, default=1.0, help="processor time for each constant, at least")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(MARK + json.dumps(fit_once(options, options.one)))
        return
    rows = []
    for number in options.workers:
        arguments = [sys.executable, __file__, *sys.argv[1:], "--one", str(number)]
        found = subprocess.run(arguments, capture_output=True, text=True)
        if found.returncode:
            raise SystemExit(found.stderr)
        result = json.loads(found.stdout.split(MARK)[1])
        rows.append([f"{number} workers" if number else "no workers", *result["shown"], result["bits"]])
        size = f"{result['atoms']} atoms, {result['partitions']} partitions, {result['columns']} columns"
        print(f"{size}; {number} workers, wall s: {result['stages']}", file=sys.stderr)
    if rows:
        print(common.table(rows, ["", "wall s", "asking: CPU s, GB", "each worker: CPU s, GB", "alone s", "the model"]))
    print_costs(options, measure_constants(options))


def copies(path: Path, times: int):
    """The structures of a file and their labels so many times over, each copy at other places."""
    import torch

    import gpmlp
    from gpmlp.core.quantities import Targets
    from gpmlp.core.structures import Structures

    structures, targets = gpmlp.read(path)
    generator, parts = torch.Generator().manual_seed(0), []
    for _ in range(times):
        strain = torch.eye(3, dtype=torch.float64)
        strain = strain + 0.03 * torch.randn(3, 3, generator=generator, dtype=torch.float64)
        shift = 0.05 * torch.randn(structures.n_atoms, 3, generator=generator, dtype=torch.float64)
        parts.append(structures.with_positions(structures.positions @ strain + shift, structures.cells @ strain))
    return Structures.concatenate(parts), Targets.concatenate([targets] * times)


def fit_once(options: argparse.Namespace, workers: int) -> dict:
    """One fit, by so many workers, in this process: times, and the bits of what it predicts."""
    import gpmlp
    from gpmlp.fitting import partitions
    from gpmlp.fitting.workers import open_executor
    from gpmlp.recipe import Recipe

    data = copies(options.data, options.times)
    recipe = Recipe.model_validate(RECIPE | {"inducing": {"n": options.centres, "gradients": 0}})
    with open_executor(workers or None) as executor:
        before = _usage() if executor is None else None
        begun, cpu = time.perf_counter(), time.process_time()
        potential, report = gpmlp.fit(*data, recipe, executor=executor)
        wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
        each = [] if before else list(executor.run(_usage).values())
    found = potential(data[0].select(range(8)), variance="forces", novelty=True)
    bits = b"".join(t.numpy().tobytes() for t in (found.energies, found.forces, found.forces_variance.total))
    busiest = max((spent for spent, _ in each), default=0.0)
    told = ", ".join(f"{spent:.0f} {peak:.2f}" for spent, peak in each) or "-"
    return {
        "shown": [f"{wall:.0f}", f"{cpu:.0f} {_usage()[1]:.2f}", told, f"{cpu + busiest:.0f}"],
        "stages": ", ".join(f"{name} {spent:.0f}" for name, spent, _ in report.stages),
        "atoms": data[0].n_atoms,
        "columns": report.rank,
        "partitions": partitions._number_of(data[0].n_atoms, options.centres),
        "bits": hashlib.sha256(bits).hexdigest()[:8],
    }


def _usage() -> tuple[float, float]:
    """CPU seconds of this process, and its largest memory, GB."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9


def _cpu(work: Callable[[], object], least: float) -> float:
    """CPU seconds of a call: the least of several, `least` seconds of them."""
    work()
    best, spent = math.inf, 0.0
    while spent < least:
        begun = time.process_time()
        work()
        best, spent = min(best, time.process_time() - begun), spent + time.process_time() - begun
    return best


def measure_constants(options: argparse.Namespace) -> dict[str, float]:
    """Microseconds of a core for an atom, by pass; operations a second of a QR; of dynamics."""
    import torch

    import gpmlp
    from gpmlp.fitting import passes, regression, workers
    from gpmlp.fitting.inducing_sets import make_models
    from gpmlp.fitting.partitions import Partitions
    from gpmlp.gp.qr import RowFactor
    from gpmlp.recipe import Recipe

    torch.set_num_threads(1)
    spent = partial(_cpu, least=options.seconds)
    structures, targets = copies(options.data, 1)
    part = list(range(0, len(structures), max(1, structures.n_atoms // ATOMS)))
    targets, structures = targets.select(structures, part), structures.select(part)
    n, every, none = structures.n_atoms, torch.arange(len(part)), torch.arange(0)
    recipe = Recipe.model_validate(RECIPE | {"inducing": {"n": options.centres, "gradients": 0}, "novelty": False})
    potential, _ = gpmlp.fit(structures, targets, recipe.model_copy(update={"calibration": False}))
    recipe = potential.recipe
    cut = Partitions.of_data(structures, targets, options.centres, workers.Workers())

    def candidates(k, choice):
        return passes.collect_candidates(cut, recipe, choice, every, none, workers.silent)[0]

    models, _ = make_models(recipe, structures, candidates, structures, targets)
    columns = sum(len(low) for low in regression.lowers_of(models))
    pieces = list(zip(*passes._chunked(cut.kept[0], every), strict=True))
    columns = sum(len(low) for low in regression.lowers_of(models))
    rows = spent(lambda: [regression.labelled_rows(models, *piece) for piece in pieces])
    labels = sum(len(r) for piece in pieces for r in regression.labelled_rows(models, *piece).values())
    matrix = torch.randn(3 * QR_COLUMNS, QR_COLUMNS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    operations = (2 * 3 - 2 / 3) * QR_COLUMNS**3
    factor = RowFactor(QR_COLUMNS, 1)
    factor.add(matrix, matrix[:, 0])
    found = {
        "rows, us an atom and column": 1e6 * rows / n / columns,
        "rows, an atom": labels / n,
        "candidates for centres, us an atom": 1e6
        * spent(lambda: make_models(recipe, structures, candidates, structures, targets))
        / n,
        "predictions, us an atom": 1e6 * spent(lambda: passes.predict(cut, potential)) / n,
        "QR, 1e9 operations a second": 1e-9 * operations / spent(lambda: torch.linalg.qr(matrix, mode="r")),
        "merging two factors, 1e-9 s a column cubed": 1e9 * spent(lambda: factor.merge(factor)) / QR_COLUMNS**3,
    }
    for name, value in found.items():
        print(f"{name}: {value:.3g}")
    return found


def print_costs(options: argparse.Namespace, constants: dict[str, float]) -> None:
    """The cost of a large fit, and of dynamics, by the constants."""
    from gpmlp.fitting.cost import EVIDENCE_COLUMNS, EVIDENCE_PRODUCTS, POSTERIOR_PRODUCTS
    from gpmlp.fitting.partitions import _number_of

    u, atoms = options.columns, options.structures * options.atoms
    rate = 1e9 * constants["QR, 1e9 operations a second"]
    folding = 8 / 3 * u**2 * constants["rows, an atom"] * atoms / rate
    making = 1e-6 * constants["rows, us an atom and column"] * u * atoms
    rest = 1e-6 * (constants["candidates for centres, us an atom"] + 2 * constants["predictions, us an atom"]) * atoms
    parts = _number_of(int(atoms), int(u))
    merge = 1e-9 * constants["merging two factors, 1e-9 s a column cubed"] * u**3
    levels, factor = math.ceil(math.log2(parts)), 8e-9 * (u + 1) ** 2
    last = (EVIDENCE_PRODUCTS * min(u, EVIDENCE_COLUMNS) ** 3 + POSTERIOR_PRODUCTS * u**3) / rate
    cores = options.nodes * options.cores
    total = making + folding + rest + (parts - 1) * merge
    waves = math.ceil(parts / cores)
    wall = waves * (making + folding + rest) / parts + levels * merge + last / options.cores
    print(f"\n{options.structures:.0e} structures x {options.atoms:.0f} atoms, {u:.0f} columns, {parts} partitions:")
    for name, value in {
        "rows, core-hours": making / 3600,
        "folding them, core-hours": folding / 3600,
        "centres, near-duplicates, predictions, core-hours": rest / 3600,
        "merging, core-hours": (parts - 1) * merge / 3600,
        "all, core-hours": total / 3600,
        "a factor, GB": factor,
        "factors sent, GB, at most": (parts - 1) * factor,
        "memory of a worker, GB: nine factors": 9 * factor,
        f"on {options.nodes} nodes of {options.cores} cores, minutes": wall / 60,
        "of these merging, minutes": levels * merge / 60,
        "and hyperparameters and posterior, minutes": last / options.cores / 60,
        "sending, minutes, a link of 10 Gbit/s a node": (parts - 1) * factor / options.nodes / LINK_GB_s / 60,
    }.items():
        print(f"  {name}: {value:.3g}")
    step = 1e-6 * constants["predictions, us an atom"]
    print("dynamics, a step of the mean with its search for neighbours:")
    for size in (1e7, 1e8, 1e9):
        print(
            f"  {size:.0e} atoms: {size * step / cores:.3g} s on {cores} cores, {1e5 * size * step / 3600:.2g} core-hours for 1e5 steps"
        )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
