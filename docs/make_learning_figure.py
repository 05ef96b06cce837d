"""Draw docs/learning.png: the course of a learning run, and what it learned beside as many labels chosen otherwise.

    python tests/benchmarks/learning.py --cases al --seeds 0 1 2 3 4 --work FOLDER --json FOLDER/al.json
    python docs/make_learning_figure.py FOLDER/al/run0 FOLDER/al.json [more.json ...] [--output learning.png]

Needs matplotlib (pip install '.[plot]').
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

INK, PALE, ACCENT, WARM = "#22303c", "#8b98a5", "#2a6f97", "#c8553d"
KINDS = {"learned": "on the fly", "random": "random", "uniform": "evenly spaced", "ten times": "ten times as many"}
ERRORS = {"mae": "mean", "p99": "99 %", "max": "largest"}


def course(upper: plt.Axes, lower: plt.Axes, log: Path) -> None:
    """Largest standard deviation of a force over its limit, with labels as ticks; temperature below it."""
    events = [json.loads(line) for line in log.read_text().splitlines()]
    looks = [e for e in events if e["event"] == "look" and e.get("threshold")]
    step = np.array([e["step"] for e in looks])
    ratio = np.array([e["sigma_max"] / e["threshold"] for e in looks])
    labels = np.array([e["step"] for e in events if e["event"] == "learned" and "key" in e])
    upper.plot(step, ratio, ".", ms=2.5, color=ACCENT)
    upper.axhline(1, color=PALE, lw=0.8)
    upper.plot(labels, np.full(len(labels), 1.35), "|", color=WARM, ms=9)
    upper.text(
        0.99, 0.97, f"{len(labels)} labels asked for", color=WARM, ha="right", va="top", transform=upper.transAxes
    )
    upper.set(yscale="log", ylim=(0.06, 2.6), ylabel="largest force σ / limit")
    upper.set_yticks([0.1, 0.2, 0.5, 1], ["0.1", "0.2", "0.5", "1"])
    upper.minorticks_off()
    upper.tick_params(labelbottom=False)
    lower.plot(step, [e["temperature_K"] for e in looks], color=PALE, lw=0.7)
    lower.plot(step, [e["target_temperature_K"] for e in looks], color=INK, lw=1)
    lower.set(xlabel="steps of 4 fs", ylabel="K", xlim=(0, step.max()))
    upper.set_xlim(0, step.max())


def beside(axes: plt.Axes, results: list[dict]) -> None:
    """Errors of forces on independent trajectories, a dot for each seed."""
    for k, (kind, name) in enumerate(KINDS.items()):
        for j, key in enumerate(ERRORS):
            values = [r[kind][key] for r in results]
            place = j + 0.17 * (k - 1.5)
            axes.plot(
                np.full(len(values), place), values, "o", ms=4, alpha=0.75, mew=0,
                color=(ACCENT, PALE, WARM, INK)[k], label=name if not j else None,
            )  # fmt: skip
            axes.plot([place - 0.06, place + 0.06], [np.median(values)] * 2, color=(ACCENT, PALE, WARM, INK)[k], lw=1.5)
    axes.set_xticks(range(len(ERRORS)), ERRORS.values())
    axes.set(yscale="log", ylabel="force error, meV/Å")
    axes.set_yticks([10, 30, 100, 300, 1000], ["10", "30", "100", "300", "1000"])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of one of the runs")
    parser.add_argument("results", type=Path, nargs="+", help="JSON of tests/benchmarks/learning.py, with rivals")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("learning.png"))
    options = parser.parse_args()
    results = [r for path in options.results for r in json.loads(path.read_text()).values() if "learned" in r]
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[3, 2])
    upper, lower = left.subplots(2, 1, height_ratios=[3, 1])
    course(upper, lower, options.run / "log.jsonl")
    beside(right.subplots(), results)
    labels = ", ".join(str(r["labels"]) for r in results)
    right.suptitle(f"{len(results)} runs with {labels} labels", fontsize=9, color=INK)
    figure.savefig(options.output, dpi=160)


if __name__ == "__main__":
    main()
