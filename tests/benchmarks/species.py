"""Many species: accuracy and cost of compressed densities (docs/decisions/024-many-species.md).

    python tests/benchmarks/species.py ten [--channels 8 12 16] [--full]
    python tests/benchmarks/species.py nbmotaw --data DATA [--structures 250] [--channels 8 12 16] [--full]
    python tests/benchmarks/species.py cost [--species 1 2 4 7 10] [--channels 12] [--full]

ten: the set of data/alloy/generate.py (seven metals, C, N, O; EMT), tests of like compositions and alloys of four metals, of which
training has none. nbmotaw: DATA/nbmotaw, so many training structures and --tests test structures at random. A row is a fit with so many
channels (full: `descriptor.compression: false`), a process of its own: errors in meV/atom and meV/A, how much 90 % intervals hold, CPU
seconds of the fit, microseconds of CPU an atom of a prediction of energies, forces and stresses, neighbours included. cost: the same
crystals with their atoms given to 1 to 10 species at random: equal numbers of atoms and neighbours, of inducing variables and labels
(which mean nothing), exact means.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

ROOT = Path(__file__).resolve().parents[2]
ALLOY = ROOT / "data" / "alloy" / "generate.py"
TEN = ("Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au", "C", "N", "O")
COLUMNS = [
    "test",
    "species",
    "channels",
    "F MAE",
    "E MAE",
    "F in 90 %",
    "E in 90 %",
    "fit CPU s",
    "us an atom",
    "F sigma",
]
ERRORS = ("force_mae_meV_per_A", "energy_mae_meV_per_atom", "force_coverage_90", "energy_coverage_90")
# of the part cost: the same choices whatever the number of species
FIXED = {"cutoff": 5.5, "n_max": 6, "l_max": 4, "basis": "gto", "radial_scaling": {"scale": 2.0, "exponent": 3}}
COST = {
    "inducing": {"n": 120, "gradients": 3},
    "kernel": {"zeta": 4},
    "calibration": False,
    "novelty": False,
    "variance": False,
    "mean": "exact",
}
ATOMS = 400  # of a prediction that is timed, at least

# read a model and structures, repeat them, time: in a process of its own, on one thread
TIMED = """
import sys, time, warnings
import ase.io, gpmlp
from gpmlp.io import ase_atoms
warnings.simplefilter("ignore")
potential, frame = gpmlp.load(sys.argv[1]), ase.io.read(sys.argv[2])
while len(frame) < int(sys.argv[3]):
    frame = frame.repeat((2, 1, 1) if frame.cell.lengths()[0] == min(frame.cell.lengths()) else (1, 2, 1)
                         if frame.cell.lengths()[1] == min(frame.cell.lengths()) else (1, 1, 2))
structures = ase_atoms.from_ase([frame])[0]
times = []
for variance in (None, "atom_energies"):
    each = []
    for _ in range(8):
        begun = time.process_time()
        potential(structures, variance=variance)
        each.append((time.process_time() - begun) / len(frame) * 1e6)
    times.append(min(each[1:]))
print(*times)
"""


def timed(model: Path, frames: Path) -> tuple[float, float]:
    """Microseconds of CPU an atom, without and with variances of local energies."""
    common.measured([sys.executable, "-c", TIMED, model, frames, str(ATOMS)], model.parent, "timed.log", 1)
    plain, with_sigma = (model.parent / "timed.log").read_text().split()[-2:]
    return float(plain), float(with_sigma)


def row(folder: Path, tests: Sequence[Path], channels: int, n_species: int, settings: Sequence[str]) -> list[dict]:
    """A fit of train.xyz in a folder, with so many channels (0: of the full spectrum), and its tests."""
    compression = f"descriptor.compression={{channels: {channels}}}" if channels else "descriptor.compression=false"
    print(f"fitting {n_species} species, {compression}", file=sys.stderr)
    name = f"ours{channels}"
    fit = common.fit_ours(folder, None, 1, name, [compression, *settings])
    plain, with_sigma = timed(folder / f"{name}.gpmlp", tests[0])
    out = []
    for test in tests:
        errors, _ = common.errors_ours(folder, test, 1, name)
        cost = {"fit CPU s": fit.cpu_s, "us an atom": plain, "with sigma": with_sigma}
        out.append({"test": test.stem, "species": n_species, "channels": channels or "full", "errors": errors} | cost)
    for one in out:
        print(common.table([_shown(one)], COLUMNS), flush=True)
    return out


def _shown(found: dict) -> list[str]:
    errors = [found["errors"].get(k) for k in ERRORS]
    numbers = [*errors, *(found.get(k) for k in COLUMNS[-3:])]
    return [
        found["test"],
        str(found["species"]),
        str(found["channels"]),
        *("-" if x is None else f"{x:.3g}" for x in numbers),
    ]


def ten(work: Path, options: argparse.Namespace) -> list[dict]:
    """All channels on the set of ten species."""
    subprocess.run([sys.executable, ALLOY, work], check=True)
    tests = [work / "test.xyz", work / "quaternary.xyz"]
    return [one for c in options.channels for one in row(work, tests, c, len(TEN), options.set)]


def nbmotaw(work: Path, options: argparse.Namespace) -> list[dict]:
    """All channels on Nb, Mo, Ta, W."""
    common.draw([options.data / "nbmotaw" / "train.xyz"], work / "train.xyz", options.structures)
    common.draw([options.data / "nbmotaw" / "test_elem_binary.xyz"], work / "test.xyz", options.tests)
    return [one for c in options.channels for one in row(work, [work / "test.xyz"], c, 4, options.set)]


def cost(work: Path, options: argparse.Namespace) -> list[dict]:
    """One crystal of growing number of species, in this process: what a fit and a prediction take."""
    import ase.build
    import numpy as np
    import torch

    import gpmlp
    from gpmlp.core.quantities import Targets
    from gpmlp.io import ase_atoms

    torch.set_num_threads(1)
    out = []
    for n in options.species:
        rng, frames = np.random.default_rng(0), []
        for _ in range(11):
            atoms = ase.build.bulk("Au", a=4.0, cubic=True).repeat(2 if len(frames) < 10 else 4)
            atoms.positions += rng.normal(0, 0.08, atoms.positions.shape)
            # the same positions whatever the number of species
            atoms.symbols = [TEN[k] for k in rng.permutation(len(atoms)) % n]
            frames.append(atoms)
        known, new = ase_atoms.from_ase(frames[:-1])[0], ase_atoms.from_ase(frames[-1:])[0]
        labels = vars(Targets.unlabelled(known))
        labels |= {"forces": torch.from_numpy(rng.normal(0, 1, known.positions.shape))}  # their values cost nothing
        targets = Targets(**labels | {"energies": torch.zeros(len(known), dtype=torch.float64)})
        for channels in options.channels:
            compression = {"channels": channels} if channels else False
            begun = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                recipe = gpmlp.Recipe.model_validate(COST | {"descriptor": FIXED | {"compression": compression}})
                potential, _ = gpmlp.fit(known, targets, recipe)
            found = {"test": "cost", "species": n, "channels": channels or "full", "errors": {}}
            out.append(found | {"fit CPU s": time.process_time() - begun, "us an atom": _predicted(potential, new)})
            print(common.table([_shown(out[-1])], COLUMNS), flush=True)
    return out


def _predicted(potential: Any, structures: Any) -> float:
    """Microseconds of CPU an atom."""
    times = []
    for _ in range(9):
        begun = time.process_time()
        potential(structures)
        times.append(time.process_time() - begun)
    return min(times[1:]) / structures.n_atoms * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["ten", "nbmotaw", "cost"])
    parser.add_argument("--data", type=Path, help="folder with the data sets")
    parser.add_argument("--channels", nargs="+", type=int, default=[12], help="0: the full spectrum")
    parser.add_argument("--full", action="store_true", help="the full spectrum, too")
    parser.add_argument("--species", nargs="+", type=int, default=[1, 2, 4, 7, 10], help="of cost: how many")
    parser.add_argument("--structures", type=int, default=250, help="of nbmotaw: training structures")
    parser.add_argument("--tests", type=int, default=120, help="of nbmotaw: test structures")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every fit; repeat")
    parser.add_argument("--work", type=Path, help="keep models and logs here (default: a temporary folder)")
    parser.add_argument("--json", type=Path, default=Path("species.json"), help="where to write the numbers")
    options = parser.parse_args()
    options.channels += [0] * (options.full and 0 not in options.channels)
    with tempfile.TemporaryDirectory(prefix="gpmlp_species_") as temporary:
        work = (options.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        rows = {"ten": ten, "nbmotaw": nbmotaw, "cost": cost}[options.part](work, options)
    options.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"\n{common.table([_shown(one) for one in rows], COLUMNS)}")


if __name__ == "__main__":
    main()
