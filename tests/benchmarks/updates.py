"""Cost of updates: one new 64-atom silicon structure with energy, forces and stress learned from, beside a refit of everything.

    OMP_NUM_THREADS=1 python tests/benchmarks/updates.py [--columns 250 500 1000 2000] [--labels 20 50 100] [--at 1000] [--wall]
        [--json times.json]
    OMP_NUM_THREADS=1 python tests/benchmarks/updates.py --functionals rmd17_ethanol/train.xyz [--labels 45 270]

The second is of a model of all functionals (`inducing.functionals: all`) of that file: times of a label, after so many, and of its parts.

First the time of an update against the number of columns M, with the slope of log time against log M by least squares: the factor alone
with the rows of the structure more (appended) and less (removed), the whole of `Online.added` and `removed`. Then, at one M and after
so many labels: `learned` (foresee, add, new inducing points), its parts, `refreshed`, and `fit` to the same labels with as many
inducing points. CPU seconds, the least of the repeats, so that they hold on a busy machine too. Structures are rattled by 0.12 Å, the one
that is learned by 0.25 Å, so that it brings inducing points; labels are those of a small potential fitted to the data of this repository,
with noise. Default recipe but for the number of inducing points and, of `fit`, no structures set aside. `--wall`: seconds that pass
instead, which is what counts for several threads on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import common
import numpy as np
import torch

sys.path.insert(0, str(common.ROOT))

from ase.build import bulk

import gpmlp
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting.online import OnlineFit
from gpmlp.gp.qr import PosteriorFactor
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.potential.potential import Potential
from gpmlp.recipe import Recipe

TRUTH = {
    "descriptor": {"cutoff": 5.0, "n_max": 4, "l_max": 2},
    "inducing": {"n": 100, "gradients": 0},
    "calibration": False, "novelty": False, "variance": False,
}  # fmt: skip
GRADIENTS = 3
RATTLED, NEW = 0.12, 0.25  # A
STEPS = 30  # labels before, when M varies
CENTRES = 16  # inducing points more, at most, that `learned` may take: about what the defaults ask for 199 labels more
NOISE = {"energies": 1e-3, "forces": 0.02}  # eV/atom, eV/A
CLOCK = time.perf_counter if "--wall" in sys.argv else time.process_time
Label = tuple[Structures, Targets]


def label(truth: Potential, seed: int, rattled: float = RATTLED) -> Label:
    """A rattled and strained cell of 64 atoms."""
    atoms = bulk("Si", cubic=True).repeat(2)
    atoms.rattle(rattled, seed=seed)
    atoms.set_cell(atoms.cell * (1 + 0.02 * math.sin(seed)), scale_atoms=True)
    cell = structures_from_ase([atoms])
    true, generator = truth(cell), torch.Generator().manual_seed(seed)

    def noise(like: torch.Tensor, size: float) -> torch.Tensor:
        return size * torch.randn(like.shape, generator=generator, dtype=torch.float64)

    energies = true.energies + noise(true.energies, NOISE["energies"] * len(atoms))
    forces = true.forces + noise(true.forces, NOISE["forces"])
    return cell, replace(Targets.unlabelled(cell), energies=energies, forces=forces, stresses=true.stresses)


def together(labels: Sequence[Label]) -> Label:
    return Structures.concatenate([s for s, _ in labels]), Targets.concatenate([t for _, t in labels])


def least(repeats: int, run: Callable[[], object]) -> float:
    """Seconds by CLOCK, the least of the repeats."""
    times = []
    for _ in range(repeats):
        start = CLOCK()
        run()
        times.append(CLOCK() - start)
    return min(times)


def begun(labels: Sequence[Label], columns: int) -> OnlineFit:
    """With so many columns, whatever the labels ask for, and free to have CENTRES inducing points more."""
    shares = {"inducing": {"shares": {"Si": columns // (1 + GRADIENTS)}, "gradients": GRADIENTS}}
    online = OnlineFit.begin(*together(labels), Recipe.model_validate(shares))
    more = {"inducing": {"n": columns // (1 + GRADIENTS) + CENTRES, "gradients": GRADIENTS}}
    return replace(online, asked=Recipe.model_validate(more))


def slope(columns: Sequence[int], times: Sequence[float]) -> float:
    """Of log time against log columns."""
    return float(np.polyfit(np.log(columns), np.log(times), 1)[0])


def against_columns(labels: Sequence[Label], columns: Sequence[int], repeats: int) -> list[dict[str, float]]:
    """Times of updates by the last label, after all others."""
    out = []
    for m in columns:
        online = begun(labels[:-1], m)
        more = online.added(*labels[-1])
        rows = torch.cat(list(more.batches[-1].rows.values()))
        larger = online.factor.append_rows(rows)
        every = [r for b in more.batches for r in b.rows.values()]
        out.append(
            {
                "columns": online.factor.columns,
                "rows of the structure": len(rows),
                "factor appended": least(repeats, lambda o=online, r=rows: o.factor.append_rows(r)),
                "factor removed": least(repeats, lambda f=larger, r=rows: f.remove_rows(r)),
                "added": least(repeats, lambda o=online: o.added(*labels[-1])),
                "removed": least(repeats, lambda o=more: o.removed(-1)),
                "events of removed": len(more.removed(-1).events) - len(more.events),
                "factor from all rows": least(
                    1, lambda e=every, n=online.factor.columns: PosteriorFactor.from_rows(e, n)
                ),
            }
        )
        print(out[-1], file=sys.stderr)
    return out


def learning(
    labels: Sequence[Label], at: int, counts: Sequence[int], repeats: int, refit: bool
) -> list[dict[str, float]]:
    """Times of learning the last label after some of the others, of a refresh, and of a refit."""
    online, out = begun(labels[: min(20, *counts)], at), []
    for n in counts:
        while online.n_labels < n:
            online = online.added(*labels[online.n_labels])
        foreseen = online
        for some in labels[:5]:
            foreseen = foreseen.learned(*some)
        new, more = online.learned(*labels[-1]), online.added(*labels[-1])
        about, wanted = labels[-1][0], ("energies", "forces", "stresses")
        fixed = online.recipe.inducings[0].model_copy(update={"n": at // (1 + GRADIENTS)})
        full = online.asked.model_copy(update={"inducing": fixed, "calibration": False})
        found = {
            "labels": n,
            "columns": online.factor.columns,
            "new columns": new.factor.columns - online.factor.columns,
            "kept GB": sum(b.n_bytes for b in online.batches) / 1e9,
            "rows GB": sum(r.numel() * 8 for b in online.batches for r in b.rows.values()) / 1e9,
            "learned": least(repeats, lambda o=online: replace(o).learned(*labels[-1])),
            "of it: foreseen": least(
                repeats, lambda o=online, a=about, w=wanted: o.potential(a, variance=w, novelty=True)
            ),
            "of it: added": least(repeats, lambda o=online: o.added(*labels[-1])),
            "of it: extended": least(repeats, lambda o=more: o.extended(labels[-1][0])),
            "recalibrated, of 5 foreseen": least(1, lambda o=foreseen: o.recalibrated()),
            "refreshed": least(1, lambda o=online: o.refreshed("benchmark")),
        }
        if refit:
            found["refit"] = least(1, lambda f=full, n=n: gpmlp.fit(*together(labels[:n]), f))
        out.append(found)
        print(found, file=sys.stderr)
    return out


def exactly(path: Path, counts: Sequence[int], repeats: int) -> list[dict[str, float]]:
    """Times of a label of a model of all functionals, after so many others; noises are given, so that a beginning is short."""
    noise, new, out = {"energy_per_atom": 2e-4, "force": 0.01}, gpmlp.read(path, "3"), []
    asked = Recipe.model_validate({"inducing": {"functionals": "all"}, "noise": noise, "calibration": False})
    for n in counts:
        labels = gpmlp.read(path, f"1:{3 * n + 1}:3")
        start = CLOCK()
        online = OnlineFit.begin(*labels, asked)
        begun, more = CLOCK() - start, online.added(*new)
        (model,) = online.models
        grown = model.exact.bordered(model.kernel, new[0], more.batches[-1].remaining)
        found = {
            "labels": n,
            "functionals": online.rank,
            "columns of variances": online.factor.columns,
            "learned": least(repeats, lambda o=online: replace(o).learned(*new)),
            "of it: foreseen": least(repeats, lambda o=online: o.potential(new[0], variance=("energies", "forces"))),
            "of it: added": least(repeats, lambda o=online: o.added(*new)),
            "of it: their covariances": least(
                repeats, lambda m=model, b=more.batches[-1]: m.exact.bordered(m.kernel, new[0], b.remaining)
            ),
            "of it: the border": least(repeats, lambda o=online, g=grown: o.exact.bordered(g.process)),
            "of it: extended": least(repeats, lambda o=more: o.extended(new[0])),
            "the potential": least(repeats, lambda o=more: replace(o).potential),
            "removed": least(1, lambda o=more: o.removed(-1)),
            "begun": begun,
        }
        out.append(found)
        print(found, file=sys.stderr)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, nargs="+", default=[250, 500, 1000, 2000])
    parser.add_argument(
        "--labels", type=int, nargs="+", default=[20, 50, 100], help="structures learned before, for `learned`"
    )
    parser.add_argument("--at", type=int, default=1000, help="columns for `learned`")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-refit", action="store_true")
    parser.add_argument("--wall", action="store_true", help="seconds that pass, not CPU seconds")
    parser.add_argument("--functionals", type=Path, help="of a model of all functionals of these data instead")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.functionals:
        done = exactly(options.functionals, options.labels, options.repeats)
        print(common.table([[n, *(f"{d[n]:.3g}" for d in done)] for n in done[0]], ["", *map(str, options.labels)]))
        return
    data = gpmlp.read(Path(common.ROOT) / "data/silicon/train.xyz", "1:")
    truth = gpmlp.fit(*data, Recipe.model_validate(TRUTH))[0]
    most = max(*options.labels, STEPS)
    labels = [*(label(truth, seed) for seed in range(most)), label(truth, most, NEW)]
    steps = against_columns([*labels[:STEPS], labels[-1]], options.columns, options.repeats)
    done = learning(labels, options.at, options.labels, options.repeats, not options.no_refit)
    names = [n for n in steps[0] if n not in ("columns", "rows of the structure", "events of removed")]
    slopes = {n: slope([s["columns"] for s in steps], [s[n] for s in steps]) for n in names}
    threads, clock = torch.get_num_threads(), "seconds" if options.wall else "CPU seconds"
    print(f"64 atoms, {steps[0]['rows of the structure']} rows, after {STEPS} others; {threads} thread(s); {clock}")
    rows = [[n, *(f"{s[n]:.3f}" for s in steps), f"{slopes[n]:.2f}"] for n in names]
    print(common.table(rows, ["", *(f"M = {s['columns']}" for s in steps), "slope"]), "\n")
    names = [n for n in done[0] if n != "labels"]
    print(
        common.table(
            [[n, *(f"{d[n]:.3g}" for d in done)] for n in names], ["", *(f"{d['labels']} labels" for d in done)]
        )
    )
    if options.json:
        record = {"threads": threads, "against_columns": steps, "slopes": slopes, "learning": done}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
