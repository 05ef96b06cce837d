"""What uncertainty and decisions add to a step of learning on the fly, in force calls.

    OMP_NUM_THREADS=1 python tests/benchmarks/looks.py RUN [RUN ...] [--json looks.json]

RUN is the output folder of a finished run of `gpmlp learn` (or of learning.py): its model and its recipe are taken, and the walker of
its start is advanced anew, with the trigger's looks, and by the same integrator with nothing but forces. (time of a step with looks
- time of a step without) / (time of a prediction of energy and forces), medians of turns one after another.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import common

sys.path.insert(0, str(common.ROOT))

import gpmlp
from gpmlp.core.verlet_list import VerletList
from gpmlp.engines import md
from gpmlp.engines.md import Integrator
from gpmlp.learning import initial_structures, walker
from gpmlp.learning.recipe import LearnRecipe
from gpmlp.learning.triggers import trigger_decision, trigger_limits
from gpmlp.learning.walker import Walker, WalkerSnapshot

TURNS = 7
SETTLING = 4  # strides before the first turn


def timed(run: Callable[[], object], steps: int) -> float:
    """Milliseconds a step."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start) / steps


def measured(run: Path) -> dict[str, float]:
    """Times of a step and of a force call, ms, and what looks add, in force calls."""
    recipe = LearnRecipe.model_validate(json.loads((run / "recipe.json").read_text()))
    potential, trigger, dynamics = gpmlp.load(run / "model.gpmlp"), recipe.trigger, recipe.dynamics
    start = initial_structures.read_starts(run.parent / recipe.start)[0]
    timestep = dynamics.timestep_fs or md.default_timestep_fs(start.numbers)
    # limits that nothing exceeds: every step is made, as in a run that has learned enough
    limits = trigger_limits(trigger, 1e3, len(start), {}, potential.calibration).times(1e3)

    def judge(structure, prediction, before):
        return trigger_decision(prediction, structure, limits, before)

    def strides(seen: WalkerSnapshot, n: int) -> WalkerSnapshot:
        for _ in range(n):
            seen = walker.advance_walker(seen, potential, judge, dynamics, timestep, trigger.every, trigger.watch)
        return seen

    begun = Walker.from_atoms(0, start, dynamics, recipe.seed)
    seen = strides(walker.take_snapshot(begun, potential, judge, dynamics), SETTLING)

    def plain() -> None:
        atoms = seen.walker.atoms.copy()
        watched = walker.RecordingCalculator(potential, "plain", 0.0, lambda s, _, pairs: potential(s, pairs=pairs))
        atoms.calc = watched
        watched.take_over(atoms, seen)
        bath, cell_state = walker.bath_of(dynamics), (seen.walker.p_eps, seen.walker.force_eps)
        integrator = Integrator(atoms, bath, timestep, seen.walker.generator, seen.walker.step, cell_state)
        for _ in range(trigger.every):
            integrator.advance()

    skin = VerletList(potential.reach)

    def calls() -> None:
        for _ in range(trigger.every):
            potential(seen.structure, pairs=skin(seen.structure))

    turns = {"with looks": lambda: strides(seen, 1), "forces alone": plain, "force call": calls}
    taken: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(TURNS):
        for name, turn in turns.items():
            taken[name].append(timed(turn, trigger.every))
    middle = {f"{name} ms": statistics.median(values) for name, values in taken.items()}
    added = middle["with looks ms"] - middle["forces alone ms"]
    return {"atoms": len(start), "columns": potential.variances.n_columns, "every": trigger.every, "watch": trigger.watch,
            **middle, "looks, force calls": added / middle["force call ms"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of gpmlp learn")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {str(run): measured(run) for run in options.runs}
    names = list(next(iter(found.values())))
    print(common.table([[run, *(f"{v:.3g}" for v in row.values())] for run, row in found.items()], ["", *names]))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
