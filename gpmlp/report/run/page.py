"""The page about a run is index.html, one file without network, with its figures beside it and every number in report.json."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from gpmlp.core.json_values import json_value
from gpmlp.report import scatter
from gpmlp.report.html import text
from gpmlp.report.model import build as page
from gpmlp.report.model import numbers as of_model
from gpmlp.report.model import sections, worst
from gpmlp.report.model.build import Write
from gpmlp.report.run import answers, figures, numbers
from gpmlp.report.run.data import FINISHED, RunData
from gpmlp.report.run.sections import Content, all_of


def build(data: RunData, folder: Path, write: Write) -> Path:
    """Write index.html, report.json and figures/ into folder (made if missing); return the path of the page.

    Args:
        write: opens a file for bytes that appears only when it is complete (io.atomic.atomic).
    """
    folder = Path(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    with np.errstate(all="ignore"):
        content, places = gather(data)
        shown = all_of(content)
    for name, picture in content.pictures.items():
        for kind in ("svg", "png"):
            with write(folder / "figures" / f"{name}.{kind}") as file:
                file.write(getattr(picture, kind))
    with write(folder / "report.json") as file:
        file.write(as_json(content, shown).encode())
    with write(folder / "index.html") as file:
        file.write(as_html(content, places, shown).encode())
    return folder / "index.html"


def gather(data: RunData) -> tuple[Content, figures.Places]:
    """Compute the numbers and draw the figures."""
    found = numbers.everything(data)
    places, drawn = figures.all_plots(data)
    pictures = figures.all_of(data, found, drawn)
    blind = None
    if data.blind is not None:
        inside = of_model.trust(data.blind)
        told = {"trust_region": inside, "worst_environments": worst.environments(data.blind)}
        found["blind"] = told
        blind = sections.Content(data.blind, {}, told, drawn, pictures)
    return Content(data, found, drawn, pictures, blind), places


def as_json(content: Content, shown: list[tuple[str, str, str, str]]) -> str:
    """Every number of the page; None where there is none."""
    data = content.data
    record = {
        "title": data.title,
        "folder": data.folder,
        "answers": {question: answer for _, question, answer, _ in shown},
        **content.numbers,
        "recipe": data.recipe,
        "files": [dict(zip(("role", "name", "sha256"), row, strict=True)) for row in data.files],
        "versions": data.versions,
        "model": data.model,
        "oracle": dict(zip(("calculator", "settings"), data.oracle, strict=True)),
    }
    return json.dumps(json_value(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def as_html(content: Content, places: figures.Places, shown: list[tuple[str, str, str, str]]) -> str:
    """The whole page."""
    data = content.data
    spans = [f"Run <b>{text(data.folder)}</b>", f"Oracle <b>{text(data.oracle[0])}</b>", text(FINISHED[data.ended])]
    about = " ".join(f"<span>{span}</span>" for span in spans)
    payload = scatter.payload(places, list(content.scatters.values()), "frame")
    return page.whole("Learning run", data.title, about, answers.key_numbers(data, content.numbers), shown, payload)
