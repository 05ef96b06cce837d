"""Sections are the questions about a learning run and what stands under each, in the order in which a scientist asks them."""

from __future__ import annotations

from dataclasses import dataclass

from gpmlp.report.html import figure, live, missing, nested, table, text
from gpmlp.report.model import sections
from gpmlp.report.model.figures import Picture
from gpmlp.report.run import answers
from gpmlp.report.run.data import RunData
from gpmlp.report.run.figures import shade
from gpmlp.report.scatter import Scatter
from gpmlp.report.style import duration, number, percent

ACTIVITIES = {"dynamics": "dynamics on the model", "oracle": "waiting for the oracle", "learning": "learning labels"}
CHOOSER = '<label class="chooser" hidden>Highlight <select class="type-chooser"></select></label>'
MARKS = {
    True: '<span class="mark yes">✓ met</span>',
    False: '<span class="mark no">✗ not met</span>',
    None: '<span class="mark open">? open</span>',
}


@dataclass(frozen=True, eq=False)
class Content:
    """All that the sections draw on; `blind` is what the sections of the uncertainty report need."""

    data: RunData
    numbers: dict
    scatters: dict[str, Scatter]
    pictures: dict[str, Picture]
    blind: sections.Content | None

    def strip(self, name: str, caption: str, size: str = "strip") -> str:
        """An interactive plot, or '' if it was not made."""
        plot = self.scatters.get(name)
        return live(self.pictures, plot, plot.title, caption, size) if plot is not None else ""


def _grid(parts: list[str]) -> str:
    parts = [part for part in parts if part]
    return f'<div class="grid n{min(len(parts), 2)}">{"".join(parts)}</div>' if parts else ""


def why_stopped(content: Content) -> str:
    """Criteria, and the window over which they were judged."""
    data, pictures = content.data, content.pictures
    rows = [[text(c["name"]), MARKS[c["met"]], text(_sentence(c["sentence"]))] for c in data.criteria]
    html = []
    if rows:
        html.append(table(["criterion", "", "what it says"], rows, "", words=(0, 1, 2), flow=True))
    else:
        html.append(missing("Nothing was judged yet: too few frames were looked at."))
    if data.stopped and data.ended in ("unstable",):
        html.append(f'<p class="note">{text(data.stopped)}</p>')
    window = content.strip(
        "window_sigma", "Frames since the last change of the model, over which all criteria are judged together."
    )
    html.append("<h3>The window</h3>" if window or pictures else "")
    html.append(
        window or missing("There is no window yet: the last label came after the last frame that was looked at.")
    )
    parts = [
        figure(pictures, f"observable_{k + 1}", f"{o.name.capitalize()}, averaged over the window until then.")
        for k, o in enumerate(data.observed)
    ]
    parts += [
        figure(
            pictures,
            "label_rate",
            "How often labels were asked for in each twelfth of the run; judged is the window as a whole.",
        ),
        figure(pictures, "trust_region", "Over the 40 frames before; dashed: what is wanted of the window."),
    ]
    return "".join(html) + _grid(parts)


def _sentence(said: str) -> str:
    return said[:1].upper() + said[1:]


def how_learned(content: Content) -> str:
    """Labels, temperature, σ and novelty over time."""
    pictures = content.pictures
    if not len(content.data.frames):
        return missing("No frame has been looked at yet.")
    html = [
        CHOOSER if len(content.data.frames.walkers) > 1 else "",
        content.strip("sigma", _rule(content.data)),
        content.strip("temperature", ""),
        content.strip("novelty", "Mahalanobis distance of the farthest atom, in units of the trust region's radius."),
        _grid([
            figure(pictures, "labels_over_time", "Labels that the dynamics asked for; dots by reason."),
            figure(pictures, "label_causes", "All labels by reason."),
        ]),
    ]  # fmt: skip
    drawn, n = len(content.numbers["frames"]["step"]), len(content.data.frames)
    if drawn < n:
        html.insert(
            1,
            f'<p class="note">{drawn:,} of {n:,} frames are drawn: those that asked, and the extremes of the others.</p>',
        )
    return "".join(html)


def _rule(data: RunData) -> str:
    """When a label is asked for, in words."""
    chance = percent(data.probability)
    return (
        f"A label is asked for where some atom's force error exceeds the limit with a probability of more than {chance}: with σ well "
        "below the limit, because any of the atoms may be the one; or where novelty is too large."
    )


def honest(content: Content) -> str:
    """Errors against what was predicted of them."""
    found, pictures = content.numbers["honesty"], content.pictures
    if not found:
        return missing(
            "There is nothing to compare: no label came after the first ones, or log.jsonl does not hold what was foreseen."
        )
    note = (
        "Each label was predicted, with error bars, by the model as it was before the label came. Labels are asked for where the "
        "model is least certain, so this is a harder test than frames drawn at random."
    )
    rows = []
    for name, row in found["coverage"].items():
        count = f"{row['labels']} labels, {row['components']:,} components"
        rows.append([text(name), *(percent(row[f"coverage_{p}"]) for p in (50, 68, 90, 95)), count])
    head = ["observed", *(f"{p} % expected" for p in (50, 68, 90, 95)), ""]
    scores = [
        ["rms of error / σ (1 = honest)", number(found["rms_error_over_sigma"])],
        ["rms error, meV/Å", number(found["rms_error_meV_per_A"])],
        ["rms σ, meV/Å", number(found["rms_sigma_meV_per_A"])],
        ["rank correlation of |error| and σ, of components", number(found["spearman_of_components"], 2)],
        ["energy: rms of error / σ", number(found["energy_rms_error_over_sigma"])],
        ["energy: rms error, meV/atom", number(found["energy_rms_error_meV_per_atom"])],
    ]
    plots = [
        content.strip("foreseen", "Every force component of every label. Above the dashed line: overconfident.", ""),
        figure(pictures, "reliability", "Share of errors inside intervals of each expected coverage."),
    ]
    bounds = figure(pictures, "bounds", "The trigger asks where the bound crosses the limit.")
    shares = table(head, rows, "Share of force errors inside the interval")
    worst = (
        f'<h3>The worst atom of each label</h3><div class="halves">{bounds}{table(["", ""], scores, "Scores")}</div>'
    )
    return f'<p class="note">{text(note)}</p>{_grid(plots)}{shares}{worst}'


def what_cost(content: Content) -> str:
    """Tables of calls and time."""
    costs = content.numbers["costs"]
    rows = [
        ["first labels", number(costs["first_labels"])],
        ["labels given in a file", number(costs["given_labels"])] if costs["given_labels"] else None,
        ["labels asked for by the dynamics", number(costs["labels_asked_by_dynamics"])],
        ["structures set aside", number(costs["refused"])],
        ["attempts that failed", number(costs["failed_attempts"])],
        ["steps per label asked for", number(costs["steps_per_label"])],
        ["median time of a label", _time(costs["oracle_seconds_median"])],
    ]
    html = table(["", ""], [r for r in rows if r], "Oracle")
    seconds = dict(costs["seconds_by_activity"])
    total = 3600 * costs["hours"]
    if seconds and total > 0:
        rest = total - sum(seconds.values())
        seconds["rest"] = max(rest, 0.0)
        rows = []
        for name, value in seconds.items():
            bar = f'<span class="bar"><i style="width:{100 * value / total:.0f}%"></i></span>'
            rows.append([text(ACTIVITIES.get(name, "looking again, judging, writing, start")), bar, duration(value)])
        rows.append(["<b>all</b>", "", duration(total)])
        html += table(["", "", "time"], rows, "Wall time", words=(0, 1))
    else:
        html += missing("How the time was spent was not recorded.")
    refused = [[text(r["key"]), text(r["reason"])] for r in content.data.refused]
    aside = table(["key", "why"], refused, "Set aside without a label", words=(0, 1), flow=True) if refused else ""
    return f'<div class="halves">{html}</div>{aside}'


def _time(seconds: float | None) -> str:
    return "–" if seconds is None else duration(seconds)


def _stretches(rows: list[dict]) -> list[list[dict]]:
    """Labels of which nothing but their reason is known, of one kind and one after another, together; the others alone."""
    out: list[list[dict]] = []
    for row in rows:
        mute = row["walker"] is None and not row["largest_error_eV_per_A"] == row["largest_error_eV_per_A"]
        last = out[-1][-1] if out else None
        if mute and last is not None and last["walker"] is None and last["cause"] == row["cause"]:
            out[-1].append(row)
        else:
            out.append([row])
    return out


def _together(rows: list[dict]) -> list[str]:
    """A row of the table for labels of one kind."""
    first, last = rows[0], rows[-1]
    numbers = f"{first['number']}–{last['number']}"
    why = f"{first['reason']} … {last['reason']}" if first["reason"] != last["reason"] else first["reason"]
    kind = f'<span class="cause"><i style="background:{shade(first["cause"])}"></i>{text(first["cause"])}</span>'
    return [f'<span class="rank">{numbers}</span>', kind, *["–"] * 7, text(why)]


def which(content: Content) -> str:
    """The table of labels."""
    rows = []
    for many in _stretches(content.numbers["labels"]):
        r = many[0]
        if len(many) > 1:
            rows.append(_together(many))
            continue
        error, limit = r["largest_error_eV_per_A"], r["limit_eV_per_A"]
        strong = f"<b>{number(error)}</b>" if error > limit else number(error)
        where = "–" if r["walker"] is None else f"{r['walker']}"
        rows.append([
            f'<span class="rank">{r["number"]}</span>',
            f'<span class="cause"><i style="background:{shade(r["cause"])}"></i>{text(r["cause"])}</span>',
            where,
            "–" if r["step"] is None else number(r["step"]),
            number(r["temperature_K"]),
            number(r["predicted_bound_eV_per_A"]),
            strong,
            number(limit),
            number(r["novelty"]),
            text(f"{r['reason']} ({r['surrogate']})" if r["surrogate"] else r["reason"]),
        ])  # fmt: skip
    head = [
        "", "reason", "walker", "step", "T<small>K</small>", "bound<small>eV/Å</small>", "largest error<small>eV/Å</small>",
        "limit<small>eV/Å</small>", "novelty", "why it was asked for",
    ]  # fmt: skip
    note = (
        "Bound and novelty as predicted right before the label was learned; bold errors are beyond the limit. All are in labels.xyz, "
        "in this order."
    )
    body = (
        f'<p class="note">{text(note)}</p><div class="labels">{table(head, rows, "", words=(0, 1, 9), flow=True)}</div>'
    )
    if content.data.beside:
        body += (
            f'<p class="note"><a href="{text(content.data.beside)}">Uncertainty report of the final model on these labels</a> '
            "(they were learned from: errors there are those of a fit, not of predictions).</p>"
        )
    return body


def where_blind(content: Content) -> str:
    """The worst atoms of the trajectory under the final model."""
    if content.blind is None:
        return missing("There is no trajectory to look at yet, or the model has no error bars.")
    note = "These frames have no labels: what is shown is what the model says of itself."
    return f'<p class="note">{text(note)}</p>{sections.where_blind(content.blind)}'


def how_made(content: Content) -> str:
    """Recipe, files, versions."""
    data = content.data
    html = [f'<div class="wide nested"><h4>Given in the recipe</h4>{nested(data.given)}</div>'] if data.given else []
    model = [
        [name, number(data.model[key])]
        for key, name in (
            ("rank", "inducing variables"),
            ("condition", "condition number"),
            ("drift", "error of the factor after updates"),
            ("updates", "updates since it was made"),
        )
        if data.model.get(key) is not None
    ]
    model += [[text(f"rows of {kind}"), number(n)] for kind, n in (data.model.get("rows") or {}).items()]
    noise = {"energies": "eV/atom", "forces": "eV/Å", "stresses": "eV/Å³"}
    model += [
        [text(f"noise of {kind}"), f"{number(value)} {noise.get(kind, '')}"]
        for kind, value in (data.model.get("noise") or {}).items()
    ]
    html.append(table(["", ""], model, "Model") if model else "")
    rows = [[text(role), text(name), f"<code>{text(digest)}</code>"] for role, name, digest in data.files]
    html.append(table(["", "file", "SHA-256"], rows, "Files", words=(0, 1, 2)) if rows else "")
    words = " · ".join(f"{name} {version}" for name, version in data.versions.items())
    html.append(f'<p class="note">{text(words)}</p>' if words else "")
    events = data.model.get("events") or ()
    if events:
        told = "".join(f"<li>{text(e)}</li>" for e in events)
        html.append(
            f'<details class="nested"><summary>What was done beside learning</summary><ul>{told}</ul></details>'
        )
    html.append(f'<details class="nested"><summary>Recipe, with defaults</summary>{nested(data.recipe)}</details>')
    return "".join(html)


def all_of(content: Content) -> list[tuple[str, str, str, str]]:
    """(id, question, answer, HTML) of each section."""
    data, found = content.data, content.numbers
    blind = content.blind.numbers if content.blind is not None else None
    return [
        ("stop", "Why did it stop, and is it converged?", answers.why_stopped(data), why_stopped(content)),
        ("learned", "How did it learn?", answers.how_learned(data, found), how_learned(content)),
        ("honest", "Was the uncertainty honest?", answers.honest(data, found), honest(content)),
        ("cost", "What did it cost?", answers.what_cost(found), what_cost(content)),
        ("labels", "Which structures were labelled?", answers.which(data, found), which(content)),
        ("blind", "Where is the model blind?", answers.where_blind(data, blind), where_blind(content)),
        ("made", "How was it made?", answers.how_made(data), how_made(content)),
    ]
