"""Output of the command line: progress bars, tables and one-line messages; nothing else prints."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from gpmlp.core.errors import chemical_symbol, visible_text
from gpmlp.core.findings import Finding
from gpmlp.core.units import GPA

if TYPE_CHECKING:
    from gpmlp.fitting.tune import TuningTrial
    from gpmlp.learning.locality import Locality
    from gpmlp.potential.evaluation import ErrorTable, Evaluation

PLAIN_WIDTH = 110  # of tables that go to a file or a pipe
LONG = 1e6  # numbers from here on are written as powers of ten
BAR_WIDTH = 24
QUIET_S = 30.0  # for which nothing need be said where there are no bars
COLOURS = {"error": "red", "warning": "yellow", "note": "dim"}
LONGEST_STAGE = len("inducing points")


def standard_output() -> Console:
    """Standard output as it is now: tests and notebooks replace it."""
    console = Console(highlight=False, emoji=False)
    return console if console.is_terminal else Console(highlight=False, emoji=False, width=PLAIN_WIDTH)


def literal(text: str) -> str:
    """Markup that shows a text as it is: brackets, and control characters by their codes."""
    return escape(visible_text(text))


def standard_error() -> Console:
    """Standard error as it is now."""
    return Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def print_line(text: str) -> None:
    """Print one line, however long, to standard output."""
    standard_output().print(visible_text(text), soft_wrap=True, markup=False)


def print_message(kind: str, text: str) -> None:
    """Print one message to standard error."""
    colour = COLOURS.get(kind.split()[-1], "dim")
    standard_error().print(f"[{colour}]{kind}:[/] {literal(' '.join(str(text).split()))}", soft_wrap=True)


def print_findings(findings: Sequence[Finding]) -> None:
    """Print findings to standard error, each as one message; notes are kept for `gpmlp check` and `gpmlp info`."""
    for finding in findings:
        if finding.severity != "note":
            print_message("label error" if finding.severity == "error" else "warning", str(finding))


def findings_table(findings: Sequence[Finding]) -> Table:
    """Findings, one row each: how grave, what kind, and all that there is to say."""
    table = Table(title="Labels", title_justify="left", title_style="bold", show_lines=True)
    table.add_column("", no_wrap=True)
    table.add_column("kind", max_width=24, overflow="fold")
    table.add_column("finding", overflow="fold")
    for finding in findings:
        colour = COLOURS[finding.severity]
        table.add_row(f"[{colour}]{finding.severity}[/]", literal(finding.kind), literal(str(finding)))
    return table


class StageBars:
    """Progress (stage, done, total, note) as bars on a terminal, elsewhere as a line for each stage when it is over, and every QUIET_S.

    A stage lasts from the end of the one before it (or from __enter__) to its own last report.
    """

    def __init__(self) -> None:
        self.console = standard_error()
        self.live = self.console.is_terminal
        whole = Column(no_wrap=True)
        # where the line is too short only the note gives way
        note = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        self.bars = Progress(
            SpinnerColumn(table_column=whole),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, min_width=LONGEST_STAGE)),
            BarColumn(bar_width=BAR_WIDTH, table_column=Column(no_wrap=True, min_width=BAR_WIDTH)),
            TaskProgressColumn(table_column=Column(no_wrap=True, min_width=len("100%"))),
            TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=len("0:00:00"))),
            TextColumn("{task.fields[note]}", style="dim", markup=False, table_column=note),
            console=self.console,
            disable=not self.live,
            expand=True,
        )
        self.tasks: dict[str, TaskID] = {}
        self.stage, self.note, self.complete = "", "", False
        self.begun = self.last = self.spoke = time.monotonic()

    def __enter__(self) -> StageBars:
        self.bars.start()
        self.begun = self.last = self.spoke = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._over()
        self.bars.stop()

    def __call__(self, stage: str, done: float, total: float, note: str = "") -> None:
        """Take one report of progress."""
        if stage != self.stage:
            self._over()
            self.stage, self.note, self.begun = stage, "", self.last
        self.note = note or self.note
        self.complete, self.last = done >= total, time.monotonic()
        if not self.live and not self.complete and self.last - self.spoke > QUIET_S:
            self.spoke = self.last
            share = f"{100 * done / total:.0f} % after {self.last - self.begun:.0f} s"
            self.console.print(literal(f"{stage}: {share} {self.note}".rstrip()))
        if self.live:
            if stage not in self.tasks:
                self.tasks[stage] = self.bars.add_task(visible_text(stage), total=total, note="")
                self.bars.tasks[-1].start_time = self.begun
            # rich stops the clock of a bar that is full, but a stage may go on after its last report of work done
            almost = min(done, (1 - 1e-6) * total)
            self.bars.update(self.tasks[stage], completed=almost, total=total, note=visible_text(self.note))

    def _over(self) -> None:
        if self.complete and self.live:
            task = self.tasks[self.stage]
            self.bars.update(task, completed=self.bars.tasks[task].total)
        elif self.complete:
            self.spoke = time.monotonic()
            self.console.print(literal(f"{self.stage}: {self.last - self.begun:.1f} s {self.note}".rstrip()))
        self.complete = False


def format_number(value: float | None, digits: int = 3) -> str:
    """A number for a table, with all digits before the point if these are few; '-' where there is none."""
    if value is None or math.isnan(value):
        return "-"
    short = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in short and abs(value) < LONG else short


def error_table(title: str, rows: Mapping[str, ErrorTable]) -> Table:
    """Errors, one row for each name."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for heading in ("structures", "atoms", "energy\nmeV/atom", "force\nmeV/A", "stress\nGPa"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        cells = [
            f"{format_number(getattr(row, f'{kind}_mae_{unit}'))} / {format_number(getattr(row, f'{kind}_rmse_{unit}'))}"
            for kind, unit in (("energy", "meV_per_atom"), ("force", "meV_per_A"), ("stress", "GPa"))
        ]
        table.add_row(literal(name), str(row.n_structures), str(row.n_atoms), *cells)
    return table


def evaluation_table(evaluation: Evaluation) -> Table:
    """MAE / RMSE in all and by config_type."""
    return error_table("Errors (MAE / RMSE)", {"all": evaluation.overall, **evaluation.by_config_type})


def scores_table(evaluation: Evaluation) -> Table:
    """How well predicted standard deviations match errors: coverage of conformal intervals, scores, rank correlation."""
    title = "Predicted uncertainty (calibrated); share of errors inside conformal intervals of 50 / 68 / 90 / 95 %"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("inside 50 / 68 / 90 / 95 %", "rms std", "NLL", "ENCE", "Spearman", "within frames"):
        table.add_column(name, justify="right")
    shown = {"energies": (1e3, "meV/atom"), "forces": (1e3, "meV/A"), "stresses": (1 / GPA, "GPa")}
    groups = {name: of["forces"] for name, of in evaluation.scores_by_config_type.items() if "forces" in of}
    rows = [(kind, kind, entry) for kind, entry in evaluation.scores.items()]
    rows += [(f"forces, {name}", "forces", entry) for name, entry in groups.items() if len(groups) > 1]
    for name, kind, entry in rows:
        if not entry.n:
            continue
        factor, unit = shown[kind]
        covered = (entry.coverage_50, entry.coverage_68, entry.coverage_90, entry.coverage_95)
        numbers = (entry.nll, entry.ence, entry.spearman, entry.spearman_within_frame)
        table.add_row(
            literal(name),
            " / ".join(f"{100 * c:.0f}" for c in covered),
            f"{format_number(factor * entry.sharpness)} {unit}",
            *("-" if value != value else f"{value:.2f}" for value in numbers),
        )
    return table


def pairs_table(title: str, pairs: Sequence[tuple[str, str]]) -> Table:
    """Two columns without rules: what, and its value."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(literal(name), literal(value))
    return table


def format_noise(noise: Mapping[str, float]) -> str:
    """Standard deviations with their units."""
    units = {
        "energies": ("energy", 1e3, "meV/atom"),
        "forces": ("force", 1e3, "meV/A"),
        "stresses": ("stress", 1 / GPA, "GPa"),
    }
    return ", ".join(
        f"{units[k][0]} {format_number(v * units[k][1])} {units[k][2]}" for k, v in noise.items() if k in units
    )


def format_rows(rows: Mapping[str, int]) -> str:
    """Numbers of observations by kind; those whose noise the data or the fit gave are a kind of their own."""
    return ", ".join(f"{n} {'with a noise of their own' if kind == 'given' else kind}" for kind, n in rows.items())


def chosen_baselines(baselines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The terms that are not learned: isolated atoms, between which distances ZBL fades out, networks, calculators, dispersion."""
    pairs = []
    for term in baselines:
        if term["name"] == "isolated_atoms":
            energies = {chemical_symbol(int(z)): energy for z, energy in term["energies"].items()}
            text = ", ".join(f"{symbol} {energy:.6g} eV" for symbol, energy in energies.items())
            if term.get("open_directions"):
                text += "; the data do not determine all of them"
            pairs.append(("isolated atoms", text))
        elif term["name"] == "network":
            checkpoint = repr(term["checkpoint"]) if term["network"] == "network" else term["checkpoint"]
            pairs.append(
                ("baseline", f"energies of the network {checkpoint}, weights with the SHA-256 {term['sha256']}")
            )
        elif term["name"] == "r6":
            c6 = ", ".join(f"{chemical_symbol(a)}-{chemical_symbol(b)} {value:.4g}" for a, b, value in term["pairs"])
            text = f"tail -C6/r^6 with C6 {c6} eV A^6, whole from {term['full']:.3g} A, to {term['outer']:.3g} A"
            pairs.append(("dispersion", text))
        elif term["name"] == "d3":
            text = f"D3 of {term['functional']}, damping {term['damping']}{', three-body term' * term['atm']}"
            pairs.append(("dispersion", f"{text} (dftd3 {term['versions'].get('dftd3', '-')})"))
        elif term["name"] == "calculator":
            versions = ", ".join(f"{package} {version}" for package, version in term["versions"].items())
            kwargs = ", ".join(f"{key} = {value}" for key, value in term["kwargs"].items())
            text = f"the calculator {term['calculator']}{f' ({versions})' if versions else ''}"
            pairs.append(("baseline", f"{text}{f' with {kwargs}' if kwargs else ''}"))
        else:
            ranges = [
                f"{chemical_symbol(a)}-{chemical_symbol(b)} {low:.2f} to {high:.2f} A"
                for a, b, low, high in term["pairs"]
            ]
            pairs.append(("ZBL", f"fades out {', '.join(ranges)}"))
    return pairs


def fit_summary(report: Mapping[str, Any]) -> Table:
    """A FitReport (as a dictionary) in a few lines."""
    rms = report["train_rmse"]
    validation = report.get("validation_errors")
    pairs = [
        ("observations", format_rows(report["rows"])),
        ("environments", ", ".join(f"{n} {z}" for z, n in report["environments"].items())),
        ("inducing", ", ".join(f"{n} {label}" for label, n in report["centres"].items())),
        *(("chosen", said) for said in report.get("choices", ())),
        (
            "columns",
            f"{report['columns']}, rank {report['rank']}, condition {report['condition']:.1e}, jitter {report['jitter']:.0e}",
        ),
        ("noise", f"{format_noise(report['noise'])} (of the labels, and what the model misses)"),
        *([("label noise", f"{format_noise(scatter)} (net forces)")] if (scatter := report.get("label_noise")) else []),
        ("train RMSE", format_noise(rms)),
    ]
    pairs += [*mean_ranks(report), *variance_columns(report), *local_variances(report), *told_of_charges(report)]
    if validation:
        from gpmlp.potential.evaluation import ErrorTable

        values: dict[str, Any] = {key: float("nan") if v is None else v for key, v in validation.items()}
        table = ErrorTable(**values)
        pairs.append(
            (
                "validation MAE",
                f"energy {format_number(table.energy_mae_meV_per_atom)} meV/atom, force {format_number(table.force_mae_meV_per_A)} meV/A, "
                f"stress {format_number(table.stress_mae_GPa)} GPa",
            )
        )
    pairs += [("time", ", ".join(f"{name} {seconds:.1f} s" for name, seconds, _ in report["stages"]))]
    if report["stages"]:
        pairs += [("peak memory", f"{max(memory for *_, memory in report['stages']):.0f} MB")]
    return pairs_table("Fit", pairs)


def mean_ranks(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rank of each mean of low rank, and by how much that changes forces."""
    told = report.get("low_rank")
    if not told:
        return []
    ranks = ", ".join(f"{rank} of {told['features'][label]} {label}" for label, rank in told["rank"].items())
    change, noise = told["change_of_forces_eV_per_A"], told["noise_of_forces_eV_per_A"]
    text = (
        f"{ranks}; on {told['structures']} structures forces change by {format_number(1e3 * change)} meV/A (rms), "
        f"{format_number(100 * change / noise)} % of their noise, {format_number(1e3 * told['largest_change_of_forces_eV_per_A'])} at most"
    )
    return [("low rank", text)]


def told_of_charges(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Whether charges were tried, and what the evidence says of them."""
    told = report.get("charges")
    return [("long range", told["sentence"])] if told else []


def local_variances(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """From how many columns standard deviations of local energies are, and how they compare with those of all."""
    lines = []
    for symbol, told in (report.get("local_variance") or {}).items():
        near, far = (
            ", ".join(f"{100 * told[f'std_ratio_{q}{of}'] - 100:+.1f}" for q in ("low", "median", "high"))
            for of in ("", "_moved")
        )
        text = f"{told['columns']} of {told['columns_of_all']} columns; standard deviations differ by {near} % (5, 50, 95 %), "
        text += f"far from the data by {far} %"
        lines.append((f"local energies of {symbol}", text))
    return lines


def variance_columns(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How many of the columns variances are computed from, and what that does to standard deviations of forces."""
    subset = report.get("variance_subset") or {}
    if "columns" not in subset:
        return []
    text = f"{subset['columns']} of {subset['columns_of_fit']} columns"
    if "covariance_error" in subset:
        text += (
            f"; std of forces {subset['std_ratio_median']:.2f} ({subset['std_ratio_low']:.2f} to {subset['std_ratio_high']:.2f}) of all "
            f"columns', covariance off by {100 * subset['covariance_error_scaled']:.0f} % once scaled"
        )
        text += f", rank correlation {subset['std_spearman']:.2f}" if "std_spearman" in subset else ""
    if "held_out" in report:
        text += f"; calibrated on {report['held_out']} structures"
    if "independent_groups" in report:
        text += f" ({report['independent_groups']} independent groups in all)"
    return [("variances", text)]


def report_summary(report: Mapping[str, Any]) -> Table:
    """The report in a model file: of a fit, or of a model that learned label by label."""
    return fit_summary(report) if "train_rmse" in report else learning_summary(report)


def learning_summary(report: Mapping[str, Any]) -> Table:
    """The report of a model that learned label by label, in a few lines."""
    pairs = [
        ("observations", format_rows(report["rows"])),
        ("inducing", ", ".join(f"{n} {label}" for label, n in report["centres"].items())),
        ("columns", f"{report['columns']}, rank {report['rank']}, condition {report['condition']:.1e}"),
        ("noise", format_noise(report["noise"])),
        *variance_columns(report),
        *local_variances(report),
        (
            "updates",
            f"{report['updates']} of the factor since it was computed from all rows; its error {report['drift']:.0e}",
        ),
    ]
    pairs += [("last", report["events"][-1])] if report["events"] else []
    return pairs_table("Learned", pairs)


def model_summary(content: Mapping[str, Any], symbols: Sequence[str]) -> Table:
    """Content of a model file: species, noise, data, recipe."""
    header = content["header"]
    provenance = header.get("provenance", {})
    files = [
        f"{role} {entry['name']} (sha256 {entry['sha256'][:12]})" for role, entry in provenance.get("files", {}).items()
    ]
    if learned := provenance.get("learned"):  # such files hold no time, so that runs repeat to the last bit
        files = [f"{learned['labels']} labels of {learned['oracle']}, learned on the fly"]
    from gpmlp.core.quantities import json_value

    aside = (header.get("calibration") or {}).get("source", {})
    created = f"{provenance['created']} " if "created" in provenance else ""
    sample = provenance.get("sample")
    pairs = [
        ("species", ", ".join(symbols)),
        *([("sample", sample_origin(sample))] if sample else []),
        ("noise", format_noise(header["noise"])),
        *chosen_baselines(header["baselines"]),
        ("data", ", ".join(files) or "not recorded"),
        *([("calibrated on", calibration_source(aside))] if aside else []),
        ("mean", means_of(header)),
        *told_of_charges(header.get("report") or {}),
        *(("chosen", said) for said in (header.get("report") or {}).get("choices", ())),
        ("made", f"{created}by gpmlp {content['version']}, format {content['format']}"),
        ("units", content["units"]),
        *said_of_fit(header.get("report", {})),
        ("recipe", yaml.safe_dump(json_value(header["recipe"]), sort_keys=False).rstrip()),
    ]
    return pairs_table("Model", pairs)


def means_of(header: Mapping[str, Any]) -> str:
    """How the mean is evaluated, and why so where a low rank is not possible."""
    if (header.get("report") or {}).get("low_rank"):
        return "low rank"
    return "exact"


def said_of_fit(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(severity, sentence) of the findings about the labels of a fit, then of its other warnings."""
    findings = [Finding.from_dict(values) for values in report.get("findings", ())]
    texts = {str(finding) for finding in findings}
    rows = [(finding.severity, str(finding)) for finding in findings]
    return rows + [("warning", text) for text in report.get("warnings", ()) if text not in texts]


def calibration_source(source: Mapping[str, Any], shown: int = 3) -> str:
    """From which structures a calibration was learned (Calibration.source): how many, how chosen, the first names, a hash of all."""
    count, names, hashes = source["held_out_structures"], source["names"][:shown], source.get("fingerprints")
    text = f"{count} structures, {source['held_out_atoms']} atoms, {source['how']}: {', '.join(names)}"
    text += f" and {count - len(names)} more" if count > len(names) else ""
    return text + (f" (sha256 of all {hashlib.sha256(''.join(hashes).encode()).hexdigest()[:12]})" if hashes else "")


def sample_origin(origin: Mapping[str, Any]) -> str:
    """Which sample of which draw a model is; its mean is not the best prediction."""
    scale = "calibrated" if origin["calibrated"] else "not calibrated"
    kind = {"posterior": "the posterior", "label_noise": "a committee by label noise"}[origin["how"]]
    return f"index {origin['index']} of {origin['of']} drawn from {kind}, seed {origin['seed']}, {scale}; not the mean"


class TransientBar:
    """A bar that is on the terminal while the context lasts."""

    bar: Progress

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


class TrialBars(TransientBar):
    """Trials of a search: one line for each that is over, and on a terminal a bar for the one that runs."""

    def __init__(self, budget_s: float, most: int | None, done: Sequence[TuningTrial]) -> None:
        self.budget_s, self.most, self.done = budget_s, most, list(done)
        console = standard_error()
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=BAR_WIDTH // 2, table_column=Column(no_wrap=True, min_width=BAR_WIDTH // 2)),
            TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
            TextColumn(
                "{task.fields[note]}",
                style="dim",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            expand=True,
        )
        self.task = self.bar.add_task("trial 0", total=1.0, left="", note="")

    def __call__(self, trial: TuningTrial) -> None:
        """Take a trial that is over."""
        self.done.append(trial)
        text = f"{_result(trial)}, {trial.seconds:.1f} s; {_settings(trial)}"
        self.bar.console.print(f"[dim]trial {trial.number}:[/] {literal(text)}", soft_wrap=True)

    def show_running(self, number: int, used_s: float) -> None:
        """Take the number of the running trial and the time used so far."""
        share, left_s = used_s / self.budget_s, max(0.0, self.budget_s - used_s)
        if self.most:
            share = max(share, number / self.most)
            left_s = min(left_s, (self.most - number) * used_s / number) if number else left_s
        from gpmlp.fitting.tune import best_trial

        top = best_trial(self.done)
        parts = [f"best {_result(t)}" for t in (top,) if t] + [f"last {_settings(t)}" for t in self.done[-1:]]
        left = f"{math.ceil(left_s / 60)} min left"
        note = visible_text("; ".join(parts) or "the start recipe")
        self.bar.update(self.task, description=f"trial {number}", completed=share, left=left, note=note)


def _result(trial: TuningTrial) -> str:
    if trial.objective is None:
        return f"failed: {trial.failure}"
    errors = f"{format_number(trial.force_mae_meV_per_A)} / {format_number(trial.force_rmse_meV_per_A)} meV/A"
    return f"{errors}, objective {trial.objective:.4f}"


def _settings(trial: TuningTrial) -> str:
    return ", ".join(f"{key}={value}" for key, value in trial.settings.items())


def trials_table(trials: Sequence[TuningTrial], meaning: str, shown: int = 5) -> Table:
    """The best trials and the start recipe, with their parameters.

    Args:
        meaning: what the objective is.
    """
    failed = sum(t.objective is None for t in trials)
    minutes = sum(t.seconds for t in trials) / 60
    title = f"Best of {len(trials)} trials ({failed} failed, {minutes:.1f} min); objective: {meaning}"
    table = Table(title=title, title_justify="left", title_style="bold")
    settings = list(trials[0].settings)
    for heading in ("trial", "objective", "force MAE / RMSE\nmeV/A", "s", *settings):
        table.add_column(literal(heading).replace("_", "\n_"), justify="right")
    ranked = sorted((t for t in trials if t.objective is not None), key=lambda t: -(t.objective or 0.0))[:shown]
    for t in [*ranked, *(t for t in trials[:1] if t not in ranked)]:
        errors = f"{format_number(t.force_mae_meV_per_A)} / {format_number(t.force_rmse_meV_per_A)}"
        name = str(t.number) if t.number else "0 start"
        value = "failed" if t.objective is None else f"{t.objective:.4f}"
        table.add_row(name, value, errors, f"{t.seconds:.0f}", *(literal(v) for v in t.settings.values()))
    return table


def locality_table(found: Locality) -> Table:
    """Spread by radius, or noise and error by cutoff."""
    table = Table(title="Locality of forces", title_justify="left", title_style="bold")
    if not found.floors:
        for heading in ("cutoff\nA", "noise\nmeV/A", "held-out RMSE\nmeV/A"):
            table.add_column(heading, justify="right")
        for one in found.fits:
            table.add_row(f"{one.cutoff:.3g}", format_number(1e3 * one.noise), format_number(1e3 * one.rmse))
        return table
    symbols = list(dict.fromkeys(symbol for one in found.floors for symbol in one.species))
    several = symbols if len(symbols) > 1 else []
    for heading in ("beyond R\nA", "spread\nmeV/A", "±", *several, "labels"):
        table.add_column(heading, justify="right")
    for floor in found.floors:
        each = (format_number(1e3 * floor.species[s]) if s in floor.species else "-" for s in several)
        numbers = format_number(1e3 * floor.spread), format_number(1e3 * floor.error, 2)
        table.add_row(f"{floor.radius:.3g}", *numbers, *each, str(floor.labels))
    return table
