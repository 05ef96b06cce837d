"""What charges gain beyond the cutoff: fits without and with them, of the same structures by the same recipe, tested near and far.

    python tests/benchmarks/long_range.py [--data DATA] [--sets ag3 water nacl] [--only off] [--set inducing.n=200] [--starts 2]

Sets of this project are in data/long_range; DATA holds the folders charged_dimers (train_short.xyz) and mixed_charge_dimers
(train.xyz), of which the LONGEST separations of each dimer are set aside unless the folder has them as far.xyz. ethanol and silicon,
of data/, copper (EMT, made here) and aspirin of DATA (rmd17_aspirin) are controls: charges should gain nothing. `--starts` repeats each
fit with charges from starts that differ by 0.1 e at random: `nats` is its negative log evidence, `E moved` how far tested energies move.
`left out`: errors of structures left out of the fit of charges, in units of those without charges.
Energies are rmse of a structure in meV, forces rmse and MAE in meV/A; `F rank` is
Spearman's correlation between standard deviations and errors of forces.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import gpmlp
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting import charge_fit
from gpmlp.io.ase_atoms import from_ase
from gpmlp.potential.evaluation import evaluate
from gpmlp.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
OWN = ROOT / "data" / "long_range"
LONGEST = {"mixed_charge_dimers": 2, "charged_dimers": 3}  # of ten separations
COLUMNS = [
    "set",
    "tested on",
    "charges",
    "E rmse",
    "F rmse",
    "F MAE",
    "E in 90 %",
    "F in 90 %",
    "F rank",
    "nats/label",
    "left out",
    "nats",
    "E moved",
    "fit CPU s",
]
INTERVALS = ("energy_coverage_90", "force_coverage_90", "force_spearman")
Labelled = tuple[Structures, Targets]


@dataclass(frozen=True)
class Case:
    """Training data, and what is tested by name."""

    train: Labelled
    tests: dict[str, Labelled]


def read(path: Path, every: int = 1) -> Labelled:
    """Structures and labels of a file, or every so many of them."""
    return gpmlp.read(path, f"::{every}")


def own(train: str, **tests: str) -> Callable[[Path], Case]:
    """A case of the files of this project, with every fifth training structure as a near test."""

    def case(_: Path) -> Case:
        data = read(OWN / f"{train}.xyz")
        held = range(0, len(data[0]), 5) if "near" not in tests else range(0)
        far = {name: read(OWN / f"{stem}.xyz") for name, stem in tests.items()}
        near = {"near": part(data, held)} if held else {}
        return Case(part(data, sorted(set(range(len(data[0]))) - set(held))), near | far)

    return case


def dimers(name: str, file: str) -> Callable[[Path], Case]:
    """A case of dimers at several separations, the longest ones set aside."""

    def case(folder: Path) -> Case:
        path = folder / name / file
        data, far = read(path), path.with_name("far.xyz")
        if far.is_file():
            return Case(data, {"far": read(far)})
        held = sorted(longest(path, LONGEST[name]))
        fitted = sorted(set(range(len(data[0]))) - set(held))
        return Case(part(data, fitted), {"far": part(data, held)})

    return case


def longest(path: Path, most: int) -> Iterator[int]:
    """Frames of the longest separations of each dimer."""
    import ase.io

    groups: dict[str, list[tuple[float, int]]] = {}
    for k, atoms in enumerate(ase.io.iread(path)):
        dimer = f"{atoms.symbols} {atoms.info.get('dimer', atoms.info.get('dimer_id'))} {atoms.info.get('label')}"
        groups.setdefault(dimer, []).append((atoms.info["distance"], k))
    for members in groups.values():
        yield from (k for _, k in sorted(members)[-most:])


def control(folder: str, every: int) -> Callable[[Path], Case]:
    """A case where nothing is beyond the cutoff."""
    return lambda _: Case(
        read(ROOT / "data" / folder / "train.xyz", every), {"test": read(ROOT / "data" / folder / "test.xyz")}
    )


def aspirin(folder: Path) -> Case:
    """A molecule whose atoms are farther apart than the cutoff."""
    return Case(
        read(folder / "rmd17_aspirin" / "train.xyz", 10), {"test": read(folder / "rmd17_aspirin" / "test.xyz", 10)}
    )


def copper(_: Path) -> Case:
    """Rattled and strained cells by EMT, whose forces are local."""
    from ase.build import bulk
    from ase.calculators.emt import EMT

    frames = []
    for k in range(40):
        atoms = bulk("Cu", cubic=True) * (2, 2, 2)
        strain = 0.02 * torch.randn(3, 3, generator=torch.Generator().manual_seed(k), dtype=torch.float64).numpy()
        atoms.set_cell(atoms.cell.array @ (strain + strain.T) / 2 + atoms.cell.array, scale_atoms=True)
        atoms.rattle(0.1, seed=k)
        atoms.calc = EMT()
        atoms.get_potential_energy(), atoms.get_stress()
        frames.append(atoms)
    data = from_ase(frames)
    return Case(part(data, range(30)), {"test": part(data, range(30, 40))})


SETS = {
    "mixed_charge_dimers": dimers("mixed_charge_dimers", "train.xyz"),
    "charged_dimers": dimers("charged_dimers", "train_short.xyz"),
    "ag3": own("ag3_train", near="ag3_test"),
    "water": own("water_train", far="water_far"),
    "nacl": own("nacl_train", far="nacl_far", large="nacl_large"),
    "rocksalt": own("rocksalt_train", near="rocksalt_test"),
    "ethanol": control("ethanol", 2),
    "silicon": control("silicon", 3),
    "aspirin": aspirin,
    "copper": copper,
}
SHARED = ("mixed_charge_dimers", "charged_dimers", "aspirin")
SCATTER = 0.1  # e, of a start


def part(data: Labelled, indices) -> Labelled:
    """The chosen ones of labelled structures."""
    return data[0].select(list(indices)), data[1].select(data[0], list(indices))


def scores(potential: gpmlp.Potential, data: Labelled) -> dict[str, float]:
    """Errors of a test set, and what its error bars are worth."""
    structures, targets = data
    evaluation = evaluate(potential, structures, targets)
    found = evaluation.as_dict()
    error = evaluation.prediction.energies - targets.energies
    return {
        "energy_rmse_meV": 1e3 * float(error[~error.isnan()].square().mean().sqrt()),
        **{name: found[name] for name in ("force_rmse_meV_per_A", "force_mae_meV_per_A", *INTERVALS)},
    }


@contextmanager
def scattered_start(seed: int) -> Iterator[None]:
    """Fits of charges begin SCATTER from the physical start, if there is a seed."""
    original = charge_fit.fit_charges

    def scattered(data, *about):
        start = charge_fit.physical_start(data)
        noise = torch.randn(len(start), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return original(data, *about, begin=start + SCATTER * noise)

    charge_fit.fit_charges = scattered if seed else original
    try:
        yield
    finally:
        charge_fit.fit_charges = original


def run(name: str, data: Path, choice: str, settings: dict, seed: int = 0) -> list[dict]:
    """A fit of one set, and its tests."""
    case = SETS[name](data)
    if choice != "default":
        settings = {
            "inducing": {"functionals": "none"},
            "long_range": {"charges": choice},
        } | settings  # charges need centres
    recipe = Recipe.model_validate(settings)
    began = time.process_time()
    structures, targets = case.train
    if choice == "off":  # which refuses what it cannot tell apart
        structures = replace(structures, charges=torch.zeros(len(structures)))
    with scattered_start(seed):
        potential, report = gpmlp.fit(structures, targets, recipe)
    about = {"set": name, "choice": choice, "fit_cpu_s": time.process_time() - began}
    about |= {"structures": len(case.train[0]), "charges": getattr(report, "charges", None)}
    about |= {"start": seed, "nats": report.negative_log_evidence}
    return [
        about | {"test": test, "tested": len(d[0]), "energies": potential(d[0]).energies} | scores(potential, d)
        for test, d in case.tests.items()
    ]


def row(found: dict) -> list[str]:
    """A line of the table."""
    charges = found["charges"] or {}
    form = f"{found['choice']}: {charges.get('form', '')}" if charges.get("kept") else found["choice"]
    gain = charges.get("gain_nats_per_label")
    return [
        found["set"],
        f"{found['test']} ({found['tested']})",
        form,
        *(f"{found[key]:.1f}" for key in ("energy_rmse_meV", "force_rmse_meV_per_A", "force_mae_meV_per_A")),
        *("-" if found[key] is None else f"{found[key]:.2f}" for key in INTERVALS),
        "-" if gain is None else f"{gain:.2f}",
        "-" if charges.get("left_out_errors_ratio") is None else f"{charges['left_out_errors_ratio']:.2f}",
        f"{found['nats']:.0f}",
        "-" if found.get("moved_meV") is None else f"{found['moved_meV']:.1f}",
        f"{found['fit_cpu_s']:.0f}",
    ]


def nested(settings: list[str]) -> dict:
    """A recipe of KEY=VALUE."""
    out: dict = {}
    for setting in settings:
        keys, _, value = setting.partition("=")
        *path, last = keys.split(".")
        inner = out
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = json.loads(value)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the sets that are not shipped")
    parser.add_argument("--sets", nargs="+", choices=SETS, help="default: all that are there")
    parser.add_argument(
        "--only",
        nargs="+",
        default=["off", "auto"],
        help="of long_range.charges; default: open, as is inducing.functionals",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe; repeat")
    parser.add_argument("--starts", type=int, default=1, help="fits with charges of each set")
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.sets or [name for name in SETS if options.data or name not in SHARED]
    if options.data is None and set(names) & set(SHARED):
        parser.error("--data is needed for sets that are not shipped")
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    found: list[dict] = []
    for name in names:
        for choice in options.only:
            first: list[torch.Tensor] = []
            for seed in range(options.starts if choice != "off" else 1):
                found += (new := run(name, options.data or OWN, choice, nested(options.set), seed))
                energies = [entry.pop("energies") for entry in new]
                first = first or energies
                for entry, here, there in zip(new, energies, first, strict=True):
                    entry["moved_meV"] = 1e3 * float((here - there).abs().max()) if seed else None
                print("\n".join("| " + " | ".join(row(entry)) + " |" for entry in new), flush=True)
            if options.json:
                options.json.write_text(json.dumps(found, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
