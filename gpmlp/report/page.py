"""A page of the report: one HTML file without network, from templates that escape every string; its figures and numbers apart."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from gpmlp.core.errors import visible_text
from gpmlp.core.quantities import json_value
from gpmlp.io.files import atomic_write
from gpmlp.report.figures import Picture, PointLabels, Scatter, plot_payload
from gpmlp.report.style import format_duration, format_number, format_percent, format_value

PAGE, FORMER_PAGE, RECORD = "index.html", "report.html", "report.json"
FOOTER = "Made by gpmlp."


@dataclass(frozen=True)
class Section:
    """One section of a page.

    Attributes:
        id: of its block in the template, and of its anchor; title: above it.
        key: of its answer in report.json.
        answer: the sentences that open it.
    """

    id: str
    title: str
    key: str
    answer: str


@dataclass(frozen=True, eq=False)
class Page:
    """Content of one page.

    Attributes:
        template: of the sections. kind: of page, in words; about: (name, value) for the line below the title.
        tiles: (number, what it is).
        values: what else the template needs, by name.
        record: what report.json holds besides title and answers.
        labels, whole: what points of the plots belong to, and what a point without an atom is called.
        file: what the page is called in its folder.
        numbers_in: the files with its numbers, in words; report.json is written with the page, others are there already.
    """

    template: str
    kind: str
    title: str
    about: Sequence[tuple[str, str]]
    tiles: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    pictures: Mapping[str, Picture]
    values: Mapping[str, Any]
    record: Mapping[str, Any] = field(default_factory=dict)
    scatters: Mapping[str, Scatter] = field(default_factory=dict)
    labels: PointLabels = PointLabels((), (), np.zeros(0, int), np.zeros(0, int))
    whole: str = ""
    file: str = PAGE
    numbers_in: str = RECORD

    def write(self, folder: Path) -> Path:
        """Write the page, report.json and figures/ into folder (created if missing); return the path of the page.

        A report.html, the former name of the page, is removed, so that no page of other numbers remains.
        """
        folder = Path(folder)
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for name, picture in self.pictures.items():
            for suffix in ("svg", "png"):
                with atomic_write(folder / "figures" / f"{name}.{suffix}") as file:
                    file.write(getattr(picture, suffix))
        if self.numbers_in == RECORD:
            with atomic_write(folder / RECORD) as file:
                file.write(self.as_json().encode())
        with atomic_write(folder / self.file) as file:
            file.write(self.as_html().encode())
        former = folder / FORMER_PAGE
        if former.exists() and FOOTER.encode() in former.read_bytes():
            former.unlink()
        return folder / self.file

    def as_json(self) -> str:
        """Every number of the page; null where there is none."""
        answers = {section.key: section.answer for section in self.sections}
        record = json_value({"title": self.title, "answers": answers, **self.record})
        return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def as_html(self) -> str:
        """The whole page."""
        payload = json_value(plot_payload(self.labels, list(self.scatters.values()), self.whole))
        return (
            _environment()
            .get_template(self.template)
            .render({**vars(self), **self.values, "payload": payload, "footer": FOOTER})
        )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("gpmlp.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible_text(str(value)),
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    environment.filters |= {
        "number": format_number,
        "percent": format_percent,
        "duration": format_duration,
        "value": format_value,
        "data_uri": lambda picture: "data:image/svg+xml;base64," + base64.b64encode(picture.svg).decode(),
    }
    environment.tests |= {
        "container": lambda value: isinstance(value, (dict, list, tuple)),
        "a_number": lambda value: value is not None and value == value,
    }
    return environment
