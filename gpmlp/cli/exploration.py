"""Progress of an exploration of reactions on a terminal, and its tables: a bar with the search under way, a line for each that is over."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column, Table

from gpmlp.cli.console import TransientBar, literal, pairs_table, standard_error
from gpmlp.learning.paths.network import NetworkLabel, Search

BAR = 12
FIELDS = ("way", "energy", "curvature", "force", "labels")


class ExplorationBar(TransientBar):
    """Where the search under way is, and how many oracle calls were spent."""

    def __init__(self, labels_at_most: int) -> None:
        whole = Column(no_wrap=True)
        way = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        columns = [
            TextColumn(f"{{task.fields[{name}]}}", markup=False, table_column=way if name == "way" else whole)
            for name in FIELDS
        ]
        console = standard_error()
        self.most = labels_at_most
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=BAR, table_column=Column(no_wrap=True, min_width=BAR)),
            *columns,
            console=console,
            disable=not console.is_terminal,
            transient=True,
            expand=True,
        )
        blank: dict[str, Any] = dict.fromkeys(FIELDS, "")
        self.task = self.bar.add_task("relaxing the start", total=labels_at_most, **blank)

    def __call__(self, event: NetworkLabel | Search) -> str | None:
        """Take an event; the line that is to be said of it."""
        if isinstance(event, Search):
            return f"search {event.number}: from minimum {event.minimum}, {event.way}: {event.outcome} ({event.calls} oracle calls)"
        label = event.label
        self.bar.update(
            self.task,
            description=f"search {event.search} from {event.minimum}",
            completed=event.calls,
            way=event.way,
            energy=f"{label.barrier - label.error:.3f} eV (± {label.sigma:.2g} foreseen)",
            curvature=f"{label.curvature:.1f} eV/A^2",
            force=f"{label.force:.2f} eV/A",
            labels=f"labels {event.calls}/{self.most}",
        )
        return None


def network_tables(numbers: Mapping[str, Any], folder: Path, page: Path | None) -> list[Table]:
    """Minima, reactions, and where all is."""
    minima = Table("minimum", "energy / eV", "± σ", "bonded together", "ways left", title="Minima")
    for m in numbers["minima"]:
        minima.add_row(
            str(m["number"]),
            f"{m['energy_eV']:.3f}",
            f"{m['sigma_eV']:.2g}",
            _with_doubt(literal(m["fragments"]), m["doubt"]),
            str(m["ways_left"]),
        )
    reactions = Table("reaction", "barrier / eV", "90 % interval", "back / eV", "i / cm^-1", "bonds", title="Reactions")
    for r in numbers["reactions"]:
        low, high = r["barrier_90_eV"]
        imaginary = ", ".join(f"{f:.0f}" for f in r["imaginary_frequencies_per_cm"])
        step = f"{r['number']}: {r['from']} → {r['to']}"
        barriers = f"{r['barrier_eV']:.3f}", f"{low:.3f} to {high:.3f}", f"{r['reverse_barrier_eV']:.3f}"
        reactions.add_row(step, *barriers, imaginary, _with_doubt(literal(r["bonds"]), r["doubt"]))
    pairs = [
        ("why it ended", numbers["ended"]),
        ("oracle calls", f"{numbers['oracle_calls']}, in {len(numbers['searches'])} searches"),
        ("structures", f"minima.xyz, saddles.xyz in {folder}"),
        *([("page", str(page))] if page else []),
        ("numbers, labels", f"network.json, labels.xyz in {folder}"),
    ]
    return [minima, reactions, pairs_table("Exploration", pairs)]


def _with_doubt(text: str, doubt: str) -> str:
    return f"{text} [yellow]{literal(doubt)}[/]".strip() if doubt else text
