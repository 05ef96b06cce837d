"""Few labels on a calculator as baseline, beside the same labels without it: ethanol (PBE) on GFN2-xTB, aluminium (LDA) on EMT.

    OMP_NUM_THREADS=1 python tests/benchmarks/delta.py ethanol [--labels 25] [--json delta.json]
    OMP_NUM_THREADS=1 python tests/benchmarks/delta.py aluminium --folder FOLDER [--labels 12]

Ethanol is that of data/ethanol, labels evenly drawn from train.xyz, errors on test.xyz. Aluminium is made here, by pw.x of Quantum ESPRESSO
(LDA, Al.pz-vbc.UPF, some seconds a cell), cells of 4 atoms strained by 3 % and rattled by 0.15 A, and kept in FOLDER. One line of JSON for
each of both fits: mean absolute errors, and the share of forces, energies and stresses within their intervals of 90 %.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import ase.build
import numpy as np
import torch

import gpmlp
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.io.ase_atoms import structures_from_ase, to_ase, write_frames
from gpmlp.learning.oracles.oracle import CalculatorOracle, OracleRecipe

Data = tuple[Structures, Targets]
ETHANOL = Path(__file__).resolve().parents[2] / "data" / "ethanol"
PLANE_WAVES = {
    "pseudopotentials": {"Al": "Al.pz-vbc.UPF"},
    "ecutwfc_Ry": 20,
    "degauss_Ry": 0.03,
    "kpts": [5, 5, 5],
    "input_data": {"conv_thr": 1e-9},
}
MADE = {"train": 24, "test": 24}


def ethanol(labels: int) -> tuple[Data, Data]:
    """All isolated atoms and so many molecules; the whole test set."""
    structures, targets = gpmlp.read(ETHANOL / "train.xyz")
    alone = (structures.counts == 1).nonzero()[:, 0]
    others = (structures.counts > 1).nonzero()[:, 0]
    chosen = torch.cat([alone, others[torch.linspace(0, len(others) - 1, labels).long()]])
    return (structures.select(chosen), targets.select(structures, chosen)), gpmlp.read(ETHANOL / "test.xyz")


def aluminium(labels: int, folder: Path) -> tuple[Data, Data]:
    """Cells labelled by pw.x, those in the folder if they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, n in MADE.items():
        cells = []
        for _ in range(n):
            cell = ase.build.bulk("Al", a=3.97, cubic=True)
            cell.set_cell(cell.cell.array @ (np.eye(3) + 0.03 * rng.standard_normal((3, 3))), scale_atoms=True)
            cell.rattle(0.15, rng=rng)
            cells.append(cell)
        if not (folder / f"{name}.xyz").exists():
            oracle = CalculatorOracle(OracleRecipe(calculator="quantum-espresso", kwargs=PLANE_WAVES, check_every=0))
            structures = structures_from_ase(cells)
            write_frames(folder / f"{name}.xyz", to_ase(structures, oracle.label(structures)))
    train, test = (gpmlp.read(folder / f"{name}.xyz") for name in MADE)
    return (train[0].select(range(labels)), train[1].select(train[0], range(labels))), test


def measure(name: str, baseline: dict, train: Data, test: Data) -> dict:
    """A line of the table."""
    potential, _ = gpmlp.fit(*train, gpmlp.Recipe.model_validate({"baseline": baseline}))
    found = gpmlp.evaluate(potential, *test).as_dict()
    kept = ("force_mae_meV_per_A", "energy_mae_meV_per_atom", "stress_mae_GPa")
    kept += tuple(f"{kind}_coverage_90" for kind in ("force", "energy", "stress"))
    return {"baseline": name, "labels": len(train[0])} | {key: found.get(key) for key in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("system", choices=("ethanol", "aluminium"))
    parser.add_argument("--labels", type=int)
    parser.add_argument("--folder", type=Path, help="of the labels of aluminium")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.system == "aluminium" and given.folder is None:
        parser.error("aluminium needs --folder")
    train, test = (
        ethanol(given.labels or 25) if given.system == "ethanol" else aluminium(given.labels or 12, given.folder)
    )
    calculator = "tblite" if given.system == "ethanol" else "emt"
    lines = [measure("none", {}, train, test), measure(calculator, {"calculator": {"name": calculator}}, train, test)]
    for line in lines:
        print(json.dumps({"system": given.system} | line), flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    main()
