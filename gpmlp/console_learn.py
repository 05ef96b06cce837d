"""What a learning run looks like on a terminal: a bar with the physics in it, a line for each label, a table at the end."""

from __future__ import annotations

import time
from pathlib import Path

from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column, Table

from gpmlp.active.loop import State
from gpmlp.active.recipe import LearnRecipe
from gpmlp.console import errors_to, number, pairs_table

BAR = 12
QUIET_S = 30.0  # between two lines where there is no terminal for a bar


class Learning:
    """Shows a run while it goes on."""

    def __init__(self, recipe: LearnRecipe) -> None:
        self.recipe, self.labels, self.refused, self.reason = recipe, 0, 0, ""
        self.told = time.monotonic()
        console = errors_to()
        fields = ("step", "temperature", "force", "novelty", "labels")
        columns = [TextColumn(f"{{task.fields[{name}]}}", table_column=Column(no_wrap=True)) for name in fields]
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=BAR, table_column=Column(no_wrap=True, min_width=BAR)),
            *columns,
            TextColumn("[dim]{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            expand=True,
        )
        total = recipe.dynamics.steps * recipe.dynamics.walkers
        self.task = self.bar.add_task("first labels", total=total, note="", **dict.fromkeys(fields, ""))

    def __enter__(self) -> Learning:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, state: State) -> None:
        """Take a state."""
        if state.labels > self.labels or state.refused > self.refused:
            self._line(state, f"label {state.labels}" if state.labels > self.labels else "set aside")
            self.labels, self.refused = state.labels, state.refused
        elif not self.bar.console.is_terminal and time.monotonic() - self.told > QUIET_S:
            self._line(state, state.phase)
        if state.phase == "labelling":
            self.reason = state.reason
        seen = [look for look in state.looks if look is not None]
        fields = {"labels": f"labels {state.labels}", "note": escape(_note(state))}
        if seen and state.limits is not None:
            worst = max(seen, key=lambda look: look.decision.severity)
            fields |= {
                "step": f"step {worst.walker.step}",
                "temperature": f"{worst.temperature_K:.0f} K",
                "force": f"error {_largest(worst)}/{state.limits.force or 0:.2g} eV/A",
                "novelty": f"novelty {float(worst.prediction.novelty.max()):.1f}",
            }
        done = sum(mind.walker.step for mind in state.progress.minds)
        self.bar.update(self.task, description=state.phase, completed=done, **fields)

    def _line(self, state: State, what: str) -> None:
        self.told = time.monotonic()
        seen = [look for look in state.looks if look is not None]
        where = ""
        if seen:
            worst = max(seen, key=lambda look: look.decision.severity)
            where = f" step {worst.walker.step}, {worst.temperature_K:.0f} K:"
        self.bar.console.print(f"[dim]{what}:[/]{where} {escape(state.reason or state.phase)}", soft_wrap=True)


def _largest(look) -> str:
    """What the largest force error may be, eV/A: severity is in units of the limit, the decision has what was looked at last."""
    variance = look.prediction.forces_covariance
    if variance is None:
        return "?"
    return f"{float(variance.total.diagonal(dim1=1, dim2=2).sum(1).max().sqrt()):.2g}"


def _note(state: State) -> str:
    if state.phase == "dynamics" and state.verdict is not None:
        return state.verdict.sentence
    return state.reason


def learning_table(state: State, folder: Path) -> Table:
    """What came of a run."""
    online = state.student.online
    history = state.progress.history
    pairs = [
        ("why it stopped", state.stopped),
        ("labels", f"{state.labels} ({state.calls} asked of the oracle in this run), {state.refused} set aside"),
        ("steps", f"{sum(m.walker.step for m in state.progress.minds)} made"),
        ("frames looked at", str(len(history))),
        ("inducing variables", str(online.factor.columns)),
        ("noise", ", ".join(f"{kind} {number(value)}" for kind, value in online.noise.items())),
        ("limit of the force error", f"{number(state.limits.force)} eV/A"),
        ("written", f"{folder / 'model.gpmlp'}, labels.xyz, trajectory.xyz, log.jsonl, report/ beside it"),
    ]
    if state.verdict is not None:
        marks = {True: "met", False: "not met", None: "cannot be judged yet"}
        pairs += [(c.name, f"{marks[c.met]}: {c.sentence}") for c in state.verdict.criteria]
    return pairs_table("Learning run", pairs)
