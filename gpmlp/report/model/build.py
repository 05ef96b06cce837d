"""The page is report.html, one file without network, with its figures beside it and every number in report.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib import resources
from pathlib import Path
from string import Template
from typing import IO, Any

import numpy as np

from gpmlp.core.json_values import json_value
from gpmlp.report import scatter
from gpmlp.report.html import text
from gpmlp.report.model import answers, figures, numbers, sections, worst
from gpmlp.report.model.data import ReportData
from gpmlp.report.model.sections import Content
from gpmlp.report.scatter import Scatter

Write = Callable[[Path], AbstractContextManager[IO[bytes]]]


def build(data: ReportData, folder: Path, write: Write) -> Path:
    """Write report.html, report.json and figures/ into folder (made if missing); return the path of the page.

    Args:
        write: opens a file for bytes that appears only when it is complete (io.atomic.atomic).
    """
    folder = Path(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    content = gather(data)
    for name, picture in content.pictures.items():
        for kind in ("svg", "png"):
            with write(folder / "figures" / f"{name}.{kind}") as file:
                file.write(getattr(picture, kind))
    shown = sections.all_of(content)
    with write(folder / "report.json") as file:
        file.write(as_json(content, shown).encode())
    with write(folder / "report.html") as file:
        file.write(as_html(content, shown).encode())
    return folder / "report.html"


def gather(data: ReportData) -> Content:
    """Compute the numbers and draw the figures."""
    with np.errstate(all="ignore"):
        labelled = numbers.views(data)
        found = numbers.everything(data, labelled)
        found |= {"worst_environments": worst.environments(data), "label_next": worst.label_next(data)}
        plots = _plots(data, labelled)
        pictures = figures.all_of(data, labelled, found, plots)
    return Content(data, labelled, found, {plot.name: plot for plot in plots}, pictures)


def _plots(data: ReportData, labelled: dict) -> list[Scatter]:
    judged = numbers.with_std(labelled)
    plots = [scatter.parity(view) for view in labelled.values()]
    plots += [scatter.error_against_std(view) for view in judged.values()]
    return plots + [plot for plot in [scatter.novelty_map(data)] if plot]


def as_json(content: Content, shown: list[tuple[str, str, str, str]]) -> str:
    """Every number of the page; None where there is none."""
    data = content.data
    record = {
        "title": data.title,
        "model_name": data.model_name,
        "data_name": data.data_name,
        "answers": {question: answer for _, question, answer, _ in shown},
        **content.numbers,
        "model": data.model,
        "dimers": data.dimers,
        "citations": data.citations,
    }
    return json.dumps(json_value(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def as_html(content: Content, shown: list[tuple[str, str, str, str]]) -> str:
    """The whole page."""
    data = content.data
    size = f"{len(data.names):,} structures, {len(data.structure):,} atoms"
    about = f"<span>Model <b>{text(data.model_name)}</b></span> <span>Data <b>{text(data.data_name)}</b></span> <span>{size}</span>"
    tiles = answers.key_numbers(data, content.labelled, content.numbers)
    return whole(
        "Uncertainty report", data.title, about, tiles, shown, scatter.payload(data, list(content.scatters.values()))
    )


def whole(
    kind: str,
    title: str,
    about: str,
    key_numbers: Sequence[tuple[str, str]],
    shown: Sequence[tuple[str, str, str, str]],
    payload: dict[str, Any],
) -> str:
    """A page of sections.

    Args:
        about: HTML of the line below the title.
        key_numbers: (number, what it is).
        shown: (id, question, answer, HTML) of each section.
        payload: of the interactive plots.
    """
    here = resources.files("gpmlp.report")
    contents = "".join(f'<li><a href="#{name}">{text(question)}</a></li>' for name, question, _, _ in shown)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{text(question)}</h2>'
        f'<p class="answer">{text(answer)}</p>{inside}</section>'
        for name, question, answer, inside in shown
    )
    tiles = "".join(f"<li><b>{text(value)}</b> <span>{text(what)}</span></li>" for value, what in key_numbers)
    packed = json.dumps(json_value(payload), allow_nan=False)
    return Template((here / "template.html").read_text("utf-8")).substitute(
        kind=text(kind),
        title=text(title),
        meta=about,
        tiles=f'<ul class="tiles">{tiles}</ul>' if tiles else "",
        contents=contents,
        body=body,
        style=(here / "style.css").read_text("utf-8"),
        # no '<' inside a script, so that no name can end it
        packed=packed.replace("<", "\\u003c"),
        script=(here / "interactive.js").read_text("utf-8"),
    )
