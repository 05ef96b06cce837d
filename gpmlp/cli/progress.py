"""Progress of a learning run on a terminal: a bar with temperature, error and novelty, a line for each label, a table at the end."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column, Table

from gpmlp.cli.console import TransientBar, format_noise, format_number, literal, pairs_table, standard_error
from gpmlp.core.errors import visible_text
from gpmlp.learning.loop import LoopState
from gpmlp.learning.model import OnlineModel
from gpmlp.learning.recipe import LearnRecipe
from gpmlp.learning.triggers import force_error_bound
from gpmlp.learning.walker import WalkerSnapshot
from gpmlp.report.page import RECORD

BAR, SHORT_BAR = 12, 6
WIDE = 100  # columns of a terminal on which there is room for more than numbers
QUIET_S = 30.0  # between two lines where there is no terminal for a bar
MARKS = {True: "met", False: "not met", None: "cannot be judged yet"}


class LearningBar(TransientBar):
    """Progress of a run while it goes on."""

    def __init__(self, recipe: LearnRecipe) -> None:
        self.recipe = recipe
        self.labels = self.refused = -1  # not known before the first state
        self.reason = self.where = ""
        self.printed_at = time.monotonic()
        console = standard_error()
        self.wide = console.width >= WIDE
        whole, bar = Column(no_wrap=True), BAR if self.wide else SHORT_BAR
        fields = ("step", "temperature", "force", "novelty", "labels")
        columns = [TextColumn(f"{{task.fields[{name}]}}", table_column=whole) for name in fields]
        if self.wide:
            note = Column(no_wrap=True, overflow="ellipsis", ratio=1)
            columns.append(TextColumn("{task.fields[note]}", style="dim", markup=False, table_column=note))
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=len("labelling"))),
            BarColumn(bar_width=bar, table_column=Column(no_wrap=True, min_width=bar)),
            *columns,
            console=console,
            disable=not console.is_terminal,
            transient=True,
            expand=self.wide,
        )
        total = None if recipe.lammps or recipe.target else recipe.dynamics.steps * recipe.dynamics.walkers
        blank: dict[str, Any] = dict.fromkeys(fields, "")
        self.task = self.bar.add_task("start", total=total, note="", **blank)

    def __call__(self, state: LoopState) -> None:
        """Take a state."""
        if self.labels < 0:  # of a run that is resumed they were shown before
            self.labels, self.refused = state.labels, state.refused
        if state.labels > self.labels or state.refused > self.refused:
            labelled = state.labels > self.labels
            self._line(
                f"label {state.labels}" if labelled else "set aside",
                self.where,
                self.reason if labelled else f"{self.reason} ({state.refusal})",
            )
            self.labels, self.refused = state.labels, state.refused
        elif not self.bar.console.is_terminal and time.monotonic() - self.printed_at > QUIET_S:
            self._line(state.phase, _places(state), _note(state))
        self.reason, self.where = state.reason, _asking(state)
        done = sum(walker.walker.step for walker in state.progress.walkers)
        fields: dict[str, Any] = {"labels": f"labels {state.labels}", "note": visible_text(_note(state))}
        fields |= _physics(state, " eV/A" if self.wide else "")
        self.bar.update(self.task, description=state.phase, completed=done, **fields)

    def show_report(self) -> None:
        """The page about the run is being written."""
        self.bar.update(self.task, description="report", note="")

    def _line(self, what: str, where: str, text: str) -> None:
        self.printed_at = time.monotonic()
        where = f" {where}:" if where else ""
        self.bar.console.print(f"[dim]{what}:[/]{where} {literal(text)}", soft_wrap=True)


def _worst(state: LoopState) -> WalkerSnapshot | None:
    """The last snapshot of the walker that is nearest to its limits."""
    snapshots = [s for s in state.snapshots if s is not None]
    return max(snapshots, key=lambda s: s.decision.severity) if snapshots else None


def _physics(state: LoopState, unit: str) -> dict[str, str]:
    """Step, temperature, what the largest force error may be, and novelty, of the walker nearest to its limits."""
    worst = _worst(state)
    if worst is None or state.limits is None:
        return {}
    covariance = worst.prediction.forces_covariance
    novelty = worst.prediction.novelty
    force = "?" if covariance is None else f"{force_error_bound(covariance.total, state.limits.probability):.2g}"
    limit = "" if state.limits.force is None else f"/{state.limits.force:.2g}"
    return {
        "step": f"step {worst.walker.step}",
        "temperature": f"{worst.temperature_K:.0f} K",
        "force": f"error {force}{limit}{unit}",
        "novelty": "" if novelty is None else f"novelty {float(novelty.max()):.2f}",
    }


def _places(state: LoopState) -> str:
    """Steps of all walkers."""
    walkers = state.progress.walkers
    return f"step {', '.join(str(w.walker.step) for w in walkers)}" if walkers else ""


def _asking(state: LoopState) -> str:
    """Which walker waits for the label that is being asked for, and where."""
    if state.phase == "labelling":
        for i, w in enumerate(state.progress.walkers):
            if w.pending is not None and w.reason == state.reason:
                return f"walker {i}, step {w.pending.step}"
    return ""


def _note(state: LoopState) -> str:
    if state.phase == "dynamics":
        return state.verdict.sentence if state.verdict is not None else ""
    return state.reason


def learning_table(state: LoopState, folder: Path, page: Path | None, target: bool = False) -> Table:
    """Outcome of a run.

    Args:
        page: about it, if one was written.
        target: whether a property was its target, so that there was no dynamics.
    """
    model, progress = state.model, state.progress
    steps = sum(walker.walker.step for walker in progress.walkers)
    asked = len(progress.labels) - len(progress.first)
    aside = f", {state.refused} structures set aside" if state.refused else ""
    cut = f", {state.surrogates} of surrogates cut out of larger frames" if state.surrogates else ""
    rare = f", one label in {steps / asked:.0f}" if asked else ""
    force = state.limits.force if state.limits else None
    limit = [] if target else [("force error, limit", f"{format_number(force)} eV/A" if force else "none")]
    files = ["labels", "log"] if target else ["labels", "trajectory", "log"]
    names = [f"{name}.xyz" for name in files[:-1]]
    pairs = [
        ("why it stopped", _why(state, target)),
        *((c.name, f"{MARKS[c.met]}: {c.sentence}") for c in (state.verdict.criteria if state.verdict else ())),
        ("labels", f"{state.labels}: {len(progress.first)} to begin with, {asked} asked for{cut}{aside}"),
        *([("steps", f"{steps} of {len(progress.walkers)} walkers{rare}")] if progress.walkers else []),
        *((*limit, *_model_pairs(model)) if model else ()),
        *(_foreseen_pairs(page) if page else ()),
        ("model", str(folder / "model.gpmlp")),
        (", ".join(files), f"{', '.join(names)}, run.log, log.jsonl in {folder}"),
    ]
    return pairs_table("Learning run", [*pairs, ("report", str(page))] if page is not None else pairs)


def _model_pairs(model: OnlineModel) -> tuple[tuple[str, str], ...]:
    return (
        ("noise", format_noise(model.online.noise_of_mean)),
        ("inducing variables", str(model.online.rank)),
    )


def _foreseen_pairs(page: Path) -> list[tuple[str, str]]:
    """What the page says of the errors to be expected along the trajectory."""
    record = json.loads(page.with_name(RECORD).read_text(encoding="utf-8"))
    std = (record.get("blind") or {}).get("force_std_rms_meV_per_A")
    return [("force error, foreseen", f"± {std:.3g} meV/A, of a component along the trajectory")] if std else []


def _why(state: LoopState, target: bool) -> str:
    """The reason, without what the criteria say themselves."""
    if state.verdict is None:
        return state.stopped
    if state.verdict.converged:
        return "the target is reached" if target else "converged: all criteria are met"
    if state.verdict.limit:
        return state.stopped.split(";")[0]
    return state.stopped.removesuffix(state.verdict.sentence).rstrip("; ") + "; it is not converged"
