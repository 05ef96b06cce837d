"""Error bars of online models of few labels: calibrated on structures left out in turn, and on predictions before learning (prequential).

    OMP_NUM_THREADS=1 python tests/benchmarks/few_labels.py [--data DATA] [--labels 7 10 14] [--json few_labels.json]

Models begin with five structures and learn others one by one. rms z and the share of forces within 90 % intervals on 40 other structures
of the same kind: EMT metals at 500 to 800 K, liquid and thermal silicon of data/silicon, and with DATA ethanol and acetylacetone of
DATA/rmd17_ethanol and DATA/acac.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ase.build
import numpy as np
import torch
from ase import units
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common

import gpmlp
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting import calibrate
from gpmlp.fitting.online import OnlineFit
from gpmlp.io.ase_atoms import from_ase
from gpmlp.potential.evaluation import evaluate
from gpmlp.recipe import Recipe
from gpmlp.uncertainty.calibration import Calibration

Data = tuple[Structures, Targets]
FIRST, TESTS = 5, 40
HOW = {"left out": FIRST, "prequential": 10**9}  # least number of labels from which structures are left out


def metal(symbol: str, temperature_K: float, frames: int = 80, between: int = 15) -> Data:
    """Frames of a trajectory, eight atoms."""
    rng = np.random.default_rng(0)
    atoms = ase.build.bulk(symbol, cubic=True).repeat((2, 1, 1))
    atoms.calc = EMT()
    MaxwellBoltzmannDistribution(atoms, temperature_K=2 * temperature_K, rng=rng)
    run = LangevinBAOAB(atoms, 3 * units.fs, temperature_K=temperature_K, T_tau=100 * units.fs, rng=rng)
    found = []
    for _ in range(frames):
        run.run(between)
        found.append(atoms.copy())
        found[-1].calc = SinglePointCalculator(
            found[-1], energy=atoms.get_potential_energy(), forces=atoms.get_forces()
        )
    return from_ase(found)


def silicon(config_type: str) -> Data:
    """Of data/silicon."""
    structures, targets = gpmlp.read(common.ROOT / "data" / "silicon" / "train.xyz")
    chosen = [i for i, name in enumerate(targets.config_types) if name == config_type]
    return structures.select(chosen), targets.select(structures, chosen)


def sets(data: Path | None) -> dict[str, Callable[[], Data]]:
    """By name, what makes or reads them."""
    found: dict[str, Callable[[], Data]] = {
        **{s: lambda s=s: metal(s, 800) for s in ("Cu", "Ni", "Pt")}, "Al": lambda: metal("Al", 500),
        "liquid Si": lambda: silicon("liquid"), "thermal Si": lambda: silicon("diamond_thermal"),
    }  # fmt: skip
    if data is not None:
        found["ethanol"] = lambda: gpmlp.read(data / "rmd17_ethanol" / "train.xyz", "::8")
        found["acac"] = lambda: gpmlp.read(data / "acac" / "train_300K.xyz", "::4")
    return found


def scores(structures: Structures, targets: Targets, labels: list[int]) -> dict[str, dict[str, float]]:
    """By number of labels and kind of calibration, rms z and coverage of forces."""
    order = torch.randperm(len(structures), generator=torch.Generator().manual_seed(0)).tolist()
    most = max(labels)

    def part(chosen: list[int]) -> Data:
        return structures.select(chosen), targets.select(structures, chosen)

    tests, out = part(order[most : most + TESTS]), {}
    online = OnlineFit.begin(*part(order[:FIRST]), Recipe())
    for n in range(FIRST + 1, most + 1):
        online = online.learned(*part([order[n - 1]]))
        for how, least in HOW.items() if n in labels else ():
            calibrate.FEWEST_ONLINE = least
            fresh = replace(online, calibration=Calibration.identity()).refreshed(how)
            found = evaluate(fresh.potential, *tests).scores["forces"]
            out[f"{n} {how}"] = {"rms_z": found.rms_z, "coverage_90": found.coverage_90}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with rmd17_ethanol and acac")
    parser.add_argument("--labels", type=int, nargs="+", default=[7, 10, 14])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {name: scores(*make(), options.labels) for name, make in sets(options.data).items()}
    columns = list(next(iter(results.values())))
    rows = [
        [name, *(f"{r[c]['rms_z']:.2f} / {100 * r[c]['coverage_90']:.0f} %" for c in columns)]
        for name, r in results.items()
    ]
    print(common.table(rows, ["rms z / covered", *columns]))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
