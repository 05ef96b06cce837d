"""Draw docs/figure.png: how well a potential fitted to the shipped silicon data predicts the test set.

    python docs/make_figure.py                      fits the default recipe first (or --model silicon.gpmlp: takes this one)
    python docs/make_figure.py --train A.xyz --test B.xyz --output figure.png

Needs matplotlib (pip install '.[plot]').
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import LogNorm

import gpmlp
from gpmlp.potential.evaluation import evaluate

ROOT = Path(__file__).resolve().parents[1]
INK, PALE, ACCENT = "#22303c", "#8b98a5", "#2a6f97"


def parity(axes: plt.Axes, reference: np.ndarray, predicted: np.ndarray, mae: float, rmse: float) -> None:
    """Predicted against reference force components: a histogram, since points would hide one another."""
    reach = 1.05 * max(np.abs(reference).max(), np.abs(predicted).max())
    counts = axes.hexbin(
        reference,
        predicted,
        gridsize=70,
        extent=(-reach, reach, -reach, reach),
        norm=LogNorm(),
        cmap="mako_like",
        mincnt=1,
    )
    axes.plot([-reach, reach], [-reach, reach], color=PALE, lw=0.8, zorder=0)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axes.set_xlabel("DFT force component, eV/Å")
    axes.set_ylabel("predicted, eV/Å")
    axes.text(0.04, 0.96, f"MAE {mae:.0f} meV/Å\nRMSE {rmse:.0f} meV/Å", transform=axes.transAxes, va="top", color=INK)
    bar = axes.figure.colorbar(counts, ax=axes, shrink=0.72, pad=0.02, aspect=28)
    bar.set_label("components")
    bar.outline.set_visible(False)
    inset = axes.inset_axes([0.64, 0.09, 0.32, 0.26])
    errors = 1e3 * (predicted - reference)
    width = 4 * rmse
    inset.hist(errors, bins=np.linspace(-width, width, 61), color=ACCENT)
    inset.set_yticks([])
    inset.set_xlim(-width, width)
    inset.tick_params(labelsize=7, length=2)
    inset.set_xlabel("error, meV/Å", fontsize=7, labelpad=1)
    inset.spines[["left", "right", "top"]].set_visible(False)
    inset.patch.set_alpha(0)


def by_config_type(axes: plt.Axes, tables: dict) -> None:
    """Force errors of each kind of configuration as bars, with energy and stress errors in columns beside them."""
    order = sorted(tables, key=lambda name: -_or_zero(tables[name].force_mae_meV_per_A))
    forces = [_or_zero(tables[name].force_mae_meV_per_A) for name in order]
    rows = np.arange(len(order))
    axes.barh(rows, forces, height=0.62, color=ACCENT)
    axes.set_yticks(rows, [f"{name.replace('_', ' ')} ({tables[name].n_structures})" for name in order])
    axes.set_xlabel("force MAE, meV/Å")
    reach = max([*forces, 1e-9])
    axes.set_xlim(0, 1.16 * reach)
    columns = (("energy\nmeV/atom", "energy_mae_meV_per_atom", 1.12, 1), ("stress\nGPa", "stress_mae_GPa", 1.3, 2))
    for k, name in enumerate(order):
        axes.text(forces[k] + 0.015 * reach, k, f"{forces[k]:.0f}", va="center", fontsize=8, color=INK)
        for _, key, place, digits in columns:
            value = getattr(tables[name], key)
            text = "–" if np.isnan(value) else f"{value:.{digits}f}"
            axes.text(place, k, text, va="center", ha="right", transform=axes.get_yaxis_transform(), color=INK)
    for heading, _, place, _ in columns:
        axes.text(
            place, len(order) - 0.25, heading, ha="right", va="bottom", transform=axes.get_yaxis_transform(), color=PALE
        )
    axes.spines[["right", "top", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.6, len(order) - 0.4)


def _or_zero(value: float) -> float:
    return 0.0 if np.isnan(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, default=ROOT / "data/silicon/train.xyz")
    parser.add_argument("--test", type=Path, default=ROOT / "data/silicon/test.xyz")
    parser.add_argument("--model", type=Path, help="a fitted model; --train is not read then")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/figure.png")
    options = parser.parse_args()
    potential = gpmlp.load(options.model) if options.model else gpmlp.fit(*gpmlp.read(options.train))[0]
    structures, targets = gpmlp.read(options.test)
    result = evaluate(potential, structures, targets)
    known = ~targets.forces.isnan()

    plt.rcParams.update(
        {
            "font.family": "DejaVu Sans",
            "font.size": 9,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": PALE,
        }
        | {"xtick.color": INK, "ytick.color": INK, "axes.linewidth": 0.8}
    )
    colours = matplotlib.colors.LinearSegmentedColormap.from_list("mako_like", ["#cfe3ee", ACCENT, "#0b1f33"])
    matplotlib.colormaps.register(colours, force=True)
    tables = result.by_config_type or {"all": result.overall}
    figure, (left, right) = plt.subplots(
        1,
        2,
        figsize=(11, max(4.6, 0.9 + 0.24 * len(tables))),
        width_ratios=(1.15, 1),
        layout="constrained",
        facecolor="white",
    )
    overall = result.overall
    parity(
        left,
        targets.forces[known].numpy(),
        result.prediction.forces[known].numpy(),
        overall.force_mae_meV_per_A,
        overall.force_rmse_meV_per_A,
    )
    left.set_title(
        f"Silicon, {overall.n_structures} test structures: energy MAE {overall.energy_mae_meV_per_atom:.1f} meV/atom, "
        f"stress {overall.stress_mae_GPa:.2f} GPa",
        fontsize=9,
        loc="left",
    )
    by_config_type(right, tables)
    figure.savefig(options.output, dpi=160)


if __name__ == "__main__":
    main()
