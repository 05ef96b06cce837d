"""Console is what the command line shows: progress, tables and one-line messages; the only place that prints."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from gpmlp.evaluation import Evaluation
from gpmlp.quantities import ErrorTable
from gpmlp.units import GPA

PLAIN_WIDTH = 110  # of tables that go to a file or a pipe


def output() -> Console:
    """Standard output, made when asked for: tests and notebooks replace it."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def errors_to() -> Console:
    """Standard error."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def message(kind: str, text: str) -> None:
    """Print one message to standard error."""
    colour = {"error": "red", "warning": "yellow"}.get(kind, "dim")
    errors_to().print(f"[{colour}]{kind}:[/] {escape(' '.join(str(text).split()))}", soft_wrap=True)


class Stages:
    """Shows progress(stage, done, total, note) as bars on a terminal, elsewhere as one line for each stage."""

    def __init__(self) -> None:
        self.console = errors_to()
        self.live = self.console.is_terminal
        self.bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self.console,
            disable=not self.live,
        )
        self.tasks: dict[str, TaskID] = {}
        self.started: dict[str, float] = {}
        self.notes: dict[str, str] = {}
        self.finished: set[str] = set()

    def __enter__(self) -> Stages:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def __call__(self, stage: str, done: float, total: float, note: str = "") -> None:
        """Take one report of progress."""
        self.notes[stage] = note or self.notes.get(stage, "")
        if self.live:
            if stage not in self.tasks:
                self.tasks[stage] = self.bars.add_task(escape(stage), total=total, note="")
            self.bars.update(self.tasks[stage], completed=done, total=total, note=escape(self.notes[stage]))
            return
        self.started.setdefault(stage, time.perf_counter())
        if done >= total and stage not in self.finished:
            self.finished.add(stage)
            seconds = time.perf_counter() - self.started[stage]
            self.console.print(escape(f"{stage}: {seconds:.1f} s {self.notes[stage]}".rstrip()))


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table; '-' where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}g}"


def error_table(title: str, rows: Mapping[str, ErrorTable]) -> Table:
    """Errors, one row for each name."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for heading in ("structures", "atoms", "energy\nmeV/atom", "force\nmeV/A", "stress\nGPa"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        cells = [
            f"{number(getattr(row, f'{kind}_mae_{unit}'))} / {number(getattr(row, f'{kind}_rmse_{unit}'))}"
            for kind, unit in (("energy", "meV_per_atom"), ("force", "meV_per_A"), ("stress", "GPa"))
        ]
        table.add_row(escape(name), str(row.n_structures), str(row.n_atoms), *cells)
    return table


def evaluation_table(evaluation: Evaluation) -> Table:
    """MAE / RMSE in all and by config_type."""
    return error_table("Errors (MAE / RMSE)", {"all": evaluation.overall, **evaluation.by_config_type})


def scores_table(evaluation: Evaluation) -> Table:
    """How well predicted standard deviations match errors: coverage of intervals, scores, rank correlation."""
    table = Table(title="Predicted uncertainty (calibrated)", title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("coverage 50 / 68 / 90 / 95 %", "rms std", "NLL", "ENCE", "Spearman"):
        table.add_column(name, justify="right")
    shown = {"energies": (1e3, "meV/atom"), "forces": (1e3, "meV/A"), "stresses": (1 / GPA, "GPa")}
    for kind, entry in evaluation.scores.items():
        if not entry.n:
            continue
        factor, unit = shown[kind]
        covered = (entry.coverage_50, entry.coverage_68, entry.coverage_90, entry.coverage_95)
        table.add_row(
            kind,
            " / ".join(f"{100 * c:.0f}" for c in covered),
            f"{factor * entry.sharpness:.3g} {unit}",
            f"{entry.nll:.2f}",
            f"{entry.ence:.2f}",
            f"{entry.spearman:.2f}",
        )
    return table


def pairs_table(title: str, pairs: Sequence[tuple[str, str]]) -> Table:
    """Two columns without rules: what, and its value."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(escape(name), escape(value))
    return table


def noises(noise: Mapping[str, float]) -> str:
    """Standard deviations with their units."""
    units = {
        "energies": ("energy", 1e3, "meV/atom"),
        "forces": ("force", 1e3, "meV/A"),
        "stresses": ("stress", 1 / GPA, "GPa"),
    }
    return ", ".join(f"{units[k][0]} {v * units[k][1]:.3g} {units[k][2]}" for k, v in noise.items() if k in units)


def fit_summary(report: Mapping[str, Any]) -> Table:
    """What a FitReport (as a dictionary) says, in a few lines."""
    rms = report["train_rmse"]
    validation = report.get("validation_errors")
    pairs = [
        ("observations", ", ".join(f"{n} {kind}" for kind, n in report["rows"].items())),
        ("environments", ", ".join(f"{n} {z}" for z, n in report["environments"].items())),
        ("inducing", ", ".join(f"{n} {label}" for label, n in report["centres"].items())),
        (
            "columns",
            f"{report['columns']}, rank {report['rank']}, condition {report['condition']:.1e}, jitter {report['jitter']:.0e}",
        ),
        ("noise", noises(report["noise"])),
        ("train RMSE", noises(rms)),
    ]
    if validation:
        table = ErrorTable(**{key: float("nan") if value is None else value for key, value in validation.items()})
        pairs.append(
            (
                "validation MAE",
                f"energy {number(table.energy_mae_meV_per_atom)} meV/atom, force {number(table.force_mae_meV_per_A)} meV/A, "
                f"stress {number(table.stress_mae_GPa)} GPa",
            )
        )
    pairs += [("time", ", ".join(f"{name} {seconds:.1f} s" for name, seconds, _ in report["stages"]))]
    if report["stages"]:
        pairs += [("peak memory", f"{max(memory for *_, memory in report['stages']):.0f} MB")]
    return pairs_table("Fit", pairs)


def model_summary(content: Mapping[str, Any], symbols: Sequence[str]) -> Table:
    """What a model file says of itself."""
    header = content["header"]
    provenance = header.get("provenance", {})
    files = [
        f"{role} {entry['name']} (sha256 {entry['sha256'][:12]})" for role, entry in provenance.get("files", {}).items()
    ]
    pairs = [
        ("species", ", ".join(symbols)),
        ("noise", noises(header["noise"])),
        ("data", ", ".join(files) or "not recorded"),
        (
            "made",
            f"{provenance.get('created', 'at an unknown time')} by gpmlp {content['version']}, format {content['format']}",
        ),
        ("units", content["units"]),
        ("recipe", yaml.safe_dump(plain(header["recipe"]), sort_keys=False).rstrip()),
    ]
    return pairs_table("Model", pairs)


def plain(value: Any) -> Any:
    """The same value with None for NaN and infinity, lists for tuples: strict JSON and YAML."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
