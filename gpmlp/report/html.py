"""Markup is how numbers, tables and figures of the report become HTML; every string from the data is escaped here."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from gpmlp.report.model.figures import Picture
from gpmlp.report.scatter import Line, Scatter
from gpmlp.report.style import CAUSE_NAMES, cause_colour


def text(value: object) -> str:
    """Escaped text."""
    return escape(str(value), quote=True)


def missing(why: str) -> str:
    """The sentence that stands where a part is missing."""
    return f'<p class="missing">{text(why)}</p>'


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str = "",
    words: Sequence[int] = (0,),
    flow: bool = False,
) -> str:
    """A table of cells that are HTML already.

    Args:
        words: columns that are left-aligned.
        flow: on narrow pages each row becomes a block of named cells, the last one below the others.
    """
    kinds = ["w" if k in words else "n" for k in range(len(head))]
    names = [
        f' data-name="{text(re.sub("<.*?>", " ", cell))}"' if flow and k not in words else ""
        for k, cell in enumerate(head)
    ]
    top = "".join(f'<th scope="col" class="{kind}">{cell}</th>' for kind, cell in zip(kinds, head, strict=True))
    cells = ([f'<td class="{k}"{n}>{c}</td>' for k, n, c in zip(kinds, names, row, strict=True)] for row in rows)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    shape = ' class="flow"' if flow else ""
    top = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return f'<div class="wide"><table{shape}>{title}{top}<tbody>{body}</tbody></table></div>'


def image(picture: Picture, more: str = "") -> str:
    """An embedded still figure."""
    source = base64.b64encode(picture.svg).decode()
    return f'<img {more}src="data:image/svg+xml;base64,{source}" alt="{text(picture.alt)}" style="max-width:{1.1 * picture.width:.0f}px">'


def figure(pictures: dict[str, Picture], name: str, caption: str, size: str = "") -> str:
    """A still figure with its caption; '' if it was not made."""
    if name not in pictures:
        return ""
    body = image(pictures[name])
    return f'<figure class="{size}">{body}<figcaption>{text(caption)}</figcaption></figure>'


def live(pictures: dict[str, Picture], plot: Scatter, title: str, caption: str, size: str = "") -> str:
    """An interactive plot; its still figure prints, and shows where scripts are off."""
    shown = len(plot.px)
    kept, more = len(plot.kept()), ""
    if kept < shown:
        note = f"All {shown:,} are in the image; the {kept:,} dots can be pointed at, the worst among them."
        more = f' <span class="screen">{note}</span>'
    alt = text(pictures[plot.name].alt)
    canvas = f'<canvas data-plot="{text(plot.name)}" role="img" aria-label="{alt}"></canvas>'
    keys = "".join(_key(line) for line in plot.lines)
    heading = f"<h3>{text(title)}</h3>" if title else ""
    still = image(pictures[plot.name], 'class="still" ')
    foot = f'<figcaption><span class="keys">{keys}</span> {text(caption)}{more}</figcaption>'
    return f'<figure class="live-plot {size}">{heading}{canvas}{still}{foot}</figure>'


def _key(line: Line) -> str:
    dash = ' stroke-dasharray="4 3"' if line.dashed else ""
    dot = f'<circle cx="11" cy="5" r="2.6" fill="{line.colour}"/>' if line.dots else ""
    mark = f'<line x1="1" y1="5" x2="21" y2="5" stroke="{line.colour}" stroke-width="1.6"{dash}/>'
    mark = dot if line.bare else mark + dot
    return f'<span class="key"><svg viewBox="0 0 22 10" aria-hidden="true">{mark}</svg>{text(line.label)}</span>'


def cause_keys(causes: Sequence[str]) -> str:
    """Legend of the causes of uncertainty."""
    keys = "".join(
        f'<span class="key"><i style="background:{cause_colour(c)}"></i>{text(CAUSE_NAMES.get(c, c))}</span>'
        for c in causes
    )
    return f'<p class="keys">{keys}</p>'


def nested(value: Any) -> str:
    """A nested dict or list as definition lists; scalars as text."""
    if isinstance(value, dict):
        if not value:
            return "<span class='pale'>none</span>"
        items = "".join(f"<dt>{text(str(k).replace('_', ' '))}</dt><dd>{nested(v)}</dd>" for k, v in value.items())
        return f"<dl>{items}</dl>"
    if isinstance(value, (list, tuple)):
        if any(isinstance(v, (dict, list, tuple)) for v in value):
            return "".join(nested(v) for v in value)
        return text(", ".join(scalar(v) for v in value)) or "none"
    return text(scalar(value))


def scalar(value: Any) -> str:
    """A plain value in words."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}".replace("-", "−") if isinstance(value, float) else str(value)
