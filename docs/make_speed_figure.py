"""Draw docs/speed.png: microseconds an atom of gpmlp and of others on the same atoms, floors, sizes, and two threads.

    python tests/benchmarks/speed.py --work FOLDER --json FOLDER/speed.json [with peers: see there]
    python docs/make_speed_figure.py FOLDER/speed.json [--sizes FOLDER/sizes.json] [--output speed.png]

The JSON has to hold the parts stages, scaling, threads, descriptors, molecules and peers; peers that were not there are not drawn.
Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

INK, PALE, ACCENT, WARM = "#22303c", "#8b98a5", "#2a6f97", "#c8553d"
WHOLE, UNCERTAIN = "whole: energy, forces, stress", "whole, with std of local energies"
SNAPS = {"SNAP": "LAMMPS SNAP", "quadratic SNAP": "quadratic SNAP"}


@dataclass(frozen=True)
class Row:
    """One contestant: microseconds an atom, least and median; of ours the floor, of others how many times ours."""

    name: str
    least: float
    median: float
    floor: float | None = None
    times: float | None = None
    than: str = ""


def _ours(of: dict, key: str, name: str, floor: float) -> Iterator[Row]:
    if key in of:
        yield Row(name, of[key]["least"], of[key]["median"], floor)


def _theirs(of: dict, key: str, name: str, ours: str, than: str = "") -> Iterator[Row]:
    """Beside `ours`, in the words `than`."""
    if key in of and ours in of[key]["ratios"]:
        yield Row(name, of[key]["least"], of[key]["median"], None, of[key]["ratios"][ours][1], than)


def _floor(stages: dict, zeta: str, *names: str) -> float:
    """Of some stages together."""
    return sum(stage["floor"] for stage in stages[zeta]["stages"] if stage["stage"] in names)


def groups(record: dict) -> dict[str, list[Row]]:
    """What is compared with what."""
    silicon, batch = record["stages"]["result"], record["molecules"]["result"]
    peers, described = record["peers"]["result"], record["descriptors"]["result"]
    zetas = list(silicon)
    values = _floor(silicon, zetas[0], "neighbours", "vectors of pairs", "expansion, power spectrum")
    pulled = values + _floor(silicon, zetas[0], "pull-back")
    out: dict[str, list[Row]] = {}
    for title, of, stages in (
        (f"silicon, {peers['atoms']} atoms", peers["of"], silicon),
        (f"{batch['name'].split('_')[0]}, {batch['atoms']} atoms", batch["of"], batch["floors"]),
    ):
        plain, uncertain = [], []
        for zeta in zetas:
            label = f"gpmlp ζ {zeta.split()[1]}"
            plain += _ours(of, zeta, label, _floor(stages, zeta, WHOLE))
            uncertain += _ours(of, f"{zeta}, std", label, _floor(stages, zeta, UNCERTAIN))
        for key, label in SNAPS.items():
            plain += _theirs(of, key, label, "zeta 2", "ζ 2")
        out[f"{title}: energy, forces"] = [*plain, *_theirs(of, "GAP", "GAP ζ 4", "zeta 4", "ζ 4")]
        out[f"{title}: and σ of local energies"] = [
            *uncertain,
            *_theirs(of, "GAP, variance", "GAP ζ 4", "zeta 4, std", "ζ 4"),
        ]
    of = described["of"]
    out["silicon: descriptor values"] = [
        *_ours(of, "values", "gpmlp", values),
        *_theirs(of, "dscribe, values", "dscribe", "values"),
        *_theirs(of, "featomic, values", "featomic", "values"),
    ]
    out["silicon: values and gradients"] = [
        *_ours(of, "and pulled back", "gpmlp, pulled back to forces", pulled),
        *_theirs(of, "featomic, gradients", "featomic, gradients", "and pulled back"),
    ]
    return out


def beside(axes: plt.Axes, found: dict[str, list[Row]]) -> None:
    """A line for each contestant."""
    place, names, places = 0.0, [], []
    largest = max(row.median for rows in found.values() for row in rows)
    for title, rows in found.items():
        axes.text(
            0.0, place, title, transform=axes.get_yaxis_transform(), color=INK, weight="bold", va="center", size=8
        )
        place += 1
        for row in rows:
            colour = WARM if row.times else ACCENT
            axes.plot([row.least, row.median], [place, place], color=colour, lw=2, alpha=0.45, solid_capstyle="round")
            axes.plot(row.median, place, "o", ms=5.5, color=colour, mew=0)
            if row.floor:
                axes.plot(row.floor, place, "|", ms=9, mew=1.6, color=PALE)
            ratio = f"   {float(f'{row.times:.2g}'):g} × {row.than}" if row.times else ""
            text = f"{float(f'{row.median:.3g}'):.0f}{ratio}"
            axes.text(row.median * 1.18, place, text, va="center", color=colour, size=8)
            names.append(row.name)
            places.append(place)
            place += 1
        place += 0.45
    axes.text(
        0.0,
        place - 0.35,
        "dot: median, tail: least, tick: floor; ×: as long as ours beside it",
        transform=axes.get_yaxis_transform(),
        color=PALE,
        size=8,
    )
    axes.set(xscale="log", xlabel="µs an atom, one core", ylim=(place, -0.8), xlim=(1, largest * 6))
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=PALE, alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])


def sizes(upper: plt.Axes, lower: plt.Axes, record: dict) -> None:
    """Time an atom against atoms with one thread and two; below, how much faster two are, beside the ceiling."""
    found, scaling = record["threads"]["result"], record["scaling"]["result"]
    for zeta, colour in zip(record["stages"]["result"], (ACCENT, INK), strict=False):
        cases = [c for c in found["calls"] if c["case"] == f"{zeta}, {c['atoms']} atoms"]
        cases.sort(key=lambda c: c["atoms"])
        atoms, label = [c["atoms"] for c in cases], f"ζ {zeta.split()[1]}"
        for count, style in (("1", "o-"), ("2", "o--")):
            upper.plot(
                atoms, [c["us"][count][1] for c in cases], style, ms=4, color=colour, mfc=colour if count == "1" else "white",
                label=f"{label}, {'one thread' if count == '1' else 'two threads'}",
            )  # fmt: skip
        mean, std = scaling[zeta], scaling[f"{zeta}, std"]
        upper.plot(mean["atoms"], mean["median"], "-", lw=0.8, color=colour, alpha=0.5)
        upper.plot(
            std["atoms"], std["median"], "s:", ms=3, color=colour, alpha=0.7, label=f"{label} with σ, one thread"
        )
        low, middle, high = zip(*(c["ratio"] for c in cases), strict=True)
        lower.fill_between(atoms, low, high, color=colour, alpha=0.15, lw=0)
        lower.plot(atoms, middle, "o-", ms=4, color=colour)
    ceilings = list(found["ceiling"].values())
    lower.axhspan(min(c[0] for c in ceilings), max(c[2] for c in ceilings), color=PALE, alpha=0.2, lw=0)
    lower.text(
        atoms[-1],
        sum(c[1] for c in ceilings) / len(ceilings),
        "two processes ",
        color=INK,
        size=8,
        ha="right",
        va="center",
    )
    upper.set(xscale="log", yscale="log", ylabel="µs an atom, silicon")
    upper.set_yticks([5, 10, 20, 50, 100, 200], ["5", "10", "20", "50", "100", "200"])
    upper.minorticks_off()
    every = sorted({*atoms, *mean["atoms"]})
    ticks = [n for k, n in enumerate(every) if not k or n > 3 * every[k - 1]]  # with room for their labels
    upper.set_xticks(ticks, [])
    upper.legend(frameon=False, fontsize=7.5, ncols=2)
    upper.set_ylim(4, 420)
    lower.set(xscale="log", xlabel="atoms", ylabel="two threads, times faster", ylim=(0.9, 2.3))
    lower.set_xticks(ticks, [str(n) for n in ticks])
    lower.minorticks_off()
    lower.axhline(1, color=PALE, lw=0.8)
    lower.set_xlim(upper.get_xlim())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON of tests/benchmarks/speed.py")
    parser.add_argument("--sizes", type=Path, help="JSON of a run of the part scaling alone")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("speed.png"))
    options = parser.parse_args()
    record = json.loads(options.results.read_text())
    if options.sizes is not None:
        record["scaling"] = json.loads(options.sizes.read_text())["scaling"]
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(10, 6.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[5, 4])
    beside(left.subplots(), groups(record))
    sizes(*right.subplots(2, 1, height_ratios=[3, 2]), record)
    figure.savefig(options.output, dpi=160)


if __name__ == "__main__":
    main()
