"""Means of low rank beside exact ones: rank, change of forces, errors, and time, on data that are not shipped.

    OMP_NUM_THREADS=1 python tests/benchmarks/low_rank.py --data DATA [--cases zuo_si ethanol] [--work FOLDER] [--json low_rank.json]

DATA holds the folders named in CASES. A model of each case is fitted with `mean: low_rank` and kept in the folder of --work. Both of its
means predict the test set, and structures far from the data: frames of it squeezed, stretched and shaken. Changes of forces are given
over the noise of forces, and over the predicted standard deviations of the same forces. Times: the mean and its slopes from known
features in PyTorch, in chunks, and the whole prediction with pairs known; the least CPU seconds of bursts that take turns
(bursts.py), so that they hold on a busy machine too.
--frames 20 is a quick trial.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bursts
import common

sys.path.insert(0, str(common.ROOT))

import torch
from torch import Tensor

import gpmlp
from gpmlp.core import neighbors
from gpmlp.core.environments import Environments, StructureEnvironments
from gpmlp.core.structures import Structures
from gpmlp.potential.chunked import ATOMS
from gpmlp.potential.potential import Potential
from gpmlp.recipe import Recipe

FAR = {"squeezed to 0.9": (0.9, 0.0), "squeezed to 0.8": (0.8, 0.0), "stretched to 1.25": (1.25, 0.0), "shaken by 0.1 A": (1.0, 0.1),
       "shaken by 0.2 A": (1.0, 0.2)}  # fmt: skip
FRAMES, TIMED = 10, 1000  # of the test set that are moved far away; atoms, about, that are timed
FORMS = ("exact", "low_rank")


@dataclass(frozen=True)
class Case:
    """Training and test files, how many frames to learn from, and the recipe."""

    train: str
    test: str
    frames: int | None
    recipe: dict


CASES = {
    "zuo_si": Case(
        "zuo2020_Si/train.xyz", "zuo2020_Si/test.xyz", None,
        {"descriptor": {"cutoff": 5.0, "n_max": 8, "l_max": 6}, "kernel": {"zeta": 2}, "inducing": {"n": 1000, "gradients": 0}},
    ),
    "zuo_si_zeta_4": Case(
        "zuo2020_Si/train.xyz", "zuo2020_Si/test.xyz", None,
        {"descriptor": {"cutoff": 5.0, "n_max": 8, "l_max": 6}, "kernel": {"zeta": 4}, "inducing": {"n": 1000, "gradients": 0}},
    ),
    "ethanol": Case(
        "rmd17_ethanol/train.xyz", "rmd17_ethanol/test.xyz", 400,
        {"kernel": {"zeta": 2}, "inducing": {"n": 1200, "gradients": 0}},
    ),
    "acac": Case(
        "acac/train_300K.xyz", "acac/test_MD_600K.xyz", None, {"kernel": {"zeta": 2}, "inducing": {"n": 900, "gradients": 0}}
    ),
    "acac_zeta_4": Case(
        "acac/train_300K.xyz", "acac/test_MD_600K.xyz", None, {"kernel": {"zeta": 4}, "inducing": {"n": 900, "gradients": 0}}
    ),
}  # fmt: skip


def model(name: str, data: Path, work: Path, frames: int | None) -> Potential:
    """The potential of a case, fitted if it is not there."""
    case, path = CASES[name], work / f"{name}_{frames or 'all'}.gpmlp"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        print(f"{name}: fitting", file=sys.stderr)
        recipe = Recipe.model_validate(case.recipe | {"mean": "low_rank"})
        gpmlp.save(gpmlp.fit(*gpmlp.read(data / case.train, slice(frames or case.frames)), recipe)[0], path)
    return gpmlp.load(path)


def moved(structures: Structures, factor: float, shaken: float) -> Structures:
    """All lengths times a factor, then atoms moved at random."""
    noise = torch.randn(structures.positions.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return structures.with_positions(factor * structures.positions + shaken * noise, factor * structures.cells)


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def changes(potential: Potential, structures: Structures) -> dict[str, float]:
    """Of forces, meV/A, also over their noise and their standard deviations, and of energies, meV/atom."""
    exact = potential.to(mean="exact")(structures, "forces")
    found = potential(structures)
    forces = found.forces - exact.forces
    assert exact.forces_covariance is not None
    std = exact.forces_covariance.total.diagonal(dim1=1, dim2=2).sqrt()
    energies = (found.energies - exact.energies) / structures.counts
    return {
        "change_meV_per_A": 1e3 * rms(forces),
        "largest_change_meV_per_A": 1e3 * float(forces.abs().max()),
        "change_over_noise": rms(forces) / potential.noise["forces"],
        "change_over_std": rms(forces / std),
        "largest_change_over_std": float((forces / std).abs().max()),
        "change_of_energies_meV_per_atom": 1e3 * rms(energies),
    }


def errors(potential: Potential, structures: Structures, reference: Tensor) -> dict[str, float]:
    """RMSE of forces by either mean, meV/A."""
    return {form: 1e3 * rms(potential.to(mean=form)(structures).forces - reference) for form in FORMS}


def cpu_burst(call: Callable[[], object]) -> bursts.Burst:
    """A contestant whose calls are measured in CPU seconds of this process."""

    def run(seconds: float) -> list[float]:
        found: list[float] = []
        end = time.perf_counter() + seconds
        while not found or time.perf_counter() < end:
            start = time.process_time()
            call()
            found.append(time.process_time() - start)
        return found

    return run


def _mean_of(potential: Potential, environments: list[list[Environments]]) -> Callable[[], None]:
    def call() -> None:
        for term, chunks in zip(potential.terms, environments, strict=True):
            for chunk in chunks:
                term.local_energies(chunk)

    return call


def times(potential: Potential, structures: Structures, rounds: int, seconds: float) -> dict[str, float]:
    """Least µs of CPU an atom of mean and whole prediction, by either form, and their ratio."""
    some = structures.select(range(max(1, int((structures.counts.cumsum(0) <= TIMED).sum()))))
    pairs = neighbors.find_neighbors(some, potential.reach)
    features: list[list[Environments]] = []
    for term in potential.terms:
        view = StructureEnvironments.from_structures(term.descriptor, some, pairs)
        parts = torch.arange(some.n_atoms).split(ATOMS * len(some.distinct_species))
        features.append([term.descriptor(view.surroundings.select(part)) for part in parts])
    contestants = {}
    for form in FORMS:
        one = potential.to(mean=form)
        contestants[f"mean {form}"] = cpu_burst(_mean_of(one, features))
        contestants[f"whole {form}"] = cpu_burst(lambda one=one: one(some, pairs=pairs))
    found = bursts.in_turn(contestants, rounds, seconds)
    out = {f"{name} us": 1e6 * t.least / some.n_atoms for name, t in found.items()}
    return out | {f"{w} ratio": found[f"{w} low_rank"].least / found[f"{w} exact"].least for w in ("mean", "whole")}


def run(name: str, options: argparse.Namespace) -> dict:
    """All numbers of one case."""
    potential = model(name, options.data, options.work, options.frames)
    if potential.recipe.mean != "low_rank":
        raise SystemExit(f"{name}: {' '.join(potential.report['warnings'])}")
    test, targets = gpmlp.read(options.data / CASES[name].test, slice(options.frames))
    few = test.select(range(min(FRAMES, len(test))))
    return {
        "report": potential.report["low_rank"],
        "centres": potential.report["centres"],
        "fit_s": {stage: seconds for stage, seconds, _ in potential.report["stages"]},
        "rmse_meV_per_A": errors(potential, test, targets.forces),
        "changes": {"test": changes(potential, test)}
        | {k: changes(potential, moved(few, *by)) for k, by in FAR.items()},
        "times": times(potential, test, options.rounds, options.seconds),
    }


def show(name: str, result: dict) -> str:
    """A case as text."""
    told = result["report"]
    ranks = ", ".join(f"{rank} of {told['features'][label]} ({label})" for label, rank in told["rank"].items())
    lines = [
        f"{name.upper()}: rank {ranks}; centres {result['centres']}; low rank {result['fit_s']['low rank']:.1f} of "
        f"{sum(result['fit_s'].values()):.0f} s of the fit",
        f"held out, in the fit: forces change by {1e3 * told['change_of_forces_eV_per_A']:.3g} meV/A, "
        f"{told['change_of_forces_eV_per_A'] / told['noise_of_forces_eV_per_A']:.2%} of their noise, in the worst of "
        f"{told['structures']} structures by {told['worst_change_of_forces_eV_per_A'] / told['noise_of_forces_eV_per_A']:.2%}",
        "RMSE of forces on the test set, meV/A: "
        + ", ".join(f"{form} {value:.3f}" for form, value in result["rmse_meV_per_A"].items()),
    ]
    header = ["change of forces", "rms meV/A", "max meV/A", "rms/noise", "rms/std", "max/std", "energy rms meV/atom"]
    rows = []
    for where, c in result["changes"].items():
        plain = [
            c["change_meV_per_A"],
            c["largest_change_meV_per_A"],
            *(c[k] for k in ("change_over_noise", "change_over_std")),
        ]
        rows.append(
            [where, *(f"{v:.3g}" for v in [*plain, c["largest_change_over_std"], c["change_of_energies_meV_per_atom"]])]
        )
    t = result["times"]
    rows_of_times = [
        [what, *(f"{t[f'{what} {form} us']:.2f}" for form in FORMS), f"{t[f'{what} ratio']:.2f}"]
        for what in ("mean", "whole")
    ]
    table = common.table(rows_of_times, ["us of CPU an atom, least", "exact", "low rank", "low rank / exact"])
    return "\n\n".join(["\n".join(lines), common.table(rows, header), table])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument(
        "--cases", nargs="+", choices=list(CASES), default=["zuo_si", "ethanol"], metavar="CASE", help=str([*CASES])
    )
    parser.add_argument("--frames", type=int, help="only the first frames of every file: a trial, not a benchmark")
    parser.add_argument("--work", type=Path, default=Path("low_rank"), help="folder of models (default: low_rank)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a burst")
    parser.add_argument("--json", type=Path, default=Path("low_rank.json"), help="where to write the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    with bursts.pinned(bursts.cores()[-1]):
        for name in options.cases:
            results[name] = run(name, options)
            print(f"\n{show(name, results[name])}", flush=True)
            options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
